"""Runs that teach others: chains of stages, wrong teachers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plans import changed, finish, plan_of
from workflow.plan import load
from workflow.plan.explain import explain
from workflow.plugins import ROOT, ParamsError

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
