"""Why a job would run: the parameter, file or input that differs from what its manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterator

from workflow.plan import Job, Plan


def explain(plan: Plan, id: str) -> str:
    """In one sentence: is this job up to date, and if not, which parameter, file or input differs?"""
    found = causes(plan, id)
    if not found:
        return f"{id} is up to date."
    shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
    return f"{id} would run because {shown}."


def causes(plan: Plan, id: str) -> list[str]:
    """Everything that makes a job run: none if it is up to date and its inputs are."""
    job, manifest = plan.job(id), plan.manifest(id)
    if manifest is None:
        return [f"it has not been run (there is no {job.manifest})"]
    if missing := plan.missing(id):
        return [f"its output {missing} is missing"]
    found = [
        f"{_origin(job, key)} changed from {_show(old)} to {_show(new)}"
        for key, old, new in _differences(manifest.get("params", {}), _plain(job.params))
    ]
    old_code = manifest.get("code", {})
    for path in sorted({*old_code, *job.hashes}):
        if old_code.get(path) != job.hashes.get(path):
            added, removed = path not in old_code, path not in job.hashes
            found.append(f"{path} was {'added' if added else 'removed' if removed else 'edited'}")
    for name in sorted({*manifest.get("inputs", {}), *job.inputs}):
        if name not in job.inputs:
            found.append(f"{name} is no longer its input")
        elif name not in manifest.get("inputs", {}):
            found.append(f"{name} is its input now")
        elif inner := causes(plan, name):
            found.append(f"its input {name} would run ({inner[0]})")
        elif manifest.get("inputs", {}).get(name) != plan.jobs[name].fingerprint:
            found.append(f"its input {name} is a newer one")
    if not found and manifest.get("fingerprint") != job.fingerprint:
        found.append(f"its manifest {job.manifest} was not written by this plan")
    return found


def _plain(value):
    """As it comes back from JSON: tuples as lists, all keys strings."""
    return json.loads(json.dumps(value))


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
