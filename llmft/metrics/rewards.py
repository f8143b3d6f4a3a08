"""Rewards: a number for each answer, higher for a better one, and combinations of several.

A reward is a function of any of `prompts`, `references` and `answers` (lists of texts, a row each) that returns a float
for each row; the config sets its further arguments. None of them runs code that a model wrote.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from llmft.core.errors import ConfigError, did_you_mean
from llmft.metrics import higher_is_better

THRESHOLD = 0.15
"""Less safe answers are scored by their safety only (Llama 2, arXiv:2307.09288, section 3.2.3)."""
Numbers = Sequence[float] | np.ndarray


def llama2(
    safety: Numbers, helpful: Numbers, adversarial: Numbers | None = None, threshold: float = THRESHOLD
) -> np.ndarray:
    """(rows,) safety where the prompt is adversarial or safety is below `threshold`, else helpfulness.

    Both are probabilities, 0 to 1; an answer at the threshold passes. An unsafe answer gains nothing by being helpful.
    """
    safe, help_ = np.asarray(safety, np.float64), np.asarray(helpful, np.float64)
    attacked = np.zeros(safe.shape, bool) if adversarial is None else np.asarray(adversarial, np.float64) > 0
    return np.where(attacked | (safe < threshold), safe, help_)


llama2.takes_probabilities = True  # type: ignore[attr-defined]


def logit(probabilities: Numbers) -> np.ndarray:
    """ln(p / (1 - p)) of probabilities; exactly 0 and 1 are replaced by the nearest floats between them."""
    edges = np.finfo(np.float64)
    return np.asarray(special.logit(np.clip(probabilities, edges.tiny, 1 - edges.epsneg)))


def whiten(values: Numbers) -> np.ndarray:
    """Values less their mean, over their population standard deviation; all 0 where they do not differ."""
    numbers = np.asarray(values, np.float64)
    spread = numbers.std()
    return (numbers - numbers.mean()) / spread if spread > 0 else np.zeros_like(numbers)


# ------------------------------------------------------------------------------------------------- verifiable rewards


def exact_answer(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where an answer is its reference, up to white space at both ends, else 0."""
    return [float(r.strip() == a.strip()) for r, a in zip(references, answers, strict=True)]


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where the last number in an answer equals the last one in its reference, else 0 (GSM8K's rule)."""
    pairs = [[_NUMBER.findall(text)[-1:] for text in (r, a)] for r, a in zip(references, answers, strict=True)]
    return [float(bool(r) and bool(a) and _value(r[0]) == _value(a[0])) for r, a in pairs]


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def matches(answers: Sequence[str], pattern: str = r"\S", absent: bool = False) -> list[float]:
    """1 where the regular expression `pattern` occurs in an answer, else 0; inverted with `absent`."""
    regex = _compiled(pattern)
    return [float((regex.search(answer) is None) == absent) for answer in answers]


def repeats(prompts: Sequence[str], answers: Sequence[str], pattern: str) -> list[float]:
    """1 where the first match of `pattern` in a prompt also occurs in its answer, else 0."""
    regex = _compiled(pattern)
    wanted = [regex.search(prompt) for prompt in prompts]
    return [float(match is not None and match[0] in answer) for match, answer in zip(wanted, answers, strict=True)]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern={pattern!r} is not a regular expression ({error}).") from None


def length(answers: Sequence[str], target: int = 0, unit: str = "words") -> list[float]:
    """Minus the difference between an answer's length and `target`, in words, or characters with unit=characters."""
    sizes = [len(answer.split()) if unit == "words" else len(answer) for answer in answers]
    return [-float(abs(size - target)) for size in sizes]


def python_code(answers: Sequence[str]) -> list[float]:
    """1 where an answer, or the code block in it, is Python that parses, else 0. It is not run."""
    return [float(_parses(answer)) for answer in answers]


def _parses(answer: str) -> bool:
    block = re.search(r"```(?:python|py)?\n(.*?)```", answer, re.DOTALL)
    code = block[1] if block else answer
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(code.strip())


# --------------------------------------------------------------------------------------------------------- combinations

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": lambda *parts: np.minimum.reduce(np.broadcast_arrays(*parts)),
    "max": lambda *parts: np.maximum.reduce(np.broadcast_arrays(*parts)),
    "logit": logit,
    "sigmoid": special.expit,
    "whiten": whiten,
    "llama2": llama2,
}


def combined(expression: str, scores: Mapping[str, Numbers], key: str = "combine") -> np.ndarray:
    """(rows,) the value of an expression of judges' scores, such as "whiten(llama2(safety, helpful)) - 0.1*long".

    It may have numbers, judges' names, + - * / and the functions min, max, logit, sigmoid, whiten, llama2.

    Raises ConfigError for anything else.
    """
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        raise ConfigError(f"{key}={expression}: not an expression such as safety + 0.5 * helpful.") from None
    columns = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    rows = len(next(iter(columns.values())))
    return np.broadcast_to(np.asarray(_value_of(tree, columns, f"{key}={expression}"), np.float64), (rows,)).copy()


def _value_of(node: ast.AST, columns: Mapping[str, np.ndarray], key: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.Name):
        if node.id not in columns:
            raise ConfigError(f"{key}: no judge is called {node.id}{did_you_mean(node.id, list(columns))}")
        return columns[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value_of(node.operand, columns, key)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value_of(node.left, columns, key), _value_of(node.right, columns, key))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if node.keywords:
            raise ConfigError(f"{key}: {node.func.id} takes positional arguments only.")
        arguments = [_value_of(argument, columns, key) for argument in node.args]
        try:
            return _FUNCTIONS[node.func.id](*arguments)
        except TypeError as error:
            raise ConfigError(f"{key}: {error}.") from None
    raise ConfigError(f"{key}: only numbers, judges' names, + - * / and {', '.join(_FUNCTIONS)} are allowed.")


# ------------------------------------------------------------------------------------------------------------ best of n


@higher_is_better
def mean_reward(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The mean reward of generations by the task's judges; computed by the task itself."""
    raise NotImplementedError("a task with judges computes it")


def expected_best(scores: Sequence[float]) -> list[float]:
    """The expected highest score of n of N scored answers, drawn without replacement, for n = 1, …, N; unbiased.

    The k-th of the sorted scores s_1 <= … <= s_N is the highest of n in C(k-1, n-1) of C(N, n) draws (the estimator of
    pass@k, arXiv:2107.03374, for any score).
    """
    descending = np.sort(np.asarray(scores, np.float64))[::-1]
    total = len(descending)
    ranks, drawn = np.arange(total, 1, -1), np.arange(1, total + 1)[:, None]
    # C(k-1, n-1) / C(N, n), from k = N, where it is n/N, downwards
    ratios = np.maximum(ranks - drawn, 0) / (ranks - 1)
    weights = np.cumprod(np.concatenate([drawn / total, ratios], axis=1), axis=1)
    return (weights @ descending).tolist()  # type: ignore[no-any-return]
