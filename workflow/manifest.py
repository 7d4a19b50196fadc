"""The manifest of a finished job: what it was made from, what it made, where, and how long it took.

A stage writes `manifest.json` into its output folder as its last act. A folder with a manifest is
complete; one without is not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from workflow.files import json_text

FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """One finished job. `job`, `stage`, `name`, `fingerprint`, `params` are those of the plan."""

    job: str = ""
    stage: str = ""
    name: str = ""
    fingerprint: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)  # path -> sha256
    # role -> job, fingerprint, content
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)  # path in the output folder -> sha256
    content: str = ""  # digest of what a job that is made from it may read
    environment: dict[str, Any] = field(default_factory=dict)  # versions and hardware
    git: dict[str, Any] | None = None  # commit, dirty
    wall_s: float = 0.0  # of the last start
    peak_memory_mb: float = 0.0
    device: str = ""
    threads: int = 0
    summary: dict[str, Any] = field(default_factory=dict)  # what the stage says of its result
    created: str = ""  # when the job began, ISO 8601
    taken_over: str = ""  # the fingerprint that the outputs were computed under, if another

    @classmethod
    def read(cls, path: str | Path) -> Manifest | None:
        """The manifest in a file; None if there is no file, or if it holds no manifest."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), str):
            return None
        known = {f.name for f in fields(cls)}
        found = cls(**{key: value for key, value in content.items() if key in known})
        return found if all(isinstance(i, dict) for i in found.inputs.values()) else None

    def text(self) -> str:
        """The manifest as JSON."""
        return json_text(asdict(self))

    @property
    def seconds(self) -> float:
        """What the job took: its last start, or all of a training that was killed on the way."""
        return max(self.wall_s, self.summary.get("train_s") or 0)

    @property
    def line(self) -> str:
        """What a person is told of it: the numbers of its summary, time and memory; or that it was
        taken over.
        """
        plain = {k: v for k, v in self.summary.items() if not isinstance(v, (dict, list))}
        shown = [
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in plain.items()
            if len(str(v).split()) == 1
        ]
        spent = f"({self.wall_s:.1f} s, {self.peak_memory_mb:.0f} MB)"
        if self.taken_over:
            first = f"same content as {self.taken_over[:12]}"
            spent = f"(taken over: {first}; {self.wall_s:.1f} s then)"
        return " ".join([f"{self.job}:", *shown, spent])

    @property
    def above(self) -> list[str]:
        """The jobs that it was made from."""
        return [given["job"] for given in self.inputs.values()]
