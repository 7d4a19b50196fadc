"""The data stage: splits, statistics, hash, duplicates, quarantine, and the store that later stages
read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile
from torchvision import transforms

from stages import data as stage
from stages.kit.data.decode import Broken, decode, decode_mask, encode_png, square, square_boxes
from stages.kit.data.store import Split, info
from stages.kit.data.tally import duplicates
from stages.kit.data.threads import ordered_map
from stages.kit.data.writer import NpyWriter, SplitWriter
from stages.sources import Found, Listing, Sample, SourceError
from stages.sources._splits import assign

DATA = {
    "image_size": 16,
    "store_size": None,
    "val_fraction": 0.25,
    "test_fraction": 0.25,
    "max_train": None,
    "seed": 0,
    "normalise": "dataset",
    "quarantine_limit": 0.5,
    "memory_map_gb": 8,
    "image_column": None,
    "label_column": None,
}


def picture(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def folder(root: Path, classes: int = 2, each: int = 8) -> Path:
    for k in range(classes):
        for i in range(each):
            path = root / f"class{k}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture(100 * k + i)))
    return root


def build(root: Path, out: Path, options: dict | None = None, **changes) -> tuple[dict, dict]:
    """Run the stage on a folder; returns its summary and data.json."""
    out.mkdir(parents=True, exist_ok=True)
    source = {"name": "folder", "argument": str(root), "config": options or {}}
    summary = stage.build({**DATA, **changes}, source, out, out.parent / "work", threads=2)
    return summary, info(out)


def shapes(out: Path, **changes) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    source = {"name": "shapes", "argument": None, "config": {"train": 24, "val": 10, "test": 10}}
    stage.build({**DATA, **changes}, source, out, out.parent / "work", threads=2)
    return info(out)


def digests(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# --------------------------------------------------------------------------------------------------
# decoding


def gif() -> bytes:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue", "lime")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: to be shown turned by 90 degrees clockwise
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, :10] = 255  # left half white
    return encode(image, "PNG", exif=exif)


def palette_with_alpha() -> bytes:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 4))  # the upper half is transparent, black beneath
    return encode(image.quantize(4), "PNG")


CONVERTED = [
    # name, file, notes, ((y, x), expected colour, tolerance)
    (
        "cmyk",
        encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
        ("cmyk",),
        ((4, 4), (255, 0, 0), 30),
    ),
    (
        "16-bit",
        encode(Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))),
        ("16-bit",),
        ((0, 0), (128,) * 3, 0),
    ),
    (
        "palette",
        encode(Image.new("RGB", (8, 8), "blue").quantize(4)),
        ("palette",),
        ((0, 0), (0, 0, 255), 0),
    ),
    ("palette+alpha", palette_with_alpha(), ("palette", "alpha"), ((0, 0), (255, 255, 255), 0)),
    ("palette+alpha, opaque", palette_with_alpha(), ("palette", "alpha"), ((7, 7), (255, 0, 0), 0)),
    (
        "alpha",
        encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        ("alpha",),
        ((0, 0), (255, 255, 255), 0),
    ),
    (
        "half alpha",
        encode(Image.new("RGBA", (8, 8), (0, 0, 0, 51))),
        ("alpha",),
        ((0, 0), (204,) * 3, 1),
    ),
    ("grey", encode(Image.new("L", (8, 8), 77)), ("grey",), ((0, 0), (77,) * 3, 0)),
    ("bilevel", encode(Image.new("1", (8, 8), 1)), ("grey",), ((0, 0), (255,) * 3, 0)),
    ("animated", gif(), ("animated",), ((0, 0), (255, 0, 0), 0)),
    (
        "float",
        encode(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
        ("float",),
        ((0, 0), (128,) * 3, 0),
    ),
    ("exif, upper half", turned(), ("rotated",), ((2, 5), (255,) * 3, 0)),
    ("exif, lower half", turned(), ("rotated",), ((17, 5), (0,) * 3, 0)),
    ("plain", encode(np.full((8, 8, 3), 9, np.uint8)), (), ((0, 0), (9,) * 3, 0)),
]


@pytest.mark.parametrize("name, data, notes, at", CONVERTED, ids=[row[0] for row in CONVERTED])
def test_convertible_images_are_converted(name, data, notes, at):
    image, found = decode(data)
    (y, x), colour, tolerance = at
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert set(notes) <= set(found) and ("palette" in found or found == notes)
    assert np.abs(image[y, x].astype(int) - colour).max() <= tolerance


def bomb() -> bytes:
    data = bytearray(encode(np.zeros((4, 4, 3), np.uint8)))
    data[16:24] = (60000).to_bytes(4, "big") * 2  # width and height in the PNG's header
    header = bytes(data[12:29])
    data[29:33] = zlib.crc32(header).to_bytes(4, "big")
    return bytes(data)


JPEG = encode(picture(1, 64, 64), "JPEG")
BROKEN = [
    ("empty", b"", "empty"),
    ("text", b"this is not an image at all", "not an image"),
    ("html called jpg", b"<html>404</html>", "not an image"),
    ("truncated jpeg", JPEG[: len(JPEG) // 2], "truncated"),
    ("truncated png", encode(picture(1, 64, 64))[:-500], "truncated"),
    ("bomb", bomb(), "too many pixels"),
    ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ("nan", encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "damaged"),
    ("unknown scale", encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "damaged"),
]


@pytest.mark.parametrize("name, data, reason", BROKEN, ids=[row[0] for row in BROKEN])
def test_broken_images_have_a_reason(name, data, reason):
    with pytest.raises(Broken) as error:
        decode(data)
    assert error.value.reason == reason and error.value.detail


def test_size_is_checked_before_unpacking(monkeypatch):
    data = encode(np.zeros((10, 20, 3), np.uint8))
    assert decode(data, max_pixels=200)[0].shape == (10, 20, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(Broken, match="20 x 10"):
        decode(data, max_pixels=199)


@pytest.mark.parametrize(
    "height, width, size", [(20, 24, 16), (31, 17, 8), (10, 10, 32), (7, 50, 16), (16, 16, 16)]
)
def test_square_equals_torchvision(height, width, size):
    image = picture(3, height, width)
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(size, bicubic), transforms.CenterCrop(size)])
    np.testing.assert_array_equal(square(image, size), np.asarray(theirs(Image.fromarray(image))))


@pytest.mark.parametrize("height, width, size", [(20, 24, 16), (31, 17, 7), (64, 64, 56)])
def test_square_of_a_larger_resize_equals_torchvision(height, width, size):
    """The published evaluation: short side to int(size / 0.875), then the centre."""
    image, short = picture(3, height, width), int(size / 0.875)
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(short, bicubic), transforms.CenterCrop(size)])
    found = square(image, size, short=short)
    np.testing.assert_array_equal(found, np.asarray(theirs(Image.fromarray(image))))
    if short == height == width:
        np.testing.assert_array_equal(found, image[4:60, 4:60])


def test_square_of_an_endless_strip_is_cheap_and_central():
    image = np.zeros((2, 400_000, 3), np.uint8)
    image[:, 200_000 - 1 : 200_000 + 1] = 255
    assert (square(image, 32)[:, 4:28] > 200).all()
    assert square(image[..., 0], 4, nearest=True).shape == (4, 4)


def test_ordered_map_keeps_order_bounds_what_is_in_flight_and_passes_errors():
    taken = []
    results = ordered_map(lambda x: x * x, (taken.append(i) or i for i in range(1000)), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4] and len(taken) < 40
    assert list(results) == [i * i for i in range(3, 1000)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda x: 1 // x, [1, 0, 1], threads=2))
    assert list(ordered_map(str, range(3), threads=0)) == ["0", "1", "2"]


def test_a_mask_as_a_file_is_the_same_mask():
    mask = np.random.default_rng(0).integers(0, 256, (13, 7), np.uint8)
    np.testing.assert_array_equal(decode_mask(encode_png(mask)), mask)


@pytest.mark.parametrize(
    "height, width, size", [(20, 24, 16), (31, 17, 8), (16, 16, 16), (4, 80, 6)]
)
def test_boxes_move_with_the_pixels_of_the_square(height, width, size):
    """A bright block of the image lies in the square where its box is said to lie."""
    image, top, left = np.zeros((height, width), np.uint8), height // 4, width // 2 - 2
    image[top : top + height // 2, left : left + 4] = 255
    box = np.array([[left, top, 4, height // 2, 3]], np.float64)
    x, y, w, h, kind = square_boxes(box, height, width, size)[0]
    assert kind == 3
    small = square(np.kron(image, np.ones((8, 8), np.uint8)), 8 * size, nearest=True)
    rows, columns = np.flatnonzero(small.any(1)), np.flatnonzero(small.any(0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 8
    assert np.abs(found - np.clip([x, y, x + w, y + h], 0, size)).max() < 0.6


# --------------------------------------------------------------------------------------------------
# splits


def listing(labels: list[int], names: list[str] | None = None) -> Listing:
    return Listing(np.array(labels, np.int64), lambda rows: iter(()), names)


def parts(labels: list[int], **changes) -> np.ndarray:
    return assign(Found({"train": listing(labels)}, []), {**DATA, **changes}).parts["train"]


def test_carved_splits_are_stratified_and_of_the_right_size():
    labels = np.repeat([0, 1, 2], [100, 40, 20])
    part = parts(labels.tolist(), test_fraction=0.2, val_fraction=0.1)
    assert [int((part == k).sum()) for k in range(3)] == [
        115,
        13,
        32,
    ]  # 20 % of 160, then 10 % of 128
    for k, n in ((0, 100), (1, 40), (2, 20)):
        assert abs(int((part[labels == k] == 2).sum()) - 0.2 * n) <= 1
        assert abs(int((part[labels == k] == 1).sum()) - 0.08 * n) <= 1


def test_many_small_classes_still_give_a_val_split():
    labels = np.repeat(np.arange(40), 3)
    part = parts(labels.tolist(), test_fraction=0.2, val_fraction=0.1)
    assert int((part == 2).sum()) == 24 and int((part == 1).sum()) in (9, 10)
    assert set(labels[part == 0]) == set(range(40))  # no class lost from train


def test_the_only_image_of_a_class_stays_in_train():
    labels = [0] * 20 + [1]
    assert all(parts(labels, seed=seed, test_fraction=0.5)[-1] == 0 for seed in range(8))


def test_assignment_depends_on_names_and_seed_only():
    names = [f"{i}.png" for i in range(60)]
    found = Found({"train": listing([-1] * 60, names)}, [])
    turned = Found({"train": listing([-1] * 60, names[::-1])}, [])
    one, two = (assign(f, DATA).parts["train"] for f in (found, turned))
    np.testing.assert_array_equal(one, two[::-1])
    assert (assign(found, {**DATA, "seed": 1}).parts["train"] != one).any()


def test_given_splits_are_kept_and_val_comes_from_train():
    found = Found({"train": listing([0, 1] * 20), "test": listing([0, 1] * 5)}, ["a", "b"])
    chosen = assign(found, DATA).parts
    assert (chosen["test"] == 2).all() and not (chosen["train"] == 2).any()
    assert int((chosen["train"] == 1).sum()) == 10


def test_an_unlabelled_test_split_beside_labels_is_replaced_with_a_warning():
    found = Found({"train": listing([0, 1] * 20), "test": listing([-1] * 10)}, ["a", "b"])
    chosen = assign(found, DATA)
    assert (chosen.parts["test"] == -1).all() and (chosen.parts["train"] == 2).sum() == 10
    assert any("test" in text and "no labels" in text for text in chosen.warnings)


def test_max_train_is_balanced_nested_and_leaves_the_other_splits():
    labels = np.repeat([0, 1, 2], [60, 30, 6])
    full = parts(labels.tolist())
    few, more = (parts(labels.tolist(), max_train=n) for n in (9, 30))
    assert np.bincount(labels[few == 0]).tolist() == [3, 3, 3]
    assert int((more == 0).sum()) == 30 and set(np.flatnonzero(few == 0)) < set(
        np.flatnonzero(more == 0)
    )
    for k in (1, 2):
        np.testing.assert_array_equal(few == k, full == k)


def test_no_train_left_is_an_error():
    with pytest.raises(SourceError, match="data.test_fraction"):
        assign(Found({"train": listing([])}, []), DATA)


# --------------------------------------------------------------------------------------------------
# stage


def test_statistics_are_of_train_alone(tmp_path):
    _, facts = build(folder(tmp_path / "in"), tmp_path / "out")
    train = Split.open(tmp_path / "out", "train")
    pixels = torch.from_numpy(np.array(train.images)).double() / 255
    assert facts["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-6)
    assert facts["std"] == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist(), abs=1e-6)
    _, other = build(tmp_path / "in", tmp_path / "other", normalise="imagenet")
    assert other["mean"] == [0.485, 0.456, 0.406] and other["hash"] == facts["hash"]


def test_stored_rows_are_the_source_images(tmp_path):
    root = folder(tmp_path / "in")
    _, facts = build(root, tmp_path / "out")
    assert facts["classes"] == ["class0", "class1"] and facts["source"] == "folder:in"
    assert {s: f["count"] for s, f in facts["splits"].items()} == {"train": 9, "val": 3, "test": 4}
    for name in facts["splits"]:
        split = Split.open(tmp_path / "out", name)
        assert (
            facts["splits"][name]["class_counts"] == np.bincount(split.labels, minlength=2).tolist()
        )
        for i, path in enumerate(split.names()):
            image = np.asarray(Image.open(root / path).convert("RGB"))
            np.testing.assert_array_equal(split.images[i], square(image, 16))
            assert facts["classes"][split.labels[i]] == path.split("/")[0]
    assert not (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_parquet_is_what_datasets_reads(tmp_path):
    datasets = pytest.importorskip("datasets")
    facts = shapes(tmp_path / "out")
    files = {"train": str(tmp_path / "out" / "train-*.parquet")}
    table = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    split = Split.open(tmp_path / "out", "train")
    assert (
        isinstance(table.features["image"], datasets.Image)
        and table.features["label"].names == facts["classes"]
    )
    assert list(table["label"]) == split.labels.tolist()
    for i in (0, 23):
        np.testing.assert_array_equal(np.asarray(table[i]["image"]), split.images[i])
        assert table[i]["label"] == split.labels[i]
        ys, xs = np.nonzero(split.masks[i])
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        assert table[i]["objects"]["bbox"] == [box] and table[i]["objects"]["category"] == [
            split.labels[i]
        ]


def test_two_runs_give_the_same_bytes(tmp_path):
    root = folder(tmp_path / "in")
    (root / "class0" / "bad.jpg").write_bytes(b"no")
    for mode, gigabytes in (("memmap", 8), ("shards", 0)):
        outs = [tmp_path / f"{mode}{k}" / "out" for k in range(2)]
        facts = [build(root, out, memory_map_gb=gigabytes)[1] for out in outs]
        assert facts[0] == facts[1] and facts[0]["mode"] == mode
        assert digests(outs[0]) == digests(outs[1])
        assert not any(
            str(tmp_path).encode() in path.read_bytes()
            for path in outs[0].rglob("*")
            if path.is_file()
        )


def test_hash_follows_content_not_packing(tmp_path):
    root = folder(tmp_path / "in")
    plain = build(root, tmp_path / "a")[1]["hash"]
    assert build(root, tmp_path / "b", image_size=8, memory_map_gb=0)[1]["hash"] == plain
    path = root / "class1" / "3.png"
    path.write_bytes(
        encode(picture(103), "PNG", compress_level=0)
    )  # the same pixels in other bytes
    assert build(root, tmp_path / "c")[1]["hash"] == plain
    image = picture(103).copy()
    image[0, 0, 0] ^= 1
    path.write_bytes(encode(image))
    assert build(root, tmp_path / "d")[1]["hash"] != plain
    path.write_bytes(encode(picture(103)))
    (root / "class1").rename(root / "other")
    assert build(root, tmp_path / "e")[1]["hash"] != plain


class Drawn:
    """A source of pictures with masks and boxes, which may be changed before they are stored."""

    def __init__(self, monkeypatch, masks: bool = True, boxes: bool = True):
        self.samples = [
            Sample(
                f"{i}.png",
                picture(i),
                picture(i)[..., 0] // 64 if masks else None,
                tuple((1.0 * k, 2, 3.5, 4, k) for k in range(i % 3)) if boxes else (),
            )
            for i in range(12)
        ]
        self.labels = np.arange(12) % 2
        self.fields = {"masks": masks, "boxes": boxes}
        monkeypatch.setattr(stage, "find", self.find)

    def find(self, data: dict, source: dict) -> Found:
        read = lambda rows: (self.samples[row] for row in rows)  # noqa: E731
        return Found({"train": Listing(self.labels, read, **self.fields)}, ["a", "b"])

    def build(self, out: Path, **changes) -> dict:
        out.mkdir(parents=True, exist_ok=True)
        source = {"name": "drawn", "argument": None, "config": {}}
        data = {**DATA, "source": "drawn", **changes}
        stage.build(data, source, out, out.parent / "work", threads=1)
        return info(out)

    def change(self, row: int, **fields) -> None:
        self.samples[row] = dataclasses.replace(self.samples[row], **fields)


def test_labels_enter_the_hash(tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch, masks=False, boxes=False)
    plain = drawn.build(tmp_path / "a")["hash"]
    drawn.labels = np.roll(drawn.labels, 1)
    assert drawn.build(tmp_path / "b", test_fraction=0.25)["hash"] != plain


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_enter_the_hash_with_and_without_masks(tmp_path, monkeypatch, masks):
    drawn = Drawn(monkeypatch, masks=masks)
    plain = drawn.build(tmp_path / "a")["hash"]
    assert drawn.build(tmp_path / "b", memory_map_gb=0, image_size=8)["hash"] == plain
    found = {plain}
    for k, boxes in enumerate([((0, 2, 3.5, 4, 1),), ((0, 2, 3, 4, 0),), ((1, 2, 3.5, 4, 0),), ()]):
        drawn.change(1, boxes=boxes)  # has the box (0, 2, 3.5, 4, 0)
        found.add(drawn.build(tmp_path / str(k))["hash"])
    assert len(found) == 5


@pytest.mark.parametrize("boxes", [True, False])
def test_masks_enter_the_hash_with_and_without_boxes(tmp_path, monkeypatch, boxes):
    drawn = Drawn(monkeypatch, boxes=boxes)
    plain = drawn.build(tmp_path / "a")["hash"]
    assert drawn.build(tmp_path / "b", memory_map_gb=0, image_size=8)["hash"] == plain
    mask = drawn.samples[1].mask.copy()
    mask[0, 0] ^= 1  # which the small square may not even show
    drawn.change(1, mask=mask)
    assert drawn.build(tmp_path / "c")["hash"] != plain


@pytest.mark.parametrize("gigabytes", [8, 0])
def test_masks_and_boxes_belong_to_what_decode_gives(tmp_path, monkeypatch, gigabytes):
    drawn = Drawn(monkeypatch)
    facts = drawn.build(tmp_path / "out", memory_map_gb=gigabytes)
    given = {sample.name: sample for sample in drawn.samples}
    assert all(part["fields"] == ["masks", "boxes"] for part in facts["splits"].values())
    seen = 0
    for name in facts["splits"]:
        split = Split.open(tmp_path / "out", name)
        for i, path in enumerate(split.names()):
            sample, mask, boxes = given[path], split.mask(i), split.boxes(i)
            assert mask.shape == split.decode(i).shape[:2] and mask.dtype == np.uint8
            expected = np.array(sample.boxes, np.float64).reshape(-1, 5)
            if gigabytes:
                expected = square_boxes(expected, 20, 24, 16)
                np.testing.assert_array_equal(mask, square(sample.mask, 16, nearest=True))
            else:
                np.testing.assert_array_equal(mask, sample.mask)
            np.testing.assert_array_equal(boxes, expected.astype(np.float32))
            seen += len(boxes)
        assert split.most_boxes <= 2
    assert seen == 12


def test_an_image_without_its_mask_is_put_aside(tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch)
    drawn.change(3, mask=None)
    drawn.change(5, mask=np.zeros((20, 20), np.uint8))
    facts = drawn.build(tmp_path / "out")
    assert facts["quarantine"] == {"count": 2, "reasons": {"wrong mask": 2}}


def test_without_masks_and_boxes_there_are_none(tmp_path, monkeypatch):
    facts = Drawn(monkeypatch, masks=False, boxes=False).build(tmp_path / "out")
    assert facts["splits"]["train"]["fields"] == []
    assert {p.name for p in (tmp_path / "out" / "train").iterdir()} == {"images.npy", "labels.npy"}


def test_memmap_and_shards_agree(tmp_path):
    root = folder(tmp_path / "in")
    (root / "class0" / "turned.png").write_bytes(turned())
    _, one = build(root, tmp_path / "map", store_size=20)
    _, two = build(root, tmp_path / "shards", store_size=20, memory_map_gb=0)
    assert (one["mode"], two["mode"]) == ("memmap", "shards")
    assert {k: v for k, v in one.items() if k != "mode"} == {
        k: v for k, v in two.items() if k != "mode"
    }
    assert not (tmp_path / "shards" / "train" / "images.npy").exists()
    for name in one["splits"]:
        mapped, sharded = Split.open(tmp_path / "map", name), Split.open(tmp_path / "shards", name)
        rows = torch.arange(len(mapped)).flip(0)
        assert sharded.images is None and mapped.names() == sharded.names()
        assert torch.equal(mapped.square(rows, 20), sharded.square(rows, 20))
        assert mapped.square(rows, 20).shape == (len(rows), 20, 20, 3)
        assert mapped.square(rows[:2], 16).dtype == torch.uint8
        for i, path in enumerate(sharded.names()):
            np.testing.assert_array_equal(sharded.decode(i), decode((root / path).read_bytes())[0])
            np.testing.assert_array_equal(mapped.decode(i), square(sharded.decode(i), 20))


def test_smaller_view_of_a_memmap(tmp_path):
    shapes(tmp_path / "out", store_size=32)
    split = Split.open(tmp_path / "out", "test")
    assert split.images.shape == (10, 32, 32, 3)
    np.testing.assert_array_equal(
        split.square([3], 16)[0].numpy(), square(np.array(split.images[3]), 16)
    )


def test_memory_map_limit_counts_every_split(tmp_path):
    size = 44 * 16 * 16 * 3
    assert shapes(tmp_path / "a", memory_map_gb=size / 1e9)["mode"] == "memmap"
    assert shapes(tmp_path / "b", memory_map_gb=(size - 1) / 1e9)["mode"] == "shards"


def test_quarantine_lists_reasons_and_conversions_are_counted(tmp_path):
    root = folder(tmp_path / "in", each=12)
    for i, (_, data, _) in enumerate(BROKEN):
        (root / "class0" / f"broken{i}.jpg").write_bytes(data)
    for i, (_, data, *_) in enumerate(CONVERTED):
        (root / "class1" / f"odd{i}.png").write_bytes(data)
    (root / "class0" / "dead.png").symlink_to("nowhere")
    (root / "class0" / "notes.txt").write_text("hello")
    (root / "class0" / ".hidden.png").write_bytes(b"")
    summary, facts = build(root, tmp_path / "out")
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    expected = {f"class0/broken{i}.jpg": reason for i, (_, _, reason) in enumerate(BROKEN)}
    assert {row["name"]: row["reason"] for row in rows} == {
        **expected,
        "class0/dead.png": "unreadable",
    }
    assert summary["quarantined"] == facts["quarantine"]["count"] == len(rows) == len(BROKEN) + 1
    assert sum(facts["quarantine"]["reasons"].values()) == len(rows)
    assert facts["ignored"] == {".txt": 1, "hidden": 1}
    assert facts["converted"]["alpha"] == 4 and facts["converted"]["rotated"] == 2
    assert facts["upscaled"] > 0 and any("enlarged" in text for text in facts["warnings"])
    assert sum(f["count"] for f in facts["splits"].values()) == 24 + len(CONVERTED)


def test_too_many_broken_images_stop_the_stage(tmp_path):
    root = folder(tmp_path / "in", each=10)
    for i in range(3):
        (root / "class0" / f"bad{i}.jpg").write_bytes(b"")
    build(root, tmp_path / "fine" / "out", quarantine_limit=3 / 23)
    with pytest.raises(
        SourceError, match=r"data\.quarantine_limit: 3 of 23 .*3 empty.*class0/bad0\.jpg"
    ):
        build(root, tmp_path / "stop" / "out", quarantine_limit=0.1)
    assert not (tmp_path / "stop" / "out" / "data.json").exists()
    assert len((tmp_path / "stop" / "work" / "quarantine.jsonl").read_text().splitlines()) == 3


def test_duplicates_within_and_across_splits_are_reported_not_removed(tmp_path, capsys):
    root = tmp_path / "in"
    for split, numbers in (("train", (1, 2, 3, 4, 5)), ("val", (6, 7)), ("test", (8, 9))):
        folder_ = root / split / "a"
        folder_.mkdir(parents=True)
        for n in numbers:
            (folder_ / f"{n}.png").write_bytes(encode(picture(n)))
    (root / "train" / "a" / "again.bmp").write_bytes(
        encode(picture(2), "BMP")
    )  # other bytes, equal pixels
    (root / "test" / "a" / "leak.png").write_bytes(encode(picture(3)))
    summary, facts = build(root, tmp_path / "out")
    repeats = facts["duplicates"]
    assert repeats["within"] == {"train": 1, "val": 0, "test": 0}
    assert repeats["across"] == {"train-val": 0, "train-test": 1, "val-test": 0}
    assert repeats["groups"] == [
        ["train/a/2.png", "train/a/again.bmp"],
        ["train/a/3.png", "test/a/leak.png"],
    ]
    assert {s: f["count"] for s, f in facts["splits"].items()} == {"train": 6, "val": 2, "test": 3}
    assert (
        any("also in train" in text for text in facts["warnings"])
        and "also in train" in capsys.readouterr().err
    )
    assert summary["duplicates"] == 1 and summary["in_train_and_test"] == 1


def test_duplicates_of_many_copies():
    keys = {"train": b"a" * 16 * 5 + b"b" * 16, "test": b"b" * 16 * 2 + b"a" * 16 + b"c" * 16}
    found = duplicates({k: bytearray(v) for k, v in keys.items()})
    assert found["within"] == {"train": 4, "test": 1} and found["across"] == {"train-test": 3}
    assert sorted(map(len, found["groups"])) == [3, 6]


def test_wrong_settings_name_their_key(tmp_path):
    root = folder(tmp_path / "in")
    with pytest.raises(SourceError, match="data.store_size: 8 is smaller"):
        build(root, tmp_path / "a", store_size=8)
    with pytest.raises(SourceError, match="data.image_column.*no columns"):
        build(root, tmp_path / "b", image_column="image")


# --------------------------------------------------------------------------------------------------
# store


def test_missing_data_set_and_misspelt_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m stages.data"):
        info(tmp_path)
    shapes(tmp_path / "out")
    with pytest.raises(ValueError, match="no split 'tets'.*did you mean 'test'"):
        Split.open(tmp_path / "out", "tets")
    with pytest.raises(ValueError, match="mode 'shards' only"):
        Split.open(tmp_path / "out", "test").encoded(0)


def test_npy_written_row_by_row_is_what_numpy_saves(tmp_path):
    rows = np.arange(1234 * 6, dtype=np.int16).reshape(1234, 2, 3)
    writer = NpyWriter(tmp_path / "x.npy", (2, 3), np.int16)
    for row in rows:
        writer.add(row)
    with pytest.raises(ValueError, match="expected"):
        writer.add(rows)
    writer.close()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", mmap_mode="r"), rows)


def test_many_shards_and_groups_keep_their_rows(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.bytes(int(n)) for n in rng.integers(1, 5000, 700)]
    values[300] = rng.bytes(3 << 20)  # larger than a data page
    values[5] = values[6] = values[4]  # equal neighbours
    writer = SplitWriter(tmp_path, "train", 4, ["a"], memmap=False, shard_bytes=1_000_000)
    for i, value in enumerate(values):
        writer.add(f"{i}", value, 0, np.zeros((4, 4, 3), np.uint8))
    writer.close()
    facts = {"mode": "shards", "store_size": 4, "classes": ["a"], "splits": {"train": {}}}
    (tmp_path / "data.json").write_text(json.dumps(facts))
    split = Split.open(tmp_path, "train")
    assert len(split.files()) > 1 and len(split) == 700
    assert split.files()[0].name == f"train-00000-of-{len(split.files()):05d}.parquet"
    assert all(split.encoded(i) == values[i] for i in (699, 0, *range(700)))
    assert [int(n) for n in split.names()] == list(range(700))


def test_unlabelled_images_have_no_label_column(tmp_path):
    for i in range(6):
        path = tmp_path / "in" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(i), "JPEG"))
    _, facts = build(tmp_path / "in", tmp_path / "out")
    assert facts["classes"] == [] and not facts["splits"]["train"]["labelled"]
    split = Split.open(tmp_path / "out", "train")
    assert (split.labels == -1).all() and pq.read_schema(split.files()[0]).names == ["image"]


def test_the_stage_as_a_command(tmp_path, tiny_params, capsys):
    params = tiny_params(tmp_path)
    assert stage.main(["--params", str(params), "--results", str(tmp_path / "results")]) == 0
    out = tmp_path / "results" / "data" / "main"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["summary"]["train"] == 48 and manifest["summary"]["mode"] == "memmap"
    assert "train/images.npy" in manifest["outputs"] and "data/main: " in capsys.readouterr().out
    assert len(Split.open(out, "val")) == 16
