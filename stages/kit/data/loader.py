"""Batches as a pure function of (seed, step): resume, threads and ranks change nothing.

Epoch e visits the images in the order keyed.permutation(N, seed, "order", e). The global batch of a
step is a slice of that order, a rank takes a contiguous slice of the batch, and micro batches are
slices of the rank's. `batch_size` is what the optimiser sees; how many micro batches are
accumulated follows from it. Batches are made ahead by threads (threads.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from stages.kit import keyed
from stages.kit.data.threads import ordered_map
from stages.kit.data.views import linked
from stages.kit.growth import Growth

OWN = {"index", "row", "label"}  # names in a batch that are not views'


class Rows:
    """Some samples of a split, as recipes see them. What is asked for is read once for all views.

    index: int64 (b,), the samples' places in the split; split: the split itself, for recipes that
    need more of it.
    """

    def __init__(self, split, index: Tensor) -> None:
        self.split, self.index = split, index

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def images(self) -> Tensor | list[np.ndarray]:
        """uint8 (b, H, W, 3), or a list of arrays (H, W, 3) where images differ in size."""
        if self.split.images is None:
            return [self.split.decode(i) for i in self.index.tolist()]
        return torch.from_numpy(np.asarray(self.split.images[self.index.numpy()]))

    @functools.cached_property
    def masks(self) -> list[np.ndarray]:
        """uint8 (H, W) of each image: 0 = background, class + 1. ValueError if there are none."""
        return [self.split.mask(i) for i in self.index.tolist()]

    @functools.cached_property
    def boxes(self) -> list[np.ndarray]:
        """float32 (m, 5) of each image: x, y, width, height in its pixels, class. ValueError if the
        split has none.
        """
        return [self.split.boxes(i) for i in self.index.tolist()]

    @property
    def most_boxes(self) -> int:
        """The largest number of boxes that any image of the split has."""
        return self.split.most_boxes


class Batches:
    """The training batches of one rank.

    split: a store.Split, or another object that has its `labels` and what the recipes ask for
    views: recipes by name (kit/data/views.py), or a function that gives them for the fraction of
        the training that is behind, in [0, 1), so that a size can follow it
    batch_size: global
    micro: images per device and forward pass (None: the whole share of the rank)
    labels: whether they are in the batch
    workers: threads that make batches ahead; 0 does everything inline
    epochs: of the whole training; only a function `views` and `growth` need to know
    growth: pairs (share of the training from which on, batches that a step takes), see
        kit/growth.py; each is `batch_size` images of the order, and micro batches are theirs
    pin: whether batches lie in page-locked memory (None: when there is CUDA)
    """

    def __init__(
        self,
        split,
        views: dict | Callable[[float], dict],
        batch_size: int,
        seed: int,
        *,
        micro: int | None = None,
        labels: bool = False,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        growth: tuple[tuple[float, int], ...] = (),
        drop_last: bool = True,
        pin: bool | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"train.batch_size: {batch_size} images cannot be shared equally by {world} "
                f"processes; use a multiple of {world}, such as {_multiple(batch_size, world)}"
            )
        share = batch_size // world
        micro = share if micro is None else micro
        if micro < 1 or share % micro:
            raise ValueError(
                f"train.micro_batch: {micro} does not divide the {share} images of each of {world} "
                f"process(es) in train.batch_size {batch_size}; use {_divisor(share, micro)}, or a "
                f"train.batch_size of {_multiple(batch_size, world * max(micro, 1))}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"Batches: rank {rank} is not in 0..{world - 1}")
        if not drop_last and world > 1:
            raise ValueError(
                "Batches: drop_last=False would give the processes unequal shares; "
                "use it with world=1"
            )
        if labels and (bad := int((np.asarray(split.labels) < 0).sum())):
            raise ValueError(
                f"data: labels are needed, but {bad} of {len(split)} images have none; name their "
                "column in data.label_column, or use a method that needs no labels"
            )
        if callable(views) and epochs is None:
            raise ValueError("Batches: views that follow the training need `epochs`")
        if growth and (epochs is None or not drop_last):
            raise ValueError("Batches: growth needs `epochs`, and drop_last")
        self._recipes = views if callable(views) else named(views)
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.labels, self.workers, self.epochs = labels, workers, epochs
        self.rank, self.micro, self.share = rank, micro, share
        self.accumulate = share // micro
        self.growth = growth
        self.drop_last = drop_last
        self.pin = torch.cuda.is_available() if pin is None else pin

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the images; an error if there would be none."""
        count = len(self.split)
        steps = count // self.batch_size if self.drop_last else -(-count // self.batch_size)
        if steps < 1:
            raise ValueError(
                f"train.batch_size: {self.batch_size} is more than the {count} images of the "
                "split, so that no optimiser step would ever be taken; set train.batch_size to at "
                f"most {count} (it is the whole effective batch: train.micro_batch cuts it into "
                "pieces and never enlarges it)"
            )
        return steps

    @functools.cached_property
    def _growth(self) -> Growth:
        return Growth(self.growth, (self.epochs or 1) * self.steps_per_epoch)

    @property
    def most_micros(self) -> int:
        """Micro batches of the largest step."""
        return self.accumulate * (self._growth.most if self.growth else 1)

    def views(self, step: int) -> dict:
        """The recipes of optimiser step `step`, by name."""
        if not callable(self._recipes):
            return self._recipes
        return named(self._recipes(step / (self.epochs * self.steps_per_epoch)))

    def batch(self, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Micro batch `micro_step` of this rank in optimiser step `step` (counted over all epochs).

        What each view's recipe gives, such as "view" float32 (b, 3, size, size) in [0, 1] and
        "view.box" (see views.View.make); "index" int64 (b,): the images' places in the split; "row"
        int64 (b,): their places in the global batch; "label" int64 (b,) if labels were asked for.
        """
        count = self.accumulate * (self._growth.batches(step) if self.growth and step >= 0 else 1)
        if step < 0 or not 0 <= micro_step < count:
            raise IndexError(f"Batches: step {step}, micro step {micro_step} of {count}")
        part, piece = divmod(micro_step, self.accumulate)  # which batch of the step, what of it
        number = part + (self._growth.before(step) if self.growth else step)
        epoch, place = divmod(number, self.steps_per_epoch)
        first, start = place * self.batch_size, self.rank * self.share + piece * self.micro
        order = _order(len(self.split), self.seed, epoch)[first : first + self.batch_size]
        index = order[start : start + self.micro]
        rows = Rows(self.split, index)
        batch: dict[str, Tensor] = {}
        for name, recipe in self.views(step).items():
            made = recipe.make(name, rows, lambda view: keyed.key(self.seed, epoch, view))
            _refuse_foreign(name, made, len(index))
            batch |= made
        start += part * self.batch_size
        batch["index"], batch["row"] = index.clone(), torch.arange(start, start + len(index))
        if self.labels:
            labels = np.asarray(self.split.labels)[index.numpy()]
            batch["label"] = torch.from_numpy(labels.astype(np.int64))
        return {name: value.pin_memory() for name, value in batch.items()} if self.pin else batch

    def stream(self, start_step: int, stop_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Each step's list of micro batches, in order, made ahead by threads. A short last batch of
        an epoch has fewer of them.
        """
        tasks = (
            (step, m)
            for step in range(start_step, stop_step)
            for m in range(self._micro_steps(step))
        )
        made = prefetch(lambda task: self.batch(*task), tasks, self.workers)
        try:
            for step in range(start_step, stop_step):
                yield [next(made) for _ in range(self._micro_steps(step))]
        finally:
            made.close()

    def _micro_steps(self, step: int) -> int:
        if self.growth:
            return self.accumulate * self._growth.batches(step)
        left = len(self.split) - step % self.steps_per_epoch * self.batch_size
        return self.accumulate if self.drop_last else min(self.accumulate, -(-left // self.micro))


def named(views: dict) -> dict:
    """The recipes, linked to each other. ValueError for a name that a batch cannot have."""
    for name in views:
        if name in OWN or "." in name:
            raise ValueError(
                f"Batches: a view cannot be called {name!r}; {', '.join(sorted(OWN))} are the "
                "batch's own names, and a dot is for what belongs to a view"
            )
    return linked(views)


def _refuse_foreign(name: str, made: dict, count: int) -> None:
    """ValueError unless a recipe made tensors of `count` samples under its own name."""
    for key, value in made.items():
        if key.partition(".")[0] != name or len(value) != count:
            raise ValueError(
                f"view {name!r}: made {key!r} of {len(value)} samples, expected names that begin "
                f"with {name!r} and {count} samples"
            )


def evaluation(
    split, size: int, batch_size: int, workers: int = 1, crop: float = 1.0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every image once, in order, as the evaluation transform shows it: the centre square, or of it
    the middle `crop` of its side.

    Yields (images float32 (B, 3, size, size) in [0, 1], labels int64 (B,), index int64 (B,)).
    """
    if batch_size < 1:
        raise ValueError(f"evaluation: batch_size must be positive, found {batch_size}")

    def make(start: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(start, min(start + batch_size, len(split)))
        images = split.square(index.numpy(), size, crop).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(np.asarray(split.labels)[index.numpy()].astype(np.int64))
        return images.float().div_(255), labels, index

    return prefetch(make, range(0, len(split), batch_size), workers)


def prefetch(make: Callable, tasks: Iterable, workers: int) -> Iterator:
    """make(task) for each task, in order, by threads that are at most workers + 1 results ahead (0:
    inline). Each has one thread of arithmetic, as in torch's own loader: they are the parallelism.
    """
    one = functools.partial(torch.set_num_threads, 1)
    return ordered_map(make, tasks, workers, ahead=workers, setup=one)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return keyed.permutation(count, seed, "order", epoch)


def _divisor(number: int, near: int) -> int:
    """The divisor of `number` nearest to `near`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def _multiple(number: int, of: int) -> int:
    """The positive multiple of `of` nearest to `number`."""
    return max(1, round(number / of)) * of
