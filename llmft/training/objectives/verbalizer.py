"""Verbalizer: the language model's probabilities of the classes' words, normalised over the classes.

The words' tokens form a trie. At each node with several children the model's log-probabilities of their tokens are
normalised over these tokens only, and a class has the product along its path, so the classes' probabilities sum to one
however likely other texts are. Words with different first tokens, such as letters, need only the root: one logit row,
and the softmax of the words' log-probabilities over the classes.
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
from llmft.model.logits import logits_at
from llmft.training.objectives.prompt_cache import shared_prefix_logits

Path = tuple[int, ...]


@dataclass(frozen=True)
class TokenTrieNode:
    """A node of the trie with several children: after `prefix`, token i leads to the classes in `classes[i]`."""

    prefix: Path
    tokens: list[int]
    classes: list[list[int]]


def trie_nodes(paths: Sequence[Path]) -> list[TokenTrieNode]:
    """The trie's nodes with several children, of the token path of each class, shortest prefix first.

    Raises ValueError where one path is a prefix of another, so that no token distinguishes them.
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
            result.append(TokenTrieNode(prefix, list(follow), list(follow.values())))
    return result


class LabelWordScorer:
    """(rows, classes) log-probabilities of the classes, from a causal language model.

    Each row is its prompt and one of the words, whose tokens are labelled; which word does not matter.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.num_classes = len(paths)
        self.nodes = trie_nodes(paths)
        prefixes = [node.prefix for node in self.nodes]
        # A forward over a prefix visits all nodes on its path.
        self.probes = [p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes)]

    def __call__(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        ids, (rows, columns) = batch.input_ids, batch.positions
        prompts = columns[np.unique(rows, return_index=True)[1]] + 1
        next_logits = None
        if len(self.probes) > 1 and not torch.is_grad_enabled():
            on_device = to_device(torch.from_numpy(prompts), ids.device)
            next_logits = shared_prefix_logits(model, ids, on_device, [node.prefix for node in self.nodes])
        if next_logits is None:
            next_logits = self._by_forwards(model, ids, prompts)
        else:
            next_logits = {node.prefix: _columns(next_logits[node.prefix], node.tokens) for node in self.nodes}
        scores = torch.zeros(len(prompts), self.num_classes, device=ids.device)
        for node in self.nodes:
            branches = next_logits[node.prefix].float().log_softmax(dim=-1)
            branch_of = {number: branch for branch, classes in enumerate(node.classes) for number in classes}
            (chosen,) = send([np.array([branch_of.get(number, -1) for number in range(self.num_classes)])], ids.device)
            scores = scores + torch.where(chosen >= 0, branches[:, chosen], 0.0)
        return scores

    def _by_forwards(self, model: Any, ids: torch.Tensor, prompts: np.ndarray) -> dict[Path, torch.Tensor]:
        """(rows, tokens) logits of every node's tokens, by one forward of prompt and prefix per probe."""
        next_logits: dict[Path, torch.Tensor] = {}
        rows = np.arange(len(ids))
        for probe in self.probes:
            width = int(prompts.max()) + len(probe)
            inputs = torch.zeros(len(ids), width, dtype=ids.dtype, device=ids.device)
            copied = min(width, ids.shape[1])
            inputs[:, :copied] = ids[:, :copied]
            (begins,) = send([rows * width + prompts], ids.device)
            for depth, token in enumerate(probe):
                inputs.view(-1).index_fill_(0, begins + depth, token)
            # Causal attention ignores the tokens after them.
            columns = prompts[:, None] - 1 + np.arange(1 + len(probe))
            positions = (np.repeat(rows, columns.shape[1]), columns.reshape(-1))
            logits = logits_at(model, inputs, (prompts + len(probe)).tolist(), positions)
            logits = logits.view(len(ids), 1 + len(probe), -1)
            for node in self.nodes:
                if node.prefix not in next_logits and probe[: len(node.prefix)] == node.prefix:
                    next_logits[node.prefix] = _columns(logits[:, len(node.prefix)], node.tokens)
        return next_logits


def _columns(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    (index,) = send([np.array(tokens)], logits.device)
    return logits[:, index]


def cost(objective: Any) -> str | None:
    """A warning about the time of a step where each row is read several times; None where it is read once."""
    times = len(objective.scores.probes) if isinstance(getattr(objective, "scores", None), LabelWordScorer) else 1
    if times < 2:
        return None
    return (
        f"each step reads every row {times} times, since the words share first tokens: about {times} times as slow as "
        "task.head=linear; words with different first tokens need one read"
    )


def make_scores(encoder: Encoder, words: Sequence[str], splits: dict[str, Examples]) -> LabelWordScorer:
    """The scorer of `words` with the encoder's tokenizer and prompt format.

    Raises ConfigError for words whose tokens do not distinguish them, or depend on the end of the prompt.
    """
    paths: list[Path] = []  # each word's tokens as an answer, with the end token
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
        return LabelWordScorer(paths)
    except ValueError as error:
        raise ConfigError(f"task.words: {error}; choose other words, or task.words=letters.") from None
