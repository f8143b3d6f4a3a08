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
from llmft.data.batch import MicroBatch, send
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE, Examples
from llmft.model.families import base_of
from llmft.model.heads import after_one_prompt
from llmft.model.logits import logits_after, logits_at
from llmft.model.sharding import is_sharded

Path = tuple[int, ...]
MOST_ATTENDED = 2**17
"""Prompt tokens times probes that a prediction computes together, since attention copies a prompt for each probe."""


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
        # Tokens after a prompt that pass every node; a probe passes all nodes on its path.
        self.probes = [p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes)]

    def __call__(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        rows, columns = batch.positions
        prompts = columns[np.unique(rows, return_index=True)[1]] + 1
        if not self.nodes:  # a single class
            return torch.zeros(len(prompts), self.num_classes, device=batch.input_ids.device)
        size = len(prompts)
        # All processes take the same number of forwards in training, and always where the weights are sharded.
        if not torch.is_grad_enabled() and not is_sharded(base_of(model)):
            size = max(1, MOST_ATTENDED // (int(prompts.max()) * len(self.probes)))
        parts = [
            self._scores(model, batch.input_ids[start : start + size], prompts[start : start + size])
            for start in range(0, len(prompts), size)
        ]
        return torch.cat(parts)

    def _scores(self, model: Any, ids: torch.Tensor, prompts: np.ndarray) -> torch.Tensor:
        logits, positions = self._next_logits(model, ids, prompts)
        scores = torch.zeros(len(prompts), self.num_classes, device=ids.device)
        for node, of_rows in zip(self.nodes, positions, strict=True):
            branch_of = {number: branch for branch, classes in enumerate(node.classes) for number in classes}
            branches = np.array([branch_of.get(number, -1) for number in range(self.num_classes)])
            at, tokens, chosen = send([of_rows, np.array(node.tokens), branches], ids.device)
            log_probs = logits[at[:, None], tokens].float().log_softmax(dim=-1)
            scores = scores + torch.where(chosen >= 0, log_probs[:, chosen], 0.0)
        return scores

    def _next_logits(self, model: Any, ids: torch.Tensor, prompts: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """(positions, vocabulary) logits, and the (nodes, rows) index of each prompt with a node's prefix in them."""
        rows = np.arange(len(prompts))
        if self.probes == [()]:
            inputs = ids[:, : prompts.max()]
            return logits_at(model, inputs, prompts.tolist(), (rows, prompts - 1)), rows[None]
        # The probes are answers to the prompt.
        probes = np.concatenate(self.probes)
        width = int(prompts.max()) + len(probes)
        columns = prompts[:, None] + np.arange(len(probes))
        at, tokens = send([(rows[:, None] * width + columns).reshape(-1), np.tile(probes, len(rows))], ids.device)
        inputs = ids.new_zeros(len(ids), width)
        copied = min(width, ids.shape[1])
        inputs[:, :copied] = ids[:, :copied]
        inputs.view(-1).index_copy_(0, at, tokens)
        lengths = [[prompt, *map(len, self.probes)] for prompt in prompts.tolist()]
        arguments, spans = after_one_prompt(model, inputs, lengths)
        positions: list[int] = []
        for node in self.nodes:
            depth = len(node.prefix)
            number = next(n for n, probe in enumerate(self.probes) if probe[:depth] == node.prefix)
            of_rows = spans[number :: len(self.probes)]
            positions += [begin + depth - 1 if depth else end for end, begin in of_rows]
        ascending, order = np.unique(positions, return_inverse=True)
        (at,) = send([ascending], ids.device)
        return logits_after(model, arguments, at), order.reshape(len(self.nodes), -1)


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
