"""Stage transfer: what one downstream task makes of one pretrained encoder.

    python -m stages.transfer --run mae-s0 --task linear [--params params.yaml] [--results results]

Writes results/transfer/<run>/<task>/: metrics.json (accuracies as fractions, and the whole protocol
that they depend on), predictions.npz (index, label, prediction of every test image), and what else
the task leaves.
"""

from __future__ import annotations

import argparse

from stages import tasks
from stages.kit import dist
from stages.kit.data import store
from stages.kit.job.job import running, write_json
from stages.kit.job.launch import spread
from stages.kit.spec import Spec, configure
from workflow.plan import load


def main(argv: list[str] | None = None) -> int:
    """Runs one transfer job; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.transfer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--run", required=True, help="a pretraining run such as mae-s0")
    parser.add_argument("--task", required=True, help="a task of params.yaml such as linear")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--results", default="results")
    args = parser.parse_args(argv)
    plan = load(args.params, args.results)
    job = plan.job(f"transfer/{args.run}/{args.task}")
    spread(plan, job, argv)
    with running(job, plan) as run:
        params = run.job.params
        task = tasks.find(params["task"]["name"])
        config = configure(task.Config, params["task"]["config"])
        data, encoder = run.input("data"), run.input(f"pretrain/{args.run}") / "encoder"
        info = store.info(data)
        if getattr(task, "LABELS", False):
            tasks.require_labels(params["task"]["name"], info)
        spec = Spec.of(info, params["image_size"], params["model"])
        metrics = task.run(encoder, data, config, run, params["seed"], spec)
        if dist.is_main():
            identity = {"run": args.run, "method": params["method"], "task": params["task"]["name"]}
            write_json(run.out / "metrics.json", {**identity, **metrics})
            shown = ("top1", "per_class_mean", "n_test")
            run.summary.update({key: metrics[key] for key in shown if key in metrics})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
