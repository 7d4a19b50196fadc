"""A rehearsal: the stage of a job is run as it is, on few images for one epoch, then on more.

The job's seconds are then taken to be

    fixed + once * images + epoch * images * epochs

with the images of train; val and test shrink in proportion. `once` is what is done for each image
whatever the epochs (reading, encoding, testing). `fixed` includes what only a first run does, such
as compiling. No stage is imitated, so that all that a plug-in does is counted.

Where steps grow (kit/growth.py), one epoch would see the first part of the training only. There all
runs have LONG epochs or more of one step each, which show the parts in proportion.

The images are the first of each split, repeated where a batch needs more. What a job learns from is
what earlier rehearsals made: of the right size, though hardly trained. Each task makes its features
anew, also those that another task on the same encoder leaves in fact.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from stages import data, pretrain, target, transfer
from stages.kit.data import store
from stages.kit.data.store import SPLITS
from stages.kit.data.writer import SplitWriter
from stages.kit.growth import Growth
from stages.kit.job.device import resolved
from stages.kit.job.job import Run
from stages.kit.job.process import set_threads
from stages.kit.spec import configure
from stages.kit.train import compiled
from stages.sources._splits import assign
from workflow import machine, plugins
from workflow.files import write_json
from workflow.manifest import Manifest

WORK = {"target": target.build, "pretrain": pretrain.pretrain, "transfer": transfer.transfer}
FEW = 64  # images at first, of a job without a batch size
LEAST = 8  # images of val and of test, where there are so many
MOST = 64  # times as many images or epochs as at first
LONG = 10  # epochs of a rehearsal whose steps grow
QUICK = 5  # batches in the second run of a quick rehearsal
ENOUGH_S = 1.0  # by which a longer run must exceed the first, and by a quarter of that


class NotKnown(RuntimeError):
    """Why a job cannot be rehearsed here."""

    plain = True


@dataclass(frozen=True)
class Cost:
    """Of one job, without the start of its process.

    images: trained on, over all epochs; of a job that trains nothing, those of its data set
    flops: of its training; None where it has none
    seconds: alone, on as many cores as it has threads
    memory_mb: of all its processes
    missing: why nothing is known; "" if it is
    """

    images: int = 0
    flops: float | None = None
    seconds: float = 0.0
    memory_mb: float = 0.0
    missing: str = ""


class Rehearsal:
    """Of one job. made: {id: folder} of what jobs make in rehearsals, this one's too; folder: a
    temporary one; quick: a coarse one, see `coarse`.
    """

    def __init__(self, plan, job, made: dict[str, Path], folder: Path, quick: bool = False):
        self.plan, self.job, self.made, self.folder = plan, job, made, folder
        self.quick = quick
        threads = machine.threads(plan.compute["threads"], machine.cores())
        if job.stage == "data":  # it reads with more than Snakemake counts
            threads = plan.compute["threads"] or min(machine.cores(), 8)
        self.compute, self.world = {**plan.compute, "threads": threads}, plan.processes(job.id)
        self.clock = Clock(resolved(plan.compute["device"]), threads)

    def cost(self) -> Cost:
        """What the job will take, but for its memory."""
        how, train = settings(self.job.params), self.counts["train"]
        batch, epochs = min(how.get("batch_size", FEW), train), how.get("epochs", 1)
        few, least = max(1, batch // self.world), LONG if self.growth else 1
        first, summary = self.timed(few, least)
        trained = "steps" in summary
        if self.quick:
            return self.coarse(few, least, first, summary)
        if not trained and self.job.stage != "transfer":
            epochs = 1  # of a training that there is not
        again = first if first > 10 * ENOUGH_S else self.timed(few, least)[0]
        most = max(epochs, 2 * LONG) if self.growth else epochs
        epoch = slope(lambda n: self.timed(few, n)[0], again, least, most) / few
        both = slope(lambda n: self.timed(n, least)[0], again, few, train)
        once, passed = max(0.0, both - epoch * least), train // batch * batch * epochs
        fixed = first - few * (once + epoch * least)
        seconds = max(first, fixed + once * train + epoch * passed / self.world)
        if trained:
            seen = self.seen(batch, epochs)
            return Cost(seen, seen * summary["flops_per_image"], seconds)
        return Cost(0 if self.job.stage == "pretrain" else sum(self.counts.values()), None, seconds)

    def coarse(self, few: int, least: int, first: float, summary: dict) -> Cost:
        """The cost from the first run, and of a training from two more of a few steps each.

        What is done once for each image counts as done in each epoch of a training. A job that
        trains nothing is taken to need as much for every image as for the first ones, which is too
        much where a part of its time is fixed. Images and FLOPs are exact, but for FLOPs
        where steps grow at other shares of a training than tenths.
        """
        how, train = settings(self.job.params), self.counts["train"]
        if "steps" not in summary:
            cost = Cost(0 if self.job.stage == "pretrain" else sum(self.counts.values()))
            return replace(cost, seconds=first * max(1.0, train / few))
        batch, epochs = min(how.get("batch_size", FEW), train), how.get("epochs", 1)
        passed = train // batch * batch * epochs
        again, more = self.timed(few, least)[0], min(train, QUICK * few)
        each = self.timed(more, least)[0] - again if more > few else again
        each /= least * (more - few or few)
        seconds = first + max(0.0, each) * max(0.0, passed / self.world - few * least)
        seen = self.seen(batch, epochs)
        return Cost(seen, seen * summary["flops_per_image"], seconds)

    @cached_property
    def growth(self) -> tuple:
        """The pairs of kit/growth.py of a method whose steps grow, else ()."""
        if self.job.stage != "pretrain":
            return ()
        method = self.job.params["method"]
        config = plugins.module("method", method["kind"]).Config
        return getattr(configure(config, method["config"]), "growth", ())

    def seen(self, batch: int, epochs: int) -> int:
        """Images that a training sees, every epoch anew."""
        steps = self.counts["train"] // batch * epochs
        return Growth(self.growth, steps).before(steps) * batch

    @cached_property
    def counts(self) -> dict[str, int]:
        """Images in each split of the job's data set: as its source lists them, or data.json."""
        if "data" in self.job.inputs:
            facts = store.info(self.output(self.job.inputs["data"]))
            return {split: about["count"] for split, about in facts["splits"].items()}
        params = self.job.params
        if plugins.module("source", params["source"]["name"]).ARGUMENT == "NAME":
            raise NotKnown(f"its images are elsewhere; `{self.job.command}` fetches them")
        parts = assign(data.find(params["data"], params["source"]), params["data"]).parts.values()
        counts = [sum(int((part == k).sum()) for part in parts) for k in range(len(SPLITS))]
        return {split: count for split, count in zip(SPLITS, counts, strict=True) if count}

    def timed(self, images: int, epochs: int) -> tuple[float, dict]:
        """(seconds, summary) of the job with so many images of train and epochs."""
        share = images / self.counts["train"]
        sizes = {s: min(n, max(LEAST, round(n * share))) for s, n in self.counts.items()}
        sizes["train"] = images
        plan, results = copy.copy(self.plan), Path(tempfile.mkdtemp(dir=self.folder)) / "results"
        plan.jobs = {id: replace(job, output=results / id) for id, job in self.plan.jobs.items()}
        plan.results = results
        for id in self.job.inputs.values():
            source = self.output(id)
            if self.plan.jobs[id].stage == "data":
                source = repeated(source, self.folder / f"{images}", sizes)
            placed = plan.jobs[id]
            shutil.copytree(source, placed.output, copy_function=os.symlink)
            placed.manifest.unlink(missing_ok=True)
            placed.manifest.write_text(Manifest(fingerprint=placed.fingerprint).text())

        params, compute = copy.deepcopy(self.job.params), dict(self.compute)
        how = settings(params)
        if "batch_size" in how:
            steps = how.get("epochs", 1) * self.counts["train"] // how["batch_size"]
            wanted = compiled.wanted(compute["compile"], self.clock.device, steps)
            compute["compile"] = wanted and not self.quick  # compiling alone would take a minute
            how["batch_size"] //= self.world  # of one process
        if "epochs" in how:
            how["epochs"] = epochs
        job = replace(plan.jobs[self.job.id], params=params)
        work = results.parent / "work" / job.fingerprint
        for folder in (job.output, work):
            folder.mkdir(parents=True)
        set_threads(compute["threads"] // self.world or 1)
        with ExitStack() as held:
            run = Run(job, plan, job.output, work, compute, _held=held)
            before = self.clock.now()
            if job.stage == "data":
                about = (params["data"], params["source"])
                data.build(*about, run.out, run.work, compute["threads"], limits=sizes)
            else:
                WORK[job.stage](run)
            seconds = self.clock.since(before)
        self.keep(run.out)
        shutil.rmtree(results.parent)
        return seconds, run.summary

    def keep(self, output: Path) -> None:
        """Leaves the output for later rehearsals; a data set's facts have the true counts."""
        made = self.made[self.job.id]
        shutil.rmtree(made, ignore_errors=True)
        shutil.move(output, made)
        if self.job.stage == "data":
            facts = store.info(made)
            for split, count in self.counts.items():
                facts["splits"][split]["count"] = count
            write_json(made / "data.json", facts)

    def output(self, id: str) -> Path:
        """What a job makes: in a rehearsal, else in fact. NotKnown if it has made nothing."""
        if self.made[id].is_dir():
            return self.made[id]
        if self.plan.fresh(id):
            return self.plan.jobs[id].output.resolve()
        raise NotKnown(f"it needs {id}, which is not known")


def settings(params: dict) -> dict:
    """The part of a job's parameters that has its epochs and batch size, if there are any."""
    return params["task"]["config"] if "task" in params else params.get("train", {})


def slope(seconds: Callable[[int], float], first: float, least: int, most: int) -> float:
    """Seconds per unit beyond `least` units, which take `first`.

    From runs of more and more units, at most `most`, until one takes so much longer that the
    difference can be trusted.
    """
    units, more, enough, most = least, 0.0, ENOUGH_S + first / 4, min(most, MOST * least)
    while units < most and more < enough:
        factor = min(16.0, max(1.5, 1.5 * enough / more)) if more > 0 else 4.0
        further = (units - least) * factor if units > least else least
        units = min(most, least + round(further))
        more = seconds(units) - first
    return max(0.0, more) / max(1, units - least)


def repeated(source: Path, folder: Path, sizes: dict[str, int]) -> Path:
    """A data set of these sizes, in `folder` unless it is there: the images of `source` again and
    again.
    """
    if folder.is_dir():
        return folder
    facts = store.info(source)
    for name, size in sizes.items():
        split, has = store.Split.open(source, name), facts["splits"][name]["fields"]
        kinds = {kind: kind in has for kind in ("masks", "boxes")}
        squares = split.images is not None
        writer = SplitWriter(folder, name, split.size, split.classes, memmap=squares, **kinds)
        for i in (i % len(split) for i in range(size)):
            image, encoded = (split.images[i], b"") if squares else (None, split.encoded(i))
            mask = split.mask(i) if kinds["masks"] else None
            boxes = split.boxes(i) if kinds["boxes"] else ()
            writer.add(str(i), encoded, int(split.labels[i]), image, mask, boxes)
        writer.close()
        facts["splits"][name]["count"] = size
    write_json(folder / "data.json", facts)
    return folder


class Clock:
    """Seconds that work takes alone on `threads` cores, whatever else the machine does meanwhile.

    Other load lengthens the time on the wall, but neither the work of the thread that trains nor
    the work of all threads, which share the cores: on a CPU the longer of the two is the time. A
    GPU works while no thread does, so there it is the time on the wall.
    """

    def __init__(self, device: str, threads: int):
        self.device, self.threads = torch.device(device), threads

    def now(self) -> tuple[float, float, float]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter(), time.thread_time(), time.process_time()

    def since(self, before: tuple[float, float, float]) -> float:
        wall, own, every = (b - a for a, b in zip(before, self.now(), strict=True))
        return wall if self.device.type == "cuda" else max(own, every / self.threads)
