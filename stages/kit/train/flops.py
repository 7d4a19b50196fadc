"""What model FLOP utilisation (MFU) is made of: the FLOPs of a step, and how many a machine does in
a second.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch


def counting():
    """Counts the matrix products inside of it, 2 m n k each; norms, activations and softmax are
    left out, as is usual.

    So are the scores that fused attention computes again in its backward pass: the model does not
    ask for them. A context manager with `get_total_flops()`.
    """
    # here, because it loads a compiler (triton) that no untrained job needs
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    names = [
        op
        for op in flop_registry
        if "scaled_dot_product" in str(op) and str(op).endswith("backward")
    ]
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(names, _attention_backward))


def _attention_backward(grad, query, key, value, *rest, **options) -> int:
    """Two products for each of the two of the forward pass; the arguments are shapes, (B,H,N,D)
    those of query.
    """
    return 4 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


@lru_cache(maxsize=8)
def matrix_rate(device: torch.device | str, precision: str = "bf16", seconds: float = 0.1) -> float:
    """FLOP/s of large square matrix products here and now, with the threads that torch uses: the
    best of a few.

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
