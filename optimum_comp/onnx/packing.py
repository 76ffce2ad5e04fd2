"""Products that read the same activation as one: fewer calls for each token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from optimum_comp.onnx.graph import ATTENTION


_BLOCKS = "MatMulNBits"
_OWN = ("N",)
"""Attributes in which products that become one may differ."""
_WEIGHT, _ZEROS = 1, 3


def pack_products(graph: Any) -> int:
    """Multiply once by weights in blocks that read one activation and are stored alike.

    At a token at a time, starting a product of a small matrix takes as long as the product. Queries, keys and values
    go into fused attention as one tensor; what else becomes one (gate and up projection) is split behind it. What is
    computed stays the same, row by row.

    Args:
        graph: with `MatMulNBits` nodes; changed.

    Returns:
        How many products are left out.
    """
    groups = defaultdict(list)
    for node in graph.node:
        if node.op_type == _BLOCKS and len([name for name in node.input if name]) <= _ZEROS + 1:
            groups[node.input[0], len(node.input), _alike(node)].append(node)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses = _uses(graph)
    before: dict[str, list[Any]] = {}
    gone: set[str] = set()
    for nodes in groups.values():
        names = [name for node in nodes for name in node.input[1:] if name]
        # A weight that something else reads, as a tied embedding does, stays where it is.
        if len(nodes) > 1 and all(name in tensors and uses[name] == 1 for name in names):
            packed, more = _packed(graph, nodes, tensors)
            before[nodes[0].name] = [packed, *more]
            gone |= {node.name for node in nodes}
    if not gone:
        return 0
    kept = []
    for node in graph.node:
        kept += before.get(node.name, [])
        if node.name not in gone:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return len(gone) - len(before)


def _alike(node: Any) -> bytes:
    """What products that become one have in common."""
    shared = sorted(a.SerializeToString(deterministic=True) for a in node.attribute if a.name not in _OWN)
    return b"".join(shared)


def _uses(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for node in graph.node:
        for name in node.input:
            counts[name] += 1
    for value in graph.output:
        counts[value.name] += 1
    return counts


def _packed(graph: Any, nodes: Sequence[Any], tensors: dict[str, Any]) -> tuple[Any, list[Any]]:
    """One product for several, and what its parts need to be read from it."""
    import numpy as np
    from onnx import helper, numpy_helper

    sizes = [next(a.i for a in node.attribute if a.name == "N") for node in nodes]
    name = f"{nodes[0].name}_packed"
    inputs = [nodes[0].input[0]]
    for place in range(_WEIGHT, len(nodes[0].input)):
        parts = [numpy_helper.to_array(tensors[node.input[place]]) for node in nodes]
        # By rows of the weight, however the scales of a row are laid out.
        rows = [part.reshape(size, -1) for part, size in zip(parts, sizes, strict=True)]
        whole = np.concatenate(rows)
        whole = whole.reshape(sum(sizes), *parts[0].shape[1:]) if parts[0].ndim > 1 else whole.reshape(-1)
        inputs.append(f"{name}.{place}")
        graph.initializer.append(numpy_helper.from_array(whole, inputs[-1]))
        for node in nodes:
            graph.initializer.remove(tensors.pop(node.input[place]))
    attributes = {a.name: helper.get_attribute_value(a) for a in nodes[0].attribute}
    outputs = [node.output[0] for node in nodes]
    reader = _attention_of(graph, outputs)
    product = helper.make_node(
        _BLOCKS, inputs, [f"{name}/output_0"], name, domain="com.microsoft", **{**attributes, "N": sum(sizes)}
    )
    if reader is not None:
        reader.input[0], reader.input[1], reader.input[2] = product.output[0], "", ""
        return product, []
    split = f"{name}_sizes"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), split))
    return product, [helper.make_node("Split", [product.output[0], split], outputs, f"{name}/Split", axis=-1)]


def _attention_of(graph: Any, outputs: Sequence[str]) -> Any:
    """The fused attention whose queries, keys and values these are, in this order, if nothing else reads them."""
    readers = [node for node in graph.node if any(name in outputs for name in node.input)]
    if len(readers) == 1 and readers[0].op_type == ATTENTION and list(readers[0].input[:3]) == list(outputs):
        return readers[0]
    return None
