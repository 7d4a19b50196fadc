"""The settings of plug-ins: known keys, right types, and where each value was given."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from workflow import checks
from workflow.messages import ParamsError, nearest, shown
from workflow.params.messages import blame, sentences
from workflow.params.sections import Params, Section, Train
from workflow.plugins import WORDS, Plugin, declared, names


class Layer(NamedTuple):
    """Values for settings that stand together at one dotted key of params.yaml."""

    key: str
    values: dict[str, Any]
    published: bool = False  # the plug-in's recipe, for which `key` asks


@dataclass(frozen=True)
class Settings:
    """The checked settings of one plug-in, complete with its defaults.

    values: the plug-in's Config; train: the section `train` with this entry's own changes; origin:
    for each key given, the dotted key of params.yaml where it was given.
    """

    name: str
    plugin: Plugin
    values: Any
    train: dict[str, Any]
    origin: dict[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {field: getattr(self.values, field) for field in self.plugin.fields}

    @property
    def input_size(self) -> int | None:
        """Side in pixels of the crops, where it is not that of the data."""
        return self.values.input_size if isinstance(self.values, checks.SizedCrop) else None


@dataclass
class Checker:
    """Checks the entries of one params file and notes in `problems` what is wrong."""

    params: Params
    root: Path
    problems: list[str]

    def words(self, model: type[Section], key: str, section: dict | None):
        """(the words of an entry that are not settings, the settings); no words if one is wrong."""
        section = dict(section or {})
        given = {k: section.pop(k) for k in model.model_fields if k in section}
        try:
            return model.model_validate_json(as_json(given)), section
        except ValidationError as error:
            self.problems += sentences(error, lambda k: f"{key}.{k}", lambda place: [])
            return None, section

    def plugin(self, kind: str, key: str, name: str, given: str | None) -> Plugin | None:
        """The plug-in of an entry called `name`. `given`: the entry's word `kind`."""
        try:
            return declared(kind, given or name, self.root)
        except ParamsError as error:
            self.problems.append(f"{key}.kind: {error}" if given else f"{key}: {error}")
            return None

    def published(self, plugin: Plugin, key: str) -> Layer:
        """The recipe that a plug-in declares, as asked for by the word `recipe` at `key`."""
        recipe = plugin.literals["PUBLISHED"]
        if not recipe:
            self.problems.append(f"{key}.recipe: {plugin.path} declares no PUBLISHED recipe")
        return Layer(f"{key}.recipe", recipe, published=True)

    def settings(
        self, kind: str, name: str, plugin: Plugin, key: str, layers: list[Layer]
    ) -> Settings | None:
        """Settings of the entry at `key` from layers, later ones win. None after a problem.

        Methods and targets may also change the keys of `train`.
        """
        before = len(self.problems)
        values, origin = {}, {}
        trainable = set(Train.model_fields) if kind in ("method", "target") else set()
        allowed = [*plugin.fields, *trainable, *WORDS[kind]]
        for layer in layers:
            for field, value in layer.values.items():
                if field not in plugin.fields and field not in trainable:
                    self.problems.append(_unknown(layer, field, allowed, plugin))
                values[field] = value
                origin[field] = layer.key if layer.published else f"{layer.key}.{field}"
        own = {k: v for k, v in values.items() if k in plugin.fields}
        changes = {k: v for k, v in values.items() if k in trainable and k not in own}
        config = self._config(plugin, own, key, origin)
        train = self._train(changes, origin)
        if len(self.problems) > before:
            return None
        return Settings(name, plugin, config, train, origin)

    def _config(self, plugin: Plugin, own: dict, key: str, origin: dict[str, str]):
        """The plug-in's Config with these values, or None after noting what is wrong with them."""
        try:
            return plugin.adapter.validate_json(as_json(own))
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":  # of __post_init__, which runs when all types fit
                self.problems.append(blame(first["ctx"]["error"], key, own, origin))
            else:
                self.problems += sentences(
                    error, lambda field: origin.get(field, f"{key}.{field}"), lambda place: []
                )
        return None

    def _train(self, changes: dict, origin: dict[str, str]) -> dict:
        """`train` with an entry's changes; a batch that micro batches do not fill is a problem."""
        merged = self.params.train.model_dump() | changes
        try:
            merged = Train.model_validate_json(as_json(merged)).model_dump()
        except ValidationError as error:
            self.problems += sentences(error, origin.__getitem__, lambda place: [])
            return merged
        batch, micro = merged["batch_size"], merged["micro_batch"]
        if micro and batch % micro:
            keys = [origin[k] for k in ("micro_batch", "batch_size") if k in changes]
            self.problems.append(
                f"{keys[0] if keys else 'train.micro_batch'}: micro_batch {micro} does not divide "
                f"batch_size {batch}, so accumulation would never make a whole step"
            )
        return merged

    def suits(self, settings: Settings, key: str, data, model) -> None:
        """Ask a plug-in's Config whether it can work with a data set's images and an encoder."""
        encoder, size = model.settings.values, settings.input_size
        if size is not None and hasattr(encoder, "check"):
            encoder = encoder.at(data.image_size, size)
            try:
                encoder.check(size)
            except ValueError as error:
                at = settings.origin.get("input_size", f"{key}.input_size")
                said = str(error).replace("image_size", "input_size")
                self.problems.append(f"{at}: found {size}; {model.key}.{said}")
                return
        if not hasattr(settings.values, "check"):
            return
        try:
            settings.values.check(size or data.image_size, encoder)
        except ValueError as error:
            origin = {"image_size": f"{data.key}.image_size"} | settings.origin
            said = blame(error, key, settings.config, origin)
            self.problems.append(in_place(said, data.key, model.key))

    def kinds(self, kind: str) -> list[str]:
        """Names of all plug-ins of a kind."""
        return names(kind, self.root)


def _unknown(layer: Layer, key: str, allowed: list[str], plugin: Plugin) -> str:
    near = nearest(key, allowed)
    if layer.published:
        return f"{plugin.path}: PUBLISHED has {key!r}, which is no setting{near}"
    return f"{layer.key}.{key}: unknown key (found {shown(layer.values[key])}){near}"


def in_place(said: str, data: str, model: str) -> str:
    """A plug-in's message, with the keys of model and data as the user wrote them.

    `model.depth` becomes `models.vit.depth`, `image_size` becomes `data.photos.image_size`.
    """
    said = re.sub(r"(?<![\w.])model\.(?=\w)", f"{model}.", said)
    return re.sub(r"(?<![\w.])(data\.)?image_size\b", f"{data}.image_size", said)


def as_json(value) -> str:
    """What YAML gave as JSON, in which pydantic also takes a list for a tuple while it is strict
    about the rest.
    """
    return json.dumps(value, default=str)
