"""Stage pretrain: one method, one seed, one encoder.

    python -m stages.pretrain --run mae-s0 [--params params.yaml] [--results results]
    torchrun --standalone --nproc-per-node 2 -m -- stages.pretrain --run mae-s0

Writes results/pretrain/<run>/: encoder/ (a timm folder), history.jsonl (of what trains),
pictures/*.png (of methods that have any). Killed at any moment, the same command continues and ends
with the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from stages import targets
from stages.kit import dist, keyed
from stages.kit.data import store
from stages.kit.data.loader import Batches
from stages.kit.job.command import command
from stages.kit.nets import encoders
from stages.kit.spec import Spec, configure
from stages.kit.train.loop import Recipe, fit
from workflow import plugins

SHOWN = 8  # validation images in the pictures


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


def training_batches(run, module, config, spec: Spec, data: Path, seed: int) -> Batches:
    """The batches of a plug-in module with `views` and `LABELS`, as this job's train section and
    process want them.
    """
    train = run.job.params["train"]
    return Batches(
        store.Split.open(data, "train"),
        module.views(config, spec),
        train["batch_size"],
        seed,
        micro=train["micro_batch"],
        labels=bool(module.LABELS),
        workers=run.compute["workers"],
        rank=dist.rank(),
        world=dist.world(),
    )


def held_out(data: Path) -> store.Split:
    """The validation split, or the train split where there are no validation images."""
    return store.Split.open(
        data, "val" if store.info(data)["splits"].get("val", {}).get("count") else "train"
    )


def shown_batch(data: Path, spec: Spec, device: torch.device) -> dict[str, torch.Tensor]:
    """The first images of the validation split (of the train split if that is empty), as a batch
    with one view.
    """
    split = held_out(data)
    index = torch.arange(min(SHOWN, len(split)))
    images = split.square(index.numpy(), spec.image_size).permute(0, 3, 1, 2).float().div(255)
    labels = torch.as_tensor(split.labels[index.numpy()], dtype=torch.int64)
    batch = {"view": images, "index": index, "row": index, "label": labels}
    return {name: value.to(device) for name, value in batch.items()}


def write_pictures(folder: Path, pictures: dict) -> None:
    """{name: uint8 (H,W,3)} -> folder/<name>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")


if __name__ == "__main__":
    raise SystemExit(main())
