"""Quantization recipes for ONNX Runtime: which weights become what, worked out from the graph."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.atomic import atomic_folder
from optimum_comp.families import family_of
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions, graph_bytes
from optimum_comp.onnx.noise import without_noise
from optimum_comp.onnx.runtime import require_onnxruntime


_PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights above which a model needs a second file: protobuf ends at 2 GiB."""

_QUANTIZED_OPERATORS = {"MatMulNBits", "GatherBlockQuantized", "MatMulInteger", "DequantizeLinear"}


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        description: what it is good for, in a line.
        operators: operator types that `ORTQuantizer` quantizes to int8 in what `block_bits` leaves.
        block_bits: bits of each weight matrix in ONNX Runtime's `MatMulNBits`; an embedding that is tied to the head
            shares the head's. `None`: no block-wise quantization.
        block_size: weights that share a scale; a power of two. Halved for a matrix that it doesn't divide.
        consumers_only: block-wise only the dense layers that read the FFN's neurons. Their inputs have outliers, and
            one scale for all activations of a prompt loses the rest; `MatMulNBits` has a scale for each block.
    """

    description: str
    operators: tuple[str, ...]
    block_bits: int | None = None
    block_size: int = 64
    consumers_only: bool = False


RECIPES: dict[str, Recipe] = {
    "int8": Recipe(
        "8-bit weights with a scale for each block; next to no loss, fast generation", ("Gather",), block_bits=8
    ),
    # Transpose: a tied head multiplies by the transposed embedding. Left out, its weight is quantized at every token.
    "int8-dynamic": Recipe(
        "8-bit weights and activations; fast prompts, some loss",
        ("MatMul", "Gather", "Transpose"),
        block_bits=8,
        consumers_only=True,
    ),
}


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantization made.

    Attributes:
        output: the quantized folder.
        recipe: name of the recipe.
        size_bytes: of the graph and its weights.
        size_bytes_before: the same of the float model.
        seconds: it took.
        nodes: operator -> how many the quantized graph has, for those that hold or multiply weights or are left in
            float.
    """

    output: Path
    recipe: str
    size_bytes: int
    size_bytes_before: int
    seconds: float
    nodes: dict[str, int]


def quantize_onnx(
    onnx_dir: str | Path, output: str | Path, *, recipe: str = "int8", overwrite: bool = False
) -> QuantizationReport:
    """Quantize an exported model.

    Products of two activations (attention scores, attention output, rotary angles) stay in float whatever the recipe:
    quantized with one scale a tensor they ruin the model.

    Args:
        onnx_dir: a float32 folder with `model.onnx`, tied or untied.
        output: the folder to make; it opens with `ORTModelForCausalLM.from_pretrained`.
        recipe: a key of `RECIPES`.
        overwrite: replace a model that is in `output`.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: the `onnxruntime` extra isn't installed.
        ValueError: no such recipe, no float ONNX model in `onnx_dir`, or `output` is in it.
    """
    started = time.perf_counter()
    source, settings = Path(onnx_dir), _recipe(recipe)
    for name in (MODEL_NAME, "config.json"):
        if not (source / name).is_file():
            raise ValueError(f"{source} is not an ONNX folder: it has no {name}.")
    require_onnxruntime()
    with atomic_folder(output, overwrite=overwrite, sources=[source]) as folder, without_noise():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            prepared = Path(scratch) / MODEL_NAME
            # ORTQuantizer warns if there is none beside the graph.
            shutil.copyfile(source / "config.json", prepared.with_name("config.json"))
            excluded = _prepare(source / MODEL_NAME, prepared, settings)
            _run_ort_quantizer(prepared, folder, settings, excluded)
        _record_recipe(folder / "ort_config.json", recipe, settings)
        shutil.copyfile(source / "config.json", folder / "config.json")
        copy_companions(source, folder)
        size, nodes = graph_bytes(folder), _count(folder / MODEL_NAME)
    seconds = time.perf_counter() - started
    return QuantizationReport(Path(output), recipe, size, graph_bytes(source), seconds, nodes)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is not valid: it must be one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def _prepare(source: Path, target: Path, recipe: Recipe) -> list[str]:
    """Write the graph that `ORTQuantizer` gets, and return the names of the nodes that it has to leave alone."""
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = onnx.load(source)
    if any(node.op_type in _QUANTIZED_OPERATORS for node in model.graph.node):
        raise ValueError(f"{source} is quantized already; give the float model.")
    # OPT flattens batch and length before its FFN, which exports as Gemm.
    ONNXModel(model).replace_gemm_with_matmul()
    if recipe.block_bits is not None:
        consumer = _consumer_in_names(source.with_name("config.json")) if recipe.consumers_only else None
        _quantize_blocks(model, recipe.block_bits, recipe.block_size, consumer)
    weights = set(_matrices(model.graph)) | {node.output[0] for node in _transposed_matrices(model.graph)}
    excluded = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in weights]
    onnx.save(model, target, save_as_external_data=_needs_external_data(model.graph))
    return excluded


def _run_ort_quantizer(prepared: Path, folder: Path, recipe: Recipe, excluded: list[str]) -> None:
    import onnx
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    # arm64 is the format for phones: signed symmetric weights, a scale for each output channel. reduce_range keeps
    # them within 7 bits: x86 cores without VNNI add pairs of 8-bit products in 16 bits, which overflows (perplexity
    # 49 becomes ten million), and so do Arm cores without dot product on pairs of -128.
    config = dataclasses.replace(
        AutoQuantizationConfig.arm64(
            is_static=False,
            per_channel=True,
            operators_to_quantize=list(recipe.operators),
            nodes_to_exclude=excluded,
        ),
        reduce_range=True,
    )
    large = _needs_external_data(onnx.load(prepared, load_external_data=False).graph)
    ORTQuantizer(prepared).quantize(
        quantization_config=config, save_dir=folder, file_suffix=None, use_external_data_format=large
    )


def _consumer_in_names(config: Path) -> str:
    """What the names of nodes hold that the exporter makes of the dense layer that reads the FFN's neurons."""
    from transformers import AutoConfig

    return f"/{family_of(AutoConfig.from_pretrained(config)).consumer.replace('.', '/')}/"


def _quantize_blocks(model: Any, bits: int, block_size: int, only: str | None = None) -> None:
    """Replace multiplications by a weight by `MatMulNBits`, in place: all, or those with `only` in their name."""
    tied = _untie(model.graph) if only is None else {}
    matrices = _matrices(model.graph)
    names_of_block = defaultdict(set)
    matmuls = [node for node in model.graph.node if node.op_type == "MatMul"]
    for node in matmuls:
        if node.input[1] in matrices and (only is None or only in node.name):
            names_of_block[_fitting(block_size, matrices[node.input[1]].dims[0])].add(node.name)
    every = {node.name for node in matmuls}
    for block, names in names_of_block.items():
        quantizer = _nbits_quantizer()(
            model,
            bits=bits,
            block_size=block,
            is_symmetric=True,
            # Multiply in int8; unset means float32, ten times slower.
            accuracy_level=4,
            nodes_to_exclude=sorted(every - names),
        )
        quantizer.process()
    for table, product in tied.items():
        _share_with_embedding(model.graph, table, product)


def _nbits_quantizer() -> Any:
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise ImportError(
            f"block-wise quantization needs onnx-ir: pip install 'optimum-comp[onnxruntime]'. {error}"
        ) from error
    return MatMulNBitsQuantizer


def _fitting(block_size: int, rows: int) -> int:
    """The largest block up to `block_size` that divides `rows`; at least 16, which is the operator's limit."""
    while block_size > 16 and rows % block_size:
        block_size //= 2
    return block_size


def _untie(graph: Any) -> dict[str, str]:
    """Give each product with a transposed weight a weight of its own, so that it can be quantized.

    The exporter stores a tied embedding once and multiplies by its transpose.

    Returns:
        Embedding table -> name of the product's output.
    """
    from onnx import numpy_helper

    matrices, tied = _matrices(graph), {}
    for transpose in list(_transposed_matrices(graph)):
        table, transposed = transpose.input[0], transpose.output[0]
        users = [node for node in graph.node if transposed in node.input]
        if len(users) != 1 or users[0].op_type != "MatMul" or users[0].input[1] != transposed:
            continue
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(matrices[table]).T, transposed))
        graph.node.remove(transpose)
        tied[table] = users[0].output[0]
    return tied


def _share_with_embedding(graph: Any, table: str, product: str) -> None:
    """Let the look-up of a tied embedding read the blocks that the head multiplies by.

    `GatherBlockQuantized` takes the quantized weight as it lies there, `[tokens, blocks, block]`, so that it is in the
    file once; only the scales get another axis, by an operator, since stored they would be there twice. A table that
    doesn't consist of whole blocks stays as it is, and is `ORTQuantizer`'s.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    head = next(node for node in graph.node if product in node.output)
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in head.attribute}
    width, block = attributes["K"], attributes["block_size"]
    users = [node for node in graph.node if table in node.input]
    if width % block or any(node.op_type != "Gather" for node in users):
        return
    lookups = {node.output[0] for node in users}
    axis, last, scales = f"{table}_axis", f"{table}_width", f"{table}_scales_3d"
    graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), axis))
    graph.initializer.append(numpy_helper.from_array(np.array([width], np.int64), last))
    nodes = [helper.make_node("Unsqueeze", [head.input[2], axis], [scales], f"{table}_Unsqueeze")]
    for node in graph.node:
        if node.output[0] not in lookups:
            nodes.append(node)
            continue
        _, indices = node.input
        (result,) = node.output
        blocks, leading, shape = f"{result}_blocks", f"{result}_leading", f"{result}_shape"
        lookup = helper.make_node(
            "GatherBlockQuantized",
            [head.input[1], indices, scales],
            [blocks],
            f"{node.name}_Q{attributes['bits']}",
            domain="com.microsoft",
            bits=attributes["bits"],
            block_size=block,
            gather_axis=0,
            quantize_axis=2,
        )
        nodes += [
            lookup,
            helper.make_node("Shape", [indices], [leading], f"{node.name}_Shape"),
            helper.make_node("Concat", [leading, last], [shape], f"{node.name}_Concat", axis=0),
            helper.make_node("Reshape", [blocks, shape], [result], f"{node.name}_Reshape"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.remove(_matrices(graph)[table])


def _matrices(graph: Any) -> dict[str, Any]:
    """The graph's constant float matrices by name."""
    from onnx import TensorProto

    return {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}


def _transposed_matrices(graph: Any) -> Iterator[Any]:
    """Nodes that transpose a constant float matrix."""
    matrices = _matrices(graph)
    return (node for node in graph.node if node.op_type == "Transpose" and node.input[0] in matrices)


def _needs_external_data(graph: Any) -> bool:
    return sum(_bytes(tensor) for tensor in graph.initializer) > _PROTOBUF_LIMIT


def _bytes(tensor: Any) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)


def _count(path: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    tables = {t.name for t in graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}
    matrices = _matrices(graph)
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized", "MatMulInteger"):
            counts[node.op_type] += 1
        elif node.op_type == "Gather" and node.input[0] in tables:
            counts["Gather (8-bit)"] += 1
        elif node.op_type == "Gather" and node.input[0] in matrices:
            counts["Gather (float)"] += 1
        elif node.op_type == "MatMul":
            counts["MatMul (float)"] += 1
    return dict(counts)


def _record_recipe(path: Path, name: str, recipe: Recipe) -> None:
    """Add the recipe to Optimum's record, which knows of its own part of the work only."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["comp_recipe"] = {"name": name, **dataclasses.asdict(recipe)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
