"""The section `targets`: teachers and tokenizers, each perhaps made from one upstream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workflow.params.messages import shown
from workflow.params.settings import Checker, Settings
from workflow.plugins import nearest, plugin_names


@dataclass(frozen=True)
class Target:
    name: str
    kind: str
    upstream: str | None
    seed: int
    settings: Settings

    @property
    def produces(self) -> str:
        """ "ids" or "features"."""
        return self.settings.plugin.literals["PRODUCES"]


def check_targets(checker: Checker) -> dict[str, Target]:
    """The targets whose settings are good; problems go to the checker."""
    good: dict[str, Target] = {}
    for name, section in checker.params.targets.items():
        key, given = f"targets.{name}", dict(section or {})
        kind, upstream, seed = (
            given.pop("kind", None),
            given.pop("upstream", None),
            given.pop("seed", 0),
        )
        if not isinstance(kind, str):
            kinds = ", ".join(plugin_names("target", checker.root))
            checker.problems.append(f"{key}.kind: required, one of {kinds} (found {shown(kind)})")
            continue
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            checker.problems.append(
                f"{key}.seed: must be a whole number, 0 or more (found {shown(seed)})"
            )
        settings = checker.settings("target", kind, (key, given))
        if settings is None:
            continue
        good[name] = Target(name, kind, upstream, seed, settings)
        if good[name].produces not in ("ids", "features"):
            checker.problems.append(
                f'{key}.kind: {settings.plugin.path} must declare PRODUCES = "ids" or "features"'
            )
    checker.problems += filter(
        None, (_upstream_problem(t, good, checker.params.targets) for t in good.values())
    )
    for circle in circles({name: target.upstream for name, target in good.items()}):
        checker.problems.append(
            f"targets.{circle[0]}.upstream: goes round in a circle: {' -> '.join(circle)}"
        )
    return good


def _upstream_problem(target: Target, good: dict[str, Target], declared: dict) -> str | None:
    """What is wrong with a target's upstream; None also if that one has problems of its own."""
    key, upstream = f"targets.{target.name}.upstream", target.upstream
    needs = target.settings.plugin.literals["UPSTREAM"]
    if needs is None:
        return (
            None
            if upstream is None
            else f"{key}: kind {target.kind} takes no upstream target (found {upstream!r})"
        )
    if not isinstance(upstream, str):
        fit = such_as(good, needs, but=target.name)
        return f"{key}: kind {target.kind} needs an upstream target that produces {needs}{fit} (found {shown(upstream)})"
    if upstream not in declared:
        return f"{key}: no target is called {upstream!r}{nearest(upstream, declared)}"
    if upstream in good and good[upstream].produces != needs:
        return f"{key}: {upstream!r} produces {good[upstream].produces}, kind {target.kind} needs {needs}"
    return None


def such_as(good: dict[str, Target], what: str, but: str | None = None) -> str:
    """Names the targets that produce `what`, for the end of a message."""
    names = [repr(name) for name, target in good.items() if target.produces == what and name != but]
    return f", such as {', '.join(names)}" if names else ", and none is defined under targets"


def circles(above: dict[str, Any]) -> list[list[str]]:
    """The circles among names of which each points to at most one other, from their alphabetically
    first member back to it.
    """
    found = []
    for name in above:
        path, at = [name], above[name]
        while isinstance(at, str) and at in above and at not in path:
            path, at = [*path, at], above[at]
        if at == name == min(path):
            found.append([*path, name])
    return found
