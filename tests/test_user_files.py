"""Files of the user's own that params.yaml names: no source and no target is known by its name."""

from __future__ import annotations

import json
import os
import shutil
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import tiny_content, write_params
from tests.plans import changed, editable, finish, plan_of
from workflow.engines.dvc import loops
from workflow.files import sha256
from workflow.plan import listing, load
from workflow.plan.explain import explain
from workflow.plugins import ParamsError


def source_plan(tmp_path: Path, images: str = "images", **more):
    content = tiny_content()
    content["data"] = {"source": f"folder:{tmp_path / images}", "image_size": 16} | more
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


def tensors(content: bytes, header: dict | None = None) -> bytes:
    """A safetensors file of one tensor."""
    about = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    text = json.dumps({"x": about} if header is None else header).encode()
    return len(text).to_bytes(8, "little") + text + content


GOOD = b'{"architecture": "x", "pretrained_cfg": {}}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
NO_WEIGHTS = {  # None: there is no such file; config.json is good unless it is given
    "nothing": ({"config.json": None}, "found nothing; expected config.json and model.safetensors"),
    "a pickle beside": (
        {"config.json": GOOD, "pytorch_model.bin": b"x"},
        "found config.json and pytorch_model.bin; expected config.json and model.safetensors",
    ),
    "no config": (
        {"config.json": None, "model.safetensors": tensors(b"x")},
        "found model.safetensors; expected",
    ),
    "no JSON": ({"config.json": b"{"}, "config.json: found JSON text, expected the config.json"),
    "a list": ({"config.json": b"[]"}, "config.json: found a list, expected the config.json"),
    "config pointer": ({"config.json": LFS}, "config.json: found a pointer of Git LFS"),
    "web page": ({"config.json": b" <!DOCTYPE html>"}, "config.json: found a web page"),
    "transformers": (
        {"config.json": b'{"architectures": ["ViTModel"]}'},
        "found no architecture (it is that of ViTModel in transformers), expected the config.json",
    ),
    "no statistics": ({"config.json": b'{"architecture": "x"}'}, "found no pretrained_cfg"),
    "empty": ({"model.safetensors": b""}, "model.safetensors: found an empty file"),
    "pointer": ({"model.safetensors": LFS}, "found a pointer of Git LFS, not the file itself"),
    "page": ({"model.safetensors": b"<html>" * 99}, "model.safetensors: found a web page"),
    "zip": ({"model.safetensors": b"PK\3\4" * 99}, "found a ZIP archive, such as torch.save"),
    "pickle": ({"model.safetensors": b"\x80\2}q" * 99}, "found a pickle, such as torch.save"),
    "noise": ({"model.safetensors": b"\xff" * 99}, r"found a file that starts with b'\xff"),
    "cut in the header": (
        {"model.safetensors": tensors(b"abc")[:40]},
        "found 40 bytes and a header of 60, so it is cut off",
    ),
    "cut": ({"model.safetensors": tensors(b"abc")[:-1]}, "found 2 bytes of 3, so it is cut off"),
    "no tensor": ({"model.safetensors": tensors(b"", {})}, "found no tensor in it"),
    "another header": ({"model.safetensors": tensors(b"", {"x": 3})}, "found a header that is"),
    "a folder": ({"model.safetensors/x": b""}, "found a folder model.safetensors; expected"),
    "a file": (b"x", "weights is a file that starts with b'x', no folder; expected config.json"),
}


@pytest.mark.parametrize("files, says", NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_weights_that_are_none_are_one_line_before_anything_runs(tmp_path, files, says):
    folder = tmp_path / "weights"
    if isinstance(files, bytes):
        folder.write_bytes(files)
        files = {"config.json": None}
    for name, content in ({"config.json": GOOD} | files).items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    if not folder.exists():
        folder.mkdir()
    targets = {"weights": {"kind": "pretrained", "weights": f"local:{folder}"}}
    content = tiny_content(methods__dbot={}, targets=targets)
    content["grid"]["runs"] = {"dbot": {"method": "dbot", "target": "weights"}}
    with pytest.raises(ParamsError) as error:
        load(write_params(tmp_path, content), tmp_path / "results")
    first, line = str(error.value).split("\n")
    assert first == f"{tmp_path / 'params.yaml'}:"
    assert line.startswith(f"  targets.weights.weights: {folder}") and says in line
    assert len(line) < 2 * len(str(folder)) + 300


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
    (folder / "config.json").write_text('{"architecture": "x", "pretrained_cfg": {}}')
    (folder / "model.safetensors").write_bytes(tensors(b"one"))
    first = plan()
    assert not changed(first, plan())
    finish(first)
    (folder / "model.safetensors").write_bytes(tensors(b"two"))  # of the same size
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


# -------------------------------------------------------------------------------------------------
# what is seen, and what makes nothing stale


@pytest.fixture
def photos(tmp_path):
    """A folder of images, of which a plan is made and finished."""
    for name in ("cats/1.png", "cats/2.png", "dogs/1.JPG"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())
    finish(source_plan(tmp_path))
    return tmp_path / "images"


def said(folder: Path, images: str = "images") -> str:
    """Why the data set would be read again."""
    return explain(source_plan(folder, images), "data/main")


UP_TO_DATE = "data/main is up to date."


def test_a_change_of_equal_size_is_seen_and_named(tmp_path, photos):
    file = photos / "cats/2.png"
    before = file.stat()
    file.write_bytes(b"cats/3.png")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "holds changed (cats/2.png was changed)." in said(tmp_path)
    file.write_bytes(b"cats/2.png")
    assert said(tmp_path) == UP_TO_DATE, "the bytes count, not the time"
    file.rename(photos / "cats/3.png")
    assert "(cats/2.png was removed, cats/3.png was added)" in said(tmp_path)
    (photos / "dogs/1.JPG").unlink()
    assert "(cats/2.png was removed, cats/3.png was added, dogs/1.JPG was removed)" in said(
        tmp_path
    )


def test_the_case_of_corrected_labels_of_the_same_size(tmp_path):
    def plan():
        content = tiny_content()
        content["data"] = {"source": f"parquet:{tmp_path / 'table.parquet'}", "image_size": 16}
        return load(write_params(tmp_path, content), tmp_path / "results")

    (tmp_path / "table.parquet").write_bytes(b"labels: 0 1")
    finish(plan())
    (tmp_path / "table.parquet").write_bytes(b"labels: 1 0")
    assert "table.parquet holds changed." in explain(plan(), "data/main")


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "cats/.DS_Store", "notes.txt", "cats/Thumbs.db", ".git/a.png", "new/", "a.zip"],
)
def test_files_that_the_data_stage_does_not_read_make_nothing_stale(tmp_path, photos, name):
    path = photos / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_bytes(b"x")
    assert said(tmp_path) == UP_TO_DATE


def test_a_renamed_or_copied_source_is_the_same(tmp_path, photos):
    first = source_plan(tmp_path)
    photos.rename(tmp_path / "renamed")
    shutil.copytree(tmp_path / "renamed", tmp_path / "copied")
    for name in ("renamed", "copied"):
        assert said(tmp_path, name) == UP_TO_DATE
        assert not changed(first, source_plan(tmp_path, name))
    (tmp_path / "copied/cats/9.png").write_bytes(b"9")
    assert said(tmp_path, "copied") == (
        f'data/main would run because data.source changed from "folder:{photos}" to '
        f'"folder:{tmp_path / "copied"}".'
    )


def test_what_the_sources_read_is_what_they_declare():
    from stages.kit.data.decode import EXTENSIONS
    from workflow.plugins import declared

    declared = declared("source", "folder").literals
    assert {name.removeprefix("*") for name in declared["READS"]} == EXTENSIONS
    for name in (".a.jpg", "__MACOSX", "a.jpg"):
        skipped = any(fnmatch(name, pattern) for pattern in declared["SKIPS"])
        assert skipped == (name != "a.jpg")


def test_frozen_data_stay_while_the_folder_grows(tmp_path, photos):
    first = source_plan(tmp_path)
    frozen = source_plan(tmp_path, frozen=True)
    assert not changed(first, frozen), "the word itself changes nothing"
    (photos / "cats/4.png").write_bytes(b"4")
    assert not changed(first, source_plan(tmp_path, frozen=True))
    assert changed(first, source_plan(tmp_path)) == set(first.jobs)
    photos.rename(tmp_path / "renamed")
    assert not changed(first, source_plan(tmp_path, "renamed", frozen=True))
    assert not changed(first, source_plan(tmp_path, frozen=True)), "also while it is away"
    (tmp_path / "renamed").rename(photos)
    with pytest.raises(ParamsError) as error:
        source_plan(tmp_path, frozen=True, image_size=20)
    head, line = str(error.value).splitlines()
    assert line == (
        f"  data.frozen: found true, but data/main has to be made again and what folder:{photos} "
        "holds has changed (cats/4.png was added), expected false, to read it as it is now"
    )
    (photos / "cats/4.png").unlink()
    assert source_plan(tmp_path, frozen=True, image_size=20).jobs, "nothing was lost by freezing"
    shutil.rmtree(tmp_path / "results")
    assert not changed(first, source_plan(tmp_path, frozen=True)), "nothing is frozen yet"


def test_only_files_can_be_frozen(tmp_path):
    with pytest.raises(ParamsError, match="data.frozen: found true, but .*shapes reads no files"):
        plan_of(tmp_path, data__frozen=True)


def test_names_of_any_bytes_and_links_never_break_the_plan(tmp_path, photos):
    root = os.fsencode(photos)
    for name in (b"k\xe4fer.jpg", b"two\nlines.png", b"x" * 251 + b".png", b"\xff\xfe.gif"):
        Path(os.fsdecode(root + b"/" + name)).write_bytes(b"1")
    (photos / "cats/loop").symlink_to(photos)
    (photos / "round").symlink_to("round")
    (photos / "dead.png").symlink_to("nowhere.png")
    os.mkfifo(photos / "pipe.png")
    deep = photos
    for _ in range(60):
        deep = deep / ("d" * 60)
        deep.mkdir()
    told = said(tmp_path)
    assert "(cats/loop/ was added, dead.png was added, k\\xe4fer.jpg was added, 4 more)" in told
    told.encode()
    finish(source_plan(tmp_path))
    Path(os.fsdecode(root + b"/k\xe4fer.jpg")).write_bytes(b"2")
    assert "(k\\xe4fer.jpg was changed)" in said(tmp_path)
    Path(os.fsdecode(root + b"/two\nlines.png")).unlink()
    assert "two\\nlines.png was removed" in said(tmp_path)


def test_a_source_that_cannot_be_read_is_one_line(tmp_path, photos):
    for name, why in (("x" * 300, "File name too long"), ("images/cats/1.png/x", "does not exist")):
        with pytest.raises(ParamsError) as error:
            source_plan(tmp_path, name)
        head, line = str(error.value).splitlines()
        assert line.startswith("  data.source: ") and why in line and len(line) < 500


def test_a_look_reads_no_file_where_nothing_changed(tmp_path, photos, monkeypatch):
    for file in photos.rglob("*.*"):
        os.utime(file, (1e9, 1e9))
    source_plan(tmp_path)
    time.sleep(2.1)  # what was just written may be written again
    source_plan(tmp_path)
    before = source_plan(tmp_path).jobs["data/main"].params["source_state"]
    read = []
    monkeypatch.setattr(listing, "sha256", lambda path: read.append(path) or sha256(path))
    assert source_plan(tmp_path).jobs["data/main"].params["source_state"] == before
    assert not read
    (photos / "cats/1.png").write_bytes(b"another")
    assert source_plan(tmp_path).jobs["data/main"].params["source_state"] != before
    assert [path.name for path in read] == ["1.png"]


def test_without_its_memory_the_plan_is_the_same(tmp_path, photos):
    first = source_plan(tmp_path)
    seen = tmp_path / "work/seen"
    files = list(seen.iterdir())
    assert len(files) == 1, "one state that is recorded and present"
    for text in ("", "[]", "{", '{"": 3}', '{"cats/1.png": [null, 3]}'):
        files[0].write_text(text)
        assert not changed(first, source_plan(tmp_path)), text
    shutil.rmtree(seen)
    seen.write_text("in the way")
    assert not changed(first, source_plan(tmp_path))
    (photos / "cats/4.png").write_bytes(b"4")
    assert said(tmp_path).endswith("holds changed."), "which file is not known"


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
        "data.options.masks names changed (2.png was added)."
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
