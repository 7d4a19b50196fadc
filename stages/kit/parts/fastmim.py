"""FastMIM's masking, decoder and targets (arXiv 2212.06593), for images of any size.

Squares of the image are painted with one learnt colour, then the whole image goes through any
encoder. A small transformer decoder and a linear layer predict at each place that comes out the
target of its pixels: their HOG as MaskFeat defines it, or themselves, normalised. methods/
fastmim.py and fastmimp.py are its users.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.init import xavier_init
from stages.kit.nets.masks import random_masking
from stages.kit.nets.patches import normalise_patches, patch_statistics, patchify, unpatchify
from stages.kit.nets.pictures import contact_sheet, paint
from stages.kit.parts import maskfeat
from workflow import checks


class PaintedImages(nn.Module):
    """Encoder, colour and decoder. `sizes`: whether images come in several sizes."""

    def __init__(self, config, spec, sizes: bool = False):
        super().__init__()
        self.config, self.spec = config, spec
        self.stride, self.block = spec.stride, config.side(spec.model)
        self.cell = config.cell_side(spec.model)  # pixels for which there is one error
        how = {"dynamic_img_size": True} if sizes else {}
        style = "sincos" if "sincos" in spec.model.styles else "timm"
        self.encoder = encoders.create(spec, style, **how)
        if len(encoders.depths(self.encoder)) > 1:  # with stages; a ViT has these weights already
            xavier_init(self.encoder)
        # in a tuple, which registers nothing: it shares the encoder's parameters
        self.trained = (encoders.shallow(self.encoder, config.discard),)
        kept = {id(p) for p in self.trained[0].parameters()}
        for parameter in self.encoder.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
        self.colour = nn.Parameter(torch.empty(1, 3, 1, 1))
        nn.init.normal_(self.colour, std=0.02)
        width, dim = self.encoder.num_features, config.decoder_dim
        norm = partial(nn.LayerNorm, eps=self.encoder.norm.eps)
        blocks = [
            Block(dim, config.decoder_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(config.decoder_depth)
        ]
        numbers = 3 * maskfeat.BINS if config.predict == "hog" else 3 * self.cell**2
        out = numbers * (self.stride // self.cell) ** 2
        self.decoder = nn.Sequential(nn.Linear(width, dim), *blocks, norm(dim), nn.Linear(dim, out))
        xavier_init(self.decoder)

    def forward(self, batch: dict, progress) -> dict[str, torch.Tensor]:
        """{"view": (B,3,S,S) in [0,1]} -> {"loss": mean squared error at hidden places, "cosine":
        likeness of prediction and target there}.
        """
        images = self.spec.normalise(batch["view"])
        mask = self.mask(progress.uniform("mask", (images.shape[-1] // self.block) ** 2))
        predicted, truth = self.predict(images, mask).float(), self.target(images)
        error = (predicted - truth).square().mean(dim=1)  # (B,n,n), n cells along a side
        cosine = F.cosine_similarity(predicted.detach(), truth, dim=1)
        hidden = grown(mask, truth.shape[-1])[:, 0]
        return {
            "loss": (error * hidden).sum() / hidden.sum(),
            "cosine": (cosine * hidden).sum() / hidden.sum(),
        }

    def mask(self, noise: torch.Tensor) -> torch.Tensor:
        """Uniform noise (B,g*g) -> float (B,1,g,g) of blocks, 1 = hidden."""
        keep = checks.keep_count(noise.shape[1], self.config.mask_ratio, "blocks")
        _, _, mask = random_masking(noise, keep)
        side = round(noise.shape[1] ** 0.5)
        return mask.view(-1, 1, side, side)

    def painted(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised images with the colour where the blocks are hidden."""
        hidden = grown(mask, images.shape[-1]) > 0
        return torch.where(hidden, self.colour.to(images.dtype), images)

    def predict(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised images (B,3,S,S), mask (B,1,g,g) -> (B,K,n,n), K numbers of each of n x n
        cells.
        """
        tokens = self.trained[0].forward_features(self.painted(images, mask))
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        found = self.decoder(tokens)[:, getattr(self.encoder, "num_prefix_tokens", 0) :]
        return maskfeat.from_tokens(found, self.stride // self.cell)

    @torch.no_grad()
    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B,3,S,S) -> (B,K,n,n), float32."""
        if self.config.predict == "hog":
            return maskfeat.hog(images, self.cell, self.config.norm)
        patches = patchify(images.float(), self.cell)
        patches = normalise_patches(patches) if self.config.norm else patches
        side = images.shape[-1] // self.cell
        return patches.transpose(1, 2).unflatten(2, (side, side))

    @torch.no_grad()
    def pictures(self, batch: dict) -> dict[str, np.ndarray]:
        """Of at most 8 images: original | as the encoder gets them | the target | its prediction.

        HOG is drawn as strokes across the gradients, pixels as pixels. The prediction is shown
        where the image is hidden. Normalised pixels get the mean and deviation of the TRUE cell,
        which the model does not know.
        """
        pixels = batch["view"][:8]
        images = self.spec.normalise(pixels)
        side = images.shape[-1] // self.block
        noise = torch.rand(len(images), side**2, generator=torch.Generator().manual_seed(0))
        mask = self.mask(noise.to(images.device))
        seen = self.spec.denormalise(self.painted(images, mask))
        predicted, truth = self.predict(images, mask).float(), self.target(images)
        wanted, found = self.drawn(truth, images), self.drawn(predicted, images)
        visible = 1 - mask.flatten(1)
        shown = (
            paint(found, visible)
            if self.config.predict == "hog"
            else torch.where(grown(mask, images.shape[-1]) > 0, found, pixels)
        )
        return {"predictions": contact_sheet([pixels, seen, wanted, shown])}

    def drawn(self, maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Targets or predictions (B,K,n,n) as pictures (B,3,S,S)."""
        if self.config.predict == "hog":
            return maskfeat.strokes(maps, self.cell)
        patches = maps.flatten(2).transpose(1, 2)
        if self.config.norm:
            mean, deviation = patch_statistics(patchify(images.float(), self.cell))
            patches = patches * deviation + mean
        return self.spec.denormalise(unpatchify(patches, self.cell)).clamp(0, 1)


def grown(mask: torch.Tensor, side: int) -> torch.Tensor:
    """A mask (B,1,g,g) on a grid of `side` places along a side, (B,1,side,side)."""
    times = side // mask.shape[-1]
    return mask.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
