"""kit/growth.py: steps of several batches, counted one by one; batches of such steps."""

from __future__ import annotations

import pytest
import torch
from test_processes import Pictures

from stages.kit.data.loader import Batches
from stages.kit.data.views import View
from stages.kit.growth import Growth
from stages.kit.train.recipe import Recipe

PAIRS = ((0.0, 4), (0.5, 2), (0.8, 1))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 12, 97, 100])
@pytest.mark.parametrize("pairs", [(), PAIRS, ((0.0, 3), (0.3, 1)), ((0.0, 2), (0.01, 5))])
def test_it_counts_as_one_counts_one_by_one(pairs, steps):
    growth = Growth(pairs, steps)
    expected = []
    for step in range(steps):
        here = [count for share, count in pairs if step / steps >= share]
        expected.append(here[-1] if here else 1)
    assert [growth.batches(step) for step in range(steps)] == expected
    assert [growth.before(step) for step in range(steps + 1)] == [
        sum(expected[:step]) for step in range(steps + 1)
    ]
    assert growth.most == max(expected)
    assert [first for first, _ in growth.phases][0] == 0
    for first, count in growth.phases:
        assert expected[first] == count


def made(**kw) -> Batches:
    return Batches(Pictures(4), {"view": View(4)}, 4, 3, workers=0, epochs=3, **kw)


@pytest.mark.parametrize("micro", [None, 2])
def test_steps_take_the_batches_of_the_order_one_after_the_other(micro):
    """16 images in batches of 4, 12 steps of 4, 2 and 1 batches: each epoch sees every image
    once, and no image has the place of another in its step.
    """
    plain, grows = made(), made(micro=micro, growth=PAIRS)
    seen, taken = [], 0
    for step, micros in enumerate(grows.stream(0, 12)):
        count = (4, 2, 1)[(step >= 6) + (step >= 10)]
        assert len(micros) == count * grows.accumulate
        index = torch.cat([m["index"] for m in micros])
        rows = torch.cat([m["row"] for m in micros])
        assert torch.equal(rows, torch.arange(4 * count))
        expected = [plain.batch(taken + n) for n in range(count)]
        assert torch.equal(index, torch.cat([b["index"] for b in expected]))
        view = torch.cat([m["view"] for m in micros])
        assert torch.equal(view, torch.cat([b["view"] for b in expected]))
        taken += count
        seen += index.tolist()
    assert taken == 34 and grows.most_micros == 4 * grows.accumulate
    for epoch in range(8):
        assert sorted(seen[16 * epoch : 16 * epoch + 16]) == list(range(16))
    with pytest.raises(IndexError, match="step 11, micro step"):
        grows.batch(11, grows.accumulate)


def test_a_stream_begins_anywhere():
    grows = made(growth=PAIRS)
    whole = list(grows.stream(0, 12))
    for start in (1, 5, 6, 11):
        for found, expected in zip(grows.stream(start, 12), whole[start:], strict=True):
            assert all(
                torch.equal(a["index"], b["index"]) for a, b in zip(found, expected, strict=True)
            )


def test_two_ranks_share_every_batch():
    whole = made(growth=PAIRS)
    ranks = [made(growth=PAIRS, rank=rank, world=2) for rank in range(2)]
    for step in (0, 7, 11):
        for part in range(whole._micro_steps(step)):
            halves = [each.batch(step, part) for each in ranks]
            for key in ("index", "row"):
                both = torch.cat([half[key] for half in halves])
                assert torch.equal(both, whole.batch(step, part)[key])


def test_what_growth_needs_is_said():
    with pytest.raises(ValueError, match="growth needs `epochs`"):
        Batches(Pictures(4), {"view": View(4)}, 4, 3, growth=PAIRS)


def test_without_growth_a_recipe_is_what_it_was():
    recipe = Recipe(3, 4, 4, lr=0.1)
    assert recipe.batches.before(12) == 12 and recipe.batches.phases == [(0, 1)]
    assert recipe.lr_at(5) == Recipe(3, 4, 4, lr=0.1, lr_grows=True).lr_at(5)
