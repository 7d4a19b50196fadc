"""Stops a self-distillation whose teacher gives every image the same distribution over the
prototypes.

There are two ways to get there, and DINO's centring and sharpening each prevent one (arXiv
2104.14294, section 5.3): the uniform distribution (its entropy is ln K) and one prototype for
everything (0). What both have in common is that the assignments tell nothing about the image: the
entropy of their mean is the mean of their entropies. That is also true of an untrained network, so
only a teacher that stays silent is stopped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stages.kit import dist

PATIENCE = 0.25  # share of the training in which the teacher may tell nothing
LEAST_STEPS = 200  # that it may do so in any case
CHECKS = 200  # times at most that the host looks, and waits for the device, in a training

ADVICE = (
    "Try a lower teacher_temp (0.02 to 0.04) against uniform outputs, a higher one or centre_momentum 0.9 against "
    "one prototype for all; a lower lr, longer warm-up, more epochs."
)


class CollapseError(RuntimeError):
    """The teacher has told nothing about its images for too long."""

    plain = True  # the message says it all: shown without a traceback


def kind(entropy: float, prototypes: int) -> str:
    """In words, which collapse it is whose distributions have this mean entropy (nats)."""
    return (
        "uniform over the prototypes"
        if entropy > math.log(prototypes) / 2
        else "one prototype for all images"
    )


class Watch(nn.Module):
    """Counts the steps in a row in which a teacher's assignments told less than `least` * ln K
    about an image.

    `count` collects a micro batch, `step` judges all that was collected on all ranks, as Centre
    does. `silent`, the steps so far, is a buffer: a resumed training stops where an unbroken one
    does. `who` names the assignments.
    """

    def __init__(self, prototypes: int, least: float, who: str):
        super().__init__()
        self.prototypes, self.least, self.who = prototypes, least, who
        self.register_buffer("silent", torch.zeros((), dtype=torch.long))
        self._sum: Tensor | None = None  # (K + 2,): probabilities, entropies, and how many

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
        mean = sums[:-1] / sums[-1]
        told = (torch.special.entr(mean[:-1]).sum() - mean[-1]).clamp(min=0)
        self.silent.copy_(
            torch.where(told < self.least * math.log(self.prototypes), self.silent + 1, 0)
        )
        done, every = progress.step + 1, -(-progress.steps // CHECKS)
        if done % every == 0 and int(self.silent) >= max(LEAST_STEPS, PATIENCE * progress.steps):
            raise CollapseError(self.explain(float(told), float(mean[-1]), done, progress))

    def explain(self, told: float, entropy: float, done: int, progress) -> str:
        most = math.log(self.prototypes)
        return (
            f"the teacher has collapsed at step {done} of {progress.steps}: for {int(self.silent)} steps its {self.who} have "
            f"told less than {self.least * most:.4f} nats about an image (min_information {self.least:g} of ln "
            f"{self.prototypes}), now {told:.4f}; they are {kind(entropy, self.prototypes)}, their entropy is {entropy:.3f} "
            f"of {most:.3f}.\n{ADVICE} min_information: 0 lets it go on."
        )
