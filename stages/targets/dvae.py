"""A discrete VAE, the tokenizer of BEiT (arXiv 2106.08254, section 2.1): small, and trained here.

A convolutional encoder gives each patch of an image a score for each of K codes. A sample of the
codes, relaxed by Gumbel noise and a temperature (arXiv 1611.01144, 1611.00712), mixes vectors of a
codebook, from which a decoder rebuilds the pixels. Lower temperatures make the mixture a choice.
The loss is the error of the pixels plus the divergence of the encoder's distribution from the
uniform one. As a finished tokenizer it takes the code with the largest score, without noise.

Follows the small model of microsoft/unilm (beit/modeling_discrete_vae.py, DiscreteVAE): strided
convolutions, residual blocks, pixels in [-1,1], both losses. BEiT itself used DALL-E's
(arXiv 2102.12092; weights by path: stages/targets/dalle.py), whose schedules are here, too.
Departures:
- the divergence is a mean over patches and images (`kl_over: tokens`), so that `kl_weight` is that
  of one patch beside the mean squared error of one number. The released code sums over the batch:
  its "batchmean" divides by the first length of its first tensor, which is 1. `kl_over: batch` does
  that, and a batch then cannot be cut into micro batches;
- temperature and weight of the divergence follow half a cosine over the first shares of the
  training, as DALL-E's. The released model has a constant temperature of 0.9 and weight 0;
- `straight_through` passes the likeliest sampled code on and the mixture's gradient back;
- there are as many strided stages as make a cell of a patch: log2(pixels of a patch);
- of images that are not of `input_size` pixels it makes such, by Lanczos' filter. BEiT gives its
  tokenizer 112 pixels for the 224 of the student;
- noise is a pure function of seed, step and sample;
- the authors did not publish how they train it. PUBLISHED has the released model's sizes with
  DALL-E's batch, rates and schedules; there, pixels have a logit-Laplace likelihood, the weights
  are averaged over time, and the rate stays at its end from step 1,200,000 of 3,000,000 on. A
  weight of 6.6 is there divided by the 192 numbers of a code, which is the one per token here;
- defaults are for small images. In 300 steps of 32 images of 32 pixels (rendered patterns, 128
  codes, 32 channels, one seed), with kl_weight 0, 0.001 and 0.01, 12, 29 and 39 % of the codes were
  used, and 26, 22 and 6 % of the pixels' variance rebuilt; in 450 steps with 64 channels and 0.01
  86 % of the codes were used and 32 % rebuilt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages import targets
from stages.kit import dist
from stages.kit.data.views import View
from stages.kit.eager import eager
from stages.kit.nets.pictures import contact_sheet
from stages.kit.nets.resize import lanczos
from stages.kit.parts import codes
from stages.kit.parts import health as measure
from stages.kit.train.schedule import cosine
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = None
LABELS = False
PUBLISHED = {
    "epochs": 1200,
    "batch_size": 512,
    "codes": 8192,
    "code_dim": 512,
    "hidden": 256,
    "temperature": 1.0,
    "temperature_end": 0.0625,
    "temperature_share": 0.05,
    "kl_weight": 0.034375,
    "kl_share": 0.0017,
    "crop_min": 0.08,
    "lr": 1e-4,
    "lr_per": None,
    "min_lr": 1.25e-6,
    "warmup": 0.0,
    "weight_decay": 1e-4,
    "betas": [0.9, 0.999],
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Codes):
    input_size: int | None = None  # side of what it looks at, pixels; None: the student's images
    hidden: int = 64  # channels
    code_dim: int = 64
    straight_through: bool = False  # hard codes forward, relaxed ones backward
    temperature: float = 1.0  # of the relaxation, at first
    temperature_end: float = 0.0625
    temperature_share: float = 0.5  # of the training, after which it has its end
    kl_weight: float = 0.01  # of the divergence from uniform codes, at the end
    kl_share: float = 0.1  # of the training, in which it rises from 0
    kl_over: Literal["tokens", "batch"] = "tokens"  # mean per token, or the released code's sum
    error: Literal["mse", "smooth_l1"] = "mse"  # of pixels in [-1,1]
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[1, inf)", "hidden", "code_dim", most=checks.MOST_WIDTH)
        checks.within(self, "[4, inf)", "input_size", most=checks.MOST_PIXELS)
        checks.within(self, "(0, inf)", "temperature", "temperature_end")
        checks.within(self, "[0, inf)", "kl_weight")
        checks.within(self, "[0, 1]", "temperature_share", "kl_share")

    def stages(self, image_size: int, grid: int) -> int:
        """Strided stages, log2 of the pixels along a patch. ValueError if that is no integer."""
        side = self.input_size or image_size
        stages = max(1, side // grid).bit_length() - 1
        if grid * 2**stages != side:
            raise ValueError(
                f"input_size: found {side} pixels for {grid} patches along a side, expected "
                f"{grid} times a power of two, such as {grid * 2 ** max(1, stages)}"
            )
        return stages

    def check(self, image_size: int, model) -> None:
        self.stages(image_size, model.grid(image_size))


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Residual(nn.Sequential):
    """x + three convolutions of it, all of `width` channels."""

    def __init__(self, width: int):
        three = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        three += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        super().__init__(*three, nn.Conv2d(width, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Target(targets.Target):
    """The tokenizer: images -> scores of each patch's codes, and the likeliest ("ids"); `decode`
    makes pictures of codes.
    """

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.sizes = {"ids": config.codes, "logits": config.codes}
        self.side, width = config.input_size or spec.image_size, config.hidden
        encoder, decoder = [], []
        stages = config.stages(spec.image_size, spec.grid)
        for stage in range(stages):
            down = nn.Conv2d(width if stage else 3, width, 4, stride=2, padding=1)
            up = nn.ConvTranspose2d(
                width if stage else config.code_dim, width, 4, stride=2, padding=1
            )
            encoder += [down, nn.ReLU(), Residual(width)]
            decoder += [up, nn.ReLU(), Residual(width)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width if stages else 3, config.codes, 1))
        self.codebook = nn.Embedding(config.codes, config.code_dim)
        last = nn.Conv2d(width if stages else config.code_dim, 3, 1)
        self.decoder = nn.Sequential(*decoder, last)
        self.eval()

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        logits = self.scores(self.pixels(images))
        return {"logits": logits, "ids": logits.argmax(dim=-1)}

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> what it encodes and rebuilds, (B,3,side,side) in [-1,1]."""
        return 2 * lanczos(images, self.side) - 1

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1,1] -> logits (B,N,K) of the codes, float32 or wider."""
        found = self.encoder(pixels).flatten(2).transpose(1, 2)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def rebuild(self, shares: torch.Tensor) -> torch.Tensor:
        """Shares (B,N,K) of the codes in each patch -> pixels (B,3,side,side) about [-1,1]."""
        vectors = (shares @ self.codebook.weight).transpose(1, 2)
        return self.decoder(vectors.unflatten(2, (self.spec.grid, self.spec.grid)))

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes (B,N) -> pictures (B,3,image_size,image_size) in [0,1]."""
        pixels = self.rebuild(F.one_hot(ids, self.config.codes).to(self.codebook.weight.dtype))
        pictures = (pixels.float().clamp(-1, 1) + 1) / 2
        return lanczos(pictures, self.spec.image_size)


class Training(nn.Module):
    """Trains `target` to rebuild images from few codes."""

    def __init__(self, config: Config, spec, upstream=None):
        super().__init__()
        self.config, self.target = config, Target(config, spec)
        if config.kl_over == "batch":
            self.whole_batch = "the divergence is summed over the batch (kl_over)"

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "reconstruction": error of the pixels, "kl":
        mean divergence of a patch's codes from uniform, nats, "perplexity" of the likeliest codes
        of this batch}.
        """
        config, pixels = self.config, self.target.pixels(batch["view"])
        logits = self.target.scores(pixels)  # (B,N,K)
        noise = gumbel(progress.uniform("gumbel", *logits.shape[1:])).to(logits)
        temperature, weight = self.scheduled(progress, logits)
        rebuilt = self.target.rebuild(relaxed(logits + noise, temperature, config.straight_through))
        error = F.mse_loss if config.error == "mse" else F.smooth_l1_loss
        reconstruction = error(rebuilt.to(logits), pixels.to(logits))
        kl = divergence(logits)
        # ranks are averaged: a sum over all of them is this one's times their number
        tokens = kl.numel() * dist.world() if config.kl_over == "batch" else 1
        hits = torch.zeros_like(logits[0, 0])
        ids = logits.detach().argmax(dim=-1).flatten()
        hits = hits.scatter_add(0, ids, torch.ones_like(hits[:1]).expand(len(ids)))
        return {
            "loss": reconstruction + tokens * weight * kl.mean(),
            "reconstruction": reconstruction,
            "kl": kl.mean(),
            "perplexity": measure.perplexity(hits).float(),
        }

    @eager  # it reads the step; torch compiles no division by a float64 scalar
    def scheduled(self, progress, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Temperature and weight of the divergence in this step, scalars of the kind of `like`."""
        now = progress.fraction
        return like.new_tensor(self.temperature(now)), like.new_tensor(self.kl_weight(now))

    def temperature(self, fraction: float) -> float:
        """Of the relaxation, when `fraction` of the training is done."""
        config = self.config
        return ramp(fraction, config.temperature_share, config.temperature, config.temperature_end)

    def kl_weight(self, fraction: float) -> float:
        """Of the divergence, when `fraction` of the training is done."""
        return ramp(fraction, self.config.kl_share, 0.0, self.config.kl_weight)


def ramp(fraction: float, share: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end` over the first `share` of the training, then `end`."""
    return cosine(fraction / share, start, end) if share else end


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0,1), multiples of 2^-24 -> standard Gumbel noise -ln(-ln u), finite."""
    return -(-uniform.double().clamp(min=2.0**-25).log()).log()


def relaxed(noisy: torch.Tensor, temperature: torch.Tensor, hard: bool) -> torch.Tensor:
    """Logits plus noise (B,N,K) -> shares of the codes, which sum to 1 over K.

    hard: 1 for the largest and 0 for the others, with the gradient of the soft ones.
    """
    soft = (noisy / temperature).softmax(dim=-1)
    if not hard:
        return soft
    chosen = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return chosen + soft - soft.detach()


def divergence(logits: torch.Tensor) -> torch.Tensor:
    """KL of softmax(logits) (B,N,K) from the uniform distribution, (B,N): ln K less its entropy."""
    log_p = logits.log_softmax(dim=-1)
    return (log_p.exp() * (log_p + math.log(logits.shape[-1]))).sum(dim=-1)


@torch.no_grad()
def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: usage, perplexity and counts of the codes; "majority", the share
    of the commonest one, which a student that has learnt nothing gets right; "explained", the share
    of the pixels' variance about each channel's mean that the decoder rebuilds from the codes.
    """
    advice = (
        "Fewer codes, a larger kl_weight, a higher temperature_end, more or more varied images and "
        "longer training all raise it."
    )
    left, squares, sums, pixels = 0.0, 0.0, 0.0, 0

    def compared():
        nonlocal left, squares, sums, pixels
        for batch in images:
            truth, ids = batch.double(), target(batch, "ids")["ids"]
            left += float((truth - target.decode(ids)).square().sum())
            squares = squares + truth.square().sum((0, 2, 3))
            sums = sums + truth.sum((0, 2, 3))
            pixels += truth[:, 0].numel()
            yield batch

    found = codes.health(target, compared(), config, advice)
    variance = float((squares - sums.square() / pixels).sum())
    found["explained"] = 1 - left / variance if variance > 0 else 1.0
    found["majority"] = max(found["counts"]) / found["tokens"]
    if not math.isfinite(found["explained"]):
        found["problems"].append("the pictures of the decoder are not finite; lower lr")
    return found


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """reconstruction: images | what the decoder makes of their codes; and code_map and codebook of
    kit/parts/codes.py, where near is a large score.
    """
    found = target(images, "ids", "logits")
    best = found["logits"].log_softmax(dim=-1).amax(dim=-1)
    again = contact_sheet([images, target.decode(found["ids"])])
    return {"reconstruction": again} | codes.pictures(
        images, found["ids"], best, target.spec.stride
    )
