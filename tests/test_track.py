"""Tracking: what MLflow ends up with, and that no state of MLflow harms a job. The stores are real
SQLite.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch

from stages.kit.job import courier, links, told, track
from stages.kit.nets import encoders
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
START = track._start_courier
REFUSED = "http://127.0.0.1:9"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Tracking is on, and no courier starts by itself: the tests call `courier.send`."""
    monkeypatch.delenv("MIMLAB_TRACKING", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(track, "_start_courier", lambda outbox: None)
    monkeypatch.setattr(track, "WAIT", 0.0)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A SQLite store that holds nothing yet; to make one takes MLflow a second."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    os.environ.update(courier.SETTINGS)
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def lab(empty_store, tmp_path):
    """A project with an empty store."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def make_run(folder: Path, name: str = "mae-s0", fingerprint: str = "f" * 64, **compute):
    """A run as kit/job/job.py gives it, with an empty output folder and a finished data job."""
    out, work = folder / "results" / "pretrain" / name, folder / "work" / fingerprint
    data = folder / "results" / "data" / "main"
    for path in (out, work, data):
        path.mkdir(parents=True, exist_ok=True)
    (data / "data.json").write_text(json.dumps({"hash": "d" * 64, "source": "shapes"}))
    job = SimpleNamespace(
        stage="pretrain",
        name=name,
        id=f"pretrain/{name}",
        fingerprint=fingerprint,
        inputs={"data": "data/main"},
        manifest=out / "manifest.json",
        params={
            "method": {"name": "mae", "kind": "mae", "config": {"mask_ratio": 0.75}},
            "model": {"kind": "vit", "config": {"depth": 2}},
            "seed": 0,
            "run": "mae",
        },
    )
    made = SimpleNamespace(
        id="data/main",
        output=data,
        manifest=data / "manifest.json",
        params={},
        inputs={},
        fingerprint="e" * 64,
    )
    return SimpleNamespace(
        job=job,
        plan=SimpleNamespace(experiment="demo", root=ROOT, jobs={"data/main": made, job.id: job}),
        out=out,
        work=work,
        compute={"tracking": True, "tracking_uri": None, **compute},
    )


def write_history(folder: Path, rows: int) -> None:
    (folder / "history.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "epoch": s / 10, "loss": 1 / (s + 1)}) + "\n"
            for s in range(rows)
        )
    )


def finish(run, rows: int = 20) -> None:
    """What a stage and `running` leave: results, the manifest last, and no work folder."""
    for name in ("pictures", "encoder"):
        (run.out / name).mkdir(exist_ok=True)
    (run.out / "pictures" / "masks.png").write_bytes(b"png")
    (run.out / "encoder" / "config.json").write_text("{}")
    (run.out / "weights.npy").write_bytes(b"large")
    write_history(run.out, rows)
    manifest = {"wall_s": 3.5, "device": "cpu", "summary": {"final_loss": 0.25}}
    manifest |= {"fingerprint": run.job.fingerprint, "stage": "pretrain"}
    (run.out / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run.work)


def clear(run) -> None:
    """What happens before a job starts."""
    shutil.rmtree(run.out)
    run.out.mkdir()
    run.work.mkdir(exist_ok=True)


def whole(run, rows: int = 20) -> None:
    """A job from beginning to end."""
    clear(run)
    with track.tracked(run):
        finish(run, rows)


def start(run):
    """A job that has just started: (its entry, a function that kills it hard)."""
    clear(run)
    entry, note, lock = track._open(run)
    return entry, lock.close  # as the kernel does for a killed process


def box(folder: Path) -> Path:
    return folder / "work" / "track"


def runs_of(folder: Path):
    """(client, the row's id, or all if several, runs of jobs in this folder, oldest first)"""
    client, experiment = courier.connect(f"sqlite:///{folder}/mlflow.db", "demo")
    found = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    rows = [run.info.run_id for run in found if run.data.tags["stage"] == "run"]
    jobs = [run for run in found if "entry" in run.data.tags]
    return client, rows[0] if len(rows) == 1 else rows, jobs


def encoder_of(client, run) -> str:
    """The config.json of the encoder that a run has made."""
    [made] = client.get_run(run.info.run_id).outputs.model_outputs
    folder = client.get_logged_model(made.model_id).artifact_location
    return (Path(unquote(urlsplit(folder).path)) / "config.json").read_text()


def steps(client, run, key: str = "epoch") -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]


# ------------------------------------------------------------------------------------ what arrives


def test_a_job_in_mlflow(lab):
    run = make_run(lab)
    whole(run, rows=1200)
    assert courier.replay(box(lab)) == (1, []) and track.entries(box(lab)) == []
    client, parent, [found] = runs_of(lab)
    assert found.info.status == "FINISHED" and found.info.run_name == "pretrain/mae-s0"
    expected = {
        "stage": "pretrain",
        "method": "mae",
        "seed": "0",
        "run": "mae",
        "job": "pretrain/mae-s0",
        "fingerprint": "f" * 64,
        "data_hash": "d" * 64,
        "device": "cpu",
        "mlflow.parentRunId": parent,
    }
    assert {key: found.data.tags.get(key) for key in expected} == expected
    assert len(found.data.tags["git_commit"]) == 40 and found.data.tags["git_dirty"]
    assert found.data.params["method.config.mask_ratio"] == "0.75"
    assert found.data.metrics["wall_s"] == 3.5 and found.data.metrics["final_loss"] == 0.25
    assert found.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    with contextlib.closing(sqlite3.connect(lab / "mlflow.db")) as db:
        query = "select step, value from metrics where run_uuid = ? and key = 'epoch' order by step"
        rows = db.execute(query, (found.info.run_id,)).fetchall()
        # 2,400 points: three batches, and the first two cut no row in two
        assert rows == [(s, pytest.approx(s / 10)) for s in range(1200)]
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert artifacts == {"manifest.json", "history.jsonl", "pictures"}, "nothing large"
    assert encoder_of(client, found) == "{}"
    beside = {p.name for p in lab.iterdir() if not p.name.startswith("mlflow.db")}
    assert beside == {"mlruns", "results", "work"}

    run.params = {}
    clear(run)
    with pytest.raises(ValueError), track.tracked(run):  # the same job once more: a new run
        raise ValueError
    assert courier.replay(box(lab)) == (1, [])
    _, parent_again, both = runs_of(lab)
    assert parent_again == parent and [r.info.status for r in both] == ["FINISHED", "FAILED"]
    assert {r.data.tags["fingerprint"] for r in both} == {"f" * 64}


@pytest.mark.parametrize("per_row", [3, 700, 1500])
def test_batches_hold_whole_rows_or_are_sent_again(per_row):
    """Whatever request fails: what follows it is sent later, and nothing is left out."""
    rows = [{"step": 10 * n, **{f"m{k}": 1.0 for k in range(per_row)}} for n in range(400 // 3)]
    rows = rows[: max(4, 4000 // per_row)]
    for failing in range(1, 5):
        got, requests, at = set(), [], -1

        class Client:
            def log_batch(self, run, metrics, tags, failing=failing, got=got, requests=requests):
                nonlocal at
                requests.append(len(metrics))
                if len(requests) == failing:
                    raise ConnectionError
                got |= {(m.step, m.key) for m in metrics}
                at = int(tags[0].value)

        with contextlib.suppress(ConnectionError):
            courier._send_history(Client(), "run", rows, -1)
        left = [row for row in rows if row["step"] > at]
        courier._send_history(Client(), "run", left, at)
        assert len(got) == per_row * len(rows) and max(requests) <= 1000 and at == rows[-1]["step"]


def test_half_written_lines_wait(tmp_path):
    path = tmp_path / "history.jsonl"
    assert courier.rows_after(path, -1) == []
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert courier.rows_after(path, -1) == [{"step": 0, "loss": 1.0}]
    assert courier.rows_after(path, 0) == []


def test_keys_and_values_that_mlflow_would_refuse():
    values = {"step": 3, "loss": float("nan"), "ok": True, "name": "x", "a": {"b": 2}}
    assert courier.numbers(values) == {"step": 3, "ok": 1, "a.b": 2} and courier.numbers(None) == {}
    assert [courier._key(key) for key in ("a.b", "x: 1/2", "..", "é" * 300)] == [
        "a.b",
        "x_ 1_2",
        "_",
        "é" * 250,
    ]
    assert courier._text("photo\udcff") == "photo?" and courier._text([1]) == "[1]"


# ---------------------------------------------------------------------------- rows of MLflow's page


def make_task(folder: Path, pretrained, task: str = "knn", print: str = "a" * 64):
    """A task on the encoder of a run of make_run, with metrics as stages leave them."""
    above, name = pretrained.job, f"{pretrained.job.name}/{task}"
    out, work = folder / "results" / "transfer" / name, folder / "work" / print
    for path in (out, work):
        path.mkdir(parents=True, exist_ok=True)
    config = {"k": [5, 20], "lrs": [0.1], "temperature": 0.07}
    job = SimpleNamespace(
        stage="transfer",
        name=name,
        id=f"transfer/{name}",
        fingerprint=print,
        inputs={"data": "data/main", "encoder": above.id},
        manifest=out / "manifest.json",
        params={"task": {"name": task, "config": config}, "seed": 0, "run": "mae", "method": "mae"},
    )
    return SimpleNamespace(
        job=job, plan=pretrained.plan, out=out, work=work, compute=pretrained.compute
    )


def whole_task(run, top1: float = 0.5) -> None:
    clear(run)
    with track.tracked(run):
        metrics = {"headline": {"key": "top1", "label": "top-1 accuracy"}, "top1": top1}
        metrics |= {"cls_top1": top1, "k": 5, "temperature": 0.07, "cls_lr": 0.1, "seed": 0}
        (run.out / "metrics.json").write_text(json.dumps(metrics | {"n_test": 160}))
        (run.out / "manifest.json").write_text(json.dumps({"wall_s": 1.0, "fingerprint": "a"}))


def row_of(folder: Path):
    client, row, _ = runs_of(folder)
    return client, client.get_run(row)


def test_a_row_has_the_scores_of_its_tasks_and_what_it_cost(lab):
    run = make_run(lab)
    run.plan.jobs["pretrain/mae-s1"] = SimpleNamespace(
        id="pretrain/mae-s1", params={"method": {"config": {"mask_ratio": 0.5}}}
    )
    whole(run)
    whole_task(make_task(lab, run), 0.5)
    whole_task(make_task(lab, run, "linear", "b" * 64), 0.75)
    assert courier.replay(box(lab)) == (3, [])
    client, row = row_of(lab)
    assert row.info.run_name == "mae-s0" and row.info.status == "FINISHED"
    scores = {key: x for key, x in row.data.metrics.items() if key.startswith("score/")}
    assert scores == {"score/knn": 0.5, "score/linear": 0.75}
    assert row.data.metrics["cost/seconds"] == 3.5 and "cost/images_seen" in row.data.metrics
    shown = {"method": "mae", "target": "none", "data": "shapes", "seed": "0", "labels": "none"}
    assert shown.items() <= row.data.params.items() and row.data.params["mask_ratio"] == "0.75"
    assert row.data.tags["group"] == "f" * 64 and "fingerprint" not in row.data.tags
    assert "e" * 64 in row.data.tags["mlflow.note.content"], "a link to the data that it is made of"
    assert row.inputs.dataset_inputs[0].dataset.digest == "d" * 36

    _, _, jobs = runs_of(lab)
    knn = next(job for job in jobs if job.data.tags.get("task") == "knn")
    assert not {"k", "temperature", "cls_lr", "seed", "n_test"} & set(knn.data.metrics)
    assert knn.data.params["protocol.k"] == "5" and knn.data.params["protocol.cls_lr"] == "0.1"
    assert knn.data.metrics["cls_top1"] == 0.5


def test_the_experiment_opens_on_training_runs_with_a_view_of_the_rows(lab):
    run = make_run(lab)
    whole(run)
    whole_task(make_task(lab, run))
    assert courier.replay(box(lab)) == (2, [])
    client, _ = row_of(lab)
    experiment = client.get_experiment_by_name("demo")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    key = f"mlflow.sharedViewState.{links.VIEW}"
    state = json.loads(json.loads(experiment.tags[key])["state"])
    assert state["selectedColumns"][0] == "metrics.`score/knn`"
    assert [chart["yaxis"]["key"] for chart in state["compareRunCharts"]] == ["score/knn"]

    client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "mine")
    whole_task(make_task(lab, run, "linear", "b" * 64))
    assert courier.replay(box(lab)) == (1, [])
    tags = client.get_experiment_by_name("demo").tags
    assert tags["mlflow.experimentKind"] == "mine", "what a person has set stays"
    assert "score/knn" in tags[key] and "score/linear" in tags[key]


def test_rows_that_were_deleted_or_made_twice_are_made_right(lab):
    run = make_run(lab)
    whole(run)
    whole_task(make_task(lab, run))
    assert courier.replay(box(lab)) == (2, [])
    client, row = row_of(lab)
    client.delete_run(row.info.run_id)
    tags = {"group": "f" * 64, "stage": "run"}
    twice = [client.create_run(row.info.experiment_id, n, tags).info.run_id for n in (1, 2)]
    whole_task(make_task(lab, run, "linear", "b" * 64))
    assert courier.replay(box(lab)) == (1, [])
    client, again = row_of(lab)
    assert again.info.run_id == twice[0]
    _, _, jobs = runs_of(lab)
    assert {job.data.tags["mlflow.parentRunId"] for job in jobs} == {twice[0]} and len(jobs) == 3
    assert {"score/knn", "score/linear", "cost/seconds"} <= set(again.data.metrics)


def test_an_encoder_is_a_logged_model_with_scores_which_a_person_registers(lab, monkeypatch):
    import mlflow

    run = make_run(lab)
    spec = tiny.spec()
    encoder = encoders.create(spec).eval()
    clear(run)
    with track.tracked(run):
        finish(run)
        encoders.save(encoder, run.out / "encoder", spec)
    whole_task(make_task(lab, run))
    assert courier.replay(box(lab)) == (2, [])
    client, row = row_of(lab)
    [model] = client.search_logged_models([row.info.experiment_id])
    assert model.name == "mae-s0" and str(model.status) == "READY"
    assert {m.key: m.value for m in model.metrics} == {"score/knn": 0.5}

    store = f"sqlite:///{lab}/mlflow.db"
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", store)
    monkeypatch.setattr(mlflow.tracking._model_registry.utils, "_registry_uri", store)
    mlflow.register_model(f"models:/{model.model_id}", "a name")
    served = mlflow.pyfunc.load_model("models:/a name/1")
    images = torch.rand(2, 3, spec.image_size, spec.image_size)
    with torch.inference_mode():
        expected = encoder(spec.normalise(images))
    assert served.metadata.signature.outputs.inputs[0].shape == (-1, encoder.num_features)
    torch.testing.assert_close(torch.from_numpy(served.predict(images.numpy())), expected)
    with pytest.raises(mlflow.MlflowException, match="shape"):
        served.predict(images[:, :1].numpy())


def test_a_server_leaves_its_address_for_the_report(lab, monkeypatch):
    run = make_run(lab, tracking_uri="http://server:5000/")
    box(lab).mkdir(parents=True)
    assert track.page(run) is None
    courier._note_address(box(lab), "http://server:5000/", "demo", "7")
    courier._note_address(box(lab), "sqlite:///x.db", "demo", "1")
    assert track.page(run) == "http://server:5000/#/experiments/7"
    run.compute["tracking"] = False
    assert track.page(run) is None


# ------------------------------------------------------------------------ killed, resumed, repeated


def test_killed_and_resumed_is_one_mlflow_run(lab):
    """A killed job's lock is free, so its run becomes KILLED; the resumed job goes on in it."""
    run, later = make_run(lab), {}
    entry, kill = start(run)
    write_history(run.work, 20)
    assert courier.send(box(lab), later)
    assert runs_of(lab)[2][0].info.status == "RUNNING"
    kill()
    courier.send(box(lab), later)
    client, _, [found] = runs_of(lab)
    assert found.info.status == "KILLED" and steps(client, found) == list(range(20))
    assert track.entries(box(lab)) == []

    entry, kill = start(run)
    write_history(run.work, 10)  # the loop went back to a checkpoint and writes the same rows again
    courier.send(box(lab), later)
    assert runs_of(lab)[2][0].info.status == "RUNNING"
    kill()
    whole(run, rows=50)
    assert courier.replay(box(lab)) == (2, [])
    client, _, [found] = runs_of(lab)
    assert found.info.status == "FINISHED" and steps(client, found) == list(range(50))


def test_resumed_and_finished_while_the_store_was_down(lab):
    """MLflow knows the job as killed; all that came later lies in the outbox and arrives."""
    run = make_run(lab)
    _, kill = start(run)
    write_history(run.work, 5)
    kill()
    courier.send(box(lab), {})
    assert runs_of(lab)[2][0].info.status == "KILLED"

    base, away = lab / "mlflow.db", lab / "away.db"
    base.rename(away)
    base.mkdir()  # no data base can be opened here
    with pytest.raises(SystemExit), track.tracked(run):
        write_history(run.work, 9)
        sys.exit(143)
    whole(run, rows=12)
    done, left = courier.replay(box(lab))
    assert done == 0 and len(left) == 2 and "pretrain/mae-s0: " in left[0]
    whole(make_run(lab, "other-s0", "a" * 64), rows=1)
    base.rmdir()
    away.rename(base)

    assert courier.replay(box(lab)) == (3, []) and track.entries(box(lab)) == []
    client, _, [found, other] = runs_of(lab)
    assert found.info.status == other.info.status == "FINISHED"
    assert steps(client, found) == list(range(12)) and found.data.metrics["final_loss"] == 0.25


def test_an_earlier_attempt_that_arrives_last_changes_nothing(lab):
    run = make_run(lab)
    first, kill = start(run)
    kill()
    hidden = first.rename(lab / "hidden")
    whole(run)
    assert courier.replay(box(lab)) == (1, [])
    hidden.rename(first)
    assert courier.replay(box(lab)) == (1, [])
    assert [r.info.status for r in runs_of(lab)[2]] == ["FINISHED"]


@pytest.mark.parametrize("broken", ["log_inputs", "log_batch", "log_artifacts", "set_terminated"])
def test_an_interrupted_delivery_is_repeated(lab, monkeypatch, broken):
    from mlflow.tracking import MlflowClient

    whole(make_run(lab))
    runs_of(lab)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, broken, lambda *args, **more: 1 / 0)
        done, [reason] = courier.replay(box(lab))
    assert done == 0 and reason == "pretrain/mae-s0: ZeroDivisionError: division by zero"
    assert courier.replay(box(lab)) == (1, [])
    client, _, [found] = runs_of(lab)
    assert found.info.status == "FINISHED" and steps(client, found) == list(range(20))
    assert found.data.params and len(found.inputs.dataset_inputs) == 1


def test_a_finished_job_whose_process_is_stopped_at_its_very_end_is_finished(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(SystemExit), track.tracked(run):
        finish(run)
        sys.exit(143)
    [entry] = track.entries(box(tmp_path))
    assert told.read(entry / "note.json")["status"] == "FINISHED"


# ------------------------------------------------------------------------- stores that are not well


def test_a_dead_server_costs_nothing_and_nothing_is_lost(lab, capsys, monkeypatch):
    monkeypatch.setattr(track, "WAIT", 0.3)
    run = make_run(lab, tracking_uri=REFUSED)
    began = time.monotonic()
    whole(run)  # nobody delivers
    assert time.monotonic() - began < 2 and capsys.readouterr().err == ""
    words = ["--replay", "--work", str(lab / "work")]
    assert courier.main(words) == 1 and "127.0.0.1:9" in capsys.readouterr().out

    clear(run)  # another job takes the output folder
    (run.out / "manifest.json").write_text("{}")
    assert courier.main([*words, "--uri", f"sqlite:///{lab}/mlflow.db"]) == 0
    assert "1 delivered, 0 left" in capsys.readouterr().out
    client, _, [found] = runs_of(lab)
    assert found.info.status == "FINISHED" and steps(client, found) == list(range(20))
    assert (
        len(client.list_artifacts(found.info.run_id)) == 3 and found.data.metrics["wall_s"] == 3.5
    )


def test_a_job_says_why_its_delivery_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(track, "WAIT", 20.0)
    monkeypatch.setattr(
        track, "_start_courier", lambda box: (track.entries(box)[0] / "error").write_text("locked")
    )
    began = time.monotonic()
    whole(make_run(tmp_path))
    error = capsys.readouterr().err
    assert "tracking: locked" in error and "courier --replay" in error
    assert time.monotonic() - began < 10, "no need to wait any longer"


def test_one_bad_entry_holds_up_no_other(lab):
    run = make_run(lab)
    whole(run)
    [bad] = track.entries(box(lab))
    note = told.read(bad / "note.json")
    (bad / "note.json").write_text(json.dumps(note | {"tags": "no tags"}))
    torn = box(lab) / "0-torn"
    torn.mkdir()
    (torn / "note.json").write_text('{"uri": ')
    nameless = box(lab) / "1-nameless"
    nameless.mkdir()
    (nameless / "note.json").write_text(json.dumps(note | {"experiment": ""}))
    whole(make_run(lab, "dead-s0", "a" * 64, tracking_uri=REFUSED))
    whole(make_run(lab, "fine-s0", "b" * 64))
    done, left = courier.replay(box(lab))
    assert done == 1 and len(left) == 4 and left[0].startswith("0-torn: JSONDecodeError")
    assert [r.info.run_name for r in runs_of(lab)[2]] == ["pretrain/fine-s0"]


def test_what_was_deleted_in_mlflow_is_sent_again(lab):
    """Runs and the experiment, in MLflow's interface; the file itself, by hand."""
    run, later = make_run(lab), {}
    _, kill = start(run)
    write_history(run.work, 5)
    courier.send(box(lab), later)
    client, parent, [found] = runs_of(lab)
    client.delete_run(found.info.run_id)
    client.delete_run(parent)
    kill()
    courier.send(box(lab), later)
    client, new_parent, [again] = runs_of(lab)
    assert again.info.status == "KILLED" and steps(client, again) == list(range(5))
    assert again.data.tags["mlflow.parentRunId"] == new_parent != parent

    client.delete_experiment(again.info.experiment_id)
    whole(run)
    assert courier.replay(box(lab)) == (1, [])
    ends = {r.info.status for r in runs_of(lab)[2] if r.info.run_name == "pretrain/mae-s0"}
    assert "FINISHED" in ends, "MLflow has restored the deleted run with its experiment, too"

    whole(run)
    (lab / "mlflow.db").unlink()
    done, [reason] = courier.replay(box(lab))
    assert done == 0 and "no such table" in reason, "left to a process that makes the store anew"


# ------------------------------------------------------------------------------------ on and off


@pytest.mark.parametrize("how", ["params", "environment"])
def test_off(tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("MIMLAB_TRACKING", "off")
    whole(make_run(tmp_path, tracking=how != "params"))
    assert not box(tmp_path).exists()


def test_a_broken_outbox_is_a_warning(tmp_path, capsys):
    run = make_run(tmp_path)
    box(tmp_path).write_text("a file where the folder should be")
    whole(run)
    assert "warning: tracking:" in capsys.readouterr().err


def test_store_uri(tmp_path, monkeypatch):
    assert track.store_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert track.store_uri(tmp_path, "sqlite:///x/y.db") == f"sqlite:///{tmp_path}/x/y.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert track.store_uri(tmp_path) == "http://server:5000"
    assert track.store_uri(tmp_path, "sqlite:////abs/y.db") == "sqlite:////abs/y.db"


def test_a_temporary_workspace_of_dvc_leaves_its_entries_in_the_project(tmp_path):
    whole(make_run(tmp_path / ".dvc" / "tmp" / "exps" / "tmpa1b2"))
    [entry] = track.entries(box(tmp_path))
    note = told.read(entry / "note.json")
    assert track.store_uri(tmp_path, note["uri"]) == f"sqlite:///{tmp_path}/mlflow.db"
    assert (entry / "files/encoder").is_dir()


def test_the_courier_of_a_temporary_workspace_runs_the_projects_code(tmp_path, monkeypatch):
    """The workspace may be gone before Python has read it."""
    monkeypatch.setattr(track, "_start_courier", START)
    started = []
    monkeypatch.setattr(track.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    outside, project = tmp_path / "outside", tmp_path / "project"
    for folder in (outside, project):
        box(folder).mkdir(parents=True)
    (project / "stages/kit/job").mkdir(parents=True)
    (project / "stages/kit/job/courier.py").touch()
    for folder, code in ((outside, ROOT), (project, project)):
        track._start_courier(box(folder))
        assert started.pop()["PYTHONPATH"].split(os.pathsep)[0] == str(code)


def test_a_moved_project_takes_its_store_its_artifacts_and_its_outbox_along(empty_store, tmp_path):
    """What arrived before the move is found, what waits is delivered, the old place stays away."""
    old, new = tmp_path / "an old place", tmp_path / "märz #2"
    old.mkdir()
    shutil.copyfile(empty_store, old / "mlflow.db")
    whole(make_run(old, "before-s0", "a" * 64))
    assert courier.replay(box(old)) == (1, [])
    whole(make_run(old, "waiting-s0", "b" * 64))
    killed = make_run(old, "killed-s0", "c" * 64)
    _, kill = start(killed)
    write_history(killed.work, 4)
    kill()
    os.rename(old, new)
    whole(make_run(new, "after-s0", "d" * 64))
    assert courier.replay(box(new)) == (3, [])
    client, _, found = runs_of(new)
    assert len(found) == 4
    for run in found:
        path = Path(unquote(urlsplit(run.info.artifact_uri).path))
        assert path.is_relative_to(new / "mlruns")
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        kept = run.info.run_name != "pretrain/killed-s0"
        assert ("manifest.json" in names) == kept
        if kept:
            assert encoder_of(client, run) == "{}"
        assert len(steps(client, run)) == (20 if kept else 4)
    assert not old.exists()


def test_a_replay_of_nothing_finds_the_artifacts_of_a_copied_project(empty_store, tmp_path):
    """As `make ui` begins. The copy's artifacts are its own, those of the first one stay."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    whole(make_run(tmp_path))
    assert courier.replay(box(tmp_path)) == (1, [])
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copyfile(tmp_path / "mlflow.db", copy / "mlflow.db")
    shutil.copytree(tmp_path / "mlruns", copy / "mlruns")
    assert courier.main(["--replay", "--work", str(copy / "work")]) == 0
    for folder in (tmp_path, copy):
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
            uris = [uri for (uri,) in store.execute("SELECT artifact_uri FROM runs")]
        assert uris and all(uri.startswith((folder / "mlruns").as_uri()) for uri in uris)


def test_artifacts_that_a_person_keeps_elsewhere_stay_there(lab, tmp_path):
    client, *_ = runs_of(lab)
    elsewhere = tmp_path / "shared" / "mlruns" / "mine"
    elsewhere.mkdir(parents=True)
    places = [elsewhere.as_uri(), "s3://bucket/mlruns/mine", (tmp_path / "gone").as_uri()]
    for number, place in enumerate(places):
        client.create_experiment(f"mine{number}", place)
    runs_of(lab)
    found = [client.get_experiment_by_name(f"mine{n}").artifact_location for n in range(3)]
    assert found == places


def test_an_outdated_store_is_named_with_what_to_do(lab, capsys):
    """Nothing is lost: after MLflow's command the entries arrive. Here the version is set back."""
    whole(make_run(lab))
    with contextlib.closing(sqlite3.connect(lab / "mlflow.db")) as store, store:
        [(version,)] = store.execute("SELECT version_num FROM alembic_version").fetchall()
        store.execute("UPDATE alembic_version SET version_num = '0584bdc529eb'")
    assert courier.main(["--replay", "--work", str(lab / "work")]) == 1
    said = capsys.readouterr().out
    assert "pretrain/mae-s0: MlflowException: Detected out-of-date database schema" in said
    assert f"'mlflow db upgrade sqlite:///{lab}/mlflow.db'" in said
    with contextlib.closing(sqlite3.connect(lab / "mlflow.db")) as store, store:
        store.execute("UPDATE alembic_version SET version_num = ?", (version,))
    assert courier.replay(box(lab)) == (1, [])


# ------------------------------------------------------------------------------ in real processes


def test_a_second_courier_leaves_at_once(tmp_path):
    with (tmp_path / "courier.lock").open("a") as lock:
        courier.fcntl.flock(lock, courier.fcntl.LOCK_EX)
        courier.serve(tmp_path, 100.0)
    began = time.monotonic()
    courier.serve(tmp_path, 0.2)
    assert 0.2 <= time.monotonic() - began < 5


JOB = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_track as it
it.track.IDLE, it.track.WAIT = 1.0, 60.0
number = int(sys.argv[1])
run = it.make_run(Path({folder!r}) / "ab"[number % 2], f"mae-s{{number}}", sys.argv[1] * 64,
                  tracking_uri="sqlite:///" + {folder!r} + "/mlflow.db")
with it.track.tracked(run):
    it.write_history(run.work, 10)
    print("mlflow" in sys.modules, flush=True)
    if number == 7:
        it.time.sleep(100)
    it.finish(run)
"""


def test_eight_jobs_of_two_projects_on_a_fresh_store(tmp_path):
    """Two couriers create the store at once. Each run arrives whole, a killed job's too."""
    environment = {k: v for k, v in os.environ.items() if k != "MIMLAB_TRACKING"}
    code = JOB.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for n in range(8)
    ]
    jobs[7].stdout.readline()
    os.kill(jobs[7].pid, signal.SIGKILL)
    ends = [(job.communicate(timeout=120)[0], job.returncode) for job in jobs]
    assert ends == [("False\n", 0)] * 7 + [("", -signal.SIGKILL)]
    end = time.monotonic() + 60
    while any(track.entries(box(tmp_path / name)) for name in "ab"):
        assert time.monotonic() < end, "the killed job is not delivered"
        time.sleep(0.1)
    client, parents, runs = runs_of(tmp_path)
    found = {r.info.run_name: r for r in runs}
    assert sorted(found) == [f"pretrain/mae-s{n}" for n in range(8)] and len(runs) == 8
    assert [found[name].info.status for name in sorted(found)] == ["FINISHED"] * 7 + ["KILLED"]
    assert {r.data.tags["mlflow.parentRunId"] for r in runs} == set(parents), "a row for each"
    assert len(parents) == 8
    lengths = [len(steps(client, found[name])) for name in sorted(found)]
    assert lengths == [20] * 7 + [10]
