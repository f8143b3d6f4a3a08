"""A finished reward run that scores answers: in rejection sampling, and of a policy's own answers while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmft.config.sections import Precision, Truncation
from llmft.core.errors import ConfigError, DataError
from llmft.data.batch import Limit, collate
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.hub import Located, locate
from llmft.data.preferences import Comparison
from llmft.data.prompt import prompt_format
from llmft.data.sources import BadRows
from llmft.model.assemble import assemble
from llmft.model.load import TORCH_DTYPES, load_tokenizer, pick_device, pick_precision
from llmft.runs.directory import finished_run
from llmft.training.objectives.reward import Reward

GROUP = Limit(tokens=4096)
"""What is computed at once, whatever else is, so that a score depends on what is scored with it as little as may be."""


class RewardModel:
    """A reward run's model beside whatever else is loaded."""

    def __init__(self, directory: str, key: str, accelerator: str = "auto", threads: int | None = None) -> None:
        """Loads it. Raises ConfigError where the run is none that scores answers, or its base is not there."""
        self.key = key
        run, config = finished_run(Path(directory).expanduser())
        if not config.task.scores_answers:
            raise ConfigError(
                f"{key}={directory}: this run scores no answers (task={config.task.name}); train task=reward."
            )
        located = locate(config.model)
        if config.lora.enabled and run.fact("model", "fingerprint") != located.fingerprint:
            raise ConfigError(f"{key}={directory}: the base model found is not the one that this run was trained on.")
        trained = run.adapter if config.lora.enabled else run.model
        self.device = pick_device(accelerator)
        self.precision = pick_precision(config.trainer.precision, self.device)
        self.tokenizer = load_tokenizer(config.model, Located(trained, ""))
        # Prompts that are too long are cut, answers never.
        data = replace(
            config.data, truncation=Truncation.cut_prompt_left, max_answer_tokens=None, min_prompt_tokens=0,
            min_answer_tokens=0,
        )  # fmt: skip
        self.encoder = Encoder(self.tokenizer, prompt_format(config.prompt, self.tokenizer), data)
        self.assembled = assemble(
            config,
            located,
            device=self.device,
            precision=self.precision,
            num_labels=1,
            vocabulary=len(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            threads=threads,
            keep=False,
            trained=trained,
        )

    @torch.no_grad()
    def scores(self, rows: Sequence[Conversation], texts: Sequence[str]) -> list[float]:
        """The score of an answer to each prompt; an answer that ends a row already is left out."""
        asked = [_answered(row, text) for row, text in zip(rows, texts, strict=True)]
        examples = self.encoder.encode("judged", asked, BadRows())
        if len(examples) < len(asked):
            lost = next(n for n in range(len(asked)) if n not in {int(row) for row in examples.rows})
            raise DataError(f"{self.key}: an answer to {asked[lost].where} is longer than the judge reads.")
        found = [0.0] * len(asked)
        mixed = self.precision is not Precision.fp32
        with torch.autocast(self.device.type, dtype=TORCH_DTYPES[self.precision], enabled=mixed):
            for group in GROUP.groups(examples.lengths.tolist(), range(len(examples))):
                batch = collate([examples[place] for place in group], group, self.tokenizer.pad_token_id)
                scores = Reward().predict(self.assembled.model, batch.to(self.device))[:, 0].cpu().tolist()
                for place, score in zip(group, scores, strict=True):
                    found[int(examples.rows[place])] = score
        return found

    def close(self) -> None:
        """Forgets the model."""
        self.assembled.model = self.assembled.base = None


def _answered(row: Conversation, text: str) -> Conversation:
    prompt = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
    return replace(
        row, messages=[*prompt, {"role": "assistant", "content": text}], target=None, comparison=Comparison()
    )
