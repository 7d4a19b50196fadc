"""Vector quantisation: on the unit sphere, as BEiT v2's tokenizer does it (arXiv 2208.06366), or
between vectors of any length, as VQ-VAE does it (arXiv 1711.00937).

A `Codebook` is what a finished tokenizer needs: K unit vectors and the look-up. A `Learner` moves
the codes while the tokenizer trains: k-means on the first vectors, then an exponential moving
average. No gradient reaches a code. All of it is computed in float32, whatever autocast is active.
`EuclideanCodebook` and `EuclideanLearner` are the other pair; their moving average is the classical
one, over counts, of VQ-VAE's appendix A.1.

On the sphere the moving average is that of section 2.1 and of microsoft/unilm (beit2): a code that
was hit moves by 1 - decay towards the direction of the mean of its vectors, however often it was
hit. Departures from the official code:
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
from stages.kit.eager import eager
from stages.kit.parts.health import perplexity

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
    code restarts, 0 = never; after: share of the training before k-means, without quantisation.

    A tokenizer calls `quantise` in its forward pass and `move` after each optimiser step. With
    them each micro batch goes to `collect` until the codes are `ready`, then to `count`; the step
    ends with `start` until they are ready, then with `step`. The result depends on the step's
    vectors in the order of their rows, so a batch may be cut into any micro batches and ranks.
    """

    sphere = True  # whether codes have length 1

    def __init__(
        self,
        codebook: Codebook,
        decay: float = 0.99,
        kmeans: bool = True,
        per_code: int = 10,
        reseed: int = 0,
        after: float = 0.0,
    ):
        super().__init__()
        self.__dict__["codebook"] = codebook  # hidden from torch: no part of this module
        self.decay, self.per_code, self.reseed, self.after = decay, per_code, reseed, after
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

    @classmethod
    def of(cls, codebook: Codebook, config) -> Learner:
        """With the settings of a checks.LearntCodes."""
        waits = {"per_code": config.vectors_per_code, "after": config.kmeans_after}
        return cls(codebook, config.decay, config.kmeans, reseed=config.reseed, **waits)

    def quantise(self, u: Tensor, progress) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A micro batch of vectors u (..., D) -> (quantised (..., D), commitment (), {"usage",
        "perplexity"}): how many codes this batch uses.

        Until the codes are ready nothing is quantised, and the rest is 0. Evaluation counts nothing
        and quantises with any codes.
        """
        quantised, commitment = u, u.new_zeros(())
        hits = u.new_zeros(len(self.codebook.vectors))
        if not self.training or self.ready():
            ids, quantised, commitment = self.codebook(u)
            ones = torch.ones_like(hits[:1]).expand(ids.numel())
            hits = hits.scatter_add(0, ids.flatten(), ones)
            if self.training:
                self.count(u, ids)
        elif self.clusters(progress):
            self.collect(u)
        used = {"usage": (hits > 0).float().mean(), "perplexity": perplexity(hits).float()}
        return quantised, commitment, used

    @eager  # it reads the step
    def clusters(self, progress) -> bool:
        """Whether this step's vectors are for k-means.

        It runs as soon as it has enough of them, and from the middle of the training on with all
        that it has. The codes are used from the next step on.
        """
        return (progress.step + 1) / progress.steps > self.after

    def move(self, progress) -> None:
        """Ends an optimiser step."""
        if self.ready():
            self.step(progress.seed, progress.step)
        else:
            self.start(progress.seed, wait=2 * (progress.step + 1) <= progress.steps)

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
        means = kmeans(self.waiting, len(codes), seed=seed, sphere=self.sphere)
        # rank 0's, on all ranks
        means = dist.total(means if dist.is_main() else torch.zeros_like(means))
        self._restart(torch.ones_like(self.idle, dtype=torch.bool), means)
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
        self._move(sums, hits)
        self.idle.copy_(torch.where(hits[:, 0] > 0, 0, self.idle + 1))
        if self.reseed:
            dead = self.idle >= self.reseed
            self._restart(dead, self._drawn(keyed.key("reseed", *key)))
            self.idle.masked_fill_(dead, 0)
        self._forget()

    def _move(self, sums: Tensor, hits: Tensor) -> None:
        """Moves the codes by the sums (K,D) of their vectors, of which there are hits (K,1)."""
        codes = self.codebook.vectors
        moved = F.normalize(self.decay * codes + (1 - self.decay) * F.normalize(sums, dim=1), dim=1)
        codes.copy_(torch.where(hits > 0, moved, codes))

    def _restart(self, which: Tensor, vectors: Tensor) -> None:
        """Puts the codes `which` (K,) at vectors (K,D)."""
        codes = self.codebook.vectors
        codes.copy_(torch.where(which[:, None], vectors, codes))

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


class EuclideanCodebook(Codebook):
    """`vectors` (K,D) of any length, at first normal with variance 1 / D."""

    def __init__(self, codes: int, dim: int):
        super().__init__(codes, dim)
        self.vectors.copy_(torch.randn(codes, dim) / dim**0.5)

    def assign(self, h: Tensor) -> Tensor:
        """Vectors (..., D) -> ids of the codes at the least distance (...), int64; of equals the
        first.
        """
        return assign(h, self.vectors)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the base class's; the quantised vectors are the codes to the bit. The commitment loss
        is the mean of (code - h)^2 over all elements.
        """
        h = h.float()
        ids = self.assign(h)
        codes = self.vectors[ids]
        return ids, codes + (h - h.detach()), (codes - h).square().mean()

    def distances(self, h: Tensor) -> Tensor:
        """Vectors (..., D) -> squared distances to all codes (..., K), float32."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            return h.square().sum(dim=-1, keepdim=True) - 2 * (extended(h) @ table(self.vectors).T)


class EuclideanLearner(Learner):
    """Moves the codes of a EuclideanCodebook. Of each it keeps moving averages of its hits, N, and
    of the sum of its vectors, m:

        N <- decay N + (1 - decay) hits,  m <- decay m + (1 - decay) sum,  code = m / N',
        N' = (N + EPS) / (sum of N + K EPS) * sum of N.

    A code starts, or restarts, with N = 1 and m = the code. One that nothing hits stays where it
    is, but for the smoothing N', which draws it to 0 once its N has become as small as EPS.
    """

    EPS = 1e-5
    sphere = False

    def __init__(self, codebook: EuclideanCodebook, *args, **kw):
        super().__init__(codebook, *args, **kw)
        self.register_buffer("weights", torch.ones(len(codebook.vectors), 1))  # N
        self.register_buffer("sums", codebook.vectors.clone())  # m

    def _move(self, sums: Tensor, hits: Tensor) -> None:
        self.weights.lerp_(hits, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.weights.sum()
        smooth = (self.weights + self.EPS) / (total + len(self.weights) * self.EPS) * total
        self.codebook.vectors.copy_(self.sums / smooth)

    def _restart(self, which: Tensor, vectors: Tensor) -> None:
        super()._restart(which, vectors)
        self.weights.masked_fill_(which[:, None], 1.0)
        self.sums.copy_(torch.where(which[:, None], vectors, self.sums))


def extended(x: Tensor) -> Tensor:
    """(...,D) -> (x, 1), (...,D+1)."""
    return F.pad(x, (0, 1), value=1.0)


def table(codes: Tensor) -> Tensor:
    """Codes c as (c, -|c|^2 / 2), (K,D+1): whose product with (x, 1) is largest is nearest to x."""
    return torch.column_stack([codes, -codes.square().sum(dim=1) / 2])


def assign(x: Tensor, codes: Tensor) -> Tensor:
    """Vectors of any length (...,D) and codes (K,D) -> the code at the least distance for each
    (...), int64; of equals the first.
    """
    return nearest(extended(x.float()).flatten(0, -2), table(codes.float())).view(x.shape[:-1])


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


def kmeans(
    vectors: Tensor, codes: int, iterations: int = 10, seed: int = 0, sphere: bool = True
) -> Tensor:
    """k-means of vectors (T,D): `codes` means, (codes, D). On the sphere both have length 1.

    It starts from vectors drawn without replacement (with it, if there are fewer vectors than
    codes) and assigns by cosine, or by distance. A cluster that gets nothing keeps its mean.
    """
    count = len(vectors)
    if count >= codes:
        chosen = keyed.permutation(count, seed, "kmeans")[:codes]
    else:
        chosen = (keyed.uniform(keyed.key(seed, "kmeans"), torch.arange(codes)) * count).long()
    means = vectors[chosen.to(vectors.device)].float()
    for _ in range(iterations):
        ids = (nearest if sphere else assign)(vectors, means)
        hits, sums = tally(vectors, ids, codes)
        found = F.normalize(sums, dim=1) if sphere else sums / hits[:, None].clamp(min=1)
        means = torch.where(hits[:, None] > 0, found, means)
    return means
