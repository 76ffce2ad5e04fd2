"""Quantized models on emulated 64-bit Arm cores: their operators on random data, and their logits on text.

What is computed is checked; how long it takes here says nothing about a real core. Run it with `make test-arm64`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from arm64.setup_emulator import CPU_TYPES, Emulator, EmulatorUnavailableError, set_up
from conftest import need_onnx


need_onnx()

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging as progress  # noqa: E402

from optimum_comp.calibration.text import read_text, tokenize  # noqa: E402
from optimum_comp.onnx.cache import cache_shapes  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.quantization import quantize_onnx  # noqa: E402


pytestmark = pytest.mark.slow

HOST, FLOAT = "host", "float"
RUN_INSIDE = Path(__file__).parent / "arm64" / "run_inside.py"
SECONDS = 300
"""No run may take longer; the longest takes a fifth of it."""

TOKENS = 24
TEXT = (
    "When the storm had passed, the harbour was quiet again, and the few boats that had come in before dawn lay still "
    "beside the stone wall while the men carried their baskets up to the market."
)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """A graph to run: its path, its inputs by name, and the outputs to keep."""

    graph: Path
    inputs: Arrays
    outputs: list[str]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    try:
        return set_up()
    except EmulatorUnavailableError as error:
        pytest.skip(f"no emulated Arm core: {error}")


@pytest.fixture(scope="module")
def run(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Task]], Arrays]:
    """Run graphs on the host or an emulated core, and return what `run_inside.py` has kept."""

    def run_tasks(cpu: str, tasks: dict[str, Task]) -> Arrays:
        folder = tmp_path_factory.mktemp("run")
        job, result = folder / "job.json", folder / "result.npz"
        entries = []
        for name, task in tasks.items():
            inputs = folder / f"{len(entries)}.npz"
            np.savez(inputs, **task.inputs)
            entries.append({"name": name, "graph": str(task.graph), "inputs": str(inputs), "outputs": task.outputs})
        job.write_text(json.dumps(entries), encoding="utf-8")
        if cpu == HOST:
            subprocess.run([sys.executable, RUN_INSIDE, job, result], check=True, timeout=SECONDS)
        else:
            emulator.run(cpu, RUN_INSIDE, job, result, seconds=SECONDS)
        with np.load(result) as arrays:
            results = dict(arrays)
        assert results["machine"] == "aarch64" or cpu == HOST
        assert results["version"] == emulator.versions["onnxruntime"]
        return results

    return run_tasks


@pytest.fixture(scope="module")
def table() -> Iterator[Callable[..., None]]:
    """Collect rows, and print them as tables when the tests are through."""
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def add(**cells: str) -> None:
        tables.setdefault(tuple(cells), []).append(tuple(cells.values()))

    yield add
    for header, rows in tables.items():
        lines = [tuple(name.replace("_", " ") for name in header), *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        print("\n")
        for line in lines:
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


# Operators


@dataclass(frozen=True)
class Operator:
    """An operator on random data.

    Attributes:
        model: a graph of this one node.
        inputs: by name.
        reference: what its first output should be, computed in int64 or float64.
    """

    model: onnx.ModelProto
    inputs: Arrays
    reference: np.ndarray

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.model.graph.output]


def one_node(
    operator: str, inputs: Arrays, constants: Arrays, outputs: dict[str, int], domain: str = "", **attributes: int
) -> onnx.ModelProto:
    node = helper.make_node(operator, [*inputs, *constants], list(outputs), domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        operator,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def activations(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, width), np.float32)


def as_uint8(x: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """Codes, scale and zero point, as ONNX defines `DynamicQuantizeLinear`."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.round(-low / scale)
    return np.clip(np.round(x / scale) + zero, 0, 255), scale, zero


SEVEN_BITS, EIGHT_BITS, UNSIGNED = (-64, 64), (-127, 127), (0, 255)
"""Ranges of weights: of the target `any`, of those that multiply full bytes right, and of a tied embedding."""


def byte_weights(low: int, high: int) -> np.ndarray:
    """Uniform, with columns of nothing but the least and the largest ones; int8 if there are negative ones."""
    kind = np.int8 if low < 0 else np.uint8
    weights = np.random.default_rng(high).integers(low, high + 1, (131, 51), kind)
    weights[:, 0], weights[:, 1] = high, low
    weights[::2, 2], weights[1::2, 2] = high, low
    return weights


def dynamic_quantize_linear(rows: int) -> Operator:
    x = activations(rows, 131)
    kinds = {"y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    return Operator(one_node("DynamicQuantizeLinear", {"x": x}, {}, kinds), {"x": x}, as_uint8(x)[0])


def matmul_integer(rows: int, low: int, high: int) -> Operator:
    a = np.random.default_rng(rows).integers(0, 256, (rows, 131), np.uint8)
    # With the largest weights these make the largest sums of neighbouring products, of either sign.
    a[0, :48], a[0, 48:96] = 0, 255
    weights, zero = byte_weights(low, high), np.array(97, np.uint8)
    # An embedding's codes are unsigned, also where its transpose is the head's weight.
    weights_zero = np.zeros(51, np.int8) if low < 0 else np.array(131, np.uint8)
    constants = {"b": weights, "a_zero": zero, "b_zero": weights_zero}
    model = one_node("MatMulInteger", {"a": a}, constants, {"y": TensorProto.INT32})
    reference = (a.astype(np.int64) - zero) @ (weights.astype(np.int64) - weights_zero)
    return Operator(model, {"a": a}, reference)


def dynamic_quantize_matmul(rows: int) -> Operator:
    x, weights = activations(rows, 131), byte_weights(*SEVEN_BITS)
    scales = np.random.default_rng(0).uniform(0.001, 0.01, 51).astype(np.float32)
    constants = {"b": weights, "b_scale": scales, "b_zero": np.zeros(51, np.int8)}
    model = one_node("DynamicQuantizeMatMul", {"x": x}, constants, {"y": TensorProto.FLOAT}, "com.microsoft")
    codes, scale, zero = (np.asarray(part, np.float64) for part in as_uint8(x))
    return Operator(model, {"x": x}, (codes - zero) * scale @ (weights * scales.astype(np.float64)))


def blocks(bits: int, block: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[rows, blocks, bytes]`, scales of either sign `[rows, blocks]`, and the float64 weights of both."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 2**bits, (rows, width // block, block), np.uint8)
    scales = random.uniform(-0.02, 0.02, codes.shape[:2]).astype(np.float32)
    weights = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None]
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, scales, weights.reshape(rows, width)


def matmul_nbits(rows: int, bits: int, block: int) -> Operator:
    x = activations(rows, 256)
    codes, scales, weights = blocks(bits, block, 96, 256)
    settings = {"K": 256, "N": 96, "bits": bits, "block_size": block, "accuracy_level": 4}
    constants = {"codes": codes, "scales": scales}
    model = one_node("MatMulNBits", {"x": x}, constants, {"y": TensorProto.FLOAT}, "com.microsoft", **settings)
    return Operator(model, {"x": x}, x.astype(np.float64) @ weights.T)


def gather_block_quantized(block: int) -> Operator:
    codes, scales, weights = blocks(8, block, 50, 128)
    ids = np.array([[0, 7, 49], [7, 3, 21]], np.int64)
    settings = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 2}
    inputs = {"codes": codes, "ids": ids, "scales": scales[..., None]}
    kinds = {"y": TensorProto.FLOAT}
    model = one_node("GatherBlockQuantized", inputs, {}, kinds, "com.microsoft", **settings)
    return Operator(model, inputs, weights.reshape(50, -1, block)[ids])


@pytest.fixture(scope="module")
def operators() -> dict[str, Operator]:
    made = {}
    # Generating reads one row, a prompt many; the kernels aren't the same.
    for rows in (1, 7):
        made[f"DynamicQuantizeLinear, {rows} rows"] = dynamic_quantize_linear(rows)
        made[f"DynamicQuantizeMatMul, {rows} rows"] = dynamic_quantize_matmul(rows)
        for low, high in (SEVEN_BITS, EIGHT_BITS, UNSIGNED):
            made[f"MatMulInteger, {rows} rows, weights {low} to {high}"] = matmul_integer(rows, low, high)
        for bits in (8, 4):
            for block in (32, 64):
                made[f"MatMulNBits {bits} bits, {rows} rows, blocks of {block}"] = matmul_nbits(rows, bits, block)
    for block in (32, 64):
        made[f"GatherBlockQuantized, blocks of {block}"] = gather_block_quantized(block)
    return made


@pytest.fixture(scope="module")
def computed(operators, run, tmp_path_factory):
    """The operators' outputs on the host or an emulated core: name -> arrays."""
    folder, made = tmp_path_factory.mktemp("operators"), {}
    tasks = {}
    for number, (name, operator) in enumerate(operators.items()):
        tasks[name] = Task(folder / f"{number}.onnx", operator.inputs, operator.outputs)
        onnx.save(operator.model, tasks[name].graph)

    def get(cpu: str) -> dict[str, list[np.ndarray]]:
        if cpu not in made:
            arrays = run(cpu, tasks)
            made[cpu] = {name: [arrays[f"{name}/{key}"] for key in task.outputs] for name, task in tasks.items()}
        return made[cpu]

    return get


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def host_is_exact(operators, computed) -> bool:
    """Whether the host multiplies weights of 8 bits right.

    x86 processors without VNNI add pairs of products in 16 bits, which are too few.
    """
    names = [name for name in operators if f"weights {EIGHT_BITS[0]} to {EIGHT_BITS[1]}" in name]
    assert len(names) == 2
    return all(np.array_equal(computed(HOST)[name][0], operators[name].reference) for name in names)


@pytest.mark.parametrize("cpu", CPU_TYPES)
def test_int8_operators_are_exact(cpu, operators, computed, host_is_exact, table):
    for kind, count in (("DynamicQuantizeLinear", 2), ("MatMulInteger", 6), ("DynamicQuantizeMatMul", 2)):
        names = [name for name in operators if name.startswith(kind)]
        assert len(names) == count
        # Scaling back to float32 rounds once or twice.
        bound = 3e-7 if kind == "DynamicQuantizeMatMul" else 0
        right = [distance(computed(cpu)[name][0], operators[name].reference) <= bound for name in names]
        same = [all(map(np.array_equal, computed(cpu)[name], computed(HOST)[name])) for name in names]
        table(operator=kind, core=cpu, right=f"{sum(right)} of {count}", equal_to_host=f"{sum(same)} of {count}")
        assert all(right)
        if host_is_exact or kind == "DynamicQuantizeMatMul":
            assert all(same)


# Largest differences of MatMulNBits to the host and to float64, as shares of the largest output: twice or more what
# was measured. Cores without dot product multiply in float, so they differ from the host by what it loses. The others
# round the activations to 8 bits first, as the host does: by blocks for 8-bit weights, but by rows for 4-bit ones.
PRODUCT_BOUNDS = {
    ("cortex-a53", 8): (2e-2, 3e-6),
    ("cortex-a53", 4): (2e-2, 3e-6),
    ("cortex-a76", 8): (2e-5, 2e-2),
    ("cortex-a76", 4): (3e-2, 2e-2),
    ("max,sme=off", 8): (2e-5, 2e-2),
    ("max,sme=off", 4): (3e-2, 2e-2),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cpu", CPU_TYPES)
def test_block_products(cpu, bits, operators, computed, table):
    worst = np.zeros(2)
    for name, operator in operators.items():
        if name.startswith(f"MatMulNBits {bits}"):
            (actual,), (on_host,) = computed(cpu)[name], computed(HOST)[name]
            worst = np.maximum(worst, [distance(actual, on_host), distance(actual, operator.reference)])
    bounds = PRODUCT_BOUNDS[cpu, bits]
    table(
        operator=f"MatMulNBits {bits} bits",
        core=cpu,
        to_host=f"{worst[0]:.1e}",
        at_most=f"{bounds[0]:.0e}",
        to_float64=f"{worst[1]:.1e}",
        at_most_=f"{bounds[1]:.0e}",
    )
    assert (worst > 0).all()
    assert (worst <= bounds).all()


@pytest.mark.parametrize("cpu", CPU_TYPES)
def test_block_lookups(cpu, operators, computed):
    names = [name for name in operators if name.startswith("GatherBlockQuantized")]
    assert len(names) == 2
    for name in names:
        (actual,), (on_host,) = computed(cpu)[name], computed(HOST)[name]
        assert np.array_equal(actual, on_host)
        # One rounding to float32.
        assert distance(actual, operators[name].reference) < 1e-7


# Models


def ready_models() -> dict[str, Path]:
    """The folders that COMP_ARM64_MODELS names, by name.

    Raises:
        ValueError: it isn't valid; says what is.
    """
    value = os.environ.get("COMP_ARM64_MODELS", "")
    entries = [entry.partition("=") for entry in value.split(",") if entry]
    models = {name: Path(folder) for name, _, folder in entries}
    if entries and (len(models) < len(entries) or FLOAT not in models or len(models) < 2):
        raise ValueError(
            f"COMP_ARM64_MODELS={value!r} is not valid: give name=folder,name=folder,... with each name once, and "
            f"with {FLOAT}=folder for the float ONNX model that the others were quantized from."
        )
    for name, folder in models.items():
        if not (folder / "model.onnx").is_file():
            raise ValueError(f"COMP_ARM64_MODELS: {name}={folder} is not an ONNX folder: it has no model.onnx.")
    return models


READY = ready_models()
MADE = {
    "int8": ("int8", "any"),
    "int8-dynamic": ("int8-dynamic", "any"),
    "int8-dynamic-arm64": ("int8-dynamic", "arm64"),
    "int4": ("int4", "any"),
}
"""Name -> recipe and target."""

MODELS = [name for name in READY if name != FLOAT] or list(MADE)
SEVEN_BIT_TWIN = {} if READY else {"int8-dynamic-arm64": "int8-dynamic"}
"""Model -> the one to compare it with where the host can't multiply its weights of 8 bits (see `host_is_exact`)."""


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """ONNX folders of the float model and the quantized ones."""
    if READY:
        return READY
    source = request.getfixturevalue("first_layers")
    root = tmp_path_factory.mktemp("models")
    made = {FLOAT: export_onnx(source, root / FLOAT).output}
    tokens = tokenize(AutoTokenizer.from_pretrained(source), read_text("pydoc")[0])[: 16 * 128].reshape(16, 128)
    progress.disable_progress_bar()
    try:
        for name, (recipe, target) in MADE.items():
            made[name] = quantize_onnx(made[FLOAT], root / name, recipe=recipe, target=target, tokens=tokens).output
    finally:
        progress.enable_progress_bar()
    return made


def prompt(folder: Path) -> Arrays:
    """A graph's inputs for the first tokens of the text, with nothing in the cache."""
    ids = tokenize(AutoTokenizer.from_pretrained(folder), TEXT)[None, :TOKENS].numpy()
    assert ids.shape == (1, TOKENS)
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(TOKENS)[None]}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    # [batch, heads, past, width of a head]
    empty = {name: np.zeros((1, heads, 0, width), np.float32) for name, (heads, width) in cache_shapes(graph).items()}
    return {entry.name: (known | empty)[entry.name] for entry in graph.input}


@pytest.fixture(scope="module")
def logits(folders, run):
    """Logits `[tokens, vocabulary]` in float64 of a model on the host or an emulated core, and the seconds it took."""
    made = {}

    def get(cpu: str, name: str) -> tuple[np.ndarray, float]:
        if (cpu, name) not in made:
            folder = folders[name]
            task = Task(folder.resolve() / "model.onnx", prompt(folder), ["logits"])
            arrays = run(cpu, {"model": task})
            made[cpu, name] = arrays["model/logits"][0].astype(np.float64), float(arrays["model/seconds"])
        return made[cpu, name]

    return get


def divergence(reference: np.ndarray, actual: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    p, q = (torch.from_numpy(values).log_softmax(-1) for values in (reference, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cpu", CPU_TYPES)
def test_models_are_as_close_to_float_as_on_the_host(cpu, name, host_is_exact, folders, logits, table):
    twin = name if host_is_exact else SEVEN_BIT_TWIN.get(name, name)
    (reference, _), (on_host, _), (on_arm, seconds) = logits(HOST, FLOAT), logits(HOST, twin), logits(cpu, name)
    assert on_arm.shape == on_host.shape == reference.shape
    assert np.isfinite(on_arm).all()
    expected, actual = divergence(reference, on_host), divergence(reference, on_arm)
    greedy = [values.argmax(-1) for values in (reference, on_host, on_arm)]
    words = [repr(AutoTokenizer.from_pretrained(folders[FLOAT]).decode(ids[-1])) for ids in greedy]
    same = [(ids == greedy[0]).sum() for ids in greedy[1:]]
    table(
        model=name,
        core=cpu,
        KL_host=f"{expected:.5f}",
        KL_Arm=f"{actual:.5f}",
        ratio=f"{actual / expected:.2f}",
        largest_logit_difference=f"{np.abs(on_arm - on_host).max():.2f}",
        # No gate: rounding decides where two tokens are nearly as likely.
        greedy_as_float=f"host {same[0]}, Arm {same[1]} of {len(reference)}",
        next_of_float_host_Arm=" ".join(words),
        seconds=f"{seconds:.0f}",
    )
    # 1e-4 nats, a perplexity higher by 0.01 %, matter to nobody, and a recipe as good as that has no ratio to keep.
    assert actual <= 1.5 * expected + 1e-4


INT8_OPERANDS = {"MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3}
"""Operator that multiplies int8 weights -> which input they are."""


@pytest.mark.parametrize("name", MODELS)
def test_int8_weights_leave_out_the_least(name, folders, table):
    """Cores without dot product add pairs of products in 16 bits, and two of -128 · -128 are too many for that."""
    model = onnx.load(folders[name] / "model.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    operands = set()
    for node in model.graph.node:
        if node.op_type in INT8_OPERANDS:
            operand = node.input[INT8_OPERANDS[node.op_type]]
            while operand not in weights:
                assert made_by[operand].op_type == "Transpose", f"{node.name}: no weight, but {operand}"
                operand = made_by[operand].input[0]
            if weights[operand].data_type == TensorProto.INT8:
                operands.add(operand)
    ranges = [(values.min(), values.max()) for values in (numpy_helper.to_array(weights[name]) for name in operands)]
    least, largest = min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)
    table(model=name, int8_matrices=str(len(operands)), least=str(least), largest=str(largest))
    assert least >= -127
    assert operands or "int8-dynamic" not in name


def test_a_machine_that_cannot_have_it_is_told_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulatorUnavailableError, match="there is no apt-get"):
        set_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
