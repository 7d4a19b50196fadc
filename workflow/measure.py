"""What a unit of one job's work costs on this machine: what workflow/cost.py multiplies.

Needs params.yaml only: images are noise, teachers and encoders untrained, but of the right size.
The work is that of the stages: steps of kit/train/loop.py, features of tasks/_features.py, the
heads of the tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from stages.kit.nets.teacher import Teacher

from stages import data, methods, targets, tasks
from stages.kit import keyed
from stages.kit.data import store
from stages.kit.data.loader import Batches
from stages.kit.job.device import resolved
from stages.kit.job.provenance import peak_mb
from stages.kit.nets import encoders as encoder
from stages.kit.spec import Spec, configure
from stages.kit.train import compiled
from stages.kit.train.loop import Recipe, fit
from stages.sources import SPLITS
from stages.sources._splits import assign
from stages.tasks import _features
from workflow.machine import cores

POOL = 256  # different images of noise; as many are encoded at once by tasks/_features.py
WARM = 2  # first steps: what they do once is not done again by later ones
STEPS = 6  # steps that are timed, spread over the schedules of a whole training
ENOUGH_S = 2.0  # after so many seconds of them 3 do
IMPORTED_MB = peak_mb()  # a fork's memory leaves out the code of libraries
SAMPLE = 64  # images read from a source, or looked at by a target


class Missing(RuntimeError):
    """A job whose cost cannot be measured here, and why."""


class Clocks:
    """Seconds that work takes alone on `threads` cores, whatever else this machine does meanwhile.

    Other load lengthens what the wall clock shows, but neither the work of the thread that trains
    nor the work of all threads, the loader's among them, which share the cores: on a CPU the longer
    of the two is the time. A GPU works while no thread does: there it is the wall clock's.
    """

    def __init__(self, device: torch.device, threads: int):
        self.device, self.threads = device, threads

    def now(self) -> np.ndarray:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.thread_time(), time.process_time()])

    def alone(self, spent: np.ndarray) -> float:
        """From the difference of two `now`."""
        wall, own, everyone = spent.tolist()
        return max(own, everyone / self.threads) if self.device.type == "cpu" else wall

    def taken(self, work: Callable) -> float:
        before = self.now()
        work()
        return self.alone(self.now() - before)


class Noise(store.Split):
    """A split of `count` images of noise that holds only a few of them, stored as the data stage
    stores them.
    """

    def __init__(self, count: int, size: int, counts: dict):
        self.size, self.labels = size, np.arange(count) % max(1, counts["classes"])
        self.pool = np.random.default_rng(0).integers(
            0, 256, (min(POOL, count), size, size, 3), np.uint8
        )
        self.images = self if counts["mode"] == "memmap" else None
        self.files = None if self.images else [_jpeg(image) for image in self.pool]

    def __getitem__(self, index) -> np.ndarray:
        return self.pool[index % len(self.pool)]

    def encoded(self, i: int) -> bytes:
        return self.files[i % len(self.files)]


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg")
    return buffer.getvalue()


class Timed(Batches):
    """Batches that note the time when each step of the training began, and end when enough of them
    have.
    """

    def stream(self, start_step: int, stop_step: int) -> Iterator[list]:
        self.began, self.done = [], 0
        for micros in super().stream(start_step, stop_step):
            self.began.append(self.clocks.now())
            timed = self.began[WARM:]
            if len(timed) > 3 and self.clocks.alone(timed[-1] - timed[0]) > ENOUGH_S:
                return
            yield micros
            self.done += 1


def measured(plan, id: str, counts: dict | None, threads: int) -> dict:
    """The units of a job: {"missing": why}, or {"counts", "memory_mb"} and what workflow/cost.py
    knows to multiply.

    To be called in a fork that has done nothing yet, so that its memory is its own. `counts`: as
    `sizes` finds them, if that was asked before.
    """
    processes, forked_mb = plan.processes(id), peak_mb()
    torch.set_num_threads(max(1, threads // processes))
    torch.manual_seed(keyed.key("measure"))
    try:
        with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            counts = counts or sizes(plan)
            found = Job(plan, plan.jobs[id], counts, Path(folder)).units()
    except Missing as error:
        return {"missing": str(error)}
    except Exception as error:  # of any plug-in: the other jobs can be measured
        return {"missing": f"measuring failed: {type(error).__name__}: {error}"}
    return {
        "counts": counts,
        **found,
        "memory_mb": round(processes * (IMPORTED_MB + peak_mb() - forked_mb)),
    }


def sizes(plan) -> dict:
    """{"train", "val", "test": images, "classes", "mode"}: from data.json, or as the source lists
    them.
    """
    folder = plan.jobs["data"].output
    if (folder / "data.json").is_file():
        facts = store.info(folder)
        counts = {split: facts["splits"].get(split, {"count": 0})["count"] for split in SPLITS}
        return counts | {"classes": len(facts["classes"]), "mode": facts["mode"]}
    params = plan.jobs["data"].params
    if params["source"]["name"] == "hub":
        raise Missing("the number of images is known once `python -m stages.data` has fetched them")
    found = data.find(params["data"], params["source"])
    parts = assign(found, params["data"]).parts.values()
    counts = {
        split: sum(int((part == k).sum()) for part in parts) for k, split in enumerate(SPLITS)
    }
    fits = sum(counts.values()) * side(plan) ** 2 * 3 <= params["data"]["memory_map_gb"] * 1e9
    return counts | {"classes": len(found.classes), "mode": "memmap" if fits else "shards"}


def side(plan) -> int:
    """Of the stored squares, in pixels."""
    params = plan.jobs["data"].params["data"]
    return params["store_size"] or params["image_size"]


class Job:
    """One job to be measured. It stands for the job's Run (kit/job/job.py) too, where the stages'
    functions want that.
    """

    def __init__(self, plan, job, counts: dict, folder: Path):
        self.plan, self.job, self.counts, self.out, self.work = (
            plan,
            job,
            counts,
            folder,
            folder / "work",
        )
        self.work.mkdir()
        self.device = torch.device(resolved(plan.compute["device"]))
        self.compute, self.summary = dict(plan.compute), {}
        self.clocks = Clocks(self.device, torch.get_num_threads())

    def units(self) -> dict:
        return getattr(self, self.job.stage)()

    def spec(self) -> Spec:
        params, counts = self.job.params, self.counts
        return Spec(
            params["image_size"],
            params["model"],
            (0.5,) * 3,
            (0.25,) * 3,
            counts["classes"],
            counts["train"],
        )

    def split(self, count: int = POOL) -> Noise:
        return Noise(count, side(self.plan), self.counts)

    def report(self) -> dict:
        return {}

    def data(self) -> dict:
        """The first images of the source, decoded and encoded as the data stage does."""
        params = self.job.params
        if params["source"]["name"] == "hub":
            raise Missing("reading from a hub depends on the network")
        found = data.find(params["data"], params["source"])
        parts = assign(found, params["data"]).parts
        for part in parts.values():
            part[np.flatnonzero(part >= 0)[SAMPLE:]] = -1
        threads = self.compute["threads"] or min(cores(), 8)
        images = data._images(found, parts, side(self.plan), threads)
        count, clocks = (
            sum(int((part >= 0).sum()) for part in parts.values()),
            Clocks(torch.device("cpu"), threads),
        )
        return {"image_s": clocks.taken(lambda: list(images)) / count}

    def target(self) -> dict:
        """Steps of its training, if it has any, and a look at images, as for its health."""
        params, spec = self.job.params, self.spec()
        kind = targets.find(params["target"]["kind"])
        config = configure(kind.Config, params["target"]["config"])
        found = {}
        if hasattr(kind, "Training"):
            training = kind.Training(
                config, spec, teacher(self.plan, self.job, spec, self.device)
            ).to(self.device)
            found = self.training(
                training, kind.views(config, spec), config, params["train"], bool(kind.LABELS)
            )
            target = targets.pin(training.target)
        else:
            target = target_of(self.plan, self.job, spec, self.device)
        images = torch.rand(SAMPLE, 3, spec.image_size, spec.image_size, device=self.device)
        return found | {"image_s": self.repeated(lambda: target(images)) / SAMPLE}

    def pretrain(self) -> dict:
        """Steps of its training, if it has any; "encoder": a digest that tells encoders of another
        kind apart.
        """
        params, spec = self.job.params, self.spec()
        module = methods.find(params["method"]["name"])
        config = configure(module.Config, params["method"]["config"])
        method = module.Method(config, spec, teacher(self.plan, self.job, spec, self.device)).to(
            self.device
        )
        found = {}
        if module.TRAINS:
            found = self.training(
                method, module.views(config, spec), config, params["train"], bool(module.LABELS)
            )
        encoder.save(method.encoder, self.out / "encoder", spec)
        return found | {
            "encoder": hashlib.sha256((self.out / "encoder/config.json").read_bytes()).hexdigest()
        }

    def transfer(self) -> dict:
        """Fine-tuning: a few steps. Probes: the frozen encoder on some images, and an epoch of the
        linear heads.
        """
        name, spec = self.job.params["task"]["name"], self.spec()
        if name not in ("knn", "linear", "finetune"):
            raise Missing(f"how long the task {name} takes is not known")
        task = tasks.find(name)
        config = configure(task.Config, self.job.params["task"]["config"])
        above = next(self.plan.jobs[id] for id in self.job.inputs if id.startswith("pretrain/"))
        folder = self.out / "encoder"
        encoder.save(untrained(self.plan, above, spec), folder, spec)
        if name == "finetune":
            return self.finetune(task, config, folder, spec)
        passes = getattr(config, "passes", 1)
        augment = (1, config.crop_min, 0) if passes > 1 else None
        found = {
            "image_s": self.extraction(folder, spec, config.precision, augment),
            "passes": passes,
        }
        found["features"] = config.precision
        if name == "linear":
            found["head_s"] = self.heads(
                task, config, encoder.load(folder).num_features, spec.num_classes
            )
        return found

    def finetune(self, task, config, folder: Path, spec: Spec) -> dict:
        world, images = self.plan.processes(self.job.id), self.counts["train"]
        batch = min(config.batch_size, images - images % (2 * world))
        train = {**self.job.params["train"], "epochs": config.epochs, "batch_size": batch}
        train["micro_batch"] = task.micro_batch(batch // world, train["micro_batch"])
        classifier = task.Classifier(folder, config, spec.num_classes)
        found = self.training(
            classifier, {"view": task.view(config, spec.image_size)}, config, train, True
        )
        split, size = self.split(train["micro_batch"]), spec.image_size
        classifier.to(self.device)
        look = self.repeated(
            lambda: task.predict(classifier, split, slice(None), self, size, len(split))
        )
        return found | {"epochs": config.epochs, "batch_size": batch, "image_s": look / len(split)}

    def training(self, module, views, config, train: dict, labels: bool) -> dict:
        """A few real steps of the loop: their lower quartile, as other load also takes the caches
        from them; and what is done but once, before, after and within them.
        """
        world = self.plan.processes(self.job.id)
        split = self.split(max(train["batch_size"], POOL))
        micro, workers = train["micro_batch"], self.compute["workers"]
        batches = Timed(
            split,
            views,
            train["batch_size"],
            0,
            micro=micro,
            labels=labels,
            workers=workers,
            world=world,
        )
        batches.clocks = self.clocks
        whole = train["epochs"] * (self.counts["train"] // train["batch_size"])
        self.compute["compile"] = compiled.wanted(self.compute["compile"], self.device, whole)
        recipe = Recipe.of(config, train, batches.steps_per_epoch)
        recipe = replace(recipe, epochs=1, steps_per_epoch=WARM + STEPS + 1, save_minutes=1e9)
        all_s = self.clocks.taken(lambda: fit(module, batches, recipe, self, 0))
        step_s = self.clocks.alone(np.quantile(np.diff(batches.began, axis=0)[WARM:], 0.25, axis=0))
        found = {"step_s": step_s, "once_s": max(0.0, all_s - batches.done * step_s)}
        return found | {"flops_per_image": self.summary["flops_per_image"]}

    def extraction(self, folder: Path, spec: Spec, precision: str, augment: tuple | None) -> float:
        """Seconds for the features of one image, without those to load the encoder."""

        def work(count: int) -> float:
            images = _features._images(
                self.split(count), spec.image_size, POOL, augment, self.compute["workers"]
            )
            return self.clocks.taken(
                lambda: _features._extract(folder, images, self.out, self.device, precision)
            )

        few = min(work(8), work(8))
        return max(0.0, work(POOL) - few) / (POOL - 8)

    def heads(self, task, config, width: int, classes: int) -> float:
        """Seconds for all heads and epochs per training image: the sweep, then a few of them for
        each further seed.
        """
        rows = min(self.counts["train"], 4 * config.batch_size)
        tables = {name: torch.randn(1, rows, width, device=self.device) for name in config.features}
        labels = torch.arange(rows) % classes
        every = [
            task.Head(f, n, lr) for f in config.features for n in config.norms for lr in config.lrs
        ]
        few = [task.Head(f, config.norms[0], config.lrs[0]) for f in config.features]
        one = replace(config, epochs=1)

        def epoch(heads: list) -> float:
            return self.repeated(
                lambda: task.train(tables, labels, heads, classes, one, 0, self.device)
            )

        return config.epochs * (epoch(every) + (config.head_seeds - 1) * epoch(few)) / rows

    def repeated(self, work: Callable, times: int = 3) -> float:
        """Median seconds of `work`, after one run that is not counted."""
        work()
        return statistics.median(self.clocks.taken(work) for _ in range(times))


def teacher(plan, job, spec: Spec, where: torch.device) -> torch.nn.Module | None:
    """What the job learns from."""
    for id in job.inputs:
        if id.startswith("target/"):
            return target_of(plan, plan.jobs[id], spec, where)
        if id.startswith("pretrain/"):
            return Teacher(untrained(plan, plan.jobs[id], spec), spec).to(where)
    return None


def target_of(plan, job, spec: Spec, where: torch.device) -> torch.nn.Module:
    """The target that a job makes: finished, if it is there, else untrained."""
    if plan.fresh(job.id):
        return targets.load(job.output, where)
    kind = targets.find(job.params["target"]["kind"])
    target = kind.Target(configure(kind.Config, job.params["target"]["config"]), spec)
    if hasattr(target, "prepare"):
        raise Missing(
            f"the weights of {job.id} are not here yet: run `python -m stages.target --name {job.name}`"
        )
    return targets.pin(target.to(where))


def untrained(plan, job, spec: Spec) -> torch.nn.Module:
    """The encoder that a pretraining job exports, before it trains."""
    module = methods.find(job.params["method"]["name"])
    config = configure(module.Config, job.params["method"]["config"])
    return module.Method(config, spec, teacher(plan, job, spec, torch.device("cpu"))).encoder
