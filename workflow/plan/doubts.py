"""What can run, but will hardly succeed: trainings that are too short for what they learn.

A Config may have `doubt(steps, batch_size)`, which says so (such as checks.SelfDistillation's). The
number of steps is known when the data set is made: of one that is, the plan speaks before anything
runs, of one that is not the stage `data` does, when it has made it.
"""

from __future__ import annotations

from collections.abc import Iterator

from workflow.params import Experiment, Student, Target


def doubts(experiment: Experiment, images: dict[str, int], waiting: set[str]) -> list[str]:
    """One sentence for each training that will hardly succeed.

    images: name of a data set -> its training images; waiting: the jobs that are still to run.
    """
    entries: dict[str, Target | Student] = {
        f"target/{target.name}": target for target in experiment.targets.values()
    }
    entries |= {
        f"pretrain/{run.name}-s{seed}": run
        for run in experiment.runs.values()
        for seed in run.seeds
    }
    found = [
        f"{entry.key}: {text}"
        for id, entry in entries.items()
        if id in waiting and entry.data in images
        for text in _of_training(entry, images[entry.data])
    ]
    return list(dict.fromkeys(found))  # seeds and stages of a run say the same


def _of_training(entry: Target | Student, images: int) -> Iterator[str]:
    train, values = entry.settings.train, entry.settings.values
    steps = train["epochs"] * (images // train["batch_size"])  # a batch that is not full is left
    if steps and hasattr(values, "doubt") and (text := values.doubt(steps, train["batch_size"])):
        yield text
