"""A training step with its data: mimlab's loop against the same method written plainly, and the loader alone.

    python benchmarks/step.py [--size small|large] [--steps 12] [--threads N]

Plain: eager fp32, unfused AdamW, one image after the other through PIL (torchvision's RandomResizedCrop and
flip). mimlab: batched views in a loader thread, precision `auto`, fused AdamW, plain attention on a CPU.
Both run alternately in this one process on the same images, so that a noisy machine disturbs both; the
table gives medians and their ratio. "small" is ViT-Tiny at 32 px, "large" ViT-Small/16 at 224 px.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
from stages import methods
from stages.kit import precision
from stages.kit.attention import multiplied_out
from stages.kit.loader import Batches
from stages.kit.loop import Progress
from stages.kit.spec import Spec

SIZES = {
    "small": {"image": 32, "patch": 4, "dim": 192, "depth": 12, "heads": 3, "batch": 256},
    "large": {"image": 224, "patch": 16, "dim": 384, "depth": 12, "heads": 6, "batch": 32},
}


class Codes(torch.nn.Module):
    """Stands for a tokenizer: ids from the patch means, so that the step timed is the student's."""

    codes = 512

    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), self.patch).flatten(1)
        return (means * (self.codes - 1)).long()


def subject(name: str, size: dict) -> tuple:
    """(module, its views, spec) of a method in the given size."""
    module = methods.find(name)
    model = {"name": "vit_tiny_patch16_224", "patch_size": size["patch"], "embed_dim": size["dim"],
             "depth": size["depth"], "num_heads": size["heads"], "mlp_ratio": 4.0, "args": {}}  # fmt: skip
    spec = Spec(size["image"], model, (0.5,) * 3, (0.25,) * 3, 10, 1024)
    config = module.Config()
    torch.manual_seed(0)
    return module.Method(config, spec, Codes(size["patch"])).train(), module.views(config, spec), spec


def ours(method, views, images: np.ndarray, batch: int, steps: int):
    """Yields the seconds of each step of the loop's own ingredients."""
    split = Memory(images)
    batches = Batches(split, views, batch, 0, micro=None, workers=1)
    arithmetic = precision.choose("auto", "cpu", method)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-4, fused=True)
    for step, micros in enumerate(batches.stream(0, steps)):
        start = time.perf_counter()
        progress = Progress(step, steps, 0.0, 0, micros[0]["row"], torch.device("cpu"))
        with arithmetic.autocast(), multiplied_out("cpu"):
            loss = method(micros[0], progress)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - start


class Memory:
    """A split that lies in memory, with what Batches asks of store.Split."""

    def __init__(self, images: np.ndarray):
        self.images, self.labels = images, np.zeros(len(images), np.int64)

    def __len__(self) -> int:
        return len(self.images)


def plain(method, images: np.ndarray, size: int, batch: int, steps: int):
    """Yields the seconds of each step of the same method as a first version would do it."""
    augment = transforms.Compose([
        transforms.RandomResizedCrop(size, (0.4, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor()])  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 1e-4, foreach=False)
    for step in range(steps):
        start = time.perf_counter()
        chosen = np.random.default_rng(step).choice(len(images), batch, replace=False)
        view = torch.stack([augment(Image.fromarray(images[i])) for i in chosen])
        rows = torch.arange(batch)
        progress = Progress(step, steps, 0.0, 0, rows, view.device)
        loss = method({"view": view, "index": rows, "row": rows}, progress)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.steps} steps\n")
    print("| method | size | plain, ms | mimlab, ms | plain / mimlab | loader, images/s | step / loader |")
    print("|---|---|---|---|---|---|---|")
    for name in args.size:
        size = SIZES[name]
        stored = round(size["image"] * 1.15) if name == "large" else size["image"]
        shape = (1024 if name == "small" else 256, stored, stored, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        for method_name in ("mae", "beitv2"):
            method, views, _ = subject(method_name, size)
            timed = {"plain": [], "ours": []}
            left = plain(method, images, size["image"], size["batch"], args.steps)
            right = ours(method, views, images, size["batch"], args.steps)
            for _ in range(args.steps):
                timed["plain"].append(next(left))
                start = time.perf_counter()  # with the wait for the loader
                next(right)
                timed["ours"].append(time.perf_counter() - start)
            slow, fast = (statistics.median(v[2:]) for v in (timed["plain"], timed["ours"]))
            batches = Batches(Memory(images), views, size["batch"], 0, micro=None, workers=1)
            start = time.perf_counter()
            for step in range(4):
                batches.batch(step)
            loader = (time.perf_counter() - start) / 4
            print(f"| {method_name} | {name} | {1e3 * slow:.0f} | {1e3 * fast:.0f} | {slow / fast:.2f} "
                  f"| {size['batch'] / loader:.0f} | {fast / loader:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
