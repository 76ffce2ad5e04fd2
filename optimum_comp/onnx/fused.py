"""A decoder's graph with attention as one operator, as GenAI's model builder makes it.

Either with the exported graph's own quantized weights (`fuse`), or with the builder's rounding (`build_genai`).
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_comp.files import atomic_folder, check_folder
from optimum_comp.onnx.export import check_checkpoint
from optimum_comp.onnx.folders import MODEL_NAME, copy_companions, graph_bytes
from optimum_comp.onnx.genai import (
    CONFIG_NAME,
    GenaiEnvironment,
    cache_shape,
    mend_tokenizer,
    require_environment,
    run_builder,
    write_config,
)
from optimum_comp.onnx.graph import matrices, save_with_data
from optimum_comp.onnx.parity import require_same, run_graph
from optimum_comp.onnx.runtime import CachedDecoder


BLOCK_SIZES = {8: 64, 4: 32}
"""Bits of the builder's weights -> weights that share a scale, unless asked for otherwise."""

_NOT_SHARED = {"shared_embeddings": "false"}
"""At 8 bits, the builder's own way to store a tied embedding once makes a graph that doesn't load (0.15)."""

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class GenaiReport:
    """What the builder made.

    Attributes:
        output: the folder; GenAI and `ORTModelForCausalLM` open it.
        bits: of the weights.
        size_bytes: of the graph and its weights.
        seconds: it took.
        notes: what a user has to know.
        versions: of the environment.
    """

    output: Path
    bits: int
    size_bytes: int
    seconds: float
    notes: tuple[str, ...]
    versions: Mapping[str, str]


def build_genai(
    checkpoint: str | Path,
    output: str | Path,
    *,
    bits: int,
    python: str | Path | None = None,
    block_size: int | None = None,
    overwrite: bool = False,
) -> GenaiReport:
    """Build a decoder with fused attention from a float checkpoint, with GenAI's own rounding of the weights, or none.

    The builder runs offline in a process of its own. What it leaves in float although it is in the file at 8 bits
    already, the embedding that is tied to the head, reads the head's weights.

    Args:
        checkpoint: a safetensors checkpoint of an architecture that the builder knows.
        output: the folder to make.
        bits: of the weights: 8, 4, or 32 for float.
        python: interpreter of the builder's environment; see `find_environment`.
        block_size: weights that share a scale; 64 of 8 bits and 32 of 4 if not given.
        overwrite: replace a model that is in `output`.

    Raises:
        FileExistsError: the output exists and isn't to be, or may not be, overwritten.
        ImportError: there is no environment to build in; says how to make one.
        RuntimeError: the builder failed; with its last lines.
        ValueError: `checkpoint` isn't a checkpoint, or other bits or blocks than those possible.
    """
    started = time.perf_counter()
    if bits not in (*BLOCK_SIZES, 32):
        raise ValueError(f"bits={bits!r} is not valid: it must be 8, 4 or 32.")
    options: dict[str, str | int] = {}
    if bits == 8:
        options |= _NOT_SHARED
    if bits in BLOCK_SIZES:
        options["block_size"] = BLOCK_SIZES[bits] if block_size is None else block_size
        if options["block_size"] not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_size={block_size!r} is not valid: it must be 16, 32, 64, 128 or 256.")
    precision = f"int{bits}" if options else "fp32"
    source = Path(checkpoint)
    check_checkpoint(source)
    check_folder(output, overwrite=overwrite, sources=[source])
    environment = require_environment(python)
    with atomic_folder(output, overwrite=overwrite, sources=[source]) as folder:
        run_builder(source, folder, environment, precision, **options)
        _finish_built(folder, source)
        # The builder saves what transformers 5 has read, under names that version 4 refuses.
        for written in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / written).unlink(missing_ok=True)
        copy_companions(source, folder)
        shutil.copyfile(source / "config.json", folder / "config.json")
        built = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        write_config(folder, MODEL_NAME, built=built)
        notes = mend_tokenizer(folder)
        size = graph_bytes(folder)
    seconds = time.perf_counter() - started
    return GenaiReport(Path(output), bits, size, seconds, tuple(notes), environment.versions)


def _finish_built(folder: Path, checkpoint: Path) -> None:
    """Mend what the builder leaves undone.

    The look-up of a tied embedding, which it leaves in float at 8 bits, reads the head's weights.
    """
    import onnx
    import onnx_ir
    from transformers import AutoConfig

    from optimum_comp.onnx.blocks import share_with_embedding

    config = AutoConfig.from_pretrained(checkpoint)
    model = onnx.load(folder / MODEL_NAME)
    _set_window(model.graph, config)
    heads = [node.op_type for node in model.graph.node if "logits" in node.output]
    if config.tie_word_embeddings and heads == ["MatMulNBits"] and _EMBEDDING in _names(model.graph.initializer):
        share_with_embedding(model.graph, _EMBEDDING, "logits")
    save_with_data(onnx_ir.from_proto(model), folder / MODEL_NAME)


def _set_window(graph: Any, config: Any) -> None:
    """Give layers that look back no further than a window that window.

    The builder does so for some families only, and not in each of its versions.
    """
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    for node in graph.node:
        layer = re.search(r"/layers\.(\d+)/", node.name)
        if node.op_type != "GroupQueryAttention" or layer is None:
            continue
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = window if kinds[int(layer[1])] == "sliding_attention" else -1


def fuse(exported: Path, checkpoint: Path, environment: GenaiEnvironment, target: Path) -> dict[str, Any]:
    """Write a graph with fused attention that has the exported graph's quantized weights.

    GenAI's builder makes the graph from the float checkpoint; each of its products, and the look-up of the embedding,
    are then given the weights of the exported graph. Weights that this one has in a file of their own stay there: both
    graphs read that file.

    Args:
        exported: a quantized graph that `can_be_fused`.
        checkpoint: the float checkpoint that it was exported from.
        environment: where the builder is.
        target: the file to write, beside `exported`.

    Returns:
        The builder's `genai_config.json`.

    Raises:
        RuntimeError: the builder failed, or its graph isn't made of the same products, or computes something else.
        ValueError: it can't be fused.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data
    from transformers import AutoConfig

    source = onnx.load(exported, load_external_data=False)
    if not can_be_fused(source.graph):
        raise ValueError(f"{exported} has weights that aren't stored in blocks, which a fused graph can't take.")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        # Separate q, k and v: as fast, and each has its counterpart. The rounded weights are not used.
        options: dict[str, str | int] = {"block_size": 64, "disable_qkv_fusion": "true", **_NOT_SHARED}
        run_builder(checkpoint, folder, environment, "int8", **options)
        built = onnx.load(folder / MODEL_NAME, load_external_data=False)
        _set_window(built.graph, AutoConfig.from_pretrained(checkpoint))
        given = _give_weights(source.graph, built.graph)
        for tensor in built.graph.initializer:
            if tensor.name not in given and uses_external_data(tensor):
                load_external_data_for_tensor(tensor, str(folder))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        settings: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    onnx.save(built, target)
    _compare(exported, target, cache_shape(source.graph)[:2])
    return settings


def can_be_fused(graph: Any) -> bool:
    """Whether a quantized graph's dense layers are of a kind that a fused graph can take: in blocks, or in float."""
    kinds = {node.op_type for node in graph.node}
    heads = {node.op_type for node in graph.node if "logits" in node.output}
    return heads == {"MatMulNBits"} and "MatMulInteger" not in kinds


def _give_weights(source: Any, built: Any) -> set[str]:
    """Replace the weights of the builder's products and of its look-up by the source's, in place.

    Returns:
        Names of the source's tensors that are in the builder's graph now.

    Raises:
        RuntimeError: a product has no counterpart of its size.
    """
    ours, theirs = _products(source), _products(built)
    sizes = [
        {place: _size(graph, node) for place, node in found.items()}
        for graph, found in ((source, ours), (built, theirs))
    ]
    differing = [place for place in sorted({*ours, *theirs}) if sizes[0].get(place) != sizes[1].get(place)]
    if differing:
        raise RuntimeError(
            "GenAI's builder makes other products of this model than Optimum's export; the first that differs: "
            f"{differing[0]}."
        )
    needed = set()
    for place, node in theirs.items():
        mine = ours[place]
        node.op_type, node.domain = mine.op_type, mine.domain
        del node.input[1:], node.attribute[:]
        node.input.extend(mine.input[1:])
        node.attribute.extend(mine.attribute)
        needed |= set(mine.input[1:])
    nodes, result = _lookup(source)
    renamed = []
    for node in built.node:
        if node.op_type != "Gather" or node.input[0] != _EMBEDDING:
            renamed.append(node)
            continue
        for part in nodes:
            copied = type(part)()
            copied.CopyFrom(part)
            copied.output[:] = [node.output[0] if name == result else name for name in part.output]
            renamed.append(copied)
            needed |= set(part.input)
    del built.node[:]
    built.node.extend(renamed)
    used = {name for node in built.node for name in node.input}
    kept = [tensor for tensor in built.initializer if tensor.name in used and tensor.name not in needed]
    given = [tensor for tensor in source.initializer if tensor.name in needed]
    del built.initializer[:]
    built.initializer.extend([*kept, *given])
    # What the builder notes of shapes is of tensors that may be gone.
    del built.value_info[:]
    return _names(given)


def _place(node: Any) -> str:
    """A product's place in the model, the same in both graphs: `layers.0/attn/q_proj`."""
    name = re.sub(r"(/MatMul)?(_Q\d+)?$", "", node.name).removeprefix("/model/").removeprefix("/")
    return name.replace("/self_attn/", "/attn/")


def _products(graph: Any) -> dict[str, Any]:
    """Place -> multiplication by a weight, in blocks or in float."""
    weights = matrices(graph)
    return {
        _place(node): node
        for node in graph.node
        if node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and node.input[1] in weights)
    }


def _size(graph: Any, node: Any) -> tuple[int, int]:
    if node.op_type == "MatMul":
        rows, columns = matrices(graph)[node.input[1]].dims
        return rows, columns
    found = {attribute.name: attribute.i for attribute in node.attribute}
    return found["K"], found["N"]


def _lookup(graph: Any) -> tuple[list[Any], str]:
    """The nodes that make the embedding of the tokens, in order, and the name of what they make."""
    users = [node for node in graph.node if "input_ids" in node.input]
    lookups = [node for node in users if node.op_type in ("Gather", "GatherBlockQuantized")]
    tables = _names(graph.initializer)
    (lookup,) = (node for node in lookups if node.input[0] in tables)
    result, following = lookup.output[0], {"Reshape", "DequantizeLinear"}
    while True:
        readers = [node for node in graph.node if result in node.input]
        if len(readers) != 1 or readers[0].op_type not in following:
            break
        result = readers[0].output[0]
    needed, nodes = {result}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    return nodes[::-1], result


def _names(values: Any) -> set[str]:
    return {value.name for value in values}


def greedy_tokens(exported: Path, graph: Path, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The tokens that ONNX Runtime generates with a graph, whatever they are.

    Args:
        exported: Optimum's graph of the model, which says how large the cache is.
        graph: the graph to run.
        prompt: token ids.
        new_tokens: how many to generate.
    """
    import onnx

    heads, width, _ = cache_shape(onnx.load(exported, load_external_data=False).graph)
    decoder = CachedDecoder(graph, (heads, width))
    found: list[int] = []
    step = list(prompt)
    for _ in range(new_tokens):
        step = [int(decoder.logits(step)[-1].argmax())]
        found += step
    return found


def _compare(exported: Path, fused: Path, cache: tuple[int, int]) -> None:
    """Make sure that two graphs compute the same.

    Both multiply in float32 for it: activations that are rounded to 8 bits at other places would hide a mistake.
    Batches are left out: the fused attention counts a row's tokens from its start, so padding on the left is not for
    it, and it takes no more than one token of each behind a cache.

    Args:
        exported: one graph.
        fused: the other, in the same folder.
        cache: heads and width of a layer's cache.

    Raises:
        RuntimeError: they don't.
    """
    found = []
    for path in (exported, fused):
        # Beside the graph, since the weights' file has to be in the same folder.
        exact = path.with_name(f"exact_{path.name}")
        try:
            _write_exact(path, exact)
            found.append(run_graph(path.parent, exact.name, cache_shape=cache, batches=False))
        finally:
            exact.unlink(missing_ok=True)
    require_same(*found, names=("the graph with fused attention", "the exported one"))


def _write_exact(path: Path, target: Path) -> None:
    """Copy a graph, its products set to multiply in float32."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, target)
