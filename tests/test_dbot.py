"""Facts of dBOT (arXiv 2209.03917 and its official code), against independent calculations."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from stages import data as data_stage
from stages import pretrain
from stages.kit.nets import encoders
from stages.kit.nets.masks import random_masking
from stages.kit.nets.target import EncoderTarget, Frozen
from stages.kit.spec import configure
from stages.kit.train.loop import Recipe
from stages.methods import random as untrained
from stages.methods.dbot import Config, Method, views
from tests import tiny
from tests.conftest import tiny_content, write_params
from workflow.params import read
from workflow.plan import load

SMALL = Config(decoder_dim=16, decoder_depth=1, decoder_heads=2)


def spec(size=16, **model):
    return tiny.spec(size, **{"embed_dim": 16, "mlp_ratio": 4.0, **model})


def progress(rows=6, step=0, seed=0):
    return tiny.progress(rows, step, seed=seed)


def batch(rows=6, size=16):
    return {"view": tiny.images(rows, size, seed=1)}


def teacher(spec, depth=None, seed=3) -> Frozen:
    torch.manual_seed(seed)
    return Frozen(
        EncoderTarget(untrained.Method(untrained.Config(depth=depth), spec).encoder, spec)
    )


def build(config=SMALL, shape=None, target=None, seed=0):
    shape = shape or spec()
    target = target or teacher(shape)
    torch.manual_seed(seed)
    return Method(config, shape, target)


def tokens(it: Frozen, images: torch.Tensor, norm: bool = False) -> torch.Tensor:
    """A teacher's class token and patches (B,1+N,D)."""
    found = it(images, "cls", "patch", norm=norm)
    return torch.cat([found["cls"][:, None], found["patch"]], dim=1)


def watched(method, monkeypatch) -> dict:
    """{"predicted": what the method has predicted}, once it has run."""
    seen, predict = {}, method.predict
    monkeypatch.setattr(
        method, "predict", lambda *args: seen.setdefault("predicted", predict(*args))
    )
    return seen


def masking(rows=6):
    return random_masking(progress(rows).uniform("mask", 16), 4)


def digest(module: nn.Module) -> str:
    state = module.state_dict()
    return hashlib.sha256(
        b"".join(state[k].contiguous().numpy().tobytes() for k in sorted(state))
    ).hexdigest()


def test_sequence_lengths_and_shapes_at_full_size(monkeypatch):
    """224 px, patch 16, ratio 0.75: the encoder sees 1 + 49 tokens, 1 + 196 are predicted."""
    method = build(shape=spec(224, patch_size=16, depth=1))
    seen = watched(method, monkeypatch)
    method.encoder.blocks[0].register_forward_hook(
        lambda m, args, out: seen.update(encoder=out.shape[1])
    )
    with torch.no_grad():
        method(batch(2, 224), progress(2))
    assert seen["encoder"] == 50
    assert seen["predicted"].shape == (2, 197, 16)


def test_loss_is_over_the_class_token_and_the_hidden_patches(monkeypatch):
    method = build()
    seen = watched(method, monkeypatch)
    loss = method(batch(), progress())["loss"]
    (gradient,) = torch.autograd.grad(loss, seen["predicted"])
    mask = masking()[2].bool()
    assert (gradient[:, 1:][~mask] == 0).all()
    assert (gradient[:, 1:][mask] != 0).any(dim=-1).all()
    assert (gradient[:, 0] != 0).any(dim=-1).all()
    change = {}
    for name, place in (
        ("visible", F.pad(~mask, (1, 0))),
        ("cls", F.pad(mask & False, (1, 0), value=True)),
    ):
        other = seen["predicted"].detach() + 5.0 * place[..., None]
        monkeypatch.setattr(method, "predict", lambda *args, other=other: other)
        change[name] = (method(batch(), progress())["loss"] - loss).abs().item()
    assert change["visible"] == 0
    assert change["cls"] > 0.1


@pytest.mark.parametrize("norm_target", [True, False])
def test_loss_is_the_formula(norm_target, monkeypatch):
    """In float64 with numpy: smooth L1 of beta 2, a mean over 1 + 12 tokens of a sample."""
    method = build(dataclasses.replace(SMALL, norm_target=norm_target))
    predicted = 2 * torch.randn(6, 17, 16, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(method, "predict", lambda *args: predicted)
    raw = tokens(method.teacher, batch()["view"]).double().numpy()
    chosen = np.concatenate([np.ones((6, 1)), masking()[2].numpy()], axis=1)
    total = count = 0.0
    for b in range(6):
        for n in range(17):
            t = raw[b, n]
            if norm_target:
                t = (t - t.mean()) / math.sqrt(t.var(ddof=1) + 1e-6)
            u = np.abs(predicted[b, n].double().numpy() - t)
            total += chosen[b, n] * np.where(u < 2, u * u / 4, u - 1).mean()
            count += chosen[b, n]
    assert count == 6 * 13
    assert method(batch(), progress())["loss"].item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("residual", "loss"), [(1.0, 0.25), (4.0, 3.0)])
def test_smooth_l1_at_two_residuals(residual, loss, monkeypatch):
    method = build()
    target = method.target(batch()["view"])
    monkeypatch.setattr(method, "predict", lambda *args: target + residual)
    assert method(batch(), progress())["loss"].item() == pytest.approx(loss, abs=1e-6)


def test_cosine_of_a_perfect_prediction_is_one(monkeypatch):
    method = build()
    monkeypatch.setattr(method, "predict", lambda *args: 3 * method.target(batch()["view"]))
    assert method(batch(), progress())["cosine"].item() == pytest.approx(1, abs=1e-5)


def test_targets_are_standardised_token_by_token():
    target = build(shape=spec(embed_dim=64)).target(batch()["view"]).double()
    assert target.shape == (6, 17, 64)
    assert target.mean(dim=-1).abs().max() < 1e-5
    assert (target.var(dim=-1, correction=1) - 1).abs().max() < 1e-3


def test_target_is_from_before_the_teachers_norm_unless_asked_for():
    it = teacher(spec())
    norm = it.open.norm
    nn.init.normal_(norm.weight, 1, 0.5)
    raw = build(dataclasses.replace(SMALL, norm_target=False), target=it).target(batch()["view"])
    normed = build(
        dataclasses.replace(SMALL, norm_target=False, teacher_norm=True), target=it
    ).target(batch()["view"])
    assert torch.equal(raw, tokens(it, batch()["view"]))
    expected = F.layer_norm(raw, (16,), norm.weight, norm.bias, norm.eps)
    assert torch.allclose(normed, expected, atol=1e-5)
    assert not torch.allclose(raw, normed, atol=0.1)


def test_teacher_sees_whole_images_whatever_the_mask_and_gets_no_gradient(monkeypatch):
    method, seen = build(), []
    target = method.target
    monkeypatch.setattr(method, "target", lambda images: seen.append(target(images)) or seen[-1])
    losses = [method(batch(), progress(step=step))["loss"] for step in (0, 1)]
    assert losses[0].item() != losses[1].item()  # two masks
    assert torch.equal(*seen)
    sum(losses).backward()
    assert not any(t.requires_grad for t in seen)
    assert all(p.grad is None for p in method.teacher.open.parameters())
    assert not {id(p) for p in method.parameters()} & {
        id(p) for p in method.teacher.open.parameters()
    }
    images = batch()["view"]
    painted = images.clone()
    painted[:, :, :4, :4] = 0.5  # any patch reaches every token of the target
    moved = (target(images) - target(painted)).abs().amax(dim=-1)
    assert (moved > 0).all()


def test_teacher_does_not_change_while_the_student_trains():
    method = build(dataclasses.replace(SMALL, drop_path=0.5)).train()
    before, student = digest(method.teacher.open), digest(method.encoder)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        optimiser.zero_grad()
        method(batch(), progress(step=step))["loss"].backward()
        optimiser.step()
    assert digest(method.teacher.open) == before
    assert digest(method.encoder) != student


def test_an_untrained_teacher_is_the_students_own_starting_point():
    """As in the official code. Of fewer blocks it still shares patch projection, class token and
    positions.
    """
    whole, shallow = teacher(spec(), seed=0), teacher(spec(), depth=0, seed=0)
    method = build(target=whole, seed=0)
    student = copy.deepcopy(method.encoder)
    student.norm = nn.Identity()
    assert digest(whole.open.encoder) == digest(student)
    assert len(shallow.open.encoder.blocks) == 0
    for name, value in shallow.open.encoder.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
    assert digest(teacher(spec(), seed=1).open.encoder) != digest(student)


def test_a_teacher_without_blocks_gives_targets_of_single_patches():
    method = build(target=teacher(spec(), depth=0))
    images = batch()["view"]
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 1 - changed[:, :, 4:8, 8:12]  # patch 6 of the 4x4 grid
    moved = (method.target(images) - method.target(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [1 + 6]
    assert torch.isfinite(method(batch(), progress())["loss"])


def test_a_target_without_class_token_is_learnt_at_the_hidden_patches(monkeypatch):
    """Such as a convolutional network's features."""
    method = build(target=tiny.target(spec(), "patch", width=5))
    seen = watched(method, monkeypatch)
    (gradient,) = torch.autograd.grad(method(batch(), progress())["loss"], seen["predicted"])
    assert seen["predicted"].shape == (6, 16, 5)
    assert torch.equal((gradient != 0).any(dim=-1), masking()[2].bool())


def test_a_target_with_class_token_is_learnt_there_too(monkeypatch):
    """Whatever target it is: a target `dino`, a run's encoder."""
    dino = tiny.module("dino", "target")
    config = dino.Config(prototypes=8, hidden=8, bottleneck=4)
    for target in (tiny.target(spec(), "patch", "cls"), Frozen(dino.Target(config, spec()))):
        method = build(target=target)
        wanted = method.target(batch()["view"])
        assert wanted.shape == (6, 17, target.sizes["patch"])
        monkeypatch.setattr(method, "predict", lambda *args, wanted=wanted: wanted.clone())
        assert method(batch(), progress())["loss"] == 0
        method.predict = lambda *args, wanted=wanted: F.pad(wanted[:, 1:], (0, 0, 1, 0))
        assert method(batch(), progress())["loss"] > 0


def test_a_student_without_class_token_learns_the_patches_of_any_teacher():
    plain = spec(args={"class_token": False, "global_pool": "avg"})
    method = build(shape=plain, target=teacher(spec()))
    assert method.target(batch()["view"]).shape == (6, 16, 16)
    assert torch.isfinite(method(batch(), progress())["loss"])


@pytest.mark.parametrize(
    ("width", "depth", "heads", "encoder", "decoder"), [(768, 12, 12, 85.80, 26.11)]
)
def test_published_parameter_counts(width, depth, heads, encoder, decoder):
    sizes = {"patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads}
    published = Config(decoder_dim=512, decoder_depth=8, decoder_heads=16)
    target = SimpleNamespace(sizes={"patch": width, "cls": width})
    with torch.device("meta"):
        method = Method(published, spec(224, **sizes), target)
    count = {True: 0, False: 0}
    for name, parameter in method.named_parameters():
        count[name.startswith("encoder.")] += parameter.numel()
    count[False] += method.decoder.pos.numel()  # fixed, but counted in these figures
    assert count[True] / 1e6 == pytest.approx(encoder, abs=0.05)
    assert count[False] / 1e6 == pytest.approx(decoder, abs=0.05)
    assert sum(count.values()) / 1e6 == pytest.approx(111.9, abs=0.05)


def test_drop_path_rises_in_encoder_and_decoder():
    method = build(dataclasses.replace(SMALL, decoder_depth=3, drop_path=0.2), spec(depth=3))

    def rates(blocks):
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]

    assert rates(method.encoder.blocks) == pytest.approx([0, 0.1, 0.2])
    assert rates(method.decoder.blocks) == pytest.approx([0, 0.1, 0.2])
    assert not any(rates(method.teacher.open.encoder.blocks))


def test_view_is_the_papers():
    view = views(Config(crop_min=0.2), spec())["view"]
    assert (view.size, tuple(view.scale), view.flip) == (16, (0.2, 1.0), 0.5)
    assert not any(view.jitter)


def test_published_schedule_of_every_stage():
    """In each stage of 800 epochs the rate is blr x 4096 / 256 after 40, near 0 at its ends."""
    runs = read(Path(__file__).parents[1] / "presets/imagenet.yaml").runs
    per_epoch = 1_268_000 // 4096
    for name in ("dbot-1", "dbot-2"):
        settings = runs[name].settings
        recipe = Recipe.of(configure(Config, settings.config), settings.train, per_epoch)
        assert recipe.steps == 800 * per_epoch
        assert recipe.lr_at(40 * per_epoch) == pytest.approx(1.5e-4 * 4096 / 256)
        assert recipe.lr_at(0) == 0
        assert recipe.lr_at(recipe.steps - 1) < 1e-8
        assert (recipe.betas, recipe.weight_decay, recipe.clip) == ((0.9, 0.95), 0.05, 3.0)
    assert "dbot-3" not in runs
    assert runs["dbot-1"].teacher == "random"


# --- a chain, by its stages -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(params file, results) of an untrained encoder and two stages, run by their commands; every
    step is saved.
    """
    folder = tmp_path_factory.mktemp("chain")
    content = tiny_content(train={"epochs": 2, "save_minutes": 1e-9}, tasks={"knn": {"k": [3]}})
    content["targets"], content["methods"] = {}, {"random": {}, "dbot": dataclasses.asdict(SMALL)}
    content["methods"]["dbot"]["betas"] = [0.9, 0.95]
    content["grid"]["runs"] = {
        "random": {"method": "random"},
        "dbot": {"method": "dbot", "target": "run:random", "stages": 2},
    }
    params, results = write_params(folder, content), folder / "results"
    assert data_stage.main(words(params, results)) == 0
    for run in ("random-s0", "dbot-1-s0", "dbot-2-s0"):
        assert pretrain.main(["--run", run, *words(params, results)]) == 0
    return params, results


def words(params, results) -> list[str]:
    return ["--params", str(params), "--results", str(results)]


def weights(results: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(results / "pretrain" / run / "encoder/model.safetensors")


def begun(chain, run: str, monkeypatch) -> SimpleNamespace:
    """The method and the recipe with which the stage of a run would begin, from the stage's own
    code.
    """
    params, results = chain
    found, plan = SimpleNamespace(), load(params, results)
    monkeypatch.setattr(
        pretrain,
        "fit",
        lambda method, batches, recipe, run, seed: vars(found).update(
            method=method, recipe=recipe, seed=seed, batch=batches.batch(0)
        ),
    )
    monkeypatch.setattr(encoders, "save", lambda *args: None)
    job = plan.job(f"pretrain/{run}")
    pretrain.pretrain(
        SimpleNamespace(
            job=job,
            device=torch.device("cpu"),
            compute={"workers": 0},
            summary={},
            out=params.parent / "unused",
            input=lambda role: plan.jobs[job.inputs[role]].output,
        )
    )
    return found


def test_a_stage_begins_with_the_old_student_as_teacher_and_a_new_student(chain, monkeypatch):
    _, results = chain
    first, second = (begun(chain, f"dbot-{n}-s0", monkeypatch) for n in (1, 2))
    old, now = weights(results, "dbot-1-s0"), second.method.teacher.open
    assert {k.removeprefix("norm.") for k in old} == {k.removeprefix("norm.") for k in kept(now)}
    assert all(torch.equal(value, kept(now)[key]) for key, value in old.items())
    student, start = second.method.state_dict(), first.method.state_dict()
    drawn = [k for k, v in start.items() if v.ndim > 1 and v.std() > 0 and "pos" not in k]
    assert {
        "decoder.mask_token",
        "decoder.pred.weight",
        "encoder.blocks.0.mlp.fc1.weight",
        "encoder.cls_token",
        "encoder.patch_embed.proj.weight",
    } <= set(drawn)
    assert not any(torch.equal(student[k], start[k]) for k in drawn), (
        "all re-drawn, the decoder too"
    )
    assert not any(
        torch.equal(student[f"encoder.{k}"], old[k]) for k in old if f"encoder.{k}" in drawn
    )
    bias = "encoder.patch_embed.proj.bias"  # stays in the official code
    assert not torch.equal(student[bias], start[bias])
    assert second.recipe.lr_at(0) == first.recipe.lr_at(0) == 0
    assert second.recipe == first.recipe
    assert not torch.equal(first.batch["index"], second.batch["index"]), "another order of images"


def kept(teacher: EncoderTarget) -> dict:
    """A teacher's weights under the names of the encoder that it was."""
    norm = {f"norm.{k}": v for k, v in teacher.norm.state_dict().items()}
    return teacher.encoder.state_dict() | norm


def test_the_first_stage_begins_as_its_untrained_teacher(chain, monkeypatch):
    _, results = chain
    first = begun(chain, "dbot-1-s0", monkeypatch).method
    start = {
        k.removeprefix("encoder."): v
        for k, v in first.state_dict().items()
        if k.startswith("encoder.")
    }
    assert all(torch.equal(start[k], v) for k, v in weights(results, "random-s0").items())
    assert all(torch.equal(kept(first.teacher.open)[k], v) for k, v in start.items())


def test_each_stage_trains_and_leaves_its_teacher_as_it_was(chain):
    params, results = chain
    plan = load(params, results)
    for n, above in ((1, "random"), (2, "dbot-1")):
        assert plan.fresh(f"pretrain/dbot-{n}-s0")
        inputs = plan.manifest(f"pretrain/dbot-{n}-s0").inputs
        made_from = {role: source["job"] for role, source in inputs.items()}
        assert made_from == {"data": "data/main", "target": f"pretrain/{above}-s0"}
        rows = [
            json.loads(line) for line in (results / f"pretrain/dbot-{n}-s0/history.jsonl").open()
        ]
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert (results / f"pretrain/dbot-{n}-s0/pictures/features.png").is_file()
    assert plan.fresh("pretrain/random-s0")


def test_killed_in_the_second_stage_it_goes_on_with_the_same_teacher(chain, tmp_path, monkeypatch):
    params, results = chain
    folder = tmp_path / "again"
    shutil.copytree(params.parent, folder)
    again, out = (folder / "params.yaml", folder / "results"), folder / "results/pretrain/dbot-2-s0"
    forward, steps = Method.forward, []

    def stopping(self, batch, progress):
        if progress.step == 3 and 3 not in steps:
            steps.append(3)
            raise RuntimeError("pulled the plug")
        steps.append(progress.step)
        return forward(self, batch, progress)

    monkeypatch.setattr(Method, "forward", stopping)
    with pytest.raises(RuntimeError, match="plug"):
        pretrain.main(["--run", "dbot-2-s0", *words(*again)])
    assert not (out / "manifest.json").exists()
    assert pretrain.main(["--run", "dbot-2-s0", *words(*again)]) == 0
    assert steps == [0, 1, 2, 3, 3, 4, 5], "it went on where it was"
    for name in ("history.jsonl", "encoder/model.safetensors"):
        assert (out / name).read_bytes() == (results / "pretrain/dbot-2-s0" / name).read_bytes(), (
            name
        )


def test_one_stage_of_a_finished_encoder_is_plain_feature_distillation(chain):
    """The loss of the method whose teacher was read from a folder, and the same by timm and torch
    alone.
    """
    import timm

    folder = chain[1] / "pretrain/dbot-2-s0/encoder"
    method = build(target=Frozen(EncoderTarget.load(folder, spec()))).eval()
    data = batch()
    loss = method(data, progress())["loss"]
    plain, seen = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), {}
    plain.norm.register_forward_hook(lambda module, args, out: seen.update(before=args[0]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec().mean, spec().std))
    images = (data["view"] - mean) / std
    ids_keep, ids_restore, mask = masking()
    with torch.no_grad():
        plain(images)
        target = F.layer_norm(seen["before"], (16,), eps=0) * math.sqrt(15 / 16)
        predicted = method.predict(data["view"], ids_keep, ids_restore)
        error = F.smooth_l1_loss(predicted, target, reduction="none", beta=2.0).mean(-1)
    chosen = torch.cat([torch.ones(6, 1), mask], dim=1).bool()
    assert loss.item() == pytest.approx(error[chosen].mean().item(), rel=1e-4)


def test_picture_of_a_perfect_prediction_is_the_target(monkeypatch):
    method, images = build(), batch(10)["view"]
    monkeypatch.setattr(method, "predict", lambda *args: method.target(images[:8]))
    sheet = method.pictures({"view": images})["features"].astype(int)
    column = 96 + 4
    assert sheet.shape == (8 * column - 4, 4 * column - 4, 3)
    wanted, found = (sheet[:, i * column : i * column + 96] for i in (2, 3))
    hidden = (found != 128).any(-1)
    assert abs(wanted - found)[hidden].max() <= 1
    assert hidden[:96].mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"beta": 0.0}, "beta"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "decoder_dim"),
        ({"decoder_depth": 0}, "decoder_depth"),
        ({"crop_min": 0.0}, "crop_min"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_bad_config(values, key):
    with pytest.raises(ValueError, match=f"^{key}"):
        Config(**values)


def test_config_and_model_must_fit():
    with pytest.raises(ValueError, match="^mask_ratio"):
        Config(mask_ratio=0.95).check(8, tiny.model())
    with pytest.raises(ValueError, match="embed_dim"):
        Config().check(16, tiny.model(embed_dim=18))
    with pytest.raises(ValueError, match="^depth: found 3, expected 0 to model.depth 2"):
        untrained.Config(depth=3).check(16, tiny.model())
