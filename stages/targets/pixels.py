"""The patches' own pixels as a target: what MAE regresses (arXiv 2111.06377).

Each patch has zero mean and unit variance. Nothing is trained or loaded. Pixels are first
normalised with the data set's mean and deviation, as the student's are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages import targets
from stages.kit.nets.patches import normalise_patches, patch_statistics, patchify, unpatchify
from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts import health as measure

PRODUCES = {"patch"}
UPSTREAM = None
LABELS = False


@dataclass(frozen=True)
class Config:
    norm_pix: bool = True  # each patch less its mean, over its deviation
    min_rank: float = 2.0  # effective rank over the validation images; below, the stage fails


class Target(targets.Target):
    """Images -> patches as vectors: row, column, channel, the channel fastest."""

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec, self.patch = config, spec, spec.stride
        self.sizes = {"patch": 3 * self.patch**2}

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        patches = self._patches(images)
        return {"patch": normalise_patches(patches) if self.config.norm_pix else patches}

    def render(self, features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Targets or predictions (B,N,D) -> pictures (B,3,H,W) in [0,1].

        With norm_pix a patch gets the mean and deviation of the true patch in `images`, which no
        student knows.
        """
        features = features.float()
        if self.config.norm_pix:
            mean, deviation = patch_statistics(self._patches(images))
            features = features * deviation + mean
        return self.spec.denormalise(unpatchify(features, self.patch)).clamp(0, 1)

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        return patchify(self.spec.normalise(images.float()), self.patch)


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of the patches; blank images fail."""
    advice = "Check that the images are not blank or all alike."
    return measure.of_features(target, images, config.min_rank, advice)


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | their normalised patches: the mean is grey, black and white are two
    deviations from it.
    """
    shown = unpatchify(target(images, "patch")["patch"] / 4 + 0.5, target.patch)
    return {"features": contact_sheet([images, shown])}
