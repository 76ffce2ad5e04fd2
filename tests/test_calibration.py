from __future__ import annotations

import json
import random
import re

import datasets
import pytest
import torch
from conftest import tiny_blocks, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimum_comp.calibration.mix import counts_of, parts_of
from optimum_comp.calibration.self_written import seeded
from optimum_comp.calibration.text import (
    choose_blocks,
    first_tokens,
    prepare_calibration,
    read_beginning,
    read_named_dataset,
    read_text,
    tokenize,
)


TEXT = "The cat sat on the mat and looked at the moon.\n" * 40


def prepare(source, **overrides):
    arguments = {"model": None, "tokenizer": tiny_tokenizer(), "num_samples": 4, "sequence_length": 32}
    return prepare_calibration(source, **{**arguments, **overrides})


def write(path, kind: str, column: str = "text"):
    rows = [{column: line, "id": number} for number, line in enumerate(TEXT.splitlines())]
    table = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path, index=False)
    else:
        path.write_text(TEXT)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "csv"])
def test_files_of_every_kind(kind, tmp_path):
    got = prepare(write(tmp_path / f"text.{kind}", kind))
    assert got.tokens.shape == (4, 32)
    assert got.source == f"text.{kind}"
    assert "cat sat" in tiny_tokenizer().decode(got.tokens.flatten())


def test_a_text_file_is_read_with_its_line_breaks(tmp_path):
    text, _ = read_text(write(tmp_path / "text.txt", "txt"))
    assert text == TEXT


def test_lists_datasets_and_blocks():
    rows = datasets.Dataset.from_dict({"text": TEXT.splitlines(), "other": [0] * 40})
    assert torch.equal(prepare(TEXT.splitlines()).tokens, prepare(rows).tokens)
    blocks = tiny_blocks(6, 40)
    assert torch.equal(prepare(blocks).tokens, blocks[:4, :32])


def test_a_named_dataset_is_streamed_until_there_is_enough(tmp_path):
    # `load_dataset` takes a folder by the same name argument as a repository on the hub.
    write(tmp_path / "train.parquet", "parquet", "body")
    rows = read_named_dataset(str(tmp_path), "body", needed=None)
    assert "".join(f"{row}\n" for row in rows) == TEXT
    assert len(read_named_dataset(f"{tmp_path}::train", "body", needed=4)) < len(rows)
    with pytest.raises(ValueError, match="no column 'text'; it has: body, id"):
        read_named_dataset(str(tmp_path), None, needed=None)
    with pytest.raises(ValueError, match="neither a file here nor a dataset"):
        read_named_dataset(f"{tmp_path}::validation", "body", needed=None)


def test_pydoc_is_on_every_machine():
    text, name = read_text("pydoc")
    assert name == "pydoc" and len(text) > 200_000


def test_one_long_line_is_text_like_any_other(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("word " * 400)
    assert prepare(path).tokens.shape == (4, 32)


def test_the_digest_is_of_the_tokens():
    first, again, other = prepare(TEXT.splitlines()), prepare([TEXT.rstrip("\n")]), prepare(TEXT.splitlines(), seed=1)
    assert first.describe()["sha256"] == prepare(TEXT.splitlines()).describe()["sha256"]
    assert first.describe()["sha256"] != other.describe()["sha256"]
    assert again.describe()["tokens"] == 128


@given(total=st.integers(0, 400), samples=st.integers(1, 8), length=st.integers(2, 40), seed=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_blocks_are_distinct_pieces_of_the_text(total, samples, length, seed):
    tokens = torch.arange(total)
    if total // length < samples:
        with pytest.raises(ValueError, match="too short"):
            choose_blocks(tokens, samples, length, seed, "text")
        return
    blocks = choose_blocks(tokens, samples, length, seed, "text")
    assert blocks.shape == (samples, length)
    assert all(torch.equal(block, torch.arange(int(block[0]), int(block[0]) + length)) for block in blocks)
    starts = blocks[:, 0].tolist()
    assert starts == sorted(set(starts))


BAD = {
    "empty.txt": ("", "is empty"),
    "blank.txt": ("  \n \n", "no text"),
    "short.txt": ("Too short.", "is too short for calibration"),
    "broken.jsonl": ('{"text": "a"}\n{"text": ', "can't be read as json"),
    "column.jsonl": ('{"body": "a"}\n', "has no column 'text'; it has: body"),
    "number.jsonl": ('{"text": 3}\n', "holds int where text is wanted"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        prepare(path)


def test_binary_missing_and_folders_are_refused(tmp_path):
    path = tmp_path / "model.txt"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare(path)
    with pytest.raises(ValueError, match="does not exist"):
        prepare(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="is a folder"):
        prepare(tmp_path)


def test_another_column_can_be_named(tmp_path):
    assert prepare(write(tmp_path / "t.parquet", "parquet", "body"), text_column="body").tokens.shape == (4, 32)


@pytest.mark.parametrize("source", [3, [1, 2], {"a": 1}, None])
def test_what_is_no_text_is_refused(source):
    with pytest.raises(ValueError, match=r"is not understood|no column"):
        prepare(source)


def test_blocks_must_be_tokens():
    with pytest.raises(ValueError, match="integer tensor"):
        prepare(torch.rand(4, 32))
    with pytest.raises(ValueError, match="fewer than num_samples=4"):
        prepare(tiny_blocks(2, 32))


def test_more_than_the_context_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="more than the 2048 tokens"):
        prepare(TEXT.splitlines(), model=model, sequence_length=4096)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        prepare(TEXT.splitlines(), tokenizer=None)


def test_self_calibration_is_repeatable_and_leaves_the_global_seed_alone():
    model = tiny_model("llama")
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    first = prepare("self", model=model, seed=1)
    assert torch.equal(torch.rand(3), want)
    assert first.tokens.shape == (4, 32) and first.source == "self"
    assert torch.equal(first.tokens, prepare("self", model=model, seed=1).tokens)
    assert not torch.equal(first.tokens, prepare("self", model=model, seed=2).tokens)


def test_a_model_without_a_chat_template_writes_full_blocks_from_nothing():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = None
    first = prepare("self", model=model, tokenizer=tokenizer, seed=1)
    assert first.tokens.shape == (4, 32)
    assert not bool((first.tokens == model.generation_config.eos_token_id).any())
    assert not torch.equal(first.tokens, prepare("self", model=model, tokenizer=tokenizer, seed=2).tokens)


def test_a_chat_model_answers_requests_for_its_calibration():
    """The requests are there, in the template's words."""
    blocks = prepare("self", model=tiny_model("llama"), tokenizer=tiny_tokenizer()).tokens
    said = tiny_tokenizer().decode(blocks.flatten())
    assert any(word in said for word in ("Write", "Explain", "Give", "Answer", "Tell"))


def test_self_calibration_seeds_no_other_device():
    """Of a model on the processor; what torch would seed a GPU with waits there until one is used."""
    model = tiny_model("llama")
    waiting = torch.cuda._lazy_seed_tracker.get_calls()
    prepare("self", model=model, seed=1)
    assert torch.cuda._lazy_seed_tracker.get_calls() == waiting


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_generators_are_seeded_and_left_as_they_were(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is none")
    states = [torch.random.get_rng_state(), *torch.cuda.get_rng_state_all()]
    drawn = []
    for seed in (1, 1, 2):
        with seeded(seed, torch.zeros(1, device=device).device):
            drawn.append((torch.rand(3), torch.rand(3, device=device)))
    assert all(torch.equal(*pair) for pair in zip(drawn[0], drawn[1], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(drawn[0], drawn[2], strict=True))
    after = [torch.random.get_rng_state(), *torch.cuda.get_rng_state_all()]
    assert all(torch.equal(*pair) for pair in zip(states, after, strict=True))


def test_self_calibration_needs_a_start_token():
    model = tiny_model("llama")
    for holder in (model.config, model.generation_config):
        holder.bos_token_id = holder.eos_token_id = holder.pad_token_id = None
    with pytest.raises(ValueError, match="begin- or end-of-text token"):
        prepare("self", model=model, tokenizer=None)


def trained(kind: str):
    """A tokenizer that learnt Python's documentation: byte-level as GPT-2's, or as Llama's, without any splitting."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if kind == "unigram":
        tokenizer, trainer = (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"]),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=1500, special_tokens=["<s>"])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "unsplit":
        # Learnt from words, and used on a whole text that is one word.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(read_text("pydoc")[0][:200_000].split("\n\n"), trainer)
    if kind == "unsplit":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def odd_text(seed: int, pieces: int) -> str:
    """English, line breaks of all kinds, long words, accents, and languages without spaces."""
    draw, english = random.Random(seed), read_text("pydoc")[0]
    kinds = [
        lambda: english[(start := draw.randrange(len(english) - 400)) : start + draw.randrange(400)],
        lambda: draw.choice(["\n", "\n\n", " \n \t", "   ", "...\n\n", "\r\n", ")).\n"]),
        lambda: "x" * draw.randrange(300),
        lambda: "漢字仮名" * draw.randrange(60),
        lambda: draw.choice(["e\u0301", "ﬁ", "naïve", "🙂🙂", "12345678901234567890"]),
    ]
    return "".join(draw.choices(kinds, [6, 3, 1, 1, 1])[0]() for _ in range(pieces))


def require_first_tokens(tokenizer, path) -> None:
    """Of odd texts in a file and in a list, the first tokens are those of the whole text."""
    for seed in range(30):
        path.write_bytes(odd_text(seed, 60).encode())
        for source in (path, [path.read_text(encoding="utf-8")]):
            whole = tokenize(tokenizer, read_text(source)[0])
            for count in (1, 7, 100, 500, whole.numel() - 1, whole.numel(), whole.numel() + 5):
                found = first_tokens(tokenizer, read_beginning(source)[0], count)
                assert torch.equal(found, whole[:count]), (seed, count)


@pytest.mark.parametrize("kind", ["characters", "byte-level", "unsplit", "unigram"])
def test_first_tokens_are_those_of_the_whole_text(kind, tmp_path):
    require_first_tokens(tiny_tokenizer() if kind == "characters" else trained(kind), tmp_path / "text.txt")


@pytest.mark.slow
def test_first_tokens_are_those_of_the_whole_text_with_a_real_tokenizer(real_model, tmp_path):
    require_first_tokens(AutoTokenizer.from_pretrained(real_model), tmp_path / "text.txt")


def test_little_of_a_long_text_is_read_and_tokenized(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("The cat sat on the mat.\n" * 200_000)
    read = []
    beginning, name = read_beginning(path)

    def watched(characters: int) -> str:
        read.append(len(beginning(characters)))
        return beginning(characters)

    assert first_tokens(tiny_tokenizer(), watched, 500).numel() == 500 and name == "long.txt"
    assert max(read) < 10_000
    # One word that never ends has to be read as a whole.
    path.write_text("a" * 20_000)
    assert first_tokens(tiny_tokenizer(), read_beginning(path)[0], 500).numel() == 500
    path.write_text(" " * 20_000)
    with pytest.raises(ValueError, match="holds no text"):
        first_tokens(tiny_tokenizer(), read_beginning(path)[0], 500)


def test_tokenize_adds_nothing():
    assert tokenize(tiny_tokenizer(), "abc").numel() == 3


def test_a_mix_takes_its_shares(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 2000)
    source = f"{tmp_path / 'a.txt'}:0.75,{tmp_path / 'b.txt'}:0.25"
    found = prepare_calibration(source, model=None, tokenizer=tiny_tokenizer(), num_samples=8, sequence_length=16)
    letters = [tiny_tokenizer().decode(block)[0] for block in found.tokens]
    assert letters.count("a") == 6 and letters.count("b") == 2
    assert letters != sorted(letters)
    assert found.source == "a.txt 75%, b.txt 25%"


@settings(deadline=None)
@given(shares=st.lists(st.floats(0.05, 5), min_size=2, max_size=6), samples=st.integers(1, 200))
def test_counts_of_a_mix_add_up(shares, samples):
    parts = parts_of(",".join(f"t{number}:{share!r}" for number, share in enumerate(shares)))
    assert sum(part.share for part in parts) == pytest.approx(1)
    try:
        counts = counts_of(parts, samples)
    except ValueError as error:
        assert "leaves" in str(error) and "none; take more samples" in str(error)
        return
    assert sum(counts) == samples and min(counts) >= 1
    assert all(abs(count - part.share * samples) < 1 for count, part in zip(counts, parts, strict=True))


def test_what_is_no_mix_is_one_source(tmp_path):
    odd = tmp_path / "a,b:0.5"
    odd.write_text("text")
    for source in (str(odd), "pydoc", "self", "wikitext:wikitext-2-raw-v1:test", str(tmp_path / "no.txt")):
        assert parts_of(source) == ()
    assert [part.source for part in parts_of("wikitext:raw:test:0.5,self")] == ["wikitext:raw:test", "self"]
    # A number beyond a share is a name's; a comma in the name of a file that is there divides nothing.
    assert parts_of("corpus:2021") == parts_of("pydoc:0") == ()
    assert [part.source for part in parts_of(f"{odd}:0.25,self")] == [str(odd), "self"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pydoc:0,self:1", "gives 'pydoc' the share 0; it must be above 0"),
        ("pydoc:-1,self:1", "gives 'pydoc' the share -1; it must be above 0"),
        ("pydoc:nan,self", "gives 'pydoc' the share nan"),
        ("pydoc,pydoc", "names 'pydoc' twice"),
        ("pydoc,,self", "names an empty source; write a mix as SOURCE:SHARE"),
    ],
)
def test_a_mix_that_is_none_is_refused(source, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parts_of(source)
