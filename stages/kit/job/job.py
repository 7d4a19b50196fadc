"""One job from its first to its last act: a clean output folder, one process at a time, a manifest
when all went well.

    plan = load(args.params, args.results)
    with running(plan.jobs["pretrain/mae-s0"], plan) as run:
        ...  # write into run.out, keep checkpoints in run.work, fill run.summary

`manifest.json` is written last and atomically, so an output folder with one is complete and one
without is not. Work in progress lives in `work/<fingerprint>/` beside the results, where no engine
deletes it and only an identical job finds it. Imports torch only when a device is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.kit.job.device import choose_device, locked
from stages.kit.job.files import JobError, disk_full, is_full, sha256, write_atomic, write_json
from stages.kit.job.provenance import environment, git_state, peak_mb
from stages.kit.job.track import tracked

__all__ = ["JobError", "Run", "command", "running", "sha256", "write_atomic", "write_json"]

# No library may report home about a run; set before any of them is imported.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)


def _show(kind, error, trace, default=sys.excepthook) -> None:
    """Errors meant for the user (`plain`) are shown as their message alone; all others as Python
    does.
    """
    if getattr(error, "plain", False):
        print(f"error: {error}", file=sys.stderr)
    else:
        default(kind, error, trace)


sys.excepthook = _show


# --------------------------------------------------------------------------------------------------------
# run


@dataclass
class Run:
    """A job that is running. Fill `summary` with a few numbers: they go into the manifest and the
    line printed.
    """

    job: Any
    plan: Any
    out: Path
    work: Path
    compute: dict
    summary: dict = field(default_factory=dict)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @cached_property
    def device(self):
        """The torch.device to use, chosen (and with several GPUs locked for this job) when first
        asked for.
        """
        return choose_device(self.compute["device"], self._held)

    def input(self, id: str) -> Path:
        """The output folder of an input job. JobError when that job has not finished, or was
        another one than this plan's: the manifest to be written says that the input is this plan's.
        """
        if id not in self.job.inputs:
            raise KeyError(f"{id} is not among the inputs {self.job.inputs} of {self.job.id}")
        source = self.plan.jobs[id]
        found = (self.plan.manifest(id) or {}).get("fingerprint")
        if found != source.fingerprint:
            state = f"is out of date (fingerprint {str(found)[:12]}, expected {source.fingerprint[:12]})"
            raise JobError(f"{self.job.id} needs {id}, but {source.manifest} "
                           f"{state if source.manifest.is_file() else 'does not exist'}: run "
                           f"`snakemake --cores all {source.manifest}` or "
                           f"`{command(source)}` first")  # fmt: skip
        return source.output


def command(job) -> str:
    """The command that runs a job, as both engines call it."""
    names = {"target": ["--name"], "pretrain": ["--run"], "transfer": ["--run", "--task"]}.get(
        job.stage, []
    )
    return " ".join(
        [
            "python",
            "-m",
            f"stages.{job.stage}",
            *(f"{o} {v}" for o, v in zip(names, job.name.split("/"))),
        ]
    )


@contextlib.contextmanager
def running(job, plan):
    """Run a job of a plan: yields its Run; on a normal end writes the manifest, else leaves none.

    Under torchrun only rank 0 touches the output folder; the others wait until it is clean. An
    exception, SIGTERM and SIGINT (as SystemExit 143 and 130) pass through; the work folder stays
    for the next attempt. JobError when the same job is running already, and when the disk is full:
    the output folder is then emptied, so that no half-written file stands under its final name.
    """
    main, began, clock = _rank() == 0, datetime.now(UTC), time.monotonic()
    work = plan.results.parent / "work" / job.fingerprint
    with contextlib.ExitStack() as held:
        run = Run(job, plan, job.output, work, dict(plan.compute), _held=held)
        held.enter_context(_terminable())
        if main:
            held.enter_context(_alone(job, plan))
            with _space(work):
                _clear(job.output)
                work.mkdir(parents=True, exist_ok=True)
        _barrier()
        _set_threads(run.compute["threads"])
        if main:
            held.enter_context(tracked(run))
        with _space(run.out, empty=main):
            yield run
            _barrier()
            if main:
                _finish(run, began, time.monotonic() - clock)


def _finish(run: Run, began: datetime, wall: float) -> None:
    """The last act: manifest, work folder away, one line for the terminal."""
    job, out = run.job, run.out
    files = sorted(p for p in out.rglob("*") if p.is_file())
    manifest = {
        "job": job.id,
        "stage": job.stage,
        "name": job.name,
        "fingerprint": job.fingerprint,
        "params": job.params,
        "code": job.hashes,
        "inputs": {i: run.plan.jobs[i].fingerprint for i in job.inputs},
        "outputs": {p.relative_to(out).as_posix(): sha256(p) for p in files},
        "environment": environment(),
        "git": git_state(run.plan.root),
        "wall_s": round(wall, 3),
        "peak_memory_mb": round(peak_mb()),
        "device": str(run.__dict__.get("device", "none")),
        "threads": _threads(run.compute["threads"]),
        "summary": run.summary,
        "created": began.isoformat(timespec="seconds"),
    }
    write_json(job.manifest, manifest)
    shutil.rmtree(run.work, ignore_errors=True)
    shown = " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
        for k, v in run.summary.items()
        if not isinstance(v, (dict, list))
    )
    print(
        f"{job.id}: {shown + ' ' if shown else ''}({wall:.1f} s, {manifest['peak_memory_mb']} MB)",
        flush=True,
    )


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
def _space(path: Path, empty: bool = False):
    """A full disk anywhere inside becomes a JobError that says so, and if asked for `path` becomes
    an empty folder.
    """
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
def _terminable():
    """SIGTERM and SIGINT end the job like an exception, so that temporary files go and locks open.
    Inside, the loop may do better.
    """
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    if threading.current_thread() is not threading.main_thread():
        defaults = {}
    ours = {number: old for number, old in defaults.items() if signal.getsignal(number) == old}
    for number in ours:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, old in ours.items():
            signal.signal(number, old)


# ------------------------------------------------------------------------------------------------------
# locks


@contextlib.contextmanager
def _alone(job, plan):
    """One process per job and results folder; the lock ends with the process, however that ends."""
    folder = plan.results.parent / "work" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = locked(
        folder / f"{hashlib.sha256(str(job.output.resolve()).encode()).hexdigest()[:16]}.lock"
    )
    if file is None:
        raise JobError(
            f"{job.id} is running already in another process on {job.output}; wait for it or stop it"
        )
    with file:
        yield


# ------------------------------------------------------------------------------------- processes


def _rank() -> int:
    return int(os.environ.get("RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0


def _barrier() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from stages.kit import dist

        dist.barrier()


def _set_threads(wanted: int | None) -> None:
    """`wanted` are those of the job; its processes share them."""
    if wanted:
        wanted = max(1, wanted // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        os.environ["OMP_NUM_THREADS"] = str(wanted)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(wanted)


def _threads(wanted: int | None) -> int:
    torch = sys.modules.get("torch")
    return (
        torch.get_num_threads()
        if torch
        else wanted or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    )
