"""What finished layers leave on the disk, so that an interrupted run can go on after the last of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from optimum_comp.files import durably
from optimum_comp.report.run import LayerReport
from optimum_comp.sweep.journal import DamagedRunError, Journal
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.states import ActivationStore


class Recorder:
    """Writes reports and hidden states behind finished layers, and reads them again.

    One process alone writes a copy of hidden states that are in memory beside the next layer's work: the disk takes
    its time. Several have to agree that all have written.

    Args:
        journal: where finished layers are counted, in the first process; `None` in the others, and for a run that
            can't be gone on with.
        folder: for the files; `None` if there are none.
        ranks: the processes that share the work.
        beside: write beside the next layer's work, if one process is alone.
    """

    def __init__(self, journal: Journal | None, folder: Path | None, ranks: Ranks, *, beside: bool):
        self._journal = journal
        self._folder = folder
        self._ranks = ranks
        self._is_recorded = ranks.from_first(journal is not None)
        self._beside = beside and ranks.size == 1
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    @property
    def finished(self) -> int:
        """Layers that were done before."""
        return self._ranks.from_first(0 if self._journal is None else self._journal.finished)

    def record(self, place: int, report: LayerReport, states: Mapping[str, ActivationStore]) -> None:
        """Make a layer count as finished, if the run is recorded.

        Args:
            place: of the layer in the pruned model.
            report: on it.
            states: hidden states behind it, by name.
        """
        if not self._is_recorded:
            return
        self.wait()
        if self._beside:
            copies = {name: store.copy() for name, store in states.items()}
            self._writing = self._writer.submit(self._write, place, report, copies)
        else:
            self._write(place, report, states)

    def wait(self) -> None:
        """Until what is being written is on the disk.

        Raises:
            OSError: it couldn't be written.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Let the last finished layer get onto the disk, whatever has happened."""
        self._writer.shutdown(wait=True)

    def restore(self, finished: int, states: Mapping[str, ActivationStore]) -> None:
        """Read the hidden states behind the last finished layer.

        Raises:
            ValueError: they aren't there as they were.
        """
        for name, store in states.items():
            file = self._state_file(name, finished)
            try:
                store.load(file)
            except (FileNotFoundError, ValueError) as error:
                raise DamagedRunError(file.parents[1], f"{file.name} can't be read ({error})") from error

    def reports(self) -> list[LayerReport]:
        """The reports on finished layers, in the first process."""
        return [] if self._journal is None else self._journal.reports()

    def _write(self, place: int, report: LayerReport, states: Mapping[str, ActivationStore]) -> None:
        for name, store in states.items():
            store.save(self._state_file(name, place + 1))
        self._ranks.wait()
        if self._journal is not None:
            with durably(self._journal.report_file(place)) as partial:
                partial.write_text(json.dumps(report.to_dict()), encoding="utf-8")
            self._journal.record(finished=place + 1)
        self._ranks.wait()
        for name in states:
            self._state_file(name, place).unlink(missing_ok=True)

    def _state_file(self, stream: str, finished: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{stream}-{self._ranks.rank}-{finished:05d}.bin"
