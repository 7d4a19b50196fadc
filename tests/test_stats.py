"""Intervals and paired tests against scipy's closed forms and against counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as sp

from stages.reporting import stats


def test_t_interval_is_scipys():
    x = [0.61, 0.64, 0.60, 0.66, 0.63]
    low, high = sp.t.interval(0.95, len(x) - 1, loc=np.mean(x), scale=sp.sem(x))
    got = stats.t_interval(x)
    assert (got.mean, got.low, got.high, got.n) == pytest.approx((np.mean(x), low, high, 5))
    assert got.half == pytest.approx((high - low) / 2)


def test_t_interval_covers():
    """Of 2,000 intervals over four normal draws, 95 % contain the truth (binomial spread: half a
    per cent).
    """
    draws = np.random.default_rng(0).normal(0.7, 0.1, (2000, 4))
    inside = [i.low <= 0.7 <= i.high for i in map(stats.t_interval, draws)]
    assert 0.93 < np.mean(inside) < 0.97


def test_one_seed_has_no_interval():
    one = stats.t_interval([0.5])
    assert one.low is None and one.high is None and one.half is None and one.n == 1


@pytest.mark.parametrize("bad", [[], [0.1, float("nan")]])
def test_t_interval_refuses(bad):
    with pytest.raises(ValueError, match="t_interval"):
        stats.t_interval(bad)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (20, 20), (7, 20), (731, 1000)])
def test_wilson_is_scipys(k, n):
    want = sp.binomtest(k, n).proportion_ci(0.95, method="wilson")
    got = stats.wilson(k, n)
    assert (got.mean, got.low, got.high) == pytest.approx((k / n, want.low, want.high))


def test_wilson_refuses_more_hits_than_images():
    with pytest.raises(ValueError, match="3 of 2"):
        stats.wilson(3, 2)


def test_paired_seeds_uses_common_seeds_only():
    a, b = {0: 0.70, 1: 0.74, 2: 0.71, 9: 0.1}, {0: 0.66, 1: 0.69, 2: 0.69, 5: 0.9}
    assert stats.paired_seeds(a, b) == pytest.approx(
        sp.ttest_rel([0.70, 0.74, 0.71], [0.66, 0.69, 0.69]).pvalue
    )
    assert stats.paired_seeds({0: 0.7, 1: 0.8}, {0: 0.6, 1: 0.7}) is None
    assert stats.paired_seeds({0: 0.5, 1: 0.5, 2: 0.5}, {0: 0.5, 1: 0.5, 2: 0.5}) == 1.0


def test_one_seed_over_images_is_mcnemar():
    """12 images only a gets right, 3 only b: the exact test is a fair coin's 12 of 15, counted by
    hand.
    """
    a = np.array([1] * 12 + [0] * 3 + [1] * 40 + [0] * 20, bool)
    b = np.array([0] * 12 + [1] * 3 + [1] * 40 + [0] * 20, bool)
    from math import comb

    want = 2 * sum(comb(15, k) for k in range(12, 16)) / 2**15
    assert stats.paired_images(a, b) == pytest.approx(want)
    assert stats.paired_images(a, a) == 1.0


def test_images_are_clusters():
    """Copying a seed adds no evidence: five copies give the p value of one (up to t against the
    exact test).
    """
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.70, rng.random(400) < 0.63
    copies = stats.paired_images(np.stack([a] * 5), np.stack([b] * 5))
    assert copies == pytest.approx(sp.ttest_1samp(a.astype(float) - b, 0).pvalue)
    assert copies == pytest.approx(stats.paired_images(a, b), rel=0.3)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []


def _run(rng, rate, seeds, images=600):
    base = np.linspace(0, 1, images)  # an image's difficulty is shared by all seeds
    hits = {s: base + rng.normal(0, 0.05, images) < rate for s in range(seeds)}
    return stats.Scores({s: float(h.mean()) for s, h in hits.items()}, hits)


def test_rank_best_needs_seeds_and_images():
    rng = np.random.default_rng(2)
    clear = stats.rank({"a": _run(rng, 0.8, 4), "b": _run(rng, 0.6, 4), "c": _run(rng, 0.3, 4)})
    assert (clear.leader, clear.state, clear.ties, clear.seeds) == ("a", "best", (), 4)
    one_seed = stats.rank({"a": _run(rng, 0.8, 1), "b": _run(rng, 0.6, 1)})
    assert (one_seed.state, one_seed.seeds) == ("ahead", 1)
    near = stats.rank({"a": _run(rng, 0.700, 4), "b": _run(rng, 0.701, 4), "c": _run(rng, 0.3, 4)})
    assert near.state == "tie" and len(near.ties) == 1 and near.ties[0] != "c"


def test_rank_a_noise_winner_is_rarely_called_best():
    """With no true difference the word "best" falls in at most 5 % of the experiments
    (intersection-union: far less).
    """
    rng = np.random.default_rng(3)
    called = [
        stats.rank({n: _run(rng, 0.6, 3, 200) for n in "abc"}).state == "best" for _ in range(150)
    ]
    assert np.mean(called) <= 0.05


def test_an_interval_over_images_of_any_score():
    """Right or wrong: Wilson's. Scores in between: Student's, inside [0, 1]."""
    assert stats.image_interval(np.array([1.0, 0, 1, 1])) == stats.wilson(3, 4)
    some = np.array([0.9, 0.8, 1.0, 0.4])
    want, got = stats.t_interval(some), stats.image_interval(some)
    assert (got.mean, got.low) == (want.mean, want.low) and got.high == 1.0 < want.high
    assert stats.image_interval(np.array([0.5])).low is None


def test_a_test_that_points_the_other_way_supports_nothing():
    """A mIoU may be higher although the single images' IoU are lower; then no one is best."""
    rng = np.random.default_rng(5)
    high, low = rng.uniform(0.5, 0.7, (3, 300)), rng.uniform(0.4, 0.6, (3, 300))
    a = stats.Scores({0: 0.60, 1: 0.62, 2: 0.61}, dict(enumerate(low)))
    b = stats.Scores({0: 0.50, 1: 0.51, 2: 0.52}, dict(enumerate(high)))
    assert stats.compare(a, b)[1] == 1.0 and stats.compare(b, a)[0] == 1.0
    assert stats.rank({"a": a, "b": b}).state == "tie"
    assert not stats.contrast([a], [b]).sure
    a, b = stats.Scores(a.scores, b.images), stats.Scores(b.scores, a.images)
    assert stats.rank({"a": a, "b": b}).state == "best"


def test_rank_without_predictions_or_rivals():
    assert stats.rank({}) is None
    assert stats.rank({"a": stats.Scores({0: 0.5})}).state == "alone"
    untested = stats.rank({"a": stats.Scores({0: 0.9}), "b": stats.Scores({0: 0.1})})
    assert untested.state == "tie" and untested.p == {"b": None}
    seeds = stats.rank(
        {
            "a": stats.Scores({0: 0.9, 1: 0.91, 2: 0.92}),
            "b": stats.Scores({0: 0.1, 1: 0.12, 2: 0.11}),
        }
    )
    assert seeds.state == "best"


def test_p_values_are_uniform_under_equality():
    rng = np.random.default_rng(4)
    p = [
        stats.paired_images(rng.random((3, 300)) < 0.6, rng.random((3, 300)) < 0.6)
        for _ in range(300)
    ]
    assert sp.kstest(p, "uniform").pvalue > 0.001


def test_a_contrast_is_the_mean_difference_paired_by_seed_and_image():
    """Two runs against one, two seeds, four images, by hand: seed 0 (3/4 + 1/4)/2 - 1/4, seed 1
    (4/4 + 2/4)/2 - 1/4.
    """

    def scores(*rows):
        hits = {seed: np.array(row, float) for seed, row in enumerate(rows)}
        return stats.Scores({seed: row.mean() for seed, row in hits.items()}, hits)

    a, b = scores([1, 1, 1, 0], [1, 1, 1, 1]), scores([1, 0, 0, 0], [1, 1, 0, 0])
    base = scores([1, 0, 0, 0], [0, 0, 1, 0])
    got = stats.contrast([a, b], [base])
    assert got.seeds == stats.t_interval([0.25, 0.5])
    images = [1 - 0.5, 0.75 - 0, 0.5 - 0.5, 0.25 - 0]  # means over runs and seeds
    assert got.images == stats.t_interval(images)
    assert not got.sure  # two seeds that differ by 0.25 say little
    same = stats.contrast([base], [base])
    assert same.seeds.mean == 0 and not same.sure


def test_a_contrast_takes_common_seeds_and_says_what_it_cannot_tell():
    a, b = stats.Scores({0: 0.7, 1: 0.8, 2: 0.9}), stats.Scores({1: 0.5, 2: 0.7, 3: 0.1})
    assert stats.contrast([a], [b]) == stats.Contrast(
        stats.t_interval([0.8 - 0.5, 0.9 - 0.7]), None
    )
    assert stats.contrast([a], [stats.Scores({7: 0.5})]) is None
    one = stats.contrast([stats.Scores({0: 0.7})], [stats.Scores({0: 0.5})])
    assert one.seeds.low is None and not one.sure


def test_a_sure_contrast_needs_seeds_and_images():
    right, wrong = np.r_[np.ones(90), np.zeros(10)], np.r_[np.zeros(30), np.ones(30), np.zeros(40)]
    a = stats.Scores({k: right.mean() + k / 1000 for k in range(3)}, dict.fromkeys(range(3), right))
    b = stats.Scores({k: wrong.mean() for k in range(3)}, dict.fromkeys(range(3), wrong))
    assert stats.contrast([a], [b]).sure
    assert not stats.contrast([stats.Scores(a.scores)], [b]).sure
