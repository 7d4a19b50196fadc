"""What the plan says of trainings that are too short, before they run: workflow/plan/doubts.py."""

from __future__ import annotations

import json

import pytest

from stages import data as stage
from tests.conftest import tiny_content, write_params
from tests.plans import finish
from workflow import checks, plugins
from workflow.plan import load
from workflow.plan.__main__ import main

WARNED = "targets.teacher: {} steps of 16 images for 256 prototypes"
IMAGENET = 1_281_167


def plan_of(folder, images: int | None = None, **changes):
    """A plan whose data set is made, and has so many training images, or is still to be made."""
    path = write_params(folder, tiny_content(**changes))
    plan = load(path, folder / "results")
    if images is not None:
        finish(plan, "data/main")
        facts = {"splits": {"train": {"count": images, "class_counts": [images]}}}
        for split in ("val", "test"):
            facts["splits"][split] = {"count": 9, "class_counts": [9]}
        (folder / "results/data/main/data.json").write_text(json.dumps(facts))
    return plan


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "centring, steps, batch, prototypes, few",
    [
        ("centre", 450, 32, 2048, True),  # a teacher at chance
        ("centre", 2040, 32, 1024, True),  # iBOT at 64 pixels: near uniform
        ("centre", 1512, 32, 256, True),  # hardly above the untrained encoder
        ("sinkhorn", 1512, 32, 256, False),  # the same, learns
        ("sinkhorn", 225, 32, 256, False),  # the shortest that learned
        ("sinkhorn", 225, 32, 2048, True),
        ("centre", 5610, 64, 1024, False),  # iBOT at 32 pixels: learns
        ("centre", 19_600, 512, 1024, False),  # as others report success
        ("centre", 14_800, 128, 65_536, False),
        ("centre", 5610, 64, 65_536, True),
    ],
)
def test_the_rule_fits_the_trainings_that_it_comes_from(centring, steps, batch, prototypes, few):
    config = checks.SelfDistillation(prototypes=prototypes, centring=centring)
    found = config.doubt(steps, batch)
    assert (found is not None) == few
    if few:
        assert f"{steps:,} steps of {batch} images for {prototypes:,} prototypes" in found
        assert "more epochs" in found


def test_fewer_prototypes_are_advised_where_they_help():
    many, some = (
        checks.SelfDistillation(prototypes=p, centring="centre").doubt(2000, 16)
        for p in (65_536, 1024)
    )
    assert "fewer prototypes" in many and "fewer prototypes" not in some
    assert "centring: sinkhorn" in some and "sinkhorn" not in many  # it alone would not be enough


def test_no_published_recipe_is_doubted():
    asked = 0
    for kind in ("target", "method"):
        for name in plugins.names(kind):
            plugin = plugins.declared(kind, name)
            recipe = plugin.literals["PUBLISHED"]
            own = {key: value for key, value in recipe.items() if key in plugin.fields}
            values = plugin.adapter.validate_json(json.dumps(own))
            if recipe and hasattr(values, "doubt"):
                steps = recipe["epochs"] * (IMAGENET // recipe["batch_size"])
                assert values.doubt(steps, recipe["batch_size"]) is None, name
                asked += 1
    assert asked >= 3


# --- when it is said ------------------------------------------------------------------------------


def test_a_plan_says_it_of_data_that_is_made_and_jobs_that_wait(tmp_path):
    assert plan_of(tmp_path / "unknown").doubts() == []
    plan = plan_of(tmp_path / "known", images=48)
    [text] = plan.doubts()
    assert text.startswith(WARNED.format(3))
    finish(plan, "target/teacher")
    assert plan.doubts() == []
    assert plan_of(tmp_path / "enough", images=48 * 2000).doubts() == []
    assert plan_of(tmp_path / "few", images=9).doubts() == []  # that is another error


def test_runs_are_named_once_for_all_seeds(tmp_path):
    changes = {"methods": {"dino": {}}, "grid__runs__d": {"method": "dino"}}
    plan = plan_of(tmp_path, images=48, grid__seeds=[0, 1], **changes)
    assert [text.split(":")[0] for text in plan.doubts()] == ["targets.teacher", "grid.runs.d"]


def test_the_command_warns_once(tmp_path, capsys):
    plan = plan_of(tmp_path, images=48)
    words = ["--params", str(plan.params_file), "--results", str(plan.results)]
    for more in ([], ["--check"]):  # by hand, and as the first stage of dvc.yaml
        assert main([*words, *more]) == 0
        said = capsys.readouterr()
        assert said.err.count(f"warning: {WARNED.format(3)}") == 1 and WARNED[:15] not in said.out


def test_the_stage_data_says_it_of_what_it_made(tmp_path, capfd):
    path = write_params(tmp_path, tiny_content())
    words = ["--params", str(path), "--results", str(tmp_path / "results")]
    assert stage.main(words) == 0
    said = capfd.readouterr()
    assert said.err.count(f"warning: {WARNED.format(3)}") == 1
    assert said.out.count(f"data/main: warning: {WARNED.format(3)}") == 1
