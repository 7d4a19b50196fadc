"""Arithmetic of the forward pass: which type, and the loss scaling that fp16 needs.

`auto` is a fixed rule, never a timing, so that the same parameters give the same bits on the same
kind of machine:

- CUDA with bf16: bf16 autocast;
- CPU with AMX or avx512_bf16: bf16 autocast when the module's width is at least 32, else fp32;
- anything else: fp32.

Measured on a Xeon with AMX (torch 2.15), without torch's fused attention (kit/nets/attention.py):
CPU time of a whole training step (forward, backward, fused AdamW) of a ViT of depth 6 on 65 tokens
at batch 64, fp32 over bf16. One thread: width 32 1.31, 48 1.41, 64 1.59, 128 2.08, 192 2.38, 384
2.69; 384 on 197 tokens 2.49 (batch 4). Two threads, time of both: width 64 1.69, 192 2.63. With
fused attention bf16 gains only from width 128 on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

NAMES = ("auto", "fp32", "bf16", "fp16")
CPU_BF16_WIDTH = 32  # see the measurement above


@dataclass(frozen=True)
class Precision:
    """`name` is fp32, bf16 or fp16 (resolved); `device` its torch device type."""

    name: str
    device: str

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass.

        The cast cache is off: in some versions of torch a weight that was first cast under no_grad
        comes back from it without its gradient (pytorch issue 65766). A weight is normally used
        once per forward, so that it saves nothing.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, torch.bfloat16)
        return torch.autocast(self.device, dtype, enabled=self.name != "fp32", cache_enabled=False)

    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(self.device) if self.name == "fp16" else None


def choose(name: str, device: torch.device | str, module: nn.Module | None = None) -> Precision:
    """Resolves `name` (one of NAMES) for a device and, on a CPU, the width of the module (unknown:
    wide).

    ValueError for an unknown name, for fp16 without CUDA and for bf16 on a GPU without it.
    """
    kind = torch.device(device).type
    if name not in NAMES:
        raise ValueError(f"train.precision: {name!r} is not one of {', '.join(NAMES)}")
    if name == "fp16" and kind != "cuda":
        raise ValueError(
            f"train.precision: fp16 needs a CUDA GPU, this run is on {kind}; use bf16, fp32 or auto"
        )
    if (
        name == "bf16"
        and kind == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"train.precision: {torch.cuda.get_device_name()} has no bf16; use fp16 or fp32"
        )
    if name != "auto":
        return Precision(name, kind)
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = (
            kind == "cpu" and cpu_has_bf16() and (module is None or width(module) >= CPU_BF16_WIDTH)
        )
    return Precision("bf16" if fast else "fp32", kind)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AMX or avx512_bf16)."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    known = [getattr(torch.cpu, probe) for probe in probes if hasattr(torch.cpu, probe)]
    if known:
        return any(bool(probe()) for probe in known)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def width(module: nn.Module) -> int:
    """The widest matrix product of a module: the largest min(in, out) of its linear layers; 0
    without any.
    """
    return max(
        (min(layer.weight.shape) for layer in module.modules() if isinstance(layer, nn.Linear)),
        default=0,
    )
