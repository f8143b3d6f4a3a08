"""The share of the variance between runs explained by each varied key, by Optuna's functional ANOVA.

A random forest predicts the metric from the keys' values; a key's share is the part of the forest's variance that it
explains by itself (Hutter, Hoos, Leyton-Brown 2014). Noise between runs has no share of its own and inflates the
others, so only the verdicts say whether a key has an effect. Seeds and folds are replications, not keys.
"""

from __future__ import annotations

from typing import Any

from llmft.reports.configurations import Study


def importance(study: Study) -> dict[str, float]:
    """Each key's share, 0 to 1, largest first; empty for one key, fewer than 4 configurations, or without Optuna."""
    if len(study.keys) < 2 or len(study.configurations) < 4:
        return {}
    try:
        import optuna
    except ImportError:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    levels = {key: study.values_of(key) for key in study.keys}
    distributions: dict[str, Any] = {
        key: optuna.distributions.IntDistribution(0, len(values)) for key, values in levels.items()
    }
    study_of_runs = optuna.create_study()
    for c in study.configurations:
        params = {key: levels[key].index(c.values[key]) for key in study.keys}
        for value in c.sample(study.monitor).values:
            trial = optuna.trial.create_trial(params=params, distributions=distributions, value=float(value))
            study_of_runs.add_trial(trial)
    if len({trial.value for trial in study_of_runs.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares: dict[str, float] = optuna.importance.get_param_importances(study_of_runs, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}
