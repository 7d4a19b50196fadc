"""A job's first and last acts: clean output, one process, a manifest only when all went well."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from conftest import tiny_content, write_params

from stages.kit.job import job as jobs
from stages.kit.job import process as own_process
from stages.kit.job.device import choose_device
from stages.kit.job.job import JobError, running, write_atomic, write_json
from stages.kit.job.orphan import left_behind
from workflow.manifest import Manifest
from workflow.plan import load
from workflow.plugins import ROOT


@pytest.fixture
def plan(tmp_path):
    return load(write_params(tmp_path, tiny_content()), tmp_path / "results")


def finish(plan, id: str, **summary) -> None:
    with running(plan.jobs[id], plan) as run:
        write_atomic(run.out / "value", "x")
        run.summary.update(summary)


# -------------------------------------------------------------------------------------------------
# whole or not


def test_a_finished_job_leaves_a_complete_manifest(plan, capsys):
    with running(plan.jobs["data/main"], plan) as run:
        assert (
            run.work == plan.results.parent / "work" / plan.jobs["data/main"].fingerprint
            and run.work.is_dir()
        )
        write_atomic(run.out / "train/images", b"123")
        write_json(run.out / "data.json", {"a": (1, 2)})
        (run.work / "checkpoint").write_text("x")
        run.summary.update(images=48, share=0.123456)
        assert not run.job.manifest.exists()
    manifest = plan.manifest("data/main")
    assert manifest.fingerprint == plan.jobs["data/main"].fingerprint
    assert (manifest.job, manifest.stage, manifest.name) == ("data/main", "data", "main")
    assert manifest.outputs == {
        "data.json": hashlib.sha256((run.out / "data.json").read_bytes()).hexdigest(),
        "train/images": hashlib.sha256(b"123").hexdigest(),
    }
    assert manifest.params["data"]["image_size"] == 16
    code = hashlib.sha256((ROOT / "stages/data.py").read_bytes()).hexdigest()
    assert manifest.code["stages/data.py"] == code
    assert manifest.environment["python"] == sys.version.split()[0]
    assert manifest.environment["torch"]
    assert manifest.wall_s >= 0 and manifest.peak_memory_mb > 10 and manifest.threads >= 1
    assert manifest.summary == {"images": 48, "share": 0.123456}
    assert manifest.inputs == {} and manifest.device == "none" and manifest.created
    assert Manifest.read(run.job.manifest) == manifest
    assert not run.work.exists() and plan.fresh("data/main")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("data/main: images=48 share=0.1235 (")


def test_starting_again_clears_the_manifest_first_and_then_the_rest(plan):
    finish(plan, "data/main")
    (plan.jobs["data/main"].output / "old/deep").mkdir(parents=True)
    with running(plan.jobs["data/main"], plan) as run:
        assert list(run.out.iterdir()) == []
        write_atomic(run.out / "value", "x")
    assert list(plan.manifest("data/main").outputs) == ["value"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(143), KeyboardInterrupt()])
def test_an_error_passes_through_and_leaves_no_manifest(plan, error):
    finish(plan, "data/main")
    with pytest.raises(type(error)), running(plan.jobs["data/main"], plan) as run:
        (run.work / "checkpoint").write_text("step 3")
        write_atomic(run.out / "half", "x")
        raise error
    assert not plan.jobs["data/main"].manifest.exists() and not plan.fresh("data/main")
    assert (run.work / "checkpoint").read_text() == "step 3", (
        "work in progress stays for the next attempt"
    )
    with running(plan.jobs["data/main"], plan) as run:
        assert (run.work / "checkpoint").exists() and not (run.out / "half").exists()


def test_inputs_come_from_finished_jobs_only(plan):
    with (
        pytest.raises(
            JobError,
            match="needs data/main, but .*does not exist.*python -m stages.data --name main",
        ),
        running(plan.jobs["pretrain/mae-s0"], plan) as run,
    ):
        run.input("data")
    finish(plan, "data/main")
    with running(plan.jobs["pretrain/mae-s0"], plan) as run:
        assert run.input("data") == plan.jobs["data/main"].output
        with pytest.raises(KeyError):
            run.input("target")
    above = plan.manifest("data/main")
    made = {"job": "data/main", "fingerprint": above.fingerprint, "content": above.content}
    assert len(above.content) == 64
    assert plan.manifest("pretrain/mae-s0").inputs == {"data": made}


def test_an_input_of_another_plan_is_refused(plan, tmp_path):
    finish(plan, "data/main")
    later = load(write_params(tmp_path, tiny_content(data__seed=1)), tmp_path / "results")
    before, after = (p.jobs["data/main"].fingerprint[:12] for p in (plan, later))
    said = (
        f"needs data/main, but .*out of date .fingerprint {before}, expected {after}.: "
        "run .*python -m stages.data --name main"
    )
    with pytest.raises(JobError, match=said), running(later.jobs["pretrain/mae-s0"], later) as run:
        run.input("data")


def test_the_processes_of_a_job_share_its_threads(monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        torch,
        "set_num_threads",
        lambda number: seen.append((number, os.environ["OMP_NUM_THREADS"])),
    )
    seen = []
    for processes in ("1", "2", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        own_process.set_threads(8)
    assert seen == [(8, "8"), (4, "4"), (1, "1")]


def test_commands_are_those_of_the_engines(plan):
    assert plan.jobs["report"].command == "python -m stages.report"
    assert plan.jobs["target/vqkd"].command == "python -m stages.target --name vqkd"
    assert (
        plan.jobs["transfer/mae-s0/knn"].command
        == "python -m stages.transfer --run mae-s0 --task knn"
    )


# -------------------------------------------------------------------------------------------------
# real kills

SCRIPT = """
import signal, sys, time
# a shell has its background processes ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from workflow.plan import load
from stages.kit.job.job import running, write_atomic
plan = load({params!r}, {results!r})
with running(plan.jobs["data/main"], plan) as run:
    write_atomic(run.out / "value", "x")
    (run.work / "checkpoint").write_text("x")
    print("inside", flush=True)
    time.sleep({seconds})
"""


@contextlib.contextmanager
def process(plan, seconds: float = 60):
    """Another process in the middle of the job "data/main"."""
    code = SCRIPT.format(
        root=str(ROOT), params=str(plan.params_file), results=str(plan.results), seconds=seconds
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "inside\n", child.stderr.read()
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    "sign, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_killed_job_leaves_no_manifest_and_can_start_again(plan, sign, code):
    finish(plan, "data/main")
    with process(plan) as child:
        child.send_signal(sign)
        assert child.wait(30) == code
    assert not plan.jobs["data/main"].manifest.exists()
    assert (
        plan.results.parent / "work" / plan.jobs["data/main"].fingerprint / "checkpoint"
    ).exists()
    finish(plan, "data/main")
    assert plan.fresh("data/main")


def test_the_same_job_twice_at_once_is_refused(plan):
    with process(plan):
        value = plan.jobs["data/main"].output / "value"
        with pytest.raises(JobError, match="data/main is running already in another process"):
            finish(plan, "data/main")
        assert value.exists(), "the other one's output is not touched"
        finish(plan, "target/teacher")


# -------------------------------------------------------------------------------------------------
# a full disk


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(JobError, match="the disk is full .*Make room"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_inside_a_job_is_said_clearly_and_leaves_no_file_half_written(plan):
    for error in (OSError(errno.ENOSPC, "No space left on device"),
                  OSError(errno.EFBIG, "File too large"),
                  RuntimeError("I/O error: No space left on device (os error 28)")):  # fmt: skip
        with (
            pytest.raises(JobError, match="disk is full"),
            running(plan.jobs["data/main"], plan) as run,
        ):
            (run.out / "half").write_text("ha")
            raise error
        assert list(plan.jobs["data/main"].output.iterdir()) == []
    with (
        pytest.raises(RuntimeError, match="something else"),
        running(plan.jobs["data/main"], plan) as run,
    ):
        (run.out / "health.json").write_text("{}")
        raise RuntimeError("something else")
    assert len(list(plan.jobs["data/main"].output.iterdir())) == 1


def test_a_full_disk_at_the_manifest(plan, monkeypatch):
    with pytest.raises(JobError, match="disk is full"), running(plan.jobs["data/main"], plan):
        monkeypatch.setattr(os, "replace", full)
    assert list(plan.jobs["data/main"].output.iterdir()) == []


def test_other_errors_of_writing_leave_nothing_either(tmp_path):
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "file", 3)
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_json_is_always_valid(tmp_path):
    import numpy as np

    write_json(
        tmp_path / "a.json",
        {
            "nan": float("nan"),
            "inf": [float("inf")],
            "np": np.float32(0.5),
            "t": (1, 2),
            3: Path("x"),
        },
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None,
        "inf": [None],
        "np": 0.5,
        "t": [1, 2],
        "3": "x",
    }


def test_files_get_the_permissions_of_ordinary_ones(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# -------------------------------------------------------------------------------------------------
# around the job


def test_tracking_never_stops_a_job(tmp_path, monkeypatch, capsys):
    from stages.kit.job import track

    plan = load(write_params(tmp_path, tiny_content(compute__tracking=True)), tmp_path / "results")
    monkeypatch.setattr(track, "_open", lambda run: 1 / 0)
    finish(plan, "data/main")
    assert plan.fresh("data/main") and "tracking: division by zero" in capsys.readouterr().err

    closed = []

    def close(run, entry, status):
        closed.append(status)
        raise RuntimeError("server gone")

    monkeypatch.setattr(track, "_open", lambda run: ("entry",))
    monkeypatch.setattr(track, "_close", close)
    finish(plan, "data/main")
    assert plan.fresh("data/main") and "server gone" in capsys.readouterr().err
    with pytest.raises(ValueError), running(plan.jobs["data/main"], plan):
        raise ValueError
    with pytest.raises(SystemExit), running(plan.jobs["data/main"], plan):
        sys.exit(130)
    assert closed == ["FINISHED", "FAILED", "KILLED"]


def test_only_the_command_of_a_stage_changes_the_process(tmp_path):
    path = write_params(tmp_path, tiny_content(methods__mae__mask_ratoi=1))
    code = f"""
import os, sys
hook, before = sys.excepthook, dict(os.environ)
from stages.kit.job import command, job
assert sys.excepthook is hook and dict(os.environ) == before, "an import has no effect"
if len(sys.argv) > 1:
    command.command("data", "Stage.", lambda run: None, ["--params", {str(path)!r}])
from stages.kit.job.process import QUIET, prepare
prepare()
assert all(os.environ[name] for name in QUIET), "no library reports home"
1 / 0
"""
    environment = {k: v for k, v in os.environ.items() if k not in own_process.QUIET}

    def run(*words: str) -> str:
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        return done.stderr

    said = run()
    assert "Traceback" in said and "ZeroDivisionError" in said
    said = run("badly")
    assert "mask_ratoi" in said and "Traceback" not in said, "an error for the user"


def test_only_rank_0_touches_the_output(plan, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(jobs, "barrier", lambda: None)
    with running(plan.jobs["data/main"], plan):
        pass
    assert not plan.jobs["data/main"].output.exists()


# -------------------------------------------------------------------------------------------------
# devices


class Cuda:
    """torch.cuda with two devices, of which nothing is started."""

    def __init__(self, count=2):
        self.count, self.chosen = count, None

    def device_count(self):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return self.count if seen is None else min(self.count, len(seen.split(",")))

    def is_initialized(self):
        return False

    def set_device(self, device):
        self.chosen = device


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    import torch

    fake = Cuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_the_cpu_without_cuda(cuda):
    cuda.count = 0
    with contextlib.ExitStack() as held:
        assert str(choose_device("cpu", held)) == "cpu"
        with pytest.raises(
            JobError, match="compute.device: cuda is wanted, but torch .* sees no CUDA device"
        ):
            choose_device("cuda", held)


def test_each_job_gets_a_gpu_of_its_own_and_gives_it_back(cuda):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert (
            str(choose_device("auto", first)) == "cuda:0"
            and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        )
        os.environ.pop("CUDA_VISIBLE_DEVICES")  # as in another process
        assert (
            str(choose_device("auto", second)) == "cuda:0"
            and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        )
        second.close()
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    with contextlib.ExitStack() as third:
        choose_device("auto", third)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_job_waits_for_a_free_gpu(cuda, monkeypatch, capsys):
    cuda.count = 1
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        choose_device("cuda", first)
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr(time, "sleep", lambda _: first.close())
        assert str(choose_device("cuda", second)) == "cuda:0"
    assert "waiting for a GPU" in capsys.readouterr().err


def test_named_devices_and_launchers(cuda, monkeypatch):
    with contextlib.ExitStack() as held:
        assert str(choose_device("cuda:1", held)) == "cuda:1"
        with pytest.raises(JobError, match="cuda:7 is wanted, but there are 2"):
            choose_device("cuda:7", held)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
        choose_device("cuda", held)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")  # as torchrun's processes see them
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert str(choose_device("auto", held)) == "cuda:1"


def test_torch_is_imported_only_for_a_device(plan):
    code = SCRIPT.format(
        root=str(ROOT), params=str(plan.params_file), results=str(plan.results), seconds=0
    )
    code += textwrap.dedent("""
        assert "torch" not in sys.modules
        assert str(run.device) == "cpu"
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------
# a job whose engine was killed


ORPHAN = """
import subprocess, sys, time
from pathlib import Path
child = "import sys, time; from pathlib import Path; from stages.kit.job.orphan import sign; "
child += "sign(Path(sys.argv[1])); print('signed', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_a_process_that_lost_its_engine_is_known(tmp_path):
    path, command = tmp_path / "lock", [sys.executable, "-c", ORPHAN, str(tmp_path / "lock")]
    assert left_behind(path) is None, "nobody has signed"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as engine:
        child = int(engine.stdout.readline())
        assert left_behind(path) is None, "its engine lives"
        engine.kill()
    assert left_behind(path) == child
    os.kill(child, signal.SIGKILL)
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_text():
        time.sleep(0.01)
    path.write_text("half a li")
    assert left_behind(path) is None
