"""Every downstream task, swept over the folder: what each of them promises. And the cache of frozen
features."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from stages import tasks, transfer
from stages.kit.data import loader, store
from stages.kit.nets import attention, encoders
from stages.kit.spec import Spec, configure
from stages.tasks import _features
from tests import tiny
from workflow import plugins
from workflow.files import JobError

LITERALS = {task: plugins.declared("task", task).literals for task in plugins.names("task")}
TASKS = [task for task, found in LITERALS.items() if found["NEEDS"] <= {"labels"}]
HEADLINE = {task: LITERALS[task]["HEADLINE"] for task in TASKS}
CLASSIFY = [task for task in TASKS if HEADLINE[task][0] == "top1"]
SMALL = {
    "linear": {"epochs": 8, "batch_size": 32, "lrs": (0.03, 0.3), "head_seeds": 2},
    "knn": {"k": (3, 10, 20, 200)},
    "finetune": {"epochs": 2, "batch_size": 16, "randaugment": None},
}
COUNTS = {"train": 66, "val": 30, "test": 36}


def dataset(folder: Path, counts=COUNTS, classes: int = 3, unlabelled: int = 0) -> Path:
    """A stored data set of noisy 16 px pictures, whose class is a brightness of the left half
    against the right.
    """
    random = np.random.default_rng(0)
    splits = {}
    for name, count in counts.items():
        labels = np.arange(count) % classes
        images = random.integers(0, 120, (count, 16, 16, 3))
        images[:, :, :8] += (labels * 130 // max(classes - 1, 1))[:, None, None, None]
        labels[:unlabelled] = -1
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "images.npy", images.astype(np.uint8))
        np.save(folder / name / "labels.npy", labels)
        splits[name] = {
            "count": count,
            "fields": [],
            "labelled": bool((labels >= 0).any()),
            "class_counts": np.bincount(labels[labels >= 0], minlength=classes).tolist(),
        }
    info = {
        "source": "made",
        "hash": "abc",
        "mode": "memmap",
        "image_size": 16,
        "store_size": 16,
        "classes": [f"class {i}" for i in range(classes)],
        "mean": [0.4] * 3,
        "std": [0.25] * 3,
        "splits": splits,
    }
    (folder / "data.json").write_text(json.dumps(info))
    return folder


def world(folder: Path, kind: str = "vit", style: str = "timm", **changes) -> SimpleNamespace:
    """A data set, an untrained encoder and its spec, as a task meets them."""
    stored = dataset(folder / "results/data", **changes)
    model = {"kind": kind, "config": vars(tiny.model(kind, embed_dim=16))}
    spec = Spec.of(store.info(stored), 16, model)
    torch.manual_seed(0)
    encoder = folder / "results/pretrain/a-s0/encoder"
    encoders.save(encoders.create(spec, style), encoder, spec)
    (encoder.parent / "manifest.json").write_text('{"fingerprint": "f00d"}')
    return SimpleNamespace(data=stored, spec=spec, encoder=encoder, folder=folder)


def run_of(lab: SimpleNamespace, name: str = "one") -> SimpleNamespace:
    """What a task needs of a Run."""
    train = {
        "epochs": 1,
        "batch_size": 8,
        "micro_batch": None,
        "precision": "fp32",
        "save_minutes": 5.0,
    }
    run = tiny.run(lab.folder / name, train=train)
    run.out, run.work = lab.folder / "out" / name, lab.folder / "work" / name
    for folder in (run.out, run.work):
        folder.mkdir(parents=True)
    run.job.id = f"transfer/a-s0/{name}"
    return run


def trial(lab, task: str, name: str = "one", seed: int = 0, run=None, **changes) -> tasks.Trial:
    """A small one."""
    config = tiny.module(task, "task").Config(**SMALL.get(task, {}) | changes)
    run = run or run_of(lab, name)
    return tasks.Trial(task, lab.encoder, lab.data, config, lab.spec, seed, run)


def result(lab, task: str, name: str = "one", seed: int = 0, **changes) -> tuple[dict, dict]:
    """(metrics, arrays of scores.npz) of a task, small."""
    given = trial(lab, task, name, seed, **changes)
    metrics = tiny.module(task, "task").run(given)
    with np.load(given.run.out / "scores.npz") as arrays:
        return json.loads(json.dumps(metrics)), dict(arrays)


def digests(folder: Path) -> dict:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return world(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def first(lab):
    before = digests(lab.encoder)
    found = {task: result(lab, task, f"{task}-first") for task in TASKS}
    assert digests(lab.encoder) == before
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_headline_is_a_fraction_and_every_test_image_has_a_score(first, lab, task):
    metrics, arrays = first[task]
    assert 0 <= metrics[HEADLINE[task][0]] <= 1
    assert arrays["index"].dtype == np.int64 and arrays["score"].dtype == np.float64
    assert arrays["index"].tolist() == list(range(COUNTS["test"]))
    assert ((arrays["score"] >= 0) & (arrays["score"] <= 1)).all()


@pytest.mark.parametrize("task", CLASSIFY)
def test_scores_and_predictions_reproduce_the_metrics(first, lab, task):
    metrics, arrays = first[task]
    labels = np.load(lab.data / "test/labels.npy")
    assert (arrays["label"] == labels).all() and metrics["n_test"] == 36
    assert metrics["top1"] == pytest.approx(arrays["score"].mean())
    every = arrays.get("predictions", arrays["prediction"][None])
    assert (every[0] == arrays["prediction"]).all()
    assert metrics["top1"] == pytest.approx((every == labels).mean())
    recall = [(every[:, labels == c] == c).mean() for c in range(3)]
    assert metrics["per_class_mean"] == pytest.approx(np.mean(recall)) and metrics["top5"] is None


@pytest.mark.parametrize("task", TASKS)
def test_the_protocol_stands_beside_the_number(first, task):
    metrics, _ = first[task]
    assert {"protocol", "epochs", "seed", "split", "val"} <= set(metrics)
    assert metrics["split"] == "test" and metrics["val"]


@pytest.mark.parametrize("task", CLASSIFY)
def test_what_was_probed_stands_beside_the_number(first, task):
    metrics, _ = first[task]
    assert {"feature", "norm"} <= set(metrics) and metrics["classes_unseen"] == []


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_bytes(first, lab, task):
    again, arrays = result(lab, task, f"{task}-again")
    assert again == first[task][0] and all(
        (arrays[k] == v).all() for k, v in first[task][1].items()
    )
    one, two = (lab.folder / "out" / f"{task}-{which}" for which in ("first", "again"))
    assert digests(one) == digests(two)


@pytest.mark.parametrize("task", CLASSIFY)
def test_the_choice_never_sees_the_test_labels(first, lab, task):
    path = lab.data / "test/labels.npy"
    labels = np.load(path)
    np.save(path, np.roll(labels, 1))
    try:
        metrics, arrays = result(lab, task, f"{task}-rolled")
    finally:
        np.save(path, labels)
    expected, before = first[task]
    assert (arrays["prediction"] == before["prediction"]).all() and metrics["top1"] != expected[
        "top1"
    ]
    for key, value in expected.items():
        if "top1" not in key and key not in ("per_class_mean", "top5"):
            assert metrics[key] == value, key


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_an_untrained_encoder_is_better_than_chance(first, task):
    assert (
        first[task][0]["top1"] > 0.55 and first[task][0]["per_class_mean"] > 0.55
    )  # of three classes


def test_knn_reports_both_features_and_what_it_left_out(first):
    metrics, _ = first["knn"]
    assert metrics["k_tried"] == [3, 10, 20] and metrics["k_left_out"] == [200]
    assert set(metrics["val"]) == {f"{f}/k={k}" for f in ("cls", "patch") for k in (3, 10, 20)}
    chosen = f"{metrics['feature']}/k={metrics['k']}"
    assert metrics["val"][chosen] == max(metrics["val"].values())
    assert metrics["top1"] == metrics[f"{metrics['feature']}_top1"]
    assert {"cls_k20_top1", "patch_k20_top1", "cls_k", "patch_k"} <= set(metrics)


def test_linear_reports_the_best_head_of_each_feature(first):
    metrics, arrays = first["linear"]
    assert len(metrics["val"]) == 2 * 2 * 2 and len(metrics["top1_seeds"]) == 2 == len(
        arrays["predictions"]
    )
    assert metrics["top1"] == pytest.approx(np.mean(metrics["top1_seeds"]))
    assert metrics["val"][f"{metrics['feature']}/{metrics['norm']}/lr={metrics['lr']:g}"] == max(
        metrics["val"].values()
    )
    assert metrics["top1"] == metrics[f"{metrics['feature']}_top1"] and {
        "cls_top1",
        "patch_top1",
    } <= set(metrics)
    assert metrics["head"] == "Linear, 16 x 3 + 3 parameters"


def test_centred_knn_and_augmented_linear(lab):
    metrics, _ = result(lab, "knn", "centred", centred=True)
    assert {"cls-centred_top1", "patch-centred_top1"} <= set(metrics)
    metrics, _ = result(
        lab, "linear", "passes", passes=2, features=("patch",), norms=("batchnorm",)
    )
    assert (
        metrics["passes"] == 2
        and metrics["feature"] == "patch"
        and "cls_top1" not in metrics
        and metrics["top1"] > 0.5
    )


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_an_inner_block_can_be_probed(lab, task, monkeypatch):
    """Its raw states are what the task gets, and the number says so."""
    seen, module = [], tiny.module(task, "task")
    probed = module.probed
    monkeypatch.setattr(
        module, "probed", lambda *a, **kw: seen.append(probed(*a, **kw)) or seen[-1]
    )
    metrics, _ = result(lab, task, f"{task}-block", block=1)
    assert metrics["block"] == 1 and metrics["top1"] > 0.4
    expected = frozen(lab, taps=(1,))
    every = [found for found in seen if found["cls"].shape[-2] == 36]
    assert any(torch.equal(found["patch"], expected["patch.1"]) for found in every)
    assert set(seen[0]) == {"cls", "patch"}
    with pytest.raises(ValueError, match="^block: found 0"):
        module.Config(block=0)


@pytest.mark.parametrize("task", CLASSIFY)
def test_unlabelled_images_are_left_out(tmp_path, task):
    some = world(tmp_path, unlabelled=10)
    metrics, arrays = result(some, task)
    assert (
        metrics["n_test"] == 26
        and arrays["index"].tolist() == list(range(10, 36))
        and (arrays["label"] >= 0).all()
    )


@pytest.mark.parametrize("task", CLASSIFY)
def test_a_class_that_training_lacks_is_reported(tmp_path, task):
    some = world(tmp_path)
    path = some.data / "train/labels.npy"
    labels = np.load(path)
    labels[labels == 2] = 1
    np.save(path, labels)
    metrics, arrays = result(some, task)
    assert metrics["classes_unseen"] == ["class 2"] and metrics["top1"] < 0.7
    assert not (arrays["prediction"][arrays["label"] == 2] == 2).any()


def test_data_without_labels_is_an_error_that_helps(tmp_path):
    info = store.info(dataset(tmp_path / "none", unlabelled=100))
    with pytest.raises(
        JobError,
        match=r"tasks.knn needs labels; data set 'main' \(source 'made'\) has none: name another",
    ):
        tasks.require("knn", {"labels"}, "main", info)
    info = store.info(dataset(tmp_path / "noval", {"train": 6, "val": 0, "test": 6}))
    with pytest.raises(
        JobError, match="val split .* no images: set val_fraction of the data above 0"
    ):
        tasks.require("knn", {"labels"}, "main", info)
    tasks.require("knn", {"labels"}, "main", store.info(dataset(tmp_path / "good")))


@pytest.mark.parametrize("need", ["masks", "boxes", "points"])
def test_data_without_masks_boxes_or_points_name_task_data_set_and_what_is_missing(tmp_path, need):
    info = store.info(dataset(tmp_path))
    with pytest.raises(JobError, match=f"tasks.seg needs {need}; data set 'photos' .* has none"):
        tasks.require("seg", {need, "labels"}, "photos", info)
    for split in ("train", "test"):
        info["splits"][split]["fields"] = [need]
    with pytest.raises(JobError, match=f"the val split of .* has 30 images without {need}"):
        tasks.require("seg", {need, "labels"}, "photos", info)
    info["splits"]["val"]["fields"] = [need]
    tasks.require("seg", {need, "labels"}, "photos", info)


@pytest.mark.parametrize(
    ("index", "score", "expected"),
    [
        ([0, 1], [0.5], "found"),
        ([0, 1], [0.5, 1.5], "outside"),
        ([0, 1], [0.5, float("nan")], "outside"),
        ([1, 1], [0.5, 0.5], "more than once"),
    ],
)
def test_scores_that_no_report_could_read_are_refused(lab, index, score, expected):
    given = trial(lab, "knn", f"refused-{expected}-{score}")
    with pytest.raises(ValueError, match=f"scores of knn: .*{expected}"):
        tasks.save_scores(given, index, score)
    assert not (given.run.out / "scores.npz").exists()


def test_no_k_below_the_training_images_is_an_error(lab):
    with pytest.raises(JobError, match=r"tasks.knn.k: .*\[200\].* found 66"):
        result(lab, "knn", "too-few", k=(200,))


# frozen features


def frozen(lab, split="test", run=None, size=None, **changes):
    """Features of the lab's encoder."""
    run = run or run_of(lab, f"f{np.random.default_rng().integers(1 << 62)}")
    given = replace(trial(lab, "knn", run=run), spec=lab.spec.at(size))
    return _features.frozen(given, split, **changes)


def images_of(lab, split="test", size=16) -> torch.Tensor:
    """A split's images in the evaluation view, normalised as in the pretraining."""
    ((images, _, _),) = loader.evaluation(store.Split.open(lab.data, split), size, 100)
    return lab.spec.normalise(images)


def test_evaluations_may_show_the_middle_of_the_square(lab):
    """As published (256 -> 224): here 16 pixels of 18, in the features and in what each task asks.

    torchvision, on the stored squares of 16 pixels, is the judge.
    """
    split, bicubic = store.Split.open(lab.data, "test"), transforms.InterpolationMode.BICUBIC
    crop = transforms.Compose([transforms.Resize(18, bicubic), transforms.CenterCrop(16)])
    stored = [Image.fromarray(split.decode(i)) for i in range(len(split))]
    images = torch.stack([transforms.functional.to_tensor(crop(image)) for image in stored])
    ((seen, _, _),) = loader.evaluation(split, 16, 100, crop=0.875)
    assert torch.equal(seen, images)
    with torch.no_grad():
        tokens = encoders.features(encoders.load(lab.encoder).eval(), lab.spec.normalise(images))
    found = frozen(lab, crop=0.875)
    torch.testing.assert_close(found["cls"], tokens["cls"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["cls"], frozen(lab)["cls"], atol=1e-3)


@pytest.mark.parametrize("name", ["knn", "linear", "finetune"])
def test_published_evaluations_crop_and_the_default_ones_do_not(name):
    task = tiny.module(name, "task")
    assert task.Config().eval_crop == 1 and task.PUBLISHED["eval_crop"] == 0.875
    configure(task.Config, task.PUBLISHED)


def test_features_are_those_of_the_loaded_encoder(lab):
    with torch.no_grad():
        tokens = encoders.features(encoders.load(lab.encoder).eval(), images_of(lab))
    found = frozen(lab)
    assert set(found) == {"cls", "patch"}
    torch.testing.assert_close(found["cls"], tokens["cls"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patch"], tokens["patch"].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(lab, batch_size=7)["cls"], found["cls"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "style"), [("vit", "timm"), ("vit", "beit"), ("swin", "timm")])
def test_dense_tokens_and_inner_blocks_on_request(tmp_path, kind, style):
    lab = world(tmp_path, kind, style)
    found, pooled = frozen(lab, tokens=True, taps=(2, 1)), frozen(lab)
    kinds = {"cls", "patch", "tokens"}
    assert set(found) == kinds | {f"{k}.{n}" for k in kinds for n in (1, 2)}
    for name, values in pooled.items():  # what is asked for besides changes nothing
        torch.testing.assert_close(found[name], values)
    grid = lab.spec.grid**2
    assert found["tokens"].shape == (36, grid, pooled["cls"].shape[1])
    torch.testing.assert_close(found["tokens"].mean(1), pooled["patch"])
    with torch.no_grad():
        encoder = encoders.load(lab.encoder).eval()
        expected = encoders.masked(encoder, images_of(lab), None, None, taps=(1, 2))
        for number, state in expected["taps"].items():
            tokens = encoders.split(encoder, state)
            torch.testing.assert_close(found[f"tokens.{number}"], tokens["patch"])
            torch.testing.assert_close(found[f"cls.{number}"], tokens["cls"])
        normed = frozen(lab, taps=(2,), norm=True)
        torch.testing.assert_close(normed["cls.2"], found["cls"])  # the last block, so the same
    with pytest.raises(ValueError, match="taps: .* 1..2"):
        frozen(lab, taps=(3,))
    if kind == "swin":  # its first stage is half as wide as its last norm
        with pytest.raises(ValueError, match="taps: block 1 is 16 wide, expected 32"):
            frozen(lab, taps=(1,), norm=True)


@pytest.mark.parametrize(
    ("kind", "style"),
    [("vit", "timm"), ("vit", "sincos"), ("vit", "beit"), ("swin", "timm"), ("convvit", "timm")],
)
def test_an_encoder_is_loaded_at_the_size_of_the_tasks_images(tmp_path, kind, style):
    lab = world(tmp_path, kind, style)
    found = frozen(lab, size=32, tokens=True)
    assert found["tokens"].shape[1] == lab.spec.at(32).grid ** 2 == 4 * lab.spec.grid**2
    with torch.no_grad():
        encoder = encoders.load(lab.encoder, img_size=32).eval()
        expected = encoders.features(encoder, images_of(lab, size=32))
    torch.testing.assert_close(found["tokens"], expected["patch"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(frozen(lab)["cls"], found["cls"])


def test_positions_are_resized_as_the_docstring_says(tmp_path):
    """Absolute: torch's antialiased bicubic. Relative: the table's middle, distance 0, stays."""
    lab = world(tmp_path)
    small, large = (encoders.load(lab.encoder, img_size=size) for size in (16, 32))
    patches = small.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    for antialias, same in ((True, True), (False, False)):
        how = {"size": (8, 8), "mode": "bicubic", "antialias": antialias}
        resized = torch.nn.functional.interpolate(patches, **how).flatten(2).mT
        assert torch.allclose(large.pos_embed[:, 1:], resized, atol=1e-6) == same
    assert torch.equal(large.pos_embed[:, :1], small.pos_embed[:, :1])
    lab = world(tmp_path / "beit", style="beit")
    small, large = (encoders.load(lab.encoder, img_size=size).rel_pos_bias for size in (16, 32))
    tables = [each.relative_position_bias_table for each in (small, large)]
    assert [len(table) for table in tables] == [7 * 7 + 3, 15 * 15 + 3]
    assert torch.equal(tables[0][-3:], tables[1][-3:])
    middles = [table[:-3][(len(table) - 3) // 2] for table in tables]
    torch.testing.assert_close(*middles)


def test_the_encoders_own_mean_and_deviation_are_used(tmp_path):
    """Those of its pretraining, not those of the task's data set."""
    lab = world(tmp_path)
    before = frozen(lab)["cls"].clone()
    path = lab.data / "data.json"
    path.write_text(json.dumps(store.info(lab.data) | {"mean": [0.1] * 3, "hash": "other"}))
    assert torch.equal(frozen(lab)["cls"], before)
    assert len(list(tmp_path.glob("work/features/f00d/*/what.json"))) == 2  # computed anew


def test_features_are_extracted_once_without_gradient_and_in_eval_mode(tmp_path, monkeypatch):
    lab, calls, real = world(tmp_path), [], encoders.features

    def watched(encoder, images):
        calls.append(len(images))
        assert torch.is_inference_mode_enabled() and not any(m.training for m in encoder.modules())
        return real(encoder, images)

    monkeypatch.setattr(encoders, "features", watched)
    run = run_of(lab)
    threads = [threading.Thread(target=frozen, args=(lab, "test", run)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [36]  # three at once: one extracts, the others wait
    assert (tmp_path / "work/features/f00d").is_dir()
    result(lab, "knn", "knn")
    result(lab, "linear", "linear")
    assert calls == [36, 66, 30]  # the tasks share what there is
    other = frozen(lab, "test", run, augment=(2, 0.5, 0))
    assert other["cls"].shape == (2, 36, 16) and calls[3:] == [36, 36]
    assert not torch.equal(other["cls"][0], other["cls"][1])
    frozen(lab, "test", run, precision="bf16")
    assert len(calls) == 6


def test_attention_is_multiplied_out_in_bf16_only(tmp_path, monkeypatch):
    lab, calls = world(tmp_path), []
    monkeypatch.setattr(
        attention, "unfused", lambda *a, real=attention.unfused: calls.append(real(*a))
    )
    exact = frozen(lab)["patch"]
    assert not calls
    low = frozen(lab, precision="bf16")["patch"]
    assert calls and 0 < (low - exact).norm() < 0.02 * exact.norm()


def test_augmented_features_depend_on_the_seed_alone(tmp_path, lab):
    once = frozen(lab, augment=(2, 0.5, 3))["patch"].clone()
    other = world(tmp_path)  # the same content elsewhere: its own cache
    torch.testing.assert_close(
        frozen(other, augment=(2, 0.5, 3), batch_size=5)["patch"], once, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(frozen(lab, augment=(2, 0.5, 4))["patch"], once)


def test_a_changed_encoder_is_extracted_anew(tmp_path):
    lab = world(tmp_path)
    before = frozen(lab)["cls"].clone()
    torch.manual_seed(1)
    encoders.save(
        encoders.create(lab.spec), lab.encoder, lab.spec
    )  # the same fingerprint, other weights
    assert not torch.allclose(frozen(lab)["cls"], before)


def test_writing_to_features_leaves_the_cache_alone(lab):
    found = frozen(lab)
    before = found["cls"].clone()
    found["cls"].zero_()
    assert torch.equal(frozen(lab)["cls"], before)


def test_the_cache_drops_what_was_used_longest_ago(tmp_path, monkeypatch):
    lab = world(tmp_path)
    first = frozen(lab, "train")["cls"]

    def entries() -> set[str]:
        found = tmp_path.glob("work/features/f00d/*/what.json")
        return {json.loads(path.read_text())["split"] for path in found}

    frozen(lab, "val")
    assert entries() == {"train", "val"}
    for path in tmp_path.glob("work/features/f00d/*/what.json"):
        if json.loads(path.read_text())["split"] == "train":
            os.utime(path.parent, (1, 1))
    monkeypatch.setattr(_features, "KEEP_BYTES", 12000)
    frozen(lab, "test")
    assert entries() == {"val", "test"}
    assert first.isfinite().all()  # a task that has it open keeps it


def test_an_edit_of_the_code_that_makes_features_makes_them_anew(lab, monkeypatch):
    files = set(_features.closure(["stages/tasks/_features.py"], _features.ROOT))
    assert {"stages/kit/nets/encoders.py", "stages/kit/data/store.py"} <= files
    assert not any(file.startswith(("stages/methods/", "stages/kit/parts/")) for file in files)
    frozen(lab, "val")
    entries = len(list(lab.folder.glob("work/features/f00d/*/what.json")))
    monkeypatch.setattr(_features, "_code", lambda family: "other")
    frozen(lab, "val")
    assert len(list(lab.folder.glob("work/features/f00d/*/what.json"))) == entries + 1


def test_a_missing_encoder_is_named(tmp_path, lab):
    missing = replace(trial(lab, "knn", "missing"), encoder=tmp_path)
    with pytest.raises(FileNotFoundError, match="no encoder here"):
        _features.frozen(missing, "test")


# ------------------------------------------------------------------------------ the stage itself


def job_run(lab, task: str, kind: str, name: str, **inputs) -> SimpleNamespace:
    """A job.Run of the stage, as the plan makes it: inputs by role."""
    run = run_of(lab, name)
    config = tiny.module(kind, "task").Config(**SMALL.get(kind, {}))
    run.job.params |= {
        "image_size": 16,
        "model": {"kind": "vit", "config": vars(lab.spec.model)},
        "task": {"name": task, "kind": kind, "config": json.loads(json.dumps(vars(config)))},
        "seed": 0,
        "run": "a",
        "method": "random",
    }
    folders = {"data/main": lab.data, "pretrain/a-s0": lab.encoder.parent}
    run.job.inputs = {"data": "data/main", "encoder": "pretrain/a-s0", **inputs}
    run.input = lambda role: folders.get(run.job.inputs[role], lab.folder / "out" / role)
    return run


@pytest.mark.parametrize("task", CLASSIFY)
def test_the_stage_writes_metrics_and_scores(lab, first, task):
    """A task of another name than its file's: both stand in its metrics."""
    run = job_run(lab, f"my-{task}", task, f"stage-{task}")
    transfer.transfer(run)
    metrics = json.loads((run.out / "metrics.json").read_text())
    expected = {"run": "a-s0", "method": "random", "task": f"my-{task}", "kind": task}
    expected["headline"] = dict(zip(("key", "label", "unit"), HEADLINE[task], strict=True))
    assert metrics == expected | first[task][0]
    assert run.summary["top1"] == metrics["top1"]
    assert {path.name for path in run.out.iterdir()} - {"history.jsonl"} == {
        "metrics.json",
        "scores.npz",
    }


def test_a_task_after_another_gets_its_folder(lab, monkeypatch):
    seen, knn = [], tiny.module("knn", "task")
    monkeypatch.setattr(knn, "run", lambda given, real=knn.run: seen.append(given) or real(given))
    transfer.transfer(job_run(lab, "knn", "knn", "alone"))
    transfer.transfer(job_run(lab, "knn", "knn", "later", after="transfer/a-s0/finetune"))
    assert [given.after for given in seen] == [None, lab.folder / "out/after"]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, r"gave top1 = None, expected a fraction in \[0, 1\]"),
        ({"top1": 71.0}, "gave top1 = 71.0"),
        ({"top1": float("nan")}, "gave top1 = nan"),
        ({"top1": 0.5}, "left no scores.npz"),
    ],
)
def test_a_task_that_breaks_its_promise_is_named(lab, monkeypatch, metrics, expected):
    monkeypatch.setattr(tiny.module("knn", "task"), "run", lambda given: metrics)
    run = job_run(lab, "knn", "knn", f"broken-{metrics}")
    with pytest.raises(ValueError, match=f"^stages/tasks/knn.py: run\\(\\) {expected}"):
        transfer.transfer(run)
    assert not (run.out / "metrics.json").exists()


def test_unlabelled_data_stop_the_stage(tmp_path):
    lab = world(tmp_path, unlabelled=100)
    with pytest.raises(JobError, match="tasks.mine needs labels; data set 'main'"):
        transfer.transfer(job_run(lab, "mine", "knn", "one"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished data stage and an untrained encoder, of the real plan."""
    from conftest import tiny_content, write_params

    from stages import data, pretrain

    folder = tmp_path_factory.mktemp("project")
    content = tiny_content(data__options={"train": 48, "val": 16, "test": 16})
    content |= {"targets": {}, "methods": {"random": {}}}
    content["grid"]["runs"] = {"random": {"method": "random"}}
    where = ["--params", str(write_params(folder, content)), "--results", str(folder / "results")]
    data.main(where)
    pretrain.main(["--run", "random-s0", *where])
    return folder, where


@pytest.mark.parametrize("task", ["knn", "linear", "finetune"])
def test_the_command_leaves_a_manifest_and_is_repeatable(project, task):
    folder, where = project
    assert transfer.main(["--run", "random-s0", "--task", task, *where]) == 0
    out = folder / "results/transfer/random-s0" / task
    metrics, manifest = (
        json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "manifest")
    )
    assert (metrics["run"], metrics["method"], metrics["task"]) == ("random-s0", "random", task)
    assert metrics["n_test"] == 16 and manifest["summary"]["top1"] == metrics["top1"]
    files = {"metrics.json", "scores.npz"} | ({"history.jsonl"} if task == "finetune" else set())
    assert set(manifest["outputs"]) == files
    transfer.main(["--run", "random-s0", "--task", task, *where])
    assert json.loads((out / "manifest.json").read_text())["outputs"] == manifest["outputs"]


def test_an_unknown_task_or_run_is_named(project):
    with pytest.raises(ValueError, match="transfer/random-s0/knm.*knn"):
        transfer.main(["--run", "random-s0", "--task", "knm", *project[1]])
