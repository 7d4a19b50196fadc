"""The sections `data` and `model` or `models`: one entry written flat, or several by name."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from workflow.closure import closure
from workflow.messages import ParamsError, did_you_mean, listed, nearest, shown
from workflow.params.messages import sentences
from workflow.params.sections import Data, ModelWords, keys_at
from workflow.params.settings import Checker, Layer, Settings, as_json
from workflow.plugins import Plugin, declared

FLAT = "main"  # name of an entry that is written flat
REGISTERED = re.compile(r"@register_model\s+def (\w+)")  # how timm's models are declared


@dataclass(frozen=True)
class DataSet:
    """An entry of `data`. entry: its plain keys; settings: those of its source."""

    name: str
    key: str  # where it is declared, as a dotted key of params.yaml
    entry: dict[str, Any]
    source: str
    argument: str | None  # what follows the colon in `source`
    settings: Settings
    frozen: bool = False  # changed files of the source are not looked at

    @property
    def image_size(self) -> int | None:
        return self.entry["image_size"]


@dataclass(frozen=True)
class Encoder:
    """An entry of `models`. kind: the file in stages/encoders; settings: that family's Config."""

    name: str
    key: str
    kind: str
    settings: Settings

    @property
    def can(self) -> frozenset[str]:
        """What the family can do, such as "drop" and "mask"."""
        return self.settings.plugin.literals["CAN"]


# ---------------------------------------------------------------------------------------------
# data


def data_entries(section: Any, problems: list[str]) -> dict[str, tuple[str, Data]]:
    """{name: (dotted key, entry)} of the section `data`; problems are noted."""
    if not isinstance(section, dict):
        return {}  # noted with the other sections
    named = [k for k, v in section.items() if k not in Data.model_fields and _is_entry(v)]
    own = [k for k in section if k not in named]
    if named and own and "source" not in section:
        problems.append(
            f"data: found {listed(own)} beside the data sets {listed(named)}, "
            "expected either the keys of one data set or named ones"
        )
        return {}
    entries = {FLAT: ("data", section)}
    if named and not own:
        entries = {name: (f"data.{name}", section[name] or {}) for name in named}
    found = {}
    for name, (key, entry) in entries.items():
        try:
            found[name] = key, Data.model_validate_json(as_json(entry))
        except ValidationError as error:
            problems += sentences(
                error, lambda k, key=key: f"{key}.{k}", lambda place: keys_at(["data", *place])
            )
    return found


def _is_entry(value) -> bool:
    return value is None or isinstance(value, dict)


def data_sets(checker: Checker, entries: dict[str, tuple[str, Data]]) -> dict[str, DataSet]:
    """The data sets whose source is good; problems go to the checker."""
    found = {}
    for name, (key, data) in entries.items():
        source, _, argument = data.source.partition(":")
        known = checker.kinds("source")
        if source not in known:
            checker.problems.append(
                f"{key}.source: no source is called {source!r}{nearest(source, known)}; "
                f"expected {listed(_forms(checker, known), 'or')}"
            )
            continue
        plugin = checker.plugin("source", f"{key}.source", source, None)
        if plugin is None:
            continue
        expected = plugin.literals["ARGUMENT"]
        if expected is None and argument:
            checker.problems.append(
                f"{key}.source: {source} takes nothing after the colon (found {argument!r})"
            )
        if expected is not None and not argument:
            checker.problems.append(
                f"{key}.source: {source} needs something to read, as in {source}:{expected}"
            )
        if data.frozen and expected != "PATH" and not plugin.literals["PATHS"]:
            checker.problems.append(
                f"{key}.frozen: found true, but the source {source} reads no files that could "
                "change; expected false"
            )
        sized = data.image_size is not None or plugin.literals["INPUT"] != "images"
        if not sized:
            checker.problems.append(f"{key}.image_size: required, but not given")
        checker.problems += _impossible(key, data)
        at = f"{key}.options"
        settings = checker.settings("source", source, plugin, at, [Layer(at, data.options)])
        if settings and sized:
            entry = data.model_dump(exclude={"options", "frozen"})
            found[name] = DataSet(name, key, entry, source, argument or None, settings, data.frozen)
    return found


def _impossible(key: str, data: Data) -> Iterator[str]:
    """What is wrong with values that have the right types."""
    span, group = data.range, data.group
    if isinstance(span, list) and not (len(span) == 2 and span[0] < span[1]):
        yield f"{key}.range: found {shown(span)}, expected [low, high] with low below high, or auto"
    if isinstance(group, int) and group < 1:
        yield f"{key}.group: found {group}, expected the level of a folder from 1, or a column"


def _forms(checker: Checker, known: list[str]) -> Iterator[str]:
    """How each source is written: "shapes", "folder:PATH"."""
    for name in known:
        try:
            argument = declared("source", name, checker.root).literals["ARGUMENT"]
        except ParamsError:
            continue
        yield f"{name}:{argument}" if argument else name


# ---------------------------------------------------------------------------------------------
# models


def model_entries(content: dict, problems: list[str]) -> dict[str, tuple[str, dict]]:
    """{name: (dotted key, section)} of `model` or `models`; problems are noted."""
    flat, named = content.get("model"), content.get("models")
    if flat is not None and named is not None:
        problems.append("models: found beside model, expected one of the two")
    elif flat is None and named is None:
        problems.append("model: required, but not given")
    elif isinstance(named, dict):
        return {name: (f"models.{name}", entry or {}) for name, entry in named.items()}
    elif isinstance(flat, dict) and set(map(type, flat.values())) == {dict} and "args" not in flat:
        problems.append(f"model: found named entries {listed(flat)}, expected them under models")
    elif isinstance(flat, dict):
        return {FLAT: ("model", flat)}
    return {}


def encoders(checker: Checker, entries: dict[str, tuple[str, dict]]) -> dict[str, Encoder]:
    """The encoders whose settings are good; problems go to the checker."""
    found = {}
    for name, (key, section) in entries.items():
        words, given = checker.words(ModelWords, key, section)
        kind = words and (words.kind or _family(checker, name, key, given.get("name")))
        plugin = kind and checker.plugin("encoder", key, kind, words.kind)
        if not plugin:
            continue
        if problem := _name_problem(given.get("name"), plugin, checker):
            checker.problems.append(f"{key}.name: {problem}")
        elif settings := checker.settings("encoder", kind, plugin, key, [Layer(key, given)]):
            found[name] = Encoder(name, key, kind, settings)
    return found


def _family(checker: Checker, name: str, key: str, timm_name: Any) -> str | None:
    """The kind of an entry that does not say it: the entry's name, or what its timm model is."""
    kinds = checker.kinds("encoder")
    if name in kinds:
        return name
    among = f"one of the families in stages/encoders: {', '.join(kinds)}"
    if timm_name is None:
        problem = f"{key}.kind: required, {among}; or {key}.name, a timm model of one of them"
    elif not isinstance(timm_name, str):
        problem = f"{key}.name: must be text (found {shown(timm_name)})"
    else:
        families = {kind: checker.plugin("encoder", key, kind, None) for kind in kinds}
        for kind, plugin in families.items():
            if plugin and _fits(plugin, timm_name):
                return kind
        known = timm_models(list(filter(None, families.values())), checker.root)
        what = (
            f"{timm_name!r} is of no known family"
            if timm_name.split(".")[0] in known
            else (f"timm has no model {timm_name!r}{did_you_mean(timm_name, known)}")
        )
        problem = f"{key}.name: {what}; expected {among}"
    checker.problems.append(problem)
    return None


def _fits(plugin: Plugin, timm_name: str) -> bool:
    pattern = plugin.literals["NAMES"]
    return pattern is not None and re.match(pattern, timm_name) is not None


def _name_problem(timm_name: Any, plugin: Plugin, checker: Checker) -> str | None:
    """Why there is no timm model of this name, or none of this family."""
    known = isinstance(timm_name, str) and timm_models([plugin], checker.root)
    if not known:
        return None  # not given, another type, or timm is not installed
    plain, pattern = timm_name.split(".")[0], plugin.literals["NAMES"]
    own = [name for name in known if _fits(plugin, name)] or known
    if plain not in known:
        return f"timm has no model {timm_name!r}{did_you_mean(plain, own)}"
    if pattern is not None and not _fits(plugin, timm_name):
        return f"{timm_name!r} is no {Path(plugin.path).stem}{did_you_mean(plain, own)}"
    return None


def timm_models(families: list[Plugin], root: Path) -> frozenset[str]:
    """Names of all models in the text of timm, and in that of the families and their imports.

    Imports nothing of them. Empty if timm is not installed.
    """
    timm = importlib.util.find_spec("timm")
    if timm is None or not timm.submodule_search_locations:
        return frozenset()
    ours = closure([plugin.path for plugin in families], root)
    files = [*Path(timm.submodule_search_locations[0]).glob("models/*.py")]
    files += [root / path for path in ours]
    return frozenset().union(*(_registered(file, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=1024)
def _registered(file: Path, changed: int) -> frozenset[str]:
    return frozenset(REGISTERED.findall(file.read_text(encoding="utf-8")))
