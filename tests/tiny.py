"""The smallest of everything, for tests: a spec, batches, a step's progress, targets, a job's run.

from tests import tiny

spec = tiny.spec()                        # 16 px, patches of 4, width 32, two blocks
method = tiny.method("mae", spec)
out = method(tiny.batch(tiny.module("mae"), spec), tiny.progress())
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from stages.kit.nets.target import Frozen, Target
from stages.kit.spec import Spec, encoder_config
from stages.kit.train.loop import Progress
from workflow import plugins

SIZES = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def model(kind: str = "vit", **changes):
    """The Config of an encoder family in tiny sizes."""
    swin = {"depth": (1, 1), "num_heads": (2, 4), "window_size": 2}
    conv = {"patch_size": 8, "args": {"conv_dims": [8, 16], "conv_depths": [1, 1]}}
    pvt = {"patch_size": 2, "depth": (1, 1), "num_heads": (1, 2)}
    own = {"swin": swin, "convvit": conv, "pvt": pvt}.get(kind, {})
    known = {f.name for f in fields(module(kind, "encoder").Config)}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return encoder_config(kind, {**sizes, **own, **changes})


def spec(image_size: int = 16, kind: str = "vit", classes: int = 4, **changes) -> Spec:
    """`changes` are those of the model."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return Spec(image_size, kind, model(kind, **changes), mean, std, classes, images=64)


def progress(rows=8, step: int = 3, steps: int = 10, epoch: float = 0.5, seed: int = 0) -> Progress:
    """`rows`: how many samples, or their places in the global batch."""
    rows = torch.arange(rows) if isinstance(rows, int) else rows
    return Progress(step=step, steps=steps, epoch=epoch, seed=seed, rows=rows, device=rows.device)


def module(name: str, kind: str = "method"):
    """The module of a plug-in."""
    return plugins.module(kind, name)


def images(rows: int = 4, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Noise (rows,3,size,size) in [0,1)."""
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batch(module, spec: Spec, config=None, rows: int = 8) -> dict[str, torch.Tensor]:
    """Smooth pictures, the same for every view of a size; labels only where the module declares it
    needs them.
    """
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(rows, 3, 4, 4, generator=generator)
    recipes = module.views(config or module.Config(), spec)
    out = {
        view: F.interpolate(coarse, size=recipe.size, mode="bilinear").clamp(0, 1)
        for view, recipe in recipes.items()
    }
    whole = torch.tensor([0, 0, spec.image_size, spec.image_size, 0])
    out |= {f"{view}.box": whole.expand(rows, -1) for view in recipes}
    out |= {"index": torch.arange(rows), "row": torch.arange(rows)}
    if module.LABELS:
        out["label"] = torch.arange(rows) % spec.num_classes
    return out


class Colours(Target):
    """A target without training: everything that it gives follows from the colour of a patch."""

    def __init__(self, spec: Spec, *gives: str, width: int = 6, codes: int = 8):
        super().__init__()
        self.spec, self.codes, self.depth = spec, codes, 4
        sizes = {"ids": codes, "logits": codes, "attention": 2}
        self.sizes = {name: sizes.get(name, width) for name in gives or ("ids", "patch", "cls")}
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * width).view(width, 3))

    def look(self, images, wanted, norm, layers):
        assert norm in (True, False)
        colours = F.adaptive_avg_pool2d(images, self.spec.grid).flatten(2).transpose(1, 2)
        ids = (colours.sum(-1) * 20).long() % self.codes
        patch = colours @ self.weight.T
        found = {"ids": ids, "logits": F.one_hot(ids, self.codes).float(), "patch": patch}
        found |= {"cls": patch.mean(1), "layers": [patch for _ in layers]}
        found["attention"] = colours.mean(-1)[:, None].expand(-1, 2, -1).softmax(-1)
        return found


def target(spec: Spec, *gives: str, **sizes) -> Frozen:
    """`Colours` as a student gets it."""
    return Frozen(Colours(spec, *gives, **sizes))


def method(name: str, spec: Spec, target: Frozen | None = None, seed: int = 0, **settings):
    """A method with its Config's defaults but for `settings`; with a target of colours if it needs
    one and none is given.
    """
    found = module(name)
    config = found.Config(**settings)
    if found.TARGET and target is None:
        target = globals()["target"](spec, *needs(config, found))
    torch.manual_seed(seed)
    return found.Method(config, spec, target)


def needs(config, module) -> list[str]:
    """What a method with these settings needs of its target."""
    return sorted(module.TARGET | getattr(config, "also_needs", set()))


def run(folder: Path, seed: int = 0, **params) -> SimpleNamespace:
    """As much of a job's Run (kit/job/job.py) as loops and tasks look at."""
    out, work = Path(folder) / "out", Path(folder) / "work"
    for each in (out, work):
        each.mkdir(parents=True, exist_ok=True)
    job = SimpleNamespace(id="pretrain/tiny-s0", params={"seed": seed, **params}, inputs={})
    compute = {"workers": 0, "threads": 1, "compile": False, "device": "cpu"}
    found = {"job": job, "out": out, "work": work, "compute": compute, "summary": {}}
    return SimpleNamespace(**found, device=torch.device("cpu"))
