"""Files of the user's own that params.yaml names: their state is part of the parameters of a job.

A source says of itself that it reads files: `ARGUMENT = "PATH"` is what follows the colon in
`source: NAME:PATH`, and `PATHS` lists settings that name further files. A target's setting
`local:PATH` or `file:PATH` names weights; its `PATHS` lists settings that are plain paths. Their
`READS` and `SKIPS` say which names in a folder count.

What the files hold is part of a fingerprint, where they lie is not.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

from workflow.manifest import Manifest
from workflow.messages import ParamsError, did_you_mean, legible, shortened
from workflow.params import DataSet, Settings
from workflow.plan.listing import Memory, Names, changes, state
from workflow.plan.weights import fault

SCHEMES = ("local:", "file:")
SHOWN = 3  # changed files in a message
SEEN = Path("work/seen")  # beside the results: what is remembered of the files


@dataclass(frozen=True)
class Named:
    """A path that params.yaml names. `key`: where; `names`: what counts if it is a folder;
    `weights`: it has to be a folder of weights.
    """

    key: str
    path: Path
    names: Names
    weights: bool = False


@dataclass(frozen=True)
class Place:
    """Where results lie, and the params file that asks for them."""

    results: Path
    params_file: Path

    @property
    def seen(self) -> Path:
        return self.results.parent / SEEN

    def made(self, id: str) -> Manifest | None:
        """The manifest of a finished job."""
        return Manifest.read(self.results / id / "manifest.json")


def source_state(data: DataSet, source: dict, place: Place) -> dict[str, str] | None:
    """{"argument" or setting: digest} of the files that a source reads; None if it reads none.

    When files are gone, but the data set was made from the same `source`, the digests of then.
    """
    literals = data.settings.plugin.literals
    skips = literals["SKIPS"]
    named: dict[str, Named] = {}
    if literals["ARGUMENT"] == "PATH":
        names = Names(literals["READS"], skips)
        named["argument"] = Named(f"{data.key}.source", Path(data.argument), names)
    for setting, path in _paths(data.settings).items():
        key = data.settings.origin.get(setting, f"{data.key}.options.{setting}")
        named[setting] = Named(key, Path(path), Names(skips=skips))
    made = place.made(f"data/{data.name}")
    params = made.params if made else {}
    recorded = params.get("source_state") or {}
    stays = recorded if params.get("source") == source else {}
    return _states(named, recorded, stays, f"data/{data.name}", place)


def weights_state(settings: Settings, key: str, name: str, place: Place) -> dict | None:
    """{setting: digest} of the files that the settings of a target `name` name; None for none.

    `key`: where params.yaml declares the target. When files are gone, but the target was made from
    the same names, the digests of that time.
    """
    paths, weights = _paths(settings), set()
    for setting, value in settings.config.items():
        if isinstance(value, str) and value.startswith(SCHEMES):
            paths[setting] = value.partition(":")[2]
            weights |= {setting} if value.startswith("local:") else set()
    names = Names(settings.plugin.literals["READS"], settings.plugin.literals["SKIPS"])
    named = {
        setting: Named(
            settings.origin.get(setting, f"{key}.{setting}"), Path(path), names, setting in weights
        )
        for setting, path in paths.items()
    }
    made = place.made(f"target/{name}")
    params = made.params.get("target", {}) if made else {}
    before, recorded = params.get("config", {}), params.get("files") or {}
    same = all(before.get(setting) == settings.config[setting] for setting in paths)
    return _states(named, recorded, recorded if same else {}, f"target/{name}", place)


def _paths(settings: Settings) -> dict[str, str]:
    """{setting: path} of those that the plug-in's PATHS lists and params.yaml gives."""
    paths = settings.plugin.literals.get("PATHS", ())
    return {setting: settings.config[setting] for setting in paths if settings.config[setting]}


def _states(
    named: dict[str, Named], recorded: dict, stays: dict, id: str, place: Place
) -> dict[str, str] | None:
    """`recorded`: the digests that the results were made from; `stays`: if files may be gone."""
    found = {}
    for name, about in named.items():
        try:
            path = about.path.expanduser()
            shown = shortened(legible(str(path)), 200)
            if path.exists():
                if about.weights and (wrong := fault(path)):
                    raise ParamsError(f"{place.params_file}:\n  {about.key}: {wrong}")
                memory = Memory(place.seen, path, about.names)
                found[name] = state(path, about.names, memory, recorded.get(name))
                continue
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            said = f"{about.key}: {shortened(legible(str(about.path)), 200)} cannot be read: {why}"
            raise ParamsError(f"{place.params_file}:\n  {said}") from None
        if stays:
            gone = f"{about.key}: {shown} is not there"
            output = place.results / id
            warnings.warn(f"{gone}; {output}, made from it before, stays in use", stacklevel=2)
            return stays
        why = f"{about.key}: {shown} does not exist{_near(path)}"
        raise ParamsError(f"{place.params_file}:\n  {why}")
    return found or None


def without_places(params: dict, places: dict[str, str]) -> dict:
    """The parameters of a job without the paths to its user's files, whose contents are in them."""
    if not places:
        return params
    params = copy.deepcopy(params)
    for key in places:
        *above, last = key.split(".")
        at = params
        for part in above:
            at = at[part]
        scheme = next((s for s in SCHEMES if str(at[last]).startswith(s)), "")
        at[last] = scheme
    return params


def changed_files(place: Place, old, new) -> str:
    """Which files differ between two states, for the end of a clause; nothing if it is forgotten.

    A state is a digest; anything else has none.
    """
    found = changes(place.seen, old, new) if isinstance(old, str) and isinstance(new, str) else []
    more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return f" ({', '.join(found[:SHOWN] + more)})" if found else ""


def _near(path: Path) -> str:
    """For the end of a message: the nearest name in its folder, or the folder that is missing."""
    if path.parent.is_dir():
        return did_you_mean(path.name, (entry.name for entry in path.parent.iterdir()))
    missing = next(folder for folder in reversed(path.parents) if not folder.is_dir())
    return f" ({legible(str(missing))} is no folder)"
