"""Sets larger than memory: training from Parquet shards holds a few batches, whatever the set, and
resumes in an epoch.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn
from warm import Workers

from stages.kit.data import store
from stages.kit.data.loader import Batches
from stages.kit.data.views import View
from stages.kit.data.writer import SplitWriter
from stages.kit.train.loop import Recipe, fit

BATCH, SIDE = 8, 160  # pixels; 77 kB an image, decoded and encoded


def write(folder: Path, count: int) -> int:
    """A data set of `count` images of noise in shards of 4 MB; its bytes."""
    writer = SplitWriter(folder, "train", SIDE, [], memmap=False, shard_bytes=4 << 20)
    noise = np.random.default_rng(0)
    for i in range(count):
        image, file = noise.integers(0, 256, (SIDE, SIDE, 3), np.uint8), io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=0)
        writer.add(f"{i}.png", file.getvalue(), -1, image)
    writer.close()
    facts = {
        "mode": "shards",
        "store_size": SIDE,
        "classes": [],
        "splits": {"train": {"count": count}},
    }
    (folder / "data.json").write_text(json.dumps(facts))
    return sum(file.stat().st_size for file in folder.glob("*.parquet"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{images: (folder, bytes)} of a small and a large set."""
    base = tmp_path_factory.mktemp("shards")
    return {count: (base / str(count), write(base / str(count), count)) for count in (80, 640)}


class Mean(nn.Module):
    """Predicts the mean colour; a signal comes in the given step."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.body, self.stop = nn.Linear(8 * 8 * 3, 3), stop
        nn.init.zeros_(self.body.weight)
        nn.init.zeros_(self.body.bias)

    def forward(self, batch, progress):
        if progress.step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        x = batch["view"] + 0.1 * progress.uniform("noise", 3, 8, 8)
        return {"loss": (self.body(x.flatten(1)) - batch["view"].mean((2, 3))).square().mean()}


def train(
    data: Path, folder: Path, workers: int, epochs: int = 1, stop: int | None = None
) -> bytes:
    """The weights at the end."""
    from test_loop import make_run

    view = View(8, scale=(0.3, 1.0), flip=0.5)
    batches = Batches(
        store.Split.open(data, "train"), {"view": view}, BATCH, seed=1, workers=workers
    )
    module, run = Mean(stop), make_run(folder)
    fit(
        module,
        batches,
        Recipe(epochs, BATCH, batches.steps_per_epoch, lr=0.01, precision="fp32"),
        run,
        seed=1,
    )
    return module.body.weight.detach().numpy().tobytes()


def resident(name: str) -> int:
    """Memory of this process in bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def growth(data: str, folder: str) -> int:
    """Bytes by which a process grows at most while it trains on all images once."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    train(Path(data), Path(folder), workers=2)
    return resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_memory_does_not_grow_with_the_set(sets, tmp_path):
    """Files that are mapped count too."""
    found = {}
    for count, (data, _) in sets.items():
        process = Workers(1, double=False)
        [found[count]] = process.call(growth, str(data), str(tmp_path / str(count)))
        process.close()
    more = sets[640][1] - sets[80][1]
    assert more > 40e6 and found[640] - found[80] < more / 8, found


@pytest.mark.parametrize("stop", [3, 10, 24])
def test_a_training_stopped_within_an_epoch_continues_to_the_same_bytes(
    sets, tmp_path, stop, monkeypatch
):
    """10 steps are an epoch; the second start has another number of workers, which drive each
    other's shards out.
    """
    monkeypatch.setattr(store, "OPEN_SHARDS", 1)
    data, runs = sets[80][0], (tmp_path / "straight", tmp_path / "stopped")
    straight = train(data, runs[0], workers=0, epochs=3)
    with pytest.raises(SystemExit, match="143"):
        train(data, runs[1], workers=2, epochs=3, stop=stop)
    assert train(data, runs[1], workers=1, epochs=3) == straight
    first, second = ((run / "out" / "history.jsonl").read_bytes() for run in runs)
    assert first == second
