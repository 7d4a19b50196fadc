"""Parts of images as targets: SemMAE's first stage as we read it (arXiv 2206.10207), and heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stages.kit.nets.target import Frozen
from stages.kit.parts import segments
from stages.targets import heads, parts
from tests import tiny

progress = tiny.progress


class Seen(tiny.Colours):
    """A target of colours with an attention of its own for each head."""

    def look(self, images, wanted, norm, layers):
        found = super().look(images, wanted, norm, layers)
        share = torch.stack([found["patch"][..., 0], found["patch"][..., 1]], 1)
        return found | {"attention": share.softmax(-1)}


def upstream() -> Frozen:
    return Frozen(Seen(tiny.spec(), "patch", "cls", "attention"))


def made(seed: int = 0, **settings) -> parts.Training:
    torch.manual_seed(seed)
    return parts.Training(parts.Config(**{"width": 8, **settings}), tiny.spec(), upstream())


def batch(seed: int = 0) -> dict:
    return {"view": tiny.images(8, seed=seed)}


def test_a_patch_belongs_to_the_part_with_the_most_similar_token():
    """(W_k f + b_k) . F / sqrt(D), number by number."""
    target, x = made().target, tiny.images(2)
    seen, found = upstream()(x, "patch", "cls"), target(x, "ids", "logits")
    w = target.queries.weight.view(4, 6, 6)
    b = target.queries.bias.view(4, 6)
    for image in range(2):
        for k in range(4):
            q = w[k] @ seen["cls"][image] + b[k]
            for n in range(16):
                wanted = (q @ seen["patch"][image, n]).item() / math.sqrt(6)
                assert found["logits"][image, n, k].item() == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(found["ids"], found["logits"].argmax(2))


def test_attention_helps_for_a_third_of_the_training():
    training = made(warm=1 / 3)
    assert [training.helped(f) for f in (0, 1 / 6, 1 / 3, 0.9)] == pytest.approx([1, 0.5, 0, 0])
    assert made(warm=0.0).helped(0.0) == 0
    attention = torch.rand(3, 2, 16)
    prior = training.attended(attention)
    for part in range(4):  # more parts than heads: they begin as the same heads again
        torch.testing.assert_close(prior[..., part], attention[:, part % 2].log())


def test_maps_sum_to_one_and_gradients_stop_at_the_network(monkeypatch):
    training, seen = made(), []
    paint = training.painter.forward
    monkeypatch.setattr(
        training.painter, "forward", lambda maps, style: seen.append(maps) or paint(maps, style)
    )
    out = training(batch(), progress())
    out["loss"].backward()
    torch.testing.assert_close(seen[0].sum(1), torch.ones(8, 4, 4))
    for name, parameter in training.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in training.target.upstream.open.parameters())
    names = {name.split(".")[0] for name, _ in training.named_parameters()}
    assert names == {"target", "painter"}


def test_losses_by_hand():
    training, x = made(diversity=0.3, balance=0.7), batch()
    out = training(x, progress())
    seen = training.target.upstream(x["view"], "patch", "cls", "attention")
    tokens = training.target.tokens(seen["cls"])
    scores = training.target.scores(tokens, seen["patch"]) + training.helped(
        0.3
    ) * training.attended(seen["attention"])
    maps = scores.softmax(2)
    cosines = []
    for b in range(8):
        for k in range(4):
            for other in range(4):
                if k != other:
                    cosine = F.cosine_similarity(tokens[b, k], tokens[b, other], dim=0)
                    cosines.append(float(cosine.detach()) ** 2)
    assert float(out["diversity"].detach()) == pytest.approx(sum(cosines) / 96, rel=1e-4)
    share = maps.mean((0, 1)).tolist()
    kl = sum(s * math.log(4 * s) for s in share)
    assert float(out["balance"].detach()) == pytest.approx(kl, rel=1e-3, abs=1e-6)
    small = F.avg_pool2d(training.spec.normalise(x["view"]), 16 // training.painter.side)
    drawn = training.painter(maps.transpose(1, 2).view(8, 4, 4, 4), seen["cls"])
    torch.testing.assert_close(out["picture"], (drawn - small).abs().mean())
    expected = out["picture"] + 0.3 * out["diversity"] + 0.7 * out["balance"]
    torch.testing.assert_close(out["loss"], expected)


def test_part_tokens_at_right_angles_and_alike():
    assert float(parts.apart(torch.eye(4)[None])) == pytest.approx(0, abs=1e-6)
    assert float(parts.apart(torch.ones(2, 4, 6))) == pytest.approx(1)


@pytest.mark.parametrize("grid, most, side", [(8, 64, 64), (8, 32, 32), (4, 16, 16), (14, 64, 56)])
def test_pictures_are_as_large_as_they_may_be(grid, most, side):
    painter = parts.Painter(3, 5, 4, grid, most)
    assert painter(torch.rand(2, 3, grid, grid), torch.rand(2, 5)).shape == (2, 3, side, side)


def test_the_image_is_painted_from_layout_and_style():
    """Both change it."""
    torch.manual_seed(0)
    painter = parts.Painter(3, 5, 8, 4, 16)
    maps, style = torch.rand(1, 3, 4, 4), torch.rand(1, 5)
    plain = painter(maps, style)
    assert not torch.allclose(painter(maps.flip(3), style), plain)
    assert not torch.allclose(painter(maps, -style), plain)


def test_heads_are_where_their_attention_is_largest():
    target = heads.Target(heads.Config(), tiny.spec(), upstream())
    x = tiny.images(3)
    share = upstream()(x, "attention")["attention"]
    assert torch.equal(target(x, "ids")["ids"], share.argmax(1))
    torch.testing.assert_close(target(x, "logits")["logits"].softmax(2).argmax(2), share.argmax(1))


class Fixed:
    """A target that gives the ids it was made with."""

    sizes = {"ids": 3, "logits": 3}

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, images, *wanted):
        return {"ids": self.ids}


@pytest.mark.parametrize(
    "ids, problems",
    [
        ([[0, 0, 1, 2]] * 4, 0),
        ([[0, 0, 0, 0]] * 4, 2),  # one part for all
        ([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]], 1),  # one for each image
    ],
)
def test_health_wants_parts_within_images(ids, problems):
    ids = torch.tensor(ids)
    found = segments.health(Fixed(ids), iter([tiny.images(len(ids))]), heads.Config())
    assert len(found["problems"]) == problems
    share = torch.bincount(ids.flatten(), minlength=3) / ids.numel()
    assert found["perplexity"] == pytest.approx(float(torch.special.entr(share).sum().exp()))
    assert found["largest"] == float(share.max()) and sum(found["counts"]) == ids.numel()
    if problems == 2:
        assert "one part has nearly all patches (100.0%)" in found["problems"][0]
    if problems:
        assert "within an image the parts' perplexity is 1.00" in found["problems"][-1]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(parts=1), "parts: found 1"),
        (dict(warm=1.5), "warm: found 1.5"),
        (dict(width=0), "width: found 0"),
        (dict(min_parts=-1.0), "min_parts: found -1.0"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        parts.Config(**settings)
