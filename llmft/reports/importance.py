"""How much of what differs between runs is due to each varied key, by Optuna's functional analysis of variance.

A random forest learns the metric from the keys' values; a key's share is that of the forest's variance which it
explains by itself (Hutter, Hoos, Leyton-Brown 2014). Noise between runs has a share of nothing, and so inflates the
others: what a key does is for the verdicts to say. Seeds and folds are replications, not keys.
"""

from __future__ import annotations

from typing import Any

from llmft.reports.configurations import Study


def importance(study: Study) -> dict[str, float]:
    """Each key's share, 0 to 1, the largest first; nothing for a single key, few configurations, or without Optuna."""
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
    of_runs = optuna.create_study()
    for c in study.configurations:
        params = {key: levels[key].index(c.values[key]) for key in study.keys}
        for value in c.sample(study.monitor).values:
            trial = optuna.trial.create_trial(params=params, distributions=distributions, value=float(value))
            of_runs.add_trial(trial)
    if len({trial.value for trial in of_runs.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares: dict[str, float] = optuna.importance.get_param_importances(of_runs, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}
