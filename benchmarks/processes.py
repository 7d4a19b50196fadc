"""Scaling of a training over processes: the same global batch on 1, 2, ... of them, one thread or
GPU each.

python benchmarks/processes.py [--size small] [--steps 8] [--processes 1 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from _common import SIZES, Memory, subject, write

from stages.kit import dist
from stages.kit.data.loader import Batches
from stages.kit.train.loop import fit
from stages.kit.train.recipe import Recipe


def one(size: str, steps: int, out: Path) -> None:
    """Trains MAE for some steps in this process group; the first process writes images per second
    to `out`.
    """
    dist.start()
    torch.set_num_threads(1)
    method, views = subject("mae", size)
    batch = SIZES[size]["batch"]
    split = Memory(2 * batch, SIZES[size]["image"])
    batches = Batches(split, views, batch, 0, rank=dist.rank(), world=dist.world())
    device = torch.device("cuda", dist.rank()) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        job = SimpleNamespace(id="bench")
        run = SimpleNamespace(
            job=job, out=Path(folder), work=Path(folder), device=device, compute={}, summary={}
        )
        fit(method, batches, Recipe(1, batch, steps, 1e-4, save_minutes=1e9), run, 0)
    if dist.is_main():
        out.write_text(json.dumps(batch * steps / run.summary["train_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.size, args.steps, args.one)
        return
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        most = torch.cuda.device_count() or max(args.processes)
        for count in (n for n in args.processes if n <= most):
            out = Path(folder) / f"{count}.json"
            launch = (
                ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--"]
                if count > 1
                else []
            )
            command = [
                sys.executable,
                *launch,
                __file__,
                "--one",
                str(out),
                "--size",
                args.size,
                "--steps",
                str(args.steps),
            ]
            subprocess.run(command, check=True, capture_output=True)
            rate = json.loads(out.read_text())
            first = first or rate
            rows.append([count, f"{rate:.1f}", f"{rate / first:.2f}"])
    note = f"MAE, {args.size}, batch {SIZES[args.size]['batch']} shared by processes of one thread "
    note += f"each, {args.steps} steps."
    write("processes", ["processes", "images/s", "over the first"], rows, note)


if __name__ == "__main__":
    main()
