"""params.yaml: its sections, its plug-ins' settings, and errors that a person can act on.

`read(path)` checks everything that can be known before a job runs and lists all problems at once. A plug-in
(`stages/{methods,targets,tasks,sources}/<name>.py`) is named by its file; its settings are the fields of its
dataclass `Config`, read from the source text without importing it, so nothing here needs torch. `python -m
workflow.params --schema` prints the JSON Schema that editors use for completion.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from workflow.plugins import NAME, ROOT, ParamsError, Plugin, nearest, plugin, plugin_names

SEEDED = re.compile(r".*-s\d+\Z")  # job names are <run>-s<seed>, so a run may not end like one


# --------------------------------------------------------------------------------------------------- sections


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(Section):
    source: str = Field(description="shapes | folder:PATH | parquet:PATH | hub:NAME")
    image_size: int = Field(ge=4, le=4096, description="side of the square that encoders see, in pixels")
    store_size: int | None = Field(
        None, ge=4, le=8192, description="side of the stored images (null: image_size)"
    )
    val_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of train used to select, if the source has no val"
    )
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="share of all used to test, if the source has no test"
    )
    max_train: int | None = Field(None, ge=1, description="use at most this many training images")
    seed: int = Field(0, ge=0)
    normalise: Literal["dataset", "imagenet"] = Field(
        "dataset", description="mean and std: the set's or ImageNet's"
    )
    quarantine_limit: float = Field(
        0.05, ge=0, le=1, description="stop when a larger share of the files is broken"
    )
    memory_map_gb: float = Field(
        8, ge=0, description="decode once into a memory map when it is no larger than this"
    )
    image_column: str | None = None
    label_column: str | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="the source's own settings")


class Model(Section):
    name: str = Field(
        "vit_tiny_patch16_224",
        description="a timm model: a ViT, a Swin or SwinV2, or a convvit_* (stages/kit/hybrid.py)",
    )
    patch_size: int = Field(16, ge=1, description="side in pixels; of a Swin, in its first stage")
    embed_dim: int = Field(192, ge=1, description="width; of a Swin, in its first stage")
    depth: int | list[int] = Field(12, description="number of blocks; of a Swin, a list: of each stage")
    num_heads: int | list[int] = Field(3, description="of a Swin, a list: in each stage")
    window_size: int | None = Field(None, ge=1, description="side of a Swin's windows, in tokens")
    mlp_ratio: float = Field(4.0, gt=0)
    args: dict[str, Any] = Field(default_factory=dict, description="more arguments for timm.create_model")


class Train(Section):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="images per step over all devices")
    micro_batch: int | None = Field(
        None, ge=1, description="images per pass and device; accumulation follows"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    save_minutes: float = Field(5, gt=0, description="minutes between checkpoints")
    nan_skips: int = Field(0, ge=0, description="batches that may be left out because they give NaN; 0: stop at once")


class Run(Section):
    method: str
    target: str | None = Field(
        None, description="a name under targets, or run:NAME: the encoder of that run with the same seed"
    )
    stages: int | None = Field(
        None, ge=1, le=99, description="a chain: runs NAME-1, NAME-2, ..., each the teacher of the next"
    )
    seeds: list[int] | None = Field(None, min_length=1, description="instead of grid.seeds")
    set: dict[str, Any] = Field(
        default_factory=dict, description="settings of the method (or of train) for this run only"
    )


class Contrast(Section):
    of: list[str] = Field(min_length=1, description="runs, or patterns of their names such as hog-*")
    against: list[str] = Field(min_length=1, description="the runs whose mean score is subtracted")

    def sides(self, runs: Iterable[str]) -> dict[str, list[str]]:
        """{"of", "against": those of `runs` that are named}."""
        both = {"of": self.of, "against": self.against}
        return {side: [run for run in runs if any(fnmatchcase(run, p) for p in patterns)] for side, patterns in both.items()}


class Grid(Section):
    seeds: list[int] = Field([0], min_length=1)
    runs: dict[str, Run] = Field(min_length=1)
    contrasts: dict[str, Contrast] = Field(
        default_factory=dict, description="differences that the report shall give, declared before they are seen"
    )


class Compute(Section):
    """How to run, never what: no key here is part of a fingerprint."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    workers: int = Field(1, ge=0, description="threads that prepare batches")
    threads: int | None = Field(None, ge=1, description="CPU threads of a job")
    processes: int = Field(1, ge=1, description="processes that train one job, each with a GPU where there are any")
    compile: Literal["auto", True, False] = Field(
        False, description="forward and backward by torch.compile; auto: in long trainings on CUDA"
    )
    tracking: bool = True
    tracking_uri: str | None = Field(
        None, description="MLflow server or store (null: MLFLOW_TRACKING_URI or SQLite)"
    )


class Params(Section):
    """One experiment of mimlab."""

    experiment: str
    data: Data
    model: Model
    train: Train
    targets: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any] | None]
    tasks: dict[str, dict[str, Any] | None] = Field(min_length=1)
    grid: Grid
    compute: Compute = Compute()


# ----------------------------------------------------------------------------------------------- reading YAML


class _Loader(yaml.SafeLoader):
    """The safe loader, with 1e-3 read as a number (as YAML 1.2 and DVC do) and no key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                mark = key.start_mark
                raise ParamsError(
                    f"{mark.name}, line {mark.line + 1}: key {key.value!r} is given twice "
                    f"(first in line {seen[key.value]})"
                )
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. ParamsError if it is missing, empty, not YAML, or not a mapping."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ParamsError(f"{path}: no such file{nearest(path.name, near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise ParamsError(
            f"{path}: is empty; expected sections such as data, model, train, methods, tasks, grid"
        )
    if not isinstance(content, dict):
        raise ParamsError(
            f"{path}: holds a {type(content).__name__}, expected sections: data, model, train, ..."
        )
    return content


# ------------------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Settings:
    """A checked plug-in section: the plug-in, its complete settings, and `train` with the section's own
    changes.

    `origin` tells for each key given where it was given, as a dotted key of params.yaml."""

    name: str
    plugin: Plugin
    config: dict[str, Any]
    train: dict[str, Any]
    origin: dict[str, str]


@dataclass(frozen=True)
class Target:
    name: str
    kind: str
    upstream: str | None
    seed: int
    settings: Settings


@dataclass(frozen=True)
class Student:
    """A run of the grid, or one stage of a chain. It learns from the target `target`, from the encoder of the run
    `teacher` with the same seed, or from neither. `stage` counts the runs of its method in a row of which each
    taught the next, itself included."""

    name: str
    key: str  # where it is declared, as a dotted key of params.yaml
    method: str
    target: str | None
    teacher: str | None
    stage: int
    seeds: list[int]
    set: dict[str, Any]
    settings: Settings


@dataclass(frozen=True)
class Experiment:
    """Everything that params.yaml says, checked and complete. Teachers come before their students in `runs`."""

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
    problems: list[str] = []
    try:
        params = Params.model_validate_json(_json(content))
    except ValidationError as error:
        raise ParamsError(_listing(path, [_sentence(e, "", _allowed) for e in error.errors()])) from None
    image, model = params.data.image_size, params.model.model_dump()

    def section(kind, name, key, given, extra=None, mergeable=True, fits=True):
        """Check one plug-in section; `extra` maps more settings to their own dotted prefix (a run's
        `set`)."""
        try:
            found = plugin(kind, name, root)
        except ParamsError as error:
            problems.append(f"{key}: {error}")
            return None
        values = {k: (v, f"{key}.{k}") for k, v in (given or {}).items()}
        for prefix, more in (extra or {}).items():
            values |= {k: (v, f"{prefix}.{k}") for k, v in more.items()}
        own = {k: v for k, v in values.items() if k in found.fields}
        over = {k: v for k, v in values.items() if mergeable and k not in own and k in Train.model_fields}
        allowed = found.fields + (list(Train.model_fields) if mergeable else [])
        before = len(problems)
        for k, (value, where) in values.items():
            if k not in own and k not in over:
                problems.append(f"{where}: unknown key (found {value!r}){nearest(k, allowed)}")
        config = _config(found, own, key, problems)
        train = _train(params, over, key, problems)
        fits = fits and sound
        if fits and kind in ("method", "target") and encoder not in found.literals["ENCODERS"]:
            able = ", ".join(found.literals["ENCODERS"])
            problems.append(f"model.name: {kind} {name} takes no {encoder}, only {able} (found {model['name']!r})")
        elif config is not None and fits and hasattr(config, "check"):
            try:
                config.check(image, model)
            except ValueError as error:
                problems.append(_blame(error, own, key))
        if len(problems) > before or config is None:
            return None
        values_of = {f: getattr(config, f) for f in found.fields}
        return Settings(name, found, values_of, train, {k: where for k, (_, where) in values.items()})

    encoder = _encoder(params.model.name)
    flaws = _model_flaws(params.model, image)
    sound = not flaws  # otherwise a plug-in cannot say whether it fits
    problems += flaws
    _check_shapes(params, problems)
    name, _, argument = params.data.source.partition(":")
    source = None
    if not _source_problem(params, name, argument, root, problems):
        source = section("source", name, "data.options", params.data.options, mergeable=False, fits=False)
    targets = _check_targets(params, section, root, problems)
    for key in params.methods:
        section("method", key, f"methods.{key}", params.methods[key], fits=False)
    runs = _check_runs(params, targets, section, root, problems)
    tasks = {k: section("task", k, f"tasks.{k}", params.tasks[k], mergeable=False) for k in params.tasks}
    if problems:
        raise ParamsError(_listing(path, list(dict.fromkeys(problems))))
    return Experiment(params, (name, argument or None, source), targets, runs, tasks)


def _config(found: Plugin, own: dict, key: str, problems: list[str]):
    """The plug-in's Config with these values, or None after noting what is wrong with them."""
    try:
        return TypeAdapter(found.config).validate_json(_json({k: v for k, (v, _) in own.items()}))
    except ValidationError as error:
        for e in error.errors():
            if e["type"] == "value_error":  # from __post_init__: "key: why"
                problems.append(_blame(e["ctx"]["error"], own, key))
            else:
                field = str(e["loc"][0]) if e["loc"] else ""
                where = own[field][1] if field in own else f"{key}.{field}"
                problems.append(_sentence({**e, "loc": e["loc"][1:]}, where, lambda loc: []))
    return None


def _train(params: Params, over: dict, key: str, problems: list[str]) -> dict:
    """`train` with a section's changes; what cannot step is noted as a problem."""
    merged = params.train.model_dump() | {k: v for k, (v, _) in over.items()}
    try:
        merged = Train.model_validate_json(_json(merged)).model_dump()
    except ValidationError as error:
        for e in error.errors():
            field = str(e["loc"][0])
            problems.append(
                _sentence(
                    {**e, "loc": e["loc"][1:]},
                    over[field][1] if field in over else f"train.{field}",
                    _allowed,
                )
            )
        return merged
    where = next((over[k][1] for k in ("micro_batch", "batch_size") if k in over), "train.micro_batch")
    _check_micro(merged, where, problems)
    return merged


def _check_micro(train: dict, where: str, problems: list[str]) -> None:
    batch, micro = train["batch_size"], train["micro_batch"]
    if micro and (micro > batch or batch % micro):
        problems.append(
            f"{where}: micro_batch {micro} does not divide batch_size {batch}, so accumulation "
            "would never make a whole step"
        )


def _encoder(name: str) -> str:
    """What kind of encoder a timm model is, as a plug-in's ENCODERS lists them."""
    found = re.match(r"(convvit|swin)(?:v2)?_", name)
    return found[1] if found else "vit"


def _model_flaws(model: Model, image: int) -> list[str]:
    """Why there can be no such encoder for images of this size."""
    staged = _encoder(model.name) == "swin"
    flaws = []
    for key in ("depth", "num_heads"):
        value = getattr(model, key)
        if isinstance(value, list) != staged:
            expected = "a list, one number for each stage" if staged else "one number (a list is for Swin)"
            flaws.append(f"model.{key}: {model.name} takes {expected} (found {value})")
        elif not value or min(value if staged else [value]) < 1:
            flaws.append(f"model.{key}: must be greater than or equal to 1 (found {value})")
    if staged and model.window_size is None:
        flaws.append("model.window_size: required for a Swin: the side of its windows in tokens, such as 4 or 7")
    if not staged and model.window_size is not None:
        flaws.append(f"model.window_size: {model.name} has no windows (found {model.window_size})")
    if _encoder(model.name) == "convvit" and model.patch_size % 4:
        flaws.append(f"model.patch_size: {model.name} takes a multiple of 4 (found {model.patch_size})")
    if flaws:
        return flaws
    depth, heads = (v if staged else [v] for v in (model.depth, model.num_heads))
    if len(depth) != len(heads):
        return [f"model.num_heads: has {len(heads)} stages {heads}, model.depth has {len(depth)} {depth}"]
    stride = model.patch_size * 2 ** (len(depth) - 1)
    if image % stride:
        halved = f", doubled by each later stage: {stride}" if staged else ""
        flaws.append(f"data.image_size: {image} is not a multiple of model.patch_size {model.patch_size}{halved}")
    for stage, number in enumerate(heads):
        width, where = model.embed_dim * 2**stage, f" in stage {stage + 1}" if staged else ""
        if width % number:
            given = model.embed_dim if not stage else f"{width} (model.embed_dim {model.embed_dim} times {2**stage})"
            flaws.append(f"model.embed_dim: {given} is not a multiple of model.num_heads {number}{where}")
        grid = image // (model.patch_size * 2**stage)
        if staged and not flaws and grid > model.window_size and grid % model.window_size:
            flaws.append(f"model.window_size: {model.window_size} does not divide the {grid} tokens per side{where}")
    return flaws


def _check_shapes(params: Params, problems: list[str]) -> None:
    """What the sections say together about sizes, and names that become folders."""
    data, model = params.data, params.model
    if data.store_size is not None and data.store_size < data.image_size:
        problems.append(
            f"data.store_size: {data.store_size} is smaller than data.image_size {data.image_size}"
        )
    if data.val_fraction + data.test_fraction >= 1:
        problems.append(
            f"data.val_fraction: {data.val_fraction} and data.test_fraction {data.test_fraction} "
            "leave nothing to train on"
        )
    _check_micro(params.train.model_dump(), "train.micro_batch", problems)
    if not NAME.match(params.experiment):
        problems.append(f"experiment: {params.experiment!r} {_NAME_RULE}")
    for key, names in (("targets", params.targets), ("grid.runs", params.grid.runs)):
        problems += [f"{key}.{n}: the name {n!r} {_NAME_RULE}" for n in names if not NAME.match(n)]
    problems += [
        f"grid.runs.{n}: the name {n!r} ends like a seed; jobs are called <run>-s<seed>, choose another name"
        for n in params.grid.runs
        if SEEDED.match(n)
    ]
    seeds = {"grid.seeds": params.grid.seeds} | {
        f"grid.runs.{n}.seeds": r.seeds for n, r in params.grid.runs.items() if r.seeds
    }
    for key, values in seeds.items():
        if len(set(values)) < len(values) or min(values) < 0:
            problems.append(f"{key}: {values} must be different whole numbers, none below 0")
    near = _unknown_model(model.name)
    if near is not None:
        problems.append(f"model.name: timm has no model {model.name!r}{near}")


_NAME_RULE = "must be lower-case letters, digits, - and _, and begin with a letter or digit"


def _source_problem(params: Params, name: str, argument: str, root: Path, problems: list[str]) -> bool:
    names = plugin_names("source", root)
    if name not in names:
        problems.append(
            f"data.source: no source is called {name!r}{nearest(name, names)}; expected shapes, folder:PATH, "
            "parquet:PATH or hub:NAME"
        )
    elif name == "shapes" and argument:
        problems.append(f"data.source: shapes takes nothing after the colon (found {argument!r})")
    elif name != "shapes" and not argument:
        problems.append(
            f"data.source: {name} needs something to read, as in {name}:{'NAME' if name == 'hub' else 'PATH'}"
        )
    else:
        return False
    return True


def _check_targets(params: Params, section, root: Path, problems: list[str]) -> dict[str, Target]:
    targets: dict[str, Target] = {}
    for name, given in params.targets.items():
        key, given = f"targets.{name}", dict(given or {})
        kind, upstream, seed = given.pop("kind", None), given.pop("upstream", None), given.pop("seed", 0)
        if not isinstance(kind, str):
            problems.append(
                f"{key}.kind: required, one of {', '.join(plugin_names('target', root))} (found {kind!r})"
            )
            continue
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            problems.append(f"{key}.seed: must be a whole number, 0 or more (found {seed!r})")
        settings = section("target", kind, key, given)
        if settings is None:
            continue
        if settings.plugin.literals["PRODUCES"] not in ("ids", "features"):
            problems.append(f'{key}.kind: {settings.plugin.path} must declare PRODUCES = "ids" or "features"')
        targets[name] = Target(name, kind, upstream, seed, settings)
    for name, target in targets.items():
        needs, key = target.settings.plugin.literals["UPSTREAM"], f"targets.{name}.upstream"
        if needs is None:
            if target.upstream is not None:
                problems.append(
                    f"{key}: kind {target.kind} takes no upstream target (found {target.upstream!r})"
                )
        elif not isinstance(target.upstream, str):
            fit = _producing(targets, needs, name)
            problems.append(
                f"{key}: kind {target.kind} needs an upstream target that produces {needs}{_choice(fit)}"
            )
        elif target.upstream not in params.targets:
            problems.append(
                f"{key}: no target is called {target.upstream!r}{nearest(target.upstream, params.targets)}"
            )
        elif target.upstream in targets:
            made = targets[target.upstream].settings.plugin.literals["PRODUCES"]
            if made != needs:
                problems.append(
                    f"{key}: {target.upstream!r} produces {made}, kind {target.kind} needs {needs}"
                )
    for circle in _circles({name: target.upstream for name, target in targets.items()}):
        problems.append(f"targets.{circle[0]}.upstream: goes round in a circle: {' -> '.join(circle)}")
    return targets


def _check_runs(
    params: Params, targets: dict[str, Target], section, root: Path, problems: list[str]
) -> dict[str, Student]:
    runs = _unrolled(params.grid.runs, problems)
    for name, contrast in params.grid.contrasts.items():
        for side, patterns in (("of", contrast.of), ("against", contrast.against)):
            problems += [f"grid.contrasts.{name}.{side}: there is no run {p!r}{nearest(p, runs)}"
                         for p in patterns if not any(fnmatchcase(run, p) for run in runs)]  # fmt: skip
    teachers = {name: _teacher(run.target) for name, (_, run) in runs.items()}
    settings: dict[str, Settings | None] = {}
    for name, (key, run) in runs.items():
        if run.method not in params.methods:
            known = [*params.methods, *plugin_names("method", root)]
            exists = run.method in plugin_names("method", root)
            hint = (
                f"; add `{run.method}: {{}}` to methods"
                if exists
                else nearest(run.method, dict.fromkeys(known))
            )
            problems.append(f"{key}.method: {run.method!r} has no section under methods{hint}")
            continue
        settings[name] = section(
            "method", run.method, f"methods.{run.method}", params.methods[run.method], {f"{key}.set": run.set}
        )
        try:
            needs = plugin("method", run.method, root).literals["TARGET"]
        except ParamsError:
            continue
        if run.stages and needs != "features":
            what = f"needs a target that produces {needs}" if needs else "takes no target"
            problems.append(
                f"{key}.stages: method {run.method} {what}, expected one that learns from features, "
                "as those of the stage before"
            )
        elif teachers[name] and needs:
            problems += _teacher_problems(params, name, runs, needs)
        else:
            problems += _target_problems(key, run, needs, targets, params.targets)
    for circle in _circles(teachers):
        key = runs[circle[0]][0]
        problems.append(f"{key}.target: goes round in a circle: {' -> '.join(circle)}")
    if problems:
        return {}
    students: dict[str, Student] = {}

    def add(name: str) -> Student:
        if name not in students:
            (key, run), teacher = runs[name], teachers[name]
            above = add(teacher) if teacher else None
            stage = above.stage + 1 if above and above.method == run.method else 1
            target, seeds = None if teacher else run.target, run.seeds or params.grid.seeds
            students[name] = Student(
                name, key, run.method, target, teacher, stage, seeds, run.set, settings[name]
            )
        return students[name]

    for name in runs:
        add(name)
    return students


def _unrolled(declared: dict[str, Run], problems: list[str]) -> dict[str, tuple[str, Run]]:
    """Runs by name, each with its dotted key; one with `stages` becomes as many, each the teacher of the next."""
    runs: dict[str, tuple[str, Run]] = {}
    for name, run in declared.items():
        key, stages = f"grid.runs.{name}", run.stages or 1
        names = [f"{name}-{n}" for n in range(1, stages + 1)] if run.stages else [name]
        targets = [run.target, *(f"run:{n}" for n in names)]
        for each, target in zip(names, targets):
            if each in runs:
                chain = key if run.stages else runs[each][0]
                problems.append(f"{chain}.stages: makes a run {each!r}, but there is another of that name")
            runs[each] = (key, run.model_copy(update={"target": target}))
    return runs


def _teacher(target: str | None) -> str | None:
    """The run that `run:NAME` names, None for a name under targets."""
    return target[4:] if target is not None and target.startswith("run:") else None


def _teacher_problems(params: Params, name: str, runs: dict[str, tuple[str, Run]], needs: str) -> list[str]:
    """What is wrong with the run whose encoder is to teach the run `name`."""
    (key, run), seeds = runs[name], params.grid.seeds
    teacher = _teacher(run.target)
    if needs != "features":
        return [f"{key}.target: {run.target!r} gives features, method {run.method} needs {needs}"]
    if teacher not in runs:
        stages = params.grid.runs[teacher].stages if teacher in params.grid.runs else None
        hint = f"; it is a chain: name a stage, as in 'run:{teacher}-{stages}'" if stages else nearest(teacher, runs)
        return [f"{key}.target: no run is called {teacher!r}{hint}"]
    given = runs[teacher][1].seeds or seeds
    missing = [seed for seed in run.seeds or seeds if seed not in given]
    if missing:
        return [
            f"{key}.target: run {teacher!r} has seeds {given}, but {name!r} needs its encoder of seed "
            f"{', '.join(map(str, missing))} too"
        ]
    return []


def _target_problems(
    key: str, run: Run, needs: str | None, targets: dict[str, Target], declared: dict
) -> list[str]:
    """What is wrong with the target of a run whose method needs ids, features or nothing."""
    if needs is None:
        said = f"{key}.target: method {run.method} takes no target (found {run.target!r})"
        return [said] if run.target is not None else []
    fit = _choice(_producing(targets, needs))
    also = ", or run:NAME, the encoder of another run" if needs == "features" else ""
    if run.target is None:
        return [f"{key}.target: method {run.method} needs a target that produces {needs}{fit}{also}"]
    if run.target not in declared:
        return [f"{key}.target: no target is called {run.target!r}{nearest(run.target, declared)}{also}"]
    made = targets[run.target].settings.plugin.literals["PRODUCES"] if run.target in targets else needs
    if made != needs:
        return [f"{key}.target: {run.target!r} produces {made}, method {run.method} needs {needs}{fit}{also}"]
    return []


def _producing(targets: dict[str, Target], what: str, but: str | None = None) -> list[str]:
    return [n for n, t in targets.items() if t.settings.plugin.literals["PRODUCES"] == what and n != but]


def _circles(above: dict[str, Any]) -> list[list[str]]:
    """The circles among names of which each points to at most one other, from their alphabetically first member
    back to it."""
    found = []
    for name in above:
        path, at = [name], above[name]
        while isinstance(at, str) and at in above and at not in path:
            path, at = [*path, at], above[at]
        if at == name == min(path):
            found.append([*path, name])
    return found


def _unknown_model(name: str) -> str | None:
    """None when timm or stages/kit/hybrid.py has this model (or timm is not installed), else the nearest names.
    Reads their text, imports nothing."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    plain = name.split(".")[0]
    files = sorted(
        Path(spec.submodule_search_locations[0]).glob("models/*.py"),
        key=lambda p: not p.stem.startswith("vision_tr"),
    )
    names: list[str] = []
    for file in (ROOT / "stages/kit/hybrid.py", *files):
        found = re.findall(r"@register_model\s+def (\w+)\(", file.read_text(encoding="utf-8"))
        if plain in found:
            return None
        names += found
    near = difflib.get_close_matches(plain, names, 1, 0.6) if names else []
    return f"; did you mean {near[0]!r}?" if near else ""


# --------------------------------------------------------------------------------------------------- messages


def _json(value) -> str:
    return json.dumps(value, default=str)


def _listing(path: str, problems: list[str]) -> str:
    head = f"{path}: {len(problems)} problems" if len(problems) > 1 else path
    return "\n".join([f"{head}:", *(f"  {p}" for p in problems)])


def _choice(names: list[str]) -> str:
    return f", such as {', '.join(map(repr, names))}" if names else ", and none is defined under targets"


def _blame(error: Exception, own: dict, key: str) -> str:
    """A plug-in's ValueError("key: why") with the key as it stands in params.yaml and the value given
    there."""
    field, colon, why = str(error).partition(":")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*", field):
        return f"{key}: {error}"
    if "." in field:  # a key of another section, such as model.depth
        return f"{field}: {why.strip()} (for {key})"
    value, where = own.get(field, (None, f"{key}.{field}"))
    return f"{where}: {why.strip()}" + (f" (found {value!r})" if field in own and "found" not in why else "")


def _allowed(loc: tuple) -> list[str]:
    """Keys allowed in the section of Params at this place."""
    model: Any = Params
    for part in loc:
        if model is Params.model_fields["grid"].annotation and part == "runs":
            return [] if loc[-1] == "runs" else list(Run.model_fields)
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = field.annotation
    return list(getattr(model, "model_fields", {}))


def _sentence(error: dict, prefix: str, allowed) -> str:
    """One pydantic error as "dotted.key: what is wrong, what is allowed (found ...)"."""
    loc = [
        p
        for p in error["loc"]
        if not (isinstance(p, str) and ("[" in p or p in ("int", "float", "str", "bool", "none")))
    ]
    where = ".".join(filter(None, [prefix, *map(str, loc)])) or "params"
    found, kind, context = error["input"], error["type"], error.get("ctx", {})
    shown = repr(found) if len(repr(found)) < 80 else repr(found)[:77] + "..."
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key (found {shown}){nearest(str(loc[-1]), allowed(tuple(loc[:-1])))}"
    if kind == "missing":
        return f"{where}: required, but not given"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(found), options, 1, 0.5)
        return f"{where}: must be {context['expected']} (found {shown})" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
    if kind == "string_pattern_mismatch":
        return f"{where}: must be auto, cpu, cuda or cuda:<number> (found {shown})"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{where}: must be a section with keys{_options(allowed(tuple(loc)))} (found {shown})"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: must be {message} (found {shown})"


def _options(keys: list[str]) -> str:
    return " " + ", ".join(keys) if keys else ""


# ----------------------------------------------------------------------------------------------------- schema


def schema(root: Path = ROOT) -> dict:
    """JSON Schema of params.yaml, with the settings of every plug-in in the tree."""
    result = Params.model_json_schema()
    train = result["$defs"]["Train"]["properties"]

    def of(kind: str, name: str, extra: dict) -> dict:
        found = plugin(kind, name, root)
        own = TypeAdapter(found.config).json_schema()
        properties = extra | own.get("properties", {})
        return {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": properties,
            "description": found.path,
        }

    def named(kind: str, extra: dict) -> dict:
        sections = {n: of(kind, n, extra) for n in plugin_names(kind, root)}
        return {"type": "object", "additionalProperties": False, "properties": sections}

    properties = result["properties"]
    properties["methods"] = named("method", train)
    properties["tasks"] = named("task", {}) | {"minProperties": 1}
    own = {"upstream": {"type": ["string", "null"]}, "seed": {"type": "integer", "minimum": 0}}
    kinds = []
    for name in plugin_names("target", root):
        kind = of("target", name, train | own | {"kind": {"const": name}})
        kinds.append(kind | {"type": "object", "required": ["kind"]})
    properties["targets"] = {"type": "object", "additionalProperties": {"oneOf": kinds}}
    result["$defs"]["Run"]["properties"]["method"] |= {"enum": plugin_names("method", root)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def schema_text(root: Path = ROOT) -> str:
    return json.dumps(schema(root), indent=1) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workflow.params", description="Check a params file.")
    parser.add_argument("file", nargs="?", default="params.yaml")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of params files")
    args = parser.parse_args(argv)
    if args.schema:
        sys.stdout.write(schema_text())
        return 0
    try:
        experiment = read(args.file)
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"{args.file}: good ({len(experiment.runs)} runs, {len(experiment.targets)} targets, "
        f"{len(experiment.tasks)} tasks)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
