"""The watch over a self-distillation: what is a collapse, when it stops, and what it advises."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kit.parts import collapse
from stages.kit.parts.collapse import CollapseError, Watch
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
