"""The sections of plug-ins: known keys, right types, values that suit the plug-in and the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workflow.params import encoder
from workflow.params.messages import blame, sentences
from workflow.params.sections import Params, Train
from workflow.plugins import ParamsError, Plugin, nearest, plugin


@dataclass(frozen=True)
class Settings:
    """A checked plug-in section: the plug-in, its complete settings, and `train` with the section's
    own changes.

    `origin` tells for each key given where it was given, as a dotted key of params.yaml.
    """

    name: str
    plugin: Plugin
    config: dict[str, Any]
    train: dict[str, Any]
    origin: dict[str, str]


@dataclass
class Checker:
    """Checks plug-in sections of one params file and notes what is wrong in `problems`."""

    params: Params
    root: Path
    problems: list[str]
    sound: bool  # there can be such an encoder; otherwise a plug-in cannot say whether it suits it

    def settings(
        self, kind: str, name: str, *given: tuple[str, dict | None], suits: bool = True
    ) -> Settings | None:
        """The settings of a plug-in from what is `given`: pairs of a dotted key and the values
        there, of which later ones win. None after noting a problem. `suits`: also ask the plug-in
        whether it suits the model.
        """
        key, before = given[0][0], len(self.problems)
        try:
            found = plugin(kind, name, self.root)
        except ParamsError as error:
            self.problems.append(f"{key}: {error}")
            return None
        values = {k: v for _, section in given for k, v in (section or {}).items()}
        origin = {k: f"{prefix}.{k}" for prefix, section in given for k in section or {}}
        trainable = list(Train.model_fields) if kind in ("method", "target") else []
        allowed = found.fields + trainable
        self.problems += [
            f"{origin[k]}: unknown key (found {v!r}){nearest(k, allowed)}"
            for k, v in values.items()
            if k not in allowed
        ]
        own = {k: v for k, v in values.items() if k in found.fields}
        config = self._config(found, own, key, origin)
        train = self._train(
            {k: v for k, v in values.items() if k in trainable and k not in own}, origin
        )
        if suits and self.sound:
            self._suits(kind, name, found, config, key, own, origin)
        if len(self.problems) > before:
            return None
        return Settings(name, found, {f: getattr(config, f) for f in found.fields}, train, origin)

    def _config(self, found: Plugin, own: dict, key: str, origin: dict[str, str]):
        """The plug-in's Config with these values, or None after noting what is wrong with them."""
        try:
            return TypeAdapter(found.config).validate_json(as_json(own))
        except ValidationError as error:
            if (
                error.errors()[0]["type"] == "value_error"
            ):  # from __post_init__, which runs when all types are right
                self.problems.append(blame(error.errors()[0]["ctx"]["error"], key, own, origin))
            else:
                self.problems += sentences(
                    error, lambda field: origin.get(field, f"{key}.{field}"), lambda place: []
                )
        return None

    def _train(self, changes: dict, origin: dict[str, str]) -> dict:
        """`train` with a section's changes; what cannot step is noted as a problem."""
        merged = self.params.train.model_dump() | changes
        try:
            merged = Train.model_validate_json(as_json(merged)).model_dump()
        except ValidationError as error:
            self.problems += sentences(error, origin.__getitem__, lambda place: [])
            return merged
        where = next(
            (origin[k] for k in ("micro_batch", "batch_size") if k in changes), "train.micro_batch"
        )
        batch, micro = merged["batch_size"], merged["micro_batch"]
        if micro and batch % micro:
            why = f"micro_batch {micro} does not divide batch_size {batch}, so accumulation would never make a whole step"
            self.problems.append(f"{where}: {why}")
        return merged

    def _suits(
        self,
        kind: str,
        name: str,
        found: Plugin,
        config,
        key: str,
        own: dict,
        origin: dict[str, str],
    ) -> None:
        """Note why the plug-in cannot work with the model."""
        model, able = self.params.model, found.literals["ENCODERS"]
        family = encoder.family(model.name)
        if kind in ("method", "target") and family not in able:
            self.problems.append(
                f"model.name: {kind} {name} takes no {family}, only {', '.join(able)} (found {model.name!r})"
            )
        elif hasattr(config, "check"):
            try:
                config.check(self.params.data.image_size, model.model_dump())
            except ValueError as error:
                self.problems.append(blame(error, key, own, origin))


def as_json(value) -> str:
    """What YAML gave as JSON, in which pydantic also takes a list for a tuple while it is strict
    about the rest.
    """
    return json.dumps(value, default=str)
