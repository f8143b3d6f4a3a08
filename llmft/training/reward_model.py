"""Finished reward runs that score answers: in rejection sampling, and those of a policy during its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmft.config.data import Truncation
from llmft.config.model import ModelInit
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError, DataError
from llmft.data.batch import Limit, collate
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.hub import Located, locate
from llmft.data.preferences import Comparison
from llmft.data.prompt import prompt_format
from llmft.data.readers import BadRows
from llmft.metrics.judging import Judge
from llmft.model import adapters
from llmft.model.assemble import assemble, base_key
from llmft.model.device import mixed_precision, pick_device, pick_precision
from llmft.model.families import body_of
from llmft.model.heads import ScoreHead
from llmft.model.tokenizer import load_tokenizer
from llmft.runs.directory import finished_run
from llmft.training.micro_batching import divides_weights
from llmft.training.objectives.reward import Reward

GROUP = Limit(tokens=4096)
"""Limit of a batch, independent of the config, so that a score hardly depends on the rows scored with it."""


@dataclass(frozen=True)
class Host:
    """A loaded model with an adapter, whose base the adapters of reward runs may share.

    Attributes:
        base: `assemble.base_key` of the model.
    """

    model: Any
    base: str


def host_of(model: Any, config: TrainConfig, fingerprint: str) -> Host | None:
    """`model` as a host; None where its base cannot be shared: without an adapter, compiled, sharded, or random."""
    base = base_key(config, fingerprint)
    fixed = config.trainer.compile or config.model.init is ModelInit.random or divides_weights(config)
    return None if base is None or fixed else Host(model, base)


def shares_base(directory: str, host: Host | None) -> bool:
    """Whether a reward run's adapter can share the base of `host`."""
    if host is None:
        return False
    config = finished_run(Path(directory).expanduser())[1]
    return base_key(config, locate(config.model).fingerprint) == host.base and not config.lora.modules_to_save


def load_judges(
    judges: Sequence[Judge],
    key: str,
    host: Host | None,
    report: Callable[[str], None],
    accelerator: str = "auto",
    threads: int | None = None,
) -> dict[str, RewardModel]:
    """The models of the reward runs among `judges`, by name; reports those that need a base of their own."""
    models = {
        judge.name: RewardModel(judge.path, f"{key}.{judge.name}", accelerator, threads, host)
        for judge in judges
        if judge.is_run
    }
    if unshared := [name for name, model in models.items() if not model.shared]:
        report(f"{key}: {', '.join(unshared)}: not of the policy's base, so its base is loaded too and takes memory.")
    return models


class RewardModel:
    """A reward run's model: an adapter on the base of `host` where both have the same base, else a separate model.

    Attributes:
        shared: whether it uses the host's base.
    """

    def __init__(
        self,
        directory: str,
        key: str,
        accelerator: str = "auto",
        threads: int | None = None,
        host: Host | None = None,
    ) -> None:
        """Loads the model. Raises ConfigError where the run scores no answers, or its base is missing."""
        self.key = key
        run, config = finished_run(Path(directory).expanduser())
        if not config.task.scores_answers:
            raise ConfigError(
                f"{key}={directory}: this run scores no answers (task={config.task.name}); train task=reward."
            )
        located = locate(config.model)
        if config.lora.enabled and run.recorded("model", "fingerprint") != located.fingerprint:
            raise ConfigError(f"{key}={directory}: the base model found is not the one that this run was trained on.")
        trained = run.adapter if config.lora.enabled else run.model
        self.device = pick_device(accelerator)
        self.precision = pick_precision(config.trainer.precision, self.device)
        self.tokenizer = load_tokenizer(config.model, Located(trained, ""))
        # Prompts that are too long are cut, answers are not.
        data = replace(
            config.data, truncation=Truncation.cut_prompt_left, max_answer_tokens=None, min_prompt_tokens=0,
            min_answer_tokens=0,
        )  # fmt: skip
        self.encoder = Encoder(self.tokenizer, prompt_format(config.prompt, self.tokenizer), data)
        self.shared = shares_base(directory, host)
        self._active: Callable[[], AbstractContextManager[None]] = nullcontext
        if host is not None and self.shared:
            name = f"judge{len(host.model.peft_config)}"
            head = adapters.add_frozen(host.model, trained, name)
            self._active = partial(adapters.active, host.model, name)
            self.model: Any = ScoreHead(body_of(host.model), head)
            return
        self.model = assemble(
            config,
            located,
            device=self.device,
            precision=self.precision,
            num_labels=1,
            vocabulary=len(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            threads=threads,
            keep_base=False,
            weights_directory=trained,
        ).model

    @torch.no_grad()
    def scores(self, rows: Sequence[Conversation], texts: Sequence[str]) -> list[float]:
        """The scores of `texts`, one answer to each row's prompt; a row's own answer is ignored."""
        answered = []
        for row, text in zip(rows, texts, strict=True):
            prompt = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
            messages = [*prompt, {"role": "assistant", "content": text}]
            answered.append(replace(row, messages=messages, target=None, comparison=Comparison()))
        examples = self.encoder.encode("judged", answered, BadRows())
        if len(examples) < len(answered):
            lost = next(n for n in range(len(answered)) if n not in {int(row) for row in examples.rows})
            raise DataError(f"{self.key}: an answer to {answered[lost].where} is longer than the judge reads.")
        scores = torch.zeros(len(answered), dtype=torch.float64)
        with self._active(), mixed_precision(self.device, self.precision):
            for group in GROUP.groups(examples.lengths.tolist(), range(len(examples))):
                batch = collate([examples[index] for index in group], group, self.tokenizer.pad_token_id)
                predicted = Reward().predict(self.model, batch.to(self.device))[:, 0].cpu()
                scores[[int(examples.rows[index]) for index in group]] = predicted
        return scores.tolist()
