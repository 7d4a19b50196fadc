"""Full fine-tuning of an encoder with labels: how good an initialisation the pretraining gives.

The recipe of the MAE and BEiT line (arXiv:2111.06377, 2106.08254, 2208.06366; facebookresearch/mae,
main_finetune.py): mean patch token, new LayerNorm, linear head; AdamW with layer-wise rate decay
(kit/train/optim.py), drop path, RandAugment, mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899)
on every batch with label smoothing inside the mixed labels, cosine per step after a linear warm-up.
A random encoder put through it is training from scratch with the same recipe and budget.

Departures. Defaults are for small images and sets: rate 1e-3 at batch 256, layer decay 0.75, 50
epochs, crops of at least half the area, RandAugment of magnitude 6, no erasing (published at 224 px
for ViT-B: 100 epochs, lr 5e-4 per 256, layer decay 0.65, crop_min 0.08, rand-m9-mstd0.5-inc1, erase
0.25). Images 2j and 2j + 1 of a batch are mixed with each other, not the first with the last, so
that partners stay together however a batch is cut into micro batches and processes; in a shuffled
batch the pairs are as random. Boxes of CutMix have the size of timm's and their place drawn alike;
the label's share is the area really kept. The last epoch is reported; official code prints the best
one on the test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit import dist, keyed
from stages.kit.data import loader, store
from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.job.job import JobError
from stages.kit.nets import encoders
from stages.kit.train import loop, optim
from stages.tasks import SPLITS, labelled, save_predictions, score, unseen
from workflow import checks

LABELS = True
SPREADS = True  # over compute.processes


@dataclass(frozen=True)
class Config:
    """lr: peak at a batch of lr_per (None: as it is); warmup: fraction of all steps; pool: "avg" =
    patch mean, "token" = class token; mixup, cutmix: alpha of their Beta distributions (0 = off),
    switch: probability of CutMix if both are on, mixup_prob: that a batch is mixed at all;
    smoothing: of labels; randaugment: timm's notation; crop_min: least area of a crop (1 = centre
    square); erase: probability of random erasing; save_model: keep the classifier as a timm folder.
    """

    epochs: int = 50
    batch_size: int = 256
    lr: float = 1e-3
    lr_per: int | None = 256
    min_lr: float = 1e-6
    warmup: float = 0.1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    clip: float | None = None
    layer_decay: float = 0.75
    drop_path: float = 0.1
    pool: Literal["avg", "token"] = "avg"
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    mixup_prob: float = 1.0
    smoothing: float = 0.1
    randaugment: str | None = "rand-m6-mstd0.5-inc1"
    crop_min: float = 0.5
    flip: float = 0.5
    erase: float = 0.0
    save_model: bool = False

    def __post_init__(self):
        checks.within(self, "[1, inf)", "epochs")
        checks.within(self, "[2, inf)", "batch_size")
        checks.within(self, "[0, 1]", "switch", "mixup_prob", "flip", "erase")
        checks.within(self, "[0, 1)", "warmup", "drop_path", "smoothing")
        checks.within(self, "(0, 1]", "layer_decay", "crop_min")
        checks.within(self, "[0, inf)", "mixup", "cutmix", "min_lr", "weight_decay")
        checks.within(self, "(0, inf)", "lr")
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size: found {self.batch_size}, expected an even number (images are mixed in pairs)"
            )


def view(config: Config, size: int) -> View:
    """The training view."""
    scale = (config.crop_min, 1.0)
    return View(size, scale, flip=config.flip, randaugment=config.randaugment, erase=config.erase)


def kept(config: Config, height: int, width: int, *key: int | str) -> torch.Tensor:
    """What share of its own image each pixel keeps, (H, W) in [0, 1], a function of the arguments.

    Mixup: one Beta(mixup, mixup) number everywhere. CutMix: 1 outside and 0 inside a box of sides
    sqrt(1 - l) times the image's with l from Beta(cutmix, cutmix), its centre uniform and its rim
    cut off at the image's, as in timm. 1 if the batch is not mixed. The mean is the share of the
    label that the image keeps, corrected for the cut-off rim by itself.
    """
    random = np.random.default_rng(keyed.key(*key, "mix"))
    mix, cut, row, column = random.random(4)
    share = torch.ones(height, width)
    if mix >= config.mixup_prob or not (config.mixup or config.cutmix):
        return share
    if config.cutmix and (not config.mixup or cut < config.switch):
        side = (1 - random.beta(config.cutmix, config.cutmix)) ** 0.5
        across = []
        for place, size in ((row, height), (column, width)):
            centre, half = int(place * size), int(size * side) // 2
            across.append(slice(max(centre - half, 0), centre + half))
        share[tuple(across)] = 0
        return share
    return share.fill_(random.beta(config.mixup, config.mixup))


def mixed(
    images: torch.Tensor, labels: torch.Tensor, classes: int, share: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W), labels (B,), share (H, W) of `kept` -> mixed images, soft labels (B, K).

    Image 2j is mixed with 2j + 1 and the other way round, so B must be even. With smoothing s a
    label is s / K everywhere and 1 - s more at its class. Rows sum to 1.
    """

    def partner(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    part = share.mean()
    target = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    target.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
    return images * share + partner(images) * (1 - share), target * part + partner(target) * (
        1 - part
    )


class Classifier(nn.Module):
    """An encoder with a linear head, as kit/train/loop.py trains it."""

    def __init__(self, encoder_dir, config: Config, classes: int):
        super().__init__()
        self.config, self.classes = config, classes
        self.model = encoders.classifier(
            encoder_dir, classes, pool=config.pool, drop_path=config.drop_path
        )
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, K)."""
        return self.model((images - self.mean) / self.std).float()

    def forward(self, batch: dict, progress) -> dict:
        images, labels = batch["view"], batch["label"]
        images, target = mixed(
            images, labels, self.classes, self.share(images, progress), self.config.smoothing
        )
        logits = self.logits(images)
        loss = -(target * F.log_softmax(logits, 1)).sum(1).mean()
        return {"loss": loss, "agreement": (logits.argmax(1) == target.argmax(1)).float().mean()}

    @eager  # it reads the step
    def share(self, images: torch.Tensor, progress) -> torch.Tensor:
        """`kept` of this step, on the images' device."""
        return kept(self.config, *images.shape[-2:], progress.seed, progress.step).to(images.device)

    def param_groups(self, weight_decay: float) -> list[dict]:
        # Relative-position tables: decayed as in BEiT's official fine-tuning, though timm would
        # spare them; a
        # Swin's are spared, as in SimMIM's.
        depths = encoders.depths(self.model)
        spared = self.model.no_weight_decay() if len(depths) > 1 else set()
        return optim.layer_decay_groups(
            self.model, depths, self.config.layer_decay, weight_decay, spared
        )


class Subset:
    """Some rows of a split, as the loader reads a split: for training on the labelled images alone."""

    images = None  # so that the loader asks for one image at a time

    def __init__(self, split, rows: torch.Tensor):
        self.split, self.rows, self.labels = split, rows.tolist(), split.labels[rows.numpy()]

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, i: int) -> np.ndarray:
        return self.split.decode(self.rows[i])


@torch.inference_mode()
def predict(
    classifier: Classifier, split, rows: torch.Tensor, run, size: int, batch: int
) -> torch.Tensor:
    """Class scores (n, K) of the rows of a split under the evaluation transform, fp32, on the CPU."""
    classifier.eval()
    batches = loader.evaluation(split, size, batch, run.compute.get("workers", 1))
    return torch.cat([classifier.logits(images.to(run.device)).cpu() for images, _, _ in batches])[
        rows
    ]


def run(encoder_dir, data_dir, config: Config, run, seed: int, spec) -> dict:
    """Trains; metrics of the last epoch on test, accuracy on val; writes predictions.npz,
    history.jsonl.

    Under torchrun every process trains and the first one evaluates; the others get {}.
    """
    splits = {name: store.Split.open(data_dir, name) for name in SPLITS}
    rows, labels = {}, {}
    for name, split in splits.items():
        rows[name], labels[name] = labelled(split)
    train = splits["train"]
    if len(rows["train"]) < len(train):
        train = Subset(train, rows["train"])
    batch = min(config.batch_size, len(train) - len(train) % (2 * dist.world()))
    if not batch:
        need = 2 * dist.world()
        raise JobError(
            f"tasks.finetune: needs {need} labelled training images or more, found {len(train)}"
        )
    settings = {**run.job.params["train"], "epochs": config.epochs, "batch_size": batch}
    settings["micro_batch"] = micro = micro_batch(batch // dist.world(), settings["micro_batch"])
    how = {"workers": run.compute.get("workers", 1), "rank": dist.rank(), "world": dist.world()}
    views = {"view": view(config, spec.image_size)}
    order = keyed.key(seed, "finetune")
    batches = loader.Batches(train, views, batch, order, micro=micro, labels=True, **how)
    torch.manual_seed(keyed.key(seed, "finetune", "head"))
    classifier = Classifier(encoder_dir, config, spec.num_classes)
    recipe = loop.Recipe.of(config, settings, batches.steps_per_epoch)
    loop.fit(classifier, batches, recipe, run, seed)
    if not dist.is_main():
        return {}

    classifier.to(run.device)
    val = predict(classifier, splits["val"], rows["val"], run, spec.image_size, micro)
    scores = predict(classifier, splits["test"], rows["test"], run, spec.image_size, micro)
    save_predictions(run, rows["test"], labels["test"], scores.argmax(1))
    if config.save_model:
        encoders.save(classifier.model, run.out / "classifier", spec)
    return {
        **score(scores, labels["test"]),
        "n_test": len(labels["test"]),
        "n_train": len(train),
        "protocol": "fine-tuning",
        "split": "test",
        "feature": "patch" if config.pool == "avg" else "cls",
        "norm": "LayerNorm",
        "lr": recipe.lr,
        "epochs": config.epochs,
        "epoch": "last",
        "batch_size": batch,
        "layer_decay": config.layer_decay,
        "drop_path": config.drop_path,
        "seed": seed,
        "k": None,
        "T": None,
        "classes_unseen": unseen(labels["train"], labels["test"], store.info(data_dir)),
        "val": {"last epoch": score(val, labels["val"])["top1"]},
    }


def micro_batch(share: int, limit: int | None) -> int:
    """The largest even number up to `limit` (None: any) that divides a process's even share of the
    batch.
    """
    return max(m for m in range(2, share + 1, 2) if share % m == 0 and m <= max(limit or share, 2))
