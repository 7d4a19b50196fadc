"""The sections of params.yaml and what each key of them may hold.

The settings of a plug-in are declared in its own file; here are only the words beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

MOST = 10**6  # epochs, images in a batch, and the like: more is a slip of the keyboard
MOST_SEEDS = 2**32  # what random generators take


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Splits(Section):
    """Which given split is which, where its name does not say it: names, or patterns (x-*)."""

    train: str | list[str] = []
    val: str | list[str] = []
    test: str | list[str] = []
    unlabelled: str | list[str] = Field([], description="joins train, without its labels")
    ignore: str | list[str] = Field([], description="is left out")


class Data(Section):
    """One data set."""

    source: str = Field(description="shapes | folder:PATH | parquet:PATH | hub:NAME")
    image_size: int | None = Field(
        None, ge=4, le=4096, description="side in pixels of the square that encoders see"
    )
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
    frozen: bool = Field(
        False,
        description="keep the data set that was made, whatever becomes of the files of its source",
    )
    splits: Splits | None = Field(
        None, description="which given split is which (null: their names say it)"
    )
    group: str | int | None = Field(
        None, description="what no split tears apart: a column, or the level of a folder (1: first)"
    )
    seed: int = Field(0, ge=0, lt=MOST_SEEDS)
    normalise: Literal["dataset", "imagenet"] = Field(
        "dataset", description="mean and std: the set's or ImageNet's"
    )
    quarantine_limit: float = Field(
        0.05, ge=0, le=1, description="stop when a larger share of the files is broken"
    )
    memory_map_gb: float = Field(
        8,
        ge=0,
        le=MOST,
        description="a set no larger than this is decoded once, into squares of store_size from "
        "which crops are cut; of a larger one, crops are cut from the whole originals",
    )
    range: Literal["auto"] | list[float] | None = Field(
        None,
        description="[low, high] of 16-bit and float images that become black and white; auto: the "
        "0.1 and 99.9 percentiles of train; null: [0, 65535] and [0, 1]",
    )
    max_pixels: int = Field(
        89_478_485, ge=1, description="a file with more is not decoded but quarantined"
    )
    image_column: str | None = None
    label_column: str | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="the source's own settings")


class Train(Section):
    epochs: int = Field(ge=1, le=MOST)
    batch_size: int = Field(ge=1, le=MOST, description="images per step over all devices")
    micro_batch: int | None = Field(
        None, ge=1, le=MOST, description="images per pass and device; accumulation follows"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    save_minutes: float = Field(5, gt=0, le=MOST, description="minutes between checkpoints")
    nan_skips: int = Field(
        0, ge=0, description="batches that may be left out because they give NaN; 0: stop at once"
    )


# What an entry may say beside the settings of its plug-in.

KIND = Field(None, description="file name of the plug-in (null: the entry's name)")
RECIPE = Field(None, description="published: the plug-in's PUBLISHED, then what is given")
DATA = Field(None, description="a name under data, where there are several")
MODEL = Field(None, description="a name under models, where there are several")
LEARNS_FROM = "a name under targets, or run:NAME: the encoder of that run with the same seed"


class ModelWords(Section):
    kind: str | None = Field(None, description="file in stages/encoders (null: from name)")


class TargetWords(Section):
    kind: str | None = KIND
    recipe: Literal["published"] | None = RECIPE
    upstream: str | None = Field(None, description=LEARNS_FROM)
    seed: int = Field(0, ge=0, lt=MOST_SEEDS)
    data: str | None = DATA
    model: str | None = MODEL


class MethodWords(Section):
    kind: str | None = KIND
    recipe: Literal["published"] | None = RECIPE


class TaskWords(Section):
    kind: str | None = KIND
    recipe: Literal["published"] | None = RECIPE
    data: str | None = Field(None, description="a name under data (null: the run's)")
    after: str | None = Field(None, description="the task whose model is tested")


class Run(Section):
    method: str = Field(description="a name under methods")
    target: str | None = Field(None, description=LEARNS_FROM)
    data: str | None = DATA
    model: str | None = MODEL
    recipe: Literal["published"] | None = Field(
        None, description="published: the method's PUBLISHED, whatever its section says"
    )
    stages: int | None = Field(
        None,
        ge=1,
        le=99,
        description="a chain: runs NAME-1, NAME-2, ..., each the teacher of the next",
    )
    seeds: list[int] | None = Field(
        None, min_length=1, max_length=1000, description="instead of grid.seeds"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="settings of the method (or of train) for this run only"
    )
    tasks: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict, description="changes of tasks for this run; null leaves a task out"
    )


class Contrast(Section):
    of: list[str] = Field(
        min_length=1, description="runs, or patterns of their names such as hog-*"
    )
    against: list[str] = Field(min_length=1, description="the runs whose mean score is subtracted")

    def sides(self, runs: Iterable[str]) -> dict[str, list[str]]:
        """{"of", "against": those of `runs` that are named}."""
        both = {"of": self.of, "against": self.against}
        return {
            side: [run for run in runs if any(fnmatchcase(run, p) for p in patterns)]
            for side, patterns in both.items()
        }


class Grid(Section):
    seeds: list[int] = Field([0], min_length=1, max_length=1000)
    runs: dict[str, Run] = Field(min_length=1)
    contrasts: dict[str, Contrast] = Field(
        default_factory=dict,
        description="differences that the report shall give, declared before they are seen",
    )


class Compute(Section):
    """How to run, never what: no key here is part of a fingerprint."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    workers: int = Field(1, ge=0, le=1024, description="threads that prepare batches")
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of a job")
    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="processes that train one job, each with a GPU where there are any",
    )
    compile: Literal["auto", True, False] = Field(
        False, description="forward and backward by torch.compile; auto: in long trainings on CUDA"
    )
    replace: bool = Field(
        False, description="replace what another params file made in the same results folder"
    )
    tracking: bool = True
    tracking_uri: str | None = Field(
        None, description="MLflow server or store (null: MLFLOW_TRACKING_URI or SQLite)"
    )


class Params(Section):
    """One experiment of mimlab."""

    experiment: str
    data: dict[str, Any] = Field(min_length=1)  # one entry, or named ones: see entries.py
    model: dict[str, Any] | None = Field(None, min_length=1)  # one entry
    models: dict[str, dict[str, Any] | None] | None = Field(None, min_length=1)  # named ones
    train: Train
    targets: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any] | None]
    tasks: dict[str, dict[str, Any] | None] = Field(min_length=1)
    grid: Grid
    compute: Compute = Compute()


def keys_at(place: Iterable[str]) -> list[str]:
    """The keys that the section at this place may have, such as ("grid", "runs", "mae").

    None where any name may stand.
    """
    section: Any = Params
    for key in place:
        fields = getattr(section, "model_fields", {})
        if section is Params and key == "data":
            section = Data
        elif key in fields:
            section = fields[key].annotation
        else:
            section = get_args(section)[1] if get_origin(section) is dict else None
        if get_origin(section) is UnionType:  # a section or null
            section = next((s for s in get_args(section) if hasattr(s, "model_fields")), section)
    return list(getattr(section, "model_fields", {}))
