"""stages/cost: the arithmetic against numbers worked out by hand, and real rehearsals, untimed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_content, write_params

from stages import data, pretrain
from stages.cost import __main__ as cost_command
from stages.cost import estimate, rehearsal, table
from stages.cost.rehearsal import Clock, Cost, Rehearsal
from stages.kit.data import store
from workflow import machine, plugins
from workflow.expected import Expected, slots
from workflow.manifest import Manifest
from workflow.plan import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def plan(tmp_path):
    params = write_params(tmp_path, tiny_content(grid__seeds=[0, 1]))
    return load(params, tmp_path / "results")


@pytest.fixture
def rehearse(plan, tmp_path, monkeypatch):
    """`rehearse(id)` -> Rehearsal with few runs, after those of the jobs that it needs."""
    monkeypatch.setattr(rehearsal, "ENOUGH_S", 0.0)
    made = {id: tmp_path / "made" / id.replace("/", "-") for id in plan.jobs}
    (tmp_path / "made").mkdir()

    def one(id: str) -> Rehearsal:
        for above in plan.jobs[id].inputs.values():
            if not made[above].is_dir():
                one(above).timed(16, 1)
        folder = tmp_path / "scratch" / id
        folder.mkdir(parents=True)
        return Rehearsal(plan, plan.jobs[id], made, folder)

    return one


def known(plan, job, made) -> Cost:
    return Cost(100, 1e9 if job.stage == "pretrain" else None, 1.0, 500.0)


# -------------------------------------------------------------------------------- one job


class Formula(Rehearsal):
    """A job that takes what a formula says."""

    def __init__(self, plan, job, trained: bool, fixed=5.0, once=0.01, epoch=0.02):
        super().__init__(plan, job, {}, Path())
        self.counts = {"train": 1000, "val": 100, "test": 50}
        self.trained, self.asked = trained, []
        self.all = fixed, once, epoch

    def timed(self, images: int, epochs: int):
        self.asked.append((images, epochs))
        fixed, once, epoch = self.all
        summary = {"steps": 1, "flops_per_image": 2e6} if self.trained else {}
        return fixed + images * (once + epoch * epochs), summary


def job_of(plan, id: str, **how):
    job = plan.jobs[id]
    rehearsal.settings(job.params).update(how)
    return job


def test_a_training_is_extrapolated_to_all_images_and_epochs(plan):
    trial = Formula(plan, job_of(plan, "pretrain/mae-s0", batch_size=64, epochs=30), trained=True)
    found = trial.cost()
    seen = 1000 // 64 * 64 * 30  # whole batches
    assert found.images == seen and found.flops == seen * 2e6
    assert found.seconds == pytest.approx(5 + 10 + 0.02 * seen)
    assert trial.asked[0] == (64, 1) and max(trial.asked) < (1000, 0), "a part of it was enough"


def test_epochs_do_not_lengthen_what_trains_nothing(plan):
    trial = Formula(plan, job_of(plan, "pretrain/random-s0", epochs=30), trained=False, epoch=0)
    found = trial.cost()
    assert found.seconds == pytest.approx(5 + 10) and found.flops is None and found.images == 0
    assert {epochs for _, epochs in trial.asked} == {1}


def test_a_task_may_repeat_epochs_without_the_training_loop(plan):
    job = job_of(plan, "transfer/mae-s0/linear", batch_size=512, epochs=10)
    found = Formula(plan, job, trained=False).cost()
    assert found.images == 1150 and found.flops is None
    assert found.seconds == pytest.approx(5 + 10 + 0.02 * 512 * 10)  # one batch of 512 in 1000


def test_a_quick_rehearsal_takes_three_runs_of_a_training(plan):
    trial = Formula(plan, job_of(plan, "pretrain/mae-s0", batch_size=64, epochs=30), trained=True)
    trial.quick = True
    found, seen = trial.cost(), 1000 // 64 * 64 * 30
    assert trial.asked == [(64, 1), (64, 1), (320, 1)]
    assert found.images == seen and found.flops == seen * 2e6, "exact"
    assert found.seconds == pytest.approx(5 + 0.03 * seen), "what is done once counts every time"


def test_a_quick_rehearsal_takes_one_run_of_what_trains_nothing(plan):
    trial = Formula(plan, plan.jobs["transfer/mae-s0/knn"], trained=False, epoch=0)
    trial.quick = True
    found = trial.cost()
    assert trial.asked == [(64, 1)] and found.images == 1150
    assert found.seconds == pytest.approx((5 + 0.01 * 64) * 1000 / 64)


def test_several_processes_share_the_epochs_alone(plan):
    plan.compute["processes"] = 2
    job = job_of(plan, "pretrain/mae-s0", batch_size=50, epochs=10)
    trial = Formula(plan, job, trained=True)
    assert trial.cost().seconds == pytest.approx(5 + 10 + 0.02 * 10_000 / 2)
    assert trial.asked[0] == (25, 1), "one process's share of a batch"


def test_a_job_never_takes_less_than_its_first_run(plan):
    trial = Formula(plan, plan.jobs["transfer/mae-s0/knn"], trained=False, once=-0.001, epoch=0)
    assert trial.cost().seconds == trial.timed(64, 1)[0]


@pytest.mark.parametrize("least, most", [(1, 1), (1, 30), (64, 100), (64, 10**6), (4096, 10**6)])
def test_a_slope_comes_from_a_run_that_is_enough_longer_or_the_longest(least, most):
    asked = []

    def seconds(units: int) -> float:
        asked.append(units)
        return 3 + 0.01 * units

    first = 3 + 0.01 * least
    found = rehearsal.slope(seconds, first, least, most)
    if most == least:
        assert found == 0 and not asked
        return
    assert found == pytest.approx(0.01)
    longest = min(most, rehearsal.MOST * least)
    assert asked == sorted(set(asked)) and asked[-1] <= longest
    assert asked[-1] == longest or seconds(asked[-1]) - first >= 1 + first / 4


def test_other_load_does_not_lengthen_what_is_measured(monkeypatch):
    # 9 s pass while this thread works for 3 s, and it and the loader for 8 s on two cores
    for own, expected in ((3.0, 4.0), (5.0, 5.0)):  # what one thread does cannot be shared
        cpu = Clock("cpu", threads=2)
        monkeypatch.setattr(cpu, "now", lambda own=own: (9.0, own, 8.0))
        assert cpu.since((0.0, 0.0, 0.0)) == expected
    gpu = Clock("cuda", threads=2)
    monkeypatch.setattr(gpu, "now", lambda: (9.0, 3.0, 8.0))
    assert gpu.since((0.0, 0.0, 0.0)) == 9.0


# -------------------------------------------------------------------------------- the real stages


def test_the_source_is_counted_and_a_few_of_its_images_are_stored(rehearse):
    trial = rehearse("data/main")
    assert trial.counts == {"train": 48, "val": 16, "test": 16}
    trial.timed(12, 1)
    made = trial.made["data/main"]
    assert store.info(made)["splits"]["train"]["count"] == 48, "what the whole one will have"
    assert [len(store.Split.open(made, s)) for s in ("train", "val", "test")] == [12, 8, 8]


@pytest.mark.parametrize(
    "id, trained",
    [
        ("target/teacher", True),
        ("target/vqkd", True),
        ("pretrain/beitv2-s0", True),
        ("pretrain/random-s0", False),
        ("transfer/mae-s0/knn", False),
        ("transfer/mae-s0/linear", False),
        ("transfer/mae-s0/finetune", True),
    ],
)
def test_every_stage_is_rehearsed_before_any_data_is_there(plan, rehearse, id, trained):
    trial = rehearse(id)
    found = trial.cost()
    assert found.seconds > 0 and (found.flops is not None) == trained
    assert bool(found.images) == (id != "pretrain/random-s0")
    assert not plan.results.exists() and not (plan.results.parent / "work").exists()
    assert not any(path.name == "results" for path in trial.folder.rglob("*")), "all is deleted"


def test_finished_inputs_do_where_no_rehearsal_has_made_them(plan, rehearse):
    trial = rehearse("pretrain/mae-s0")
    made, job = trial.made["data/main"], plan.jobs["data/main"]
    job.output.parent.mkdir(parents=True)
    made.rename(job.output)
    with pytest.raises(
        rehearsal.NotKnown, match=re.escape("it needs data/main, which is not known")
    ):
        trial.output("data/main")
    job.manifest.write_text(Manifest(fingerprint=job.fingerprint).text())
    assert trial.output("data/main") == job.output
    assert trial.timed(16, 1)[1]["steps"] == 1


@pytest.mark.parametrize("gigabytes", [1, 0])
def test_a_set_is_repeated_with_all_that_belongs_to_its_images(tmp_path, gigabytes):
    content = tiny_content(data__memory_map_gb=gigabytes)
    job = load(write_params(tmp_path, content), tmp_path / "results").jobs["data/main"]
    few, sizes = tmp_path / "few", {"train": 5, "val": 2, "test": 2}
    data.build(job.params["data"], job.params["source"], few, tmp_path, 1, limits=sizes)
    more = rehearsal.repeated(few, tmp_path / "more", {"train": 12, "val": 2, "test": 3})
    one, other = store.Split.open(few, "train"), store.Split.open(more, "train")
    assert (len(one), len(other), other.mode) == (5, 12, "memmap" if gigabytes else "shards")
    for row in range(12):
        for what in ("decode", "mask", "boxes"):
            a, b = getattr(one, what)(row % 5), getattr(other, what)(row)
            assert np.array_equal(a, b), what
        assert one.labels[row % 5] == other.labels[row]
    assert torch.equal(one.square([4], 16), other.square([9], 16))


# -------------------------------------------------------------------------------- a whole plan


def test_seeds_share_a_rehearsal_and_finished_jobs_are_compared(plan):
    asked = []

    def rehearsed(plan, job, made):
        asked.append(job.id)
        return known(plan, job, made) if "mae" in job.id else Cost(missing="not asked")

    costs = estimate.estimate(plan, rehearsed)
    assert list(costs) == list(plan.jobs)
    assert "pretrain/mae-s0" in asked and "pretrain/mae-s1" not in asked
    assert costs["pretrain/mae-s0"] is costs["pretrain/mae-s1"]
    assert costs["report"].seconds > 0
    for seed, fingerprint in enumerate([plan.jobs["pretrain/mae-s0"].fingerprint, "another"]):
        job = plan.jobs[f"pretrain/mae-s{seed}"]
        job.output.mkdir(parents=True)
        took = 2 * costs[job.id].seconds
        job.manifest.write_text(Manifest(fingerprint=fingerprint, wall_s=took).text())
    text = table.text(plan, costs)
    assert "not known: not asked" in text and "of 1 finished jobs" in text
    assert text.endswith("ratio 0.50")


def test_students_of_different_targets_are_rehearsed_apart(tmp_path):
    runs = {f"dmjd-{t}": {"method": "dmjd", "target": t} for t in ("hog", "pixels", "same")}
    targets = {t: {"kind": "pixels" if t == "pixels" else "hog"} for t in ("hog", "pixels", "same")}
    content = tiny_content(methods__dmjd={}, targets=targets)
    content["grid"]["runs"] = runs
    asked = []

    def rehearsed(plan, job, made):
        asked.append(job.id)
        return known(plan, job, made)

    estimate.estimate(load(write_params(tmp_path, content), tmp_path / "results"), rehearsed)
    assert [id for id in asked if id.startswith("pretrain/")] == [
        "pretrain/dmjd-hog-s0",
        "pretrain/dmjd-pixels-s0",
    ]


def test_tasks_of_encoders_that_are_built_alike_share_a_rehearsal(plan):
    asked = []

    def rehearsed(plan, job, made):
        asked.append(job.id)
        if job.stage == "pretrain":
            folder = made[job.id] / "encoder"
            folder.mkdir(parents=True)
            family = "beit" if "beitv2" in job.id else "vit"
            (folder / "config.json").write_text(json.dumps({"architecture": family}))
        return known(plan, job, made)

    estimate.estimate(plan, rehearsed)
    expected = {f"transfer/{r}-s0/{t}" for r in ("mae", "beitv2") for t in plan.params.tasks}
    assert {id for id in asked if id.startswith("transfer")} == expected


def test_quickly_encoders_from_one_model_share_and_finished_jobs_are_not_rehearsed(plan):
    asked = []
    done = plan.jobs["data/main"]
    done.output.mkdir(parents=True)
    done.manifest.write_text(Manifest(fingerprint=done.fingerprint, wall_s=7.0).text())

    def rehearsed(plan, job, made):
        asked.append(job.id)
        if job.stage == "pretrain":
            folder = made[job.id] / "encoder"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"built": job.id}))
        return known(plan, job, made)

    costs = estimate.estimate(plan, rehearsed, quick=True)
    assert "data/main" not in asked and costs["data/main"].seconds == 7.0
    tasks = {id for id in asked if id.startswith("transfer")}
    assert tasks == {f"transfer/mae-s0/{task}" for task in plan.params.tasks}
    assert {"pretrain/mae-s0", "pretrain/beitv2-s0", "target/vqkd"} <= set(asked)


def test_a_quick_estimate_of_the_real_stages_is_what_the_view_reads(tmp_path, capsys):
    content = tiny_content()
    content["tasks"] = {"knn": {"k": [3]}}
    content["targets"] = {}
    content["grid"]["runs"] = {"mae": {"method": "mae"}}
    params, file = write_params(tmp_path, content), tmp_path / "work/expected.json"
    plan = load(params, tmp_path / "results")
    where = ["--params", str(params), "--results", str(tmp_path / "results")]
    assert cost_command.main([*where, "--quick", "--json", str(file)]) == 0
    assert "pretrain/mae-s0" in capsys.readouterr().out
    found = Expected.read(file, plan)
    assert set(found.jobs) == set(plan.jobs)
    assert all(found.seconds(id) > found.start_s >= 0 for id in plan.jobs)
    steps = 48 // 16 * 16
    written = json.loads(file.read_text())["jobs"]["pretrain/mae-s0"]
    assert found.flops("pretrain/mae-s0") == written["flops"] > 0 and written["images"] == steps


@pytest.mark.parametrize("quick", [False, True])
def test_images_and_flops_of_growing_steps_are_those_of_the_real_training(
    tmp_path, monkeypatch, quick
):
    monkeypatch.setattr(rehearsal, "ENOUGH_S", 0.0)
    content = tiny_content(train={"epochs": 5, "batch_size": 8})
    content["data"]["options"]["train"] = 16  # two steps an epoch: ten in all
    content["targets"], content["tasks"] = {}, {"knn": {"k": [3]}}
    content["methods"] = {"fastmimp": {"cell": 4, "predict": "pixels"}}
    content["grid"]["runs"] = {"grows": {"method": "fastmimp"}}
    params, results = write_params(tmp_path, content), tmp_path / "results"
    costs = estimate.estimate(load(params, results), quick=quick)
    where = ["--params", str(params), "--results", str(results)]
    data.main(where)
    pretrain.main(["--run", "grows-s0", *where])
    summary = load(params, results).manifest("pretrain/grows-s0").summary
    found = costs["pretrain/grows-s0"]
    assert found.images == summary["images_seen"] == (5 * 4 + 3 * 2 + 2 * 1) * 8
    real = summary["images_seen"] * summary["flops_per_image"]
    assert found.flops == pytest.approx(real, rel=1e-9) and found.seconds > 0


def test_later_stages_of_a_chain_share_a_rehearsal(tmp_path):
    content = tiny_content(methods__dbot={})
    content["grid"]["runs"] = {"dbot": {"method": "dbot", "target": "run:random", "stages": 3}}
    content["grid"]["runs"]["random"] = {"method": "random"}
    asked = []

    def rehearsed(plan, job, made):
        asked.append(job.id)
        if job.stage == "pretrain":
            (made[job.id] / "encoder").mkdir(parents=True)
            (made[job.id] / "encoder/config.json").write_text("{}")
        return known(plan, job, made)

    estimate.estimate(load(write_params(tmp_path, content), tmp_path / "results"), rehearsed)
    learners = [id for id in asked if id.startswith("pretrain/dbot")]
    assert learners == ["pretrain/dbot-1-s0"], "all learn from an encoder that is built alike"


def test_a_job_that_fails_leaves_a_reason_and_so_do_those_that_need_it(plan, monkeypatch):
    def broken(run):
        raise ValueError("no such thing\nand more")

    monkeypatch.setitem(rehearsal.WORK, "pretrain", broken)
    monkeypatch.setitem(rehearsal.WORK, "target", lambda run: os._exit(3))
    monkeypatch.setattr(rehearsal, "ENOUGH_S", 0.0)
    costs = estimate.estimate(plan)
    assert costs["data/main"].memory_mb > 100 and not costs["data/main"].missing
    assert costs["target/teacher"].missing == "its rehearsal ended with status 3"
    assert costs["target/vqkd"].missing == "it needs target/teacher, which is not known"
    assert costs["pretrain/mae-s0"].missing == "ValueError: no such thing"
    assert costs["transfer/mae-s1/knn"].missing == "it needs pretrain/mae-s0, which is not known"
    # all but the data and the report
    assert f"without {len(plan.jobs) - 2} job(s)" in table.text(plan, costs)


def test_what_must_be_fetched_is_not_known(tmp_path):
    content = tiny_content()
    content["data"] = {"source": "hub:nobody/nothing", "image_size": 16}
    plan = load(write_params(tmp_path, content), tmp_path / "results")
    found = estimate.in_a_fork(plan, plan.jobs["data/main"], {"data/main": tmp_path / "made"})
    assert "`python -m stages.data --name main` fetches them" in found.missing


def test_no_plug_in_is_named():
    text = "".join(path.read_text() for path in (ROOT / "stages/cost").glob("*.py"))
    for kind in plugins.FOLDERS:
        for name in plugins.names(kind):
            assert not re.search(rf"[\"']{name}[\"']", text), f"{kind} {name}"


# -------------------------------------------------------------------------------- together


def test_total_adds_what_is_known_and_counts_what_is_not():
    costs = {"a": Cost(1, 5.0, 10.0, 300), "b": Cost(2, None, 2.5, 900), "c": Cost(missing="why")}
    assert table.total(costs) == (pytest.approx(12.5 + 2 * table.START_S), 5.0, 900, 1)


def test_threads_and_slots_are_those_of_snakemake(plan, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "gpus_here", lambda: 0)
    plan.compute.update(threads=None, device="auto", processes=1)
    assert Rehearsal(plan, plan.jobs["pretrain/mae-s0"], {}, Path()).clock.threads == 2
    assert Rehearsal(plan, plan.jobs["data/main"], {}, Path()).clock.threads == 8
    assert slots(plan) == 4
    monkeypatch.setattr(machine, "gpus_here", lambda: 6)
    plan.compute["processes"] = 2
    assert slots(plan) == 3


def test_the_schedule_waits_for_inputs_and_fills_all_places(plan, monkeypatch):
    monkeypatch.setattr(table, "START_S", 0.25)
    costs = {id: Cost(seconds=0.75) for id in plan.jobs}
    assert table.schedule(plan, costs, 1) == len(plan.jobs)
    chain = "data/main target/teacher target/vqkd pretrain/beitv2-s0 transfer/beitv2-s0/knn report"
    assert table.schedule(plan, costs, 1000) == len(chain.split())
    costs["target/vqkd"] = Cost(missing="takes no time here")
    assert table.schedule(plan, costs, 1000) == len(chain.split()) - 1
