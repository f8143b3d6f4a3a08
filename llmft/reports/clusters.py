"""A 2D map of validation rows by the words of their prompts, to show which kinds of rows a model gets wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from llmft.core.redaction import redact
from llmft.reports.configurations import Study
from llmft.reports.figures import Figure, Point, scatter
from llmft.reports.svg import SERIES, clip

FEWEST, MOST = 8, 400


def text_clusters(study: Study) -> Figure | None:
    """A figure of the best configuration's sampled validation rows; None if they are too few or have the same words.

    TF-IDF of words and bigrams, without those in nearly all rows, then the first two components of a truncated SVD.
    If there are few distinct references, points are coloured by reference; wrong rows are crosses.
    """
    samples = next((s for c in study.configurations for run in c.runs if len(s := run.samples()) >= FEWEST), None)
    if samples is None:
        return None
    samples = [s for s in samples if isinstance(s.get("prompt"), str)][:MOST]
    points_xy = _coordinates([s["prompt"] for s in samples])
    if points_xy is None:
        return None
    classes = Counter(str(s.get("reference", "")).strip() for s in samples)
    known = [name for name, _ in classes.most_common()] if len(classes) <= SERIES else []
    points = [_point(sample, position, known) for sample, position in zip(samples, points_xy, strict=True)]
    wrong = sum(point.wrong for point in points)
    colours = " Colours are references." if known else ""
    note = f"{len(points)} rows of the best configuration, {wrong} wrong (crosses); hover for the text.{colours}"
    title = "Validation rows by their words"
    return scatter(points, title, note, "TF-IDF, two dimensions", names=known)


def _coordinates(texts: list[str]) -> Any:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        words = TfidfVectorizer(ngram_range=(1, 2), max_df=0.95, sublinear_tf=True, max_features=20_000)
        table = words.fit_transform(texts)
    except ValueError:  # no words are left
        return None
    if min(table.shape) < 3:
        return None
    coordinates = TruncatedSVD(2, random_state=0).fit_transform(table)
    return coordinates if np.ptp(coordinates, axis=0).min() > 0 else None


def _point(sample: dict[str, Any], position: Any, known: list[str]) -> Point:
    reference, output = str(sample.get("reference", "")).strip(), str(sample.get("generated", "")).strip()
    wrong = reference != output
    style = f"s{known.index(reference)}" if known else "s1" if wrong else "s0"
    words = clip(str(sample["prompt"])[-240:], 240)
    tip = redact(f"{sample.get('where', '')}: {words} | reference: {clip(reference, 80)} | answer: {clip(output, 80)}")
    return Point(float(position[0]), float(position[1]), tip, style, wrong)
