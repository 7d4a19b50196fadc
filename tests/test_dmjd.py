"""Facts of DMJD (arXiv 2301.00230 and its official code), against independent calculations.

Masks are tested in test_masks.py, HOG in test_hog.py.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages import data, pretrain, target
from stages.kit import keyed
from stages.kit.nets import masks
from stages.kit.nets.positions import sincos_2d
from stages.kit.nets.target import Frozen
from stages.kit.train.loop import Recipe
from stages.methods.dmjd import Config, Method, pick, views
from stages.reporting import lineage
from stages.reporting.results import Jobs, Row
from stages.targets import hog, pixels
from tests import tiny

SMALL = Config(decoder_dim=16, decoder_depth=1, decoder_heads=2)
PUBLISHED = Config(decoder_dim=512, decoder_depth=8, decoder_heads=16, decoder_mlp_ratio=8.0)
CONV = {"conv_dims": [8, 8], "conv_depths": [1, 1], "conv_mlp_ratio": 2.0}


def spec(size=32, kind="vit", **model):
    own = {"patch_size": 4, "args": CONV} if kind == "convvit" else {}
    return tiny.spec(size, kind, **{"embed_dim": 16, "mlp_ratio": 4.0, **own, **model})


def made(config=SMALL, encoder="vit", kind=hog, **model):
    torch.manual_seed(0)
    about = spec(kind=encoder, **model)
    return Method(config, about, Frozen(kind.Target(kind.Config(), about))).eval()


def progress(rows=4, step=0, seed=0):
    return tiny.progress(rows, step, epoch=0.0, seed=seed)


def batch(rows=4, size=32):
    return {"view": tiny.images(rows, size, seed=1)}


def patches(method, images: torch.Tensor) -> torch.Tensor:
    return method.teacher(images, "patch")["patch"]


def masking(method, rows=4):
    return method.masks(progress(rows).uniform("mask", method.config.n_masks, method.cells))


@pytest.mark.parametrize("encoder", ["vit", "convvit"])
def test_masked_pixels_never_reach_their_view(encoder):
    """New pixels behind the masks of view 1: its tokens keep every bit, those of view 2 change."""
    method, images = made(encoder=encoder), batch()["view"]
    ids_keep, ids_hide = masking(method)
    hidden = torch.zeros(4, 64, dtype=torch.bool).scatter(1, ids_hide[:4], True)
    behind = F.interpolate(hidden.view(4, 1, 8, 8).float(), size=32) > 0
    changed = torch.where(behind, 1 - images, images)
    with torch.no_grad():
        before, after = (method.encode(x, ids_keep) for x in (images, changed))
    assert before.shape == (8, 24, 16)
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).flatten(1).any(1).all()


def test_rows_of_a_view_are_in_the_order_of_the_images():
    """The batch is [all samples' first views; all second views]: row v*B + b sees image b through
    mask v.
    """
    method, images = made(), batch()["view"]
    noise = progress().uniform("mask", 2, 16)
    ids_keep, _ = method.masks(noise)
    keep, _ = masks.disjoint_masking(noise, 0.6, 1.0, 2)
    assert torch.equal(ids_keep, torch.cat([keep[:, 0], keep[:, 1]]))
    with torch.no_grad():
        whole = method.encode(images, ids_keep)
        alone = method.encode(images[2:3], ids_keep[6:7])
    torch.testing.assert_close(whole[6:7], alone)


@pytest.mark.parametrize("kind", [hog, pixels])
def test_loss_is_the_formula(kind, monkeypatch):
    """In float64, sample by sample: mask-weighted mean square of both views, plus smooth L1 with
    beta 2.
    """
    method = made(dataclasses.replace(SMALL, vis_weight=0.7), kind=kind)
    ids_keep, ids_hide = masking(method)
    generator = torch.Generator().manual_seed(2)
    size = method.teacher.sizes["patch"]
    hidden, seen = (
        3 * torch.randn(*ids.shape, size, generator=generator) for ids in (ids_hide, ids_keep)
    )
    monkeypatch.setattr(method, "predict_hidden", lambda *args: hidden)
    monkeypatch.setattr(method, "predict_visible", lambda *args: seen)
    truth = patches(method, batch()["view"]).double().numpy()
    error, count, smooth, near = 0.0, 0, [], 0
    for row in range(8):
        for place, patch in enumerate(ids_hide[row].tolist()):
            error += ((hidden[row, place].double().numpy() - truth[row % 4, patch]) ** 2).mean()
            count += 1
        for place, patch in enumerate(ids_keep[row].tolist()):
            d = np.abs(seen[row, place].double().numpy() - truth[row % 4, patch])
            smooth.append(np.where(d < 2, 0.25 * d * d, d - 1).mean())
            near += (d < 2).mean()
    assert count == 2 * 4 * 40 and 0.1 < near / len(smooth) < 0.9
    out = method(batch(), progress())
    assert float(out["hidden_loss"]) == pytest.approx(error / count, rel=1e-5)
    assert float(out["visible_loss"]) == pytest.approx(np.mean(smooth), rel=1e-5)
    assert float(out["loss"]) == pytest.approx(error / count + 0.7 * np.mean(smooth), rel=1e-5)


def test_each_branch_learns_from_its_own_patches(monkeypatch):
    """Other targets at the visible patches leave the hidden loss as it is, and vice versa."""
    method = made(dataclasses.replace(SMALL, n_masks=1))
    ids_keep, ids_hide = masking(method)
    truth, losses = method.truth(batch()["view"]), []
    for ids in (None, ids_keep, ids_hide):
        wrong = (
            truth
            if ids is None
            else truth.scatter_add(1, ids[..., None].expand(-1, -1, 27), torch.ones(4, 64, 27))
        )
        monkeypatch.setattr(method, "truth", lambda images, wrong=wrong: wrong)
        out = method(batch(), progress())
        losses.append([out["hidden_loss"].item(), out["visible_loss"].item()])
    (hidden, seen), other_seen, other_hidden = losses
    assert other_seen[0] == hidden and other_seen[1] != seen
    assert other_hidden[1] == seen and other_hidden[0] != hidden


def test_each_branch_has_its_own_parameters():
    method = made()
    branch = ("projector.", "predictor.")
    for loss, own in (("hidden_loss", False), ("visible_loss", True)):
        method.zero_grad()
        method(batch(), progress())[loss].backward()
        for name, parameter in method.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            if name.startswith("encoder."):
                assert reached == parameter.requires_grad, name
            else:
                assert reached == (name.startswith(branch) is own), (loss, name)


@pytest.mark.parametrize(("align", "same"), [("aligned", True), ("raster", False)])
def test_order_of_the_kept_list(align, same, monkeypatch):
    """The aligned loss does not depend on it; the released pairing does."""
    method = made(dataclasses.replace(SMALL, vis_align=align))
    ids_keep, ids_hide = masking(method)
    order = torch.randperm(ids_keep.shape[1], generator=torch.Generator().manual_seed(0))
    losses = []
    for keep in (ids_keep, ids_keep[:, order]):
        monkeypatch.setattr(method, "masks", lambda noise, keep=keep: (keep, ids_hide))
        losses.append({name: value.item() for name, value in method(batch(), progress()).items()})
    assert losses[0]["hidden_loss"] == pytest.approx(losses[1]["hidden_loss"], rel=1e-5)
    assert (losses[0]["visible_loss"] == pytest.approx(losses[1]["visible_loss"], rel=1e-5)) is same


def test_raster_pairs_as_the_released_code_does(monkeypatch):
    """Predictions in the list's order against targets by a bool mask; of 76 pairs about one is of
    the same patch.
    """
    method = made(dataclasses.replace(SMALL, vis_align="raster"))
    ids_keep, ids_hide = masking(method)
    truth = method.truth(batch()["view"]).repeat(2, 1, 1)
    visible = torch.ones(8, 64, dtype=torch.bool).scatter(1, ids_hide, False)
    with torch.no_grad():
        predicted = method.predict_visible(method.encode(batch()["view"], ids_keep))
        expected = F.smooth_l1_loss(predicted.flatten(0, 1), truth[visible], beta=2.0)
        assert method(batch(), progress())["visible_loss"].item() == pytest.approx(
            expected.item(), rel=1e-5
        )
    keep, _ = masks.disjoint_masking(keyed.uniform(1, torch.arange(300), 2, 49), 0.6, 1.0, 2)
    keep = keep.flatten(0, 1)
    raster = keep.sort(dim=1).values
    assert (keep == raster).float().mean().item() == pytest.approx(1 / 76, abs=0.004)
    rows = (raster // 14).float().view(-1, 4, 19).mean((0, 2))  # quarters: bands of the image
    assert rows.tolist() == pytest.approx([1.4, 4.8, 8.2, 11.6], abs=0.1)


def test_decoder_equals_one_that_keeps_the_order_of_the_lists():
    """The official code's way: visible patches, then mask tokens, each with the position of its
    place; in float64.
    """
    method = made().double()
    ids_keep, ids_hide = masking(method)
    tokens = torch.randn(8, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = method.predict_hidden(tokens, ids_keep, ids_hide)
    decoder = method.decoder
    x = torch.cat([decoder.embed(tokens), decoder.mask_token.expand(8, 40, -1)], dim=1)
    x = decoder.blocks(x + sincos_2d(16, 8).double()[torch.cat([ids_keep, ids_hide], dim=1)])
    expected = decoder.pred(decoder.norm(x[:, 24:]))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("blr", "batch_size", "changes", "lr"),
    [
        (6e-4, 512, {}, 2.0e-3),
        (6e-4, 512, {"mask_ratio": 0.75}, 1.6e-3),
        (6e-4, 512, {"n_masks": 1}, 1.2e-3),
        (6e-4, 512, {"predict_ratio": 0.6}, 1.2e-3),
        (6e-4, 512, {"predict_ratio": 0.9}, 1.8e-3),
        (6e-4, 256, {"mask_ratio": 0.25, "n_masks": 3}, 1.8e-3),
        (6e-4, 256, {"mask_ratio": 0.25, "n_masks": 8}, 2.4e-3),
        (6e-4, 512, {"disjoint": False}, 1.2e-3 * 0.84 / 0.6),
        (6e-4, 512, {"disjoint": False, "n_masks": 1}, 1.2e-3),
        (6e-4, 512, {"lr_rule": "views"}, 2.4e-3),
        (6e-4, 512, {"lr_rule": "images"}, 1.2e-3),
    ],
)
def test_learning_rate_rule(blr, batch_size, changes, lr):
    """lr = blr * unique images * (m_pred / m) / 256; what is not reachable does not count."""
    config = Config(lr=blr, **changes)
    recipe = Recipe.of(config, {"epochs": 400, "batch_size": batch_size}, 10)
    assert recipe.lr == pytest.approx(lr, rel=1e-6)
    assert recipe.warmup == 200  # 20 of 400 epochs


def test_predicted_share_is_that_of_the_masks():
    for changes in (
        {},
        {"n_masks": 1},
        {"mask_ratio": 0.4},
        {"mask_ratio": 0.3, "n_masks": 3},
        {"disjoint": False},
    ):
        config = Config(**changes)
        method = SimpleNamespace(config=config)
        _, hide = Method.masks(method, keyed.uniform(0, torch.arange(60), config.n_masks, 900))
        hidden = (
            torch.zeros(60 * config.n_masks, 3600)
            .scatter(1, hide, 1.0)
            .view(config.n_masks, 60, 3600)
        )
        assert hidden.amax(0).mean().item() == pytest.approx(config.predicted, abs=6e-3), changes


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "encoder", "total", "classifier"),
    [
        ("convvit_base_patch16_224", 768, 11, 12, 87.87, 135.6, 88.8),
        ("convvit_large_patch16_224", 1024, 23, 16, 321.8, 374.9, 323.0),
    ],
)
def test_published_parameter_counts(name, width, depth, heads, encoder, total, classifier):
    sizes = {"patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads}
    about = spec(224, "convvit", name=name, args={}, **sizes)
    with torch.device("meta"):
        method = Method(PUBLISHED, about, Frozen(hog.Target(hog.Config(), about)))
    parts = ("encoder", "fusion", "projector", "predictor", "decoder")
    count = dict.fromkeys(parts, 0)
    for key, parameter in method.named_parameters():
        part = key.split(".")[0]
        count[part if part in parts else "decoder"] += parameter.numel() * parameter.requires_grad
    assert sum(count.values()) / 1e6 == pytest.approx(total, abs=0.05)
    positions = method.encoder.pos_embed.numel()  # fixed, but counted in some of the figures
    assert count["encoder"] / 1e6 == pytest.approx(encoder, abs=0.05 if width > 768 else 0.005)
    assert (count["encoder"] + positions + 1000 * (width + 1)) / 1e6 == pytest.approx(
        classifier, abs=0.05
    )
    count["decoder"] += method.decoder.pos.numel()
    if width == 768:
        expected = {"fusion": 4.33, "decoder": 42.56, "projector": 0.92, "predictor": 0.06}
        assert {key: round(count[key] / 1e6, 2) for key in expected} == expected
    assert method.teacher.sizes == {"patch": 108}


def test_initialisation():
    method = made(Config(decoder_dim=64), embed_dim=64)
    for name, layer in method.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith("encoder."):
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound, name
            assert layer.bias.abs().max() == 0, name
    assert 0.01 < method.decoder.mask_token.std() < 0.03
    last = method.projector[-1]
    assert isinstance(last, nn.LayerNorm) and last.weight is None
    assert not hasattr(method, "no_weight_decay")  # the mask token is decayed


def test_visible_branch_by_hand_where_the_eps_of_its_norms_shows():
    method = made()
    tokens = 1e-3 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))

    def norm(x):
        variance = x.var(-1, unbiased=False, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()

    x = tokens.double()
    for number in (0, 3, 6):
        linear = method.projector[number]
        x = norm(x @ linear.weight.double().T + linear.bias.double())
        x = x if number == 6 else F.gelu(x)
    expected = x @ method.predictor.weight.double().T + method.predictor.bias.double()
    torch.testing.assert_close(method.predict_visible(tokens).double(), expected, atol=1e-5, rtol=0)


def test_masks_are_functions_of_seed_and_step():
    """Both views', and whatever ran before: a resumed run asks Progress for the same step."""
    method = made()
    first, again, later, other = (
        method.masks(progress(step=step, seed=seed).uniform("mask", 2, 16))
        for step, seed in ((5, 0), (5, 0), (6, 0), (5, 1))
    )
    for a, b, c, d in zip(first, again, later, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) and not torch.equal(a, d)
    one = method.masks(progress().uniform("mask", 2, 16))[0][:4]
    assert torch.equal(
        one, made(dataclasses.replace(SMALL, n_masks=1)).masks(progress().uniform("mask", 1, 16))[0]
    )


def test_without_a_visible_branch():
    method = made(dataclasses.replace(SMALL, vis_weight=0.0))
    out = method(batch(), progress())
    assert set(out) == {"loss", "hidden_loss"} and torch.equal(out["loss"], out["hidden_loss"])
    assert not any(
        name.startswith(("projector", "predictor")) for name, _ in method.named_parameters()
    )
    assert method.pictures(batch())["predictions"].std() > 0


@pytest.mark.parametrize(("given", "normalised"), [(None, True), (False, False), (True, True)])
def test_features_of_a_network_are_normalised_per_token(given, normalised):
    """A network has weights, and its features are not of unit scale."""
    target = tiny.target(spec(), "patch", width=5)
    target.open.weight.mul_(3)
    method = Method(dataclasses.replace(SMALL, norm_target=given), spec(), target)
    truth, raw = method.truth(batch()["view"]), patches(method, batch()["view"])
    mean, variance = raw.mean(-1, keepdim=True), raw.var(-1, correction=0, keepdim=True)
    expected = (raw - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(truth, expected if normalised else raw)
    assert not truth.requires_grad
    assert method.pictures(batch())["predictions"].std() > 0


@pytest.mark.parametrize("kind", [hog, pixels])
def test_hog_and_pixels_are_taken_as_they_are(kind):
    method = made(kind=kind)
    assert torch.equal(method.truth(batch()["view"]), patches(method, batch()["view"]))


def test_pick_takes_rows_of_the_right_image():
    truth = torch.arange(2 * 3.0).view(2, 3, 1)
    ids = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1]])
    assert pick(truth, ids)[..., 0].tolist() == [[0, 2], [4, 4], [2, 0], [3, 4]]


def test_pictures_show_each_view_and_branch(monkeypatch):
    """With perfect predictions the pieces of both branches are those of the target, and grey
    elsewhere.
    """
    method = made(dataclasses.replace(SMALL, n_masks=3), kind=pixels)
    images = batch(10)["view"]
    truth = method.truth(images[:8])
    monkeypatch.setattr(method, "predict_hidden", lambda tokens, keep, hide: pick(truth, hide))
    seen = {}
    monkeypatch.setattr(method, "encode", lambda x, keep: seen.update(keep=keep))
    monkeypatch.setattr(method, "predict_visible", lambda tokens: pick(truth, seen["keep"]))
    sheets = method.pictures({"view": images})
    column = 96 + 4
    assert sheets["views"].shape == (8 * column - 4, 5 * column - 4, 3)
    assert sheets["predictions"].shape == (8 * column - 4, 7 * column - 4, 3)
    cut = {
        name: [
            sheet[:96, i * column : i * column + 96].astype(int)
            for i in range(sheet.shape[1] // column + 1)
        ]
        for name, sheet in sheets.items()
    }
    original, one, two, _, often = cut["views"]
    target_picture, hidden, visible = cut["predictions"][:3]
    assert abs(original - target_picture).max() <= 1
    grey = (one == 128).all(-1)
    assert grey.mean() == pytest.approx(40 / 64, abs=0.01)
    assert not (~grey & ~(two == 128).all(-1)).any()  # what one view shows the other hides
    assert abs(hidden - original)[grey].max() <= 1 and (hidden[~grey] == 128).all()
    assert abs(visible - original)[~grey].max() <= 1 and (visible[grey] == 128).all()
    assert often[..., 0].max() < 255  # every patch is hidden at least once


def test_view_is_the_papers():
    view = views(Config(), spec())["view"]
    assert (view.size, tuple(view.scale), view.flip) == (32, (0.5, 1.0), 0.5)


def test_images_and_effective_epochs_are_counted_separately(tiny_params, tmp_path):
    """3 epochs of 48 images and 2 masks: 144 images, 6 effective epochs, in the report, too."""
    params = tiny_params(
        tmp_path,
        train={"epochs": 3},
        targets__hog={"kind": "hog"},
        methods__dmjd={"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
        grid__runs__dmjd={"method": "dmjd", "target": "hog"},
    )
    results = tmp_path / "results"
    args = ["--params", str(params), "--results", str(results)]
    assert data.main(args) == 0
    assert target.main(["--name", "hog", *args]) == 0
    assert pretrain.main(["--run", "dmjd-s0", *args]) == 0
    folder = results / "pretrain" / "dmjd-s0"
    jobs = Jobs({id: results / id for id in ("data/main", "target/hog", "pretrain/dmjd-s0")})
    summary = jobs.manifests["pretrain/dmjd-s0"].summary
    seen = [summary[key] for key in ("images_seen", "views_seen", "effective_epochs")]
    assert seen == [144, 288, 6]
    assert {path.stem for path in (folder / "pictures").glob("*.png")} == {"views", "predictions"}
    row = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    assert {"loss", "hidden_loss", "visible_loss"} <= set(row)
    cost = lineage.cost(Row("dmjd", {}, 0, [0], ["dmjd-s0"]), jobs)
    assert (cost.images, cost.epochs) == (144, 6)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"predict_ratio": 1.2}, "predict_ratio"),
        ({"predict_ratio": 0.5}, "predict_ratio"),
        ({"n_masks": 0}, "n_masks"),
        ({"cell": 0}, "cell"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"vis_weight": -1.0}, "vis_weight"),
        ({"decoder_dim": 18}, "decoder_dim"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"crop_min": 0.0}, "crop_min"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        Config(**values)


def test_config_must_fit_the_model():
    Config().check(32, spec().model)
    with pytest.raises(ValueError, match="^cell"):
        Config(cell=3).check(32, spec().model)
    with pytest.raises(ValueError, match="^mask_ratio"):
        Config(cell=4).check(16, spec().model)
    with pytest.raises(ValueError, match="embed_dim"):
        Config().check(32, tiny.model(embed_dim=18))
