"""`CompPruner`: open a model, prune it, save it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from optimum_comp.beginning import decide, losses_of_model, losses_of_source
from optimum_comp.calibration.text import (
    SELF,
    Calibration,
    CalibrationSource,
    is_self,
    prepare_calibration,
    require_text,
    source_name,
)
from optimum_comp.checkpoint.opening import GENERATION_CONFIG, find_device, open_config, open_source
from optimum_comp.checkpoint.parts import join_parts
from optimum_comp.checkpoint.reader import weight_files
from optimum_comp.checkpoint.rope import require_portable
from optimum_comp.checkpoint.source import ModelSource, ResidentModel, StreamedModel, find_matmul_dtype, part_name
from optimum_comp.checkpoint.tokenizer import has_tokenizer, open_tokenizer
from optimum_comp.checkpoint.writer import fill_folder, upload
from optimum_comp.configuration import CompConfig
from optimum_comp.core.allocation import Allocation, alternatives, uneven
from optimum_comp.families import FFN, HEADS, KV, LAYERS, family_of, renumber
from optimum_comp.families.check import check_family, check_plan, check_result, shape_of, units_after
from optimum_comp.families.cutting import WIDTHS_FIELD, apply_to_config
from optimum_comp.files import atomic_folder, check_model
from optimum_comp.options import Integer, parse_bytes
from optimum_comp.report.run import CompReport, library_versions, told_name
from optimum_comp.scratch import make_scratch
from optimum_comp.strict_json import plain_object
from optimum_comp.sweep.destination import Destination
from optimum_comp.sweep.entries import ARGUMENTS, PERMISSIONS
from optimum_comp.sweep.journal import Journal
from optimum_comp.sweep.memory import (
    MemoryPlan,
    Workload,
    check_disk,
    disk_bytes,
    expected_seconds,
    good_batch_size,
    plan_memory,
    workload_of,
    writing_of,
)
from optimum_comp.sweep.pruning import Pruned, PruningRun
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import LayerRunner
from optimum_comp.sweep.trial import Trials
from optimum_comp.utils import (
    format_bytes,
    get_logger,
    lookup_arguments,
    parameter_count,
    peak_memory_bytes,
    release_free_memory,
)


logger = get_logger(__name__)

_WAITING = "pruned layers"


class CompPruner:
    """Prunes a decoder-only language model with COMP.

    ```python
    pruner = CompPruner.from_pretrained("my-model")
    pruner.prune(CompConfig(sparsity=0.2), calibration="text.txt", output="my-model-comp20")
    ```

    A safetensors checkpoint is never loaded as a whole: one decoder layer at a time is read, pruned, written and
    dropped. Without `output` the pruned layers wait in a temporary folder for `save_pretrained`.

    Attributes:
        tokenizer: the model's tokenizer, or `None`.
        report: what `prune` did; `None` before.
        samples: the calibration samples that it used, `[samples, length]`.
    """

    def __init__(self, source: ModelSource, tokenizer: Any = None, name: str | None = None, **name_arguments: Any):
        self.tokenizer = tokenizer
        self.report: CompReport | None = None
        self.config: CompConfig | None = None
        self.samples: torch.Tensor | None = None
        self._source = source
        self._name = name
        self._name_arguments = name_arguments
        self._interrupted = False
        self._record: dict[str, Any] | None = None
        self._ranks = Ranks(source.device)
        check_family(source.family, source.model)
        self._counts = source.family.counts(source.model.config, source.layers[0])
        self._folder: Path | None = None
        self._loaded: Any = None
        self._scratch: TemporaryDirectory[str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> CompPruner:
        """Open a model and its tokenizer; of a safetensors checkpoint, only the headers are read.

        Args:
            model: hub id, local folder, or a model that is in memory already (then it is pruned in place).
            tokenizer: a tokenizer, or where to load it from; by default it is looked for beside the model.
            device: where layers are run, one at a time (`"cuda"`); the processor by default.
            kwargs: as for `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, `token`, `trust_remote_code`,
                ...); the checkpoint's own dtype is the default. `gguf_file`, `use_safetensors=False` (which trusts a
                pickle) and what only transformers understands load the whole model into memory.

        Raises:
            ValueError: the model isn't a decoder-only language model of a supported family, or isn't built as the
                family is; its weights are a pickle, or its files don't fit together (names file and tensor). Said
                before any weight is read.
            OSError: there is no such model.
        """
        from transformers import PretrainedConfig

        where = find_device(device)
        if isinstance(tokenizer, (str, PathLike)):
            tokenizer = open_tokenizer(tokenizer)
        elif tokenizer is not None and not callable(tokenizer):
            raise ValueError(f"tokenizer={tokenizer!r:.80} is not valid: give a tokenizer, a folder or a hub id.")
        if isinstance(model, nn.Module):
            if kwargs:
                raise ValueError(f"{', '.join(kwargs)} can't be given with a model that is in memory already.")
            if not getattr(model, "can_generate", lambda: False)():
                raise ValueError(f"{type(model).__name__} is not a causal language model of transformers.")
            own: Any = model.config
            family = family_of(own)
            require_portable(own.to_dict(), type(model).__name__)
            return cls(ResidentModel((model if device is None else model.to(where)).eval(), family), tokenizer)
        check_model(model)
        name = str(model)
        lookup = lookup_arguments(kwargs)
        config = kwargs.get("config") or open_config(name, lookup)
        if not isinstance(config, PretrainedConfig):
            raise ValueError(f"config={config!r:.80} is not valid: give a config of transformers.")
        source = open_source(name, config, where, lookup, kwargs)
        if tokenizer is None and has_tokenizer(name, lookup):
            tokenizer = open_tokenizer(name, lookup)
        elif tokenizer is None:
            logger.warning("%s has no tokenizer: only token blocks or self-calibration can be used.", name)
        return cls(source, tokenizer, name, **lookup)

    @property
    def model(self) -> Any:
        """The model: dense before `prune`, pruned afterwards.

        Of a streamed checkpoint, the dense model is a skeleton without weights, and the pruned one is loaded from its
        folder when it is first asked for.
        """
        if self._folder is None:
            return self._source.model
        if self._loaded is None:
            from transformers import AutoModelForCausalLM

            trust = {k: v for k, v in self._name_arguments.items() if k == "trust_remote_code"}
            self._loaded = AutoModelForCausalLM.from_pretrained(self._folder, dtype="auto", **trust).eval()
        return self._loaded

    @property
    def _trusts_code(self) -> bool:
        return bool(self._name_arguments.get("trust_remote_code", False))

    @property
    def _local(self) -> Path | None:
        """The dense model's folder, if it is the user's own."""
        return Path(self._name) if self._name is not None and Path(self._name).is_dir() else None

    @property
    def _sources(self) -> list[str]:
        """What no output may touch."""
        return [] if self._name is None else [self._name]

    @property
    def layers(self) -> nn.ModuleList:
        """The model's decoder layers."""
        return self._source.family.get_layers(self.model)

    def plan(self, config: CompConfig) -> Allocation:
        """What `prune` would remove, without doing any work.

        Raises:
            ValueError: the requested sparsity can't be reached, a protected layer doesn't exist, or the family can't
                be pruned along an axis that is needed.
        """
        return self.plans(config)[0]

    def plans(self, config: CompConfig) -> list[Allocation]:
        """What `prune` might remove, without doing any work: what `plan` says first, others where shares are `auto`.

        Raises:
            ValueError: see `plan`.
        """
        source = self._source
        shape = shape_of(source, config)
        removable = shape.num_layers - len(config.protected(shape.num_layers))
        reason = source.family.refusal(LAYERS, source.model.config)
        layers = config.fixed_layer_fraction
        found = alternatives(
            shape,
            config.sparsity,
            0.0 if layers is None and reason is not None else layers,
            config.round_to,
            removable,
            config.fixed_attention_fraction,
        )
        if reason is not None and found[0].layers:
            raise ValueError(f"layers of {source.family.model_type} can't be removed: {reason}; set layer_fraction=0.")
        return found

    @torch.no_grad()
    def prune(
        self,
        config: CompConfig | None = None,
        calibration: CalibrationSource | Calibration | None = None,
        *,
        output: str | Path | None = None,
        text_column: str | None = None,
        batch_size: int | None = None,
        max_memory: str | int | None = None,
        matmul_dtype: str = "auto",
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        resume: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> CompReport:
        """Prune the model.

        Started in several processes by `torchrun` or `accelerate launch`, each takes a share of the samples.

        Args:
            config: how; the defaults of `CompConfig` if `None`.
            calibration: a text, JSONL, CSV or Parquet file, a dataset's name on the hub (`name`, `name:config` or
                `name:config:split`), a `datasets.Dataset`, a list of texts, a tensor of token blocks
                `[samples, length]`, or `"self"` (the default) for text that the model writes itself, which needs all
                of it in memory; or what `sample` has made of one of these.
            output: folder to write the pruned model to while it is made. With a safetensors checkpoint, the run can
                then be gone on with after any interruption.
            text_column: the column of a dataset that holds text, if it isn't `text`.
            batch_size: samples that go through a layer at a time, at most; by default as many as keep the processor
                busy and no more, since they are what memory goes to in a wide layer.
            max_memory: what this process may take in all, as `"4GB"` or bytes; past it, work goes to files in the
                output folder. What is free, if `None`.
            matmul_dtype: what factors of matrix products are rounded to while layers run on a CPU: `"float32"` (not at
                all), `"bfloat16"`, or `"auto"` for the latter where the processor has instructions for it, which
                takes a quarter off the whole. Sums, and the solves, are as precise as ever.
            max_shard_size: of the output's files.
            overwrite: replace a model that is in `output` already, once the new one is complete.
            resume: go on with the unfinished run in `output`, if there is one; with its config and calibration text if
                they aren't given. The result is that of an undisturbed run, byte for byte.
            record: what the output is to be known by, as JSON has it: written into it as `comp_stage.json` together
                with all else, so that it is there exactly if the model is. A run that is gone on with keeps the one
                that it began with, if none is given; a model that is complete already keeps its own.

        Returns:
            What was done; also kept as `report`.

        Raises:
            ValueError: bad configuration or calibration text, too little memory, a weight that is NaN or infinite, or
                an unfinished run that was made otherwise.
            FileExistsError: `output` is there already.
            FloatingPointError: activations that are NaN or infinite; names the layer.
            OSError: no space left (then the run can be gone on with), `output` can't be written, or another process
                is at work in it.
        """
        if batch_size is not None:
            batch_size = Integer(1).check("batch_size", batch_size)
        max_shard_size = parse_bytes(max_shard_size, "max_shard_size")
        if config is not None and not isinstance(config, CompConfig):
            raise ValueError(f"config={config!r:.80} is not valid: give a CompConfig.")
        if self.report is not None or self._interrupted:
            raise RuntimeError("this model has been pruned already; load it again with CompPruner.from_pretrained.")
        self._record = None if record is None else plain_object(record, "record")
        limit = None if max_memory is None else parse_bytes(max_memory)
        products = find_matmul_dtype(matmul_dtype, self._source)
        folder = None if output is None else Path(output)
        if resume and folder is None:
            raise ValueError("resume needs the output folder of the run that is to be gone on with.")
        arguments = (config, calibration, text_column, batch_size, limit, matmul_dtype, products, max_shard_size)
        if folder is None:
            return self._prune(None, *arguments)
        in_place = not self._source.is_resident
        destination = Destination(folder, self._ranks, self._sources, in_place, overwrite, resume)
        with destination.alone():
            return self._prune(destination, *arguments)

    def _prune(
        self,
        destination: Destination | None,
        config: CompConfig | None,
        calibration: CalibrationSource | None,
        text_column: str | None,
        batch_size: int | None,
        limit: int | None,
        matmul_dtype: str,
        products: torch.dtype,
        max_shard_size: int | str,
    ) -> CompReport:
        folder = unfinished = None
        if destination is not None:
            folder, unfinished = destination.folder, destination.unfinished()
            if unfinished is not None:
                config = unfinished.config(config)
                self._record = unfinished.identity if self._record is None else self._record
                if unfinished.is_finishing and self._ranks.is_first:
                    # All layers are done, and the result has only to be put in its place.
                    unfinished.publish()
            complete = destination.finished(config)
            if complete is not None:
                (self.report, self.config), self._folder = complete, folder
                return self.report
        config = CompConfig() if config is None else CompConfig(**config.fields())
        plans = self.plans(config)
        allocation = plans[0]
        self._ranks.require(config.num_samples)
        for each in {(each.layers > 0, *each.units): each for each in plans}.values():
            check_plan(self._source, each)
        shape = shape_of(self._source, config)
        work = workload_of(self._source, config, plans, self._ranks, products)
        batch_size = batch_size or good_batch_size(config.sequence_length, self._source.device)
        # Said now if it can't fit, and once more with what libraries take that are loaded by then.
        is_written = unfinished is None and self._ranks.is_first and is_self(calibration)
        writing = writing_of(self._source, self.tokenizer, config) if is_written else None
        first = plan_memory(work, batch_size, limit, writing)
        before = parameter_count(self._source.model)
        after = before - allocation.parameters
        # Layers of different widths take as much room as the widest, which may be as wide as before.
        written = before if config.allocation == "adaptive" else after
        if unfinished is None and self._ranks.is_first:
            # Weights are read and text is written for minutes: what can be known before is looked at before.
            require_text(calibration, text_column)
            if is_written and folder is not None and not self._source.is_resident:
                check_disk(folder, disk_bytes(work, first, written, resumable=True))
        started = time.perf_counter()
        fingerprint = self._ranks.from_first(self._source.check() if self._ranks.is_first else "")
        samples = self._samples(config, calibration, text_column, unfinished, first.written_together)
        self.samples = samples.tokens
        release_free_memory()
        plan = plan_memory(work, batch_size, limit)
        if is_written:
            plan = dataclasses.replace(plan, peak_bytes=max(first.peak_bytes, plan.peak_bytes))
        # The same batches in all processes; and, going on, those that it was begun with: others add up otherwise.
        batch = plan.batch_size if unfinished is None else unfinished.run["batch_size"]
        plan = dataclasses.replace(plan, batch_size=self._ranks.from_first(batch))
        if unfinished is not None and matmul_dtype == "auto":
            products = getattr(torch, unfinished.run["matmul_dtype"])
        products = self._ranks.from_first(products)
        disk = disk_bytes(work, plan, written, resumable=folder is not None)
        if folder is None or self._source.is_resident:
            remedy = "Give output=, or set TMPDIR to a folder with the room."
            announced = self._ranks.is_first
            self._scratch = make_scratch(disk, _WAITING, announced=announced, remedy=remedy) if disk else None
        elif unfinished is None:
            check_disk(folder, disk)
        self._interrupted = True
        journal = self._begin(unfinished, folder, config, plans, samples, plan, fingerprint, products)
        place = self._workplace(folder)
        with contextlib.nullcontext() if journal is None else journal.guard():
            runner = LayerRunner(self._source, samples.tokens[:1].to(self._source.device), products)
            self._announce(config, allocation, work, plan, runner.seconds_per_layer, disk, journal)
            run = PruningRun(
                runner,
                config,
                plans,
                config.protected(work.layers),
                samples.tokens,
                plan,
                self._ranks,
                place,
                journal,
                start=samples.start,
                trials=Trials,
            )
            pruned = run.run()
        with contextlib.nullcontext() if journal is None else journal.kept(), run.clock("write"):
            allocation = plans[pruned.settled.chosen]
            if pruned.settled.is_uneven:
                allocation = uneven(shape, allocation, pruned.settled.widths)
            self._shrink(pruned, allocation)
            after = before - allocation.parameters
            self.report = self._report(config, plans, allocation, samples, products, pruned, before, after)
            self.config = config
            self._finish(destination, place, journal, max_shard_size)
        self.report.seconds = time.perf_counter() - started
        self.report.peak_memory_bytes = peak_memory_bytes()
        self.report.timings = {kind: round(seconds, 3) for kind, seconds in run.clock.seconds.items()}
        logger.info(
            f"Peak memory {format_bytes(self.report.peak_memory_bytes)} ({format_bytes(plan.peak_bytes)} expected); "
            + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in self.report.timings.items())
            + "."
        )
        self._interrupted = False
        return self.report

    @torch.no_grad()
    def sample(
        self,
        config: CompConfig | None = None,
        calibration: CalibrationSource | None = None,
        *,
        text_column: str | None = None,
        max_memory: str | int | None = None,
    ) -> Calibration:
        """The calibration samples that `prune` would make, to be given to it (or to quantization) afterwards.

        Args:
            config: as for `prune`.
            calibration: as for `prune`.
            text_column: as for `prune`.
            max_memory: as for `prune`; of the model that writes text.

        Raises:
            ValueError: too little text or memory, no such file, no such column, or no text in it.
        """
        config, together = CompConfig() if config is None else config, 0
        if is_self(calibration):
            work = workload_of(self._source, config, self.plans(config), self._ranks)
            limit = None if max_memory is None else parse_bytes(max_memory)
            batch_size = good_batch_size(config.sequence_length, self._source.device)
            writing = writing_of(self._source, self.tokenizer, config)
            together = plan_memory(work, batch_size, limit, writing).written_together
        return self._made_samples(config, calibration, text_column, together)

    def _made_samples(
        self, config: CompConfig, calibration: CalibrationSource | None, text_column: str | None, together: int
    ) -> Calibration:
        calibration, writes = SELF if calibration is None else calibration, is_self(calibration)
        model = self._source.whole() if writes else self._source.model
        losses = losses_of_model(model) if writes else losses_of_source(self._source)
        return prepare_calibration(
            calibration,
            model=model,
            tokenizer=self.tokenizer,
            num_samples=config.num_samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            text_column=text_column,
            begin=lambda pieces: decide(config.begin, self.tokenizer, pieces, losses, "Blocks"),
            together=together or None,
        )

    def _samples(
        self,
        config: CompConfig,
        calibration: CalibrationSource | Calibration | None,
        text_column: str | None,
        journal: Journal | None,
        together: int,
    ) -> Calibration:
        if journal is not None:
            known = journal.run["calibration"]["source"]
            if calibration is not None and source_name(calibration) != known:
                raise ValueError(
                    f"the unfinished run is calibrated on {known!r}, not on {source_name(calibration)!r}; go on with "
                    "that, or start anew with --overwrite."
                )
        samples = None
        if journal is not None and self._ranks.is_first:
            samples = journal.calibration()
        elif self._ranks.is_first and isinstance(calibration, Calibration):
            samples = calibration
        elif self._ranks.is_first:
            samples = self._made_samples(config, calibration, text_column, together)
        shared = self._ranks.from_first(samples)
        assert shared is not None
        if shared.tokens.shape != (config.num_samples, config.sequence_length):
            raise ValueError(
                f"the calibration samples are {tuple(shared.tokens.shape)}, and num_samples={config.num_samples} of "
                f"sequence_length={config.sequence_length} are asked for."
            )
        return shared

    def _begin(
        self,
        unfinished: Journal | None,
        folder: Path | None,
        config: CompConfig,
        plans: Sequence[Allocation],
        samples: Calibration,
        plan: MemoryPlan,
        fingerprint: str,
        products: torch.dtype,
    ) -> Journal | None:
        """Start or take up the record of the run, in the first process, if it is one that can be gone on with."""
        if self._source.is_resident or folder is None:
            return None
        given = self._name_arguments
        arguments = {key: given[key] for key in ARGUMENTS if given.get(key) is not None}
        if isinstance(self._source, StreamedModel) and self._source.store_dtype is not None:
            arguments["dtype"] = _dtype_name(self._source.store_dtype)
        run = {
            "source": self._name if self._local is None else str(self._local.resolve()),
            "arguments": arguments,
            "permissions": [name for name in PERMISSIONS if given.get(name)],
            "config": config.fields(),
            "weights": fingerprint,
            "calibration": samples.describe(),
            "batch_size": plan.batch_size,
            "matmul_dtype": _dtype_name(products),
            "processes": self._ranks.size,
            "device": self._source.device.type,
            "dtype": str(self._source.state_dtype),
            "versions": library_versions(),
            "record": self._record,
        }
        journal: Journal | None = None
        if self._ranks.is_first:
            if unfinished is not None:
                unfinished.go_on(run, layers=len(self._source.layers), removed={each.layers for each in plans})
                journal = unfinished
            else:
                journal = Journal.start(folder)
                journal.begin(run, samples.tokens)
        self._ranks.wait()
        return journal

    def _workplace(self, folder: Path | None) -> Path | None:
        """A folder for parts, hidden states and spilled activations, if the run needs one."""
        place = None if self._scratch is None else Path(self._scratch.name)
        if not self._source.is_resident and folder is not None:
            journal = Journal(folder, {})
            journal.require_plain()
            place = journal.work
            place.mkdir(parents=True, exist_ok=True)
        if isinstance(self._source, StreamedModel):
            self._source.parts = place
        return place

    def _announce(
        self,
        config: CompConfig,
        allocation: Allocation,
        work: Workload,
        plan: MemoryPlan,
        seconds_per_layer: float,
        disk: int,
        journal: Journal | None,
    ) -> None:
        if not self._ranks.is_first:
            return
        least, most = expected_seconds(work, seconds_per_layer)
        if journal is not None and journal.finished:
            logger.info("Going on after %d finished layers.", journal.finished)
        logger.info(
            f"COMP: {work.layers} layers of {_sizes(self._counts)} -> {work.layers - allocation.layers} of "
            f"{_sizes({**self._counts, **units_after(self._counts, allocation.units)})} (sparsity "
            f"{allocation.sparsity:.4f}, {config.sparsity:g} asked). "
            f"{config.num_samples * config.sequence_length:,} calibration tokens; expected: "
            f"{format_bytes(plan.peak_bytes)} of memory at the peak, {format_bytes(disk)} on disk, "
            f"{least:.0f} to {most:.0f} s."
        )
        if plan.spill_states or plan.spill_inputs:
            what = "hidden states and activations" if plan.spill_states else "activations"
            logger.info("Batches of %d samples; %s are kept in files.", plan.batch_size, what)

    def _shrink(self, pruned: Pruned, allocation: Allocation) -> None:
        """Write the new depth and width into the model's config; of a model in memory, drop the removed layers."""
        source = self._source
        if source.is_resident:
            layers = source.layers
            for index in sorted(pruned.settled.removed, reverse=True):
                del layers[index]
            renumber(source.family, layers)
        config = source.model.config
        kept = [layer.index for layer in pruned.layers]
        apply_to_config(source.family, config, kept, self._counts, units_after(self._counts, allocation.units))
        if pruned.settled.is_uneven:
            setattr(config, WIDTHS_FIELD, pruned.settled.widths)
        elif hasattr(config, WIDTHS_FIELD):
            delattr(config, WIDTHS_FIELD)

    def _report(
        self,
        config: CompConfig,
        plans: Sequence[Allocation],
        allocation: Allocation,
        samples: Calibration,
        products: torch.dtype,
        pruned: Pruned,
        before: int,
        after: int,
    ) -> CompReport:
        settled = pruned.settled
        tried = settled.tried or [None] * len(plans)
        return CompReport(
            # A local path says nothing to others and may say too much.
            source=None if self._name is None else told_name(self._name),
            model_type=self._source.family.model_type,
            requested_sparsity=config.sparsity,
            achieved_sparsity=allocation.sparsity,
            parameters_before=before,
            parameters_after=after,
            removed_layers=settled.removed,
            layer_scores=settled.layer_scores,
            units={
                kind: [before, units_after(self._counts, allocation.units).get(kind, before)]
                for kind, before in self._counts.items()
            },
            layers=pruned.layers,
            calibration=samples.describe(),
            versions=library_versions(),
            matmul_dtype=_dtype_name(products),
            ledger=list(allocation.ledger),
            expected_costs=settled.costs,
            weighed=[
                {
                    "layers": plan.layers,
                    "units": units_after(self._counts, plan.units),
                    "cost": cost,
                    "divergence": divergence,
                }
                for plan, cost, divergence in zip(plans, settled.weighed, tried, strict=True)
            ]
            if settled.weighed
            else [],
        )

    def _finish(
        self,
        destination: Destination | None,
        place: Path | None,
        journal: Journal | None,
        max_shard_size: int | str,
    ) -> None:
        """Make a model of what the loop left: in the output folder, in a temporary one, or in memory."""
        if isinstance(self._source, StreamedModel) and place is not None:
            made = place / "final"
            if self._ranks.is_first:
                parts = [place / part_name(number) for number in range(len(self._finished()[0].layers))]
                parts += self._source.write_outside()
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                self._fill(made, parts, max_shard_size)
                check_result(made, trust_remote_code=self._trusts_code)
                if journal is not None:
                    journal.publish()
                else:
                    for part in parts:
                        part.unlink()
            self._folder = made if destination is None else destination.folder
            if destination is not None:
                destination.end()
        elif destination is not None:
            self._save(destination.folder, max_shard_size, overwrite=destination.overwrite)

    def _fill(self, folder: Path, parts: Sequence[Path], max_shard_size: int | str) -> None:
        report, config = self._finished()
        model = self._source.model
        if self._source.is_resident:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        else:
            join_parts(parts, folder, max_shard_size)
            model.config.save_pretrained(folder)
            self._copy_generation_config(folder)
        fill_folder(
            folder,
            tokenizer=self.tokenizer,
            config=config,
            report=report,
            source=self._name,
            source_arguments=self._name_arguments,
            record=self._record,
        )

    def _copy_generation_config(self, folder: Path) -> None:
        """As it is: transformers reads some that it refuses to write."""
        assert isinstance(self._source, StreamedModel)
        source = self._source.checkpoint.folder / GENERATION_CONFIG
        if source.is_file():
            shutil.copyfile(source, folder / GENERATION_CONFIG)
        elif self._source.model.generation_config is not None:
            self._source.model.generation_config.save_pretrained(folder)

    def _save(self, folder: Path, max_shard_size: int | str, *, overwrite: bool) -> None:
        if self._ranks.is_first:
            with atomic_folder(folder, overwrite=overwrite, sources=self._sources) as partial:
                self._fill(partial, weight_files(self._folder) if self._folder is not None else [], max_shard_size)
                check_result(partial, trust_remote_code=self._trusts_code)
        self._ranks.wait()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> Path:
        """Write a checkpoint that plain transformers reads, its tokenizer, side-cars and a model card.

        Args:
            save_directory: an output folder that doesn't exist yet (or is empty); or `prune`'s own output, where
                everything is already.
            overwrite: replace an earlier checkpoint in that folder.
            push_to_hub: upload it afterwards.
            repo_id: where to; defaults to the folder's name in your namespace.
            kwargs: `max_shard_size` for saving; `token`, `private`, `commit_message`, `revision` for the upload.

        Raises:
            FileExistsError: the folder exists and `overwrite` isn't set.
            RuntimeError: nothing has been pruned, or pruning was interrupted.
        """
        self._finished()
        folder = Path(save_directory)
        max_shard_size = parse_bytes(kwargs.pop("max_shard_size", "5GB"), "max_shard_size")
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained got arguments it doesn't know: {', '.join(sorted(kwargs))}.")
        if self._folder is None or folder.resolve() != self._folder.resolve():
            self._save(folder, max_shard_size, overwrite=overwrite)
        if push_to_hub and self._ranks.is_first:
            upload(folder, repo_id or folder.name, **kwargs)
        return folder

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pruned checkpoint to the hub; returns its URL.

        Args:
            repo_id: `namespace/name`, or a name in your namespace.
            kwargs: `token`, `private`, `commit_message`, `revision`, `max_shard_size`.
        """
        self._finished()
        with make_scratch(self._saved_bytes(), _WAITING) as folder:
            shard = {"max_shard_size": kwargs.pop("max_shard_size")} if "max_shard_size" in kwargs else {}
            return upload(self.save_pretrained(Path(folder) / repo_id.split("/")[-1], **shard), repo_id, **kwargs)

    def _saved_bytes(self) -> int:
        """Size of the pruned model's weights on the disk."""
        if self._folder is not None:
            return sum(path.stat().st_size for path in weight_files(self._folder))
        return sum(weight.numel() * weight.element_size() for weight in self._source.model.parameters())

    def _finished(self) -> tuple[CompReport, CompConfig]:
        if self.report is None or self.config is None:
            state = "was interrupted; load the model again" if self._interrupted else "has not been called"
            raise RuntimeError(f"there is no pruned model to save: prune() {state}.")
        return self.report, self.config


def _sizes(counts: dict[str, int]) -> str:
    heads = f", {counts[HEADS]} heads, {counts[KV]} key-value heads" if HEADS in counts else ""
    return f"{counts[FFN]} neurons{heads}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
