"""Batches are a pure function of seed and step: not of threads, ranks, micro batches or what came
before.
"""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_views import GOLDEN, digest, seeded

from stages.kit import keyed
from stages.kit.data import loader, store
from stages.kit.data.decode import encode_png, square
from stages.kit.data.loader import Batches, evaluation, prefetch
from stages.kit.data.views import View, apply
from stages.kit.data.writer import SplitWriter

VIEWS = {
    "view": View(8, (0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1)),
    "other": View(6, (0.5, 1.0), flip=0.5, randaugment="rand-m9-mstd0.5-inc1"),
}


class FakeSplit:
    """What the loader needs of a store.Split: 10-pixel images, in memory or decoded one by one
    (shards).
    """

    def __init__(self, count: int = 22, shards: bool = False, labelled: bool = True) -> None:
        random = np.random.default_rng(0)
        self.pixels = random.integers(0, 256, (count, 10, 10, 3), dtype=np.uint8)
        self.labels = random.integers(0, 5, count) if labelled else np.full(count, -1)
        self.images = None if shards else self.pixels
        self.broken: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, i: int) -> np.ndarray:
        if i == self.broken:
            raise OSError(f"image {i} is broken")
        return self.pixels[i]

    def square(self, indices: np.ndarray, size: int, crop: float) -> torch.Tensor:
        assert size == 10 and crop == 1
        return torch.from_numpy(self.pixels[indices])


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def joined(parts: list[dict]) -> dict:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def whole(batches: Batches, step: int) -> dict:
    return joined([batches.batch(step, m) for m in range(batches.accumulate)])


# what a batch is


def test_a_batch_is_what_the_contract_says():
    split = FakeSplit()
    batches = Batches(split, VIEWS, 6, 3, labels=True)
    assert batches.steps_per_epoch == 3 and batches.accumulate == 1
    batch = batches.batch(4)  # epoch 1, second batch
    assert set(batch) == {"view", "view.box", "other", "other.box", "index", "row", "label"}
    index = keyed.permutation(22, 3, "order", 1)[6:12]
    assert torch.equal(batch["index"], index)
    assert torch.equal(batch["row"], torch.arange(6))
    assert (
        torch.equal(batch["label"], torch.from_numpy(split.labels)[index])
        and batch["label"].dtype == torch.int64
    )
    for name, view in VIEWS.items():
        expected = apply(
            view, torch.from_numpy(split.pixels[index.numpy()]), keyed.key(3, 1, name), index
        )
        assert torch.equal(batch[name], expected) and expected.shape == (6, 3, view.size, view.size)


def test_no_labels_unless_asked_for():
    for batch in [
        Batches(FakeSplit(), VIEWS, 6, 0).batch(0),
        *next(Batches(FakeSplit(), VIEWS, 6, 0).stream(0, 1)),
    ]:
        assert set(batch) == {"view", "view.box", "other", "other.box", "index", "row"}


def test_each_epoch_is_another_order_without_repetition():
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(FakeSplit(24), {}, 6, seed)
        return torch.cat([batches.batch(4 * epoch + step)["index"] for step in range(4)]).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(one) == list(range(24)) for one in orders)
    assert len({tuple(one) for one in orders}) == 6


def test_augmentation_differs_between_epochs_seeds_and_views():
    def image_0(seed: int, epoch: int, name: str) -> bytes:
        batches = Batches(FakeSplit(6), {"view": VIEWS["view"], "twin": VIEWS["view"]}, 6, seed)
        batch = batches.batch(epoch)
        return batch[name][batch["index"] == 0].numpy().tobytes()

    assert len({image_0(s, e, n) for s in (0, 1) for e in (0, 1) for n in ("view", "twin")}) == 8


def test_changing_the_batch_does_not_spoil_the_next():
    batches = Batches(FakeSplit(), VIEWS, 6, 3)
    first = batches.batch(0)
    first["index"].zero_()
    first["view"].zero_()
    assert batches.batch(0)["index"].any() and batches.batch(0)["view"].any()


# what a batch does not depend on


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(workers, shards):
    batches = Batches(FakeSplit(shards=shards), VIEWS, 6, 5, micro=2, workers=workers, labels=True)
    direct = Batches(FakeSplit(), VIEWS, 6, 5, micro=2, workers=0, labels=True)
    streamed = list(batches.stream(1, 8))
    assert [len(step) for step in streamed] == [3] * 7
    for step, parts in enumerate(streamed, start=1):
        for m, part in enumerate(parts):
            assert same(part, direct.batch(step, m))


@pytest.mark.parametrize("world,micro", [(1, 4), (1, 12), (2, 3), (2, 6), (3, 2), (4, 1)])
def test_ranks_and_micro_batches_only_cut_the_global_batch(world, micro):
    expected = Batches(FakeSplit(30), VIEWS, 12, 5).batch(3)
    parts = []
    for rank in range(world):
        batches = Batches(FakeSplit(30), VIEWS, 12, 5, micro=micro, rank=rank, world=world)
        assert batches.accumulate == 12 // world // micro
        parts.append(whole(batches, 3))
    assert same(joined(parts), expected)


def test_a_stream_can_start_anywhere():
    batches = Batches(FakeSplit(), VIEWS, 6, 5, workers=2)
    assert all(
        same(a[0], b[0])
        for a, b in zip(list(batches.stream(0, 7))[4:], batches.stream(4, 7), strict=True)
    )
    assert list(batches.stream(3, 3)) == []


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    list(Batches(FakeSplit(), VIEWS, 6, 5, workers=2).stream(0, 3))
    assert torch.equal(torch.get_rng_state(), state)


# views that share, follow the training, or are of other data


def test_views_of_a_batch_may_share_a_crop():
    view = View(8, (0.2, 1.0), flip=0.5, margin=2)
    recipes = {
        "view": view,
        "small": View(4, crop_of="view"),
        "t": View(8, crop_of="view", shift=2),
    }
    batch = Batches(FakeSplit(), recipes, 6, 3).batch(1)
    assert torch.equal(batch["view.box"], batch["small.box"])
    assert not torch.equal(batch["view.box"], batch["t.box"])
    alone = Batches(FakeSplit(), {"view": view}, 6, 3).batch(1)
    assert same(alone, {name: batch[name] for name in alone})


def growing(fraction: float) -> dict:
    """4 pixels in the first half of the training, then 8."""
    size = 4 if fraction < 0.5 else 8
    return {"view": View(size, (0.2, 1.0), flip=0.5), "target": View(size, crop_of="view")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_size_may_follow_the_training(workers):
    batches = Batches(FakeSplit(), growing, 6, 5, micro=3, workers=workers, epochs=4)
    streamed = list(batches.stream(0, 12))  # 4 epochs of 3 steps
    assert [parts[1]["view"].shape[-1] for parts in streamed] == [4] * 6 + [8] * 6
    assert [parts[0]["target"].shape[-1] for parts in streamed] == [4] * 6 + [8] * 6
    fixed = Batches(FakeSplit(), growing(0.9), 6, 5, micro=3)
    for step, parts in enumerate(streamed):
        for m, part in enumerate(parts):
            assert same(part, batches.batch(step, m))
            if step >= 6:  # and else nothing changes
                assert same(part, fixed.batch(step, m))
    again = batches.stream(5, 12)  # a training that was stopped after 5 steps
    assert all(same(a[0], b[0]) for a, b in zip(streamed[5:], again, strict=True))


class Clouds:
    """A recipe for point clouds: some of each sample's points, turned by an angle of its own."""

    def __init__(self, points: int) -> None:
        self.points = points

    def make(self, name: str, rows, key) -> dict:
        all_points = rows.split.points[rows.index]  # (b, n, 3)
        angle = keyed.uniform(keyed.key(key(name), "angle"), rows.index) * 6.2831853
        draws = keyed.uniform(keyed.key(key(name), "points"), rows.index, all_points.shape[1])
        chosen = draws.argsort(1)[:, : self.points, None].expand(-1, -1, 3)
        x, y, z = all_points.gather(1, chosen).unbind(2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned = torch.stack([cos * x - sin * y, sin * x + cos * y, z], 2)
        return {name: turned, f"{name}.angle": angle}


class FakeClouds:
    """A split of point clouds: no images at all."""

    def __init__(self, count: int = 22) -> None:
        self.points = keyed.normal(1, torch.arange(count), 50, 3)
        self.labels = np.arange(count) % 3

    def __len__(self) -> int:
        return len(self.labels)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world,micro", [(1, 6), (1, 2), (3, 1)])
def test_a_foreign_recipe_goes_through_workers_ranks_micro_batches_and_resume(
    workers, world, micro
):
    expected = Batches(FakeClouds(), {"cloud": Clouds(10)}, 6, 5, labels=True)
    first = expected.batch(4)
    assert set(first) == {"cloud", "cloud.angle", "index", "row", "label"}
    assert first["cloud"].shape == (6, 10, 3) and first["cloud.angle"].shape == (6,)
    ranks = [
        Batches(
            FakeClouds(),
            {"cloud": Clouds(10)},
            6,
            5,
            labels=True,
            micro=micro,
            rank=rank,
            world=world,
            workers=workers,
        )
        for rank in range(world)
    ]
    for start in (0, 4):  # from the beginning, or after a stop
        for step, parts in enumerate(
            zip(*(rank.stream(start, 7) for rank in ranks), strict=True), start
        ):
            assert same(joined([part for rank in parts for part in rank]), expected.batch(step))


def test_a_recipe_that_gives_other_names_or_counts_is_refused():
    class Odd:
        def __init__(self, **given):
            self.given = given

        def make(self, name, rows, key):
            return {key.replace("_", "."): value for key, value in self.given.items()}

    for given, message in (
        ({"index": torch.zeros(6)}, "made 'index' of 6"),
        ({"viewer": torch.zeros(6)}, "made 'viewer'"),
        ({"view": torch.zeros(5, 3)}, "made 'view' of 5 samples, expected.*6 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            Batches(FakeSplit(), {"view": Odd(**given)}, 6, 0).batch(0)
    assert "view.x" in Batches(FakeSplit(), {"view": Odd(view_x=torch.zeros(6))}, 6, 0).batch(0)


def test_images_are_decoded_once_for_all_views():
    split, calls = FakeSplit(shards=True), []
    decode = split.decode
    split.decode = lambda i: calls.append(i) or decode(i)
    Batches(split, {**VIEWS, "third": View(4, crop_of="view")}, 6, 3).batch(0)
    assert len(calls) == 6


@pytest.mark.parametrize("memmap", [True, False])
def test_masks_and_boxes_of_a_stored_split(tmp_path, memmap):
    pixels = np.repeat(np.repeat(FakeSplit(9).pixels, 2, 1), 3, 2)  # 20 x 30
    masks = pixels[..., 0] // 32
    writer = SplitWriter(tmp_path, "train", 20, ["a"], memmap=memmap, masks=True, boxes=True)
    for i, (image, mask) in enumerate(zip(pixels, masks, strict=True)):
        boxes = [(3.0, 2.0, 10.0, 8.0, k) for k in range(i % 3)]
        writer.add(f"{i}", encode_png(image), 0, square(image, 20), mask, boxes, (20, 30))
    writer.close()
    facts = {"mode": "memmap" if memmap else "shards", "store_size": 20, "classes": ["a"]}
    split = store.Split(tmp_path, "train", facts)
    view = View(10, (0.5, 1.0), flip=0.5, fields=("mask", "boxes"))
    recipes = {"view": view, "plain": View(20, fields=("mask", "boxes"))}
    expected = Batches(split, recipes, 8, 1).batch(0)
    parts = Batches(split, recipes, 8, 1, micro=2, workers=2)
    assert same(joined(next(parts.stream(0, 1))), expected)
    assert expected["view.mask"].shape == (8, 10, 10) and len(expected["view.mask"].unique()) > 5
    assert expected["plain.boxes"].shape == (8, 2, 4)
    for b, i in enumerate(expected["index"].tolist()):
        centre = masks[i][:, 5:25]
        assert torch.equal(expected["plain.mask"][b], torch.from_numpy(centre))
        assert expected["plain.classes"][b].tolist() == [*range(i % 3), -1, -1][:2]
        if i % 3:  # the box begins at column 3 of the original, and the square at column 5
            assert expected["plain.boxes"][b, 0].tolist() == [0, 2, 8, 8]


def test_a_split_without_masks_or_boxes_says_so(tmp_path):
    writer = SplitWriter(tmp_path, "train", 10, [], memmap=True)
    for i, image in enumerate(FakeSplit(6).pixels):
        writer.add(f"{i}", b"x", -1, image)
    writer.close()
    facts = {"mode": "memmap", "store_size": 10, "classes": [], "source": "folder:x"}
    split = store.Split(tmp_path, "train", facts)
    for field, what in (("mask", "masks"), ("boxes", "boxes")):
        batches = Batches(split, {"view": View(8, fields=(field,))}, 6, 0)
        with pytest.raises(ValueError, match=f"{what} are needed, but folder:x gives none"):
            batches.batch(0)


@pytest.mark.parametrize("shards", [False, True])
def test_the_same_seeds_give_the_same_batches_as_ever(shards):
    """tests/golden/pixels.json holds digests from before views could share a crop."""
    split = FakeSplit(shards=shards)
    split.pixels, split.labels = seeded(22, 10, 10).numpy(), np.arange(22) % 5
    split.images = None if shards else split.pixels
    recipes = {
        "view": View(8, (0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1)),
        "other": VIEWS["other"],
    }
    batches = Batches(split, recipes, 6, 3, micro=2, labels=True)
    parts = [part for micros in batches.stream(1, 6) for part in micros]
    names = ("view", "other", "index", "row", "label")
    found = digest(*(part[name] for part in parts for name in names))
    assert found == GOLDEN["batches shards" if shards else "batches memory"]


# the last batch


def test_drop_last():
    split = FakeSplit(22)
    assert Batches(split, {}, 6, 0).steps_per_epoch == 3
    batches = Batches(split, {}, 6, 0, micro=2, drop_last=False, workers=2)
    assert batches.steps_per_epoch == 4
    steps = list(batches.stream(0, 8))
    assert [[len(part["index"]) for part in parts] for parts in steps] == (
        [[2, 2, 2]] * 3 + [[2, 2]]
    ) * 2
    assert sorted(
        torch.cat([part["index"] for parts in steps[:4] for part in parts]).tolist()
    ) == list(range(22))
    assert Batches(FakeSplit(5), {}, 6, 0, drop_last=False).steps_per_epoch == 1


def test_evaluation_reads_everything_once_in_order():
    split = FakeSplit(11)
    for workers in (0, 2):
        batches = list(evaluation(split, 10, 4, workers))
        assert [len(index) for *_, index in batches] == [4, 4, 3]
        images, labels, index = (torch.cat(part) for part in zip(*batches, strict=True))
        assert torch.equal(index, torch.arange(11)) and torch.equal(
            labels, torch.from_numpy(split.labels)
        )
        assert torch.equal(images, torch.from_numpy(split.pixels).permute(0, 3, 1, 2).float() / 255)
        assert images.is_contiguous()


@pytest.mark.parametrize("memmap", [True, False])
def test_with_a_split_as_it_is_stored(tmp_path, memmap):
    pixels = FakeSplit(9).pixels
    writer = SplitWriter(tmp_path, "train", 10, ["a", "b"], memmap=memmap)
    for i, image in enumerate(pixels):
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "png")
        writer.add(f"{i}.png", encoded.getvalue(), i % 2, image)
    writer.close()
    facts = {"mode": "memmap" if memmap else "shards", "store_size": 10, "classes": ["a", "b"]}
    split = store.Split(tmp_path, "train", facts)
    fake = FakeSplit(9)
    fake.labels = np.arange(9) % 2
    expected = Batches(fake, VIEWS, 4, 5, labels=True)
    for step, parts in enumerate(Batches(split, VIEWS, 4, 5, labels=True, workers=2).stream(0, 4)):
        assert same(parts[0], expected.batch(step))
    found = [torch.cat(part) for part in zip(*evaluation(split, 10, 4), strict=True)]
    assert torch.equal(
        (found[0] * 255).round().to(torch.uint8), torch.from_numpy(pixels).permute(0, 3, 1, 2)
    )
    assert found[1].tolist() == fake.labels.tolist() and found[2].tolist() == list(range(9))


# errors


def test_too_few_images_say_so():
    with pytest.raises(
        ValueError, match=r"train.batch_size: 64 is more than the 22 images.*at most 22"
    ):
        _ = Batches(FakeSplit(22), {}, 64, 0, micro=8).steps_per_epoch
    with pytest.raises(ValueError, match="no optimiser step would ever be taken"):
        next(Batches(FakeSplit(22), {}, 64, 0, micro=8).stream(0, 1))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            {"batch_size": 10, "world": 4},
            r"train.batch_size: 10 images cannot be shared equally by 4.*such as 8",
        ),
        (
            {"batch_size": 12, "micro": 5},
            r"train.micro_batch: 5 does not divide the 12.*use 4, or a train.batch_size of 10",
        ),
        ({"batch_size": 12, "micro": 24}, r"train.micro_batch: 24 does not divide.*use 12"),
        ({"batch_size": 12, "micro": 8, "world": 2}, r"train.micro_batch: 8 does not divide the 6"),
        ({"batch_size": 0}, "train.batch_size"),
        ({"batch_size": 12, "micro": 0}, "train.micro_batch"),
        ({"batch_size": 12, "rank": 2, "world": 2}, "rank 2"),
        ({"batch_size": 12, "drop_last": False, "world": 2}, "drop_last"),
        ({"batch_size": 12, "views": {"label": VIEWS["view"]}}, "'label'"),
        ({"batch_size": 12, "views": {"view.box": VIEWS["view"]}}, "'view.box'.*a dot"),
        ({"batch_size": 12, "views": {"a": View(8, crop_of="b")}}, "crop_of is 'b'"),
        ({"batch_size": 12, "views": lambda fraction: VIEWS}, "follow the training need `epochs`"),
        (
            {"batch_size": 12, "labels": True, "split": FakeSplit(labelled=False)},
            r"22 of 22 images.*data.label_column",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"split": FakeSplit(), "views": {}, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        Batches(**arguments)


def test_there_is_no_such_micro_batch():
    batches = Batches(FakeSplit(), {}, 6, 0, micro=3)
    for step, m in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            batches.batch(step, m)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_out_where_its_batch_is_due(workers):
    split = FakeSplit(shards=True)
    batches = Batches(split, VIEWS, 6, 0, workers=workers)
    split.broken = int(batches.batch(2)["index"][3])
    stream = batches.stream(0, 3)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(OSError, match=f"image {split.broken} is broken"):
        next(stream)
    assert not loader_threads()


# threads


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_leaving_early_stops_the_threads():
    stream = Batches(FakeSplit(), VIEWS, 6, 0, workers=3).stream(0, 1000)
    next(stream)
    assert loader_threads()
    stream.close()
    assert not loader_threads()


def test_prefetch_is_bounded_and_runs_ahead():
    begun = []
    made = prefetch(lambda task: begun.append(task) or task, range(100), 2)
    assert next(made) == 0
    deadline = time.monotonic() + 5
    while len(begun) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(begun) == [0, 1, 2]
    assert list(made) == list(range(1, 100))


def test_prefetch_keeps_the_order_of_slow_tasks():
    def make(task: int) -> int:
        time.sleep(0.003 * (task % 3 == 0))
        return task

    assert list(prefetch(make, range(12), 3)) == list(range(12))


def test_the_caller_s_own_threads_are_not_reduced():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        list(Batches(FakeSplit(), VIEWS, 6, 0, workers=2).stream(0, 3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_order_is_computed_once_per_epoch(monkeypatch):
    loader._order.cache_clear()
    calls = []
    monkeypatch.setattr(
        keyed, "permutation", lambda n, *parts: calls.append(parts) or torch.arange(n)
    )
    list(Batches(FakeSplit(), {}, 6, 77, workers=0).stream(0, 6))
    loader._order.cache_clear()
    assert calls == [(77, "order", 0), (77, "order", 1)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory():
    assert all(t.is_pinned() for t in Batches(FakeSplit(), VIEWS, 6, 0).batch(0).values())
    assert not any(
        t.is_pinned() for t in Batches(FakeSplit(), VIEWS, 6, 0, pin=False).batch(0).values()
    )
