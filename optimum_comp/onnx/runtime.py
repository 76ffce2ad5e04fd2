"""Opening an ONNX folder with Optimum, and a decoder's graph with ONNX Runtime alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimum_comp.onnx.cache import HEADS, PAST, WIDTH, present_of


def is_transformers_5() -> bool:
    """Whether transformers is of a version with which Optimum's ONNX part can't be installed."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def require_onnxruntime() -> None:
    """Refuse early where export and ONNX Runtime can't work.

    The symbols themselves are imported: with transformers 5, `import optimum.exporters.onnx` succeeds and its
    `main_export` doesn't. There, ONNX Runtime alone has to do.

    Raises:
        ImportError: the `onnxruntime` extra, or with transformers 5 the extra `genai`, isn't installed; says how.
    """
    extra = "genai" if is_transformers_5() else "onnxruntime"
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        from onnxruntime import SessionOptions  # noqa: F401

        if not is_transformers_5():
            from optimum.exporters.onnx import main_export  # noqa: F401
            from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer  # noqa: F401
    except ImportError as error:
        raise ImportError(f"this needs ONNX Runtime: pip install 'optimum-comp[{extra}]'. {error}") from error


def load_onnx(path: str | Path, threads: int | None = None, **kwargs: Any) -> Any:
    """`onnx.modeling.ORTModelForCausalLM` on the CPU; with transformers 5, which it doesn't run with, `PlainModel`.

    Graphs of this package run in it as it is (see `open_cache`); one of Optimum's own export may insist on heads and
    width of a cache that the class works out wrong, and they are corrected here.

    Args:
        path: an ONNX folder.
        threads: threads inside an operator; `None` leaves ONNX Runtime's default.
        kwargs: passed on to `from_pretrained`; `PlainModel` has no use for them.

    Raises:
        ImportError: the `onnxruntime` extra isn't installed; says how.
    """
    require_onnxruntime()
    if is_transformers_5():
        from optimum_comp.onnx.plain import PlainModel

        return PlainModel(path, threads)
    from onnxruntime import SessionOptions

    from optimum_comp.onnx.modeling import ORTModelForCausalLM

    options = SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(
        path, provider="CPUExecutionProvider", session_options=options, **kwargs
    )
    shape = model.input_shapes.get(f"{PAST}.0.key", ())
    if len(shape) == 4 and isinstance(shape[HEADS], int) and isinstance(shape[WIDTH], int):
        model.num_key_value_heads, model.embed_size_per_head = shape[HEADS], shape[WIDTH]
    return model


def open_session(model: str | bytes, threads: int | None = None) -> Any:
    """An ONNX Runtime session of a file or a model in memory, which says errors only.

    Args:
        model: path or content.
        threads: threads inside an operator; `None` leaves ONNX Runtime's default.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def multiplies_8_bits() -> bool:
    """Whether this processor multiplies int8 weights with 8-bit activations right.

    x86 without VNNI adds pairs of products in 16 bits, which stop at 32 767: too few for 255 · 127 twice.
    """
    from onnx import TensorProto, helper

    rows, columns = 16, 16
    node = helper.make_node("MatMulInteger", ["activation", "weight"], ["product"])
    # A constant, as weights are: those are packed for the processor's own instructions.
    weight = helper.make_tensor("weight", TensorProto.INT8, [rows, columns], [127] * rows * columns)
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("activation", TensorProto.UINT8, [1, rows])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, [1, columns])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(model.SerializeToString(), threads=1)
    (product,) = session.run(None, {"activation": np.full((1, rows), 255, np.uint8)})
    return bool((product == 255 * 127 * rows).all())


class GraphRunner:
    """An ONNX Runtime session of a decoder's graph.

    Args:
        path: the graph.
        threads: threads inside an operator; `None` leaves ONNX Runtime's default.

    Attributes:
        session: that runs it.
    """

    def __init__(self, path: Path, threads: int | None = None):
        self.session = open_session(str(path), threads)
        self._inputs = {each.name: each.shape for each in self.session.get_inputs()}
        self._outputs = {each.name: each.shape for each in self.session.get_outputs()}

    @property
    def input_names(self) -> list[str]:
        """What the graph takes."""
        return list(self._inputs)

    @property
    def cache_names(self) -> list[str]:
        """Inputs that hold what was read before."""
        return [name for name in self._inputs if name.startswith(PAST)]

    def run(
        self, tokens: Any, outputs: Sequence[str], given: Mapping[str, Any] | None = None, *, start: int = 0
    ) -> list[Any]:
        """Some of the graph's outputs.

        Args:
            tokens: array `[batch, length]`, int64.
            outputs: their names.
            given: values by name of the input: the cache, which is empty if not given, and weights that the graph
                takes as inputs.
            start: tokens that the cache holds.
        """
        feeds = dict(given or {})
        feeds |= {name: self._feed(name, tokens, start) for name in self._inputs if name not in feeds}
        found: list[Any] = self.session.run(list(outputs), feeds)
        return found

    def _feed(self, name: str, tokens: Any, start: int) -> Any:
        batch, length = tokens.shape
        if name == "input_ids":
            return tokens
        if name == "attention_mask":
            return np.ones((batch, start + length), np.int64)
        if name == "position_ids":
            return np.broadcast_to(np.arange(start, start + length), (batch, length)).copy()
        if name.startswith(PAST):
            return np.zeros((batch, self._size(name, HEADS), 0, self._size(name, WIDTH)), np.float32)
        raise ValueError(f"the graph has an input {name!r} that isn't known here.")

    def _size(self, name: str, place: int) -> int:
        """A dimension of a past, as the input or the output that continues it says."""
        for shape in (self._inputs[name], self._outputs.get(present_of(name))):
            if shape is not None and isinstance(shape[place], int):
                return int(shape[place])
        raise ValueError(f"the graph doesn't say the shape of its cache {name!r}.")


class CachedDecoder:
    """A decoder's graph that remembers what it has read, batch 1.

    Args:
        path: the graph.
    """

    def __init__(self, path: Path):
        self._runner = GraphRunner(path)
        self._cache: dict[str, Any] = {}
        self._read = 0

    def logits(self, tokens: Sequence[int]) -> Any:
        """Logits `[len(tokens), vocabulary]` of tokens that follow those that were read before."""
        names = self._runner.cache_names
        outputs = ["logits", *(present_of(name) for name in names)]
        logits, *cache = self._runner.run(np.array([tokens], np.int64), outputs, self._cache, start=self._read)
        self._cache = dict(zip(names, cache, strict=True))
        self._read += len(tokens)
        return logits[0]


def greedy_tokens(path: Path, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The tokens that ONNX Runtime generates with a decoder's graph, whatever they are.

    Args:
        path: the graph.
        prompt: token ids.
        new_tokens: how many to generate.
    """
    decoder = CachedDecoder(path)
    found: list[int] = []
    step = list(prompt)
    for _ in range(new_tokens):
        step = [int(decoder.logits(step)[-1].argmax())]
        found += step
    return found
