"""params.yaml: its sections, its plug-ins' settings, and errors that a person can act on.

`read(path)` checks everything that can be known before a job runs and lists all problems at once. A
plug-in (`stages/{methods,targets,tasks,sources}/<name>.py`) is named by its file; its settings are
the fields of its dataclass `Config`, read from the source text without importing it, so nothing
here needs torch.

    python -m workflow.params [FILE]      check a params file
    python -m workflow.params --schema    print the JSON Schema that editors use for completion
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from workflow.params import encoder
from workflow.params.messages import listing, sentences
from workflow.params.reading import read_yaml
from workflow.params.runs import Student, check_runs
from workflow.params.sections import Params, keys_at
from workflow.params.settings import Checker, Settings, as_json
from workflow.params.source import check_source
from workflow.params.targets import Target, check_targets
from workflow.params.together import contradictions
from workflow.plugins import ROOT, ParamsError


@dataclass(frozen=True)
class Experiment:
    """Everything that params.yaml says, checked and complete. Teachers come before their students
    in `runs`.
    """

    params: Params
    source: tuple[str, str | None, Settings]  # name, argument, settings
    targets: dict[str, Target]
    runs: dict[str, Student]
    tasks: dict[str, Settings]


def read(path: str | Path = "params.yaml", root: Path = ROOT) -> Experiment:
    """Read and check a params file; ParamsError names every problem found."""
    return check(read_yaml(path), str(path), root)


def check(content: dict, path: str = "params.yaml", root: Path = ROOT) -> Experiment:
    """Check the content of a params file (see `read`)."""
    try:
        params = Params.model_validate_json(as_json(content))
    except ValidationError as error:
        raise ParamsError(listing(path, sentences(error, str, keys_at))) from None
    flaws = encoder.flaws(params.model, params.data.image_size)
    problems = [*flaws, *contradictions(params), *encoder.unknown(params.model.name)]
    checker = Checker(params, root, problems, sound=not flaws)
    source = check_source(checker)
    targets = check_targets(checker)
    for name, section in params.methods.items():  # also those that no run uses
        checker.settings("method", name, (f"methods.{name}", section), suits=False)
    runs = check_runs(checker, targets)
    tasks = {
        n: checker.settings("task", n, (f"tasks.{n}", section))
        for n, section in params.tasks.items()
    }
    if problems:
        raise ParamsError(listing(path, list(dict.fromkeys(problems))))
    return Experiment(params, source, targets, runs, tasks)
