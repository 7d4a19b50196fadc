"""The training loop on a toy module: arithmetic of a step, resume, signals, guards, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.kit import keyed
from stages.kit.nets import ema
from stages.kit.train import checkpoint as checkpoints
from stages.kit.train import loop
from stages.kit.train.checkpoint import Checkpoint
from stages.kit.train.loop import NonFiniteError, Progress, Recipe, fit

ROOT = Path(__file__).parents[1]
IMAGES, BATCH = 24, 8


class ToyBatches:
    """What loader.Batches promises, over vectors: a pure function of (seed, step)."""

    def __init__(self, micro=BATCH, poison=None, seed=3):
        self.batch_size, self.micro, self.poison, self.seed = BATCH, micro, poison, seed
        self.accumulate, self.steps_per_epoch = BATCH // micro, IMAGES // BATCH

    def batch(self, step, micro_step=0):
        rows = torch.arange(micro_step * self.micro, (micro_step + 1) * self.micro)
        view = keyed.normal(keyed.key(self.seed, step), rows, 6)
        if step == self.poison:
            view[0, 0] = float("nan")
        return {"view": view, "index": rows, "row": rows}

    def stream(self, start, stop):
        for step in range(start, stop):
            yield [self.batch(step, micro) for micro in range(self.accumulate)]


class Toy(nn.Module):
    """Two layers with dropout, keyed noise, a momentum copy and a buffer: everything that a resume
    could lose.
    """

    def __init__(self, dropout=0.5, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.GELU(), nn.Linear(8, 1))
        layers = nn.Linear(6, 8), nn.Dropout(dropout), nn.GELU(), nn.Linear(8, 1)
        self.teacher = nn.Sequential(*layers).requires_grad_(False).eval()
        self.register_buffer("centre", torch.zeros(1))
        self.seen, self.act = [], act

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch, progress):
        self.seen.append((progress.step, progress.rows.tolist()))
        if self.act:
            self.act(progress.step)
        x = batch["view"] + 0.1 * progress.uniform("noise", 6)
        error = (self.body(x) - self.teacher(x) - self.centre - 1).square().mean()
        return {"loss": error, "half": error.detach() / 2, "fixed": 2.0}

    def after_step(self, progress):
        ema.update(self.teacher, self.body, 0.9)
        self.centre.mul_(0.9).add_(0.01)


def make_run(folder: Path) -> SimpleNamespace:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        out=folder / "out",
        work=folder / "work",
        device=torch.device("cpu"),
        compute={},
        summary={},
        job=SimpleNamespace(id="toy"),
    )


def recipe(epochs=4, **changes) -> Recipe:
    values = {
        "lr": 0.01,
        "warmup": 2,
        "weight_decay": 0.1,
        "weight_decay_end": 0.3,
        "clip": 1.0,
        "precision": "fp32",
        "save_minutes": 1e9,
    }
    return Recipe(
        epochs=epochs, batch_size=BATCH, steps_per_epoch=IMAGES // BATCH, **{**values, **changes}
    )


def state_bytes(module: nn.Module) -> dict:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in (run.out / "history.jsonl").read_text().splitlines()]


def test_fit_takes_the_steps_that_a_plain_loop_takes(tmp_path):
    torch.set_num_threads(1)
    ours, run, r = Toy(), make_run(tmp_path), recipe()
    fit(ours, ToyBatches(), r, run, seed=5)
    plain, batches = Toy().train(), ToyBatches()
    decayed = [p for p in plain.body.parameters() if p.ndim > 1]
    others = [p for p in plain.body.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others}], betas=r.betas, foreach=False
    )
    losses = []
    for step in range(r.steps):
        for group, decay in zip(
            optimizer.param_groups, (r.weight_decay_at(step, 0.1), 0.0), strict=True
        ):
            group["lr"], group["weight_decay"] = r.lr_at(step), decay
        torch.manual_seed(keyed.key(5, "dropout", step, 0))
        batch = batches.batch(step)
        progress = Progress(step, r.steps, step / 3, 5, batch["row"], torch.device("cpu"))
        loss = plain(batch, progress)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.body.parameters(), 1.0)
        optimizer.step()
        plain.after_step(progress)
        losses.append(loss.item())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["epoch"] == 4
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["lr"] for row in rows] == [r.lr_at(step) for step in range(12)] and rows[0][
        "lr"
    ] == 0
    assert all(row["fixed"] == 2 and row["half"] == pytest.approx(row["loss"] / 2) for row in rows)
    assert set(rows[0]) == {"step", "epoch", "lr", "loss", "half", "fixed", "grad_norm"}
    assert run.summary["images_seen"] == 12 * BATCH and run.summary["effective_epochs"] == 4
    assert run.summary["final_loss"] == rows[-1]["loss"] and run.summary["precision"] == "fp32"


def test_flops_per_image_counts_forward_and_backward(tmp_path):
    run = make_run(tmp_path)
    fit(Toy(), ToyBatches(), recipe(), run, seed=5)
    student = 2 * (6 * 8 + 8 * 1)  # forward of the trained layers; the teacher's is the same
    first_layer_input = 2 * 6 * 8  # the input needs no gradient
    assert run.summary["flops_per_image"] == student * 4 - first_layer_input


def test_accumulation_is_the_mean_over_the_whole_batch(tmp_path):
    whole, parts = Toy(dropout=0.0), Toy(dropout=0.0)
    fit(whole, ToyBatches(), recipe(), make_run(tmp_path / "a"), seed=5)
    fit(parts, ToyBatches(micro=2), recipe(), make_run(tmp_path / "b"), seed=5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)
    assert parts.seen[:4] == [(0, [0, 1]), (0, [2, 3]), (0, [4, 5]), (0, [6, 7])]
    assert parts.centre == whole.centre  # after_step once per optimiser step


def test_history_has_at_most_200_rows_of_means(tmp_path):
    fine, coarse = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    fit(Toy(), ToyBatches(), recipe(epochs=60), fine, seed=5)
    fit(Toy(), ToyBatches(), recipe(epochs=100), coarse, seed=5)
    assert len(rows_of(fine)) == 180
    rows = rows_of(coarse)
    assert [row["step"] for row in rows] == list(range(2, 301, 2))
    assert json.loads((coarse.out / "history.jsonl").read_text().splitlines()[0])["fixed"] == 2


@pytest.mark.parametrize("stop_at", [0, 1, 5, 10])
def test_a_signal_saves_and_the_next_start_ends_with_the_same_bytes(tmp_path, stop_at):
    straight, run = Toy(), make_run(tmp_path / "straight")
    # 300 steps: two per row, so that a stop falls between rows
    fit(straight, ToyBatches(), recipe(epochs=100), run, seed=5)

    def act(step):
        if step == stop_at and not again.work.joinpath("told").exists():
            again.work.joinpath("told").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    again = make_run(tmp_path / "again")
    stopped = Toy(act=act)
    with pytest.raises(SystemExit) as stop:
        fit(stopped, ToyBatches(), recipe(epochs=100), again, seed=5)
    assert stop.value.code == 143 and stopped.seen[-1][0] == stop_at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (again.out / "history.jsonl").exists()
    with open(again.work / "history.jsonl", "a") as file:
        file.write('{"step": 999, "a line": "after the checkpoint"')
    resumed = Toy()
    torch.manual_seed(987)
    fit(resumed, ToyBatches(), recipe(epochs=100), again, seed=5)
    assert resumed.seen[0][0] == stop_at + 1
    assert state_bytes(resumed) == state_bytes(straight)
    assert (again.out / "history.jsonl").read_bytes() == (run.out / "history.jsonl").read_bytes()
    assert again.summary["flops_per_image"] == run.summary["flops_per_image"]


def test_interrupt_exits_130(tmp_path):
    module = Toy(act=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 2 else None)
    with pytest.raises(SystemExit) as stop:
        fit(module, ToyBatches(), recipe(), make_run(tmp_path), seed=5)
    assert stop.value.code == 130


def test_a_finished_training_is_not_repeated(tmp_path):
    run = make_run(tmp_path)
    first = Toy()
    fit(first, ToyBatches(), recipe(), run, seed=5)
    before, summary = (run.out / "history.jsonl").read_bytes(), dict(run.summary)
    (run.out / "history.jsonl").unlink()
    run.summary.clear()
    second = Toy()
    fit(second, ToyBatches(), recipe(), run, seed=5)
    assert second.seen == [] and state_bytes(second) == state_bytes(first)
    assert (run.out / "history.jsonl").read_bytes() == before
    assert "utilisation" in summary and set(run.summary) == set(summary)
    assert run.summary["train_s"] == summary["train_s"]


class Epochs(nn.Module):
    """Notes the steps that end an epoch, and stops at one."""

    def __init__(self, stop=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.stop = nn.Linear(6, 1), stop
        self.register_buffer("ended", torch.zeros(12))

    def forward(self, batch, progress):
        return {"loss": self.layer(batch["view"]).square().mean()}

    def after_step(self, progress):
        self.ended[progress.step] += progress.end_of_epoch
        if progress.step == self.stop:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
def test_the_last_step_of_an_epoch_is_told_once_also_when_resumed(tmp_path, stop):
    run = make_run(tmp_path)
    if stop is not None:
        with pytest.raises(SystemExit):
            fit(Epochs(stop), ToyBatches(), recipe(), run, seed=5)
    module = Epochs()
    fit(module, ToyBatches(micro=2), recipe(), run, seed=5)
    assert module.ended.tolist() == [0, 0, 1] * 4


class Growing(ToyBatches):
    """Views whose size changes during the training."""

    def batch(self, step, micro_step=0):
        found = super().batch(step, micro_step)
        return {**found, "view": found["view"].repeat(1, 1 + step // 4)}


class Pooled(nn.Module):
    """Takes views of any size, in steps of 6."""

    def __init__(self, stop=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.stop, self.sizes = nn.Linear(6, 1), stop, []

    def forward(self, batch, progress):
        self.sizes.append(batch["view"].shape[1])
        return {"loss": (self.layer(batch["view"].unflatten(1, (-1, 6))) - 1).square().mean()}

    def after_step(self, progress):
        if progress.step == self.stop:
            signal.raise_signal(signal.SIGTERM)


def test_views_may_change_their_size_during_a_training(tmp_path):
    straight, again = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    whole, resumed = Pooled(), Pooled()
    fit(whole, Growing(), recipe(), straight, seed=5)
    assert whole.sizes == [6] * 4 + [12] * 4 + [18] * 4
    with pytest.raises(SystemExit):
        fit(Pooled(stop=5), Growing(), recipe(), again, seed=5)
    fit(resumed, Growing(), recipe(), again, seed=5)
    assert state_bytes(resumed) == state_bytes(whole) and rows_of(again) == rows_of(straight)
    first = 2 * 2 * 6  # forward and the weight's gradient, at the size of the first step
    assert straight.summary["flops_per_image"] == again.summary["flops_per_image"] == first


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    folder = Checkpoint(tmp_path)
    for step in (1, 2):
        folder.save({"step": step, "model": {"w": torch.full((100,), float(step))}})
    data = bytearray(folder.path.read_bytes())
    place = bytes(data).index(torch.full((100,), 2.0).numpy().tobytes())
    damaged = {
        "truncated": data[:-200],
        "empty": b"",
        "text": b"hello",
        "flipped": data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :],
    }[damage]
    folder.path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="unreadable checkpoint"):
        assert folder.load()["step"] == 1
    folder.previous.write_bytes(b"")
    with pytest.warns(UserWarning):
        assert folder.load() is None


def test_checkpoint_never_runs_code_and_survives_a_kill_between_its_renames(tmp_path):
    folder = Checkpoint(tmp_path)
    folder.save({"step": 1})
    folder.save({"step": 2})
    os.replace(
        folder.path, tmp_path / "gone"
    )  # killed after the old one moved away, before the new one came
    (tmp_path / "checkpoint.77.tmp").write_bytes(b"half")
    assert folder.load() == {"step": 1}
    assert not list(tmp_path.glob("*.tmp"))
    torch.save({"format": 1, "crc": 0, "state": Path("x")}, folder.path)
    with pytest.warns(UserWarning, match="weights_only|Weights only|GLOBAL"):
        assert folder.load() == {"step": 1}


def test_crc_sees_every_part():
    base = {"a": torch.arange(3), "b": [1, {"c": 2.5}], "d": None}
    seen = {
        checkpoints.crc(value)
        for value in (
            base,
            {**base, "a": torch.arange(1, 4)},
            {**base, "b": [1, {"c": 2.0}]},
            {**base, "b": [1, {"x": 2.5}]},
            {**base, "d": 0},
        )
    }
    assert len(seen) == 5 and checkpoints.crc(base) == checkpoints.crc(
        {**base, "a": torch.arange(3)}
    )


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path)
    monkeypatch.setattr(checkpoints.os, "fsync", lambda handle: None)
    monkeypatch.setattr(Checkpoint, "save", full)
    fit(Toy(), ToyBatches(), recipe(), run, seed=5)
    assert "checkpoint not written" in capsys.readouterr().err and len(rows_of(run)) == 12


def test_nan_in_the_data_names_step_and_term_and_dumps_the_batch(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(NonFiniteError) as error:
        fit(Toy(), ToyBatches(micro=2, poison=7), recipe(save_minutes=0), run, seed=5)
    message = str(error.value)
    assert (
        "step 7 of 12" in message and "half, grad_norm, loss" not in message and "half" in message
    )
    assert "non-finite numbers in view" in message and "nan-batch.pt" in message
    dump = torch.load(run.work / "nan-batch.pt", weights_only=True)
    assert dump["step"] == 7 and dump["micro"] == 0 and dump["batch"]["view"].isnan().sum() == 1
    assert not (run.out / "history.jsonl").exists()
    state = Checkpoint(run.work).load()
    assert state["step"] == 7 and all(value.isfinite().all() for value in state["model"].values())
    assert "NaN" not in (run.work / "history.jsonl").read_text()


def test_nan_gradient_of_a_finite_loss_is_found_too(tmp_path):
    class Root(Toy):
        def forward(self, batch, progress):
            found = super().forward(batch, progress)
            if progress.step == 4:
                found["loss"] = (
                    found["loss"] + (self.body[0].bias * 0).sum().sqrt()
                )  # 0, with an infinite slope
            return found

    with pytest.raises(
        NonFiniteError, match="grad_norm became NaN or infinite at step 4.*\n.*\n.*lower lr"
    ):
        fit(Root(), ToyBatches(), recipe(), make_run(tmp_path), seed=5)


def test_a_term_that_is_not_in_the_loss_is_guarded(tmp_path):
    class Extra(Toy):
        def forward(self, batch, progress):
            return {
                **super().forward(batch, progress),
                "entropy": float("inf") if progress.step == 3 else 1.0,
            }

    with pytest.raises(NonFiniteError, match="entropy became NaN or infinite at step 3"):
        fit(Extra(), ToyBatches(), recipe(), make_run(tmp_path), seed=5)


def test_a_checkpoint_is_never_written_with_a_bad_weight(tmp_path):
    class Broken(Toy):
        def after_step(self, progress):
            if progress.step == 5:
                self.body[3].weight.data[0, 0] = float("inf")

    run = make_run(tmp_path)
    with pytest.raises(NonFiniteError, match=r"weight body\.3\.weight"):
        fit(Broken(), ToyBatches(), recipe(save_minutes=0), run, seed=5)
    assert Checkpoint(run.work).load()["step"] == 5


def test_before_step_sees_gradients_and_param_groups_are_used(tmp_path):
    class Hooked(Toy):
        def param_groups(self, weight_decay):
            return [
                {
                    "params": self.body[0].parameters(),
                    "weight_decay": weight_decay,
                    "lr_scale": 0.0,
                },
                {"params": self.body[3].parameters(), "weight_decay": 0.0, "lr_scale": 1.0},
            ]

        def before_step(self, progress):
            assert self.body[3].weight.grad is not None
            self.body[3].bias.grad = None

    module, fresh = Hooked(), Hooked()
    fit(module, ToyBatches(), recipe(), make_run(tmp_path), seed=5)
    assert torch.equal(module.body[0].weight, fresh.body[0].weight)  # lr scale 0
    assert torch.equal(module.body[3].bias, fresh.body[3].bias)  # gradient taken away
    assert not torch.equal(module.body[3].weight, fresh.body[3].weight)


def test_forward_without_loss_is_an_error(tmp_path):
    class Silent(Toy):
        def forward(self, batch, progress):
            return {"los": torch.zeros(())}

    with pytest.raises(KeyError, match="without 'loss'"):
        fit(Silent(), ToyBatches(), recipe(), make_run(tmp_path), seed=5)


def test_progress_is_keyed_by_row_and_step():
    def progress(step, rows):
        return Progress(step, 10, 0.5, 3, torch.tensor(rows), torch.device("cpu"))

    whole = progress(4, [0, 1, 2, 3]).uniform("mask", 5)
    assert torch.equal(whole[2:], progress(4, [2, 3]).uniform("mask", 5))
    assert not torch.equal(whole, progress(5, [0, 1, 2, 3]).uniform("mask", 5))
    assert not torch.equal(whole, progress(4, [0, 1, 2, 3]).uniform("other", 5))
    draws = [torch.rand(3, generator=progress(4, rows).generator("mix")) for rows in ([0], [1])]
    assert torch.equal(*draws) and progress(4, [0]).fraction == 0.4


DISTRIBUTED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
from test_loop import BATCH, Toy, ToyBatches, make_run, recipe
from stages.kit import dist
from stages.kit.train.loop import fit
torch.set_num_threads(1)

class Half(ToyBatches):
    def batch(self, step, micro_step=0):
        whole, half = super().batch(step), BATCH // 4
        first = 2 * dist.rank() + micro_step
        part = slice(first * half, (first + 1) * half)
        return {{name: value[part] for name, value in whole.items()}}

batches = Half()
batches.accumulate = 2
module, run = Toy(dropout=0.0), make_run(Path({folder!r}))
fit(module, batches, recipe(), run, seed=5)
assert dist.agree(dist.rank()) == 1 and dist.gather(torch.tensor([dist.rank()])).tolist() == [0, 1]
torch.save(module.state_dict(), Path({folder!r}) / f"rank{{dist.rank()}}.pt")
dist.stop()
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    alone, run = Toy(dropout=0.0), make_run(tmp_path / "alone")
    fit(alone, ToyBatches(), recipe(), run, seed=5)
    script = tmp_path / "two.py"
    two = tmp_path / "two"
    script.write_text(
        DISTRIBUTED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(two))
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(states[0][name], value, msg=name)
        assert torch.equal(states[0][name], states[1][name])
    ours = [json.loads(line) for line in (two / "out" / "history.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in ours] == pytest.approx(
        [row["loss"] for row in rows_of(run)], rel=1e-4
    )


# --- batches that give NaN
# --------------------------------------------------------------------------------------------


class Brittle(Toy):
    """Explodes at some steps by itself, on finite images."""

    def __init__(self, at=(), **kw):
        super().__init__(**kw)
        self.at = at

    def forward(self, batch, progress):
        found = super().forward(batch, progress)
        if progress.step in self.at:
            found["loss"] = found["loss"] * (batch["view"].abs().amax() * 0 + torch.inf)
        return found


def test_the_dump_reproduces_the_error_with_the_weights_of_the_last_checkpoint(tmp_path):
    """Resumed steps are the same steps, so that the weights at the bad step can be had again, and
    with them the error.
    """
    run, bad = make_run(tmp_path), (8,)
    with pytest.raises(NonFiniteError) as first:
        fit(Brittle(bad), ToyBatches(micro=4), recipe(save_minutes=0), run, seed=5)
    assert first.value.step == 8
    dump = (run.work / "nan-batch.pt").read_bytes()
    with pytest.raises(NonFiniteError) as second:
        fit(Brittle(bad), ToyBatches(micro=4), recipe(save_minutes=0), run, seed=5)
    assert (
        str(second.value) == str(first.value) and (run.work / "nan-batch.pt").read_bytes() == dump
    )
    found = torch.load(run.work / "nan-batch.pt", weights_only=True)
    assert (found["step"], found["micro"], found["rank"], found["seed"]) == (8, 0, 0, 5) and found[
        "terms"
    ] == ["loss"]
    module, state = Brittle(bad), Checkpoint(run.work).load()
    assert (
        state["step"] == found["step"]
    )  # a checkpoint after every step: these are the weights before the bad one
    module.load_state_dict(state["model"])
    rows, steps = found["batch"]["row"], recipe().steps
    here = Progress(
        found["step"], steps, found["step"] / 3, found["seed"], rows, torch.device("cpu")
    )
    assert not module(found["batch"], here)["loss"].isfinite()
    sound = Progress(7, steps, 7 / 3, found["seed"], rows, torch.device("cpu"))
    assert module(found["batch"], sound)["loss"].isfinite()


def test_a_bad_batch_is_left_out_as_if_it_had_never_been(tmp_path):
    """Whenever checkpoints were written; the other steps keep their numbers, and the history has no
    row for it.
    """
    states = []
    for folder, minutes in (("never", 1e9), ("always", 0)):
        run = make_run(tmp_path / folder)
        module = Toy()
        fit(module, ToyBatches(poison=7), recipe(nan_skips=1, save_minutes=minutes), run, seed=5)
        assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
        assert run.summary["skipped_steps"] == [7] and run.summary["images_seen"] == 11 * BATCH
        states.append((state_bytes(module), (run.out / "history.jsonl").read_bytes()))
    assert states[0] == states[1]

    by_hand = loop._Fit(Toy(), ToyBatches(), recipe(), make_run(tmp_path / "hand"), 5)
    by_hand.skipped = [7]  # the sound batch of the same number, left out
    by_hand.train()
    assert state_bytes(by_hand.module) == states[0][0]


@pytest.mark.parametrize("minutes", [0, 1e9])
def test_leaving_out_survives_a_stop_at_any_step(tmp_path, minutes):
    straight, run = Brittle((3, 8)), make_run(tmp_path / "straight")
    fit(straight, ToyBatches(micro=4), recipe(nan_skips=2, save_minutes=minutes), run, seed=5)
    again = make_run(tmp_path / "again")
    for stop in (1, 4, 4, 9, 10):
        with pytest.raises(SystemExit):
            fit(
                Brittle((3, 8), act=stop_once(stop)),
                ToyBatches(micro=4),
                recipe(nan_skips=2, save_minutes=minutes),
                again,
                5,
            )
    resumed = Brittle((3, 8))
    fit(resumed, ToyBatches(micro=4), recipe(nan_skips=2, save_minutes=minutes), again, seed=5)
    assert state_bytes(resumed) == state_bytes(straight) and again.summary["skipped_steps"] == [
        3,
        8,
    ]
    assert (again.out / "history.jsonl").read_bytes() == (run.out / "history.jsonl").read_bytes()


def stop_once(least):
    """A signal during the first micro batch of the first step from `least` on."""
    told = []

    def act(step):
        if step >= least and not told:
            told.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    return act


def test_only_so_many_batches_are_left_out(tmp_path, capsys):
    with pytest.raises(
        NonFiniteError,
        match=r"loss became NaN or infinite at step 8.*\n.*\n.*\n.*\(1, of which 1 used\)",
    ):
        fit(Brittle((3, 8)), ToyBatches(), recipe(nan_skips=1), make_run(tmp_path), seed=5)
    said = capsys.readouterr().err
    assert "at step 3 of 12" in said and "to continue without that batch" in said


def test_a_broken_weight_is_not_blamed_on_a_batch(tmp_path):
    class Broken(Toy):
        def after_step(self, progress):
            if progress.step == 5:
                self.body[3].weight.data[0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"weight body\.3\.weight"):
        fit(Broken(), ToyBatches(), recipe(save_minutes=0, nan_skips=9), make_run(tmp_path), seed=5)


def test_a_dump_that_finds_no_room_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workflow.files.os.fsync", full)
    with pytest.raises(NonFiniteError, match="at step 8.*\n.*could not be written.*disk is full"):
        fit(Brittle((8,)), ToyBatches(), recipe(), make_run(tmp_path), seed=5)


# --- drop path


def test_drop_path_is_drawn_by_row_layer_and_step():
    from timm.layers import DropPath

    from stages.kit.train import droppath

    module = nn.ModuleList([DropPath(0.5), DropPath(0.5), DropPath(0.0)])
    ones, rows = torch.ones(64, 3), torch.arange(64)

    def drawn(layer, chosen, step=0, views=1):
        tell(Progress(step, 10, 0.0, 3, chosen, torch.device("cpu")))
        return module[layer](ones[chosen].repeat(views, 1))[:, 0]

    with droppath.keyed(module) as tell:
        whole = drawn(0, rows)
        assert set(whole.tolist()) == {0.0, 2.0} and 16 < (whole > 0).sum() < 48
        assert torch.equal(drawn(0, rows), whole)  # a forward pass that is repeated
        assert torch.equal(torch.cat([drawn(0, half) for half in (rows[:32], rows[32:])]), whole)
        assert not torch.equal(drawn(1, rows), whole) and not torch.equal(
            drawn(0, rows, step=1), whole
        )
        assert torch.equal(drawn(2, rows), ones[:, 0])
        two = drawn(0, rows, views=2)
        assert torch.equal(
            torch.cat([drawn(0, rows[:32], views=2)[:32], drawn(0, rows[32:], views=2)[:32]]),
            two[:64],
        )
        assert not torch.equal(two[:64], two[64:])
        module.eval()
        assert torch.equal(drawn(0, rows), ones[:, 0])
        module.train()
        with pytest.raises(
            ValueError, match="drop path of 0: found 3 samples, expected views of the 2 images"
        ):
            tell(Progress(0, 10, 0.0, 3, rows[:2], torch.device("cpu")))
            module[0](ones[:3])
    many = [module[0](ones).mean().item() for _ in range(20)]
    assert len(set(many)) > 1  # timm's own again
