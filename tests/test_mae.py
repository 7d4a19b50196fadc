"""MAE: the facts of the paper (arXiv 2111.06377) and its official code, against independent
calculations.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.masks import random_masking
from stages.kit.nets.positions import sincos_2d
from stages.kit.parts.uniformity import uniformity
from stages.kit.train.recipe import Recipe
from stages.methods.mae import PUBLISHED, Config, Method, views
from tests import tiny

SMALL = Config(decoder_dim=16, decoder_depth=1, decoder_heads=2)
SPEC = tiny.spec(embed_dim=16)


def batch(rows=6, size=16):
    return {"view": torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def method():
    torch.manual_seed(0)
    return Method(SMALL, SPEC)


def masking(rows=6):
    """The step's ids_keep, ids_restore and mask."""
    return random_masking(tiny.progress(rows).uniform("mask", 16), 4)


def test_sequence_lengths_at_full_size():
    """224 pixels, patch 16, ratio 0.75: the encoder sees 1 + 49 tokens, the decoder 1 + 196."""
    method = Method(SMALL, tiny.spec(224, patch_size=16, depth=1))
    seen = {}
    for name, part in (("encoder", method.encoder), ("decoder", method.decoder)):
        part.blocks[0].register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out.shape[1]})
        )
    with torch.no_grad():
        method(batch(2, 224), tiny.progress(2))
    assert seen == {"encoder": 50, "decoder": 197}


def test_the_encoder_never_sees_the_mask_token(method):
    ids_keep, ids_restore, _ = masking()
    images = SPEC.normalise(batch()["view"])
    encoded = encoders.visible(method.encoder, images, ids_keep)["tokens"]
    assert encoded.shape == (6, 5, 16)
    encoded.sum().backward(retain_graph=True)
    assert method.decoder.mask_token.grad is None
    method.decoder(encoded, ids_restore).square().sum().backward()
    assert method.decoder.mask_token.grad.abs().sum() > 0


def test_only_dropped_patches_have_a_loss(method, monkeypatch):
    seen, decode = {}, method.decode
    keep = lambda *args: seen.setdefault("predicted", decode(*args))  # noqa: E731
    monkeypatch.setattr(method, "decode", keep)
    out = method(batch(), tiny.progress(6))
    (gradient,) = torch.autograd.grad(out["loss"], seen["predicted"])
    mask = masking()[2].bool()
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any(dim=-1).all()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_is_the_formula(norm_pix, monkeypatch):
    method = Method(dataclasses.replace(SMALL, norm_pix=norm_pix), SPEC)
    predicted = torch.randn(6, 16, 48, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(method, "decode", lambda *args: predicted)
    images, mask = batch()["view"].double().numpy(), masking()[2].numpy()
    total = 0.0
    for b in range(6):
        for n in range(16):
            y, x = 4 * (n // 4), 4 * (n % 4)
            patch = images[b, :, y : y + 4, x : x + 4].transpose(1, 2, 0).reshape(-1)
            patch = (patch - np.tile(SPEC.mean, 16)) / np.tile(SPEC.std, 16)
            if norm_pix:
                patch = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 1e-6)
            total += mask[b, n] * ((predicted[b, n].numpy() - patch) ** 2).mean()
    found = method(batch(), tiny.progress(6))["loss"].item()
    assert found == pytest.approx(total / mask.sum(), rel=1e-5)
    assert mask.sum() == 6 * 12


def test_dropped_pixels_do_not_reach_the_prediction(method):
    ids_keep, ids_restore, mask = masking()
    images = batch()["view"].requires_grad_()
    method.reconstruct(images, ids_keep, ids_restore).square().sum().backward()
    reached = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1) > 0
    assert torch.equal(reached, ~mask.bool())


def test_the_prediction_of_a_patch_is_in_its_place(method):
    """The predicted pixels are those of the image that the encoder sees, patch by patch."""
    ids_keep, ids_restore, _ = masking()
    images = SPEC.normalise(batch()["view"])
    encoded = encoders.visible(method.encoder, images, ids_keep)["tokens"]
    expected = method.decoder(encoded, ids_restore)
    assert torch.equal(method.reconstruct(images, ids_keep, ids_restore), expected)
    assert expected.shape == (6, 16, 48)


def test_tokens_return_to_their_places(method):
    """With the blocks taken out: the token of a kept patch, or the mask token, plus its own
    position.
    """
    for name in ("blocks", "norm", "embed", "pred"):
        setattr(method.decoder, name, nn.Identity())
    ids_keep, ids_restore, mask = masking()
    tokens = torch.randn(6, 16, 16)
    kept = tokens.gather(1, ids_keep[..., None].expand(-1, -1, 16))
    encoded = torch.cat([torch.randn(6, 1, 16), kept], 1)
    out = method.decoder(encoded, ids_restore) - sincos_2d(16, 4)
    expected = torch.where(mask.bool()[..., None], method.decoder.mask_token, tokens)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.equal(method.decoder.pos[0], torch.zeros(16))


def test_kept_tokens_carry_their_positions(method):
    method.encoder.blocks, method.encoder.norm = nn.Sequential(), nn.Identity()
    ids_keep, _, _ = masking()
    black = torch.zeros(6, 3, 16, 16)
    out = encoders.visible(method.encoder, black, ids_keep)["patch"]
    out = out - method.encoder.patch_embed.proj.bias
    assert torch.allclose(out, sincos_2d(16, 4)[ids_keep], atol=1e-6)


@pytest.mark.parametrize(
    ("size", "patch", "width", "depth", "heads", "encoder", "decoder"),
    [
        (224, 16, 768, 12, 12, 85.80, 26.11),
        (224, 16, 1024, 24, 16, 303.3, 26.2),
        (224, 14, 1280, 32, 16, 630.8, 26.3),
    ],
)
def test_published_parameter_counts(size, patch, width, depth, heads, encoder, decoder):
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4.0}
    published = {key: PUBLISHED[key] for key in ("decoder_dim", "decoder_depth", "decoder_heads")}
    with torch.device("meta"):
        method = Method(Config(**published), tiny.spec(size, patch_size=patch, **sizes))
    count = {True: 0, False: 0}
    for name, parameter in method.named_parameters():
        count[name.startswith("encoder.")] += parameter.numel()
    count[False] += method.decoder.pos.numel()  # fixed, but counted in these figures
    assert count[True] / 1e6 == pytest.approx(encoder, abs=0.05)
    assert count[False] / 1e6 == pytest.approx(decoder, abs=0.05)
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.pos_embed"}
    if width == 768:
        assert count[True] == 85_798_656
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        assert trained == count[True] + count[False] - 197 * (768 + 512)


def test_initialisation():
    torch.manual_seed(0)
    config = Config(decoder_dim=64, decoder_depth=1, decoder_heads=2)
    method = Method(config, tiny.spec(embed_dim=64, mlp_ratio=4.0))
    for name, layer in method.named_modules():
        if isinstance(layer, nn.Linear):
            # xavier; a fused qkv is one 3D x D matrix
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.95 * bound < layer.weight.abs().max() <= bound, name
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert layer.bias.abs().max() == 0, name
        elif isinstance(layer, nn.LayerNorm):
            assert layer.eps == 1e-6
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
    projection = method.encoder.patch_embed.proj
    assert projection.weight.abs().max() <= math.sqrt(6 / (64 + 48))
    assert projection.weight.abs().max() > 0.95 * math.sqrt(6 / (64 + 48))
    assert 0 < projection.bias.abs().max() <= 1 / math.sqrt(48)  # torch's own default
    for token in (method.encoder.cls_token, method.decoder.mask_token):
        assert 0.01 < token.std() < 0.03
    assert torch.equal(method.encoder.pos_embed[0, 1:], sincos_2d(64, 4))


def test_tokens_are_decayed(method):
    assert not hasattr(method, "no_weight_decay")
    assert method.decoder.mask_token.ndim == method.encoder.cls_token.ndim == 3


def test_masks_differ_between_steps_and_repeat_for_a_step(method):
    with torch.no_grad():
        first, again, other = (
            method(batch(), tiny.progress(6, step=step))["loss"].item() for step in (0, 0, 1)
        )
    assert first == again != other


def test_view_is_the_papers():
    view = views(Config(crop_min=PUBLISHED["crop_min"]), SPEC)["view"]
    assert (view.size, tuple(view.scale), view.flip) == (16, (0.2, 1.0), 0.5)
    assert tuple(view.ratio) == (3 / 4, 4 / 3)
    assert not any(view.jitter)


def test_the_published_recipe():
    """lr 1.5e-4 per 256 images, 40 epochs of warm-up from 0, then a cosine to 0 at 1600."""
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=312)
    assert (config.mask_ratio, config.norm_pix, config.crop_min) == (0.75, True, 0.2)
    assert (config.optimizer, config.betas, config.weight_decay) == ("adamw", (0.9, 0.95), 0.05)
    assert (recipe.epochs, recipe.warmup, recipe.clip) == (1600, 40 * 312, None)
    assert recipe.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert recipe.lr_at(0) == pytest.approx(0, abs=recipe.lr / recipe.warmup * 1.01)
    assert recipe.lr_at(recipe.warmup) == pytest.approx(recipe.lr)
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(0, abs=1e-6)


def test_picture_of_a_perfect_prediction_is_the_image(method, monkeypatch):
    images = batch(10)["view"]
    perfect = method.target(SPEC.normalise(images[:8]))
    monkeypatch.setattr(method, "reconstruct", lambda *args: perfect)
    sheet = method.pictures({"view": images})["reconstruction"]
    assert sheet.dtype == np.uint8
    column = 96 + 4
    assert sheet.shape == (8 * column - 4, 3 * column - 4, 3)
    original, masked, filled = (
        sheet[:, i * column : i * column + 96].astype(int) for i in range(3)
    )
    assert abs(original - filled).max() <= 1
    grey = (masked[:96] == 128).all(-1).mean()
    assert grey == pytest.approx(0.75, abs=0.02)


# --- U-MAE ----------------------------------------------------------------------------------------


def squared_cosines(features):
    """The mean over all pairs, one by one."""
    unit = features / features.norm(dim=1, keepdim=True)
    return sum((a @ b) ** 2 for a in unit for b in unit) / len(unit) ** 2


def test_uniformity_is_the_mean_squared_cosine_with_its_whole_gradient():
    features = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, two = (features.clone().requires_grad_() for _ in range(2))
    found, expected = uniformity(one), squared_cosines(two)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)
    assert uniformity(torch.ones(6, 4)).item() == pytest.approx(1)
    assert uniformity(torch.eye(6)).item() == pytest.approx(1 / 6)


def test_parts_of_the_batch_make_the_gradient_of_the_whole(monkeypatch):
    """As two ranks would see it: the mean of their gradients is that of all pairs."""
    features = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    unit, total = F.normalize(features, dim=1), []
    monkeypatch.setattr("stages.kit.dist.gather", lambda _: unit)
    for part in (slice(3), slice(3, 6)):
        mine = features[part].clone().requires_grad_()
        uniformity(mine).backward()
        total.append(mine.grad / 2)
    whole = features.clone().requires_grad_()
    squared_cosines(whole).backward()
    torch.testing.assert_close(torch.cat(total), whole.grad, rtol=1e-9, atol=1e-12)


def test_umae_adds_the_term_of_the_masked_images_features():
    torch.manual_seed(0)
    method = Method(dataclasses.replace(SMALL, uniformity=0.5), SPEC)
    out = method(batch(), tiny.progress(6))
    seen = encoders.visible(method.encoder, SPEC.normalise(batch()["view"]), masking()[0])
    expected = squared_cosines(seen["tokens"][:, 0]).item()
    assert out["uniformity"].item() == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(0)
    plain = Method(SMALL, SPEC)(batch(), tiny.progress(6))["loss"].item()
    assert out["pixels"].item() == pytest.approx(plain, rel=1e-6)
    assert out["loss"].item() == pytest.approx(plain + 0.5 * expected, rel=1e-6)


def test_umae_spreads_the_features():
    """A few steps on one batch: the class tokens of its images become less alike."""
    found = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        method = Method(dataclasses.replace(SMALL, uniformity=weight), SPEC)
        optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(15):
            optimiser.zero_grad()
            method(batch(), tiny.progress(6))["loss"].backward()
            optimiser.step()
        with torch.no_grad():
            images = SPEC.normalise(batch()["view"])
            found[weight] = uniformity(method.encode(images, masking()[0])["cls"]).item()
    assert found[1.0] < 0.5 * found[0.0]


def test_umae_needs_the_whole_batch_and_mae_does_not(method):
    assert not hasattr(method, "whole_batch")
    assert "images" in Method(dataclasses.replace(SMALL, uniformity=0.01), SPEC).whole_batch


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"uniformity": -0.1}, "uniformity"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "decoder_dim"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"crop_min": 0.0}, "crop_min"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Config(**values)


def test_config_must_fit_the_model():
    Config(mask_ratio=0.9).check(16, tiny.model(embed_dim=16))
    with pytest.raises(ValueError, match="^mask_ratio"):
        Config(mask_ratio=0.95).check(8, tiny.model(embed_dim=16))
    with pytest.raises(ValueError, match="^model.embed_dim: found 18"):
        Config().check(16, tiny.model(embed_dim=18))


def test_of_a_convvit_the_fusion_is_trained_and_not_exported():
    method = tiny.method("mae", tiny.spec(32, "convvit"))
    names = {name.partition(".")[0] for name, _ in method.named_parameters()}
    assert names == {"encoder", "fusion", "decoder"}
    method(tiny.batch(tiny.module("mae"), method.spec), tiny.progress())["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in method.fusion.parameters())
    assert tiny.method("mae", SPEC).fusion is None


def test_of_a_convvit_it_is_convmae_as_published():
    """Alpha-VL/ConvMAE: MLPs of ratio 4 in all stages, MAE's decoder of 8 blocks of 512 with 16
    heads and MLPs of ratio 4, without a class token; norms 1e-6, those of convolutions 1e-5. 85.4 M
    are fine-tuned with a head for 1000 classes, and fusion adds 4.33 M.
    """
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 11, "num_heads": 12, "mlp_ratio": 4.0}
    sizes |= {"name": "convvit_base_patch16_224", "args": {"conv_mlp_ratio": 4.0}}
    published = {key: PUBLISHED[key] for key in ("decoder_dim", "decoder_depth", "decoder_heads")}
    with torch.device("meta"):
        method = Method(Config(**published), tiny.spec(224, "convvit", **sizes))
    parts = (method.encoder, method.fusion, method.decoder)
    encoder, fusion, decoder = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert round((encoder + 768 * 1000 + 1000) / 1e6, 1) == 85.4
    assert fusion / 1e6 == pytest.approx(4.33, abs=0.01)
    # MAE's decoder, whose fixed positions are not parameters
    assert decoder / 1e6 == pytest.approx(26.01, abs=0.01)
    assert method.decoder.prefix == 0 and len(method.decoder.blocks) == 8
    assert {block.mlp.fc1.out_features for block in method.decoder.blocks} == {2048}
    stem = method.encoder.patch_embed
    assert {block.norm1.eps for block in (*stem.stage1, *stem.stage2)} == {1e-5}
    assert {block.fc1.out_features for block in stem.stage1} == {4 * 256}
    assert method.encoder.norm.eps == method.decoder.norm.eps == 1e-6


def test_of_a_convvit_all_stages_are_added_before_the_last_norm():
    method = tiny.method("mae", tiny.spec(32, "convvit")).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[3, 0, 9], [5, 15, 2]])
    encoder = method.encoder
    first, second, tokens = encoder.patch_embed.stages(images, ids)
    tokens = encoder.blocks(tokens + encoder.pos_embed[0][ids])
    layers = method.fusion.first, method.fusion.second
    for cells, layer, side in ((first, layers[0], 4), (second, layers[1], 2)):
        # as the official convolution over the map of cells of each patch
        kernel = layer.weight.view(-1, side, side, cells.shape[-1]).permute(0, 3, 1, 2)
        found = F.conv2d(cells.flatten(0, 1).permute(0, 3, 1, 2), kernel, layer.bias)
        tokens = tokens + found.view(*tokens.shape)
    expected = encoder.norm(tokens)
    torch.testing.assert_close(method.encode(images, ids)["tokens"], expected, rtol=1e-4, atol=1e-5)
