"""python -m workflow.watch on plans whose jobs left what jobs leave, with commands as engines."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.kit.train import display
from stages.kit.train.display import Display
from tests.plans import finish, plan_of
from workflow import expected, progress
from workflow.expected import Expected
from workflow.files import JobError
from workflow.watch import __main__ as command
from workflow.watch import engine, screen, words
from workflow.watch.board import Board

ROOT = Path(__file__).resolve().parents[1]
GONE = 2**22 + 1  # above the largest process id


@pytest.fixture
def plan(tmp_path):
    return plan_of(tmp_path)


def board_of(plan, seconds: float | None = None, slots: int = 2, since: float = 1.0) -> Board:
    """`seconds`: expected of every job."""
    about = {"seconds": seconds, "flops": 2e12, "missing": ""}
    jobs = {} if seconds is None else dict.fromkeys(plan.jobs, about)
    return Board(plan, Expected(jobs), slots, since)


def work(plan, id: str) -> Path:
    return plan.results.parent / "work" / plan.jobs[id].fingerprint


def begin(plan, id: str, pid: int | None = None, ago: float = 0.0, **facts) -> None:
    """What a job that began `ago` seconds ago has noted."""
    record = {"job": id, "state": "running", "pid": pid or os.getpid()}
    record |= {"host": progress.platform.node(), "began": time.time() - ago}
    progress.note(work(plan, id), **record | facts)


def summarised(plan, id: str, **summary) -> None:
    """Finishes a job with a summary and 10 s."""
    finish(plan, id)
    job = plan.jobs[id]
    made = dataclasses.replace(plan.manifest(id), summary=summary, wall_s=10.0, job=id)
    job.manifest.write_text(made.text())


# ---------------------------------------------------------------------------------- the board


def test_a_finished_plan(plan):
    finish(plan)
    board = board_of(plan)
    assert board.share() == 1.0 and board.left_in_all() == 0
    assert words.overall(board) == f"{len(plan.jobs)} of {len(plan.jobs)} jobs done"
    assert board.look() == []


def test_a_job_begins_trains_and_ends(plan):
    board = board_of(plan)
    begin(plan, "pretrain/mae-s0", ago=8)
    assert board.look() == [("pretrain/mae-s0", "running")]
    facts = {"step": 30, "steps": 120, "images_per_s": 512.0, "loss": 0.25, "left_s": 90.0}
    progress.note(work(plan, "pretrain/mae-s0"), **facts)
    assert board.look() == []
    said = words.running(board, "pretrain/mae-s0")
    assert said.startswith("step 30/120, 512 images/s, loss 0.25, 90 s left, ")
    assert board.share() == pytest.approx(0.25 / len(plan.jobs))
    summarised(plan, "pretrain/mae-s0", final_loss=0.125, why="two words", table=[1])
    assert board.look() == [("pretrain/mae-s0", "done")]
    said = words.changed(board, "pretrain/mae-s0", "done")
    assert said == "done     pretrain/mae-s0: final_loss=0.125 (10.0 s, 0 MB)"


def test_a_manifest_of_another_plan_is_not_done_unless_the_job_began_since(plan):
    finish(plan, "data/main")
    other = dataclasses.replace(plan.manifest("data/main"), fingerprint="0" * 64)
    plan.jobs["data/main"].manifest.write_text(other.text())
    assert "data/main" not in board_of(plan).of("done")
    made = dataclasses.replace(other, created="2026-01-02T03:04:05+00:00")
    plan.jobs["data/main"].manifest.write_text(made.text())
    began = 1767323000.0  # some minutes before
    assert "data/main" in board_of(plan, since=began).of("done"), "files were edited meanwhile"
    assert "data/main" not in board_of(plan, since=began + 3600).of("done")


def test_what_failed_before_this_began_waits(plan):
    begin(plan, "target/teacher", ago=100, state="failed", error="old")
    begin(plan, "pretrain/mae-s0", GONE, ago=100)
    board = board_of(plan, since=time.time() - 50)
    assert board.counts()["waiting"] == len(plan.jobs)
    assert set(board_of(plan, since=0.0).of("failed")) == {"target/teacher", "pretrain/mae-s0"}


def test_a_job_on_another_machine_is_believed(plan):
    begin(plan, "pretrain/mae-s0", GONE, host="elsewhere")
    assert board_of(plan).of("running") == ["pretrain/mae-s0"]


def test_time_left_follows_what_jobs_took(plan):
    few = {id: plan.jobs[id] for id in ("data/main", "target/teacher", "pretrain/mae-s0")}
    plan.jobs = few
    board = board_of(plan, seconds=5.0)
    assert board.left_in_all() == 5 + 5  # data, then both others at a time
    assert board_of(plan, seconds=5.0, slots=1).left_in_all() == 15
    summarised(plan, "data/main")  # took 10 s
    board.look()
    assert board.pace("pretrain/mae-s0") == 2 and board.left_in_all() == 10
    begin(plan, "pretrain/mae-s0", ago=4)
    board.look()
    assert board.left("pretrain/mae-s0") == pytest.approx(6, abs=1)
    assert board.share() == pytest.approx((5 + 5 * 0.4) / 15, abs=0.05)


def test_jobs_of_the_same_task_or_run_tell_most(tmp_path):
    plan = plan_of(tmp_path, grid__seeds=[0, 1])
    board = board_of(plan, seconds=5.0)
    summarised(plan, "transfer/mae-s0/knn")  # took 10 s
    finish(plan, "data/main")  # took none
    board.look()
    assert board.needs("transfer/beitv2-s1/knn") == 10
    assert board.needs("transfer/mae-s1/linear") == 5, "by all that are done"


def test_without_an_estimate_jobs_that_were_alike_tell(tmp_path):
    plan = plan_of(tmp_path, grid__seeds=[0, 1])
    board = board_of(plan)
    assert board.left_in_all() is None and "left" not in words.overall(board)
    summarised(plan, "transfer/mae-s0/knn")
    board.look()
    assert board.left("transfer/mae-s1/knn") == 10 and board.left("transfer/mae-s1/linear") is None


def test_an_estimate_counts_for_the_jobs_that_it_was_made_for(plan):
    about = {"seconds": 2.0, "flops": 3e12, "missing": "", "fingerprint": ""}
    jobs = {id: about | {"fingerprint": job.fingerprint} for id, job in plan.jobs.items()}
    jobs["data/main"] = about | {"fingerprint": "another"}
    jobs["report"]["missing"] = "not known"
    path = expected.file(plan)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"start_s": 1.5, "jobs": jobs}))
    found = Expected.read(path, plan)
    assert found.seconds("data/main") is None and found.seconds("report") is None
    assert found.seconds("pretrain/mae-s0") == 3.5 and found.flops("pretrain/mae-s0") == 3e12
    path.write_text('{"start_s": 1.5, "jo')
    assert not Expected.read(path, plan).jobs
    lines = words.expected(Board(plan, found, 2, 1.0))
    assert lines[-1] == "  not known: data/main, report"


def test_what_is_expected_is_told_by_stage(plan):
    finish(plan, "data/main")
    lines = words.expected(board_of(plan, seconds=90.0))
    assert lines[0] == f"{len(plan.jobs) - 1} of {len(plan.jobs)} jobs are to be run; expected:"
    assert lines[1].split() == ["target", "2", "jobs", "4", "TFLOP", "3", "min", "00", "s"]
    assert "one after the other" in lines[-2] and "2 jobs at a time" in lines[-1]


# ---------------------------------------------------------------------------------- failures


def test_a_failure_ends_with_its_reason(plan):
    begin(plan, "target/teacher", state="failed", error="codes collapsed\n\nuse fewer")
    log = words.log(plan, "target/teacher")
    log.parent.mkdir(parents=True)
    log.write_text("noise\n")
    board = board_of(plan)
    assert words.changed(board, "target/teacher", "failed").endswith(": codes collapsed")
    lines = words.failures(board)
    assert lines[1:4] == ["FAILED target/teacher", "  codes collapsed", "  use fewer"]
    assert lines[4] == f"  its log: {log}"
    assert lines[5] == f"{len(plan.jobs) - 1} more job(s) were not run."


def test_a_job_that_was_killed_or_never_began_is_a_failure_too(plan):
    begin(plan, "pretrain/mae-s0", GONE)
    board = board_of(plan, since=time.time() - 10)
    log = words.log(plan, "data/main")
    log.parent.mkdir(parents=True)
    log.write_text("a warning\nerror: params.yaml is\nwrong\n")
    lines = words.failures(board)
    assert "  its process is gone and left no reason (killed, or out of memory?)" in lines
    at = lines.index("FAILED data/main")
    assert lines[at + 1 : at + 3] == ["  error: params.yaml is", "  wrong"]
    os.utime(log, (1, 1))
    assert "FAILED data/main" not in words.failures(board), "an old log"


def test_a_job_that_was_killed_under_dvc_shows_the_end_of_its_log(plan):
    board = board_of(plan, since=time.time() - 5)
    begin(plan, "pretrain/mae-s0", pid=GONE, ago=1)
    board.look()
    path = plan.results.parent / "logs/dvc.log"
    path.parent.mkdir(exist_ok=True)
    path.write_text("Running stage 'pretrain@mae-s0':\nstep 3 of 9\nERROR: it exited with -9\n")
    said = words.failures(board)
    assert said[1] == "FAILED pretrain/mae-s0"
    assert said[3:6] == [f"  {line}" for line in path.read_text().splitlines()]


def test_a_job_notes_how_it_ends(tmp_path):
    def ended(error: BaseException) -> dict:
        with pytest.raises(type(error)), progress.shown(tmp_path, "data/main"):
            assert progress.read(tmp_path)["state"] == "running"
            assert progress.alive(progress.read(tmp_path))
            raise error
        return progress.read(tmp_path)

    found = ended(JobError("no room"))
    assert (found["state"], found["error"]) == ("failed", "no room")
    assert ended(ValueError("bad"))["error"] == "ValueError: bad"
    found = ended(SystemExit(143))
    assert found["state"] == "stopped" and "error" not in found, "that of this attempt alone"
    with progress.shown(tmp_path / "no", "data/main"):
        (tmp_path / "no" / progress.FILE).unlink()
    assert not (tmp_path / "no" / progress.FILE).exists(), "a finished job leaves none"


def test_a_training_notes_step_rate_and_time(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr(display.time, "perf_counter", lambda: next(clock))
    bar = Display("pretrain/mae-s0", 100, 10, 32, None, True, tmp_path)
    bar.update(15, 0.5)
    assert progress.read(tmp_path) == {}, "rarely"
    bar.update(30, 0.5)
    found = progress.read(tmp_path)
    assert (found["step"], found["steps"], found["loss"]) == (30, 100, 0.5)
    assert found["images_per_s"] == pytest.approx(32 * 5) and found["left_s"] == pytest.approx(14)
    bar.update(70, 0.5)  # four times as fast for a moment
    rate = 0.8 * 5 + 0.2 * 20
    assert progress.read(tmp_path)["left_s"] == pytest.approx(30 / rate)
    Display("x", 100, 10, 32, None, False, tmp_path / "other").update(100, None)
    assert not (tmp_path / "other").exists(), "only the first process notes"


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with progress.shown(tmp_path / "file", "data/main"):
        progress.note(tmp_path / "file", step=1)
    assert progress.read(tmp_path / "file") == {}


# ---------------------------------------------------------------------------------- the screen


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_are_lines(plan, monkeypatch):
    out = io.StringIO()
    view = screen.screen(out)
    board = board_of(plan)
    begin(plan, "data/main")
    for id, state in board.look():
        view.event(board, id, state)
    view.show(board)
    assert re.fullmatch(r"\d\d:\d\d:\d\d start    data/main\n", out.getvalue()), "no beat so soon"
    monkeypatch.setattr(screen, "BEAT", 0.0)
    view.show(board)
    beat = out.getvalue().splitlines()[-1]
    assert f"0 of {len(plan.jobs)} jobs done, 0%; running: data/main (" in beat
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_a_block_is_drawn_anew(plan, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: os.terminal_size((60, 8)))
    out = Tty()
    view = screen.screen(out)
    board = board_of(plan)
    for id in list(plan.jobs)[:8]:
        begin(plan, id)
    board.look()
    view.show(board)
    first = out.getvalue().splitlines()
    assert len(first) <= 7 and all(len(line) < 66 for line in first)
    assert any("more that run" in line for line in first) and "waiting: " in first[-1]
    view.say("a line that stays")
    view.show(board)
    lines = len(first)
    assert out.getvalue().count(f"\x1b[{lines}F\x1b[J") == 1, "erased before the line"
    assert out.getvalue().split("a line that stays\n")[1].startswith("\x1b[J"), "below it"
    monkeypatch.setenv("TERM", "dumb")
    assert type(screen.screen(out)) is screen.Lines


# ---------------------------------------------------------------------------------- the command


def test_the_engine_is_known_by_its_command():
    assert engine.name(["/x/python", "-m", "snakemake", "--cores", "2"]) == "snakemake"
    assert engine.name(["dvc", "repro"]) == "dvc" and engine.name(["/bin/sh", "x"]) == "sh"
    given = engine.files(
        ["snakemake", "--config", "params=a b.yaml", "results=x/results", "dvc=no"]
    )
    assert given == {"params": "a b.yaml", "results": "x/results"}


def watch(plan, *words: str, **more) -> subprocess.Popen:
    where = ["--params", str(plan.params_file), "--results", str(plan.results)]
    options, _, child = " ".join(words).partition(" -- ")
    return subprocess.Popen(
        [sys.executable, "-m", "workflow.watch", *where, *options.split()]
        + (["--", *more["child"]] if "child" in more else []),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # no terminal
    )


def test_the_status_and_the_words_of_a_command_are_kept(plan):
    code = (
        "import sys; print('warning: a disk is slow'); print('Traceback of no use');"
        "print('error: found a, expected b'); sys.exit(3)"
    )
    process = watch(plan, child=[sys.executable, "-c", code])
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    log = plan.results.parent / "logs" / f"{Path(sys.executable).name}.log"
    assert "error: found a" in log.read_text() and str(log) in said
    assert "\nwarning: a disk is slow\n" in said and "\nerror: found a, expected b\n" in said
    assert "Traceback" not in said and "ended with status 3" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_which_decides(plan, tmp_path, number):
    code = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal({number}, lambda *_: sys.exit({128 + number}))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(60)"
    )
    # the tests may run in a script's background, where Ctrl-C is ignored, by what they start, too
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = watch(plan, child=[sys.executable, "-c", code])
    finally:
        signal.signal(number, before)
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command goes on" in said


def test_what_was_stopped_is_named_without_the_words_of_the_engine(plan, capsys):
    code = (
        "import sys, time, pathlib, workflow.progress as p\n"
        f"where = pathlib.Path({str(work(plan, 'pretrain/mae-s0'))!r})\n"
        "p.note(where, job='pretrain/mae-s0', state='stopped', began=time.time())\n"
        "print('WorkflowError: at least one job'); sys.exit(1)"
    )
    where = ["--params", str(plan.params_file), "--results", str(plan.results)]
    assert command.main([*where, "--", sys.executable, "-c", code]) == 1
    said = capsys.readouterr().out
    assert "\nstopped, to be continued: pretrain/mae-s0\n" in said and "WorkflowError" not in said


def test_a_fresh_plan_starts_nothing_and_shows_the_report(plan, tmp_path, capsys):
    finish(plan)
    summarised(plan, "report", headline="Pretraining helps.")
    where = ["--params", str(plan.params_file), "--results", str(plan.results)]
    touch = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    assert command.main([*where, "--cost", "--", *touch]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"All {len(plan.jobs)} jobs of {plan.params_file} are up to date."
    assert said[1:] == [
        "Pretraining helps.",
        f"The report: {plan.results / 'report' / 'index.html'}",
    ]
    assert not (tmp_path / "ran").exists()
    assert command.main([*where, "--", *touch]) == 0 and (tmp_path / "ran").exists()


def test_an_estimate_is_made_once_and_told_first(plan, tmp_path, capsys, monkeypatch):
    asked = []

    def estimated(plan):
        asked.append(plan)
        about = {"seconds": 90.0, "flops": 2e12, "missing": ""}
        jobs = {i: about | {"fingerprint": j.fingerprint} for i, j in plan.jobs.items()}
        expected.file(plan).parent.mkdir()
        expected.file(plan).write_text(json.dumps({"start_s": 0.0, "jobs": jobs}))
        return Expected.read(expected.file(plan), plan)

    monkeypatch.setattr(command, "estimated", estimated)
    where = ["--params", str(plan.params_file), "--results", str(plan.results)]
    words = ["--cost", "--", sys.executable, "-c", "raise SystemExit(4)"]
    for times in (1, 2):
        assert command.main([*where, *words]) == 4
        said = capsys.readouterr().out
        assert ("trying a few images" in said) == (times == 1) and len(asked) == 1
        assert f"{len(plan.jobs)} of {len(plan.jobs)} jobs are to be run; expected:" in said
        assert said.index("expected:") < said.index("writes to")


def test_make_demo_tells_what_it_expects_and_shows_the_run():
    text = (ROOT / "Makefile").read_text()
    recipe = text.split("\ndemo: install\n")[1].split("\n\n")[0]
    assert recipe == ("\t@python -m workflow.watch --cost -- python -m snakemake --cores $(CORES)")


def test_without_a_command_it_looks_at_what_there_is(plan, capsys):
    begin(plan, "pretrain/mae-s0", ago=3)
    begin(plan, "target/teacher", state="failed", error="codes collapsed")
    where = ["--params", str(plan.params_file), "--results", str(plan.results)]
    assert command.main([*where, "--once"]) == 0
    said = capsys.readouterr().out
    assert "1 failed" in said and "running: pretrain/mae-s0 (" in said
    assert "FAILED target/teacher\n  codes collapsed\n" in said


def test_bad_params_are_told_before_anything_starts(tmp_path, capsys):
    path = tmp_path / "params.yaml"
    path.write_text("experimnt: x\n")
    assert command.main(["--params", str(path), "--", "false"]) == 1
    assert "experimnt" in capsys.readouterr().err


def test_nothing_of_the_view_needs_torch():
    code = (
        "import sys, workflow.watch.__main__, workflow.progress\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'stages')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
