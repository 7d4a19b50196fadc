"""What a job asks a cluster for, and the profiles that hand it on."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys

import pytest
import yaml

from stages.cost import table
from stages.cost.rehearsal import Cost
from tests.lab import ROOT, Lab
from tests.plans import finish, plan_of
from workflow import expected, machine
from workflow.engines.limits import MINUTES, Limits
from workflow.files import write_json

JOB = "pretrain/mae-s0"


def measured(plan, seconds: float, memory_mb: float, **more) -> Limits:
    """The limits when a rehearsal found so much for every job."""
    cost = Cost(seconds=seconds, memory_mb=memory_mb)
    write_json(expected.file(plan), table.record(plan, dict.fromkeys(plan.jobs, cost)) | more)
    return Limits(plan)


def took(plan, id: str, seconds: float, memory_mb: float, device: str = "cpu") -> None:
    finish(plan, id)
    made = dataclasses.replace(
        plan.manifest(id), wall_s=seconds, peak_memory_mb=memory_mb, device=device
    )
    plan.jobs[id].manifest.write_text(made.text())


def test_without_a_measure_a_stage_has_its_limit_and_memory_grows_with_the_image(tmp_path):
    small = Limits(plan_of(tmp_path / "a"))
    large = Limits(plan_of(tmp_path / "b", data__image_size=224))
    assert small.minutes(JOB) == MINUTES["pretrain"] and small.memory(JOB) == 8000
    assert large.memory(JOB) == large.memory("data/main") == 32000
    assert small.minutes("report") == 60
    assert JOB in small.unknown() and "data/main" not in small.unknown()


def test_a_rehearsal_of_this_very_job_counts_four_times_and_half_an_hour(tmp_path):
    plan = plan_of(tmp_path)
    limits = measured(plan, 3600, 1000, start_s=0)
    assert limits.minutes(JOB) == 30 + 4 * 60
    assert limits.memory(JOB) == 2000 + 1500
    assert limits.minutes(JOB, attempt=3) == 3 * 270 and limits.memory(JOB, 2) == 7000
    assert limits.unknown() == []
    other = plan_of(tmp_path, methods__mae__mask_ratio=0.5)
    assert Limits(other).minutes(JOB) == MINUTES["pretrain"], "another job"


def test_a_cost_without_a_gpu_says_nothing_of_a_job_with_one(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, compute__device="auto")
    measured(plan, 60, 1000)
    monkeypatch.setattr(machine, "gpus_here", lambda: 1)
    limits = Limits(plan)
    assert limits.minutes(JOB) == MINUTES["pretrain"]
    took(plan, JOB, 60, 500, device="cpu")
    assert Limits(plan).minutes(JOB) == MINUTES["pretrain"]
    took(plan, JOB, 60, 500, device="cuda:0")
    assert Limits(plan).minutes(JOB) == 34


def test_a_finished_seed_tells_of_the_others_and_never_lowers_a_rehearsal(tmp_path):
    plan = plan_of(tmp_path, grid__seeds=[0, 1])
    took(plan, JOB, 600, 4000)
    limits = Limits(plan)
    assert limits.minutes("pretrain/mae-s1") == 30 + 40
    assert limits.memory("pretrain/mae-s1") == 8000
    assert limits.minutes("pretrain/beitv2-s1") == MINUTES["pretrain"]
    limits = measured(plan, 1200, 1000, start_s=0)
    assert limits.minutes("pretrain/mae-s1") == 30 + 80 and limits.memory(JOB) == 8000


def test_memory_grows_with_the_images_of_the_data_set(tmp_path):
    plan = plan_of(tmp_path)
    splits = {"train": {"count": 900_000}, "val": {"count": 100_000}}
    finish(plan, "data/main")
    write_json(plan.jobs["data/main"].output / "data.json", {"splits": splits})
    assert measured(plan, 1, 1000).memory("transfer/mae-s0/linear") == 3500 + 16000


# ------------------------------------------------------------------------------ through Snakemake


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    it = Lab.create(tmp_path_factory.mktemp("limits") / "a lab")
    here = {"start_s": 0, "gpu": False, "jobs": {}}
    for id, job in it.plan().jobs.items():
        cost = {"seconds": 600, "memory_mb": 1000, "missing": ""}
        here["jobs"][id] = {"fingerprint": job.fingerprint, **cost}
    write_json(it.folder / "work/expected.json", here)
    return it


def asked(said: str, rule: str) -> set[tuple[int, int]]:
    """{(MB, minutes)} of a rule's jobs in a dry run."""
    blocks = re.findall(rf"^rule {rule}:\n(.*?)\n\n", said, re.M | re.S)
    both = [
        [re.search(rf"\b{name}=(\d+)", block) for name in ("mem_mb", "runtime")] for block in blocks
    ]
    return {(int(memory[1]), int(minutes[1])) for memory, minutes in both}


def test_snakemake_asks_for_it_and_a_person_overrides_it(lab):
    said = lab.snakemake("-n", "--set-resources", "target:runtime=7", "transfer:mem_mb=9")
    assert asked(said, "pretrain") == {(3500, 70)}
    assert asked(said, "target") == {(3500, 7)} and asked(said, "transfer") == {(9, 70)}


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_a_profile_hands_it_on(lab, name):
    """A dry run of the profile, without the plug-in of its executor, which is not installed."""
    content = yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text())
    executor = content.pop("executor")
    content = {k: v for k, v in content.items() if not k.startswith(executor)}
    if name == "slurm":
        content["set-resources"] = {"pretrain": {"runtime": 5}}
    (lab.folder / "one").mkdir(exist_ok=True)
    (lab.folder / "one/config.yaml").write_text(yaml.safe_dump(content))
    said = lab.python("-m", "snakemake", "-n", "--profile", "one", "--cores", "8")
    assert asked(said, "pretrain") == {(3500, 5 if name == "slurm" else 70)}
    assert "threads: 8" in said


def test_a_cluster_is_told_when_the_cost_of_jobs_is_not_known(lab, tmp_path):
    it = lab.copy(tmp_path / "another lab")
    said = it.python("-m", "snakemake", "-n", "--jobs", "4")
    assert "is not known" not in said and "ask for the longest" not in said
    (it.folder / "work/expected.json").unlink()
    said = " ".join(it.python("-m", "snakemake", "-n", "--jobs", "4").split())
    assert "the cost of 6 jobs is not known, such as target/teacher: they ask for the long" in said
    assert "--json work/expected.json tells it" in said
    assert "is not known" not in it.snakemake("-n"), "here nobody waits for a limit"


# ----------------------------------------------------------------------------------- Kubernetes

KUBECTL = """#!{python}
import json, os, sys
text = sys.stdin.read() if sys.argv[1] == "create" else ""
open("asked", "a").write(json.dumps([sys.argv[1:], text]) + "\\n")
print(open("answer").read())
sys.exit(int(open("status").read()))
"""


@pytest.fixture
def kubectl(tmp_path):
    """job.py with a kubectl that notes what it is asked: (answer, status, words) -> what both
    said.
    """
    program = tmp_path / "bin/kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def call(answer: str, status: int, *words: str):
        (tmp_path / "answer").write_text(answer)
        (tmp_path / "status").write_text(str(status))
        environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "profiles/kubernetes/job.py"), *words],
            **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
        )
        return done, json.loads((tmp_path / "asked").read_text().splitlines()[-1])

    return call


def test_the_profile_for_kubernetes_submits_what_a_job_asks_for(kubectl, tmp_path):
    profile = yaml.safe_load((ROOT / "profiles/kubernetes/config.yaml").read_text())
    command = profile["cluster-generic-submit-cmd"]
    values = {
        "{rule}": "pretrain",
        "{threads}": "8",
        "{resources.mem_mb}": "3500",
        "{resources.runtime}": "70",
        "{resources.gpu}": "2",
    }
    for key, value in values.items():
        command = command.replace(key, value)
    assert "{" not in command
    done, (words, text) = kubectl("job.batch/x created", 0, *command.split()[2:], "a script.sh")
    job, name = json.loads(text), done.stdout.strip()
    assert words == ["create", "-f", "-"] and done.returncode == 0
    assert job["metadata"]["name"] == name and re.fullmatch("mimlab-pretrain-[0-9a-f]{12}", name)
    spec = job["spec"]
    assert spec["activeDeadlineSeconds"] == 70 * 60 and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == ["/bin/bash", "a script.sh"]
    assert container["workingDir"] == str(tmp_path)
    size = {"memory": "3500M", "nvidia.com/gpu": "2"}
    assert container["resources"] == {"requests": {"cpu": "8", **size}, "limits": size}
    assert container["volumeMounts"][0] == {"name": "lab", "mountPath": "/lab"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "mimlab"}
    done, _ = kubectl("", 1, *command.split()[2:], "a script.sh")
    assert done.returncode == 1 and done.stdout == ""


def test_the_state_of_a_job_in_kubernetes(kubectl):
    def state(answer: str, status: int = 0) -> str:
        done, (words, _) = kubectl(answer, status, "status", "x")
        assert words[:3] == ["get", "job", "x"]
        return done.stdout.strip()

    def ended(kind: str, status: str = "True") -> str:
        return json.dumps({"status": {"conditions": [{"type": kind, "status": status}]}})

    assert state(ended("Complete")) == "success" and state(ended("Failed")) == "failed"
    assert state(ended("Failed", "False")) == state('{"status": {}}') == "running"
    assert state("", 1) == "running", "no answer is no news"
    assert state("") == "failed", "somebody deleted it"
    done, (words, _) = kubectl("", 0, "cancel", "x", "y")
    assert words[:2] == ["delete", "job"] and words[-2:] == ["x", "y"]
