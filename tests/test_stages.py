"""The stages target and pretrain in-process, around stand-in plug-ins: what is written and refused."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stages import data as data_stage
from stages import methods, pretrain, target, targets
from stages.kit.job.job import Run
from stages.kit.spec import Spec
from workflow.files import JobError

MODEL = {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
         "mlp_ratio": 4.0, "args": {}}  # fmt: skip
TRAIN = {"epochs": 1, "batch_size": 16, "micro_batch": None, "precision": "fp32", "save_minutes": 5}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A tiny data set, as the data stage leaves it."""
    from conftest import tiny_content, write_params

    folder = tmp_path_factory.mktemp("images")
    params = write_params(folder, tiny_content())
    assert data_stage.main(["--params", str(params), "--results", str(folder / "results")]) == 0
    return folder / "results" / "data"


@dataclass(frozen=True)
class Config:
    codes: int = 7
    sizes: tuple[int, ...] = (1, 2)
    health: str = "good"
    lr: float = 0.01
    lr_per: int | None = None


class Target(nn.Module):
    def __init__(self, config, spec):
        super().__init__()
        self.codes, self.grid = config.codes, spec.grid
        self.book = nn.Parameter(torch.rand(config.codes))
        self.register_buffer("alias", self.book.data)  # shares its memory

    def prepare(self):
        self.book.data.fill_(0.5)

    def forward(self, images):
        return (
            (images.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)) * self.codes)
            .long()
            .flatten(1)
        )


class Training(nn.Module):
    def __init__(self, config, spec, upstream):
        super().__init__()
        self.target, self.upstream = Target(config, spec), [upstream]

    def forward(self, batch, progress):
        return {"loss": (self.target.book - 2 * batch["view"].mean()).square().mean()}


def health(target, images, config):
    counts = sum(
        torch.bincount(target(batch).flatten(), minlength=target.codes) for batch in images
    )
    problems = [] if config.health == "good" else ["every image has the same code: use a lower lr"]
    return {"images": int(counts.sum()) // 16, "counts": counts.tolist(), "problems": problems}


def plug_in(monkeypatch, package, name, **parts) -> None:
    """Makes `<package>.<name>` a module of these parts, which `find` of the package knows."""
    module = ModuleType(f"{package.__name__}.{name}")
    module.__dict__.update(parts)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = package.find
    monkeypatch.setattr(package, "find", lambda wanted: module if wanted == name else found(wanted))


def views(config, spec):
    from stages.kit.data.views import View

    return {"view": View(size=spec.image_size, scale=(0.5, 1.0), flip=0.5)}


KIND = {
    "Config": Config,
    "Target": Target,
    "health": health,
    "views": views,
    "PRODUCES": "ids",
    "LABELS": False,
}


def make_run(tmp_path, images, id, params, inputs=()) -> Run:
    inputs = {"data": images, **dict(inputs)}
    stage, name = id.split("/")
    params = {"image_size": 16, "model": MODEL, "train": TRAIN, "seed": 0, **params}
    job = SimpleNamespace(id=id, stage=stage, name=name, inputs=tuple(inputs), params=params)
    jobs = {
        name: SimpleNamespace(output=path, manifest=images / "data.json", fingerprint="f")
        for name, path in inputs.items()
    }
    plan = SimpleNamespace(
        jobs=jobs, params_file="params.yaml", manifest=lambda id: {"fingerprint": "f"}
    )
    run = Run(job, plan, tmp_path / "out", tmp_path / "work",
              {"device": "cpu", "workers": 0, "threads": 1, "tracking": False})  # fmt: skip
    for folder in (run.out, run.work):
        folder.mkdir(parents=True)
    return run


def target_run(tmp_path, images, **config) -> Run:
    params = {"name": "toy", "kind": "toy", "config": {"sizes": [3, 4], **config}}
    return make_run(tmp_path, images, "target/toy", {"target": params})


def test_a_target_without_training_is_prepared_saved_and_read_back_alone(
    monkeypatch, tmp_path, images
):
    shown = lambda target, images: {"map": np.full((4, 5, 3), len(images), np.uint8)}  # noqa: E731
    plug_in(monkeypatch, targets, "toy", **KIND, pictures=shown)
    run = target_run(tmp_path, images, codes=9)
    target.make(run)
    assert {path.name for path in run.out.iterdir()} == {
        "target.json",
        "target.safetensors",
        "health.json",
        "pictures",
    }
    described = json.loads((run.out / "target.json").read_text())
    assert (
        described["codes"] == 9
        and described["kind"] == "toy"
        and described["config"]["sizes"] == [3, 4]
    )
    assert described["labels"] is False and described["produces"] == "ids"
    assert (
        json.loads((run.out / "health.json").read_text())["images"] == 16 == run.summary["images"]
    )
    assert np.array(Image.open(run.out / "pictures" / "map.png")).shape == (4, 5, 3)
    before = torch.get_rng_state()
    loaded = targets.load(run.out)
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.codes == 9 and torch.equal(loaded.book, torch.full((9,), 0.5))
    assert not loaded.training and not loaded.book.requires_grad


def test_a_target_with_training_is_trained_and_gets_its_upstream(monkeypatch, tmp_path, images):
    given = []

    class Recorded(Training):
        def __init__(self, config, spec, upstream):
            given.append(upstream)
            super().__init__(config, spec, upstream)

    plug_in(monkeypatch, targets, "toy", **KIND, Training=Recorded)
    first = target_run(tmp_path / "first", images)
    target.make(first)
    second = target_run(tmp_path / "second", images)
    second.job.inputs += ("target/first",)
    second.plan.jobs["target/first"] = SimpleNamespace(output=first.out, fingerprint="f")
    target.make(second)
    assert given[0] is None and torch.equal(given[1].book, targets.load(first.out).book)
    assert not given[1].book.requires_grad
    assert (
        len((first.out / "history.jsonl").read_text().splitlines()) == first.summary["steps"] == 3
    )
    assert torch.equal(targets.load(first.out).book, targets.load(second.out).book)  # the same seed


def test_a_collapsed_target_fails_with_its_advice_and_numbers(monkeypatch, tmp_path, images):
    plug_in(monkeypatch, targets, "toy", **KIND)
    run = target_run(tmp_path, images, health="bad")
    with pytest.raises(JobError) as error:
        target.make(run)
    message = str(error.value)
    assert "every image has the same code: use a lower lr" in message and "images 16" in message
    assert "targets.toy in params.yaml" in message and str(run.out) in message
    assert json.loads((run.out / "health.json").read_text())["problems"]


def test_load_names_what_is_wrong(monkeypatch, tmp_path, images):
    plug_in(monkeypatch, targets, "toy", **KIND)
    with pytest.raises(FileNotFoundError, match=r"there is no target\.json"):
        targets.load(tmp_path)
    run = target_run(tmp_path, images)
    target.make(run)
    weights = run.out / "target.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"target\.safetensors: does not fit"):
        targets.load(run.out)
    with pytest.raises(ValueError, match="did you mean 'mae'"):
        methods.find("maee")


def test_pretrain_hands_over_target_and_pictures_and_skips_what_does_not_train(
    monkeypatch, tmp_path, images
):
    import timm

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

    plug_in(monkeypatch, targets, "toy", **KIND)
    plug_in(monkeypatch, methods, "toy", Config=Bare, Method=Method, TRAINS=False, LABELS=False)
    teacher = target_run(tmp_path / "teacher", images)
    target.make(teacher)
    method = {
        "method": {"name": "toy", "config": {}, "labels": False, "trains": False},
        "run": "toy",
    }
    draws = []
    for folder in ("a", "b"):
        run = make_run(
            tmp_path / folder, images, "pretrain/toy-s0", method, {"target/toy": teacher.out}
        )
        run.plan.jobs["target/toy"].manifest = teacher.out / "target.json"
        pretrain.pretrain(run)
        draws.append(seen["drawn"])
    assert draws[0] == draws[1]  # initialisation depends on the seed alone
    assert isinstance(seen["target"], Target) and isinstance(seen["spec"], Spec)
    assert seen["batch"]["view"].shape == (8, 3, 16, 16) and not seen["training"]
    assert seen["batch"]["view"].min() >= 0 and seen["batch"]["view"].max() <= 1
    exported = timm.create_model(f"local-dir:{run.out / 'encoder'}", pretrained=True)
    assert run.summary == {"parameters": sum(p.numel() for p in exported.parameters())}
    assert {path.name for path in run.out.iterdir()} == {"encoder", "pictures"}
