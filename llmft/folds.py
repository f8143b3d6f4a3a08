"""runs of all folds -> out-of-fold predictions: `python -m llmft.folds`.

Every row is predicted by the one model that did not see it. Rows of other files, which all folds predicted, get the
mean of the folds. What is written is a directory with predictions like a run's.
"""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.config.commands import FoldsConfig
from llmft.config.convert import to_config
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process
from llmft.core.errors import ConfigError, DataError
from llmft.core.outcome import tell_outcome

if TYPE_CHECKING:
    from llmft.config.sections import TrainConfig
    from llmft.evaluation.submission import Template
    from llmft.runs.directory import Run


def main(argv: Sequence[str]) -> None:
    """The command."""
    run_verb("folds", FoldsConfig, lambda composed, _: folds(to_config(composed, FoldsConfig)), argv)


def folds(config: FoldsConfig, *, quiet: bool = False) -> list[Path]:
    """Joins every set of folds that `config` names; returns the directories written.

    Raises ConfigError where a set is not complete, DataError where rows are missing or seen twice.
    """
    from llmft.core.console import Screen
    from llmft.evaluation.submission import load_template

    screen = Screen(quiet=quiet)
    template = load_template(config)
    asked = config.runs is not None
    root = Path(config.output_dir) / "runs"
    if not asked and not root.is_dir():
        raise ConfigError(f"output_dir={config.output_dir}: no runs there; name them with runs=[…].")
    directories = []
    for runs in _sets(
        config.runs if asked else f"{glob.escape(str(root))}/*", screen.warn if asked else lambda _: None
    ):
        lacking = sorted(set(range(runs[0][1].data.num_folds)) - {trained.data.fold for _, trained in runs})
        if lacking:
            names = ",".join(map(str, lacking))
            count = runs[0][1].data.num_folds
            text = f"{runs[0][0].directory}: fold {names} of its {count} (0 to {count - 1}) is not done"
            if asked:
                raise ConfigError(f"{text}; run the same command with -m data.fold={names}.")
            screen.warn(f"{text}.")
            continue
        directories.append(_join(sorted(runs, key=lambda run: run[1].data.fold or 0), config, screen, template))
    if not directories:
        raise ConfigError("no complete set of folds: run -m data.fold=0,1,2,3,4 with a task that has a head first.")
    tell_outcome(*directories)
    return directories


def _sets(named: Any, warn: Callable[[str], None]) -> list[list[Any]]:
    """Finished runs with folds, those together that differ in nothing else."""
    from llmft.config.convert import canonical, numbers_of
    from llmft.config.sections import TrainOn
    from llmft.runs.directory import finished_run, usable
    from llmft.runs.predictions import names_in

    def of_fold(directory: Path) -> tuple[Run, TrainConfig, list[str]]:
        run, trained = finished_run(directory)
        if trained.data.train_on is TrainOn.all:
            raise ConfigError(f"{directory}: trained on all rows, so none is out of fold.")
        if trained.data.fold is None or "val" not in names_in(directory):
            raise ConfigError(
                f"{directory}: no run of a fold (data.fold) with a head, so nothing to join: train all with "
                "-m data.fold=0,1,2,3,4 first."
            )
        return run, trained, [run.fact("data", "rows_fingerprint"), run.fact("model", "fingerprint")]

    sets: dict[str, list[Any]] = defaultdict(list)
    for run, trained, record in usable(named, "runs", of_fold, warn):
        numbers = numbers_of(trained)
        numbers["data"].pop("fold")
        setup = [numbers, *record, trained.data.pseudo]
        sets[canonical(setup)].append((run, trained))
    return list(sets.values())


def _join(runs: list[Any], config: FoldsConfig, screen: Any, template: Template | None) -> Path:
    import numpy as np

    from llmft.config.commands import Method
    from llmft.evaluation.prediction_sets import (
        EnsembleRecipe,
        ensemble_directory,
        file_order,
        shared_names,
        write_ensemble,
    )
    from llmft.evaluation.scores import metrics_for, score
    from llmft.evaluation.submission import write_fitting
    from llmft.metrics.prior import against_prior
    from llmft.runs.predictions import Predictions, load_predictions

    parts = [load_predictions(run.directory, "val") for run, _ in runs]
    _check_once(runs, parts)
    whole = _chained(parts)
    whole = whole.at(file_order(whole))
    predictions: dict[str, Predictions] = {"val": whole}
    directories = [run.directory for run, _ in runs]
    for name in shared_names(directories):
        if load_predictions(directories[0], name).problem != "text":
            predictions[name] = EnsembleRecipe(directories, [1 / len(runs)] * len(runs), Method.mean).combined(name)
    metrics = metrics_for(whole, config.metrics)
    total, each = score(whole, metrics), [score(part, metrics) for part in parts]
    spread = {name: float(np.std([scores[name] for scores in each], ddof=1)) for name in total}
    chance = against_prior(whole, metrics)
    trained = runs[0][1]
    default = runs[0][0].directory.name.rpartition("-")[0].replace(f"-fold{trained.data.fold}", "")
    directory = ensemble_directory(
        Path(config.output_dir) / "folds", config.name, default, [[run.key for run, _ in runs], sorted(metrics)]
    )
    record = {
        "runs": [str(run.directory) for run, _ in runs],
        "keys": [run.key for run, _ in runs],
        "rows": len(whole.ids),
        "score": total,
        "folds": each,
        "spread": spread,
        "chance": chance.to_plain() if chance is not None else None,
        "predictions": {name: len(split.ids) for name, split in predictions.items()},
    }
    write_ensemble(directory, "folds", predictions, record, {f"val/{name}": value for name, value in total.items()})
    _show(screen, directory, record)
    if template is not None:
        write_fitting(predictions, template, config.columns, directory, screen)
    return directory


def _check_once(runs: list[Any], parts: list[Any]) -> None:
    """Every row of the data is held out in exactly one fold, and predicted there."""
    seen = Counter(row for part in parts for row in part.ids)
    twice = [row for row, count in seen.items() if count > 1]
    if twice:
        raise DataError(f"{runs[0][0].directory}: {len(twice)} rows are in two folds ({twice[0]} first).")
    for (run, _), part in zip(runs, parts, strict=True):
        if part.labels != parts[0].labels:
            raise DataError(f"{run.directory}: its classes are not those of fold 0 in the same order.")
        lost = part.facts["held_out_rows"] - len(part.ids)
        if lost:
            raise DataError(
                f"{run.directory}: {lost} of its {part.facts['held_out_rows']} held-out rows were not predicted "
                "(length limits or bad rows left them out); cut rows instead (data.truncation=cut_prompt_left)."
            )
    total = {part.facts["all_rows"] for part in parts}
    if total != {len(seen)}:
        raise DataError(f"{runs[0][0].directory}: {len(seen)} rows in all folds, but the data has {sorted(total)}.")


def _chained(parts: list[Any]) -> Any:
    import numpy as np

    from llmft.runs.predictions import Predictions

    first = parts[0]
    return Predictions(
        [row for part in parts for row in part.ids],
        first.labels,
        np.concatenate([part.values for part in parts]),
        first.problem,
        [target for part in parts for target in part.targets],
        {name: [value for part in parts for value in part.columns[name]] for name in first.columns},
        {
            "sources": [source for part in parts for source in part.facts["sources"]],
            "id_column": first.facts.get("id_column"),
        },
    )


def _show(screen: Any, directory: Path, record: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    each, spread, chance = record["folds"], record["spread"], record["chance"]

    table = Table(title="out of fold", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for title in ("all rows", *(f"fold {number}" for number in range(len(each))), "spread", "prior"):
        table.add_column(title, justify="right")
    for name, value in record["score"].items():
        numbers = [value, *(scores[name] for scores in each), spread[name], chance["metrics"][name] if chance else None]
        table.add_row(name, *("" if number is None else f"{number:.4f}" for number in numbers))
    screen.print(table)
    if chance:
        from llmft.metrics.show import show_chance

        show_chance(screen, {"out of fold": chance})
    screen.print(f"[bold]folds[/bold]  {directory}")


if __name__ == "__main__":
    main(arguments_of_process())
