"""kit/nets/attention.py: where torch's fused attention rests, and that it changes rounding only."""

import pytest
import torch
from test_loop import ToyBatches, make_run, recipe
from timm.layers import Attention
from timm.models.beit import Beit
from torch import nn

from stages.kit.nets.attention import unfused
from stages.kit.train.loop import fit


def test_a_whole_encoder_with_relative_positions_differs_in_rounding_only():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = Beit(**sizes, use_shared_rel_pos_bias=True, num_classes=0)
    nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    images = torch.randn(4, 3, 32, 32)

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model(images).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    fused = gradients()
    assert unfused(model, "meta") is model and torch.equal(gradients(), fused)
    unfused(model, "cpu")
    assert 0 < (gradients() - fused).norm() < 1e-5 * fused.norm()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Attention(6, num_heads=2)

    def forward(self, batch, progress):
        return {"loss": self.layer(batch["view"][None]).square().mean()}


@pytest.mark.parametrize("precision, fused", [("fp32", True), ("bf16", False)])
def test_a_training_multiplies_out_in_bf16_on_a_cpu(precision, fused, tmp_path):
    module = Attending()
    assert module.layer.fused_attn
    fit(module, ToyBatches(), recipe(epochs=1, precision=precision), make_run(tmp_path), seed=5)
    assert module.layer.fused_attn is fused
