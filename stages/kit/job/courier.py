"""The courier: the background process that brings an outbox of kit/job/track.py to MLflow.

    python -m stages.kit.job.courier --replay     sends now what is left in work/track

A job starts the courier, one per outbox. It follows the history of every job that runs, delivers
what jobs leave, and goes when no job has been running for a while. Nothing else imports mlflow.

What has arrived is known by MLflow alone: a run is found by its tag `entry`, and its tag `step` is
the last step of the history that was sent. So a delivery can be broken off and repeated at any
point, by any process and into any store. An entry is removed when all of it has arrived.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.kit.job import links, models, rows
from stages.kit.job.told import SHARED, read
from stages.kit.job.track import ADDRESSES, entries, held, now, store_uri
from stages.kit.settings import flat
from workflow.files import write_changed

EVERY = 5.0  # seconds between two looks at the history of a running job
RETRY = 4.0  # seconds until what failed is tried again
BATCH = 1000  # metrics in one request, MLflow's limit
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # else a deleted file is written to for ever
}


# ------------------------------------------------------------------------------------ when to send


def serve(outbox: Path, idle: float) -> None:
    """Sends until no job has been running, and nothing could be sent, for `idle` seconds."""
    os.nice(5)
    later: dict = {}
    with (outbox / "courier.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another courier is at work
        quiet = time.monotonic()
        while outbox.is_dir() and (began := time.monotonic()) - quiet < idle:
            busy = send(outbox, later)
            time.sleep(min(1.0, max(0.1, 5 * (time.monotonic() - began))))
            quiet = time.monotonic() if busy else quiet
    # a job that saw the lock a moment ago has started no courier
    if any((entry, held(entry / "note.json")) not in later for entry in entries(outbox)):
        serve(outbox, idle)


def send(outbox: Path, later: dict, uri: str | None = None) -> bool:
    """One round through the outbox. True if a job is running or something was sent.

    later: when to try each entry again; the caller keeps it from round to round. uri: a store for
    what jobs that are over have left, instead of the noted ones. Why an entry could not be sent is
    written to its file `error`; it holds up no other.
    """
    busy, down = False, set()
    for entry in entries(outbox):
        began, alive, place = time.monotonic(), held(entry / "note.json"), None
        busy |= alive
        if later.get((entry, alive), 0) > began or (alive and uri):
            continue
        try:
            note = json.loads((entry / "note.json").read_text())
            place = uri or store_uri(outbox.parents[1], note["uri"]), note["experiment"]
            if place in down:
                raise ConnectionError(f"{place[0]} has failed a moment ago")
            with _alone(place[0]):
                if entry.is_dir():  # else another process has sent it meanwhile
                    down.add(place)  # until it has answered
                    store = connect(*place)
                    down.remove(place)
                    _note_address(outbox, *place, store[1])
                    _deliver(entry, note, store, alive)
            (entry / "error").unlink(missing_ok=True)
            # reading a long history may take a twentieth of the time
            wait, busy = max(EVERY, 20 * (time.monotonic() - began)), True
        except Exception as error:
            wait = RETRY
            with suppress(OSError):
                (entry / "error").write_text(f"{type(error).__name__}: {_said(error, place)}")
        later[entry, alive] = time.monotonic() + wait
    return busy


def _note_address(outbox: Path, uri: str, experiment: str, number: str) -> None:
    """Keeps where an experiment is to be seen, for a report's links (kit/job/track.py)."""
    if uri.startswith(("http://", "https://")):
        known = read(outbox / ADDRESSES)
        known[f"{uri} {experiment}"] = f"{uri.rstrip('/')}/#/experiments/{number}"
        write_changed(outbox / ADDRESSES, json.dumps(known, indent=1))


def _said(error: Exception, place: tuple[str, str] | None) -> str:
    """An error's text. MLflow's advice on an outdated store gets the path of a SQLite file."""
    text = str(error)[:500]
    if place and _file(place[0]):
        text = text.replace("<database_uri>", place[0])
    return text


def replay(outbox: Path, uri: str | None = None) -> tuple[int, list[str]]:
    """Sends what jobs that are over have left: how many arrived, and why each other one did not."""
    waiting = [entry for entry in entries(outbox) if not held(entry / "note.json")]
    names = {entry: read(entry / "note.json").get("name", entry.name) for entry in waiting}
    send(outbox, {}, uri)
    left = [entry for entry in waiting if entry.exists()]
    reasons = [f"{names[entry]}: {(entry / 'error').read_text()}" for entry in left]
    return len(waiting) - len(left), reasons


# ------------------------------------------------------------------------------------ what to send


def connect(uri: str, experiment: str):
    """(client, experiment id) of a store; the experiment is created if missing."""
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    artifacts = None
    if (base := _file(uri)) is not None:  # MLflow would take the working directory of the moment
        artifacts = (base.parent / "mlruns" / experiment).as_uri()
        with suppress(sqlite3.OperationalError):  # no tables yet, or in use
            follow(base)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found and found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    number = found.experiment_id if found else client.create_experiment(experiment, artifacts)
    for key, value in rows.EXPERIMENT.items():
        if not found or key not in found.tags:  # what a person has written stays
            client.set_experiment_tag(number, key, value)
    return client, number


def follow(base: Path) -> None:
    """Corrects the paths of artifacts in a SQLite store whose project was moved or copied.

    Artifacts lie in `mlruns` beside the store, and MLflow knows them by their whole path. What does
    not lie there, because a person has chosen another place, stays as it is.
    """
    if not base.is_file():
        return
    with closing(sqlite3.connect(base)) as store, store:
        experiments = "SELECT experiment_id, artifact_location FROM experiments"
        for number, old in store.execute(experiments).fetchall():
            place = Path(unquote(urlsplit(old or "").path))
            if not (old or "").startswith("file:///") or "mlruns" not in place.parts:
                continue
            at = len(place.parts) - place.parts[::-1].index("mlruns")
            here = base.parent.joinpath("mlruns", *place.parts[at:])
            if here == place or (place.exists() and not here.exists()):
                continue
            new, length = here.as_uri(), len(old)
            for table, key in (("runs", "artifact_uri"), ("logged_models", "artifact_location")):
                where = f"WHERE experiment_id = ? AND substr({key}, 1, ?) = ?"
                moved = f"UPDATE {table} SET {key} = ? || substr({key}, ?) {where}"
                store.execute(moved, (new, length + 1, number, length, old))
            moved = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
            store.execute(moved, (new, number))


def _deliver(entry: Path, note: dict, store: tuple, alive: bool) -> None:
    """Sends what the entry has and MLflow lacks; removes the entry when its job is over."""
    client, experiment = store
    files, work = entry / "files", Path(note["work"])
    if not work.is_dir():  # the project was moved
        work = entry.parents[1] / work.name
    run = _run(note, *store)
    settled = alive and run and run.info.status == "RUNNING" and "step" in run.data.tags
    if not settled:
        group = note.get("group", SHARED)
        row = rows.row(client, experiment, group, note["start"])
        run = run or _new_run(note, client, experiment, row)
        if "step" not in run.data.tags:
            _describe(client, run.info.run_id, row, note)
        if alive and run.info.status != "RUNNING":  # it was killed and goes on
            client.update_run(run.info.run_id, "RUNNING")
    number, step = run.info.run_id, int(run.data.tags.get("step", -1))
    lines = rows_after(files / "history.jsonl", step) or rows_after(work / "history.jsonl", step)
    step = _send_history(client, number, lines, step)
    if not alive:
        if files.is_dir():
            _send_results(client, experiment, run, note, files, max(step, 0))
        status = note.get("status", "KILLED")
        if status == "FINISHED" or run.info.status != "FINISHED":  # a later attempt may be there
            client.set_terminated(number, status, note.get("end", now()))
    if not settled:
        rows.sum_up(client, experiment, row, group)
    if not alive:
        shutil.rmtree(entry)


def _run(note: dict, client, experiment: str):
    """The MLflow run of an entry, that of an earlier attempt or delivery; None if there is none."""
    found = client.search_runs([experiment], f"tags.entry = '{note['mark']}'", max_results=1)
    return found[0] if found else None


def _new_run(note: dict, client, experiment: str, row):
    tags = {"mlflow.parentRunId": row.info.run_id, "entry": note["mark"]}
    tags["group"] = row.data.tags["group"]
    tags["mlflow.note.content"] = rows.about_job(experiment, note)
    tags |= {key: _text(value) for key, value in note["tags"].items()}
    return client.create_run(experiment, note["start"], tags, run_name=note["name"])


def _describe(client, run: str, row, note: dict) -> None:
    """Parameters and data set of a new run; the data set is that of its row, too."""
    _send_params(client, run, note["params"])
    above = [row.info.run_id] if row.data.tags["stage"] == "run" else []
    rows.log_data(client, [run, *above], note)
    client.set_tag(run, "step", -1)


def _send_params(client, run: str, values: dict) -> None:
    from mlflow.entities import Param

    params = {_key(key): _text(value) for key, value in values.items()}
    params = [Param(key, value) for key, value in params.items()]
    for at in range(0, len(params), 100):
        client.log_batch(run, params=params[at : at + 100])


def _send_history(client, run: str, rows: list[dict], step: int) -> int:
    """Sends rows in batches, each of which notes how far it goes; the last step, `step` if none."""
    from mlflow.entities import Metric, RunTag

    moment = now()
    metrics = [
        Metric(_key(key), value, moment, int(row["step"]))
        for row in rows
        for key, value in numbers(row).items()
        if key != "step"
    ]
    for at in range(0, len(metrics), BATCH):
        batch, rest = metrics[at : at + BATCH], metrics[at + BATCH :]
        # a row that is cut in two counts as sent with its second half
        step = rest[0].step - 1 if rest else batch[-1].step
        client.log_batch(run, metrics=batch, tags=[RunTag("step", str(step))])
    return step


def _send_results(client, experiment: str, run, note: dict, files: Path, step: int) -> None:
    """What the files of a job that is over hold: numbers, tags, a data set, an encoder."""
    from mlflow.entities import Metric, RunTag

    manifest, data = read(files / "manifest.json"), read(files / "data.json")
    results, protocol = split(read(files / "metrics.json"), note["params"])
    found = numbers(manifest.get("summary"))
    found |= numbers({key: manifest.get(key) for key in ("wall_s", "peak_memory_mb")})
    found |= results | numbers(read(files / "health.json"))
    metrics = [Metric(_key(key), value, now(), step) for key, value in found.items()]
    spent = numbers(note.get("cost")).items()
    metrics += [Metric(f"cost/{key}", value, now(), 0) for key, value in spent]
    number, task = run.info.run_id, note["tags"].get("task")
    headline = read(files / "metrics.json").get("headline") or {}
    if task and headline.get("key") in results:
        model = models.newest(client, experiment, note["tags"]["group"])
        name, value = f"score/{_key(task)}", results[headline["key"]]
        of = {"model_id": model.model_id} if model else {}
        metrics.append(Metric(name, value, now(), 0, **of))
    tags = {"device": manifest.get("device"), "data_hash": data.get("hash")}
    tags |= {"headline": f"{headline['label']} ({headline['key']})"} if headline else {}
    tags = [RunTag(key, _text(value)) for key, value in tags.items() if value]
    _send_params(client, number, {f"protocol.{key}": value for key, value in protocol.items()})
    client.log_batch(number, metrics=metrics[: BATCH - len(tags)], tags=tags)
    if data:
        made = {"hash": data["hash"], "source": data["source"]}
        rows.log_data(client, [number], {"tags": note["tags"], "data": made})
    for path in sorted(files.iterdir()):
        if path.is_file():
            client.log_artifact(number, str(path))
        elif path.name != "encoder":
            client.log_artifacts(number, str(path), path.name)
        elif note.get("status") == "FINISHED":
            models.log(client, experiment, run, note, path)


def split(metrics: dict, params: dict) -> tuple[dict[str, float], dict]:
    """(results, settings) among the values of a metrics.json.

    Results are fractions, so they are floats. A float is a setting, too, if the job's parameters
    have its name, or the plural of it of which it was chosen: lr, cls_lr, layer_decay.
    """
    known = {key.rpartition(".")[2] for key in params}
    found = {key: value for key, value in flat(metrics).items() if "headline." not in key}

    def is_setting(key: str) -> bool:
        return any({name, f"{name}s"} & known for name in (key, key.rpartition("_")[2]))

    results = {
        key: value
        for key, value in numbers({k: v for k, v in found.items() if type(v) is float}).items()
        if not is_setting(key)
    }
    kinds = (bool, int, float, str)
    told = {"run", "method", "task", "kind", "seed"} | set(results)
    settings = {k: v for k, v in found.items() if isinstance(v, kinds) and k not in told}
    return results, settings


def rows_after(path: Path, after: int) -> list[dict]:
    """Rows of a history after a step; a line that is half written waits for the next look."""
    rows, text = [], path.read_text() if path.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if int(row["step"]) > after:
                rows.append(row)
    return rows


def numbers(value) -> dict[str, float]:
    """The finite numbers in nested dicts, by dotted key."""
    found = flat(value) if isinstance(value, dict) else {}
    kinds = (int, float)
    return {key: float(x) for key, x in found.items() if isinstance(x, kinds) and math.isfinite(x)}


def _key(key: str) -> str:
    """A key as MLflow allows it: letters, digits, _ - . and space, and at most 250 of them.

    MLflow allows a / as well, which makes groups of charts; we keep it for our own.
    """
    return re.sub(r"[^\w\-. ]", "_", key).strip(".")[:250] or "_"


def _text(value) -> str:
    """A value as MLflow allows it: without the lone surrogates of odd file names, not too long."""
    return str(value).encode(errors="replace").decode()[:5000]


def _file(uri: str) -> Path | None:
    """The file of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def _alone(uri: str):
    """One process of this machine at a time talks to a store.

    When two start on a fresh SQLite file, MLflow's migration breaks it for good (seen with 3.17).
    """
    base = _file(uri) or Path(tempfile.gettempdir()) / f"mimlab-{os.getuid()}"
    base.parent.mkdir(parents=True, exist_ok=True)
    with base.with_name(f"{base.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pages(base: Path) -> list[tuple[str, str]]:
    """(name, address below a server's) of the experiments in a SQLite store that have rows."""
    query = (
        "SELECT name, experiment_id FROM experiments JOIN experiment_tags USING (experiment_id) "
        "WHERE lifecycle_stage = 'active' AND key = ?"
    )
    with closing(sqlite3.connect(base)) as store, suppress(sqlite3.OperationalError):
        found = store.execute(query, (f"mlflow.sharedViewState.{links.VIEW}",)).fetchall()
        return [(name, f"#/experiments/{number}/{links.rows()}") for name, number in found]
    return []


def main(argv: list[str] | None = None) -> int:
    """--replay: send what jobs could not send, and say what is left. 1 if something is."""
    parser = argparse.ArgumentParser("python -m stages.kit.job.courier", description=main.__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--replay", action="store_true", help="send what jobs could not send")
    what.add_argument("--serve", nargs=2, metavar=("OUTBOX", "IDLE"), help="as a job starts it")
    parser.add_argument("--page", help="also say where a server at this address shows the results")
    parser.add_argument("--uri", help="another store than those that the jobs have noted")
    parser.add_argument("--work", type=Path, default="work", help="work folder (default: work)")
    given = parser.parse_args(argv)
    if given.serve:
        serve(Path(given.serve[0]), float(given.serve[1]))
        return 0
    work = given.work.resolve()
    store = store_uri(work.parent, given.uri)
    if (base := _file(store)) and base.is_file():
        with _alone(store), suppress(sqlite3.OperationalError):
            follow(base)  # even if nothing is to be sent
    done, left = replay(work / "track", given.uri and store)
    print(f"tracking: {done} delivered, {len(left)} left", *left, sep="\n  ")
    if given.page and base and base.is_file():
        print(*(f"{name}: {given.page}/{at}" for name, at in pages(base)), sep="\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
