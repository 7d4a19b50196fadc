"""One job from first to last: a clean output folder, one process, a manifest at the end.

    plan = load(args.params, args.results)
    with running(plan.jobs["pretrain/mae-s0"], plan) as run:
        ...  # write into run.out, keep checkpoints in run.work, fill run.summary

`manifest.json` is written last and atomically: an output folder that has one is complete, one that
has none is not. Work in progress lies in `work/<fingerprint>/` beside the results. No engine
deletes that folder, and only an identical job finds it. Imports torch only when a device is asked
for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from stages.kit.job.device import choose_device, locked
from stages.kit.job.orphan import left_behind, sign
from stages.kit.job.process import barrier, rank, set_threads, terminable, threads, world
from stages.kit.job.provenance import environment, git_state, peak_mb
from stages.kit.job.shelter import remove, sheltered
from stages.kit.job.takeover import facts, restored
from stages.kit.job.track import tracked
from workflow import progress
from workflow.engines import dvc
from workflow.files import JobError, disk_full, is_full, sha256, write_atomic, write_json
from workflow.manifest import Manifest
from workflow.plan import Job, Plan, kept
from workflow.plan.digest import of_value

__all__ = [
    "JobError",
    "Run",
    "alone",
    "running",
    "sha256",
    "take_over",
    "write_atomic",
    "write_json",
]


@dataclass
class Run:
    """A job that is running.

    out: the output folder; work: the folder for checkpoints; compute: the section of params.yaml;
    summary: a few numbers for the manifest and for the line that is printed at the end; content:
    {path: hash} of the outputs -> what of them the jobs below may read, as JSON; given: its inputs
    as they were when it began; refused: why the job must not finish, although all its outputs are
    written: they are set aside (workflow/plan/kept.py).
    """

    job: Job
    plan: Plan
    out: Path
    work: Path
    compute: dict
    summary: dict = field(default_factory=dict)
    content: Callable[[dict[str, str]], object] = dict
    given: dict = field(default_factory=dict)
    refused: str = ""
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @cached_property
    def device(self):
        """The torch.device to use. It is chosen, and a GPU locked, when it is first asked for."""
        return choose_device(self.compute["device"], self._held)

    @property
    def device_name(self) -> str:
        """The device that the job has asked for so far, "none" if it has not."""
        return str(self.__dict__.get("device", "none"))

    def input(self, role: str) -> Path:
        """The output folder of the input with this role, such as "data" or "encoder".

        KeyError if the job has no such input. JobError if that input is not finished, or was made
        by another plan: the manifest to be written says that it is this plan's.
        """
        source = self.plan.jobs[self.job.inputs[role]]
        manifest = self.plan.manifest(source.id)
        if manifest is not None and manifest.fingerprint == source.fingerprint:
            return source.output
        state = "does not exist"
        if manifest is not None:
            made, expected = manifest.fingerprint[:12], source.fingerprint[:12]
            state = f"is out of date (fingerprint {made}, expected {expected})"
        raise JobError(
            f"{self.job.id} needs {source.id}, but {source.manifest} {state}: run "
            f"`snakemake --cores all {source.manifest}` or `{source.command}` first"
        )


@contextlib.contextmanager
def running(job: Job, plan: Plan, mine: bool = False):
    """Run a job of a plan: yields its Run, and on a normal end writes the manifest.

    mine: this process is `alone` with the job already.

    Under torchrun only rank 0 touches the output folder; the others wait until it is clean. An
    exception passes through, as do SIGTERM and SIGINT (as SystemExit 143 and 130); then there is no
    manifest, and the work folder stays for the next attempt. JobError when the same job is running
    already, and when the disk is full: the output folder is then emptied, so that no half-written
    file stands under its final name.
    """
    main, began, clock = rank() == 0, datetime.now(UTC), time.monotonic()
    with contextlib.ExitStack() as held:
        run = _run(job, plan, held)
        held.enter_context(terminable())
        if main:
            if not mine:
                held.enter_context(alone(job, plan))
            held.enter_context(sheltered(run.work))
            with _told_if_full(run.work):
                _clear(job.output)
                run.work.mkdir(parents=True, exist_ok=True)
            held.enter_context(progress.shown(run.work, job.id))
        barrier()
        set_threads(run.compute["threads"])
        if main:
            held.enter_context(tracked(run))
        with _told_if_full(run.out, empty=main):
            yield run
            barrier()
            if main:
                _finish(run, began, time.monotonic() - clock)


def take_over(job: Job, plan: Plan) -> bool:
    """Finish a job with what it made before, if it would make the same again; True if it did.

    Else its output folder is as it was, or empty. The process has to be `alone` with the job.
    """
    with contextlib.ExitStack() as held:
        run = _run(job, plan, held)
        held.enter_context(sheltered(run.work))
        kept.keep(job, plan)  # where no engine has asked the plan before
        old = kept.same(job, plan)
        if old is None:
            return False
        with _told_if_full(run.out, empty=True):
            _clear(run.out)
            if not restored(old, kept.place(job, plan), run.out):
                return False
            run.work.mkdir(parents=True, exist_ok=True)
            with tracked(run):
                manifest = plan.finished(job.id, run.given, **facts(old))
                _done(run, manifest)
    print(manifest.line, flush=True)
    return True


def _run(job: Job, plan: Plan, held: contextlib.ExitStack) -> Run:
    work = plan.results.parent / "work" / job.fingerprint
    given = plan.given(job.id)
    return Run(job, plan, job.output, work, dict(plan.compute), given=given, _held=held)


def _finish(run: Run, began: datetime, wall: float) -> None:
    """The last act: the manifest is written, the work folder goes, one line is printed."""
    job, out = run.job, run.out
    files = sorted(path for path in out.rglob("*") if path.is_file())
    outputs = {path.relative_to(out).as_posix(): sha256(path) for path in files}
    manifest = run.plan.finished(
        job.id,
        run.given,
        outputs=outputs,
        content=of_value(run.content(outputs)),
        environment=environment(),
        git=git_state(run.plan.root),
        wall_s=round(wall, 3),
        peak_memory_mb=round(peak_mb()),
        device=run.device_name,
        threads=threads(run.compute["threads"]),
        summary=run.summary,
        created=began.isoformat(timespec="seconds"),
    )
    if run.refused:
        kept.refuse(job, run.plan, manifest)
        raise JobError(run.refused)
    _done(run, manifest)
    print(manifest.line, flush=True)


def _done(run: Run, manifest: Manifest) -> None:
    """The manifest is written; then what only helped until here goes."""
    write_atomic(run.job.manifest, manifest.text())
    dvc.note(run.job, run.plan)
    kept.forget(run.job, run.plan)
    remove(run.work)


def _clear(folder: Path) -> None:
    """Empty an output folder, the manifest first: from then on it counts as incomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def _told_if_full(path: Path, empty: bool = False):
    """Turn any error of a full disk into a JobError that says so; `empty`: then empty `path`."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        if empty:
            _clear(path)
        if isinstance(error, JobError):
            raise
        raise disk_full(Path(getattr(error, "filename", None) or path), error) from error


@contextlib.contextmanager
def alone(job: Job, plan: Plan):
    """One process per job and results folder; the lock ends with the process, however that ends.

    A process that its engine has left behind, since the engine was killed, is waited for. If it
    has finished the job, nothing is left to do: SystemExit with status 0.
    """
    folder = plan.results.parent / "work" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(job.output.resolve())).hexdigest()[:16]
    path, waited = folder / f"{name}.lock", False
    while (file := locked(path)) is None:
        holder = left_behind(path)
        if holder is None:
            raise JobError(
                f"{job.id} is running already in another process on {job.output}; wait for it or "
                "stop it"
            )
        if not waited:
            said = f"{job.id}: waiting for process {holder}, which does it and lost its engine"
            print(said, file=sys.stderr, flush=True)
        waited = True
        time.sleep(0.2)
    with file:
        if waited and world() == 1 and plan.fresh(job.id):
            print(f"{job.id}: finished by the process that was waited for", flush=True)
            raise SystemExit(0)
        sign(path)
        yield
