"""Every job that params.yaml asks for: its parameters, its inputs, its code. The only declaration
of the DAG.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from workflow.params import Experiment, Settings
from workflow.plan.user_files import source_state, weights_state

# What the data stage imports of the kit: editing anything else in it does not decode the images
# again.
DATA_KIT = (
    "job/job",
    "job/files",
    "job/device",
    "job/provenance",
    "data/store",
    "data/decode",
    "keyed",
    "dist",
)
REPORT_CODE = ("stages/report.py", "stages/reporting")
REPORT_FILES = ("index.html", "summary.md", "summary.csv")


@dataclass(frozen=True)
class Job:
    """One run of one stage. `keys`: the params.yaml keys behind `params`; `code`: files, and
    folders that end in /.
    """

    stage: str
    name: str
    id: str
    output: Path
    inputs: tuple[str, ...]
    params: dict
    keys: tuple[str, ...]
    code: tuple[str, ...]
    spreads: bool = False  # trains, so that several processes can share its work
    fingerprint: str = ""
    hashes: dict = field(default_factory=dict)  # path of each code file -> sha256
    origins: dict = field(
        default_factory=dict
    )  # dotted key of `params` -> dotted key of params.yaml

    @property
    def manifest(self) -> Path:
        return self.output / "manifest.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """What Snakemake knows of the output: the manifest, and the report's pages."""
        pages = REPORT_FILES if self.stage == "report" else ()
        return (self.manifest, *(self.output / name for name in pages))


def jobs(experiment: Experiment, results: Path, params_file: Path) -> Iterator[Job]:
    """Every job without its fingerprint, inputs first. Targets that no run needs are left out."""
    p = experiment.params
    base = {"image_size": p.data.image_size, "model": p.model.model_dump()}
    shared = ("data.image_size", "model", "train")

    def job(stage: str, name: str = "", **rest) -> Job:
        id = f"{stage}/{name}" if name else stage
        return Job(stage, name or stage, id, results / id, **rest)

    def code(stage: str, folder: str, name: str, *more: str) -> tuple[str, ...]:
        return (
            f"stages/{stage}.py",
            f"stages/{folder}/__init__.py",
            f"stages/{folder}/{name}.py",
            *more,
        )

    name, argument, settings = experiment.source
    source = {"name": name, "argument": argument, "config": settings.config}
    held = source_state(experiment, results, params_file)
    yield job(
        "data",
        inputs=(),
        params={"data": p.data.model_dump(), "source": source, "source_state": held},
        keys=("data",),
        code=code("data", "sources", name, *(f"stages/kit/{n}.py" for n in DATA_KIT)),
        origins={
            "source.name": "data.source",
            "source.argument": "data.source",
            "source.config": "data.options",
            "source_state": f"what {p.data.source} holds",
        },
    )
    for target in (experiment.targets[t] for t in _needed(experiment)):
        key, settings = f"targets.{target.name}", target.settings
        about = {"name": target.name, "kind": target.kind, "config": settings.config}
        if (files := weights_state(target, results, params_file)) is not None:
            about["files"] = files
        yield job(
            "target",
            target.name,
            inputs=("data", f"target/{target.upstream}") if target.upstream else ("data",),
            params={**base, "train": settings.train, "target": about, "seed": target.seed},
            keys=(*shared, key),
            spreads=True,
            # how batches are made is shared with stages/pretrain.py
            code=code("target", "targets", target.kind, "stages/pretrain.py", "stages/kit/"),
            origins=_origins(settings, "target", key)
            | {"seed": f"{key}.seed", "target.files": f"what {key}.weights names"},
        )
    pairs = [(run, seed) for run in experiment.runs.values() for seed in run.seeds]
    for run, seed in pairs:
        key, literals, settings = (
            f"methods.{run.method}",
            run.settings.plugin.literals,
            run.settings,
        )
        about = {"name": run.method, "config": settings.config}
        about |= {"labels": literals["LABELS"], "trains": literals["TRAINS"]}
        taught = {"stage": run.stage} if run.teacher else {}
        above = (
            f"pretrain/{run.teacher}-s{seed}"
            if run.teacher
            else run.target and f"target/{run.target}"
        )
        yield job(
            "pretrain",
            f"{run.name}-s{seed}",
            inputs=("data", above) if above else ("data",),
            params={
                **base,
                "train": settings.train,
                "method": about,
                "seed": seed,
                "run": run.name,
                **taught,
            },
            keys=(*shared, key, run.key),
            spreads=literals["TRAINS"],
            code=code("pretrain", "methods", run.method, "stages/kit/"),
            origins=_origins(settings, "method", key)
            | {"method.name": f"{run.key}.method", "stage": f"{run.key}.target"},
        )
    for run, seed in pairs:
        name, known = run.name, {"seed": seed, "run": run.name, "method": run.method}
        for task, settings in experiment.tasks.items():
            about = {"name": task, "config": settings.config}
            yield job(
                "transfer",
                f"{name}-s{seed}/{task}",
                inputs=("data", f"pretrain/{name}-s{seed}"),
                params={**base, "train": p.train.model_dump(), "task": about, **known},
                keys=(*shared, f"tasks.{task}"),
                spreads=settings.plugin.literals["SPREADS"],
                code=code("transfer", "tasks", task, "stages/kit/"),
                origins=_origins(settings, "task", f"tasks.{task}"),
            )
    table = {
        f"{run.name}-s{seed}": {
            "run": run.name,
            "method": run.method,
            "seed": seed,
            "target": run.target,
            "teacher": run.teacher,
            "stage": run.stage,
            **_labels(experiment, run.name),
        }
        for run, seed in pairs
    }
    everything = [
        "data",
        *(f"target/{t}" for t in _needed(experiment)),
        *(f"pretrain/{r}" for r in table),
    ]
    everything += [f"transfer/{r}/{t}" for r in table for t in p.tasks]
    yield job(
        "report",
        inputs=tuple(everything),
        params={
            "experiment": p.experiment,
            "runs": table,
            "tasks": list(p.tasks),
            "contrasts": {
                name: contrast.sides(experiment.runs) for name, contrast in p.grid.contrasts.items()
            },
        },
        keys=("experiment", "grid", "tasks"),
        code=REPORT_CODE,
        origins={"runs": "grid.runs"},
    )


def _needed(experiment: Experiment) -> list[str]:
    """Targets that some run needs, upstream ones first."""
    order: list[str] = []

    def add(name: str | None) -> None:
        if name is not None and name not in order:
            add(experiment.targets[name].upstream)
            order.append(name)

    for run in experiment.runs.values():
        add(run.target)
    return order


def _labels(experiment: Experiment, name: str) -> dict:
    """Where labels had a part in a run: in its own training, or in that of a run or target above
    it.
    """
    run = experiment.runs[name]
    own, found = run.settings.plugin.literals, []
    while run.teacher is not None:
        run = experiment.runs[run.teacher]
        found += [run.name] if run.settings.plugin.literals["LABELS"] else []
    at = run.target
    while at is not None:
        target = experiment.targets[at]
        found += [at] if target.settings.plugin.literals["LABELS"] else []
        at = target.upstream
    return {"labels": own["LABELS"], "trains": own["TRAINS"], "label_targets": found}


def _origins(settings: Settings, part: str, key: str) -> dict[str, str]:
    """Where in params.yaml a stage's parameters come from; what is not listed keeps its own dotted
    key.
    """
    own = {f"{part}.config": key, "image_size": "data.image_size"}
    for name, where in settings.origin.items():
        own[f"{part}.config.{name}" if name in settings.plugin.fields else f"train.{name}"] = where
    return own
