"""Peak memory of a pretraining process against batch size and against the number of images.

    python benchmarks/memory.py [--steps 4] [--batches 32 64 128 256] [--images 1000 10000 100000]

Each point is a process of its own. Images lie in a memory map on disk, whose pages the kernel may
take back at any time; so anonymous memory is the figure (what the process holds), beside the peak
of everything resident. Or they lie in Parquet shards, as those of a set larger than memory.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import SIZES, subject, write
from PIL import Image
from step import ours

from stages.kit.data.loader import Batches
from stages.kit.data.store import Split
from stages.kit.data.writer import SplitWriter
from stages.kit.train import malloc


def store(folder: Path, images: int, size: int, storage: str) -> None:
    """A data set of grey squares, as the data stage writes it: "memmap" or "shards"."""
    square, file = np.full((size, size, 3), 128, np.uint8), io.BytesIO()
    Image.fromarray(square).save(file, "jpeg")
    writer = SplitWriter(folder, "train", size, [], memmap=storage == "memmap")
    for i in range(images):
        writer.add(f"{i}.jpeg", file.getvalue(), -1, square)
    writer.close()
    facts = {
        "mode": storage,
        "store_size": size,
        "classes": [],
        "splits": {"train": {"count": images}},
    }
    (folder / "data.json").write_text(json.dumps(facts))


def one(size: str, batch: int, folder: str, steps: int) -> dict:
    """Memory in MB after some steps that touch images all over the set."""
    malloc.keep_freed()
    method, views = subject("mae", size)
    batches = Batches(Split.open(folder, "train"), views, batch, 0)
    for _ in ours(method, batches, steps, torch.device("cpu")):
        pass
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return {
        "anonymous": anonymous / 2**10,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--one", nargs=2, metavar=("BATCH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.size, int(args.one[0]), args.one[1], args.steps)))
        return
    rows, least = [], min(args.batches)
    points = [("memmap", b, 2 * max(args.batches)) for b in args.batches]
    points += [(storage, least, n) for storage in ("memmap", "shards") for n in args.images]
    for storage, batch, images in points:
        with tempfile.TemporaryDirectory() as folder:
            store(Path(folder), images, SIZES[args.size]["image"], storage)
            options = ["--size", args.size, "--steps", str(args.steps), "--one", str(batch), folder]
            done = subprocess.run(
                [sys.executable, __file__, *options], capture_output=True, text=True, check=True
            )
        found = json.loads(done.stdout.splitlines()[-1])
        megabytes = [f"{found[what]:.0f}" for what in ("anonymous", "peak")]
        rows.append([f"mae, {args.size}, {storage}", batch, f"{images:,}", *megabytes])
    columns = ["training", "batch", "images", "held, MB", "peak resident, MB"]
    write("memory", columns, rows, f"Memory of a pretraining process after {args.steps} steps.")


if __name__ == "__main__":
    main()
