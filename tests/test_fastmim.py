"""FastMIM and FastMIM-P: what the paper (arXiv 2212.06593) and its official code say, against
independent calculations. MaskFeat's HOG is in test_maskfeat.py, growing steps in test_growth.py.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stages.kit.nets import encoders
from stages.kit.nets.patches import patchify
from stages.kit.parts.maskfeat import hog, to_tokens
from stages.kit.train import optim
from stages.kit.train.recipe import Recipe
from stages.methods import fastmim, fastmimp
from tests import tiny

SMALL = {"decoder_dim": 16, "decoder_heads": 2}
SWIN = {"patch_size": 2, "embed_dim": 8, "depth": (1, 2), "num_heads": (1, 2), "window_size": 4}
MODELS = {"vit": {"depth": 3}, "swin": SWIN, "pvt": {"depth": (1, 2)}}
FAMILIES = ["vit", "swin", "pvt"]


def build(kind="vit", size=32, module=fastmim, seed=0, changes=None, **config):
    """A method in which nothing is zero or one that could hide a mistake."""
    torch.manual_seed(seed)
    spec = tiny.spec(size, kind, **{**MODELS[kind], **(changes or {})})
    module.Config(**config).check(size, spec.model)
    method = module.Method(module.Config(**{**SMALL, **config}), spec).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return method


def batch(rows=4, size=32):
    return {"view": tiny.images(rows, size, seed=1)}


def masking(method, rows=4, size=32, step=3):
    noise = tiny.progress(rows, step=step).uniform("mask", (size // method.block) ** 2)
    return method.mask(noise)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "model", "block", "blocks", "kept"),
    [
        ("vit", 128, {"patch_size": 16, "depth": 1}, 16, 64, 16),
        (
            "swin",
            128,
            {"patch_size": 4, "depth": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
            32,
            16,
            4,
        ),
    ],
)
def test_the_papers_counts(kind, size, model, block, blocks, kept):
    method = build(kind, size, changes=model)
    assert method.block == block and method.cell == 8
    mask = masking(method, 5, size)
    assert mask[0].numel() == blocks
    assert torch.equal((mask == 0).sum((1, 2, 3)), torch.full((5,), kept))
    assert len({tuple(row) for row in mask.flatten(1).tolist()}) == 5
    predicted = method.predict(torch.randn(5, 3, size, size), mask)
    assert predicted.shape == (5, 27, 16, 16)
    out = {"vit": 108, "swin": 432}[kind]
    assert method.decoder[-1].out_features == out


def test_masks_repeat_for_a_step_and_differ_between_steps():
    method = build()
    assert torch.equal(masking(method), masking(method))
    assert not torch.equal(masking(method), masking(method, step=4))


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_painted_pixels_do_not_reach_the_prediction(kind):
    """Not a bit of them, also where patches overlap; the colour does."""
    method, mask = build(kind), masking(build(kind))
    images = torch.randn(4, 3, 32, 32)
    before = method.predict(images, mask)
    times = 32 // mask.shape[-1]
    behind = mask.repeat_interleave(times, 2).repeat_interleave(times, 3) > 0
    assert torch.equal(method.predict(torch.where(behind, 5.0, images), mask), before)
    assert not torch.allclose(method.predict(torch.where(behind, images, 5.0), mask), before)
    painted = method.painted(images, mask)
    assert torch.equal(painted[~behind.expand_as(painted)], images[~behind.expand_as(images)])
    for c in range(3):
        assert (painted[:, c][behind[:, 0]] == method.colour[0, c]).all()
    method.colour += 1
    assert not torch.allclose(method.predict(images, mask), before)


def test_the_colour_learns_and_is_decayed():
    method = build()
    assert method.colour.shape == (1, 3, 1, 1)
    method(batch(), tiny.progress(4))["loss"].backward()
    assert (method.colour.grad != 0).all()
    assert any(p is method.colour for p in optim.groups(method, 0.05)[0]["params"])


# --- targets and loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("predict", ["hog", "pixels"])
@pytest.mark.parametrize("norm", [True, False])
def test_the_loss_is_that_of_the_official_tokens(kind, predict, norm):
    """The published layout, place by place: the mean over hidden places of all their numbers."""
    method = build(kind, predict=predict, norm=norm)
    data, progress, mask = batch(), tiny.progress(4), masking(build(kind))
    images = method.spec.normalise(data["view"])
    stride, cells = method.stride, method.stride // 4
    tokens = method.encoder.forward_features(method.painted(images, mask))
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    predicted = method.decoder(tokens)[:, 1 if kind == "vit" else 0 :].double()
    if predict == "hog":
        truth = to_tokens(hog(images, 4, norm), cells).double()
    else:
        truth = patchify(images, stride).double()
        if norm:
            mean, var = truth.mean(2, keepdim=True), truth.var(2, keepdim=True)
            truth = (truth - mean) / (var + 1e-6).sqrt()
    assert predicted.shape == truth.shape
    error = (predicted - truth).square().mean(2)
    expected = (error * mask.flatten(1)).sum() / mask.sum()
    assert method(data, progress)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_hidden_places_have_a_loss(monkeypatch):
    method, seen = build(), {}
    predict = method.predict
    keep = lambda *args: seen.setdefault("predicted", predict(*args))  # noqa: E731
    monkeypatch.setattr(method, "predict", keep)
    out = method(batch(), tiny.progress(4))
    (gradient,) = torch.autograd.grad(out["loss"], seen["predicted"])
    hidden = masking(method)[:, 0] > 0  # a block is a patch of 4 pixels, and so is a cell
    reached = (gradient != 0).any(dim=1)
    assert torch.equal(reached, hidden)


def test_a_perfect_prediction_costs_nothing_and_is_alike(monkeypatch):
    method = build()
    truth = method.target(method.spec.normalise(batch()["view"]))
    monkeypatch.setattr(method, "predict", lambda *args: truth)
    out = method(batch(), tiny.progress(4))
    assert out["loss"] == 0 and out["cosine"].item() == pytest.approx(1, abs=1e-6)
    assert not truth.requires_grad


@pytest.mark.parametrize(("block", "cell"), [(16, 4), (4, 4), (4, 2), (8, 8)])
def test_blocks_larger_and_smaller_than_a_token(block, cell):
    """Errors count by cells: with blocks of half a token, half of its cells may be hidden."""
    method = build("swin", changes={"patch_size": 4}, block=block, cell=cell, mask_ratio=0.5)
    images, mask = torch.randn(4, 3, 32, 32), masking(method)
    assert mask.shape == (4, 1, 32 // block, 32 // block)
    n = 32 // cell
    error = (method.predict(images, mask) - method.target(images)).square().mean(1)
    total = count = 0.0
    for b in range(4):
        for y in range(n):
            for x in range(n):
                if mask[b, 0, y * cell // block, x * cell // block]:
                    total, count = total + error[b, y, x].item(), count + 1
    pixels = method.spec.denormalise(images)
    found = method({"view": pixels}, tiny.progress(4))["loss"].item()
    assert found == pytest.approx(total / count, rel=1e-3)


# --- encoder and decoder --------------------------------------------------------------------------


def test_published_sizes():
    """ViT-B at 128 pixels: 85.65 M trained in the encoder, 1.01 M in the decoder."""
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in fastmim.PUBLISHED.items()}
    del given["epochs"], given["batch_size"]
    vit_b = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    config = fastmim.Config(**given)
    with torch.device("meta"):
        method = fastmim.Method(config, tiny.spec(224, **vit_b).at(config.input_size))
    trained = sum(p.numel() for p in method.encoder.parameters() if p.requires_grad)
    assert trained / 1e6 == pytest.approx(85.65, abs=0.01)
    assert sum(p.numel() for p in method.decoder.parameters()) / 1e6 == pytest.approx(
        1.01, abs=0.01
    )
    assert method.spec.grid == 8 and method.cell == 8
    recipe = Recipe.of(config, {"epochs": 800, "batch_size": 4096}, 312)
    assert recipe.lr == pytest.approx(2.4e-3) and recipe.warmup == 20 * 312
    assert (recipe.clip, recipe.weight_decay, recipe.betas) == (None, 0.05, (0.9, 0.95))


def test_the_decoder_sees_the_class_token_and_predicts_nothing_of_it():
    method, images = build(), torch.randn(2, 3, 32, 32)
    tokens = method.encoder.forward_features(images)
    given = tokens.clone()
    given[:, 0] += 1
    assert not torch.allclose(method.decoder(tokens)[:, 1:], method.decoder(given)[:, 1:])
    assert tokens.shape[1] == 65 and method.predict(images, masking(method, 2)).shape[2:] == (8, 8)


@pytest.mark.parametrize("kind", FAMILIES)
def test_discarded_blocks_are_neither_used_nor_trained_but_exported(kind, tmp_path):
    method = build(kind, discard=1)
    stage = method.encoder.blocks if kind == "vit" else method.encoder.layers[-1].blocks
    last, kept = stage[-1], stage[-2]
    method(batch(), tiny.progress(4))["loss"].backward()
    assert not any(p.requires_grad for p in last.parameters())
    assert all(p.grad is not None for p in kept.parameters() if p.requires_grad)
    images, mask = torch.randn(2, 3, 32, 32), masking(method, 2)
    before = method.predict(images, mask)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.add_(1)
    assert torch.equal(method.predict(images, mask), before)
    number = sum(encoders.depths(method.encoder)) - 1
    taps = encoders.masked(method.encoder, images, None, None, taps=(number,))["taps"][number]
    tokens = method.trained[0].forward_features(images)
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    torch.testing.assert_close(tokens, method.encoder.norm(taps), atol=1e-4, rtol=1e-4)
    assert len(method.state_dict()) == len({*method.state_dict()}) == len(build(kind).state_dict())
    encoders.save(method.encoder, tmp_path, method.spec)
    loaded = encoders.load(tmp_path).eval()
    assert torch.equal(loaded.forward_features(images), method.encoder.forward_features(images))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_weights_run_at_the_datas_size(kind, tmp_path):
    """Pretrained at half the side, loaded for the whole of it: finite, and a token a place."""
    method = build(kind, 16)
    encoders.save(method.encoder, tmp_path, method.spec)
    loaded = encoders.load(tmp_path, img_size=32).eval()
    patch = encoders.features(loaded, torch.randn(2, 3, 32, 32))["patch"]
    assert patch.shape[1] == method.spec.at(32).grid ** 2 and patch.isfinite().all()


def test_half_the_side_costs_a_quarter():
    """Of the linear layers' products; attention's fall faster."""
    from stages.kit.train import flops

    found = []
    for size in (32, 64):
        # Narrow heads and few tokens, so that attention hardly counts
        method = build("vit", size, changes={"embed_dim": 256, "patch_size": 8, "num_heads": 4})
        with flops.counting() as counter, torch.no_grad():
            method(batch(2, size), tiny.progress(2))
        found.append(counter.get_total_flops())
    assert found[0] / found[1] == pytest.approx(0.25, abs=0.02)


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["hog", "pixels"])
def test_the_picture_of_a_perfect_prediction_is_the_target_where_hidden(predict, monkeypatch):
    method = build(predict=predict)
    pixels = batch(3)["view"]
    truth = method.target(method.spec.normalise(pixels))
    monkeypatch.setattr(method, "predict", lambda *args: truth)
    sheet = method.pictures({"view": pixels})["predictions"]
    column = 96 + 4
    assert sheet.shape == (3 * column - 4, 4 * column - 4, 3)
    original, seen, wanted, found = (
        sheet[:, i * column : i * column + 96].astype(int) for i in range(4)
    )
    changed = (seen != original).any(-1)[:96]
    assert changed.mean() == pytest.approx(0.75, abs=0.02)
    same = (abs(found - wanted) <= 1).all(-1)[:96]
    assert same[changed].all()
    if predict == "hog":
        assert (found[:96][~changed] == 128).all()
    else:
        assert abs(found - original).max() <= 1


# --- FastMIM-P ------------------------------------------------------------------------------------


def test_sizes_batches_and_rates_follow_the_training():
    config = fastmimp.Config(lr=1e-3, lr_per=8, warmup=0.0)
    spec = tiny.spec(64, patch_size=8)
    recipe = Recipe.of(config, {"epochs": 10, "batch_size": 8}, 10)
    rows = []
    for step in range(recipe.steps):
        view = fastmimp.views(config, spec, step / recipe.steps)["view"]
        rows.append((view.size, recipe.batches.batches(step), recipe.lr_at(step)))
    assert [row[0] for row in rows] == [32] * 50 + [48] * 30 + [64] * 20
    assert [row[1] for row in rows] == [4] * 50 + [2] * 30 + [1] * 20
    for step, (_, count, rate) in enumerate(rows):
        cosine = 0.5 * (1 + np.cos(np.pi * step / 100))
        assert rate == pytest.approx(1e-3 * count * cosine, rel=1e-9)
    # where the rate is not one for so many images, it does not follow their number
    train = {"epochs": 10, "batch_size": 8}
    still, plain = (Recipe.of(m.Config(lr_per=None), train, 10) for m in (fastmimp, fastmim))
    assert [still.lr_at(step) for step in range(100)] == [plain.lr_at(step) for step in range(100)]
    tokens = [(size // 8) ** 2 * count for size, count, _ in rows]
    assert max(tokens) <= 1.2 * min(tokens)  # a step's work stays about the same


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_training_sees_all_sizes(kind):
    method = build(kind, module=fastmimp)
    for size in (16, 24, 32):
        out = method(batch(4, size), tiny.progress(4))
        assert out["loss"].isfinite()
        assert (
            method.predict(torch.randn(2, 3, size, size), masking(method, 2, size)).shape[2:]
            == (size // method.cell,) * 2
        )


def test_at_full_size_it_is_fastmim():
    plain, grows = build(), build(module=fastmimp)
    grows.load_state_dict(plain.state_dict())
    found, expected = (m(batch(), tiny.progress(4))["loss"].item() for m in (grows, plain))
    assert found == pytest.approx(expected, rel=1e-6)


def test_each_size_is_compiled_once():
    """torch.compile with fixed shapes: a graph for each size, none for a step."""
    from torch._dynamo.utils import counters

    from stages.kit.train import compiled

    torch._dynamo.reset()
    counters.clear()
    method, graphs = build(size=16, module=fastmimp).train(), []
    forward = compiled.forward(method, lambda text: pytest.fail(text), "eager")
    for step in range(9):
        size = (8, 12, 16)[step // 3]
        forward(batch(2, size), tiny.progress(2, step=step))
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    for phase in range(3):  # the first step of a size compiles; the two after it do not
        assert len(set(graphs[3 * phase : 3 * phase + 3])) == 1, graphs
    assert graphs[0] < graphs[3] < graphs[6] <= 3 * graphs[0]


def test_stopped_at_any_step_it_ends_with_the_same_bytes(tmp_path):
    """Also between two sizes, and inside a step of several batches nothing is lost."""
    from test_processes import Pictures

    from stages.kit.data.loader import Batches
    from stages.kit.train.loop import fit

    def trained(name: str, stop: int | None):
        torch.manual_seed(0)
        config = fastmimp.Config(**SMALL, lr_per=None)
        spec = tiny.spec(32, depth=1)
        method = fastmimp.Method(config, spec)
        batches = Batches(
            Pictures(32),
            lambda fraction: fastmimp.views(config, spec, fraction),
            4,
            3,
            micro=2,
            workers=0,
            epochs=3,
            growth=config.growth,
        )
        recipe = Recipe.of(
            config,
            {"epochs": 3, "batch_size": 4, "precision": "fp32", "save_minutes": 1e9},
            batches.steps_per_epoch,
        )
        run = tiny.run(tmp_path / name)
        if stop is not None:
            import os
            import signal

            plain = method.forward

            def forward(data, progress):
                if progress.step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return plain(data, progress)

            method.forward = forward
        try:
            fit(method, batches, recipe, run, seed=3)
        except SystemExit as left:
            assert left.code == 143
            return trained(name, None)
        rows = (run.out / "history.jsonl").read_text()
        return method.state_dict(), rows, run.summary

    state, rows, summary = trained("straight", None)
    assert len(rows.splitlines()) == 12
    # 6 steps of 4 batches, 4 of 2 and 2 of 1, each of 4 images
    assert summary["images_seen"] == (6 * 4 + 4 * 2 + 2 * 1) * 4
    losses = [json.loads(row)["loss"] for row in rows.splitlines()]
    assert all(np.isfinite(losses))
    for stop in (2, 5, 6, 10):
        again, found, other = trained(f"stopped-{stop}", stop)
        assert found == rows and all(torch.equal(again[key], state[key]) for key in state)
        assert other["images_seen"] == summary["images_seen"]
        assert other["flops_per_image"] == summary["flops_per_image"]


def test_flops_are_those_of_all_sizes(tmp_path):
    """The mean over the images of every size, each counted in its first step."""
    from test_processes import Pictures

    from stages.kit.data.loader import Batches
    from stages.kit.train import flops
    from stages.kit.train.loop import fit

    config, spec = fastmimp.Config(**SMALL), tiny.spec(32, depth=1)
    found = {}
    for size in (16, 24, 32):
        torch.manual_seed(0)
        method = fastmimp.Method(config, spec).train()
        with flops.counting() as counter:
            method(batch(4, size), tiny.progress(4))["loss"].backward()
        found[size] = counter.get_total_flops() / 4
    torch.manual_seed(0)
    method = fastmimp.Method(config, spec)
    views = lambda fraction: fastmimp.views(config, spec, fraction)  # noqa: E731
    how = {"workers": 0, "epochs": 3, "growth": config.growth}
    batches = Batches(Pictures(32), views, 4, 3, **how)
    recipe = Recipe.of(config, {"epochs": 3, "batch_size": 4}, batches.steps_per_epoch)
    run = tiny.run(tmp_path)
    fit(method, batches, recipe, run, seed=0)
    mean = (24 * found[16] + 8 * found[24] + 2 * found[32]) / 34
    assert run.summary["flops_per_image"] == pytest.approx(mean, rel=1e-6)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "values", "message"),
    [
        (fastmim, {"mask_ratio": 0.0}, "^mask_ratio: found"),
        (fastmim, {"block": 0}, "^block: found"),
        (fastmim, {"discard": -1}, "^discard: found"),
        (fastmimp, {"sizes": (0.5, 1.0)}, "^until: found 2 entries, expected 1"),
        (fastmimp, {"batches": (2, 1)}, "^batches: found 2 entries, expected 3"),
        (fastmimp, {"sizes": (0.75, 0.5, 1.0)}, "^sizes: found .* expected rising"),
        (fastmimp, {"sizes": (0.25, 0.5, 0.75)}, "^sizes: found .* expected 1.0 as the last"),
        (fastmimp, {"until": (0.8, 0.5)}, "^until: found .* expected rising"),
    ],
)
def test_bad_config(module, values, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"block": 5},
            "^block: found 5 pixels, expected a divisor of image_size 32 and a multiple",
        ),
        ({"block": 2}, "^block: found 2 pixels"),
        ({"cell": 3}, "^cell: found 3, expected a divisor of a token's 4 pixels"),
        ({"discard": 3}, "^discard: found 3, expected less than the 3 blocks of model.depth"),
        ({"mask_ratio": 0.99}, "^mask_ratio: found 0.99, which hides"),
    ],
)
def test_config_must_fit_the_model(values, message):
    fastmim.Config(block=16).check(32, tiny.model(depth=3))  # four squares, of which one is seen
    with pytest.raises(ValueError, match=message):
        fastmim.Config(**values).check(32, tiny.model(depth=3))


def test_fastmimp_needs_an_encoder_of_several_sizes():
    takes = {
        kind
        for kind in ("vit", "swin", "pvt", "convvit")
        if fastmimp.NEEDS <= tiny.module(kind, "encoder").CAN
    }
    assert takes == {"vit", "swin", "pvt"} and not fastmim.NEEDS
