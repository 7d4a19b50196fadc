"""What a report may say: who won and whether to believe it, and what weakens its comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stages.reporting import results
from stages.reporting.lineage import Cost
from stages.reporting.results import Cell, Jobs, Row, Task
from stages.reporting.stats import MIN_SEEDS, Verdict
from workflow import plugins

Remark = tuple[str, str]  # title, explanation
SAME_COST = 1.25  # up to this ratio of FLOPs, teachers' included, runs cost the same


@dataclass(frozen=True)
class Headline:
    """The first two sentences; level: "good", "fair" or "none"."""

    level: str
    who: str
    trust: str


def headline(tasks: list[Task], verdicts: Mapping[str, Verdict | None]) -> Headline:
    """Who won, and whether to believe it."""
    known = {task.title: verdicts[task.id] for task in tasks if verdicts[task.id]}
    if not known:
        nobody = "No run trained without labels has a score on a task."
        return Headline("none", "Nothing to compare", nobody)
    leaders: dict[str, list[str]] = {}
    for title, verdict in known.items():
        leaders.setdefault(verdict.leader, []).append(title)
    sure = [title for title, verdict in known.items() if verdict.state == "best"]
    verb = "is best" if len(sure) == len(known) else "leads"
    who = "; ".join(f"{name} {verb} on {' and '.join(at)}" for name, at in leaders.items())
    if len(leaders) == 1 and len(known) > 1:
        every = "both" if len(known) == 2 else f"all {len(known)}"
        who = f"{next(iter(leaders))} {verb} on {every} tasks"
    if len(sure) == len(known):
        trust = "paired tests over seeds and over test images agree on every task."
        return Headline("good", who, f"Established: {trust}")
    if sure:
        return Headline("good", who, f"Established on {' and '.join(sure)}; not on the rest.")
    if all(verdict.state == "alone" for verdict in known.values()):
        alone = "It is the only run trained without labels, so nothing was compared."
        return Headline("none", f"{next(iter(leaders))} has no rival", alone)
    few = min(verdict.seeds for verdict in known.values())
    if few < MIN_SEEDS:
        seeds = "One seed" if few == 1 else f"{few} shared seeds"
        needs = f"A ranking needs at least {MIN_SEEDS}."
        return Headline("fair", who, f"{seeds}: an indication, not a result. {needs}")
    return Headline("fair", who, "Not established: no lead withstands the paired tests.")


# ------------------------------------------------------------------------------------- warnings


def warnings(
    rows: Mapping[str, Row],
    tasks: list[Task],
    cells: Mapping[tuple[str, str], Cell],
    costs: Mapping[str, Cost],
    jobs: Jobs,
) -> list[Remark]:
    """Everything that makes a comparison weaker than it looks; the gravest first."""
    racing = [row for row in rows.values() if row.kind == "ssl"]
    return [
        *_copies(jobs),
        *_seeds(racing or list(rows.values()), list(rows.values())),
        *_labels(rows),
        *_images_seen(racing, costs),
        *_different(racing, jobs),
        *_untrained(rows, racing, tasks, cells),
        *_notes(jobs),
        *readings(jobs),
        *_machines(jobs),
    ]


def _copies(jobs: Jobs) -> Iterator[Remark]:
    for name, data in jobs.data.items():
        across = {k: n for k, n in data.get("duplicates", {}).get("across", {}).items() if n}
        if any("test" in pair and "train" in pair for pair in across):
            found = ", ".join(f"{n} in {pair}" for pair, n in across.items())
            where = f" of {name}" if len(jobs.data) > 1 else ""
            yield (
                f"Test images{where} also in training",
                f"{found}. Scores are too high by up to that share; remove the copies from the "
                "source.",
            )


def _seeds(judged: list[Row], rows: list[Row]) -> Iterator[Remark]:
    fewest = min((len(row.seeds) for row in judged), default=0)
    if fewest == 1:
        yield (
            "One seed",
            "There is no interval over seeds, and another seed may reverse any order: do not rank. "
            f"Set grid.seeds to at least {MIN_SEEDS} numbers.",
        )
    elif 1 < fewest < MIN_SEEDS:
        yield "Two seeds", f"Their interval is very wide, and paired tests need {MIN_SEEDS}."
    if len({tuple(sorted(row.seeds)) for row in rows}) > 1:
        counts = ", ".join(f"{row.name} {len(row.seeds)}" for row in rows)
        yield (
            "Different seeds",
            f"Paired tests use the seeds that two runs share only. Seeds per run: {counts}.",
        )


def _labels(rows: Mapping[str, Row]) -> Iterator[Remark]:
    for row in rows.values():
        if row.kind == "taught":
            teachers = " and ".join(row.facts["label_targets"])
            yield (
                f"{row.name} learnt from labels",
                f"{teachers}, which it learnt from, was trained with labels, so it is shown for "
                "reference and not ranked with runs that saw none.",
            )


def _images_seen(racing: list[Row], costs: Mapping[str, Cost]) -> Iterator[Remark]:
    """Neither images nor cost are equal. Both can hardly be: methods differ in cost per image."""
    seen = {row.name: costs[row.name].images for row in racing}
    spent = [costs[row.name].all_flops for row in racing]
    same = None not in spent and spent and max(spent) <= SAME_COST * min(spent)
    if seen and max(seen.values()) > 1.01 * min(seen.values()) and not same:
        yield (
            "Different numbers of images seen",
            ", ".join(f"{name} {count:,.0f}" for name, count in seen.items())
            + ". A longer training may be all the difference; compare at equal cost below.",
        )


def _different(racing: list[Row], jobs: Jobs) -> Iterator[Remark]:
    """Runs that differ in more than their method."""
    data = {row.name: jobs.data_of(f"pretrain/{row.jobs[0]}") for row in racing}
    models = {row.name: ", ".join(results.encoder(row, jobs)) for row in racing}
    for what, of in (("pretraining data", data), ("encoders", models)):
        if len(set(of.values())) > 1:
            names = {value: [name for name in of if of[name] == value] for value in of.values()}
            found = "; ".join(f"{value}: {', '.join(runs)}" for value, runs in names.items())
            yield (
                f"Different {what}",
                f"{found}. A difference between such runs is not one of their methods alone.",
            )


def _untrained(
    rows: Mapping[str, Row],
    racing: list[Row],
    tasks: list[Task],
    cells: Mapping[tuple[str, str], Cell],
) -> Iterator[Remark]:
    for task in tasks:
        scores = {name: cells[name, task.id].interval for name in rows}
        floors = [scores[n].mean for n, r in rows.items() if not r.facts["trains"] and scores[n]]
        if not floors:
            continue
        floor = max(floors)
        low = [r.name for r in racing if scores[r.name] and scores[r.name].mean <= floor]
        if low:
            yield (
                f"No better than untrained on {task.title}",
                f"{', '.join(low)}: at or below the untrained encoder's {task.show(floor)} "
                f"{task.unit}. Trained too short, badly tuned, or not suited to these images.",
            )


def _notes(jobs: Jobs) -> Iterator[Remark]:
    """What the stage noted of targets without failing them."""
    for id, folder in jobs.folders.items():
        if id.startswith("target/"):
            for note in results.read(folder / "health.json").get("notes", []):
                yield f"The target {id.removeprefix('target/')}", note


def readings(jobs: Jobs) -> Iterator[Remark]:
    """Methods and targets without official code, by the first line of their files."""
    shown = {"pretrain": "method", "target": "target"}
    made = [(shown.get(id.split("/")[0]), m.params) for id, m in jobs.manifests.items()]
    for what, kind in sorted({(what, params[what]["kind"]) for what, params in made if what}):
        plugin = plugins.declared(what, kind)
        if "our reading" in plugin.doc.partition("\n")[0]:
            yield (
                f"{kind} is our reading",
                "It has no official code to be checked against, so its scores judge this reading "
                f"of the paper. What is known and what is ours stands in {plugin.path}.",
            )


def _machines(jobs: Jobs) -> Iterator[Remark]:
    trained = [m for id, m in jobs.manifests.items() if id.startswith("pretrain/")]
    places = sorted({f"{m.device}, {m.threads} threads" for m in trained})
    if len(places) > 1:
        yield (
            "Seconds are from different machines",
            f"{'; '.join(places)}: compare images and FLOPs rather than seconds.",
        )


# ---------------------------------------------------------------------------------------- notes


def notes(
    rows: Mapping[str, Row], tasks: list[Task], costs: Mapping[str, Cost], jobs: Jobs
) -> list[Remark]:
    """What a reader should know although it takes nothing from the numbers."""
    return [
        *_about_data(jobs),
        *_elsewhere(rows, tasks, jobs),
        *_targets(costs),
        *_teachers(costs),
        *_broken(jobs),
        *_uncommitted(jobs),
    ]


def _about_data(jobs: Jobs) -> Iterator[Remark]:
    for name, data in jobs.data.items():
        about = f"About the data set {name}" if len(jobs.data) > 1 else "About the data"
        yield from ((about, text) for text in data.get("warnings", []))


def _elsewhere(rows: Mapping[str, Row], tasks: list[Task], jobs: Jobs) -> Iterator[Remark]:
    trained_on = {jobs.data_of(f"pretrain/{job}") for row in rows.values() for job in row.jobs}
    for task in tasks:
        others = sorted(trained_on - {task.data})
        if others:
            yield (
                f"{task.title} tests on other images",
                f"It is about {task.data}; encoders were pretrained on {', '.join(others)}. "
                "Whether these data sets share images was not checked.",
            )


def _targets(costs: Mapping[str, Cost]) -> Iterator[Remark]:
    if names := [name for name, cost in costs.items() if cost.target_images]:
        yield (
            "Targets cost extra",
            f"{', '.join(names)} needed a trained target; the cost table lists its share apart.",
        )


def _teachers(costs: Mapping[str, Cost]) -> Iterator[Remark]:
    def trained(name: str) -> bool:
        return name in costs and bool(costs[name].own_images)

    if names := [n for n, cost in costs.items() if any(map(trained, cost.before))]:
        yield (
            "Teachers count",
            f"{', '.join(names)}: images seen, epochs, time and FLOPs include those of the runs "
            "whose encoders taught them, one after the other.",
        )


def _broken(jobs: Jobs) -> Iterator[Remark]:
    for name, data in jobs.data.items():
        quarantine = data.get("quarantine") or {}
        if quarantine.get("count"):
            reasons = ", ".join(f"{n} {why}" for why, n in quarantine.get("reasons", {}).items())
            where = f" of {name}" if len(jobs.data) > 1 else ""
            yield (
                f"Broken images{where} were left out",
                f"{quarantine['count']} ({reasons}); quarantine.jsonl names them.",
            )


def _uncommitted(jobs: Jobs) -> Iterator[Remark]:
    if any((manifest.git or {}).get("dirty") for manifest in jobs.manifests.values()):
        yield (
            "Uncommitted code",
            "Some results were made with changes that no commit holds; their fingerprints still "
            "tell them apart.",
        )
