"""Batches as the stages want them: for a training, for its pictures, for a target's health."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stages.kit import dist
from stages.kit.data import store
from stages.kit.data.loader import Batches
from stages.kit.spec import Spec

SHOWN = 8  # validation images in the pictures
GALLERY = 256  # among which the nearest ones are looked for
MOST = 256  # images at a time, of those that are only looked at


def training_batches(run, module, config, spec: Spec, data: Path, seed: int) -> Batches:
    """The batches of a plug-in module with `views` and `LABELS`, for this job's train section and
    this process. A plug-in that needs labels gets the images that have one.

    Where `views` takes three arguments, the third is the share of the training that is behind, in
    [0, 1), and the views of every step are made for it. A property `growth` of the Config says when
    a step takes several batches (kit/growth.py).
    """
    train, split = run.job.params["train"], store.Split.open(data, "train")
    rows = torch.from_numpy(split.labels >= 0).nonzero().flatten()
    if module.LABELS and 0 < len(rows) < len(split):
        split = Subset(split, rows)
    views = functools.partial(module.views, config, spec)
    follows = len(inspect.signature(module.views).parameters) > 2
    return Batches(
        split,
        views if follows else views(),
        train["batch_size"],
        seed,
        micro=train["micro_batch"],
        labels=bool(module.LABELS),
        workers=run.compute["workers"],
        rank=dist.rank(),
        world=dist.world(),
        epochs=train["epochs"],
        growth=getattr(config, "growth", ()),
    )


def training_images(run, module, config, spec: Spec, data: Path, seed: int) -> Iterator:
    """Every training image once, in a random order, as "view" of the plug-in's `views` shows it.

    Batches (b,3,H,W) in [0,1] on the run's device; the same on every process.
    """
    split = store.Split.open(data, "train")
    size = min(run.job.params["train"]["batch_size"], MOST, len(split))
    views, workers = module.views(config, spec), run.compute["workers"]
    batches = Batches(split, views, size, seed, workers=workers, drop_last=False)
    for (batch,) in batches.stream(0, batches.steps_per_epoch):
        yield batch["view"].to(run.device)


class Subset:
    """Some rows of a split, as the loader reads one."""

    images = None  # so that the loader asks for one image at a time

    def __init__(self, split, rows: torch.Tensor):
        self.split, self.rows, self.labels = split, rows.tolist(), split.labels[rows.numpy()]

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, i: int) -> np.ndarray:
        return self.split.decode(self.rows[i])

    def square(self, indices, size: int, crop: float = 1.0) -> torch.Tensor:
        return self.split.square([self.rows[i] for i in indices], size, crop)


def held_out(data: Path) -> store.Split:
    """The validation split, or the train split where there are no validation images."""
    facts = store.info(data)["splits"]
    return store.Split.open(data, "val" if facts.get("val", {}).get("count") else "train")


def shown_batch(data: Path, spec: Spec, device: torch.device) -> dict[str, torch.Tensor]:
    """The first images that are held out, as a batch with one view.

    "gallery" (n,3,H,W) are these and more, evenly taken from the rest of the split.
    """
    split = held_out(data)
    index = torch.arange(min(SHOWN, len(split)))
    rest = torch.arange(len(index), len(split))
    rest = rest[:: max(1, -(-len(rest) // (GALLERY - len(index))))]
    every = torch.cat([index, rest]).numpy()
    gallery = split.square(every, spec.image_size).permute(0, 3, 1, 2).float().div(255)
    labels = torch.as_tensor(split.labels[index.numpy()], dtype=torch.int64)
    batch = {"view": gallery[: len(index)], "index": index, "row": index, "label": labels}
    batch["gallery"] = gallery
    return {name: value.to(device) for name, value in batch.items()}


def write_pictures(folder: Path, pictures: dict) -> None:
    """{name: uint8 (H,W,3)} -> folder/<name>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
