"""Both real engines on one plan: the sequences in which Snakemake and DVC by themselves give wrong
or needless results.

They run in a copy of the project whose stages do trivial work: each writes a value made of its
parameters and its inputs' values, so that a wrong or stale result shows, and notes that it ran.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from workflow.ledger import stage_name
from workflow.params.reading import read_yaml
from workflow.plan import load

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(
    not (BIN / "snakemake").exists() or not (BIN / "dvc").exists() or not shutil.which("git"),
    reason="needs snakemake and dvc beside this Python, and git",
)

STAGE = """
import argparse, hashlib, json, sys
from stages.kit.job.job import running, write_atomic
from workflow.plan import load

parser = argparse.ArgumentParser()
for option in ("--name", "--run", "--task"):
    parser.add_argument(option)
parser.add_argument("--params", default="params.yaml")
parser.add_argument("--results", default="results")
args = parser.parse_args()
plan = load(args.params, args.results)
stage = __spec__.name.split(".")[-1]
parts = [p for p in (args.name, args.run, args.task) if p]
id = "/".join([stage, *parts])
with running(plan.job(id), plan) as run:
    inputs = [(run.input(i) / "value").read_text() for i in run.job.inputs]
    known = json.dumps([run.job.params, inputs], sort_keys=True)
    write_atomic(run.out / "value", hashlib.sha256(known.encode()).hexdigest())
    if stage == "report":
        for name in ("index.html", "summary.md", "summary.csv"):
            write_atomic(run.out / name, "<html></html>")
    with open("ran.log", "a") as log:
        log.write(id + "\\n")
"""

PLUGINS = {
    "sources/shapes": "train: int = 10",
    "sources/folder": "labels: bool = True",
    "methods/mae": "mask_ratio: float = 0.75",
    "methods/beitv2": "head_depth: int = 2",
    "methods/random": "pass",
    "methods/dbot": "beta: float = 2.0",
    "targets/dino": "lr: float = 0.1",
    "targets/vqkd": "codes: int = 16",
    "tasks/knn": "k: int = 5",
    "tasks/linear": "epochs: int = 5",
}
LITERALS = {
    "methods/beitv2": 'TARGET = "ids"\n',
    "methods/dbot": 'TARGET = "features"\n',
    "targets/dino": 'PRODUCES = "features"\n',
    "targets/vqkd": 'PRODUCES = "ids"\nUPSTREAM = "features"\n',
}
PARAMS = {
    "experiment": "tiny",
    "data": {"source": "shapes", "image_size": 16},
    "model": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "train": {"epochs": 1, "batch_size": 4},
    "targets": {"teacher": {"kind": "dino"}, "vqkd": {"kind": "vqkd", "upstream": "teacher"}},
    "methods": {"mae": {"mask_ratio": 0.75}, "beitv2": {}},
    "tasks": {"knn": {}},
    "grid": {"runs": {"mae": {"method": "mae"}, "beitv2": {"method": "beitv2", "target": "vqkd"}}},
    "compute": {"device": "cpu", "tracking": False},
}
MAE_JOBS = {"pretrain/mae-s0", "transfer/mae-s0/knn", "report"}


class Lab:
    """A copy of the project with trivial stages, and the two engines in it."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, content: dict = PARAMS) -> Lab:
        folder.mkdir(parents=True)
        for name in (
            "Snakefile",
            "dvc.yaml",
            ".dvcignore",
            ".gitignore",
            "profiles",
            "workflow",
            ".dvc/config",
            ".dvc/.gitignore",
        ):
            source, to = ROOT / name, folder / name
            to.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, to)
        kit = folder / "stages/kit"
        kit.mkdir(parents=True)
        for name in ("job", "files", "device", "provenance", "checks"):
            shutil.copy(ROOT / f"stages/kit/{name}.py", kit)
        for name in ("store", "decode", "keyed", "dist", "track", "hybrid"):
            (kit / f"{name}.py").write_text(f"# {name}\n")
        for stage in ("data", "target", "pretrain", "transfer", "report"):
            (folder / f"stages/{stage}.py").write_text(STAGE)
        for inner in ("sources", "targets", "methods", "tasks", "reporting"):
            (folder / "stages" / inner).mkdir()
            (folder / "stages" / inner / "__init__.py").write_text("")
        head = "from dataclasses import dataclass\n\n"
        for name, body in PLUGINS.items():
            text = f"{head}{LITERALS.get(name, '')}\n@dataclass(frozen=True)\nclass Config:\n    {body}\n"
            (folder / f"stages/{name}.py").write_text(text)
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

    def run(self, *command: str, good: bool = True) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "MIMLAB_TRACKING": "off",
            "DVC_NO_ANALYTICS": "1",
            "HOME": str(self.folder.parent),
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
            "PYTHONPATH": "",
            **{
                f"GIT_{who}_{what}": "a@b"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
        }
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert (done.returncode == 0) == good, f"{' '.join(command)}\n{said}"
        return said

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

    def write(self, content: dict) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def set(self, ratio: float) -> None:
        """Change the one parameter that these stories are about."""
        content = yaml.safe_load((self.folder / "params.yaml").read_text())
        content["methods"]["mae"]["mask_ratio"] = ratio
        self.write(content)
        self.python("-m", "workflow.plan")

    def ran(self) -> list[str]:
        """The jobs run since the last call."""
        log = self.folder / "ran.log"
        lines = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def pending(self) -> set[str]:
        """The jobs that Snakemake would run."""
        said = self.snakemake("-n")
        paths = re.findall(r"^    output: results/(\S+?)/manifest\.json", said, re.M)
        jobs = {p if p.count("/") else {"data": "data", "report": "report"}[p] for p in paths}
        assert jobs or "Nothing to be done" in said, said
        return jobs

    def plan(self):
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return load(root=self.folder)
        finally:
            os.chdir(before)

    def right(self) -> bool:
        """Is every value on disk the one that params.yaml asks for? Worked out anew, without
        manifests.
        """
        values: dict[str, str] = {}
        for job in self.plan().jobs.values():
            known = json.dumps([job.params, [values[i] for i in job.inputs]], sort_keys=True)
            values[job.id] = hashlib.sha256(known.encode()).hexdigest()
            if (self.folder / job.output / "value").read_text() != values[job.id]:
                return False
        return True

    def clean(self) -> bool:
        return "up to date" in self.dvc("status")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything run once by each engine: two labs to copy from."""
    folder = tmp_path_factory.mktemp("labs")
    lab = Lab.create(folder / "new")
    snake = lab.copy(folder / "snake")
    snake.snakemake()
    ledger = lab.copy(folder / "ledger")
    ledger.dvc("repro", "-q")
    for each in (snake, ledger):
        assert sorted(each.ran()) == sorted(load_jobs(each)), "every job once"
        assert each.right()
        shelf = folder / f"shelf-{each.folder.name}"
        each.dvc("remote", "add", "-q", "shelf", str(shelf))
    return {"new": lab, "snakemake": snake, "dvc": ledger}


def load_jobs(lab: Lab) -> list[str]:
    return list(lab.plan().jobs)


@pytest.fixture
def lab(made, tmp_path):
    return lambda name: made[name].copy(tmp_path / "lab")


# ----------------------------------------------------------------------------------------- the nine
# sequences


def test_1_what_dvc_made_snakemake_accepts(lab):
    assert lab("dvc").pending() == set()


def test_2_after_dvc_both_see_a_changed_parameter(lab):
    it = lab("dvc")
    it.set(0.6)
    assert it.pending() == MAE_JOBS
    changed = it.dvc("status")
    assert (
        "pretrain@mae-s0:" in changed and "methods.mae" in changed and "beitv2-s0:" not in changed
    )
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.clean()


def test_3_what_dvc_made_from_a_change_snakemake_does_not_retrain(lab):
    it = lab("snakemake")
    it.set(0.4)
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.pending() == set()


def test_4_going_back_after_the_other_engine_is_noticed(lab):
    it = lab("snakemake")
    it.set(0.6)
    it.dvc("repro", "-q")
    it.ran()
    it.set(0.75)
    assert not it.right()
    assert it.pending() == MAE_JOBS, "the files are those of 0.6"
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.pending() == set() and it.clean()


def test_5_snakemake_fills_dvcs_run_cache(lab):
    it = lab("snakemake")
    it.set(0.6)
    it.snakemake()
    assert it.right() and it.clean()
    it.ran()
    it.set(0.75)
    it.dvc("repro", "-q")
    assert it.ran() == [], "restored, not run"
    assert it.right() and it.pending() == set() and it.clean()


def test_6_a_clone_with_pulled_results_has_nothing_to_do(lab, tmp_path):
    it = lab("snakemake").clone(tmp_path / "clone")
    assert it.pending() == set()
    assert it.clean() and it.right()
    it.snakemake()
    it.dvc("repro", "-q")
    assert it.ran() == [], "neither engine ran a job"
    it.set(0.6)
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.clean()


def test_7_results_stay_ordinary_files_that_can_be_replaced(lab):
    it = lab("snakemake")
    shutil.rmtree(it.folder / "results/pretrain/mae-s0")
    it.dvc("checkout", "-q")
    files = [p for p in (it.folder / "results").rglob("*") if p.is_file()]
    assert all(
        p.stat().st_nlink == 1 and not p.is_symlink() and p.stat().st_mode & 0o200 for p in files
    )
    assert it.pending() == set()
    it.set(0.6)
    it.snakemake()
    assert it.right()


def test_8_and_9_dvc_alone_runs_what_changed_and_restores_what_was(lab):
    it = lab("dvc")
    it.set(0.6)
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS
    it.set(0.75)
    it.dvc("repro", "-q")
    assert it.ran() == []
    assert it.right() and it.clean() and it.pending() == set()


# ----------------------------------------------------------------------------------------- same
# jobs and keys

RESOLVED = """
import json, sys
from dvc.repo import Repo
stages = {}
for stage in Repo(".").index.stages:
    deps = [d for d in stage.deps if type(d).__name__ != "ParamsDependency"]
    params = {d.def_path: d.params if isinstance(d.params, list) else list(d.params) for d in stage.params}
    stages[stage.addressing] = {"cmd": stage.cmd, "deps": [d.def_path for d in deps], "params": params,
                                "outs": [o.def_path for o in stage.outs]}
json.dump(stages, sys.stdout)
"""


def test_plan_dvc_and_snakemake_list_the_same(lab):
    it = lab("new")
    plan = it.plan()
    stages = json.loads(it.python("-c", RESOLVED))
    assert set(stages) == {"plan", *(stage_name(job, plan) for job in plan.jobs.values())}
    assert it.pending() == set(plan.jobs)
    shown = it.snakemake("-n", "-p")
    for job in plan.jobs.values():
        stage = stages[stage_name(job, plan)]
        deps = set(stage["deps"])
        inputs = {str(plan.jobs[i].output) for i in job.inputs}
        assert stage["outs"] == [str(job.output)]
        if (
            job.stage == "report"
        ):  # a list of inputs cannot be written in dvc.yaml: it names their folders
            assert deps - set(job.code) == {"results/data", "results/pretrain", "results/transfer"}
            assert set(job.code) <= deps
        else:
            assert deps == inputs | {c.rstrip("/") for c in job.code}
        keys = {k for path, listed in stage["params"].items() for k in listed}
        what_files_hold = {k for k in keys if k == "plan.source_state" or k.endswith(".files")}
        own = {k.replace("plan.runs.", "grid.runs.") for k in keys - what_files_hold}
        assert own == set(job.keys)
        assert f"{sys.executable} {stage['cmd'].removeprefix('python ')}" in shown
        block = re.search(rf"input: (.*)\n    output: {re.escape(str(job.manifest))}", shown)
        assert {p.strip() for p in block[1].split(",")} == (
            {f"{i}/manifest.json" for i in inputs} or {"stages/data.py"}
        )


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=lambda p: p.stem
)
def test_dvc_reads_params_as_the_plan_does(path):
    """By the compiled parser, which is fast and wants quotes around a text with a colon within
    braces.
    """
    from dvc.utils.serialize import parse_yaml
    from ruamel.yaml.main import CParser

    assert CParser is not None
    assert parse_yaml(path.read_text(), str(path)) == read_yaml(path)


def test_dvc_does_not_watch_the_tracker_and_bytecode(lab):
    it = lab("dvc")
    (it.folder / "stages/kit/job/track.py").write_text("# edited\n")
    assert it.clean() and it.pending() == set()
    (it.folder / "stages/kit/data/store.py").write_text("# edited\n")
    assert it.pending() == set(it.plan().jobs)
    assert not it.clean()


def test_editing_one_method_runs_its_jobs_alone(lab):
    it = lab("snakemake")
    with (it.folder / "stages/methods/mae.py").open("a") as file:
        file.write("# edited\n")
    assert it.pending() == MAE_JOBS
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS
    assert it.pending() == set()


def test_runs_with_no_target_and_more_seeds(tmp_path):
    content = PARAMS | {
        "targets": {},
        "methods": {"mae": {}, "random": {}},
        "tasks": {"knn": {}, "linear": {}},
    }
    content["grid"] = {
        "seeds": [0, 1],
        "runs": {
            "mae": {"method": "mae", "set": {"mask_ratio": 0.5}},
            "random": {"method": "random"},
        },
    }
    it = Lab.create(tmp_path / "lab", content)
    it.dvc("repro", "-q")
    assert sorted(it.ran()) == sorted(it.plan().jobs)
    assert it.right() and it.pending() == set() and it.clean()
    content["grid"]["runs"]["mae"]["seeds"] = [0, 1, 2]
    it.write(content)
    added = {"pretrain/mae-s2", "transfer/mae-s2/knn", "transfer/mae-s2/linear", "report"}
    assert it.pending() == added, "one more seed does not train the others again"
    it.dvc("repro", "-q")
    assert set(it.ran()) == added and it.pending() == set()


def test_a_chain_of_stages_grows_by_either_engine(tmp_path):
    content = PARAMS | {"targets": {}, "methods": {"random": {}, "dbot": {}}}
    chain = {"method": "dbot", "target": "run:random", "stages": 2}
    content["grid"] = {"runs": {"dbot": chain, "random": {"method": "random"}}}
    it = Lab.create(tmp_path / "lab", content)
    it.snakemake()
    assert sorted(it.ran()) == sorted(it.plan().jobs)
    assert it.right() and it.clean() and it.pending() == set()
    chain["stages"] = 3
    it.write(content)
    added = {"pretrain/dbot-3-s0", "transfer/dbot-3-s0/knn", "report"}
    assert it.pending() == added, "one more stage does not train those before it again"
    it.dvc("repro", "-q")
    assert set(it.ran()) == added
    assert it.right() and it.pending() == set()
    content["methods"]["dbot"] = {"beta": 1.0}
    it.write(content)
    changed = {f"{kind}-s0{task}" for n in (1, 2, 3)
               for kind, task in ((f"pretrain/dbot-{n}", ""), (f"transfer/dbot-{n}", "/knn"))}  # fmt: skip
    it.snakemake()
    assert set(it.ran()) == changed | {"report"}
    assert it.right() and it.clean()


def test_a_source_of_files_that_change_and_go(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    it = Lab.create(
        tmp_path / "lab", PARAMS | {"data": {"source": f"folder:{images}", "image_size": 16}}
    )
    it.snakemake()
    it.ran()
    assert it.pending() == set()
    (images / "b.png").write_bytes(b"22")
    said = it.dvc("repro", good=False)
    assert "run `dvc repro` again" in said, "the first stage notices and says what to do"
    it.dvc("repro", "-q")
    assert set(it.ran()) == set(it.plan().jobs) and it.pending() == set()
    shutil.rmtree(images)
    assert "is not there" in it.snakemake("-n"), (
        "results without their source stay usable, with a warning"
    )
    assert it.pending() == set()
    shutil.rmtree(it.folder / "results")
    assert f"{images} does not exist" in it.snakemake("-n", good=False)


# -------------------------------------------------------------------------------------------------
# one by one


def test_plan_stage_fails_loudly_when_runs_are_older_than_params(lab):
    it = lab("dvc")
    content = yaml.safe_load((it.folder / "params.yaml").read_text())
    content["grid"]["runs"]["second"] = {"method": "mae"}
    it.write(content)
    assert "run `dvc repro` again" in it.dvc("repro", good=False)
    assert it.ran() == []
    it.dvc("repro", "-q")
    assert set(it.ran()) == {"pretrain/second-s0", "transfer/second-s0/knn", "report"}
    assert it.right() and it.pending() == set()


def test_bad_params_stop_both_engines_with_the_same_words(lab):
    it = lab("new")
    content = yaml.safe_load((it.folder / "params.yaml").read_text())
    content["methods"]["mae"] = {"mask_ration": 0.5}
    it.write(content)
    for said in (it.snakemake("-n", good=False), it.dvc("repro", good=False)):
        assert (
            "methods.mae.mask_ration: unknown key" in said and "did you mean 'mask_ratio'" in said
        )
    assert it.ran() == []


def test_part_of_the_jobs_other_files_and_opting_out(lab):
    it = lab("new")
    it.snakemake("results/pretrain/mae-s0/manifest.json")
    assert set(it.ran()) == {"data", "pretrain/mae-s0"}
    assert it.clean() or "pretrain@mae-s0" not in it.dvc("status"), "what is finished is recorded"
    (it.folder / "other.yaml").write_text(
        (it.folder / "params.yaml").read_text().replace("0.75", "0.5")
    )
    it.snakemake("--config", "params=other.yaml", "results=elsewhere/results")
    assert len(it.ran()) == 8 and (it.folder / "elsewhere/results/report/index.html").exists()
    manifest = json.loads(
        (it.folder / "elsewhere/results/pretrain/mae-s0/manifest.json").read_text()
    )
    assert manifest["params"]["method"]["config"]["mask_ratio"] == 0.5
    before = (it.folder / "dvc.lock").read_text()
    it.snakemake("--config", "dvc=false")
    assert len(it.ran()) == 6 and (it.folder / "dvc.lock").read_text() == before
    assert "dvcs" in it.snakemake("--config", "dvcs=false", "-n", good=False)


def test_explain_names_the_cause(lab):
    it = lab("snakemake")
    it.set(0.6)
    said = it.python("-m", "workflow.plan", "--explain", "pretrain/mae-s0")
    assert (
        said.strip()
        == "pretrain/mae-s0 would run because methods.mae.mask_ratio changed from 0.75 to 0.6."
    )
    said = it.python("-m", "workflow.plan", "--explain", "transfer/mae-s0/knn")
    assert (
        "its input pretrain/mae-s0 would run (methods.mae.mask_ratio changed from 0.75 to 0.6)"
        in said
    )
    assert "is up to date" in it.python("-m", "workflow.plan", "--explain", "pretrain/beitv2-s0")
    assert "did you mean 'pretrain/mae-s0'" in it.python(
        "-m", "workflow.plan", "--explain", "pretrain/mea-s0", good=False
    )


def test_snakemakes_own_report_and_lint(lab):
    it = lab("snakemake")
    it.snakemake("--report", "x.zip")
    assert any(
        name.endswith("report.html") for name in zipfile.ZipFile(it.folder / "x.zip").namelist()
    )
    it.snakemake("--lint")
    it.run(
        str(BIN / "snakefmt"),
        "--check",
        "--config",
        str(ROOT / "pyproject.toml"),
        "Snakefile",
        "workflow",
    )
