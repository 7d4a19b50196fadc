"""The scalars of a training: averaged on the device, written as rows of history.jsonl, and watched
for NaN.

Nothing here waits for a GPU until a row is due: sums and the place of the first non-finite value
are kept as tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stages.kit import dist

NEVER = 2**62


class History:
    """Accumulates scalars and writes one row of means per logging step.

    `place` counts micro batches over the whole run; the first place at which each term was not
    finite is remembered.
    """

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = Path(path), device
        self.text = ""  # the file's content, which also travels in the checkpoint
        self.last: dict = {}  # the newest row
        self._sums: dict[tuple[str, ...], list] = {}  # names -> [weighted sums (K,), weight]
        self._first_bad: dict[tuple[str, ...], torch.Tensor] = {}  # names -> first bad place (K,)

    @torch.no_grad()
    def add(self, scalars: dict, weight: int, place: int) -> None:
        """Takes the scalars (0-d tensors or numbers) of one micro batch of `weight` images."""
        names = tuple(scalars)
        vector = torch.stack([self._scalar(value) for value in scalars.values()]).double()
        if names not in self._sums:
            self._sums[names] = [torch.zeros_like(vector), 0]
        entry = self._sums[names]
        entry[0] += vector * weight
        entry[1] += weight
        first = self._first_bad.get(names)
        if first is None:
            first = torch.full(vector.shape, NEVER, dtype=torch.int64, device=self.device)
        self._first_bad[names] = torch.where(vector.isfinite(), first, first.clamp(max=place))

    def bad(self) -> tuple[int, list[str]] | None:
        """(first place, names of the terms that were not finite there) over all ranks, or None.
        Waits for the device.
        """
        found: dict[str, int] = {}
        for names, first in self._first_bad.items():
            for name, place in zip(names, dist.minimum(first.clone()).tolist(), strict=True):
                if place < NEVER:
                    found[name] = min(place, found.get(name, NEVER))
        if not found:
            return None
        place = min(found.values())
        names = [name for name in found if found[name] == place]
        # the culprit first: the sums become bad with any of their terms
        return place, sorted(names, key=lambda name: (name in ("loss", "grad_norm"), name))

    def row(self, **head: float) -> dict:
        """Ends a logging interval: appends {**head, **means over images and ranks} to the file and
        returns it.

        Without a scalar since the last row there is none; the last row is returned.
        """
        if not self._sums:
            return self.last
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for names, (vector, weight) in self._sums.items():
            for name, value in zip(names, dist.mean(vector.clone()).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
                weights[name] = weights.get(name, 0) + weight
        self.last = {**head, **{name: sums[name] / weights[name] for name in sums}}
        self._sums.clear()
        line = json.dumps(self.last) + "\n"
        self.text += line
        if dist.is_main():
            with open(self.path, "a") as file:
                file.write(line)
        return self.last

    def state(self) -> dict:
        """For a checkpoint; call it on every rank. Sums are kept rank by rank, for the bits of
        their total.
        """
        sums = [
            [list(names), dist.gather(vector[None].clone()).cpu(), weight]
            for names, (vector, weight) in self._sums.items()
        ]
        return {"text": self.text, "sums": sums}

    def restore(self, state: dict | None) -> None:
        """Sets the file and the unfinished interval to a checkpoint's, of any number of ranks; None
        empties them.
        """
        state = state or {"text": "", "sums": []}
        self.text = state["text"]
        self.last = json.loads(self.text.splitlines()[-1]) if self.text else {}
        self._sums = {
            tuple(names): self._share(vectors, weight) for names, vectors, weight in state["sums"]
        }
        self._first_bad = {}
        if dist.is_main():
            self.path.write_text(self.text)

    def _share(self, vectors: torch.Tensor, weight: float) -> list:
        """This rank's [sums (K,), weight] from those of the ranks that saved, (R,K) and the weight
        of each.
        """
        ranks, world = len(vectors), dist.world()
        if ranks == world:
            return [vectors[dist.rank()].to(self.device, copy=True), weight]
        return [vectors.sum(dim=0).to(self.device) / world, weight * ranks / world]

    def _scalar(self, value) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().to(self.device).reshape(())
        return torch.full((), float(value), device=self.device, dtype=torch.float64)
