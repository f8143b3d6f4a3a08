"""Conversations to input_ids and labels.

The whole rendered text is tokenised at once, without adding special tokens (the template writes them), and the
labels are found by character offsets: so no token is doubled. Where the ids before an answer are not those of the
prompt alone, since the tokenizer joins the two, or the end of an answer with what follows, both are tokenised apart:
training sees the ids that serving sees, if need be with a sequence for each answer.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from llmft.config.convert import canonical, numbers_of
from llmft.config.sections import DataConfig, Truncation, Turns
from llmft.core.errors import DataError
from llmft.data.columns import Conversation
from llmft.data.examples import Examples, cache_directory, load_examples, save_examples
from llmft.data.prompt import PromptFormat, Rendered
from llmft.data.sources import BadRows

CACHE_VERSION = 3
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
    rows_joined: int = 0
    """Rows in which the tokenizer joins a prompt with its answer, or an answer with what follows."""
    rows_split: int = 0
    """Rows that are learned as several sequences."""
    rows_unlike: int = 0
    """Rows whose prompt the template writes otherwise for serving than before the answer."""

    @property
    def answer_share_dropped(self) -> float:
        """Share of all answer tokens that were left out."""
        return self.answer_tokens_dropped / max(1, self.answer_tokens_dropped + self.labelled_tokens)


@dataclass(frozen=True)
class Ends:
    """What ends an answer: tokens that each do so alone, or the format's marker where it is several of them.

    Attributes:
        text: the marker of `num_tokens` tokens; empty where it is a token of `ids`.
    """

    ids: list[int]
    text: str = ""
    num_tokens: int = 1
    decode: Callable[[list[int]], str] = lambda ids: ""

    def reached(self, ids: list[int]) -> bool:
        """Whether the marker stands at the end of `ids`, whole."""
        return bool(self.text) and self.text in self.decode(ids[-1 - len(self.text.encode()) :])

    def trained(self, ids: list[int]) -> bool:
        """Whether an answer of these tokens ends as it should."""
        return ids[-1:] != [] and (ids[-1] in self.ids or self.reached(ids))

    def cut(self, ids: list[int]) -> list[int]:
        """`ids` up to their end; with the marker where a token of it holds text before it."""
        ids = ids[: next((place for place, token in enumerate(ids) if token in self.ids), len(ids))]
        text = self.decode(ids) if self.text else ""
        begin = text.find(self.text) if self.text else -1
        if begin < 0:
            return ids
        places = range(len(ids) + 1)
        first = bisect_left(places, begin, key=lambda place: len(self.decode(ids[:place])))
        if self.decode(ids[:first]) == text[:begin]:
            return ids[:first]
        return ids[: bisect_left(places, True, key=lambda place: self.text in self.decode(ids[:place]))]


@dataclass
class Tokens:
    """The tokens of a text, or of its beginning, and where in it they stand."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    @classmethod
    def of(cls, encoding: Any) -> Tokens:
        """From what the tokenizers library returns."""
        offsets = encoding.offsets
        return cls(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])

    def within(self, start: int, end: int) -> tuple[int, int]:
        """The tokens of a span: from the first that ends behind its start, up to the last that starts before its end.

        Token offsets never go back, so they are found by bisection.
        """
        return bisect_right(self.ends, start), bisect_left(self.starts, end)


@dataclass
class Part:
    """A text that a row is learned from, or the whole row: the conversation up to its end, and the spans learned."""

    conversation: Conversation
    rendered: Rendered
    spans: list[tuple[int, int]]
    tokens: Tokens = field(default_factory=lambda: Tokens([], [], []))


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

    def render(self, conversation: Conversation, *, generation: bool = False, **options: Any) -> Rendered:
        """The text of a conversation, or of its prompt alone (all but the last answer) for generation."""
        messages = conversation.messages
        if generation and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.prompt.render(
            messages, **self._special, tools=conversation.tools, add_generation_prompt=generation, **options
        )

    @property
    def _special(self) -> dict[str, Any]:
        return {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}

    @cached_property
    def marker(self) -> str:
        """What the format writes behind an answer."""
        return self.prompt.end_marker(**self._special)

    @cached_property
    def ends(self) -> Ends:
        """What ends an answer: the tokenizer's end token, and the format's end marker."""
        end = self.tokenizer.eos_token_id
        ids = [] if end is None else [end]
        called = self._behind(self.prompt.end_marker(**self._special, call=True)).ids[-1:]
        marker = self._behind(self.marker).ids if self.marker else []
        text = self.marker
        if len(marker) == 1 or (marker and marker[-1] in self._added):
            called.append(marker[-1])
            # What stands before the token that ends the answer is text of the format's, unless no text shows it.
            marker = [] if self._added.issuperset(marker) else marker[:-1]
            text = self._decode(marker).strip()
        ids += [token for token in dict.fromkeys(called) if token not in ids and (token in self._added or not marker)]
        return Ends(ids, text, len(marker), self._decode)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def reference(self, conversation: Conversation) -> str:
        """The last answer as a generation of it should be."""
        content = str(conversation.messages[-1]["content"])
        number = sum(message["role"] == "assistant" for message in conversation.messages) - 1
        rendered = self.render(conversation, wanted=frozenset([number]))
        start, end = rendered.spans[-1]
        text = rendered.text[start:end].strip().removesuffix(self.marker).strip()
        return content if "".join(text.split()) == "".join(content.split()) else text

    # ----------------------------------------------------------------------------------------------------- encoding

    def encode(self, split: str, conversations: Sequence[Conversation], problems: BadRows) -> Examples:
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

    def _load(self, path: Any, split: str, conversations: Sequence[Conversation], problems: BadRows) -> Examples | None:
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

    def _encode(self, split: str, conversations: Sequence[Conversation], problems: BadRows) -> Examples:
        lengths = self.lengths[split] = Lengths()
        ids: list[Sequence[int]] = []
        labelled: list[np.ndarray] = []
        rows: list[int] = []
        for start in range(0, len(conversations), BATCH_ROWS):
            parts: list[Part] = []
            places: list[int] = []
            for place, conversation in enumerate(conversations[start : start + BATCH_ROWS], start):
                try:
                    made = self._parts(conversation)
                except ValueError as error:
                    problems.add(conversation.where, str(error), conversation.messages)
                    continue
                lengths.rows_unlike += made[0].rendered.unlike
                parts += made
                places += [place] * len(made)
            several: dict[int, int] = {}
            for place, sequences in zip(places, self._tokenized(parts, lengths), strict=True):
                several[place] = several.get(place, 0) + len(sequences)
                for part in sequences:
                    example = self._example(part, lengths, problems)
                    if example is not None:
                        ids.append(example[0])
                        labelled.append(example[1])
                        rows.append(place)
            lengths.rows_split += sum(count > 1 for count in several.values())
        examples = Examples.of(ids, labelled, rows, conversations)
        lengths.rows = len(examples)
        lengths.tokens = int(examples.lengths.sum())
        lengths.labelled_tokens = int(examples.labelled_tokens.sum())
        lengths.longest = int(examples.lengths.max(initial=0))
        return examples

    def _parts(self, conversation: Conversation) -> list[Part]:
        """The texts that a row is learned from: one, and another for each answer that it has otherwise than serving."""
        if not conversation.learns_text:
            return [Part(conversation, self.render(conversation, wanted=frozenset()), [])]
        places = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        first = len(places) - 1 if self.data.train_turns is Turns.last else conversation.trained_from
        wanted = [n for n in range(first, len(places)) if "weight" not in conversation.messages[places[n]]]
        whole = self.render(conversation, wanted=frozenset(wanted))
        if len(whole.spans) != len(places):
            return [Part(conversation, whole, whole.spans)]
        parts = []
        for number in sorted(whole.apart.intersection(wanted)):
            through = replace(conversation, messages=conversation.messages[: places[number] + 1])
            alone = self.render(through, wanted=frozenset([number]))
            parts.append(Part(through, alone, [alone.spans[number]]))
        spans = [whole.spans[number] for number in wanted if number not in whole.apart]
        return [*parts, Part(conversation, whole, spans)] if spans or not parts else parts

    def _tokenized(self, parts: Sequence[Part], lengths: Lengths) -> list[list[Part]]:
        """Each part with its tokens; several, one for each answer, where one sequence has not the ids of serving."""
        for part, tokens in zip(parts, self._tokenize([part.rendered.text for part in parts]), strict=True):
            part.tokens = tokens
        # Tokens behind an added token do not depend on what stands before it: the rest of each prompt is asked alone.
        before = [self._before(part) for part in parts]
        prompts = list(dict.fromkeys(prompt for one in before for prompt, _ in one if prompt is not None))
        alone = dict(zip(prompts, (encoding.ids for encoding in self._encodings(prompts)), strict=True))
        made = []
        for part, prompts_of in zip(parts, before, strict=True):
            fits = all(prompt is not None and alone[prompt] == ids for prompt, ids in prompts_of)
            lengths.rows_joined += not fits
            made.append([part] if fits else self._apart(part))
        return made

    def _before(self, part: Part) -> list[tuple[str | None, list[int]]]:
        """Of each span the end of its prompt, and the ids of it; None where a token stands across one of its ends."""
        made: list[tuple[str | None, list[int]]] = []
        text, tokens = part.rendered.text, part.tokens
        for start, end in part.spans:
            first, last = tokens.within(start, end)
            if tokens.starts[first:last] and (tokens.starts[first] < start or tokens.ends[last - 1] > end):
                made.append((None, []))
                continue
            known = next((n for n in range(first - 1, -1, -1) if tokens.ids[n] in self._added), None)
            begin = 0 if known is None else tokens.starts[known]
            made.append((text[begin:start], tokens.ids[known or 0 : first]))
        return made

    def _apart(self, part: Part) -> list[Part]:
        """Sequences in which each answer stands behind the ids of its prompt alone, as few as there can be."""
        made: list[Part] = []
        for start, end in part.spans:
            (prompt,) = self._tokenize([part.rendered.text[:start]])
            answer = self._behind(part.rendered.text[start:end])
            tokens = Tokens(
                prompt.ids + answer.ids,
                prompt.starts + [start + place for place in answer.starts],
                prompt.ends + [start + place for place in answer.ends],
            )
            spans = [(start, end)]
            if made and tokens.ids[: len(made[-1].tokens.ids)] == made[-1].tokens.ids:
                spans = made.pop().spans + spans
            made.append(Part(part.conversation, part.rendered, spans, tokens))
        return made

    def _behind(self, text: str) -> Tokens:
        """Tokens of `text` behind another that they do not join with, so without the blank that some tokenizers add."""
        for lead in self._leads:
            before, tokens = self._tokenize([lead, lead + text])
            first = len(before.ids)
            if tokens.ids[:first] == before.ids and all(start >= len(lead) for start in tokens.starts[first:]):
                starts, ends = ([n - len(lead) for n in places[first:]] for places in (tokens.starts, tokens.ends))
                return Tokens(tokens.ids[first:], starts, ends)
        return self._tokenize([text])[0]

    @cached_property
    def _leads(self) -> list[str]:
        line, letter, both = self._tokenize(["\n", "a", "\na"])
        return [""] if line.ids + letter.ids == both.ids else ["\n", "a", "0", "."]

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.backend_tokenizer.get_added_tokens_decoder())

    def forced(self, conversation: Conversation) -> tuple[list[int], np.ndarray]:
        """Ids and marks of a row that the limits' own rule cannot shorten: its beginning is cut off, not the answer."""
        ids, marks = self.tokens(conversation, BadRows())
        excess = max(0, len(ids) - self.data.max_tokens)
        return list(ids[excess:]), marks[excess:]

    def tokens(self, conversation: Conversation, problems: BadRows) -> tuple[Sequence[int], np.ndarray]:
        """Ids and marks (1 where the token is learned) of one conversation that no limit touches."""
        try:
            (*_, last) = self._tokenized(self._parts(conversation), Lengths())[-1]
        except ValueError as error:
            raise DataError(f"{conversation.where}: {error}.") from None
        made = self._example(last, Lengths(), problems, False)
        assert made is not None
        return made

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [Tokens.of(encoding) for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return list(backend.encode_batch(list(texts), add_special_tokens=False))

    def _example(
        self, part: Part, lengths: Lengths, problems: BadRows, limited: bool = True
    ) -> tuple[Sequence[int], np.ndarray] | None:
        """Ids and marks of one sequence, or None for one that is left out."""
        conversation, ids = part.conversation, part.tokens.ids
        marks = np.zeros(len(ids), np.uint8)
        if conversation.learns_text:
            for start, end in part.spans:
                first, last = part.tokens.within(start, end)
                marks[first:last] = 1
            if not marks[1:].any():
                problems.add(conversation.where, "no token of an answer is left to learn from", conversation.messages)
                return None
        if not limited:
            return ids, marks
        region = self._limit(part, marks, lengths)
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

    def _limit(self, part: Part, marks: np.ndarray, lengths: Lengths) -> tuple[int, int] | None:
        """The range of tokens to take out, empty for a row that fits; None to drop the row."""
        data, conversation = self.data, part.conversation
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
        region = self._cut(part, max(over_prompt, over_total))
        return region if region is not None else drop(key)

    def _value(self, key: str) -> Any:
        return getattr(self.data, key.removeprefix("data."))

    def _cut(self, part: Part, excess: int, generation: bool = False) -> tuple[int, int] | None:
        """`excess` tokens of a text of the first question, the longest that has so many; None where none has.

        Only the user's text is cut: headers, special tokens and answers stay whole.
        """
        policy = self.data.truncation
        if policy is Truncation.drop:
            return None
        messages = part.conversation.messages
        if generation and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        text, spans = self.prompt.own_text(
            messages, **self._special, tools=part.conversation.tools, add_generation_prompt=generation,
            wanted=frozenset(),
        )  # fmt: skip
        tokens, rendered = part.tokens, part.rendered.text
        best: list[int] = []
        for begin, end in spans:
            if text[:end] != rendered[:end]:
                continue
            inside = [
                index
                for index, (start, stop) in enumerate(zip(tokens.starts, tokens.ends, strict=True))
                if begin <= start < stop <= end
            ]
            best = max(best, inside, key=len)
        if len(best) <= excess:
            return None
        if policy is Truncation.cut_prompt_left:
            first = best[0]
        elif policy is Truncation.cut_prompt_right:
            first = best[-1] + 1 - excess
        else:
            first = best[(len(best) - excess) // 2]
        return first, first + excess

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of the prompt alone, as a server would send them, cut as a training row is.

        Raises DataError for a row that the format cannot write.
        """
        try:
            rendered = self.render(conversation, generation=True)
        except ValueError as error:
            raise DataError(f"{conversation.where}: {error}.") from None
        (tokens,) = self._tokenize([rendered.text])
        ids = tokens.ids
        limit = min(self.data.max_tokens, self.data.max_prompt_tokens or self.data.max_tokens)
        part = Part(conversation, rendered, [], tokens)
        region = self._cut(part, len(ids) - limit, True) if len(ids) > limit else None
        return ids if region is None else ids[: region[0]] + ids[region[1] :]
