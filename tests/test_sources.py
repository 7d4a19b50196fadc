"""The four sources: what they find, in which order, and what they say when there is nothing to
find.
"""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_views import GOLDEN, digest

from stages.sources import Sample, SourceError, folder, hub, parquet, shapes
from stages.sources._tables import find_columns, number_labels
from workflow import plugins

DATA = {"image_size": 24, "store_size": None, "seed": 0, "image_column": None, "label_column": None}


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, data: bytes | None = None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data)


def names(listing) -> list[str]:
    return [sample.name for sample in listing.read(np.arange(len(listing)))]


# --------------------------------------------------------------------------------------------------
# folder


def read_folder(path, **options):
    return folder.read(str(path), folder.Config(**options), DATA)


def test_folder_with_classes(tmp_path):
    for name in (
        "dog/b.JPG",
        "dog/a.png",
        "cat/deep/c.webp",
        "cat/.h.png",
        "cat/readme.txt",
        ".git/x.png",
    ):
        put(tmp_path / name)
    put(tmp_path / "loose.png")
    (tmp_path / "empty").mkdir()
    found = read_folder(tmp_path)
    assert found.classes == ["cat", "dog"] and list(found.splits) == ["train"]
    assert found.splits["train"].labels.tolist() == [0, 1, 1]
    assert names(found.splits["train"]) == ["cat/deep/c.webp", "dog/a.png", "dog/b.JPG"]
    assert found.ignored == {".txt": 1, "hidden": 1, "image outside a class folder": 1}


def test_folder_reads_chosen_rows_only_and_late(tmp_path):
    for i in range(5):
        put(tmp_path / f"{i}.png", png(i))
    listing = read_folder(tmp_path).splits["train"]
    (tmp_path / "3.png").unlink()
    samples = list(listing.read(np.array([1, 3])))
    assert [s.name for s in samples] == ["1.png", "3.png"] and samples[0].image == png(1)
    assert samples[1].problem == "No such file or directory"


def test_folder_with_splits_in_any_spelling(tmp_path):
    for name in ("Train/a/1.png", "train.txt", "validation/a/2.png", "test/a/3.png", "extra/4.png"):
        put(tmp_path / name)
    found = read_folder(tmp_path)
    assert {s: names(listing) for s, listing in found.splits.items()} == {
        "train": ["a/1.png"], "val": ["a/2.png"], "test": ["a/3.png"]
    }  # fmt: skip
    assert any("extra" in text for text in found.warnings)


def test_flat_folders_are_unlabelled(tmp_path):
    put(tmp_path / "flat" / "1.png")
    put(tmp_path / "split" / "train" / "1.png")
    put(tmp_path / "split" / "test" / "2.png")
    put(tmp_path / "nested" / "2024" / "1.png")
    for path, options in (("flat", {}), ("split", {}), ("nested", {"labels": False})):
        found = read_folder(tmp_path / path, **options)
        assert found.classes == [] and all((s.labels == -1).all() for s in found.splits.values())


def test_folder_follows_links_out_but_not_round_in_circles(tmp_path):
    put(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in" / "a")
    assert names(read_folder(tmp_path / "in").splits["train"]) == ["a/out/1.png"]


def test_folder_errors(tmp_path):
    put(tmp_path / "photos" / "readme.md")
    put(tmp_path / "only" / "test" / "a" / "1.png")
    put(tmp_path / "two" / "val" / "1.png")
    put(tmp_path / "two" / "valid" / "1.png")
    put(tmp_path / "odd" / "train" / "dogs" / "1.png")
    put(tmp_path / "odd" / "test" / "dog" / "1.png")
    put(tmp_path / "set.zip")
    for path, message in (
        ("photo", "no folder .*photo; did you mean 'photos'"),
        ("photos", r"no images, found 1 \.md; expected"),
        ("only", "no folder 'train'"),
        ("two", "both mean the split 'val'"),
        ("odd", "test has the class 'dog', which train has not; did you mean 'dogs'"),
        ("set.zip", "is a file, expected a folder"),
    ):
        with pytest.raises(SourceError, match=message):
            read_folder(tmp_path / path)


# --------------------------------------------------------------------------------------------------
# parquet


def write(path, columns: dict, features: dict | None = None, **options):
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def images(n: int, start: int = 0) -> list[dict]:
    return [{"bytes": png(start + i), "path": f"dir/{start + i}.png"} for i in range(n)]


HF = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def read_parquet(path, **data):
    return parquet.read(str(path), parquet.Config(), {**DATA, **data})


def test_parquet_folder_with_splits_and_class_names(tmp_path):
    write(
        tmp_path / "train-00000-of-00002.parquet",
        {"image": images(5), "label": [0, 1, 0, 1, -1]},
        HF,
    )
    write(
        tmp_path / "train-00001-of-00002.parquet",
        {"image": images(3, 5), "label": [1, 1, None]},
        HF,
    )
    write(
        tmp_path / "validation-00000-of-00001.parquet", {"image": images(2, 8), "label": [0, 1]}, HF
    )
    found = read_parquet(tmp_path)
    assert found.classes == ["cat", "dog"] and list(found.splits) == ["train", "val"]
    assert found.splits["train"].labels.tolist() == [0, 1, 0, 1, -1, 1, 1, -1]
    samples = list(found.splits["train"].read(np.array([0, 4, 5, 7])))
    assert [s.name for s in samples] == ["0:0.png", "4:4.png", "5:5.png", "7:7.png"]
    assert [s.image for s in samples] == [png(i) for i in (0, 4, 5, 7)]


def test_parquet_rows_across_row_groups_and_batches(tmp_path):
    write(tmp_path / "x.parquet", {"img": images(200)}, row_group_size=90)
    listing = read_parquet(tmp_path / "x.parquet").splits["train"]
    rows = np.array([0, 63, 64, 89, 90, 153, 154, 199])
    assert [s.image for s in listing.read(rows)] == [png(int(r)) for r in rows]
    assert [s.name for s in listing.read(rows)] == [f"{r}:{r}.png" for r in rows]


def test_parquet_columns_are_found_or_named(tmp_path):
    path = tmp_path / "a.parquet"
    raw = [png(0), png(1), None]
    write(
        path,
        {
            "id": [1, 2, 3],
            "photo": raw,
            "weather": ["rain", "sun", "rain"],
            "category": ["b", "a", ""],
        },
    )
    found = read_parquet(path)
    assert found.classes == ["a", "b"] and found.splits["train"].labels.tolist() == [1, 0, -1]
    samples = list(found.splits["train"].read(np.arange(3)))
    assert samples[1].image == png(1) and samples[2].problem == "no bytes in the table"
    named = read_parquet(path, image_column="photo", label_column="weather")
    assert named.classes == ["rain", "sun"] and named.splits["train"].labels.tolist() == [0, 1, 0]


def test_parquet_plain_numbers_become_classes(tmp_path):
    write(tmp_path / "train.parquet", {"image": images(3), "label": [30, 7, 30]})
    write(tmp_path / "test.parquet", {"image": images(1), "label": [7]})
    found = read_parquet(tmp_path)
    assert found.classes == ["7", "30"] and found.splits["train"].labels.tolist() == [1, 0, 1]
    assert found.splits["test"].labels.tolist() == [0]


def test_parquet_in_subfolders(tmp_path):
    write(tmp_path / "hub" / "data" / "test-0.parquet", {"image": images(1)})
    write(tmp_path / "hub" / "data" / "train-0.parquet", {"image": images(2)})
    write(tmp_path / "export" / "train" / "0000.parquet", {"image": images(2)})
    write(tmp_path / "export" / "test" / "0000.parquet", {"image": images(1)})
    write(tmp_path / "plain" / "part-0.parquet", {"image": images(1)})
    write(tmp_path / "plain" / "part-1.parquet", {"image": images(1)})
    sizes = {
        d: {s: len(x) for s, x in read_parquet(tmp_path / d).splits.items()}
        for d in ("hub", "export", "plain")
    }
    assert sizes == {
        "hub": {"train": 2, "test": 1},
        "export": {"train": 2, "test": 1},
        "plain": {"train": 2},
    }


def test_parquet_never_follows_a_path(tmp_path):
    put(tmp_path / "secret.png")
    write(
        tmp_path / "a.parquet", {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    )
    (sample,) = read_parquet(tmp_path / "a.parquet").splits["train"].read(np.arange(1))
    assert sample == Sample("0:secret.png", b"", problem="no bytes in the table")


def test_parquet_errors(tmp_path):
    write(tmp_path / "text.parquet", {"text": ["a"], "n": [1.0]})
    write(tmp_path / "two.parquet", {"left": images(1), "right": images(1)})
    write(tmp_path / "unknown" / "train.parquet", {"image": images(1), "label": ["cats"]})
    write(tmp_path / "unknown" / "test.parquet", {"image": images(1), "label": ["cat"]})
    write(tmp_path / "mixed" / "train-0.parquet", {"image": images(1), "label": [0]})
    write(tmp_path / "mixed" / "train-1.parquet", {"image": images(1)})
    write(tmp_path / "late" / "test.parquet", {"image": images(1)})
    write(tmp_path / "range.parquet", {"image": images(2), "label": [0, 2]}, HF)
    put(tmp_path / "fake.parquet", b"not parquet")
    put(tmp_path / "none" / "a.csv", b"")
    for path, data, message in (
        ("texts.parquet", {}, "no file or folder .*did you mean 'text.parquet'"),
        ("text.parquet", {}, r"no image column, found text \(string\), n \(float\)"),
        (
            "text.parquet",
            {"image_column": "text"},
            "data.image_column: column 'text'.*holds string",
        ),
        ("two.parquet", {}, r"several columns could be meant \(left, right\).*data.image_column"),
        (
            "two.parquet",
            {"image_column": "lift"},
            "no column 'lift', found left, right; did you mean 'left'",
        ),
        (
            "two.parquet",
            {"image_column": "left", "label_column": "right"},
            "data.label_column.*expected class names",
        ),
        ("unknown", {}, "test has the label 'cat'.*did you mean 'cats'"),
        ("mixed", {}, r"train-1.parquet: no column 'label', found image \(train-0"),
        ("late", {}, "expected files train-"),
        ("range.parquet", {}, "train has the label 2, which is not among the 2 classes"),
        ("fake.parquet", {}, "not a parquet file"),
        ("none", {}, r"no \*.parquet files, found a.csv"),
    ):
        with pytest.raises(SourceError, match=message):
            read_parquet(tmp_path / path, **data)


def test_columns_by_usual_names_before_others():
    kinds = {"mask": "image", "image": "image", "species": "class", "label": "class", "y": "int"}
    assert find_columns("x", kinds, None, None) == ("image", "label")
    assert find_columns("x", {"scan": "image", "grade": "class"}, None, None) == ("scan", "grade")
    assert find_columns("x", {"scan": "image", "width": "int"}, None, None) == ("scan", None)
    with pytest.raises(SourceError, match="fine, coarse"):
        find_columns("x", {"image": "image", "fine": "class", "coarse": "class"}, None, None)


def test_labels_of_all_splits_share_one_numbering():
    labels, classes = number_labels("x", {"train": ["b", "a", None, "b"], "test": ["a"]}, None)
    assert (
        classes == ["a", "b"]
        and labels["train"].tolist() == [1, 0, -1, 1]
        and labels["test"].tolist() == [0]
    )


# --------------------------------------------------------------------------------------------------
# what each says of itself


def test_every_source_says_what_follows_the_colon():
    arguments = {}
    for name in plugins.names("source"):
        module = plugins.module("source", name)
        arguments[name] = plugins.declared("source", name).literals["ARGUMENT"]
        assert arguments[name] == module.ARGUMENT and arguments[name] in ("PATH", "NAME", None)
    known = {"folder": "PATH", "hub": "NAME", "parquet": "PATH"}
    known |= {"shapes": None, "surfaces": None}
    assert {name: arguments[name] for name in known} == known


# --------------------------------------------------------------------------------------------------
# shapes


def render(index, split="train", seed=0, size=24, **options):
    return shapes.render(seed, split, np.asarray(index), size, shapes.Config(**options))


def test_every_image_is_a_function_of_seed_split_and_index():
    together, masks = render(range(30))
    for i in (0, 7, 29):
        alone, mask = render([i])
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_array_equal(mask[0], masks[i])
    backwards, _ = render(range(29, -1, -1))
    np.testing.assert_array_equal(backwards[::-1], together)
    for other in (render(range(30), seed=1), render(range(30), split="test")):
        assert (other[0] != together).reshape(30, -1).any(1).all()


def test_the_same_seeds_give_the_same_scenes_as_ever():
    """tests/golden/pixels.json: digests by the first release's code."""
    assert digest(*render(range(12))) == GOLDEN["shapes"]
    # of these some pixels change when a texture is drawn in float32
    found = *render([233, 428, 777, 918], size=24), *render([439, 675, 791, 969], size=32)
    assert digest(*found) == GOLDEN["shapes, float64"]


def test_boxes_are_the_extent_of_masks_and_labels_their_value():
    found = shapes.read(None, shapes.Config(train=60, val=0, test=12), DATA)
    assert list(found.splits) == ["train", "test"] and len(found.classes) == 10
    listing = found.splits["train"]
    assert np.bincount(listing.labels).tolist() == [6] * 10
    for label, sample in zip(listing.labels, listing.read(np.arange(60)), strict=True):
        (box,) = sample.boxes
        assert set(np.unique(sample.mask)) == {0, label + 1} and box[4] == label
        x, y, w, h = box[:4]
        inside = np.zeros_like(sample.mask, bool)
        inside[y : y + h, x : x + w] = True
        assert not sample.mask[~inside].any()
        for edge in (
            sample.mask[y],
            sample.mask[y + h - 1],
            sample.mask[:, x],
            sample.mask[:, x + w - 1],
        ):
            assert edge.any()
        assert sample.image.shape == (24, 24, 3) and sample.image.dtype == np.uint8


def test_chosen_rows_are_the_same_images():
    listing = shapes.read(None, shapes.Config(train=50), DATA).splits["train"]
    everything = list(listing.read(np.arange(50)))
    for row, sample in zip((3, 49), listing.read(np.array([3, 49])), strict=True):
        assert sample.name == everything[row].name
        np.testing.assert_array_equal(sample.image, everything[row].image)


def test_only_shape_tells_the_class():
    """Colours of object and ground and the place of an object say nothing of its class; its outline
    does.
    """
    count, classes = 1000, 10
    pictures, masks = render(range(count), clutter=0.0, turn=180.0)
    labels = np.arange(count) % classes
    colour = np.array(
        [image[mask > 0].mean(0) for image, mask in zip(pictures, masks, strict=True)]
    )
    place = np.array([np.argwhere(mask).mean(0) for mask in masks])
    ground = np.array(
        [image[mask == 0].mean(0) for image, mask in zip(pictures, masks, strict=True)]
    )
    for facts in (colour, place, ground):
        between = np.stack([facts[labels == k].mean(0) for k in range(classes)]).var(0)
        expected = facts.var(0) / (
            count / classes
        )  # variance of a mean of 100 when the class says nothing
        assert (between < 2.5 * expected).all(), (between / expected).round(2)
    compact = [(mask > 0).sum() / np.prod(shapes.extent(mask)[2:]) for mask in masks]
    by_class = np.array([np.mean(np.array(compact)[labels == k]) for k in range(classes)])
    assert by_class.max() - by_class.min() > 0.2


def test_edges_are_smooth_and_images_use_their_range():
    pictures, masks = render(range(40), size=48)
    assert (
        pictures.min() == 0 and pictures.max() == 255 and pictures.reshape(40, -1).std(1).min() > 5
    )
    cover = shapes._average(np.tril(np.ones((1, 12, 12), bool)))
    assert (
        cover.shape == (1, 4, 4)
        and 0 < cover[0, 1, 1] < 1
        and cover[0, 2, 0] == 1
        and cover[0, 0, 2] == 0
    )
    assert (np.array([(m > 0).mean() for m in masks]) > 0.01).all()


def test_size_follows_the_data_section_and_masks_scale():
    sample = next(
        shapes.read(None, shapes.Config(), {**DATA, "store_size": 40})
        .splits["train"]
        .read(np.array([0]))
    )
    small = next(shapes.read(None, shapes.Config(), DATA).splits["train"].read(np.array([0])))
    assert sample.image.shape == (40, 40, 3) and small.mask.shape == (24, 24)
    assert (sample.mask > 0).mean() == pytest.approx((small.mask > 0).mean(), abs=0.03)


@pytest.mark.parametrize(
    "key, value",
    [("train", 0), ("val", -1), ("classes", 1), ("classes", 13), ("clutter", 1.5), ("turn", 270)],
)
def test_shapes_options_are_checked(key, value):
    with pytest.raises(ValueError, match=f"{key}: found {value}"):
        shapes.Config(**{key: value})


# --------------------------------------------------------------------------------------------------
# hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache of our own, and no network."""
    datasets, hf = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hf.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hf.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_hub_from_the_cache_without_network(cache):
    folder_ = cache / "datasets--someone--pets"
    commit = "0123456789abcdef0123456789abcdef01234567"
    data = folder_ / "snapshots" / commit / "data"
    features = {"photo": {"_type": "Image"}, "label": HF["label"]}
    write(
        data / "train-00000-of-00001.parquet", {"photo": images(70), "label": [0, 1] * 35}, features
    )
    write(
        data / "test-00000-of-00001.parquet",
        {"photo": images(3, 70), "label": [1, 0, -1]},
        features,
    )
    put(folder_ / "refs" / "main", commit.encode())
    found = hub.read("someone/pets", hub.Config(), DATA)
    assert found.classes == ["cat", "dog"] and {s: len(x) for s, x in found.splits.items()} == {
        "train": 70,
        "test": 3,
    }
    assert found.splits["test"].labels.tolist() == [1, 0, -1]
    samples = list(found.splits["train"].read(np.array([0, 63, 64, 69])))
    assert [s.image for s in samples] == [png(i) for i in (0, 63, 64, 69)]
    assert [s.name for s in samples] == ["0:0.png", "63:63.png", "64:64.png", "69:69.png"]


def test_hub_without_network_or_cache_says_what_to_do(cache):
    with pytest.raises(
        SourceError,
        match="hub:someone/nothing cannot be read: the hub cannot be reached.*hf download",
    ):
        hub.read("someone/nothing", hub.Config(), DATA)


def test_hub_that_does_not_answer_is_given_up(monkeypatch):
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(hub, "PATIENCE", 0.05)

    def silent(*args, **options):
        time.sleep(1)
        raise OSError("timed out")

    monkeypatch.setattr(hub.socket, "create_connection", silent)
    assert hub.reachable() is False


@pytest.mark.parametrize("name", ["", "/data/set", "./set", "a/b/c"])
def test_hub_ids_are_checked(name):
    with pytest.raises(SourceError, match="hub:owner/name"):
        hub.read(name, hub.Config(), DATA)
