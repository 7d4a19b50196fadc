"""The command: show all jobs of a plan while an engine, started here or elsewhere, runs them."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

from workflow.durations import duration
from workflow.expected import Expected, file, slots
from workflow.plan import Plan, load
from workflow.plugins import ParamsError
from workflow.watch import words
from workflow.watch.board import Board
from workflow.watch.engine import Engine, files, name
from workflow.watch.screen import Lines, screen

LOOK = 1.0  # seconds between two looks


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status, that of the engine if there is one."""
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    command, args = argv[at + 1 :], _parser().parse_args(argv[:at])
    given = files(command)
    params = args.params or given.get("params", "params.yaml")
    results = args.results or given.get("results", "results")
    try:
        plan = load(params, results)
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 1
    view = screen()
    return _run(plan, command, args.cost, view) if command else _attend(plan, args.once, view)


def _run(plan: Plan, command: list[str], cost: bool, view: Lines) -> int:
    """Start an engine and show what it does until it ends."""
    engine, began = name(command), time.time()
    places = 1 if engine == "dvc" else slots(plan)
    board = Board(plan, Expected.read(file(plan), plan), places, began)
    if cost and len(board.before) == len(board.jobs):
        view.say(f"All {len(board.jobs)} jobs of {plan.params_file} are up to date.")
        return _end(board, view)
    if cost:
        if not board.jobs.keys() - board.before <= board.expected.jobs.keys():
            view.say(f"{plan.experiment}: trying a few images first, to tell what it will take ...")
            board = Board(plan, estimated(plan), places, began)
        for line in words.expected(board):
            view.say(line)
    log = plan.results.parent / "logs" / f"{engine}.log"
    view.say(f"{engine} writes to {log}; what jobs say is in {log.parent} too")
    child = Engine(command, log)
    with child.signalled():
        while not child.ended(LOOK):
            _look(board, view, child)
    _look(board, view, child)
    view.close()
    return _over(board, view, child, engine, time.time() - began)


def _look(board: Board, view: Lines, child: Engine | None = None) -> None:
    for line in child.warnings() if child else ():
        view.say(line)
    for id, state in board.look():
        view.event(board, id, state)
    view.show(board)


def _over(board: Board, view: Lines, child: Engine, engine: str, seconds: float) -> int:
    """What is said when the engine has ended; its exit status."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{duration(seconds)}, {duration(spent.ru_utime + spent.ru_stime)} of CPU time"
    view.say(f"{words.overall(board)}, after {took}")
    if child.status == 0:
        return _end(board, view)
    failed, stopped = words.failures(board), board.of("stopped")
    for line in failed or ([] if stopped else words.tail(child.log)):
        view.say(line)
    if stopped:
        view.say(f"stopped, to be continued: {', '.join(stopped)}")
    again = "finished jobs are kept, the same command goes on from there"
    view.say(f"{engine} ended with status {child.status} (see {child.log}); {again}")
    return child.status


def _end(board: Board, view: Lines) -> int:
    for line in words.headline(board):
        view.say(line)
    return 0


def _attend(plan: Plan, once: bool, view: Lines) -> int:
    """Show what others run, until all is done."""
    board = Board(plan, Expected.read(file(plan), plan), slots(plan))
    for line in [words.heartbeat(board), *words.failures(board)]:
        view.say(line)
    try:
        while not once and len(board.of("done")) < len(board.jobs):
            _look(board, view)
            time.sleep(LOOK)
    except KeyboardInterrupt:
        view.close()
        return 130
    view.close()
    return _end(board, view)


def estimated(plan: Plan) -> Expected:
    """What a quick rehearsal says of the plan's jobs; nothing if it fails."""
    path = file(plan)
    what = ["--quick", "--json", os.fspath(path)]
    where = ["--params", os.fspath(plan.params_file), "--results", os.fspath(plan.results)]
    command = [sys.executable, "-m", "stages.cost", *what, *where]
    done = subprocess.run(command, cwd=plan.root, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"warning: no estimate: {why}", file=sys.stderr)
    return Expected.read(path, plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.watch",
        usage="%(prog)s [options] [-- COMMAND ...]",
        description="Starts an engine, such as `snakemake --cores all` or `dvc repro`, and shows "
        "all jobs of the plan while it runs; without a command, what another terminal runs.",
    )
    parser.add_argument("--params", help="params file (default: as the command says)")
    parser.add_argument("--results", help="folder of the results (default: as the command says)")
    parser.add_argument(
        "--cost",
        action="store_true",
        help="tell first what it will take; start nothing if every job is up to date",
    )
    parser.add_argument("--once", action="store_true", help="without a command: look once")
    return parser


if __name__ == "__main__":
    sys.exit(main())
