"""Several jobs on one machine's GPUs, and several processes on one job. The GPUs are pretended, the
locks are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import tiny_content, write_params

from stages.kit.job import device, launch
from stages.kit.train.signals import Signals
from workflow import machine
from workflow.files import JobError
from workflow.plan import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """Locks in a folder of the test's own, and nothing of a launcher in the environment."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def start(folder: Path, code: str, **environment) -> subprocess.Popen:
    """A process with the locks of this test."""
    head = f"import sys, time, contextlib; sys.path.insert(0, {str(ROOT)!r})\n"
    head += "from stages.kit.job import device\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)} | environment,
    )


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def free(name: str) -> bool:
    """Could a job have this GPU now?"""
    file = device.locked(device._lock_file(name))
    if file is not None:
        file.close()
    return file is not None


# -------------------------------------------------------------------------------------------------
# locks


def test_the_gpu_of_a_killed_job_is_free_at_once(tmp_path):
    job = start(
        tmp_path,
        'h = contextlib.ExitStack(); print(*device.hold(["0"], 1, h), flush=True); time.sleep(100)',
    )
    assert job.stdout.readline() == "0\n" and not free("0")
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    assert (tmp_path / "mimlab-gpu-0.lock").exists(), "the file stays, the lock does not"
    assert free("0")


RACE = """
import os
wait, device.time.sleep = time.sleep, lambda _: None
open(f"ready-{os.getpid()}", "x").close()
while sum(name.startswith("ready") for name in os.listdir()) < 4:
    wait(0.001)
for turn in range(15):
    with contextlib.ExitStack() as held:
        mine = device.hold(["0", "1", "2"], 2, held)
        for name in mine:
            open(f"using-{name}", "x").close()
        wait(0.002)
        for name in mine:
            os.unlink(f"using-{name}")
"""


def test_jobs_that_race_for_two_of_three_gpus_share_none_and_all_get_theirs(tmp_path):
    jobs = [start(tmp_path, RACE) for _ in range(4)]
    assert [(job.communicate(timeout=60), job.returncode) for job in jobs] == [(("", None), 0)] * 4


def test_a_job_of_two_gpus_waits_for_both_and_takes_none_meanwhile(monkeypatch, capsys):
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert device.hold(["0", "1"], 1, first) == ["0"]

        def meanwhile(_):
            assert free("1"), "whoever waits must not keep one"
            first.close()

        monkeypatch.setattr(device.time, "sleep", meanwhile)
        assert device.hold(["0", "1"], 2, second) == ["0", "1"]
        assert not free("0") and not free("1")
    assert (
        capsys.readouterr().err == "waiting for 2 GPUs: too many of 0, 1 are in use by other jobs\n"
    )
    assert free("0") and free("1")


def test_another_users_lock_is_respected(tmp_path, monkeypatch):
    """Their file can be read, not written."""
    job = start(
        tmp_path,
        'h = contextlib.ExitStack(); print(*device.hold(["0"], 1, h), flush=True); time.sleep(100)',
    )
    job.stdout.readline()

    def theirs(path, mode="r"):
        if mode != "r":
            raise PermissionError(13, "not yours", str(path))
        return open(path, mode)

    monkeypatch.setattr(device, "open", theirs, raising=False)
    assert not free("0")
    job.kill()
    job.communicate()
    assert free("0")


@pytest.fixture
def private():
    """A umask that gives new files to their maker alone."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_locks_are_for_every_user_whatever_the_umask(tmp_path, private):
    with contextlib.ExitStack() as held:
        device.hold(["0"], 1, held)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        "mimlab-gpu-0.lock": "0o666", "mimlab-gpu-door.lock": "0o666"}  # fmt: skip
    assert os.umask(0o077) == 0o077


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_second_user_waits_for_a_gpu_and_then_has_it(private, monkeypatch):
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        contextlib.ExitStack() as held,
        contextlib.ExitStack() as theirs,
    ):
        os.chmod(folder, 0o1777)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
        device.hold(["0"], 1, held)
        os.seteuid(65534)
        try:
            assert not free("0")
            held.close()
            assert device.hold(["0"], 1, theirs) == ["0"]
        finally:
            os.seteuid(0)
        assert not free("0")


@pytest.mark.parametrize("started", [False, True])
def test_a_job_is_on_the_gpu_that_it_has_locked(started, monkeypatch):
    """Also where torch counts devices by starting CUDA, which has then read CUDA_VISIBLE_DEVICES:
    no NVML, or MIG.
    """
    import torch

    def count() -> int:
        return 3 if started else len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    monkeypatch.setattr(torch.cuda, "device_count", count)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with contextlib.ExitStack() as other, contextlib.ExitStack() as held:
        device.hold(["2"], 1, other)
        found = device.choose_device("cuda", held)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5" and not free("5")
        assert found == torch.device("cuda", 1 if started else 0) and current == [found]


def test_each_slurm_job_counts_its_own_gpus(monkeypatch):
    """Two Slurm jobs on one node, to both of which their GPU is called 0."""
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        for number, held in (("7", first), ("8", second)):
            monkeypatch.setenv("SLURM_JOB_ID", number)
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
            device.take_gpus(1, 1, held)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
            assert not free("0"), "a second job inside this Slurm job would have to wait"


def test_gpus_for_snakemake(monkeypatch):
    monkeypatch.setattr(machine.Path, "glob", lambda self, _: [1, 2, 3, 4])
    assert machine.gpus_here() == 4 and [machine.gpus(d) for d in ("auto", "cuda", "cpu")] == [
        1,
        1,
        0,
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert machine.gpus_here() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus_here() == 0 and [machine.gpus(d) for d in ("auto", "cuda", "cuda:1")] == [
        0,
        1,
        1,
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert machine.gpus_here() == 0, "Slurm gave this job none, whatever the node has"


# -------------------------------------------------------------------------------------------------
# processes


class Replaced(Exception):
    """What stands for the program that would have replaced this one."""


@pytest.fixture
def become(monkeypatch):
    """The command line that `spread` would turn into."""

    def execv(path, arguments):
        assert path == sys.executable == arguments[0]
        raise Replaced(" ".join(arguments[1:]))

    monkeypatch.setattr(launch.os, "execv", execv)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)


def plan_of(folder: Path, **compute):
    return load(
        write_params(folder, tiny_content(compute={"processes": 2, **compute})), folder / "results"
    )


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -m --"


def test_a_job_becomes_torchrun_with_its_share_of_threads(tmp_path, become):
    plan = plan_of(tmp_path, threads=5)
    with pytest.raises(Replaced, match=f"^{TORCHRUN} stages.pretrain --run mae-s0$"):
        launch.spread(plan, plan.jobs["pretrain/mae-s0"], ["--run", "mae-s0"])
    assert os.environ["OMP_NUM_THREADS"] == "2" and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_what_several_processes_cannot_share_stays_with_one(tmp_path, become, monkeypatch):
    plan = plan_of(tmp_path)
    several = {id for id in plan.jobs if plan.processes(id) == 2}
    assert several == {
        "target/teacher",
        "target/vqkd",
        "pretrain/mae-s0",
        "pretrain/beitv2-s0",
        "pretrain/supervised-s0",
        *(f"transfer/{run}-s0/finetune" for run in ("mae", "beitv2", "random", "supervised")),
    }
    launch.spread(plan, plan.jobs["pretrain/random-s0"], [])
    monkeypatch.setattr(launch, "_die_with_parent", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch.spread(plan, plan.jobs["pretrain/mae-s0"], [])  # one of the processes already


def test_how_many_processes_changes_no_fingerprint(tmp_path):
    one, two = (plan_of(tmp_path, processes=n) for n in (1, 2))
    assert [j.fingerprint for j in one.jobs.values()] == [j.fingerprint for j in two.jobs.values()]


def test_gpus_are_locked_together_and_stay_locked_in_torchrun(tmp_path, become, monkeypatch):
    monkeypatch.setattr(launch, "resolved", lambda wanted: "cuda")
    monkeypatch.setattr(launch, "cuda_count", lambda wanted: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,7")
    plan = plan_of(tmp_path)
    inheritable = []
    monkeypatch.setattr(device.os, "set_inheritable", lambda *what: inheritable.append(what[1]))
    with contextlib.ExitStack() as other:
        device.hold(["2"], 1, other)
        inheritable.clear()
        with pytest.raises(Replaced):
            launch.spread(plan, plan.jobs["pretrain/mae-s0"], [])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6" and inheritable == [True, True]
    monkeypatch.undo()
    code = (
        "import os\nheld = contextlib.ExitStack(); device.take_gpus(1, 1, held)\n"
        "os.execv(sys.executable, "
        '[sys.executable, "-c", "import time; print(1, flush=True); time.sleep(100)"])'
    )
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    job = start(tmp_path, code)
    job.stdout.readline()
    assert not free("0"), "the program that replaced the one that locked"
    job.kill()
    job.communicate()
    assert free("0")


def test_too_few_gpus_and_one_named_gpu_are_refused(tmp_path, become, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plan = plan_of(tmp_path, device="cuda")
    with pytest.raises(
        JobError, match="compute.processes: 2 processes need a CUDA device each, but torch sees 1"
    ):
        launch.spread(plan, plan.jobs["pretrain/mae-s0"], [])
    plan = plan_of(tmp_path, device="cuda:0")
    with pytest.raises(JobError, match="compute.processes: 2 processes cannot share cuda:0"):
        launch.spread(plan, plan.jobs["pretrain/mae-s0"], [])
    monkeypatch.setenv(
        "LOCAL_RANK", "1"
    )  # torchrun by hand, with one more process than there are devices
    with (
        contextlib.ExitStack() as held,
        pytest.raises(JobError, match="need a CUDA device each, but torch sees 1"),
    ):
        device.choose_device("cuda", held)


def test_sigterm_from_slurm_and_from_torchrun_is_one_sigterm():
    """Both send one to each process. The checkpoint that the first asks for is still written."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.number == signal.SIGTERM
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent died"
)
def test_a_killed_torchrun_leaves_no_process_behind(tmp_path):
    worker = (
        "from stages.kit.job.launch import spread\nspread(None, None)\n"
        "print(1, flush=True); time.sleep(9); print('alive')"
    )
    parent = (
        "import subprocess, os\n"
        "subprocess.Popen([sys.executable, '-c', {!r}], start_new_session=True)\ntime.sleep(100)"
    )
    head = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
    job = start(tmp_path, parent.format(head + worker), LOCAL_RANK="0")
    assert job.stdout.readline() == "1\n"
    job.kill()
    assert job.stdout.read() == "", "the pipe ends when the last process that holds it does"
    job.wait()


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "snakemake").exists(),
    reason="needs snakemake beside this Python",
)
def test_snakemake_runs_a_job_of_two_processes(tmp_path):
    """The real Snakefile and stages: two processes, and the losses of one."""
    losses = {}
    for processes in (1, 2):
        plan = plan_of(tmp_path / str(processes), processes=processes)
        config = [f"params={plan.params_file}", f"results={plan.results}", "dvc=false"]
        job = plan.jobs["pretrain/mae-s0"]
        command = [
            "-m",
            "snakemake",
            "--cores",
            "2",
            "--nolock",
            "--config",
            *config,
            "--",
            str(job.manifest),
        ]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        log = plan.results.parent / "logs/pretrain/mae-s0.log"
        assert done.returncode == 0, (
            done.stdout + done.stderr + (log.read_text() if log.exists() else "")
        )
        rows = (job.output / "history.jsonl").read_text().splitlines()
        losses[processes] = [json.loads(row)["loss"] for row in rows]
        assert job.manifest.is_file() and not plan.missing(job.id)
    assert len(losses[1]) == 3 and losses[2] == pytest.approx(losses[1], rel=1e-4)
