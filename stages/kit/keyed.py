"""Randomness without state: every random number is a pure function of a key and a place.

A generator that is advanced by use makes a batch depend on all that was drawn before it, on the
number of workers, and on who sits beside a sample in the batch. Here a number is the hash of (base,
row, column) instead: `base` says what is drawn (seed, epoch or step, name), `row` for whom (a
sample's index), the column is the place in that sample's own numbers. The hash is the finaliser of
SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators") in
wrap-around int64 arithmetic, which is exact and hence the same on a CPU and a GPU, for any
composition of the batch.
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
    """Hashes the parts into an integer in [0, 2^63): the same in every process and machine.

    The parts' types, order and borders count: key("ab", "c"), key("a", "bc"), key(1) and key("1")
    all differ.
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

    Element (b, ...) depends on `base`, rows[b] and its place alone. `base` is an integer (see
    `key`), `rows` (B,) are integers. The result lies on `device`, by default where `rows` does.
    """
    if rows.ndim != 1 or rows.is_floating_point():
        raise ValueError(
            f"keyed: rows must be a vector of integers, found {tuple(rows.shape)} of {rows.dtype}"
        )
    rows = rows.to(device=device if device is not None else rows.device, dtype=torch.int64)
    base = (int(base) + (1 << 63)) % (1 << 64) - (1 << 63)
    # hashed twice, so that neighbouring rows are not shifted copies
    stream = _mix(rows * GOLDEN + base)[:, None]
    column = torch.arange(1, math.prod(shape) + 1, device=rows.device) * GOLDEN
    return _mix(stream + column).reshape(len(rows), *shape)


def uniform(
    base: int, rows: torch.Tensor, *shape: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """float32 (B, *shape), uniform in [0, 1): multiples of 2^-24, so that 1.0 never comes;
    arguments as for `bits`.
    """
    return _shift(bits(base, rows, *shape, device=device), 40).float() * 2.0**-24


def normal(
    base: int, rows: torch.Tensor, *shape: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """float32 (B, *shape), standard normal (Box-Muller on two uniforms per number); arguments as
    for `bits`.

    Computed in float64 and then rounded, because logarithm and cosine differ between devices in
    their last bit. About one number in 10^8 still differs between a CPU and a GPU. On one device
    it is exact.
    """
    pair = _shift(bits(base, rows, 2, math.prod(shape), device=device), 11).double() + 0.5
    first, second = (pair * 2.0**-53).unbind(1)
    found = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
    return found.float().reshape(len(rows), *shape)


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts, for library code that wants one."""
    return torch.Generator().manual_seed(key(*parts))


def permutation(n: int, *parts: int | str) -> torch.Tensor:
    """A random order of 0..n-1, int64 (n,); torch.randperm's could change with torch's version."""
    return bits(key(*parts), torch.zeros(1, dtype=torch.int64), n)[0].argsort(stable=True)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, places: int) -> torch.Tensor:
    """Shift right, filling with zeros (torch's own >> repeats the sign)."""
    return (x >> places) & ((1 << (64 - places)) - 1)
