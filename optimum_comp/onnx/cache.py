"""The shape of a decoder's cache: what a graph says of it, and what it had better not say.

A model without a past is given an empty one, `[batch, heads, 0, width]`. `ORTModelForCausalLM` works heads and width
out from the config by rules that hold for some families (width = hidden size / heads, for one), and a graph that
insists on its own numbers refuses the rest at the first token. What it does with the past is to join the new keys and
values to it, and there ONNX Runtime leaves out what is empty, of whatever shape. So a graph that leaves heads and
width of its past open takes any empty one; one that isn't empty has them right, since the graph itself has made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_comp.onnx.folders import MODEL_NAME


PAST, PRESENT = "past_key_values", "present"
"""What the names of a cache begin with where a graph reads it, and where it writes it."""

HEADS, WIDTH = 1, 3
"""Places in `[batch, heads, length, width]`."""

_OF_ANY_PAST = (0, 2, -2, -4)
"""Places of batch and length, which an empty past of another shape has right, too."""


def present_of(past: str) -> str:
    """Name of what a past becomes."""
    return past.replace(PAST, PRESENT, 1)


def open_cache(path: str | Path) -> int:
    """Have a graph take an empty past of any heads and width, so that `ORTModelForCausalLM` runs it whatever they are.

    The file is replaced if anything changes; weights in a file beside it stay as they are. The graph's outputs go
    on saying heads and width. Inputs are left alone where no output tells these, and where more is done with a past
    than to join something to it (attention in one operator looks at its shape).

    Args:
        path: a graph; or a folder, whose `model.onnx` is taken.

    Returns:
        How many inputs were opened.

    Raises:
        FileNotFoundError: there is no such file.
    """
    import onnx

    from optimum_comp.onnx.shapes import constants

    path = Path(path) / MODEL_NAME if Path(path).is_dir() else Path(path)
    model = onnx.load(path, load_external_data=False)
    told, known = cache_shapes(model.graph, inputs=False), constants(model.graph, path.parent)
    count = 0
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if not all(told.get(value.name, (0, 0))) or not (dimensions[HEADS].dim_value or dimensions[WIDTH].dim_value):
            continue
        if _is_only_joined(model.graph, value.name, known):
            for place in (HEADS, WIDTH):
                dimensions[place].Clear()
            count += 1
    if count:
        written = path.with_name(f"{path.name}.new")
        onnx.save(model, written)
        written.replace(path)
    return count


def close_cache(graph: Any) -> None:
    """Undo `open_cache` in a graph: what is worked out about shapes starts at the inputs."""
    told = cache_shapes(graph)
    for value in graph.input:
        for place, number in zip((HEADS, WIDTH), told.get(value.name, ()), strict=False):
            if number:
                value.type.tensor_type.shape.dim[place].dim_value = number


def cache_shapes(graph: Any, *, inputs: bool = True) -> dict[str, tuple[int, int]]:
    """Name of each past -> its heads and width; 0 for what the graph doesn't say.

    Args:
        graph: of a decoder.
        inputs: whether to believe the inputs; otherwise only what the outputs say of what a past becomes.
    """
    said = {value.name: value for value in graph.output}
    found = {}
    for value in graph.input:
        if value.name.startswith(PAST) and len(value.type.tensor_type.shape.dim) == 4:
            sizes = _sizes(value) if inputs else (0, 0)
            present = said.get(present_of(value.name))
            found[value.name] = sizes if present is None else _either(sizes, _sizes(present))
    return found


def _either(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] or other[0], one[1] or other[1]


def _sizes(value: Any) -> tuple[int, int]:
    dimensions = value.type.tensor_type.shape.dim
    return (dimensions[HEADS].dim_value, dimensions[WIDTH].dim_value) if len(dimensions) == 4 else (0, 0)


def _is_only_joined(graph: Any, name: str, known: Mapping[str, Any]) -> bool:
    """Whether all that reads an input joins it to something along the length, or asks how long it is."""
    for node in graph.node:
        if name not in node.input:
            continue
        if node.op_type == "Shape" and not node.attribute:
            asked = [reader for reader in graph.node if node.output[0] in reader.input]
            if not all(reader.op_type == "Gather" and _index(reader, known) in _OF_ANY_PAST for reader in asked):
                return False
        elif node.op_type != "Concat" or node.attribute[0].i not in (2, -2):
            return False
    return True


def _index(lookup: Any, known: Mapping[str, Any]) -> Any:
    """Which entry a `Gather` takes; `None` if that isn't one that is known."""
    index = known.get(lookup.input[1])
    return None if index is None else index.tolist()
