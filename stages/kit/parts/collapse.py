"""Stops a training that does not tell images apart.

A self-distillation has collapsed when its teacher gives every image the same distribution over
prototypes. There are two ways to get there, and DINO's centring and sharpening each prevent one
(arXiv 2104.14294, section 5.3): the uniform distribution, whose entropy is ln K, and one prototype
for everything, whose entropy is 0. In both, and in all between, the mutual information of
prototypes and images is 0: the entropy of the mean distribution is the mean of the entropies. An
untrained network has none either, so only a teacher that stays without it is stopped.
kit/parts/contrast.py judges queries and keys in the same way.

A teacher without prototypes, whose features of patches are the targets, has collapsed when these
are the same for every image. They may still tell places apart, as its positions do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.kit import dist

PATIENCE = 0.25  # share of the training that a teacher may spend below the bound
LEAST_STEPS = 200  # that it may spend there in any case
CHECKS = 200  # times at most, in a training, that the host reads the count and waits for the device

ADVICE = (
    "Try a lower teacher_temp (0.02 to 0.04) against uniform outputs, a higher one or "
    "centre_momentum 0.9 against one prototype for all; a lower lr, longer warm-up, more epochs."
)

FEATURE_ADVICE = "Try a lower lr, a longer warm-up, a momentum nearer to 1, or more epochs."


class CollapseError(RuntimeError):
    """The teacher's outputs have depended too little on its images for too long."""

    plain = True  # the message says it all: shown without a traceback


def kind(entropy: float, prototypes: int) -> str:
    """Which collapse it is, in words, whose distributions have this mean entropy (nats)."""
    if entropy > math.log(prototypes) / 2:
        return "uniform over the prototypes"
    return "one prototype for all images"


class Streak(nn.Module):
    """Counts the steps in a row in which a number is below its bound.

    The count is a buffer, `steps_below`: a resumed training stops where an unbroken one does.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("steps_below", torch.zeros((), dtype=torch.long))

    def judge(self, number: Tensor, bound: float | Tensor, progress, explain: Callable) -> None:
        """Once per optimiser step, with the same scalars on all ranks. Raises CollapseError with
        the message explain() when the streak is too long, on all ranks at the same step.
        """
        self.steps_below.copy_(torch.where(number < bound, self.steps_below + 1, 0))
        done, every = progress.step + 1, -(-progress.steps // CHECKS)
        patience = max(LEAST_STEPS, PATIENCE * progress.steps)
        if done % every == 0 and int(self.steps_below) >= patience:
            raise CollapseError(explain())


class SpreadWatch(Streak):
    """Stops a training whose targets have nearly all in common: `min_spread` is the least share of
    their squared length that their mean may leave them. `count` takes that share of each forward.
    """

    def __init__(self, min_spread: float):
        super().__init__()
        self.min_spread = min_spread
        self._found: list[Tensor] = []

    @torch.no_grad()
    def count(self, spread: Tensor) -> None:
        self._found.append(spread.detach())

    @torch.no_grad()
    def step(self, progress) -> None:
        """Once per optimiser step. Raises CollapseError, on all ranks at the same step."""
        if not self._found:
            return
        spread, self._found = dist.mean(torch.stack(self._found).mean()), []

        def explain() -> str:
            return (
                f"the targets have collapsed at step {progress.step + 1} of {progress.steps}: for "
                f"{int(self.steps_below)} steps their mean had more than "
                f"{1 - self.min_spread:.2%} of their squared length (min_spread "
                f"{self.min_spread:g}), now {1 - float(spread):.2%}.\nTry a lower lr, a longer "
                "warm-up, a larger negative_weight, larger batches. min_spread: 0 lets it go on."
            )

        self.judge(spread, self.min_spread, progress, explain)


class Watch(Streak):
    """Counts the steps in a row with too little mutual information of prototypes and images.

    The bound is `min_information` * ln K; `name` says in messages whose assignments to prototypes
    they are. `count` collects a micro batch. `step` judges all that was collected on all ranks, as
    Centre does.
    """

    def __init__(self, prototypes: int, min_information: float, name: str):
        super().__init__()
        self.prototypes, self.min_information, self.name = prototypes, min_information, name
        self._sum: Tensor | None = None  # (K + 2,): probabilities, entropies, and how many

    @property
    def bound(self) -> float:
        """The least mutual information in nats."""
        return self.min_information * math.log(self.prototypes)

    @torch.no_grad()
    def count(self, probabilities: Tensor) -> None:
        """probabilities (..., K) of the teacher, centred and sharpened."""
        p = probabilities.detach().float().flatten(0, -2)
        entropy = torch.special.entr(p).sum()
        sums = torch.cat([p.sum(dim=0), entropy[None], p.new_full((1,), len(p))])
        self._sum = sums if self._sum is None else self._sum + sums

    @torch.no_grad()
    def step(self, progress) -> None:
        """Once per optimiser step. Raises CollapseError, on all ranks at the same step."""
        if self._sum is None:
            return
        sums, self._sum = dist.total(self._sum), None
        mean = sums[:-1] / sums[-1]  # (K + 1,): the mean distribution, and the mean entropy
        information = (torch.special.entr(mean[:-1]).sum() - mean[-1]).clamp(min=0)

        def explain() -> str:
            return self.explain(float(information), float(mean[-1]), progress)

        self.judge(information, self.bound, progress, explain)

    def explain(self, information: float, entropy: float, progress) -> str:
        """The error's message, with what was found last (nats)."""
        return (
            f"the teacher has collapsed at step {progress.step + 1} of {progress.steps}: for "
            f"{int(self.steps_below)} steps the mutual information of its {self.name} with the "
            f"images was below {self.bound:.4f} nats (min_information {self.min_information:g} of "
            f"ln {self.prototypes}), now {information:.4f}; they are "
            f"{kind(entropy, self.prototypes)}, their entropy is {entropy:.3f} of "
            f"{math.log(self.prototypes):.3f}.\n{ADVICE} min_information: 0 lets it go on."
        )


class FeatureWatch(Streak):
    """Counts the steps in a row in which a teacher's features differ too little between images.

    Their variety is the variance of a place's features between images as a share of their mean
    square, over all places: 0 if no image differs from another. The bound is `min_variety`. `count`
    collects a micro batch, `step` judges all that was collected on all ranks.
    """

    def __init__(self, min_variety: float):
        super().__init__()
        self.min_variety = min_variety
        self._sums: Tensor | None = None  # (N, D + 2), see `count`

    @torch.no_grad()
    def count(self, features: Tensor, places: Tensor, grid: int) -> Tensor:
        """Features (R,n,D) of patches at `places` (R,n) of a grid x grid -> their variety, a
        scalar. A single image has none.
        """
        x = features.detach().float().flatten(0, 1)
        rows = torch.cat([x, x.square().sum(dim=1, keepdim=True), x.new_ones(len(x), 1)], dim=1)
        sums = rows.new_zeros(grid**2, rows.shape[1]).index_add_(0, places.flatten(), rows)
        self._sums = sums if self._sums is None else self._sums + sums
        return variety(sums)

    @torch.no_grad()
    def step(self, progress) -> None:
        """Once per optimiser step. Raises CollapseError, on all ranks at the same step."""
        if self._sums is None:
            return
        found, self._sums = variety(dist.total(self._sums)), None

        def explain() -> str:
            return (
                f"the teacher has collapsed at step {progress.step + 1} of {progress.steps}: for "
                f"{int(self.steps_below)} steps its features of a place differed between images by "
                f"less than {self.min_variety:g} of their mean square (min_variety), now by "
                f"{float(found):.2g}.\n{FEATURE_ADVICE} min_variety: 0 lets it go on."
            )

        self.judge(found, self.min_variety, progress, explain)


def variety(sums: Tensor) -> Tensor:
    """Of each place (N, D + 2) the sums of its features, of their squares, and how many there are
    -> unbiased variance about the places' means, over the mean square. 0 where nothing is known.
    """
    first, square, count = sums[:, :-2], sums[:, -2], sums[:, -1]
    about = square - first.square().sum(dim=1) / count.clamp(min=1)
    variance = about.sum() / (count - 1).clamp(min=0).sum().clamp(min=1)
    mean = square.sum() / count.sum().clamp(min=1)
    return variance.clamp(min=0) / mean.clamp(min=torch.finfo(mean.dtype).tiny)
