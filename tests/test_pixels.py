"""Pixels that are not 8 bits, files that are no images, images that look alike."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data import DATA, build, encode, picture

from stages import data as stage
from stages.kit.data import pillow
from stages.kit.data.decode import Broken, Range, decode, decode_all
from stages.kit.data.libtiff import heard
from stages.kit.data.near import look, near_duplicates
from stages.kit.data.store import Split
from stages.sources import SourceError
from workflow.params.entries import _impossible, data_entries

WAVE = np.linspace(0.1, 0.9, 32)[None] * np.ones((32, 1))


def deep(root, top: float, kind=np.uint16, low: float = 0, count: int = 12):
    """Two classes of images with values from `low` to `top`."""
    draw = np.random.default_rng(0)
    for k in range(2):
        (root / "ab"[k]).mkdir(parents=True)
        for i in range(count):
            wave = (WAVE.T if k else WAVE) + draw.normal(0, 0.03, WAVE.shape)
            values = (low + (top - low) * wave.clip(0, 1)).astype(kind)
            image = Image.fromarray(values)
            image.save(root / "ab"[k] / f"{i}.tif", "TIFF")
    return root


def said(facts, words: str) -> bool:
    return any(words in text for text in facts["warnings"])


@pytest.mark.parametrize(
    "top, proposed", [(4095, "[0, 4095]"), (1023, "[0, 1023]"), (16383, "[0, 16383]")]
)
def test_a_range_that_is_mostly_empty_is_told_and_can_be_set(tmp_path, top, proposed):
    root = deep(tmp_path / "in", top)
    _, facts = build(root, tmp_path / "a")
    assert said(facts, f"data.range, such as {proposed}, or auto")
    _, facts = build(root, tmp_path / "b", range=[0, top])
    assert not facts["warnings"] and facts["range"] == [0, top]
    images = Split.open(tmp_path / "b", "train").images
    assert len(np.unique(images)) > 150 and images.max() > 200


@pytest.mark.parametrize(
    "top, kind, low", [(4095, np.uint16, 0), (3000, np.int32, -1000), (40.0, np.float32, -5.0)]
)
@pytest.mark.parametrize("gigabytes", [8, 0])
def test_a_range_by_the_percentiles_of_train(tmp_path, top, kind, low, gigabytes):
    root = deep(tmp_path / "in", top, kind, low)
    _, facts = build(root, tmp_path / "out", range="auto", memory_map_gb=gigabytes)
    first, last = facts["range"]
    assert low <= first < low + 0.3 * (top - low) and top - 0.3 * (top - low) < last <= top
    assert said(facts, "data.range: auto has found") and facts["quarantine"]["count"] == 0
    split = Split.open(tmp_path / "out", "train")
    assert np.ptp(split.decode(0)) > 150  # in shards the range is applied whenever they are read


def test_values_without_a_known_scale_name_the_setting(tmp_path):
    root = deep(tmp_path / "in", 3000, np.int32, -1000)
    with pytest.raises(SourceError, match=r"data.range can say.*TIFF of 32 x 32 pixels, mode I"):
        build(root, tmp_path / "out", quarantine_limit=0)


def test_values_outside_of_the_range_are_told(tmp_path):
    _, facts = build(deep(tmp_path / "in", 4095), tmp_path / "out", range=[0, 2000])
    assert said(facts, "what is outside of data.range [0, 2000] is black or white")


@pytest.mark.parametrize("kind", ["8 bits", "colour"])
def test_other_images_that_are_nearly_black_are_told(tmp_path, kind):
    draw = np.random.default_rng(0)
    for i in range(12):
        image = draw.integers(0, 16, (20, 20, 3), np.uint8)
        data = encode(image)
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    _, facts = build(tmp_path / "in", tmp_path / "out", range=[0, 9] if kind == "colour" else None)
    assert said(facts, "all pixels lie between 0 and") or said(facts, "no 16-bit or float image")


def png16(values: np.ndarray) -> bytes:
    """A PNG file with 16 bits in each of 2 to 4 channels: grey, colours; the last may be alpha."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    found = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    for name, part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + part))
        found += struct.pack(">I", len(part)) + name + part + check
    return found


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("span", [None, [0, 4095], "auto"])
def test_colours_of_16_bits(tmp_path, channels, span):
    draw = np.random.default_rng(0)
    for i in range(12):
        values = draw.integers(0, 4096, (20, 20, channels))
        values[..., -1] = 65535 if channels != 3 else values[..., -1]
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png16(values))
        if i == 0:
            whole = decode_all(png16(values), Range((0, 4095))).pixels
            np.testing.assert_array_equal(whole[..., 0], np.rint(values[..., 0] / 4095 * 255))
    _, facts = build(tmp_path / "in", tmp_path / "out", range=span)
    assert facts["converted"]["16-bit colour"] == 12
    if span is None:
        assert said(facts, "data.range, such as [0, 4095] or auto")
    else:
        assert np.ptp(Split.open(tmp_path / "out", "train").images) > 200
    assert said(facts, "auto has found") == (span == "auto")


def test_grey_of_16_bits_lies_over_white_where_it_is_transparent():
    draw = np.random.default_rng(0)
    values = draw.integers(0, 65536, (7, 5, 2))
    found = decode_all(png16(values), Range((100.0, 60000.0)))
    grey = np.rint(((values[..., 0] - 100) / 59900).clip(0, 1) * 255)
    alpha = np.rint(values[..., 1] / 257.0)
    expected = grey * alpha / 255 + 255 - alpha
    assert np.abs(found.pixels - expected[..., None]).max() <= 1
    assert found.notes == ("alpha", "16-bit colour") and found.levels[1] > 60000


def tiff16(values: np.ndarray, order: str) -> bytes:
    """An uncompressed TIFF file with 16 bits in each of 3 channels, its bytes in this order."""
    height, width, _ = values.shape
    start, pixels = 8 + 2 + 12 * 9 + 4 + 6, values.astype(f"{order}u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, start - 6), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 2), (273, 4, 1, start), (277, 3, 1, 3), (278, 3, 1, height)]
    tags += [(279, 4, 1, len(pixels))]
    found = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, count, value in tags:
        form = "HHIHH" if kind == 3 and count == 1 else "HHII"
        parts = (tag, kind, count, value, 0)[: len(form)]
        found += struct.pack(f"{order}{form}", *parts)
    return found + struct.pack(f"{order}IHHH", 0, 16, 16, 16) + pixels


@pytest.mark.parametrize("order", ["<", ">"])
def test_colours_of_16_bits_in_tiff_files(order):
    values = np.random.default_rng(0).integers(0, 4096, (6, 5, 3))
    found = decode_all(tiff16(values, order), Range((0, 4095)))
    np.testing.assert_array_equal(found.pixels, np.rint(values / 4095 * 255))
    assert found.notes == ("16-bit colour",)


@pytest.mark.parametrize("span", [None, (0, 4095)])
def test_mangled_colours_are_broken_at_worst(span):
    draw = np.random.default_rng(1)
    files = [png16(draw.integers(0, 4096, (20, 20, n))) for n in (2, 3)]
    files += [tiff16(np.zeros((8, 8, 3)), "<"), hurt("tiff_lzw"), hurt("jpeg")]
    for k in range(400):
        data = bytearray(files[k % len(files)])
        for place in draw.integers(0, len(data), 4).tolist():
            data[place] = draw.integers(0, 256)
        try:
            decode_all(bytes(data), Range(span))
        except Broken as error:
            assert error.reason and error.detail


def test_what_is_no_number_is_black_in_a_range():
    data = io.BytesIO()
    Image.fromarray(np.array([[np.nan, 1.0], [3.0, 5.0]], np.float32)).save(data, "TIFF")
    found = decode_all(data.getvalue(), Range((1.0, 5.0)))
    assert found.pixels[..., 0].tolist() == [[0, 0], [128, 255]]
    assert found.notes == ("not a number", "float")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"range": [5, 5]}, "data.range: found [5.0, 5.0], expected [low, high]"),
        ({"range": [1, 2, 3]}, "data.range: found [1.0, 2.0, 3.0], expected [low, high]"),
        ({"range": "aut"}, "did you mean 'auto'"),
        ({"max_pixels": 0}, "data.max_pixels: must be greater"),
        ({"max_pixel": 5}, "did you mean 'max_pixels'"),
        ({"group": 0}, "data.group: found 0, expected the level"),
        ({"grup": "a"}, "did you mean 'group'"),
    ],
)
def test_wrong_values_of_the_settings(given, words):
    problems: list[str] = []
    entries = data_entries({"source": "shapes", "image_size": 8, **given}, problems)
    for key, entry in entries.values():
        problems += _impossible(key, entry)
    assert any(words in text for text in problems), problems


def test_the_limit_of_pixels_is_a_setting(tmp_path):
    for i in range(3):
        path = tmp_path / "in" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(picture(i, 60, 60)))
    with pytest.raises(SourceError, match=r"60 x 60 \(PNG\), at most 100; data.max_pixels"):
        build(tmp_path / "in", tmp_path / "a", max_pixels=100)
    with pytest.raises(SourceError, match=r"no usable image in train \(3 cannot .* 60 x 60"):
        build(tmp_path / "in", tmp_path / "a", max_pixels=100, quarantine_limit=1.0)
    for k, most in enumerate((3600, 200_000_000)):
        assert build(tmp_path / "in", tmp_path / f"b{k}", max_pixels=most)[0]["quarantined"] == 0


def test_more_than_pillow_allows_can_be_allowed():
    data = io.BytesIO()
    Image.new("1", (20000, 10000)).save(data, "PNG")
    with pytest.raises(Broken, match="20000 x 10000"):
        decode(data.getvalue())
    assert decode(data.getvalue(), 200_000_000)[0].shape == (10000, 20000, 3)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"<!DOCTYPE html><p>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo"),
        (b"%PDF-1.7", "a PDF document"),
        (bytes(5000), "nothing but zeros"),
        (bytes(128) + b"DICM", "a DICOM file"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        (b"something else", "starts with b'somethin'"),
    ],
)
def test_a_reason_says_what_a_file_is(data, words):
    with pytest.raises(Broken) as error:
        decode(data)
    assert error.value.reason == "not an image" and words in error.value.detail


# --------------------------------------------------------------------------------------------------
# libtiff


def hurt(compression: str) -> bytes:
    data = io.BytesIO()
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(image).save(data, "TIFF", compression=compression)
    found = bytearray(data.getvalue())
    for k in range(200, 600):
        found[k] ^= 0x5A
    return bytes(found)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg"])
def test_what_libtiff_says_is_kept_for_its_file(compression, capfd):
    try:
        found = decode_all(hurt(compression), Range())
    except Broken as error:
        assert "libtiff: " in error.detail and "TIFF of 64 x 64" in error.detail
    else:
        assert found.said
    assert capfd.readouterr().err == ""
    with heard() as nothing:
        decode(encode(picture(0), "TIFF", compression="tiff_lzw"))
    assert nothing == []


def test_what_libtiff_says_is_printed_with_the_name(tmp_path, capfd):
    for i in range(8):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(i), "TIFF", compression="tiff_lzw"))
    (tmp_path / "in" / "a" / "odd.tif").write_bytes(hurt("jpeg"))
    (tmp_path / "in" / "b" / "hurt.tif").write_bytes(hurt("tiff_lzw"))
    _, facts = build(tmp_path / "in", tmp_path / "out")
    assert said(facts, "Pillow or libtiff complained 1 times, first: a/odd.tif: libtiff: ")
    assert "a/odd.tif: libtiff: " in capfd.readouterr().err
    assert said(
        {"warnings": stage.spoken(facts)}, "1 images cannot be used (1 damaged); quarantine"
    )
    (row,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert row["name"] == "b/hurt.tif" and "libtiff: " in row["detail"]


# --------------------------------------------------------------------------------------------------
# Pillow


def odd(number: int) -> bytes:
    """A photo whose EXIF data names bytes that are not there."""
    entry = struct.pack("<HHII", 271, 2, 64, 999)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return encode(picture(number), "JPEG", exif=exif)


def test_what_pillow_warns_of_is_kept_for_its_file(recwarn):
    found = decode_all(odd(0), Range())
    (text,) = found.said
    assert text.startswith("Pillow: ") and "tag 271" in text
    assert decode_all(odd(1), Range()).said == (text,), "of the second file as well"
    assert decode_all(encode(picture(0), "JPEG"), Range()).said == ()
    assert not recwarn.list
    with pillow.heard() as heard_here:
        warnings.warn("of another library", stacklevel=1)
    assert heard_here == []
    assert [str(w.message) for w in recwarn.list] == ["of another library"]


def test_what_pillow_warns_of_is_printed_with_the_name(tmp_path, capfd):
    for i in range(8):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(odd(i) if i < 3 else encode(picture(i), "JPEG"))
    _, facts = build(tmp_path / "in", tmp_path / "out")
    assert said(facts, "Pillow or libtiff complained 3 times, first: a/0.jpg: Pillow: ")
    printed = capfd.readouterr().err
    assert all(f"{name}: Pillow: " in printed for name in ("a/0.jpg", "b/1.jpg", "a/2.jpg"))
    assert "UserWarning" not in printed and facts["quarantine"]["count"] == 0


# --------------------------------------------------------------------------------------------------
# images that look alike


def photo(seed: int, size: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def again(image: Image.Image, how: str) -> Image.Image:
    if how == "smaller":
        return image.resize((60, 60), Image.Resampling.BICUBIC)
    if how == "brighter":
        return image.point(lambda v: min(255, int(v * 1.1 + 5)))
    if how == "jpeg":
        return Image.open(io.BytesIO(encode(image, "JPEG", quality=60)))
    return image.convert("L").convert("RGB")


@pytest.mark.parametrize("how", ["smaller", "brighter", "jpeg", "grey"])
def test_images_that_look_alike_across_splits_are_told(tmp_path, how):
    for split, seeds in (("train", range(12)), ("test", range(20, 26)), ("val", range(30, 34))):
        for seed in seeds:
            path = tmp_path / "in" / split / "ab"[seed % 2] / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photo(seed)))
    _, facts = build(tmp_path / "in", tmp_path / "none")
    assert facts["near_duplicates"]["pairs"] == [] and not said(facts, "look much like")
    path = tmp_path / "in" / "test" / "a" / "copy.png"
    path.write_bytes(encode(again(photo(3), how)))
    _, facts = build(tmp_path / "in", tmp_path / "out")
    assert facts["near_duplicates"]["pairs"] == [["train/b/3.png", "test/a/copy.png"]]
    assert facts["near_duplicates"]["across"]["train-test"] == 1
    assert said(facts, "1 of 7 images of test look much like one of train")


def test_equal_and_plain_images_are_no_near_duplicates():
    one, flat = np.asarray(photo(1)), np.full((96, 96, 3), 9, np.uint8)
    looks = {"train": bytearray(look(one) + look(flat)), "test": bytearray(look(one) + look(flat))}
    equal = bytearray(b"a" * 16 + b"b" * 16)
    other = bytearray(b"a" * 16 + b"c" * 16)
    found = near_duplicates(looks, {"train": equal, "test": other})
    assert found == {"across": {"train-test": 0}, "pairs": []}


@pytest.mark.parametrize("key, value", [("splits", {"val": "x"}), ("group", 2)])
def test_settings_that_a_source_does_not_have(key, value):
    source = {"name": "shapes", "argument": None, "config": {"train": 4}}
    with pytest.raises(SourceError, match=f"data.{key}: found .*the source shapes has no"):
        stage.find({**DATA, key: value}, source)


def test_two_streams_are_apart_or_not(tmp_path):
    with open(tmp_path / "a", "w") as one, open(tmp_path / "b", "w") as other:
        assert stage.apart(one, other) and not stage.apart(one, one)
    assert stage.apart(io.StringIO(), io.StringIO())
