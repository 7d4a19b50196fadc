"""kit/flops.py: every formula against torch.utils.flop_counter on the model that it speaks of."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.utils.flop_counter import FlopCounterMode

from stages import methods, targets
from stages.kit import encoder, flops
from stages.kit.recipe import Progress
from stages.kit.spec import Spec

MODEL = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0,
         "args": {}}  # fmt: skip
SPEC = Spec(32, MODEL, (0.5,) * 3, (0.25,) * 3, 10, 64)


def unfused(module):
    """Fused attention computes its scores again in the backward pass, which the counter counts and MFU does not."""
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False
    return module


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step(method, batch: int) -> int:
    """FLOPs per image of a training step, counted."""
    rows = torch.arange(batch)
    progress = Progress(0, 10, 0.0, 0, rows, torch.device("cpu"))
    view = torch.rand(batch, 3, 32, 32)
    return counted(lambda: method({"view": view, "row": rows, "index": rows}, progress)["loss"].backward()) / batch


@pytest.mark.parametrize("tokens, width, ratio", [(17, 32, 4.0), (5, 48, 2.0)])
def test_block(tokens, width, ratio):
    layer, x = unfused(Block(width, 2, mlp_ratio=ratio)), torch.rand(1, tokens, width, requires_grad=True)
    assert counted(lambda: layer(x)) == flops.block(tokens, width, ratio)
    assert counted(lambda: layer(x).sum().backward()) == flops.trained(flops.block(tokens, width, ratio))


def test_vit_forward_and_training():
    vit, images = unfused(encoder.create(SPEC).train()), torch.rand(2, 3, 32, 32)
    forward = flops.vit(32, 8, 32, 3)
    assert counted(lambda: vit.forward_features(images)) == 2 * forward
    total = counted(lambda: vit.forward_features(images).sum().backward())
    assert total == 2 * flops.trained(forward, flops.embedding(16, 8, 32))


def test_mae():
    module = methods.find("mae")
    config = module.Config(decoder_dim=24, decoder_depth=2, decoder_heads=2)
    method = unfused(module.Method(config, SPEC).train())
    assert step(method, 3) == flops.mae(32, 8, 32, 3, keep=4, dim=24, layers=2)


@pytest.mark.parametrize("heads", [0, 1])
def test_beitv2_with_its_tokenizer(heads):
    kind, module = targets.find("vqkd"), methods.find("beitv2")
    tokenizer = unfused(targets.pin(kind.Target(kind.Config(codes=16, code_dim=8), SPEC)))
    target = counted(lambda: tokenizer(torch.rand(1, 3, 32, 32)))
    assert target > flops.vit(32, 8, 32, 3)  # and its head and look-up
    config = module.Config(head_depth=heads)
    method = unfused(module.Method(config, SPEC, tokenizer).train())
    expected = flops.beitv2(32, 8, 32, 3, hidden=6, codes=16, heads=heads, tokenizer=target)
    assert step(method, 3) == pytest.approx(expected, rel=1e-9)


def test_matrix_rate_is_the_machines():
    rate = flops.matrix_rate("cpu", "fp32", seconds=0.0)
    assert 1e8 < rate < 1e15
    assert flops.matrix_rate("cpu", "fp32", seconds=0.0) == rate  # measured once
