"""Targets of a task with a head: one class, several classes, or a number."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmft.config.data import DataConfig
from llmft.config.task import Head, TaskConfig, TaskType
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.data.naming import cell_text, missing_column
from llmft.data.readers import Row

Target = int | float | tuple[int, ...]
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
Fill = Callable[[str, Row], str]


@dataclass
class Targets:
    """The targets of a task.

    Attributes:
        labels: the classes, in the order of all probabilities; one name for a regression.
        words: the word that `task.head=tokens` writes for each class.
        mean, scale: mean and standard deviation of a regression's training targets; the head learns
            (target - mean) / scale.
        prior: the prediction without reading a row: the classes' shares among the training rows, or the mean target.
    """

    problem: TaskType = TaskType.single_label
    labels: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    mean: float = 0.0
    scale: float = 1.0
    prior: list[float] = field(default_factory=list)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Targets:
        """The inverse of `to_plain`; a class may be called anything, also "???"."""
        return cls(**{**plain, "problem": TaskType(plain["problem"])})

    @classmethod
    def of(cls, data: DataConfig, task: TaskConfig, rows: Sequence[Row], fill: Fill) -> Targets:
        """The targets of `data`. Without data.labels, the classes are the sorted targets of `rows`.

        Raises ConfigError if no column contains targets, DataError if there are too few classes.
        """
        column = data.columns.target
        if data.target_columns and task.problem is not TaskType.multi_label:
            raise ConfigError(f"data.target_columns is for task=multi_label, not task.problem={task.problem.value}.")
        if column is None and not data.target_columns:
            raise ConfigError(f"task={task.name} needs targets: set data.columns.target to their column.")
        if task.problem is TaskType.regression:
            return cls(task.problem, [column or "target"])
        targets = cls(task.problem, list(data.labels) or list(data.target_columns))
        first_error = ""
        if not targets.labels:
            names: set[str] = set()
            for row in rows:
                try:
                    names.update(targets.names(row, data, fill))
                except ValueError as error:  # reported with its line when the row itself is read
                    first_error = first_error or f"; {row.where}: {error}"
            are_integers = all(re.fullmatch(r"-?\d+", name) for name in names)  # 10 follows 9
            targets.labels = sorted(names, key=lambda name: (int(name), name)) if are_integers else sorted(names)
        minimum = 1 if task.problem is TaskType.multi_label else 2
        if len(targets.labels) < minimum:
            key = "data.labels" if data.labels else f"data.columns.target={column}"
            raise DataError(f"{key}: {len(targets.labels)} classes, at least {minimum} are needed{first_error}.")
        targets.words = _words(task, targets.labels) if task.head is Head.tokens else []
        return targets

    def names(self, row: Row, data: DataConfig, fill: Fill) -> list[str]:
        """The classes of `row`. Raises ValueError for an invalid value."""
        if data.target_columns:
            return [name for name in data.target_columns if _is_one(row, name)]
        column = data.columns.target or ""
        value = row.values.get(column)
        if self.problem is TaskType.multi_label and isinstance(value, (list, tuple)):
            return [cell_text(name, column) for name in value]
        text = fill(column, row)
        if self.problem is TaskType.single_label:
            if not text.strip():
                raise ValueError(f"the target '{column}' is empty")
            return [text]
        return [name.strip() for name in text.split(data.target_separator) if name.strip()]

    def read(self, row: Row, data: DataConfig, fill: Fill) -> Target:
        """The target of `row`: a class's index, a 0 or 1 for each class, or a number. Raises ValueError."""
        if self.problem is TaskType.regression:
            text = fill(data.columns.target or "", row)
            try:
                number = float(text)
            except ValueError:
                raise ValueError(f"the target '{text}' is not a number") from None
            if not math.isfinite(number):
                raise ValueError(f"the target '{text}' is not finite")
            return number
        names = self.names(row, data, fill)
        for name in names:
            if name not in self.labels:
                raise ValueError(f"target '{name}' is not among the classes{did_you_mean(name, self.labels)}")
        if self.problem is TaskType.multi_label:
            return tuple(int(label in names) for label in self.labels)
        return self.labels.index(names[0])

    def name(self, target: Target | None) -> Any:
        """A target as predictions write it: the class, the classes joined by |, or the number."""
        if target is None or self.problem is TaskType.regression:
            return target
        if isinstance(target, tuple):
            return "|".join(label for label, is_one in zip(self.labels, target, strict=True) if is_one)
        return self.labels[int(target)]


def _is_one(row: Row, name: str) -> bool:
    if name not in row.values:
        raise ValueError(missing_column(name, row.values))
    text = str(row.values[name]).strip().lower()
    if text not in ("0", "0.0", "false", "1", "1.0", "true"):
        raise ValueError(f"column '{name}' of data.target_columns contains '{row.values[name]}', 0 or 1 was expected")
    return text in ("1", "1.0", "true")


def _words(task: TaskConfig, labels: list[str]) -> list[str]:
    """The word of each class. Raises ConfigError unless all are different."""
    if task.words == "letters":
        if len(labels) > len(LETTERS):
            raise ConfigError(f"task.words=letters: {len(labels)} classes, but only {len(LETTERS)} letters and digits.")
        return list(LETTERS[: len(labels)])
    words = labels
    if isinstance(task.words, dict):
        word_of = {str(label): str(word) for label, word in task.words.items()}
        for label in labels:
            if label not in word_of:
                raise ConfigError(f"task.words: no word for the class {label}{did_you_mean(label, word_of)}")
        words = [word_of[label] for label in labels]
    repeated = [word for word, count in Counter(word.strip() for word in words).items() if count > 1 or not word]
    if repeated:
        raise ConfigError(f"task.words: two classes have the word '{repeated[0]}', or it is empty: give each its own.")
    return words


def class_weights(weights_given: Any, labels: Sequence[str], targets: Sequence[Target | None]) -> list[float]:
    """The weight of each class: the given one (default 1), or for `balanced` rows / (classes x rows of the class).

    `balanced` is scikit-learn's rule; a class without training rows has weight 1.

    Raises ConfigError for an unknown class or a weight that is not above 0.
    """
    if weights_given is None:
        return [1.0] * len(labels)
    if weights_given == "balanced":
        counts = Counter(targets)
        present = sum(1 for index in range(len(labels)) if counts[index])
        return [len(targets) / (present * counts[index]) if counts[index] else 1.0 for index in range(len(labels))]
    weights = {str(label): float(weight) for label, weight in weights_given.items()}
    for label, weight in weights.items():
        if label not in labels:
            raise ConfigError(f"task.class_weights.{label}: no such class{did_you_mean(label, labels)}")
        if not weight > 0:
            raise ConfigError(f"task.class_weights.{label}={weight}: must be above 0.")
    return [weights.get(label, 1.0) for label in labels]
