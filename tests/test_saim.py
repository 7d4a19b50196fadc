"""SAIM: what the paper (arXiv 2212.01610) and its official code say, against independent
calculations; the orders of kit/nets/orders.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.kit.nets import encoders, orders
from stages.kit.nets.patches import patchify
from stages.kit.nets.positions import sincos_2d
from stages.kit.train import optim
from stages.kit.train.recipe import Recipe
from stages.methods.saim import PUBLISHED, Config, Method, attends, cross, gaussian, views
from tests import tiny

SPEC = tiny.spec(depth=3)  # 16 patches


def build(seed=0, spec=SPEC, **config):
    """A method in which nothing is zero or one that could hide a mistake."""
    torch.manual_seed(seed)
    method = Method(Config(**config), spec).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return method


def images(rows=4, seed=1):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def drawn(rows=4, step=0, patches=4):
    return orders.stochastic(tiny.progress(rows, step=step).uniform, patches)


def reached(output, given):
    """Which patches' pixels an output depends on, bool (B,16)."""
    (gradient,) = torch.autograd.grad(output, given, retain_graph=True)
    return gradient.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1) > 0


# --- who sees whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"shared": True}, {"query_depth": 1}, {"order": "raster"}])
def test_a_prediction_depends_on_all_earlier_patches_and_on_no_other(config):
    method, given = build(**config), images(3).requires_grad_()
    ranks = method.ranks(given, tiny.progress(3).uniform)
    predicted = method.predict(given, ranks)
    for place in range(16):
        earlier = ranks < ranks[:, place, None]
        assert torch.equal(reached(predicted[:, place].square().sum(), given), earlier)


def test_what_comes_later_changes_no_bit():
    method, given, ranks = build(), images(), drawn()
    with torch.no_grad():
        before = method.predict(given, ranks)
        for place in range(16):
            own = ranks >= ranks[:, place, None]
            cells = F.interpolate(own.view(4, 1, 4, 4).float(), size=16) > 0
            other = torch.where(cells, 9 * torch.randn_like(given), given)
            assert torch.equal(method.predict(other, ranks)[:, place], before[:, place])


def test_the_first_patch_is_predicted_from_its_place_alone():
    method, ranks = build(), drawn()
    with torch.no_grad():
        one, other = (method.predict(images(seed=seed), ranks) for seed in (1, 2))
    first, last = ranks == 0, ranks == 15
    assert torch.equal(one[first], other[first])
    assert not torch.allclose(one[last], other[last])


def test_content_depends_on_earlier_patches_and_itself_and_the_class_token_on_nothing():
    method, given, ranks = build(), images(3).requires_grad_(), drawn(3)
    content, _ = attends(ranks, 1)
    seen = encoders.masked(method.encoder, given, None, None, attend=content)
    for place in range(16):
        found = reached(seen["patch"][:, place].square().sum(), given)
        assert torch.equal(found, ranks <= ranks[:, place, None])
    assert not reached(seen["cls"].square().sum(), given).any()
    other = encoders.masked(method.encoder, images(3, 5), None, None, attend=content)
    assert torch.equal(seen["cls"], other["cls"])


def test_rows_of_the_masks_count_rank_and_prefix():
    ranks = drawn()
    content, queries = attends(ranks, 1)
    assert content.shape == (4, 17, 17) and queries.shape == (4, 16, 17)
    assert torch.equal(content[:, 1:].sum(2), ranks + 2)  # class token, itself, the earlier ones
    assert torch.equal(queries.sum(2), ranks + 1)
    assert torch.equal(content[:, 0].sum(1), torch.ones(4, dtype=torch.long))
    assert content[:, :, 0].all() and queries[:, :, 0].all()
    _, few = attends(ranks, 1, known=5)
    assert torch.equal(few.sum(2), ranks.clamp(max=5) + 1)


def test_it_is_the_official_arithmetic():
    """Dense additive masks from scores, both streams, block by block, in float64."""
    method = build().double()
    scores, given = torch.rand(2, 16, dtype=torch.float64), images(2).double()
    closed = torch.full((2, 16, 16), -math.inf, dtype=torch.float64)
    row, column = scores[:, :, None], scores[:, None, :]
    masks = []
    for late in (row < column, row <= column):  # the content's, the queries'
        mask = torch.where(late, closed, torch.zeros_like(closed))
        mask = torch.cat([torch.full((2, 1, 16), -math.inf).double(), mask], 1)
        masks.append(torch.cat([torch.zeros(2, 17, 1).double(), mask], 2)[:, None])

    def block(layer, x, context, mask):
        a, b = layer.norm1(x), layer.norm1(context)
        weight, bias = layer.attn.qkv.weight.chunk(3), layer.attn.qkv.bias.chunk(3)
        q, k, v = (
            F.linear(s, w, c).view(2, 17, 2, 16).transpose(1, 2)
            for s, w, c in zip((a, b, b), weight, bias, strict=True)
        )
        found = (q @ k.transpose(2, 3) / 4 + mask).softmax(-1) @ v
        x = x + layer.attn.proj(found.transpose(1, 2).reshape(2, 17, 32))
        return x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(x))))

    encoder = method.encoder
    positions = torch.cat([torch.zeros(1, 32), sincos_2d(32, 4)]).double()
    tokens = encoder.patch_embed(given)
    h = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], 1) + positions
    g = positions.expand(2, -1, -1)
    for layer, query in zip(encoder.blocks, method.query_blocks, strict=True):
        h = block(layer, h, h, masks[0])
        g = block(query, g, h, masks[1])
    expected = method.head(encoder.norm(g))[:, 1:]
    found = method.predict(given, orders.by_score(scores))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_masks_it_is_a_plain_vit():
    method, given = build(), images()
    everything = torch.ones(4, 17, 17, dtype=torch.bool)
    tokens = encoders.masked(method.encoder, given, None, None, attend=everything)["tokens"]
    plain = method.encoder.forward_features(given)
    torch.testing.assert_close(tokens, plain, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 17, 32)
    block = method.encoder.blocks[0]  # attention to itself is self-attention
    torch.testing.assert_close(cross(block, x, x, everything[:2]), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_both_kinds_of_attention_agree(fused):
    method, given, ranks = build(), images(), drawn()
    expected = method.predict(given, ranks)
    for layer in method.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused
    torch.testing.assert_close(method.predict(given, ranks), expected, rtol=1e-4, atol=1e-5)


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "blocks", "read"),
    [(12, 12, tuple(range(1, 13))), (6, 6, (2, 4, 6, 8, 10, 12)), (3, 3, (4, 8, 12))],
)
def test_query_blocks_stand_beside_every_first_second_or_fourth_block(depth, blocks, read):
    method = Method(Config(query_depth=depth), tiny.spec(depth=12))
    assert (len(method.query_blocks), method.read) == (blocks, read)


@pytest.mark.parametrize("depth", [3, 1])
def test_shared_streams_have_the_same_tensors(depth):
    method = build(shared=True, query_depth=depth)
    for mine, its in zip(method.query_blocks, method.encoder.blocks, strict=False):
        assert all(a is b for a, b in zip(mine.parameters(), its.parameters(), strict=True))
    own = sum(p.numel() for p in build(query_depth=depth).parameters())
    blocks = sum(p.numel() for p in method.encoder.blocks[:depth].parameters())
    assert own - sum(p.numel() for p in method.parameters()) == blocks


def test_published_parameter_counts():
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    with torch.device("meta"):
        method = Method(Config(query_depth=12), tiny.spec(224, **sizes))

    def millions(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6

    assert millions(method.encoder.blocks) == pytest.approx(85.05, abs=0.01)
    assert millions(method.query_blocks) == pytest.approx(85.05, abs=0.01)
    assert millions(method.head) == pytest.approx(4.72, abs=0.01)
    assert millions(method) == pytest.approx(175.4, abs=0.05)
    assert {name.split(".")[0] for name, _ in method.encoder.named_parameters()} == {
        *("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
    }


def test_the_decoder_is_not_exported_but_for_its_norm():
    """The official checkpoint's `norm` is the decoder's: it is trained although the content stream
    has none.
    """
    method = build()
    method.predict(images(), drawn()).square().mean().backward()
    assert method.encoder.norm.weight.grad.abs().sum() > 0
    assert not any("query" in name for name, _ in method.encoder.named_parameters())


def test_query_key_and_value_start_as_three_matrices():
    torch.manual_seed(0)
    method = Method(Config(), tiny.spec(embed_dim=64, depth=2))
    bound = math.sqrt(6 / 128)
    for block in (*method.encoder.blocks, *method.query_blocks):
        for matrix in block.attn.qkv.weight.chunk(3):
            assert 0.97 * bound < matrix.abs().max() <= bound
        assert not block.attn.qkv.bias.any()
    assert 0.01 < method.encoder.cls_token.std() < 0.03


# --- target and loss ------------------------------------------------------------------------------


def test_the_kernel_is_a_gaussian():
    kernel = gaussian(9, 1.0).double()
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert kernel[4, 4].item() == pytest.approx(0.1592, abs=5e-5)
    assert torch.equal(kernel, kernel.T) and torch.equal(kernel, kernel.flip(0))
    assert (kernel[4, 5] / kernel[4, 4]).item() == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert gaussian(1, 1.0).item() == 1


def test_a_blur_leaves_the_inside_of_a_constant_and_darkens_the_border():
    blurred = build(blur=5).blurred(torch.ones(1, 3, 16, 16))
    assert torch.allclose(blurred[..., 2:-2, 2:-2], torch.tensor(1.0), atol=1e-6)
    line = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    edge = line[2:].sum() / line.sum()  # beyond the border are zeros
    assert blurred[0, 0, 8, 0].item() == pytest.approx(edge, rel=1e-5)
    assert blurred[0, 0, 0, 0].item() == pytest.approx(edge**2, rel=1e-5)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("blur", [None, 3])
def test_the_loss_is_the_formula_over_all_patches(loss, norm_pix, blur, monkeypatch):
    method = build(loss=loss, norm_pix=norm_pix, blur=blur)
    predicted = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(method, "predict", lambda *args: predicted)
    pixels = tiny.images(4)
    x = (pixels - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
    x = x.double().numpy()
    if blur:
        line = np.exp(-0.5 * np.arange(-1, 2) ** 2)
        line /= line.sum()
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        x = sum(
            line[i] * line[j] * padded[:, :, i : i + 16, j : j + 16]
            for i in range(3)
            for j in range(3)
        )
    total = 0.0
    for b in range(4):
        for n in range(16):
            top, left = 4 * (n // 4), 4 * (n % 4)
            patch = x[b, :, top : top + 4, left : left + 4].transpose(1, 2, 0).reshape(-1)
            if norm_pix:
                patch = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 1e-6)
            error = predicted[b, n].numpy() - patch
            total += (np.abs(error) if loss == "l1" else error**2).mean()
    found = method({"view": pixels}, tiny.progress(4))["loss"].item()
    assert found == pytest.approx(total / 64, rel=1e-4)


def test_early_and_late_are_the_quarters_of_the_order(monkeypatch):
    method, progress = build(norm_pix=False, blur=None), tiny.progress(4)
    ranks = method.ranks(images(), progress.uniform)
    pixels = tiny.images(4)
    truth = patchify(SPEC.normalise(pixels), 4)
    monkeypatch.setattr(method, "predict", lambda *args: truth + ranks[..., None])
    out = method({"view": pixels}, progress)
    assert out["early"].item() == pytest.approx((0 + 1 + 4 + 9) / 4, rel=1e-4)
    assert out["late"].item() == pytest.approx(sum(n * n for n in range(12, 16)) / 4, rel=1e-4)


def test_orders_differ_between_samples_and_steps_and_repeat():
    method = build()
    one, again, other = (
        method.ranks(images(), tiny.progress(4, step=step).uniform) for step in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({tuple(row) for row in torch.cat([one, other]).tolist()}) == 8


# --- orders ---------------------------------------------------------------------------------------


def uniform(rows, seed=3):
    return tiny.progress(rows, seed=seed).uniform


def test_every_order_is_a_permutation_of_every_sample():
    given = images(6)
    for kind in ("stochastic", "raster", "boustrophedon", "fixed", "centre", "random-centre"):
        ranks = build(order=kind).ranks(given, uniform(6))
        assert torch.equal(ranks.sort(1).values, torch.arange(16).expand(6, -1)), kind
    ranks = build(order="attention").ranks(given, uniform(6))
    assert torch.equal(ranks.sort(1).values, torch.arange(16).expand(6, -1))


def test_raster_and_boustrophedon():
    assert orders.raster(2, 3).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 2
    assert orders.raster(1, 3, turning=True).tolist() == [[0, 1, 2, 5, 4, 3, 6, 7, 8]]


def test_the_fixed_order_is_one_for_all_and_part_of_the_state():
    first, second = build(order="fixed"), build(seed=1, order="fixed")
    ranks = first.ranks(images(), uniform(4))
    assert (ranks == ranks[0]).all() and not torch.equal(ranks[0], torch.arange(16))
    assert not torch.equal(first.fixed, second.fixed)
    assert "fixed" in first.state_dict()
    assert torch.equal(first.ranks(images(), uniform(4, 9)), ranks)


def test_rings_are_those_of_semaim():
    """At 14 x 14: the squares 6-7, 4-9, 2-11 of rows and columns come one after the other."""
    ranks = orders.centre_out(uniform(5), 14).view(5, 14, 14)
    for low, high, count in ((6, 8, 4), (4, 10, 36), (2, 12, 100)):
        inside = ranks[:, low:high, low:high].flatten(1).sort(1).values
        assert torch.equal(inside, torch.arange(count).expand(5, -1))
    assert not torch.equal(ranks[0], ranks[1])


def test_rings_around_random_centres_lie_in_the_grid():
    ranks = orders.centre_out(uniform(300), 14, anywhere=True).view(300, 14, 14)
    first = torch.stack([(r < 4).nonzero().float().mean(0) for r in ranks])  # centres of 2 x 2
    assert first.min() == 0.5 and first.max() == 12.5
    # a square of even side begins a patch before its centre's middle, and is shifted at the edge
    starts = [min(max(centre - 1, 0), 12) for centre in range(14)]
    assert first.mean().item() == pytest.approx(np.mean(starts) + 0.5, abs=0.5)
    for rank in ranks[:50]:
        places = (rank < 4).nonzero()
        assert (places.max(0).values - places.min(0).values).tolist() == [1, 1]


def test_attention_order_goes_by_the_distance_from_the_peak():
    saliency = torch.zeros(3, 16)
    saliency[0, 5], saliency[1, 0], saliency[2, 15] = 1, 1, 1
    ranks = orders.from_peak(uniform(3), 4, saliency)
    for b, (row, column) in enumerate(((1, 1), (0, 0), (3, 3))):
        distance = [math.hypot(n // 4 - row, n % 4 - column) for n in range(16)]
        in_order = [distance[n] for n in ranks[b].argsort().tolist()]
        assert in_order == sorted(in_order)
    assert not torch.equal(orders.from_peak(uniform(3, seed=4), 4, saliency), ranks)


def test_saliency_is_the_likeness_to_the_mean_and_has_no_gradient():
    method, given = build(order="attention"), images()
    found = method.saliency(given)
    patch = method.encoder.forward_features(given)[:, 1:].detach().double()
    mean = patch.mean(1, keepdim=True)
    expected = (patch * mean).sum(2) / patch.norm(dim=2) / mean.norm(dim=2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


# --- recipe, pictures, errors ---------------------------------------------------------------------


def test_the_published_recipe():
    """lr 1.6e-3 at batches of 2048, 30 of 800 epochs of warm-up, no clipping, cls decayed."""
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=625)
    assert recipe.lr == pytest.approx(1.6e-3) and recipe.warmup == 30 * 625
    assert (recipe.clip, recipe.weight_decay, recipe.betas) == (None, 0.05, (0.9, 0.95))
    assert (config.blur, config.blur_sigma, config.query_depth, config.head) == (9, 1.0, 12, "mlp")
    view = views(config, SPEC)["view"]
    assert (tuple(view.scale), view.flip) == ((0.2, 1.0), 0.5)
    decayed = optim.groups(build(), 0.05)[0]["params"]
    assert any(p.shape == (1, 1, 32) for p in decayed)


def test_the_completion_uses_nothing_that_it_does_not_show(monkeypatch):
    """Pixels beyond the first quarter of the order change the first column of pictures alone, as
    long as means and deviations are not borrowed.
    """
    method = build(norm_pix=False, blur=None)
    pixels = tiny.images(2)
    ranks = method.ranks(pixels, lambda *_: torch.rand(2, 16, generator=_generator()))
    monkeypatch.setattr(method, "ranks", lambda *_: ranks)
    later = F.interpolate((ranks >= 4).view(2, 1, 4, 4).float(), size=16) > 0
    one, other = (
        method.pictures({"view": x})["completion"]
        for x in (pixels, torch.where(later, 1 - pixels, pixels))
    )
    column = 96 + 4
    assert one.shape == (2 * column - 4, 6 * column - 4, 3)
    assert not np.array_equal(one[:, :column], other[:, :column])
    assert np.array_equal(one[:, column:], other[:, column:])
    grey = [(one[:96, i * column : i * column + 96] == 128).all(-1).mean() for i in range(2, 6)]
    assert grey == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=0.02)


def _generator():
    return torch.Generator().manual_seed(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blur": 4}, "^blur: found 4, expected an odd number"),
        ({"blur": -1}, "^blur: found -1"),
        ({"blur_sigma": 0.0}, "^blur_sigma: found"),
        ({"query_depth": 0}, "^query_depth: found"),
    ],
)
def test_bad_config(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_config_must_fit_the_model():
    with pytest.raises(
        ValueError, match="^query_depth: found 2, expected a divisor of model.depth"
    ):
        Config(query_depth=2).check(16, tiny.model(depth=3))
    with pytest.raises(ValueError, match="^model.patch_size: found one patch of 4 pixels"):
        Config().check(4, tiny.model())
    with pytest.raises(ValueError, match="^model.embed_dim: found 18"):
        Config().check(16, tiny.model(embed_dim=18))
    with pytest.raises(ValueError, match="^model: found no class token"):
        Method(Config(), tiny.spec(args={"class_token": False, "global_pool": "avg"}))
