"""The section `tasks`, and the changes that a run makes to it for itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workflow.messages import listed, nearest, shown
from workflow.params.pairs import Pairs
from workflow.params.sections import Run, TaskWords
from workflow.params.settings import Checker, Layer, Settings
from workflow.params.teachers import circles


@dataclass(frozen=True)
class Task:
    """An entry of `tasks`. data: None for that of the run; after: the task whose model it tests."""

    name: str
    key: str
    kind: str
    data: str | None
    after: str | None
    settings: Settings


def check_tasks(checker: Checker, pairs: Pairs) -> dict[str, Task]:
    """The good tasks, each after the one whose model it tests; problems go to the checker."""
    found = {}
    for name, section in checker.params.tasks.items():
        if task := _task(checker, pairs, name, [Layer(f"tasks.{name}", section or {})]):
            found[name] = task
    return _in_order(checker, found)


def run_tasks(
    checker: Checker, pairs: Pairs, tasks: dict[str, Task], key: str, run: Run
) -> dict[str, Task]:
    """The tasks of a run at `key`, with its own changes; problems go to the checker."""
    sections, found = checker.params.tasks, dict(tasks)
    for name, changes in run.tasks.items():
        at = f"{key}.tasks.{name}"
        if name not in sections:
            checker.problems.append(f"{at}: no task is called {name!r}{nearest(name, sections)}")
        elif changes is None:
            found.pop(name, None)
        elif "kind" in changes:
            checker.problems.append(
                f"{at}.kind: a run cannot change it (it is that of tasks.{name})"
            )
        else:
            layers = [Layer(f"tasks.{name}", sections[name] or {}), Layer(at, changes)]
            if task := _task(checker, pairs, name, layers):
                found[name] = task
    left_out = {name for name, changes in run.tasks.items() if changes is None}
    for task in found.values():
        if task.after in left_out:
            checker.problems.append(
                f"{key}.tasks.{task.after}: is left out, but {task.name} tests its model; leave "
                "out both"
            )
    return _in_order(checker, found) if run.tasks and not checker.problems else found


def _task(checker: Checker, pairs: Pairs, name: str, sections: list[Layer]) -> Task | None:
    """A task from its section, and perhaps a run's changes of it."""
    key, words, layers = sections[0].key, {}, []
    for at, section, _ in sections:
        told, given = checker.words(TaskWords, at, section)
        if told is None:
            return None
        words |= told.model_dump(exclude_unset=True)
        plugin = checker.plugin("task", key, name, words.get("kind"))
        if plugin is None:
            return None
        layers += [checker.published(plugin, at)] if told.recipe else []
        layers.append(Layer(at, given))
    kind, data = words.get("kind") or name, words.get("data")
    settings = checker.settings("task", kind, plugin, key, layers)
    if settings is None or (data is not None and not pairs.data_set(f"{at}.data", data)):
        return None
    return Task(name, key, kind, data, words.get("after"), settings)


def _in_order(checker: Checker, tasks: dict[str, Task]) -> dict[str, Task]:
    """The tasks with `after` told, each after the one whose model it tests."""
    linked = {task.name: _linked(checker, task, tasks) for task in tasks.values()}
    after = {name: task.after for name, task in linked.items()}
    for circle in circles(after):
        checker.problems.append(
            f"tasks.{circle[0]}.after: goes round in a circle: {' -> '.join(circle)}"
        )
        return {}
    ordered: dict[str, Task] = {}

    def add(name: str | None) -> None:
        if name in linked and name not in ordered:
            add(after[name])
            ordered[name] = linked[name]

    for name in linked:
        add(name)
    return ordered


def _linked(checker: Checker, task: Task, tasks: dict[str, Task]) -> Task:
    """The task with the name of the one whose model it tests."""
    key, kind = f"{task.key}.after", task.settings.plugin.literals["AFTER"]
    fit = [other.name for other in tasks.values() if other.kind == kind]
    if kind is None:
        if task.after is not None:
            checker.problems.append(
                f"{key}: kind {task.kind} tests no other task's model (found {task.after!r})"
            )
    elif task.after is None and len(fit) == 1:
        return replace(task, after=fit[0])
    elif task.after not in fit and task.after in tasks:
        checker.problems.append(
            f"{key}: {task.after!r} is of kind {tasks[task.after].kind}, expected kind {kind}"
        )
    elif task.after not in fit and task.after not in checker.params.tasks:
        of = f", such as {listed(map(repr, fit), 'or')}" if fit else ", and there is none"
        checker.problems.append(
            f"{key}: expected the name of a task of kind {kind}{of} (found {shown(task.after)})"
        )
    return task
