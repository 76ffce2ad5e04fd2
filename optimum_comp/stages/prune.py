"""The stage that prunes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_comp.calibration.mix import counts_of, parts_of, with_another
from optimum_comp.calibration.text import SELF, CalibrationSource, is_self
from optimum_comp.checkpoint.source import MATMUL_DTYPES
from optimum_comp.configuration import DEFAULTS, FIELDS, OPTIONS, PRESETS, CompConfig
from optimum_comp.files import JOURNAL
from optimum_comp.options import (
    Choice,
    Integer,
    Number,
    Option,
    Text,
    column_option,
    option,
    options_of,
    settings_class,
)
from optimum_comp.stages.base import (
    ANSWERS,
    CHECKPOINT,
    DENSE,
    IN_MEMORY,
    Artifact,
    Stage,
    source_identity,
    written_source,
)
from optimum_comp.sweep.journal import Journal


@settings_class
class Running:
    """How a pruning run goes about it, beyond what `CompConfig` says."""

    calibration: str | None = option(
        Text("a file, a dataset's name, self or pydoc"),
        "Calibration text: a text, JSONL, CSV or Parquet file; a dataset as name[:config[:split]]; self: text that "
        "the model writes; pydoc: Python's documentation.",
        default=None,
        default_text="self",
        metavar="FILE|DATASET|self",
    )
    answers: float | None = option(
        Number("[0, 1)"),
        "Share of the samples that are a chat model's answers to requests of many kinds, which it writes first (other "
        "models: what they write from nothing), where the calibration text is a file or a dataset's name; 0 for none.",
        optional=True,
        default=None,
        default_text=f"{ANSWERS:g} where a chat model is exported, else 0",
    )
    text_column: str | None = column_option()
    batch_size: int | None = option(
        Integer(1),
        "Samples that go through a layer at a time.",
        default=None,
        default_text="about 1024 tokens",
    )
    matmul_dtype: str = option(
        Choice(MATMUL_DTYPES),
        "Round factors of matrix products to this while layers run on a CPU: float32 (not at all), bfloat16, or auto: "
        "bfloat16 where the processor has it.",
        default="auto",
    )
    device: str | None = option(
        Text("cpu, cuda or cuda:N"),
        "Where layers run, one at a time: cpu, cuda or cuda:N.",
        default=None,
        default_text="cpu",
    )


PRESET = Option(
    Choice(tuple(PRESETS)),
    "Settings to start from: comp (least squares), comp-mask (mask tuning, the paper's own recovery) or fasp.",
    optional=True,
    default_text="comp",
)


class Prune(Stage):
    """Makes a smaller checkpoint.

    Args:
        config: how; its `equalize` holds if `is_equalized` is `None` and nothing after it has a say.
        running: how to go about it.
        calibration: in place of what `running` says; also what only memory holds.
        is_equalized: what the user wants; `None` leaves it to what comes after.
    """

    name, takes, makes = "prune", CHECKPOINT, CHECKPOINT

    def __init__(
        self,
        config: CompConfig,
        running: Running,
        calibration: CalibrationSource | None = None,
        *,
        is_equalized: bool | None = None,
    ):
        self.config, self.running = config, running
        self.calibration: CalibrationSource | None = running.calibration if calibration is None else calibration
        self.is_equalized = is_equalized

    @classmethod
    def options(cls) -> dict[str, Option]:
        """See `Stage`."""
        return {"preset": PRESET, **OPTIONS, **options_of(Running)}

    @classmethod
    def from_settings(cls, **given: Any) -> Prune:
        """See `Stage`."""
        preset = PRESETS[PRESET.check("preset", given.get("preset")) or "comp"]
        fields = {name: given.get(name, preset.get(name, DEFAULTS[name])) for name in FIELDS}
        running = Running(**{name: given[name] for name in options_of(Running) if name in given})
        return cls(CompConfig(**fields), running, is_equalized=given.get("equalize"))

    def to_dict(self) -> dict[str, Any]:
        """See `Stage`."""
        running = {name: getattr(self.running, name) for name in options_of(Running)}
        running = {name: value for name, value in running.items() if value is not None}
        return {**self.config.fields(), **running, "calibration": written_source(self.calibration)}

    def with_answers(self, share: float) -> Prune:
        """The same with answers among the samples, unless there are some, or so few samples that none would be one.

        Args:
            share: of the samples, where the user says nothing.

        Raises:
            ValueError: the user wants some beside samples that are in memory, or of too few.
        """
        asked = self.running.answers
        share, source = share if asked is None else asked, self.calibration
        if not share or is_self(source):
            return self
        if not isinstance(source, (str, Path)) or str(source).startswith(IN_MEMORY):
            if asked is None:
                return self
            raise ValueError(
                f"answers={asked:g} goes with a calibration file or a dataset's name; put them among the samples "
                "yourself, or leave answers away."
            )
        mixed = ",".join(with_another(str(source), SELF, share))
        try:
            counts_of(parts_of(mixed), self.config.num_samples)
        except ValueError:
            if asked is None:
                return self
            raise
        return Prune(self.config, self.running, mixed, is_equalized=self.is_equalized)

    def equalized(self, value: bool) -> Prune:
        """The same, with or without equalization."""
        return self._with(equalize=value)

    def for_export(self) -> Prune:
        """The same with widths of their own for layers where that is left open: the exported model has them."""
        if self.config.allocation != "auto" or not self.config.measures_loss:
            return self
        return self._with(allocation="adaptive")

    def _with(self, **fields: Any) -> Prune:
        config = CompConfig(**{**self.config.fields(), **fields})
        return Prune(config, self.running, self.calibration, is_equalized=self.is_equalized)

    def identity(self, chain: Any) -> dict[str, Any]:
        """See `Stage`."""
        return {
            **self.config.fields(),
            "calibration": source_identity(self.calibration),
            "text_column": self.running.text_column,
            "matmul_dtype": self.running.matmul_dtype,
            "device": (self.running.device or "cpu").split(":")[0],
        }

    def place(self, before: str) -> str:
        """See `Stage`."""
        return "pruned" if before == DENSE else f"{before}-pruned"

    def check(self, chain: Any) -> None:
        """See `Stage`."""
        is_lost = isinstance(self.calibration, str) and self.calibration.startswith(IN_MEMORY)
        if is_lost and not chain.has_samples:
            raise ValueError(
                "the recipe's calibration samples were given in memory, and no file holds them; give them again, or "
                "--calibration FILE."
            )
        chain.pruner.plan(self.config)

    @property
    def wants_samples(self) -> bool:
        """See `Stage`."""
        return True

    def disk_bytes(self, chain: Any) -> int:
        """See `Stage`; layer by layer, and once more while the shards are put together."""
        is_filled = self.config.allocation == "adaptive"
        return 2 * int((chain.parameters_of_base if is_filled else chain.parameters_after) * chain.bytes_per_parameter)

    def run(self, source: Artifact, target: Path, chain: Any, record: Mapping[str, Any]) -> dict[str, Any]:
        """See `Stage`."""
        unfinished = Journal.find(target) if (target / JOURNAL).is_file() else None
        goes_on = unfinished is not None and unfinished.identity == dict(record)
        report = chain.pruner.prune(
            self.config,
            chain.samples(),
            output=target,
            batch_size=self.running.batch_size,
            max_memory=chain.max_memory,
            matmul_dtype=self.running.matmul_dtype,
            overwrite=not goes_on,
            resume=goes_on,
            record=record,
        )
        found: dict[str, Any] = report.summary()
        return found
