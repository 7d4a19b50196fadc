"""A perceptual codebook: PeCo's tokenizer (arXiv 2111.12710), a VQ-VAE that keeps what is seen.

A convolutional encoder maps every patch of an image to a vector, the nearest of K codes replaces
it, and a convolutional decoder rebuilds the pixels from the codes. The loss compares the pixels,
and what a frozen network, `upstream`, sees in both images at several depths. So patches share a
code that look alike to that network. Students learn to predict the codes of hidden patches.

Of PeCo no official code could be had, so call these runs PeCo-style. Known from the paper or from
what others print of it are: the codes, both losses, a self-supervised transformer (MoCo v3) as
`upstream`, which sees through several layers, and BEiT's students. Ours are, or unverified:
- the networks are VQGAN's (kit/nets/vqgan.py, arXiv 2012.09841);
- the codes move as VQ-VAE's (kit/parts/quantize.py); k-means starts them after `kmeans_after`;
- pixels in [-1, 1] are compared by their absolute difference (`pixel_loss`);
- states are those after whole blocks, before any last norm, without the class token, on the grid
  of the codes. Each token's is divided by its length. `channels` says whether squared differences
  are summed over channels, which gives 2 - 2 cos and is the default, or are averaged (PUBLISHED);
- the rebuilt image is shown to the network as it is, also where pixels leave the range of images;
- there is no adversarial term, which is said to bring students nothing;
- the official setting of nearly everything else is unknown. PUBLISHED has what is remembered and,
  for what is not, VQGAN's. Defaults are for small images and short runs.

`perceptual: 0` is the plain VQ-VAE: the upstream is not asked, and all else is the same to the last
bit. It is the control for what the perceptual term brings. "logits" are minus the squared distances
to the codes: their softmax is what a mixture of Gaussians of variance 1/2 around them says, and a
student that wants it sharper divides by a temperature. Where the upstream resizes images or states,
a GPU may give other last bits each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import targets
from stages.kit import dist
from stages.kit.data.views import View
from stages.kit.nets import vqgan
from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts import codes
from stages.kit.parts.quantize import EuclideanCodebook, EuclideanLearner
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = {"layers"}
LABELS = False
PUBLISHED = {
    "epochs": 100,
    "batch_size": 128,
    "codes": 8192,
    "code_dim": 256,
    "width": 128,
    "multipliers": [1, 1, 2, 2, 4],
    "blocks": 2,
    "attention": True,
    "perceptual": 1.0,
    "channels": "mean",
    "layers": [0.25, 0.5, 0.75, 1.0],
    "commitment": 0.25,
    "kmeans_after": 0.0,
    "lr": 5e-5,
    "lr_per": 128,
    "warmup": 0.005,
    "weight_decay": 0.0,
    "betas": [0.5, 0.95],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.LearntCodes):
    perceptual: float = 1.0  # weight of the perceptual loss; 0: a plain VQ-VAE
    # depths at which the upstream looks, as shares of its blocks or stages
    layers: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    channels: Literal["sum", "mean"] = "sum"  # of the perceptual differences
    pixel_loss: Literal["l1", "l2"] = "l1"
    commitment: float = 0.25  # weight of the encoder's distance to its codes
    width: int = 32  # channels at full resolution
    # of the width, for each halving of the resolution; the last one goes on
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 1  # residual blocks at each resolution
    attention: bool = False  # at the lowest resolution
    code_dim: int = 32
    kmeans_after: float = 0.1
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.5, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, inf)", "perceptual", "commitment")
        checks.within(self, "(0, 1]", "layers")
        checks.within(self, "[1, inf)", "width", "multipliers", "blocks", most=checks.MOST_WIDTH)
        for key in ("layers", "multipliers"):
            if not getattr(self, key):
                raise ValueError(f"{key}: found none, expected one at least")

    def check(self, image_size: int, model) -> None:
        if model.stride & (model.stride - 1):
            raise ValueError(
                f"model.patch_size: found tokens of {model.stride} pixels, expected a power of 2, "
                "as the resolution is halved"
            )


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Target(targets.Target):
    """The tokenizer: images -> codes ("ids"), or minus squared distances to all ("logits")."""

    def __init__(self, config: Config, spec):
        super().__init__()
        self.spec = spec
        self.sizes = {"ids": config.codes, "logits": config.codes}
        widths = vqgan.widths(config.width, config.multipliers, spec.stride)
        shape = (widths, config.blocks, config.code_dim, config.attention)
        self.encoder, self.decoder = vqgan.Encoder(*shape), vqgan.Decoder(*shape)
        self.codebook = EuclideanCodebook(config.codes, config.code_dim)
        # the perceptual loss over the last few hundred training steps
        self.register_buffer("distance", torch.zeros(()))
        self.eval()

    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> vectors (B,N,code_dim), float32."""
        return self.encoder(2 * images - 1).float().flatten(2).transpose(1, 2)

    def rebuild(self, vectors: Tensor) -> Tensor:
        """Vectors (B,N,code_dim), of codes as a rule -> images (B,3,H,W), about in [-1,1]."""
        grid = self.spec.grid
        maps = vectors.transpose(1, 2).unflatten(2, (grid, grid))
        return self.decoder(maps).float()

    def decode(self, ids: Tensor) -> Tensor:
        """Codes (B,N) -> what the decoder makes of them, (B,3,H,W) in [0,1]."""
        return ((self.rebuild(self.codebook.vectors[ids]) + 1) / 2).clamp(0, 1)

    def look(self, images: Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        h, found = self.encode(images), {}
        if "ids" in wanted:
            found["ids"] = self.codebook.assign(h)
        if "logits" in wanted:
            found["logits"] = -self.codebook.distances(h)
        return found


class Training(nn.Module):
    """Trains `target` to rebuild images as `upstream` (targets.Frozen) sees them."""

    def __init__(self, config: Config, spec, upstream):
        super().__init__()
        self.config, self.upstream = config, upstream
        self.target = Target(config, spec)
        self.learner = EuclideanLearner.of(self.target.codebook, config)
        depth = upstream.open.depth if config.perceptual else 0
        self.depths = sorted({max(1, round(share * depth)) for share in config.layers})
        self._distances: list[Tensor] = []

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "pixels", "commitment", "usage", "perplexity"},
        and "perceptual" where it has a weight: the loss, its terms before they are weighted, and
        how many codes this batch uses.
        """
        config, images = self.config, batch["view"]
        h = self.target.encode(images)
        quantised, commitment, used = self.learner.quantise(h, progress)
        rebuilt = self.target.rebuild(quantised)
        pixels = self.pixels(rebuilt, 2 * images - 1)
        found = {"loss": pixels + config.commitment * commitment, "pixels": pixels}
        found |= {"commitment": commitment, **used}
        if config.perceptual:
            found["perceptual"] = self.perceptual(rebuilt, images)
            found["loss"] = found["loss"] + config.perceptual * found["perceptual"]
            if self.training:
                self._distances.append(found["perceptual"].detach())
        return found

    def pixels(self, rebuilt: Tensor, images: Tensor) -> Tensor:
        """Mean absolute or squared difference of images (B,3,H,W), both about in [-1,1]."""
        error = rebuilt - images.float()
        return error.abs().mean() if self.config.pixel_loss == "l1" else error.square().mean()

    def perceptual(self, rebuilt: Tensor, images: Tensor) -> Tensor:
        """The distance of a rebuilt image, in [-1,1], to images in [0,1], as the upstream sees it.

        The gradient goes through the network to the rebuilt image, and to nothing else.
        """
        see = self.upstream.open.look  # without the check of pixels, which may be beyond [0,1]
        with torch.no_grad():
            wanted = see(images, {"layers"}, True, tuple(self.depths))["layers"]
        found = see((rebuilt + 1) / 2, {"layers"}, True, tuple(self.depths))["layers"]
        return feature_distance(found, wanted, self.config.channels)

    @torch.no_grad()
    def after_step(self, progress) -> None:
        self.learner.move(progress)
        if self._distances:
            weight = max(0.01, 1 / (progress.step + 1))  # a plain mean at first
            self.target.distance.lerp_(dist.mean(torch.stack(self._distances).mean()), weight)
            self._distances.clear()


def feature_distance(found: Iterable[Tensor], wanted: Iterable[Tensor], channels: str) -> Tensor:
    """Two lists of layers (B,N,D) -> sum over layers of the mean over tokens of the squared
    difference of their directions, summed or averaged over channels ("sum": 2 - 2 cos).
    """
    total = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        with torch.autocast(ours.device.type, enabled=False):
            gap = F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)
            squares = gap.square()
            total = total + (squares.sum(-1) if channels == "sum" else squares.mean(-1)).mean()
    return total


@torch.no_grad()
def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: usage, perplexity and counts of the codes; the mean absolute
    error of rebuilt pixels in [0, 1], beside that of each image's mean colour. And the perceptual
    loss at the end of the training, where it had a weight.
    """
    advice = (
        "Fewer codes, a later `kmeans_after`, a higher lr, more or more varied images and longer "
        "training all raise it; so may `reseed` (steps; not published)."
    )
    errors: list[tuple[float, float]] = []
    found = codes.health(target, _watched(target, images, errors), config, advice)
    error, plain = (float(np.mean(column)) for column in zip(*errors, strict=True))
    if not math.isfinite(error):
        found["problems"].append(f"rebuilt images are not finite ({error}); lower lr")
    found |= {"pixel_error": error, "pixel_error_of_mean": plain}
    return found | ({"train_perceptual": float(target.distance)} if config.perceptual else {})


def _watched(target: Target, images: Iterable[Tensor], errors: list) -> Iterator[Tensor]:
    """The same batches; notes the errors of each image as they are rebuilt, and as one colour."""
    for batch in images:
        rebuilt = target.decode(target(batch, "ids")["ids"])
        plain = batch.mean(dim=(2, 3), keepdim=True)
        both = ((batch - other).abs().mean(dim=(1, 2, 3)).tolist() for other in (rebuilt, plain))
        errors.extend(zip(*both, strict=True))
        yield batch


@torch.no_grad()
def pictures(target: Target, images: Tensor) -> dict[str, np.ndarray]:
    """reconstruction: images | rebuilt from their codes. And code_map and codebook of
    kit/parts/codes.py, where near is a small distance.
    """
    h = target.encode(images)
    ids = target.codebook.assign(h)
    far = (h - target.codebook.vectors[ids]).square().sum(dim=-1)
    rebuilt = {"reconstruction": contact_sheet([images, target.decode(ids)])}
    return rebuilt | codes.pictures(images, ids, -far, target.spec.stride)
