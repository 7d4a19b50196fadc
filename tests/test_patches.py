"""kit/nets/patches.py: a convolution over patches as a matrix product, and their statistics."""

import torch
from torch import nn

from stages.kit.nets.patches import patch_statistics, patchify, project


def test_project_is_the_convolution_on_any_patches_with_its_gradients():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 4, 4).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    some = [5, 0, 2]
    found = project(conv, patchify(images, 4)[:, some])
    expected = conv(images).flatten(2).transpose(1, 2)[:, some]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight, sources = torch.randn_like(expected), (images, conv.weight, conv.bias)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), sources) for x in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_patch_statistics_are_torchs():
    patches = 5 + torch.randn(2, 4, 48, dtype=torch.float64)
    mean, deviation = patch_statistics(patches, eps=1e-6)
    variance, expected = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(deviation, (variance + 1e-6).sqrt(), rtol=1e-12, atol=0)
