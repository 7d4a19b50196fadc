"""Params files that nobody means: each is refused at once, in one line that says where."""

from __future__ import annotations

import time

import pytest

from tests.conftest import tiny_content, write_params
from workflow.messages import ParamsError
from workflow.params import read

NINE = "*{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}, *{0}"


def multiplied(form: str) -> str:
    """Aliases of aliases: 9^9 values in ten lines."""
    lines = [f"{a}: &{a} {form.format(NINE.format(b))}" for a, b in zip("bcdefghij", "abcdefghi")]
    return "\n".join(["a: &a {x: 1}", *lines])


TEXTS = {
    "aliases that multiply": (multiplied("[{0}]"), "line 6: found more than 50000 values"),
    "merges that multiply": (multiplied("{{<<: [{0}]}}"), "line 6: found more than 50000 values"),
    "an alias of itself": ("a: &a [1, *a]", "line 1: found an alias of what it stands in"),
    "brackets": ("a: " + "[" * 9000, "line 1: found more than 30 levels"),
    "braces": ("a: " + "{a: " * 9000, "line 1: found more than 30 levels"),
    "hyphens": ("- " * 9000 + "a", "line 1: found more than 30 levels"),
    "5,000 digits": (
        "seed: 1" + "0" * 5000,
        "line 1: found '1000.*expected a number of at most 18",
    ),
    "400 digits": ("seed: 1" + "0" * 400, "line 1: found '1000.*expected a number of at most 18"),
    "hexadecimal": (
        "a:\n b: 0x" + "f" * 99,
        "line 2: found '0xff.*expected a number of at most 18",
    ),
    "base 60": ("a: 1" + ":59" * 99, "line 1: found '1:59.*expected a number of at most 18"),
    "half a character": ('a: "\\ud800"', r"line 1: found '\\ud800', expected text without"),
    "NUL": ('a: ["x\\0"]', r"line 1: found 'x\\x00', expected text without"),
    "no day": ("a: 2020-13-45", "line 1: found '2020-13-45', expected quotes around a text"),
    "no time": ("a: !!timestamp x", "line 1: found 'x', expected quotes around a text"),
    "no number": ("a: !!float x", "line 1: found 'x', expected a number"),
    "code": ("a: !!python/object/apply:os.abort []", "is not YAML: could not determine"),
    "megabytes": ("# " + "x" * 1_000_000, "found 1000002 bytes, expected at most 1000000"),
    "many values": ("a: [" + "1," * 60_000 + "]", "found more than 50000 values"),
    "not UTF-8": (b"a: \xff", "cannot be read: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("text, says", TEXTS.values(), ids=TEXTS)
def test_yaml_that_would_not_end(tmp_path, text, says):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(ParamsError, match=says) as error:
        read(path)
    assert time.process_time() - began < 5
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 250


@pytest.mark.parametrize("path", ["/dev/zero", "/", "a\0b", "/" + "x" * 300])
def test_paths_that_are_no_params_file(path):
    with pytest.raises(ParamsError) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_what_looks_odd_and_is_good(tmp_path):
    content = tiny_content()
    good = write_params(tmp_path, content)
    text = good.read_text()
    good.write_text("\ufeff" + text.replace("seeds:\n  - 0", "seeds: [0x1, 4294967295]"))
    assert read(good).params.grid.seeds == [1, 4294967295]


VALUES = [
    ({"grid__seeds": [2**32]}, "grid.seeds: found 4294967296, expected numbers below 4294967296"),
    ({"grid__seeds": [-1]}, "grid.seeds: [-1] must be different whole numbers, none below 0"),
    ({"grid__seeds": list(range(1001))}, "grid.seeds: must have at most 1000 items"),
    ({"data__seed": 10**15}, "data.seed: must be less than 4294967296"),
    ({"targets__teacher__seed": 10**15}, "targets.teacher.seed: must be less than 4294967296"),
    ({"train__epochs": 10**9}, "train.epochs: must be less than or equal to 1000000"),
    ({"train__batch_size": 10**9}, "train.batch_size: must be less than or equal to 1000000"),
    ({"model__embed_dim": 10**9}, "model.embed_dim: found 1000000000, expected at most 65,536"),
    ({"model__depth": 10**9}, "model.depth: found 1000000000, expected at most 1,000"),
    ({"methods__mae__decoder_depth": 10**9}, "methods.mae.decoder_depth: found 10000000"),
    ({"methods__mae__lr": -1e-3}, "methods.mae.lr: found -0.001, expected a number above 0"),
    ({"methods__mae__lr": 1e9}, "methods.mae.lr: found 1000000000.0, expected at most 1,000"),
    ({"methods__mae__weight_decay": -1}, "methods.mae.weight_decay: found -1"),
    ({"methods__beitv2__layer_scale": -1}, "methods.beitv2.layer_scale: found -1"),
    ({"methods__random__depth": -1}, "methods.random.depth: found -1"),
    ({"tasks__linear__lrs": [-0.1]}, "tasks.linear.lrs: found "),
    ({"compute__workers": 10**6}, "compute.workers: must be less than or equal to 1024"),
    ({"experiment": "x" * 300}, "experiment: found a name of 300 characters ('xxxx"),
    ({"methods__" + "m" * 200: {"kind": "mae"}}, "methods: found a name of 200 characters"),
    ({"grid__runs__" + "r" * 101: {"method": "mae"}}, "grid.runs: found a name of 101 characters"),
]


@pytest.mark.parametrize("changes, says", VALUES, ids=[next(iter(c))[:40] for c, _ in VALUES])
def test_values_beyond_reason(tmp_path, changes, says):
    with pytest.raises(ParamsError) as error:
        read(write_params(tmp_path, tiny_content(**changes)))
    lines = str(error.value).splitlines()
    assert any(line.strip().startswith(says) for line in lines), str(error.value)
    assert max(map(len, lines)) < 400


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\rb"])
def test_a_name_with_a_control_character_is_told_in_one_line(tmp_path, name):
    with pytest.raises(ParamsError) as error:
        read(write_params(tmp_path, tiny_content(grid__runs={name: {"method": "mae"}})))
    first, line = str(error.value).split("\n")
    assert line.startswith(f"  grid.runs.{ascii(name)[1:-1]}: the name ") and line.isprintable()


def test_the_longest_names_are_written(tmp_path):
    """Names of 100 characters become folders, and files with more in their names."""
    from tests.plans import finish, plan_of
    from workflow.engines.dvc import follow

    run, task = "r" * 100, "t" * 100
    plan = plan_of(
        tmp_path,
        grid={"runs": {run: {"method": "mae"}}, "seeds": [2**32 - 1]},
        tasks={task: {"kind": "knn"}},
    )
    finish(plan)
    (tmp_path / "workflow").mkdir()
    plan.root = tmp_path
    follow(plan)
    assert plan.fresh(f"transfer/{run}-s{2**32 - 1}/{task}")
