"""Prints the report of `python -m llmft.check` from the plain data of `llmft.checks.preflight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmft.checks.cards import cells
from llmft.core.console import Screen, text_table
from llmft.core.files import format_bytes

LONG_TEXT, BEGIN, END = 700, 350, 330
"""A segment longer than LONG_TEXT characters is shown as its first BEGIN and last END ones."""
BAR = 40
"""Length of the longest bar in characters."""


def show(report: dict[str, Any], available_hours: float | None = None) -> None:
    """Prints the report; `available_hours` is the time available for the training."""
    screen = Screen()
    screen.print(f"[bold]llmft check[/bold]  {escape(report['model']['name'])}, prompt {report['prompt']['name']}")
    _show_rows(screen, report["rows"])
    screen.print(_split_table(report["splits"]))
    _show_tokens(screen, report["prompt"], report["message_keys"])
    _show_lengths(screen, report["limits"])
    usage = report["columns"]
    read = ", ".join(f"{name} ({', '.join(keys)})" for name, keys in usage["read"].items())
    for kind, names in (("not read", usage["not_read"]), ("optional and missing", usage["left_out"])):
        read += f"; {kind}: {', '.join(names)}" if names else ""
    screen.print(f"[bold]columns[/bold] read: {escape(read)}")
    if report["comparisons"] is not None:
        _show_comparisons(screen, report["comparisons"])
    if report["labels"]:
        total = sum(report["labels"].values())
        shares = "  ".join(f"{escape(name)} {count / total:.1%}" for name, count in report["labels"].items())
        screen.print(f"[bold]answers[/bold]  {shares}")
    _show_needs(screen, report["steps"], report["needs"], available_hours)
    screen.print("")
    for finding in report["findings"]:
        colour = "red" if finding["level"] == "error" else "yellow"
        screen.print(f"[{colour}]{finding['level']}[/{colour}] {escape(finding['key'])}: {escape(finding['message'])}")
    if not report["findings"]:
        screen.print("[green]no problems found[/green]")


def _show_rows(screen: Screen, rows: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Rows as they are trained; learned segments are coloured, or marked by signs without colours."""
    opening, closing = ("", "") if screen.terminal.color_system else ("«", "»")
    for number, segments in enumerate(rows, start=1):
        learned = f"[black on green]{opening}learned{closing}[/black on green]"
        if any("answer" in segment for segment in segments):
            learned = "[black on green]the better answer[/black on green], then [black on red]the others[/black on red]"
        elif "good" in segments[-1]:
            learned = "[black on green]a good answer[/]" if segments[-1]["good"] else "[black on red]a bad answer[/]"
        screen.print(f"\n[bold]row {number}[/bold] as it is trained; {learned}:")
        line = Text()
        for segment in segments:
            text = segment["text"]
            text = text if len(text) < LONG_TEXT else f"{text[:BEGIN]} … {text[-END:]}"
            if not segment["learned"]:
                line.append(text, style="dim")
                continue
            name = f"answer {segment['answer']}: " if "answer" in segment and not screen.terminal.color_system else ""
            colour = "red" if segment.get("answer", 1) > 1 or segment.get("good") is False else "green"
            line.append(f"{opening}{name}{text}{closing}", style=f"black on {colour}")
        screen.print(line)


def _split_table(splits: dict[str, Any]) -> Table:
    learns_tokens = any(split["rows"] > split["untrained"] for split in splits.values())  # a linear head learns none
    of_tokens = ["end token trained", "no trained token"] if learns_tokens else []
    rows = []
    for name, split in splits.items():
        begins = ", ".join(f"{count}" for count in split["begin_tokens"]) or "-"
        ends = [f"{split['ends_trained']:,}", str(split["untrained"])] if learns_tokens else []
        rows.append([name, f"{split['rows']:,}", begins, *ends, str(split["all_tokens"].get("100", "-"))])
    return text_table(["split", "rows", "begin tokens per row", *of_tokens, "longest"], rows)


def _show_tokens(screen: Screen, prompt: dict[str, Any], keys: dict[str, dict[str, int]]) -> None:
    ends, marker = ", ".join(prompt["end_tokens"]), prompt["end_marker"]
    ends += f" or {marker['text']} ({marker['tokens']} tokens, matched as a whole)" if marker else ""
    screen.print(
        f"[bold]tokens[/bold]  pad {escape(str(prompt['pad_token']))} (masked, never learned), answers end with "
        f"{escape(ends)}"
    )
    if keys["read"]:
        read, unused = (", ".join(sorted(keys[kind])) or "none" for kind in ("read", "unused"))
        screen.print(f"[bold]keys of messages[/bold]  read: {escape(read)}; not used: {escape(unused)}")


def _show_lengths(screen: Screen, limits: dict[str, Any]) -> None:
    largest = max((count for *_, count in limits["histogram"]), default=1)
    screen.print(
        f"tokens of the training rows before the limits; data.max_tokens={limits['max_tokens']} cuts "
        f"{limits['rows_cut']} and drops {limits['rows_dropped']} "
        f"({limits['answer_share_dropped']:.1%} of all answer tokens); "
        f"data.max_tokens={limits['cuts_one_percent']} would cut only 1% of the rows"
    )
    table = Table(box=None, show_header=False)
    for start, stop, count in limits["histogram"]:
        colour = "red" if start > limits["max_tokens"] else "cyan"
        table.add_row(f"{start}-{stop}", f"{count:,}", f"[{colour}]{'█' * round(BAR * count / largest)}[/{colour}]")
    for name, values in limits["uncut"].items():
        table.add_row(name, "", "  ".join(f"{percent}%: {value}" for percent, value in values.items()))
    screen.print(table)


def _show_comparisons(screen: Screen, comparisons: dict[str, Any]) -> None:
    screen.print(
        f"[bold]pairs[/bold]   {comparisons['pairs']:,}: the better answer has {comparisons['chosen_tokens']:.0f} "
        f"tokens, the other {comparisons['rejected_tokens']:.0f}; the longer one is better in "
        f"{comparisons['longer_wins']:.1%}"
    )
    for name, degree in comparisons["degrees"].items():
        margin = f", margin {degree['margin']:.3g}" if degree["margin"] else ""
        wins = f"the longer wins in {degree['longer_wins']:.1%}{margin}"
        screen.print(f"        {escape(name)}: {degree['pairs']:,}, {wins}")


def _show_needs(screen: Screen, steps: dict[str, Any], needs: dict[str, Any], available_hours: float | None) -> None:
    screen.print(
        f"[bold]steps[/bold]  {steps['total']:,} with {steps['batch_rows']} rows each, {steps['tokens']:,} tokens, "
        f"validation every {steps['validate_every']}; computing takes {needs['seconds_at_least']:,.0f} s at least "
        f"on {needs['device']}"
    )
    memory, available = needs["memory"], needs["device_memory"]
    names = ("base", "adapter", "gradients", "optimizer", "activations", "workspace", "libraries")
    parts = ", ".join(f"{name} {format_bytes(memory[name])}" for name in names)
    of = "" if available is None else f" of {format_bytes(available)} on {needs['device']}"
    screen.print(f"[bold]memory[/bold] about {format_bytes(memory['total'])}{of}: {parts}")
    screen.print(f"[bold]step[/bold]   {escape(needs['micro_batch']['summary'])}")
    if needs["cards"]:
        head = ["card", "precision", "cards", "micro-batch", "peak of each", "training"]
        rows = [cells(plan, available_hours) for plan in needs["cards"]]
        title = "on other cards: estimated, not measured"
        screen.print(text_table(head, rows, title, range(len(head))))
    screen.print(f"[bold]disk[/bold]   {format_bytes(needs['disk'])} of {format_bytes(needs['disk_free'])} free")
