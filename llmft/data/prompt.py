"""Messages to text with marked answer spans.

A prompt format is one YAML with a Jinja chat template; what the model must learn to write stands between
`{% generation %}` and `{% endgeneration %}`, the marks that transformers reads too. So the text that is trained
is the text that the exported tokenizer renders. Templates run in Jinja's immutable sandbox, see `llmft.data.sandbox`.

A vendor's template mostly has no such marks, and may write earlier turns otherwise once later ones follow (Qwen 3
leaves out what was thought). An answer of it is what it adds to the prompt that a server would send; one that the text
of the whole conversation does not hold so is `apart`, to be learned from a text that ends with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime

from llmft.config.sections import PromptConfig, SystemRole
from llmft.core.errors import ConfigError
from llmft.data.messages import Message
from llmft.data.sandbox import compile_bounded, make_environment, render_bounded

# Marks around answers while a template renders. Drawn anew in every process, so that no text can contain them.
_OPEN = f"\ue000{secrets.randbits(64):020}\ue001"
_CLOSE = f"\ue002{secrets.randbits(64):020}\ue003"
_CUT = f"\ue004{secrets.randbits(64):020}\ue005"
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Rendered text, and the half-open character ranges in it that the model learns to write.

    Attributes:
        apart: the numbers of the answers that a server would see otherwise than this text has them; their spans are
            empty, and each is the last answer of the text of the messages up to it.
        unlike: whether the text before an answer is not the prompt that a server would send, and no other text is.
    """

    text: str
    spans: list[tuple[int, int]]
    apart: frozenset[int] = frozenset()
    unlike: bool = False


class _GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}`: the block as it is, between two marks."""

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
    """How a conversation becomes text, from a PromptConfig whose `template` is set."""

    def __init__(self, config: PromptConfig, *, strict: bool = True) -> None:
        """Compiles the template; raises ConfigError when it is not valid Jinja or marks no answer."""
        if not config.template:
            raise ConfigError(f"prompt={config.name} has no template: set prompt.template or choose a format.")
        self.config = config
        try:
            environment = make_environment([_GenerationMarks], strict=strict)
            self._template = compile_bounded(environment, config.template)
            self._reads_input = _names_input(environment.parse(config.template))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"prompt={config.name}: template line {error.lineno}: {error.message}") from None
        except Exception as error:
            raise ConfigError(f"prompt={config.name}: {_sentence(error)}.") from None
        # A template of our own must say what is learned; a vendor's that does not is read by its prompts.
        self.marked = environment.extensions[_GenerationMarks.identifier].used  # type: ignore[attr-defined]
        if not self.marked and strict:
            raise ConfigError(
                f"prompt={config.name}: the template marks no answer with {{% generation %}} … "
                "{% endgeneration %}, so nothing could be trained; choose a format by name or add the marks."
            )
        self._forms: list[tuple[str | None, bool, bool]] = list(
            itertools.product((None, ""), (False, True), (False, True))
        )
        self._shapes: dict[Any, tuple[frozenset[int], bool]] = {}
        self._closing: dict[str, bool] = {}

    @classmethod
    def from_yaml(cls, path: Path | str) -> PromptFormat:
        """The format of one file of conf/prompt, with its defaults."""
        from omegaconf import OmegaConf

        node = OmegaConf.merge(OmegaConf.structured(PromptConfig), OmegaConf.load(path))
        config = OmegaConf.to_object(node)
        assert isinstance(config, PromptConfig)
        return cls(config)

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with the system prompt and instruction put where the format wants them.

        A row's own system prompt comes before the configured one; an empty configured one removes both. Alpaca's input
        stands behind the question in a format that does not set it apart.

        Raises ValueError for a message in a format that has no place for it.
        """
        config = self.config
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        for turn in turns:
            if "input" in turn and not self._reads_input:
                turn["content"] = f"{turn['content']}{config.joiner}{turn.pop('input')}"
            if "reasoning_content" in turn:  # templates know it by any of these names
                turn |= dict.fromkeys(("reasoning", "thinking"), turn["reasoning_content"])
        system = config.system
        if system == "":
            turns = [turn for turn in turns if turn["role"] != "system"]
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if config.instruction:
            if first is None:
                raise ValueError("prompt.instruction stands before a question, and this row has none")
            first["content"] = f"{config.instruction}{config.joiner}{first['content']}"
        if turns and turns[0]["role"] == "system":
            system = None
        if system:
            turns.insert(0, {"role": "system", "content": system})
        if config.system_role is SystemRole.native:
            return turns
        placed: list[Message] = []
        waiting: list[str] = []
        for turn in turns:
            if turn["role"] == "system":
                waiting.append(turn["content"])
                continue
            if waiting and turn["role"] == "user":
                turn["content"] = config.joiner.join([*filter(None, waiting), turn["content"]])
                waiting = []
            placed.append(turn)
        if any(turn["role"] == "system" for turn in turns) and config.system_role is SystemRole.refuse:
            raise ValueError(f"the format {config.name} has no place for a system prompt")
        if any(waiting):
            raise ValueError(f"prompt={config.name} puts a system prompt before a question, and none follows this one")
        return placed

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[Message] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_generation_prompt: bool = False,
        wanted: frozenset[int] | None = None,
    ) -> Rendered:
        """Renders `messages`; special tokens stand in the text as the template writes them.

        `wanted` are the numbers of the answers that are learned, None all: only they must be as serving has them.

        Raises ValueError with the template's complaint, such as roles that do not alternate, or naming what of the
        messages it does not write.
        """
        turns = self.prepare(messages)
        values = {"bos_token": bos_token or "", "eos_token": eos_token or "", "tools": tools, "documents": None}
        made = self._render(turns, values, add_generation_prompt, wanted)
        self._check_text(turns, made, wanted if not add_generation_prompt else frozenset())
        if tools or any("tool_calls" in turn or "reasoning_content" in turn for turn in turns):
            self._check_words(turns, values, add_generation_prompt, wanted)
        return made

    def _render(
        self, turns: list[Message], values: dict[str, Any], generation: bool, wanted: frozenset[int] | None
    ) -> Rendered:
        text, spans = _without_marks(self._write(turns, values, generation))
        if generation:
            return Rendered(text, spans)
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        learned = [number for number in range(len(places)) if wanted is None or number in wanted]
        if not self.marked:
            return self._by_prompts(turns, values, text, places, learned)
        if len(spans) != len(places):
            if len(learned) < len(places):
                raise ValueError(
                    f"prompt={self.config.name}: the template marks {len(spans)} places for {len(places)} answers, so "
                    "that not all are learned cannot be told it"
                )
            return Rendered(text, spans)
        shape = (tuple(map(_shape, turns)), bool(values.get("tools")))
        if shape not in self._shapes:
            self._shapes[shape] = self._compare(turns, values, text, spans, places)
        apart, unlike = self._shapes[shape]
        return Rendered(text, [(0, 0) if n in apart else span for n, span in enumerate(spans)], apart, unlike)

    def _compare(
        self, turns: list[Message], values: dict[str, Any], text: str, spans: list[tuple[int, int]], places: list[int]
    ) -> tuple[frozenset[int], bool]:
        """The answers that `text` has otherwise than serving, and whether others are so in every text."""
        apart, unlike = set(), False
        for number, (place, (start, end)) in enumerate(zip(places, spans, strict=True)):
            before, _ = _without_marks(self._write(turns[:place], values, True))
            if text[:start] == before:
                alone, own = _without_marks(self._write(turns[: place + 1], values, False))
                if alone[: own[-1][1]] == text[:end]:
                    continue
            alone, own = _without_marks(self._write(turns[: place + 1], values, False))
            if place + 1 < len(turns) and alone[: own[-1][0]] == before:
                apart.add(number)
            else:
                unlike = True
        return frozenset(apart), unlike

    def _by_prompts(
        self, turns: list[Message], values: dict[str, Any], text: str, places: list[int], learned: list[int]
    ) -> Rendered:
        """Answers of a template without marks: what it adds to the prompt that a server would send."""
        spans, apart = [(0, 0)] * len(places), set()
        for number in reversed(learned):
            place = places[number]
            start, through = self._last_answer(turns[: place + 1], values)
            if place + 1 == len(turns) and not text.startswith(through):
                text = through
            if text.startswith(through):
                spans[number] = (start, len(through))
            else:
                apart.add(number)
        return Rendered(text, spans, frozenset(apart))

    def _last_answer(self, turns: list[Message], values: dict[str, Any]) -> tuple[int, str]:
        """Where the answer begins that ends `turns`, and the text up to its end, behind the prompt of a server.

        Raises ValueError for a template whose answer cannot be found.
        """
        before = self._write(turns[:-1], values, True)
        through = self._through(turns, values)
        if through.startswith(before) and len(through) > len(before):
            return len(before), through
        opened = before.rstrip()
        if opened.endswith(THINK) and through.startswith(opened.removesuffix(THINK)):
            # DeepSeek-R1: the prompt opens the thoughts, and a finished turn is written without them.
            answer = dict(turns[-1])
            thoughts = answer.pop("reasoning_content", None)
            if thoughts is None and THOUGHT in answer["content"]:
                thoughts, _, answer["content"] = answer["content"].partition(THOUGHT)
                thoughts = thoughts.strip().removeprefix(THINK)
            rest = self._through([*turns[:-1], answer], values)[len(opened) - len(THINK) :]
            line = "" if before.endswith("\n") else "\n"
            return len(before), f"{before}{line}{(thoughts or '').strip()}\n{THOUGHT}\n\n{rest.lstrip()}"
        asked = self._write(turns[:-1], values, False)
        header = before[len(asked) :] if before.startswith(asked) else ""
        same = next((n for n, (one, two) in enumerate(zip(before, through, strict=False)) if one != two), 0)
        begin = through.find(header, max(0, same - len(header))) if header.strip() else -1
        if begin >= 0 and begin + len(header) < len(through):  # Hermes closes a tool's result otherwise at the end
            return len(before), before + through[begin + len(header) :]
        raise ValueError(
            f"prompt={self.config.name}: this template does not mark its answers and writes them otherwise than behind "
            "its prompts, so they cannot be told apart; choose a format by name"
        )

    def _through(self, turns: list[Message], values: dict[str, Any]) -> str:
        """The text up to the end of the last answer, without what closes a finished conversation (Phi 3.5)."""
        text = self._write(turns, values, False).rstrip()
        eos = values["eos_token"]
        if eos and eos not in self._closing:
            probe = [dict(zip(("role", "content"), one, strict=True)) for one in
                     (("user", "Qa"), ("assistant", "Xanswer"), ("user", "Xquestion"))]  # fmt: skip
            try:
                last = self._write(probe[:2], values, False).rpartition("Xanswer")[2].strip()
                middle = self._write(probe, values, False).rpartition("Xanswer")[2].partition("Xquestion")[0]
                self._closing[eos] = last.endswith(eos) and last != eos and eos not in middle
            except ValueError:
                self._closing[eos] = False
        return text.removesuffix(eos).rstrip() if eos and self._closing[eos] else text

    # ----------------------------------------------------------------------------------------------------- checking

    def _check_text(self, turns: list[Message], made: Rendered, wanted: frozenset[int] | None) -> None:
        """Raises ValueError for a text of the messages that the template drops or changes."""
        number = -1
        answers = sum(turn["role"] == "assistant" for turn in turns)
        for turn in turns:
            text, content = made.text, turn["content"]
            if turn["role"] == "assistant":
                number += 1
                if (wanted is not None and number not in wanted) or number in made.apart:
                    continue
                spans = [made.spans[number]] if len(made.spans) == answers else made.spans
                text = "".join(text[start:end] for start, end in spans)
                if spans and THINK in content and THINK not in text:  # opened by the prompt
                    text = THINK + text
            for part in (content, turn.get("input")):
                if part and not _holds(text, part, turn["role"] == "tool"):
                    raise ValueError(
                        f"prompt={self.config.name} does not write the text of a message ({turn['role']}: "
                        f"{_short(part)}); choose another format, or leave the row out"
                    )

    def _check_words(
        self, turns: list[Message], values: dict[str, Any], generation: bool, wanted: frozenset[int] | None
    ) -> None:
        """Raises ValueError for tools, calls and reasoning that the template does not write, or not as an answer.

        Every name and text of them becomes a word of its own, and the words are looked for.
        """
        words = (f"Wq{number}x{secrets.token_hex(4)}" for number in itertools.count())
        asked: list[tuple[str, str, int | None, bool]] = []
        tools: list[Message] = []
        for tool in values["tools"] or ():
            name = next(words)
            tools.append({**tool, "function": {**tool["function"], "name": name}})
            asked.append(("tools", name, None, True))
        copies, number = [], -1
        for turn in turns:
            number += int(turn["role"] == "assistant")
            learned = not generation and (wanted is None or number in wanted)
            turn = dict(turn)
            if "reasoning_content" in turn:
                thought = next(words)
                turn |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought)
                asked.append(("reasoning_content", thought, number, learned))
            calls = []
            for call in turn.get("tool_calls", ()):
                used: list[str] = []
                function = _worded({key: call["function"][key] for key in ("name", "arguments")}, words, used)
                calls.append({**call, "function": function})
                asked += [("tool_calls", word, number, learned) for word in used]
            if calls:
                turn["tool_calls"] = calls
            copies.append(turn)
        made = self._render(copies, {**values, "tools": tools or values["tools"]}, generation, wanted)
        answers = sum(turn["role"] == "assistant" for turn in turns)
        for key, word, answer, learned in asked:
            if answer is None:
                text = made.text
            elif answer in made.apart or (not learned and key == "reasoning_content"):
                continue  # looked for where it is the last answer; thoughts that are not learned may be left out
            else:
                spans = [made.spans[answer]] if learned and len(made.spans) == answers else [(0, len(made.text))]
                text = "".join(made.text[start:end] for start, end in spans)
            if word not in text:
                raise ValueError(
                    f"prompt={self.config.name} does not write the row's '{key}'"
                    f"{'' if answer is None or not learned else ' into the answer'}; choose a format that knows them, "
                    "such as prompt=qwen3, or leave them out"
                )

    # ------------------------------------------------------------------------------------------------------ writing

    def _write(self, turns: list[Message], values: dict[str, Any], generation: bool) -> str:
        """The template's text. Templates want calls in one of several forms; the first that it takes is kept."""
        if not any("tool_calls" in turn for turn in turns):
            return self._fill(turns, values, generation)
        failed: ValueError | None = None
        ids, number = [], 0
        for turn in turns:  # what a call or result is called that has no id: the number of its call
            number = 0 if turn["role"] != "tool" else number + 1
            ids.append(f"call{max(0, number - 1)}")
        for form in list(self._forms):
            try:
                forms = [_call_form(turn, name, *form) for turn, name in zip(turns, ids, strict=True)]
                text = self._fill(forms, values, generation)
            except ValueError as error:
                failed = failed or error
                continue
            if _pythonic(turns, text) or (form[0] is None and "None" in text and not _says_none(turns, values)):
                continue
            self._forms.sort(key=lambda one, form=form: one != form)  # type: ignore[misc]
            return text
        raise failed or ValueError(f"prompt={self.config.name} does not write 'tool_calls' as JSON")

    def _fill(self, turns: list[Message], values: dict[str, Any], generation: bool) -> str:
        given = {"messages": turns, "add_generation_prompt": generation, **values}
        size = sum(len(turn["content"] or "") for turn in turns)
        if given.get("tools") or any(len(turn) > 2 for turn in turns):
            size += len(json.dumps([given.get("tools"), turns], default=str))
        try:
            return render_bounded(self._template, given, size)
        except Exception as error:
            raise ValueError(f"prompt={self.config.name}: {_sentence(error)}") from None

    def own_text(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of `render`, and where in it the texts of the first question stand, which limits may cut."""
        copies = [dict(message) for message in messages]
        first = next((message for message in copies if message["role"] == "user"), {})
        for key in ("content", "input"):
            part = first.get(key, "")
            if part.strip():  # within its white space, which a template may trim
                start = len(part) - len(part.lstrip())
                first[key] = f"{part[:start]}{_CUT}{part.strip()}{_CUT}{part[start + len(part.strip()) :]}"
        pieces = self.render(copies, **options).text.split(_CUT)
        ends = list(itertools.accumulate(map(len, pieces)))
        return "".join(pieces), [(ends[n], ends[n + 1]) for n in range(0, len(ends) - 1, 2) if n + 1 < len(ends)]

    def end_marker(self, *, bos_token: str | None, eos_token: str | None, call: bool = False) -> str:
        """What the model learns to write behind an answer; empty for a format in which it would not learn to stop.

        With `call` behind a call of a tool; empty for a format that writes none.
        """
        function = {"name": "Xtool", "description": "t", "parameters": {"type": "object", "properties": {}}}
        tools: list[Message] = [{"type": "function", "function": function}]
        answer: Message = {"role": "assistant", "content": "" if call else "Xanswer"}
        if call:
            answer["tool_calls"] = [{"type": "function", "function": {"name": "Xtool", "arguments": {"a": "Xanswer"}}}]
        # Hermes has a template that is only for conversations with tools.
        for offered in (tools,) if call else (None, tools):
            with contextlib.suppress(ValueError):
                probe = [{"role": "user", "content": "Q"}, answer]
                rendered = self.render(probe, tools=offered, bos_token=bos_token, eos_token=eos_token)
                start, end = rendered.spans[-1]
                return rendered.text[start:end].rpartition("Xanswer")[2].strip()
        return ""


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks around answers, and where the answers are."""
    parts = marked.split(_OPEN)
    text, spans = parts[0], []
    for part in parts[1:]:
        answer, _, rest = part.partition(_CLOSE)
        spans.append((len(text), len(text) + len(answer)))
        text += answer + rest
    if any(mark[:9] in text or mark[-9:] in text for mark in (_OPEN, _CLOSE)):
        raise ValueError("the template has {% generation %} inside another, or changes the text around it")
    return text, spans


def _names_input(template: jinja2.nodes.Template) -> bool:
    """Whether a template reads Alpaca's `input` of a message."""
    return any(n.attr == "input" for n in template.find_all(jinja2.nodes.Getattr)) or any(
        n.value == "input" for n in template.find_all(jinja2.nodes.Const)
    )


def _sentence(error: Exception) -> str:
    """What a template's failure says, with its kind where the words alone would not say it."""
    known = isinstance(error, (jinja2.TemplateError, ValueError))
    return str(error) if known else f"the template fails with {type(error).__name__} ({error})"


def _shape(turn: Message) -> tuple[Any, ...]:
    return turn["role"], "reasoning_content" in turn, len(turn.get("tool_calls", ())), THOUGHT in turn["content"]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _holds(text: str, part: str, escaped: bool = False) -> bool:
    """Whether `part` stands in `text`, white space aside; of a tool's result as JSON spells it, too."""
    if part.strip() in text or (escaped and json.dumps(part, ensure_ascii=False)[1:-1] in text):
        return True
    squeezed = "".join(text.split())
    return "".join(part.split()) in squeezed or (escaped and "".join(part.split()) in "".join(squeezed.split("\\")))


def _worded(value: Any, words: Iterator[str], used: list[str]) -> Any:
    """`value` with a word for every text in it; keys and numbers stay."""
    if isinstance(value, dict):
        return {key: _worded(entry, words, used) for key, entry in value.items()}
    if isinstance(value, list):
        return [_worded(entry, words, used) for entry in value]
    if isinstance(value, str):
        used.append(next(words))
        return used[-1]
    return value


def _call_form(turn: Message, name: str, empty: str | None, spelled: bool, renamed: bool) -> Message:
    """`turn` with `empty` for no text beside calls; arguments `spelled` as JSON; ids `renamed` to nine characters.

    `name` is what the result of a call is called that has no id.
    """

    def short(name: str) -> str:
        return name if len(name) == 9 and name.isalnum() else hashlib.sha256(name.encode()).hexdigest()[:9]

    if turn["role"] == "tool":
        return {**turn, "tool_call_id": short(turn.get("tool_call_id", name))} if renamed else turn
    if "tool_calls" not in turn:
        return turn
    calls = []
    for number, call in enumerate(turn["tool_calls"]):
        made = {**call, "function": dict(call["function"])}
        if spelled:
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"], ensure_ascii=False)
        if renamed:
            made["id"] = short(call.get("id", f"call{number}"))
        calls.append(made)
    return {**turn, "content": turn["content"] or empty, "tool_calls": calls}


def _pythonic(turns: list[Message], text: str) -> bool:
    """Whether the arguments of a call stand in `text` as Python spells them, which is not JSON."""
    given = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", ())]
    return any(str(one) in text for one in given if str(one) != json.dumps(one, ensure_ascii=False))


def _says_none(turns: list[Message], values: dict[str, Any]) -> bool:
    return "None" in json.dumps([turns, values.get("tools")], default=str)


def prompt_format(config: PromptConfig, tokenizer: Any) -> PromptFormat:
    """The configured format; `prompt=native` is the tokenizer's own chat template.

    Raises ConfigError when a native template is missing or does not mark its answers.
    """
    template = config.template
    if not template:
        template = getattr(tokenizer, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        if not isinstance(template, str):
            raise ConfigError("prompt=native: this tokenizer brings no chat template; choose a format by name.")
    if _adds_bos(tokenizer) and "bos_token" not in template and tokenizer.bos_token not in template:
        # The model never saw a text without it, and the exported template must say so to whoever serves.
        template = "{{- bos_token -}}" + template
    return PromptFormat(replace(config, template=template), strict=bool(config.template))


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
