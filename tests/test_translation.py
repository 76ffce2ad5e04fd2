"""Distillation where the student lacks some of the teacher's tokens: against brute force, and on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vocabulary import ENGLISH, KINDS, OTHERS, OUTSIDE, decoded, write_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_comp import VocabularySettings, shrink_vocabulary
from optimum_comp.calibration.text import tokenize
from optimum_comp.compress import run as run_recipe
from optimum_comp.core.distillation import divergence, grouped
from optimum_comp.distillation import run as run_module
from optimum_comp.distillation.run import distil
from optimum_comp.distillation.settings import DistilSettings
from optimum_comp.distillation.translation import Translation, put_into
from optimum_comp.stages.recipe import Recipe
from optimum_comp.stages.vocabulary import Vocabulary


SMALL = {"sequence_length": 32, "learning_rate": 0.003, "matmul_dtype": "float32"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """By kind of tokenizer, a model and what is left of it with few tokens."""
    folder = tmp_path_factory.mktemp("both")
    found = {}
    for kind in KINDS:
        dense = write_dense(folder / kind, kind)
        few = {"bytes": 290, "fallback": 340, "unigram": 300}[kind]
        shrink_vocabulary(dense, folder / f"{kind}-few", VocabularySettings(scripts=["ascii"], max_tokens=few))
        found[kind] = (dense, folder / f"{kind}-few")
    (folder / "text.txt").write_text(ENGLISH)
    return {"text": folder / "text.txt", **found}


def translation_of(teacher: Path, student: Path) -> Translation:
    rows, tokens = (json.loads((each / "config.json").read_text())["vocab_size"] for each in (teacher, student))
    tokenizers = (AutoTokenizer.from_pretrained(each) for each in (teacher, student))
    return Translation.between(*tokenizers, rows, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_same_text(kind, both):
    teacher, student = (AutoTokenizer.from_pretrained(each) for each in both[kind])
    translation = translation_of(*both[kind])
    assert len(translation.broken()) > 10
    for text in (ENGLISH, OTHERS, OUTSIDE):
        ids = tokenize(teacher, text)
        found = translation.pieces_of(ids[None])
        assert decoded(student, found.tokens[0].tolist()) == decoded(teacher, ids.tolist())
        if text == ENGLISH:
            # As it reads the text itself; elsewhere, letters of two words may make a token that none of them has.
            assert torch.equal(found.tokens[0], tokenize(student, text))
            assert len(found.owner) > len(ids) or kind == "unigram"
    kept = translation.back
    assert teacher.convert_ids_to_tokens(kept.tolist()) == student.convert_ids_to_tokens(list(range(len(kept))))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pieces_stand_in_their_places(data):
    tokens, rows = 5, 9
    broken = st.lists(st.integers(0, tokens - 1), min_size=1, max_size=4)
    pieces = [[token] for token in range(tokens)] + [data.draw(broken) for _ in range(rows - tokens)]
    translation = Translation(pieces, list(range(tokens)))
    length = data.draw(st.integers(1, 6))
    ids = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(0, rows - 1), min_size=length, max_size=length), min_size=1, max_size=3)
        )
    )
    most = data.draw(st.none() | st.integers(1, 30))
    found = translation.pieces_of(ids, most)
    wanted = []
    for row, sample in enumerate(ids.tolist()):
        flat = [(piece, place, rest) for place, token in enumerate(sample) for rest, piece in enumerate(pieces[token])]
        for column, (piece, place, within) in enumerate(flat):
            following = flat[column + 1][0] if column + 1 < len(flat) else -1
            inside = within + 1 < len(pieces[sample[place]])
            if most is None or column < most:
                wanted.append((row, column, row * length + place, following, inside))
                assert found.tokens[row, column] == piece
    got = (found.row, found.column, found.owner, found.following, found.inside)
    assert list(zip(*(each.tolist() for each in got), strict=True)) == wanted
    assert found.tokens.sum() == sum(int(found.tokens[row, column]) for row, column, *_ in wanted)
    assert translation.blocks_of(ids).shape == ids.shape


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 6), groups=st.integers(1, 9), others=st.integers(0, 9), seed=st.integers(0, 99))
def test_a_group_is_as_likely_as_its_tokens(rows, groups, others, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = groups + others + 2
    order = torch.randperm(tokens, generator=generator)
    own, members = order[:groups], order[groups : groups + others]
    of = torch.randint(groups, (others,), generator=generator)
    logits = 5 * torch.randn(rows, tokens, generator=generator)
    offsets, taken_off = (torch.randn(each, generator=generator) for each in (tokens, groups))
    likely = (logits + offsets).double().exp()
    wanted = likely[:, own].clone()
    for member, group in zip(members.tolist(), of.tolist(), strict=True):
        wanted[:, group] += likely[:, member]
    found = grouped(logits, own, members, of, offsets, taken_off)
    assert torch.allclose(found, wanted.log().float() - taken_off, atol=1e-5)
    plain = grouped(logits, own, members, of)
    assert torch.allclose(plain, grouped(logits, own, members, of, torch.zeros(tokens), torch.zeros(groups)))


def test_what_is_as_good_as_impossible_stays_a_number():
    logits = torch.tensor([[0.0, -1e4, -1e4]])
    found = grouped(logits, torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([1]))
    assert found.isfinite().all()
    assert float(divergence(torch.zeros(1, 2), found)) == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-4)


def test_words_are_put_where_they_fit():
    ids = torch.zeros(2, 6, dtype=torch.int64)
    words = torch.tensor([7, 8])
    likely = torch.full((2, 5, 2), -50.0)
    likely[0, 3, 1] = likely[1, 0, 0] = -1.0
    found = put_into(ids, words, likely, 1, torch.Generator().manual_seed(0))
    assert found.tolist() == [[0, 0, 0, 0, 8, 0], [0, 7, 0, 0, 0, 0]] and not ids.any()
    # Nowhere that they don't.
    again = put_into(ids, words, likely, 5, torch.Generator().manual_seed(0), 0.01)
    assert torch.equal(again, found)
    assert not put_into(ids, words, likely - 10, 5, torch.Generator(), 0.01).any()
    # As often as they are likely, of places and of words.
    likely = torch.log(torch.tensor([[0.1, 0.2], [0.3, 0.4]])).expand(20_000, 2, 2)
    found = put_into(torch.zeros(20_000, 3, dtype=torch.int64), words, likely, 1, torch.Generator().manual_seed(0))
    shares = [float((found[:, place] == word).float().mean()) for place in (1, 2) for word in (7, 8)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
    everywhere = put_into(torch.zeros(1, 3, dtype=torch.int64), words, likely[:1], 9, torch.Generator())
    assert everywhere[0, 0] == 0 and (everywhere[0, 1:] > 0).all()


def test_those_that_come_up_are_looked_at():
    translation = Translation([[0], [1], [0, 1], [1, 0], [1, 1], []], [0, 1])
    assert translation.broken().tolist() == [2, 3, 4]
    chances = torch.tensor([0.5, 0.2, 0.0, 0.1, 0.2, 0.9])
    assert translation.likeliest(chances, [], 1).tolist() == [4]
    assert translation.likeliest(chances, [torch.tensor([[0, 2]])], 1).tolist() == [2, 4]
    assert translation.likeliest(chances, [], 9).tolist() == [2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_part", [False, True])
def test_a_student_learns_to_read_words_in_pieces(kind, is_part, both, tmp_path, monkeypatch):
    if is_part:
        monkeypatch.setattr(run_module, "_MISSING", 12)
        monkeypatch.setattr("optimum_comp.distillation.candidates._DRAWN", 10)
        monkeypatch.setattr("optimum_comp.distillation.candidates._MOST", 1.0)
    teacher, student = both[kind]
    # Of the last kind, whose trainer doesn't learn the same twice, the English text has no word that is lacking.
    (tmp_path / "text.txt").write_text(OTHERS if kind == "unigram" else ENGLISH)
    chosen = DistilSettings(text=[str(tmp_path / "text.txt")], steps=30, labels=0.0, **SMALL)
    found = distil(student, teacher, tmp_path / "out", chosen)
    assert found.after["text.txt"] < 0.95 * found.before["text.txt"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(ENGLISH[:100], return_tensors="pt").input_ids
    assert model(ids).logits.shape[-1] == model.config.vocab_size == len(translation_of(*both[kind]).back)
    again = distil(student, teacher, tmp_path / "again", chosen)
    assert again.after == found.after


def test_some_tokens_say_what_all_do(both, tmp_path, monkeypatch):
    teacher, student = both["bytes"]
    chosen = DistilSettings(text=[str(both["text"])], steps=3, **SMALL)
    whole = distil(student, teacher, tmp_path / "whole", chosen)
    monkeypatch.setattr("optimum_comp.distillation.candidates._MOST", 1.0)
    # All that no text has is drawn, and all words that are lacking are likely enough.
    part = distil(student, teacher, tmp_path / "part", chosen)
    assert part.after["text.txt"] == pytest.approx(whole.after["text.txt"], rel=1e-4)
    assert part.after["text.txt"] != part.before["text.txt"]


def test_a_model_that_lacks_nothing_of_the_text_has_nothing_to_learn_on_it(both, tmp_path):
    teacher = both["bytes"][0]
    shrink_vocabulary(teacher, tmp_path / "ascii", VocabularySettings(scripts=["ascii"]))
    chosen = DistilSettings(text=[str(both["text"])], steps=1, labels=0.0, **SMALL)
    found = distil(tmp_path / "ascii", teacher, tmp_path / "out", chosen)
    # But for what the teacher expects of other scripts, which the student doesn't have.
    cut, dense = (AutoModelForCausalLM.from_pretrained(each) for each in (tmp_path / "ascii", teacher))
    translation = translation_of(teacher, tmp_path / "ascii")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ids = tokenize(tokenizer, ENGLISH)[:64][None]
    likely = torch.softmax(dense(ids).logits[0], -1)
    first = likely[:, translation.back]
    broken = translation.broken()
    with_pieces = first.index_add(1, translation.first(broken), likely[:, broken])
    # Rows that no token has can't come next.
    with_pieces /= with_pieces.sum(-1, keepdim=True)
    wanted = (
        with_pieces * (with_pieces.log() - cut(translation.pieces_of(ids).tokens).logits[0].log_softmax(-1))
    ).sum(1)
    own = grouped(dense(ids).logits[0], translation.back, broken, translation.first(broken))
    got = divergence(cut(translation.pieces_of(ids).tokens).logits[0], own)
    assert float(got) == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert found.before["text.txt"] == pytest.approx(float(wanted.mean()), rel=0.3)


def test_a_model_of_another_vocabulary_is_refused(both, tmp_path):
    with pytest.raises(ValueError, match="have to have one vocabulary, or the student a part of the teacher's"):
        distil(both["bytes"][1], both["unigram"][0], tmp_path / "out", DistilSettings(steps=1, **SMALL))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rounding", [None, "int4-small"])
def test_a_chain_trains_what_lost_words_on_the_model_that_has_them(rounding, both, tmp_path):
    teacher = both["bytes"][0]
    distilling = {"steps": 3, "sequence_length": 32, "matmul_dtype": "float32", "text": [str(both["text"])]}
    if rounding is not None:
        distilling["rounding"] = rounding
    recipe = {
        "model": str(teacher),
        "stages": [{"vocabulary": {"scripts": ["ascii"], "max_tokens": 290}}, {"distil": distilling}],
        "measure": False,
    }
    found = run_recipe(Recipe.from_dict(recipe), tmp_path / "out")
    place = "vocabulary-distilled" + ("" if rounding is None else f"-for-{rounding}")
    told = json.loads((tmp_path / "out" / place / "comp_distil.json").read_text())
    assert told["teacher"] == teacher.name and found.distillation["after"].keys() == {"text.txt"}
    # All tokens of the script are there: the model would teach itself.
    del recipe["stages"][0]["vocabulary"]["max_tokens"]
    if rounding is None:
        with pytest.raises(ValueError, match="would teach the model its own predictions"):
            run_recipe(Recipe.from_dict(recipe), tmp_path / "other")


def test_answers_that_calibrated_are_read_as_the_teacher_reads_them(both, tmp_path):
    teacher = both["bytes"][0]
    small = {"num_samples": 8, "sequence_length": 32, "round_to": 8}
    recipe = {
        "model": str(teacher),
        "stages": [
            {"vocabulary": {"scripts": ["ascii"], "max_tokens": 290}},
            {"prune": {"sparsity": 0.3, "calibration": f"{both['text']}:0.5,self:0.5", **small}},
            {"distil": {"steps": 2, "sequence_length": 32, "written_tokens": 64, "matmul_dtype": "float32"}},
        ],
        "measure": False,
    }
    found = run_recipe(Recipe.from_dict(recipe), tmp_path / "out")
    assert set(found.distillation["after"]) == {"text.txt", "self"}
    named = {**recipe["stages"][2]["distil"], "teacher": str(teacher), "steps": 1}
    recipe["stages"][2]["distil"] = named
    again = run_recipe(Recipe.from_dict(recipe), tmp_path / "out", overwrite=True)
    assert again.distillation["steps"] == 1


def test_the_command_says_what_is_lacking(both, tmp_path):
    result = run(
        *("distil", "--model", both["bytes"][1], "--teacher", both["bytes"][0], "--text", both["text"], "--steps", 2),
        *("--sequence-length", 32, tmp_path / "out"),
    )
    assert "The student lacks" in result.stderr and (tmp_path / "out" / "comp_distil.json").is_file()


def test_a_vocabulary_that_was_made_without_the_model_is_taken_up(both):
    given = {"scripts": ["ascii"], "text": [str(both["text"])], "max_tokens": 290}
    before, none, asked = (
        Vocabulary(VocabularySettings(**given, **more)).identity(None)
        for more in ({}, {"expected": 0}, {"expected": 48})
    )
    assert before == asked == {**none, "expected": 48} and "expected" not in none
    assert "expected" not in Vocabulary(VocabularySettings(scripts=["ascii"])).identity(None)
