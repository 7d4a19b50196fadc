"""The task of docs/adding-a-task.md, word for word, from data to report: one file is enough."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_content, write_params

ROOT = Path(__file__).parents[1]
DRIVER = """
import sys
from importlib import import_module
sys.path.insert(0, "")
from workflow.plan import load
for job in load("params.yaml", "results").jobs.values():
    import_module(f"stages.{job.stage}").main(job.command.split()[3:])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with the task in its folder, after all of its jobs."""
    folder = tmp_path_factory.mktemp("toy") / "project"
    for name in ("stages", "workflow"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    page = (ROOT / "docs/adding-a-task.md").read_text(encoding="utf-8")
    toy = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    (folder / "stages/tasks/prototypes.py").write_text(toy)
    content = tiny_content(grid__seeds=[0, 1], targets=None)
    content |= {"targets": {}, "methods": {"mae": content["methods"]["mae"], "random": {}}}
    content["tasks"] = {"knn": {"k": [3]}, "parts": {"kind": "prototypes", "centred": False}}
    content["grid"]["runs"] = {"mae": {"method": "mae"}, "random": {"method": "random"}}
    content["grid"]["contrasts"] = {"learning": {"of": ["mae"], "against": ["random"]}}
    write_params(folder, content)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_its_metrics_say_what_it_is_and_every_test_image_has_a_score(project):
    for job in ("mae-s0", "random-s1"):
        out = project / "results/transfer" / job / "parts"
        metrics = json.loads((out / "metrics.json").read_text())
        assert (metrics["task"], metrics["kind"]) == ("parts", "prototypes")
        assert metrics["headline"] == {"key": "miou", "label": "mIoU", "unit": "%"}
        assert 0 < metrics["miou"] < 1
        with np.load(out / "scores.npz") as arrays:
            assert arrays["index"].tolist() == list(range(16))
            assert ((arrays["score"] >= 0) & (arrays["score"] <= 1)).all()
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["summary"]["miou"] == metrics["miou"]


def test_the_report_shows_its_headline_everywhere(project):
    results = project / "results"
    page = (results / "report/index.html").read_text(encoding="utf-8")
    rows = list(csv.DictReader((results / "report/summary.csv").open()))
    mine = {row["run"]: row for row in rows if row["task"] == "parts"}
    assert {row["metric"] for row in mine.values()} == {"miou"}
    for run in ("mae", "random"):
        values = [
            json.loads((results / f"transfer/{run}-s{s}/parts/metrics.json").read_text())["miou"]
            for s in (0, 1)
        ]
        assert [float(value) for value in mine[run]["scores"].split()] == values
        assert f"{100 * np.mean(values):.1f} <small>" in page
    assert '<span class="sub">mIoU, %</span>' in page  # the table
    assert page.count(">mIoU, %</text>") == 2  # scores, and scores against cost
    summary = (results / "report/summary.md").read_text()
    contrast = next(line for line in summary.splitlines() if line.startswith("| learning |"))
    assert contrast.count("images") == 2, "both tasks are paired by image"
