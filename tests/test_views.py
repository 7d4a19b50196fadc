"""Views: each operation against torchvision's, Pillow's or timm's; the same bits for any batch."""

from __future__ import annotations

import hashlib
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from stages.kit import keyed
from stages.kit.data import crops, pixels, randaugment, views
from stages.kit.data.loader import Rows
from stages.kit.data.views import View, apply, linked

EVERYTHING = View(
    20,
    (0.2, 1.0),
    flip=0.5,
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_p=0.8,
    grey=0.2,
    blur=0.5,
    solarise=0.2,
    randaugment="rand-m9-mstd0.5-inc1",
    erase=0.5,
)


def pictures(count: int, height: int = 24, width: int = 24, seed: int = 0) -> torch.Tensor:
    """uint8 (B, H, W, 3): smooth blobs with some noise."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(seed + 1)) * 10
    return (smooth + noise).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def floats(count: int, size: int = 17) -> torch.Tensor:
    return pictures(count, size, size).permute(0, 3, 1, 2).float() / 255


ROWS = torch.tensor([3, 1000, 17, 4, 2**40, 0, 99, 5, 6])


# the same bits for any batch


@pytest.mark.parametrize(
    "view",
    [EVERYTHING, View(20), View(24), replace(EVERYTHING, randaugment=None, blur=1.0, size=31)],
)
def test_a_sample_does_not_depend_on_its_batch(view):
    images = pictures(9)
    whole = apply(view, images, 7, ROWS)
    assert whole.shape == (9, 3, view.size, view.size) and whole.dtype == torch.float32
    for size in (1, 2, 4):
        parts = torch.cat(
            [
                apply(view, i, 7, r)
                for i, r in zip(images.split(size), ROWS.split(size), strict=True)
            ]
        )
        assert torch.equal(whole, parts)
    order = torch.randperm(9)
    assert torch.equal(apply(view, images[order], 7, ROWS[order]), whole[order])


def test_chunks_and_threads_change_nothing(monkeypatch):
    images = pictures(9)
    whole = apply(EVERYTHING, images, 7, ROWS)
    monkeypatch.setattr(views, "WORKING_SET", 12 * 20 * 20 * 2)
    assert torch.equal(apply(EVERYTHING, images, 7, ROWS), whole)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: apply(EVERYTHING, images, 7, ROWS), range(12)):
            assert torch.equal(found, whole)
    large, found = replace(EVERYTHING, size=96), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(apply(large, images[:2], 7, ROWS[:2]))
            found.append(
                torch.cat([apply(large, images[b : b + 1], 7, ROWS[b : b + 1]) for b in (0, 1)])
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


def test_key_and_row_decide():
    images = pictures(1).expand(9, -1, -1, -1).contiguous()
    whole = apply(EVERYTHING, images, 7, ROWS)
    assert len({v.numpy().tobytes() for v in whole}) == 9
    assert not torch.equal(apply(EVERYTHING, images, 8, ROWS), whole)
    assert torch.equal(apply(EVERYTHING, images, 7, ROWS), whole)


def test_range_and_input_left_alone():
    images = pictures(9)
    before = images.clone()
    for base in range(5):
        result = apply(EVERYTHING, images, base, ROWS)
        assert result.min() >= 0 and result.max() <= 1 and result.isfinite().all()
        apply(View(24, flip=1.0, randaugment="rand-m9-mstd0.5-inc1"), images, base, ROWS)
    assert torch.equal(images, before)


def test_the_global_generators_are_neither_read_nor_moved():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = apply(EVERYTHING, pictures(9), 7, ROWS)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(apply(EVERYTHING, pictures(9), 7, ROWS), first)


# crop, resize, flip


def test_plain_view_is_the_image():
    images = pictures(4)
    expected = images.permute(0, 3, 1, 2).float() / 255
    assert torch.equal(apply(View(24), images, 0, ROWS[:4]), expected)
    assert torch.equal(apply(View(24, flip=1.0), images, 0, ROWS[:4]), expected.flip(3))
    assert torch.equal(apply(View(24), list(images.numpy()), 0, ROWS[:4]), expected)


@pytest.mark.parametrize("shape", [(24, 24), (40, 23), (11, 60)])
def test_crop_is_torchvisions_resized_crop(shape):
    images = pictures(9, *shape)
    view = View(16, (0.1, 1.0))
    heights, widths = (torch.full((9,), side) for side in shape)
    key = keyed.key(7, "crop")
    boxes = crops.random_boxes(heights, widths, view.scale, view.ratio, key, ROWS).tolist()
    found = apply(view, images, 7, ROWS) * 255
    for image, (top, left, height, width), result in zip(images, boxes, found, strict=True):
        arguments = (top, left, height, width, [16, 16], InterpolationMode.BICUBIC, True)
        expected = TF.resized_crop(image.permute(2, 0, 1), *arguments).float()
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)  # the same 8-bit numbers
        exact = TF.resized_crop(image.permute(2, 0, 1).float(), *arguments).clamp(0, 255)
        assert (result - exact).abs().max() < 2 and (result - exact).abs().mean() < 0.5
        part = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
        pillow = torch.from_numpy(
            np.array(part.resize((16, 16), Image.Resampling.BICUBIC))
        ).permute(2, 0, 1)
        assert (result - pillow).abs().max() <= 1.001


def test_images_of_different_sizes():
    images = [pictures(1, h, w, seed=h)[0].numpy() for h, w in [(24, 24), (31, 50), (64, 20)]]
    view = replace(EVERYTHING, size=16)
    together = apply(view, images, 7, ROWS[:3])
    for b, image in enumerate(images):
        assert torch.equal(
            together[b : b + 1], apply(view, torch.from_numpy(image)[None], 7, ROWS[b : b + 1])
        )
    square = apply(View(16), images, 7, ROWS[:3]) * 255
    expected = TF.resized_crop(
        torch.from_numpy(images[1]).permute(2, 0, 1),
        0,
        9,
        31,
        31,
        [16, 16],
        InterpolationMode.BICUBIC,
        True,
    )
    torch.testing.assert_close(square[1], expected.float(), rtol=0, atol=1e-3)


def test_read_only_arrays_give_no_warning(recwarn):
    image = pictures(1)[0].numpy()
    image.flags.writeable = False
    apply(View(16), [image], 0, ROWS[:1])
    assert not recwarn.list


@pytest.mark.parametrize("height,width", [(64, 64), (30, 90)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    count = 3000
    rows = torch.arange(count)
    sides = torch.full((count,), height), torch.full((count,), width)
    box = crops.random_boxes(*sides, (0.2, 1.0), (3 / 4, 4 / 3), 5, rows).double()
    assert (
        (box[:, 0] + box[:, 2] <= height).all()
        and (box[:, 1] + box[:, 3] <= width).all()
        and (box[:, 2:] > 0).all()
    )
    assert (box[:, :2] >= 0).all()
    torch.manual_seed(0)
    transform, image = RandomResizedCrop(16, (0.2, 1.0)), torch.zeros(3, height, width)
    expected = torch.tensor(
        [list(transform.make_params([image]).values()) for _ in range(1000)], dtype=torch.float64
    )
    for ours, theirs in zip(box.t(), expected.t(), strict=True):
        error = math.sqrt(ours.var() / count + theirs.var() / 1000) + 1e-9
        assert abs(ours.mean() - theirs.mean()) < 4.5 * error
        assert abs(ours.std() - theirs.std()) < 0.1 * theirs.std() + 1e-9


@pytest.mark.parametrize(
    "height,width,expected",
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (9, 10, (0, 0, 9, 10))],
)
def test_fallback_is_the_largest_centre_crop(height, width, expected):
    # the wanted area cannot fit with these ratios, or only by a hair: all ten tries fail
    sides = torch.tensor([height]), torch.tensor([width])
    arguments = (*sides, (0.999, 1.0), (3 / 4, 4 / 3), keyed.key(1, "crop"), torch.tensor([2]))
    _, found = crops.tries(*arguments)
    box = crops.random_boxes(*arguments)
    assert found.item() or box[0].tolist() == list(expected)
    assert (height, width) == (9, 10) or not found.item()


def test_probabilities():
    images = pictures(1, 4, 4).expand(2000, -1, -1, -1).contiguous()
    plain = images.permute(0, 3, 1, 2).float() / 255
    rows = torch.arange(2000)
    share = {
        name: (apply(View(4, **{name: 0.3}), images, 1, rows) != plain)
        .flatten(1)
        .any(1)
        .float()
        .mean()
        for name in ("flip", "grey", "blur", "solarise")
    }
    jitter = apply(View(4, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.3), images, 1, rows)
    share["jitter"] = (jitter != plain).flatten(1).any(1).float().mean()
    for name, found in share.items():
        assert abs(found - 0.3) < 5 * math.sqrt(0.21 / 2000), name


# colour


@pytest.mark.parametrize(
    "ours,theirs,factors",
    [
        (pixels.brightness, TF.adjust_brightness, (0.0, 0.4, 1.0, 1.7)),
        (pixels.contrast, TF.adjust_contrast, (0.0, 0.4, 1.0, 1.7)),
        (pixels.saturation, TF.adjust_saturation, (0.0, 0.4, 1.0, 1.7)),
        (pixels.hue, TF.adjust_hue, (-0.5, -0.13, 0.0, 0.31, 0.5)),
    ],
)
def test_colour_operations_against_torchvision(ours, theirs, factors):
    x = floats(len(factors))
    x[:, :, :3] = x[:, :1, :3]  # some pixels without colour, black and white ones too
    x[:, :, 3], x[:, :, 4] = 0, 1
    x[:, 0, 5] = x[:, 1, 5]  # ties between the largest channels
    found = ours(x, torch.tensor(factors).view(-1, 1, 1, 1))
    for one, factor, result in zip(x, factors, found, strict=True):
        torch.testing.assert_close(result, theirs(one, factor), rtol=0, atol=2e-5)


def test_jitter_is_four_operations_in_a_sample_s_own_order():
    view = View(17, jitter=(0.4, 0.3, 0.2, 0.1))
    images = pictures(9, 17, 17)
    found = apply(view, images, 7, ROWS)
    draws = keyed.uniform(keyed.key(7, "jitter"), ROWS, 8)
    low, high = torch.tensor([0.6, 0.7, 0.8, -0.1]), torch.tensor([1.4, 1.3, 1.2, 0.1])
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for image, draw, result in zip(images, draws, found, strict=True):
        x = image.permute(2, 0, 1).float() / 255
        for which in draw[4:].argsort().tolist():
            x = operations[which](x, (low + draw[:4] * (high - low))[which].item())
        torch.testing.assert_close(result, x, rtol=0, atol=1e-4)
    assert len({tuple(d[4:].argsort().tolist()) for d in draws}) > 3


def test_a_strength_above_one_does_not_turn_negative():
    images = pictures(9)
    assert (apply(View(24, jitter=(3.0, 3.0, 3.0, 0.0)), images, 7, ROWS) >= 0).all()


def test_grey_and_solarise():
    images = pictures(3)
    plain = images.permute(0, 3, 1, 2).float() / 255
    grey = apply(View(24, grey=1.0), images, 0, ROWS[:3])
    torch.testing.assert_close(grey, TF.rgb_to_grayscale(plain, 3), rtol=0, atol=1e-6)
    solarised = apply(View(24, solarise=1.0), images, 0, ROWS[:3])
    expected = (
        TF.solarize(images.permute(0, 3, 1, 2), 128).float() / 255
    )  # from 128 up pixels are inverted
    torch.testing.assert_close(solarised, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("height,width,radius", [(17, 17, 3), (17, 23, 6), (9, 9, 8)])
def test_blur_against_torchvision(height, width, radius):
    x = pictures(4, height, width).permute(0, 3, 1, 2).float() / 255
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    found = pixels.blur(x, sigma, radius)
    for one, s, result in zip(x, sigma.tolist(), found, strict=True):
        expected = TF.gaussian_blur(one, [2 * radius + 1, 2 * radius + 1], [s, s])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
        assert (result - expected).abs().mean() < 2e-4
    flat = torch.full((4, 3, height, width), 77 / 255)
    torch.testing.assert_close(pixels.blur(flat, sigma, radius), flat, rtol=0, atol=1e-6)
    assert pixels.blur(x[:, :, :4, :4], sigma, 6).shape == (
        4,
        3,
        4,
        4,
    )  # a picture smaller than the kernel


def test_blur_is_exact_arithmetic():
    """All partial sums fit float32's 24 bits, so float64 gives the very same numbers."""
    x, sigma = floats(4, 33), torch.tensor([0.1, 0.7, 1.3, 2.0])
    single = pixels.blur(x, sigma, 6)
    original = pixels._exact
    try:
        pixels._exact = lambda a, b: (a.double() @ b.double()).float()
        assert torch.equal(pixels.blur(x, sigma, 6), single)
    finally:
        pixels._exact = original


# RandAugment, erasing


@pytest.mark.parametrize(
    "notation",
    ["rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand-m8-inc1-tweights", "rand-m10-inc1-p1.0"],
)
def test_randaugment_is_timm_s(notation):
    """timm's own transform with its global generators seeded alike gives the same pixels."""
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    images = pictures(24, 32, 32)
    rows = torch.arange(24)
    found = (apply(View(32, randaugment=notation), images, 7, rows) * 255).round().to(torch.uint8)
    settings = {
        "translate_const": 14,
        "img_mean": (128, 128, 128),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = auto_augment.rand_augment_transform(notation, settings)
    seeds = keyed.bits(keyed.key(7, "randaugment"), rows).tolist()
    same = compared = 0
    states = random.getstate(), np.random.get_state()
    try:
        for image, seed, result in zip(images, seeds, found, strict=True):
            random.seed(seed % 2**32), np.random.seed(seed % 2**32)
            try:
                expected = np.array(transform(Image.fromarray(image.numpy())))
            except ValueError:  # posterize to 0 bits, which newer Pillows refuse: ours is black
                continue
            compared += 1
            same += np.array_equal(result.permute(1, 2, 0).numpy(), expected)
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
    assert same == compared >= 12
    assert (found.permute(0, 2, 3, 1) != images).flatten(1).any(1).sum() > 6


def test_every_operation_of_timm_s_policies_is_known():
    """And gets, at every magnitude and for either sign, what timm would give it."""
    timm = pytest.importorskip("timm.data.auto_augment")
    names = {*timm._RAND_TRANSFORMS, *timm._RAND_INCREASING_TRANSFORMS, *timm._RAND_3A}
    names |= {*timm._RAND_WEIGHTED_3A, *timm._RAND_WEIGHTED_0}
    state = random.getstate()
    try:
        for name in names:
            for step in range(41):
                for seed in range(6):
                    random.seed(seed)
                    level = timm.LEVEL_TO_ARG[name]
                    expected = level(step / 4, {}) if level else ()
                    random.seed(seed)
                    assert randaugment.argument(name, step / 4, random.random) == expected
    finally:
        random.setstate(state)
    with pytest.raises(ValueError, match="'Cutout' is not known"):
        randaugment.argument("Cutout", 5.0, random.random)


def test_posterize_to_nothing_is_black():
    image = Image.fromarray(pictures(1)[0].numpy())
    notation = "rand-m10-inc1-p1.0"
    seeds = [s for s in range(200) if len(randaugment.plan(notation, s)) == 2]
    seed = next(s for s in seeds if randaugment.plan(notation, s)[-1][0] is randaugment._black)
    assert not np.array(randaugment.randaugment(notation, image, seed)).any()


def test_erasing_as_timm_s():
    count, size = 1500, 32
    images = torch.full((count, size, size, 3), 51, dtype=torch.uint8)
    rows = torch.arange(count)
    found = apply(View(size, erase=0.6), images, 1, rows)
    hit = (found != 0.2).any(1)
    erased = hit.flatten(1).any(1)
    assert abs(erased.float().mean() - 0.6) < 5 * math.sqrt(0.24 / count)
    height = hit.any(2).sum(1)[erased].double()
    width = hit.any(1).sum(1)[erased].double()
    assert (hit.flatten(1).sum(1)[erased] == height * width).all()  # a full box
    area = height * width / size**2
    assert area.min() > 0.01 and area.max() < 0.36 and 0.14 < area.mean() < 0.19
    assert abs((height / width).log().mean()) < 0.1
    values = found[hit[:, None].expand_as(found)].double()
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.std() - 0.25) < 0.02
    assert values.min() >= 0 and values.max() <= 1


# views that belong together; masks and boxes


class Some:
    """Nine images with masks and boxes, as a split gives them."""

    def __init__(self, height: int = 40, width: int = 30) -> None:
        self.pixels = pictures(9, height, width).numpy()
        self.labels, self.images = np.arange(9), self.pixels
        self.all_masks = (self.pixels[..., 0] // 32).astype(np.uint8)
        low, high = np.random.default_rng(0).integers(0, [height // 2, width // 2], (2, 9, 2))
        y, x, h, w = np.concatenate([low, high + 4], 1).T
        self.all_boxes = np.stack([x, y, w, h, np.arange(9)], 1).astype(np.float32)
        self.most_boxes = 2

    def mask(self, i: int) -> np.ndarray:
        return self.all_masks[i]

    def boxes(self, i: int) -> np.ndarray:
        return self.all_boxes[i : i + 1] if i % 3 else np.empty((0, 5), np.float32)


def made(recipes: dict, split: Some | None = None, index=range(9)) -> dict:
    """A batch of all views, as Batches makes it."""
    rows = Rows(split or Some(), torch.tensor(list(index)))
    found: dict = {}
    for name, view in linked(recipes).items():
        found |= view.make(name, rows, lambda name: keyed.key(5, name))
    return found


def test_a_view_of_another_s_crop_shows_the_same_at_another_size():
    view = View(32, (0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.0))
    batch = made({"view": view, "small": View(16, crop_of="view"), "own": view})
    assert torch.equal(batch["view.box"], batch["small.box"])
    assert not torch.equal(batch["view.box"], batch["own.box"])
    assert 0 < batch["view.box"][:, 4].sum() < 9
    alone = made({"view": replace(view, size=16, jitter=(0, 0, 0, 0))})
    assert torch.equal(batch["small"], alone["view"])  # without the other's colours


def test_the_box_is_what_is_seen():
    split = Some()
    batch = made({"view": View(24, (0.2, 1.0), flip=0.5)}, split)
    for image, box, view in zip(split.pixels, batch["view.box"], batch["view"], strict=True):
        top, left, height, width, flip = box.tolist()
        region = torch.from_numpy(image[top : top + height, left : left + width])
        expected = TF.resize(region.permute(2, 0, 1), [24, 24], InterpolationMode.BICUBIC)
        expected = expected.flip(2) if flip else expected
        assert torch.equal((view * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_shifted_view_is_another_window_of_the_same_resized_crop(flip):
    """CMAE's card: img_t[..., i, j] == base[..., i + r, j + c], 0 <= r, c <= shift."""
    view = View(20, (0.3, 1.0), flip=flip, margin=6)
    batch = made({"view": view, "target": View(20, crop_of="view", shift=5)})
    base = made({"view": replace(view, size=26, margin=0)})["view"]
    assert torch.equal(batch["view"], base[:, :, :20, :20])
    places = set()
    for whole, target in zip(base, batch["target"], strict=True):
        fits = [
            (r, c)
            for r in range(7)
            for c in range(7)
            if torch.equal(whole[:, r : r + 20, c : c + 20], target)
        ]
        assert len(fits) == 1
        places |= set(fits)
    assert len(places) > 4 and max(max(place) for place in places) <= 5


def test_shifts_are_uniform_and_zero_gives_the_same_view():
    view = View(20, (0.3, 1.0), flip=0.5, margin=6)
    batch = made({"view": view, "target": View(20, crop_of="view")})
    assert torch.equal(batch["view"], batch["target"])
    images, index = torch.zeros(4000, 26, 26, 3, dtype=torch.uint8), torch.arange(4000)
    both = linked({"view": View(20, margin=6), "t": View(20, crop_of="view", shift=5)})
    offsets = both["t"].crops(images, 7, 3, index).offsets
    for axis in offsets.T:
        assert (torch.bincount(axis, minlength=6) - 4000 / 6).abs().max() < 5 * math.sqrt(4000 / 6)
    assert abs(torch.corrcoef(offsets.T.float())[0, 1]) < 0.08


def test_the_box_of_a_window_lies_in_the_crop_where_it_is_seen():
    """A bright pixel block of the image appears where the box says, for windows and flips."""
    images = torch.zeros(64, 52, 52, 3, dtype=torch.uint8)
    images[:, 24:28, 20:24] = 255
    index = torch.arange(64)
    recipes = linked({"view": View(20, flip=0.5, margin=6), "t": View(20, crop_of="view", shift=6)})
    found = recipes["t"].crops(images, 7, 3, index)
    top, left, height, width, flip = found.seen().T
    assert (height == 40).all() and (width == 40).all() and 0 < flip.sum() < 64
    seen = found.pixels(images)[..., 0].float()
    y = (seen.sum(2) * (torch.arange(20) + 0.5)).sum(1) / seen.sum((1, 2))
    x = (seen.sum(1) * (torch.arange(20) + 0.5)).sum(1) / seen.sum((1, 2))
    x = torch.where(flip == 1, 20 - x, x)
    assert ((top + y * height / 20) - 26).abs().max() < 0.3
    assert ((left + x * width / 20) - 22).abs().max() < 0.3


def test_masks_go_through_the_same_crop_and_flip():
    """A mask that is a grey picture: where the picture is flat, the view shows the mask's value."""
    split = Some()
    flat = np.kron(np.arange(1, 13, dtype=np.uint8).reshape(4, 3), np.ones((10, 10), np.uint8))
    split.images = split.pixels = np.repeat(flat[None, ..., None] * 20, 9, 0).repeat(3, 3)
    split.all_masks = np.repeat(flat[None], 9, 0)
    view = View(24, (0.2, 1.0), flip=0.5, fields=("mask",), margin=6)
    target = View(24, crop_of="view", shift=6, fields=("mask",))
    batch = made(
        {"view": view, "target": target, "small": replace(target, size=12, shift=3)}, split
    )
    for name in ("view", "target", "small"):
        picture, mask = batch[name][:, 0] * 255 / 20, batch[f"{name}.mask"]
        assert mask.dtype == torch.uint8 and mask.shape == picture.shape
        whole = (picture - picture.round()).abs() < 0.01
        assert whole.float().mean() > 0.3 and len(mask.unique()) > 6
        agree = (picture.round() == mask)[whole].float().mean()
        assert agree > 0.97  # edges overshoot, and may be whole by chance


def test_boxes_go_through_the_same_crop_and_flip():
    """A box around each object of a mask, and the object in the view lies in the box's view."""
    split = Some(60, 50)
    x, y, w, h, _ = split.all_boxes.astype(int).T
    for b in range(9):
        split.all_masks[b] = 0
        split.all_masks[b, y[b] : y[b] + h[b], x[b] : x[b] + w[b]] = 7
    view = View(100, (0.3, 1.0), flip=0.5, fields=("mask", "boxes"), margin=20)
    batch = made(
        {"view": view, "t": View(100, crop_of="view", shift=20, fields=view.fields)}, split
    )
    shown = 0
    for name in ("view", "t"):
        boxes, classes = batch[f"{name}.boxes"], batch[f"{name}.classes"]
        assert boxes.shape == (9, 2, 4) and boxes.dtype == torch.float32
        assert classes.shape == (9, 2) and classes.dtype == torch.int64
        for b in range(9):
            mask = batch[f"{name}.mask"][b]
            if b % 3 == 0 or not mask.any():
                assert classes[b].tolist() == [-1, -1] and not boxes[b].any()
                continue
            assert classes[b].tolist() == [b, -1]
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            low = torch.stack([columns[0], rows[0]])
            size = torch.stack([columns[-1], rows[-1]]) + 1 - low
            assert (boxes[b, 0] - torch.cat([low, size])).abs().max() < 1.01
            shown += 1
    assert shown > 8


def test_fields_of_a_sample_do_not_depend_on_its_batch():
    view = View(24, (0.2, 1.0), flip=0.5, fields=("mask", "boxes"), margin=8, blur=0.5)
    recipes = {"view": view, "t": View(24, crop_of="view", shift=8, fields=view.fields)}
    whole = made(recipes)
    parts = [made(recipes, index=index) for index in ([0, 1, 2, 3], [4], [5, 6, 7, 8])]
    assert whole.keys() == parts[0].keys() and len(whole) == 10
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize(
    "recipes,message",
    [
        ({"a": View(8, crop_of="b")}, r"view 'a': crop_of is 'b', expected .*there is none"),
        (
            {"a": View(8), "b": View(8, crop_of="a"), "c": View(8, crop_of="b")},
            r"view 'c': crop_of is 'b', expected a view with a crop of its own \(a\)",
        ),
        (
            {"a": View(8, margin=2), "b": View(8, crop_of="a", shift=3)},
            "view 'b': shift is 3, but the crop of 'a' has only 2 pixels to spare",
        ),
        ({"a": View(8, margin=3), "b": View(4, crop_of="a")}, "margin of 3 pixels of 'a'"),
    ],
)
def test_views_that_cannot_belong_together_are_named(recipes, message):
    with pytest.raises(ValueError, match=message):
        linked(recipes)


def test_a_crop_of_another_view_is_made_among_views_only():
    with pytest.raises(ValueError, match="views.linked"):
        apply(View(8, crop_of="view"), pictures(2), 0, ROWS[:2])


# the same pixels as ever


def seeded(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 (B, H, W, 3): blobs with noise, from keyed integers."""
    samples = torch.arange(count)
    small = keyed.bits(keyed.key(seed, "small"), samples, 5, 5, 3) & 255
    rows, columns = torch.arange(height) * 5 // height, torch.arange(width) * 5 // width
    noise = keyed.bits(keyed.key(seed, "noise"), samples, height, width, 3) & 31
    return ((small[:, rows][:, :, columns] * 7 + noise * 8) // 8).to(torch.uint8)


def digest(*tensors) -> str:
    found = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        array = np.ascontiguousarray(np.asarray(tensor))
        found.update(str((array.dtype.str, array.shape)).encode() + array.tobytes())
    return found.hexdigest()


OPTIONS = {
    "plain": {"size": 24},
    "resized": {"size": 17},
    "enlarged": {"size": 40},
    "crop": {"size": 20, "scale": (0.2, 1.0)},
    "ratio": {"size": 20, "scale": (0.1, 0.6), "ratio": (0.5, 1.5)},
    "flip": {"size": 24, "flip": 0.5},
    "crop flip": {"size": 16, "scale": (0.3, 1.0), "flip": 0.5},
    "jitter": {"size": 20, "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8},
    "strong": {"size": 20, "jitter": (3.0, 3.0, 3.0, 0.5)},
    "grey": {"size": 20, "grey": 0.5},
    "blur": {"size": 20, "blur": 0.7, "blur_sigma": (0.1, 1.5)},
    "blur all": {"size": 20, "blur": 1.0},
    "solarise": {"size": 20, "solarise": 0.5},
    "erase": {"size": 32, "erase": 0.8},
    "everything": vars(EVERYTHING),
    "rand-m9-mstd0.5-inc1": {},
    "rand-m6-mstd0.5-inc1": {},
    "rand-m9-n3-mstd0.5": {},
    "rand-m8-inc1-tweights": {},
    "rand-m10-inc1-p1.0": {},
    "rand-m9-mstd101": {},
    "rand-m5-n2-t3a-p0.8": {},
    "rand-m15-mmax20-inc1": {},
    "rand-m7-t3aw-n3": {},
    "rand-m10-n4": {},
}
GOLDEN = json.loads((Path(__file__).parent / "golden/pixels.json").read_text())


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_seeds_give_the_same_pixels_as_ever(name):
    """tests/golden/pixels.json holds digests from before views could share a crop."""
    view = View(**(OPTIONS[name] or {"size": 24, "randaugment": name}))
    rows = torch.tensor([3, 1000, 17, 4, 2**40, 0, 99, 5, 6, 7, 8, 9])
    for height, width in ((24, 24), (31, 50)):
        images = seeded(12, height, width)
        found = digest(*(apply(view, images, key, rows) for key in (7, 2**60)))
        assert found == GOLDEN[f"{name} {height}x{width}"]
    ragged = [seeded(1, h, w, h)[0].numpy() for h, w in ((24, 24), (31, 50), (64, 20))]
    assert digest(apply(view, ragged, 7, rows[:3])) == GOLDEN[f"{name} ragged"]


# bad input


@pytest.mark.parametrize(
    "field,value",
    [
        ("size", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("ratio", (0.0, 1.0)),
        ("flip", 1.5),
        ("jitter", (0.1, 0.1, 0.1, 0.6)),
        ("jitter", (0.1, 0.1)),
        ("jitter", (-0.1, 0, 0, 0)),
        ("blur_sigma", (0.0, 1.0)),
        ("randaugment", "m9"),
        ("randaugment", "rand-q9"),
        ("erase", -0.1),
        ("margin", -1),
        ("shift", 3),
        ("fields", ("masks",)),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"View.{field}: expected"):
        View(**{"size": 16, field: value})


@pytest.mark.parametrize(
    "field,value", [("scale", (0.2, 1.0)), ("ratio", (0.5, 2.0)), ("flip", 0.5), ("margin", 4)]
)
def test_a_shared_crop_is_the_other_view_s(field, value):
    with pytest.raises(ValueError, match=f"View.{field}: expected .*crop_of is given"):
        View(16, crop_of="view", **{field: value})


def test_masks_do_not_follow_randaugment():
    with pytest.raises(ValueError, match="View.fields: expected none, as masks"):
        View(16, randaugment="rand-m9", fields=("mask",))


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="2 images but 3 rows"):
        apply(View(16), pictures(2), 0, ROWS[:3])
    with pytest.raises(ValueError, match="expected uint8"):
        apply(View(16), torch.rand(2, 24, 24, 3), 0, ROWS[:2])
    with pytest.raises(ValueError, match="expected uint8"):
        apply(View(16), torch.zeros(2, 3, 24, 24, dtype=torch.uint8), 0, ROWS[:2])


def test_no_images():
    assert apply(EVERYTHING, pictures(2)[:0], 0, ROWS[:0]).shape == (0, 3, 20, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    images = pictures(9)
    view = replace(
        EVERYTHING, solarise=0.0, randaugment=None
    )  # these two would magnify a level of difference
    found = apply(view, images.cuda(), 7, ROWS)
    assert found.is_cuda
    difference = (found.cpu() - apply(view, images, 7, ROWS)).abs()
    assert difference.mean() < 2e-3
    parts = torch.cat([apply(view, images[b : b + 1].cuda(), 7, ROWS[b : b + 1]) for b in range(9)])
    assert torch.equal(parts, found)
