"""params.yaml: its sections, its plug-ins' settings, and errors that a person can act on.

`read(path)` checks everything that can be known before a job runs and lists all problems at once.
A plug-in is named by its file (workflow/plugins.py); its settings are the fields of its dataclass
Config, read from the source text, so nothing here needs torch.

    python -m workflow.params [FILE]      check a params file
    python -m workflow.params --schema    print the JSON Schema that editors use for completion
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from workflow.messages import ParamsError
from workflow.params.consistency import contradictions
from workflow.params.entries import (
    DataSet,
    Encoder,
    data_entries,
    data_sets,
    encoders,
    model_entries,
)
from workflow.params.messages import listing, sentences
from workflow.params.methods import check_methods
from workflow.params.pairs import Pairs
from workflow.params.reading import read_yaml
from workflow.params.runs import Student, check_runs
from workflow.params.sections import Params, keys_at
from workflow.params.settings import Checker, Settings, as_json
from workflow.params.targets import Target, check_targets
from workflow.params.tasks import Task, check_tasks
from workflow.plugins import ROOT

__all__ = ["DataSet", "Encoder", "Experiment", "Params", "ParamsError", "Settings", "Student"]
__all__ += ["Target", "Task", "check", "read"]


@dataclass(frozen=True)
class Experiment:
    """Everything that params.yaml says, checked and complete; all dicts are by name.

    Teachers come before their students in `runs`. A run's own tasks are in `runs[name].tasks`;
    `tasks` has them as the section `tasks` says.
    """

    params: Params
    data: dict[str, DataSet]
    models: dict[str, Encoder]
    targets: dict[str, Target]
    runs: dict[str, Student]
    tasks: dict[str, Task]


def read(path: str | Path = "params.yaml", root: Path = ROOT) -> Experiment:
    """Read and check a params file; ParamsError names every problem found."""
    return check(read_yaml(path), str(path), root)


def check(content: dict, path: str = "params.yaml", root: Path = ROOT) -> Experiment:
    """Check the content of a params file (see `read`)."""
    problems: list[str] = []
    try:
        params = Params.model_validate_json(as_json(content))
    except ValidationError as error:
        problems += sentences(error, str, keys_at)
    entries = data_entries(content.get("data"), problems)
    sections = model_entries(content, problems)
    if problems:
        raise ParamsError(listing(path, problems))
    problems += contradictions(params, entries)
    checker = Checker(params, root, problems)
    data, models = data_sets(checker, entries), encoders(checker, sections)
    pairs = Pairs(checker, list(entries), list(sections), data, models)
    methods = check_methods(checker)
    targets = check_targets(checker, pairs)
    tasks = check_tasks(checker, pairs)
    runs = check_runs(checker, pairs, methods, targets, tasks)
    if problems:
        raise ParamsError(listing(path, list(dict.fromkeys(problems))))
    return Experiment(params, data, models, targets, runs, tasks)
