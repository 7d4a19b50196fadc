"""Randomness without state: every random number is a pure function of a key and a place.

Each number is the hash of (base, row, column). `base` says what is drawn (seed, epoch or step,
name), `row` says for which sample, and `column` counts that sample's own numbers. So a sample gets
the same numbers in any batch, after any start, with any number of workers. A generator that moves
on with each use could not promise that.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom
Number Generators") in wrap-around int64 arithmetic. It is exact, and hence the same on a CPU and a
GPU.
"""

from __future__ import annotations

import hashlib
import math
import operator

import torch

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def key(*parts: int | str) -> int:
    """An integer in [0, 2^63) for these parts, the same in every process and on every machine.

    Types, order and borders of the parts count: key("ab", "c"), key("a", "bc"), key(1) and key("1")
    all differ. TypeError for a part that is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            kind, text = b"s", part.encode()
        elif isinstance(part, bool) or not hasattr(part, "__index__"):
            raise TypeError(
                f"keyed.key: parts are integers or strings, found {part!r} ({type(part).__name__})"
            )
        else:
            kind, text = b"i", str(operator.index(part)).encode()
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def bits(
    base: int, rows: torch.Tensor, *shape: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Uniform random int64 (B, *shape), all 64 bits random.

    `base` is an integer (see `key`), `rows` are integers (B,). Element (b, ...) depends on base,
    rows[b] and its own place only. The result lies on `device` (None: where `rows` does).
    """
    if rows.ndim != 1 or rows.is_floating_point():
        raise ValueError(
            f"keyed: rows must be a vector of integers, found {tuple(rows.shape)} of {rows.dtype}"
        )
    rows = rows.to(device=device if device is not None else rows.device, dtype=torch.int64)
    base = (int(base) + (1 << 63)) % (1 << 64) - (1 << 63)
    # hashed twice: else the numbers of a row would be those of its neighbour, shifted by one place
    stream = _mix(rows * GOLDEN + base)[:, None]
    column = torch.arange(1, math.prod(shape) + 1, device=rows.device) * GOLDEN
    return _mix(stream + column).reshape(len(rows), *shape)


def uniform(
    base: int, rows: torch.Tensor, *shape: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Uniform float32 (B, *shape) in [0, 1); arguments as for `bits`. They are multiples of 2^-24,
    so rounding never makes 1.0 of one.
    """
    return _shift(bits(base, rows, *shape, device=device), 40).float() * 2.0**-24


def normal(
    base: int, rows: torch.Tensor, *shape: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Standard normal float32 (B, *shape), by Box-Muller from two uniforms each; arguments as for
    `bits`.

    The same on one device always. Logarithm and cosine differ between devices in their last bit,
    so it is computed in float64 and then rounded; about one number in 10^8 can still differ between
    a CPU and a GPU.
    """
    pair = _shift(bits(base, rows, 2, math.prod(shape), device=device), 11).double() + 0.5
    first, second = (pair * 2.0**-53).unbind(1)
    numbers = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
    return numbers.float().reshape(len(rows), *shape)


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts, for library code that wants one."""
    return torch.Generator().manual_seed(key(*parts))


def permutation(n: int, *parts: int | str) -> torch.Tensor:
    """A random order of 0..n-1, int64 (n,). It does not change with torch's version, as that of
    torch.randperm may.
    """
    return bits(key(*parts), torch.zeros(1, dtype=torch.int64), n)[0].argsort(stable=True)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, places: int) -> torch.Tensor:
    """Shift right, filling with zeros (torch's own >> repeats the sign)."""
    return (x >> places) & ((1 << (64 - places)) - 1)
