"""Two reports beside each other: which numbers changed, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from stages import report
from stages.reporting import against
from tests.fabricated import RUNS, fabricate, put
from workflow.manifest import Manifest


def finished(folder, **changes):
    """The results folder of a fabricated experiment whose report has a manifest."""
    run = fabricate(folder, {name: RUNS[name] for name in ("mae", "random")}, tasks=("knn",))
    inputs = {
        id: {"job": id, "fingerprint": Manifest.read(run.input(id) / "manifest.json").fingerprint}
        for id in run.job.inputs
    }
    manifest = Manifest(job="report", fingerprint="r", params=run.job.params, inputs=inputs)
    put(run.out / "manifest.json", manifest.text())
    return run.results


def edit(results, id: str, **changes) -> None:
    """Makes a job another one, as the report then names it, too."""
    path, report = results / id / "manifest.json", results / "report" / "manifest.json"
    manifest = replace(Manifest.read(path), fingerprint="other", **changes)
    path.write_text(manifest.text())
    found = json.loads(report.read_text())
    found["inputs"][id]["fingerprint"] = "other"
    report.write_text(json.dumps(found))


@pytest.fixture
def two(tmp_path):
    return finished(tmp_path / "new"), finished(tmp_path / "old")


def said(capsys, new, old, status: int = 0) -> str:
    words = ["--against", str(old), "--results", str(new)]
    assert report.main(words) == status
    out, err = capsys.readouterr()
    return err if status else out


def test_nothing_changed(two, capsys):
    text = said(capsys, *two)
    assert "The same in both: mae, random." in text and "because" not in text


def test_numbers_and_their_reasons(two, capsys):
    new, old = two
    for seed in (0, 1, 2):
        path = new / f"transfer/mae-s{seed}/knn/metrics.json"
        metrics = json.loads(path.read_text())
        put(path, metrics | {"top1": metrics["top1"] + 0.1 + 0.001 * seed})
        edit(
            new,
            f"pretrain/mae-s{seed}",
            params={"method": {"name": "mae", "config": {"mask_ratio": 0.5}}, "run": "mae"},
            summary={"images_seen": 160000, "flops_per_image": 1.0},
            code={"stages/x.py": "1" * 64},
        )
    text = said(capsys, new, old)
    assert "## mae" in text and "The same in both: random." in text
    assert "(+10.1, seeds +9.9 to +10.3" in text and "- images seen: 80k → 160k" in text
    assert "method.config.mask_ratio: nothing → 0.5 (pretrain/mae-s0)" in text
    assert "code: stages/x.py (commits c0ffee" in text


def test_other_images_are_a_reason_and_pair_no_scores(two, capsys):
    new, old = two
    about = json.loads((new / "data/main/data.json").read_text())
    put(new / "data/main/data.json", about | {"hash": "0" * 64})
    edit(new, "data/main")
    path = new / "transfer/mae-s0/knn/metrics.json"
    put(path, json.loads(path.read_text()) | {"top1": 0.5})
    text = said(capsys, new, old)
    assert "data: the images of main (" in text and "60 → 60 training images)" in text
    assert "images +" not in text.replace("images +0", ""), "no interval over other images"


def test_a_change_that_no_fingerprint_holds_is_called_so(two, capsys):
    new, old = two
    path = new / "transfer/mae-s0/knn/metrics.json"
    put(path, json.loads(path.read_text()) | {"top1": 0.5})
    assert "nothing that a fingerprint holds" in said(capsys, new, old)


def test_runs_of_one_side_and_folders_without_a_report(two, tmp_path, capsys):
    new, old = two
    path = old / "report/manifest.json"
    found = json.loads(path.read_text())
    found["params"]["runs"] = {k: v for k, v in found["params"]["runs"].items() if "mae" in k}
    path.write_text(json.dumps(found))
    text = said(capsys, new, old)
    assert f"Only in {new}: random." in text
    assert "has no report" in said(capsys, new, tmp_path, status=1)
    assert against.Side(new).newer == []
    edit(new, "data/main")
    found = json.loads((new / "report/manifest.json").read_text())
    found["inputs"]["data/main"]["fingerprint"] = "older"
    put(new / "report/manifest.json", found)
    assert f"The report of {new} is older than its data/main." in said(capsys, new, old)
