"""The report of a pipeline: each stage before and after, rewards of its policies' answers, samples side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.commands import PipelineConfig
from llmft.config.untrusted import stored_config
from llmft.core.console import Screen, text_table
from llmft.core.errors import StageFailed
from llmft.core.files import write_atomically, write_json
from llmft.pipelines.process import run_command
from llmft.pipelines.stages import Stage, filled
from llmft.reports.read import read_dictionary
from llmft.reports.tables import markdown_table
from llmft.runs.predictions import read_table

RESAMPLES, SHOWN = 2000, 3


@dataclass
class PolicyAnswers:
    """Answers of one stage's policy to the held-out prompts.

    Attributes:
        rewards: (prompts,) mean reward of each prompt's answers.
    """

    stage: str
    rewards: np.ndarray
    prompts: list[str]
    texts: list[str]

    @property
    def mean(self) -> float:
        return float(self.rewards.mean())

    @property
    def noise(self) -> float:
        """The standard error of `mean` over prompts."""
        return float(self.rewards.std(ddof=1) / np.sqrt(len(self.rewards))) if len(self.rewards) > 1 else 0.0


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean over prompts."""
    rng = np.random.Generator(np.random.PCG64(0))
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def gain(before: PolicyAnswers, after: PolicyAnswers) -> dict[str, float]:
    """Mean reward difference `after` - `before` on the same prompts, its interval, and win rate (ties count half)."""
    difference = after.rewards - before.rewards
    low, high = interval(difference)
    return {
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "win_rate": float(((np.sign(difference) + 1) / 2).mean()),
    }


def verdict(gained: dict[str, float]) -> str:
    """Whether a gain exceeds the noise of the prompts."""
    return "better" if gained["low"] > 0 else "worse" if gained["high"] < 0 else "not distinguishable"


def write_report(
    config: PipelineConfig, stages: Sequence[Stage], results: dict[str, str], directory: Path, screen: Screen
) -> None:
    """Judges the policies in config.compare, prints the report, and writes report.json and report.md."""
    rows = [_stage_row(stage, Path(results[stage.name])) for stage in stages]
    answers = [_answers(name, results, config, directory) for name in config.compare]
    compared = [*pairwise(answers), *([(answers[0], answers[-1])] if len(answers) > 2 else [])]
    steps = [
        {"from": a.stage, "to": b.stage, **(gained := gain(a, b)), "verdict": verdict(gained)} for a, b in compared
    ]
    content = {
        "name": config.name,
        "stages": rows,
        "rewards": [{"stage": a.stage, "reward": a.mean, "noise": a.noise, "prompts": len(a.rewards)} for a in answers],
        "steps": steps,
        "samples": [
            {"prompt": answers[0].prompts[n], **{a.stage: a.texts[n] for a in answers}}
            for n in range(min(SHOWN, len(answers[0].texts) if answers else 0))
        ],
    }
    write_json(directory / "report.json", content)
    tables = _tables(content)
    for title, header, lines in tables:
        screen.print(text_table(header, lines, title, range(len(header))))
    text = "\n\n".join(f"## {title}\n\n{markdown_table(header, lines)}" for title, header, lines in tables)
    write_atomically(directory / "report.md", f"# {config.name}\n\n{text}\n".encode())
    screen.print(f"[bold]pipeline[/bold]  {directory / 'report.md'}")


def _stage_row(stage: Stage, result: Path) -> dict[str, Any]:
    """A stage's row: a training's monitored metric before and after, or the expected best of n samples."""
    row: dict[str, Any] = {"stage": stage.name, "command": stage.command, "result": str(result)}
    status = read_dictionary(result / "run.json", []).get("result", {})
    if status and (result / "config.yaml").is_file():  # a training; folds and blends have no metric before
        monitor = stored_config(result / "config.yaml").trainer.monitor
        row |= {"metric": monitor, "before": status["before"].get(monitor), "after": status["after"].get(monitor)}
    if best := read_dictionary(result / "report.json", []).get("expected_best"):
        row |= {"metric": f"reward, best of 1 and of {len(best)}", "before": best[0], "after": best[-1]}
    return row


def _answers(stage: str, results: dict[str, str], config: PipelineConfig, directory: Path) -> PolicyAnswers:
    run = results[stage]
    judged = filled(config.judged, results)
    code, directories = run_command("llmft.sample", [f"run={run}", *judged], directory / ".judged.outcome")
    if code != 0 or not directories:
        raise StageFailed(f"compare: judging the answers of {stage} failed; see the error above.", code or 1)
    table = read_table(directories[0] / "samples.parquet")
    each = max(table["sample"]) + 1
    rewards = np.asarray(table["reward"], np.float64).reshape(-1, each).mean(1)
    return PolicyAnswers(stage, rewards, table["prompt"][::each], table["text"][::each])


def _tables(content: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The title, header and lines of each table."""
    lines = []
    for row in content["stages"]:
        values = ["" if row.get(key) is None else f"{row[key]:.4f}" for key in ("before", "after")]
        lines.append([row["stage"], row["command"], row.get("metric", ""), *values])
    tables = [("stages", ["stage", "command", "metric", "before", "after"], lines)]
    if content["rewards"]:
        lines = [[row["stage"], f"{row['reward']:.3f} ± {row['noise']:.3f}"] for row in content["rewards"]]
        tables.append(("reward on held-out prompts", ["stage", "reward"], lines))
        lines = []
        for row in content["steps"]:
            difference = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            lines.append([f"{row['to']} against {row['from']}", difference, f"{row['win_rate']:.0%}", row["verdict"]])
        tables.append(("what each stage gained", ["stages", "reward", "win rate", "verdict"], lines))
        header = list(content["samples"][0]) if content["samples"] else []
        tables.append(("samples", header, [list(map(str, sample.values())) for sample in content["samples"]]))
    return tables
