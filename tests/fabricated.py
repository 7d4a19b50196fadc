"""A finished experiment that nobody ran: the folders that the report reads, with chosen scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from workflow.manifest import Manifest

CLASSES = ["circle", "square", "triangle", "star", "cross"]
TOP1 = {"key": "top1", "label": "top-1 accuracy", "unit": "%"}
VIT = {"kind": "vit", "config": {"embed_dim": 192, "depth": 12, "patch_size": 4}}
FLOPS, TARGET_FLOPS = 2.5e8, 3e8  # per image, of a run and of a target
IMAGES_SEEN, TARGET_IMAGES_SEEN = 80000, 48000


def facts(method: str, target: str | None = None, **changes) -> dict:
    """What the plan says of a run; the seed is added."""
    return {
        "method": method,
        "target": target,
        "teacher": None,
        "stage": 1,
        "labels": False,
        "trains": True,
        "label_targets": [],
        **changes,
    }


RUNS = {  # run: (facts, share of the test images that it gets right)
    "mae": (facts("mae"), 0.62),
    "beitv2": (facts("beitv2", "vqkd"), 0.74),
    "beitv2-nopa": (facts("beitv2", "vqkd"), 0.66),
    "random": (facts("random", trains=False), 0.35),
    "supervised": (facts("supervised", labels=True), 0.82),
}


def put(path: Path, value) -> None:
    """Writes text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


TOKENS = {  # what is measured of codes (kit/parts/tokens.py)
    "agreement": 0.412,
    "agreement_chance": 0.031,
    "excess_low": 0.35,
    "excess_high": 0.41,
    "agreement_images": 400,
    "probe": 0.337,
    "probe_low": 0.292,
    "probe_high": 0.385,
    "probe_untrained": 0.25,
    "probe_teacher": 0.555,
    "probe_chance": 0.2,
    "probe_train": 2000,
    "probe_val": 400,
}


class Fabricated:
    """A finished experiment below `folder`; `run` is the report's job.Run.

    tasks: names, or {name: headline}; seeds: for all runs, or by run. on: {run: data set of its
    pretraining}; tested: {task: data set of its own}; models: {run: model}. All that is not named
    works on the data set "main" with a small ViT.
    """

    def __init__(
        self,
        folder: Path,
        runs: Mapping[str, tuple[dict, float]] = RUNS,
        seeds: Sequence[int] | Mapping[str, Sequence[int]] = (0, 1, 2),
        tasks: Sequence[str] | Mapping[str, dict] = ("knn", "linear", "finetune"),
        *,
        images: int = 400,
        across: int = 0,
        pictures: bool = True,
        labelled: bool = True,
        contrasts: dict | None = None,
        on: Mapping[str, str] | None = None,
        tested: Mapping[str, str] | None = None,
        models: Mapping[str, dict] | None = None,
    ):
        self.results, self.rng = folder / "results", np.random.default_rng(0)
        self.runs, self.images = runs, images
        self.on, self.tested, self.models = on or {}, tested or {}, models or {}
        self.inputs: list[str] = []
        seeds = seeds if isinstance(seeds, Mapping) else dict.fromkeys(runs, seeds)
        self.tasks = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks, TOP1)
        self.table = {
            f"{name}-s{seed}": {"run": name, "seed": seed, **about}
            for name, (about, _) in runs.items()
            for seed in seeds[name]
        }
        for name in dict.fromkeys([*map(self.data_of, runs), *self.tested.values()]):
            self.data(name, across, labelled)
        targets = sorted({about["target"] for about, _ in runs.values() if about["target"]})
        for name in ["teacher", *targets] if targets else []:
            self.target(name, pictures)
        for job, about in self.table.items():
            self.pretrain(job, about, pictures)
        for job, about in self.table.items():
            for number, task in enumerate(self.tasks):
                self.transfer(job, about, task, runs[about["run"]][1] + 0.03 * number)
        self.run = self.report(contrasts or {})

    def data_of(self, run: str) -> str:
        """The data set of a run's pretraining."""
        return self.on.get(run, "main")

    def manifest(self, id: str, inputs: dict | None = None, wall_s: float = 12.0, **more) -> None:
        """The manifest of a job; `inputs` are {role: job}."""
        stage, _, name = id.partition("/")
        self.inputs.append(id)
        found = Manifest(
            job=id,
            stage=stage,
            name=name or stage,
            fingerprint=hashlib.sha256(id.encode()).hexdigest(),
            inputs={r: {"job": i, "fingerprint": "f"} for r, i in (inputs or {}).items()},
            code={"stages/x.py": "0" * 64},
            git={"commit": "c0ffee" * 6, "dirty": False},
            wall_s=wall_s,
            peak_memory_mb=812,
            device="cpu",
            threads=2,
            created="2026-01-02T03:04:05+00:00",
            **{"params": {"seed": 0, "note": "<script>alert(1)</script>"}, **more},
        )
        put(self.results / id / "manifest.json", found.text())

    def history(self, path: Path, steps: int, start: float, end: float) -> None:
        """A loss that falls."""
        falling = end + (start - end) * np.exp(-np.arange(steps) / steps * 5)
        loss = falling + self.rng.normal(0, 0.01, steps)
        entries = [
            {"step": n, "epoch": n / steps * 20, "lr": 1e-3, "loss": x} for n, x in enumerate(loss)
        ]
        put(path, "".join(json.dumps(entry) + "\n" for entry in entries))

    def paint(self, path: Path) -> None:
        """A picture of some training images."""
        path.parent.mkdir(parents=True, exist_ok=True)
        row = np.concatenate([*self.pixels[:8]], 1)
        Image.fromarray(row.repeat(3, 0).repeat(3, 1)).save(path)

    def data(self, name: str, across: int, labelled: bool) -> None:
        """A data set of sixty training images; `across`: test images that are also in train."""
        folder = self.results / "data" / name
        tone = self.rng.integers(40, 220, (60, 1, 1, 3))
        noisy = tone + self.rng.normal(0, 18, (60, 32, 32, 3))
        self.pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        split = {"count": 60, "class_counts": [12] * 5 if labelled else [], "labelled": labelled}
        about = {
            "source": "shapes",
            "hash": hashlib.sha256(name.encode()).hexdigest(),
            "mode": "memmap",
            "image_size": 32,
            "store_size": 32,
            "classes": CLASSES if labelled else [],
            "mean": [0.5, 0.45, 0.4],
            "std": [0.2, 0.2, 0.25],
            "splits": {
                "train": split,
                "val": split | {"count": 20},
                "test": split | {"count": self.images},
            },
            "duplicates": {"within": {"train": 3}, "across": {"train-test": across}, "groups": []},
            "quarantine": {"count": 2, "reasons": {"truncated": 2}},
            "warnings": [],
        }
        put(folder / "data.json", about)
        (folder / "train").mkdir()
        np.save(folder / "train/images.npy", self.pixels)
        labels = np.arange(60) % 5 if labelled else np.full(60, -1)
        np.save(folder / "train/labels.npy", labels)
        self.manifest(f"data/{name}")

    def target(self, name: str, pictures: bool) -> None:
        """A tokenizer, or the teacher that it learnt from."""
        folder, first = self.results / "target" / name, name == "teacher"
        counts = (900 * np.arange(1, 65) ** -0.7).astype(int).tolist()
        tokenizer = {"usage": 0.97, "perplexity": 41.2, "counts": counts, "problems": []}
        tokenizer |= {"tokens": TOKENS, "notes": []}
        teacher = {"rank": 37.5, "entropy": 3.1, "problems": []}
        own = {key: value for key, value in TOKENS.items() if key.startswith("probe")}
        teacher |= {"probes": own | {"probe": 0.555}}
        kind = "dino" if first else "vqkd"
        put(folder / "health.json", teacher if first else tokenizer)
        put(folder / "target.json", {"kind": kind, "labels": False})
        self.history(folder / "history.jsonl", 120, 8, 4)
        if pictures:
            self.paint(folder / "pictures/code_map.png")
        self.manifest(
            f"target/{name}",
            {"data": "data/main"} | ({} if first else {"upstream": "target/teacher"}),
            95.0,
            summary={"images_seen": TARGET_IMAGES_SEEN, "flops_per_image": TARGET_FLOPS},
            params={"target": {"kind": kind}},
        )

    def pretrain(self, job: str, about: dict, pictures: bool) -> None:
        """One seed of a run; an untrained one takes three seconds and sees no image."""
        folder, trained, run = self.results / "pretrain" / job, about["trains"], about["run"]
        seen = {"images_seen": IMAGES_SEEN, "flops_per_image": FLOPS, "images_per_s": 900.0}
        inputs = {"data": f"data/{self.data_of(run)}"}
        if about["target"]:
            inputs["target"] = f"target/{about['target']}"
        if about["teacher"]:
            inputs["target"] = f"pretrain/{about['teacher']}-s{about['seed']}"
        if trained:
            self.history(folder / "history.jsonl", 200, 1.2, 0.4)
        if trained and pictures:
            self.paint(folder / "pictures/reconstruction.png")
        model = self.models.get(run, VIT)
        self.manifest(
            f"pretrain/{job}",
            inputs,
            140.0 if trained else 3.0,
            summary=(seen if trained else {}) | {"parameters": 1234567},
            params={
                "method": {"name": about["method"], "kind": about["method"]},
                "run": run,
                "model": model,
            },
        )

    def transfer(self, job: str, about: dict, task: str, rate: float) -> None:
        """A task on one seed of a run, which gets the easier test images right.

        The rows of scores.npz are in no order: the report sorts them.
        """
        folder, headline = self.results / "transfer" / job / task, self.tasks[task]
        difficulty = np.linspace(0, 1, self.images) + self.rng.normal(0, 0.03, self.images)
        score = (difficulty < rate + self.rng.normal(0, 0.004)).astype(np.float64)
        value, key = float(score.mean()), headline["key"]
        metrics = {"run": job, "task": task, "headline": headline, key: value, "seed": 0}
        if task != "finetune":
            metrics |= {"feature": "patch", f"cls_{key}": value - 0.1, f"patch_{key}": value}
        put(folder / "metrics.json", metrics)
        order = self.rng.permutation(self.images)
        np.savez(folder / "scores.npz", index=order, score=score[order])
        data = self.tested.get(task, self.data_of(about["run"]))
        inputs = {"data": f"data/{data}", "encoder": f"pretrain/{job}"}
        self.manifest(f"transfer/{job}/{task}", inputs, 4.2, summary={key: value})

    def report(self, contrasts: dict) -> SimpleNamespace:
        """The Run of the report's job, with its `results` besides."""
        out = self.results / "report"
        out.mkdir()
        params = {
            "experiment": "synthetic",
            "runs": self.table,
            "tasks": {name: {"kind": name, **headline} for name, headline in self.tasks.items()},
            "contrasts": contrasts,
        }
        job = SimpleNamespace(id="report", params=params, inputs={id: id for id in self.inputs})
        found = {"job": job, "out": out, "summary": {}, "results": self.results}
        found["compute"] = {"tracking": False}
        return SimpleNamespace(**found, input=lambda id: self.results / id)


def fabricate(folder: Path, *args, **kw) -> SimpleNamespace:
    """The report's Run on a `Fabricated` experiment."""
    return Fabricated(folder, *args, **kw).run
