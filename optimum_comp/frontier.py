"""Every lever measured side by side: what each way to make a model small is worth, and the best for a budget.

The levers are stages of the chain, so every candidate is a recipe, and what candidates share is made once. The walk is
plain: bits alone first, which are cheapest to try and mostly worth most, then trained for still fewer; then both with
ever more pruned, of a size that is asked for as little as will fit, as long as there is time.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_comp.calibration.mix import sources_in
from optimum_comp.calibration.text import PYDOC, SELF, CalibrationSource, require_text
from optimum_comp.chain_memory import ModelSizes, NotEnoughMemoryError
from optimum_comp.configuration import CompConfig
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.evaluation import Evaluation, Settings, evaluate_apart
from optimum_comp.files import FRONTIER, durably, hold
from optimum_comp.onnx.recipes import FOUR, RECIPES, Format
from optimum_comp.onnx.runtime import require_onnxruntime
from optimum_comp.onnx.search import BudgetError
from optimum_comp.options import (
    Boolean,
    Duration,
    Integer,
    Number,
    Share,
    Shares,
    Size,
    Subset,
    Texts,
    option,
    settings_class,
)
from optimum_comp.report.plots import pareto_front
from optimum_comp.report.table import markdown_table
from optimum_comp.stages.base import Artifact, Stage, digest, source_identity, written_source
from optimum_comp.stages.chain import Chain, check_output, warn_of_known_text
from optimum_comp.stages.distil import Distil
from optimum_comp.stages.export import Export, ExportSettings
from optimum_comp.stages.prune import Prune, Running
from optimum_comp.stages.quantize import SAMPLES, Quantize, QuantizeSettings, SampleSettings, least_bytes
from optimum_comp.stages.recipe import Recipe
from optimum_comp.stages.vocabulary import Vocabulary
from optimum_comp.strict_json import read_object
from optimum_comp.utils import format_bytes, get_logger
from optimum_comp.vocabulary.scripts import SCRIPTS
from optimum_comp.vocabulary.settings import VocabularySettings


logger = get_logger(__name__)

FLOAT, MIXED, TRAINED = "float32", "mixed", "int4-small"
"""Weights as they are exported, the best mix of precisions for a size, and the smallest, which have to be trained."""

_USUAL, _MOST = 0.2, 0.5
"""How much is pruned where nothing says it, and how much at most to have a size."""

_FILLED = 0.995
"""Share of a size that is filled by what is expected: widths are rounded, and a graph isn't weights alone."""


@settings_class
class FrontierSettings:
    """What is tried, on what it is measured, and what is wanted."""

    sparsities: list[float] | None = option(
        Shares("(0, 1)"),
        "Shares of the decoder-layer parameters that are pruned, beside none [as little as max_size needs, else 20%].",
        default=None,
        metavar="SHARE,SHARE",
    )
    vocabulary: list[str] | None = option(
        Subset(tuple(SCRIPTS)),
        "Try all of it again with only the tokens of these scripts, like ascii (see comp vocabulary): what that costs "
        "on the texts is part of what is measured.",
        default=None,
        metavar="SCRIPT,...",
    )
    vocabulary_tokens: int | None = option(
        Integer(1),
        "Try all of it once more with at most so many of these tokens: those that are most frequent in the text that "
        "calibrates and in what the model expects there (see comp vocabulary).",
        default=None,
        metavar="N",
    )
    distil: bool = option(
        Boolean(), "Try each with every weight in 4 bits, the embedding's too, and trained for that.", default=True
    )
    distil_time: float = option(Duration(), "How long each of those is trained.", default=900.0, metavar="TIME")
    text: list[str] = option(
        Texts(),
        "Text that quality is measured on, which should be none that calibrates; several times for several, the worst "
        "of which counts: a file, a dataset as name[:config[:split]], or pydoc.",
        default=(PYDOC,),
        metavar="FILE|DATASET",
    )
    max_size: int | None = option(
        Size(), "The model may take so much on the disk, like 90MB.", default=None, metavar="SIZE"
    )
    min_speedup: float | None = option(
        Number("(0, inf)"),
        "It has to generate so many times as fast as the dense model in float32, in ONNX Runtime on this machine.",
        default=None,
        metavar="TIMES",
    )
    max_perplexity_increase: float | None = option(
        Share("(0, inf)"),
        "Its perplexity may be so much more than the dense model's, like 5%, on each text.",
        default=None,
        metavar="SHARE",
    )
    time: float | None = option(
        Duration(), "Begin nothing that would end after this time, like 30min.", default=None, metavar="TIME"
    )

    def _require(self) -> None:
        if self.vocabulary_tokens is not None and not self.vocabulary:
            raise ValueError(
                f"vocabulary_tokens={self.vocabulary_tokens} says how many of which tokens: name their scripts, too "
                "(vocabulary, like ascii)."
            )

    @property
    def asks_for_more_than_size(self) -> bool:
        """Whether a smaller model than fits may be wanted: a faster one, or the smallest of a quality."""
        return self.min_speedup is not None or self.max_perplexity_increase is not None

    @property
    def has_budget(self) -> bool:
        """Whether anything is wanted."""
        return any(each is not None for each in (self.max_size, self.min_speedup, self.max_perplexity_increase))


@dataclass(frozen=True)
class Candidate:
    """A way to make the model small.

    Attributes:
        sparsity: share of the decoder-layer parameters that is pruned; 0 for none.
        weights: `float32`, `int8`, `int4`, `mixed` or, trained for it, `int4-small`.
        scripts: whose tokens are kept; nothing for all tokens.
        tokens: how many of them at most; 0 for no limit.
    """

    sparsity: float
    weights: str
    scripts: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def name(self) -> str:
        """In words."""
        pruned = f"pruned {100 * self.sparsity:.4g}%" if self.sparsity else "dense"
        tokens = f", {' and '.join(self.scripts)} only" if self.scripts else ""
        tokens += f", {self.tokens:,} tokens" if self.tokens else ""
        return f"{pruned}{tokens}, {self.weights}" + ", trained" * (self.weights == TRAINED)

    def pruned(self, sparsity: float) -> Candidate:
        """The same with another share pruned."""
        return dataclasses.replace(self, sparsity=sparsity)

    @property
    def folder(self) -> str:
        """Name of the folder that it shares with others of its sparsity and vocabulary."""
        pruned = f"pruned-{self.sparsity:g}" if self.sparsity else "dense"
        return "-".join([pruned, *self.scripts, *([str(self.tokens)] if self.tokens else [])])


@dataclass
class Point:
    """A candidate, made and measured.

    Attributes:
        candidate: which.
        folder: where it is.
        key: of the artifact.
        evaluations: of each text; speed is that of the first.
        increases: of the perplexity of each text over the dense model's, for as many bytes of text as one of the dense
            model's tokens has, so that vocabularies don't matter.
        speedup: of decoding, over the dense float model's; `None` where speed isn't measured.
    """

    candidate: Candidate
    folder: Path
    key: str
    evaluations: list[Evaluation]
    increases: list[float] = field(default_factory=list)
    speedup: float | None = None

    @property
    def size(self) -> int:
        """Bytes of graph and weights."""
        return self.evaluations[0].size_bytes

    @property
    def increase(self) -> float:
        """Of the text where it is largest."""
        return max(self.increases)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **dataclasses.asdict(self.candidate),
            "name": self.candidate.name,
            "folder": str(self.folder),
            "key": self.key,
            "size_bytes": self.size,
            "speedup": self.speedup,
            "increases": self.increases,
            "evaluations": [each.to_dict() for each in self.evaluations],
        }


@dataclass
class Frontier:
    """What was found.

    Attributes:
        output: the folder with all candidates.
        settings: what was asked.
        points: in the order in which they were made, the dense float model first.
        chosen: the best that keeps to the budget; `None` if nothing does, or nothing was asked.
        left: candidates that weren't made, by name, and why.
    """

    output: Path
    settings: FrontierSettings
    points: list[Point]
    chosen: Point | None
    left: dict[str, str]

    def front(self) -> list[Point]:
        """Those that no other is as small and as good as."""
        return [self.points[index] for index in pareto_front([(each.size, each.increase) for each in self.points])]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "points": [each.to_dict() for each in self.points],
            "front": [each.candidate.name for each in self.front()],
            "chosen": None if self.chosen is None else self.chosen.candidate.name,
            "left": self.left,
        }

    def text(self) -> str:
        """The table, and what is to be said about it."""
        front, texts = self.front(), [Path(text).name for text in self.settings.text]
        header = ("", "parameters", "file size", "decode", "prefill", *texts, "")
        rows: list[tuple[str, ...]] = [header]
        for point in sorted(self.points, key=lambda each: -each.size):
            marks = ["on the front"] * (point in front) + ["chosen"] * (point is self.chosen)
            first = point.evaluations[0]
            rows.append(
                (
                    point.candidate.name,
                    f"{first.parameters / 1e6:.1f} M",
                    format_bytes(point.size),
                    *(
                        ("-", "-")
                        if point.speedup is None
                        else (
                            f"{first.decode_tokens_per_second:.1f} tok/s ({point.speedup:.2f}x)",
                            f"{first.prefill_tokens_per_second:.0f} tok/s",
                        )
                    ),
                    *(f"{1 + each:.3f}x" for each in point.increases),
                    ", ".join(marks),
                )
            )
        lines = [markdown_table(rows)]
        lines.append(
            "Under each text: perplexity over that of the dense model. On the front: nothing else here is as small "
            "and as good on the text where it is worst. Speeds were measured on this machine, in ONNX Runtime."
        )
        lines.append(self.verdict())
        lines += [f"{name} was left out: {reason}." for name, reason in self.left.items()]
        return "\n\n".join(lines)

    def verdict(self) -> str:
        """What the numbers say, in sentences."""
        pruned = [each for each in self.front() if each.candidate.sparsity]
        if self.chosen is not None:
            point = self.chosen
            faster = "" if point.speedup is None else f"{point.speedup:.2f} times as fast, "
            said = (
                f"Chosen: {point.candidate.name}, {format_bytes(point.size)}, {faster}perplexity at most "
                f"{point.increase:+.1%}, in {point.folder}."
            )
            if point.candidate.sparsity:
                return said
            alone = "Training for fewer bits" if point.candidate.weights == TRAINED else "Quantization alone"
            if any(each.candidate.sparsity for each in self.points):
                return f"{said} {alone} is best here: no pruned model that keeps to this does as well."
            return f"{said} {alone} keeps to it, and has cost less than pruning wherever both were measured."
        if self.settings.has_budget:
            missed = nearest_text(self.settings, self.points)
            return f"Nothing that was made keeps to {wanted_text(self.settings)}. {missed}"
        if not any(each.candidate.sparsity for each in self.points):
            return "Nothing pruned was tried, so what is best is among fewer bits."
        if not pruned:
            return "Fewer bits are best at every size that was tried: no pruned model is on the front."
        largest = max(pruned, key=lambda each: each.size)
        return (
            f"Above {format_bytes(largest.size)}, fewer bits alone are best; from there on, pruning is on the front, "
            f"at {largest.increase:+.1%} and more."
        )


def _form(candidate: Candidate) -> Format:
    """How a candidate's decoder layers are stored; of a mix, the least that any may take."""
    recipe = RECIPES.get(candidate.weights)
    return recipe.layers if recipe is not None and recipe.layers is not None else FOUR


def wanted_text(settings: FrontierSettings) -> str:
    """What is asked, in words."""
    parts = []
    if settings.max_size is not None:
        parts.append(f"{format_bytes(settings.max_size)} at most")
    if settings.min_speedup is not None:
        parts.append(f"{settings.min_speedup:g} times the speed")
    if settings.max_perplexity_increase is not None:
        parts.append(f"{100 * settings.max_perplexity_increase:.4g} % more perplexity at most")
    return ", ".join(parts)


def keeps(point: Point, settings: FrontierSettings) -> bool:
    """Whether a point is all that is asked."""
    return (
        (settings.max_size is None or point.size <= settings.max_size)
        and (settings.min_speedup is None or (point.speedup or 0.0) >= settings.min_speedup)
        and (settings.max_perplexity_increase is None or point.increase <= settings.max_perplexity_increase)
    )


def choose(points: Sequence[Point], settings: FrontierSettings) -> Point | None:
    """The best point that is all that is asked; `None` if there is none, or nothing is asked.

    Where quality has a limit, the smallest; else the one that loses least.
    """
    found = [point for point in points if keeps(point, settings)]
    if not settings.has_budget or not found:
        return None
    if settings.max_perplexity_increase is not None:
        return min(found, key=lambda point: (point.size, point.increase))
    return min(found, key=lambda point: (point.increase, point.size))


def nearest_text(settings: FrontierSettings, points: Sequence[Point]) -> str:
    """What comes nearest where nothing keeps to a budget: the least that each limit is missed by, the others kept."""
    limits: dict[str, tuple[Callable[[Point], float], Callable[[Point], str]]] = {
        "max_size": (lambda point: point.size, lambda point: format_bytes(point.size)),
        "min_speedup": (
            lambda point: -(point.speedup or 0.0),
            lambda point: f"{point.speedup or 0.0:.2f} times the speed",
        ),
        "max_perplexity_increase": (lambda point: point.increase, lambda point: f"perplexity {point.increase:+.1%}"),
    }
    said = []
    for name, (measure, tell) in limits.items():
        if getattr(settings, name) is None:
            continue
        nothing: Any = {name: None}
        others = dataclasses.replace(settings, **nothing)
        found = [point for point in points if keeps(point, others)]
        if found:
            best = min(found, key=measure)
            said.append(f"With the rest kept, the nearest is {tell(best)} ({best.candidate.name}, {best.folder}).")
    return " ".join(said) or "Not even one of the limits was kept."


def find_frontier(
    model: str | Path,
    output: str | Path,
    settings: FrontierSettings | None = None,
    *,
    config: CompConfig | None = None,
    calibration: CalibrationSource | None = None,
    running: Running | None = None,
    exporter: str = "auto",
    target: str = "any",
    measuring: Settings | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    **loading: Any,
) -> Frontier:
    """Make and measure a model in every way that is to be tried, and choose.

    What is made and measured is kept; the same call goes on with it, and another budget makes only what it needs.

    Args:
        model: folder or hub id.
        output: gets a folder for each sparsity, `comp_frontier.json` and `README.md`.
        settings: what is tried, and what is wanted.
        config: how to prune, but for the sparsity; the defaults if `None`.
        calibration: text to calibrate with and to train on; if `None`, Python's documentation (`pydoc`), and for
            pruning what the model writes (`self`).
        running: how to go about pruning, and where it is trained; its calibration counts if `calibration` is `None`.
        exporter: see `export_onnx`.
        target: the processor that it is for.
        measuring: how to measure; its text is not looked at.
        max_memory: bytes that a process may take in all.
        overwrite: replace what was made otherwise.
        loading: passed on to `from_pretrained`.

    Raises:
        FileExistsError: `output` holds something else.
        ValueError: something that was asked for isn't possible.
        ImportError: ONNX Runtime isn't installed.
        RuntimeError: a step failed; what is made is kept.
    """
    return _Walk(
        str(model),
        Path(output),
        settings or FrontierSettings(),
        config or CompConfig(),
        calibration,
        running or Running(),
        ExportSettings(exporter=exporter),
        target,
        measuring or Settings(),
        max_memory,
        overwrite,
        loading,
    ).run()


class _Walk:
    """One walk over the candidates; see `find_frontier`."""

    def __init__(
        self,
        model: str,
        output: Path,
        settings: FrontierSettings,
        config: CompConfig,
        calibration: CalibrationSource | None,
        running: Running,
        export: ExportSettings,
        target: str,
        measuring: Settings,
        max_memory: int | None,
        overwrite: bool,
        loading: Mapping[str, Any],
    ):
        self.model, self.output, self.settings, self.config = model, output, settings, config
        self.calibration = running.calibration if calibration is None else calibration
        self.running, self.export, self.target, self.measuring = running, export, target, measuring
        self.max_memory, self.overwrite, self.loading = max_memory, overwrite, loading
        self.started = time.monotonic()
        # Longest time of each kind of step so far, to tell what the next one will take.
        self.took: dict[str, float] = {}
        self.points: list[Point] = []
        self.left: dict[str, str] = {}
        self.sizes: dict[str, ModelSizes] = {}
        # By key, what was measured, also for budgets that asked for other candidates.
        self.known: dict[str, list[Evaluation]] = {}

    def run(self) -> Frontier:
        require_onnxruntime()
        if self.settings.min_speedup is not None and not self.measuring.prompt_tokens:
            raise ValueError("prompt_tokens=0 measures no speed, which min_speedup asks for.")
        is_ours = (self.output / FRONTIER).is_file()
        sources = [Path(self.model)] if Path(self.model).exists() else []
        check_output(self.output, is_ours=is_ours, overwrite=self.overwrite, sources=sources)
        self._read_texts()
        self._refuse_what_cannot_fit()
        tried = (*self._of(0.0), *self._of((self.settings.sparsities or [_USUAL])[0]))
        read = {text for candidate in tried for text in self._chain(candidate).read_texts()}
        for text in self.settings.text:
            warn_of_known_text(text, read)
        try:
            with hold(self.output):
                self.known = self._known()
                # From now on the folder is a frontier's.
                self._write()
                for candidate in self._candidates():
                    self._try(candidate)
                return self._write()
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"what was made and measured is kept in {self.output}; go on with the same command."
            ) from error

    def _try(self, candidate: Candidate) -> None:
        reason = self._reason_against(candidate)
        if reason is not None:
            self.left[candidate.name] = reason
            return
        logger.info("Candidate %d: %s.", len(self.points) + 1, candidate.name)
        try:
            self.points.append(self._made(candidate))
        except (BudgetError, FileExistsError, NotEnoughMemoryError) as error:
            if not self.points:
                # Everything is compared with the first.
                raise
            self.left[candidate.name] = str(error).splitlines()[0].rstrip(".")
            return
        self._compare(self.points[-1])
        self._write()

    def _read_texts(self) -> None:
        """Look whether there is text where it is said to be."""
        if self.calibration is not None and not isinstance(self.calibration, (str, Path)):
            raise ValueError(
                "calibration is to be a file, a dataset's name, self, pydoc or a mix of them: candidates read it anew."
            )
        for text in (*self.settings.text, self.calibration):
            require_text(text, self.running.text_column)

    def _candidates(self) -> Iterator[Candidate]:
        """What is tried; how much is pruned, only when what isn't pruned is there."""
        yield Candidate(0.0, FLOAT)
        yield from self._of(0.0)
        for sparsity in self._sparsities():
            yield from self._of(sparsity)

    def _of(self, sparsity: float) -> Iterator[Candidate]:
        """Every way to store a model of which so much is pruned."""
        weights = ["int8", "int4"]
        weights += [MIXED] * (self.settings.max_size is not None) + [TRAINED] * self.settings.distil
        scripts, tokens = tuple(self.settings.vocabulary or ()), self.settings.vocabulary_tokens or 0
        kept = [((), 0), *[(scripts, 0)] * bool(scripts), *[(scripts, tokens)] * bool(tokens)]
        yield from (Candidate(sparsity, each, *vocabulary) for vocabulary in kept for each in weights)

    def _sparsities(self) -> list[float]:
        """How much is pruned: what is asked for, or of each way to store weights the least with which a size fits.

        Nothing if only a size is asked for, and something with nothing pruned keeps to it.
        """
        if self.settings.sparsities is not None:
            return sorted(self.settings.sparsities)
        limit = self.settings.max_size
        if limit is None:
            return [_USUAL]
        if not self.settings.asks_for_more_than_size and any(keeps(point, self.settings) for point in self.points):
            return []
        wanted = [each for each in self._of(0.0) if each.weights in ("int4", TRAINED)]
        wanted = [each for each in wanted if self._expected_bytes(each) > limit]
        found = {self._least_sparsity(each, _FILLED * limit) for each in wanted}
        return sorted(each for each in found if each is not None) or [
            share for share in (_USUAL,) if self._can_be(Candidate(share, FLOAT))
        ]

    def _least_sparsity(self, candidate: Candidate, size: float) -> float | None:
        """The least share, in hundredths, that has to be pruned for a size; `None` if that can't be."""

        def is_enough(hundredths: int) -> bool:
            share = hundredths / 100
            # Past what can be pruned, so that what is looked for isn't above that.
            return not self._can_be(candidate.pruned(share)) or self._expected_bytes(candidate.pruned(share)) <= size

        tried = range(1, round(100 * _MOST) + 1)
        place = bisect.bisect_left(tried, True, key=is_enough)
        found = candidate.pruned(tried[place] / 100) if place < len(tried) else None
        return found.sparsity if found is not None and self._can_be(found) else None

    def _can_be(self, candidate: Candidate) -> bool:
        """Whether so much of the model can be pruned."""
        try:
            self._sizes(candidate)
        except ValueError:
            return False
        return True

    def _refuse_what_cannot_fit(self) -> None:
        """Refuse what can be refused before anything is made.

        Raises:
            ValueError: nothing that is tried is as small as what is asked for, or something can't be tried.
        """
        limit, sparsities = self.settings.max_size, self.settings.sparsities
        # What can't be pruned so much, or keep so few tokens, says so here.
        tried = [each for sparsity in (0.0, *(sparsities or ())) for each in self._of(sparsity)]
        if sparsities is None and limit is None:
            tried += self._of(_USUAL)
        elif sparsities is None:
            shares = (share / 100 for share in range(round(100 * _MOST), 0, -10))
            tried += self._of(next((share for share in shares if self._can_be(Candidate(share, FLOAT))), 0.0))
        size, name = min((self._least(each), each.name) for each in tried)
        if limit is not None and size > limit:
            raise ValueError(
                f"max_size={format_bytes(limit)} can't be kept: the smallest that is tried ({name}) takes "
                f"{format_bytes(size)} with every weight in 4 bits. Give more, or prune more (sparsities)."
            )

    def _chain(self, candidate: Candidate) -> Chain:
        config, stages = self.config, list[Stage]()
        samples = None
        if candidate.scripts:
            chosen: dict[str, Any] = {}
            if candidate.tokens:
                text = [each for each in sources_in(written_source(self.calibration)) if each != SELF]
                chosen = {"text": text or [PYDOC], "max_tokens": candidate.tokens}
                chosen["text_column"] = self.running.text_column
            stages.append(Vocabulary(VocabularySettings(scripts=list(candidate.scripts), **chosen)))
        if candidate.sparsity:
            fields = {**config.fields(), "sparsity": candidate.sparsity}
            # One model for all precisions: what evens out activations for 8 bits costs 4 bits some quality.
            stages.append(Prune(CompConfig(**fields), self.running, self.calibration, is_equalized=config.equalize))
        elif candidate.weights != FLOAT:
            source = PYDOC if self.calibration is None else self.calibration
            samples = SampleSettings(
                calibration=str(source),
                text_column=self.running.text_column,
                num_samples=min(SAMPLES, config.num_samples),
                sequence_length=config.sequence_length,
                begin=config.begin,
            )
        if candidate.weights == TRAINED:
            running = {name: getattr(self.running, name) for name in ("device", "matmul_dtype", "text_column")}
            stages.append(Distil(DistilSettings(rounding=TRAINED, time=self.settings.distil_time, **running)))
        stages.append(Export(self.export))
        if candidate.weights != FLOAT:
            is_mixed = candidate.weights == MIXED
            quantize = QuantizeSettings(
                recipe="int8" if is_mixed else candidate.weights,
                target=self.target,
                max_size=self.settings.max_size if is_mixed else None,
            )
            stages.append(Quantize(quantize, samples))
        return Chain(
            Recipe(tuple(stages), None, self.model),
            self.output / candidate.folder,
            loading=self.loading,
            max_memory=self.max_memory,
            overwrite=self.overwrite,
        )

    def _least(self, candidate: Candidate) -> int:
        """Bytes that a candidate takes with every weight in as few bits as it may have."""
        recipe = RECIPES.get(candidate.weights)
        layers = _form(candidate)
        # A mix may have the head in 4 bits, too.
        head = recipe.head if recipe is not None and recipe.head is not None else layers
        sizes = self._sizes(candidate)
        embedding = sizes.vocabulary * sizes.hidden
        return least_bytes(sizes.parameters - embedding, layers) + least_bytes(embedding, head)

    def _is_only_smaller(self, candidate: Candidate) -> bool:
        """Whether only a size is asked for, and what is the same with less pruned keeps to it."""
        if self.settings.sparsities is not None or self.settings.asks_for_more_than_size:
            return False
        return any(
            point.candidate.pruned(candidate.sparsity) == candidate
            and point.candidate.sparsity < candidate.sparsity
            and keeps(point, self.settings)
            for point in self.points
        )

    def _expected_bytes(self, candidate: Candidate) -> int:
        """What a candidate will take: what isn't pruned was measured to take, without what goes; else the least."""
        whole = next((each for each in self.points if each.candidate == candidate.pruned(0.0)), None)
        if whole is None:
            return self._least(candidate)
        gone = whole.evaluations[0].parameters - self._sizes(candidate).parameters
        return whole.size - least_bytes(gone, _form(candidate))

    def _sizes(self, candidate: Candidate) -> ModelSizes:
        """Parameters and tokens of a candidate, about."""
        # Those that share a folder share them; reading a large vocabulary takes a while.
        if candidate.folder not in self.sizes:
            self.sizes[candidate.folder] = self._chain(candidate).sizes
        return self.sizes[candidate.folder]

    def _reason_against(self, candidate: Candidate) -> str | None:
        """Why a candidate isn't made; `None` if it is."""
        if candidate.weights == FLOAT:
            # Everything is compared with it.
            return None
        limit = self.settings.max_size
        if limit is not None:
            size = self._least(candidate)
            if size > limit:
                return f"in as few bits as it may have it takes {format_bytes(size)}, more than {format_bytes(limit)}"
            expected = self._expected_bytes(candidate)
            if candidate.sparsity and candidate.weights != MIXED and expected > limit:
                return f"it takes some {format_bytes(expected)}, more than {format_bytes(limit)}"
            if self._is_only_smaller(candidate):
                return "with less pruned it fits"
        if candidate.weights == MIXED:
            fits = next(
                (p for p in self.points if p.candidate.folder == candidate.folder and p.size <= (limit or 0)), None
            )
            if fits is not None and fits.candidate.weights == "int8":
                return "8 bits fit"
        if self.settings.time is None:
            return None
        needed, spent = self._expected(candidate), time.monotonic() - self.started
        if spent + needed > self.settings.time:
            return f"{needed:.0f} s more were expected, and {max(0.0, self.settings.time - spent):.0f} s are left"
        return None

    def _expected(self, candidate: Candidate) -> float:
        """Seconds that a candidate will take, by what others took."""
        seconds = self.took.get("measure", 0.0) + self.took.get(candidate.weights, self.took.get("quantize", 60.0))
        if candidate.weights == TRAINED:
            # The rest of it is reading, writing and exporting.
            seconds += 1.2 * self.settings.distil_time + self.took.get("export", 60.0)
        is_pruned = any(point.candidate.folder == candidate.folder for point in self.points)
        if is_pruned or not candidate.sparsity:
            return seconds
        tokens = self.config.num_samples * self.config.sequence_length
        speed = self.points[0].evaluations[0].prefill_tokens_per_second or 100.0
        # Both streams, the gradients and the solves: some six passes over the calibration text.
        return seconds + self.took.get("export", 60.0) + self.took.get("prune", 6 * tokens / speed)

    def _made(self, candidate: Candidate) -> Point:
        chain = self._chain(candidate)
        outcome = chain.run()
        artifact = chain.result
        for name, cost in outcome.costs.items():
            self._take(candidate.weights if name == Quantize.name else name, cost.seconds)
            self._take(name, cost.seconds)
        started = time.monotonic()
        key = self._key(artifact)
        if key in self.known:
            return Point(candidate, artifact.folder, key, self.known[key])
        logger.info("Measuring %s ...", candidate.name)
        evaluations = []
        for number, text in enumerate(self.settings.text):
            settings = dataclasses.replace(self.measuring, text=text)
            if number:
                settings = dataclasses.replace(settings, prompt_tokens=0, long_prompt_tokens=0, prompts=[])
            if self.points:
                settings = settings.as_with(self.points[0].evaluations[number])
            trusts = {k: v for k, v in self.loading.items() if k == "trust_remote_code"}
            evaluations.append(evaluate_apart(artifact.place, settings, **trusts))
            evaluations[-1].model = candidate.name
        self.known[key] = evaluations
        self._take("measure", time.monotonic() - started)
        return Point(candidate, artifact.folder, key, evaluations)

    def _take(self, name: str, seconds: float) -> None:
        self.took[name] = max(self.took.get(name, 0.0), seconds)

    def _key(self, artifact: Artifact) -> str:
        settings = {**dataclasses.asdict(self.measuring), "text": None}
        return digest([artifact.key, settings, [source_identity(text) for text in self.settings.text]])

    def _compare(self, point: Point) -> None:
        dense = self.points[0]
        for own, other in zip(point.evaluations, dense.evaluations, strict=True):
            assert own.bits_per_byte is not None and other.bits_per_byte is not None
            assert other.bytes_predicted is not None and other.predictions is not None
            bits = (own.bits_per_byte - other.bits_per_byte) * other.bytes_predicted / other.predictions
            point.increases.append(math.expm1(bits * math.log(2)))
        own_speed, speed = (each.evaluations[0].decode_tokens_per_second for each in (point, dense))
        point.speedup = own_speed / speed if own_speed and speed else None

    def _known(self) -> dict[str, list[Evaluation]]:
        """What an earlier walk has measured, by key."""
        try:
            found = read_object(self.output / FRONTIER)
            points = [*found["points"], *found.get("others", [])]
            return {each["key"]: [Evaluation(**one) for one in each["evaluations"]] for each in points}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self) -> Frontier:
        found = Frontier(self.output, self.settings, self.points, choose(self.points, self.settings), self.left)
        shown = {point.key for point in self.points}
        others = [
            {"key": key, "evaluations": [each.to_dict() for each in evaluations]}
            for key, evaluations in self.known.items()
            if key not in shown
        ]
        told = found.to_dict() if self.points else {"points": []}
        text = json.dumps({**told, "others": others}, indent=1) + "\n"
        with durably(self.output / FRONTIER) as partial:
            partial.write_text(text, encoding="utf-8")
        if self.points:
            with durably(self.output / "README.md") as partial:
                partial.write_text(f"# {self.output.resolve().name}\n\n{found.text()}\n", encoding="utf-8")
        return found
