"""The state of a board in words: what was done, what runs, why something failed, how it ended."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from workflow.durations import duration
from workflow.plan import Plan
from workflow.watch.board import Board

LINES = 12  # of a failure's reason, at most


def changed(board: Board, id: str, state: str) -> str:
    """One line for a job whose state is new."""
    seen = board.jobs[id]
    if state == "done":
        return f"done     {seen.manifest.line}"
    why = ""
    if state == "failed":
        why = f": {reason(board, id)[0]}"
    return f"{ {'running': 'start'}.get(state, state):<8} {id}{why}"


def overall(board: Board) -> str:
    """How far all jobs are together, in a line."""
    counts, total = board.counts(), len(board.jobs)
    facts = [f"{counts['done']} of {total} jobs done"]
    facts += [f"{counts[state]} {state}" for state in ("failed", "stopped") if counts[state]]
    if counts["done"] < total:
        facts.append(f"{min(0.99, board.share()):.0%}")
        if (left := board.left_in_all()) and not counts["failed"]:
            facts.append(f"about {duration(left)} left")
    return ", ".join(facts)


def running(board: Board, id: str) -> str:
    """How far a running job is: step, rate, time left."""
    seen, facts = board.jobs[id], []
    record = seen.record
    if record.get("steps"):
        facts.append(f"step {record['step']}/{record['steps']}")
        facts.append(f"{record['images_per_s']:.4g} images/s")
        if record.get("loss") is not None:
            facts.append(f"loss {record['loss']:.4g}")
    left = board.left(id)
    if record.get("step") == record.get("steps") and record.get("steps"):
        facts.append("training is done")
    elif left is not None:
        facts.append(f"{duration(left)} left")
    return ", ".join([*facts, f"{duration(max(0.0, time.time() - seen.began))} so far"])


def waiting(board: Board) -> str:
    """How many jobs wait, by stage."""
    stages = Counter(board.plan.jobs[id].stage for id in board.of("waiting"))
    return ", ".join(f"{count} {stage}" for stage, count in stages.items())


def heartbeat(board: Board) -> str:
    """All of it in a line, for a log."""
    jobs = [f"{id} ({running(board, id)})" for id in board.of("running")]
    return "; ".join([overall(board), *([f"running: {', '.join(jobs)}"] if jobs else [])])


def expected(board: Board) -> list[str]:
    """What the jobs that are not done will take, by stage and in all."""
    todo = [id for id in board.jobs if id not in board.before]
    about = board.expected
    unknown = [id for id in todo if about.seconds(id) is None]
    lines = [f"{len(todo)} of {len(board.jobs)} jobs are to be run; expected:"]
    for stage in dict.fromkeys(board.plan.jobs[id].stage for id in todo):
        ids = [id for id in todo if board.plan.jobs[id].stage == stage]
        count = f"{len(ids)} job{'s' if len(ids) > 1 else ''}"
        lines.append(f"  {stage:<9} {count:>8}  {_cost(board, ids)}")
    together = board.left_in_all()
    if together is not None:
        lines.append(f"  {'in all':<9} {'':>8}  {_cost(board, todo)} one after the other,")
        lines.append(f"  {'':<9} {'':>8}  about {duration(together)} with {_at_once(board.slots)}")
    if unknown:
        lines.append(f"  not known: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
    return lines


def _cost(board: Board, ids: list[str]) -> str:
    flops = sum(board.expected.flops(id) for id in ids)
    seconds = sum(board.expected.seconds(id) or 0.0 for id in ids)
    shown = f"{flops / 1e12:.3g} TFLOP" if flops else ""
    return f"{shown:>12}  {duration(seconds):>12}"


def _at_once(slots: int) -> str:
    return f"{slots} jobs at a time" if slots > 1 else "one job at a time"


def log(plan: Plan, id: str) -> Path:
    """Where Snakemake puts what a job says on stderr; of an engine's name, what that says."""
    return plan.results.parent / "logs" / f"{id}.log"


def reason(board: Board, id: str) -> list[str]:
    """Why a job failed: what it noted itself, else the last lines of its log."""
    record = board.jobs[id].record
    if record.get("error"):
        return [line for line in str(record["error"]).splitlines() if line.strip()][:LINES]
    # DVC keeps no log of a job: it runs one at a time, so that its own log ends with that one
    logs = (log(board.plan, id), log(board.plan, "dvc"))
    said = next(filter(None, (tail(path, board.since) for path in logs)), [])
    if record.get("state") == "running":
        return ["its process is gone and left no reason (killed, or out of memory?)", *said[-3:]]
    return said or ["it left no reason"]


def tail(path: Path, since: float = 0.0) -> list[str]:
    """The end of a log that was written after `since`: from its last error on, if it has one."""
    try:
        if path.stat().st_mtime < since:
            return []
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    starts = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    return lines[max(starts[-1] if starts else 0, len(lines) - LINES) :]


def failures(board: Board) -> list[str]:
    """What failed and why, with the place of its log."""
    failed, lines = dict.fromkeys(board.of("failed")), []
    for id in board.of("waiting"):  # it ended before it could note anything
        if board.since and any(
            s.startswith("error: ") for s in tail(log(board.plan, id), board.since)
        ):
            failed[id] = None
    for id in failed:
        lines += ["", f"FAILED {id}", *(f"  {line}" for line in reason(board, id))]
        if (path := log(board.plan, id)).is_file():
            lines.append(f"  its log: {path}")
    if failed and (rest := board.counts()["waiting"] - len(set(failed) & set(board.of("waiting")))):
        lines.append(f"{rest} more job(s) were not run.")
    return lines


def headline(board: Board) -> list[str]:
    """The sentence of the report, and where it is; nothing before it is made."""
    seen = board.jobs.get("report")
    if seen is None or seen.state != "done":
        return []
    sentence = seen.manifest.summary.get("headline")
    page = board.plan.jobs["report"].output / "index.html"
    return [*([str(sentence)] if sentence else []), f"The report: {page}"]
