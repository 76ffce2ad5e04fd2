"""An unfinished run in its output folder: what is done, on disk before it counts, so that it can be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from optimum_comp.beginning import Beginning
from optimum_comp.calibration.text import Calibration
from optimum_comp.checkpoint.parts import write_part
from optimum_comp.checkpoint.source import part_name
from optimum_comp.configuration import CompConfig
from optimum_comp.files import JOURNAL, durably, sync_file, sync_folder
from optimum_comp.report.run import REPORT_NAME, LayerReport
from optimum_comp.strict_json import read_object
from optimum_comp.sweep.entries import (
    FINISHING,
    LAYERS,
    PERMISSIONS,
    WORK,
    is_plain_name,
    require_report,
    require_state,
)
from optimum_comp.sweep.ranks import first_says, is_first_process


_FORMAT = 5
_TOKENS = "tokens.safetensors"


class DamagedRunError(ValueError):
    """What an unfinished run has left can't be gone on with; nothing of it is removed."""

    def __init__(self, output: Path, reason: str):
        super().__init__(f"the unfinished run in {output} is damaged: {reason}; start anew with --overwrite.")


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
        # What goes at the end; what comes into the folder meanwhile is somebody's own. A name that couldn't be one on
        # another system stays: nothing that a run writes is called so.
        stale = sorted(path.name for path in output.iterdir() if is_plain_name(path.name))
        # The journal first: a folder with anything of ours in it has one.
        journal.record(format=_FORMAT, stage=LAYERS, finished=0, run={}, stale=stale)
        _remove(journal.work)
        journal.work.mkdir()
        return journal

    @classmethod
    def read(cls, output: Path) -> Journal:
        """The journal of an unfinished run, which somebody else may have written.

        Raises:
            ValueError: it is of another version of this package, or damaged; or links lead out of the folder.
        """
        try:
            state = read_object(output / JOURNAL)
            known = state.get("format") == _FORMAT
            if known:
                require_state(state)
        except ValueError as error:
            raise DamagedRunError(output, f"{JOURNAL}: {error}") from error
        if not known:
            raise ValueError(f"{output} was begun by another version of optimum-comp; start anew with --overwrite.")
        journal = cls(output, state)
        journal.require_plain()
        return journal

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

    def calibration(self) -> Calibration:
        """The calibration samples that `begin` recorded.

        Raises:
            ValueError: they aren't there as they were.
        """
        known = self.run["calibration"]
        try:
            tokens = load_file(self.work / _TOKENS)["tokens"]
        except (SafetensorError, OSError, KeyError) as error:
            raise self._damaged(_TOKENS, error) from error
        found = Calibration(tokens, known["source"], Beginning.from_dict(known))
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or found.describe() != known:
            raise DamagedRunError(self.output, f"{_TOKENS} doesn't hold what it should")
        return found

    def report_file(self, place: int) -> Path:
        """Where the report on the pruned model's layer number `place` is."""
        return self.work / f"layer-{place:05d}.json"

    def reports(self) -> list[LayerReport]:
        """The reports on finished layers.

        Raises:
            ValueError: one isn't there as it was.
        """
        return [self._report(place) for place in range(self.finished)]

    def _report(self, place: int) -> LayerReport:
        path = self.report_file(place)
        try:
            report = read_object(path)
            require_report(report)
        except (ValueError, OSError) as error:
            raise self._damaged(path.name, error) from error
        return LayerReport.of(report)

    def _damaged(self, name: str, error: Exception) -> DamagedRunError:
        return DamagedRunError(self.output, f"{name} can't be read ({error})")

    def require_plain(self) -> None:
        """Refuse a work folder in which links lead elsewhere: what is done in it would be done there.

        Raises:
            ValueError: names the link.
        """
        inside = (Path(folder) / name for folder, *names in os.walk(self.work) for name in [*names[0], *names[1]])
        for path in (self.output / JOURNAL, self.work, *inside):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DamagedRunError(self.output, f"{path.relative_to(self.output)} is a link, or no file")

    def config(self, given: CompConfig | None) -> CompConfig:
        """The run's config.

        Raises:
            ValueError: another one is given.
        """
        stored = CompConfig(**self.run["config"])
        if given is not None:
            self._require(given.fields(), self.run["config"])
        return stored

    def opening(self, model: str | None, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Which model to open for the run, and how.

        Args:
            model: the one that is given, if the run's own isn't to be taken.
            given: arguments of `from_pretrained` that are given.

        Returns:
            The model, and the arguments, with those of the run that aren't given.

        Raises:
            ValueError: the run was allowed what isn't given now: a folder can't allow it. Names the options.
        """
        source, arguments = self.run["source"], self.run["arguments"]
        missing = [PERMISSIONS[name] for name in self.run["permissions"] if not given.get(name)]
        if missing:
            revision = f", revision {arguments['revision']!r}" if "revision" in arguments else ""
            raise ValueError(
                f"the unfinished run in {self.output} was begun with {' '.join(missing)}, which has to be given "
                f"again: do so if you trust what comes with {source!r}{revision}."
            )
        if model is not None:
            # Trust in a model doesn't extend to any revision of it that the folder names.
            arguments = {name: value for name, value in arguments.items() if name == "dtype"}
        return model or source, {**arguments, **given}

    def go_on(self, run: dict[str, Any], layers: int, removed: Collection[int]) -> None:
        """Take the run up, but not under other circumstances, in which it would come out otherwise.

        Args:
            run: as for `begin`. What the output is to be known by may be another now.
            layers: of the dense model.
            removed: how many of them may go as a whole: one number, or several to choose from.

        Raises:
            ValueError: names what differs, or isn't there as it was.
        """
        # Where the model is may change; what it is may not.
        movable = ("source", "arguments", "permissions", "config", "record")
        self._require({k: v for k, v in run.items() if k not in movable}, self.run)
        gone = self.state.get("removed", [])
        if self.finished > layers - min(removed) or (gone and (len(set(gone)) not in removed or max(gone) >= layers)):
            raise DamagedRunError(self.output, f"{JOURNAL} tells of layers that the model doesn't have")
        for place, _ in enumerate(self.reports()):
            part = self.work / part_name(place)
            try:
                with safe_open(part, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise self._damaged(part.name, error) from error
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
        except DamagedRunError:
            raise
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
        except DamagedRunError:
            raise
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f"{error} {self.hint()}") from error

    def hint(self) -> str:
        """How far the run has come, and how to go on with it."""
        given = [PERMISSIONS[name] for name in self.run["permissions"]]
        return (
            f"{self.finished} layers are done and kept in {self.output}; go on with\n"
            f"  {' '.join(['optimum-cli comp prune --resume', *given, str(self.output)])}"
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
        return bool(self.state["stage"] == FINISHING)

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
            for path in final.rglob("*"):
                (sync_folder if path.is_dir() else sync_file)(path)
            sync_folder(final)
            files = sorted(path.name for path in final.iterdir())
            self.record(stage=FINISHING, files=files, stale=self.state.get("stale", []))
        for name in self.state["files"]:
            if not (final / name).exists() and not (self.output / name).exists():
                raise DamagedRunError(self.output, f"{name} of the finished model is missing")
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
        """Remove the run's traces; who holds the folder removes it too, if nothing else is in it (see `hold`)."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.output / JOURNAL).unlink(missing_ok=True)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a finished result of pruning."""
    return (folder / REPORT_NAME).is_file() and not (folder / JOURNAL).is_file()


def find_run(output: Path) -> tuple[Journal | None, bool]:
    """What the output folder holds as the first process sees it, before the processes meet.

    Others may be on machines that don't see it.

    Returns:
        The run that can be gone on with, if there is one; and whether there is a finished result instead.

    Raises:
        ValueError: see `Journal.read`.
    """
    journal = Journal.find(output) if is_first_process() else None
    state, complete = first_says((None if journal is None else journal.state, is_complete(output)))
    return (None if state is None else Journal(output, state)), complete


def leave_nothing(output: Path) -> None:
    """Remove what a process that isn't the first has kept on a disk of its own, once the run is at its end."""
    # A journal here is that of another run: the first process has removed this one's.
    if not (output / JOURNAL).exists():
        shutil.rmtree(output / WORK, ignore_errors=True)
        with contextlib.suppress(OSError):
            output.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
