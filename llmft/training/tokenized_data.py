"""Prepared conversations to token ids, and the number of steps they make: all about the data, before weights load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmft.config.convert import canonical, to_plain
from llmft.config.data import PromptConfig, Truncation
from llmft.config.task import Feedback, TaskType
from llmft.core.errors import ConfigError
from llmft.data.batch import steps_per_epoch
from llmft.data.encode import Encoder, Ends
from llmft.data.examples import Examples
from llmft.data.messages import message_text
from llmft.data.overlap import Overlap, find_overlaps
from llmft.data.preferences import answers_of, contradictions, label_counts
from llmft.data.prompt import PromptFormat, prompt_format
from llmft.data.quality import Finding, SplitFacts, findings, label_balance, split_facts
from llmft.data.targets import Targets
from llmft.model.families import positions
from llmft.model.load import load_tokenizer, model_config, train_tokenizer
from llmft.model.quantization import agreed
from llmft.training.prepare import RunInputs, check_rejected


@dataclass
class TokenizedData:
    """Tokenised splits and what made them."""

    tokenizer: Any
    prompt: PromptFormat
    encoder: Encoder
    splits: dict[str, Examples]
    ends: Ends
    total_steps: int
    validate_every: int
    context_tokens: int | None
    learned_positions: bool


@dataclass
class Inspection:
    """What the rows say about themselves, and what of it should stop a training."""

    facts: dict[str, SplitFacts]
    overlaps: list[Overlap]
    findings: list[Finding]


def inspect_rows(prepared: RunInputs, rows: TokenizedData, *, near: bool) -> Inspection:
    """Looks for the mistakes of `llmft.data.quality`; near-duplicates only with `near`, since they take seconds."""
    facts = {split: split_facts(examples, rows.tokenizer, rows.ends) for split, examples in rows.splits.items()}
    overlaps = find_overlaps({split: part for split, part in prepared.conversations.items() if part}, near=near)
    of_rows = [*_dropped(prepared, rows), *row_findings(prepared), *_unread(prepared), *_serving(rows)]
    all_findings = findings(prepared.config, facts, overlaps, rows.context_tokens, rows.learned_positions)
    return Inspection(facts, overlaps, [*of_rows, *all_findings])


def row_findings(prepared: RunInputs) -> list[Finding]:
    """What is to be told of the rows before they are tokenised."""
    messages = {"data.columns.target": _unlearned(prepared), "data.pseudo": _pseudo(prepared)}
    of_rows = [Finding("warning", key, message) for key, message in messages.items() if message]
    return [*of_rows, *_feedback(prepared)]


def _feedback(prepared: RunInputs) -> list[Finding]:
    """Warns of compared answers that contradict each other or are empty, and of labels that are nearly all the same."""
    feedback = prepared.config.task.feedback
    if feedback is None:
        return []
    if feedback is Feedback.labels:
        return _imbalance(prepared)
    rows = [row for part in prepared.conversations.values() for row in part]
    result = []
    if reversed_rows := contradictions(rows):
        one, two = reversed_rows[0]
        number = "row compares" if len(reversed_rows) == 1 else f"{len(reversed_rows)} rows compare"
        message = f"{number} the same two answers the other way round than another row ({one} and {two})"
        result.append(Finding("warning", "data.contradictions", message))
    empty = [row.where for row in rows if row.comparison is not None and not all(map(str.strip, answers_of(row)))]
    if empty:
        message = f"{len(empty)} of {len(rows)} rows compare an empty answer, the first in {empty[0]}"
        result.append(Finding("warning", "data", f"{message}: all that can be learned of it is to end at once"))
    return result


LABEL_RATIO = 2.0
"""Good and bad answers, times their weights, that differ by more are told of; KTO's authors advise 1 to 1.5 (section
4.2 of arXiv:2402.01306)."""


def _imbalance(prepared: RunInputs) -> list[Finding]:
    """Warns where good or bad answers, with their weights, are so few that a policy learns next to nothing of them."""
    counts = label_counts(prepared.conversations["train"])
    names = {"good": "desirable", "bad": "undesirable"}
    weights = {kind: prepared.config.task.loss_options.get(name, 1.0) for kind, name in names.items()}
    sums = {kind: weights[kind] * count for kind, count in counts.items()}
    rare, common = sorted(sums, key=lambda kind: sums[kind])
    if sums[rare] * LABEL_RATIO >= sums[common]:
        return []
    message = f"{counts['good']} of the training answers are good and {counts['bad']} bad"
    if counts[rare]:
        balanced = weights[rare] * sums[common] / sums[rare]
        message += f"; task.loss_options.{names[rare]}={balanced:.3g} makes both kinds count alike"
    else:
        message += f", so nothing says what a {'better' if rare == 'good' else 'worse'} answer is like"
    return [Finding("warning", "task.loss_options", message)]


def _unlearned(prepared: RunInputs) -> str:
    """Of classes without a training row, whatever took them: a file, a split, a fold, a limit."""
    targets = prepared.targets
    if targets is None or targets.problem is TaskType.regression:
        return ""
    counts = {split: label_balance(rows, targets.labels) for split, rows in prepared.conversations.items()}
    lacking = [label for label in targets.labels if not counts["train"].get(label)]
    if not lacking:
        return ""
    held_out = {label: sum(counts[split].get(label, 0) for split in counts) for label in lacking}
    named = ", ".join(f"{label} ({held_out[label]} held out)" for label in lacking[:20])
    named += ", …" if len(lacking) > 20 else ""
    return f"{len(lacking)} of {len(targets.labels)} classes have no training row and cannot be learned: {named}"


def _pseudo(prepared: RunInputs) -> str:
    """Where pseudo-labels come from models that were trained on rows that are held out here."""
    fold = prepared.config.data.fold
    sources = [
        source
        for source in prepared.pseudo.sources
        if source.get("rows_fingerprint") == prepared.rows_fingerprint
        and (source.get("fold") != fold or source.get("train_on") == "all")
    ]
    if not sources or not prepared.pseudo.used:
        return ""
    return (
        f"{len(sources)} of the models that made the pseudo-labels were trained on rows that are held out here, so the "
        "validation is a little too good: take the labels of this fold's own model"
    )


def with_options(prompt: PromptConfig, targets: Targets | None) -> PromptConfig:
    """`prompt` with the classes written for {options} in its instruction: "A: first class", one to a line."""
    if not prompt.instruction or "{options}" not in prompt.instruction:
        return prompt
    if targets is None:
        raise ConfigError("prompt.instruction: {options} are a task's classes, and this task has none.")
    words = targets.words or targets.labels
    listed = [label if word == label else f"{word}: {label}" for word, label in zip(words, targets.labels, strict=True)]
    return replace(prompt, instruction=prompt.instruction.replace("{options}", "\n".join(listed)))


def _unread(prepared: RunInputs) -> list[Finding]:
    """The keys of messages that nothing reads, once."""
    unused = ", ".join(f"{key} ({count:,})" for key, count in sorted(prepared.message_keys.unused.items()))
    message = f"these keys of messages are not used (messages that have them): {unused}"
    return [Finding("warning", "data.columns.messages", message)] if unused else []


def _serving(rows: TokenizedData) -> list[Finding]:
    """Where the text or the tokens of a row are not at once those that serving has."""
    messages: list[str] = []
    for split, lengths in rows.encoder.lengths.items():
        if lengths.rows_joined:
            messages.append(
                f"in {lengths.rows_joined} {split} rows this tokenizer joins a prompt with its answer, or an answer "
                "with what follows: they are tokenised apart, as serving does"
            )
        if lengths.rows_split:
            messages.append(
                f"{lengths.rows_split} {split} rows are learned as a sequence for each answer, since earlier answers "
                "look otherwise once later turns follow"
            )
        if lengths.rows_unlike:
            messages.append(
                f"in {lengths.rows_unlike} {split} rows the template writes something else before an answer than it "
                "writes as a prompt (add_generation_prompt), so serving will not see what is trained"
            )
    if rows.ends.text and rows.splits["train"].labelled.any():
        messages.append(
            f"the end marker {rows.ends.text!r} is {rows.ends.num_tokens} tokens with this tokenizer, matched whole; a "
            "server must be told it as a stop string"
        )
    return [Finding("warning", "prompt", message) for message in messages]


def _dropped(prepared: RunInputs, rows: TokenizedData) -> list[Finding]:
    """Rows whose answer does not fit: nobody chose to lose them, unlike those of data.truncation=drop."""
    data, limits = prepared.config.data, rows.encoder.lengths["train"]
    lost = sum(limits.dropped_by.get(key, 0) for key in ("data.max_tokens", "data.max_prompt_tokens"))
    total = limits.rows + limits.rows_dropped
    share = lost / max(1, total)
    if data.truncation is Truncation.drop or share <= data.max_dropped_fraction:
        return []
    message = (
        f"{lost} of {total} train rows ({share:.1%}) do not fit into data.max_tokens={data.max_tokens} with their "
        "answers and would be left out: raise it, or set data.max_dropped_fraction to accept that"
    )
    return [Finding("error", "data.max_tokens", message)]


def read_rows(prepared: RunInputs, warn: Callable[[str], None]) -> TokenizedData:
    """Loads (or trains) the tokenizer and encodes every split.

    Raises ConfigError for a tokenizer or prompt format that cannot be used, DataError for rows that cannot.
    """
    config, conversations = prepared.config, prepared.conversations
    architecture = model_config(config.model, prepared.located)
    agreed(config.quantization, architecture, f"model={config.model.label}")
    if config.model.train_tokenizer_vocab is not None:
        texts = [message_text(message) for c in conversations["train"] for message in c.messages]
        texts += config.model.train_tokenizer_extra
        tokenizer = train_tokenizer(texts, config.model.train_tokenizer_vocab, config.data.max_tokens)
    else:
        tokenizer = load_tokenizer(config.model, prepared.located)
    prompt = prompt_format(with_options(config.prompt, prepared.targets), tokenizer)
    # All that decides on the text of a row besides the configuration of data and prompt.
    targets = to_plain(replace(prepared.targets, prior=[])) if prepared.targets is not None else None
    kind = to_plain(config.task.feedback or config.task.head)
    fingerprint = canonical([prepared.data_fingerprint, targets, kind])
    encoder = Encoder(tokenizer, prompt, config.data, fingerprint, warn)
    splits = {split: encoder.encode(split, rows, prepared.problems) for split, rows in conversations.items() if rows}
    check_rejected(prepared.problems, sum(map(len, conversations.values())), config)
    per_epoch, every = steps_per_epoch(len(splits["train"]), config.trainer.batch_size), config.trainer.validate_every
    total = config.trainer.max_steps or max(1, round(config.trainer.epochs * per_epoch))
    every = max(1, round(every * total if every < 1 else every))
    return TokenizedData(tokenizer, prompt, encoder, splits, encoder.ends, total, every, *positions(architecture))
