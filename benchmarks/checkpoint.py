"""What a checkpoint costs: writing and reading it, against a step.

python benchmarks/checkpoint.py [--size small large]
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from _common import SIZES, seconds, subject, write

from stages.kit.train import optim
from stages.kit.train.checkpoint import Checkpoint
from stages.kit.train.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, nargs="*", default=["small", "large"])
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for size in args.size:
        method, _ = subject("mae", size)
        optimizer = optim.build(
            Recipe(1, 1, 1, 1e-4), optim.groups(method, 0.05), torch.device("cpu")
        )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = {"step": 1, "model": method.state_dict(), "optimizer": optimizer.state_dict()}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Checkpoint(Path(folder))
            save = seconds(partial(checkpoint.save, state), args.times)
            load = seconds(checkpoint.load, args.times)
            size_mb = max(p.stat().st_size for p in Path(folder).iterdir()) / 2**20
        rows.append(
            [
                f"mae, {size}",
                f"{size_mb:.0f}",
                f"{1e3 * save:.0f}",
                f"{1e3 * load:.0f}",
                f"{100 * save / 300:.2f} %",
            ]
        )
    columns = ["training", "MB", "save, ms", "load, ms", "share of the time at one in 5 minutes"]
    write(
        "checkpoint",
        columns,
        rows,
        "A checkpoint of model and AdamW, written to the temporary folder's disk.",
    )


if __name__ == "__main__":
    main()
