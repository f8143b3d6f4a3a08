"""Every prompt format against published strings: llama.cpp's vectors, Alpaca's text column, model cards."""

import json
from pathlib import Path

import pytest

from llmft.data.prompt import PromptFormat
from tests.conftest import prompt_config

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "conf" / "prompt"
DATA = ROOT.parent / "shared" / "data"
FORMATS = sorted(path.stem for path in PROMPTS.glob("*.yaml") if path.stem != "native")

# Record of vectors.json -> format that must render it. The sources disagree on some templates; those left out
# show an older one (001: Mistral without the space before an answer), another variant (002: Llama 2
# untrimmed; 009, 010: Vicuna with line breaks) or a model that has no file here.
VECTORS = {
    "llamacpp-000": "chatml",
    "llamacpp-003": "llama2",
    "llamacpp-005": "gemma",
    "llamacpp-007": "openchat",
    "llamacpp-012": "llama3",
    "llamacpp-013": "phi3",
    "llamacpp-014": "phi3",
    "llamacpp-015": "phi3",
    "llamacpp-016": "phi3",
    "llamacpp-023": "mistral",
    "llamacpp-024": "mistral_v3",
    "llamacpp-029": "phi4",
}
# Records in which llama.cpp merged the system prompt with one line break, where our joiner has two.
MERGED_BY_LLAMACPP = {"llamacpp-005", "llamacpp-013", "llamacpp-015"}

ROUND = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
CHAT = [*ROUND, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
# Formats without a record: one round, then a question and the generation prompt, as their sources write them.
LITERAL = {
    "falcon": "\n\nUser: Q1\n\nAssistant: A1</s>\n\nUser: Q2\n\nAssistant:",
    "h2o": "<|prompt|>Q1</s><|answer|>A1</s><|prompt|>Q2</s><|answer|>",
    "mistrallite": "<s><|prompter|>Q1</s><|assistant|>A1</s><|prompter|>Q2</s><|assistant|>",
    "phi2": "Instruct: Q1\nOutput: A1</s>\nInstruct: Q2\nOutput:",
    "phi4_mini": "<|user|>Q1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>",
    "plain": "<s>Q1A1</s>Q2",
    # Without tools and thoughts these two are llama3 and chatml.
    "llama3_tools": "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen3": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
    "<|im_start|>assistant\n",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "zephyr": "<|user|>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\n",
}
# Formats that we defined, for which there is no published reference.
OURS = {"alpaca_short"}
# The text that a model must write after an answer, and before it where the first token includes a space.
END = dict.fromkeys(FORMATS, "</s>") | {
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "llama3_tools": "<|eot_id|>",
    "openchat": "<|end_of_turn|>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "phi4_mini": "<|end|>",
    "qwen3": "<|im_end|>",
}
SPACE_BEFORE_ANSWER = {"falcon", "llama2", "mistral", "mistral_v3", "openchat", "phi2", "vicuna"}


def prompt(name: str, bos_token: str = "<s>", eos_token: str = "</s>") -> PromptFormat:
    return PromptFormat(prompt_config(name), bos_token=bos_token, eos_token=eos_token)


def shared(name: str):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return json.loads(path.read_text(encoding="utf-8"))


def with_system_in_last_question(messages: list[dict]) -> list[dict]:
    """Mistral v3 puts the system prompt there; our format puts it into the first question."""
    system, *turns = (dict(message) for message in messages)
    turns[-1]["content"] = f"{system['content']}\n\n{turns[-1]['content']}"
    return turns


@pytest.mark.parametrize("record_id", VECTORS)
def test_format_equals_llamacpp_vector(record_id):
    record = next(record for record in shared("chat_templates/vectors.json") if record["id"] == record_id)
    messages = record["messages_as_rendered" if record_id in MERGED_BY_LLAMACPP else "messages"]
    if VECTORS[record_id] == "mistral_v3":
        messages = with_system_in_last_question(messages)
    form = prompt(VECTORS[record_id], record["bos_token"], record["eos_token"])
    rendered = form.render(messages, add_generation_prompt=record["add_generation_prompt"])
    assert rendered.text == record["expected"]


def alpaca_messages(row: dict) -> list[dict]:
    question = {"role": "user", "content": row["instruction"], "input": row["input"]}
    return [question, {"role": "assistant", "content": row["output"]}]


def test_alpaca_equals_alpaca_vectors():
    records = [row for row in shared("chat_templates/vectors.json") if row["origin"] == "alpaca_text_column"]
    assert len(records) == 40
    for record in records:
        assert prompt("alpaca", "", "").render(alpaca_messages(record)).text == record["expected"], record["id"]


def test_alpaca_equals_published_text_column():
    for row in shared("instruction/torchtune_alpaca_tiny.json"):
        rendered = prompt("alpaca", "", "").render(alpaca_messages(row))
        assert rendered.text == row["text"]
        assert [rendered.text[start:end] for start, end in rendered.spans] == [row["output"]]


@pytest.mark.parametrize("name", LITERAL)
def test_format_equals_its_source(name):
    rendered = prompt(name).render(CHAT[:3], add_generation_prompt=True)
    assert rendered.text == LITERAL[name]


def test_plain_renders_one_message_as_document():
    document = [{"role": "assistant", "content": " Some text.\n"}]
    rendered = prompt("plain").render(document)
    assert rendered.text == "<s> Some text.\n</s>"
    assert rendered.spans == [(3, len(rendered.text))]


def test_every_format_is_compared_with_a_published_string():
    assert set(FORMATS) - OURS == {*VECTORS.values(), *LITERAL, "alpaca"}


@pytest.mark.parametrize("name", FORMATS)
def test_spans_are_answers_with_end_markers_and_nothing_else(name):
    rendered = prompt(name).render(CHAT)
    text, spans = rendered.text, rendered.spans
    space = " " if name in SPACE_BEFORE_ANSWER else ""
    assert [text[start:end] for start, end in spans] == [f"{space}A1{END[name]}", f"{space}A2{END[name]}"]
    (a, b), (c, d) = spans
    outside = text[:a] + text[b:c] + text[d:]
    assert "A1" not in outside
    assert "A2" not in outside


@pytest.mark.parametrize("name", FORMATS)
def test_span_begins_where_generation_begins(name):
    """The text before an answer is the same in training and in generation."""
    form = prompt(name)
    full = form.render(CHAT)
    for turn, (start, _) in enumerate(full.spans):
        question = form.render(CHAT[: 2 * turn + 1], add_generation_prompt=True)
        assert question.text == full.text[:start]


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_renders_the_same_text_and_spans(name):
    """The template is exported as the tokenizer's chat template, so transformers has to agree."""
    from transformers.utils.chat_template_utils import render_jinja_template

    form = prompt(name)
    messages = form.prepare([{"role": "system", "content": "S"}, *CHAT])
    for generate in (False, True):
        texts, spans = render_jinja_template(
            [messages],
            chat_template=form.config.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=generate,
            bos_token="<s>",
            eos_token="</s>",
        )
        ours = form.render(messages, add_generation_prompt=generate)
        assert (texts[0], spans[0]) == (ours.text, ours.spans)


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral", "mistral_v3", "falcon"])
def test_roles_out_of_turn_are_refused(name):
    with pytest.raises(ValueError, match="alternate"):
        prompt(name).render([ROUND[0], ROUND[0]])
