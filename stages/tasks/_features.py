"""Frozen features, extracted once per encoder and shared by every task that only needs those.

They lie in work/features/<fingerprint of the pretraining>/<digest>/ as one .npy file per kind, and
are memory-mapped: a data set's features never have to fit in memory. The digest covers whatever
alters a feature (the encoder's bytes, the data's hash, split, image size, precision, device kind,
augmentation, what is asked for, and the code that makes them), so an entry is never wrong, only
unused. A file lock lets parallel tasks extract an entry once; an entry appears by a rename, whole
or not at all. The folder may be deleted whenever nothing runs, and keeps itself under `KEEP_BYTES`
by dropping what was used longest ago.

Images of another size than the pretraining's. The encoder is loaded at the size of the task's data
set, with the mean and standard deviation of its own pretraining. Its tables of positions are
resized by timm. `positions: bicubic` and `positions: dino` resize them as official codes do
(kit/nets/positions.py). timm's way:

- absolute positions (ViT, ConvViT): bicubic with antialiasing, the patches' alone. MAE's and
  iBOT's code has no antialiasing, and with it torch takes another bicubic kernel, so a larger grid
  differs slightly too. MAE's sin-cos table is resized like any other, as in its code;
- relative tables (BEiT): the old offsets are placed on a geometric progression, which is dense for
  near patches, as in BEiT's own code. Between them timm is linear and BEiT's code cubic (by scipy's
  interp2d, which no longer exists). The three entries of the class token are copied in both;
- Swin: the windows keep their size, so its tables stay as they are and there are more windows, as
  in its code. Only a grid smaller than a window makes that window, and the table, smaller. Swin V2
  computes its bias from coordinates, so nothing is resized.
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
from stages.kit.data import loader, views
from stages.kit.nets import attention, encoders
from stages.tasks import Trial
from workflow.closure import closure
from workflow.manifest import Manifest
from workflow.plugins import ROOT

KEEP_BYTES = 16 << 30


def frozen(
    trial: Trial,
    split: str,
    *,
    precision: str = "fp32",
    augment: tuple[int, float, int] | None = None,
    tokens: bool = False,
    taps: tuple[int, ...] = (),
    norm: bool = False,
    crop: float = 1.0,
    positions: str = "timm",
    batch_size: int = 256,
) -> dict[str, torch.Tensor]:
    """Features of all images of a split of the task's data, in its order; float32, on the CPU.

    "cls" (N, D) is the class token (the patches' mean if the encoder has none) and "patch" (N, D)
    the mean patch token, both after the encoder's final norm. On request, besides:
    tokens: "tokens" (N, T, D), every patch token, row by row;
    taps: the same of inner blocks (1 = after the first, counted over all stages), "cls.3",
    "patch.3" and with `tokens` "tokens.3". They are the blocks' raw states, as BEiT probes them;
    with `norm` they go through the encoder's final norm, as in DINO's last four blocks. T and D are
    those of their stage.

    The encoder is in eval mode and under inference_mode. It sees the middle `crop` of the centre
    square's side (1: all of it, published: 0.875). With `augment` = (passes, smallest crop
    area, seed) every image is seen `passes` times through a random crop and flip, a pure function
    of seed, pass and image, and the tensors are (passes, N, ...). `precision` is "fp32" or "bf16"
    (autocast; results are stored in float32). Tensors are copy-on-write views of the cached files.
    Raises FileNotFoundError naming a missing encoder or split, ValueError for taps that there are
    not or, with `norm`, of another width.
    """
    run, size, taps = trial.run, trial.spec.image_size, tuple(sorted(set(taps)))
    asked = {"tokens": tokens, "taps": taps, "norm": norm}
    what = asked | {
        "encoder": _digest(trial.encoder),
        "data": trial.info["hash"],
        "mode": trial.info["mode"],  # crops are of the stored square, or of the whole image
        "split": split,
        "size": size,
        "precision": precision,
        "device": run.device.type,
        "augment": augment,
        "crop": crop,
        "positions": positions,
        "torch": torch.__version__,
        "code": _code(trial.spec.kind),
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(run.work).parent / "features"
    entry = root / _fingerprint(trial.encoder) / digest
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_suffix(".lock")):
        if not entry.is_dir():
            part = entry.with_name(f".{digest}")
            shutil.rmtree(part, ignore_errors=True)  # of a task that was killed
            part.mkdir()
            try:
                workers = run.compute.get("workers", 1)
                images = _images(trial.open(split), size, batch_size, augment, workers, crop)
                encoder = encoders.load(trial.encoder, positions, img_size=size)
                encoder = encoder.to(run.device).eval()
                if precision == "bf16":
                    attention.unfused(encoder, run.device)
                _extract(encoder, images, part, run.device, precision, **asked)
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


def probed(trial: Trial, split: str, block: int | None, **how) -> dict[str, torch.Tensor]:
    """ "cls" and "patch" of `frozen`: after the final norm, or the raw states after an inner block
    (1 is the first, counted over all stages).
    """
    if block is None:
        return frozen(trial, split, **how)
    found = frozen(trial, split, taps=(block,), **how)
    return {name: found[f"{name}.{block}"] for name in ("cls", "patch")}


@torch.inference_mode()
def _extract(
    encoder, images, folder: Path, device: torch.device, precision: str, tokens, taps, norm
) -> None:
    """Writes an .npy file of each kind of feature; `images` as `_images` gives them."""
    mean = torch.tensor(encoder.pretrained_cfg["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(encoder.pretrained_cfg["std"], device=device).view(3, 1, 1)
    shape, batches = images
    files: dict[str, np.ndarray] = {}
    for place, batch in batches:
        batch = (batch.to(device, non_blocking=True) - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            states = _states(encoder, batch, taps, norm)
        for end, state in states.items():
            dense = state["patch"].float()
            kinds = {"cls": state["cls"].float(), "patch": dense.mean(1)}
            for kind, values in (kinds | ({"tokens": dense} if tokens else {})).items():
                name = f"{kind}{end}"
                if name not in files:
                    files[name] = open_memmap(
                        folder / f"{name}.npy",
                        mode="w+",
                        dtype=np.float32,
                        shape=(*shape, *values.shape[1:]),
                    )
                files[name][place] = values.cpu().numpy()
    for file in files.values():
        file.flush()


def _states(encoder, images: torch.Tensor, taps: tuple, norm: bool) -> dict[str, dict]:
    """{"": {"cls", "patch"} after the final norm, ".3": those after block 3, ...}."""
    if not taps:
        return {"": encoders.features(encoder, images)}
    last = encoders.masked(encoder, images, None, None, taps=taps)
    states = {"": last}
    for tap, state in last["taps"].items():
        width = last["tokens"].shape[-1]
        if norm and state.shape[-1] != width:
            raise ValueError(
                f"taps: block {tap} is {state.shape[-1]} wide, expected {width} for the final norm"
            )
        state = encoder.norm(state) if norm else state
        states[f".{tap}"] = encoders.split(encoder, state)
    return states


def _images(
    split,
    size: int,
    batch_size: int,
    augment: tuple[int, float, int] | None,
    workers: int,
    crop: float,
):
    """The leading shape of the split's table, and (place in it, images in [0, 1]) one by one."""
    if augment is None:
        batches = loader.evaluation(split, size, batch_size, workers, crop)
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


def _code(family: str) -> str:
    """A digest of the code that makes features with a family of encoders."""
    files = closure(["stages/tasks/_features.py", f"stages/encoders/{family}.py"], ROOT)
    return hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()


def _fingerprint(encoder_dir: Path) -> str:
    """The pretraining job's fingerprint; of an encoder from elsewhere, the digest of its files."""
    manifest = Manifest.read(encoder_dir.parent / "manifest.json")
    return manifest.fingerprint if manifest else _digest(encoder_dir)


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
