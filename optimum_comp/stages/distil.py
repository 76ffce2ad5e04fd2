"""The stage that distils."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optimum_comp.beginning import start_tokens
from optimum_comp.calibration.mix import IN_MEMORY, parts_of, weighed, with_another
from optimum_comp.calibration.text import PYDOC, SELF, CalibrationSource, first_tokens, read_beginning
from optimum_comp.checkpoint.opening import find_device, open_config
from optimum_comp.checkpoint.reader import weight_files
from optimum_comp.checkpoint.source import empty_model
from optimum_comp.checkpoint.tokenizer import open_tokenizer
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.distillation.texts import require_blocks, sources_of
from optimum_comp.files import file_digest
from optimum_comp.options import Option, Text, options_of
from optimum_comp.stages.base import ANSWERS, CHECKPOINT, DENSE, Artifact, Stage, source_identity, written_source
from optimum_comp.utils import lookup_arguments


DISTIL = "distil"
_SAMPLES = "calibration samples"
"""Name of text that only memory holds; the samples that were taken of it are kept."""

TEACHER = Option(
    Text("a folder or hub id"),
    "The model whose predictions are learnt; in a chain, the one that is pruned.",
    optional=True,
)


class Distil(Stage):
    """Makes a checkpoint of the same shape that predicts more like the dense model.

    Args:
        settings: how.
        teacher: folder or hub id; the chain's dense model if `None`.
        asked: the settings before a chain decided some of them; `settings`, if `None`.
    """

    name, takes, makes = DISTIL, CHECKPOINT, CHECKPOINT

    def __init__(
        self, settings: DistilSettings | None = None, teacher: str | None = None, asked: DistilSettings | None = None
    ):
        self.settings, self.teacher = settings or DistilSettings(), teacher
        self._asked = asked or self.settings

    @classmethod
    def options(cls) -> dict[str, Option]:
        """See `Stage`."""
        return {"teacher": TEACHER, **options_of(DistilSettings)}

    @classmethod
    def from_settings(cls, **given: Any) -> Distil:
        """See `Stage`."""
        teacher = TEACHER.check("teacher", given.pop("teacher", None))
        return cls(DistilSettings(**given), teacher)

    def decided(self, calibration: CalibrationSource | None, column: str | None) -> Distil:
        """The same with what isn't asked for as a chain has it.

        Args:
            calibration: what pruning is calibrated on: also the text to train on, unless the model writes all of it.
                A fifth is written by the teacher all the same: answers to requests, which no book holds.
            column: of a dataset that is that text.
        """
        chosen: dict[str, Any] = {}
        written = written_source(calibration)
        if self._asked.text is None and written != SELF:
            chosen["text"] = _with_written(written)
            if self._asked.text_column is None:
                chosen["text_column"] = column
        return Distil(dataclasses.replace(self._asked, **chosen), self.teacher, self._asked)

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`; what a chain decides is left to it."""
        found = self._asked.to_dict()
        if self._asked.text is not None:
            found["text"] = [_written(each) for each in self._asked.text]
        if self.teacher is None:
            return found
        return {**found, "teacher": str(Path(self.teacher).resolve()) if Path(self.teacher).is_dir() else self.teacher}

    def identity(self, chain: Any) -> dict[str, Any]:
        """See `Stage`."""
        text = None
        if self.settings.text is not None:
            parts = sources_of(self.settings.text)
            text = [[source_identity(part.source), round(part.share, 6)] for part in parts]
        return {
            **self.settings.to_dict(),
            "device": (self.settings.device or "cpu").split(":")[0],
            "text": text,
            "teacher": chain.teacher.key if self.teacher is None else _model_identity(self.teacher),
        }

    def place(self, before: str) -> str:
        """See `Stage`; beside each other for different bits, so that one is there still where the other is made."""
        name = "distilled" if self.settings.rounding is None else f"distilled-for-{self.settings.rounding}"
        return name if before == DENSE else f"{before}-{name}"

    def check(self, chain: Any) -> None:
        """See `Stage`."""
        from optimum_comp.distillation.planning import check_settings

        learns_from_itself = self.teacher is None and not chain.prunes and chain.teacher.name == chain.base.name
        if learns_from_itself and self.settings.rounding is None:
            raise ValueError(
                "distillation without pruning would teach the model its own predictions; prune too, name a teacher, "
                "or train with rounding."
            )
        if any(each.startswith(IN_MEMORY) for each in self._asked.text or []):
            raise ValueError("the text to distil on was given in memory, and no file holds it; give it anew.")
        find_device(self.settings.device)
        student = open_config(chain.model, lookup_arguments(chain.loading))
        check_settings(student, self._teacher_config(chain), self.settings)
        parts = [part for part in sources_of(self.settings.text) if part.source not in (SELF, PYDOC)]
        parts = [part for part in parts if not part.source.startswith(IN_MEMORY)]
        if parts:
            tokenizer = open_tokenizer(chain.model, lookup_arguments(chain.loading))
            length = self.settings.sequence_length
            for part in parts:
                beginning, name = read_beginning(part.source, self.settings.text_column, 2 * length)
                tokens = first_tokens(tokenizer, beginning, 2 * length).numel()
                require_blocks(tokens, name, length, start_tokens(tokenizer))

    def disk_bytes(self, chain: Any) -> int:
        """See `Stage`."""
        from optimum_comp.distillation.planning import disk_of

        return disk_of(int(chain.parameters_after), self.settings.lora_rank or 0)

    def memory_bytes(self, chain: Any) -> dict[str, int]:
        """See `Stage`."""
        from optimum_comp.distillation.planning import choose_rank

        if torch.device(self.settings.device or "cpu").type != "cpu":
            return {}
        trust = {name: value for name, value in chain.loading.items() if name == "trust_remote_code"}
        dense = empty_model(self._teacher_config(chain), torch.float32, **trust)
        writes = any(part.source == SELF for part in sources_of(self.settings.text))
        # Of the dense model's size, since the smaller one isn't there yet: rather too much.
        return {DISTIL: choose_rank(dense, dense, self.settings, chain.max_memory, written=writes)[1]}

    def _teacher_config(self, chain: Any) -> Any:
        name = chain.model if self.teacher is None else self.teacher
        return open_config(name, lookup_arguments(chain.loading) if self.teacher is None else {})

    def run(self, source: Artifact, target: Path, chain: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        """See `Stage`."""
        from optimum_comp.distillation.run import distil

        text, known = self.settings.text, {}
        if text is not None and any(each.startswith(IN_MEMORY) for each in text):
            text = [_SAMPLES if each.startswith(IN_MEMORY) else each for each in text]
            known = {_SAMPLES: chain.samples().without_beginning()}
        written = None
        if chain.prunes and self.teacher is None and any(part.source == SELF for part in sources_of(text)):
            samples = chain.samples()
            written = None if samples.written is None else samples.without_beginning()[samples.written]
        found = distil(
            chain.local(source),
            chain.teacher.place if self.teacher is None else self.teacher,
            target,
            dataclasses.replace(self.settings, text=text),
            teacher_arguments=chain.loading_of(chain.teacher) if self.teacher is None else {},
            known=known,
            written=written,
            max_memory=chain.max_memory,
            overwrite=chain.overwrite,
            resume=True,
            record=record,
        )
        return {**found.to_dict(), "output": target.name}


def _with_written(calibration: str) -> list[str]:
    """A source or a mix, and a fifth that the teacher writes, unless it writes some of it anyway."""
    parts = parts_of(calibration)
    if not parts:
        return [calibration, f"{SELF}:{ANSWERS / (1 - ANSWERS):g}"]
    if any(part.source == SELF for part in parts):
        return [calibration]
    return with_another(calibration, SELF, ANSWERS)


def _written(text: str) -> str:
    """A source, or a mix with its shares as they are, with the full names of files."""
    parts = weighed(text)
    return ",".join(f"{written_source(part.source)}:{part.share:g}" for part in parts) or written_source(text)


def _model_identity(model: str) -> Any:
    """What tells a teacher from another: of a folder, its weights."""
    if not Path(model).is_dir():
        return model
    return {path.name: file_digest(path) for path in sorted(weight_files(Path(model)))}
