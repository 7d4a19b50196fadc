"""Tracking in MLflow that training neither waits for nor dies of.

A job never talks to MLflow. It keeps an entry in an outbox, `work/track/<fingerprint>-<n>/`, and
one small background process per outbox, kit/job/courier.py, delivers: it follows every running
job's history.jsonl, sends metrics in batches, closes runs, logs artifacts, and leaves when nothing
has been running for a while. So a dead server, a locked database or MLflow's own start-up (seconds)
cost a job nothing, and what could not be sent stays in the outbox until the next job's start or

    python -m stages.kit.job.track --replay     # send what is left (--uri URI: to another store
    than recorded) python -m stages.kit.job.track --init       # create the store now

An entry holds job.json (what to say, written by the job), sent.json (how much has been said,
written by the courier), lock (held by the job's process while it lives: a killed job is thereby
known as killed) and, once the job is over, a copy of history.jsonl. A job that is killed and
resumed continues its MLflow run; one that is run again gets a new run with the same fingerprint.

One MLflow experiment per `experiment` of params.yaml; its runs hang below one parent run. The
default store is SQLite, mlflow.db beside the results; `compute.tracking_uri` or MLFLOW_TRACKING_URI
name another one. `compute.tracking: false` or MIMLAB_TRACKING=off turn everything off. This file
must not import anything slow.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

IDLE = 10.0  # seconds without a running job after which the courier leaves
# seconds that a finished job waits for its delivery at most; the courier goes on without it
WAIT = 2.0
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}


# --------------------------------------------------------------------------------------------- the
# job's side


class Tracker:
    """One job's entry in the outbox; `close` it with "FINISHED", "FAILED" or "KILLED". Never
    raises.
    """

    def __init__(
        self, entry: Path | None = None, lock: int | None = None, job: dict | None = None, run=None
    ):
        self.entry, self._lock, self._job, self._run = entry, lock, job, run

    def close(self, status: str = "FINISHED") -> None:
        """Hands over what is left and waits at most `WAIT` seconds for its delivery; again: does
        nothing.
        """
        if self.entry is None:
            return
        entry, self.entry = self.entry, None
        try:
            for path in map(Path, self._job["history"]):
                if path.is_file():
                    shutil.copyfile(path, entry / "history.jsonl")
                    break
            facts = _results(self._run)
            self._job["tags"].update(facts.pop("tags"))
            write(entry / "job.json", self._job | facts | {"status": status, "end": now()})
            os.close(self._lock)
            if status == "FINISHED":  # who is told to stop has no time
                _await(entry)
        except (
            Exception
        ) as error:  # whatever goes wrong here, the job's result is on disk and stands
            _warn(f"{error.__class__.__name__}: {error}")


def start(run) -> Tracker:
    """Opens the entry of a job (`run` as given by kit/job/job.py) and sees to it that a courier is
    there.
    """
    off = os.environ.get("MIMLAB_TRACKING", "").lower() in ("off", "0", "false", "no")
    if off or not run.compute.get("tracking", True) or int(os.environ.get("RANK", 0)):
        return Tracker()
    try:
        project = run.work.resolve().parent.parent
        outbox = run.work.resolve().parent / "track"
        outbox.mkdir(parents=True, exist_ok=True)
        entry, lock = _open(outbox, run.job.fingerprint)
        history = [str(folder.resolve() / "history.jsonl") for folder in (run.work, run.out)]
        job = {
            "name": run.job.id,
            "experiment": run.plan.experiment,
            "uri": store_uri(project, run.compute.get("tracking_uri")),
            "fingerprint": run.job.fingerprint,
            "tags": _tags(run, project),
            "params": _flat(run.job.params),
            "start": now(),
            "out": str(run.out.resolve()),
            "work": str(run.work.resolve()),
            "history": [*history, str(entry / "history.jsonl")],
        }
        write(entry / "job.json", job)
        _courier(outbox)
        return Tracker(entry, lock, job, run)
    except Exception as error:  # no tracking is better than no training
        _warn(f"{error.__class__.__name__}: {error}")
        return Tracker()


def store_uri(project: Path, configured: str | None = None) -> str:
    """The store to use: `configured`, else MLFLOW_TRACKING_URI, else <project>/mlflow.db; absolute."""
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{(project / uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def _open(outbox: Path, fingerprint: str) -> tuple[Path, int]:
    """The entry of this fingerprint that was interrupted, else a new one; with its lock held."""
    taken = sorted(outbox.glob(f"{fingerprint[:16]}-*"))
    for entry in taken:
        interrupted = read(entry / "job.json").get("status") in (None, "KILLED")
        if interrupted and (lock := take(entry / "lock")) is not None:
            return entry, lock
    number = max((int(entry.name.rpartition("-")[2]) for entry in taken), default=0)
    while True:
        number += 1
        entry = outbox / f"{fingerprint[:16]}-{number}"
        with suppress(FileExistsError):
            entry.mkdir()
            return entry, take(entry / "lock")


def _tags(run, project: Path) -> dict[str, str]:
    params, job = run.job.params, run.job
    method, task, target = params.get("method"), params.get("task"), params.get("target")
    tags = {
        "job": job.id,
        "stage": job.stage,
        "run": params.get("run") or job.name,
        "fingerprint": job.fingerprint,
        "seed": params.get("seed"),
        "method": method["name"] if isinstance(method, dict) else method,
        "task": task["name"] if isinstance(task, dict) else task,
        "target": target.get("name") if isinstance(target, dict) else target,
        "mlflow.source.name": f"stages/{job.stage}.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER"),
    }
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(project), "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, timeout=3)
        tags |= {"git_commit": git.stdout.strip(), "mlflow.source.git.commit": git.stdout.strip()}
    tags |= _data(run)
    return {key: str(value) for key, value in tags.items() if value not in (None, "")}


def _data(run) -> dict[str, str]:
    """The data set's hash, as a tag; nothing before the data stage has ended."""
    job = run.plan.jobs.get("data")
    info = read(Path(job.output) / "data.json") if job else {}
    return (
        {"data_hash": str(info["hash"]), "data_source": str(info.get("source"))}
        if "hash" in info
        else {}
    )


def _results(run) -> dict:
    """What is known once a job is over: numbers of its summary, metrics, health and manifest."""
    manifest = read(run.out / "manifest.json")
    found = numbers(run.summary) | numbers(
        {key: manifest.get(key) for key in ("wall_s", "peak_memory_mb")}
    )
    for name in ("metrics.json", "health.json"):
        found |= numbers(read(run.out / name))
    tags = _data(run) | {"device": str(manifest.get("device", "unknown"))}
    if manifest.get("git"):
        tags["git_dirty"] = str(manifest["git"]["dirty"])
    return {"metrics": found, "tags": tags}


def _await(entry: Path) -> None:
    """Until the entry is delivered or cannot be, at most `WAIT` seconds."""
    for tick in range(int(WAIT / 0.05)):
        if not entry.exists() or read(entry / "sent.json").get("over"):
            return
        if (entry.parent / "error").exists():
            _warn((entry.parent / "error").read_text())
            return
        if tick % 20 == 0:
            _courier(entry.parent)
        time.sleep(0.05)


def _courier(outbox: Path) -> None:
    """Starts the courier unless one is at work. It outlives the job, so it has its own session and
    no GPU.
    """
    if held(outbox / "courier.lock"):
        return
    log = outbox / "courier.log"
    fresh = not log.exists() or log.stat().st_size > 1_000_000
    path = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    env = {
        **QUIET,
        **os.environ,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w" if fresh else "a") as stream:
        command = [sys.executable, "-m", "stages.kit.job.courier", str(outbox), str(IDLE)]
        subprocess.Popen(
            command,
            cwd=outbox,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


# ------------------------------------------------------------------------- small things, also for
# the courier


def now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def _warn(text: str) -> None:
    hint = "the job is not affected; `python -m stages.kit.job.track --replay` sends it later"
    print(f"tracking: {text.strip()} ({hint})", file=sys.stderr, flush=True)


def mlflow_name(key: str) -> str:
    """A key as MLflow allows it: letters, digits, _ - . space / and at most 250 of them."""
    return re.sub(r"[^\w\-. /]", "_", key)[:250]


def _flat(value, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay one value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def numbers(value) -> dict[str, float]:
    """The finite numbers in nested dicts, by dotted key."""
    flat = _flat(value) if isinstance(value, dict) and value else {}
    return {
        key: float(x) for key, x in flat.items() if isinstance(x, (int, float)) and math.isfinite(x)
    }


def read(path: Path) -> dict:
    """The object in a JSON file; empty when there is none."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def write(path: Path, value: dict) -> None:
    """A JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def take(path: Path, once: bool = False) -> int | None:
    """The file's exclusive lock as a descriptor (close it to let go), or None if somebody holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for attempt in range(1 if once else 5):  # who only looks whether it is held lets go at once
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0 if once else 0.01 * attempt)
    os.close(handle)
    return None


def held(path: Path) -> bool:
    """Does a living process hold this lock?"""
    lock = take(path, once=True)
    if lock is not None:
        os.close(lock)
    return lock is None


def main(argv: list[str] | None = None) -> int:
    """--init: create the store; --replay: send what jobs could not send."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.kit.job.track", description="MLflow tracking"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--init", action="store_true", help="create the store and leave")
    what.add_argument("--replay", action="store_true", help="send what jobs could not send")
    parser.add_argument(
        "--uri", help="default: MLFLOW_TRACKING_URI, else mlflow.db; --replay: as recorded"
    )
    parser.add_argument("--experiment", default="demo", help="experiment to create with --init")
    parser.add_argument(
        "--work", type=Path, default=Path("work"), help="work folder that holds the outbox"
    )
    given = parser.parse_args(argv)
    from stages.kit.job import courier

    if given.init:
        uri = store_uri(Path.cwd(), given.uri)
        if not Path(uri.removeprefix("sqlite:///")).is_file():
            courier.connect(uri, given.experiment)
        print(f"tracking: store {uri} is ready")
        return 0
    uri = store_uri(Path.cwd(), given.uri) if given.uri else None
    done, failures = courier.replay(given.work.resolve() / "track", uri)
    print(
        f"tracking: {done} delivered, {len(failures)} left"
        + "".join(f"\n  {line}" for line in failures)
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
