"""Vector quantisation on the unit sphere, as BEiT v2's tokenizer does it (arXiv 2208.06366, section
2.1 and its code).

A `Codebook` is what a finished tokenizer needs: K unit vectors and the look-up. A `Learner` moves
the codes while the tokenizer trains: k-means on the first vectors, then an exponential moving
average. No gradient reaches a code. All of it is computed in float32, whatever autocast is active.

The moving average is that of microsoft/unilm (beit2), not the classical one over counts: a code
that was hit moves towards the direction of the mean of its vectors by 1 - decay, however often it
was hit; there is no Laplace smoothing. Departures from the official code:
- the codes move once per optimiser step, from the statistics of all its micro batches and ranks,
  where the official code does it in every forward pass; without gradient accumulation the two are
  the same, since there too the loss uses the codes from before the update;
- a code that nothing hit stays as it is, to the bit; the official code mixes it with itself and
  normalises again;
- k-means runs once, between two steps, on the vectors of whole batches from all ranks, and never in
  evaluation mode; it waits until there are ten vectors per code (`per_code`), and until then the
  tokenizer trains without quantisation. The official code clusters each rank's first batch in its
  first forward pass, on each rank by itself, in whatever mode;
- sums over a code's vectors are matrix products, so that a GPU repeats them to the bit;
- `reseed` is ours, and off by default: codes that nothing hit for that many steps restart at a
  vector of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.kit import dist, keyed

CELLS = 2**24  # numbers in the largest similarity matrix that is held at once


class Codebook(nn.Module):
    """`vectors` (K,D) of length 1, at first random directions."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(codes, dim), dim=1))

    def assign(self, u: Tensor) -> Tensor:
        """Unit vectors (..., D) -> ids of their nearest codes (...), int64."""
        return nearest(u.flatten(0, -2), self.vectors).view(u.shape[:-1])

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors u (..., D) -> (ids (...), quantised (..., D), commitment ()).

        The quantised vectors are the codes; their gradient goes to `u` unchanged
        (straight-through). The commitment loss is the mean over all elements of (code - u)^2, that
        is (2 - 2 cos) / D.
        """
        u = u.float()
        ids = self.assign(u)
        codes = self.vectors[ids]
        return ids, u + (codes - u).detach(), (codes - u).square().mean()


class Learner(nn.Module):
    """Moves the codes of `codebook`, which belongs to somebody else: it is neither saved nor moved
    with the learner.

    decay: of the moving average; kmeans: start from the data, not from random directions; per_code:
    vectors per code that k-means waits for; reseed: steps without a hit after which a code
    restarts, 0 = never.

    `collect` (while not `ready`) or `count` take each micro batch, `start` or `step` end the
    optimiser step. What they do depends on the step's vectors in the order of their rows, so that a
    batch may be cut into any micro batches and ranks.
    """

    def __init__(
        self,
        codebook: Codebook,
        decay: float = 0.99,
        kmeans: bool = True,
        per_code: int = 10,
        reseed: int = 0,
    ):
        super().__init__()
        self._codebook = [codebook]
        self.decay, self.per_code, self.reseed = decay, per_code, reseed
        codes, dim = codebook.vectors.shape
        self.register_buffer("waiting", torch.empty(0, dim))  # of all ranks, for k-means
        self.register_buffer("started", torch.tensor(not kmeans))
        self.register_buffer(
            "idle", torch.zeros(codes, dtype=torch.int64)
        )  # steps since the last hit
        self._started: bool | None = (
            None  # what `started` says, once known: asking a GPU means waiting for it
        )
        self._statistics: Tensor | None = None  # (K,D+1): sums and hits of this step, on this rank
        self._vectors: list[
            Tensor
        ] = []  # of this step, on this rank: for k-means, or for reseeding

    @property
    def codebook(self) -> Codebook:
        return self._codebook[0]

    def ready(self) -> bool:
        """Whether the codes can be used: from the start, or once k-means has run."""
        if self._started is None:
            self._started = bool(self.started)
        return self._started

    def collect(self, u: Tensor) -> None:
        """Notes vectors u (..., D) for k-means, once per micro batch; equally many on every rank."""
        self._vectors.append(u.detach().float().flatten(0, -2))

    @torch.no_grad()
    def start(self, seed: int, wait: bool = True) -> None:
        """Runs k-means if enough has been collected, in this step and before. wait False: if there
        is anything.
        """
        if not self._vectors:
            return
        self.waiting = torch.cat([self.waiting, dist.gather(torch.cat(self._vectors))])
        self._vectors.clear()
        codes = self.codebook.vectors
        if wait and len(self.waiting) < self.per_code * len(codes):
            return
        means = kmeans(self.waiting, len(codes), seed=seed)
        codes.copy_(
            dist.total(means if dist.is_main() else torch.zeros_like(means))
        )  # rank 0's, on all
        self.waiting = self.waiting[:0].clone()
        self.started.fill_(True)
        self._started = True

    @torch.no_grad()
    def count(self, u: Tensor, ids: Tensor) -> None:
        """Notes which vectors u (..., D) went to which codes `ids` (...), once per micro batch."""
        u = u.detach().float().flatten(0, -2)
        hits, sums = tally(u, ids.flatten(), len(self.codebook.vectors))
        found = torch.column_stack([sums, hits])
        self._statistics = found if self._statistics is None else self._statistics + found
        if self.reseed:
            self._vectors.append(u)

    @torch.no_grad()
    def step(self, *key: int | str) -> None:
        """Moves the codes by what was counted on all ranks since the last step. `key` names the
        step (for reseeding).
        """
        if self._statistics is None:
            return
        sums, hits = dist.total(self._statistics).split([self._statistics.shape[1] - 1, 1], dim=1)
        codes, hit = self.codebook.vectors, hits[:, 0] > 0
        moved = F.normalize(self.decay * codes + (1 - self.decay) * F.normalize(sums, dim=1), dim=1)
        codes.copy_(torch.where(hit[:, None], moved, codes))
        self.idle.copy_(torch.where(hit, 0, self.idle + 1))
        if self.reseed:
            dead = self.idle >= self.reseed
            codes.copy_(torch.where(dead[:, None], self._drawn(keyed.key("reseed", *key)), codes))
            self.idle.masked_fill_(dead, 0)
        self._forget()

    def _drawn(self, key: int) -> Tensor:
        """One of the step's vectors for each code (K,D), the same on every rank however the batch
        was cut.
        """
        mine, codes = torch.cat(self._vectors), len(self.codebook.vectors)
        places = (
            keyed.uniform(key, torch.arange(codes, device=mine.device)) * (len(mine) * dist.world())
        ).long()
        places = places - len(mine) * dist.rank()
        here = (places >= 0) & (places < len(mine))
        return dist.total(torch.where(here[:, None], mine[places.clamp(0, len(mine) - 1)], 0))

    def _forget(self) -> None:
        self._statistics = None
        self._vectors.clear()

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        """What waits for k-means has any length, and a checkpoint may say that it is over, or not
        yet.
        """
        saved = state.get(f"{prefix}waiting")
        if saved is not None:
            self.waiting = self.waiting.new_empty(saved.shape)
        self._started = None
        self._forget()
        super()._load_from_state_dict(state, prefix, *args)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the code (K,D) with the largest cosine for each unit vector (T,D): int64 (T,); the
    first of equals.
    """
    with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
        parts = vectors.detach().float().split(max(1, CELLS // len(codes)))
        return torch.cat([(part @ codes.float().T).argmax(dim=1) for part in parts])


def tally(vectors: Tensor, ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many vectors (T,D) have each id in 0..codes-1, and their sums: float32 (K,) and (K,D)."""
    ones = F.pad(vectors.float(), (0, 1), value=1.0)  # sums of ones are exact up to 2^24
    sums = torch.zeros(codes, ones.shape[1], device=vectors.device)
    size = max(1, CELLS // codes)
    with torch.autocast(vectors.device.type, enabled=False):
        for part, some in zip(ones.split(size), ids.split(size), strict=True):
            sums += (
                torch.zeros(len(some), codes, device=sums.device).scatter_(1, some[:, None], 1.0).T
                @ part
            )
    return sums[:, -1], sums[:, :-1]


def kmeans(vectors: Tensor, codes: int, iterations: int = 10, seed: int = 0) -> Tensor:
    """Spherical k-means of unit vectors (T,D): `codes` means of length 1, (codes, D).

    Starts from vectors drawn without replacement (with it, if there are fewer vectors than codes);
    assigns by cosine; a cluster that gets nothing keeps its mean.
    """
    count = len(vectors)
    if count >= codes:
        chosen = keyed.permutation(count, seed, "kmeans")[:codes]
    else:
        chosen = (keyed.uniform(keyed.key(seed, "kmeans"), torch.arange(codes)) * count).long()
    means = vectors[chosen.to(vectors.device)].float()
    for _ in range(iterations):
        hits, sums = tally(vectors, nearest(vectors, means), codes)
        means = torch.where(hits[:, None] > 0, F.normalize(sums, dim=1), means)
    return means
