from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IDS, SIZES, need_onnx, tiny_model, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast


need_onnx()

import onnx  # noqa: E402
from optimum.onnxruntime import ORTModelForCausalLM  # noqa: E402

import optimum_comp  # noqa: E402
from optimum_comp.bundle import MANIFEST, BundleError, assembly, verify_bundle, write_bundle  # noqa: E402
from optimum_comp.onnx import genai_trial  # noqa: E402
from optimum_comp.onnx.export import export_onnx  # noqa: E402
from optimum_comp.onnx.genai import GenaiTrial, genai_config, try_in_genai  # noqa: E402
from optimum_comp.onnx.genai_tokenizer import mend_tokenizer  # noqa: E402
from optimum_comp.onnx.graph import dense_nodes, load_float_graph  # noqa: E402
from optimum_comp.onnx.quantization import Plan, quantize_onnx  # noqa: E402
from optimum_comp.onnx.recipes import EIGHT, FOUR  # noqa: E402
from optimum_comp.onnx.runtime import load_onnx  # noqa: E402


TEXT = "Hello  world\n\n  def f(x):\treturn 'é漢😀'\n"


def byte_level_tokenizer(decoder=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT, "the theory of the thing, " * 20, "hello world " * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}<s>{{ m['content'] }}$\n{% endfor %}",
    )


def gguf_decoder():
    """As conversions from GGUF write it: made for SentencePiece, with the byte-level step at its end."""
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
    return decoders.Sequence(steps)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A tiny tied Llama with a byte-level tokenizer of the kind that GenAI reads wrong: checkpoint, int8 folder."""
    root = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 320, "intermediate_size": 96, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **IDS, tie_word_embeddings=True, rope_theta=50_000.0, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Answers that aren't the same token all over.
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(root / "checkpoint")
    byte_level_tokenizer(gguf_decoder()).save_pretrained(root / "checkpoint")
    export_onnx(root / "checkpoint", root / "onnx")
    quantize_onnx(root / "onnx", root / "int8")
    return root / "checkpoint", root / "int8"


@pytest.fixture(scope="module")
def bundle(chain, tmp_path_factory):
    """A bundle of it, weights in a file of their own."""
    output = tmp_path_factory.mktemp("bundle") / "phone"
    report = write_bundle(chain[1], output, target="arm64", external_data_bytes=0)
    return output, report


def greedy(folder: Path, **kwargs) -> list[int]:
    prompt = torch.tensor([[5, 90, 17, 200, 33]])
    model = load_onnx(folder, threads=1, **kwargs)
    assert isinstance(model, ORTModelForCausalLM)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=12, max_new_tokens=12)
    return tokens[0].tolist()


@pytest.mark.parametrize("external_data_bytes", [0, 100_000_000])
def test_bundle_generates_what_its_source_does(external_data_bytes, chain, tmp_path, capfd):
    report = write_bundle(chain[1], tmp_path / "out", target="arm64", external_data_bytes=external_data_bytes)
    assert (tmp_path / "out" / "model.onnx.data").is_file() == (external_data_bytes == 0)
    assert report.recipe == "int8"
    assert report.genai_graph == "model.onnx"
    assert report.genai_agrees is True
    assert "and gives ONNX Runtime's tokens" in report.text()
    assert greedy(tmp_path / "out") == greedy(chain[1])
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_external_data_holds_the_weights(chain, bundle):
    folder, _ = bundle
    whole = (chain[1] / "model.onnx").stat().st_size
    # Of so small a model, half is graph.
    assert (folder / "model.onnx.data").stat().st_size > whole / 3
    stored = {t.name: t for t in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer}
    large = [t for t in stored.values() if np.prod(t.dims) > 2048]
    assert large
    assert all({e.key: e.value for e in t.external_data}["location"] == "model.onnx.data" for t in large)


def test_manifest_lists_every_file_and_verifies(bundle):
    folder, report = bundle
    manifest = json.loads((folder / MANIFEST).read_text())
    listed = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert listed == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != MANIFEST}
    assert manifest["total_bytes"] == sum(listed.values()) == report.size_bytes
    assert (manifest["format_version"], manifest["target"], manifest["recipe"]["name"]) == (1, "arm64", "int8")
    assert manifest["versions"]["onnxruntime"]
    found = verify_bundle(folder)
    assert (found.files, found.target, found.recipe, found.notes) == (report.files, "arm64", "int8", report.notes)


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", "README.md"])
def test_flipped_byte_is_found(name, bundle, tmp_path):
    shutil.copytree(bundle[0], tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{re.escape(name)} differs.*SHA-256"):
        verify_bundle(tmp_path / "copy")


def damage_size(folder: Path):
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")


def damage_manifest(folder: Path, change):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def raw(content: bytes):
    return lambda folder: (folder / MANIFEST).write_bytes(content)


def set_to(key: str, value):
    return lambda folder: damage_manifest(folder, lambda manifest: manifest.update({key: value}))


def set_in(part: str, key: str, value):
    return lambda folder: damage_manifest(folder, lambda manifest: manifest[part].update({key: value}))


def without(key: str):
    return lambda folder: damage_manifest(folder, lambda manifest: manifest.pop(key))


def first_file(**changes):
    return lambda folder: damage_manifest(folder, lambda manifest: manifest["files"][0].update(changes))


def name_twice(folder: Path):
    damage_manifest(folder, lambda manifest: manifest["files"].append(manifest["files"][0]))


def link_outside(name: str):
    def damage(folder: Path):
        moved = (folder / name).rename(folder.with_name("outside"))
        (folder / name).symlink_to(moved)

    return damage


def link(name: str, target: str):
    return lambda folder: (folder / name).symlink_to(target)


DAMAGED = rf"{re.escape(MANIFEST)} is damaged: "
NOT_INSIDE = rf"{re.escape(MANIFEST)} names .* not in the bundle"
OUTSIDE = [
    "../x",
    "a/../../x",
    "/etc/hostname",
    "//host/x",
    "..\\x",
    "\\\\host\\x",
    "C:/x",
    "c:x",
    "model.onnx:stream",
]
OUTSIDE += ["", ".", "./config.json", "a//b", "a/", "x\0y", "x\ny", "\ud800"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, r"model\.onnx has \d+ bytes; the manifest says \d+"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
        (lambda f: (f / "stranger.bin").write_bytes(b""), r"stranger\.bin is not in the manifest"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not in the manifest"),
        (lambda f: (f / MANIFEST).unlink(), "is not a bundle"),
        (raw(b""), DAMAGED),
        (raw(b"{"), DAMAGED),
        (raw(b"[]"), DAMAGED),
        (raw(b"null"), DAMAGED),
        (raw(b'"text"'), DAMAGED),
        (raw(b"\xff\xfe{}"), DAMAGED),
        (raw(b"[" * 200_000), DAMAGED),
        (raw(b'{"format":' * 100_000), DAMAGED),
        (raw(b'{"format_version": NaN}'), DAMAGED + "it holds NaN"),
        (raw(b'{"format_version": -Infinity}'), DAMAGED + "it holds -Infinity"),
        (raw(b'{"format_version": ' + b"9" * 5000 + b"}"), DAMAGED),
        (raw(b" " * 10_000_001), DAMAGED + "it has more than"),
        (set_to("format", "another"), "is not of the format"),
        (set_to("format", None), DAMAGED + "'format' is NoneType"),
        (set_to("format_version", 2), "format version 2"),
        (set_to("format_version", True), DAMAGED + "'format_version' is bool"),
        (set_to("format_version", [1]), DAMAGED),
        (set_to("total_bytes", 1), "total_bytes"),
        (set_to("total_bytes", 1e400), DAMAGED),
        (set_to("files", {}), DAMAGED + "'files' is dict"),
        (set_to("files", [[]]), DAMAGED + "there is list"),
        (set_to("files", []), DAMAGED),
        (set_to("target", 3), DAMAGED + "'target' is int"),
        (set_to("recipe", "int8"), DAMAGED),
        (set_in("recipe", "name", ["int8"]), DAMAGED),
        (set_to("genai", None), DAMAGED),
        (set_in("genai", "agrees", "yes"), DAMAGED),
        (set_in("genai", "graph", "other.onnx"), DAMAGED + "'other.onnx'"),
        (set_to("notes", "a note"), DAMAGED),
        (set_to("notes", [1]), DAMAGED),
        *((without(key), DAMAGED) for key in ("format", "files", "total_bytes", "target", "recipe", "genai", "notes")),
        (first_file(bytes="1"), DAMAGED + "'bytes' is str"),
        (first_file(bytes=True), DAMAGED),
        (first_file(bytes=-1), DAMAGED),
        (first_file(sha256=None), DAMAGED),
        (first_file(sha256="é"), "SHA-256 is another"),
        (first_file(path=7), DAMAGED),
        (first_file(path="x" * 5000), "can't be read: File name too long"),
        *((first_file(path=name), NOT_INSIDE) for name in OUTSIDE),
        (name_twice, DAMAGED + "it names '.*' twice"),
        (link_outside("config.json"), r"config\.json is a link to what is not in the bundle"),
        (link_outside(MANIFEST), r"manifest\.json is a link to what is not in the bundle"),
        (link("stranger", "/etc"), "stranger is a link to what is not in the bundle"),
        (link("stranger", "nowhere"), "stranger is a link to what is not in the bundle"),
        (link("stranger", "stranger"), "stranger is a link to what is not in the bundle"),
    ],
)
def test_damage_is_named(damage, message, bundle, tmp_path):
    shutil.copytree(bundle[0], tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(BundleError, match=message) as caught:
        verify_bundle(tmp_path / "copy")
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_manifest_is_read_or_refused(data, small_bundle):
    """One entry, wherever, is something else: it is no other error, and what was read is of the kinds that it says."""
    manifest = json.loads((small_bundle / MANIFEST).read_text())
    places = [(manifest, key) for key in manifest]
    places += [(manifest[part], key) for part in ("recipe", "genai") for key in manifest[part]]
    places += [(entry, key) for entry in manifest["files"] for key in entry]
    changed, key = data.draw(st.sampled_from(places))
    changed[key] = data.draw(VALUES)
    folder = small_bundle.with_name("changed")
    shutil.copytree(small_bundle, folder, dirs_exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        report = verify_bundle(folder)
    except BundleError as error:
        assert str(folder) in str(error)
        return
    assert report.text().startswith(str(folder))
    assert set(report.files) == {path.name for path in folder.iterdir()} - {MANIFEST}


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(inserted=st.binary(max_size=64), data=st.data())
def test_any_bytes_in_a_manifest_are_read_or_refused(inserted, data, small_bundle):
    content = (small_bundle / MANIFEST).read_bytes()
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    folder = small_bundle.with_name("changed")
    shutil.copytree(small_bundle, folder, dirs_exist_ok=True)
    (folder / MANIFEST).write_bytes(content[:start] + inserted + content[end:])
    with contextlib.suppress(BundleError):
        verify_bundle(folder).text()


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    """What `verify_bundle` takes for a bundle, of two small files."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    folder.mkdir()
    files = []
    for name in ("model.onnx", "config.json"):
        (folder / name).write_text(name)
        digest = hashlib.sha256(name.encode()).hexdigest()
        files.append({"path": name, "bytes": len(name), "sha256": digest})
    manifest = {
        "format": "optimum-comp-bundle",
        "format_version": 1,
        "target": "arm64",
        "recipe": {"name": "int8"},
        "genai": {"graph": "model.onnx", "agrees": None},
        "notes": [],
        "files": files,
        "total_bytes": sum(each["bytes"] for each in files),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify_bundle(folder).recipe == "int8"
    return folder


def test_a_bundle_in_the_hubs_cache_is_whole(small_bundle, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(small_bundle, blobs)
    for path in blobs.rglob("*"):
        if path.is_file():
            link = snapshot / path.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    assert verify_bundle(snapshot).size_bytes == verify_bundle(small_bundle).size_bytes


def test_links_within_a_bundle_are_followed(small_bundle, tmp_path):
    folder = shutil.copytree(small_bundle, tmp_path / "copy")
    (folder / "config.json").unlink()
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text("config.json")
    (folder / "config.json").symlink_to("other/config.json")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"].append({**manifest["files"][1], "path": "other/config.json"})
    manifest["total_bytes"] += manifest["files"][1]["bytes"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert len(verify_bundle(folder).files) == 3


def test_whatever_provides_onnxruntime_is_recorded(tmp_path, monkeypatch):
    """The same module comes from several distributions, and not all of the others need to be installed."""
    for name, version in (("onnxruntime_gpu", "1.99.0"), ("torch", "2.99.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata)
        (folder / "top_level.txt").write_text(name.removesuffix("_gpu"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert assembly._versions() == {
        "onnxruntime-gpu": "1.99.0",
        "torch": "2.99.0",
        "optimum-comp": optimum_comp.__version__,
    }


def test_existing_output_is_kept_or_replaced(chain, tmp_path):
    output = tmp_path / "out"
    write_bundle(chain[1], output, target="arm64")
    before = (output / MANIFEST).read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_bundle(chain[1], output, target="x86")
    assert (output / MANIFEST).read_bytes() == before
    write_bundle(chain[1], output, target="x86", overwrite=True)
    assert verify_bundle(output).target == "x86"
    with pytest.raises(ValueError, match="also the input"):
        write_bundle(chain[1], chain[1], target="arm64", overwrite=True)


def test_wrong_inputs_are_named_and_leave_nothing(chain, tmp_path):
    checkpoint, quantized = chain
    with pytest.raises(ValueError, match="arm64"):
        write_bundle(quantized, tmp_path / "out", target="pocket calculator")
    with pytest.raises(ValueError, match=r"no model\.onnx"):
        write_bundle(checkpoint, tmp_path / "out", target="arm64")
    assert list(tmp_path.iterdir()) == []


def test_model_for_another_target_is_noted(chain, tmp_path):
    shutil.copytree(chain[1], tmp_path / "int8")
    path = tmp_path / "int8" / "ort_config.json"
    config = json.loads(path.read_text())
    config["comp_recipe"]["target"] = "x86-vnni"
    path.write_text(json.dumps(config))
    report = write_bundle(tmp_path / "int8", tmp_path / "out", target="arm64")
    assert "quantized for x86-vnni, not for arm64" in report.text()


@pytest.mark.parametrize(
    ("exporter", "name"), [("optimum", "llama"), ("optimum", "opt"), ("genai", "mistral"), ("genai", "qwen2")]
)
def test_genai_config_agrees_with_graph_and_config(exporter, name, tmp_path):
    model = tiny_model(name)
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.repetition_penalty = 1.2
    model.save_pretrained(tmp_path / "checkpoint")
    export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", exporter=exporter)
    settings = genai_config(tmp_path / "onnx")
    decoder = settings["model"]["decoder"]
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]}

    layers = range(decoder["num_hidden_layers"])
    plain = {v for k, v in decoder["inputs"].items() if not k.startswith("past_")}
    keyed = {decoder["inputs"][f"past_{kind}_names"] % i for kind in ("key", "value") for i in layers}
    assert plain | keyed == {value.name for value in graph.input}
    outputs = {decoder["outputs"][f"present_{kind}_names"] % i for kind in ("key", "value") for i in layers}
    assert outputs | {decoder["outputs"]["logits"]} == {value.name for value in graph.output}
    heads, width = decoder["num_key_value_heads"], decoder["head_size"]
    assert all(shapes[entry.replace("past_key_values", "present")][1::2] == [heads, width] for entry in keyed)
    assert shapes["logits"][-1] == settings["model"]["vocab_size"] == model.config.vocab_size
    config = model.config
    assert decoder["num_hidden_layers"] == config.num_hidden_layers
    assert heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert decoder["hidden_size"] == config.hidden_size
    assert settings["model"]["eos_token_id"] == [2, 7]
    assert settings["model"]["bos_token_id"] == 1
    assert settings["search"]["repetition_penalty"] == 1.2
    assert settings["search"]["max_length"] <= settings["model"]["context_length"] == config.max_position_embeddings
    # Optimum's graph makes a cache that grows.
    assert settings["search"]["past_present_share_buffer"] is (exporter == "genai")


def test_model_without_an_end_is_refused(chain, tmp_path):
    shutil.copytree(chain[1], tmp_path / "int8")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "int8" / name
        settings = json.loads(path.read_text())
        settings["eos_token_id"] = None
        path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="eos_token_id"):
        write_bundle(tmp_path / "int8", tmp_path / "out", target="arm64")


def test_ort_format_computes_the_same(chain, tmp_path, capfd):
    from onnxruntime import InferenceSession

    report = write_bundle(chain[1], tmp_path / "out", target="arm64", ort_format=True)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert "model.required_operators_and_types.config" in report.files
    folder = tmp_path / "out"
    ids = np.arange(3, 19)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    logits = []
    for name in ("model.onnx", "model.ort"):
        session = InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        past = {v.name: np.zeros((1, 2, 0, 16), np.float32) for v in session.get_inputs() if "past" in v.name}
        logits.append(session.run(["logits"], feeds | past)[0])
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)
    assert greedy(folder) == greedy(chain[1])


def python_blocks(folder: Path) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    return blocks


def run_block(python: str | Path, folder: Path, number: int) -> str:
    command = [python, "-c", python_blocks(folder)[number]]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_readme_has_the_models_prompt_and_its_code_runs(bundle):
    folder, _ = bundle
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count('"<s>{question}$\\n"') == 3
    # A dollar sign is special in Kotlin.
    assert text.count('"<s>{question}\\$\\n"') == 1
    assert not re.findall(r"@[A-Z_]+@", text)
    assert run_block(sys.executable, folder, 0)


def encodings(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT)["input_ids"]
    return ids, tokenizer.decode(ids), tokenizer.apply_chat_template([{"role": "user", "content": TEXT}])


def test_misleading_tokenizer_is_mended(tmp_path):
    byte_level_tokenizer(gguf_decoder()).save_pretrained(tmp_path)
    before = encodings(tmp_path)
    (note,) = mend_tokenizer(tmp_path)
    assert "plain byte-level" in note
    assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "ByteLevel"
    assert encodings(tmp_path) == before
    assert TEXT in before[1]
    assert mend_tokenizer(tmp_path) == []


def test_mending_takes_the_llama_class_away(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("model_input_names", None)
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "unk_token": "<pad>"}
    path.write_text(json.dumps(settings))
    before = encodings(tmp_path), sorted(AutoTokenizer.from_pretrained(tmp_path)(TEXT))
    assert len(mend_tokenizer(tmp_path)) == 1
    assert json.loads(path.read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Without this, `model.generate(**inputs)` would be given token types.
    assert (encodings(tmp_path), sorted(AutoTokenizer.from_pretrained(tmp_path)(TEXT))) == before


def test_bundle_mends_its_own_copy_only(chain, bundle):
    checkpoint, quantized = chain
    assert (quantized / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert (bundle[0] / "tokenizer.json").read_bytes() != (quantized / "tokenizer.json").read_bytes()
    assert encodings(bundle[0]) == encodings(quantized)


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        (None, []),
        # Not a mistake: without that step, other text would come out.
        (decoders.Sequence([decoders.Replace("e", "E"), decoders.ByteLevel()]), ["can't be rewritten"]),
    ],
)
def test_other_tokenizers_are_left_alone(decoder, said, tmp_path):
    byte_level_tokenizer(decoder).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    notes = mend_tokenizer(tmp_path)
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


PROMPT, NEW = [5, 90, 17, 200, 33], 12


@pytest.mark.parametrize("weights", ["float", "int8", "int4-rtn", "int8-dynamic", "mixed"])
def test_both_runtimes_generate_the_same_with_the_one_graph(weights, chain, tmp_path):
    """A cache that grows in `ORTModelForCausalLM`, one buffer that is written into in GenAI."""
    exported = chain[1].with_name("onnx")
    folder = tmp_path / "quantized"
    if weights == "float":
        shutil.copytree(exported, folder)
    elif weights == "mixed":
        nodes = [node.name for node in dense_nodes(load_float_graph(exported / "model.onnx").graph)]
        left = [name for name in nodes if "o_proj" in name]
        assignment = {name: FOUR if "/mlp/" in name else EIGHT for name in nodes if name not in left}
        quantize_onnx(exported, folder, plan=Plan(assignment, left_in_float=left))
    else:
        quantize_onnx(exported, folder, recipe=weights)
    report = write_bundle(folder, tmp_path / "out", target="arm64")
    assert report.genai_agrees is True
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [node.op_type for node in graph.node].count("GroupQueryAttention") == SIZES["num_hidden_layers"]
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    trial = try_in_genai(tmp_path / "out", PROMPT, NEW)
    assert trial.tokens == greedy(tmp_path / "out")[len(PROMPT) :] == greedy(folder)[len(PROMPT) :]
    assert trial.agrees_with(AutoTokenizer.from_pretrained(tmp_path / "out"))


def test_a_tied_embedding_is_there_once(chain):
    """What the head multiplies by in blocks is what tokens are looked up in."""
    graph = onnx.load(chain[1] / "model.onnx").graph
    (head,) = (node for node in graph.node if "logits" in node.output)
    (lookup,) = (node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert head.op_type == "MatMulNBits"
    assert head.input[1] == lookup.input[0]
    vocabulary, width = 320, SIZES["hidden_size"]
    large = [t for t in graph.initializer if np.prod(t.dims) >= vocabulary * width]
    assert [t.name for t in large] == [head.input[1]]


@pytest.mark.parametrize("name", ["opt", "llama-untied", "mistral", "qwen2"])
def test_genai_runs_other_families(name, tmp_path, capfd):
    tiny_model(name).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    exported = export_onnx(tmp_path / "checkpoint", tmp_path / "onnx")
    # An architecture that the builder doesn't know is exported by Optimum, and GenAI runs it all the same.
    assert exported.exporter == ("optimum" if name == "opt" else "genai")
    assert ("not currently supported" in exported.reason) == (name == "opt")
    quantize_onnx(tmp_path / "onnx", tmp_path / "int8")
    capfd.readouterr()
    report = write_bundle(tmp_path / "int8", tmp_path / "out", target="arm64")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert report.genai_agrees is True


def test_genai_runs_the_code_of_the_readme(bundle):
    # It fails unless the code runs; this model may well have nothing to say.
    run_block(sys.executable, bundle[0], 1)


def test_without_genai_a_bundle_says_that_it_was_not_tried(chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    report = write_bundle(chain[1], tmp_path / "out", target="arm64")
    assert report.genai_agrees is None
    assert "which wasn't tried" in report.text()


def test_a_crash_is_told_and_one_over_the_tokenizer_is_none_of_the_graph(tmp_path, monkeypatch):
    """A trial that says what GenAI's would, and ends as a crash in a library does."""
    script = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(script))
    tokens = f"echo '{genai_trial.MARK}{{\"tokens\": [3, 4]}}'\n"
    for said in (tokens, ""):
        script.write_text(f"#!/bin/sh\n{said}kill -SEGV $$\n")
        script.chmod(0o755)
        if said:
            assert try_in_genai(tmp_path, [1, 2], 2) == GenaiTrial([3, 4], None)
        else:
            with pytest.raises(RuntimeError, match=r"doesn't run .* the process ended with status -11"):
                try_in_genai(tmp_path, [1, 2], 2)
