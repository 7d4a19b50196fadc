"""README and docs against the project: tables, examples, paths, commands and lengths of lines."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_content, write_params
from workflow import checks, plugins
from workflow.literals import DEFAULTS
from workflow.plan import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOYS = {"arrays", "convmix", "palette", "guess", "prototypes"}
NAMED = ("source", "encoder", "target", "method", "task")
PATH = re.compile(
    r"(?:stages|workflow|tests|presets|benchmarks|docs|profiles)/[\w./-]*\w(?![\w./-]*<)"
)
EXAMPLES = [(ROOT / "README.md", text) for text in re.findall(r"```yaml\n(.*?)```", README, re.S)]
HOW = ROOT / "docs/architecture.md"
EXAMPLES += [(HOW, text) for text in re.findall(r"```yaml\n(.*?)```", HOW.read_text(), re.S)]


def table(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose first column is called `head`, row by row."""
    _, _, below = text.partition(f"\n| {head} |")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.mark.parametrize("kind", NAMED)
def test_the_readme_lists_every_plugin_and_no_other(kind):
    assert sorted(row[0] for row in table(README, kind)) == plugins.names(kind)


def test_the_readme_says_which_methods_need_a_target():
    for name, _, target in table(README, "method"):
        needs = plugins.declared("method", name).literals["TARGET"]
        assert (needs is None) == (target == "none"), name


def test_the_readme_lists_every_preset():
    files = sorted(f"presets/{path.name}" for path in (ROOT / "presets").glob("*.yaml"))
    assert sorted(row[0] for row in table(README, "preset")) == files


def test_the_page_on_methods_has_every_setting_of_the_optimiser():
    page = (ROOT / "docs/adding-a-method.md").read_text(encoding="utf-8")
    known = {field.name: field.default for field in dataclasses.fields(checks.Optimiser)}
    rows = table(page, "setting of `Optimiser`")
    assert [row[0] for row in rows] == list(known)
    for name, default, _ in rows:
        given = {"null": None, "none": ()}.get(default, default)
        if isinstance(known[name], float):
            assert float(given) == known[name], name
        elif not isinstance(known[name], tuple) or not known[name]:
            assert given == known[name], name
        else:
            assert tuple(map(float, given.split(","))) == known[name], name
    mixins = {row[0]: row[1] for row in table(page, "mixin of `checks`")}
    assert mixins.keys() == {"Optimiser", "SelfDistillation", "MaskedSelfDistillation"} | {
        name for name in mixins if hasattr(checks, name)
    }
    for name in ("Crop", "Decoder"):
        fields = {field.name for field in dataclasses.fields(getattr(checks, name))}
        assert set(re.findall(r"\w+", mixins[name])) == fields


def test_the_page_on_methods_has_the_options_of_beits_encoder():
    page = (ROOT / "docs/adding-a-method.md").read_text(encoding="utf-8")
    mixins = {row[0]: row[1] for row in table(page, "mixin of `checks`")}
    words = re.findall(r"\w+", f"{mixins['BeitStart']} {mixins['BeitEncoder']}")
    known = {field.name: field.default for field in dataclasses.fields(checks.BeitEncoder)}
    assert known.keys() <= set(words)
    published = plugins.declared("method", "beitv2").literals["PUBLISHED"]
    rows = table(page, "setting of `BeitEncoder`")
    assert [row[0] for row in rows] == ["init", "rel_pos_rate", "rel_pos_decay"]
    for name, default, official, _ in rows:
        assert yaml.safe_load(default) == known[name], name
        assert yaml.safe_load(official) == published[name], name


@pytest.mark.parametrize("kind", NAMED)
def test_literals_in_the_docs_are_known(kind):
    rows = table(HOW.read_text(encoding="utf-8"), "folder")
    row = next(row for row in rows if row[0] == plugins.FOLDERS[kind])
    assert set(re.findall(r"[A-Z]{3,}", row[1])) <= set(DEFAULTS[kind])


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=lambda value: getattr(value, "name", ""))
def test_examples_of_params_are_good(tmp_path, page, text):
    """Each stands in a small params file; what reads files of a user's draws shapes instead."""
    text = re.sub(r'"(folder|parquet):[^"]*"', "shapes", text)
    content = tiny_content()
    content["methods"] |= {name: {} for name in ("simmim", "dbot")}
    content["grid"] = {"runs": {f"x-{m}": {"method": "mae"} for m in ("disjoint", "independent")}}
    given = yaml.safe_load(text)
    if "models" in given:
        del content["model"]
        content["data"]["image_size"] = 64
    if "tasks" in given or "data" in given:
        content["targets"] = {}
    grid = content["grid"] | given.get("grid", {})
    params = write_params(tmp_path, content | given | {"grid": grid})
    assert load(params, tmp_path / "results").jobs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page):
    long = [
        number
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long, f"{page.name}: lines {long} have more than 100 columns"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_commands_in_the_docs_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in PATH.findall(re.sub(r"results/\S+|https?://\S+", "", text)):
        if Path(path).stem not in TOYS:
            assert (ROOT / path).exists(), path
    for name in re.findall(r"python -m (stages[\w.]*|workflow[\w.]*)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), link
