"""The watch over a self-distillation: what is a collapse, when it stops, and what it advises."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kit.parts import collapse
from stages.kit.parts.collapse import CollapseError, FeatureWatch, Watch
from stages.methods import dino
from tests import tiny

K, STEPS = 16, 2000


def at(step: int, steps: int = STEPS):
    return tiny.progress(4, step, steps, epoch=step / 10)


UNIFORM = torch.full((8, K), 1 / K)
ONE = torch.eye(K)[[3] * 8]
SAME = torch.linspace(1, 5, K).softmax(0).expand(8, K)  # neither, and still the same for all
ALIVE = torch.eye(K)[[0, 1, 2, 3] * 2]


def watched(given: torch.Tensor, steps: int, watch: Watch | None = None, start: int = 0) -> Watch:
    watch = watch or Watch(K, 0.01, "assignments")
    for step in range(start, start + steps):
        for part in given.split(3):  # micro batches of unequal size
            watch.count(part)
        watch.step(at(step))
    return watch


@pytest.mark.parametrize(
    "given, name", [(UNIFORM, "uniform over"), (ONE, "one prototype for all"), (SAME, "")]
)
def test_a_teacher_that_stays_without_information_stops_the_training(given, name):
    limit = int(collapse.PATIENCE * STEPS)
    watch = watched(given, limit - 1)
    assert int(watch.steps_below) == limit - 1
    with pytest.raises(
        CollapseError,
        match="for 500 steps the mutual information of its assignments with the images",
    ) as error:
        watched(given, 20, watch, limit - 1)
    assert (
        name in str(error.value) and "at step 500 of 2000" in str(error.value) and error.value.plain
    )
    for advice in ("lower teacher_temp", "centre_momentum", "lower lr", "min_information: 0"):
        assert advice in str(error.value)


def test_one_step_with_information_starts_the_count_again():
    watch = watched(UNIFORM, 450)
    watched(ALIVE, 1, watch, 450)
    assert int(watch.steps_below) == 0
    watched(UNIFORM, 499, watch, 451)
    assert int(watched(ALIVE, 1500, start=0).steps_below) == 0


def test_the_bound_is_a_share_of_ln_k():
    """Half of the images on one prototype, half between it and another: a mutual information by
    hand.
    """
    a = 0.1
    given = torch.tensor([[1.0, 0.0], [1 - a, a]])
    h = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p))  # noqa: E731
    information = (h(a / 2) - h(a) / 2) / math.log(2)
    for bound, below in ((0.99 * information, 0), (1.01 * information, 1)):
        watch = Watch(2, bound, "assignments")
        watch.count(given)
        watch.step(at(0))
        assert int(watch.steps_below) == below


def test_short_trainings_have_time_to_start():
    watch = Watch(K, 0.01, "assignments")
    for step in range(collapse.LEAST_STEPS - 1):
        watch.count(UNIFORM)
        watch.step(at(step, 300))
    watch.count(UNIFORM)
    with pytest.raises(CollapseError):
        watch.step(at(collapse.LEAST_STEPS - 1, 300))


def test_nothing_counted_counts_for_nothing_and_zero_never_stops():
    watch = Watch(K, 0.01, "assignments")
    watch.step(at(0))
    assert int(watch.steps_below) == 0
    for given in (UNIFORM, ONE, SAME):
        assert int(watched(given, 3, Watch(K, 0.0, "assignments")).steps_below) == 0


def test_a_resumed_training_stops_at_the_same_step():
    watch = watched(ONE, 300)
    other = Watch(K, 0.01, "assignments")
    other.load_state_dict(watch.state_dict())
    with pytest.raises(CollapseError, match="at step 500 of"):
        watched(ONE, 400, other, 300)


def test_a_collapsed_teacher_stops_the_methods_training(monkeypatch):
    """The real thing: all prototypes alike make uniform distributions; a centre far off makes one
    for all.
    """
    monkeypatch.setattr(collapse, "LEAST_STEPS", 2)
    spec = tiny.spec(embed_dim=16, depth=1)
    for break_it, name in (("weight", "uniform over"), ("centre", "one prototype")):
        torch.manual_seed(0)
        sizes = dict(prototypes=K, hidden=8, bottleneck=4, n_local=0)
        model = dino.Method(dino.Config(**sizes, centring="centre", teacher_temp=0.04), spec)
        if break_it == "weight":
            model.teacher.head.last_layer.weight[:] = 1.0
        else:
            model.teacher.centre.value[5] = -30.0
        x = {view: torch.rand(4, 3, 16, 16) for view in ("global1", "global2")}
        with pytest.raises(CollapseError, match=name):
            for step in range(4):
                model(x, at(step, 8))
                model.watch.step(at(step, 8))


# --- features -------------------------------------------------------------------------------------


def fed(features: torch.Tensor, grid: int = 2, parts: int = 1) -> tuple[FeatureWatch, list]:
    """Features (B,N,D) of all places of a grid, in so many micro batches."""
    watch, found = FeatureWatch(0.01), []
    for part in features.chunk(parts):
        places = torch.arange(grid**2).expand(len(part), -1)
        found.append(watch.count(part, places, grid).item())
    return watch, found


def test_the_variety_of_features_by_hand():
    """Unbiased variance over images at each place, over the mean square; in float64."""
    features = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)) + 2
    x = features.double()
    expected = x.var(dim=0).sum(1).mean() / x.square().sum(2).mean()
    watch, found = fed(features)
    assert found == [pytest.approx(expected.item(), rel=1e-5)]
    halves, _ = fed(features, parts=2)
    assert collapse.variety(halves._sums).item() == pytest.approx(expected.item(), rel=1e-5)
    # some places of some images only, in another order
    watch = FeatureWatch(0.01)
    places = torch.tensor([[3, 1], [1, 0], [0, 3]])
    some = features[:3].gather(1, places[..., None].expand(-1, -1, 5))
    within = [x[[0, 1], 1], x[[1, 2], 0], x[[0, 2], 3]]
    variance = sum(pair.var(dim=0).sum() for pair in within) / 3
    expected = variance / some.double().square().sum(2).mean()
    assert watch.count(some, places, 2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_that_tell_places_and_not_images_have_no_variety():
    places = torch.randn(1, 4, 5).expand(6, -1, -1)
    assert fed(places)[1] == [pytest.approx(0, abs=1e-6)]
    assert fed(torch.randn(1, 4, 5))[1] == [0]  # of one image nothing is known
    assert fed(torch.randn(64, 4, 5))[1] == [pytest.approx(1, abs=0.05)]


def test_features_without_variety_stop_a_training_and_a_bound_of_zero_does_not():
    same, limit = torch.ones(3, 4, 5), int(collapse.PATIENCE * STEPS)
    for bound, reached in ((0.01, limit), (0.0, 2 * limit)):
        watch, places = FeatureWatch(bound), torch.arange(4).expand(3, -1)
        try:
            for step in range(2 * limit):
                watch.count(same, places, 2)
                watch.step(at(step))
        except CollapseError as error:
            assert "(min_variety), now by 0" in str(error) and "min_variety: 0" in str(error)
            assert step + 1 == reached
        else:
            assert bound == 0
    watch.step(at(0))  # nothing was counted
