"""Masks: exact counts, purity per row, and the distribution of the block rule against a plain
reference.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from stages.kit import keyed
from stages.kit.nets import masks
from workflow.checks import keep_count


def uniforms(rows: torch.Tensor, seed: int = 0):
    """What Progress.uniform is to a method: numbers keyed by name and row."""
    return lambda name, *shape: keyed.uniform(keyed.key(seed, name), rows, *shape)


def reference_block_mask(side: int, count: int, smallest: int, rng: random.Random) -> np.ndarray:
    """BEiT's rule (arXiv 2106.08254, alg. 1) as written for one image, with a generator that
    advances.
    """
    mask = np.zeros((side, side), bool)
    while mask.sum() < count:
        cap, grown = count - mask.sum(), False
        for _ in range(10):
            area = rng.uniform(smallest, cap)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < side and width < side:
                top, left = rng.randint(0, side - height), rng.randint(0, side - width)
                new = height * width - mask[top : top + height, left : left + width].sum()
                if 0 < new <= cap:
                    mask[top : top + height, left : left + width] = grown = True
                    break
        if not grown:
            break
    return mask


def test_random_masking_keeps_49_of_196():
    noise = torch.rand(6, 196, generator=torch.Generator().manual_seed(0))
    ids_keep, ids_restore, mask = masks.random_masking(noise, keep_count(196, 0.75))
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
    """v1's rule, without top-up: published measurements over 14x14 masks (mean 74.5, exactly 75 in
    68 %).
    """
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


def test_no_mask_runs_out_of_rounds():
    """The bound on the number of blocks is never felt: twice as many rounds give the same masks."""
    drawn = keyed.uniform(1, torch.arange(1000), 2 * masks.ROUNDS, masks.TRIES, 4)

    def uniform(name, rounds, *rest):
        return drawn[:, :rounds]

    few, many = (
        masks.block_masks(uniform, (14, 14), 75, 16, rounds=rounds)
        for rounds in (masks.ROUNDS, 2 * masks.ROUNDS)
    )
    assert torch.equal(few, many)


def test_a_row_does_not_depend_on_its_batch():
    rows = torch.arange(40)
    whole = masks.exact_block_masks(uniforms(rows), (8, 8), 25, 4)
    part = torch.tensor([31, 2, 17])
    assert torch.equal(masks.exact_block_masks(uniforms(part), (8, 8), 25, 4), whole[part])
    assert not torch.equal(masks.exact_block_masks(uniforms(rows, 1), (8, 8), 25, 4), whole)


@pytest.mark.parametrize(
    ("grid", "count", "smallest"),
    [
        ((4, 4), 6, 4),
        ((2, 2), 1, 1),
        ((3, 5), 14, 4),
        ((4, 4), 15, 20),
    ],
)
def test_small_and_odd_grids(grid, count, smallest):
    mask = masks.exact_block_masks(uniforms(torch.arange(64)), grid, count, smallest)
    assert (mask.sum(1) == count).all()
    assert (
        masks.block_masks(uniforms(torch.arange(64)), grid, count, smallest).sum(1).max() <= count
    )


def test_a_block_is_smaller_than_the_grid_both_ways():
    block = masks.block_masks(uniforms(torch.arange(500)), (4, 4), 8, 6, rounds=1).view(-1, 4, 4)
    assert block.any((1, 2)).float().mean() > 0.9
    assert not block.all(1).any()
    assert not block.all(2).any()
    assert block.any(2).sum(1).max() == block.any(1).sum(1).max() == 3


def test_largest_block_is_obeyed():
    """Blocks of two cells make far more ragged masks than blocks of sixteen."""
    borders = []
    for smallest, largest in ((2, 2), (16, None)):
        mask = masks.block_masks(uniforms(torch.arange(200)), (8, 8), 25, smallest, largest).view(
            -1, 8, 8
        )
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


# --- disjoint masks (DMJD, arXiv 2301.00230) ----------------------------------------------------


def sets(noise, ratio, predict=1.0, cell=1):
    """disjoint_masking's result as one bool mask (B,V,N), after checking that both lists are a
    partition.
    """
    visible, hidden = masks.disjoint_masking(noise, ratio, predict, cell)
    both = torch.cat([visible, hidden], dim=-1).sort(dim=-1).values
    assert torch.equal(both, torch.arange(both.shape[-1]).expand_as(both))
    return torch.zeros(both.shape, dtype=torch.bool).scatter(-1, hidden, True)


def noises(rows, views, cells, seed=0):
    return keyed.uniform(keyed.key(seed, "mask"), torch.arange(rows), views, cells)


@pytest.mark.parametrize(
    ("cell", "ratio", "visible", "masked", "union", "both", "never"),
    [
        (2, 0.6, 76, 120, 196, 44, 0),
        (2, 0.75, 48, 148, 196, 100, 0),
        (2, 0.5, 96, 100, 196, 4, 0),
        (2, 0.4, 116, 80, 156, 4, 40),
        (1, 0.75, 49, 147, 196, 98, 0),
        (1, 0.6, 78, 118, 196, 40, 0),
        (1, 0.5, 98, 98, 196, 0, 0),
    ],
)
def test_two_disjoint_views_have_the_official_counts(
    cell, ratio, visible, masked, union, both, never
):
    """What the official code gives for 196 patches, for every sample."""
    found = sets(noises(50, 2, 196 // cell**2), ratio, cell=cell)
    one, two = found.unbind(1)
    for count, expected in (
        ((~one), visible),
        (~two, visible),
        (one, masked),
        (two, masked),
        (one | two, union),
        (one & two, both),
        (~(one | two), never),
    ):
        assert count.sum(1).tolist() == [expected] * 50
    if ratio >= 0.5:
        assert not (~one & ~two).any()  # the visible sets are disjoint


@pytest.mark.parametrize("cells", [16, 49, 196])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6, 0.75])
def test_union_is_what_predict_asks_for(ratio, cells):
    for predict in np.linspace(ratio, min(1, 2 * ratio), 5).round(3).tolist():
        hidden = cells - int(round(cells * (1 - ratio), 9))
        expected = hidden + int(round((predict - ratio) * cells, 9))
        found = sets(noises(8, 2, cells), ratio, predict)
        assert found.any(1).sum(1).tolist() == [expected] * 8, predict
        assert found.sum(2).unique().tolist() == [hidden]


@pytest.mark.parametrize(("ratio", "views"), [(0.25, 4), (0.3, 4), (0.3, 3), (0.6, 4), (0.2, 5)])
def test_any_number_of_views_covers_what_it_can(ratio, views):
    """After v views int(min(1, v * ratio) * 100) cells of 100 have been hidden, and each view hides
    the same.
    """
    found = sets(noises(20, views, 100), ratio)
    assert found.sum(2).unique().tolist() == [round(100 * ratio)]
    for v in range(1, views + 1):
        assert found[:, :v].any(1).sum(1).unique().tolist() == [min(100, round(100 * v * ratio))]


@pytest.mark.parametrize(("ratio", "predict"), [(0.6, 1.0), (0.4, 0.6), (0.6, None), (0.3, 1.0)])
def test_each_cell_is_hidden_equally_often_in_each_view(ratio, predict):
    """Chi-square of 36 cells in each of three views; the statistic has mean n - 1 after the
    correction for drawing without replacement.
    """
    rows, cells = 6000, 36
    found = sets(noises(rows, 3, cells), ratio, predict)
    share = found[0, 0].float().mean().item()
    for view in range(3):
        observed = found[:, view].double().sum(0)
        statistic = (
            ((observed - rows * share) ** 2).sum()
            / (rows * share * (1 - share))
            * (cells - 1)
            / cells
        )
        assert abs(statistic - (cells - 1)) < 4.5 * math.sqrt(2 * (cells - 1))


def test_independent_views_cover_by_chance():
    found = sets(noises(3000, 2, 100), 0.6, None)
    assert found.any(1).float().mean().item() == pytest.approx(1 - 0.4**2, abs=0.002)
    assert found.any(1).sum(1).float().std() > 1


def test_cells_are_whole_and_in_the_official_order():
    visible, hidden = masks.disjoint_masking(noises(5, 2, 16), 0.6, 1.0, cell=2)
    found = sets(noises(5, 2, 16), 0.6, 1.0, cell=2).view(5, 2, 4, 2, 4, 2)
    assert torch.equal(found.any(5).any(3), found.all(5).all(3))
    quarters = visible.view(5, 2, 4, 6)  # top left, top right, bottom left, bottom right
    assert torch.equal(
        quarters - quarters[:, :, :1], torch.tensor([0, 1, 8, 9]).view(4, 1).expand(5, 2, 4, 6)
    )
    assert (quarters[:, :, 0] % 2 == 0).all()
    assert (quarters[:, :, 0] // 8 % 2 == 0).all()
    assert hidden.shape == (5, 2, 40)


def test_one_view_of_patches_is_maes_masking():
    noise = noises(7, 1, 64)
    visible, hidden = masks.disjoint_masking(noise, 0.75)
    ids_keep, _, mask = masks.random_masking(noise[:, 0], 16)
    assert torch.equal(visible[:, 0], ids_keep)
    assert torch.equal(sets(noise, 0.75)[:, 0], mask.bool())
    assert torch.equal(
        masks.disjoint_masking(noises(7, 3, 64), 0.75)[0][:, 0], ids_keep
    )  # later views change nothing


def test_disjoint_rows_do_not_depend_on_their_batch():
    noise, part = noises(30, 3, 36), torch.tensor([17, 4])
    whole = masks.disjoint_masking(noise, 0.6, 1.0, 2)
    assert all(
        torch.equal(a[part], b)
        for a, b in zip(whole, masks.disjoint_masking(noise[part], 0.6, 1.0, 2), strict=True)
    )
    assert len({tuple(row.tolist()) for row in whole[0][:, 1]}) == 30


@pytest.mark.parametrize(
    ("cells", "ratio", "predict", "views", "key"),
    [
        (16, 0.6, 0.5, 2, "predict_ratio"),
        (16, 0.6, 1.1, 2, "predict_ratio"),
        (16, 0.6, 1.0, 0, "views"),
        (16, 0.0, 1.0, 2, "mask_ratio"),
        (4, 0.9, 1.0, 2, "mask_ratio"),
    ],
)
def test_disjoint_counts_refuse(cells, ratio, predict, views, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        masks.disjoint_counts(cells, ratio, predict, views)


def test_disjoint_masking_wants_a_square_grid():
    with pytest.raises(ValueError, match="square"):
        masks.disjoint_masking(torch.rand(2, 2, 12), 0.5)
