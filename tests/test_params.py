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
from workflow.params.sections import (
    Contrast,
    MethodWords,
    ModelWords,
    TargetWords,
    TaskWords,
    Train,
)
from workflow.plugins import FOLDERS, ROOT, WORDS, ParamsError, declared, module, names

BAD = [  # changes to good parameters, and what the message must contain
    ({"data__sorce": 1}, ["data.sorce: unknown key (found 1)", "did you mean 'source'"]),
    ({"dta": {}}, ["dta: unknown key", "did you mean 'data'"]),
    ({"data__image_size": "big"}, ["data.image_size", "integer", "found 'big'"]),
    ({"data__image_size": 16.5}, ["data.image_size", "found 16.5"]),
    (
        {"data__image_size": 18},
        ["model.patch_size: found 4", "expected a divisor of data.image_size 18"],
    ),
    ({"data__image_size": None}, ["data.image_size: required, but not given"]),
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
        [
            "data.source: no source is called 'shpaes'",
            "did you mean 'shapes'",
            "expected folder:PATH, hub:NAME, parquet:PATH, shapes or surfaces",
        ],
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
    (
        {"model__num_heads": 3},
        ["model.embed_dim: found 16, expected a multiple of num_heads 3"],
    ),
    ({"model__num_head": 2}, ["model.num_head: unknown key", "did you mean 'num_heads'"]),
    (
        {"model__name": "vit_tinny_patch16_224"},
        ["model.name: timm has no model", "did you mean 'vit_tiny_patch16_224'"],
    ),
    (
        {"model__name": "vit9000"},
        ["model.name: timm has no model 'vit9000'", "convvit, pvt, swin, vit"],
    ),
    (
        {"model__name": "resnet50"},
        ["model.name: 'resnet50' is of no known family", "convvit, pvt, swin, vit"],
    ),
    ({"model__name": 7}, ["model.name: must be text (found 7)"]),
    (
        {"model__depth": "2"},
        ["params.yaml:\n  model.depth: must be a valid integer (found '2')"],
    ),
    (
        {
            "model": {
                "name": "swin_tiny_patch4_window7_224",
                "depth": [2, "a"],
                "num_heads": [1, 2],
            }
        },
        ["params.yaml:\n  model.depth.1: must be a valid integer (found 'a')"],
    ),
    ({"model__depth": 0}, ["model.depth: found 0, expected 1 or more"]),
    ({"model__kind": "vti"}, ["model.kind: there is no kind of encoder 'vti'", "'vit'"]),
    ({"model__kind": "swin"}, ["model.name: 'vit_tiny_patch16_224' is no swin"]),
    ({"model__name": None}, ["model.kind: required, one of", "convvit, pvt, swin, vit"]),
    ({"model": None}, ["model: required, but not given"]),
    ({"models": {"b": {}}}, ["models: found beside model, expected one of the two"]),
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
        ["targets.vqkd.kind: there is no kind of target 'vqdk'", "did you mean 'vqkd'"],
    ),
    ({"targets__vqdk": {}}, ["targets.vqdk: there is no kind of target 'vqdk'", "'vqkd'"]),
    ({"targets__vqkd__kind": 3}, ["targets.vqkd.kind: must be text (found 3)"]),
    (
        {"targets__vqkd__upstream": "techer"},
        ["targets.vqkd.upstream: no target is called 'techer'", "did you mean 'teacher'"],
    ),
    (
        {"targets__vqkd__upstream": None},
        [
            "targets.vqkd.upstream: kind vqkd needs an upstream target that produces patch",
            "such as 'teacher', or run:NAME, the encoder of another run",
        ],
    ),
    (
        {"targets__vqkd__upstream": ["teacher"]},
        ["targets.vqkd.upstream: must be text (found ['teacher'])"],
    ),
    (
        {"targets__vqkd__upstream": "run:mea"},
        ["targets.vqkd.upstream: no run is called 'mea'; did you mean 'mae'?"],
    ),
    (
        {"targets__vqkd__upstream": "run:mae", "targets__vqkd__seed": 7},
        ["targets.vqkd.upstream: 'run:mae' has seeds [0], expected seed 7 too"],
    ),
    (
        {"targets__vqkd__upstream": "run:beitv2"},
        ["grid.runs.beitv2.target: goes round in a circle: run:beitv2 -> vqkd -> run:beitv2"],
    ),
    (
        {"targets__vqkd__data": "photo"},
        ["targets.vqkd.data: no data set is called 'photo'", "(allowed: main)"],
    ),
    (
        {"targets__vqkd__model": "swin"},
        ["targets.vqkd.model: no model is called 'swin'", "(allowed: main)"],
    ),
    (
        {"targets__teacher__upstream": "vqkd"},
        ["targets.teacher.upstream: kind dino takes no upstream"],
    ),
    (
        {"targets__vqkd__upstream": "vqkd"},
        ["targets.vqkd.upstream: 'vqkd' produces ids", "circle: vqkd -> vqkd"],
    ),
    (
        {"targets__vqkd__seed": -1},
        ["targets.vqkd.seed: must be greater than or equal to 0 (found -1)"],
    ),
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
    ({"tasks__a": {"kind": "knnn"}}, ["tasks.a.kind: there is no task 'knnn'", "'knn'"]),
    ({"tasks__knn__data": "camvid"}, ["tasks.knn.data: no data set is called 'camvid'"]),
    ({"tasks__knn__after": "linear"}, ["tasks.knn.after: kind knn tests no other task's model"]),
    ({"tasks__KNN": {"kind": "knn"}}, ["tasks.KNN: the name 'KNN' must be lower-case"]),
    (
        {"grid__runs__mae__tasks": {"knnn": {}}},
        ["grid.runs.mae.tasks.knnn: no task is called 'knnn'", "did you mean 'knn'"],
    ),
    (
        {"grid__runs__mae__tasks": {"knn": {"kk": 3}}},
        ["grid.runs.mae.tasks.knn.kk: unknown key (found 3)"],
    ),
    (
        {"grid__runs__mae__tasks": {"knn": {"k": []}}},
        ["grid.runs.mae.tasks.knn.k: found [], expected at least one number of neighbours"],
    ),
    (
        {"grid__runs__mae__tasks": {"knn": {"kind": "linear"}}},
        ["grid.runs.mae.tasks.knn.kind: a run cannot change it"],
    ),
    (
        {"methods__mae__recipe": "publishd"},
        ["methods.mae.recipe: must be 'published' (found 'publishd'); did you mean 'published'?"],
    ),
    (
        {"methods__random__recipe": "published"},
        ["methods.random.recipe: stages/methods/random.py declares no PUBLISHED recipe"],
    ),
    (
        {"grid__runs__random__recipe": "published"},
        ["grid.runs.random.recipe: stages/methods/random.py declares no PUBLISHED recipe"],
    ),
    (
        {"methods__big": {"kind": "mea"}},
        ["methods.big.kind: there is no method 'mea'", "did you mean 'mae'"],
    ),
    (
        {"methods__mae__input_size": 18},
        ["methods.mae.input_size: found 18; model.patch_size: found 4", "of input_size 18"],
    ),
    (
        {"methods__mae": {"input_size": 8, "mask_ratio": 0.9}},
        ["methods.mae.mask_ratio: found 0.9, which hides 4 of 4 patches"],
    ),
    ({"grid__runs__mae__model": "vit"}, ["grid.runs.mae.model: no model is called 'vit'"]),
    ({"grid__runs__mae__data": "vit"}, ["grid.runs.mae.data: no data set is called 'vit'"]),
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
        [
            "grid.runs.beitv2.target: 'teacher' produces attention, cls, layers and patch, method "
            "beitv2 needs ids, such as 'vqkd'"
        ],
    ),
    (
        {"grid__runs__beitv2__target": "run:mae"},
        [
            "grid.runs.beitv2.target: 'run:mae' produces attention, cls, layers and patch, method "
            "beitv2 needs ids, such as 'vqkd'"
        ],
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
            "grid.runs.mae.stages: method mae takes no target, expected a method that can learn",
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
        {"grid__runs__x": {"method": "dbot", "target": "run:x"}, "methods__dbot": {}},
        ["grid.runs.x.target: goes round in a circle: run:x -> run:x"],
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
    data, model = it.data["main"], it.models["main"]
    assert (data.key, data.source, data.argument, data.image_size) == ("data", "shapes", None, 16)
    assert data.settings.config["train"] == 48 and "options" not in data.entry
    assert (model.key, model.kind, model.settings.values.depth) == ("model", "vit", 2)
    assert (it.runs["mae"].data, it.runs["mae"].model) == ("main", "main")
    assert list(it.runs["mae"].tasks) == list(it.tasks) == ["knn", "linear", "finetune"]
    assert mae.origin["batch_size"] == "grid.runs.mae.set.batch_size"
    assert mae.origin["epochs"] == "methods.mae.epochs"


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


def named_content(**changes) -> dict:
    """The tiny experiment with two data sets, two models and two tasks of one kind."""
    content = tiny_content()
    data, model = content.pop("data"), content.pop("model")
    content["data"] = {"photos": data, "scenes": {**data, "image_size": 32, "seed": 1}}
    swin = {
        "patch_size": 2,
        "embed_dim": 16,
        "depth": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    content["models"] = {"small": model, "swin": swin}
    content["targets"]["teacher"] |= {"data": "scenes", "model": "small"}
    content["targets"] = {"hog": {"data": "photos", "model": "small"}}
    content["methods"] |= {"mae-half": {"kind": "mae", "mask_ratio": 0.5}, "dbot": {}}
    content["tasks"] |= {"knn-scenes": {"kind": "knn", "data": "scenes"}}
    both = {"data": "photos", "model": "small"}
    content["grid"]["runs"] = {
        "mae": {"method": "mae", **both},
        "half": {"method": "mae-half", **both, "tasks": {"knn": {"k": [5]}, "linear": None}},
        "hog": {"method": "dbot", "target": "hog", **both},
        "swin": {"method": "random", "data": "photos", "model": "swin"},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        at = content
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return content


def test_entries_have_names_and_kinds_and_runs_choose_among_them():
    it = check(named_content())
    assert {n: (d.key, d.image_size) for n, d in it.data.items()} == {
        "photos": ("data.photos", 16),
        "scenes": ("data.scenes", 32),
    }
    assert {n: (m.key, m.kind) for n, m in it.models.items()} == {
        "small": ("models.small", "vit"),  # from its timm name
        "swin": ("models.swin", "swin"),  # from its own
    }
    assert it.models["small"].settings.origin["depth"] == "models.small.depth"
    half, swin = it.runs["half"], it.runs["swin"]
    assert (half.method, half.kind, half.settings.config["mask_ratio"]) == ("mae-half", "mae", 0.5)
    assert (swin.data, swin.model, swin.method, swin.kind) == ("photos", "swin", "random", "random")
    assert (it.targets["hog"].kind, it.targets["hog"].data) == ("hog", "photos")
    scenes = it.tasks["knn-scenes"]
    assert (scenes.kind, scenes.data, scenes.key) == ("knn", "scenes", "tasks.knn-scenes")


def test_a_run_changes_tasks_for_itself_alone():
    it = check(named_content())
    half, mae = it.runs["half"].tasks, it.runs["mae"].tasks
    assert list(half) == ["knn", "finetune", "knn-scenes"] and "linear" in mae
    assert half["knn"].settings.config["k"] == (5,) and mae["knn"].settings.config["k"] == (3,)
    assert half["knn"].settings.origin["k"] == "grid.runs.half.tasks.knn.k"
    assert half["knn"].key == "tasks.knn"
    elsewhere = check(named_content(grid__runs__mae__tasks={"knn": {"data": "scenes"}}))
    assert (
        elsewhere.runs["mae"].tasks["knn"].data == "scenes" and elsewhere.tasks["knn"].data is None
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"grid__runs__mae": {"method": "mae"}},
            [
                "grid.runs.mae.data: required, one of photos, scenes (found nothing)",
                "grid.runs.mae.model: required, one of small, swin (found nothing)",
            ],
        ),
        (
            {"grid__runs__mae__model": "smal"},
            ["grid.runs.mae.model: no model is called 'smal'; did you mean 'small'?"],
        ),
        ({"data__photos__image_size": "a"}, ["data.photos.image_size: must be a valid integer"]),
        ({"data__photos__sorce": 1}, ["data.photos.sorce: unknown key (found 1); did you mean"]),
        ({"data__photos": None}, ["data.photos.source: required, but not given"]),
        ({"data__seed": 3}, ["data: found seed beside the data sets photos and scenes"]),
        ({"data__Photos": {"source": "shapes", "image_size": 16}}, ["data.Photos: the name"]),
        (
            {"data__photos__image_size": 18},
            ["models.small.patch_size: found 4", "a divisor of data.photos.image_size 18"],
        ),
        (
            {"data__scenes__image_size": 18},
            ["models.small.patch_size: found 4", "a divisor of data.scenes.image_size 18"],
        ),
        ({"data__photos__store_size": 8}, ["8 is smaller than data.photos.image_size 16"]),
        ({"models__small__depht": 2}, ["models.small.depht: unknown key", "did you mean 'depth'"]),
        (
            {"models__small__embed_dim": 18, "models__small__num_heads": 3},
            ["models.small.embed_dim"],
        ),
        ({"models__small": 3}, ["models.small: must be a section with keys and values (found 3)"]),
        (
            {"grid__runs__mae__model": "swin"},
            ["models.swin: method mae needs an encoder that can 'drop'; kind swin can 'mask'"],
        ),
        (
            {"targets__hog__data": None},
            ["targets.hog.data: required, one of photos, scenes (found nothing)"],
        ),
        (
            {"targets__hog__data": "scenes"},
            ["grid.runs.hog.target: 'hog' gives 8 x 8 tokens, method dbot has 4 x 4"],
        ),
        (
            {"targets__hog__cell": 3},
            ["targets.hog.cell: 3 pixels do not divide the student's patches of 4"],
        ),
        (
            {"methods__random__depth": 9},
            ["methods.random.depth: found 9, expected 0 to models.swin.depth"],
        ),
        ({"model": {"name": "vit_tiny_patch16_224"}}, ["models: found beside model"]),
    ],
)
def test_what_is_wrong_with_named_entries(changes, words):
    with pytest.raises(ParamsError) as caught:
        check(named_content(**changes))
    for word in words:
        assert word in str(caught.value)


def test_named_models_under_model_are_pointed_to_their_section():
    content = tiny_content()
    content["model"] = {"small": content["model"], "other": dict(content["model"])}
    with pytest.raises(ParamsError, match="model: found named entries other and small, expected"):
        check(content)


def test_the_published_recipe_comes_before_what_is_given():
    recipe = declared("method", "mae").literals["PUBLISHED"]
    small = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    plain = check(tiny_content()).runs["mae"].settings
    section = check(tiny_content(methods__mae__recipe="published")).runs["mae"].settings
    assert section.config["lr"] == recipe["lr"] != plain.config["lr"]
    assert section.train["epochs"] == recipe["epochs"]
    assert {k: section.config[k] for k in small} == small, "what is given wins"
    assert section.origin["lr"] == "methods.mae.recipe"
    assert section.origin["decoder_dim"] == "methods.mae.decoder_dim"
    run = {"method": "mae", "recipe": "published", "set": {"decoder_depth": 3}}
    both = check(tiny_content(grid__runs__paper=run)).runs
    paper = both["paper"].settings
    assert both["mae"].settings.config == plain.config
    assert (
        paper.config["decoder_dim"] == recipe["decoder_dim"] and paper.config["decoder_depth"] == 3
    )
    assert paper.origin["decoder_dim"] == "grid.runs.paper.recipe"


def test_a_run_may_be_the_upstream_of_a_target_and_comes_before_what_learns_from_it():
    runs = {
        "beitv2": {"method": "beitv2", "target": "vqkd"},
        "mae": {"method": "mae"},
    }
    content = tiny_content(targets__vqkd={"upstream": "run:mae"})
    content["grid"]["runs"] = runs
    it = check(content)
    assert it.targets["vqkd"].upstream == "run:mae" and list(it.runs) == ["mae", "beitv2"]
    assert (it.runs["beitv2"].target, it.runs["beitv2"].teacher) == ("vqkd", None)


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


# --------------------------------------------------------------------------------------------
# plug-ins


HEADS = {  # what a file of each kind must declare
    "sources": "ARGUMENT = None\n",
    "encoders": 'CAN = {"drop"}\nNAMES = "vit"\n',
    "targets": 'PRODUCES = {"patch"}\n',
    "methods": "",
    "tasks": 'HEADLINE = ("top1", "top-1 accuracy", "%")\n',
}
CONFIG = "@dataclass(frozen=True)\nclass Config:\n    pass\n"


def tree(folder: Path, **files: str) -> Path:
    """A project with nothing but plug-ins: name -> source text, without what each must declare."""
    for kind in HEADS:
        (folder / "stages" / kind).mkdir(parents=True)
    for name, text in files.items():
        kind, _, file = name.partition("__")
        (folder / "stages" / kind / f"{file}.py").write_text(HEADS[kind] + text)
    return folder


def test_a_plugin_is_read_without_being_imported(tmp_path):
    root = tree(tmp_path, methods__boom='''"""What it is.

More."""
import a_module_that_does_not_exist
from dataclasses import dataclass
TARGET: set | None = {"ids", "logits"}
NEEDS = set()
LABELS = True
PUBLISHED = {"size": 4, "epochs": 800}
raise SystemExit("imported")
@dataclass(frozen=True)
class Config(checks.SizedCrop):
    """Settings."""
    size: int = 3
    mode: Literal["a", "b"] = "a"
    rates: tuple[float, ...] = (0.1, 0.2)
    names: list[str] = field(default_factory=list)
    def __post_init__(self):
        super().__post_init__()
        if self.size > 5:
            raise ValueError("size: too large")
def f(config):
    return config.size, config.mode, config.rates, config.names
''')  # fmt: skip
    found = declared("method", "boom", root)
    assert found.literals == {
        "TARGET": {"ids", "logits"},
        "NEEDS": set(),
        "LABELS": True,
        "TRAINS": True,
        "PUBLISHED": {"size": 4, "epochs": 800},
        "INPUT": "images",
    }
    crop = ["crop_min", "flip", "input_size"]
    assert found.fields == [*crop, "size", "mode", "rates", "names"]
    assert found.doc.startswith("What it is.") and found.path == "stages/methods/boom.py"
    assert names("method", root) == ["boom"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "has no dataclass named Config"),
        ("class Config:\n    pass\n", "must be decorated with @dataclass"),
        ("class Config(checks.SizedCrop):\n    pass\n", "must be decorated with @dataclass"),
        ("@dataclass(frozen=True)\nclass Config:\n    x: Path = 1\n", "may use only builtins"),
        ("@dataclass(frozen=True)\nclass Config:\n    x: list = []\n", "cannot be read"),
        ("def f(:\n", "line 1"),
        ("TARGET = f()\n" + CONFIG, "line 1: TARGET must be a literal, None or a set out of"),
        ('TARGET = "ids"\n' + CONFIG, "TARGET: found 'ids', expected None or a set out of"),
        ("TARGET = set()\n" + CONFIG, "TARGET: found frozenset.., expected None or a set"),
        ('TARGET = {"idz"}\n' + CONFIG, "TARGET: unknown word 'idz'; did you mean 'ids'"),
        ("NEEDS = {1}\n" + CONFIG, "NEEDS: found .*, expected a set of words"),
        ("LABELS = 1\n" + CONFIG, "LABELS: found 1, expected True or False"),
        ("PUBLISHED = {1: 2}\n" + CONFIG, "PUBLISHED: found {1: 2}, expected a dict of settings"),
        (CONFIG.replace("pass", "kind: int = 1"), "'kind', which is a word of params.yaml"),
    ],
)
def test_a_plugin_that_cannot_be_read_is_named(tmp_path, text, words):
    with pytest.raises(ParamsError, match=words) as caught:
        declared("method", "bad", tree(tmp_path, methods__bad=text))
    assert "stages/methods/bad.py" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("source", "", "must declare ARGUMENT"),
        ("source", 'ARGUMENT = "path"\n', "ARGUMENT: found 'path', expected \"PATH\""),
        ("source", 'ARGUMENT = None\nPATHS = ("a",)\n', "PATHS names 'a', which is no setting"),
        ("encoder", "", "must declare CAN"),
        ("encoder", 'CAN = "drop"\n', "CAN: found 'drop', expected a set of words"),
        ("target", "", "must declare PRODUCES"),
        ("target", 'PRODUCES = {"features"}\n', "unknown word 'features' .allowed: attention,"),
        ("task", "", "must declare HEADLINE"),
        ("task", 'HEADLINE = "top1"\n', "HEADLINE: found 'top1', expected .key, label, unit."),
        ("task", 'HEADLINE = ("a", "b", "c")\nNEEDS = {"mask"}\n', "did you mean 'masks'"),
    ],
)
def test_what_each_kind_must_declare(tmp_path, kind, text, words):
    path = tree(tmp_path) / "stages" / FOLDERS[kind] / "x.py"
    path.write_text(text + CONFIG)
    with pytest.raises(ParamsError, match=words):
        declared(kind, "x", tmp_path)


UNREAD = """
@dataclass(frozen=True)
class Config(checks.Optimiser):
    weight_dacay: float = 0.1
    lr: float = 3.0  # another default for an inherited setting
    def __post_init__(self):
        super().__post_init__()
        checks.within(self, "[0, 1]", "weight_dacay")
    def check(self, image_size, model):
        return self.weight_dacay
def f(config):
    return config.weight_decay
"""


def test_a_setting_that_nothing_reads_is_refused(tmp_path):
    root = tree(tmp_path, methods__x=UNREAD)
    with pytest.raises(ParamsError) as caught:
        declared("method", "x", root)
    said = str(caught.value)
    assert said.startswith("stages/methods/x.py: nothing reads the setting 'weight_dacay'")
    assert said.endswith("did you mean 'weight_decay'?")


@pytest.mark.parametrize(
    "reader", ["def g(config):\n    return config.weight_dacay\n", 'NAMES = ["weight_dacay"]\n']
)
def test_a_setting_that_an_imported_file_reads_is_good(tmp_path, reader):
    text = "def h():\n    from stages.kit import far\n" + UNREAD
    root = tree(tmp_path, methods__x=text)
    (root / "stages" / "kit").mkdir()
    (root / "stages" / "kit" / "far.py").write_text("from . import near\n")
    near = root / "stages" / "kit" / "near.py"
    near.write_text(reader)
    declared("method", "x", root)
    near.write_text("pass\n")
    with pytest.raises(ParamsError, match="nothing reads the setting 'weight_dacay'"):
        declared("method", "x", root)


@pytest.mark.parametrize("name", ["../../etc/passwd", "__init__", "a b", ""])
def test_a_plugin_name_cannot_leave_its_folder(name):
    with pytest.raises(ParamsError, match="there is no method"):
        declared("method", name)
    with pytest.raises(ParamsError, match="there is no method"):
        module("method", name)


def toys(folder: Path, **files: str) -> tuple[Path, dict]:
    """A project of toys, of which `files` are more, and a params file for it."""
    plain = {f"{kind}__toy": CONFIG for kind in HEADS}
    sections = {"data": {"source": "toy", "image_size": 16}, "model": {"kind": "toy"}}
    sections |= {"methods": {"toy": {}}, "tasks": {"toy": {}}, "targets": {}}
    sections |= {"grid": {"runs": {"x": {"method": "toy"}}}}
    return tree(folder, **(plain | files)), tiny_content() | sections


def test_cycles_of_targets_are_shown(tmp_path):
    root, content = toys(tmp_path, targets__t='UPSTREAM = {"patch"}\n' + CONFIG)
    upstream = {"a": "b", "b": "c", "c": "a"}
    content["targets"] = {n: {"kind": "t", "upstream": u} for n, u in upstream.items()}
    circle = "targets.a.upstream: goes round in a circle: a -> b -> c -> a"
    with pytest.raises(ParamsError, match=circle):
        check(content, root=root)


def test_cycles_through_targets_and_runs_are_shown(tmp_path):
    taught = 'TARGET = {"patch"}\n' + CONFIG
    upstream = 'UPSTREAM = {"patch"}\n' + CONFIG
    root, content = toys(tmp_path, methods__taught=taught, targets__t=upstream)
    content["methods"] = {"taught": {}}
    content["targets"] = {"a": {"kind": "t", "upstream": "run:x"}}
    content["grid"] = {"runs": {"x": {"method": "taught", "target": "a"}}}
    circle = "targets.a.upstream: goes round in a circle: a -> run:x -> a"
    with pytest.raises(ParamsError, match=circle):
        check(content, root=root)


def test_what_is_needed_is_compared_with_what_there_is(tmp_path):
    root, content = toys(
        tmp_path,
        methods__wants='TARGET = {"patch", "attention"}\nNEEDS = {"drop"}\n' + CONFIG,
        encoders__mute=CONFIG,
        targets__whole='PRODUCES = {"patch", "cls", "attention"}\n' + CONFIG,
        methods__blind='NEEDS = {"taps", "fly"}\n' + CONFIG,
    )
    content["methods"] = {"wants": {}, "blind": {}}
    content["targets"] = {"part": {"kind": "toy"}, "whole": {}}
    content["grid"] = {"runs": {"x": {"method": "wants", "target": "part"}}}

    def said(**runs) -> str:
        content["grid"] = {"runs": runs}
        with pytest.raises(ParamsError) as caught:
            check(content, root=root)
        return str(caught.value)

    assert (
        "grid.runs.x.target: 'part' produces patch, method wants needs attention, such as 'whole', "
        "or run:NAME" in said(x={"method": "wants", "target": "part"})
    )
    assert "'run:y' produces layers and patch, method wants needs attention" in said(
        x={"method": "wants", "target": "run:y"}, y={"method": "wants", "target": "whole"}
    )
    assert (
        "model: method blind needs an encoder that can 'fly' and 'taps'; kind toy can 'drop'; no "
        "family can" in said(x={"method": "blind"})
    )
    content["grid"] = {"runs": {"x": {"method": "wants", "target": "whole"}}}
    check(content, root=root)


def test_what_goes_in_must_be_what_comes_out(tmp_path):
    points = 'INPUT = "points"\n' + CONFIG
    root, content = toys(
        tmp_path,
        sources__clouds=points,
        encoders__cloud=points,
        methods__cloudy=points,
        methods__any='INPUT = {"images", "points"}\n' + CONFIG,
    )
    content["methods"] = {"cloudy": {}, "any": {}, "toy": {}}

    def said(source: str, model: str, method: str) -> str:
        content["data"], content["model"] = {"source": source}, {"kind": model}
        content["grid"] = {"runs": {"x": {"method": method}}}
        try:
            check(content, root=root)
        except ParamsError as error:
            return str(error)
        return ""

    assert said("clouds", "cloud", "cloudy") == said("clouds", "cloud", "any") == ""
    assert "model: kind toy takes images, source clouds of data gives points" in said(
        "clouds", "toy", "cloudy"
    )
    assert "methods.toy: method toy takes images, source clouds of data gives points" in said(
        "clouds", "cloud", "toy"
    )


def test_a_task_may_test_the_model_of_another(tmp_path):
    root, content = toys(tmp_path, tasks__hard='AFTER = "toy"\n' + CONFIG)
    content["tasks"] = {"hard": {}, "toy": {}}
    it = check(content, root=root)
    assert it.tasks["hard"].after == "toy" and list(it.tasks) == ["toy", "hard"]

    def said(all_tasks: dict, **run) -> str:
        content["tasks"] = all_tasks
        content["grid"] = {"runs": {"x": {"method": "toy", **run}}}
        with pytest.raises(ParamsError) as caught:
            check(content, root=root)
        return str(caught.value)

    two = {"a": {"kind": "toy"}, "b": {"kind": "toy"}, "hard": {}}
    assert "tasks.hard.after: expected the name of a task of kind toy, such as 'a' or 'b'" in said(
        two
    )
    assert "tasks.hard.after: expected the name of a task of kind toy, and there is none" in said(
        {"hard": {}}
    )
    assert "tasks.hard.after: 'other' is of kind hard, expected kind toy" in said(
        {"hard": {"after": "other"}, "other": {"kind": "hard"}, "toy": {}}
    )
    assert "grid.runs.x.tasks.toy: is left out, but hard tests its model" in said(
        {"toy": {}, "hard": {}}, tasks={"toy": None}
    )
    content["tasks"] = two | {"hard": {"after": "b"}}
    content["grid"] = {"runs": {"x": {"method": "toy", "tasks": {"a": None}}}}
    assert list(check(content, root=root).runs["x"].tasks) == ["b", "hard"]


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_plugin_of_the_project_can_be_read(kind):
    assert names(kind)
    for name in names(kind):
        found = declared(kind, name)
        assert found.doc, f"{found.path}: what it is"
        found.config()  # every setting has a default
        settings = {*found.fields, *Train.model_fields}
        assert set(found.literals.get("PUBLISHED", ())) <= settings, found.path


def test_the_words_beside_settings_are_known_to_plugins():
    models = {"target": TargetWords, "method": MethodWords, "task": TaskWords}
    for kind, model in (models | {"encoder": ModelWords}).items():
        assert set(WORDS[kind]) == set(model.model_fields)


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
    known = sum(len(names(kind)) for kind in FOLDERS)
    assert len(committed.splitlines()) < 50 * known and '"title"' not in committed


def test_the_schema_knows_plugins_and_refuses_typing_errors():
    import jsonschema

    good = json.loads(json.dumps(tiny_content()))
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(good)
    validator.validate(tiny_content(targets__dino={"kind": "pretrained", "proj": True}))
    validator.validate(named_content())
    for changes in (
        {"methods__mae__mask_ratoi": 1},
        {"tasks__knnn": {}},
        {"targets__vqkd__codez": 1},
        {"trian": {}},
        {"grid__runs__mae__sets": {}},
        {"model__num_head": 3},
        {"data__sorce": "shapes"},
        {"models": {}},
    ):
        assert not validator.is_valid(tiny_content(**changes)), changes


def test_the_plan_needs_no_torch():
    code = (
        "import sys, workflow.plan as p; p.load(); "
        "assert not {'torch', 'timm', 'mlflow'} & set(sys.modules)"
    )
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
