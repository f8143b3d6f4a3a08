"""The report of `python -m llmft.check` as plain data; `llmft.checks.page` prints it."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmft.checks.cards import plan_cards, recomputation
from llmft.config.convert import to_plain
from llmft.config.data import NO_LIMIT, Truncation
from llmft.config.task import Feedback
from llmft.core.files import existing_parent, format_bytes
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE
from llmft.data.preferences import by_degree, label_counts, longer_wins
from llmft.data.prompt import PromptFormat
from llmft.data.quality import Finding, label_balance, split_statistics
from llmft.data.readers import BadRows
from llmft.model.device import TORCH_DTYPES
from llmft.model.memory import device_memory
from llmft.model.meta import meta_model
from llmft.training.micro_batching import MEMORY_MARGIN, architecture_of, estimator, plan_micro_batches
from llmft.training.parts import check_parts
from llmft.training.prepare import RunInputs
from llmft.training.readiness import Readiness, check_readiness
from llmft.training.tokenized_data import TokenizedData

SHOWN_ROWS = 2
CARDS_FROM = 100_000_000
"""Number of weights from which other cards are considered."""
PROBE = [
    {"role": "user", "content": "Question one?"},
    {"role": "assistant", "content": "Answer one."},
    {"role": "user", "content": "Question two?"},
]


def examine(prepared: RunInputs) -> tuple[dict[str, Any], list[Finding]]:
    """The report as JSON-ready data, and its findings.

    Raises ConfigError or DataError if the rows cannot be tokenised.
    """
    config = prepared.config
    started = time.monotonic()
    ready = check_readiness(prepared, check_parts(config), warn, search_near_duplicates=True, stop_on_errors=False)
    rows, inspection = ready.rows, ready.inspection
    findings = [*inspection.findings, *_template_findings(rows)]
    trained, by_label = prepared.conversations["train"], config.task.feedback is Feedback.labels
    needs = _needs(prepared, ready)
    findings += _memory_findings(needs)
    report = {
        "model": {"name": config.model.label, "path": str(prepared.located.directory or "random")},
        "prompt": {
            "name": config.prompt.name,
            "pad_token": rows.tokenizer.pad_token,
            "end_tokens": rows.tokenizer.convert_ids_to_tokens(rows.ends.ids),
            "end_marker": {"text": rows.ends.text, "tokens": rows.ends.num_tokens} if rows.ends.text else None,
        },
        "columns": prepared.usage,
        "findings": [asdict(finding) for finding in sorted(findings, key=lambda f: f.level != "error")],
        "splits": {split: asdict(counts) for split, counts in inspection.statistics.items()},
        "limits": _limits(prepared, rows),
        "labels": label_counts(trained) if by_label else label_balance(trained, prepared.labels),
        "overlaps": [asdict(overlap) for overlap in inspection.overlaps],
        "left_out": prepared.problems.reasons(),
        "message_keys": {"read": dict(prepared.message_keys.read), "unused": dict(prepared.message_keys.unused)},
        "steps": {
            "total": rows.total_steps,
            "batch_rows": config.trainer.batch_size,
            "tokens": int(rows.total_steps * config.trainer.batch_size * rows.splits["train"].lengths.mean()),
            "validate_every": rows.validate_every,
        },
        "needs": needs,
        "comparisons": _comparisons(prepared, rows),
        "rows": [_segments(rows, row) for row in range(min(SHOWN_ROWS, len(rows.splits["train"])))],
        "seconds": round(time.monotonic() - started, 2),
    }
    return to_plain(report), findings


def warn(message: str) -> None:
    """Prints to stderr, since a program may read the report from stdout."""
    print(f"warning: {message}", file=sys.stderr)


def _segments(rows: TokenizedData, row: int) -> list[dict[str, Any]]:
    """A training row as segments of text, learned or not; each compared answer is a segment with its number.

    The answer of a labelled row has `good`; the answer to another prompt after it is left out.
    """
    example = rows.splits["train"][row]
    marks = (np.asarray(example.labels) != IGNORE).astype(int) if example.segments is None else example.segments
    comparison = example.conversation.comparison
    labelled = comparison is not None and comparison.desirable is not None
    marks = marks[marks <= 1] if labelled else marks
    cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1), len(marks)]
    ids = [int(token) for token in example.input_ids]
    segments: list[dict[str, Any]] = []
    for start, stop in pairwise(cuts):
        segment = {"text": rows.tokenizer.decode(ids[start:stop]), "learned": bool(marks[start])}
        if marks[start] and comparison is not None:
            segment |= {"good": comparison.desirable} if labelled else {"answer": int(marks[start])}
        segments.append(segment)
    return segments


def _comparisons(inputs: RunInputs, rows: TokenizedData) -> dict[str, Any] | None:
    """Lengths, degrees and how often the longer answer wins in the training rows; None without compared answers."""
    if inputs.config.task.feedback is not Feedback.pairs:
        return None
    lengths: list[tuple[int, int]] = []
    degrees: list[int | None] = []
    for example in rows.splits["train"]:
        assert example.segments is not None
        assert example.conversation.comparison is not None
        tokens = np.bincount(example.segments)[1:].tolist()
        for better, worse in example.conversation.comparison.pairs:
            lengths.append((tokens[better], tokens[worse]))
            degrees.append(example.conversation.comparison.degree)
    chosen, rejected = np.asarray(lengths).mean(axis=0).tolist()
    names, margins = inputs.config.data.degrees, inputs.config.task.margins(inputs.config.data.degrees)
    return {
        "pairs": len(lengths),
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "longer_wins": longer_wins(lengths),
        "degrees": {
            names[degree]: {"pairs": len(pairs), "longer_wins": longer_wins(pairs), "margin": margins[degree]}
            for degree, pairs in by_degree(degrees, lengths).items()
        },
    }


def _template_findings(rows: TokenizedData) -> list[Finding]:
    """A warning if the chosen format differs from the tokenizer's own chat template."""
    template = getattr(rows.tokenizer, "chat_template", None)
    if not isinstance(template, str) or rows.prompt.config.name == "native":
        return []
    tokens = {"bos_token": rows.tokenizer.bos_token, "eos_token": rows.tokenizer.eos_token}
    try:
        config = replace(rows.prompt.config, name="native", template=template, system=None)
        native_text = PromptFormat(config, **tokens, strict=False).render(PROBE, add_generation_prompt=True).text
        text = rows.prompt.render(PROBE, add_generation_prompt=True).text
    except ValueError as error:
        return [Finding("warning", "prompt", f"the tokenizer's own chat template cannot be compared ({error})")]
    if text.strip() == native_text.strip():
        return []
    message = (
        f"prompt={rows.prompt.config.name} differs from the tokenizer's chat template: it writes {text!r} where the "
        f"template writes {native_text!r}; a model tuned with that template works better with prompt=native or the "
        "format of its name"
    )
    return [Finding("warning", "prompt", message)]


def _limits(prepared: RunInputs, rows: TokenizedData) -> dict[str, Any]:
    """The effect of the length limits, and the data.max_tokens that would cut 1% of the rows."""
    data = replace(
        prepared.config.data,
        max_tokens=NO_LIMIT,
        max_prompt_tokens=None,
        max_answer_tokens=None,
        min_prompt_tokens=0,
        min_answer_tokens=0,
        truncation=Truncation.drop,
    )
    encoder = Encoder(rows.tokenizer, rows.prompt, data, rows.encoder.fingerprint)
    unlimited = encoder.encode("train", prepared.conversations["train"], BadRows(prepared.config.data.on_bad_row))
    statistics = split_statistics(unlimited, rows.tokenizer, rows.ends)
    counts = rows.encoder.lengths["train"]
    return {
        "max_tokens": prepared.config.data.max_tokens,
        "truncation": prepared.config.data.truncation.value,
        "rows_cut": counts.rows_cut,
        "rows_dropped": counts.rows_dropped,
        "dropped_by": counts.dropped_by,
        "answer_share_dropped": counts.answer_share_dropped,
        "uncut": {"all": statistics.all_tokens, "prompt": statistics.prompt_tokens, "answer": statistics.answer_tokens},
        "histogram": statistics.histogram,
        "cuts_one_percent": statistics.all_tokens.get(99),
    }


def _needs(prepared: RunInputs, ready: Readiness) -> dict[str, Any]:
    """Estimates of memory, time and disk space."""
    config, rows, device, precision = prepared.config, ready.rows, ready.device, ready.precision
    examples = rows.splits["train"]
    dtype = TORCH_DTYPES[precision] if config.lora.enabled else torch.float32
    architecture = architecture_of(prepared, len(rows.tokenizer))
    plan = plan_micro_batches(config, examples, lambda: architecture, device, dtype)
    estimate = plan.estimate
    if estimate is None:
        estimate = estimator(config, examples, architecture, device, dtype)(plan.limit, plan.checkpointing)
    weights = _matrix_weights(str(config.task.auto_class), architecture)
    trained_tokens = rows.total_steps * config.trainer.batch_size * float(examples.lengths.mean())
    operations = (4 if config.lora.enabled else 6) * weights * trained_tokens  # see `recomputation`
    seconds = operations * recomputation(config, plan.checkpointing) / _product_rate(device, dtype)
    checkpoint = estimate.adapter + estimate.optimizer
    return {
        "device": str(device),
        "precision": precision.value,
        "memory": {**asdict(estimate), "total": estimate.total},
        "device_memory": device_memory(device),
        "micro_batch": {**plan.to_plain(), "summary": str(plan)},
        "base": estimate.base,
        "disk": checkpoint * (config.trainer.keep_checkpoints + 2) + estimate.adapter,
        "disk_free": shutil.disk_usage(existing_parent(Path(config.output_dir))).free,
        "seconds_at_least": seconds,
        "weights": weights,
        "cards": plan_cards(config, examples, architecture, operations) if weights >= CARDS_FROM else [],
    }


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product; trainings are slower, especially of small models."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    started = time.monotonic()
    rounds = 3
    for _ in range(rounds):
        product = matrix @ matrix
    product.sum().item()
    return 2 * size**3 * rounds / (time.monotonic() - started)


def _matrix_weights(auto_class: str, architecture: Any) -> int:
    """Number of weights that multiply each token; all experts count, so a mixture of experts is overestimated."""
    empty = meta_model(auto_class, architecture)
    tables = {id(m.weight) for m in empty.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in empty.parameters() if p.ndim >= 2 and id(p) not in tables)


def _memory_findings(needs: dict[str, Any]) -> list[Finding]:
    """A warning if memory does not suffice, with the remaining options."""
    total, available, chosen = needs["memory"]["total"], needs["device_memory"], needs["micro_batch"]
    if available is None or total <= (1 - MEMORY_MARGIN) * available:
        return []
    options = ["lower trainer.micro_batch"] if (chosen["rows"] or 0) > 1 else []
    options += ["set trainer.gradient_checkpointing=full"] if chosen["checkpointing"] != "full" else []
    message = (
        f"about {format_bytes(total)} are needed (within 15%), and {needs['device']} has "
        f"{format_bytes(available)}: {' or '.join([*options, 'lower data.max_tokens', 'choose a smaller model'])}"
    )
    return [Finding("warning", "trainer.micro_batch", message)]
