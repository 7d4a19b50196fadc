"""Full fine-tuning of an encoder with labels: how good an initialisation the pretraining gives.

The recipe of the MAE and BEiT line (arXiv:2111.06377, 2106.08254, 2208.06366; facebookresearch/mae,
main_finetune.py): mean patch token, new LayerNorm, linear head; AdamW with layer-wise rate decay
(kit/train/optim.py), drop path, RandAugment, mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899)
on every batch with label smoothing inside the mixed labels, cosine per step after a linear warm-up.
A random encoder put through it is training from scratch with the same recipe and budget.

Departures. Defaults are for small images and sets: rate 1e-3 at batch 256, layer decay 0.75, 50
epochs of which a tenth warms up, crops of at least half the area, RandAugment of magnitude 6, no
erasing (`PUBLISHED` has MAE's). Neighbours in a batch are mixed with each other, see
kit/train/mixing.py. The share of a mixed label is the area really kept. The last epoch is reported;
official code prints the best one on the test set.

Images have `input_size`, or the size of the task's data set. Positions are resized to it as
tasks/_features.py says. Mean and standard deviation are those of the pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.kit import dist, keyed
from stages.kit.data import loader
from stages.kit.data.batches import Subset
from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets import encoders
from stages.kit.train import loop, mixing, optim
from stages.tasks import Trial
from stages.tasks._classify import Labelled, accuracy, save, unseen
from workflow import checks

HEADLINE = ("top1", "top-1 accuracy", "%")
NEEDS = {"labels"}
SPREADS = True  # over compute.processes


# MAE's ViT-B at 224 px
PUBLISHED = {
    "epochs": 100,
    "batch_size": 1024,
    "lr": 5e-4,
    "warmup": 0.05,
    "layer_decay": 0.65,
    "crop_min": 0.08,
    "randaugment": "rand-m9-mstd0.5-inc1",
    "erase": 0.25,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.SizedCrop):
    epochs: int = 50
    batch_size: int = 256
    lr_per: int | None = 256
    min_lr: float = 1e-6
    warmup: float = 0.1
    layer_decay: float = 0.75
    drop_path: float = 0.1
    pool: Literal["avg", "token"] = "avg"  # what the head reads: mean of patches, or class token
    mixup: float = 0.8  # alpha of the Beta distribution; 0: off
    cutmix: float = 1.0  # the same
    switch: float = 0.5  # probability of CutMix where both are on
    mixup_prob: float = 1.0  # probability that a batch is mixed at all
    smoothing: float = 0.1  # of labels
    randaugment: str | None = "rand-m6-mstd0.5-inc1"  # timm's notation
    crop_min: float = 0.5  # 1: the centre square
    erase: float = 0.0  # probability of random erasing
    save_model: bool = False  # keep the classifier, as a timm folder

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "epochs")
        checks.within(self, "[2, inf)", "batch_size")
        checks.within(self, "[0, 1]", "switch", "mixup_prob", "erase")
        checks.within(self, "[0, 1)", "drop_path", "smoothing")
        checks.within(self, "(0, 1]", "layer_decay")
        checks.within(self, "[0, inf)", "mixup", "cutmix")
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size: found {self.batch_size}, expected an even number (images are mixed "
                "in pairs)"
            )


def view(config: Config, size: int) -> View:
    """The training view."""
    scale = (config.crop_min, 1.0)
    return View(size, scale, flip=config.flip, randaugment=config.randaugment, erase=config.erase)


def kept(config: Config, height: int, width: int, *key: int | str) -> torch.Tensor:
    """What share of its own image each pixel keeps, (H, W) in [0, 1], a function of the arguments.

    Mixup: one Beta(mixup, mixup) number everywhere. CutMix: 1 outside and 0 inside a box for a
    share from Beta(cutmix, cutmix), its centre uniform. 1 if the batch is not mixed.
    """
    random = np.random.default_rng(keyed.key(*key, "mix"))
    mix, cut, row, column = random.random(4)
    if mix >= config.mixup_prob or not (config.mixup or config.cutmix):
        return torch.ones(height, width)
    if config.cutmix and (not config.mixup or cut < config.switch):
        share = random.beta(config.cutmix, config.cutmix)
        centre = int(row * height), int(column * width)
        return mixing.outside(height, width, mixing.box(height, width, *centre, share))
    return torch.ones(height, width).fill_(random.beta(config.mixup, config.mixup))


def softened(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """Labels (B,) -> (B, K): smoothing / K everywhere and 1 - smoothing more at the class."""
    soft = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return soft.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


class Classifier(nn.Module):
    """An encoder with a linear head for images of `size` pixels, as kit/train/loop.py trains it."""

    def __init__(self, encoder_dir, config: Config, classes: int, size: int):
        super().__init__()
        self.config, self.classes = config, classes
        self.model = encoders.classifier(
            encoder_dir, classes, pool=config.pool, drop_path=config.drop_path, img_size=size
        )
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, K)."""
        return self.model((images - self.mean) / self.std).float()

    def forward(self, batch: dict, progress) -> dict:
        images, share = batch["view"], self.share(batch["view"], progress)
        soft = softened(batch["label"], self.classes, self.config.smoothing)
        images, soft = mixing.mixed(images, soft, share, share.mean())
        logits = self.logits(images)
        loss = -(soft * F.log_softmax(logits, 1)).sum(1).mean()
        return {"loss": loss, "agreement": (logits.argmax(1) == soft.argmax(1)).float().mean()}

    @eager  # it reads the step
    def share(self, images: torch.Tensor, progress) -> torch.Tensor:
        """`kept` of this step, on the images' device."""
        return kept(self.config, *images.shape[-2:], progress.seed, progress.step).to(images.device)

    def param_groups(self, weight_decay: float) -> list[dict]:
        # Tables of relative positions are decayed, as in BEiT's official fine-tuning; timm would
        # spare them. A Swin's are spared, as in SimMIM's.
        depths = encoders.depths(self.model)
        spared = self.model.no_weight_decay() if len(depths) > 1 else set()
        return optim.layer_decay_groups(
            self.model, depths, self.config.layer_decay, weight_decay, spared
        )


@torch.inference_mode()
def predict(classifier: Classifier, split, rows: torch.Tensor, run, size: int, batch: int):
    """Class scores (n, K) of the rows of a split in the evaluation view, float32, on the CPU."""
    classifier.eval()
    batches = loader.evaluation(split, size, batch, run.compute.get("workers", 1))
    return torch.cat([classifier.logits(images.to(run.device)).cpu() for images, _, _ in batches])[
        rows
    ]


def run(trial: Trial) -> dict:
    """Trains; metrics of the last epoch on test, accuracy on val; writes scores.npz, history.jsonl.

    Under torchrun every process trains and the first one evaluates; the others return {}.
    """
    run, config, spec = trial.run, trial.config, trial.spec.at(trial.config.input_size)
    images, train = Labelled(trial), trial.open("train")
    if len(images.rows["train"]) < len(train):
        train = Subset(train, images.rows["train"])
    world, need = dist.world(), 2 * dist.world()
    batch = min(config.batch_size, len(train) - len(train) % need)
    if not batch:
        raise trial.error(f"needs {need} labelled training images or more, found {len(train)}")
    settings = {**run.job.params["train"], "epochs": config.epochs, "batch_size": batch}
    settings["micro_batch"] = micro = micro_batch(batch // world, settings["micro_batch"])
    how = {"workers": run.compute.get("workers", 1), "rank": dist.rank(), "world": world}
    views = {"view": view(config, spec.image_size)}
    order = keyed.key(trial.seed, "finetune")
    batches = loader.Batches(train, views, batch, order, micro=micro, labels=True, **how)
    torch.manual_seed(keyed.key(trial.seed, "finetune", "head"))
    classifier = Classifier(trial.encoder, config, spec.num_classes, spec.image_size)
    recipe = loop.Recipe.of(config, settings, batches.steps_per_epoch)
    loop.fit(classifier, batches, recipe, run, trial.seed)
    if not dist.is_main():
        return {}

    classifier.to(run.device)

    def scores(split: str) -> torch.Tensor:
        rows = images.rows[split]
        return predict(classifier, trial.open(split), rows, run, spec.image_size, micro)

    val = accuracy(scores("val"), images.labels["val"])
    test = scores("test")
    save(trial, images, test.argmax(1))
    if config.save_model:
        own = {name: tuple(classifier.model.pretrained_cfg[name]) for name in ("mean", "std")}
        encoders.save(classifier.model, run.out / "classifier", replace(spec, **own))
    return {
        **accuracy(test, images.labels["test"]),
        "n_test": len(images.labels["test"]),
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
        "seed": trial.seed,
        "classes_unseen": unseen(trial, images),
        "val": {"last epoch": val["top1"]},
    }


def micro_batch(share: int, limit: int | None) -> int:
    """The largest even divisor of a process's even share of a batch, up to `limit` (None: any)."""
    return max(m for m in range(2, share + 1, 2) if share % m == 0 and m <= max(limit or share, 2))
