"""Facts of iBOT (arXiv 2111.07832 and its official code): masks, losses, heads, centres, schedules.

What it shares with DINO (crops, class-token loss, teacher, resting layers) is also tested in
test_dino.py.
"""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.kit import keyed
from stages.kit.nets import encoders
from stages.kit.nets.masks import random_masks
from stages.kit.nets.pictures import colour_codes, windows
from stages.kit.parts.prototypes import cross_entropy
from stages.kit.spec import configure
from stages.kit.train import optim
from stages.kit.train.loop import Recipe
from stages.methods import ibot
from tests import tiny
from workflow import checks, params

# the paper's centre and temperature, whatever the defaults
SMALL = dict(
    prototypes=24,
    hidden=16,
    bottleneck=8,
    n_local=2,
    drop_path=0.0,
    centring="centre",
    teacher_temp=0.04,
    teacher_temp_end=0.06,
    patch_temp_end=0.06,
)


def spec(image_size: int = 16, **model):
    return tiny.spec(image_size, **{"embed_dim": 16, **model})


def progress(step: int = 0, steps: int = 10, per_epoch: int = 5, rows: int = 4):
    return tiny.progress(rows, step, steps, epoch=step / per_epoch)


def method(seed: int = 0, image_size: int = 16, **changes) -> ibot.Method:
    torch.manual_seed(seed)
    found = ibot.Method(ibot.Config(**{**SMALL, **changes}), spec(image_size))
    with (
        torch.no_grad()
    ):  # as after some training: no part may stand at a value that hides a mistake
        found.mask_token.normal_()
        for centre in (found.teacher.centre, found.patch_centre):
            centre.value.normal_(std=0.1)
        for parameter in found.teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        found.teacher.head.last_layer.gain.fill_(1.0)
    return found


def batch(model: ibot.Method, size: int = 4, seed: int = 0) -> dict:
    """Noise, another for each view."""
    views = ibot.views(model.config, model.spec)
    sides = {name: view.size for name, view in views.items()}
    return {
        name: tiny.images(size, side, seed=100 * seed + i)
        for i, (name, side) in enumerate(sides.items())
    }


def masks_of(model: ibot.Method, now) -> dict:
    return {
        name: model.masks(now.uniform, name, model.config.mask_share)
        for name in ("global1", "global2")
    }


# --- the loss -------------------------------------------------------------------------------------


def soft(logits: np.ndarray, temperature: float) -> np.ndarray:
    e = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def exact(monkeypatch):
    """What is float32 on purpose, heads and losses, is float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_by_hand(exact, shared):
    """The whole loss, view by view, patch by patch, in float64 numpy from the networks' tokens."""
    weights = dict(cls_weight=0.7, patch_weight=1.3)
    model = method(
        shared_head=shared,
        teacher_temp_end=0.07,
        patch_temp_end=0.05,
        teacher_temp_warmup=0.5,
        **weights,
    )
    now, x = progress(step=2), {name: value.double() for name, value in batch(model).items()}
    out = model(x, now)
    teacher, student = model.teacher, model.student

    def last(network, patches: bool):
        return network.patch_last_layer if patches and not shared else network.head.last_layer

    def logits(network, tokens, patches: bool):
        h = tokens
        for place in (0, 2, 4):
            layer = network.head.mlp[place]
            h = h @ layer.weight.numpy().T + layer.bias.numpy()
            if place < 4:
                h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        h = h / np.linalg.norm(h, axis=-1, keepdims=True)
        v = last(network, patches).weight.numpy()
        return (
            h
            @ (last(network, patches).gain.numpy() * v / np.linalg.norm(v, axis=1, keepdims=True)).T
        )

    masks = masks_of(model, now)
    with torch.no_grad():
        large = ("global1", "global2")
        seen = {v: {k: t.numpy() for k, t in teacher.features(x[v]).items()} for v in large}
        tokens = {v: model.tokens(x[v], masks[v]) for v in large}
        made = {v: {k: tokens[v][k].numpy() for k in ("cls", "patch")} for v in large}
        made |= {v: {"cls": student.features(x[v])["cls"].numpy()} for v in ("local1", "local2")}
        temperature, patch_temperature = 0.04 + 0.03 * 0.4, 0.04 + 0.01 * 0.4
        cls, patch = [], []
        for q in large:
            p = soft(
                logits(teacher, seen[q]["cls"], False) - teacher.centre.value.numpy(), temperature
            )
            for v in made:
                if v != q:
                    cls.append(
                        -(p * np.log(soft(logits(student, made[v]["cls"], False), 0.1)))
                        .sum(-1)
                        .mean()
                    )
            p = soft(
                logits(teacher, seen[q]["patch"], True) - model.patch_centre.value.numpy(),
                patch_temperature,
            )
            s = np.log(soft(logits(student, made[q]["patch"], True), 0.1))
            for b in range(4):
                hidden = masks[q][b].numpy()
                patch.append(-(p[b] * s[b]).sum(-1)[hidden].sum() / max(1, hidden.sum()))
    assert len(cls) == 6 and len(patch) == 8 and 0.0 in patch  # some views are not masked
    out = {name: value.detach() for name, value in out.items()}
    assert float(out["cls_loss"]) == pytest.approx(np.mean(cls), rel=1e-9)
    assert float(out["patch_loss"]) == pytest.approx(np.mean(patch), rel=1e-9)
    assert float(out["loss"]) == pytest.approx(0.7 * np.mean(cls) + 1.3 * np.mean(patch), rel=1e-9)
    assert 0 < float(out["divergence"]) < float(out["loss"])


def test_ten_local_views_make_22_terms_none_with_itself():
    model = method(n_local=10)
    x, now = batch(model), progress()
    found = model(x, now)["cls_loss"]
    masks = masks_of(model, now)
    with torch.no_grad():
        assigned = {
            q: model.teacher.centre.sharpen(
                model.teacher.head(model.teacher.features(x[q])["cls"]), 0.04
            )
            for q in masks
        }
        made = {v: model.logits(x[v]) for v in x if v.startswith("local")}
        made |= {
            v: model.student.head(model.tokens(x[v], mask)["cls"]) for v, mask in masks.items()
        }
        terms = [
            cross_entropy(made[v], assigned[q]).mean() for q in assigned for v in made if v != q
        ]
    assert len(made) == 12 and len(terms) == 22
    torch.testing.assert_close(found, torch.stack(terms).mean())


def test_patch_loss_hears_hidden_patches_only():
    model, now = method(), progress()
    teacher, tokens = torch.randn(3, 16, 24).div(4), torch.randn(3, 16, 16, requires_grad=True)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[0, [1, 5, 6]] = mask[2, 9] = True
    loss, least, _ = model.patch_loss(teacher, tokens, mask, now)
    loss.backward()
    loss = loss.detach()
    assert torch.equal(tokens.grad.abs().sum(-1) > 0, mask)
    for where, same in ((~mask, True), (mask, False)):
        changed = torch.where(where[..., None], torch.randn(3, 16, 16), tokens)
        assert torch.equal(model.patch_loss(teacher, changed, mask, now)[0], loss) == same
    assert 0 < float(least) < float(loss)


def test_a_student_that_says_what_the_teacher_says_has_the_least_loss():
    model, now = (
        method(student_temp=0.05, teacher_temp=0.05, teacher_temp_end=None, patch_temp_end=None),
        progress(),
    )
    model.patch_centre.value.zero_()
    tokens, mask = torch.randn(2, 16, 16), torch.rand(2, 16) < 0.3
    with torch.no_grad():
        loss, least, entropy = model.patch_loss(
            model.student.patch_logits(tokens), tokens, mask, now
        )
    torch.testing.assert_close(loss, least)
    p = model.student.patch_logits(tokens)[mask].detach().div(0.05).softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).mean())


def test_without_masks_the_patch_loss_is_zero_and_the_class_loss_finite():
    model = method(mask_share=0.0)
    out = model(batch(model), progress())
    out["loss"].backward()
    cls_loss, patch_loss = (float(out[name].detach()) for name in ("cls_loss", "patch_loss"))
    assert patch_loss == 0 and 0 < cls_loss < math.inf
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_no_gradient_reaches_teacher_or_centres(shared):
    model = method(shared_head=shared)
    model(batch(model), progress())["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None and not parameter.requires_grad, name
        elif parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
    assert not any(value.requires_grad for _, value in model.named_buffers())
    assert {"teacher.centre.value", "patch_centre.value"} <= set(dict(model.named_buffers()))


# --- masks ----------------------------------------------------------------------------------------


def official_mask(rows: int, columns: int, high: float, draw: random.Random) -> np.ndarray:
    """The block rule, one rectangle after another."""
    mask, count, low = np.zeros((rows, columns), bool), 0, (min(rows, columns) // 3) ** 2
    while count < high:
        delta = 0
        for _ in range(10):
            area = draw.uniform(low, high - count)
            aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < columns and h < rows:
                top, left = draw.randint(0, rows - h), draw.randint(0, columns - w)
                new = int((~mask[top : top + h, left : left + w]).sum())
                if 0 < new <= high - count:
                    mask[top : top + h, left : left + w] = True
                    delta = new
                    break
        if not delta:
            break
        count += delta
    return mask


@functools.cache
def drawn(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(masks, share of the patches that was asked for: 0 where nothing is hidden) of many samples
    on a grid.
    """
    model, now = method(image_size=4 * side), progress(rows=10_000 if side == 8 else 2000)
    chosen, ratio = now.uniform("global1-ratio", 2).unbind(1)
    return model.masks(now.uniform, "global1", 0.5), (0.1 + 0.4 * ratio) * (chosen < 0.5)


@pytest.mark.parametrize("side", [14, 8])
def test_half_of_the_views_are_masked_by_at_most_their_ratio(side):
    mask, asked = drawn(side)
    count = mask.sum(1)
    assert float((count == 0).float().mean()) == pytest.approx(
        0.5, abs=0.02 * math.sqrt(10_000 / len(mask))
    )
    assert torch.equal(count > 0, asked > 0)
    some = asked[asked > 0]
    assert (
        float(some.min()) >= 0.1
        and float(some.max()) <= 0.5
        and float(some.mean()) == pytest.approx(0.3, abs=0.015)
    )
    assert (count <= asked * side * side).all()


def test_both_views_draw_on_their_own():
    model = method(mask="random")
    masks = [
        model.masks(progress(rows=4000).uniform, view, 0.5).any(1)
        for view in ("global1", "global2")
    ]
    assert float((masks[0] & masks[1]).float().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("side", [14, 8])
def test_block_masks_are_those_of_the_official_rule(side):
    """In how much of what is asked for they reach, and in where they lie."""
    mask, asked = drawn(side)
    some = asked > 0
    mask, reached = mask[some].view(-1, side, side).double(), (mask.float().mean(1) / asked)[some]
    draw, masks, expected = random.Random(0), [], []
    for _ in range(2000):
        ratio = draw.uniform(0.1, 0.5)
        masks.append(
            torch.from_numpy(official_mask(side, side, ratio * side * side, draw)).double()
        )
        expected.append(masks[-1].mean() / ratio)
    expected, masks = torch.stack(expected).float(), torch.stack(masks)
    assert float(reached.mean()) == pytest.approx(float(expected.mean()), abs=0.005)
    quantiles = torch.tensor([0.01, 0.1, 0.3, 0.5])
    torch.testing.assert_close(
        reached.quantile(quantiles), expected.quantile(quantiles), atol=0.02, rtol=0
    )
    torch.testing.assert_close(mask.mean(0), masks.mean(0), atol=0.09, rtol=0)
    edges, official = (
        (m[:, 1:] != m[:, :-1]).double().mean() for m in (mask, masks)
    )  # how ragged they are
    assert float(edges) == pytest.approx(float(official), rel=0.05)
    if side == 14:
        assert (
            float(reached.mean()) == pytest.approx(0.98, abs=0.01) and float(reached.min()) < 0.75
        )  # not all that is asked


def test_random_masks_hide_exactly_the_whole_part_of_what_is_asked():
    mask = random_masks(keyed.uniform(1, torch.arange(500), 16), torch.linspace(0, 8, 500))
    assert mask.sum(1).tolist() == [int(x) for x in torch.linspace(0, 8, 500).tolist()]
    assert (
        float((mask.float().mean(0) - mask.float().mean()).abs().max()) < 0.08
    )  # no place is preferred
    model = method(mask="random", mask_ratio=(0.6, 0.7), mask_share=1.0)
    count = model.masks(progress(rows=300).uniform, "global1", 1.0).sum(1)
    assert set(count.tolist()) == {9, 10, 11} and model.most == 11


def test_every_hidden_patch_is_in_the_loss():
    """Rows with the most patches that can be hidden fit into what the head sees."""
    for ratio in (0.3, 0.5, 0.999):
        model = method(image_size=32, mask="random", mask_ratio=(ratio, ratio))
        mask = model.masks(progress(rows=50).uniform, "global1", 1.0)
        assert int(mask.sum(1).max()) == model.most == int(ratio * 64)


# --- the student's input --------------------------------------------------------------------------


def test_a_hidden_patch_is_mask_token_and_position_whatever_its_pixels():
    model = method()
    encoder, mask = model.student.encoder, torch.rand(2, 16) < 0.5
    seen = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for seed in (0, 1):
        model.tokens(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)), mask)
    expected = (model.mask_token + encoder.pos_embed[:, 1:]).expand(2, -1, -1)
    for tokens in seen:
        assert tokens.shape == (2, 17, 16)  # none is dropped
        torch.testing.assert_close(tokens[:, 1:][mask], expected[mask])
    assert not torch.isclose(seen[0][:, 1:], seen[1][:, 1:])[~mask].any(-1).all()
    torch.testing.assert_close(
        seen[0][:, :1], (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    )


def test_without_masks_the_student_is_a_plain_vit():
    model, x = method().eval(), torch.rand(2, 3, 16, 16)
    found, expected = (
        model.tokens(x, torch.zeros(2, 16, dtype=torch.bool)),
        model.student.features(x),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_local_views_are_not_masked():
    model = method(mask_share=1.0, mask_ratio=(0.9, 0.9), mask="random")
    x, calls = batch(model), []
    model.student.encoder.patch_embed.register_forward_hook(lambda _, i, o: calls.append(o.shape))
    before = model.student.encoder.forward_features
    plain = []
    model.student.encoder.forward_features = lambda images: (
        plain.append(images.shape) or before(images)
    )
    model(x, progress())
    assert plain == [
        (8, 3, 8, 8)
    ]  # the local views, all at once; the global ones go through `tokens`
    assert len(calls) == 2


# --- heads, teacher, schedules --------------------------------------------------------------------


def test_a_shared_head_is_one_layer_and_an_unshared_one_two():
    names = [name for name, _ in method().named_parameters() if "last_layer.weight" in name]
    assert names == ["student.head.last_layer.weight", "teacher.head.last_layer.weight"]
    model, tokens = method(), torch.randn(5, 16)
    assert torch.equal(model.student.head(tokens), model.student.patch_logits(tokens))
    apart = method(shared_head=False)
    names = [name for name, _ in apart.named_parameters() if name.endswith("last_layer.weight")]
    assert len(names) == 4 and "student.patch_last_layer.weight" in names
    assert not torch.isclose(apart.student.head(tokens), apart.student.patch_logits(tokens)).any()
    for network in (model.student, apart.student):
        for layer in (network.head.last_layer, network.patch_last_layer):
            assert layer is None or bool((layer.gain == 1).all())
        for logits in (network.head(30 * tokens), network.patch_logits(30 * tokens)):
            assert float(logits.detach().abs().max()) <= 1 + 1e-6
    # the trunk is one in any case
    torch.testing.assert_close(
        apart.student.patch_logits(tokens),
        apart.student.patch_last_layer(apart.student.head.trunk(tokens)),
    )


@pytest.mark.parametrize("shared", [True, False])
def test_teacher_starts_as_a_copy_and_follows_by_momentum(shared):
    torch.manual_seed(0)
    model = ibot.Method(ibot.Config(**SMALL, shared_head=shared), spec())
    ours, theirs = dict(model.teacher.named_parameters()), dict(model.student.named_parameters())
    assert ours.keys() == theirs.keys()  # the mask token is not among them
    assert not model.mask_token.any() and model.mask_token.shape == (1, 1, 16)
    assert all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )  # each last layer with its own counterpart
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.add_(torch.randn(parameter.shape))
    before = {name: value.clone() for name, value in ours.items()}
    model.teacher.follow(model.student, 1.0)
    assert all(torch.equal(ours[name], before[name]) for name in ours)
    model.teacher.follow(model.student, 0.75)
    for name in ours:
        torch.testing.assert_close(ours[name], 0.75 * before[name] + 0.25 * theirs[name].detach())
    model.teacher.follow(model.student, 0.0)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.encoder is model.teacher.encoder  # what is exported


def test_the_preset_is_the_published_recipe():
    runs = params.read(Path(__file__).parents[1] / "presets/imagenet.yaml").runs
    settings = runs["ibot"].settings
    config, per = configure(ibot.Config, settings.config), 1251
    published = {key: value for key, value in ibot.PUBLISHED.items() if hasattr(config, key)}
    assert config == configure(ibot.Config, published)
    recipe = Recipe.of(config, settings.train, per)
    assert (recipe.epochs, recipe.warmup, recipe.lr) == (
        800,
        10 * per,
        pytest.approx(5e-4 * 1024 / 256),
    )
    assert config.teacher_temp_warmup * 800 == pytest.approx(30)
    assert recipe.views_per_image == pytest.approx(3.84, abs=0.02)
    shown = spec(224, patch_size=16)
    sizes = [(view.size, view.scale) for view in ibot.views(config, shown).values()]
    assert sizes == [(224, (0.25, 1.0))] * 2 + [(96, (0.05, 0.25))] * 10
    for name in ("ibot-300", "ibot-300-apart", "ibot-300-patches", "dino-300"):
        short = runs[name].settings
        assert short.config["n_local"] == 0 and short.train["epochs"] == 300
        assert short.config["teacher_temp_warmup"] * 300 == pytest.approx(30)


def test_schedules_of_the_published_recipe():
    """800 epochs, of which 30 warm the temperatures up and 10 the rate."""
    config = ibot.Config(
        **SMALL | {"teacher_temp_end": 0.07, "patch_temp_end": 0.07},
        teacher_temp_warmup=30 / 800,
        momentum=0.996,
        lr=5e-4,
        lr_per=256,
        warmup=10 / 800,
        freeze_last_layer=1,
    )
    model, per = ibot.Method(config, spec()), 10
    for end in ("teacher_temp_end", "patch_temp_end"):
        found = [model.temperature(epoch / 800, end) for epoch in (0, 15, 30, 400, 799)]
        assert found == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    recipe = Recipe.of(config, {"epochs": 800, "batch_size": 1024}, per)
    decays = [recipe.weight_decay_at(step, config.weight_decay) for step in (0, 4000, 7999)]
    assert decays == pytest.approx([0.04, 0.22, 0.4], abs=1e-6)
    assert recipe.lr_at(0) == 0 and recipe.lr_at(100) == pytest.approx(5e-4 * 4)
    assert (
        recipe.lr_at(7999) == pytest.approx(1e-6, rel=0.1)
        and recipe.clip_mode == "tensor"
        and recipe.clip == 3.0
    )
    moved = []
    for step in (0, 7999):
        with torch.no_grad():
            model.teacher.encoder.cls_token.zero_()
            model.student.encoder.cls_token.fill_(1.0)
        model.after_step(progress(step, 8000, per))
        moved.append(float(model.teacher.encoder.cls_token.mean()))
    assert moved[0] == pytest.approx(0.004, rel=1e-4) and moved[1] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("shared", [True, False])
def test_last_layers_rest_in_the_first_epoch_only(shared):
    for epoch, rests in ((0, True), (1, False)):
        model, now = method(shared_head=shared, norm_last=False), progress(step=5 * epoch)
        optimiser = optim.build(
            Recipe(1, 4, 5, lr=0.1, weight_decay=0.5), optim.groups(model, 0.5), torch.device("cpu")
        )
        before = {name: value.clone() for name, value in model.student.named_parameters()}
        model(batch(model), now)["loss"].backward()
        model.before_step(now)
        optimiser.step()
        last = [name for name in before if "last_layer" in name]
        assert len(last) == (2 if shared else 4)  # directions and gains
        for name, value in model.student.named_parameters():
            assert torch.equal(value, before[name]) == (rests and name in last), name


def test_weight_decay_spares_biases_norms_and_nothing_else():
    model = method(norm_last=False)
    decayed, plain = ({id(p) for p in group["params"]} for group in optim.groups(model, 0.04))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (id(parameter) in plain) == (name.endswith(".bias") or parameter.ndim == 1), name
    assert {
        id(model.mask_token),
        id(model.student.encoder.pos_embed),
        id(model.student.encoder.cls_token),
    } <= decayed


@pytest.mark.parametrize(
    "name, dim, heads, millions", [("small", 384, 6, 21.67), ("base", 768, 12, 85.80)]
)
def test_sizes_of_the_published_models(name, dim, heads, millions):
    sizes = {"patch_size": 16, "embed_dim": dim, "depth": 12, "num_heads": heads, "mlp_ratio": 4.0}
    base = tiny.spec(224, name=f"vit_{name}_patch16_224", **sizes)
    with torch.device("meta"):
        config = ibot.Config(prototypes=8192, hidden=2048, bottleneck=256)
        found = ibot.Method(config, base)
    count = {
        key: sum(p.numel() for p in part.parameters())
        for key, part in (
            ("encoder", found.encoder),
            ("student", found.student.encoder),
            ("head", found.student.head),
        )
    }
    assert (
        count["encoder"] / 1e6 == pytest.approx(millions, abs=0.006)
        and count["student"] == count["encoder"]
    )
    assert found.mask_token.numel() == dim  # which the encoder does not hold
    assert count["head"] / 1e6 == pytest.approx(7.61 if dim == 384 else 8.40, abs=0.005)


# --- centres --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_centres_after_one_step_from_zero(parts):
    """A tenth of the mean of the teacher's raw logits, of all positions whether masked or not,
    however the batch is cut.
    """
    model = method()
    for centre in (model.teacher.centre, model.patch_centre):
        centre.value.zero_()
    x, now = batch(model), progress()
    with torch.no_grad():
        seen = [model.teacher.features(x[name]) for name in ("global1", "global2")]
        cls = torch.cat([model.teacher.head(s["cls"]) for s in seen]).double()
        patch = torch.cat([model.teacher.patch_logits(s["patch"]) for s in seen]).double()
    for rows in torch.arange(4).chunk(parts):
        model(
            {name: value[rows] for name, value in x.items()},
            tiny.progress(rows, 0),
        )
    assert not model.patch_centre.value.any()  # used before it is moved
    model.after_step(now)
    torch.testing.assert_close(
        model.teacher.centre.value.double(), 0.1 * cls.mean(0), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        model.patch_centre.value.double(), 0.1 * patch.mean((0, 1)), atol=1e-6, rtol=1e-5
    )


# --- pictures and settings ------------------------------------------------------------------------


def test_prototype_sheet_puts_patches_of_one_prototype_in_a_row():
    model, images = method(), torch.rand(2, 3, 16, 16)
    given = torch.full((32,), 3)
    given[[4, 20]] = 7
    share = torch.linspace(0.1, 0.9, 32)
    sheet = model.prototype_sheet(images, given, share)
    around = windows(images, 4)
    assert around.shape == (32, 3, 12, 12)
    padded = F.pad(images, (4, 4, 4, 4), mode="replicate")
    torch.testing.assert_close(
        around[16 + 6], padded[1, :, 4:16, 8:20]
    )  # patch in row 1, column 2 of the second image
    cell = 12 * 8 + 4  # eight times enlarged, with a gap

    def shown(row, column):
        top, left = row * cell, column * cell
        return torch.from_numpy(sheet[top : top + 96 : 8, left : left + 96 : 8]).permute(2, 0, 1)

    for place, expected in (((0, 0), 31), ((0, 1), 30), ((1, 0), 20), ((1, 1), 4)):
        assert torch.equal(shown(*place), (around[expected] * 255).round().to(torch.uint8))
    assert (shown(1, 2) == 255).all()  # no third patch has it


def test_colours_tell_codes_apart():
    codes = torch.tensor([[0, 1, 2, 0]])
    picture = colour_codes(codes, 8)
    assert picture.shape == (1, 3, 8, 8) and torch.equal(picture[0, :, 0, 0], picture[0, :, 7, 7])
    assert (
        (picture[0, :, 0, 0] - picture[0, :, 0, 7]).abs().max() > 0.2
        and picture.min() >= 0
        and picture.max() <= 1
    )


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(prototypes=1), "prototypes"),
        (dict(mask_ratio=(0.5, 0.1)), "mask_ratio"),
        (dict(mask_ratio=(0.0, 0.5)), "mask_ratio"),
        (dict(mask_share=1.5), "mask_share"),
        (dict(patch_temp_end=0.0), "patch_temp_end"),
        (dict(patch_weight=-1.0), "patch_weight"),
    ],
)
def test_bad_config_names_the_key(change, key):
    with pytest.raises(ValueError, match=f"^{key}: found"):
        ibot.Config(**change)


def test_a_ratio_that_never_hides_anything_is_refused():
    ibot.Config(mask_ratio=(0.1, 0.5)).check(16, spec().model)
    with pytest.raises(ValueError, match="^mask_ratio: .* never hides"):
        ibot.Config(mask_ratio=(0.01, 0.05)).check(16, spec().model)


def test_exported_features_are_the_teachers(tmp_path):
    model, x = method(), torch.randn(2, 3, 16, 16)
    encoders.save(model.encoder, tmp_path, model.spec)
    assert torch.equal(
        encoders.load(tmp_path).eval().forward_features(x),
        model.teacher.encoder.forward_features(x),
    )


def test_a_class_token_without_a_loss_may_be_without_information(monkeypatch):
    """An ablation: an untrained layer is no collapse."""
    monkeypatch.setattr("stages.kit.parts.collapse.LEAST_STEPS", 2)
    model = method(shared_head=False, cls_weight=0.0)
    for step in range(4):
        model.watch.count(torch.full((4, 24), 1 / 24))
        model.watch.step(progress(step, 4))
    with pytest.raises(RuntimeError, match="collapsed"):
        for step in range(4):
            model.patch_watch.count(torch.full((4, 24), 1 / 24))
            model.patch_watch.step(progress(step, 4))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_without_a_patch_loss_nothing_is_asked_of_the_patches(monkeypatch, shared, centring):
    """The class token's loss and gradients are what they are beside a patch loss."""
    both, alone = (
        method(shared_head=shared, centring=centring, patch_weight=weight) for weight in (1.0, 0.0)
    )
    state = {name: both.state_dict()[name] for name in alone.state_dict()}
    alone.load_state_dict(state)
    x, now = batch(both), progress()
    expected = both(x, now)
    monkeypatch.setattr(alone, "patch_loss", None)  # calling it would be an error
    found = alone(x, now)
    assert torch.equal(found["loss"], expected["cls_loss"])
    assert torch.equal(found["divergence"], expected["cls_loss"] - expected["teacher_entropy"])
    assert not {"patch_loss", "patch_entropy"} & found.keys()
    expected["cls_loss"].backward()
    found["loss"].backward()
    theirs = dict(both.named_parameters())
    for name, parameter in alone.student.named_parameters():
        if parameter.requires_grad:  # the length of prototypes is fixed
            assert torch.equal(parameter.grad, theirs[f"student.{name}"].grad), name
    alone.after_step(now)
    assert alone.masked_pictures(tiny.images(2, 16), torch.eye(2, 16).bool())


# --- another method's masks -----------------------------------------------------------------------


class Attended(ibot.MaskedSelfDistillation):
    """Half of the patches that the teacher attends to most are hidden, as AttMask does."""

    def __init__(self, config, spec):
        super().__init__(config, spec, most=spec.grid**2 // 2)

    def forward(self, batch, progress):
        large = ibot.global_views(batch)
        seen = self.look(large, "attention")
        self.attention = seen["attention"].mean(dim=1)  # (2B,N)
        self.mask = random_masks(-self.attention, torch.full((len(large),), self.most))
        return self.losses(large, self.mask, seen, batch, progress)


def test_masks_may_come_from_the_teachers_attention_in_the_same_pass():
    torch.manual_seed(0)
    model, passes = Attended(checks.MaskedSelfDistillation(**SMALL), spec()), []
    model.teacher.encoder.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    out = model(batch(model), progress())
    assert len(passes) == 1 and model.mask.sum(1).tolist() == [8] * 8
    hidden = torch.where(model.mask, model.attention, torch.inf).amin(1)
    seen = torch.where(model.mask, -torch.inf, model.attention).amax(1)
    assert (hidden >= seen).all() and not model.attention.requires_grad
    out["loss"].backward()
    assert model.mask_token.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_the_host_with_ibots_masks_is_ibot():
    """Whoever chooses the masks: with the same ones the losses are the same."""
    model, now = method(), progress()
    x = batch(model)
    out = model(x, now)
    large, masks = ibot.global_views(x), torch.cat(list(masks_of(model, now).values()))
    again = model.losses(large, masks, model.look(large, "attention"), x, now)
    assert all(torch.equal(out[name], again[name]) for name in out)
