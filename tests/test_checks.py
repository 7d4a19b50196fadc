"""The checks of settings: ranges, settings that are shared, and counts of patches that can be."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from workflow import checks


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", [0.5, 1e-9], [0, 1, -1]),
        ("(0, 1]", [1], [0, 1.1]),
        ("[0, 1)", [0], [1]),
        ("[0, 1]", [0, 1], [-0.1]),
        ("[1, inf)", [1, 10**9], [0, 0.99]),
        ("(0, inf)", [1e-9], [0]),
        ("[0, 1]", [None, (0.0, 1), []], [[0.5, 2], (3, None)]),
        ("(0, 1)", [], [float("nan")]),
    ],
)
def test_within(interval, inside, outside):
    for value in inside:
        checks.within(SimpleNamespace(key=value), interval, "key")
    for value in outside:
        with pytest.raises(ValueError, match="^key: found .*, expected ") as error:
            checks.within(SimpleNamespace(key=value), interval, "key")
        assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("interval", "words"),
    [("(0, 1]", "a number in (0, 1]"), ("[2, inf)", "2 or more"), ("(0, inf)", "a number above 0")],
)
def test_within_says_what_it_expects(interval, words):
    with pytest.raises(ValueError) as error:
        checks.within(SimpleNamespace(one=1, two=-3), interval, "two")
    assert str(error.value) == f"two: found -3, expected {words}"


def test_spans():
    checks.spans(SimpleNamespace(a=(0.2, 1.0), b=(0.5, 0.5)), "a", "b")
    for pair in ((0, 1), (0.6, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="^b: found "):
            checks.spans(SimpleNamespace(a=(0.2, 1.0), b=pair), "a", "b")


# What each setting of a mixin may not be; TYPED are those whose type says all that there is to say.
BAD = {
    checks.Optimiser: {
        "lr": [0, -1.0],
        "lr_per": [0],
        "min_lr": [-1e-9],
        "lr_drops": [(0.5, 1.0), (0.0,)],
        "warmup": [1.0, -0.1],
        "warmup_from": [1.0, -0.1],
        "weight_decay": [-0.1],
        "weight_decay_end": [-0.1],
        "betas": [(0.9, 1.0), (-0.1, 0.9)],
        "eps": [0.0],
        "sgd_momentum": [1.0],
        "clip": [-1.0],
    },
    checks.Crop: {"crop_min": [0.0, 1.1], "flip": [-0.1, 1.1]},
    checks.Evaluation: {"eval_crop": [0.0, 1.1]},
    checks.SizedCrop: {"crop_min": [0.0], "input_size": [0, 3]},
    checks.Decoder: {
        "decoder_dim": [0, 18],
        "decoder_depth": [0],
        "decoder_heads": [0, 3],
    },
    checks.Codes: {"codes": [1], "min_usage": [-0.1, 1.1], "min_perplexity": [-0.1, 1.1]},
    checks.LearntCodes: {
        "code_dim": [1],
        "decay": [1.0, -0.1],
        "kmeans_after": [-0.1, 1.1],
        "vectors_per_code": [0],
        "reseed": [-1],
        "codes": [1],
    },
    checks.SelfDistillation: {
        "prototypes": [1],
        "hidden": [0],
        "bottleneck": [0],
        "freeze_last_layer": [-1.0],
        "student_temp": [0.0],
        "teacher_temp": [0.0],
        "teacher_temp_end": [0.0],
        "teacher_temp_warmup": [1.1],
        "centre_momentum": [-0.1],
        "momentum": [1.1],
        "drop_path": [1.1],
        "n_local": [-1],
        "local_size": [0.0, 1.1],
        "global_scale": [(0.0, 1.0), (0.6, 0.5)],
        "local_scale": [(0.5, 1.1)],
        "flip": [1.1],
        "jitter": [(0.4, 0.4, 0.2, -0.1)],
        "jitter_p": [-0.1],
        "grey": [1.1],
        "solarise": [-0.1],
        "min_information": [1.1],
    },
    checks.MaskedSelfDistillation: {
        "mask_share": [-0.1, 1.1],
        "mask_ratio": [(0.0, 0.5), (0.5, 0.4)],
        "cls_weight": [-0.1],
        "patch_weight": [-0.1],
        "patch_temp_end": [0.0],
        "prototypes": [1],
        "lr": [0.0],
    },
    checks.MomentumContrast: {
        "hidden": [0],
        "dim": [0],
        "temperature": [0.0],
        "momentum": [1.1],
        "jitter": [(0.4, 0.4, 0.2, -0.1)],
        "jitter_p": [-0.1],
        "grey": [1.1],
        "solarise": [-0.1],
        "min_information": [1.1],
        "crop_min": [0.0],
        "lr": [0.0],
    },
    checks.PaintedImages: {
        "mask_ratio": [0.0, 1.0],
        "block": [0],
        "cell": [0],
        "discard": [-1],
        "input_size": [3],
        "decoder_dim": [6],
        "crop_min": [0.0],
        "lr": [0.0],
    },
    checks.UnitMasks: {"mask_ratio": [0.0, 1.0], "mask_unit": [0]},
    checks.Parts: {"min_parts": [-0.1], "min_in_image": [-0.1]},
    checks.BeitStart: {"layer_scale": [-0.1]},
    checks.BeitEncoder: {"rel_pos_rate": [-1.0], "layer_scale": [-0.1]},
    checks.TokenPrediction: {
        "mask_ratio": [0.0, 1.0],
        "min_block": [0],
        "drop_path": [1.0],
        "jitter": [-0.1],
        "rel_pos_rate": [-1.0],
        "flip": [1.1],
    },
    checks.Encoder: {"patch_size": [0], "embed_dim": [0], "mlp_ratio": [0.0]},
}
TYPED = {
    "predict",
    "norm",
    "centring",
    "optimizer",
    "clip_mode",
    "schedule",
    "positions",
    "init",
    "rel_pos_decay",
    "norm_last",
    "blur",
    "shared_head",
    "kmeans",
    "freeze_patches",
    "name",
    "args",
    "gate",
}


def test_every_mixin_is_here():
    mixins = {
        found
        for found in vars(checks).values()
        if isinstance(found, type) and issubclass(found, checks.Settings)
    }
    assert mixins - {checks.Settings} == set(BAD)
    for mixin, bad in BAD.items():
        mixin()  # the defaults are good
        inherited = {key for base in mixin.__mro__ for key in BAD.get(base, ())}
        assert {f.name for f in dataclasses.fields(mixin)} - TYPED == inherited, mixin
        assert bad


@pytest.mark.parametrize(
    ("mixin", "key", "value"),
    [(mixin, key, v) for mixin, bad in BAD.items() for key in bad for v in bad[key]],
)
def test_a_bad_value_of_a_mixin_is_named(mixin, key, value):
    @dataclass(frozen=True)
    class Config(mixin):
        own: int = 1

        def __post_init__(self):
            super().__post_init__()
            checks.within(self, "[1, inf)", "own")

    shown = re.escape(str(value).strip("()"))
    for config in (mixin, Config):
        with pytest.raises(ValueError, match=rf"^{key}: found \(?{shown}.*, expected "):
            config(**{key: value})
    with pytest.raises(ValueError, match="^own: found 0, expected 1 or more"):
        Config(own=0)


def test_mixins_stand_beside_each_other():
    @dataclass(frozen=True)
    class Config(checks.Optimiser, checks.Crop, checks.Decoder):
        crop_min: float = 0.4  # another default

    config = Config()
    assert (config.crop_min, config.lr, config.decoder_dim) == (0.4, 1e-3, 128)
    for key, value in (("lr", 0), ("crop_min", 0.0), ("decoder_heads", 3)):
        with pytest.raises(ValueError, match=f"^{key}: found {value}, expected "):
            Config(**{key: value})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_none_means_off_where_it_may():
    nothing = {"lr_per": None, "weight_decay_end": None, "clip": None}
    assert checks.Optimiser(**nothing).clip is None
    assert checks.SizedCrop(input_size=None).input_size is None
    assert checks.SelfDistillation(teacher_temp_end=None).teacher_temp_end is None


def test_views_per_image_are_counted_in_areas():
    assert checks.SelfDistillation(n_local=8, local_size=0.5).views_per_image == 4
    assert checks.SelfDistillation(n_local=0).views_per_image == 2


def test_sizes_of_an_encoder():
    model = checks.Encoder(patch_size=16, embed_dim=18)
    assert (model.stride, model.grid(224)) == (16, 14)
    model.check(224)
    with pytest.raises(ValueError, match="^patch_size: found 16, .* divisor of image_size 200"):
        model.check(200)
    with pytest.raises(ValueError, match="^model.embed_dim: found 18, expected a multiple of 4"):
        checks.sincos(model)
    checks.sincos(checks.Encoder(embed_dim=20))


def test_the_message_says_what_is_counted():
    with pytest.raises(
        ValueError, match="^mask_ratio: found 0.99, which hides 16 of 16 patches, expected "
    ):
        checks.keep_count(16, 0.99)
    with pytest.raises(ValueError, match="^mask_ratio: found 0.9, which hides 4 of 4 cells"):
        checks.keep_count(4, 0.9, "cells")
    with pytest.raises(ValueError, match="^mask_ratio: found 0.8, which hides 4 of 4 units"):
        checks.unit_count(4, 0.8)


def test_the_plan_can_use_them_without_torch():
    code = "import sys; import workflow.checks; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )


@pytest.mark.parametrize(
    ("patches", "ratio", "keep"),
    [
        (196, 0.75, 49),
        (64, 0.6, 25),
        (10, 0.9, 1),
        (100, 0.9, 10),
        (25, 0.75, 6),
        (256, 0.75, 64),
        (1000, 0.999, 1),
    ],
)
def test_keep_count_is_exact(patches, ratio, keep):
    assert checks.keep_count(patches, ratio) == keep


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 0.99])
def test_keep_count_refuses(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        checks.keep_count(16, ratio)


def test_hidden_count():
    assert checks.hidden_count(196, 0.3827) == 75
    assert checks.hidden_count(64, 0.39) == 25
    for ratio in (0.0, 0.01, 0.99, 1.0):
        with pytest.raises(ValueError, match="mask_ratio"):
            checks.hidden_count(16, ratio)
