"""An unfinished run in its output folder: what is done, on disk before it counts, so that it can be gone on with."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from optimum_comp.checkpoint.parts import write_part
from optimum_comp.configuration import CompConfig
from optimum_comp.files import JOURNAL, durably, sync_file, sync_folder
from optimum_comp.report.run import REPORT_NAME


WORK = "comp_work"
"""Subfolder with the pruned layers, the hidden states and the calibration tokens of an unfinished run."""

_FORMAT = 3
_TOKENS = "tokens.safetensors"
_LAYERS, _FINISHING = "layers", "finishing"


class Journal:
    """The record of a run in its output folder, rewritten as a whole at each step.

    While it is there, the folder is unfinished, whatever else is in it. A run passes two stages: `layers`, of which
    `finished` counts those done, and `finishing`, in which a complete checkpoint in `work/final` takes its place
    file by file.

    Args:
        output: the output folder.
        state: what the journal holds.
    """

    def __init__(self, output: Path, state: dict[str, Any]):
        self.output = output
        self.work = output / WORK
        self.state = state

    @classmethod
    def start(cls, output: Path) -> Journal:
        """Begin anew in a folder that is empty, or whose model is to be replaced once the new one is complete."""
        output.mkdir(parents=True, exist_ok=True)
        journal = cls(output, {})
        # The journal first: a folder with anything of ours in it has one.
        journal.record(format=_FORMAT, stage=_LAYERS, finished=0, run={})
        shutil.rmtree(journal.work, ignore_errors=True)
        journal.work.mkdir()
        return journal

    @classmethod
    def read(cls, output: Path) -> Journal:
        """The journal of an unfinished run.

        Raises:
            ValueError: it is of another version of this package, or damaged.
        """
        try:
            state = json.loads((output / JOURNAL).read_text(encoding="utf-8"))
            known = state["format"] == _FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{JOURNAL} in {output} is damaged ({error}); start anew with --overwrite.") from error
        if not known:
            raise ValueError(f"{output} was begun by another version of optimum-comp; start anew with --overwrite.")
        return cls(output, state)

    @classmethod
    def find(cls, output: Path) -> Journal | None:
        """The journal of a run that can be gone on with; `None` if there is none, or nothing in it yet.

        Raises:
            ValueError: see `read`.
        """
        journal = cls.read(output) if (output / JOURNAL).is_file() else None
        return journal if journal is not None and journal.has_begun else None

    def begin(self, run: dict[str, Any], tokens: Tensor) -> None:
        """Record what an interrupted run has to be gone on with: its settings and calibration samples."""
        write_part({"tokens": tokens.contiguous()}, self.work / _TOKENS)
        self.record(run=run)

    @property
    def run(self) -> dict[str, Any]:
        """The settings that `begin` recorded."""
        found: dict[str, Any] = self.state["run"]
        return found

    @property
    def identity(self) -> dict[str, Any] | None:
        """What the output is to be known by, if that was said."""
        found: dict[str, Any] | None = self.run["record"]
        return found

    def tokens(self) -> Tensor:
        """The calibration samples that `begin` recorded, `[samples, length]`."""
        return load_file(self.work / _TOKENS)["tokens"]

    def config(self, given: CompConfig | None) -> CompConfig:
        """The run's config.

        Raises:
            ValueError: another one is given.
        """
        stored = CompConfig(**self.run["config"])
        if given is not None:
            self._require(given.fields(), self.run["config"])
        return stored

    def go_on(self, run: dict[str, Any]) -> None:
        """Take the run up, but not under other circumstances, in which it would come out otherwise.

        Args:
            run: as for `begin`. What the output is to be known by may be another now.

        Raises:
            ValueError: names what differs.
        """
        # Where the model is may change; what it is may not.
        movable = ("source", "arguments", "config", "record")
        self._require({k: v for k, v in run.items() if k not in movable}, self.run)
        if run["record"] != self.identity:
            self.record(run={**self.run, "record": run["record"]})

    def _require(self, now: dict[str, Any], then: dict[str, Any]) -> None:
        # Lists and tuples are the same in JSON.
        now = json.loads(json.dumps(now))
        different = [name for name in now if now[name] != then[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"the unfinished run in {self.output} has {name}={then[name]!r}, and now it is {now[name]!r}; go on "
                "as it was begun, or start anew with --overwrite."
            )

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """What an error in the block means for the run: one that would come again ends it, others interrupt it."""
        try:
            yield
        except (ValueError, FloatingPointError):
            self.abandon()
            raise
        except OSError as error:
            raise OSError(f"{error}; {self.hint()}") from error

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What an error in the block means when all layers are done: whatever it is, they are kept."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{error}; {self.hint()}") from error
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{error} {self.hint()}") from error

    def hint(self) -> str:
        """How far the run has come, and how to go on with it."""
        return (
            f"{self.finished} layers are done and kept in {self.output}; go on with\n"
            f"  optimum-cli comp prune --resume {self.output}"
        )

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.state["run"])

    @property
    def finished(self) -> int:
        """Layers that are done."""
        return int(self.state["finished"])

    @property
    def is_finishing(self) -> bool:
        """Whether all layers are done and the result is complete in `work/final`, or partly moved from there."""
        return bool(self.state["stage"] == _FINISHING)

    def record(self, **changes: Any) -> None:
        """Change the state; on disk when this returns."""
        self.state |= changes
        with durably(self.output / JOURNAL) as partial:
            partial.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")

    def publish(self) -> None:
        """Put the complete checkpoint in `work/final` in the place of what the folder held, and end the run.

        Can be called again after any interruption.
        """
        final = self.work / "final"
        if not self.is_finishing:
            for path in final.iterdir():
                sync_file(path)
            sync_folder(final)
            ours = {JOURNAL, WORK}
            stale = sorted({path.name for path in self.output.iterdir()} - ours)
            self.record(stage=_FINISHING, files=sorted(path.name for path in final.iterdir()), stale=stale)
        for name in set(self.state["stale"]) - set(self.state["files"]):
            _remove(self.output / name)
        for name in self.state["files"]:
            if (final / name).exists():
                if (self.output / name).is_dir():
                    _remove(self.output / name)
                (final / name).replace(self.output / name)
        sync_folder(self.output)
        shutil.rmtree(self.work, ignore_errors=True)
        (self.output / JOURNAL).unlink(missing_ok=True)
        sync_folder(self.output)

    def abandon(self) -> None:
        """Remove the run's traces, and the folder if nothing else is in it."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.output / JOURNAL).unlink(missing_ok=True)
        if not any(self.output.iterdir()):
            self.output.rmdir()


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a finished result of pruning."""
    return (folder / REPORT_NAME).is_file() and not (folder / JOURNAL).is_file()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
