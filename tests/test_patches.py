"""kit/nets/patches.py: a convolution over patches as a matrix product, and the statistics of
patches.
"""

import pytest
import torch
from torch import nn

from stages.kit.nets.patches import PatchConv, patch_statistics, patchify, project


def convolution(**kw) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, **{"kernel_size": 4, "stride": 4, **kw}).double()


def test_patch_conv_is_the_convolution_with_its_gradients():
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    plain, ours = convolution(), PatchConv.of(convolution())
    found, expected = ours(images), plain(images)
    assert found.shape == expected.shape == (2, 5, 2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((out * weight).sum(), (images, layer.weight, layer.bias))
        for out, layer in ((found, ours), (expected, plain))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_patch_conv_has_the_convolutions_bits_in_evaluation():
    images = torch.randn(2, 3, 8, 8)
    plain, ours = convolution().float(), PatchConv.of(convolution().float()).eval()
    assert torch.equal(ours(images), plain(images))


def test_project_takes_any_patches():
    images, conv = torch.randn(2, 3, 8, 8, dtype=torch.float64), convolution()
    some = patchify(images, 4)[:, [3, 0]]
    torch.testing.assert_close(
        project(conv, some), conv(images).flatten(2).transpose(1, 2)[:, [3, 0]]
    )


@pytest.mark.parametrize(
    "wrong", [{"stride": 2}, {"padding": 1}, {"kernel_size": (4, 2), "stride": (4, 2)}]
)
def test_overlapping_patches_are_refused(wrong):
    with pytest.raises(ValueError, match="side by side"):
        PatchConv.of(convolution(**wrong))


def test_patch_statistics_are_torchs():
    patches = 5 + torch.randn(2, 4, 48, dtype=torch.float64)
    mean, deviation = patch_statistics(patches, eps=1e-6)
    variance, expected = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(deviation, (variance + 1e-6).sqrt(), rtol=1e-12, atol=0)
