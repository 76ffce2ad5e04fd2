"""Grouped-query attention that doesn't copy the cache for each of a group's heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_comp.onnx.shapes import Dimension, constants, remove_unused


def group_heads(model: Any, shapes: Mapping[str, Sequence[Dimension]]) -> int:
    """Have the heads of a group multiply by the keys and values that they share, in place.

    The export repeats keys and values for every head of a group (`Unsqueeze`, `Expand`, `Reshape`), so each token
    copies all of the cache, several times as large. The heads of a group follow one another, so what multiplies,
    `[batch, groups · heads, length, width]`, is, without being moved, `[batch, groups, heads · length, width]`.

    Args:
        model: an ONNX model.
        shapes: of its activations, as `infer_shapes` gives them.

    Returns:
        How many products were changed.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    known = constants(graph)
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results = {value.name for value in graph.output}
    around: dict[str, tuple[Any, Any]] = {}
    counts: set[int] = set()
    for repeat in graph.node:
        found = _repeated(repeat, producers, known, shapes)
        chain = [] if found is None else _way_to_product(repeat.output[0], readers, known, results)
        if found is None or not chain:
            continue
        shared, groups, heads = found
        product = chain[-1]
        multiplied = shapes.get(product.input[0], ())
        if len(multiplied) != 4 or multiplied[1] != heads:
            continue
        chain[0].input[1 if chain[0] is product else 0] = shared
        result = product.output[0]
        grouped, parted = f"{result}_in_groups", f"{result}_of_groups"
        around[parted] = (
            helper.make_node("Reshape", [product.input[0], _target_name(groups)], [grouped], f"{product.name}/Group"),
            helper.make_node("Reshape", [parted, _target_name(heads)], [result], f"{product.name}/Part"),
        )
        product.input[0], product.output[0] = grouped, parted
        counts |= {groups, heads}
    nodes = []
    for node in graph.node:
        before, after = around.get(node.output[0], (None, None))
        nodes += [each for each in (before, node, after) if each is not None]
    del graph.node[:]
    graph.node.extend(nodes)
    for count in sorted(counts):
        # Batch and width are copied, what is left is the length.
        target = np.array([0, count, -1, 0], np.int64)
        graph.initializer.append(numpy_helper.from_array(target, _target_name(count)))
    remove_unused(graph)
    return len(around)


def _target_name(heads: int) -> str:
    return f"comp_heads_{heads}"


def _repeated(
    repeat: Any, producers: Mapping[str, Any], known: Mapping[str, Any], shapes: Mapping[str, Sequence[Dimension]]
) -> tuple[str, int, int] | None:
    """What a `Reshape` has repeated for every head of a group, and the numbers of groups and heads.

    Returns:
        The name of an activation `[batch, groups, length, width]`; `None` if it isn't such a node.
    """
    nodes = [repeat]
    while len(nodes) < 3 and nodes[-1] is not None:
        nodes.append(producers.get(nodes[-1].input[0]) if nodes[-1].input else None)
    if [getattr(node, "op_type", None) for node in nodes] != ["Reshape", "Expand", "Unsqueeze"]:
        return None
    _, expand, unsqueeze = nodes
    axes = known.get(unsqueeze.input[1])
    one, every, merged = (
        list(shapes.get(name, ())) for name in (unsqueeze.input[0], expand.output[0], repeat.output[0])
    )
    if axes is None or axes.tolist() != [2] or len(one) != 4 or len(every) != 5 or None in one:
        return None
    groups, repeats = one[1], every[2]
    if not isinstance(groups, int) or not isinstance(repeats, int):
        return None
    expected = [one[0], groups, repeats, *one[2:]], [one[0], groups * repeats, *one[2:]]
    return (unsqueeze.input[0], groups, groups * repeats) if (every, merged) == expected else None


def _way_to_product(
    name: str, readers: Mapping[str, Sequence[Any]], known: Mapping[str, Any], results: set[str]
) -> list[Any]:
    """The nodes from an activation to the product that it is the second factor of; none if something else reads it.

    They may transpose its last dimensions and multiply it by a number, neither of which minds how many heads there
    are.
    """
    chain: list[Any] = []
    while len(readers.get(name, ())) == 1 and name not in results:
        (node,) = readers[name]
        chain.append(node)
        if node.op_type == "MatMul":
            return chain if node.input[1] == name else []
        number = known.get(node.input[1]) if node.op_type == "Mul" else None
        turned = node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 1, 3, 2]
        if not turned and (number is None or number.size != 1):
            return []
        name = node.output[0]
    return []
