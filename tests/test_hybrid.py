"""ConvViT against a dense float64 version of the official code, and the proof that hidden pixels do
not leak.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from stages.kit.nets import encoders, hybrid, masks
from stages.kit.nets.positions import sincos_2d
from stages.kit.train import optim
from tests import tiny
from tests.conftest import tiny_content
from workflow import plugins
from workflow.params import ParamsError, check

ARGS = {"conv_dims": [8, 12], "conv_depths": [1, 2], "conv_mlp_ratio": 2.0}


def spec(size=32, args=None, **changes):
    return tiny.spec(size, "convvit", args={**ARGS, **(args or {})}, **changes)


def build(**changes):
    """An encoder and its fusion, every weight random: biases and norms at 0 and 1 would hide
    mistakes.
    """
    torch.manual_seed(0)
    encoder = encoders.create(spec(**changes), "sincos").eval()
    fusion = hybrid.Fusion(encoder).eval()
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *fusion.parameters()]:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder, fusion


def pictures(count=2, size=32, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def drawn(rows, patches=16, keep=6, seed=2):
    """Visible patches of each row, in random order, and the mask that they leave (1 = hidden)."""
    order = torch.rand(rows, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :keep], torch.ones(rows, patches).scatter(1, order[:, :keep], 0.0)


# --- an independent version: maps (B,C,H,W), strided convolutions, a visibility map --------------


def convolution(x, linear, kernel):
    """The convolution of stride = kernel that `linear` is on patches flattened by row, column,
    channel.
    """
    weight = linear.weight.view(len(linear.weight), kernel, kernel, -1).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, linear.bias, stride=kernel)


def norm(x, layer):
    assert layer.eps == 1e-5
    return F.layer_norm(
        x.movedim(1, -1), x.shape[1:2], layer.weight, layer.bias, layer.eps
    ).movedim(-1, 1)


def block(x, layer, seen):
    near = convolution(norm(x, layer.norm1), layer.conv1, 1) * seen
    near = F.conv2d(
        near, layer.depthwise.weight, layer.depthwise.bias, padding=2, groups=x.shape[1]
    )
    x = x + convolution(near, layer.conv2, 1)
    return x + convolution(F.gelu(convolution(norm(x, layer.norm2), layer.fc1, 1)), layer.fc2, 1)


def embed(x, layer, kernel):
    return F.gelu(norm(convolution(x, layer.proj, kernel), layer.norm))


def official(encoder, fusion, images, ids, mask, patch):
    """Both views' tokens as the official code computes them."""
    stem, views, side = encoder.patch_embed, len(ids) // len(images), math.isqrt(mask.shape[1])
    seen = (1 - mask).view(len(mask), 1, side, side).to(images.dtype)
    x = embed(images, stem.embed1, patch // 4).repeat(views, 1, 1, 1)
    for layer in stem.stage1:
        x = block(x, layer, F.interpolate(seen, scale_factor=4))
    fused = convolution(x, fusion.first, 4)
    x = embed(x, stem.embed2, 2)
    for layer in stem.stage2:
        x = block(x, layer, F.interpolate(seen, scale_factor=2))
    fused = fused + convolution(x, fusion.second, 2)
    tokens = stem.proj(embed(x, stem.embed3, 2).flatten(2).mT) + encoder.pos_embed
    tokens = encoder.blocks(masks.take(tokens, ids))
    return encoder.norm(tokens + masks.take(fused.flatten(2).mT, ids))


@pytest.mark.parametrize(("patch", "size"), [(4, 16), (8, 32), (16, 64)])
def test_equals_the_dense_network_with_visibility_maps(patch, size):
    encoder, fusion = (module.double() for module in build(size=size, patch_size=patch))
    images, (ids, mask) = pictures(2, size).double(), drawn(4)
    found = encoder.encode(images, ids, fusion)
    assert found.shape == (4, 6, 32)
    assert torch.allclose(found, official(encoder, fusion, images, ids, mask, patch), atol=1e-12)
    assert torch.equal(encoders.visible(encoder, images, ids, fusion=fusion)["patch"], found)
    for parameter in fusion.parameters():
        nn.init.zeros_(parameter)
    assert torch.allclose(
        encoder.encode(images, ids), official(encoder, fusion, images, ids, mask, patch), atol=1e-12
    )
    # without a mask it is the plain convolution network
    every = torch.arange(16).expand(2, -1)
    plain = official(encoder, fusion, images, every, torch.zeros(2, 16), patch)
    assert torch.allclose(encoder.forward_features(images), plain, atol=1e-12)
    assert torch.equal(encoder.encode(images), encoder.forward_features(images))
    assert torch.equal(encoder.encode(images, every), encoder.encode(images))


def test_gradients_are_those_of_the_dense_network():
    encoder, fusion = (module.double() for module in build())
    images, (ids, mask) = pictures().double(), drawn(4)
    weights = [
        parameter
        for parameter in [*encoder.parameters(), *fusion.parameters()]
        if parameter.requires_grad
    ]
    found, expected = (
        torch.autograd.grad(out.square().sum(), weights)
        for out in (
            encoder.encode(images, ids, fusion),
            official(encoder, fusion, images, ids, mask, 8),
        )
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)
        assert theirs.abs().sum() > 0


# --- hidden pixels --------------------------------------------------------------------------------


def hide(images, mask, value):
    """Images (B,3,32,32) with the pixels of hidden patches of 8 x 8 replaced."""
    cells = F.interpolate(mask.view(len(mask), 1, 4, 4), scale_factor=8) > 0.5
    return torch.where(cells, value, images)


@pytest.mark.parametrize("value", ["noise", math.inf, math.nan, 1e30])
def test_hidden_pixels_never_reach_the_tokens(value):
    encoder, fusion = build()
    images, (ids, mask) = pictures(4), drawn(4)
    other = pictures(4, seed=9) * 100 if value == "noise" else torch.tensor(value)
    changed = hide(images, mask, other)
    assert not torch.equal(changed, images)
    before, after = encoder.encode(images, ids, fusion), encoder.encode(changed, ids, fusion)
    assert torch.isfinite(before).all()
    assert torch.equal(before, after)
    # the test can fail: without the mask the convolutions carry those pixels to the visible patches
    leaky, leaked = (masks.take(encoder.patch_embed(x), ids) for x in (images, changed))
    assert not torch.equal(leaky, leaked)


def test_gradients_of_hidden_pixels_are_exactly_zero():
    encoder, fusion = build()
    (ids, mask), images = drawn(2), pictures().requires_grad_()
    tokens = encoder.encode(images, ids, fusion)
    (
        tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    ).sum().backward()
    size = hide(images.grad.abs(), 1 - mask, torch.tensor(0.0))
    assert size.max() == 0
    assert (
        hide(images.grad.abs(), mask, torch.tensor(1.0)).min() > 0
    )  # and every visible pixel counts
    one = pictures().requires_grad_()  # nor does one token see what its own row hides
    encoder.encode(one, ids, fusion)[0, 0].sum().backward()
    assert hide(one.grad.abs(), 1 - mask, torch.tensor(0.0)).max() == 0
    assert one.grad[1].abs().max() == 0


def test_a_patch_hidden_in_one_view_is_seen_in_the_other():
    """Disjoint views in one batch: changing what view 0 hides leaves view 0 as it is and changes
    view 1.
    """
    encoder, fusion = build()
    images, (first, mask) = pictures(), drawn(2, keep=8)
    second = masks.hidden_ids(mask.bool(), 8)
    ids = torch.cat([first, second])
    both = encoder.encode(images, ids, fusion)
    after = encoder.encode(hide(images, mask, torch.tensor(2.0)), ids, fusion)
    assert torch.equal(after[:2], both[:2])
    assert (after[2:] - both[2:]).abs().amax((1, 2)).min() > 0.1


def test_views_in_one_batch_are_the_views_one_by_one():
    encoder, fusion = build()
    images, (ids, _) = pictures(3), drawn(9, keep=5)
    together = encoder.encode(images, ids, fusion)
    for view in range(3):
        rows = slice(3 * view, 3 * view + 3)
        assert torch.allclose(together[rows], encoder.encode(images, ids[rows], fusion), atol=1e-5)
    with pytest.raises(ValueError, match="ids: found 8 rows, expected a multiple of the 3 images"):
        encoder.encode(images, ids[:8])


def test_tokens_come_in_the_order_of_the_ids():
    encoder, fusion = build()
    images, (ids, mask) = pictures(), drawn(2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(4))
    found, moved = (
        encoder.encode(images, ids, fusion),
        encoder.encode(images, ids[:, order], fusion),
    )
    assert torch.allclose(found[:, order], moved, atol=1e-5)
    ascending = masks.hidden_ids(~mask.bool(), 6)  # from a mask alone
    assert torch.allclose(
        encoder.encode(images, ascending, fusion), masks.take(found, ids.argsort(1)), atol=1e-5
    )


def test_the_way_of_a_vit_that_would_leak_is_refused():
    encoder, _ = build()
    _, mask = drawn(2)
    with pytest.raises(ValueError, match="found a convvit .* expected one with mask"):
        encoders.masked(encoder, pictures(), mask.bool(), torch.zeros(1, 1, 32))


def test_fusion_is_made_by_the_family():
    encoder, _ = build()
    assert isinstance(encoders.fusion(encoder), hybrid.Fusion)
    assert encoders.fusion(encoders.create(tiny.spec())) is None


# --- the published network ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder", "fusion", "fine_tuned"),
    [
        ("convvit_base_patch16_224", 87.87, 4.33, 88.8),
        ("convvit_large_patch16_224", 321.8, None, 323.0),
    ],
)
def test_parameter_counts(name, encoder, fusion, fine_tuned):
    """Of the official code: the encoder without its positions, fusion, and with a head for 1000
    classes.
    """

    def millions(module):
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    with torch.device("meta"):
        model, whole = timm.create_model(name, num_classes=0), timm.create_model(name)
        assert round(millions(model) - model.pos_embed.numel() / 1e6, 2 if fusion else 1) == encoder
        assert fusion is None or round(millions(hybrid.Fusion(model)), 2) == fusion
    assert round(millions(whole), 1) == fine_tuned
    assert whole.patch_embed.embed1.by == 4
    assert whole.norm.__class__ is nn.Identity
    assert {block.norm1.eps for block in whole.blocks} == {1e-6}


def test_grids_of_the_stages():
    for patch, size in ((4, 32), (8, 64), (16, 128)):
        stem = build(size=size, patch_size=patch)[0].patch_embed
        first, second, tokens = stem.stages(pictures(1, size))
        assert (first.shape, second.shape, tokens.shape) == (
            (1, 64, 4, 4, 8),
            (1, 64, 2, 2, 12),
            (1, 64, 32),
        )


def test_initial_weights():
    torch.manual_seed(0)
    encoder = encoders.create(spec(args={"conv_dims": [48, 96]}, embed_dim=64, depth=2), "sincos")
    stem = encoder.patch_embed
    assert torch.equal(encoder.pos_embed[0], sincos_2d(64, 4))
    assert not encoder.pos_embed.requires_grad

    def bound(weight, value):
        assert 0.9 * value < weight.abs().max() <= value

    bound(stem.embed1.proj.weight, (1 / 12) ** 0.5)  # torch's own: 1 / sqrt(fan in)
    bound(stem.stage1[0].fc1.weight, (1 / 48) ** 0.5)
    bound(stem.stage1[0].depthwise.weight, (1 / 25) ** 0.5)
    bound(stem.embed2.proj.weight, (1 / (4 * 48)) ** 0.5)
    for layer in (
        stem.embed3.proj,
        stem.proj,
        encoder.blocks[0].attn.qkv,
        encoder.blocks[1].mlp.fc2,
    ):
        bound(layer.weight, (6 / sum(layer.weight.shape)) ** 0.5)  # xavier
    assert stem.proj.bias.abs().max() == 0
    assert stem.embed3.proj.bias.abs().max() > 0


def test_drop_path_rises_over_all_blocks_and_both_branches_draw_alone():
    encoder = encoders.create(spec(depth=3), drop_path=0.5)
    stem = encoder.patch_embed
    for number, layer in enumerate([*stem.stage1, *stem.stage2, *encoder.blocks]):
        assert (
            layer.drop_path1.drop_prob == layer.drop_path2.drop_prob == pytest.approx(0.1 * number)
        )
    images, (ids, _) = pictures(), drawn(4)
    calls = []
    for layer in encoder.modules():
        if isinstance(layer, DropPath):
            layer.register_forward_hook(lambda module, *_: calls.append(id(module)))
    encoder.train().encode(images, ids)
    assert len(calls) == len(set(calls)) == 2 * 6
    torch.manual_seed(0)
    assert not torch.equal(encoder.encode(images, ids), encoder.encode(images, ids))
    assert torch.equal(encoder.eval().encode(images, ids), encoder.encode(images, ids))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patch_size": 2}, "^patch_size: found 2, expected a multiple of 4"),
        ({"size": 36}, "^patch_size: found 8, .* expected a divisor of image_size 36"),
        ({"num_heads": 3}, "^embed_dim: found 32, expected a multiple of num_heads 3"),
        ({"args": {"class_token": True}}, "class_token"),
        ({"args": {"conv_dim": [8, 8]}}, "conv_dim"),
        ({"embed_dim": 34}, "multiple of 4"),
        ({"name": "convvit_tiny_patch8_63"}, "^model.name: .*convvit_tiny_patch8_64"),
        ({"name": "vit_tiny_patch16_224"}, "^model"),
    ],
)
def test_errors_name_the_key(changes, match):
    with pytest.raises(ValueError, match=match):
        encoders.create(spec(**changes), "sincos")


def test_params_know_it():
    model = {
        "name": "convvit_tiny_patch8_64",
        "args": {"conv_dims": [8, 12], "conv_depths": [1, 1]},
    }
    only = {"runs": {"mae": {"method": "mae"}, "random": {"method": "random"}}, "seeds": [0]}
    content = tiny_content(model=model) | {
        "targets": {},
        "methods": {"mae": {}, "random": {}},
        "grid": only,
    }
    assert check(content).models["main"].kind == "convvit"
    for change, message in (
        ({"name": "convvit_tiny_patch8_63"}, "did you mean 'convvit_tiny_patch8_64'"),
        ({"patch_size": 2}, "model.patch_size: found 2, expected a multiple of 4"),
        ({"depth": [1, 1]}, "model.depth"),
    ):
        with pytest.raises(ParamsError, match=message):
            check(content | {"model": content["model"] | change})
    with pytest.raises(
        ParamsError, match="beitv2 needs an encoder that can 'cls', 'mask' and 'taps'"
    ):
        check(tiny_content(model=model))


def test_another_size_of_image_is_refused():
    with pytest.raises(ValueError, match=r"images: found \(24, 32\) pixels, expected \(32, 32\)"):
        build()[0](torch.zeros(1, 3, 24, 32))


# --- methods (tests/test_methods.py sweeps those that take it) -----------------------------------

CAN = tiny.module("convvit", "encoder").CAN
DROPPING = [n for n in plugins.names("method") if "drop" in tiny.module(n).NEEDS <= CAN]
DROPPING += ["dbot"]  # asks for a class token, and does without one


def test_methods_are_found():
    assert {"mae", "dmjd", "dbot", "cmae", "semmae"} <= set(DROPPING)


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("low", [False, True])
def test_methods_encode_without_a_leak(name, low, monkeypatch):
    """What a step gives to the encoder, and what comes out when the hidden pixels are others."""
    calls, visible = [], encoders.visible
    monkeypatch.setattr(
        encoders, "visible", lambda *given, **kw: calls.append((given, kw)) or visible(*given, **kw)
    )
    method = tiny.method(name, spec()).eval()
    batch = tiny.batch(tiny.module(name), method.spec)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        method(batch, tiny.progress())
        ((encoder, images, ids), kw) = calls[0]
        assert encoder is method.encoder
        assert kw.get("fusion") is getattr(method, "fusion", None)
        for row in range(len(ids)):
            image, seen = images[row % len(images)][None], ids[row][None]
            hidden = torch.ones(1, 16).scatter(1, seen, 0.0)
            found, same, other = (
                visible(encoder, x, seen, **kw)["patch"]
                for x in (
                    image,
                    hide(image, hidden, pictures(1, seed=8)),
                    hide(image, 1 - hidden, pictures(1, seed=8)),
                )
            )
            assert torch.equal(found, same)
            assert not torch.equal(found, other)


# --- export, fine-tuning --------------------------------------------------------------------------


def test_export_is_bit_equal(tmp_path):
    encoder, _ = build()
    for folder in ("a", "b"):
        encoders.save(encoder, tmp_path / folder, spec())
    loaded = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    images, (ids, _) = pictures(), drawn(4)
    assert torch.equal(loaded.forward_features(images), encoder.forward_features(images))
    assert torch.equal(loaded.encode(images, ids), encoder.encode(images, ids))
    assert tuple(loaded.pretrained_cfg["mean"]) == spec().mean
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    features = encoders.features(encoders.load(tmp_path / "a").eval(), images)
    assert torch.equal(features["patch"], encoder.forward_features(images))
    assert torch.equal(features["cls"], features["patch"].mean(1))
    assert torch.equal(loaded(images), features["cls"])


def test_without_the_project_a_copy_of_the_file_is_enough(tmp_path):
    encoder, _ = build()
    encoders.save(encoder, tmp_path / "encoder", spec())
    shutil.copy(hybrid.__file__, tmp_path / "hybrid.py")
    script = (
        "import hybrid, timm, torch; torch.set_num_threads(1); model = "
        "timm.create_model('local-dir:encoder', pretrained=True).eval(); "
        "torch.save(model.forward_features(torch.load('images')), 'features')"
    )
    torch.save(pictures(), tmp_path / "images")
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert torch.equal(torch.load(tmp_path / "features"), encoder.forward_features(pictures()))


def test_classifier(tmp_path):
    """Mean of the tokens -> new norm -> head; the pretrained norm and the fusion are gone."""
    encoder, _ = build()
    encoders.save(encoder, tmp_path, spec())
    model, images = encoders.classifier(tmp_path, 7, drop_path=0.4).eval(), pictures()
    state, new = encoder.state_dict(), model.state_dict()
    assert set(new) - set(state) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(state) - set(new) == {"norm.weight", "norm.bias"}
    assert all(torch.equal(state[key], new[key]) for key in set(state) & set(new))
    assert all(parameter.requires_grad for parameter in model.parameters())
    tokens = encoder.encode(images, norm=False)
    pooled = F.layer_norm(tokens.mean(1), (32,), eps=1e-6)
    assert torch.allclose(model(images), pooled @ model.head.weight.T, atol=1e-7)
    rates = [
        layer.drop_path1.drop_prob
        for layer in [*model.patch_embed.stage1, *model.patch_embed.stage2, *model.blocks]
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert encoders.classifier(tmp_path, 7, img_size=48)(pictures(2, 48)).shape == (2, 7)
    with pytest.raises(ValueError, match="no class token"):
        encoders.classifier(tmp_path, 7, pool="token")


def test_layer_decay_counts_the_stem_as_the_embedding(tmp_path):
    """Official layers: patch embeddings, stages 1 and 2, positions 0; transformer block i i + 1;
    the rest last.
    """
    encoders.save(build()[0], tmp_path, spec())
    model = encoders.classifier(tmp_path, 7)
    name = {id(parameter): key for key, parameter in model.named_parameters()}
    layers = {}
    for group in optim.layer_decay_groups(model, encoders.depths(model), 0.5, 0.05, set()):
        for parameter in group["params"]:
            key = name[id(parameter)]
            layers[key] = 3 + round(math.log2(group["lr_scale"]))
            assert (group["weight_decay"] == 0) == (parameter.ndim <= 1 or key == "pos_embed"), key
    assert set(layers) == set(name.values())
    for key, layer in layers.items():
        expected = 0 if key.startswith("patch_embed.") or key == "pos_embed" else 3
        expected = int(key.split(".")[1]) + 1 if key.startswith("blocks.") else expected
        assert layer == expected, key
    assert layers["patch_embed.stage2.1.depthwise.weight"] == 0
