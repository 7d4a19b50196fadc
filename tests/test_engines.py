"""Both real engines on one plan: the sequences in which Snakemake and DVC by themselves give wrong
or needless results. They run in a copy of the project whose stages do trivial work (tests/lab.py).
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
import time
import zipfile

import pytest
import yaml

from tests.lab import BIN, PARAMS, ROOT, Lab
from tests.walk import Walk
from workflow.engines.dvc import stage_name
from workflow.params.reading import read_yaml

pytestmark = pytest.mark.skipif(
    not (BIN / "snakemake").exists() or not (BIN / "dvc").exists() or not shutil.which("git"),
    reason="needs snakemake and dvc beside this Python, and git",
)

MAE_JOBS = {"pretrain/mae-s0", "transfer/mae-s0/knn", "report"}


def wait(done, said: str) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end, said
        time.sleep(0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything run once by each engine, to copy from. The folders have a space in their names."""
    folder = tmp_path_factory.mktemp("labs")
    lab = Lab.create(folder / "a new lab")
    snake = lab.copy(folder / "a snakemake lab")
    snake.snakemake()
    ledger = lab.copy(folder / "a dvc lab")
    ledger.dvc("repro", "-q")
    for each in (snake, ledger):
        assert sorted(each.ran()) == sorted(each.plan().jobs), "every job once"
        assert each.right()
        each.dvc("remote", "add", "-q", "shelf", str(folder / f"shelf of {each.folder.name}"))
    return {"new": lab, "snakemake": snake, "dvc": ledger}


@pytest.fixture
def lab(made, tmp_path):
    return lambda name: made[name].copy(tmp_path / "my lab")


# -------------------------------------------------------------------------------------------------
# the nine sequences


def test_1_what_dvc_made_snakemake_accepts(lab):
    assert lab("dvc").pending() == set()


def test_2_after_dvc_both_see_a_changed_parameter(lab):
    it = lab("dvc")
    it.set(0.6)
    assert it.pending() == MAE_JOBS
    assert it.changed() == MAE_JOBS
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.clean()


def test_3_what_dvc_made_from_a_change_snakemake_does_not_retrain(lab):
    it = lab("snakemake")
    it.set(0.4)
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS, "one repro suffices"
    assert it.right() and it.clean() and it.pending() == set()


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
    it = lab("snakemake").clone(tmp_path / "my clone")
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
    it.save("before")
    it.set(0.6)
    said = it.dvc("params", "diff")
    assert re.search(r"params.yaml +methods.mae.mask_ratio +0.75 +0.6", said), said
    assert said.count("\n") == 2, "the key that a person changed, and nothing else"
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS
    it.set(0.75)
    it.dvc("repro", "-q")
    assert it.ran() == []
    assert it.right() and it.clean() and it.pending() == set()


# -------------------------------------------------------------------------------------------------
# the same jobs

RESOLVED = """
import json, sys
from dvc.repo import Repo
stages = {}
for stage in Repo(".").index.stages:
    deps, outs = [d.def_path for d in stage.deps], [o.def_path for o in stage.outs]
    stages[stage.addressing] = {"cmd": stage.cmd, "deps": deps, "outs": outs}
json.dump(stages, sys.stdout)
"""
SEVERAL = PARAMS | {
    "data": {
        "photos": PARAMS["data"],
        "other": PARAMS["data"] | {"image_size": 24},
    },
    "targets": {"teacher": {"kind": "dino", "data": "other"},
                "vqkd": {"upstream": "run:mae", "seed": 1, "data": "photos"}},
    "methods": {"mae": {}, "beitv2": {}, "dbot": {}},
    "tasks": {"knn": {"data": "other"}, "again": {}},
    "grid": {
        "seeds": [0, 1],
        "runs": {"mae": {"method": "mae", "data": "photos"},
                 "beitv2": {"method": "beitv2", "target": "vqkd", "data": "photos"},
                 "dbot": {"method": "dbot", "target": "teacher", "data": "other"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("content", [PARAMS, SEVERAL], ids=["plain", "several"])
def test_plan_dvc_and_snakemake_list_the_same(lab, content):
    it = lab("new")
    it.write(content)
    it.python("-m", "workflow.plan")
    plan = it.plan()
    stages = json.loads(it.python("-c", RESOLVED))
    names = {stage_name(job) for job in plan.jobs.values()}
    assert set(stages) == {"plan@params", *names}
    shown = it.snakemake("-n", "-p")
    for job in plan.jobs.values():
        stage, inputs = stages[stage_name(job)], list(job.inputs.values())
        deps = [f"results/plan/{job.id}"]
        if job.stage == "report":  # a list cannot be written in dvc.yaml: it names their folders
            deps += ["results/pretrain", "results/transfer"]
        elif inputs:
            deps += [f"results/{inputs[0]}/manifest.json", f"results/{inputs[-1]}"]
        assert stage["deps"] == deps and stage["outs"] == [str(job.output)]
        assert stage["cmd"] == job.command
        assert f"{sys.executable} {job.command.removeprefix('python ')}" in shown
        block = re.search(rf"input: (.*)\n    output: {re.escape(str(job.manifest))}", shown)
        read = {f"results/{id}/manifest.json" for id in inputs} or {"stages/data.py"}
        assert {path.strip() for path in block[1].split(",")} == read


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


def test_an_edit_of_code_runs_what_imports_it(lab):
    it = lab("snakemake")
    for name in ("track", "courier"):
        with (it.folder / f"stages/kit/job/{name}.py").open("a") as file:
            file.write("# edited\n")
    assert it.clean() and it.pending() == set(), "it only watches"
    (it.folder / "stages/kit/unused.py").write_text("# new\n")
    assert it.pending() == set() and it.changed() == set(), "nothing imports it"
    with (it.folder / "stages/methods/mae.py").open("a") as file:
        file.write("# edited\n")
    assert it.pending() == MAE_JOBS == it.changed()
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.pending() == set() and it.clean()


def test_more_jobs_leave_the_others_alone(lab):
    it = lab("dvc")
    content = it.read()
    content["grid"]["runs"]["mae"]["seeds"] = [0, 1]
    it.write(content)
    added = {"pretrain/mae-s1", "transfer/mae-s1/knn", "report"}
    assert it.pending() == added, "one more seed does not train the others again"
    it.dvc("repro", "-q")
    assert set(it.ran()) == added
    assert it.right() and it.pending() == set() and it.clean()


def test_the_first_stage_of_dvc_says_when_the_jobs_are_others(lab):
    it = lab("dvc")
    content = it.read()
    content["grid"]["runs"]["second"] = {"method": "mae"}
    it.write(content)
    assert "run `dvc repro` again" in it.dvc("repro", good=False)
    assert it.ran() == []
    it.dvc("repro", "-q")
    assert set(it.ran()) == {"pretrain/second-s0", "transfer/second-s0/knn", "report"}
    assert it.right() and it.pending() == set()


def test_an_experiment_of_dvc_changes_settings_and_says_when_it_would_change_jobs(lab):
    it = lab("dvc")
    content = it.read()
    content["grid"]["seeds"] = [0]
    it.write(content)
    it.python("-m", "workflow.plan")
    it.save("before")
    it.dvc("exp", "run", "-q", "-S", "methods.mae.mask_ratio=0.5")
    assert set(it.ran()) == MAE_JOBS
    assert it.right() and it.clean() and it.pending() == set()
    it.save("a setting")

    said = it.dvc("exp", "run", "-S", "grid.seeds=[0,1]", good=False)
    assert "params.yaml keeps the change: please run `dvc exp run` again." in said
    it.dvc("exp", "run", "-q")
    assert len(it.ran()) == 5 and it.right() and it.clean()


def test_an_experiment_in_a_temporary_workspace(lab):
    """As the queue runs one. Its results wait in DVC's cache until they are applied."""
    it = lab("dvc")
    content = it.read()
    content["grid"]["seeds"] = [0]
    it.write(content)
    it.python("-m", "workflow.plan")
    it.save("before")
    it.dvc("exp", "run", "-q", "--temp", "-n", "half", "-S", "methods.mae.mask_ratio=0.5")
    assert it.read()["methods"]["mae"]["mask_ratio"] == 0.75 and it.right()
    it.dvc("exp", "apply", "-q", "half")
    assert it.read()["methods"]["mae"]["mask_ratio"] == 0.5
    assert it.right() and it.pending() == set() and it.clean() and it.ran() == []
    it.save("half")

    said = it.dvc("exp", "run", "--temp", "-S", "grid.seeds=[0,1]", good=False)
    assert "run `python -m workflow.plan`, then the experiment." in said
    it.write(it.read() | {"grid": it.read()["grid"] | {"seeds": [0, 1]}})
    it.python("-m", "workflow.plan")
    it.dvc("exp", "run", "-q", "--temp", "-n", "two")
    assert "two" in it.dvc("exp", "list")


def test_experiments_wait_in_the_queue_of_dvc(lab):
    """A worker takes them one by one, each in a temporary workspace."""
    it = lab("dvc")
    content = it.read()
    content["grid"]["seeds"] = [0]
    it.write(content)
    it.python("-m", "workflow.plan")
    it.save("before")
    for name, ratio in (("half", 0.5), ("most", 0.9)):
        setting = f"methods.mae.mask_ratio={ratio}"
        it.dvc("exp", "run", "-q", "--queue", "-n", name, "-S", setting)
    it.dvc("queue", "start")
    try:
        said = it.dvc("queue", "logs", "--follow", "half") + it.dvc("queue", "logs", "-f", "most")
        wait(lambda: {"half", "most"} <= set(it.dvc("exp", "list", "--name-only").split()), said)
    finally:
        it.dvc("queue", "stop", "--kill")
    assert it.ran() == [] and it.read()["methods"]["mae"]["mask_ratio"] == 0.75 and it.right()
    it.dvc("exp", "apply", "-q", "most")
    assert it.read()["methods"]["mae"]["mask_ratio"] == 0.9
    assert it.right() and it.pending() == set() and it.clean() and it.ran() == []


def test_a_chain_of_stages_grows_by_either_engine(lab):
    it = lab("snakemake")
    content = it.read()
    chain = {"method": "dbot", "target": "run:random", "stages": 2}
    content["methods"] |= {"random": {}, "dbot": {}}
    content["grid"]["runs"] = {"dbot": chain, "random": {"method": "random"}}
    it.write(content)
    first = {f"pretrain/{run}-s0" for run in ("random", "dbot-1", "dbot-2")}
    first |= {job.replace("pretrain", "transfer") + "/knn" for job in first} | {"report"}
    it.snakemake()
    assert set(it.ran()) == first
    assert it.right() and it.clean() and it.pending() == set()
    chain["stages"] = 3
    it.write(content)
    added = {"pretrain/dbot-3-s0", "transfer/dbot-3-s0/knn", "report"}
    assert it.pending() == added, "one more stage does not train those before it again"
    it.dvc("repro", "-q")
    assert set(it.ran()) == added
    assert it.right() and it.pending() == set()


def test_a_source_of_files_that_change_and_go(tmp_path):
    images = tmp_path / "my images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    runs = {"runs": {"mae": {"method": "mae"}}}
    content = PARAMS | {"data": {"source": f"folder:{images}", "image_size": 16}, "grid": runs}
    it = Lab.create(tmp_path / "lab", content)
    it.snakemake()
    it.ran()
    assert it.pending() == set()
    (images / "b.png").write_bytes(b"22")
    it.dvc("repro", "-q")
    assert set(it.ran()) == set(it.plan().jobs), "one repro suffices"
    assert it.pending() == set() == it.changed() - {"watch/files"}
    shutil.rmtree(images)
    said = it.snakemake("-n")
    assert "is not there" in said and "Nothing to be done" in said, "results stay usable"
    shutil.rmtree(it.folder / "results")
    assert f"{images} does not exist" in it.snakemake("-n", good=False)


# -------------------------------------------------------------------------------------------------
# one by one


def test_an_edit_while_dvc_runs_does_not_spoil_its_records(lab):
    it = lab("dvc")
    it.set(0.6)
    text = (it.folder / "params.yaml").read_text()
    (it.folder / "meanwhile.py").write_text(
        f"open('params.yaml', 'w').write({text.replace('0.6', '0.7')!r})\n"
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'workflow.plan'], check=True)\n"
    )
    said = it.dvc("repro", good=False)
    assert "pretrain/mae-s0, but" in said and "is out of date" in said, "made with 0.6"
    assert it.ran() == ["pretrain/mae-s0"] and it.pending() == MAE_JOBS
    it.dvc("repro", "-q")
    assert it.right() and set(it.ran()) == MAE_JOBS
    it.set(0.6)
    it.dvc("repro", "-q")
    assert it.right() and "pretrain/mae-s0" not in it.ran(), "what was made with 0.6 is known"
    assert it.pending() == set() and it.clean()


def test_bad_params_stop_both_engines_with_the_same_words(lab):
    it = lab("new")
    content = it.read()
    content["methods"]["mae"] = {"mask_ration": 0.5}
    it.write(content)
    for said in (it.snakemake("-n", good=False), it.dvc("repro", good=False)):
        assert "methods.mae.mask_ration: unknown key" in said
        assert "did you mean 'mask_ratio'" in said
    assert it.ran() == []


def test_part_of_the_jobs_other_files_and_opting_out(lab):
    it = lab("new")
    it.snakemake("results/pretrain/mae-s0/manifest.json")
    assert set(it.ran()) == {"data/main", "pretrain/mae-s0"}
    assert "pretrain/mae-s0" not in it.changed(), "what is finished is recorded"
    content = it.read() | {"grid": {"runs": {"mae": {"method": "mae"}}}}
    content["methods"]["mae"]["mask_ratio"] = 0.5
    before = it.read()
    it.write(content)
    (it.folder / "params.yaml").rename(it.folder / "other params.yaml")
    it.write(before)
    it.snakemake("--config", "params=other params.yaml", "results=else where/results")
    other = it.folder / "else where/results"
    assert len(it.ran()) == 4 and (other / "report/index.html").exists()
    manifest = json.loads((other / "pretrain/mae-s0/manifest.json").read_text())
    assert manifest["params"]["method"]["config"]["mask_ratio"] == 0.5
    lock = (it.folder / "dvc.lock").read_text()
    it.snakemake("--config", "dvc=false")
    assert len(it.ran()) == 6 and (it.folder / "dvc.lock").read_text() == lock
    assert "dvcs" in it.snakemake("--config", "dvcs=false", "-n", good=False)


def test_other_results_are_not_replaced_by_mistake(lab):
    it = lab("snakemake")
    text = (it.folder / "params.yaml").read_text()
    (it.folder / "other.yaml").write_text(text)
    assert "Nothing to be done" in it.snakemake("-n", "--config", "params=other.yaml")
    (it.folder / "other.yaml").write_text(text.replace("0.75", "0.5"))
    why = (
        "other.yaml: found results, which holds pretrain/mae-s0 and more of params.yaml, expected "
        "another folder (snakemake --config params=other.yaml results=FOLDER, or --results FOLDER)"
        ", or compute: {replace: true}, to replace them"
    )
    assert why in it.snakemake("--config", "params=other.yaml", good=False)
    stage = ("-m", "stages.pretrain", "--run", "mae-s0", "--params", "other.yaml")
    assert why in it.python(*stage, good=False)
    assert it.ran() == [] and it.right(), "nothing was touched"
    it.snakemake("--config", "params=other.yaml", "results=others/results")
    assert len(it.ran()) == 8
    more = yaml.safe_load((it.folder / "other.yaml").read_text())
    more["compute"]["replace"] = True
    (it.folder / "other.yaml").write_text(yaml.safe_dump(more))
    it.snakemake("--config", "params=other.yaml")
    assert set(it.ran()) == MAE_JOBS
    assert "holds pretrain/mae-s0 and more of other.yaml" in it.snakemake(good=False)
    (it.folder / "other.yaml").unlink()
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS and it.right(), "a file that is gone owns nothing"


def test_a_checkout_anywhere_moved_and_without_git(lab, tmp_path):
    first = lab("snakemake")
    (tmp_path / 'l\'été "ä" $x').mkdir()
    it = Lab(tmp_path / 'l\'été "ä" $x' / "my lab")
    first.folder.rename(it.folder)
    assert it.pending() == set() and it.clean(), "a moved checkout has nothing to do"
    it.set(0.5)
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS and it.right() and it.clean()
    it.set(0.4)
    it.dvc("repro", "-q")
    assert set(it.ran()) == MAE_JOBS and it.right() and it.pending() == set()
    shutil.rmtree(it.folder / ".git")
    it.set(0.3)
    said = it.snakemake()
    assert set(it.ran()) == MAE_JOBS and it.right()
    [warning] = re.findall("^warning: .*", said, re.M)
    why = f"{it.folder} is not a git repository; `--config dvc=false` does without it"
    assert warning == f"warning: dvc.lock was not updated: {why}"


def test_snakemake_in_another_folder_says_where_to_run(lab, tmp_path):
    it = lab("snakemake")
    snakefile = str(it.folder / "Snakefile")
    (tmp_path / "else").mkdir()
    other = Lab(tmp_path / "else")
    said = other.snakemake("-n", "-s", snakefile, good=False)
    assert f"expected that of the Snakefile: add --directory '{it.folder}'" in said
    said = other.snakemake("-n", "-s", snakefile, "--directory", str(it.folder))
    assert "Nothing to be done" in said
    assert list(other.folder.iterdir()) == [], "nothing was left there"


def test_results_on_another_disk_by_a_link(lab, tmp_path):
    it = lab("snakemake")
    (it.folder / "results").rename(tmp_path / "disk")
    (it.folder / "results").symlink_to(tmp_path / "disk")
    assert it.pending() == set()
    it.set(0.5)
    said = it.snakemake()
    assert set(it.ran()) == MAE_JOBS and it.right() and it.pending() == set()
    why = f"found results as a link to {tmp_path / 'disk'}, expected a folder of the checkout"
    assert re.findall("^warning: .*", said, re.M)[0].startswith(
        f"warning: dvc.lock was not updated: {why}"
    )
    assert "warning" not in it.snakemake("--config", "dvc=false")
    assert why in it.dvc("repro", good=False)
    assert it.ran() == [] and it.right()


def test_params_and_data_in_odd_places(tmp_path):
    odd = tmp_path / 'l\'été "ä" $x'
    (odd / "my photos").mkdir(parents=True)
    (odd / "my photos/a.png").write_bytes(b"1")
    it = Lab.create(tmp_path / "lab")
    data = {"source": f"folder:{odd / 'my photos'}", "image_size": 16}
    runs = {"runs": {"mae": {"method": "mae"}}}
    text = yaml.safe_dump(PARAMS | {"data": data, "grid": runs}, allow_unicode=True)
    (odd / "my params.yaml").write_text(text)
    (odd / "my venv").symlink_to(BIN.parent)
    it.run(
        *(str(odd / "my venv/bin/python"), "-m", "snakemake", "--cores", "2", "--config"),
        *(f"params={odd / 'my params.yaml'}", f"results={odd / 'my results'}"),
    )
    assert (odd / "my results/report/manifest.json").exists() and len(it.ran()) == 4
    assert "fresh" in it.python(
        *("-m", "workflow.plan", "--params", str(odd / "my params.yaml")),
        *("--results", str(odd / "my results")),
    )


@pytest.fixture
def slow(lab):
    """A lab in which snakemake runs in the background; its first job takes 5 s."""
    it = lab("new")
    (it.folder / "meanwhile.py").write_text("import time; time.sleep(5)")
    with it.started(sys.executable, "-m", "snakemake", "--cores", "2") as process:
        while not (it.folder / "done.py").exists():
            assert process.poll() is None
            time.sleep(0.05)
        yield it, process


def test_after_a_kill_of_snakemake_the_same_command_continues(slow):
    it, process = slow
    process.kill()
    process.wait()
    assert list((it.folder / ".snakemake/locks").iterdir()), "Snakemake leaves its locks"
    it.snakemake()
    assert sorted(it.ran()) == sorted(it.plan().jobs), "the job left behind was waited for"
    assert "waiting for process" in (it.folder / "logs/data/main.log").read_text()
    assert it.right() and it.pending() == set() and it.clean()


def test_the_lock_of_a_snakemake_that_lives_is_respected(slow):
    it, process = slow
    assert "Directory cannot be locked" in it.snakemake(good=False)
    it.snakemake("-n")
    assert process.wait() == 0
    assert sorted(it.ran()) == sorted(it.plan().jobs) and it.right()


def test_locks_that_another_machine_left_stay(lab):
    it = lab("snakemake")
    (it.folder / "results/report/manifest.json").unlink()
    locks = it.folder / ".snakemake/locks"
    for owner, good in (("another-machine\n", False), ("", False), (f"{platform.node()}\n", True)):
        locks.mkdir(exist_ok=True)
        (locks / "0.output.lock").write_text("results/report/manifest.json\n")
        (it.folder / ".snakemake/owners").write_text(owner)
        it.snakemake(good=good)


@pytest.mark.parametrize(
    "name", ["$(touch HACKED)", "a'b\"c", "`touch HACKED`; touch HACKED", "-ä"]
)
def test_names_are_quoted_for_the_shell(lab, name):
    it = lab("new")
    shutil.copy(it.folder / "params.yaml", it.folder / f"{name}.yaml")
    it.snakemake("--config", f"params={name}.yaml", f"results={name}/results")
    assert len(it.ran()) == 8
    assert (it.folder / name / "results/report/manifest.json").exists()
    assert not (it.folder / "HACKED").exists()
    said = it.snakemake("-n", "--config", "results=a{run}", good=False)
    assert "results: found 'a{run}', expected a name without braces" in said


def test_snakemakes_own_report(lab):
    """Categories by stage, then method, task or target; figures, pictures, the record of each job
    with its score; and what was shown makes no job run again.
    """
    it = lab("snakemake")
    report = it.folder / "results/report"
    for name in ("figures/loss-mae", "figures/scores-knn", "figures/target-vqkd-counts"):
        (report / f"{name}.svg").parent.mkdir(exist_ok=True)
        (report / f"{name}.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name in ("pretrain/beitv2", "target/teacher"):
        (report / "pictures" / name).mkdir(parents=True)
        (report / "pictures" / name / "what_it_sees.png").write_bytes(b"1")
    headline = {"headline": {"key": "top1"}, "top1": 0.625}
    (it.folder / "results/transfer/mae-s0/knn/metrics.json").write_text(json.dumps(headline))
    it.python("-m", "snakemake", "--report", "x.zip")
    files = zipfile.ZipFile(it.folder / "x.zip")
    page = files.read(next(n for n in files.namelist() if n.endswith("report.html"))).decode()
    shown, results = (
        json.loads(re.search(rf"var {name} = (\{{.*?\}});?\n", page)[1])
        for name in ("categories", "results")
    )
    assert sorted(shown) == ["1. Report", "2. Data", "3. Targets", "4. Pretraining", "5. Tasks"]
    found = {(c, sub, path) for c, subs in shown.items() for sub, paths in subs.items()
             for path in paths}  # fmt: skip
    assert found == {
        ("1. Report", "page", "results/report/index.html"),
        ("1. Report", "page", "results/report/summary.md"),
        ("2. Data", "main", "results/data/main/manifest.json"),
        ("3. Targets", "teacher", "results/target/teacher/manifest.json"),
        ("3. Targets", "teacher", "results/report/pictures/target/teacher/what_it_sees.png"),
        ("3. Targets", "vqkd", "results/target/vqkd/manifest.json"),
        ("3. Targets", "vqkd", "results/report/figures/target-vqkd-counts.svg"),
        ("4. Pretraining", "mae", "results/pretrain/mae-s0/manifest.json"),
        ("4. Pretraining", "mae", "results/report/figures/loss-mae.svg"),
        ("4. Pretraining", "beitv2", "results/pretrain/beitv2-s0/manifest.json"),
        ("4. Pretraining", "beitv2", "results/report/pictures/pretrain/beitv2/what_it_sees.png"),
        ("5. Tasks", "knn", "results/transfer/mae-s0/knn/manifest.json"),
        ("5. Tasks", "knn", "results/transfer/beitv2-s0/knn/manifest.json"),
        ("5. Tasks", "knn", "results/report/figures/scores-knn.svg"),
    }
    assert all(about["caption"] and about["labels"] for about in results.values())
    score = results["results/transfer/mae-s0/knn/manifest.json"]["labels"]
    assert score == {"what": "record", "of": "mae", "seed": "0", "score": "0.6250"}
    fingerprint = it.plan().jobs["report"].fingerprint
    assert "an experiment of mimlab" in page and fingerprint[:12] in page
    assert it.pending() == set()
    it.set(0.5)
    it.snakemake()
    assert set(it.ran()) == MAE_JOBS and it.right(), "the report makes no figures now, and may"


def test_lint_and_format(lab):
    it = lab("new")
    it.snakemake("--lint")
    config = str(ROOT / "pyproject.toml")
    it.run(str(BIN / "snakefmt"), "--check", "--config", config, "Snakefile", "workflow")


def test_the_page_of_graphs_is_up_to_date():
    Lab(ROOT).python("-m", "workflow.graphs", "--check")


def test_encoders_are_an_artifact_of_dvc(lab):
    it = lab("dvc")
    it.save("results")
    it.git("tag", "-a", "encoders@v1.0.0", "-m", "the first")
    it.dvc("artifacts", "get", ".", "encoders", "-o", "got")
    kept = {path.parent.name for path in (it.folder / "got").glob("*/manifest.json")}
    assert kept == {"mae-s0", "beitv2-s0"}


def test_a_random_walk_of_eight_actions(lab):
    """More by hand: python tests/walk.py --actions 100."""
    Walk(lab("dvc"), seed=1).go(8)


# -------------------------------------------------------------------------------------------------
# watched


@pytest.mark.parametrize("engine", ["snakemake --cores 2", "dvc repro"])
def test_the_view_shows_either_engine_and_why_a_job_failed(lab, engine):
    """The first job fails, then the same command goes on to the end."""
    it = lab("new")
    (it.folder / "meanwhile.py").write_text("from workflow.files import JobError\n"
                                            "raise JobError('too little of all')\n")  # fmt: skip
    watched = ("-m", "workflow.watch", "--", sys.executable, "-m", *engine.split())
    said = it.python(*watched, good=False)
    name = engine.split()[0]
    assert "FAILED data/main\n  too little of all\n" in said
    assert f"{name} ended with status" in said and f"logs/{name}.log" in said
    assert "7 more job(s) were not run." in said
    assert "Traceback" not in said and "Error in rule" not in said and it.ran() == []
    said = it.python(*watched)
    assert sorted(it.ran()) == sorted(it.plan().jobs) and it.right() and it.clean()
    for id in it.plan().jobs:
        assert re.search(rf"done +{id}: \(", said), said
    assert "\n8 of 8 jobs done, after " in said
    assert said.endswith("The report: results/report/index.html\n")
