"""The plan: params.yaml -> jobs with fingerprints. Snakefile and dvc.yaml follow it.

A job's fingerprint is a hash of its stage, its slice of the parameters, the bytes of its code and
the fingerprints of its inputs. A stage writes the fingerprint into `manifest.json` as its last act.
So a manifest that shows the plan's fingerprint is a finished job that is up to date, and nothing
else is. Imports no torch.

    python -m workflow.plan                  check params.yaml, list its jobs and their state
    python -m workflow.plan --explain JOB    why this job would run
    python -m workflow.plan --prune          delete outputs of jobs that are no longer in the plan
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workflow.manifest import FILE, Manifest
from workflow.params import Experiment, Params, messages, read
from workflow.plan import digest
from workflow.plan.doubts import doubts
from workflow.plan.job import Job
from workflow.plan.jobs import jobs
from workflow.plan.lacks import lacks, splits
from workflow.plugins import ROOT, ParamsError, nearest

__all__ = ["Job", "Plan", "load"]


class Plan:
    """All jobs of one params file, each after its inputs."""

    def __init__(self, params_file: Path, results: Path, root: Path, experiment: Experiment):
        self.params_file, self.results, self.root = params_file, results, root
        self.params: Params = experiment.params
        self.experiment: str = experiment.params.experiment
        self.compute: dict = experiment.params.compute.model_dump()
        self.runs = experiment.runs
        self._experiment = experiment
        self.jobs: dict[str, Job] = {}
        files = digest.Files(root)
        for job in jobs(experiment, results, params_file, root, files):
            hashes = files.hashes(job.code)
            inputs = {role: self.jobs[id].fingerprint for role, id in job.inputs.items()}
            fingerprint = digest.of_job(job.stage, job.params, job.places, hashes, inputs)
            self.jobs[job.id] = replace(job, fingerprint=fingerprint, hashes=hashes)
        if problems := self.lacks():
            raise ParamsError(messages.listing(str(params_file), problems))

    def lacks(self, made: dict[str, Path] | None = None) -> list[str]:
        """What will fail for want of labels, masks or boxes in data sets; one sentence each.

        made: name of a data set -> its folder; None: those that are known.
        """
        return lacks(self._experiment, self._made() if made is None else made)

    def doubts(self, made: dict[str, Path] | None = None) -> list[str]:
        """What is still to run, but will hardly succeed; one sentence each.

        made: name of a data set -> its folder; None: those that are known.
        """
        found = {
            name: splits(folder).get("train", {}).get("count", 0)
            for name, folder in (self._made() if made is None else made).items()
        }
        return doubts(self._experiment, found, {id for id in self.jobs if not self.fresh(id)})

    def _made(self) -> dict[str, Path]:
        """The folders of the data sets that are up to date, or that were refused, by name."""
        data = [job for job in self.jobs.values() if job.stage == "data"]
        asides = {job.name: self.aside(job.id) for job in data}
        refused = {
            job.name: asides[job.name]
            for job in data
            if (old := Manifest.read(asides[job.name] / FILE))
            and old.fingerprint == job.fingerprint
        }
        return refused | {job.name: job.output for job in data if self.fresh(job.id)}

    def aside(self, id: str) -> Path:
        """Where finished outputs of a job are kept that are not, or not for long, its output."""
        return self.results / ".kept" / id

    def job(self, id: str) -> Job:
        """The job called `id`; ParamsError with the nearest name if there is none."""
        if id not in self.jobs:
            why = f"no job is called {id!r}{nearest(id, self.jobs)}"
            raise ParamsError(f"{self.params_file}: {why}")
        return self.jobs[id]

    def processes(self, id: str) -> int:
        """How many processes share a job's work: `compute.processes` if that can be shared."""
        return self.compute["processes"] if self.job(id).spreads else 1

    def manifest(self, id: str) -> Manifest | None:
        """The manifest in a job's output folder; None if there is none."""
        return Manifest.read(self.job(id).manifest)

    def given(self, id: str) -> dict[str, dict[str, str]]:
        """What a job is made from, as its manifest says it: role -> job, fingerprint, content."""
        return {
            role: {
                "job": above,
                "fingerprint": self.jobs[above].fingerprint,
                "content": self.content(above),
            }
            for role, above in self.job(id).inputs.items()
        }

    def finished(self, id: str, given: dict | None = None, **made) -> Manifest:
        """The manifest that says that a job was done by this plan; `made`: what else it holds.

        given: what `given` said when the job began. What differs since is of unknown content.
        """
        job, inputs = self.job(id), self.given(id)
        for role, now in inputs.items():
            if given is not None and given[role] != now:
                now["content"] = ""
        return Manifest(
            job=id,
            stage=job.stage,
            name=job.name,
            fingerprint=job.fingerprint,
            params=job.params,
            code=job.hashes,
            inputs=inputs,
            **made,
        )

    def content(self, id: str) -> str:
        """The digest of what a job has made, for those made from it; "" unless it is fresh."""
        return self.manifest(id).content if self.fresh(id) else ""

    def missing(self, id: str) -> str | None:
        """The first file that the manifest lists and that is not there."""
        return _missing(self.job(id), self.manifest(id))

    def fresh(self, id: str) -> bool:
        """Is the job's output complete and made by exactly this plan?"""
        job, manifest = self.job(id), self.manifest(id)
        made = manifest is not None and manifest.fingerprint == job.fingerprint
        return made and not _missing(job, manifest)


def _missing(job: Job, manifest: Manifest | None) -> str | None:
    for path in manifest.outputs if manifest else ():
        if not (job.output / path).is_file():
            return str(job.output / path)
    return None


def load(
    params_file: str | Path = "params.yaml", results: str | Path = "results", root: Path = ROOT
) -> Plan:
    """Read and check a params file and lay out its jobs. ParamsError lists all that is wrong."""
    return Plan(Path(params_file), Path(results), Path(root), read(params_file, root))
