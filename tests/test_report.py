"""The report on fabricated results: numbers, verdicts, warnings, determinism, and the page in a
real browser.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from stages import report
from stages.reporting import figures, stats

CLASSES = ["circle", "square", "triangle", "star", "cross"]
RUNS = {  # run: (facts, accuracy)
    "mae": (
        {"method": "mae", "target": None, "labels": False, "trains": True, "label_targets": []},
        0.62,
    ),
    "beitv2": (
        {
            "method": "beitv2",
            "target": "vqkd",
            "labels": False,
            "trains": True,
            "label_targets": [],
        },
        0.74,
    ),
    "beitv2-nopa": (
        {
            "method": "beitv2",
            "target": "vqkd",
            "labels": False,
            "trains": True,
            "label_targets": [],
        },
        0.66,
    ),
    "random": (
        {"method": "random", "target": None, "labels": False, "trains": False, "label_targets": []},
        0.35,
    ),
    "supervised": (
        {
            "method": "supervised",
            "target": None,
            "labels": True,
            "trains": True,
            "label_targets": [],
        },
        0.82,
    ),
}


def put(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def fabricate(
    folder: Path,
    runs=RUNS,
    seeds=(0, 1, 2),
    tasks=("knn", "linear", "finetune"),
    images=400,
    across=0,
    pictures=True,
    labelled=True,
    contrasts=None,
):
    """A finished experiment below `folder`: a run as kit/job/job.py gives it to the report stage."""
    rng = np.random.default_rng(0)
    seeds = seeds if isinstance(seeds, dict) else dict.fromkeys(runs, tuple(seeds))
    table = {
        f"{name}-s{s}": {"run": name, "seed": s, "teacher": None, "stage": 1, **facts}
        for name, (facts, _) in runs.items()
        for s in seeds[name]
    }
    targets = sorted({facts["target"] for facts, _ in runs.values() if facts["target"]})
    inputs = [
        "data",
        *(["target/teacher"] if targets else []),
        *(f"target/{t}" for t in targets),
        *(f"pretrain/{r}" for r in table),
    ]
    inputs += [f"transfer/{r}/{t}" for r in table for t in tasks]
    results = folder / "results"

    def manifest(id, summary=None, wall=12.0, above=(), params=None):
        stage, _, name = id.partition("/")
        put(
            results / id / "manifest.json",
            {
                "job": id,
                "stage": stage,
                "name": name or stage,
                "fingerprint": hashlib.sha256(id.encode()).hexdigest(),
                "params": params or {"seed": 0, "note": "<script>alert(1)</script>"},
                "code": {"stages/x.py": "0" * 64},
                "inputs": dict.fromkeys(above, "f"),
                "git": {"commit": "c0ffee" * 6, "dirty": False},
                "wall_s": wall,
                "peak_memory_mb": 812,
                "device": "cpu",
                "threads": 2,
                "summary": summary or {},
                "created": "2026-01-02T03:04:05+00:00",
            },
        )

    tone = rng.integers(40, 220, (60, 1, 1, 3))
    pixels = np.clip(tone + rng.normal(0, 18, (60, 32, 32, 3)), 0, 255).astype(np.uint8)
    split = {"count": 60, "class_counts": [12] * 5 if labelled else [], "labelled": labelled}
    put(
        results / "data" / "data.json",
        {
            "source": "shapes",
            "hash": "ab12" * 16,
            "mode": "memmap",
            "image_size": 32,
            "store_size": 32,
            "classes": CLASSES if labelled else [],
            "mean": [0.5, 0.45, 0.4],
            "std": [0.2, 0.2, 0.25],
            "splits": {
                "train": split,
                "val": split | {"count": 20},
                "test": split | {"count": images},
            },
            "duplicates": {"within": {"train": 3}, "across": {"train-test": across}, "groups": []},
            "quarantine": {"count": 2, "reasons": {"truncated": 2}},
            "warnings": [],
        },
    )
    (results / "data" / "train").mkdir()
    np.save(results / "data" / "train" / "images.npy", pixels)
    np.save(
        results / "data" / "train" / "labels.npy",
        np.arange(60) % 5 if labelled else np.full(60, -1),
    )
    manifest("data")

    def paint(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([*pixels[:8]], 1).repeat(3, 0).repeat(3, 1)).save(path)

    def history(path, steps, start, end):
        loss = (
            end + (start - end) * np.exp(-np.arange(steps) / steps * 5) + rng.normal(0, 0.01, steps)
        )
        put(
            path,
            "".join(
                json.dumps({"step": i, "epoch": i / steps * 20, "lr": 1e-3, "loss": x}) + "\n"
                for i, x in enumerate(loss)
            ),
        )

    for name in (["teacher"] if targets else []) + targets:
        base = results / "target" / name
        counts = (900 * np.arange(1, 65) ** -0.7).astype(int).tolist()
        put(
            base / "health.json",
            {"usage": 0.97, "perplexity": 41.2, "counts": counts, "problems": []}
            if name != "teacher"
            else {"rank": 37.5, "entropy": 3.1, "problems": []},
        )
        put(
            base / "target.json", {"kind": "vqkd" if name != "teacher" else "dino", "labels": False}
        )
        history(base / "history.jsonl", 120, 8, 4)
        manifest(
            f"target/{name}",
            {"images_seen": 48000, "flops_per_image": 3e8},
            95.0,
            ["data"] + (["target/teacher"] if name != "teacher" else []),
            {"target": {"kind": "vqkd"}},
        )
        if pictures:
            paint(base / "pictures" / "code_map.png")
    difficulty = np.linspace(0, 1, images)
    for job, facts in table.items():
        base, rate = results / "pretrain" / job, runs[facts["run"]][1]
        trained = facts["trains"]
        if trained:
            history(base / "history.jsonl", 200, 1.2, 0.4)
        summary = (
            {
                "images_seen": 80000,
                "effective_epochs": 20,
                "flops_per_image": 2.5e8,
                "images_per_s": 900.0,
            }
            if trained
            else {}
        )
        manifest(
            f"pretrain/{job}",
            summary | {"parameters": 1234567},
            140.0 if trained else 3.0,
            ["data"]
            + ([f"target/{facts['target']}"] if facts["target"] else [])
            + ([f"pretrain/{facts['teacher']}-s{facts['seed']}"] if facts["teacher"] else []),
            {"method": {"name": facts["method"]}, "run": facts["run"]},
        )
        if trained and pictures:
            paint(base / "pictures" / "reconstruction.png")
        for n, task in enumerate(tasks):
            out = results / "transfer" / job / task
            right = difficulty + rng.normal(0, 0.03, images) < rate + 0.03 * n + rng.normal(
                0, 0.004
            )
            label = np.arange(images) % 5
            top1 = float(right.mean())
            put(
                out / "metrics.json",
                {
                    "run": job,
                    "task": task,
                    "top1": top1,
                    "per_class_mean": top1,
                    "feature": "patch",
                    "seed": facts["seed"],
                    **({"cls_top1": top1 - 0.1, "patch_top1": top1} if task != "finetune" else {}),
                },
            )
            np.savez(
                out / "predictions.npz",
                index=np.arange(images),
                label=label,
                prediction=np.where(right, label, (label + 1) % 5),
            )
            manifest(f"transfer/{job}/{task}", {"top1": top1}, 4.2)
    out = results / "report"
    out.mkdir()
    params = {
        "experiment": "synthetic",
        "runs": table,
        "tasks": list(tasks),
        "contrasts": contrasts or {},
    }
    job = SimpleNamespace(id="report", params=params, inputs=tuple(inputs))
    return SimpleNamespace(
        job=job, out=out, summary={}, input=lambda id: results / id, results=results
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    run = fabricate(tmp_path_factory.mktemp("lab"))
    report.write(run)
    return run


def page_of(run) -> str:
    return (run.out / "index.html").read_text()


def rows_of(run) -> list[dict]:
    return list(csv.DictReader((run.out / "summary.csv").open()))


def metric(run, job, task) -> float:
    return json.loads((run.results / "transfer" / job / task / "metrics.json").read_text())["top1"]


def test_numbers_are_the_jobs(lab):
    """Every line of the CSV, recomputed from the jobs' own files; the page shows the same number
    with its interval.
    """
    rows = rows_of(lab)
    assert len(rows) == len(RUNS) * 3
    page = page_of(lab)
    for row in rows:
        values = [metric(lab, f"{row['run']}-s{s}", row["task"]) for s in (0, 1, 2)]
        want = stats.t_interval(values)
        assert [float(v) for v in row["scores"].split()] == values
        assert (float(row["mean"]), float(row["low"]), float(row["high"])) == pytest.approx(
            (want.mean, want.low, want.high)
        )
        assert f"{want.mean * 100:.1f} <small>± {want.half * 100:.1f}</small>" in page


def test_bold_only_where_the_tests_say_so(lab):
    states = {(r["run"], r["task"]): r["verdict"] for r in rows_of(lab)}
    assert {states["beitv2", t] for t in ("knn", "linear", "finetune")} == {"best"}
    assert states["supervised", "linear"] == "reference"  # higher, but it saw the labels
    bold = re.findall(r"<strong>([\d.]+)", page_of(lab))
    assert len(bold) == 3 and "beitv2 is best on all 3 tasks" in page_of(lab)
    summary = (lab.out / "summary.md").read_text()
    assert summary.count("| **") == 3 and "| beitv2 | **" in summary


def test_costs_include_targets(lab):
    row = next(r for r in rows_of(lab) if r["run"] == "beitv2")
    # the tokenizer and its teacher
    assert (float(row["seconds"]), float(row["target_seconds"])) == (140, 190)
    assert float(row["flops"]) == pytest.approx(2.5e8 * 80000 + 2 * 3e8 * 48000)
    assert float(row["effective_epochs"]) == pytest.approx(80000 / 60)
    assert next(r for r in rows_of(lab) if r["run"] == "mae")["target_seconds"] == "0"


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
    shown = [figures.points(x) for x in (want.mean, want.low, want.high)]
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
    return {
        "method": "dbot",
        "target": target,
        "teacher": teacher,
        "stage": stage,
        "labels": False,
        "trains": True,
        "label_targets": list(seen),
    }


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


def test_a_job_that_was_killed_on_the_way_costs_its_whole_training():
    resumed = {"wall_s": 20.0, "summary": {"train_s": 300.0}}
    assert report.lineage.seconds(resumed) == 300
    assert report.lineage.seconds({"wall_s": 320.0, "summary": {"train_s": 300.0}}) == 320
    assert report.lineage.seconds({"wall_s": 5.0, "summary": {}}) == 5


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
        assert float(row["images_seen"]) == images * 80000, name
        assert float(row["effective_epochs"]) == pytest.approx(images * 80000 / 60), name
        assert float(row["seconds"]) == seconds, name
        assert float(row["flops"] or 0) == images * 80000 * 2.5e8, name
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
    page = report.gather(chains.job.params, {id: chains.input(id) for id in chains.job.inputs})
    found = page["stages"]["linear"]
    lines = {chain.name: chain.runs for chain, _ in found["chains"]}
    assert lines == {
        "dbot": {0: "random", 1: "dbot-1", 2: "dbot-2"},
        "other": {0: "mae", 1: "other-1", 2: "other-2"},
        "coded": {1: "coded-1", 2: "coded-2"},
    }  # one stage is no chain
    assert [chain.first for chain, _ in found["chains"]] == ["random", "mae", "vqkd"]

    def of(run):
        return np.mean([metric(chains, f"{run}-s{s}", "linear") for s in (0, 1, 2)])

    for stage, runs in (
        (0, ("random", "mae")),
        (1, ("dbot-1", "other-1", "coded-1")),
        (2, ("dbot-2", "other-2", "coded-2")),
    ):
        assert found["spread"][stage] == pytest.approx(np.std([of(r) for r in runs], ddof=1))
        for run in runs:
            assert f"<td>{of(run) * 100:.1f}</td>" in page_of(chains).split("Quality by stage")[1]
    svg = page["charts"]["stages-linear"]
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


def test_the_page_is_alone_and_safe(lab):
    page = page_of(lab)
    assert (
        not re.search(r"""(src|href)=["'](?!data:|#)""", page)
        and "@import" not in page
        and "url(" not in page
    )
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
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
    folders = {id: run.input(id) for id in run.job.inputs}
    page = report.gather(run.job.params, folders)
    return dict(page["warnings"] + page["notes"])


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


def test_unfair_comparisons_are_named(tmp_path):
    runs = dict(RUNS)
    runs["taught"] = (
        {
            "method": "beitv2",
            "target": "clip",
            "labels": False,
            "trains": True,
            "label_targets": ["clip"],
        },
        0.9,
    )
    runs["weak"] = (
        {"method": "mae", "target": None, "labels": False, "trains": True, "label_targets": []},
        0.3,
    )
    run = fabricate(
        tmp_path,
        runs,
        seeds={n: (0, 1, 2) if n != "weak" else (0, 1) for n in runs},
        tasks=("knn",),
    )
    for job in ("mae-s0", "mae-s1", "mae-s2"):
        path = run.results / "pretrain" / job / "manifest.json"
        content = json.loads(path.read_text())
        content["summary"]["images_seen"], content["device"], content["git"]["dirty"] = (
            160000,
            "cuda:0",
            True,
        )
        put(path, content)
    warnings = warnings_of(run)
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
    assert figures.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures.ticks(31.2, 78.9) == [40, 50, 60, 70]
    assert figures.ticks(2, 2) == [2]
    assert [figures.number(v) for v in (0.254, 17.3, 1500, 2.5e8, 8e13)] == [
        "0.254",
        "17.3",
        "1.5k",
        "250M",
        "80T",
    ]
    assert [figures.seconds(v) for v in (4.25, 99.6, 119.9, 3599.7, 9000)] == [
        "4.2 s",
        "100 s",
        "2 min 00 s",
        "1 h 00 min",
        "2 h 30 min",
    ]


def test_smoothing_keeps_a_line_straight():
    line = np.linspace(3, 1, 101)
    assert figures.smooth(line, 0.2) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(size=1000)
    assert figures.smooth(noise, 0.05)[100:-100].std() < 0.25
    assert figures.smooth([5.0]) == pytest.approx([5.0])


def test_charts_put_values_where_they_belong():
    svg = figures.scatter(
        [figures.Point("a", 10, 50, 45, 55), figures.Point("b & c", 1000, 70, None, None, 1)],
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
        and figures.scatter([], "t", "x", "y") == ""
        and figures.curves([], "t", "x", "y") == ""
    )
    assert figures.bars([0, 0], "t", "x", "y") == ""


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
    uri, width, height = figures.embed(noise, widest=900, limit=50_000)
    assert (width, height) == (900, 350) and len(uri) < 400_000
    flat = np.zeros((8, 8, 3), np.uint8)
    assert len(figures.embed(flat)[0]) < 200
    assert figures.sheet([flat] * 5, 4, 16).shape == (34, 70, 3)


def test_through_the_real_plan(tmp_path, tiny_params):
    """The command itself, on a plan whose other jobs are fabricated: a manifest at the end, nothing
    left over.
    """
    from workflow.plan import load

    params = tiny_params(tmp_path, grid__seeds=[0, 1])
    plan = load(params, tmp_path / "results")
    table = plan.jobs["report"].params["runs"]
    runs = {
        facts["run"]: (
            {k: facts[k] for k in ("method", "target", "labels", "trains", "label_targets")},
            0.5,
        )
        for facts in table.values()
    }
    made = fabricate(
        tmp_path / "made",
        runs,
        seeds=(0, 1),
        tasks=tuple(plan.jobs["report"].params["tasks"]),
        images=40,
    )
    assert set(plan.jobs["report"].inputs) == set(made.job.inputs)
    shutil.move(made.results, tmp_path / "results")
    for name in plan.jobs["report"].inputs:  # as if this plan had made them
        job = plan.jobs[name]
        job.manifest.write_text(
            json.dumps(json.loads(job.manifest.read_text()) | {"fingerprint": job.fingerprint})
        )
    assert report.main(["--params", str(params), "--results", str(tmp_path / "results")]) == 0
    manifest = json.loads((tmp_path / "results" / "report" / "manifest.json").read_text())
    assert {"index.html", "summary.md", "summary.csv"} < set(manifest["outputs"])
    assert manifest["summary"]["runs"] == 4


# ----------------------------------------------------------------------------------------------- in
# a browser

BROWSER = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
PROBE = """<script>addEventListener('load',()=>{document.querySelectorAll('details').forEach(d=>d.open=true);
document.documentElement.dataset.probe=JSON.stringify({inner:innerWidth,wide:document.documentElement.scrollWidth,
loaded:performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:')).map(r=>r.name),
broken:[...document.images].filter(i=>i.complete&&!i.naturalWidth).length,images:document.images.length,
small:[...document.querySelectorAll('.chart text')].filter(t=>t.getBoundingClientRect().height<9).length,
who:document.querySelector('.who').textContent})})</script>"""


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
    import html

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
    assert found["who"] == "beitv2 is best on all 3 tasks"
    assert "CONSOLE" not in done.stderr
