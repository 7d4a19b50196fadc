"""The finished encoder of a run as a frozen teacher: what `target: run:NAME` gives to a method."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets import attention, encoders
from stages.kit.parts.health import UnitRange


class Teacher(nn.Module):
    """An encoder that sees whole images: images in [0,1] -> features (B,N,dim) on the student's
    grid, as any target.

    `tokens` gives more than other targets have: the class token, if there is one (`has_cls`), and
    the state before the encoder's last norm. Takes the encoder over; without gradient, always in
    evaluation mode.
    """

    def __init__(self, encoder: nn.Module, spec):
        super().__init__()
        self.encoder, self.spec = encoder, spec
        self.norm, encoder.norm = encoder.norm, nn.Identity()
        self.dim: int = encoder.num_features
        self.has_cls = getattr(encoder, "cls_token", None) is not None
        self._check = UnitRange("teacher")
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, folder: Path, spec, device: torch.device | str = "cpu") -> Teacher:
        """The teacher in an exported encoder's folder, on `device`. FileNotFoundError if there is
        none.
        """
        teacher = cls(encoders.load(folder), spec)
        if torch.device(device).type == "cpu":
            attention.multiply_out(teacher)
        return teacher.to(device)

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> patch features after the last norm (B,N,dim), float32."""
        return self.tokens(images, norm=True)[:, int(self.has_cls) :]

    @torch.no_grad()
    def tokens(self, images: torch.Tensor, norm: bool = False) -> torch.Tensor:
        """(B,3,H,W) in [0,1] -> class token, if any, and patches, (B,1+N,dim) or (B,N,dim),
        float32.
        """
        self._check(images)
        found = encoders.features(self.encoder, self.spec.normalise(images))
        patch = _on_grid(found["patch"], self.spec.grid)
        tokens = torch.cat([found["cls"][:, None], patch], dim=1) if self.has_cls else patch
        return (self.norm(tokens) if norm else tokens).float()


def _on_grid(patches: torch.Tensor, grid: int) -> torch.Tensor:
    """Patch tokens (B,n,D) of a square grid, resized to (B,grid*grid,D) where the student's grid is
    another.
    """
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(
        maps, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True
    )
    return resized.flatten(2).transpose(1, 2)
