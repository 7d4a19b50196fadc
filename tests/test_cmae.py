"""Facts of CMAE (arXiv 2207.13532 and its official code): masks, views, losses, averages."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.kit import keyed
from stages.kit.data import batches
from stages.kit.data.crops import Crops
from stages.kit.data.views import linked
from stages.kit.nets import encoders
from stages.kit.parts import contrast
from stages.kit.parts.contrast import info_nce
from stages.methods import cmae
from tests import tiny
from workflow import checks

SMALL = dict(decoder_dim=16, decoder_depth=1, decoder_heads=2, hidden=24, dim=12)
progress = tiny.progress


def made(seed: int = 0, **settings) -> cmae.Method:
    return tiny.method("cmae", tiny.spec(), seed=seed, **{**SMALL, **settings})


def batch(rows: int = 8, seed: int = 0) -> dict:
    """Noise, another for each view."""
    return {name: tiny.images(rows, seed=seed + i) for i, name in enumerate(("view", "second"))}


def raw(rows: int = 4, size: int = 40) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, size, size, 3), generator=generator).to(torch.uint8)
    return SimpleNamespace(images=images, index=torch.arange(rows))


# --- masks ----------------------------------------------------------------------------------------


def test_groups_of_a_grid_of_fourteen():
    """17 aligned groups of 2 x 2, 68 tokens, of every sample."""
    settings = {**SMALL, "mask_ratio": 0.65}
    method = tiny.method("cmae", tiny.spec(224, patch_size=16, depth=1), **settings)
    noise = torch.rand(32, method.groups, generator=torch.Generator().manual_seed(0))
    ids_keep, ids_restore, mask = method.masks(noise)
    assert method.groups == 49 and ids_keep.shape == (32, 68)
    seen = (1 - mask).view(32, 7, 2, 7, 2).transpose(2, 3).flatten(3)
    assert set(seen.sum(3).unique().tolist()) == {0, 4}
    assert (seen.amax(3).sum((1, 2)) == 17).all()
    order = ids_restore.argsort(dim=1)
    assert torch.equal(order[:, :68], ids_keep)
    assert torch.equal(order.sort(dim=1).values, torch.arange(196).expand(32, -1))
    assert (mask.gather(1, ids_keep) == 0).all() and (mask.sum(1) == 128).all()


def test_groups_of_a_grid_of_eight():
    """5 groups of 16: 20 tokens, where single patches would be 22."""
    assert checks.keep_count(16, 0.65) * 4 == 20 and checks.keep_count(64, 0.65) == 22
    method = tiny.method("cmae", tiny.spec(32), **SMALL)
    assert method.masks(torch.rand(3, 16))[0].shape == (3, 20)


def test_tokens_that_each_encoder_sees(monkeypatch):
    """The visible ones and a class token; all of them and a class token."""
    method, seen = made(), []
    for encoder in (method.encoder, method.key_encoder):
        encoder.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    method(batch(), progress())
    assert seen == [1 + 4, 1 + 16]


# --- views ----------------------------------------------------------------------------------------


def shown(**settings) -> dict:
    config = cmae.Config(**settings)
    recipes = linked(cmae.views(config, tiny.spec(32)))
    rows, found = raw(64), {}
    for name, recipe in recipes.items():
        found |= recipe.make(name, rows, lambda name: keyed.key(3, name))
    return found | {"recipes": recipes}


PLAIN = dict(jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0, blur=0.0)


def test_without_shift_and_colours_the_views_are_equal():
    found = shown(shift=0, margin=4, **PLAIN)
    assert torch.equal(found["view"], found["second"])


def test_the_second_view_is_the_first_one_shifted():
    """By whole pixels of the resized crop, 0 to `shift` of them both ways; the first never is."""
    found, rows = shown(shift=4, margin=5, **PLAIN), raw(64)
    first, second = (found["recipes"][name] for name in ("view", "second"))
    assert (first.size, first.margin, second.shift) == (32, 5, 4)
    whole = first.crops(rows.images, keyed.key(3, "view"), keyed.key(3, "view"), rows.index)
    base = Crops(whole.boxes, whole.flips, 37, 37, torch.zeros(64, 2, dtype=torch.int64))
    base = base.pixels(rows.images).permute(0, 3, 1, 2).float() / 255
    moves = set()
    for b in range(64):
        assert torch.equal(found["view"][b], base[b, :, :32, :32])
        places = [
            (r, c)
            for r in range(6)
            for c in range(6)
            if torch.equal(found["second"][b], base[b, :, r : r + 32, c : c + 32])
        ]
        assert len(places) == 1, "one shift, and the flip is shared"
        moves |= set(places)
    assert {r for r, _ in moves} == {c for _, c in moves} == set(range(5))
    assert len(moves) > 12, "rows and columns are drawn for themselves"


def test_a_view_of_its_own_crop_and_colours_of_the_second_only():
    found = shown(second="crop")
    first, second = (found["recipes"][name] for name in ("view", "second"))
    assert second.crop_of is None and not first.colours and second.colours
    assert not torch.equal(found["view.box"], found["second.box"])
    recipes = cmae.views(cmae.Config(), tiny.spec(64, patch_size=8))
    assert (recipes["view"].margin, recipes["second"].shift) == (8, 8)
    assert recipes["second"].blur == 0.5 and recipes["second"].jitter == (0.4, 0.4, 0.4, 0.1)
    published = {k: cmae.PUBLISHED[k] for k in ("shift", "margin", "crop_min")}
    recipes = cmae.views(cmae.Config(**published), tiny.spec(224, patch_size=16))
    assert (recipes["view"].margin, recipes["second"].shift) == (32, 31)
    assert recipes["view"].scale == (0.2, 1.0) and recipes["second"].blur_sigma == (0.1, 2.0)


# --- losses ---------------------------------------------------------------------------------------


def test_contrast_is_twice_the_temperature_times_cross_entropy():
    method, x = made(temperature=0.07), batch()
    out = method(x, progress())
    view, second = (method.spec.normalise(x[name]) for name in ("view", "second"))
    ids_keep, ids_restore, _ = method.masks(progress().uniform("mask", method.groups))
    tokens = encoders.visible(method.encoder, view, ids_keep)["tokens"]
    q = method.predictor(method.projector(method.feature_decoder(tokens, ids_restore).mean(1)))
    whole = encoders.masked(method.key_encoder, second, None, None, norm=False)["patch"]
    k = method.key_projector(whole.mean(1))
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    plain = F.cross_entropy(q @ k.T / 0.07, torch.arange(8))
    torch.testing.assert_close(out["contrast"] / (2 * 0.07), plain)
    torch.testing.assert_close(out["loss"], out["pixels"] + out["contrast"])
    torch.testing.assert_close(out["information"], math.log(8) - plain)


def test_info_nce_of_orthogonal_directions():
    for size, tau in ((4, 0.07), (16, 0.5)):
        found, accuracy = info_nce(torch.eye(size), torch.eye(size), tau)
        expected = math.log(1 + (size - 1) * math.exp(-1 / tau))
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-6) and accuracy == 1


def test_gradient_of_info_nce_by_hand():
    """(p - 1) k / (T n), with the softmax p of each query over all keys, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 6, generator=generator).double() for n in (3, 5))
    q, k = F.normalize(q, dim=1).requires_grad_(), F.normalize(k, dim=1)
    info_nce(q, k, 0.2, place=1)[0].backward()
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for i in range(3):
        scores = [math.exp(sum((q[i] * row).tolist()) / 0.2) for row in k]
        for j in range(5):
            share = scores[j] / sum(scores) - (j == i + 1)
            expected[i] += share * k[j] / (0.2 * 3)
    torch.testing.assert_close(q.grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda q: info_nce(q, k, 0.2, 1)[0], [q])


def test_pixels_are_lost_at_hidden_patches_only_and_features_everywhere(monkeypatch):
    method, x = made(), batch()
    plain = method(x, progress())
    _, _, mask = method.masks(progress().uniform("mask", method.groups))

    def changed(decoder, places):
        kept = decoder.forward
        noise = torch.randn(decoder.pred.out_features, generator=torch.Generator().manual_seed(1))
        move = noise * places[..., None]
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "forward", lambda *args: kept(*args) + move)
            return method(x, progress())

    out = changed(method.decoder, 1 - mask)
    assert torch.equal(out["pixels"], plain["pixels"])
    assert not torch.allclose(changed(method.decoder, mask)["pixels"], plain["pixels"])
    for place in range(16):  # of one image, since what all share is normalised away
        one = torch.zeros(8, 16)
        one[3, place] = 5.0
        assert float((changed(method.feature_decoder, one)["contrast"] - plain["contrast"]).abs())


def test_the_order_of_the_batch_does_not_matter():
    method, x = made().eval(), batch()
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    moved = method({name: value[order] for name, value in x.items()}, progress(order))
    for name, value in method(x, progress()).items():
        torch.testing.assert_close(moved[name], value)


def test_without_a_contrast_it_is_mae():
    """With groups of one patch, step by step; the rest of the network gets no gradient."""
    method, mae = made(contrast_weight=0.0, mask_cell=1, mask_ratio=0.75), None
    sizes = {k: SMALL[k] for k in ("decoder_dim", "decoder_depth", "decoder_heads")}
    mae = tiny.method("mae", tiny.spec(), **sizes)
    losses = []
    for model in (method, mae):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser, found = torch.optim.SGD(trained, lr=0.1), []
        for step in range(4):
            optimiser.zero_grad()
            loss = model(batch(seed=step), progress(step=step))["loss"]
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    for part in (method.feature_decoder, method.projector, method.predictor):
        assert all(not p.grad.any() for p in part.parameters())


def test_without_a_feature_decoder_the_visible_patches_are_contrasted():
    method = made(feature_depth=0)
    assert method.feature_decoder is None
    tokens = torch.randn(2, 1 + 4, 32)
    torch.testing.assert_close(method.features(tokens, None), tokens[:, 1:].mean(1))
    method(batch(), progress())["loss"].backward()


# --- what follows what ----------------------------------------------------------------------------


def test_averages_follow_the_online_network_and_get_no_gradient():
    method = made(momentum=0.996)
    followed = {"key_encoder": method.encoder, "key_projector": method.projector}
    for name, source in followed.items():
        own = getattr(method, name).state_dict()
        assert all(torch.equal(own[key], value) for key, value in source.state_dict().items())
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        before = {
            name: {k: v.clone() for k, v in getattr(method, name).named_parameters()}
            for name in followed
        }
        optimiser.zero_grad()
        method(batch(seed=step), progress())["loss"].backward()
        assert all(p.grad is None for n in followed for p in getattr(method, n).parameters())
        optimiser.step()
        method.after_step(progress())
    for name, source in followed.items():
        new = dict(source.named_parameters())
        for key, value in getattr(method, name).named_parameters():
            expected = 0.996 * before[name][key] + 0.004 * new[key]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
        assert not torch.equal(new[key], before[name][key]) or name == "key_encoder"
    averaged = {name.split(".")[0] for name, p in method.named_parameters() if not p.requires_grad}
    assert averaged == {"key_encoder", "key_projector", "encoder"}  # its positions are fixed


def test_published_parameter_counts():
    sizes = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)
    config = {k: v for k, v in cmae.PUBLISHED.items() if k not in ("epochs", "batch_size")}
    config = cmae.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    with torch.device("meta"):
        method = cmae.Method(config, tiny.spec(224, **sizes))

    def count(part) -> int:
        return sum(p.numel() for p in part.parameters())

    tables = 197 * 512  # a decoder's fixed positions, counted in the published figures
    assert count(method.encoder) == 85_798_656
    assert count(method.decoder) + tables == 26_109_184
    assert count(method.feature_decoder) + tables == 7_194_880
    assert count(method.projector) == 1_577_472 and count(method.predictor) == 791_040


def test_pictures_show_both_frames_and_neighbours():
    method, images = made(), tiny.images(12)
    sheets = method.pictures({"view": images[:3], "gallery": images})
    assert set(sheets) == {"views", "nearest"}
    assert sheets["views"].shape == (3 * 100 - 4, 5 * 100 - 4, 3)
    assert sheets["nearest"].shape == (8 * 100 - 4, 6 * 100 - 4, 3)
    red, blue = ([round(255 * x) for x in ink] for ink in ((1.0, 0.1, 0.1), (0.1, 0.4, 1.0)))
    inks = sheets["views"][:, :96].reshape(-1, 3).tolist()
    assert red in inks and blue in inks


def test_nearest_images_are_those_with_the_most_similar_vectors():
    angles = torch.tensor([0.0, 0.3, 1.7, 3.3, 4.0, 5.1])
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    images = angles.view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 6
    sheet = contrast.nearest(images, vectors)
    centred = vectors - vectors.mean(0)
    for row in range(6):
        cosines = F.cosine_similarity(centred[row], centred)
        order = [j for j in cosines.argsort(descending=True).tolist() if j != row]
        wanted = [round(float(angles[j]) / 6 * 255) for j in [row, *order]]
        assert sheet[row * 100 + 50, 48::100, 0].tolist() == wanted


class Split:
    """1,000 images, whose grey tells their number."""

    labels = np.arange(1000) % 7

    def __len__(self):
        return 1000

    def square(self, index, size):
        return torch.as_tensor(index)[:, None, None, None].expand(-1, size, size, 3) // 4


def test_the_nearest_are_looked_for_in_more_images_than_are_shown(monkeypatch):
    monkeypatch.setattr(batches, "held_out", lambda data: Split())
    found = batches.shown_batch(None, tiny.spec(), torch.device("cpu"))
    numbers = (found["gallery"][:, 0, 0, 0] * 255).tolist()
    assert found["view"].shape == (8, 3, 16, 16) and found["label"].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        0,
    ]
    assert torch.equal(found["gallery"][:8], found["view"])
    assert 190 < len(numbers) <= 256 and numbers == sorted(numbers) and numbers[-1] > 245


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mask_cell=3), "mask_cell: found 3 patches, expected a divisor of the 4"),
        (dict(shift=5, margin=4), "shift: found 5 pixels, expected at most margin, which is 4"),
        (dict(mask_ratio=0.99), "mask_ratio: found 0.99, which hides 4 of 4 groups"),
        (dict(temperature=0.0), "temperature: found 0.0"),
        (dict(momentum=1.5), "momentum: found 1.5"),
        (dict(shift=-1), "shift: found -1"),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        cmae.Config(**settings).check(16, tiny.model())
