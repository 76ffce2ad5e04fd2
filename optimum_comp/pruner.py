"""The story of a pruning run: open, score layers, then per layer observe, decide, repair, pass on; report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.activations import LayerRunner, Tap, replaced
from optimum_comp.calibration import Calibration, CalibrationSource, prepare_calibration
from optimum_comp.checkpoint.tokenizer import has_tokenizer
from optimum_comp.configuration import FIELDS, CompConfig
from optimum_comp.core.allocation import Allocation, Shape, allocate
from optimum_comp.core.gram import GramAccumulator, cross_moment
from optimum_comp.core.layer_scores import least_important
from optimum_comp.core.recovery import RECOVERIES, refit, relative_error
from optimum_comp.core.selection import select_channels
from optimum_comp.families import apply_to_config, apply_to_layer, family_of, renumber
from optimum_comp.layer_scoring import LAYER_SCORES
from optimum_comp.report.run import CompReport, LayerReport, library_versions
from optimum_comp.utils import format_bytes, get_logger, lookup_arguments, peak_memory_bytes, progress_disabled


logger = get_logger(__name__)


@dataclass
class Observation:
    """What one decoder layer did on the calibration samples.

    Attributes:
        residual: hidden states before the FFN's output is added, a tensor `[batch, length, hidden]` a batch.
        inputs: inputs of the FFN's consumer, a tensor `[..., neurons]` a batch.
        gram: their Gram matrix, `[neurons, neurons]`, float64.
    """

    residual: list[Tensor]
    inputs: list[Tensor]
    gram: Tensor


class CompPruner:
    """Prunes a decoder-only language model with COMP.

    ```python
    pruner = CompPruner.from_pretrained("my-model")
    pruner.prune(CompConfig(sparsity=0.2), calibration="text.txt")
    pruner.save_pretrained("my-model-comp20")
    ```

    Attributes:
        model: the model; pruned in place by `prune`.
        tokenizer: its tokenizer, or `None`.
        report: what `prune` did; `None` before.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, source: str | None = None, **source_arguments: Any):
        if not getattr(model, "can_generate", lambda: False)():
            raise ValueError(f"{type(model).__name__} is not a causal language model of transformers.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.report: CompReport | None = None
        self.config: CompConfig | None = None
        self._source = source
        self._source_arguments = source_arguments
        self._spec = family_of(model.config)
        self._interrupted = False

    @classmethod
    def from_pretrained(cls, model: str | Path | nn.Module, tokenizer: Any = None, **kwargs: Any) -> CompPruner:
        """Load a model and its tokenizer.

        Args:
            model: hub id, local folder, or a model that is in memory already (then it is pruned in place).
            tokenizer: a tokenizer, or where to load it from; by default it is looked for beside the model.
            kwargs: passed on to `AutoModelForCausalLM.from_pretrained` (`dtype`, `gguf_file`, `revision`, `token`,
                `trust_remote_code`, ...). The checkpoint's own dtype is the default.

        Raises:
            ValueError: the model isn't a decoder-only language model of a supported family (said before any weight
                is read).
            OSError: there is no such model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        if isinstance(model, nn.Module):
            return cls(model, tokenizer)
        source = str(model)
        lookup = lookup_arguments(kwargs)
        # The family is checked on the config alone, before gigabytes of weights are read.
        family_of(kwargs.get("config") or AutoConfig.from_pretrained(source, **lookup))
        if "gguf_file" not in kwargs:
            # What is half precision on disk stays it.
            kwargs.setdefault("dtype", "auto")
        loaded = AutoModelForCausalLM.from_pretrained(source, **kwargs)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        elif tokenizer is None and has_tokenizer(source, lookup):
            tokenizer = AutoTokenizer.from_pretrained(source, **lookup)
        elif tokenizer is None:
            logger.warning("%s has no tokenizer: only token blocks or self-calibration can be used.", source)
        return cls(loaded, tokenizer, source, **lookup)

    @property
    def layers(self) -> nn.ModuleList:
        """The model's decoder layers."""
        return self._spec.get_layers(self.model)

    def plan(self, config: CompConfig) -> Allocation:
        """What `prune` would remove, without doing any work.

        Raises:
            ValueError: the requested sparsity can't be reached, or a protected layer doesn't exist.
        """
        layers, spec = self.layers, self._spec
        layer = layers[0]
        shape = Shape(
            num_layers=len(layers),
            layer_parameters=sum(p.numel() for p in layer.parameters()),
            width=spec.get_consumer(layer).weight.shape[1],
            neuron_parameters=spec.neuron_parameters(layer),
        )
        removable = len(layers) - len(_protected(config, len(layers)))
        return allocate(shape, config.sparsity, config.layer_fraction, config.round_to, removable)

    @torch.no_grad()
    def prune(
        self,
        config: CompConfig | None = None,
        calibration: CalibrationSource = "self",
        *,
        text_column: str | None = None,
        batch_size: int = 8,
    ) -> CompReport:
        """Prune the model in place.

        Args:
            config: how; the defaults of `CompConfig` if `None`.
            calibration: a text, JSONL, CSV or Parquet file, a dataset's name on the hub (`name`, `name:config` or
                `name:config:split`), a `datasets.Dataset`, a list of texts, a tensor of token blocks
                `[samples, length]`, or `"self"` for text that the model writes itself.
            text_column: the column of a dataset that holds text, if it isn't `text`.
            batch_size: samples that go through a layer at a time.

        Returns:
            What was done; also kept as `report`.

        Raises:
            ValueError: bad configuration or calibration text, or a weight that is NaN or infinite.
            FloatingPointError: activations that are NaN or infinite; names the layer.
        """
        config = CompConfig() if config is None else CompConfig(**{name: getattr(config, name) for name in FIELDS})
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is not valid: it must be an integer >= 1.")
        if self.report is not None or self._interrupted:
            raise RuntimeError("this model has been pruned already; load it again with CompPruner.from_pretrained.")
        allocation = self.plan(config)
        _require_finite(self.model)
        samples = prepare_calibration(
            calibration,
            model=self.model,
            tokenizer=self.tokenizer,
            num_samples=config.num_samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            text_column=text_column,
        )
        started = time.perf_counter()
        self._interrupted = True
        self.report = self._run(config, allocation, samples, batch_size, started)
        self.config = config
        self._interrupted = False
        return self.report

    def _run(
        self, config: CompConfig, allocation: Allocation, samples: Calibration, batch_size: int, started: float
    ) -> CompReport:
        model, spec, layers = self.model, self._spec, self.layers
        parameters = sum(p.numel() for p in model.parameters())
        device = spec.get_consumer(layers[0]).weight.device
        batches = [batch.to(device) for batch in samples.tokens.split(batch_size)]
        runner = LayerRunner(model, layers, batches[0][:1])
        self._announce(config, allocation, samples, runner.seconds_per_sample)

        removed, layer_scores = self._coarse(config, allocation.layers, batches)
        kept_layers = [index for index in range(len(layers)) if index not in removed]
        # Two streams of hidden states: the pruned model's own, and the dense model's, which the repair leans on.
        hidden = [runner.embed(batch) for batch in batches]
        additive = self._adds_to_residual(runner, kept_layers[0], hidden[0][:1])
        aligned = additive and config.alignment > 0 and config.recovery != "none"
        dense = [runner.run_all(range(kept_layers[0]), batch) for batch in hidden] if aligned else None
        generator = torch.Generator().manual_seed(config.seed)

        reports: list[LayerReport] = []
        progress = tqdm(kept_layers, desc="Pruning", unit="layer", disable=progress_disabled())
        for index, following in zip(progress, [*kept_layers[1:], len(layers)], strict=True):
            layer, gap = layers[index], range(index + 1, following)
            consumer = spec.get_consumer(layer)
            bridged = bool(gap) and config.bridge and additive
            with _names_layer(f"{spec.layers}.{index}.{spec.consumer}"):
                seen = self._observe(runner, index, hidden)
                weight, cross = self._aim(config, runner, index, gap if bridged else range(0), seen, dense)
                kept, scores = select_channels(
                    config.resolved_neuron_metric,
                    weight,
                    seen.gram,
                    allocation.width,
                    ridge=config.ridge,
                    block_size=config.elimination_block,
                    generator=generator,
                    cross=cross,
                )
                repaired = RECOVERIES[config.recovery](weight, seen.gram, kept, config.ridge, cross)
                for_itself = RECOVERIES[config.recovery](weight, seen.gram, kept, config.ridge, None)
            if dense is not None and not bridged:
                dense = [runner.run_all(gap, batch) for batch in dense]
            reports.append(
                LayerReport(
                    index=index,
                    kept=kept.tolist(),
                    scores=scores.tolist(),
                    relative_error=relative_error(weight, for_itself, seen.gram, kept),
                    bridged=bridged,
                )
            )
            apply_to_layer(spec, layer, kept, repaired)
            if additive:
                # Kept columns of the activations that are there already: no second pass through the layer.
                for number, residual in enumerate(seen.residual):
                    hidden[number] = residual + consumer(seen.inputs[number][..., kept]).view_as(residual)
            else:
                hidden = [runner.run(index, batch) for batch in hidden]
            progress.set_postfix(error=f"{reports[-1].relative_error:.1%}")

        _drop_layers(layers, removed)
        renumber(spec, layers)
        apply_to_config(spec, model.config, kept_layers, allocation.width)
        return CompReport(
            # A local path says nothing to others and may say too much.
            source=Path(self._source).name if self._source and Path(self._source).is_dir() else self._source,
            model_type=spec.model_type,
            requested_sparsity=config.sparsity,
            achieved_sparsity=allocation.sparsity,
            parameters_before=parameters,
            parameters_after=sum(p.numel() for p in model.parameters()),
            removed_layers=removed,
            layer_scores=layer_scores,
            width=allocation.width,
            layers=reports,
            calibration=samples.describe(),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            versions=library_versions(),
        )

    def _observe(self, runner: LayerRunner, index: int, hidden: Sequence[Tensor]) -> Observation:
        """Run one decoder layer with its consumer tapped."""
        layer = self.layers[index]
        consumer = self._spec.get_consumer(layer)
        tap = Tap(consumer.weight.shape[0])
        gram = GramAccumulator(consumer.weight.shape[1], device=consumer.weight.device)
        residuals, inputs = [], []
        with replaced(layer, self._spec.consumer, tap):
            for batch in hidden:
                residuals.append(runner.run(index, batch))
                if tap.inputs is None:
                    raise RuntimeError(f"layer {index} never called its {self._spec.consumer}.")
                inputs.append(tap.inputs)
                gram.update(tap.inputs)
        return Observation(residuals, inputs, gram.value())

    def _adds_to_residual(self, runner: LayerRunner, index: int, hidden: Tensor) -> bool:
        """Whether the layer's output is the tapped layer's output plus the consumer's (no norm in between).

        Measured, not declared: OPT-350m differs from its siblings in this by one config field.
        """
        dense = runner.run(index, hidden).float()
        seen = self._observe(runner, index, [hidden])
        rebuilt = seen.residual[0] + self._spec.get_consumer(self.layers[index])(seen.inputs[0]).view_as(hidden)
        tolerance = 16 * torch.finfo(hidden.dtype).eps
        return float((rebuilt.float() - dense).abs().max()) <= tolerance * float(dense.abs().max().clamp_min(1.0))

    def _aim(
        self,
        config: CompConfig,
        runner: LayerRunner,
        index: int,
        gap: range,
        seen: Observation,
        dense: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the repaired consumer is to produce.

        Args:
            config: how to prune.
            runner: runs decoder layers.
            index: the layer that is pruned now.
            gap: removed layers behind it that it is to stand in for.
            seen: what it did.
            dense: the dense model's hidden states that enter the layer, a tensor a batch; replaced by those that
                leave it (and the gap). `None` if the repair doesn't lean on them.

        Returns:
            The consumer's weight, with the gap's effect fitted into it, `[d_out, d_in]`, float64; and the cross
            moment, `[d_out, d_in]`, of the share of the deviation from the dense model that is to be taken back
            with the consumer's inputs, or `None`.
        """
        consumer = self._spec.get_consumer(self.layers[index])
        weight = consumer.weight.detach().double()
        if not gap and dense is None:
            return weight, None
        over_gap, deviation = torch.zeros_like(weight), torch.zeros_like(weight)
        for number, (residual, inputs) in enumerate(zip(seen.residual, seen.inputs, strict=True)):
            own = residual + consumer(inputs).view_as(residual)
            wanted = runner.run_all(gap, own)
            if gap:
                over_gap += cross_moment(wanted - own, inputs)
            if dense is not None:
                dense[number] = runner.run_all(gap, runner.run(index, dense[number]))
                deviation += cross_moment(dense[number] - wanted, inputs)
        if gap:
            weight = refit(weight, seen.gram, over_gap, config.ridge)
        return weight, None if dense is None else config.alignment * deviation

    def _coarse(self, config: CompConfig, count: int, batches: list[Tensor]) -> tuple[list[int], list[float]]:
        """Which layers go, and every layer's score (empty if none goes)."""
        if count == 0:
            return [], []
        scores = LAYER_SCORES[config.layer_metric](self.model, self.layers, batches)
        return least_important(scores, count, _protected(config, len(self.layers))), scores

    def _announce(
        self, config: CompConfig, allocation: Allocation, samples: Calibration, seconds_per_sample: float
    ) -> None:
        consumer = self._spec.get_consumer(self.layers[0])
        hidden, width = consumer.weight.shape
        # Hidden states (own, dense, residual), the FFN's activations, and about six float64 matrices while solving.
        values = samples.tokens.numel() * (3 * hidden + width) * consumer.weight.element_size() + 6 * 8 * width * width
        started = time.perf_counter()
        torch.linalg.cholesky(torch.eye(width, dtype=torch.float64, device=consumer.weight.device))
        # Choosing and repairing one layer takes about as long as twelve factorisations.
        solving = 12 * (time.perf_counter() - started) * len(self.layers)
        forward = seconds_per_sample * samples.tokens.shape[0]
        logger.info(
            f"COMP: {len(self.layers)} layers of {width} neurons -> {len(self.layers) - allocation.layers} of "
            f"{allocation.width} (sparsity {allocation.sparsity:.4f}, {config.sparsity:g} asked). "
            f"{samples.tokens.numel():,} calibration tokens take about {format_bytes(values)} of memory besides the "
            f"model and {1.5 * forward + 0.5 * solving:.0f} to {3 * forward + 2 * solving:.0f} s."
        )

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
            save_directory: an output folder that doesn't exist yet (or is empty).
            overwrite: replace an earlier checkpoint in that folder.
            push_to_hub: upload it afterwards.
            repo_id: where to; defaults to the folder's name in your namespace.
            kwargs: `max_shard_size` for saving; `token`, `private`, `commit_message`, `revision` for the upload.

        Raises:
            FileExistsError: the folder exists and `overwrite` isn't set.
            RuntimeError: nothing has been pruned, or pruning was interrupted.
        """
        from optimum_comp.checkpoint import save_checkpoint, upload

        report, config = self._finished()
        folder = save_checkpoint(
            Path(save_directory),
            model=self.model,
            tokenizer=self.tokenizer,
            config=config,
            report=report,
            source=self._source,
            source_arguments=self._source_arguments,
            overwrite=overwrite,
            max_shard_size=kwargs.pop("max_shard_size", "5GB"),
        )
        if push_to_hub:
            upload(folder, repo_id or folder.name, **kwargs)
        elif kwargs:
            raise TypeError(f"save_pretrained got arguments it doesn't know: {', '.join(sorted(kwargs))}.")
        return folder

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pruned checkpoint to the hub; returns its URL.

        Args:
            repo_id: `namespace/name`, or a name in your namespace.
            kwargs: `token`, `private`, `commit_message`, `revision`, `max_shard_size`.
        """
        import tempfile

        from optimum_comp.checkpoint import upload

        self._finished()
        with tempfile.TemporaryDirectory() as folder:
            shard = {"max_shard_size": kwargs.pop("max_shard_size")} if "max_shard_size" in kwargs else {}
            return upload(self.save_pretrained(Path(folder) / repo_id.split("/")[-1], **shard), repo_id, **kwargs)

    def _finished(self) -> tuple[CompReport, CompConfig]:
        if self.report is None or self.config is None:
            state = "was interrupted; load the model again" if self._interrupted else "has not been called"
            raise RuntimeError(f"there is no pruned model to save: prune() {state}.")
        return self.report, self.config


def _protected(config: CompConfig, num_layers: int) -> set[int]:
    for index in config.protected_layers:
        if not -num_layers <= index < num_layers:
            raise ValueError(
                f"protected_layers={config.protected_layers!r} is not valid: the model has {num_layers} layers, so "
                f"each number must be in [{-num_layers}, {num_layers - 1}]."
            )
    return {index % num_layers for index in config.protected_layers}


def _require_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite weights; the checkpoint is damaged, nothing was pruned.")


@contextlib.contextmanager
def _names_layer(name: str) -> Iterator[None]:
    """Say in which dense layer the mathematics failed."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{name}: {error} The model's own activations overflow on this text; check the checkpoint and its dtype "
            "(float16 overflows where float32 and bfloat16 don't)."
        ) from error
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name}: its moments can't be inverted; raise the ridge. ({error})") from error


def _drop_layers(layers: nn.ModuleList, removed: list[int]) -> None:
    for index in sorted(removed, reverse=True):
        del layers[index]
