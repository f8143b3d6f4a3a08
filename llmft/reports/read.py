"""A run directory as plain values, whatever state it is in.

Nothing here raises on a run's files: what is missing, cut off or of another kind is left out and noted in `faults`.
A run directory may come from somebody else, so sizes are bounded, YAML aliases are refused and nothing is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llmft.config.renamed import RENAMED, move
from llmft.core.arrow import numbers
from llmft.core.redaction import redact
from llmft.reports.statistics import RowScores, jackknife

LARGEST_FILE = 256 * 2**20
LARGEST_CONFIG = 2 * 2**20
LONGEST_ANSWER = 5
"""Words of a reference that a generation may be expected to equal."""
LOSSES = ("val/loss_nats", "val/logloss")
"""Metrics that are sum(loss) / sum(tokens) of the rows that `row_losses/val-<step>.parquet` keeps."""
TEXT_METRICS = ("exact_match", "token_f1", "rouge_l", "bleu")
"""Metrics of generations that need no model to be computed again."""


@dataclass
class RunRecord:
    """What a run directory says."""

    directory: Path
    status: str = "unknown"
    key: str = ""
    command: str = ""
    error: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """Flat: dotted key to plain value."""
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name

    @property
    def seed(self) -> str:
        """The seed, as text."""
        return str(self.config.get("seed", 0))

    @property
    def part(self) -> str:
        """Which part of the data validates: the fold and the seed of the split."""
        fold, split = self.config.get("data.fold"), self.config.get("data.split_seed", 0)
        return f"fold {fold}, split {split}" if fold is not None else f"split {split}"

    def setting(self, key: str, otherwise: float) -> float:
        """A number of the config, or `otherwise` where it holds none."""
        found = _number(self.config.get(key))
        return otherwise if found is None else found

    @property
    def monitor(self) -> str:
        """The metric that the run was about."""
        return str(self.config.get("trainer.monitor", "val/loss_nats"))

    @property
    def step(self) -> int | None:
        """The step whose weights the run hands over."""
        found = self.result.get("step")
        return found if _is_step(found) else None

    def value(self, metric: str) -> float | None:
        """`metric` of the weights that the run hands over; None where it has none."""
        after = self.result.get("after")
        found = after.get(metric) if isinstance(after, dict) else None
        return _number(found)

    @property
    def chance(self) -> dict[str, Any]:
        """The prior beside the weights handed over, on the validation rows; empty where it was not recorded."""
        found = self.result.get("chance")
        own = found.get("val") if isinstance(found, dict) else None
        names = ("loss", "prior_loss", "low", "high", "rows")
        whole = isinstance(own, dict) and all(_is_number(own.get(name)) for name in names)
        return own if whole and isinstance(own, dict) and isinstance(own.get("metrics"), dict) else {}

    @property
    def length(self) -> dict[str, float]:
        """Accuracy beside the rule "the longer answer wins" on the validation rows; empty where it was not recorded."""
        facts = self.result.get("length")
        names = ("accuracy", "longer_wins", "low", "high", "rows")
        return facts if isinstance(facts, dict) and all(_is_number(facts.get(name)) for name in names) else {}

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) in the order of steps; values that are not finite are left out."""
        found = {r["step"]: float(r[metric]) for r in self.metrics if _is_number(r.get(metric))}
        return sorted(found.items())

    @cached_property
    def seconds(self) -> float | None:
        """Time in training and validation."""
        return _number(self.result.get("seconds")) or _last(self.timing, "val/elapsed_s")

    @cached_property
    def tokens(self) -> float | None:
        """Tokens trained on, counted from speed and time of each step."""
        found = [
            r["train/tokens_per_s"] * r["train/step_s"]
            for r in self.timing
            if _is_number(r.get("train/tokens_per_s")) and _is_number(r.get("train/step_s"))
        ]
        return round(sum(found)) if found else None

    @cached_property
    def memory_gib(self) -> float | None:
        """Peak memory."""
        return max((r["memory/peak_gib"] for r in self.timing if _is_number(r.get("memory/peak_gib"))), default=None)

    @cached_property
    def energy_wh(self) -> float | None:
        """Energy, where the device told it."""
        return _last(self.timing, "energy/total_wh")

    @property
    def content(self) -> tuple[str, str]:
        """Fingerprints of data and model."""
        return _inner(self.environment, "data", "fingerprint"), _inner(self.environment, "model", "fingerprint")

    def row_table(self, step: int) -> dict[str, Any]:
        """The columns of the rows at a validation, arrays; nothing where they were not kept or cannot be read."""
        path = self.directory / "row_losses" / f"val-{step:08d}.parquet"
        if not path.is_file():
            return {}
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:  # `read_table` would import pandas
                table = file.read()
            columns = {name: table[name].combine_chunks() for name in table.column_names}
            return {
                name: np.array(column.to_pylist(), dtype=str) if name in ("row", "group") else numbers(column)
                for name, column in columns.items()
            }
        except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
            self.faults.append(f"{path.name}: {_line(error)}")
            return {}

    def row_losses(self, step: int) -> RowScores | None:
        """The rows' losses over their tokens at a validation; rows of one group are summed."""
        return self._of_table(self.row_table(step), "loss_nats", "tokens")

    def _of_table(self, table: dict[str, Any], total: str, weight: str | None = None) -> RowScores | None:
        import numpy as np

        if "row" not in table or total not in table or (weight and weight not in table) or not len(table["row"]):
            return None
        totals = np.asarray(table[total], float)
        weights = np.asarray(table[weight], float) if weight else (~np.isnan(totals)).astype(float)
        totals = totals if weight else np.nan_to_num(totals)
        if not np.isfinite(totals).all() or not weights.sum() > 0:
            return None
        found = RowScores(table["row"], totals, weights)
        return found.by_group(table["group"]) if "group" in table else found

    def row_scores(self, metric: str) -> RowScores | None:
        """What each validation row adds to `metric` of the weights that the run hands over, where it can be told.

        The rows' losses; the scores that the validation kept; else the metric without some rows in turn.
        """
        value = self.value(metric)
        if self.step is None or value is None:
            return None
        table, name = self.row_table(self.step), metric.removeprefix("val/")
        found = self._of_table(table, "loss_nats", "tokens") if metric in LOSSES else None
        found = found or self._of_table(table, f"score_{name}") or self._of_samples(name, table)
        if found is not None and math.isclose(found.metric, value, rel_tol=1e-3, abs_tol=1e-6):
            return found
        return self._without_rows(metric, value, table)

    def _of_samples(self, name: str, table: dict[str, Any]) -> RowScores | None:
        import numpy as np

        samples = self.samples()
        scores = [own.get(name) for sample in samples if isinstance(own := sample.get("scores"), dict)]
        if not samples or len(scores) < len(samples) or not all(_is_number(value) for value in scores):
            return None
        names = np.array([str(sample.get("where", place)) for place, sample in enumerate(samples)])
        found = RowScores(names, np.array(scores, float), np.ones(len(samples)))
        return found.by_group(_grouped(names, table)) if "group" in table else found

    def _without_rows(self, metric: str, value: float, table: dict[str, Any]) -> RowScores | None:
        """By a jackknife over the predictions or generations, where these give the metric again."""
        import numpy as np

        from llmft.metrics.monitor import named_metric

        name = metric.removeprefix("val/")
        function = named_metric(metric, [str(path) for path in self.config.get("task.metrics") or []])
        predictions = self.predictions() if function is not None and name not in TEXT_METRICS else None
        if predictions is not None and predictions.known and predictions.problem != "text":
            rows = predictions.columns.get("group") or predictions.ids
            references, made = predictions.references(), predictions.values
        elif name in TEXT_METRICS and (samples := self.samples()):
            names = [str(sample.get("where", place)) for place, sample in enumerate(samples)]
            rows = _grouped(names, table) if "group" in table else names
            references, made = (np.array([str(s.get(k)) for s in samples], object) for k in ("reference", "generated"))
        else:
            return None

        def scored(own: Any, predicted: Any) -> float:
            return float(function(own, predicted) if name not in TEXT_METRICS else function(list(own), list(predicted)))

        try:
            same = math.isclose(scored(references, made), value, rel_tol=1e-3, abs_tol=1e-6)
            return jackknife(scored, references, made, [str(row) for row in rows]) if same else None
        except Exception:  # a metric of somebody's own may refuse what is left
            return None

    def predictions(self) -> Any:
        """Its predictions of the validation rows; None where there are none that can be read."""
        from llmft.runs.predictions import Predictions

        folder = self.directory / "predictions" / "val"
        files = [folder / "predictions.json", folder / "predictions.parquet"]
        try:
            whole = all(file.is_file() and file.stat().st_size <= LARGEST_FILE for file in files)
            return Predictions.load(folder) if whole else None
        except Exception as error:  # a run directory may hold anything
            self.faults.append(f"predictions/val: {_line(error)}")
            return None

    def samples(self) -> list[dict[str, Any]]:
        """Generations of the step whose weights the run hands over, or else of the last one."""
        found = [s for s in _lines(self.directory / "samples.jsonl", self.faults) if s.get("split", "val") == "val"]
        steps = {s["step"] for s in found if _is_step(s.get("step"))}
        wanted = self.step if self.step in steps else max(steps, default=None)
        return [s for s in found if s.get("step") == wanted]


def _grouped(names: Any, table: dict[str, Any]) -> list[str]:
    """The group of each row that is named."""
    groups = dict(zip(table["row"].tolist(), table["group"].tolist(), strict=True))
    return [str(groups.get(str(name), name)) for name in names]


def is_free_text(samples: list[dict[str, Any]]) -> bool:
    """Whether answers are sentences, of which hardly one equals its reference: token F1 tells more than a match."""
    lengths = sorted(len(str(sample.get("reference") or "").split()) for sample in samples)
    return bool(lengths) and lengths[len(lengths) // 2] > LONGEST_ANSWER


def read_run(directory: Path) -> RunRecord:
    """Reads a run directory; never raises on its files."""
    run = RunRecord(directory)
    status = _object(directory / "run.json", run.faults)
    run.status = str(status.get("status", "not started" if not status else "unknown"))
    run.key = str(status.get("key", ""))
    run.command = str(redact(status.get("command") or ""))
    run.error = str(redact(status["error"])) if status.get("error") else None
    run.result = status["result"] if isinstance(status.get("result"), dict) else {}
    if not isinstance(run.result.get("after"), dict):
        run.result = {**run.result, "after": {}}
    run.config = flatten(redact(move(_yaml(directory / "config.yaml", run.faults), RENAMED)))
    run.environment = _object(directory / "environment.json", run.faults)
    run.metrics = [r for r in _lines(directory / "metrics.jsonl", run.faults) if _is_step(r.get("step"))]
    run.timing = _lines(directory / "timing.jsonl", run.faults)
    return run


def is_run(directory: Path) -> bool:
    """Whether `directory` looks like a run's."""
    return (directory / "run.json").is_file() or (directory / "config.yaml").is_file()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level of dotted keys."""
    if isinstance(value, dict) and (value or not prefix):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(flatten(item, f"{prefix}{key}."))
        return flat
    return {prefix.rstrip("."): value}


def _text(path: Path, limit: int, faults: list[str]) -> str | None:
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > limit:
            faults.append(f"{path.name}: larger than {limit // 2**20} MiB, not read")
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        faults.append(f"{path.name}: {_line(error)}")
        return None


def _object(path: Path, faults: list[str]) -> dict[str, Any]:
    text = _text(path, LARGEST_FILE, faults)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        faults.append(f"{path.name}: {_line(error)}")
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path, faults: list[str]) -> dict[str, Any]:
    import yaml

    text = _text(path, LARGEST_CONFIG, faults)
    if text is None:
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # A few aliases of aliases unfold to more than any memory holds; llmft itself writes none.
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise yaml.YAMLError("aliases are not read")
        found = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        faults.append(f"{path.name}: {_line(error)}")
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    text = _text(path, LARGEST_FILE, faults)
    return list(_parsed(text or "", path.name, faults))


def _parsed(text: str, name: str, faults: list[str]) -> Iterator[dict[str, Any]]:
    broken = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(found, dict):
            yield found
    if broken:
        faults.append(f"{name}: {broken} lines cannot be read")


def _is_number(value: Any) -> bool:
    """Beyond 1e100 nothing is a measurement, and a figure's axis would overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 10**12


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _last(records: list[dict[str, Any]], key: str) -> float | None:
    return next((float(r[key]) for r in reversed(records) if _is_number(r.get(key))), None)


def _inner(value: dict[str, Any], *keys: str) -> str:
    found: Any = value
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return str(found or "")


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
