"""The courier: the background process that brings the outbox of kit/job/track.py to MLflow.

    python -m stages.kit.job.courier OUTBOX [IDLE]      (started by kit/job/track.py; ends by
    itself)

Nothing else imports mlflow. Delivery can be repeated: it continues after the last step sent, and
finds its MLflow run by a tag. A killed job's run is closed as KILLED but its entry stays while its
checkpoints do, so that the resumed job continues the same run. First use of a fresh SQLite file is
locked, as MLflow's schema migration breaks the file for good when two processes start it (measured
with 3.17).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.kit.job.track import IDLE, QUIET, held, mlflow_name, now, numbers, read, take, write

EVERY = 5.0  # seconds between two looks at a running job's history
RETRY = 30.0  # seconds until a store that failed is asked again
BATCH = 1000  # metrics per request, MLflow's limit
ARTIFACTS = (
    "manifest.json",
    "metrics.json",
    "health.json",
    "target.json",
    "data.json",
    "quarantine.jsonl",
    "index.html",
    "summary.*",
    "pictures/*",
    "figures/*",
    "encoder/*",
)


def courier(outbox: Path, idle: float = IDLE) -> None:
    """Delivers until no job has been running, and nothing could be sent, for `idle` seconds."""
    lock = take(outbox / "courier.lock", once=True)
    if lock is None:
        return
    os.nice(5)
    stores, failed, looked, quiet = {}, {}, {}, time.monotonic()
    while outbox.is_dir() and time.monotonic() - quiet < idle:
        busy = False
        for entry in entries(outbox):
            clock, job, alive = time.monotonic(), read(entry / "job.json"), held(entry / "lock")
            busy |= alive
            if clock - failed.get(job["uri"], -RETRY) < RETRY or (
                alive and clock - looked.get(entry, -EVERY) < EVERY
            ):
                continue
            looked[entry] = clock
            try:
                busy |= deliver(entry, stores)
                (outbox / "error").unlink(missing_ok=True)
            except Exception as error:
                failed[job["uri"]] = time.monotonic()
                stores.pop((job["uri"], job["experiment"]), None)
                text = f"{job['uri']}: {error.__class__.__name__}: {str(error)[:300]}"
                print(job["name"], text, flush=True)
                (outbox / "error").write_text(text)
        quiet = time.monotonic() if busy else quiet
        time.sleep(0.1)
    os.close(lock)


def deliver(entry: Path, stores: dict, uri: str | None = None) -> bool:
    """Sends what the entry has and MLflow lacks, removes it when its job is over. True if there was
    something.

    stores: open stores by (uri, experiment), kept by the caller. Raises whatever the store raises;
    call it again.
    """
    # the lock of a running job is its own; of any other, ours meanwhile
    lock = take(entry / "lock", once=True)
    try:
        job, sent = read(entry / "job.json"), read(entry / "sent.json")
        status = (job.get("status") or "KILLED") if lock is not None else None
        if not job or (status and sent.get("over")):
            if not Path(job.get("work", "")).is_dir() or not job:
                shutil.rmtree(
                    entry, ignore_errors=True
                )  # it was interrupted and now will not be resumed
            return False
        uri = uri or job["uri"]
        client, experiment, parent = stores.get((uri, job["experiment"])) or stores.setdefault(
            (uri, job["experiment"]), connect(uri, job["experiment"])
        )
        if sent.get("uri") != uri:
            sent = {"uri": uri, "step": -1}
        if "run" not in sent:
            sent["run"] = _create(client, experiment, parent, entry, job)
        if sent.pop("over", None):
            client.update_run(sent["run"], "RUNNING")
        write(entry / "sent.json", sent)
        news = _metrics(client, entry, job, sent)
        if status is None:
            return news
        _finish(client, job, sent, status)
        if status == "KILLED" and Path(job["work"]).is_dir():
            # kept, so that the resumed job continues this run
            write(entry / "sent.json", sent | {"over": True})
        else:
            shutil.rmtree(entry)
        return True
    finally:
        if lock is not None:
            os.close(lock)


def connect(uri: str, experiment: str):
    """(client, experiment id, parent run id) of a store, each created if missing; one process at a
    time.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    artifacts = None
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"mimlab-{os.getuid()}"
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent / "mlruns"
        # else MLflow takes the working directory of the moment
        artifacts = f"{folder.as_uri()}/{experiment}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            number = client.create_experiment(experiment, artifact_location=artifacts)
        else:
            number = found.experiment_id
            if found.lifecycle_stage != "active":
                client.restore_experiment(number)
        parents = client.search_runs(
            [number],
            "tags.stage = 'experiment'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        if not parents:
            tags = {"stage": "experiment", "experiment": experiment}
            parents = [client.create_run(number, run_name=experiment, tags=tags)]
            client.set_terminated(parents[0].info.run_id)
        return client, number, parents[0].info.run_id


def _create(client, experiment: str, parent: str, entry: Path, job: dict) -> str:
    """The id of the entry's MLflow run: found by its tag after an interrupted delivery, else
    created.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    mark = f"{entry.name}@{job['start']}"
    found = client.search_runs([experiment], f"tags.entry = '{mark}'", max_results=1)
    if found:
        return found[0].info.run_id
    tags = job["tags"] | {"mlflow.parentRunId": parent, "entry": mark}
    run = client.create_run(
        experiment, start_time=job["start"], tags=tags, run_name=job["name"]
    ).info.run_id
    params = [Param(mlflow_name(key), str(value)[:6000]) for key, value in job["params"].items()]
    for at in range(0, len(params), 100):
        client.log_batch(run, params=params[at : at + 100])
    if "data_hash" in job["tags"]:
        source = job["tags"]["data_source"]
        data = Dataset(
            source[:500], job["tags"]["data_hash"][:36], "local", json.dumps({"uri": source})
        )
        client.log_inputs(
            run, [DatasetInput(data, [InputTag("mlflow.data.context", job["tags"]["stage"])])]
        )
    return run


def _metrics(client, entry: Path, job: dict, sent: dict) -> bool:
    """Sends the history's rows after the last step sent, in batches; notes each batch in sent.json."""
    from mlflow.entities import Metric

    path = next(
        (p for p in map(Path, [str(entry / "history.jsonl"), *job["history"]]) if p.is_file()), None
    )
    rows, moment, batch = rows_after(path, sent["step"]) if path else [], now(), []
    for row in rows:
        step = int(row["step"])
        new = [
            Metric(mlflow_name(key), value, moment, step)
            for key, value in numbers(row).items()
            if key != "step"
        ]
        if batch and len(batch) + len(new) > BATCH:
            client.log_batch(sent["run"], metrics=batch)
            write(entry / "sent.json", sent)
            batch = []
        batch, sent["step"] = batch + new[:BATCH], step
    if batch:
        client.log_batch(sent["run"], metrics=batch)
        write(entry / "sent.json", sent)
    return bool(rows)


def _finish(client, job: dict, sent: dict, status: str) -> None:
    """Summary metrics, tags, artifacts (if the output is still this job's), final status."""
    from mlflow.entities import Metric, RunTag

    moment, step, run = now(), max(sent["step"], 0), sent["run"]
    metrics = [
        Metric(mlflow_name(key), value, moment, step)
        for key, value in job.get("metrics", {}).items()
    ]
    client.log_batch(
        run,
        metrics=metrics[:BATCH],
        tags=[RunTag(key, value[:5000]) for key, value in job["tags"].items()],
    )
    out = Path(job["out"])
    if (
        status == "FINISHED"
        and read(out / "manifest.json").get("fingerprint") == job["fingerprint"]
    ):
        for pattern in ARTIFACTS:
            for path in sorted(out.glob(pattern)):
                if path.is_file():
                    folder = path.parent.relative_to(out).as_posix()
                    client.log_artifact(run, str(path), None if folder == "." else folder)
    client.set_terminated(run, status, job.get("end") or moment)


def replay(outbox: Path, uri: str | None = None) -> tuple[int, list[str]]:
    """Delivers everything left by jobs that are over; (how many were delivered, one line per
    failure).
    """
    stores, done, failures = {}, 0, []
    for entry in entries(outbox):
        try:
            done += not held(entry / "lock") and deliver(entry, stores, uri)
        except Exception as error:
            name = read(entry / "job.json")["name"]
            failures.append(f"{name}: {error.__class__.__name__}: {str(error)[:300]}")
    return done, failures


def rows_after(path: Path, after: int) -> list[dict]:
    """Rows of a history after a step; the last line may be half written and then waits for the next
    look.
    """
    rows = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError, KeyError, TypeError):
            row = json.loads(line)
            if int(row["step"]) > after:
                rows.append(row)
    return rows


def entries(outbox: Path) -> list[Path]:
    return sorted(
        (path.parent for path in outbox.glob("*/job.json")),
        key=lambda entry: read(entry / "job.json").get("start", 0),
    )


@contextmanager
def _locked(path: Path):
    """Waits for a lock and holds it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    courier(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else IDLE)
