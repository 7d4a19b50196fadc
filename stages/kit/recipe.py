"""What a training is told: how to optimise (Recipe) and where it is (Progress)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.kit import keyed, schedule

_BY_NAME = (
    "min_lr",
    "lr_drops",
    "weight_decay",
    "weight_decay_end",
    "betas",
    "eps",
    "momentum",
    "optimizer",
    "clip",
    "clip_mode",
    "views",
)


@dataclass(frozen=True)
class Progress:
    """Where a training is. `rows` (b,) are the rows of this micro batch in the global batch, on `device`."""

    step: int
    steps: int
    epoch: float
    seed: int
    rows: torch.Tensor
    device: torch.device

    @property
    def fraction(self) -> float:
        """Of the training that is done, in [0, 1)."""
        return self.step / self.steps

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """(b, *shape) in [0, 1) on the device; row i depends on (seed, step, name, rows[i]) only."""
        return keyed.uniform(keyed.key(self.seed, self.step, name), self.rows, *shape, device=self.device)

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """(b, *shape) standard normal, keyed as `uniform`."""
        return keyed.normal(keyed.key(self.seed, self.step, name), self.rows, *shape, device=self.device)

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for (seed, step, name): the same on every rank and in every micro batch of the
        step.
        """
        return keyed.generator(self.seed, self.step, name)


@dataclass(frozen=True)
class Recipe:
    """How to optimise. `lr` is the peak rate after scaling; `warmup` and `steps` are optimiser steps; `clip`
    None is off; `views` is how many views of an image a step learns from, which effective epochs count.
    """

    epochs: int
    batch_size: int
    steps_per_epoch: int
    lr: float
    min_lr: float = 0.0
    lr_drops: tuple[float, ...] = ()  # constant but for these, see schedule.warmup_drops, instead of a cosine
    warmup: int = 0
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    optimizer: str = "adamw"
    clip: float | None = None
    clip_mode: str = "global"
    precision: str = "auto"
    save_minutes: float = 5.0
    views: float = 1
    nan_skips: int = 0  # batches that may be left out because they give NaN or infinity

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @classmethod
    def of(cls, config, train: dict, steps_per_epoch: int) -> Recipe:
        """From a plug-in's Config (its fields by name; `lr_per`: lr is per so many images, None: absolute;
        `lr_factor`: times this; `warmup`: fraction of the steps) and the train section {epochs, batch_size, precision,
        save_minutes, nan_skips}."""
        given = {name: getattr(config, name) for name in _BY_NAME if hasattr(config, name)}
        per = getattr(config, "lr_per", None)
        lr = config.lr * train["batch_size"] / per if per else config.lr
        lr *= getattr(config, "lr_factor", 1.0)
        warmup = round(getattr(config, "warmup", 0.0) * train["epochs"] * steps_per_epoch)
        return cls(
            epochs=train["epochs"],
            batch_size=train["batch_size"],
            steps_per_epoch=steps_per_epoch,
            lr=lr,
            warmup=warmup,
            precision=train.get("precision", "auto"),
            save_minutes=train.get("save_minutes", 5.0),
            nan_skips=train.get("nan_skips", 0),
            **given,
        )

    def lr_at(self, step: int) -> float:
        if self.lr_drops:
            return schedule.warmup_drops(step, self.steps, self.warmup, self.lr, self.lr_drops)
        return schedule.warmup_cosine(step, self.steps, self.warmup, self.lr, self.min_lr)

    def weight_decay_at(self, step: int, start: float) -> float:
        """A group's weight decay, `start` at step 0; groups without any keep it at 0."""
        if self.weight_decay_end is None or start == 0:
            return start
        return schedule.cosine(step / self.steps, start, self.weight_decay_end)
