"""Optimisers, their parameter groups, and gradient clipping."""

from __future__ import annotations

import re

import torch
from torch import nn

from workflow.plugins import did_you_mean


def groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """One group with weight decay, one without (biases, norms, other 1-d tensors, names in
    `module.no_weight_decay()`): [{"params", "weight_decay", "lr_scale": 1.0}, ...].

    `module.rates()`, if there is one, gives {name: factor of its learning rate}; those parameters
    have groups of their own, behind these two. AdamW decays a parameter by its own rate times
    `weight_decay`. Frozen parameters are left out, and so is an empty group. A parameter with two
    names is taken once, under its first name. ValueError for a rate of a parameter that is not
    there.
    """
    exempt, rates = _exempt(module), _rates(module)
    found: dict[tuple[float, bool], list] = {(1.0, False): [], (1.0, True): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name in exempt
            found.setdefault((rates.get(name, 1.0), plain), []).append(parameter)
    return [
        {"params": some, "weight_decay": 0.0 if plain else weight_decay, "lr_scale": rate}
        for (rate, plain), some in found.items()
        if some
    ]


def layer_decay_groups(
    module: nn.Module,
    depths: int | tuple[int, ...],
    decay: float,
    weight_decay: float,
    no_decay: set[str] | None = None,
) -> list[dict]:
    """Groups for fine-tuning with layer-wise learning-rate decay (BEiT arXiv:2106.08254; MAE's
    official util/lr_decay.py).

    `module` is a ViT or a Swin, or holds one anywhere; `depths` are the blocks of its stages, one
    number for a ViT. With n blocks in all, a parameter's rate is multiplied by decay ** (n + 1 -
    id): id 0 for patch embedding, class token, position embedding, mask token; i + 1 for block i,
    counted over all stages; a Swin's patch merging (microsoft/SimMIM), and a PVT's norm between
    stages, belong to the last block before them; n + 1 (scale 1) for everything else: final norms,
    head, shared relative positions. No weight decay on 1-d tensors, class token, position
    embedding, and names in `no_decay` (default: `module.no_weight_decay()`). ValueError when a
    block's number exceeds its stage's depth.
    """
    exempt = _exempt(module) if no_decay is None else set(no_decay)
    found: dict[tuple[int, bool], dict] = {}
    last = (depths if isinstance(depths, int) else sum(depths)) + 1
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_id(name, depths)
        position = name.split(".")[-1] in ("cls_token", "pos_embed")
        plain = position or parameter.ndim <= 1 or name in exempt
        rates = {
            "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": decay ** (last - layer),
        }
        group = found.setdefault((layer, plain), {"params": [], **rates})
        group["params"].append(parameter)
    return list(found.values())


def layer_id(name: str, depths: int | tuple[int, ...]) -> int:
    """Layer of a parameter by its name in timm, see `layer_decay_groups`: 0 = embedding, i + 1 =
    block i, last = everything else.
    """
    depths = (depths,) if isinstance(depths, int) else depths
    block = re.search(r"(?:^|\.)(?:layers\.(\d+)\.)?blocks\.(\d+)\.", name)
    if block:
        stage, number = int(block[1] or 0), int(block[2])
        if stage >= len(depths) or number >= depths[stage]:
            given = ", ".join(map(str, depths))
            raise ValueError(
                f"layer decay: {name} belongs to block {number}, but the depth given is {given}"
            )
        return sum(depths[:stage]) + number + 1
    # A Swin's patch merging lies, in timm, in the stage that follows it.
    merging = re.search(r"(?:^|\.)layers\.(\d+)\.downsample\.", name)
    if merging:
        return sum(depths[: int(merging[1])])
    between = re.search(r"(?:^|\.)layers\.(\d+)\.norm\.", name)
    if between:
        return sum(depths[: int(between[1]) + 1])
    parts, tokens = name.split("."), ("cls_token", "pos_embed", "mask_token", "reg_token")
    embedding = "patch_embed" in parts or parts[-1] in tokens
    return 0 if embedding else sum(depths) + 1


def build(recipe, param_groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of a recipe over groups {"params", "weight_decay", "lr_scale"}; fused kernels
    where the device has them.

    ValueError for groups without parameters, a parameter in two groups, or an unknown name.
    """
    param_groups = [
        {"lr_scale": 1.0, **group, "params": list(group["params"])} for group in param_groups
    ]
    every = [parameter for group in param_groups for parameter in group["params"]]
    if not every:
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    if len({id(parameter) for parameter in every}) != len(every):
        raise ValueError("a parameter is in two parameter groups")
    fast = {"fused": True} if device.type in ("cpu", "cuda") else {"foreach": True}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            param_groups, lr=recipe.lr, betas=tuple(recipe.betas), eps=recipe.eps, **fast
        )
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(param_groups, lr=recipe.lr, momentum=recipe.momentum, **fast)
    if recipe.optimizer == "lars":
        from stages.kit.train.lars import LARS

        return LARS(param_groups, lr=recipe.lr, momentum=recipe.momentum)
    raise ValueError(f"optimizer: {recipe.optimizer!r} is not one of adamw, sgd, lars")


@torch.no_grad()
def clip(parameters: list[nn.Parameter], limit: float | None, mode: str = "global") -> torch.Tensor:
    """Scales the gradients down to `limit` in place and returns the total L2 norm that they had
    (0-d tensor, no sync).

    mode "global": one factor for all, limit / (norm + 1e-6) where that is below 1 (torch's
    clip_grad_norm_); "tensor": each parameter's own gradient is clipped (DINO arXiv:2104.14294,
    official code). limit None or 0: nothing is scaled.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norms = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(norms)
    if limit:
        basis = norms if mode == "tensor" else total.expand_as(norms)
        factors = (limit / (basis + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(factors.unbind()))
    return total


def _exempt(module: nn.Module) -> set[str]:
    return set(module.no_weight_decay()) if hasattr(module, "no_weight_decay") else set()


def _rates(module: nn.Module) -> dict[str, float]:
    """Factors of `module.rates()` by the parameters' names, all of which exist."""
    rates = dict(module.rates()) if hasattr(module, "rates") else {}
    known = {name for name, _ in module.named_parameters()}
    if unknown := sorted(rates.keys() - known):
        raise ValueError(
            f"rates: found {unknown[0]!r}, expected the name of a parameter"
            f"{did_you_mean(unknown[0], sorted(known))}"
        )
    return rates
