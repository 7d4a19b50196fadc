"""Tracking in MLflow that training neither waits for nor dies of: the side of the job.

A job never talks to MLflow. It leaves an entry in an outbox, `work/track/<time>-<fingerprint>/`,
and a background process, kit/job/courier.py, delivers it. So a dead server, a locked data base and
MLflow's own start of some seconds cost a job nothing. What could not be sent stays in the outbox.
The courier of a later job sends it, or `python -m stages.kit.job.courier --replay`.

An entry holds:
- note.json: what there is to say about the job (kit/job/told.py). The job's process holds a lock on
  it while it lives. A note without a status that nobody holds is therefore a killed job's.
- files/: what is kept of a job that is over, as hard links. They arrive even when the output folder
  holds another job by then.
- error: why the last delivery failed.

A job that is killed and resumed leaves two entries for the same MLflow run: its mark lies in
work/<fingerprint>/, which lives until the job has finished. A finished job that is run again gets a
new run with the same fingerprint. This file must not import anything slow.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from stages.kit.job import told
from workflow.files import write_json

IDLE = 10.0  # seconds without a running job after which the courier leaves
WAIT = 2.0  # seconds that a finished job waits for its delivery at most
ADDRESSES = "addresses.json"  # in the outbox: {"<store> <experiment>": its page on a server}
FILES = ("*.json*", "*.html", "summary.*", "pictures/*", "figures/*", "encoder/*")


@contextmanager
def tracked(run):
    """Lets MLflow know of the job inside; never raises itself. `run`: a Run of kit/job/job.py."""
    opened, status = None, "FAILED"
    with _harmless():
        opened = _open(run)
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        if opened:
            with _harmless():
                _close(run, *opened, "FINISHED" if run.job.manifest.is_file() else status)


def _open(run):
    """The job's new entry, its note and the file whose lock it holds; None if tracking is off."""
    if off(run):
        return None
    project = home(run.work.parent.resolve().parent)
    work = run.work.resolve()  # kit/job/shelter.py leads it out of a temporary workspace
    entry = project / "work" / "track" / f"{time.time_ns()}-{run.job.fingerprint[:16]}"
    entry.mkdir(parents=True)
    mark = work / "mlflow"
    if not mark.is_file() or not mark.read_text():
        mark.write_text(entry.name)
    note = {
        "mark": mark.read_text(),
        "name": run.job.id,
        "experiment": run.plan.experiment,
        "uri": chosen(run.compute.get("tracking_uri")),
        **told.story(run),
        "start": now(),
        "work": str(work),
    }
    write_json(entry / "new", note)
    lock = (entry / "new").open("r+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(entry / "new", entry / "note.json")
    _start_courier(entry.parent)
    return entry, note, lock


def _close(run, entry: Path, note: dict, lock, status: str) -> None:
    """Adds the files to the entry and puts the last note in the place of the locked one."""
    folder, patterns = (run.out, FILES) if status == "FINISHED" else (run.work, ["history.jsonl"])
    for path in (path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        place = entry / "files" / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:  # another disk
            shutil.copyfile(path, place)
    last = {"status": status, "end": now()}
    with _harmless():
        last["cost"] = told.cost(run)
    write_json(entry / "note.json", note | last)
    lock.close()
    _start_courier(entry.parent)
    end = time.monotonic() + WAIT
    # who is told to stop does not wait
    while status == "FINISHED" and entry.exists() and time.monotonic() < end:
        if (entry / "error").exists():
            raise RuntimeError((entry / "error").read_text())
        time.sleep(0.05)


def _start_courier(outbox: Path) -> None:
    """Starts the courier unless one is at work. It outlives the job, so its session is its own.

    It runs the project's code where it can: a temporary workspace may vanish before it has started.
    """
    if held(outbox / "courier.lock"):
        return
    places = [outbox.parents[1], Path(__file__).resolve().parents[3]]
    code = next(p for p in places if (p / "stages/kit/job/courier.py").is_file())
    path = [str(code), os.environ.get("PYTHONPATH")]
    with (outbox / "courier.log").open("a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "stages.kit.job.courier", "--serve", str(outbox), str(IDLE)],
            cwd=outbox,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextmanager
def _harmless():
    """Makes a warning of an error: no tracking is better than no training."""
    try:
        yield
    except Exception as error:
        hint = "the job is not affected; `python -m stages.kit.job.courier --replay` sends it later"
        print(f"warning: tracking: {error} ({hint})", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------- for both sides


def chosen(configured: str | None = None) -> str:
    """The store to use: `configured`, else MLFLOW_TRACKING_URI, else mlflow.db in the project.

    A path in it may be relative to the project: notes hold it so, and follow a moved project.
    """
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def store_uri(project: Path, configured: str | None = None) -> str:
    """The store that is `chosen`, with its whole path."""
    uri = chosen(configured)
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{(project / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def home(project: Path) -> Path:
    """The project; around a workspace of `dvc exp run --temp`, which will vanish, the real one."""
    above = (folder for folder in project.parents if folder.parts[-3:] == (".dvc", "tmp", "exps"))
    return next((folder.parents[2] for folder in above), project)


def page(run) -> str | None:
    """The page of a job's experiment on an MLflow server, None without one.

    It is there as soon as the courier has delivered anything. No job asks the server.
    """
    if off(run):
        return None
    known = told.read(home(run.work.resolve().parents[1]) / "work" / "track" / ADDRESSES)
    uri = chosen(run.compute.get("tracking_uri"))
    return known.get(f"{uri} {run.plan.experiment}")


def off(run) -> bool:
    """Whether a job is not tracked."""
    named = os.environ.get("MIMLAB_TRACKING", "").lower() in ("off", "0", "false", "no")
    return named or not run.compute.get("tracking", True)


def entries(outbox: Path) -> list[Path]:
    """The entries of an outbox, in the order in which their jobs started."""
    return sorted(note.parent for note in outbox.glob("*/note.json"))


def held(path: Path) -> bool:
    """Whether a living process holds the lock of this file."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)
