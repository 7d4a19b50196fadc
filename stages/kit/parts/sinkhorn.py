"""Sinkhorn-Knopp in place of DINO's centre: prototypes share a batch's images equally.

SwAV (arXiv 2006.09882, section 3.1) assigns the images of a batch to prototypes so that each gets
an equal share of them; DINOv2 (arXiv 2304.07193, section 4) does so with the logits of DINO's and
iBOT's teacher. The exponentials of logits / temperature are divided, three times in turn, by the
sum over images of each prototype and by the sum over prototypes of each image. Here this is done
with logarithms: after t rounds the distribution of an image is softmax(logits / temperature - f),
and f, one number for each prototype, is all that there is to keep. So f * temperature is a centre,
fitted to the batch at hand. Each image has a distribution, which sums to 1; each prototype has a
sum near B / K, nearer with every round.

Departures from facebookresearch/dinov2: a batch of which nothing counts gives distributions without
a centre, there NaN; a running mean of f * temperature is kept, for images outside of a training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.kit import dist
from stages.kit.eager import eager
from stages.kit.parts.prototypes import Centre

ROUNDS = 3  # of both papers

# why a batch may not be cut into micro batches; processes see each other's sums
REASON = "centring: sinkhorn shares the images of a batch among the prototypes"


def centring(config) -> Centre:
    """What keeps prototypes from winning everywhere, as a checks.SelfDistillation chooses it."""
    kind = {"centre": Centre, "sinkhorn": Sinkhorn}[config.centring]
    return kind(config.prototypes, config.centre_momentum)


class Sinkhorn(Centre):
    """Assigns a batch by Sinkhorn-Knopp over all ranks; `value` is the running mean of its centre.

    The batch is what one call of `assign` gets on every rank: all ranks must call it equally often.
    `sharpen` uses `value` and looks at no batch.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9, rounds: int = ROUNDS):
        super().__init__(prototypes, momentum)
        self.rounds = rounds
        self._found: Tensor | None = None  # (K,): the centre of the last batch

    def assign(
        self, logits: Tensor, temperature: float | Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Raw logits (..., K) -> distributions (..., K), without gradient.

        weight (...): 1 for rows that count in the balance, 0 for those that do not; None: all do.
        """
        z = logits.detach().float() / temperature
        weight = z.new_ones(z.shape[:-1]) if weight is None else weight
        masses = balance(z.flatten(0, -2), weight.flatten(), self.rounds)
        centre = (masses - masses.mean()) * temperature
        self._found = centre.to(self.value.dtype)
        return (z - masses).softmax(dim=-1)

    def count(self, logits: Tensor) -> None:
        """Does nothing: the centre comes from `assign`."""

    @torch.no_grad()
    def step(self) -> None:
        if self._found is not None:
            self.value.lerp_(self._found, 1 - self.momentum)
            self._found = None


@eager  # it talks to the other ranks
@torch.no_grad()
def balance(z: Tensor, weight: Tensor, rounds: int) -> Tensor:
    """Logits over temperature (B,K), weights (B,) -> f (K,), after so many rounds over all ranks.

    f is the logarithm of what each prototype would get of the weighted images; zero if no image on
    any rank has a weight.
    """
    shares = weight.log()[:, None]  # -inf for what does not count
    image = z.new_zeros(len(z), 1)
    for _ in range(rounds):
        masses = _log_sum(z - image + shares)
        image = (z - masses).logsumexp(dim=1, keepdim=True)
    return masses


def _log_sum(values: Tensor) -> Tensor:
    """(B,K) -> log of the sum of exponentials over the rows of all ranks, (K,); 0 if there is
    nothing but -inf.
    """
    most = values.amax(dim=0) if len(values) else values.new_full(values.shape[1:], -torch.inf)
    most = dist.maximum(most)
    most = torch.where(most.isfinite(), most, 0)
    total = dist.total((values - most).exp().sum(dim=0))
    return torch.where(total > 0, most + total.log(), 0)
