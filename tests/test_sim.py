"""Facts of SiM (arXiv 2206.01204 and its official code): masks, places, the loss, what follows."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from warm import Workers

from stages.kit import dist, keyed
from stages.kit.nets.batchnorm import BatchNorm
from stages.kit.nets.positions import seen_from, sincos_2d
from stages.kit.parts import collapse
from stages.kit.parts.collapse import CollapseError, SpreadWatch
from stages.methods import sim
from tests import tiny

SMALL = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2)
progress = tiny.progress


def made(seed: int = 0, **settings) -> sim.Method:
    return tiny.method("sim", tiny.spec(), seed=seed, **{**SMALL, **settings})


def boxes(rows: int = 8, seed: int = 0) -> torch.Tensor:
    """Top, left, height, width and flip of random crops of images of 60 x 90 pixels."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(10, 40, (rows, 2), generator=generator)
    free = torch.tensor([60, 90]) - size
    first = (torch.rand(rows, 2, generator=generator) * free).long()
    return torch.cat([first, size, torch.randint(0, 2, (rows, 1), generator=generator)], dim=1)


def batch(rows: int = 8, seed: int = 0) -> dict:
    """Noise, another for each view."""
    found = {}
    for i, view in enumerate(("view1", "view2")):
        found[view] = tiny.images(rows, seed=2 * seed + i)
        found[f"{view}.box"] = boxes(rows, 2 * seed + i)
    return found


# --- masks ----------------------------------------------------------------------------------------


def test_78_of_196_are_visible_in_every_draw():
    spec = tiny.spec(224, patch_size=16, depth=1)
    method = tiny.method("sim", spec, **SMALL, mask_ratio=0.6, min_block=16)
    assert method.count == 118
    for step in range(5):
        ids = method.visible(progress(64, step=step).uniform)
        assert ids.shape == (64, 78) and all(len(set(row)) == 78 for row in ids.tolist())
        assert torch.equal(ids, method.visible(progress(64, step=step).uniform))
    assert not torch.equal(ids, method.visible(progress(64, step=0).uniform))
    assert tiny.method("sim", tiny.spec(32), **SMALL).count == 38


# --- places ---------------------------------------------------------------------------------------


def test_identity_gives_the_ordinary_table():
    method, same = made(), boxes(4)
    code = method.code(same, same)
    torch.testing.assert_close(code[..., :16], sincos_2d(16, 4).expand(4, -1, -1))
    scale = torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4)
    assert torch.equal(code[..., 16:], scale.expand(4, 16, -1))


def official(first, second, width: int, grid: int):
    """The official code's formulas, for which an image is flipped before it is cropped: (row,
    column) of each patch and the logarithms of the scales; numbers of one sample.
    """
    i1, j1, h1, w1, f1 = first
    i2, j2, h2, w2, f2 = second
    j1 = width - j1 - w1 if f1 else j1  # in the flipped image
    j2 = width - j2 - w2 if f2 else j2
    di, dj, sh, sw = (i2 - i1) / h1, (j2 - j1) / w1, h2 / h1, w2 / w1
    dflip = (width - j1 - j2) / w1
    places = []
    for r in range(grid):
        for c in range(grid):
            y = sh * (r + 0.5) + di * grid - 0.5
            x = sw * (c + 0.5) + dj * grid - 0.5
            if f1 != f2:
                x = -sw * (c + 0.5) + dflip * grid - 0.5
            places.append((x, y))
    return places, (math.log(sw), math.log(sh))


def test_places_are_those_of_the_official_formulas():
    first, second = boxes(200), boxes(200, seed=1)
    places, sizes = seen_from(first, second, 7)
    for b in range(200):
        wanted, scale = official(first[b].tolist(), second[b].tolist(), 90, 7)
        torch.testing.assert_close(places[b], torch.tensor(wanted).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sizes[b], torch.tensor(scale).double(), atol=1e-6, rtol=0)
    kinds = {tuple(pair) for pair in torch.stack([first[:, 4], second[:, 4]], 1).tolist()}
    assert len(kinds) == 4 and float(places.min()) < -1 and float(places.max()) > 7


def test_places_are_true_in_the_pixels():
    """Images whose colour tells the place: each patch of one view has, in its middle, the colour of
    the place in the other view that it is said to lie at.
    """
    size, spec = 64, tiny.spec(64, patch_size=8)
    ramp = torch.arange(256, dtype=torch.uint8)
    image = torch.stack([ramp.expand(256, -1), ramp[:, None].expand(-1, 256)], dim=2)
    image = F.pad(image, (0, 1))[None].expand(40, -1, -1, -1).contiguous()
    rows = SimpleNamespace(images=image, index=torch.arange(40))
    config, seen = sim.Config(jitter_p=0.0, grey=0.0, solarise=0.0, blur=False), {}
    for name, recipe in sim.views(config, spec).items():
        seen |= recipe.make(name, rows, lambda name: keyed.key(1, name))
    places, _ = seen_from(seen["view1.box"], seen["view2.box"], 8)
    middle = F.avg_pool2d(seen["view2"], 8).flatten(2)[:, :2] * 255  # of the second view's patches
    # where in the image the first view shows column and row, worked out from its own pixels
    top, left, height, width, flip = seen["view1.box"].double().T[:, :, None]
    column, row = ((places + 0.5) / 8).unbind(2)
    column = torch.where(flip > 0, 1 - column, column)
    expected = torch.stack([left + width * column - 0.5, top + height * row - 0.5], 1)
    assert float((middle - expected).abs().max()) < 2
    inside = ((places >= 0) & (places <= 7)).all(2)
    assert inside.sum() > 200
    own = F.grid_sample(
        seen["view1"], ((places + 0.5) / 4 - 1)[:, None].float(), align_corners=False
    )[:, :2, 0]
    assert float((own * 255 - middle).abs().amax(1)[inside].max()) < 3
    assert size == seen["view1"].shape[-1]


def test_both_flipped_is_as_none_flipped():
    """In the frames of the flipped images."""
    first, second = boxes(8), boxes(8, seed=1)
    for each in (first, second):
        each[:, 4] = 0
    places, sizes = seen_from(first, second, 4)
    mirrored = [each.clone() for each in (first, second)]
    for each in mirrored:
        each[:, 1], each[:, 4] = 90 - each[:, 1] - each[:, 3], 1
    again, same = seen_from(*mirrored, 4)
    torch.testing.assert_close(places, again)
    assert torch.equal(sizes, same)


# --- the loss -------------------------------------------------------------------------------------


def whole_loss(p, t, weight: float):
    pull, push = sim.unigrad(p, t, sim.moments(t)[0])
    return pull + weight * push


def test_loss_and_gradient_by_hand():
    """In float64: all pairs of dot products, and 2 (p - t + w C p) / (M D)."""
    generator = torch.Generator().manual_seed(0)
    p, t = (torch.randn(7, 5, generator=generator).double() for _ in range(2))
    p.requires_grad_()
    loss = whole_loss(p, t, 0.3)
    rows, wanted = [x.tolist() for x in (p.detach(), t)], 0.0
    for n in range(7):
        wanted += sum((a - b) ** 2 for a, b in zip(rows[0][n], rows[1][n], strict=True)) / 7
        for m in range(7):
            dot = sum(a * b for a, b in zip(rows[0][n], rows[1][m], strict=True))
            wanted += 0.3 * dot**2 / 49
    assert float(loss.detach()) == pytest.approx(wanted / 5, rel=1e-12)
    loss.backward()
    moment = sum(torch.outer(row, row) for row in t) / 7
    expected = 2 * (p - t + 0.3 * p @ moment).detach() / (7 * 5)
    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda p: whole_loss(p, t, 0.3), [p])


@pytest.mark.parametrize("weight", [0.02, 0.5])
def test_least_loss_of_equal_and_of_white_targets(weight):
    dim = 6
    equal = torch.ones(10, dim).double()
    for t, expected in (
        (equal, weight * dim / (1 + weight * dim)),
        (math.sqrt(dim) * torch.eye(dim).double(), weight / (1 + weight)),
    ):
        moment, alike = sim.moments(t)
        assert float(alike) == pytest.approx(1 if t is equal else 1 / dim)
        best = torch.linalg.solve(torch.eye(dim).double() + weight * moment, t.T).T
        best.requires_grad_()
        loss = whole_loss(best, t, weight)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
        assert float(torch.autograd.grad(loss, best)[0].abs().max()) < 1e-12


def test_forward_is_these_formulas():
    """Targets: mean 0 and variance 1 of each token; all places count, wherever they lie."""
    method, x = made(negative_weight=0.1, global_weight=0.5), batch()
    out, spec = method(x, progress()), method.spec
    ids = method.visible(progress().uniform)
    code = method.code(x["view1.box"], x["view2.box"])
    p = method.predict(spec.normalise(x["view1"]), ids, code)
    assert p.shape == (8, 16, 16)
    t = method.tokens(spec.normalise(x["view2"]))
    t, mean = (
        (y - y.mean(-1, True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        for y in (t, t.mean(1))
    )
    moved = t.flatten(0, 1)
    torch.testing.assert_close(moved.mean(1), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.var(1, correction=0), torch.ones(128), atol=1e-2, rtol=0)
    dense, whole = whole_loss(p.flatten(0, 1), moved, 0.1), whole_loss(p.mean(1), mean, 0.1)
    torch.testing.assert_close(out["loss"], dense + 0.5 * whole)
    torch.testing.assert_close(out["pull"] + 0.1 * out["push"], dense)
    assert 0 < float(out["alike"]) < 1 and float(out["correlation"]) > 0
    alone = made(dense_weight=0.0, global_weight=1.0, negative_weight=0.1)
    torch.testing.assert_close(alone(x, progress())["loss"], whole)


# --- the network ----------------------------------------------------------------------------------


def test_tokens_in_the_predictor():
    """Class token, visible ones, and all of the second view, whatever the mask."""
    method, seen = made(), []
    method.predictor.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    assert method.predict(
        tiny.images(), torch.arange(6).expand(4, -1), torch.zeros(4, 16, 32)
    ).shape == (4, 16, 16)
    method(batch(), progress())
    assert seen == [1 + 6 + 16, 1 + 16 - 10 + 16]


def test_visible_tokens_get_plain_positions_and_wanted_ones_a_linear_map_of_the_code():
    method = made()
    method.projector, method.predictor, method.head = (nn.Sequential() for _ in range(3))
    method.config = SimpleNamespace(decoder_dim=32)
    cells = torch.randn(1, 16, 32)
    method.cells = cells
    method.mask_token = nn.Parameter(torch.ones(1, 1, 32))
    method.place = nn.Linear(64, 32)
    code = torch.randn(4, 16, 64)
    seen = []
    method.predictor.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    method.predict(torch.zeros(4, 3, 16, 16), torch.tensor([[3, 7]]).expand(4, -1), code)
    torch.testing.assert_close(seen[0][:, 3:], 1 + method.place(code))
    from stages.kit.nets import encoders

    ids = torch.tensor([[3, 7]]).expand(4, -1)
    own = encoders.visible(method.encoder, torch.zeros(4, 3, 16, 16), ids, norm=False)["tokens"]
    torch.testing.assert_close(
        seen[0][:, :3] - own, F.pad(cells[:, [3, 7]], (0, 0, 1, 0)).expand(4, -1, -1)
    )


def test_norms_are_over_all_tokens():
    method = made(projector_depth=1)
    norms = [m for part in (method.projector, method.predictor) for m in part.modules()]
    norms = [type(m) for m in norms if isinstance(m, BatchNorm | nn.LayerNorm)]
    assert norms == [BatchNorm] * 4
    x = 3 + 2 * torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    found, theirs = BatchNorm(6)(x), nn.BatchNorm1d(6)(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(found, theirs)


def test_published_sizes():
    """14.18 M and 28.35 M in the blocks, 1.18 M in each of three linear layers."""
    sizes = dict(patch_size=16, embed_dim=768, depth=1, num_heads=12)
    keys = ("decoder_dim", "decoder_depth", "decoder_heads", "projector_depth", "min_block")
    with torch.device("meta"):
        config = sim.Config(**{key: sim.PUBLISHED[key] for key in keys})
        method = sim.Method(config, tiny.spec(224, **sizes))

    def count(part) -> int:
        return sum(p.numel() for p in part.parameters())

    assert count(method.projector[1:]) == 14_175_744 and count(method.predictor) == 28_351_488
    assert count(method.projector[0]) == count(method.head) == 768 * 768 + 768
    assert count(method.place) == 2 * 768 * 768 + 768
    assert method.count == 118


def test_gradients_stop_where_they_should():
    method = made()
    method(batch(), progress())["loss"].backward()
    without = {name for name, p in method.named_parameters() if p.grad is None}
    fixed = {name for name in without if name.startswith("encoder.")}
    assert {name.split(".")[1] for name in fixed} == {"patch_embed", "pos_embed", "norm"}
    assert {name.split(".")[0] for name in without - fixed} == {"key_encoder", "key_projector"}
    free = made(freeze_patches=False)
    free(batch(), progress())["loss"].backward()
    assert free.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


# --- averages -------------------------------------------------------------------------------------


def test_momentum_rises_as_half_a_cosine(monkeypatch):
    """0.995 at first, 0.9975 in the middle, 1 at the end."""
    used, method = [], made(momentum=0.995)
    monkeypatch.setattr(sim.ema, "update", lambda teacher, student, m: used.append(m))
    for step in range(10):
        method.after_step(progress(step=step, steps=10))
    assert used[::2] == used[1::2]
    official = [1 - 0.5 * (1 + math.cos(math.pi * s / 10)) * 0.005 for s in range(1, 11)]
    assert used[::2] == pytest.approx(official, abs=1e-12)
    assert used[8] == pytest.approx(0.9975) and used[-1] == 1


def test_targets_start_as_the_online_network_and_follow_it():
    method = made(momentum=0.9)
    pairs = {"key_encoder": "encoder", "key_projector": "projector"}
    for own, theirs in pairs.items():
        state = getattr(method, own).state_dict()
        assert all(
            torch.equal(state[k], v) for k, v in getattr(method, theirs).state_dict().items()
        )
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(batch(), progress())["loss"].backward()
    optimiser.step()
    before = {
        own: {k: v.clone() for k, v in getattr(method, own).named_parameters()} for own in pairs
    }
    method.after_step(progress(step=0, steps=10**9))  # the momentum is still its first
    for own, theirs in pairs.items():
        new = dict(getattr(method, theirs).named_parameters())
        for key, value in getattr(method, own).named_parameters():
            torch.testing.assert_close(value, 0.9 * before[own][key] + 0.1 * new[key])
    assert torch.equal(
        method.key_encoder.patch_embed.proj.weight, method.encoder.patch_embed.proj.weight
    )


# --- ranks and collapse ---------------------------------------------------------------------------


def one_step() -> dict:
    """Scalars and mean gradients over ranks of this rank's share of a batch."""
    dist.start()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    method, rows = made(global_weight=0.5), torch.arange(8).chunk(world)[rank]
    share = {name: value[rows] for name, value in batch().items()}
    share = {name: x.double() if x.is_floating_point() else x for name, x in share.items()}
    out = method(share, progress(rows))
    out["loss"].backward()
    means = {name: dist.mean(value.detach().clone()) for name, value in out.items()}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            means[name] = dist.mean(parameter.grad.clone())
    return {name: value.tolist() for name, value in means.items()}


def test_two_processes_do_what_one_does():
    found = []
    for world in (1, 2):
        workers = Workers(world, double=True)
        try:
            found.append(workers.call(one_step)[0])
        finally:
            workers.close()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[0].items():
        ours, theirs = (torch.tensor(each, dtype=torch.float64) for each in (value, found[1][name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_targets_that_stay_alike_stop_the_training(monkeypatch):
    monkeypatch.setattr(collapse, "LEAST_STEPS", 3)
    watch = SpreadWatch(0.05)
    for step, spread in enumerate([0.01, 0.01, 0.2, 0.01, 0.04]):
        watch.count(torch.tensor(spread))
        watch.step(progress(step=step, steps=8))
    assert int(watch.steps_below) == 2
    other = SpreadWatch(0.05)
    other.load_state_dict(watch.state_dict())
    other.count(torch.tensor(0.02))
    with pytest.raises(CollapseError, match="for 3 steps .* 95.00% .* now 98.00%"):
        other.step(progress(step=5, steps=8))
    off = SpreadWatch(0.0)
    for step in range(8):
        off.count(torch.tensor(0.0))
        off.step(progress(step=step, steps=8))
    assert int(off.steps_below) == 0


def test_pictures_show_true_correspondences():
    sheets = made().pictures({"view": tiny.images(3), "gallery": tiny.images(9, seed=1)})
    assert sheets["correspondence"].shape == (296, 5 * 100 - 4, 3)
    assert sheets["nearest"].shape == (8 * 100 - 4, 600 - 4, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(min_block=11), "min_block: found 11, expected at most the 10 hidden patches"),
        (dict(dense_weight=0.0), "dense_weight: found 0"),
        (dict(negative_weight=-1.0), "negative_weight: found -1.0"),
        (dict(decoder_dim=10), "decoder_dim: found 10"),
        (dict(momentum=2.0), "momentum: found 2.0"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        sim.Config(**settings).check(16, tiny.model())
