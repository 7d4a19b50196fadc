"""BEiT's student: a ViT that predicts a tokenizer's codes of patches that it does not see.

BEiT (arXiv 2106.08254), mc-BEiT (arXiv 2203.15371) and BEiT v2 (arXiv 2208.06366) share encoder,
mask token, a linear layer on the codes, initial weights, decay groups, crop and pictures; `config`
is a checks.TokenPrediction. They differ in masks and losses, which stand in their own files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from stages.kit.data.views import View
from stages.kit.nets import encoders
from stages.kit.nets.init import trunc_init
from stages.kit.nets.masks import block_masks, hidden_ids
from stages.kit.nets.pictures import colour_codes, contact_sheet, paint
from workflow import checks


def views(config, spec) -> dict[str, View]:
    """One crop, which student and tokenizer see alike."""
    jitter = (config.jitter, config.jitter, config.jitter, 0.0)
    scale = (config.crop_min, 1.0)
    return {"view": View(spec.image_size, scale, flip=config.flip, jitter=jitter)}


class BeitGroups:
    """Weight decay and rates of a method with such an encoder; its config is a
    checks.BeitEncoder.
    """

    def no_weight_decay(self) -> set[str]:
        """Besides one-dimensional parameters: the class token, and absolute positions where the
        encoder has any. The mask token is decayed, the table of relative positions with
        `rel_pos_decay`.
        """
        names = encoders.embeddings(self.encoder)
        if not self.config.rel_pos_decay:
            names |= encoders.relative_positions(self.encoder)
        return {f"encoder.{name}" for name in names}

    def rates(self) -> dict[str, float]:
        """Factors of learning rates: of the tables of relative positions."""
        tables = encoders.relative_positions(self.encoder)
        return {f"encoder.{name}": self.config.rel_pos_rate for name in tables}


class TokenStudent(BeitGroups, nn.Module):
    """Encoder, mask token and head (codes), and the tokenizer, which is no part of the module.

    A subclass ends its __init__ with `start`, so that what it adds exists by then.
    """

    def __init__(self, config, spec, target, codes: int):
        super().__init__()
        self.config, self.spec, self.tokenizer = config, spec, target
        self.grid = (spec.grid, spec.grid)
        self.count = checks.hidden_count(spec.grid**2, config.mask_ratio)
        how = {"init": config.init, "layer_scale": config.layer_scale}
        self.encoder = encoders.create(spec, "beit", drop_path=config.drop_path, **how)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        self.head = nn.Linear(self.encoder.embed_dim, codes)

    def start(self) -> None:
        """Initial weights of head and mask token: normal with deviation 0.02, cut there; biases 0,
        whatever `init` says of the encoder.
        """
        trunc_init(self.head)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def blocks(self, uniform: Callable[..., torch.Tensor]) -> torch.Tensor:
        """BEiT's masks, bool (B,N), of at most `count` patches each: the last block may not fit."""
        return block_masks(uniform, self.grid, self.count, self.config.min_block)

    def features(self, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised images (B,3,H,W), bool mask (B,N) -> patches (B,N,D) after the last norm."""
        return encoders.masked(self.encoder, images, mask, self.mask_token)["patch"]

    def sheets(
        self,
        images: torch.Tensor,
        codes: torch.Tensor,
        mask: torch.Tensor,
        ids: torch.Tensor,
        predicted: torch.Tensor,
    ) -> dict[str, np.ndarray]:
        """Pictures of the tokenizer's codes (B,N) and of codes (B,n) predicted at ids (B,n), of
        which those of `mask` (B,N) count.

        codes: image | masked | predicted codes, where hidden | tokenizer's codes, a colour each.
        decoded, if the tokenizer can: image | masked | the tokenizer's picture of its own codes,
        those of hidden patches replaced by the predicted ones | its picture of its own codes.
        """
        mixed, size = torch.where(mask, codes.scatter(1, ids, predicted), codes), images.shape[-1]
        seen, truth = paint(images, mask), colour_codes(codes, size)
        found = {"codes": [images, seen, paint(colour_codes(mixed, size), ~mask), truth]}
        if self.tokenizer.open.decode is not None:
            decoded = (self.tokenizer.open.decode(each) for each in (mixed, codes))
            found["decoded"] = [images, seen, *decoded]
        return {name: contact_sheet(columns) for name, columns in found.items()}


def hidden(mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool masks (B,N) with at most `count` ones each -> positions (B,count), ones first, and
    float32 weights (B,count): 1 of a hidden patch, 0 of a visible one that fills the row up.
    """
    ids = hidden_ids(mask, count)
    return ids, mask.gather(1, ids).float()


def mean_over_hidden(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of values (B,n) with weights (B,n) of `hidden`; 0 if nothing is hidden."""
    return (values * weight).sum() / weight.sum().clamp(min=1)


def shown(rows: int) -> Callable[..., torch.Tensor]:
    """`uniform(name, *shape)` for the masks of pictures: the same every time, on a CPU."""
    generator = torch.Generator().manual_seed(0)

    def uniform(name: str, *shape: int) -> torch.Tensor:
        return torch.rand(rows, *shape, generator=generator)

    return uniform
