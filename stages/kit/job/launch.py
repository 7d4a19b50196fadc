"""One job on several processes: `compute.processes` makes a stage start itself again under
torchrun.

The command of a job stays the same for a person, Snakemake and DVC; how many processes do the work
is part of no fingerprint. `torchrun --standalone --nproc-per-node N -m -- stages.pretrain ...` by
hand does the same, but locks no GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from stages.kit.job.device import cuda_count, resolved, take_gpus
from stages.kit.job.files import JobError


def spread(plan, job, argv: list[str] | None = None) -> None:
    """Becomes torchrun with as many processes of this very command as the plan gives the job;
    returns when that is one, and in those processes.

    This process is replaced, so that signals and the exit status are torchrun's. On a GPU machine
    as many GPUs are locked first, for as long as torchrun lives. JobError when there are fewer, or
    for more processes on one named device.
    """
    if "LOCAL_RANK" in os.environ:
        _die_with_parent()
        return
    processes = plan.processes(job.id)
    if processes == 1:
        return
    device = resolved(plan.compute["device"])
    if device.startswith("cuda:"):
        raise JobError(
            f"compute.processes: {processes} processes cannot share {device}; use device cuda, cpu or auto"
        )
    held = contextlib.ExitStack()
    if device == "cuda":
        count = cuda_count(device)
        if count < processes:
            raise JobError(
                f"compute.processes: {processes} processes need a CUDA device each, but torch sees {count}"
            )
        take_gpus(count, processes, held)
    cores = plan.compute["threads"] or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))  # of each process
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "--",
    ]
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *torchrun, f"stages.{job.stage}", *argv])


def _die_with_parent() -> None:
    """A process of torchrun has a session of its own: a SIGKILL that ends torchrun has to end it
    too (Linux).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
