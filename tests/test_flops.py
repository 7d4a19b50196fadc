"""kit/train/flops.py: what is counted in a step, against formulas of transformers.

Backward costs two products for each of the forward pass, but for the first layer, whose input needs
no gradient.
"""

import pytest
import torch
from timm.models.vision_transformer import Block

from stages.kit.nets import encoders
from stages.kit.nets.target import Frozen
from stages.kit.train import flops
from tests import tiny

SPEC = tiny.spec(32, patch_size=8, depth=3, mlp_ratio=4.0)


def block(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """Forward of one block on one sequence: qkv and projection, the two products of attention, the
    MLP.
    """
    linear = 2 * tokens * width * width * (4 + 2 * mlp_ratio)
    attention = 4 * tokens * tokens * width
    return linear + attention


def embedding(patches: int, patch: int, width: int, channels: int = 3) -> float:
    """Forward of the patch embedding of `patches` patches of patch x patch pixels."""
    return 2 * patches * patch * patch * channels * width


def linear(tokens: int, width: int, out: int) -> float:
    """Forward of a linear layer."""
    return 2 * tokens * width * out


def vit(
    image: int, patch: int, width: int, depth: int, mlp_ratio: float = 4.0, prefix: int = 1
) -> float:
    """Forward of a ViT without head on one image."""
    patches = (image // patch) ** 2
    return embedding(patches, patch, width) + depth * block(patches + prefix, width, mlp_ratio)


def trained(forward: float, first: float = 0.0) -> float:
    """Forward and backward of what takes `forward` FLOPs, of which `first` go into layers on the
    input itself.
    """
    return 3 * forward - first


def mae(
    image: int,
    patch: int,
    width: int,
    depth: int,
    keep: int,
    dim: int,
    layers: int,
    prefix: int = 1,
) -> float:
    """A training step of MAE on one image: `keep` visible patches, a decoder of `layers` blocks of
    width `dim`.
    """
    patches = (image // patch) ** 2
    first = embedding(keep, patch, width)
    encoder = first + depth * block(keep + prefix, width)
    decoder = linear(keep + prefix, width, dim) + layers * block(patches + prefix, dim)
    return trained(encoder + decoder + linear(patches, dim, 3 * patch * patch), first)


def beitv2(
    image: int,
    patch: int,
    width: int,
    depth: int,
    hidden: int,
    codes: int,
    heads: int,
    tokenizer: float,
) -> float:
    """A training step of BEiT v2 on one image: `heads` aggregation blocks (0: none), `tokenizer`
    FLOPs of its target.
    """
    patches = (image // patch) ** 2
    outputs = (2 if heads else 1) * linear(hidden, width, codes)
    forward = vit(image, patch, width, depth) + heads * block(patches + 1, width) + outputs
    return trained(forward, embedding(patches, patch, width)) + tokenizer


def counted(run) -> int:
    with flops.counting() as counter:
        run()
    return counter.get_total_flops()


def step(method, batch: int) -> int:
    """FLOPs per image of a training step, counted."""
    rows = torch.arange(batch)
    given = {"view": torch.rand(batch, 3, 32, 32), "row": rows, "index": rows}
    return counted(lambda: method(given, tiny.progress(batch))["loss"].backward()) / batch


@pytest.mark.parametrize("tokens, width, ratio", [(17, 32, 4.0), (5, 48, 2.0)])
def test_block(tokens, width, ratio):
    layer, x = Block(width, 2, mlp_ratio=ratio), torch.rand(1, tokens, width, requires_grad=True)
    assert counted(lambda: layer(x)) == block(tokens, width, ratio)
    assert counted(lambda: layer(x).sum().backward()) == trained(block(tokens, width, ratio))


def test_vit_forward_and_training():
    model, images = encoders.create(SPEC).train(), torch.rand(2, 3, 32, 32)
    forward = vit(32, 8, 32, 3)
    assert counted(lambda: model.forward_features(images)) == 2 * forward
    total = counted(lambda: model.forward_features(images).sum().backward())
    assert total == 2 * trained(forward, embedding(16, 8, 32))


def test_mae():
    method = tiny.method("mae", SPEC, decoder_dim=24, decoder_depth=2, decoder_heads=2)
    assert step(method, 3) == mae(32, 8, 32, 3, keep=4, dim=24, layers=2)


@pytest.mark.parametrize("heads", [0, 1])
def test_beitv2_with_its_tokenizer(heads):
    kind = tiny.module("vqkd", "target")
    tokenizer = Frozen(kind.Target(kind.Config(codes=16, code_dim=8), SPEC))
    target = counted(lambda: tokenizer(torch.rand(1, 3, 32, 32), "ids"))
    assert target > vit(32, 8, 32, 3)  # and its head and look-up
    method = tiny.method("beitv2", SPEC, tokenizer, head_depth=heads)
    expected = beitv2(32, 8, 32, 3, hidden=6, codes=16, heads=heads, tokenizer=target)
    assert step(method, 3) == pytest.approx(expected, rel=1e-9)


def test_matrix_rate_is_the_machines():
    rate = flops.matrix_rate("cpu", "fp32", seconds=0.0)
    assert 1e8 < rate < 1e15
    assert flops.matrix_rate("cpu", "fp32", seconds=0.0) == rate  # measured once
