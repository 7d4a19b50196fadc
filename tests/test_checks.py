"""The checks of settings: ranges, and counts of patches that can be."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "key"),
    [
        (16, 1, 4, None),
        (18, 1, 2, "decoder_dim"),
        (0, 1, 1, "decoder_dim"),
        (16, 0, 4, "decoder_depth"),
        (16, 1, 0, "decoder_heads"),
        (16, 1, 3, "decoder_heads"),
    ],
)
def test_decoder(dim, depth, heads, key):
    settings = {"decoder_dim": dim, "decoder_depth": depth, "decoder_heads": heads}
    if key is None:
        checks.Decoder(**settings)
        return
    with pytest.raises(ValueError, match=f"^{key}: found .*{settings[key]}"):
        checks.Decoder(**settings)


@dataclass(frozen=True)
class Everything(checks.Optimiser, checks.SizedCrop, checks.Decoder):
    lr: float = 3.0  # another default

    def __post_init__(self):
        super().__post_init__()
        if self.clip == 9:
            raise ValueError("clip: found 9")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr_per": 0}, "lr_per"),
        ({"warmup": 1.0}, "warmup"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lr_drops": (0.5, 1.0)}, "lr_drops"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"crop_min": 0.0}, "crop_min"),
        ({"flip": 1.5}, "flip"),
        ({"input_size": 2}, "input_size"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"clip": 9}, "clip"),
    ],
)
def test_a_config_inherits_settings_with_their_checks(settings, key):
    assert Everything().lr == 3.0 and Everything().decoder_dim == 128
    with pytest.raises(ValueError, match=f"^{key}: found "):
        Everything(**settings)


def test_what_an_encoder_says_of_its_tokens():
    encoder = checks.Encoder(patch_size=4)
    assert (encoder.stride, encoder.grid(32)) == (4, 8)
    encoder.check(32)
    with pytest.raises(ValueError, match="^patch_size: found 4, .*image_size 18"):
        encoder.check(18)
    with pytest.raises(ValueError, match="^embed_dim: found 0"):
        checks.Encoder(embed_dim=0)


def test_the_message_says_what_is_counted():
    with pytest.raises(ValueError, match="^mask_ratio: 0.99 of 16 patches hides 16"):
        checks.keep_count(16, 0.99)
    with pytest.raises(ValueError, match="^mask_ratio: 0.9 of 4 cells hides 4"):
        checks.keep_count(4, 0.9, "cells")
    with pytest.raises(ValueError, match="^mask_ratio: 0.8 of 4 units hides 4"):
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
