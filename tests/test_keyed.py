"""Stateless randomness: exactness, independence from the batch, and plain statistics."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from stages.kit import keyed

ROWS = torch.arange(64)
GOLDEN_KEY = 5830642410678421468
GOLDEN_UNIFORM = [[7438354, 13293257, 14663396], [821586, 8694265, 3527383]]
GOLDEN_ORDER = [0, 1, 4, 7, 8, 2, 5, 6, 9, 3]
GOLDEN_NORMAL = [-1.5450267791748047, -0.36367738246917725, 1.2458895444869995]


def reference_mix(x: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_bits_are_splitmix_in_exact_integer_arithmetic():
    base, golden, mask = keyed.key("check"), 0x9E3779B97F4A7C15, (1 << 64) - 1
    rows = torch.tensor([0, 1, 7, 2**40, -3])
    found = keyed.bits(base, rows, 5)
    for b, row in enumerate(rows.tolist()):
        stream = reference_mix((row * golden + base) & mask)
        for column in range(5):
            expected = reference_mix((stream + (column + 1) * golden) & mask)
            assert int(found[b, column]) & mask == expected


def test_known_answer_of_splitmix64():
    # the first outputs of the reference implementation seeded with 1234567 (Vigna, splitmix64.c)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    assert [reference_mix((1234567 + (i + 1) * golden) & mask) for i in range(3)] == expected
    found = keyed._mix(torch.arange(1, 4) * keyed.GOLDEN + 1234567)
    assert [int(x) & mask for x in found] == expected


def test_golden_values():
    """Guards against a change by accident: checkpoints and caches of users depend on these."""
    assert keyed.key(0, 3, "view") == GOLDEN_KEY
    u = keyed.uniform(keyed.key(0, 3, "view"), torch.tensor([0, 5]), 3)
    assert (u * 2**24).long().tolist() == GOLDEN_UNIFORM
    assert keyed.permutation(10, 0, "order", 1).tolist() == GOLDEN_ORDER
    n = keyed.normal(keyed.key("n"), torch.tensor([2]), 3)
    torch.testing.assert_close(n, torch.tensor([GOLDEN_NORMAL]), rtol=0, atol=1e-6)


def test_key_separates_types_borders_and_order():
    parts = [
        (),
        ("",),
        ("", ""),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1,),
        ("1",),
        (1, 2),
        (2, 1),
        (12,),
        (-1,),
    ]
    values = [keyed.key(*p) for p in parts]
    assert len(set(values)) == len(values)
    assert all(0 <= v < 2**63 for v in values)


def test_key_accepts_tensor_and_numpy_integers_and_refuses_others():
    np = pytest.importorskip("numpy")
    assert keyed.key(np.int64(5)) == keyed.key(5) == keyed.key(torch.tensor(5))
    for bad in (1.0, None, True, b"x"):
        with pytest.raises(TypeError, match="integers or strings"):
            keyed.key(bad)


def test_key_is_the_same_in_another_process():
    code = "from stages.kit import keyed; print(keyed.key(7, 'mask', 2))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()
    )
    assert int(out.stdout) == keyed.key(7, "mask", 2)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("draw", [keyed.uniform, keyed.normal])
def test_a_row_does_not_depend_on_the_batch(draw):
    whole = draw(11, ROWS, 3, 7)
    for size in (1, 2, 5, 33):
        parts = torch.cat([draw(11, part, 3, 7) for part in ROWS.split(size)])
        assert torch.equal(whole, parts)
    order = keyed.permutation(64, "shuffle")
    assert torch.equal(draw(11, ROWS[order], 3, 7), whole[order])


def test_shapes_and_types():
    assert keyed.uniform(1, ROWS).shape == (64,)
    assert keyed.normal(1, ROWS).shape == (64,)
    assert keyed.uniform(1, ROWS, 0).shape == (64, 0)
    assert keyed.uniform(1, ROWS[:0], 4).shape == (0, 4)
    assert keyed.uniform(1, ROWS.int(), 2).dtype == torch.float32
    assert torch.equal(keyed.uniform(1, ROWS.int(), 2), keyed.uniform(1, ROWS, 2))
    assert torch.equal(keyed.uniform(2**64 + 5, ROWS, 2), keyed.uniform(5, ROWS, 2))  # bases wrap
    with pytest.raises(ValueError, match="vector of integers"):
        keyed.uniform(1, torch.rand(3), 2)


def test_uniform_statistics():
    u = keyed.uniform(keyed.key("statistics"), torch.arange(500), 400)
    n = u.numel()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(u, 256, 0, 1)
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)
    low = (
        (keyed.bits(keyed.key("statistics"), torch.arange(500), 400) & 255)
        .flatten()
        .bincount(minlength=256)
    )
    assert abs(((low - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * math.sqrt(2 * 255)


def test_no_correlation_between_neighbours():
    u = keyed.uniform(100, torch.arange(400), 400) - 0.5
    limit = 5 / math.sqrt(400 * 400) / 12
    for other in (
        u.roll(1, 0),
        u.roll(1, 1),
        u.roll((1, 1), (0, 1)),
        u.t(),
        u.roll((1, -1), (0, 1)),
    ):
        assert abs((u * other).mean()) < limit
    for base in (101, 99, 100 + 2**32, -100):
        assert abs((u * (keyed.uniform(base, torch.arange(400), 400) - 0.5)).mean()) < limit


def test_rows_share_no_numbers():
    values = keyed.bits(3, torch.arange(300), 300).flatten()
    assert len(values.unique()) == len(values)


def test_normal_statistics():
    z = keyed.normal(keyed.key("normal"), torch.arange(400), 400).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    edges = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    for edge in edges:
        p = 0.5 * (1 + math.erf(edge / math.sqrt(2)))
        assert abs((z < edge).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_permutation():
    for n in (0, 1, 2, 1000):
        assert torch.equal(keyed.permutation(n, 1, "order").sort().values, torch.arange(n))
    orders = {
        tuple(keyed.permutation(20, seed, "order", epoch).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    first = torch.stack([keyed.permutation(4, i) for i in range(2000)])[:, 0].bincount(minlength=4)
    assert ((first - 500) ** 2 / 500).sum() < 30  # chi-square with 3 degrees of freedom


def test_generator():
    a, b, c = (torch.rand(5, generator=keyed.generator(*p)) for p in [(1, "x"), (1, "x"), (2, "x")])
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_on_the_gpu():
    assert torch.equal(
        keyed.uniform(9, ROWS, 1000), keyed.uniform(9, ROWS, 1000, device="cuda").cpu()
    )
    assert torch.equal(keyed.uniform(9, ROWS, 1000), keyed.uniform(9, ROWS.cuda(), 1000).cpu())
    a, b = keyed.normal(9, ROWS, 1000), keyed.normal(9, ROWS, 1000, device="cuda").cpu()
    assert (a != b).float().mean() < 1e-4
