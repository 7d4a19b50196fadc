"""The report on fabricated results: numbers, verdicts, warnings, determinism, and the page in a
real browser.
"""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from stages import report
from stages.reporting import charts, claims, colours, formats, page, pictures, results, stats
from tests import browser
from tests.fabricated import FLOPS, IMAGES_SEEN, RUNS, TOP1, fabricate, facts, put
from workflow.manifest import Manifest

PERCENT = results.Task("knn", "knn", "knn", "main", **TOP1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    run = fabricate(tmp_path_factory.mktemp("lab"))
    report.write(run)
    return run


def page_of(run) -> str:
    return (run.out / "index.html").read_text()


def rows_of(run) -> list[dict]:
    return list(csv.DictReader((run.out / "summary.csv").open()))


def gathered(run) -> dict:
    """What the page is made of."""
    return page.gather(run.job.params, {id: run.input(id) for id in run.job.inputs})


def metric(run, job, task, key="top1") -> float:
    return json.loads((run.results / "transfer" / job / task / "metrics.json").read_text())[key]


def edit(run, id: str, **changes) -> None:
    """Changes a manifest; a dict is merged into what is there."""
    path = run.results / id / "manifest.json"
    manifest = Manifest.read(path)
    merged = {k: getattr(manifest, k) | v if isinstance(v, dict) else v for k, v in changes.items()}
    path.write_text(replace(manifest, **merged).text())


def test_numbers_are_the_jobs(lab):
    """Every line of the CSV, recomputed from the jobs' own files; the page shows the same number
    with its interval.
    """
    rows = rows_of(lab)
    assert len(rows) == len(RUNS) * 3
    shown = page_of(lab)
    for row in rows:
        values = [metric(lab, f"{row['run']}-s{s}", row["task"]) for s in (0, 1, 2)]
        want = stats.t_interval(values)
        assert [float(v) for v in row["scores"].split()] == values
        assert (float(row["mean"]), float(row["low"]), float(row["high"])) == pytest.approx(
            (want.mean, want.low, want.high)
        )
        assert f"{want.mean * 100:.1f} <small>± {want.half * 100:.1f}</small>" in shown
        assert (row["metric"], row["data"], row["pretrained_on"]) == ("top1", "main", "main")
        assert row["encoder"] == "vit: 192 × 12, patch 4"


def test_bold_only_where_the_tests_say_so(lab):
    states = {(r["run"], r["task"]): r["verdict"] for r in rows_of(lab)}
    assert {states["beitv2", t] for t in ("knn", "linear", "finetune")} == {"best"}
    assert states["supervised", "linear"] == "reference"  # higher, but it saw the labels
    bold = re.findall(r"<strong>([\d.]+)", page_of(lab))
    assert len(bold) == 3 and "beitv2 is best on all 3 tasks" in page_of(lab)
    summary = (lab.out / "summary.md").read_text()
    assert summary.count("| **") == 3 and "| beitv2 | **" in summary


def test_the_sentence_at_the_top_ends_the_summary_and_is_kept_for_others(lab):
    said = gathered(lab)["sentence"]
    shown = re.search('<p class="who">(.*)</p>', page_of(lab))[1]
    assert html.unescape(re.sub("<[^>]*>", "", shown)) == said.text
    assert (lab.out / "summary.md").read_text().endswith(f"In short: {said.text} {said.more}\n")
    assert lab.summary["headline"] == said.text
    line = Manifest(job="report", summary=lab.summary).line
    assert line.startswith("report: runs=5 tasks=3 warnings=") and "headline" not in line


def test_each_card_tells_what_pretraining_gave(lab):
    """Also where the best runs are not told apart from each other."""
    gains = gathered(lab)["sentence"].gains
    shown = re.findall(r'<p class="gain (\w+)">(?:[✓✗] )?([^<]*)<', page_of(lab))
    assert [(g.state, g.brief) for g in gains.values()] == [(s, html.unescape(t)) for s, t in shown]
    assert list(gains) == ["knn", "linear", "finetune"]
    assert {gain.state for gain in gains.values()} == {"up"}


def test_costs_include_targets(lab):
    row = next(r for r in rows_of(lab) if r["run"] == "beitv2")
    # the tokenizer and its teacher
    assert (float(row["seconds"]), float(row["target_seconds"])) == (140, 190)
    assert float(row["flops"]) == pytest.approx(2.5e8 * 80000 + 2 * 3e8 * 48000)
    assert float(row["effective_epochs"]) == pytest.approx(80000 / 60)
    assert next(r for r in rows_of(lab) if r["run"] == "mae")["target_seconds"] == "0"


def test_the_cost_chart_counts_targets(lab):
    """Its x axis is all that was needed: 140 s of the run and 190 s of its targets."""
    rows = {row["run"]: row for row in rows_of(lab)}
    assert float(rows["beitv2"]["all_seconds"]) == 140 + 190
    assert float(rows["mae"]["all_seconds"]) == 140
    svg = gathered(lab)["charts"]["cost-knn"]
    text = re.findall(r'<(?:circle|rect|path) (?:cx|x|d)="M?([\d.]+)[^>]*><title>([\w-]+):', svg)
    place = {name: float(x) for x, name in text}  # left edges or centres: a few units apart
    unit = (place["mae"] - place["random"]) / math.log(10)  # the untrained stands at a tenth
    expected = place["mae"] + unit * math.log(330 / 140)
    assert place["beitv2"] == pytest.approx(expected, abs=12)
    assert place["beitv2"] - place["mae"] > 25


def test_declared_contrasts_are_shown_with_both_intervals(tmp_path):
    declared = {
        "tokens against pixels": {"of": ["beitv2"], "against": ["mae"]},
        "nothing": {"of": ["mae", "beitv2"], "against": ["beitv2", "mae"]},
    }
    run = fabricate(tmp_path, tasks=("knn",), contrasts=declared)
    report.write(run)
    page, summary = page_of(run), (run.out / "summary.md").read_text()
    differences = [
        metric(run, f"beitv2-s{s}", "knn") - metric(run, f"mae-s{s}", "knn") for s in (0, 1, 2)
    ]
    want = stats.t_interval(differences)
    shown = [PERCENT.change(x) for x in (want.mean, want.low, want.high)]
    assert (
        f"<strong>{shown[0]}</strong>" in page
        and f"seeds {shown[1]} to {shown[2]}" in page
        and "images +" in page
    )
    assert (
        f"| tokens against pixels | {shown[0]}, seeds {shown[1]} to {shown[2]}, images +" in summary
    )
    assert (
        "beitv2 \N{MINUS SIGN} mae" in page
        and "| nothing | +0.0, " in summary
        and "<strong>+0.0" not in page
    )


def test_without_contrasts_there_is_no_such_table(lab):
    assert (
        "Contrasts" not in page_of(lab) and "contrast" not in (lab.out / "summary.md").read_text()
    )


def student(teacher: str | None, stage: int, target: str | None = None, seen=()) -> dict:
    """The facts of a stage of a chain."""
    return facts("dbot", target, teacher=teacher, stage=stage, label_targets=list(seen))


CHAINS = {
    "random": RUNS["random"],
    "mae": RUNS["mae"],
    "supervised": RUNS["supervised"],
    "dbot-1": (student("random", 1), 0.5),
    "dbot-2": (student("dbot-1", 2), 0.7),
    "other-1": (student("mae", 1), 0.66),
    "other-2": (student("other-1", 2), 0.71),
    "deit-1": (student("supervised", 1, seen=["supervised"]), 0.8),
    "coded-1": (student(None, 1, "vqkd"), 0.6),
    "coded-2": (student("coded-1", 2), 0.6),
    "alone": (student("random", 1), 0.6),
}


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    run = fabricate(tmp_path_factory.mktemp("chains"), CHAINS, tasks=("knn", "linear"))
    report.write(run)
    return run


def test_a_stage_costs_what_all_before_it_cost(chains):
    rows = {r["run"]: r for r in rows_of(chains) if r["task"] == "knn"}
    for name, images, seconds in (
        ("mae", 1, 140),
        ("dbot-1", 1, 140 + 3),
        ("dbot-2", 2, 2 * 140 + 3),
        ("other-2", 3, 3 * 140),
        ("alone", 1, 143),
        ("random", 0, 3),
    ):
        row = rows[name]
        assert float(row["images_seen"]) == images * IMAGES_SEEN, name
        assert float(row["effective_epochs"]) == pytest.approx(images * IMAGES_SEEN / 60), name
        assert float(row["seconds"]) == seconds, name
        assert float(row["flops"] or 0) == images * IMAGES_SEEN * FLOPS, name
    assert float(rows["dbot-2"]["own_images_seen"]) == 80000
    assert float(rows["dbot-2"]["own_seconds"]) == 140
    assert float(rows["coded-2"]["target_seconds"]) == 190, "the targets of the stages before"
    assert (rows["dbot-2"]["teacher"], rows["dbot-2"]["stage"], rows["dbot-1"]["target"]) == (
        "dbot-1",
        "2",
        "",
    )
    warnings = warnings_of(chains)
    assert (
        "dbot-2 160,000, other-1 160,000, other-2 240,000"
        in warnings["Different numbers of images seen"]
    )
    assert "dbot-2, other-1, other-2" in warnings["Teachers count"]
    assert "dbot-1" not in warnings["Teachers count"]
    page = page_of(chains)
    assert '160k<span class="sub">80k its own</span>' in page
    assert "teacher dbot-1" in page


def test_a_student_of_labels_is_not_ranked(chains):
    assert {r["verdict"] for r in rows_of(chains) if r["run"] == "deit-1"} == {"reference"}
    said = warnings_of(chains)["deit-1 learnt from labels"]
    assert said.startswith("supervised, which it learnt from, was trained with labels")


def test_quality_by_stage(chains):
    """One line a chain with its first teacher as stage 0, and the spread over chains, recomputed
    from the jobs.
    """
    shown = gathered(chains)
    found = shown["stages"]["linear"]
    lines = {chain.name: chain.runs for chain, _ in found.chains}
    assert lines == {
        "dbot": {0: "random", 1: "dbot-1", 2: "dbot-2"},
        "other": {0: "mae", 1: "other-1", 2: "other-2"},
        "coded": {1: "coded-1", 2: "coded-2"},
    }  # one stage is no chain
    assert [chain.first for chain, _ in found.chains] == ["random", "mae", "vqkd"]

    def of(run):
        return np.mean([metric(chains, f"{run}-s{s}", "linear") for s in (0, 1, 2)])

    for stage, runs in (
        (0, ("random", "mae")),
        (1, ("dbot-1", "other-1", "coded-1")),
        (2, ("dbot-2", "other-2", "coded-2")),
    ):
        assert found.spread[stage] == pytest.approx(np.std([of(r) for r in runs], ddof=1))
        for run in runs:
            assert f"<td>{of(run) * 100:.1f}</td>" in page_of(chains).split("Quality by stage")[1]
    svg = shown["charts"]["stages-linear"]
    marks = re.findall(r"<title>(random|dbot-1|dbot-2): ([\d.]+) %", svg)
    assert marks == [(run, f"{of(run) * 100:.1f}") for run in ("random", "dbot-1", "dbot-2")]
    axis = re.findall(r'y="198.0" text-anchor="middle">([^<]+)<', svg)
    assert axis == ["0", "1", "2"], "stages are whole numbers"
    ElementTree.fromstring(svg)


def test_without_chains_there_is_no_stage_curve(lab):
    assert "Quality by stage" not in page_of(lab)
    assert not list((lab.out / "figures").glob("stages-*"))


def test_each_number_leads_to_its_job(lab):
    page = page_of(lab)
    every = re.findall(r' id="([^"]+)"', page)
    ids = set(every)
    assert len(ids) == len(every)
    links = re.findall(r'href="#([^"]+)"', page)
    assert links and set(links) <= ids
    for id in lab.job.inputs:
        fingerprint = json.loads((lab.results / id / "manifest.json").read_text())["fingerprint"]
        assert (
            "job-" + id.replace("/", "-") in ids and f"tags.fingerprint = '{fingerprint}'" in page
        )


def test_with_a_server_each_number_leads_to_its_run_in_mlflow(lab, tmp_path, monkeypatch):
    server = "http://127.0.0.1:5000/#/experiments/1"
    monkeypatch.setattr(report.track, "page", lambda run: server)
    run = fabricate(tmp_path)
    report.write(run)
    with_links, plain = page_of(run), page_of(lab)
    for id in run.job.inputs:
        fingerprint = json.loads((run.results / id / "manifest.json").read_text())["fingerprint"]
        where = f"searchFilter=tags.fingerprint%20%3D%20%27{fingerprint}%27"
        assert where in with_links and where not in plain
    assert "tags.run%20%3D%20%27beitv2%27%20AND%20tags.task%20%3D%20%27knn%27" in with_links
    found = re.findall(r'href="(http[^"]*)"', with_links)
    assert found and all(html.unescape(link).startswith(f"{server}/runs?") for link in found)
    without = re.sub(r'(<a class="out".*?</a>|<a href="http.*?</a>, )', "", with_links)
    assert without == plain, "nothing else depends on the server"


def test_a_page_for_each_run(lab):
    page = page_of(lab)
    for name in RUNS:
        part = page.split(f'<section class="run" id="run-{name}">')[1].split("</section>")[0]
        for seed in (0, 1, 2):
            shown = PERCENT.show(metric(lab, f"{name}-s{seed}", "knn"))
            assert f'<a href="#job-transfer-{name}-s{seed}-knn">{shown}</a>' in part
        assert 'href="#job-data-main"' in part
        assert ("job-target-vqkd" in part) == name.startswith("beitv2")
        assert f'<a href="#run-{name}">{name}</a>' in page.split('id="results"')[1]
        assert f'[id="run-{name}"]:target' in page


def test_every_cell_of_a_table_that_sorts_has_a_number_or_nothing(lab):
    tables = re.findall(r'<table class="sorts">(.*?)</table>', page_of(lab), re.S)
    assert len(tables) == 2 + len(RUNS)
    values = re.findall(r'<td data-value="([^"]*)"', "".join(tables))
    assert values and all(value == "" or float(value) >= 0 for value in values)


def test_the_page_is_alone_and_safe(lab):
    page = page_of(lab)
    assert (
        not re.search(r"""(src|href)=["'](?!data:|#)""", page)
        and "@import" not in page
        and "url(" not in page
    )
    script = (report.TEMPLATES / "sort.js").read_text().rstrip()
    assert page.count("<script") == 1 and f"<script>{script}</script>" in page
    assert not re.search("fetch|http|import|eval", script) and "&lt;script&gt;alert(1)" in page
    # trained runs (first seed), targets, samples of the data
    assert page.count("data:image/webp;base64,") == 4 + 2 + 1


def test_same_inputs_same_bytes(lab, tmp_path):
    again = fabricate(tmp_path)
    report.write(again)
    first = {p.relative_to(lab.out): p.read_bytes() for p in lab.out.rglob("*") if p.is_file()}
    assert first == {
        p.relative_to(again.out): p.read_bytes() for p in again.out.rglob("*") if p.is_file()
    }
    assert {"index.html", "summary.md", "summary.csv"} < {str(p) for p in first} and len(first) > 8


def warnings_of(run) -> dict[str, str]:
    found = gathered(run)
    return dict(found["warnings"] + found["notes"])


def test_one_seed_is_not_ranked(tmp_path):
    run = fabricate(tmp_path, seeds=(0,), across=7)
    report.write(run)
    warnings = warnings_of(run)
    assert "do not rank" in warnings["One seed"]
    assert "7 in train-test" in warnings["Test images also in training"]
    page = page_of(run)
    assert "One seed: an indication, not a result." in page
    assert "<strong>" not in page and "±" not in page.split("<nav")[0]
    assert (
        "**" not in (run.out / "summary.md").read_text().split("Read before")[0].split("\n\n", 2)[2]
    )
    assert all(r["low"] == "" for r in rows_of(run))


@pytest.mark.parametrize("factor, told", [(1.2, False), (1.3, True), (None, True)])
def test_more_images_are_no_unfair_advantage_at_equal_cost(tmp_path, factor, told):
    """Of runs that see twice the images, at FLOPs that make both cost the same, or nearly so."""
    runs = {"long": (facts("mae"), 0.5), "short": (facts("mae"), 0.5)}
    run = fabricate(tmp_path, runs, tasks=("knn",))
    for seed in (0, 1, 2):
        flops = FLOPS / 2 * factor if factor else None
        summary = {"images_seen": 2 * IMAGES_SEEN, "flops_per_image": flops}
        edit(run, f"pretrain/long-s{seed}", summary=summary)
    assert ("Different numbers of images seen" in warnings_of(run)) == told


def test_unfair_comparisons_are_named(tmp_path):
    runs = dict(RUNS)
    runs["taught"] = (facts("beitv2", "clip", label_targets=["clip"]), 0.9)
    runs["weak"] = (facts("mae"), 0.3)
    seeds = {n: (0, 1, 2) if n != "weak" else (0, 1) for n in runs}
    run = fabricate(tmp_path, runs, seeds, tasks=("knn",))
    for job in ("mae-s0", "mae-s1", "mae-s2"):
        more = {"summary": {"images_seen": 160000}, "git": {"dirty": True}, "device": "cuda:0"}
        edit(run, f"pretrain/{job}", **more)
    warnings = warnings_of(run)
    assert not {"Different encoders", "Different pretraining data"} & set(warnings)
    assert "clip" in warnings["taught learnt from labels"]
    assert "weak 2" in warnings["Different seeds"] and "Two seeds" in warnings
    assert "mae 160,000" in warnings["Different numbers of images seen"]
    weak = warnings["No better than untrained on knn"]
    assert "weak" in weak and "beitv2" not in weak
    assert (
        "Uncommitted code" in warnings
        and "cuda:0" in warnings["Seconds are from different machines"]
    )
    report.write(run)
    assert {r["verdict"] for r in rows_of(run) if r["run"] == "taught"} == {"reference"}


def test_missing_pieces(tmp_path):
    """No targets, no pictures, no labels, no task, and a method without history: still a page."""
    runs = {name: RUNS[name] for name in ("mae", "random")}
    run = fabricate(tmp_path, runs, seeds=(0,), tasks=(), pictures=False, labelled=False)
    report.write(run)
    page = page_of(run)
    assert (
        "Nothing to compare" in page and 'id="results"' not in page and 'id="pictures"' not in page
    )
    assert len(rows_of(run)) == 0 and run.summary["tasks"] == 0
    (run.results / "transfer").mkdir(exist_ok=True)
    assert "no labels" in page


def test_only_references(tmp_path):
    run = fabricate(tmp_path, {name: RUNS[name] for name in ("random", "supervised")}, seeds=(0, 1))
    report.write(run)
    assert "Nothing to compare" in page_of(run) and len(rows_of(run)) == 6


def test_ticks_and_numbers():
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(31.2, 78.9) == [40, 50, 60, 70]
    assert charts.ticks(2, 2) == [2]
    numbers = (0.254, 17.3, 1500, 2.5e8, 8e13)
    assert [formats.number(v) for v in numbers] == ["0.254", "17.3", "1.5k", "250M", "80T"]
    durations = {4.25: "4.2 s", 99.6: "100 s", 119.9: "2 min 00 s", 3599.7: "1 h 00 min"}
    assert {v: formats.seconds(v) for v in durations} == durations
    assert [formats.short(v) for v in (None, 1500, "text")] == ["–", "1.5k", "text"]


def test_values_are_shown_in_the_tasks_unit():
    assert (PERCENT.show(0.1234), PERCENT.change(-0.012)) == ("12.3", "\N{MINUS SIGN}1.2")
    assert (PERCENT.axis, PERCENT.show(None)) == ("top-1 accuracy, %", "–")
    plain = replace(PERCENT, label="AUC", unit="")
    assert (plain.axis, plain.show(0.1234), plain.change(0.01)) == ("AUC", "0.123", "+0.010")


def test_smoothing_keeps_a_line_straight():
    line = np.linspace(3, 1, 101)
    assert charts.smooth(line, 0.2) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=1000)
    assert charts.smooth(noise, 0.05)[100:-100].std() < 0.25
    assert charts.smooth([5.0]) == pytest.approx([5.0])


def test_charts_put_values_where_they_belong():
    svg = charts.scatter(
        [charts.Point("a", 10, 50, 45, 55), charts.Point("b & c", 1000, 70, None, None, 1)],
        "t",
        "s",
        "%",
    )
    circle = [float(v) for v in re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg).groups()]
    square = [float(v) for v in re.search(r'<rect x="([\d.]+)" y="([\d.]+)"', svg).groups()]
    assert circle[0] < square[0] and circle[1] > square[1]  # more cost to the right, better above
    low, high = map(
        float, re.search(r'class="range c0"[^>]*y1="([\d.]+)" y2="([\d.]+)"', svg).groups()
    )
    assert high < circle[1] < low and circle[1] - high == pytest.approx(low - circle[1], abs=0.2)
    assert (
        "b &amp; c" in svg
        and charts.scatter([], "t", "x", "y") == ""
        and charts.curves([], "t", "x", "y") == ""
    )
    assert charts.bars([0, 0], "t", "x", "y") == ""


def test_an_untrained_encoder_does_not_squeeze_the_others_in_a_chart_of_cost():
    """It stands one decade left of the cheapest, wherever its own cost is."""

    def drawn(cost: float) -> list[float]:
        trained = [charts.Point("a", 10, 50), charts.Point("b", 1000, 70)]
        untrained = charts.Point("untrained", cost, 40, hollow=True)
        svg = charts.scatter([*trained, untrained], "t", "s", "%")
        return [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]

    a, b, untrained = drawn(1e-3)
    assert b - a == pytest.approx(2 * (a - untrained), abs=0.2)
    assert drawn(1e-3) == drawn(0.5) and drawn(5)[0] < drawn(0.5)[0]  # 5 is where it is


def test_codes_are_judged_in_plain_words(lab, tmp_path):
    text = re.sub(r"<[^>]+>", " ", page_of(lab))
    for words in ("41.2% of the places", "35.0 to 41.0 points", "33.7% (29.2% to 38.5%)", "55.5%"):
        assert words in text
    assert "The labels judge the codes" in text and "little to gain" not in text
    note = "A student that predicts these codes can gain little: so it is."
    other = fabricate(tmp_path)
    path = other.results / "target" / "vqkd" / "health.json"
    put(path, json.loads(path.read_text()) | {"notes": [note]})
    report.write(other)
    assert page_of(other).count(note) == 2 and "little to gain" in page_of(other)
    assert f"**The target vqkd.** {note}" in (other.out / "summary.md").read_text()


def test_what_has_no_official_code_is_called_our_reading():
    made = {
        f"{stage}/{kind}": SimpleNamespace(params={what: {"kind": kind}})
        for stage, what, kind in (
            ("pretrain", "method", "mimco"),
            ("pretrain", "method", "sim"),  # it has such code; one option is our reading
            ("target", "target", "parts"),
        )
    }
    made["transfer/mimco-s0/knn"] = SimpleNamespace(params={"task": {"kind": "knn"}})
    found = list(claims.readings(SimpleNamespace(manifests=made)))
    assert [title for title, _ in found] == ["mimco is our reading", "parts is our reading"]
    assert "stages/methods/mimco.py" in found[0][1]


def test_a_teachers_own_score_stands_beside_its_students(tmp_path):
    """And where labels trained it, it says so."""
    lab = fabricate(tmp_path)
    report.write(lab)
    text = " ".join(re.sub(r"<[^>]+>", " ", page_of(lab)).split())
    assert "linear probe of features 55.5% (29.2% to 38.5%)" in text
    assert "The labels judge the features. Judged on 400 validation images." in text
    assert "target/teacher linear probe 55.5 %" in text
    about = lab.results / "target" / "teacher" / "target.json"
    put(about, json.loads(about.read_text()) | {"labels": True})
    report.write(lab)
    text = " ".join(re.sub(r"<[^>]+>", " ", page_of(lab)).split())
    assert "target/teacher linear probe 55.5 % , trained with labels" in text.replace(" %,", " % ,")
    assert "It was trained on labels, too" in text


def test_saved_figures_are_whole_files(lab):
    found = sorted((lab.out / "figures").glob("*.svg"))
    names = {p.stem for p in found}
    assert {"scores-knn", "cost-linear", "loss-mae", "target-vqkd-counts"} <= names
    for path in found:
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme" in root[0].text


def test_pictures_stay_small():
    noise = np.random.default_rng(0).integers(0, 255, (700, 1800, 3), dtype=np.uint8)
    uri, width, height = pictures.embed(noise, widest=900, limit=50_000)
    assert (width, height) == (900, 350) and len(uri) < 400_000
    flat = np.zeros((8, 8, 3), np.uint8)
    assert len(pictures.embed(flat)[0]) < 200
    assert pictures.sheet([flat] * 5, 4, 16).shape == (34, 70, 3)


# ------------------------------------------------- other headlines, data sets, encoders, many runs


MIOU = {"key": "miou", "label": "mIoU", "unit": "%"}
SCORE = {"key": "auc", "label": "AUC", "unit": ""}


def test_every_task_has_its_own_headline(tmp_path):
    tasks = {"knn": TOP1, "seg": MIOU, "anomaly": SCORE}
    declared = {"tokens": {"of": ["beitv2"], "against": ["mae"]}}
    run = fabricate(tmp_path, tasks=tasks, contrasts=declared)
    report.write(run)
    shown, summary = page_of(run), (run.out / "summary.md").read_text()
    assert {r["task"]: r["metric"] for r in rows_of(run)} == {
        "knn": "top1",
        "seg": "miou",
        "anomaly": "auc",
    }
    for key, axis in (("knn", "top-1 accuracy, %"), ("seg", "mIoU, %"), ("anomaly", "AUC")):
        svg = gathered(run)["charts"][f"scores-{key}"]
        assert f">{axis}</text>" in svg and f'<span class="sub">{axis}</span>' in shown
        assert f"{key}: {axis}" in summary
    best = stats.t_interval([metric(run, f"beitv2-s{s}", "anomaly", "auc") for s in (0, 1, 2)])
    assert f"{best.mean:.3f} <small>± {best.half:.3f}</small>" in shown
    assert "is best on all 3 tasks" in shown
    text = re.sub("<[^>]*>", " ", shown.split('id="provenance"')[0])
    assert text.count("accuracy") == text.count("top-1 accuracy"), "only the task calls it so"


def test_a_headline_that_is_no_mean_of_scores_has_no_interval_over_images(tmp_path):
    """An mIoU is counted over the set: Wilson's interval would be around another number."""
    run = fabricate(tmp_path, seeds=(0,), tasks={"seg": MIOU, "knn": TOP1})
    for job in run.job.params["runs"]:
        path = run.results / f"transfer/{job}/seg/metrics.json"
        put(path, json.loads(path.read_text()) | {"miou": 0.5})
    cells = gathered(run)["cells"]
    assert cells["mae", "seg"].images is None
    value = metric(run, "mae-s0", "knn")
    assert cells["mae", "knn"].images == stats.wilson(round(value * 400), 400)


def test_scores_are_paired_by_image(tmp_path):
    """The rows of scores.npz may be in any order: sorted by index, two runs are paired."""
    run = fabricate(tmp_path, tasks=("knn",))
    cell = gathered(run)["cells"]["mae", "knn"]
    for seed in (0, 1, 2):
        with np.load(run.results / f"transfer/mae-s{seed}/knn/scores.npz") as arrays:
            index, score = arrays["index"], arrays["score"]
        assert (index != np.arange(400)).any()
        expected = np.empty(400)
        expected[index] = score
        assert (cell.scores.images[seed] == expected).all()
        assert cell.scores.images[seed][:100].all() and not cell.scores.images[seed][-20:].any()


def test_several_data_sets(tmp_path):
    run = fabricate(
        tmp_path,
        {name: RUNS[name] for name in ("mae", "beitv2", "random")},
        tasks={"knn": TOP1, "seg": MIOU},
        across=7,
        on={"beitv2": "photos"},
        tested={"seg": "camvid"},
    )
    report.write(run)
    found, shown, warnings = gathered(run), page_of(run), warnings_of(run)
    assert list(found["data"]) == ["main", "photos", "camvid"]
    for name in found["data"]:
        assert f"<h3>{name}</h3>" in shown
        assert "7 in train-test" in warnings[f"Test images of {name} also in training"]
        assert f"Broken images of {name} were left out" in warnings
    assert shown.count('alt="Sample of the training images"') == 3
    # k-NN tests on the images of each run: two columns, that nobody compares
    assert [t.title for t in found["tasks"]] == ["knn on main", "knn on photos", "seg"]
    assert found["verdicts"]["knn-main"].state == found["verdicts"]["knn-photos"].state == "alone"
    assert found["verdicts"]["seg"].leader == "beitv2"
    assert "main: mae; photos: beitv2" in warnings["Different pretraining data"]
    assert "pretrained on main, photos" in warnings["seg tests on other images"]
    rows = {(r["run"], r["task"], r["data"]): r for r in rows_of(run)}
    assert rows["beitv2", "knn", "photos"]["pretrained_on"] == "photos"
    assert {r["data"] for r in rows_of(run) if r["task"] == "seg"} == {"camvid"}
    entry = next(e for e in found["trail"] if e["id"] == "transfer/mae-s0/seg")
    assert entry["data"] == found["data"]["camvid"]["hash"]


def test_several_encoders(tmp_path):
    swin = {"kind": "swin", "config": {"embed_dim": 48, "depth": [2, 4], "patch_size": 2}}
    run = fabricate(tmp_path, tasks=("knn",), models={"mae": swin})
    report.write(run)
    shown = page_of(run)
    assert 'swin<span class="sub" style="white-space:nowrap">48 × 2+4, patch 2</span>' in shown
    assert (
        shown.count('vit<span class="sub" style="white-space:nowrap">192 × 12, patch 4</span>') == 4
    )
    assert "swin, 48 × 2+4, patch 2: mae; vit" in warnings_of(run)["Different encoders"]


def test_a_run_without_a_task_has_no_number_there(tmp_path):
    run = fabricate(tmp_path, tasks=("knn", "linear"))
    for seed in (0, 1, 2):
        del run.job.inputs[f"transfer/mae-s{seed}/linear"]
    report.write(run)
    assert len(rows_of(run)) == 2 * len(RUNS) - 1
    assert gathered(run)["verdicts"]["linear"].leader == "beitv2"


@pytest.mark.parametrize("count", [24, 60])
def test_any_number_of_runs_has_colours_that_can_be_told_apart(count):
    pairs = colours.colours(count)
    assert pairs[:8] == tuple(zip(colours.LIGHT, colours.DARK, strict=True))
    assert len(set(pairs)) == count
    for number, ground in ((0, "#ffffff"), (1, "#171b21")):
        places = [colours.lab(pair[number]) for pair in pairs]
        assert all(abs(p[0] - colours.lab(ground)[0]) > 0.3 for p in places), "seen on the page"
        if count <= 24:  # 0.02 is a difference that one just sees
            near = min(math.dist(a, b) for n, a in enumerate(places) for b in places[:n])
            assert near > 0.045


def test_a_page_of_twelve_runs(tmp_path):
    runs = {f"run{n}": (facts("mae"), 0.4 + n / 30) for n in range(12)}
    run = fabricate(tmp_path, runs, seeds=(0,), tasks=("knn",), pictures=False)
    report.write(run)
    shown = page_of(run)
    used = set(re.findall(r'class="swatch b(\d+)"', shown))
    assert used == {str(n) for n in range(12)}
    assert all(f"--c{n}:#" in shown and f".b{n}{{" in shown for n in range(12))
    figure = (run.out / "figures/scores-knn.svg").read_text()
    assert "--c11:" in figure and 'class="f11"' in figure


def test_through_the_real_plan(tmp_path, tiny_params):
    """The command itself, on a plan whose other jobs are fabricated: a manifest at the end, nothing
    left over.
    """
    from workflow.plan import load

    params = tiny_params(tmp_path, grid__seeds=[0, 1])
    plan = load(params, tmp_path / "results")
    about = plan.jobs["report"].params
    runs = {facts["run"]: (facts, 0.5) for facts in about["runs"].values()}
    made = fabricate(tmp_path / "made", runs, (0, 1), about["tasks"], images=40)
    assert set(plan.jobs["report"].inputs) == set(made.job.inputs)
    for name in plan.jobs["report"].inputs:  # as if this plan had made them
        edit(made, name, fingerprint=plan.jobs[name].fingerprint)
    shutil.move(made.results, tmp_path / "results")
    assert report.main(["--params", str(params), "--results", str(tmp_path / "results")]) == 0
    manifest = json.loads((tmp_path / "results" / "report" / "manifest.json").read_text())
    assert {"index.html", "summary.md", "summary.csv"} < set(manifest["outputs"])
    assert manifest["summary"]["runs"] == 4


# ---------------------------------------------------------------------------------- in a browser

BROWSER = browser.PROGRAM
PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement, all = (what) => [...document.querySelectorAll(what)];
  all("details").forEach((d) => (d.open = true));
  const loaded = performance.getEntriesByType("resource").map((r) => r.name);
  const small = (t) => t.getBoundingClientRect().height < 9;
  page.dataset.probe = JSON.stringify({
    inner: innerWidth,
    wide: page.scrollWidth,
    loaded: loaded.filter((name) => !name.startsWith("data:")),
    images: document.images.length,
    broken: all("img").filter((i) => i.complete && !i.naturalWidth).length,
    small: all(".chart text").filter(small).length,
    who: document.querySelector(".who").textContent,
  });
})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium(lab, tmp_path, width):
    """No request, no console message, no broken picture, no sideways scrolling, legible letters in
    the charts.

    Headless Chromium has a smallest window width above a phone's, so the page sits in an iframe of
    the width asked for.
    """
    inner = page_of(lab).replace('loading="lazy"', "").replace("</head>", PROBE + "</head>")
    (tmp_path / "inner.html").write_text(inner)
    (tmp_path / "outer.html").write_text(
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        'addEventListener("load",()=>setTimeout(()=>{'
        'const page=document.querySelector("iframe").contentDocument;'
        "document.body.textContent=page.documentElement.dataset.probe},0))</script>"
    )
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=4000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--dump-dom",
            (tmp_path / "outer.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(
        html.unescape(re.search(r"<body>(\{.*?\})</body>", done.stdout, re.S).group(1))
    )
    assert found["inner"] == width and found["wide"] <= width
    assert (
        found["loaded"] == []
        and found["broken"] == 0
        and found["images"] == 7
        and found["small"] == 0
    )
    assert found["who"] == gathered(lab)["sentence"].text
    assert "beats an untrained encoder on knn" in found["who"]
    assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_tables_sort_and_runs_have_pages_in_chromium(lab, tmp_path):
    names = "[...document.querySelectorAll('#results .sorts tbody tr')].map(r => r.cells[0]"
    names += ".dataset.value)"
    seen = "[...document.querySelectorAll('main section, #training figure')].filter(x => "
    seen += "x.getBoundingClientRect().height).map(x => x.id || x.className)"
    knn = "document.querySelectorAll('#results .sorts thead button')[1].click()"
    with browser.open(tmp_path) as page:
        page.go((lab.out / "index.html").as_uri())
        page.wait("document.querySelector('.sorts button')")
        page.run(knn)
        assert page.run(names) == ["beitv2", "beitv2-nopa", "mae", "supervised", "random"]
        page.run(knn)
        assert page.run(names) == ["mae", "beitv2-nopa", "beitv2", "random", "supervised"]
        assert page.run("document.querySelector('.first-ref').cells[0].dataset.value") == "random"
        page.run("document.querySelector('#results a[href=\"#run-mae\"]').click()")
        page.wait("location.hash == '#run-mae'")
        assert page.run(seen) == ["run-mae", "training", "panel of of-0", "pictures"]
        page.run("document.querySelector('#run-mae a').click()")
        page.wait("location.hash == '#results'")
        assert "provenance" in page.run(seen)
