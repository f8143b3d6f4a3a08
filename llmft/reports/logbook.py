"""`outputs/LOGBOOK.md`: an entry per sweep, newest first, in the order question, setup, result, verdict.

The logbook is never edited but made anew from the `entry.md` in each sweep's directory, so that it loses nothing when
it is deleted or when two sweeps end at once. What a person wants to say goes into `sweep.question` and `notes`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import filelock

from llmft.core.files import write_atomically
from llmft.reports.configurations import Study, sorted_values
from llmft.reports.tables import Standing, number, spread_of
from llmft.reports.verdicts import Verdicts, sentence

ENTRY = "entry.md"
HEAD = """# Logbook

One entry per sweep, newest first. Written by llmft from the sweeps' directories: what is changed here is lost;
questions and notes belong into `sweep.question=` and `notes=`.
"""
_STAMP = re.compile(r"^<!-- sweep: (.*?) -->$", re.M)


def entry(
    study: Study,
    verdicts: Verdicts,
    board: Sequence[Standing],
    directory: Path,
    root: Path,
    warnings: Mapping[str, str] | None = None,
) -> str:
    """A sweep's entry in Markdown, for a logbook in `root`; `warnings` by what they are about."""
    created = study.created or ""
    parts = [
        f"<!-- sweep: {_safe(created)} -->",
        f"## {_line(study.title)}" + (f" ({_line(created)})" if created else ""),
    ]
    question = study.question or study.notes or "none was asked (`sweep.question=`)"
    parts.append(f"**Question.** {_line(question)}")
    if study.question and study.notes:
        parts.append(f"**Notes.** {_line(study.notes)}")
    parts.append(f"**Setup.** {setup(study)}")
    if board:
        lines = [
            f"- {_line(line.name)}: {study.monitor} {number(line.mean)} (sd {spread_of(line)}, {line.replications})"
            + "".join(f", {n.removeprefix('val/')} {number(v)}" for n, v in line.other_metrics.items() if "val/" in n)
            for line in board[:12]
        ]
        lines += [f"- and {len(board) - 12} more"] if len(board) > 12 else []
        parts.append("**Result.**\n\n" + "\n".join(lines))
    else:
        parts.append("**Result.** No run finished with a result.")
    if study.failures:
        parts.append(f"{len(study.failures)} trials without a result: {_line('; '.join(_failures(study)))}")
    parts.append(f"**Verdict.** {_line(verdicts.answer)}")
    # The best against its next in each family, with the interval: an answer without one invites too much trust.
    told = [f"- {_line(sentence(family.comparisons[0]))}" for family in verdicts.families if family.comparisons]
    parts += ["\n".join(told)] if told else []
    parts += [f"**{name.capitalize()}.** {_line(warning)}" for name, warning in (warnings or {}).items()]
    place = os.path.relpath(directory / "report.html", root)
    parts.append(f"[Report](<{_line(place)}>)")
    return "\n\n".join(parts) + "\n"


def setup(study: Study) -> str:
    """What was varied, and what in all runs differs from the defaults."""
    found = [f"{key}: {', '.join(sorted_values({c.values[key] for c in study.configurations}))}" for key in study.keys]
    varied = "; ".join(found) if found else "nothing varied"
    constant = baseline_difference(study)
    return _line(f"{varied}." + (f" In all runs: {constant}." if constant else ""))


def baseline_difference(study: Study) -> str:
    """What all runs have in common that the command line set."""
    import shlex

    given = []
    for run in study.runs:
        try:
            words = shlex.split(run.command)
        except ValueError:
            return ""
        given.append({w.partition("=")[0]: w for w in words if "=" in w and not w.startswith("-")})
    if not given:
        return ""
    skipped = {*study.keys, "seed", "data.fold", "data.split_seed", "output_dir", "notes", "tags", "name", "progress"}
    common = []
    for key, word in given[0].items():
        same = all(words.get(key) == word for words in given)
        if same and key not in skipped and not key.startswith(("sweep.", "logger", "hydra.")):
            common.append(word)
    return ", ".join(common)


def _failures(study: Study) -> list[str]:
    return [f"{f.name} ({f.status}: {f.cause})" for f in study.failures[:5]]


def update_logbook(logbook: Path, sweeps: Path) -> None:
    """Makes `logbook` from the entries of all sweeps below `sweeps`."""
    logbook.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(logbook.with_name(f".{logbook.name}.lock"), timeout=60):
        found = []
        for path in sorted(sweeps.glob(f"*/{ENTRY}")):
            try:
                text = path.read_text(encoding="utf-8")
            except OSError:
                continue  # a sweep that is being deleted
            stamp = _STAMP.search(text)
            found.append((stamp[1] if stamp else "", str(path.parent), text.strip()))
        found.sort(key=lambda item: (item[0], item[1]), reverse=True)
        write_atomically(logbook, "\n\n".join([HEAD.strip(), *(text for *_, text in found)]).encode() + b"\n")


def _line(text: str) -> str:
    """User text as one line that neither opens a heading nor a comment nor HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _safe(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z :.T+-]", "", text).replace("--", "-")
