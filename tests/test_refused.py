"""A data set on which a task would fail fails its own job, and its images are read only once."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pytest
from conftest import tiny_content, write_params
from PIL import Image

from stages import data
from workflow.files import JobError
from workflow.plan import kept, load
from workflow.plan.explain import explain
from workflow.plan.leftovers import leftovers
from workflow.plugins import ParamsError


def images(folder, count: int, offset: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(offset, offset + count):
        pixels = np.random.default_rng(n).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")


class Lab:
    """Unlabelled photos, and a plan with a task."""

    def __init__(self, folder, task: str):
        self.folder = folder
        images(folder / "photos", 20)
        self.task = task
        self.write()

    def write(self, wanted: bool = True) -> None:
        source = {"source": f"folder:{self.folder / 'photos'}", "image_size": 16}
        content = tiny_content() | {"data": source, "tasks": {self.task: {}}}
        task = {} if wanted else {"tasks": {self.task: None}}
        content["grid"]["runs"] = {"mae": {"method": "mae"} | task}
        self.params = write_params(self.folder, content)

    def read(self) -> int:
        results = str(self.folder / "results")
        return data.main(["--params", str(self.params), "--results", results])

    def plan(self):
        return load(self.params, self.folder / "results")


@pytest.fixture
def unread(monkeypatch):
    """From then on no image may be decoded."""

    def refuse():
        def fail(*_):
            raise AssertionError("an image was read again")

        monkeypatch.setattr(data, "prepare", fail)

    return refuse


@pytest.mark.parametrize("task", ["knn", "finetune"])
def test_it_is_said_after_the_images_were_read_and_they_are_read_once(
    tmp_path, capsys, unread, task
):
    lab, need = Lab(tmp_path, task), "labels"
    with pytest.raises(JobError) as error:
        lab.read()
    said = str(error.value)
    assert "data/main: folder:photos was read (" in said and "0 of them labelled" in said
    assert f"  - tasks.{task} needs {need}; data set 'main' has none: name another" in said
    assert f"once {lab.params} asks for what they have" in said
    output = tmp_path / "results/data/main"
    assert not (output / "manifest.json").exists()

    with pytest.raises(ParamsError, match=f"tasks.{task} needs {need}; data set 'main' has none"):
        lab.plan()  # at once, before anything runs

    unread()
    lab.write(wanted=False)
    plan = lab.plan()
    assert not plan.fresh("data/main") and leftovers(plan) == []
    assert "would take over what it made before" in explain(plan, "data/main")
    shutil.rmtree(output)  # as DVC does
    kept.set_aside(plan)
    assert lab.read() == 0 and "taken over" in capsys.readouterr().out
    assert plan.fresh("data/main") and not kept.place(plan.jobs["data/main"], plan).exists()
    with pytest.raises(AssertionError, match="read again"):  # a person who asks for it gets it
        lab.read()


def test_other_images_are_read_and_what_was_refused_goes(tmp_path):
    lab = Lab(tmp_path, "knn")
    with pytest.raises(JobError):
        lab.read()
    shutil.rmtree(tmp_path / "photos")
    for label in "ab":
        images(tmp_path / "photos" / label, 12, ord(label) * 100)
    plan = lab.plan()
    place = kept.place(plan.jobs["data/main"], plan)
    assert place.exists()
    kept.set_aside(plan)
    assert not place.exists()
    assert lab.read() == 0 and plan.fresh("data/main")


def test_what_was_tampered_with_is_read_again(tmp_path, unread):
    lab = Lab(tmp_path, "knn")
    with pytest.raises(JobError):
        lab.read()
    lab.write(wanted=False)
    plan = lab.plan()
    path = kept.place(plan.jobs["data/main"], plan) / "train/images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert lab.read() == 0 and plan.fresh("data/main")
    assert (tmp_path / "results/data/main/train/images.npy").read_bytes() != bytes(content)


def test_a_data_set_on_another_disk_is_set_aside_as_well(tmp_path, monkeypatch):
    rename = os.rename

    def cross(source, to, **_):
        if "/.kept/" in str(to):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, to)

    monkeypatch.setattr(os, "rename", cross)
    monkeypatch.setattr(os, "link", cross)
    lab = Lab(tmp_path, "knn")
    with pytest.raises(JobError, match="tasks.knn needs labels"):
        lab.read()
    lab.write(wanted=False)
    assert lab.read() == 0 and lab.plan().manifest("data/main").outputs
