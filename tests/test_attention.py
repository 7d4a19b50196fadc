"""kit/nets/attention.py: the product of a softmax against torch's own, its gradients in float64,
and where it is used.
"""

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from stages.kit.nets.attention import FUSED, attend, multiplied_out


def qkv(dtype, n=5, m=7, grad=False):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, n, 4), torch.randn(2, 3, m, 4), torch.randn(2, 3, m, 6)
    return [x.to(dtype).requires_grad_(grad) for x in (q, k, v)]


@pytest.mark.parametrize(
    "bias", [None, (1, 3, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7), (3, 1, 7), (5, 7)]
)
def test_values_and_gradients_are_torchs(bias):
    ours, theirs = qkv(torch.float64, grad=True), qkv(torch.float64, grad=True)
    a = b = None
    if bias is not None:
        a = torch.randn(bias, dtype=torch.float64, requires_grad=True)
        b = a.detach().clone().requires_grad_()
    for scale in (None, 0.7):
        x, y = attend(*ours, a, scale), FUSED(*theirs, attn_mask=b, scale=scale)
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        (x * torch.arange(6)).sum().backward()
        (y * torch.arange(6)).sum().backward()
    for x, y in zip([*ours, a], [*theirs, b], strict=True):
        if x is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, (*qkv(torch.float64, grad=True), bias))


def test_bf16_rounds_no_more_than_torchs_kernel():
    exact = FUSED(*qkv(torch.float64, 65, 65))
    error = (attend(*qkv(torch.bfloat16, 65, 65)).double() - exact).abs().mean()
    assert error < 1.5 * (FUSED(*qkv(torch.bfloat16, 65, 65)).double() - exact).abs().mean()


def test_used_under_bf16_autocast_on_a_cpu_and_nowhere_else(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "stages.kit.nets.attention.attend", lambda *a: calls.append(a) or attend(*a)
    )
    q, k, v = qkv(torch.float32)
    with multiplied_out("cpu"):
        assert (
            torch.equal(F.scaled_dot_product_attention(q, k, v), FUSED(q, k, v)) and not calls
        )  # fp32
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16 and len(calls) == 1
            )
            square = [x[:, :, :5] for x in (q, k, v)]
            for special in (
                {"is_causal": True},
                {"dropout_p": 0.5},
                {"attn_mask": torch.ones(5, 5, dtype=torch.bool)},
            ):
                F.scaled_dot_product_attention(*square, **special)
            assert len(calls) == 1  # these stay torch's
    with torch.autocast("cpu", torch.bfloat16):
        F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1 and F.scaled_dot_product_attention is FUSED
    with multiplied_out("meta"):
        assert F.scaled_dot_product_attention is FUSED


def test_a_whole_encoder_with_relative_positions_differs_in_rounding_only():
    torch.manual_seed(0)
    model = Beit(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        use_shared_rel_pos_bias=True,
        num_classes=0,
    )
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    images = torch.randn(4, 3, 32, 32)

    def gradients(low: bool, ours: bool) -> torch.Tensor:
        model.zero_grad()
        with (
            multiplied_out("cpu" if ours else "meta"),
            torch.autocast("cpu", torch.bfloat16, enabled=low),
        ):
            model(images).float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, fused, ours = gradients(False, False), gradients(True, False), gradients(True, True)
    assert 0 < (ours - exact).norm() < 1.5 * (fused - exact).norm()
