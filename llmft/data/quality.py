"""Checks of tokenised rows: mistakes that waste a training and show only after it.

For example a doubled begin token, an end token that is never trained, or rows on both sides of a split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmft.config.data import TrainOn
from llmft.config.sections import TrainConfig
from llmft.core.errors import DataError
from llmft.data.columns import Conversation
from llmft.data.ends import Ends
from llmft.data.examples import Examples
from llmft.data.messages import message_text
from llmft.data.overlap import Overlap

PERCENTILES = (50, 90, 99, 100)
NUM_BINS = 8
MAX_ANSWERS = 20
"""Different answers that are counted one by one."""
MIN_ENDS = 0.99
"""Least share of rows whose answer must end in an end token; without one a model does not learn to stop."""


@dataclass(frozen=True)
class Finding:
    """A problem found before training: an `error` stops it, a `warning` is shown."""

    level: str
    key: str
    message: str


@dataclass
class SplitStatistics:
    """Counts over one split.

    Attributes:
        begin_tokens: number of rows by their number of begin tokens; empty if the tokenizer has none.
        doubled_begin: rows with two begin tokens side by side.
        ends_trained: rows whose last learned token is an end token.
        untrained: rows without a learned token.
        special_in_text: rows whose text spells a special token, which the tokenizer then produces.
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


def split_statistics(examples: Examples, tokenizer: Any, ends: Ends) -> SplitStatistics:
    """Counts over all tokens of a split."""
    statistics = SplitStatistics(len(examples))
    if not len(examples):
        return statistics
    ids, starts, lengths = examples.ids, examples.starts, examples.lengths
    begin = tokenizer.bos_token_id
    if begin is not None and begin != tokenizer.eos_token_id:
        is_begin = np.concatenate([[0], np.cumsum(ids == begin)])
        counts = is_begin[starts[1:]] - is_begin[starts[:-1]]
        statistics.begin_tokens = {
            int(n): int(rows) for n, rows in zip(*np.unique(counts, return_counts=True), strict=True)
        }
        pairs = np.flatnonzero((ids[1:] == begin) & (ids[:-1] == begin)) + 1
        within_rows = pairs[~np.isin(pairs, starts)]
        statistics.doubled_begin = len(np.unique(np.searchsorted(starts, within_rows, side="right")))
    learned = np.concatenate([[0], np.cumsum(examples.labelled != 0, dtype=np.int64)])
    answers = learned[starts[1:]] - learned[starts[:-1]]
    statistics.untrained = int((answers == 0).sum())
    learned_positions = np.flatnonzero(examples.labelled)
    answer_ends = learned[starts[1:]][answers > 0]
    ends_well = np.isin(ids[learned_positions[answer_ends - 1]], ends.ids)
    if ends.text:
        tail_tokens = len(ends.text.encode()) + 1
        tails = (ids[learned_positions[max(0, end - tail_tokens) : end]].tolist() for end in answer_ends)
        ends_well |= np.fromiter(map(ends.reached, tails), bool, len(answer_ends))
    statistics.ends_trained = int(ends_well.sum())
    statistics.prompt_tokens = _percentiles(lengths - answers)
    statistics.answer_tokens = _percentiles(answers)
    statistics.all_tokens = _percentiles(lengths)
    edges = np.unique(np.linspace(0, lengths.max() + 1, NUM_BINS + 1).astype(int))
    rows = np.histogram(lengths, edges)[0]
    statistics.histogram = [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], rows, strict=True)]
    special = [token for token in (*tokenizer.all_special_tokens, ends.text) if len(token) > 2]
    statistics.special_in_text = sum(
        any(token in message_text(message) for message in examples.conversations[row].messages for token in special)
        for row in examples.rows
    )
    return statistics


def _percentiles(values: np.ndarray) -> dict[int, int]:
    return {p: int(np.percentile(values, p, method="higher")) for p in PERCENTILES}


def label_balance(conversations: Sequence[Conversation], labels: Sequence[str]) -> dict[str, int]:
    """Rows by class, or by answer where there are few different ones; empty for free text and numbers."""
    if not conversations:
        return {}
    if conversations[0].target is not None:
        if isinstance(conversations[0].target, float):
            return {}
        counts: Counter[int] = Counter()
        for row in conversations:
            is_multi_label = isinstance(row.target, tuple)
            counts.update([n for n, is_one in enumerate(row.target) if is_one] if is_multi_label else [row.target])  # type: ignore
        return {labels[number]: counts[number] for number in sorted(counts)}
    answers = Counter(message_text(c.messages[-1]).strip() for c in conversations)
    return dict(answers.most_common()) if len(answers) <= MAX_ANSWERS else {}


def findings(
    config: TrainConfig,
    statistics: dict[str, SplitStatistics],
    overlaps: Sequence[Overlap],
    context_tokens: int | None,
    learned_positions: bool,
) -> list[Finding]:
    """All findings, errors first.

    `context_tokens` is the model's number of positions; with `learned_positions` the model fails beyond it.
    """
    classifies = config.task.head is not None or config.task.auto_class == "sequence_classification"
    result = [finding for split, counts in statistics.items() for finding in _of_split(split, counts, classifies)]
    longest = max((counts.all_tokens.get(100, 0) for counts in statistics.values()), default=0)
    if context_tokens is not None and longest > context_tokens:
        level = "error" if learned_positions else "warning"
        limit = f"more than the {context_tokens} positions of the model"
        result.append(Finding(level, "data.max_tokens", f"the longest row has {longest} tokens, {limit}"))
    train = statistics.get("train")
    if train is not None and train.begin_tokens.get(0):
        message = f"{train.begin_tokens[0]} train rows have no begin token, although the tokenizer has one"
        result.append(Finding("warning", "prompt", message))
    trains_on_all = config.data.train_on is TrainOn.all
    for overlap in overlaps:
        if not (trains_on_all and (overlap.first, overlap.second) == ("train", "validation")):
            result += _of_overlap(overlap, statistics, config.data.max_overlap_fraction, classifies)
    if trains_on_all:
        message = "validation rows are trained on too, so validation numbers mean nothing"
        result.append(Finding("warning", "data.train_on", message))
    return sorted(result, key=lambda finding: finding.level != "error")


def _of_split(split: str, statistics: SplitStatistics, classifies: bool) -> Iterator[Finding]:
    if statistics.doubled_begin:
        yield Finding("error", "prompt", f"{statistics.doubled_begin} {split} rows have two begin tokens side by side")
    if statistics.untrained and not classifies:
        yield Finding("error", "data", f"{statistics.untrained} {split} rows have no token to learn")
    if not classifies and statistics.rows and statistics.ends_trained < MIN_ENDS * statistics.rows:
        share = 1 - statistics.ends_trained / statistics.rows
        lack = f"{share:.0%} of the {split} rows do not end in a trained end token, so the model would not learn to"
        advice = "put the end token inside {% generation %} in the prompt's template"
        yield Finding("error", "prompt", f"{lack} stop: {advice}")
    if statistics.special_in_text:
        message = f"{statistics.special_in_text} {split} rows spell a special token in their own text"
        yield Finding("warning", "data", message)


def _of_overlap(
    overlap: Overlap, statistics: dict[str, SplitStatistics], max_fraction: float, classifies: bool
) -> Iterator[Finding]:
    first, second = overlap.first, overlap.second
    if overlap.exact and first == second:
        yield Finding("warning", "data", f"{overlap.exact} {first} rows are copies of others")
    elif overlap.exact:
        share = overlap.exact / max(1, statistics[second].rows)
        level = "error" if share > max_fraction else "warning"
        example = " = ".join(overlap.examples[0]) if overlap.examples else ""
        message = f"{overlap.exact} {second} rows ({share:.0%}) are also in {first} ({example})"
        yield Finding(level, "data.max_overlap_fraction", f"{message}, so its numbers are too good")
    if overlap.near and first != second:
        yield Finding("warning", "data", f"{overlap.near} {second} rows are near-duplicates of {first} rows")
    elif overlap.exact_prompts > overlap.exact and first != second and not classifies:
        shared = overlap.exact_prompts - overlap.exact
        yield Finding("warning", "data.group", f"{shared} {second} rows share their question with {first} rows")


def stop_on_errors(findings: Sequence[Finding]) -> None:
    """Raises DataError with the first error."""
    for finding in findings:
        if finding.level == "error":
            raise DataError(f"{finding.key}: {finding.message}. `python -m llmft.check` shows more.")
