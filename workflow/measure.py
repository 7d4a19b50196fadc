"""What a unit of one job's work costs on this machine, measured in a process of its own.

    python -m workflow.measure --job pretrain/mae-s0 [--steps 8] [--params params.yaml] [--results results]

Prints one line of JSON, which workflow/cost.py multiplies. Needs params.yaml only: images are noise, teachers and
encoders untrained, but of the right size. What cannot be known without their files raises Missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from stages import data, methods, targets, tasks
from stages.kit import encoder, keyed
from stages.kit.device import resolved
from stages.kit.loader import Batches
from stages.kit.loop import Recipe, fit
from stages.kit.provenance import peak_mb
from stages.kit.spec import Spec, configure
from stages.kit.store import info
from stages.kit.teacher import Teacher
from stages.sources import SPLITS, assign
from workflow.plan import load

POOL = 256  # different images of noise
WARM = 2  # steps that are not counted
SAMPLE = 64  # images decoded, or encoded by a frozen encoder


class Missing(RuntimeError):
    """A job whose cost cannot be measured here, and why."""


class Noise:
    """A split of `count` images of noise that holds only a few of them."""

    def __init__(self, count: int, size: int, classes: int):
        self.pool = np.random.default_rng(0).integers(0, 256, (min(POOL, count), size, size, 3), np.uint8)
        self.labels = np.arange(count) % max(1, classes)
        self.images = self

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> np.ndarray:
        return self.pool[index % len(self.pool)]


class Timed(Batches):
    """Batches that note when each step of the training began."""

    def stream(self, start_step: int, stop_step: int) -> Iterator[list]:
        self.began = []
        for micros in super().stream(start_step, stop_step):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.began.append(time.perf_counter())
            yield micros

    def step_seconds(self) -> float:
        """Median time from one step to the next, the wait for its batch included."""
        return statistics.median(np.diff(self.began)[WARM:].tolist())


def sizes(plan) -> dict:
    """{"train", "val", "test": images, "classes"}: from data.json, or as the source lists them."""
    folder = plan.jobs["data"].output
    if (folder / "data.json").is_file():
        facts = info(folder)
        return {s: part["count"] for s, part in facts["splits"].items()} | {"classes": len(facts["classes"])}
    params = plan.jobs["data"].params
    if params["source"]["name"] == "hub":
        raise Missing("the number of images is known once `python -m stages.data` has fetched them")
    found = data.find(params["data"], params["source"])
    parts = assign(found, params["data"]).parts.values()
    counts = {s: sum(int((part == k).sum()) for part in parts) for k, s in enumerate(SPLITS)}
    return counts | {"classes": len(found.classes)}


def measure(plan, job, counts: dict, steps: int) -> dict:
    """{"step_s", "flops_per_image"} of what trains, {"image_s"} of what reads or encodes images, and so on."""
    if job.stage == "data":
        return reading(job)
    if job.stage == "report":
        return {}
    params = job.params
    spec = Spec(params["image_size"], params["model"], (0.5,) * 3, (0.25,) * 3, counts["classes"], counts["train"])
    with tempfile.TemporaryDirectory() as folder:
        where = torch.device(resolved(plan.compute["device"]))
        run = SimpleNamespace(job=job, out=Path(folder), work=Path(folder), device=where, compute=plan.compute, summary={})
        if job.stage == "transfer":
            return task(plan, run, spec, counts, steps)
        kind, find = ("target", targets.find) if job.stage == "target" else ("method", methods.find)
        module = find(params[kind]["kind" if kind == "target" else "name"])
        config = configure(module.Config, params[kind]["config"])
        above = teacher(plan, job, spec, run.device)
        name = "Training" if kind == "target" else "Method"
        if not (hasattr(module, name) and getattr(module, "TRAINS", True)):
            return {}
        trained = getattr(module, name)(config, spec, above).to(run.device)
        return training(run, trained, module.views(config, spec), config, params["train"], bool(module.LABELS), steps, plan)


def training(run, module, views, config, train: dict, labels: bool, steps: int, plan) -> dict:
    """A few real steps of the loop."""
    spec_size = run.job.params["image_size"]
    counts = max(train["batch_size"], POOL)
    split = Noise(counts, spec_size, getattr(module, "classes", 2))
    how = {"micro": train["micro_batch"], "labels": labels, "workers": plan.compute["workers"]}
    batches = Timed(split, views, train["batch_size"], 0, **how)
    recipe = Recipe.of(config, train, batches.steps_per_epoch)
    recipe = replace(recipe, epochs=1, steps_per_epoch=steps + WARM + 1, save_minutes=1e9)
    fit(module, batches, recipe, run, 0)
    found = {"step_s": batches.step_seconds(), "flops_per_image": run.summary["flops_per_image"]}
    return found | {"precision": run.summary["precision"]}


def teacher(plan, job, spec: Spec, where: torch.device):
    """What the job learns from: finished, if it is there, else untrained."""
    for id in job.inputs:
        above = plan.jobs[id]
        if above.stage == "target":
            if plan.manifest(id):
                return targets.load(above.output, where)
            kind = targets.find(above.params["target"]["kind"])
            target = kind.Target(configure(kind.Config, above.params["target"]["config"]), spec)
            if hasattr(target, "prepare"):
                raise Missing(f"the weights of {id} are not here yet: run `python -m stages.target --name {above.name}`")
            return targets.pin(target.to(where))
        if above.stage == "pretrain":
            return Teacher(untrained(plan, above, spec), spec).to(where)
    return None


def untrained(plan, job, spec: Spec) -> torch.nn.Module:
    """The encoder that a pretraining job exports, before it trains."""
    module = methods.find(job.params["method"]["name"])
    config = configure(module.Config, job.params["method"]["config"])
    return module.Method(config, spec, teacher(plan, job, spec, torch.device("cpu"))).encoder


def task(plan, run, spec: Spec, counts: dict, steps: int) -> dict:
    """Fine-tuning: a few steps. Probes: the frozen encoder on some images, and an epoch of the linear heads."""
    job = run.job
    name, module = job.params["task"]["name"], tasks.find(job.params["task"]["name"])
    config = configure(module.Config, job.params["task"]["config"])
    above = next(plan.jobs[id] for id in job.inputs if id.startswith("pretrain/"))
    folder = run.out / "encoder"
    model = untrained(plan, above, spec)
    encoder.save(model, folder, spec)
    if name == "finetune":
        batch = min(config.batch_size, counts["train"])
        train = {**job.params["train"], "epochs": config.epochs, "batch_size": batch}
        classifier = module.Classifier(folder, config, spec.num_classes)
        found = training(run, classifier, {"view": module.view(config, spec.image_size)}, config, train, True, steps, plan)
        return found | {"epochs": config.epochs, "batch_size": batch}
    if name not in ("knn", "linear"):
        raise Missing(f"how long the task {name} takes is not known")
    images = torch.rand(SAMPLE, 3, spec.image_size, spec.image_size, device=run.device)
    model = encoder.load(folder).to(run.device).eval()
    low = torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    with torch.inference_mode(), low:
        image_s = repeated(lambda: encoder.features(model, images)["cls"].float().cpu()) / SAMPLE
    found = {"image_s": image_s, "passes": getattr(config, "passes", 1)}
    if name == "linear":
        one = replace(config, epochs=1)
        rows = min(counts["train"], 4 * config.batch_size)
        width = model.num_features
        tables = {f: torch.randn(1, rows, width, device=run.device) for f in config.features}
        labels = torch.arange(rows) % spec.num_classes
        every = [module.Head(f, n, r) for f in config.features for n in config.norms for r in config.lrs]
        few = [module.Head(f, config.norms[0], config.lrs[0]) for f in config.features]
        per_row = [repeated(lambda h=h: module.train(tables, labels, h, spec.num_classes, one, 0, run.device)) / rows
                   for h in (every, few)]  # fmt: skip
        found["head_s"] = config.epochs * (per_row[0] + (config.head_seeds - 1) * per_row[1])  # per training image
    return found


def repeated(work, times: int = 3) -> float:
    """Median seconds of `work`, after one run that is not counted."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def reading(job) -> dict:
    """The first images of the source, decoded and encoded as the data stage does."""
    params = job.params
    if params["source"]["name"] == "hub":
        raise Missing("reading from a hub depends on the network")
    found = data.find(params["data"], params["source"])
    parts = assign(found, params["data"]).parts
    for part in parts.values():
        part[np.flatnonzero(part >= 0)[SAMPLE:]] = -1
    start, read = time.perf_counter(), 0
    for _ in data._images(found, parts, params["data"]["store_size"] or params["data"]["image_size"], 1):
        read += 1
    return {"image_s": (time.perf_counter() - start) / read}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workflow.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--results", default="results")
    args = parser.parse_args(argv)
    plan = load(args.params, args.results)
    job = plan.job(args.job)
    if plan.compute["threads"]:
        torch.set_num_threads(plan.compute["threads"])
    torch.manual_seed(keyed.key("measure"))
    try:
        counts = sizes(plan)
        found = {"counts": counts, **measure(plan, job, counts, args.steps)}
    except Missing as error:
        found = {"missing": str(error)}
    found |= {"memory_mb": round(peak_mb()), "threads": torch.get_num_threads()}
    print(json.dumps(found), file=sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
