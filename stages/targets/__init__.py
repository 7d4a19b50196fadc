"""Tokenizers and teachers that supply targets, one file each; the file's name is the kind in
params.yaml.

A target module has: a docstring (paper, idea, every departure), `PRODUCES` (what it gives, a set of
the names in kit/nets/target.py), `UPSTREAM` (what it needs of the target that it is made from;
None: it has none), `NEEDS` (of the student's encoder), `LABELS`, a frozen dataclass `Config`,
`class Target`, `health(target, images, config)`, and if it trains `class Training` with `views`.
One that is fitted, without gradients, has `Target.fit(images, seed)` and `views` instead.
`pictures(target, images)` are optional.

A finished target is a folder with target.safetensors (its weights) and target.json (kind, config,
spec): it needs neither its upstream nor its data to be used. One that looks through its upstream
has a copy of that in the folder `upstream`. `save` writes it, `load` reads it.
"""

from __future__ import annotations

import json
import shutil
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
UPSTREAM, ENCODER = "upstream", "encoder"  # folders: of what a target looks through, of a run


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
    above = [_open(path / UPSTREAM, spec, device)] if described.get(UPSTREAM) else []
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        target = module.Target(config, spec, *above)
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
    found = _open(run.input(role), spec, run.device)
    if found.open.spec.grid != spec.grid:
        made, here = (f"{grid}x{grid}" for grid in (found.open.spec.grid, spec.grid))
        raise ValueError(f"{role}: found a target of {made} patches, expected {here}")
    return found


def _open(folder: Path, spec: Spec, device: torch.device | str) -> Frozen:
    """The target in a folder, or the encoder of a run, for images of `spec`."""
    if (folder / ENCODER).is_dir():
        return Frozen(EncoderTarget.load(folder / ENCODER, spec, device))
    return Frozen(load(folder, device))


def save(
    target: Target,
    path: Path | str,
    kind: str,
    config,
    spec: Spec,
    upstream: Path | None = None,
    **facts,
) -> dict:
    """Writes the folder that `load` reads; returns the description, with `sizes` and **facts.

    upstream: the folder of the target, or run, that this one looks through, if it does.
    """
    path = Path(path)
    # clones: safetensors refuses tensors that share memory
    state = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in target.state_dict().items()
    }
    write_atomic(path / WEIGHTS, serialise(state))
    about = {"kind": kind, "config": asdict(config), "spec": spec.to_json(), "sizes": target.sizes}
    if upstream is not None:
        _copy(upstream, path / UPSTREAM)
        about[UPSTREAM] = True
    write_json(path / DESCRIPTION, about | facts)
    return about | facts


def _copy(source: Path, folder: Path) -> None:
    """Copies of a target's folder, or of a run's, what `_open` reads."""
    names = (DESCRIPTION, WEIGHTS)
    if (source / ENCODER).is_dir():
        names = (f"{ENCODER}/config.json", f"{ENCODER}/model.safetensors")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if (source / UPSTREAM).is_dir():
        _copy(source / UPSTREAM, folder / UPSTREAM)
