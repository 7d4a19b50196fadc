"""MILAN: the facts of the paper (arXiv 2208.06049) and its official code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from stages.kit.nets.prompting import PromptingDecoder
from stages.methods.milan import PUBLISHED, Config, Method
from tests import tiny
from workflow.params import ParamsError

SPEC = tiny.spec(embed_dim=32, depth=2, num_heads=2)
GIVES = ("patch", "cls", "attention")


def build(spec=SPEC, gives=GIVES, **settings) -> Method:
    return tiny.method("milan", spec, tiny.target(spec, *gives), **settings)


def images(rows: int = 6) -> torch.Tensor:
    return tiny.images(rows, seed=1)


def noise(rows: int, patches: int) -> torch.Tensor:
    return torch.rand(rows, patches, generator=torch.Generator().manual_seed(2))


def test_what_the_teacher_looks_at_stays_visible_more_often():
    spec = tiny.spec(56, patch_size=4, embed_dim=16, depth=1)
    method = build(spec)
    weights = torch.linspace(1, 5, 196).expand(3000, -1)
    ids, _, mask = method.sample(noise(3000, 196), weights)
    assert ids.shape == (3000, 49) and mask.sum(1).eq(147).all()
    assert weights[mask == 0].mean() > weights[mask == 1].mean() + 0.3
    assert mask[:, -1].float().mean() > 0.2, "likely, and never certain"

    counts = (1 - method.sample(noise(3000, 196), torch.ones(3000, 196))[2]).sum(0)
    deviation = (3000 * 0.25 * 0.75) ** 0.5
    assert (counts - 750).abs().max() < 4.5 * deviation, "equal weights: uniform"


def test_the_first_patch_is_drawn_in_proportion_to_its_weight():
    """Chi-square of 20,000 draws, 7 degrees of freedom; so is torch's multinomial."""
    spec = tiny.spec(8, patch_size=2, embed_dim=16, depth=1)
    method = build(spec, mask_ratio=0.9)
    weights = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.3, 2.1] * 2)
    first = method.sample(noise(20000, 16), weights.expand(20000, -1))[0][:, 0]
    counts = torch.bincount(first, minlength=16).double()
    expected = 20000 * weights.double() / weights.double().sum()
    assert counts[0] == counts[8] == 0, "zero weights are last"
    used = expected > 0
    assert ((counts - expected)[used].square() / expected[used]).sum() < 36.1  # p = 0.001


def test_the_loss_is_two_minus_two_cosines_of_every_token():
    method, now = build(), tiny.progress(6)
    found = method({"view": images()}, now)
    target, weights = method.look(images())
    ids, restore, mask = method.sample(now.uniform("mask", 16), weights)
    p = F.normalize(method.predict(images(), ids, restore).double(), dim=-1)
    t = F.normalize(target.double(), dim=-1)
    assert p.shape == (6, 17, 6)
    wanted = (p - t).square().sum(-1).mean()  # the squared distance of unit vectors
    torch.testing.assert_close(found["loss"].double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["cls"].double(), (p * t).sum(-1)[:, 0].mean())
    torch.testing.assert_close(found["hidden"].double(), (p * t).sum(-1)[:, 1:][mask == 1].mean())
    assert 0 <= found["loss"] <= 4


def test_the_loss_is_nought_at_any_multiple_of_the_target(monkeypatch):
    method, now = build(), tiny.progress(6)
    target, _ = method.look(images())
    for factor in (1.0, 9.0):
        monkeypatch.setattr(method, "predict", lambda *_, f=factor: f * target)
        assert method({"view": images()}, now)["loss"].item() == pytest.approx(0, abs=1e-6)
    target.zero_()
    assert method({"view": images()}, now)["loss"].isfinite(), "vectors of length zero"


def test_every_token_teaches_the_encoder():
    """The gradient at a visible token is not zero and reaches the encoder; the teacher has none."""
    method, now = build(), tiny.progress(6)
    target, weights = method.look(images())
    ids, restore, mask = method.sample(now.uniform("mask", 16), weights)
    predicted = method.predict(images(), ids, restore)
    predicted.retain_grad()
    F.cosine_similarity(predicted, target, dim=-1).sum().backward()
    assert (predicted.grad.norm(dim=-1) > 0).all()
    assert method.encoder.patch_embed.proj.weight.grad.abs().max() > 0
    assert method.teacher.open.weight.grad is None
    assert not any("teacher" in name for name, _ in method.named_parameters())


def test_blocks_of_the_decoder_change_hidden_patches_alone():
    method = build().eval()
    target, weights = method.look(images())
    ids, restore, mask = method.sample(noise(6, 16), weights)
    before = method.predict(images(), ids, restore)
    with torch.no_grad():
        for p in method.decoder.blocks.parameters():
            p.add_(0.1 * torch.randn_like(p))
    after = method.predict(images(), ids, restore)
    seen = F.pad(mask, (1, 0)) == 0
    torch.testing.assert_close(before[seen], after[seen], rtol=0, atol=1e-6)
    assert ((before - after)[~seen].abs().amax(-1) > 1e-4).all()


def official(decoder: PromptingDecoder, tokens, ids, restore):
    """The official order of things: one sequence in image order, merged anew in each block."""
    x = decoder.embed(tokens)
    batch, patches = restore.shape
    filled = torch.cat(
        [x[:, 1:], decoder.mask_token.expand(batch, patches - x.shape[1] + 1, -1)], 1
    )
    filled = filled.gather(1, restore[..., None].expand(-1, -1, filled.shape[-1])) + decoder.pos
    whole = torch.cat([x[:, :1], filled], dim=1)
    mask = torch.ones(batch, patches + 1, dtype=torch.bool)
    mask[:, 0] = False
    mask.scatter_(1, ids + 1, False)
    hidden = whole[mask].view(batch, -1, whole.shape[-1])
    shapes = []
    for block in decoder.blocks:
        seen = block.norm1(hidden)
        merged = whole.clone()
        merged[mask] = seen.flatten(0, 1)
        q, (k, v) = block.q(seen), block.kv(merged).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        shapes.append(tuple(weights.shape[-2:]))
        hidden = hidden + block.proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged = whole.clone()
    merged[mask] = hidden.flatten(0, 1)
    return decoder.pred(decoder.norm(merged)), shapes


def test_the_decoder_against_the_official_order_of_things():
    torch.manual_seed(0)
    decoder = PromptingDecoder(32, 6, 14, 32, 2, 4).double()
    tokens = torch.randn(2, 50, 32, dtype=torch.float64)
    order = noise(2, 196).argsort(1)
    ids, restore = order[:, :49], order.argsort(1)
    wanted, shapes = official(decoder, tokens, ids, restore)
    torch.testing.assert_close(decoder(tokens, restore), wanted)
    assert shapes == [(147, 197)] * 2, "queries and keys"


def test_size_at_vit_base():
    """Trainable weights and fixed tables of positions, with CLIP's 512 channels."""
    spec = tiny.spec(224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)
    sizes = {k: v for k, v in PUBLISHED.items() if k.startswith("decoder_")}
    target = tiny.target(spec, *GIVES)
    target.sizes = {"patch": 512, "cls": 512, "attention": 12}
    with torch.device("meta"):
        method = Method(Config(**sizes), spec, target)
    table = 197 * 512  # ours leaves out the class token's, which is zero
    assert sum(p.numel() for p in method.parameters()) + table == 111_776_512


def test_variants():
    """MAE's decoder, random masks, hidden patches alone: reachable, and without attention."""
    flags = {"decoder": "mae", "sampling": "random", "predict": "hidden"}
    method, now = build(gives=("patch", "cls"), **flags), tiny.progress(6)
    found = method({"view": images()}, now)
    assert "importance" not in found
    target, weights = method.look(images())
    ids, restore, mask = method.sample(now.uniform("mask", 16), weights)
    p = method.predict(images(), ids, restore)
    cosine = F.cosine_similarity(p, target, dim=-1)[:, 1:]
    torch.testing.assert_close(found["loss"], (2 - 2 * cosine)[mask == 1].mean())
    without = build(gives=("patch",), **flags)
    assert "cls" not in without({"view": images()}, now) and not without.with_cls
    assert without.predict(images(), ids, restore).shape == (6, 16, 6)


def test_attention_is_asked_of_the_target_only_where_it_is_used():
    assert Config().also_needs == {"attention"} and Config(sampling="random").also_needs == set()


@pytest.mark.parametrize("sampling, good", [("attention", False), ("random", True)])
def test_the_plan_knows_it(tmp_path, sampling, good):
    from tests.plans import plan_of

    changes = {
        "targets": {"pixels": {}},
        "methods": {"milan": {"sampling": sampling}},
        "grid": {"runs": {"milan": {"method": "milan", "target": "pixels"}}},
    }
    if good:
        assert "pretrain/milan-s0" in plan_of(tmp_path, **changes).jobs
    else:
        with pytest.raises(ParamsError, match="'pixels' produces patch, method milan needs atten"):
            plan_of(tmp_path, **changes)


def test_the_target_is_the_same_twice_and_its_length_does_not_matter():
    method, now = build(), tiny.progress(6)
    first, again = (method({"view": images()}, now)["loss"] for _ in range(2))
    assert torch.equal(first, again)
    with torch.no_grad():
        method.teacher.open.weight.mul_(5)
    torch.testing.assert_close(method({"view": images()}, now)["loss"], first)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="mask_ratio: found 0"):
        Config(mask_ratio=0.0)
    assert dataclasses.replace(Config(), sampling="random").sampling == "random"
