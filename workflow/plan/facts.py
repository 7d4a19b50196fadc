"""What the report is told of each run: what it learnt from, and where labels had a part."""

from __future__ import annotations

from workflow.params import Experiment


def table(experiment: Experiment) -> dict[str, dict]:
    """{<run>-s<seed>: facts} of every pretraining."""
    return {
        f"{run.name}-s{seed}": {
            "run": run.name,
            "method": run.method,
            "kind": run.kind,
            "data": run.data,
            "model": run.model,
            "seed": seed,
            "target": run.target,
            "teacher": run.teacher,
            "stage": run.stage,
            "tasks": list(run.tasks),
            "labels": run.settings.plugin.literals["LABELS"],
            "trains": run.settings.plugin.literals["TRAINS"],
            "label_targets": _labelled(experiment, run.target, run.teacher),
        }
        for run in experiment.runs.values()
        for seed in run.seeds
    }


def _labelled(experiment: Experiment, target: str | None, teacher: str | None) -> list[str]:
    """The targets and runs, nearest first, that were trained on labels and taught what follows."""
    found = []
    while target or teacher:
        if teacher:
            above = experiment.runs[teacher]
            target, teacher = above.target, above.teacher
        else:
            above = experiment.targets[target]
            target, teacher = above.upstream, None
            if target and target.startswith("run:"):
                target, teacher = None, target.removeprefix("run:")
        if above.settings.plugin.literals["LABELS"]:
            found.append(above.name)
    return found
