"""params.yaml: what is wrong is said before anything runs, all at once, in words that help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_content, write_params

from workflow.params import check, read
from workflow.params.reading import read_yaml
from workflow.params.schema import schema, schema_text
from workflow.params.sections import Contrast
from workflow.plugins import ROOT, ParamsError, plugin, plugin_names

BAD = [  # changes to good parameters, and what the message must contain
    ({"data__sorce": 1}, ["data.sorce: unknown key (found 1)", "did you mean 'source'"]),
    ({"dta": {}}, ["dta: unknown key", "did you mean 'data'"]),
    ({"data__image_size": "big"}, ["data.image_size", "integer", "found 'big'"]),
    ({"data__image_size": 16.5}, ["data.image_size", "found 16.5"]),
    ({"data__image_size": 18}, ["data.image_size: 18 is not a multiple of model.patch_size 4"]),
    ({"data__val_fraction": 1.0}, ["data.val_fraction", "less than 1", "found 1.0"]),
    (
        {"data__val_fraction": 0.6, "data__test_fraction": 0.5},
        ["data.val_fraction", "leave nothing to train on"],
    ),
    ({"data__store_size": 8}, ["data.store_size: 8 is smaller than data.image_size 16"]),
    (
        {"data__normalise": "imagnet"},
        ["data.normalise: must be 'dataset' or 'imagenet'", "did you mean 'imagenet'"],
    ),
    (
        {"data__source": "shpaes"},
        ["data.source: no source is called 'shpaes'", "did you mean 'shapes'", "folder:PATH"],
    ),
    (
        {"data__source": "folder"},
        ["data.source: folder needs something to read, as in folder:PATH"],
    ),
    (
        {"data__source": "shapes:here"},
        ["data.source: shapes takes nothing after the colon (found 'here')"],
    ),
    (
        {"data__options__trian": 5},
        ["data.options.trian: unknown key (found 5)", "did you mean 'train'"],
    ),
    ({"data": 3}, ["data: must be a section with keys source, image_size", "found 3"]),
    ({"model__num_heads": 3}, ["model.embed_dim: 16 is not a multiple of model.num_heads 3"]),
    (
        {"model__name": "vit_tinny_patch16_224"},
        ["model.name: timm has no model", "did you mean 'vit_tiny_patch16_224'"],
    ),
    (
        {"model__name": "vit9000"},
        ["model.name: timm has no model 'vit9000'; expected a ViT such as vit_tiny_patch16_224"],
    ),
    (
        {"model__name": "resnet50"},
        ["model.name: 'resnet50' is a ResNet, expected a ViT such as vit_tiny_patch16_224"],
    ),
    ({"model__name": 7}, ["model.name: must be text (found 7)"]),
    (
        {"model__depth": "2"},
        ["params.yaml:\n  model.depth: must be a valid integer or a list (found '2')"],
    ),
    (
        {"model__depth": [2, "a"]},
        ["params.yaml:\n  model.depth.1: must be a valid integer (found 'a')"],
    ),
    ({"model__depth": 0}, ["model.depth", "greater than or equal to 1", "found 0"]),
    (
        {"train__batch_size": 10, "train__micro_batch": 4},
        ["train.micro_batch: micro_batch 4 does not divide batch_size 10"],
    ),
    (
        {"train__micro_batch": 32},
        ["micro_batch 32 does not divide batch_size 16", "never make a whole step"],
    ),
    (
        {"methods__mae__micro_batch": 5},
        ["methods.mae.micro_batch: micro_batch 5 does not divide batch_size 16"],
    ),
    (
        {"train__precision": "fp8"},
        ["train.precision: must be 'auto', 'fp32', 'bf16' or 'fp16' (found 'fp8')"],
    ),
    ({"train__epochs": -3}, ["train.epochs: must be greater than or equal to 1 (found -3)"]),
    ({"train__epochs": None}, ["train.epochs: must be a valid integer (found nothing)"]),
    (
        {"train__save_minutes": float("inf")},
        ["train.save_minutes: must be a finite number (found inf)"],
    ),
    ({"train__epochs": True}, ["train.epochs", "integer", "found True"]),
    ({"methods__mae__mask_ratio": 1.0}, ["methods.mae.mask_ratio", "1.0"]),
    (
        {"methods__mae__mask_ratio": 1.5},
        ["methods.mae.mask_ratio: found 1.5, expected a number in (0, 1)"],
    ),
    ({"methods__mae__lr": float("nan")}, ["methods.mae.lr: must be a finite number (found nan)"]),
    ({"methods__mae__betas": 0.9}, ["methods.mae.betas: must be a list (found 0.9)"]),
    ({"methods__mae__betas": [0.9, 0.9, 0.9]}, ["methods.mae.betas: must have at most 2 items"]),
    ({"methods__mae__mask_ratio": "0.5"}, ["methods.mae.mask_ratio", "number", "found '0.5'"]),
    (
        {"methods__mae__mask_ratoi": 0.5},
        ["methods.mae.mask_ratoi: unknown key (found 0.5)", "did you mean 'mask_ratio'"],
    ),
    ({"methods__mae__epochs": 0}, ["methods.mae.epochs", "greater than or equal to 1"]),
    (
        {"methods__mea": {}},
        ["methods.mea: there is no method 'mea'", "stages/methods/mea.py", "did you mean 'mae'"],
    ),
    (
        {"targets__vqkd__kind": "vqdk"},
        ["targets.vqkd: there is no kind of target 'vqdk'", "did you mean 'vqkd'"],
    ),
    ({"targets__vqkd__kind": None}, ["targets.vqkd.kind: required, one of dino", "vqkd"]),
    (
        {"targets__vqkd__upstream": "techer"},
        ["targets.vqkd.upstream: no target is called 'techer'", "did you mean 'teacher'"],
    ),
    (
        {"targets__vqkd__upstream": None},
        [
            "targets.vqkd.upstream: kind vqkd needs an upstream target that produces features",
            "'teacher'",
        ],
    ),
    (
        {"targets__vqkd__upstream": ["teacher"]},
        [
            "targets.vqkd.upstream: kind vqkd needs an upstream target",
            "such as 'teacher' (found ['teacher'])",
        ],
    ),
    (
        {"targets__teacher__upstream": "vqkd"},
        ["targets.teacher.upstream: kind dino takes no upstream"],
    ),
    ({"targets__vqkd__upstream": "vqkd"}, ["targets.vqkd.upstream", "circle: vqkd -> vqkd"]),
    ({"targets__vqkd__seed": -1}, ["targets.vqkd.seed: must be a whole number", "-1"]),
    ({"targets__vqkd__lr": "fast"}, ["targets.vqkd.lr", "found 'fast'"]),
    ({"targets__Teacher": {"kind": "dino"}}, ["targets.Teacher", "lower-case"]),
    (
        {"grid__contrasts": {"gain": {"of": ["maee"], "against": ["mae"]}}},
        ["grid.contrasts.gain.of: there is no run 'maee'", "did you mean 'mae'"],
    ),
    (
        {"grid__contrasts": {"gain": {"of": ["mae"], "against": ["x-*"]}}},
        ["grid.contrasts.gain.against: there is no run 'x-*'"],
    ),
    ({"grid__contrasts": {"gain": {"of": ["mae"]}}}, ["grid.contrasts.gain.against", "required"]),
    ({"tasks__knnn": {}}, ["tasks.knnn: there is no task 'knnn'", "did you mean 'knn'"]),
    ({"tasks__linear__epoch": 3}, ["tasks.linear.epoch: unknown key", "did you mean 'epochs'"]),
    ({"tasks__knn__micro_batch": 8}, ["tasks.knn.micro_batch: unknown key"]),
    (
        {"grid__runs__mae__method": "meh"},
        ["grid.runs.mae.method: 'meh' has no section under methods"],
    ),
    (
        {"grid__runs__beitv2__target": None},
        ["grid.runs.beitv2.target: method beitv2 needs a target that produces ids, such as 'vqkd'"],
    ),
    (
        {"grid__runs__beitv2__target": "vqdk"},
        ["grid.runs.beitv2.target: no target is called 'vqdk'", "did you mean 'vqkd'"],
    ),
    (
        {"grid__runs__beitv2__target": "teacher"},
        ["'teacher' produces features, method beitv2 needs ids"],
    ),
    (
        {"grid__runs__mae__target": "vqkd"},
        ["grid.runs.mae.target: method mae takes no target (found 'vqkd')"],
    ),
    ({"grid__runs__mae__set": {"mask_ratio": 1.5}}, ["grid.runs.mae.set.mask_ratio", "1.5"]),
    (
        {"grid__runs__mae__set": {"maks_ratio": 0.5}},
        ["grid.runs.mae.set.maks_ratio: unknown key", "did you mean 'mask_ratio'"],
    ),
    ({"grid__runs__mae__sets": {}}, ["grid.runs.mae.sets: unknown key", "did you mean 'set'"]),
    ({"grid__runs__mae__seeds": [1, 1]}, ["grid.runs.mae.seeds: [1, 1] must be different"]),
    ({"grid__runs__mae-s0": {"method": "mae"}}, ["grid.runs.mae-s0", "ends like a seed"]),
    ({"grid__runs__../x": {"method": "mae"}}, ["grid.runs.../x", "'../x'", "lower-case"]),
    ({"grid__seeds": []}, ["grid.seeds: must have at least 1 item (found [])"]),
    ({"grid__seeds": 0}, ["grid.seeds: must be a list (found 0)"]),
    ({"grid__runs": None}, ["grid.runs: must be a section with keys and values (found nothing)"]),
    (
        {"grid__runs__mae": None},
        ["grid.runs.mae: must be a section with keys method, target", "(found nothing)"],
    ),
    (
        {"grid__runs__mae__set": 3},
        ["grid.runs.mae.set: must be a section with keys and values (found 3)"],
    ),
    (
        {"grid__contrasts": {"gain": 3}},
        ["grid.contrasts.gain: must be a section with keys of, against (found 3)"],
    ),
    (
        {"grid__runs__mae__stages": 0},
        ["grid.runs.mae.stages: must be greater than or equal to 1 (found 0)"],
    ),
    (
        {"grid__runs__mae__stages": 2},
        [
            "grid.runs.mae.stages: method mae takes no target, expected one that learns from features",
            "(found 2)",
        ],
    ),
    (
        {"grid__runs__x": {"method": "dbot", "target": "techer"}, "methods__dbot": {}},
        [
            "grid.runs.x.target: no target is called 'techer'; did you mean 'teacher'?",
            "or run:NAME",
        ],
    ),
    (
        {"grid__runs__x": {"method": "dbot", "target": "run:randm"}, "methods__dbot": {}},
        ["grid.runs.x.target: no run is called 'randm'; did you mean 'random'?"],
    ),
    (
        {"compute__device": "mps"},
        ["compute.device: must be auto, cpu, cuda or cuda:<number> (found 'mps')"],
    ),
    ({"compute__workers": -1}, ["compute.workers", "-1"]),
    (
        {"compute__compile": "always"},
        ["compute.compile: must be 'auto', True or False (found 'always')"],
    ),
    ({"experiment": "My experiment"}, ["experiment: 'My experiment' must be lower-case"]),
]


@pytest.mark.parametrize(
    "changes, words", BAD, ids=[f"{n}-{next(iter(c))}" for n, (c, _) in enumerate(BAD)]
)
def test_bad_input_is_named_before_anything_runs(changes, words):
    with pytest.raises(ParamsError) as caught:
        check(tiny_content(**changes))
    for word in words:
        assert word in str(caught.value)


def test_good_params_are_complete_and_typed():
    it = check(
        tiny_content(
            methods__mae={"epochs": 7}, grid__runs__mae__set={"mask_ratio": 0.5, "batch_size": 8}
        )
    )
    mae = it.runs["mae"].settings
    assert (
        mae.config["mask_ratio"] == 0.5
        and mae.config["norm_pix"] is True
        and mae.config["betas"] == (0.9, 0.95)
    )
    assert mae.train == {
        "epochs": 7,
        "batch_size": 8,
        "micro_batch": None,
        "precision": "fp32",
        "save_minutes": 5,
        "nan_skips": 0,
    }
    assert it.runs["beitv2"].settings.train["epochs"] == 1
    assert it.targets["vqkd"].upstream == "teacher" and it.targets["vqkd"].seed == 0
    assert it.source[:2] == ("shapes", None) and it.source[2].config["train"] == 48


def test_all_problems_are_listed_at_once():
    with pytest.raises(ParamsError) as caught:
        check(
            tiny_content(
                methods__mae__mask_ratio=2.0,
                tasks__knn__kk=1,
                model__num_heads=3,
                grid__runs__mae__target="x",
            )
        )
    said = str(caught.value)
    assert "4 problems" in said
    assert all(
        k in said
        for k in (
            "methods.mae.mask_ratio",
            "tasks.knn.kk",
            "model.embed_dim",
            "grid.runs.mae.target",
        )
    )


def test_combinations_with_the_model_are_checked_for_the_runs_that_use_them():
    with pytest.raises(ParamsError, match="early_layer"):
        check(tiny_content(methods__beitv2__early_layer=9))
    with pytest.raises(ParamsError, match="methods.mae.mask_ratio"):
        check(tiny_content(data__image_size=8, methods__mae__mask_ratio=0.9))
    check(tiny_content(methods__beitv2__early_layer=9, grid__runs__beitv2__set={"head_depth": 0}))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["is empty"]),
        ("# nothing\n", ["is empty"]),
        ("- a\n- b\n", ["holds a list", "expected sections"]),
        ("just words", ["holds a str"]),
        ("a: [1, 2", ["is not YAML"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["is not YAML"]),
        (
            "data: {source: folder:photos}\n",
            ["line 1: found folder:photos within brackets, expected quotes"],
        ),
        (
            "data:\n\timage_size: 8\n",
            ["params.yaml, line 2, column 1: is not YAML", "spaces, not with tabs"],
        ),
        (
            "data:\n  seed:0\n  image_size: 8\n",
            ["line 3, column 13: is not YAML", "a space missing after a colon"],
        ),
        ("data: {{root}}\n", ["line 1: found brackets as a key, expected a word"]),
        ("1: a\n'1': b\n", ["line 2: key '1' is given twice"]),
        (
            "experiment: a\nexperiment: b\n",
            ["line 2: key 'experiment' is given twice (first in line 1)"],
        ),
        ("data: {image_size: 8, image_size: 16}\n", ["line 1: key 'image_size' is given twice"]),
        ("experiment: x\n", ["data: required", "model: required", "grid: required"]),
        (b"\xff\xfe\x00", ["params.yaml"]),
    ],
)
def test_files_that_are_no_params(tmp_path, text, words):
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ParamsError) as caught:
        read(path)
    for word in words:
        assert word in str(caught.value)


def test_keys_are_read_as_they_are_written_and_merged_ones_are_not_twice_there(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("base: &b {on: 0}\na: {in: &x {<<: *b, on: 1}}\nb: {<<: *x, on: 2}\n1e3: 4\n")
    assert read_yaml(path) == {"base": {"on": 0}, "a": {"in": {"on": 1}}, "b": {"on": 2}, "1e3": 4}


def test_a_missing_file_names_its_neighbours(tmp_path):
    write_params(tmp_path, tiny_content())
    with pytest.raises(ParamsError, match=r"parms.yaml: no such file; did you mean 'params.yaml'"):
        read(tmp_path / "parms.yaml")
    with pytest.raises(ParamsError, match="no such file$"):
        read(tmp_path / "elsewhere" / "params.yaml")


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", "1.0e-03", ".1e-2", "0.001"])
def test_numbers_are_read_as_yaml_1_2_does(tmp_path, number):
    path = tmp_path / "params.yaml"
    path.write_text(
        yaml.safe_dump(tiny_content(methods__mae__lr="NUMBER")).replace("NUMBER", number)
    )
    assert read(path).runs["mae"].settings.config["lr"] == 0.001


# ---------------------------------------------------------------------------------------------------
# plug-ins


def tree(folder: Path, **files: str) -> Path:
    """A project with nothing but plug-ins: name -> source text."""
    for kind in ("sources", "targets", "methods", "tasks"):
        (folder / "stages" / kind).mkdir(parents=True)
    for name, text in files.items():
        (folder / "stages" / f"{name.replace('__', '/')}.py").write_text(text)
    return folder


def test_a_plugin_is_read_without_being_imported(tmp_path):
    root = tree(tmp_path, methods__boom='''
import a_module_that_does_not_exist
from dataclasses import dataclass
TARGET: str | None = "ids"
LABELS = True
raise SystemExit("imported")
@dataclass(frozen=True)
class Config:
    """Settings."""
    size: int = 3
    mode: Literal["a", "b"] = "a"
    rates: tuple[float, ...] = (0.1, 0.2)
    names: list[str] = field(default_factory=list)
    def __post_init__(self):
        if self.size > 5:
            raise ValueError("size: too large")
''')  # fmt: skip
    found = plugin("method", "boom", root)
    assert found.literals == {
        "TARGET": "ids",
        "UPSTREAM": None,
        "PRODUCES": None,
        "LABELS": True,
        "TRAINS": True,
        "SPREADS": False,
        "ENCODERS": ("vit",),
    }
    assert found.fields == ["size", "mode", "rates", "names"]
    assert plugin_names("method", root) == ["boom"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1\n", "has no dataclass named Config"),
        ("class Config:\n    pass\n", "must be decorated with @dataclass"),
        ("@dataclass(frozen=True)\nclass Config:\n    x: Path = 1\n", "may use only builtins"),
        ("@dataclass(frozen=True)\nclass Config:\n    x: list = []\n", "cannot be read"),
        ("def f(:\n", "line 1"),
        (
            "TARGET = f()\n@dataclass(frozen=True)\nclass Config:\n    pass\n",
            "TARGET must be a literal",
        ),
    ],
)
def test_a_plugin_that_cannot_be_read_is_named(tmp_path, text, words):
    with pytest.raises(ParamsError, match=words) as caught:
        plugin("method", "bad", tree(tmp_path, methods__bad=text))
    assert "stages/methods/bad.py" in str(caught.value)


@pytest.mark.parametrize("name", ["../../etc/passwd", "__init__", "a b", ""])
def test_a_plugin_name_cannot_leave_its_folder(name):
    with pytest.raises(ParamsError, match="there is no method"):
        plugin("method", name)


def test_cycles_of_targets_are_shown(tmp_path):
    head = '@dataclass(frozen=True)\nclass Config:\n    pass\nPRODUCES = "features"\nUPSTREAM = "features"\n'
    root = tree(tmp_path, targets__t=head, methods__mae=head, tasks__knn=head, sources__shapes=head)
    targets = {n: {"kind": "t", "upstream": u} for n, u in (("a", "b"), ("b", "c"), ("c", "a"))}
    grid = {"runs": {"x": {"method": "mae"}}}
    content = tiny_content() | {
        "targets": targets,
        "methods": {"mae": {}},
        "tasks": {"knn": {}},
        "grid": grid,
    }
    content["data"] = {"source": "shapes", "image_size": 16}
    with pytest.raises(
        ParamsError, match="targets.a.upstream: goes round in a circle: a -> b -> c -> a"
    ):
        check(content, root=root)


@pytest.mark.parametrize("kind", ["method", "target", "task", "source"])
def test_every_plugin_of_the_project_can_be_read(kind):
    assert plugin_names(kind)
    for name in plugin_names(kind):
        found = plugin(kind, name)
        assert len(found.defaults()) == len(found.fields), (
            f"{found.path}: every setting needs a default"
        )
        if kind == "target":
            assert found.literals["PRODUCES"] in ("ids", "features")


# --------------------------------------------------------------------------------------------
# committed files


@pytest.mark.parametrize(
    "path",
    ["params.yaml", *(f"presets/{p.name}" for p in sorted((ROOT / "presets").glob("*.yaml")))],
)
def test_every_params_file_of_the_project_is_good_and_fits_the_schema(path):
    import jsonschema

    read(ROOT / path)
    text = (ROOT / path).read_text().splitlines()[0]
    assert text.startswith("# yaml-language-server: $schema=")
    assert (
        (ROOT / path).parent / text.partition("=")[2]
    ).resolve() == ROOT / "workflow/schemas/params.schema.json"

    content = read_yaml(ROOT / path)
    jsonschema.Draft202012Validator(schema()).validate(content)


def test_the_committed_schema_is_up_to_date():
    committed = (ROOT / "workflow/schemas/params.schema.json").read_text()
    assert committed == schema_text(), (
        "python -m workflow.params --schema > workflow/schemas/params.schema.json"
    )


def test_the_schema_knows_plugins_and_refuses_typing_errors():
    import jsonschema

    good = json.loads(json.dumps(tiny_content()))
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(good)
    for changes in (
        {"methods__mae__mask_ratoi": 1},
        {"tasks__knnn": {}},
        {"targets__vqkd__codez": 1},
        {"trian": {}},
    ):
        assert not validator.is_valid(tiny_content(**changes)), changes


def test_the_plan_needs_no_torch():
    code = "import sys, workflow.plan as p; p.load(); assert not {'torch', 'timm', 'mlflow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_command_line(tmp_path):
    def run(path):
        return subprocess.run(
            [sys.executable, "-m", "workflow.params", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    good = run(write_params(tmp_path, tiny_content()))
    assert good.returncode == 0 and "4 runs, 2 targets, 3 tasks" in good.stdout
    bad = run(write_params(tmp_path, tiny_content(methods__mae__mask_ratoi=1)))
    assert bad.returncode == 1 and "mask_ratoi" in bad.stderr and "Traceback" not in bad.stderr


def test_contrasts_name_runs_by_pattern():
    contrast = Contrast(of=["hog-*", "mae"], against=["*-one"])
    runs = ["mae", "hog-one", "hog-two", "pixels-one"]
    assert contrast.sides(runs) == {
        "of": ["mae", "hog-one", "hog-two"],
        "against": ["hog-one", "pixels-one"],
    }
