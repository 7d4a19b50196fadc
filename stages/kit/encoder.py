"""The encoders that are pretrained: timm models, and the few things that timm does not give.

Two families. "vit": timm's VisionTransformer, sizes from `params.yaml: model`. "beit": timm's Beit in the
same sizes, with one relative-position table shared by all blocks and no absolute positions, as BEiT v2
pretrains (arXiv 2208.06366). An exported folder is a plain timm folder:
`timm.create_model("local-dir:FOLDER", pretrained=True)` gives bit-equal features and carries the data set's
mean and std in `pretrained_cfg`. Tokens are ordered prefix (cls, registers) first, then patches row by row.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stages.kit.positions import sincos_2d

BEIT = "beitv2_base_patch16_224"


def create(spec, family: str = "vit", **kw) -> nn.Module:
    """A freshly initialised encoder without head for `spec` (kit/spec.py); **kw overrides its timm arguments.

    family "vit": `spec.model["name"]`, the last norm kept before pooling; "beit": shared relative-position
    bias, no absolute positions, layer scale 0.1. Raises ValueError naming the key of `model` at fault.
    """
    model = spec.model
    if spec.image_size % model["patch_size"]:
        raise ValueError(f"model.patch_size: {model['patch_size']} does not divide data.image_size "
                         f"{spec.image_size}")
    if family not in ("vit", "beit"):
        raise ValueError(f"encoder family: found {family!r}, expected 'vit' or 'beit'")
    name, cls, args = model["name"], VisionTransformer, {"global_pool": "token"}
    if family == "beit":
        name, cls = BEIT, Beit
        args |= {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "init_values": 0.1}
    args |= {key: model[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    args |= {**model.get("args", {}), **kw}
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(module="vision_transformer"), 3)
        raise ValueError(f"model.name: timm has no {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    try:
        encoder = timm.create_model(name, num_classes=0, img_size=spec.image_size, **args)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"model: timm cannot build {name!r} as {family} with {args}: {error}") from error
    if not isinstance(encoder, cls):
        raise ValueError(f"model.name: {name!r} is a {type(encoder).__name__}, expected a {cls.__name__} "
                         "such as 'vit_tiny_patch16_224' (the other keys of model set its sizes)")
    return encoder


def sincos_vit(spec, **kw) -> VisionTransformer:
    """MAE's encoder (arXiv 2111.06377): xavier weights and fixed sin-cos positions, zero for the prefix."""
    encoder = create(spec, "vit", **kw)
    xavier_init(encoder)
    projection = encoder.patch_embed.proj.weight  # as the linear layer that it is; bias: torch's default
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if encoder.pos_embed is None:
        raise ValueError("model.args.pos_embed: found 'none', expected 'learn' (to hold sin-cos positions)")
    table = sincos_2d(encoder.embed_dim, encoder.patch_embed.grid_size)
    with torch.no_grad():
        encoder.pos_embed.zero_()[0, -len(table):].copy_(table)
    encoder.pos_embed.requires_grad_(False)
    return encoder


def xavier_init(module: nn.Module) -> None:
    """Xavier-uniform weights (a fused qkv as one matrix) and zero biases below `module`; norms at 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


# --- pieces of the forward pass -----------------------------------------------------------------------------

def patch_tokens(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Normalised images (B,3,H,W) -> patch tokens (B,N,D) before the blocks, with absolute positions if any.
    """
    tokens = encoder.patch_embed(images)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed[:, -tokens.shape[1]:]
    return tokens


def with_prefix(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Put cls (and register) tokens, with their positions, before patch tokens: (B,n,D) -> (B,P+n,D)."""
    both = (encoder.cls_token, getattr(encoder, "reg_token", None))
    if encoder.num_prefix_tokens == 0:
        return tokens
    prefix = torch.cat([token for token in both if token is not None], dim=1)
    if encoder.pos_embed is not None and encoder.pos_embed.shape[1] > encoder.patch_embed.num_patches:
        prefix = prefix + encoder.pos_embed[:, :prefix.shape[1]]
    return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)


def shared_bias(encoder: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor | None:
    """The shared relative-position bias: (1,heads,1+N,1+N), or (B,heads,1+n,1+n) for the patches `ids` (B,n).

    None for an encoder without one. ValueError for a subset where the blocks have tables of their own.
    """
    module = getattr(encoder, "rel_pos_bias", None)
    if module is None:
        if ids is not None and any(_own_bias(block) is not None for block in encoder.blocks):
            raise ValueError("blocks with relative-position tables of their own cannot run on some patches")
        return None
    if ids is None:
        return module()[None]
    ids = F.pad(ids + 1, (1, 0))  # place 0 is cls
    index = module.relative_position_index[ids[:, :, None], ids[:, None, :]]
    return module.relative_position_bias_table[index].permute(0, 3, 1, 2)


def run_blocks(encoder: nn.Module, tokens: torch.Tensor, *, ids: torch.Tensor | None = None, taps: tuple = (),
               bias: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """All blocks on prefix + patch tokens (B,P+n,D) -> (output before the final norm, {tap: tokens there}).

    ids (B,n): which patches these are, if not all, in the same order (only relative positions need it);
    taps: block numbers, 1 = after the first; bias: `shared_bias(encoder, ids)` if the caller has it already.
    """
    if not all(1 <= tap <= len(encoder.blocks) for tap in taps):
        raise ValueError(f"taps: found {tuple(taps)}, expected block numbers 1..{len(encoder.blocks)}")
    bias = shared_bias(encoder, ids) if bias is None else bias
    extra = {} if bias is None else {"shared_rel_pos_bias": bias}
    tapped = {}
    tokens = getattr(encoder, "norm_pre", nn.Identity())(encoder.pos_drop(tokens))
    for number, block in enumerate(encoder.blocks, start=1):
        tokens = block(tokens, **extra)
        if number in taps:
            tapped[number] = tokens
    return tokens, tapped


def features(encoder: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised images (B,3,H,W) -> {"cls": (B,D), "patch": (B,N,D)} after the final norm.

    Taken from timm's forward_features. Without a class token, "cls" is the mean of the patches.
    """
    tokens = encoder.forward_features(images)
    patch = tokens[:, encoder.num_prefix_tokens:]
    return {"cls": tokens[:, 0] if encoder.cls_token is not None else patch.mean(dim=1), "patch": patch}


@torch.no_grad()
def attention(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Attention probabilities of the last block, (B,heads,P+N,P+N): row = query, column = key."""
    tokens, bias = with_prefix(encoder, patch_tokens(encoder, images)), shared_bias(encoder)
    block, extra = encoder.blocks[-1], {} if bias is None else {"shared_rel_pos_bias": bias}
    tokens = getattr(encoder, "norm_pre", nn.Identity())(tokens)
    for earlier in encoder.blocks[:-1]:
        tokens = earlier(tokens, **extra)
    attn, x = block.attn, block.norm1(tokens)
    qkv_bias = attn.qkv.bias
    if qkv_bias is None and getattr(attn, "q_bias", None) is not None:
        qkv_bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, _ = F.linear(x, attn.qkv.weight, qkv_bias).reshape(*x.shape[:2], 3, attn.num_heads, -1).unbind(2)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    logits = (q * attn.scale @ k.transpose(-2, -1)).float()
    for term in (bias, _own_bias(block)):
        logits = logits if term is None else logits + term
    return logits.softmax(dim=-1)


def _own_bias(block: nn.Module) -> torch.Tensor | None:
    """The relative-position bias that a block of timm's Beit holds itself, (1,heads,1+N,1+N), if it does."""
    own = getattr(block.attn, "relative_position_bias_table", None) is not None
    return block.attn._get_rel_pos_bias() if own else None


# --- export, import, fine-tuning ----------------------------------------------------------------------------

def save(encoder: nn.Module, folder: str | Path, spec) -> None:
    """Export as a timm folder (config.json, model.safetensors) with the preprocessing of `spec`."""
    side = spec.image_size
    preprocessing = {"input_size": (3, side, side), "mean": tuple(spec.mean), "std": tuple(spec.std),
                     "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    provenance = {"pretrained_cfg": {"tag": "mimlab", "license": None}}  # not those of timm's own weights
    timm.models.save_for_hf(encoder, str(folder), model_config=provenance, data_config=preprocessing,
                            safe_serialization=True)


def load(folder: str | Path, **kw) -> nn.Module:
    """The exported encoder with its weights; **kw goes to timm.create_model (img_size, drop_path_rate)."""
    return timm.create_model(f"local-dir:{_checked(folder)}", pretrained=True, **kw)


def classifier(folder: str | Path, num_classes: int, pool: str = "avg", drop_path: float = 0.0,
               **kw) -> nn.Module:
    """An exported encoder with a new linear head, everything trainable: the start of fine-tuning.

    pool "avg": mean of the patch tokens -> new LayerNorm -> Linear, the pretrained last norm is dropped (MAE,
    BEiT v2); "token": cls after the pretrained norm -> Linear. drop_path rises linearly from 0 to its value
    over the blocks. A shared relative-position table is copied into every block. The head's weights start at
    truncated normal, standard deviation 2e-5 (ViT) or 0.02 scaled by 0.001 (BEiT); its bias at 0. **kw goes
    to timm (img_size resizes positions). Raises RuntimeError if other than the new layers are missing from
    the file.
    """
    if pool not in ("avg", "token"):
        raise ValueError(f"pool: found {pool!r}, expected 'avg' or 'token'")
    state = load_file(_checked(folder) / "model.safetensors")
    table = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if table is not None:
        kw |= {"use_shared_rel_pos_bias": False, "use_rel_pos_bias": True}
    model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=num_classes,
                              global_pool=pool, drop_path_rate=drop_path, **kw)
    if table is not None:
        state |= {f"blocks.{i}.attn.relative_position_bias_table": table for i in range(len(model.blocks))}
    state = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)  # resizes positions
    result = model.load_state_dict(state, strict=False)
    new = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if pool == "avg" else set())
    dropped = {"norm.weight", "norm.bias"} if pool == "avg" else set()
    if set(result.missing_keys) != new or not set(result.unexpected_keys) <= dropped:
        raise RuntimeError(f"{folder}: not an encoder that can be fine-tuned; missing "
                           f"{sorted(set(result.missing_keys) - new)}, unexpected "
                           f"{sorted(set(result.unexpected_keys) - dropped)}")
    if not isinstance(model, Beit):  # timm's Beit starts its head as BEiT v2 does
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.bias)
    return model.requires_grad_(True)


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no exported encoder here ({name} is missing); "
                                    "run its pretrain job first")
    return folder
