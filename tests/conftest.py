from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


# Before the libraries that read it when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the processor: threads of each would wait for the others'. Children inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split
import command_line
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from optimum_comp.onnx.runtime import require_onnxruntime


CLI = Path(sys.executable).parent / "optimum-cli"

# Vocabularies are no other size of a model, nor a multiple of one, and differ; ids below `VOCABULARY` are in all.
VOCABULARY = 128
SIZES = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GQA = {"intermediate_size": 96, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TINY_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **GQA, **IDS, tie_word_embeddings=True, rope_theta=50_000.0),
    "llama-untied": lambda: LlamaConfig(**{**SIZES, "vocab_size": 137}, **GQA, **IDS, mlp_bias=True),
    "mistral": lambda: MistralConfig(**{**SIZES, "vocab_size": 149}, **GQA, **IDS, sliding_window=8),
    "qwen2": lambda: Qwen2Config(
        **{**SIZES, "vocab_size": 150},
        **GQA,
        **IDS,
        use_sliding_window=True,
        max_window_layers=2,
        sliding_window=8,
        rope_theta=1e6,
    ),
    "opt": lambda: OPTConfig(**{**SIZES, "vocab_size": 211}, **IDS, ffn_dim=96, word_embed_proj_dim=64),
    "opt-post-norm": lambda: OPTConfig(
        **{**SIZES, "vocab_size": 163}, **IDS, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
}


def need_onnx() -> None:
    """Skip what needs the exporter where `make test-transformers5` says that there is none.

    Anywhere else its absence is an error, so that none is left out by mistake. Single tests are marked `onnx`; modules
    that hold nothing else call this before they import.
    """
    if os.environ.get("COMP_TEST_WITHOUT_ONNX"):
        pytest.skip("COMP_TEST_WITHOUT_ONNX is set", allow_module_level=True)
    require_onnxruntime()


def pytest_collection_finish() -> None:
    # Graphs are compared after a collection each, which would look through all that the libraries have made.
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("onnx"):
        need_onnx()


def run(*arguments: object, check: bool = True, alone: bool = False, **kwargs) -> subprocess.CompletedProcess[str]:
    """`optimum-cli comp` in a process of its own; `alone`, or with arguments of `subprocess`: as a user starts it."""
    command = [str(CLI), "comp", *map(str, arguments)]
    if alone or kwargs:
        done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder) / "stdout", Path(folder) / "stderr"
            status = command_line.start(command, *files)
            done = subprocess.CompletedProcess(command, status, *(path.read_text() for path in files))
    assert not check or done.returncode == 0, done.stderr
    return done


def run_until(said: str, *arguments: object) -> tuple[int, str]:
    """The same with a Ctrl-C as soon as it says something; its exit status, and what it says after that."""
    # A shell that runs the tests in the background has its children ignore SIGINT; a user's terminal doesn't.
    process = subprocess.Popen(
        [str(CLI), "comp", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        seen = ""
        while said not in seen:
            seen += process.stderr.read(1)
            assert process.poll() is None, seen
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, rest


def tiny_model(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(TINY_CONFIGS[name]())
    # Random biases too: freshly made ones are zero, and a slice of the wrong rows wouldn't show.
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_blocks(samples: int = 16, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    vocabulary["\n"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    )


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of chains are measured in this process: by the same function, which needn't import everything anew."""
    from optimum_comp import frontier
    from optimum_comp.evaluation import evaluate
    from optimum_comp.stages import chain

    for module in (chain, frontier):
        monkeypatch.setattr(module, "evaluate_apart", evaluate)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint with tokenizer and generation config."""
    folder = tmp_path / "tiny-llama"
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder that `make test-slow` downloads the real model to."""
    folder = os.environ.get("COMP_TEST_MODEL")
    if not folder:
        pytest.skip("COMP_TEST_MODEL is not set: run `make test-slow`")
    return Path(folder)


@pytest.fixture(scope="session")
def first_layers(real_model, tmp_path_factory) -> Path:
    """The real model's first eight layers: its sizes and its files, for what is made many times over."""
    folder = tmp_path_factory.mktemp("first-layers") / "model"
    model = AutoModelForCausalLM.from_pretrained(real_model)
    model.model.layers = model.model.layers[:8]
    model.config.num_hidden_layers = 8
    model.save_pretrained(folder)
    for path in real_model.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder
