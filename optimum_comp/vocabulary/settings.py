"""How a vocabulary is made smaller."""

from __future__ import annotations

import dataclasses
from typing import Any

from optimum_comp.options import Integer, Subset, Texts, column_option, option, settings_class
from optimum_comp.vocabulary.scripts import SCRIPTS


_SAMPLES = 48


@settings_class
class VocabularySettings:
    """Which tokens stay, beside special tokens and bytes."""

    scripts: list[str] | None = option(
        Subset(tuple(SCRIPTS)),
        "Keep every token that texts in these scripts can have. Each comes with digits, punctuation and signs (of "
        f"ascii, ASCII's alone); ASCII's letters come with ascii and latin only. Some of {', '.join(SCRIPTS)}.",
        default=None,
        metavar="SCRIPT,...",
    )
    text: list[str] | None = option(
        Texts("a list of files, datasets' names or pydoc"),
        "Keep every token that this text has: files, datasets as name[:config[:split]], or pydoc. With max_tokens, it "
        "says which tokens are frequent.",
        default=None,
        metavar="FILE|DATASET",
    )
    text_column: str | None = column_option()
    max_tokens: int | None = option(
        Integer(1),
        "Keep so many tokens at most: those that are most frequent in the text and in what the model expects there.",
        default=None,
        default_text="no limit",
        metavar="N",
    )
    expected: int | None = option(
        Integer(0),
        "With max_tokens, scripts and a text: samples of the text, of 256 tokens, in which the model says what "
        "else it expects; 0: it isn't asked, and of tokens that the text lacks those with the lowest ids stay.",
        default=None,
        default_text=str(_SAMPLES),
        metavar="N",
    )
    round_to: int = option(
        Integer(1),
        "Make the number of tokens a multiple of this by keeping more, or with max_tokens fewer; nothing is padded.",
        default=1,
        metavar="N",
    )

    def _require(self) -> None:
        if self.text == []:
            raise ValueError("text=[] is not valid: name at least one source, or leave it away.")

    def require_choice(self) -> None:
        """Refuse settings that don't say what is to stay.

        Raises:
            ValueError: neither scripts nor a text is named.
        """
        if self.scripts is None and self.text is None:
            raise ValueError(
                "nothing says which tokens are to stay: name scripts (like --scripts latin) or a text (--text FILE)."
            )

    @property
    def samples(self) -> int:
        """Samples that the model reads, to say which tokens of the scripts it expects; 0 where nothing asks for it."""
        if self.scripts is None or self.text is None or self.max_tokens is None:
            return 0
        return _SAMPLES if self.expected is None else self.expected

    @property
    def breaks_words(self) -> bool:
        """Whether tokens of the scripts may go, so that words fall to pieces."""
        return self.scripts is None or self.max_tokens is not None

    def chosen_by(self) -> str:
        """What decides which tokens stay, in words."""
        found = [f"scripts {', '.join(self.scripts)}"] if self.scripts else []
        frequency = "frequency in text" + " and in what the model expects there" * (self.samples > 0)
        found += [frequency if self.max_tokens else "text"] if self.text else []
        return " and ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """What is given, for a recipe or JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
