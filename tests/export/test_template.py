"""The exported template renders the same as the run's format, for programs that do not know {% generation %}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from llmft.config.data import PromptConfig
from llmft.data.prompt import PromptFormat
from llmft.export.template import exported_template, without_marks
from tests.conftest import ROOT

NAMES = {path.stem: path for path in (ROOT / "conf" / "prompt").glob("*.yaml")}
FORMATS = sorted(path for name, path in NAMES.items() if name not in ("native", "none"))
TURNS = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two's  {% x %}."},
         {"role": "user", "content": "Three?"}]  # fmt: skip
RULE = {"instruction": "It's \\a\nrule:"}
SYSTEM = {"system": "Be 'brief': SYSTEM, INSTRUCTION, JOINER and MERGE are words.", "instruction": "INSTRUCTION?"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "llmft" / "assets" / "tiny")


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.stem)
@pytest.mark.parametrize("more", [{}, RULE, SYSTEM], ids=["plain", "rule", "system"])
def test_every_format_writes_the_same_when_it_is_exported(path: Path, more: dict[str, str], tokenizer: Any) -> None:
    node = OmegaConf.merge(OmegaConf.structured(PromptConfig), OmegaConf.load(path), more)
    if node.system and node.system_role == "refuse":
        pytest.skip("the format refuses a system prompt")
    config = OmegaConf.to_object(node)
    template, _ = exported_template(config, tokenizer)
    assert "generation %}" not in template.replace("add_generation_prompt %}", "")
    form = PromptFormat(config, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    conversations = [TURNS[:1], TURNS, [{"role": "system", "content": "Own."}, *TURNS]]
    for messages in conversations:
        try:
            expected = form.render(messages, add_generation_prompt=True).text
        except ValueError:
            continue  # of one turn, or without a place for a system prompt
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        rendered = tokenizer.apply_chat_template(messages, **options)
        assert rendered == expected
    try:
        rendered = tokenizer.apply_chat_template(conversations[2][:2], chat_template=template, tokenize=False)
    except Exception:
        pytest.fail("an app's own system prompt is refused")
    assert "Own." in rendered


def test_marks_go_and_white_space_stays() -> None:
    from jinja2 import Environment

    text = "a  {%- generation -%}\n b {%- endgeneration %}\nc{% generation %}\nd\n{% endgeneration %}\ne"
    for trim in (False, True):
        environment = Environment(trim_blocks=trim, lstrip_blocks=trim)
        like = text.replace("endgeneration", "endif").replace("generation", "if true")
        assert environment.from_string(without_marks(text)).render() == environment.from_string(like).render()
