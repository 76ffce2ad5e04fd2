"""Logits of a row's last tokens alone: generation needs no others, and the head is much of a small model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum_comp.onnx.graph import dense_nodes


KEPT = "logits_to_keep"
"""Name of the axis of `position_ids` and `logits` that says how many tokens of each row, the last ones, get logits."""

POSITIONS = "position_ids"
"""An input of which, in a graph that keeps only the logits that are asked for, nothing but its length is looked at."""


def keep_asked_logits(graph: Any) -> None:
    """Have the head read as many of a row's last tokens as there are `position_ids`, in place.

    Whoever gives one for each token gets the logits of all: `ORTModelForCausalLM` of Optimum, GenAI, transformers.js.
    An input of its own would have to be given by all of them, and of one with a default ONNX Runtime warns.

    Args:
        graph: with one product that makes the logits. One that reads `position_ids` stays as it is.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    if any(POSITIONS in node.input for node in graph.node):
        return
    (tokens,) = (value for value in graph.input if value.name == "input_ids")
    rows = tokens.type.tensor_type.shape.dim[0].dim_param
    for value in [each for each in graph.input if each.name == POSITIONS]:
        graph.input.remove(value)
    graph.input.append(helper.make_tensor_value_info(POSITIONS, TensorProto.INT64, [rows, KEPT]))
    (logits,) = (value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = KEPT
    given = {
        "comp_kept_end": np.array([np.iinfo(np.int64).max], np.int64),
        "comp_kept_axis": np.array([-2], np.int64),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in given.items())
    head = next(node for node in dense_nodes(graph) if node.is_head)
    (product,) = (node for node in graph.node if node.name == head.name)
    node = helper.make_node
    bounds = ["comp_kept_first", "comp_kept_end", "comp_kept_axis"]
    added = [
        node("Shape", [POSITIONS], ["comp_kept_tokens"], "comp/KeptTokens", start=1, end=2),
        node("Neg", ["comp_kept_tokens"], ["comp_kept_first"], "comp/KeptFirst"),
        node("Slice", [head.inputs, *bounds], ["comp_kept"], "comp/Kept"),
    ]
    product.input[0] = "comp_kept"
    rest = list(graph.node)
    place = rest.index(product)
    del graph.node[:]
    graph.node.extend([*rest[:place], *added, *rest[place:]])


def keeps_asked_logits(positions: Sequence[Any]) -> bool:
    """Whether a graph makes logits of as many tokens as there are `position_ids`.

    Args:
        positions: the axes of these, by name or size.
    """
    return list(positions[1:]) == [KEPT]
