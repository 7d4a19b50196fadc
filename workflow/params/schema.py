"""JSON Schema of params.yaml, with the settings of every plug-in, by which editors complete.

It is made to be read: one setting a line, nothing said twice, no titles.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from workflow.params.sections import Data, MethodWords, ModelWords, Params, TargetWords, TaskWords
from workflow.plugins import ROOT, declared, names

WORDS = {"encoder": ModelWords, "target": TargetWords, "method": MethodWords, "task": TaskWords}
DEFS = "#/$defs/"
WIDTH = 100  # columns of a line, where a value can be broken


def schema(root: Path = ROOT) -> dict:
    """JSON Schema (draft 2020-12) of params.yaml."""
    result = _without_titles(Params.model_json_schema())
    definitions, properties = result["$defs"], result["properties"]
    for kind, words in WORDS.items():
        for name in names(kind, root):
            definitions[f"{kind} {name}"] = _plugin(kind, name, words, root)
    data = {"$ref": f"{DEFS}Data"}
    definitions["Data"] = _without_titles(Data.model_json_schema())
    properties["data"] = {"anyOf": [data, {"type": "object", "additionalProperties": data}]}
    encoders = {"anyOf": [{"$ref": f"{DEFS}encoder {name}"} for name in names("encoder", root)]}
    properties["model"] = encoders
    properties["models"] = {"type": "object", "additionalProperties": encoders}
    result["oneOf"] = [{"required": ["model"]}, {"required": ["models"]}]
    for kind, section in (("target", "targets"), ("method", "methods"), ("task", "tasks")):
        properties[section] = _named(kind, names(kind, root), definitions)
    properties["tasks"]["minProperties"] = 1
    _share(definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _plugin(kind: str, name: str, words, root: Path) -> dict:
    """The schema of an entry of this kind."""
    plugin = declared(kind, name, root)
    own = _without_titles(plugin.adapter.json_schema()).get("properties", {})
    properties = _without_titles(words.model_json_schema())["properties"]
    properties["kind"] = {"const": name}
    if "recipe" in properties and not plugin.literals["PUBLISHED"]:
        del properties["recipe"]
    if kind in ("target", "method"):
        train = Params.model_json_schema()["$defs"]["Train"]["properties"]
        properties |= {key: {"$ref": f"{DEFS}Train/properties/{key}"} for key in train}
    return {
        "type": ["object", "null"],
        "description": plugin.path,
        "additionalProperties": False,
        "properties": properties | own,
    }


def _named(kind: str, kinds: list[str], definitions: dict) -> dict:
    """A section of named entries, whose kind is their name unless they say another."""
    any_kind = f"any {kind}"
    definitions[any_kind] = {
        "required": ["kind"],
        "type": "object",
        "anyOf": [{"$ref": f"{DEFS}{kind} {name}"} for name in kinds],
    }
    other = {"$ref": f"{DEFS}{any_kind}"}
    return {
        "type": "object",
        "properties": {
            name: {"anyOf": [{"$ref": f"{DEFS}{kind} {name}"}, other]} for name in kinds
        },
        "additionalProperties": other,
    }


def _share(definitions: dict) -> None:
    """Long settings that several plug-ins have become one definition each."""
    settings = [
        (properties, key, value)
        for name, entry in definitions.items()
        if " " in name and (properties := entry.get("properties"))
        for key, value in properties.items()
    ]

    def form(value: dict) -> str:
        return json.dumps({k: v for k, v in value.items() if k != "default"}, sort_keys=True)

    count = Counter((key, form(value)) for _, key, value in settings)
    shared: dict[str, str] = {}  # key -> the form that is shared
    for (key, text), times in count.most_common():
        if times > 1 and len(text) > 60:
            shared.setdefault(key, text)
    for properties, key, value in settings:
        if form(value) == shared.get(key):
            default = {"default": value["default"]} if "default" in value else {}
            properties[key] = {"$ref": f"{DEFS}{key}"} | default
    definitions |= {key: json.loads(text) for key, text in shared.items()}


def _without_titles(value: Any):
    """The same without "title", which only repeats a key; a property may have that name."""
    if isinstance(value, list):
        return [_without_titles(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        k: _without_titles(v) for k, v in value.items() if k != "title" or not isinstance(v, str)
    }


def schema_text(root: Path = ROOT) -> str:
    """The schema as workflow/schemas/params.schema.json holds it."""
    return _text(schema(root), 0) + "\n"


def _text(value: Any, depth: int, before: int = 0) -> str:
    """JSON, in one line where it fits. `before`: columns that are taken in front of it."""
    line = json.dumps(value)
    if depth + before + len(line) < WIDTH or not value or not isinstance(value, dict | list):
        return line
    space = " " * (depth + 1)
    if isinstance(value, list):
        inner = [_text(v, depth + 1) for v in value]
        ends = "[]"
    else:
        keys = {k: f"{json.dumps(k)}: " for k in value}
        inner = [keys[k] + _text(v, depth + 1, len(keys[k])) for k, v in value.items()]
        ends = "{}"
    body = ",\n".join(f"{space}{text}" for text in inner)
    return f"{ends[0]}\n{body}\n{' ' * depth}{ends[1]}"
