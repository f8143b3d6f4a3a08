"""A report shows runs in any state, and none of their contents becomes markup or leaks."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llmft.core.errors import ConfigError, DataError
from llmft.metrics.classification import accuracy, auc
from llmft.report import ReportConfig, report
from llmft.reports.configurations import Study
from llmft.reports.curves import Fit, diagnose
from llmft.reports.importance import importance
from llmft.reports.metrics import metric_tables
from llmft.reports.read import RunRecord
from llmft.reports.run_selection import select_runs
from llmft.reports.verdicts import sentence
from llmft.reports.write import write_report
from llmft.runs.predictions import Predictions, write_table
from llmft.runs.records import write_row_losses
from tests.conftest import ROOT
from tests.reports.runs import make_run, make_sweep, trial

SAMPLES = [
    {"where": f"rows.jsonl:{i}", "prompt": f"Tell me of {animal} number {i}", "reference": animal, "generated": text}
    for i, (animal, text) in enumerate([("cats", "cats"), ("dogs", "cats"), ("cows", "cows")] * 4)
]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """r of 4 and 8 with three seeds each: 4 is better."""
    for r, value in ((4, 1.0), (8, 1.2)):
        for seed, luck in enumerate((0.0, 0.004, -0.005)):
            make_run(tmp_path, value + luck * (1 + r / 10), lora__r=r, seed=seed, samples=SAMPLES)
    return tmp_path


def runs_of(root: Path) -> list[Path]:
    return sorted((root / "runs").iterdir())


def test_s10_a_grid_gets_mean_spread_and_number_of_seeds_and_seeds_are_no_key(grid: Path) -> None:
    report = write_report(runs_of(grid), grid / "out")
    assert report.study.keys == ["lora.r"]
    assert [line.name for line in report.board] == ["r=4", "r=8"]
    values = [1.0, 1.0056, 0.993]
    assert report.board[0].mean == pytest.approx(np.mean(values))
    assert report.board[0].spread == pytest.approx(np.std(values, ddof=1))
    assert report.board[0].replications == "3 seeds"
    assert report.board[0].tokens == 8000
    assert report.verdicts.answer == "r=4 is better than r=8."


def test_page_tables_and_csv_tell_the_same(grid: Path) -> None:
    report = write_report(runs_of(grid), grid / "out")
    page, table = report.html.read_text(), (grid / "out" / "report.md").read_text()
    for text in (page, table):
        assert "r=4 is better than r=8." in text
        assert "0.9995" in text
    lines = list(csv.DictReader(io.StringIO((grid / "out" / "results.csv").read_text())))
    assert len(lines) == 6
    assert {line["lora.r"] for line in lines} == {"4", "8"}
    assert all(line["command"] for line in lines)
    (verdict,) = csv.DictReader(io.StringIO((grid / "out" / "verdicts.csv").read_text()))
    assert (verdict["first"], verdict["second"], verdict["verdict"]) == ("r=4", "r=8", "better")
    assert len(page) < 1_000_000


def test_keys_that_cannot_change_numbers_are_not_shown_and_a_named_group_hides_its_own(tmp_path: Path) -> None:
    for name, template in (("plain", "a"), ("chat", "b")):
        for seed in (0, 1):
            make_run(
                tmp_path,
                1.0 + len(name) / 100 + seed / 1000,
                prompt__name=name,
                prompt__template=template,
                trainer__micro_batch=4 * (seed + 1),
                tags=[name],
                seed=seed,
            )
    study = Study(runs_of(tmp_path))
    assert study.keys == ["prompt"]
    assert study.follows == {"prompt.template": "prompt"}
    assert [c.name for c in study.configurations] == ["prompt=chat", "prompt=plain"]


def test_folds_are_replications(tmp_path: Path) -> None:
    for r in (4, 8):
        for fold in range(3):
            make_run(tmp_path, 1.0 + r / 100 + fold / 10, lora__r=r, data__fold=fold, data__num_folds=3)
    report = write_report(runs_of(tmp_path), tmp_path / "out")
    assert report.board[0].replications == "1 seed x 3 folds"
    assert report.study.keys == ["lora.r"]
    assert report.study.configurations[0].sample("val/loss_nats").training_overlap == pytest.approx(0.5)


def test_folds_rows_are_counted_once_each_and_alike_in_every_sentence(tmp_path: Path) -> None:
    for r in (4, 8):
        for fold in range(2):
            make_run(tmp_path, 1.0 + r / 1e4 + fold / 10, lora__r=r, data__fold=fold, first_row=60 * fold)
    verdicts = write_report(runs_of(tmp_path), tmp_path / "out").verdicts
    assert "Noise of 120 validation rows" in verdicts.basis
    assert "120 validation rows (paired)" in str([sentence(verdict) for _, verdict in verdicts.all])


def test_a_log_loss_that_is_the_loss_but_for_rounding_is_shown_once(tmp_path: Path) -> None:
    for seed, value in enumerate((1.03, 1.3)):
        loss = {"val/logloss": np.nextafter(value, 2), "val/accuracy": 0.5}
        make_run(tmp_path, value, seed=seed, metrics=loss)
    (table,) = metric_tables(write_report(runs_of(tmp_path), tmp_path / "out").study)
    assert table.head == ["configuration", "loss_nats", "exact_match", "accuracy"]


def test_whatever_lies_in_run_directories_a_report_is_written(tmp_path: Path) -> None:
    good = make_run(tmp_path, 1.0, seed=0)
    make_run(tmp_path, 1.0, seed=1, status="failed")
    make_run(tmp_path, 1.0, seed=2, status="running")
    for seed, damage in enumerate(["run.json", "config.yaml", "metrics.jsonl", "environment.json", "samples.jsonl"], 3):
        broken = make_run(tmp_path, 1.0 + seed / 100, seed=seed)
        (broken / damage).write_bytes(b'{"half": "\xff\n[1, 2]\n3')
    for seed, path in enumerate(["row_losses/val-00000080.parquet", "timing.jsonl"], 8):
        broken = make_run(tmp_path, 1.0 + seed / 100, seed=seed)
        (broken / path).write_bytes(b"PAR1 no parquet")
    odd = make_run(tmp_path, 1.0, seed=10)
    (odd / "config.yaml").write_text("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    (make_run(tmp_path, 1.0, seed=11) / "run.json").write_text(
        '{"status": "done", "result": {"after": [1], "step": "x"}}'
    )
    other = make_run(tmp_path, 1.0, seed=12)
    (other / "run.json").write_text('{"status": "done", "result": {"after": {"val/reward": 3.5}, "step": 80}}')
    (tmp_path / "runs" / "empty").mkdir()
    report = write_report(runs_of(tmp_path), tmp_path / "out")
    statuses = {failure.status for failure in report.study.failures}
    assert {"failed", "running", "not started"} <= statuses
    assert any(good.name in name for line in report.board for name, *_ in line.commands)
    page = report.html.read_text()
    assert "out of luck" in page
    assert "aliases are not read" in page
    assert "val/reward 3.500" in page
    empty = write_report([], tmp_path / "none")
    assert "No run finished" in empty.verdicts.answer


def test_a_sweep_of_failures_only_says_why_and_how_to_run_each(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1.0, status="failed", seed=0)
    trials = [
        trial(tmp_path, run, 0, status="failed", error="out of memory"),
        {
            "number": 1,
            "run": "runs/never",
            "status": "pending",
            "overrides": ["lora.r=8"],
            "command": "python -m llmft x=1",
        },
        {"number": 2},
    ]
    report = write_report([], tmp_path / "out", sweep=make_sweep(tmp_path, trials))
    assert [f.cause for f in report.study.failures[:1]] == ["out of memory"]
    assert len(report.study.failures) == 3
    page = report.html.read_text()
    assert "python -m llmft trial=0" in page
    assert "Is r=4 better than r=8?" in page


def test_pruned_and_twin_trials_are_named_but_not_ranked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, 1.0 + s / 100, seed=s) for s in range(3)]
    trials = [
        trial(tmp_path, r, i, status=s) for i, (r, s) in enumerate(zip(runs, ("done", "pruned", "twin"), strict=True))
    ]
    report = write_report([], tmp_path / "out", sweep=make_sweep(tmp_path, trials))
    assert [line.num_runs for line in report.board] == [1]
    assert len(report.study.stopped) == 2
    assert not report.study.failures


def test_text_of_runs_is_escaped_and_secrets_are_masked_everywhere(tmp_path: Path) -> None:
    secret = "hf_" + "a1B2" * 6
    evil = f"<script>alert(1)</script><img src=x onerror=alert(2)> {secret} '\"]]>&"
    samples = [{**s, "prompt": evil, "generated": evil, "reference": evil, "where": evil} for s in SAMPLES]
    runs = []
    for seed, template in enumerate([evil, "plain"]):
        run = make_run(tmp_path, 1.0, seed=0, prompt__template=template, samples=samples)
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**record, "command": evil}))
        runs.append(trial(tmp_path, run, seed, command=evil))
    failed = make_run(tmp_path, 1.0, status="failed", seed=5)
    (failed / "run.json").write_text(json.dumps({"status": "failed", "error": evil, "command": evil}))
    runs.append(trial(tmp_path, failed, 2, status="failed", error=evil, overrides=[evil]))
    sweep = make_sweep(tmp_path, runs, question=evil, notes=evil, command=evil)
    report = write_report([], sweep / "report", sweep=sweep)
    page = report.html.read_text()
    assert page.count("<script>") == 1
    assert "<img" not in page
    for path in [*sweep.rglob("*.*"), tmp_path / "LOGBOOK.md"]:
        if path.is_file() and path.name != "sweep.json":
            assert secret not in path.read_text(), path
    assert "<script" not in (tmp_path / "LOGBOOK.md").read_text()


def test_the_logbook_has_one_entry_per_sweep_newest_first_and_is_made_anew(grid: Path) -> None:
    logbook = grid / "LOGBOOK.md"
    trials = [trial(grid, run, i) for i, run in enumerate(runs_of(grid))]
    old = make_sweep(grid, trials, "old-1", question="Old?", created="2026-01-01 00:00:00")
    new = make_sweep(grid, trials, "new-2", question="New?", created="2026-02-01 00:00:00")
    for sweep in (new, old, new, old):
        write_report([], sweep / "report", sweep=sweep)
    text = logbook.read_text()
    assert text.count("**Question.**") == 2
    assert text.index("New?") < text.index("Old?")
    order = [
        text.index(part)
        for part in ("**Question.** New?", "**Setup.** lora.r: 4, 8.", "**Result.**", "**Verdict.** r=4 is")
    ]
    assert order == sorted(order)
    logbook.write_text("lost")
    threads = [threading.Thread(target=write_report, args=([], s / "report"), kwargs={"sweep": s}) for s in (old, new)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logbook.read_text() == text


def test_curves_are_put_in_words(tmp_path: Path) -> None:
    def fit(**how: object) -> Fit:
        return diagnose(RunRecord(make_run(tmp_path / str(len(list(tmp_path.iterdir()))), **how))).fit  # type: ignore[arg-type]

    assert fit() is Fit.fine
    rising = {"curve": lambda s: abs(s - 40) / 50 - 0.8, "train": lambda s: 3 - s / 40}
    assert fit(value=2.0, **rising) is Fit.overfitting
    assert fit(curve=lambda s: 1.0 - s / 80) is Fit.short
    assert fit(value=5.0, curve=lambda s: 0.0) is Fit.underfitting
    assert fit(status="diverged") is Fit.diverged
    assert fit(value=9.0, curve=lambda s: -8.0 + s / 10) is Fit.diverged
    assert fit(data__train_on="all") is Fit.unknown, "blank on purpose is not diverged"
    overfitted = diagnose(RunRecord(make_run(tmp_path / "again", 2.0, rows=False, **rising)))  # type: ignore[arg-type]
    assert str(overfitted) == "overfitting since step 40"


def test_importance_finds_the_key_that_matters_on_a_grid_and_in_a_search(tmp_path: Path) -> None:
    for r, high in ((4, 0.0), (8, 0.3)):
        for rate, low in ((1e-3, 0.0), (1e-2, 0.1)):
            make_run(tmp_path / "grid", 1.0 + high + low, lora__r=r, learning_rate__peak=rate)
    shares = importance(Study(runs_of(tmp_path / "grid")))
    assert list(shares) == ["lora.r", "learning_rate.peak"]
    assert shares["lora.r"] == pytest.approx(0.9, abs=0.1), "the textbook's analysis of variance says 0.9"
    rng = np.random.default_rng(0)
    for i in range(24):
        r, rate = int(rng.choice([1, 2, 4, 8, 16])), float(rng.choice([1e-4, 3e-4, 1e-3, 3e-3, 1e-2]))
        root = tmp_path / "search" / str(i)
        make_run(root, 1.0 + 0.1 * np.log2(r), lora__r=r, learning_rate__peak=rate, seed=i, rows=False)
    assert importance(Study(list(tmp_path.glob("search/*/runs/*"))))["lora.r"] > 0.8


def test_every_metric_that_has_rows_tells_what_each_row_adds_to_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [{**s, "scores": {"rouge_l": number / 12}} for number, s in enumerate(SAMPLES)]
    targets = rng.integers(0, 2, 60)
    values = rng.dirichlet([1, 1], 60) + 0.5 * np.eye(2)[targets]
    values /= values.sum(axis=1, keepdims=True)
    numbers = {"val/auc": auc(targets, values), "val/accuracy": accuracy(targets, values), "val/margin": 0.5}
    numbers |= {"val/rouge_l": 5.5 / 12, "val/exact_match": 8 / 12, "val/bleu": 1.0}
    directory = make_run(tmp_path, 1.0, samples=texts, metrics=numbers, task__head="linear")
    Predictions([str(i) for i in range(60)], ["a", "b"], values, targets=["ab"[t] for t in targets]).save(
        directory / "predictions" / "val"
    )
    losses = [(i, 10.0, 10.0) for i in range(60)]
    path = directory / "row_losses" / "val-00000080.parquet"
    margins = {"margin": rng.permutation(np.arange(60.0) / 59)}
    write_row_losses(
        path, losses, lambda row: f"rows.jsonl:{row}", groups=[str(i // 6) for i in range(60)], scores=margins
    )
    run = RunRecord(directory)
    for metric, rows in (("loss_nats", 10), ("margin", 10), ("rouge_l", 2), ("exact_match", 2), ("auc", 60)):
        scores = run.row_scores(f"val/{metric}")
        assert scores is not None, metric
        assert len(scores.rows) == rows, metric
        assert scores.metric == pytest.approx(run.value(f"val/{metric}"), abs=0.02), metric
    assert run.row_scores("val/bleu") is None, "another number than these samples give"


def test_losses_that_are_blank_are_a_fault_and_no_losses(tmp_path: Path) -> None:
    directory = make_run(tmp_path, 1.0)
    path = directory / "row_losses" / "val-00000080.parquet"
    write_table(path, {"row": ["a", "b", "c"], "loss_nats": [1.0, None, 2.0], "tokens": [1, 2, 3]})
    run = RunRecord(directory)
    assert run.row_losses(80) is None
    assert run.faults == ["val-00000080.parquet: loss_nats is blank in some rows"]


def test_a_configuration_that_lost_runs_does_not_win_by_its_survivors(tmp_path: Path) -> None:
    for seed in range(5):
        make_run(tmp_path, 0.5 + seed / 1000, status="diverged" if seed > 2 else "done", lora__r=8, seed=seed)
        make_run(tmp_path, 0.9 + seed / 1000, lora__r=4, seed=seed)
    answer = write_report(runs_of(tmp_path), tmp_path / "out").verdicts.answer
    assert answer.startswith("No winner: r=8 leads only among the runs that finished. 2 runs of r=8 diverged or failed")


def test_free_text_is_scored_by_token_f1_and_prompts_show_where_they_differ(tmp_path: Path) -> None:
    preamble, answer = "Below is an instruction. Answer it.", "They sleep to save energy for the night."
    samples = [
        {
            "where": f"r:{i}",
            "prompt": f"{preamble} Why do {a} sleep? Response:",
            "reference": answer,
            "generated": answer,
        }
        for i, a in enumerate(("cats", "dogs", "bears"))
    ]
    runs = [make_run(tmp_path, 1.0 + r / 50, lora__r=r, samples=samples, rows=False) for r in (4, 8)]
    page = write_report(runs, tmp_path / "out").html.read_text()
    assert "… cats …" in page
    assert preamble not in page
    assert "token F1 1.00" in page
    assert "exact_match" not in page
    assert "token_f1" in page


def test_leaderboard_scores_are_drawn_with_their_rank_correlation(grid: Path) -> None:
    runs = runs_of(grid)
    scores = {run.name: 0.5 + i / 10 for i, run in enumerate(runs[:4])}
    page = write_report(runs, grid / "out", leaderboard_scores=scores).html.read_text()
    assert "Rank correlation (Spearman)" in page
    assert "Local validation against leaderboard" in page
    with pytest.raises(DataError, match=r"lb\.zzz: no such run"):
        write_report(runs, grid / "out", leaderboard_scores={"zzz": 1.0})
    table = grid / "lb.csv"
    table.write_text(f"run,score\n{runs[0].name},0.7\n{runs[1].name},zero\n")
    with pytest.raises(DataError, match=r"lb\.csv:3: 'zero' is not a number"):
        report(ReportConfig(runs=[str(grid)], lb=str(table), out=str(grid / "out")))
    for content, message in (("run,score\na,1\na,2\n", "3: a has a score already"), ("run\na\n", "2: a column `run`")):
        table.write_text(content)
        with pytest.raises(DataError, match=message):
            report(ReportConfig(runs=[str(grid)], lb=str(table), out=str(grid / "out")))
    for key in ("lb", "numbers"):
        with pytest.raises(ConfigError, match=rf"^{key}=\S+none\.csv: no such file"):
            report(ReportConfig(runs=[str(grid)], out=str(grid / "out"), **{key: str(grid / "none.csv")}))


def test_runs_are_found_by_glob_sweep_and_output_directory(grid: Path) -> None:
    runs = runs_of(grid)
    of_rank_4 = [run for run in runs if run.name.startswith("4-")]
    assert select_runs([str(grid / "runs" / "4-*")], None, grid) == (of_rank_4, None)
    assert select_runs(str(grid), None, grid) == (runs, None)
    assert select_runs(None, None, grid) == (runs, None)
    sweep = make_sweep(grid, [trial(grid, runs[0])])
    for named in ((None, None), (None, sweep.name), ([str(sweep)], None)):
        assert select_runs(*named, grid) == ([], sweep)
    for wrong in ({"runs": ["nowhere*"]}, {"sweep": "none"}):
        with pytest.raises(ConfigError):
            select_runs(wrong.get("runs"), wrong.get("sweep"), grid)  # type: ignore[arg-type]


def test_a_moved_output_directory_keeps_its_sweeps(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_sweep(grid, [trial(grid, run, i) for i, run in enumerate(runs_of(grid))])
    moved = tmp_path_factory.mktemp("moved") / "outputs"
    shutil.move(grid, moved)
    assert len(Study(*select_runs(None, None, moved)).configurations) == 2


def test_the_command_answers_without_torch_and_with_one_sentence_where_there_is_nothing(grid: Path) -> None:
    body = "import sys; from llmft.report import main; arguments = {!r}"
    body += "\ntry: main(arguments)\nfinally: print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", body.format([f"output_dir={grid}"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("False\n")
    assert "r=4 is better than r=8" in result.stdout
    assert (grid / "report" / "report.html").is_file()
    nothing = subprocess.run(
        [sys.executable, "-m", "llmft.report", f"output_dir={grid / 'no'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert nothing.returncode == 2
    assert nothing.stderr.count("\n") == 1
