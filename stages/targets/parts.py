"""Parts of images, learnt from a ViT: SemMAE's first stage, our reading (arXiv 2206.10207).

The class token of a frozen self-supervised ViT is mapped to a few part tokens; a patch belongs to
the part whose token is most like the patch's feature. The maps must be good enough to paint the
image from: a decoder gets them as layout and the class token as style, and part tokens of an image
must differ.

The paper's code has masks and student only. Known are part tokens from the class token, maps by
correlation with patch tokens, which refine the class token's attention, a decoder in the manner of
StyleGAN, and a diversity loss. All else is ours:
- parts compete for each patch (a softmax over parts), so that the largest is its part;
- for the first third of the training the logarithm of an attention head's shares is added to each
  part's scores, less and less: part k begins as head k, modulo their number;
- the decoder lifts the maps by a 1x1 convolution, doubles their size (nearest) as often as they
  stay within the image and `side` pixels, each time with a 3x3 convolution, adaptive instance norm
  and leaky ReLU, and paints normalised pixels, with a mean absolute error;
- the mean squared cosine of an image's part tokens has weight 0.1, and 0.05 the divergence of the
  parts' shares in the batch from equal ones, lest one part take all.

Students ask for the parts of the crop that they see, where the official masks come from maps of
whole images, made once. `heads` gives raw attention and `kmeans` clusters as parts instead.
PUBLISHED has the paper's six parts; its training is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages import targets
from stages.kit.data.views import View
from stages.kit.nets.batchnorm import mean_of_all
from stages.kit.nets.target import Frozen
from stages.kit.parts import segments
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = {"patch", "cls", "attention"}
LABELS = False
PUBLISHED = {
    "epochs": 10,
    "batch_size": 1024,
    "parts": 6,
    "width": 128,
    "side": 64,
    "lr": 0.001,
    "lr_per": 1024,
    "warmup": 0.05,
    "weight_decay": 0.05,
}


@dataclass(frozen=True)
class Config(checks.Optimiser, checks.Crop, checks.Parts):
    parts: int = 4
    width: int = 32  # channels of the decoder
    side: int = 32  # pixels of what it paints, at most
    diversity: float = 0.1  # weight of the cosines of part tokens
    balance: float = 0.05  # weight of the shares' divergence from equal ones
    warm: float = 0.33  # share of the training that is helped by attention; 0: none
    crop_min: float = 0.4

    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[2, inf)", "parts", most=1000)
        checks.within(self, "[1, inf)", "width", "side", most=checks.MOST_WIDTH)
        checks.within(self, "[0, inf)", "diversity", "balance", most=1000)
        checks.within(self, "[0, 1]", "warm")


def views(config: Config, spec) -> dict[str, View]:
    return {"view": View(size=spec.image_size, scale=(config.crop_min, 1.0), flip=config.flip)}


class Target(targets.Target):
    """Images -> the part of each patch, and a score of each part. It looks through `upstream`."""

    def __init__(self, config: Config, spec, upstream: Frozen):
        super().__init__()
        self.config, self.spec, self.upstream = config, spec, upstream
        self.sizes = {"ids": config.parts, "logits": config.parts}
        self.queries = nn.Linear(upstream.sizes["cls"], config.parts * upstream.sizes["patch"])

    def tokens(self, cls: Tensor) -> Tensor:
        """Class tokens (B,D) -> part tokens (B,P,D')."""
        return self.queries(cls).unflatten(1, (self.config.parts, -1))

    def scores(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """Part tokens (B,P,D') and patches (B,N,D') -> (B,N,P)."""
        return patches @ tokens.transpose(1, 2) / patches.shape[2] ** 0.5

    def look(self, images: Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        seen = self.upstream.open(images, "patch", "cls")
        with torch.autocast(images.device.type, enabled=False):
            logits = self.scores(self.tokens(seen["cls"].float()), seen["patch"].float())
        return {"ids": logits.argmax(dim=2), "logits": logits}


class Painter(nn.Module):
    """Maps of parts (B,P,g,g) and a style (B,D) -> pictures (B,3,s,s) of normalised pixels.

    Their side s is g, doubled as often as it stays within `most` pixels.
    """

    def __init__(self, parts: int, style: int, width: int, grid: int, most: int):
        super().__init__()
        self.side, count = grid, 0
        while 2 * self.side <= most:
            self.side, count = 2 * self.side, count + 1
        self.lift = nn.Conv2d(parts, width, 1)
        self.style = nn.Sequential(
            nn.Linear(style, width), nn.LeakyReLU(0.2), nn.Linear(width, width)
        )
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(count))
        self.gains = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(count))
        self.colours = nn.Conv2d(width, 3, 1)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        x, style = self.lift(maps), self.style(style)
        for conv, gains in zip(self.convs, self.gains, strict=True):
            x = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            gain, shift = gains(style)[..., None, None].chunk(2, dim=1)
            x = F.leaky_relu(F.instance_norm(x) * (1 + gain) + shift, 0.2)
        return self.colours(x)


class Training(nn.Module):
    whole_batch = "the parts' shares are those of the whole batch"

    def __init__(self, config: Config, spec, upstream: Frozen):
        super().__init__()
        self.config, self.spec = config, spec
        self.target = Target(config, spec, upstream)
        sizes = (config.width, spec.grid, min(config.side, spec.image_size))
        self.painter = Painter(config.parts, upstream.sizes["cls"], *sizes)

    def forward(self, batch: dict, progress) -> dict[str, Tensor]:
        """{"view": (B,3,H,W) in [0,1]} -> {"loss", "picture", "diversity", "balance", "sure"}.

        picture: mean absolute error of what is painted. diversity, balance: 0 for part tokens at
        right angles, and for equal shares. sure: mean share of a patch's largest part.
        """
        images, config = batch["view"], self.config
        seen = self.target.upstream(images, "patch", "cls", "attention")
        tokens = self.target.tokens(seen["cls"])
        scores = self.target.scores(tokens, seen["patch"])
        help_ = progress.scheduled(self.helped)
        maps = (scores + help_ * self.attended(seen["attention"])).float().softmax(dim=2)
        grid = (self.spec.grid, self.spec.grid)
        found = self.painter(maps.transpose(1, 2).unflatten(2, grid), seen["cls"]).float()
        wanted = F.adaptive_avg_pool2d(self.spec.normalise(images), self.painter.side)
        picture = (found - wanted).abs().mean()
        diversity = apart(tokens.float())
        shares = mean_of_all(maps.flatten(0, 1))  # (P,)
        balance = (shares * (shares * config.parts).clamp(min=1e-9).log()).sum()
        return {
            "loss": picture + config.diversity * diversity + config.balance * balance,
            "picture": picture,
            "diversity": diversity,
            "balance": balance,
            "sure": maps.detach().amax(dim=2).mean(),
        }

    def helped(self, fraction: float) -> float:
        """How much attention counts when `fraction` of the training is done: from 1 to 0."""
        return max(0.0, 1 - fraction / self.config.warm) if self.config.warm else 0.0

    def attended(self, attention: Tensor) -> Tensor:
        """Attention (B,heads,N) -> the logarithm of its head's share for each part, (B,N,P)."""
        which = torch.arange(self.config.parts, device=attention.device) % attention.shape[1]
        return attention[:, which].transpose(1, 2).clamp(min=1e-6).log()


def apart(tokens: Tensor) -> Tensor:
    """Mean squared cosine of different part tokens (B,P,D) of an image."""
    tokens, parts = F.normalize(tokens, dim=2), tokens.shape[1]
    cosines = (tokens @ tokens.transpose(1, 2)).square().sum(dim=(1, 2)) - parts
    return cosines.mean() / (parts * (parts - 1))


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: how the parts are used (kit/parts/segments.py)."""
    return segments.health(target, images, config)


def pictures(target: Target, images: Tensor) -> dict[str, np.ndarray]:
    """parts: image | its parts, a colour each | the share of each of the first six."""
    return segments.pictures(target, images)
