"""EVA: the facts of the paper (arXiv 2211.07636) and its official code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.kit.parts.beit import hidden, shown
from stages.methods.eva import PUBLISHED, Config, Method
from tests import tiny

SPEC = tiny.spec(embed_dim=16, depth=3, mlp_ratio=4.0)


def build(spec=SPEC, target=None, **settings) -> Method:
    return tiny.method("eva", spec, target, **settings)


def batch(rows: int = 6, seed: int = 1) -> dict:
    return {"view": tiny.images(rows, seed=seed)}


def test_masks_hide_at_most_the_budget_in_blocks():
    """16x16 patches, 105 hidden at most, blocks of 16: as counted with the official generator."""
    spec = tiny.spec(64, patch_size=4, embed_dim=16, depth=1)
    method = build(spec, mask_ratio=PUBLISHED["mask_ratio"], min_block=PUBLISHED["min_block"])
    assert method.count == 105
    mask = method.masks(shown(4000))
    counts = mask.sum(1).float()
    assert counts.max() == 105 and counts.min() > 80 and 104.2 < counts.mean() < 104.7
    assert 0.6 < (counts == 105).float().mean() < 0.72
    assert torch.equal(mask, method.masks(shown(4000)))


@pytest.mark.parametrize("student", ["beit", "mae"])
def test_the_loss_is_the_cosine_of_hidden_patches(student):
    """Summed over a batch by hand in float64; `cosine` is the published mean."""
    method, images, now = build(student=student), batch()["view"], tiny.progress(6)
    found = method({"view": images}, now)
    mask = method.masks(now.uniform)
    everywhere = torch.arange(16).expand(6, -1)
    predicted = method.predict(images, mask, everywhere).double()
    wanted = method.teacher(images, "patch")["patch"].double()
    cosine = (predicted * wanted).sum(-1) / (predicted.norm(dim=-1) * wanted.norm(dim=-1))
    torch.testing.assert_close(found["cosine"].double(), cosine[mask].mean(), rtol=1e-5, atol=1e-6)
    share = mask.sum() / (6 * method.count)
    torch.testing.assert_close(found["loss"].double(), -cosine[mask].mean() * share)
    assert -1 <= found["loss"] <= 1


def test_images_weigh_as_many_hidden_patches_as_they_have():
    """Two images with 90 and 105 hidden ones: 90 to 105."""
    mask = torch.zeros(2, 256, dtype=torch.bool)
    mask[0, :90] = mask[1, 100:205] = True
    ids, weight = hidden(mask, 105)
    assert weight.sum(1).tolist() == [90, 105] and mask.gather(1, ids)[1].all()


def test_the_loss_is_minus_one_at_the_target_and_knows_no_length(monkeypatch):
    method, images, now = build(student="mae", mask_ratio=0.75), batch()["view"], tiny.progress(6)
    wanted = method.teacher(images, "patch")["patch"]

    def predict(factor):
        return lambda images, mask, ids: factor * wanted.gather(1, ids[..., None].expand(-1, -1, 6))

    losses = []
    for factor in (1.0, 7.0, -1.0):
        monkeypatch.setattr(method, "predict", predict(factor))
        losses.append(method({"view": images}, now)["loss"].item())
    assert losses == pytest.approx([-1, -1, 1], abs=1e-6)


@pytest.mark.parametrize("student", ["beit", "mae"])
def test_the_student_does_not_see_what_is_hidden(student):
    """Pixels of hidden patches change the targets and not the predictions; those of visible ones
    do change them.
    """
    method, images, now = build(student=student).eval(), batch()["view"], tiny.progress(6)
    mask = method.masks(now.uniform)
    ids, _ = hidden(mask, method.count)
    area = F.interpolate(mask.view(6, 1, 4, 4).float(), scale_factor=4)
    other = images * (1 - area) + (1 - images) * area
    before, after = (method.predict(x, mask, ids) for x in (images, other))
    assert torch.equal(before, after)
    labels = [method.teacher(x, "patch")["patch"] for x in (images, other)]
    assert (labels[0] - labels[1])[mask].abs().max() > 0.1
    assert not torch.equal(before, method.predict(1 - images, mask, ids))


def test_predictions_at_visible_patches_do_not_count(monkeypatch):
    method, images, now = build(), batch()["view"], tiny.progress(6)
    mask = method.masks(now.uniform)
    loss, predict = method({"view": images}, now)["loss"].item(), method.predict

    def spoilt(images, mask, ids):
        found = predict(images, mask, ids)
        return torch.where(mask.gather(1, ids)[..., None], found, torch.randn_like(found))

    monkeypatch.setattr(method, "predict", spoilt)
    assert method({"view": images}, now)["loss"].item() == loss and not mask.all()


def test_without_hidden_patches_the_loss_is_nought(monkeypatch):
    method = build()
    monkeypatch.setattr(method, "masks", lambda uniform: torch.zeros(6, 16, dtype=torch.bool))
    found = method(batch(), tiny.progress(6))
    found["loss"].backward()
    assert found["loss"].item() == found["cosine"].item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_what_learns_and_what_does_not():
    target = tiny.target(SPEC, "patch")
    method = build(target=target)
    method(batch(), tiny.progress(6))["loss"].backward()
    assert method.mask_token.grad.abs().max() > 0
    assert not any("teacher" in name for name, _ in method.named_parameters())
    assert target.open.weight.grad is None


def test_blocks_have_no_bias_of_keys_no_relative_positions_and_no_layer_scale():
    spec = tiny.spec(embed_dim=32, depth=2, num_heads=2)
    method = build(spec, init="published")
    names = dict(method.encoder.named_parameters())
    attention = {n: p for n, p in names.items() if n.startswith("blocks.0.attn")}
    assert sum(p.numel() for p in attention.values()) == 4 * 32**2 + 3 * 32
    assert not any("relative" in n or "gamma" in n for n in names)
    assert method.encoder.pos_embed.shape == (1, 17, 32) and names["pos_embed"].requires_grad
    assert method.no_weight_decay() == {"encoder.cls_token", "encoder.pos_embed"}
    with_scale = build(spec, layer_scale=0.1)
    assert any("gamma" in n for n, _ in with_scale.encoder.named_parameters())


def test_output_projections_start_smaller_in_later_blocks():
    """Deviation 0.02 cut there is 0.54 of it; block n's is divided by sqrt(2 n)."""
    method = build(tiny.spec(embed_dim=192, depth=4, num_heads=3), init="published")
    for number, block in enumerate(method.encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert float(weight.detach().std()) == pytest.approx(
                0.54 * 0.02 / (2 * number) ** 0.5, rel=0.03
            )
        assert float(block.attn.qkv.weight.detach().std()) == pytest.approx(0.54 * 0.02, rel=0.03)


def test_the_variant_of_eva_l_is_maes():
    method = build(student="mae", mask_ratio=0.75, decoder_depth=1)
    assert not hasattr(method, "mask_token") and not method.encoder.pos_embed.requires_grad
    now = tiny.progress(6)
    assert method.masks(now.uniform).sum(1).tolist() == [12] * 6
    assert method.decoder.pred.out_features == method.teacher.sizes["patch"]


def test_bad_settings_are_named():
    for bad, key in (({"mask_ratio": 1.0}, "mask_ratio"), ({"drop_path": 1.0}, "drop_path")):
        with pytest.raises(ValueError, match=f"{key}: found"):
            Config(**bad)
    with pytest.raises(ValueError, match="min_block: found 9, expected at most the 7 hidden"):
        Config(min_block=9).check(16, SPEC.model)
