"""The gate of tokenizers: agreement of codes by hand, probes, and whom it fails."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stages import data as stage
from stages.kit import keyed
from stages.kit.data import store
from stages.kit.data.views import View
from stages.kit.nets.target import Frozen, Target
from stages.kit.parts import probes, tokens
from stages.reporting.tokens import said
from tests import tiny
from tests.conftest import tiny_content, write_params

SPEC, CODES = tiny.spec(), 8


class Codes(Target):
    """Codes of (grey of a patch (B,N), batch number) by any function."""

    def __init__(self, function):
        super().__init__()
        self.spec, self.sizes, self.function, self.seen = SPEC, {"ids": CODES}, function, 0

    def look(self, images, wanted, norm, layers):
        self.seen += 1
        grey = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), SPEC.grid).flatten(1)
        return {"ids": self.function(grey, self.seen).long().clamp(0, CODES - 1)}


def noise(grey, seen):
    return keyed.uniform(seen, torch.arange(len(grey)), grey.shape[1]) * CODES


def place(grey, seen):
    return (torch.arange(grey.shape[1]) % CODES).expand_as(grey)


CHANCE = {"noise": noise, "constant": lambda grey, seen: grey * 0, "place": place}


def shade(grey, seen):
    return grey * CODES


class Knowing(Target):
    """Features that are one number for each of a few shades."""

    def __init__(self, *gives: str):
        super().__init__()
        self.spec, self.sizes = SPEC, dict.fromkeys(gives or ("patch", "cls"), CODES)

    def look(self, images, wanted, norm, layers):
        patch = F.one_hot(Codes(shade)(images, "ids")["ids"], CODES).float()
        return {"patch": patch, "cls": patch.mean(1)}


@pytest.fixture(scope="module", params=["labels", "none"])
def data(request, tmp_path_factory):
    """Images of nearly one grey each, which is their class; with labels and without."""
    folder = tmp_path_factory.mktemp("greys")
    for split, count in (("train", 96), ("val", 48), ("test", 16)):
        for i in range(count):
            shades = np.random.default_rng(i + count).integers(0, 9, (16, 16, 1), dtype=np.uint8)
            below = folder / "images" / split / (f"c{i % 4}" if request.param == "labels" else "")
            below.mkdir(parents=True, exist_ok=True)
            pixels = (30 + 60 * (i % 4) + shades).repeat(3, axis=2)
            Image.fromarray(pixels).save(below / f"{i}.png")
    content = tiny_content(data=None)
    content["data"] = {"source": f"folder:{folder / 'images'}", "image_size": 16}
    if request.param == "none":  # with which no task can be done
        none = dict.fromkeys(content["tasks"])
        content["grid"]["runs"] = {"mae": {"method": "mae", "tasks": none}}
    params = write_params(folder, content)
    assert stage.main(["--params", str(params), "--results", str(folder / "results")]) == 0
    return folder / "results/data/main"


def labelled(data) -> bool:
    return bool((store.Split.open(data, "val").labels >= 0).any())


def examined(function, data, upstream=None) -> tokens.Found:
    return tokens.examine(Codes(function), upstream, data, SPEC, 0, "cpu")


# ------------------------------------------------------------------------------------- agreement


def test_places_of_two_views_by_hand():
    """Grids of 2 x 2 on an image of 8 x 8; the second view is its right part, then mirrored."""
    whole, half = [0, 0, 8, 8, 0], [0, 5, 8, 3, 0]
    first, second = torch.tensor([whole, whole, [0, 0, 8, 8, 1], half]), torch.tensor([half] * 4)
    second[1, 4] = 1
    found = tokens.shared(first, second, 2).tolist()
    # centres of the whole image's patches lie at x = 2 and 6, which is a third of the part
    assert found == [[-1, 0, -1, 2], [-1, 1, -1, 3], [0, -1, 2, -1], [0, 1, 2, 3]]
    below = torch.tensor([[8, 0, 8, 8, 0]])
    assert tokens.shared(below, torch.tensor([whole]), 2).tolist() == [[-1] * 4]


def test_places_agree_with_the_pixels_of_real_views():
    """An image whose pixel tells where it is: both views show the same there."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = torch.stack([4 * y, 4 * x, 0 * x], 2).to(torch.uint8)
    view = View(size=32, scale=tokens.CROP, flip=0.5)
    rows = SimpleNamespace(images=image.expand(40, -1, -1, -1), index=torch.arange(40))
    one, two = (view.make(name, rows, lambda _, k=k: k) for k, name in enumerate("ab"))
    places = tokens.shared(one["a.box"], two["b.box"], 8)
    first, second = (F.avg_pool2d(v, 4).flatten(2) * 255 / 4 for v in (one["a"], two["b"]))
    seen = places >= 0
    there = second.gather(2, places.clamp(min=0)[:, None].expand(-1, 3, -1))
    off = (first - there).abs().amax(1)[seen]
    assert 0.3 < float(seen.float().mean()) < 0.9
    assert float(off.max()) <= 64 / 8 / 2 + 2  # half of the largest patch, and the resize's blur


def test_agreement_by_hand():
    first = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5], [7, 7, 7, 7]])
    second = torch.tensor([[2, 1, 0, 5], [5, 1, 5, 5], [0, 0, 0, 0]])
    places = torch.tensor([[1, 0, -1, -1], [0, 1, 2, 3], [-1, -1, -1, -1]])
    equal, chance = tokens.agreement(first, second, places)
    assert equal.tolist() == [1.0, 0.75]  # the third sees nothing in both
    # of image 0 with the codes of images 1 and 2: (1, 2) against (1, 5), (0, 0); of 1 with 2 and 0
    assert chance.tolist() == [(0.5 + 0) / 2, (0 + 0.25) / 2]


# ---------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("name", CHANCE)
def test_codes_at_chance_fail_with_advice(name, data):
    found = examined(CHANCE[name], data)
    assert len(found.problems) == 1 and "agree no better than by chance" in found.problems[0]
    assert "gate: false" in found.problems[0]
    assert found.numbers["excess_low"] <= 0 <= found.numbers["excess_high"]


def test_codes_that_tell_the_class_pass(data):
    found = examined(shade, data, Frozen(Knowing()))
    n = found.numbers
    assert found.problems == found.notes == []
    assert n["agreement"] > 0.8 > 0.4 > n["agreement_chance"] and n["excess_low"] > 0.4
    assert n["agreement_images"] == 48
    if not labelled(data):
        assert not any(key.startswith("probe") for key in n)
        return
    assert n["probe"] == n["probe_teacher"] == 1 and n["probe_low"] > 0.9
    assert n["probe_chance"] == 0.25 and (n["probe_train"], n["probe_val"]) == (96, 48)


@pytest.mark.parametrize("given", ["cls", "patch"])
def test_a_teachers_own_features_are_probed(data, given):
    """By the class feature, or the mean of patches; the untrained encoder's stands beside it."""
    found = probes.of_features(Frozen(Knowing(given)), data, SPEC, 0, "cpu", 16)
    if not labelled(data):
        assert found == {}
        return
    assert found["probe"] == 1 and found["probe_chance"] == 0.25
    assert set(found) >= {"probe_low", "probe_high", "probe_untrained"} and "probe_" not in found
    assert (found["probe_train"], found["probe_val"]) == (96, 48)


def test_the_measures_are_a_function_of_the_seed(data):
    assert examined(shade, data).numbers == examined(shade, data).numbers


def test_the_untrained_encoder_is_drawn_from_the_seed():
    x, before = tiny.images(), torch.get_rng_state()
    found = [probes.untrained(SPEC, seed, "cpu")(x, "patch")["patch"] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


GOOD = {
    "agreement": 0.5,
    "agreement_chance": 0.1,
    "excess_low": 0.3,
    "excess_high": 0.5,
    "agreement_images": 100,
    "probe": 0.6,
    "probe_low": 0.5,
    "probe_high": 0.7,
    "probe_untrained": 0.4,
    "probe_chance": 0.2,
    "probe_train": 200,
    "probe_val": 100,
}
AT_CHANCE = {"probe": 0.2, "probe_low": 0.1, "probe_high": 0.3, "probe_untrained": 0.15}
BARELY = {"agreement": 0.15, "excess_low": 0.01, "excess_high": 0.09}


@pytest.mark.parametrize(
    ("changes", "problem", "note"),
    [
        ({}, None, None),
        ({"probe_untrained": 0.65}, None, "untrained encoder's features 65.0%"),
        (AT_CHANCE, None, "chance is 20.0%"),
        (BARELY, None, None),
        (BARELY | AT_CHANCE, "say nothing of the class", None),
        ({"excess_low": 0.0}, "no better than by chance", None),
        ({"excess_low": -0.1, "agreement_images": 31}, None, None),
        (BARELY | AT_CHANCE | {"probe_val": 31}, None, None),
    ],
)
def test_whom_the_gate_fails(changes, problem, note):
    found = tokens.Found(GOOD | changes)
    tokens.judge(found)
    for said_, wanted in ((found.problems, problem), (found.notes, note)):
        assert len(said_) == (wanted is not None)
        assert wanted is None or wanted in said_[0]


def test_what_the_report_says_of_codes():
    lines = dict(said(GOOD | {"probe_teacher": 0.8}))
    assert lines["codes of two crops agree"] == "50.0% of the places that both see"
    assert lines["difference"] == "30.0 to 50.0 points, over 100 images"
    assert lines["linear probe of codes"] == "60.0% (50.0% to 70.0%)"
    assert lines["of its upstream's features"] == "80.0%"
    assert lines["of the untrained encoder"] == "40.0%" and "judge" in lines["labels"]
    without = said({key: value for key, value in GOOD.items() if "probe" not in key})
    assert len(without) == 3 and said({}) == []
