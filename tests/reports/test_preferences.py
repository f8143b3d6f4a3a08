"""Reports of policies and judges of compared answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmft.reports.write import write_report
from tests.reports.runs import make_run, make_sweep, trial

BEFORE = {"val/chosen_logp": -40.0, "val/rejected_logp": -40.0}
MONITORED: dict[str, Any] = {
    "monitor": "val/accuracy",
    "mode": "max",
    "swept": {"task.beta": ["0.1", "0.5"], "seed": ["0", "1"]},
}


def compared(root: Path, accuracy: float, seed: int, beta: float, low: float) -> Path:
    """A run of DPO whose accuracy is that of the rule of length plus 0.1, at least `low` above it."""
    after = {"val/accuracy": accuracy, "val/chosen_logp": -42.0, "val/rejected_logp": -54.0 - seed}
    metrics = "llmft.metrics.preference.accuracy"
    run = make_run(root, 0.5 + accuracy / 10, metrics=after, task__beta=beta, seed=seed, task__metrics=[metrics],
                   trainer__monitor="val/accuracy")  # fmt: skip
    status = json.loads((run / "run.json").read_text())
    facts = {"accuracy": accuracy, "longer_wins": accuracy - 0.1, "low": low, "high": 0.2, "rows": 60}
    status["result"] |= {"before": BEFORE, "length": facts}
    (run / "run.json").write_text(json.dumps(status))
    return run


@pytest.fixture(params=[-0.01, 0.05])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bool, Any, Path]:
    """Whether the best configuration is better than the rule of length, the report, and the output directory."""
    runs = [
        compared(tmp_path, 0.8 - beta / 10 + seed / 100, seed, beta, request.param)
        for beta in (0.1, 0.5)
        for seed in (0, 1)
    ]
    sweep = make_sweep(tmp_path, [trial(tmp_path, run, number) for number, run in enumerate(runs)], **MONITORED)
    report = write_report([], sweep, sweep=sweep)
    return request.param > 0, report, tmp_path


def test_a_judge_no_better_than_length_is_said_to_have_learned_it_wherever_the_answer_stands(written: Any) -> None:
    better, report, root = written
    sentence = report.warnings.get("length", "")
    assert sentence.startswith("" if better else "beta=0.1 may have learned length alone")
    assert ("NOT better in 2 of 2 runs: 0.7950 against 0.6950" in sentence) is not better
    pages = [report.html.read_text(), (report.directory / "report.md").read_text(), (root / "LOGBOOK.md").read_text()]
    assert ["may have learned length alone" in page for page in pages] == [not better] * 3


def test_what_became_of_the_answers_has_a_line_for_each_configuration(written: Any) -> None:
    better, report, _ = written
    (table,) = (table for table in report.metrics if table.title == "Compared answers")
    assert [line[0] for line in table.lines] == ["beta=0.1", "beta=0.5"]
    assert all("both answers became less likely (chosen -2.0 nats, rejected -14.5)" in line[1] for line in table.lines)
    assert table.lines[0][2] == f"{'better' if better else 'NOT better in 2 of 2 runs'}: 0.7950 against 0.6950"
    assert "pushing the rejected one down 14.5 nats" in report.html.read_text()


def test_losses_of_two_betas_are_not_called_comparable(tmp_path: Path) -> None:
    def warnings(**overrides: Any) -> dict[str, str]:
        root = tmp_path / str(len(overrides))
        runs = [
            make_run(root, value, task__feedback="pairs", task__beta=beta, seed=0, **overrides)
            for value, beta in ((0.6, 0.5), (0.7, 0.1))
        ]
        return write_report(runs, tmp_path / "report").warnings

    assert warnings()["units"].startswith("the unit of val/loss_nats depends on task.beta")
    assert "units" not in warnings(trainer__monitor="val/exact_match")
