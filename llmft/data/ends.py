"""What ends an answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ends:
    """What ends an answer: any of several tokens, or the format's end marker if that is more than one token.

    Attributes:
        ids: tokens of which each one ends an answer.
        text: the marker of `num_tokens` tokens; empty where it is one of `ids`.
    """

    ids: list[int]
    text: str = ""
    num_tokens: int = 1
    decode: Callable[[list[int]], str] = lambda ids: ""

    def reached(self, ids: list[int]) -> bool:
        """Whether `ids` end with the full marker."""
        return bool(self.text) and self.text in self.decode(ids[-1 - len(self.text.encode()) :])

    def trained(self, ids: list[int]) -> bool:
        """Whether an answer of these tokens ends with an end token or the marker."""
        return ids[-1:] != [] and (ids[-1] in self.ids or self.reached(ids))

    def cut(self, ids: list[int]) -> list[int]:
        """`ids` before the first end; with the marker if its first token also contains text of the answer."""
        ids = ids[: next((index for index, token in enumerate(ids) if token in self.ids), len(ids))]
        text = self.decode(ids) if self.text else ""
        marker_start = text.find(self.text) if self.text else -1
        if marker_start < 0:
            return ids
        positions = range(len(ids) + 1)
        end = bisect_left(positions, marker_start, key=lambda index: len(self.decode(ids[:index])))
        if self.decode(ids[:end]) == text[:marker_start]:
            return ids[:end]
        return ids[: bisect_left(positions, True, key=lambda index: self.text in self.decode(ids[:index]))]
