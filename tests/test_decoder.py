"""MAE's decoder, token by token in float64 against a plain loop; with a prefix that is predicted,
in part or not.
"""

from __future__ import annotations

import pytest
import torch

from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import random_masking
from stages.kit.nets.positions import sincos_2d


@pytest.mark.parametrize(
    ("prefix", "cls"), [(0, False), (1, False), (1, True), (3, True), (3, False)]
)
def test_every_token_has_its_place(prefix, cls):
    torch.manual_seed(0)
    decoder = Decoder(
        width=12, out=5, grid=3, dim=8, depth=2, heads=2, prefix=prefix, with_cls=cls
    ).double()
    ids_keep, ids_restore, mask = random_masking(torch.rand(4, 9), 4)
    tokens = torch.randn(4, prefix + 4, 12, dtype=torch.float64)
    found = decoder(tokens, ids_restore)
    for b in range(4):
        row = [decoder.embed(token) for token in tokens[b, :prefix]]
        for patch in range(9):
            at = (ids_keep[b] == patch).nonzero()
            token = (
                decoder.embed(tokens[b, prefix + at.item()])
                if len(at)
                else decoder.mask_token[0, 0]
            )
            assert bool(mask[b, patch]) == (len(at) == 0)
            row.append(token + sincos_2d(8, 3)[patch].double())
        out = decoder.pred(decoder.norm(decoder.blocks(torch.stack(row)[None])))[0]
        expected = torch.cat([out[: int(cls)], out[prefix:]])
        torch.testing.assert_close(found[b], expected, atol=1e-12, rtol=1e-12)


def test_drop_path_rises_to_its_rate():
    blocks = Decoder(8, 3, 2, 8, 3, 2, drop_path=0.3).blocks
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == pytest.approx(
        [0, 0.15, 0.3]
    )
    assert (
        getattr(Decoder(8, 3, 2, 8, 1, 2, drop_path=0.3).blocks[0].drop_path1, "drop_prob", 0.0)
        == 0
    )
