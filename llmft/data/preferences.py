"""Human feedback on answers: pairs, candidates with scores, and single answers that are good or bad."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from llmft.core.errors import DataError, did_you_mean
from llmft.data.messages import Keys, Message, read_messages

LABELS = {
    **dict.fromkeys(("true", "1", "good", "desirable", "chosen"), True),
    **dict.fromkeys(("false", "0", "bad", "undesirable", "rejected"), False),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The other answers to a conversation's prompt, and the human feedback on all of them.

    Attributes:
        others: the other answers, from better to worse.
        ranks: one per answer, the conversation's own first; 0 is the best, and equal ranks are not compared.
        degree: index in data.degrees; None if rows have none.
        margin: required margin of the chosen answer.
        desirable: whether the one answer is good; None if answers are compared.
    """

    others: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (0,)
    degree: int | None = None
    margin: float = 0.0
    desirable: bool | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of all answers that differ in rank."""
        indices = range(len(self.ranks))
        return [(a, b) for a in indices for b in indices if self.ranks[a] < self.ranks[b]]


def check_different(answers: Sequence[str]) -> None:
    """Raises ValueError if two answers are equal, not counting white space at their ends."""
    seen: dict[str, int] = {}
    for number, answer in enumerate(answers, start=1):
        other = seen.setdefault(answer.strip(), number)
        if other != number:
            raise ValueError(f"answers {other} and {number} are equal, so nothing says which is better")


def ranked(answers: Sequence[str], scores: Any, column: str) -> tuple[list[str], tuple[int, ...]]:
    """Answers from the best score to the worst, and their ranks. Raises ValueError for scores that are not numbers."""
    if not isinstance(scores, list) or len(scores) != len(answers):
        description = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
        raise ValueError(f"'{column}' contains {description} for {len(answers)} candidates")
    numbers = [number_of(score, column) for score in scores]
    order = sorted(range(len(answers)), key=lambda index: -numbers[index])
    levels = sorted(set(numbers), reverse=True)
    if len(levels) < 2:
        raise ValueError(f"all candidates have the same score in '{column}', so nothing says which is better")
    return [answers[index] for index in order], tuple(levels.index(numbers[index]) for index in order)


def number_of(value: Any, column: str) -> float:
    """A finite number. Raises ValueError naming the column."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"'{column}' contains {value!r}, a finite number was expected")
    return number


def degree_of(value: Any, degrees: Sequence[str], column: str) -> int:
    """The index of a degree in data.degrees, whatever its case. Raises ValueError with the nearest one."""
    known = [name.casefold() for name in degrees]
    text = " ".join(str(value).casefold().split())
    if text not in known:
        raise ValueError(f"'{column}' contains the degree '{value}', none of data.degrees{did_you_mean(text, degrees)}")
    return known.index(text)


def label_of(value: Any, column: str) -> bool:
    """Whether an answer is good. Raises ValueError for anything but a truth value."""
    text = str(int(value)) if value in (0.0, 1.0) else str(value)  # numbers of a column with gaps are floats
    if text.strip().casefold() not in LABELS:
        raise ValueError(f"'{column}' contains {value!r}; true (a good answer) or false (a bad one) was expected")
    return LABELS[text.strip().casefold()]


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def conversation_of(value: Any, column: str, keys: Keys) -> list[Message]:
    """A full conversation: a list of messages, or text with the turns "Human:" and "Assistant:" of hh-rlhf.

    Raises ValueError for anything else, and for one that does not end with an answer.
    """
    if isinstance(value, str) and _TURN.search(value):
        parts = _TURN.split(value)
        if parts[0].strip():
            raise ValueError(f"'{column}' has text before its first turn")
        roles = {"Human": "user", "Assistant": "assistant"}
        value = [
            {"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)
        ]
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{column}' contains no whole conversation; name an answer's prompt in data.columns.prompt")
    last = value[-1]
    is_silent = isinstance(last, dict) and last.get("role") == "assistant" and last.get("content") == ""
    messages = read_messages(value[:-1] if is_silent and len(value) > 1 else value, column, keys)
    if is_silent:  # one answer of a comparison may be empty
        messages.append({"role": "assistant", "content": ""})
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise ValueError(f"the conversation in '{column}' does not end with an answer to something")
    if set(messages[-1]) > {"role", "content"}:
        raise ValueError(f"the answer in '{column}' has more than text: only the assistant's text can be used")
    return messages


def common_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """What two conversations have in common, and the answer that ends each.

    Raises ValueError if they differ before their last answers.
    """
    if chosen[:-1] != rejected[:-1]:
        shared = sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected, strict=False)))
        raise ValueError(f"the two conversations part after message {shared}, before their last answers")
    return chosen[:-1], str(chosen[-1]["content"]), str(rejected[-1]["content"])


Conversations = Sequence[Any]
"""Of `llmft.data.columns.Conversation`, which have a `comparison` here."""


def with_other_answers(conversations: Conversations) -> list[Any]:
    """Conversations of single answers, each with a second answer: that of the next row with another prompt.

    KTO estimates the KL divergence from the reference on them; nobody compared the two.
    """
    result = []
    for index, row in enumerate(conversations):
        prompt, answer = row.messages[:-1], row.messages[-1]["content"]
        for step in range(1, len(conversations)):
            other = conversations[(index + step) % len(conversations)].messages
            if other[:-1] != prompt and other[-1]["content"] != answer:
                comparison = replace(row.comparison, others=(str(other[-1]["content"]),), ranks=(0, 0))
                result.append(replace(row, comparison=comparison))
                break
        else:
            raise DataError(f"{row.where}: task=kto needs answers to two prompts or more in every split.")
    return result


def answers_of(row: Any) -> list[str]:
    """All answers of a conversation that has a comparison, its own first."""
    return [str(row.messages[-1]["content"]), *row.comparison.others]


def label_counts(conversations: Conversations) -> dict[str, int]:
    """How many single answers are good and how many bad."""
    good = sum(bool(row.comparison.desirable) for row in conversations)
    return {"good": good, "bad": len(conversations) - good}


def contradictions(conversations: Conversations) -> list[tuple[str, str]]:
    """(where, where) of rows that compare the same two answers to one prompt the other way round."""
    seen: dict[tuple[str, str, str], str] = {}
    result = []
    for row in conversations:
        if row.comparison is None or not row.comparison.others:
            continue
        prompt = repr(row.messages[:-1])
        answers = answers_of(row)
        for better, worse in row.comparison.pairs:
            other = seen.get((prompt, answers[worse], answers[better]))
            if other is not None:
                result.append((other, row.where))
                break
        for better, worse in row.comparison.pairs:
            seen.setdefault((prompt, answers[better], answers[worse]), row.where)
    return result


def longer_wins(lengths: Sequence[tuple[int, int]]) -> float:
    """The accuracy of the rule "the longer answer is better", of (chosen, rejected) lengths; equal ones count half."""
    return sum(0.5 if a == b else float(a > b) for a, b in lengths) / max(1, len(lengths))


def by_degree(degrees: Sequence[int | None], values: Sequence[Any]) -> dict[int, list[Any]]:
    """`values` of rows by their degree, the clearest first; rows without a degree are left out."""
    result: dict[int, list[Any]] = defaultdict(list)
    for degree, value in zip(degrees, values, strict=True):
        if degree is not None:
            result[degree].append(value)
    return dict(sorted(result.items()))
