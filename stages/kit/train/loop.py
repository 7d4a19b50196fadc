"""The one training loop: targets, students, supervised baselines, fine-tuning.

A module gives `forward(batch, progress) -> {"loss": scalar, ...other scalars}` and, if it wants,
`before_step(progress)` (after the backward pass), `after_step(progress)` (momentum teachers),
`param_groups(weight_decay)`, `no_weight_decay()`. Everything random is a function of (seed, step),
so that a checkpoint is weights, optimiser and step, and a run that was killed at any moment ends
with the bytes of one that was not. The host never waits for the device between two logging steps.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stages.kit import dist, keyed
from stages.kit.nets import attention
from stages.kit.train import compiled, droppath, flops, guard, malloc, precision
from stages.kit.train.checkpoint import Checkpoint
from stages.kit.train.display import Display
from stages.kit.train.guard import NonFiniteError
from stages.kit.train.history import History
from stages.kit.train.recipe import Progress, Recipe
from stages.kit.train.signals import Signals
from stages.kit.train.updates import Updates
from workflow.files import write_atomic

__all__ = ["NonFiniteError", "Progress", "Recipe", "fit"]

ROWS = 200  # at most so many rows of history
HISTORY = "history.jsonl"


def fit(module: nn.Module, batches, recipe: Recipe, run, seed: int) -> None:
    """Trains `module` in place and writes run.out/history.jsonl; resumes from run.work when a
    checkpoint lies there.

    Fills run.summary with final_loss, images_seen, views_seen, effective_epochs, steps, train_s,
    images_per_s, flops_per_image (FLOPs of the first step; the size of views may change after it),
    utilisation (of what large matrix products reach here, see kit/train/flops.py), precision.
    SystemExit(143 or 130) after SIGTERM or SIGINT, with a checkpoint written; NonFiniteError with
    step, term and dumped batch; ValueError if the module cannot be trained on a batch that is cut
    as `batches` does (see `refuse_cuts`).
    """
    _Fit(module, batches, recipe, run, seed).train()


class _Fit:
    def __init__(self, module: nn.Module, batches, recipe: Recipe, run, seed: int):
        self.module, self.batches, self.recipe = module, batches, recipe
        self.run, self.seed, self.device = run, seed, torch.device(run.device)
        dist.start()
        module.to(self.device).train()
        refuse_cuts(module, batches.accumulate, dist.world())
        self.precision = precision.choose(recipe.precision, self.device, module)
        if self.precision.name == "bf16":
            attention.unfused(module, self.device)
        # FLOP/s of large matrix products on all devices of the job
        self.peak = dist.world() * flops.matrix_rate(self.device, self.precision.name)
        self.updates = Updates(module, recipe, self.device, self.precision.scaler())
        self.history = History(Path(run.work) / HISTORY, self.device)
        self.checkpoint = Checkpoint(Path(run.work))
        self.seconds = self.flops = 0.0  # training time over all restarts; FLOPs per image
        self.skipped: list[int] = []  # steps left out, because they gave NaN or infinity
        self.last_save = time.monotonic()

    def train(self) -> None:
        start = self.restore()
        self.clock = time.perf_counter() - self.seconds
        if self.recipe.nan_skips and start == 0:
            self.save(0, must=True)  # there must be something to go back to
        malloc.keep_freed()
        with droppath.keyed(self.module) as draw_by, Signals() as signals:
            stepper = self.stepper(draw_by)
            while start < self.recipe.steps:
                try:
                    self.steps_from(start, stepper, signals)
                    break
                except NonFiniteError as error:
                    start = self.go_back(error)
        self.finish()

    def steps_from(self, start: int, stepper: nn.Module, signals: Signals) -> None:
        """All steps from `start` to the end."""
        recipe, every = self.recipe, max(1, -(-self.recipe.steps // ROWS))
        work = Path(self.run.work)
        display = Display(
            self.run.job.id, recipe.steps, start, recipe.batch_size, self.peak, dist.is_main(), work
        )
        stream = self.batches.stream(start, recipe.steps)
        with contextlib.closing(stream), contextlib.closing(display):
            for step, micros in enumerate(stream, start):
                if step not in self.skipped:
                    self.step(step, micros, stepper)
                done = step + 1
                if done % every == 0 or done == recipe.steps:
                    self.check()
                    self.history.row(
                        step=done, epoch=done / recipe.steps_per_epoch, lr=recipe.lr_at(step)
                    )
                display.flops_per_image = self.flops
                display.update(done, self.history.last.get("loss"))
                self.save_if_due(done, signals)

    def go_back(self, error: NonFiniteError) -> int:
        """Back to the last good checkpoint, to leave the batch at fault out; the step to continue
        with.

        The error itself if it names no batch, or if nan_skips batches have been left out. Which
        steps are left out does not depend on when checkpoints were written, since none is written
        behind a batch at fault.
        """
        if error.step is None or len(self.skipped) >= self.recipe.nan_skips:
            raise error
        skipped = sorted([*self.skipped, error.step])
        self.say(
            f"{str(error).splitlines()[0]}\n"
            "back to the last checkpoint, to continue without that batch"
        )
        start = self.restore()
        if start == 0 and not self.checkpoint.path.exists():
            raise error
        self.skipped = skipped
        return start

    def stepper(self, draw_by: Callable) -> nn.Module:
        """The module as it is called: forward, compiled if wanted, under autocast, and DDP for
        several processes.

        Buffers are not sent around: whatever moves them (codebooks, centres) is summed over the
        ranks. A module says `leaves_parameters_out = True` if some get no gradient in some steps;
        to look for them costs a walk through the graph.
        """
        call = self.module.__call__
        if compiled.wanted(self.run.compute.get("compile", False), self.device, self.recipe.steps):
            call = compiled.forward(self.module, self.say)
        stepper = _Stepper(self.module, call, draw_by, self.precision)
        if dist.world() == 1:
            return stepper
        devices = [self.device] if self.device.type == "cuda" else None
        search = getattr(self.module, "leaves_parameters_out", False)
        return DistributedDataParallel(
            stepper, device_ids=devices, broadcast_buffers=False, find_unused_parameters=search
        )

    def step(self, step: int, micros: list[dict], stepper: nn.Module) -> None:
        """One optimiser step over its micro batches."""
        self.updates.set_rates(step)
        torch.manual_seed(keyed.key(self.seed, "dropout", step, dist.rank()))
        images = sum(len(micro["row"]) for micro in micros)
        place = step * self.batches.accumulate
        for index, micro in enumerate(micros):
            batch = {key: value.to(self.device, non_blocking=True) for key, value in micro.items()}
            weight, progress = len(micro["row"]), self.progress(step, batch["row"])
            first, last = step == index == 0, index == len(micros) - 1
            counter = flops.counting() if first else contextlib.nullcontext()
            hold = contextlib.nullcontext() if last or dist.world() == 1 else stepper.no_sync()
            with counter, hold:
                loss, scalars = stepper(batch, progress)
                self.updates.backward(loss * (weight / images))
            if first:
                self.flops = counter.get_total_flops() / weight
            self.history.add(scalars, weight, place + index)
        self.updates.unscale()
        if hasattr(self.module, "before_step"):
            self.module.before_step(progress)
        norm = self.updates.step()
        if norm is not None:
            self.history.add({"grad_norm": norm}, images, place + len(micros) - 1)
        if hasattr(self.module, "after_step"):
            self.module.after_step(progress)

    def progress(self, step: int, rows: torch.Tensor) -> Progress:
        """What the module is told about this step."""
        epoch = self.recipe.steps_per_epoch
        return Progress(
            step,
            self.recipe.steps,
            step / epoch,
            self.seed,
            rows,
            self.device,
            end_of_epoch=(step + 1) % epoch == 0,
            epochs=self.recipe.epochs,
        )

    def check(self) -> None:
        """Stops with a NonFiniteError if any term was not finite since the start; waits for the
        device.
        """
        bad = self.history.bad()
        if bad:
            place, terms = bad
            step, micro = divmod(place, self.batches.accumulate)
            raise NonFiniteError(self.explain(step, micro, terms), step)

    def explain(self, step: int, micro: int, terms: list[str]) -> str:
        """The message of a NonFiniteError; writes the batch at fault, which is a function of the
        step.
        """
        recipe, batch = self.recipe, self.batches.batch(step, micro)
        tag = f"-rank{dist.rank()}" if dist.world() > 1 else ""
        facts = {"step": step, "micro": micro, "rank": dist.rank(), "seed": self.seed}
        facts |= {"terms": terms, "batch": batch}
        written = guard.dump(Path(self.run.work) / f"nan-batch{tag}.pt", facts)
        return (
            f"{self.run.job.id}: {', '.join(terms)} became NaN or infinite at step {step} of "
            f"{recipe.steps} (epoch {step / recipe.steps_per_epoch:.2f}, lr "
            f"{recipe.lr_at(step):.3g} of {recipe.lr:.3g}, clip {recipe.clip}, precision "
            f"{self.precision.name}).\n{written}\n{guard.advice(batch)}\n"
            "No checkpoint was written since; the same parameters would end here again, unless "
            f"train.nan_skips ({recipe.nan_skips}, of which {len(self.skipped)} used) lets more "
            "such batches be left out."
        )

    def save_if_due(self, done: int, signals: Signals) -> None:
        """Saves after save_minutes, at the end and at a signal; the latter ends the process."""
        due = dist.is_main() and time.monotonic() - self.last_save >= 60 * self.recipe.save_minutes
        # every rank must decide the same at the same step
        flag = dist.agree(2 * signals.number + due)
        if not flag and done < self.recipe.steps:
            return
        stop = flag // 2
        self.save(done, must=bool(stop))
        if stop:
            self.say(
                f"{signal.Signals(stop).name} at step {done} of {self.recipe.steps}; "
                "the checkpoint is written, the same command continues from it"
            )
            raise SystemExit(128 + stop)

    def save(self, done: int, must: bool) -> None:
        """Writes a checkpoint of finite weights; a full disk is an error only if it `must` be
        written.
        """
        self.check()
        broken = self.updates.broken()
        if broken is not None:
            names = [name for name, p in self.module.named_parameters() if p is broken]
            weight = f"weight {', '.join(names) or '?'}"
            raise NonFiniteError(self.explain(done - 1, self.batches.accumulate - 1, [weight]))
        self.seconds = time.perf_counter() - self.clock
        state = self.state(done)  # on every rank: the history's sums are collected
        if dist.is_main():
            try:
                self.checkpoint.save(state)
            except OSError as error:
                if must:
                    raise
                self.say(f"checkpoint not written ({error}); training goes on")
        self.last_save = time.monotonic()

    def state(self, done: int) -> dict:
        return {
            "step": done,
            "model": self.module.state_dict(),
            **self.updates.state(),
            "history": self.history.state(),
            "seconds": self.seconds,
            "flops": self.flops,
            "skipped": self.skipped,
        }

    def restore(self) -> int:
        """The step to begin with: 0, or where the newest readable checkpoint stands."""
        state = self.checkpoint.load()
        self.history.restore(state and state["history"])
        if state is None:
            return 0
        self.module.load_state_dict(state["model"])
        self.updates.load(state)
        self.seconds, self.flops, self.skipped = state["seconds"], state["flops"], state["skipped"]
        self.say(f"continuing at step {state['step']} of {self.recipe.steps}")
        return state["step"]

    def finish(self) -> None:
        """History and summary, from what was kept: right also where no step was left to take."""
        recipe = self.recipe
        if dist.is_main():
            write_atomic(Path(self.run.out) / HISTORY, self.history.text)
        split = getattr(self.batches, "split", range(recipe.steps_per_epoch * recipe.batch_size))
        # a last batch may be short
        seen = min(recipe.steps * recipe.batch_size, recipe.epochs * len(split))
        seen -= len(self.skipped) * recipe.batch_size
        summary = {
            "final_loss": self.history.last.get("loss"),
            "images_seen": seen,
            "views_seen": seen * recipe.views_per_image,
            "effective_epochs": seen * recipe.views_per_image / len(split),
            "steps": recipe.steps,
            "train_s": round(self.seconds, 2),
            "precision": self.precision.name,
            "images_per_s": round(seen / max(self.seconds, 1e-9), 2),
            "flops_per_image": self.flops,
        }
        if self.peak and self.seconds:
            summary["utilisation"] = round(self.flops * seen / self.seconds / self.peak, 4)
        if self.skipped:
            summary["skipped_steps"] = self.skipped
        self.run.summary.update(summary)
        dist.barrier()

    def say(self, text: str) -> None:
        if dist.is_main():
            print(f"{self.run.job.id}: {text}", file=sys.stderr, flush=True)


def refuse_cuts(module: nn.Module, accumulate: int, world: int) -> None:
    """ValueError if cutting a batch into `accumulate` micro batches and `world` processes changes
    the module's loss.

    A loss that is a mean over images stays the same. A module whose loss compares the images of a
    batch with each other sets `whole_batch` to the reason: it then gets all images of a process at
    once (and sees those of other processes by `dist.gather`). torch's BatchNorm normalises by
    whatever it is given, so it must be given the batch.
    """
    pieces = []
    if reason := getattr(module, "whole_batch", None):
        pieces.append((reason, accumulate))
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            count = accumulate * (1 if isinstance(layer, nn.SyncBatchNorm) else world)
            pieces.append((f"{name} ({type(layer).__name__}) uses statistics of the batch", count))
    for reason, count in pieces:
        if count > 1:
            raise ValueError(
                f"train.micro_batch: {type(module).__name__} cannot accumulate {accumulate} micro "
                f"batches in {world} process(es), because {reason}: the result would not be that "
                "of the whole batch. Leave micro_batch null (with several processes: one), or "
                "choose a smaller train.batch_size."
            )


class _Stepper(nn.Module):
    """Forward, which is `call`, under autocast.

    It gives the loss and what is logged, detached: DDP must not look for gradients of that.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable,
        draw_by: Callable,
        arithmetic: precision.Precision,
    ):
        super().__init__()
        self.module, self.call, self.draw_by, self.arithmetic = module, call, draw_by, arithmetic

    def forward(self, batch: dict, progress: Progress) -> tuple[torch.Tensor, dict]:
        self.draw_by(progress)
        with self.arithmetic.autocast():
            scalars = self.call(batch, progress)
        if "loss" not in scalars:
            raise KeyError(
                f"{type(self.module).__name__}.forward returned {sorted(scalars)} without 'loss'"
            )
        loss = scalars["loss"].float()
        return loss, {
            name: value.detach() if isinstance(value, torch.Tensor) else value
            for name, value in {**scalars, "loss": loss}.items()
        }
