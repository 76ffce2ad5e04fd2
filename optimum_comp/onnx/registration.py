"""Model types that Optimum's exporter doesn't know, or traces with a cache of the wrong shape."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def register_families() -> None:
    """Tell Optimum's exporter how to export them, once in a process.

    - `starcoder2`, which it lacks, has the inputs of a Llama.
    - `phi` with grouped queries, or heads of another width than hidden size / heads: its example of a cache has all
      heads and that width.
    - `falcon` of the new architecture with grouped queries: its example has the groups; the model caches every head.

    Raises:
        ImportError: the `onnxruntime` extra isn't installed.
    """
    from optimum.exporters.onnx.model_configs import (
        COMMON_TEXT_GENERATION_TASKS,
        FalconOnnxConfig,
        LlamaOnnxConfig,
        PhiOnnxConfig,
    )
    from optimum.exporters.tasks import TasksManager
    from optimum.utils import (
        DummyTextInputGenerator,
        FalconDummyPastKeyValuesGenerator,
        MistralDummyPastKeyValuesGenerator,
    )

    class EveryHeadOfFalcon(FalconDummyPastKeyValuesGenerator):
        def __init__(self, task: str, normalized_config: Any, **kwargs: Any):
            super().__init__(task, normalized_config, **kwargs)
            if normalized_config.new_decoder_architecture:
                self.num_kv_heads = self.num_attention_heads

    class Starcoder2OnnxConfig(LlamaOnnxConfig):
        pass

    class GroupedPhiOnnxConfig(PhiOnnxConfig):
        DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator)
        DUMMY_PKV_GENERATOR_CLASS = MistralDummyPastKeyValuesGenerator

    class GroupedFalconOnnxConfig(FalconOnnxConfig):
        DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, EveryHeadOfFalcon)
        DUMMY_PKV_GENERATOR_CLASS = EveryHeadOfFalcon

    # An exporter that has learnt a type keeps its own way.
    TasksManager.create_register("onnx")("starcoder2", *COMMON_TEXT_GENERATION_TASKS)(Starcoder2OnnxConfig)
    replace = TasksManager.create_register("onnx", overwrite_existing=True)
    replace("phi", *COMMON_TEXT_GENERATION_TASKS)(GroupedPhiOnnxConfig)
    replace("falcon", *COMMON_TEXT_GENERATION_TASKS)(GroupedFalconOnnxConfig)
