"""MimCo, our reading: masked image modeling with a contrastive teacher (arXiv 2209.03063).

A student that sees an image with units of patches hidden rebuilds what a frozen contrastive teacher
has of the whole image, by contrast, at two levels: of every hidden patch it must find the teacher's
feature among those of the image's patches, and of the image the teacher's class token among those
of the batch. The teacher is any target with patches and class token: `mocov3`, as in the paper,
`dino`, or a run's encoder.

There is no official code, and of the paper its abstract alone could be checked: that there are two
stages, that the teacher is a frozen contrastive model, and that patches and images are rebuilt by
contrast. All else is ours, and results of this file are results of this reading:
- the student is SimMIM's, with its masks and BEiT's encoder (methods/simmim.py);
- teacher and student see the same crop and flip, without changes of colours; the teacher's features
  are those after its last norm, without its projector;
- patches are contrasted within an image (`patches: intra`), which needs no other images and has the
  hardest negatives. "batch" contrasts them with patches of all images, of which `negatives` are
  drawn, "cosine" only pulls, "smooth_l1" regresses features at mean 0 and variance 1;
- heads are two linear layers, a layer norm and GELU between them; a batch norm would depend on how
  many patches are hidden;
- both temperatures are 0.2, both weights 1, without MoCo's factor of twice the temperature;
- images can also be contrasted with the last `queue` teacher features, first in first out, and
  patch features can have a running mean subtracted (`centre`), for teachers whose patches are
  nearly alike: the curve `alike` is their mean cosine within an image.

Its epochs come after the teacher's: the report counts both. PUBLISHED is SimMIM's recipe in 100
epochs, the paper's headline, with a ViT-S/16; its rate is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.kit import dist
from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets import encoders
from stages.kit.nets.masks import hidden_ids, take, unit_masks
from stages.kit.nets.pictures import contact_sheet, paint, principal_colours
from stages.kit.parts import contrast
from stages.kit.parts.beit import BeitGroups
from stages.kit.parts.contrast import directions, gathered, info_nce
from workflow import checks

TARGET = {"patch", "cls"}
NEEDS = {"mask"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 100,
    "batch_size": 2048,
    "mask_ratio": 0.6,
    "mask_unit": 32,
    "patches": "intra",
    "temperature": 0.2,
    "image_temperature": 0.2,
    "init": "published",
    "rel_pos_rate": 1.0,
    "rel_pos_decay": True,
    "crop_min": 0.67,
    "lr": 0.0008,
    "lr_per": 2048,
    "min_lr": 1e-05,
    "warmup": 0.1,
    "weight_decay": 0.05,
    "betas": [0.9, 0.999],
    "clip": 5.0,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.BeitEncoder, checks.UnitMasks):
    patches: Literal["intra", "batch", "cosine", "smooth_l1"] = "intra"  # the loss of patches
    negatives: int = 4096  # of a step, for patches: batch
    patch_weight: float = 1.0
    image_weight: float = 1.0
    temperature: float = 0.2  # of patches
    image_temperature: float = 0.2
    queue: int = 0  # teacher features of earlier images that are negatives, too; 0: none
    centre: bool = False  # subtract a running mean from the teacher's patches
    centre_momentum: float = 0.9
    drop_path: float = 0.0
    crop_min: float = 0.67
    lr_per: int | None = 512
    min_lr: float = 1e-5
    clip: float | None = 5.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, inf)", "temperature", "image_temperature", most=1000)
        checks.within(self, "[0, inf)", "patch_weight", "image_weight", most=1000)
        checks.within(self, "[1, inf)", "negatives")
        checks.within(self, "[0, inf)", "queue", most=10**7)
        checks.within(self, "[0, 1)", "drop_path", "centre_momentum")
        if not (self.patch_weight or self.image_weight):
            raise ValueError("patch_weight: found 0, as image_weight is, expected one above 0")

    def side(self, image_size: int, model) -> int:
        """Side of a mask unit in pixels: at least that of a token."""
        return max(self.unit(image_size), model.stride)

    def check(self, image_size: int, model) -> None:
        side = self.side(image_size, model)
        if image_size % side or side % model.stride:
            raise ValueError(
                f"mask_unit: found {side} pixels, expected a multiple of a token's "
                f"{model.stride} that divides image_size {image_size}"
            )
        checks.unit_count((image_size // side) ** 2, self.mask_ratio)


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


def head(width: int, out: int) -> nn.Sequential:
    """Student features (..., width) -> (..., out), the teacher's width."""
    norm, act = nn.LayerNorm(2 * out), nn.GELU()
    return nn.Sequential(nn.Linear(width, 2 * out), norm, act, nn.Linear(2 * out, out))


class Method(BeitGroups, nn.Module):
    def __init__(self, config: Config, spec, target):
        super().__init__()
        self.config, self.spec, self.teacher = config, spec, target
        side = config.side(spec.image_size, spec.model)
        self.units = (spec.image_size // side) ** 2
        self.count = checks.unit_count(self.units, config.mask_ratio)
        self.cells = (side // spec.patch, side // spec.stride)  # patches, tokens along a unit
        self.hidden = self.count * self.cells[1] ** 2  # n, tokens
        how = {"init": config.init, "layer_scale": config.layer_scale}
        self.encoder = encoders.create(spec, "beit", drop_path=config.drop_path, **how)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        width, sizes = self.encoder.num_features, target.sizes
        self.patch_head = head(width, sizes["patch"]) if config.patch_weight else None
        self.image_head = head(width, sizes["cls"]) if config.image_weight else None
        if config.image_weight or config.patches == "batch":
            self.whole_batch = "each image is compared with all others of the batch"
        self.register_buffer("mean", torch.zeros(sizes["patch"]))  # of the teacher's patches
        self.register_buffer("queue", torch.zeros(config.queue, sizes["cls"]))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))  # rows of the queue
        self._seen: list[tuple[Tensor, Tensor]] = []  # of a step, for both

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view": (n,3,H,W) in [0,1]} -> {"loss", "patch", "image", how often each finds its own
        feature, "cosine" of hidden patches with theirs, "alike"}, as far as there are such losses.
        """
        images, config = batch["view"], self.config
        noise = progress.uniform("mask", self.units)
        mask, hidden = (unit_masks(noise, self.count, cell) for cell in self.cells)
        tokens = self.tokens(images, mask)
        truth = self.teacher(images, "patch", "cls")
        keys = gathered(directions(truth["cls"]))  # (B,D')
        if self.training:
            self._seen.append((truth["patch"].float().mean((0, 1)), keys))
        found = {"loss": 0.0}
        if self.patch_head is not None:
            ids = hidden_ids(hidden, self.hidden)
            features = self.patch_head(take(tokens, ids)).float()
            found |= self.patch_loss(features, truth["patch"].float(), ids, progress)
            found["loss"] = found["loss"] + config.patch_weight * found["patch"]
        if self.image_head is not None:
            queries = directions(tokens.mean(dim=1), self.image_head)
            found |= self.image_loss(queries, keys)
            found["loss"] = found["loss"] + config.image_weight * found["image"]
        return found

    def tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images in [0,1], bool mask of the patch embedding's grid -> the student's (B,N,D)."""
        images = self.spec.normalise(images)
        return encoders.masked(self.encoder, images, mask, self.mask_token)["patch"]

    def targets(self, patches: Tensor) -> Tensor:
        """The teacher's patches (B,N,D'), float32 -> unit vectors, perhaps of what is centred."""
        return F.normalize(patches - self.mean if self.config.centre else patches, dim=-1)

    def patch_loss(self, found: Tensor, patches: Tensor, ids: Tensor, progress) -> dict:
        """Features (B,n,D') for the hidden patches ids (B,n), and the teacher's of all (B,N,D') ->
        {"patch", "cosine", "alike"}, and "patch_accuracy" of a contrast.
        """
        keys, count = self.targets(patches), patches.shape[1]
        with torch.autocast(found.device.type, enabled=False):
            queries, own = F.normalize(found, dim=-1), take(keys, ids)
            cosine = (queries * own).sum(dim=-1)  # (B,n)
            alike = keys.sum(dim=1).square().sum(dim=-1).mean() - count
            out = {"cosine": cosine.detach().mean(), "alike": alike / (count * (count - 1))}
            if self.config.patches == "cosine":
                return {"patch": (2 - 2 * cosine).mean(), **out}
            if self.config.patches == "smooth_l1":
                wanted = F.layer_norm(take(patches, ids), patches.shape[-1:])
                return {"patch": F.smooth_l1_loss(found, wanted), **out}
            if self.config.patches == "intra":
                logits, labels = queries @ keys.transpose(1, 2), ids
            else:
                logits, labels = self.against_batch(queries, keys, cosine, ids, progress)
            logits = (logits / self.config.temperature).flatten(0, 1)
            accuracy = (logits.detach().argmax(dim=1) == labels.flatten()).to(logits.dtype).mean()
            loss = F.cross_entropy(logits, labels.flatten())
        return {"patch": loss, "patch_accuracy": accuracy, **out}

    def against_batch(self, queries, keys, cosine, ids, progress) -> tuple[Tensor, Tensor]:
        """Cosines (B,n,1+m) of queries with their own key, in column 0, and with m patches of all
        ranks, the same for all queries; and the columns to be found.
        """
        start = dist.rank() * keys.shape[0] * keys.shape[1]
        every = gathered(keys.flatten(0, 1))
        chosen = drawn(len(every), self.config.negatives, progress).to(every.device)
        rows = torch.arange(len(keys), device=keys.device)[:, None] * keys.shape[1] + ids + start
        others = (queries @ every[chosen].T).masked_fill(rows[..., None] == chosen, -torch.inf)
        return torch.cat([cosine[..., None], others], dim=2), torch.zeros_like(ids)

    def image_loss(self, queries: Tensor, keys: Tensor) -> dict:
        """Unit vectors of this rank's images, and the teacher's of all ranks' -> {"image",
        "image_accuracy"}.
        """
        known = None
        if len(self.queue):
            rows = torch.arange(len(keys) + len(self.queue), device=keys.device)
            known = rows < len(keys) + self.filled
            keys = torch.cat([keys, self.queue])
        place = dist.rank() * len(queries)
        loss, accuracy = info_nce(queries, keys, self.config.image_temperature, place, known)
        return {"image": loss, "image_accuracy": accuracy}

    @torch.no_grad()
    def after_step(self, progress) -> None:
        """The step's teacher features enter the queue, and their mean the running one."""
        if not self._seen:
            return
        means, keys = zip(*self._seen, strict=True)
        self._seen = []
        if self.config.centre:
            mean = dist.mean(torch.stack(means).mean(dim=0))
            self.mean.lerp_(mean, 1 - self.config.centre_momentum)
        if len(self.queue):
            keys = torch.cat(keys)
            self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])
            self.filled.add_(len(keys)).clamp_(max=len(self.queue))

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Two contact sheets, of at most 8 images a row each:

        - features: image | masked | directions of the teacher's patches | of the student's, where
          hidden. Colours are three principal components, the same for both;
        - nearest: image | the images of the batch's gallery with the most similar mean features.
        """
        images, size = batch["view"][:8], batch["view"].shape[-1]
        noise = torch.rand(len(images), self.units, generator=torch.Generator().manual_seed(0))
        noise = noise.to(images.device)
        mask, hidden = (unit_masks(noise, self.count, cell) for cell in self.cells)
        columns = [images, paint(images, mask)]
        if self.patch_head is not None:
            wanted = self.targets(self.teacher(images, "patch")["patch"].float())
            found = directions(self.patch_head(self.tokens(images, mask)).flatten(0, 1))
            colours = principal_colours(torch.cat([wanted, found.view(wanted.shape)]))
            wanted, found = F.interpolate(colours, size=size, mode="nearest").chunk(2)
            columns += [wanted, paint(found, ~hidden)]
        gallery = batch.get("gallery", batch["view"])
        seen = encoders.features(self.encoder, self.spec.normalise(gallery))["patch"].mean(dim=1)
        return {"features": contact_sheet(columns), "nearest": contrast.nearest(gallery, seen)}


@eager
def drawn(count: int, most: int, progress) -> Tensor:
    """At most so many of 0..count-1, the same on every rank, int64 on a CPU."""
    return torch.randperm(count, generator=progress.generator("negatives"))[:most]
