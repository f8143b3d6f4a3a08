"""The language model's own probabilities of the classes' words, normalised over the classes.

The words' tokens make a tree. At each place where they part, the model's log-probabilities of the tokens that go on are
normalised over these tokens alone, and a class has the product along its way: so the classes' probabilities sum to one,
whatever other texts the model would rather write. Words with different first tokens, such as letters, part at once: one
logit row, and the softmax over the classes of the words' log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from llmft.core.errors import ConfigError
from llmft.data.batch import MicroBatch, send, to_device
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE, Examples
from llmft.training.objectives.language_modeling import logits_at
from llmft.training.objectives.prompt_cache import logits_behind

Path = tuple[int, ...]


@dataclass(frozen=True)
class Fork:
    """A place where words part: behind `prefix`, each of `tokens` goes on to the classes beside it."""

    prefix: Path
    tokens: list[int]
    classes: list[list[int]]


def forks(paths: Sequence[Path]) -> list[Fork]:
    """Every place where the token paths of the classes part, shortest prefix first.

    Raises ValueError when one path is another's beginning, so that nothing tells them apart.
    """
    for number, path in enumerate(paths):
        if any(other[: len(path)] == path for index, other in enumerate(paths) if index != number):
            raise ValueError("two classes have words that are the same, or one the beginning of the other, in tokens")
    result = []
    for prefix in sorted({path[:depth] for path in paths for depth in range(len(path))}, key=lambda p: (len(p), p)):
        follow: dict[int, list[int]] = {}
        for number, path in enumerate(paths):
            if path[: len(prefix)] == prefix:
                follow.setdefault(path[len(prefix)], []).append(number)
        if len(follow) > 1:
            result.append(Fork(prefix, list(follow), list(follow.values())))
    return result


class WordScores:
    """(rows, classes) log-probabilities of the classes, from a causal language model.

    Rows come with one of the words behind their prompt, its tokens labelled; which word does not matter.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.num_classes = len(paths)
        self.forks = forks(paths)
        prefixes = [fork.prefix for fork in self.forks]
        # A forward over a prefix passes all forks on its way.
        self.probes = [p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes)]

    def __call__(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        ids, (rows, columns) = batch.input_ids, batch.positions
        prompts = columns[np.unique(rows, return_index=True)[1]] + 1
        behind = None
        if len(self.probes) > 1 and not torch.is_grad_enabled():
            on_device = to_device(torch.from_numpy(prompts), ids.device)
            behind = logits_behind(model, ids, on_device, [fork.prefix for fork in self.forks])
        if behind is None:
            behind = self._by_forwards(model, ids, prompts)
        else:
            behind = {fork.prefix: _columns(behind[fork.prefix], fork.tokens) for fork in self.forks}
        scores = torch.zeros(len(prompts), self.num_classes, device=ids.device)
        for fork in self.forks:
            branches = behind[fork.prefix].float().log_softmax(dim=-1)
            branch_of = {number: branch for branch, classes in enumerate(fork.classes) for number in classes}
            (chosen,) = send([np.array([branch_of.get(number, -1) for number in range(self.num_classes)])], ids.device)
            scores = scores + torch.where(chosen >= 0, branches[:, chosen], 0.0)
        return scores

    def _by_forwards(self, model: Any, ids: torch.Tensor, prompts: np.ndarray) -> dict[Path, torch.Tensor]:
        """(rows, ways) logits of every fork's tokens, by one forward of prompt and answer per probe."""
        behind: dict[Path, torch.Tensor] = {}
        rows = np.arange(len(ids))
        for probe in self.probes:
            width = int(prompts.max()) + len(probe)
            inputs = torch.zeros(len(ids), width, dtype=ids.dtype, device=ids.device)
            copied = min(width, ids.shape[1])
            inputs[:, :copied] = ids[:, :copied]
            (begins,) = send([rows * width + prompts], ids.device)
            for depth, token in enumerate(probe):
                inputs.view(-1).index_fill_(0, begins + depth, token)
            # What stands behind is never looked at by causal attention.
            columns = prompts[:, None] - 1 + np.arange(1 + len(probe))
            positions = (np.repeat(rows, columns.shape[1]), columns.reshape(-1))
            logits = logits_at(model, inputs, (prompts + len(probe)).tolist(), positions)
            logits = logits.view(len(ids), 1 + len(probe), -1)
            for fork in self.forks:
                if fork.prefix not in behind and probe[: len(fork.prefix)] == fork.prefix:
                    behind[fork.prefix] = _columns(logits[:, len(fork.prefix)], fork.tokens)
        return behind


def _columns(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    (index,) = send([np.array(tokens)], logits.device)
    return logits[:, index]


def cost(objective: Any) -> str | None:
    """What a user should know of a step with many words; None where each row is read once."""
    times = len(objective.scores.probes) if isinstance(getattr(objective, "scores", None), WordScores) else 1
    if times < 2:
        return None
    return (
        f"each step reads every row {times} times, once for each of the places where the words part after their first "
        f"token: about {times} times as slow as task.head=linear; words that differ in their first token are read once"
    )


def make_scores(encoder: Encoder, words: Sequence[str], splits: dict[str, Examples]) -> WordScores:
    """The scores of `words` under the encoder's tokenizer and prompt format.

    Raises ConfigError for words that their tokens do not tell apart, or that no row spells so: the prompt runs into it.
    """
    paths: list[Path] = []  # of each word as an answer, its end token with it
    for word in words:
        probe = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": word}]
        ids, marks = encoder.tokens(Conversation(probe, "task.words"))
        paths.append(tuple(np.asarray(ids)[marks != 0].tolist()))
    known = set(paths)
    for example in chain.from_iterable(splits.values()):
        labels = np.asarray(example.labels)
        if tuple(labels[labels != IGNORE].tolist()) not in known:
            raise ConfigError(
                f"task.head=tokens: in {example.where} the tokens of the answer depend on the text before it; "
                "choose a prompt format that ends its prompt with a line break, or one of its own marks."
            )
    try:
        return WordScores(paths)
    except ValueError as error:
        raise ConfigError(f"task.words: {error}; choose other words, or task.words=letters.") from None
