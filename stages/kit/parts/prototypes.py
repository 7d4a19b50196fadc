"""DINO's head, centre, temperature and loss over learnt prototypes (arXiv 2104.14294, section 3.1).

iBOT (arXiv 2111.07832) uses the same parts for the class token and for patches. Heads and losses
are computed in float32, whatever autocast is active.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.kit import dist


class Prototypes(nn.Linear):
    """The weight-normalised last layer: inputs (..., D) of length 1 -> gain * cosine, (..., K).

    `gain` (K,1) starts at 1. It is frozen if `norm_last`; then all logits lie in [-1, 1].
    """

    def __init__(self, dim: int, prototypes: int, norm_last: bool = True):
        super().__init__(dim, prototypes, bias=False)
        self.gain = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * F.normalize(self.weight, dim=1))


class Head(nn.Module):
    """Tokens (..., D) -> logits (..., K) in float32.

    `trunk` is an MLP of three layers with GELU, and normalisation to length 1. `last_layer` are
    the prototypes. They may be called apart, for heads that share one of them.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last: bool = True,
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last)

    def trunk(self, x: Tensor) -> Tensor:
        """Tokens (..., D) -> unit vectors (..., bottleneck), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(self.mlp(x.float()), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(self.trunk(x))


class Centre(nn.Module):
    """The running mean of the teacher's raw logits, so that no prototype wins everywhere.

    `value` (K,) is zero at first. `count` collects a micro batch. `step`, once per optimiser step,
    moves the centre by the mean of all that was collected on all ranks: value <- momentum * value +
    (1 - momentum) * mean.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))
        self._sum: Tensor | None = None  # (K + 1,): logits, and how many

    @torch.no_grad()
    def count(self, logits: Tensor) -> None:
        """logits (..., K) of the teacher, before centre and temperature."""
        z = logits.detach().float().flatten(0, -2)
        sums = torch.cat([z.sum(dim=0), z.new_full((1,), len(z))])
        self._sum = sums if self._sum is None else self._sum + sums

    @torch.no_grad()
    def step(self) -> None:
        if self._sum is not None:
            sums = dist.total(self._sum)
            self.value.lerp_(sums[:-1] / sums[-1], 1 - self.momentum)
            self._sum = None

    def assign(
        self, logits: Tensor, temperature: float | Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """The teacher's distributions for a batch in training; here those of `sharpen`.

        weight: which rows count, where the batch itself is looked at (kit/parts/sinkhorn.py).
        """
        return self.sharpen(logits, temperature)

    def sharpen(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """The teacher's distribution softmax((logits - centre) / temperature), without gradient."""
        return ((logits.detach().float() - self.value) / temperature).softmax(dim=-1)


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """-sum_k teacher_k ln softmax(student / temperature)_k, (...).

    student: logits (..., K); teacher: probabilities (..., K).
    """
    return -(teacher * (student.float() / temperature).log_softmax(dim=-1)).sum(dim=-1)


def view_pairs(teachers: int, students: int) -> list[tuple[int, int]]:
    """All pairs (teacher view, student view) of different views.

    The first student views are the teacher's.
    """
    return [(q, v) for q in range(teachers) for v in range(students) if q != v]


def multi_view_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over pairs of different views, and over samples, of `cross_entropy`.

    student: logits (V,B,K) of all views, of which the first Q are the views of teacher (Q,B,K),
    probabilities. The sum over a teacher view's partners is taken inside, since the cross entropy
    is linear in the student's log probabilities.
    """
    teachers, students = len(teacher), len(student)
    logs = (student.float() / temperature).log_softmax(dim=-1)
    partners = logs.sum(dim=0) - logs[:teachers]  # (Q,B,K): all views but one's own
    total = -(teacher * partners).sum(dim=-1).mean(dim=1).sum()
    return total / len(view_pairs(teachers, students))
