"""What is trained is what serving sees: ids and text before an answer, the answer, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft.config import DataConfig, PromptConfig
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE
from llmft.data.prompt import PromptFormat, prompt_format
from llmft.data.sources import Problems
from tests.conftest import ROOT

FORMATS = sorted(path.stem for path in (ROOT / "conf" / "prompt").glob("*.yaml") if path.stem != "native")
STARTS = ("Ann", '"Ann"', ">Ann", "(Ann)", "\n\nAnn", "    Ann", "/usr", "é", "1")
STOPS = (".", '"', ">", "<", "\n", "!</b>", "")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def load(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load(ROOT / "llmft" / "assets" / "tiny")


def of_yaml(name: str, tokenizer: Any, **data: Any) -> Encoder:
    config = PromptFormat.from_yaml(ROOT / "conf" / "prompt" / f"{name}.yaml").config
    return Encoder(tokenizer, prompt_format(config, tokenizer), DataConfig(name="d", files="f", **data))


def native(template: str, tokenizer: Any, **data: Any) -> Encoder:
    tokenizer.chat_template = template
    return Encoder(
        tokenizer, prompt_format(PromptConfig(name="native"), tokenizer), DataConfig(name="d", files="f", **data)
    )


def answers(encoder: Encoder, conversation: Conversation) -> list[tuple[list[int], list[int]]]:
    """The ids before each learned answer, and its own."""
    made = []
    for example in encoder.encode("train", [conversation], Problems()):
        labels = [int(label) for label in example.labels]
        ids = [int(token) for token in example.input_ids]
        starts = [n for n in range(1, len(labels)) if labels[n] != IGNORE and labels[n - 1] == IGNORE]
        for start in starts:
            stop = next((n for n in range(start, len(labels)) if labels[n] == IGNORE), len(labels))
            made.append((ids[:start], ids[start:stop]))
    return made


def check_law(encoder: Encoder, messages: list[dict[str, Any]]) -> None:
    backend = encoder.tokenizer.backend_tokenizer
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found = answers(encoder, Conversation(messages, "f:1"))
    assert len(found) == len(places)
    special = {"bos_token": encoder.tokenizer.bos_token, "eos_token": encoder.tokenizer.eos_token}
    for place, (before, ids) in zip(places, found, strict=True):
        prompt = encoder.prompt.render(messages[:place], **special, add_generation_prompt=True).text
        assert before == backend.encode(prompt, add_special_tokens=False).ids, (prompt, messages[place])
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(messages[place]["content"].split()) in "".join(text.split())
        assert encoder.ends.trained(ids), text


@pytest.mark.parametrize("name", FORMATS)
def test_ids_before_an_answer_are_those_of_its_prompt_alone(tiny: Any, name: str) -> None:
    encoder = of_yaml(name, tiny)
    for number, start in enumerate(STARTS):
        stop = STOPS[number % len(STOPS)]
        check_law(encoder, [user("Who?"), answer(f"{start} x{stop}"), user("And?"), answer(f"{start} y{stop}")])


@pytest.mark.parametrize("tokenizer", ["llama2", "mistral_v3", "gpt2"])
def test_ids_before_an_answer_are_those_of_its_prompt_alone_with_real_tokenizers(
    shared_data: Path, tokenizer: str
) -> None:
    loaded = load(shared_data / "tokenizers" / tokenizer)
    for name in FORMATS:
        encoder = of_yaml(name, loaded)
        for number, start in enumerate(STARTS):
            stop = STOPS[number % len(STOPS)]
            check_law(encoder, [user("Who?"), answer(f"{start} x{stop}"), user("And?"), answer(f"{start} y{stop}")])
