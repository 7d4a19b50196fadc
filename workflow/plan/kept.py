"""Outputs that are to be replaced are set aside: what would come out the same is taken over.

A fingerprint changes with all that a job is made from, before anybody knows what comes of it. A
source that gained a broken image is read again, and its data set is the same as before. Then the
jobs below have the same parameters, the same code and inputs with the same content, so they would
make what they have made already. They take it over (kit/job/takeover.py).

Engines delete outputs before they start a job. So the plan, which each engine asks first, links the
outputs of every stale job into `results/.kept/<job>/`, with the manifest last. Links take no room
until the outputs are replaced. The folder goes when its job is fresh again: there is never more
than one per job. No engine knows it, and nobody believes it: who takes it over compares all hashes.

A data set on which a later job would fail fails its own job, after all its images were read. It is
set aside, too. When the plan asks for what it has, its job takes it over, and reads no image again.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from workflow.files import write_atomic
from workflow.manifest import FILE, Manifest
from workflow.plan import Job, Plan
from workflow.plan.user_files import without_places

# A data set is the content that is asked for: only one that was refused is kept, for the identical
# job. The report shows the fingerprints themselves.
STAGES = ("target", "pretrain", "transfer")


def place(job: Job, plan: Plan) -> Path:
    """Where the outputs of a job are set aside."""
    return plan.aside(job.id)


def manifest(job: Job, plan: Plan) -> Manifest | None:
    """That of the outputs that are set aside; None if there are none."""
    return Manifest.read(place(job, plan) / FILE)


def set_aside(plan: Plan) -> None:
    """Link the outputs of the stale jobs; forget those of the fresh ones."""
    for job in plan.jobs.values():
        useless = job.stage not in STAGES and not _refused(job, manifest(job, plan))
        if plan.fresh(job.id) or useless:
            forget(job, plan)
        else:
            keep(job, plan)


def keep(job: Job, plan: Plan) -> None:
    """Link the finished outputs of a stale job.

    Nothing is kept where files cannot be linked, or of an output that lacks files.
    """
    made, folder = plan.manifest(job.id), place(job, plan)
    if job.stage not in STAGES or (made is not None and made.fingerprint == job.fingerprint):
        return
    before = manifest(job, plan)
    if before is None:  # of a process that was killed here
        forget(job, plan)
    if made is None or made == before:
        return
    forget(job, plan)
    try:
        for path in made.outputs:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(job.output / path, folder / path)
        write_atomic(folder / FILE, made.text(), sync=False)
    except (OSError, RuntimeError):  # the job computes, as it would without
        forget(job, plan)


def refuse(job: Job, plan: Plan, made: Manifest) -> None:
    """Move the outputs of a job that is not allowed to finish, with the manifest of `made`."""
    folder = place(job, plan)
    forget(job, plan)
    for path in made.outputs:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(job.output / path, folder / path)  # also to another disk, by a link
    write_atomic(folder / FILE, made.text())


def forget(job: Job, plan: Plan) -> None:
    """Remove what is kept of a job, the manifest first."""
    folder = place(job, plan)
    if folder.exists():
        with suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def same(job: Job, plan: Plan, old: Manifest | None = None) -> Manifest | None:
    """The manifest of an output that the job would make again; None if there is none.

    old: its manifest; what is set aside if none is given. Its inputs are all fresh and hold what
    they held then. Its files have still to be compared with it.
    """
    old = old or manifest(job, plan)
    if old is None or not alike(job, old):
        return None
    for role, above in job.inputs.items():
        if old.inputs[role]["content"] != plan.content(above):
            return None
    return old


def alike(job: Job, old: Manifest) -> bool:
    """Whether an output was made by the job but for the content of its inputs, which it knew."""
    return (
        (job.stage in STAGES or _refused(job, old))
        and (old.job, old.stage, old.code) == (job.id, job.stage, job.hashes)
        and _asked(old.params, job) == _asked(job.params, job)
        and {role: given.get("job") for role, given in old.inputs.items()} == job.inputs
        and all(given.get("content") for given in old.inputs.values())
    )


def _refused(job: Job, old: Manifest | None) -> bool:
    """Whether a data set is that of the job, and was set aside since something else would fail."""
    return job.stage == "data" and old is not None and old.fingerprint == job.fingerprint


def _asked(params: dict, job: Job) -> dict | None:
    """Parameters as JSON has them, without the places of files; None if they lack such a key."""
    try:
        return json.loads(json.dumps(without_places(params, job.places)))
    except (KeyError, TypeError):
        return None
