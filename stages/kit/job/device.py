"""Which device a job uses, and locks: one job on a GPU, one process on a job."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from workflow.files import JobError


def locked(path: Path):
    """The open, exclusively locked file, or None when another process holds it.

    The lock belongs to the open file, so it ends with the process however that ends: no lock is
    ever stale.
    """
    file = _opened(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # a file system without locks: better to run than not to
    return file


def _opened(path: Path):
    """The file, made if missing; the caller closes it."""
    try:
        return open(path, "a")
    except PermissionError:  # another user's; to lock a file, reading it is enough
        return open(path)


def choose_device(wanted: str, held: contextlib.ExitStack):
    """The torch.device for `wanted`: "auto", "cpu", "cuda", "cuda:1". JobError if it is not there.

    With CUDA each job has a device of its own until `held` closes: the first one that no other job
    has locked. If all are locked it waits. Of the processes of torchrun each takes one of the
    devices that their launcher has locked (kit/job/launch.py).
    """
    import torch

    wanted = resolved(wanted)
    if not wanted.startswith("cuda"):
        return torch.device(wanted)
    count = cuda_count(wanted)
    if "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= count:
            processes = os.environ.get("LOCAL_WORLD_SIZE", "several")
            raise JobError(
                f"{processes} processes need a CUDA device each, but torch sees {count}; use fewer "
                "in compute.processes"
            )
    elif ":" in wanted:
        device = torch.device(wanted)
        if device.index >= count:
            raise JobError(
                f"compute.device: {wanted} is wanted, but there are {count} CUDA devices "
                "(cuda:0 is the first)"
            )
        hold([visible(count)[device.index]], 1, held)
    elif torch.cuda.is_initialized():  # too late to choose: CUDA has read CUDA_VISIBLE_DEVICES
        device = torch.device("cuda", 0)
    else:
        names = visible(count)
        [name] = take_gpus(count, 1, held)
        # Without NVML torch counts by starting CUDA, which then goes on to see all of them.
        device = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else names.index(name))
    torch.cuda.set_device(device)
    return device


def resolved(wanted: str) -> str:
    """What "auto" means here, "cuda" or "cpu"; anything else stays."""
    import torch

    if wanted != "auto":
        return wanted
    # Apple's MPS is never chosen: it has no float64, which a training needs.
    return "cuda" if torch.cuda.device_count() else "cpu"


def cuda_count(wanted: str) -> int:
    """How many CUDA devices torch sees. JobError when there is none."""
    import torch

    if count := torch.cuda.device_count():
        return count
    raise JobError(
        f"compute.device: {wanted} is wanted, but torch {torch.__version__} sees no CUDA device; "
        "use auto or cpu"
    )


def take_gpus(count: int, wanted: int, held: contextlib.ExitStack) -> list[str]:
    """Lock `wanted` of the `count` visible GPUs; their names.

    CUDA, where it has not started yet, sees only these until `held` closes.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = hold(visible(count), wanted, held)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    held.callback(_restore, "CUDA_VISIBLE_DEVICES", before)
    return names


def visible(count: int) -> list[str]:
    """Names of the first `count` GPUs that this process may use: their numbers, or what
    CUDA_VISIBLE_DEVICES calls them.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names:
        return [name.strip() for name in names.split(",")][:count]
    return [str(number) for number in range(count)]


def hold(names: list[str], wanted: int, held: contextlib.ExitStack) -> list[str]:
    """Lock the first `wanted` free GPUs of these; wait, and say so once, while there are too few.

    It locks all or none, and one process at a time looks. Otherwise two jobs that want two GPUs
    each could hold one each and wait for the other. The locks open when `held` closes or the
    process ends.
    """
    said = False
    while True:
        with contextlib.ExitStack() as found, _opened(_lock_file("door")) as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            free = {}
            for name in names:
                if len(free) < wanted and (file := locked(_lock_file(name))) is not None:
                    free[name] = found.enter_context(file)
                    # kit/job/launch.py becomes another program, which has to keep the lock
                    os.set_inheritable(file.fileno(), True)
            if len(free) == wanted:
                held.push(found.pop_all())
                return list(free)
        if not said:
            needs = "a GPU: all" if wanted == 1 else f"{wanted} GPUs: too many"
            print(
                f"waiting for {needs} of {', '.join(names)} are in use by other jobs",
                file=sys.stderr,
                flush=True,
            )
            said = True
        time.sleep(1)


def _lock_file(name: str) -> Path:
    """The lock file of a GPU, made if missing. Every user may lock it, whatever the umask is.

    Inside a Slurm job the file is the job's own: Slurm may call the GPU of every job 0.
    """
    slurm = os.environ.get("SLURM_JOB_ID")
    place = f"mimlab-{slurm}-gpu-{name}" if slurm else f"mimlab-gpu-{name}"
    path = Path(tempfile.gettempdir()) / f"{re.sub(r'[^A-Za-z0-9.-]', '_', place)}.lock"
    umask = os.umask(0)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        pass
    finally:
        os.umask(umask)
    return path


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
