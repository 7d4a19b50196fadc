"""SimMIM: what the paper and the official code say, of a ViT and of a Swin."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_end_to_end import run_all

from stages.kit.nets import encoders
from stages.kit.nets.masks import unit_masks
from stages.kit.train import optim
from stages.kit.train.recipe import Recipe
from stages.methods.simmim import PUBLISHED, Config, Method, local_statistics
from tests import tiny
from tests.conftest import tiny_content, write_params
from workflow.checks import unit_count

SWIN = {"patch_size": 2, "embed_dim": 8, "depth": (2, 2), "num_heads": (1, 2), "window_size": 4}
MODELS = {"vit": {"embed_dim": 16}, "swin": SWIN}
SWIN_B = {"patch_size": 4, "embed_dim": 128, "depth": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
SWIN_B |= {"window_size": 6, "mlp_ratio": 4.0}
VIT_B = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


def spec(kind="vit", size=16, **changes):
    return tiny.spec(size, kind, **{**MODELS[kind], **changes})


def build(kind="vit", size=16, changes=None, **config):
    """A method in which nothing is zero that could hide a mistake."""
    torch.manual_seed(0)
    method = Method(Config(**config), spec(kind, size, **(changes or {}))).eval()
    for name, parameter in method.named_parameters():
        if "relative_position_bias_table" in name or name == "mask_token":
            torch.nn.init.normal_(parameter)
    return method


def pictures(rows=3, size=16):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise(rows, units):
    return torch.rand(rows, units, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=["vit", "swin"])
def method(request):
    return build(request.param)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kind", "patch", "units", "count", "model"),
    [
        (
            192,
            "swin",
            4,
            36,
            22,
            {"depth": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 6},
        ),
        (224, "vit", 16, 49, 30, {"depth": 1}),
        (32, "vit", 4, 16, 10, {"depth": 1}),
    ],
)
def test_exactly_so_many_units_are_hidden_and_each_is_of_one_piece(
    size, kind, patch, units, count, model
):
    method = build(kind, size, model | {"patch_size": patch}, mask_unit=None if size == 32 else 32)
    assert (method.units**2, method.count) == (units, count)
    mask = method.mask(noise(50, units)).numpy()
    side, cell = size // patch, {192: 8, 224: 2, 32: 2}[size]
    assert mask.shape == (50, side * side)
    seen = np.zeros(units)
    for row in mask.reshape(50, side, side):
        blocks = (
            row.reshape(side // cell, cell, side // cell, cell)
            .swapaxes(1, 2)
            .reshape(units, cell * cell)
        )
        assert set(blocks.sum(1).tolist()) == {0, cell * cell}
        assert blocks[:, 0].sum() == count
        seen += blocks[:, 0]
    assert (
        seen.min() > 0.3 * 50 and seen.max() < 0.9 * 50
    )  # about 0.6 everywhere, standard deviation 0.07


def test_a_unit_is_hidden_where_its_number_is_among_the_smallest():
    mask = unit_masks(torch.tensor([[0.9, 0.1, 0.5, 0.2]]), 2, 2)
    assert mask.view(4, 4).int().tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]


def test_counts_are_rounded_up_in_exact_arithmetic():
    assert [unit_count(n, 0.6) for n in (36, 49, 16, 25, 5)] == [22, 30, 10, 15, 3]
    assert unit_count(100, 0.07) == 7 != math.ceil(100 * 0.07)  # in floats 7.000000000000001
    with pytest.raises(ValueError, match="mask_ratio"):
        unit_count(4, 0.8)


# --- what the encoder sees ------------------------------------------------------------------------


@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_encoder_and_visible_ones_do(method):
    images, mask = pictures(), method.mask(noise(3, 16))
    hidden = method.pixels(mask)
    before = method.encode(images, mask)
    other = torch.randn_like(images) * 5
    assert torch.equal(method.encode(torch.where(hidden > 0, other, images), mask), before)
    assert not torch.allclose(method.encode(torch.where(hidden > 0, images, other), mask), before)
    method.mask_token.neg_()
    assert not torch.allclose(method.encode(images, mask), before)


@torch.no_grad()
def test_without_a_mask_the_encoder_is_timms(method):
    images = pictures()
    nothing = torch.zeros(3, (16 // method.patch) ** 2, dtype=torch.bool)
    found = method.encode(images, nothing).flatten(2).transpose(1, 2)
    assert torch.allclose(found, encoders.features(method.encoder, images)["patch"], atol=1e-6)


def test_vit_is_beits():
    encoder = Method(Config(), spec()).encoder
    assert encoder.pos_embed is None and encoder.norm.eps == 1e-6
    assert all(block.gamma_1.allclose(torch.tensor(0.1)) for block in encoder.blocks)
    for block in encoder.blocks:
        attention = block.attn
        assert {"q_bias", "v_bias"} <= dict(attention.named_parameters()).keys()
        assert "k_bias" not in dict(attention.named_parameters())
        assert attention.k_bias.abs().max() == 0
    module = encoder.rel_pos_bias
    table, index = module.relative_position_bias_table, module.relative_position_index
    assert table.shape == (7 * 7 + 3, 2) and table.abs().max() == 0
    assert index[0, 1:].unique().tolist() == [49]  # the class token's query
    assert index[1:, 0].unique().tolist() == [50]  # its key
    assert index[0, 0] == 51
    assert index[1:, 1:].max() == 48


@torch.no_grad()
def test_tables_of_zeros_change_nothing():
    """An independent attention without any positions gives the same features as the new encoder."""
    method = Method(Config(), spec()).eval()
    encoder, images = method.encoder, pictures()
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), encoder.patch_embed(images)], dim=1)
    for block in encoder.blocks:
        attn, y = block.attn, block.norm1(x)
        weight = attn.qkv.weight.view(3, 2, 8, 16)
        q, k, v = (torch.einsum("bnd,hed->bhne", y, part) for part in weight)
        y = F.scaled_dot_product_attention(
            q + attn.q_bias.view(2, 1, 8), k, v + attn.v_bias.view(2, 1, 8)
        )
        x = x + block.gamma_1 * attn.proj(y.transpose(1, 2).flatten(2))
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    found = method.encode(images, nothing).flatten(2).transpose(1, 2)
    assert torch.allclose(found, encoder.norm(x)[:, 1:], atol=1e-5)


def test_initial_weights():
    torch.manual_seed(0)
    vit = Method(Config(init="published"), spec(embed_dim=64)).encoder
    for number, block in enumerate(vit.blocks, start=1):
        for weight, scale in (
            (block.attn.qkv.weight, 1),
            (block.attn.proj.weight, math.sqrt(2 * number)),
            (block.mlp.fc1.weight, 1),
            (block.mlp.fc2.weight, math.sqrt(2 * number)),
        ):
            assert weight.abs().max() <= 0.02 / scale + 1e-7
            assert float(weight.detach().std()) * scale == pytest.approx(
                0.0108, rel=0.05
            )  # of a normal cut at one deviation
        assert block.mlp.fc1.bias.abs().max() == 0
    assert vit.patch_embed.proj.weight.abs().max() <= 0.02
    swin = Method(Config(), spec("swin", embed_dim=32)).encoder
    for stage in swin.layers:
        for block in stage.blocks:
            assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert block.mlp.fc1.weight.abs().max() > 0.04
            assert float(block.attn.relative_position_bias_table.detach().std()) == pytest.approx(
                0.02, rel=0.5
            )


# --- head and loss --------------------------------------------------------------------------------


@torch.no_grad()
def test_head_gives_pixels_in_the_order_of_pixel_shuffle(method):
    stride = method.spec.stride
    assert stride == 4
    method.head.weight.zero_()
    method.head.bias.copy_(torch.arange(3 * stride**2))
    out = method.decode(method.encode(pictures(), method.mask(noise(3, 16))))
    assert out.shape == (3, 3, 16, 16)
    for c, y, x in np.ndindex(3, 16, 16):
        assert (out[:, c, y, x] == c * stride**2 + y % stride * stride + x % stride).all()


@torch.no_grad()
def test_a_token_predicts_its_own_place(method):
    features = torch.zeros(1, method.head.in_channels, 4, 4)
    features[0, :, 1, 2] = 1
    method.head.weight.fill_(1)
    method.head.bias.zero_()
    out = method.decode(features)[0, 0]
    place = torch.zeros(16, 16, dtype=torch.bool)
    place[4:8, 8:12] = True
    assert torch.equal(out != 0, place)


def test_gradient_of_the_loss(method):
    images, mask = pictures(), method.mask(noise(3, 16))
    predicted = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    method.loss(predicted, images, mask).backward()
    hidden = (
        mask.view(3, 16 // method.patch, -1).numpy().repeat(method.patch, 1).repeat(method.patch, 2)
    )
    sign = np.sign(predicted.detach().numpy() - images.numpy()) * hidden[:, None]
    assert np.allclose(predicted.grad, sign / (3 * hidden.sum()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked_only", [True, False])
def test_loss_of_predicting_zero_is_the_mean_size_of_the_pixels(method, masked_only):
    method.config = Config(masked_only=masked_only)
    images, mask = pictures().double(), method.mask(noise(3, 16))
    hidden = (
        mask.view(3, 16 // method.patch, -1).numpy().repeat(method.patch, 1).repeat(method.patch, 2)
    )
    values = [
        abs(images[b, :, y, x].numpy()).mean()
        for b, y, x in np.ndindex(3, 16, 16)
        if hidden[b, y, x] or not masked_only
    ]
    found = method.loss(torch.zeros(3, 3, 16, 16, dtype=torch.float64), images, mask)
    assert float(found) == pytest.approx(np.mean(values), rel=1e-6)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_forward_is_mask_encode_decode_loss(kind):
    method = build(kind)
    progress = tiny.progress(3)
    pixels = pictures().sigmoid()
    images, mask = method.spec.normalise(pixels), method.mask(progress.uniform("mask", 16))
    expected = method.loss(method.decode(method.encode(images, mask)), images, mask)
    assert torch.equal(method({"view": pixels}, progress)["loss"], expected)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (method.spec.mean, method.spec.std))
    assert torch.allclose(
        images, (pixels - mean) / std, atol=1e-5
    )  # the target is normalised as the input is


# --- the target normalised by a window ------------------------------------------------------------


@pytest.mark.parametrize("window", [5, 47])
def test_window_statistics_against_brute_force(window):
    """Interior windows, and at the borders those pixels of the window that lie in the image."""
    images = pictures(2, 12).double() * 3 + 1
    mean, deviation = local_statistics(images, window)
    reach = window // 2
    for b, c, y, x in np.ndindex(2, 3, 12, 12):
        part = images[
            b, c, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1
        ].numpy()
        assert float(mean[b, c, y, x]) == pytest.approx(part.mean(), abs=1e-10)
        assert float(deviation[b, c, y, x]) == pytest.approx(
            math.sqrt(part.var(ddof=1) + 1e-6), rel=1e-9
        )


def test_a_constant_image_has_a_target_of_zero():
    method = build(local_norm=47)
    images = torch.tensor([0.7, -2.0, 0.1]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    target, mean, deviation = method.target(images.double())
    assert target.abs().max() < 1e-9
    assert method.target(images)[0].abs().max() < 1e-2  # in float32, over a deviation of 0.001
    assert torch.allclose(deviation, torch.full_like(deviation, 1e-3), rtol=1e-6)
    assert torch.allclose(mean, images.double())


def test_the_loss_takes_the_normalised_target():
    method, images = build(local_norm=5), pictures()
    mask = method.mask(noise(3, 16))
    target = method.target(images)[0]
    assert float(method.loss(target, images, mask)) == 0
    assert float(method.loss(images, images, mask)) > 0.1


# --- sizes, weight decay, fine-tuning -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "model", "encoder", "whole"),
    [
        ("swin", 192, SWIN_B, 86.73, 89.87),
        ("vit", 224, VIT_B, 85.67, 86.26),
    ],
)
def test_parameters_of_the_published_models(kind, size, model, encoder, whole):
    def millions(module):
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2)

    with torch.device("meta"):
        method = Method(Config(mask_unit=32), spec(kind, size, **model))
    assert millions(method.encoder) == encoder
    assert millions(method) == whole


def test_layers_of_swin_b():
    """24 blocks, 26 rates, the last 1; the layer of every tensor against the official list, written
    out.
    """
    with torch.device("meta"):
        encoder = encoders.create(spec("swin", 192, **SWIN_B))
        encoder.reset_classifier(10)
    depths = encoders.depths(encoder)
    assert depths == (2, 2, 18, 2)
    groups = optim.layer_decay_groups(encoder, depths, 0.8, 0.05)
    scales = sorted({group["lr_scale"] for group in groups})
    assert np.allclose(scales, 0.8 ** np.arange(25, -1, -1))
    of = {id(p): group for group in groups for p in group["params"]}
    blocks = [
        f"layers.{stage}.blocks.{block}."
        for stage, depth in enumerate(depths)
        for block in range(depth)
    ]
    merging = {"layers.1.downsample.": 2, "layers.2.downsample.": 4, "layers.3.downsample.": 22}
    layers = {"patch_embed.": 0, "norm.": 25, "head.": 25} | merging
    layers |= {prefix: number for number, prefix in enumerate(blocks, start=1)}
    for name, parameter in encoder.named_parameters():
        (layer,) = (layer for prefix, layer in layers.items() if name.startswith(prefix))
        assert of[id(parameter)]["lr_scale"] == pytest.approx(0.8 ** (25 - layer)), name
        spared = parameter.ndim == 1 or "relative_position_bias_table" in name
        assert of[id(parameter)]["weight_decay"] == (0 if spared else 0.05), name


@pytest.mark.parametrize(
    ("kind", "expected"), [("vit", {"encoder.cls_token"}), ("swin", {"mask_token"})]
)
def test_weight_decay_in_pretraining_is_that_of_the_official_run(kind, expected):
    method = build(kind, rel_pos_decay=True)
    plain = [group for group in optim.groups(method, 0.05) if group["weight_decay"] == 0]
    free = {id(parameter) for group in plain for parameter in group["params"]}
    names = {name for name, parameter in method.named_parameters() if id(parameter) in free}
    assert names - expected == {
        name for name, parameter in method.named_parameters() if parameter.ndim == 1
    }
    assert expected <= names


@torch.no_grad()
def test_without_the_final_norm(method):
    """The head then sees the last block's output; the encoder's norm stays untrained at 1 and 0."""
    bare = build(method.spec.kind, final_norm=False)
    images, mask = pictures(), method.mask(noise(3, 16))
    tokens = bare.encode(images, mask).flatten(2).transpose(1, 2)
    normed = method.encode(images, mask).flatten(2).transpose(1, 2)
    assert torch.allclose(method.encoder.norm(tokens), normed, atol=1e-6)
    assert not torch.allclose(tokens, normed)
    frozen = {name for name, parameter in bare.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.norm.weight", "encoder.norm.bias"}


# --- pictures and settings ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"local_norm": 5}])
def test_pictures_keep_what_is_visible(method, config):
    method.config = Config(**config)
    pixels = pictures(2).sigmoid()
    sheet = method.pictures({"view": pixels})["reconstruction"]
    factor, gap = 96 // 16, 4
    assert sheet.shape == (2 * 100 - gap, 3 * 100 - gap, 3)
    shown = [sheet[:96, i * 100 : i * 100 + 96][::factor, ::factor] for i in range(3)]
    truth = (pixels[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert (shown[0] == truth).all()
    grey = (shown[1] != truth).any(-1)
    assert (shown[1][grey] == 128).all()
    assert grey.mean() == pytest.approx(10 / 16, abs=0.02)
    changed = (shown[2] != truth).any(-1)
    assert changed[grey].mean() > 0.9 and not changed[~grey].any()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_unit": 0}, "mask_unit"),
        ({"local_norm": 4}, "local_norm"),
        ({"local_norm": 1}, "local_norm"),
        ({"lr_drops": (2.0,)}, "lr_drops"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"crop_min": 0.0}, "crop_min"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Config(**values)


@pytest.mark.parametrize(
    ("config", "size", "patch", "key"),
    [
        ({"mask_unit": 32}, 48, 16, "mask_unit"),
        ({"mask_unit": 6}, 24, 4, "mask_unit"),
        ({}, 36, 6, "mask_unit"),
        ({"mask_unit": 16}, 16, 4, "mask_ratio"),
        ({"mask_ratio": 0.95}, 16, 4, "mask_ratio"),
    ],
)
def test_units_that_do_not_fit(config, size, patch, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        Config(**config).check(size, tiny.model(patch_size=patch))


def test_units_that_fit():
    Config(mask_unit=32).check(192, tiny.model("swin", **SWIN_B))
    Config(mask_unit=32).check(224, tiny.model(**VIT_B))
    assert [Config().unit(size) for size in (32, 64)] == [8, 16]


LONG = {"epochs": 800, "lr": 1e-4, "min_lr": 1e-5, "warmup": 0.0125, "lr_drops": [0.875]}


@pytest.mark.parametrize(("changes", "rate"), [({}, 8e-4), (LONG, 4e-4)])
def test_the_published_recipe(changes, rate):
    """Swin-B at 192 px: 100 epochs, and 800 with a rate that falls to a tenth at 700."""
    given = {**PUBLISHED, **changes}
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=625)
    assert (recipe.epochs, recipe.warmup, recipe.clip) == (given["epochs"], 10 * 625, 5.0)
    assert recipe.lr == pytest.approx(rate)
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(4e-5, rel=1e-3)
    assert (config.betas, config.weight_decay, config.crop_min) == ((0.9, 0.999), 0.05, 0.67)
    config.check(192, tiny.model("swin", **SWIN_B))
    with torch.device("meta"):
        assert Method(config, spec("swin", 192, **SWIN_B)).count == 22


# --- Swin wherever a ViT may stand: tests/test_methods.py sweeps it, here it runs as a whole ------


def test_a_swin_from_params_to_report(tmp_path):
    content = tiny_content(methods={"simmim": {}}, tasks={"finetune": {"layer_decay": 0.8}})
    model = {key: list(v) if isinstance(v, tuple) else v for key, v in SWIN.items()}
    content |= {"model": {"kind": "swin", **model}, "targets": {}}
    content["grid"]["runs"] = {"simmim": {"method": "simmim"}}
    results = tmp_path / "results"
    manifests = run_all(write_params(tmp_path, content), results)
    assert len(manifests) == 1 + 1 + 3 + 1
    assert (results / "pretrain/simmim-s0/pictures/reconstruction.png").is_file()
    for task in ("knn", "linear", "finetune"):
        assert (
            0
            <= json.loads((results / f"transfer/simmim-s0/{task}/metrics.json").read_text())["top1"]
            <= 1
        )
    rows = [
        json.loads(row)
        for row in (results / "pretrain/simmim-s0/history.jsonl").read_text().splitlines()
    ]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert "simmim" in (results / "report/index.html").read_text()
