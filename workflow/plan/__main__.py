"""The command: check params.yaml, list its jobs and their state, say why one would run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from pathlib import Path

from workflow.engines.dvc import RUNS, follow, outside
from workflow.plan import Plan, load
from workflow.plan.explain import explain
from workflow.plan.kept import set_aside
from workflow.plan.leftovers import leftovers, prune
from workflow.plugins import ParamsError

DEFAULT = ("params.yaml", "results")  # what dvc.yaml is about


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = _parser().parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        plan = load(args.params, args.results)
        if args.explain:
            id = args.explain.removeprefix(f"{args.results}/").removesuffix("/manifest.json")
            print(explain(plan, id))
            return 0
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    if args.prune:
        for folder in prune(plan):
            print(f"deleted {folder}")
        return 0
    if args.check and (why := outside(plan)):
        print(why, file=sys.stderr)
        return 1
    for text in plan.doubts():
        print(f"warning: {text}", file=sys.stderr)
    ours = (args.params, args.results) == DEFAULT
    if ours:
        set_aside(plan)
    changed = ours and follow(plan)
    if args.check:
        if changed:
            print(f"{RUNS} did not list the jobs of {args.params}{_again()}", file=sys.stderr)
        return int(changed)
    _show(plan)
    return 0


def _again() -> str:
    """What to do when dvc.yaml was read with other jobs than params.yaml has, as DVC was called."""
    if any(folder.parts[-3:] == (".dvc", "tmp", "exps") for folder in Path.cwd().parents):
        return (
            ", and in a temporary workspace DVC cannot read it again: `dvc exp run --temp` and the "
            "queue may change settings, but not which jobs there are. Change those in params.yaml "
            "itself, run `python -m workflow.plan`, then the experiment."
        )
    if "DVC_EXP_NAME" in os.environ:
        return "; it does now. params.yaml keeps the change: please run `dvc exp run` again."
    return "; it does now. Please run `dvc repro` again."


def _show(plan: Plan) -> None:
    width = max(map(len, plan.jobs))
    for id, job in plan.jobs.items():
        state = "fresh" if plan.fresh(id) else "stale" if plan.manifest(id) else "to run"
        print(f"{id:<{width}}  {state:<6}  {job.fingerprint[:12]}")
    for folder in leftovers(plan):
        print(f"{folder} belongs to no job of {plan.params_file} (--prune deletes such folders)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.plan",
        description="The jobs of a params file and their state; `python -m stages.cost` tells what "
        "they will take.",
    )
    parser.add_argument(
        "--params", default="params.yaml", help="params file (default: params.yaml)"
    )
    parser.add_argument(
        "--results", default="results", help="folder of the results (default: results)"
    )
    parser.add_argument(
        "--explain", metavar="JOB", help="say why a job would run, e.g. pretrain/mae-s0"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail when {RUNS} did not list the jobs of params.yaml (and write it)",
    )
    parser.add_argument(
        "--prune", action="store_true", help="delete outputs of jobs that are no longer in the plan"
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
