"""What will fail since a data set that is made already has no labels, masks or boxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from workflow.messages import listed
from workflow.params import Experiment, Student

SPLITS = ("train", "val", "test")


def lacks(experiment: Experiment, made: dict[str, Path]) -> list[str]:
    """One sentence for each task and method that needs what its data set has not.

    made: name of a data set -> its folder, of those that are up to date.
    """
    known = {name: found for name, folder in made.items() if (found := splits(folder))}
    found = [text for run in experiment.runs.values() for text in _of_run(run, known)]
    return list(dict.fromkeys(found))


def _of_run(run: Student, splits: dict[str, dict]) -> Iterator[str]:
    learns = run.settings.plugin.literals["LABELS"] and run.data in splits
    if learns and not _has(splits[run.data].get("train"), "labels"):
        yield (
            f"{run.key}.method: {run.method} needs labels, expected a data set that has them "
            f"(found {run.data!r}, whose train split has none)"
        )
    for task in run.tasks.values():
        data = task.data or run.data
        for need in sorted(task.settings.plugin.literals["NEEDS"] if data in splits else ()):
            bare = [split for split in SPLITS if not _has(splits[data].get(split), need)]
            if bare:
                has = "none" if len(bare) == len(SPLITS) else f"none in {listed(bare)}"
                yield (
                    f"tasks.{task.name} needs {need}; data set {data!r} has {has}: name another "
                    f"data set in tasks.{task.name}.data, or remove the task (or tasks: "
                    f"{{{task.name}: null}} in a run)"
                )


def splits(folder: Path) -> dict:
    """What data.json in the folder of a data set says of its splits; {} if that is not known."""
    try:
        found = json.loads((folder / "data.json").read_text(encoding="utf-8"))["splits"]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # nothing is known


def _has(split: dict | None, need: str) -> bool:
    if not split:
        return False
    if need == "labels":
        return any(split.get("class_counts") or ())
    return need in split.get("fields", ())
