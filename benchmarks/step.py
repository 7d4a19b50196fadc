"""A training step of every method with its data: mimlab's ingredients against the same method
written plainly.

    python benchmarks/step.py [--methods mae beitv2] [--size small large] [--steps 12]
        [--threads N] [--device cpu]
    python benchmarks/step.py --device cuda --methods mae beitv2 --size base
        --published --ours --steps 30

Plain: eager fp32, unfused AdamW, one image after the other through PIL and torchvision. mimlab:
batched views in a loader thread, the precision of `--precision`, fused AdamW. Both run alternately
in this one process on the same images, so that a noisy machine disturbs both; medians. Utilisation:
FLOPs counted in an eager fp32 step, per second of it, over what large products of that precision
reach here (kit/train/flops.matrix_rate). `--ours` leaves the plain side out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import numpy as np
import torch
from _common import SIZES, Memory, seconds, subject, trainable, write
from PIL import Image
from torchvision import transforms

from stages.kit.data.loader import Batches
from stages.kit.nets.attention import unfused
from stages.kit.nets.target import Frozen
from stages.kit.train import flops, malloc, optim, precision
from stages.kit.train.recipe import Progress, Recipe


def advance(method, batch, progress, optimizer, arithmetic=None) -> None:
    """One optimiser step."""
    with arithmetic.autocast() if arithmetic else nullcontext():
        loss = method(batch, progress)["loss"]
    loss.float().backward()
    if hasattr(method, "before_step"):
        method.before_step(progress)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if hasattr(method, "after_step"):
        method.after_step(progress)


def ours(method, batches: Batches, steps: int, device: torch.device, arithmetic):
    """Takes the steps of the loop's own ingredients, one at each `next`."""
    if arithmetic.name == "bf16":
        unfused(method, device)
    recipe = Recipe(1, batches.batch_size, steps, 1e-4)
    optimizer = optim.build(recipe, optim.groups(method, 0.05), device)
    for step, micros in enumerate(batches.stream(0, steps)):
        batch = {key: value.to(device, non_blocking=True) for key, value in micros[0].items()}
        progress = Progress(step, steps, 0.0, 0, batch["row"], device)
        advance(method, batch, progress, optimizer, arithmetic)
        yield


def pipeline(view) -> transforms.Compose:
    """A View as torchvision and PIL do it, image by image."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.RandomResizedCrop(view.size, view.scale, view.ratio, bicubic)]
    steps += [transforms.RandomHorizontalFlip(view.flip)] if view.flip else []
    steps += (
        [transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.jitter_p)]
        if any(view.jitter)
        else []
    )
    steps += [transforms.RandomGrayscale(view.grey)] if view.grey else []
    steps += (
        [transforms.RandomApply([transforms.GaussianBlur(9, view.blur_sigma)], view.blur)]
        if view.blur
        else []
    )
    steps += [transforms.RandomSolarize(128, view.solarise)] if view.solarise else []
    return transforms.Compose([*steps, transforms.ToTensor()])


def plain(method, images: np.ndarray, views: dict, batch: int, steps: int, device: torch.device):
    """Takes the steps of the same method as a first version would, one at each `next`."""
    pipelines = {name: pipeline(view) for name, view in views.items()}
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], 1e-4, foreach=False
    )
    for step in range(steps):
        chosen = np.random.default_rng(step).choice(len(images), batch, replace=False)
        made = {
            name: torch.stack([do(Image.fromarray(images[i])) for i in chosen]).to(device)
            for name, do in pipelines.items()
        }
        rows = torch.arange(batch, device=device)
        advance(
            method,
            {**made, "index": rows, "row": rows},
            Progress(step, steps, 0.0, 0, rows, device),
            optimizer,
        )
        yield


def timed(side, device: torch.device) -> float:
    start = time.perf_counter()
    next(side)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, size: str, args, device: torch.device) -> list:
    """One row of the table."""
    s = SIZES[size]
    side, batch = s["image"], args.batch or s["batch"]
    split = Memory(
        max(1024 if side < 100 else 256, batch), side if side < 100 else round(side * 1.15)
    )
    method, views = subject(name, size, args.published)
    method.to(device)
    for target in vars(method).values():  # a target is out of the module's sight
        if isinstance(target, Frozen):
            target.open.to(device)
    batches = Batches(split, views, batch, 0, workers=args.workers)
    with flops.counting() as counter:
        next(plain(method, split.images, views, 2, 1, device))
    per_image = counter.get_total_flops() / 2
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    arithmetic = precision.choose(args.precision, device, method)
    right, fast, slow = ours(method, batches, args.steps, device, arithmetic), [], []
    left = None if args.ours else plain(method, split.images, views, batch, args.steps, device)
    for _ in range(args.steps):
        if left:
            slow.append(timed(left, device))
        fast.append(timed(right, device))
    warm = min(2, args.steps - 1)
    mine = statistics.median(fast[warm:])
    loader = seconds(lambda: batches.batch(1), 2)
    used = per_image * batch / mine / flops.matrix_rate(device, arithmetic.name)
    gigabytes = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"
    theirs = statistics.median(slow[warm:]) if slow else None
    return [
        name,
        f"{size}, batch {batch}",
        f"{1e3 * theirs:.0f}" if theirs else "-",
        f"{1e3 * mine:.0f}",
        f"{theirs / mine:.2f}" if theirs else "-",
        f"{batch / mine:.0f}",
        f"{used:.0%}",
        gigabytes,
        f"{batch / loader:.0f}",
        f"{mine / loader:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=trainable())
    parser.add_argument("--size", choices=SIZES, nargs="*", default=["small", "large"])
    parser.add_argument("--batch", type=int, help="images per step (default: the size's)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="loader threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=precision.NAMES, default="auto", help="of mimlab's")
    parser.add_argument(
        "--published", action="store_true", help="the published settings of methods for 224 px"
    )
    parser.add_argument("--ours", action="store_true", help="without the plain side")
    parser.add_argument("--name", default="step", help="of the file under docs/benchmarks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    malloc.keep_freed()
    device = torch.device(args.device)
    columns = ["method", "size", "plain, ms", "mimlab, ms", "plain / mimlab", "images/s"]
    columns += ["utilisation", "GPU memory, GB", "loader, images/s", "step / loader"]
    rows = [measure(name, size, args, device) for size in args.size for name in args.methods]
    write(
        args.name,
        columns,
        rows,
        f"A training step with its data, {args.steps} steps, on {args.device}.",
    )


if __name__ == "__main__":
    main()
