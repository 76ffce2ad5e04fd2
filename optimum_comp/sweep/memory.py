"""What a pruning run will need: memory, disk and time, before it starts, and how to stay within a limit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from optimum_comp.beginning import LONGEST
from optimum_comp.calibration.self_written import longest_written, sample_bytes, side_by_side
from optimum_comp.checkpoint.source import ModelSource, StreamedModel
from optimum_comp.configuration import CompConfig
from optimum_comp.core.allocation import Allocation
from optimum_comp.families import FFN
from optimum_comp.machine import free_memory
from optimum_comp.sweep.fisher import FISHER_SAMPLES, STATE_DTYPE
from optimum_comp.sweep.ranks import Ranks
from optimum_comp.sweep.runner import positions_of_gradients
from optimum_comp.sweep.scoring import LOSS_SAMPLES
from optimum_comp.utils import format_bytes, parameter_count


_WIDEST_FLOAT64 = 4096
_TOKENS_AT_A_TIME = {"cpu": 1024, "cuda": 8192}
"""With fewer tokens in a batch, matrix products get slow; with more, they get no faster."""
_SLACK = 64 * 2**20
"""Allocator, thread stacks, and what libraries load only when they are first used."""


@dataclass(frozen=True)
class Workload:
    """The sizes that memory, disk and time follow from.

    Attributes:
        samples: calibration samples of this process.
        length: tokens of each.
        hidden: values of a token between layers.
        width: neurons of one layer's FFN.
        heads: values of a token that attention gives to its output projection; 0 if nothing of attention goes.
        layers: decoder layers of the dense model.
        layer_parameters: parameters of one.
        outside_parameters: parameters of the embeddings and what else isn't in a layer, without the head.
        compute: bytes of a value while a layer runs.
        state: bytes of a value between layers, and on disk.
        whole_model: bytes of weights that are in memory all the time; 0 where layers are streamed.
        product: bytes of a factor of matrix products.
        is_aligned: a second stream of hidden states goes along.
        has_mask_form: the solves need the mask form's matrices.
        has_norm: a norm is behind the consumer.
        head_parameters: of a language-model head that isn't the embedding.
        vocabulary: tokens that the model knows.
        gradients: samples whose gradients are looked at; 0 if none.
        weighs: what neurons cost is found for each layer first.
        weighs_layers: and what whole layers do.
        bridges: layers may go whose work the one before them is to do.
        variants: streams of hidden states of the loss metric, all in memory.
        variant_samples: samples of each.
    """

    samples: int
    length: int
    hidden: int
    width: int
    layers: int
    layer_parameters: int
    outside_parameters: int
    compute: int
    state: int
    whole_model: int
    product: int
    is_aligned: bool
    has_mask_form: bool
    heads: int = 0
    has_norm: bool = False
    head_parameters: int = 0
    vocabulary: int = 0
    gradients: int = 0
    weighs: bool = False
    weighs_layers: bool = False
    bridges: bool = False
    variants: int = 0
    variant_samples: int = 0

    @property
    def solve(self) -> int:
        """Bytes of a value in the solves."""
        return solve_dtype(self.width).itemsize

    @property
    def states_bytes(self) -> int:
        """All streams of hidden states: what the model without some layers lacks is one more."""
        return (1 + self.is_aligned + self.bridges) * self.samples * self.length * self.hidden * self.state

    @property
    def lies_here(self) -> bool:
        """Whether the model is in memory as it is computed with."""
        return bool(self.whole_model) and self.compute == self.state

    @property
    def fisher_bytes(self) -> int:
        """Second moments of the gradients behind all layers."""
        return self.layers * self.hidden**2 * 4 if self.gradients else 0

    @property
    def trace_bytes(self) -> int:
        """Hidden states between all layers of the samples whose gradients are looked at."""
        return self.gradients * self.length * (self.layers + 1) * self.hidden * STATE_DTYPE.itemsize

    @property
    def inputs_bytes(self) -> int:
        """Inputs of one layer's consumer."""
        return self.samples * self.length * self.width * min(self.product, self.state)


@dataclass(frozen=True)
class MemoryPlan:
    """How the work is cut.

    Attributes:
        batch_size: samples that go through a layer at a time.
        spill_inputs: the consumer's inputs are kept in a file.
        spill_states: the hidden states are kept in files.
        peak_bytes: expected peak of this process's memory, all included.
        written_together: samples of calibration text that the model writes side by side; 0 if it writes none.
    """

    batch_size: int
    spill_inputs: bool
    spill_states: bool
    peak_bytes: int
    written_together: int = 0


@dataclass(frozen=True)
class Writing:
    """What it takes to have the model write calibration text.

    Attributes:
        model: bytes of the whole model; 0 where it is in memory already.
        reading: bytes of the logits of what is read to decide how blocks begin.
        sample: bytes of each sample that is being written.
        samples: that are best written side by side.
    """

    model: int
    reading: int
    sample: int
    samples: int

    def peak(self, together: int) -> int:
        """Bytes beyond what the process takes already, with so many samples side by side."""
        return _SLACK + self.model + max(self.reading, together * self.sample)


def writing_of(source: ModelSource, tokenizer: Any, config: CompConfig) -> Writing:
    """The sizes of what a model's own calibration text takes.

    Args:
        source: the dense model.
        tokenizer: its tokenizer, or `None`.
        config: how many samples, and how long.
    """
    model, compute, length = source.model, source.compute_dtype.itemsize, config.sequence_length
    written = longest_written(tokenizer, length)
    whole = 0
    if isinstance(source, StreamedModel):
        # Files of another dtype are mapped into memory while they are widened.
        stored = sum(source.checkpoint.tensors[name].num_bytes for name in source.names.values())
        whole = parameter_count(model) * compute
        whole += stored if stored != whole else 0
    if source.device.type != "cpu":
        return Writing(whole, 0, 0, side_by_side(model.config, compute, written))
    return Writing(
        whole,
        # In the model's dtype, in float32, and their logarithms.
        min(length, LONGEST) * model.config.vocab_size * (compute + 8),
        sample_bytes(model.config, compute, written),
        min(config.num_samples, side_by_side(model.config, compute, written)),
    )


def workload_of(
    source: ModelSource,
    config: CompConfig,
    allocations: Sequence[Allocation],
    ranks: Ranks,
    products: torch.dtype | None = None,
) -> Workload:
    """The sizes of a model and of what is to be done with it.

    Args:
        source: the dense model.
        config: how to prune it.
        allocations: what goes, or may go.
        ranks: the processes that share the samples.
        products: dtype of factors of matrix products; what the source computes in, if `None`.
    """
    layer = source.layers[0]
    hidden, width = source.family.ffn.consumer.matrix(layer).shape
    units = {name for allocation in allocations for name in allocation.units}
    attention = [axis for axis in source.family.axes if axis.name != FFN and axis.name in units]
    heads = attention[0].consumer.matrix(layer).shape[1] if attention else 0
    embedding, head = source.model.get_input_embeddings().weight, source.model.get_output_embeddings()
    own_head = head.weight.numel() if head is not None and head.weight is not embedding else 0
    outside = parameter_count(source.model) - parameter_count(source.layers) - own_head
    by_loss = config.layer_metric == "loss" and allocations[0].layers > 0
    return Workload(
        samples=ranks.share(config.num_samples),
        length=config.sequence_length,
        hidden=hidden,
        width=width,
        heads=heads,
        has_norm=bool(source.family.ffn.norm),
        layers=len(source.layers),
        layer_parameters=parameter_count(layer),
        outside_parameters=outside,
        compute=source.compute_dtype.itemsize,
        state=source.state_dtype.itemsize,
        whole_model=parameter_count(source.model) * source.state_dtype.itemsize if source.is_resident else 0,
        product=(products or source.compute_dtype).itemsize,
        is_aligned=config.alignment > 0 and config.recovery != "none",
        has_mask_form=config.resolved_neuron_metric == "condition_mask" or config.recovery == "mask",
        head_parameters=own_head,
        vocabulary=source.model.config.vocab_size,
        gradients=ranks.share(min(FISHER_SAMPLES, config.num_samples)) if config.needs_fisher else 0,
        weighs=config.allocation == "adaptive" or len(allocations) > 1,
        weighs_layers=len({allocation.layers for allocation in allocations}) > 1,
        bridges=config.bridge and config.recovery != "none" and any(each.layers for each in allocations),
        variants=len(source.layers) if by_loss else 0,
        variant_samples=min(LOSS_SAMPLES, config.num_samples) if by_loss else 0,
    )


def solve_dtype(width: int) -> torch.dtype:
    """Float64 where the matrices are small; float32, scaled to a unit diagonal, where they are what memory goes to."""
    return torch.float64 if width <= _WIDEST_FLOAT64 else torch.float32


def plan_memory(work: Workload, batch_size: int, limit: int | None, writing: Writing | None = None) -> MemoryPlan:
    """Cut the work so that it fits.

    Args:
        work: what is to be done.
        batch_size: the largest that is wanted.
        limit: bytes that this process may take in all; `None` for what the machine has free, and its container
            allows, now.
        writing: of calibration text, if the model is to write it first.

    Raises:
        ValueError: it can't fit; says the least that would do, and what it goes to.
    """
    base = psutil.Process().memory_info().rss
    room = limit if limit is not None else base + int(0.85 * free_memory())
    limited = "(max_memory)" if limit is not None else "of free memory"
    said = f"{format_bytes(room)} {limited} is too little: this model needs at least"
    there = f"{format_bytes(base)} are Python and its libraries"
    if work.whole_model:
        there += f" with the model ({format_bytes(work.whole_model)})"
    plans = [predict(work, MemoryPlan(size, *spilled, 0), base) for size, spilled in _cuts(work, batch_size)]
    least = min(plans, key=lambda plan: plan.peak_bytes)
    if least.peak_bytes > room:
        raise ValueError(
            f"{said} {format_bytes(least.peak_bytes)}. Of these, {there}, "
            f"{format_bytes(work.layer_parameters * work.compute)} one layer and "
            f"{format_bytes(work.width**2 * work.solve)} its Gram matrix ({work.width} × {work.width}); samples go "
            "through one at a time, and what is kept between layers is on disk."
        )
    plan = next(plan for plan in plans if plan.peak_bytes <= room)
    if writing is None:
        return plan
    together = writing.samples
    while together > 1 and base + writing.peak(together) > room:
        together //= 2
    peak = base + writing.peak(together)
    if peak > room:
        whole = f", {format_bytes(writing.model)} the whole model, which writing needs" if writing.model else ""
        raise ValueError(
            f"{said} {format_bytes(peak)} to write its own calibration text (self). Of these, {there}{whole}, and "
            f"{format_bytes(peak - base - writing.model)} what one sample takes. Give a text, with which a layer at a "
            "time is in memory: --calibration FILE."
        )
    return replace(plan, peak_bytes=max(plan.peak_bytes, peak), written_together=together)


def _cuts(work: Workload, batch_size: int) -> list[tuple[int, tuple[bool, bool]]]:
    """Batch sizes and what is spilled, the fastest first."""
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    good = [size for size in sizes if size == sizes[0] or size * work.length >= _TOKENS_AT_A_TIME["cpu"]]
    small = [size for size in sizes if size not in good]
    return [
        *((size, (False, False)) for size in good),
        (good[-1], (True, False)),
        *((size, (True, True)) for size in [good[-1], *small]),
    ]


def predict(work: Workload, plan: MemoryPlan, base: int) -> MemoryPlan:
    """The plan with its peak of memory filled in.

    Args:
        work: what is to be done.
        plan: how it is cut.
        base: bytes that the process takes already.
    """
    tokens = plan.batch_size * work.length
    gram = work.width**2 * work.solve
    weight = work.hidden * work.width * work.solve
    layer = 0 if work.lies_here else work.layer_parameters * work.compute
    embedding = 0 if work.lies_here else work.outside_parameters * work.compute
    # States in memory are there twice while a copy of them is on its way to the disk.
    kept = (0 if plan.spill_states else 2 * work.states_bytes) + (0 if plan.spill_inputs else work.inputs_bytes)
    # Inside a layer: some twelve vectors of the hidden size a token, and gate, activation, product and its copy.
    passing = tokens * work.compute * (12 * work.hidden + 4 * work.width)
    observing = layer + gram + weight * work.is_aligned + max(passing, gram // 4 if work.solve == 8 else 0)
    if work.has_norm and work.is_aligned:
        # Moments of two halves, their fits, and the matrix, regularised and factorised.
        observing = max(observing + weight, layer + 3 * gram + 5 * weight)
    # The moments stay, to tell what the repair is worth; what is eliminated in is a copy.
    matrices = 4 if work.has_mask_form else 2
    # The weight, its target, the cross moment, a scaled copy of it, and the repaired weight.
    solving = matrices * gram + 5 * weight
    if work.weighs_layers:
        # The Gram matrix of the layer before, which is factorised, this one's, and the bridge's moments.
        observing = max(observing, layer + 2 * gram + 3 * weight + passing, 3 * gram + 6 * weight)
    # Attention is decided while its layer is at hand; its moments are copied for each axis.
    attention = 0
    if work.heads:
        size = solve_dtype(work.heads).itemsize
        squares, weights = work.heads**2 * size, work.hidden * work.heads * size
        attention = layer + max(2 * squares + weights + passing, (matrices + 2) * squares + 5 * weights)
    writing = 0 if work.whole_model else work.layer_parameters * work.state
    variants = work.variants * work.variant_samples * work.length * work.hidden * work.compute
    # The first layer is there beside the embeddings while the model is asked how it calls its layers.
    starting = embedding + layer + passing
    feeling = 0
    in_files = not work.whole_model or plan.spill_inputs or plan.spill_states
    if work.gradients:
        # What a layer's products, norms and activations keep for the way back, and rounded copies of its weights.
        back = work.length * work.compute * (30 * work.hidden + 10 * work.width) + work.layer_parameters * 2
        head = 0 if work.lies_here else work.head_parameters * work.compute
        positions = min(work.length, positions_of_gradients(work.hidden, work.vocabulary))
        logits = 5 * 4 * positions * work.vocabulary
        passed = work.gradients * work.length * work.hidden * work.compute
        feeling = passed + max(layer + back + 2 * work.hidden**2 * 4, embedding + head + logits)
        if not in_files:
            kept += work.fisher_bytes
            feeling += max(0, work.trace_bytes + work.fisher_bytes - kept)
    peak = (
        base
        + _SLACK
        + kept
        + max(starting, feeling, observing, attention, solving, writing, layer + passing + variants)
    )
    return replace(plan, peak_bytes=peak)


def disk_bytes(work: Workload, plan: MemoryPlan, parameters_after: int, *, resumable: bool) -> int:
    """Space that the run takes on the disk at its worst, its result included."""
    spilled = plan.spill_inputs * work.inputs_bytes + plan.spill_states * work.states_bytes
    if work.whole_model and not spilled:
        return 0
    spilled += work.fisher_bytes
    if work.whole_model:
        return max(spilled, work.fisher_bytes + work.trace_bytes)
    # Layer by layer, and once more while the shards are put together.
    made = 2 * parameters_after * work.state + spilled + (2 * work.states_bytes if resumable else 0)
    # Gradients are looked at before anything is made.
    return max(made, work.fisher_bytes + work.trace_bytes)


def expected_seconds(work: Workload, seconds_per_layer: float) -> tuple[float, float]:
    """Wall time that the run will take, from and to.

    Args:
        work: what is to be done.
        seconds_per_layer: that one sample takes through one layer.
    """
    size = min(work.width, 2048)
    started = time.perf_counter()
    torch.linalg.cholesky(torch.eye(size, dtype=torch.float64))
    # Choosing and repairing a layer takes about as long as eight factorisations.
    solving = 8 * (time.perf_counter() - started) * (work.width / size) ** 3 * work.layers
    forward = seconds_per_layer * work.layers * work.samples
    least, most = 1.5 * forward + 0.5 * solving, 3 * forward + 2 * solving
    # Weighing widths takes the dense model through once more, and eliminates in each layer.
    return (1.5 * least, 1.5 * most) if work.weighs else (least, most)


def good_batch_size(length: int, device: torch.device) -> int:
    """Samples of so many tokens that are best taken through a layer at a time."""
    return max(1, _TOKENS_AT_A_TIME[device.type] // length)


def check_disk(folder: Path, needed: int) -> None:
    """Refuse work that the disk can't hold.

    Raises:
        OSError: too little space; says how much is missing.
    """
    folder = folder.resolve()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"the run needs {format_bytes(needed)} of disk space at {folder}, and {format_bytes(free)} are free."
        )
