"""Every job that params.yaml asks for: its parameters, inputs and code. All of the DAG is here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from workflow.closure import closure
from workflow.params import DataSet, Encoder, Experiment, Settings, Student, Target, Task
from workflow.plan import digest
from workflow.plan.facts import table
from workflow.plan.job import Job
from workflow.plan.user_files import Place, changed_files, source_state, weights_state
from workflow.plugins import ParamsError

TEMPLATES = "stages/reporting/templates"


def jobs(
    experiment: Experiment, results: Path, params_file: Path, root: Path, files: digest.Files
) -> list[Job]:
    """Every job without its fingerprint, inputs first; the report is last.

    Data sets and targets that no run needs are left out.
    """
    lab = _Lab(experiment, Place(results, params_file), root, files)
    makers = lab.makers()
    wanted = [id for id in makers if id.startswith(("pretrain/", "transfer/"))]
    needed = _inputs_first(wanted, makers)
    # the same jobs again, stage by stage as far as inputs allow
    found = _inputs_first([id for id in makers if id in needed], makers)
    return [*found.values(), lab.report(list(found.values()))]


def _inputs_first(wanted: list[str], makers: dict[str, Callable[[], Job]]) -> dict[str, Job]:
    """The wanted jobs and all that they need, each after its inputs; params has no circles."""
    found: dict[str, Job] = {}

    def add(id: str) -> None:
        if id not in found:
            job = makers[id]()
            for name in job.inputs.values():
                add(name)
            found[id] = job

    for id in wanted:
        add(id)
    return found


class _Lab:
    """Makes the jobs of one experiment."""

    def __init__(self, experiment: Experiment, place: Place, root: Path, files: digest.Files):
        self.experiment, self.place, self.root, self.files = experiment, place, root, files
        self.closure = cache(lambda *entries: closure(entries, root))

    def makers(self) -> dict[str, Callable[[], Job]]:
        """{id: what makes the job} of all that may be asked for, stage by stage."""
        e = self.experiment
        pairs = [(run, seed) for run in e.runs.values() for seed in run.seeds]
        found: dict[str, Callable[[], Job]] = {}
        for data in e.data.values():
            found[f"data/{data.name}"] = cache(partial(self.data, data))
        for target in e.targets.values():
            found[f"target/{target.name}"] = cache(partial(self.target, target))
        for run, seed in pairs:
            found[f"pretrain/{run.name}-s{seed}"] = cache(partial(self.pretrain, run, seed))
        for run, seed in pairs:
            for task in run.tasks.values():
                id = f"transfer/{run.name}-s{seed}/{task.name}"
                found[id] = cache(partial(self.transfer, run, seed, task))
        return found

    def job(self, stage: str, name: str, code: tuple[str, ...], **rest) -> Job:
        """`code`: the stage's plug-in files, to which the stage's own file is added."""
        id = f"{stage}/{name}" if name else stage
        files = self.closure(f"stages/{stage}.py", *code)
        return Job(stage, name or stage, id, self.place.results / id, code=files, **rest)

    def data(self, data: DataSet) -> Job:
        """Reads the source as it is now, or stays as it was made if the data set is frozen."""
        made = self.place.made(f"data/{data.name}")
        frozen = made.params.get("source_state") if made and data.frozen else None
        if frozen:
            job = self._data(data, frozen)
            hashes = self.files.hashes(job.code)
            if digest.of_job("data", job.params, job.places, hashes, {}) == made.fingerprint:
                return job
        job = self._data(data, source_state(data, _source(data), self.place))
        state = job.params["source_state"]
        if frozen and state != frozen:
            differ = [name for name in state if state[name] != frozen.get(name)]
            files = changed_files(self.place, frozen.get(differ[0], ""), state[differ[0]])
            what = job.origins[f"source_state.{differ[0]}"]
            raise ParamsError(
                f"{self.place.params_file}:\n  {data.key}.frozen: found true, but {job.id} has to "
                f"be made again and {what} has changed{files}, expected false, to read it as it is "
                "now"
            )
        return job

    def _data(self, data: DataSet, state: dict[str, str] | None) -> Job:
        plugin, config, source = data.settings.plugin, data.settings.config, _source(data)
        what = {file: f"what {data.key}.options.{file} names" for file in state or ()}
        what |= {"argument": f"what {data.entry['source']} holds"}
        places = {"data.source": "source_state.argument"} if state and "argument" in state else {}
        places |= {"source.argument": "source_state.argument"} if places else {}
        places |= {f"source.config.{n}": f"source_state.{n}" for n in state or () if n in config}
        return self.job(
            "data",
            data.name,
            (plugin.path,),
            inputs={},
            params={"data": data.entry, "source": source, "source_state": state},
            origins={
                "data": data.key,
                "source.name": f"{data.key}.source",
                "source.argument": f"{data.key}.source",
                "source.config": f"{data.key}.options",
                "source_state": what["argument"],
                **{f"source_state.{file}": text for file, text in what.items()},
            },
            user_files=state is not None,
            places=places,
        )

    def target(self, target: Target) -> Job:
        data, model = self.experiment.data[target.data], self.experiment.models[target.model]
        settings, key = target.settings, target.key
        inputs = {"data": f"data/{data.name}"}
        if target.upstream and target.upstream.startswith("run:"):
            inputs["upstream"] = f"pretrain/{target.upstream[4:]}-s{target.seed}"
        elif target.upstream:
            inputs["upstream"] = f"target/{target.upstream}"
        facts = {"name": target.name, "kind": target.kind, "config": settings.config}
        if files := weights_state(settings, key, target.name, self.place):
            facts["files"] = files
        base = _base(data, model) | {"train": settings.train}
        return self.job(
            "target",
            target.name,
            (settings.plugin.path, model.settings.plugin.path),
            inputs=inputs,
            params=base | {"target": facts, "seed": target.seed},
            origins=_origins("target", settings, key, data, model)
            | {"seed": f"{key}.seed"}
            | {f"target.files.{file}": f"what {key}.{file} names" for file in files or ()},
            spreads=True,
            user_files=bool(files),
            places={f"target.config.{name}": f"target.files.{name}" for name in files or ()},
        )

    def pretrain(self, run: Student, seed: int) -> Job:
        data, model = self.experiment.data[run.data], self.experiment.models[run.model]
        settings, key = run.settings, f"methods.{run.method}"
        inputs = {"data": f"data/{data.name}"}
        if run.teacher:
            inputs["target"] = f"pretrain/{run.teacher}-s{seed}"
        elif run.target:
            inputs["target"] = f"target/{run.target}"
        facts = {"name": run.method, "kind": run.kind, "config": settings.config}
        facts |= {"labels": settings.plugin.literals["LABELS"]}
        facts |= {"trains": settings.plugin.literals["TRAINS"]}
        params = _base(data, model) | {"train": settings.train, "method": facts}
        params |= {"seed": seed, "run": run.name}
        return self.job(
            "pretrain",
            f"{run.name}-s{seed}",
            (settings.plugin.path, model.settings.plugin.path),
            inputs=inputs,
            params=params | ({"stage": run.stage} if run.teacher else {}),
            origins=_origins("method", settings, key, data, model)
            | {"method.name": f"{run.key}.method", "stage": f"{run.key}.target"},
            spreads=facts["trains"],
        )

    def transfer(self, run: Student, seed: int, task: Task) -> Job:
        params, settings = self.experiment.params, task.settings
        data = self.experiment.data[task.data or run.data]
        model = self.experiment.models[run.model]
        inputs = {"data": f"data/{data.name}", "encoder": f"pretrain/{run.name}-s{seed}"}
        if task.after:
            inputs["after"] = f"transfer/{run.name}-s{seed}/{task.after}"
        facts = {"name": task.name, "kind": task.kind, "config": settings.config}
        base = _base(data, model) | {"train": params.train.model_dump(), "task": facts}
        return self.job(
            "transfer",
            f"{run.name}-s{seed}/{task.name}",
            (settings.plugin.path, model.settings.plugin.path),
            inputs=inputs,
            params=base | {"seed": seed, "run": run.name, "method": run.method},
            origins=_origins("task", settings, task.key, data, model),
            spreads=settings.plugin.literals["SPREADS"],
        )

    def report(self, inputs: list[Job]) -> Job:
        params, runs = self.experiment.params, self.experiment.runs
        contrasts = params.grid.contrasts.items()
        folder = self.root / TEMPLATES
        templates = [p.relative_to(self.root).as_posix() for p in folder.rglob("*") if p.is_file()]
        return self.job(
            "report",
            "",
            tuple(sorted(templates)),
            inputs={job.id: job.id for job in inputs},
            params={
                "experiment": params.experiment,
                "runs": table(self.experiment),
                "tasks": {task.name: _headline(task) for task in self.experiment.tasks.values()},
                "contrasts": {name: contrast.sides(runs) for name, contrast in contrasts},
            },
            origins={"runs": "grid.runs", "contrasts": "grid.contrasts"},
        )


def _source(data: DataSet) -> dict:
    config = data.settings.config
    return {"name": data.source, "argument": data.argument, "config": config}


def _headline(task: Task) -> dict[str, str]:
    key, label, unit = task.settings.plugin.literals["HEADLINE"]
    return {"kind": task.kind, "key": key, "label": label, "unit": unit}


def _base(data: DataSet, model: Encoder) -> dict:
    """The parameters of every job that has an encoder."""
    return {
        "image_size": data.entry["image_size"],
        "model": {"kind": model.kind, "config": model.settings.config},
    }


def _origins(
    part: str, settings: Settings, key: str, data: DataSet, model: Encoder
) -> dict[str, str]:
    """Where in params.yaml the parameters of a job come from; `part`: those of its plug-in."""
    found = {
        "image_size": f"{data.key}.image_size",
        "model.config": model.key,
        "model": model.key,
        f"{part}.config": key,
        f"{part}.kind": f"{key}.kind",
    }
    for name, where in settings.origin.items():
        own = name in settings.plugin.fields
        found[f"{part}.config.{name}" if own else f"train.{name}"] = where
    return found
