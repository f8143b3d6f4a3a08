"""several predictions -> one: `python -m llmft.blend runs='[A,B]' method=convex`.

Weights are chosen on out-of-fold predictions, and the score told is of rows that had no part in choosing them. A blend
has predictions like a run's, so a blend can be blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.commands import BlendConfig
from llmft.config.convert import to_config
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process
from llmft.core.errors import ConfigError, did_you_mean
from llmft.core.outcome import tell_outcome


def main(argv: Sequence[str]) -> None:
    """The command."""
    run_verb("blend", BlendConfig, lambda composed, _: blend(to_config(composed, BlendConfig)), argv)


def blend(config: BlendConfig, *, quiet: bool = False) -> Path:
    """Blends the members' predictions; returns the directory written.

    Raises ConfigError or DataError naming the member that does not fit the others.
    """
    from llmft.core.console import Screen
    from llmft.evaluation import blending, scores
    from llmft.evaluation.prediction_sets import (
        ensemble_directory,
        joined,
        open_prediction_sets,
        shared_names,
        stack,
        write_ensemble,
    )
    from llmft.evaluation.submission import load_template, write_fitting
    from llmft.metrics.monitor import mode_of
    from llmft.metrics.prior import against_prior
    from llmft.runs.directory import usable
    from llmft.runs.predictions import load_predictions

    screen, template = Screen(quiet=quiet), load_template(config)

    def with_predictions(directory: Path) -> Path:
        if load_predictions(directory, config.predictions).problem == "text":
            raise ConfigError(f"{directory}: generated texts cannot be averaged.")
        return directory

    found = usable(config.runs, "runs", with_predictions, screen.warn)
    if len(found) < 2:
        raise ConfigError(f"runs={config.runs}: a blend needs two members at least.")
    members = open_prediction_sets(found, config.predictions)
    first = members[0].predictions
    blending.check_method(config.method, first.problem)
    metrics = scores.metrics_for(first, [])
    metric = _metric(config.metric, metrics)
    mode = mode_of(metric[1], metric[0], key=None)
    values, references = stack(members), scores.references_and_predictions(joined(members, first.values))[0]
    parts = _parts(members, config)

    def honest(rows: Any) -> Any:
        return blending.nested(rows, references, parts, config.method, first.problem, metric, config.steps)

    def measure(rows: Any) -> float:
        return metric[1](references, rows)

    weights = blending.choose(values, references, config.method, first.problem, metric, config.steps)
    made = {config.predictions: joined(members, honest(values))}
    for name in shared_names(found):
        if name != config.predictions:
            others = open_prediction_sets(found, name)
            made[name] = joined(others, blending.combine(stack(others), weights, config.method, first.problem))
    score = measure(made[config.predictions].values)
    all_metrics = scores.score(made[config.predictions], metrics)
    chance = against_prior(made[config.predictions], {**metrics, metric[0]: metric[1]})
    record: dict[str, Any] = {
        "method": config.method.value,
        "metric": metric[0],
        "score": score,
        "score_in_sample": measure(blending.combine(values, weights, config.method, first.problem)),
        "all_metrics": all_metrics,
        "chance": chance.to_plain() if chance is not None else None,
        "members": [
            {
                "directory": str(member.directory),
                "score": measure(member.predictions.values),
                "weight": float(weights[place]),
                "score_without": measure(honest(_without(values, place))),
            }
            for place, member in enumerate(members)
        ],
        "correlation": _correlation(values),
        "rows": len(first.ids),
        "predictions": {name: len(own.ids) for name, own in made.items()},
    }
    content = [
        config.method.value, metric[0], config.steps, config.num_folds, config.seed, config.predictions,
        [member.predictions.fingerprint for member in members],
    ]  # fmt: skip
    directory = ensemble_directory(
        Path(config.output_dir) / "blends", config.name, f"{config.method.value}-of-{len(members)}", content
    )
    after = {f"val/{name}": value for name, value in all_metrics.items()}
    write_ensemble(directory, "blend", made, record, after)
    _show(screen, directory, record, mode.sign)
    if template is not None:
        write_fitting(made, template, config.columns, directory, screen)
    tell_outcome(directory)
    return directory


def _metric(wanted: str | None, metrics: dict[str, Any]) -> tuple[str, Any]:
    """The metric that is asked for, by its name or dotted path, or the first that fits."""
    from llmft.config.instantiate import metric_functions

    if wanted is None:
        return next(iter(metrics.items()))
    if "." in wanted:
        return next(iter(metric_functions([wanted]).items()))
    if wanted not in metrics:
        raise ConfigError(f"metric={wanted}: no such metric{did_you_mean(wanted, metrics)}")
    return wanted, metrics[wanted]


def _parts(members: list[Any], config: BlendConfig) -> list[int]:
    """The part of each row for the honest score: the members' folds where they agree, else seeded ones by group."""
    from llmft.data.select import assign_folds

    told = [member.predictions.columns.get("fold") for member in members]
    if told[0] is not None and all(own == told[0] for own in told) and len(set(told[0])) > 1:
        return [int(part) for part in told[0]]
    first = members[0].predictions
    groups = first.columns.get("group")
    try:
        return assign_folds(
            first.ids,
            config.num_folds,
            config.seed,
            targets=[str(target) for target in first.targets] if first.problem == "single_label" else None,
            groups=[str(group) for group in groups] if groups is not None else None,
        )
    except ValueError as error:
        raise ConfigError(f"num_folds={config.num_folds}: {error}") from None


def _without(values: Any, place: int) -> Any:
    import numpy as np

    return np.delete(values, place, axis=0)


def _correlation(values: Any) -> list[list[float]]:
    """Pearson correlation of the members' predictions, over all rows and classes."""
    import numpy as np

    flat = values.reshape(len(values), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    spread = np.linalg.norm(centred, axis=1)
    spread[spread == 0] = 1.0  # constant predictions go with nothing
    return ((centred @ centred.T) / np.outer(spread, spread)).tolist()


def _show(screen: Any, directory: Path, record: dict[str, Any], sign: float) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    name = record["metric"]
    table = Table(title=f"{record['method']} of {record['rows']:,} rows", title_justify="left", box=box.SIMPLE_HEAD)
    for title in ("member", name, "weight", "blend without it", "it adds"):
        table.add_column(title, justify="left" if title == "member" else "right", overflow="fold")
    for member in record["members"]:
        gain = sign * (member["score_without"] - record["score"])
        table.add_row(
            escape(Path(member["directory"]).name),
            f"{member['score']:.4f}",
            f"{member['weight']:.3f}",
            f"{member['score_without']:.4f}",
            f"{gain:.4f}" if abs(gain) >= 5e-5 else "0.0000",
        )
    screen.print(table)
    lines = [" ".join(f"{value:6.3f}" for value in row) for row in record["correlation"]]
    screen.print("[bold]correlation[/bold]\n" + "\n".join(lines))
    screen.print(
        f"[bold]{name}[/bold]  {record['score']:.4f} on rows that chose no weights "
        f"({record['score_in_sample']:.4f} on those that did)",
        f"[bold]blend[/bold]  {directory}",
    )
    if record["chance"]:
        from llmft.metrics.show import show_chance

        show_chance(screen, {record["method"]: record["chance"]})


if __name__ == "__main__":
    main(arguments_of_process())
