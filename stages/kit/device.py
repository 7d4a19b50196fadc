"""Which device a job uses, and locks: one job on a GPU, one process on a job."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path

from stages.kit.files import JobError


def locked(path: Path):
    """The open, exclusively locked file, or None when another process holds it."""
    file = open(path, "a")  # noqa: SIM115 (the caller closes it; closing unlocks)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # a file system without locks: better to run than not to
    return file


def choose_device(wanted: str, held: contextlib.ExitStack):
    """The torch.device for `wanted` ("auto", "cpu", "mps", "cuda", "cuda:1"). JobError when it is not there.

    With CUDA, each job takes a device of its own: the first one that no other job has locked, waiting if all
    are. Under torchrun and Slurm the launcher has done that, so nothing is locked."""
    import torch

    if wanted == "auto":
        wanted = (
            "cuda" if torch.cuda.device_count() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if not wanted.startswith("cuda"):
        if wanted == "mps" and not torch.backends.mps.is_available():
            raise JobError("compute.device: mps is not available here; use auto or cpu")
        return torch.device(wanted)
    count = torch.cuda.device_count()  # asks the driver's library, does not start CUDA in this process
    if not count:
        raise JobError(
            f"compute.device: {wanted} is wanted, but torch {torch.__version__} sees no CUDA device; "
            "use auto or cpu"
        )
    if "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % count)
    elif ":" in wanted:
        device = torch.device(wanted)
        if device.index >= count:
            raise JobError(
                f"compute.device: {wanted} is wanted, but there are {count} CUDA devices "
                "(cuda:0 is the first)"
            )
        _lock_one([device.index], held)
    elif "SLURM_JOB_ID" in os.environ or torch.cuda.is_initialized():
        device = torch.device("cuda", 0)
    else:
        device = _one_of(torch, count, held)
    torch.cuda.set_device(device)
    return device


def _one_of(torch, count: int, held: contextlib.ExitStack):
    """Lock a free device and make it the only one that this process sees, before CUDA starts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [n.strip() for n in visible.split(",")][:count] if visible else [str(i) for i in range(count)]
    chosen = _lock_one(names, held)
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    held.callback(_restore, "CUDA_VISIBLE_DEVICES", visible)
    return torch.device("cuda", 0)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _lock_one(names: list, held: contextlib.ExitStack) -> str:
    """Lock the first free of these GPUs; wait, and say so once, while none is."""
    said = False
    while True:
        for name in names:
            path = (
                Path(tempfile.gettempdir()) / f"mimlab-{os.getuid()}-gpu-{str(name).replace('/', '_')}.lock"
            )
            if (file := locked(path)) is not None:
                held.enter_context(file)
                return str(name)
        if not said:
            print(
                f"waiting for a GPU: all of {', '.join(map(str, names))} are in use by other jobs",
                file=sys.stderr,
            )
            said = True
        time.sleep(1)
