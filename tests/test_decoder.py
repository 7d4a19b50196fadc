"""MAE's decoder, token by token in float64 against a plain loop; with a prefix that is predicted,
in part or not.
"""

from __future__ import annotations

import pytest
import torch

from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import random_masking
from stages.kit.nets.positions import sincos_2d
from workflow import checks


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
    for depth, rates in ((3, [0, 0.15, 0.3]), (1, [0])):
        blocks = Decoder(8, 3, 2, 8, depth, 2, drop_path=0.3).blocks
        assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in blocks] == pytest.approx(rates)


def test_its_sizes_are_those_of_the_config():
    config = checks.Decoder(decoder_dim=24, decoder_depth=3, decoder_heads=2)
    decoder = Decoder.of(config, 12, 5, 3, prefix=2, mlp_ratio=2.0)
    assert (decoder.embed.in_features, decoder.embed.out_features) == (12, 24)
    assert (len(decoder.blocks), decoder.blocks[0].attn.num_heads) == (3, 2)
    assert decoder.blocks[0].mlp.fc1.out_features == 48
    assert decoder.pred.out_features == 5
    assert decoder.pos.shape == (2 + 9, 24)
    assert decoder(torch.randn(2, 2 + 4, 12), torch.arange(9).expand(2, -1)).shape == (2, 9, 5)
