"""Vector quantisation on the unit sphere, as BEiT v2's tokenizer does it (arXiv 2208.06366).

A `Codebook` is what a finished tokenizer needs: K unit vectors and the look-up. A `Learner` moves
the codes while the tokenizer trains: k-means on the first vectors, then an exponential moving
average. No gradient reaches a code. All of it is computed in float32, whatever autocast is active.

The moving average is that of section 2.1 and of microsoft/unilm (beit2): a code that was hit moves
by 1 - decay towards the direction of the mean of its vectors, however often it was hit. The
classical average over counts, with Laplace smoothing, is another one. Departures from the official
code:
- the codes move once per optimiser step, from the statistics of all its micro batches and ranks,
  where the official code does it in every forward pass; without gradient accumulation the two are
  the same, since there too the loss uses the codes from before the update;
- a code that nothing hit stays as it is, to the bit; the official code mixes it with itself and
  normalises again;
- k-means runs once, between two steps, on the vectors of whole batches from all ranks, and never in
  evaluation mode. It waits until there are ten vectors per code (`per_code`); until then the
  tokenizer trains without quantisation. In the official code each rank clusters its own first batch
  in its first forward pass, in training or evaluation;
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
        (straight-through). The commitment loss is the mean of (code - u)^2 over all elements, which
        is (2 - 2 cos) / D.
        """
        u = u.float()
        ids = self.assign(u)
        codes = self.vectors[ids]
        return ids, u + (codes - u).detach(), (codes - u).square().mean()


class Learner(nn.Module):
    """Moves the codes of `codebook`, which is a part of the tokenizer and saved with that.

    decay: of the moving average; kmeans: start from the data instead of random directions;
    per_code: vectors per code that k-means waits for; reseed: steps without a hit after which a
    code restarts, 0 = never.

    Each micro batch goes to `collect` until the codes are `ready`, then to `count`. The optimiser
    step ends with `start` until they are ready, then with `step`. The result depends on the step's
    vectors in the order of their rows, so a batch may be cut into any micro batches and ranks.
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
        self.__dict__["codebook"] = codebook  # hidden from torch: no part of this module
        self.decay, self.per_code, self.reseed = decay, per_code, reseed
        codes, dim = codebook.vectors.shape
        self.register_buffer("waiting", torch.empty(0, dim))  # of all ranks, for k-means
        self.register_buffer("started", torch.tensor(not kmeans))
        # steps since the last hit
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))
        # what `started` says, once it is known: asking a GPU means waiting for it
        self._started: bool | None = None
        # of this step, on this rank
        self._statistics: Tensor | None = None  # (K,D+1): sums and hits
        self._vectors: list[Tensor] = []  # for k-means, or for reseeding

    def ready(self) -> bool:
        """Whether the codes can be used: from the start, or once k-means has run."""
        if self._started is None:
            self._started = bool(self.started)
        return self._started

    def collect(self, u: Tensor) -> None:
        """Notes vectors u (..., D) for k-means, once per micro batch, as many on every rank."""
        self._vectors.append(u.detach().float().flatten(0, -2))

    @torch.no_grad()
    def start(self, seed: int, wait: bool = True) -> None:
        """Runs k-means if enough vectors have been collected, in this step and before.

        wait False: if any have been.
        """
        if not self._vectors:
            return
        self.waiting = torch.cat([self.waiting, dist.gather(torch.cat(self._vectors))])
        self._vectors.clear()
        codes = self.codebook.vectors
        if wait and len(self.waiting) < self.per_code * len(codes):
            return
        means = kmeans(self.waiting, len(codes), seed=seed)
        # rank 0's, on all ranks
        codes.copy_(dist.total(means if dist.is_main() else torch.zeros_like(means)))
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
        """Moves the codes by what was counted on all ranks since the last step.

        `key` names the step: restarted codes are drawn with it.
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
        """One of the step's vectors for each code (K,D).

        They are the same on every rank, however the batch was cut.
        """
        mine, codes = torch.cat(self._vectors), len(self.codebook.vectors)
        drawn = keyed.uniform(key, torch.arange(codes, device=mine.device))
        places = (drawn * (len(mine) * dist.world())).long() - len(mine) * dist.rank()
        here = (places >= 0) & (places < len(mine))
        return dist.total(torch.where(here[:, None], mine[places.clamp(0, len(mine) - 1)], 0))

    def _forget(self) -> None:
        self._statistics = None
        self._vectors.clear()

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        """As torch's, for vectors `waiting` of any length, and a k-means that is over or not."""
        saved = state.get(f"{prefix}waiting")
        if saved is not None:
            self.waiting = self.waiting.new_empty(saved.shape)
        self._started = None
        self._forget()
        super()._load_from_state_dict(state, prefix, *args)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Unit vectors (T,D) and codes (K,D) -> the code with the largest cosine for each, int64 (T,).

    Of equals it is the first.
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
            belongs = torch.zeros(len(some), codes, device=sums.device)
            sums += belongs.scatter_(1, some[:, None], 1.0).T @ part
    return sums[:, -1], sums[:, :-1]


def kmeans(vectors: Tensor, codes: int, iterations: int = 10, seed: int = 0) -> Tensor:
    """Spherical k-means of unit vectors (T,D): `codes` means of length 1, (codes, D).

    It starts from vectors drawn without replacement (with it, if there are fewer vectors than
    codes) and assigns by cosine. A cluster that gets nothing keeps its mean.
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
