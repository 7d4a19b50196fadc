"""Whether the codes of a tokenizer are worth predicting: asked of every target that gives "ids".

Agreement, without labels. Two random crops of an image (CROP of its area, half of them mirrored)
see the same things at the patches where they overlap. For image i let a(i) be the share of the
first crop's patches, of those whose centre lies in the second crop, that have the code of the
second crop's patch there. Let c(i) be the same with the second crop's codes taken from other images
(OTHERS of them, the mean), at the same places of the grid. Then

    agreement A = mean of a,    chance C = mean of c,    excess A - C

with a 95 % interval of the excess from a bootstrap over images. Codes at random, one code for
everything, and codes that tell the place in the grid have an excess of 0. The excess does not say
that codes mean much. Measured with 128 k-means codes on rendered scenes of 32 pixels (agreement,
chance; probe as below, in which chance is 17): of HOG 7, 1; 35. Of pixels 55, 2; 23. Of an
untrained ViT 61, 1; 19.

Where there are labels, the codes are probed as well (kit/parts/probes.py): by their histogram over
an image, beside the features of the teacher (`upstream`), which is what the tokenizer could know.

At most HELD_OUT validation images are looked at, never the test split. Below LEAST images no
verdict is given. `examine` says when a target fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stages.kit import keyed
from stages.kit.data.batches import MOST, held_out
from stages.kit.data.loader import Batches
from stages.kit.data.views import View
from stages.kit.nets.target import Frozen
from stages.kit.parts import probes
from stages.kit.parts.probes import HELD_OUT, LEVEL
from stages.kit.spec import Spec

LEAST = 32  # images
CROP = (0.4, 1.0)
OTHERS = 8  # images whose codes tell what chance gives
RESAMPLES = 1000  # of the bootstrap
WEAK = 0.1  # share of the room above chance that is little for codes to agree in


@dataclass
class Found:
    """numbers: what was measured, fractions and counts; problems, notes: in words."""

    numbers: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def examine(
    target,
    upstream: Frozen | None,
    data: Path,
    spec: Spec,
    seed: int,
    device: torch.device | str,
    batch_size: int = MOST,
) -> Found:
    """Measures the codes of a finished target on the data set that it was made from.

    Problems, for which it should not be used: the interval of the excess includes 0; or the codes
    agree hardly better than by chance (excess below WEAK of 1 - chance) and the interval of the
    probe of codes includes chance, too. Labels alone condemn no codes, since they may name what
    nobody can see. A note, but no problem: the probe of codes is below that of the untrained
    encoder.
    """
    found = Found()
    found.numbers |= agreement_of(target, data, spec, seed, device, batch_size)
    found.numbers |= probes.of_codes(target, upstream, data, spec, seed, device, batch_size)
    judge(found)
    return found


def judge(found: Found) -> None:
    """Adds the problems and notes that the numbers give."""
    n = found.numbers
    advice = (
        "A student would learn nothing from them. Train the upstream longer, choose another one, "
        "or other codes; `gate: false` in this target lets students learn from them all the same."
    )
    excess = n["agreement"] - n["agreement_chance"] if "agreement" in n else None
    judged = excess is not None and n["agreement_images"] >= LEAST
    if judged and not n["excess_low"] > 0:
        found.problems.append(
            f"the codes of two crops of an image agree no better than by chance: in "
            f"{n['agreement']:.1%} of the places that both see, by chance "
            f"{n['agreement_chance']:.1%} (95 % interval of the difference "
            f"{100 * n['excess_low']:.1f} to {100 * n['excess_high']:.1f} points). {advice}"
        )
    if "probe" not in n or n["probe_val"] < LEAST:
        return
    weak = judged and excess < WEAK * (1 - n["agreement_chance"])
    if weak and not n["probe_low"] > n["probe_chance"] and not found.problems:
        found.problems.append(
            f"the codes say nothing of the class: a linear probe of their histogram gets "
            f"{n['probe']:.1%} ({n['probe_low']:.1%} to {n['probe_high']:.1%}), chance is "
            f"{n['probe_chance']:.1%}; nor do those of two crops of an image agree much "
            f"({n['agreement']:.1%}, by chance {n['agreement_chance']:.1%}). {advice}"
        )
    reached = []
    if n["probe"] < n["probe_untrained"]:
        reached.append(f"one of the untrained encoder's features {n['probe_untrained']:.1%}")
    if not n["probe_low"] > n["probe_chance"]:
        reached.append(f"chance is {n['probe_chance']:.1%}")
    if reached and not found.problems:
        found.notes.append(
            f"A student that predicts these codes can gain little: a linear probe of them gets "
            f"{n['probe']:.1%} ({n['probe_low']:.1%} to {n['probe_high']:.1%}), "
            f"{', '.join(reached)}."
        )


# ------------------------------------------------------------------------------------- agreement


def agreement_of(target, data: Path, spec: Spec, seed: int, device, batch_size: int) -> dict:
    """ "agreement", "agreement_chance", "excess_low", "excess_high", "agreement_images" of codes in
    two crops of held-out images; {} if fewer than two images have a place that both crops see.
    """
    split = held_out(data)
    view = View(size=spec.image_size, scale=CROP, flip=0.5)
    size = min(batch_size, MOST, len(split), HELD_OUT)
    views = {"first": view, "second": view}
    batches = Batches(split, views, size, keyed.key(seed, "tokens"), workers=0, drop_last=False)
    codes, boxes = ([], []), ([], [])
    for (batch,) in batches.stream(0, batches.steps_per_epoch):
        for n, name in enumerate(views):
            codes[n].append(target(batch[name].to(device), "ids")["ids"].cpu())
            boxes[n].append(batch[f"{name}.box"].cpu())
        if sum(map(len, codes[0])) >= HELD_OUT:
            break
    first, second = (torch.cat(each)[:HELD_OUT] for each in codes)
    places = shared(*(torch.cat(each)[:HELD_OUT] for each in boxes), spec.grid)
    equal, chance = agreement(first, second, places)
    if len(equal) < 2:
        return {}
    excess = equal - chance
    draws = keyed.uniform(keyed.key(seed, "bootstrap"), torch.arange(RESAMPLES), len(excess))
    means = excess[(draws.double() * len(excess)).long()].mean(dim=1)
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double()).tolist()
    return {
        "agreement": float(equal.mean()),
        "agreement_chance": float(chance.mean()),
        "excess_low": low,
        "excess_high": high,
        "agreement_images": len(equal),
    }


def shared(first: Tensor, second: Tensor, grid: int) -> Tensor:
    """Boxes (n,5) of two views of each image (views.View.make) -> for each of the first one's
    grid*grid patches the second one's in which its centre lies, int64 (n,N); -1: in none.
    """
    middle = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    row, column = torch.cartesian_prod(middle, middle).unbind(1)  # (N,)
    top, left, height, width, flip = first.double().T[:, :, None]  # (n,1) each
    y = top + height * row
    x = left + width * torch.where(flip > 0, 1 - column, column)
    top, left, height, width, flip = second.double().T[:, :, None]
    row, column = (y - top) / height, (x - left) / width
    seen = (row >= 0) & (row < 1) & (column >= 0) & (column < 1)
    column = torch.where(flip > 0, 1 - column, column)
    row, column = ((grid * each).long().clamp(0, grid - 1) for each in (row, column))
    return torch.where(seen, row * grid + column, -1)


def agreement(first: Tensor, second: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,N) of two crops of n images, places of `shared` -> a and c of the docstring above.

    float64 (m,), of the images with a place that both crops see. c is the mean over the next images
    in their order, the last followed by the first.
    """
    seen = places >= 0
    some = seen.any(dim=1)

    def share(codes: Tensor) -> Tensor:
        same = (first == codes.gather(1, places.clamp(min=0))) & seen
        return (same.sum(dim=1).double() / seen.sum(dim=1).clamp(min=1))[some]

    others = [share(second.roll(-k, 0)) for k in range(1, min(OTHERS, len(first) - 1) + 1)]
    return share(second), torch.stack(others).mean(dim=0) if others else share(second)
