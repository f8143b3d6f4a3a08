"""Judges of answers, functions by dotted path and reward runs, and the combination of their scores."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from llmft.config.instantiate import check_arguments, find
from llmft.core.errors import ConfigError, did_you_mean
from llmft.metrics.rewards import combined

TEXTS = ("prompts", "references", "answers")


@dataclass(frozen=True)
class Judge:
    """A reward: a function of texts, or a reward run.

    Attributes:
        path: the function's dotted path, or the run's directory.
        options: further arguments of the function.
    """

    name: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether a reward run judges."""
        return not _is_dotted(self.path)

    def scores(self, prompts: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> list[float]:
        """A finite number for each row, by a judge that is a function. Raises ConfigError for other results."""
        function = find(self.path, f"judge.{self.name}", "reward")
        takes = inspect.signature(function).parameters
        texts = {"prompts": list(prompts), "references": list(references), "answers": list(answers)}
        columns = {name: value for name, value in texts.items() if name in takes}
        try:
            scores = [float(value) for value in function(**columns, **self.options)]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"judge.{self.name}={self.path}: {error}.") from None
        if len(scores) != len(answers) or not np.isfinite(scores).all():
            raise ConfigError(
                f"judge.{self.name}={self.path}: a finite number for each of {len(answers)} rows was expected."
            )
        return scores


def _is_dotted(path: str) -> bool:
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path) is not None and not Path(path).expanduser().exists()


def judges_of(value: Any, key: str = "judge") -> list[Judge]:
    """The judges that a config names: a path, a list of paths, or a dictionary of paths by name.

    A path may also be a dictionary, {function: PATH, option: value}. In a list a function has its own name, a run
    judge1, judge2, ….

    Raises ConfigError for functions, options or directories that cannot be used.
    """
    if value is None or value == []:
        return []
    single = isinstance(value, Mapping) and "function" in value
    items = [value] if isinstance(value, str) or single else value
    named = items.items() if isinstance(items, Mapping) else ((None, item) for item in items)
    judges: list[Judge] = []
    for number, (name, item) in enumerate(named, start=1):
        options = dict(item) if isinstance(item, Mapping) else {"function": item}
        path = str(options.pop("function", ""))
        default = path.rpartition(".")[2] if _is_dotted(path) else f"judge{number}"
        judges.append(_checked(Judge(str(name or default), path, options), key))
    names = [judge.name for judge in judges]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{key}: two judges are called {twice}; name them: {key}={{first: …, second: …}}.")
    return judges


def _checked(judge: Judge, key: str) -> Judge:
    if not judge.is_run:
        check_arguments(find(judge.path, f"{key}.{judge.name}", "reward"), judge.path, dict(judge.options), key)
        wrong = next((name for name in judge.options if name in TEXTS), None)
        if wrong is not None:
            raise ConfigError(f"{key}.{judge.name}.{wrong}: comes from the rows; leave it out.")
    elif not Path(judge.path).expanduser().is_dir():
        raise ConfigError(f"{key}.{judge.name}={judge.path}: neither the directory of a reward run nor a dotted path.")
    elif judge.options:
        raise ConfigError(f"{key}.{judge.name}: a reward run takes no {next(iter(judge.options))}.")
    return judge


def check_combination(combine: str | None, judges: Sequence[Judge], key: str = "combine") -> None:
    """Raises ConfigError where `combine` cannot be computed from these judges, or is missing for several."""
    if judges:
        combine_scores(combine, judges, {judge.name: [0.25, 0.75] for judge in judges}, key)


def combine_scores(
    combine: str | None, judges: Sequence[Judge], scores: Mapping[str, Sequence[float]], key: str = "combine"
) -> np.ndarray:
    """(rows,) the combined score of all judges.

    `combine` is an expression of their names, see `llmft.metrics.rewards.combined`, or the dotted path of a function
    that takes them by name, or by position where it has none of the names. A function with the attribute
    `takes_probabilities` gets the sigmoid of a reward run's score.
    """
    if combine is None:
        if len(scores) > 1:
            raise ConfigError(
                f'{key}: {len(scores)} judges; set how they are combined, such as {key}="{" + ".join(scores)}".'
            )
        return np.asarray(next(iter(scores.values())), np.float64)
    if not _is_dotted(combine):
        return combined(combine, scores, key)
    function = find(combine, key, "combination")
    takes = inspect.signature(function).parameters
    probabilities = getattr(function, "takes_probabilities", False)
    values = {
        judge.name: expit(scores[judge.name]) if probabilities and judge.is_run else np.asarray(scores[judge.name])
        for judge in judges
    }
    known = [name for name in values if name in takes]
    if known and len(known) < len(values):
        unknown = next(name for name in values if name not in takes)
        raise ConfigError(f"{key}={combine}: takes no judge called {unknown}{did_you_mean(unknown, list(takes))}")
    try:
        return np.asarray(function(**values) if known else function(*values.values()), np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={combine}: {error}.") from None
