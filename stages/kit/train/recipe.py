"""What a training is told: how to optimise (Recipe) and where it is (Progress)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from stages.kit import keyed
from stages.kit.eager import eager
from stages.kit.growth import Growth, Pairs
from stages.kit.train import schedule
from workflow import checks


@dataclass(frozen=True)
class Progress:
    """Where a training is. `rows` (b,) are the rows of this micro batch in the global batch, on
    `device`; `end_of_epoch`: this step is the last of its epoch (a step that nan_skips leaves out
    is never told of); `epochs`: of the whole training.

    A compiled forward (kit/train/compiled.py) is compiled again whenever a number that it read is
    another. In a forward `step`, `epoch` and `fraction` are therefore read under @eager, as
    `scheduled` does; what is drawn takes the step from `clock`, a tensor.
    """

    step: int
    steps: int
    epoch: float
    seed: int
    rows: torch.Tensor
    device: torch.device
    end_of_epoch: bool = False
    epochs: int = 1
    clock: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "clock", torch.tensor(self.step, device="cpu"))

    @property
    def fraction(self) -> float:
        """Of the training that is done, in [0, 1)."""
        return self.step / self.steps

    @eager
    def scheduled(self, schedule: Callable[[float], float]) -> torch.Tensor:
        """schedule(fraction): a float64 scalar on the CPU, for arithmetic as with the number."""
        return torch.tensor(schedule(self.fraction), dtype=torch.float64, device="cpu")

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """(b, *shape) in [0, 1) on the device; row i depends on (seed, step, name, rows[i])."""
        return _drawn("uniform", self.seed, self.clock, name, self.rows, shape, self.device)

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """(b, *shape) standard normal, keyed as `uniform`."""
        return _drawn("normal", self.seed, self.clock, name, self.rows, shape, self.device)

    @eager
    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for (seed, step, name): the same on every rank and in every micro batch
        of the step.
        """
        return keyed.generator(self.seed, self.step, name)


@torch.library.custom_op("mimlab::drawn", mutates_args=())
def _drawn(
    kind: str,
    seed: int,
    clock: torch.Tensor,
    name: str,
    rows: torch.Tensor,
    shape: Sequence[int],
    device: torch.device,
) -> torch.Tensor:
    """keyed.uniform or keyed.normal; to a compiler one operation, since it cannot follow the hash
    of a key.
    """
    return getattr(keyed, kind)(keyed.key(seed, int(clock), name), rows, *shape, device=device)


@_drawn.register_fake
def _(kind, seed, clock, name, rows, shape, device):
    return rows.new_empty((len(rows), *shape), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Recipe:
    """How to optimise. `lr` is the peak rate after scaling; `warmup` and `steps` are optimiser
    steps; `clip` None is off; `views_per_image` is how many views of an image a step learns from,
    which effective epochs count.
    """

    epochs: int
    batch_size: int
    steps_per_epoch: int
    lr: float
    min_lr: float = 0.0
    lr_drops: tuple[float, ...] = ()  # if any: constant but for these, see schedule.rate
    warmup: int = 0
    warmup_from: float = 0.0  # share of lr at which it begins
    schedule: str = "mae"  # how steps are counted, see schedule.py
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
    views_per_image: float = 1
    nan_skips: int = 0  # batches that may be left out because they give NaN or infinity
    growth: Pairs = ()  # when a step takes several batches, see kit/growth.py
    lr_grows: bool = False  # the peak rate with them

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def batches(self) -> Growth:
        """How many batches each step takes."""
        return Growth(self.growth, self.steps)

    @classmethod
    def of(cls, config: checks.Optimiser, train: dict, steps_per_epoch: int) -> Recipe:
        """From a plug-in's Config and the train section {epochs, batch_size, precision,
        save_minutes, nan_skips}.

        A Config may have more properties: `lr_factor`, which lr is multiplied by,
        `views_per_image`, and `growth`, with which the rate grows where it is one for so many
        images. TypeError for a Config that is no checks.Optimiser.
        """
        if not isinstance(config, checks.Optimiser):
            raise TypeError(
                f"{type(config).__module__}.{type(config).__name__}: found no settings of an "
                "optimiser, expected a Config that inherits from checks.Optimiser"
            )
        lr = config.lr * train["batch_size"] / config.lr_per if config.lr_per else config.lr
        return cls(
            epochs=train["epochs"],
            batch_size=train["batch_size"],
            steps_per_epoch=steps_per_epoch,
            lr=lr * getattr(config, "lr_factor", 1.0),
            min_lr=config.min_lr,
            lr_drops=config.lr_drops,
            warmup=round(config.warmup * train["epochs"] * steps_per_epoch),
            warmup_from=config.warmup_from,
            schedule=config.schedule,
            weight_decay=config.weight_decay,
            weight_decay_end=config.weight_decay_end,
            betas=config.betas,
            eps=config.eps,
            momentum=config.sgd_momentum,
            optimizer=config.optimizer,
            clip=config.clip,
            clip_mode=config.clip_mode,
            precision=train.get("precision", "auto"),
            save_minutes=train.get("save_minutes", 5.0),
            views_per_image=getattr(config, "views_per_image", 1),
            nan_skips=train.get("nan_skips", 0),
            growth=getattr(config, "growth", ()),
            lr_grows=config.lr_per is not None,
        )

    def lr_at(self, step: int) -> float:
        counts = (self.schedule, step, self.steps, self.warmup)
        peak = self.lr
        if self.growth and self.lr_grows:
            peak = peak * self.batches.batches(step)
        return schedule.rate(*counts, peak, self.min_lr, self.warmup_from * peak, self.lr_drops)

    def weight_decay_at(self, step: int, start: float) -> float:
        """A group's weight decay, `start` at step 0; groups without any keep it at 0."""
        if self.weight_decay_end is None or start == 0:
            return start
        return schedule.cosine(step / self.steps, start, self.weight_decay_end)
