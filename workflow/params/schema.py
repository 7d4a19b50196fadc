"""JSON Schema of params.yaml, with the settings of every plug-in in the tree, by which editors
complete and check.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter

from workflow.params.sections import Params
from workflow.plugins import ROOT, plugin, plugin_names


def schema(root: Path = ROOT) -> dict:
    """JSON Schema (draft 2020-12) of params.yaml."""
    result = Params.model_json_schema()
    train = result["$defs"]["Train"]["properties"]

    def of(kind: str, name: str, extra: dict) -> dict:
        found = plugin(kind, name, root)
        properties = extra | TypeAdapter(found.config).json_schema().get("properties", {})
        return {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": properties,
            "description": found.path,
        }

    def named(kind: str, extra: dict) -> dict:
        sections = {n: of(kind, n, extra) for n in plugin_names(kind, root)}
        return {"type": "object", "additionalProperties": False, "properties": sections}

    properties = result["properties"]
    properties["methods"] = named("method", train)
    properties["tasks"] = named("task", {}) | {"minProperties": 1}
    own = {"upstream": {"type": ["string", "null"]}, "seed": {"type": "integer", "minimum": 0}}
    kinds = []
    for name in plugin_names("target", root):
        kind = of("target", name, train | own | {"kind": {"const": name}})
        kinds.append(kind | {"type": "object", "required": ["kind"]})
    properties["targets"] = {"type": "object", "additionalProperties": {"oneOf": kinds}}
    result["$defs"]["Run"]["properties"]["method"] |= {"enum": plugin_names("method", root)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def schema_text(root: Path = ROOT) -> str:
    """The schema as workflow/schemas/params.schema.json holds it."""
    return json.dumps(schema(root), indent=1) + "\n"
