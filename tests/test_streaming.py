"""Checkpoints read a layer at a time: the same result as in memory, and damaged ones refused by name."""

from __future__ import annotations

import filecmp
import json
import os
import platform
import struct
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import GQA, IDS, SIZES, TINY_CONFIGS, tiny_blocks, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from optimum_comp import CompConfig, CompPruner
from optimum_comp.calibration.text import prepare_calibration
from optimum_comp.checkpoint.opening import find_device
from optimum_comp.checkpoint.parts import join_parts, write_part
from optimum_comp.checkpoint.reader import Checkpoint
from optimum_comp.checkpoint.source import StreamedModel, empty_model, find_matmul_dtype
from optimum_comp.evaluation import load_model
from optimum_comp.machine import container_headroom, free_memory
from optimum_comp.options import parse_bytes
from optimum_comp.sweep.memory import plan_memory, workload_of, writing_of
from optimum_comp.sweep.states import ActivationStore


CONFIG = {"sparsity": 0.3, "num_samples": 8, "sequence_length": 32, "round_to": 8}


def logits(model, prompt=None):
    with torch.no_grad():
        return model(tiny_blocks(2, 12, seed=9) if prompt is None else prompt).logits


@pytest.mark.parametrize("fields", [{}, {"layer_fraction": 0.9}, {"layer_fraction": 0.9, "layer_metric": "loss"}])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_streamed_equals_in_memory(name, fields, tmp_path):
    """In every family: weights in place, names and tied ones, removed layers, both layer metrics."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    config = CompConfig(**CONFIG, **fields)
    resident = CompPruner.from_pretrained(model)
    resident.prune(config, tiny_blocks(8, 32), batch_size=3)
    streamed = CompPruner.from_pretrained(tmp_path / "dense")
    report = streamed.prune(config, tiny_blocks(8, 32), output=tmp_path / "out", batch_size=3)
    assert not any(parameter.device.type != "meta" for parameter in streamed._source.model.parameters())
    assert report.removed_layers == resident.report.removed_layers
    assert [layer.kept for layer in report.layers] == [layer.kept for layer in resident.report.layers]
    assert report.parameters_after == sum(p.numel() for p in resident.model.parameters())
    assert report.parameters_before == resident.report.parameters_before
    reloaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(reloaded.eval()), logits(resident.model), rtol=0, atol=1e-5)
    # Saved from memory, the folder has the same weights under the same names.
    saved = load_file(resident.save_pretrained(tmp_path / "resident") / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[key], written[key]) for key in saved)
    first, second = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "resident"))
    assert first == second


@pytest.mark.parametrize("name", ["llama", "opt-post-norm"])
def test_files_in_place_of_memory_change_nothing(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "dense")
    outputs = []
    for spills in (False, True):
        pruner = CompPruner.from_pretrained(tmp_path / "dense")
        output = tmp_path / f"out-{spills}"
        config = CompConfig(**CONFIG, layer_fraction=0.5)
        with pytest.MonkeyPatch.context() as patch:
            if spills:
                patch.setattr("optimum_comp.sweep.memory._cuts", lambda work, size: [(size, (True, True))])
            pruner.prune(config, tiny_blocks(8, 32), output=output)
        outputs.append(output)
    names = sorted(path.name for path in outputs[0].iterdir())
    assert filecmp.cmpfiles(*outputs, names, shallow=False)[1:] == ([], [])
    assert sorted(path.name for path in outputs[1].iterdir()) == names


@pytest.mark.parametrize("in_memory", [False, True])
def test_half_precision_is_kept_on_disk_and_widened_to_compute(in_memory, tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    pruner = CompPruner.from_pretrained(model if in_memory else tmp_path / "dense")
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32))
    folder = pruner.save_pretrained(tmp_path / "out")
    written, dense = load_file(folder / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(written[name], dense[name])
    assert json.loads((folder / "config.json").read_text()).get("dtype", "bfloat16") == "bfloat16"
    if in_memory:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_products_are_rounded_where_the_processor_can(monkeypatch):
    source = CompPruner.from_pretrained(tiny_model("llama"))._source
    for known, found in ({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True, "amx_bf16": False}, torch.float32):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert find_matmul_dtype("auto", source) == found
        assert find_matmul_dtype("bfloat16", source) == torch.bfloat16
        assert find_matmul_dtype("float32", source) == torch.float32
    with pytest.raises(ValueError, match=r"matmul_dtype='int8' is not valid: it must be one of auto"):
        CompPruner.from_pretrained(tiny_model("llama")).prune(
            CompConfig(**CONFIG), tiny_blocks(8, 32), matmul_dtype="int8"
        )
    source.device = torch.device("cuda")
    assert find_matmul_dtype("auto", source) == torch.float32
    with pytest.raises(ValueError, match="'bfloat16' is for the CPU"):
        find_matmul_dtype("bfloat16", source)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_rounded_products_prune_to_nearly_the_same(name):
    """Another model, by rounding, than with exact products, but far nearer to that one than to the dense one."""
    prompt = tiny_blocks(2, 12, seed=9)
    found, dense = {}, logits(tiny_model(name).eval(), prompt)
    for dtype in ("float32", "bfloat16"):
        model = tiny_model(name)
        pruner = CompPruner.from_pretrained(model)
        results = set()
        query = pruner.layers[1].get_submodule("self_attn.q_proj")
        query.register_forward_hook(lambda module, args, output, results=results: results.add(output.dtype))
        report = pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32), matmul_dtype=dtype)
        assert report.matmul_dtype == dtype
        # Whether folds hold, and the like, is measured with exact products in any case.
        assert getattr(torch, dtype) in results
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        found[dtype] = logits(model, prompt)
    difference = (found["bfloat16"] - found["float32"]).norm()
    assert 0 < difference < 0.5 * (found["float32"] - dense).norm()


def test_another_dtype_is_written_when_asked(tiny_folder, tmp_path):
    pruner = CompPruner.from_pretrained(tiny_folder, dtype="bfloat16")
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32), output=tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int8' is not valid"):
        CompPruner.from_pretrained(tiny_folder, dtype="int8")


def test_what_a_skeleton_cannot_do_is_loaded_into_memory(tiny_folder):
    assert CompPruner.from_pretrained(tiny_folder)._source.is_resident is False
    assert CompPruner.from_pretrained(tiny_folder, low_cpu_mem_usage=True)._source.is_resident is True


def test_a_checkpoint_of_the_bare_decoder_is_found(tmp_path):
    """As OPT's are on the hub: names without the causal model's prefix."""
    model = tiny_model("opt")
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    pruner = CompPruner.from_pretrained(tmp_path / "dense")
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32), output=tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.ffn_dim < 96


def test_a_weight_is_read_and_written_by_its_name_on_disk(tmp_path):
    """Transformers 5 calls GPT-NeoX's head otherwise in memory."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SIZES, **IDS, intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = SimpleNamespace(layers="gpt_neox.layers")
    source = StreamedModel(empty_model(config, torch.float32), spec, Checkpoint.open(tmp_path), torch.device("cpu"))
    source.parts = tmp_path
    written = {name: tensor for part in source.write_outside() for name, tensor in load_file(part).items()}
    dense = load_file(tmp_path / "model.safetensors")
    assert {name for name in dense if ".layers." not in name} == written.keys() >= {"embed_out.weight"}
    assert all(torch.equal(dense[name], tensor) for name, tensor in written.items())


def rewrite_header(path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_tensor(folder, name, tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.2.mlp.up_proj.weight"


def lies_about_offsets(header) -> None:
    header[UP]["data_offsets"][1] += 8


def lies_about_shape(header) -> None:
    header[UP]["shape"][0] *= 2


DAMAGES = {
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors is not a whole",
    ),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors is not a whole"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is not a whole"),
    "offsets": (lambda f: rewrite_header(f / "model.safetensors", lies_about_offsets), "is not a whole"),
    "shape in header": (lambda f: rewrite_header(f / "model.safetensors", lies_about_shape), "is not a whole"),
    "shape": (lambda f: change_tensor(f, UP, torch.zeros(7, 64)), rf"model.safetensors: {UP} has shape \[7, 64\]"),
    "dtype": (lambda f: change_tensor(f, UP, torch.zeros(96, 64, dtype=torch.int8)), f"{UP} has dtype I8"),
    "missing tensor": (lambda f: change_tensor(f, UP, None), f"{UP} is missing from the checkpoint"),
    "nan": (lambda f: change_tensor(f, UP, torch.full((96, 64), torch.nan)), f"model.safetensors: {UP} holds NaN"),
    "inf": (lambda f: change_tensor(f, UP, torch.full((96, 64), -torch.inf)), f"model.safetensors: {UP} holds NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_before_any_output(damage, tiny_folder, tmp_path):
    break_it, message = DAMAGES[damage]
    break_it(tiny_folder)
    with pytest.raises(ValueError, match=message):
        pruner = CompPruner.from_pretrained(tiny_folder)
        pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../secret.safetensors", "outside the model's folder"),
        ("/etc/passwd", "outside the model's folder"),
        ("sub/model.safetensors", "outside the model's folder"),
        ("..\\secret.safetensors", "outside the model's folder"),
        ("..", "outside the model's folder"),
        ("C:secret.safetensors", "outside the model's folder"),
        ("pytorch_model.bin", "isn't a safetensors file"),
        ("model-00009-of-00009.safetensors", "model-00009-of-00009.safetensors is missing"),
        ("model-00001-of-00002.safetensors", "holds model.norm.weight, which it doesn't"),
    ],
)
def test_an_index_is_not_followed_blindly(place, message, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense", max_shard_size="300KB")
    path = tmp_path / "dense" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["weight_map"]["model.norm.weight"] == "model-00002-of-00002.safetensors"
    index["weight_map"]["model.norm.weight"] = place
    path.write_text(json.dumps(index))
    (tmp_path / "secret.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        CompPruner.from_pretrained(tmp_path / "dense")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no readable weight_map"):
        CompPruner.from_pretrained(tmp_path / "dense")


def test_a_pickle_is_refused_unless_asked_for(tmp_path):
    model = tiny_model("llama")
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for refused in (lambda: CompPruner.from_pretrained(folder), lambda: load_model(folder)):
        with pytest.raises(ValueError, match=r"as a pickle \(pytorch_model.bin\)(.|\n)*convert it once") as caught:
            refused()
        assert "--allow-pickle" in str(caught.value)
    pruner = CompPruner.from_pretrained(folder, use_safetensors=False)
    torch.testing.assert_close(logits(pruner.model), logits(model))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="holds no weights"):
        CompPruner.from_pretrained(folder)


def test_a_quantized_checkpoint_is_refused(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="quantized already"):
        CompPruner.from_pretrained(tiny_folder)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "xla", "mps", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device="):
        find_device(device)


@pytest.mark.parametrize("file", [None, "spill.bin"])
def test_activation_stores(file, tmp_path):
    cpu, path = torch.device("cpu"), None if file is None else tmp_path / file
    values = torch.randn(5, 700, 33).to(torch.bfloat16)
    store = ActivationStore(5, 700, 33, torch.bfloat16, path)
    store.write(slice(0, 2), values[:2])
    store.write(slice(2, 5), values[2:].reshape(-1, 33))
    assert torch.equal(store.read(slice(1, 4), cpu, torch.bfloat16), values[1:4])
    assert store.read(slice(0, 1), cpu, torch.float32).dtype == torch.float32
    store.save(tmp_path / "saved.bin")
    other = ActivationStore(5, 700, 33, torch.bfloat16)
    other.load(tmp_path / "saved.bin")
    assert torch.equal(other.read(slice(0, 5), cpu, torch.bfloat16), values)
    with pytest.raises(ValueError, match="are wanted"):
        ActivationStore(4, 700, 33, torch.bfloat16).load(tmp_path / "saved.bin")
    saved = bytearray((tmp_path / "saved.bin").read_bytes())
    saved[1000] ^= 1
    (tmp_path / "saved.bin").write_bytes(saved)
    with pytest.raises(ValueError, match="checksum"):
        other.load(tmp_path / "saved.bin")
    store.close()
    assert {each.name for each in tmp_path.iterdir()} == {"saved.bin"}


def test_parts_are_joined_to_shards_that_safetensors_reads(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(30, 7, generator=g),
        "a.weight": torch.randn(3, generator=g).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "c.weight": torch.randn(20, 20, generator=g).to(torch.float16),
    }
    names = list(tensors)
    write_part({name: tensors[name] for name in names[:2]}, tmp_path / "1.safetensors")
    write_part({name: tensors[name] for name in names[2:]}, tmp_path / "2.safetensors")
    parts = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for limit, files in (("5GB", 1), (900, 2)):
        folder = tmp_path / f"joined-{files}"
        folder.mkdir()
        join_parts(parts, folder, limit)
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) == files and (folder / "model.safetensors.index.json").exists() == (files > 1)
        found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in names)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 * 2**29), ("800 mb", 8 * 10**8), ("2g", 2 * 10**9), (12345, 12345), ("7", 7)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-4GB", "0", "4 XB", "4GBB", "1e9"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="max_memory="):
        parse_bytes(text)


def test_a_limit_is_kept_by_smaller_batches_then_files_or_refused_with_the_least(tiny_folder, tmp_path):
    pruner = CompPruner.from_pretrained(tiny_folder)
    config = CompConfig(**{**CONFIG, "num_samples": 4000, "sequence_length": 512})
    work = workload_of(pruner._source, config, pruner.plans(config), pruner._ranks)
    free = plan_memory(work, 64, None)
    assert (free.batch_size, free.spill_inputs, free.spill_states) == (64, False, False)
    limits = [
        free.peak_bytes - 1,
        free.peak_bytes - work.inputs_bytes,
        free.peak_bytes - work.inputs_bytes - work.states_bytes,
    ]
    plans = [plan_memory(work, 64, limit) for limit in limits]
    assert plans[0].batch_size < 64 and not plans[0].spill_inputs
    assert plans[1].spill_inputs
    assert plans[2].spill_states
    assert all(plan.peak_bytes <= limit for plan, limit in zip(plans, limits, strict=True))
    with pytest.raises(ValueError, match=r"100.0 MB \(max_memory\) is too little: this model needs at least \d+"):
        pruner.prune(config, tiny_blocks(4000, 512), output=tmp_path / "out", max_memory="100MB")
    assert not (tmp_path / "out").exists()


def test_text_that_the_model_writes_is_part_of_what_is_planned(tiny_folder):
    pruner = CompPruner.from_pretrained(tiny_folder)
    config = CompConfig(**{**CONFIG, "num_samples": 64, "sequence_length": 1024})
    work = workload_of(pruner._source, config, pruner.plans(config), pruner._ranks)
    writing = writing_of(pruner._source, None, config)
    assert writing.model == 4 * sum(parameter.numel() for parameter in pruner._source.model.parameters())
    # Keys and values of four layers, two heads of 16 each.
    assert writing.sample > 2 * 4 * 2 * 16 * 1024 * 4
    without, free = plan_memory(work, 1, None), plan_memory(work, 1, None, writing)
    assert (without.written_together, free.written_together) == (0, 64)
    assert free.peak_bytes > without.peak_bytes
    base = free.peak_bytes - writing.peak(64)
    fewer = plan_memory(work, 1, base + writing.peak(20), writing)
    assert fewer.written_together == 16
    # An answer has a request in front of it, which is in the cache, too.
    talking = writing_of(pruner._source, tiny_tokenizer(), config)
    assert writing.sample < talking.sample < 2 * writing.sample
    # In a model that is in memory already, the cache and the logits are left.
    assert writing_of(CompPruner.from_pretrained(tiny_model("llama"))._source, None, config).model == 0


def test_a_model_that_does_not_fit_writes_no_text(tiny_folder, tmp_path):
    """Refused before any work, though with a given text it could be pruned."""
    # Most of it is the embedding.
    AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **GQA, **IDS, "vocab_size": 300_000})).save_pretrained(
        tiny_folder
    )
    config = CompConfig(**CONFIG)
    limit = psutil.Process().memory_info().rss + 330_000_000
    for calibration in ("self", None):
        pruner = CompPruner.from_pretrained(tiny_folder, tiny_tokenizer())
        with pytest.raises(ValueError, match=r"\(self\)(.|\n)*the whole model(.|\n)*--calibration FILE"):
            pruner.prune(config, calibration, output=tmp_path / "out", max_memory=limit)
        assert not (tmp_path / "out").exists()
    CompPruner.from_pretrained(tiny_folder).prune(
        config, tiny_blocks(8, 32), output=tmp_path / "out", max_memory=limit
    )


def test_any_number_of_samples_is_written_side_by_side():
    for together in (1, 3, None):
        samples = prepare_calibration(
            "self", model=tiny_model("llama"), tokenizer=None, num_samples=4, sequence_length=8, together=together
        )
        assert samples.tokens.shape == (4, 8)


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
NO_LIMIT = 9223372036854771712
CGROUPS = {
    # What proc/self/cgroup says; below sys/fs/cgroup: limit, usage and copies of files; what is left.
    "innermost": (V2, "0::/slice/job", {"slice/job": (1000, 400, 0), "slice": (5000, 900, 0)}, 600),
    "an outer one": (V2, "0::/slice/job", {"slice/job": ("max", 400, 0), "slice": (1000, 900, 0)}, 100),
    "copies of files give way": (V2, "0::/", {"": (1000, 900, 300)}, 400),
    "none": (V2, "0::/job", {"job": ("max", 400, 0)}, None),
    "the host's path in a container": (V2, "0::/docker/0123", {"": (1000, 100, 0)}, 900),
    "version 1": (
        V1,
        "5:cpu,cpuacct:/\n4:memory:/slice/job",
        {"memory/slice/job": (1000, 900, 250), "memory/slice": (NO_LIMIT, 2000, 0), "memory": (NO_LIMIT, 9000, 0)},
        350,
    ),
    "version 1 with version 2 beside it": (V1, "4:memory:/job\n0::/job", {"memory/job": (700, 900, 0)}, 0),
    "no memory controller": (V1, "3:cpuset:/", {}, None),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_what_a_container_allows_is_found(name, tmp_path):
    (limit_name, usage_name), said, groups, left = CGROUPS[name]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{said}\n")
    for path, (limit, usage, cached) in groups.items():
        group = tmp_path / "sys/fs/cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / limit_name).write_text(f"{limit}\n")
        (group / usage_name).write_text(f"{usage}\n")
        totals = "total_" if path.startswith("memory") else ""
        (group / "memory.stat").write_text(f"{totals}inactive_file {cached}\n{totals}active_file 0\nanon 7\n")
    assert container_headroom(tmp_path) == left
    assert (free_memory(tmp_path) == left) == (left is not None)


def test_without_control_groups_nothing_limits(tmp_path):
    assert container_headroom(tmp_path) is None


def test_the_pruner_without_output_waits_in_a_temporary_folder(tiny_folder, tmp_path):
    pruner = CompPruner.from_pretrained(tiny_folder, tiny_tokenizer())
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32))
    assert pruner.model.config.intermediate_size == pruner.report.width
    one = pruner.save_pretrained(tmp_path / "one")
    many = pruner.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert (many / "model.safetensors.index.json").exists()
    both = [AutoModelForCausalLM.from_pretrained(folder) for folder in (one, many)]
    assert torch.equal(*map(logits, both))
    # Where prune has written, there is nothing left to save.
    pruner = CompPruner.from_pretrained(tiny_folder)
    pruner.prune(CompConfig(**CONFIG), tiny_blocks(8, 32), output=tmp_path / "out")
    assert pruner.save_pretrained(tmp_path / "out") == tmp_path / "out"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
@pytest.mark.parametrize("apart", [True, False])
def test_large_blocks_between_small_ones_go_back_to_the_system(apart):
    """A block of 30 MB that was freed makes glibc keep the following ones of 16 MB, unless it is told not to."""
    call = "keep_large_blocks_apart()" if apart else "None"
    script = f"""
import psutil, torch
from optimum_comp.utils import keep_large_blocks_apart
torch.ones(7_500_000)
{call}
large, small = [], []
for _ in range(16):
    large.append(torch.ones(4_000_000))
    small.append(torch.ones(10_000))
process = psutil.Process()
before = process.memory_info().rss
del large
print(before - process.memory_info().rss)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert (int(done.stdout) > 200e6) == apart
