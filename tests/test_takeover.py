"""What would come out the same is taken over; where anything that counts differs, it is not."""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np
import pytest
import yaml
from conftest import tiny_content, write_params
from PIL import Image

from stages import data, pretrain, transfer
from stages.kit.data import store
from stages.kit.job import job as jobs
from stages.kit.job.job import running, take_over, write_atomic
from stages.tasks import Trial
from tests.lab import PARAMS, Lab
from tests.plans import editable, edited, plan_of
from workflow.plan import kept, load
from workflow.plan.explain import explain
from workflow.plan.leftovers import leftovers, prune

DATA, MAE, KNN = "data/main", "pretrain/mae-s0", "transfer/mae-s0/knn"


def make(plan, *ids: str, text: str = "x") -> None:
    """Finish jobs with one file that holds the text, and one in a folder."""
    for id in ids:
        with running(plan.jobs[id], plan) as run:
            write_atomic(run.out / "value", text)
            write_atomic(run.out / "encoder/weights", f"weights {text}")
            run.summary["train_s"] = 3.5


@pytest.fixture
def made(tmp_path):
    """A plan whose jobs are done, and one in which the data set was made again, as it was."""
    before = plan_of(tmp_path)
    make(before, DATA, MAE, KNN)
    after = plan_of(tmp_path, data__seed=1)
    make(after, DATA)
    return before, after


def test_what_would_come_out_the_same_is_taken_over_down_the_chain(made, capsys):
    before, after = made
    old = before.manifest(MAE)
    assert "would take over what it made before" in explain(after, MAE)
    assert "is stale because its input data/main is a newer one" in explain(after, MAE)
    assert "unless its inputs come out the same" in explain(after, KNN)
    kept.set_aside(after)
    for id in (MAE, KNN):
        after.jobs[id].manifest.unlink()  # as Snakemake does
        assert not after.fresh(id) and take_over(after.jobs[id], after)
        assert after.fresh(id)
    new = after.manifest(MAE)
    assert new.taken_over == old.fingerprint != new.fingerprint
    assert new.summary == old.summary and new.created == old.created
    assert new.content == old.content and new.outputs == old.outputs
    said = f"{MAE}: train_s=3.5 (taken over: same content as {old.fingerprint[:12]}; "
    assert said in capsys.readouterr().out
    assert (after.jobs[MAE].output / "encoder/weights").read_text() == "weights x"
    assert (after.jobs[MAE].output / "encoder/weights").stat().st_nlink == 1
    assert not any((after.aside("")).rglob("weights"))
    assert explain(after, MAE) == f"{MAE} is up to date."


@pytest.mark.parametrize("deleted", [True, False], ids=["as DVC does", "by hand"])
def test_outputs_that_an_engine_deleted_come_back(made, deleted):
    _, after = made
    if deleted:
        kept.set_aside(after)
        for path in sorted(after.jobs[MAE].output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        after.jobs[MAE].output.rmdir()
    assert take_over(after.jobs[MAE], after) and after.fresh(MAE)


def tamper(plan) -> None:
    path = plan.jobs[MAE].output / "encoder/weights"
    path.write_text("weights y")


def lose(plan) -> None:
    (kept.place(plan.jobs[MAE], plan) / "encoder/weights").unlink()


@pytest.mark.parametrize("spoil", [tamper, lose])
def test_outputs_that_are_not_those_of_the_manifest_are_computed_again(made, spoil):
    _, after = made
    kept.set_aside(after)
    spoil(after)
    assert not take_over(after.jobs[MAE], after)
    assert not after.jobs[MAE].manifest.exists()
    make(after, MAE)
    assert after.fresh(MAE) and not kept.place(after.jobs[MAE], after).exists()


CHANGES = [
    {"methods__mae__mask_ratio": 0.5},
    {"train": {"epochs": 2}},
    {"grid__runs__mae__set": {"epochs": 3}},
    {"model__depth": 3},
]


@pytest.mark.parametrize("changes", CHANGES, ids=[next(iter(c)) for c in CHANGES])
def test_another_parameter_is_never_taken_over(made, tmp_path, changes):
    after = plan_of(tmp_path, data__seed=1, **changes)
    kept.set_aside(after)
    assert not take_over(after.jobs[MAE], after) and not after.fresh(MAE)
    assert "unless" not in explain(after, MAE)


def test_other_content_above_is_never_taken_over(made, tmp_path):
    _, after = made
    make(after, DATA, text="other pixels")
    kept.set_aside(after)
    assert not take_over(after.jobs[MAE], after)
    make(after, MAE, text="other weights")
    assert not take_over(after.jobs[KNN], after), "its encoder has other weights"
    newer = plan_of(tmp_path, data__seed=2)
    kept.set_aside(newer)
    assert not take_over(newer.jobs[MAE], newer), "its data set has not been made yet"


def test_what_was_read_while_it_was_replaced_is_never_taken_over(tmp_path):
    before, after = plan_of(tmp_path), plan_of(tmp_path, data__seed=1)
    make(before, DATA)
    with running(before.jobs[MAE], before) as run:
        write_atomic(run.out / "value", "of the first")
        make(before, DATA, text="another")
    make(after, DATA, text="another")
    assert before.manifest(MAE).inputs["data"]["content"] == ""
    assert not take_over(after.jobs[MAE], after)


def test_tasks_see_no_fact_that_changes_without_them(trained, capsys):
    folder, run = trained
    run(capsys.readouterr)
    trial = Trial("t", folder, folder / "results/data/main", None, None, 0, None)
    facts = json.loads((trial.data / "data.json").read_text())
    assert set(facts) - set(trial.info) == set(store.TOLD)


def test_other_code_is_never_taken_over(tmp_path):
    root = editable(tmp_path / "code")
    before = plan_of(tmp_path, root)
    make(before, DATA, MAE, KNN)
    with edited(root, "stages/methods/mae.py"), edited(root, "stages/data.py"):
        after = plan_of(tmp_path, root)
        make(after, DATA)
        kept.set_aside(after)
        assert not take_over(after.jobs[MAE], after)
        assert "unless" not in explain(after, MAE)
        make(after, MAE)
        assert take_over(after.jobs[KNN], after), "the edit changed no byte of the encoder"


def test_an_identical_job_that_is_asked_for_again_computes(made):
    before, _ = made
    make(before, DATA, MAE)
    kept.set_aside(before)
    before.jobs[MAE].manifest.unlink()
    assert not take_over(before.jobs[MAE], before)


def test_a_job_killed_while_it_takes_over_does_so_again(made):
    """At each file that it writes or links: there is no manifest, or all of it."""
    _, after = made
    kept.set_aside(after)
    job, old, done = after.jobs[MAE], after.manifest(MAE), False
    for moment in range(1, 12):
        child = os.fork()
        if not child:
            calls = iter(range(1, 100))

            def counted(event, arguments, calls=calls, moment=moment):
                if event in ("os.link", "os.rename", "os.remove") and next(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(counted)
            take_over(job, after)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if after.fresh(MAE):
            assert (job.output / "encoder/weights").read_text() == "weights x"
            done = True
            break
        assert after.manifest(MAE) in (None, old) and kept.same(job, after)
    assert done and moment > 3
    kept.set_aside(after)
    assert not kept.place(job, after).exists()


def test_a_full_disk_leaves_nothing_half_made(made, monkeypatch):
    _, after = made
    kept.set_aside(after)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("stages.kit.job.takeover.os.link", full)
    monkeypatch.setattr("stages.kit.job.takeover.shutil.copyfile", full)
    with pytest.raises(jobs.JobError, match="the disk is full"):
        take_over(after.jobs[MAE], after)
    assert list(after.jobs[MAE].output.iterdir()) == []


def test_where_files_cannot_be_linked_jobs_compute(made, monkeypatch):
    _, after = made

    def refused(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("workflow.plan.kept.os.link", refused)
    kept.set_aside(after)
    assert not kept.place(after.jobs[MAE], after).exists()
    assert not take_over(after.jobs[MAE], after)


def test_what_is_kept_is_bounded_and_pruned(made, tmp_path):
    _, after = made
    kept.set_aside(after)
    places = [kept.place(after.jobs[id], after) for id in (MAE, KNN)]
    assert all((place / "manifest.json").exists() for place in places)
    assert not kept.place(after.jobs[DATA], after).exists(), "data sets are large, and made again"
    content = tiny_content(data__seed=1)
    content["grid"]["runs"] = {"random": {"method": "random"}}
    smaller = load(write_params(tmp_path, content), tmp_path / "results")
    assert set(places) < set(leftovers(smaller))
    prune(smaller)
    assert not any(place.exists() for place in places) and leftovers(smaller) == []


# -------------------------------------------------------------------------------------------------
# real data sets


def image(path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images in class folders, and the command of each stage on them."""
    folder = tmp_path_factory.mktemp("trained")
    for n in range(40):  # splits that are given do not move with the number of images
        split = ("train", "val", "test", "train")[n // 2 % 4]
        image(folder / f"photos/{split}/{'ab'[n % 2]}/{n}.png", n)
    content = tiny_content(tasks={"knn": {"k": [1]}}) | {
        "data": {"source": f"folder:{folder / 'photos'}", "image_size": 16, "quarantine_limit": 0.5}
    }
    content["grid"]["runs"] = {"mae": {"method": "mae"}}
    params = write_params(folder, content)
    files = ["--params", str(params), "--results", str(folder / "results")]

    def run(said) -> dict[str, str]:
        assert data.main(files) == 0
        assert pretrain.main(["--run", "mae-s0", *files]) == 0
        assert transfer.main(["--run", "mae-s0", "--task", "knn", *files]) == 0
        return {line.partition(":")[0]: line for line in said().out.splitlines()}

    return folder, run


def bytes_of(folder) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_a_broken_image_more_trains_nothing_again(trained, capsys):
    folder, run = trained
    run(capsys.readouterr)
    before = bytes_of(folder / "results/pretrain/mae-s0")
    (folder / "photos/train/a/broken.png").write_bytes(b"no image")
    said = run(capsys.readouterr)
    assert "taken over" in said[MAE] and "taken over" in said[KNN] and "taken" not in said[DATA]
    assert bytes_of(folder / "results/pretrain/mae-s0") == before
    facts = json.loads((folder / "results/data/main/data.json").read_text())
    assert facts["quarantine"]["count"] == 1, "the report is told of it"

    pixels = np.array(Image.open(folder / "photos/train/a/0.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "photos/train/a/0.png")
    said = run(capsys.readouterr)
    assert not any("taken over" in line for line in said.values()), "one bit of one pixel"


@pytest.mark.parametrize(
    "key, value", [("normalise", "imagenet"), ("store_size", 20), ("memory_map_gb", 0)]
)
def test_pixels_that_are_read_otherwise_are_other_content(trained, capsys, key, value):
    folder, run = trained
    text = (folder / "params.yaml").read_text()
    run(capsys.readouterr)
    content = yaml.safe_load(text)
    content["data"][key] = value
    try:
        write_params(folder, content)
        assert "taken over" not in run(capsys.readouterr)[MAE]
    finally:
        (folder / "params.yaml").write_text(text)


# -------------------------------------------------------------------------------------------------
# both engines


@pytest.fixture(scope="module", params=["snakemake", "dvc"])
def engine(request, tmp_path_factory):
    """A lab whose images were read and learnt from by one engine, and what runs it again."""
    folder = tmp_path_factory.mktemp("engines")
    images = folder / "my images"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    it = Lab.create(folder / "a lab", PARAMS | {"data": {"source": f"folder:{images}",
                                                         "image_size": 16}})  # fmt: skip
    words = ("repro", "-q") if request.param == "dvc" else ()
    command = getattr(it, request.param)
    command(*words)
    it.ran()

    def run() -> set[str]:
        command(*words)
        assert it.right() and it.pending() == set() and it.changed() <= {"watch/files"}
        assert not any((it.folder / "results/.kept").rglob("manifest.json"))
        return set(it.ran())

    return it, images, run


def test_engines_run_again_what_comes_out_otherwise_and_nothing_else(engine):
    it, images, run = engine
    everything = set(it.plan().jobs)
    (images / "b.png").write_bytes(b"")
    assert run() == {DATA, "report"}, "an empty image changes nothing"
    said = it.python("-m", "workflow.plan", "--explain", MAE)
    assert said == f"{MAE} is up to date.\n"

    with (it.folder / "stages/kit/keyed.py").open("a") as file:  # of data and report
        file.write("# edited\n")
    assert run() == {DATA, "report"}

    (images / "b.png").write_bytes(b"2")
    assert run() == everything, "another pixel"

    (images / "c.png").write_bytes(b"")
    it.set(0.5)
    assert run() == {DATA, MAE, KNN, "report"}, "a parameter as well"

    (images / "c.png").unlink()
    with (it.folder / "stages/targets/dino.py").open("a") as file:
        file.write("# edited\n")
    below = {"target/teacher", "target/vqkd", "pretrain/beitv2-s0", "transfer/beitv2-s0/knn"}
    # DVC remembers this data set
    assert run() - {DATA} == {"report"} | below, "the code of a teacher as well"

    (images / "d.png").write_bytes(b"")
    (it.folder / "results/pretrain/mae-s0/value").write_text("tampered")
    assert run() == {DATA, MAE, "report"}, "the task took over, since the weights are the same"


@pytest.mark.parametrize("name", ["snakemake", "dvc"])
def test_engines_read_a_data_set_that_was_refused_only_once(name, tmp_path):
    it = Lab.create(tmp_path / "a lab", PARAMS)
    command, words = getattr(it, name), ("repro", "-q") if name == "dvc" else ()
    (it.folder / "refuse").touch()
    command(*words, good=False)
    assert it.ran() == [DATA] and not it.plan().fresh(DATA)
    (it.folder / "refuse").unlink()
    command(*words)
    assert set(it.ran()) == set(it.plan().jobs) - {DATA}
    assert it.right() and it.pending() == set() and it.changed() <= {"watch/files"}
