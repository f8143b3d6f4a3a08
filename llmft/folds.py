"""runs of all folds -> out-of-fold predictions: `python -m llmft.folds`.

Every row is predicted by the one model that was not trained on it. Rows of other files, predicted by all folds, get
the mean of the folds. Writes a directory with predictions like a run's.
"""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.config.commands import FoldsConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process
from llmft.core.errors import ConfigError, DataError
from llmft.core.outcome import write_outcome

if TYPE_CHECKING:
    from llmft.config.sections import TrainConfig
    from llmft.evaluation.submission import Template
    from llmft.runs.directory import Run


def main(argv: Sequence[str]) -> None:
    run_verb("folds", FoldsConfig, lambda config, _: folds(config), argv)


def folds(config: FoldsConfig, *, quiet: bool = False) -> list[Path]:
    """Joins each set of folds that `config` names; returns the written directories.

    Raises ConfigError if a set is not complete, DataError if rows are missing or duplicated.
    """
    from llmft.core.console import Screen
    from llmft.evaluation.submission import load_template

    screen, template = Screen(quiet=quiet), load_template(config)
    named = config.runs is not None
    root = Path(config.output_dir) / "runs"
    if not named and not root.is_dir():
        raise ConfigError(f"output_dir={config.output_dir}: no runs there; name them with runs=[…].")
    patterns = config.runs if named else f"{glob.escape(str(root))}/*"
    directories = []
    for runs in _sets(patterns, screen.warn if named else lambda _: None):
        first, trained = runs[0]
        lacking = sorted(set(range(trained.data.num_folds)) - {trained.data.fold for _, trained in runs})
        if not lacking:
            directories.append(_join(sorted(runs, key=lambda run: run[1].data.fold or 0), config, screen, template))
            continue
        names, count = ",".join(map(str, lacking)), trained.data.num_folds
        text = f"{first.directory}: fold {names} of its {count} (0 to {count - 1}) is not done"
        if named:
            raise ConfigError(f"{text}; run the same command with -m data.fold={names}.")
        screen.warn(f"{text}.")
    if not directories:
        raise ConfigError("no complete set of folds: run -m data.fold=0,1,2,3,4 with a task that has a head first.")
    write_outcome(*directories)
    return directories


def _sets(named: Any, warn: Callable[[str], None]) -> list[list[Any]]:
    """Sets of finished runs that differ only in their fold."""
    from llmft.config.convert import canonical, key_fields
    from llmft.config.data import TrainOn
    from llmft.runs.directory import finished_run, open_directories
    from llmft.runs.predictions import names_in

    def of_fold(directory: Path) -> tuple[Run, TrainConfig, list[str]]:
        run, trained = finished_run(directory)
        if trained.data.train_on is TrainOn.all:
            raise ConfigError(f"{directory}: trained on all rows, so it has no out-of-fold predictions.")
        if trained.data.fold is None or "val" not in names_in(directory):
            raise ConfigError(
                f"{directory}: not a run of a fold (data.fold) with a head, so it cannot be joined: train all with "
                "-m data.fold=0,1,2,3,4 first."
            )
        return run, trained, [run.recorded("data", "rows_fingerprint"), run.recorded("model", "fingerprint")]

    sets: dict[str, list[Any]] = defaultdict(list)
    for run, trained, fingerprints in open_directories(named, "runs", of_fold, warn):
        numbers = key_fields(trained)
        numbers["data"].pop("fold")
        sets[canonical([numbers, *fingerprints, trained.data.pseudo])].append((run, trained))
    return list(sets.values())


def _join(runs: list[Any], config: FoldsConfig, screen: Any, template: Template | None) -> Path:
    import numpy as np

    from llmft.config.commands import Method
    from llmft.evaluation import prediction_sets as sets
    from llmft.evaluation.scores import metrics_for, score
    from llmft.evaluation.submission import write_fitting
    from llmft.metrics.prior import against_prior
    from llmft.runs.predictions import Predictions, load_predictions

    directories = [run.directory for run, _ in runs]
    parts = [load_predictions(directory, "val") for directory in directories]
    _check_once(runs, parts)
    out_of_fold = _concatenated(parts)
    out_of_fold = out_of_fold.at(sets.file_order(out_of_fold))
    predictions: dict[str, Predictions] = {"val": out_of_fold}
    for name in sets.shared_names(directories):
        if load_predictions(directories[0], name).problem != "text":
            recipe = sets.EnsembleRecipe(directories, [1 / len(runs)] * len(runs), Method.mean)
            predictions[name] = recipe.combined(name)
    metrics = metrics_for(out_of_fold, config.metrics)
    total, folds = score(out_of_fold, metrics), [score(part, metrics) for part in parts]
    chance = against_prior(out_of_fold, metrics)
    keys, fold = [run.key for run, _ in runs], runs[0][1].data.fold
    default = directories[0].name.rpartition("-")[0].replace(f"-fold{fold}", "")
    root = Path(config.output_dir) / "folds"
    directory = sets.ensemble_directory(root, config.name, default, [keys, sorted(metrics)])
    record = {
        "runs": [str(run) for run in directories],
        "keys": keys,
        "rows": len(out_of_fold.ids),
        "score": total,
        "folds": folds,
        "spread": {name: float(np.std([scores[name] for scores in folds], ddof=1)) for name in total},
        "chance": chance,
        "predictions": {name: len(split.ids) for name, split in predictions.items()},
    }
    after = {f"val/{name}": value for name, value in total.items()}
    sets.write_ensemble(directory, "folds", predictions, record, after)
    _show(screen, directory, record)
    if template is not None:
        write_fitting(predictions, template, config.columns, directory, screen)
    return directory


def _check_once(runs: list[Any], parts: list[Any]) -> None:
    """Raises DataError unless every row of the data is held out and predicted in exactly one fold."""
    seen = Counter(row for part in parts for row in part.ids)
    twice = [row for row, count in seen.items() if count > 1]
    if twice:
        raise DataError(f"{runs[0][0].directory}: {len(twice)} rows are in two folds (first: {twice[0]}).")
    for (run, _), part in zip(runs, parts, strict=True):
        if part.labels != parts[0].labels:
            raise DataError(f"{run.directory}: its classes or their order differ from those of fold 0.")
        lost = part.provenance["held_out_rows"] - len(part.ids)
        if lost:
            raise DataError(
                f"{run.directory}: {lost} of its {part.provenance['held_out_rows']} held-out rows were not predicted "
                "(length limits or bad rows left them out); cut rows instead (data.truncation=cut_prompt_left)."
            )
    total = {part.provenance["all_rows"] for part in parts}
    if total != {len(seen)}:
        raise DataError(f"{runs[0][0].directory}: {len(seen)} rows in all folds, but the data has {sorted(total)}.")


def _concatenated(parts: list[Any]) -> Any:
    import numpy as np

    from llmft.runs.predictions import Predictions

    first = parts[0]
    provenance = {
        "sources": [source for part in parts for source in part.provenance["sources"]],
        "id_column": first.provenance.get("id_column"),
    }
    return Predictions(
        [row for part in parts for row in part.ids],
        first.labels,
        np.concatenate([part.values for part in parts]),
        first.problem,
        [target for part in parts for target in part.targets],
        {name: [value for part in parts for value in part.columns[name]] for name in first.columns},
        provenance,
    )


def _show(screen: Any, directory: Path, record: dict[str, Any]) -> None:
    from llmft.core.console import text_table
    from llmft.metrics.show import show_chance

    folds, chance = record["folds"], record["chance"]
    head = ["metric", "all rows", *(f"fold {number}" for number in range(len(folds))), "spread", "prior"]
    rows = []
    for name, value in record["score"].items():
        prior = chance["metrics"][name] if chance else None
        numbers = [value, *(scores[name] for scores in folds), record["spread"][name], prior]
        rows.append([name, *("" if number is None else f"{number:.4f}" for number in numbers)])
    screen.print(text_table(head, rows, "out of fold"))
    show_chance(screen, {"out of fold": chance} if chance else {})
    screen.print(f"[bold]folds[/bold]  {directory}")


if __name__ == "__main__":
    main(arguments_of_process())
