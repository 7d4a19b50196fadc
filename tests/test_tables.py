"""Tables as pandas, polars and Arrow write them: types of labels and images, names of splits, rows
and cells beyond the memory.
"""

from __future__ import annotations

import decimal
import io
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_data import DATA, encode, picture

from stages import data as stage
from stages.kit.data import store
from stages.kit.data.batches import training_batches
from stages.kit.data.views import View
from stages.sources import SourceError, hub, parquet
from stages.tasks import require


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [png(i) for i in range(6)]


def write(path, images=None, more: dict | None = None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = PICTURES if images is None else images
    pq.write_table(pa.table({"image": images, **columns, **(more or {})}), path)
    return path


def read(path, options: dict | None = None, **data):
    return parquet.read(str(path), parquet.Config(**(options or {})), {**DATA, **data})


def labels(found, split="train") -> list[int]:
    return found.splits[split].labels.tolist()


TWO = [0, 1, 0, 1, None, 0]


@pytest.mark.parametrize(
    "column, classes, numbers",
    [
        (pa.array([True, False, True, None, False, False]), ["False", "True"], [1, 0, 1, -1, 0, 0]),
        (pa.array([3.0, 7.0, float("nan"), 3.0, None, 7.0]), ["3", "7"], [0, 1, -1, 0, -1, 1]),
        (
            pa.array([decimal.Decimal(v) for v in (1, 2, 1, 2, 1, 2)], pa.decimal128(5, 1)),
            ["1", "2"],
            [0, 1, 0, 1, 0, 1],
        ),
        (
            pa.array(["b", "a", None, "a", "b", ""], pa.string_view()),
            ["a", "b"],
            [1, 0, -1, 0, 1, -1],
        ),
        (pa.array(["b", "a"] * 3, pa.large_string()), ["a", "b"], [1, 0] * 3),
        (pa.array([b"cat", b"dog"] * 3), ["cat", "dog"], [0, 1] * 3),
        (pa.array(["b", "a", None] * 2).dictionary_encode(), ["a", "b"], [1, 0, -1] * 2),
        (pa.array(TWO, pa.int8()).dictionary_encode(), ["0", "1"], [0, 1, 0, 1, -1, 0]),
        (pa.array([5, 9] * 3, pa.uint64()), ["5", "9"], [0, 1] * 3),
    ],
    ids=str,
)
def test_labels_of_any_type_that_means_a_class(tmp_path, column, classes, numbers):
    found = read(write(tmp_path / "t.parquet", label=column))
    assert found.classes == classes and labels(found) == numbers and not found.warnings


@pytest.mark.parametrize(
    "column, kind",
    [
        (pa.array([0.5, 1.0, 0.2, 0.1, 0.0, 2.0]), "0.5"),
        (pa.array([[1, 2]] * 6), "list<"),
        (pa.array([0] * 6, pa.timestamp("us")), r"timestamp\[us\]"),
        (pa.array([None] * 6, pa.null()), "null"),
        (pa.array([{"a": 1}] * 6), "struct<a"),
    ],
)
def test_columns_that_are_no_classes_are_named_by_their_type(tmp_path, column, kind):
    path = write(tmp_path / "t.parquet", label=column)
    found = read(path)
    assert found.classes == [] and labels(found) == [-1] * 6
    assert "holds" in found.warnings[0]
    with pytest.raises(SourceError, match=rf"data\.label_column: .*{kind}"):
        read(path, label_column="label")
    assert not read(path, {"labels": False}).warnings


def test_a_table_whose_labels_have_another_name_says_so(tmp_path):
    path = write(tmp_path / "t.parquet", species=["a", "b"] * 3, id=list(range(6)))
    assert "found species" in read(path).warnings[0]
    assert read(path, label_column="species").classes == ["a", "b"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(PICTURES, pa.binary_view()),
        pa.array(PICTURES, pa.large_binary()),
        pa.array([list(p) for p in PICTURES], pa.list_(pa.uint8())),
        pa.array([list(p) for p in PICTURES], pa.large_list(pa.uint8())),
        pa.array([np.frombuffer(p, np.int8) for p in PICTURES], pa.list_(pa.int8())),
        pa.array([[p] for p in PICTURES], pa.list_(pa.binary())),
        pa.array(PICTURES).dictionary_encode(),
        pa.array([{"bytes": list(p), "path": None} for p in PICTURES]),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_images_however_they_are_packed(tmp_path, column):
    listing = read(write(tmp_path / "t.parquet", column)).splits["train"]
    assert [s.image for s in listing.read(np.arange(6))] == PICTURES


def test_an_image_column_of_another_type_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"found image \(list<.*: list<.*: int64>>\)"):
        read(write(tmp_path / "t.parquet", [[[1, 2], [3, 4]]] * 2).with_name("t.parquet"))


def test_files_with_classes_in_another_order(tmp_path):
    for name, classes in (("train-0", ["cat", "dog"]), ("test-0", ["dog", "cat"])):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
        )
        rows = {"image": [{"bytes": p, "path": None} for p in PICTURES], "label": [0, 1] * 3}
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(SourceError, match="the classes of 'label' are dog, cat, expected those of"):
        read(tmp_path)


def test_labels_that_are_words_in_one_file_and_numbers_in_another(tmp_path):
    write(tmp_path / "train-0.parquet", label=[0, 1] * 3)
    write(tmp_path / "train-1.parquet", label=["0", "1"] * 3)
    with pytest.raises(SourceError, match="'label' holds string, expected int as in train-0"):
        read(tmp_path)


@pytest.mark.parametrize("column", [["", ""] * 3, [-1] * 6, pa.array([None] * 6, pa.string())])
def test_a_column_without_any_label_is_told(tmp_path, column):
    found = read(write(tmp_path / "t.parquet", label=column))
    assert found.classes == [] and "gives no image a label" in found.warnings[0]


def test_labels_that_differ_in_their_unicode_form_are_one(tmp_path):
    write(tmp_path / "t.parquet", label=["k\u00e4fer", "ka\u0308fer", "wespe"] * 2)
    found = read(tmp_path)
    assert found.classes == ["k\u00e4fer", "wespe"] and labels(found) == [0, 0, 1] * 2
    assert "Unicode form" in found.warnings[0]


# --------------------------------------------------------------------------------------------------
# splits


@pytest.mark.parametrize(
    "files, expected",
    [
        (("birds_train", "birds_validation", "birds_test"), ["train", "val", "test"]),
        (("train2017", "val2017"), ["train", "val"]),
        (("x-train-00000-of-00002", "x-train-00001-of-00002", "x-test-0"), ["train", "test"]),
        (("a/b/training/0", "a/b/testing/0"), ["train", "test"]),
        (("split=train/0", "split=test/0"), ["train", "test"]),
        (("part-0", "part-1"), ["train"]),
        (("train.parquet/part-0", "test.parquet/part-0"), ["train", "test"]),
    ],
)
def test_splits_in_the_names_of_files(tmp_path, files, expected):
    for name in files:
        write(tmp_path / f"{name}.parquet")
    found = read(tmp_path)
    assert list(found.splits) == expected and sum(map(len, found.splits.values())) == 6 * len(files)


@pytest.mark.parametrize(
    "files, message",
    [
        (("birds_train", "birds_extra"), "found birds_extra.parquet; data.splits says"),
        (("birds_trainval", "birds_test"), "names two splits"),
        (("birds_test",), "expected files train-"),
    ],
)
def test_names_of_files_that_are_not_understood(tmp_path, files, message):
    for name in files:
        write(tmp_path / f"{name}.parquet")
    with pytest.raises(SourceError, match=message):
        read(tmp_path)


def test_files_are_mapped_skipped_or_taken_as_unlabelled(tmp_path):
    for name in ("birds_a", "birds_b", "birds_c", "birds_d"):
        write(tmp_path / f"{name}.parquet", label=[0, 1] * 3)
    wanted = {
        "train": "birds_a",
        "test": "birds_b.parquet",
        "unlabelled": ["*_c"],
        "ignore": "birds_d",
    }
    found = read(tmp_path, splits=wanted)
    assert {s: len(x) for s, x in found.splits.items()} == {"train": 12, "test": 6}
    assert labels(found) == [0, 1] * 3 + [-1] * 6
    assert any("ignore: birds_d.parquet" in text for text in found.warnings)
    with pytest.raises(SourceError, match=r"data\.splits\.val: .*'birds_e'.*did you mean 'birds_"):
        read(tmp_path, splits={"val": "birds_e"})


def test_what_lies_beside_tables_is_told(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "more" / "test.parquet")
    write(tmp_path / "val.pq")
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "1.jpg").write_bytes(PICTURES[0])
    found = read(tmp_path)
    assert list(found.splits) == ["train", "val"]
    assert any("more/test.parquet" in text for text in found.warnings)
    assert any("1 .csv" in text and "1 .jpg" in text for text in found.warnings)


def test_links_to_tables_are_followed_once(tmp_path):
    write(tmp_path / "far" / "train" / "0.parquet")
    write(tmp_path / "far" / "test" / "0.parquet")
    (tmp_path / "in").mkdir()
    for name in ("train", "test"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far" / "train" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "loop.pq").symlink_to("loop.pq")
    with pytest.raises(SourceError, match=r"loop.pq"):
        read(tmp_path / "in")
    (tmp_path / "in" / "loop.pq").unlink()
    assert list(read(tmp_path / "in").splits) == ["train", "test"]


def test_a_split_without_rows_is_told(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", pa.array([], pa.binary()))
    assert any("test has no rows" in text for text in read(tmp_path).warnings)


SAID = ["train", "train", "train", "validation", "test", "test"]


@pytest.mark.parametrize("name", ["split", "Subset", "partition"])
def test_splits_in_a_column(tmp_path, name):
    path = write(tmp_path / "t.parquet", label=[0, 1] * 3, more={name: SAID})
    found = read(path)
    assert {s: len(x) for s, x in found.splits.items()} == {"train": 3, "val": 1, "test": 2}
    assert [s.image for s in found.splits["test"].read(np.array([1]))] == PICTURES[5:]
    assert labels(found, "test") == [0, 1] and "says which split a row is" in found.warnings[0]


def test_splits_in_a_column_that_is_named(tmp_path):
    part = ["a", "a", "b", "c", "d", "d"]
    path = write(tmp_path / "t.parquet", label=[0, 1] * 3, fold=part)
    assert list(read(path).splits) == ["train"]  # the values say nothing
    wanted = {"train": "a", "val": "b", "unlabelled": "c", "ignore": "d"}
    found = read(path, {"split_column": "fold"}, splits=wanted)
    assert labels(found) == [0, 1, -1] and labels(found, "val") == [0]
    assert any("2 rows are left out" in text for text in found.warnings)
    with pytest.raises(SourceError, match="says b, c, d for some rows, expected train, val or te"):
        read(path, {"split_column": "fold"}, splits={"train": "a"})
    with pytest.raises(SourceError, match="split_column: .*no column 'folt'.*did you mean 'fold'"):
        read(path, {"split_column": "folt"})


def test_groups_are_a_column(tmp_path):
    images = [encode(picture(i)) for i in range(60)]
    patient = [f"p{i // 5}" if i < 55 else None for i in range(60)]
    write(tmp_path / "t.parquet", images, label=[i % 2 for i in range(60)], patient=patient)
    out = tmp_path / "out"
    out.mkdir()
    source = {"name": "parquet", "argument": str(tmp_path / "t.parquet"), "config": {}}
    stage.build({**DATA, "group": "patient"}, source, out, tmp_path / "work", threads=1)
    held = {}
    for split in ("train", "val", "test"):
        rows = [int(name) for name in store.Split.open(out, split).names()]
        held[split] = {patient[row] for row in rows} - {None}
    assert not (held["train"] & held["val"] | held["train"] & held["test"])
    assert not held["val"] & held["test"] and all(held.values())
    with pytest.raises(SourceError, match="data.group: .*no column 'patent'.*mean 'patient'"):
        read(tmp_path / "t.parquet", group="patent")


# --------------------------------------------------------------------------------------------------
# hub


def loaded(monkeypatch, **splits):
    """hub:owner/name gives these splits; their numbers of images."""
    tables = {
        name: datasets.Dataset.from_dict({"image": PICTURES[:n], "label": [True, False, True][:n]})
        for name, n in splits.items()
    }
    monkeypatch.setattr(hub, "_load", lambda name, config: tables)
    return lambda **data: hub.read("owner/name", hub.Config(), {**DATA, **data})


def test_splits_of_the_hub_that_are_not_used_are_told(monkeypatch):
    found = loaded(monkeypatch, train=3, test=2, unlabeled=1)()
    assert {s: len(x) for s, x in found.splits.items()} == {"train": 3, "test": 2}
    assert "unlabeled (1 images)" in found.warnings[0] and found.classes == ["False", "True"]


def test_splits_of_the_hub_are_mapped(monkeypatch):
    ask = loaded(monkeypatch, train=3, extra=2, test=2)
    found = ask(splits={"unlabelled": "extra", "ignore": ["test"]})
    assert labels(found) == [1, 0, 1, -1, -1] and list(found.splits) == ["train"]
    assert len(list(found.splits["train"].read(np.arange(5)))) == 5
    with pytest.raises(SourceError, match="data.splits.val: .*'extr'.*did you mean 'extra'"):
        ask(splits={"val": "extr"})


def test_splits_of_the_hub_in_a_column(monkeypatch):
    rows = {"image": PICTURES, "label": [0, 1] * 3, "split": SAID}
    monkeypatch.setattr(
        hub, "_load", lambda name, config: {"train": datasets.Dataset.from_dict(rows)}
    )
    found = hub.read("owner/name", hub.Config(), DATA)
    assert {s: len(x) for s, x in found.splits.items()} == {"train": 3, "val": 1, "test": 2}
    assert [s.image for s in found.splits["val"].read(np.array([0]))] == [PICTURES[3]]


@pytest.mark.parametrize("names", [("train", "training"), ("train_clean", "train_noisy")])
def test_splits_of_the_hub_with_one_meaning(monkeypatch, names):
    with pytest.raises(SourceError, match="both mean the split 'train'"):
        loaded(monkeypatch, **dict.fromkeys(names, 2))()


# --------------------------------------------------------------------------------------------------
# partly labelled, one class, hostile


def partly(tmp_path):
    images = [encode(picture(i)) for i in range(80)]
    known = [i % 2 if i % 4 < 2 else None for i in range(80)]
    write(tmp_path / "in.parquet", images, label=pa.array(known, pa.int64()))
    (tmp_path / "out").mkdir()
    source = {"name": "parquet", "argument": str(tmp_path / "in.parquet"), "config": {}}
    stage.build(DATA, source, tmp_path / "out", tmp_path / "work", threads=1)
    return tmp_path / "out"


def test_of_a_partly_labelled_set_val_and_test_have_labels(tmp_path):
    facts = store.info(partly(tmp_path))
    assert any("40 of 80 images have no label" in text for text in facts["warnings"])
    counts = {split: (part["count"], part["labels"]) for split, part in facts["splits"].items()}
    assert counts["test"] == (10, 10) and counts["val"][0] == counts["val"][1]
    require("knn", {"labels"}, "main", facts)


def test_a_method_that_needs_labels_gets_the_labelled_images(tmp_path):
    module = SimpleNamespace(views=lambda config, spec: {"view": View(8)}, LABELS=True)
    train = {"batch_size": 4, "micro_batch": None, "epochs": 1}
    job = SimpleNamespace(params={"train": train})
    run = SimpleNamespace(job=job, compute={"workers": 0})
    batches = training_batches(run, module, None, None, partly(tmp_path), 0)
    assert (np.asarray(batches.split.labels) >= 0).all() and len(batches.split) < 40


@pytest.mark.parametrize("column", [[1] * 6, ["x", None] * 3, [True] * 6])
def test_labels_that_are_all_the_same_are_none(tmp_path, column):
    write(tmp_path / "t.parquet", label=column)
    source = {"name": "parquet", "argument": str(tmp_path / "t.parquet"), "config": {}}
    found = stage.find(DATA, source)
    assert found.classes == [] and labels(found) == [-1] * 6
    assert "one class alone" in found.warnings[-1]


@pytest.mark.parametrize("kind", ["cell", "shared", "rows"])
def test_what_a_file_declares_beyond_reason_is_refused(tmp_path, kind):
    path = tmp_path / "t.parquet"
    if kind == "cell":  # one cell of 64 MB, packed in a few kB
        pq.write_table(pa.table({"image": [bytes(64 << 20)]}), path, compression="zstd")
    elif kind == "shared":  # a value that many rows share
        column = pa.DictionaryArray.from_arrays(np.zeros(1000, np.int32), [bytes(40 << 20)])
        pq.write_table(pa.table({"image": column}), path, compression="zstd")
    else:
        column = pa.DictionaryArray.from_arrays(np.zeros(3_000_000, np.int32), [PICTURES[0]])
        pq.write_table(pa.table({"image": column, "label": column.indices}), path)
    assert path.stat().st_size < 300_000
    with pytest.raises(SourceError, match=r"declares .* rows.*expected images that fit into the"):
        read(path)


def test_a_large_value_that_many_rows_share_is_read_a_few_at_a_time(tmp_path, monkeypatch):
    column = pa.DictionaryArray.from_arrays(np.zeros(500, np.int32), [np.random.bytes(1 << 20)])
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet", compression="none")
    monkeypatch.setattr(parquet, "READ_BYTES", 4 << 20)
    table = pq.ParquetFile(tmp_path / "t.parquet")
    sizes = {len(batch) for batch in parquet._batches(table, 0, "image", parquet.BATCH)}
    assert max(sizes) <= 4
