"""Networks with weights that timm knows by name, `timm:NAME`, or that it wrote, `local:FOLDER`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import timm
from torch import nn

from stages.kit.parts.weights import WeightsError, first_line
from workflow.plugins import did_you_mean

LABEL_FREE = (
    "dino|dinov2|dinov3|mae|fcmae|lvd|sat493m|openai|laion|datacomp|dfn|metaclip|webli|merged2b"
)


def named(weights: str) -> tuple[str, dict, list, list, str]:
    """(architecture, arguments, mean, deviation, what timm.create_model is to be asked for).

    ValueError for a name that timm does not know, WeightsError for a folder that is not timm's.
    """
    kind, _, name = weights.partition(":")
    if kind == "timm":
        if not timm.is_model(name.partition(".")[0]):
            words = (f"timm:{model}" for model in timm.list_models())
            near = did_you_mean(weights.partition(".")[0], words, 0.7)
            raise ValueError(f"weights: timm has no model {name!r}{near}")
        known = timm.list_pretrained(name.partition(".")[0] + ".*")
        if name not in known and ("." in name or not known):
            raise ValueError(
                f"weights: timm has no weights {name!r}, expected "
                f"{', '.join(known) or 'another model: it has none for this one'}"
            )
        about = timm.get_pretrained_cfg(name)
        return name, {}, list(about.mean), list(about.std), name
    path = Path(name)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise WeightsError(
            f"weights: {name!r} is not a folder with config.json and model.safetensors, as timm's "
            "save_for_hf writes them"
        )
    return *_described(path), f"local-dir:{name}"


def fetched(weights: str, architecture: str, source: str, args: dict) -> nn.Module:
    """The network with its weights. WeightsError for a broken folder, RuntimeError with what to do
    where a name cannot be had.
    """
    try:
        return timm.create_model(source, pretrained=True, **args)
    except Exception as error:  # timm, huggingface_hub and the network raise whatever they like
        kind, _, name = weights.partition(":")
        if kind == "local":
            raise WeightsError(
                f"weights: {Path(name) / 'model.safetensors'}: does not hold the weights of the "
                f"{architecture} in config.json ({type(error).__name__}: {first_line(error)})"
            ) from None
        raise RuntimeError(
            f"weights: cannot get {weights!r}: {type(error).__name__}: {error}\nWithout a "
            "network use 'efficientnet_lite0' of a target pretrained (a package), 'local:FOLDER', "
            "or a target that is trained here (kind dino)."
        ) from error


def saw_labels(weights: str) -> bool:
    """Whether labels trained the weights, as timm's name says; true in case of doubt."""
    kind, _, name = weights.partition(":")
    if kind != "timm":
        return True
    tag = name.partition(".")[2] or str(getattr(timm.get_pretrained_cfg(name), "tag", ""))
    return not re.match(LABEL_FREE, tag) or bool(re.search(r"ft|in1k|in12k|in2[12]k", tag))


def _described(path: Path) -> tuple[str, dict, list, list]:
    """Architecture, arguments, mean and deviation in a timm folder's config.json."""
    file = path / "config.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        architecture, args = told["architecture"], dict(told.get("model_args") or {})
        mean, std = (list(map(float, told["pretrained_cfg"][key])) for key in ("mean", "std"))
        good = len(mean) == len(std) == 3 and 0 < min(std) <= max(std + mean) < 1e3
        if not (good and isinstance(architecture, str)):
            raise ValueError(f"architecture {architecture!r}, mean {mean}, std {std}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(
            f"weights: {file}: found {said[:200]}, expected what timm's save_for_hf writes: "
            "architecture, and pretrained_cfg with mean and std of three channels"
        ) from None
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise WeightsError(
            f"weights: {file}: found the architecture {architecture!r}, expected one of timm{near}"
        )
    return architecture, args, mean, std
