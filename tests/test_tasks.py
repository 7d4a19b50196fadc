"""Every downstream task, swept over the folder: what each of them promises. And the cache of frozen
features."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages import data, pretrain, tasks, transfer
from stages.kit.data import loader, store
from workflow.files import JobError
from stages.kit.nets import attention, encoders
from stages.kit.spec import Spec
from stages.tasks import _features

TASKS = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))
SMALL = {
    "linear": {"epochs": 8, "batch_size": 32, "lrs": (0.03, 0.3), "head_seeds": 2},
    "knn": {"k": (3, 10, 20, 200)},
    "finetune": {"epochs": 2, "batch_size": 16, "randaugment": None},
}
MODEL = {
    "name": "vit_tiny_patch16_224",
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "args": {},
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


def world(folder: Path, **changes) -> SimpleNamespace:
    """A data set, an untrained encoder and a run, as a task meets them."""
    stored = dataset(folder / "results/data", **changes)
    spec = Spec.of(store.info(stored), 16, MODEL)
    torch.manual_seed(0)
    encoder = folder / "results/pretrain/a-s0/encoder"
    encoders.save(encoders.create(spec), encoder, spec)
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
    out, work = lab.folder / "out" / name, lab.folder / "work" / name
    out.mkdir(parents=True)
    work.mkdir(parents=True)
    return SimpleNamespace(
        job=SimpleNamespace(id=f"transfer/a-s0/{name}", params={"train": train}),
        out=out,
        work=work,
        device=torch.device("cpu"),
        compute={"workers": 0},
        summary={},
    )


def result(
    lab: SimpleNamespace, task: str, name: str = "one", seed: int = 0, **changes
) -> tuple[dict, dict]:
    """(metrics, predictions) of a task, small."""
    module = tasks.find(task)
    run = run_of(lab, name)
    metrics = module.run(
        lab.encoder, lab.data, module.Config(**SMALL.get(task, {}) | changes), run, seed, lab.spec
    )
    with np.load(run.out / "predictions.npz") as arrays:
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
def test_predictions_reproduce_the_metrics(first, lab, task):
    metrics, arrays = first[task]
    labels = np.load(lab.data / "test/labels.npy")
    assert (
        arrays["index"].tolist() == list(range(36))
        and (arrays["label"] == labels).all()
        and metrics["n_test"] == 36
    )
    assert metrics["top1"] == pytest.approx(arrays["correct"].mean())
    every = arrays.get("predictions", arrays["prediction"][None])
    assert (every[0] == arrays["prediction"]).all() and metrics["top1"] == pytest.approx(
        (every == labels).mean()
    )
    recall = [(every[:, labels == c] == c).mean() for c in range(3)]
    assert metrics["per_class_mean"] == pytest.approx(np.mean(recall)) and metrics["top5"] is None


@pytest.mark.parametrize("task", TASKS)
def test_the_protocol_stands_beside_the_number(first, task):
    metrics, _ = first[task]
    assert {"protocol", "feature", "norm", "lr", "epochs", "seed", "k", "T", "split", "val"} <= set(
        metrics
    )
    assert metrics["split"] == "test" and metrics["val"] and metrics["classes_unseen"] == []


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_bytes(first, lab, task):
    again, arrays = result(lab, task, f"{task}-again")
    assert again == first[task][0] and all(
        (arrays[k] == v).all() for k, v in first[task][1].items()
    )
    one, two = (lab.folder / "out" / f"{task}-{which}" for which in ("first", "again"))
    assert digests(one) == digests(two)


@pytest.mark.parametrize("task", TASKS)
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


@pytest.mark.parametrize("task", TASKS)
def test_unlabelled_images_are_left_out(tmp_path, task):
    some = world(tmp_path, unlabelled=10)
    metrics, arrays = result(some, task)
    assert (
        metrics["n_test"] == 26
        and arrays["index"].tolist() == list(range(10, 36))
        and (arrays["label"] >= 0).all()
    )


@pytest.mark.parametrize("task", TASKS)
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
        JobError, match="tasks.knn needs labels; source 'made' has none: remove the task"
    ):
        tasks.require_labels("knn", info)
    info = store.info(dataset(tmp_path / "noval", {"train": 6, "val": 0, "test": 6}))
    with pytest.raises(JobError, match="val split .* no images: set data.val_fraction above 0"):
        tasks.require_labels("knn", info)
    tasks.require_labels("knn", store.info(dataset(tmp_path / "good")))


def test_no_k_below_the_training_images_is_an_error(lab):
    with pytest.raises(JobError, match=r"tasks.knn.k: .*\[200\].* found 66"):
        result(lab, "knn", "too-few", k=(200,))


# frozen features


def frozen(lab, split="test", run=None, **changes):
    return _features.frozen(
        lab.encoder,
        lab.data,
        run or run_of(lab, f"f{np.random.default_rng().integers(1 << 62)}"),
        split,
        **{"image_size": 16, **changes},
    )


def test_features_are_those_of_the_loaded_encoder(lab):
    encoder = encoders.load(lab.encoder).eval()
    ((images, _, _),) = loader.evaluation(store.Split.open(lab.data, "test"), 16, 100)
    with torch.no_grad():
        tokens = encoders.features(encoder, lab.spec.normalise(images))
    found = frozen(lab)
    torch.testing.assert_close(found["cls"], tokens["cls"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patch"], tokens["patch"].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(lab, batch_size=7)["cls"], found["cls"], rtol=1e-4, atol=1e-5)


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
        attention, "multiply_out", lambda e, real=attention.multiply_out: calls.append(real(e))
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


def test_a_missing_encoder_is_named(tmp_path, lab):
    with pytest.raises(FileNotFoundError, match="no encoder here"):
        _features.frozen(tmp_path, lab.data, run_of(lab, "missing"), "test", image_size=16)


# ---------------------------------------------------------------------------------------- the stage
# itself


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished data stage and an untrained encoder, of the real plan."""
    from conftest import tiny_content, write_params

    folder = tmp_path_factory.mktemp("project")
    content = tiny_content(data__options={"train": 48, "val": 16, "test": 16})
    content |= {"targets": {}, "methods": {"random": {}}}
    content["grid"]["runs"] = {"random": {"method": "random"}}
    where = ["--params", str(write_params(folder, content)), "--results", str(folder / "results")]
    data.main(where)
    pretrain.main(["--run", "random-s0", *where])
    return folder, where


@pytest.mark.parametrize("task", ["knn", "linear", "finetune"])
def test_the_stage_writes_metrics_predictions_and_a_manifest(project, task):
    folder, where = project
    assert transfer.main(["--run", "random-s0", "--task", task, *where]) == 0
    out = folder / "results/transfer/random-s0" / task
    metrics, manifest = (
        json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "manifest")
    )
    assert (metrics["run"], metrics["method"], metrics["task"]) == ("random-s0", "random", task)
    assert metrics["n_test"] == 16 and manifest["summary"]["top1"] == metrics["top1"]
    files = {"metrics.json", "predictions.npz"} | (
        {"history.jsonl"} if task == "finetune" else set()
    )
    assert set(manifest["outputs"]) == files
    transfer.main(["--run", "random-s0", "--task", task, *where])
    assert json.loads((out / "manifest.json").read_text())["outputs"] == manifest["outputs"]


def test_an_unknown_task_or_run_is_named(project):
    with pytest.raises(ValueError, match="transfer/random-s0/knm.*knn"):
        transfer.main(["--run", "random-s0", "--task", "knm", *project[1]])


def test_unlabelled_data_stop_the_stage_and_leave_no_manifest(project):
    folder, where = project
    path = folder / "results/data/data.json"
    before = path.read_text()
    info = json.loads(before)
    for split in info["splits"].values():
        split["labelled"] = False
    path.write_text(json.dumps(info))
    try:
        with pytest.raises(JobError, match="tasks.knn needs labels"):
            transfer.main(["--run", "random-s0", "--task", "knn", *where])
    finally:
        path.write_text(before)
    assert not (folder / "results/transfer/random-s0/knn/manifest.json").exists()
