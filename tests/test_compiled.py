"""kit/train/compiled.py: compiled training against eager training, nothing compiled twice, and what
happens where it fails.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loop import BATCH, ToyBatches, make_run, recipe, rows_of
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified

from stages.kit import eager
from stages.kit.train import compiled, droppath
from stages.kit.train.loop import fit
from tests import tiny

ROOT = Path(__file__).parents[1]
SPEC = tiny.spec()
CHANGES = {"mae": {"decoder_depth": 1}, "beitv2": {"min_block": 1, "drop_path": 0.3}}
CHANGES |= {"dino": {}, "mocov3": {"hidden": 32, "dim": 16}}


@pytest.fixture(autouse=True)
def _forget():
    """Each test compiles for itself."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def made(name: str) -> nn.Module:
    return tiny.method(name, SPEC, **CHANGES[name])


def steps(module: nn.Module, name: str, forward, count: int = 3) -> tuple[list[float], list[int]]:
    """A few steps of plain gradient descent: losses, and how many graphs there are after each."""
    losses, graphs = [], []
    with droppath.keyed(module) as drop_by:
        for step in range(count):
            now = tiny.progress(step=step)
            drop_by(now)
            loss = forward(tiny.batch(tiny.module(name), SPEC), now)["loss"]
            loss.backward()
            with torch.no_grad():
                for p in module.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=0.05)
                        p.grad = None
            if hasattr(module, "after_step"):
                module.after_step(now)
            losses.append(loss.item())
            graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


# The tracer and the joint graph are torch's; turning graphs into C++ takes 20 s for each method, so
# the toy below does it.
@pytest.mark.parametrize(
    "name, backend",
    [("mae", "aot_eager"), ("beitv2", "aot_eager"), ("dino", "eager"), ("mocov3", "eager")],
)
def test_a_compiled_method_trains_as_it_does_and_is_compiled_once(name, backend):
    plain, module, said = made(name), made(name), []
    keys = list(module.state_dict())
    expected, _ = steps(plain, name, plain)
    found, graphs = steps(module, name, compiled.forward(module, said.append, backend), count=3)
    assert found == pytest.approx(expected, rel=1e-5) and len(set(expected)) == 3
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert graphs[0] > 0 and set(graphs) == {
        graphs[0]
    }  # the step, the draws, drop path: nothing is compiled again
    assert list(module.state_dict()) == keys and not said


def broken(graph, inputs):
    raise OSError("no compiler here\nand much more")


def broken_backward(graph, inputs):
    """Compiles the forward pass."""
    return aot_module_simplified(
        graph, inputs, fw_compiler=lambda g, _: g.forward, bw_compiler=broken
    )


@pytest.mark.parametrize("backend", [broken, broken_backward])
def test_where_compiling_fails_training_goes_on_and_says_why_once(backend, monkeypatch):
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    plain, module, said = made("beitv2"), made("beitv2"), []  # a forward of several graphs
    expected, _ = steps(plain, "beitv2", plain)
    assert steps(module, "beitv2", compiled.forward(module, said.append, "any"))[0] == expected
    assert len(said) == 1 and said[0].endswith("no compiler here); training goes on without")


def test_auto_compiles_long_trainings_on_cuda():
    long, short = compiled.STEPS, compiled.STEPS - 1
    assert compiled.wanted("auto", "cuda:1", long)
    assert not compiled.wanted("auto", "cuda", short) and not compiled.wanted("auto", "cpu", long)
    assert compiled.wanted(True, "cpu", 1) and not compiled.wanted(False, "cuda", long)


class Small(nn.Module):
    """Dropout, keyed noise, and something counted in the forward pass."""

    def __init__(self, stop=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(()))
        self.stop = stop

    def forward(self, batch, progress):
        self.seen.add_(len(batch["view"]))
        return {
            "loss": (self.body(batch["view"] + progress.uniform("noise", 6)) - 1).square().mean()
        }

    def after_step(self, progress):
        if progress.step == self.stop:
            signal.raise_signal(signal.SIGTERM)


def test_the_loop_compiles_on_request_and_resumes_to_the_byte(tmp_path, capfd):
    """With the real compiler: equal to an eager run up to rounding, dropout included, and to itself
    when resumed.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler: {error}")

    def trained(name: str, compile: bool, stop: int | None = None):
        module, run = Small(stop), make_run(tmp_path / name)
        run.compute = {"compile": compile}
        fit(module, ToyBatches(), recipe(), run, seed=5)
        return module.state_dict(), rows_of(run)

    eager, rows = trained("eager", False)
    assert not counters["stats"]
    whole, compiled_rows = trained("whole", True)
    assert counters["stats"]["unique_graphs"] == 1 and "not compiled" not in capfd.readouterr().err
    for key, value in eager.items():
        torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert whole["seen"] == 12 * BATCH
    assert [row["loss"] for row in compiled_rows] == pytest.approx(
        [row["loss"] for row in rows], rel=1e-4
    )
    with pytest.raises(SystemExit):
        trained("cut", True, stop=4)
    resumed, resumed_rows = trained("cut", True)
    assert resumed_rows == compiled_rows
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_the_loop_goes_on_where_there_is_no_compiler(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        torch._dynamo,
        "lookup_backend",
        lambda name: lambda graph, inputs, **options: broken(graph, inputs),
    )
    states = []
    for name, wanted in (("eager", False), ("without", True)):
        module, run = Small(), make_run(tmp_path / name)
        run.compute = {"compile": wanted}
        fit(module, ToyBatches(), recipe(), run, seed=5)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (
        capfd.readouterr().err.count(
            "toy: not compiled (OSError: no compiler here); training goes on without"
        )
        == 1
    )


NEVER = (
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "triton",
    "mlflow",
    "datasets",
    "scipy",
    "jinja2",
)


def test_a_stage_is_imported_without_what_few_of_its_jobs_need():
    """The tracer of torch.compile takes a second of CPU time, most of what an untrained job has."""
    code = "import sys; from stages import pretrain, target, transfer; "
    code += f"print([name for name in {NEVER} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_stand_in_for_the_tracer_answers_and_is_gone():
    code = """
import sys
from stages.kit.nets import encoders
from torchvision.ops.roi_align import is_compile_supported
assert "torch._dynamo" not in sys.modules
print(is_compile_supported("cpu"), torch._dynamo.utils.is_compile_supported("cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", "import torch" + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "True True\n", done.stdout + done.stderr


class Marked:
    @eager.eager
    def method(self):
        return torch.compiler.is_compiling()


@eager.constant
def marked():
    return 1


def test_marks_are_handed_over_where_the_names_lead():
    eager.hand_over()
    assert Marked.method._torchdynamo_disable and not eager._noted
    compiled = torch.compile(lambda: Marked().method(), backend="eager")
    assert compiled() is False and marked._dynamo_marked_constant

    with pytest.raises(ValueError, match="local function"):
        eager.eager(lambda: None)
