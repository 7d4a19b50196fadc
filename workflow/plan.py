"""The plan: params.yaml -> jobs with fingerprints. The only declaration of the DAG; Snakefile and dvc.yaml
follow it.

A job's fingerprint is a hash of its stage, its slice of the parameters, the bytes of its code and its inputs'
fingerprints. A stage writes the fingerprint into `manifest.json`, its last act, so a manifest that shows the
plan's fingerprint is a finished, up-to-date job, and nothing else is. Imports no torch.

    python -m workflow.plan                      check params.yaml, write workflow/runs.json (for dvc.yaml),
                                                 list the jobs
    python -m workflow.plan --explain JOB        why this job would run
    python -m workflow.plan --cost               what the jobs will take here, from a few measured steps
    python -m workflow.plan --prune              delete outputs of jobs that are no longer in the plan
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from workflow.params import Experiment, Params, Settings, Target, read
from workflow.plugins import ROOT, ParamsError, nearest

RUNS = "workflow/runs.json"
# What the data stage imports of the kit: editing anything else in it does not decode the images again.
DATA_KIT = ("job", "files", "device", "provenance", "store", "decode", "keyed", "dist")
REPORT_CODE = ("stages/report.py", "stages/reporting")
UNTRACKED = ("stages/kit/track.py", "stages/kit/courier.py")  # they only watch what runs (also in .dvcignore)
STALE = (
    315_619_200 * 10**9
)  # ns: 1980-01-02: older than any input; Snakemake overlooks 1970 itself, zip files need 1980
REPORT_FILES = ("index.html", "summary.md", "summary.csv")


@dataclass(frozen=True)
class Job:
    """One run of one stage. `keys`: the params.yaml keys behind `params`; `code`: files, and folders that end
    in /."""

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
    origins: dict = field(default_factory=dict)  # dotted key of `params` -> dotted key of params.yaml

    @property
    def manifest(self) -> Path:
        return self.output / "manifest.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """What Snakemake knows of the output: the manifest, and the report's pages."""
        return (
            (self.manifest, *(self.output / n for n in REPORT_FILES))
            if self.stage == "report"
            else (self.manifest,)
        )


class Plan:
    """All jobs of one params file, in an order in which they can run."""

    def __init__(
        self, params_file: Path, results: Path, root: Path, experiment: Experiment, source_state: str | None
    ):
        self.params_file, self.results, self.root = params_file, results, root
        self.params: Params = experiment.params
        self.experiment: str = experiment.params.experiment
        self.compute: dict = experiment.params.compute.model_dump()
        self.runs = experiment.runs
        self.jobs: dict[str, Job] = {}
        self._files: dict[str, str] = {}
        for job in _jobs(experiment, results, source_state, params_file):
            hashes = self._hashes(job.code)
            inputs = [self.jobs[i].fingerprint for i in job.inputs]
            print_ = _sha(_json([job.stage, job.params, hashes, inputs]).encode())
            self.jobs[job.id] = _replaced(job, fingerprint=print_, hashes=hashes)

    def job(self, id: str) -> Job:
        """The job called `id`; ParamsError with the nearest name if there is none."""
        if id not in self.jobs:
            raise ParamsError(f"{self.params_file}: no job is called {id!r}{nearest(id, self.jobs)}")
        return self.jobs[id]

    def processes(self, id: str) -> int:
        """How many processes do a job's work: `compute.processes` where it can be shared, else one."""
        return self.compute["processes"] if self.job(id).spreads else 1

    def _hashes(self, code: tuple[str, ...]) -> dict[str, str]:
        return {path: self._hash(path) for entry in code for path in code_files(entry, self.root)}

    def _hash(self, path: str) -> str:
        if path not in self._files:
            try:
                self._files[path] = _sha((self.root / path).read_bytes())
            except OSError as error:
                raise ParamsError(
                    f"{path}: part of the code is missing or unreadable: {error.strerror}"
                ) from None
        return self._files[path]

    # ---- what is on disk

    def manifest(self, id: str) -> dict | None:
        """The manifest that lies in a job's output folder, None if there is none (or it is not one)."""
        return _manifest(self.job(id).manifest)

    def missing(self, id: str) -> str | None:
        """The first file that the manifest lists and that is not there."""
        output = self.job(id).output
        listed = (self.manifest(id) or {}).get("outputs", {})
        return next((str(output / p) for p in listed if not (output / p).is_file()), None)

    def fresh(self, id: str) -> bool:
        """Is the job's output complete and made by exactly this plan?"""
        manifest = self.manifest(id)
        return (
            manifest is not None
            and manifest.get("fingerprint") == self.job(id).fingerprint
            and not self.missing(id)
        )

    @cached_property
    def leftovers(self) -> list[Path]:
        """Output folders with a manifest that belong to no job of the plan."""
        known = {job.output for job in self.jobs.values()}
        found = [
            p.parent
            for s in ("target/*", "pretrain/*", "transfer/*/*")
            for p in self.results.glob(f"{s}/manifest.json")
        ]
        return sorted(p for p in found if p not in known)

    def reconcile(self) -> None:
        """Give manifests times by which Snakemake decides rightly: a fresh one is not older than its inputs,
        a stale one lies in 1980. Contents stay as they are. Doing it twice, or while jobs run, changes
        nothing more."""
        times: dict[str, int] = {}
        for job in self.jobs.values():
            found = {f: t for f in (*job.files, self.benchmark(job)) if (t := _mtime(f)) is not None}
            if not found:
                continue
            if fresh := self.fresh(job.id):
                wanted = max([times.get(i, 0) for i in job.inputs] + [self._oldest(job)])
            else:
                wanted = STALE
            for path, time in found.items():
                if time < wanted if fresh else time != wanted:
                    try:
                        os.utime(path, ns=(wanted, wanted))
                    except OSError as error:  # gone, as its job is running just now, or another user's
                        if path.exists():
                            said = f"{path}: its time cannot be set ({error.strerror})"
                            warnings.warn(f"{said}; Snakemake may run {job.id} again", stacklevel=2)
            times[job.id] = _mtime(job.manifest) or 0

    def benchmark(self, job: Job) -> Path:
        """Where Snakemake notes time and memory of a job; it counts that file's time among the outputs'."""
        return self.results.parent / "logs" / "benchmarks" / f"{job.id}.tsv"

    def _oldest(self, job: Job) -> int:
        """The time of stages/data.py, which the rule of the data stage has as its input so that 1980 counts
        as older."""
        return 0 if job.inputs else _mtime(self.root / f"stages/{job.stage}.py") or 0

    def explain(self, id: str) -> str:
        """In one sentence: is this job up to date, and if not, which parameter, file or input differs?"""
        causes = self.causes(id)
        if not causes:
            return f"{id} is up to date."
        shown = "; ".join(causes[:6]) + (f"; and {len(causes) - 6} more" if len(causes) > 6 else "")
        return f"{id} would run because {shown}."

    def causes(self, id: str) -> list[str]:
        """Everything that makes a job run: none if it is up to date and its inputs are."""
        job, manifest = self.job(id), self.manifest(id)
        if manifest is None:
            return [f"it has not been run (there is no {job.manifest})"]
        if missing := self.missing(id):
            return [f"its output {missing} is missing"]
        found = [
            f"{_origin(job, key)} changed from {_show(old)} to {_show(new)}"
            for key, old, new in _differences(manifest.get("params", {}), _plain(job.params))
        ]
        old_code = manifest.get("code", {})
        for path in sorted({*old_code, *job.hashes}):
            if old_code.get(path) != job.hashes.get(path):
                word = (
                    "was added"
                    if path not in old_code
                    else "was removed"
                    if path not in job.hashes
                    else "was edited"
                )
                found.append(f"{path} {word}")
        for name in sorted({*manifest.get("inputs", {}), *job.inputs}):
            if name not in job.inputs:
                found.append(f"{name} is no longer its input")
            elif name not in manifest.get("inputs", {}):
                found.append(f"{name} is its input now")
            elif inner := self.causes(name):
                found.append(f"its input {name} would run ({inner[0]})")
            elif manifest.get("inputs", {}).get(name) != self.jobs[name].fingerprint:
                found.append(f"its input {name} is a newer one")
        if not found and manifest.get("fingerprint") != job.fingerprint:
            found.append(f"its manifest {job.manifest} was not written by this plan")
        return found


def load(params_file: str | Path = "params.yaml", results: str | Path = "results", root: Path = ROOT) -> Plan:
    """Read and check a params file and lay out its jobs. ParamsError lists everything that is wrong with
    it."""
    experiment, results = read(params_file, root), Path(results)
    return Plan(
        Path(params_file),
        results,
        Path(root),
        experiment,
        _source_state(experiment, results, Path(params_file)),
    )


# --------------------------------------------------------------------------------------------- params to jobs


def _jobs(
    experiment: Experiment, results: Path, source_state: str | None, params_file: Path
) -> Iterator[Job]:
    """Every job without its fingerprint, inputs first. Targets that no run needs are left out."""
    p = experiment.params
    base = {"image_size": p.data.image_size, "model": p.model.model_dump()}
    shared = ("data.image_size", "model", "train")

    def job(stage: str, name: str = "", **rest) -> Job:
        id = f"{stage}/{name}" if name else stage
        return Job(stage, name or stage, id, results / id, **rest)

    def code(stage: str, folder: str, name: str, *more: str) -> tuple[str, ...]:
        return (f"stages/{stage}.py", f"stages/{folder}/__init__.py", f"stages/{folder}/{name}.py", *more)

    name, argument, settings = experiment.source
    source = {"name": name, "argument": argument, "config": settings.config}
    yield job(
        "data",
        inputs=(),
        params={"data": p.data.model_dump(), "source": source, "source_state": source_state},
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
        if (files := _weights_state(target, results, params_file)) is not None:
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
        key, literals, settings = f"methods.{run.method}", run.settings.plugin.literals, run.settings
        about = {"name": run.method, "config": settings.config}
        about |= {"labels": literals["LABELS"], "trains": literals["TRAINS"]}
        taught = {"stage": run.stage} if run.teacher else {}
        above = f"pretrain/{run.teacher}-s{seed}" if run.teacher else run.target and f"target/{run.target}"
        yield job(
            "pretrain",
            f"{run.name}-s{seed}",
            inputs=("data", above) if above else ("data",),
            params={**base, "train": settings.train, "method": about, "seed": seed, "run": run.name, **taught},
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
    everything = ["data", *(f"target/{t}" for t in _needed(experiment)), *(f"pretrain/{r}" for r in table)]
    everything += [f"transfer/{r}/{t}" for r in table for t in p.tasks]
    yield job(
        "report",
        inputs=tuple(everything),
        params={
            "experiment": p.experiment,
            "runs": table,
            "tasks": list(p.tasks),
            "contrasts": {name: contrast.sides(experiment.runs) for name, contrast in p.grid.contrasts.items()},
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
    """Where labels had a part in a run: in its own training, or in that of a run or target above it."""
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
    """Where in params.yaml a stage's parameters come from; what is not listed keeps its own dotted key."""
    own = {f"{part}.config": key, "image_size": "data.image_size"}
    for name, where in settings.origin.items():
        own[f"{part}.config.{name}" if name in settings.plugin.fields else f"train.{name}"] = where
    return own


def code_files(entry: str, root: Path = ROOT) -> list[str]:
    """The files behind an entry of Job.code: itself, or every file (of stages/kit: every module) of a
    folder."""
    folder = root / entry
    if not folder.is_dir():
        return [entry] if folder.exists() or not entry.endswith("__init__.py") else []
    pattern = "*.py" if entry.rstrip("/") == "stages/kit" else "*"
    found = (p for p in folder.rglob(pattern) if p.is_file() and "__pycache__" not in p.parts)
    paths = sorted(p.relative_to(root).as_posix() for p in found)
    return [p for p in paths if p not in UNTRACKED]


def _source_state(experiment: Experiment, results: Path, params_file: Path) -> str | None:
    """Digest of the names and sizes of the files that a folder: or parquet: source reads; None for other
    sources.

    When the files are gone but results/data was made from them (a clone with pulled results), the recorded
    digest."""
    name, argument, _ = experiment.source
    if name not in ("folder", "parquet"):
        return None
    path = Path(argument).expanduser()
    if path.is_file():
        return _sha(f"{path.name} {path.stat().st_size}".encode())
    if path.is_dir():
        return _sha("\n".join(sorted(f"{p} {s}" for p, s in _walk(str(path), ""))).encode())
    recorded = _manifest(results / "data" / "manifest.json") or {}
    if recorded.get("params", {}).get("data", {}).get("source") == experiment.params.data.source:
        warnings.warn(
            f"data.source: {path} is not there; {results / 'data'}, made from it before, stays in use",
            stacklevel=2,
        )
        return recorded["params"]["source_state"]
    near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ParamsError(
        f"{params_file}:\n  data.source: {path} does not exist{nearest(path.name, near) if near else ''}"
    )


def _weights_state(target: Target, results: Path, params_file: Path) -> str | None:
    """Digest of the bytes behind a setting `local:PATH` of a target; None if it has none.

    When they are gone but the target was made from them, the recorded digest, as for a source."""
    key, path = next(
        ((k, v[6:]) for k, v in target.settings.config.items() if isinstance(v, str) and v.startswith("local:")),
        (None, None),
    )
    if key is None:
        return None
    path = Path(path).expanduser()
    if path.exists():
        files = [(path.name, path)] if path.is_file() else [(n, path / n) for n, _ in sorted(_walk(str(path), ""))]
        return _sha(_json([[name, _digest(file)] for name, file in files]).encode())
    made = (_manifest(results / "target" / target.name / "manifest.json") or {}).get("params", {}).get("target", {})
    if made.get("config", {}).get(key) == target.settings.config[key] and made.get("files"):
        warnings.warn(
            f"targets.{target.name}.{key}: {path} is not there; the target made from it before stays in use",
            stacklevel=2,
        )
        return made["files"]
    raise ParamsError(f"{params_file}:\n  targets.{target.name}.{key}: {path} does not exist")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size


# -------------------------------------------------------------------------------------------------- runs.json


def runs(plan: Plan) -> dict:
    """What dvc.yaml loops over, under one key of its own (DVC merges this file with params.yaml)."""
    p, data = plan.params, plan.jobs["data"].params
    watch = {"source": {"path": data["source"]["argument"]}} if data["source_state"] else {}
    alone, above, without, using = {}, {}, {}, {}
    for job in plan.jobs.values():
        if job.stage == "target":
            about, upstream = job.params["target"], p.targets[job.name].get("upstream")
            item = {"kind": about["kind"], "files": about.get("files")}
            (above if upstream else alone)[job.name] = item | ({"upstream": upstream} if upstream else {})
            watch |= {f"target-{job.name}": {"path": job.name}} if item["files"] else {}
        elif job.stage == "pretrain":
            item = {"run": job.params["run"], "method": job.params["method"]["name"]}
            (using if job.inputs[1:] else without)[job.name] = item | dict(zip(["teacher"], job.inputs[1:]))
    content = {
        "data": {"data": {"source": data["source"]["name"]}},
        "source_state": data["source_state"],
        "watch": watch,
        "targets": alone,
        "targets_upstream": above,
        "runs": {
            n: {"method": r.method, "target": r.target, "teacher": r.teacher, "set": r.set}
            for n, r in plan.runs.items()
        },
        "pretrain": without,
        "pretrain_taught": using,
        "jobs": [*without, *using],
        "tasks": list(p.tasks),
    }
    return {"plan": content}


def runs_text(plan: Plan) -> str:
    """JSON, as DVC reads it hundreds of times in a `dvc status`, with a reader for YAML that is slow."""
    return json.dumps(runs(plan), indent=1) + "\n"


def write_runs(plan: Plan) -> bool:
    """Write workflow/runs.json if it differs; True if it did. Whole or not at all."""
    path, text = plan.root / RUNS, runs_text(plan)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".runs-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return True


# ---------------------------------------------------------------------------------------------------- helpers


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _plain(value):
    """As it comes back from JSON: tuples as lists, all keys strings."""
    return json.loads(json.dumps(value))


def _replaced(job: Job, **changes) -> Job:
    return Job(**{**job.__dict__, **changes})


def _manifest(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


_ABSENT = object()


def _differences(old, new, key: str = "") -> Iterator[tuple[str, object, object]]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            inner = f"{key}.{name}" if key else name
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), inner)
    elif old != new:
        yield key, old, new


def _show(value) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)


def _origin(job: Job, key: str) -> str:
    """The params.yaml key behind a dotted key of job.params."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in job.origins:
            return ".".join([job.origins[head], *parts[n:]])
    return "data.image_size" if key == "image_size" else key


def prune(plan: Plan) -> list[Path]:
    """Delete the outputs of jobs that are no longer in the plan; the list of what was deleted."""
    for folder in plan.leftovers:
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)
    return plan.leftovers


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.plan", description="The jobs of a params file and their state."
    )
    parser.add_argument("--params", default="params.yaml", help="params file (default: params.yaml)")
    parser.add_argument("--results", default="results", help="folder of the results (default: results)")
    parser.add_argument("--explain", metavar="JOB", help="say why a job would run, e.g. pretrain/mae-s0")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail when {RUNS} does not follow from params.yaml (and write it)",
    )
    parser.add_argument(
        "--prune", action="store_true", help="delete outputs of jobs that are no longer in the plan"
    )
    parser.add_argument(
        "--cost", action="store_true", help="measure a few steps of each kind of job and tell what all will take"
    )
    args = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        plan = load(args.params, args.results)
        if args.explain:
            print(plan.explain(args.explain.removeprefix(f"{args.results}/").removesuffix("/manifest.json")))
            return 0
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    if args.cost:
        from workflow import cost

        print(cost.table(plan, cost.estimate(plan)))
        return 0
    if args.prune:
        for folder in prune(plan):
            print(f"deleted {folder}")
        return 0
    default = (args.params, args.results) == ("params.yaml", "results")
    changed = default and write_runs(plan)
    if args.check:
        if changed:
            print(
                f"{RUNS} did not follow from {args.params}; it does now. Please run `dvc repro` again.",
                file=sys.stderr,
            )
        return int(changed)
    width = max(map(len, plan.jobs))
    for id, job in plan.jobs.items():
        state = "fresh" if plan.fresh(id) else "stale" if plan.manifest(id) else "to run"
        print(f"{id:<{width}}  {state:<6}  {job.fingerprint[:12]}")
    for folder in plan.leftovers:
        print(f"{folder} belongs to no job of {args.params} (delete such folders with --prune)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
