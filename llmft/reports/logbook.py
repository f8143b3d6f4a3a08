"""`outputs/LOGBOOK.md`: an entry per sweep, newest first, in the order question, setup, result, verdict.

The logbook is never edited but made anew from the `entry.md` in each sweep's directory, so that it loses nothing when
it is deleted or when two sweeps end at once. What a person wants to say goes into `sweep.question` and `notes`.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from llmft.core.files import write_atomically
from llmft.reports.configurations import Study
from llmft.reports.tables import spread_of
from llmft.reports.verdicts import number, sentence

if TYPE_CHECKING:
    from llmft.reports.write import Report

ENTRY = "entry.md"
MOST_LINES = 12
HEAD = """# Logbook

One entry per sweep, newest first. Written by llmft from the sweeps' directories: what is changed here is lost;
questions and notes belong into `sweep.question=` and `notes=`.
"""
_STAMP = re.compile(r"^<!-- sweep: (.*?) -->$", re.M)


def entry(report: Report, root: Path) -> str:
    """A sweep's entry in Markdown, for a logbook in `root`."""
    study, board, created = report.study, report.board, report.study.created or ""
    parts = [f"<!-- sweep: {re.sub(r'[^0-9A-Za-z :.T+-]', '', created).replace('--', '-')} -->"]
    parts.append(f"## {_line(study.title)}" + (f" ({_line(created)})" if created else ""))
    parts.append(f"**Question.** {_line(study.question or study.notes or 'none was asked (`sweep.question=`)')}")
    if study.question and study.notes:
        parts.append(f"**Notes.** {_line(study.notes)}")
    parts.append(f"**Setup.** {setup(study)}")
    lines = [
        f"- {_line(line.name)}: {study.monitor} {number(line.mean)} (sd {spread_of(line)}, {line.replications})"
        + "".join(f", {n.removeprefix('val/')} {number(v)}" for n, v in line.other_metrics.items() if "val/" in n)
        for line in board[:MOST_LINES]
    ]
    lines += [f"- and {len(board) - MOST_LINES} more"] if len(board) > MOST_LINES else []
    parts.append("**Result.**\n\n" + "\n".join(lines) if lines else "**Result.** No run finished with a result.")
    if study.failures:
        causes = "; ".join(f"{f.name} ({f.status}: {f.cause})" for f in study.failures[:5])
        parts.append(f"{len(study.failures)} trials without a result: {_line(causes)}")
    parts.append(f"**Verdict.** {_line(report.verdicts.answer)}")
    # The best against its next in each family, with the interval: an answer without one invites too much trust.
    families = [family for family in report.verdicts.families if family.comparisons]
    parts += ["\n".join(f"- {_line(sentence(family.comparisons[0]))}" for family in families)] if families else []
    parts += [f"**{name.capitalize()}.** {_line(warning)}" for name, warning in report.warnings.items()]
    parts.append(f"[Report](<{_line(os.path.relpath(report.html, root))}>)")
    return "\n\n".join(parts) + "\n"


def setup(study: Study) -> str:
    """What was varied, and what in all runs differs from the defaults."""
    varied = [f"{key}: {', '.join(study.values_of(key))}" for key in study.keys]
    constant = baseline_difference(study)
    return _line(f"{'; '.join(varied) or 'nothing varied'}." + (f" In all runs: {constant}." if constant else ""))


def baseline_difference(study: Study) -> str:
    """What all runs have in common that the command line set."""
    try:
        commands = [shlex.split(run.command) for run in study.runs]
    except ValueError:
        return ""
    settings = [{w.partition("=")[0]: w for w in words if "=" in w and not w.startswith("-")} for words in commands]
    skipped = {*study.keys, "seed", "data.fold", "data.split_seed", "output_dir", "notes", "tags", "name", "progress"}
    common = [
        word
        for key, word in (settings[0] if settings else {}).items()
        if key not in skipped and not key.startswith(("sweep.", "logger", "hydra."))
        if all(words.get(key) == word for words in settings)
    ]
    return ", ".join(common)


def update_logbook(logbook: Path, sweeps: Path) -> None:
    """Makes `logbook` from the entries of all sweeps below `sweeps`."""
    logbook.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(logbook.with_name(f".{logbook.name}.lock"), timeout=60):
        entries = []
        for path in sorted(sweeps.glob(f"*/{ENTRY}")):
            try:
                text = path.read_text(encoding="utf-8")
            except OSError:
                continue  # a sweep that is being deleted
            stamp = _STAMP.search(text)
            entries.append((stamp[1] if stamp else "", str(path.parent), text.strip()))
        texts = [text for *_, text in sorted(entries, reverse=True)]
        write_atomically(logbook, "\n\n".join([HEAD.strip(), *texts]).encode() + b"\n")


def _line(text: str) -> str:
    """User text as one line that neither opens a heading nor a comment nor HTML."""
    return " ".join(text.split()).replace("<", "&lt;")
