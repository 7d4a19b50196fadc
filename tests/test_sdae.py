"""SdAE: the facts of the paper (arXiv 2208.00449) and its official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch.utils.flop_counter import FlopCounterMode

from stages.kit.nets import encoders
from stages.kit.parts import collapse
from stages.kit.parts.collapse import CollapseError
from stages.kit.train import droppath
from stages.kit.train.recipe import Progress, Recipe
from stages.methods.sdae import PUBLISHED, Config, Method, views
from tests import tiny

SPEC = tiny.spec(embed_dim=16, mlp_ratio=4.0)  # 16 patches, of which 4 are visible
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
FULL = tiny.spec(224, patch_size=16, embed_dim=16, depth=1)


def build(spec=SPEC, **settings) -> Method:
    torch.manual_seed(0)
    method = Method(Config(**{**SMALL, **settings}), spec)
    with torch.no_grad():  # as after some training
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return method


def images(rows=4, size=16) -> torch.Tensor:
    return SPEC.normalise(tiny.images(rows, size, seed=1))


def masked(method: Method, rows=4):
    return method.mask(tiny.progress(rows).uniform("mask", method.patches))


def at(step: int, per_epoch: int, epochs: int) -> Progress:
    """As the loop tells it."""
    end, steps = (step + 1) % per_epoch == 0, epochs * per_epoch
    rows = torch.arange(4)
    return Progress(step, steps, step / per_epoch, 0, rows, rows.device, end, epochs)


# --- folds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, folds, size", [(SPEC, 3, 4), (FULL, 3, 49), (FULL, 1, 147)])
def test_visible_set_and_folds_are_disjoint_and_together_all(spec, folds, size):
    method = build(spec, folds=folds)
    ids_keep, ids_restore, ids_folds = masked(method, 5)
    assert ids_folds.shape == (folds * 5, size)
    parts = [ids_keep, *ids_folds.split(5)]
    for image in range(5):
        found = torch.cat([part[image] for part in parts]).sort().values
        assert torch.equal(found, torch.arange(spec.grid**2))
    # the sequence of which ids_restore speaks is visible ones, then fold after fold
    assert torch.equal(torch.cat(parts, dim=1).argsort(dim=1), ids_restore)
    assert not torch.equal(ids_folds, ids_folds.sort(dim=1).values)  # folds are random subsets


def test_the_split_is_drawn_again_for_each_image_and_step():
    method = build()
    first, second = (
        method.mask(tiny.progress(3, step).uniform("mask", 16))[2].split(3)[0].sort(dim=1).values
        for step in (0, 1)
    )
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_patches_beyond_the_last_whole_fold_are_left_out():
    method = build(folds=5)  # 12 hidden ones
    ids_keep, _, ids_folds = masked(method)
    assert ids_folds.shape == (20, 2)
    seen = torch.cat([ids_keep, *ids_folds.split(4)], dim=1)
    assert all(len(set(row.tolist())) == 14 for row in seen)


def test_the_teacher_sees_one_fold_at_a_time_and_nothing_visible():
    method, x = build(), images()
    ids_keep, _, ids_folds = masked(method)
    before = method.target(x, ids_folds)

    def with_noise_at(ids):
        hidden = torch.zeros(4, 16, dtype=torch.bool).scatter(1, ids, True)
        cells = hidden.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return torch.where(cells, torch.randn_like(x), x)

    assert torch.equal(method.target(with_noise_at(ids_keep), ids_folds), before)
    for fold, ids in enumerate(ids_folds.split(4)):
        same = method.target(with_noise_at(ids[:, :1]), ids_folds) == before
        changed = [~part.flatten(1).all(1) for part in same.split(4)]
        assert [row.all().item() for row in changed] == [number == fold for number in range(3)]
        assert not any(row.any() for number, row in enumerate(changed) if number != fold)


@pytest.mark.parametrize(
    "settings, inputs, outputs",
    [
        ({}, (6, 50), (6, 49)),
        ({"folds": 1}, (2, 148), (2, 147)),
        ({"teacher_view": "image"}, (2, 197), (2, 147)),
    ],
)
def test_lengths_of_the_teachers_sequences(settings, inputs, outputs):
    method, shapes = build(FULL, **settings), []
    block = method.teacher.network.blocks[0]
    block.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    ids_folds = masked(method, 2)[2]
    found = method.target(images(2, 224), ids_folds)
    assert shapes == [(*inputs, 16)] and found.shape == (*outputs, 16)


def test_three_folds_cost_less_than_one_sequence():
    counted = []
    for folds in (3, 1):
        method = build(FULL, folds=folds)
        ids_folds = masked(method, 2)[2]
        with FlopCounterMode(display=False) as counter:
            method.target(images(2, 224), ids_folds)
        counted.append(counter.get_total_flops())
    assert counted[0] < counted[1]


def test_targets_and_predictions_are_of_the_same_patches(monkeypatch):
    """An entry of both is the patch of which the folds speak: a student that gives each patch its
    number, of a teacher that does the same, is perfect.
    """
    numbers = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    for settings in ({}, {"folds": 1}, {"teacher_view": "image"}):
        method = build(**settings)
        monkeypatch.setattr(method, "predict", lambda *_: numbers.expand(4, -1, -1))
        monkeypatch.setattr(method, "target", lambda _, ids: numbers[ids])
        out = method({"view": tiny.images(4)}, tiny.progress(4))
        assert out["loss"].item() == pytest.approx(0, abs=1e-6)


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_targets_are_standardised_tokens_after_the_last_norm(norm):
    method, x = build(norm_target=norm), images()
    ids_folds = masked(method)[2]
    found = method.target(x, ids_folds).double()
    raw = encoders.visible(method.teacher.network, x, ids_folds)["patch"].double()
    if norm:
        assert found.mean(2).abs().max() < 1e-6
        assert torch.allclose(found.var(2), torch.ones(12, 4, dtype=torch.double), atol=1e-4)
        raw = (raw - raw.mean(2, keepdim=True)) / (raw.var(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found, raw, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("settings", [{}, {"folds": 1}, {"teacher_view": "image"}, {"folds": 5}])
def test_the_loss_by_hand(axis, settings):
    """In float64, image by image and in the order of the official code."""
    method = build(cosine_axis=axis, **settings).eval()
    x, folds = images(), method.folds
    ids_keep, ids_restore, ids_folds = masked(method)
    with torch.no_grad():
        target = method.target(x, ids_folds).double().numpy()
        predicted = method.predict(x, ids_keep, ids_restore).double().numpy()
    terms = []
    for image in range(4):
        for fold in range(folds):
            row = fold * 4 + image
            p, t = predicted[image][ids_folds[row].numpy()], target[row]  # (n,D)
            over = 1 if axis == "channel" else 0
            norms = np.linalg.norm(p, axis=over) * np.linalg.norm(t, axis=over)
            terms.append(((p * t).sum(over) / norms).mean())
    out = method({"view": tiny.images(4, seed=1)}, tiny.progress(4))
    assert out["loss"].item() == pytest.approx(1 - np.mean(terms), rel=1e-5)
    assert out[f"{axis}_cosine"].item() == pytest.approx(np.mean(terms), abs=1e-5)


def loss_of(method, predicted, target, monkeypatch) -> float:
    """With the student's predictions (B,16,D) and the teacher's features of all patches."""
    monkeypatch.setattr(method, "predict", lambda *_: predicted)
    rows = torch.arange(12)[:, None] % 4
    monkeypatch.setattr(method, "target", lambda _, ids: target[rows, ids])
    return method({"view": tiny.images(4)}, tiny.progress(4))["loss"].item()


def test_what_the_two_cosines_see(monkeypatch):
    torch.manual_seed(1)
    target = F.layer_norm(torch.randn(4, 16, 16), (16,))
    scale, noise = torch.rand(16) + 0.5, torch.randn(4, 16, 16)
    for axis in ("channel", "token"):
        method = build(cosine_axis=axis)
        found = {
            factor: loss_of(method, factor * target, target, monkeypatch) for factor in (0.3, 7, -2)
        }
        assert found[0.3] == pytest.approx(0, abs=1e-6) == found[7]
        assert found[-2] == pytest.approx(2, abs=1e-6)
        assert loss_of(method, noise, target, monkeypatch) == pytest.approx(1, abs=0.25)
        plain = loss_of(method, noise, target, monkeypatch)
        scaled = loss_of(method, noise * scale, target, monkeypatch)
        assert (scaled == pytest.approx(plain, abs=1e-5)) is (axis == "token")


def test_no_gradient_to_the_teacher_nor_for_visible_patches(monkeypatch):
    method = build()
    ids_keep, ids_restore, _ = masked(method)
    predicted = method.predict(images(), ids_keep, ids_restore).detach().requires_grad_()
    monkeypatch.setattr(method, "predict", lambda *_: predicted)
    method({"view": tiny.images(4, seed=1)}, tiny.progress(4))["loss"].backward()
    visible = torch.zeros(4, 16, dtype=torch.bool).scatter(1, ids_keep, True)
    assert torch.equal(predicted.grad.abs().sum(2) > 0, ~visible)
    for parameter in method.teacher.parameters():
        assert parameter.grad is None and not parameter.requires_grad


# --- the teacher ----------------------------------------------------------------------------------


def weights(module) -> dict:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_the_teacher_moves_at_the_end_of_an_epoch_and_then_all_of_it():
    method = build(momentum=0.8, momentum_end=0.8)
    held = weights(method.teacher.network)
    assert {"pos_embed", "cls_token", "norm.weight", "patch_embed.proj.bias"} <= held.keys()
    assert held.keys() == weights(method.encoder).keys()
    for step in range(6):
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter.add_(torch.randn(parameter.shape))
        method.after_step(at(step, per_epoch=3, epochs=2))
        now = weights(method.teacher.network)
        if step % 3 < 2:
            assert all(torch.equal(now[name], held[name]) for name in held)
        else:
            for name, student in weights(method.encoder).items():
                torch.testing.assert_close(now[name], 0.8 * held[name] + 0.2 * student)
            held = now


def test_it_may_move_at_every_step():
    method, student = build(update="step", momentum=0.5), None
    for step in range(2):
        before, student = weights(method.teacher.network), weights(method.encoder)
        method.after_step(at(step, per_epoch=3, epochs=2))
        for name, value in weights(method.teacher.network).items():
            torch.testing.assert_close(value, (before[name] + student[name]) / 2)


@pytest.mark.parametrize("per_epoch", [1, 7])
def test_the_momentum_rises_once_per_epoch(per_epoch):
    method, epochs = build(momentum=0.96, momentum_end=0.99), 300
    found = [method.momentum(at(step, per_epoch, epochs)) for step in range(epochs * per_epoch)]
    epoch = np.arange(epochs)  # the official table
    table = 0.99 + 0.5 * (0.96 - 0.99) * (1 + np.cos(np.pi * epoch / epochs))
    np.testing.assert_allclose(found, table.repeat(per_epoch), rtol=1e-12)
    assert found[0] == 0.96 and found[-1] == pytest.approx(0.99, abs=1e-5)
    assert (np.diff(found) > -1e-12).all()


def test_the_teacher_starts_as_a_copy_or_as_another_network():
    torch.manual_seed(0)
    method = Method(Config(**SMALL, teacher_init="student"), SPEC)
    ours, theirs = weights(method.encoder), weights(method.teacher.network)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert not {id(p) for p in method.encoder.parameters()} & {
        id(p) for p in method.teacher.parameters()
    }
    torch.manual_seed(0)
    method = Method(Config(**SMALL, teacher_init="random"), SPEC)
    theirs = weights(method.teacher.network)
    assert theirs["pos_embed"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(theirs["blocks.0.attn.qkv.weight"], ours["blocks.0.attn.qkv.weight"])
    assert torch.equal(weights(method.encoder)["pos_embed"], ours["pos_embed"])
    method.train()
    assert not method.teacher.network.training and method.encoder.training


def test_paths_are_dropped_in_the_student_alone():
    method = build(tiny.spec(embed_dim=16, depth=3), drop_path=0.25, teacher_init="random")
    rates = {n: m.drop_prob for n, m in method.named_modules() if isinstance(m, DropPath)}
    assert set(rates.values()) == {0.125, 0.25}
    assert all(name.startswith("encoder.blocks.") for name in rates)
    copied = {"drop_path": 0.9, "teacher_init": "student"}  # layers that drop, too
    method = build(tiny.spec(embed_dim=16, depth=3), **copied)
    method.train()
    ids_folds = masked(method)[2]
    with droppath.keyed(method) as draw_by:
        draw_by(tiny.progress(4))
        assert torch.equal(*(method.target(images(), ids_folds) for _ in range(2)))
        found = method.target(images(), ids_folds)
    assert torch.equal(found, method.eval().target(images(), ids_folds))


def test_a_teacher_that_gives_every_image_the_same_stops_the_training(monkeypatch):
    """Its features may still tell places apart."""
    monkeypatch.setattr(collapse, "LEAST_STEPS", 2)
    method = Method(Config(**SMALL), SPEC)
    method.teacher.network.patch_embed.proj.weight.data.zero_()  # positions remain
    with pytest.raises(CollapseError, match="differed between images by less than 0.05"):
        for step in range(4):
            found = method({"view": tiny.images(4, seed=step)}, at(step, 4, 1))
            method.watch.step(at(step, 4, 1))
    assert found["variety"].item() < 0.05 < 0.3 < float(build()(*given())["variety"])


def given():
    return {"view": tiny.images(4)}, tiny.progress(4)


# --- recipe, sizes, pictures ----------------------------------------------------------------------


def test_the_published_recipe():
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in PUBLISHED.items()}
    train = {key: settings.pop(key) for key in ("epochs", "batch_size")}
    config = Config(**settings)
    recipe = Recipe.of(config, train, steps_per_epoch=10)
    assert recipe.lr == pytest.approx(8.0e-4, rel=1e-3) and recipe.warmup == 60 * 10
    assert recipe.lr_at(600) == recipe.lr and recipe.lr_at(2999) == pytest.approx(0, abs=1e-8)
    assert recipe.clip is None and recipe.weight_decay_end is None
    view = views(config, FULL)["view"]
    assert (view.size, tuple(view.scale), view.flip) == (224, (0.2, 1.0), 0.5)


def test_published_parameter_counts():
    sizes = {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    published = {key: PUBLISHED[key] for key in ("decoder_dim", "decoder_depth", "decoder_heads")}
    with torch.device("meta"):
        method = Method(Config(**published), tiny.spec(224, patch_size=16, **sizes))
    count = {
        part: sum(p.numel() for p in getattr(method, part).parameters()) / 1e6
        for part in ("encoder", "teacher", "decoder")
    }
    assert count["encoder"] == count["teacher"] == pytest.approx(85.80, abs=0.01)
    fixed = method.decoder.pos.numel() / 1e6
    assert count["decoder"] + fixed == pytest.approx(26.1, abs=0.05)


def test_pictures_show_each_fold_once(monkeypatch):
    method, x = build(), tiny.images(9, seed=1)
    sheets = []
    monkeypatch.setattr(
        "stages.methods.sdae.contact_sheet", lambda columns: sheets.append(columns) or np.zeros(1)
    )
    method.pictures({"view": x})
    [columns] = sheets
    assert len(columns) == 2 + 3 * 3 and all(column.shape == (8, 3, 16, 16) for column in columns)
    shown = [(column != 0.5).any(1) for column in columns[1::1]]  # places that are not painted
    seen = torch.stack([shown[0], *shown[1::3]]).int().sum(0)
    assert (seen == 1).float().mean() > 0.99  # the student, or one fold
    for fold in range(3):
        alone, wanted, found = columns[2 + 3 * fold : 5 + 3 * fold]
        hidden = (alone == 0.5).all(1, keepdim=True)
        assert (wanted == 0.5).all(1, keepdim=True)[hidden].all()
        assert (found == 0.5).all(1, keepdim=True)[hidden].all()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"folds": 0}, "folds"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum_end": -0.1}, "momentum_end"),
        ({"min_variety": 2.0}, "min_variety"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"decoder_heads": 3}, "decoder_heads"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Config(**values)


def test_config_must_fit_the_model():
    Config(folds=12).check(16, SPEC.model)
    with pytest.raises(ValueError, match="^folds: found 13, expected at most the 12 hidden"):
        Config(folds=13).check(16, SPEC.model)
    with pytest.raises(ValueError, match="^mask_ratio"):
        Config(mask_ratio=0.95).check(8, SPEC.model)
