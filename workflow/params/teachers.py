"""What targets and runs learn from: a target, or the encoder of another run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workflow.messages import listed, nearest
from workflow.params.entries import DataSet, Encoder
from workflow.params.settings import Settings

RUN = "run:"  # before the name of a run where the name of a target may stand
RUN_GIVES = frozenset({"patch", "layers"})  # the encoder of any run
RUN_MAY_GIVE = frozenset({"cls", "attention"})  # if its family can


def run_name(learns_from: str | None) -> str | None:
    """NAME of run:NAME; None for the name of a target, and for None."""
    return learns_from[len(RUN) :] if learns_from and learns_from.startswith(RUN) else None


@dataclass(frozen=True)
class Above:
    """A target or a run from which others may learn. `gives`: None where it is not known."""

    gives: frozenset[str] | None
    seeds: list[int] | None = None  # of a run
    grid: int | None = None  # tokens along a side


@dataclass(frozen=True)
class Learner:
    """A target or a run that may learn from another. `needs`: None if it learns from none."""

    key: str  # where it says what it learns from, such as grid.runs.mae.target
    who: str  # such as "method mae"
    what: str  # "target" or "upstream target"
    learns_from: str | None
    needs: frozenset[str] | None
    seeds: list[int]
    grid: int | None = None


@dataclass
class Teachers:
    """All that is declared under `targets` and grid.runs, and chains of runs by their name."""

    targets: dict[str, Above]
    runs: dict[str, Above]
    chains: dict[str, int]  # name -> number of stages

    def problem(self, learner: Learner) -> str | None:
        """What is wrong with that from which a target or run learns."""
        key, who, needs, given = learner.key, learner.who, learner.needs, learner.learns_from
        if needs is None:
            found = f"{key}: {who} takes no {learner.what} (found {given!r})"
            return None if given is None else found
        fit = self.such_as(needs, but=key)
        if given is None:
            return f"{key}: {who} needs {a(learner.what)} that produces {listed(needs)}{fit}"
        run = run_name(given)
        if run is not None and run not in self.runs:
            stages = self.chains.get(run)
            hint = f"; it is a chain: name a stage, as in '{RUN}{run}-{stages}'"
            return f"{key}: no run is called {run!r}{hint if stages else nearest(run, self.runs)}"
        if run is None and given not in self.targets:
            hint = ", or run:NAME, the encoder of another run" if self.a_run_may_give(needs) else ""
            return f"{key}: no target is called {given!r}{nearest(given, self.targets)}{hint}"
        above = self.targets[given] if run is None else self.runs[run]
        return self._mismatch(learner, above, fit)

    def _mismatch(self, learner: Learner, above: Above, fit: str) -> str | None:
        """What a target or run lacks for the one that learns from it."""
        key, who, given = learner.key, learner.who, learner.learns_from
        missing = learner.needs - above.gives if above.gives is not None else None
        if missing:
            return (
                f"{key}: {given!r} produces {listed(above.gives)}, {who} needs "
                f"{listed(missing)}{fit}"
            )
        unmade = [str(seed) for seed in learner.seeds if seed not in (above.seeds or learner.seeds)]
        if unmade:
            return (
                f"{key}: {given!r} has seeds {above.seeds}, expected seed {', '.join(unmade)} too, "
                "as it teaches with its encoder of the same seed"
            )
        on_the_grid = learner.needs != {"cls"}
        if on_the_grid and None not in (learner.grid, above.grid) and learner.grid != above.grid:
            return (
                f"{key}: {given!r} gives {above.grid} x {above.grid} tokens, {who} has "
                f"{learner.grid} x {learner.grid}; expected as many"
            )
        return None

    def such_as(self, needs: frozenset[str], but: str) -> str:
        """What produces all of `needs`, for the end of a message about the key `but`."""
        names = [
            repr(name)
            for name, above in self.targets.items()
            if above.gives is not None
            and needs <= above.gives
            and but != f"targets.{name}.upstream"
        ]
        found = f", such as {', '.join(names)}" if names else ", and none is defined under targets"
        if self.a_run_may_give(needs):
            found += ", or run:NAME, the encoder of another run"
        return found

    @staticmethod
    def a_run_may_give(needs: frozenset[str]) -> bool:
        return needs <= RUN_GIVES | RUN_MAY_GIVE


def run_gives(model: Encoder | None) -> frozenset[str] | None:
    """What the encoder of a run with this model produces."""
    return None if model is None else RUN_GIVES | (RUN_MAY_GIVE & model.can)


def tokens(
    data: DataSet | None, model: Encoder | None, settings: Settings | None = None
) -> int | None:
    """Tokens along a side that an encoder gives for a data set; None where that is not known.

    `settings`: of a method, which may train at a size of its own.
    """
    if data is None or model is None or data.image_size is None:
        return None
    if settings is not None and settings.input_size is not None:
        return None
    grid = getattr(model.settings.values, "grid", None)
    return grid and grid(data.image_size)


def a(what: str) -> str:
    """ "a target", "an upstream target"."""
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def circles(above: dict[str, str | None]) -> Iterable[list[str]]:
    """Circles among names of which each points to at most one other.

    Each from its alphabetically first member back to it.
    """
    for name in above:
        path, at = [name], above[name]
        while at in above and at not in path:
            path, at = [*path, at], above[at]
        if at == name == min(path):
            yield [*path, name]
