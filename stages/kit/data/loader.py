"""Batches as a pure function of (seed, step): resume, threads and ranks change nothing.

Epoch e visits the images in the order keyed.permutation(N, seed, "order", e); the step's global
batch is a slice of it, a rank takes a contiguous slice of that, and micro batches are slices of the
rank's. `batch_size` is what the optimiser sees; how many micro batches are accumulated follows from
it. Threads suffice to prefetch: the work is in torch's and Pillow's native code, which runs without
Python's lock, and nothing is pickled or copied between processes.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from stages.kit import keyed
from stages.kit.data.views import View, apply


class Batches:
    """The training batches of one rank.

    `split` is a store.Split (`labels`, `images` or None, `decode`); `views` maps names to recipes;
    `batch_size` is global; `micro` is the number of images per device and forward pass (None: the
    whole share of the rank). `workers` threads prefetch, 0 does everything inline. `pin` puts
    batches into page-locked memory (None: when there is CUDA).
    """

    def __init__(
        self,
        split,
        views: dict[str, View],
        batch_size: int,
        seed: int,
        *,
        micro: int | None = None,
        labels: bool = False,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        pin: bool | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(
                f"train.batch_size: {batch_size} images cannot be shared equally by {world} processes; "
                f"use a multiple of {world}, such as {_multiple(batch_size, world)}"
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
                "Batches: drop_last=False would give the processes unequal shares; use it with world=1"
            )
        if labels and (bad := int((np.asarray(split.labels) < 0).sum())):
            raise ValueError(
                f"data: labels are needed, but {bad} of {len(split)} images have none; name their column "
                "in data.label_column, or use a method that needs no labels"
            )
        for name in {"index", "row", "label"} & set(views):
            raise ValueError(
                f"Batches: a view cannot be called {name!r}, the batch uses that name itself"
            )
        self.split, self.views, self.batch_size, self.seed = split, dict(views), batch_size, seed
        self.labels, self.workers, self.rank, self.micro, self.share = (
            labels,
            workers,
            rank,
            micro,
            share,
        )
        self.accumulate = share // micro
        self.drop_last = drop_last
        self.pin = torch.cuda.is_available() if pin is None else pin

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the images; an error if there would be none."""
        count = len(self.split)
        steps = count // self.batch_size if self.drop_last else -(-count // self.batch_size)
        if steps < 1:
            raise ValueError(
                f"train.batch_size: {self.batch_size} is more than the {count} images of the split, so that "
                f"no optimiser step would ever be taken; set train.batch_size to at most {count} (it is the "
                "whole effective batch: train.micro_batch cuts it into pieces and never enlarges it)"
            )
        return steps

    def batch(self, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        """Micro batch `micro_step` of this rank in optimiser step `step` (counted over all epochs).

        Each view's name -> float32 (b, 3, size, size) in [0, 1]; "index" int64 (b,): the images'
        indices in the split; "row" int64 (b,): their places in the global batch; "label" int64 (b,)
        only if labels were asked for.
        """
        if step < 0 or not 0 <= micro_step < self.accumulate:
            raise IndexError(f"Batches: step {step}, micro step {micro_step} of {self.accumulate}")
        epoch, place = divmod(step, self.steps_per_epoch)
        start = self.rank * self.share + micro_step * self.micro
        order = _order(len(self.split), self.seed, epoch)[place * self.batch_size :][
            : self.batch_size
        ]
        index = order[start : start + self.micro]
        images = self._images(index)
        batch = {
            name: apply(view, images, keyed.key(self.seed, epoch, name), index)
            for name, view in self.views.items()
        }
        batch["index"], batch["row"] = index.clone(), torch.arange(start, start + len(index))
        if self.labels:
            batch["label"] = torch.from_numpy(
                np.asarray(self.split.labels)[index.numpy()].astype(np.int64)
            )
        return {name: value.pin_memory() for name, value in batch.items()} if self.pin else batch

    def stream(self, start_step: int, stop_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Each step's list of micro batches, in order, made ahead by threads; a short last one has
        fewer.
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
        left = len(self.split) - step % self.steps_per_epoch * self.batch_size
        return self.accumulate if self.drop_last else min(self.accumulate, -(-left // self.micro))

    def _images(self, index: Tensor) -> Tensor | list[np.ndarray]:
        if self.split.images is None:
            return [self.split.decode(i) for i in index.tolist()]
        return torch.from_numpy(np.asarray(self.split.images[index.numpy()]))


def evaluation(
    split, size: int, batch_size: int, workers: int = 1
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every image once, in order, as the evaluation transform shows it.

    Yields (images float32 (B, 3, size, size) in [0, 1], labels int64 (B,), index int64 (B,)).
    """
    if batch_size < 1:
        raise ValueError(f"evaluation: batch_size must be positive, found {batch_size}")

    def make(start: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(start, min(start + batch_size, len(split)))
        images = (
            split.square(index.numpy(), size).permute(0, 3, 1, 2).contiguous().float().div_(255)
        )
        return (
            images,
            torch.from_numpy(np.asarray(split.labels)[index.numpy()].astype(np.int64)),
            index,
        )

    return prefetch(make, range(0, len(split), batch_size), workers)


def prefetch(make: Callable, tasks: Iterable, workers: int) -> Iterator:
    """make(task) for each task, in order, by threads that are at most workers + 1 results ahead (0:
    inline).

    An error in `make` is raised where its result is due; closing the iterator early stops the
    threads.
    """
    if workers < 1:
        yield from map(make, tasks)
        return
    # one thread of arithmetic each, as in torch's own loader: the pool is the parallelism
    pool = ThreadPoolExecutor(
        workers, thread_name_prefix="loader", initializer=torch.set_num_threads, initargs=(1,)
    )
    waiting: deque = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(make, task))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return keyed.permutation(count, seed, "order", epoch)


def _divisor(number: int, near: int) -> int:
    """The divisor of `number` nearest to `near`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def _multiple(number: int, of: int) -> int:
    """The positive multiple of `of` nearest to `number`."""
    return max(1, round(number / of)) * of
