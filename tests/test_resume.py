"""Real processes of `python -m stages.pretrain`: killed at random moments and started again,
stopped by a signal, run by two processes. The same bytes must come out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# a checkpoint about every 30 ms
TRAIN = {"epochs": 40, "batch_size": 16, "micro_batch": 8, "save_minutes": 0.0005}
# the lone -- keeps torchrun from reading --run as an abbreviation of its own --run-path
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A tiny experiment whose data stage is done, to be copied, with its own copy of the code: a
    file that is edited while the test runs would rightly start the job anew.
    """
    from conftest import tiny_content, write_params

    folder = tmp_path_factory.mktemp("experiment")
    for part in ("stages", "workflow"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    content = tiny_content(train=TRAIN)
    content["targets"] = {}
    content["grid"]["runs"] = {"supervised": {"method": "supervised"}, "mae": {"method": "mae"}}
    write_params(folder, content)
    finish(start(folder, "stages.data"))
    return folder


@pytest.fixture(scope="module")
def straight(experiment, tmp_path_factory):
    """Both runs, without any interruption."""
    folder = tmp_path_factory.mktemp("straight") / "x"
    shutil.copytree(experiment, folder)
    for run in ("supervised-s0", "mae-s0"):
        finish(start(folder, "stages.pretrain", "--run", run))
    return folder


def start(folder: Path, stage: str, *words: str, launcher: tuple = ()) -> subprocess.Popen:
    command = [sys.executable, "-m", *launcher, stage, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out + err


def outputs(folder: Path, run: str) -> dict[str, str]:
    """Hash of every file of a finished run but its manifest."""
    base = folder / "results" / "pretrain" / run
    assert (base / "manifest.json").is_file()
    files = [path for path in base.rglob("*") if path.is_file() and path.name != "manifest.json"]
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {path.relative_to(base).as_posix(): digest for path, digest in digests.items()}


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    """Until this process has saved something, or has ended."""
    began = time.time()
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(
                path.stat().st_mtime > began for path in (folder / "work").glob("*/checkpoint.pt")
            ):
                return
        time.sleep(0.01)


def test_killed_and_restarted_ends_with_the_same_bytes(experiment, straight, tmp_path):
    """The supervised baseline: labels, drop path and accumulation, so every kind of randomness."""
    folder, run, moments = tmp_path / "killed", "supervised-s0", random.Random(7)
    shutil.copytree(experiment, folder)
    kills = 0
    for longest in (0.0, 0.3, 0.6):
        process = start(folder, "stages.pretrain", "--run", run)
        wait_for_checkpoint(folder, process)
        time.sleep(moments.uniform(0.0, longest))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == -signal.SIGKILL:
            assert not (folder / "results/pretrain" / run / "manifest.json").exists()
    assert kills, "every process finished before it was killed: nothing was tested"
    finish(start(folder, "stages.pretrain", "--run", run))
    expected = outputs(straight, run)
    assert {"encoder/model.safetensors", "encoder/config.json", "history.jsonl"} <= set(expected)
    assert outputs(folder, run) == expected
    assert not list((folder / "work").glob("*/checkpoint*"))


def test_sigterm_saves_exits_143_and_the_same_command_continues(experiment, straight, tmp_path):
    folder, run = tmp_path / "stopped", "mae-s0"
    shutil.copytree(experiment, folder)
    process = start(folder, "stages.pretrain", "--run", run)
    wait_for_checkpoint(folder, process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err[-2000:]
    assert "the checkpoint is written" in err
    assert not (folder / "results/pretrain" / run / "manifest.json").exists()
    assert "continuing at step" in finish(start(folder, "stages.pretrain", "--run", run))
    assert outputs(folder, run) == outputs(straight, run)


def test_two_processes_under_torchrun_train_the_same_encoder(experiment, straight, tmp_path):
    folder, run = tmp_path / "two", "mae-s0"
    shutil.copytree(experiment, folder)
    finish(start(folder, "stages.pretrain", "--run", run, launcher=TORCHRUN))
    alone, two = (base / "results/pretrain" / run for base in (straight, folder))
    ours, theirs = (load_file(base / "encoder/model.safetensors") for base in (alone, two))
    # sums of gradients in another order: not bit-equal, but the same training
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-3
    rows = [
        [json.loads(line)["loss"] for line in (base / "history.jsonl").open()]
        for base in (alone, two)
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
