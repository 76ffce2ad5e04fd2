"""Recipes: which stages, with which settings, as a YAML file that repeats a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from optimum_comp.evaluation import Settings
from optimum_comp.files import durably
from optimum_comp.options import Option, Text, defaults_of, from_mapping, options_of, require_known, shown
from optimum_comp.stages.base import CHECKPOINT, Stage
from optimum_comp.stages.bundle import Bundle
from optimum_comp.stages.distil import Distil
from optimum_comp.stages.export import Export
from optimum_comp.stages.prune import Prune
from optimum_comp.stages.quantize import Quantize
from optimum_comp.stages.vocabulary import Vocabulary


FORMAT = 1
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Vocabulary, Prune, Distil, Export, Quantize, Bundle)}
"""Every stage, in the order in which those that are asked for follow each other."""

LOADING = {
    "revision": Option(Text("a branch, tag or commit"), "Branch, tag or commit of a model on the hub.", optional=True),
    "dtype": Option(
        Text("auto, float32, bfloat16 or float16"),
        "auto, float32, bfloat16 or float16; the checkpoint's own by default.",
        optional=True,
    ),
    "gguf_file": Option(Text("a file's name"), "Name of a GGUF file in the model's folder.", optional=True),
    "subfolder": Option(Text("a folder's name"), "Folder of the model's repository that holds it.", optional=True),
}
"""How a model is found: what a recipe may say of it. Permissions aren't among it: a file can't grant them."""

_PERMISSIONS = ("trust_remote_code", "allow_pickle", "use_safetensors", "token")
_KNOWN = ("recipe", "description", "model", "loading", "stages", "measure")
_LARGEST = 2**20
"""Bytes of a file that is read as a recipe."""


@dataclass(frozen=True)
class Recipe:
    """What a chain does.

    Attributes:
        stages: in order; each takes what the one before makes.
        measure: what is measured of the models on the way; `None` for nothing.
        model: folder or hub id of the dense model; `None` if it is to be given.
        loading: how it is found.
        description: what the recipe is for.
    """

    stages: tuple[Stage, ...]
    measure: Settings | None = field(default_factory=Settings)
    model: str | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""

    @classmethod
    def from_dict(cls, data: Any, what: str = "the recipe") -> Recipe:
        """A recipe from what a file holds.

        Args:
            data: what `to_dict` makes; what is left out is as by default.
            what: where it is from, for errors.

        Raises:
            ValueError: something in it isn't known or allowed; names it, and says what is.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"{what} must be a mapping with the fields {', '.join(_KNOWN)}.")
        require_known(data, _KNOWN, what)
        if data.get("recipe", FORMAT) is not FORMAT and data["recipe"] != FORMAT:
            raise ValueError(f"{what}: recipe={shown(data['recipe'])} is not valid: this version reads {FORMAT}.")
        model = data.get("model")
        if model is not None:
            model = Text("a folder or a hub id").check(f"{what}: model", model)
        description = data.get("description", "")
        if not isinstance(description, str):
            raise ValueError(f"{what}: description={shown(description)} is not valid: description must be text.")
        loading = _loading(data.get("loading"), what)
        stages = tuple(_stages(data.get("stages"), what))
        measure = None
        if data.get("measure") is not False:
            measure = from_mapping(Settings, data.get("measure"), f"{what}, measure", options_of(Settings))
        return cls(stages, measure, model, loading, description)

    def to_dict(self) -> dict[str, Any]:
        """All settings, defaults included: so the file means the same with other defaults."""
        return {
            "recipe": FORMAT,
            **({"description": self.description} if self.description else {}),
            **({"model": self.model} if self.model is not None else {}),
            **({"loading": dict(self.loading)} if self.loading else {}),
            "stages": [{stage.name: stage.to_dict()} for stage in self.stages],
            "measure": False if self.measure is None else _measuring(self.measure),
        }

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from a file.

        Raises:
            ValueError: it isn't one; names file, line and what is wrong.
            OSError: it can't be read.
        """
        path = Path(path)
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path} is no recipe: it has more than {_LARGEST:,} bytes.")
        return cls.from_text(path.read_bytes(), str(path))

    @classmethod
    def from_text(cls, text: bytes | str, what: str = "the recipe") -> Recipe:
        """A recipe from YAML.

        Raises:
            ValueError: see `read`.
        """
        try:
            data = yaml.load(text, _Loader)
        except yaml.MarkedYAMLError as error:
            place = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
            raise ValueError(f"{what} is not YAML: {error.problem or error.context}{place}.") from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise ValueError(f"{what} is not YAML: {str(error).splitlines()[0]:.200}.") from error
        except RecursionError as error:
            raise ValueError(f"{what} is no recipe: it is nested too deeply.") from error
        return cls.from_dict(data, what)

    def write(self, path: Path) -> None:
        """Write the file that `read` reads; it is there whole, or as it was before."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)
        with durably(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, if there is one."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def changed(self, data: Mapping[str, Any]) -> Recipe:
        """The recipe with other settings.

        Args:
            data: like what `to_dict` makes; of stages, a mapping from name to the settings that change. A stage that
                isn't there yet is added.

        Raises:
            ValueError: a setting isn't known or allowed; names it, and says what is.
        """
        now = self.given()
        stages = {name: settings for each in now["stages"] for name, settings in each.items()}
        for name, settings in data.get("stages", {}).items():
            made = from_mapping(
                STAGES[name].from_settings, {**stages.get(name, {}), **settings}, "", STAGES[name].options()
            )
            stages[name] = _given(made)
        order = [name for name in STAGES if name in stages]
        measure, asked = now["measure"], data.get("measure", {})
        if asked is False:
            measure = False
        elif asked:
            measured = from_mapping(Settings, {**(measure or {}), **asked}, "", options_of(Settings))
            measure = _measuring(measured)
        return Recipe.from_dict(
            {
                **now,
                **{key: value for key, value in data.items() if key in ("model", "description")},
                "loading": {**now.get("loading", {}), **data.get("loading", {})},
                "stages": [{name: stages[name]} for name in order],
                "measure": measure,
            }
        )

    def given(self) -> dict[str, Any]:
        """Like `to_dict`, without what is left to the chain to decide."""
        return {**self.to_dict(), "stages": [{stage.name: _given(stage)} for stage in self.stages]}


def _measuring(settings: Settings) -> dict[str, Any]:
    """Settings of measuring; what is left out is as by default."""
    usual, found = defaults_of(Settings), dataclasses.asdict(settings)
    return {name: found[name] for name in found if found[name] is not None or usual[name] is not None}


def _given(stage: Stage) -> dict[str, Any]:
    """A stage's settings, without what is left to the chain to decide."""
    settings = stage.to_dict()
    if isinstance(stage, Prune) and stage.is_equalized is None:
        del settings["equalize"]
    return settings


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("optimum_comp"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Recipe:
    """A recipe by its file, or by its name among those that come with the package.

    Raises:
        ValueError: there is none.
        OSError: it can't be read.
    """
    known = shipped()
    if name in known:
        return Recipe.read(known[name])
    if Path(name).is_file():
        return Recipe.read(name)
    raise ValueError(f"recipe={name!r} is not valid: it must be a YAML file, or one of {', '.join(known)}.")


def _loading(given: Any, what: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        for name in _PERMISSIONS:
            if name in given:
                raise ValueError(
                    f"{what}, loading: {name} isn't taken from a file, which can't grant permissions; give it on the "
                    "command line (--trust-remote-code, --allow-pickle), a token as HF_TOKEN."
                )
    found: dict[str, Any] = from_mapping(dict, given, f"{what}, loading", LOADING)
    return {name: LOADING[name].check(f"{what}, loading: {name}", value) for name, value in found.items()}


def _stages(given: Any, what: str) -> Iterator[Stage]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{what}: stages must be a list of some of {', '.join(STAGES)}, in this order.")
    kind, last = CHECKPOINT, -1
    for each in given:
        name, settings = (each, {}) if isinstance(each, str) else _only(each, what)
        require_known([name], STAGES, f"{what}, stages")
        number = list(STAGES).index(name)
        if number <= last:
            raise ValueError(f"{what}: stages must be some of {', '.join(STAGES)}, each once, in this order.")
        made = STAGES[name]
        if made.takes != kind:
            raise ValueError(f"{what}: {name} takes {_KINDS[made.takes]}, and before it there is {_KINDS[kind]}.")
        yield from_mapping(made.from_settings, settings, f"{what}, {name}", made.options())
        kind, last = made.makes, number


_KINDS = {"checkpoint": "a checkpoint", "onnx": "an ONNX graph (export)", "bundle": "a bundle"}


def _only(each: Any, what: str) -> tuple[str, Any]:
    if not isinstance(each, Mapping) or len(each) != 1:
        raise ValueError(f"{what}: {shown(each)} is no stage: write `- NAME` or `- NAME: {{SETTING: VALUE}}`.")
    ((name, settings),) = each.items()
    return str(name), settings


class _Loader(yaml.SafeLoader):
    """Plain data; a key that is there twice is refused, and so are aliases: a little text of them is endless data."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) aren't read", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"{shown(name)} is no name", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{shown(name)} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
