"""What the plain sections say together: sizes, shares, names that become folders, seeds."""

from __future__ import annotations

import re

from workflow.params.sections import Params
from workflow.plugins import NAME

RULE = "must be lower-case letters, digits, - and _, and begin with a letter or digit"
SEEDED = re.compile(r".*-s\d+\Z")  # job names are <run>-s<seed>, so a run may not end like one


def contradictions(params: Params) -> list[str]:
    """Sections that are each good but do not go together, and names that cannot be."""
    data, grid = params.data, params.grid
    found = []
    if data.store_size is not None and data.store_size < data.image_size:
        found.append(
            f"data.store_size: {data.store_size} is smaller than data.image_size {data.image_size}"
        )
    if data.val_fraction + data.test_fraction >= 1:
        found.append(
            f"data.val_fraction: {data.val_fraction} and data.test_fraction {data.test_fraction} leave nothing to train on"
        )
    if not NAME.match(params.experiment):
        found.append(f"experiment: {params.experiment!r} {RULE}")
    for key, names in (("targets", params.targets), ("grid.runs", grid.runs)):
        found += [f"{key}.{n}: the name {n!r} {RULE}" for n in names if not NAME.match(n)]
    found += [
        f"grid.runs.{n}: the name {n!r} ends like a seed; jobs are called <run>-s<seed>, choose another name"
        for n in grid.runs
        if SEEDED.match(n)
    ]
    seeds = {"grid.seeds": grid.seeds} | {
        f"grid.runs.{n}.seeds": r.seeds for n, r in grid.runs.items() if r.seeds
    }
    found += [
        f"{key}: {values} must be different whole numbers, none below 0"
        for key, values in seeds.items()
        if len(set(values)) < len(values) or min(values) < 0
    ]
    return found
