"""Tracking: what MLflow ends up with, and that no state of MLflow harms a job. The stores are real
SQLite.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.kit.job import courier, track

ROOT = Path(__file__).resolve().parents[1]
REFUSED = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("MIMLAB_TRACKING", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(track, "IDLE", 1.0)
    # a loaded machine imports mlflow slowly; the tests want to see the end
    monkeypatch.setattr(track, "WAIT", 40.0)


def make_run(folder: Path, name: str = "mae-s0", fingerprint: str = "f" * 64, **compute):
    """A run as kit/job/job.py gives it, with an output folder that holds a little of everything."""
    out, work = folder / "results" / "pretrain" / name, folder / "work" / fingerprint
    for path in (out / "pictures", out / "encoder", work, folder / "results" / "data"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "results" / "data" / "data.json").write_text(
        json.dumps({"hash": "d" * 64, "source": "shapes"})
    )
    (out / "pictures" / "masks.png").write_bytes(b"png")
    (out / "encoder" / "config.json").write_text("{}")
    (out / "manifest.json").write_text(
        json.dumps(
            {"fingerprint": fingerprint, "wall_s": 3.5, "git": {"commit": "c", "dirty": True}}
        )
    )
    job = SimpleNamespace(
        stage="pretrain",
        name=name,
        id=f"pretrain/{name}",
        fingerprint=fingerprint,
        params={"method": {"name": "mae", "config": {"mask_ratio": 0.75}}, "seed": 0, "run": "mae"},
    )
    plan = SimpleNamespace(
        experiment="demo", jobs={"data": SimpleNamespace(output=folder / "results" / "data")}
    )
    return SimpleNamespace(
        job=job,
        plan=plan,
        out=out,
        work=work,
        device="cpu",
        summary={"loss": 0.25},
        compute={"tracking": True, "tracking_uri": None, **compute},
    )


def write_history(path: Path, first: int, last: int) -> None:
    rows = [
        json.dumps({"step": s, "epoch": s / 10, "loss": 1 / (s + 1)}) for s in range(first, last)
    ]
    path.write_text("\n".join(rows) + "\n")


def client(folder: Path):
    return courier.connect(f"sqlite:///{folder}/mlflow.db", "demo")


def runs_of(folder: Path):
    found, experiment, parent = client(folder)
    return found, parent, [r for r in found.search_runs([experiment]) if r.info.run_id != parent]


def outbox(folder: Path) -> list[Path]:
    return sorted((folder / "work" / "track").glob("*/job.json"))


def test_a_job_in_mlflow(tmp_path):
    run = make_run(tmp_path)
    tracker = track.start(run)
    write_history(run.out / "history.jsonl", 0, 1200)
    tracker.close()
    tracker.close()  # harmless
    assert outbox(tmp_path) == []
    mlflow, parent, [found] = runs_of(tmp_path)
    assert found.info.status == "FINISHED" and found.info.run_name == "pretrain/mae-s0"
    tags = found.data.tags
    expected = {
        "stage": "pretrain",
        "method": "mae",
        "seed": "0",
        "run": "mae",
        "job": "pretrain/mae-s0",
        "git_dirty": "True",
        "fingerprint": "f" * 64,
        "data_hash": "d" * 64,
        "mlflow.parentRunId": parent,
    }
    assert {key: tags.get(key) for key in expected} == expected
    assert found.data.params["method.config.mask_ratio"] == "0.75"
    assert found.data.metrics["wall_s"] == 3.5
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as db:
        query = "select step, value from metrics where run_uuid = ? and key = 'epoch' order by step"
        rows = db.execute(query, (found.info.run_id,))
        # 2,400 points: three batches
        assert rows.fetchall() == [(s, pytest.approx(s / 10)) for s in range(1200)]
    assert {a.path for a in mlflow.list_artifacts(found.info.run_id)} == {
        "manifest.json",
        "pictures",
        "encoder",
    }
    assert [a.path for a in mlflow.list_artifacts(found.info.run_id, "encoder")] == [
        "encoder/config.json"
    ]
    assert found.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert (tmp_path / "mlruns" / "demo").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("mlflow.db")) == [
        "mlruns",
        "results",
        "work",
    ]

    again = track.start(run)  # the same job once more: a new run, known by its fingerprint
    again.close("FAILED")
    courier.replay(tmp_path / "work" / "track")
    _, parent_again, both = runs_of(tmp_path)
    assert parent_again == parent and len(both) == 2
    assert {r.data.tags["fingerprint"] for r in both} == {"f" * 64} and {
        r.info.status for r in both
    } == {"FINISHED", "FAILED"}


def test_a_dead_server_costs_nothing_and_is_replayed(tmp_path, capsys):
    run = make_run(tmp_path, tracking_uri=REFUSED)
    tracker = track.start(run)
    write_history(run.work / "history.jsonl", 0, 30)
    tracker.close()
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert len(outbox(tmp_path)) == 1
    (run.work / "history.jsonl").unlink()  # the entry keeps a copy
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert track.main(["--replay", "--work", str(tmp_path / "work")]) == 1
    assert track.main(["--replay", "--work", str(tmp_path / "work"), "--uri", store]) == 0
    assert "1 delivered, 0 left" in capsys.readouterr().out and outbox(tmp_path) == []
    mlflow, _, [found] = runs_of(tmp_path)
    assert (
        found.info.status == "FINISHED"
        and len(mlflow.get_metric_history(found.info.run_id, "epoch")) == 30
    )


def test_replay_ignores_an_output_that_is_no_longer_this_jobs(tmp_path):
    run = make_run(tmp_path, tracking_uri=REFUSED)
    entry, lock = track._open(_made(tmp_path / "work" / "track"), run.job.fingerprint)
    os.close(lock)
    track.write(entry / "job.json", _job(run, tmp_path) | {"status": "FINISHED", "end": 2})
    (run.out / "manifest.json").write_text(json.dumps({"fingerprint": "other"}))
    assert courier.replay(tmp_path / "work" / "track") == (1, [])
    mlflow, _, [found] = runs_of(tmp_path)
    assert mlflow.list_artifacts(found.info.run_id) == []


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _job(run, folder: Path) -> dict:
    return {
        "name": run.job.id,
        "experiment": "demo",
        "uri": f"sqlite:///{folder}/mlflow.db",
        "fingerprint": run.job.fingerprint,
        "tags": {"stage": "pretrain"},
        "params": {},
        "start": 1,
        "out": str(run.out),
        "work": str(run.work),
        "history": [str(run.work / "history.jsonl")],
    }


def test_killed_and_resumed_is_one_mlflow_run(tmp_path):
    """The lock of a killed job is free: its run is closed as KILLED; the resumed job goes on where
    it stood.
    """
    run, box, stores = make_run(tmp_path), _made(tmp_path / "work" / "track"), {}
    entry, lock = track._open(box, run.job.fingerprint)
    track.write(entry / "job.json", _job(run, tmp_path))
    write_history(run.work / "history.jsonl", 0, 20)
    courier.deliver(entry, stores)
    assert runs_of(tmp_path)[2][0].info.status == "RUNNING"
    os.close(lock)  # as the kernel does for a killed process
    courier.deliver(entry, stores)
    assert runs_of(tmp_path)[2][0].info.status == "KILLED" and not courier.deliver(entry, stores)
    resumed, lock = track._open(box, run.job.fingerprint)
    assert resumed == entry
    # the loop went back to a checkpoint and wrote the same rows again
    write_history(run.work / "history.jsonl", 0, 50)
    track.write(entry / "job.json", _job(run, tmp_path))
    courier.deliver(entry, stores)
    os.close(lock)
    track.write(entry / "job.json", _job(run, tmp_path) | {"status": "FINISHED", "end": 5})
    courier.deliver(entry, stores)
    mlflow, _, [found] = runs_of(tmp_path)
    assert found.info.status == "FINISHED" and not entry.exists()
    assert [m.step for m in mlflow.get_metric_history(found.info.run_id, "epoch")] == list(
        range(50)
    )


def test_an_interrupted_delivery_finds_its_run_again(tmp_path):
    run, box, stores = make_run(tmp_path), _made(tmp_path / "work" / "track"), {}
    entry, lock = track._open(box, run.job.fingerprint)
    track.write(entry / "job.json", _job(run, tmp_path))
    courier.deliver(entry, stores)
    (entry / "sent.json").unlink()  # the courier died between creating the run and noting it
    courier.deliver(entry, stores)
    os.close(lock)
    assert len(runs_of(tmp_path)[2]) == 1


def test_half_written_lines_wait(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert courier.rows_after(path, -1) == [{"step": 0, "loss": 1.0}]
    assert track.numbers(
        {"step": 3, "loss": float("nan"), "ok": True, "name": "x", "a": {"b": 2}}
    ) == {"step": 3, "ok": 1, "a.b": 2}


@pytest.mark.parametrize("how", ["params", "environment", "rank"])
def test_off(tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("MIMLAB_TRACKING", "off")
    if how == "rank":
        monkeypatch.setenv("RANK", "1")
    run = make_run(tmp_path, tracking=how != "params")
    track.start(run).close()
    assert not (tmp_path / "work" / "track").exists() and not (tmp_path / "mlflow.db").exists()


def test_a_broken_outbox_is_a_warning(tmp_path, capsys):
    run = make_run(tmp_path)
    (tmp_path / "work" / "track").write_text("a file where the folder should be")
    track.start(run).close()
    assert "tracking:" in capsys.readouterr().err


def test_store_uri(tmp_path, monkeypatch):
    assert track.store_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert track.store_uri(tmp_path, "sqlite:///x/y.db") == f"sqlite:///{tmp_path}/x/y.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert track.store_uri(tmp_path) == "http://server:5000"
    assert track.store_uri(tmp_path, "sqlite:////abs/y.db") == "sqlite:////abs/y.db"


JOB = """
import sys, signal
sys.path[:0] = [{root!r}, {tests!r}]
import test_track
from pathlib import Path
from stages.kit.job import track
track.IDLE, track.WAIT = 1.0, {wait}
run = test_track.make_run(Path({folder!r}), f"mae-s{{sys.argv[1]}}", sys.argv[1] * 64)
tracker = track.start(run)
print("started", "mlflow" in sys.modules, flush=True)
test_track.write_history(run.out / "history.jsonl", 0, 20)
{then}
"""


def spawn(folder: Path, number: int, then: str, wait: float = 60.0):
    code = JOB.format(
        root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), then=then, wait=wait
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(number)], stdout=subprocess.PIPE, text=True
    )


def test_eight_jobs_on_a_fresh_store(tmp_path):
    """Eight processes at once, no store yet: every run arrives whole, below one parent."""
    jobs = [spawn(tmp_path, n, "tracker.close()") for n in range(8)]
    assert [(job.communicate(timeout=120)[0], job.returncode) for job in jobs] == [
        ("started False\n", 0)
    ] * 8
    mlflow, parent, runs = runs_of(tmp_path)
    assert sorted(r.info.run_name for r in runs) == [f"pretrain/mae-s{n}" for n in range(8)]
    assert {(r.info.status, r.data.tags["mlflow.parentRunId"]) for r in runs} == {
        ("FINISHED", parent)
    }
    # 20 steps and the summary
    assert {len(mlflow.get_metric_history(r.info.run_id, "loss")) for r in runs} == {21}


def test_three_processes_create_one_store(tmp_path):
    """The locked first use itself: without the lock MLflow's migration leaves a broken file."""
    command = [
        sys.executable,
        "-m",
        "stages.kit.job.track",
        "--init",
        "--uri",
        f"sqlite:///{tmp_path}/mlflow.db",
    ]
    jobs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    found, experiment, parent = client(tmp_path)
    assert [r.info.run_id for r in found.search_runs([experiment])] == [parent]


def test_sigkill_is_noticed(tmp_path):
    job = spawn(tmp_path, 1, "import time; time.sleep(100)")
    job.stdout.readline()
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    job.stdout.close()
    end = time.monotonic() + 60
    sent = {}
    while time.monotonic() < end and not sent.get("over"):
        time.sleep(0.2)
        sent = track.read(outbox(tmp_path)[0].parent / "sent.json")
    assert runs_of(tmp_path)[2][0].info.status == "KILLED"
