"""Weights stored in blocks: `MatMulNBits`, and the tied embedding that reads the head's own blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optimum_comp.core.rounding import Blocks, compensated, nearest, on_grid
from optimum_comp.onnx.graph import DenseNode, dense_nodes, matrices, transposed_matrices, weight_of
from optimum_comp.onnx.recipes import Format
from optimum_comp.utils import progress_disabled


Assignment = Mapping[str, Format]
"""Name of a dense node -> how its weight is stored. Nodes that aren't in it stay as they are."""


def round_weights(graph: Any, assignment: Assignment, moments: Mapping[str, Tensor]) -> dict[str, Blocks]:
    """Round the weights of dense nodes, each to its format, with what their inputs' second moments tell.

    Args:
        graph: a float graph.
        assignment: which nodes, and how.
        moments: activation -> second moments `[d_in, d_in]`; a node without is rounded to the nearest.

    Returns:
        Node -> its codes and scales.

    Raises:
        FloatingPointError: moments are NaN or infinite; names the node.
    """
    nodes = [node for node in dense_nodes(graph) if node.name in assignment]
    found = {}
    for node in tqdm(nodes, desc="Rounding", unit="matrix", disable=progress_disabled()):
        found[node.name] = round_weight(graph, node, assignment[node.name], moments.get(node.inputs))
    return found


def rounded_already(graph: Any, assignment: Assignment) -> dict[str, Blocks]:
    """Codes and scales of the weights that were trained as they are to be rounded (see `core.rounding.on_grid`).

    Args:
        graph: a float graph.
        assignment: which nodes, and how.

    Returns:
        Node -> its codes and scales, for those nodes of 4 bits whose weight lies on a grid of its format, in blocks
        that may be smaller: those that fit best are others where zeros filled a layer up while it was trained.
    """
    found = {}
    for node in dense_nodes(graph):
        form = assignment.get(node.name)
        if form is not None and form.bits == 4:
            weight = torch.from_numpy(weight_of(graph, node).copy())
            sizes = dict.fromkeys((form.fitted(node.shape[0]).block_size, *form.sizes()))
            grids = (on_grid(weight, 4, size) for size in sizes)
            blocks = next((each for each in grids if each is not None), None)
            if blocks is not None:
                found[node.name] = blocks
    return found


def round_weight(graph: Any, node: DenseNode, form: Format, moment: Tensor | None) -> Blocks:
    """One dense node's weight, rounded.

    Raises:
        FloatingPointError: the moments are NaN or infinite; names the node.
    """
    weight = torch.from_numpy(weight_of(graph, node).copy())
    fitted = form.fitted(node.shape[0])
    if moment is None:
        return nearest(weight, fitted.bits, fitted.block_size)
    try:
        return compensated(weight, moment, fitted.bits, fitted.block_size)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        raise FloatingPointError(f"{node.name}: {error} The model's activations overflow on this text.") from error


def store_in_blocks(
    model: Any, assignment: Assignment, *, rounded: Mapping[str, Blocks] | None = None, use_hqq: bool = False
) -> None:
    """Replace multiplications by a weight by `MatMulNBits`, in place.

    Args:
        model: a float ONNX model.
        assignment: which nodes, and how.
        rounded: codes and scales that are known already; ONNX Runtime's own rounding where there are none.
        use_hqq: round the others' 4-bit weights by half-quadratic quantization.
    """
    tied = _untie(model.graph, {node.name for node in dense_nodes(model.graph) if node.name in assignment})
    names_of_format = defaultdict(set)
    for node in dense_nodes(model.graph):
        if node.name in assignment:
            form = assignment[node.name]
            known_blocks = (rounded or {}).get(node.name)
            form = form.fitted(node.shape[0]) if known_blocks is None else Format(form.bits, known_blocks.block_size)
            names_of_format[form].add(node.name)
    every = {node.name for node in model.graph.node if node.op_type == "MatMul"}
    for form, names in names_of_format.items():
        known = names & set(rounded or {})
        for some, is_hqq in ((names - known, use_hqq and form.bits == 4), (known, False)):
            if some:
                _run_nbits_quantizer(model, form, every - some, rounded or {}, use_hqq=is_hqq)
    for table, product in tied.items():
        share_with_embedding(model.graph, table, product)


def _run_nbits_quantizer(
    model: Any, form: Format, excluded: set[str], rounded: Mapping[str, Blocks], *, use_hqq: bool
) -> None:
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits
    except ImportError as error:
        raise ImportError(
            f"block-wise quantization needs onnx-ir: pip install 'optimum-comp[onnxruntime]'. {error}"
        ) from error

    class FromCodes(nbits.DefaultWeightOnlyQuantizer):
        """ONNX Runtime's quantizer with codes of ours."""

        def quantize(self, node: Any, graph_stack: list[Any]) -> list[Any]:
            self.blocks = rounded.get(node.name)
            return super().quantize(node, graph_stack)

        def qbits_block_quant(self, fp32weight: Any) -> tuple[Any, Any, Any]:
            if self.blocks is None:
                return super().qbits_block_quant(fp32weight)
            return _packed(self.blocks), self.blocks.scales.float().numpy(), None

    # accuracy_level 4: multiply in int8; unset means float32, ten times slower.
    common = {"block_size": form.block_size, "bits": form.bits}
    if use_hqq:
        algorithm = nbits.HQQWeightOnlyQuantConfig(**common)
    else:
        algorithm = nbits.DefaultWeightOnlyQuantConfig(**common, is_symmetric=True, accuracy_level=4)
    quantizer = nbits.MatMulNBitsQuantizer(
        model, accuracy_level=4, nodes_to_exclude=sorted(excluded), algo_config=algorithm
    )
    if not use_hqq:
        quantizer.node_quantizer = FromCodes(algorithm)
    quantizer.process()
    for node in model.graph.node:
        # ONNX Runtime's HQQ doesn't take an accuracy level.
        if use_hqq and node.op_type == "MatMulNBits" and not any(a.name == "accuracy_level" for a in node.attribute):
            node.attribute.append(_attribute("accuracy_level", 4))


def _attribute(name: str, value: int) -> Any:
    from onnx import helper

    return helper.make_attribute(name, value)


def _packed(blocks: Blocks) -> Any:
    """Codes as `MatMulNBits` stores them, `[d_out, blocks, bytes]`: of 4 bits, the first of a pair is the low half."""
    codes = blocks.codes.unflatten(1, (-1, blocks.block_size))
    if blocks.bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes.contiguous().numpy()


def _untie(graph: Any, names: set[str]) -> dict[str, str]:
    """Give these products with a transposed weight a weight of its own, so that it can be quantized.

    The exporter stores a tied embedding once and multiplies by its transpose.

    Returns:
        Embedding table -> name of the product's output.
    """
    from onnx import numpy_helper

    constant, tied = matrices(graph), {}
    for transpose in list(transposed_matrices(graph)):
        table, transposed = transpose.input[0], transpose.output[0]
        users = [node for node in graph.node if transposed in node.input]
        if (
            len(users) != 1
            or users[0].name not in names
            or users[0].op_type != "MatMul"
            or users[0].input[1] != transposed
        ):
            continue
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(constant[table]).T, transposed))
        graph.node.remove(transpose)
        tied[table] = users[0].output[0]
    return tied


def share_with_embedding(graph: Any, table: str, product: str) -> None:
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
    graph.initializer.remove(matrices(graph)[table])
