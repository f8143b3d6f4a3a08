"""Conversations to input_ids and labels.

The whole rendered text is tokenised at once, without adding special tokens (the template writes them), and the
labels are found by character offsets: so no token is doubled, and training sees the ids that serving sees.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llmft.config import DataConfig, Truncation, Turns
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Encoded, Examples, cache_directory, load_examples, save_examples
from llmft.data.prompt import PromptFormat, Rendered
from llmft.data.sources import Problems
from llmft.errors import DataError
from llmft.schema import canonical, numbers_of

CACHE_VERSION = 1
BATCH_ROWS = 4096
"""Rows rendered and tokenised at once: enough for the tokenizer's threads, little enough for memory."""


@dataclass
class Lengths:
    """What the length limits did to one split."""

    rows: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    longest: int = 0
    rows_cut: int = 0
    prompt_tokens_cut: int = 0
    rows_dropped: int = 0
    answer_tokens_dropped: int = 0
    dropped_by: dict[str, int] = field(default_factory=dict)

    @property
    def answer_share_dropped(self) -> float:
        """Share of all answer tokens that were left out."""
        return self.answer_tokens_dropped / max(1, self.answer_tokens_dropped + self.labelled_tokens)


@dataclass
class Encoder:
    """Turns conversations into examples with one tokenizer and one prompt format.

    Where `fingerprint` (of the rows) is given, tokenised splits are kept in the cache of `datasets` and found there
    by the next run, trial or process.
    """

    tokenizer: Any
    prompt: PromptFormat
    data: DataConfig
    fingerprint: str | None = None
    warn: Callable[[str], None] = print
    lengths: dict[str, Lengths] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

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

    # ----------------------------------------------------------------------------------------------------- encoding

    def encode(self, split: str, conversations: Sequence[Conversation], problems: Problems) -> Examples:
        """All conversations of a split that fit, in order; what did not fit is counted in `lengths`.

        Raises DataError when nothing is left.
        """
        path = cache_directory() / f"tokens-{self._key(split)}.arrow" if self.fingerprint and self.data.cache else None
        found = self._load(path, split, conversations, problems) if path is not None and path.is_file() else None
        if found is None:
            before = len(problems.rejected)
            found = self._encode(split, conversations, problems)
            if path is not None:
                facts = {"lengths": asdict(self.lengths[split]), "rejected": problems.rejected[before:]}
                try:
                    save_examples(path, found, facts)
                except OSError as error:
                    self.warn(f"the tokenised rows could not be cached in {path.parent} ({error.strerror}).")
        if conversations and not len(found):
            raise DataError(
                f"data={self.data.name}: none of the {len(conversations)} {split} rows is left after the length limits "
                f"({self._reasons(split)}); raise data.max_tokens={self.data.max_tokens} or the limit named."
            )
        return found

    def _reasons(self, split: str) -> str:
        return ", ".join(f"{count} by {key}" for key, count in self.lengths[split].dropped_by.items()) or "bad rows"

    def _key(self, split: str) -> str:
        backend = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        special = [self.tokenizer.bos_token, self.tokenizer.eos_token]
        content = canonical(
            [
                CACHE_VERSION,
                split,
                self.fingerprint,
                numbers_of(self.data),
                numbers_of(self.prompt.config),
                backend,
                special,
            ]
        )
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def _load(
        self, path: Any, split: str, conversations: Sequence[Conversation], problems: Problems
    ) -> Examples | None:
        try:
            examples, facts = load_examples(path, conversations)
            self.lengths[split] = Lengths(**facts["lengths"])
        except (ValueError, KeyError, TypeError) as error:
            self.warn(f"the cached tokens are damaged ({error}); they are made again.")
            path.unlink(missing_ok=True)
            return None
        problems.rejected.extend(facts["rejected"])
        self.cached.add(split)
        return examples

    def _encode(self, split: str, conversations: Sequence[Conversation], problems: Problems) -> Examples:
        self.lengths[split] = Lengths()
        ids: list[Sequence[int]] = []
        labelled: list[np.ndarray] = []
        rows: list[int] = []
        for start in range(0, len(conversations), BATCH_ROWS):
            texts: list[Rendered] = []
            places: list[int] = []
            for place, conversation in enumerate(conversations[start : start + BATCH_ROWS], start):
                try:
                    texts.append(self.render(conversation))
                    places.append(place)
                except ValueError as error:
                    problems.add(conversation.where, str(error), conversation.messages)
            for place, rendered, encoding in zip(places, texts, self._tokenize(texts), strict=True):
                made = self._example(conversations[place], rendered, encoding, self.lengths[split], problems)
                if made is not None:
                    ids.append(made[0])
                    labelled.append(made[1])
                    rows.append(place)
        examples = Examples.of(ids, labelled, rows, conversations)
        lengths = self.lengths[split]
        lengths.rows = len(examples)
        lengths.tokens = int(examples.lengths.sum())
        lengths.labelled_tokens = int(examples.labelled_tokens.sum())
        lengths.longest = int(examples.lengths.max(initial=0))
        return examples

    def forced(self, conversation: Conversation) -> tuple[list[int], np.ndarray]:
        """Ids and marks of a row that the limits' own rule cannot shorten: its beginning is cut off, not the answer."""
        rendered = self.render(conversation)
        made = self._example(conversation, rendered, self._tokenize([rendered])[0], Lengths(), Problems(), False)
        assert made is not None
        ids, marks = list(made[0]), made[1]
        excess = max(0, len(ids) - self.data.max_tokens)
        return ids[excess:], marks[excess:]

    def tokens(self, conversation: Conversation, problems: Problems) -> tuple[Sequence[int], np.ndarray]:
        """Ids and marks (1 where the token is learned) of one conversation that no limit touches."""
        rendered = self.render(conversation)
        made = self._example(conversation, rendered, self._tokenize([rendered])[0], Lengths(), problems, False)
        assert made is not None
        return made

    def _tokenize(self, texts: Sequence[Rendered]) -> list[Any]:
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return list(backend.encode_batch([rendered.text for rendered in texts], add_special_tokens=False))

    def _example(
        self,
        conversation: Conversation,
        rendered: Rendered,
        encoding: Any,
        lengths: Lengths,
        problems: Problems,
        limited: bool = True,
    ) -> tuple[Sequence[int], np.ndarray] | None:
        """Ids and marks of one row, or None for a row that is left out."""
        ids: list[int] = encoding.ids
        marks = np.zeros(len(ids), np.uint8)
        if conversation.learns_text:
            spans = rendered.spans[-1:] if self.data.train_turns is Turns.last else rendered.spans
            if conversation.trained_from:
                spans = spans[conversation.trained_from :]
            offsets = encoding.offsets
            # Token offsets never go back, so the tokens of a span are found by bisection: from the first that ends
            # behind the span's start, up to the last that starts before its end.
            starts = [start for start, _ in offsets]
            ends = [end for _, end in offsets]
            for start, end in spans:
                marks[bisect_right(ends, start) : bisect_left(starts, end)] = 1
            if not marks[1:].any():
                problems.add(conversation.where, "no token of an answer is left to learn from", conversation.messages)
                return None
        if not limited:
            return ids, marks
        region = self._limit(conversation, rendered, encoding, marks, lengths)
        if region is None:
            lengths.rows_dropped += 1
            lengths.answer_tokens_dropped += int(marks.sum())
            return None
        start, stop = region
        if start == stop:
            return ids, marks
        lengths.rows_cut += 1
        lengths.prompt_tokens_cut += stop - start
        return ids[:start] + ids[stop:], np.concatenate([marks[:start], marks[stop:]])

    # ------------------------------------------------------------------------------------------------------- limits

    def _limit(
        self, conversation: Conversation, rendered: Rendered, encoding: Any, marks: np.ndarray, lengths: Lengths
    ) -> tuple[int, int] | None:
        """The range of tokens to take out, empty for a row that fits; None to drop the row."""
        data = self.data
        total, answer = len(marks), int(marks.sum())
        prompt = total - answer

        def drop(key: str) -> tuple[int, int] | None:
            lengths.dropped_by[key] = lengths.dropped_by.get(key, 0) + 1
            return None

        if answer > (data.max_answer_tokens or answer):
            return drop("data.max_answer_tokens")
        if conversation.learns_text and answer < data.min_answer_tokens:
            return drop("data.min_answer_tokens")
        if prompt < data.min_prompt_tokens:
            return drop("data.min_prompt_tokens")
        over_prompt = prompt - (data.max_prompt_tokens or prompt)
        over_total = total - data.max_tokens
        if max(over_prompt, over_total) <= 0:
            return 0, 0
        key = "data.max_tokens" if over_total >= over_prompt else "data.max_prompt_tokens"
        if data.truncation is Truncation.error:
            raise DataError(
                f"{conversation.where}: {total} tokens, {prompt} of them prompt, more than {key}={self._value(key)} "
                "(data.truncation=drop leaves such rows out, cut_prompt_left shortens their prompt)."
            )
        region = self._cut(conversation, rendered, encoding, max(over_prompt, over_total))
        return region if region is not None else drop(key)

    def _value(self, key: str) -> Any:
        return getattr(self.data, key.removeprefix("data."))

    def _cut(
        self, conversation: Conversation, rendered: Rendered, encoding: Any, excess: int
    ) -> tuple[int, int] | None:
        """`excess` tokens of the first user turn's own text, or None where it has not so many.

        Only the user's text is cut: headers, special tokens and answers stay whole.
        """
        policy = self.data.truncation
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
        """Token ids of the prompt alone, as a server would send them, cut as a training row is."""
        rendered = self.render(conversation, generation=True)
        encoding = self._tokenize([rendered])[0]
        ids: list[int] = encoding.ids
        limit = min(self.data.max_tokens, self.data.max_prompt_tokens or self.data.max_tokens)
        region = self._cut(conversation, rendered, encoding, len(ids) - limit) if len(ids) > limit else None
        return ids if region is None else ids[: region[0]] + ids[region[1] :]


def end_token_ids(examples: Sequence[Encoded], prompt: PromptFormat, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token, and the one with which the format's end marker ends."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not prompt.end_marker(bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token):
        return found
    last: Counter[int] = Counter()
    for example in examples[:1000]:
        labels = np.asarray(example.labels)
        learned = labels[labels != IGNORE]
        if len(learned):
            last[int(learned[-1])] += 1
    if last:
        token, count = last.most_common(1)[0]
        if count > 0.99 * sum(last.values()) and token not in found:
            found.append(token)
    return found
