"""Attention on a CPU, where torch's fused kernel has no fast path for bf16."""

from __future__ import annotations

import torch
from torch import nn


def unfused(module: nn.Module, device: torch.device | str) -> nn.Module:
    """`module` itself; on a CPU its timm attention becomes two products and a softmax."""
    if torch.device(device).type == "cpu":
        for layer in module.modules():
            if hasattr(layer, "fused_attn"):
                layer.fused_attn = False
    return module
