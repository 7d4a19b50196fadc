"""The toys of the five pages docs/adding-*.md, word for word, dropped into a copy of the project.

No other file is touched. They run together from a user's files to the report: a source that reads
files, a family of encoders, a target, a method and a task with a headline of its own.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import write_params
from tests.lab import built_on
from workflow.plan import Plan, load
from workflow.plan.explain import explain

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("adding-*.md"))
DRIVER = """
import importlib, sys
sys.path.insert(0, "")
import numpy as np, timm, torch
from workflow.plan import load
for job in load().jobs.values():
    stage = importlib.import_module(f"stages.{job.stage}")
    assert stage.main(job.command.split()[3:]) == 0
from stages.kit.nets import encoders
folder, images = "results/pretrain/guess-s0/encoder", torch.rand(2, 3, 16, 16)
plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
ours = encoders.load(folder).eval()
with torch.inference_mode():
    found = {"timm": plain.forward_features(images), "ours": ours.forward_features(images)}
np.savez("features.npz", **{name: value.numpy() for name, value in found.items()})
"""
# What makes the examples of the pages tiny, and says which data set is meant.
TINY = {
    "experiment": "toys",
    "data": {
        "photos": {"source": "arrays:pictures", "image_size": 16, "options": {"skip": "skip.txt"}},
        "scenes": {"image_size": 16, "options": {"train": 24, "val": 8, "test": 8}},
    },
    "model": {"patch_size": 4, "embed_dim": 16, "depth": 2},
    "train": {"epochs": 2, "batch_size": 16, "precision": "fp32"},
    "targets": {"palette": {"data": "photos"}},
    "methods": {"random": {}},
    "tasks": {"knn": {"k": [3]}, "finetune": {"epochs": 1, "batch_size": 16}},
    "grid": {
        "seeds": [0, 1],
        "runs": {
            "guess": {"data": "photos"},
            "random": {"method": "random", "data": "photos", "tasks": {"finetune": None}},
        },
        "contrasts": {"learning": {"of": ["guess"], "against": ["random"]}},
    },
    "compute": {"device": "cpu", "workers": 0, "threads": 1, "tracking": False},
}
TOYS = {  # the file of each toy, and the jobs that run its code
    "stages/sources/arrays.py": r"data/photos",
    "stages/encoders/convmix.py": r"(target|pretrain|transfer)/.*",
    "stages/targets/palette.py": r"target/palette",
    "stages/methods/guess.py": r"pretrain/guess-s\d",
    "stages/tasks/prototypes.py": r"transfer/.*/segment",
}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every first block of a language in the pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found.append((text, re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]))
    return found


def merged(content: dict, changes: dict) -> dict:
    """`content` with `changes`, section by section."""
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(content.get(key), dict)
        content[key] = merged(content[key], value) if both else copy.deepcopy(value)
    return content


def pictures(folder: Path, per_class: int = 20) -> None:
    """A user's files: arrays of coarse squares, and a list of those to leave out."""
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(per_class):
            squares = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            image = squares.repeat(4, axis=0).repeat(4, axis=1)
            np.save(folder / "pictures" / name / f"{number}.npy", image)
    (folder / "skip.txt").write_text("cats/0.npy\n")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project in which all toys have run, from data to report."""
    folder = tmp_path_factory.mktemp("toys")
    for name in ("stages", "workflow"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for page, toy in blocks("python"):
        file = folder / re.search(r"`(stages/\w+/\w+\.py)`", page.split("```")[0])[1]
        assert not file.exists(), f"{file.name} is there already"
        file.write_text(toy, encoding="utf-8")
    content: dict = {}
    for _, text in blocks("yaml"):
        merged(content, yaml.safe_load(text))
    write_params(folder, merged(content, TINY))
    pictures(folder)
    command = [sys.executable, "-c", DRIVER]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@contextlib.contextmanager
def edited(file: Path, text: str):
    """A file with another text for a while; a new one is removed again."""
    before = file.read_text() if file.exists() else None
    file.write_text(text)
    try:
        yield
    finally:
        file.unlink() if before is None else file.write_text(before)


def plan_of(project: Path) -> Plan:
    with contextlib.chdir(project):
        return load(root=project)


def stale(project: Path) -> set[str]:
    """The jobs that would run."""
    plan = plan_of(project)
    with contextlib.chdir(project):
        return {id for id in plan.jobs if not plan.fresh(id)}


def test_the_toys_run_from_data_to_report(project):
    assert stale(project) == set()
    ids = set(plan_of(project).jobs)
    assert {"data/photos", "data/scenes", "target/palette", "report"} < ids
    assert len(ids) == 4 + 2 * (2 + 3 + 2)
    lines = (project / "results/pretrain/guess-s0/history.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses and np.isfinite(losses).all()
    assert (project / "results/pretrain/guess-s0/pictures/masks.png").is_file()


def test_the_source_leaves_out_what_the_user_lists(project):
    facts = json.loads((project / "results/data/photos/data.json").read_text())
    assert sum(split["count"] for split in facts["splits"].values()) == 39
    assert facts["classes"] == ["cats", "dogs"]


def test_every_test_image_has_a_score(project):
    for run in ("guess-s0", "random-s1"):
        out = project / "results/transfer" / run / "segment"
        metrics = json.loads((out / "metrics.json").read_text())
        assert (metrics["task"], metrics["kind"]) == ("segment", "prototypes")
        assert metrics["headline"] == {"key": "miou", "label": "mIoU", "unit": "%"}
        assert 0 < metrics["miou"] < 1
        with np.load(out / "scores.npz") as arrays:
            assert arrays["index"].tolist() == list(range(8))
            assert ((arrays["score"] >= 0) & (arrays["score"] <= 1)).all()


def test_the_report_shows_the_headline_everywhere(project):
    results = project / "results"
    page = (results / "report/index.html").read_text(encoding="utf-8")
    rows = list(csv.DictReader((results / "report/summary.csv").open()))
    mine = {row["run"]: row for row in rows if row["task"] == "segment"}
    assert {row["metric"] for row in mine.values()} == {"miou"}
    for run in ("guess", "random"):
        files = [results / f"transfer/{run}-s{seed}/segment/metrics.json" for seed in (0, 1)]
        values = [json.loads(file.read_text())["miou"] for file in files]
        assert [float(value) for value in mine[run]["scores"].split()] == values
        assert f"{100 * np.mean(values):.1f} <small>" in page
    assert '<span class="sub">mIoU, %' in page  # the table
    assert page.count(">mIoU, %</text>") == 2  # scores, and scores against cost
    summary = (results / "report/summary.md").read_text()
    assert "segment: mIoU, %, on scenes" in summary
    contrast = next(line for line in summary.splitlines() if line.startswith("| learning |"))
    assert contrast.count("images") == 2, "both tasks are paired by image"


def test_the_exported_encoder_is_a_timm_model(project):
    found = np.load(project / "features.npz")
    assert np.array_equal(found["timm"], found["ours"])


def test_a_new_file_of_the_users_makes_the_source_stale(project):
    with edited(project / "pictures/cats/new.npy", "a new file"):
        command = [sys.executable, "-m", "workflow.plan", "--explain", "data/photos"]
        said = subprocess.run(command, cwd=project, capture_output=True, text=True).stdout
        why = "what arrays:pictures holds changed (cats/new.npy was added)"
        assert said.strip() == f"data/photos would run because {why}."
        assert stale(project) == built_on({"data/photos"}, plan_of(project))
    assert stale(project) == set()


def test_another_content_of_a_named_file_makes_the_source_stale(project):
    with edited(project / "skip.txt", "dogs/0.npy\n"):  # of the same size
        plan = plan_of(project)
        with contextlib.chdir(project):
            said = explain(plan, "data/photos")
    why = "what data.photos.options.skip names changed"
    assert said == f"data/photos would run because {why}."


@pytest.mark.parametrize("path", TOYS)
def test_an_edited_toy_makes_its_own_jobs_stale_and_no_other(project, path):
    file = project / path
    with edited(file, file.read_text() + "# edited\n"):
        plan = plan_of(project)
        own = {id for id, job in plan.jobs.items() if path in job.hashes}
        assert own == {id for id in plan.jobs if re.fullmatch(TOYS[path], id)}
        assert stale(project) == built_on(own, plan)
