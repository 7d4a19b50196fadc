"""The section `grid`: its runs, chains of runs that teach one another, and the contrasts between
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from workflow.params.sections import Grid, Run
from workflow.params.settings import Checker, Settings
from workflow.params.targets import Target, circles, such_as
from workflow.plugins import ParamsError, nearest, plugin, plugin_names


@dataclass(frozen=True)
class Student:
    """A run of the grid, or one stage of a chain. It learns from the target `target`, from the
    encoder of the run `teacher` with the same seed, or from neither. `stage` counts the runs of its
    method in a row of which each taught the next, itself included.
    """

    name: str
    key: str  # where it is declared, as a dotted key of params.yaml
    method: str
    target: str | None
    teacher: str | None
    stage: int
    seeds: list[int]
    set: dict[str, Any]
    settings: Settings


class Declared(NamedTuple):
    key: str  # in params.yaml
    run: Run


def check_runs(checker: Checker, targets: dict[str, Target]) -> dict[str, Student]:
    """All runs, teachers before their students; none if there is any problem. Problems go to the
    checker.
    """
    params, problems = checker.params, checker.problems
    declared = _unrolled(params.grid.runs, problems)
    problems += _idle_contrasts(params.grid, declared)
    settings: dict[str, Settings | None] = {}
    for name, (key, run) in declared.items():
        if run.method not in params.methods:
            problems.append(_no_method(key, run.method, checker))
            continue
        section = f"methods.{run.method}", params.methods[run.method]
        settings[name] = checker.settings("method", run.method, section, (f"{key}.set", run.set))
        try:
            needs = plugin("method", run.method, checker.root).literals["TARGET"]
        except ParamsError:  # noted by the checker
            continue
        problems += filter(
            None, [_above_problem(name, needs, declared, params.grid, targets, params.targets)]
        )
    teachers = {name: _teacher(run) for name, (_, run) in declared.items()}
    for circle in circles(teachers):
        problems.append(
            f"{declared[circle[0]].key}.target: goes round in a circle: {' -> '.join(circle)}"
        )
    if problems:
        return {}
    students: dict[str, Student] = {}

    def add(name: str) -> Student:
        if name not in students:
            (key, run), teacher = declared[name], teachers[name]
            above = add(teacher) if teacher else None
            stage = above.stage + 1 if above and above.method == run.method else 1
            target, seeds = None if teacher else run.target, run.seeds or params.grid.seeds
            students[name] = Student(
                name, key, run.method, target, teacher, stage, seeds, run.set, settings[name]
            )
        return students[name]

    for name in declared:
        add(name)
    return students


def _unrolled(declared: dict[str, Run], problems: list[str]) -> dict[str, Declared]:
    """Runs by name; one with `stages` becomes as many, each the teacher of the next."""
    found: dict[str, Declared] = {}
    for name, run in declared.items():
        key, stages = f"grid.runs.{name}", run.stages or 1
        names = [f"{name}-{n}" for n in range(1, stages + 1)] if run.stages else [name]
        targets = [run.target, *(f"run:{n}" for n in names)]
        for each, target in zip(names, targets):
            if each in found:
                chain = key if run.stages else found[each].key
                problems.append(
                    f"{chain}.stages: makes a run {each!r}, but there is another of that name"
                )
            found[each] = Declared(key, run.model_copy(update={"target": target}))
    return found


def _idle_contrasts(grid: Grid, names: dict) -> list[str]:
    """Contrasts of runs that there are not."""
    return [
        f"grid.contrasts.{name}.{side}: there is no run {p!r}{nearest(p, names)}"
        for name, contrast in grid.contrasts.items()
        for side, patterns in (("of", contrast.of), ("against", contrast.against))
        for p in patterns
        if not any(fnmatchcase(run, p) for run in names)
    ]


def _no_method(key: str, method: str, checker: Checker) -> str:
    known = plugin_names("method", checker.root)
    hint = f"; add `{method}: {{}}` to methods" if method in known else nearest(method, known)
    return f"{key}.method: {method!r} has no section under methods{hint}"


def _teacher(run: Run) -> str | None:
    """The run that `run:NAME` names, None for a name under targets."""
    return run.target[4:] if run.target is not None and run.target.startswith("run:") else None


def _above_problem(
    name: str,
    needs: str | None,
    runs: dict[str, Declared],
    grid: Grid,
    targets: dict[str, Target],
    sections: dict,
) -> str | None:
    """What is wrong with that from which a run learns. `needs`: "ids", "features" or None, of its
    method.
    """
    key, run = runs[name]
    if run.stages and needs != "features":
        what = f"needs a target that produces {needs}" if needs else "takes no target"
        return (
            f"{key}.stages: method {run.method} {what}, expected one that learns from features, as those of the stage "
            f"before (found {run.stages})"
        )
    if needs is None:
        return (
            None
            if run.target is None
            else f"{key}.target: method {run.method} takes no target (found {run.target!r})"
        )
    if _teacher(run):
        return _teacher_problem(name, needs, runs, grid)
    also = ", or run:NAME, the encoder of another run" if needs == "features" else ""
    fit = such_as(targets, needs) + also
    if run.target is None:
        return f"{key}.target: method {run.method} needs a target that produces {needs}{fit}"
    if run.target not in sections:
        return (
            f"{key}.target: no target is called {run.target!r}{nearest(run.target, sections)}{also}"
        )
    made = targets[run.target].produces if run.target in targets else needs
    return (
        None
        if made == needs
        else f"{key}.target: {run.target!r} produces {made}, method {run.method} needs {needs}{fit}"
    )


def _teacher_problem(name: str, needs: str, runs: dict[str, Declared], grid: Grid) -> str | None:
    """What is wrong with the run whose encoder is to teach the run `name`."""
    (key, run), teacher = runs[name], _teacher(runs[name].run)
    if needs != "features":
        return f"{key}.target: {run.target!r} gives features, method {run.method} needs {needs}"
    if teacher not in runs:
        stages = grid.runs[teacher].stages if teacher in grid.runs else None
        hint = (
            f"; it is a chain: name a stage, as in 'run:{teacher}-{stages}'"
            if stages
            else nearest(teacher, runs)
        )
        return f"{key}.target: no run is called {teacher!r}{hint}"
    given = runs[teacher].run.seeds or grid.seeds
    missing = [str(seed) for seed in run.seeds or grid.seeds if seed not in given]
    if missing:
        seeds = ", ".join(missing)
        return f"{key}.target: run {teacher!r} has seeds {given}, but {name!r} needs its encoder of seed {seeds} too"
    return None
