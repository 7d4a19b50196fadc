"""Facts of VQ-KD (arXiv 2208.06366 and its official code): codes, losses, sizes, collapse."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit import keyed
from stages.kit.nets.pictures import principal_colours
from stages.kit.nets.target import Frozen, Target
from stages.kit.parts import health as measure
from stages.kit.parts import quantize
from stages.kit.parts.quantize import Codebook, Learner
from stages.kit.spec import configure
from stages.kit.train.recipe import Recipe
from stages.targets import vqkd
from tests import tiny
from workflow.params import read

SMALL = dict(codes=8, code_dim=4, vectors_per_code=4, kmeans_after=0.0)
images = tiny.images


def spec(**model):
    return tiny.spec(**{"embed_dim": 16, **model})


def progress(step: int = 0, steps: int = 10, batch: int = 4):
    return tiny.progress(batch, step, steps, epoch=step / 5)


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Teacher(Target):
    """Features of a patch: fixed random projections of its pixels."""

    def __init__(self, dim: int = 6):
        super().__init__()
        self.spec, self.sizes = spec(), {"patch": dim}
        self.conv = nn.Conv2d(3, dim, 4, 4)

    def look(self, images, wanted, norm, layers):
        return {"patch": self.conv(images - 0.5).flatten(2).transpose(1, 2)}


def training(seed: int = 0, **changes) -> vqkd.Training:
    torch.manual_seed(seed)
    return vqkd.Training(vqkd.Config(**{**SMALL, **changes}), spec(), Frozen(Teacher()))


def ids_of(target, x: torch.Tensor) -> torch.Tensor:
    return target(x, "ids")["ids"]


# --- the quantiser --------------------------------------------------------------------------------


def test_nearest_by_cosine_is_nearest_by_distance():
    u, codes = units(500, 8), units(40, 8, seed=1)
    distances = (u[:, None] - codes[None]).square().sum(-1)
    assert torch.equal(quantize.nearest(u, codes), distances.argmin(1))


def test_assignment_in_parts_is_the_same(monkeypatch):
    u, codes = units(101, 8), units(40, 8, seed=1)
    whole, sums = quantize.nearest(u, codes), quantize.tally(u, quantize.nearest(u, codes), 40)
    monkeypatch.setattr(quantize, "CELLS", 400)  # 10 rows at a time
    assert torch.equal(quantize.nearest(u, codes), whole)
    torch.testing.assert_close(quantize.tally(u, whole, 40), sums)


def test_tally_counts_and_sums():
    u, ids = units(50, 3), torch.arange(50) % 4
    counts, sums = quantize.tally(u, ids, 6)
    assert counts.tolist() == [13, 13, 12, 12, 0, 0]
    for code in range(4):
        torch.testing.assert_close(sums[code], u[ids == code].sum(0))
    assert torch.equal(sums[4:], torch.zeros(2, 3))


def test_gradient_passes_straight_through_and_codes_get_none():
    book, u = Codebook(8, 4), units(2, 5, 4).requires_grad_()
    ids, q, _ = book(u)
    torch.testing.assert_close(q.detach(), book.vectors[ids])
    wanted = torch.randn(2, 5, 4)
    (q * wanted).sum().backward()
    assert torch.equal(u.grad, wanted)
    assert book.vectors.grad is None and not list(book.parameters())


def test_commitment_is_two_minus_two_cosines_over_dimensions():
    book, u = Codebook(8, 4), units(2, 5, 4)
    ids, _, commitment = book(u)
    cosine = (u * book.vectors[ids]).sum(-1)
    assert float(commitment) == pytest.approx(float(((2 - 2 * cosine) / 4).mean()), abs=1e-6)


def test_commitment_pulls_the_encoder_only():
    book, u = Codebook(8, 4), units(10, 4).requires_grad_()
    ids, _, commitment = book(u)
    commitment.backward()
    torch.testing.assert_close(u.grad, 2 * (u.detach() - book.vectors[ids]) / u.numel())


def test_one_step_of_two_codes_by_hand():
    book = Codebook(2, 2)
    book.vectors.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    learner = Learner(book, decay=0.9, kmeans=False)
    u = torch.tensor([[0.8, 0.6], [0.96, 0.28], [1.0, 0.0]])
    learner.count(u, torch.tensor([0, 0, 0]))
    learner.step(0)
    mean = [(0.8 + 0.96 + 1) / 3, (0.6 + 0.28) / 3]
    length = math.hypot(*mean)
    moved = [0.9 + 0.1 * mean[0] / length, 0.1 * mean[1] / length]
    length = math.hypot(*moved)
    assert book.vectors[0].tolist() == pytest.approx(
        [moved[0] / length, moved[1] / length], abs=1e-6
    )
    assert book.vectors[1].tolist() == [0.0, 1.0]  # not hit: to the bit


def test_codes_keep_length_one_and_unhit_codes_keep_their_bits():
    book = Codebook(64, 8)
    learner = Learner(book, kmeans=False)
    torch.testing.assert_close(book.vectors.norm(dim=1), torch.ones(64), atol=1e-5, rtol=0)
    for step in range(30):
        before, u = book.vectors.clone(), units(40, 8, seed=step)
        ids = book.assign(u)
        learner.count(u, ids)
        learner.step(step)
        still = torch.bincount(ids, minlength=64) == 0
        assert 0 < int(still.sum()) < 64
        assert torch.equal(book.vectors[still], before[still])
        assert not torch.equal(book.vectors[~still], before[~still])
    torch.testing.assert_close(book.vectors.norm(dim=1), torch.ones(64), atol=1e-5, rtol=0)


def test_micro_batches_move_the_codes_as_one_batch_does():
    u = units(60, 4)
    books = []
    for parts in (1, 3):
        torch.manual_seed(0)
        book = Codebook(8, 4)
        learner = Learner(book, kmeans=False)
        for part in u.chunk(parts):
            learner.count(part, book.assign(part))
        learner.step(0)
        books.append(book.vectors)
    torch.testing.assert_close(*books, atol=1e-6, rtol=0)


LEARN = """
import sys
import torch
import torch.nn.functional as F
from stages.kit import dist
from stages.kit.parts.quantize import Codebook, Learner
from stages.kit.spec import configure
from stages.kit.train.recipe import Recipe

def learn(rank, world):  # k-means and two moving averages, on this rank's share of the vectors
    torch.manual_seed(rank)  # the first codes differ: k-means must make them the same
    book = Codebook(8, 4)
    learner = Learner(book, per_code=5)
    for step in range(2):
        drawn = torch.randn(64, 4, generator=torch.Generator().manual_seed(step))
        mine = F.normalize(drawn, dim=1).chunk(world)[rank]
        if not learner.ready():
            learner.collect(mine)
            learner.start(seed=3)
        learner.count(mine, book.assign(mine))
        learner.step(step)
    return book.vectors

if __name__ == "__main__":
    dist.start()
    torch.save(learn(dist.rank(), dist.world()), f"{sys.argv[1]}/{dist.rank()}.pt")
    dist.stop()
"""


def test_two_ranks_with_half_the_batch_end_with_the_codes_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEARN, str(tmp_path)], env=common | {"RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    alone = {"__name__": "alone"}
    exec(LEARN, alone)
    torch.testing.assert_close(first, alone["learn"](0, 1), atol=1e-5, rtol=0)


# --- k-means --------------------------------------------------------------------------------------


def test_kmeans_finds_clusters_and_leaves_empty_ones():
    centres = torch.eye(4)
    u = F.normalize(
        centres.repeat(50, 1)
        + 0.05 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0)),
        dim=1,
    )
    means = quantize.kmeans(u, 12, seed=1)
    assert (means @ centres.T).amax(0).min() > 0.98
    torch.testing.assert_close(means.norm(dim=1), torch.ones(12), atol=1e-5, rtol=0)
    fixed = quantize.kmeans(
        torch.eye(2)[torch.zeros(5, dtype=torch.long)], 3
    )  # five times the same vector
    assert torch.equal(fixed, torch.eye(2)[[0, 0, 0]])


def test_kmeans_by_an_independent_lloyd():
    u = units(40, 3)
    means = u[keyed.permutation(40, 7, "kmeans")[:5]].clone()
    for _ in range(10):
        ids = (u @ means.T).argmax(1)
        for code in range(5):
            if (ids == code).any():
                means[code] = F.normalize(u[ids == code].mean(0), dim=0)
    torch.testing.assert_close(quantize.kmeans(u, 5, seed=7), means, atol=1e-5, rtol=0)


def test_kmeans_waits_for_enough_vectors_and_runs_once():
    book = Codebook(8, 4)
    learner, before = Learner(book, per_code=10), book.vectors.clone()

    def offered(learner, u):
        learner.collect(u)
        learner.start(seed=0)
        return learner.ready()

    assert not offered(learner, units(50, 4))
    assert torch.equal(book.vectors, before) and len(learner.waiting) == 50
    state = learner.state_dict()
    resumed = Learner(book, per_code=10)
    resumed.load_state_dict(state)
    assert offered(resumed, units(50, 4, seed=1))
    both = torch.cat([units(50, 4), units(50, 4, seed=1)])
    torch.testing.assert_close(book.vectors, quantize.kmeans(both, 8, seed=0))
    assert len(resumed.waiting) == 0
    after = book.vectors.clone()
    resumed.start(seed=0)
    assert torch.equal(book.vectors, after)
    learner.load_state_dict(resumed.state_dict())  # a finished state into one that waits
    assert learner.ready() and torch.equal(book.vectors, after)


def test_kmeans_takes_the_vectors_in_the_order_of_the_batch_however_it_is_cut():
    books, u = [], units(96, 4)
    for parts in (1, 4):
        torch.manual_seed(0)
        learner = Learner(Codebook(8, 4), per_code=10)
        for part in u.chunk(parts):
            assert not learner.ready()  # the codes are used from the next step on
            learner.collect(part)
        learner.start(seed=0)
        assert learner.ready()
        books.append(learner.codebook.vectors)
    assert torch.equal(*books)


def test_kmeans_starts_after_its_share_and_in_the_second_half_at_the_latest():
    for changes, first in (
        (dict(kmeans_after=0.3), 3),
        (dict(kmeans_after=0.0), 0),
        (dict(vectors_per_code=10**6), 5),
    ):
        model = training(**changes)
        for step in range(10):
            out = model(dict(view=images(seed=step)), progress(step))
            model.after_step(progress(step))
            assert bool(model.learner.started) == (step >= first), (changes, step)
            assert (
                (float(out["usage"]) > 0)
                == (float(out["commitment"].detach()) > 0)
                == (step > first)
            )
    model = training(kmeans_after=0.9)
    model(dict(view=images()), progress(0, steps=1))
    model.after_step(progress(0, steps=1))  # even a single step
    assert bool(model.learner.started)


def test_published_kmeans_is_of_the_first_batch_and_no_weight_moves_before_it():
    """As officially: the codes are k-means of what the untrained encoder gives."""
    given = {key: value for key, value in vqkd.PUBLISHED.items() if "_" in key or key == "warmup"}
    train = {"epochs": 100, "batch_size": given.pop("batch_size")}
    config = configure(vqkd.Config, given | {"codes": 8, "code_dim": 4})
    torch.manual_seed(0)
    model = vqkd.Training(config, spec(), Frozen(Teacher()))
    assert Recipe.of(config, train, steps_per_epoch=5).lr_at(0) == 0
    assert not bool(model.learner.started)
    vectors = model.target.encode(images()).detach().flatten(0, 1)
    model(dict(view=images()), progress(0, steps=500))
    model.after_step(progress(0, steps=500))
    assert bool(model.learner.started)
    expected = quantize.kmeans(vectors, 8, seed=progress().seed)
    torch.testing.assert_close(model.target.codebook.vectors, expected)
    # k-means waits for no second batch: at 224 px an image has 196 patches
    assert train["batch_size"] * 196 > 8192 * config.vectors_per_code


def test_presets_that_ask_for_the_published_tokenizer_get_its_kmeans():
    folder, found = Path(__file__).parents[1] / "presets", {}
    for path in sorted(folder.glob("*.yaml")):
        for name, target in read(path).targets.items():
            if target.kind == "vqkd" and target.settings.config["kmeans_after"] == 0:
                found.setdefault(path.stem, set()).add(name)
    assert found.pop("clip-imagenet") == {"vqkd"}
    assert found == {"imagenet": {"vqkd"}, "photos64": {"vqkd", "vqkd-dino"}}


def test_without_kmeans_random_codes_are_used_from_the_start():
    model = training(kmeans=False, kmeans_after=0.9)
    before = model.target.codebook.vectors.clone()
    assert float(model(dict(view=images()), progress())["usage"]) > 0
    assert torch.equal(before, model.target.codebook.vectors)


def test_evaluation_never_starts_kmeans():
    model = training()
    before = model.target.codebook.vectors.clone()
    model.eval()(dict(view=images(32)), progress())
    assert not model.learner._vectors
    model.after_step(progress())
    assert torch.equal(model.target.codebook.vectors, before) and not bool(model.learner.started)


def test_dead_codes_restart_only_when_asked():
    for reseed in (0, 3):
        torch.manual_seed(0)
        book = Codebook(16, 4)
        learner, u = Learner(book, kmeans=False, reseed=reseed), units(6, 4)
        start = book.vectors.clone()
        for step in range(3):
            learner.count(u, torch.zeros(6, dtype=torch.long))  # all in code 0
            learner.step(0, step)
        changed = (book.vectors[1:] != start[1:]).any(1)
        assert bool(changed.all()) if reseed else not bool(changed.any())
        if reseed:
            assert ((book.vectors[1:] @ u.T).amax(1) > 1 - 1e-5).all()  # at vectors of the batch


def test_restarted_codes_are_the_same_however_the_batch_is_cut():
    books, u = [], units(12, 4)
    for parts in (1, 3):
        torch.manual_seed(0)
        learner = Learner(Codebook(16, 4), kmeans=False, reseed=1)
        for part in u.chunk(parts):
            learner.count(part, torch.zeros(len(part), dtype=torch.long))
        learner.step(0)
        books.append(learner.codebook.vectors[1:])
    assert torch.equal(*books)


def test_quantiser_is_float32_under_autocast():
    book, u = Codebook(64, 16), units(100, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ids, q, commitment = book(u.bfloat16())
        same = book.assign(u)
        learner = Learner(book, kmeans=False)
        learner.count(u, same)
        sums = learner._statistics[:, :-1]
    assert q.dtype == commitment.dtype == sums.dtype == torch.float32
    assert torch.equal(same, (u @ book.vectors.T).argmax(1))
    torch.testing.assert_close(sums[same[0]], u[same == same[0]].sum(0))


# --- the tokenizer --------------------------------------------------------------------------------


def clustered():
    """A tokenizer whose codes come from k-means of one batch."""
    model = training(vectors_per_code=1)
    model(dict(view=images()), progress())
    model.after_step(progress())
    assert model.learner.ready()
    return model


def test_losses_at_the_start_and_their_sum():
    model = clustered()
    out = model(dict(view=images(8)), progress(batch=8))
    assert out["reconstruction"].item() == pytest.approx(
        1, abs=0.35
    )  # random directions in 6 dimensions
    assert out["loss"].item() == pytest.approx(
        (out["reconstruction"] + out["commitment"]).item(), abs=1e-6
    )
    assert 0 < float(out["usage"]) <= 1 and 1 <= float(out["perplexity"]) <= 8
    wide = vqkd.Training(vqkd.Config(**SMALL), spec(), Frozen(Teacher(256)))
    out = wide(dict(view=images(8)), progress(batch=8))
    assert out["reconstruction"].item() == pytest.approx(1, abs=0.1)


def test_reconstruction_is_the_mean_of_one_minus_cosine():
    model = clustered()
    x = images(4)
    out = model(dict(view=x), progress())
    u = model.target.encode(x)
    o, t = (
        model.decode(model.target.codebook.vectors[model.target.codebook.assign(u)]),
        model.upstream(x, "patch")["patch"],
    )
    cosine = (o * t).sum(-1) / (o.norm(dim=-1) * t.norm(dim=-1))
    assert out["reconstruction"].item() == pytest.approx(float((1 - cosine).mean()), abs=1e-5)
    u = u.flatten(0, 1)
    assert float(out["commitment"]) == pytest.approx(
        float((2 - 2 * (u @ model.target.codebook.vectors.T).amax(1)).mean() / 4), abs=1e-6
    )


def test_the_loss_uses_the_codes_from_before_the_update():
    model = clustered()
    codes = model.target.codebook.vectors.clone()  # k-means has run, the moving average has not
    torch.testing.assert_close(
        codes, quantize.kmeans(model.target.encode(images()).detach().flatten(0, 1), 8, seed=0)
    )
    model(dict(view=images()), progress())
    assert torch.equal(codes, model.target.codebook.vectors)
    model.after_step(progress())
    assert not torch.equal(codes, model.target.codebook.vectors)
    model.after_step(progress(1))  # nothing new was counted
    moved = model.target.codebook.vectors.clone()
    model.after_step(progress(2))
    assert torch.equal(moved, model.target.codebook.vectors)


def test_learns_and_leaves_its_teacher_alone():
    model = training(lr=0.01)
    teacher = {k: v.clone() for k, v in model.upstream.open.state_dict().items()}
    assert not any("upstream" in name for name in model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(40):
        optimiser.zero_grad()
        colours = images(16, seed=step % 4)[:, :, :4, :4]  # one per patch
        out = model(dict(view=F.interpolate(colours, size=16)), progress(step))
        out["loss"].backward()
        optimiser.step()
        model.after_step(progress(step))
        losses.append(out["reconstruction"].item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    for name, value in model.upstream.open.state_dict().items():
        assert torch.equal(value, teacher[name])
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for name, p in model.named_parameters()
        if not name.endswith("qkv.bias")
    )
    assert float(model.target.reconstruction) == pytest.approx(1 - sum(losses) / 40, abs=1e-4)


def test_resume_in_the_middle_of_waiting_is_bit_equal(tmp_path):
    def run(model, optimiser, steps):
        for step in steps:
            optimiser.zero_grad()
            model(dict(view=images(2, seed=step)), progress(step, batch=2))["loss"].backward()
            optimiser.step()
            model.after_step(progress(step))
        return model.state_dict()

    whole = training(vectors_per_code=12)  # 96 vectors: three batches of 32
    expected = run(whole, torch.optim.AdamW(whole.parameters(), lr=1e-2), range(6))
    for stop in (1, 2, 4):
        first = training(vectors_per_code=12)
        optimiser = torch.optim.AdamW(first.parameters(), lr=1e-2)
        run(first, optimiser, range(stop))
        torch.save([first.state_dict(), optimiser.state_dict()], tmp_path / "c.pt")
        second = training(vectors_per_code=12, seed=9)
        second.upstream = first.upstream
        other = torch.optim.AdamW(second.parameters(), lr=1e-2)
        states = torch.load(tmp_path / "c.pt", weights_only=True)
        second.load_state_dict(states[0])
        other.load_state_dict(states[1])
        for name, value in run(second, other, range(stop, 6)).items():
            assert torch.equal(value, expected[name]), name


def test_normalised_images_are_refused():
    target = vqkd.Target(vqkd.Config(**SMALL), spec())
    assert ids_of(target, images()).shape == (4, 16)
    for bad in (spec().normalise(images()), images() * 255, images() * 2 - 1):
        with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
            target(bad, "ids")


def test_encoder_sees_minus_one_to_one(monkeypatch):
    target, seen = vqkd.Target(vqkd.Config(**SMALL), spec()), []
    monkeypatch.setattr(
        vqkd.encoders,
        "features",
        lambda encoder, x: seen.append(x) or {"patch": torch.zeros(4, 16, 16)},
    )
    x = images()
    target(x, "ids")
    torch.testing.assert_close(seen[0], 2 * x - 1)


def test_tokenizer_ignores_train_mode():
    target = vqkd.Target(vqkd.Config(**SMALL), spec(args={"proj_drop_rate": 0.5})).train()
    assert not target.training and not target.encoder.training
    assert torch.equal(ids_of(target, images()), ids_of(target, images()))


def test_published_sizes():
    """108,829,216 trainable with decoder 3, 94,655,008 with 1; encoder 85,789,440.

    timm adds as many key biases as its width in each block.
    """
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    base = tiny.spec(224, **sizes)
    teacher = Frozen(Teacher(512))
    with torch.device("meta"):
        for depth, expected in ((3, 108_829_216), (1, 94_655_008)):
            model = vqkd.Training(
                vqkd.Config(codes=8192, code_dim=32, decoder_depth=depth), base, teacher
            )
            assert sum(p.numel() for p in model.parameters()) == expected + (12 + depth) * 768
    count = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in model.target.named_children()
    }
    assert count["encoder"] == 85_789_440 + 12 * 768 and count["head"] == 615_200
    assert model.target.codebook.vectors.numel() == 262_144


def test_initialisation():
    torch.manual_seed(0)
    vit = vqkd.Target(vqkd.Config(code_dim=8), spec(embed_dim=64, depth=4)).encoder
    for number, block in enumerate(vit.blocks, start=1):
        scale = math.sqrt(2 * number)
        for layer, factor in (
            (block.attn.proj, scale),
            (block.mlp.fc2, scale),
            (block.mlp.fc1, 1),
            (block.attn.qkv, 1),
        ):
            assert float(layer.weight.std()) * factor == pytest.approx(0.02, rel=0.06)
            assert not layer.bias.any()
    assert float(vit.pos_embed.std()) == pytest.approx(0.02, rel=0.15)
    assert float(vit.patch_embed.proj.weight.std()) == pytest.approx(
        1 / math.sqrt(3 * 48), rel=0.1
    )  # torch's default


def test_no_decay_names_exist():
    model = training()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "change, key",
    [
        (dict(codes=1), "codes"),
        (dict(decoder_depth=0), "decoder_depth"),
        (dict(encoder_depth=0), "encoder_depth"),
        (dict(decay=1.0), "decay"),
        (dict(crop_min=0.0), "crop_min"),
        (dict(min_usage=2.0), "min_usage"),
    ],
)
def test_bad_config_names_the_key(change, key):
    with pytest.raises(ValueError, match=f"^{key}: found"):
        vqkd.Config(**change)


def test_upstream_must_give_features():
    assert {"patch"} == vqkd.UPSTREAM
    codes = Frozen(vqkd.Target(vqkd.Config(**SMALL), spec()))
    with pytest.raises(ValueError, match="^target: found ids, logits, expected patch"):
        codes(images(), *vqkd.UPSTREAM)


def test_logits_are_the_cosines_with_all_codes():
    """As mc-BEiT reads the tokenizer; their largest is the code that is assigned."""
    target, x = clustered().target, images()
    found = target(x, "ids", "logits")
    assert found["logits"].shape == (4, 16, 8) and float(found["logits"].detach().abs().max()) <= 1
    cosines = F.cosine_similarity(
        target.encode(x)[:, :, None], target.codebook.vectors[None, None], dim=-1
    )
    torch.testing.assert_close(found["logits"], cosines)
    assert torch.equal(found["logits"].argmax(-1), found["ids"])


# --- health ---------------------------------------------------------------------------------------


def test_health_counts_codes_and_cries_on_collapse():
    config = vqkd.Config(**SMALL)
    target = vqkd.Target(config, spec())
    alive = vqkd.health(
        target,
        iter([images(8), images(8, seed=1)]),
        vqkd.Config(**SMALL, min_usage=0.0, min_perplexity=0.0),
    )
    counts = sum(
        torch.bincount(ids_of(target, images(8, seed=s)).flatten(), minlength=8) for s in (0, 1)
    )
    assert (
        alive["counts"] == counts.tolist()
        and alive["tokens"] == 2 * 8 * 16
        and alive["problems"] == []
    )
    assert alive["usage"] == float((counts > 0).float().mean())
    p = counts.double() / counts.sum()
    assert alive["perplexity"] == pytest.approx(
        float(torch.exp(-(p[p > 0] * p[p > 0].log()).sum()))
    )
    target.codebook.vectors.copy_(
        units(1, 4).expand(8, 4)
    )  # all codes equal: the first takes everything
    dead = vqkd.health(target, iter([images(8)]), config)
    assert dead["usage"] == 1 / 8 and dead["perplexity"] == 1
    assert (
        len(dead["problems"]) == 1
        and "min_usage" in dead["problems"][0]
        and "decoder_depth" in dead["problems"][0]
    )
    few = vqkd.health(
        target, iter([images(8)]), vqkd.Config(**SMALL, min_usage=0.0, min_perplexity=0.5)
    )
    assert "perplexity 1.0 of 8" in few["problems"][0]


def test_pictures_show_patches_of_the_most_used_code():
    target = vqkd.Target(vqkd.Config(**SMALL), spec())
    x = images(4)
    shown = vqkd.pictures(target, x)
    assert set(shown) == {"code_map", "codebook"}
    assert all(p.dtype.name == "uint8" and p.ndim == 3 and p.shape[2] == 3 for p in shown.values())
    ids = ids_of(target, x)
    code = int(torch.bincount(ids.flatten()).argmax())
    cosine = (
        (target.encode(x) @ target.codebook.vectors[code]).masked_fill(ids != code, -2).flatten()
    )
    image, place = divmod(int(cosine.argmax()), 16)
    row, column = divmod(place, 4)
    patch = x[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    found = torch.from_numpy(shown["codebook"][0:32:8, 0:32:8]).permute(2, 0, 1) / 255
    torch.testing.assert_close(found.float(), patch, atol=0.01, rtol=0)


# --- kit/parts/health.py against closed forms -----------------------------------------------------


def test_perplexity_and_usage():
    assert float(measure.perplexity(torch.ones(7))) == pytest.approx(7)
    assert float(measure.perplexity(torch.tensor([5, 0, 0]))) == 1
    assert float(measure.perplexity(torch.zeros(3))) == 1
    assert float(measure.perplexity(torch.tensor([1, 1, 2]))) == pytest.approx(2**1.5)
    assert measure.usage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert (
        measure.usage(torch.tensor([1, 1, 0, 0, 0])) == 1
    )  # two tokens cannot hit more than two codes
    assert measure.usage(torch.zeros(4)) == 0


def test_effective_rank():
    q = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert measure.effective_rank(q, centre=False) == pytest.approx(6)  # six equal singular values
    scaled = q * torch.tensor([3.0, 1, 0, 0, 0, 0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert measure.effective_rank(scaled, centre=False) == pytest.approx(
        math.exp(entropy), rel=1e-4
    )
    assert measure.effective_rank(torch.ones(10, 4)) == 1
    line = torch.ones(10, 4) + torch.outer(torch.arange(10.0), torch.rand(4))
    assert measure.effective_rank(line) == pytest.approx(1, abs=1e-3)


def test_spread():
    assert measure.spread(torch.ones(9, 3)) == 0
    assert measure.spread(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(1)
    assert measure.spread(torch.eye(2)) == pytest.approx(math.sqrt(0.5))


def test_information():
    entropy, mutual = measure.information(torch.eye(8))  # one class each: sure, and all different
    assert entropy == 0 and mutual == pytest.approx(math.log(8))
    entropy, mutual = measure.information(torch.full((5, 8), 1 / 8))
    assert entropy == pytest.approx(math.log(8)) and mutual == pytest.approx(0, abs=1e-9)
    assert measure.information(torch.eye(8)[:1].expand(5, 8)) == (0, 0)


def test_sample_rows_takes_evenly_spread_patches_up_to_a_limit():
    batches = [torch.arange(2 * 9.0).view(2, 9, 1) + 100 * i for i in range(4)]
    rows = measure.sample_rows(iter(batches), per_image=3, rows=7)
    assert rows.flatten().tolist() == [0, 4, 8, 9, 13, 17, 100]
    with pytest.raises(ValueError, match="no images"):
        measure.sample_rows(iter([]))


def test_principal_colours_follow_the_largest_component():
    level = torch.linspace(-1, 1, 16)
    features = torch.zeros(1, 16, 5)
    features[0, :, 2] = level
    shown = principal_colours(features)
    assert shown.shape == (1, 3, 4, 4) and 0 <= float(shown.min()) <= float(shown.max()) <= 1
    assert abs(float(torch.corrcoef(torch.stack([shown[0, 0].flatten(), level]))[0, 1])) > 0.99
