"""Tokenizers and teachers that supply targets, one file per kind; the file's name is the kind in
params.yaml.

A finished target is a folder with target.safetensors (its weights) and target.json (kind, config,
spec): it needs neither its upstream nor its data to be used. `load` reads it, `save` writes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from stages.kit.job.job import write_atomic, write_json
from stages.kit.nets import attention
from stages.kit.plugin import load as plugin
from stages.kit.spec import Spec, configure

WEIGHTS, DESCRIPTION = "target.safetensors", "target.json"


def find(kind: str) -> ModuleType:
    """The module of target `kind`; a ValueError with the nearest name if there is no such file."""
    return plugin("stages.targets", kind)


def load(path: Path | str, device: torch.device | str = "cpu") -> torch.nn.Module:
    """The Target in a folder: on `device`, in evaluation mode, without gradients.

    FileNotFoundError or ValueError, naming the file, when the folder does not hold a whole target.
    """
    path = Path(path)
    for name in (DESCRIPTION, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: not a target, there is no {name}")
    described = json.loads((path / DESCRIPTION).read_text())
    module = find(described["kind"])
    config, spec = configure(module.Config, described["config"]), Spec.from_json(described["spec"])
    with torch.random.fork_rng(
        devices=[]
    ):  # what is drawn here is overwritten; nobody's randomness may move
        target = module.Target(config, spec)
    try:
        target.load_state_dict(load_file(path / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path / WEIGHTS}: does not fit the target described beside it: {error}"
        ) from error
    if torch.device(device).type == "cpu":
        attention.multiply_out(target)
    return pin(target.to(device))


def save(target: torch.nn.Module, path: Path | str, kind: str, config, spec: Spec, **facts) -> dict:
    """Writes the folder that `load` reads; returns the description, with `codes` or `dim` and
    **facts.
    """
    path = Path(path)
    # clones: safetensors refuses tensors that share memory
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in target.state_dict().items()
    }
    write_atomic(path / WEIGHTS, serialise(state))
    size = {
        name: int(getattr(target, name))
        for name in ("codes", "dim")
        if getattr(target, name, None) is not None
    }
    described = {"kind": kind, "config": asdict(config), "spec": spec.to_json(), **size, **facts}
    write_json(path / DESCRIPTION, described)
    return described


def pin(target: torch.nn.Module) -> torch.nn.Module:
    """`target` itself, frozen and in evaluation mode."""
    return target.requires_grad_(False).eval()
