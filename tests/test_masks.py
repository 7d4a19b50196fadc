"""Masks: exact counts, purity per row, and the distribution of the block rule against a plain reference."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from stages.kit import keyed, masks


def uniforms(rows: torch.Tensor, seed: int = 0):
    """What Progress.uniform is to a method: numbers keyed by name and row."""
    return lambda name, *shape: keyed.uniform(keyed.key(seed, name), rows, *shape)


def reference_block_mask(side: int, count: int, smallest: int, rng: random.Random) -> np.ndarray:
    """BEiT's rule (arXiv 2106.08254, alg. 1) as written for one image, with a generator that advances."""
    mask = np.zeros((side, side), bool)
    while mask.sum() < count:
        cap, grown = count - mask.sum(), False
        for _ in range(10):
            area = rng.uniform(smallest, cap)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < side and width < side:
                top, left = rng.randint(0, side - height), rng.randint(0, side - width)
                new = height * width - mask[top:top + height, left:left + width].sum()
                if 0 < new <= cap:
                    mask[top:top + height, left:left + width] = grown = True
                    break
        if not grown:
            break
    return mask


def test_random_masking_keeps_49_of_196():
    noise = torch.rand(6, 196, generator=torch.Generator().manual_seed(0))
    ids_keep, ids_restore, mask = masks.random_masking(noise, masks.keep_count(196, 0.75))
    assert ids_keep.shape == (6, 49)
    assert mask.sum(1).tolist() == [147] * 6
    assert not torch.equal(mask[0], mask[1])
    again = masks.random_masking(torch.rand(6, 196, generator=torch.Generator().manual_seed(0)), 49)
    assert torch.equal(again[2], mask)
    # ids_restore inverts the shuffle, and the kept patches are exactly the unmasked ones
    order = noise.argsort(dim=1)
    assert torch.equal(order.gather(1, ids_restore), torch.arange(196).expand(6, -1))
    assert torch.equal(order[:, :49], ids_keep)
    assert not mask.gather(1, ids_keep).any()


def test_random_masking_is_uniform():
    noise = keyed.uniform(7, torch.arange(4000), 64)
    _, _, mask = masks.random_masking(noise, 16)
    frequency = mask.mean(0)
    assert (frequency - 0.75).abs().max() < 4.5 * math.sqrt(0.75 * 0.25 / 4000)


@pytest.mark.parametrize(("patches", "ratio", "keep"), [
    (196, 0.75, 49), (64, 0.6, 25), (10, 0.9, 1), (100, 0.9, 10), (25, 0.75, 6), (256, 0.75, 64),
    (1000, 0.999, 1),
])
def test_keep_count_is_exact(patches, ratio, keep):
    assert masks.keep_count(patches, ratio) == keep


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 0.99])
def test_keep_count_refuses(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        masks.keep_count(16, ratio)


def test_hidden_count():
    assert masks.hidden_count(196, 0.3827) == 75
    assert masks.hidden_count(64, 0.39) == 25
    for ratio in (0.0, 0.01, 0.99, 1.0):
        with pytest.raises(ValueError, match="mask_ratio"):
            masks.hidden_count(16, ratio)


@pytest.fixture(scope="module")
def official():
    """2,000 masks of BEiT v2's size."""
    return masks.exact_block_masks(uniforms(torch.arange(2000)), (14, 14), 75, 16)


def test_exact_block_masks_have_exactly_75(official):
    assert official.shape == (2000, 196)
    assert official.dtype == torch.bool
    assert (official.sum(1) == 75).all()


def test_block_mask_frequencies(official):
    frequency = official.float().mean(0).view(14, 14)
    assert frequency[6:8, 6:8].min() > 0.6
    assert max(frequency[i, j] for i in (0, -1) for j in (0, -1)) < 0.1


def test_block_rule_statistics():
    """v1's rule, without top-up: published measurements over 14x14 masks (mean 74.5, exactly 75 in 68 %)."""
    count = masks.block_masks(uniforms(torch.arange(3000)), (14, 14), 75, 16).sum(1)
    assert count.max() == 75
    assert count.min() >= 60
    assert abs(count.float().mean() - 74.5) < 0.15
    assert abs((count == 75).float().mean() - 0.675) < 0.035


@pytest.mark.parametrize(("side", "count", "smallest"), [(14, 75, 16), (8, 25, 4), (8, 25, 16)])
def test_block_rule_has_the_reference_distribution(side, count, smallest):
    total = 1500
    found = masks.block_masks(uniforms(torch.arange(total), 3), (side, side), count, smallest)
    found = found.view(-1, side, side)
    rng = random.Random(1)
    expected = np.stack([reference_block_mask(side, count, smallest, rng) for _ in range(total)])
    expected = torch.from_numpy(expected)
    error = math.sqrt(2 * 0.25 / total)  # of the difference of two shares, at most
    assert (found.float().mean(0) - expected.float().mean(0)).abs().max() < 4.5 * error
    for statistic in (
        lambda x: (x.sum((1, 2)) == count).float().mean(),
        lambda x: (x[:, 1:] != x[:, :-1]).float().mean() * 2,  # how ragged: borders between rows
        lambda x: (x.sum((1, 2)) >= count - 2).float().mean(),
    ):
        assert abs(statistic(found) - statistic(expected)) < 4.5 * error


def test_no_mask_runs_out_of_rounds(monkeypatch):
    """The bound on the number of blocks is never felt: twice as many rounds give the same masks."""
    drawn = keyed.uniform(1, torch.arange(1000), 2 * masks.ROUNDS, masks.TRIES, 4)

    def uniform(name, rounds, *rest):
        return drawn[:, :rounds]

    few = masks.block_masks(uniform, (14, 14), 75, 16)
    monkeypatch.setattr(masks, "ROUNDS", 2 * masks.ROUNDS)
    assert torch.equal(few, masks.block_masks(uniform, (14, 14), 75, 16))


def test_a_row_does_not_depend_on_its_batch():
    rows = torch.arange(40)
    whole = masks.exact_block_masks(uniforms(rows), (8, 8), 25, 4)
    part = torch.tensor([31, 2, 17])
    assert torch.equal(masks.exact_block_masks(uniforms(part), (8, 8), 25, 4), whole[part])
    assert not torch.equal(masks.exact_block_masks(uniforms(rows, 1), (8, 8), 25, 4), whole)


@pytest.mark.parametrize(("grid", "count", "smallest"), [
    ((4, 4), 6, 4), ((2, 2), 1, 1), ((3, 5), 14, 4), ((4, 4), 15, 20),
])
def test_small_and_odd_grids(grid, count, smallest):
    mask = masks.exact_block_masks(uniforms(torch.arange(64)), grid, count, smallest)
    assert (mask.sum(1) == count).all()
    assert masks.block_masks(uniforms(torch.arange(64)), grid, count, smallest).sum(1).max() <= count


def test_a_block_is_smaller_than_the_grid_both_ways(monkeypatch):
    monkeypatch.setattr(masks, "ROUNDS", 1)
    block = masks.block_masks(uniforms(torch.arange(500)), (4, 4), 8, 6).view(-1, 4, 4)
    assert block.any((1, 2)).float().mean() > 0.9
    assert not block.all(1).any()
    assert not block.all(2).any()
    assert block.any(2).sum(1).max() == block.any(1).sum(1).max() == 3


def test_largest_block_is_obeyed():
    """Blocks of two cells make far more ragged masks than blocks of sixteen."""
    borders = []
    for smallest, largest in ((2, 2), (16, None)):
        mask = masks.block_masks(uniforms(torch.arange(200)), (8, 8), 25, smallest, largest).view(-1, 8, 8)
        borders.append((mask[:, 1:] != mask[:, :-1]).float().mean())
    assert borders[0] > 1.5 * borders[1]
    one = masks.block_masks(uniforms(torch.arange(200)), (8, 8), 2, smallest=2, largest=1)
    assert (one.sum(1) <= 2).all()


def test_hidden_ids_and_take():
    mask = masks.exact_block_masks(uniforms(torch.arange(5)), (4, 4), 6, 4)
    ids = masks.hidden_ids(mask, 6)
    assert [row.nonzero().flatten().tolist() for row in mask] == ids.tolist()
    tokens = torch.randn(5, 16, 3)
    assert torch.equal(masks.take(tokens, ids).flatten(0, 1), tokens[mask])
