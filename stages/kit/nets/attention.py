"""Attention in bf16 on a CPU, for which torch's fused kernel has no fast path."""

from __future__ import annotations

from torch import nn


def multiply_out(module: nn.Module) -> None:
    """timm's attention in `module` becomes two products and a softmax; its fused kernel rests."""
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False
