"""Reads a run directory as plain values, whatever state it is in.

Faulty files raise no errors: what is missing, truncated or of the wrong type is left out and listed in `faults`.
Run directories may be untrusted, so sizes are bounded, YAML aliases are refused and nothing is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmft.config.convert import flatten
from llmft.config.renamed import RENAMED, move
from llmft.core.errors import DataError, first_line
from llmft.core.redaction import redact
from llmft.reports.statistics import RowScores, jackknife
from llmft.runs.predictions import Predictions, read_table

LARGEST_FILE = 256 * 2**20
LARGEST_CONFIG = 2 * 2**20
LONGEST_ANSWER = 5
"""Maximum words of a reference that a generation can be expected to match exactly."""
LOSSES = ("val/loss_nats", "val/logloss")
"""Metrics that are sum(loss) / sum(tokens) over the rows in `row_losses/val-<step>.parquet`."""
BOUNDS = ("low", "high", "rows")
"""Keys of the interval of a difference on the validation rows."""
TEXT_METRICS = ("exact_match", "token_f1", "rouge_l", "bleu")
"""Metrics that can be recomputed from generations without a model."""


class RunRecord:
    """The content of a run directory.

    Attributes:
        faults: problems of its files.
        config: dotted key -> plain value.
        part: the part of the data used for validation: fold and seed of the split.
        monitor: the monitored metric.
        step: the step whose weights are kept.
        seconds, tokens: time in training and validation; tokens trained on, from speed and time of each step.
        content: fingerprints of data and model.
        chance: the kept weights against the prior on the validation rows; empty if not recorded.
        length: accuracy against the rule "the longer answer wins" on these rows; empty if not recorded.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.name = directory, directory.name
        self.faults: list[str] = []
        record = read_dictionary(directory / "run.json", self.faults)
        self.status = str(record.get("status", "not started" if not record else "unknown"))
        self.key = str(record.get("key", ""))
        self.command = str(redact(record.get("command") or ""))
        self.error = str(redact(record["error"])) if record.get("error") else None
        self.result: dict[str, Any] = record["result"] if isinstance(record.get("result"), dict) else {}
        if not isinstance(self.result.get("after"), dict):
            self.result = {**self.result, "after": {}}
        config = read_dictionary(directory / "config.yaml", self.faults, _parse_yaml, LARGEST_CONFIG)
        self.config = flatten(redact(move(config, RENAMED)))
        self.environment: dict[str, Any] = read_dictionary(directory / "environment.json", self.faults)
        self.metrics = [r for r in _lines(directory / "metrics.jsonl", self.faults) if _is_step(r.get("step"))]
        timing = _lines(directory / "timing.jsonl", self.faults)
        self.seed = str(self.config.get("seed", 0))
        fold, split = self.config.get("data.fold"), self.config.get("data.split_seed", 0)
        self.part = f"fold {fold}, split {split}" if fold is not None else f"split {split}"
        self.monitor = str(self.config.get("trainer.monitor", "val/loss_nats"))
        step = self.result.get("step")
        self.step: int | None = step if _is_step(step) else None
        self.seconds = _number(self.result.get("seconds")) or _last(timing, "val/elapsed_s")
        steps = [r for r in timing if _all_numbers(r, "train/tokens_per_s", "train/step_s")]
        self.tokens = round(sum(r["train/tokens_per_s"] * r["train/step_s"] for r in steps)) if steps else None
        peaks = [r["memory/peak_gib"] for r in timing if _is_number(r.get("memory/peak_gib"))]
        self.memory_gib: float | None = max(peaks, default=None)
        self.content = [str(_at(self.environment, name, "fingerprint") or "") for name in ("data", "model")]
        chance: Any = _at(self.result, "chance", "val")
        length: Any = self.result.get("length")
        complete = _all_numbers(chance, "loss", "prior_loss", *BOUNDS) and isinstance(chance.get("metrics"), dict)
        self.chance: dict[str, Any] = chance if complete else {}
        self.length: dict[str, Any] = length if _all_numbers(length, "accuracy", "longer_wins", *BOUNDS) else {}

    def setting(self, key: str, default: float) -> float:
        """A number of the config, or `default` if it has none."""
        value = _number(self.config.get(key))
        return default if value is None else value

    def value(self, metric: str) -> float | None:
        """`metric` of the kept weights; None if it was not recorded."""
        return _number(_at(self.result, "after", metric))

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) in order of steps, without values that are not finite."""
        return sorted({r["step"]: float(r[metric]) for r in self.metrics if _is_number(r.get(metric))}.items())

    def row_table(self, step: int) -> dict[str, Any]:
        """column -> array over the rows of a validation; empty if they were not kept or cannot be read."""
        path = self.directory / "row_losses" / f"val-{step:08d}.parquet"
        if not path.is_file():
            return {}
        try:
            columns = read_table(path)
            if blank := next((name for name, values in columns.items() if None in values), None):
                raise ValueError(f"{blank} is blank in some rows")
            return {name: np.array(v, str if name in ("row", "group") else float) for name, v in columns.items()}
        except (DataError, ValueError, TypeError) as error:
            self.faults.append(f"{path.name}: {first_line(error).removeprefix(f'{path}: ')}")
            return {}

    def row_losses(self, step: int) -> RowScores | None:
        """The rows' losses over their tokens at a validation; rows of one group are summed."""
        return _of_table(self.row_table(step), "loss_nats", "tokens")

    def row_scores(self, metric: str) -> RowScores | None:
        """The contribution of each validation row to `metric` of the kept weights; None if it cannot be computed.

        From the rows' losses, else from stored scores, else by a jackknife.
        """
        value, name = self.value(metric), metric.removeprefix("val/")
        if self.step is None or value is None:
            return None
        table = self.row_table(self.step)
        scores = _of_table(table, "loss_nats", "tokens") if metric in LOSSES else None
        scores = scores or _of_table(table, f"score_{name}") or _of_samples(self.samples(), name, table)
        if scores is not None and math.isclose(scores.metric, value, rel_tol=1e-3, abs_tol=1e-6):
            return scores
        return self._without_rows(metric, value, table)

    def _without_rows(self, metric: str, value: float, table: dict[str, Any]) -> RowScores | None:
        """Row scores by a jackknife over predictions or generations, if these reproduce the metric."""
        from llmft.metrics.monitor import named_metric

        function = named_metric(metric, [str(path) for path in self.config.get("task.metrics") or []])
        is_text = metric.removeprefix("val/") in TEXT_METRICS
        if is_text and (samples := self.samples()):
            rows = _row_names(samples, table)
            references, outputs = (
                np.array([str(s.get(k)) for s in samples], object) for k in ("reference", "generated")
            )
        elif not is_text and function is not None and (predictions := self.predictions()) is not None:
            if not predictions.known or predictions.problem == "text":
                return None
            rows = [str(row) for row in predictions.columns.get("group") or predictions.ids]
            references, outputs = predictions.references(), predictions.values
        else:
            return None

        def score(*pair: Any) -> float:
            return float(function(*map(list, pair)) if is_text else function(*pair))

        try:
            same = math.isclose(score(references, outputs), value, rel_tol=1e-3, abs_tol=1e-6)
            return jackknife(score, references, outputs, rows) if same else None
        except Exception:  # a custom metric may refuse a subset of the rows
            return None

    def predictions(self) -> Predictions | None:
        """Its predictions of the validation rows; None if there are none or they cannot be read."""
        folder = self.directory / "predictions" / "val"
        files = [folder / "predictions.json", folder / "predictions.parquet"]
        try:
            readable = all(file.is_file() and file.stat().st_size <= LARGEST_FILE for file in files)
            return Predictions.load(folder) if readable else None
        except Exception as error:  # the file may contain anything
            self.faults.append(f"predictions/val: {first_line(error)}")
            return None

    def samples(self) -> list[dict[str, Any]]:
        """Generations at the step whose weights are kept, or else at the last one."""
        samples = [s for s in _lines(self.directory / "samples.jsonl", self.faults) if s.get("split", "val") == "val"]
        steps = {s["step"] for s in samples if _is_step(s.get("step"))}
        step = self.step if self.step in steps else max(steps, default=None)
        return [s for s in samples if s.get("step") == step]


def _of_table(table: dict[str, Any], total: str, weight: str | None = None) -> RowScores | None:
    """Row scores from two columns, or from one column of scores, in which NaN rows get no weight."""
    if not {"row", total, weight or total} <= table.keys() or not len(table["row"]):
        return None
    totals = np.asarray(table[total], float)
    weights = np.asarray(table[weight], float) if weight else (~np.isnan(totals)).astype(float)
    totals = totals if weight else np.nan_to_num(totals)
    if not np.isfinite(totals).all() or not weights.sum() > 0:
        return None
    scores = RowScores(table["row"], totals, weights)
    return scores.by_group(table["group"]) if "group" in table else scores


def _of_samples(samples: Sequence[dict[str, Any]], name: str, table: dict[str, Any]) -> RowScores | None:
    """Row scores from those stored with the generations."""
    scores = [_at(sample, "scores", name) for sample in samples]
    if not samples or not all(map(_is_number, scores)):
        return None
    names = _row_names(samples, {})
    scored = RowScores(np.array(names), np.array(scores, float), np.ones(len(samples)))
    return scored.by_group(_row_names(samples, table)) if "group" in table else scored


def _row_names(samples: Sequence[dict[str, Any]], table: dict[str, Any]) -> list[str]:
    """The row of each sample, or its group if rows have groups."""
    names = [str(sample.get("where", index)) for index, sample in enumerate(samples)]
    groups = dict(zip(table["row"], table["group"], strict=True)) if {"row", "group"} <= table.keys() else {}
    return [str(groups.get(name, name)) for name in names]


def is_free_text(samples: list[dict[str, Any]]) -> bool:
    """Whether references are long texts, for which token F1 is more informative than an exact match."""
    lengths = sorted(len(str(sample.get("reference") or "").split()) for sample in samples)
    return bool(lengths) and lengths[len(lengths) // 2] > LONGEST_ANSWER


def is_run(directory: Path) -> bool:
    return (directory / "run.json").is_file() or (directory / "config.yaml").is_file()


def _read(path: Path, faults: list[str], parse: Callable[[str], Any], limit: int = LARGEST_FILE) -> Any:
    """`parse` applied to the file's text; None if the file is missing or cannot be read."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > limit:
            raise ValueError(f"larger than {limit // 2**20} MiB, not read")
        return parse(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        faults.append(f"{path.name}: {first_line(error)}")
        return None


def read_dictionary(path: Path, faults: list[str], parse: Any = json.loads, limit: int = LARGEST_FILE) -> Any:
    """The dictionary in a file, else an empty one."""
    content = _read(path, faults, parse, limit)
    return content if isinstance(content, dict) else {}


def _parse_yaml(text: str) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # Nested aliases can expand beyond any memory; llmft itself writes none.
    if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
        raise ValueError("aliases are not read")
    return yaml.load(text, loader)


def _lines(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    records, broken = [], 0
    for line in (_read(path, faults, str) or "").split("\n"):
        try:
            records += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError):
            broken += 1
    if broken:
        faults.append(f"{path.name}: {broken} lines cannot be read")
    return [record for record in records if isinstance(record, dict)]


def _is_number(value: Any) -> bool:
    """Whether `value` is a number below 1e100 in size; larger ones would overflow a figure's axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _all_numbers(record: Any, *names: str) -> bool:
    return isinstance(record, dict) and all(_is_number(record.get(name)) for name in names)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 10**12


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _last(records: list[dict[str, Any]], key: str) -> float | None:
    return next((float(r[key]) for r in reversed(records) if _is_number(r.get(key))), None)


def _at(value: Any, *keys: str) -> Any:
    """The value in nested dictionaries at `keys`; None if it does not exist."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
