"""Quantization for ONNX Runtime: which weights become what, worked out from the graph."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from optimum_comp.core.rounding import Blocks
from optimum_comp.families import Family, family_of
from optimum_comp.files import atomic_folder
from optimum_comp.onnx.blocks import Assignment, round_weights, rounded_already, store_in_blocks
from optimum_comp.onnx.cache import cache_shapes, open_cache
from optimum_comp.onnx.calibration import second_moments
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions, graph_bytes
from optimum_comp.onnx.fused import BUILT
from optimum_comp.onnx.graph import (
    dense_nodes,
    is_fused,
    load_float_graph,
    matrices,
    needs_external_data,
    products_of_activations,
)
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.packing import pack_products
from optimum_comp.onnx.parity import Drift, Found, require_close, require_same, run_graph
from optimum_comp.onnx.recipes import Recipe, Target, find_recipe, find_target
from optimum_comp.onnx.runtime import is_transformers_5, multiplies_8_bits, require_onnxruntime
from optimum_comp.onnx.scales import store_scales_in_half
from optimum_comp.utils import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantization made.

    Attributes:
        output: the quantized folder.
        recipe: name of the recipe.
        target: name of the processor it is for.
        size_bytes: of the graph and its weights.
        size_bytes_before: the same of the float model.
        seconds: it took.
        nodes: operator -> how many the quantized graph has, for those that hold or multiply weights or are left in
            float.
    """

    output: Path
    recipe: str
    target: str
    size_bytes: int
    size_bytes_before: int
    seconds: float
    nodes: dict[str, int]


def quantize_onnx(
    onnx_dir: str | Path,
    output: str | Path,
    *,
    recipe: str = "int8",
    target: str = "any",
    tokens: Tensor | None = None,
    plan: Plan | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    check: bool = True,
) -> QuantizationReport:
    """Quantize an exported model.

    Products of two activations (attention scores, attention output, rotary angles) stay in float whatever the recipe:
    quantized with one scale a tensor they ruin the model.

    Args:
        onnx_dir: a float32 folder with `model.onnx`, tied or untied.
        output: the folder to make; it opens with `ORTModelForCausalLM.from_pretrained`.
        recipe: a key of `RECIPES`.
        target: a key of `TARGETS`.
        tokens: calibration samples `[samples, length]`, for recipes that round with text.
        plan: which weights are stored how, in place of the recipe's own choice.
        overwrite: replace a model that is in `output`.
        record: what the output is to be known by; see `atomic_folder`.
        check: run the graphs, to refuse one that computes something else (see `onnx.parity`).

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: the `onnxruntime` extra isn't installed.
        RuntimeError: the float graph doesn't run, the rewritten one computes something else, or the quantized one
            contradicts itself or has little to do with the float one.
        ValueError: no such recipe or target, no calibration samples where there have to be some, no float ONNX model
            in `onnx_dir`, or `output` is in it.
    """
    started = time.perf_counter()
    source, settings, processor = Path(onnx_dir), find_recipe(recipe), find_target(target)
    check_onnx_folder(source)
    if settings.rounding == "compensated" and tokens is None and plan is None:
        raise ValueError(f"recipe={recipe!r} rounds with calibration text; give some.")
    require_onnxruntime()
    import onnx

    with atomic_folder(output, overwrite=overwrite, sources=[source], record=record) as folder, without_noise():
        model, exact = _load(source, folder) if check else (load_float_graph(source / MODEL_NAME), None)
        plan = plan or plan_of(model, settings, _family(source, settings), tokens)
        store_in_blocks(model, plan.assignment, rounded=plan.rounded, use_hqq=settings.rounding == "hqq")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            prepared = Path(scratch) / MODEL_NAME
            # ORTQuantizer warns if there is none beside the graph.
            shutil.copyfile(source / "config.json", prepared.with_name("config.json"))
            excluded = [*products_of_activations(model.graph), *plan.left_in_float]
            large = needs_external_data(model.graph)
            if large:
                # Packed, and then stored as small, is only what isn't.
                store_scales_in_half(model.graph)
            onnx.save(model, prepared, save_as_external_data=large)
            del model
            _write_quantized(prepared, folder, settings, processor, excluded, large)
            if exact is not None:
                checked = folder
                if not (processor.reduce_range or "MatMul" not in settings.operators or multiplies_8_bits()):
                    logger.warning(
                        "this processor adds products of 8 bits in 16, which are too few for what target=%r has: %s "
                        "will be right on %s, and what is measured with it here means nothing. In its place the same "
                        "graph with weights of 7 bits is checked here.",
                        target,
                        output,
                        processor.description,
                    )
                    checked = Path(scratch) / "checked"
                    checked.mkdir()
                    within = dataclasses.replace(processor, reduce_range=True)
                    _write_quantized(prepared, checked, settings, within, excluded, large)
                require_close(exact, run_graph(checked), _allowed(settings, plan))
        _record_recipe(folder / "ort_config.json", recipe, target, settings, plan)
        copy_companions(source, folder)
        size, nodes = graph_bytes(folder), _count(folder / MODEL_NAME)
    seconds = time.perf_counter() - started
    return QuantizationReport(Path(output), recipe, target, size, graph_bytes(source), seconds, nodes)


def _load(source: Path, folder: Path) -> tuple[Any, Found]:
    """An exported model with less to do for each token (see `load_float_graph`), and what it computes.

    Args:
        source: its folder.
        folder: for a while, what was rewritten is written here.

    Raises:
        RuntimeError: it doesn't run, or what was rewritten computes something else.
        ValueError: it is quantized already.
    """
    import onnx

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rewritten = Path(scratch) / MODEL_NAME
        shutil.copyfile(source / "config.json", rewritten.with_name("config.json"))
        model = load_float_graph(source / MODEL_NAME)
        # Optimum's own export may insist on it.
        shape = next(iter(cache_shapes(model.graph).values()), None)
        onnx.save(model, rewritten, save_as_external_data=needs_external_data(model.graph))
        # Read again below, so that it isn't in memory beside what runs it.
        del model
        exact = run_graph(source, cache_shape=shape)
        names = ("the rewritten graph", "the exported one")
        require_same(exact, run_graph(rewritten.parent, cache_shape=shape), names=names)
        return onnx.load(rewritten), exact


# The largest errors that were measured on random tokens, with the tiny models of the tests and with SmolLM2-135M:
#                  itself           exact
#   8-bit blocks   0.0064, 0.055    0.05, 0.095
#   4-bit blocks   0.0071, 0.051    0.32, 0.46
#   int8-dynamic   0.056,  0.213    0.08, 0.27
# With blocks, each position is rounded by itself, and what is left is float rounding that tips an activation over to
# the next code. `int8-dynamic` has one scale for all activations, so what else is read with a token matters.
# SmolLM2-135M with scales that are off by one block: 2.6 and more; with the halves of 4-bit pairs swapped: 1.8.
_EIGHT_BITS, _FOUR_BITS, _DYNAMIC = Drift(0.2, 0.35), Drift(0.2, 0.8), Drift(0.5, 0.8)


def _allowed(recipe: Recipe, plan: Plan) -> Drift:
    """How far a quantized graph may be off."""
    if "MatMul" in recipe.operators:
        return _DYNAMIC
    return _FOUR_BITS if any(form.bits < 8 for form in plan.assignment.values()) else _EIGHT_BITS


@dataclass(frozen=True)
class Plan:
    """Which weights are stored in blocks, and as what.

    Attributes:
        assignment: dense node -> format.
        rounded: dense node -> codes and scales, for those that are rounded already.
        left_in_float: dense nodes that `ORTQuantizer` leaves alone, too.
    """

    assignment: Assignment
    rounded: Mapping[str, Blocks] = field(default_factory=dict)
    left_in_float: Sequence[str] = ()


def plan_of(model: Any, recipe: Recipe, family: Family | None, tokens: Tensor | None) -> Plan:
    """A recipe's own choice for a model.

    Args:
        model: a float ONNX model.
        recipe: the recipe.
        family: whose names the model's nodes bear; recipes that treat all layers alike need none.
        tokens: calibration samples `[samples, length]`.
    """
    attention = family.attention if family is not None and recipe.attention is not None else ()
    if attention and is_fused(model.graph):
        # GenAI's builder takes apart what a family has in one (Phi-3).
        attention = BUILT
    consumer = family.ffn.consumer.path if family is not None and recipe.consumers_only else None
    assignment = {}
    for node in dense_nodes(model.graph):
        form = recipe.layers
        if node.is_head:
            form = recipe.head
        elif any(_names(node.name, path) for path in attention):
            form = recipe.attention
        if form is not None and (consumer is None or _names(node.name, consumer)):
            assignment[node.name] = form
    rounded = rounded_already(model.graph, assignment)
    if recipe.rounding != "compensated" or tokens is None:
        return Plan(assignment, rounded)
    # 8 bits lose next to nothing however they are rounded.
    few = {name for name, form in assignment.items() if form.bits < 8} - rounded.keys()
    nodes = [node for node in dense_nodes(model.graph) if node.name in few]
    if not nodes:
        return Plan(assignment, rounded)
    for moments in second_moments(model, nodes, tokens):
        chosen = {node.name: assignment[node.name] for node in nodes if node.inputs in moments}
        rounded |= round_weights(model.graph, chosen, moments)
    return Plan(assignment, rounded)


def _names(node: str, path: str) -> bool:
    """Whether the exporter made a node of the module at `path` in a decoder layer."""
    return f"/{path.replace('.', '/')}/" in node


def check_onnx_folder(folder: Path) -> None:
    """Refuse what isn't an exported model.

    Raises:
        ValueError: a file is missing; names it.
    """
    for name in (MODEL_NAME, "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an ONNX folder: it has no {name}.")


def _write_quantized(
    prepared: Path, folder: Path, recipe: Recipe, target: Target, excluded: list[str], large: bool
) -> None:
    """A graph that runs, of one whose blocks are stored already."""
    _run_ort_quantizer(prepared, folder, recipe, target, excluded, large)
    _check_and_tidy(folder / MODEL_NAME, large)
    open_cache(folder)
    shutil.copyfile(prepared.with_name("config.json"), folder / "config.json")


def _run_ort_quantizer(
    prepared: Path, folder: Path, recipe: Recipe, target: Target, excluded: list[str], large: bool
) -> None:
    if is_transformers_5():
        _run_onnx_quantizer(prepared, folder, recipe, target, excluded, large)
        return
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    # arm64 is the format for phones: signed symmetric weights, a scale for each output channel. reduce_range keeps
    # them within 7 bits: x86 cores without VNNI add pairs of 8-bit products in 16 bits, which overflows (perplexity
    # 49 becomes ten million).
    config = dataclasses.replace(
        AutoQuantizationConfig.arm64(
            is_static=False,
            per_channel=True,
            operators_to_quantize=list(recipe.operators),
            nodes_to_exclude=excluded,
        ),
        reduce_range=target.reduce_range,
    )
    ORTQuantizer(prepared).quantize(
        quantization_config=config, save_dir=folder, file_suffix=None, use_external_data_format=large
    )


def _run_onnx_quantizer(
    prepared: Path, folder: Path, recipe: Recipe, target: Target, excluded: list[str], large: bool
) -> None:
    """What `ORTQuantizer` has ONNX Runtime do, where it can't be installed."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    settings: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": target.reduce_range,
        "nodes_to_quantize": [],
        "nodes_to_exclude": excluded,
        "op_types_to_quantize": list(recipe.operators),
        "extra_options": {
            "WeightSymmetric": True,
            "ActivationSymmetric": False,
            "EnableSubgraph": False,
            "ForceSymmetric": False,
        },
    }
    quantizer = ONNXQuantizer(
        onnx.load(prepared),
        static=False,
        mode=QuantizationMode.IntegerOps,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        **settings,
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(folder / MODEL_NAME), large)
    noted = json.dumps({"quantization": settings, "use_external_data_format": large})
    (folder / "ort_config.json").write_text(noted, encoding="utf-8")


def _family(folder: Path, recipe: Recipe) -> Family | None:
    """The model's family, where the recipe treats some of its layers in their own way."""
    from transformers import AutoConfig

    by_name = recipe.attention is not None or recipe.consumers_only
    return family_of(AutoConfig.from_pretrained(folder)) if by_name else None


def _check_and_tidy(path: Path, large: bool) -> None:
    """Make sure that no int8 weight is −128, pack products, and drop what was noted down of every activation's shape.

    Arm cores without dot product (Cortex-A53, A72) add pairs of products in 16 bits, and two neighbours of −128
    overflow there. The shapes are worked out anew by whoever loads the graph.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims and numpy_helper.to_array(tensor).min() < -127:
            raise RuntimeError(f"{tensor.name} of the quantized model holds −128, which overflows on some Arm cores.")
    # With matrices as large as that, what it takes to start a product is nothing.
    if not large:
        pack_products(model.graph)
        store_scales_in_half(model.graph)
        del model.graph.value_info[:]
        onnx.save(model, path)


def _count(path: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    tables = {t.name for t in graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    constant = matrices(graph)
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized", "MatMulInteger"):
            counts[node.op_type] += 1
        elif node.op_type == "Gather" and node.input[0] in tables:
            counts["Gather (8-bit)"] += 1
        elif node.op_type == "Gather" and node.input[0] in constant:
            counts["Gather (float)"] += 1
        elif node.op_type == "MatMul":
            counts["MatMul (float)"] += 1
    return dict(counts)


def _record_recipe(path: Path, name: str, target: str, recipe: Recipe, plan: Plan) -> None:
    """Add the recipe to Optimum's record, which knows of its own part of the work only."""
    config = json.loads(path.read_text(encoding="utf-8"))
    blocks = {node: dataclasses.asdict(form) for node, form in plan.assignment.items()}
    stored = {"nodes": blocks, "left_in_float": list(plan.left_in_float)}
    config["comp_recipe"] = {"name": name, "target": target, **dataclasses.asdict(recipe), **stored}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
