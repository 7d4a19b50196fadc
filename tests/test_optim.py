"""Parameter groups, clipping, schedules, precision, averages: against independent arithmetic."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import nn

from stages.kit.nets import ema
from stages.kit.spec import Spec, configure
from stages.kit.train import optim, precision, schedule
from stages.kit.train.loop import Recipe
from workflow import plugins
from workflow.checks import Optimiser


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.again = self.first  # a second name for the same parameters

    def no_weight_decay(self):
        return {"token"}


def names_in(module, group):
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in module.named_parameters() if id(p) in wanted}


def test_groups_leave_out_frozen_and_exempt_one_dimensional():
    module = Toy()
    decayed, plain = optim.groups(module, 0.3)
    assert names_in(module, decayed) == {"first.weight"} and decayed["weight_decay"] == 0.3
    assert (
        names_in(module, plain) == {"first.bias", "norm.weight", "norm.bias", "token"}
        and plain["weight_decay"] == 0
    )
    assert len(decayed["params"]) == 1 and len(plain["params"]) == 4


def test_groups_have_the_rates_of_the_module():
    class Quick(Toy):
        def rates(self):
            return {"norm.weight": 5.0, "norm.bias": 5.0, "first.weight": 2.0, "frozen.bias": 3.0}

    module = Quick()
    groups = optim.groups(module, 0.3)
    found = [(names_in(module, g), g["weight_decay"], g["lr_scale"]) for g in groups]
    assert found == [
        ({"first.bias", "token"}, 0.0, 1.0),
        ({"first.weight"}, 0.3, 2.0),
        ({"norm.weight", "norm.bias"}, 0.0, 5.0),
    ]


def test_a_rate_of_no_parameter_is_named():
    module = Toy()
    module.rates = lambda: {"first.wait": 2.0}
    with pytest.raises(ValueError, match="^rates: found 'first.wait', expected the name of a para"):
        optim.groups(module, 0.3)


def test_layer_decay_scales_of_vit_b_at_065():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=10)
    groups = optim.layer_decay_groups(vit, 12, 0.65, 0.05)
    of = {name: group for group in groups for name in names_in(vit, group)}
    assert set(of) == {name for name, _ in vit.named_parameters()}
    assert of["patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.003697, abs=5e-7)
    assert of["pos_embed"]["lr_scale"] == of["cls_token"]["lr_scale"] == 0.65**13
    assert of["blocks.0.mlp.fc1.weight"]["lr_scale"] == pytest.approx(0.005688, abs=5e-7)
    assert of["blocks.11.attn.qkv.weight"]["lr_scale"] == 0.65
    assert of["norm.weight"]["lr_scale"] == of["head.weight"]["lr_scale"] == 1
    free = {name for name, group in of.items() if group["weight_decay"] == 0}
    assert free == {name for name, p in vit.named_parameters() if p.ndim <= 1} | {
        "pos_embed",
        "cls_token",
    }


def test_layer_decay_finds_an_encoder_inside_a_module_and_refuses_a_wrong_depth():
    assert optim.layer_id("encoder.blocks.3.norm1.weight", 12) == 4
    assert optim.layer_id("encoder.mask_token", 12) == 0
    assert optim.layer_id("encoder.rel_pos_bias.relative_position_bias_table", 12) == 13
    assert optim.layer_id("fc_norm.weight", 12) == 13
    with pytest.raises(ValueError, match="block 12"):
        optim.layer_id("blocks.12.norm1.weight", 12)


def test_clip_global_is_torchs_and_tensor_clips_each():
    def gradients():
        torch.manual_seed(0)
        parameters = [
            nn.Parameter(torch.zeros(5, 3)),
            nn.Parameter(torch.zeros(7)),
            nn.Parameter(torch.zeros(2)),
        ]
        for parameter, size in zip(parameters[:2], (4.0, 0.01), strict=True):
            parameter.grad = torch.randn(parameter.shape) * size
        return parameters

    ours, theirs = gradients(), gradients()
    norm = optim.clip(ours, 1.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.5))
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    ours, before = gradients(), gradients()
    optim.clip(ours, 1.5, "tensor")
    assert ours[0].grad.norm() == pytest.approx(1.5, rel=1e-5)
    assert (
        torch.equal(ours[1].grad, before[1].grad) and ours[2].grad is None
    )  # small enough, and none at all
    ours = gradients()
    optim.clip(ours, None)
    assert torch.equal(ours[0].grad, before[0].grad)


def test_build_names_what_is_wrong():
    recipe = SimpleNamespace(optimizer="adamw", lr=1.0, betas=(0.9, 0.99), eps=1e-8, momentum=0.9)
    parameter, cpu = nn.Parameter(torch.ones(2)), torch.device("cpu")
    group = {"params": [parameter], "weight_decay": 0.0, "lr_scale": 1.0}
    with pytest.raises(ValueError, match="two parameter groups"):
        optim.build(recipe, [group, group], cpu)
    with pytest.raises(ValueError, match="nothing to train"):
        optim.build(recipe, [], cpu)
    with pytest.raises(ValueError, match="adamv"):
        optim.build(SimpleNamespace(**{**vars(recipe), "optimizer": "adamv"}), [group], cpu)
    for name, kind in (("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "LARS")):
        built = optim.build(SimpleNamespace(**{**vars(recipe), "optimizer": name}), [group], cpu)
        assert type(built).__name__ == kind


def test_rate_is_zero_at_first_peak_after_warmup_and_min_at_the_end():
    config = Optimiser(
        lr=1.5e-4, lr_per=256, min_lr=1e-6, warmup=0.25, weight_decay=0.04, weight_decay_end=0.4
    )
    recipe = Recipe.of(config, {"epochs": 8, "batch_size": 4096}, 5)
    assert (recipe.steps, recipe.warmup) == (40, 10)
    rates = [recipe.lr_at(step) for step in (0, 5, 10, 40)]
    assert rates == pytest.approx([0, 1.2e-3, 2.4e-3, 1e-6]) and rates[0] == 0
    # MAE's formula in epochs: e = 25 / 5 = 5, warm-up 2 of 8
    wanted = 1e-6 + (2.4e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (5 - 2) / (8 - 2)))
    assert recipe.lr_at(25) == pytest.approx(wanted)
    decays = [recipe.weight_decay_at(step, 0.04) for step in (0, 20, 40)]
    assert decays == pytest.approx([0.04, 0.22, 0.4]) and recipe.weight_decay_at(20, 0.0) == 0
    config = Optimiser(lr=0.1, clip=3.0, warmup=0.0)
    absolute = Recipe.of(config, {"epochs": 1, "batch_size": 64}, 2)
    assert (absolute.lr, absolute.clip, absolute.warmup) == (0.1, 3.0, 0)
    assert absolute.weight_decay_at(1, 0.1) == 0.1


def test_rate_that_drops_at_given_shares_of_the_training():
    """SimMIM's 800 epochs: warm-up of 10, a tenth of the rate from epoch 700 on."""
    drops = Optimiser(lr=1e-4, lr_per=512, warmup=10 / 800, lr_drops=(700 / 800,))
    recipe = Recipe.of(drops, {"epochs": 800, "batch_size": 2048}, steps_per_epoch=5)
    rates = [recipe.lr_at(5 * epoch) for epoch in (0, 5, 10, 699, 700, 799)]
    assert rates == pytest.approx([0, 2e-4, 4e-4, 4e-4, 4e-5, 4e-5])


def official_beit(base, final, epochs, per_epoch, warmup_epochs):
    """cosine_scheduler of BEiT, DINO and iBOT: the rate of every step."""
    warm = warmup_epochs * per_epoch
    after = np.arange(epochs * per_epoch - warm)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * after / len(after)))
    return np.concatenate([np.linspace(0, base, warm), cosine])


def test_schedule_of_beit_dino_and_ibot_reaches_the_peak_in_the_last_step_of_the_warm_up():
    config = Optimiser(lr=1.5e-3, min_lr=1e-5, warmup=0.2, schedule="beit")
    recipe = Recipe.of(config, {"epochs": 10, "batch_size": 64}, 5)
    found = [recipe.lr_at(step) for step in range(recipe.steps)]
    np.testing.assert_allclose(found, official_beit(1.5e-3, 1e-5, 10, 5, 2), rtol=1e-12)
    assert found[0] == 0 and found[9] == found[10] == 1.5e-3
    ours = [replace(recipe, schedule="mae").lr_at(step) for step in range(recipe.steps)]
    assert ours[9] < ours[10] == 1.5e-3 and ours[10:] == found[10:]
    one = replace(recipe, warmup=1)
    assert [one.lr_at(0), one.lr_at(1)] == [0, 1.5e-3]  # as np.linspace(0, 1.5e-3, 1)


@pytest.mark.parametrize("drops", [(), (0.7, 0.85)])
def test_schedule_of_simmim_is_timms_set_after_each_step(drops):
    config = Optimiser(
        lr=1e-3,
        min_lr=1e-5,
        warmup=0.1,
        warmup_from=0.005,
        lr_drops=drops,
        schedule="simmim",
    )
    recipe = Recipe.of(config, {"epochs": 10, "batch_size": 64}, 10)
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-3)
    how = {"warmup_t": 10, "warmup_lr_init": 5e-6, "t_in_epochs": False, "warmup_prefix": False}
    if drops:  # timm takes the first step of a drop for one before it, SimMIM's own code does not
        at = [round(drop * 100) for drop in drops]
        official = MultiStepLRScheduler(sgd, decay_t=at, decay_rate=0.1, **how)
        official.get_curr_decay_steps = lambda t: bisect.bisect_right(at, t)
    else:
        official = CosineLRScheduler(sgd, t_initial=100, lr_min=1e-5, **how)
    rates = []
    for step in range(100):
        rates.append(sgd.param_groups[0]["lr"])
        official.step_update(step)
    found = [recipe.lr_at(step) for step in range(100)]
    np.testing.assert_allclose(found, rates, rtol=1e-9)
    assert found[0] == found[1] == pytest.approx(5e-6)
    if drops:  # one step late
        assert found[70] == 1e-3 and found[71] == pytest.approx(1e-4)
    else:
        assert max(found) < 1e-3


def test_published_recipes_count_their_steps_as_their_official_codes():
    found = {
        f"{kind}/{name}": plugins.module(kind, name).PUBLISHED.get("schedule", "mae")
        for kind in ("method", "target")
        for name in plugins.names(kind)
        if getattr(plugins.module(kind, name), "PUBLISHED", None)
    }
    beit = ("beit", "beitv2", "mcbeit", "dino", "ibot", "attmask", "bootmae", "eva")
    beit = {"target/dino", "target/vqkd", *(f"method/{name}" for name in beit)}
    assert {name for name, schedule in found.items() if schedule == "beit"} == beit
    assert {name for name, schedule in found.items() if schedule == "simmim"} == {"method/simmim"}


CHANGED = {
    "optimizer": "sgd",
    "lr_drops": (0.5,),
    "betas": (0.5, 0.6),
    "clip_mode": "tensor",
    "schedule": "beit",
}


@pytest.mark.parametrize("name", [field.name for field in fields(Optimiser)])
def test_every_setting_of_an_optimiser_is_read(name):
    train = {"epochs": 10, "batch_size": 64}
    plain = Optimiser()
    other = replace(plain, **{name: CHANGED.get(name, 7 if name == "lr_per" else 0.5)})
    assert Recipe.of(plain, train, 10) != Recipe.of(other, train, 10)


@dataclass(frozen=True)
class Scaled(Optimiser):
    @property
    def lr_factor(self):
        return 3.0

    @property
    def views_per_image(self):
        return 2.5


def test_a_config_may_scale_its_rate_and_count_its_views():
    recipe = Recipe.of(Scaled(lr=0.5), {"epochs": 1, "batch_size": 8}, 1)
    assert (recipe.lr, recipe.views_per_image) == (1.5, 2.5)
    with pytest.raises(TypeError, match="SimpleNamespace: .* expected a Config that inherits"):
        Recipe.of(SimpleNamespace(lr=1e-3, weight_dacay=0.1), {"epochs": 1, "batch_size": 8}, 1)


def test_schedules_are_clamped():
    assert schedule.linear(-1, 0.04, 0.07) == 0.04 and schedule.linear(
        2, 0.04, 0.07
    ) == pytest.approx(0.07)
    assert (
        schedule.cosine(0.5, 1.0, 0.0) == pytest.approx(0.5)
        and schedule.cosine(7, 1.0, 0.25) == 0.25
    )


def test_ema_averages_parameters_and_copies_buffers():
    torch.manual_seed(0)
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(student.weight)
    student.running_mean.fill_(5.0)
    wanted = 0.9 * teacher.weight.detach() + 0.1 * student.weight.detach()
    ema.update(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight.detach(), wanted)
    assert torch.equal(teacher.running_mean, student.running_mean)
    before = student.weight.detach().clone()
    ema.update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight) and torch.equal(student.weight, before)
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        ema.update(teacher, nn.Identity(), 0.9)
    assert ema.momentum(0.996, 0) == pytest.approx(0.996) and ema.momentum(0.996, 1) == 1
    assert ema.momentum(0.996, 0.5) == pytest.approx(0.998)


def test_precision_rule(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert precision.choose("auto", "cpu", nn.Linear(192, 10)).name == "fp32"
    assert precision.choose("auto", "cpu", nn.Linear(192, 32)).name == "bf16"
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert precision.choose("auto", "cpu", nn.Linear(192, 192)).name == "fp32"
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        precision.choose("fp16", "cpu")
    with pytest.raises(ValueError, match="'fp8'"):
        precision.choose("fp8", "cpu")
    with precision.choose("bf16", "cpu").autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.bfloat16
    with precision.choose("fp32", "cpu").autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.float32


def test_a_weight_used_under_no_grad_first_keeps_its_gradient_under_autocast():
    layer = nn.Linear(4, 4)
    with precision.choose("bf16", "cpu").autocast():
        with torch.no_grad():
            layer(torch.ones(1, 4))
        loss = layer(torch.ones(1, 4)).float().sum()
    loss.backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_spec_normalises_and_survives_json():
    info = {
        "classes": ["a", "b"],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.1, 0.3],
        "splits": {"train": {"count": 7}},
    }
    spec = Spec.of(info, 32, {"kind": "vit", "config": {"patch_size": 4}})
    assert (spec.grid, spec.num_classes, spec.images) == (8, 2, 7)
    images = torch.rand(2, 3, 5, 5)
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    wanted = (images - mean) / std
    torch.testing.assert_close(spec.normalise(images), wanted)
    torch.testing.assert_close(spec.denormalise(spec.normalise(images)), images)
    assert Spec.from_json(spec.to_json()) == spec


def test_configure_turns_lists_back_into_tuples():
    made = configure(
        lambda **values: values, {"betas": [0.9, 0.95], "nested": [[1, 2], [3]], "name": "x"}
    )
    assert made == {"betas": (0.9, 0.95), "nested": ((1, 2), (3,)), "name": "x"}
