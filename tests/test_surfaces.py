"""The source `surfaces`: purity, patterns that repeat as they should, and what tells the class."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from stages.sources import surfaces

DATA = {"image_size": 24, "store_size": None, "seed": 0}

# (periods in p, in q): after how much of either a pattern is the same again; inf: it never changes
PERIODS = {
    "stripes": (1, np.inf),
    "zigzag": (1, 1.25),
    "checks": (1, 1),
    "bricks": (2, 2),
    "dots": (1, 1),
    "mesh": (1, 1),
    "scales": (1, 4 / 3),
    "waves": (1, 1 / 0.7),
    "rings": (2, 2),
    "triangles": (1, 1),
}


def render(index, split="train", seed=0, size=24, **options):
    return surfaces.render(seed, split, np.asarray(index), size, surfaces.Config(**options))


def test_every_image_is_a_function_of_seed_split_and_index():
    together = render(range(30))
    for i in (0, 7, 29):
        np.testing.assert_array_equal(render([i])[0], together[i])
    np.testing.assert_array_equal(render(range(29, -1, -1))[::-1], together)
    for other in (render(range(30), seed=1), render(range(30), split="test")):
        assert (other != together).reshape(30, -1).any(1).all()


def test_splits_classes_and_sizes_are_as_asked():
    found = surfaces.read(None, surfaces.Config(train=60, val=0, test=12, classes=6), DATA)
    assert list(found.splits) == ["train", "test"] and found.classes == surfaces.PATTERNS[:6]
    listing = found.splits["train"]
    assert np.bincount(listing.labels).tolist() == [10] * 6
    chosen = list(listing.read(np.array([3, 59])))
    everything = list(listing.read(np.arange(60)))
    assert len({sample.name for sample in everything}) == 60
    for row, sample in zip((3, 59), chosen, strict=True):
        assert sample.name == everything[row].name
        np.testing.assert_array_equal(sample.image, everything[row].image)
    assert chosen[0].image.shape == (24, 24, 3) and chosen[0].image.dtype == np.uint8
    larger = surfaces.read(None, surfaces.Config(), {**DATA, "store_size": 40}).splits["train"]
    assert next(larger.read(np.array([0]))).image.shape == (40, 40, 3)


@pytest.mark.parametrize("name", surfaces.PATTERNS)
def test_a_pattern_repeats_with_its_period_and_has_both_colours(name):
    field = surfaces._FIELDS[surfaces.PATTERNS.index(name)]
    p, q = np.random.default_rng(0).uniform(0.01, 5, (2, 4000))
    here = field(p, q)
    for axis, period in enumerate(PERIODS[name]):
        step = 0.37 if np.isinf(period) else period
        there = field(p + step * (axis == 0), q + step * (axis == 1))
        np.testing.assert_allclose(there, here, atol=1e-9)
        if not np.isinf(period):  # and not before
            half = field(p + step / 2 * (axis == 0), q + step / 2 * (axis == 1))
            assert np.abs(half - here).mean() > 0.1
    assert 0.1 < (here > 0).mean() < 0.9


def test_the_patterns_differ():
    p, q = np.meshgrid(np.linspace(0, 4, 97), np.linspace(0, 4, 97))
    fields = [np.clip(field(p, q), -1, 1) for field in surfaces._FIELDS]
    for i, one in enumerate(fields):
        assert all(np.abs(one - other).mean() > 0.1 for other in fields[:i])


def test_only_the_pattern_tells_the_class():
    """Tints say nothing of the class, pixels at their places little; the local contrast along
    the two axes, wherever it is, says more.
    """
    count, classes = 1600, 8
    pictures = render(range(count), classes=classes, turn=10.0, period=(0.28, 0.36)) / 255
    labels = np.arange(count) % classes
    colour = pictures.mean((1, 2))
    colour -= colour.mean(1, keepdims=True)  # how light it is follows from the pattern's cover
    between = np.stack([colour[labels == k].mean(0) for k in range(classes)]).var(0)
    # the variance of a mean of 200 when the class says nothing
    assert (between < 2.5 * colour.var(0) / (count / classes)).all()

    def probe(x):
        x = (x - x.mean(0)) / x.std(0)
        return RidgeClassifier(100.0).fit(x[:1200], labels[:1200]).score(x[1200:], labels[1200:])

    grey = pictures.mean(3)
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    steps = [np.abs(np.diff(grey, n, axis)) for axis in (1, 2) for n in (1, 2)]
    pooled = np.stack([f(x.reshape(count, -1), 1) for x in steps for f in (np.mean, np.std)], 1)
    assert probe(grey.reshape(count, -1)) < 0.4 < 0.5 < probe(pooled)


def test_grey_surfaces_have_no_colour():
    pictures = render(range(20), grey=True).astype(int)
    # what is left is the noise, which is each channel's own
    assert np.abs(pictures.mean((1, 2)) - pictures.mean((1, 2, 3))[:, None]).max() < 1
    assert np.abs(render(range(20)).mean((1, 2)).std(1)).mean() > 5


@pytest.mark.parametrize(
    "key, value",
    [("train", 0), ("val", -1), ("classes", 1), ("classes", 11), ("turn", 270), ("period", (0, 1))],
)
def test_options_are_checked(key, value):
    with pytest.raises(ValueError, match=f"{key}: found"):
        surfaces.Config(**{key: value})
