"""`model=tfidf`: word counts and a linear model (scikit-learn), the baseline that a fine-tuned model has to beat.

Its runs have the directory, record and predictions of any other run, so both are compared and blended alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmft.config.convert import to_plain
from llmft.config.data import TrainOn
from llmft.config.instantiate import metric_functions, reads_text
from llmft.config.sections import TrainConfig
from llmft.config.task import CLASSIFICATION, TaskType
from llmft.config.untrusted import read_json
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, did_you_mean
from llmft.core.files import write_atomically
from llmft.core.machine import describe
from llmft.data.columns import Conversation
from llmft.data.messages import message_text
from llmft.data.targets import Targets
from llmft.metrics import score
from llmft.metrics.prior import row_losses
from llmft.metrics.show import show_summary
from llmft.runs.predictions import FOLDER, PREFIX
from llmft.runs.records import append_line, write_row_losses
from llmft.training.inspection import row_findings
from llmft.training.prepare import RunInputs
from llmft.training.record import predictions_of, result_of, write_records

OPTIONS = {"ngrams": 2, "min_rows": 2, "max_words": 100_000, "c": 10.0}
"""Longest n-gram, fewest rows a word is in, most words kept, and the inverse of the regularization strength."""


class Baseline:
    """TF-IDF (sublinear, unit rows) and a logistic regression; ridge regression for numbers.

    Attributes:
        vocabulary: the column of each word.
        idf: (words,) inverse document frequencies.
        weights, bias: (classes, words) and (classes,) of the linear model.
    """

    def __init__(
        self, targets: Targets, ngrams: int, vocabulary: dict[str, int], idf: Any, weights: Any, bias: Any
    ) -> None:
        self.targets = targets
        self.ngrams = ngrams
        self.vocabulary = vocabulary
        self.idf = np.asarray(idf, dtype=np.float64)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.bias = np.asarray(bias, dtype=np.float64)

    @classmethod
    def fit(cls, rows: Sequence[Conversation], targets: Targets, options: dict[str, Any], seed: int) -> Baseline:
        """Fits `rows`, each with its weight. Raises ConfigError for options that are unknown or leave no words."""
        for name in options:
            if name not in OPTIONS:
                raise ConfigError(f"model.config.{name}: no such option of tfidf{did_you_mean(name, OPTIONS)}")
        chosen = {**OPTIONS, **options}
        least = min(int(chosen["min_rows"]), max(1, len(rows) // 2))
        vectorizer = _vectorizer(int(chosen["ngrams"]), min_df=least, max_features=int(chosen["max_words"]))
        try:
            features = vectorizer.fit_transform([text_of(row) for row in rows])
        except ValueError as error:
            raise ConfigError(f"model=tfidf: no words to learn from ({error}).") from None
        weights, bias = _linear(features, rows, targets, float(chosen["c"]), seed)
        vocabulary = {word: int(index) for word, index in vectorizer.vocabulary_.items()}
        return cls(targets, int(chosen["ngrams"]), vocabulary, vectorizer.idf_, weights, bias)

    def predict(self, rows: Sequence[Conversation]) -> np.ndarray:
        """(rows, classes) probabilities, or (rows, 1) numbers."""
        vectorizer = _vectorizer(self.ngrams, vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf
        scores = vectorizer.transform([text_of(row) for row in rows]) @ self.weights.T + self.bias
        if self.targets.problem is TaskType.regression:
            return scores * self.targets.scale + self.targets.mean
        if self.targets.problem is TaskType.multi_label:
            return 1 / (1 + np.exp(-scores))
        scores -= scores.max(axis=1, keepdims=True)
        return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

    def save(self, directory: Path) -> None:
        """Writes the words as JSON and the numbers as safetensors: formats that run no code when they are opened."""
        from safetensors.numpy import save

        words = {"targets": to_plain(self.targets), "ngrams": self.ngrams, "vocabulary": self.vocabulary}
        write_atomically(directory / "tfidf.json", json.dumps(words, ensure_ascii=False).encode())
        numbers = {"idf": self.idf, "weights": self.weights, "bias": self.bias}
        write_atomically(directory / "model.safetensors", save(numbers))

    @classmethod
    def load(cls, directory: Path) -> Baseline:
        """Reads what `save` wrote; raises ConfigError where it is missing or damaged."""
        from safetensors.numpy import load_file

        try:
            words = read_json(directory / "tfidf.json", 512 * 2**20)
            numbers = load_file(directory / "model.safetensors")
            return cls(Targets.from_plain(words["targets"]), words["ngrams"], words["vocabulary"], **numbers)
        except Exception as error:
            raise ConfigError(f"{directory}: no baseline can be read there ({error}).") from None


def text_of(row: Conversation) -> str:
    """The text of a row's messages, without the answer that names its class."""
    messages = row.messages[:-1] if row.learns_text and row.messages[-1]["role"] == "assistant" else row.messages
    return "\n".join(map(message_text, messages))


def _vectorizer(ngrams: int, **more: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Words and punctuation marks: punctuation is a good feature of a text's author.
    return TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, ngrams), lowercase=False, token_pattern=r"\w+|[^\w\s]|\n", **more
    )


def _linear(
    features: Any, rows: Sequence[Conversation], targets: Targets, c: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(classes, words) weights and (classes,) biases; a class without rows gets a bias that makes it unlikely."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from threadpoolctl import threadpool_limits

    counts_for = np.asarray([row.weight for row in rows])
    values = np.asarray([row.target for row in rows])
    with threadpool_limits(1):  # more threads sum in another order, with other last digits
        if targets.problem is TaskType.regression:
            fitted = Ridge(alpha=1 / c).fit(features, (values - targets.mean) / targets.scale, sample_weight=counts_for)
            return fitted.coef_.reshape(1, -1), np.asarray(fitted.intercept_).reshape(1)
        several = targets.problem is TaskType.multi_label
        columns = values.T if several else [values]
        weights = np.zeros((len(targets.labels), features.shape[1]))
        bias = np.full(len(targets.labels), np.log(0.5 / (len(rows) + 1)))
        for number, column in enumerate(columns):
            present = np.unique(column)
            if len(present) < 2:
                if several:
                    bias[number] = np.log((len(rows) + 0.5) / 0.5) * (1 if present[0] else -1)
                    continue
                raise ConfigError("model=tfidf: the training rows have only one class.")
            fitted = LogisticRegression(C=c, max_iter=1000, random_state=seed % 2**32)
            fitted.fit(features, column, sample_weight=counts_for)
            if several:
                weights[number], bias[number] = fitted.coef_[0], fitted.intercept_[0]
            elif len(present) == 2:  # scikit-learn gives one row, of the second class against the first
                weights[present[1]], bias[present[1]], bias[present[0]] = fitted.coef_[0], fitted.intercept_[0], 0.0
            else:
                weights[present], bias[present] = fitted.coef_, fitted.intercept_
    return weights, bias


def run_baseline(inputs: RunInputs, screen: Screen) -> float | None:
    """Trains the baseline and writes the record of any other run; returns the monitored metric."""
    config, run, rows = inputs.config, inputs.run, inputs.conversations
    targets = _check(config, inputs.targets)
    began = time.monotonic()
    for path in (run.metrics_file, run.timing_file):
        path.unlink(missing_ok=True)
    write_records(inputs, {**describe(torch.device("cpu")), "precision": "fp64"})
    screen.plan(
        {
            "model": f"tfidf: words and marks, {targets.problem.value.replace('_', ' ')}",
            "data": f"{config.data.name}: " + ", ".join(f"{len(part):,} {split}" for split, part in rows.items()),
            "run": str(run.directory),
        }
    )
    for finding in row_findings(inputs):
        screen.warn(f"{finding.key}: {finding.message}.")
    functions = metric_functions(config.task.metrics, config.task.metric_options)
    names = [path.rpartition(".")[2] for path in config.task.metrics if not reads_text(path)]
    metrics = {name: functions[name] for name in names}
    model = Baseline.fit(rows["train"], targets, dict(config.model.config), config.seed)
    model.save(run.model)
    append_line(run.metrics_file, {"step": 1, **_evaluate(inputs, model, metrics)})
    seconds = time.monotonic() - began
    append_line(run.timing_file, {"step": 1, "val/elapsed_s": seconds})
    result = result_of(inputs, 1, metrics)
    run.finish({**result, "step": 1, "steps": 1, "stopped_early": False, "seconds": seconds})
    after, facts = result["after"], {"weights": str(run.model), "time": f"{seconds:.1f} s"}
    show_summary(screen, {}, after, facts, result.get("chance", {}), blank=config.data.train_on is TrainOn.all)
    return after.get(config.trainer.monitor)  # type: ignore[no-any-return]


def _evaluate(inputs: RunInputs, model: Baseline, metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of validation and test; writes their predictions and row losses."""
    run, targets = inputs.run, model.targets
    after: dict[str, Any] = {}
    for split, name in (("validation", "val"), ("test", "test")):
        rows = inputs.conversations.get(split) or []
        if not rows:
            continue
        values = model.predict(rows)
        references = np.asarray([row.target for row in rows])
        losses = row_losses(values, references, targets.problem, targets.scale)
        after[f"{name}/loss_nats"] = float(np.mean(losses))
        scored = {metric: score(function, references, values) for metric, function in metrics.items()}
        after |= {f"{name}/{metric}": value for metric, (value, _) in scored.items()}
        if name == "val" and inputs.config.data.train_on is TrainOn.all:
            after = dict.fromkeys(after)
            continue
        write_row_losses(
            run.row_losses_file(name, 1),
            [(row, float(loss), 1.0) for row, loss in enumerate(losses)],
            [row.where for row in rows].__getitem__,
            [f"{PREFIX}{label}" for label in targets.labels],
            values,
            groups=[row.group for row in rows],
            scores={metric: row_scores for metric, (_, row_scores) in scored.items() if row_scores is not None},
        )
        predictions_of(inputs, rows, split, values, losses.tolist(), 1).save(run.directory / FOLDER / name)
    return after


def _check(config: TrainConfig, targets: Targets | None) -> Targets:
    """Raises ConfigError for what a baseline cannot do."""
    if targets is None:
        raise ConfigError("model=tfidf writes no text: set task=classification, multi_label or regression.")
    if config.task.objective != CLASSIFICATION or config.task.objective_options:
        raise ConfigError(f"task.objective={config.task.objective}: model=tfidf has its own; leave it out.")
    return targets
