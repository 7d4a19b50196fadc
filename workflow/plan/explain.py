"""Why a job would run: the parameter, file or input that differs from what its manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterator

from workflow.manifest import Manifest
from workflow.plan import Job, Plan

SHOWN = 6  # causes in a sentence


def explain(plan: Plan, id: str) -> str:
    """In one sentence: is this job up to date, and if not, what differs?"""
    found = causes(plan, id)
    if not found:
        return f"{id} is up to date."
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{id} would run because {'; '.join(found[:SHOWN])}{more}."


def causes(plan: Plan, id: str) -> list[str]:
    """Everything that makes a job run: nothing if it and its inputs are up to date."""
    job, manifest = plan.job(id), plan.manifest(id)
    if manifest is None:
        return [f"it has not been run (there is no {job.manifest})"]
    if missing := plan.missing(id):
        return [f"its output {missing} is missing"]
    found = [*_parameters(job, manifest), *_code(job, manifest), *_inputs(plan, job, manifest)]
    if not found and manifest.fingerprint != job.fingerprint:
        return [f"its manifest {job.manifest} was not written by this plan"]
    return found


def _parameters(job: Job, manifest: Manifest) -> Iterator[str]:
    as_json = json.loads(json.dumps(job.params))  # tuples are lists, all keys are text
    for key, old, new in _differences(manifest.params, as_json):
        origin = _origin(job, key)
        of_files = origin.startswith("what ")  # two digests would tell a person nothing
        values = "" if of_files else f" from {_show(old)} to {_show(new)}"
        yield f"{origin} changed{values}"


def _code(job: Job, manifest: Manifest) -> Iterator[str]:
    for path in sorted({*manifest.code, *job.hashes}):
        if path not in manifest.code:
            yield f"{path} was added"
        elif path not in job.hashes:
            yield f"{path} is no longer used"
        elif manifest.code[path] != job.hashes[path]:
            yield f"{path} was edited"


def _inputs(plan: Plan, job: Job, manifest: Manifest) -> Iterator[str]:
    for role in sorted({*manifest.inputs, *job.inputs}):
        before, now = manifest.inputs.get(role), job.inputs.get(role)
        if now is None:
            yield f"{before['job']} is no longer its input"
        elif before is None:
            yield f"{now} is its input now"
        elif before["job"] != now:
            yield f"its {role} is {now} now, no longer {before['job']}"
        elif inner := causes(plan, now):
            yield f"its input {now} would run ({inner[0]})"
        elif before["fingerprint"] != plan.jobs[now].fingerprint:
            yield f"its input {now} is a newer one"


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
    """The key of params.yaml behind a dotted key of the job's parameters."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        head = ".".join(parts[:n])
        if head in job.origins:
            return ".".join([job.origins[head], *parts[n:]])
    return key
