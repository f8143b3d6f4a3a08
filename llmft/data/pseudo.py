"""Predicted rows to train on as if their targets were true, and never one that is held out."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.convert import canonical
from llmft.config.sections import DataConfig, Head, TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.messages import text_of
from llmft.data.sources import BadRows, Row, named_columns, read_files, with_nested
from llmft.data.targets import Target
from llmft.runs.predictions import TEXT, Predictions


@dataclass
class PseudoLabels:
    """Rows to add to the training rows, and what became of the others.

    Attributes:
        offered, used: rows in the file, and rows taken.
        held_out: rows left out because their content or group is in validation or test.
        repeated: rows left out because their content is trained on already.
        unsure: rows left out by data.pseudo_min_confidence.
        over_cap: rows left out by data.pseudo_max_per_class.
        classes: rows taken, by class.
        fingerprint: of the rows taken, their targets and their weight; empty without data.pseudo.
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
        """All but the rows themselves."""
        return {
            name: value for name, value in asdict(replace(self, conversations=[])).items() if name != "conversations"
        }


def content_of(conversation: Conversation) -> str:
    """What is asked in a row, without the answer: rows that are alike in this must be on one side of a split."""
    messages = list(conversation.messages)
    if conversation.learns_text and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return canonical([" ".join(text.split()) for message in messages for text in (message["role"], text_of(message))])


def add_pseudo(
    data: DataConfig, columns: ColumnMap, train: Sequence[Conversation], held: Sequence[Conversation]
) -> PseudoLabels:
    """The rows of data.pseudo that may be trained on beside `train`, when `held` are held out.

    Raises ConfigError or DataError where the file is missing, or is not for these classes and columns.
    """
    if data.pseudo is None:
        return PseudoLabels()
    if columns.targets is None:
        raise ConfigError("data.pseudo is for tasks with a head, such as task=classification.")
    offered, sources = _offered(data, columns)
    made = PseudoLabels(offered=len(offered), sources=sources)
    contents, groups = {content_of(row) for row in held}, {row.group for row in held} - {None}
    trained = {content_of(row) for row in train}
    by_class: dict[str, list[tuple[float, int, Conversation]]] = defaultdict(list)
    for place, (row, sure) in enumerate(offered):
        if data.group and row.group is None:
            raise DataError(f"data.pseudo: {row.where} has no column '{data.group}' (data.group), so nothing tells "
                            "whether it is held out.")  # fmt: skip
        content = content_of(row)
        if content in contents or row.group in groups:
            made.held_out += 1
        elif content in trained:
            made.repeated += 1
        elif sure < data.pseudo_min_confidence:
            made.unsure += 1
        else:
            trained.add(content)
            by_class[str(columns.targets.name(row.target))].append((-sure, place, row))
    kept: list[tuple[int, Conversation]] = []
    capped = columns.targets.problem is not TaskType.regression
    for rows in by_class.values():
        cap = data.pseudo_max_per_class if capped and data.pseudo_max_per_class is not None else len(rows)
        rows.sort(key=lambda row: row[:2])
        made.over_cap += len(rows[cap:])
        kept += [(place, row) for _, place, row in rows[:cap]]
    made.conversations = [
        replace(row, id=f"pseudo:{row.id}", weight=data.pseudo_weight) for _, row in sorted(kept, key=lambda k: k[0])
    ]
    made.used = len(made.conversations)
    if capped:
        made.classes = dict(sorted(Counter(str(columns.targets.name(row.target)) for _, row in kept).items()))
    taken = [[row.messages, row.target, row.weight] for row in made.conversations]
    made.fingerprint = hashlib.sha256(canonical(taken).encode()).hexdigest()
    return made


def _offered(data: DataConfig, columns: ColumnMap) -> tuple[list[tuple[Conversation, float]], list[dict[str, Any]]]:
    """Every row of data.pseudo with its target and how sure it is."""
    path = Path(str(data.pseudo)).expanduser()
    folder = path.parent if path.name.startswith("predictions.") else path
    if (folder / "predictions.json").is_file():
        return _predicted(folder, data, columns)
    if data.pseudo_rows:
        raise ConfigError(f"data.pseudo_rows goes with a directory of predictions; {data.pseudo} has its own rows.")
    rows = _read(data.pseudo, "data.pseudo", data)
    problems = BadRows()
    sure = [_confidence(row) for row in rows]
    named = columns.id if all(columns.id in row.values for row in rows) else None
    return list(zip(replace(columns, id=named).conversations(rows, problems), sure, strict=True)), []


def _predicted(
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
    files = data.pseudo_rows or predictions.facts.get("files")
    if not files:
        raise ConfigError(f"data.pseudo={folder} does not say which files it is for: set data.pseudo_rows to them.")
    rows = _read(files, "data.pseudo_rows", data)
    opened = replace(columns, lenient=True, id=predictions.facts.get("id_column"))
    conversations = opened.conversations(rows, BadRows())
    asked = {row.id: row for row in conversations}
    if len(asked) < len(conversations):
        raise DataError(f"data.pseudo_rows={files}: two rows have one id in '{opened.id}'.")
    missing = [name for name in predictions.ids if name not in asked]
    if missing:
        raise DataError(
            f"data.pseudo={folder}: the row {missing[0]} is not in {files}; set data.pseudo_rows to the files that "
            "were predicted."
        )
    made = []
    for name, values in zip(predictions.ids, predictions.values, strict=True):
        target, sure = _guess(values, targets.problem)
        row = asked[name]
        if columns.head is Head.tokens:
            messages = [*row.messages[:-1], {"role": "assistant", "content": targets.words[int(target)]}]  # type: ignore[arg-type]
            row = replace(row, messages=messages)
        made.append((replace(row, target=target), sure))
    return made, list(predictions.facts.get("sources", []))


def _guess(values: np.ndarray, problem: TaskType) -> tuple[Target, float]:
    """The target that a prediction takes for true, and its probability (of several classes, the least sure one's)."""
    if problem is TaskType.regression:
        return float(values[0]), 1.0
    if problem is TaskType.multi_label:
        return tuple(int(value >= 0.5) for value in values), float(np.maximum(values, 1 - values).min())
    place = int(values.argmax())
    return place, float(values[place])


def _confidence(row: Row) -> float:
    given = row.values.get("confidence", 1.0)
    try:
        sure = float(given)
    except (TypeError, ValueError):
        raise DataError(f"{row.where}: its confidence '{given}' is no number.") from None
    if not 0 <= sure <= 1:
        raise DataError(f"{row.where}: its confidence '{given}' is no probability, 0 to 1.")
    return sure


def _read(named: Any, key: str, data: DataConfig) -> list[Row]:
    rows = read_files(named, key, BadRows(), data.csv_columns).rows
    return with_nested(rows, chain.from_iterable(named_columns(data).values()))
