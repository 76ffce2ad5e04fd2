"""What a stage is, what it makes, and the key under which that is kept."""

from __future__ import annotations

import hashlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from optimum_comp.calibration.mix import IN_MEMORY, parts_of
from optimum_comp.calibration.text import PYDOC, SELF, Calibration, CalibrationSource, source_name
from optimum_comp.files import STAGE_RECORD, file_digest
from optimum_comp.options import Option
from optimum_comp.strict_json import read_object


if TYPE_CHECKING:
    from optimum_comp.stages.chain import Chain

CHECKPOINT, ONNX, BUNDLE = "checkpoint", "onnx", "bundle"
DENSE = "dense"
"""Name of what a chain begins with."""


@dataclass(frozen=True)
class Artifact:
    """A model, as one stage leaves it and the next takes it.

    Attributes:
        name: `dense`, or that of its folder.
        place: folder, or hub id of the dense model.
        kind: `checkpoint`, `onnx` or `bundle`.
        key: digest of how it was made: of the stage, its settings and the key of what it was made from.
    """

    name: str
    place: str
    kind: str
    key: str

    @property
    def folder(self) -> Path:
        """Its folder; of a hub id, nothing that is there."""
        return Path(self.place)


class Stage(ABC):
    """One step of the chain.

    To add one: declare its options, say what determines the result, and make it (see docs/extending/stage.md).
    """

    name: ClassVar[str]
    takes: ClassVar[str]
    makes: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same settings make something else than before."""

    @classmethod
    @abstractmethod
    def options(cls) -> dict[str, Option]:
        """Its settings, by name."""

    @classmethod
    @abstractmethod
    def from_settings(cls, **given: Any) -> Stage:
        """A stage with these settings.

        Raises:
            ValueError: one isn't allowed; names it, its value and what is.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All settings, as a recipe has them."""

    @abstractmethod
    def identity(self, chain: Chain) -> dict[str, Any]:
        """What determines the result, beyond what it is made from; for JSON."""

    @abstractmethod
    def place(self, before: str) -> str:
        """Name of the folder that it makes of one called `before`."""

    @abstractmethod
    def run(self, source: Artifact, target: Path, chain: Chain, record: Mapping[str, Any]) -> dict[str, Any]:
        """Make the target, with the record in it, whole or not at all.

        Args:
            source: what it is made from.
            target: the folder.
            chain: what the stages share.
            record: to be written as `STAGE_RECORD` together with all else.

        Returns:
            What is to be told of it, for JSON.
        """

    def check(self, chain: Chain) -> None:
        """Refuse what can be refused before any work.

        Raises:
            ValueError: it can't be done.
            ImportError: something isn't installed.
        """
        return

    @property
    def wants_samples(self) -> bool:
        """Whether calibration samples are looked at."""
        return False

    def disk_bytes(self, chain: Chain) -> int:
        """Space that making the result takes on the disk at its worst, the result included; about."""
        return 0

    def memory_bytes(self, chain: Chain) -> dict[str, int]:
        """What it takes of memory at its worst, by the name of the work; nothing if it keeps to a limit itself."""
        return {}

    def record(self, key: str, parent: str, chain: Chain) -> dict[str, Any]:
        """What the result is known by."""
        return {"stage": self.name, "key": key, "parent": parent, "settings": self.identity(chain)}


def key_of(stage: Stage, parent: str, chain: Chain) -> str:
    """The key of what a stage makes of something with the key `parent`."""
    return digest({"stage": stage.name, "version": stage.version, "settings": stage.identity(chain), "parent": parent})


def digest(data: Any) -> str:
    """SHA-256 of something that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def recorded(folder: Path) -> dict[str, Any]:
    """What a folder is known by; nothing if it says nothing that can be read."""
    try:
        return read_object(folder / STAGE_RECORD)
    except (OSError, ValueError):
        return {}


def recorded_key(folder: Path) -> str | None:
    """The key under which a folder is known; `None` if it says none."""
    key = recorded(folder).get("key")
    return key if isinstance(key, str) else None


ANSWERS = 0.2
"""Share of a text that the dense model writes itself, where a chain decides: answers, if it is a chat model."""


def source_identity(source: CalibrationSource | Calibration | None) -> Any:
    """What tells a calibration source from another; of a file, its content, and not where it is."""
    if source is None:
        return SELF
    if isinstance(source, Calibration):
        return source.describe()["sha256"]
    if isinstance(source, Tensor):
        return hashlib.sha256(source.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(source, str) and source.startswith(IN_MEMORY):
        return source.removeprefix(IN_MEMORY)
    parts = parts_of(source)
    if parts:
        return [[source_identity(part.source), round(part.share, 6)] for part in parts]
    if isinstance(source, (str, Path)):
        if Path(source).is_file():
            return file_digest(Path(source))
        return [PYDOC, platform.python_version()] if str(source) == PYDOC else str(source)
    if hasattr(source, "column_names"):
        return str(getattr(source, "_fingerprint", source_name(source)))
    return digest(list(source))


def written_source(source: CalibrationSource | Calibration | None) -> str:
    """A calibration source as a recipe has it."""
    if source is None:
        return SELF
    parts = parts_of(source)
    if parts:
        return ",".join(f"{written_source(part.source)}:{part.share:.6g}" for part in parts)
    if isinstance(source, (str, Path)):
        return str(Path(source).resolve()) if Path(source).is_file() else str(source)
    return f"{IN_MEMORY}{source_identity(source)}"
