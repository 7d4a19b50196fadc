"""The plan: its jobs, what each needs, the files of the user's, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_content, write_params
from tests.plans import changed, editable, finish, plan_of
from workflow.engines.dvc import loops, runs_text
from workflow.plan import load
from workflow.plan.__main__ import main
from workflow.plan.digest import Files
from workflow.plugins import ROOT, ParamsError

# -------------------------------------------------------------------------------------------------
# jobs


def test_jobs_inputs_and_folders(tmp_path):
    plan = plan_of(tmp_path, grid__seeds=[0, 3])
    assert [i for i in plan.jobs if i.startswith(("data", "target", "pretrain"))] == [
        "data/main", "target/teacher", "target/vqkd",
        *(f"pretrain/{r}-s{s}" for r in ("mae", "beitv2", "random", "supervised") for s in (0, 3)),
    ]  # fmt: skip
    jobs = plan.jobs
    assert jobs["data/main"].inputs == {}
    assert jobs["target/vqkd"].inputs == {"data": "data/main", "upstream": "target/teacher"}
    assert jobs["pretrain/mae-s3"].inputs == {"data": "data/main"}
    assert jobs["pretrain/beitv2-s3"].inputs == {"data": "data/main", "target": "target/vqkd"}
    assert jobs["transfer/mae-s3/knn"].inputs == {"data": "data/main", "encoder": "pretrain/mae-s3"}
    assert jobs["report"].inputs == {id: id for id in jobs if id != "report"}
    assert jobs["transfer/mae-s3/knn"].output == tmp_path / "results/transfer/mae-s3/knn"
    assert jobs["pretrain/mae-s3"].params["seed"] == 3
    for number, job in enumerate(jobs.values()):
        above = job.inputs.values()
        assert all(list(jobs).index(i) < number for i in above), "inputs come first"
        assert len(job.fingerprint) == 64
        json.dumps(job.params)
    assert len({j.fingerprint for j in jobs.values()}) == len(jobs)


def test_targets_that_no_run_needs_are_left_out(tmp_path):
    plan = plan_of(tmp_path, grid={"runs": {"mae": {"method": "mae"}}})
    assert not [i for i in plan.jobs if i.startswith("target")]


def test_what_the_report_is_told_about_labels(tmp_path):
    targets = {"teacher": {"kind": "pretrained"}, "vqkd": {"kind": "vqkd", "upstream": "teacher"}}
    runs = plan_of(tmp_path, targets=targets).jobs["report"].params["runs"]
    assert runs["supervised-s0"]["labels"] and not runs["beitv2-s0"]["labels"]
    assert runs["beitv2-s0"]["target"] == "vqkd" and runs["beitv2-s0"]["label_targets"] == [
        "teacher"
    ]
    assert runs["mae-s0"] == {
        "run": "mae",
        "method": "mae",
        "kind": "mae",
        "data": "main",
        "model": "main",
        "tasks": ["knn", "linear", "finetune"],
        "seed": 0,
        "target": None,
        "teacher": None,
        "stage": 1,
        "labels": False,
        "trains": True,
        "label_targets": [],
    }
    assert runs["random-s0"]["trains"] is False


def test_the_same_params_give_the_same_fingerprints(tmp_path):
    one, two = plan_of(tmp_path / "a"), plan_of(tmp_path / "b")
    assert not changed(one, two)
    explicit = plan_of(
        tmp_path / "c",
        methods__mae={"mask_ratio": 0.75},
        compute={"workers": 3, "tracking": True, "compile": True},
    )
    assert not changed(one, explicit), "writing a default, or how to run, changes nothing"


# -------------------------------------------------------------------------------------------------
# several data sets, encoders, and more ways in which jobs follow one another


SEVERAL = {
    "data": {
        "photos": {"source": "shapes", "image_size": 16},
        "other": {"source": "shapes", "image_size": 24, "options": {"train": 40}},
        "idle": {"source": "shapes", "image_size": 16},
    },
    "model": None,
    "models": {
        "small": {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 2,
                  "num_heads": 2},
        "wide": {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 32, "depth": 2,
                 "num_heads": 2},
    },
    "targets": {"vqkd": {"upstream": "run:mae", "seed": 1, "data": "photos", "model": "small"}},
    "methods": {"mae": {}, "beitv2": {"min_block": 1}},
    "tasks": {"knn": {}, "elsewhere": {"kind": "knn", "data": "other"}},
    "grid": {
        "seeds": [0, 1],
        "runs": {
            "mae": {"method": "mae", "data": "photos", "model": "small",
                    "tasks": {"elsewhere": None}},
            "beitv2": {"method": "beitv2", "target": "vqkd", "data": "photos", "model": "wide",
                       "tasks": {"knn": {"k": [7]}}},
        },
    },
}  # fmt: skip


def several(folder: Path, **changes):
    content = tiny_content() | SEVERAL | changes
    content = {key: value for key, value in content.items() if value is not None}
    return load(write_params(folder, content), folder / "results")


def test_runs_choose_data_and_encoder_and_may_change_a_task(tmp_path):
    jobs = several(tmp_path).jobs
    assert "data/idle" not in jobs, "no run needs it"
    assert jobs["transfer/beitv2-s0/elsewhere"].inputs == {
        "data": "data/other",
        "encoder": "pretrain/beitv2-s0",
    }
    assert jobs["transfer/beitv2-s0/elsewhere"].params["image_size"] == 24
    assert jobs["transfer/beitv2-s0/knn"].params["image_size"] == 16
    assert "transfer/mae-s0/elsewhere" not in jobs
    config = {n: jobs[f"transfer/{n}-s0/knn"].params["task"]["config"] for n in ("mae", "beitv2")}
    assert list(config["beitv2"]["k"]) == [7] and config["mae"]["k"] != config["beitv2"]["k"]
    widths = {n: jobs[f"pretrain/{n}-s0"].params["model"]["config"]["embed_dim"] for n in config}
    assert widths == {"mae": 16, "beitv2": 32}
    report = jobs["report"].params
    assert report["tasks"]["elsewhere"] == {
        "kind": "knn",
        "key": "top1",
        "label": report["tasks"]["knn"]["label"],
        "unit": "%",
    }
    assert report["runs"]["mae-s0"]["tasks"] == ["knn"]
    assert report["runs"]["beitv2-s0"]["model"] == "wide"


def test_a_runs_encoder_may_be_the_upstream_of_a_target(tmp_path):
    plan = several(tmp_path)
    order = list(plan.jobs)
    assert plan.jobs["target/vqkd"].inputs == {"data": "data/photos", "upstream": "pretrain/mae-s1"}
    assert order.index("pretrain/mae-s1") < order.index("target/vqkd")
    assert order.index("target/vqkd") < order.index("pretrain/beitv2-s0")
    for number, job in enumerate(plan.jobs.values()):
        assert all(order.index(i) < number for i in job.inputs.values())
    changed_run = several(
        tmp_path / "b", methods={"mae": {"mask_ratio": 0.5}, "beitv2": {"min_block": 1}}
    )
    assert "target/vqkd" in changed(plan, changed_run)
    item = loops(plan)["plan"]["target"]["vqkd"]
    assert item == {"data": "data/photos", "above": "pretrain/mae-s1"}


def test_labels_of_a_run_are_told_through_a_target_made_from_it(tmp_path):
    runs = SEVERAL["grid"]["runs"] | {
        "supervised": {"method": "supervised", "data": "photos", "model": "small"}
    }
    targets = {"vqkd": SEVERAL["targets"]["vqkd"] | {"upstream": "run:supervised"}}
    plan = several(
        tmp_path,
        targets=targets,
        methods=SEVERAL["methods"] | {"supervised": {}},
        grid=SEVERAL["grid"] | {"runs": runs},
    )
    assert plan.jobs["report"].params["runs"]["beitv2-s0"]["label_targets"] == ["supervised"]


# -------------------------------------------------------------------------------------------------
# command line


def test_command_line(tmp_path, capsys, monkeypatch):
    path = str(write_params(tmp_path, tiny_content()))
    files = ["--params", path, "--results", str(tmp_path / "results")]
    before = (ROOT / "workflow/runs.json").read_bytes()
    assert main(files) == 0
    assert "pretrain/mae-s0" in capsys.readouterr().out
    finish(load(path, tmp_path / "results"), "data/main")
    main(files)
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["data/main"][0] == "fresh" and lines["report"][:2] == ["to", "run"]
    assert main([*files, "--explain", "data/main"]) == 0
    assert capsys.readouterr().out == "data/main is up to date.\n"
    assert main([*files, "--explain", "data/mian"]) == 1
    assert "did you mean 'data/main'" in capsys.readouterr().err
    assert (ROOT / "workflow/runs.json").read_bytes() == before, (
        "other params files leave runs.json alone"
    )


def test_committed_runs_follow_from_params():
    expected = runs_text(load(ROOT / "params.yaml", ROOT / "results"))
    assert (ROOT / "workflow/runs.json").read_text() == expected, "python -m workflow.plan"


def test_code_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ParamsError, match="stages/methods/mae.py: part of the code is missing"):
        Files(tmp_path).hashes(("stages/methods/mae.py",))


# -------------------------------------------------------------------------------------------------
# what will fail is said before it is trained for


def split(labels: int = 0, fields=()) -> dict:
    return {"count": 9, "class_counts": [labels, 0], "labelled": bool(labels), "fields": [*fields]}


def with_data(tmp_path, **splits):
    """The plan once a data set of these splits was made."""
    plan = plan_of(tmp_path)
    finish(plan, "data/main")
    facts = {"splits": splits}
    (plan.jobs["data/main"].output / "data.json").write_text(json.dumps(facts))
    return plan_of(tmp_path)


def test_tasks_and_methods_without_labels_are_named_before_pretraining(tmp_path):
    assert with_data(tmp_path / "a", train=split(1), val=split(1), test=split(1))
    with pytest.raises(ParamsError) as error:
        with_data(tmp_path / "b", train=split(), val=split(), test=split())
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "tasks.knn needs labels; data set 'main' has none: name another data set in "
        "tasks.knn.data, or remove the task (or tasks: {knn: null} in a run)",
        "tasks.linear needs labels; data set 'main' has none: name another data set in "
        "tasks.linear.data, or remove the task (or tasks: {linear: null} in a run)",
        "tasks.finetune needs labels; data set 'main' has none: name another data set in "
        "tasks.finetune.data, or remove the task (or tasks: {finetune: null} in a run)",
        "grid.runs.supervised.method: supervised needs labels, expected a data set that has them "
        "(found 'main', whose train split has none)",
    ]
    with pytest.raises(
        ParamsError, match="knn needs labels; data set 'main' has none in test and val"
    ):
        with_data(tmp_path / "c", train=split(1), val=split(), test=split())
    with pytest.raises(ParamsError, match="tasks.knn needs labels; .* has none in val"):
        with_data(tmp_path / "d", train=split(1), test=split(1))


MASKS = """
from dataclasses import dataclass

HEADLINE = ("iou", "IoU", "%")
NEEDS = {"masks"}


@dataclass(frozen=True)
class Config:
    k: int = 1


def use(config):
    return config.k
"""


def test_masks_that_a_source_never_gives_are_missed_by_the_plan(tmp_path):
    root = editable(tmp_path)
    (root / "stages/tasks/segment.py").write_text(MASKS)
    (tmp_path / "images").mkdir()
    tasks = {"segment": {}}
    assert plan_of(tmp_path, root, tasks=tasks).jobs
    data = {"source": f"folder:{tmp_path / 'images'}", "image_size": 16}
    content = tiny_content(tasks=tasks) | {"data": data}
    why = "tasks.segment: task segment needs masks, which the source folder of data never gives"
    with pytest.raises(ParamsError, match=why):
        load(write_params(tmp_path, content), tmp_path / "results", root)
    finish(plan_of(tmp_path, root, tasks=tasks), "data/main")
    facts = {"splits": dict.fromkeys(("train", "val", "test"), split(1))}
    (tmp_path / "results/data/main/data.json").write_text(json.dumps(facts))
    with pytest.raises(ParamsError, match="tasks.segment needs masks; data set 'main' has none:"):
        plan_of(tmp_path, root, tasks=tasks)


def test_a_reader_that_has_enough_ends_the_list_without_a_word():
    out, into = os.pipe()
    os.close(out)  # as `head` does
    words = [sys.executable, "-m", "workflow.plan"]
    done = subprocess.run(words, cwd=ROOT, stdout=into, stderr=subprocess.PIPE, text=True)
    os.close(into)
    assert done.returncode == -signal.SIGPIPE and done.stderr == ""
