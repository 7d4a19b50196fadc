"""The plan: which job depends on what, what a change touches, why a job would run."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_content, write_params

from workflow.engines.dvc import follow, loops, note, runs_text, stage_name
from workflow.engines.snakemake import STALE, reconcile
from workflow.manifest import Manifest
from workflow.plan import load
from workflow.plan.__main__ import main
from workflow.plan.digest import Files
from workflow.plan.explain import explain
from workflow.plan.leftovers import leftovers, prune
from workflow.plugins import ROOT, ParamsError

MAE = {
    "pretrain/mae-s0",
    "transfer/mae-s0/knn",
    "transfer/mae-s0/linear",
    "transfer/mae-s0/finetune",
    "report",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The project's stages in a folder where they can be edited."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(
        ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "workflow").mkdir()
    return folder


def plan_of(folder: Path, root: Path = ROOT, **changes):
    return load(write_params(folder, tiny_content(**changes)), folder / "results", root)


def changed(before, after) -> set[str]:
    ids = {*before.jobs, *after.jobs}
    return {
        i
        for i in ids
        if i not in before.jobs
        or i not in after.jobs
        or before.jobs[i].fingerprint != after.jobs[i].fingerprint
    }


def finish(plan, *ids: str) -> None:
    """What running these jobs leaves behind, without the work."""
    for id in ids or plan.jobs:
        job = plan.jobs[id]
        job.output.mkdir(parents=True, exist_ok=True)
        for file in job.files[1:]:
            file.write_text("x")
        (job.output / "value").write_text("x")
        inputs = {
            role: {"job": i, "fingerprint": plan.jobs[i].fingerprint}
            for role, i in job.inputs.items()
        }
        manifest = Manifest(
            fingerprint=job.fingerprint,
            params=job.params,
            code=job.hashes,
            inputs=inputs,
            outputs={"value": ""},
        )
        job.manifest.write_text(manifest.text())


# -------------------------------------------------------------------------------------------------
# jobs


def test_jobs_inputs_and_folders(tmp_path):
    plan = plan_of(tmp_path, grid__seeds=[0, 3])
    assert [i for i in plan.jobs if i.startswith(("data", "target", "pretrain"))] == [
        "data/main", "target/teacher", "target/vqkd",
        *(f"pretrain/{r}-s{s}" for r in ("mae", "beitv2", "random", "supervised") for s in (0, 3)),
    ]  # fmt: skip
    jobs = plan.jobs
    assert jobs["data/main"].inputs == {}
    assert jobs["target/vqkd"].inputs == {"data": "data/main", "upstream": "target/teacher"}
    assert jobs["pretrain/mae-s3"].inputs == {"data": "data/main"}
    assert jobs["pretrain/beitv2-s3"].inputs == {"data": "data/main", "target": "target/vqkd"}
    assert jobs["transfer/mae-s3/knn"].inputs == {"data": "data/main", "encoder": "pretrain/mae-s3"}
    assert jobs["report"].inputs == {id: id for id in jobs if id != "report"}
    assert jobs["transfer/mae-s3/knn"].output == tmp_path / "results/transfer/mae-s3/knn"
    assert jobs["pretrain/mae-s3"].params["seed"] == 3
    for number, job in enumerate(jobs.values()):
        above = job.inputs.values()
        assert all(list(jobs).index(i) < number for i in above), "inputs come first"
        assert len(job.fingerprint) == 64
        json.dumps(job.params)
    assert len({j.fingerprint for j in jobs.values()}) == len(jobs)


def test_targets_that_no_run_needs_are_left_out(tmp_path):
    plan = plan_of(tmp_path, grid={"runs": {"mae": {"method": "mae"}}})
    assert not [i for i in plan.jobs if i.startswith("target")]


def test_what_the_report_is_told_about_labels(tmp_path):
    targets = {"teacher": {"kind": "pretrained"}, "vqkd": {"kind": "vqkd", "upstream": "teacher"}}
    runs = plan_of(tmp_path, targets=targets).jobs["report"].params["runs"]
    assert runs["supervised-s0"]["labels"] and not runs["beitv2-s0"]["labels"]
    assert runs["beitv2-s0"]["target"] == "vqkd" and runs["beitv2-s0"]["label_targets"] == [
        "teacher"
    ]
    assert runs["mae-s0"] == {
        "run": "mae",
        "method": "mae",
        "kind": "mae",
        "data": "main",
        "model": "main",
        "tasks": ["knn", "linear", "finetune"],
        "seed": 0,
        "target": None,
        "teacher": None,
        "stage": 1,
        "labels": False,
        "trains": True,
        "label_targets": [],
    }
    assert runs["random-s0"]["trains"] is False


def test_the_same_params_give_the_same_fingerprints(tmp_path):
    one, two = plan_of(tmp_path / "a"), plan_of(tmp_path / "b")
    assert not changed(one, two)
    explicit = plan_of(
        tmp_path / "c",
        methods__mae={"mask_ratio": 0.75},
        compute={"workers": 3, "tracking": True, "compile": True},
    )
    assert not changed(one, explicit), "writing a default, or how to run, changes nothing"


# -------------------------------------------------------------------------------------------------
# runs that teach others


CHAIN = {"method": "dbot", "target": "run:random", "stages": 3}


def taught(folder: Path, root: Path = ROOT, **runs):
    """The plan of the untrained encoder, a supervised one, and `runs`."""
    return plan_of(folder, root, methods__dbot={}, grid__runs=runs)


def refused(folder: Path, **runs) -> str:
    with pytest.raises(ParamsError) as caught:
        taught(folder, **runs)
    return str(caught.value)


def test_a_chain_is_one_run_per_stage_each_the_teacher_of_the_next(tmp_path):
    plan = plan_of(tmp_path, methods__dbot={}, grid__runs={"dbot": CHAIN}, grid__seeds=[0, 3])
    jobs = plan.jobs
    assert "pretrain/dbot-s0" not in jobs
    for seed in (0, 3):
        above = f"pretrain/random-s{seed}"
        for stage in (1, 2, 3):
            job = jobs[f"pretrain/dbot-{stage}-s{seed}"]
            assert job.inputs == {"data": "data/main", "target": above}, "of the same seed"
            assert job.params["stage"] == stage and job.params["run"] == f"dbot-{stage}"
            assert f"transfer/dbot-{stage}-s{seed}/linear" in jobs, "every stage is evaluated"
            above = job.id
    assert "stage" not in jobs["pretrain/mae-s0"].params
    assert all(
        list(jobs).index(i) < n for n, j in enumerate(jobs.values()) for i in j.inputs.values()
    )
    facts = jobs["report"].params["runs"]["dbot-3-s0"]
    assert (facts["teacher"], facts["stage"], facts["target"]) == ("dbot-2", 3, None)


def test_a_longer_chain_leaves_the_stages_before_it_alone(tmp_path):
    before, after = (taught(tmp_path / str(n), dbot=CHAIN | {"stages": n}) for n in (1, 3))
    added = {
        f"{kind}/dbot-{n}-s0{task}"
        for n in (2, 3)
        for kind, task in (
            ("pretrain", ""),
            *(("transfer", f"/{t}") for t in ("knn", "linear", "finetune")),
        )
    }
    assert changed(before, after) == added | {"report"}


def test_a_chain_written_out_is_the_same_and_order_does_not_matter(tmp_path):
    short = taught(tmp_path / "a", dbot=CHAIN)
    long = {f"dbot-{n}": {"method": "dbot", "target": f"run:dbot-{n - 1}"} for n in (3, 2)}
    plan = taught(tmp_path / "b", **long, **{"dbot-1": {"method": "dbot", "target": "run:random"}})
    assert not changed(short, plan)
    jobs = list(plan.jobs)
    assert all(
        jobs.index(i) < n for n, j in enumerate(plan.jobs.values()) for i in j.inputs.values()
    )


def test_any_run_or_target_of_features_may_be_the_first_teacher(tmp_path):
    plan = taught(
        tmp_path,
        a={"method": "dbot", "target": "run:mae", "stages": 2},
        b={"method": "dbot", "target": "teacher"},
        c={"method": "dbot", "target": "run:beitv2"},
    )
    inputs = {n: plan.jobs[f"pretrain/{n}-s0"].inputs["target"] for n in ("a-1", "a-2", "b", "c")}
    assert inputs == {"a-1": "pretrain/mae-s0", "a-2": "pretrain/a-1-s0", "b": "target/teacher",
                      "c": "pretrain/beitv2-s0"}  # fmt: skip
    assert plan.jobs["pretrain/a-1-s0"].params["stage"] == 1, (
        "stages of this method, not of its teacher's"
    )
    assert "stage" not in plan.jobs["pretrain/b-s0"].params


def test_labels_seen_by_a_teacher_are_told_down_the_chain(tmp_path):
    targets = {"weights": {"kind": "pretrained"}}
    plan = plan_of(
        tmp_path,
        methods__dbot={},
        targets=targets,
        grid__runs={
            "a": {"method": "dbot", "target": "run:supervised", "stages": 2},
            "b": {"method": "dbot", "target": "weights"},
            "c": {"method": "dbot", "target": "run:b"},
            "d": CHAIN,
        },
    )
    runs = plan.jobs["report"].params["runs"]
    names = ("a-1", "a-2", "b", "c", "d-3", "supervised")
    assert {n: runs[f"{n}-s0"]["label_targets"] for n in names} == {
        "a-1": ["supervised"], "a-2": ["supervised"], "b": ["weights"], "c": ["weights"], "d-3": [],
        "supervised": [],
    }  # fmt: skip
    assert not runs["a-2-s0"]["labels"], "it saw none itself"


WRONG_TEACHERS = [
    ({"a": {"method": "dbot", "target": "run:b"}, "b": {"method": "dbot", "target": "run:a"}},
     "grid.runs.a.target: goes round in a circle: run:a -> run:b -> run:a"),
    ({"a": {"method": "dbot", "target": "run:a"}},
     "grid.runs.a.target: goes round in a circle: run:a -> run:a"),
    ({"a": {"method": "dbot", "target": "run:a-2", "stages": 2}},
     "circle: run:a-1 -> run:a-2 -> run:a-1"),
    ({"a": {"method": "dbot", "target": "run:randon"}},
     "no run is called 'randon'; did you mean 'random'?"),
    ({"a": CHAIN, "b": {"method": "dbot", "target": "run:a"}},
     "grid.runs.b.target: no run is called 'a'; it is a chain: name a stage, as in 'run:a-3'"),
    ({"a": {"method": "dbot", "target": "run:random", "seeds": [0, 5, 6]}},
     "grid.runs.a.target: 'run:random' has seeds [0], expected seed 5, 6 too"),
    ({"a": {"method": "dbot"}},
     "method dbot needs a target that produces patch, such as 'teacher', or run:NAME"),
    ({"a": {"method": "beitv2", "target": "run:mae"}},
     "'run:mae' produces attention, cls, layers and patch, method beitv2 needs ids"),
    ({"a": {"method": "mae", "target": "run:random"}},
     "method mae takes no target (found 'run:random')"),
    ({"a": {"method": "mae", "stages": 2}}, "grid.runs.a.stages: method mae takes no target"),
    ({"a": {"method": "beitv2", "target": "vqkd", "stages": 2}},
     "expected a method that can learn from the encoder of the stage before"),
    ({"a": CHAIN, "a-2": {"method": "mae"}},
     "grid.runs.a.stages: makes a run 'a-2', but there is another"),
    ({"a": CHAIN | {"stages": 0}}, "grid.runs.a.stages: must be greater than or equal to 1"),
    ({"a": CHAIN | {"set": {"mask_ratoi": 1}}}, "grid.runs.a.set.mask_ratoi: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(
    "runs, said", WRONG_TEACHERS, ids=[said[:40] for _, said in WRONG_TEACHERS]
)
def test_teachers_that_cannot_be_are_refused_once_and_clearly(tmp_path, runs, said):
    message = refused(tmp_path, **runs)
    assert said in message
    assert len(message.splitlines()) == 2, message


def test_a_change_runs_the_stages_from_there_on(tmp_path):
    before = taught(tmp_path / "a", dbot=CHAIN)
    kinds = ("pretrain/{}-s0", *(f"transfer/{{}}-s0/{t}" for t in ("knn", "linear", "finetune")))
    method = taught(tmp_path / "b", dbot=CHAIN | {"set": {"epochs": 2}})
    assert changed(before, method) == {k.format(f"dbot-{n}") for k in kinds for n in (1, 2, 3)} | {
        "report"
    }
    first = taught(tmp_path / "c", dbot=CHAIN | {"target": "run:mae"})
    assert changed(before, first) == changed(before, method)
    finish(before)
    plan = load(tmp_path / "c/params.yaml", tmp_path / "a/results")
    assert explain(plan, "pretrain/dbot-1-s0") == (
        "pretrain/dbot-1-s0 would run because its target is pretrain/mae-s0 now, no longer "
        "pretrain/random-s0."
    )
    said = explain(load(tmp_path / "b/params.yaml", tmp_path / "a/results"), "pretrain/dbot-3-s0")
    assert "grid.runs.dbot.set.epochs changed from 1 to 2" in said
    assert "its input pretrain/dbot-2-s0 would run" in said


def test_weights_in_a_folder_are_part_of_the_fingerprint(tmp_path):
    folder = tmp_path / "weights"
    targets = {"weights": {"kind": "pretrained", "weights": f"local:{folder}"}}
    runs = {"mae": {"method": "mae"}, "dbot": {"method": "dbot", "target": "weights"}}

    def plan():
        content = tiny_content(methods__dbot={}, targets=targets)
        content["grid"]["runs"] = runs
        return load(write_params(tmp_path, content), tmp_path / "results")

    with pytest.raises(ParamsError, match="targets.weights.weights: .*weights does not exist"):
        plan()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"one")
    first = plan()
    assert not changed(first, plan())
    finish(first)
    (folder / "model.safetensors").write_bytes(b"two")  # of the same size
    second = plan()
    assert {i for i in changed(first, second) if "mae" not in i} == changed(first, second)
    assert {"target/weights", "pretrain/dbot-s0", "report"} < changed(first, second)
    assert "what targets.weights.weights names changed" in explain(second, "target/weights")
    assert loops(second)["plan"]["watch"], "so that DVC looks every time"
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="is not there"):
        assert not changed(first, plan()), (
            "a finished target stays usable without the weights that it was made from"
        )


# -------------------------------------------------------------------------------------------------
# what a change touches


RUNS = ("mae", "beitv2", "random", "supervised")
TOUCHES = [
    ({"methods__mae__mask_ratio": 0.5}, MAE),
    ({"grid__runs__mae__set": {"epochs": 3}}, MAE),
    ({"tasks__knn__k": [4]}, {*(f"transfer/{r}-s0/knn" for r in RUNS), "report"}),
    ({"targets__vqkd__codes": 8}, {"target/vqkd", *(j.replace("mae", "beitv2") for j in MAE)}),
    ({"experiment": "other"}, {"report"}),
]  # fmt: skip


@pytest.mark.parametrize("changes, touched", TOUCHES, ids=[next(iter(c)) for c, _ in TOUCHES])
def test_a_change_touches_what_depends_on_it_and_nothing_else(tmp_path, changes, touched):
    assert changed(plan_of(tmp_path / "a"), plan_of(tmp_path / "b", **changes)) == touched


@pytest.mark.parametrize("changes", [{"data__seed": 1}, {"data__options": {"train": 40}}])
def test_data_touches_all(tmp_path, changes):
    before = plan_of(tmp_path / "a")
    assert changed(before, plan_of(tmp_path / "b", **changes)) == set(before.jobs)


def test_one_more_seed_or_run_touches_no_other_run(tmp_path):
    before = plan_of(tmp_path / "a")
    more = changed(before, plan_of(tmp_path / "b", grid__runs__mae__seeds=[0, 1]))
    assert more == {
        "pretrain/mae-s1",
        *(f"transfer/mae-s1/{t}" for t in ("knn", "linear", "finetune")),
        "report",
    }


def edited(root: Path, path: str):
    """Append a comment to a file (or make it) for the time of a test."""

    class Edit:
        def __enter__(self):
            self.file = root / path
            self.text = self.file.read_text() if self.file.exists() else None
            self.file.write_text((self.text or "") + "\n# edited\n")

        def __exit__(self, *_):
            self.file.unlink() if self.text is None else self.file.write_text(self.text)

    return Edit()


def test_code_is_part_of_what_uses_it(tmp_path, root):
    before = plan_of(tmp_path, root)
    everything = set(before.jobs)
    training = everything - {"data/main", "report"}
    pretrain = {i for i in everything if i.startswith("pretrain")}
    transfer = {i for i in everything if i.startswith("transfer")}
    cases = {
        "stages/methods/mae.py": MAE,
        "stages/tasks/knn.py": {i for i in everything if i.endswith("/knn")} | {"report"},
        "stages/transfer.py": transfer | {"report"},
        "stages/pretrain.py": pretrain | transfer | {"report"},
        "stages/target.py": {i for i in training if "target/" in i or "beitv2" in i} | {"report"},
        "stages/encoders/vit.py": training | {"report"},
        "stages/kit/keyed.py": everything,
        "stages/sources/shapes.py": everything,
        "workflow/checks.py": everything,
        "stages/report.py": {"report"},
        "stages/reporting/templates/new.html": {"report"},
        # what nobody imports
        "stages/kit/new_file.py": set(),
        "stages/kit/parts/new_file.py": set(),
        "stages/methods/new_method.py": set(),
        "stages/sources/folder.py": set(),
        "stages/encoders/swin.py": set(),
        "stages/reporting/notes.txt": set(),
        # what only watches
        "stages/kit/job/track.py": set(),
        "stages/kit/job/courier.py": set(),
    }
    for path, touched in cases.items():
        with edited(root, path):
            assert changed(before, plan_of(tmp_path, root)) == touched, path
    assert not changed(before, plan_of(tmp_path, root))


def test_an_edit_of_a_kit_file_touches_exactly_the_jobs_whose_closure_holds_it(tmp_path, root):
    before = plan_of(tmp_path, root)
    kit = [p for p in (root / "stages/kit").rglob("*.py") if p.stem not in ("track", "courier")]
    unlike = set()
    for file in kit:
        path = file.relative_to(root).as_posix()
        direct = {i for i, job in before.jobs.items() if path in job.hashes}
        below = {i for i, job in before.jobs.items() if direct & _above(before, job.id)}
        with edited(root, path):
            assert changed(before, plan_of(tmp_path, root)) == direct | below, path
        unlike.add(frozenset(direct))
    assert len(unlike) > 5, "the kit is not one room with one lock"


def _above(plan, id: str) -> set[str]:
    inputs = set(plan.jobs[id].inputs.values())
    return inputs.union(*(_above(plan, i) for i in inputs)) if inputs else inputs


def test_a_new_method_is_one_new_file(tmp_path, root):
    text = """
from stages.kit.parts import fresh

@dataclass(frozen=True)
class Config:
    depth: int = 3

used = Config().depth
"""
    with edited(root, "stages/methods/fresh.py"), edited(root, "stages/kit/parts/fresh.py"):
        (root / "stages/methods/fresh.py").write_text(text)
        plan = plan_of(tmp_path, root, methods__fresh={}, grid__runs__fresh={"method": "fresh"})
    job = plan.jobs["pretrain/fresh-s0"]
    assert job.params["method"] == {
        "name": "fresh",
        "kind": "fresh",
        "config": {"depth": 3},
        "labels": False,
        "trains": True,
    }
    assert {"stages/methods/fresh.py", "stages/kit/parts/fresh.py"} < set(job.hashes)


STAGES = ("data", "target", "pretrain", "transfer", "report")


def imported(path: str) -> set[str]:
    """Modules that a file imports, anywhere in it; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(folder: str) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py"))


def test_imports_point_one_way():
    stages = {f"stages.{stage}" for stage in STAGES}
    for path in files("stages"):
        if path.startswith("stages/cost/"):  # it runs them, and no stage imports it
            continue
        assert "stages.cost" not in imported(path), path
        assert not imported(path) & (stages - {"stages.data"}), f"{path} imports a stage"
    for path in files("stages/kit"):
        folders = {f"stages.{f}" for f in ("methods", "tasks", "sources", "targets", "encoders")}
        assert not imported(path) & folders, f"{path} imports plug-ins"
    for path in files("workflow"):
        top = {module.split(".")[0] for module in imported(path)}
        assert not top & {"torch", "timm", "stages"}, f"{path} imports {top}"


def test_the_plan_needs_no_torch(tmp_path):
    params = write_params(tmp_path, tiny_content())
    code = f"""
import sys
from workflow.plan import load
import workflow.engines.dvc, workflow.engines.snakemake
load({str(params)!r}, "results")
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert not any(name.startswith("stages") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------
# several data sets, encoders, and more ways in which jobs follow one another


SEVERAL = {
    "data": {
        "photos": {"source": "shapes", "image_size": 16},
        "other": {"source": "shapes", "image_size": 24, "options": {"train": 40}},
        "idle": {"source": "shapes", "image_size": 16},
    },
    "model": None,
    "models": {
        "small": {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 16, "depth": 2,
                  "num_heads": 2},
        "wide": {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 32, "depth": 2,
                 "num_heads": 2},
    },
    "targets": {"vqkd": {"upstream": "run:mae", "seed": 1, "data": "photos", "model": "small"}},
    "methods": {"mae": {}, "beitv2": {"min_block": 1}},
    "tasks": {"knn": {}, "elsewhere": {"kind": "knn", "data": "other"}},
    "grid": {
        "seeds": [0, 1],
        "runs": {
            "mae": {"method": "mae", "data": "photos", "model": "small",
                    "tasks": {"elsewhere": None}},
            "beitv2": {"method": "beitv2", "target": "vqkd", "data": "photos", "model": "wide",
                       "tasks": {"knn": {"k": [7]}}},
        },
    },
}  # fmt: skip


def several(folder: Path, **changes):
    content = tiny_content() | SEVERAL | changes
    content = {key: value for key, value in content.items() if value is not None}
    return load(write_params(folder, content), folder / "results")


def test_runs_choose_data_and_encoder_and_may_change_a_task(tmp_path):
    jobs = several(tmp_path).jobs
    assert "data/idle" not in jobs, "no run needs it"
    assert jobs["transfer/beitv2-s0/elsewhere"].inputs == {
        "data": "data/other",
        "encoder": "pretrain/beitv2-s0",
    }
    assert jobs["transfer/beitv2-s0/elsewhere"].params["image_size"] == 24
    assert jobs["transfer/beitv2-s0/knn"].params["image_size"] == 16
    assert "transfer/mae-s0/elsewhere" not in jobs
    config = {n: jobs[f"transfer/{n}-s0/knn"].params["task"]["config"] for n in ("mae", "beitv2")}
    assert list(config["beitv2"]["k"]) == [7] and config["mae"]["k"] != config["beitv2"]["k"]
    widths = {n: jobs[f"pretrain/{n}-s0"].params["model"]["config"]["embed_dim"] for n in config}
    assert widths == {"mae": 16, "beitv2": 32}
    report = jobs["report"].params
    assert report["tasks"]["elsewhere"] == {
        "kind": "knn",
        "key": "top1",
        "label": report["tasks"]["knn"]["label"],
        "unit": "%",
    }
    assert report["runs"]["mae-s0"]["tasks"] == ["knn"]
    assert report["runs"]["beitv2-s0"]["model"] == "wide"


def test_a_runs_encoder_may_be_the_upstream_of_a_target(tmp_path):
    plan = several(tmp_path)
    order = list(plan.jobs)
    assert plan.jobs["target/vqkd"].inputs == {"data": "data/photos", "upstream": "pretrain/mae-s1"}
    assert order.index("pretrain/mae-s1") < order.index("target/vqkd")
    assert order.index("target/vqkd") < order.index("pretrain/beitv2-s0")
    for number, job in enumerate(plan.jobs.values()):
        assert all(order.index(i) < number for i in job.inputs.values())
    changed_run = several(
        tmp_path / "b", methods={"mae": {"mask_ratio": 0.5}, "beitv2": {"min_block": 1}}
    )
    assert "target/vqkd" in changed(plan, changed_run)
    item = loops(plan)["plan"]["target"]["vqkd"]
    assert item == {"data": "data/photos", "above": "pretrain/mae-s1"}


def test_labels_of_a_run_are_told_through_a_target_made_from_it(tmp_path):
    runs = SEVERAL["grid"]["runs"] | {
        "supervised": {"method": "supervised", "data": "photos", "model": "small"}
    }
    targets = {"vqkd": SEVERAL["targets"]["vqkd"] | {"upstream": "run:supervised"}}
    plan = several(
        tmp_path,
        targets=targets,
        methods=SEVERAL["methods"] | {"supervised": {}},
        grid=SEVERAL["grid"] | {"runs": runs},
    )
    assert plan.jobs["report"].params["runs"]["beitv2-s0"]["label_targets"] == ["supervised"]


# -------------------------------------------------------------------------------------------------
# what lies on disk


def test_fresh_means_complete_and_made_by_this_plan(tmp_path):
    plan = plan_of(tmp_path)
    assert not plan.fresh("data/main") and plan.manifest("data/main") is None
    finish(plan)
    assert all(plan.fresh(i) for i in plan.jobs)
    (plan.jobs["data/main"].output / "value").unlink()
    assert not plan.fresh("data/main")
    plan.jobs["report"].manifest.write_text("{ half")
    assert plan.manifest("report") is None and not plan.fresh("report")
    other = plan_of(tmp_path, methods__mae__mask_ratio=0.5)
    assert {i for i in other.jobs if not other.fresh(i)} == MAE | {"data/main", "report"}


def stamps(plan) -> dict[str, int]:
    return {i: j.manifest.stat().st_mtime_ns for i, j in plan.jobs.items() if j.manifest.exists()}


def test_reconcile_orders_fresh_ones_and_ages_stale_ones(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan)
    now = (ROOT / "stages/data.py").stat().st_mtime_ns
    for number, job in enumerate(
        reversed(plan.jobs.values())
    ):  # as a checkout may leave them: outputs before inputs
        for file in job.files:
            os.utime(file, ns=(now, now + number * 10**9 + 1))
    reconcile(plan)
    times = stamps(plan)
    assert all(times[i] >= times[d] for i, j in plan.jobs.items() for d in j.inputs.values())
    assert all(f.stat().st_mtime_ns >= times["data/main"] for f in plan.jobs["report"].files)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    reconcile(plan)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}, "twice is once"

    other = plan_of(tmp_path, methods__mae__mask_ratio=0.5)
    reconcile(other)
    assert {i for i, t in stamps(other).items() if t == STALE} == MAE
    reconcile(plan)
    times = stamps(plan)
    assert STALE not in times.values() and all(
        times[i] >= times[d] for i, j in plan.jobs.items() for d in j.inputs.values()
    )


def test_reconcile_leaves_contents_and_unfinished_jobs_alone(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan, "data/main", "target/teacher")
    running = plan.jobs["pretrain/mae-s0"].output
    running.mkdir(parents=True)
    (running / "history.jsonl").write_text("{}")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in running.rglob("*")}
    reconcile(plan)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in running.rglob("*")} == before


def test_leftovers_are_listed_and_pruned_only_on_request(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan)
    smaller = plan_of(tmp_path, grid={"runs": {"random": {"method": "random"}}}, tasks={"knn": {}})
    names = {str(p.relative_to(tmp_path / "results")) for p in leftovers(smaller)}
    assert {
        "target/vqkd",
        "pretrain/mae-s0",
        "transfer/mae-s0/knn",
    } <= names and "pretrain/random-s0" not in names
    reconcile(smaller)
    assert plan.jobs["pretrain/mae-s0"].manifest.exists()
    prune(smaller)
    assert (
        not plan.jobs["pretrain/mae-s0"].output.exists()
        and plan.jobs["pretrain/random-s0"].manifest.exists()
    )


# -------------------------------------------------------------------------------------------------
# explain


def test_explain_says_which_key_file_or_input(tmp_path, root):
    plan = plan_of(tmp_path, root)
    assert "pretrain/mae-s0 would run because it has not been run" in explain(
        plan, "pretrain/mae-s0"
    )
    finish(plan)
    assert all(explain(plan, i) == f"{i} is up to date." for i in plan.jobs)

    def say(id, **changes):
        return explain(plan_of(tmp_path, root, **changes), id)

    assert (
        say("pretrain/mae-s0", methods__mae__mask_ratio=0.5)
        == "pretrain/mae-s0 would run because methods.mae.mask_ratio changed from 0.75 to 0.5."
    )
    assert "grid.runs.mae.set.mask_ratio changed from 0.75 to 0.6" in say(
        "pretrain/mae-s0", grid__runs__mae__set={"mask_ratio": 0.6}
    )
    assert "methods.mae.epochs changed from 1 to 2" in say(
        "pretrain/mae-s0", methods__mae__epochs=2
    )
    assert "train.epochs changed from 1 to 3" in say("pretrain/mae-s0", train__epochs=3)
    assert "tasks.knn.k changed from [3] to [5]" in say("transfer/mae-s0/knn", tasks__knn__k=[5])
    assert "targets.vqkd.codes changed" in say("target/vqkd", targets__vqkd__codes=8)
    assert "data.options.train changed from 48 to 32" in say(
        "data/main", data__options={"train": 32}
    )
    assert "its input data/main would run (data.options.train changed" in say(
        "pretrain/mae-s0", data__options={"train": 32}
    )
    assert (
        say("pretrain/beitv2-s0", methods__mae__mask_ratio=0.5)
        == "pretrain/beitv2-s0 is up to date."
    )
    with edited(root, "stages/methods/mae.py"):
        assert (
            say("pretrain/mae-s0")
            == "pretrain/mae-s0 would run because stages/methods/mae.py was edited."
        )
    with edited(root, "stages/kit/extra.py"), edited(root, "stages/methods/mae.py"):
        (root / "stages/methods/mae.py").write_text(
            "import stages.kit.extra\n" + (root / "stages/methods/mae.py").read_text()
        )
        assert "stages/kit/extra.py was added" in say("pretrain/mae-s0")
    (plan.jobs["pretrain/mae-s0"].output / "value").unlink()
    assert "value is missing" in say("pretrain/mae-s0")
    with pytest.raises(ParamsError, match="did you mean 'pretrain/mae-s0'"):
        say("pretrain/mae-s00")


def test_explain_knows_an_input_made_anew(tmp_path):
    plan = plan_of(tmp_path)
    finish(plan)
    other = plan_of(tmp_path, methods__mae__mask_ratio=0.5)
    finish(other, "pretrain/mae-s0")
    assert (
        explain(other, "transfer/mae-s0/knn")
        == "transfer/mae-s0/knn would run because its input pretrain/mae-s0 is a newer one."
    )


# -------------------------------------------------------------------------------------------------
# files of the user


def source_plan(tmp_path: Path, images: str = "images"):
    content = tiny_content()
    content["data"] = {"source": f"folder:{tmp_path / images}", "image_size": 16}
    return load(write_params(tmp_path, content), tmp_path / "results")


def test_a_missing_source_is_told_with_what_is_near(tmp_path):
    (tmp_path / "image").mkdir()
    with pytest.raises(ParamsError, match="images does not exist; did you mean 'image'\\?$"):
        source_plan(tmp_path)
    with pytest.raises(
        ParamsError, match=f"images does not exist .{tmp_path / 'gone'} is no folder.$"
    ):
        source_plan(tmp_path, "gone/deeper/images")


def test_the_files_of_a_source_are_part_of_the_fingerprint(tmp_path):
    with pytest.raises(ParamsError, match="data.source: .*images does not exist"):
        source_plan(tmp_path)
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.png").write_bytes(b"1")
    first = source_plan(tmp_path)
    assert not changed(first, source_plan(tmp_path))
    (tmp_path / "images/a/2.png").write_bytes(b"2")
    second = source_plan(tmp_path)
    assert changed(first, second) == set(first.jobs)
    finish(second)
    (tmp_path / "images/a/2.png").write_bytes(b"22")
    assert f"what folder:{tmp_path / 'images'} holds changed" in explain(
        source_plan(tmp_path), "data/main"
    )
    shutil.rmtree(tmp_path / "images")
    with pytest.warns(UserWarning, match="is not there"):
        assert not changed(second, source_plan(tmp_path)), (
            "pulled results stay usable without their source"
        )


# -------------------------------------------------------------------------------------------------
# command line


def test_command_line(tmp_path, capsys, monkeypatch):
    path = str(write_params(tmp_path, tiny_content()))
    files = ["--params", path, "--results", str(tmp_path / "results")]
    before = (ROOT / "workflow/runs.json").read_bytes()
    assert main(files) == 0
    assert "pretrain/mae-s0" in capsys.readouterr().out
    finish(load(path, tmp_path / "results"), "data/main")
    main(files)
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["data/main"][0] == "fresh" and lines["report"][:2] == ["to", "run"]
    assert main([*files, "--explain", "data/main"]) == 0
    assert capsys.readouterr().out == "data/main is up to date.\n"
    assert main([*files, "--explain", "data/mian"]) == 1
    assert "did you mean 'data/main'" in capsys.readouterr().err
    assert (ROOT / "workflow/runs.json").read_bytes() == before, (
        "other params files leave runs.json alone"
    )


def test_committed_runs_follow_from_params():
    expected = runs_text(load(ROOT / "params.yaml", ROOT / "results"))
    assert (ROOT / "workflow/runs.json").read_text() == expected, "python -m workflow.plan"


def test_code_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ParamsError, match="stages/methods/mae.py: part of the code is missing"):
        Files(tmp_path).hashes(("stages/methods/mae.py",))


# -------------------------------------------------------------------------------------------------
# what DVC follows


def test_dvc_follows_one_file_per_job(tmp_path, root):
    plan = plan_of(tmp_path, root)
    folder = tmp_path / "results/plan"
    assert follow(plan) and not follow(plan), "written only when it differs"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(
        plan.jobs
    )
    assert (folder / "pretrain/mae-s0").read_text() == plan.jobs["pretrain/mae-s0"].fingerprint
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    other = plan_of(tmp_path, root, methods__mae__mask_ratio=0.5)
    assert not follow(other), "the same jobs"
    touched = {p for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert touched == {folder / id for id in MAE}
    fewer = plan_of(tmp_path, root, tasks={"knn": {}}, grid={"runs": {"mae": {"method": "mae"}}})
    assert follow(fewer) and not (folder / "target").is_file()
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(
        fewer.jobs
    )


def test_a_job_that_was_overtaken_by_an_edit_is_recorded_as_what_it_is(tmp_path, root):
    old, new = plan_of(tmp_path, root), plan_of(tmp_path / "b", root, methods__mae__mask_ratio=0.5)
    job = old.jobs["pretrain/mae-s0"]
    note(job, old)
    assert not (old.results / "plan").exists(), "nobody asked for DVC"
    follow(old)
    (old.results / "plan/pretrain/mae-s0").write_text(new.jobs["pretrain/mae-s0"].fingerprint)
    note(job, old)
    assert (old.results / "plan/pretrain/mae-s0").read_text() == job.fingerprint


def test_names_of_stages_for_dvc(tmp_path):
    plan = plan_of(tmp_path)
    names = {id: stage_name(job) for id, job in plan.jobs.items()}
    assert names["data/main"] == "data@main" and names["report"] == "report"
    assert names["transfer/mae-s0/knn"] == "transfer@mae-s0/knn"
    listed = loops(plan)["plan"]
    assert listed["plan"] and not listed["watch"]
    assert listed["transfer"]["mae-s0/knn"] == {
        "run": "mae-s0",
        "task": "knn",
        "data": "data/main",
        "above": "pretrain/mae-s0",
    }
