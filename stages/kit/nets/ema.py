"""Exponential moving averages of a module's weights (momentum teachers)."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student for parameters; buffers are copied.

    The two modules must have the same parameter and buffer names (the teacher may be a part of the
    student: names that only the student has are ignored). Raises ValueError for a teacher entry
    without its counterpart.
    """
    ours, theirs = _matched(
        dict(teacher.named_parameters()), dict(student.named_parameters()), "parameter"
    )
    if ours:
        torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
    ours, theirs = _matched(dict(teacher.named_buffers()), dict(student.named_buffers()), "buffer")
    if ours:
        torch._foreach_copy_(ours, theirs)


class Average(nn.Module):
    """Holds a network that follows another: without gradients, always in evaluation mode."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Average:
        return super().train(False)

    def follow(self, student: nn.Module, momentum: float) -> None:
        """As `update`."""
        update(self.network, student, momentum)


def momentum(base: float, fraction: float, final: float = 1.0) -> float:
    """Cosine from `base` (fraction 0) to `final` (fraction 1): BYOL arXiv:2006.07733 section 3.3,
    DINO arXiv:2104.14294.
    """
    return final - (final - base) * (math.cos(math.pi * min(max(fraction, 0.0), 1.0)) + 1) / 2


def _matched(teacher: dict, student: dict, kind: str) -> tuple[list, list]:
    missing = [name for name in teacher if name not in student]
    if missing:
        raise ValueError(
            f"ema.update: the student has no {kind} {missing[0]!r} ({len(missing)} such names)"
        )
    return [value.data for value in teacher.values()], [student[name].data for name in teacher]
