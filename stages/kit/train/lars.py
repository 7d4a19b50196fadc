"""LARS (You, Gitman and Ginsburg 2017, arXiv:1708.03888), in the form that linear probing uses.

For a tensor p of two or more dimensions with gradient g: g <- g + weight_decay * p, then g <- trust
* |p| / |g| * g, where the factor is 1 if either norm is 0. Tensors of one dimension keep their
plain gradient, undecayed. For both, momentum m <- momentum * m + g and p <- p - lr * m. This is the
optimiser of the linear probes of MoCo v3 and MAE (arXiv:2111.06377, facebookresearch/mae,
util/lars.py); unlike the original paper the rate is applied after the momentum, not inside it.
"""

from __future__ import annotations

import torch


def adapted(
    p: torch.Tensor, g: torch.Tensor, weight_decay: float = 0.0, trust: float = 0.001
) -> torch.Tensor:
    """The gradient g of p with decay added and its length set to trust * |p|; leading dimensions
    beyond 2 are separate.

    A (D, K) matrix has one norm; a stack (H, D, K) holds H matrices, each with its own, as if
    stepped one by one.
    """
    g = g + weight_decay * p
    size, slope = p.norm(dim=(-2, -1), keepdim=True), g.norm(dim=(-2, -1), keepdim=True)
    factor = torch.where((size > 0) & (slope > 0), trust * size / slope.clamp_min(1e-45), 1.0)
    return g * factor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; options `lr`, `momentum`, `weight_decay` and `trust` can
    differ per group.

    Tensors of more than two dimensions (convolutions) count as one matrix.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients; returns the closure's loss if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.ndim > 1:
                    g = adapted(
                        p.flatten(1), g.flatten(1), group["weight_decay"], group["trust"]
                    ).view_as(p)
                memory = self.state[p].setdefault("momentum", torch.zeros_like(p))
                memory.mul_(group["momentum"]).add_(g)
                p.sub_(memory, alpha=group["lr"])
        return loss
