"""Messages to text with marked answer spans.

A prompt format is one YAML with a Jinja chat template; what the model must learn to write stands between
`{% generation %}` and `{% endgeneration %}`, the marks that transformers reads too. So the text that is trained
is the text that the exported tokenizer renders. Templates run in Jinja's immutable sandbox, see `llmft.data.sandbox`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime

from llmft.config import PromptConfig, SystemRole
from llmft.data.sandbox import compile_bounded, make_environment, render_bounded
from llmft.errors import ConfigError

# Marks around answers while a template renders. Drawn anew in every process, so that no text can contain them.
_OPEN = f"\ue000{secrets.token_hex(8)}\ue001"
_CLOSE = f"\ue002{secrets.token_hex(8)}\ue003"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Rendered text, and the half-open character ranges in it that the model learns to write."""

    text: str
    spans: list[tuple[int, int]]


class _GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}`: the block as it is, between two marks."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
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
        # A template of our own must say what is learned; a vendor's that does not is read by its prefixes.
        self.marked = "{% generation %}" in config.template.replace("{%-", "{%").replace("-%}", "%}")
        if not self.marked and strict:
            raise ConfigError(
                f"prompt={config.name}: the template marks no answer with {{% generation %}} … "
                "{% endgeneration %}, so nothing could be trained; choose a format by name or add the marks."
            )
        try:
            environment = make_environment([_GenerationMarks], strict=strict)
            self._template = compile_bounded(environment, config.template)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"prompt={config.name}: template line {error.lineno}: {error.message}") from None
        except ValueError as error:
            raise ConfigError(f"prompt={config.name}: {error}.") from None

    @classmethod
    def from_yaml(cls, path: Path | str) -> PromptFormat:
        """The format of one file of conf/prompt, with its defaults."""
        from omegaconf import OmegaConf

        node = OmegaConf.merge(OmegaConf.structured(PromptConfig), OmegaConf.load(path))
        config = OmegaConf.to_object(node)
        assert isinstance(config, PromptConfig)
        return cls(config)

    def prepare(self, messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """Messages with the system prompt and instruction put where the format wants them.

        A row's own system prompt comes before the configured one; an empty configured one removes both.

        Raises ValueError for a system message in a format that has no place for one.
        """
        config = self.config
        turns = [dict(message) for message in messages]
        system = config.system
        if turns and turns[0]["role"] == "system":
            own = turns.pop(0)["content"]
            system = "" if system == "" else own
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is not None and config.instruction:
            first["content"] = f"{config.instruction}{config.joiner}{first['content']}"
        if system:
            if config.system_role is SystemRole.native:
                turns.insert(0, {"role": "system", "content": system})
            elif config.system_role is SystemRole.refuse:
                raise ValueError(f"the format {config.name} has no place for a system prompt")
            elif first is not None:
                first["content"] = f"{system}{config.joiner}{first['content']}"
        return turns

    def render(
        self,
        messages: Sequence[dict[str, str]],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Renders `messages`; special tokens stand in the text as the template writes them.

        Raises ValueError with the template's complaint, such as roles that do not alternate.
        """
        turns = self.prepare(messages)
        special = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        marked = self._write(turns, special, add_generation_prompt)
        if not self.marked:
            return Rendered(marked, self._spans_by_prefix(turns, special, marked))
        parts = marked.split(_OPEN)
        text, spans = parts[0], []
        for part in parts[1:]:
            answer, _, rest = part.partition(_CLOSE)
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
        return Rendered(text, spans)

    def _write(self, turns: list[dict[str, str]], special: dict[str, str], generation: bool) -> str:
        values = {"messages": turns, "add_generation_prompt": generation, **special}
        try:
            return render_bounded(self._template, values, sum(len(turn["content"]) for turn in turns))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"prompt={self.config.name}: {error}") from None

    def _spans_by_prefix(
        self, turns: list[dict[str, str]], special: dict[str, str], text: str
    ) -> list[tuple[int, int]]:
        """Answers of a template without marks: what it adds to the prompt that a server would send.

        Raises ValueError for a template that writes earlier turns otherwise when later ones follow.
        """
        spans = []
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._write(turns[:place], special, True)
            through = self._write(turns[: place + 1], special, False).rstrip()
            if not (text.startswith(before) and text.startswith(through) and len(through) > len(before)):
                raise ValueError(
                    f"prompt={self.config.name}: this template writes a conversation otherwise than its beginning and "
                    "does not mark its answers, so they cannot be told apart; choose a format by name"
                )
            spans.append((len(before), len(through)))
        return spans

    def end_marker(self, *, bos_token: str | None, eos_token: str | None) -> str:
        """What the model learns to write behind an answer; empty for a format in which it would not learn to stop."""
        probe = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        rendered = self.render(probe, bos_token=bos_token, eos_token=eos_token)
        start, end = rendered.spans[-1]
        return rendered.text[start:end].strip().removeprefix("A").strip()


def prompt_format(config: PromptConfig, tokenizer: Any) -> PromptFormat:
    """The configured format; `prompt=native` is the tokenizer's own chat template.

    Raises ConfigError when a native template is missing or does not mark its answers.
    """
    template = config.template
    if not template:
        template = getattr(tokenizer, "chat_template", None)
        if not isinstance(template, str):
            raise ConfigError("prompt=native: this tokenizer brings no chat template; choose a format by name.")
    if _adds_bos(tokenizer) and "bos_token" not in template and tokenizer.bos_token not in template:
        # The model never saw a text without it, and the exported template must say so to whoever serves.
        template = "{{- bos_token -}}" + template
    return PromptFormat(replace(config, template=template), strict=bool(config.template))


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
