"""A job killed in a temporary workspace of `dvc exp run`, which vanishes, loses nothing."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from stages.kit.job import told, track
from stages.kit.job.job import running, take_over, write_atomic
from stages.kit.job.track import home
from tests.lab import PARAMS, Lab
from tests.plans import plan_of

DATA = "data/main"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Entries are written, and no courier starts."""
    monkeypatch.delenv("MIMLAB_TRACKING", raising=False)
    monkeypatch.setattr(track, "_start_courier", lambda outbox: None)
    monkeypatch.setattr(track, "WAIT", 0)


def workspace(project: Path, name: str):
    folder = project / ".dvc/tmp/exps" / name
    folder.mkdir(parents=True)
    return plan_of(folder, compute__tracking=True)


def killed(plan, **content: str) -> None:
    """A job that writes files into its work folder and is killed hard."""
    if not (child := os.fork()):
        with running(plan.jobs[DATA], plan) as run:
            for name, text in content.items():
                write_atomic(run.work / name, text)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def vanish(plan) -> None:
    shutil.rmtree(plan.results.parent)


def test_the_next_experiment_continues_what_was_killed(tmp_path):
    first = workspace(tmp_path, "tmpa")
    killed(first, checkpoint="step 7", history="rows")
    vanish(first)
    [entry] = track.entries(tmp_path / "work/track")
    note = told.read(entry / "note.json")
    assert (Path(note["work"]) / "history").read_text() == "rows", "what the courier reads"
    assert Path(note["work"]).parent == tmp_path / "work"

    second = workspace(tmp_path, "tmpb")
    with running(second.jobs[DATA], second) as run:
        assert (run.work / "checkpoint").read_text() == "step 7"
        write_atomic(run.out / "value", "x")
    again = track.entries(tmp_path / "work/track")[1]
    assert told.read(again / "note.json")["mark"] == note["mark"], "the same MLflow run"
    assert second.fresh(DATA)
    assert not list((tmp_path / "work").glob("exp-*")) and not run.work.is_symlink()


def test_experiments_that_do_the_same_at_a_time_share_nothing(tmp_path, capsys):
    first, second = workspace(tmp_path, "tmpa"), workspace(tmp_path, "tmpb")
    killed(second, checkpoint="mine")
    with running(first.jobs[DATA], first) as one:
        assert (one.work / "checkpoint").read_text() == "mine"
        with running(second.jobs[DATA], second) as two:
            assert not (two.work / "checkpoint").exists() and not two.work.is_symlink()
            assert two.work.resolve() != one.work.resolve()
        assert not two.work.exists() and (one.work / "checkpoint").exists()
        assert not take_over(second.jobs[DATA], second) and (one.work / "checkpoint").exists()
    assert (
        "its checkpoint and what it has not sent to MLflow yet are lost" in capsys.readouterr().err
    )


def test_a_project_that_is_no_temporary_workspace_keeps_its_own(tmp_path):
    plan = plan_of(tmp_path)
    with running(plan.jobs[DATA], plan) as run:
        assert not run.work.is_symlink() and run.work.parent == tmp_path / "work"
    assert home(tmp_path) == tmp_path and not (tmp_path / "work" / run.work.name).exists()


def test_dvc_itself(tmp_path):
    """The real thing: a job of `dvc exp run --temp` dies, its workspace goes, another continues."""
    it = Lab.create(tmp_path / "a lab", PARAMS)
    it.dvc("repro", "-q")
    it.ran()
    change = ("exp", "run", "-q", "--temp", "-S", "methods.mae.mask_ratio=0.5")
    die = 'write_atomic(run.work / "checkpoint", "7")\nos.kill(os.getpid(), 9)\n'
    (it.folder / "meanwhile.py").write_text(die)
    it.save("a job that dies")
    it.dvc(*change, good=False)
    assert not list((it.folder / ".dvc/tmp/exps").glob("*/results")), "the workspace has vanished"
    [place] = (it.folder / "work").glob("exp-*")
    assert (place / "checkpoint").read_text() == "7"

    (it.folder / "meanwhile.py").write_text('assert (run.work / "checkpoint").exists()\n')
    it.save("a job that has to find it")
    it.dvc(*change, "-n", "half")
    assert "half" in it.dvc("exp", "list") and not place.exists()
