"""Tokenizers and teachers that supply targets, one file each; the file's name is the kind in
params.yaml.

A target module has: a docstring (paper, idea, every departure), `PRODUCES` (what it gives, a set of
the names in kit/nets/target.py), `UPSTREAM` (what it needs of the target that it is made from;
None: it has none), `NEEDS` (of the student's encoder), `LABELS`, a frozen dataclass `Config`,
`class Target`, `health(target, images, config)`, and if it trains `class Training` with `views`.
`pictures(target, images)` are optional.

A finished target is a folder with target.safetensors (its weights) and target.json (kind, config,
spec): it needs neither its upstream nor its data to be used. `save` writes it, `load` reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from stages.kit.nets.attention import unfused
from stages.kit.nets.target import EncoderTarget, Frozen, Target
from stages.kit.spec import Spec, configure
from workflow import plugins
from workflow.files import write_atomic, write_json

__all__ = ["Frozen", "Target", "given", "load", "save"]

WEIGHTS, DESCRIPTION = "target.safetensors", "target.json"


def load(path: Path | str, device: torch.device | str = "cpu") -> Target:
    """The target in a folder, on `device`, without gradients.

    FileNotFoundError or ValueError, naming the file, when the folder does not hold a whole target.
    """
    path = Path(path)
    for name in (DESCRIPTION, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: not a target, there is no {name}")
    described = json.loads((path / DESCRIPTION).read_text())
    module = plugins.module("target", described["kind"])
    config, spec = configure(module.Config, described["config"]), Spec.from_json(described["spec"])
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        target = module.Target(config, spec)
    try:
        target.load_state_dict(load_file(path / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path / WEIGHTS}: does not fit the target described beside it: {error}"
        ) from error
    return unfused(target, device).to(device).requires_grad_(False).eval()


def given(run, role: str, spec: Spec) -> Frozen | None:
    """What a job learns from in this role, frozen: a finished target, or the encoder of a run.

    None where the job has no such input. ValueError if the target has another grid than `spec`.
    """
    if role not in run.job.inputs:
        return None
    folder = run.input(role)
    if (folder / DESCRIPTION).is_file():
        target = load(folder, run.device)
        if target.spec.grid != spec.grid:
            made, here = (f"{grid}x{grid}" for grid in (target.spec.grid, spec.grid))
            raise ValueError(f"{role}: found a target of {made} patches, expected {here}")
        return Frozen(target)
    return Frozen(EncoderTarget.load(folder / "encoder", spec, run.device))


def save(target: Target, path: Path | str, kind: str, config, spec: Spec, **facts) -> dict:
    """Writes the folder that `load` reads; returns the description, with `sizes` and **facts."""
    path = Path(path)
    # clones: safetensors refuses tensors that share memory
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in target.state_dict().items()
    }
    write_atomic(path / WEIGHTS, serialise(state))
    about = {"kind": kind, "config": asdict(config), "spec": spec.to_json(), "sizes": target.sizes}
    write_json(path / DESCRIPTION, about | facts)
    return about | facts
