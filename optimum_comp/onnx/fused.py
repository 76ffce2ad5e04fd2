"""A decoder's graph with attention as one operator, as ONNX Runtime GenAI's model builder makes it.

What the builder leaves to GenAI's own code is put into the graph, so that `ORTModelForCausalLM`, plain ONNX Runtime
and GenAI run one and the same: padding, an empty cache of any shape, windows, a tied embedding that is stored once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optimum_comp.onnx.cache import HEADS, WIDTH, present_of
from optimum_comp.onnx.folders import MODEL_NAME
from optimum_comp.onnx.graph import ATTENTION, dense_nodes, matrices, needs_external_data
from optimum_comp.onnx.logits import keep_asked_logits
from optimum_comp.onnx.runtime import is_transformers_5, open_session
from optimum_comp.onnx.shapes import constants, remove_unused


_TABLE = "model.embed_tokens.weight"
_MASKED = 1e9
"""Taken from the score of a token that is not to be seen: finite, since a row of padding sees nothing else."""

_SAME = 2e-6
"""Of a cosine: what two ways to work it out may differ by."""

_OPTIONS = {
    # Separate queries, keys and values: recipes tell them from other layers by name. Once quantized, they are packed.
    "disable_qkv_fusion": "true",
    # A cache of whole length for layers with a window too: one that is as short needs GenAI to turn it.
    "windowed_kv_cache": "false",
}

_HEADS_ASKED = [
    "cohere",
    "gemma",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "nemotron",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
]
"""Families whose number of key-value heads `ORTModelForCausalLM` takes from the config."""

BUILT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""What makes queries, keys and values in a graph of `build_fused`, whatever the family's modules are."""

# Places of `GroupQueryAttention`'s inputs.
_KEY_PAST, _VALUE_PAST, _LENGTHS, _COSINES, _SINES, _BIAS = 3, 4, 5, 7, 8, 10


def genai_version() -> str | None:
    """The version of ONNX Runtime GenAI that is installed; `None` if there is none."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return None
    providers = importlib.metadata.packages_distributions().get("onnxruntime_genai", ["onnxruntime-genai"])
    return importlib.metadata.version(providers[0])


def require_genai() -> str:
    """The version of ONNX Runtime GenAI, which there has to be.

    Raises:
        ImportError: it isn't installed, or is another than fits transformers; says how to install it.
    """
    import transformers

    version, is_new = genai_version(), is_transformers_5()
    wanted = "onnxruntime-genai>=0.16" if is_new else "onnxruntime-genai>=0.12,<0.16"
    if version is None:
        raise ImportError(f"this needs ONNX Runtime GenAI, which isn't installed: pip install '{wanted}' onnx-ir")
    if (tuple(int(part) for part in version.split(".")[:2]) >= (0, 16)) != is_new:
        raise ImportError(
            f"the model builder of onnxruntime-genai {version} doesn't run with transformers "
            f"{transformers.__version__}: pip install '{wanted}'"
        )
    return version


def build_fused(checkpoint: Path, folder: Path) -> None:
    """Write a float32 graph with attention as one operator.

    Args:
        checkpoint: of a family that the builder knows.
        folder: gets `model.onnx`, and beside it the weights of a model that is too large for one file.

    Raises:
        ImportError: ONNX Runtime GenAI isn't installed.
        RuntimeError: the builder failed, or its graph isn't one that can be rewritten; says why.
    """
    import onnx

    require_genai()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "built"
        run_builder(checkpoint, built, "fp32", **_OPTIONS)
        model = onnx.load(built / MODEL_NAME)
        settings = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
    rewrite(model, _config_of(checkpoint), int(settings["model"]["decoder"]["head_size"]))
    large = needs_external_data(model.graph)
    onnx.save(model, folder / MODEL_NAME, save_as_external_data=large, location=f"{MODEL_NAME}_data")


def run_builder(checkpoint: Path, folder: Path, precision: str, **options: str) -> None:
    """Run GenAI's model builder for the CPU.

    Args:
        checkpoint: a folder that transformers opens.
        folder: gets `model.onnx`, `model.onnx.data` and `genai_config.json`.
        precision: `fp32`, `int8` or `int4`.
        options: the builder's `--extra_options`.

    Raises:
        RuntimeError: it failed; with its error.
    """
    # It tells what it does on its standard output, and draws a bar on the other.
    talk = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        contextlib.redirect_stdout(talk),
        contextlib.redirect_stderr(talk),
    ):
        try:
            with _builder() as builder:
                arguments = {
                    "model_name": None,
                    "input_path": str(checkpoint.resolve()),
                    "output_dir": str(folder.resolve()),
                    "precision": precision,
                    "execution_provider": "cpu",
                    "cache_dir": cache,
                }
                builder.create_model(**arguments, **_parse(builder, arguments, options))
        except MemoryError:
            raise
        # What it raises of a model that it doesn't know, or half knows, is of no narrower class.
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            told = " ".join(str(error).split()) or "it doesn't say why"
            raise RuntimeError(
                f"GenAI's model builder failed on {checkpoint}: {type(error).__name__}: {told}"
            ) from error


def _parse(builder: Any, arguments: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Options as the builder has them; what it wants to know for that differs between its versions."""
    written = [f"{name}={value}" for name, value in options.items()]
    known = {**arguments, "extra_options": written, "kv_items": written}
    wanted = inspect.signature(builder.parse_extra_options).parameters
    return dict(builder.parse_extra_options(**{name: known[name] for name in wanted if name in known}))


@contextlib.contextmanager
def _builder() -> Iterator[Any]:
    """The module of the builder, which for as long writes no tokenizer; the checkpoint's own is copied instead."""
    models = importlib.util.find_spec("onnxruntime_genai.models")
    # It imports what lies beside it by its bare name.
    beside = [] if models is None else list(models.submodule_search_locations or ())
    sys.path[:0] = beside
    try:
        builder = importlib.import_module("onnxruntime_genai.models.builder")
    finally:
        del sys.path[: len(beside)]
    model = builder.Model
    originals = {name: getattr(model, name) for name in ("save_processing", "make_rope_init") if hasattr(model, name)}
    model.save_processing = lambda *_: None
    if "make_rope_init" in originals:
        model.make_rope_init = _by_kind_of_layer(originals["make_rope_init"])
    try:
        yield builder
    finally:
        for name, value in originals.items():
            setattr(model, name, value)


def _by_kind_of_layer(read: Any) -> Any:
    """The builder's way to read what angles are made of, but for a config that says it of each kind of layer.

    Transformers 5 reads Gemma 3's like this, and the builder (onnxruntime-genai 0.18) knows only the way that
    transformers 4 has it. Angles that are scaled are left to the builder, which refuses them.
    """

    def make_rope_init(self: Any, config: Any) -> None:
        told: Any = getattr(config, "rope_parameters", None)
        kinds = list(told.values()) if isinstance(told, dict) else []
        if not kinds or not all(isinstance(kind, dict) and kind.get("rope_type") == "default" for kind in kinds):
            read(self, config)
            return
        if "full_attention" in told:
            self.rope_attrs["theta"] = told["full_attention"]["rope_theta"]
        if "sliding_attention" in told:
            config.rope_local_base_freq = told["sliding_attention"]["rope_theta"]

    return make_rope_init


def _config_of(checkpoint: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint)


def rewrite(model: Any, config: Any, head_size: int) -> None:
    """Make the builder's graph one that every runtime runs, in place.

    Args:
        model: as the builder has made it, in float32.
        config: the checkpoint's.
        head_size: width of a head.

    Raises:
        RuntimeError: it has no attention of the kind that can be rewritten.
    """
    graph = model.graph
    attention = {}
    for node in graph.node:
        layer = re.search(r"/layers\.(\d+)/", node.name)
        if node.op_type == ATTENTION and layer is not None:
            attention[int(layer[1])] = node
    if sorted(attention) != list(range(config.num_hidden_layers)):
        raise RuntimeError(f"GenAI's model builder makes no {ATTENTION} for each layer of this model.")
    _name_as_modules(graph)
    _store_table_once(graph)
    _scale_exactly(graph, config)
    _look_back(attention, config)
    first = _see_no_padding(graph, attention.values())
    first += _take_past(graph, attention.values(), head_size, any_empty=not _is_guessed_right(config, head_size))
    first += _work_out_angles(graph)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*first, *rest])
    remove_unused(graph)
    # `ORTModelForCausalLM` takes a graph without `position_ids` for one that can't pad.
    keep_asked_logits(graph)
    # The quantizers go by what the builder notes of types; of what is gone, it would be in the way.
    made = {name for node in graph.node for name in node.output}
    noted = [value for value in graph.value_info if value.name in made]
    for value in noted:
        # It takes every layer for as wide as the config says, and ONNX Runtime warns of each that isn't.
        for width in value.type.tensor_type.shape.dim[-1:]:
            width.Clear()
    del graph.value_info[:]
    graph.value_info.extend(noted)


def _name_as_modules(graph: Any) -> None:
    """Name the nodes of attention as the model's modules are named, which recipes go by."""
    for node in graph.node:
        node.name = node.name.replace("/attn/", "/self_attn/")


def _store_table_once(graph: Any) -> None:
    """Have a tied head multiply by the transposed embedding, as Optimum's export does, which the recipes know.

    The builder looks tokens up in the transposed head, which a runtime that works out constants holds twice; or it
    stores both.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    constant = matrices(graph)
    head = next(node for node in dense_nodes(graph) if node.is_head)
    lookup = _lookup(graph)
    turns = [node for node in graph.node if node.op_type == "Transpose" and lookup.input[0] in node.output]
    table = numpy_helper.to_array(constant[head.weight]).T
    if turns and turns[0].input[0] != head.weight:
        return
    if not turns and not np.array_equal(numpy_helper.to_array(constant[lookup.input[0]]), table):
        return
    turned = f"{_TABLE}_transposed"
    for name in {head.weight, lookup.input[0]} & constant.keys():
        graph.initializer.remove(constant[name])
    for node in turns:
        graph.node.remove(node)
    _give(graph, {_TABLE: np.ascontiguousarray(table)})
    lookup.input[0] = _TABLE
    for node in graph.node:
        node.input[:] = [turned if name == head.weight else name for name in node.input]
    # Behind the lookup: ONNX Runtime's quantizer takes in 8 bits what it has met in 8 bits, and else keeps both.
    place = list(graph.node).index(next(node for node in graph.node if turned in node.input))
    graph.node.insert(place, helper.make_node("Transpose", [_TABLE], [turned], "/lm_head/Transpose", perm=[1, 0]))


def _lookup(graph: Any) -> Any:
    """The node that looks the tokens up."""
    return next(node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")


def _look_back(attention: Mapping[int, Any], config: Any) -> None:
    """Give each layer its window, and the angles that go with it.

    The builder goes by the family's usual order of layers, and for some families leaves windows out.
    """
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    for layer, node in attention.items():
        is_local = kinds[layer] == "sliding_attention"
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = window if is_local else -1
        for place in (_COSINES, _SINES):
            name = re.sub("_(local|global)$", "", node.input[place])
            if name != node.input[place]:
                node.input[place] = f"{name}_{'local' if is_local else 'global'}"


def _scale_exactly(graph: Any, config: Any) -> None:
    """Scale what is looked up by the root of its width (Gemma), which the builder rounds to two decimals."""
    import numpy as np
    from onnx import numpy_helper

    exact = np.sqrt(config.hidden_size)
    readers = {name: node for node in graph.node for name in node.input}
    scaled = readers.get(_lookup(graph).output[0])
    if scaled is None or scaled.op_type != "Mul":
        return
    for name, value in constants(graph).items():
        if name in scaled.input and value.size == 1 and value == np.round(exact, 2).astype(value.dtype):
            graph.initializer.append(numpy_helper.from_array(exact.astype(value.dtype), "comp_embedding_scale"))
            scaled.input[:] = ["comp_embedding_scale" if each == name else each for each in scaled.input]


def _see_no_padding(graph: Any, attention: Iterable[Any]) -> list[Any]:
    """Have attention leave out what the mask does, on whichever side it is.

    The operator takes a row for as long as its number of tokens, counted from the start. Here every row is as long as
    the mask, a token's angle is that of its place in it (of two tokens, only how far they are apart matters), and the
    mask lowers the scores.

    Returns:
        Nodes to put in front of the graph.
    """
    import numpy as np
    from onnx import TensorProto, helper

    given = {
        "comp_one": np.array([1], np.int64),
        "comp_heads_and_length": np.array([1, 2], np.int64),
        "comp_one_float": np.array(1, np.float32),
        "comp_masked": np.array(_MASKED, np.float32),
    }
    _give(graph, given)
    node = helper.make_node
    for each in attention:
        each.input.extend([""] * (_BIAS + 1 - len(each.input)))
        each.input[_LENGTHS], each.input[_BIAS] = "comp_last_of_rows", "comp_bias"
    return [
        # Of each row, the place of its last token.
        node("Shape", ["attention_mask"], ["comp_rows"], "comp/Rows", start=0, end=1),
        node("Shape", ["attention_mask"], ["comp_total"], "comp/Total", start=1, end=2),
        node("Sub", ["comp_total", "comp_one"], ["comp_last"], "comp/Last"),
        node("Cast", ["comp_last"], ["comp_last_int"], "comp/LastInt", to=TensorProto.INT32),
        node("Expand", ["comp_last_int", "comp_rows"], ["comp_last_of_rows"], "comp/LastOfRows"),
        # [rows, 1, length, total]: 0, and far below it where the mask is 0.
        node("Cast", ["attention_mask"], ["comp_mask"], "comp/Mask", to=TensorProto.FLOAT),
        node("Sub", ["comp_mask", "comp_one_float"], ["comp_missing"], "comp/Missing"),
        node("Mul", ["comp_missing", "comp_masked"], ["comp_lowered"], "comp/Lowered"),
        node("Unsqueeze", ["comp_lowered", "comp_heads_and_length"], ["comp_lowered_4d"], "comp/Lowered4D"),
        node("Shape", ["input_ids"], ["comp_length"], "comp/Length", start=1, end=2),
        node("Concat", ["comp_length", "comp_one"], ["comp_square"], "comp/Square", axis=0),
        node("Expand", ["comp_lowered_4d", "comp_square"], ["comp_bias"], "comp/Bias"),
    ]


def _is_guessed_right(config: Any, head_size: int) -> bool:
    """Whether the shape that `ORTModelForCausalLM` (optimum-onnx 0.1) gives an empty past is right.

    It asks the config for the heads of some families, and for their width of fewer; the others' it guesses. Should
    another version guess otherwise, the export's comparison notices.
    """
    kind, heads = config.model_type, config.num_attention_heads
    width = config.head_dim if kind in ("gemma", "gemma3_text") else config.hidden_size / heads
    asked = kind in _HEADS_ASKED or getattr(config, "num_key_value_heads", heads) == heads
    return bool(asked and width == head_size)


def _take_past(graph: Any, attention: Iterable[Any], head_size: int, *, any_empty: bool) -> list[Any]:
    """Say heads and width of the cache; and have attention take an empty one of any (see `onnx.cache`).

    The operator looks at the shape. What stands before it for that costs a copy of the cache at each token, so it is
    for those models alone whose shape isn't guessed; GenAI's cache is written into in place all the same.

    Args:
        graph: the graph.
        attention: its attention.
        head_size: width of a head.
        any_empty: whether an empty one may have another shape.

    Returns:
        Nodes to put in front of the graph.
    """
    import numpy as np
    from onnx import helper

    values = {value.name: value.type.tensor_type.shape.dim for value in [*graph.input, *graph.output]}
    targets, nodes = {}, []
    for each in attention:
        heads = next(attribute.i for attribute in each.attribute if attribute.name == "kv_num_heads")
        target = f"comp_past_of_{heads}"
        for place in (_KEY_PAST, _VALUE_PAST):
            past = each.input[place]
            for name in (past, present_of(past)):
                values[name][HEADS].dim_value, values[name][WIDTH].dim_value = heads, head_size
            if any_empty:
                targets[target] = np.array([0, heads, -1, head_size], np.int64)
                each.input[place] = f"{past}_shaped"
                nodes.append(helper.make_node("Reshape", [past, target], [f"{past}_shaped"], f"comp/{past}"))
                for dimension in (HEADS, WIDTH):
                    values[past][dimension].Clear()
    _give(graph, targets)
    return nodes


def _work_out_angles(graph: Any) -> list[Any]:
    """Replace tables of the angles' cosines and sines by what they are worked out from.

    A runtime does so once, when it opens the graph; in the file they may take more room than the layers' weights
    (Gemma 3 270M: 67 MB). A table that isn't the same to the last digits, whatever made it, stays.

    Returns:
        Nodes to put in front of the graph.
    """
    from onnx import numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer}
    pairs = {(node.input[_COSINES], node.input[_SINES]) for node in graph.node if node.op_type == ATTENTION}
    found: list[Any] = []
    for names in sorted(pairs):
        if not all(name in tables for name in names):
            continue
        cosines, sines = (numpy_helper.to_array(tables[name]) for name in names)
        nodes, given = _angles(names, cosines, sines)
        if not _are_made(nodes, given, dict(zip(names, (cosines, sines), strict=True))):
            continue
        for name in names:
            graph.initializer.remove(tables[name])
        _give(graph, given)
        found += nodes
    return found


def _angles(names: tuple[str, str], cosines: Any, sines: Any) -> tuple[list[Any], dict[str, Any]]:
    """Nodes that make tables `[places, angles]` of cosines and sines, and the constants that they read."""
    import numpy as np
    from onnx import helper

    scale = float(cosines[0, 0])
    turns = np.arctan2(sines.astype(np.float64), cosines.astype(np.float64))
    # Each place that is twice as far tells the step twice as exactly; so far apart, floats are multiplied exactly.
    step = turns[1]
    place = 2
    while place < len(turns):
        missed = turns[place] - place * step
        step = step + (missed - 2 * np.pi * np.round(missed / (2 * np.pi))) / place
        place *= 2
    angle = f"{names[0]}_angles"
    given = {
        f"{angle}_first": np.array(0, np.float32),
        f"{angle}_end": np.array(len(turns), np.float32),
        f"{angle}_one": np.array(1, np.float32),
        f"{angle}_last_axis": np.array([1], np.int64),
        f"{angle}_step": step[None].astype(np.float32),
        f"{angle}_scale": np.array(scale, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Range", [f"{angle}_first", f"{angle}_end", f"{angle}_one"], [f"{angle}_places"], f"{angle}/Range"),
        node("Unsqueeze", [f"{angle}_places", f"{angle}_last_axis"], [f"{angle}_column"], f"{angle}/Unsqueeze"),
        node("Mul", [f"{angle}_column", f"{angle}_step"], [angle], f"{angle}/Mul"),
    ]
    for name, operator in zip(names, ("Cos", "Sin"), strict=True):
        nodes.append(node(operator, [angle], [f"{name}_unscaled"], f"{name}/{operator}"))
        nodes.append(node("Mul", [f"{name}_unscaled", f"{angle}_scale"], [name], f"{name}/Scale"))
    return nodes, given


def _are_made(nodes: list[Any], given: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether ONNX Runtime makes these arrays with those nodes."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in expected]
    tensors = [numpy_helper.from_array(value, name) for name, value in given.items()]
    graph = helper.make_graph(nodes, "angles", [], outputs, tensors)
    # The version of the operators doesn't matter to these.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = open_session(model.SerializeToString()).run(list(expected), {})
    return all(np.abs(one - other).max() < _SAME for one, other in zip(found, expected.values(), strict=True))


def _give(graph: Any, values: Mapping[str, Any]) -> None:
    from onnx import numpy_helper

    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
