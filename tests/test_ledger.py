"""What DVC shows of a report: metrics, plots and experiments, also without a network."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess

import pytest

from stages import report
from stages.reporting import ledger
from stages.reporting.results import Jobs
from tests.fabricated import FLOPS, IMAGES_SEEN, RUNS, TARGET_FLOPS, TARGET_IMAGES_SEEN, fabricate
from tests.lab import BIN, Lab

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_dvc = pytest.mark.skipif(
    not (BIN / "dvc").exists() or not shutil.which("git"), reason="needs dvc and git"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = fabricate(tmp_path_factory.mktemp("fabricated"))
    report.write(run)
    return run


def lines_of(run, name: str) -> list[dict]:
    return list(csv.DictReader((run.out / f"plots/{name}.csv").open()))


# ------------------------------------------------------------------------------------- the files


def test_metrics_are_the_headline_of_each_run_and_task_and_its_cost(made):
    told = json.loads((made.out / "metrics.json").read_text())
    assert list(told) == list(RUNS)
    rows = csv.DictReader((made.out / "summary.csv").open())
    means = {(row["run"], row["task"]): float(row["mean"]) for row in rows}
    for (run, task), mean in means.items():
        assert told[run][task] == round(mean, 4)
    flops = FLOPS * IMAGES_SEEN
    with_target = flops + 2 * TARGET_FLOPS * TARGET_IMAGES_SEEN
    assert told["mae"]["TFLOP"] == pytest.approx(flops / 1e12, rel=0.01)
    assert told["beitv2"]["TFLOP"] == pytest.approx(with_target / 1e12, rel=0.01)
    assert told["beitv2"]["Seconds"] == 140 + 2 * 95 and "TFLOP" not in told["random"]


def test_tables_hold_curves_intervals_and_the_use_of_codes(made):
    losses = lines_of(made, "losses")
    of = {(line["run"], line["seed"]) for line in losses}
    assert of == {(run, s) for run in RUNS if run != "random" for s in "012"} | {
        ("target/teacher", ""),
        ("target/vqkd", ""),
    }
    assert all(float(line["loss"]) > 0 and float(line["epoch"]) <= 20 for line in losses)
    scores = lines_of(made, "scores")
    assert len(scores) == 3 * len(RUNS)
    for line in scores:
        assert 0 <= float(line["low"]) <= float(line["mean"]) <= float(line["high"]) <= 1
    codes = [float(line["value"]) for line in lines_of(made, "codes")]
    assert len(codes) == 64 and codes == sorted(codes, reverse=True)
    pictures = {p.relative_to(made.out).as_posix() for p in made.out.glob("pictures/*/*/*.png")}
    assert "pictures/pretrain/mae/reconstruction.png" in pictures
    assert "pictures/target/vqkd/code_map.png" in pictures


def test_a_long_curve_is_thinned_and_keeps_its_end():
    kept = ledger.thinned(list(range(1001)))
    assert len(kept) <= ledger.POINTS and kept[-1] == 1000 and kept == sorted(kept)
    assert ledger.thinned([1, 2]) == [1, 2] and ledger.thinned([]) == []


def test_without_training_and_with_one_seed_nothing_is_invented(tmp_path):
    runs = {"random": RUNS["random"]}
    run = fabricate(tmp_path, runs, seeds=(0,), tasks=("knn",), pictures=False)
    report.write(run)
    assert (
        not (run.out / "plots/losses.csv").exists() and not (run.out / "plots/codes.csv").exists()
    )
    [line] = lines_of(run, "scores")
    assert float(line["low"]) < float(line["mean"]) < float(line["high"]), "over test images"
    assert ledger.pictures([], Jobs({})) == {}


# ---------------------------------------------------------------------------------- through DVC


@pytest.fixture(scope="module")
def lab(made, tmp_path_factory):
    """A lab with this report in DVC, which then changed, and a params file that did."""
    it = Lab.create(tmp_path_factory.mktemp("ledger") / "a lab")
    it.empty = [it.dvc(*words) for words in (("metrics", "show"), ("plots", "show"))]
    for stage in ("pretrain", "transfer"):
        (it.folder / f"results/{stage}").mkdir()
        (it.folder / f"results/{stage}/x").write_text("x")
    out = it.folder / "results/report"
    shutil.copytree(made.out, out)
    it.dvc("commit", "-q", "-f", "report")
    it.save("a report")
    told = json.loads((out / "metrics.json").read_text())
    told["mae"]["knn"] = 0.5
    (out / "metrics.json").write_text(json.dumps(told))
    text = (out / "plots/scores.csv").read_text()
    (out / "plots/scores.csv").write_text(re.sub(r"knn,mae,0\.\d+", "knn,mae,0.5", text))
    it.set(0.5)
    return it


@needs_dvc
def test_where_there_is_no_report_nothing_fails(lab):
    assert len(lab.empty) == 2


@needs_dvc
def test_metrics_show_and_diff(lab, made):
    told = json.loads(lab.dvc("metrics", "show", "--json"))[""]["data"]
    assert list(told) == ["results/report/metrics.json"]
    assert told["results/report/metrics.json"]["data"]["mae"]["knn"] == 0.5
    before = json.loads((made.out / "metrics.json").read_text())["mae"]["knn"]
    said = lab.dvc("metrics", "diff")
    assert re.search(rf"metrics.json +mae.knn +{before} +0.5 ", said), said
    assert said.count("\n") == 2, "what changed, and nothing else"


@needs_dvc
def test_experiments_have_narrow_columns(lab):
    """The command that docs/cluster.md gives."""
    words = ("exp", "show", "--only-changed", "--drop", "params.yaml|/", "--csv")
    table = list(csv.reader(io.StringIO(lab.dvc(*words))))
    own = ["Experiment", "rev", "typ", "Created", "parent"]
    assert [name for name in table[0] if name not in own] == ["mae.knn", "methods.mae.mask_ratio"]
    assert [row[table[0].index("methods.mae.mask_ratio")] for row in table[1:]] == ["0.5", "0.75"]
    assert "methods.mae.mask_ratio" in lab.dvc("params", "diff")


@needs_dvc
def test_plots_show_and_diff_open_without_a_network(lab, tmp_path):
    lab.dvc("plots", "show")
    page = lab.folder / "dvc_plots/index.html"
    one = page.read_text()
    for title in ("Training loss", "Scores", "Use of codes"):
        assert f'"title": "{title}"' in one
    assert "pretrain_mae_reconstruction.png" in one
    assert '<script src="../.dvc/tmp/vega.js">' in one
    vega = (lab.folder / ".dvc/tmp/vega.js").read_text(encoding="utf-8")
    assert "vegaLite" in vega and "vegaEmbed" in vega
    lab.dvc("plots", "diff")
    both = page.read_text()
    assert '"rev": "workspace"' in both and '"rev": "HEAD"' in both
    assert "dvc_plots" not in lab.git("status", "--short"), "git leaves the pages alone"
    if BROWSER is None:
        return
    alone = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    more = ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, "--headless", *alone, "--allow-file-access-from-files", *more, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert len(re.findall("<canvas|<svg class=.marks", done.stdout)) == 3


@needs_dvc
@pytest.mark.parametrize(
    "name", ["work/x", "logs/x", "mlruns/x", ".snakemake/x", "dvc_plots/x", "stages/x.pyc"]
)
def test_dvc_does_not_look_where_no_result_comes_from(lab, name):
    assert lab.dvc("check-ignore", name).strip() == name
