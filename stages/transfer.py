"""Stage transfer: what one downstream task makes of one pretrained encoder.

    python -m stages.transfer --run mae-s0 --task linear [--params params.yaml] [--results results]

Writes results/transfer/<run>/<task>/: metrics.json (fractions, and the whole protocol that they
depend on), scores.npz (a score in [0, 1] of every test image), and what else the task leaves.
"""

from __future__ import annotations

from pathlib import Path

from stages import tasks
from stages.kit import dist
from stages.kit.data import store
from stages.kit.job.command import command
from stages.kit.spec import Spec, configure
from workflow import plugins
from workflow.files import write_json


def main(argv: list[str] | None = None) -> int:
    """Runs one transfer job; returns the exit status."""
    return command("transfer", __doc__, transfer, argv)


def transfer(run) -> None:
    """The work of the stage, for a job.Run."""
    params, inputs = run.job.params, run.job.inputs
    name, kind = params["task"]["name"], params["task"]["kind"]
    module = plugins.module("task", kind)
    data = run.input("data")
    info = store.info(data)
    tasks.require(name, set(module.NEEDS), inputs["data"].removeprefix("data/"), info)
    trial = tasks.Trial(
        name=name,
        encoder=run.input("encoder") / "encoder",
        data=data,
        config=configure(module.Config, params["task"]["config"]),
        spec=Spec.of(info, params["image_size"], params["model"]),
        seed=params["seed"],
        run=run,
        after=run.input("after") if "after" in inputs else None,
    )
    metrics = module.run(trial)
    if not dist.is_main():
        return
    key, label, unit = module.HEADLINE
    check(f"stages/tasks/{kind}.py", metrics, key, run.out)
    about = {
        "run": f"{params['run']}-s{params['seed']}",
        "method": params["method"],
        "task": name,
        "kind": kind,
        "headline": {"key": key, "label": label, "unit": unit},
    }
    write_json(run.out / "metrics.json", {**about, **metrics})
    run.summary[key] = metrics[key]


def check(file: str, metrics: dict, key: str, out: Path) -> None:
    """ValueError unless a task has kept what its file promises: the headline, and scores."""
    value = metrics.get(key)
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise ValueError(f"{file}: run() gave {key} = {value!r}, expected a fraction in [0, 1]")
    if not (out / "scores.npz").is_file():
        raise ValueError(f"{file}: run() left no scores.npz, expected a call of save_scores")


if __name__ == "__main__":
    raise SystemExit(main())
