"""Facts of MimCo as we read it (arXiv 2209.03063): masks, contrasts, the teacher, the queue."""

from __future__ import annotations

import hashlib
import math
import os

import pytest
import torch
import torch.nn.functional as F
from warm import Workers

from stages.kit import dist
from stages.kit.nets.masks import hidden_ids, unit_masks
from stages.kit.nets.target import Frozen
from stages.methods import mimco
from stages.targets import mocov3
from tests import tiny

progress = tiny.progress


def made(seed: int = 0, target=None, **settings) -> mimco.Method:
    return tiny.method("mimco", tiny.spec(), target, seed, **settings)


def teacher() -> Frozen:
    """A mocov3 of our own, untrained."""
    torch.manual_seed(1)
    config = mocov3.Config(hidden=16, dim=8)
    return Frozen(mocov3.Training(config, tiny.spec()).target)


def batch(rows: int = 8, seed: int = 0) -> dict:
    return {"view": tiny.images(rows, seed=seed)}


def features(rows=3, count=16, width=6, seed=0) -> torch.Tensor:
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(seed)).double()


def test_units_of_a_grid_of_fourteen():
    """30 aligned units of 2 x 2, 120 of 196 tokens."""
    method = tiny.method("mimco", tiny.spec(224, patch_size=16, depth=1), mask_unit=32)
    assert (method.units, method.count, method.hidden) == (49, 30, 120)
    noise = torch.rand(16, 49, generator=torch.Generator().manual_seed(0))
    hidden = unit_masks(noise, method.count, method.cells[1])
    assert (hidden.sum(1) == 120).all()
    cells = hidden.view(16, 7, 2, 7, 2).transpose(2, 3).flatten(3).sum(3)
    assert set(cells.unique().tolist()) == {0, 4}


def test_a_swin_hides_whole_tokens():
    method = tiny.method("mimco", tiny.spec(16, "swin"))
    assert (method.units, method.cells) == (4, (2, 1)) and method.hidden == 3


def test_hidden_pixels_change_the_targets_and_not_the_student():
    method, x = made(target=teacher()).eval(), batch()["view"]
    noise = torch.rand(8, method.units, generator=torch.Generator().manual_seed(0))
    mask = unit_masks(noise, method.count, method.cells[0])
    cells = mask.view(8, 1, 4, 4).float()
    inside = F.interpolate(cells, size=16, mode="nearest")
    other = torch.where(inside > 0, 1 - x, x)
    assert torch.equal(method.tokens(x, mask), method.tokens(other, mask))
    first, second = (method.teacher(each, "patch", "cls") for each in (x, other))
    assert not torch.allclose(first["patch"], second["patch"])
    assert not torch.allclose(first["cls"], second["cls"])


def test_the_teacher_never_changes():
    method = made(target=teacher())

    def digest() -> str:
        state = method.teacher.open.state_dict()
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()

    before, seen = digest(), method.teacher(batch()["view"], "patch")["patch"]
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        optimiser.zero_grad()
        method(batch(seed=step), progress(step=step))["loss"].backward()
        optimiser.step()
        method.after_step(progress(step=step))
    assert digest() == before
    assert torch.equal(method.teacher(batch()["view"], "patch")["patch"], seen)
    assert all(p.grad is None for p in method.teacher.open.parameters())


class Equal(tiny.Colours):
    """The same feature for every patch and image."""

    def look(self, images, wanted, norm, layers):
        found = super().look(images, wanted, norm, layers)
        ones = {name: torch.ones_like(found[name]) for name in ("patch", "cls")}
        return found | ones


def test_equal_teacher_features_cost_the_logarithm_of_their_number():
    method = made(target=Frozen(Equal(tiny.spec(), "patch", "cls")))
    out = {name: value.detach() for name, value in method(batch(), progress()).items()}
    assert float(out["patch"]) == pytest.approx(math.log(16), rel=1e-5)
    assert float(out["image"]) == pytest.approx(math.log(8), rel=1e-5)
    assert float(out["alike"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("patches", ["intra", "batch"])
def test_own_features_and_a_low_temperature_cost_nothing(patches):
    method, truth = made(patches=patches, temperature=0.002, image_temperature=0.002), features()
    ids = torch.arange(16).expand(3, -1)
    out = method.patch_loss(truth, truth, ids, progress())
    assert float(out["patch"]) < 1e-4 and float(out["patch_accuracy"]) == 1
    directions = F.normalize(truth[:, 0], dim=1)
    assert float(method.image_loss(directions, directions)["image"]) < 1e-4


def by_hand(queries, keys, ids, temperature, columns=None) -> float:
    """The mean cross-entropy, number by number; columns: (image, patch) that count, None: own."""
    loss, count = 0.0, 0
    for b in range(len(queries)):
        for row, i in enumerate(ids[b].tolist()):
            mine = [(b, j) for j in range(keys.shape[1])] if columns is None else columns
            mine = [(b, i), *(place for place in mine if place != (b, i))]
            q = queries[b, row] / queries[b, row].norm()
            scores = [float(q @ (keys[p] / keys[p].norm())) / temperature for p in mine]
            loss += math.log(sum(map(math.exp, scores))) - scores[0]
            count += 1
    return loss / count


def test_patch_losses_by_hand():
    truth, found = features(), features(count=5, seed=1)
    ids = torch.tensor([[0, 3, 5, 9, 15], [1, 2, 3, 4, 5], [0, 1, 8, 9, 14]])
    method = made(temperature=0.3)
    out = method.patch_loss(found, truth, ids, progress())
    assert float(out["patch"]) == pytest.approx(by_hand(found, truth, ids, 0.3), rel=1e-10)
    unit, mean = F.normalize(truth, dim=-1), []
    for b in range(3):
        mean += [float(unit[b, i] @ unit[b, j]) for i in range(16) for j in range(16) if i != j]
    assert float(out["alike"]) == pytest.approx(sum(mean) / len(mean), abs=1e-10)
    every = [(b, j) for b in range(3) for j in range(16)]
    whole = made(temperature=0.3, patches="batch").patch_loss(found, truth, ids, progress())
    assert float(whole["patch"]) == pytest.approx(by_hand(found, truth, ids, 0.3, every), rel=1e-10)
    some = made(temperature=0.3, patches="batch", negatives=7)
    out = some.patch_loss(found, truth, ids, progress())
    chosen = [every[n] for n in mimco.drawn(48, 7, progress()).tolist()]
    assert len(set(chosen)) == 7
    wanted = by_hand(found, truth, ids, 0.3, chosen)
    assert float(out["patch"]) == pytest.approx(wanted, rel=1e-10)
    own = truth.gather(1, ids[..., None].expand(-1, -1, 6))
    cosine = F.cosine_similarity(found, own, dim=-1)
    out = made(patches="cosine").patch_loss(found, truth, ids, progress())
    torch.testing.assert_close(out["patch"], (2 - 2 * cosine).mean())
    out = made(patches="smooth_l1").patch_loss(found, truth, ids, progress())
    normal = (own - own.mean(-1, True)) / (own.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    error = (found - normal).abs()
    wanted = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(out["patch"], wanted)


def test_gradient_of_the_patch_contrast_by_hand():
    """Of unit queries: (p - 1) t / (T n), with p over the patches of the own image; in float64."""
    truth, found = features(2, 4), features(2, 2, seed=1).requires_grad_()
    ids, method = torch.tensor([[0, 2], [3, 1]]), made(temperature=0.5)
    method.patch_loss(found, truth, ids, progress())["patch"].backward()
    keys = F.normalize(truth, dim=-1)
    for b in range(2):
        for row, i in enumerate(ids[b].tolist()):
            x = found[b, row].detach()
            q = x / x.norm()
            p = ((keys[b] @ q) / 0.5).exp()
            p = p / p.sum()
            p[i] -= 1
            slope = (p[:, None] * keys[b]).sum(0) / (0.5 * 4)
            expected = (slope - q * (q @ slope)) / x.norm()  # through the normalisation
            torch.testing.assert_close(found.grad[b, row], expected, rtol=1e-10, atol=1e-13)
    for patches in ("intra", "batch", "cosine", "smooth_l1"):
        method = made(patches=patches)
        loss = lambda x, m=method: m.patch_loss(x, truth, ids, progress())["patch"]  # noqa: E731
        assert torch.autograd.gradcheck(loss, [found])


def test_gradient_of_the_image_contrast():
    method = made(queue=3)
    method.double().queue.copy_(F.normalize(features(1, 3)[0], dim=1))
    method.filled.fill_(2)
    q, k = (F.normalize(features(1, 4, seed=n)[0], dim=1) for n in (1, 2))
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: method.image_loss(q, k)["image"], [q])
    keys = torch.cat([k, method.queue[:2]])[None]
    wanted = by_hand(q.detach()[None], keys, torch.arange(4)[None], 0.2)
    assert float(method.image_loss(q, k)["image"]) == pytest.approx(wanted, rel=1e-10)


def test_where_the_gradients_go(monkeypatch):
    """Of patches: none at visible places. Of images: through visible and hidden tokens alike."""
    method, seen = made(), []
    kept = method.tokens

    def tokens(*given):
        seen.append(kept(*given))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(method, "tokens", tokens)
    noise = progress().uniform("mask", method.units)
    hidden = unit_masks(noise, method.count, method.cells[1])
    for name in ("patch", "image"):
        method(batch(), progress())[name].backward()
        reached = seen[-1].grad.abs().sum(-1) > 0
        assert torch.equal(reached, hidden if name == "patch" else torch.ones_like(hidden))
    assert hidden_ids(hidden, method.hidden).shape[1] == int(hidden.sum(1).unique()) == 10


def test_what_does_not_matter():
    """For patches who else is in the batch, for images the order of patches."""
    method = made().eval()
    truth, found = features(), features(count=5, seed=1)
    ids = torch.tensor([[0, 3, 5, 9, 15]]).expand(3, -1)
    order = torch.tensor([2, 0, 1])
    one = method.patch_loss(found, truth, ids, progress())["patch"]
    other = method.patch_loss(found[order], truth[order], ids, progress())["patch"]
    torch.testing.assert_close(one, other)
    x = torch.randn(4, 16, 32)
    moved = x[:, torch.randperm(16)]
    torch.testing.assert_close(method.image_head(x.mean(1)), method.image_head(moved.mean(1)))


def test_queue_is_first_in_first_out():
    method, x = made(queue=20), [batch(seed=n) for n in range(3)]
    keys = [F.normalize(method.teacher(b["view"], "cls")["cls"], dim=1) for b in x]
    first = method(x[0], progress())
    assert int(method.filled) == 0
    torch.testing.assert_close(first["image"], made()(x[0], progress())["image"])
    for step in range(3):
        method(x[step], progress())
        method._seen = method._seen[-1:]
        method.after_step(progress())
    assert int(method.filled) == 20
    torch.testing.assert_close(method.queue, torch.cat([keys[2], keys[1], keys[0]])[:20])


def test_centre_is_a_running_mean():
    method, x = made(centre=True), batch()
    method(x, progress())
    method.after_step(progress())
    patches = method.teacher(x["view"], "patch")["patch"]
    torch.testing.assert_close(method.mean, 0.1 * patches.mean((0, 1)))
    expected = F.normalize(patches - method.mean, dim=-1)
    torch.testing.assert_close(method.targets(patches), expected)


def test_one_loss_alone():
    method = made(image_weight=0.0)
    assert not hasattr(method, "whole_batch") and method.image_head is None
    assert "image" not in method(batch(), progress())
    assert made(patches="batch", image_weight=0.0).whole_batch
    method = made(patch_weight=0.0)
    out = method(batch(), progress())
    assert "patch" not in out and torch.equal(out["loss"], out["image"])
    with pytest.raises(ValueError, match="patch_weight: found 0"):
        mimco.Config(patch_weight=0.0, image_weight=0.0)


def one_step() -> dict:
    """Losses and mean gradients over ranks of this rank's share of a batch, against the batch."""
    dist.start()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    method = made(patches="batch", negatives=20, queue=12, centre=True, target=None)
    means = {}
    for step in range(2):
        rows = torch.arange(8).chunk(world)[rank]
        share = {"view": batch(seed=step)["view"].double()[rows]}
        method.zero_grad()
        out = method(share, progress(rows, step=step))
        out["loss"].backward()
        method.after_step(progress(rows, step=step))
        means |= {f"{step} {k}": dist.mean(v.detach().clone()) for k, v in out.items()}
    for name, parameter in method.named_parameters():
        if parameter.grad is not None:
            means[name] = dist.mean(parameter.grad.clone())
    means |= {name: value.double() for name, value in method.named_buffers() if value.numel() < 99}
    return {name: value.tolist() for name, value in means.items()}


def test_two_processes_do_what_one_does():
    found = []
    for world in (1, 2):
        workers = Workers(world, double=True)
        try:
            found.append(workers.call(one_step)[0])
        finally:
            workers.close()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[0].items():
        ours, theirs = (torch.tensor(each, dtype=torch.float64) for each in (value, found[1][name]))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


def test_pictures_without_patches_leave_their_columns_out():
    for settings, columns in (({}, 4), ({"patch_weight": 0.0}, 2)):
        sheets = made(**settings).pictures(batch(3))
        assert sheets["features"].shape == (296, columns * 100 - 4, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mask_unit=6), "mask_unit: found 6 pixels, expected a multiple of a token's 4"),
        (dict(temperature=0.0), "temperature: found 0.0"),
        (dict(queue=-1), "queue: found -1"),
        (dict(negatives=0), "negatives: found 0"),
        (dict(centre_momentum=1.0), "centre_momentum: found 1.0"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        mimco.Config(**settings).check(16, tiny.model())
