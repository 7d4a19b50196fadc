"""CMAE: contrastive masked autoencoders are stronger vision learners (arXiv 2207.13532).

MAE, and beside it a contrast: of the visible patches of one view a second, shallower decoder makes
features of all places, whose mean, projected and predicted, must be the nearest to its own image's
among the means that a moving average of the encoder has of whole second views. The second view is
the same crop, a few pixels further right and down and in other colours: two crops would show too
different things for an autoencoder.

Follows ZhichengHuang/CMAE (which its authors wrote after the paper's first version), with these
departures:
- masks are pure functions of seed, step and sample; the number of visible groups is cut to an
  integer in exact arithmetic;
- the feature decoder predicts as many numbers as the encoder is wide. Officially it predicts
  3 patch^2 of them, which is the same for ViT-B/16 only;
- gains and shifts of projector and predictor are not decayed, officially they are;
- norms have no running statistics (kit/nets/batchnorm.py), which are never read; projector and
  predictor are computed in float32 whatever autocast is active;
- images are RGB and greyscale has the usual weights: the official loader swaps the channels;
- the halves of the sin-cos positions are MAE's; the rate's schedule is MAE's, too, where the
  official one begins at a 10,000th of its peak;
- queries that find their keys no better than by chance, for long, stop the training. A slowly
  rising contrast, which others have reported of the official code, does not.

`second: crop` gives the second view a crop of its own, `shift: 0` the same one, `feature_depth: 0`
contrasts the mean of the encoder's visible patches, and `contrast_weight: 0` leaves MAE with masks
of 2 x 2 patches: the paper's ablations. A step sees two views of each image, of which one gives
gradients: compare it with others by cost. Defaults are for small images; PUBLISHED is the recipe
for ImageNet and ViT-B/16 over 300 epochs (800 and 1600 have the same). Nothing was published for a
ConvViT, with which this is CMAE with masked convolutions.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from stages.kit import dist
from stages.kit.data.views import View
from stages.kit.nets import ema, encoders
from stages.kit.nets.batchnorm import BatchNorm
from stages.kit.nets.decoder import Decoder
from stages.kit.nets.masks import disjoint_masking
from stages.kit.nets.pictures import contact_sheet, framed, paint
from stages.kit.parts import contrast
from stages.kit.parts.autoencoder import Autoencoder
from stages.kit.parts.contrast import InformationWatch, directions, gathered, info_nce
from workflow import checks

TARGET = None
NEEDS = {"drop"}
LABELS = False
TRAINS = True
PUBLISHED = {
    "epochs": 300,
    "batch_size": 4096,
    "mask_ratio": 0.65,
    "mask_cell": 2,
    "norm_pix": True,
    "decoder_dim": 512,
    "decoder_depth": 8,
    "decoder_heads": 16,
    "feature_depth": 2,
    "hidden": 1536,
    "dim": 256,
    "temperature": 0.07,
    "contrast_weight": 1.0,
    "momentum": 0.996,
    "margin": 32,
    "shift": 31,
    "crop_min": 0.2,
    "lr": 0.00015,
    "lr_per": 256,
    "min_lr": 0.0,
    "warmup": 0.1333,
    "weight_decay": 0.05,
    "betas": [0.9, 0.95],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Decoder):
    mask_ratio: float = 0.65  # share of the groups that is dropped
    mask_cell: int = 2  # patches along a side of a group
    norm_pix: bool = True  # each patch's pixels at mean 0 and variance 1 are the target
    feature_depth: int = 1  # blocks of the feature decoder; 0: there is none
    hidden: int = 384  # width of projector and predictor
    dim: int = 128  # of queries and keys
    temperature: float = 0.1
    contrast_weight: float = 1.0  # of 2 temperature * cross-entropy
    pixel_weight: float = 1.0
    momentum: float = 0.99  # of the moving average; constant
    second: Literal["shifted", "crop"] = "shifted"  # the second view: see above
    shift: int | None = None  # pixels right and down, at most; None: an eighth of the image's side
    margin: int | None = None  # pixels that the crop has beside a view; None: `shift`
    # of the second view: brightness, contrast, saturation, hue
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2
    blur: float = 0.5  # never below 64 pixels
    # least that queries must tell of their keys, as a share of ln(batch size); a training that
    # stays below it for long is stopped
    min_information: float = 0.01
    crop_min: float = 0.4
    lr: float = 1.5e-3
    lr_per: int | None = 512
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "(0, 1)", "mask_ratio")
        checks.within(self, "[1, inf)", "mask_cell")
        checks.within(self, "[1, inf)", "hidden", "dim", most=checks.MOST_WIDTH)
        checks.within(self, "[0, inf)", "feature_depth", most=checks.MOST_DEPTH)
        checks.within(self, "(0, inf)", "temperature", most=1000)
        checks.within(self, "[0, inf)", "contrast_weight", "pixel_weight", "jitter", most=1000)
        checks.within(self, "[0, inf)", "shift", "margin", most=checks.MOST_PIXELS)
        checks.within(self, "[0, 1]", "momentum", "jitter_p", "grey", "blur", "min_information")

    def window(self, image_size: int) -> tuple[int, int]:
        """(shift, margin) in pixels."""
        shift = image_size // 8 if self.shift is None else self.shift
        return shift, shift if self.margin is None else self.margin

    def check(self, image_size: int, model) -> None:
        grid, (shift, margin) = model.grid(image_size), self.window(image_size)
        if grid % self.mask_cell:
            raise ValueError(
                f"mask_cell: found {self.mask_cell} patches, expected a divisor of the {grid} "
                "along a side"
            )
        if self.second == "shifted" and shift > margin:
            raise ValueError(
                f"shift: found {shift} pixels, expected at most margin, which is {margin}"
            )
        checks.keep_count((grid // self.mask_cell) ** 2, self.mask_ratio, "groups")
        checks.sincos(model)


def views(config: Config, spec) -> dict[str, View]:
    """ "view" for the autoencoder, "second" for the keys: the one has no colours changed."""
    size = spec.image_size
    crop = {"scale": (config.crop_min, 1.0), "flip": config.flip}
    colours = {
        "jitter": tuple(config.jitter),
        "jitter_p": config.jitter_p,
        "grey": config.grey,
        "blur": config.blur * (size >= 64),
        "blur_sigma": contrast.blur_sigma(size),
    }
    if config.second == "crop":
        return {"view": View(size, **crop), "second": View(size, **crop, **colours)}
    shift, margin = config.window(size)
    return {
        "view": View(size, **crop, margin=margin),
        "second": View(size, crop_of="view", shift=shift, **colours),
    }


def head(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Projector or predictor: two linear layers, a batch norm and ReLU between them."""
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, dim, bias=False)
    return nn.Sequential(first, BatchNorm(hidden, eps=1e-6), nn.ReLU(), last)


class Method(Autoencoder):
    whole_batch = contrast.REASON

    def __init__(self, config: Config, spec, target=None):
        super().__init__(config, spec)
        self.groups = (spec.grid // config.mask_cell) ** 2
        width, prefix = self.encoder.embed_dim, self.encoder.num_prefix_tokens
        self.prefix, self.feature_decoder = prefix, None
        if config.feature_depth:
            sizes = (config.decoder_dim, config.feature_depth, config.decoder_heads)
            self.feature_decoder = Decoder(width, width, spec.grid, *sizes, prefix=prefix)
        self.projector = head(width, config.hidden, config.dim)
        self.predictor = head(config.dim, config.hidden, config.dim)
        # of the keys; all start as copies
        self.key_encoder, self.key_fusion, self.key_projector = (
            copy.deepcopy(part) for part in (self.encoder, self.fusion, self.projector)
        )
        for part in self.averages():
            part.requires_grad_(False)
        self.watch = InformationWatch(config.min_information * (config.contrast_weight > 0))

    def averages(self) -> dict[nn.Module, nn.Module]:
        """{moving average: what it follows}; neither decoder has one, nor has the predictor."""
        both = {self.key_encoder: self.encoder, self.key_projector: self.projector}
        return both if self.fusion is None else both | {self.key_fusion: self.fusion}

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters: tokens and positions."""
        names = {f"encoder.{name}" for name in encoders.embeddings(self.encoder)}
        if self.feature_decoder is not None:
            names.add("feature_decoder.mask_token")
        return names | {"decoder.mask_token"}

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view", "second": (n,3,H,W) in [0,1]} -> {"loss", "pixels", "contrast", "accuracy",
        "information"}.

        pixels: MAE's loss. contrast: 2 T * cross-entropy over the B keys of all ranks, at chance
        2 T ln B. accuracy: of queries whose key is the nearest. information: ln B minus the
        cross-entropy, as in kit/parts/contrast.py.
        """
        images, second = (self.spec.normalise(batch[name]) for name in ("view", "second"))
        ids_keep, ids_restore, mask = self.masks(progress.uniform("mask", self.groups))
        tokens = self.encode(images, ids_keep)["tokens"]
        pixels = self.error(self.decoder(tokens, ids_restore), images, mask)
        query = directions(self.features(tokens, ids_restore), self.projector, self.predictor)
        with torch.no_grad():
            keys = gathered(directions(self.whole(second), self.key_projector))  # (B,dim)
        temperature, place = self.config.temperature, dist.rank() * len(query)
        entropy, accuracy = info_nce(query, keys, temperature, place)
        self.watch.count(entropy, len(keys))
        apart = 2 * temperature * entropy
        return {
            "loss": self.config.pixel_weight * pixels + self.config.contrast_weight * apart,
            "pixels": pixels,
            "contrast": apart,
            "accuracy": accuracy,
            "information": math.log(len(keys)) - entropy,
        }

    def masks(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B,groups) -> ids_keep, ids_restore and mask, as masks.random_masking gives them,
        of whole groups.
        """
        config = self.config
        how = {"predict": None, "cell": config.mask_cell}
        kept, hidden = disjoint_masking(noise[:, None], config.mask_ratio, **how)
        ids = torch.cat([kept, hidden], dim=2)[:, 0]
        ids_restore = ids.argsort(dim=1)
        return kept[:, 0], ids_restore, (ids_restore >= kept.shape[2]).to(noise.dtype)

    def features(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Encoded tokens (B,P+n,D) of visible patches -> (B,D), the mean of the feature decoder
        over all places; without one, of the visible patches.
        """
        if self.feature_decoder is None:
            return tokens[:, self.prefix :].mean(dim=1)
        return self.feature_decoder(tokens, ids_restore).mean(dim=1)

    def whole(self, images: Tensor) -> Tensor:
        """Normalised images -> (B,D), the moving average's mean of all patches before its norm."""
        every = torch.arange(self.patches, device=images.device).expand(len(images), -1)
        how = {"norm": False, "fusion": self.key_fusion}
        return encoders.visible(self.key_encoder, images, every, **how)["patch"].mean(dim=1)

    @torch.no_grad()
    def after_step(self, progress) -> None:
        for average, followed in self.averages().items():
            ema.update(average, followed, self.config.momentum)
        self.watch.step(progress)

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Two contact sheets, of at most 8 images a row each:

        - views: image, the first view framed red, the second blue | the first view | what the
          encoder sees of it | its reconstruction | the second view;
        - nearest: image | the images of the batch's gallery with the most similar mean features.
        """
        pixels = batch["view"][:8]
        seen = contrast.seen_as(views(self.config, self.spec), pixels)
        first, second = seen["view"], seen["second"]
        frames = framed(pixels, seen["view.box"], (1.0, 0.1, 0.1))
        frames = framed(frames, seen["second.box"], (0.1, 0.4, 1.0))
        noise = torch.rand(len(pixels), self.groups, generator=torch.Generator().manual_seed(0))
        ids_keep, ids_restore, mask = self.masks(noise.to(pixels.device))
        predicted = self.reconstruct(self.spec.normalise(first), ids_keep, ids_restore)
        columns = [frames, first, paint(first, mask), self.filled(first, predicted, mask), second]
        gallery = batch.get("gallery", batch["view"])
        found = encoders.features(self.encoder, self.spec.normalise(gallery))["patch"].mean(dim=1)
        return {
            "views": contact_sheet(columns),
            "nearest": contrast.nearest(gallery, found),
        }
