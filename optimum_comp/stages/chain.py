"""Runs a recipe in a folder: takes up what is there, makes what isn't, and loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from optimum_comp.beginning import Beginning
from optimum_comp.calibration.mix import sources_in
from optimum_comp.calibration.self_written import is_chat
from optimum_comp.calibration.text import SELF, Calibration, CalibrationSource, require_text
from optimum_comp.chain_memory import (
    EVALUATE,
    EVALUATE_ONNX,
    Load,
    ModelSizes,
    predict_peak,
    require_memory,
    sizes_of,
)
from optimum_comp.checkpoint.opening import open_config
from optimum_comp.checkpoint.reader import MODEL_FILES, require_safetensors, resolve_folder, weight_files
from optimum_comp.checkpoint.tokenizer import TOKENIZER_FILES, open_tokenizer
from optimum_comp.configuration import CompConfig
from optimum_comp.distillation.texts import sources_of
from optimum_comp.evaluation import Evaluation, Settings, count_parameters, evaluate_apart, weight_bytes
from optimum_comp.files import (
    COMPRESSION_SUMMARY,
    DISTILLATION,
    JOURNAL,
    RECIPE,
    VOCABULARY,
    atomic_folder,
    check_folder,
    check_model,
    clear_debris,
    durably,
    hold,
)
from optimum_comp.onnx.search import BudgetError
from optimum_comp.pruner import CompPruner
from optimum_comp.report.run import CompReport
from optimum_comp.stages.base import (
    ANSWERS,
    BUNDLE,
    CHECKPOINT,
    DENSE,
    ONNX,
    Artifact,
    Stage,
    digest,
    file_digest,
    key_of,
    recorded,
    recorded_key,
    source_identity,
    written_source,
)
from optimum_comp.stages.distil import Distil
from optimum_comp.stages.export import Export
from optimum_comp.stages.prune import Prune
from optimum_comp.stages.quantize import HELD_OUT, Quantize, SampleSettings
from optimum_comp.stages.recipe import LOADING, Recipe
from optimum_comp.stages.vocabulary import Vocabulary
from optimum_comp.strict_json import read_object
from optimum_comp.sweep.journal import Journal
from optimum_comp.sweep.memory import check_disk
from optimum_comp.utils import format_bytes, get_logger, lookup_arguments, plain_arguments, shown


logger = get_logger(__name__)

S = TypeVar("S", bound=Stage)

NOTES = "comp_notes"
"""Folder in the output for what was measured of each model, and what making it took."""
_SAMPLES, _TOKENS = "comp_samples", "tokens.safetensors"


@dataclass
class Cost:
    """What a step of the chain took.

    Attributes:
        seconds: wall time.
        peak_memory_bytes: largest memory of the process, where it is this step's.
        size_bytes: of the model that it made.
        earlier: an earlier run has taken it.
    """

    seconds: float
    peak_memory_bytes: int | None = None
    size_bytes: int | None = None
    earlier: bool = False

    def __str__(self) -> str:
        parts = [f"{self.seconds:.0f} s"]
        if self.peak_memory_bytes is not None:
            parts.append(f"{format_bytes(self.peak_memory_bytes)} of memory")
        if self.size_bytes is not None:
            parts.append(f"makes {format_bytes(self.size_bytes)}")
        return ", ".join(parts) + (" (taken up from an earlier run)" if self.earlier else "")


@dataclass
class Outcome:
    """What a chain has made.

    Attributes:
        models: name -> measurements, the dense model first.
        results: stage -> what it tells of itself.
        costs: step -> what it took, in order.
        bundle: folder of the bundle; `None` if none is made.
        notes: what the user has to know.
    """

    models: dict[str, Evaluation] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    bundle: Path | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Step:
    """A stage in its place.

    Attributes:
        stage: the stage.
        source: what it takes.
        made: what it makes.
        folder: where.
        is_there: it is there already.
    """

    stage: Stage
    source: Artifact
    made: Artifact
    folder: Path
    is_there: bool


class Chain:
    """A recipe for one model and one folder.

    Args:
        recipe: what is done.
        output: the folder; gets a subfolder a stage, the recipe, the measurements and `README.md`.
        calibration: in place of what the recipe says; also what only memory holds.
        loading: arguments of `from_pretrained`, over those of the recipe: also permissions and a token, which no file
            grants.
        bundle: folder of the bundle, if it isn't to be in the output.
        max_memory: bytes that a process of the chain may take in all; `None` for what is free.
        overwrite: replace, stage by stage, what was made otherwise.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: str | Path,
        *,
        calibration: CalibrationSource | None = None,
        loading: Mapping[str, Any] | None = None,
        bundle: str | Path | None = None,
        max_memory: int | None = None,
        overwrite: bool = False,
    ):
        if recipe.model is None:
            raise ValueError("the recipe names no model; give one (--model).")
        self.model = recipe.model
        self.output, self.max_memory, self.overwrite = Path(output), max_memory, overwrite
        self.loading = {**recipe.loading, **(loading or {})}
        self.stages = _resolved(recipe.stages, calibration, answers=ANSWERS if self._exports_chat(recipe) else 0.0)
        local = str(Path(self.model).resolve()) if Path(self.model).exists() else self.model
        found = plain_arguments({name: value for name, value in self.loading.items() if name in LOADING})
        self.measure = recipe.measure
        if self.measure is not None and self.measure.text is not None and Path(self.measure.text).is_file():
            self.measure = dataclasses.replace(self.measure, text=str(Path(self.measure.text).resolve()))
        self.recipe = dataclasses.replace(recipe, stages=self.stages, measure=self.measure, model=local, loading=found)
        self._bundle = None if bundle is None else Path(bundle)
        self._samples: Calibration | None = None
        self._pruner: CompPruner | None = None
        self._outcome = Outcome()
        self._done: list[str] = []

    def _exports_chat(self, recipe: Recipe) -> bool:
        """Whether a chat model is pruned and exported; exporting holds the whole model, as writing answers does."""
        prune = next((stage for stage in recipe.stages if isinstance(stage, Prune)), None)
        if prune is None or not any(isinstance(stage, Export) for stage in recipe.stages):
            return False
        if prune.running.answers is not None:
            # The user has decided: no tokenizer need be opened for it.
            return False
        try:
            return is_chat(open_tokenizer(self.model, lookup_arguments(self.loading)))
        except (OSError, ValueError):
            # What is wrong with the model is said where it is opened.
            return False

    @property
    def pruner(self) -> CompPruner:
        """The model that is pruned, opened for it; the dense one as long as the one with fewer tokens isn't there."""
        if self._pruner is None:
            prune = self._stage(Prune)
            device = None if prune is None else prune.running.device
            is_there = self.has_base
            model, loading = (self.base_model, self.base_loading) if is_there else (self.model, self.loading)
            self._pruner = CompPruner.from_pretrained(model, device=device, **loading)
        return self._pruner

    @property
    def prunes(self) -> bool:
        """Whether it prunes."""
        return self._stage(Prune) is not None

    @cached_property
    def base(self) -> Artifact:
        """What is pruned, sampled and learnt from: the dense model, or what is made of it with fewer tokens."""
        stage = self._stage(Vocabulary)
        if stage is None:
            return self.dense
        name = stage.place(DENSE)
        return Artifact(name, str(self.output / name), CHECKPOINT, key_of(stage, self.dense.key, self))

    @property
    def has_base(self) -> bool:
        """Whether it is there."""
        return self.base.name == DENSE or recorded_key(self.base.folder) == self.base.key

    @property
    def base_model(self) -> str:
        """Its folder, or hub id."""
        return self.base.place

    @property
    def base_loading(self) -> dict[str, Any]:
        """How it is loaded, under the names of `from_pretrained`."""
        return self.loading_of(self.base)

    def loading_of(self, artifact: Artifact) -> dict[str, Any]:
        """How a checkpoint of the chain is loaded, under the names of `from_pretrained`."""
        if artifact.name == DENSE:
            return self.loading
        # It lies here, as safetensors.
        return {name: value for name, value in self.loading.items() if name in ("dtype", "trust_remote_code")}

    @property
    def teacher(self) -> Artifact:
        """What distillation learns from: what is pruned, or, where words fall to pieces, what has them all."""
        stage = self._stage(Vocabulary)
        return self.dense if stage is not None and stage.settings.breaks_words else self.base

    @property
    def target(self) -> str:
        """The processor that quantization is for."""
        quantize = self._stage(Quantize)
        return "any" if quantize is None else quantize.settings.target

    @property
    def num_samples(self) -> int:
        """Calibration samples that quantization can look at."""
        prune = self._stage(Prune)
        return self._own_samples.num_samples + HELD_OUT if prune is None else prune.config.num_samples

    @property
    def _own_samples(self) -> SampleSettings:
        quantize = self._stage(Quantize)
        return (None if quantize is None else quantize.samples) or SampleSettings()

    @cached_property
    def parameters_after(self) -> int:
        """Parameters of the model that is quantized, about."""
        prune = self._stage(Prune)
        return self.parameters_of_base - (0 if prune is None else self.pruner.plan(prune.config).parameters)

    @cached_property
    def parameters_of_base(self) -> int:
        """Parameters of the model that is pruned."""
        vocabulary = self._stage(Vocabulary)
        return self._parameters - (0 if vocabulary is None else vocabulary.sizes(self)[0])

    @cached_property
    def bytes_per_parameter(self) -> float:
        """What the dense model's weights take on the disk, each."""
        return weight_bytes(self._folder) / self._parameters

    @cached_property
    def _parameters(self) -> int:
        return count_parameters(self._config)

    @cached_property
    def dense_sizes(self) -> ModelSizes:
        """What memory follows from, of the dense model."""
        return sizes_of(self._config, torch.float32 if self.bytes_per_parameter > 3 else torch.bfloat16)

    @property
    def sizes(self) -> ModelSizes:
        """The same of the model that is exported."""
        stage = self._stage(Vocabulary)
        tokens = self.dense_sizes.vocabulary if stage is None else stage.sizes(self)[1]
        return dataclasses.replace(self.dense_sizes, parameters=self.parameters_after, vocabulary=tokens)

    @property
    def sequence_length(self) -> int:
        """Tokens of a calibration sample."""
        return self._sampling()[0].sequence_length

    @cached_property
    def _config(self) -> Any:
        return open_config(self.model, lookup_arguments(self.loading))

    @cached_property
    def _folder(self) -> Path:
        """Where the dense model's files are."""
        # All at once: the files that are there are what it is known by.
        return resolve_folder(self.model, lookup_arguments(self.loading), (*MODEL_FILES, *TOKENIZER_FILES))

    def local(self, artifact: Artifact) -> Path:
        """An artifact's folder on this machine."""
        return self._folder if artifact.name == DENSE else artifact.folder

    @cached_property
    def dense(self) -> Artifact:
        """What the chain begins with, known by its files."""
        weights = {path.name for path in weight_files(self._folder)}
        given = self.loading.get("gguf_file")
        files = [
            path
            for path in sorted(self._folder.iterdir())
            if path.is_file() and (path.name in weights or path.name == given or path.suffix in _SMALL)
        ]
        if not weights and given is None:
            files += sorted(self._folder.glob("*.bin"))
        loading = {name: str(value) for name, value in sorted(self.loading.items()) if name in ("dtype", "gguf_file")}
        return Artifact(
            DENSE,
            self.model,
            CHECKPOINT,
            digest({"files": {path.name: file_digest(path) for path in files}, "loading": loading}),
        )

    @cached_property
    def samples_key(self) -> str:
        """The key under which calibration samples are kept."""
        config, source, column = self._sampling()
        fields = {name: getattr(config, name) for name in ("num_samples", "sequence_length", "seed", "begin")}
        return digest({"model": self.base.key, "source": source_identity(source), "column": column, **fields})

    def _sampling(self) -> tuple[CompConfig, CalibrationSource | None, str | None]:
        """How samples are made: their number and length, the source, and the column of it that holds text."""
        prune = self._stage(Prune)
        if prune is not None:
            return prune.config, prune.calibration, prune.running.text_column
        own = self._own_samples
        config = CompConfig(num_samples=self.num_samples, sequence_length=own.sequence_length, begin=own.begin)
        return config, own.calibration, own.text_column

    def read_texts(self) -> set[str]:
        """Texts that something is calibrated or trained on, as a recipe has them."""
        found: list[str] = []
        if any(stage.wants_samples for stage in self.stages):
            found += sources_in(written_source(self._sampling()[1]))
        distil = self._stage(Distil)
        if distil is not None:
            found += [part.source for part in sources_of(distil.settings.text)]
        return {written_source(each) for each in found}

    @property
    def has_samples(self) -> bool:
        """Whether calibration samples are kept already."""
        return recorded_key(self.output / _SAMPLES) == self.samples_key

    def samples(self) -> Calibration:
        """Calibration samples: those that are kept, else new ones, which are kept."""
        if self._samples is None and self.has_samples:
            self._samples = _load_samples(self.output / _SAMPLES)
        if self._samples is None:
            config, source, column = self._sampling()
            made = self.pruner.sample(config, source, text_column=column, max_memory=self.max_memory)
            record = {"stage": "samples", "key": self.samples_key, **made.describe()}
            clear_debris(self.output / _SAMPLES)
            with atomic_folder(self.output / _SAMPLES, overwrite=True, record=record) as folder:
                kept = {"tokens": made.tokens.contiguous(), "written": made.written}
                save_file({name: value for name, value in kept.items() if value is not None}, folder / _TOKENS)
            self._samples = made
        return self._samples

    @cached_property
    def _steps(self) -> list[_Step]:
        steps: list[_Step] = []
        source = self.dense
        for stage in self.stages:
            name = stage.place(source.name)
            folder = self._bundle if stage.makes == BUNDLE and self._bundle is not None else self.output / name
            key = key_of(stage, source.key, self)
            there = recorded_key(folder) if not (folder / JOURNAL).is_file() else None
            if there is not None and there != key and isinstance(stage, Prune) and stage.is_equalized is None:
                other = stage.equalized(not stage.config.equalize)
                if key_of(other, source.key, self) == there:
                    key, stage = there, other
                    bits = ("8", "", "4", "no-equalize") if other.config.equalize else ("4", "not ", "8", "equalize")
                    self._outcome.notes.append(_OTHERWISE.format(*bits))
            made = Artifact(name, str(folder), stage.makes, key)
            steps.append(_Step(stage, source, made, folder, there == key))
            source = made
        return steps

    @property
    def result(self) -> Artifact:
        """What the last stage makes."""
        return self._steps[-1].made if self._steps else self.dense

    def run(self) -> Outcome:
        """Do what isn't done yet.

        Raises:
            FileExistsError: what is in the output was made otherwise, or isn't a compression.
            ValueError: something that was asked for isn't possible.
            RuntimeError: a step failed; says what is kept.
            ImportError: something isn't installed.
            OSError: a file can't be read or written; says what is kept.
        """
        self._refuse()
        self.output.mkdir(parents=True, exist_ok=True)
        with hold(self.output), self._keeping():
            self._steps_again()
            self.recipe.write(self.output / RECIPE)
            self._tell_plan()
            source = self._sampling()[1]
            wants_samples = any(not step.is_there and step.stage.wants_samples for step in self._steps)
            for step in self._steps:
                if isinstance(step.stage, Vocabulary):
                    # Samples are of its tokens.
                    self._make(step)
            if wants_samples and written_source(source) != SELF:
                # Said before anything takes long: that there is too little text.
                self.samples()
            settings = self._measured(self.dense, self.measure)
            for step in self._steps:
                if step.made.name in self._done:
                    continue
                if step.made.kind == BUNDLE:
                    # The models are measured before they are put together.
                    self._measure_all(settings)
                self._make(step)
            self._measure_all(settings)
        return self._outcome

    def hint(self) -> str:
        """What is kept, and how to go on with it."""
        if not (self.output / RECIPE).is_file():
            return ""
        done = f"{', '.join(self._done)} {'is' if len(self._done) == 1 else 'are'} kept in {self.output}; " * bool(
            self._done
        )
        more = "" if self._bundle is None else f" --bundle {self._bundle}"
        more += " --trust-remote-code" * bool(self.loading.get("trust_remote_code"))
        more += " --allow-pickle" * (self.loading.get("use_safetensors") is False)
        return f"{done}go on with the same command, or\n  optimum-cli comp compress --resume{more} {self.output}"

    def _stage(self, kind: type[S]) -> S | None:
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    def _refuse(self) -> None:
        """Refuse what can be refused before any work."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "compress runs in one process; prune with several (optimum-cli comp prune), and give what they made "
                "to a recipe without prune."
            )
        check_model(self.model)
        plain_arguments(self.loading)
        self._check_output()
        quantize = self._stage(Quantize)
        if quantize is not None and quantize.samples is not None and self._stage(Prune) is not None:
            raise ValueError("quantization after pruning looks at the pruning's samples; give calibration to prune.")
        for stage in self.stages:
            stage.check(self)
        for step in self._steps:
            self._check_place(step)
            if step.source.name == DENSE and not step.is_there and not isinstance(step.stage, (Prune, Vocabulary)):
                self._require_readable(step.stage)
        self._require_memory()
        check_disk(self.output, sum(step.stage.disk_bytes(self) for step in self._steps if not step.is_there))
        self._read_texts()

    def _require_readable(self, stage: Stage) -> None:
        """Refuse a dense model that a stage can't read as it is.

        Raises:
            ValueError: it isn't there as safetensors.
        """
        kind = "a GGUF file" if "gguf_file" in self.loading else "a pickle"
        if kind == "a GGUF file" or self.loading.get("use_safetensors") is False:
            raise ValueError(
                f"{stage.name} reads safetensors, and {self.model} is loaded from {kind}; save it with "
                "save_pretrained and give that folder, or prune it."
            )
        require_safetensors(self.model, self._folder, lookup_arguments(self.loading))

    def _read_texts(self) -> None:
        """Look whether there is text where the recipe says so."""
        texts: list[Any] = [(self.measure.text, self.measure.text_column)] if self.measure is not None else []
        missing = any(not step.is_there and step.stage.wants_samples for step in self._steps)
        if missing and not self.has_samples:
            _, source, column = self._sampling()
            texts.append((source, column))
        for text, column in texts:
            require_text(text, column)

    def _require_memory(self) -> None:
        """Say what the steps behind pruning, which keeps to a limit itself, need of memory; refuse what can't fit."""
        steps: dict[str, int] = {}
        for step in self._steps:
            if not step.is_there:
                steps |= step.stage.memory_bytes(self)
        if self.measure is not None:
            window = Load(self.measure.window)
            steps[EVALUATE] = predict_peak(EVALUATE, self.dense_sizes, window)
            if any(step.made.kind == ONNX for step in self._steps):
                steps[EVALUATE_ONNX] = predict_peak(EVALUATE_ONNX, self.sizes, window)
        require_memory(steps, self.max_memory)
        if steps:
            told = ", ".join(f"{name} {format_bytes(size)}" for name, size in steps.items())
            logger.info("Memory that the steps after pruning may take: %s.", told)

    def _check_output(self) -> None:
        sources = [Path(self.model)] if Path(self.model).exists() else []
        is_ours = any((self.output / name).is_file() for name in (RECIPE, COMPRESSION_SUMMARY))
        if not is_ours and (self.output / "config.json").is_file():
            raise FileExistsError(f"{self.output} holds a model, not a compression; choose another output folder.")
        check_output(self.output, is_ours=is_ours, overwrite=self.overwrite, sources=sources)
        if self._bundle is None:
            return
        folders = self.output.resolve(), self._bundle.resolve()
        if folders[0] == folders[1] or folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0]):
            raise ValueError(
                f"the bundle {self._bundle} and the output {self.output} are one folder, or one holds the other. "
                "Choose folders beside each other."
            )

    def _check_place(self, step: _Step) -> None:
        """Refuse to replace unasked what was made otherwise."""
        sources = [Path(self.model)] if Path(self.model).exists() else []
        if step.is_there or not step.folder.exists():
            check_folder(step.folder, overwrite=True, sources=sources)
            return
        record = step.stage.record(step.made.key, step.source.key, self)
        if (step.folder / JOURNAL).is_file():
            journal = Journal.find(step.folder)
            if journal is None or self.overwrite or journal.identity == record:
                return
            there = journal.identity
        else:
            check_folder(step.folder, overwrite=True, sources=sources)
            if self.overwrite or not any(step.folder.iterdir()):
                return
            there = recorded(step.folder)
        raise FileExistsError(
            f"{step.folder} was made otherwise{_difference(there, record)}. Choose another output folder, or have it "
            "replaced: --overwrite."
        )

    def _steps_again(self) -> None:
        """Look once more, now that nobody else is at work here, and clear away what a kill has left."""
        for step in self._steps:
            clear_debris(step.folder)
        self._outcome.notes.clear()
        del self.__dict__["_steps"]
        for step in self._steps:
            self._check_place(step)
        # One that is taken up as it is may be another than was planned.
        self.recipe = dataclasses.replace(self.recipe, stages=tuple(step.stage for step in self._steps))

    def _tell_plan(self) -> None:
        there = [step.made.name for step in self._steps if step.is_there]
        anew = [step.made.name for step in self._steps if not step.is_there]
        if there:
            logger.info(
                "Taking up %s; %s.", ", ".join(there), f"making {', '.join(anew)}" if anew else "nothing to make"
            )
        for note in self._outcome.notes:
            logger.warning("%s", note)
        if self.measure is not None:
            warn_of_known_text(self.measure.text, self.read_texts())

    def _make(self, step: _Step) -> None:
        stage, outcome = step.stage, self._outcome
        if stage.makes == BUNDLE:
            outcome.bundle = step.folder
        if step.is_there:
            notes = self._read_notes(step.made)
            outcome.results[stage.name] = notes.get("result") or _told(step)
            if "cost" in notes:
                outcome.costs[stage.name] = Cost(**{**notes["cost"], "earlier": True})
        else:
            logger.info("%s: making %s ...", stage.name, step.made.name)
            record = stage.record(step.made.key, step.source.key, self)
            started = time.perf_counter()
            result = stage.run(step.source, step.folder, self, record)
            size = sum(result["files"].values()) if stage.makes == BUNDLE else weight_bytes(step.folder)
            cost = Cost(time.perf_counter() - started, result.get("peak_memory_bytes"), size)
            outcome.results[stage.name], outcome.costs[stage.name] = result, cost
            self._note(step.made, result=result, cost=dataclasses.asdict(cost))
        if isinstance(stage, (Prune, Vocabulary)):
            # Its memory is wanted by what follows.
            self._pruner = None
            gc.collect()
        self._done.append(step.made.name)

    def _measure_all(self, settings: Settings | None) -> None:
        for step in self._steps:
            if step.made.kind != BUNDLE and step.made.name not in self._outcome.models:
                self._measured(step.made, settings)

    def _measured(self, artifact: Artifact, settings: Settings | None) -> Settings | None:
        """Measure a model, if that hasn't been done; returns the settings for those that are compared with it."""
        if settings is None:
            return None
        loading = plain_arguments(self.loading) if artifact.name == DENSE else self._permissions
        wanted = {
            "model": artifact.key,
            "settings": {**dataclasses.asdict(settings), "text": None},
            "text": None if settings.text is None else source_identity(settings.text),
        }
        key = digest(wanted)
        notes = self._read_notes(artifact)
        started = time.perf_counter()
        if notes.get("measured") == key:
            found = Evaluation(**notes["evaluation"])
        else:
            logger.info("Measuring %s ...", artifact.name)
            found = evaluate_apart(artifact.place, settings, **loading)
            found.model = str(self.model) if artifact.name == DENSE else artifact.name
            self._note(artifact, measured=key, evaluation=found.to_dict())
            cost = self._outcome.costs.setdefault("measure", Cost(0.0))
            cost.seconds += time.perf_counter() - started
        self._outcome.models[artifact.name] = found
        return settings.as_with(found)

    @property
    def _permissions(self) -> dict[str, Any]:
        return {name: value for name, value in self.loading.items() if name == "trust_remote_code"}

    def _note_file(self, artifact: Artifact) -> Path:
        return self.output / NOTES / f"{artifact.name}.json"

    def _read_notes(self, artifact: Artifact) -> dict[str, Any]:
        """What is known of an artifact; nothing if what is known is of another."""
        try:
            found = json.loads(self._note_file(artifact).read_text(encoding="utf-8"))
            if found["key"] != artifact.key:
                return {}
            if "evaluation" in found:
                Evaluation(**found["evaluation"])
            if "cost" in found:
                Cost(**found["cost"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return dict(found)

    def _note(self, artifact: Artifact, **known: Any) -> None:
        notes = {"key": artifact.key, **self._read_notes(artifact), **known}
        path = self._note_file(artifact)
        path.parent.mkdir(exist_ok=True)
        with durably(path) as partial:
            partial.write_text(json.dumps(notes, indent=1, default=str) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Say of any failure what is kept, and how to go on."""
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(self.hint()) from error
        except MemoryError as error:
            raise RuntimeError(f"out of memory; {self.hint()}") from error
        except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
            raise _like(error, f"{error}\n{self.hint()}") from error
        except Exception as error:
            # Of libraries: ONNX Runtime's own kinds, for instance.
            raise RuntimeError(f"{type(error).__name__}: {error}\n{self.hint()}") from error


_SMALL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
"""Files of a checkpoint, beside its weights, that say what the model is."""

_OTHERWISE = (
    "pruned is taken up as it was made for {} bits ({}equalized), which costs {} bits some quality; to have it made "
    "anew, say --{} and give another output folder, or --overwrite."
)


def _resolved(stages: Sequence[Stage], calibration: CalibrationSource | None, *, answers: float) -> tuple[Stage, ...]:
    """The stages with what some decide for others, and with samples that only memory holds.

    Args:
        stages: as a recipe has them.
        calibration: in place of what it says.
        answers: share of the samples that the model's answers are where nothing is said.
    """
    quantize = next((stage for stage in stages if isinstance(stage, Quantize)), None)
    source: CalibrationSource | None = None
    column: str | None = None
    found: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Prune):
            stage = Prune(
                stage.config,
                stage.running,
                stage.calibration if calibration is None else calibration,
                is_equalized=stage.is_equalized,
            )
            if stage.is_equalized is None and quantize is not None:
                stage = stage.equalized(quantize.settings.suits_equalization)
            if any(isinstance(each, Export) for each in stages):
                stage = stage.for_export()
            stage = stage.with_answers(answers)
            source, column = stage.calibration, stage.running.text_column
        if isinstance(stage, Distil):
            if quantize is not None and quantize.samples is not None:
                source, column = quantize.samples.calibration, quantize.samples.text_column
            stage = stage.decided(source, column)
        found.append(stage)
    return tuple(found)


def check_output(folder: Path, *, is_ours: bool, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse a folder that holds something else, which `--overwrite` doesn't replace.

    Raises:
        FileExistsError: so it is.
        OSError: see `check_folder`.
        ValueError: see `check_folder`.
    """
    try:
        check_folder(folder, overwrite=is_ours, sources=sources)
    except FileExistsError as error:
        if overwrite and folder.is_dir():
            raise FileExistsError(
                f"{folder} isn't empty, and isn't what this command made, which is all that --overwrite replaces. "
                "Choose another output folder."
            ) from error
        raise


def warn_of_known_text(text: str | None, read: set[str]) -> None:
    """Say so where what is measured on is what a model has learnt from.

    Args:
        text: that is measured on.
        read: see `Chain.read_texts`.
    """
    if text is not None and written_source(text) in read:
        logger.warning(
            "%s is measured on, and calibrates or trains, too: models look better on it than on other text. Give "
            "--text FILE of another kind.",
            shown(text),
        )


def _like(error: Exception, text: str) -> Exception:
    """An error of the same kind that says more."""
    for kind in (BudgetError, FileExistsError, OSError, ValueError, FloatingPointError, ImportError):
        if isinstance(error, kind):
            return kind(text)
    return RuntimeError(text)


def _load_samples(folder: Path) -> Calibration | None:
    try:
        kept = load_file(folder / _TOKENS)
        told = recorded(folder)
        found = Calibration(kept["tokens"], told["source"], Beginning.from_dict(told), kept.get("written"))
        return found if found.describe()["sha256"] == told["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _told(step: _Step) -> dict[str, Any]:
    """What a folder tells of how it was made, where no note does."""
    if isinstance(step.stage, Prune):
        return CompReport.load(step.folder).summary()
    if isinstance(step.stage, Distil):
        return read_object(step.folder / DISTILLATION)
    if isinstance(step.stage, Vocabulary):
        return {name: value for name, value in read_object(step.folder / VOCABULARY).items() if name != "kept"}
    return {}


def _difference(there: Any, record: Mapping[str, Any]) -> str:
    """The first setting that differs, in words."""
    then = there.get("settings") if isinstance(there, Mapping) else None
    if not isinstance(then, Mapping):
        return " (it doesn't say how)"
    for name, value in record["settings"].items():
        if json.loads(json.dumps(value)) != then.get(name):
            return f" ({name}={then.get(name)!r:.60}, not {value!r:.60})"
    return " (of another model)"
