"""The command: rehearse one job of each kind, print what all will take."""

from __future__ import annotations

import argparse
import os

from stages.kit.job.process import prepare
from workflow.files import write_json
from workflow.plan import load


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    prepare()
    parser = argparse.ArgumentParser(
        "python -m stages.cost",
        description="Runs one job of each kind on a few images, and tells what all jobs of a "
        "params file will take on this machine: images, FLOPs, time, memory.",
    )
    parser.add_argument("--params", default="params.yaml", help="(default: params.yaml)")
    parser.add_argument(
        "--results",
        default="results",
        help="folder of the results, to compare with what finished jobs took (default: results)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer and shorter runs: some tens of seconds of CPU time, FLOPs as exact, times less",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the costs there too, for `python -m workflow.watch`"
    )
    args = parser.parse_args(argv)
    plan = load(args.params, args.results)
    # A thread that waits for another must sleep: spinning would count as work. torch reads this.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from stages.cost import estimate, table

    costs = estimate.estimate(plan, quick=args.quick)
    if args.json:
        write_json(args.json, table.record(plan, costs))
    print(table.text(plan, costs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
