"""Folders as people have them: odd splits, stray images, odd names. Nothing is left out in silence,
and no split or class is taken for another.
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata

import numpy as np
import pytest
import yaml
from test_data import build, encode, picture
from test_sources import put

from stages import data as stage
from stages.kit.data.decode import EXTENSIONS
from stages.sources import SourceError, folder, parquet
from stages.sources._names import guess, printable
from workflow.params.entries import data_entries

DATA = {"image_size": 16, "store_size": None, "seed": 0, "image_column": None, "label_column": None}


def made(root, folders: dict[str, int]):
    for place, n in folders.items():
        for i in range(n):
            put(root / place / f"{i}.png")
    return root


def read(root, wanted: dict | None = None, group=None, **options):
    return folder.read(
        str(root), folder.Config(**options), {**DATA, "splits": wanted, "group": group}
    )


def sizes(found) -> dict[str, int]:
    return {split: len(listing) for split, listing in found.splits.items()}


@pytest.mark.parametrize(
    "name, split",
    [
        ("train2017", "train"),
        ("val.X", "val"),
        ("birds_train", "train"),
        ("birds-test-00000-of-00002", "test"),
        ("TrainSet", "train"),
        ("testset", "test"),
        ("validation_images", "val"),
        ("my.dev.v2", "val"),
        ("seg_test", "test"),
        ("2019 training", "train"),
        ("imagesTr", "train"),
        ("imagesTs", "test"),
        ("labelsTr", None),
        ("trainval", "?"),
        ("train_test", "?"),
        ("pretrained", None),
        ("détrain", None),
        ("contest", None),
        ("valley", None),
        ("restrain", None),
    ],
)
def test_the_split_in_a_name(name, split):
    assert guess(name) == split


@pytest.mark.parametrize(
    "folders, expected",
    [
        ({"train2017": 3, "val2017": 2, "test2017": 1}, {"train": 3, "val": 2, "test": 1}),
        ({"train.X1/a": 2, "train.X2/b": 3, "val.X/a": 1}, {"train": 5, "val": 1}),
        ({"birds_train/a": 3, "birds_validation/a": 2}, {"train": 3, "val": 2}),
        ({"set-training": 3, "set-testing": 2}, {"train": 3, "test": 2}),
        ({"train part 1/a": 1, "train part 2/a": 1, "test/a": 1}, {"train": 2, "test": 1}),
    ],
)
def test_splits_with_longer_names(tmp_path, folders, expected):
    assert sizes(read(made(tmp_path, folders))) == expected


@pytest.mark.parametrize(
    "folders, message",
    [
        (
            {"train": 3, "bus": 3, "car": 2},
            "'train' beside bus, car, which may be a split or a cla",
        ),
        ({"train2014": 1, "train2017": 1, "val2017": 1}, "both mean the split 'train'"),
        ({"seg_train/a": 2, "seg_test/a": 1, "seg_pred": 1}, "look like splits, beside seg_pred"),
        ({"train": 2, "val": 1, "test_A": 1}, "train, val, test_A look like splits"),
        ({"trainval": 2, "test": 1}, "the folders test, trainval look like splits"),
        ({"train_images": 2, "train_masks": 2, "test_images": 1}, "both mean the split 'train'"),
        ({"images/train/a": 2, "images/val/a": 1}, r"expected them at the top.*/images"),
        ({"a/train": 2, "a/test": 1, "b/train": 2, "b/test": 1}, "above the classes"),
        ({"train-val": 2, "test-set": 1}, "look like splits"),
        ({"Train": 2, "train": 1, "test": 1}, "both mean the split 'train'"),
    ],
)
def test_splits_that_could_be_read_in_two_ways_are_an_error(tmp_path, folders, message):
    with pytest.raises(SourceError, match=message) as error:
        read(made(tmp_path, folders))
    assert re.search(r"data\.splits|options\.splits|data\.source", str(error.value))


@pytest.mark.parametrize(
    "folders",
    [
        {"bullet train": 2, "bus": 2},
        {"test tube": 2, "beaker": 2},
        {"freight train": 2, "bullet train": 1},
        {"pretrain": 1, "contest": 1},
    ],
)
def test_classes_that_only_hold_the_word_stay_classes(tmp_path, folders):
    found = read(made(tmp_path, folders))
    assert found.classes == sorted(folders) and not found.warnings


def test_a_class_that_has_the_name_of_a_split(tmp_path):
    found = read(made(tmp_path, {"train": 3, "bus": 3, "car": 2}), splits=False)
    assert found.classes == ["bus", "car", "train"] and sizes(found) == {"train": 8}


@pytest.mark.parametrize(
    "wanted, expected, classes",
    [
        ({"val": "train.X1", "ignore": ["unknown"]}, {"train": 3, "val": 2}, ["b"]),
        ({"val": "train.X1", "ignore": ["unk*", "val*"]}, {"train": 2, "val": 2}, ["b"]),
        ({"unlabelled": "unknown", "val": "train.X1"}, {"train": 8, "val": 2}, ["b"]),
        ({"train": ["train.X1", "train.X2"], "test": "unknown"}, {"train": 4, "test": 5}, ["b"]),
    ],
)
def test_splits_are_mapped_skipped_or_taken_as_unlabelled(tmp_path, wanted, expected, classes):
    place = {"train.X1/b": 2, "train.X2/b": 2, "val.X/b": 1, "unknown/b": 5}
    wanted = {"train": [], **wanted}
    if "test" in wanted:
        expected = {**expected, "val": 1}
    elif "unlabelled" in wanted:
        expected = {"train": 7, "val": 3}
    elif wanted["ignore"] == ["unknown"]:
        expected = {"train": 2, "val": 3}
    found = read(made(tmp_path, place), wanted)
    assert sizes(found) == expected and found.classes == classes
    if "unlabelled" in wanted:
        assert sorted(found.splits["train"].labels.tolist()) == [-1] * 5 + [0] * 2
    if "ignore" in wanted:
        assert any("unknown (5 images)" in text for text in found.warnings)


def test_classes_are_skipped_or_taken_as_unlabelled(tmp_path):
    made(tmp_path, {"cat": 2, "dog": 2, "unknown": 3, "junk": 4})
    found = read(tmp_path, {"unlabelled": "unknown", "ignore": "junk"})
    assert found.classes == ["cat", "dog"] and sizes(found) == {"train": 7}
    assert found.splits["train"].labels.tolist() == [0, 0, 1, 1, -1, -1, -1]
    assert any("junk (4 images)" in text for text in found.warnings)


def test_names_that_data_splits_misspells(tmp_path):
    made(tmp_path, {"train": 2, "extra": 1})
    with pytest.raises(SourceError, match=r"data\.splits\.ignore: .*'extr'.*did you mean 'extra'"):
        read(tmp_path, {"ignore": ["extr"]})
    with pytest.raises(SourceError, match="as train and as ignore"):
        read(tmp_path, {"train": "train", "ignore": "tr*"})
    problems: list[str] = []
    data_entries({"source": "shapes", "image_size": 8, "splits": {"vall": "x"}}, problems)
    assert "data.splits.vall" in problems[0] and "did you mean 'val'" in problems[0]


@pytest.mark.parametrize(
    "folders, expected, words",
    [
        ({".": 6, "thumbs": 2}, {"train": 8}, "6 images lie beside the one folder thumbs with 2"),
        ({".": 2, "a": 3, "b": 3}, {"train": 6}, "2 images outside of class folders"),
        ({"train/a": 2, "train/b": 2, ".": 3}, {"train": 4}, "3 images beside the folders"),
        ({"train/a": 2, "val/a": 2, "more/x": 5}, {"train": 2, "val": 2}, r"more \(5 images\)"),
        ({"train/a": 3, "train/b": 3, "train": 1}, {"train": 6}, "1 images outside of class"),
        ({"train": 3, "test": 0, "x": 0}, {"train": 3}, None),
    ],
)
def test_images_that_are_not_used_are_counted(tmp_path, folders, expected, words):
    found = read(made(tmp_path, folders))
    assert sizes(found) == expected
    assert words is None or any(re.search(words, text) for text in found.warnings)


@pytest.mark.parametrize(
    "folders", [{".": 6, "a": 2, "b": 2}, {"train": 9, "train/a": 1, "val": 1}]
)
def test_more_images_outside_than_inside_of_classes(tmp_path, folders):
    if "a" not in folders:
        found = read(made(tmp_path, folders))
        assert found.classes == [] and sizes(found)["train"] == 10
        return
    with pytest.raises(
        SourceError, match="6 images outside.*4 in 2 folders.*options.labels: false"
    ):
        read(made(tmp_path, folders))
    assert sizes(read(tmp_path, labels=False)) == {"train": 10}


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX"),
        *(".thumbnails", "@__thumb", "_gsdata_", "My.photolibrary", "THMBNL"),
    ],
)
def test_folders_of_systems_are_no_data(tmp_path, name):
    made(tmp_path, {"a": 2, "b": 2, name: 3, f"a/{name}/x": 2})
    found = read(tmp_path)
    assert found.classes == ["a", "b"] and sizes(found) == {"train": 4} and not found.warnings


@pytest.mark.parametrize("name", ["Thumbnails", "thumbs", "ehthumbs", "preview", "Trash"])
def test_folders_that_programs_or_people_make_are_told(tmp_path, name):
    found = read(made(tmp_path, {"a": 2, "b": 2, name: 3}))
    assert sizes(found) == {"train": 7} and f"the folders {name} are read" in found.warnings[0]
    assert read(tmp_path, {"ignore": [name]}).classes == ["a", "b"]


def test_files_that_are_no_images_are_counted_on_the_terminal(tmp_path):
    made(tmp_path, {"a": 2, "b": 2})
    for name in ("1.heic", "2.HEIC", "scan", "more.zip", "readme.txt", "Thumbs.db"):
        put(tmp_path / "a" / name)
    (text,) = read(tmp_path).warnings
    assert "2 .heic" in text and "1 no extension" in text and "1 .zip" in text
    assert ".txt" not in text and ".db" not in text


@pytest.mark.parametrize("name", ["labels.csv", "metadata.jsonl", "train.tsv"])
def test_lists_beside_unlabelled_images_are_told(tmp_path, name):
    made(tmp_path / "flat", {".": 4})
    made(tmp_path / "classes", {"a": 2, "b": 2})
    for place in ("flat", "classes"):
        put(tmp_path / place / name)
    (text,) = read(tmp_path / "flat").warnings
    assert f"1 .{name.rpartition('.')[2]}" in text
    assert not read(tmp_path / "classes").warnings


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("100CANON", "101CANON"), ("part_a1", "x")])
def test_folders_that_count_are_told(tmp_path, names):
    found = read(made(tmp_path, dict.fromkeys(names, 2)))
    told = any("are read as classes" in text for text in found.warnings)
    assert told == ("x" not in names) and len(found.classes) == 2


def test_class_folders_without_an_image_are_told(tmp_path):
    made(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "c" / "deep").mkdir(parents=True)
    found = read(tmp_path)
    assert found.classes == ["a", "b"] and "are no classes: c" in found.warnings[0]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    made(tmp_path, {"a": 2, "b": 2})
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match=r"/b cannot be read \(Permission denied\)"):
        read(tmp_path)


# --------------------------------------------------------------------------------------------------
# names


def odd(root, *words: bytes):
    """Two classes, whose names and files are these bytes."""
    for k, word in enumerate(words):
        place = os.path.join(os.fsencode(root), word)
        os.makedirs(place)
        for i in range(6):
            with open(os.path.join(place, b"%d-" % i + word + b".png"), "wb") as file:
                file.write(encode(picture(10 * k + i)))
    return root


@pytest.mark.parametrize(
    "words, classes",
    [
        ((b"falter", b"k\xe4fer"), ["falter", "k\\xe4fer"]),
        ((b"a\nb", b"tab\there"), ["a\nb", "tab\there"]),
        ((b"x" * 240, b"y"), ["x" * 240, "y"]),
        (("日本".encode("shift-jis"), b"b"), ["b", "\\x93\\xfa\\x96{"]),
        ((b'it\'s "q" $(x)', b"b"), ["b", 'it\'s "q" $(x)']),
    ],
)
def test_any_name_that_the_file_system_allows(tmp_path, words, classes):
    _, facts = build(odd(tmp_path / "in", *words), tmp_path / "out")
    assert facts["classes"] == classes
    assert sum(part["count"] for part in facts["splits"].values()) == 12
    assert facts["quarantine"]["count"] == 0


def test_links_that_go_round_and_files_that_are_none(tmp_path):
    root = odd(tmp_path / "in", b"a", b"b")
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "a" / "one.png").symlink_to("two.png")
    (root / "a" / "two.png").symlink_to("one.png")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "\n.png").write_bytes(b"")
    os.mkfifo(root / "b" / "pipe.png")
    _, facts = build(root, tmp_path / "out")
    assert facts["quarantine"]["reasons"] == {"empty": 1, "unreadable": 4}
    assert sum(part["count"] for part in facts["splits"].values()) == 12


def test_a_class_that_is_a_link_to_another_is_read_once_with_a_warning(tmp_path):
    made(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "kitty").symlink_to("cat")
    found = read(tmp_path)
    assert sizes(found) == {"train": 4} and "kitty is the folder cat again" in found.warnings[0]


def test_the_files_that_count_are_those_that_are_read():
    assert {pattern.removeprefix("*") for pattern in folder.READS} == EXTENSIONS
    assert tuple(f"*{end}" for end in parquet.ENDS) == parquet.READS


def test_no_warning_holds_the_place_of_the_folder(tmp_path):
    made(tmp_path / "in", {".": 6, "thumbs": 2})
    for i, path in enumerate(sorted((tmp_path / "in").rglob("*.png"))):
        path.write_bytes(encode(picture(i)))
    _, facts = build(tmp_path / "in", tmp_path / "out")
    assert facts["warnings"][0].startswith("in: 6 images lie beside")
    assert str(tmp_path) not in (tmp_path / "out" / "data.json").read_text()


def test_names_are_shown_in_one_line():
    assert printable("a\nb\udce4é") == "a\\nb\\xe4é"


@pytest.mark.parametrize("places", [("{}",), ("train/{}", "test/{}"), ("train/{}", "val/{}")])
def test_classes_that_differ_in_their_unicode_form_are_one(tmp_path, places):
    forms = [unicodedata.normalize(form, "käfer") for form in ("NFC", "NFD")]
    for k, form in enumerate(forms):
        made(tmp_path, {places[k % len(places)].format(form): 2})
    made(tmp_path, {places[0].format("wespe"): 2})
    found = read(tmp_path)
    assert found.classes == [forms[0], "wespe"]
    assert any("Unicode form" in text for text in found.warnings)
    assert np.concatenate([s.labels for s in found.splits.values()]).tolist().count(0) == 4


def test_one_spelling_stays_as_it_is_and_case_is_told(tmp_path):
    form = unicodedata.normalize("NFD", "käfer")
    made(tmp_path, {form: 2, "Cat": 1, "cat": 1})
    found = read(tmp_path)
    assert found.classes == ["Cat", "cat", form] and "only in case" in found.warnings[0]


# --------------------------------------------------------------------------------------------------
# one class, groups, the terminal


@pytest.mark.parametrize("folders", [{"images": 8}, {"train/x": 6, "test/x": 3}, {"all/a/b": 8}])
def test_one_class_is_none(tmp_path, folders):
    for place, n in folders.items():
        for i in range(n):
            put(tmp_path / "in" / place / f"{i}.png", encode(picture(len(place) + i)))
    _, facts = build(tmp_path / "in", tmp_path / "out")
    assert facts["classes"] == [] and any("one class alone" in t for t in facts["warnings"])


@pytest.mark.parametrize("level, place", [(2, "{c}/p{g}"), (1, "p{g}/{c}"), (3, "{c}/x/p{g}")])
def test_folders_of_a_group_stay_together(tmp_path, level, place):
    for i in range(60):
        path = tmp_path / "in" / place.format(c="ab"[i % 2], g=i // 6) / f"{i}.png"
        put(path, encode(picture(i)))
    options = {"class_level": 2 if level == 1 else 1}
    _, facts = build(tmp_path / "in", tmp_path / "out", options, group=level, test_fraction=0.2)
    assert facts["classes"] == ["a", "b"]
    counts = {split: part["count"] for split, part in facts["splits"].items()}
    assert sum(counts.values()) == 60 and counts["test"] == 12 and counts["val"] == 12
    again = build(tmp_path / "in", tmp_path / "again", options, group=level, test_fraction=0.2)[1]
    assert again["hash"] == facts["hash"]
    from stages.kit.data.store import Split

    held = {
        split: {
            re.search(r"p(\d+)", name)[1] for name in Split.open(tmp_path / "out", split).names()
        }
        for split in counts
    }
    assert not (held["train"] & held["test"] or held["train"] & held["val"])
    assert not held["val"] & held["test"]


def test_groups_that_there_are_not(tmp_path):
    made(tmp_path, {"a": 2, "b": 2})
    with pytest.raises(SourceError, match=r"data\.group: .*4 images without a folder at level 2"):
        read(tmp_path, group=2)
    with pytest.raises(SourceError, match=r"data\.group: found 1, the level of the classes"):
        read(tmp_path, group=1)
    with pytest.raises(SourceError, match="class_level: found 0, expected the level"):
        read(tmp_path, class_level=0)
    with pytest.raises(SourceError, match="expected the level of a folder"):
        read(tmp_path, group="patient")


def test_given_splits_that_share_groups_are_told(tmp_path):
    made(tmp_path / "in", {"train/a/p1": 4, "train/b/p2": 4, "test/a/p1": 2, "test/b/p3": 2})
    _, facts = build(tmp_path / "in", tmp_path / "out", group=2)
    assert any("1 groups of the given split test are in train" in t for t in facts["warnings"])


def test_warnings_reach_the_terminal_beside_a_log(tmp_path, tiny_params, capfd):
    made(tmp_path / "in", {"a": 12, "b": 12, ".": 3})
    for i, path in enumerate(sorted((tmp_path / "in").rglob("*.png"))):
        path.write_bytes(encode(picture(i)))
    source = {"source": f"folder:{tmp_path / 'in'}", "options": {}}
    params = tiny_params(tmp_path)
    content = yaml.safe_load(params.read_text())
    content["data"] |= source
    params.write_text(yaml.safe_dump(content))
    assert stage.main(["--params", str(params), "--results", str(tmp_path / "results")]) == 0
    said = capfd.readouterr()
    assert "data/main: warning: " in said.out and "3 images outside of class folders" in said.out
