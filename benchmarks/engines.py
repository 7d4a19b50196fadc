"""What a stage's imports take, and plan, Snakemake and DVC on 400 jobs of which none is to be done.

    python benchmarks/engines.py [--jobs 400] [--times 3]

The jobs of the grid are marked as finished by manifests without outputs; nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from _common import ROOT, write

from workflow.plan import load

RUNS = 10


def grid(folder: Path, jobs: int) -> int:
    """Copy the project into `folder` with about `jobs` finished jobs; how many there are."""
    skip = shutil.ignore_patterns(
        ".git", ".venv", "results", "work", "logs", "mlruns", ".snakemake", "__pycache__"
    )
    shutil.copytree(ROOT, folder, ignore=skip)
    content = yaml.safe_load((folder / "params.yaml").read_text())
    runs = {f"mae{i}": {"method": "mae", "set": {"lr": 1e-3 * (i + 1)}} for i in range(RUNS)}
    content["grid"] = {"seeds": list(range(max(1, jobs // (4 * RUNS)))), "runs": runs}
    content["compute"] = {"tracking": False}
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    here = os.getcwd()
    os.chdir(folder)
    try:
        plan = load("params.yaml", "results")
        for job in plan.jobs.values():
            for file in job.files:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("{}")
            job.manifest.write_text(plan.finished(job.id).text())
        return len(plan.jobs)
    finally:
        os.chdir(here)


def timed(command: list[str], folder: Path, times: int) -> tuple[float, float, int]:
    """(least seconds, least CPU seconds, exit status) of a command."""
    found, status = [], 0
    for _ in range(times):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        status = subprocess.run(command, cwd=folder, capture_output=True).returncode
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        found.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return min(w for w, _ in found), min(c for _, c in found), status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    python, scripts = sys.executable, Path(sys.executable).parent
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "grid"
        count = grid(folder, args.jobs)
        dvc = str(scripts / "dvc")
        for record in (
            ["git", "init", "-q"],
            [python, "-m", "workflow.plan"],
            [dvc, "commit", "-f", "-q"],
        ):
            subprocess.run(
                record, cwd=folder, check=True, stdout=subprocess.DEVNULL
            )  # as after a run
        untrained = [python, "-c", "from stages import pretrain"]
        for what, command, goal in (
            ("a stage's imports", untrained, "5 s"),
            (f"workflow.plan, {count} jobs", [python, "-m", "workflow.plan"], "-"),
            (f"snakemake -n, {count} jobs", [str(scripts / "snakemake"), "-n", "-q"], "4 s"),
            (f"dvc status, {count} jobs", [dvc, "status", "-q"], "6 s"),
        ):
            wall, cpu, status = timed(command, folder, args.times)
            rows.append([what, f"{wall:.1f}", f"{cpu:.1f}", goal, status])
    columns = ["what", "time, s", "CPU time, s", "goal", "exit status"]
    write(
        "engines",
        columns,
        rows,
        f"The least of {args.times} runs; results finished, nothing to be done.",
    )


if __name__ == "__main__":
    main()
