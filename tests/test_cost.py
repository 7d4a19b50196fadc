"""workflow/cost.py: the arithmetic against numbers worked out by hand, and one real measurement."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_content, write_params

from workflow import cost, ledger, measure
from workflow.plan import load

COUNTS = {"train": 1000, "val": 100, "test": 50, "classes": 3}
UNIT = {"counts": COUNTS, "memory_mb": 700, "threads": 1}


def test_training_counts_whole_steps_of_the_batch():
    params = {"train": {"epochs": 3, "batch_size": 64}}
    found = cost.cost("pretrain", params, {**UNIT, "step_s": 0.5, "flops_per_image": 2e6})
    # 1000 // 64 = 15 steps an epoch, 45 in all, 2880 images
    assert found == cost.Cost(2880, 2880 * 2e6, cost.START_S + 22.5, 700)


def test_what_is_done_once_and_images_that_are_only_looked_at_are_added():
    unit = {**UNIT, "step_s": 0.5, "flops_per_image": 1.0, "once_s": 7.0, "image_s": 0.01}
    train = {"train": {"epochs": 3, "batch_size": 64}}
    seconds = {
        stage: cost.cost(stage, train, unit).seconds - cost.START_S
        for stage in ("pretrain", "target", "transfer")
    }
    # 45 steps; a target is examined on the 100 validation images, a classifier on the 50 test
    # images too
    assert seconds == pytest.approx({"pretrain": 29.5, "target": 30.5, "transfer": 31.0})
    bare = {**UNIT, "counts": {**COUNTS, "val": 0}, "image_s": 0.01}
    assert cost.cost("target", train, bare).seconds == pytest.approx(cost.START_S + 10), (
        "without val it is train"
    )


def test_finetuning_has_its_own_epochs_and_batch():
    params = {"train": {"epochs": 3, "batch_size": 64}}
    unit = {**UNIT, "step_s": 0.1, "flops_per_image": 1.0, "epochs": 2, "batch_size": 100}
    assert cost.cost("transfer", params, unit).seconds == pytest.approx(cost.START_S + 20 * 0.1)


def test_probes_count_every_image_and_the_heads_count_training_images():
    found = cost.cost("transfer", {}, {**UNIT, "image_s": 0.01, "passes": 2, "head_s": 0.001})
    assert found.images == 2000 + 150 and found.flops is None
    assert found.seconds == pytest.approx(cost.START_S + 21.5 + 1.0)


def test_features_that_another_task_has_made_are_not_made_again():
    unit = {**UNIT, "image_s": 0.01, "passes": 1, "head_s": 0.001}
    assert cost.cost("transfer", {}, unit, cached=True).seconds == pytest.approx(cost.START_S + 1.0)
    crops = cost.cost("transfer", {}, {**unit, "passes": 3}, cached=True)
    assert crops.images == 3000, "random crops of the training images are this task's own"


def test_data_reads_all_images_once():
    assert cost.cost("data", {}, {**UNIT, "image_s": 0.002}).seconds == pytest.approx(
        cost.START_S + 2.3
    )


def test_total_adds_what_is_known_and_counts_what_is_not():
    costs = {
        "a": cost.Cost(1, 5.0, 10.0, 300),
        "b": cost.Cost(2, None, 2.5, 900),
        "c": cost.Cost(missing="why"),
    }
    assert cost.total(costs) == (12.5, 5.0, 900, 1)
    assert cost.clock(3725.4) == "1:02:05"


@pytest.fixture
def plan(tmp_path):
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["data"]["options"].update(train=40, val=10, test=10)
    content["model"].update(embed_dim=32, depth=2, num_heads=2)
    content["grid"]["seeds"] = [0, 1]
    content["compute"] = {"threads": 1, "tracking": False}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content))
    return load(str(file), str(tmp_path / "results"))


def test_seeds_share_a_measurement_and_finished_jobs_are_compared(plan):
    asked = []

    def measured(job, counts):
        asked.append(job.id)
        return (
            {**UNIT, "step_s": 1.0, "flops_per_image": 1e6}
            if "mae" in job.id
            else {"missing": "not asked"}
        )

    costs = cost.estimate(plan, measured)
    assert list(costs) == list(plan.jobs)
    assert "pretrain/mae-s0" in asked and "pretrain/mae-s1" not in asked
    assert costs["pretrain/mae-s0"] == costs["pretrain/mae-s1"]
    took = 2 * (costs["pretrain/mae-s0"].seconds - cost.START_S)
    for seed, fingerprint in enumerate(
        [plan.jobs["pretrain/mae-s0"].fingerprint, "of other parameters"]
    ):
        folder = plan.jobs[f"pretrain/mae-s{seed}"].output
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(
            json.dumps({"wall_s": took, "summary": {}, "fingerprint": fingerprint})
        )
    text = cost.table(plan, costs)
    assert (
        "not known: not asked" in text
        and "of 1 finished jobs" in text
        and text.endswith("ratio 0.50")
    )


def test_students_of_different_targets_are_measured_apart(tmp_path):
    runs = {f"dmjd-{t}": {"method": "dmjd", "target": t} for t in ("hog", "pixels", "same")}
    kinds = {t: {"kind": "pixels" if t == "pixels" else "hog"} for t in ("hog", "pixels", "same")}
    content = tiny_content(methods__dmjd={}, targets=kinds)
    content["grid"]["runs"] = runs
    plan = load(write_params(tmp_path, content), tmp_path / "results")
    kinds = [cost.kind(plan.jobs[f"pretrain/{run}-s0"], plan.jobs) for run in runs]
    assert kinds[0] == kinds[2] != kinds[1]


def test_tasks_of_encoders_that_are_built_alike_share_a_measurement(plan):
    asked = []

    def measured(job, counts):
        asked.append(job.id)
        assert counts == (None if job.stage == "data" else COUNTS), "asked for once"
        found = {**UNIT, "image_s": 0.01, "passes": 1}
        if job.stage == "pretrain":
            found["encoder"] = "beit" if "beitv2" in job.id else "vit"
        return found | ({"features": "fp32"} if job.id.endswith(("knn", "linear")) else {})

    costs = cost.estimate(plan, measured)
    runs, tasks = ("mae", "beitv2"), ("knn", "linear", "finetune")
    assert {id for id in asked if id.startswith("transfer")} == {
        f"transfer/{r}-s0/{t}" for r in runs for t in tasks
    }
    for run in (
        "mae-s0",
        "mae-s1",
        "random-s0",
        "beitv2-s1",
    ):  # each encoder's features are made once
        assert [costs[f"transfer/{run}/{task}"].images for task in ("knn", "linear")] == [1150, 0]


def test_the_digest_of_an_encoder_tells_kinds_apart(plan):
    counts = {**COUNTS, "mode": "memmap"}
    digest = {
        run: forked(plan, f"pretrain/{run}-s0", counts)["encoder"]
        for run in ("random", "supervised", "beitv2")
    }
    assert digest["random"] == digest["supervised"] != digest["beitv2"]


def forked(plan, id: str, counts: dict | None = None) -> dict:
    return cost._measurements(plan)(plan.jobs[id], counts)


@pytest.mark.parametrize(
    "id",
    ["target/teacher", "pretrain/beitv2-s0", "transfer/mae-s0/linear", "transfer/mae-s0/finetune"],
)
def test_a_job_is_measured_before_any_data_is_there(plan, id):
    found = forked(plan, id)
    assert found["counts"] == {"train": 40, "val": 10, "test": 10, "classes": 6, "mode": "memmap"}
    one = cost.cost(plan.jobs[id].stage, plan.jobs[id].params, found)
    assert one.seconds > cost.START_S and one.memory_mb > 100 and one.images > 0


def test_a_process_that_is_killed_leaves_a_reason(plan, monkeypatch):
    monkeypatch.setattr(measure, "measured", lambda *_: os._exit(3))
    assert "ended with status 3" in forked(plan, "pretrain/mae-s0")["missing"]


def test_images_of_shards_are_decoded():
    split = measure.Noise(10, 8, {**COUNTS, "mode": "shards"})
    assert (
        split.images is None
        and split.decode(3).shape == (8, 8, 3)
        and split.labels.tolist()[:4] == [0, 1, 2, 0]
    )
    assert torch.equal(
        *(measure.Noise(10, 8, {**COUNTS, "mode": "memmap"}).square([n], 8) for n in (3, 3))
    )


def test_other_load_does_not_lengthen_what_is_measured():
    cpu = measure.Clocks(torch.device("cpu"), threads=2)
    # 9 s passed while this thread worked for 3 s, and it and the loader for 8 s on two cores
    assert cpu.alone(torch.tensor([9.0, 3.0, 8.0])) == 4.0
    assert cpu.alone(torch.tensor([9.0, 5.0, 8.0])) == 5.0, "one cannot be shared"
    assert (
        measure.Clocks(torch.device("cuda"), threads=2).alone(torch.tensor([9.0, 3.0, 8.0])) == 9.0
    )


def test_threads_are_those_of_snakemake(monkeypatch):
    monkeypatch.setattr(ledger, "gpus_here", lambda: 0)
    assert [ledger.threads(None, cores) for cores in (1, 2, 8, 64)] == [1, 1, 2, 16]
    assert ledger.threads(3, 64) == 3
    monkeypatch.setattr(ledger, "gpus_here", lambda: 8)
    assert ledger.threads(None, 64) == 8


def test_the_schedule_waits_for_inputs_and_fills_all_places(plan):
    costs = {id: cost.Cost(seconds=1.0) for id in plan.jobs}
    assert cost.schedule(plan, costs, 1) == len(plan.jobs)
    chain = [
        "data",
        "target/teacher",
        "target/vqkd",
        "pretrain/beitv2-s0",
        "transfer/beitv2-s0/knn",
        "report",
    ]
    assert cost.schedule(plan, costs, 1000) == len(chain)
    costs["target/vqkd"] = cost.Cost(missing="takes no time here")
    assert cost.schedule(plan, costs, 1000) == len(chain) - 1
