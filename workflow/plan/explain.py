"""Why a job would run: the parameter, file or input that differs from what its manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterator

from workflow.manifest import Manifest
from workflow.plan import Job, Plan, kept
from workflow.plan.user_files import Place, changed_files

SHOWN = 6  # causes in a sentence


def explain(plan: Plan, id: str) -> str:
    """In one sentence: is this job up to date, and if not, what differs?"""
    found = causes(plan, id)
    if not found:
        return f"{id} is up to date."
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    why = f"{'; '.join(found[:SHOWN])}{more}"
    job, olds = plan.job(id), (plan.manifest(id), kept.manifest(plan.job(id), plan))
    if any(old and kept.same(job, plan, old) for old in olds):
        return (
            f"{id} would take over what it made before, since its parameters, its code and the "
            f"content of its inputs are the same; it is stale because {why}."
        )
    waits = any(not plan.fresh(above) for above in job.inputs.values())
    if waits and any(old and kept.alike(job, old) for old in olds):
        why += ", unless its inputs come out the same"
    return f"{id} would run because {why}."


def causes(plan: Plan, id: str) -> list[str]:
    """Everything that makes a job run: nothing if it and its inputs are up to date."""
    job, manifest = plan.job(id), plan.manifest(id)
    if manifest is None:
        return [f"it has not been run (there is no {job.manifest})"]
    if missing := plan.missing(id):
        return [f"its output {missing} is missing"]
    found = [
        *_parameters(plan, job, manifest),
        *_code(job, manifest),
        *_inputs(plan, job, manifest),
    ]
    if not found and manifest.fingerprint != job.fingerprint:
        return [f"its manifest {job.manifest} was not written by this plan"]
    return found


def _parameters(plan: Plan, job: Job, manifest: Manifest) -> Iterator[str]:
    as_json = json.loads(json.dumps(job.params))  # tuples are lists, all keys are text
    differ = {key: values for key, *values in _differences(manifest.params, as_json)}
    moved = {job.places[key] for key in differ if key in job.places}
    said, place = set(), Place(plan.results, plan.params_file)
    for key, (old, new) in differ.items():
        origin = _origin(job, key)
        if key in job.places and (job.places[key] not in differ or origin in said):
            continue  # the same files at another place
        if key in job.places.values() or origin.startswith("what "):
            if key not in moved:  # two digests would tell a person nothing
                yield f"{origin} changed{changed_files(place, old, new)}"
            continue
        said.add(origin)
        yield f"{origin} changed from {_show(old)} to {_show(new)}"


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
