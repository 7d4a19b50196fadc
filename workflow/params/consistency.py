"""What the plain sections say together: sizes, shares, names that become folders, seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator

from workflow.messages import shown
from workflow.params.sections import MOST_SEEDS, Data, Grid, Params
from workflow.plugins import NAME

RULE = "must be lower-case letters, digits, - and _, and begin with a letter or digit"
LONGEST = 100  # characters of a name; file systems take 255 bytes, and seeds and endings come to it
SEEDED = re.compile(r".*-s\d+\Z")  # job names are <run>-s<seed>, so a run may not end like one


def contradictions(params: Params, data: dict[str, tuple[str, Data]]) -> Iterator[str]:
    """Sections that are each good but do not go together, and names that cannot be."""
    for key, entry in data.values():
        yield from _data_problems(key, entry)
    yield from _name_problems(params)
    yield from _seed_problems(params.grid)


def _data_problems(key: str, data: Data) -> Iterator[str]:
    if None not in (data.store_size, data.image_size) and data.store_size < data.image_size:
        yield (
            f"{key}.store_size: {data.store_size} is smaller than {key}.image_size "
            f"{data.image_size}"
        )
    if data.val_fraction + data.test_fraction >= 1:
        yield (
            f"{key}.val_fraction: {data.val_fraction} and {key}.test_fraction "
            f"{data.test_fraction} leave nothing to train on"
        )


def _name_problems(params: Params) -> Iterator[str]:
    """Names that cannot be those of folders."""
    if not NAME.match(params.experiment):
        yield f"experiment: {shown(params.experiment)} {RULE}"
    elif len(params.experiment) > LONGEST:
        yield _too_long("experiment", params.experiment)
    named = {
        "data": params.data if all(isinstance(v, dict) for v in params.data.values()) else {},
        "models": params.models or {},
        "targets": params.targets,
        "methods": params.methods,
        "tasks": params.tasks,
        "grid.runs": params.grid.runs,
    }
    for key, names in named.items():
        for name in names:
            if len(name) > LONGEST:
                yield _too_long(key, name)
            elif not NAME.match(name):
                yield f"{key}.{name}: the name {name!r} {RULE}"
    for name in params.grid.runs:
        if SEEDED.match(name):
            yield (
                f"grid.runs.{name}: the name {name!r} ends like a seed; jobs are called "
                "<run>-s<seed>, choose another name"
            )


def _too_long(key: str, name: str) -> str:
    return (
        f"{key}: found a name of {len(name)} characters ({shown(name)}), expected at most "
        f"{LONGEST}, as it becomes part of file names"
    )


def _seed_problems(grid: Grid) -> Iterator[str]:
    seeds = {"grid.seeds": grid.seeds}
    seeds |= {f"grid.runs.{name}.seeds": run.seeds for name, run in grid.runs.items() if run.seeds}
    for key, values in seeds.items():
        if len(set(values)) < len(values) or min(values) < 0:
            yield f"{key}: {shown(values)} must be different whole numbers, none below 0"
        elif max(values) >= MOST_SEEDS:
            yield f"{key}: found {max(values)}, expected numbers below {MOST_SEEDS}"
