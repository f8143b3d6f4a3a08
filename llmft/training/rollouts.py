"""The answers that a policy draws at the start of a step, how they are judged, and the batch that is learned from them.

They are a function of (seed, step, weights). A run keeps them in `rollouts/`: for people, and so that a run that stops
between two updates on the same answers goes on with these. Large rollouts belong to systems around vLLM: here the
policy writes on the devices that train it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmft.config.sections import Advantage, KlWhere, TaskConfig, TrainConfig
from llmft.core.errors import ConfigError, DataError
from llmft.core.files import staged_file
from llmft.core.seeds import stream
from llmft.data.batch import Limit, MicroBatch, PolicyRows, StepBatch, collate, rows_of_step
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE, Example
from llmft.data.messages import message_text
from llmft.metrics.judging import Judge, check_combination, combine_scores, judges_of
from llmft.model.adapters import load_trainable_state, trainable_state
from llmft.model.sampling import Draw, sample
from llmft.model.value_head import token_values
from llmft.runs.directory import Run
from llmft.runs.predictions import read_table
from llmft.training.objectives import policy_gradient as pg
from llmft.training.objectives.policy import PolicyGradient, token_log_probs
from llmft.training.reward_model import RewardModel

Judging = Callable[[Sequence[Conversation], Sequence[str]], dict[str, list[float]]]
"""From prompts and an answer to each to each judge's scores."""


@dataclass
class Drawn:
    """The answers to one window's prompts, a row each; those of one prompt stand together.

    Attributes:
        rows: of each answer its prompt's row in the training split.
        ids: of each answer its tokens, with its end.
        old, reference, values: of each answer a number per token; what is not needed is empty.
    """

    rows: list[int]
    ids: list[list[int]]
    texts: list[str]
    finished: list[bool]
    scores: dict[str, list[float]]
    rewards: list[float]
    old: list[list[float]] = field(default_factory=list)
    reference: list[list[float]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)


class Rollouts:
    """Makes the batch of a step from the prompts that the data gives it.

    Args:
        rows_of_step: the training rows of a step.
        judging: scores answers.
        directory: the run's, which keeps what was drawn.
        micro_batch: what is computed at once.
        pad_id, context_tokens: of the model.
    """

    def __init__(
        self,
        task: TaskConfig,
        judges: Sequence[Judge],
        judging: Judging,
        *,
        seed: int,
        examples: Sequence[Example],
        rows_of_step: Callable[[int], list[int]],
        encoder: Encoder,
        decode: Callable[[list[int]], str],
        objective: PolicyGradient,
        directory: Path,
        micro_batch: Limit,
        pad_id: int,
        context_tokens: int | None,
    ) -> None:
        self.task, self.judges, self.judging, self.seed = task, judges, judging, seed
        self.examples, self.rows_of_step, self.encoder, self.decode = examples, rows_of_step, encoder, decode
        self.objective, self.directory, self.micro_batch = objective, directory, micro_batch
        self.pad_id, self.context_tokens = pad_id, context_tokens
        self.start: dict[str, torch.Tensor] = {}
        self._prompts: dict[int, list[int]] = {}
        self._window: tuple[int, Drawn] | None = None

    def begin(self, model: Any) -> None:
        """Notes the reference: the policy as it is before the first step; call before a checkpoint is restored."""
        if self.task.kl.beta > 0:
            self.start = {name: tensor.clone() for name, tensor in trainable_state(model).items()}

    def batch(self, model: Any, step: int, device: torch.device) -> StepBatch:
        """The batch of optimizer step `step`, whose answers are drawn now where a window of updates begins."""
        first = step - step % self.task.updates
        if self._window is None or self._window[0] != first:
            path = self.directory / f"step-{first:08d}.parquet"
            drawn = read_drawn(path) if step != first else None
            if drawn is None:
                training = model.training
                model.eval()
                try:
                    drawn = self._draw(model, first, device)
                finally:
                    model.train(training)
                write_drawn(path, drawn)
            self._window = (first, drawn)
        return self._batch(self._window[1], step, device)

    def told(self) -> dict[str, float]:
        """Numbers of the step that was taken last."""
        assert self._window is not None
        return told_of(self._window[1], self.task) | self.objective.step_metrics()

    def judge(self, rows: Sequence[Conversation], texts: Sequence[str]) -> np.ndarray:
        """(rows,) what the judges together say of an answer to each prompt."""
        return combine_scores(self.task.combine, self.judges, self.judging(rows, texts), "task.combine")

    # ------------------------------------------------------------------------------------------------------ drawing

    @torch.no_grad()
    def _draw(self, model: Any, step: int, device: torch.device) -> Drawn:
        rows = self.rows_of_step(step)
        conversations = [self.examples[row].conversation for row in rows]
        prompts = [self._prompt(row) for row in rows]
        draws = [
            [
                Draw(self.task.temperature, stream(self.seed, "rollout", step, row, number))
                for number in range(self.task.group)
            ]
            for row in rows
        ]
        found = sample(
            model,
            prompts,
            draws,
            pad_id=self.pad_id,
            ends=self.encoder.ends,
            max_new_tokens=self.task.max_new_tokens,
            batch_size=self.task.prompts_at_once,
            context_tokens=self.context_tokens,
        )
        answers = [answer for own in found for answer in own]
        ids = [answer.ids for answer in answers]
        texts = [self.decode(self.encoder.ends.cut(own)) for own in ids]
        repeated = [conversation for conversation in conversations for _ in range(self.task.group)]
        scores = self.judging(repeated, texts)
        rewards = combine_scores(self.task.combine, self.judges, scores, "task.combine").tolist()
        drawn = Drawn(
            [row for row in rows for _ in range(self.task.group)],
            ids,
            texts,
            [answer.finished for answer in answers],
            scores,
            rewards,
        )
        needs_value = self.task.advantage is Advantage.gae
        if self.task.updates > 1 or (self.task.kl.beta > 0 and self.task.kl.where is KlWhere.reward) or needs_value:
            drawn.old, drawn.values = self._known(model, drawn, device, values=needs_value)
        if self.start:
            now = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
            shared = {name: self.start.get(name, tensor) for name, tensor in now.items()}
            load_trainable_state(model, shared)
            try:
                drawn.reference, _ = self._known(model, drawn, device, values=False)
            finally:
                load_trainable_state(model, now)
        return drawn

    def _known(
        self, model: Any, drawn: Drawn, device: torch.device, *, values: bool
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probabilities, and values where asked, of every token of every answer."""
        log_probs: list[list[float]] = [[] for _ in drawn.ids]
        expected: list[list[float]] = [[] for _ in drawn.ids]
        for group in self._groups(drawn):
            batch = self._plain(drawn, group).to(device)
            with token_values(model, batch, enabled=values) as found:
                table, mask = token_log_probs(model, batch)
            worth = found.of(mask) if values else None
            for place, row in enumerate(group):
                kept = mask[place] > 0
                log_probs[row] = table[place][kept].double().cpu().tolist()
                if worth is not None:
                    expected[row] = worth[place][kept].double().cpu().tolist()
        return log_probs, expected if values else []

    # --------------------------------------------------------------------------------------------------- the batch

    def _groups(self, drawn: Drawn) -> list[list[int]]:
        lengths = [len(self._prompt(row)) + len(ids) for row, ids in zip(drawn.rows, drawn.ids, strict=True)]
        return self.micro_batch.groups(lengths, range(len(lengths)))

    def _prompt(self, row: int) -> list[int]:
        if row not in self._prompts:
            self._prompts[row] = list(self.encoder.prompt_ids(self.examples[row].conversation))
        return self._prompts[row]

    def _plain(self, drawn: Drawn, group: Sequence[int]) -> MicroBatch:
        """Answers behind their prompts, labelled."""
        made = []
        for place in group:
            prompt, ids = self._prompt(drawn.rows[place]), drawn.ids[place]
            conversation = self.examples[drawn.rows[place]].conversation
            made.append(Example([*prompt, *ids], [*[IGNORE] * len(prompt), *ids], conversation))
        batch = collate(made, [drawn.rows[place] for place in group], self.pad_id)
        batch.weights = torch.ones_like(batch.weights)
        return batch

    def _batch(self, drawn: Drawn, step: int, device: torch.device) -> StepBatch:
        advantages, returns = learned_from(drawn, self.task)
        old = drawn.old if self.task.updates > 1 else []
        known = {"old": old, "reference": drawn.reference, "values": drawn.values, "returns": returns}
        micro_batches = []
        for group in self._groups(drawn):
            batch = self._plain(drawn, group)
            labelled = batch.labels[:, 1:] != IGNORE
            tables = {
                name: _table([numbers[place] for place in group], labelled) if numbers else None
                for name, numbers in known.items()
            }
            batch.policy = PolicyRows(_table([advantages[place] for place in group], labelled), **tables)
            micro_batches.append(batch.to(device))
        lengths = torch.tensor([len(ids) for ids in drawn.ids])
        weight = float(pg.weights(lengths, self.task.aggregate.value, self.task.max_new_tokens).sum())
        return StepBatch(step, micro_batches, weight)


def _table(numbers: Sequence[Sequence[float]], labelled: torch.Tensor) -> torch.Tensor:
    """(rows, seq_len - 1) with each row's numbers at its labelled places."""
    flat = torch.tensor([value for own in numbers for value in own], dtype=torch.float32)
    return torch.zeros(labelled.shape).masked_scatter(labelled, flat)


def learned_from(drawn: Drawn, task: TaskConfig) -> tuple[list[list[float]], list[list[float]]]:
    """Each answer's advantages, a number per token, and what the value head should have said; [] without one."""
    rewards = torch.tensor(drawn.rewards, dtype=torch.float64)
    held = task.kl.beta if task.kl.where is KlWhere.reward else 0.0
    drift = [
        [task.kl.beta * d for d in pg.kl(torch.tensor(a), torch.tensor(b), task.kl.estimator.value).tolist()]
        if held
        else [0.0] * len(ids)
        for a, b, ids in zip(drawn.old or drawn.ids, drawn.reference or drawn.ids, drawn.ids, strict=True)
    ]
    if task.advantage is not Advantage.gae:
        rewards = rewards - torch.tensor([sum(own) for own in drift], dtype=torch.float64)
        found = pg.advantages(rewards.view(-1, task.group), task.advantage.value).flatten().tolist()
        return [[value] * len(ids) for value, ids in zip(found, drawn.ids, strict=True)], []
    most = max(map(len, drawn.ids))
    mask = torch.tensor([[1.0] * len(ids) + [0.0] * (most - len(ids)) for ids in drawn.ids], dtype=torch.float64)
    values = torch.tensor([own + [0.0] * (most - len(own)) for own in drawn.values], dtype=torch.float64)
    paid = -torch.tensor([own + [0.0] * (most - len(own)) for own in drift], dtype=torch.float64)
    ends = mask.sum(-1).long() - 1
    paid[torch.arange(len(paid)), ends] += rewards
    estimates = pg.gae(paid, values, mask, task.gamma, task.decay)
    returns = estimates + values
    # Over the tokens of the whole step (as in all of PPO's implementations, arXiv:2005.12729).
    mean = estimates.sum() / mask.sum()
    spread = (((estimates - mean) ** 2 * mask).sum() / mask.sum()).sqrt()
    whitened = (estimates - mean) / (spread + 1e-8)
    lengths = [len(ids) for ids in drawn.ids]
    return (
        [row[:length] for row, length in zip(whitened.tolist(), lengths, strict=True)],
        [row[:length] for row, length in zip(returns.tolist(), lengths, strict=True)],
    )


def told_of(drawn: Drawn, task: TaskConfig) -> dict[str, float]:
    """What the answers of a step are like."""
    groups = np.asarray(drawn.rewards, np.float64).reshape(-1, task.group)
    metrics = {
        "train/reward": float(groups.mean()),
        "train/reward_sd": float(groups.std()),
        "train/answer_tokens": float(np.mean([len(ids) for ids in drawn.ids])),
        "train/finished": float(np.mean(drawn.finished)),
    }
    if task.group > 1:
        metrics["train/groups_without_spread"] = float((groups.std(axis=1) == 0).mean())
    return metrics


def judged_by(judges: Sequence[Judge], accelerator: str, threads: int | None) -> Judging:
    """What `judges` say; reward runs are loaded now and stay, beside the policy.

    For functions, prompts are the last turns of users, and references the rows' own answers.
    """
    models = {
        judge.name: RewardModel(judge.path, f"task.judges.{judge.name}", accelerator, threads)
        for judge in judges
        if judge.is_run
    }

    def judging(rows: Sequence[Conversation], texts: Sequence[str]) -> dict[str, list[float]]:
        prompts = [message_text(row.messages[-2]) for row in rows]
        references = [message_text(row.messages[-1]) for row in rows]
        return {
            judge.name: models[judge.name].scores(rows, texts)
            if judge.is_run
            else judge.scores(prompts, references, texts)
            for judge in judges
        }

    return judging


def make_rollouts(
    config: TrainConfig,
    run: Run,
    examples: Sequence[Example],
    encoder: Encoder,
    decode: Callable[[list[int]], str],
    objective: Any,
    **more: Any,
) -> Rollouts:
    """The rollouts of a training; raises ConfigError for what they cannot do."""
    check_rollouts(config)
    judges = judges_of(config.task.judges, "task.judges")
    first = examples[0].conversation
    if [message["role"] for message in first.messages][-2:] != ["user", "assistant"]:
        raise ConfigError(
            f"task={config.task.name}: {first.where} has no prompt and answer; data={config.data.name} has none."
        )
    return Rollouts(
        config.task,
        judges,
        judged_by(judges, config.trainer.accelerator, config.trainer.threads),
        seed=config.seed,
        examples=examples,
        rows_of_step=lambda step: rows_of_step(step, len(examples), config.trainer.batch_size, config.seed),
        encoder=encoder,
        decode=decode,
        objective=objective,
        directory=run.rollouts,
        **more,
    )


def check_rollouts(config: TrainConfig) -> None:
    """Raises ConfigError for judges and settings that rollouts cannot use; before any weights load."""
    judges = judges_of(config.task.judges, "task.judges")
    check_combination(config.task.combine, judges, "task.combine")
    if config.trainer.devices != 1 or config.trainer.num_nodes != 1:
        raise ConfigError(f"task={config.task.name}: the policy draws on one device; set trainer.devices=1.")
    if config.task.advantage is Advantage.gae and not config.lora.enabled:
        raise ConfigError(
            "task.advantage=gae with lora=none: the value head stands beside a LoRA; choose lora=default."
        )


# --------------------------------------------------------------------------------------------------------- on the disk


def write_drawn(path: Path, drawn: Drawn) -> None:
    """A line for each answer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "row": drawn.rows,
        "text": drawn.texts,
        "reward": drawn.rewards,
        "finished": drawn.finished,
        "ids": drawn.ids,
        **{f"score_{name}": values for name, values in drawn.scores.items()},
    }
    columns |= {name: own for name in ("old", "reference", "values") if (own := getattr(drawn, name))}
    with staged_file(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")


def read_drawn(path: Path) -> Drawn | None:
    """What `write_drawn` wrote; None where it is not there or damaged."""
    import pyarrow as pa

    try:
        columns = read_table(path)
        scores = {name.removeprefix("score_"): own for name, own in columns.items() if name.startswith("score_")}
        further = {name: columns[name] for name in ("old", "reference", "values") if name in columns}
        return Drawn(
            columns["row"],
            columns["ids"],
            columns["text"],
            columns["finished"],
            scores,
            columns["reward"],
            **further,
        )
    except (DataError, ValueError, KeyError, pa.ArrowException):
        return None
