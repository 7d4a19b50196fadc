"""The finished encoder of a run as a teacher: features of the plain timm model, frozen, on the
student's grid.
"""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from stages.kit.nets.teacher import Teacher
from torch import nn

from stages.kit.nets import encoders
from stages.kit.spec import Spec

MODEL = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "args": {},
}
SPEC = Spec(
    image_size=16, model=MODEL, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), num_classes=4, images=64
)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def exported(folder, family="vit", **kw):
    """A folder with an encoder whose norms are not trivial."""
    torch.manual_seed(1)
    encoder = encoders.create(SPEC, family, **kw)
    nn.init.normal_(encoder.norm.weight, 1, 0.3)
    nn.init.normal_(encoder.norm.bias)
    encoders.save(encoder, folder, SPEC)
    return folder


@pytest.mark.parametrize(
    ("family", "kw"), [("vit", {}), ("beit", {}), ("vit", {"depth": 0}), ("vit", {"reg_tokens": 2})]
)
def test_features_are_those_of_the_plain_timm_model(tmp_path, family, kw):
    folder = exported(tmp_path, family, **kw)
    teacher = Teacher.load(folder, SPEC)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    seen = {}
    plain.norm.register_forward_hook(
        lambda module, args, out: seen.update(before=args[0], after=out)
    )
    with torch.no_grad():
        plain.forward_features(SPEC.normalise(IMAGES))
    prefix = plain.num_prefix_tokens
    before, after = (
        torch.cat([x[:, :1], x[:, prefix:]], dim=1) for x in (seen["before"], seen["after"])
    )
    assert torch.allclose(teacher.tokens(IMAGES), before, atol=1e-6)
    assert torch.allclose(teacher.tokens(IMAGES, norm=True), after, atol=1e-5)
    assert torch.allclose(teacher(IMAGES), after[:, 1:], atol=1e-5)
    assert not torch.allclose(before, after, atol=0.1)
    assert (teacher.dim, teacher.has_cls) == (16, True)


def test_it_is_frozen_and_stays_in_evaluation_mode(tmp_path):
    teacher = Teacher.load(exported(tmp_path, drop_path_rate=0.9), SPEC).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.tokens(IMAGES.requires_grad_()).requires_grad
    IMAGES.requires_grad_(False)
    assert torch.equal(teacher(IMAGES), teacher(IMAGES))


def test_features_lie_on_the_students_grid(tmp_path):
    """An encoder whose grid is coarser than the student's, as a pyramid's is; no class token."""
    folder = exported(tmp_path, class_token=False, global_pool="avg", fc_norm=False)
    finer = dataclasses.replace(SPEC, model={**MODEL, "patch_size": 2})
    teacher = Teacher.load(folder, finer)
    features = teacher.tokens(IMAGES)
    assert features.shape == (3, 64, 16)
    assert not teacher.has_cls
    own = Teacher.load(folder, SPEC).tokens(IMAGES).transpose(1, 2).unflatten(2, (4, 4))
    maps = features.transpose(1, 2).unflatten(2, (8, 8))
    assert torch.allclose(
        maps[..., 0, 0], own[..., 0, 0], atol=1e-6
    )  # corners stay, what is between is mixed
    assert torch.allclose(maps[..., 1, 0], 0.75 * own[..., 0, 0] + 0.25 * own[..., 1, 0], atol=1e-5)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported encoder here"):
        Teacher.load(tmp_path, SPEC)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        Teacher.load(exported(tmp_path), SPEC)(IMAGES * 3)
