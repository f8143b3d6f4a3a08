"""Exports a run's prompt format as one chat template for other programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmft.config.data import PromptConfig, SystemRole
from llmft.core.errors import ConfigError
from llmft.data.prompt import PromptFormat

_MARK = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n"})

PREPARE = """\
{%- set prep = namespace(turns=[], system=SYSTEM, instruction=INSTRUCTION) -%}
{%- if messages and messages[0]['role'] == 'system' -%}{%- set prep.system = '' -%}{%- endif -%}
{%- if prep.system and not MERGE -%}
{%- set prep.turns = [{'role': 'system', 'content': prep.system}] -%}
{%- set prep.system = '' -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and MERGE -%}
{%- set prep.system = prep.system + JOINER + message['content'] if prep.system else message['content'] -%}
{%- elif message['role'] == 'user' and (prep.system or prep.instruction) -%}
{%- set text = prep.instruction + JOINER + message['content'] if prep.instruction else message['content'] -%}
{%- set text = prep.system + JOINER + text if prep.system else text -%}
{%- set prep.turns = prep.turns + [{'role': 'user', 'content': text}] -%}
{%- set prep.system = '' -%}
{%- set prep.instruction = '' -%}
{%- else -%}
{%- set prep.turns = prep.turns + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = prep.turns -%}
"""
"""Applies `PromptFormat.prepare` to the messages before the format's own template; MERGE: without system turns."""


def without_marks(template: str) -> str:
    """`template` without `{% generation %}`, which other engines do not know, with the same white space.

    The tag is replaced by a comment, which trims white space on the same sides.
    """
    return _MARK.sub(r"{#\1 \2#}", template)


def exported_template(prompt: PromptConfig, tokenizer: Any) -> tuple[str, list[str]]:
    """The template of a run's format for other programs, and notes for the user.

    It puts a system prompt and an instruction where the run's format does, and accepts a system prompt in any format,
    since other programs send their own.
    """
    template, notes = without_marks(prompt.template or ""), []
    role = prompt.system_role
    if role is SystemRole.native and not _takes_system(template, tokenizer):
        role = SystemRole.merge
        notes.append("its template has no system prompt, so one is put before the question")
    elif role is SystemRole.refuse:
        role = SystemRole.merge
        notes.append(f"prompt={prompt.name} refuses a system prompt; the exported template puts it before the question")
    if role is SystemRole.native and not prompt.system and not prompt.instruction:
        return template, notes
    texts = {"SYSTEM": prompt.system or "", "INSTRUCTION": prompt.instruction or "", "JOINER": prompt.joiner}
    values = {name: f"'{text.translate(_ESCAPES)}'" for name, text in texts.items()}
    values["MERGE"] = "false" if role is SystemRole.native else "true"
    before = re.sub("|".join(values), lambda name: values[name[0]], PREPARE.replace("\n", ""))
    return before + template, notes


def _takes_system(template: str, tokenizer: Any) -> bool:
    words = {role: f"X{role}text" for role in ("system", "user")}
    messages = [{"role": role, "content": text} for role, text in words.items()]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:
        return False
    return all(word in text for word in words.values())


def check_template(tokenizer: Any, prompt: PromptFormat, run: Path) -> None:
    """Raises ConfigError if the exported `tokenizer` renders a prompt differently from the run's format."""
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    for messages in ([turns[0]], [*turns, {"role": "user", "content": "Three?"}]):
        try:
            text = prompt.render(messages, add_generation_prompt=True).text
        except ValueError:
            continue  # a single-turn format
        exported = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if exported != text:
            raise ConfigError(
                f"{run}: plain transformers writes {exported[-80:]!r} where the run's format writes {text[-80:]!r}; "
                "please report this template."
            )
