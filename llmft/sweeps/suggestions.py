"""The source of a search's trials: Optuna suggests them, prunes after validations, and receives the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmft.config.sweep import SearchConfig
from llmft.sweeps.conditions import Value
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.same_as_reference import same_as_reference_rule, validations
from llmft.sweeps.space import wanted_trials
from llmft.sweeps.study import OptunaStudy
from llmft.sweeps.supervisor import BusyTrials
from llmft.sweeps.trials import Sweep, Trial


@dataclass
class Candidate:
    """A suggested configuration: one trial per seed.

    Attributes:
        number: of its trial in the study.
        index: its number among the configurations; a repeated attempt keeps it.
        waiting: trials to run; emptied when one fails or is pruned.
        curve: step -> monitored metric of the first seed's run, on which pruning is based.
    """

    number: int
    index: int
    chosen: dict[str, Value]
    trials: list[Trial]
    waiting: list[Trial] = field(default_factory=list)
    under_way: list[Trial] = field(default_factory=list)
    curve: dict[int, float] = field(default_factory=dict)

    @property
    def first(self) -> Trial:
        """The trial on which pruning is based."""
        return self.trials[0]

    @property
    def value(self) -> float | None:
        """The mean over the seeds; None unless all have a finite value."""
        values = [trial.value for trial in self.trials if trial.status == "done"]
        if len(values) < len(self.trials) or any(v is None or not math.isfinite(v) for v in values):
            return None
        return statistics.fmean(value for value in values if value is not None)

    @property
    def keys(self) -> list[str]:
        """The keys of its runs."""
        return [trial.key for trial in self.trials]

    def read_curve(self) -> None:
        """Reads the validations of the first seed from its run directory."""
        self.curve = validations(self.first.run.directory, self.first.config.trainer.monitor)


class Search:
    """A search as a source of trials.

    Pruning is based on the run of the first seed; the other seeds are trained once it is done, and not at all if it is
    pruned. A trial interrupted by a kill keeps its number and is handed out again; a failed one is tried again once
    per start of the search.
    """

    def __init__(
        self,
        study: OptunaStudy,
        settings: SearchConfig,
        sweep: Sweep,
        progress: SweepProgress,
        make_trial: Callable[[int, dict[str, Value], int | None], Trial],
    ) -> None:
        self.study = study
        self.settings = settings
        self.sweep = sweep
        self.progress = progress
        self.make_trial = make_trial
        self.same_as_reference = same_as_reference_rule(sweep.config)
        self.workers = 1
        self.candidates: list[Candidate] = []
        self.repeated = 0
        self.num_wanted, self.points = wanted_trials(settings, study.space)
        self._of: dict[int, Candidate] = {}
        self._busy = BusyTrials()

    # ------------------------------------------------------------------------------------------------ before

    def recall(self) -> None:
        """Restores results, interrupted trials and failures to try again from the study's file."""
        known = self.study.trials
        superseded = {trial.user_attrs.get("again") for trial in known}
        for trial in known:
            if trial.number in superseded or "repeats" in trial.user_attrs:
                continue
            number, index, state = trial.number, trial.user_attrs["place"], trial.state.name
            if state == "FAIL":
                number = self.study.put(trial.params, {"place": index, "again": trial.number})
            candidate = self._candidate(number, index, dict(trial.params))
            if state in ("COMPLETE", "PRUNED"):
                self._restore(candidate, trial.user_attrs["outcome"])
            else:
                candidate.waiting = list(candidate.trials)
                self._repeat(candidate)
        repeated = sum("repeats" in trial.user_attrs for trial in known)
        self.repeated += repeated
        self.progress.ready += repeated * self.num_seeds
        self._record()

    def _restore(self, candidate: Candidate, outcome: list[dict[str, Any]]) -> None:
        for trial, result in zip(candidate.trials, outcome, strict=False):
            trial.mark(result["status"], result["error"])
            trial.value, trial.seconds = result["value"], result["seconds"]
        candidate.read_curve()
        self._drop(candidate, [trial for trial in candidate.trials if trial.status == "pending"])
        self.progress.ready += sum(trial.status != "pending" for trial in candidate.trials)

    # ------------------------------------------------------------------------------------------------ the source

    @property
    def num_seeds(self) -> int:
        """Trials per configuration."""
        return len(self.settings.seeds) if self.settings.seeds else 1

    @property
    def num_suggested(self) -> int:
        """Suggested configurations, not counting repeated attempts."""
        return sum("again" not in trial.user_attrs for trial in self.study.trials)

    def next(self) -> Trial | None:
        """A trial of a configuration already started, else of a new one."""
        while (trial := self._free()) is None:
            # No more than can be trained, since suggestions improve with the results known. With one worker all
            # results are known, even if a process left behind by a kill is still training the last trial.
            under_way = sum(bool(candidate.waiting or candidate.under_way) for candidate in self.candidates)
            if self.num_suggested >= self.num_wanted or under_way >= self.workers:
                return None
            self._ask()
        return trial

    def over(self) -> bool:
        """Whether all configurations were suggested and all their trials handed out."""
        return self.num_suggested >= self.num_wanted and not any(candidate.waiting for candidate in self.candidates)

    def ended(self, trial: Trial) -> None:
        """Stores the result in the study once all trials of the configuration have ended."""
        candidate = self._of[trial.number]
        if trial in candidate.waiting:  # it was done before, or pruned by its earlier validations
            candidate.waiting.remove(trial)
        if trial in candidate.under_way:
            candidate.under_way.remove(trial)
        if trial.status in ("busy", "pending"):  # another process is training it, or it has to be run again
            candidate.waiting.insert(0, trial)
            if trial.status == "busy":
                self._busy.add(trial)
            return
        if trial.status == "failed" and trial.run.status().get("status") == "diverged":
            trial.mark("pruned", trial.error)  # divergence is a result of the configuration, not a failure
        if trial.status != "done":
            self._drop(candidate, candidate.waiting)
        elif trial is candidate.first:  # later decisions use the whole curve
            candidate.read_curve()
            for step in sorted(candidate.curve):
                self.study.judge(candidate.number, candidate.curve, step)
        if not candidate.waiting and not candidate.under_way:
            self._tell(candidate)
        self._record()

    def decide(self, trial: Trial, step: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """(status, reason) if the pruner or early_stop_if_same_as ends the trial after this validation."""
        candidate = self._of[trial.number]
        value = metrics.get(trial.config.trainer.monitor)
        if trial is candidate.first and step > 0 and value is not None:
            candidate.curve[step] = value
            if (reason := self._judge(candidate, step)) is not None:
                return "pruned", reason
        return self.same_as_reference(trial, step, metrics)

    # ------------------------------------------------------------------------------------------------ its parts

    def _free(self) -> Trial | None:
        """The first trial that may start now."""
        for candidate in self.candidates:
            for trial in list(candidate.waiting):
                judged_first = self.settings.pruner != "none" and trial is not candidate.first
                if judged_first and candidate.first.status != "done":
                    break
                if self._busy.has(trial):
                    continue
                trial.status = "pending"
                if trial is candidate.first and not trial.run.done and not trial.config.force:
                    self._judge_earlier(candidate)
                candidate.waiting.remove(trial)
                candidate.under_way.append(trial)
                return trial
        return None

    def _ask(self) -> None:
        """Suggests one more configuration; a repeated one gets its known value."""
        index = self.num_suggested
        if self.points is not None:
            chosen = self.points[index]
            number = self.study.put(chosen, {"place": index})
        else:
            number, chosen = self.study.ask(index)
        candidate = self._candidate(number, index, chosen)
        candidate.waiting = list(candidate.trials)
        self._repeat(candidate)

    def _repeat(self, candidate: Candidate) -> None:
        """Gives a configuration the known value of an earlier one with the same runs."""
        equal = (other for other in self.candidates if other is not candidate and other.keys == candidate.keys)
        repeated = next((c for c in equal if self.study.trials[c.number].state.name in ("COMPLETE", "PRUNED")), None)
        if repeated is None:
            return
        self._drop(candidate, candidate.trials)
        self.candidates.remove(candidate)
        for step in sorted(repeated.curve):
            candidate.curve[step] = repeated.curve[step]
            self.study.judge(candidate.number, candidate.curve, step)
        state = "COMPLETE" if repeated.value is not None else "PRUNED"
        self.study.tell(candidate.number, state, repeated.value, {"repeats": repeated.number})
        self.repeated += 1
        self.progress.say(f"configuration {candidate.index + 1} repeats {repeated.index + 1}: its value is known")

    def _candidate(self, number: int, index: int, chosen: dict[str, Value]) -> Candidate:
        seeds: Sequence[int | None] = self.settings.seeds or [None]
        trials = [self.make_trial(index * len(seeds) + n, chosen, seed) for n, seed in enumerate(seeds)]
        candidate = Candidate(number, index, chosen, trials)
        self.candidates.append(candidate)
        for trial in trials:
            self.sweep.add(trial)
            self._of[trial.number] = candidate
        return candidate

    def _drop(self, candidate: Candidate, trials: list[Trial]) -> None:
        """Removes trials that will not be run."""
        for trial in list(trials):
            self.sweep.trials.remove(trial)
            self.progress.ready += 1
        candidate.waiting = []

    def _judge_earlier(self, candidate: Candidate) -> None:
        """Prunes by the validations that an unfinished run already has.

        The last one is judged when the run resumes, since only its process knows whether it ends there anyway.
        """
        candidate.read_curve()
        for step in sorted(candidate.curve)[:-1]:
            if (reason := self._judge(candidate, step)) is not None:
                candidate.first.run.update(status="pruned", error=reason)
                candidate.first.mark("pruned", reason)
                return

    def _judge(self, candidate: Candidate, step: int) -> str | None:
        if not self.study.judge(candidate.number, candidate.curve, step):
            return None
        monitor = self.sweep.config.trainer.monitor
        return f"pruned by {self.settings.pruner} after step {step}, {monitor} {candidate.curve[step]:.4f}"

    def _tell(self, candidate: Candidate) -> None:
        ran = [trial for trial in candidate.trials if trial in self.sweep.trials]
        if any(trial.status == "interrupted" for trial in ran):
            return  # it resumes with the search
        outcome = [
            {"status": t.status, "value": t.value, "error": t.error, "seconds": t.seconds, "run": t.run.directory.name}
            for t in ran
        ]
        value = candidate.value
        state = "COMPLETE" if value is not None else "FAIL"
        if not any(trial.status == "failed" for trial in ran) and any(trial.status != "done" for trial in ran):
            state = "PRUNED"
        self.study.tell(candidate.number, state, value, {"outcome": outcome})

    def _record(self) -> None:
        """Updates the sweep's record of the search."""
        settings, best = self.settings, self.best()
        keys = [parameter.key for parameter in self.study.space.parameters] + ["seed"] * bool(settings.seeds)
        overrides = [override.partition("=") for trial in self.sweep.trials for override in trial.overrides]
        self.sweep.swept = {key: list(dict.fromkeys(v for k, _, v in overrides if k == key)) for key in keys}
        self.sweep.extra["search"] = {
            "sampler": settings.sampler,
            "pruner": settings.pruner,
            "seed": settings.seed,
            "seeds": settings.seeds,
            "n_trials": self.num_wanted,
            "repeated": self.repeated,
            "space": {parameter.key: parameter.text for parameter in self.study.space.parameters},
            "conditions": settings.conditions or {},
            "best": None if best is None else {"trial": best.first.number, "value": best.value},
        }

    def best(self) -> Candidate | None:
        """The configuration with the best mean so far."""
        complete = [candidate for candidate in self.candidates if candidate.value is not None]
        sign = self.sweep.config.trainer.mode.sign
        return min(complete, key=lambda candidate: sign * (candidate.value or 0.0), default=None)
