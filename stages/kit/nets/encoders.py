"""The encoders that are pretrained: timm models, and the few things that timm does not give.

Two families of ViT. "vit": timm's VisionTransformer, sizes from `params.yaml: model`. "beit":
timm's Beit in the same sizes, with one relative-position table shared by all blocks and no absolute
positions, as BEiT v2 pretrains (arXiv 2208.06366). A method chooses between them. A model with a
list of depths is a Swin (arXiv 2103.14030; V2: 2111.09883) whichever the method would choose, each
stage after the first halving the grid and doubling the width:

    model: {name: swin_tiny_patch4_window7_224, patch_size: 2, embed_dim: 48, depth: [2, 2, 4],
            num_heads: [3, 6, 12], window_size: 4}       # 32 px: grids of 16, 8 and 4, last width
            192

A model named convvit_* is a ViT behind masked convolutions (kit/nets/hybrid.py); `args` has their
sizes:

    model: {name: convvit_tiny_patch8_64, patch_size: 8, embed_dim: 192, depth: 8, num_heads: 3,
            args: {conv_dims: [48, 96], conv_depths: [1, 1]}}

An exported folder is a plain timm folder: `timm.create_model("local-dir:FOLDER", pretrained=True)`
gives bit-equal features and carries the data set's mean and std in `pretrained_cfg`. Tokens are
ordered prefix (cls, registers; a Swin has none) first, then patches row by row.
"""

from __future__ import annotations

import math
import sys
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stages.kit.nets import hybrid
from stages.kit.nets.masks import take
from stages.kit.nets.patches import patchify, project
from stages.kit.nets.positions import sincos_2d

BEIT = "beitv2_base_patch16_224"
SWIN = (SwinTransformer, SwinTransformerV2)
LEAK = "convolutions have mixed hidden patches into the others' tokens; use `visible`"


def create(spec, family: str = "vit", **kw) -> nn.Module:
    """A freshly initialised encoder without head for `spec` (kit/spec.py); **kw overrides its timm
    arguments.

    family "vit": `spec.model["name"]`, the last norm kept before pooling; "beit": shared
    relative-position bias, no absolute positions, layer scale 0.1; of a Swin there is one kind,
    whatever the family. No drop path unless asked for. Raises ValueError naming the key of `model`
    at fault.
    """
    model = spec.model
    if spec.image_size % spec.stride:
        raise ValueError(
            f"model.patch_size: {model['patch_size']} gives tokens of {spec.stride} pixels, which do "
            f"not divide data.image_size {spec.image_size}"
        )
    if family not in ("vit", "beit"):
        raise ValueError(f"encoder family: found {family!r}, expected 'vit' or 'beit'")
    name, cls, args = model["name"], VisionTransformer, {"global_pool": "token"}
    args |= {
        key: model[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    }
    if name in hybrid.default_cfgs:
        args["global_pool"] = "avg"  # it has no class token
    if spec.hierarchical:
        cls = SWIN
        args |= {
            "global_pool": "avg",
            "window_size": model.get("window_size"),
            "drop_path_rate": 0.0,
        }
        args["depths"] = args.pop("depth")
    elif family == "beit":
        name, cls = BEIT, Beit
        args |= {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "init_values": 0.1}
    args |= {**model.get("args", {}), **kw}
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 3)
        raise ValueError(
            f"model.name: timm has no {name!r}" + (f"; near: {', '.join(near)}" if near else "")
        )
    try:
        encoder = timm.create_model(name, num_classes=0, img_size=spec.image_size, **args)
    except (TypeError, IndexError, AssertionError) as error:
        raise ValueError(f"model: timm cannot build {name!r} with {args}: {error}") from error
    if not isinstance(encoder, cls):
        expected = (
            "a Swin such as 'swin_tiny_patch4_window7_224' where depth is a list"
            if spec.hierarchical
            else f"a {cls.__name__} such as 'vit_tiny_patch16_224'"
        )
        raise ValueError(
            f"model.name: {name!r} is a {type(encoder).__name__}, expected {expected} (the other "
            "keys of model set its sizes)"
        )
    return encoder


def sincos_vit(spec, **kw) -> VisionTransformer:
    """MAE's encoder (arXiv 2111.06377): xavier weights and fixed sin-cos positions, zero for the
    prefix.
    """
    if spec.hierarchical:
        raise ValueError(
            f"model.name: {spec.model['name']!r} has no positions of its own, expected a ViT"
        )
    encoder = create(spec, "vit", **kw)
    xavier_init(encoder.blocks)
    projection = (
        encoder.patch_embed.proj.weight
    )  # as the linear layer that it is; bias: torch's default
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if encoder.pos_embed is None:
        raise ValueError(
            "model.args.pos_embed: found 'none', expected 'learn' (to hold sin-cos positions)"
        )
    table = sincos_2d(encoder.embed_dim, encoder.patch_embed.grid_size)
    with torch.no_grad():
        encoder.pos_embed.zero_()[0, -len(table) :].copy_(table)
    encoder.pos_embed.requires_grad_(False)
    return encoder


def beit_vit(spec, **kw) -> Beit:
    """BEiT's encoder (arXiv 2106.08254): shared relative positions, cut normal weights, block n's
    outputs over sqrt(2 n).
    """
    encoder = create(spec, "beit", **kw)
    trunc_init(encoder)
    scale_by_depth(encoder.blocks)
    nn.init.trunc_normal_(encoder.cls_token, std=0.02, a=-0.02, b=0.02)
    return encoder


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights (a fused qkv as one matrix) and zero biases below `module`; norms at 1
    and 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def trunc_init(module: nn.Module, std: float = 0.02) -> None:
    """BEiT's initial weights (arXiv 2106.08254, official code): those of linear and convolution
    layers below `module` normal of deviation `std` and cut there, their biases zero.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=std, a=-std, b=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def scale_by_depth(blocks, first: int = 1) -> None:
    """Divides both output projections of block n, counted from `first`, by sqrt(2 n), as BEiT's
    code does.
    """
    for number, block in enumerate(blocks, start=first):
        block.attn.proj.weight.div_(math.sqrt(2 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2 * number))


# --- pieces of the forward pass
# -----------------------------------------------------------------------------


def patch_tokens(
    encoder: nn.Module,
    images: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalised images (B,3,H,W) -> patch tokens (B,N,D) before the blocks, with absolute
    positions if any.

    Where the bool mask (B,N) is True, mask_token (1,1,D) stands in the patch's place; its position
    is added to it as to any other.
    """
    if mask is not None and isinstance(encoder, hybrid.ConvViT):
        raise ValueError(f"mask_token: {LEAK}")
    tokens = encoder.patch_embed(images)
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # Swin's are a grid
    if mask is not None:
        tokens = torch.where(mask[..., None], mask_token, tokens)
    if getattr(encoder, "pos_embed", None) is not None:
        tokens = tokens + encoder.pos_embed[:, -tokens.shape[1] :]
    return tokens


def prefix_count(encoder: nn.Module) -> int:
    """Tokens before the patches: cls and registers, none in a Swin."""
    return getattr(encoder, "num_prefix_tokens", 0)


def depths(encoder: nn.Module) -> tuple[int, ...]:
    """Blocks of each stage; a ViT is one stage."""
    return tuple(
        len(stage.blocks) for stage in (encoder.layers if isinstance(encoder, SWIN) else (encoder,))
    )


def with_prefix(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Put cls (and register) tokens, with their positions, before patch tokens: (B,n,D) ->
    (B,P+n,D).
    """
    if prefix_count(encoder) == 0:
        return tokens
    both = (encoder.cls_token, getattr(encoder, "reg_token", None))
    prefix = torch.cat([token for token in both if token is not None], dim=1)
    if (
        encoder.pos_embed is not None
        and encoder.pos_embed.shape[1] > encoder.patch_embed.num_patches
    ):
        prefix = prefix + encoder.pos_embed[:, : prefix.shape[1]]
    return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)


def shared_bias(encoder: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor | None:
    """The shared relative-position bias: (1,heads,1+N,1+N), or (B,heads,1+n,1+n) for the patches
    `ids` (B,n).

    None for an encoder without one. ValueError for a subset where the blocks have tables of their
    own.
    """
    module = getattr(encoder, "rel_pos_bias", None)
    if module is None:
        if ids is not None and any(_own_bias(block) is not None for block in encoder.blocks):
            raise ValueError(
                "blocks with relative-position tables of their own cannot run on some patches"
            )
        return None
    if ids is None:
        return module()[None]
    ids = F.pad(ids + 1, (1, 0))  # place 0 is cls
    index = module.relative_position_index[ids[:, :, None], ids[:, None, :]]
    return module.relative_position_bias_table[index].permute(0, 3, 1, 2)


def run_blocks(
    encoder: nn.Module,
    tokens: torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    taps: tuple = (),
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """All blocks on prefix + patch tokens (B,P+n,D) -> (output before the final norm, {tap: tokens
    there}).

    A Swin merges patches between its stages: n and D of the output, and of taps, are those of their
    stage. ids (B,n): which patches these are, if not all, in the same order (only relative
    positions need it); taps: block numbers, 1 = after the first, counted over all stages; bias:
    `shared_bias(encoder, ids)` if the caller has it already.
    """
    count = sum(depths(encoder))
    if not all(1 <= tap <= count for tap in taps):
        raise ValueError(f"taps: found {tuple(taps)}, expected block numbers 1..{count}")
    if isinstance(encoder, SWIN):
        if ids is not None:
            raise ValueError(
                "windows hold all patches of their place: a Swin cannot run on some of the patches"
            )
        return _run_stages(encoder, tokens, taps)
    if ids is not None and isinstance(encoder, hybrid.ConvViT):
        raise ValueError(f"ids: {LEAK}")
    bias = shared_bias(encoder, ids) if bias is None else bias
    extra = {} if bias is None else {"shared_rel_pos_bias": bias}
    tapped = {}
    tokens = getattr(encoder, "norm_pre", nn.Identity())(encoder.pos_drop(tokens))
    for number, block in enumerate(encoder.blocks, start=1):
        tokens = block(tokens, **extra)
        if number in taps:
            tapped[number] = tokens
    return tokens, tapped


def _run_stages(encoder: nn.Module, tokens: torch.Tensor, taps: tuple):
    """`run_blocks` of a Swin."""
    x, number, tapped = tokens.unflatten(1, encoder.patch_embed.grid_size), 0, {}
    for stage in encoder.layers:
        x = stage.downsample(x)  # merges 2x2 patches; nothing before the first stage
        for block in stage.blocks:
            x, number = block(x), number + 1
            if number in taps:
                tapped[number] = x.flatten(1, 2)
    return x.flatten(1, 2), tapped


def visible(
    encoder: nn.Module, images: torch.Tensor, ids: torch.Tensor, fusion: hybrid.Fusion | None = None
) -> torch.Tensor:
    """Normalised images (B,3,H,W) -> prefix and patches ids (V*B,n) after the final norm,
    (V*B,P+n,D).

    Patches that a row of ids does not name have no influence on its tokens. Row v*B + b is view v
    of image b, so several views of an image go through at once. fusion: of a ConvViT in pretraining
    (kit/nets/hybrid.py).
    """
    if isinstance(encoder, hybrid.ConvViT):
        return encoder.encode(images, ids, fusion)
    embed = encoder.patch_embed
    patches = patchify(images, embed.patch_size[0]).repeat(len(ids) // len(images), 1, 1)
    tokens = embed.norm(project(embed.proj, take(patches, ids)))
    if encoder.pos_embed is not None:
        patch = encoder.pos_embed[:, -embed.num_patches :]
        tokens = tokens + take(patch.expand(len(ids), -1, -1), ids)
    tokens, _ = run_blocks(encoder, with_prefix(encoder, tokens), ids=ids)
    return encoder.norm(tokens)


def split(encoder: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prefix + patch tokens (B,P+N,D) -> {"cls": (B,D), "patch": (B,N,D)}.

    Without a class token, "cls" is the mean of the patches.
    """
    patch = tokens[:, prefix_count(encoder) :]
    return {
        "cls": patch.mean(dim=1) if getattr(encoder, "cls_token", None) is None else tokens[:, 0],
        "patch": patch,
    }


def features(encoder: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised images (B,3,H,W) -> {"cls": (B,D), "patch": (B,N,D)} after the final norm, D =
    num_features.

    Taken from timm's forward_features. Without a class token, "cls" is the mean of the patches.
    """
    tokens = encoder.forward_features(images)
    return split(
        encoder, tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    )  # a Swin gives (B,h,w,D)


@torch.no_grad()
def attention(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Attention probabilities of the last block, (B,heads,P+N,P+N): row = query, column = key.

    ValueError for a Swin, whose patches do not all see each other.
    """
    if isinstance(encoder, SWIN):
        raise ValueError(
            "attention: a Swin's windows see a part of the image each, there is no map of the whole"
        )
    tokens, bias = with_prefix(encoder, patch_tokens(encoder, images)), shared_bias(encoder)
    block, extra = encoder.blocks[-1], {} if bias is None else {"shared_rel_pos_bias": bias}
    tokens = getattr(encoder, "norm_pre", nn.Identity())(tokens)
    for earlier in encoder.blocks[:-1]:
        tokens = earlier(tokens, **extra)
    attn, x = block.attn, block.norm1(tokens)
    qkv_bias = attn.qkv.bias
    if qkv_bias is None and getattr(attn, "q_bias", None) is not None:
        qkv_bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, _ = (
        F.linear(x, attn.qkv.weight, qkv_bias)
        .reshape(*x.shape[:2], 3, attn.num_heads, -1)
        .unbind(2)
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    logits = (q * attn.scale @ k.transpose(-2, -1)).float()
    for term in (bias, _own_bias(block)):
        logits = logits if term is None else logits + term
    return logits.softmax(dim=-1)


def _own_bias(block: nn.Module) -> torch.Tensor | None:
    """The relative-position bias that a block of timm's Beit holds itself, (1,heads,1+N,1+N), if it
    does.
    """
    own = getattr(block.attn, "relative_position_bias_table", None) is not None
    return block.attn._get_rel_pos_bias() if own else None


# --- export, import, fine-tuning
# ----------------------------------------------------------------------------


def save(encoder: nn.Module, folder: str | Path, spec) -> None:
    """Export as a timm folder (config.json, model.safetensors) with the preprocessing of `spec`."""
    side = spec.image_size
    preprocessing = {
        "input_size": (3, side, side),
        "mean": tuple(spec.mean),
        "std": tuple(spec.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    provenance = {
        "pretrained_cfg": {"tag": "mimlab", "license": None}
    }  # not those of timm's own weights
    timm.models.save_for_hf(
        encoder,
        str(folder),
        model_config=provenance,
        data_config=preprocessing,
        safe_serialization=True,
    )


def load(folder: str | Path, **kw) -> nn.Module:
    """The exported encoder with its weights; **kw goes to timm.create_model (img_size,
    drop_path_rate).
    """
    return timm.create_model(f"local-dir:{_checked(folder)}", pretrained=True, **kw)


def classifier(
    folder: str | Path, num_classes: int, pool: str = "avg", drop_path: float = 0.0, **kw
) -> nn.Module:
    """An exported encoder with a new linear head, everything trainable: the start of fine-tuning.

    pool "avg": mean of the patch tokens -> new LayerNorm -> Linear, the pretrained last norm is
    dropped (MAE, BEiT v2); "token": cls after the pretrained norm -> Linear. A Swin, as published,
    has only pretrained norm -> mean -> Linear ("avg"). drop_path rises linearly from 0 to its value
    over the blocks. A shared relative-position table is copied into every block. The head's weights
    start at truncated normal, standard deviation 2e-5 (ViT), 0.02 scaled by 0.001 (BEiT) or 0.02
    (Swin); its bias at 0. **kw goes to timm (img_size resizes positions, a Swin's with its
    window_size). Raises RuntimeError if other than the new layers are missing from the file.
    """
    if pool not in ("avg", "token"):
        raise ValueError(f"pool: found {pool!r}, expected 'avg' or 'token'")
    state = load_file(_checked(folder) / "model.safetensors")
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
    state = sys.modules[type(model).__module__].checkpoint_filter_fn(
        state, model
    )  # resizes positions
    result = model.load_state_dict(state, strict=False)
    new = {key for key in model.state_dict() if key.startswith(("head.", "fc_norm."))}
    dropped = {"norm.weight", "norm.bias"} if isinstance(model.norm, nn.Identity) else set()
    if set(result.missing_keys) != new or not set(result.unexpected_keys) <= dropped:
        raise RuntimeError(
            f"{folder}: not an encoder that can be fine-tuned; missing "
            f"{sorted(set(result.missing_keys) - new)}, unexpected "
            f"{sorted(set(result.unexpected_keys) - dropped)}"
        )
    if isinstance(model, VisionTransformer):  # timm's Beit and Swin start their heads as published
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.bias)
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
