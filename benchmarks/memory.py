"""Peak memory of a pretraining process against batch size and against the number of images.

    python benchmarks/memory.py [--steps 4] [--batches 32 64 128 256] [--images 1000 10000 100000]

Each point is a process of its own. Images lie in a memory map on disk, whose pages the kernel may take back at any
time; so anonymous memory is the figure (what the process holds), beside the peak of everything resident.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import SIZES, subject, write
from step import ours

from stages.kit import memory
from stages.kit.loader import Batches
from stages.kit.store import NpyWriter


class Mapped:
    """A split whose images are a memory map, as store.Split's."""

    def __init__(self, file: Path, count: int, size: int):
        writer, row = NpyWriter(file, (size, size, 3)), np.zeros((size, size, 3), np.uint8)
        for _ in range(count):
            writer.add(row)
        writer.close()
        self.images, self.labels = np.load(file, mmap_mode="r"), np.zeros(count, np.int64)

    def __len__(self) -> int:
        return len(self.labels)


def one(size: str, batch: int, images: int, steps: int) -> dict:
    """Memory in MB after some steps that touch images all over the set."""
    memory.keep_freed()
    method, views = subject("mae", size)
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(Mapped(Path(folder) / "images.npy", images, SIZES[size]["image"]), views, batch, 0)
        for _ in ours(method, batches, steps, torch.device("cpu")):
            pass
        lines = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return {"anonymous": anonymous / 2**10, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.size, *args.one, args.steps)))
        return
    rows = []
    points = [(b, 2 * max(args.batches)) for b in args.batches] + [(min(args.batches), n) for n in args.images]
    for batch, images in points:
        command = [sys.executable, __file__, "--size", args.size, "--steps", str(args.steps), "--one", str(batch), str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append([f"mae, {args.size}", batch, f"{images:,}", f"{found['anonymous']:.0f}", f"{found['peak']:.0f}"])
    columns = ["training", "batch", "images", "held, MB", "peak resident, MB"]
    write("memory", columns, rows, f"Memory of a pretraining process after {args.steps} steps.")


if __name__ == "__main__":
    main()
