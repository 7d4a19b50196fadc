"""Facts of DINO (arXiv 2104.14294 and its official code): head, centre, loss, crops, collapse."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stages.kit.nets import ema, encoders
from stages.kit.parts.prototypes import Centre, Head, cross_entropy, multi_view_loss, view_pairs
from stages.kit.train import optim
from stages.kit.train.loop import Recipe
from stages.methods import dino as method
from stages.methods import ibot
from stages.targets import dino
from tests import tiny

# the paper's centre and temperature, whatever the defaults
SMALL = dict(
    prototypes=32, hidden=16, bottleneck=8, n_local=2, centring="centre", teacher_temp=0.04
)
# whose defaults are of short runs, so that PUBLISHED must have them
TUNED = {"prototypes", "centring", "teacher_temp", "teacher_temp_end", "momentum", "drop_path"}
TUNED |= {"n_local", "lr", "lr_per", "warmup"}


def spec(image_size: int = 16, **model):
    return tiny.spec(image_size, **{"embed_dim": 16, **model})


def progress(step: int = 0, steps: int = 10, per_epoch: int = 5):
    return tiny.progress(4, step, steps, epoch=step / per_epoch)


def training(seed: int = 0, **changes) -> dino.Training:
    torch.manual_seed(seed)
    return dino.Training(dino.Config(**{**SMALL, **changes}), spec())


def batch(model: dino.Training, size: int = 4, seed: int = 0) -> dict:
    """Noise, another for each view."""
    views = dino.views(model.config, model.spec)
    sides = {name: view.size for name, view in views.items()}
    return {
        name: tiny.images(size, side, seed=100 * seed + i)
        for i, (name, side) in enumerate(sides.items())
    }


# --- head, centre, loss ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, prototypes, millions",
    [(384, 65536, 22.35), (768, 65536, 23.14), (384, 8192, 7.61), (768, 8192, 8.40)],
)
def test_head_sizes(dim, prototypes, millions):
    with torch.device("meta"):
        head = Head(dim, prototypes)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_logits_are_cosines_while_the_gain_is_one():
    torch.manual_seed(0)
    head, x = Head(12, 50, hidden=16, bottleneck=8), 30 * torch.randn(40, 12)
    logits = head(x)
    assert float(logits.detach().abs().max()) <= 1 + 1e-6
    weight = head.last_layer.weight
    z = head.mlp(x)
    for k in (0, 7, 49):
        torch.testing.assert_close(logits[:, k], F.cosine_similarity(z, weight[k][None], dim=1))
    assert (
        not head.last_layer.gain.requires_grad
        and Head(12, 5, 4, 4, norm_last=False).last_layer.gain.requires_grad
    )
    head.last_layer.gain.data[3] = 2.5
    torch.testing.assert_close(head(x)[:, 3], 2.5 * logits[:, 3])


def test_head_and_loss_are_float32_under_autocast():
    torch.manual_seed(0)
    head, x = Head(12, 50, hidden=16, bottleneck=8), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.float32 and torch.equal(logits, head(x))


def test_centre_after_one_update_from_zero():
    centre = Centre(6)
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    for part in logits.split(3):  # micro batches of unequal size
        centre.count(part)
    assert not centre.value.any()  # used before it is moved
    centre.step()
    torch.testing.assert_close(centre.value, 0.1 * logits.mean(0))
    centre.count(logits + 1)
    centre.step()
    torch.testing.assert_close(centre.value, 0.09 * logits.mean(0) + 0.1 * (logits + 1).mean(0))
    before = centre.value.clone()
    centre.step()  # nothing was counted
    assert torch.equal(before, centre.value)


def test_sharpen_centres_raw_logits_before_the_temperature():
    centre = Centre(3)
    centre.value.copy_(torch.tensor([0.5, 0.0, -0.5]))
    z = torch.tensor([[0.2, 0.1, 0.0]], requires_grad=True)
    e = [math.exp(x / 0.04) for x in (-0.3, 0.1, 0.5)]
    found = centre.sharpen(z, 0.04)
    assert (
        found[0].tolist() == pytest.approx([x / sum(e) for x in e], rel=1e-4)
        and not found.requires_grad
    )


@pytest.mark.parametrize("local, pairs", [(0, 2), (8, 18), (10, 22)])
def test_pairs_leave_out_a_view_with_itself(local, pairs):
    found = view_pairs(2, 2 + local)
    assert len(found) == pairs == 2 * (2 + local) - 2 and all(q != v for q, v in found)


def test_loss_is_the_mean_over_pairs():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 3, 7, generator=generator)
    teacher = torch.randn(2, 3, 7, generator=generator).softmax(-1)
    pairs = [(q, v) for q in range(2) for v in range(5) if q != v]
    expected = sum(cross_entropy(student[v], teacher[q]).mean() for q, v in pairs) / len(pairs)
    torch.testing.assert_close(multi_view_loss(student, teacher), expected)
    assert len(pairs) == 8
    log = (student[1, 0] / 0.1) - torch.logsumexp(student[1, 0] / 0.1, 0)
    assert float(cross_entropy(student[1], teacher[0])[0]) == pytest.approx(
        -float((teacher[0, 0] * log).sum()), rel=1e-5
    )


def test_a_view_is_not_compared_with_itself():
    teacher = torch.eye(4)[[0, 1]][:, None]  # the first view is class 0, the second class 1
    student = torch.zeros(2, 1, 4)
    student[0, 0, 1] = student[1, 0, 0] = 9.0  # each predicts the other
    assert float(multi_view_loss(student, teacher)) < 1e-6


def test_equal_logits_and_zero_centre_give_ln_k():
    centre, same = Centre(50), torch.full((4, 3, 50), 0.3)
    assert float(multi_view_loss(same, centre.sharpen(same[:2], 0.04))) == pytest.approx(
        math.log(50), rel=1e-5
    )


# --- training -------------------------------------------------------------------------------------


def test_gradients_reach_the_student_only():
    model = training()
    out = model(batch(model), progress())
    out["loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher.") or name == "student.head.last_layer.gain":
            assert parameter.grad is None and not parameter.requires_grad
        elif not name.endswith("qkv.bias"):
            assert parameter.grad.abs().sum() > 0, name
    assert not model.target.centre.value.requires_grad
    assert 0 <= float(out["teacher_entropy"]) <= math.log(32)


def test_loss_by_hand():
    model = training(drop_path=0.0)
    x = batch(model)
    out = model(x, progress())["loss"]
    target = model.target
    with torch.no_grad():
        teacher = [
            (
                (target.head(encoders.features(target.encoder, model.spec.normalise(x[v]))["cls"]))
                / 0.04
            ).softmax(-1)
            for v in ("global1", "global2")
        ]
        student = [model.logits(x[v]) for v in ("global1", "global2", "local1", "local2")]
    expected = [
        cross_entropy(student[v], teacher[q]).mean() for q in range(2) for v in range(4) if q != v
    ]
    assert len(expected) == 6
    torch.testing.assert_close(out, torch.stack(expected).mean())


def test_last_layer_rests_in_the_first_epoch_only():
    for epoch, rests in ((0, True), (1, False)):
        model = training(freeze_last_layer=1.0)
        now = progress(step=5 * epoch)
        optimiser = optim.build(
            Recipe(1, 4, 5, lr=0.1, weight_decay=0.5), optim.groups(model, 0.5), torch.device("cpu")
        )
        before = {name: value.clone() for name, value in model.named_parameters()}
        model(batch(model), now)["loss"].backward()
        model.before_step(now)
        assert all(
            (p.grad is None) == rests
            for n, p in model.named_parameters()
            if n == "student.head.last_layer.weight"
        )
        optimiser.step()
        last = "student.head.last_layer.weight"
        assert (
            torch.equal(model.student.head.last_layer.weight, before[last]) == rests
        )  # no decay either
        assert not torch.equal(
            model.student.head.mlp[0].weight, before["student.head.mlp.0.weight"]
        )


def test_teacher_follows_by_momentum():
    model = training(momentum=0.996)
    for name, value in model.target.encoder.state_dict().items():
        assert torch.equal(value, model.student.encoder.state_dict()[name])  # starts as a copy
    with torch.no_grad():
        for parameter in model.student.encoder.parameters():
            parameter += 1
    before = model.target.encoder.cls_token.clone()
    model.target.follow(model.student, momentum=1.0)
    assert torch.equal(model.target.encoder.cls_token, before)
    model.after_step(progress(0))  # m = 0.996
    torch.testing.assert_close(model.target.encoder.cls_token, before + 0.004)
    last = model.target.encoder.cls_token.clone()
    model.after_step(progress(9999, 10000))  # m is nearly 1
    torch.testing.assert_close(model.target.encoder.cls_token, last, atol=1e-6, rtol=0)
    half = 1 - 0.004 * (math.cos(math.pi * 0.5) + 1) / 2
    model.after_step(progress(5))
    student = model.student.encoder.cls_token.detach()
    torch.testing.assert_close(model.target.encoder.cls_token, half * last + (1 - half) * student)


def test_temperature_schedule():
    model = training(teacher_temp=0.04, teacher_temp_end=0.07, teacher_temp_warmup=0.3)
    found = [model.temperature(f) for f in (0, 0.15, 0.3, 0.9)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert training().temperature(0.9) == 0.04


def test_accumulated_centre_equals_that_of_one_batch():
    centres = []
    for parts in (1, 2):
        model = training()
        pieces = {name: x.chunk(parts) for name, x in batch(model).items()}
        for i in range(parts):
            model({name: piece[i] for name, piece in pieces.items()}, progress())
        model.after_step(progress())
        centres.append(model.target.centre.value)
    torch.testing.assert_close(*centres)
    assert centres[0].abs().sum() > 0


def test_student_learns_what_a_still_teacher_says():
    model = training(momentum=1.0, centre_momentum=1.0, drop_path=0.0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    x, gaps = batch(model, size=8), []
    for step in range(40):
        optimiser.zero_grad()
        out = model(x, progress(step, 40))
        out["loss"].backward()
        optimiser.step()
        model.after_step(progress(step, 40))
        gaps.append(
            (out["loss"] - out["teacher_entropy"]).item()
        )  # a divergence, if both views of an image were equal
    assert gaps[-1] < 0.5 * gaps[0]


def test_method_and_target_are_one_implementation():
    """Step for step the same loss and the same teacher, bit by bit; the method exports that
    teacher's encoder.
    """
    models = []
    for module, build in ((dino, dino.Training), (method, method.Method)):
        torch.manual_seed(0)
        models.append(build(module.Config(**SMALL, norm_last=False, freeze_last_layer=0.4), spec()))
    assert dino.views is method.views
    losses = []
    for model in models:
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            torch.manual_seed(step)
            out = model(batch(model, seed=step), progress(step))
            optimiser.zero_grad()
            out["loss"].backward()
            model.before_step(progress(step))
            optimiser.step()
            model.after_step(progress(step))
            losses.append(out["loss"].item())
    assert losses[:4] == losses[4:] and len(set(losses)) == 4
    target, teacher = models[0].target.state_dict(), models[1].teacher.state_dict()
    assert target.keys() == teacher.keys() and all(
        torch.equal(target[name], teacher[name]) for name in target
    )
    assert models[1].encoder is models[1].teacher.encoder


def test_settings_of_method_and_target_agree():
    """Where they have the same name they have the same default."""
    ours, theirs = (dataclasses.asdict(module.Config()) for module in (dino, method))
    assert {name: ours[name] for name in ours if name != "min_rank"} == theirs


@pytest.mark.parametrize("module", [dino, method, ibot])
def test_the_published_recipe_keeps_nothing_of_the_tuned_defaults(module):
    more = {"patch_temp_end"} if module is ibot else set()
    assert module.PUBLISHED.keys() >= TUNED | more
    values = [module.PUBLISHED[key] for key in ("centring", "teacher_temp", "momentum", "lr_per")]
    assert values == ["centre", 0.04, 0.996, 256]


def test_the_published_recipe_of_ibot_gives_both_losses_the_same_weight():
    config = ibot.Config(patch_weight=ibot.PUBLISHED["patch_weight"])
    assert config.patch_weight == config.cls_weight == 1.0 > ibot.Config().patch_weight


def test_a_step_learns_from_so_many_large_crops():
    """The published 10 local crops of 96 of 224 pixels: 3.84 times a single view, the authors count
    4 times the epochs.
    """
    config = method.Config(n_local=10, local_size=96 / 224)
    assert config.views_per_image == pytest.approx(2 + 10 * 96**2 / 224**2)
    assert method.Config(n_local=0).views_per_image == 2


def test_momentum_and_temperature_of_the_published_recipe():
    model = training(teacher_temp_end=0.07, teacher_temp_warmup=30 / 800)
    assert [model.temperature(epoch / 800) for epoch in (0, 30, 799)] == pytest.approx(
        [0.04, 0.07, 0.07]
    )
    assert ema.momentum(0.996, 0.0) == 0.996 and ema.momentum(0.996, 0.9999) == pytest.approx(
        1, abs=1e-6
    )


RANKS = """
import sys, torch
from stages.kit import dist
from stages.kit.parts.prototypes import Centre
logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
dist.start()
centre = Centre(5)
for part in (logits[:4] if dist.rank() == 0 else logits[4:]).split(2):  # 4 rows here, 3 there
    centre.count(part)
centre.step()
torch.save(centre.value, f"{sys.argv[1]}/{dist.rank()}.pt")
"""


def test_two_processes_have_the_centre_of_the_whole_batch(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(tmp_path)], env=common | {"RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*found)
    torch.testing.assert_close(
        found[0].double(), 0.1 * logits.double().mean(0), atol=1e-7, rtol=1e-6
    )


# --- views and sizes ------------------------------------------------------------------------------


def test_views_of_the_paper_and_of_tiny_images():
    base = spec(224, patch_size=16)
    found = dino.views(dino.Config(n_local=8, local_size=0.43), base)
    assert list(found) == ["global1", "global2"] + [f"local{i}" for i in range(1, 9)]
    assert [found[n].size for n in ("global1", "global2", "local1")] == [224, 224, 96]
    assert [found[n].blur for n in ("global1", "global2", "local1")] == [1.0, 0.1, 0.5]
    assert [found[n].solarise for n in ("global1", "global2", "local1")] == [0.0, 0.2, 0.0]
    assert all(
        v.flip == 0.5
        and v.grey == 0.2
        and v.jitter == (0.4, 0.4, 0.2, 0.1)
        and v.jitter_p == 0.8
        and v.blur_sigma == (0.1, 2.0)
        for v in found.values()
    )
    small = dino.views(dino.Config(n_local=4), spec(32))
    assert [v.size for v in small.values()] == [32, 32, 16, 16, 16, 16] and not any(
        v.blur for v in small.values()
    )
    middle = dino.views(dino.Config(), spec(64, patch_size=8))
    assert middle["global1"].blur_sigma == (0.1, 1.0) and middle["local1"].size == 32


def test_local_crops_use_resized_positions_and_the_full_size_uses_them_as_they_are():
    model = training(drop_path=0.0)
    model.eval()
    x = torch.rand(2, 3, 16, 16)
    assert model.student.encoder.forward_features(x[:, :, :8, :8]).shape == (2, 1 + 4, 16)
    fixed = encoders.create(model.spec, "timm")
    fixed.load_state_dict(model.student.encoder.state_dict())
    assert torch.equal(fixed.eval().forward_features(x), model.student.encoder.forward_features(x))


@pytest.mark.parametrize(
    "name, dim, depth, heads, millions",
    [("small", 384, 12, 6, 21.67), ("base", 768, 12, 12, 85.80), ("tiny", 192, 12, 3, 5.52)],
)
def test_backbone_sizes(name, dim, depth, heads, millions):
    sizes = {"patch_size": 16, "embed_dim": dim, "depth": depth, "num_heads": heads}
    base = tiny.spec(224, name=f"vit_{name}_patch16_224", mlp_ratio=4.0, **sizes)
    with torch.device("meta"):
        vit = encoders.create(base, "timm", dynamic_img_size=True)
        tokens = vit.forward_features(torch.empty(1, 3, 96, 96)).shape[1]
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert tokens == 36 + 1


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(prototypes=1), "prototypes"),
        (dict(teacher_temp=0.0), "teacher_temp"),
        (dict(momentum=1.5), "momentum"),
        (dict(local_size=0.0), "local_size"),
        (dict(n_local=-1), "n_local"),
        (dict(local_scale=(0.5, 0.1)), "local_scale"),
    ],
)
def test_bad_config_names_the_key(change, key):
    with pytest.raises(ValueError, match=f"^{key}: found"):
        dino.Config(**change)


# --- the target and its health --------------------------------------------------------------------


def test_target_gives_tokens_after_the_norm_of_normalised_images():
    model = training()
    x = torch.rand(3, 3, 16, 16)
    found = model.target(x, "patch", "cls")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (model.spec.mean, model.spec.std))
    tokens = model.target.encoder.forward_features((x - mean) / std)
    torch.testing.assert_close(found["patch"], tokens[:, 1:])
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    assert found["patch"].shape == (3, 16, 16) and found["cls"].shape == (3, 16)
    assert not found["patch"].requires_grad
    unnormed = model.target(x, "patch", norm=False)["patch"]
    assert torch.equal(unnormed, found["patch"])  # always after the norm
    model.train()
    assert not model.target.training and model.student.encoder.training
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        model.target(model.spec.normalise(x), "patch")


def test_target_gives_the_attention_of_the_class_token_in_one_pass():
    target, x, passes = training().target, torch.rand(3, 3, 16, 16), []
    target.encoder.blocks[-1].register_forward_hook(lambda *_: passes.append(1))
    found = target(x, "patch", "cls", "attention")
    assert len(passes) == 1 and found["attention"].shape == (3, 2, 16)
    plain = target(x, "patch", "cls")
    assert torch.equal(found["patch"], plain["patch"]) and torch.equal(found["cls"], plain["cls"])
    whole = encoders.attention(target.encoder, target.spec.normalise(x))
    torch.testing.assert_close(whole.sum(-1), torch.ones(3, 2, 17))  # with the class token's own
    torch.testing.assert_close(found["attention"], whole[:, :, 0, 1:])


def test_health_of_live_and_collapsed_teachers():
    target, config = training().target, dino.Config(**SMALL, min_rank=1.5, min_information=0.001)
    x = [torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = dino.health(target, iter(x), config)
    assert found["rank"] > 1.5 and 0 <= found["entropy"] <= found[
        "uniform_entropy"
    ] == pytest.approx(math.log(32))
    target.head.last_layer.weight.copy_(target.head.last_layer.weight[:1].expand(32, -1).clone())
    uniform = dino.health(target, iter(x), config)
    assert (
        uniform["entropy"] == pytest.approx(math.log(32), rel=1e-4)
        and "uniform" in uniform["problems"][0]
    )
    target.centre.value[3] = -5
    single = dino.health(target, iter(x), config)
    assert single["entropy"] < 1e-3 and "one prototype for all" in single["problems"][0]
    target.encoder.norm.weight.zero_()
    dead = dino.health(target, iter(x), config)
    assert (
        dead["rank"] == 1
        and "effective rank" in dead["problems"][0]
        and "teacher_temp" in dead["problems"][0]
    )


def test_pictures():
    shown = dino.pictures(training().target, torch.rand(3, 3, 16, 16))
    assert shown["features"].dtype.name == "uint8" and shown["features"].shape[2] == 3
