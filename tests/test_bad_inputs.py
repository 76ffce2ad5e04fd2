"""What users get wrong is refused in a line that says what it is and what to do, and nothing is written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_blocks, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum.commands.base import RootOptimumCLICommand
from optimum.commands.optimum_cli import register_optimum_cli_subcommand
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, LlamaModel

from optimum_comp import CompConfig, CompPruner
from optimum_comp.bundle import MANIFEST, verify_bundle
from optimum_comp.calibration.text import prepare_calibration
from optimum_comp.commands.comp import CompCommand
from optimum_comp.configuration import FIELDS
from optimum_comp.evaluation import Settings, evaluate
from optimum_comp.files import JOURNAL, atomic_folder
from optimum_comp.onnx.search import Budget
from optimum_comp.options import options_of, parse_bytes


SMALL = {"sparsity": 0.3, "num_samples": 4, "sequence_length": 32, "round_to": 8}
TEXT = "The cat sat on the mat and looked at the moon.\n" * 40
NAN, INF = float("nan"), float("inf")
_LONGEST, _MOST_LINES = 1200, 4
HINT = re.compile(
    r"must |[Gg]ive |[Cc]hoose |[Tt]ake |[Gg]et |[Ss]et |[Ll]eave |[Gg]o on|[Nn]ame the|Fields: |lower it|start anew|"
    r"needs |supported|COMP prunes|can't be |is damaged|is missing|is not|isn't|holds no|has no|holds the|"
    r"is (a file|inside|also)|required|unrecognized|more than|fewer|manifest|anew|may not|by config.json|they are|"
    r"--overwrite"
)
"""What tells what is right: what is allowed, or what to do."""


def params(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


def tree(root: Path) -> dict[str, Any]:
    """All that is in a folder: names, sizes and times of files, names of folders."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[str(path.relative_to(root))] = None if is_folder else (status.st_size, status.st_mtime_ns)
    return found


def require_clear(message: str, *wanted: str) -> None:
    """A message is short and holds what is wanted, patterns of the value and of what to do."""
    lines = message.splitlines()
    assert message and len(message) <= _LONGEST and len(lines) <= _MOST_LINES, message
    assert HINT.search(message), f"nothing tells what is right: {message}"
    assert "Traceback" not in message and all(line.isprintable() for line in lines), message
    for pattern in wanted:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"


def require_refused(call: Callable[[], Any], root: Path, *wanted: str) -> None:
    """A call is refused by this package's own words, and leaves a folder as it was."""
    before = tree(root)
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    # Errors of another library's own kind carry its words.
    assert type(caught.value).__module__.split(".")[0] in ("builtins", "optimum_comp"), repr(caught.value)
    assert not isinstance(caught.value, UnicodeError), repr(caught.value)
    require_clear(str(caught.value), *wanted)
    assert tree(root) == before


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny checkpoint in two files; to be copied."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, dense, monkeypatch) -> Path:
    """A working folder with a model and a text."""
    shutil.copytree(dense, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NO_NUMBER = {
    "text": "0.2",
    "nothing": None,
    "true": True,
    "list": [1],
    "dictionary": {"a": 1},
    "bytes": b"1",
    "complex": 1j,
    "numpy text": np.str_("0.2"),
    "numpy array": np.array([0.1, 0.2]),
    "tensor": torch.tensor(0.2),
    "decimal": Decimal("0.2"),
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
    "numpy nan": np.float32("nan"),
    "long text": "0.2" * 5000,
    "text with lines": "0.2\n\x1b[2J",
}
NO_FRACTION = {
    "negative": -0.1,
    "above": 1.5,
    "far above": 1e308,
    "huge integer": 10**400,
    "-huge": Fraction(-(10**400)),
}
NO_INTEGER = {"half": 1.5, "whole float": 4.0, "negative": -1, "numpy float": np.float64(4), "too large": 2**63}
NO_WORD = {
    "another": "maybe",
    "empty": "",
    "case": "{0}".upper(),
    "nothing": None,
    "number": 3,
    "true": True,
    "list": ["auto"],
    "bytes": b"auto",
    "space": " none ",
    "long": "x" * 100_000,
    "lines": "a\nb\x1b[2J",
}
NO_BOOLEAN = {
    "one": 1,
    "zero": 0,
    "text": "true",
    "nothing": None,
    "numpy": np.bool_(True),
    "list": [True],
    "nan": NAN,
}
FRACTIONS = ("sparsity", "layer_fraction", "attention_fraction", "alignment", "ridge")
INTEGERS = ("elimination_block", "num_samples", "sequence_length", "round_to", "seed")
WORDS = ("allocation", "layer_metric", "neuron_metric", "error_norm", "recovery", "begin")
BOOLEANS = ("bridge", "equalize")
OTHERS = [
    ("axes", []),
    ("axes", "ffn"),
    ("axes", ["ffn", "ffn"]),
    ("axes", ["vocab"]),
    ("axes", [["ffn"]]),
    ("axes", [3]),
    ("axes", None),
    ("axes", {"ffn": 1}),
    ("axes", ["x" * 10_000]),
    ("protected_layers", "0"),
    ("protected_layers", 0),
    ("protected_layers", None),
    ("protected_layers", [0.5]),
    ("protected_layers", ["0"]),
    ("protected_layers", [True]),
    ("protected_layers", [None]),
    ("protected_layers", [[0]]),
    ("protected_layers", {0: 1}),
    ("sparsity", 0),
    ("sparsity", 1),
    ("ridge", 0),
    ("num_samples", 0),
    ("sequence_length", 1),
    ("round_to", 0),
]
CONFIG_CASES = {
    f"{field}-{name}": (field, value)
    for fields, kinds in (
        (FRACTIONS, {**NO_NUMBER, **NO_FRACTION}),
        (INTEGERS, {**NO_NUMBER, **NO_INTEGER}),
        (WORDS, NO_WORD),
        (BOOLEANS, NO_BOOLEAN),
    )
    for field in fields
    for name, value in kinds.items()
} | {f"{field}-{number}": (field, value) for number, (field, value) in enumerate(OTHERS)}


def test_every_field_is_given_wrongly():
    assert {field for field, _ in CONFIG_CASES.values()} == set(FIELDS)


def named(field: str, value: Any) -> str:
    """A pattern of a value in an error, as much of it as a line has room for."""
    return "^" + re.escape(f"{field}={value!r}"[:60])


@params(CONFIG_CASES)
def test_config(case, tmp_path):
    field, value = case
    wanted = (named(field, value), rf"is not valid: {field} must be ")
    require_refused(lambda: CompConfig(**{field: value}), tmp_path, *wanted)
    require_refused(lambda: CompConfig.from_preset("fasp", **{field: value}), tmp_path, *wanted)


@params(
    {
        "too much of both": {"layer_fraction": 0.6, "attention_fraction": 0.5},
        "attention of neurons": {"attention_fraction": 0.5, "axes": ["ffn"]},
        "unknown": {"sparsty": 0.2},
        "unknown and long": {"s" * 10_000: 0.2},
        "unknown and wild": {"a\nb\x1b[2J": 0.2},
    }
)
def test_config_fields_together(case, tmp_path):
    require_refused(lambda: CompConfig(**case), tmp_path, r"must be|Fields: sparsity,")


@params(
    {
        "no JSON": "{",
        "empty": "",
        "list": "[]",
        "number": "3",
        "null": "null",
        "nan": '{"sparsity": NaN}',
        "infinity": '{"sparsity": -Infinity}',
        "text": '{"sparsity": "0.2"}',
        "unknown": '{"sparsty": 0.2}',
        "binary": b"\xff\xfe\x00",
        "deep": "[" * 100_000,
        "huge": '{"seed": 1' + "0" * 4000 + "}",
    }
)
def test_stored_config(case, tmp_path):
    content = case if isinstance(case, bytes) else case.encode()
    (tmp_path / "comp_config.json").write_bytes(content)
    require_refused(lambda: CompConfig.from_pretrained(tmp_path), tmp_path, r"comp_config.json|sparsity|sparsty|seed")


SETTINGS_CASES = {
    f"{field}-{name}": (field, value)
    for fields, kinds in (
        (
            ("window", "new_tokens", "prompt_tokens", "long_prompt_tokens", "repeats"),
            {**NO_NUMBER, **NO_INTEGER},
        ),
        (
            ("max_tokens", "threads"),
            {name: value for name, value in {**NO_NUMBER, **NO_INTEGER}.items() if value is not None},
        ),
        (("begin",), NO_WORD),
        (
            ("text", "text_column"),
            {"number": 3, "empty": "", "list": ["a"], "true": True, "bytes": b"a", "blank": " "},
        ),
        (
            ("prompts",),
            {"text": "Hi", "number": 3, "numbers": [3], "nothing": None, "bytes": b"Hi", "dict": {"Hi": 1}},
        ),
        (("begins_with",), {"text": "1", "number": 1, "halves": [0.5], "texts": ["1"]}),
    )
    for field in fields
    for name, value in kinds.items()
} | {"window-1": ("window", 1), "repeats-0": ("repeats", 0), "threads-0": ("threads", 0), "new-1": ("new_tokens", 1)}


def test_every_setting_is_given_wrongly():
    assert {field for field, _ in SETTINGS_CASES.values()} == set(options_of(Settings))


@params(SETTINGS_CASES)
def test_measuring(case, tmp_path):
    field, value = case
    require_refused(lambda: Settings(**{field: value}), tmp_path, named(field, value), rf"{field} must be ")


def test_less_text_than_a_window(tmp_path):
    require_refused(lambda: Settings(max_tokens=5), tmp_path, "max_tokens=5", "one window takes 512")


@params(
    {
        "none": (),
        "zero": (0.0,),
        "negative": (-0.1,),
        "nan": (NAN,),
        "infinite": (INF,),
        "text": ("much",),
        "true": (True,),
        "size zero": (None, 0),
        "size negative": (None, -5),
        "size text": (None, "much"),
        "size half": (None, 1.5),
        "size nan": (None, NAN),
    }
)
def test_budgets(case, tmp_path):
    wanted = r"needs a largest" if not case else re.escape(repr(case[-1]))
    require_refused(lambda: Budget(*case), tmp_path, wanted, r"give |must be |needs ")


SIZES = [
    "",
    " ",
    "much",
    "-1GB",
    "0",
    "0GB",
    "4XB",
    "1e9",
    "nan",
    "inf",
    "4 4GB",
    "GB",
    "4GBB",
    "1,5GB",
    "4GB\n4",
    None,
]
SIZES += [True, 1.5, -1, 0, [4], b"4GB", "9" * 5000, "0.0000000001"]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: repr(size)[:20])
def test_sizes(size, tmp_path):
    require_refused(lambda: parse_bytes(size, "max_size"), tmp_path, r"^max_size=", r"give a size like 4GB")


PRUNING = {
    "batch_size zero": ({"batch_size": 0}, "batch_size=0"),
    "batch_size half": ({"batch_size": 1.5}, "batch_size=1.5"),
    "batch_size text": ({"batch_size": "4"}, "batch_size='4'"),
    "batch_size true": ({"batch_size": True}, "batch_size=True"),
    "max_memory text": ({"max_memory": "much"}, "max_memory='much'"),
    "max_memory little": ({"max_memory": "50MB"}, "50.0 MB"),
    "max_memory negative": ({"max_memory": -1}, "max_memory=-1"),
    "max_shard_size text": ({"max_shard_size": "much"}, "max_shard_size='much'"),
    "max_shard_size zero": ({"max_shard_size": 0}, "max_shard_size=0"),
    "max_shard_size nothing": ({"max_shard_size": None}, "max_shard_size=None"),
    "matmul_dtype": ({"matmul_dtype": "fp8"}, "matmul_dtype='fp8'"),
    "matmul_dtype type": ({"matmul_dtype": torch.float32}, "matmul_dtype=torch.float32"),
    "record": ({"record": {"a": NAN}}, "record="),
    "record list": ({"record": [1, 2]}, "record="),
    "config": ({"config": {"sparsity": 0.3}}, "config="),
    "config path": ({"config": "comp"}, "config='comp'"),
    "layers that aren't": ({"config": CompConfig(protected_layers=[0, 9])}, r"protected_layers=\[0, 9\]"),
    "too much": ({"config": CompConfig(sparsity=0.99)}, "0.99|sparsity"),
    "too coarse": ({"config": CompConfig(round_to=10**9)}, "1000000000|1,000,000,000"),
    "more text than there is": ({"config": CompConfig(num_samples=10**9)}, "num_samples=1000000000|memory"),
    "longer than the model reads": ({"config": CompConfig(sequence_length=10**6)}, "sequence_length=1000000|memory"),
    "resume without an output": ({"resume": True, "output": None}, "resume needs the output"),
}


@params(PRUNING)
def test_prune(case, place):
    arguments, wanted = case
    pruner = CompPruner.from_pretrained("model")
    asked = {"config": CompConfig(**SMALL), "calibration": "text.txt", "output": "out", **arguments}
    require_refused(lambda: pruner.prune(**asked), place, wanted)


def quantized_config(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes: Any) -> None:
    weights = {**load_file(folder / "model.safetensors"), **{n.replace("__", "."): v for n, v in changes.items()}}
    save_file({n: v for n, v in weights.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def other_kind(folder: Path, model_type: str, **fields: Any) -> None:
    CONFIG_MAPPING[model_type](**fields).save_pretrained(folder)


def index(folder: Path, place: Any, tensor: str = "model.norm.weight") -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-1.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder.parent / "secret.safetensors").write_bytes(b"")
    written = {**dict.fromkeys(weights, "model-1.safetensors"), tensor: place}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": written}))


UP = "model__layers__2__mlp__up_proj__weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no folder .*model"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "model"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config empty": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config null": (lambda f: (f / "config.json").write_text("null"), "config.json"),
    "config a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json"),
    "config without type": (lambda f: (f / "config.json").write_text("{}"), "model_type|config.json"),
    "type unknown": (lambda f: edit_json(f / "config.json", model_type="llamma"), "llamma"),
    "type a number": (lambda f: edit_json(f / "config.json", model_type=3), "model_type|config.json"),
    "type null": (lambda f: edit_json(f / "config.json", model_type=None), "model_type|config.json"),
    "bert": (lambda f: other_kind(f, "bert"), "model_type='bert' has no family spec"),
    "t5": (lambda f: other_kind(f, "t5"), "encoder-decoder"),
    "bart": (lambda f: other_kind(f, "bart"), "encoder-decoder"),
    "mixtral": (lambda f: other_kind(f, "mixtral"), "mixture of experts"),
    "mamba": (lambda f: other_kind(f, "mamba"), "no attention"),
    "quantized": (quantized_config, "quantized already"),
    "layers a word": (
        lambda f: edit_json(f / "config.json", num_hidden_layers="four"),
        "num_hidden_layers|config.json",
    ),
    "layers negative": (lambda f: edit_json(f / "config.json", num_hidden_layers=-1), "num_hidden_layers|config.json"),
    "no layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=0), "num_hidden_layers|config.json|layers"),
    "more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=9), r"layers\.4\..* is missing"),
    "hidden size zero": (lambda f: edit_json(f / "config.json", hidden_size=0), "hidden_size|config.json|shape"),
    "heads zero": (lambda f: edit_json(f / "config.json", num_attention_heads=0), "num_attention_heads|config.json"),
    "heads odd": (
        lambda f: edit_json(f / "config.json", num_attention_heads=5),
        "num_attention_heads|config.json|shape",
    ),
    "groups odd": (
        lambda f: edit_json(f / "config.json", num_key_value_heads=3),
        "num_key_value_heads|config.json|shape",
    ),
    "activation unknown": (lambda f: edit_json(f / "config.json", hidden_act="silly"), "silly"),
    "vocabulary other": (
        lambda f: edit_json(f / "config.json", vocab_size=99),
        r"embed_tokens.weight has shape \[\d+, 64\]",
    ),
    "width other": (
        lambda f: edit_json(f / "config.json", intermediate_size=97),
        r"shape \[96, 64\]|shape \[64, 96\]",
    ),
    "rope unknown": (
        lambda f: edit_json(f / "config.json", rope_scaling={"rope_type": "twist", "factor": 2.0}),
        "rope_type='twist'|twist",
    ),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is not a whole"),
    "weights a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "holds no weights",
    ),
    "weights truncated": (lambda f: cut(f / "model.safetensors", 99_999), "model.safetensors is not a whole"),
    "weights cut in the header": (lambda f: cut(f / "model.safetensors", 99), "model.safetensors is not a whole"),
    "weights of a web page": (
        lambda f: (f / "model.safetensors").write_text("<!doctype html><p>404"),
        "model.safetensors is not a whole",
    ),
    "weights that git-lfs stands in for": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors is not a whole",
    ),
    "header longer than the file": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "model.safetensors is not a whole",
    ),
    "offsets reversed": (
        lambda f: edit_header(f, lambda h: h["model.norm.weight"]["data_offsets"].reverse()),
        "model.safetensors is not a whole",
    ),
    "shape of the header": (
        lambda f: edit_header(f, lambda h: h["model.norm.weight"].update(shape=[2**40])),
        "model.safetensors is not a whole",
    ),
    "dtype of the header": (
        lambda f: edit_header(f, lambda h: h["model.norm.weight"].update(dtype="F33")),
        "model.safetensors is not a whole",
    ),
    "tensor missing": (lambda f: edit_weights(f, **{UP: None}), "layers.2.mlp.up_proj.weight is missing"),
    "tensor int8": (lambda f: edit_weights(f, **{UP: torch.zeros(96, 64, dtype=torch.int8)}), "has dtype I8"),
    "tensor float8": (lambda f: edit_weights(f, **{UP: torch.zeros(96, 64).to(torch.float8_e4m3fn)}), "dtype F8"),
    "tensor of another shape": (lambda f: edit_weights(f, **{UP: torch.zeros(7, 64)}), r"has shape \[7, 64\]"),
    "tensor of other dimensions": (lambda f: edit_weights(f, **{UP: torch.zeros(96 * 64)}), r"has shape \[6144\]"),
    "tensor nan": (lambda f: edit_weights(f, **{UP: torch.full((96, 64), NAN)}), "up_proj.weight holds NaN"),
    "tensor inf": (lambda f: edit_weights(f, **{UP: torch.full((96, 64), -INF)}), "up_proj.weight holds NaN"),
    "index above": (lambda f: index(f, "../secret.safetensors"), "outside the model's folder"),
    "index absolute": (lambda f: index(f, "/etc/passwd"), "outside the model's folder"),
    "index below": (lambda f: index(f, "sub/model.safetensors"), "outside the model's folder"),
    "index backslash": (lambda f: index(f, "..\\secret.safetensors"), "outside the model's folder"),
    "index empty": (lambda f: index(f, ""), "outside the model's folder"),
    "index null": (lambda f: index(f, None), "model.norm.weight in 'None'"),
    "index pickle": (lambda f: index(f, "pytorch_model.bin"), "isn't a safetensors file"),
    "index long": (lambda f: index(f, "a" * 5000 + ".safetensors"), "is missing: model.safetensors.index.json"),
    "index wild": (lambda f: index(f, "a\n\x1b[2J.safetensors"), "is missing: model.safetensors.index.json"),
    "shard missing": (lambda f: index(f, "model-2.safetensors"), "model-2.safetensors is missing"),
    "shard without its tensor": (lambda f: index(f, "model-1.safetensors", "a.b"), "holds a.b, which it doesn't"),
    "shard a folder": (
        lambda f: (index(f, "model-2.safetensors"), (f / "model-2.safetensors").mkdir()),
        "model-2.safetensors is missing",
    ),
    "index not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "index.json is damaged",
    ),
    "index a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json is damaged"),
    "index deep": (
        lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000),
        "index.json is damaged",
    ),
    "index binary": (lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff"), "index.json is damaged"),
    "index that names nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "index.json",
    ),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer"),
    "tokenizer a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer"),
    "tokenizer binary": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\x00"), "tokenizer"),
    "tokenizer config not JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer"),
    "tokenizer config a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    "tokenizer class unknown": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="NoTokenizer"),
        "tokenizer|NoTokenizer",
    ),
    "tokenizer of more tokens": (lambda f: edit_json(f / "config.json", vocab_size=64), "vocab|shape"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("*token*")], "needs a tokenizer"),
    "generation config not JSON": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config"),
    "generation config a list": (lambda f: (f / "generation_config.json").write_text("[]"), "generation_config"),
    "unfinished": (lambda f: (f / JOURNAL).write_text("{}"), "is unfinished"),
}


if version("transformers").split(".")[0] != "4":
    # From 5 on, transformers reads tokenizer.json whatever class is named.
    del CHECKPOINTS["tokenizer class unknown"]


@params(CHECKPOINTS)
def test_checkpoints(case, place):
    damage, wanted = case
    damage(place / "model")

    def prune() -> None:
        pruner = CompPruner.from_pretrained("model")
        pruner.prune(CompConfig(**SMALL), "text.txt", output="out")

    require_refused(prune, place, wanted)


OPENING: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": "gpu"}, "device='gpu'"),
    "device number": ({"device": "cuda:99"}, "device='cuda:99'"),
    "device other": ({"device": "mps"}, "device='mps'"),
    "device meta": ({"device": "meta"}, "device='meta'"),
    "device empty": ({"device": ""}, "device=''"),
    "device a list": ({"device": ["cpu"]}, "device="),
    "device negative": ({"device": -1}, "device=-1"),
    "dtype": ({"dtype": "float7"}, "dtype='float7'"),
    "dtype of integers": ({"dtype": torch.int8}, "dtype=torch.int8"),
    "dtype a number": ({"dtype": 16}, "dtype=16"),
    "dtype empty": ({"dtype": ""}, "dtype=''"),
    "dtype a function": ({"dtype": "randn"}, "dtype='randn'"),
    "old dtype": ({"torch_dtype": "float7"}, "dtype='float7'"),
    "gguf file": ({"gguf_file": "missing.gguf"}, "missing.gguf"),
    "gguf file above": ({"gguf_file": "../secret.gguf"}, "secret.gguf"),
    "subfolder": ({"subfolder": "missing"}, "missing"),
    "attention": ({"attn_implementation": "no_attention"}, "no_attention"),
    "argument": ({"no_such_argument": 3}, "no_such_argument"),
    "tokenizer": ({"tokenizer": "missing-folder/tokenizer"}, "missing-folder"),
    "tokenizer a number": ({"tokenizer": 3}, "tokenizer=3"),
    "tokenizer a folder without one": ({"tokenizer": "."}, "tokenizer"),
    "config": ({"config": "missing.json"}, "missing.json"),
}


@params(OPENING)
def test_opening(case, place):
    arguments, wanted = case
    require_refused(lambda: CompPruner.from_pretrained("model", **arguments), place, wanted)


@params(
    {
        "no folder": ("missing/folder/model", "there is no folder missing/folder/model"),
        "path": ("./missing", r"there is no folder ./missing"),
        "empty": ("", "model=''|there is no folder"),
        "blank": (" ", "there is no folder"),
        "dots": ("..", "config.json"),
        "nothing": (None, "model=None|there is no folder None|None"),
        "number": (7, "model=7|7"),
        "url": ("https://example.com/model", "there is no folder https"),
        "long": ("a" * 5000, "there is no folder a"),
        "wild": ("a\n\x1b[2J", "there is no folder"),
        "nul": ("a\0b", "there is no folder"),
        "hub without a network": ("nobody/no-such-model", "nobody/no-such-model"),
        "text file": ("text.txt", "text.txt"),
        "list": (["model"], "model"),
    }
)
def test_names_of_models(case, place):
    name, wanted = case
    require_refused(lambda: CompPruner.from_pretrained(name), place, wanted)
    require_refused(lambda: evaluate(name, Settings(prompt_tokens=0)), place, wanted)


def test_a_module_that_is_no_language_model(tmp_path):
    for module in (LlamaModel(tiny_model("llama").config), torch.nn.Linear(2, 2)):
        require_refused(
            lambda each=module: CompPruner.from_pretrained(each), tmp_path, "is not a causal language model"
        )


def rows(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


CALIBRATIONS: dict[str, tuple[Any, str]] = {
    "missing": ("missing.txt", "'missing.txt' does not exist"),
    "missing path": (Path("nowhere/missing.jsonl"), "missing.jsonl"),
    "folder": ("model", "'model' is a folder"),
    "empty": ((".txt", b""), "is empty"),
    "blank": ((".txt", b" \n\t\n"), "no text"),
    "binary": ((".txt", bytes(range(256))), "not UTF-8"),
    "utf-16": ((".txt", TEXT.encode("utf-16")), "not UTF-8"),
    "short": ((".txt", b"Too short."), "too short for calibration.*Give more text"),
    "broken.jsonl": ((".jsonl", b'{"text": "a"}\n{"text": '), "can't be read as json"),
    "binary.jsonl": ((".jsonl", b"\xff\xfe\x00\x01"), "can't be read as json"),
    "empty.jsonl": ((".jsonl", b""), "is empty"),
    "blank.jsonl": ((".jsonl", b"\n\n"), "bad.jsonl"),
    "number.jsonl": ((".jsonl", b'{"text": 3}\n'), "holds int where text is wanted"),
    "null.jsonl": ((".jsonl", b'{"text": null}\n'), "holds no text"),
    "list.jsonl": ((".jsonl", b'{"text": ["a", "b"]}\n'), "holds list where text is wanted"),
    "column.jsonl": ((".jsonl", b'{"body": "a"}\n'), "no column 'text'; it has: body"),
    "scalars.jsonl": ((".jsonl", b"1\n2\n"), "bad.jsonl"),
    "array.json": ((".json", b"[1, 2]"), "bad.json"),
    "column.csv": ((".csv", b"body,id\na,1\n"), "no column 'text'; it has: body, id"),
    "header.csv": ((".csv", b"text\n"), "bad.csv"),
    "ragged.csv": ((".csv", b'text\n"a\nb,c,d\n'), "bad.csv"),
    "binary.csv": ((".csv", b"\xff\xfe\x00\x01,\n\x00"), "bad.csv"),
    "number.csv": ((".csv", b"text\n1\n2\n"), "holds int where text is wanted"),
    "broken.parquet": ((".parquet", b"PAR1 and nothing else"), "can't be read as parquet"),
    "empty.parquet": ((".parquet", b""), "is empty"),
    "upper case": ((".JSONL", b'{"text": '), "can't be read as json"),
    "floats": (torch.rand(4, 32), "integer tensor"),
    "one dimension": (torch.zeros(400, dtype=torch.int64), "integer tensor"),
    "three dimensions": (torch.zeros(4, 32, 2, dtype=torch.int64), "integer tensor"),
    "few blocks": (tiny_blocks(2, 32), "fewer than num_samples=4"),
    "short blocks": (tiny_blocks(4, 16), "sequence_length=32"),
    "tokens that the model hasn't": (tiny_blocks(4, 32) + 128, "the model knows 0 to"),
    "negative tokens": (tiny_blocks(4, 32) - 100, "the model knows 0 to"),
    "true and false": (torch.ones(4, 32, dtype=torch.bool), "integer tensor"),
    "list of numbers": ([1, 2, 3], "list.* is not understood"),
    "list of nothing": ([], "holds no text"),
    "list of empty texts": (["", " "], "holds no text"),
    "list of mixed": (["a", 3], "list.* is not understood"),
    "array": (np.zeros((4, 32), dtype=np.int64), "ndarray.* is not understood"),
    "number": (3, "int.* is not understood"),
    "bytes": (b"text", "bytes.* is not understood"),
    "dictionary": ({"text": "a"}, "dict.* is not understood"),
    "dataset without the column": (rows(body=["a"]), "no column 'text'; it has: body"),
    "dataset of numbers": (rows(text=[1, 2]), "holds int where text is wanted"),
    "dataset of nothing": (rows(text=[]), "holds no text"),
    "dataset on no hub": ("nobody/no-such-dataset", "'nobody/no-such-dataset' is neither a file here nor a dataset"),
    "dataset's name nonsense": ("::::", "'::::' is neither a file here nor a dataset"),
    "empty name": ("", "''"),
    "wild name": ("a\n\x1b[2J", "neither a file"),
    "long name": ("a" * 5000, "neither a file"),
    "nul in the name": ("a\0b", "neither a file"),
}


@params(CALIBRATIONS)
def test_calibration(case, place):
    source, wanted = case
    if isinstance(source, tuple):
        suffix, content = source
        source = f"bad{suffix}"
        (place / source).write_bytes(content)
    pruner = CompPruner.from_pretrained("model")
    require_refused(lambda: pruner.prune(CompConfig(**SMALL), source, output="out"), place, wanted)


@params(
    {
        "more than the context": (
            {"sequence_length": 4096, "model": tiny_model("llama")},
            "more than the 2048 tokens",
        ),
        "no tokenizer": ({"tokenizer": None}, "needs a tokenizer"),
        "self without a model": ({"source": "self"}, "needs the model"),
        "column": ({"source": rows(text=["a"]), "text_column": "body"}, "no column 'body'"),
    }
)
def test_preparing(case, tmp_path):
    changes, wanted = case
    base = {"source": [TEXT], "model": None, "tokenizer": tiny_tokenizer(), "num_samples": 4, "sequence_length": 32}
    require_refused(lambda: prepare_calibration(**{**base, **changes}), tmp_path, wanted)


def unfinished(place: Path, content: str | bytes) -> None:
    (place / "out").mkdir()
    (place / "out" / JOURNAL).write_bytes(content if isinstance(content, bytes) else content.encode())


@params(
    {
        "not JSON": "{",
        "empty": "",
        "a list": "[]",
        "null": "null",
        "binary": b"\xff\x00",
        "without its format": "{}",
        "of another version": '{"format": 99}',
        "deep": "[" * 100_000,
    }
)
def test_journals(case, place):
    unfinished(place, case)
    pruner = CompPruner.from_pretrained("model")
    call = lambda: pruner.prune(CompConfig(**SMALL), "text.txt", output="out", resume=True)  # noqa: E731
    require_refused(call, place, r"\bout\b", "start anew with --overwrite")


ABC = hashlib.sha256(b"abc").hexdigest()


def manifest(path: Any = "a.txt", size: Any = 3, digest: Any = ABC, **changes: Any) -> dict[str, Any]:
    good = {"format": "optimum-comp-bundle", "format_version": 1, "target": "any", "recipe": {}, "notes": []}
    files = [{"path": path, "bytes": size, "sha256": digest}]
    return {**good, "files": files, "total_bytes": size, "genai": {"graph": path, "agrees": None}, **changes}


MANIFESTS: dict[str, tuple[Any, str]] = {
    "missing": (None, "has no manifest.json"),
    "not JSON": ("{", "manifest.json is damaged"),
    "empty": ("", "manifest.json is damaged"),
    "a list": ([], "manifest.json is damaged"),
    "null": ("null", "manifest.json is damaged"),
    "binary": (b"\xff\x00", "manifest.json is damaged"),
    "deep": ("[" * 100_000, "manifest.json is damaged"),
    "format": (manifest(format="zip"), "not of the format optimum-comp-bundle"),
    "version": (manifest(format_version=2), "format version 2; this package reads 1"),
    "files a number": (manifest(files=3), "manifest.json is damaged"),
    "file a text": (manifest(files=["a.txt"]), "manifest.json is damaged"),
    "above": (manifest("../text.txt"), "'../text.txt', which is not in the bundle"),
    "absolute": (manifest("/etc/passwd"), "'/etc/passwd', which is not in the bundle"),
    "path a number": (manifest(3), "manifest.json is damaged"),
    "path with nul": (manifest("a\0b"), "is missing|is damaged|not in the bundle"),
    "path long": (manifest("a" * 5000), "is missing|is damaged|not in the bundle|can't be read"),
    "file missing": (manifest("b.txt"), "b.txt is missing"),
    "file of another size": (manifest(size=5), "a.txt has 3 bytes; the manifest says 5"),
    "file of another digest": (manifest(digest="0" * 64), "a.txt differs from what the manifest says"),
    "file not listed": (manifest(), "b.onnx is not in the manifest"),
    "graph not listed": (manifest(genai={"graph": "b.onnx", "agrees": None}), "'b.onnx', which GenAI runs, is not"),
    "total": (manifest(total_bytes=9), "total_bytes"),
}


@params(MANIFESTS)
def test_manifests(case, tmp_path):
    content, wanted = case
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.onnx").touch()
    if content is not None:
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (tmp_path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    require_refused(lambda: verify_bundle(tmp_path), tmp_path, wanted)


def filled(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")


def is_superuser() -> bool:
    return getattr(os, "geteuid", lambda: 1)() == 0


OUTPUTS: dict[str, tuple[Callable[[Path], Any], str, dict[str, Any], str]] = {
    "a file": (lambda p: (p / "out").write_text("x"), "out", {}, "out is a file"),
    "a file to overwrite": (lambda p: (p / "out").write_text("x"), "out", {"overwrite": True}, "out is a file"),
    "a model": (lambda p: filled(p / "out", "config.json"), "out", {}, "out exists and isn't empty.*--overwrite"),
    "documents": (lambda p: filled(p / "out", "thesis.tex"), "out", {}, "out exists and isn't empty"),
    "documents to overwrite": (
        lambda p: filled(p / "out", "thesis.tex"),
        "out",
        {"overwrite": True},
        "out isn't replaced.*doesn't look like a model",
    ),
    "hidden documents": (lambda p: filled(p / "out", ".secret"), "out", {}, "out exists and isn't empty"),
    "folders": (lambda p: (p / "out" / "sub").mkdir(parents=True), "out", {}, "out exists and isn't empty"),
    "an unfinished run": (lambda p: unfinished(p, "{}"), "out", {}, "unfinished pruning run.*--resume.*--overwrite"),
    "the input": (lambda p: None, "model", {}, "model is also the input"),
    "the input to overwrite": (lambda p: None, "model", {"overwrite": True}, "model is also the input"),
    "the input by another name": (lambda p: None, "./model/../model", {"overwrite": True}, "is also the input"),
    "a link to the input": (
        lambda p: (p / "out").symlink_to(p / "model"),
        "out",
        {"overwrite": True},
        "out is also the input",
    ),
    "in the input": (lambda p: None, "model/out", {}, "is inside the input"),
    "around the input": (lambda p: None, ".", {"overwrite": True}, "holds the input"),
    "under a file": (lambda p: None, "text.txt/out", {}, "text.txt"),
    "deep under a file": (lambda p: None, "text.txt/a/b/out", {}, "text.txt"),
    "a name that is too long": (lambda p: None, "a" * 300, {}, "aaa"),
    "nothing": (lambda p: None, "", {"overwrite": True}, "holds the input"),
}


@params(OUTPUTS)
def test_outputs(case, place):
    prepare, output, arguments, wanted = case
    prepare(place)
    pruner = CompPruner.from_pretrained("model")
    call = lambda: pruner.prune(CompConfig(**SMALL), "text.txt", output=output, **arguments)  # noqa: E731
    require_refused(call, place, wanted)

    def make() -> None:
        with atomic_folder(output, sources=["model"], **arguments):
            raise AssertionError("the work begins")

    require_refused(make, place, wanted)


@pytest.mark.skipif(is_superuser(), reason="the superuser may write anywhere")
def test_an_output_that_may_not_be_written(place):
    (place / "closed").mkdir(mode=0o500)
    pruner = CompPruner.from_pretrained("model")
    call = lambda: pruner.prune(CompConfig(**SMALL), "text.txt", output="closed/out")  # noqa: E731
    require_refused(call, place, "closed")


@pytest.fixture(scope="module")
def parser() -> Any:
    root = RootOptimumCLICommand("Optimum CLI tool", usage="optimum-cli")
    register_optimum_cli_subcommand(CompCommand, parent_command=root)
    return root.parser


def require_command_refused(parser: Any, arguments: str, capsys: Any, root: Path, *wanted: str) -> None:
    """A command ends with a status that says so and an error, tells nothing else, and leaves a folder as it was."""
    before = tree(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        args = parser.parse_args(["comp", *shlex.split(arguments)])
        args.func(args).run()
    said = capsys.readouterr()
    assert caught.value.code in (1, 2) and said.out == "", (caught.value.code, said)
    # Behind the usage, or behind what was noted on the way.
    _, found, message = said.err.partition("error: ")
    assert found, said.err
    require_clear(message.rstrip("\n"), *wanted)
    assert tree(root) == before


NUMBERS = ["x", "", "nan", "1e400", "0x1", "1,5", "-1"]
ONE_OF_A_PRUNING = {
    **{
        f"--{name}": [*NUMBERS, "inf", "1.01"]
        for name in ("sparsity", "layer-fraction", "attention-fraction", "alignment", "ridge")
    },
    **{
        f"--{name}": [*NUMBERS, "0.5", "1" * 30]
        for name in ("num-samples", "sequence-length", "elimination-block", "round-to", "seed", "batch-size")
    },
    "--preset": ["best", "", "COMP"],
    "--axes": ["ffn,rows", "", "ffn,ffn", "FFN", "ffn;kv"],
    "--layer-metric": ["sine", ""],
    "--neuron-metric": ["taylor", ""],
    "--recovery": ["finetune", ""],
    "--begin": ["maybe", ""],
    "--protected-layers": ["a", "0.5", "0,9", "0;1"],
    "--matmul-dtype": ["fp8", ""],
    "--max-memory": ["much", "", "-1GB", "50MB", "nan"],
    "--calibration": ["missing.txt", "model", ""],
    "--device": ["gpu", "cuda:99", ""],
    "--dtype": ["int8", "float7", ""],
    "--gguf-file": ["missing.gguf", ""],
    "--subfolder": ["missing", "../other", ""],
    "--max-shard-size": ["much", "0", ""],
    "--config": ["missing", "model", ""],
}
ONE_OF_MEASURING = {
    **{
        f"--{name}": [*NUMBERS, "0.5", "1" * 30]
        for name in ("window", "new-tokens", "prompt-tokens", "long-prompt-tokens", "repeats", "threads", "max-tokens")
    },
    "--begin": ["maybe", ""],
    "--text": ["missing.txt", "model", "empty.txt", ""],
    "--text-column": ["", " "],
}
MODELS = ["missing/folder/model", "text.txt", "empty", "", "./missing", "model/config.json"]
ONE_OF_QUANTIZATION = {
    "--recipe": ["int2", "", "INT8"],
    "--weights": ["int2", "8"],
    "--target": ["riscv", ""],
    "--max-size": ["much", "0", "-1GB", ""],
    "--max-perplexity-increase": ["0%", "-2%", "nan", "x", "", "%", "inf"],
    "--num-samples": [*NUMBERS, "0", "0.5"],
    "--sequence-length": [*NUMBERS, "1", "0.5"],
    "--begin": ["maybe", ""],
}
ONE_OF_COMPRESSING = {
    "--recipe": ["int2", "", "missing.yaml", "text.txt", "model"],
    "--weights": ["int2"],
    "--target": ["riscv"],
    "--sparsity": ["x", "1.5", "0.99"],
    "--calibration": ["missing.txt", "empty.txt"],
    "--window": ["1"],
    "--text": ["missing.txt", "empty.txt"],
    "--max-size": ["1kB", "much"],
    "--max-memory": ["much", "50MB"],
    "--bundle": ["text.txt", "out", "out/phone", "model/phone"],
    "--device": ["gpu"],
}


def one_at_a_time(command: str, end: str, table: dict[str, list[str]]) -> dict[str, tuple[str, str, str]]:
    return {
        f"{command} {option} {value!r:.12}": (f"{command} {option}={shlex.quote(value)} {end}", option, value)
        for option, values in table.items()
        for value in values
    }


def as_said(option: str, value: str) -> list[str]:
    """Patterns of a value as an error may have it: as text, as a number, a part after the other, or its option."""
    name = option.removeprefix("--")
    if not value.strip():
        return [rf"{name.replace('-', '[-_]')}|folder"]
    with contextlib.suppress(ValueError):
        return [f"{re.escape(value[:40])}|={float(value)}"]
    with contextlib.suppress(ValueError):
        return [f"={float(value.removesuffix('%')) / 100}"]
    return [re.escape(re.sub(r"^(-?\d+)[kMG]?B$|^\./", r"\1", part)) for part in re.split("[,;]", value)]


COMMANDS = {
    **one_at_a_time("prune", "--model model out", ONE_OF_A_PRUNING),
    **one_at_a_time("prune", "out", {"--model": MODELS}),
    **one_at_a_time("eval", "--model model", ONE_OF_MEASURING),
    **one_at_a_time("eval", "--model model", {"--gguf-file": ["missing.gguf"], "--dtype": ["float7"]}),
    **one_at_a_time("eval", "", {"--model": MODELS}),
    **one_at_a_time("bench", "model", {"--window": NUMBERS, "--repeats": ["0"], "--begin": ["maybe"]}),
}
COMMANDS_WITH_ONNX = {
    **one_at_a_time("quantize", "--model model out", ONE_OF_QUANTIZATION),
    **one_at_a_time("quantize", "out", {"--model": MODELS}),
    **one_at_a_time("compress", "--model model out", ONE_OF_COMPRESSING),
    **one_at_a_time("compress", "out", {"--model": MODELS}),
}


@params(COMMANDS)
def test_commands(case, place, parser, capsys):
    arguments, option, value = case
    (place / "empty.txt").touch()
    (place / "empty").mkdir()
    require_command_refused(parser, arguments, capsys, place, *as_said(option, value))


@pytest.mark.onnx
@params(COMMANDS_WITH_ONNX)
def test_commands_that_need_onnx(case, place, parser, capsys):
    arguments, option, value = case
    (place / "empty.txt").touch()
    (place / "empty").mkdir()
    require_command_refused(parser, arguments, capsys, place, *as_said(option, value))


@params(
    {
        "nothing": ("prune", "required"),
        "no output": ("prune --model model", "OUTPUT"),
        "no model": ("prune out", "--model is missing"),
        "unknown option": ("prune --model model --sparsty 0.2 out", "--sparsty"),
        "unknown command": ("prun --model model out", "prun"),
        "two outputs": ("prune --model model a b", "b"),
        "resume of nothing": ("prune --resume out", "--model is missing"),
        "preset and config": ("prune --model model --preset comp --config model out", "exclude each other"),
        "output that is the input": ("prune --model model model", "model is also the input"),
        "output in the input": ("prune --model model model/out", "inside the input"),
        "output that is a file": ("prune --model model text.txt", "text.txt is a file"),
        "output under a file": ("prune --model model text.txt/out", "text.txt is a file"),
        "too much": ("prune --model model --sparsity 0.9 out", "leaves no neuron"),
        "little text to prune by": ("prune --model model --calibration text.txt --num-samples 900 out", "samples=900"),
        "no column": ("prune --model model --calibration a.jsonl --text-column b out", "no column 'b'; it has: text"),
        "eval of nothing": ("eval", "--model"),
        "bench of nothing": ("bench", "MODEL"),
        "bench of what isn't there": ("bench model missing/one/two", "missing/one/two"),
        "families of nothing": ("families --model missing/one/two", "missing/one/two"),
        "families of an empty folder": ("families --model .", "config.json"),
        "little text": ("eval --model model --text short.txt", "short.txt is too short: .* give more"),
        "json under a file": ("prune --model model --json text.txt/a.json out", "text.txt"),
        "json that is a folder": ("prune --model model --json model out", "json|model"),
        "report that is a file": ("bench model --report text.txt", "text.txt"),
    }
)
def test_command_lines(case, place, parser, capsys):
    arguments, *wanted = case
    (place / "a.jsonl").write_text('{"text": "a"}\n')
    (place / "short.txt").write_text("short")
    require_command_refused(parser, arguments, capsys, place, *wanted)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=4))
def test_any_fields(fields):
    try:
        CompConfig(**fields)
    except ValueError as error:
        require_clear(str(error))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(options_of(Settings))), JSON)
def test_any_setting(name, value):
    try:
        Settings(**{name: value})
    except ValueError as error:
        require_clear(str(error), name)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20) | st.from_regex(r"\A *[0-9.]+ *[kKmMgGtT]?[iI]?[bB]?\Z"))
def test_any_size(text):
    try:
        assert 0 < parse_bytes(text) < 2**200
    except ValueError as error:
        require_clear(str(error), "max_memory=")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_calibration_text(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(content)
    try:
        prepare_calibration(path, model=None, tokenizer=tiny_tokenizer(), num_samples=1, sequence_length=8)
    except ValueError as error:
        require_clear(str(error), "text.txt")
