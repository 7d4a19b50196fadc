"""The whole road with the real stages, from params to report, and through the commands."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_content, write_params
from workflow.manifest import Manifest
from workflow.plan import load
from workflow.plan.explain import explain

ROOT = Path(__file__).parents[1]


def run_all(params: Path, results: Path) -> dict[str, Manifest]:
    """Every job of the plan in its order, in this process; the manifests by job id."""
    plan = load(params, results)
    for job in plan.jobs.values():
        stage = importlib.import_module(f"stages.{job.stage}")
        words = job.command.split()[3:]  # after python -m stages.<stage>
        assert stage.main([*words, "--params", str(params), "--results", str(results)]) == 0
        assert plan.fresh(job.id), explain(plan, job.id)
    return {id: plan.manifest(id) for id in plan.jobs}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(params file, results, manifests) of a complete tiny run with both methods and both
    baselines.
    """
    folder = tmp_path_factory.mktemp("whole")
    params = write_params(folder, tiny_content())
    return params, folder / "results", run_all(params, folder / "results")


def test_every_job_leaves_a_complete_folder(finished):
    _, results, manifests = finished
    assert len(manifests) == 1 + 2 + 4 + 4 * 3 + 1
    for id, manifest in manifests.items():
        folder = results / id
        listed = {*manifest.outputs, "manifest.json"}
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert there == listed, id
    assert not list((results.parent / "work").glob("*/checkpoint*"))


def test_the_report_shows_the_numbers_that_the_tasks_wrote(finished):
    _, results, _ = finished
    page = (results / "report/index.html").read_text(encoding="utf-8")
    rows = (results / "report/summary.csv").read_text(encoding="utf-8")
    for run in ("mae", "beitv2", "random", "supervised"):
        assert run in page and run in rows
        top1 = json.loads((results / f"transfer/{run}-s0/linear/metrics.json").read_text())["top1"]
        assert f"{100 * top1:.1f}" in page, run
    assert "<img" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_scores_reproduce_the_metric(finished):
    _, results, manifests = finished
    for id in manifests:
        if id.startswith("transfer/"):
            metrics = json.loads((results / id / "metrics.json").read_text())
            stored = np.load(results / id / "scores.npz")
            share = stored["score"].mean()  # of the linear probe: over its head seeds
            assert np.isclose(share, metrics["top1"], atol=1e-6), id


def test_an_exported_encoder_is_a_timm_model(finished):
    import timm
    import torch

    from stages.kit.nets import encoders as encoder

    _, results, _ = finished
    for run in ("mae", "beitv2"):
        folder = results / f"pretrain/{run}-s0/encoder"
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        ours = encoder.load(folder).eval()
        images = torch.rand(2, 3, 16, 16)
        with torch.inference_mode():
            assert torch.equal(plain.forward_features(images), ours.forward_features(images))


def test_the_same_parameters_give_the_same_encoder(finished, tmp_path):
    params, results, manifests = finished
    plan = load(params, tmp_path / "results")
    shutil.copytree(results / "data", tmp_path / "results/data")
    importlib.import_module("stages.pretrain").main(
        ["--run", "mae-s0", "--params", str(params), "--results", str(tmp_path / "results")]
    )
    again = plan.manifest("pretrain/mae-s0").outputs
    assert again == manifests["pretrain/mae-s0"].outputs


# ------------------------------------------------------------------------------------- real engines


def copy_of_the_project(folder: Path) -> Path:
    """The files that make up the project, without results, in `folder`."""
    for name in ("stages", "workflow", "tests", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "dvc.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_snakemake_runs_the_real_stages(tmp_path):
    """From nothing to the report through every stage's command line; a second call has nothing to
    do.
    """
    project = copy_of_the_project(tmp_path / "project")
    content = tiny_content()
    content["methods"] = {"beitv2": content["methods"]["beitv2"]}
    content["tasks"] = {"knn": content["tasks"]["knn"]}
    content["grid"]["runs"] = {"beitv2": content["grid"]["runs"]["beitv2"]}
    write_params(project, content)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "dvc=false"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=600, env=environment
    )
    assert first.returncode == 0, first.stderr[-3000:]
    plan = load(project / "params.yaml", project / "results", project)
    assert all(plan.fresh(id) for id in plan.jobs)
    before = {id: plan.jobs[id].manifest.read_bytes() for id in plan.jobs}
    second = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=300, env=environment
    )
    assert second.returncode == 0 and "othing to be done" in second.stdout + second.stderr
    assert before == {id: plan.jobs[id].manifest.read_bytes() for id in plan.jobs}
