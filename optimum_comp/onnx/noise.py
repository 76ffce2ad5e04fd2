"""Messages of the exporter and the quantizers that tell the user nothing."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

import torch


# Logger -> what it says that is no news. Everything else goes through.
_KNOWN: dict[str, str] = {
    "transformers.configuration_utils": r"`torch_dtype` is deprecated",
    "transformers.modeling_utils": r"`torch_dtype` is deprecated",
    # A folder without a tokenizer is looked through for one.
    "transformers.models.llama.tokenization_llama_fast": r"You are using the default legacy behaviour",
    # Tied embeddings: the lines name both initializers, which are merged next.
    "optimum": r"Found different candidate ONNX initializers|\t\S+: \{",
    # A graph with fused attention counts positions itself.
    "optimum.onnxruntime.modeling_decoder": r"ORTModelForCausalLM loaded a legacy ONNX model with no `position_ids`",
    # A line for each of some thousand nodes.
    "onnxruntime.quantization.matmul_nbits_quantizer": r"skip to quantize|exclude to quantize|start to quantize"
    r"|MatMul doesn't have const weight|complete quantization",
    "root": r"Ignore MatMul due to|Please consider to run pre-processing before quantization",
}


class _Silence(logging.Filter):
    def __init__(self, pattern: str):
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Drop the known-harmless messages of export and quantization, and leave logging as it was.

    ONNX Runtime's quantizers configure the root logger, by import or by their first message; what they add is taken
    away again.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with contextlib.ExitStack() as stack:
        for name, pattern in _KNOWN.items():
            logger = root if name == "root" else logging.getLogger(name)
            silence = _Silence(pattern)
            logger.addFilter(silence)
            stack.callback(logger.removeFilter, silence)
        stack.enter_context(warnings.catch_warnings())
        # Branches on the past's length and on padding; the parity check covers both sides of them.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="Exporting aten::index operator of advanced indexing")
        # Optimum's exporter is built on it.
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", message="The feature will be removed. Please remove usage of this function")
        # ONNX Runtime's HQQ only reads the array.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            yield
        finally:
            for handler in set(root.handlers) - set(handlers):
                root.removeHandler(handler)
            root.setLevel(level)
