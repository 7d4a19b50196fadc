"""The graphs of rules and of jobs, as Snakemake gives them, for docs/graphs.md.

    python -m workflow.graphs            write that page
    python -m workflow.graphs --check    fail if it is not up to date

Mermaid text, which GitHub and most editors draw; no Graphviz is needed. Snakemake numbers its nodes
as it finds them, so they are numbered anew here; an arrow that follows from others is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from workflow.files import write_changed
from workflow.plan import load

PAGE = Path("docs/graphs.md")
TEXT = """# Two graphs

Snakemake's own, of the demo, written by `python -m workflow.graphs`. An arrow that follows from
others is left out.

Its rules; the circle at `target` says that a target may be made from another one:

```mermaid
{rules}
```

Its jobs with the first seed; the other seeds have the same:

```mermaid
{jobs}
```
"""
NODE = re.compile(r'^\s*(id\d+)\["?(.*?)"?\]$', re.M)
EDGE = re.compile(r"^\s*(id\d+) --> (id\d+)$", re.M)


def page() -> str:
    """The text of docs/graphs.md."""
    plan = load()
    seed = min(seed for run in plan.runs.values() for seed in run.seeds)
    tasks = [job for job in plan.jobs.values() if job.stage == "transfer"]
    ends = [str(job.manifest) for job in tasks if job.params["seed"] == seed]
    report = str(plan.jobs["report"].manifest)
    return TEXT.format(rules=drawn("--rulegraph", report), jobs=drawn("--dag", *ends))


def drawn(option: str, *files: str) -> str:
    """A graph of what makes these files."""
    command = [sys.executable, "-m", "snakemake", option, "mermaid-js", "--forceall", *files]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TERM": "dumb"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return mermaid(dict(NODE.findall(done.stdout)), set(EDGE.findall(done.stdout)))


def mermaid(labels: dict[str, str], edges: set[tuple[str, str]]) -> str:
    """The graph in an order of its own, without arrows that follow from others."""
    loops = {edge for edge in edges if edge[0] == edge[1]}
    above = {id: {a for a, b in edges - loops if b == id} for id in labels}

    @cache
    def before(id: str) -> frozenset[str]:
        return frozenset(above[id]).union(*map(before, above[id]))

    @cache
    def place(id: str) -> tuple:
        return len(before(id)), labels[id], tuple(sorted(map(place, above[id])))

    number = {id: f"n{n}" for n, id in enumerate(sorted(labels, key=place))}
    needed = {(a, b) for a, b in edges - loops if not any(a in before(c) for c in above[b])} | loops
    names = {id: re.sub(r" - (\w+): ", " ", label) for id, label in labels.items()}
    lines = [f'    {number[id]}["{names[id]}"]' for id in number]
    arrows = sorted((int(number[a][1:]), int(number[b][1:])) for a, b in needed)
    return "\n".join(["flowchart LR", *lines, *(f"    n{a} --> n{b}" for a, b in arrows)])


def main() -> int:
    """Runs the command; returns the exit status."""
    text = page()
    if "--check" not in sys.argv:
        write_changed(PAGE, text)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not up to date: run `python -m workflow.graphs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
