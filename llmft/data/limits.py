"""Length limits: which rows are dropped or cut, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmft.config.data import DataConfig, Truncation
from llmft.core.errors import DataError
from llmft.data.parts import Part
from llmft.data.prompt import PromptFormat


@dataclass
class Lengths:
    """Counts of what the length limits did to one split."""

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
    """Rows in which the tokenizer merges a prompt with its answer, or an answer with the text after it."""
    rows_split: int = 0
    """Rows that became several sequences."""
    rows_unlike: int = 0
    """Rows whose prompt the template writes differently with an answer after it than for a server."""

    @property
    def answer_share_dropped(self) -> float:
        """Share of all answer tokens that were dropped."""
        return self.answer_tokens_dropped / max(1, self.answer_tokens_dropped + self.labelled_tokens)


@dataclass(frozen=True)
class LengthLimits:
    """The limits of `data`, for texts in the format `prompt`."""

    data: DataConfig
    prompt: PromptFormat

    def region(self, part: Part, prompt: int, answer: int, learned: int, lengths: Lengths) -> tuple[int, int] | None:
        """The range of tokens to cut, empty for a row that fits; None to drop the row. Counts both in `lengths`.

        `prompt` and `answer` are the row's numbers of tokens, of several answers those of the longest one, and
        `learned` is the number in all answers.
        """
        data, conversation, total = self.data, part.conversation, prompt + answer

        def drop(key: str) -> tuple[int, int] | None:
            lengths.dropped_by[key] = lengths.dropped_by.get(key, 0) + 1
            lengths.rows_dropped += 1
            lengths.answer_tokens_dropped += learned
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
            limit = getattr(data, key.removeprefix("data."))
            raise DataError(
                f"{conversation.where}: {total} tokens, {prompt} of them prompt, exceed {key}={limit}; "
                "set data.truncation=drop to leave such rows out, or cut_prompt_left to shorten their prompt."
            )
        excess = max(over_prompt, over_total)
        region = self.cut(part, excess)
        if region is None:
            return drop(key)
        lengths.rows_cut += 1
        lengths.prompt_tokens_cut += excess
        return region

    def cut(self, part: Part, excess: int, generation: bool = False) -> tuple[int, int] | None:
        """The range of `excess` tokens to cut from the longest text of the first question; None if it is too short.

        Only the user's text is cut. Headers, special tokens and answers are never cut.
        """
        policy = self.data.truncation
        if policy is Truncation.drop:
            return None
        messages = part.conversation.messages
        if generation and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        text, spans = self.prompt.own_text(
            messages, tools=part.conversation.tools, add_generation_prompt=generation, wanted=frozenset()
        )
        tokens, rendered = part.tokens, part.rendered.text
        longest: list[int] = []
        for begin, end in spans:
            if text[:end] != rendered[:end]:
                continue
            inside = [
                index
                for index, (start, stop) in enumerate(zip(tokens.starts, tokens.ends, strict=True))
                if begin <= start < stop <= end
            ]
            longest = max(longest, inside, key=len)
        if len(longest) <= excess:
            return None
        if policy is Truncation.cut_prompt_left:
            first = longest[0]
        elif policy is Truncation.cut_prompt_right:
            first = longest[-1] + 1 - excess
        else:
            first = longest[(len(longest) - excess) // 2]
        return first, first + excess
