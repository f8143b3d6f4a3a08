"""Messages to text with the spans of the answers.

A prompt format is one YAML with a Jinja chat template. `{% generation %}` and `{% endgeneration %}` mark what the model
learns to write, as in transformers. So the trained text is the text that the exported tokenizer renders. Templates run
in Jinja's immutable sandbox, see `llmft.data.sandbox`.

Most vendors' templates have no such marks, and may write earlier turns differently once later ones follow (Qwen 3
drops earlier reasoning). There, an answer is what the template adds to the prompt that a server would send. An answer
that the whole conversation's text writes differently is `rewritten`: it is learned from a text that ends with it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime

from llmft.config.data import PromptConfig, SystemRole
from llmft.core.errors import ConfigError
from llmft.data.messages import Message
from llmft.data.sandbox import compile_bounded, make_environment, render_bounded
from llmft.data.tool_calls import call_form, has_python_arguments, with_placeholders

# Marks around answers while a template renders, random per process so that no text contains them.
_OPEN = f"\ue000{secrets.randbits(64):020}\ue001"
_CLOSE = f"\ue002{secrets.randbits(64):020}\ue003"
_CUT = f"\ue004{secrets.randbits(64):020}\ue005"
THINK, THOUGHT = "<think>", "</think>"
Tools = list[Message] | None


@dataclass(frozen=True, slots=True)
class Rendered:
    """Rendered text, and the half-open character ranges of the answers in it.

    Attributes:
        rewritten: numbers of the answers that this text writes differently than a server's; their spans are empty.
            Each is the last answer of the text of the messages up to it.
        unlike: whether the text before some answer is not a server's prompt in any text.
    """

    text: str
    spans: list[tuple[int, int]]
    rewritten: frozenset[int] = frozenset()
    unlike: bool = False


class _GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}`: writes its block between two marks."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)
    used = False

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class PromptFormat:
    """Renders conversations with the template of a PromptConfig, and the special tokens that it asks for."""

    def __init__(
        self, config: PromptConfig, *, bos_token: str | None = None, eos_token: str | None = None, strict: bool = True
    ) -> None:
        """Compiles the template. Raises ConfigError for invalid Jinja, or with `strict` if no answer is marked."""
        if not config.template:
            raise ConfigError(f"prompt={config.name} has no template: set prompt.template or choose a format.")
        self.config = config
        self.eos_token = eos_token or ""
        self._variables = {"bos_token": bos_token or "", "eos_token": self.eos_token, "documents": None}
        try:
            environment = make_environment([_GenerationMarks], strict=strict)
            self._template = compile_bounded(environment, config.template)
            nodes = environment.parse(config.template).find_all((jinja2.nodes.Getattr, jinja2.nodes.Const))
            self._reads_input = any(getattr(n, "attr", getattr(n, "value", None)) == "input" for n in nodes)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"prompt={config.name}: template line {error.lineno}: {error.message}") from None
        except Exception as error:
            raise ConfigError(f"prompt={config.name}: {_describe(error)}.") from None
        # Our own templates must mark the answers; in a vendor's without marks they are found by its prompts.
        self.marked = environment.extensions[_GenerationMarks.identifier].used  # type: ignore[attr-defined]
        if not self.marked and strict:
            raise ConfigError(
                f"prompt={config.name}: the template marks no answer with {{% generation %}} … "
                "{% endgeneration %}, so nothing would be trained; choose a format by name or add the marks."
            )
        self._call_forms = list(itertools.product((None, ""), (False, True), (False, True)))
        self._layouts: dict[Any, tuple[frozenset[int], bool]] = {}

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with the system prompt and the instruction in the format's places.

        A row's own system prompt takes precedence over the configured one; an empty configured one removes both. A
        format without a place for Alpaca's input gets it after the question.

        Raises ValueError for a message that the format has no place for.
        """
        config = self.config
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        for turn in turns:
            if "input" in turn and not self._reads_input:
                turn["content"] = f"{turn['content']}{config.joiner}{turn.pop('input')}"
            if "reasoning_content" in turn:  # templates use any of these names
                turn |= dict.fromkeys(("reasoning", "thinking"), turn["reasoning_content"])
        system = config.system
        if system == "":
            turns = [turn for turn in turns if turn["role"] != "system"]
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if config.instruction:
            if first is None:
                raise ValueError("prompt.instruction goes before a question, and this row has none")
            first["content"] = f"{config.instruction}{config.joiner}{first['content']}"
        if turns and turns[0]["role"] == "system":
            system = None
        if system:
            turns.insert(0, {"role": "system", "content": system})
        if config.system_role is SystemRole.native:
            return turns
        merged: list[Message] = []
        pending: list[str] = []
        for turn in turns:
            if turn["role"] == "system":
                pending.append(turn["content"])
                continue
            if pending and turn["role"] == "user":
                turn["content"] = config.joiner.join([*filter(None, pending), turn["content"]])
                pending = []
            merged.append(turn)
        if any(turn["role"] == "system" for turn in turns) and config.system_role is SystemRole.refuse:
            raise ValueError(f"the format {config.name} has no place for a system prompt")
        if any(pending):
            raise ValueError(f"prompt={config.name} puts a system prompt before a question, and none follows this one")
        return merged

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Message] | None = None,
        add_generation_prompt: bool = False,
        wanted: frozenset[int] | None = None,
    ) -> Rendered:
        """Renders `messages`; special tokens are in the text as the template writes them.

        `wanted` are the numbers of the answers that are learned (None: all). Only they must match a server's text.

        Raises ValueError for an error of the template, such as roles that do not alternate, or for a part of the
        messages that it does not write.
        """
        turns = self.prepare(messages)
        rendered = self._render(turns, tools, add_generation_prompt, wanted)
        self._check_text(turns, rendered, wanted if not add_generation_prompt else frozenset())
        if tools or any("tool_calls" in turn or "reasoning_content" in turn for turn in turns):
            self._check_words(turns, tools, add_generation_prompt, wanted)
        return rendered

    def _render(self, turns: list[Message], tools: Tools, generation: bool, wanted: frozenset[int] | None) -> Rendered:
        text, spans = _without_marks(self._write(turns, tools, generation))
        if generation:
            return Rendered(text, spans)
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        learned = [number for number in range(len(answers)) if wanted is None or number in wanted]
        if not self.marked:
            return self._by_prompts(turns, tools, text, answers, learned)
        if len(spans) != len(answers):
            if len(learned) < len(answers):
                raise ValueError(
                    f"prompt={self.config.name}: the template marks {len(spans)} spans for {len(answers)} answers "
                    "and cannot train on some of them only"
                )
            return Rendered(text, spans)
        layouts = (
            (turn["role"], "reasoning_content" in turn, len(turn.get("tool_calls", ())), THOUGHT in turn["content"])
            for turn in turns
        )
        signature = (tuple(layouts), bool(tools))
        if signature not in self._layouts:
            self._layouts[signature] = self._compare_with_serving(turns, tools, text, spans, answers)
        rewritten, unlike = self._layouts[signature]
        return Rendered(text, [(0, 0) if n in rewritten else span for n, span in enumerate(spans)], rewritten, unlike)

    def _compare_with_serving(
        self, turns: list[Message], tools: Tools, text: str, spans: list[tuple[int, int]], answers: list[int]
    ) -> tuple[frozenset[int], bool]:
        """(`Rendered.rewritten`, `Rendered.unlike`) of a text."""
        rewritten, unlike = set(), False
        for number, (turn, (start, end)) in enumerate(zip(answers, spans, strict=True)):
            prompt, _ = _without_marks(self._write(turns[:turn], tools, True))
            alone, alone_spans = _without_marks(self._write(turns[: turn + 1], tools, False))
            alone_start, alone_end = alone_spans[-1]
            if text[:start] == prompt and alone[:alone_end] == text[:end]:
                continue
            if turn + 1 < len(turns) and alone[:alone_start] == prompt:
                rewritten.add(number)
            else:
                unlike = True
        return frozenset(rewritten), unlike

    def _by_prompts(
        self, turns: list[Message], tools: Tools, text: str, answers: list[int], learned: list[int]
    ) -> Rendered:
        """Answers of a template without marks: the text that it adds to a server's prompt."""
        spans, rewritten = [(0, 0)] * len(answers), set()
        for number in reversed(learned):
            turn = answers[number]
            start, prefix = self._last_answer(turns[: turn + 1], tools)
            if turn + 1 == len(turns) and not text.startswith(prefix):
                text = prefix
            if text.startswith(prefix):
                spans[number] = (start, len(prefix))
            else:
                rewritten.add(number)
        return Rendered(text, spans, frozenset(rewritten))

    def _last_answer(self, turns: list[Message], tools: Tools) -> tuple[int, str]:
        """(start of the last answer, a server's prompt with that answer).

        Raises ValueError for a template whose answer cannot be found.
        """
        prompt = self._write(turns[:-1], tools, True)
        text = self._up_to_answer(turns, tools)
        if text.startswith(prompt) and len(text) > len(prompt):
            return len(prompt), text
        opening = prompt.rstrip()
        if opening.endswith(THINK) and text.startswith(opening.removesuffix(THINK)):
            # DeepSeek-R1: the prompt opens the reasoning, and a finished turn is written without it.
            answer = dict(turns[-1])
            thoughts = answer.pop("reasoning_content", None)
            if thoughts is None and THOUGHT in answer["content"]:
                thoughts, _, answer["content"] = answer["content"].partition(THOUGHT)
                thoughts = thoughts.strip().removeprefix(THINK)
            rest = self._up_to_answer([*turns[:-1], answer], tools)[len(opening) - len(THINK) :]
            newline = "" if prompt.endswith("\n") else "\n"
            return len(prompt), f"{prompt}{newline}{(thoughts or '').strip()}\n{THOUGHT}\n\n{rest.lstrip()}"
        without_header = self._write(turns[:-1], tools, False)
        header = prompt[len(without_header) :] if prompt.startswith(without_header) else ""
        difference = next((n for n, (one, two) in enumerate(zip(prompt, text, strict=False)) if one != two), 0)
        start = text.find(header, max(0, difference - len(header))) if header.strip() else -1
        if start >= 0 and start + len(header) < len(text):  # Hermes closes the last tool result differently
            return len(prompt), prompt + text[start + len(header) :]
        raise ValueError(
            f"prompt={self.config.name}: this template does not mark its answers, and writes them differently than "
            "after its prompts, so they cannot be found; choose a format by name"
        )

    def _up_to_answer(self, turns: list[Message], tools: Tools) -> str:
        """The text up to the end of the last answer, without the end token of a finished conversation (Phi 3.5)."""
        text = self._write(turns, tools, False).rstrip()
        return text.removesuffix(self.eos_token).rstrip() if self._closes_with_eos else text

    @cached_property
    def _closes_with_eos(self) -> bool:
        """Whether an end token follows a whole conversation, in addition to what ends each answer."""
        texts = [("user", "Qa"), ("assistant", "Xanswer"), ("user", "Xquestion")]
        dialogue = [{"role": role, "content": content} for role, content in texts]
        try:
            last = self._write(dialogue[:2], None, False).rpartition("Xanswer")[2].strip()
            middle = self._write(dialogue, None, False).rpartition("Xanswer")[2].partition("Xquestion")[0]
        except ValueError:
            return False
        eos = self.eos_token
        return bool(eos) and last.endswith(eos) and last != eos and eos not in middle

    # ----------------------------------------------------------------------------------------------------- checking

    def _check_text(self, turns: list[Message], rendered: Rendered, wanted: frozenset[int] | None) -> None:
        """Raises ValueError if the template drops or changes a text of the messages."""
        number = -1
        answers = sum(turn["role"] == "assistant" for turn in turns)
        for turn in turns:
            text, content = rendered.text, turn["content"]
            if turn["role"] == "assistant":
                number += 1
                if (wanted is not None and number not in wanted) or number in rendered.rewritten:
                    continue
                spans = [rendered.spans[number]] if len(rendered.spans) == answers else rendered.spans
                text = "".join(text[start:end] for start, end in spans)
                if spans and THINK in content and THINK not in text:  # opened by the prompt
                    text = THINK + text
            for content_part in (content, turn.get("input")):
                if content_part and not _contains(text, content_part, turn["role"] == "tool"):
                    raise ValueError(
                        f"prompt={self.config.name} does not write the text of a message ({turn['role']}: "
                        f"{_shortened(content_part)}); choose another format, or leave the row out"
                    )

    def _check_words(self, turns: list[Message], tools: Tools, generation: bool, wanted: frozenset[int] | None) -> None:
        """Raises ValueError for tools, calls or reasoning that the template does not write, or not into the answer.

        Each of their names and texts is replaced by a unique word, and the words are searched in the text.
        """
        words = (f"Wq{number}x{secrets.token_hex(4)}" for number in itertools.count())
        expected: list[tuple[str, str, int | None, bool]] = []
        renamed_tools: list[Message] = []
        for tool in tools or ():
            name = next(words)
            renamed_tools.append({**tool, "function": {**tool["function"], "name": name}})
            expected.append(("tools", name, None, True))
        copies, number = [], -1
        for turn in turns:
            number += int(turn["role"] == "assistant")
            learned = not generation and (wanted is None or number in wanted)
            turn = dict(turn)
            if "reasoning_content" in turn:
                thought = next(words)
                turn |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)
                expected.append(("reasoning_content", thought, number, learned))
            if "tool_calls" in turn:
                replaced: list[str] = []
                functions = [{key: c["function"][key] for key in ("name", "arguments")} for c in turn["tool_calls"]]
                functions = with_placeholders(functions, words, replaced)
                pairs = zip(turn["tool_calls"], functions, strict=True)
                turn["tool_calls"] = [{**call, "function": function} for call, function in pairs]
                expected += [("tool_calls", word, number, learned) for word in replaced]
            copies.append(turn)
        rendered = self._render(copies, renamed_tools or tools, generation, wanted)
        answers = sum(turn["role"] == "assistant" for turn in turns)
        for key, word, answer, learned in expected:
            text = rendered.text
            if answer is not None:
                if answer in rendered.rewritten or (not learned and key == "reasoning_content"):
                    continue  # checked as a last answer; reasoning that is not learned may be left out
                if learned and len(rendered.spans) == answers:
                    text = text[slice(*rendered.spans[answer])]
            if word not in text:
                raise ValueError(
                    f"prompt={self.config.name} does not write the row's '{key}'"
                    f"{'' if answer is None or not learned else ' into the answer'}; choose a format that writes them, "
                    "such as prompt=qwen3, or leave them out"
                )

    # ------------------------------------------------------------------------------------------------------ writing

    def _write(self, turns: list[Message], tools: Tools, generation: bool) -> str:
        """The template's text. Templates expect calls in one of several forms; the first that works is kept."""
        if not any("tool_calls" in turn for turn in turns):
            return self._render_template(turns, tools, generation)
        first_error: ValueError | None = None
        ids, number = [], 0
        for turn in turns:  # ids of calls and results without one: the number of the call
            number = 0 if turn["role"] != "tool" else number + 1
            ids.append(f"call{max(0, number - 1)}")
        for form in list(self._call_forms):
            try:
                forms = [call_form(turn, name, *form) for turn, name in zip(turns, ids, strict=True)]
                text = self._render_template(forms, tools, generation)
            except ValueError as error:
                first_error = first_error or error
                continue
            source = json.dumps([turns, tools], default=str)
            writes_none = form[0] is None and "None" in text and "None" not in source
            if writes_none or has_python_arguments(turns, text):
                continue
            self._call_forms.sort(key=lambda other, form=form: other != form)  # type: ignore[misc]
            return text
        raise first_error or ValueError(f"prompt={self.config.name} does not write 'tool_calls' as JSON")

    def _render_template(self, turns: list[Message], tools: Tools, generation: bool) -> str:
        variables = {**self._variables, "messages": turns, "tools": tools, "add_generation_prompt": generation}
        size = sum(len(turn["content"] or "") for turn in turns)
        if tools or any(len(turn) > 2 for turn in turns):
            size += len(json.dumps([tools, turns], default=str))
        try:
            return render_bounded(self._template, variables, size)
        except Exception as error:
            raise ValueError(f"prompt={self.config.name}: {_describe(error)}") from None

    def own_text(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of `render`, and the spans of the first question's texts, which length limits may cut."""
        copies = [dict(message) for message in messages]
        first = next((message for message in copies if message["role"] == "user"), {})
        for key in ("content", "input"):
            text = first.get(key, "")
            if text.strip():  # inside the white space, which a template may trim
                start = len(text) - len(text.lstrip())
                first[key] = f"{text[:start]}{_CUT}{text.strip()}{_CUT}{text[start + len(text.strip()) :]}"
        segments = self.render(copies, **options).text.split(_CUT)
        ends = list(itertools.accumulate(map(len, segments)))
        return "".join(segments), [(ends[n], ends[n + 1]) for n in range(0, len(ends) - 1, 2) if n + 1 < len(ends)]

    def end_marker(self, *, call: bool = False) -> str:
        """What the model learns to write after an answer; empty for a format without an end.

        With `call`, what follows a tool call; empty for a format without tool calls.
        """
        function = {"name": "Xtool", "description": "t", "parameters": {"type": "object", "properties": {}}}
        tools: Tools = [{"type": "function", "function": function}]
        answer: Message = {"role": "assistant", "content": "" if call else "Xanswer"}
        if call:
            answer["tool_calls"] = [{"type": "function", "function": {"name": "Xtool", "arguments": {"a": "Xanswer"}}}]
        # One template of Hermes is only for conversations with tools.
        for offered_tools in (tools,) if call else (None, tools):
            with contextlib.suppress(ValueError):
                dialogue = [{"role": "user", "content": "Q"}, answer]
                rendered = self.render(dialogue, tools=offered_tools)
                start, end = rendered.spans[-1]
                return rendered.text[start:end].rpartition("Xanswer")[2].strip()
        return ""


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks around answers, and the answers' spans."""
    parts = marked.split(_OPEN)
    text, spans = parts[0], []
    for part in parts[1:]:
        answer, _, rest = part.partition(_CLOSE)
        spans.append((len(text), len(text) + len(answer)))
        text += answer + rest
    if any(mark[:9] in text or mark[-9:] in text for mark in (_OPEN, _CLOSE)):
        raise ValueError("the template has {% generation %} inside another, or changes the text around it")
    return text, spans


def _describe(error: Exception) -> str:
    """The error of a template, with its type unless the message is enough."""
    known = isinstance(error, (jinja2.TemplateError, ValueError))
    return str(error) if known else f"the template fails with {type(error).__name__} ({error})"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _contains(text: str, part: str, escaped: bool = False) -> bool:
    """Whether `text` contains `part`, up to white space; with `escaped`, also as a JSON string."""
    if part.strip() in text or (escaped and json.dumps(part, ensure_ascii=False)[1:-1] in text):
        return True
    squeezed = "".join(text.split())
    return "".join(part.split()) in squeezed or (escaped and "".join(part.split()) in "".join(squeezed.split("\\")))


def prompt_format(config: PromptConfig, tokenizer: Any) -> PromptFormat:
    """The configured format; `prompt=native` is the tokenizer's own chat template.

    Raises ConfigError when the tokenizer has no template.
    """
    template = config.template
    if not template:
        template = getattr(tokenizer, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        if not isinstance(template, str):
            raise ConfigError("prompt=native: this tokenizer has no chat template; choose a format by name.")
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if adds_bos and "bos_token" not in template and tokenizer.bos_token not in template:
        # The model never saw a text without a begin token, and a server reads the exported template.
        template = "{{- bos_token -}}" + template
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return PromptFormat(replace(config, template=template), **tokens, strict=bool(config.template))
