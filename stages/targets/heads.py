"""Which head of a network's class token looks at a patch most: raw attention as parts of an image.

The upstream gives the attention of its class token in its last block (of DINO arXiv 2104.14294,
iBOT, MoCo v3, or a run's encoder); a patch's code is the number of the head that gives it the
largest share. Nothing is trained. SemMAE (arXiv 2206.10207, table 4) has masks of such parts as the
control of parts that are learnt (`parts`): they helped it no more than random masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages import targets
from stages.kit.nets.target import Frozen
from stages.kit.parts import segments
from workflow import checks

PRODUCES = {"ids", "logits"}
UPSTREAM = {"attention"}
LABELS = False


@dataclass(frozen=True)
class Config(checks.Parts):
    pass


class Target(targets.Target):
    """Images -> the head that looks at each patch most, and the logarithms of their shares."""

    def __init__(self, config: Config, spec, upstream: Frozen):
        super().__init__()
        self.config, self.spec, self.upstream = config, spec, upstream
        heads = upstream.sizes["attention"]
        self.sizes = {"ids": heads, "logits": heads}
        self.eval()

    def look(self, images: torch.Tensor, wanted: set[str], norm: bool, layers: tuple) -> dict:
        shares = self.upstream.open(images, "attention")["attention"].float()  # (B,heads,N)
        logits = shares.transpose(1, 2).clamp(min=1e-9).log()
        return {"ids": logits.argmax(dim=2), "logits": logits}


def health(target: Target, images, config: Config) -> dict:
    """Over the validation images: how the parts are used (kit/parts/segments.py)."""
    return segments.health(target, images, config)


@torch.no_grad()
def pictures(target: Target, images: torch.Tensor) -> dict[str, np.ndarray]:
    """parts: image | its parts, a colour each | the share of each of the first six."""
    return segments.pictures(target, images)
