"""Conversations to input_ids and labels.

The whole rendered text is tokenised at once, without adding special tokens, since the template writes them. Labels are
found by character offsets. Some tokenizers merge the end of a prompt with its answer, or an answer with the text after
it. Such rows are tokenised piece by piece, if need be into one sequence per answer, so that training sees the token ids
that a server would send.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from llmft.config.convert import digest_of, key_fields
from llmft.config.data import DataConfig, Turns
from llmft.core.errors import DataError
from llmft.core.files import cache_directory
from llmft.data.columns import Conversation
from llmft.data.ends import Ends
from llmft.data.examples import Examples, load_examples, save_examples
from llmft.data.limits import LengthLimits, Lengths
from llmft.data.parts import Part, Tokens
from llmft.data.prompt import PromptFormat, Rendered
from llmft.data.readers import BadRows

Encoded = tuple[Sequence[int], np.ndarray]
"""A sequence's token ids, and a mark for each: 0, or 1 for a learned token (2, 3, … for those of further answers)."""
CACHE_VERSION = 3
BATCH_ROWS = 4096
"""Rows rendered and tokenised at once: enough for the tokenizer's threads, and small in memory."""


@dataclass
class Encoder:
    """Turns conversations into examples with one tokenizer and one prompt format.

    With a `fingerprint` of the rows, tokenised splits are cached next to the cache of `datasets` for later runs.
    """

    tokenizer: Any
    prompt: PromptFormat
    data: DataConfig
    fingerprint: str | None = None
    warn: Callable[[str], None] = print
    lengths: dict[str, Lengths] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)

    def render(self, conversation: Conversation, *, generation: bool = False, **options: Any) -> Rendered:
        """The text of a conversation; for `generation` that of its prompt (all but the last answer)."""
        messages = conversation.messages
        if generation and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.prompt.render(messages, tools=conversation.tools, add_generation_prompt=generation, **options)

    @cached_property
    def marker(self) -> str:
        """What the format writes after an answer."""
        return self.prompt.end_marker()

    @cached_property
    def ends(self) -> Ends:
        """What ends an answer: the tokenizer's end token, and the format's end marker."""
        eos = self.tokenizer.eos_token_id
        ids = [] if eos is None else [eos]
        markers = self._tokens_after_text(self.prompt.end_marker(call=True)).ids[-1:]
        marker_ids = self._tokens_after_text(self.marker).ids if self.marker else []
        text = self.marker
        if len(marker_ids) == 1 or (marker_ids and marker_ids[-1] in self._added_tokens):
            markers.append(marker_ids[-1])
            # The tokens before the end token are text of the format, unless all of them are special tokens.
            marker_ids = [] if self._added_tokens.issuperset(marker_ids) else marker_ids[:-1]
            text = self._decode(marker_ids).strip()
        ids += [
            token
            for token in dict.fromkeys(markers)
            if token not in ids and (token in self._added_tokens or not marker_ids)
        ]
        return Ends(ids, text, len(marker_ids), self._decode)

    @cached_property
    def _limits(self) -> LengthLimits:
        return LengthLimits(self.data, self.prompt)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def reference(self, conversation: Conversation) -> str:
        """The last answer as a correct generation would spell it."""
        content = str(conversation.messages[-1]["content"])
        last_answer = sum(message["role"] == "assistant" for message in conversation.messages) - 1
        rendered = self.render(conversation, wanted=frozenset([last_answer]))
        start, end = rendered.spans[-1]
        text = rendered.text[start:end].strip().removesuffix(self.marker).strip()
        return content if "".join(text.split()) == "".join(content.split()) else text

    # ----------------------------------------------------------------------------------------------------- encoding

    def encode(self, split: str, conversations: Sequence[Conversation], problems: BadRows) -> Examples:
        """All conversations of a split that fit, in order; the others are counted in `lengths`.

        Raises DataError when no row is left.
        """
        path = cache_directory() / f"tokens-{self._key(split)}.arrow" if self.fingerprint and self.data.cache else None
        examples = self._load(path, split, conversations, problems) if path is not None and path.is_file() else None
        if examples is None:
            before = len(problems.rejected)
            examples = self._encode(split, conversations, problems)
            if path is not None:
                facts = {"lengths": asdict(self.lengths[split]), "rejected": problems.rejected[before:]}
                try:
                    save_examples(path, examples, facts)
                except OSError as error:
                    self.warn(f"the tokenised rows could not be cached in {path.parent} ({error.strerror}).")
        if conversations and not len(examples):
            dropped_by = self.lengths[split].dropped_by
            reasons = ", ".join(f"{count} by {key}" for key, count in dropped_by.items()) or "bad rows"
            raise DataError(
                f"data={self.data.name}: none of the {len(conversations)} {split} rows is left after the length limits "
                f"({reasons}); raise data.max_tokens={self.data.max_tokens} or the limit named."
            )
        return examples

    def _key(self, split: str) -> str:
        backend = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        special = [self.tokenizer.bos_token, self.tokenizer.eos_token]
        numbers = key_fields(self.data), key_fields(self.prompt.config)
        return digest_of([CACHE_VERSION, split, self.fingerprint, *numbers, backend, special])[:24]

    def _load(self, path: Any, split: str, conversations: Sequence[Conversation], problems: BadRows) -> Examples | None:
        try:
            examples, facts = load_examples(path, conversations)
            self.lengths[split] = Lengths(**facts["lengths"])
        except (ValueError, KeyError, TypeError) as error:
            self.warn(f"the cached tokens are damaged ({error}); they are tokenised again.")
            path.unlink(missing_ok=True)
            return None
        problems.rejected.extend(facts["rejected"])
        self.cached.add(split)
        return examples

    def _encode(self, split: str, conversations: Sequence[Conversation], problems: BadRows) -> Examples:
        lengths = self.lengths[split] = Lengths()
        encoded: list[Encoded] = []
        rows: list[int] = []
        for start in range(0, len(conversations), BATCH_ROWS):
            parts_of: dict[int, list[Part]] = {}
            for row, conversation in enumerate(conversations[start : start + BATCH_ROWS], start):
                try:
                    parts_of[row] = self._parts(conversation)
                    lengths.rows_unlike += parts_of[row][0].rendered.unlike
                except ValueError as error:
                    problems.add(conversation.where, str(error), conversation.messages)
            tokenized = iter(self._tokenized(list(chain.from_iterable(parts_of.values())), lengths))
            for row, parts in parts_of.items():
                sequences = [sequence for _ in parts for sequence in next(tokenized)]
                if conversations[row].comparison is not None:
                    examples_of_row = [self._compared(sequences, lengths, problems)]
                else:
                    lengths.rows_split += len(sequences) > 1
                    examples_of_row = [self._example(part, lengths, problems) for part in sequences]
                for example in filter(None, examples_of_row):
                    encoded.append(example)
                    rows.append(row)
        examples = Examples.of([ids for ids, _ in encoded], [marks for _, marks in encoded], rows, conversations)
        lengths.rows = len(examples)
        lengths.tokens = int(examples.lengths.sum())
        lengths.labelled_tokens = int(examples.labelled_tokens.sum())
        lengths.longest = int(examples.lengths.max(initial=0))
        return examples

    def _parts(self, conversation: Conversation) -> list[Part]:
        """The training texts of a row: one, plus one for each answer that a server would see in a different text."""
        if conversation.comparison is not None:
            return self._answers(conversation, conversation.comparison.others)
        if not conversation.learns_text:
            return [Part(conversation, self.render(conversation, wanted=frozenset()), [])]
        answers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        first = len(answers) - 1 if self.data.train_turns is Turns.last else conversation.trained_from
        learned = [n for n in range(first, len(answers)) if "weight" not in conversation.messages[answers[n]]]
        full = self.render(conversation, wanted=frozenset(learned))
        if len(full.spans) != len(answers):
            return [Part(conversation, full, full.spans)]
        parts = []
        for number in sorted(full.rewritten.intersection(learned)):
            prefix = replace(conversation, messages=conversation.messages[: answers[number] + 1])
            rendered = self.render(prefix, wanted=frozenset([number]))
            parts.append(Part(prefix, rendered, [rendered.spans[number]]))
        spans = [full.spans[number] for number in learned if number not in full.rewritten]
        return [*parts, Part(conversation, full, spans)] if spans or not parts else parts

    def _answers(self, conversation: Conversation, others: Sequence[str]) -> list[Part]:
        """A text for each answer to the same prompt; the conversation's own is the first."""
        prompt = conversation.messages[:-1]
        parts = []
        for answer in [str(conversation.messages[-1]["content"]), *others]:
            alternative = replace(conversation, messages=[*prompt, {"role": "assistant", "content": answer}])
            rendered = self.render(alternative, wanted=frozenset([sum(m["role"] == "assistant" for m in prompt)]))
            parts.append(Part(alternative, rendered, rendered.spans[-1:]))
        return parts

    def _compared(self, parts: Sequence[Part], lengths: Lengths, problems: BadRows) -> Encoded | None:
        """The prompt once with all answers after it, and marks: 0 for the prompt, 1 for the first answer, ….

        None for a row that is left out: limits apply to the prompt with its longest answer, and no answer is cut.
        """
        where, prompts, answers = parts[0].conversation.where, [], []
        for part in parts:
            first, last = part.tokens.within(*part.spans[-1])
            prompts.append(part.tokens.ids[:first])
            answers.append(part.tokens.ids[first:last])
        prompt = prompts[0]
        if any(other != prompt for other in prompts):
            problems.add(where, "the answers do not follow the same prompt in this format", None)
            return None
        if not prompt or not all(answers):
            problems.add(where, "no token of an answer, or of what it answers, is left to learn from", None)
            return None
        longest = max(range(len(answers)), key=lambda index: len(answers[index]))
        region = self._limits.region(
            parts[longest], len(prompt), len(answers[longest]), sum(map(len, answers)), lengths
        )
        if region is None:
            return None
        prompt = [*prompt[: region[0]], *prompt[region[1] :]]
        marks = np.repeat(np.arange(len(answers) + 1), [len(prompt), *map(len, answers)]).astype(np.uint8)
        return [*prompt, *(token for answer in answers for token in answer)], marks

    def _tokenized(self, parts: Sequence[Part], lengths: Lengths) -> list[list[Part]]:
        """Each part with its tokens; one part per answer where a single sequence would differ from a server's ids."""
        for part, tokens in zip(parts, self._tokenize([part.rendered.text for part in parts]), strict=True):
            part.tokens = tokens
        # Tokens after an added token do not depend on the text before it, so only the rest of each prompt is tokenised.
        prompt_ends = [self._prompt_ends(part) for part in parts]
        prompts = list(dict.fromkeys(prompt for ends in prompt_ends for prompt, _ in ends if prompt is not None))
        ids_alone = dict(zip(prompts, (encoding.ids for encoding in self._encodings(prompts)), strict=True))
        sequences = []
        for part, prompt_ids in zip(parts, prompt_ends, strict=True):
            fits = all(prompt is not None and ids_alone[prompt] == ids for prompt, ids in prompt_ids)
            lengths.rows_joined += not fits
            sequences.append([part] if fits else self._one_sequence_per_answer(part))
        return sequences

    def _prompt_ends(self, part: Part) -> list[tuple[str | None, list[int]]]:
        """For each span, the end of its prompt and its ids; None where a token crosses one of the span's ends."""
        prompt_ends: list[tuple[str | None, list[int]]] = []
        text, tokens = part.rendered.text, part.tokens
        for start, end in part.spans:
            first, last = tokens.within(start, end)
            if tokens.starts[first:last] and (tokens.starts[first] < start or tokens.ends[last - 1] > end):
                prompt_ends.append((None, []))
                continue
            added = next((n for n in range(first - 1, -1, -1) if tokens.ids[n] in self._added_tokens), None)
            text_start = 0 if added is None else tokens.starts[added]
            prompt_ends.append((text[text_start:start], tokens.ids[added or 0 : first]))
        return prompt_ends

    def _one_sequence_per_answer(self, part: Part) -> list[Part]:
        """As few sequences as possible in which each answer follows the ids of its own prompt."""
        parts: list[Part] = []
        for start, end in part.spans:
            (prompt,) = self._tokenize([part.rendered.text[:start]])
            answer = self._tokens_after_text(part.rendered.text[start:end])
            tokens = Tokens(
                prompt.ids + answer.ids,
                prompt.starts + [start + offset for offset in answer.starts],
                prompt.ends + [start + offset for offset in answer.ends],
            )
            spans = [(start, end)]
            if parts and tokens.ids[: len(parts[-1].tokens.ids)] == parts[-1].tokens.ids:
                spans = parts.pop().spans + spans
            parts.append(Part(part.conversation, part.rendered, spans, tokens))
        return parts

    def _tokens_after_text(self, text: str) -> Tokens:
        """Tokens of `text` after a text that it does not merge with, without a leading space."""
        for lead in self._lead_texts:
            before, tokens = self._tokenize([lead, lead + text])
            first = len(before.ids)
            if tokens.ids[:first] == before.ids and all(start >= len(lead) for start in tokens.starts[first:]):
                starts, ends = (
                    [offset - len(lead) for offset in offsets[first:]] for offsets in (tokens.starts, tokens.ends)
                )
                return Tokens(tokens.ids[first:], starts, ends)
        return self._tokenize([text])[0]

    @cached_property
    def _lead_texts(self) -> list[str]:
        line, letter, both = self._tokenize(["\n", "a", "\na"])
        return [""] if line.ids + letter.ids == both.ids else ["\n", "a", "0", "."]

    @cached_property
    def _added_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.backend_tokenizer.get_added_tokens_decoder())

    def truncated(self, conversation: Conversation) -> tuple[list[int], np.ndarray]:
        """Ids and marks of a row that `data.truncation` cannot shorten: the beginning is cut off, never the answer."""
        ids, marks = self.tokens(conversation)
        excess = max(0, len(ids) - self.data.max_tokens)
        return list(ids[excess:]), marks[excess:]

    def tokens(self, conversation: Conversation) -> Encoded:
        """Ids and marks (1 for a learned token) of one conversation, without length limits."""
        try:
            (*_, last) = self._tokenized(self._parts(conversation), Lengths())[-1]
        except ValueError as error:
            raise DataError(f"{conversation.where}: {error}.") from None
        example = self._example(last, Lengths(), BadRows(), limited=False)
        assert example is not None
        return example

    def _tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [Tokens.of(encoding) for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return list(backend.encode_batch(list(texts), add_special_tokens=False))

    def _example(self, part: Part, lengths: Lengths, problems: BadRows, *, limited: bool = True) -> Encoded | None:
        """Ids and marks of one sequence; None for one that is dropped."""
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
        learned = int(marks.sum())
        region = self._limits.region(part, len(ids) - learned, learned, learned, lengths)
        if region is None:
            return None
        start, stop = region
        return ids[:start] + ids[stop:], np.concatenate([marks[:start], marks[stop:]])

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Token ids of the prompt as a server would send them, cut like a training row.

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
        region = self._limits.cut(part, len(ids) - limit, True) if len(ids) > limit else None
        return ids if region is None else ids[: region[0]] + ids[region[1] :]
