"""workflow/cost.py: the arithmetic against numbers worked out by hand, and one real measurement."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_content, write_params

from workflow import cost
from workflow.plan import load

COUNTS = {"train": 1000, "val": 100, "test": 50, "classes": 3}
UNIT = {"counts": COUNTS, "memory_mb": 700, "threads": 1}


def test_training_counts_whole_steps_of_the_batch():
    params = {"train": {"epochs": 3, "batch_size": 64}}
    found = cost.cost("pretrain", params, {**UNIT, "step_s": 0.5, "flops_per_image": 2e6})
    # 1000 // 64 = 15 steps an epoch, 45 in all, 2880 images
    assert found == cost.Cost(2880, 2880 * 2e6, cost.START_S + 22.5, 700)


def test_finetuning_has_its_own_epochs_and_batch():
    params = {"train": {"epochs": 3, "batch_size": 64}}
    unit = {**UNIT, "step_s": 0.1, "flops_per_image": 1.0, "epochs": 2, "batch_size": 100}
    assert cost.cost("transfer", params, unit).seconds == pytest.approx(cost.START_S + 20 * 0.1)


def test_probes_count_every_image_and_the_heads_count_training_images():
    found = cost.cost("transfer", {}, {**UNIT, "image_s": 0.01, "passes": 2, "head_s": 0.001})
    assert found.images == 2000 + 150 and found.flops is None
    assert found.seconds == pytest.approx(cost.START_S + 21.5 + 1.0)


def test_data_reads_all_images_once():
    assert cost.cost("data", {}, {**UNIT, "image_s": 0.002}).seconds == pytest.approx(cost.START_S + 2.3)


def test_total_adds_what_is_known_and_counts_what_is_not():
    costs = {"a": cost.Cost(1, 5.0, 10.0, 300), "b": cost.Cost(2, None, 2.5, 900), "c": cost.Cost(missing="why")}
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

    def measured(job):
        asked.append(job.id)
        return {**UNIT, "step_s": 1.0, "flops_per_image": 1e6} if "mae" in job.id else {"missing": "not asked"}

    costs = cost.estimate(plan, "", measured=measured)
    assert list(costs) == list(plan.jobs)
    assert "pretrain/mae-s0" in asked and "pretrain/mae-s1" not in asked
    assert costs["pretrain/mae-s0"] == costs["pretrain/mae-s1"]
    took = 2 * (costs["pretrain/mae-s0"].seconds - cost.START_S)
    for seed, fingerprint in enumerate([plan.jobs["pretrain/mae-s0"].fingerprint, "of other parameters"]):
        folder = plan.jobs[f"pretrain/mae-s{seed}"].output
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"wall_s": took, "fingerprint": fingerprint}))
    text = cost.table(plan, costs)
    assert "not known: not asked" in text and "of 1 finished jobs" in text and text.endswith("ratio 0.50")


def test_students_of_different_targets_are_measured_apart(tmp_path):
    runs = {f"dmjd-{t}": {"method": "dmjd", "target": t} for t in ("hog", "pixels", "same")}
    kinds = {t: {"kind": "pixels" if t == "pixels" else "hog"} for t in ("hog", "pixels", "same")}
    content = tiny_content(methods__dmjd={}, targets=kinds)
    content["grid"]["runs"] = runs
    plan = load(write_params(tmp_path, content), tmp_path / "results")
    kinds = [cost.kind(plan.jobs[f"pretrain/{run}-s0"], plan.jobs) for run in runs]
    assert kinds[0] == kinds[2] != kinds[1]


@pytest.mark.parametrize("job", ["pretrain/beitv2-s0", "transfer/mae-s0/linear"])
def test_a_job_is_measured_before_any_data_is_there(plan, job):
    command = [sys.executable, "-m", "workflow.measure", "--job", job, "--steps", "2"]
    command += ["--params", str(plan.params_file), "--results", str(plan.results)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["counts"] == {"train": 40, "val": 10, "test": 10, "classes": 6}
    one = cost.cost(plan.jobs[job].stage, plan.jobs[job].params, found)
    assert one.seconds > cost.START_S and one.memory_mb > 100 and one.images > 0
