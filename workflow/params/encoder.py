"""The section `model`: is there such an encoder, and does it fit the images?"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from workflow.params.sections import Model
from workflow.plugins import ROOT, did_you_mean

# what stages/kit/nets/encoders.py can work with
CLASSES = (
    "VisionTransformer",
    "VisionTransformerDistilled",
    "SwinTransformer",
    "SwinTransformerV2",
    "ConvViT",
)
REGISTERED = re.compile(r"@register_model\s+def (\w+)\([^)]*\)\s*(?:->\s*(\w+))?")


def family(name: str) -> str:
    """What kind of encoder a model is, as a plug-in's ENCODERS lists them: "vit", "swin" or
    "convvit".
    """
    found = re.match(r"(convvit|swin)(?:v2)?_", name)
    return found[1] if found else "vit"


def unknown(name: str) -> list[str]:
    """Why `model.name` names no encoder. Reads the text of timm and stages/kit/nets/hybrid.py,
    imports nothing; without timm every name is good.
    """
    timm = importlib.util.find_spec("timm")
    if timm is None or not timm.submodule_search_locations:
        return []
    expected = "expected a ViT such as vit_tiny_patch16_224, a Swin or SwinV2, or a convvit_*"
    plain, names = name.split(".")[0], []
    files = Path(timm.submodule_search_locations[0]).glob("models/*.py")
    for file in (
        ROOT / "stages/kit/nets/hybrid.py",
        *sorted(files, key=lambda p: not p.stem.startswith("vision_tr")),
    ):
        for known, made in REGISTERED.findall(file.read_text(encoding="utf-8")):
            if known == plain:
                return (
                    [f"model.name: {name!r} is a {made}, {expected}"]
                    if made and made not in CLASSES
                    else []
                )
            if made in CLASSES:
                names.append(known)
    return [
        f"model.name: timm has no model {name!r}{did_you_mean(plain, names) or f'; {expected}'}"
    ]


def flaws(model: Model, image: int) -> list[str]:
    """Why there can be no such encoder for images of `image` pixels."""
    staged = family(model.name) == "swin"
    found = []
    for key in ("depth", "num_heads"):
        value = getattr(model, key)
        if isinstance(value, list) != staged:
            expected = (
                "a list, one number for each stage" if staged else "one number (a list is for Swin)"
            )
            found.append(f"model.{key}: {model.name} takes {expected} (found {value})")
        elif not value or min(value if staged else [value]) < 1:
            found.append(f"model.{key}: must be greater than or equal to 1 (found {value})")
    if staged and model.window_size is None:
        found.append(
            "model.window_size: required for a Swin: the side of its windows in tokens, such as 4 or 7"
        )
    if not staged and model.window_size is not None:
        found.append(f"model.window_size: {model.name} has no windows (found {model.window_size})")
    if family(model.name) == "convvit" and model.patch_size % 4:
        found.append(
            f"model.patch_size: {model.name} takes a multiple of 4 (found {model.patch_size})"
        )
    return found or _misfits(
        model, image, *(v if staged else [v] for v in (model.depth, model.num_heads))
    )


def _misfits(model: Model, image: int, depth: list[int], heads: list[int]) -> list[str]:
    """Sizes that do not divide one another. `depth`, `heads`: of each stage; a ViT is one stage."""
    staged = family(model.name) == "swin"
    if len(depth) != len(heads):
        return [
            f"model.num_heads: has {len(heads)} stages {heads}, model.depth has {len(depth)} {depth}"
        ]
    found = []
    stride = model.patch_size * 2 ** (len(depth) - 1)
    if image % stride:
        halved = f", doubled by each later stage: {stride}" if staged else ""
        found.append(
            f"data.image_size: {image} is not a multiple of model.patch_size {model.patch_size}{halved}"
        )
    for stage, number in enumerate(heads):
        width, where = model.embed_dim * 2**stage, f" in stage {stage + 1}" if staged else ""
        if width % number:
            given = (
                f"{width} (model.embed_dim {model.embed_dim} times {2**stage})" if stage else width
            )
            found.append(
                f"model.embed_dim: {given} is not a multiple of model.num_heads {number}{where}"
            )
        grid = image // (model.patch_size * 2**stage)
        if staged and not found and grid > model.window_size and grid % model.window_size:
            found.append(
                f"model.window_size: {model.window_size} does not divide the {grid} tokens per side{where}"
            )
    return found
