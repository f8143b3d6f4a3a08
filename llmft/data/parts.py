"""Tokens with their place in the text, and the sequences that a row becomes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Any

from llmft.data.columns import Conversation
from llmft.data.prompt import Rendered


@dataclass
class Tokens:
    """The tokens of a text or of its beginning, with their character offsets."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, encoding: Any) -> Tokens:
        """From an `Encoding` of the tokenizers library."""
        offsets = encoding.offsets
        return cls(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])

    def within(self, start: int, end: int) -> tuple[int, int]:
        """(first, last) of the tokens that overlap the characters from `start` to `end`, `last` excluded."""
        return bisect_right(self.ends, start), bisect_left(self.starts, end)


@dataclass
class Part:
    """A row or a part of it as one training sequence: its conversation, its text, and the spans that are learned."""

    conversation: Conversation
    rendered: Rendered
    spans: list[tuple[int, int]]
    tokens: Tokens = field(default_factory=lambda: Tokens([], [], []))
