"""The section `grid`: its runs, chains of runs that teach one another, and contrasts of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from workflow.messages import listed, nearest
from workflow.params.entries import DataSet, Encoder
from workflow.params.methods import Method
from workflow.params.pairs import Pairs
from workflow.params.sections import Grid, Run
from workflow.params.settings import Checker, Layer, Settings
from workflow.params.targets import Target
from workflow.params.tasks import Task, run_tasks
from workflow.params.teachers import (
    RUN,
    Above,
    Learner,
    Teachers,
    circles,
    run_gives,
    run_name,
    tokens,
)


@dataclass(frozen=True)
class Student:
    """A run of the grid, or one stage of a chain.

    It learns from the target `target`, from the encoder of the run `teacher` with the same seed, or
    from neither. `stage` counts the runs of its method in a row of which each taught the next,
    itself included. `method` is a name under methods, `kind` the file in stages/methods.
    """

    name: str
    key: str  # where it is declared, as a dotted key of params.yaml
    method: str
    kind: str
    target: str | None
    teacher: str | None
    stage: int
    seeds: list[int]
    data: str
    model: str
    settings: Settings
    tasks: dict[str, Task]


@dataclass(frozen=True)
class Draft:
    """A declared run, or one stage of a chain; what is not good of it is None."""

    name: str
    key: str
    run: Run  # `target` is that of this stage
    data: DataSet | None
    model: Encoder | None
    method: Method | None
    settings: Settings | None
    tasks: dict[str, Task]

    def as_teacher(self, grid: Grid) -> Above:
        """What its encoder gives to others."""
        seeds = self.run.seeds or grid.seeds
        return Above(run_gives(self.model), seeds, tokens(self.data, self.model))


def check_runs(
    checker: Checker,
    pairs: Pairs,
    methods: dict[str, Method],
    targets: dict[str, Target],
    tasks: dict[str, Task],
) -> dict[str, Student]:
    """All runs, each after those from which it learns; none if there is any problem."""
    grid, problems = checker.params.grid, checker.problems
    drafts = {
        name: _draft(checker, pairs, methods, tasks, name, key, run)
        for name, (key, run) in _unrolled(grid.runs, problems).items()
    }
    problems += _contrasts_without_runs(grid, drafts)
    problems += _learning_problems(checker, pairs, targets, drafts)
    above = {name: target.upstream for name, target in targets.items()}
    above |= {f"{RUN}{name}": draft.run.target for name, draft in drafts.items()}
    for circle in circles(above):
        run = run_name(circle[0])
        key = f"{drafts[run].key}.target" if run else f"targets.{circle[0]}.upstream"
        problems.append(f"{key}: goes round in a circle: {' -> '.join(circle)}")
    return {} if problems else _students(drafts, above, grid)


def _unrolled(declared: dict[str, Run], problems: list[str]) -> dict[str, tuple[str, Run]]:
    """{name: (dotted key, run)}; a run with `stages` becomes as many, each taught by the last."""
    found: dict[str, tuple[str, Run]] = {}
    for name, run in declared.items():
        key, target = f"grid.runs.{name}", run.target
        names = [f"{name}-{n + 1}" for n in range(run.stages)] if run.stages else [name]
        for each in names:
            if each in found:
                chain = key if run.stages else found[each][0]
                problems.append(
                    f"{chain}.stages: makes a run {each!r}, but there is another of that name"
                )
            found[each] = key, run.model_copy(update={"target": target})
            target = f"{RUN}{each}"
    return found


def _contrasts_without_runs(grid: Grid, runs: dict) -> Iterator[str]:
    """Names and patterns in grid.contrasts that fit no run."""
    for name, contrast in grid.contrasts.items():
        for side, patterns in (("of", contrast.of), ("against", contrast.against)):
            for pattern in patterns:
                if not any(fnmatchcase(run, pattern) for run in runs):
                    yield (
                        f"grid.contrasts.{name}.{side}: there is no run {pattern!r}"
                        f"{nearest(pattern, runs)}"
                    )


def _draft(
    checker: Checker,
    pairs: Pairs,
    methods: dict[str, Method],
    tasks: dict[str, Task],
    name: str,
    key: str,
    run: Run,
) -> Draft:
    """A run with the data, encoder, settings and tasks that it uses; problems are noted."""
    data, model = pairs.choose(key, run.data, run.model)
    own_tasks = run_tasks(checker, pairs, tasks, key, run)
    for task in own_tasks.values():
        tested = data if task.data is None else pairs.data[task.data]
        pairs.suits(f"task {task.kind}", task.key, task.settings, tested, model)
    if run.method not in checker.params.methods:
        known = checker.kinds("method")
        hint = f"; add `{run.method}: {{}}` to methods" if run.method in known else ""
        hint = hint or nearest(run.method, [*checker.params.methods, *known])
        checker.problems.append(f"{key}.method: {run.method!r} has no section under methods{hint}")
    method, settings = methods.get(run.method), None
    if method is not None:
        layers = list(method.layers)
        if run.recipe:
            layers.append(checker.published(method.plugin, key))
        layers.append(Layer(f"{key}.set", run.set))
        settings = checker.settings("method", method.kind, method.plugin, method.key, layers)
        pairs.suits(f"method {method.kind}", method.key, settings, data, model)
    return Draft(name, key, run, data, model, method, settings, own_tasks)


def _learning_problems(
    checker: Checker, pairs: Pairs, targets: dict[str, Target], drafts: dict[str, Draft]
) -> Iterator[str]:
    """What is wrong with that from which targets and runs learn."""
    grid = checker.params.grid
    teachers = Teachers(
        {name: _as_teacher(targets.get(name), pairs) for name in checker.params.targets},
        {draft.name: draft.as_teacher(grid) for draft in drafts.values()},
        {name: run.stages for name, run in grid.runs.items() if run.stages},
    )
    learners = [target.learner(pairs) for target in targets.values()]
    for draft in drafts.values():
        if draft.method is None:
            continue
        who, needs = f"method {draft.method.kind}", draft.method.plugin.literals["TARGET"]
        if needs and draft.settings:
            needs |= getattr(draft.settings.values, "also_needs", frozenset())
        if draft.run.stages and not (needs and teachers.a_run_may_give(needs)):
            does = f"needs a target that produces {listed(needs)}" if needs else "takes no target"
            yield (
                f"{draft.key}.stages: {who} {does}, expected a method that can learn from the "
                f"encoder of the stage before (found {draft.run.stages})"
            )
            continue
        learners.append(
            Learner(
                f"{draft.key}.target",
                who,
                "target",
                draft.run.target,
                needs,
                draft.run.seeds or grid.seeds,
                tokens(draft.data, draft.model, draft.settings),
            )
        )
    yield from filter(None, map(teachers.problem, learners))


def _as_teacher(target: Target | None, pairs: Pairs) -> Above:
    if target is None:
        return Above(None)
    return Above(target.produces, grid=tokens(pairs.data[target.data], pairs.models[target.model]))


def _students(
    drafts: dict[str, Draft], above: dict[str, str | None], grid: Grid
) -> dict[str, Student]:
    """The runs, each after every run from which it learns, be it through targets."""
    students: dict[str, Student] = {}

    def add(name: str) -> None:
        if name in students:
            return
        draft, learns_from = drafts[name], above[f"{RUN}{name}"]
        at = learns_from
        while at is not None and run_name(at) is None:
            at = above[at]
        if at is not None:
            add(run_name(at))
        teacher = students.get(run_name(learns_from))
        students[name] = Student(
            name=name,
            key=draft.key,
            method=draft.run.method,
            kind=draft.method.kind,
            target=None if teacher else learns_from,
            teacher=teacher and teacher.name,
            stage=teacher.stage + 1 if teacher and teacher.method == draft.run.method else 1,
            seeds=draft.run.seeds or grid.seeds,
            data=draft.data.name,
            model=draft.model.name,
            settings=draft.settings,
            tasks=draft.tasks,
        )

    for name in drafts:
        add(name)
    return students
