"""A copy of the project whose stages do trivial work, with both real engines in it.

Each stage writes a value made of its parameters, its code and its inputs' values, so that a wrong
or stale result shows, and notes in ran.log that it ran. A data set is what its source holds: the
images that are not empty, whatever reads them; it is refused while there is a file `refuse`. Its
folder has a space in its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from workflow.plan import Plan, load

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

STAGE = """
import hashlib, json, os
from pathlib import Path
from stages.kit import {kit}
from stages.kit.job.command import command
from workflow.files import write_atomic

def work(run):
    if os.path.exists("meanwhile.py"):  # what a person does while this job runs
        os.rename("meanwhile.py", "done.py")
        exec(open("done.py").read())
    inputs = [(run.input(role) / "value").read_text() for role in run.job.inputs]
    write_atomic(run.out / "value", value(run.job, inputs))
    write_atomic(run.out / "deep/er", "er")
    if run.job.stage == "data" and os.path.exists("refuse"):
        run.refused = "a task would fail"
    if run.job.stage == "report":
        for name in ("index.html", "summary.md", "summary.csv"):
            write_atomic(run.out / name, "<html></html>")
    with open("ran.log", "a") as log:
        log.write(run.job.id + "\\n")

{value}
if __name__ == "__main__":
    raise SystemExit(command("{stage}", "A stage.", work, None))
"""


def value(job, inputs: list[str]) -> str:
    """What the job makes of the values of its inputs."""
    known = [job.params, job.hashes, inputs]
    if job.stage == "data":
        source = job.params["source"]
        files = sorted(Path(source["argument"]).glob("*")) if source["argument"] else []
        known = [job.params["data"], source["config"]]
        known += [[path.name, path.read_bytes().hex()] for path in files if path.stat().st_size]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


KIT = {"data": "keyed", "report": "keyed"}  # which file of the kit a stage imports; others: train
PLUGIN = """
from dataclasses import dataclass
from workflow import checks
{literals}

@dataclass(frozen=True)
class Config{base}:
    {setting}

def use(config):
    return config.{name}
"""
PLUGINS = {
    "sources/shapes": ("train: int = 10", "ARGUMENT = None"),
    "sources/folder": ("labels: bool = True", 'ARGUMENT = "PATH"'),
    "methods/mae": ("mask_ratio: float = 0.75", ""),
    "methods/beitv2": ("head_depth: int = 2", 'TARGET = {"ids"}'),
    "methods/random": ("depth: int = 1", "TRAINS = False"),
    "methods/dbot": ("beta: float = 2.0", 'TARGET = {"patch"}'),
    "targets/dino": ("lr: float = 0.1", 'PRODUCES = {"patch"}'),
    "targets/vqkd": ("codes: int = 16", 'PRODUCES = {"ids"}\nUPSTREAM = {"patch"}'),
    "tasks/knn": ("k: int = 5", 'HEADLINE = ("top1", "top-1 accuracy", "%")'),
    "tasks/again": (
        "k: int = 5",
        'HEADLINE = ("top1", "top-1 accuracy", "%")\nAFTER = "knn"',
    ),
    "encoders/vit": ("depth: int = 2", 'CAN = {"drop"}\nNAMES = "vit_"'),
}
PARAMS = {
    "experiment": "tiny",
    "data": {"source": "shapes", "image_size": 16},
    "model": {"kind": "vit", "patch_size": 4, "embed_dim": 16, "depth": 2},
    "train": {"epochs": 1, "batch_size": 4},
    "targets": {"teacher": {"kind": "dino"}, "vqkd": {"kind": "vqkd", "upstream": "teacher"}},
    "methods": {"mae": {"mask_ratio": 0.75}, "beitv2": {}},
    "tasks": {"knn": {}},
    "grid": {"runs": {"mae": {"method": "mae"}, "beitv2": {"method": "beitv2", "target": "vqkd"}}},
    "compute": {"device": "cpu", "tracking": False},
}
COPIED = (
    "Snakefile",
    "dvc.yaml",
    ".dvcignore",
    ".gitignore",
    "profiles",
    "workflow",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvc/plots",
    "stages/kit/settings.py",  # which kit/job imports
)
GIT = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


class Lab:
    """The copy in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, content: dict = PARAMS) -> Lab:
        """A new lab, in git, with its plan written and nothing run."""
        folder.mkdir(parents=True)
        for name in COPIED:
            source, to = ROOT / name, folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, to)
        shutil.copytree(
            ROOT / "stages/kit/job",
            folder / "stages/kit/job",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        files = {f"stages/kit/{name}.py": f"# {name}\n" for name in ("keyed", "train")}
        files |= {f"stages/{name}.py": plugin(name) for name in PLUGINS}
        for stage in ("data", "target", "pretrain", "transfer", "report"):
            kit = KIT.get(stage, "train")
            text = STAGE.replace("{kit}", kit).replace("{stage}", stage)
            files[f"stages/{stage}.py"] = text.replace("{value}", inspect.getsource(value))
        for package in ("", "kit/", "reporting/"):
            files[f"stages/{package}__init__.py"] = ""
        for path, text in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)
        lab = cls(folder)
        lab.write(content)
        lab.git("init", "-q")
        lab.python("-m", "workflow.plan")
        lab.save("first")
        return lab

    def copy(self, to: Path) -> Lab:
        """The same with all its times, as if the person had worked on in another place."""
        subprocess.run(["cp", "-a", str(self.folder), str(to)], check=True)
        return Lab(to)

    def clone(self, to: Path) -> Lab:
        """What a colleague gets: the files in git, and the results through DVC's remote."""
        self.save("results")
        self.dvc("push", "-q", "-r", "shelf")
        subprocess.run(["git", "clone", "-q", str(self.folder), str(to)], check=True)
        other = Lab(to)
        assert not (to / "results").exists()
        other.ran()  # the list travels in git too
        other.dvc("pull", "-q", "-r", "shelf")
        return other

    # ---------------------------------------------------------------------------------------------
    # what a person does

    def run(self, *command: str, good: bool = True) -> str:
        """Run a command in the lab; what it printed. AssertionError if it ends otherwise."""
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment(), capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        ended = f"{' '.join(command)}\nexit status {done.returncode}\n{said}"
        assert (done.returncode == 0) == good, ended
        return said

    @contextlib.contextmanager
    def started(self, *command: str):
        """A command that runs in the background; it is killed in the end."""
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=self.folder, env=self._environment(), stdout=null, stderr=null
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _environment(self) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        return (
            environment
            | GIT
            | {
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                "MIMLAB_TRACKING": "off",
                "DVC_NO_ANALYTICS": "1",
                "HOME": str(self.folder.parent),
                "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
                "PYTHONPATH": "",
            }
        )

    def git(self, *words: str) -> str:
        return self.run("git", *words)

    def python(self, *words: str, good: bool = True) -> str:
        return self.run(sys.executable, *words, good=good)

    def snakemake(self, *words: str, good: bool = True) -> str:
        return self.python("-m", "snakemake", "--cores", "2", *words, good=good)

    def dvc(self, *words: str, good: bool = True) -> str:
        return self.python("-m", "dvc", *words, good=good)

    def save(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)

    def read(self) -> dict:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def write(self, content: dict) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def set(self, ratio: float) -> None:
        """Change the one parameter that most stories are about."""
        content = self.read()
        content["methods"]["mae"]["mask_ratio"] = ratio
        self.write(content)

    # ---------------------------------------------------------------------------------------------
    # what came of it

    def ran(self) -> list[str]:
        """The jobs run since the last call."""
        log = self.folder / "ran.log"
        lines = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def pending(self) -> set[str]:
        """The jobs that Snakemake would run."""
        said = self.snakemake("-n")
        jobs = set(re.findall(r"^    output: results/(\S+?)/manifest\.json", said, re.M))
        assert jobs or "Nothing to be done" in said, said
        return jobs

    def changed(self) -> set[str]:
        """The jobs that DVC calls changed."""
        stages = set(json.loads(self.dvc("status", "--json")))
        return {stage.replace("@", "/") for stage in stages if not stage.startswith("plan@")}

    def clean(self) -> bool:
        return "up to date" in self.dvc("status")

    def plan(self) -> Plan:
        """The plan of the lab, worked out here; its paths are relative to the lab."""
        with contextlib.chdir(self.folder):
            return load(root=self.folder)

    def stale(self) -> set[str]:
        """The jobs that are to run by the word of the manifests: not fresh, or made
        from one that is not.
        """
        plan = self.plan()
        with contextlib.chdir(self.folder):
            return built_on({id for id in plan.jobs if not plan.fresh(id)}, plan)

    def right(self) -> bool:
        """Is every value on disk what parameters and code ask for? Manifests are not believed."""
        values: dict[str, str] = {}
        for job in self.plan().jobs.values():
            inputs = [values[id] for id in job.inputs.values()]
            values[job.id] = value(job, inputs)
            path = self.folder / job.output / "value"
            if not path.exists() or path.read_text() != values[job.id]:
                return False
        return True


def built_on(jobs: set[str], plan: Plan) -> set[str]:
    """These jobs, and all whose inputs are made from them."""
    found = set(jobs)
    for id, job in plan.jobs.items():  # inputs come first
        if found.intersection(job.inputs.values()):
            found.add(id)
    return found


def plugin(path: str) -> str:
    """The text of a plug-in with one setting."""
    setting, literals = PLUGINS[path]
    base = "(checks.Encoder)" if path.startswith("encoders") else ""
    name = setting.partition(":")[0]
    return PLUGIN.format(setting=setting, literals=literals, base=base, name=name)
