"""The image tower of a network that knows language: CLIP's (arXiv 2103.00020), as a target.

A ViT, its last norm (ln_post) and a projection without bias into the space that images and captions
share. CLIP applies norm and projection to the class token alone; MILAN, EVA, BEiT v2 and dBOT apply
the same two to the patches, although CLIP never trained them for that. So does this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import encoders
from stages.kit.nets.target import Target, on_grid

CHUNK = 32  # images at a time on a CPU: large maps fall out of its caches
STATISTICS = {  # mean and deviation of pixels in [0,1]
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Tower(Target):
    """Images in [0,1] -> "patch" (B,N,E) and "cls" (B,E) in the shared space, and "attention"
    (B,heads,N), the class token's in the last block. N is the student's grid: what lies on another
    one is resized, features before any normalisation to unit length, attention with its sum kept.

    `encoder`, `proj` (a Linear without bias) and the statistics of the input are set by `place`.
    """

    def place(
        self,
        encoder: nn.Module,
        proj: nn.Linear,
        size: int,
        statistics: tuple[Sequence[float], Sequence[float]],
        blocks: Sequence[int] = (),
        post_norm: bool = True,
        project: bool = True,
    ) -> None:
        """size: side in pixels of what the encoder sees; statistics: mean and deviation of its
        input; blocks: numbers of those whose normed outputs are averaged, () the last; post_norm,
        project: whether norm and projection are applied to the patches, too.
        """
        self.encoder, self.proj, self.size = encoder, proj, size
        self.blocks = tuple(blocks) or (len(encoder.blocks),)
        self.post_norm, self.project = post_norm, project
        width = proj.out_features if project else encoder.embed_dim
        heads = encoder.blocks[-1].attn.num_heads
        self.sizes = {"patch": width, "cls": width, "attention": heads}
        for name, values in zip(("mean", "std"), statistics, strict=True):
            values = torch.tensor(values).view(3, 1, 1)
            self.register_buffer(name, values.to(proj.weight.device), persistent=False)

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        parts = images.split(CHUNK) if images.device.type == "cpu" else [images]
        found = [self._part(part, "attention" in wanted) for part in parts]
        return {name: torch.cat([each[name] for each in found]) for name in wanted}

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> what the encoder sees, (B,3,size,size)."""
        if tuple(images.shape[-2:]) != (self.size, self.size):
            how = {"mode": "bicubic", "antialias": True}
            images = F.interpolate(images, size=(self.size, self.size), **how).clamp(0, 1)
        return (images - self.mean) / self.std

    def _part(self, images: torch.Tensor, attention: bool) -> dict[str, torch.Tensor]:
        encoder, grid = self.encoder, self.spec.grid
        pixels = self.preprocess(images)
        how = {"norm": False, "taps": self.blocks, "attention": attention}
        seen = encoders.masked(encoder, pixels, None, None, **how)
        patch, cls = self._finished(list(seen["taps"].values()))
        found = {"patch": on_grid(patch.float(), grid), "cls": cls.float()}
        if attention:
            prefix = encoder.num_prefix_tokens
            weights = seen["attention"][:, :, 0, prefix:].transpose(1, 2)  # (B,n,heads)
            share = weights.shape[1] / grid**2  # a finer grid has more patches, each with less
            found["attention"] = on_grid(weights, grid).transpose(1, 2) * share
        return found

    def _finished(self, states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B,P+n,D) after blocks -> patches (B,n,E) and class token (B,E)."""
        norm, prefix = self.encoder.norm, self.encoder.num_prefix_tokens
        tokens = states[0] if len(states) == 1 else sum(map(norm, states)) / len(states)
        cls, patch = norm(tokens[:, 0]), tokens[:, prefix:]
        patch = norm(patch) if self.post_norm else patch
        return (self.proj(patch), self.proj(cls)) if self.project else (patch, cls)
