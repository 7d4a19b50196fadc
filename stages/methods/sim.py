"""SiM: Siamese image modeling for self-supervised representation learning (arXiv 2206.01204).

Of one view of an image, blocks of which are hidden, a network predicts what a moving average of its
encoder has of every patch of another view. It is told where these patches lie in the first view, by
a code of their places and of the views' sizes. Predictions are pulled to their targets and pushed
from the second moment of all targets (UniGrad), so that not all targets become the same.

Follows OpenGVLab/Siamese-Image-Modeling, with these departures:
- masks are pure functions of seed, step and sample; a mask whose blocks do not reach the count is
  filled with single patches by random order, as there;
- the official loader flips an image before it crops it, here a crop is flipped. Places are worked
  out from the crops' boxes and flips, to the same result (kit/nets/positions.py);
- the moving averages take a step's weights at its end, with the momentum of the next step; the
  official code does so at the beginning of the next one, before any target is made;
- norms of projector and predictor look at all ranks and have no running statistics, which are never
  read (kit/nets/batchnorm.py);
- the column's half of a code comes before the row's, as in the encoder's positions: another order
  of channels, on which nothing depends;
- the order of operations in a view is kit/data/views.py's; below 64 pixels nothing is blurred;
- the encoder's last norm takes no part, as officially, but the exported encoder has it, with
  weights 1 and 0. Officially it is left out, and tasks on patches put a new one behind their mean;
- `global_weight` adds the same loss between means over all patches, and `dense_weight: 0` leaves
  only that: our reading of the paper's ablation, whose code was not released;
- targets that are all alike, for long, stop the training.

A step sees two views of each image, of which one gives gradients: compare it with others by cost.
For fixed targets t with second moment C the best prediction is (I + w C)^-1 t, w = negative_weight:
the loss then is w / (1 + w) where C is the identity, and w D / (1 + w D) where all targets are
equal. Defaults are for small images; PUBLISHED is the recipe for ImageNet and ViT-B/16.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from stages.kit import dist
from stages.kit.eager import eager
from stages.kit.nets import ema, encoders
from stages.kit.nets.batchnorm import BatchNorm
from stages.kit.nets.init import xavier_init
from stages.kit.nets.masks import exact_block_masks, hidden_ids, take
from stages.kit.nets.patches import patchify, unpatchify
from stages.kit.nets.pictures import contact_sheet, paint
from stages.kit.nets.positions import seen_from, sincos, sincos_2d
from stages.kit.parts import contrast
from stages.kit.parts.beit import shown
from stages.kit.parts.collapse import SpreadWatch
from stages.kit.parts.contrast import VIEWS, views
from workflow import checks

__all__ = ["Config", "Method", "views"]

TARGET = None
NEEDS = {"drop", "mask", "cls"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 1600,
    "batch_size": 4096,
    "mask_ratio": 0.6,
    "min_block": 16,
    "decoder_dim": 768,
    "decoder_depth": 4,
    "decoder_heads": 16,
    "projector_depth": 2,
    "negative_weight": 0.02,
    "momentum": 0.995,
    "freeze_patches": True,
    "crop_min": 0.08,
    "lr": 6.25e-5,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.025,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
    "clip": 1.0,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    mask_ratio: float = 0.6  # share of the first view's patches that is hidden
    min_block: int = 4  # patches in the smallest block
    projector_depth: int = 1  # blocks of the projector; decoder_depth are the predictor's
    negative_weight: float = 0.02  # of the push from the targets' second moment
    dense_weight: float = 1.0  # of the loss between patches
    global_weight: float = 0.0  # of the loss between their means
    # of the moving average; rises to 1 as a cosine. Trainings of many steps need a higher one
    momentum: float = 0.99
    freeze_patches: bool = True  # the patch projection stays as it was drawn
    # of brightness, contrast, saturation, hue
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2
    solarise: float = 0.2  # of the second view
    blur: bool = True  # the first view always, a tenth of the second ones; never below 64 pixels
    # least share of the targets' length that they may not have in common; a training that stays
    # below it for long is stopped
    min_spread: float = 0.01
    crop_min: float = 0.15
    lr: float = 1e-3
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[1, inf)", "min_block")
        checks.within(self, "[0, inf)", "projector_depth", most=checks.MOST_DEPTH)
        checks.within(self, "[0, inf)", "negative_weight", most=1000)
        checks.within(self, "[0, inf)", "dense_weight", "global_weight", "jitter", most=1000)
        checks.within(self, "[0, 1]", "momentum", "jitter_p", "grey", "solarise", "min_spread")
        if not (self.dense_weight or self.global_weight):
            raise ValueError("dense_weight: found 0, as global_weight is, expected one above 0")

    def check(self, image_size: int, model) -> None:
        count = checks.hidden_count(model.grid(image_size) ** 2, self.mask_ratio)
        if self.min_block > count:
            raise ValueError(
                f"min_block: found {self.min_block}, expected at most the {count} hidden patches"
            )
        checks.sincos(model)


class Method(nn.Module):
    whole_batch = "targets are pushed apart in the whole batch, and norms look at all of it"

    def __init__(self, config: Config, spec, target=None):
        super().__init__()
        self.config, self.spec = config, spec
        self.grid, self.patches = (spec.grid, spec.grid), spec.grid**2
        self.count = checks.hidden_count(self.patches, config.mask_ratio)
        self.encoder = encoders.create(spec, "sincos")
        self.encoder.patch_embed.requires_grad_(not config.freeze_patches)
        self.encoder.norm.requires_grad_(False)
        width, dim = self.encoder.embed_dim, config.decoder_dim
        self.projector = nn.Sequential(
            nn.Linear(width, dim), *blocks(config.projector_depth, config)
        )
        self.predictor = nn.Sequential(*blocks(config.decoder_depth, config))
        self.head = nn.Linear(dim, dim)
        self.place = nn.Linear(2 * dim, dim)  # of the code of a place
        for part in (self.projector, self.predictor, self.head, self.place):
            xavier_init(part)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("cells", sincos_2d(dim, spec.grid)[None], persistent=False)
        # of the targets; both start as copies
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.watch = SpreadWatch(config.min_spread)

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view1", "view2": (n,3,H,W) in [0,1], "view1.box", "view2.box": (n,5)} -> {"loss",
        "pull", "push", "alike", "correlation"}.

        pull, push: the loss of patches is pull + negative_weight * push. alike: how much of the
        targets' squared length their mean has, 1 if they have collapsed. correlation: the mean
        |entry| of their second moment beside its diagonal, as a share of the mean on it.
        """
        config, dim = self.config, self.config.decoder_dim
        first, second = (self.spec.normalise(batch[view]) for view in VIEWS)
        ids = self.visible(progress.uniform)
        code = self.code(batch["view1.box"], batch["view2.box"])
        predicted = self.predict(first, ids, code).float()
        with torch.no_grad():
            tokens = self.tokens(second)
        wanted = F.layer_norm(tokens, (dim,))
        moment, alike = moments(wanted.flatten(0, 1))
        pull, push = unigrad(predicted.flatten(0, 1), wanted.flatten(0, 1), moment)
        loss = config.dense_weight * (pull + config.negative_weight * push)
        if config.global_weight:
            means = F.layer_norm(tokens.mean(dim=1), (dim,))
            parts = unigrad(predicted.mean(dim=1), means, moments(means)[0])
            loss = loss + config.global_weight * (parts[0] + config.negative_weight * parts[1])
        self.watch.count(1 - alike)
        off = moment.abs().sum() - moment.diagonal().abs().sum()
        correlation = off / max(1, dim * (dim - 1)) / moment.diagonal().mean()
        return {
            "loss": loss,
            "pull": pull,
            "push": push,
            "alike": alike,
            "correlation": correlation,
        }

    def visible(self, uniform) -> Tensor:
        """The first view's patches (B,n) that are seen; `uniform` as Progress.uniform."""
        masks = exact_block_masks(uniform, self.grid, self.count, self.config.min_block)
        return hidden_ids(~masks, self.patches - self.count)

    def code(self, first: Tensor, second: Tensor) -> Tensor:
        """Boxes (B,5) of both views -> (B,N,2 D), where the second one's patches lie in the first
        one and, the same for all patches, ten times the logarithms of how much larger they are.
        """
        dim = self.config.decoder_dim
        places, sizes = seen_from(first, second, self.spec.grid)
        sizes = sincos(10 * sizes, dim)[:, None].expand(-1, self.patches, -1)
        return torch.cat([sincos(places, dim), sizes], dim=2).float()

    def predict(self, images: Tensor, ids: Tensor, code: Tensor) -> Tensor:
        """Normalised first views, of which the patches ids are seen, and the code of the second
        ones' places -> predictions (B,N,D) of the second ones' patches.
        """
        seen = encoders.visible(self.encoder, images, ids, norm=False)["tokens"]
        cells = take(self.cells.expand(len(ids), -1, -1), ids)
        seen = self.projector(seen) + F.pad(cells, (0, 0, seen.shape[1] - ids.shape[1], 0))
        wanted = self.mask_token + self.place(code)
        found = self.predictor(torch.cat([seen, wanted.to(seen.dtype)], dim=1))
        return self.head(found[:, -self.patches :])

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised whole views -> the moving average's patches (B,N,D), float32."""
        seen = encoders.masked(self.key_encoder, images, None, None, norm=False)["tokens"]
        return self.key_projector(seen)[:, -self.patches :].float()

    @torch.no_grad()
    def after_step(self, progress) -> None:
        """Targets follow, with the momentum of the step that comes."""
        momentum = ema.momentum(self.config.momentum, (progress.step + 1) / progress.steps)
        ema.update(self.key_encoder, self.encoder, momentum)
        ema.update(self.key_projector, self.projector, momentum)
        self.watch.step(progress)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Two contact sheets, of at most 8 images a row each:

        - correspondence: first view | what the encoder sees of it | second view | for each patch of
          the second view that patch of the first one whose target is most like the prediction,
          beside what all have in common | that in which its centre lies, grey where outside;
        - nearest: image | the images of the batch's gallery with the most similar mean features.
        """
        pixels, patch = batch["view"][:8], self.spec.patch
        seen = contrast.seen_as(views(self.config, self.spec), pixels)
        first, second = (seen[view] for view in VIEWS)
        boxes = [seen[f"{view}.box"] for view in VIEWS]
        uniform = shown(len(pixels))
        ids = self.visible(lambda *args: uniform(*args).to(pixels.device))
        mask = torch.ones(len(pixels), self.patches, device=pixels.device).scatter(1, ids, 0.0)
        images = self.spec.normalise(first)
        predicted = self.predict(images, ids, self.code(*boxes)).float()
        targets = F.layer_norm(self.tokens(images), predicted.shape[2:])
        both = (predicted, targets)
        predicted, targets = (contrast.alike(x.flatten(0, 1)).view(x.shape) for x in both)
        found = (predicted @ targets.transpose(1, 2)).argmax(dim=2)  # (B,N)
        places = seen_from(*boxes, self.spec.grid)[0].round().long()
        inside = ((places >= 0) & (places < self.spec.grid)).all(dim=2)
        column, row = places.clamp(0, self.spec.grid - 1).unbind(2)
        pieces = patchify(first, patch)
        copied, true = (
            unpatchify(take(pieces, where), patch)
            for where in (found, row * self.spec.grid + column)
        )
        columns = [first, paint(first, mask), second, copied, paint(true, ~inside)]
        gallery = batch.get("gallery", batch["view"])
        whole = self.spec.normalise(gallery)
        found = encoders.masked(self.encoder, whole, None, None, norm=False)["patch"].mean(dim=1)
        sheets = {"correspondence": contact_sheet(columns)}
        return sheets | {"nearest": contrast.nearest(gallery, found)}


def blocks(depth: int, config: Config) -> list[nn.Module]:
    """Transformer blocks with batch norms over all tokens."""

    def norm(dim: int, **_) -> BatchNorm:  # timm says where it wants it, too
        return BatchNorm(dim)

    how = {"mlp_ratio": 4.0, "qkv_bias": True, "norm_layer": norm}
    return [Block(config.decoder_dim, config.decoder_heads, **how) for _ in range(depth)]


@eager  # it talks to the other ranks
def moments(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Targets (M,D) of this rank -> of those of all ranks the second moment (D,D) and the share of
    their mean squared length that their mean has; no gradient passes.
    """
    targets = targets.detach()
    with torch.autocast(targets.device.type, enabled=False):
        moment = dist.mean(targets.T @ targets / len(targets))
    mean = dist.mean(targets.mean(dim=0))
    return moment, mean.square().sum() / moment.trace().clamp(min=1e-9)


def unigrad(predicted: Tensor, targets: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets (M,D), the targets' second moment (D,D) -> the mean |p - t|^2 / D and
    the mean p' C p / D, which is the mean (p . t)^2 / D over all pairs.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        dim = predicted.shape[1]
        pull = (predicted - targets).square().sum(dim=1).mean() / dim
        return pull, ((predicted @ moment) * predicted).sum(dim=1).mean() / dim
