"""Fine-tuning: mixing, layer-wise decay, micro batches, interruption."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_tasks import digests, result, run_of, trial, world
from timm.data.mixup import mixup_target

from stages.kit.data import loader, store
from stages.kit.nets import encoders
from stages.kit.spec import configure
from stages.kit.train import loop, mixing, optim
from stages.tasks import finetune
from stages.tasks.finetune import Classifier, Config, Subset, kept, micro_batch, softened
from tests import tiny
from workflow.params import read


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return world(tmp_path_factory.mktemp("lab"))


def mixed(images, labels, classes: int, share, smoothing: float):
    """Images and hard labels as a training step mixes them."""
    return mixing.mixed(images, softened(labels, classes, smoothing), share, share.mean())


def test_layer_decay_of_twelve_blocks_to_six_digits(tmp_path):
    spec = tiny.spec(embed_dim=16, depth=12)
    encoders.save(encoders.create(spec), tmp_path, spec)
    classifier = Classifier(tmp_path, Config(layer_decay=0.65), 5, 16)
    groups = classifier.param_groups(0.05)
    names = {id(p): name for name, p in classifier.model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert set(found) == set(names.values())  # everything is trained, positions too
    expected = {
        "patch_embed.proj.weight": 0.003697,
        "cls_token": 0.003697,
        "pos_embed": 0.003697,
        "blocks.0.attn.qkv.weight": 0.005688,
        "blocks.11.mlp.fc2.weight": 0.65,
        "fc_norm.weight": 1,
        "head.weight": 1,
    }
    for name, scale in expected.items():
        assert round(found[name][0], 6) == scale, name
    for name, parameter in classifier.model.named_parameters():
        plain = parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
        assert found[name][1] == (0.0 if plain else 0.05), name


def test_cutmix_label_share_is_the_area_really_kept():
    config, areas = Config(mixup=0.0, cutmix=1.0), []
    for step in range(200):
        share = kept(config, 16, 24, 0, step)
        assert set(share.unique().tolist()) <= {0.0, 1.0}
        ones, twos = torch.ones(2, 3, 16, 24), torch.zeros(2, 3, 16, 24)
        images = torch.stack([ones[0], twos[0]])
        images, target = mixed(images, torch.tensor([0, 1]), 4, share, 0.0)
        assert target[0, 0].item() == pytest.approx(
            images[0].mean().item(), abs=1e-6
        )  # class 0's pixels are 1
        assert target[1, 1].item() == pytest.approx(1 - images[1].mean().item(), abs=1e-6)
        removed = (share == 0).nonzero()
        if len(removed):  # one box
            height, width = (removed.amax(0) - removed.amin(0) + 1).tolist()
            assert height * width == len(removed)
        areas.append(target[0, 0].item())
    assert (
        0.5 < np.mean(areas) < 0.75 and min(areas) < 0.2 and max(areas) > 0.95
    )  # Beta(1, 1) cut off at the rim


def test_mixup_is_one_number_drawn_from_its_beta():
    shares = torch.stack([kept(Config(cutmix=0.0), 4, 4, 0, step) for step in range(500)])
    assert (shares == shares[:, :1, :1]).all()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares[:, 0, 0].var().item() == pytest.approx(
        1 / (4 * (2 * 0.8 + 1)), abs=0.015
    )  # variance of Beta(0.8, 0.8)


def test_which_mixing_and_how_often():
    cut = [bool((kept(Config(), 8, 8, 1, step) == 0).any()) for step in range(400)]
    assert 0.35 < np.mean(cut) < 0.6
    assert all((kept(Config(mixup_prob=0.0), 8, 8, 0, step) == 1).all() for step in range(20))
    assert all(
        (kept(Config(mixup=0.0, cutmix=0.0), 8, 8, 0, step) == 1).all() for step in range(20)
    )
    mixed_ones = [
        bool((kept(Config(mixup_prob=0.3, cutmix=0.0), 8, 8, 0, step) < 1).any())
        for step in range(400)
    ]
    assert 0.22 < np.mean(mixed_ones) < 0.38
    assert torch.equal(kept(Config(), 8, 8, 3, 7), kept(Config(), 8, 8, 3, 7))
    assert not torch.equal(
        kept(Config(cutmix=0.0), 8, 8, 3, 7), kept(Config(cutmix=0.0), 8, 8, 4, 7)
    )


def test_soft_labels_are_timms_and_sum_to_one():
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([4, 0, 1, 1, 2, 3])
    share = torch.full((8, 8), 0.3)
    pictures, target = mixed(images, labels, 5, share, 0.1)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    for pair in (0, 2, 4):  # timm mixes the first with the last: the same for a batch of two
        expected = mixup_target(labels[pair : pair + 2], 5, 0.3, 0.1)
        torch.testing.assert_close(target[pair : pair + 2], expected)
    torch.testing.assert_close(pictures[2], images[2] * 0.3 + images[3] * 0.7)
    torch.testing.assert_close(pictures[3], images[3] * 0.3 + images[2] * 0.7)


def test_without_mixing_the_loss_is_smoothed_cross_entropy(lab):
    classifier = Classifier(lab.encoder, Config(mixup=0.0, cutmix=0.0, drop_path=0.0), 3, 16)
    torch.nn.init.normal_(classifier.model.head.weight)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 2, 1, 1])
    found = classifier({"view": images, "label": labels}, tiny.progress(torch.arange(4), 0))["loss"]
    logits = classifier.model(lab.spec.normalise(images))  # by the statistics of the pretraining
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_micro_batches_make_the_same_step(lab):
    classifier = Classifier(lab.encoder, Config(drop_path=0.0), 3, 16)
    torch.nn.init.normal_(classifier.model.head.weight)
    batch = {"view": torch.rand(8, 3, 16, 16), "label": torch.arange(8) % 3}
    for step in range(4):
        whole = classifier(batch, tiny.progress(torch.arange(8), step))["loss"]
        parts = [
            classifier(
                {k: v[at : at + 2] for k, v in batch.items()},
                tiny.progress(torch.arange(at, at + 2), step),
            )["loss"]
            for at in range(0, 8, 2)
        ]
        torch.testing.assert_close(sum(parts) / 4, whole)


@pytest.mark.parametrize(
    ("share", "limit", "expected"),
    [(256, None, 256), (256, 64, 64), (96, 50, 48), (66, 10, 6), (2, 1, 2)],
)
def test_micro_batch_divides_and_is_even(share, limit, expected):
    assert micro_batch(share, limit) == expected


def test_interrupted_and_continued_ends_with_the_same_bytes(lab, monkeypatch):
    real = Classifier.forward

    def once(run):
        return finetune.run(trial(lab, "finetune", run=run, epochs=2, batch_size=16))

    whole, halves = run_of(lab, "whole"), run_of(lab, "halves")
    expected = once(whole)

    def stopping(self, batch, progress):
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, progress)

    monkeypatch.setattr(Classifier, "forward", stopping)
    with pytest.raises(SystemExit):
        once(halves)
    assert not digests(halves.out)
    monkeypatch.setattr(Classifier, "forward", real)
    assert once(halves) == expected and digests(halves.out) == digests(whole.out)


def test_it_learns_and_leaves_a_classifier_that_timm_loads(tmp_path):
    lab = world(tmp_path)
    metrics, arrays = result(
        lab,
        "finetune",
        epochs=20,
        lr=5e-2,
        drop_path=0.0,
        flip=0.0,
        mixup=0.0,
        cutmix=0.0,
        crop_min=1.0,
        save_model=True,
    )
    assert (
        metrics["top1"] > 0.9 and metrics["val"]["last epoch"] > 0.9 and metrics["epoch"] == "last"
    )
    model = encoders.load(tmp_path / "out/one/classifier").eval()
    ((images, _, _),) = loader.evaluation(store.Split.open(lab.data, "test"), 16, 100)
    with torch.no_grad():
        assert (model(lab.spec.normalise(images)).argmax(1).numpy() == arrays["prediction"]).all()


def test_a_small_set_shrinks_the_batch_and_says_so(tmp_path):
    lab = world(tmp_path, counts={"train": 11, "val": 6, "test": 6})
    metrics, _ = result(lab, "finetune", batch_size=256)
    assert metrics["batch_size"] == 10 and metrics["lr"] == pytest.approx(1e-3 * 10 / 256)


def test_subset_is_the_same_pictures(lab):
    split, rows = store.Split.open(lab.data, "train"), torch.tensor([5, 1, 8, 30])
    part = Subset(split, rows)
    assert len(part) == 4 and part.labels.tolist() == split.labels[[5, 1, 8, 30]].tolist()
    assert (part.decode(2) == split.images[8]).all()
    batch = loader.Batches(part, {"view": finetune.view(Config(), 16)}, 4, 0, labels=True).batch(0)
    assert batch["view"].shape == (4, 3, 16, 16) and sorted(batch["label"].tolist()) == sorted(
        part.labels.tolist()
    )


def test_the_table_of_relative_positions_is_decayed_as_in_beit(tmp_path):
    spec = tiny.spec(embed_dim=16)
    encoders.save(encoders.create(spec, "beit"), tmp_path, spec)
    classifier = Classifier(tmp_path, Config(), 3, 16)
    names = {id(p): name for name, p in classifier.model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in classifier.param_groups(0.05)
        for p in group["params"]
    }
    tables = [name for name in decays if "relative_position_bias_table" in name]
    assert len(tables) == spec.model.depth and all(decays[name] == 0.05 for name in tables)
    assert optim.layer_id(tables[-1], spec.model.depth) == spec.model.depth
    loss = classifier(
        {"view": torch.rand(2, 3, 16, 16), "label": torch.tensor([0, 1])},
        tiny.progress(torch.arange(2), 0),
    )["loss"]
    loss.backward()
    missing = {name for name, p in classifier.model.named_parameters() if p.grad is None}
    assert not missing


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 5},
        {"epochs": 0},
        {"layer_decay": 0.0},
        {"mixup": -1.0},
        {"switch": 2.0},
        {"smoothing": 1.0},
        {"lr": 0.0},
        {"crop_min": 1.5},
    ],
)
def test_bad_settings_name_their_key(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Config(**bad)


def test_the_default_recipe():
    """What nobody sets: five epochs of fifty warm up to 1e-3 at 256 images, down to 1e-6."""
    config = Config()
    recipe = loop.Recipe.of(config, {"epochs": config.epochs, "batch_size": 128}, 10)
    assert (recipe.epochs, recipe.warmup, recipe.steps) == (50, 50, 500)
    assert (recipe.lr, recipe.min_lr, recipe.weight_decay) == (5e-4, 1e-6, 0.05)
    assert recipe.lr_at(24) == pytest.approx(5e-4 * 25 / 50, rel=0.05)
    assert recipe.lr_at(50) == pytest.approx(5e-4) and recipe.lr_at(499) < 1e-5


def test_the_published_recipe_is_one():
    config = Config(**finetune.PUBLISHED)
    assert (config.epochs, config.lr, config.lr_per, config.layer_decay) == (100, 5e-4, 256, 0.65)


@pytest.mark.parametrize(
    ("name", "lr", "expected"),
    [
        ("mae", 2e-3, {"schedule": "mae", "layer_decay": 0.65, "warmup": 0.05, "head_std": None}),
        ("dbot-2", 1.2e-3, {"schedule": "mae", "layer_decay": 0.65, "head_std": 0.01}),
        ("beitv2-300", 5e-4, {"schedule": "beit", "layer_decay": 0.65, "drop_path": 0.1}),
        ("beitv2", 5e-4, {"schedule": "beit", "layer_decay": 0.6, "drop_path": 0.2}),
        ("simmim-vitb", 5e-3, {"schedule": "simmim", "layer_decay": 0.65, "clip": 5.0}),
        ("simmim", 5e-3, {"schedule": "simmim", "layer_decay": 0.9, "warmup": 0.2}),
        ("simmim-800", 5e-3, {"schedule": "simmim", "layer_decay": 0.8, "warmup_from": 2e-4}),
        ("dino", 1e-3, {"schedule": "beit", "pool": "token"}),
    ],
)
def test_published_fine_tuning_of_each_method_in_the_preset(name, lr, expected):
    """Rates at the papers' batches; what the papers do differently from MAE."""
    run = read(Path(__file__).parents[1] / "presets/imagenet.yaml").runs[name]
    given = run.tasks["finetune"].settings.config
    assert {key: given[key] for key in expected} == expected
    assert (given["eval_crop"], given["min_lr"], given["positions"]) == (0.875, 1e-6, "bicubic")
    shared = [given[key] for key in ("mixup", "cutmix", "smoothing", "erase")]
    assert shared == [0.8, 1.0, 0.1, 0.25]
    config = configure(Config, given)
    train = {"epochs": config.epochs, "batch_size": config.batch_size}
    assert loop.Recipe.of(config, train, 10).lr == pytest.approx(lr)


@pytest.mark.parametrize(("kind", "style"), [("vit", "timm"), ("vit", "beit"), ("swin", "timm")])
def test_fine_tuning_at_another_size_of_another_data_set(tmp_path, kind, style):
    """The classifier that it keeps carries its size, and the mean of the pretraining."""
    lab = world(tmp_path, kind, style)
    lab.spec = replace(lab.spec, mean=(0.1,) * 3)  # of the task's data set
    metrics, arrays = result(lab, "finetune", input_size=32, save_model=True)
    assert 0 <= metrics["top1"] <= 1
    model = encoders.load(tmp_path / "out/one/classifier").eval()
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["mean"] == pytest.approx((0.4,) * 3)
    ((images, _, _),) = loader.evaluation(store.Split.open(lab.data, "test"), 32, 100)
    with torch.no_grad():
        found = model((images - 0.4) / 0.25).argmax(1).numpy()
    assert (found == arrays["prediction"]).all()
