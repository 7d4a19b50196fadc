"""The plan: params.yaml -> jobs with fingerprints. Snakefile and dvc.yaml follow it.

A job's fingerprint is a hash of its stage, its slice of the parameters, the bytes of its code and
its inputs' fingerprints. A stage writes the fingerprint into `manifest.json`, its last act, so a
manifest that shows the plan's fingerprint is a finished, up-to-date job, and nothing else is.
Imports no torch.

    python -m workflow.plan                      check params.yaml, write workflow/runs.json (for
    dvc.yaml),
                                                 list the jobs
    python -m workflow.plan --explain JOB        why this job would run python -m workflow.plan
    --cost               what the jobs will take here, from a few measured steps python -m
    workflow.plan --prune              delete outputs of jobs that are no longer in the plan
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workflow.params import Experiment, Params, read
from workflow.plan import digest, manifests
from workflow.plan.code import Code
from workflow.plan.jobs import Job, jobs
from workflow.plugins import ROOT, ParamsError, nearest


class Plan:
    """All jobs of one params file, in an order in which they can run."""

    def __init__(self, params_file: Path, results: Path, root: Path, experiment: Experiment):
        self.params_file, self.results, self.root = params_file, results, root
        self.params: Params = experiment.params
        self.experiment: str = experiment.params.experiment
        self.compute: dict = experiment.params.compute.model_dump()
        self.runs = experiment.runs
        self.jobs: dict[str, Job] = {}
        code = Code(root)
        for job in jobs(experiment, results, params_file):
            hashes = code.hashes(job.code)
            inputs = [self.jobs[i].fingerprint for i in job.inputs]
            fingerprint = digest.of_value([job.stage, job.params, hashes, inputs])
            self.jobs[job.id] = replace(job, fingerprint=fingerprint, hashes=hashes)

    def job(self, id: str) -> Job:
        """The job called `id`; ParamsError with the nearest name if there is none."""
        if id not in self.jobs:
            raise ParamsError(
                f"{self.params_file}: no job is called {id!r}{nearest(id, self.jobs)}"
            )
        return self.jobs[id]

    def processes(self, id: str) -> int:
        """How many processes do a job's work: `compute.processes` where it can be shared, else one."""
        return self.compute["processes"] if self.job(id).spreads else 1

    def manifest(self, id: str) -> dict | None:
        """The manifest that lies in a job's output folder, None if there is none (or it is not
        one).
        """
        return manifests.read(self.job(id).manifest)

    def missing(self, id: str) -> str | None:
        """The first file that the manifest lists and that is not there."""
        output = self.job(id).output
        listed = (self.manifest(id) or {}).get("outputs", {})
        return next((str(output / p) for p in listed if not (output / p).is_file()), None)

    def fresh(self, id: str) -> bool:
        """Is the job's output complete and made by exactly this plan?"""
        manifest = self.manifest(id)
        made = manifest is not None and manifest.get("fingerprint") == self.job(id).fingerprint
        return made and not self.missing(id)


def load(
    params_file: str | Path = "params.yaml", results: str | Path = "results", root: Path = ROOT
) -> Plan:
    """Read and check a params file and lay out its jobs. ParamsError lists everything that is wrong
    with it.
    """
    return Plan(Path(params_file), Path(results), Path(root), read(params_file, root))
