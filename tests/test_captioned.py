"""The target `captioned`: its captions, its loss by hand, and that all ranks make one batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from stages.kit import dist
from stages.kit.parts import captions
from stages.targets import captioned
from stages.targets.captioned import Config, Training, symmetric
from tests import tiny

SMALL = dict(dim=8, text_width=8, text_depth=1, text_heads=2)
NAMES = ("water_lilly", "Crab", "0", "车")


def spec(classes=NAMES):
    return dataclasses.replace(tiny.spec(embed_dim=16), classes=tuple(classes))


def build(seed: int = 0, **changes) -> Training:
    torch.manual_seed(seed)
    return Training(Config(**{**SMALL, **changes}), spec())


def batch(rows: int = 8) -> dict:
    return {"view": tiny.images(rows, seed=1), "label": torch.arange(rows) % 4}


def test_captions_name_the_class_in_several_ways():
    found = captions.captions("water_lilly")
    assert len(found) == len(set(found)) == 21 and "a photo of a water lilly" in found
    assert "water lilly" in found and all("water lilly" in text for text in found)
    table, words = captions.table(NAMES)
    assert table.shape[:2] == (4, 21) and table.max() == len(words)
    assert {"water", "lilly", "crab", "0", "车", "photo"} <= set(words)
    text = [words[n - 1] for n in table[0, found.index("a photo of a water lilly")] if n > 0]
    assert " ".join(text) == "a photo of a water lilly"
    assert captions.captions("--") == captions.captions("thing"), "a name without a letter"


def test_the_loss_by_hand():
    """In float64, pair by pair; captions of one class share the right answer."""
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [0, 1, 0, 2, 2]
    right = torch.tensor([[a == b for b in labels] for a in labels])
    total = 0.0
    for i in range(5):
        norm = math.log(sum(math.exp(x) for x in logits[i].tolist()))
        mine = [j for j in range(5) if labels[j] == labels[i]]
        total += sum(norm - float(logits[i, j]) for j in mine) / len(mine)
    assert float(symmetric(logits, right)) == pytest.approx(total / 5, rel=1e-6)
    plain = F.cross_entropy(logits, torch.arange(5))
    torch.testing.assert_close(symmetric(logits, torch.eye(5).bool()), plain)


def test_the_gradient_against_finite_differences():
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    right = torch.eye(4).bool() | torch.eye(4).bool().roll(2, 0)
    assert torch.autograd.gradcheck(lambda x: symmetric(x, right).double(), logits, atol=1e-6)


def test_padding_says_nothing():
    text = build().text.eval()
    words = torch.tensor([[3, 1, 4, 0, 0, 0, 0, 0]])
    length = text.places.shape[0]
    padded = F.pad(words, (0, length - 8)) if length > 8 else words[:, :length]
    other = text(padded)
    with torch.no_grad():
        text.words.weight[0].fill_(5.0)
    torch.testing.assert_close(text(padded), other)


def test_it_learns_its_captions():
    """32 images of 4 colours, which it never mistakes in the end; the temperature moves."""
    model = build()
    rows = {"label": torch.arange(32) % 4}
    colours = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    rows["view"] = (0.8 * colours[rows["label"]] + 0.2 * tiny.images(32, seed=2)).clamp(0, 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        optimiser.zero_grad()
        found = model(rows, tiny.progress(32, step, 150))
        found["loss"].backward()
        optimiser.step()
        model.after_step(tiny.progress(32, step, 150))
    assert found["accuracy"] == 1 and model.target.accuracy > 0.5
    assert found["temperature"] != pytest.approx(0.07, abs=1e-6)
    least = math.log(8)  # of eight captions of one class each is right with an eighth
    assert found["loss"].item() < least + 0.5


def test_ranks_make_one_batch(monkeypatch):
    """Each rank's rows, with the other's given: the mean of the ranks' gradients is that of one
    process with all rows.
    """
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    right = labels[:, None] == labels

    def loss(rows):
        return symmetric(rows @ rows.T, right)

    loss(x).backward()
    wanted, found = x.grad.clone(), torch.zeros_like(x)
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "gather", lambda _: x.detach())
    for rank in range(2):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        own = x.detach()[3 * rank : 3 * rank + 3].clone().requires_grad_()
        value = loss(captioned.everywhere(own))
        torch.testing.assert_close(value, loss(x))
        value.backward()
        found[3 * rank : 3 * rank + 3] = own.grad / 2
    torch.testing.assert_close(found, wanted)


def test_what_a_student_sees():
    """Patches and class token in the shared space, normed and projected, and attention."""
    target = build().target.eval()
    pixels = tiny.images(2)
    found = target(pixels, "patch", "cls", "attention")
    tokens = target.encoder.forward_features(target.spec.normalise(pixels)) @ target.proj.weight.T
    torch.testing.assert_close(found["patch"], tokens[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-4, atol=1e-5)
    assert target.sizes == {"patch": 8, "cls": 8, "attention": 2} and captioned.LABELS


def test_what_is_refused():
    with pytest.raises(ValueError, match="text_width: found 10, expected a multiple of text_heads"):
        Config(text_width=10)
    one = dataclasses.replace(spec(), num_classes=1)
    with pytest.raises(ValueError, match="captioned needs 2 or more classes, the data set has 1"):
        Training(Config(**SMALL), one)
    target = build().target
    problems = captioned.health(target, iter([tiny.images(8)]), Config(**SMALL))["problems"]
    assert any("images do not find their captions: 0.0% did" in problem for problem in problems)
