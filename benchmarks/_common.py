"""What the benchmarks share: models to measure, images of noise, both sides in turn, and one way to
write a table.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from stages.kit.nets import encoders  # noqa: E402
from stages.kit.nets.target import EncoderTarget, Frozen  # noqa: E402
from stages.kit.spec import Spec, configure, encoder_config  # noqa: E402
from workflow import plugins  # noqa: E402

OUT = Path(os.environ.get("MIMLAB_BENCH", ROOT / "docs" / "benchmarks"))
SIZES = {
    # to try a benchmark out
    "tiny": {"image": 32, "patch": 8, "dim": 32, "depth": 2, "heads": 2, "batch": 8},
    "small": {"image": 32, "patch": 4, "dim": 192, "depth": 12, "heads": 3, "batch": 256},
    "large": {"image": 224, "patch": 16, "dim": 384, "depth": 12, "heads": 6, "batch": 32},
    "base": {"image": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12, "batch": 256},
}


def trainable() -> list[str]:
    """Every method that trains without labels."""
    modules = {name: plugins.module("method", name) for name in plugins.names("method")}
    return [name for name, module in modules.items() if module.TRAINS and not module.LABELS]


def subject(name: str, size: str, published: bool = False) -> tuple:
    """(module, its views) of a method; its target has the student's size and is not trained.

    published: the paper's settings instead of the defaults, which are for small images.
    """
    s, module = SIZES[size], plugins.module("method", name)
    sizes = {"patch_size": s["patch"], "embed_dim": s["dim"]}
    model = encoder_config("vit", {**sizes, "depth": s["depth"], "num_heads": s["heads"]})
    spec = Spec(s["image"], "vit", model, (0.5,) * 3, (0.25,) * 3, 10, 1024)
    settings = {}
    if "mask_unit" in vars(module.Config()):  # its default is no multiple of the patch at 224 px
        settings["mask_unit"] = 2 * s["patch"]
    if published:
        known = vars(module.Config())
        settings |= {key: value for key, value in module.PUBLISHED.items() if key in known}
    config = configure(module.Config, settings)
    torch.manual_seed(0)
    target = None
    if {"ids"} == module.TARGET:
        kind = plugins.module("target", "vqkd")
        sizes = {"codes": 8192, "code_dim": 32} if published else {}
        target = Frozen(kind.Target(kind.Config(**sizes), spec))
    elif module.TARGET:
        target = Frozen(EncoderTarget(encoders.create(spec), spec))
    return module.Method(config, spec, target).train(), module.views(config, spec)


class Memory:
    """A split of noise that lies in memory, with what Batches asks of store.Split."""

    def __init__(self, count: int, size: int):
        self.images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        self.labels = np.zeros(count, np.int64)

    def __len__(self) -> int:
        return len(self.images)


def seconds(work, times: int = 3) -> float:
    """Median time of `work`, after one run that is not counted."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def write(name: str, columns: list[str], rows: list[list], note: str) -> None:
    """Prints a table and writes it, with the machine that it comes from, to
    docs/benchmarks/<name>.md.
    """
    head = [
        f"| {' | '.join(columns)} |",
        "|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|",
    ]
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    machine = f"{cpu()}, {os.cpu_count()} cores{gpu}; {threads}"
    text = "\n".join([note, "", *head, *body, "", f"On {machine}.", ""])
    print(text, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.md").write_text(text)


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
