"""The rows of MLflow's table above those of the jobs, and what belongs to several of them.

A pretraining's row shows the headline of its tasks (`score/<task>`) and what it cost (`cost/...`).
Both are worked out from what MLflow holds of the jobs below it, whenever one of them arrives. So a
row that was deleted, or that two machines made at once, is made right by the next delivery.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from stages.kit.job import links
from stages.kit.job.told import SHARED

ABOUT = (
    "Each row is a pretraining, a run of params.yaml with one seed: `score/...` is the headline of "
    "a task, `cost/...` what the pretraining took, with its teachers. The rows below it are its "
    "jobs. Data sets, targets and reports, which several runs share, stand in the row "
    f"*{SHARED['name']}*."
)
# The kind decides with what MLflow's page opens: with training runs, and not with traces.
EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": ABOUT,
}
CONTEXTS = {"target": "training", "pretrain": "training", "transfer": "evaluation"}
MOST = 1000  # runs in one answer
UNTOUCHED = {"isReordered": False, "deleted": False, "isGenerated": False}  # of a chart


def row(client, experiment: str, group: dict, start: int):
    """The row of a group of jobs: the oldest one, made if there is none; it gets all their runs."""
    where = f"tags.group = '{group['group']}'"

    def found() -> list:
        runs = client.search_runs([experiment], f"{where} AND tags.stage = '{group['stage']}'")
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    rows = found()
    if len(rows) != 1:
        if not rows:
            tags = {**group.get("tags", {}), "group": group["group"], "stage": group["stage"]}
            tags["mlflow.note.content"] = _about_group(experiment, group)
            client.create_run(experiment, start, tags, run_name=group["name"])
            rows = found()  # another machine may have made one, too
        for job in _jobs(client, experiment, where):
            if job.data.tags.get("mlflow.parentRunId") != rows[0].info.run_id:
                client.set_tag(job.info.run_id, "mlflow.parentRunId", rows[0].info.run_id)
        for other in rows[1:]:
            client.delete_run(other.info.run_id)
    return rows[0]


def _jobs(client, experiment: str, where: str) -> list:
    """The newest runs of jobs of a group, oldest first."""
    newest = ["attributes.start_time DESC"]
    found = client.search_runs([experiment], where, max_results=MOST, order_by=newest)
    return [run for run in reversed(found) if "entry" in run.data.tags]


def sum_up(client, experiment: str, row, group: dict) -> None:
    """Brings a row up to date with the jobs below it: parameters, scores, cost, state, end."""
    from mlflow.entities import Metric, Param

    jobs = _jobs(client, experiment, f"tags.group = '{group['group']}'")
    last = {job.data.tags["job"]: job for job in jobs}
    numbers: dict[str, float] = {}
    for job in jobs:
        if job.info.status == "FINISHED" and group["stage"] == "run":
            numbers |= {
                key: value
                for key, value in job.data.metrics.items()
                if key.startswith(("score/", "cost/"))
            }
    params = group.get("params", {}).items()
    params = [Param(key, text[:5000]) for key, text in params if key not in row.data.params]
    at = max((job.info.end_time or 0 for job in jobs), default=0) or row.info.start_time
    changed = {key: x for key, x in numbers.items() if row.data.metrics.get(key) != x}
    metrics = [Metric(key, value, at, 0) for key, value in changed.items()]
    for some in (params[n : n + 100] for n in range(0, len(params), 100)):
        client.log_batch(row.info.run_id, params=some)
    if metrics:
        client.log_batch(row.info.run_id, metrics=metrics)
        _show(client, experiment, changed)
    states = {job.info.status for job in last.values()}
    state = next((s for s in ("RUNNING", "FAILED", "KILLED") if s in states), "FINISHED")
    if state == "RUNNING" != row.info.status:
        client.update_run(row.info.run_id, state)
    elif state != "RUNNING" and (row.info.status, row.info.end_time) != (state, at):
        client.set_terminated(row.info.run_id, state, at)


def _show(client, experiment: str, scores: Iterable[str]) -> None:
    """Adds scores to the saved view of the rows: columns, and charts of score against cost.

    MLflow's page shows no column of numbers else. What a person has changed in the view stays.
    """
    key = f"mlflow.sharedViewState.{links.VIEW}"
    tags = client.get_experiment(experiment).tags
    try:
        view = json.loads(tags[key])
        state = json.loads(view["state"])
        known, drawn = state["selectedColumns"], state.get("compareRunCharts", [])
    except (KeyError, ValueError, TypeError):
        view, state, known, drawn = {"name": "Methods: scores and cost", "createdAt": 0}, {}, [], []
        known += [f"metrics.`cost/{name}`" for name in ("images_seen", "seconds_in_all")]
        known += [f"params.`{name}`" for name in ("method", "target", "seed", "labels")]
        section = {
            "uuid": "mimlab",
            "name": "at a glance: score by cost",
            "display": True,
            "deleted": False,
        }
        state |= {"searchFilter": "tags.stage = 'run'", "runsHiddenMode": "SHOW_ALL"}
        state |= {"compareRunSections": [section | UNTOUCHED]}
    new = [name for name in scores if name.startswith("score/")]
    if new := [name for name in new if f"metrics.`{name}`" not in known]:
        state["selectedColumns"] = [f"metrics.`{name}`" for name in new] + known
        state["compareRunCharts"] = drawn + [_chart(name) for name in new]
        view["state"] = json.dumps(state)
        client.set_experiment_tag(experiment, key, json.dumps(view))


def _chart(score: str) -> dict:
    """A score against the seconds that it took, as a saved view holds a chart."""
    across = {"key": "cost/seconds_in_all", "type": "METRIC"}
    chart = {"type": "SCATTER", "xaxis": across, "yaxis": {"key": score, "type": "METRIC"}}
    chart |= {"uuid": f"mimlab-{score}", "metricSectionId": "mimlab", "runsCountToCompare": 100}
    return chart | UNTOUCHED


def log_data(client, runs: list[str], note: dict) -> None:
    """Says in some runs on which data set the job of a note works."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = note.get("data")
    if not data:
        return
    source = str(data["source"]).encode(errors="replace").decode()
    about = json.dumps(data.get("about", {}))
    found = Dataset(
        source[:500], data["hash"][:36], "local", json.dumps({"uri": source}), profile=about
    )
    use = InputTag("mlflow.data.context", CONTEXTS.get(note["tags"]["stage"], "report"))
    for run in runs:
        client.log_inputs(run, [DatasetInput(found, [use])])


# ------------------------------------------------------------------------------------ descriptions


def about_job(experiment: str, note: dict) -> str:
    """The description of a job's run."""
    text = [f"Fingerprint `{note['tags']['fingerprint']}`."]
    if made_from := note.get("made_from"):
        text.append(f"Made from {_links(experiment, made_from)}.")
    return "\n\n".join(text)


def _about_group(experiment: str, group: dict) -> str:
    if group["stage"] != "run":
        return "What several runs are made from, and what is made from them all."
    shown, name = group.get("params", {}), group["name"]
    facts = {key: shown.get(key, "?") for key in ("method", "target", "data", "labels")}
    jobs = f"#/experiments/{experiment}/" + links.search(f"tags.group = '{group['group']}'")
    return "\n\n".join(
        [
            "Method **{method}**, target {target}, pretrained on {data}, labels: {labels}.".format(
                **facts
            ),
            f"Made from {_links(experiment, group.get('made_from', []))}.",
            f"[Its jobs]({jobs}): `pretrain/{name}`, which has the encoder, and its tasks.",
        ]
    )


def _links(experiment: str, made_from: list) -> str:
    page = f"#/experiments/{experiment}"
    return ", ".join(f"[{id}]({page}/{links.job(print)})" for id, print in made_from)
