"""Compares external scores, such as those of a competition's leaderboard, with local validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llmft.core.errors import DataError, did_you_mean
from llmft.data.sources import read_table
from llmft.reports.configurations import Study
from llmft.reports.figures import Figure, Point, scatter
from llmft.reports.read import RunRecord
from llmft.reports.verdicts import number

RUN_COLUMNS, SCORE_COLUMNS = ("run", "key", "name"), ("score", "lb", "leaderboard", "public_score")


def read_scores(file: str) -> dict[str, float]:
    """Scores by run from a table with a column `run` (directory's name or key) and a column `score`.

    Raises ConfigError for a missing file, DataError that names the line.
    """
    scores: dict[str, float] = {}
    for row in read_table(file, "lb"):
        cells = {name.strip().lower(): cell for name, cell in row.values.items() if cell is not None}
        run, score = (
            next((cells[name] for name in names if name in cells), None) for names in (RUN_COLUMNS, SCORE_COLUMNS)
        )
        if run is None or score is None:
            has = ", ".join(row.values)
            raise DataError(f"{row.where}: a column `run` and a column `score` are needed; the row has {has}.")
        name = str(run).strip()
        if name in scores:
            raise DataError(f"{row.where}: {name} has a score already.")
        scores[name] = to_score(str(score), row.where)
    return scores


def to_score(text: str, where: str) -> float:
    """`text` as a finite number. Raises DataError that names `where`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: '{text}' is not a number.")
    return value


def match_scores(study: Study, scores: Mapping[str, float]) -> list[tuple[RunRecord, float]]:
    """The runs with a local value named in `scores`: by directory, key, or a unique part of the directory's name.

    Raises DataError for a name that matches no run, or several.
    """
    runs = [run for c in study.configurations for run in c.runs]
    matched = []
    for name, score in scores.items():
        exact = [run for run in runs if name in (run.name, run.key, str(run.directory))]
        hits = exact or [run for run in runs if name in run.name]
        if not hits:
            raise DataError(f"lb.{name}: no such run with a local score{did_you_mean(name, [r.name for r in runs])}")
        if len(hits) > 1:
            raise DataError(
                f"lb.{name}: matches {len(hits)} runs, {', '.join(r.name for r in hits[:3])}: give more of it."
            )
        matched.append((hits[0], score))
    return matched


def against_local(study: Study, scores: Mapping[str, float]) -> Figure | None:
    """A figure of the runs' local values against `scores`; None for fewer than two runs. Raises like `match_scores`."""
    matched = match_scores(study, scores)
    if len(matched) < 2:
        return None
    pairs = [(run.name, run.value(study.monitor) or 0.0, score) for run, score in matched]
    points = [Point(x, y, f"{name}: local {number(x)}, leaderboard {number(y)}") for name, x, y in pairs]
    note = rank_correlation([x for _, x, _ in pairs], [y for *_, y in pairs])
    return scatter(points, "Local validation against leaderboard", note, f"local {study.monitor}", "leaderboard")


def rank_correlation(local: Sequence[float], board: Sequence[float]) -> str:
    from scipy.stats import spearmanr

    if len(set(local)) < 2 or len(set(board)) < 2:
        return f"{len(local)} runs; no rank correlation, since one of the two is constant."
    rho = float(spearmanr(local, board).statistic)
    few = " Too few runs to trust it." if len(local) < 5 else ""
    return f"Rank correlation (Spearman) {rho:.2f} over {len(local)} runs.{few}"
