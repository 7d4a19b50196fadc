"""Stage target: train, fit or fetch one tokenizer or teacher, and refuse it if it is not healthy.

    python -m stages.target --name vqkd [--params params.yaml] [--results results]

Writes results/target/<name>/: target.safetensors and target.json (all that a student needs),
health.json, history.jsonl (of what trains), pictures/*.png (of kinds that have any). A target that
collapsed fails the stage: no manifest, so nothing can be trained on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stages import targets
from stages.kit import dist, keyed
from stages.kit.data import store
from stages.kit.data.batches import (
    MOST,
    held_out,
    shown_batch,
    training_batches,
    training_images,
    write_pictures,
)
from stages.kit.data.loader import evaluation
from stages.kit.job.command import command
from stages.kit.parts import probes, tokens
from stages.kit.spec import Spec, configure
from stages.kit.train.loop import Recipe, fit
from workflow import checks, plugins
from workflow.files import JobError, write_json


def main(argv: list[str] | None = None) -> int:
    """Runs one target job; returns the exit status."""
    return command("target", __doc__, make, argv)


def make(run) -> None:
    """The work of the stage, for a job.Run. JobError when the finished target is not healthy."""
    if problems := build(run):
        raise JobError(problems)


def build(run) -> str:
    """Makes the target and examines it: what is wrong with it, "" if nothing is."""
    params, seed = run.job.params, run.job.params["seed"]
    module = plugins.module("target", params["target"]["kind"])
    config = configure(module.Config, params["target"]["config"])
    data = run.input("data")
    spec = Spec.of(store.info(data), params["image_size"], params["model"])
    upstream = targets.given(run, "upstream", spec)
    torch.manual_seed(keyed.key(seed, "init"))
    if hasattr(module, "Training"):
        training = module.Training(config, spec, upstream).to(run.device)
        batches = training_batches(run, module, config, spec, data, seed)
        recipe = Recipe.of(config, params["train"], batches.steps_per_epoch)
        fit(training, batches, recipe, run, seed)
        target = training.target
    else:
        target = module.Target(config, spec, *([upstream] if upstream else [])).to(run.device)
        if hasattr(target, "prepare"):
            target.prepare()
    if not dist.is_main():
        return ""
    if hasattr(target, "fit"):
        target.fit(training_images(run, module, config, spec, data, seed), seed)
    target = target.to(run.device).requires_grad_(False).eval()
    return finish(run, module, config, spec, target, upstream, data)


def finish(run, module, config, spec: Spec, target, upstream, data) -> str:
    """Writes the target and its pictures, and examines it: what is wrong with it, or ""."""
    kind, train = run.job.params["target"]["kind"], run.job.params["train"]
    labels = module.labels(config) if hasattr(module, "labels") else bool(module.LABELS)
    above = run.input("upstream") if target.upstream is not None else None
    targets.save(target, run.out, kind, config, spec, above, labels=labels)
    images = validation_images(data, spec, train["batch_size"], run.device)
    health = module.health(target, images, config)
    problems = health.pop("problems", [])
    seed, size = run.job.params["seed"], train["batch_size"]
    of_images = "images" in getattr(module, "INPUT", "images")
    if of_images and "ids" in target.sizes:
        found = tokens.examine(target, upstream, data, spec, seed, run.device, size)
        fatal = getattr(config, "gate", True)
        problems += found.problems if fatal else []
        # parts place masks and no student predicts them, so they need not tell the classes
        notes = [] if isinstance(config, checks.Parts) else found.notes
        notes = notes if fatal else found.problems + notes
        health |= {"tokens": found.numbers, "notes": notes}
    elif of_images and {"cls", "patch"} & target.sizes.keys():
        health["probes"] = probes.of_features(target, data, spec, seed, run.device, size)
    write_json(run.out / "health.json", {**health, "problems": problems})
    numbers = {**health, **health.get("tokens", {}), **health.get("probes", {})}
    numbers = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
    run.summary.update(numbers)
    run.summary["sizes"] = target.sizes
    run.summary["parameters"] = sum(p.numel() for p in target.parameters())
    if hasattr(module, "pictures"):
        shown = shown_batch(data, spec, run.device)["view"]
        write_pictures(run.out / "pictures", module.pictures(target, shown))
    if not problems:
        return ""
    found = "\n".join(f"  - {problem}" for problem in problems)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    return (
        f"{run.job.id} ({kind}) is not fit to train a student on:\n{found}\nmeasured: {shown}\n"
        f"Its files and health.json are in {run.out} to look at; change targets.{run.job.name} in "
        f"{run.plan.params_file} and run the stage again."
    )


def validation_images(
    data, spec: Spec, batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Every validation image (train where there are none), (B,3,H,W) in [0,1] on the device."""
    for images, _, _ in evaluation(held_out(data), spec.image_size, min(batch_size, MOST)):
        yield images.to(device)


if __name__ == "__main__":
    raise SystemExit(main())
