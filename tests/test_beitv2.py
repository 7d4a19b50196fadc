"""BEiT v2's student: the facts of the paper (arXiv 2208.06366) and its official code."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets.masks import exact_block_masks, hidden_ids
from stages.kit.nets.pictures import paint
from stages.kit.train.recipe import Recipe
from stages.methods.beitv2 import PUBLISHED, Config, Method, views
from tests import tiny

SMALL = Config(early_layer=2, head_depth=2, min_block=2)
SIZES = {"embed_dim": 16, "depth": 3, "mlp_ratio": 4.0}
SPEC = tiny.spec(**SIZES)
BASE = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


def spec(**changes):
    return tiny.spec(**{**SIZES, **changes})


def tokenizer(given=SPEC, codes=16):
    return tiny.target(given, "ids", codes=codes)


def codes_of(images):
    return tokenizer()(images, "ids")["ids"]


def batch(rows=6):
    return {"view": torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def build(config=SMALL, **changes):
    torch.manual_seed(0)
    method = Method(config, spec(**changes), tokenizer())
    # it starts at zero: make it matter
    nn.init.normal_(method.encoder.rel_pos_bias.relative_position_bias_table)
    return method


def mask_of(method, rows=6):
    mask = exact_block_masks(
        tiny.progress(rows).uniform, (4, 4), method.count, method.config.min_block
    )
    return mask, hidden_ids(mask, method.count)


def test_losses_are_cross_entropies_at_the_hidden_patches():
    method = build()
    images = batch()["view"]
    mask, ids = mask_of(method)
    assert mask.sum(1).tolist() == [6] * 6  # 0.39 of 16
    out = method(batch(), tiny.progress(6))
    codes = codes_of(images)
    total = 0.0
    for name, logits in method.predict(SPEC.normalise(images), mask, ids).items():
        expected = F.cross_entropy(logits.flatten(0, 1), codes[mask])
        assert out[f"{name}_loss"].item() == pytest.approx(expected.item(), rel=1e-6)
        right = (logits.flatten(0, 1).argmax(1) == codes[mask]).float().mean()
        assert out[f"{name}_accuracy"].item() == pytest.approx(right.item())
        total += expected.item()
    assert set(out) == {
        "loss",
        "mim_loss",
        "mim_accuracy",
        "aggregation_loss",
        "aggregation_accuracy",
    }
    assert out["loss"].item() == pytest.approx(total, rel=1e-6)


def test_logits_are_the_official_forward():
    """Written plainly: full sequences, multiplicative mask, selection at the very end."""
    method = build().eval()
    encoder, images = method.encoder, SPEC.normalise(batch()["view"])
    mask, ids = mask_of(method)
    m = mask[..., None].float()
    x = encoder.patch_embed(images) * (1 - m) + method.mask_token * m
    x = torch.cat([encoder.cls_token.expand(6, -1, -1), x], 1)
    bias = encoder.rel_pos_bias()
    for number, block in enumerate(encoder.blocks, start=1):
        x = block(x, bias)
        if number == 2:
            early = x[:, 1:]
    expected = {"mim": method.head(encoder.norm(x))[:, 1:][mask]}
    x = torch.cat([x[:, :1], early], 1)
    for block in method.aggregation:
        x = block(x, bias)
    expected["aggregation"] = method.head(encoder.norm(x))[:, 1:][mask]
    found = method.predict(images, mask, ids)
    for name in expected:
        assert torch.allclose(found[name].flatten(0, 1), expected[name], atol=1e-5), name


def test_hidden_pixels_change_labels_but_not_one_bit_of_the_logits():
    method = build().eval()
    images = batch()["view"]
    mask, ids = mask_of(method)
    other = paint(
        images, mask, torch.rand(images.shape, generator=torch.Generator().manual_seed(9))
    )
    assert not torch.equal(other, images)
    assert not torch.equal(codes_of(images)[mask], codes_of(other)[mask])
    assert torch.equal(codes_of(images)[~mask], codes_of(other)[~mask])
    first, second = (method.predict(SPEC.normalise(x), mask, ids) for x in (images, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_tokenizer_sees_the_same_view_and_never_learns():
    method = build()
    teacher, seen = method.tokenizer.open, []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before = teacher.weight.clone()
    optimiser = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(10):
        method(batch(), tiny.progress(6, step=step))["loss"].backward()
        optimiser.step()
    assert teacher.weight.grad is None
    assert torch.equal(teacher.weight, before)
    assert torch.equal(seen[0], batch()["view"])  # the view itself, in [0, 1]
    assert not any("tokenizer" in name for name in method.state_dict())
    assert not any(parameter is teacher.weight for parameter in method.parameters())


def test_late_patch_tokens_reach_the_first_loss_only():
    method = build().eval()
    clean = method(batch(), tiny.progress(6))

    def disturb(module, args, out):  # of the block behind the early one: patches, not cls
        return torch.cat([out[:, :1], out[:, 1:] + torch.randn_like(out[:, 1:])], dim=1)

    method.encoder.blocks[2].register_forward_hook(disturb)
    disturbed = method(batch(), tiny.progress(6))
    assert disturbed["mim_loss"] != clean["mim_loss"]
    assert disturbed["aggregation_loss"] == clean["aggregation_loss"]


def test_early_states_are_not_detached():
    method = build()
    seen = {}

    def keep(module, args, out):
        out.retain_grad()
        seen["early"] = out

    method.encoder.blocks[1].register_forward_hook(keep)
    # cut the way through the class token: what is left can only come through the early patch tokens
    method.encoder.blocks[2].register_forward_hook(lambda module, args, out: out.detach())
    method(batch(), tiny.progress(6))["aggregation_loss"].backward()
    assert (seen["early"].grad[:, 1:].abs().sum(-1) > 0).all()
    assert (seen["early"].grad[:, 0] == 0).all()


@pytest.fixture
def base():
    def count(**config):
        given = tiny.spec(224, **BASE)
        with torch.device("meta"):
            method = Method(Config(early_layer=9, **config), given, tokenizer(given, 8192))
        return sum(parameter.numel() for parameter in method.parameters()), method

    return count


def test_published_parameter_counts(base):
    plain, method = base(head_depth=0)
    assert plain == 91_965_776
    assert method.head.weight.numel() + method.head.bias.numel() == 6_299_648
    assert method.encoder.rel_pos_bias.relative_position_bias_table.shape == (732, 12)
    shared, _ = base(head_depth=2)
    assert shared - plain == 14_177_280
    separate, _ = base(head_depth=2, shared_head=False)
    assert separate - shared == 2 * 768 + 8192 * 769


def test_small_parameter_counts():
    sizes = {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}
    given = tiny.spec(32, **sizes)
    with torch.device("meta"):
        method = Method(Config(early_layer=9, head_depth=2), given, tokenizer(given, 1024))
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()
    }
    assert count["encoder"] + method.mask_token.numel() == 5_351_532
    assert count["head"] == 197_632
    assert count["aggregation"] == 890_112


def test_at_the_start_each_loss_is_the_logarithm_of_the_codebook_size():
    torch.manual_seed(0)
    method = Method(SMALL, spec(embed_dim=32), tokenizer(codes=512))
    out = method(batch(), tiny.progress(6))
    for name in ("mim_loss", "aggregation_loss"):
        assert out[name].item() == pytest.approx(math.log(512), abs=0.05)


def test_initialisation():
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, shared_head=False, init="published")
    method = Method(config, spec(embed_dim=64), tokenizer())
    encoder = method.encoder
    assert encoder.pos_embed is None
    assert (encoder.rel_pos_bias.relative_position_bias_table == 0).all()
    for number, block in enumerate(encoder.blocks, start=1):
        scale = math.sqrt(2 * number)
        assert 0.95 * 0.02 < block.attn.proj.weight.abs().max() * scale <= 0.02 + 1e-6
        assert 0.95 * 0.02 < block.mlp.fc2.weight.abs().max() * scale <= 0.02 + 1e-6
        assert (
            0.95 * 0.02 < block.attn.qkv.weight.abs().max() <= 0.02
        )  # cut at one standard deviation
        assert (block.gamma_1 == 0.1).all()
        assert (block.gamma_2 == 0.1).all()
        for bias in (
            block.attn.q_bias,
            block.attn.v_bias,
            block.attn.proj.bias,
            block.mlp.fc1.bias,
            block.mlp.fc2.bias,
            block.norm1.bias,
        ):
            assert bias.abs().max() == 0
        assert "k_bias" not in dict(block.attn.named_parameters())
    for weight in (
        encoder.patch_embed.proj.weight,
        encoder.cls_token,
        method.mask_token,
        method.head.weight,
        method.aggregation_head.weight,
    ):
        assert 0.015 < weight.abs().max() <= 0.02
    for layer in (encoder.patch_embed.proj, method.head, method.aggregation_head):
        assert layer.bias.abs().max() == 0
    # aggregation: torch's default bound 1/sqrt(fan in) = 1/8 for 64, outputs over sqrt(2 * (2 +
    # number))
    for number, block in enumerate(method.aggregation, start=3):
        assert 0.95 / 8 < block.attn.qkv.weight.abs().max() <= 1 / 8
        assert 0.95 / 8 < block.attn.proj.weight.abs().max() * math.sqrt(2 * number) <= 1 / 8 + 1e-6
        assert block.mlp.fc2.weight.abs().max() * math.sqrt(2 * number) <= 1 / 16 + 1e-6
        assert block.norm1.eps == 1e-6


def test_without_aggregation_there_is_one_loss():
    method = build(dataclasses.replace(SMALL, head_depth=0, early_layer=3))
    assert set(method(batch(), tiny.progress(6))) == {"loss", "mim_loss", "mim_accuracy"}
    assert len(method.aggregation) == 0


def test_separate_heads_are_used():
    method = build(dataclasses.replace(SMALL, shared_head=False))
    out = method(batch(), tiny.progress(6))
    shared = [method.head.weight, method.encoder.norm.weight]
    own = [method.aggregation_head.weight, method.aggregation_norm.weight]
    for loss, unused in (("mim_loss", own), ("aggregation_loss", shared)):
        assert torch.autograd.grad(out[loss], unused, retain_graph=True, allow_unused=True) == (
            None,
            None,
        )


def test_drop_path_of_the_aggregation_continues_the_line():
    """Entries l .. l+1 of a line of length max(depth, l+2)."""
    method = Method(dataclasses.replace(SMALL, drop_path=0.3), SPEC, tokenizer())
    blocks = [*method.encoder.blocks, *method.aggregation]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3, 0.2, 0.3])


def test_weight_decay_spares_the_class_token_only():
    """As officially; by default the table of relative positions, too."""
    method = build(dataclasses.replace(SMALL, rel_pos_decay=True))
    assert method.no_weight_decay() == {"encoder.cls_token"}
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    assert build().no_weight_decay() == {"encoder.cls_token", table}


def test_early_layer_by_default_is_at_three_quarters():
    assert [Config().early(depth) for depth in (12, 6, 4, 2)] == [9, 4, 3, 1]
    assert Config(early_layer=5).early(12) == 5


def test_view_is_the_papers():
    view = views(Config(), SPEC)["view"]
    assert tuple(view.jitter) == (0.4, 0.4, 0.4, 0.0)
    assert (tuple(view.scale), view.flip) == ((0.2, 1.0), 0.5)


def test_pictures():
    method = build().eval()
    sheet = method.pictures(batch(10))["codes"]
    assert sheet.dtype == np.uint8
    assert sheet.shape == (8 * 100 - 4, 4 * 100 - 4, 3)
    target = sheet[:96, 300:396]
    cells = target.reshape(4, 24, 4, 24, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # one flat colour per patch
    codes = codes_of(batch(10)["view"])[0].view(4, 4)
    colours = {
        code: {tuple(cells[y, 0, x, 0]) for y, x in (codes == code).nonzero()}
        for code in codes.unique()
    }
    assert all(len(colour) == 1 for colour in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


def test_a_target_on_another_grid_is_refused(monkeypatch):
    given = tokenizer()
    coarse = {"ids": torch.zeros(6, 4, dtype=torch.int64)}
    monkeypatch.setattr(given.open, "look", lambda *how: coarse)
    with pytest.raises(ValueError, match="target: found ids .* expected 6 rows of 16 patches"):
        Method(SMALL, SPEC, given)(batch(), tiny.progress(6))


def test_the_published_recipe():
    """lr 1.5e-3 of batches of 2048, 10 of 300 epochs of warm-up, gradients clipped at 3."""
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=625)
    assert (recipe.epochs, recipe.clip, recipe.lr) == (300, 3.0, pytest.approx(1.5e-3))
    assert recipe.warmup == pytest.approx(10 * 625, rel=2e-3)
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(1e-5, rel=1e-3)
    assert (config.betas, config.weight_decay, config.layer_scale) == ((0.9, 0.98), 0.05, 0.1)
    assert (config.crop_min, config.jitter, config.early(12)) == (0.2, 0.4, 9)
    given = tiny.spec(224, **BASE)
    config.check(224, given.model)
    with torch.device("meta"):
        assert Method(config, given, tokenizer(given)).count == 75


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"min_block": 0}, "min_block"),
        ({"head_depth": -1}, "head_depth"),
        ({"early_layer": 0}, "early_layer"),
        ({"crop_min": 1.5}, "crop_min"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Config(**values)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"early_layer": 6}, "early_layer"),
        ({"early_layer": 7}, "early_layer"),
        ({"mask_ratio": 0.001}, "mask_ratio"),
        ({"min_block": 26}, "min_block"),
    ],
)
def test_config_must_fit_the_model(values, key):
    model = tiny.model(depth=6)
    Config().check(32, model)
    Config(early_layer=6, head_depth=0).check(32, model)
    with pytest.raises(ValueError, match=f"^{key}"):
        Config(**values).check(32, model)
