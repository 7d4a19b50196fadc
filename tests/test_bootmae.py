"""BootMAE: the facts of the paper (arXiv 2207.07116) and its official code."""

from __future__ import annotations

import functools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from stages.kit import keyed
from stages.kit.nets import encoders
from stages.kit.nets.crossdecoder import Attention, CrossDecoder
from stages.kit.nets.masks import exact_block_masks, surrounded
from stages.kit.nets.positions import sincos_2d
from stages.kit.parts import collapse
from stages.kit.parts.collapse import CollapseError
from stages.kit.train import optim
from stages.kit.train.recipe import Progress, Recipe
from stages.methods import bootmae
from stages.methods.bootmae import PUBLISHED, SEARCH, Config, Method, views
from tests import tiny

SPEC = tiny.spec(embed_dim=16, mlp_ratio=4.0)  # 16 patches, of which 4 are visible
FULL = tiny.spec(224, patch_size=16, embed_dim=16)
BLOCKS = {"min_block": 16, "max_block": 60, "roll": 3}


def build(spec=SPEC, **settings) -> Method:
    torch.manual_seed(0)
    method = Method(Config(**{"decoder_dim": 20, "decoder_depth": 2, **settings}), spec)
    with torch.no_grad():  # as after some training
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return method


def batch(rows=4, size=16) -> dict:
    return {"view": tiny.images(rows, size, seed=1)}


def masked(method: Method, rows=4, step=3):
    now = tiny.progress(rows, step)
    return method.mask(now.uniform, method.rolled(now))


def at(epoch: int, epochs: int, per_epoch: int = 3) -> Progress:
    """In the middle of an epoch."""
    rows, step = torch.arange(4), epoch * per_epoch + 1
    total = epochs * per_epoch
    return Progress(step, total, step / per_epoch, 0, rows, rows.device, False, epochs)


# --- masks --------------------------------------------------------------------------------------


def official_blocks(side: int, count: int, low: int, high: int, draw: random.Random) -> np.ndarray:
    """The block rule with tries that have no end, one rectangle after another."""
    mask = np.zeros((side, side), bool)
    while mask.sum() < count:
        most = min(count - mask.sum(), high)
        while True:
            area = draw.uniform(low, most)
            aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < side and h < side:
                top, left = draw.randint(0, side - h), draw.randint(0, side - w)
                new = int((~mask[top : top + h, left : left + w]).sum())
                if 0 < new <= most:
                    mask[top : top + h, left : left + w] = True
                    break
    return mask


@functools.cache
def blocks(side: int, rows: int = 1000) -> torch.Tensor:
    """Of the published sizes, or those of a grid of 8 x 8."""
    sizes = (120, 16, 60) if side == 14 else (39, 4, 20)

    def uniform(name, *shape):
        return keyed.uniform(keyed.key(1, name), torch.arange(rows), *shape)

    return exact_block_masks(uniform, (side, side), *sizes, **SEARCH)


@pytest.mark.parametrize("side", [14, 8])
def test_blocks_are_those_of_the_official_rule(side):
    """In number, in where they lie, and in how ragged they are."""
    count, low, high = (120, 16, 60) if side == 14 else (39, 4, 20)
    found, draw = blocks(side), random.Random(0)
    assert (found.sum(1) == count).all()
    official = [official_blocks(side, count, low, high, draw) for _ in range(1000)]
    official = torch.from_numpy(np.stack(official)).float()
    found = found.float().view(-1, side, side)
    assert (found.mean(0) - official.mean(0)).abs().max() < 4.5 * math.sqrt(0.5 / 1000)
    ragged = [(m[:, 1:] != m[:, :-1]).float().mean() for m in (found, official)]
    assert ragged[0].item() == pytest.approx(ragged[1].item(), rel=0.04)


def test_147_are_hidden_49_visible_and_at_most_3_of_blocks():
    method, seen = build(FULL, **BLOCKS), set()
    for step in range(12):
        now = tiny.progress(20, step)
        blocked = exact_block_masks(now.uniform, (14, 14), 120, 16, 60, **SEARCH)
        ids_keep, ids_restore, mask = masked(method, 20, step)
        roll = int(method.rolled(now))
        assert ids_keep.shape == (20, 49) and (mask.sum(1) == 147).all()
        assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(49).expand(20, -1))
        assert not mask.gather(1, ids_keep).any()
        shown = (blocked & (mask == 0)).sum(1)
        assert (shown == roll).all()  # the same for the whole batch
        assert ((mask == 1) & ~blocked).sum(1).eq(27 + roll).all()
        seen.add(roll)
    assert seen == {0, 1, 2, 3}
    assert int(method.rolled(tiny.progress(torch.tensor([7]), 5))) == int(
        method.rolled(tiny.progress(20, 5))
    )


@pytest.mark.parametrize("size, hidden, kept", [(32, 39, 16), (64, 157, 64)])
def test_counts_on_small_grids(size, hidden, kept):
    method = build(tiny.spec(size, embed_dim=16))
    assert round(method.patches * method.config.block_ratio) == hidden
    ids_keep, _, mask = masked(method, 50)
    assert ids_keep.shape == (50, kept) and (mask.sum(1) == method.patches - kept).all()


def test_the_order_is_random_before_the_blocks_begin():
    """Which patches outside of the blocks are seen is up to chance."""
    method = build(tiny.spec(32, embed_dim=16), roll=0)
    _, _, mask = masked(method, 2000)
    outside = 1 - blocks(8, 2000).float().mean(0).view(8, 8)
    seen = 1 - mask.view(-1, 8, 8).mean(0)
    # 16 of the 25 patches outside of blocks
    assert (seen - 16 / 25 * outside).abs().max() < 0.08


def test_the_weight_of_a_patch():
    mask = torch.ones(1, 25)
    found = surrounded(mask).view(5, 5)
    assert found[1:4, 1:4].eq(2).all()
    assert found[0, 2].item() == pytest.approx(5 / 3) and found[0, 0].item() == pytest.approx(
        13 / 9
    )
    alone = torch.zeros(2, 25)
    alone[0, 12] = 1
    found = surrounded(alone)
    assert found[0, 12].item() == pytest.approx(10 / 9) and int((found > 0).sum()) == 1


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"weight_mask": False}, {"inject": "none"}, {"feature_weight": 0.3}]
)
def test_the_loss_by_hand(settings):
    """In float64 numpy, patch by patch."""
    method, now = build(**settings).eval(), at(0, epochs=8)
    ids_keep, ids_restore, mask = method.mask(now.uniform, method.rolled(now))
    x = batch()["view"]
    with torch.no_grad():
        images = SPEC.normalise(x)
        drawn, features = (
            part.double().numpy() for part in method.predict(images, ids_keep, ids_restore)
        )
        teacher = encoders.masked(method.teacher.network, images, None, None, norm=False)
        teacher = teacher["patch"].double().numpy()
    x, mask = 2 * x.double().numpy() - 1, mask.numpy()

    def standard(values, eps):
        return (values - values.mean()) / np.sqrt(values.var() + eps)

    pixel = feature = 0.0
    for image in range(4):
        grid = np.pad(mask[image].reshape(4, 4), 1)
        for place in range(16):
            row, column = divmod(place, 4)
            if not mask[image, place]:
                continue
            weight = 1 + grid[row : row + 3, column : column + 3].sum() / 9
            weight = weight if method.config.weight_mask else 1.0
            cut = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            errors = [
                (drawn[image, c][cut] - standard(x[image, c][cut], 1e-5)) ** 2 for c in range(3)
            ]
            pixel += weight * np.mean(errors)
            wanted, found = (standard(side[image, place], 1e-6) for side in (teacher, features))
            feature += weight * ((wanted - found) ** 2).mean()
    share = mask.mean()
    pixel, feature = pixel / 64 / share, feature / 64 / share  # means over all patches
    out = method(batch(), now)
    assert out["pixel_loss"].item() == pytest.approx(pixel, rel=1e-5)
    assert out["feature_loss"].item() == pytest.approx(feature, rel=1e-5)
    weight = method.config.feature_weight * 0.5  # 4 (1 + 0) / 8
    assert out["loss"].item() == pytest.approx(pixel + weight * feature, rel=1e-5)
    assert out["loss"].dtype == torch.float32


def test_pixels_are_standardised_for_each_patch_and_channel():
    found, mean, deviation = build().pixels(batch()["view"])
    cells = found.unflatten(3, (4, 4)).unflatten(2, (4, 4)).double()
    assert cells.mean((3, 5)).abs().max() < 1e-5
    assert (cells.var((3, 5), correction=0) - 1).abs().max() < 1e-3
    torch.testing.assert_close(found * deviation + mean, 2 * batch()["view"] - 1)
    flat = build().pixels(torch.full((1, 3, 16, 16), 0.3))[0]
    assert flat.abs().max() < 1e-3


def test_pixels_of_visible_patches_do_not_matter(monkeypatch):
    method = build()
    _, _, mask = masked(method)
    cells = mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    truth = method.pixels(batch()["view"])[0]
    given = torch.where(cells, truth, torch.randn_like(truth)).requires_grad_()
    features = torch.randn(4, 16, 16)
    monkeypatch.setattr(method, "predict", lambda *_: (given, features))
    out = method(batch(), tiny.progress(4))
    assert out["pixel_loss"].item() == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        given += 1
    out = method(batch(), tiny.progress(4))
    assert 1.3 < out["pixel_loss"].item() < 2  # weights are not in the divisor
    out["loss"].backward()
    assert torch.equal(given.grad.abs() > 0, cells.expand(-1, 3, -1, -1))


def test_scale_and_offset_of_predicted_features_are_free(monkeypatch):
    method, features = build(), torch.randn(4, 16, 16)
    losses = []
    moved = (0.5 + 3 * torch.rand(4, 16, 1)) * features + torch.randn(4, 16, 1)
    for given in (features, moved, -features):
        monkeypatch.setattr(method, "predict", lambda *_, f=given: (torch.zeros(4, 3, 16, 16), f))
        losses.append(method(batch(), tiny.progress(4))["feature_loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) != pytest.approx(losses[2], rel=0.01)


def test_the_feature_weight_rises_over_a_quarter_of_the_epochs():
    method = build(feature_weight=2.0)
    found = [method.feature_weight(at(epoch, 800)).item() for epoch in range(800)]
    epoch = np.arange(800)
    np.testing.assert_allclose(found, np.minimum(2 * (1 + epoch) / 800 * 4, 2), rtol=1e-12)
    assert found[0] == pytest.approx(2 * 4 / 800) and found[199] == found[200] == found[799] == 2
    assert build(ramp=0.0).feature_weight(at(0, 800)).item() == 1


# --- the teacher --------------------------------------------------------------------------------


def test_the_teacher_sees_the_whole_image_and_gives_what_is_before_the_last_norm():
    method, images = build(), SPEC.normalise(batch()["view"])
    found = method.target(images)
    tokens = method.teacher.network.forward_intermediates(
        images, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
    )[0]
    mean, variance = tokens.mean(2, keepdim=True), tokens.var(2, keepdim=True, correction=0)
    torch.testing.assert_close(found, (tokens - mean) / (variance + 1e-6).sqrt())
    assert found.shape == (4, 16, 16) and not found.requires_grad
    method.teacher.network.norm.weight.data.mul_(-3)
    assert torch.equal(method.target(images), found)


def test_no_gradient_to_the_teacher_which_follows_after_the_step():
    method, now = build(momentum=0.6), at(0, 800)
    method(batch(), now)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    before = {n: p.clone() for n, p in method.teacher.network.named_parameters()}
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape))
    method.after_step(now)
    student = dict(method.encoder.named_parameters())
    for name, value in method.teacher.network.named_parameters():
        torch.testing.assert_close(value, 0.6 * before[name] + 0.4 * student[name].detach())


def test_the_decay_of_the_published_recipe():
    settings = {key: value for key, value in PUBLISHED.items() if key.startswith("momentum")}
    method = build(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    found = [method.momentum(at(epoch, 801)) for epoch in range(801)]

    def official(epoch):
        if epoch < 100:
            return 0.999 + epoch / 100 * (0.9999 - 0.999)
        return 0.9999 + min(300, epoch - 100) / 300 * (0.99999 - 0.9999)

    np.testing.assert_allclose(found, [official(epoch) for epoch in range(801)], atol=1e-9)
    assert (found[0], found[800]) == (0.999, 0.99999)


def test_a_teacher_that_gives_every_image_the_same_stops_the_training(monkeypatch):
    monkeypatch.setattr(collapse, "LEAST_STEPS", 2)
    method = build()
    alive = method(batch(), at(0, 1))["variety"].item()
    method.teacher.network.patch_embed.proj.weight.data.zero_()  # positions remain
    with pytest.raises(CollapseError, match="differed between images by less than 0.05"):
        for step in range(4):
            dead = method(batch(), tiny.progress(4, step, 4))["variety"].item()
            method.watch.step(tiny.progress(4, step, 4))
    assert dead == pytest.approx(0, abs=1e-5) and alive > 0.3


# --- encoder and decoders -----------------------------------------------------------------------


@pytest.mark.parametrize("inject", ["matched", "reversed", "none"])
def test_each_decoder_looks_at_its_own_state_of_the_encoder(inject, monkeypatch):
    """What is stored is changed, not what flows on."""
    method, images = build(inject=inject), SPEC.normalise(batch()["view"])
    ids_keep, ids_restore, _ = masked(method)
    plain, visible = method.predict(images, ids_keep, ids_restore), encoders.visible
    changed = {}
    for tap in (1, 2):

        def spoilt(*args, tap=tap, **how):
            found = visible(*args, **how)
            assert found["taps"].keys() == {1, 2} and found["taps"][tap].shape == (4, 5, 16)
            found["taps"][tap] = torch.zeros_like(found["taps"][tap])
            return found

        monkeypatch.setattr(encoders, "visible", spoilt)
        again = method.predict(images, ids_keep, ids_restore)
        monkeypatch.setattr(encoders, "visible", visible)
        changed[tap] = [not torch.equal(*both) for both in zip(plain, again, strict=True)]
    first, last = {"matched": (1, 2), "reversed": (2, 1), "none": (None, None)}[inject]
    assert changed == {tap: [tap == first, tap == last] for tap in (1, 2)}


def test_states_are_before_the_last_norm():
    method, images = build(), SPEC.normalise(batch()["view"])
    ids_keep = masked(method)[0]
    seen = encoders.visible(method.encoder, images, ids_keep, taps=(1, 2))
    torch.testing.assert_close(method.encoder.norm(seen["taps"][2]), seen["tokens"])


def test_only_mask_tokens_have_a_position():
    torch.manual_seed(0)
    decoder = CrossDecoder(16, 4, 20, depth=1, heads=2, prefix=1, inject=True)
    states = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    ids_restore = torch.rand(3, 16).argsort(1)
    tokens = torch.randn(3, 5, 16)
    decoder(tokens, ids_restore, tokens)
    [x] = states
    assert x.shape == (3, 17, 20)
    embedded, positions = decoder.embed(tokens), sincos_2d(20, 4)
    assert torch.equal(x[:, 0], embedded[:, 0])
    for image in range(3):
        for place, source in enumerate(ids_restore[image].tolist()):
            expected = (
                embedded[image, 1 + source]
                if source < 4
                else decoder.mask_token[0, 0] + positions[place]
            )
            torch.testing.assert_close(x[image, 1 + place], expected)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_hand(fused):
    """Three heads of 6 channels at a width of 20, without a bias of the keys."""
    torch.manual_seed(0)
    layer = Attention(20, 16, heads=3).double()
    layer.fused_attn = fused
    assert layer.k.bias is None and layer.q.bias is not None and layer.v.bias is not None
    x, context = torch.randn(2, 5, 20).double(), torch.randn(2, 4, 16).double()
    q = x @ layer.q.weight.T + layer.q.bias
    k, v = context @ layer.k.weight.T, context @ layer.v.weight.T + layer.v.bias
    assert q.shape[-1] == 18
    heads = []
    for head in range(3):
        cut = slice(6 * head, 6 * head + 6)
        scores = (q[..., cut] @ k[..., cut].mT / math.sqrt(6)).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., cut])
    expected = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x, context), expected)


def test_a_tile_of_the_picture_depends_on_its_own_token():
    method = build(FULL, **BLOCKS)
    x = torch.randn(1, 20, 14, 14)
    plain = method.pixel_head(x)
    assert plain.shape == (1, 3, 224, 224)
    x[:, :, 3, 5] += 1
    same = (method.pixel_head(x) == plain).all(1)[0]
    expected = torch.ones(224, 224, dtype=torch.bool)
    expected[48:64, 80:96] = False
    assert torch.equal(same, expected)


def test_keys_of_the_encoder_never_get_a_bias():
    method = Method(Config(decoder_dim=20), SPEC)
    recipe = Recipe(1, 4, 10, lr=1e-2, weight_decay=0.05)
    optimiser = optim.build(recipe, optim.groups(method, 0.05), torch.device("cpu"))
    for step in range(3):
        optimiser.zero_grad()
        method(batch(), tiny.progress(4, step))["loss"].backward()
        method.before_step(tiny.progress(4, step))
        optimiser.step()
    for block in method.encoder.blocks:
        q, k, v = block.attn.qkv.bias.chunk(3)
        assert not k.any() and q.any() and v.any()


def test_initial_weights():
    torch.manual_seed(0)
    method = Method(Config(decoder_dim=64), tiny.spec(embed_dim=64, mlp_ratio=4.0))

    def bounded(weight, bound):
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)

    for name, layer in method.named_modules():
        if isinstance(layer, nn.Linear):
            assert layer.bias is None or not layer.bias.any()
            rows, columns = layer.weight.shape
            rows = rows // 3 if name.endswith("qkv") else rows
            rows = 2 * rows if name.endswith(("cross.k", "cross.v")) else rows
            bounded(layer.weight, math.sqrt(6 / (rows + columns)))
    patches = method.encoder.patch_embed.proj
    bounded(patches.weight, math.sqrt(6 / (48 + 64)))
    assert not patches.bias.any() and method.encoder.cls_token.abs().max() < 1e-5
    for decoder in (method.pixel_decoder, method.feature_decoder):
        assert decoder.mask_token.std() > 0.005 and decoder.mask_token.abs().max() <= 0.02
    assert torch.equal(method.encoder.pos_embed[0, 1:], sincos_2d(64, 4))
    assert not method.encoder.pos_embed[0, 0].any()
    decayed, plain = ({id(p) for p in g["params"]} for g in optim.groups(method, 0.05))
    assert id(method.encoder.cls_token) in plain
    assert id(method.pixel_decoder.mask_token) in decayed


def test_published_parameter_counts():
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    published = {key: PUBLISHED[key] for key in ("decoder_dim", "decoder_depth", *BLOCKS)}
    with torch.device("meta"):
        method = Method(Config(**published), tiny.spec(224, patch_size=16, **sizes))

    def millions(*parts):
        return sum(p.numel() for part in parts for p in part.parameters()) / 1e6

    keys = 12 * 768 / 1e6  # of which the official encoder has none
    assert millions(method.encoder) - keys == pytest.approx(85.79, abs=0.005)
    assert method.pixel_decoder.blocks[0].cross.q.out_features == 504
    positions = 197 * 512 / 1e6
    pixel = millions(method.pixel_decoder, method.pixel_head) + positions
    assert pixel == pytest.approx(9.75, abs=0.03)
    assert millions(method.feature_decoder, method.feature_head) == pytest.approx(20.09, abs=0.03)


# --- recipe, arms, pictures, settings -----------------------------------------------------------


def test_the_published_recipe():
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config, per = Config(**settings), 10
    config.check(224, FULL.model)
    recipe = Recipe.of(config, train, per)
    assert recipe.lr == pytest.approx(2.4e-3) and recipe.warmup == 40 * per
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(1e-4, rel=1e-3)
    assert round(196 * config.block_ratio) == 120 and recipe.clip is None
    view = views(config, FULL)["view"]
    assert (view.size, tuple(view.scale), view.flip) == (224, (0.2, 1.0), 0.5)


def test_without_features_there_is_no_teacher():
    method = build(feature_weight=0.0, inject="none")
    names = {name.partition(".")[0] for name, _ in method.named_parameters()}
    assert names == {"encoder", "pixel_decoder", "pixel_head"}
    assert not any("cross" in name for name, _ in method.named_parameters())
    out = method(batch(), at(0, 8))
    assert out.keys() == {"loss", "pixel_loss"} and torch.equal(out["loss"], out["pixel_loss"])
    out["loss"].backward()
    method.before_step(at(0, 8))
    method.after_step(at(0, 8))
    assert method.pictures(batch())["predictions"].std() > 0


def test_pictures_show_both_predictions(monkeypatch):
    sheets = []
    monkeypatch.setattr(bootmae, "contact_sheet", lambda x: sheets.append(x) or np.zeros(1))
    method, x = build(), batch(9)
    truth = method.pixels(x["view"][:8])[0]
    features = method.target(SPEC.normalise(x["view"][:8]))
    monkeypatch.setattr(method, "predict", lambda *_: (truth, 3 * features + 1))
    method.pictures(x)
    [(images, seen, pixels, wanted, found)] = sheets
    assert images.shape == (8, 3, 16, 16)
    torch.testing.assert_close(pixels, images, atol=1e-5, rtol=0)  # of a perfect prediction
    hidden = (seen == 0.5).all(1, keepdim=True).expand(-1, 3, -1, -1)
    assert hidden.float().mean().item() == pytest.approx(0.75)
    torch.testing.assert_close(found[hidden], wanted[hidden], atol=1e-3, rtol=0)
    assert (found[~hidden] == 0.5).all()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"block_ratio": 0.0}, "block_ratio"),
        ({"min_block": 0}, "min_block"),
        ({"min_block": 21}, "max_block"),
        ({"roll": -1}, "roll"),
        ({"feature_weight": -1.0}, "feature_weight"),
        ({"ramp": 2.0}, "ramp"),
        ({"momentum_middle": 1.2}, "momentum_middle"),
        ({"momentum_at": (0.5, 0.1)}, "momentum_at"),
        ({"decoder_dim": 18}, "decoder_dim"),
        ({"decoder_depth": 0}, "decoder_depth"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_ratio": 0.9}, "block_ratio: found 0.9, which hides 14 of 16 patches, expected at"),
        ({"block_ratio": 0.01}, "block_ratio: found 0.01, which hides 0 of 16"),
        ({"min_block": 11, "max_block": 20}, "min_block: found 11, expected at most 10"),
        ({"roll": 5}, "roll: found 5, expected at most 4"),
        ({"mask_ratio": 0.99}, "mask_ratio: found 0.99"),
    ],
)
def test_config_must_fit_the_model(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Config(**values).check(16, SPEC.model)
    many = tiny.model(embed_dim=32, num_heads=16)
    with pytest.raises(ValueError, match="^decoder_dim: found 8, expected at least the model's 16"):
        Config(decoder_dim=8).check(16, many)
