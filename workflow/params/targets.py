"""The section `targets`: teachers and tokenizers, each perhaps made from another one or a run."""

from __future__ import annotations

from dataclasses import dataclass

from workflow.params.pairs import Pairs
from workflow.params.sections import TargetWords
from workflow.params.settings import Checker, Layer, Settings
from workflow.params.teachers import Learner, tokens


@dataclass(frozen=True)
class Target:
    """An entry of `targets`. upstream: a name under targets, run:NAME or None."""

    name: str
    key: str
    kind: str
    upstream: str | None
    seed: int
    data: str
    model: str
    settings: Settings

    @property
    def produces(self) -> frozenset[str]:
        return self.settings.plugin.literals["PRODUCES"]

    def learner(self, pairs: Pairs) -> Learner:
        """What it needs of its upstream."""
        return Learner(
            f"{self.key}.upstream",
            f"kind {self.kind}",
            "upstream target",
            self.upstream,
            self.settings.plugin.literals["UPSTREAM"],
            [self.seed],
            tokens(pairs.data[self.data], pairs.models[self.model]),
        )


def check_targets(checker: Checker, pairs: Pairs) -> dict[str, Target]:
    """The targets that are good, apart from their upstream; problems go to the checker."""
    found = {}
    for name, section in checker.params.targets.items():
        key = f"targets.{name}"
        words, given = checker.words(TargetWords, key, section)
        plugin = words and checker.plugin("target", key, name, words.kind)
        if not plugin:
            continue
        kind = words.kind or name
        layers = [Layer(key, given)]
        if words.recipe:
            layers.insert(0, checker.published(plugin, key))
        settings = checker.settings("target", kind, plugin, key, layers)
        data, model = pairs.choose(key, words.data, words.model)
        pairs.suits(f"target {kind}", key, settings, data, model)
        if settings and data and model:
            found[name] = Target(
                name, key, kind, words.upstream, words.seed, data.name, model.name, settings
            )
    return found
