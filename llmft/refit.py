"""validated runs -> a run on all rows: `python -m llmft.refit runs=DIR`.

It takes as many steps as the best validated run had at its best validation (for folds, their mean), so that with the
held-out rows it sees each row slightly less often. Its validation metrics are blank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmft.config.commands import RefitConfig
from llmft.config.data import TrainOn
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import Invocation, arguments_of_process
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Export
from llmft.config.untrusted import stored_config
from llmft.core.errors import ConfigError
from llmft.core.machine import set_cuda_variables


def main(argv: Sequence[str]) -> None:
    set_cuda_variables()
    run_verb("refit", RefitConfig, lambda config, invocation: refit(config, invocation=invocation), argv)


def refit(config: RefitConfig, *, invocation: Invocation) -> None:
    """Trains the runs' config on all rows.

    Raises ConfigError where the runs have no validation, or different configs.
    """
    from llmft.core.console import Screen
    from llmft.training.run import train

    train(refit_config(config, Screen().warn), invocation=invocation)


def refit_config(config: RefitConfig, warn: Callable[[str], None] = print) -> TrainConfig:
    """The config of the run on all rows; `warn` gets messages about unusable directories of a glob."""
    from llmft.config.convert import canonical, key_fields
    from llmft.config.untrusted import check_inside
    from llmft.runs.directory import finished_run, open_directories

    def validated(directory: Path) -> tuple[Any, TrainConfig]:
        file = directory / "config.yaml"
        if file.is_file() and stored_config(file).data.train_on is TrainOn.all:
            raise ConfigError(f"{directory}: trained on all rows, so nothing validated it; name the validated run.")
        return finished_run(directory)

    runs = open_directories(config.runs, "runs", validated, warn)
    setups = []
    for _, trained in runs:
        numbers = key_fields(trained)
        numbers["data"].pop("fold")
        numbers.pop("seed")
        setups.append(canonical(numbers))
    different = next((run for (run, _), setup in zip(runs, setups, strict=True) if setup != setups[0]), None)
    if different is not None:
        other = runs[0][0].directory.name
        raise ConfigError(f"{different.directory}: its config differs from {other}'s in more than seed and fold.")
    best, trained = min(runs, key=_rank)
    is_folds = len(runs) > 1 and all(each.data.fold is not None for _, each in runs)
    counted = [run for run, _ in runs] if is_folds else [best]
    best_steps = [int(run.status()["result"]["step"]) for run in counted]
    steps = max(1, round(sum(max(1, step) for step in best_steps) / len(counted)))
    unlearned = [run.directory.name for run, step in zip(counted, best_steps, strict=True) if not step]
    if unlearned:
        warn(
            f"{', '.join(unlearned)}: best before its first step, so training made it worse; check it before you refit."
        )
    check_inside(trained.trainer.callbacks, "trainer.callbacks")
    if config.logger is None:  # another logger replaces them
        check_inside(trained.logger.loggers, "logger.loggers")
    return replace(
        trained,
        data=replace(trained.data, train_on=TrainOn.all, fold=None),
        trainer=replace(trained.trainer, max_steps=steps, validate_every=steps, patience=None, export=Export.last),
        logger=config.logger or trained.logger,
        trusted_packages=config.trusted_packages,
        output_dir=config.output_dir or str(best.directory.parent.parent),
        progress=config.progress,
        force=False,
        name=None,
        notes=f"all rows, {steps} steps as in {', '.join(run.directory.name for run, _ in runs)}",
    )


def _rank(run: tuple[Any, TrainConfig]) -> float:
    from llmft.metrics.monitor import mode_of, named_metric

    trainer = run[1].trainer
    value = run[0].status().get("result", {}).get("after", {}).get(trainer.monitor)
    if value is None:
        raise ConfigError(f"{run[0].directory}: its validation has no {trainer.monitor} to compare it by.")
    metric = named_metric(trainer.monitor, run[1].task.metrics)
    # A run with the wrong trainer.mode kept its worst step, which a refit must not use.
    mode = mode_of(metric, trainer.monitor, trainer.mode, key=f"{run[0].config_file}: trainer.mode")
    return mode.sign * float(value)


if __name__ == "__main__":
    main(arguments_of_process())
