"""The first sentence of a report, on scores that decide what it may say."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats as sp

from stages.reporting import stats
from stages.reporting.results import Cell, Row, Task
from stages.reporting.sentence import Sentence, sentence
from tests.fabricated import TOP1, facts

KNN = Task("knn", "knn", "knn", "main", **TOP1)
SEG = Task("seg", "seg", "seg", "main", key="miou", label="mIoU", unit="%")
AUC = Task("anomaly", "anomaly", "anomaly", "main", key="auc", label="AUC", unit="")
KINDS = {
    "mae": facts("mae"),
    "beitv2": facts("beitv2"),
    "dino": facts("dino"),
    "random": facts("random", trains=False),
    "other": facts("random", trains=False),
    "supervised": facts("supervised", labels=True),
    "taught": facts("dbot", label_targets=["clip"]),
}
MINUS = "\N{MINUS SIGN}"


def cell(right: list[int], total: int = 1000, mean: float | None = None) -> Cell:
    """Of each seed, how many of the test images are right: the first ones. mean: the headline,
    where it is another number than the share of right images.
    """
    images = {s: (np.arange(total) < n).astype(float) for s, n in enumerate(right)}
    values = {s: i.mean() if mean is None else mean for s, i in images.items()}
    interval = stats.t_interval(list(values.values())) if values else None
    return Cell(stats.Scores(values, images), {}, interval, None, None)


def said(scores: dict, encoders: dict | None = None) -> Sentence:
    """scores: {task: {run: cell}}."""
    runs = list(dict.fromkeys(run for cells in scores.values() for run in cells))
    rows = {run: Row(run, KINDS[run], 0) for run in runs}
    cells = {(run, t.id): cells.get(run, cell([])) for t, cells in scores.items() for run in runs}
    return sentence(rows, list(scores), cells, encoders or dict.fromkeys(runs, "vit"))


def test_a_gain_over_three_seeds():
    pairs = [(350, 620), (352, 630), (354, 625)]
    below, above = zip(*pairs)
    found = said({KNN: {"mae": cell(above), "random": cell(below)}})
    images = np.mean([(np.arange(1000) >= a) & (np.arange(1000) < b) for a, b in pairs], axis=0)
    low, high = sp.t.interval(0.95, 999, loc=images.mean(), scale=sp.sem(images))
    assert found.text == (
        "Pretraining without labels beats an untrained encoder on knn: mae is right on 62.5 % of "
        f"the test images, the untrained encoder on 35.2 % (+27.3, 95 % interval +{low * 100:.1f} "
        f"to +{high * 100:.1f} over the test images; 3 seeds)."
    ), "the wider of both intervals is shown"
    assert found.more == ""


def test_the_interval_over_seeds_is_shown_where_it_is_wider():
    found = said({KNN: {"mae": cell([560, 640, 670]), "random": cell([350, 352, 354])}})
    want = stats.t_interval([0.210, 0.288, 0.316])
    span = f"{KNN.change(want.low)} to {KNN.change(want.high)}"
    assert f"(+27.1, 95 % interval {span} over 3 seeds)" in found.text
    assert found.text.startswith("Pretraining without labels beats")


def test_the_best_of_several_pays_for_their_number():
    both = {"mae": cell([560, 640, 670]), "beitv2": cell([500, 501, 502])}
    found = said({KNN: {**both, "random": cell([350, 352, 354])}})
    want = stats.t_interval([0.210, 0.288, 0.316], 0.975)
    assert "mae, the best of 2 runs, is right on" in found.text
    assert f"{KNN.change(want.low)} to {KNN.change(want.high)} over 3 seeds" in found.text
    close = {"mae": cell([470, 500, 530]), "random": cell([430, 440, 450])}
    assert said({KNN: close}).text.startswith("Pretraining without labels beats")
    three = {**close, "beitv2": cell([400] * 3), "dino": cell([401] * 3)}
    assert "has not been shown to beat" in said({KNN: three}).text, "one of three is best anyhow"


def test_a_loss():
    found = said({KNN: {"mae": cell([300, 305, 302]), "random": cell([400, 402, 404])}})
    assert found.text.startswith(
        "Pretraining without labels does worse than an untrained encoder on knn: mae is right on "
        f"30.2 % of the test images, the untrained encoder on 40.2 % ({MINUS}10.0, 95 % interval "
    )


@pytest.mark.parametrize(
    "right", [[350, 353, 354], [352, 356, 350], [340, 380, 350], [0, 900, 400]]
)
def test_no_lead(right):
    found = said({KNN: {"mae": cell(right), "random": cell([350, 352, 354])}})
    assert "has not been shown to beat an untrained encoder on knn: mae" in found.text
    low, high = re.search(r"interval (\S+) to (\S+) ", found.text).groups()
    assert low.startswith(MINUS)
    assert high.startswith("+")


def test_seeds_that_agree_do_not_beat_images_that_do_not():
    """Three seeds with the same small gain on a hundred images."""
    few = {"mae": cell([41, 41, 42], 100), "random": cell([40, 40, 41], 100)}
    found = said({KNN: few})
    assert "has not been shown to beat" in found.text and "over the test images" in found.text


@pytest.mark.parametrize("seeds, words", [(1, "In one seed, "), (2, "In 2 seeds, ")])
def test_few_seeds_are_said_first(seeds, words):
    right = {"mae": [620, 622], "random": [350, 352]}
    found = said({KNN: {run: cell(each[:seeds]) for run, each in right.items()}})
    assert found.text.startswith(f"{words}pretraining without labels beats an untrained encoder")
    assert ("another seed may differ)" in found.text) == (seeds == 1)
    assert "interval +" in found.text


def test_one_seed_without_a_lead():
    found = said({KNN: {"mae": cell([352]), "random": cell([350])}})
    assert found.text.startswith("In one seed, pretraining without labels has not been shown")
    same = said({KNN: {"mae": cell([350]), "random": cell([350])}})
    assert "has not been shown" in same.text and "(+0.0, no interval; another seed" in same.text


def test_the_untrained_encoder_is_one_that_is_built_alike():
    scores = {"mae": cell([620]), "random": cell([300]), "other": cell([400])}
    alike = {"mae": "swin", "random": "swin", "other": "vit"}
    found = said({KNN: scores}, alike).text
    assert "the untrained encoder on 30.0 %" in found
    found = said({KNN: scores}, alike | {"mae": "beit"}).text
    assert "an untrained encoder built otherwise, other, on 40.0 %" in found


def test_without_a_common_seed_there_is_no_interval():
    other = cell([350])
    other.scores.scores[7] = other.scores.scores.pop(0)
    found = said({KNN: {"mae": cell([620]), "random": other}})
    assert "has not been shown to beat" in found.text
    assert found.text.endswith("(no seed in common, so no interval).")


def test_without_an_untrained_run_the_best_two_are_compared():
    three = {"mae": cell([620] * 3), "beitv2": cell([740, 741, 742]), "dino": cell([500] * 3)}
    found = said({KNN: three}).text
    assert found.startswith("On knn, beitv2 is ahead of mae: it is right on 74.1 % of the test ")
    assert "images, mae, the second of 3 runs, on 62.0 % (+12.1, 95 % interval +" in found
    assert found.endswith("so what pretraining gives is not known.")
    two = {"mae": cell([620]), "beitv2": cell([621])}
    assert said({KNN: two}).text.startswith("On knn, in one seed beitv2 is not told apart from mae")


def test_one_run_alone():
    for more in ({}, {"supervised": cell([820])}):
        found = said({KNN: {"mae": cell([620]), **more}}).text
        assert found.startswith("On knn, mae is right on 62.0 % of the test images, and there is ")
        assert "no untrained encoder and no other run without labels" in found


def test_only_references():
    scores = {"taught": cell([900]), "random": cell([350]), "supervised": cell([820])}
    assert said({KNN: scores}).text == (
        "No run that was pretrained without labels was tested, so what that gives is not known; "
        "for reference, on knn taught is right on 90.0 % of the test images, supervised on 82.0 %, "
        "random on 35.0 %."
    )


def test_no_task_or_no_score():
    words = "No run was tested on a task: this report tells what training took"
    assert sentence({"mae": Row("mae", KINDS["mae"], 0)}, [], {}, {}).text.startswith(words)
    assert said({KNN: {"mae": cell([]), "random": cell([])}}).text.startswith(words)


def test_the_first_task_that_allows_it_is_named_and_others_agree_or_not():
    up = {"mae": cell([620] * 3), "random": cell([350] * 3)}
    down = {"mae": cell([350] * 3), "random": cell([620] * 3)}
    open_ = {"mae": cell([350] * 3), "random": cell([350] * 3)}
    second = Task("linear", "linear", "linear", "main", **TOP1)
    found = said({KNN: {"mae": cell([620] * 3)}, second: up, SEG: up, AUC: open_})
    assert found.text.startswith("Pretraining without labels beats an untrained encoder on linear")
    assert found.more == ("The same holds on seg. It has not been shown to beat one on anomaly.")
    assert said({KNN: up, second: down}).more == "It does worse than one on linear."
    assert said({KNN: open_, second: up}).more == "It beats one on linear."
    once = {"mae": cell([620]), "random": cell([350])}
    assert said({KNN: once, second: once}).more == "In that seed: The same holds on linear."


def test_other_headlines_have_their_own_words():
    found = said({AUC: {"mae": cell([620] * 3), "random": cell([350] * 3)}}).text
    assert "mae reaches 0.620 AUC, the untrained encoder 0.350 (+0.270, 95 % interval +0.2" in found
    right = {"mae": cell([620], mean=0.5), "random": cell([350], mean=0.4)}
    found = said({SEG: right}).text
    assert "mae reaches 50.0 % mIoU, the untrained encoder 40.0 % (+10.0, no interval; " in found
