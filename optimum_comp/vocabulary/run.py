"""A checkpoint with fewer tokens: what stays is planned first, and then written."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_comp.beginning import in_front, start_tokens
from optimum_comp.calibration.text import evenly, read_beginning, read_text, tokenize
from optimum_comp.checkpoint.opening import CONFIG, GENERATION_CONFIG, find_device, open_config, open_source
from optimum_comp.checkpoint.parts import join_parts, write_part
from optimum_comp.checkpoint.reader import MODEL_FILES, Checkpoint, require_safetensors, resolve_folder, weight_files
from optimum_comp.checkpoint.source import empty_model, stored_names
from optimum_comp.checkpoint.tokenizer import TOKENIZER_FILES, copy_tokenizer, open_tokenizer
from optimum_comp.checkpoint.writer import copy_side_cars, write_portable_config
from optimum_comp.families import family_of
from optimum_comp.files import DISTILLATION, VOCABULARY, atomic_folder, check_folder, check_model
from optimum_comp.report.model_card import CARD, cut_card
from optimum_comp.report.run import REPORT_NAME
from optimum_comp.sweep.memory import check_disk
from optimum_comp.utils import explaining, get_logger, lookup_arguments, parameter_count, shown
from optimum_comp.vocabulary.expected import expected_tokens
from optimum_comp.vocabulary.numbering import ids_needed, renumbered
from optimum_comp.vocabulary.scripts import ASCII, characters_of, script_of
from optimum_comp.vocabulary.selection import Characters, choose
from optimum_comp.vocabulary.settings import VocabularySettings
from optimum_comp.vocabulary.tokenizer_file import TokenizerFile


logger = get_logger(__name__)

TOKENIZER = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_ADDED, _VOCABULARY, _MERGES = "added_tokens.json", "vocab.json", "merges.txt"
_STALE = ("tokenizer.model", "spiece.model", "vocab.txt", "*.tiktoken", "vocab.bpe")
"""Other files of a tokenizer that hold all tokens, in forms that nothing here writes."""
_PIECE = 2**20
"""Characters of a text that are made tokens at a time."""
_LENGTH = 255
"""Tokens of a sample that the model reads, behind its start token."""
_PROBE, _PROBES_OF_TOKENS, _TOGETHER = 2000, 64, 12
"""Characters of each text that the tokenizers are compared on; texts that are made for it, and tokens of each."""
_PROBES = (
    'The quick brown fox jumps over the lazy dog: "1,234.5 %", (don\'t!) -- x_1 = {y: [z]};\n\n\tdef f(a):  0\n',
    "Ça coûte 5 €, naïve Grüße, žluťoučký kůň, İstanbul – “quoted”…",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと 色は匂えど 中文字符。 한국어 문장. हिन्दी में एक वाक्य। สวัสดี שלום مرحبا",
    "🙂👩‍👩‍👧‍👦 ∑ → ≠ \u2581 \ufffd \U0001f9ff\x00\x7f",
)
"""Texts that the tokenizers are compared on."""


@dataclass(frozen=True)
class Shrunk:
    """What was made smaller.

    Attributes:
        output: the folder.
        tokens_before: rows that the embedding had.
        tokens_after: rows that it has.
        parameters_before: of the model, tied ones once.
        parameters_after: the same now.
        chosen_by: what decided which tokens stay.
        scripts: kind of token -> how many there were, and are.
        merges: of a byte-pair encoding, how many there were, and are; of others `None`.
        texts: name -> `tokens` it has, of them `kept` share, and `distinct` ones.
        settings: what was asked.
    """

    output: str
    tokens_before: int
    tokens_after: int
    parameters_before: int
    parameters_after: int
    chosen_by: str
    scripts: dict[str, list[int]]
    merges: list[int] | None
    texts: dict[str, dict[str, Any]]
    settings: dict[str, Any]

    def headline(self) -> str:
        """What was achieved, in one line."""
        less = 1 - self.parameters_after / self.parameters_before
        texts = "".join(f"; {name}: {told['kept']:.2%} of its tokens stay" for name, told in self.texts.items())
        return (
            f"{self.output}: {self.tokens_before:,} -> {self.tokens_after:,} tokens (by {self.chosen_by}), "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters ({less:.1%} fewer){texts}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def shrink_vocabulary(
    model: str | Path,
    output: str | Path,
    settings: VocabularySettings,
    *,
    loading: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> Shrunk:
    """Write a model with fewer tokens: a plain checkpoint with its tokenizer.

    Tokens keep their order, special tokens and bytes stay, and so does whatever a token that stays is merged from. A
    text whose tokens all stay is read as before; any other one is read in smaller pieces, and comes back whole.

    Args:
        model: folder or hub id, with safetensors.
        output: the folder to make.
        settings: which tokens stay.
        loading: how the model is found, under the names of `from_pretrained`.
        overwrite: replace a model that is in the output already.
        record: what the folder is to be known by, written as `STAGE_RECORD`; `None` for none.

    Raises:
        ValueError: the family or the kind of tokenizer isn't supported (named), a setting isn't allowed, a file is
            damaged, or nothing would go.
        FileExistsError: the output is there already.
        OSError: the model isn't there or can't be reached, or something can't be written.
    """
    check_model(model)
    check_folder(output, overwrite=overwrite, sources=[model] if Path(model).exists() else [])
    plan = Plan.of(str(model), settings, loading)
    return plan.write(output, overwrite=overwrite, record=record)


@dataclass(frozen=True)
class Plan:
    """Which tokens of a model stay, before anything is written.

    Attributes:
        model: folder or hub id.
        lookup: how it is found.
        settings: what was asked.
        config: the model's.
        file: its tokenizer's.
        kept: ids that stay, ascending; a token's place is its new id.
        shrunk: what comes out, but for its place.
    """

    model: str
    lookup: dict[str, Any]
    settings: VocabularySettings
    config: Any
    file: TokenizerFile
    kept: Sequence[int]
    shrunk: Shrunk

    @classmethod
    def of(
        cls,
        model: str,
        settings: VocabularySettings,
        loading: Mapping[str, Any] | None = None,
        *,
        ask_model: bool = True,
    ) -> Plan:
        """Choose the tokens; see `shrink_vocabulary`.

        Args:
            model: folder or hub id.
            settings: which tokens stay.
            loading: how the model is found.
            ask_model: have the model say what it expects, where the settings have it. Without, about as many tokens
                stay, but others, and no weight is read.
        """
        settings.require_choice()
        loading = dict(loading or {})
        lookup = lookup_arguments(loading)
        if "gguf_file" in lookup:
            raise ValueError(
                f"{model}: a GGUF file's vocabulary isn't cut; load it with transformers, save it with "
                "save_pretrained, and give that folder."
            )
        config = open_config(model, lookup)
        family_of(config)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{model} is quantized already; give the checkpoint that it was made from.")
        folder = resolve_folder(model, lookup, (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES))
        if not (folder / TOKENIZER).is_file():
            raise ValueError(
                f"{model} has no {TOKENIZER}, which is what is cut. If transformers can make one, do so once: "
                f"AutoTokenizer.from_pretrained({model!r}).save_pretrained(FOLDER)."
            )
        # First, because it refuses what is damaged.
        tokenizer = open_tokenizer(model, lookup)
        file = TokenizerFile(_read(folder / TOKENIZER), model)
        extra = _extra_tokens(file, tokenizer.get_vocab(), model)
        rows = int(config.vocab_size)
        needed = {*file.always, *extra.values(), *_ids_in_settings(folder, config), *_ids_of_chat(tokenizer)}
        counts, samples = _counts(settings, tokenizer)
        total = sum(counts.values(), Counter())
        wanted = {token for token in total if token < rows}
        frequency: Mapping[int, float] = total
        needed = {token for token in needed if token < rows}
        if ask_model and len(samples):
            # Refuses a limit that can't be kept, before a weight is read.
            choose(needed, (), file.needs, limit=settings.max_tokens)
            frequency = _with_expected(total, _expected(model, config, samples, tokenizer, lookup, loading))
        if settings.scripts is not None:
            characters = Characters(characters_of(settings.scripts))
            wanted |= {token for token in file.pieces if token < rows and characters.make(file.text(token))}
        kept = choose(
            needed,
            sorted(wanted, key=lambda token: (-frequency.get(token, 0), token)),
            file.needs,
            limit=settings.max_tokens,
            multiple=settings.round_to,
            spare=sorted(token for token in file.pieces if token < rows),
        )
        if len(kept) >= rows:
            raise ValueError(
                f"nothing would go: all {rows:,} tokens of {model} stay. Name fewer scripts or less text."
            )
        # A token without a row, which only an input of another kind has, stays one.
        beyond = [token for token in (*file.declared, *extra.values()) if token >= rows]
        order = sorted({*kept, *beyond})
        before, after = _skeletons(config, rows, len(kept), order)
        merges = None
        if file.merges is not None:
            left = file.merges.among({file.pieces[token] for token in order if token in file.pieces})
            merges = [len(file.merges.pairs), len(left)]
        shrunk = Shrunk(
            "",
            rows,
            len(kept),
            parameter_count(before),
            parameter_count(after),
            settings.chosen_by(),
            _by_script(file, rows, kept),
            merges,
            {name: _coverage(count, kept) for name, count in counts.items()},
            settings.to_dict(),
        )
        return cls(model, lookup, settings, config, file, order, shrunk)

    def new_id(self, token: int) -> int | None:
        """A token's new id; `None` if it goes. What is no token's id stays as it is."""
        if token >= max(self.shrunk.tokens_before, self.kept[-1] + 1):
            return token
        return self._new.get(token)

    @cached_property
    def _new(self) -> dict[int, int]:
        return {token: place for place, token in enumerate(self.kept)}

    def write(self, output: str | Path, *, overwrite: bool = False, record: Mapping[str, Any] | None = None) -> Shrunk:
        """Make the folder; see `shrink_vocabulary`."""
        folder = resolve_folder(self.model, self.lookup, (*MODEL_FILES, *TOKENIZER_FILES))
        require_safetensors(self.model, folder, self.lookup)
        checkpoint = Checkpoint.open(folder)
        check_disk(Path(output), sum(path.stat().st_size for path in weight_files(folder)))
        shrunk = dataclasses.replace(self.shrunk, output=str(output))
        with atomic_folder(output, overwrite=overwrite, sources=[folder], record=record) as made:
            self._write_weights(checkpoint, made)
            self._write_configs(folder, made)
            self._write_tokenizer(folder, made)
            self._require_same(made)
            self._write_side_cars(folder, made, shrunk)
        return shrunk

    def _write_weights(self, checkpoint: Checkpoint, made: Path) -> None:
        """Rows that stay, a weight at a time; all else is copied from file to file."""
        rows = torch.tensor([token for token in self.kept if token < self.shrunk.tokens_before])
        model = empty_model(self.config, torch.float32)
        names = stored_names(model, checkpoint)
        aliases = dict(model.named_parameters(remove_duplicate=False))
        cut = {id(parameter) for parameter in _of_vocabulary(model).values()}
        # A tied head may lie in the files beside the embedding.
        stored = {names.get(name) or name for name, parameter in aliases.items() if id(parameter) in cut}
        parts = made / "parts"
        parts.mkdir()
        written = []
        for number, name in enumerate(sorted(stored & checkpoint.tensors.keys())):
            written.append(parts / f"{number}.safetensors")
            write_part({name: checkpoint.read(name)[rows].contiguous()}, written[-1])
        join_parts([*weight_files(checkpoint.folder), *written], made, "5GB")
        shutil.rmtree(parts)

    def _write_configs(self, folder: Path, made: Path) -> None:
        config = {**_defaults(self.config, _read(folder / CONFIG)), "vocab_size": self.shrunk.tokens_after}
        _write(made / CONFIG, renumbered(config, self.new_id))
        write_portable_config(made / CONFIG)
        if (folder / GENERATION_CONFIG).is_file():
            _write(made / GENERATION_CONFIG, renumbered(_read(folder / GENERATION_CONFIG), self.new_id))

    def _write_tokenizer(self, folder: Path, made: Path) -> None:
        copy_tokenizer(folder, made)
        for pattern in _STALE:
            for path in made.glob(pattern):
                path.unlink()
        data = self.file.cut(self.kept)
        _write(made / TOKENIZER, data, indent=None)
        for name in _SETTINGS:
            if (made / name).is_file():
                _write(made / name, renumbered(_read(made / name), self.new_id))
        if (made / _ADDED).is_file():
            added = {text: self.new_id(token) for text, token in _read(made / _ADDED).items()}
            _write(made / _ADDED, {text: token for text, token in added.items() if token is not None})
        for name in (_VOCABULARY, _MERGES):
            (made / name).unlink(missing_ok=True)
        if self.file.merges is not None and self.file.of_bytes and (folder / _VOCABULARY).is_file():
            _write(made / _VOCABULARY, data["model"]["vocab"], indent=None)
            left = self.file.merges.among(data["model"]["vocab"])
            lines = [" ".join(self.file.merges.pairs[place]) for place in left]
            (made / _MERGES).write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")

    def _require_same(self, made: Path) -> None:
        """Refuse a tokenizer that doesn't read and write texts as the one that it was made of.

        Raises:
            ValueError: it doesn't; says of which text.
        """
        was, now = open_tokenizer(self.model, self.lookup), open_tokenizer(made)
        wanted = {text: self.new_id(token) for text, token in was.get_vocab().items()}
        wanted = {text: token for text, token in wanted.items() if token is not None}
        if now.get_vocab() != wanted:
            wrong = sorted({text for text, _ in set(wanted.items()) ^ set(now.get_vocab().items())})
            raise ValueError(
                f"the tokenizer of {self.model} can't be cut: transformers numbers {shown(', '.join(wrong[:3]))} "
                "otherwise than its file does."
            )
        # Of tokens that stay, too, spread over the vocabulary.
        step = len(self.kept) // _TOGETHER + 1
        made_of = (self.kept[place * step // _PROBES_OF_TOKENS :: step] for place in range(_PROBES_OF_TOKENS))
        probes = [*_PROBES, *(was.decode(tokens, clean_up_tokenization_spaces=False) for tokens in made_of)]
        for text in (*probes, *(_first(source, self.settings.text_column) for source in self.settings.text or ())):
            ids = [tokenizer(text)["input_ids"] for tokenizer in (was, now)]
            again = [
                tokenizer.decode(each, clean_up_tokenization_spaces=False)
                for tokenizer, each in zip((was, now), ids, strict=True)
            ]
            new = [self.new_id(token) for token in ids[0]]
            if again[0] != again[1] or (None not in new and new != ids[1]):
                raise ValueError(
                    f"the tokenizer of {self.model} can't be cut: with fewer tokens it reads {shown(text, 60)!r} "
                    f"as {shown(again[1], 60)!r}."
                )

    def _write_side_cars(self, folder: Path, made: Path, shrunk: Shrunk) -> None:
        copy_side_cars(folder, made)
        was_pruned = (made / REPORT_NAME).is_file()
        if was_pruned:
            report = _read(made / REPORT_NAME)
            text = report.get("calibration")
            if isinstance(text, dict) and isinstance(text.get("begins_with"), list):
                text["begins_with"] = [self.new_id(token) for token in text["begins_with"]]
            _write(made / REPORT_NAME, report)
        if (folder / DISTILLATION).is_file():
            shutil.copyfile(folder / DISTILLATION, made / DISTILLATION)
        name = Path(self.model).resolve().name if Path(self.model).is_dir() else self.model
        record = {**shrunk.to_dict(), "model": name, "kept": list(self.kept)}
        del record["output"]
        _write(made / VOCABULARY, record, indent=None)
        there = folder / CARD
        before = there.read_text(encoding="utf-8") if was_pruned and there.is_file() else None
        less = 1 - shrunk.parameters_after / shrunk.parameters_before
        card = cut_card(before, name, shrunk.tokens_before, shrunk.tokens_after, shrunk.chosen_by, less)
        (made / CARD).write_text(card, encoding="utf-8")


def _extra_tokens(file: TokenizerFile, known: Mapping[str, int], model: str) -> dict[str, int]:
    """Tokens that transformers has beyond those of the file, which it numbers behind them.

    Raises:
        ValueError: it numbers others otherwise than the file does.
    """
    theirs = file.tokens
    extra = {text: token for text, token in known.items() if text not in theirs}
    last = max(theirs.values())
    if any(known.get(text) != token for text, token in theirs.items()) or any(each <= last for each in extra.values()):
        raise ValueError(
            f"the tokenizer of {model} can't be cut: transformers numbers its tokens otherwise than {TOKENIZER} does. "
            "Save it anew with save_pretrained."
        )
    return extra


def _ids_in_settings(folder: Path, config: Any) -> set[int]:
    """Ids that configs and the tokenizer's settings need."""
    found = ids_needed(_defaults(config, _read(folder / CONFIG)))
    for name in (GENERATION_CONFIG, *_SETTINGS):
        if (folder / name).is_file():
            found |= ids_needed(_read(folder / name))
    return found


def _defaults(config: Any, written: dict[str, Any]) -> dict[str, Any]:
    """A config's file with ids that it leaves to the class's defaults, which mean other tokens afterwards."""
    known = config.to_dict()
    ids = {name for name in known if name.endswith(("_token_id", "_token_ids")) and known[name] is not None}
    return {**{name: known[name] for name in sorted(ids - written.keys())}, **written}


def _counts(settings: VocabularySettings, tokenizer: Any) -> tuple[dict[str, Counter[int]], Tensor]:
    """How often each token is in each text, and samples that are spread over all of them, `[samples, length]`."""
    found: dict[str, Counter[int]] = {}
    samples: list[Tensor] = []
    for source in settings.text or ():
        text, name = read_text(source, settings.text_column)
        count: Counter[int] = Counter()
        blocks = []
        for piece in _pieces(text):
            tokens = tokenize(tokenizer, piece)
            count.update(tokens.tolist())
            if settings.samples:
                whole = tokens[: len(tokens) // _LENGTH * _LENGTH].view(-1, _LENGTH)
                blocks.append(evenly(whole, settings.samples))
        found[source if name in found else name] = count
        if blocks:
            samples.append(torch.cat(blocks))
    # Of each text as many, whatever its length is.
    each = math.ceil(settings.samples / max(1, len(samples)))
    chosen = [evenly(some, each) for some in samples]
    return found, torch.cat(chosen) if chosen else torch.empty(0, _LENGTH, dtype=torch.int64)


def _expected(
    model: str, config: Any, samples: Tensor, tokenizer: Any, lookup: dict[str, Any], loading: dict[str, Any]
) -> Tensor:
    """How often the model expects each token in the texts, `[tokens]`."""
    logger.info("%d samples of the texts are read, to see which other tokens the model expects there.", len(samples))
    start = start_tokens(tokenizer)
    source = open_source(model, config, find_device(None), lookup, loading)
    return expected_tokens(source, in_front(start, samples), len(start))


def _with_expected(total: Mapping[int, int], expected: Tensor) -> dict[int, float]:
    """How often each token is to be expected in twice as much text, half of which is there."""
    tokens = sum(total.values())
    return {token: total.get(token, 0) + tokens * chance for token, chance in enumerate(expected.tolist())}


def _ids_of_chat(tokenizer: Any) -> set[int]:
    """Tokens of what a chat template puts around turns, whatever texts have of it: its names, a standing request."""
    if not tokenizer.chat_template:
        return set()
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    with explaining("the chat template can't be applied"):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return set(tokenize(tokenizer, str(text)).tolist())


def _pieces(text: str) -> Iterator[str]:
    """A text in parts that end with lines."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + _PIECE) + 1
        end = end if end > start else start + _PIECE
        yield text[start:end]
        start = end


def _first(source: str, column: str | None) -> str:
    return read_beginning(source, column, _PROBE)[0](_PROBE)


def _coverage(count: Counter[int], kept: set[int]) -> dict[str, Any]:
    tokens = sum(count.values())
    inside = sum(number for token, number in count.items() if token in kept)
    return {"tokens": tokens, "distinct": len(count), "kept": inside / tokens if tokens else 1.0}


def _by_script(file: TokenizerFile, rows: int, kept: set[int]) -> dict[str, list[int]]:
    """Kind of token -> how many there are, and how many stay; the most frequent kind first."""
    found: dict[str, list[int]] = {}
    for token in range(rows):
        entry = found.setdefault(_sort_of(file, token), [0, 0])
        entry[0] += 1
        entry[1] += token in kept
    return dict(sorted(found.items(), key=lambda each: -each[1][0]))


def _sort_of(file: TokenizerFile, token: int) -> str:
    if token in file.declared:
        return "special"
    if token not in file.pieces:
        return "rows without a token"
    if token in file.bytes_:
        return "bytes"
    try:
        text = file.text(token).decode("utf-8")
        return ASCII if text.isascii() else script_of(text)
    except UnicodeDecodeError:
        return "parts of characters"


def _skeletons(config: Any, rows: int, left: int, order: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """The model before and after, without weights.

    Raises:
        ValueError: more than embedding and head would change, or they can't have as many rows; names the parameter.
    """
    new = {token: place for place, token in enumerate(order)}
    data = renumbered(config.to_dict(), lambda token: new.get(token, None if token < rows else token))
    with explaining(f"{config.model_type} can't be built with {left:,} tokens"):
        before = empty_model(config, torch.float32)
        after = empty_model(type(config).from_dict({**data, "vocab_size": left}), torch.float32)
    cut = {id(parameter) for parameter in _of_vocabulary(before).values()}
    shapes = {name: tuple(parameter.shape) for name, parameter in after.named_parameters()}
    for name, parameter in before.named_parameters():
        shape = tuple(parameter.shape)
        wanted = (left, *shape[1:]) if id(parameter) in cut else shape
        if shapes.get(name) != wanted or (id(parameter) in cut and shape[0] != rows):
            raise ValueError(
                f"the vocabulary of {config.model_type} isn't cut: with {left:,} tokens, {name} has shape "
                f"{list(shapes.get(name, ()))} and not {list(wanted)}."
            )
    return before, after


def _of_vocabulary(model: Any) -> dict[str, nn.Parameter]:
    """Parameters with a row for each token: the embedding, and the head with its bias."""
    head = model.get_output_embeddings()
    found = {"embedding": model.get_input_embeddings().weight}
    if head is not None:
        found["head"] = head.weight
        if getattr(head, "bias", None) is not None:
            found["bias"] = head.bias
    return found


def _read(path: Path) -> dict[str, Any]:
    with explaining(f"{path} is damaged", ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found


def _write(path: Path, data: Any, indent: int | None = 2) -> None:
    separators = (",", ":") if indent is None else None
    text = json.dumps(data, indent=indent, ensure_ascii=False, separators=separators)
    path.write_text(text + "\n", encoding="utf-8")
