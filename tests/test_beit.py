"""BEiT's student: the facts of the paper (arXiv 2106.08254) and its official code."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.masks import block_masks
from stages.kit.nets.pictures import paint
from stages.kit.nets.target import Frozen
from stages.kit.parts.beit import hidden, mean_over_hidden
from stages.kit.train.recipe import Recipe
from stages.methods.beit import PUBLISHED, Config, Method, views
from stages.targets import dvae, kmeans, pixels, vqkd
from tests import tiny

SMALL = Config(min_block=2)
SIZES = {"embed_dim": 16, "depth": 3, "mlp_ratio": 4.0}
SPEC = tiny.spec(**SIZES)
BASE = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


def tokenizer(given=SPEC, codes=16):
    return tiny.target(given, "ids", codes=codes)


def batch(rows=6):
    return {"view": tiny.images(rows, seed=1)}


def build(config=SMALL, codes=16, **changes):
    torch.manual_seed(0)
    given = tiny.spec(**{**SIZES, **changes})
    method = Method(config, given, tokenizer(given, codes))
    # it starts at zero: make it matter
    nn.init.normal_(method.encoder.rel_pos_bias.relative_position_bias_table)
    return method


def mask_of(method, rows=6):
    return method.blocks(tiny.progress(rows).uniform)


# --- masks --------------------------------------------------------------------------------------


def test_masks_hide_at_most_the_count_and_most_in_the_middle():
    """2,000 masks of 14x14: as 5,000 of the official generator, mean 74.5, least 65."""

    def drawn(seed=0):
        return block_masks(tiny.progress(2000, seed=seed).uniform, (14, 14), 75, 16)

    masks = drawn()
    counts = masks.sum(1)
    assert counts.max() == 75
    assert 74 <= counts.float().mean() <= 75
    assert counts.min() >= 60
    assert 0.5 < (counts == 75).float().mean() < 0.85  # 68 % officially: they vary
    often = masks.float().mean(0).view(14, 14)
    assert often[6:8, 6:8].min() > 0.6
    assert max(often[0, 0], often[0, -1], often[-1, 0], often[-1, -1]) < 0.1
    assert torch.equal(masks, drawn())
    assert not torch.equal(masks, drawn(seed=1))


def test_the_methods_masks_are_the_published_ones():
    given = tiny.spec(224, patch_size=16, **SIZES)
    method = Method(Config(mask_ratio=0.3827, min_block=16), given, tokenizer(given))
    assert method.count == 75
    uniform = tiny.progress(20).uniform
    assert torch.equal(method.blocks(uniform), block_masks(uniform, (14, 14), 75, 16))


def test_rows_with_fewer_hidden_patches_are_filled_up_with_weight_zero():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    ids, weight = hidden(mask, 3)
    assert ids.tolist() == [[1, 3, 4], [0, 1, 2], [0, 1, 2]]
    assert weight.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    assert mean_over_hidden(values, weight) == 4.0
    assert mean_over_hidden(values[2:], weight[2:]) == 0.0


# --- loss ---------------------------------------------------------------------------------------


def uneven(rows=40):
    """A method, images and a mask with another number of hidden patches in some rows."""
    method = build(Config(mask_ratio=0.625, min_block=8)).eval()
    mask = mask_of(method, rows)
    counts = mask.sum(1)
    assert counts.max() == method.count == 10
    assert len(counts.unique()) > 1
    return method, tiny.images(rows, seed=1), mask


def test_the_loss_is_the_cross_entropy_of_the_masked_rows():
    """Official: rows of the whole batch are selected by the mask, never reshaped to the count."""
    method, images, mask = uneven()
    out = method({"view": images}, tiny.progress(40))
    codes = tokenizer()(images, "ids")["ids"]
    features = method.features(SPEC.normalise(images), mask)
    logits = method.head(features[mask]).double()  # (M,K)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = -p[torch.arange(len(p)), codes[mask]].log()
    assert out["mim_loss"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert out["loss"].item() == pytest.approx(expected.sum().item() / (40 * 10), rel=1e-5)
    right = (logits.argmax(1) == codes[mask]).float().mean()
    assert out["mim_accuracy"].item() == pytest.approx(right.item(), rel=1e-6)
    assert set(out) == {"loss", "mim_loss", "mim_accuracy"}


def test_logits_are_the_official_forward():
    """Written plainly: full sequences, multiplicative mask, the class token dropped at the end."""
    method = build().eval()
    encoder, images, mask = method.encoder, SPEC.normalise(batch()["view"]), mask_of(method)
    m = mask[..., None].float()
    x = encoder.patch_embed(images) * (1 - m) + method.mask_token * m
    x = torch.cat([encoder.cls_token.expand(6, -1, -1), x], 1)
    for block in encoder.blocks:
        x = block(x, encoder.rel_pos_bias())
    expected = method.head(encoder.norm(x))[:, 1:]
    everywhere = torch.arange(16).expand(6, -1)
    found = method.predict(images, mask, everywhere)
    assert torch.allclose(found, expected, atol=1e-5)
    ids, _ = hidden(mask, method.count)
    assert torch.allclose(
        method.predict(images, mask, ids),
        expected.gather(1, ids[..., None].expand(-1, -1, 16)),
        atol=1e-5,
    )


def test_hidden_pixels_change_labels_but_not_one_bit_of_the_logits():
    method = build().eval()
    images, mask = batch()["view"], mask_of(method)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(9))
    other, everywhere = paint(images, mask, noise), torch.arange(16).expand(6, -1)
    codes = [tokenizer()(x, "ids")["ids"] for x in (images, other)]
    assert not torch.equal(codes[0][mask], codes[1][mask])
    assert torch.equal(codes[0][~mask], codes[1][~mask])
    logits = [method.predict(SPEC.normalise(x), mask, everywhere) for x in (images, other)]
    assert torch.equal(*logits)


def test_visible_patches_have_no_loss():
    """Of the logits at the positions that fill the rows up, too."""
    method, images, mask = uneven()
    seen = {}

    def keep(module, args, out):
        out.retain_grad()
        seen["logits"] = out

    method.head.register_forward_hook(keep)
    method({"view": images}, tiny.progress(40))["loss"].backward()
    ids, weight = hidden(mask, 10)
    grad = seen["logits"].grad.abs().sum(-1)  # (B,n)
    assert (grad[weight == 0] == 0).all()
    assert (weight == 0).any()
    assert (grad[weight == 1] > 0).all()


def test_labels_of_visible_patches_do_not_matter():
    method, images, mask = uneven()
    look = method.tokenizer.open.look

    def other(*how):
        found = look(*how)
        return {"ids": torch.where(mask, found["ids"], (found["ids"] + 5) % 16)}

    first = method({"view": images}, tiny.progress(40))
    method.tokenizer.open.look = other
    second = method({"view": images}, tiny.progress(40))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_at_the_start_the_loss_is_the_logarithm_of_the_codebook_size():
    torch.manual_seed(0)
    given = tiny.spec(**{**SIZES, "embed_dim": 32})
    method = Method(SMALL, given, tokenizer(given, 8192))
    out = method(batch(), tiny.progress(6))
    assert out["mim_loss"].item() == pytest.approx(math.log(8192), abs=0.1)


def stepped(lr, codes=None, steps=1):
    """A method after steps of AdamW, its state before, and the losses."""
    method = build()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    if codes is not None:
        method.tokenizer.open.look = lambda *how: {"ids": codes}
    optimiser = torch.optim.AdamW(method.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        out = method(batch(), tiny.progress(6))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(out["mim_loss"].item())
    return method, before, losses


def test_a_rate_of_zero_changes_nothing():
    method, before, _ = stepped(lr=0.0, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    method, before, _ = stepped(lr=1e-3)
    assert not torch.equal(method.head.weight, before["head.weight"])


def test_equal_labels_are_learnt_in_a_few_steps():
    _, _, losses = stepped(0.03, torch.full((6, 16), 3), steps=40)
    assert losses[0] > 2
    assert losses[-1] < 0.05


def test_the_tokenizer_sees_the_students_view_and_never_learns():
    method = build()
    teacher, seen = method.tokenizer.open, []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method(batch(), tiny.progress(6))["loss"].backward()
    assert teacher.weight.grad is None
    assert not teacher.training
    assert torch.equal(seen[0], batch()["view"])  # the view itself, in [0, 1]
    assert not any("tokenizer" in name for name in method.state_dict())


@pytest.mark.parametrize("kind", ["dvae", "kmeans", "vqkd"])
def test_every_tokenizer_has_the_same_student(kind):
    """Grids of codes with one student: the labels are the tokenizer's, all else is equal."""
    torch.manual_seed(0)
    target = {
        "dvae": lambda: dvae.Target(dvae.Config(codes=16, hidden=8, code_dim=4), SPEC),
        "kmeans": lambda: kmeans.Target(
            kmeans.Config(codes=16, vectors=16),
            SPEC,
            Frozen(pixels.Target(pixels.Config(), SPEC)),
        ),
        "vqkd": lambda: vqkd.Target(vqkd.Config(codes=16, code_dim=4, encoder_depth=1), SPEC),
    }[kind]()
    torch.manual_seed(0)
    method, same = Method(SMALL, SPEC, Frozen(target)), build().state_dict()
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    state = method.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in state.items() if name != table)
    mask = mask_of(method)
    out = method(batch(), tiny.progress(6))
    logits = method.head(method.features(SPEC.normalise(batch()["view"]), mask))[mask]
    labels = target(batch()["view"], "ids")["ids"][mask]
    assert out["mim_loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    out["loss"].backward()
    assert all(p.grad is None for p in target.parameters())


# --- encoder ------------------------------------------------------------------------------------


def test_relative_positions_of_the_published_grid():
    """Index of a 14x14 grid: row of patch i to patch j is (yi-yj+13)*27 + (xi-xj+13)."""
    given = tiny.spec(224, patch_size=16, **SIZES)
    bias = Method(Config(), given, tokenizer(given)).encoder.rel_pos_bias
    index = bias.relative_position_index
    assert bias.relative_position_bias_table.shape[0] == 732
    assert (bias.relative_position_bias_table == 0).all()
    assert index.shape == (197, 197)
    assert (index.min(), index.max()) == (0, 731)
    assert (index[0, 1:] == 729).all() and (index[1:, 0] == 730).all()
    assert index[0, 0] == 731
    assert index[1, 1] == 364
    y, x = torch.arange(196) // 14, torch.arange(196) % 14
    expected = (y[:, None] - y + 13) * 27 + (x[:, None] - x + 13)
    assert torch.equal(index[1:, 1:], expected)


def test_published_parameter_counts():
    given = tiny.spec(224, **BASE)
    with torch.device("meta"):
        method = Method(Config(), given, tokenizer(given, 8192))
    names = dict(method.named_parameters())
    assert sum(p.numel() for p in names.values()) == 91_965_776
    assert not any("k_bias" in name or name.endswith("qkv.bias") for name in names)
    assert method.encoder.pos_embed is None
    assert method.encoder.norm.eps == 1e-6
    large = tiny.spec(224, **{**BASE, "embed_dim": 1024, "depth": 24, "num_heads": 16})
    with torch.device("meta"):
        method = Method(Config(layer_scale=1e-5), large, tokenizer(large, 8192))
    assert sum(p.numel() for p in method.parameters()) == 311_534_016


def test_residual_outputs_start_smaller_in_later_blocks():
    """Deviation 0.02, cut there, over sqrt(2 i): block 1 has three times that of block 9."""
    method = build(dataclasses.replace(SMALL, init="published"), embed_dim=64, depth=9)
    cut = 0.5396 * 0.02  # deviation of a normal of deviation 0.02 that is cut there
    deviations = []
    for number, block in enumerate(method.encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(cut / math.sqrt(2 * number), rel=0.05)
            assert weight.abs().max() <= 0.02 / math.sqrt(2 * number) + 1e-7
        deviations.append(block.mlp.fc2.weight.std().item())
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
    assert deviations[0] / deviations[8] == pytest.approx(3, rel=0.05)
    for weight in (method.mask_token, method.head.weight, method.encoder.cls_token):
        assert 0.015 < weight.abs().max() <= 0.02
    assert method.head.bias.abs().max() == 0


def test_weight_decay_spares_the_class_token_only():
    """As officially, mask token and relative positions are decayed; by default not the latter."""
    published = build(dataclasses.replace(SMALL, rel_pos_decay=True))
    assert published.no_weight_decay() == {"encoder.cls_token"}
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    assert build().no_weight_decay() == {"encoder.cls_token", table}
    assert build().rates() == {table: 20.0}


def test_the_exported_encoder_has_no_mask_token_or_head_and_a_table_in_each_block(tmp_path):
    """For fine-tuning the shared table is copied into each block, and the classifier starts near
    zero.
    """
    method = build()
    encoders.save(method.encoder.eval(), tmp_path, SPEC)
    network = encoders.classifier(tmp_path, 4)
    names = dict(network.named_parameters())
    assert not any("mask_token" in name or "lm_head" in name for name in names)
    shared = method.encoder.rel_pos_bias.relative_position_bias_table
    tables = [p for name, p in names.items() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 3 and len({id(each) for each in tables}) == 3
    assert all(torch.equal(each, shared) for each in tables)
    assert network(SPEC.normalise(tiny.images())).abs().max() < 1e-3


# --- pictures, settings -------------------------------------------------------------------------


def test_pictures_of_codes():
    method = build().eval()
    sheets = method.pictures(batch(10))
    assert set(sheets) == {"codes"}  # these codes cannot be decoded
    sheet = sheets["codes"]
    assert sheet.dtype == np.uint8
    assert sheet.shape == (8 * 100 - 4, 4 * 100 - 4, 3)
    truth = sheet[:96, 300:396].reshape(4, 24, 4, 24, 3)
    assert (truth == truth[:, :1, :, :1]).all()  # one flat colour per patch
    codes = tokenizer()(batch(10)["view"], "ids")["ids"][0].view(4, 4)
    colours = {
        code: {tuple(truth[y, 0, x, 0]) for y, x in (codes == code).nonzero()}
        for code in codes.unique()
    }
    assert all(len(colour) == 1 for colour in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


def test_pictures_of_what_the_tokenizer_makes_of_predicted_codes():
    """Last column: its picture of its own codes; the one before: hidden ones as predicted."""
    torch.manual_seed(0)
    target = Frozen(dvae.Target(dvae.Config(codes=16, hidden=8, code_dim=4), SPEC))
    method = Method(SMALL, SPEC, target).eval()
    images = batch(2)["view"]
    sheet = torch.from_numpy(method.pictures({"view": images})["decoded"]).permute(2, 0, 1) / 255
    own = target.open.decode(target(images, "ids")["ids"])[0]
    assert torch.allclose(sheet[:, :96, 300:396][:, ::6, ::6], own, atol=0.5 / 255 + 1e-6)
    assert not torch.equal(sheet[:, :96, 200:296], sheet[:, :96, 300:396])
    with torch.no_grad():  # a student that is always right
        method.tokenizer.open.look = lambda *how: {"ids": torch.full((2, 16), 3)}
        method.head.weight.zero_()
        method.head.bias.copy_(F.one_hot(torch.tensor(3), 16))
    sheet = method.pictures({"view": images})["decoded"]
    assert (sheet[:96, 200:296] == sheet[:96, 300:396]).all()


def test_view_is_the_papers():
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    settings = {key: v for key, v in settings.items() if key not in ("epochs", "batch_size")}
    view = views(Config(**settings), SPEC)["view"]
    assert tuple(view.jitter) == (0.4, 0.4, 0.4, 0.0)
    assert (tuple(view.scale), view.flip, tuple(view.ratio)) == ((0.08, 1.0), 0.5, (3 / 4, 4 / 3))


def test_the_published_recipe():
    """lr 1.5e-3 of batches of 2048, 10 of 800 epochs of warm-up, gradients clipped at 3."""
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=625)
    assert (recipe.epochs, recipe.clip, recipe.lr) == (800, 3.0, pytest.approx(1.5e-3))
    assert recipe.warmup == pytest.approx(10 * 625, rel=2e-3)
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(1e-5, rel=1e-3)
    assert (config.betas, config.weight_decay, config.drop_path) == ((0.9, 0.999), 0.05, 0.1)
    config.check(224, tiny.spec(224, **BASE).model)


@pytest.mark.parametrize(
    ("values", "key"), [({"mask_ratio": 0.001}, "mask_ratio"), ({"min_block": 26}, "min_block")]
)
def test_config_must_fit_the_model(values, key):
    model = tiny.model(depth=6)
    Config().check(32, model)
    with pytest.raises(ValueError, match=f"^{key}"):
        Config(**values).check(32, model)
