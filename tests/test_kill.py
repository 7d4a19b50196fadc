"""Every stage that trains, killed at many moments, stopped by signals, on a full disk: started
again, it ends with the bytes of a run that nothing happened to.
"""

from __future__ import annotations

import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_content, write_params
from warm import context

WORKERS = (0, 2)  # loader threads, in turn from one start to the next
# a checkpoint after every step
TRAIN = {"epochs": 2, "batch_size": 16, "micro_batch": 8, "save_minutes": 1e-9}
SMALL = {"prototypes": 32, "hidden": 16, "bottleneck": 8, "n_local": 1, "centring": "centre"}
CODES = {"codes": 8, "code_dim": 4, "vectors_per_code": 4}
TARGETS = {
    "teacher": {"kind": "dino", **SMALL, "min_rank": 0.0, "min_information": 0.0},
    "vqkd": {"upstream": "teacher", **CODES, "min_usage": 0.0, "min_perplexity": 0.0},
}
JOBS = {
    "data/main": ("stages.data",),
    "target/teacher": ("stages.target", "--name", "teacher"),
    "target/vqkd": ("stages.target", "--name", "vqkd"),
    "pretrain/beitv2-s0": ("stages.pretrain", "--run", "beitv2-s0"),
    "transfer/beitv2-s0/finetune": ("stages.transfer", "--run", "beitv2-s0", "--task", "finetune"),
}
TRAINED = list(JOBS)[1:]
RESULT = r"os.mkdir .*/encoder|open .*/\.(target|scores)"  # the first file of what is exported
CHANGES = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "shutil.rmtree",
}  # Python's audit events


def run(folder: Path, job: str, workers: int = 0, moment: tuple = ()) -> int:
    """One job in a process of its own; its exit status, or minus the signal that ended it."""
    process = context().Process(target=_job, args=(str(folder), JOBS[job], workers, moment))
    process.start()
    if moment[:1] == ("after",):
        process.join(moment[1])
        process.kill()
    process.join(120)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def _job(folder: str, words: tuple, workers: int, moment: tuple) -> None:
    os.chdir(folder)
    os.environ["MIMLAB_TRACKING"] = "off"
    with open("log", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import importlib

    import torch

    from stages.kit.job import command

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = importlib.import_module(words[0])
    # a job whose code is edited meanwhile would start anew
    command.load = functools.partial(command.load, root=Path("code"))
    seen = _watch(os.path.realpath(folder), moment)
    if moment[:1] == ("room",):
        resource.setrlimit(resource.RLIMIT_FSIZE, (moment[1], resource.RLIM_INFINITY))
    try:
        code = module.main([*words[1:], "--params", f"params{workers}.yaml"])
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    Path("events").write_text(str(seen["count"]))
    raise SystemExit(code)


def _watch(folder: str, moment: tuple) -> dict:
    """Counts what changes files below the folder and acts at one of them.

    moment: ("event", n): SIGKILL at the n-th change; ("at", pattern, n): at the n-th whose path
    fits; ("torn", pattern, n): as soon as 500 bytes have been written to a file after that; (signal
    number, pattern, n): that signal then.
    """
    kind, *rest = moment or ("", "")
    pattern = re.compile(rest[0] if rest and isinstance(rest[0], str) else ".")
    seen = {"count": 0, "fits": 0}

    def hook(event, arguments):
        if event not in CHANGES or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        path = os.path.abspath(arguments[0])
        if not path.startswith(folder):
            return
        seen["count"] += 1
        seen["fits"] += bool(pattern.search(f"{event} {path}"))
        if kind == "event" and seen["count"] == rest[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(rest) == 2 and seen["fits"] == rest[1]:
            seen["fits"] += 1  # once
            if kind == "at":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "torn":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
            else:
                os.kill(os.getpid(), kind)

    sys.addaudithook(hook)
    return seen


def outputs(folder: Path, job: str) -> dict[str, bytes]:
    """Every file of a job but its manifest."""
    base = folder / "results" / job
    files = [
        path for path in sorted(base.rglob("*")) if path.is_file() and path.name != "manifest.json"
    ]
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Every job without any interruption; events: {job: how often it changed files}."""
    folder = tmp_path_factory.mktemp("kill") / "straight"
    for part in ("stages", "workflow"):
        shutil.copytree(
            Path(__file__).parents[1] / part,
            folder / "code" / part,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    content = tiny_content(train=TRAIN)
    content["targets"] = TARGETS
    content["tasks"] = {"finetune": {"epochs": 2, "batch_size": 16}}
    content["grid"]["runs"] = {
        "beitv2": {"method": "beitv2", "target": "vqkd", "set": {"drop_path": 0.2}}
    }
    for workers in WORKERS:
        content["compute"]["workers"] = workers
        write_params(folder, content).rename(folder / f"params{workers}.yaml")
    events = {}
    for job in JOBS:
        assert run(folder, job) == 0, (folder / "log").read_text()
        events[job] = int((folder / "events").read_text())
    return folder, events


@pytest.fixture
def lab(straight, tmp_path):
    """A copy, in which things may be broken."""
    folder = tmp_path / "lab"
    shutil.copytree(straight[0], folder)
    return folder


@pytest.mark.parametrize("job", TRAINED)
def test_killed_at_any_moment_and_started_again_ends_with_the_same_bytes(job, straight, lab):
    """Each start continues what the one before left; every second start has loader threads."""
    draw, events = random.Random(job), straight[1][job]
    moments = [
        ("at", r"checkpoint.*tmp", 1),  # before the first checkpoint
        ("torn", r"checkpoint.*tmp", 2),  # while the second is written, half of it
        (signal.SIGTERM, r"open .*work.*history", 2),
        ("at", r"open .*work.*history", 3),  # between two
        ("at", r"os.rename .*checkpoint", 2),  # between the two renames of one
        ("event", draw.randint(1, events // 3)),
        ("after", draw.uniform(0.0, 0.5)),
        ("torn", RESULT, 1),  # while the result is exported
        (signal.SIGINT, RESULT, 1),
        ("at", r"results.*manifest\.json", 3),  # all but the last act
        ("event", draw.randint(1, 20)),
    ]
    codes = [run(lab, job, WORKERS[start % 2], moment) for start, moment in enumerate(moments)]
    log = (lab / "log").read_text()
    assert codes[2] == 143 and codes[8] == 130, (codes, log)
    expected = {-signal.SIGKILL, -signal.SIGXFSZ, 143, 130}
    assert sum(code in expected for code in codes) >= 9 and not set(codes) - expected - {0}, (
        codes,
        log,
    )
    assert (
        codes.count(-signal.SIGXFSZ) == 2
        and "continuing at step" in log
        and "the checkpoint is written" in log
    )
    assert run(lab, job) == 0
    assert outputs(lab, job) == outputs(straight[0], job)
    assert (lab / "results" / job / "manifest.json").is_file() and not list(
        (lab / "work").glob("*/checkpoint*")
    )


@pytest.mark.parametrize("job", TRAINED)
@pytest.mark.parametrize("room", [100, 3000])
def test_without_room_the_error_says_so_and_no_file_is_half_written(job, room, straight, lab):
    """No file can grow beyond some bytes, whoever writes it: as on a full disk, but for each file
    alone.
    """
    (lab / "log").unlink()
    assert run(lab, job, 0, ("room", room)) == 1
    log = (lab / "log").read_text()
    assert "error: " in log and "the disk is full (" in log and "Traceback" not in log, log
    expected = outputs(straight[0], job)
    for name, content in outputs(lab, job).items():
        assert content == expected[name], name
    assert run(lab, job) == 0
    assert outputs(lab, job) == expected


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_small_disk_that_is_full(straight, small_disk):
    job = "pretrain/beitv2-s0"
    for name in ("params0.yaml", "code", "results/data", "results/target"):
        source, place = straight[0] / name, small_disk / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place)
    ballast = small_disk / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 40960))
    assert run(small_disk, job) == 1
    log = (small_disk / "log").read_text()
    assert (
        "the disk is full (" in log and "No space left on device" in log and "Traceback" not in log
    ), log
    assert outputs(small_disk, job) == {}
    ballast.unlink()
    assert run(small_disk, job) == 0
    assert outputs(small_disk, job) == outputs(straight[0], job)
