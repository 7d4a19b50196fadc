"""Facts of SemMAE (arXiv 2206.10207 and its official code): counts, masks by part, the schedule."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from stages.kit.nets.masks import random_masking
from stages.methods import semmae
from stages.methods.semmae import part_counts, part_masking
from tests import tiny

SMALL = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
SIZES = (14, 47, 19, 24, 38, 29, 25)  # patches of each part of a 14 x 14 grid


def made(seed: int = 0, **settings) -> semmae.Method:
    return tiny.method("semmae", tiny.spec(), seed=seed, **{**SMALL, **settings})


def voronoi(rows: int, grid: int = 14, parts: int = 7, seed: int = 0) -> torch.Tensor:
    """Random parts: each patch belongs to the nearest of some points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(rows, parts, 2, generator=generator) * grid
    axis = torch.arange(grid).float()
    return torch.cdist(torch.cartesian_prod(axis, axis).expand(rows, -1, -1), points).argmin(2)


def noises(rows: int, patches: int = 196, parts: int = 7, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, n, generator=generator) for n in (patches, parts))


def flagged(ids, noise, order, alpha, parts=7, ratio=0.75):
    """What the official code flags, walking through shuffled patches one by one."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for b in range(len(ids)):
        counts = [int((ids[b] == k).sum()) for k in range(parts)]
        inside = [round(ratio * c) for c in counts]  # Python rounds halves to even
        whole, before = [0] * parts, 0
        for k in order[b].argsort().tolist():
            whole[k] = min(counts[k], max(math.floor(ratio * ids.shape[1] - before), 0))
            before += counts[k]
        lam = 1 - alpha
        wanted = [round(lam * i + (1 - lam) * w) for i, w in zip(inside, whole, strict=True)]
        seen = [0] * parts
        for place in noise[b].argsort().tolist():
            k = int(ids[b, place])
            seen[k] += 1
            found[b, place] = seen[k] <= wanted[k]
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_masks_are_those_of_the_official_walk(alpha):
    """But for the border, where only so many are moved that the count is exact."""
    ids, (noise, order) = voronoi(40), noises(40)
    ids_keep, ids_restore, mask = part_masking(ids, 7, noise, order, 0.75, alpha, 49)
    wanted = flagged(ids, noise, order, alpha)
    assert ids_keep.shape == (40, 49) and (mask.sum(1) == 147).all()
    assert (mask.gather(1, ids_keep) == 0).all()
    every = ids_restore.sort(dim=1).values
    assert torch.equal(every, torch.arange(196).expand(40, -1))
    differ, excess = (mask.bool() != wanted).sum(1), (wanted.sum(1) - 147).abs()
    assert torch.equal(differ, excess) and int(excess.max()) <= 4
    if alpha == 0:
        for k in range(7):
            of_part = ids == k
            assert ((wanted & of_part).sum(1) - 0.75 * of_part.sum(1)).abs().max() <= 0.5
    if alpha == 1:
        assert (excess == 0).all()
        hidden = torch.stack([(mask.bool() & (ids == k)).sum(1) for k in range(7)], 1)
        sizes = torch.stack([(ids == k).sum(1) for k in range(7)], 1)
        assert (((hidden > 0) & (hidden < sizes)).sum(1) <= 1).all()


def test_which_parts_are_hidden_whole():
    """The chance of each, by enumeration of all orders: it falls a little with the part's size."""
    ids = torch.arange(7).repeat_interleave(torch.tensor(SIZES))
    orders = torch.tensor(list(itertools.permutations(range(7)))).float()
    counts = torch.tensor(SIZES).expand(len(orders), -1)
    whole = part_counts(counts, orders, 196, 0.75, 1.0) == counts
    expected = [0.686, 0.648, 0.686, 0.667, 0.648, 0.667, 0.667]
    assert whole.double().mean(0).tolist() == pytest.approx(expected, abs=5e-4)
    rows = 3000
    noise, order = noises(rows)
    _, _, mask = part_masking(ids.expand(rows, -1), 7, noise, order, 0.75, 1.0, 49)
    gone = [(mask[:, ids == k] == 1).all(1).double().mean().item() for k in range(7)]
    assert gone == pytest.approx(expected, abs=0.03)
    first = Counter(order.argmin(1).tolist())
    chi = sum((first[k] - rows / 7) ** 2 / (rows / 7) for k in range(7))
    assert chi < 22.5  # 0.1 % of 6 degrees of freedom


def test_parts_without_patches_and_halves():
    counts = torch.tensor([[0, 2, 6, 8]])  # 1.5 and 4.5 are halves
    order = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert part_counts(counts, order, 16, 0.75, 0.0).tolist() == [[0, 2, 4, 6]]
    assert part_counts(counts, order, 16, 0.75, 1.0).tolist() == [[0, 2, 6, 4]]
    assert part_counts(counts, order, 16, 0.75, 0.5).tolist() == [[0, 2, 5, 5]]


def test_one_part_is_random_masking():
    noise, order = noises(20, parts=1)
    ids = torch.zeros(20, 196, dtype=torch.long)
    for alpha in (0.0, 0.4, 1.0):
        found = part_masking(ids, 1, noise, order, 0.75, alpha, 49)
        # the first 147 by noise are hidden, where random masking shows the first 49
        plain = random_masking(1 - noise, 49)
        assert torch.equal(found[2], plain[2])


def test_masks_random_are_mae_s():
    """And so are the losses, step by step."""
    losses = []
    for name, settings in (("semmae", {"masks": "random"}), ("mae", {})):
        method = tiny.method(name, tiny.spec(), seed=0, **SMALL, **settings)
        trained = [p for p in method.parameters() if p.requires_grad]
        optimiser, found = torch.optim.SGD(trained, lr=0.1), []
        for step in range(3):
            optimiser.zero_grad()
            loss = method({"view": tiny.images(8, seed=step)}, tiny.progress(step=step))["loss"]
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0] == losses[1]


def test_block_masks_are_blocks_of_the_same_count():
    method = tiny.method("semmae", tiny.spec(32), **SMALL, masks="block")
    progress = tiny.progress(64)
    mask = method.masks(torch.zeros(64, 64, dtype=torch.long), progress.uniform, 0.0)[2]
    assert (mask.sum(1) == 48).all()
    grid = mask.view(-1, 8, 8)
    beside = (grid[:, 1:] == grid[:, :-1]).double().mean()
    assert float(beside) > 0.75  # of random masks 0.63


def test_a_mirrored_image_has_a_mirrored_mask():
    ids, (noise, order) = voronoi(10), noises(10)
    mask = part_masking(ids, 7, noise, order, 0.75, 0.6, 49)[2].view(10, 14, 14)
    mirrored = [x.view(10, 14, 14).flip(2).flatten(1) for x in (ids, noise)]
    other = part_masking(mirrored[0], 7, mirrored[1], order, 0.75, 0.6, 49)[2]
    assert torch.equal(other.view(10, 14, 14).flip(2), mask)


def test_masks_are_those_of_seed_and_step():
    method, ids = made(), voronoi(8, grid=4, parts=8)

    def mask(**where):
        return method.masks(ids, tiny.progress(8, **where).uniform, 0.5)[2]

    assert torch.equal(mask(seed=1), mask(seed=1))
    assert not torch.equal(mask(seed=1), mask(seed=2))
    assert not torch.equal(mask(step=1), mask(step=2))


# --- the schedule ---------------------------------------------------------------------------------


def alphas(epochs: int = 10, **settings) -> list[float]:
    config, found = semmae.Config(**settings), []
    for epoch in range(epochs):
        for inside in (0.0, 0.7):
            at = tiny.progress(8, epoch=epoch + inside)
            object.__setattr__(at, "epochs", epochs)
            found.append(float(semmae.alpha_of(config, at)))
    return found


def test_alpha_rises_with_the_square_of_the_epochs():
    """1 - alpha is the official lambda: 1 - 1 / E^2 at first, 0 in the last epoch."""
    found = alphas()
    assert found[::2] == found[1::2] == pytest.approx([((e + 1) / 10) ** 2 for e in range(10)])
    assert alphas(gamma=1.0)[::2] == pytest.approx([(e + 1) / 10 for e in range(10)])
    assert alphas(alpha=(0.0, 0.0)) == [0.0] * 20 and alphas(alpha=(1.0, 1.0)) == [1.0] * 20
    assert alphas(alpha=(1.0, 0.0))[::2] == pytest.approx([1 - a for a in found[::2]])


def test_the_loop_tells_the_number_of_epochs(tmp_path):
    from test_loop import make_run
    from test_processes import Double, Pictures

    from stages.kit.train.loop import Recipe, fit

    method, seen = made(), []
    config = method.config
    batches = Double(Pictures(16), semmae.views(config, tiny.spec()), 8, 3, workers=0)
    ask = method.forward
    method.forward = lambda *args: seen.append(ask(*args)) or seen[-1]
    recipe = Recipe(4, 8, batches.steps_per_epoch, lr=1e-3, precision="fp32")
    fit(method, batches, recipe, make_run(tmp_path), seed=3)
    assert [float(out["alpha"]) for out in seen[::2]] == pytest.approx([1 / 16, 1 / 4, 9 / 16, 1])


def test_curve_of_parts_that_are_gone():
    ids = torch.tensor([[0, 0, 1, 2], [3, 3, 3, 1]])
    mask = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 0]])
    assert float(semmae.hidden_parts(ids, mask, 5)) == pytest.approx((2 / 3 + 0) / 2)


def test_pictures_show_the_masks_over_the_training():
    method = made()
    sheet = method.pictures({"view": tiny.images(3)})["parts"]
    assert sheet.shape == (296, 7 * 100 - 4, 3)
    columns = [sheet[:, 100 * n : 100 * n + 96] for n in range(7)]
    assert (columns[2] != columns[5]).any(), "the mask of the first epoch is not the last one's"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(alpha=(0.0, 1.5)), "alpha: found"),
        (dict(gamma=0.0), "gamma: found 0.0"),
        (dict(mask_ratio=0.99), "mask_ratio: found 0.99, which hides 16 of 16 patches"),
        (dict(masks="block", min_block=13), "min_block: found 13, expected at most the 12 hidden"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        semmae.Config(**settings).check(16, tiny.model())
