"""Facts of MoCo v3 (arXiv 2104.02057 and its official code): start, keys, loss, norms, views."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from warm import Workers

from stages.kit import dist
from stages.kit.nets import encoders
from stages.kit.nets.batchnorm import BatchNorm
from stages.kit.parts import collapse, contrast
from stages.kit.parts.collapse import CollapseError
from stages.kit.parts.contrast import InformationWatch, head, info_nce
from stages.kit.spec import configure
from stages.kit.train import optim
from stages.kit.train.recipe import Recipe
from stages.methods import mocov3 as method
from stages.targets import mocov3
from tests import tiny

SMALL = dict(hidden=24, dim=12)
# whose defaults are of short runs, so that PUBLISHED must have them
TRAIN = ("epochs", "batch_size")
TUNED = {"hidden", "dim", "momentum", "crop_min", "lr", "lr_per", "warmup"}
progress = tiny.progress


def spec(image_size: int = 16, **model):
    return tiny.spec(image_size, **{"embed_dim": 16, **model})


def training(seed: int = 0, **changes) -> mocov3.Training:
    torch.manual_seed(seed)
    return mocov3.Training(mocov3.Config(**{**SMALL, **changes}), spec())


def batch(size: int = 8, seed: int = 0) -> dict:
    """Noise, another for each view."""
    return {view: tiny.images(size, seed=100 * seed + i) for i, view in enumerate(contrast.VIEWS)}


def trained(model, steps: int = 3, lr: float = 1e-2, watch=lambda step: None):
    """Steps of AdamW, with the model's own groups."""
    groups = optim.build(
        Recipe(1, 8, steps, lr=lr, weight_decay=0.1), model.param_groups(0.1), torch.device("cpu")
    )
    for step in range(steps):
        watch(step)
        groups.zero_grad()
        model(batch(seed=step), progress(step=step, steps=steps))["loss"].backward()
        groups.step()
        model.after_step(progress(step=step, steps=steps))
    return model


def weights(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the network ----------------------------------------------------------------------------------


def test_head_sizes():
    """20.99 M and 2.11 M at width 768; gains and shifts but in the last norm; no biases."""
    projector, predictor = head(768, 4096, 256, layers=3), head(256, 4096, 256, layers=2)
    count = [sum(p.numel() for p in part.parameters()) for part in (projector, predictor)]
    assert count[0] == 768 * 4096 + 4096**2 + 4096 * 256 + 2 * 2 * 4096 == 20_987_904
    assert count[1] == 2 * 256 * 4096 + 2 * 4096 == 2_105_344
    for part, layers in ((projector, 3), (predictor, 2)):
        kinds = [type(layer) for layer in part]
        assert kinds == [nn.Linear, BatchNorm, nn.ReLU] * (layers - 1) + [nn.Linear, BatchNorm]
        assert all(layer.bias is None for layer in part if isinstance(layer, nn.Linear))
        affine = [layer.weight is not None for layer in part if isinstance(layer, BatchNorm)]
        assert affine == [True] * (layers - 1) + [False]


def test_start_is_that_of_the_official_code():
    torch.manual_seed(0)
    encoder = training().query.encoder
    wide = mocov3.Training(mocov3.Config(**SMALL), spec(embed_dim=64, depth=3)).query.encoder
    for vit, width in ((encoder, 16), (wide, 64)):
        bound = math.sqrt(6 / (3 * 4**2 + width))
        patch = vit.patch_embed.proj
        assert (
            0.9 * bound < float(patch.weight.detach().abs().max()) <= bound and not patch.bias.any()
        )
        assert float(patch.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert 0 < float(vit.cls_token.detach().abs().max()) < 1e-5
        for block in vit.blocks:
            bound = math.sqrt(6 / (3 * width / 3 + width))  # of q, k and v, each for itself
            found = block.attn.qkv.weight.detach()
            assert 0.95 * bound < float(found.abs().max()) <= bound
            bound = math.sqrt(6 / (width + 2 * width))  # the tiny mlp_ratio
            assert 0.95 * bound < float(block.mlp.fc1.weight.detach().abs().max()) <= bound
            layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            assert not any(layer.bias.any() for layer in layers)


def test_positions_are_fixed_sin_cos():
    """Statement 6 of the card: on a grid of 2 x 2, with a zero row for the class token."""
    model = mocov3.Training(mocov3.Config(**SMALL), spec(8, embed_dim=8))
    table = model.query.encoder.pos_embed
    assert not table.requires_grad and table.shape == (1, 5, 8) and not table[0, 0].any()
    for place in range(4):
        row, column = divmod(place, 2)
        angles = [1.0, 10000.0 ** (-1 / 2)]
        expected = [f(x * w) for x in (column, row) for f in (math.sin, math.cos) for w in angles]
        assert table[0, 1 + place].tolist() == pytest.approx(expected, abs=1e-6)
    assert len({tuple(row) for row in table[0].tolist()}) == 5


def test_patch_projection_stays_and_is_the_same_in_both_branches():
    """Statement 1 of the card."""
    model = training()
    before, start = weights(model.query.encoder), weights(model.key_encoder)
    trained(model)
    for encoder in (model.query.encoder, model.key_encoder):
        found = encoder.patch_embed.proj
        for name in ("weight", "bias"):
            assert torch.equal(getattr(found, name), before[f"patch_embed.proj.{name}"])
        assert torch.equal(encoder.pos_embed, before["pos_embed"])
    assert not torch.equal(model.query.encoder.cls_token, before["cls_token"])
    assert not torch.equal(model.key_encoder.cls_token, start["cls_token"])
    free = training(freeze_patches=False)
    before = free.query.encoder.patch_embed.proj.weight.clone()
    assert not torch.equal(trained(free).query.encoder.patch_embed.proj.weight, before)


def test_heads_of_vit_small():
    """12 heads, as published: the same shapes as with 6, but another function."""
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "mlp_ratio": 4.0}
    with torch.device("meta"):
        made = [
            method.Method(method.Config(**SMALL), tiny.spec(224, num_heads=heads, **sizes)).encoder
            for heads in (6, 12)
        ]
    shapes = [{name: x.shape for name, x in vit.state_dict().items()} for vit in made]
    assert shapes[0] == shapes[1]
    assert [vit.blocks[0].attn.num_heads for vit in made] == [6, 12]
    count = sum(p.numel() for p in made[1].parameters())
    assert count == 21_665_664  # the trunk of DeiT-S


# --- queries and keys -----------------------------------------------------------------------------


def test_keys_have_no_gradient_and_there_is_one_predictor():
    """Statement 2 of the card."""
    model = training()
    keys = model.keys(torch.cat(list(batch().values())))
    assert not any(k.requires_grad for k in keys)
    model(batch(), progress())["loss"].backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("key_") or "patch_embed" in name or name.endswith("pos_embed")
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
    assert sum(isinstance(part, nn.Sequential) for part in model.children()) == 3
    assert {name for name, _ in model.named_children()} == {
        "query",
        "projector",
        "predictor",
        "key_encoder",
        "key_projector",
        "watch",
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_keys_follow_before_they_are_made(momentum, monkeypatch):
    """Statement 3 of the card, for each step's forward pass: with m = 1 the keys' network is
    constant, with m = 0 it is the queries' of before the step, else in between by m.
    """
    monkeypatch.setattr(contrast.ema, "momentum", lambda base, fraction: base)
    model, seen = training(momentum=momentum), []

    def watch(step):
        parts = (model.query.encoder, model.projector, model.key_encoder, model.key_projector)
        seen.append([weights(part) for part in parts])

    trained(model, steps=4, watch=watch)
    first = seen[0]
    for into, of in ((2, 0), (3, 1)):
        assert all(torch.equal(value, first[of][name]) for name, value in first[into].items())
    for before, now in zip(seen, seen[1:], strict=False):
        for own, theirs in ((2, 0), (3, 1)):
            for name, value in now[own].items():
                expected = momentum * before[own][name] + (1 - momentum) * now[theirs][name]
                torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-5, msg=name)
    moved = not torch.equal(seen[-1][2]["cls_token"], seen[0][2]["cls_token"])
    assert moved is (momentum < 1)


def test_momentum_of_a_step_rises_as_half_a_cosine(monkeypatch):
    """The keys of step s are made with m(s / steps), as officially, for s from 1."""
    used = []
    monkeypatch.setattr(contrast.ema, "update", lambda teacher, student, m: used.append(m))
    model = training(momentum=0.99)
    for step in range(10):
        model.after_step(progress(step=step, steps=10))
    official = [1 - 0.5 * (1 + math.cos(math.pi * s / 10)) * (1 - 0.99) for s in range(1, 11)]
    assert used[::2] == used[1::2] == pytest.approx(official, abs=1e-12)


# --- the loss -------------------------------------------------------------------------------------


def by_hand(model, x: dict) -> tuple[float, float]:
    """Loss and accuracy in float64, number by number."""
    with torch.no_grad():
        images = torch.cat([x[view] for view in contrast.VIEWS])
        queries = [q.double() for q in model.queries(images)]
        keys = [k.double() for k in model.keys(images)]
    loss, right, t = 0.0, 0, model.config.temperature
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for i in range(len(q)):
            scores = [math.exp(float(q[i] @ k[j]) / t) for j in range(len(k))]
            loss -= 2 * t * math.log(scores[i] / sum(scores)) / len(q)
            right += max(range(len(k)), key=scores.__getitem__) == i
    return loss, right / (2 * len(q))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_by_hand(temperature):
    model = trained(training(temperature=temperature))
    out = model(batch(seed=9), progress())
    loss, accuracy = by_hand(model, batch(seed=9))
    assert float(out["loss"].detach()) == pytest.approx(loss, rel=1e-5)
    assert float(out["accuracy"]) == accuracy
    entropy = loss / (4 * temperature)
    assert float(out["information"].detach()) == pytest.approx(math.log(8) - entropy, abs=1e-5)


def test_random_features_cost_four_temperatures_times_the_logarithm_of_the_batch():
    """Statement 4 of the card: 0.8 ln B at T = 0.2, for random directions."""
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(512, 256, generator=generator), dim=1) for _ in range(2))
    entropy, accuracy = info_nce(q, k, 0.2)
    assert float(4 * 0.2 * entropy) == pytest.approx(0.8 * math.log(512), rel=0.02)
    assert float(accuracy) < 0.02
    same, accuracy = info_nce(q, q, 0.2)
    assert float(accuracy) == 1  # cosines 1 and, on average, 0
    assert float(same) == pytest.approx(math.log(1 + 511 * math.exp(-1 / 0.2)), rel=0.05)


def test_queries_are_compared_with_keys_of_the_other_view_only():
    """Pairs are made of the views of an image; keys of the same view are no negatives."""
    generator = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(6, 4, generator=generator), dim=1)
    for place in range(3):  # of this rank's 4 queries among 6 keys
        loss, accuracy = info_nce(k[place : place + 3], k, 0.01, place)
        assert float(accuracy) == 1 and float(loss) < 1e-2
    loss, accuracy = info_nce(k[:3], k, 0.01, 3)
    assert float(accuracy) == 0 and float(loss) > 1


def test_swapped_views_have_the_same_loss():
    """Statement 8 of the card: the norms see each view by itself, so nothing changes."""
    model, x = trained(training()), batch(seed=9)
    swapped = {"view1": x["view2"], "view2": x["view1"]}
    torch.testing.assert_close(model(x, progress())["loss"], model(swapped, progress())["loss"])


def test_gradient_of_the_loss_does_not_depend_on_the_temperatures_scale():
    """The factor 2 T: for nearly equal similarities the gradient is that of their difference."""
    gradients = []
    for temperature in (5.0, 50.0):
        q = F.normalize(torch.eye(4) + 0.1, dim=1).requires_grad_()
        (4 * temperature * info_nce(q, torch.eye(4), temperature)[0]).backward()
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients, rtol=0.1, atol=1e-2)


# --- norms and ranks ------------------------------------------------------------------------------


def test_projector_gives_zero_mean_and_unit_variance():
    """Statement 7 of the card, for each view by itself, in training and in evaluation."""
    for mode in (True, False):
        model = training().train(mode)
        for images in batch(size=16).values():
            found = model.projector(model.query.classes(images)).detach()
            torch.testing.assert_close(found.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                found.var(0, correction=0), torch.ones(12), atol=0.02, rtol=0
            )


def test_norm_is_torchs_in_training_without_running_statistics():
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5)
    x = 3 + 2 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    y = x.clone().requires_grad_()
    x.requires_grad_()
    wanted = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    for norm in (ours, theirs):
        norm.weight.data.copy_(torch.arange(5.0))
        norm.bias.data.copy_(torch.arange(5.0) - 2)
    found, expected = ours(x), theirs(y)
    torch.testing.assert_close(found, expected)
    (found * wanted).sum().backward()
    (expected * wanted).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert not list(ours.buffers()) and torch.equal(ours.eval()(x), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.float32 and torch.equal(ours(x), found)


def one_step(size: int) -> dict:
    """Loss, accuracy and the mean gradients over ranks for this rank's share of a batch."""
    dist.start()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = training()
    for parameter in model.key_projector.parameters():  # so that keys are no copies of queries
        parameter.data.add_(0.1 * torch.ones_like(parameter).cumsum(0).sin())
    share = {name: x.double().chunk(world)[rank] for name, x in batch(size).items()}
    out = model(share, progress())
    out["loss"].backward()
    means = {name: dist.mean(value.detach().clone()) for name, value in out.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            means[name] = dist.mean(parameter.grad.clone())
    return {name: value.tolist() for name, value in means.items()}


def test_two_processes_do_what_one_does_with_their_batches():
    """Statement 5 of the card: logits, labels, norms and their gradients, in float64."""
    found = []
    for world in (1, 2):
        workers = Workers(world, double=True)
        try:
            found.append(workers.call(one_step, 8)[0])
        finally:
            workers.close()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[0].items():
        ours, theirs = (torch.tensor(each, dtype=torch.float64) for each in (value, found[1][name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)
    assert found[0]["loss"] > 0.1


def test_a_batch_is_never_cut():
    assert "compared with all others" in training().whole_batch


# --- training -------------------------------------------------------------------------------------


def test_all_that_is_trained_is_decayed():
    model = training()
    [group] = model.param_groups(0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in group["params"]}
    assert group["weight_decay"] == 0.1
    assert {"query.encoder.cls_token", "query.encoder.norm.bias", "projector.1.weight"} <= found
    assert found == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("key_") for name in found)


def test_it_learns_to_find_its_keys():
    """Views of different images that share a colour: chance is 1 in 8."""
    torch.manual_seed(0)
    model = training(momentum=0.9)
    step = optim.build(
        Recipe(1, 8, 40, lr=5e-3, weight_decay=0.0), model.param_groups(0.0), torch.device("cpu")
    )
    last = []
    for number in range(40):
        colours = tiny.images(8, 1, seed=number)
        noise = [tiny.images(8, seed=1000 + 2 * number + i) for i in range(2)]
        x = {v: (0.8 * colours + 0.2 * n) for v, n in zip(contrast.VIEWS, noise, strict=True)}
        step.zero_grad()
        out = model(x, progress(step=number, steps=40))
        out["loss"].backward()
        step.step()
        model.after_step(progress(step=number, steps=40))
        last.append((out["loss"].item(), out["accuracy"].item()))
    losses, accuracies = zip(*last[-10:], strict=True)
    assert sum(losses) / 10 < 0.6 * 0.8 * math.log(8) and sum(accuracies) / 10 > 0.6
    assert 0.1 < float(model.target.information) < 1


def test_method_and_target_are_one_implementation():
    models = []
    for module, build in ((mocov3, mocov3.Training), (method, method.Method)):
        torch.manual_seed(0)
        models.append(trained(build(module.Config(**SMALL), spec())))
    assert mocov3.views is method.views and mocov3.PUBLISHED == method.PUBLISHED
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert models[1].encoder is models[1].query.encoder
    assert models[0].target is models[0].query
    config = dataclasses.asdict(mocov3.Config())
    config.pop("min_rank")
    assert config == dataclasses.asdict(method.Config())


def test_the_published_recipe_keeps_nothing_of_the_tuned_defaults():
    published = method.PUBLISHED
    assert published.keys() >= TUNED
    assert [published[key] for key in ("hidden", "dim", "momentum")] == [4096, 256, 0.99]
    settings = {key: value for key, value in published.items() if key not in TRAIN}
    config = configure(method.Config, settings)
    recipe = Recipe.of(config, {key: published[key] for key in TRAIN}, steps_per_epoch=100)
    assert recipe.lr == pytest.approx(2.4e-3)
    # officially lr * epoch / 40, then half a cosine over 260 epochs
    assert recipe.lr_at(20 * 100) == pytest.approx(1.2e-3, rel=1e-3)
    cosine = 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (170 - 40) / 260))
    assert recipe.lr_at(170 * 100) == pytest.approx(cosine, rel=1e-3)


# --- views, target, health, pictures --------------------------------------------------------------


def test_views_of_the_paper_and_of_tiny_images():
    large = spec(224, patch_size=16)
    found = method.views(method.Config(crop_min=0.08), large)
    assert list(found) == ["view1", "view2"]
    assert [view.blur for view in found.values()] == [1.0, 0.1]
    assert [view.solarise for view in found.values()] == [0.0, 0.2]
    for view in found.values():
        assert view.size == 224 and view.scale == (0.08, 1.0) and view.flip == 0.5
        assert view.jitter == (0.4, 0.4, 0.2, 0.1) and view.jitter_p == 0.8 and view.grey == 0.2
        assert view.blur_sigma == (0.1, 2.0)
    small = method.views(method.Config(), spec(32))
    assert not any(view.blur for view in small.values())
    assert method.Config().views_per_image == 2


def test_target_gives_what_the_encoder_sees():
    target, x = training().target, tiny.images(3)
    found = target(x, "patch", "cls", "attention", "layers", layers=(1, -1))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec().mean, spec().std))
    images = (x - mean) / std
    tokens = target.encoder.forward_features(images)
    torch.testing.assert_close(found["patch"], tokens[:, 1:])
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    whole = encoders.attention(target.encoder, images)
    torch.testing.assert_close(found["attention"], whole[:, :, 0, 1:])
    states = target.encoder.forward_intermediates(
        images, output_fmt="NLC", intermediates_only=True, norm=False
    )
    for ours, theirs in zip(found["layers"], states, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert target.depth == 2 and target.sizes["layers"] == 16


def test_health_of_live_and_dead_encoders():
    target = trained(training()).target
    config = mocov3.Config(**SMALL, min_rank=1.5)
    target.information.fill_(0.5)
    given = [tiny.images(16, seed=i) for i in range(2)]
    found = mocov3.health(target, iter(given), config)
    assert found["problems"] == [] and found["information"] == 0.5
    assert found["rank"] > 1.5 and found["cls_rank"] > 1
    target.information.fill_(0.001)
    [problem] = mocov3.health(target, iter(given), config)["problems"]
    assert "min_information" in problem
    free = dataclasses.replace(config, min_information=0.0)
    assert mocov3.health(target, iter(given), free)["problems"] == []
    with torch.no_grad():
        target.encoder.norm.weight.zero_()
    assert "effective rank" in mocov3.health(target, iter(given), config)["problems"][0]


def test_keys_that_are_all_alike_stop_the_training(monkeypatch):
    """An encoder that gives the same for every image: its norms have nothing to enlarge."""
    monkeypatch.setattr(collapse, "LEAST_STEPS", 2)
    model = training()
    with torch.no_grad():
        for encoder in (model.query.encoder, model.key_encoder):
            encoder.norm.weight.zero_()
    with pytest.raises(CollapseError, match="min_information"):
        for step in range(4):
            out = model(batch(seed=step), progress(step=step, steps=8))
            assert float(out["loss"].detach()) == pytest.approx(0.8 * math.log(8), rel=1e-4)
            model.watch.step(progress(step=step, steps=8))


def test_watch_counts_steps_in_a_row_and_can_be_resumed(monkeypatch):
    monkeypatch.setattr(collapse, "LEAST_STEPS", 3)
    watch = InformationWatch(0.1)
    for step, entropy in enumerate([2.0, 2.0, 1.0, 2.0]):  # of ln 8 = 2.08
        watch.count(torch.tensor(entropy), 8)
        share = watch.step(progress(step=step, steps=8))
        assert float(share) == pytest.approx(1 - entropy / math.log(8), abs=1e-6)
    assert int(watch.steps_below) == 1 and watch.step(progress(step=4, steps=8)) is None
    other = InformationWatch(0.1)
    other.load_state_dict(watch.state_dict())
    with pytest.raises(CollapseError, match="for 3 steps"):
        for step in (4, 5):
            other.count(torch.tensor(2.0), 8)
            other.step(progress(step=step, steps=8))
    off = InformationWatch(0.0)
    for step in range(8):
        off.count(torch.tensor(3.0), 8)
        off.step(progress(step=step, steps=8))
    assert int(off.steps_below) == 0


def test_pictures_show_neighbours_and_similarities():
    target = training().target
    x = tiny.images(6)
    x[5] = (x[0] + 0.01).clamp(0, 1)  # nearly the same image
    shown = mocov3.pictures(target, x)
    assert set(shown) == {"features", "nearest", "similarity"}
    assert all(p.dtype.name == "uint8" and p.shape[2] == 3 for p in shown.values())
    side = 96 + 4
    nearest = torch.from_numpy(shown["nearest"][:96, side : side + 96 : 6]).float() / 255
    torch.testing.assert_close(nearest[::6].permute(2, 0, 1), x[5], atol=0.01, rtol=0)
    assert len(torch.from_numpy(shown["similarity"]).unique()) > 6
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        target(2 * x, "cls")


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(temperature=0.0), "temperature"),
        (dict(momentum=1.5), "momentum"),
        (dict(hidden=0), "hidden"),
        (dict(grey=-0.1), "grey"),
        (dict(crop_min=0.0), "crop_min"),
    ],
)
def test_bad_config_names_the_key(change, key):
    with pytest.raises(ValueError, match=f"^{key}: found"):
        method.Config(**change)


def test_widths_without_sin_cos_positions_are_refused():
    with pytest.raises(ValueError, match="model.embed_dim: found 18"):
        method.Config().check(16, tiny.model(embed_dim=18, num_heads=2))
