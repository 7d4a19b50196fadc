"""mc-BEiT: the facts of the paper (arXiv 2203.15371) and its official code."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets.target import Frozen
from stages.kit.parts.beit import hidden
from stages.kit.train.recipe import Recipe
from stages.methods import beit, mcbeit
from stages.methods.mcbeit import PUBLISHED, Config, Method, between, views
from stages.targets import kmeans, pixels, vqkd
from tests import tiny

SIZES = {"embed_dim": 16, "depth": 3, "mlp_ratio": 4.0}
SPEC = tiny.spec(**SIZES)
BASE = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
BLOCK = {"masks": "block", "min_block": 8, "mask_ratio": 0.625}  # 9 or 10 of 16, rarely none


def tokenizer(given=SPEC, codes=16):
    """Its scores are 3 for the code of a patch's colour and 0 to 1 for the others."""
    target = tiny.target(given, "ids", "logits", codes=codes)
    look = target.open.look

    def scores(images, *how):
        found = look(images, *how)
        other = torch.linspace(0, 1, codes).roll(5) * images.mean((1, 2, 3))[:, None, None]
        return found | {"logits": 3 * found["logits"] + other}

    target.open.look = scores
    return target


def build(spec=SPEC, target=None, **settings):
    torch.manual_seed(0)
    method = Method(Config(**settings), spec, target or tokenizer(spec))
    nn.init.normal_(method.encoder.rel_pos_bias.relative_position_bias_table)
    nn.init.normal_(method.head.weight, std=0.5)
    return method


def batch(rows=6):
    return {"view": tiny.images(rows, seed=1)}


def by_hand(method, images, mask):
    """All of it for all patches, in float64, as the official code has it: (P, W, Q, log q)."""
    config = method.config
    scores = method.tokenizer.open(images, "logits")["logits"].double()
    p = (scores / config.temp).exp()
    p = p / p.sum(-1, keepdim=True)
    features = method.features(SPEC.normalise(images), mask).double()
    unit = features / features.square().sum(-1, keepdim=True).sqrt()
    w = (torch.einsum("bid,bjd->bij", unit, unit) / config.similarity_temp).exp()
    w = w / w.sum(-1, keepdim=True)
    q = config.omega * torch.einsum("bij,bjk->bik", w, p) + (1 - config.omega) * p
    logits = features @ method.head.weight.double().T + method.head.bias.double()
    return p, w, q, logits - logits.exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": 0.7},
        {"temp": 4.0, "omega": 0.5, "similarity_temp": 0.1},
        {"omega": 0.0},
        {"omega": 1.0},
        {**BLOCK, "omega": 0.3},
    ],
)
def test_hidden_rows_alone_give_the_full_computation(settings):
    method, images, now = build(**settings).eval(), batch(40)["view"], tiny.progress(40)
    mask = method.mask(now.uniform)
    p, _, q, log_q = by_hand(method, images, mask)
    each = -(q * log_q).sum(-1)[mask]  # (M,)
    out = method({"view": images}, now)
    assert out["mim_loss"].item() == pytest.approx(each.mean().item(), rel=1e-6, abs=1e-6)
    expected = each.sum().item() / (40 * method.count)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    kl = (q * (q.log() - log_q)).sum(-1)[mask].mean().item()
    assert out["divergence"].item() == pytest.approx(kl, rel=1e-4, abs=1e-6)
    right = (log_q.argmax(-1) == p.argmax(-1))[mask].double().mean().item()
    assert out["mim_accuracy"].item() == pytest.approx(right, abs=1e-6)
    choice = -(p * p.log()).sum(-1)[mask].mean().item() / math.log(16)
    assert out["choice"].item() == pytest.approx(choice, rel=1e-5)
    if "masks" in settings:
        assert len(mask.sum(1).unique()) > 1


def parts(method, rows=6):
    """Features, P, W and Q at the hidden positions, and these."""
    images = batch(rows)["view"]
    mask = method.mask(tiny.progress(rows).uniform)
    ids, _ = hidden(mask, method.count)
    features = method.features(SPEC.normalise(images), mask)
    chances = method.chances(images)
    weights = method.similarity(features, ids)
    return features, chances, weights, method.targets(features, chances, ids), ids


def at(values, ids):
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def test_rows_are_distributions():
    _, chances, weights, wanted, _ = parts(build(omega=0.4))
    for rows in (chances, weights, wanted):
        assert (rows >= 0).all()
        assert torch.allclose(rows.sum(-1), torch.ones(rows.shape[:2]), atol=1e-5)
        assert rows.dtype == torch.float32


def test_rows_stay_distributions_under_autocast():
    method = build(omega=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, _, wanted, _ = parts(method)
    assert wanted.dtype == torch.float32
    assert torch.allclose(wanted.sum(-1), torch.ones(wanted.shape[:2]), atol=1e-5)


def test_without_refinement_and_temperature_it_is_beit():
    """omega 0: the soft label P; temp 1e-4, too: BEiT's hard loss."""
    method = build(temp=1e-4, omega=0.0, **BLOCK).eval()
    out, images = method(batch(40), tiny.progress(40)), batch(40)["view"]
    config = beit.Config(min_block=8, mask_ratio=0.625)
    other = beit.Method(config, SPEC, tokenizer()).eval()
    other.load_state_dict(method.state_dict())
    expected = other({"view": images}, tiny.progress(40))
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), abs=1e-3), name
    soft = build(temp=1.0, omega=0.0)
    _, chances, _, wanted, ids = parts(soft)
    assert torch.equal(wanted, at(chances, ids))


def test_equal_features_give_the_mean_of_the_image():
    method = build(omega=1.0)
    _, chances, _, _, ids = parts(method)
    same = torch.ones(6, 16, 16)
    wanted = method.targets(same, chances, ids)
    expected = chances.mean(1, keepdim=True).expand_as(wanted)
    assert torch.allclose(wanted, expected, atol=1e-6)


def test_orthogonal_features_at_a_low_temperature_give_the_own_distribution():
    method = build(omega=0.7, similarity_temp=1e-3)
    _, chances, _, _, ids = parts(method)
    orthogonal = (torch.eye(16) * torch.linspace(0.1, 3, 16)).expand(6, -1, -1)  # any lengths
    weights = method.similarity(orthogonal, ids)
    assert torch.allclose(weights, F.one_hot(ids, 16).float(), atol=1e-6)
    assert torch.allclose(method.targets(orthogonal, chances, ids), at(chances, ids), atol=1e-6)


def test_at_a_temperature_of_one_the_similarities_are_nearly_uniform():
    """A patch weighs at most e / (e + N - 1) in its row when it is orthogonal to the others."""
    method = build()
    weights = method.similarity(torch.eye(16).expand(1, -1, -1), torch.arange(16)[None])
    own = weights[0].diagonal()
    assert torch.allclose(own, torch.full((16,), math.e / (math.e + 15)), atol=1e-6)


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_of_visible_patches(detach):
    """Their logits have no loss. Their features do, through W, unless that is detached."""
    method = build(detach=detach, omega=0.5, similarity_temp=0.2, **BLOCK)
    images, now = batch(40)["view"], tiny.progress(40)
    mask, seen, features = method.mask(now.uniform), {}, method.features

    def kept(*given):
        seen["features"] = features(*given)
        seen["features"].retain_grad()
        return seen["features"]

    def keep(module, args, out):
        out.retain_grad()
        seen["logits"] = out

    method.features = kept
    method.head.register_forward_hook(keep)
    method({"view": images}, now)["loss"].backward()
    _, weight = hidden(mask, method.count)
    logits = seen["logits"].grad.abs().sum(-1)
    assert (weight == 0).any()
    assert (logits[weight == 0] == 0).all() and (logits[weight == 1] > 0).all()
    moved = seen["features"].grad.abs().sum(-1)
    some = mask.any(1)  # a mask that hides nothing has no loss
    assert (moved[mask] > 0).all()
    visible = moved[some][~mask[some]]
    assert (visible == 0).all() if detach else (visible > 0).all()


def test_detaching_changes_the_gradient_and_not_the_loss():
    found = []
    for detach in (False, True):
        method = build(detach=detach, omega=0.5, similarity_temp=0.2)
        out = method(batch(), tiny.progress(6))
        out["loss"].backward()
        found.append((out["loss"].item(), method.encoder.blocks[0].mlp.fc1.weight.grad))
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-3)


def test_the_tokenizer_gives_the_same_logits_and_gets_no_gradient():
    method, images = build(), batch()["view"]
    target = method.tokenizer.open
    assert not target.training
    assert torch.equal(method.chances(images), method.chances(images))
    assert not method.chances(images).requires_grad
    method(batch(), tiny.progress(6))["loss"].backward()
    assert target.weight.grad is None and not target.weight.requires_grad


@pytest.mark.parametrize("kind", ["kmeans", "vqkd"])
def test_tokenizers_without_logits_give_squared_distances(kind):
    """Over temp (k-means), over twice temp (unit vectors): each distance written out."""
    torch.manual_seed(0)
    if kind == "kmeans":
        settings = kmeans.Config(codes=16, vectors=16)
        target = kmeans.Target(settings, SPEC, Frozen(pixels.Target(pixels.Config(), SPEC)))
        x, codes, twice = target.features(tiny.images()), target.centres, 1
    else:
        target = vqkd.Target(vqkd.Config(codes=16, code_dim=4, encoder_depth=1), SPEC)
        x, codes, twice = target.encode(tiny.images()), target.codebook.vectors, 2
    method = build(target=Frozen(target), temp=0.3)
    squared = (x[:, :, None] - codes).double().square().sum(-1)
    expected = (-squared / (twice * 0.3)).softmax(-1)
    assert torch.allclose(method.chances(tiny.images()).double(), expected, atol=1e-5)
    assert expected.amax(-1).min() > 1.5 / 16  # not uniform
    method({"view": tiny.images()}, tiny.progress(4))["loss"].backward()


def test_random_masks_hide_exactly_147_of_196():
    given = tiny.spec(224, patch_size=16, **SIZES)
    method = Method(Config(), given, tokenizer(given))
    masks = method.mask(tiny.progress(10_000).uniform)
    assert (masks.sum(1) == 147).all()
    often = masks.float().mean(0)
    assert often.min() > 0.73 and often.max() < 0.77
    assert not torch.equal(masks[0], masks[1])
    blocks = Method(Config(masks="block", mask_ratio=0.3827, min_block=16), given, tokenizer(given))
    counts = blocks.mask(tiny.progress(500).uniform).sum(1)
    assert counts.max() == 75 and len(counts.unique()) > 1


def test_the_loss_is_at_least_the_entropy_of_its_target():
    method = build()
    out = method(batch(), tiny.progress(6))
    images = batch()["view"]
    mask = method.mask(tiny.progress(6).uniform)
    _, _, q, _ = by_hand(method, images, mask)
    entropy = -(q * q.log()).sum(-1)[mask].mean().item()
    assert out["mim_loss"].item() > entropy + 0.01
    assert out["divergence"].item() == pytest.approx(out["mim_loss"].item() - entropy, abs=1e-5)


def test_a_student_that_gives_its_target_has_no_divergence():
    """One distribution for all patches of all images, which a bias can give."""
    target = tiny.target(SPEC, "ids", "logits", codes=16)
    scores = torch.linspace(-1, 2, 16)
    target.open.look = lambda x, *how: {"logits": scores.expand(len(x), 16, 16)}
    method = build(target=target, temp=0.5)
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.copy_(scores / 0.5)
    out = method(batch(), tiny.progress(6))
    p = (scores / 0.5).softmax(0)
    assert out["mim_loss"].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)
    assert out["divergence"].item() == pytest.approx(0, abs=1e-5)


def test_at_the_start_the_loss_is_the_logarithm_of_the_codebook_size():
    torch.manual_seed(0)
    given = tiny.spec(**{**SIZES, "embed_dim": 32})
    method = Method(Config(temp=4.0), given, tokenizer(given, 8192))
    out = method(batch(), tiny.progress(6))
    assert out["mim_loss"].item() == pytest.approx(math.log(8192), abs=0.1)


def test_permuted_patches_permute_the_similarities():
    method, everywhere = build(similarity_temp=0.3), torch.arange(16).expand(2, -1)
    features = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    whole = method.similarity(features, everywhere)
    moved = method.similarity(features[:, order], everywhere)
    assert torch.allclose(moved, whole[:, order][:, :, order], atol=1e-6)
    assert not torch.allclose(moved, whole, atol=1e-3)


def test_without_positions_permuted_images_permute_the_similarities():
    """Through the encoder: its only positions are its table, which starts at zero."""
    method = build(similarity_temp=0.3).eval()
    nn.init.zeros_(method.encoder.rel_pos_bias.relative_position_bias_table)
    images, mask = batch(2)["view"], torch.zeros(2, 16, dtype=torch.bool)
    everywhere = torch.arange(16).expand(2, -1)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    patches = F.unfold(images, 4, stride=4)
    mixed = F.fold(patches[:, :, order], (16, 16), 4, stride=4)
    whole, moved = (
        method.similarity(method.features(SPEC.normalise(x), mask), everywhere)
        for x in (images, mixed)
    )
    assert torch.allclose(moved, whole[:, order][:, :, order], atol=1e-5)


def test_published_parameter_counts():
    given = tiny.spec(224, **BASE)
    with torch.device("meta"):
        method = Method(Config(), given, tokenizer(given, 8192))
    assert sum(p.numel() for p in method.parameters()) == 91_965_776


# --- pictures, settings -------------------------------------------------------------------------


def test_pictures():
    method = build(omega=0.5).eval()
    images = batch(10)["view"]
    sheets = method.pictures({"view": images})
    assert set(sheets) == {"codes", "choices", "similarity"}
    for name, columns in (("codes", 4), ("choices", 4), ("similarity", 3)):
        assert sheets[name].shape == (8 * 100 - 4, columns * 100 - 4, 3), name
    mask = method.mask(mcbeit.shown(8))
    ids, _ = hidden(mask, method.count)
    shares = method.chances(images[:8])
    entropy = torch.special.entr(shares).sum(-1) / math.log(16)
    grey = sheets["choices"][12:96:24, 212:296:24, 0].reshape(-1) / 255  # the middles of patches
    assert np.allclose(grey[mask[0]], entropy[0][mask[0]], atol=1 / 255)
    assert np.allclose(grey[~mask[0]], 0.5, atol=1 / 255)  # what is not hidden
    place = int(ids[0, ids.shape[1] // 2])
    row = sheets["similarity"][12:96:24, 112:196:24, 0].reshape(-1) / 255
    weights = method.similarity(method.features(SPEC.normalise(images[:8]), mask), ids)
    weights = weights[0, ids.shape[1] // 2].detach()
    others = torch.arange(16) != place
    scaled = (weights - weights[others].min()) / (weights[others].max() - weights[others].min())
    assert row[place] == 1.0
    assert np.allclose(row[others], scaled[others], atol=1 / 255)


def test_between_leaves_out_what_it_is_told():
    values = torch.tensor([[3.0, 100.0, 5.0, 4.0]])
    left_out = torch.tensor([[False, True, False, False]])
    assert between(values, left_out).tolist() == [[0.0, 1.0, 1.0, 0.5]]


def test_the_published_recipe():
    """As BEiT, but beta2 0.98, no colour jitter, 147 random patches."""
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=625)
    assert (recipe.epochs, recipe.clip, recipe.lr) == (800, 3.0, pytest.approx(1.5e-3))
    assert recipe.warmup == pytest.approx(10 * 625, rel=2e-3)
    assert (config.betas, config.weight_decay, config.drop_path) == ((0.9, 0.98), 0.05, 0.1)
    assert (config.temp, config.omega, config.similarity_temp) == (4.0, 0.2, 1.0)
    assert (config.detach, config.masks, config.layer_scale) == (False, "random", 0.1)
    view = views(config, SPEC)["view"]
    assert tuple(view.jitter) == (0, 0, 0, 0)
    assert (tuple(view.scale), view.flip) == ((0.08, 1.0), 0.5)
    differs = {"masks", "mask_ratio", "temp", "omega", "similarity_temp", "detach", "jitter"}
    differs |= {"betas", "min_block"}
    same = {key for key in beit.PUBLISHED if key not in differs}
    assert {key: PUBLISHED[key] for key in same} == {key: beit.PUBLISHED[key] for key in same}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"temp": 0.0}, "temp"),
        ({"similarity_temp": 0.0}, "similarity_temp"),
        ({"omega": 1.1}, "omega"),
        ({"omega": -0.1}, "omega"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Config(**values)


def test_a_smallest_block_matters_to_blocks_only():
    model = tiny.model()
    for masks, fine in (("random", True), ("block", False)):
        config = dataclasses.replace(Config(), masks=masks, mask_ratio=0.1, min_block=10)
        if fine:
            config.check(16, model)
        else:
            with pytest.raises(ValueError, match="^min_block"):
                config.check(16, model)
