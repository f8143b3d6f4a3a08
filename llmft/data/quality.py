"""What tokenised rows say about themselves: the mistakes that cost a training and show only after it.

A doubled begin token, an end token that is never trained, answers cut off by a limit, rows on both sides of a split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmft.config.sections import TrainConfig, TrainOn
from llmft.core.errors import DataError
from llmft.data.columns import Conversation
from llmft.data.encode import Ends
from llmft.data.examples import Examples
from llmft.data.messages import text_of
from llmft.data.overlap import Overlap

PERCENTILES = (50, 90, 99, 100)
MIN_ENDS = 0.99
"""Share of rows whose answer must close with an end token; without it a model learns not to stop."""


@dataclass(frozen=True)
class Finding:
    """Something to know before training: an `error` stops it, a `warning` is shown."""

    level: str
    key: str
    message: str


@dataclass
class SplitFacts:
    """Counts over one split.

    Attributes:
        begin_tokens: number of rows by how many begin tokens they hold.
        doubled_begin: rows in which two begin tokens stand side by side.
        ends_trained: rows whose last learned token is an end token.
        untrained: rows without a learned token.
        special_in_text: rows whose own text spells a special token, which the tokenizer then makes.
        prompt_tokens, answer_tokens, all_tokens: percentiles 50, 90, 99 and 100 of the rows' lengths.
        histogram: (from, to, rows) of the rows' lengths.
    """

    rows: int
    begin_tokens: dict[int, int] = field(default_factory=dict)
    doubled_begin: int = 0
    ends_trained: int = 0
    untrained: int = 0
    special_in_text: int = 0
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    answer_tokens: dict[int, int] = field(default_factory=dict)
    all_tokens: dict[int, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)


def split_facts(examples: Examples, tokenizer: Any, ends: Ends) -> SplitFacts:
    """Looks at every token of a split once."""
    facts = SplitFacts(len(examples))
    if not len(examples):
        return facts
    ids, starts, lengths = examples.ids, examples.starts, examples.lengths
    begin = tokenizer.bos_token_id
    if begin is not None and begin != tokenizer.eos_token_id:
        is_begin = np.concatenate([[0], np.cumsum(ids == begin)])
        counts = is_begin[starts[1:]] - is_begin[starts[:-1]]
        facts.begin_tokens = {int(n): int(rows) for n, rows in zip(*np.unique(counts, return_counts=True), strict=True)}
        pairs = np.flatnonzero((ids[1:] == begin) & (ids[:-1] == begin)) + 1
        inside = pairs[~np.isin(pairs, starts)]
        facts.doubled_begin = len(np.unique(np.searchsorted(starts, inside, side="right")))
    learned = np.concatenate([[0], np.cumsum(examples.labelled, dtype=np.int64)])
    answers = learned[starts[1:]] - learned[starts[:-1]]
    facts.untrained = int((answers == 0).sum())
    places = np.flatnonzero(examples.labelled)
    stops = learned[starts[1:]][answers > 0]
    closed = np.isin(ids[places[stops - 1]], ends.ids)
    if ends.text:
        tail = len(ends.text.encode()) + 1
        tails = (ids[places[max(0, stop - tail) : stop]].tolist() for stop in stops)
        closed |= np.fromiter(map(ends.reached, tails), bool, len(stops))
    facts.ends_trained = int(closed.sum())
    facts.prompt_tokens = _percentiles(lengths - answers)
    facts.answer_tokens = _percentiles(answers)
    facts.all_tokens = _percentiles(lengths)
    facts.histogram = _histogram(lengths)
    special = [token for token in (*tokenizer.all_special_tokens, ends.text) if len(token) > 2]
    facts.special_in_text = sum(
        any(token in text_of(message) for message in examples.conversations[row].messages for token in special)
        for row in examples.rows
    )
    return facts


def _percentiles(values: np.ndarray) -> dict[int, int]:
    return {p: int(np.percentile(values, p, method="higher")) for p in PERCENTILES}


def _histogram(lengths: np.ndarray, bins: int = 8) -> list[tuple[int, int, int]]:
    edges = np.unique(np.linspace(0, lengths.max() + 1, bins + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def label_balance(conversations: Sequence[Conversation], labels: Sequence[str], most: int = 20) -> dict[str, int]:
    """Rows by class, or by answer where there are few different ones; empty where answers are free text."""
    if not conversations:
        return {}
    if conversations[0].target is not None:
        if isinstance(conversations[0].target, float):
            return {}
        own: Counter[int] = Counter()
        for row in conversations:
            many = isinstance(row.target, tuple)
            own.update([n for n, is_one in enumerate(row.target) if is_one] if many else [row.target])  # type: ignore
        return {labels[number]: own[number] for number in sorted(own)}
    answers = Counter(text_of(c.messages[-1]).strip() for c in conversations)
    return dict(answers.most_common()) if len(answers) <= most else {}


def findings(
    config: TrainConfig,
    facts: dict[str, SplitFacts],
    overlaps: Sequence[Overlap],
    context_tokens: int | None = None,
    learned_positions: bool = False,
) -> list[Finding]:
    """Errors first, then warnings.

    `context_tokens` is how many positions the model knows; with `learned_positions` it fails on any other.
    """
    found: list[Finding] = []

    def add(level: str, key: str, message: str) -> None:
        found.append(Finding(level, key, message))

    classifies = config.task.head is not None or config.task.auto_class == "sequence_classification"
    for split, fact in facts.items():
        if fact.doubled_begin:
            add("error", "prompt", f"{fact.doubled_begin} {split} rows hold two begin tokens side by side")
        if fact.untrained and not classifies:
            add("error", "data", f"{fact.untrained} {split} rows have no token to learn")
        if not classifies and fact.rows and fact.ends_trained < MIN_ENDS * fact.rows:
            share = 1 - fact.ends_trained / fact.rows
            add(
                "error",
                "prompt",
                f"{share:.0%} of the {split} rows do not end in a trained end token, so the model would not learn to "
                "stop: put the end token inside {% generation %} in the prompt's template",
            )
        if fact.special_in_text:
            add("warning", "data", f"{fact.special_in_text} {split} rows spell a special token in their own text")
    longest = max((fact.all_tokens.get(100, 0) for fact in facts.values()), default=0)
    if context_tokens is not None and longest > context_tokens:
        add(
            "error" if learned_positions else "warning",
            "data.max_tokens",
            f"the longest row has {longest} tokens, more than the {context_tokens} positions of the model",
        )
    train = facts.get("train")
    if train is not None and train.begin_tokens.get(0):
        add("warning", "prompt", f"{train.begin_tokens[0]} train rows have no begin token, which this tokenizer knows")
    for overlap in overlaps:
        if config.data.train_on is TrainOn.all and (overlap.first, overlap.second) == ("train", "validation"):
            continue
        rows = facts[overlap.second].rows
        same = overlap.first == overlap.second
        if overlap.exact and same:
            add("warning", "data", f"{overlap.exact} {overlap.first} rows are copies of others")
        elif overlap.exact:
            share = overlap.exact / max(1, rows)
            level = "error" if share > config.data.max_overlap_fraction else "warning"
            where = " = ".join(overlap.examples[0]) if overlap.examples else ""
            add(
                level,
                "data.max_overlap_fraction",
                f"{overlap.exact} {overlap.second} rows ({share:.0%}) also stand in {overlap.first} ({where}), so its "
                "numbers are too good",
            )
        if overlap.near and not same:
            add("warning", "data", f"{overlap.near} {overlap.second} rows nearly stand in {overlap.first}")
        elif overlap.exact_prompts > overlap.exact and not same and not classifies:
            more = overlap.exact_prompts - overlap.exact
            add("warning", "data.group", f"{more} {overlap.second} rows share their question with {overlap.first} rows")
    if config.data.train_on is TrainOn.all:
        add("warning", "data.train_on", "validation rows are trained on too: validation numbers mean nothing")
    return sorted(found, key=lambda finding: finding.level != "error")


def stop_on_errors(found: Sequence[Finding]) -> None:
    """Raises DataError with the first error."""
    for finding in found:
        if finding.level == "error":
            raise DataError(f"{finding.key}: {finding.message}. `python -m llmft.check` shows more.")
