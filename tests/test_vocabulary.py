"""A smaller vocabulary: what stays against brute force, tokenizers of all kinds, models that compute as before."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_families import CONFIGS, SIZES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_comp import CompConfig, CompPruner, VocabularySettings, shrink_vocabulary
from optimum_comp.checkpoint.opening import open_source
from optimum_comp.commands.explain import explain
from optimum_comp.compress import run as run_recipe
from optimum_comp.evaluation import Settings, evaluate
from optimum_comp.report.table import evaluation_table
from optimum_comp.stages.recipe import Recipe
from optimum_comp.vocabulary import run as vocabulary_run
from optimum_comp.vocabulary.expected import expected_tokens
from optimum_comp.vocabulary.numbering import ids_needed, renumbered
from optimum_comp.vocabulary.scripts import SCRIPTS, characters_of, script_of
from optimum_comp.vocabulary.selection import BYTE_CHARACTERS, BYTES, Characters, Merges, Needs, choose, content
from optimum_comp.vocabulary.tokenizer_file import TokenizerFile


ENGLISH = "The cat sat on the mat and looked at the moon; nobody knew what the cats thought of it.\n" * 20
OTHERS = "Кошка сидела на коврике и смотрела на луну.\nÉté à la plage, où ça coûte “5 €”.\n猫坐在垫子上看月亮。\n" * 20
OUTSIDE = "ζωή हिन्दी 🙂👩‍👧 \ufffd\x00 ＡＢ"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MARKER = "<turn>"
KINDS = ("bytes", "fallback", "unigram")

REAL = Path(os.environ.get("COMP_TEST_GEMMA", Path(__file__).parent.parent / "models" / "gemma3"))


def with_bos(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, clean_up_tokenization_spaces=False)
    made.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    return made


def learnt(size: int = 420) -> Tokenizer:
    """A byte-pair encoding of bytes; its special tokens are its last, so that cutting moves them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([ENGLISH, OTHERS], trainer)
    tokenizer.add_special_tokens([*SPECIAL, MARKER])
    return tokenizer


def with_fallback() -> Tokenizer:
    """Like Gemma's: of characters, bytes for what isn't known, and every split of a token is a merge."""
    source = Tokenizer(models.BPE())
    source.normalizer = normalizers.Replace(" ", "▁")
    source.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    source.train_from_iterator([ENGLISH, OTHERS], trainers.BpeTrainer(vocab_size=260))
    pieces = sorted(source.get_vocab(), key=source.get_vocab().get)
    pieces = [*SPECIAL, MARKER, "<unused7>", *BYTES, *pieces]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[6 + 256 :]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # Not the marker: files are about that don't declare theirs.
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram(*, bytes_: bool = True) -> Tokenizer:
    source = Tokenizer(models.Unigram())
    source.normalizer = normalizers.Replace(" ", "▁")
    source.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    source.train_from_iterator([ENGLISH, OTHERS], trainers.UnigramTrainer(vocab_size=260, show_progress=False))
    learnt_pieces = [tuple(each) for each in json.loads(source.to_str())["model"]["vocab"]]
    pieces = [(piece, 0.0) for piece in SPECIAL] + [(piece, -20.0) for piece in BYTES] * bytes_ + learnt_pieces
    tokenizer = Tokenizer(models.Unigram(pieces, 3, bytes_))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([*SPECIAL, MARKER])
    return tokenizer


TOKENIZERS = {"bytes": learnt, "fallback": with_fallback, "unigram": unigram}


def write_dense(folder: Path, kind: str = "bytes", family: str = "llama", rows: int = 3) -> Path:
    """A model whose embedding has some more rows than there are tokens, with its tokenizer."""
    tokenizer = with_bos(TOKENIZERS[kind]())
    model_type, fields = CONFIGS[family]
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
    }
    config = CONFIG_MAPPING[model_type](vocab_size=len(tokenizer) + rows, **{**SIZES, **fields, **ids})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
        elif "embed" not in name:
            parameter.data *= 4
    model.generation_config.suppress_tokens = [0, len(tokenizer) - 1, tokenizer.convert_tokens_to_ids("</s>")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return {kind: write_dense(folder / kind, kind) for kind in KINDS}


def kept_of(folder: Path) -> list[int]:
    return json.loads((folder / "comp_vocabulary.json").read_text())["kept"]


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# --- What stays.


def test_bytes_of_a_text_are_told_from_others():
    alphabet = ("a", "é", "ê", "€", "🙂", "語")
    inside = Characters(alphabet)
    parts = set()
    for text in itertools.product(alphabet, repeat=3):
        whole = "".join(text).encode()
        parts |= {whole[start:end] for start in range(len(whole)) for end in range(start + 1, len(whole) + 1)}
    short = {part for part in parts if len(part) <= 5}
    assert all(inside.make(part) for part in short)
    values = sorted({value for part in parts for value in part} | {0x62, 0x80, 0xC3, 0xE3})
    for length in (1, 2, 3):
        for part in itertools.product(values, repeat=length):
            assert inside.make(bytes(part)) == (bytes(part) in short), bytes(part)


def test_every_text_of_a_script_is_made_of_its_parts():
    assert Characters(characters_of(["ascii"])).make(b"The cat's 3 moons\n")
    assert not Characters(characters_of(["cyrillic"])).make(b"cat")
    assert Characters(characters_of(["cyrillic"])).make("5 лун – “да”".encode())
    assert not Characters(characters_of(["ascii"])).make("naïve".encode())
    for name, ranges in SCRIPTS.items():
        assert all(first <= last for first, last in ranges), name
        # Every character can be encoded: none is half of a pair.
        "".join(characters_of([name])).encode()
    words = {
        "cat": "latin",
        "кот": "cyrillic",
        " 12.": "digits and signs",
        "猫cat": "several scripts",
        "ⵣ": "other scripts",
    }
    assert {text: script_of(text) for text in words} == words


def byte_pair_file(merges: list[tuple[str, str]]) -> dict:
    """A byte-level `tokenizer.json` with these merges, which are of letters."""
    vocabulary = {character: token for token, character in enumerate(BYTE_CHARACTERS)}
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


@st.composite
def merge_lists(draw):
    """Merges in any order, also several that make one token, and some whose parts come about only later."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 12))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if len("".join(pair)) <= 5 and pair not in merges:
            merges.append(pair)
            tokens.append("".join(pair))
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


TEXTS = ["".join(text) for length in range(1, 7) for text in itertools.product("abc", repeat=length)]


@settings(deadline=None, max_examples=40)
@given(merges=merge_lists(), data=st.data())
def test_byte_pairs_read_what_stays_as_before_and_all_else_whole(merges, data):
    whole = byte_pair_file(merges)
    file = TokenizerFile(whole, "x")
    made = sorted(set(file.pieces) - file.bytes_)
    wanted = data.draw(st.lists(st.sampled_from(made), unique=True)) if made else []
    kept = sorted(choose(file.always, wanted, file.needs))
    was, now = (Tokenizer.from_str(json.dumps(each)) for each in (whole, file.cut(kept)))
    new = {token: place for place, token in enumerate(kept)}
    for text in TEXTS:
        before, after = was.encode(text).ids, now.encode(text).ids
        assert now.decode(after) == text
        if all(token in new for token in before):
            assert after == [new[token] for token in before], text
    # Nothing stays that no text is made, and what is wanted can be made.
    for token in wanted:
        text = file.pieces[token]
        assert (now.encode(text).ids == [new.get(token)]) == (was.encode(text).ids == [token])


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_unigrams_read_what_stays_as_before_and_all_else_whole(data):
    strings = ["".join(text) for length in range(1, 4) for text in itertools.product("abc", repeat=length)]
    chosen = data.draw(st.lists(st.sampled_from(strings), unique=True, min_size=1))
    falls_back = data.draw(st.booleans())
    if not falls_back:
        # As every such vocabulary has them: without, some would be refused.
        chosen = list(dict.fromkeys([*chosen, *{letter for piece in chosen for letter in piece}]))
    scores = data.draw(st.lists(st.integers(-6, -1), min_size=len(chosen), max_size=len(chosen)))
    pieces = [("<unk>", 0.0), *((piece, -9.0) for piece in BYTES * falls_back)]
    pieces += [(piece, float(score)) for piece, score in zip(chosen, scores, strict=True)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, falls_back))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    whole = json.loads(tokenizer.to_str())
    file = TokenizerFile(whole, "x")
    wanted = data.draw(st.lists(st.sampled_from(range(len(pieces))), unique=True))
    kept = sorted(choose(file.always, wanted, file.needs))
    was, now = (Tokenizer.from_str(json.dumps(each)) for each in (whole, file.cut(kept)))
    new = {token: place for place, token in enumerate(kept)}
    for text in TEXTS[::3]:
        before, after = was.encode(text).ids, now.encode(text).ids
        assert now.decode(after) == was.decode(before)
        if all(token in new for token in before):
            assert after == [new[token] for token in before], text


def test_a_token_needs_what_it_is_merged_from_and_no_other_way_to_it():
    # `abc` can be made of `a` + `bc` or of `ab` + `c`; by the order of the merges, only the latter ever is.
    merges = Merges([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")], {"a", "b", "c", "ab", "bc", "abc", "x"})
    assert merges.parts("abc") == {"a", "b", "c", "ab", "abc"}
    assert merges.parts("x") == {"x"} and merges.parts("xx") is None
    assert merges.among({"a", "b", "ab", "abc", "c"}) == [0, 3]


def test_a_limit_takes_the_most_wanted_with_what_they_need():
    merges = Merges([("a", "b"), ("ab", "c"), ("c", "c")], {"a", "b", "c", "ab", "abc", "cc"})
    pieces = dict(enumerate(("a", "b", "c", "ab", "abc", "cc")))
    needs = Needs(pieces, merges)
    assert choose([0, 1, 2], [4], needs) == {0, 1, 2, 3, 4}
    # `abc` needs two places, of which there is one: the next in order gets it.
    assert choose([0, 1, 2], [4, 5], needs, limit=4) == {0, 1, 2, 5}
    assert choose([0, 1, 2], [5], needs, multiple=5, spare=[3, 4]) == {0, 1, 2, 3, 5}
    assert choose([0, 1, 2], [4, 5], needs, limit=5, multiple=4) == {0, 1, 2, 5}
    with pytest.raises(ValueError, match=r"max_tokens=2 is not valid: .* 3 already"):
        choose([0, 1, 2], [], needs, limit=2)
    with pytest.raises(ValueError, match=r"round_to=7 is not valid: 3 tokens stay, and there are too few others"):
        choose([0, 1, 2], [], needs, multiple=7, spare=[3, 4, 5])


def test_what_a_piece_stands_for():
    assert content("Ġcaf\u00c3\u00a9", of_bytes=True) == " café".encode()
    assert content("▁café", of_bytes=False) == " café".encode()


def test_ids_in_settings_are_found_and_renumbered():
    given = {
        "vocab_size": 9,
        "eos_token_id": [7, 8],
        "pad_token_id": -1,
        "text_config": {"bos_token_id": 5, "num_layers": 5},
        "suppress_tokens": [1, 5],
        "bad_words_ids": [[1, 5], [5, 7]],
        "sequence_bias": [[[1], 2.0], [[8], 3.0]],
        "forced_decoder_ids": [[1, 8]],
        "added_tokens_decoder": {"1": {"content": "x"}, "7": {"content": "y"}},
    }
    assert ids_needed(given) == {5, 7, 8}
    new = {5: 0, 7: 1, 8: 2}
    assert renumbered(given, new.get) == {
        "vocab_size": 9,
        "eos_token_id": [1, 2],
        "pad_token_id": -1,
        "text_config": {"bos_token_id": 0, "num_layers": 5},
        "suppress_tokens": [0],
        "bad_words_ids": [[0, 1]],
        "sequence_bias": [[[2], 3.0]],
        "forced_decoder_ids": [[1, 2]],
        "added_tokens_decoder": {"1": {"content": "y"}},
    }


# --- Models and tokenizers.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scripts", [["ascii"], ["latin", "cyrillic"]])
def test_texts_are_read_as_before_or_come_back_whole(kind, scripts, dense, tmp_path):
    found = shrink_vocabulary(dense[kind], tmp_path / "out", VocabularySettings(scripts=scripts))
    was, now = (AutoTokenizer.from_pretrained(folder) for folder in (dense[kind], tmp_path / "out"))
    kept = kept_of(tmp_path / "out")
    new = {token: place for place, token in enumerate(kept)}
    assert len(now) == len(kept) == found.tokens_after < found.tokens_before
    assert all(
        now.convert_tokens_to_ids(token) == new[was.convert_tokens_to_ids(token)] for token in [*SPECIAL, MARKER]
    )
    inside = ENGLISH if scripts == ["ascii"] else ENGLISH + OTHERS.replace("猫坐在垫子上看月亮。", "")
    assert now(inside)["input_ids"] == [new[token] for token in was(inside)["input_ids"]]
    for text in (OTHERS, OUTSIDE, "".join(map(chr, range(0x20, 0x500, 7)))):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (was, now)]
        assert decoded(now, ids[1]) == decoded(was, ids[0]) == text
        assert len(ids[1]) >= len(ids[0])
    assert now.chat_template == was.chat_template
    assert now.bos_token_id == new[was.bos_token_id] and now("x")["input_ids"][0] == now.bos_token_id


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_as_it_would_have(kind, text, both):
    was, now = both[kind]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (was, now)]
    assert now.decode(ids[1], skip_special_tokens=False) == was.decode(ids[0], skip_special_tokens=False)


@pytest.fixture(scope="module")
def both(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    found = {}
    for kind in KINDS:
        shrink_vocabulary(dense[kind], folder / kind, VocabularySettings(scripts=["ascii"]))
        found[kind] = [Tokenizer.from_file(str(each / "tokenizer.json")) for each in (dense[kind], folder / kind)]
    return found


def test_without_bytes_no_character_is_lost(tmp_path):
    TOKENIZERS["characters"] = lambda: unigram(bytes_=False)
    try:
        folder = write_dense(tmp_path / "dense", "characters")
    finally:
        del TOKENIZERS["characters"]
    shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    was, now = (AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "out"))
    for text in (ENGLISH, OTHERS, OUTSIDE):
        assert decoded(now, now(text)["input_ids"]) == decoded(was, was(text)["input_ids"])
    assert len(now) < len(was)


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3", "phi", "gpt2", "opt-350m", "falcon", "bloom", "gpt_neox", "cohere", "mistral", "starcoder2"],
)
def test_models_compute_what_they_did(family, tmp_path):
    folder = write_dense(tmp_path / "dense", "bytes", family)
    found = shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    was, now = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (folder, tmp_path / "out"))
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "out")]
    ids = [tokenizer(ENGLISH[:300], return_tensors="pt")["input_ids"] for tokenizer in tokenizers]
    kept = kept_of(tmp_path / "out")
    with torch.no_grad():
        before, after = was(ids[0]).logits[..., kept], now(ids[1]).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert now.config.vocab_size == found.tokens_after == len(kept)
    assert sum(each.numel() for each in now.parameters()) == found.parameters_after
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(now.config, name) == kept.index(getattr(was.config, name))
        assert getattr(now.generation_config, name) == getattr(now.config, name)
    # What may not be said is the same; what went needn't be forbidden.
    there = [token for token in was.generation_config.suppress_tokens if token in kept]
    assert now.generation_config.suppress_tokens == [kept.index(token) for token in there]
    if was.config.tie_word_embeddings:
        assert now.get_output_embeddings().weight is now.get_input_embeddings().weight
    # What is generated is what the dense model would have said of these tokens.
    gone = sorted(set(range(was.config.vocab_size)) - set(kept))
    was.generation_config.suppress_tokens = now.generation_config.suppress_tokens = None
    said = [
        model.generate(prompt, max_new_tokens=12, do_sample=False, min_new_tokens=12, **more)[0, prompt.shape[1] :]
        for model, prompt, more in ((was, ids[0], {"suppress_tokens": gone}), (now, ids[1], {}))
    ]
    assert [kept[token] for token in said[1]] == said[0].tolist()


def test_a_model_with_fewer_tokens_can_be_pruned(dense, tmp_path):
    shrink_vocabulary(dense["bytes"], tmp_path / "small", VocabularySettings(scripts=["ascii"]))
    (tmp_path / "text.txt").write_text(ENGLISH)
    pruner = CompPruner.from_pretrained(str(tmp_path / "small"))
    config = CompConfig(sparsity=0.4, num_samples=8, sequence_length=32, round_to=8, begin="always")
    pruner.prune(config, str(tmp_path / "text.txt"), output=tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["vocab_size"] == len(
        kept_of(tmp_path / "small")
    )
    # And the other way round, with what it was pruned on.
    CompPruner.from_pretrained(str(dense["bytes"])).prune(
        config, str(tmp_path / "text.txt"), output=tmp_path / "first"
    )
    shrink_vocabulary(tmp_path / "first", tmp_path / "then", VocabularySettings(scripts=["ascii"]))
    reports = [json.loads((tmp_path / name / "comp_report.json").read_text()) for name in ("first", "then")]
    (start,), (new,) = (report["calibration"]["begins_with"] for report in reports)
    assert new != start and kept_of(tmp_path / "then")[new] == start
    card = (tmp_path / "then" / "README.md").read_text()
    assert "structured pruning" in card and "tokens" in card.split("comp_report.json")[-1]


def test_shards_and_a_tied_head_of_its_own_in_the_files(dense, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(dense["bytes"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    names = sorted(weights)
    placed = {name: f"model-{1 + names.index(name) % 2:05d}-of-00002.safetensors" for name in names}
    for file in set(placed.values()):
        save_file({name: weights[name] for name in names if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    kept = kept_of(tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == weights.keys()
    for name, weight in weights.items():
        cut = name in ("lm_head.weight", "model.embed_tokens.weight")
        assert torch.equal(made[name], weight[kept] if cut else weight), name
    assert not list((tmp_path / "out").glob("parts*"))


def test_other_files_of_a_tokenizer_say_the_same(tmp_path):
    folder = write_dense(tmp_path / "dense", "bytes", "gpt2")
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.model.save(str(folder))
    ids = {text: backend.token_to_id(text) for text in [*SPECIAL, MARKER]}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "tokenizer.model").write_bytes(b"stale")
    shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    now = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    read = models.BPE.from_file(str(tmp_path / "out" / "vocab.json"), str(tmp_path / "out" / "merges.txt"))
    again = Tokenizer(read)
    again.pre_tokenizer, again.decoder = now.pre_tokenizer, now.decoder
    text = ENGLISH + OTHERS
    assert again.encode(text).ids == now.encode(text, add_special_tokens=False).ids
    added = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    assert added == {text: now.token_to_id(text) for text in ids}


def test_a_text_chooses_its_tokens(dense, tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH)
    chosen = VocabularySettings(text=[str(tmp_path / "text.txt")])
    found = shrink_vocabulary(dense["bytes"], tmp_path / "out", chosen)
    was = AutoTokenizer.from_pretrained(dense["bytes"])
    seen = set(was(ENGLISH, add_special_tokens=False)["input_ids"])
    assert seen <= set(kept_of(tmp_path / "out"))
    told = found.texts["text.txt"]
    assert told["kept"] == 1 and told["distinct"] == len(seen) and "100.00% of its tokens stay" in found.headline()
    fewer = shrink_vocabulary(
        dense["bytes"], tmp_path / "few", VocabularySettings(text=chosen.text, max_tokens=290, round_to=8)
    )
    # 288: the largest multiple below the limit.
    assert fewer.tokens_after == 288 and 0.5 < fewer.texts["text.txt"]["kept"] < 1
    rounded = shrink_vocabulary(
        dense["bytes"], tmp_path / "round", VocabularySettings(text=chosen.text, round_to=64), overwrite=True
    )
    assert rounded.tokens_after == -(-found.tokens_after // 64) * 64


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_a_model_expects_is_the_mean_of_its_predictions(family, tmp_path):
    folder = write_dense(tmp_path / "dense", family=family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(model.config.vocab_size, (3, 7))
    source = open_source(str(folder), model.config, torch.device("cpu"), {}, {})
    for begun in (0, 1, 2):
        found = expected_tokens(source, ids, begun)
        wanted = torch.softmax(model(ids).logits[:, max(0, begun - 1) :].double(), -1).mean((0, 1))
        assert torch.allclose(found, wanted, atol=1e-6) and float(found.sum()) == pytest.approx(1)


def test_of_tokens_that_the_text_lacks_those_stay_that_the_model_expects(dense, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("nobody sat on the mat\n" * 100)
    given = {"scripts": ["ascii"], "text": [str(tmp_path / "text.txt")], "max_tokens": 295}
    rows = json.loads((dense["bytes"] / "config.json").read_text())["vocab_size"]
    by_ids = shrink_vocabulary(dense["bytes"], tmp_path / "ids", VocabularySettings(**given, expected=0))
    everything = vocabulary_run.Plan.of(str(dense["bytes"]), VocabularySettings(scripts=["ascii"]))
    longest = max(set(everything.kept) - set(kept_of(tmp_path / "ids")))
    assert "expects" not in by_ids.chosen_by
    seen = []

    def expects(source, samples, given=0):
        seen.append((samples.shape, samples[:, 0].unique().numel(), given))
        chances = torch.zeros(rows, dtype=torch.float64)
        chances[longest] = 1.0
        return chances

    monkeypatch.setattr(vocabulary_run, "expected_tokens", expects)
    plan = vocabulary_run.Plan.of(str(dense["bytes"]), VocabularySettings(**given), ask_model=False)
    assert not seen and len(plan.kept) == len(kept_of(tmp_path / "ids"))
    found = shrink_vocabulary(dense["bytes"], tmp_path / "expected", VocabularySettings(**given, expected=2))
    assert seen == [((2, 256), 1, 1)]
    assert found.chosen_by == "scripts ascii and frequency in text and in what the model expects there"
    # With all that it is merged from, and in the place of others.
    assert longest in kept_of(tmp_path / "expected") and found.tokens_after == by_ids.tokens_after
    with pytest.raises(ValueError, match="max_tokens=20 is not valid"):
        shrink_vocabulary(dense["bytes"], tmp_path / "none", VocabularySettings(**{**given, "max_tokens": 20}))
    assert len(seen) == 1
    # Where nothing beyond the text's tokens stays, or all that the scripts have does, nobody is asked.
    for fewer in ({"text": given["text"], "max_tokens": 295}, {"scripts": ["ascii"], "text": given["text"]}):
        vocabulary_run.Plan.of(str(dense["bytes"]), VocabularySettings(**fewer))
    assert len(seen) == 1


def test_what_a_chat_template_says_stays(dense, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dense["bytes"], folder)
    frame = "The assistant answers what it is asked."
    template = "{% for turn in messages %}" + frame + "{{ turn['role'] }}: {{ turn['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "text.txt").write_text("x y z\n" * 20)
    shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(text=[str(tmp_path / "text.txt")]))
    was, now = (AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "out"))
    written = was.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)
    counts = [len(each(written, add_special_tokens=False)["input_ids"]) for each in (was, now)]
    assert frame in written and counts[0] == counts[1] < len(written)


def test_markers_that_nothing_declares_stay(dense, tmp_path):
    shrink_vocabulary(dense["fallback"], tmp_path / "out", VocabularySettings(scripts=["cyrillic"]))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert MARKER in tokens and "<unused7>" not in tokens and "▁" in tokens and "a" in tokens and "▁the" not in tokens


def test_ids_that_only_a_class_knows_are_written_down(dense, tmp_path):
    """Llama's config begins texts with token 1 where the file says nothing: that token gets another id."""
    folder = tmp_path / "dense"
    shutil.copytree(dense["bytes"], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(scripts=["cyrillic"], round_to=7))
    kept = kept_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == kept.index(1)


# --- What is refused.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing says which tokens are to stay: name scripts"),
        (
            {"scripts": ["klingon"]},
            r"scripts=\['klingon'\] is not valid: scripts must be a list of some of ascii, latin",
        ),
        ({"scripts": ["ascii"], "max_tokens": 200}, "max_tokens=200 is not valid: special tokens, bytes .* are 26"),
        ({"scripts": ["ascii"], "round_to": 1000}, "round_to=1000 is not valid"),
        ({"scripts": list(SCRIPTS), "round_to": 425}, "is not valid|nothing would go"),
        ({"text": []}, r"text=\[\] is not valid"),
        ({"text": ["nowhere.txt"]}, "'nowhere.txt' does not exist"),
    ],
)
def test_settings_that_are_wrong_are_said_first(given, said, dense, tmp_path):
    with pytest.raises(ValueError, match=said):
        shrink_vocabulary(dense["bytes"], tmp_path / "out", VocabularySettings(**given))
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_are_not_known_are_refused_by_name(dense, tmp_path):
    folder = tmp_path / "dense"

    def refused(said: str, change) -> None:
        shutil.copytree(dense["bytes"], folder)
        change()
        with pytest.raises(ValueError, match=said):
            shrink_vocabulary(folder, tmp_path / "out", VocabularySettings(scripts=["ascii"]))
        shutil.rmtree(folder)
        assert not list(tmp_path.iterdir())

    def changed(**model):
        data = json.loads((folder / "tokenizer.json").read_text())
        data["model"] |= model
        (folder / "tokenizer.json").write_text(json.dumps(data))

    refused("is a WordLevel; what can be cut are byte-pair", lambda: tiny_tokenizer().save_pretrained(folder))
    refused("is a BPE with end_of_word_suffix='</w>'", lambda: changed(end_of_word_suffix="</w>"))
    refused("has no tokenizer.json, which is what is cut", lambda: (folder / "tokenizer.json").unlink())
    refused("the tokenizer of .* can't be used", lambda: (folder / "tokenizer.json").write_text("{"))

    def of_characters():
        data = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**data, "pre_tokenizer": None}))

    refused("is a BPE of characters, which has nothing for those that it doesn't know", of_characters)

    shutil.rmtree(folder, ignore_errors=True)
    data = json.loads((dense["fallback"] / "tokenizer.json").read_text())
    del data["model"]["vocab"]["<0x7F>"]
    with pytest.raises(ValueError, match="of x is a BPE without tokens for the bytes 0x7F"):
        TokenizerFile(data, "x")


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_byte_without_a_token_is_lost_as_before_and_nothing_else(whole_words):
    """As in SmolLM2's vocabulary, which lacks some control characters."""
    data = byte_pair_file([("a", "b"), ("ab", "c"), ("c", "a")])
    gone = BYTE_CHARACTERS[0x04]
    del data["model"]["vocab"][gone]
    # Only where words are looked up whole, a text becomes this one.
    data["model"]["vocab"][f"ab{gone}"] = 4
    data["model"]["ignore_merges"] = whole_words
    file = TokenizerFile(data, "x")
    kept = sorted(choose(file.always, [file.ids["ca"]], file.needs))
    was, now = (Tokenizer.from_str(json.dumps(each)) for each in (data, file.cut(kept)))
    assert (4 in kept) == whole_words and file.ids["abc"] not in kept
    for text in ("abc", "ab\x04", "\x04", "a\x04\x04c", "caba", "abca\x04"):
        assert now.decode(now.encode(text).ids) == was.decode(was.encode(text).ids)


def test_a_character_that_only_longer_tokens_hold_would_be_lost():
    pieces = [("<unk>", 0.0), ("a", -1.0), ("ab", -1.0)]
    with pytest.raises(ValueError, match="of x is a Unigram without bytes in which 'b' alone is no token"):
        TokenizerFile(json.loads(Tokenizer(models.Unigram(pieces, 0, False)).to_str()), "x")


def test_families_that_are_not_known_are_refused_by_name(dense, tmp_path):
    config = CONFIG_MAPPING["mamba"](vocab_size=430, hidden_size=16, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense["bytes"] / name, tmp_path / "dense" / name)
    with pytest.raises(ValueError, match="mamba"):
        shrink_vocabulary(tmp_path / "dense", tmp_path / "out", VocabularySettings(scripts=["ascii"]))


def test_an_output_is_replaced_only_when_asked(dense, tmp_path):
    chosen = VocabularySettings(scripts=["ascii"])
    shrink_vocabulary(dense["bytes"], tmp_path / "out", chosen)
    with pytest.raises(FileExistsError, match="exists and isn't empty"):
        shrink_vocabulary(dense["bytes"], tmp_path / "out", chosen)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shrink_vocabulary(dense["bytes"], tmp_path / "out", chosen, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    with pytest.raises(ValueError, match="is also the input"):
        shrink_vocabulary(dense["bytes"], dense["bytes"], chosen, overwrite=True)


def test_nothing_is_left_of_a_tokenizer_that_reads_otherwise(dense, tmp_path, monkeypatch):
    cut = TokenizerFile.cut

    def wrong(self, kept):
        data = cut(self, kept)
        del data["model"]["merges"][20:]
        return data

    monkeypatch.setattr(TokenizerFile, "cut", wrong)
    with pytest.raises(ValueError, match="can't be cut: with fewer tokens it reads"):
        shrink_vocabulary(dense["bytes"], tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    assert not list(tmp_path.iterdir())


# --- Commands, the chain, measuring.


def test_the_command_says_what_went_and_explain_why(dense, tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH)
    done = run(
        *("vocabulary", "--model", dense["fallback"], "--scripts", "ascii", "--json", tmp_path / "found.json"),
        *("--text", tmp_path / "text.txt", tmp_path / "out"),
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"-> {found['tokens_after']:,} tokens (by scripts ascii and text)" in done.stdout
    said = run("explain", tmp_path / "out").stdout
    assert "chosen by scripts ascii and text" in said and "merges" in said and "cyrillic" in said
    wrong = run("vocabulary", "--model", dense["fallback"], "--scripts", "asci", tmp_path / "no", check=False)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "scripts=['asci'] is not valid" in wrong.stderr
    (tmp_path / "out" / "comp_vocabulary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"comp_vocabulary\.json is damaged"):
        explain(tmp_path / "out")


def test_bits_per_byte_are_those_of_the_text(dense, tmp_path):
    (tmp_path / "text.txt").write_text(OTHERS)
    shrink_vocabulary(dense["bytes"], tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    chosen = Settings(text=str(tmp_path / "text.txt"), window=32, prompt_tokens=0, begin="always", max_tokens=640)
    was, now = (evaluate(folder, chosen) for folder in (dense["bytes"], tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(dense["bytes"])
    tokens = tokenizer(OTHERS, add_special_tokens=False)["input_ids"][: 640 // 31 * 31]
    # A byte-level token's characters are its bytes; those that aren't predicted are left out.
    pieces = [tokenizer.convert_ids_to_tokens(token) for place, token in enumerate(tokens) if place % 31]
    count = sum(map(len, pieces))
    # Characters that a window's end cuts through are decoded as three bytes each.
    assert was.bytes_predicted == pytest.approx(count, rel=0.05)
    assert was.bits_per_byte == pytest.approx(math.log2(was.perplexity) * was.predictions / was.bytes_predicted)
    assert (was.vocabulary, now.vocabulary) == (len(tokenizer) + 3, len(kept_of(tmp_path / "out")))
    assert now.begins_with != was.begins_with and now.start == was.start == "<s>"
    table = evaluation_table({"was": was, "now": now})
    assert "bits/byte" in table and f"{now.bits_per_byte:.4f}" in table and "(1.000x)" in table
    assert f"{now.perplexity:.2f} |" in table and "Vocabularies differ, so perplexities aren't comparable" in table


def test_what_comes_after_sees_the_small_vocabulary(dense, tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH)
    small = {"num_samples": 8, "sequence_length": 32, "round_to": 8, "begin": "always"}
    recipe = {
        "model": str(dense["bytes"]),
        "stages": [
            {"vocabulary": {"scripts": ["ascii"]}},
            {"prune": {"sparsity": 0.3, "calibration": str(tmp_path / "text.txt"), **small}},
            {"distil": {"steps": 3, "sequence_length": 32, "matmul_dtype": "float32"}},
        ],
        "measure": False,
    }
    found = run_recipe(Recipe.from_dict(recipe), tmp_path / "out")
    kept = kept_of(tmp_path / "out" / "vocabulary")
    names = ["vocabulary", "vocabulary-pruned", "vocabulary-pruned-distilled"]
    for name in names:
        assert json.loads((tmp_path / "out" / name / "config.json").read_text())["vocab_size"] == len(kept)
    assert found.vocabulary["tokens_after"] == len(kept) and "tokens (by scripts ascii)" in found.text()
    report = json.loads((tmp_path / "out" / "vocabulary-pruned" / "comp_report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "vocabulary")
    assert report["calibration"]["begins_with"] == [tokenizer.bos_token_id]
    # The one that was pruned teaches, since the dense one predicts other tokens; it is called as the dense one is.
    told = json.loads((tmp_path / "out" / names[-1] / "comp_distil.json").read_text())
    assert told["teacher"] == report["source"] == dense["bytes"].name
    again = run_recipe(Recipe.from_dict(recipe), tmp_path / "out")
    assert all(again.costs[name].earlier for name in ("vocabulary", "prune", "distil"))
    assert again.vocabulary["tokens_after"] == len(kept)
    recipe["stages"][0]["vocabulary"]["scripts"] = ["latin"]
    said = r"vocabulary was made otherwise \(scripts=\['ascii'\], not \['latin'\]\)"
    with pytest.raises(FileExistsError, match=said):
        run_recipe(Recipe.from_dict(recipe), tmp_path / "out")


@pytest.mark.usefixtures("measured_here")
def test_models_of_a_chain_are_measured_each_with_its_own_tokens(dense, tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH)
    measuring = {"window": 32, "max_tokens": 96, "prompt_tokens": 0, "new_tokens": 2, "repeats": 1, "begin": "always"}
    recipe = {
        "model": str(dense["bytes"]),
        "stages": [{"vocabulary": {"scripts": ["ascii"]}}],
        "measure": {"text": str(tmp_path / "text.txt"), **measuring},
    }
    found = run_recipe(Recipe.from_dict(recipe), tmp_path / "out").stages
    assert list(found) == ["dense", "vocabulary"]
    was, now = found.values()
    assert was.begins_with != now.begins_with and was.start == now.start == "<s>"
    # The same text in the same tokens: less is left to choose from, by a model that knows nothing.
    assert now.bytes_predicted == was.bytes_predicted and now.bits_per_byte < was.bits_per_byte


@pytest.mark.onnx
def test_the_chain_goes_to_the_end(dense, tmp_path):
    (tmp_path / "text.txt").write_text(ENGLISH)
    run(
        *("compress", "--model", dense["bytes"], "--vocabulary", "ascii", "--vocabulary-round-to", 8, "--quiet"),
        *("--calibration", tmp_path / "text.txt", "--num-samples", 8, "--sequence-length", 32, "--round-to", 8),
        *("--sparsity", 0.3, "--no-measure", tmp_path / "out"),
    )
    from optimum_comp.onnx.runtime import load_onnx

    folder = tmp_path / "out" / "vocabulary-pruned-int8"
    count = len(kept_of(tmp_path / "out" / "vocabulary"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(ENGLISH[:200], return_tensors="pt")
    model = load_onnx(folder, threads=1)
    assert count % 8 == 0 and model(**inputs).logits.shape[-1] == count >= len(tokenizer)
    assert [each["kind"] for each in explain(tmp_path / "out").values()] == ["vocabulary", "pruning", "quantization"]


@pytest.mark.slow
def test_gemma_keeps_what_ascii_needs(tmp_path):
    if not (REAL / "config.json").is_file():
        pytest.skip(f"{REAL} holds no Gemma 3 (COMP_TEST_GEMMA)")
    found = shrink_vocabulary(REAL, tmp_path / "out", VocabularySettings(scripts=["ascii"]))
    assert 140_000 < found.tokens_after < 155_000
    assert found.parameters_after < 0.74 * found.parameters_before
    was, now = (AutoTokenizer.from_pretrained(folder) for folder in (REAL, tmp_path / "out"))
    kept = kept_of(tmp_path / "out")
    new = {token: place for place, token in enumerate(kept)}
    from pydoc_data.topics import topics

    text = "\n".join(topics.values()).encode("ascii", "ignore").decode()[:200_000]
    assert now(text)["input_ids"] == [new[token] for token in was(text)["input_ids"]]
    ids = now(OTHERS + OUTSIDE, add_special_tokens=False)["input_ids"]
    assert decoded(now, ids) == OTHERS + OUTSIDE
    ids = [tokenizer(text[:600], return_tensors="pt")["input_ids"] for tokenizer in (was, now)]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(REAL).eval()(ids[0]).logits[..., kept]
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids[1]).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)
