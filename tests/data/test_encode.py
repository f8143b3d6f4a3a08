"""Token ids and labels: the answer and its end are trained, and nothing is doubled or cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft.config.data import Columns, DataConfig, PromptConfig, SystemRole, Truncation, Turns
from llmft.config.task import TaskConfig
from llmft.core.errors import ConfigError, DataError
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE
from llmft.data.prompt import PromptFormat, prompt_format
from llmft.data.readers import BadRows, Row
from tests.conftest import ROOT, prompt_config

LONG = " ".join(f"word{n}" for n in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "llmft" / "assets" / "tiny")


def format_of(name: str) -> PromptFormat:
    return PromptFormat(prompt_config(name), bos_token="<s>", eos_token="</s>")


def chat(question: str = "Who?", answer: str = "Ann") -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "f:1")


def encoder(tokenizer: Any, prompt: str = "alpaca_short", **data: Any) -> Encoder:
    return Encoder(tokenizer, format_of(prompt), DataConfig(name="d", files="f", **data))


def trained(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


@pytest.mark.parametrize("prompt", ["alpaca_short", "alpaca", "llama2", "mistral"])
def test_the_answer_and_its_end_token_are_trained_and_nothing_else(tokenizer: Any, prompt: str) -> None:
    (example,) = encoder(tokenizer, prompt).encode("train", [chat()], BadRows())
    assert trained(tokenizer, example).replace(" ", "") == "Ann</s>"
    assert example.labels[-1] == tokenizer.eos_token_id
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1
    assert all(label in (IGNORE, token) for label, token in zip(example.labels, example.input_ids, strict=True))


def test_every_answer_of_a_conversation_is_trained(tokenizer: Any) -> None:
    turns = [*chat("Q1", "Ann").messages, *chat("Q2", "Zoe").messages]
    (example,) = encoder(tokenizer).encode("train", [Conversation(turns, "f:1")], BadRows())
    assert trained(tokenizer, example) == "Ann</s>Zoe</s>"


def test_the_generation_prompt_is_the_beginning_of_the_training_row(tokenizer: Any) -> None:
    for prompt in ("alpaca_short", "alpaca"):
        row_encoder = encoder(tokenizer, prompt)
        (example,) = row_encoder.encode("train", [chat()], BadRows())
        ids = row_encoder.prompt_ids(chat())
        assert list(example.input_ids[: len(ids)]) == ids
        assert example.labels[len(ids)] != IGNORE


@pytest.mark.parametrize(
    "policy", [Truncation.cut_prompt_left, Truncation.cut_prompt_middle, Truncation.cut_prompt_right]
)
def test_a_long_row_is_cut_in_its_question_and_keeps_headers_and_answer(tokenizer: Any, policy: Truncation) -> None:
    row_encoder = encoder(tokenizer, max_tokens=80, truncation=policy)
    (example,) = row_encoder.encode("train", [chat(LONG)], BadRows())
    text = tokenizer.decode(example.input_ids)
    assert len(example.input_ids) == 80
    assert text.startswith("<s>### Instruction:\n")
    assert text.endswith("### Response:\nAnn</s>")
    assert trained(tokenizer, example) == "Ann</s>"
    assert ("word0 " in text) == (policy is not Truncation.cut_prompt_left)
    assert ("word59" in text) == (policy is not Truncation.cut_prompt_right)
    assert row_encoder.lengths["train"].rows_cut == 1
    assert len(row_encoder.prompt_ids(chat(LONG))) <= 80


def test_an_answer_is_never_cut(tokenizer: Any) -> None:
    row_encoder = encoder(tokenizer, max_tokens=80)
    examples = row_encoder.encode("train", [chat("Q", LONG), chat()], BadRows())
    assert len(examples) == 1
    assert row_encoder.lengths["train"].rows_dropped == 1
    assert row_encoder.lengths["train"].answer_tokens_dropped > 80


def test_truncation_error_and_nothing_left_are_errors(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"f:1: \d+ tokens, \d+ of them prompt, exceed data\.max_tokens=80"):
        encoder(tokenizer, max_tokens=80, truncation=Truncation.error).encode("train", [chat(LONG)], BadRows())
    with pytest.raises(
        DataError, match=r"none of the 1 train rows is left after the length limits \(1 by data.max_tokens\)"
    ):
        encoder(tokenizer, max_tokens=80, truncation=Truncation.drop).encode("train", [chat(LONG)], BadRows())


def test_answers_end_with_the_token_that_the_format_trains(tokenizer: Any) -> None:
    for name, marker in (("alpaca_short", ""), ("chatml", "<|im_end|>")):
        ends = encoder(tokenizer, name).ends
        assert (ends.ids, ends.text) == ([tokenizer.eos_token_id], marker)


def test_the_end_marker_is_what_is_trained_behind_an_answer() -> None:
    markers = {name: format_of(name).end_marker() for name in ("alpaca_short", "chatml", "llama2", "mistral")}
    assert markers == {"alpaca_short": "</s>", "chatml": "<|im_end|>", "llama2": "</s>", "mistral": "</s>"}
    bare = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert PromptFormat(PromptConfig(name="p", template=bare), bos_token="<s>", eos_token="</s>").end_marker() == ""


def test_a_format_without_begin_token_gets_one_where_the_tokenizer_adds_it(shared_data: Path) -> None:
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")
    node = OmegaConf.merge(OmegaConf.structured(PromptConfig), OmegaConf.load(ROOT / "conf/prompt/zephyr.yaml"))
    config = OmegaConf.to_object(node)
    assert isinstance(config, PromptConfig)
    row_encoder = Encoder(llama, prompt_format(config, llama), DataConfig(name="d", files="f"))
    (example,) = row_encoder.encode("train", [chat()], BadRows())
    assert list(example.input_ids).count(llama.bos_token_id) == 1
    assert example.input_ids[0] == llama.bos_token_id
    gpt2 = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    assert prompt_format(config, gpt2).config.template == config.template


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Vendor:
    """A tokenizer with a chat template that, like most, marks no answers."""

    chat_template: str | None = CHATML
    bos_token_id = bos_token = eos_token = None


def test_a_vendors_template_without_marks_is_read_by_its_prefixes() -> None:
    format_ = prompt_format(PromptConfig(name="native"), Vendor())
    turns = [*chat("Q1", "A1").messages, *chat("Q2", "A2").messages]
    rendered = format_.render(turns)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["A1<|im_end|>", "A2<|im_end|>"]
    marked = format_of("chatml").render(turns)
    assert (marked.text.rstrip(), marked.spans) == (rendered.text.rstrip(), rendered.spans)
    assert format_.end_marker() == "<|im_end|>"


def test_a_vendors_template_that_rewrites_its_beginning_is_learned_behind_its_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Vendor, "chat_template", "{{ messages | length }}" + CHATML)
    rendered = prompt_format(PromptConfig(name="native"), Vendor()).render(chat().messages)
    assert rendered.text.startswith("1<|im_start|>user")
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["Ann<|im_end|>"]


def test_a_vendors_template_whose_answers_nothing_tells_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Vendor, "chat_template", "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="choose a format by name"):
        prompt_format(PromptConfig(name="native"), Vendor()).render(chat().messages)


def test_a_tokenizer_without_a_template_and_a_template_of_ours_without_marks_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="marks no answer"):
        PromptFormat(PromptConfig(name="p", template=CHATML))
    monkeypatch.setattr(Vendor, "chat_template", None)
    with pytest.raises(ConfigError, match="has no chat template"):
        prompt_format(PromptConfig(name="native"), Vendor())


def test_system_prompts_go_where_the_format_wants_them() -> None:
    messages = [{"role": "system", "content": "S"}, *chat("Q").messages]
    template = "{% for m in messages %}{% generation %}[{{ m.role }}:{{ m.content }}]{% endgeneration %}{% endfor %}"

    def render(role: SystemRole, turns: list = messages, **values: Any) -> str:
        return PromptFormat(PromptConfig(name="p", template=template, system_role=role, **values)).render(turns).text

    assert render(SystemRole.native) == "[system:S][user:Q][assistant:Ann]"
    assert render(SystemRole.merge) == "[user:S\n\nQ][assistant:Ann]"
    assert render(SystemRole.merge, system="") == "[user:Q][assistant:Ann]"
    assert render(SystemRole.merge, messages[1:], system="T") == "[user:T\n\nQ][assistant:Ann]"
    assert render(SystemRole.merge, messages, system="T") == "[user:S\n\nQ][assistant:Ann]"
    assert render(SystemRole.merge, messages[1:], instruction="I") == "[user:I\n\nQ][assistant:Ann]"
    with pytest.raises(ValueError, match="no place for a system prompt"):
        render(SystemRole.refuse)


def test_templates_run_in_the_sandbox_and_miss_nothing_silently() -> None:
    wrap = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    evil = PromptConfig(name="p", template=wrap + "{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        PromptFormat(evil).render(chat().messages)
    with pytest.raises(ValueError, match="undefined"):
        PromptFormat(PromptConfig(name="p", template=wrap + "{{ nothing }}")).render(chat().messages)
    with pytest.raises(ConfigError, match="template line 1"):
        PromptFormat(PromptConfig(name="p", template="{% generation %}{% if %}"))


def test_real_rows_keep_their_end_token_and_one_begin_token(tokenizer: Any, shared_data: Path) -> None:
    import json

    raw = json.loads((shared_data / "instruction" / "llamafactory_alpaca_en_demo.json").read_text())
    data = DataConfig(name="d", files="f", columns=Columns(prompt="instruction", input="input", response="output"))
    columns = ColumnMap(data, TaskConfig(name="text", objective="x"))
    conversations = columns.conversations([Row(values, f"f:{n}") for n, values in enumerate(raw)], BadRows())
    examples = encoder(tokenizer, "alpaca", max_tokens=2048).encode("train", conversations, BadRows())
    assert len(examples) > 700
    for example in examples:
        assert example.labels[-1] == tokenizer.eos_token_id
        assert list(example.input_ids).count(tokenizer.bos_token_id) == 1
        answer = example.conversation.messages[-1]["content"]
        assert trained(tokenizer, example) == answer + tokenizer.eos_token


def test_limits_on_prompt_and_answer_are_in_tokens_and_counted_by_name(tokenizer: Any) -> None:
    rows = [chat(), chat(LONG), chat("Q", LONG)]
    row_encoder = encoder(tokenizer, max_prompt_tokens=40, max_answer_tokens=20, truncation=Truncation.drop)
    assert [example.conversation for example in row_encoder.encode("train", rows, BadRows())] == rows[:1]
    assert row_encoder.lengths["train"].dropped_by == {"data.max_prompt_tokens": 1, "data.max_answer_tokens": 1}
    row_encoder = encoder(tokenizer, max_prompt_tokens=40, max_answer_tokens=20)
    examples = row_encoder.encode("train", rows, BadRows())
    assert len(examples) == 2
    assert len(examples[1].input_ids) - (examples[1].labelled_tokens) == 40
    assert len(row_encoder.prompt_ids(chat(LONG))) == 40


def test_rows_may_be_chosen_by_their_number_of_tokens(tokenizer: Any) -> None:
    rows = [chat(), chat(LONG), chat("Q", LONG)]
    row_encoder = encoder(tokenizer, min_prompt_tokens=100)
    assert [e.conversation for e in row_encoder.encode("train", rows, BadRows())] == rows[1:2]
    row_encoder = encoder(tokenizer, min_answer_tokens=100)
    assert [e.conversation for e in row_encoder.encode("train", rows, BadRows())] == rows[2:]
    assert row_encoder.lengths["train"].dropped_by == {"data.min_answer_tokens": 2}


def test_loss_on_the_last_answer_only(tokenizer: Any) -> None:
    turns = [*chat("Q1", "Ann").messages, *chat("Q2", "Zoe").messages]
    conversation = Conversation(turns, "f:1")
    (example,) = encoder(tokenizer, train_turns=Turns.last).encode("train", [conversation], BadRows())
    assert trained(tokenizer, example) == "Zoe</s>"
    masked = Conversation(turns, "f:1", trained_from=1)
    (example,) = encoder(tokenizer).encode("train", [masked], BadRows())
    assert trained(tokenizer, example) == "Zoe</s>"


def test_llama_2_and_mistral_ids_are_those_of_the_vendors_published_format(shared_data: Path) -> None:
    """Meta's generation.py: encode(f"[INST] {prompt} [/INST] {answer} ") with begin and end token, turn by turn."""
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama2")
    turns = [*chat("Who are you?", "I am Ann.").messages, *chat("Why?", "No idea.").messages]
    row_encoder = Encoder(llama, format_of("llama2"), DataConfig(name="d", files="f"))
    (example,) = row_encoder.encode("train", [Conversation(turns, "f:1")], BadRows())
    expected: list[int] = []
    for question, answer in (("Who are you?", "I am Ann."), ("Why?", "No idea.")):
        text = f"[INST] {question} [/INST] {answer} "
        expected += [llama.bos_token_id, *llama(text, add_special_tokens=False).input_ids, llama.eos_token_id]
    assert list(example.input_ids) == expected
    assert trained(llama, example).replace(" ", "") == "IamAnn.</s>Noidea.</s>"

    mistral = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "mistral_v3")
    row_encoder = Encoder(mistral, format_of("mistral_v3"), DataConfig(name="d", files="f"))
    (example,) = row_encoder.encode("train", [chat("Who are you?", "I am Ann.")], BadRows())
    tokens = mistral.convert_ids_to_tokens(list(example.input_ids))
    assert tokens[:2] == ["<s>", "[INST]"]
    assert tokens.count("[/INST]") == 1
    assert tokens[-1] == "</s>"


def test_a_mark_never_reaches_the_text() -> None:
    nested = "{% generation %}{% generation %}{{ m.content }}{% endgeneration %}{% endgeneration %}"
    changed = "{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x[:-3] }}"
    for body in (nested, changed):
        template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}" + body + "{% endif %}"
        form = PromptFormat(PromptConfig(name="odd", template=template + "{% endfor %}"))
        with pytest.raises(ValueError, match="inside another, or changes the text"):
            form.render(chat().messages)


def test_rows_without_answers_are_looked_at_under_a_marker_of_several_tokens(tokenizer: Any) -> None:
    from llmft.data.quality import split_statistics

    row_encoder = encoder(tokenizer, "chatml")
    assert row_encoder.ends.text
    rows = [Conversation([{"role": "user", "content": "Q"}], "f:1", target=0, marked=False)]
    assert split_statistics(row_encoder.encode("train", rows, BadRows()), tokenizer, row_encoder.ends).untrained == 1


def test_an_end_marker_of_several_tokens_in_a_rows_own_text_is_told(tokenizer: Any) -> None:
    from llmft.data.quality import split_statistics

    row_encoder = encoder(tokenizer, "chatml")
    rows = [chat(answer="Ann"), chat(answer=f"A{row_encoder.marker}nn")]
    assert (
        split_statistics(row_encoder.encode("train", rows, BadRows()), tokenizer, row_encoder.ends).special_in_text == 1
    )
