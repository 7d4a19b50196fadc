"""Histograms of oriented gradients (HOG) as a target, as DMJD defines them (arXiv 2301.00230).

The idea is MaskFeat's (arXiv 2112.09133). Each channel of each cell of a few pixels gives a
histogram of 9 orientations at zero mean and unit variance; a patch's target is those of its cells.
Nothing is trained or loaded, and no gradient passes to the images. kit/parts/hog.py has the
definition. The official code knows cells of 8 pixels in patches of 16. At other sizes the default
is half a patch, too; it is a whole patch where half of it has less than 4 pixels, in which hardly a
gradient fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages import targets
from stages.kit.nets.pictures import contact_sheet
from stages.kit.parts import health as measure
from stages.kit.parts import hog
from workflow import checks

PRODUCES = {"patch"}
UPSTREAM = None
LABELS = False


@dataclass(frozen=True)
class Config:
    cell: int | None = None  # pixels; None: half a patch, a whole one if odd or below 8 pixels
    bins: int = 9  # orientations in 180 degrees
    min_rank: float = 2.0  # effective rank over the validation images; below, the stage fails

    def __post_init__(self):
        checks.within(self, "[1, inf)", "cell")
        checks.within(self, "[2, inf)", "bins", most=10_000)
        checks.within(self, "[0, inf)", "min_rank")

    def check(self, image_size: int, model) -> None:
        if model.stride % self.pixels(model.stride):
            raise ValueError(
                f"cell: {self.cell} pixels do not divide the student's patches of {model.stride}"
            )

    def pixels(self, patch: int) -> int:
        """Side of a cell."""
        if self.cell is not None:
            return self.cell
        return patch // 2 if patch % 2 == 0 and patch >= 8 else patch


class Target(targets.Target):
    """Images -> histograms of each patch: cell row, cell column, bin, channel."""

    def __init__(self, config: Config, spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.cell = config.pixels(spec.stride)
        self.cells = spec.stride // self.cell  # along a patch's side
        self.sizes = {"patch": 3 * config.bins * self.cells**2}

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        # of 0..255: on a scale of 1 the whitening's eps would damp weak gradients
        histograms = hog.hog(images.float() * 255, self.cell, self.config.bins)
        return {"patch": hog.to_tokens(hog.whiten(histograms), self.cells)}

    def render(self, features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Targets or predictions (B,N,D) -> pictures of edges (B,3,H,W) in [0,1], in colours."""
        return hog.strokes(hog.from_tokens(features.float(), self.cells), self.cell)


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: effective rank and spread of the targets; blank images fail."""
    advice = "Check that the images are not blank or all alike."
    return {"cell": target.cell, **measure.of_features(target, images, config.min_rank, advice)}


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """features: images | the edges in their histograms."""
    edges = target.render(target(images, "patch")["patch"], images)
    return {"features": contact_sheet([images, edges])}
