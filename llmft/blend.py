"""several predictions -> one: `python -m llmft.blend runs='[A,B]' method=convex`.

Weights are fitted on out-of-fold predictions, and the reported score is cross-validated: each row's weights are fitted
without it. A blend has predictions like a run's, so blends can be blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.config.commands import BlendConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process
from llmft.core.errors import ConfigError, did_you_mean
from llmft.core.outcome import write_outcome

if TYPE_CHECKING:
    from llmft.evaluation.blending import Blender


def main(argv: Sequence[str]) -> None:
    run_verb("blend", BlendConfig, lambda config, _: blend(config), argv)


def blend(config: BlendConfig, *, quiet: bool = False) -> Path:
    """Blends the members' predictions; returns the written directory.

    Raises ConfigError or DataError that names the member that does not match the others.
    """
    from llmft.core.console import Screen
    from llmft.evaluation import blending, scores
    from llmft.evaluation import prediction_sets as sets
    from llmft.evaluation.submission import load_template, write_fitting
    from llmft.metrics.monitor import mode_of
    from llmft.metrics.prior import against_prior

    screen, template, method = Screen(quiet=quiet), load_template(config), config.method
    directories = _members(config, screen)
    members = sets.open_prediction_sets(directories, config.predictions)
    first = members[0].predictions
    metrics = scores.metrics_for(first, [])
    name, metric = _metric(config.metric, metrics)
    blender = blending.Blender(method, first.problem, name, metric, config.steps)
    mode = mode_of(metric, name, key=None)
    values, references = sets.stack(members), scores.references_and_predictions(sets.joined(members, first.values))[0]
    parts = _parts(members, config)
    weights = blender.weights(values, references)
    out_of_fold = sets.joined(members, blender.out_of_fold(values, references, parts))
    recipe = sets.EnsembleRecipe(directories, weights.tolist(), method)
    others = (other for other in sets.shared_names(directories) if other != config.predictions)
    blended = {config.predictions: out_of_fold, **{other: recipe.combined(other) for other in others}}
    all_metrics = scores.score(out_of_fold, metrics)
    record = {
        **_record(blender, members, values, references, parts, weights, out_of_fold),
        "all_metrics": all_metrics,
        "chance": against_prior(out_of_fold, {**metrics, name: metric}),
        "predictions": {name: len(predictions.ids) for name, predictions in blended.items()},
    }
    fingerprints = [member.predictions.fingerprint for member in members]
    default, root = f"{method.value}-of-{len(members)}", Path(config.output_dir) / "blends"
    identity = [method.value, name, config.steps, config.num_folds, config.seed, config.predictions, fingerprints]
    directory = sets.ensemble_directory(root, config.name, default, identity)
    sets.write_ensemble(directory, "blend", blended, record, {f"val/{key}": v for key, v in all_metrics.items()})
    _show(screen, directory, record, mode.sign)
    if template is not None:
        write_fitting(blended, template, config.columns, directory, screen)
    write_outcome(directory)
    return directory


def _record(
    blender: Blender, members: list[Any], values: Any, references: Any, parts: list[int], weights: Any, blended: Any
) -> dict[str, Any]:
    """Scores, members and correlations of a blend; `values` are the members' predictions, stacked."""
    import numpy as np

    from llmft.evaluation import blending

    metric = blender.metric

    def score_without(index: int) -> float:
        return metric(references, blender.out_of_fold(np.delete(values, index, axis=0), references, parts))

    return {
        "method": blender.method.value,
        "metric": blender.name,
        "score": metric(references, blended.values),
        "score_in_sample": metric(references, blending.combine(values, weights, blender.method, blender.problem)),
        "members": [
            {
                "directory": str(member.directory),
                "score": metric(references, member.predictions.values),
                "weight": float(weights[index]),
                "score_without": score_without(index),
            }
            for index, member in enumerate(members)
        ],
        "correlation": _correlation(values),
        "rows": len(members[0].predictions.ids),
    }


def _members(config: BlendConfig, screen: Any) -> list[Path]:
    from llmft.runs.directory import open_directories
    from llmft.runs.predictions import load_predictions

    def with_predictions(directory: Path) -> Path:
        if load_predictions(directory, config.predictions).problem == "text":
            raise ConfigError(f"{directory}: generated texts cannot be averaged.")
        return directory

    directories = open_directories(config.runs, "runs", with_predictions, screen.warn)
    if len(directories) < 2:
        raise ConfigError(f"runs={config.runs}: a blend needs at least two members.")
    return directories


def _metric(name: str | None, metrics: dict[str, Any]) -> tuple[str, Any]:
    """(name, function) of the metric given by name or dotted path; by default the first of `metrics`."""
    from llmft.config.instantiate import metric_functions

    if name is None:
        return next(iter(metrics.items()))
    if "." in name:
        return next(iter(metric_functions([name]).items()))
    if name not in metrics:
        raise ConfigError(f"metric={name}: no such metric{did_you_mean(name, metrics)}")
    return name, metrics[name]


def _parts(members: list[Any], config: BlendConfig) -> list[int]:
    """The cross-validation part of each row: the members' folds if they agree, else random ones by group."""
    from llmft.data.select import assign_folds

    folds = [member.predictions.columns.get("fold") for member in members]
    if folds[0] is not None and all(fold == folds[0] for fold in folds) and len(set(folds[0])) > 1:
        return [int(part) for part in folds[0]]
    first = members[0].predictions
    groups = first.columns.get("group")
    targets = [str(target) for target in first.targets] if first.problem == "single_label" else None
    groups = [str(group) for group in groups] if groups is not None else None
    try:
        return assign_folds(first.ids, config.num_folds, config.seed, targets=targets, groups=groups)
    except ValueError as error:
        raise ConfigError(f"num_folds={config.num_folds}: {error}") from None


def _correlation(values: Any) -> list[list[float]]:
    """Pearson correlation of the members' predictions, over all rows and classes."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # constant predictions have no correlation
        return np.nan_to_num(np.corrcoef(values.reshape(len(values), -1))).tolist()


def _show(screen: Any, directory: Path, record: dict[str, Any], sign: float) -> None:
    from llmft.core.console import text_table
    from llmft.metrics.show import show_chance

    rows = []
    for member in record["members"]:
        gain = sign * (member["score_without"] - record["score"])
        numbers = [f"{member['score']:.4f}", f"{member['weight']:.3f}", f"{member['score_without']:.4f}"]
        rows.append([Path(member["directory"]).name, *numbers, f"{gain if abs(gain) >= 5e-5 else 0:.4f}"])
    head = ["member", record["metric"], "weight", "blend without it", "gain"]
    screen.print(text_table(head, rows, f"{record['method']} of {record['rows']:,} rows"))
    lines = [" ".join(f"{value:6.3f}" for value in row) for row in record["correlation"]]
    screen.print("[bold]correlation[/bold]\n" + "\n".join(lines))
    screen.print(
        f"[bold]{record['metric']}[/bold]  {record['score']:.4f} cross-validated "
        f"(in-sample: {record['score_in_sample']:.4f})",
        f"[bold]blend[/bold]  {directory}",
    )
    show_chance(screen, {record["method"]: record["chance"]} if record["chance"] else {})


if __name__ == "__main__":
    main(arguments_of_process())
