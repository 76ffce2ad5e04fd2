"""The stage that makes the vocabulary smaller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_comp.calibration.mix import IN_MEMORY
from optimum_comp.files import VOCABULARY
from optimum_comp.options import Option, options_of
from optimum_comp.stages.base import CHECKPOINT, DENSE, Artifact, Stage, source_identity, written_source
from optimum_comp.strict_json import read_object
from optimum_comp.vocabulary.settings import VocabularySettings


if TYPE_CHECKING:
    from optimum_comp.vocabulary.run import Plan


class Vocabulary(Stage):
    """Makes a checkpoint with fewer tokens; all stages behind it see only these.

    Args:
        settings: which tokens stay.
    """

    name, takes, makes = "vocabulary", CHECKPOINT, CHECKPOINT

    def __init__(self, settings: VocabularySettings | None = None):
        self.settings = settings or VocabularySettings()
        self._planned: Plan | None = None

    @classmethod
    def options(cls) -> dict[str, Option]:
        """See `Stage`."""
        return options_of(VocabularySettings)

    @classmethod
    def from_settings(cls, **given: Any) -> Vocabulary:
        """See `Stage`."""
        return cls(VocabularySettings(**given))

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        found = self.settings.to_dict()
        if self.settings.text is not None:
            found["text"] = [written_source(each) for each in self.settings.text]
        return found

    def identity(self, chain: Any) -> dict[str, Any]:
        """See `Stage`."""
        text, samples = self.settings.text, self.settings.samples
        return {
            **{name: value for name, value in self.settings.to_dict().items() if name != "expected"},
            **({"expected": samples} if samples else {}),
            "text": None if text is None else sorted(str(source_identity(each)) for each in text),
        }

    def place(self, before: str) -> str:
        """See `Stage`."""
        return self.name if before == DENSE else f"{before}-{self.name}"

    def check(self, chain: Any) -> None:
        """See `Stage`."""
        if any(each.startswith(IN_MEMORY) for each in self.settings.text or ()):
            raise ValueError("the text that chooses tokens was given in memory, and no file holds it; give it anew.")
        self.settings.require_choice()
        self.sizes(chain)

    def sizes(self, chain: Any) -> tuple[int, int]:
        """Parameters that go, and tokens that stay; of a result that is there by what it says."""
        found = read_object(chain.base.folder / VOCABULARY) if chain.has_base else self._plan(chain).shrunk.to_dict()
        return found["parameters_before"] - found["parameters_after"], found["tokens_after"]

    def _plan(self, chain: Any) -> Plan:
        from optimum_comp.vocabulary.run import Plan

        if self._planned is None:
            # How many stay is known without the model.
            self._planned = Plan.of(chain.model, self.settings, chain.loading, ask_model=False)
        return self._planned

    def disk_bytes(self, chain: Any) -> int:
        """See `Stage`; the rows that stay once more while the shards are put together."""
        return 2 * int(chain.parameters_of_base * chain.bytes_per_parameter)

    def run(self, source: Artifact, target: Path, chain: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        """See `Stage`."""
        from optimum_comp.vocabulary.run import Plan

        plan = Plan.of(chain.model, self.settings, chain.loading) if self.settings.samples else self._plan(chain)
        # Its memory is wanted by what follows.
        self._planned = None
        shrunk = plan.write(target, overwrite=True, record=record)
        return {**shrunk.to_dict(), "output": target.name}
