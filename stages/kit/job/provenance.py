"""Where a job ran: versions, machine, commit, memory. Imports no torch; asks it if it is there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "numpy", "safetensors", "datasets", "scikit-learn")


def environment() -> dict:
    """Versions, platform and hardware on which a job ran."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    torch, gpu = sys.modules.get("torch"), None
    if torch is not None and torch.cuda.is_initialized():
        gpu = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpu": gpu,
    }


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(root: Path) -> dict | None:
    """{"commit", "dirty"} of the repository around `root`; None outside of one.

    Dirty: tracked files differ from the commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def peak_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
