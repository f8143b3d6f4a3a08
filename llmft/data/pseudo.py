"""Pseudo-labels: predicted rows that are trained on as if their targets were true. Held-out rows are never used."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.convert import canonical, digest_of
from llmft.config.data import DataConfig
from llmft.config.task import Head, TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.messages import message_text
from llmft.data.readers import BadRows, Row
from llmft.data.sources import named_columns, read_files, with_nested
from llmft.data.targets import Target
from llmft.runs.predictions import TEXT, Predictions


@dataclass
class PseudoLabels:
    """Rows to add to the training rows, and counts of the others.

    Attributes:
        offered, used: number of rows in the file, and of rows used.
        held_out: rows left out because their content or group is in validation or test.
        repeated: rows left out because their content is already a training row.
        unsure: rows left out by data.pseudo_min_confidence.
        over_cap: rows left out by data.pseudo_max_per_class.
        classes: rows used, by class.
        fingerprint: of the rows used, their targets and weights; empty without data.pseudo.
    """

    conversations: list[Conversation] = field(default_factory=list)
    offered: int = 0
    used: int = 0
    held_out: int = 0
    repeated: int = 0
    unsure: int = 0
    over_cap: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    sources: list[dict[str, Any]] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """All fields but the rows."""
        return {name: value for name, value in vars(self).items() if name != "conversations"}


def prompt_content(conversation: Conversation) -> str:
    """A row's messages without the answer; rows that agree in this must be on the same side of a split."""
    messages = list(conversation.messages)
    if conversation.learns_text and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    texts = [text for message in messages for text in (message["role"], message_text(message))]
    return canonical([" ".join(text.split()) for text in texts])


def add_pseudo(
    data: DataConfig, columns: ColumnMap, train: Sequence[Conversation], held_out: Sequence[Conversation]
) -> PseudoLabels:
    """The rows of data.pseudo to train on in addition to `train`, none of which is in `held_out`.

    Raises ConfigError or DataError for a missing file, or one with other classes or columns.
    """
    if data.pseudo is None:
        return PseudoLabels()
    if columns.targets is None:
        raise ConfigError("data.pseudo is for tasks with a head, such as task=classification.")
    candidates, sources = _candidates(data, columns)
    result = PseudoLabels(offered=len(candidates), sources=sources)
    contents, groups = {prompt_content(row) for row in held_out}, {row.group for row in held_out} - {None}
    trained = {prompt_content(row) for row in train}
    by_class: dict[str, list[tuple[float, int, Conversation]]] = defaultdict(list)
    for index, (row, confidence) in enumerate(candidates):
        if data.group and row.group is None:
            raise DataError(f"data.pseudo: {row.where} has no column '{data.group}' (data.group), so it may be "
                            "a held-out row.")  # fmt: skip
        content = prompt_content(row)
        if content in contents or row.group in groups:
            result.held_out += 1
        elif content in trained:
            result.repeated += 1
        elif confidence < data.pseudo_min_confidence:
            result.unsure += 1
        else:
            trained.add(content)
            by_class[str(columns.targets.name(row.target))].append((-confidence, index, row))
    accepted: dict[int, Conversation] = {}
    has_classes = columns.targets.problem is not TaskType.regression
    for rows in by_class.values():
        cap = data.pseudo_max_per_class if has_classes else None
        rows = sorted(rows, key=lambda row: row[:2])[:cap]
        accepted |= {index: row for _, index, row in rows}
    result.over_cap = sum(map(len, by_class.values())) - len(accepted)
    result.conversations = [
        replace(row, id=f"pseudo:{row.id}", weight=data.pseudo_weight) for _, row in sorted(accepted.items())
    ]
    result.used = len(accepted)
    if has_classes:
        classes = Counter(str(columns.targets.name(row.target)) for row in accepted.values())
        result.classes = dict(sorted(classes.items()))
    result.fingerprint = digest_of([[row.messages, row.target, row.weight] for row in result.conversations])
    return result


def _candidates(data: DataConfig, columns: ColumnMap) -> tuple[list[tuple[Conversation, float]], list[dict[str, Any]]]:
    """Every row of data.pseudo with its target and confidence, and the runs that predicted them."""
    path = Path(str(data.pseudo)).expanduser()
    folder = path.parent if path.name.startswith("predictions.") else path
    if (folder / "predictions.json").is_file():
        return _from_predictions(folder, data, columns)
    if data.pseudo_rows:
        raise ConfigError(f"data.pseudo_rows is for a directory of predictions; {data.pseudo} has its own rows.")
    rows = _read(data.pseudo, "data.pseudo", data)
    problems = BadRows()
    confidences = [_confidence(row) for row in rows]
    id_column = columns.id if all(columns.id in row.values for row in rows) else None
    return list(zip(replace(columns, id=id_column).conversations(rows, problems), confidences, strict=True)), []


def _from_predictions(
    folder: Path, data: DataConfig, columns: ColumnMap
) -> tuple[list[tuple[Conversation, float]], list[dict[str, Any]]]:
    predictions = Predictions.load(folder)
    targets = columns.targets
    assert targets is not None
    if predictions.problem == TEXT or predictions.problem != targets.problem.value:
        raise ConfigError(f"data.pseudo={folder}: predictions of {predictions.problem}, not {targets.problem.value}.")
    if predictions.labels != targets.labels and targets.problem is not TaskType.regression:
        raise ConfigError(
            f"data.pseudo={folder}: its classes are {', '.join(predictions.labels[:8])}, this run's "
            f"{', '.join(targets.labels[:8])}; they must be the same in the same order."
        )
    files = data.pseudo_rows or predictions.provenance.get("files")
    if not files:
        raise ConfigError(f"data.pseudo={folder} does not name the files it is for: set data.pseudo_rows to them.")
    rows = _read(files, "data.pseudo_rows", data)
    lenient_columns = replace(columns, lenient=True, id=predictions.provenance.get("id_column"))
    conversations = lenient_columns.conversations(rows, BadRows())
    row_by_id = {row.id: row for row in conversations}
    if len(row_by_id) < len(conversations):
        raise DataError(f"data.pseudo_rows={files}: two rows have one id in '{lenient_columns.id}'.")
    missing = [row_id for row_id in predictions.ids if row_id not in row_by_id]
    if missing:
        raise DataError(
            f"data.pseudo={folder}: the row {missing[0]} is not in {files}; name its file: data.pseudo_rows."
        )
    rows_with_target = []
    for row_id, values in zip(predictions.ids, predictions.values, strict=True):
        target, confidence = _guess(values, targets.problem)
        row = row_by_id[row_id]
        if columns.task.head is Head.tokens:
            messages = [*row.messages[:-1], {"role": "assistant", "content": targets.words[int(target)]}]  # type: ignore[arg-type]
            row = replace(row, messages=messages)
        rows_with_target.append((replace(row, target=target), confidence))
    return rows_with_target, list(predictions.provenance.get("sources", []))


def _guess(values: np.ndarray, problem: TaskType) -> tuple[Target, float]:
    """A prediction's target and its confidence (with several classes, that of the least certain one)."""
    if problem is TaskType.regression:
        return float(values[0]), 1.0
    if problem is TaskType.multi_label:
        return tuple(int(value >= 0.5) for value in values), float(np.maximum(values, 1 - values).min())
    index = int(values.argmax())
    return index, float(values[index])


def _confidence(row: Row) -> float:
    value = row.values.get("confidence", 1.0)
    try:
        confidence = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{row.where}: its confidence '{value}' is not a number.") from None
    if not 0 <= confidence <= 1:
        raise DataError(f"{row.where}: its confidence '{value}' is not a probability, 0 to 1.")
    return confidence


def _read(files: Any, key: str, data: DataConfig) -> list[Row]:
    rows = read_files(files, key, BadRows(), data.csv_columns).rows
    return with_nested(rows, chain.from_iterable(named_columns(data).values()))
