"""VQ-KD: the visual tokenizer of BEiT v2 (arXiv 2208.06366, section 2.1).

A ViT maps every patch of an image to a unit vector of few dimensions; the nearest of K codes
replaces it; a shallow decoder must rebuild a frozen teacher's features from the codes, patch by
patch, under a cosine loss. No pixels are rebuilt. Students then learn to predict the codes of
patches that they do not see.

Follows microsoft/unilm (beit2): architecture, initialisation, both losses; kit/parts/quantize.py
says how the codes move and where that departs. Further departures:
- input must be in [0,1]; the official code guesses from the batch's maximum whether it is 0..1 or
  0..255, and reads normalised images as 0..255;
- k-means runs after a fifth of the training (`kmeans_after`), and until then nothing is quantised.
  The official code clusters what the untrained encoder gives; in short trainings most codes are
  then never used. In 150 steps of batch 64 (512 codes, rendered scenes of 32 pixels) usage over the
  validation images rose from 36 to 100 % with a DINO teacher and from 12 to 64 % with
  EfficientNet-Lite0, and the reconstruction improved, too. PUBLISHED has it in the first step, as
  has presets/photos64.yaml. That step is not quantised yet, but its rate is 0: the codes are made
  by the untrained encoder, and no weight moves before they are used;
- `health` looks at the whole centre square, the official validation at a crop of 224 of 256 pixels;
- timm's ViT has a bias for keys, which the official one lacks; softmax cancels it;
- the learning rate's warm-up is a share of the steps (official: 10 of 100 epochs, the same share);
  the step after it is at the peak, officially its last one is (`schedule: beit`, in PUBLISHED);
- defaults are for small images; PUBLISHED is the recipe for ImageNet, with a CLIP ViT-B/16 as
  teacher (decoder_depth 1 was also released).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages import targets
from stages.kit import dist
from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets import encoders
from stages.kit.nets.init import scale_by_depth
from stages.kit.parts import codes
from stages.kit.parts import health as measure
from stages.kit.parts.quantize import Codebook, Learner
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = {"patch"}
NEEDS = {"plain"}
LABELS = False
PUBLISHED = {
    "epochs": 100,
    "batch_size": 512,
    "codes": 8192,
    "code_dim": 32,
    "decoder_depth": 3,
    "kmeans_after": 0.0,
    "vectors_per_code": 1,
    "crop_min": 0.08,
    "lr": 5e-5,
    "lr_per": 128,
    "min_lr": 1e-5,
    "warmup": 0.1,
    "schedule": "beit",
    "weight_decay": 1e-4,
    "betas": [0.9, 0.99],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Codes):
    code_dim: int = 16
    encoder_depth: int | None = None  # blocks; None: as many as the student
    decoder_depth: int = 1  # deeper rebuilds better and uses fewer codes (ablation in the paper)
    decay: float = 0.99  # of the codes' moving average
    kmeans: bool = True  # start from k-means of the first vectors
    kmeans_after: float = 0.2  # share of the training before k-means, without quantisation
    vectors_per_code: int = 10  # that k-means waits for
    reseed: int = 0  # steps without a hit after which a code restarts; 0: never, as published
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[2, inf)", "code_dim")
        checks.within(self, "[1, inf)", "decoder_depth", "vectors_per_code", "encoder_depth")
        checks.within(self, "[0, inf)", "reseed")
        checks.within(self, "[0, 1)", "decay")
        checks.within(self, "[0, 1]", "kmeans_after")


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Target(targets.Target):
    """The tokenizer: images -> codes ("ids"), or each patch's cosines with all codes ("logits")."""

    def __init__(self, config: Config, spec):
        super().__init__()
        self.spec = spec
        self.sizes = {"ids": config.codes, "logits": config.codes}
        depth = spec.model.depth if config.encoder_depth is None else config.encoder_depth
        self.encoder = _transformer(spec, depth=depth)
        self.head = _head(self.encoder.embed_dim, config.code_dim)
        self.codebook = Codebook(config.codes, config.code_dim)
        # mean cosine over the last few hundred training steps
        self.register_buffer("reconstruction", torch.zeros(()))
        self.eval()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> unit vectors (B,N,code_dim), float32."""
        tokens = encoders.features(self.encoder, 2 * images - 1)["patch"]
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.head(tokens.float()), dim=-1)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        u, found = self.encode(images), {}
        if "ids" in wanted:
            found["ids"] = self.codebook.assign(u)
        if "logits" in wanted:
            found["logits"] = u @ self.codebook.vectors.T
        return found


class Training(nn.Module):
    """Trains `target` to keep what matters of the features of `upstream` (targets.Frozen)."""

    def __init__(self, config: Config, spec, upstream):
        super().__init__()
        self.config, self.grid, self.upstream = config, spec.grid, upstream
        self.target = Target(config, spec)
        codes_as_image = replace(
            spec, image_size=spec.grid, model=replace(spec.model, patch_size=1)
        )
        self.decoder = _transformer(
            codes_as_image, depth=config.decoder_depth, in_chans=config.code_dim
        )
        self.head = _head(self.decoder.embed_dim, upstream.sizes["patch"])
        self.learner = Learner(
            self.target.codebook,
            config.decay,
            config.kmeans,
            config.vectors_per_code,
            config.reseed,
        )
        self._cosines: list[torch.Tensor] = []

    def no_weight_decay(self) -> set[str]:
        return {
            f"{part}.{name}"
            for part in ("target.encoder", "decoder")
            for name in ("cls_token", "pos_embed")
        }

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "reconstruction", "commitment", "usage",
        "perplexity"}: the loss, its two terms, and how many codes this batch uses.
        """
        images = batch["view"]
        wanted = self.upstream(images, "patch")["patch"]  # (B,N,dim)
        u = self.target.encode(images)
        quantised, commitment, hits = u, u.new_zeros(()), u.new_zeros(self.config.codes)
        if not self.training or self.learner.ready():
            ids, quantised, commitment = self.target.codebook(u)
            ones = torch.ones_like(hits[:1]).expand(ids.numel())
            hits = torch.zeros_like(hits).scatter_add_(0, ids.flatten(), ones)
            if self.training:
                self.learner.count(u, ids)
        elif self.clusters(progress):
            self.learner.collect(u)
        rebuilt = self.decode(quantised).float()
        reconstruction = 1 - F.cosine_similarity(rebuilt, wanted.float(), dim=-1).mean()
        if self.training:
            self._cosines.append(1 - reconstruction.detach())
        return {
            "loss": reconstruction + commitment,
            "reconstruction": reconstruction,
            "commitment": commitment,
            "usage": (hits > 0).float().mean(),
            "perplexity": measure.perplexity(hits).float(),
        }

    @eager  # it reads the step
    def clusters(self, progress) -> bool:
        """Whether this step's vectors are for k-means.

        It runs as soon as it has enough of them, and from the middle of the training on with all
        that it has. The codes are used from the next step on.
        """
        return (progress.step + 1) / progress.steps > self.config.kmeans_after

    def decode(self, quantised: torch.Tensor) -> torch.Tensor:
        """Codes on the grid (B,N,code_dim) -> the teacher's features (B,N,dim)."""
        grid = quantised.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.head(encoders.features(self.decoder, grid)["patch"])

    @torch.no_grad()
    def after_step(self, progress) -> None:
        if self.learner.ready():
            self.learner.step(progress.seed, progress.step)
        else:
            self.learner.start(progress.seed, wait=2 * (progress.step + 1) <= progress.steps)
        if self._cosines:
            weight = max(0.01, 1 / (progress.step + 1))  # a plain mean at first
            self.target.reconstruction.lerp_(dist.mean(torch.stack(self._cosines).mean()), weight)
            self._cosines.clear()


def _transformer(spec, **kw) -> nn.Module:
    """A plain ViT with learnt positions, initialised as BEiT v2's tokenizer.

    Weights normal with deviation 0.02; the patch embedding keeps torch's default; what block i
    (from 1) adds to the residual stream is divided by sqrt(2 i).
    """
    vit = encoders.create(spec, "timm", init_values=None, pos_embed="learn", **kw)
    for layer in vit.modules():
        if isinstance(layer, nn.Linear):
            _normal(layer)
    for token in (vit.cls_token, vit.reg_token, vit.pos_embed):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, a=-2.0, b=2.0)
    scale_by_depth(vit.blocks)
    return vit


def _head(width: int, dim: int) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim))
    for layer in head[::2]:
        _normal(layer)
    return head


def _normal(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02, a=-2.0, b=2.0)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: usage (share of the codes that were hit), perplexity, counts."""
    advice = (
        "Fewer codes or a smaller code_dim, decoder_depth 1, more or more varied images and longer "
        "training all raise it; so may `reseed` (steps; not published)."
    )
    found = codes.health(target, images, config, advice)
    cosine = float(target.reconstruction)
    if not math.isfinite(cosine):
        found["problems"].append(f"the reconstruction is not finite ({cosine}); lower lr")
    return found | {"train_reconstruction_cosine": cosine}


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """code_map and codebook of kit/parts/codes.py; near is a large cosine."""
    u = target.encode(images)
    ids = target.codebook.assign(u)
    cosine = (u * target.codebook.vectors[ids]).sum(dim=-1)
    return codes.pictures(images, ids, cosine, target.spec.stride)
