"""Text to token blocks: files, datasets, lists, or what the model itself writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_comp.beginning import Beginning, in_front, spread, start_tokens
from optimum_comp.calibration.mix import counts_of, parts_of, sources_in
from optimum_comp.utils import explaining, get_logger, is_there, progress_disabled, shown


if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

CalibrationSource: TypeAlias = Union[str, Path, Sequence[str], Tensor, "Dataset"]

SELF = "self"
TOKEN_BLOCKS = "token blocks"
PYDOC = "pydoc"
"""Python's own documentation, `pydoc_data.topics`: some 460 kB of English prose that every machine has."""

_BUILDERS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_BUILDERS[".parquet"] = "parquet"

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# A hub dataset is streamed only until there is this many times the text that is needed, so that a choice of blocks
# remains without terabytes being downloaded.
_STREAM_SURPLUS = 4
_CHARACTERS_PER_TOKEN = 6

_SETTLED = 64
"""Tokens in front of a cut that aren't taken for those of the whole text."""


@dataclass(frozen=True)
class Calibration:
    """Token blocks and where they are from.

    Attributes:
        tokens: `[num_samples, sequence_length]`, int64.
        source: what the user gave, in words.
        beginning: what each block begins with; `None` for blocks that were given.
        written: which blocks the model wrote itself, `[num_samples]`, bool; none if `None`.
    """

    tokens: Tensor
    source: str
    beginning: Beginning | None = None
    written: Tensor | None = None

    @property
    def start(self) -> int:
        """Tokens that all blocks begin with."""
        return 0 if self.beginning is None else len(self.beginning.tokens)

    def without_beginning(self) -> Tensor:
        """The blocks without what all of them begin with, `[num_samples, length]`."""
        return self.tokens[:, self.start :]

    def describe(self) -> dict[str, Any]:
        """Source, size and a digest of the very tokens, and what blocks begin with, for the report."""
        data = self.tokens.to(torch.int64).contiguous().numpy().tobytes()
        return {
            "source": self.source,
            "num_samples": self.tokens.shape[0],
            "sequence_length": self.tokens.shape[1],
            "tokens": self.tokens.numel(),
            "sha256": hashlib.sha256(data).hexdigest(),
            **({} if self.beginning is None else self.beginning.to_dict()),
        }


def prepare_calibration(
    source: CalibrationSource,
    *,
    model: nn.Module | None,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int = 0,
    text_column: str | None = None,
    begin: Callable[[Tensor], Beginning] | None = None,
    together: int | None = None,
) -> Calibration:
    """Make `num_samples` blocks of `sequence_length` tokens.

    Args:
        source: see `CompPruner.prune`.
        model: needed for `"self"`, and for its vocabulary and context length.
        tokenizer: needed for everything but `"self"` and token blocks.
        num_samples: blocks.
        sequence_length: tokens of a block, start tokens included.
        seed: chooses which blocks of a longer text are taken.
        text_column: the column of a dataset that holds text.
        begin: decides from a few pieces of the text, `[pieces, length]`, what each block begins with; called when
            all else is known to be right. With nothing if `None`. Token blocks are taken as they are.
        together: samples of `"self"` that are written side by side; as many as are best if `None`.

    Raises:
        ValueError: too little text, no such file, no such column, or no text in it.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and sequence_length > limit:
        raise ValueError(f"sequence_length={sequence_length} is more than the {limit} tokens that the model can read.")
    if isinstance(source, Tensor):
        blocks = _checked_blocks(source, num_samples, sequence_length)
        _require_known(blocks, model, TOKEN_BLOCKS)
        return Calibration(blocks, TOKEN_BLOCKS)
    parts = parts_of(source)
    sources: list[Any] = [part.source for part in parts] or [source]
    counts = counts_of(parts, num_samples) if parts else [num_samples]
    texts = [(torch.empty(0, dtype=torch.int64), "")] * len(sources)
    # Files first: what is wrong with them is known before the model writes for minutes.
    for number in sorted(range(len(sources)), key=lambda number: _is_written(sources[number])):
        each, count = sources[number], counts[number]
        if _is_written(each):
            if model is None:
                raise ValueError('calibration="self" needs the model that is to write the text.')
            texts[number] = (_written(model, tokenizer, count, sequence_length, seed, together), SELF)
            continue
        if tokenizer is None:
            raise ValueError("calibration on text needs a tokenizer: give CompPruner.from_pretrained one.")
        text, name = read_text(each, text_column, needed=count * sequence_length)
        tokens = tokenize(tokenizer, text)
        # As if blocks began with nothing: so the same text is enough whatever is decided.
        _require(tokens.numel(), count, sequence_length, name)
        _require_known(tokens, model, "what the tokenizer makes of the text")
        texts[number] = (tokens, name)
    pieces = [spread(tokens, sequence_length) for tokens, _ in texts]
    beginning, room = _decided(begin, torch.cat(pieces) if parts else pieces[0], sequence_length)
    found = [
        in_front(beginning.tokens, tokens[:, :room])
        if tokens.dim() == 2
        else choose_blocks(tokens, count, sequence_length, seed, name, beginning.tokens)
        for (tokens, name), count in zip(texts, counts, strict=True)
    ]
    written = torch.tensor([_is_written(each) for each in sources]).repeat_interleave(torch.tensor(counts))
    if not parts:
        return Calibration(found[0], texts[0][1], beginning, written)
    # Mixed, so that whoever looks at some of them only looks at all sources.
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return Calibration(torch.cat(found)[order], source_name(source), beginning, written[order])


def _written(
    model: nn.Module, tokenizer: Any, count: int, sequence_length: int, seed: int, together: int | None
) -> Tensor:
    """Text that the model writes, `[count, sequence_length]`."""
    from optimum_comp.calibration.self_written import write_self

    start = [] if tokenizer is None else start_tokens(tokenizer)
    return write_self(model, tokenizer, count, sequence_length, seed, start=start, together=together)


def is_self(source: Any) -> bool:
    """Whether the model is to write this text, or a part of it, itself; nothing said means that it is."""
    return source is None or _is_written(source) or any(_is_written(part.source) for part in parts_of(source))


def _is_written(source: Any) -> bool:
    return isinstance(source, str) and source == SELF


def read_text(source: Any, text_column: str | None = None, needed: int | None = None) -> tuple[str, str]:
    """All text of a source as one string, and the source's name.

    Args:
        source: a file, a dataset's name, a `datasets.Dataset`, a list of texts, or `"pydoc"`.
        text_column: the column that holds text.
        needed: tokens that will be used; a hub dataset isn't read much beyond.

    Raises:
        ValueError: nothing there, no such column, or no text in it.
    """
    if isinstance(source, str) and source == PYDOC:
        from pydoc_data.topics import topics

        return _joined(list(topics.values()), PYDOC), PYDOC
    if isinstance(source, (str, Path)):
        path = Path(source)
        if is_there(path) and path.is_file():
            return _joined(_read_file(path, text_column), str(path.name)), path.name
        is_folder = is_there(path) and path.is_dir()
        if is_folder or path.suffix.lower() in _BUILDERS:
            problem = "is a folder" if is_folder else "does not exist"
            raise ValueError(
                f"calibration file {shown(str(source))!r} {problem}; give a text, JSONL, CSV or Parquet file."
            )
        return _joined(read_named_dataset(str(source), text_column, needed), str(source)), str(source)
    if hasattr(source, "column_names"):
        rows = source[_text_column(source.column_names, text_column, "the dataset")]
        return _joined(rows, "the dataset"), source_name(source)
    if isinstance(source, Sequence) and all(isinstance(item, str) for item in source):
        return _joined(source, "the list of texts"), source_name(source)
    raise ValueError(
        f"calibration={type(source).__name__} is not understood: give a file, a dataset's name, a datasets.Dataset, "
        f"a list of str, token blocks, or {SELF!r}."
    )


def read_beginning(
    source: Any, text_column: str | None = None, needed: int | None = None
) -> tuple[Callable[[int], str], str]:
    """A function that gives up to so many of the first characters of what `read_text` reads, and the source's name.

    Of a text file, no more than that is read.

    Args:
        source: as for `read_text`.
        text_column: likewise.
        needed: likewise.

    Raises:
        ValueError: as for `read_text`; what is beyond the characters that are asked for isn't looked at.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None or not is_there(path) or not path.is_file() or _builder(path) != "text":
        text, name = read_text(source, text_column, needed)
        return lambda characters: text[:characters], name

    def beginning(characters: int) -> str:
        read = _read_plain(path, characters)
        return read if len(read) == characters else _joined([read], path.name)[:characters]

    return beginning, path.name


def require_text(source: Any, text_column: str | None = None) -> None:
    """Look whether there is text where a source says so, and no further.

    Args:
        source: as for `read_text`, or a mix; what is in memory, or is still to be written, isn't looked at.
        text_column: as for `read_text`.

    Raises:
        OSError: a file can't be read.
        ValueError: nothing there, no such column, or no text in it.
    """
    if not isinstance(source, (str, Path)):
        return
    for name in sources_in(str(source)):
        if name not in (SELF, PYDOC):
            read_beginning(name, text_column, 1)[0](1)


def source_name(source: Any) -> str:
    """What a source will be called in the report, without reading it."""
    if isinstance(source, Calibration):
        return source.source
    if isinstance(source, Tensor):
        return TOKEN_BLOCKS
    parts = parts_of(source)
    if parts:
        return ", ".join(f"{source_name(part.source)} {part.share:.0%}" for part in parts)
    if isinstance(source, (str, Path)):
        return Path(source).name if is_there(source) and Path(source).is_file() else str(source)
    if hasattr(source, "column_names"):
        return getattr(getattr(source, "info", None), "dataset_name", None) or "dataset"
    return "texts"


def evenly(samples: Tensor, count: int) -> Tensor:
    """So many of some samples `[samples, length]`, evenly spread over them in their order; all, if there are fewer."""
    return samples[torch.linspace(0, len(samples) - 1, min(count, len(samples))).long()]


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text without special tokens, `[n]`."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def first_tokens(tokenizer: Any, beginning: Callable[[int], str], count: int) -> Tensor:
    """The first tokens of a text, `[count or less]`, without tokenizing much beyond them.

    They are those of the whole text, as far as what a tokenizer makes of a word depends on nothing `_SETTLED` tokens
    behind it. That holds wherever texts are split into words first, as nearly all tokenizers do: the text is cut in
    front of white space, which ends a word, and a few tokens in front of the cut are left aside, because some
    tokenizers keep line breaks with the punctuation before them. A tokenizer that doesn't split, but merges across
    the whole text, has nothing that it could merge beyond a word unless its vocabulary has tokens of several words.

    Args:
        tokenizer: the tokenizer.
        beginning: gives up to so many characters of the text (see `read_beginning`).
        count: tokens.
    """
    length = (count + _SETTLED) * _CHARACTERS_PER_TOKEN
    while True:
        text = beginning(length)
        if len(text) < length:
            return tokenize(tokenizer, text)[:count]
        # The last word may go on behind them; without another one, there is no cut.
        words = text.rsplit(None, 1)
        tokens = tokenize(tokenizer, words[0] if len(words) == 2 else "")
        if tokens.numel() >= count + _SETTLED:
            return tokens[:count]
        length *= 2


def choose_blocks(
    tokens: Tensor, num_samples: int, sequence_length: int, seed: int, name: str, start: Sequence[int] = ()
) -> Tensor:
    """Cut `tokens` into blocks and take `num_samples` of them at random, in text order.

    Args:
        tokens: the text, `[n]`.
        num_samples: blocks.
        sequence_length: tokens of a block, `start` included.
        seed: chooses.
        name: the text's, for errors.
        start: tokens that are put in front of each block.

    Returns:
        `[num_samples, sequence_length]`.

    Raises:
        ValueError: there are fewer blocks.
    """
    length = sequence_length - len(start)
    available = _require(tokens.numel(), num_samples, length, name)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return in_front(start, tokens[: available * length].view(available, length)[order.sort().values])


def _require(tokens: int, num_samples: int, length: int, name: str) -> int:
    """How many blocks of `length` tokens there are; refuse fewer than `num_samples`."""
    available = tokens // length
    if available < num_samples:
        raise ValueError(
            f"{name} is too short for calibration: {tokens:,} tokens make {available} samples of {length}, and "
            f"num_samples={num_samples} needs {num_samples * length:,} tokens. Give more text, or lower num_samples "
            "or sequence_length."
        )
    return available


def _require_known(tokens: Tensor, model: nn.Module | None, what: str) -> None:
    """Refuse tokens that the model hasn't."""
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    least, most = (int(end) for end in tokens.aminmax())
    if known is not None and (least < 0 or most >= known):
        raise ValueError(
            f"{what} has tokens from {least} to {most}, and the model knows 0 to {known - 1}; give those of its own "
            "tokenizer."
        )


def _decided(
    begin: Callable[[Tensor], Beginning] | None, pieces: Tensor, sequence_length: int
) -> tuple[Beginning, int]:
    """What blocks begin with, by pieces of the text, and the tokens of text that remain in each."""
    beginning = Beginning() if begin is None else begin(pieces)
    room = sequence_length - len(beginning.tokens)
    if room < 1:
        raise ValueError(
            f"sequence_length={sequence_length} leaves no room for text behind {beginning.start!r}; take more, or "
            "begin with nothing: begin='never' (--begin never)."
        )
    return beginning, room


def _checked_blocks(tokens: Tensor, num_samples: int, sequence_length: int) -> Tensor:
    if tokens.dim() != 2 or tokens.dtype not in _INTEGERS:
        raise ValueError(
            f"token blocks must be an integer tensor [samples, length], not {tokens.dtype} {list(tokens.shape)}."
        )
    if tokens.shape[0] < num_samples or tokens.shape[1] < sequence_length:
        raise ValueError(
            f"token blocks {tuple(tokens.shape)} are fewer than num_samples={num_samples} of "
            f"sequence_length={sequence_length}."
        )
    return tokens[:num_samples, :sequence_length].to(torch.int64)


def _builder(path: Path) -> str:
    """What `datasets` calls a file's kind."""
    return _BUILDERS.get(path.suffix.lower(), "text")


def _read_plain(path: Path, characters: int = -1) -> str:
    """A text file, or its first characters; line breaks are part of the text."""
    _require_content(path)
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration file {str(path)!r} is not UTF-8 text ({error}).") from error


def _require_content(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"calibration file {str(path)!r} is empty; give one with text.")


def _read_file(path: Path, text_column: str | None) -> Sequence[str]:
    _require_content(path)
    builder = _builder(path)
    if builder == "text":
        return [_read_plain(path)]
    from datasets import load_dataset

    with explaining(f"calibration file {str(path)!r} can't be read as {builder}", ValueError):
        table = load_dataset(builder, data_files=str(path), split="train", streaming=False)
    return list(table[_text_column(table.column_names, text_column, path.name)])


def read_named_dataset(name: str, text_column: str | None, needed: int | None) -> list[str]:
    """Rows of a dataset on the hub, streamed until there is a surplus of text to choose from.

    Args:
        name: `name[:config[:split]]`.
        text_column: the column that holds text.
        needed: tokens that will be used.

    Raises:
        ValueError: no such dataset, config, split or column.
    """
    from datasets import load_dataset

    repository, config, split = [*name.split(":"), "", ""][:3]
    problem = f"calibration={shown(name)!r} is neither a file here nor a dataset that can be loaded"
    with explaining(f"{problem} as name[:config[:split]]", ValueError):
        stream = load_dataset(repository, config or None, split=split or "train", streaming=True)
    enough = (needed or 2**24) * _CHARACTERS_PER_TOKEN * _STREAM_SURPLUS
    rows: list[str] = []
    column: str | None = None
    for row in tqdm(stream, desc=f"Reading {repository}", unit="row", disable=progress_disabled()):
        column = column or _text_column(list(row), text_column, repository)
        rows.append(row[column])
        enough -= len(rows[-1] or "")
        if enough <= 0:
            break
    return rows


def _text_column(columns: Sequence[str], wanted: str | None, name: str) -> str:
    column = wanted or "text"
    if column not in columns:
        raise ValueError(
            f"{name} has no column {column!r}; it has: {', '.join(columns)}. Name the one that holds text with "
            "text_column (--text-column)."
        )
    return column


def _joined(texts: Sequence[Any], name: str) -> str:
    """Rows as one text: those that don't end their line get a blank line after them."""
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} holds {type(text).__name__} where text is wanted; name the right column.")
    whole = "".join(text if text.endswith("\n") else f"{text}\n\n" for text in texts if text)
    if not whole.strip():
        raise ValueError(f"{name} holds no text.")
    return whole
