"""Batch normalisation over the whole batch of all ranks, for heads whose loss compares images.

torch's SyncBatchNorm needs a GPU, and both of torch's norms keep running statistics, which nothing
here would read: these heads are used in training only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.kit import dist
from stages.kit.eager import eager


class BatchNorm(nn.Module):
    """(..., D) on each rank -> the same in float32: zero mean and unit variance over the rows of
    all ranks, in training and evaluation alike. Of tokens (B,T,D) each is a row.

    The variance is the biased one. affine: learnt gain and shift follow; they start at 1 and 0.
    """

    def __init__(self, dim: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            x = x - mean_of_all(x.flatten(0, -2))
            x = x * torch.rsqrt(mean_of_all(x.square().flatten(0, -2)) + self.eps)
            return x if self.weight is None else x * self.weight + self.bias


def mean_of_all(x: Tensor) -> Tensor:
    """Mean (D,) over the rows of (n,D) on all ranks; gradients reach the rows of all ranks."""
    if dist.world() == 1:
        return x.mean(dim=0)
    sums = total_of_all(torch.cat([x.sum(dim=0), x.new_full((1,), len(x))]))
    return sums[:-1] / sums[-1]


@eager  # it talks to the other ranks
def total_of_all(x: Tensor) -> Tensor:
    """Sum over ranks. Backward, too, sums: the gradient is that of the sum of all ranks' losses."""
    return _Total.apply(x)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return dist.total(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return dist.total(gradient.clone())
