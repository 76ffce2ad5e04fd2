"""The output folder of a pruning run: whether it may be used, what it holds already, and who is at work in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimum_comp.configuration import CompConfig
from optimum_comp.files import JOURNAL, check_folder, hold
from optimum_comp.report.run import CompReport
from optimum_comp.sweep.journal import Journal, is_complete, leave_nothing
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.utils import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class Destination:
    """Where a run's result goes. The first process looks: others may be on machines that don't see the folder.

    Attributes:
        folder: the output folder.
        ranks: the processes that work together.
        sources: what may not be touched.
        in_place: the result is made in the folder, a layer at a time; else it takes the folder's place as a whole.
        overwrite: replace a model that is there.
        resume: go on with an unfinished run that is there.
    """

    folder: Path
    ranks: Ranks
    sources: Sequence[str]
    in_place: bool
    overwrite: bool
    resume: bool

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Raises:
            FileExistsError: see `check_folder`.
            ValueError: see `check_folder` and `Journal.read`.
            OSError: another process is at work there, or nothing can be written.
        """
        if not self.ranks.is_first or (self.resume and is_complete(self.folder)):
            yield
            return
        # What can't be used isn't touched.
        self._look()
        with hold(self.folder):
            if self.in_place:
                yield
                return
        # Nobody else may be at work there, but a folder that is going to be replaced can't be held.
        yield

    def unfinished(self) -> Journal | None:
        """The run to go on with, if there is one.

        Raises:
            FileExistsError: the folder can't be used; see `check_folder`.
            ValueError: the same; see `check_folder` and `Journal.read`.
        """
        found = self._look() if self.ranks.is_first else None
        state = self.ranks.from_first(None if found is None else found.state)
        return None if state is None else Journal(self.folder, state)

    def _look(self) -> Journal | None:
        if self.resume and ((self.folder / JOURNAL).is_file() or is_complete(self.folder)):
            return Journal.find(self.folder)
        check_folder(self.folder, overwrite=self.overwrite, sources=self.sources, in_place=self.in_place)
        return None

    def finished(self, config: CompConfig | None) -> tuple[CompReport, CompConfig] | None:
        """The report on a finished model that is there already, if that is to be taken over, and its config.

        Raises:
            FileExistsError: it was made with another config than the one that is given.
        """
        found = None
        if self.ranks.is_first and self.resume and is_complete(self.folder):
            stored = CompConfig.from_pretrained(self.folder)
            if config is not None and config.fields() != stored.fields():
                raise FileExistsError(
                    f"{self.folder} holds a finished model that was made otherwise; replace it: --overwrite."
                )
            logger.info("%s is complete.", self.folder)
            found = CompReport.load(self.folder), stored
        found = self.ranks.from_first(found)
        if found is not None:
            self.end()
        return found

    def end(self) -> None:
        """Wait until the result is in its place; then nothing but that is left on any process's disk."""
        self.ranks.wait()
        if not self.ranks.is_first:
            leave_nothing(self.folder)
