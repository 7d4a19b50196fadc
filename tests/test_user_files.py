"""Files of the user's own that params.yaml names: no source and no target is known by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import tiny_content, write_params
from tests.plans import changed, editable, finish, plan_of
from workflow.engines.dvc import loops
from workflow.plan import load
from workflow.plan.explain import explain
from workflow.plugins import ParamsError


def source_plan(tmp_path: Path, images: str = "images"):
    content = tiny_content()
    content["data"] = {"source": f"folder:{tmp_path / images}", "image_size": 16}
    return load(write_params(tmp_path, content), tmp_path / "results")


def test_a_missing_source_is_told_with_what_is_near(tmp_path):
    (tmp_path / "image").mkdir()
    with pytest.raises(ParamsError, match="images does not exist; did you mean 'image'\\?$"):
        source_plan(tmp_path)
    with pytest.raises(
        ParamsError, match=f"images does not exist .{tmp_path / 'gone'} is no folder.$"
    ):
        source_plan(tmp_path, "gone/deeper/images")


def test_the_files_of_a_source_are_part_of_the_fingerprint(tmp_path):
    with pytest.raises(ParamsError, match="data.source: .*images does not exist"):
        source_plan(tmp_path)
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").write_bytes(b"1")
    first = source_plan(tmp_path)
    assert not changed(first, source_plan(tmp_path))
    (tmp_path / "images/a/2.png").write_bytes(b"2")
    second = source_plan(tmp_path)
    assert changed(first, second) == set(first.jobs)
    finish(second)
    (tmp_path / "images/a/2.png").write_bytes(b"22")
    assert f"what folder:{tmp_path / 'images'} holds changed" in explain(
        source_plan(tmp_path), "data/main"
    )
    shutil.rmtree(tmp_path / "images")
    with pytest.warns(UserWarning, match="is not there"):
        assert not changed(second, source_plan(tmp_path)), (
            "pulled results stay usable without their source"
        )


def test_weights_in_a_folder_are_part_of_the_fingerprint(tmp_path):
    folder = tmp_path / "weights"
    targets = {"weights": {"kind": "pretrained", "weights": f"local:{folder}"}}
    runs = {"mae": {"method": "mae"}, "dbot": {"method": "dbot", "target": "weights"}}

    def plan():
        content = tiny_content(methods__dbot={}, targets=targets)
        content["grid"]["runs"] = runs
        return load(write_params(tmp_path, content), tmp_path / "results")

    with pytest.raises(ParamsError, match="targets.weights.weights: .*weights does not exist"):
        plan()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"one")
    first = plan()
    assert not changed(first, plan())
    finish(first)
    (folder / "model.safetensors").write_bytes(b"two")  # of the same size
    second = plan()
    assert {i for i in changed(first, second) if "mae" not in i} == changed(first, second)
    assert {"target/weights", "pretrain/dbot-s0", "report"} < changed(first, second)
    assert "what targets.weights.weights names changed" in explain(second, "target/weights")
    assert loops(second)["plan"]["watch"], "so that DVC looks every time"
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="is not there"):
        assert not changed(first, plan()), (
            "a finished target stays usable without the weights that it was made from"
        )


SOURCE = """
from dataclasses import dataclass

ARGUMENT = "PATH"
PATHS = ("labels", "masks")


@dataclass(frozen=True)
class Config:
    labels: str | None = None
    masks: str | None = None


def use(config):
    return config.labels, config.masks
"""
TARGET = """
from dataclasses import dataclass

PRODUCES = {"patch"}
PATHS = ("table",)


@dataclass(frozen=True)
class Config:
    weights: str = "timm:x"
    table: str | None = None


def use(config):
    return config.weights, config.table
"""


def test_a_source_says_itself_which_files_it_reads(tmp_path):
    root = editable(tmp_path)
    (root / "stages/sources/toy.py").write_text(SOURCE)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"1")
    (tmp_path / "labels.csv").write_text("1,cat")
    options = {"labels": str(tmp_path / "labels.csv"), "masks": str(tmp_path / "masks")}
    data = {"source": f"toy:{tmp_path / 'images'}", "image_size": 16, "options": options}

    def plan():
        return load(write_params(tmp_path, tiny_content() | {"data": data}), tmp_path / "r", root)

    first = plan()
    state = first.jobs["data/main"].params["source_state"]
    assert set(state) == {"argument", "labels", "masks"} and loops(first)["plan"]["watch"]
    finish(first)
    (tmp_path / "labels.csv").write_text("1,dog")  # of the same size
    (tmp_path / "masks/2.png").write_bytes(b"2")
    second = plan()
    assert changed(first, second) == set(first.jobs)
    assert explain(second, "data/main") == (
        "data/main would run because what data.options.labels names changed; what "
        "data.options.masks names changed."
    )
    (tmp_path / "labels.csv").unlink()
    with pytest.warns(UserWarning, match="data.options.labels: .* is not there"):
        assert not changed(first, plan()), "what was made from it stays in use"
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(ParamsError, match="data.options.labels: .*labels.csv does not exist"):
        plan()


def test_settings_of_a_target_may_name_files_in_two_ways(tmp_path):
    root = editable(tmp_path)
    (root / "stages/targets/toy.py").write_text(TARGET)
    for name in ("weights.bin", "table.csv"):
        (tmp_path / name).write_bytes(b"one")
    targets = {
        "toy": {"weights": f"file:{tmp_path / 'weights.bin'}", "table": str(tmp_path / "table.csv")}
    }
    runs = {"dbot": {"method": "dbot", "target": "toy"}}

    def plan():
        changes = {"methods__dbot": {}, "targets": targets, "grid__runs": runs}
        return plan_of(tmp_path, root, **changes)

    first = plan()
    assert set(first.jobs["target/toy"].params["target"]["files"]) == {"weights", "table"}
    (tmp_path / "table.csv").write_bytes(b"two")
    finish(first)
    second = plan()
    assert changed(first, second) >= {"target/toy", "pretrain/dbot-s0", "report"}
    assert "because what targets.toy.table names changed." in explain(second, "target/toy")
    targets["toy"]["weights"] = "timm:x"
    assert set(plan().jobs["target/toy"].params["target"]["files"]) == {"table"}
