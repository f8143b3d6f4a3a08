"""Checks a run's rows for mistakes: errors, which stop a training, and warnings."""

from __future__ import annotations

from dataclasses import dataclass

from llmft.config.data import Truncation
from llmft.config.task import Feedback, TaskType
from llmft.data.overlap import Overlap, find_overlaps
from llmft.data.preferences import answers_of, contradictions, label_counts
from llmft.data.quality import Finding, SplitStatistics, findings, label_balance, split_statistics
from llmft.training.prepare import RunInputs
from llmft.training.tokenized_data import TokenizedData

LABEL_RATIO = 2.0
"""Weighted counts of good and bad answers with a larger ratio get a warning; KTO's authors advise 1 to 1.5 (section 4.2
of arXiv:2402.01306)."""


@dataclass
class Inspection:
    """Statistics of the rows, and the mistakes found in them."""

    statistics: dict[str, SplitStatistics]
    overlaps: list[Overlap]
    findings: list[Finding]


def inspect_rows(inputs: RunInputs, rows: TokenizedData, *, search_near_duplicates: bool) -> Inspection:
    """Statistics and mistakes of the rows; near-duplicates, which take seconds, only if `search_near_duplicates`."""
    statistics = {
        split: split_statistics(examples, rows.tokenizer, rows.ends) for split, examples in rows.splits.items()
    }
    overlaps = find_overlaps(
        {split: part for split, part in inputs.conversations.items() if part}, near=search_near_duplicates
    )
    row_based = [*_dropped(inputs, rows), *row_findings(inputs), *_serving(inputs, rows)]
    token_based = findings(inputs.config, statistics, overlaps, rows.context_tokens, rows.learned_positions)
    return Inspection(statistics, overlaps, [*row_based, *token_based])


def row_findings(inputs: RunInputs) -> list[Finding]:
    """The findings that need no tokens."""
    compared = _imbalance(inputs) if inputs.config.task.feedback is Feedback.labels else _comparisons(inputs)
    return [*_unlearned(inputs), *_pseudo(inputs), *compared]


def _comparisons(inputs: RunInputs) -> list[Finding]:
    """Warns of compared answers that contradict each other or are empty."""
    if inputs.config.task.feedback is None:
        return []
    rows = [row for part in inputs.conversations.values() for row in part]
    result = []
    if reversed_rows := contradictions(rows):
        one, two = reversed_rows[0]
        number = "row compares" if len(reversed_rows) == 1 else f"{len(reversed_rows)} rows compare"
        message = f"{number} the same two answers in the opposite order of another row ({one} and {two})"
        result.append(Finding("warning", "data.contradictions", message))
    empty = [row.where for row in rows if row.comparison is not None and not all(map(str.strip, answers_of(row)))]
    if empty:
        message = f"{len(empty)} of {len(rows)} rows compare an empty answer, the first in {empty[0]}"
        result.append(Finding("warning", "data", f"{message}: the model can only learn from it to end at once"))
    return result


def _imbalance(inputs: RunInputs) -> list[Finding]:
    """Warns where weighted good or bad answers are so few that a policy learns almost nothing from them."""
    counts = label_counts(inputs.conversations["train"])
    names = {"good": "desirable", "bad": "undesirable"}
    weights = {kind: inputs.config.task.loss_options.get(name, 1.0) for kind, name in names.items()}
    sums = {kind: weights[kind] * count for kind, count in counts.items()}
    rare, common = sorted(sums, key=lambda kind: sums[kind])
    if sums[rare] * LABEL_RATIO >= sums[common]:
        return []
    message = f"{counts['good']} of the training answers are good and {counts['bad']} bad"
    if counts[rare]:
        balanced = weights[rare] * sums[common] / sums[rare]
        message += f"; task.loss_options.{names[rare]}={balanced:.3g} gives both kinds equal weight"
    else:
        message += f", so nothing shows what a {'better' if rare == 'good' else 'worse'} answer is like"
    return [Finding("warning", "task.loss_options", message)]


def _unlearned(inputs: RunInputs) -> list[Finding]:
    """Warns of classes without a training row, because of files, split, fold or limits."""
    targets = inputs.targets
    if targets is None or targets.problem is TaskType.regression:
        return []
    counts = {split: label_balance(rows, targets.labels) for split, rows in inputs.conversations.items()}
    lacking = [label for label in targets.labels if not counts["train"].get(label)]
    if not lacking:
        return []
    held_out = {label: sum(counts[split].get(label, 0) for split in counts) for label in lacking}
    named = ", ".join(f"{label} ({held_out[label]} held out)" for label in lacking[:20])
    named += ", …" if len(lacking) > 20 else ""
    message = f"{len(lacking)} of {len(targets.labels)} classes have no training row and cannot be learned: {named}"
    return [Finding("warning", "data.columns.target", message)]


def _pseudo(inputs: RunInputs) -> list[Finding]:
    """Warns of pseudo-labels by models that were trained on rows that are held out here."""
    fold = inputs.config.data.fold
    sources = [
        source
        for source in inputs.pseudo.sources
        if source.get("rows_fingerprint") == inputs.rows_fingerprint
        and (source.get("fold") != fold or source.get("train_on") == "all")
    ]
    if not sources or not inputs.pseudo.used:
        return []
    message = (
        f"{len(sources)} of the models that made the pseudo-labels were trained on rows that are held out here, so the "
        "validation is a little too good: take the labels of this fold's own model"
    )
    return [Finding("warning", "data.pseudo", message)]


def _serving(inputs: RunInputs, rows: TokenizedData) -> list[Finding]:
    """Warns of unused message keys, and of rows whose text or tokens differ from those of serving."""
    result = []
    if unused := ", ".join(f"{key} ({count:,})" for key, count in sorted(inputs.message_keys.unused.items())):
        message = f"these keys of messages are not used (messages that have them): {unused}"
        result.append(Finding("warning", "data.columns.messages", message))
    messages: list[str] = []
    for split, lengths in rows.encoder.lengths.items():
        if lengths.rows_joined:
            messages.append(
                f"this tokenizer merges tokens across the prompt/answer border in {lengths.rows_joined} {split} rows; "
                "they are tokenised separately, as a server does"
            )
        if lengths.rows_split:
            messages.append(
                f"{lengths.rows_split} {split} rows are trained on as one sequence per answer, since the template "
                "writes earlier answers differently once later turns follow"
            )
        if lengths.rows_unlike:
            messages.append(
                f"in {lengths.rows_unlike} {split} rows the text before an answer differs from the template's prompt "
                "(add_generation_prompt), so a server's prompts will differ from the training's"
            )
    if rows.ends.text and rows.splits["train"].labelled.any():
        messages.append(
            f"the end marker {rows.ends.text!r} is {rows.ends.num_tokens} tokens with this tokenizer, matched as "
            "a sequence; set it as a stop string in a server"
        )
    return [*result, *(Finding("warning", "prompt", message) for message in messages)]


def _dropped(inputs: RunInputs, rows: TokenizedData) -> list[Finding]:
    """Finds rows whose answer does not fit, an error unless data.truncation=drop or max_dropped_fraction allows it."""
    data, limits = inputs.config.data, rows.encoder.lengths["train"]
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
