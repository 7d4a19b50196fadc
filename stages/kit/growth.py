"""Steps of several batches: how many of the declared batches an optimiser step takes, and which.

FastMIM-P (arXiv 2212.06593) trains on small images first, of which more fit into a step. A
declaration is pairs (share of the training from which on, batches of a step), the first from 0; an
empty one is one batch for every step. Steps stay as many as they are, so what grows is how many
images are seen.
"""

from __future__ import annotations

from dataclasses import dataclass

Pairs = tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Growth:
    """A declaration, for a training of so many steps."""

    pairs: Pairs
    steps: int

    @property
    def phases(self) -> list[tuple[int, int]]:
        """(first step, batches of a step) of each part of the training that has a step."""
        found = {0: 1}
        for share, count in self.pairs:
            found[next((s for s in self._near(share) if s / self.steps >= share), self.steps)] = (
                count
            )
        return sorted(item for item in found.items() if item[0] < max(self.steps, 1))

    def _near(self, share: float):
        """Steps around a share: by rounding the first of it may be one off."""
        place = int(share * self.steps)
        return range(max(place - 1, 0), min(place + 3, self.steps))

    def batches(self, step: int) -> int:
        """Of one step."""
        return next(count for first, count in reversed(self.phases) if step >= first)

    def before(self, step: int) -> int:
        """Batches of all steps before this one."""
        phases = self.phases
        ends = [first for first, _ in phases[1:]] + [step]
        return sum(
            count * max(0, min(end, step) - first)
            for (first, count), end in zip(phases, ends, strict=True)
        )

    @property
    def most(self) -> int:
        """Batches of the largest step."""
        return max(count for _, count in self.phases)
