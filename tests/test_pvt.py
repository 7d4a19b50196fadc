"""PVTv2 (arXiv 2106.13797): it is timm's under other names, and its overlapping patches hide what
they should.
"""

from __future__ import annotations

import pytest
import timm
import torch

from stages.encoders.pvt import Config, checkpoint_filter_fn
from stages.kit.nets import encoders
from stages.kit.train import optim
from tests import tiny

B2 = {"patch_size": 4, "embed_dim": 64, "embed_dims": (64, 128, 320, 512), "depth": (3, 4, 6, 3)}
B2 |= {"num_heads": (1, 2, 5, 8), "mlp_ratios": (8.0, 8.0, 4.0, 4.0)}
B0 = {**B2, "embed_dim": 32, "embed_dims": (32, 64, 160, 256), "depth": (2, 2, 2, 2)}


def images(rows=2, size=64, seed=0):
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_it_is_timms_with_its_weights():
    theirs = timm.create_model("pvt_v2_b0", num_classes=0).eval()
    ours = encoders.create(tiny.spec(64, "pvt", **B0)).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    expected = theirs.forward_features(images())
    found = ours.forward_features(images())
    torch.testing.assert_close(found.permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_published_sizes():
    with torch.device("meta"):
        encoder = encoders.create(tiny.spec(224, "pvt", **B2))
        theirs = timm.create_model("pvt_v2_b2", num_classes=0)
    count = sum(p.numel() for p in encoder.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count / 1e6 == pytest.approx(24.85, abs=0.01)
    assert encoders.depths(encoder) == (3, 4, 6, 3)


@torch.no_grad()
def test_pixels_of_replaced_patches_do_not_reach_their_neighbours():
    """Although a patch's kernel reaches into the next ones."""
    encoder = encoders.create(tiny.spec(32, "pvt")).eval()
    mask = torch.zeros(1, 256, dtype=torch.bool)
    mask[0, 100] = True
    given, token = images(1, 32), torch.randn(1, 1, 32)
    other = given.clone()
    row, column = divmod(100, 16)
    other[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 5
    assert not torch.equal(encoder.patch_embed(given), encoder.patch_embed(other))
    one, two = (encoders.masked(encoder, x, mask, token)["tokens"] for x in (given, other))
    assert torch.equal(one, two)


def test_layers_of_fine_tuning():
    """Embedding 0, block i + 1, what lies between two stages with the last block before."""
    names = {
        "patch_embed.proj.weight": 0,
        "layers.0.blocks.1.attn.q.weight": 2,
        "layers.0.norm.weight": 2,
        "layers.1.downsample.proj.weight": 2,
        "layers.1.blocks.0.mlp.fc1.weight": 3,
        "layers.1.norm.weight": 5,
        "norm.weight": 6,
        "head.weight": 6,
    }
    for name, layer in names.items():
        assert optim.layer_id(name, (2, 3)) == layer, name
    encoder = encoders.create(tiny.spec(32, "pvt"))
    known = {name for name, _ in encoder.named_parameters()}
    assert {"layers.0.norm.weight", "layers.1.downsample.proj.weight", "norm.weight"} <= known


@pytest.mark.parametrize("size", [16, 24, 48])
def test_any_size_will_do(size):
    encoder = encoders.create(tiny.spec(32, "pvt"), dynamic_img_size=True)
    patch = encoders.features(encoder, images(2, size))["patch"]
    assert patch.shape == (2, (size // 4) ** 2, 64)


@pytest.mark.parametrize("discard", [0, 1, 2])
@pytest.mark.parametrize("kind", ["vit", "swin", "pvt"])
@torch.no_grad()
def test_a_shallow_encoder_ends_after_an_inner_block(kind, discard):
    spec = tiny.spec(32, kind, depth=3 if kind == "vit" else (1, 3))
    encoder = encoders.create(spec).eval()
    shallow = encoders.shallow(encoder, discard)
    count = sum(encoders.depths(encoder))
    number = count - discard
    inner = encoders.masked(encoder, images(2, 32), None, None, taps=(number,))["taps"][number]
    found = shallow.forward_features(images(2, 32))
    found = found.flatten(1, 2) if found.ndim == 4 else found
    torch.testing.assert_close(found, encoder.norm(inner), rtol=1e-4, atol=1e-5)
    assert sum(encoders.depths(encoder)) == count, "the encoder itself stays"
    ours = {id(p) for p in encoder.parameters()}
    assert {id(p) for p in shallow.parameters()} <= ours
    with pytest.raises(ValueError, match="discard: found 3, expected 0 to 2 blocks"):
        encoders.shallow(encoder, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": (1,)}, "^num_heads: found 1 stages, expected 4 as in depth"),
        ({"embed_dims": (64, 128)}, "^embed_dims: found 2 stages, expected 4"),
        ({"embed_dims": (32, 64, 160, 256)}, "^embed_dims: found 32 first, expected embed_dim 64"),
        ({"num_heads": (1, 3, 4, 8)}, "^embed_dims: found 128, expected a multiple of its 3 heads"),
        ({"patch_size": 1}, "^patch_size: found 1, expected 2 or more"),
        ({"mlp_ratios": (0.0, 1.0, 1.0, 1.0)}, "^mlp_ratios: found"),
        ({"depth": ()}, "^depth: found no stages"),
    ],
)
def test_bad_sizes(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)
