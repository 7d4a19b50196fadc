"""The numbers of every method, target and task stay what they were.

tests/golden/*.json: 20 steps of each method and target in float32 on one thread, then every task.
The first release's code wrote the losses and scores. Later code wrote the weights, whose last bits
depend on the order of sums in torch's own patch convolution, and the losses of dmjd, whose norms
got their published eps. Losses agree within rounding on any processor. Where torch and the
processor's instructions are those of the file, weights and scores agree to the last bit. A change
that is meant to change a number writes it there, and says why in its commit.
"""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import write_params
from workflow.plan import load

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {
    "data": ["--name"],
    "target": ["--name"],
    "pretrain": ["--run"],
    "transfer": ["--run", "--task"],
}


def digest(path: Path) -> str:
    """Of names, types and bytes of all weights, whatever the file's header says."""
    found = hashlib.sha256()
    for key, value in sorted(load_file(path).items()):
        found.update(
            key.encode() + str(value.dtype).encode() + value.contiguous().numpy().tobytes()
        )
    return found.hexdigest()


def rows(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["vit", "swin", "convvit"])
def test_numbers_are_what_they_were(name, tmp_path):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    here = (torch.__version__, torch.backends.cpu.get_cpu_capability())
    exact = here == (golden["torch"], golden["cpu"])
    params = write_params(tmp_path, yaml.safe_load((GOLDEN / f"{name}.yaml").read_text()))
    words = ["--params", str(params), "--results", str(tmp_path / "results")]
    plan, known = load(params, tmp_path / "results"), set(golden["jobs"])
    for job in plan.jobs.values():
        if job.stage == "report":
            continue
        given = zip(OPTIONS[job.stage], job.name.split("/"), strict=True)
        argv = [word for pair in given for word in pair]
        assert import_module(f"stages.{job.stage}").main([*argv, *words]) == 0
        expected = golden["jobs"].get(job.id, {})
        known.discard(job.id)
        if "loss" in expected:
            assert rows(job.output / "history.jsonl") == pytest.approx(expected["loss"], rel=2e-4)
        if exact and "weights" in expected:
            file = "target.safetensors" if job.stage == "target" else "encoder/model.safetensors"
            assert digest(job.output / file) == expected["weights"], job.id
        if exact and "metrics" in expected:
            metrics = json.loads((job.output / "metrics.json").read_text())
            assert {key: metrics[key] for key in expected["metrics"]} == expected["metrics"], job.id
    assert not known, "jobs of the file that the plan does not have"
