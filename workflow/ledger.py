"""What the Snakefile needs beyond the plan: the machine's GPUs, and DVC's record of what Snakemake
made.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from workflow.plan import Job, Plan


def gpus_here() -> int:
    """How many GPUs jobs on this machine may use, or in this Slurm job. Does not import torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return 0 if listed in ("", "-1") else len(listed.split(","))
    if "SLURM_JOB_ID" in os.environ:  # Slurm lists those that a job was given
        return 0
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def gpus(device: str) -> int:
    """1 if a process of this `compute.device` takes a GPU, else 0; "auto" takes one where this
    machine has any.
    """
    return int(device.startswith("cuda") or (device == "auto" and gpus_here() > 0))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(wanted: int | None, cores: int) -> int:
    """How many threads a job gets: `compute.threads`, or the cores shared by four jobs, or by one
    for each GPU.
    """
    return wanted or max(1, cores // max(4, gpus_here()))


def stage_name(job: Job, plan: Plan) -> str:
    """The name of a job's stage in dvc.yaml."""
    if job.stage == "data":
        return "data@data"
    if job.stage == "target":
        kind = "target_upstream" if plan.params.targets[job.name].get("upstream") else "target"
        return f"{kind}@{job.name}"
    if job.stage == "pretrain":
        return f"{'pretrain_taught' if job.inputs[1:] else 'pretrain'}@{job.name}"
    return f"transfer@{job.name.replace('/', '-')}" if job.stage == "transfer" else job.stage


def record(plan: Plan) -> bool:
    """`dvc commit` the jobs that are finished, so that dvc.lock and DVC's cache follow. True if it
    did.

    Does nothing without DVC or outside of a DVC repository; a failure is a warning: results are
    good without it.
    """
    if not (plan.root / ".dvc").is_dir() or importlib.util.find_spec("dvc") is None:
        return False
    fresh = [job for job in plan.jobs.values() if plan.fresh(job.id)]
    names = (
        [] if len(fresh) == len(plan.jobs) else ["plan", *(stage_name(job, plan) for job in fresh)]
    )
    command = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet", *names]
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, cwd=plan.root, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"warning: dvc.lock was not updated: {done.stderr.strip()[-500:]}", file=sys.stderr)
    return done.returncode == 0
