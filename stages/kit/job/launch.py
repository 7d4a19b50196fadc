"""One job on several processes: with `compute.processes` a stage starts itself again in torchrun.

The command of a job stays the same for a person, Snakemake and DVC, and how many processes do the
work is part of no fingerprint. `torchrun --standalone --nproc-per-node N -m -- stages.pretrain ...`
by hand does the same, but locks no GPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from stages.kit.job.device import cuda_count, resolved, take_gpus
from workflow.files import JobError


def spread(plan, job, argv: list[str] | None = None) -> None:
    """Become torchrun, with as many processes of this command as the plan gives to the job.

    Returns if that is one, and in the processes of torchrun. Otherwise this process is replaced,
    so that signals and the exit status are torchrun's. On a machine with GPUs as many are locked
    first, for as long as torchrun lives. JobError if there are fewer, or for several processes on
    one named device.
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
            f"compute.processes: {processes} processes cannot share {device}; use device cuda, "
            "cpu or auto"
        )
    held = contextlib.ExitStack()
    if device == "cuda":
        count = cuda_count(device)
        if count < processes:
            raise JobError(
                f"compute.processes: {processes} processes need a CUDA device each, but torch sees "
                f"{count}"
            )
        take_gpus(count, processes, held)
    cores = plan.compute["threads"] or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))  # of each process
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes} -m --".split()
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *torchrun, f"stages.{job.stage}", *argv])


def _die_with_parent() -> None:
    """Have this process killed when torchrun is killed (Linux); else it would go on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
