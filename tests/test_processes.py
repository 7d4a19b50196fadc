"""One global batch, cut in every way: into micro batches, onto two processes, both. In float64 the
losses are those of the whole batch, step by step, for every method and target in the folders; what
cannot be cut is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import test_methods
import test_targets
import torch
from torch import nn
from warm import Workers

from stages.kit import dist
from stages.kit.data.loader import Batches
from stages.kit.data.views import View
from stages.kit.train.checkpoint import Checkpoint
from stages.kit.train.history import History
from stages.kit.train.loop import Recipe, fit, refuse_cuts
from tests import tiny
from workflow.files import JobError

BATCH, IMAGES, EPOCHS = 8, 16, 3  # 6 steps
PLUGINS = [f"method/{name}" for name in test_methods.TRAINED]
PLUGINS += [f"target/{kind}" for kind in test_targets.TRAINED]
NEAR_NOUGHT = {"method/eva"}  # minus a cosine
SPEC = tiny.spec()
# where a plug-in has them
SMALL = {"drop_path": 0.3, "prototypes": 64, "hidden": 32, "bottleneck": 16, "n_local": 2}
# what a cut could break: partners, restarts, k-means in the middle of the training
CHANGES = {
    "method/supervised": {"mixup": 0.8, "cutmix": 1.0},
    # batches of 8 make its norms enlarge rounding, which a high rate would enlarge further
    "method/mocov3": {"lr": 1e-4},
    "target/mocov3": {"lr": 1e-4},
    "target/vqkd": {"vectors_per_code": 24, "kmeans_after": 0.2, "reseed": 2},
    "target/perceptual": {"vectors_per_code": 24, "kmeans_after": 0.2, "reseed": 2},
}


class Pictures:
    """A split in memory."""

    def __init__(self, size: int):
        self.images = np.random.default_rng(0).integers(
            0, 256, (IMAGES, size, size, 3), dtype=np.uint8
        )
        self.labels = np.arange(IMAGES) % 3

    def __len__(self):
        return IMAGES


class Double(Batches):
    """The same batches in the default type: float64 in those processes."""

    def batch(self, step, micro_step=0):
        found = super().batch(step, micro_step)
        dtype = torch.get_default_dtype()
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in found.items()
        }


class Stopped(nn.Module):
    """Any module, during whose given step a signal comes to rank 0."""

    def __init__(self, inner: nn.Module, stop: int | None):
        super().__init__()
        self.inner, self.stop = inner, stop
        for name in (
            "param_groups",
            "no_weight_decay",
            "before_step",
            "after_step",
            "whole_batch",
            "leaves_parameters_out",
        ):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        if hasattr(inner, "no_weight_decay"):
            self.no_weight_decay = lambda: {f"inner.{name}" for name in inner.no_weight_decay()}

    def forward(self, batch, progress):
        if progress.step == self.stop and 0 in progress.rows:  # once, on rank 0
            os.kill(os.getpid(), signal.SIGTERM)
        return self.inner(batch, progress)


def made(plugin: str):
    """(module, config, what the loop trains) of a plug-in at its sweep's size."""
    kind, name = plugin.split("/")
    module = tiny.module(name, kind)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    changes = {key: value for key, value in SMALL.items() if key in fields}
    if kind == "target":
        changes |= test_targets.CHANGES.get(name, {})
    config = module.Config(**{**changes, **CHANGES.get(plugin, {})})
    needed = module.TARGET if kind == "method" else module.UPSTREAM
    needed = needed and (tiny.needs(config, module) if kind == "method" else sorted(needed))
    target = tiny.target(SPEC, *needed) if needed else None
    torch.manual_seed(0)
    made = module.Method if kind == "method" else module.Training
    return module, config, made(config, SPEC, target)


def train(
    plugin: str,
    folder: str,
    micro: int | None = None,
    stop: int | None = None,
    precision: str = "fp32",
) -> dict:
    """Trains from, or on from, what lies in the folder; losses by step, and a digest of all that
    was learnt.
    """
    module, config, training = made(plugin)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run, split, views = tiny.run(Path(folder)), Pictures(16), module.views(config, SPEC)
    how = {"labels": bool(module.LABELS), "workers": 0, "rank": rank, "world": world}
    batches = Double(split, views, BATCH, 3, micro=micro, **how)
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "precision": precision, "save_minutes": 1e9}
    recipe = Recipe.of(dataclasses.replace(config, lr_per=None), settings, batches.steps_per_epoch)
    try:
        fit(Stopped(training, stop), batches, recipe, run, seed=3)
    except SystemExit as left:
        return {"code": left.code}
    rows = [json.loads(line) for line in (run.out / "history.jsonl").read_text().splitlines()]
    doubles = {key: value.double() for key, value in training.state_dict().items()}
    state = [(key, x.sum().item(), x.abs().sum().item()) for key, x in doubles.items()]
    return {"losses": [row["loss"] for row in rows], "state": state}


@pytest.fixture(scope="module")
def alone():
    workers = Workers(1, double=True)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def pair():
    workers = Workers(2, double=True)
    yield workers
    workers.close()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_cut_batch_gives_the_losses_of_the_whole_one(plugin, alone, pair, tmp_path):
    """Cut by accumulation, by two processes and by both, with checkpoints that change hands between
    one process and two: one process stops half-way and two go on, and the other way round.
    """
    [whole] = alone.call(train, plugin, str(tmp_path / "whole"))
    assert len(whole["losses"]) == 6 and len({round(loss, 9) for loss in whole["losses"]}) > 3
    reason, cut = getattr(made(plugin)[2], "whole_batch", None), 2
    if reason:
        with pytest.raises(RuntimeError, match="train.micro_batch: .* cannot accumulate"):
            alone.call(train, plugin, str(tmp_path / "refused"), 2)
        cut = None
    for name, first, second in (("on", alone, pair), ("off", pair, alone)):
        codes = first.call(train, plugin, str(tmp_path / name), cut, 2)
        assert all(found == {"code": 143} for found in codes)
        found = second.call(train, plugin, str(tmp_path / name))
        for result in found:
            np.testing.assert_allclose(
                result["losses"], whole["losses"], rtol=1e-9, atol=1e-9, err_msg=name
            )
            assert result["state"] == found[0]["state"], "the processes have drifted apart"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_short_run_in_bf16_stays_beside_that_in_fp32(plugin, tmp_path):
    exact, rounded = (
        train(plugin, str(tmp_path / name), precision=name)["losses"] for name in ("fp32", "bf16")
    )
    assert exact != rounded
    # bf16 has three digits; some codes flip. A loss that starts near nought has no share of itself
    small = 0.02 if plugin in NEAR_NOUGHT else 0.0
    np.testing.assert_allclose(rounded, exact, rtol=0.08, atol=small)


def noted(folder: str, state: dict | None) -> tuple[dict, dict]:
    """A history with half a row, taken over from `state` if there is one: (its own state, the row
    made of it).
    """
    dist.start()
    history = History(Path(folder) / "history.jsonl", torch.device("cpu"))
    history.restore(state)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for place in range(3):
        values = torch.tensor([0.1, 0.7]) * (place + 1) + (
            10 if state else 0
        )  # of the two halves of the batch
        history.add(
            {"loss": values.mean() if world == 1 else values[rank], "fixed": 2.0},
            BATCH // world,
            place,
        )
    return history.state(), history.row(step=6)


def test_half_a_row_of_history_changes_hands(alone, pair, tmp_path):
    (one, _), (two, _) = (
        alone.call(noted, str(tmp_path), None)[0],
        pair.call(noted, str(tmp_path), None)[0],
    )
    rows = [
        row
        for workers in (alone, pair)
        for state in (one, two)
        for _, row in workers.call(noted, str(tmp_path), state)
    ]
    assert len(rows) == 6 and all(row["fixed"] == 2 for row in rows)
    np.testing.assert_allclose([row["loss"] for row in rows], (0.8 + 10.8) / 2, rtol=1e-12)


def loaded(folder: str) -> int | str | None:
    """The step that this rank would continue with, from its own folder, or the error's message."""
    dist.start()
    try:
        state = Checkpoint(Path(folder) / os.environ["RANK"]).load()
    except JobError as error:
        return str(error)
    return state and state["step"]


def test_all_processes_continue_from_the_same_checkpoint_or_none_does(pair, tmp_path):
    """A folder for each, as on two machines; the second is damaged bit by bit."""
    assert pair.call(loaded, str(tmp_path)) == [None, None]
    for rank in "01":
        for step in (1, 2):
            Checkpoint(tmp_path / rank).save({"step": step})
    second = Checkpoint(tmp_path / "1")
    assert pair.call(loaded, str(tmp_path)) == [2, 2]
    second.path.write_bytes(b"torn")
    assert pair.call(loaded, str(tmp_path)) == [1, 1]
    second.path.unlink()
    assert pair.call(loaded, str(tmp_path)) == [1, 1]
    second.previous.unlink()
    for message in pair.call(loaded, str(tmp_path)):
        assert "not every process can read this checkpoint" in message
    second.save({"step": 3})
    assert all(
        "they found different ones" in message for message in pair.call(loaded, str(tmp_path))
    )


class Sometimes(nn.Module):
    """Uses its token in even steps only."""

    leaves_parameters_out = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.token = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, batch, progress):
        found = self.body(batch["view"].mean((2, 3)))
        return {"loss": (found + self.token if progress.step % 2 == 0 else found).square().mean()}


def train_sometimes(folder: str) -> list[float]:
    from test_loop import make_run

    run, world = make_run(Path(folder)), int(os.environ["WORLD_SIZE"])
    batches = Double(
        Pictures(4),
        {"view": View(4)},
        BATCH,
        3,
        workers=0,
        rank=int(os.environ["RANK"]),
        world=world,
    )
    fit(
        Sometimes(),
        batches,
        Recipe(EPOCHS, BATCH, batches.steps_per_epoch, lr=0.1, precision="fp32"),
        run,
        seed=3,
    )
    return [
        json.loads(line)["loss"] for line in (run.out / "history.jsonl").read_text().splitlines()
    ]


def test_a_module_may_say_that_it_leaves_parameters_out(alone, pair, tmp_path):
    [whole] = alone.call(train_sometimes, str(tmp_path / "whole"))
    for losses in pair.call(train_sometimes, str(tmp_path / "two")):
        np.testing.assert_allclose(losses, whole, rtol=1e-9)


@pytest.mark.parametrize("accumulate, world", [(2, 1), (1, 2), (2, 2)])
def test_what_cannot_be_cut_is_refused_with_the_reason(accumulate, world):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(
        ValueError, match=r"train.micro_batch: .*1 \(BatchNorm1d\) uses statistics of the batch"
    ):
        refuse_cuts(model, accumulate, world)
    refuse_cuts(model, 1, 1)
    refuse_cuts(model.eval(), accumulate, world)
    contrast = nn.Linear(4, 4)
    contrast.whole_batch = "its negatives are the other images of the batch"
    if accumulate > 1:
        with pytest.raises(ValueError, match="because its negatives are"):
            refuse_cuts(contrast, accumulate, world)
    else:
        refuse_cuts(contrast, accumulate, world)
