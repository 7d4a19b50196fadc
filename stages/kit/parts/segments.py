"""Parts of images as codes of patches: whether there are any, and what they look like."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.kit.nets.pictures import colour_codes, contact_sheet
from stages.kit.parts.health import perplexity

SHOWN = 6  # parts with a picture of their own
ADVICE = "Other settings of this target, another upstream or a longer training of it may help."


@torch.no_grad()
def health(target, images: Iterable[Tensor], config) -> dict:
    """How parts are used over batches of images (B,3,H,W) in [0,1].

    Perplexity over all patches, mean perplexity within an image, the largest part's share, counts,
    and the problems by `config` (checks.Parts): one part for all, or one for each image.
    """
    size, found = target.sizes["ids"], []
    for batch in images:
        found.append(F.one_hot(target(batch, "ids")["ids"], size).sum(dim=1).cpu())  # (B,P)
    rows = torch.cat(found)
    counts, inside = rows.sum(dim=0), float(perplexity(rows).mean())
    spread, largest = float(perplexity(counts)), float(counts.max() / counts.sum())
    problems = []
    if spread < config.min_parts:
        problems.append(
            f"one part has nearly all patches ({largest:.1%}): perplexity {spread:.2f} of {size}, "
            f"expected at least {config.min_parts:g} (min_parts). {ADVICE}"
        )
    if inside < config.min_in_image:
        problems.append(
            f"images are hardly divided: within an image the parts' perplexity is {inside:.2f}, "
            f"expected at least {config.min_in_image:g} (min_in_image). {ADVICE}"
        )
    return {
        "perplexity": spread,
        "in_image": inside,
        "largest": largest,
        "parts": size,
        "counts": counts.tolist(),
        "problems": problems,
    }


@torch.no_grad()
def pictures(target, images: Tensor) -> dict[str, np.ndarray]:
    """Images (B,3,H,W) in [0,1] -> parts: image | its parts, a colour each | the score of each of
    the first six, from black to white within an image.
    """
    seen, size = target(images, "ids", "logits"), images.shape[-1]
    maps = seen["logits"].float().softmax(dim=2)[..., :SHOWN].transpose(1, 2)  # (B,P,N)
    low, high = maps.amin(dim=2, keepdim=True), maps.amax(dim=2, keepdim=True)
    maps = ((maps - low) / (high - low).clamp(min=1e-9)).unflatten(2, (target.spec.grid, -1))
    maps = F.interpolate(maps, size=size, mode="nearest")
    columns = [images, colour_codes(seen["ids"], size)]
    columns += [each[:, None].expand(-1, 3, -1, -1) for each in maps.unbind(1)]
    return {"parts": contact_sheet(columns)}
