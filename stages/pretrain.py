"""Stage pretrain: one method, one seed, one encoder.

    python -m stages.pretrain --run mae-s0 [--params params.yaml] [--results results]
    torchrun --standalone --nproc-per-node 2 -m -- stages.pretrain --run mae-s0

Writes results/pretrain/<run>/: encoder/ (a timm folder), history.jsonl (of what trains),
pictures/*.png (of methods that have any). Killed at any moment, the same command continues and ends
with the same bytes.
"""

from __future__ import annotations

import torch

from stages import targets
from stages.kit import dist, keyed
from stages.kit.data import store
from stages.kit.data.batches import shown_batch, training_batches, write_pictures
from stages.kit.job.command import command
from stages.kit.nets import encoders
from stages.kit.spec import Spec, configure
from stages.kit.train.loop import Recipe, fit
from workflow import plugins


def main(argv: list[str] | None = None) -> int:
    """Runs one pretraining job; returns the exit status."""
    return command("pretrain", __doc__, pretrain, argv)


def pretrain(run) -> None:
    """The work of the stage, for a job.Run."""
    params, seed = run.job.params, run.job.params["seed"]
    module = plugins.module("method", params["method"]["kind"])
    config = configure(module.Config, params["method"]["config"])
    data = run.input("data")
    spec = Spec.of(store.info(data), params["image_size"], params["model"])
    spec = spec.at(getattr(config, "input_size", None))
    target = targets.given(run, "target", spec)
    if (stage := params.get("stage", 1)) > 1:  # other weights, masks and order of images
        seed = keyed.key(seed, "stage", stage)
    torch.manual_seed(keyed.key(seed, "init"))
    method = module.Method(config, spec, target).to(run.device)
    if module.TRAINS:
        batches = training_batches(run, module, config, spec, data, seed)
        fit(method, batches, Recipe.of(config, params["train"], batches.steps_per_epoch), run, seed)
    run.summary["parameters"] = sum(p.numel() for p in method.encoder.parameters())
    if dist.is_main():
        method.eval()
        encoders.save(method.encoder, run.out / "encoder", spec)
        if hasattr(method, "pictures"):
            shown = shown_batch(data, spec, run.device)
            write_pictures(run.out / "pictures", method.pictures(shown))


if __name__ == "__main__":
    raise SystemExit(main())
