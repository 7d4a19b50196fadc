"""Encoders of every family, as methods, targets and tasks use them.

A family is a file in stages/encoders; `create` makes a fresh encoder of the family that the data's
spec names, and the two forward passes that masked image modelling knows work on all that can:

    visible(encoder, images, ids)            hidden patches are dropped before the first layer
    masked(encoder, images, mask, token)     hidden patches are replaced by a mask token

Both give the same dict: "tokens" (B,P+n,D), prefix first; "cls" (B,D), the class token or, without
one, the mean of the patches; "patch" (B,n,D); "taps" {block: tokens there}, before the last norm;
"bias", the relative positions that all blocks share, for blocks that a method adds, or None.

An exported folder is a plain timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`
gives bit-equal features and carries the data set's mean and std in `pretrained_cfg`.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stages.kit.nets.positions import fitted
from workflow import plugins


def create(
    spec,
    style: str = "timm",
    *,
    drop_path: float = 0.0,
    layer_scale=None,
    init: str = "published",
    **kw,
) -> nn.Module:
    """A fresh encoder without a head for `spec` (kit/spec.py).

    style: "timm", "sincos" or "beit", see stages/encoders. drop_path rises linearly over the blocks
    to this; layer_scale None: the style's own. init: of style "beit" alone, see checks.BeitStart;
    a family without `start` has one kind of weights. `kw` goes to timm. ValueError names the key
    of `model` at fault.
    """
    if style not in spec.model.styles:
        expected = " or ".join(map(repr, spec.model.styles))
        raise ValueError(f"style: found {style!r}, expected {expected} of a {spec.kind}")
    family = plugins.module("encoder", spec.kind)
    encoder = family.create(spec, style, drop_path=drop_path, layer_scale=layer_scale, **kw)
    encoder.family = spec.kind
    if style == "beit" and init != "published" and hasattr(family, "start"):
        family.start(encoder, init)
    return encoder


def fusion(encoder: nn.Module) -> nn.Module | None:
    """Modules that the encoder's pretraining adds and nobody exports; None for most families."""
    made = getattr(_family(encoder), "fusion", None)
    return made and made(encoder)


def visible(
    encoder: nn.Module,
    images: torch.Tensor,
    ids: torch.Tensor,
    *,
    norm: bool = True,
    taps: tuple = (),
    fusion: nn.Module | None = None,
    attend: torch.Tensor | None = None,
) -> dict:
    """Normalised images (B,3,H,W), of which only the patches ids (V*B,n) are looked at.

    Row v*B + b of ids is view v of image b, so several views of an image go through at once. No
    token depends on a patch that is not in its row. norm: apply the encoder's last norm. taps:
    numbers of blocks, 1 is the first, whose output is wanted. attend: bool (V*B,P+n,P+n), which
    keys (columns) a query (row) may see, at least one. ValueError for what the encoder cannot do.
    """
    family = _able(encoder, "drop", taps, attend)
    if len(ids) % len(images):
        raise ValueError(
            f"ids: found {len(ids)} rows, expected a multiple of the {len(images)} images"
        )
    given = {"taps": taps, "fusion": fusion, "attend": attend}
    return _result(encoder, *family.visible(encoder, images, ids, **given), norm)


def masked(
    encoder: nn.Module,
    images: torch.Tensor,
    mask: torch.Tensor | None,
    token: torch.Tensor | None,
    *,
    norm: bool = True,
    taps: tuple = (),
    attend: torch.Tensor | None = None,
    attention: bool = False,
) -> dict:
    """Normalised images (B,3,H,W) with token (1,1,D) in the place of their hidden patches.

    mask: bool (B,N) on the grid of the patch embedding, True is hidden; None: nothing is. Positions
    are added to the token as to any other. attention: give the last block's probabilities as
    "attention", too, as the function of that name does. Other arguments as for `visible`.
    """
    family = _able(encoder, "mask", taps, attend, attention)
    given = {"taps": taps, "attend": attend}
    if attention:
        given["attention"] = True
    return _result(encoder, *family.masked(encoder, images, mask, token, **given), norm)


def shallow(encoder: nn.Module, discard: int) -> nn.Module:
    """The same encoder without its last `discard` blocks, which are of its last stage. Parameters
    are shared; it is not exported. ValueError unless a block of that stage stays.
    """
    count = depths(encoder)[-1]
    if not 0 <= discard < count:
        raise ValueError(f"discard: found {discard}, expected 0 to {count - 1} blocks")
    if discard == 0:
        return encoder
    found = _twin(encoder)
    stage = found
    if not hasattr(encoder, "blocks"):
        found.layers = type(encoder.layers)(*encoder.layers[:-1], _twin(encoder.layers[-1]))
        stage = found.layers[-1]
    blocks = list(stage.blocks)[: count - discard]
    kind = type(stage.blocks)
    stage.blocks = kind(blocks) if kind is nn.ModuleList else kind(*blocks)
    return found


def _twin(module: nn.Module) -> nn.Module:
    """Another module of the same parts, which can be exchanged in it alone."""
    twin = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(twin, name, dict(getattr(module, name)))
    return twin


def can(encoder: nn.Module, ability: str) -> bool:
    """Whether the encoder's family declares the ability, see stages/encoders."""
    return ability in _family(encoder).CAN


def _able(encoder: nn.Module, ability: str, taps: tuple, attend=None, attention: bool = False):
    """The encoder's family. ValueError unless it can do all that is asked."""
    family, wanted = _family(encoder), {ability}
    if taps:
        wanted.add("taps")
    if attention or attend is not None:
        wanted.add("attention")
    if missing := sorted(wanted - family.CAN):
        can, cannot = ", ".join(sorted(family.CAN)), ", ".join(missing)
        raise ValueError(f"encoder: found a {encoder.family} ({can}), expected one with {cannot}")
    count = sum(depths(encoder))
    if not all(1 <= tap <= count for tap in taps):
        raise ValueError(f"taps: found {tuple(taps)}, expected block numbers 1..{count}")
    return family


def _result(encoder: nn.Module, tokens: torch.Tensor, more: dict, norm: bool) -> dict:
    tokens = encoder.norm(tokens) if norm else tokens
    return {"tokens": tokens, **split(encoder, tokens), "bias": None, **more}


def _family(encoder: nn.Module):
    if not hasattr(encoder, "family"):
        raise ValueError("encoder: found another module, expected one made by `create` or `load`")
    # `create` and `load` have imported it; a finder here would break compiled graphs
    return sys.modules[f"stages.encoders.{encoder.family}"]


def split(encoder: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prefix + patch tokens (B,P+N,D) -> {"cls": (B,D), "patch": (B,N,D)}.

    Without a class token, "cls" is the mean of the patches.
    """
    patch = tokens[:, getattr(encoder, "num_prefix_tokens", 0) :]
    cls = tokens[:, 0] if has_cls(encoder) else patch.mean(dim=1)
    return {"cls": cls, "patch": patch}


def has_cls(encoder: nn.Module) -> bool:
    """Whether the encoder has a class token."""
    return getattr(encoder, "cls_token", None) is not None


def embeddings(encoder: nn.Module) -> set[str]:
    """Names of the encoder's class token and absolute positions, as far as it has them: what BEiT's
    line of methods does not decay.
    """
    names = ("cls_token", "pos_embed")
    return {name for name in names if getattr(encoder, name, None) is not None}


def relative_positions(encoder: nn.Module) -> set[str]:
    """Names of the encoder's tables of relative positions: a Beit's, which its blocks share or have
    each, or one in each block of a Swin. A SwinV2 has none: a network computes its positions.
    """
    table = "relative_position_bias_table"
    return {name for name, _ in encoder.named_parameters() if name.split(".")[-1] == table}


def features(
    encoder: nn.Module, images: torch.Tensor, *, taps: tuple = (), attention: bool = False
) -> dict:
    """Normalised images (B,3,H,W) -> {"cls": (B,D), "patch": (B,N,D)}, D = num_features.

    After the last norm; by timm's own forward_features. With taps or attention the same pass gives
    "taps", as `masked` does, and "attention" (B,heads,N), the class token's to the patches in the
    last block.
    """
    if taps or attention:
        found = masked(encoder, images, None, None, taps=taps, attention=attention)
        if attention:
            found["attention"] = found["attention"][:, :, 0, encoder.num_prefix_tokens :]
        return found
    tokens = encoder.forward_features(images)
    # a Swin gives (B,h,w,D)
    return split(encoder, tokens.flatten(1, 2) if tokens.ndim == 4 else tokens)


def looked(encoder: nn.Module, images: torch.Tensor, wanted: set[str], layers: tuple) -> dict:
    """`features` as a target gives them (kit/nets/target.py), in float32, by the names `wanted`.

    layers: numbers of blocks, from 1; negative ones count from the end.
    """
    count = sum(depths(encoder))
    blocks = tuple(n if n > 0 else count + 1 + n for n in layers)
    seen = features(encoder, images, taps=blocks, attention="attention" in wanted)
    found = {name: seen[name].float() for name in wanted - {"layers"}}
    found["layers"] = [split(encoder, seen["taps"][n])["patch"].float() for n in blocks]
    return found


def attention(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Attention probabilities of the last block, (B,heads,P+N,P+N): row = query, column = key.

    ValueError for a family whose patches do not all see each other.
    """
    return masked(encoder, images, None, None, attention=True)["attention"]


def depths(encoder: nn.Module) -> tuple[int, ...]:
    """Blocks of each stage; a ViT is one stage."""
    stages = [encoder] if hasattr(encoder, "blocks") else encoder.layers
    return tuple(len(stage.blocks) for stage in stages)


# --- export, import, fine-tuning ----------------------------------------------------------------


def save(encoder: nn.Module, folder: str | Path, spec, crop: float = 1.0) -> None:
    """Export as a timm folder (config.json, model.safetensors) with the preprocessing of `spec`.

    crop: what share of the short side an evaluation shows.
    """
    side = spec.image_size
    preprocessing = {
        "input_size": (3, side, side),
        "mean": tuple(spec.mean),
        "std": tuple(spec.std),
        "interpolation": "bicubic",
        "crop_pct": crop,
        "crop_mode": "center",
    }
    # not those of timm's own weights
    provenance = {"pretrained_cfg": {"tag": "mimlab", "license": None}}
    timm.models.save_for_hf(
        encoder,
        str(folder),
        model_config=provenance,
        data_config=preprocessing,
        safe_serialization=True,
    )


def load(folder: str | Path, positions: str = "timm", **kw) -> nn.Module:
    """The exported encoder with its weights.

    **kw goes to timm.create_model; another img_size resizes its positions and a Swin's windows.
    positions: by timm, or as `positions.fitted` does. FileNotFoundError if there is none.
    """
    kind, ready = _kind(folder), positions == "timm"
    kw = _sized(folder, kind, kw)
    encoder = timm.create_model(f"local-dir:{_checked(folder)}", pretrained=ready, **kw)
    if not ready:
        state = load_file(Path(folder) / "model.safetensors")
        encoder.load_state_dict(fitted(state, encoder, positions))
    encoder.family = kind
    return encoder


def _sized(folder: str | Path, kind: str, kw: dict) -> dict:
    """Arguments of timm for an exported encoder, with those that follow another size of images."""
    resized = getattr(plugins.module("encoder", kind), "resized", None)
    if resized is None or "img_size" not in kw:
        return kw
    exported = json.loads((Path(folder) / "config.json").read_text())
    return resized(exported["model_args"] | {"name": exported["architecture"]}, kw["img_size"]) | kw


def _kind(folder: str | Path) -> str:
    """The family of an exported encoder; importing it tells timm about models of ours."""
    architecture = json.loads((_checked(folder) / "config.json").read_text())["architecture"]
    for kind in plugins.names("encoder"):
        if re.match(plugins.module("encoder", kind).NAMES, architecture):
            return kind
    raise ValueError(f"{folder}: {architecture!r} is of no family in stages/encoders")


def classifier(
    folder: str | Path,
    num_classes: int,
    pool: str = "avg",
    drop_path: float = 0.0,
    head_std: float | None = None,
    positions: str = "timm",
    **kw,
) -> nn.Module:
    """An exported encoder with a new linear head, everything trainable: the start of fine-tuning.

    pool "avg": mean of the patch tokens -> new LayerNorm -> Linear, the pretrained last norm is
    dropped (MAE, BEiT v2); "token": cls after the pretrained norm -> Linear. A Swin, as published,
    has only pretrained norm -> mean -> Linear ("avg"). drop_path rises linearly from 0 to its value
    over the blocks. A shared relative-position table is copied into every block. The head's weights
    start at truncated normal, standard deviation 2e-5 (ViT), 0.02 scaled by 0.001 (BEiT) or 0.02
    (Swin), or for all with head_std (dBOT: 0.01); its bias at 0. positions as for `load`. **kw goes
    to timm (img_size resizes positions, a Swin's windows with them). Raises RuntimeError if
    other than the new layers are missing from the file.
    """
    if pool not in ("avg", "token"):
        raise ValueError(f"pool: found {pool!r}, expected 'avg' or 'token'")
    kind = _kind(folder)
    kw = _sized(folder, kind, kw)
    state = load_file(Path(folder) / "model.safetensors")
    if pool == "token" and "cls_token" not in state:
        raise ValueError("pool: found 'token', but this encoder has no class token; expected 'avg'")
    table = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if table is not None:
        kw |= {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    model = timm.create_model(
        f"local-dir:{folder}",
        pretrained=False,
        num_classes=num_classes,
        global_pool=pool,
        drop_path_rate=drop_path,
        **kw,
    )
    if table is not None:
        state |= {
            f"blocks.{i}.attn.relative_position_bias_table": table for i in range(len(model.blocks))
        }
    if positions != "timm":
        state = fitted(state, model, positions)
    resized = sys.modules[type(model).__module__].checkpoint_filter_fn  # positions, to the grid
    state = resized(state, model)
    result = model.load_state_dict(state, strict=False)
    new = {key for key in model.state_dict() if key.startswith(("head.", "fc_norm."))}
    dropped = {"norm.weight", "norm.bias"} if isinstance(model.norm, nn.Identity) else set()
    if set(result.missing_keys) != new or not set(result.unexpected_keys) <= dropped:
        raise RuntimeError(
            f"{folder}: not an encoder that can be fine-tuned; missing "
            f"{sorted(set(result.missing_keys) - new)}, unexpected "
            f"{sorted(set(result.unexpected_keys) - dropped)}"
        )
    if head_std is None and isinstance(model, VisionTransformer):
        head_std = 2e-5  # timm's Beit and Swin start their heads as published
    if head_std is not None:
        head = model.get_classifier()
        nn.init.trunc_normal_(head.weight, std=head_std)
        nn.init.zeros_(head.bias)
    model.family = kind
    return model.requires_grad_(True)


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no exported encoder here ({name} is missing); "
                "run its pretrain job first"
            )
    return folder
