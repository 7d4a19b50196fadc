"""What the plan makes of results on disk, and what it writes for DVC."""

from __future__ import annotations

import os

import pytest

from tests.plans import MAE, editable, finish, plan_of
from workflow.engines.dvc import follow, loops, note, stage_name
from workflow.engines.snakemake import STALE, reconcile
from workflow.plan.leftovers import leftovers, prune
from workflow.plugins import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The project's stages in a folder where they can be edited."""
    return editable(tmp_path_factory.mktemp("project"))


# -------------------------------------------------------------------------------------------------
# what lies on disk


def test_fresh_means_complete_and_made_by_this_plan(tmp_path):
    plan = plan_of(tmp_path)
    assert not plan.fresh("data/main") and plan.manifest("data/main") is None
    finish(plan)
    assert all(plan.fresh(i) for i in plan.jobs)
    (plan.jobs["data/main"].output / "value").unlink()
    assert not plan.fresh("data/main")
    plan.jobs["report"].manifest.write_text("{ half")
    assert plan.manifest("report") is None and not plan.fresh("report")
    other = plan_of(tmp_path, methods__mae__mask_ratio=0.5)
    assert {i for i in other.jobs if not other.fresh(i)} == MAE | {"data/main", "report"}


def stamps(plan) -> dict[str, int]:
    return {i: j.manifest.stat().st_mtime_ns for i, j in plan.jobs.items() if j.manifest.exists()}


def test_reconcile_orders_fresh_ones_and_ages_stale_ones(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan)
    now = (ROOT / "stages/data.py").stat().st_mtime_ns
    for number, job in enumerate(
        reversed(plan.jobs.values())
    ):  # as a checkout may leave them: outputs before inputs
        for file in job.files:
            os.utime(file, ns=(now, now + number * 10**9 + 1))
    reconcile(plan)
    times = stamps(plan)
    assert all(times[i] >= times[d] for i, j in plan.jobs.items() for d in j.inputs.values())
    assert all(f.stat().st_mtime_ns >= times["data/main"] for f in plan.jobs["report"].files)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    reconcile(plan)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}, "twice is once"

    other = plan_of(tmp_path, methods__mae__mask_ratio=0.5)
    reconcile(other)
    assert {i for i, t in stamps(other).items() if t == STALE} == MAE
    reconcile(plan)
    times = stamps(plan)
    assert STALE not in times.values() and all(
        times[i] >= times[d] for i, j in plan.jobs.items() for d in j.inputs.values()
    )


def test_reconcile_leaves_contents_and_unfinished_jobs_alone(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan, "data/main", "target/teacher")
    running = plan.jobs["pretrain/mae-s0"].output
    running.mkdir(parents=True)
    (running / "history.jsonl").write_text("{}")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in running.rglob("*")}
    reconcile(plan)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in running.rglob("*")} == before


def test_leftovers_are_listed_and_pruned_only_on_request(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan)
    smaller = plan_of(tmp_path, grid={"runs": {"random": {"method": "random"}}}, tasks={"knn": {}})
    names = {str(p.relative_to(tmp_path / "results")) for p in leftovers(smaller)}
    assert {
        "target/vqkd",
        "pretrain/mae-s0",
        "transfer/mae-s0/knn",
    } <= names and "pretrain/random-s0" not in names
    reconcile(smaller)
    assert plan.jobs["pretrain/mae-s0"].manifest.exists()
    prune(smaller)
    assert (
        not plan.jobs["pretrain/mae-s0"].output.exists()
        and plan.jobs["pretrain/random-s0"].manifest.exists()
    )


# -------------------------------------------------------------------------------------------------
# what DVC follows


def test_dvc_follows_one_file_per_job(tmp_path, root):
    plan = plan_of(tmp_path, root)
    folder = tmp_path / "results/plan"
    assert follow(plan) and not follow(plan), "written only when it differs"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(
        plan.jobs
    )
    assert (folder / "pretrain/mae-s0").read_text() == plan.jobs["pretrain/mae-s0"].fingerprint
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    other = plan_of(tmp_path, root, methods__mae__mask_ratio=0.5)
    assert not follow(other), "the same jobs"
    touched = {p for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert touched == {folder / id for id in MAE}
    fewer = plan_of(tmp_path, root, tasks={"knn": {}}, grid={"runs": {"mae": {"method": "mae"}}})
    assert follow(fewer) and not (folder / "target").is_file()
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(
        fewer.jobs
    )


def test_a_job_that_was_overtaken_by_an_edit_is_recorded_as_what_it_is(tmp_path, root):
    old, new = plan_of(tmp_path, root), plan_of(tmp_path / "b", root, methods__mae__mask_ratio=0.5)
    job = old.jobs["pretrain/mae-s0"]
    note(job, old)
    assert not (old.results / "plan").exists(), "nobody asked for DVC"
    follow(old)
    (old.results / "plan/pretrain/mae-s0").write_text(new.jobs["pretrain/mae-s0"].fingerprint)
    note(job, old)
    assert (old.results / "plan/pretrain/mae-s0").read_text() == job.fingerprint


def test_names_of_stages_for_dvc(tmp_path):
    plan = plan_of(tmp_path)
    names = {id: stage_name(job) for id, job in plan.jobs.items()}
    assert names["data/main"] == "data@main" and names["report"] == "report"
    assert names["transfer/mae-s0/knn"] == "transfer@mae-s0/knn"
    listed = loops(plan)["plan"]
    assert listed["plan"] and not listed["watch"]
    assert listed["transfer"]["mae-s0/knn"] == {
        "run": "mae-s0",
        "task": "knn",
        "data": "data/main",
        "above": "pretrain/mae-s0",
    }
