"""The machine: how many GPUs and cores jobs may use here. Does not import torch."""

from __future__ import annotations

import os
from pathlib import Path


def gpus_here() -> int:
    """How many GPUs jobs may use on this machine or, inside a Slurm job, in that job."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return 0 if listed in ("", "-1") else len(listed.split(","))
    if "SLURM_JOB_ID" in os.environ:  # Slurm sets the list where it gave a job any
        return 0
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def gpus(device: str) -> int:
    """How many GPUs a process takes under a `compute.device`: 1 or 0.

    "auto" takes one where this machine has any.
    """
    return int(device.startswith("cuda") or (device == "auto" and gpus_here() > 0))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(wanted: int | None, cores: int) -> int:
    """CPU threads of a job: `wanted` (compute.threads), or its share of the cores.

    Four jobs share the cores, or one job for each GPU where there are more than four.
    """
    return wanted or max(1, cores // max(4, gpus_here()))
