"""One job of the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

REPORT_FILES = ("index.html", "summary.md", "summary.csv")
# The options of each stage's command; their values, joined by /, are the name of a job.
OPTIONS = {
    "data": ("name",),
    "target": ("name",),
    "pretrain": ("run",),
    "transfer": ("run", "task"),
    "report": (),
}


@dataclass(frozen=True)
class Job:
    """One run of one stage. Its name is unique in its stage, its id in the plan: <stage>/<name>."""

    stage: str
    name: str
    id: str
    output: Path
    inputs: dict[str, str]  # role -> id of the job; the one made last is last
    params: dict
    code: tuple[str, ...]  # paths of the files that it runs, below the root
    origins: dict[
        str, str
    ]  # dotted key of `params` -> dotted key of params.yaml, where they differ
    spreads: bool = False  # trains, so several processes can share its work
    user_files: bool = False  # its parameters hold the state of files of the user's
    # dotted keys of `params` that say where such files lie -> the keys of their states; the first
    # are no part of the fingerprint
    places: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    hashes: dict[str, str] = field(default_factory=dict)  # path of each code file -> sha256

    @property
    def manifest(self) -> Path:
        return self.output / "manifest.json"

    @property
    def command(self) -> str:
        """The command that runs the job, as both engines call it."""
        options = zip(
            OPTIONS[self.stage], self.name.split("/"), strict=False
        )  # the report has none
        return " ".join([f"python -m stages.{self.stage}", *(f"--{o} {v}" for o, v in options)])

    @property
    def files(self) -> tuple[Path, ...]:
        """What Snakemake knows of the output: the manifest, and the report's pages."""
        pages = REPORT_FILES if self.stage == "report" else ()
        return (self.manifest, *(self.output / name for name in pages))
