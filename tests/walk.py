"""A random walk over both real engines: after each action they and the manifests agree.

    python tests/walk.py [--seed 0] [--actions 100]

An action edits a parameter or a code file of any layer, goes back to an earlier state of both, runs
either engine on everything or on one job, deletes an output, or checks out what DVC recorded. It
takes place in a copy of the project with trivial stages (tests/lab.py). The same seed takes the
same walk.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.lab import Lab, built_on
from workflow.engines.dvc import stage_name

VALUES = {  # dotted keys of params.yaml; none of them changes the list of jobs
    "methods.mae.mask_ratio": (0.5, 0.6, 0.75),
    "methods.beitv2.head_depth": (1, 2),
    "targets.teacher.lr": (0.1, 0.2),
    "targets.vqkd.codes": (8, 16),
    "tasks.knn.k": (5, 7),
    "train.epochs": (1, 2),
    "data.seed": (0, 1),
    "model.depth": (2, 3),
    "experiment": ("tiny", "other"),
}
CODE = (
    "stages/kit/keyed.py",
    "stages/kit/train.py",
    "stages/kit/unused.py",
    "stages/kit/job/job.py",
    "stages/kit/job/track.py",
    "stages/methods/mae.py",
    "stages/targets/dino.py",
    "stages/tasks/knn.py",
    "stages/target.py",
    "stages/transfer.py",
    "stages/report.py",
    "workflow/checks.py",
    "workflow/plan/jobs.py",
)
WEIGHTS = {
    "edit_parameter": 4,
    "edit_code": 3,
    "revert": 2,
    "run_snakemake": 3,
    "run_dvc": 3,
    "run_one_by_snakemake": 1,
    "run_one_by_dvc": 1,
    "delete_output": 2,
    "checkout": 2,
}


class Walk:
    """One walk; `said` lists what was done."""

    def __init__(self, lab: Lab, seed: int):
        self.lab, self.random = lab, random.Random(seed)
        self.original = {path: self._text(path) for path in CODE}
        self.past: list[dict[str, str]] = []  # states of params.yaml and code
        self.said: list[str] = []

    def go(self, actions: int, tell=lambda text: None) -> None:
        """Take so many actions; AssertionError, with all of them, where something disagrees."""
        names, weights = zip(*WEIGHTS.items())
        for number in range(actions):
            name = self.random.choices(names, weights)[0]
            try:
                did = getattr(self, name)()
                self.said.append(f"{number + 1} {name} {did or ''}".rstrip())
                tell(self.said[-1])
                self.check(everything=name in ("run_snakemake", "run_dvc"))
            except AssertionError as error:
                walk = "\n".join([*self.said, f"(in {name})"])
                raise AssertionError(f"{error}\nafter the walk\n{walk}") from error

    # ---------------------------------------------------------------------------------------------
    # actions

    def edit_parameter(self) -> str:
        self._remember()
        key, content = self.random.choice(list(VALUES)), self.lab.read()
        *path, last = key.split(".")
        at = content
        for part in path:
            at[part] = at.get(part) or {}
            at = at[part]
        at[last] = value = self.random.choice([v for v in VALUES[key] if v != at.get(last)])
        self.lab.write(content)
        return f"{key}: {value}"

    def edit_code(self) -> str:
        self._remember()
        path = self.random.choice(CODE)
        texts = [self.original[path] + f"# version {n}\n" * bool(n) for n in range(3)]
        others = [text for text in texts if text != self._text(path)]
        self._write({path: self.random.choice(others)})
        return path

    def revert(self) -> str:
        if not self.past:
            return "nothing"
        number = self.random.randrange(len(self.past))
        self._write(self.past[number])
        return f"to state {number}"

    def run_snakemake(self) -> None:
        self.lab.snakemake()

    def run_dvc(self) -> None:
        self.lab.dvc("repro", "-q")

    def run_one_by_snakemake(self) -> str:
        job = self._job()
        self.lab.snakemake(str(job.manifest))
        assert job.id not in self.lab.stale()
        return job.id

    def run_one_by_dvc(self) -> str:
        job = self._job()
        self.lab.dvc("repro", "-q", stage_name(job))
        assert job.id not in self.lab.stale()
        return job.id

    def delete_output(self) -> str:
        job = self._job()
        path = self.lab.folder / job.output
        what = self.random.choice([path, path / "manifest.json", path / "value"])
        if what.is_dir():
            shutil.rmtree(what)
        else:
            what.unlink(missing_ok=True)
        return what.relative_to(self.lab.folder).as_posix()

    def checkout(self) -> None:
        self.lab.dvc("checkout", "-q", "--force")

    # ---------------------------------------------------------------------------------------------
    # what has to hold

    def check(self, everything: bool) -> None:
        """Both engines and the manifests agree; when `everything` was run, all of it is right."""
        stale = self.lab.stale()
        pending = self.lab.pending()
        assert pending == stale, f"Snakemake would run {pending}, stale are {stale}"
        changed = built_on(self.lab.changed(), self.lab.plan())
        assert changed == stale, f"DVC would run {changed}, stale are {stale}"
        if everything:
            assert not stale, f"after a run stale are {stale}"
            assert self.lab.right(), "a value is not what the parameters and the code ask for"

    # ---------------------------------------------------------------------------------------------

    def _job(self):
        return self.random.choice(list(self.lab.plan().jobs.values()))

    def _text(self, path: str) -> str:
        file = self.lab.folder / path
        return file.read_text() if file.exists() else ""

    def _remember(self) -> None:
        self.past.append({path: self._text(path) for path in (*CODE, "params.yaml")})

    def _write(self, texts: dict[str, str]) -> None:
        for path, text in texts.items():
            if text != self._text(path):
                (self.lab.folder / path).write_text(text)


def main() -> None:
    """Take a walk in a temporary folder and tell each action."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actions", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab.create(Path(folder) / "a lab")
        Walk(lab, args.seed).go(args.actions, tell=lambda text: print(text, flush=True))
    print(f"{args.actions} actions from seed {args.seed}: both engines and the manifests agree")


if __name__ == "__main__":
    main()
