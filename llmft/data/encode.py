"""Conversations to input_ids and labels.

The whole rendered text is tokenised at once, without adding special tokens (the template writes them), and the
labels are found by character offsets: so no token is doubled, and training sees the ids that serving sees.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmft.config import DataConfig, Truncation
from llmft.data.columns import Conversation
from llmft.data.prompt import PromptFormat, Rendered
from llmft.data.sources import Problems
from llmft.errors import DataError

IGNORE = -100


@dataclass(slots=True)
class Encoded:
    """One example: token ids, labels (`IGNORE` where nothing is learned) and where its row stands."""

    input_ids: list[int]
    labels: list[int]
    where: str
    conversation: Conversation

    @property
    def labelled_tokens(self) -> int:
        """Tokens that carry loss; the first token of a row cannot, since nothing predicts it."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass
class Lengths:
    """What the length limit did to one split."""

    rows: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    rows_cut: int = 0
    rows_dropped: int = 0
    answer_tokens_dropped: int = 0
    longest: int = 0


@dataclass
class Encoder:
    """Turns conversations into examples with one tokenizer and one prompt format."""

    tokenizer: Any
    prompt: PromptFormat
    data: DataConfig
    lengths: dict[str, Lengths] = field(default_factory=dict)

    def render(self, conversation: Conversation, *, generation: bool = False) -> Rendered:
        """The text of a conversation, or of its prompt alone (all but the last answer) for generation."""
        messages = conversation.messages
        if generation and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.prompt.render(
            messages,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
            add_generation_prompt=generation,
        )

    def encode(self, split: str, conversations: Sequence[Conversation], problems: Problems) -> list[Encoded]:
        """All conversations of a split that fit, in order; what did not fit is counted in `lengths`.

        Raises DataError when nothing is left.
        """
        lengths = self.lengths[split] = Lengths()
        texts: list[Rendered] = []
        kept: list[Conversation] = []
        for conversation in conversations:
            try:
                texts.append(self.render(conversation))
                kept.append(conversation)
            except ValueError as error:
                problems.add(conversation.where, str(error))
        examples = []
        for conversation, rendered, encoding in zip(kept, texts, self._tokenize(texts), strict=True):
            example = self._example(conversation, rendered, encoding, lengths)
            if example is None:
                continue
            if conversation.target is None and example.labelled_tokens == 0:
                problems.add(conversation.where, "no token of an answer is left to learn from")
                continue
            examples.append(example)
            lengths.rows += 1
            lengths.tokens += len(example.input_ids)
            lengths.labelled_tokens += example.labelled_tokens
            lengths.longest = max(lengths.longest, len(example.input_ids))
        if conversations and not examples:
            raise DataError(
                f"data={self.data.name}: none of the {len(conversations)} {split} rows fits "
                f"data.max_tokens={self.data.max_tokens}; raise it."
            )
        return examples

    def _tokenize(self, texts: Sequence[Rendered]) -> list[Any]:
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        return list(backend.encode_batch([rendered.text for rendered in texts], add_special_tokens=False))

    def _example(
        self, conversation: Conversation, rendered: Rendered, encoding: Any, lengths: Lengths
    ) -> Encoded | None:
        ids: list[int] = encoding.ids
        labels = [IGNORE] * len(ids)
        if conversation.target is None:
            # Token offsets never go back, so the tokens of a span are found by bisection: the first that ends
            # behind the span's start, up to the last that starts before its end.
            starts = [start for start, _ in encoding.offsets]
            ends = [end for _, end in encoding.offsets]
            for start, end in rendered.spans:
                first, last = bisect_right(ends, start), bisect_left(starts, end)
                labels[first:last] = ids[first:last]
        excess = len(ids) - self.data.max_tokens
        if excess > 0:
            region = self._cut(conversation, rendered, encoding, excess)
            if region is None:
                lengths.rows_dropped += 1
                lengths.answer_tokens_dropped += sum(label != IGNORE for label in labels)
                return None
            lengths.rows_cut += 1
            ids = ids[: region[0]] + ids[region[1] :]
            labels = labels[: region[0]] + labels[region[1] :]
        return Encoded(ids, labels, conversation.where, conversation)

    def _cut(
        self, conversation: Conversation, rendered: Rendered, encoding: Any, excess: int
    ) -> tuple[int, int] | None:
        """The range of tokens to take out of the first user turn's own text, or None to drop the row.

        Only the user's text is cut: headers, special tokens and answers stay whole.
        """
        policy = self.data.truncation
        if policy is Truncation.error:
            raise DataError(
                f"{conversation.where}: {len(encoding.ids)} tokens, more than data.max_tokens={self.data.max_tokens} "
                "(data.truncation=drop or cut_prompt_left leaves out what does not fit)."
            )
        user = next((m["content"].strip() for m in conversation.messages if m["role"] == "user"), "")
        begin = rendered.text.find(user) if user else -1
        if policy is Truncation.drop or begin < 0:
            return None
        inside = [
            index for index, (start, end) in enumerate(encoding.offsets) if begin <= start < end <= begin + len(user)
        ]
        if len(inside) <= excess:
            return None
        if policy is Truncation.cut_prompt_left:
            first = inside[0]
        elif policy is Truncation.cut_prompt_right:
            first = inside[-1] + 1 - excess
        else:
            first = inside[(len(inside) - excess) // 2]
        return first, first + excess

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of the prompt alone, as a server would send them, cut as the row was."""
        rendered = self.render(conversation, generation=True)
        encoding = self._tokenize([rendered])[0]
        excess = len(encoding.ids) - self.data.max_tokens
        region = self._cut(conversation, rendered, encoding, excess) if excess > 0 else None
        if region is None:
            return list(encoding.ids)
        return list(encoding.ids[: region[0]] + encoding.ids[region[1] :])


def end_token_ids(examples: Sequence[Encoded], eos_token_id: int | None) -> list[int]:
    """The tokens that end an answer: the one that closes most answers, and the tokenizer's end token."""
    last = Counter(
        next(label for label in reversed(example.labels) if label != IGNORE)
        for example in examples
        if example.labelled_tokens
    )
    found = [] if eos_token_id is None else [eos_token_id]
    if last:
        token, count = last.most_common(1)[0]
        if count > 0.99 * sum(last.values()) and token not in found and len(examples) > 1:
            found.append(token)
    return found
