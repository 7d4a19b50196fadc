"""What a change of a parameter or a file makes stale, and how that is explained."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import tiny_content, write_params
from tests.plans import MAE, changed, editable, edited, finish, plan_of
from workflow.plan.explain import explain
from workflow.plugins import ROOT, ParamsError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The project's stages in a folder where they can be edited."""
    return editable(tmp_path_factory.mktemp("project"))


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
        "stages/kit/job/told.py": set(),
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
        assert not top & {"stages", "torch", "timm"}, f"{path} imports {top}"


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
