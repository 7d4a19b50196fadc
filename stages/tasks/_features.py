"""Frozen features, extracted once per encoder and shared by every task that only needs those.

They lie in work/features/<fingerprint of the pretraining>/<digest>/ as one .npy file per kind, and
are memory-mapped: a data set's features never have to fit in memory. The digest covers whatever
alters a feature (the encoder's bytes, the data's hash, split, image size, precision, device kind,
augmentation and the code that makes them), so an entry is never wrong, only unused. A file lock
lets parallel tasks extract an entry once; an entry appears by a rename, whole or not at all. The
folder may be deleted whenever nothing runs, and keeps itself under `KEEP_BYTES` by dropping what
was used longest ago.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from stages.kit import keyed
from stages.kit.data import loader, store, views
from stages.kit.nets import attention, encoders, hybrid

KEEP_BYTES = 16 << 30
CODE = (attention, encoders, hybrid, keyed, loader, store, views)


def frozen(
    encoder_dir: Path,
    data_dir: Path,
    run,
    split: str,
    *,
    image_size: int,
    precision: str = "fp32",
    augment: tuple[int, float, int] | None = None,
    batch_size: int = 256,
) -> dict[str, torch.Tensor]:
    """Features of all images of a split, in its order: {"cls": (N, D), "patch": (N, D)}, fp32, on
    the CPU.

    "cls" is the class token (the patches' mean if the encoder has none) and "patch" the mean patch
    token, both after the encoder's final norm. The encoder is in eval mode and under
    inference_mode. With `augment` = (passes, smallest crop area, seed) every image is seen `passes`
    times through a random crop and flip, a pure function of seed, pass and image, and the tensors
    are (passes, N, D). `precision` is "fp32" or "bf16" (autocast; results are stored in fp32).
    Tensors are copy-on-write views of the cached files. Raises FileNotFoundError naming a missing
    encoder or split.
    """
    encoder_dir, data_dir = Path(encoder_dir), Path(data_dir)
    what = {
        "encoder": _digest(encoder_dir),
        "data": store.info(data_dir)["hash"],
        "split": split,
        "size": image_size,
        "precision": precision,
        "device": run.device.type,
        "augment": augment,
        "torch": torch.__version__,
        "code": hashlib.sha256(
            b"".join(Path(m.__file__).read_bytes() for m in CODE) + Path(__file__).read_bytes()
        ).hexdigest(),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(run.work).parent / "features"
    entry = root / _fingerprint(encoder_dir) / digest
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_suffix(".lock")):
        if not entry.is_dir():
            part = entry.with_name(f".{digest}")
            shutil.rmtree(part, ignore_errors=True)  # of a task that was killed
            part.mkdir()
            try:
                workers = run.compute.get("workers", 1)
                images = _images(
                    store.Split.open(data_dir, split), image_size, batch_size, augment, workers
                )
                _extract(encoder_dir, images, part, run.device, precision)
                (part / "what.json").write_text(json.dumps(what, indent=1))
                os.rename(part, entry)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            with _locked(root / "prune.lock"):
                _prune(root, keep=entry)
        os.utime(entry)
        return {
            path.stem: torch.from_numpy(np.load(path, mmap_mode="c"))
            for path in sorted(entry.glob("*.npy"))
        }


@torch.inference_mode()
def _extract(encoder_dir: Path, images, folder: Path, device: torch.device, precision: str) -> None:
    """Writes cls.npy and patch.npy; `images` as `_images` gives them."""
    encoder = encoders.load(encoder_dir).to(device).eval()
    if precision == "bf16":
        attention.unfused(encoder, device)
    mean = torch.tensor(encoder.pretrained_cfg["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(encoder.pretrained_cfg["std"], device=device).view(3, 1, 1)
    shape, batches = images
    files: dict[str, np.ndarray] = {}
    for place, batch in batches:
        batch = (batch.to(device, non_blocking=True) - mean) / std
        low = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with low:
            tokens = encoders.features(encoder, batch)
        for name, values in (
            ("cls", tokens["cls"].float()),
            ("patch", tokens["patch"].float().mean(1)),
        ):
            if name not in files:
                files[name] = open_memmap(
                    folder / f"{name}.npy",
                    mode="w+",
                    dtype=np.float32,
                    shape=(*shape, values.shape[1]),
                )
            files[name][place] = values.cpu().numpy()
    for file in files.values():
        file.flush()


def _images(
    split, size: int, batch_size: int, augment: tuple[int, float, int] | None, workers: int
):
    """The leading shape of the split's table, and an iterator of (place in it, images in [0, 1])."""
    if augment is None:
        batches = loader.evaluation(split, size, batch_size, workers)
        placed = (
            (slice(int(index[0]), int(index[-1]) + 1), images) for images, _, index in batches
        )
        return (len(split),), placed
    passes, crop_min, seed = augment
    view = views.View(size=size, scale=(crop_min, 1.0), flip=0.5)

    def make(task: tuple[int, int]):
        number, start = task
        index = torch.arange(start, min(start + batch_size, len(split)))
        images = [split.decode(i) for i in index.tolist()]
        pictures = views.apply(view, images, keyed.key(seed, number, "features"), index)
        return (number, slice(start, start + len(index))), pictures

    tasks = (
        (number, start) for number in range(passes) for start in range(0, len(split), batch_size)
    )
    return (passes, len(split)), loader.prefetch(make, tasks, workers)


def _fingerprint(encoder_dir: Path) -> str:
    """The pretraining job's fingerprint; of an encoder from elsewhere, the digest of its files."""
    manifest = encoder_dir.parent / "manifest.json"
    return (
        json.loads(manifest.read_text())["fingerprint"]
        if manifest.is_file()
        else _digest(encoder_dir)
    )


def _digest(encoder_dir: Path) -> str:
    if not (encoder_dir / "config.json").is_file():
        raise FileNotFoundError(f"{encoder_dir}: no encoder here (config.json, model.safetensors)")
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with open(encoder_dir / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True):
    """Holds a lock on a file; with wait=False yields False when another process holds it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: better to run than not to
        yield True


def _prune(root: Path, keep: Path) -> None:
    """Drops the entries used longest ago until the rest fit `KEEP_BYTES`; one that is being opened
    stays.

    A task that has an entry mapped keeps its data: a deleted file lives as long as its last user.
    """
    entries = sorted(
        (p.parent for p in root.glob("*/*/what.json")), key=lambda p: p.stat().st_mtime
    )
    size = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    for entry in entries:
        if sum(size.values()) <= KEEP_BYTES:
            return
        if entry != keep:
            with _locked(entry.with_suffix(".lock"), wait=False) as mine:
                if mine:
                    shutil.rmtree(entry, ignore_errors=True)
                    size.pop(entry)
