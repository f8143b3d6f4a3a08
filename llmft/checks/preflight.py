"""The report of `python -m llmft.check`: collected as plain data, then printed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmft.checks.cards import plans, told
from llmft.config.convert import to_plain
from llmft.config.sections import Checkpointing, Feedback, Truncation
from llmft.core.files import existing_parent, format_bytes
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE
from llmft.data.preferences import by_degree, label_counts, longer_wins
from llmft.data.prompt import PromptFormat
from llmft.data.quality import Finding, label_balance, split_facts
from llmft.data.sources import BadRows
from llmft.model.load import TORCH_DTYPES
from llmft.model.memory import device_memory
from llmft.model.meta import meta_model
from llmft.training.micro_batching import MEMORY_MARGIN, architecture_of, estimator, plan_micro_batches
from llmft.training.objectives.choice import cost
from llmft.training.parts import check_parts
from llmft.training.prepare import RunInputs
from llmft.training.readiness import Ready, make_ready
from llmft.training.tokenized_data import TokenizedData

SHOWN_ROWS = 2
PROBE = [
    {"role": "user", "content": "Question one?"},
    {"role": "assistant", "content": "Answer one."},
    {"role": "user", "content": "Question two?"},
]


def examine(prepared: RunInputs) -> tuple[dict[str, Any], list[Finding]]:
    """The report as JSON-ready data, and its findings.

    Raises ConfigError or DataError where the rows cannot even be tokenised.
    """
    config = prepared.config
    started = time.monotonic()
    ready = make_ready(prepared, check_parts(config), warn, near=True, stop=False)
    rows, inspection = ready.rows, ready.inspection
    findings = [*inspection.findings, *_template_findings(rows)]
    slow = cost(ready.objective) if ready.objective is not None else None
    if slow is not None:
        findings.append(Finding("warning", "task.head", slow))
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
        "splits": {split: asdict(fact) for split, fact in inspection.facts.items()},
        "limits": _limits(prepared, rows),
        "labels": _labels(prepared),
        "overlaps": [asdict(overlap) for overlap in inspection.overlaps],
        "left_out": prepared.problems.reasons(),
        "message_keys": {
            "read": dict(prepared.message_keys.read),
            "unused": dict(prepared.message_keys.unused),
        },
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
    """Prints to stderr, since a program may read the report."""
    print(f"warning: {message}", file=sys.stderr)


def _segments(rows: TokenizedData, row: int) -> list[dict[str, Any]]:
    """One training row as segments of text that are learned or not; every compared answer is one, by its number.

    Of a row with a label, the answer says whether it is good; the answer to another prompt behind it is left out.
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


def _labels(inputs: RunInputs) -> dict[str, int]:
    """Training rows by class or label."""
    rows = inputs.conversations["train"]
    if inputs.config.task.feedback is Feedback.labels:
        return label_counts(rows)
    return label_balance(rows, inputs.labels)


def _comparisons(inputs: RunInputs, rows: TokenizedData) -> dict[str, Any] | None:
    """Lengths, degrees and how often the longer answer wins, of the training rows; None without compared answers."""
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
    special = {"bos_token": rows.tokenizer.bos_token, "eos_token": rows.tokenizer.eos_token}
    try:
        native = PromptFormat(replace(rows.prompt.config, name="native", template=template, system=None), strict=False)
        native_text = native.render(PROBE, **special, add_generation_prompt=True).text
        text = rows.prompt.render(PROBE, **special, add_generation_prompt=True).text
    except ValueError as error:
        return [Finding("warning", "prompt", f"the tokenizer's own chat template cannot be compared ({error})")]
    if text.strip() == native_text.strip():
        return []
    message = (
        f"prompt={rows.prompt.config.name} differs from the tokenizer's chat template: it writes {text!r} where the "
        f"template writes {native_text!r}; a model tuned with that one does better with prompt=native or the "
        "format of its name"
    )
    return [Finding("warning", "prompt", message)]


def _limits(prepared: RunInputs, rows: TokenizedData) -> dict[str, Any]:
    """The effect of the length limits, and the data.max_tokens that would cut 1% of the rows."""
    data = replace(
        prepared.config.data,
        max_tokens=2**31 - 1,
        max_prompt_tokens=None,
        max_answer_tokens=None,
        min_prompt_tokens=0,
        min_answer_tokens=0,
        truncation=Truncation.drop,
    )
    encoder = Encoder(rows.tokenizer, rows.prompt, data, rows.encoder.fingerprint)
    unlimited = encoder.encode("train", prepared.conversations["train"], BadRows(prepared.config.data.on_bad_row))
    facts = split_facts(unlimited, rows.tokenizer, rows.ends)
    counts = rows.encoder.lengths["train"]
    return {
        "max_tokens": prepared.config.data.max_tokens,
        "truncation": prepared.config.data.truncation.value,
        "rows_cut": counts.rows_cut,
        "rows_dropped": counts.rows_dropped,
        "dropped_by": counts.dropped_by,
        "answer_share_dropped": counts.answer_share_dropped,
        "uncut": {"all": facts.all_tokens, "prompt": facts.prompt_tokens, "answer": facts.answer_tokens},
        "histogram": facts.histogram,
        "cuts_one_percent": facts.all_tokens.get(99),
    }


def _needs(prepared: RunInputs, ready: Ready) -> dict[str, Any]:
    """Memory, time and disk."""
    config, rows, device, precision = prepared.config, ready.rows, ready.device, ready.precision
    examples = rows.splits["train"]
    dtype = TORCH_DTYPES[precision] if config.lora.enabled else torch.float32
    architecture = architecture_of(prepared, len(rows.tokenizer))
    fit = plan_micro_batches(config, examples, lambda: architecture, device, dtype)
    estimate = fit.estimate
    if estimate is None:
        estimate = estimator(config, examples, architecture, device, dtype)(fit.limit, fit.checkpointing)
    saved = estimate.adapter + estimate.optimizer
    free = shutil.disk_usage(existing_parent(Path(config.output_dir))).free
    level, weights = fit.checkpointing, _matrix_weights(str(config.task.auto_class), architecture)
    operations: float = (4 if config.lora.enabled else 6) * weights * rows.total_steps * config.trainer.batch_size
    operations *= float(examples.lengths.mean())
    again = (1.5 if config.lora.enabled else 4 / 3) if level is Checkpointing.full else 1.0
    return {
        "device": str(device),
        "precision": precision.value,
        "memory": {**asdict(estimate), "total": estimate.total},
        "device_memory": device_memory(device),
        "micro_batch": {**fit.to_plain(), "told": str(fit)},
        "base": estimate.base,
        "disk": saved * (config.trainer.keep_checkpoints + 2) + estimate.adapter,
        "disk_free": free,
        "seconds_at_least": operations * again / _product_rate(device, dtype),
        "weights": weights,
        "cards": plans(config, examples, architecture, operations),
    }


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large product here: trainings are slower, those of small models by far.

    A training takes 4 operations per weight and token with a LoRA (forward and the gradient of the activations), 6
    without, and 2 more where whole layers are computed again.
    """
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
    """Number of weights that a token is multiplied with; all experts count, so a mixture is overestimated."""
    empty = meta_model(auto_class, architecture)
    tables = {id(m.weight) for m in empty.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in empty.parameters() if p.ndim >= 2 and id(p) not in tables)


def _smaller_options(needs: dict[str, Any]) -> str:
    """The remaining options that need less memory."""
    chosen = needs["micro_batch"]
    tries = ["lower trainer.micro_batch"] if (chosen["rows"] or 0) > 1 else []
    tries += ["set trainer.gradient_checkpointing=full"] if chosen["checkpointing"] != "full" else []
    return " or ".join([*tries, "lower data.max_tokens", "choose a smaller model"])


def _memory_findings(needs: dict[str, Any]) -> list[Finding]:
    findings = []
    total, available = needs["memory"]["total"], needs["device_memory"]
    if available is not None and total > (1 - MEMORY_MARGIN) * available:
        message = (
            f"about {format_bytes(total)} are needed, give or take 15%, and "
            f"{needs['device']} has {format_bytes(available)}: {_smaller_options(needs)}"
        )
        findings.append(Finding("warning", "trainer.micro_batch", message))
    return findings


# -------------------------------------------------------------------------------------------------------------- showing


CARDS_FROM = 100_000_000
"""Weights of a model from which on somebody may look for a larger card than what is here."""


def _card_table(found: list[dict[str, Any]], hours: float | None) -> Table:
    title = "on other cards: arithmetic, never measured on such a card"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("card", "precision", "cards", "micro-batch", "peak of each", "training"):
        table.add_column(name)
    for plan in found:
        table.add_row(*told(plan, hours))
    return table


def show(report: dict[str, Any], hours: float | None = None) -> None:
    """Prints the report on one screen; `hours` are those that there are for the training."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    console.print(f"[bold]llmft check[/bold]  {escape(report['model']['name'])}, prompt {report['prompt']['name']}")
    opening, closing = ("", "") if console.color_system else ("«", "»")  # without colours
    for number, segments in enumerate(report["rows"], start=1):
        learned = f"[black on green]{opening}learned{closing}[/black on green]"
        if any("answer" in segment for segment in segments):
            learned = "[black on green]the better answer[/black on green], then [black on red]the others[/black on red]"
        elif "good" in segments[-1]:
            kind = "[black on green]a good" if segments[-1]["good"] else "[black on red]a bad"
            learned = f"{kind} answer[/]"
        console.print(f"\n[bold]row {number}[/bold] as it is trained; {learned}:")
        text = Text()
        for segment in segments:
            text_shown = (
                segment["text"] if len(segment["text"]) < 700 else f"{segment['text'][:350]} … {segment['text'][-330:]}"
            )
            if segment["learned"]:
                worse = segment.get("answer", 1) > 1 or segment.get("good") is False
                name = f"answer {segment['answer']}: " if "answer" in segment and not console.color_system else ""
                text.append(f"{opening}{name}{text_shown}{closing}", style=f"black on {'red' if worse else 'green'}")
            else:
                text.append(text_shown, style="dim")
        console.print(text)
    console.print(_split_table(report["splits"]))
    pad, ends = report["prompt"]["pad_token"], ", ".join(report["prompt"]["end_tokens"])
    marker = report["prompt"]["end_marker"]
    ends += f" or {marker['text']} ({marker['tokens']} tokens, matched whole)" if marker else ""
    console.print(
        f"[bold]tokens[/bold]  pad {escape(str(pad))} (masked, never learned), answers end with {escape(ends)}"
    )
    if report["message_keys"]["read"]:
        read, unused = (", ".join(sorted(report["message_keys"][kind])) or "none" for kind in ("read", "unused"))
        console.print(f"[bold]keys of messages[/bold]  read: {escape(read)}; not used: {escape(unused)}")
    _show_lengths(console, report["limits"])
    _show_columns(console, report["columns"])
    _show_comparisons(console, report["comparisons"])
    if report["labels"]:
        total = sum(report["labels"].values())
        shares = "  ".join(f"{escape(name)} {count / total:.1%}" for name, count in report["labels"].items())
        console.print(f"[bold]answers[/bold]  {shares}")
    needs, memory, steps = report["needs"], report["needs"]["memory"], report["steps"]
    console.print(
        f"[bold]steps[/bold]  {steps['total']:,} of {steps['batch_rows']} rows, {steps['tokens']:,} tokens, "
        f"validation every {steps['validate_every']}; computing takes {needs['seconds_at_least']:,.0f} s at least "
        f"on {needs['device']}"
    )
    parts = ", ".join(
        f"{name} {format_bytes(memory[name])}"
        for name in ("base", "adapter", "gradients", "optimizer", "activations", "workspace", "libraries")
    )
    available = needs["device_memory"]
    fits = "" if available is None else f" of {format_bytes(available)} on {needs['device']}"
    console.print(f"[bold]memory[/bold] about {format_bytes(memory['total'])}{fits}: {parts}")
    console.print(f"[bold]step[/bold]   {escape(needs['micro_batch']['told'])}")
    if needs["weights"] >= CARDS_FROM:
        console.print(_card_table(needs["cards"], hours))
    console.print(f"[bold]disk[/bold]   {format_bytes(needs['disk'])} of {format_bytes(needs['disk_free'])} free")
    _show_findings(console, report["findings"])


def _show_comparisons(console: Console, facts: dict[str, Any] | None) -> None:
    if facts is None:
        return
    console.print(
        f"[bold]pairs[/bold]   {facts['pairs']:,}: the better answer has {facts['chosen_tokens']:.0f} tokens, the "
        f"other {facts['rejected_tokens']:.0f}; the longer one is better in {facts['longer_wins']:.1%}"
    )
    for name, of_degree in facts["degrees"].items():
        margin = f", margin {of_degree['margin']:.3g}" if of_degree["margin"] else ""
        console.print(
            f"        {escape(name)}: {of_degree['pairs']:,}, the longer wins in {of_degree['longer_wins']:.1%}{margin}"
        )


def _show_columns(console: Console, usage: dict[str, Any]) -> None:
    read = ", ".join(f"{name} ({', '.join(keys)})" for name, keys in usage["read"].items())
    for kind, names in (("not read", usage["not_read"]), ("optional and not there", usage["left_out"])):
        read += f"; {kind}: {', '.join(names)}" if names else ""
    console.print(f"[bold]columns[/bold] read: {escape(read)}")


def _split_table(splits: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    learned = any(facts["rows"] > facts["untrained"] for facts in splits.values())  # a linear head learns no token
    trained = ("end token trained", "no trained token") if learned else ()
    for name in ("split", "rows", "begin tokens a row", *trained, "longest"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, facts in splits.items():
        begins = ", ".join(f"{n}" for n in facts["begin_tokens"]) or "-"
        longest = str(facts["all_tokens"].get("100", "-"))
        rows = facts["rows"]
        ends = (f"{facts['ends_trained']:,}", str(facts["untrained"])) if learned else ()
        table.add_row(split, f"{rows:,}", begins, *ends, longest)
    return table


def _show_lengths(console: Console, limits: dict[str, Any]) -> None:
    largest = max((count for *_, count in limits["histogram"]), default=1)
    title = (
        f"tokens of the training rows before the limits; data.max_tokens={limits['max_tokens']} cuts "
        f"{limits['rows_cut']} and drops {limits['rows_dropped']} "
        f"({limits['answer_share_dropped']:.1%} of all answer tokens); "
        f"data.max_tokens={limits['cuts_one_percent']} would cut only 1% of the rows"
    )
    console.print(title)
    table = Table(box=None, show_header=False)
    for start, stop, count in limits["histogram"]:
        colour = "red" if start > limits["max_tokens"] else "cyan"
        table.add_row(f"{start}-{stop}", f"{count:,}", f"[{colour}]{'█' * round(40 * count / largest)}[/{colour}]")
    for name, values in limits["uncut"].items():
        table.add_row(name, "", "  ".join(f"{p}%: {value}" for p, value in values.items()))
    console.print(table)


def _show_findings(console: Console, findings: Sequence[dict[str, str]]) -> None:
    console.print()
    for finding in findings:
        colour = "red" if finding["level"] == "error" else "yellow"
        message = finding["message"]
        console.print(f"[{colour}]{finding['level']}[/{colour}] {escape(finding['key'])}: {escape(message)}")
    if not findings:
        console.print("[green]no problems found[/green]")
