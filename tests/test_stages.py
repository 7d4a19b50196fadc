"""The stages target and pretrain in-process, around stand-in plug-ins: what they write, refuse."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from stages import data as data_stage
from stages import pretrain, target, targets
from stages.kit.data.views import View
from stages.kit.job.job import Run
from stages.kit.nets import encoders
from stages.kit.nets.target import EncoderTarget, Frozen
from stages.kit.parts import tokens
from stages.kit.spec import Spec
from tests import tiny
from tests.conftest import tiny_content, write_params
from workflow import checks, plugins
from workflow.files import JobError
from workflow.manifest import Manifest

MODEL = {"kind": "vit", "config": dataclasses.asdict(tiny.model(embed_dim=16))}
TRAIN = {"epochs": 1, "batch_size": 16, "micro_batch": None, "precision": "fp32", "save_minutes": 5}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A tiny data set, as the data stage leaves it."""
    folder = tmp_path_factory.mktemp("images")
    params = write_params(folder, tiny_content())
    assert data_stage.main(["--params", str(params), "--results", str(folder / "results")]) == 0
    return folder / "results" / "data" / "main"


@dataclass(frozen=True)
class Config(checks.Optimiser):
    codes: int = 7
    sides: tuple[int, ...] = (1, 2)
    health: str = "good"
    lr: float = 0.01


class Target(targets.Target):
    def __init__(self, config, spec):
        super().__init__()
        self.spec, self.sizes = spec, {"ids": config.codes}
        self.book = nn.Parameter(torch.rand(config.codes))
        self.register_buffer("alias", self.book.data)  # shares its memory

    def prepare(self):
        self.book.data.fill_(0.5)

    def look(self, images, wanted, norm, layers):
        grey = images.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))
        return {"ids": (grey * self.sizes["ids"]).long().flatten(1)}


class Training(nn.Module):
    def __init__(self, config, spec, upstream):
        super().__init__()
        self.target, self.upstream = Target(config, spec), upstream

    def forward(self, batch, progress):
        return {"loss": (self.target.book - 2 * batch["view"].mean()).square().mean()}


def health(target, images, config):
    codes = target.sizes["ids"]
    ids = (target(batch, "ids")["ids"] for batch in images)
    counts = sum(torch.bincount(each.flatten(), minlength=codes) for each in ids)
    problems = [] if config.health == "good" else ["every image has the same code: use a lower lr"]
    return {"images": int(counts.sum()) // 16, "counts": counts.tolist(), "problems": problems}


def views(config, spec):
    return {"view": View(size=spec.image_size, scale=(0.5, 1.0), flip=0.5)}


KIND = {
    "Config": Config,
    "Target": Target,
    "health": health,
    "views": views,
    "PRODUCES": {"ids"},
    "LABELS": False,
}


def plug_in(monkeypatch, kind, **parts) -> None:
    """Makes a plug-in `toy` of this kind from these parts, which the finder knows."""
    toy, found = SimpleNamespace(**parts), plugins.module
    monkeypatch.setattr(
        plugins, "module", lambda *asked: toy if asked == (kind, "toy") else found(*asked)
    )


def make_run(folder: Path, images: Path, id: str, params: dict, **inputs: Path) -> Run:
    """A job's Run. inputs: {role: folder} beside the data."""
    inputs = {"data": images, **inputs}
    stage, name = id.split("/")
    params = {"image_size": 16, "model": MODEL, "train": TRAIN, "seed": 0, **params}
    job = SimpleNamespace(
        id=id, stage=stage, name=name, inputs={role: role for role in inputs}, params=params
    )
    jobs = {
        role: SimpleNamespace(id=role, output=path, fingerprint="f")
        for role, path in inputs.items()
    }
    made = Manifest(fingerprint="f")
    plan = SimpleNamespace(jobs=jobs, params_file="params.yaml", manifest=lambda id: made)
    compute = {"device": "cpu", "workers": 0, "threads": 1, "tracking": False, "compile": False}
    run = Run(job, plan, folder / "out", folder / "work", compute)
    for each in (run.out, run.work):
        each.mkdir(parents=True)
    return run


def target_run(folder, images, upstream: Path | None = None, **config) -> Run:
    params = {"name": "toy", "kind": "toy", "config": {"sides": [3, 4], **config}}
    inputs = {} if upstream is None else {"upstream": upstream}
    return make_run(folder, images, "target/toy", {"target": params}, **inputs)


def test_a_target_without_training_is_prepared_saved_and_read_back_alone(
    monkeypatch, tmp_path, images
):
    shown = lambda target, images: {"map": np.full((4, 5, 3), len(images), np.uint8)}  # noqa: E731
    plug_in(monkeypatch, "target", **KIND, pictures=shown)
    run = target_run(tmp_path, images, codes=9)
    target.make(run)
    names = {"target.json", "target.safetensors", "health.json", "pictures"}
    assert {path.name for path in run.out.iterdir()} == names
    described = json.loads((run.out / "target.json").read_text())
    assert described["kind"] == "toy" and described["config"]["sides"] == [3, 4]
    assert described["labels"] is False and described["sizes"] == {"ids": 9} == run.summary["sizes"]
    looked = json.loads((run.out / "health.json").read_text())
    assert looked["images"] == 16 == run.summary["images"]
    assert np.array(Image.open(run.out / "pictures" / "map.png")).shape == (4, 5, 3)
    before = torch.get_rng_state()
    loaded = targets.load(run.out)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.sizes == {"ids": 9} and torch.equal(loaded.book, torch.full((9,), 0.5))
    assert not loaded.training and not loaded.book.requires_grad


def test_a_target_with_training_is_trained_and_gets_its_upstream(monkeypatch, tmp_path, images):
    given = []

    class Recorded(Training):
        def __init__(self, config, spec, upstream):
            given.append(upstream)
            super().__init__(config, spec, upstream)

    plug_in(monkeypatch, "target", **KIND, Training=Recorded)
    first = target_run(tmp_path / "first", images)
    target.make(first)
    second = target_run(tmp_path / "second", images, upstream=first.out)
    target.make(second)
    assert given[0] is None and isinstance(given[1], Frozen)
    book = given[1].open.book
    assert torch.equal(book, targets.load(first.out).book) and not book.requires_grad
    steps = len((first.out / "history.jsonl").read_text().splitlines())
    assert steps == first.summary["steps"] == 3
    assert torch.equal(targets.load(first.out).book, targets.load(second.out).book)  # the same seed


def test_a_runs_encoder_may_be_the_upstream(monkeypatch, tmp_path, images):
    given = []

    class Recorded(Training):
        def __init__(self, config, spec, upstream):
            given.append(upstream)
            super().__init__(config, spec, upstream)

    plug_in(monkeypatch, "target", **KIND, Training=Recorded)
    spec = tiny.spec(embed_dim=16)
    encoders.save(encoders.create(spec, "timm"), tmp_path / "run" / "encoder", spec)
    target.make(target_run(tmp_path / "toy", images, upstream=tmp_path / "run"))
    assert isinstance(given[0].open, EncoderTarget)
    assert given[0].sizes["patch"] == 16


def test_a_collapsed_target_fails_with_its_advice_and_numbers(monkeypatch, tmp_path, images):
    plug_in(monkeypatch, "target", **KIND)
    run = target_run(tmp_path, images, health="bad")
    with pytest.raises(JobError) as error:
        target.make(run)
    message = str(error.value)
    assert "every image has the same code: use a lower lr" in message and "images 16" in message
    assert "targets.toy in params.yaml" in message and str(run.out) in message
    assert json.loads((run.out / "health.json").read_text())["problems"]


def test_codes_that_are_no_better_than_chance_fail_unless_the_gate_is_open(
    monkeypatch, tmp_path, images
):
    """The toy's codes, but of the place in the grid alone."""
    monkeypatch.setattr(tokens, "LEAST", 8)

    class Placed(Target):
        def look(self, images, wanted, norm, layers):
            return {"ids": (torch.arange(16) % self.sizes["ids"]).expand(len(images), -1)}

    @dataclass(frozen=True)
    class Gated(Config):
        gate: bool = True

    plug_in(monkeypatch, "target", **KIND | {"Target": Placed, "Config": Gated})
    closed = target_run(tmp_path / "closed", images)
    with pytest.raises(JobError, match="agree no better than by chance(.|\n)*gate: false"):
        target.make(closed)
    opened = target_run(tmp_path / "open", images, gate=False)
    target.make(opened)
    health = json.loads((opened.out / "health.json").read_text())
    assert health["problems"] == [] and "no better than by chance" in health["notes"][0]
    assert health["tokens"]["agreement"] == opened.summary["agreement"] < 0.5


def test_parts_need_not_tell_the_classes(monkeypatch, tmp_path, images):
    """A student that predicts codes gains little from poor ones; one that hides parts does not
    predict them.
    """
    said = "A student that predicts these codes can gain little"
    monkeypatch.setattr(tokens, "examine", lambda *given: tokens.Found(notes=[said]))

    @dataclass(frozen=True)
    class Parted(Config, checks.Parts):
        pass

    for name, config, notes in (("codes", Config, [said]), ("parts", Parted, [])):
        plug_in(monkeypatch, "target", **KIND | {"Config": config})
        run = target_run(tmp_path / name, images)
        target.make(run)
        assert json.loads((run.out / "health.json").read_text())["notes"] == notes


def test_load_names_what_is_wrong(monkeypatch, tmp_path, images):
    plug_in(monkeypatch, "target", **KIND)
    with pytest.raises(FileNotFoundError, match=r"there is no target\.json"):
        targets.load(tmp_path)
    run = target_run(tmp_path, images)
    target.make(run)
    weights = run.out / "target.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"target\.safetensors: does not fit"):
        targets.load(run.out)
    with pytest.raises(ValueError, match="did you mean 'mae'"):
        plugins.module("method", "maee")


def test_pretrain_hands_over_target_and_pictures_and_skips_what_does_not_train(
    monkeypatch, tmp_path, images
):
    seen = {}

    @dataclass(frozen=True)
    class Bare:
        pass

    class Method(nn.Module):
        def __init__(self, config, spec, target):
            super().__init__()
            seen.update(target=target, drawn=torch.rand(1).item(), spec=spec)
            self.encoder = timm.create_model(
                "vit_tiny_patch16_224",
                img_size=16,
                patch_size=4,
                embed_dim=16,
                depth=2,
                num_heads=2,
                num_classes=0,
            )

        def pictures(self, batch):
            seen.update(training=self.training, batch=batch)
            return {"one": np.zeros((3, 3, 3), np.uint8)}

    plug_in(monkeypatch, "target", **KIND)
    bare = {"Config": Bare, "Method": Method, "TRAINS": False, "LABELS": False}
    plug_in(monkeypatch, "method", **bare)
    teacher = target_run(tmp_path / "teacher", images)
    target.make(teacher)
    method = {"name": "toy", "kind": "toy", "config": {}, "labels": False, "trains": False}
    draws = []
    for name in ("a", "b"):
        params = {"method": method, "run": "toy"}
        run = make_run(tmp_path / name, images, "pretrain/toy-s0", params, target=teacher.out)
        pretrain.pretrain(run)
        draws.append(seen["drawn"])
    assert draws[0] == draws[1]  # initialisation depends on the seed alone
    assert isinstance(seen["target"], Frozen) and isinstance(seen["target"].open, Target)
    assert isinstance(seen["spec"], Spec)
    assert seen["batch"]["view"].shape == (8, 3, 16, 16) and not seen["training"]
    assert seen["batch"]["view"].min() >= 0 and seen["batch"]["view"].max() <= 1
    exported = timm.create_model(f"local-dir:{run.out / 'encoder'}", pretrained=True)
    assert run.summary == {"parameters": sum(p.numel() for p in exported.parameters())}
    assert {path.name for path in run.out.iterdir()} == {"encoder", "pictures"}
