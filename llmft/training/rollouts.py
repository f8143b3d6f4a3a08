"""Samples a policy's answers at the start of a step, has them judged, and makes the step's batch of them.

They are a function of (seed, step, weights). A run stores them in `rollouts/`: for readers, and so that a run that
stops between two updates on the same answers resumes with these. Large rollouts need systems built on vLLM: here the
policy samples on the devices that train it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from llmft.config.sections import TrainConfig
from llmft.config.task import Advantage, KlWhere
from llmft.core.errors import ConfigError
from llmft.core.seeds import stream
from llmft.data.batch import Limit, MicroBatch, PolicyRows, StepBatch, collate, rows_of_step
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example
from llmft.data.messages import message_text
from llmft.metrics.judging import check_combination, combine_scores, judges_of
from llmft.model.adapters import load_trainable_state, trainable_state
from llmft.model.families import evaluating
from llmft.model.generate import decoder
from llmft.model.sampling import Draw, sample
from llmft.model.value_head import token_values
from llmft.training.objectives import policy_gradient as pg
from llmft.training.objectives.policy import PolicyGradient, token_log_probs
from llmft.training.prepare import RunInputs
from llmft.training.reward_model import host_of, load_judges
from llmft.training.rollout_batch import PerToken, RolloutBatch, advantages_and_returns
from llmft.training.tokenized_data import TokenizedData


class Rollouts:
    """Makes the batch of a step from the prompts of the training rows.

    Attributes:
        start: the trained weights before the first step; empty without a divergence from them.
    """

    def __init__(
        self,
        inputs: RunInputs,
        rows: TokenizedData,
        objective: PolicyGradient,
        model: Any,
        micro_batch: Limit,
        report: Callable[[str], None],
    ) -> None:
        """`micro_batch` limits what is computed at once; `model` is the policy before its first step, the reference.

        `report` gets a message about judges that need a base of their own. Raises ConfigError for judges that cannot be
        loaded, and for rows without prompt and answer.
        """
        config = inputs.config
        self.config, self.task, self.objective, self.micro_batch = config, config.task, objective, micro_batch
        self.rows, self.examples, self.directory = rows, rows.splits["train"], inputs.run.rollouts
        first = self.examples[0].conversation
        if [message["role"] for message in first.messages][-2:] != ["user", "assistant"]:
            raise ConfigError(
                f"task={config.task.name}: {first.where} has no prompt and answer; data={config.data.name} has none."
            )
        self.judges, trainer = judges_of(config.task.judges, "task.judges"), config.trainer
        host = host_of(model, config, inputs.located.fingerprint)
        self.models = load_judges(self.judges, "task.judges", host, report, trainer.accelerator, trainer.threads)
        self.decode = decoder(rows.tokenizer, [*config.prompt.stop, rows.ends.text])
        starting = trainable_state(model) if config.task.kl.beta > 0 else {}
        self.start = {name: tensor.clone() for name, tensor in starting.items()}
        self._prompts: dict[int, list[int]] = {}
        self._window: tuple[int, RolloutBatch] | None = None

    def batch(self, model: Any, step: int, device: torch.device) -> StepBatch:
        """The batch of optimizer step `step`; samples its answers if the step is the first of a window of updates."""
        first = step - step % self.task.updates
        if self._window is None or self._window[0] != first:
            path = self.directory / f"step-{first:08d}.parquet"
            rollout = RolloutBatch.read(path) if step != first else None
            if rollout is None:
                with evaluating(model):
                    rollout = self._draw(model, first, device)
                rollout.write(path)
            self._window = (first, rollout)
        return self._batch(self._window[1], step, device)

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the last step."""
        assert self._window is not None
        return self._window[1].metrics(self.task.group) | self.objective.step_metrics()

    # ------------------------------------------------------------------------------------------------------ judging

    def judge(self, rows: Sequence[Conversation], texts: Sequence[str]) -> np.ndarray:
        """(rows,) the judges' combined reward of an answer to each prompt."""
        return combine_scores(self.task.combine, self.judges, self._scores(rows, texts), "task.combine")

    def _scores(self, rows: Sequence[Conversation], texts: Sequence[str]) -> dict[str, list[float]]:
        """Scores by judge. Functions get users' last turns as prompts, and the rows' own answers as references."""
        prompts = [message_text(row.messages[-2]) for row in rows]
        references = [message_text(row.messages[-1]) for row in rows]
        return {
            judge.name: self.models[judge.name].scores(rows, texts)
            if judge.is_run
            else judge.scores(prompts, references, texts)
            for judge in self.judges
        }

    # ------------------------------------------------------------------------------------------------------ drawing

    @torch.no_grad()
    def _draw(self, model: Any, step: int, device: torch.device) -> RolloutBatch:
        task, seed = self.task, self.config.seed
        rows = rows_of_step(step, len(self.examples), self.config.trainer.batch_size, seed)
        draws = [
            [Draw(task.temperature, stream(seed, "rollout", step, row, number)) for number in range(task.group)]
            for row in rows
        ]
        groups = sample(
            model,
            [self._prompt(row) for row in rows],
            draws,
            pad_id=self.rows.tokenizer.pad_token_id,
            ends=self.rows.ends,
            max_new_tokens=task.max_new_tokens,
            batch_size=task.prompts_at_once,
            context_tokens=self.rows.context_tokens,
        )
        answers = [answer for group in groups for answer in group]
        row_of = [row for row in rows for _ in range(task.group)]
        texts = [self.decode(self.rows.ends.cut(answer.ids)) for answer in answers]
        scores = self._scores([self.examples[row].conversation for row in row_of], texts)
        rewards = combine_scores(task.combine, self.judges, scores, "task.combine").tolist()
        ids, finished = [answer.ids for answer in answers], [answer.finished for answer in answers]
        rollout = RolloutBatch(row_of, ids, texts, finished, rewards, scores)
        needs_values = task.advantage is Advantage.gae
        if task.updates > 1 or (task.kl.beta > 0 and task.kl.where is KlWhere.reward) or needs_values:
            rollout.old, rollout.values = self._numbers_per_token(model, rollout, device, values=needs_values)
        if self.start:
            rollout.reference = self._reference(model, rollout, device)
        return rollout

    def _reference(self, model: Any, rollout: RolloutBatch, device: torch.device) -> PerToken:
        """Log-probabilities under the starting weights; `model` gets its weights back."""
        current = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
        load_trainable_state(model, {name: self.start.get(name, tensor) for name, tensor in current.items()})
        try:
            return self._numbers_per_token(model, rollout, device, values=False)[0]
        finally:
            load_trainable_state(model, current)

    def _numbers_per_token(
        self, model: Any, rollout: RolloutBatch, device: torch.device, *, values: bool
    ) -> tuple[PerToken, PerToken]:
        """Log-probabilities, and with `values` the value head's values, of every token of every answer."""
        log_probs: PerToken = [[] for _ in rollout.ids]
        values_of_answers: PerToken = [[] for _ in rollout.ids] if values else []
        for group in self._groups(rollout):
            batch = self._plain(rollout, group).to(device)
            with token_values(model, batch, enabled=values) as heads:
                table, mask = token_log_probs(model, batch, self.task.temperature)
            tables = [(log_probs, table), *([(values_of_answers, heads.of(mask))] if values else [])]
            for answers, numbers in tables:
                for index, answer in enumerate(group):
                    answers[answer] = numbers[index][mask[index] > 0].double().cpu().tolist()
        return log_probs, values_of_answers

    # --------------------------------------------------------------------------------------------------- the batch

    def _groups(self, rollout: RolloutBatch) -> list[list[int]]:
        lengths = [len(self._prompt(row)) + len(ids) for row, ids in zip(rollout.row, rollout.ids, strict=True)]
        return self.micro_batch.groups(lengths, range(len(lengths)))

    def _prompt(self, row: int) -> list[int]:
        if row not in self._prompts:
            self._prompts[row] = list(self.rows.encoder.prompt_ids(self.examples[row].conversation))
        return self._prompts[row]

    def _plain(self, rollout: RolloutBatch, group: Sequence[int]) -> MicroBatch:
        """A batch of prompts followed by their answers, which are labelled."""
        examples = []
        for answer in group:
            prompt, ids = self._prompt(rollout.row[answer]), rollout.ids[answer]
            conversation = self.examples[rollout.row[answer]].conversation
            examples.append(Example([*prompt, *ids], [*[IGNORE] * len(prompt), *ids], conversation))
        batch = collate(examples, [rollout.row[answer] for answer in group], self.rows.tokenizer.pad_token_id)
        batch.weights = torch.ones_like(batch.weights)
        return batch

    def _batch(self, rollout: RolloutBatch, step: int, device: torch.device) -> StepBatch:
        advantages, returns = advantages_and_returns(rollout, self.task)
        old = rollout.old if self.task.updates > 1 else []
        numbers_of = {"old": old, "reference": rollout.reference, "values": rollout.values, "returns": returns}
        micro_batches = []
        for group in self._groups(rollout):
            batch = self._plain(rollout, group)
            labelled = batch.labels[:, 1:] != IGNORE
            tables = {
                name: _table([numbers[answer] for answer in group], labelled) if numbers else None
                for name, numbers in numbers_of.items()
            }
            batch.policy = PolicyRows(_table([advantages[answer] for answer in group], labelled), **tables)
            micro_batches.append(batch.to(device))
        lengths = torch.tensor([len(ids) for ids in rollout.ids])
        weight = float(pg.weights(lengths, self.task.aggregate.value, self.task.max_new_tokens).sum())
        return StepBatch(step, micro_batches, weight)


def _table(numbers: PerToken, labelled: torch.Tensor) -> torch.Tensor:
    """(rows, seq_len - 1) with each row's numbers at its labelled positions, 0 elsewhere."""
    flat = torch.tensor([value for row in numbers for value in row], dtype=torch.float32)
    return torch.zeros(labelled.shape).masked_scatter(labelled, flat)


def check_rollouts(config: TrainConfig) -> None:
    """Raises ConfigError for judges and settings that rollouts cannot use; before any weights load."""
    judges = judges_of(config.task.judges, "task.judges")
    check_combination(config.task.combine, judges, "task.combine")
    if config.trainer.devices != 1 or config.trainer.num_nodes != 1:
        raise ConfigError(f"task={config.task.name}: the policy samples on one device; set trainer.devices=1.")
    if config.task.advantage is Advantage.gae and not config.lora.enabled:
        raise ConfigError("task.advantage=gae with lora=none: the value head needs a LoRA; choose lora=default.")
