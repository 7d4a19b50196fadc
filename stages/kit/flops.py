"""FLOPs of transformers by formula, and how many a machine does: for model FLOP utilisation (MFU).

Counted are matrix products, 2 m n k each, as torch.utils.flop_counter counts them; norms, activations and softmax
are left out, as is usual. Backward costs two products for each of the forward pass, but for the first layer,
whose input needs no gradient. torch's counter adds the scores that fused attention computes a second time.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch


def block(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Forward of one block on one sequence: qkv and projection, the two products of attention, the MLP."""
    linear = 2 * tokens * width * width * (4 + 2 * mlp_ratio)
    attention = 4 * tokens * tokens * width
    return linear + attention


def embedding(patches: int, patch: int, width: int, channels: int = 3) -> float:
    """Forward of the patch embedding of `patches` patches of patch x patch pixels."""
    return 2 * patches * patch * patch * channels * width


def linear(tokens: int, width: int, out: int) -> float:
    """Forward of a linear layer."""
    return 2 * tokens * width * out


def vit(image: int, patch: int, width: int, depth: int, mlp_ratio: float = 4.0, prefix: int = 1) -> float:
    """Forward of a ViT without head on one image."""
    patches = (image // patch) ** 2
    return embedding(patches, patch, width) + depth * block(patches + prefix, width, mlp_ratio)


def trained(forward: float, first: float = 0.0) -> float:
    """Forward and backward of what takes `forward` FLOPs, of which `first` go into layers on the input itself."""
    return 3 * forward - first


def mae(image: int, patch: int, width: int, depth: int, keep: int, dim: int, layers: int, prefix: int = 1) -> float:
    """A training step of MAE on one image: `keep` visible patches, a decoder of `layers` blocks of width `dim`."""
    patches = (image // patch) ** 2
    first = embedding(keep, patch, width)
    encoder = first + depth * block(keep + prefix, width)
    decoder = linear(keep + prefix, width, dim) + layers * block(patches + prefix, dim)
    return trained(encoder + decoder + linear(patches, dim, 3 * patch * patch), first)


def beitv2(image: int, patch: int, width: int, depth: int, hidden: int, codes: int, heads: int, tokenizer: float) -> float:
    """A training step of BEiT v2 on one image: `heads` aggregation blocks (0: none), `tokenizer` FLOPs of its target."""
    patches = (image // patch) ** 2
    outputs = (2 if heads else 1) * linear(hidden, width, codes)
    forward = vit(image, patch, width, depth) + heads * block(patches + 1, width) + outputs
    return trained(forward, embedding(patches, patch, width)) + tokenizer


@lru_cache(maxsize=8)
def matrix_rate(device: torch.device | str, precision: str = "bf16", seconds: float = 0.1) -> float:
    """FLOP/s of large square matrix products here and now, with the threads that torch uses: the best of a few.

    What utilisation is measured against; 0 on devices other than CPU and CUDA.
    """
    kind = torch.device(device)
    if kind.type not in ("cpu", "cuda"):
        return 0.0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side = 8192 if kind.type == "cuda" else 1024
    a = torch.ones(side, side, dtype=dtype, device=kind)
    out, best, began = torch.empty_like(a), float("inf"), time.perf_counter()
    rounds = 0
    while rounds < 4 or time.perf_counter() - began < seconds:
        _wait(kind)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(kind)
        best, rounds = min(best, time.perf_counter() - start), rounds + 1
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
