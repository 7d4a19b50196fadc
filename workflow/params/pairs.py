"""Data sets and encoders: which one is meant, and which of them go together."""

from __future__ import annotations

from workflow.messages import listed, nearest
from workflow.params.entries import DataSet, Encoder
from workflow.params.settings import Checker, Settings, in_place
from workflow.plugins import ParamsError, declared


class Pairs:
    """The data sets and encoders of a params file. Problems go to the checker.

    `declared_data`, `declared_models`: all names in params.yaml; `data`, `models`: the good ones.
    """

    def __init__(
        self,
        checker: Checker,
        declared_data: list[str],
        declared_models: list[str],
        data: dict[str, DataSet],
        models: dict[str, Encoder],
    ):
        self.checker, self.data, self.models = checker, data, models
        self.declared_data, self.declared_models = declared_data, declared_models
        self._fit: dict[tuple[str, str], bool] = {}

    def choose(
        self, key: str, data: str | None, model: str | None
    ) -> tuple[DataSet | None, Encoder | None]:
        """The data set and the encoder that an entry at `key` uses: the named or the only ones.

        None for one that is not good.
        """
        data = self._name(f"{key}.data", "data set", data, self.declared_data)
        model = self._name(f"{key}.model", "model", model, self.declared_models)
        return self.data.get(data), self.models.get(model)

    def data_set(self, key: str, name: str) -> DataSet | None:
        """The data set called `name`, which stands at `key`."""
        return self.data.get(self._name(key, "data set", name, self.declared_data))

    def _name(self, key: str, what: str, given: str | None, known: list[str]) -> str | None:
        if given is None and len(known) == 1:
            return known[0]
        if given is None and known:
            self.checker.problems.append(
                f"{key}: required, one of {', '.join(known)} (found nothing)"
            )
        elif given is not None and given not in known:
            self.checker.problems.append(
                f"{key}: no {what} is called {given!r}{nearest(given, known)}"
            )
        return given

    def fit(self, data: DataSet | None, model: Encoder | None) -> bool:
        """Whether the encoder takes the data set's images; if not, the problem is noted once."""
        if data is None or model is None:
            return False
        pair = data.name, model.name
        if pair not in self._fit:
            problem = _misfit(data, model)
            self._fit[pair] = problem is None
            self.checker.problems += [problem] if problem else []
        return self._fit[pair]

    def suits(
        self,
        who: str,
        key: str,
        settings: Settings | None,
        data: DataSet | None,
        model: Encoder | None,
    ) -> None:
        """Note why a method, target or task, called `who`, cannot work on this data and model."""
        if not self.fit(data, model) or settings is None:
            return
        literals = settings.plugin.literals
        takes = literals.get("INPUT")
        gives = data.settings.plugin.literals["INPUT"]
        missing = literals["NEEDS"] - model.can if takes is not None else frozenset()
        lacking = literals["NEEDS"] - data.settings.plugin.literals["GIVES"]
        if takes is not None and gives not in _words(takes):
            self.checker.problems.append(
                f"{key}: {who} takes {listed(_words(takes), 'or')}, source {data.source} of "
                f"{data.key} gives {gives}"
            )
        elif missing:
            self.checker.problems.append(
                f"{model.key}: {who} needs an encoder that can {_quoted(missing)}; kind "
                f"{model.kind} can {_quoted(model.can)}{self._able(literals['NEEDS'])}"
            )
        elif takes is None and lacking:  # a task
            self.checker.problems.append(
                f"{key}: {who} needs {listed(lacking)}, which the source {data.source} of "
                f"{data.key} never gives; expected another data set in {key}.data"
            )
        else:
            self.checker.suits(settings, key, data, model)

    def _able(self, needs: frozenset[str]) -> str:
        """The families that can do all of this, for the end of a message."""
        able = []
        for kind in self.checker.kinds("encoder"):
            try:
                can = declared("encoder", kind, self.checker.root).literals["CAN"]
            except ParamsError:
                continue
            able += [kind] if needs <= can else []
        return f"; expected kind {listed(able, 'or')}" if able else "; no family can"


def _misfit(data: DataSet, model: Encoder) -> str | None:
    """Why an encoder cannot take the images of a data set."""
    gives, takes = data.settings.plugin.literals["INPUT"], model.settings.plugin.literals["INPUT"]
    if gives not in _words(takes):
        return (
            f"{model.key}: kind {model.kind} takes {listed(_words(takes), 'or')}, source "
            f"{data.source} of {data.key} gives {gives}"
        )
    if hasattr(model.settings.values, "check"):
        try:
            model.settings.values.check(data.image_size)
        except ValueError as error:
            key, _, why = str(error).partition(":")
            at = data.key if key == "image_size" else model.key
            return in_place(f"{at}.{key}:{why}", data.key, model.key)
    return None


def _words(value: str | frozenset[str]) -> frozenset[str]:
    return frozenset([value]) if isinstance(value, str) else value


def _quoted(words: frozenset[str]) -> str:
    return listed(map(repr, words)) if words else "nothing of the kind"
