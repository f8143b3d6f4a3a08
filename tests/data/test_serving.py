"""Training sees the same as serving: ids and text before an answer, the answer, and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmft.config.data import DataConfig, PromptConfig, SystemRole, Truncation, Turns
from llmft.core.errors import ConfigError
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.ends import Ends
from llmft.data.examples import IGNORE
from llmft.data.prompt import PromptFormat, prompt_format
from llmft.data.readers import BadRows
from tests.conftest import ROOT, prompt_config

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
    config = prompt_config(name)
    return Encoder(tokenizer, prompt_format(config, tokenizer), DataConfig(name="d", files="f", **data))


def native(template: str, tokenizer: Any, **data: Any) -> Encoder:
    tokenizer.chat_template = template
    prompt = prompt_format(PromptConfig(name="native", system_role=SystemRole.native), tokenizer)
    return Encoder(tokenizer, prompt, DataConfig(name="d", files="f", **data))


def answers(encoder: Encoder, conversation: Conversation) -> list[tuple[list[int], list[int]]]:
    """(ids before, ids of the answer) for each learned answer."""
    pairs = []
    for example in encoder.encode("train", [conversation], BadRows()):
        labels = [int(label) for label in example.labels]
        ids = [int(token) for token in example.input_ids]
        starts = [n for n in range(1, len(labels)) if labels[n] != IGNORE and labels[n - 1] == IGNORE]
        for start in starts:
            stop = next((n for n in range(start, len(labels)) if labels[n] == IGNORE), len(labels))
            pairs.append((ids[:start], ids[start:stop]))
    return pairs


def check_law(encoder: Encoder, messages: list[dict[str, Any]]) -> None:
    backend = encoder.tokenizer.backend_tokenizer
    places = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    pairs = answers(encoder, Conversation(messages, "f:1"))
    assert len(pairs) == len(places)
    for position, (before, ids) in zip(places, pairs, strict=True):
        prompt = encoder.prompt.render(messages[:position], add_generation_prompt=True).text
        assert before == backend.encode(prompt, add_special_tokens=False).ids, (prompt, messages[position])
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(messages[position]["content"].split()) in "".join(text.split())
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


# Short templates in the style of published ones.
QWEN3 = """{%- if tools %}{{ '<|im_start|>system\\n<tools>' + tools | map('tojson') | join('\\n') + '</tools><|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content %}{% set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}{% set content = content.split('</think>')[-1].lstrip() %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for c in m.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}{% else %}"
    "{{ '<A>' + m.content.split('</think>')[-1] + '<E>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A>' }}{% endif %}"
)
LLAMA = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}{% for m in messages %}"
    "{% if m.tool_calls is defined and m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}"
    "{{ '<A>{\"name\": \"' + c.name + '\", \"parameters\": ' }}{{ c.arguments | tojson }}{{ '}<E>' }}"
    "{% elif m.role == 'tool' %}{{ '<ipython>' + m.content | tojson + '<E>' }}"
    "{% else %}{{ '<' + m.role[0] | upper + '>' + m.content | trim + '<E>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A>' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ '[TOOLS] ' + tools | tojson }}{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
HERMES = (
    "{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>tool\n' + m.content + ('' if loop.last else '\n') + '<|im_end|>' }}"
    "{% elif m.tool_calls is defined %}{{ '<|im_start|>assistant' }}{% for c in m.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = DEEPSEEK.replace("{{ '<A>' }}{% endif %}", "{{ '<A><think>\n' }}{% endif %}")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def called(town: str = "Rome") -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": town, "days": 3}}}
    return answer("", tool_calls=[call])


RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}


def texts(encoder: Encoder, *messages: dict[str, Any], tools: Any = None) -> list[str]:
    """The learned text of a row, answer by answer."""
    pairs = answers(encoder, Conversation(list(messages), "f:1", tools=tools))
    return [encoder.tokenizer.decode(ids, skip_special_tokens=False) for _, ids in pairs]


@pytest.mark.parametrize("template", [QWEN3, PHI, DEEPSEEK, LLAMA])
def test_every_turn_of_a_native_template_is_learned_behind_the_prompt_of_serving(tiny: Any, template: str) -> None:
    check_law(native(template, tiny), [user("Q1"), answer("Ann"), user("Q2"), answer("Zoe"), user("Q3"), answer("Bo")])


def test_what_a_template_leaves_out_of_earlier_turns_is_learned_where_it_is_written(tiny: Any) -> None:
    thoughtful = [answer(f"A{n}", reasoning_content=f"thought {n}") for n in (1, 2)]
    assert texts(native(QWEN3, tiny), user("Q1"), thoughtful[0], user("Q2"), thoughtful[1]) == [
        f"<think>\nthought {n}\n</think>\n\nA{n}<|im_end|>" for n in (1, 2)
    ]
    empty = "<think>\n\n</think>\n\n"
    last = texts(native(QWEN3, tiny, train_turns=Turns.last), user("Q1"), answer("A1"), user("Q2"), answer("A2"))
    assert last == [f"{empty}A2<|im_end|>"]
    problems = BadRows()
    encoder = native(QWEN3, tiny)
    encoder.encode("train", [Conversation([user("Q1"), answer("A"), user("Q2"), answer("B")], "f:1")], problems)
    assert encoder.lengths["train"].rows_split == 1


def test_what_closes_a_conversation_is_not_learned_where_turns_end_otherwise(tiny: Any) -> None:
    assert texts(native(PHI, tiny), user("Q1"), answer("A1"), user("Q2"), answer("A2")) == ["A1<|end|>", "A2<|end|>"]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (QWEN3, '\n<tool_call>\n{"name": "weather", "arguments": {"town": "Rome", "days": 3}}\n</tool_call><|im_end|>'),
        (LLAMA, '{"name": "weather", "parameters": {"town": "Rome", "days": 3}}<E>'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Rome", "days": 3}, "id": "'),
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome", "days": 3}}\n</tool_call><|im_end|>'),
    ],
)
def test_calls_of_tools_are_learned_and_their_results_are_not(tiny: Any, template: str, written: str) -> None:
    call, last = texts(native(template, tiny), user("Q"), called(), RESULT, answer("It is fine."), tools=TOOLS)
    assert written in call
    assert "It is fine." in last
    assert "sunny" not in call + last


@pytest.mark.parametrize(
    ("template", "messages", "tools", "key"),
    [
        (PHI, [user("Q"), called()], None, "tool_calls"),
        (PHI, [user("Q"), answer("A")], TOOLS, "tools"),
        (PHI, [user("Q"), answer("A", reasoning_content="A")], None, "reasoning_content"),
        (LLAMA, [user("Q"), {**called(), "content": "Let me look."}], TOOLS, "Let me look."),
        (DEEPSEEK, [user("Q"), answer("<think>why</think>A")], None, "<think>why"),
        (DEEPSEEK, [user("Q"), answer("A", reasoning_content="why")], None, "reasoning_content"),
        (PHI.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
         [{"role": "system", "content": "Be kind"}, user("Q"), answer("A")], None, "system: 'Be kind'"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write_is_refused_by_name(
    tiny: Any, template: str, messages: list, tools: Any, key: str
) -> None:
    with pytest.raises(Exception, match=f"f:1: prompt=native does not write .*{key}"):
        texts(native(template, tiny), *messages, tools=tools)


def test_thoughts_that_the_prompt_opens_are_learned_behind_it(tiny: Any) -> None:
    """DeepSeek-R1's prompt ends with <think>, and a finished turn is written without thoughts."""
    written = ["why\n</think>\n\nA<E>"]
    assert texts(native(R1, tiny), user("Q"), answer("<think>\nwhy\n</think>\n\nA")) == written
    assert texts(native(R1, tiny), user("Q"), answer("A", reasoning_content="why")) == written


@pytest.mark.parametrize("name", ["qwen3", "llama3_tools"])
def test_our_formats_with_tools_learn_calls(tiny: Any, name: str) -> None:
    call, last = texts(of_yaml(name, tiny), user("Q"), called(), RESULT, answer("Fine."), tools=TOOLS)
    assert '{"town": "Rome", "days": 3}' in call
    assert "Fine." in last


def test_alpacas_input_is_in_the_prompt_of_every_format(tiny: Any) -> None:
    for name in FORMATS:
        encoder = of_yaml(name, tiny)
        assert (
            "some input"
            in encoder.render(Conversation([{**user("Q"), "input": "some input"}, answer("A")], "f:1")).text
        )


def test_a_limit_cuts_the_users_own_text_wherever_it_also_stands(tiny: Any) -> None:
    question = " ".join(f"word{n}" for n in range(40))
    system = {"role": "system", "content": f"Rules: {question} End of rules."}
    row = Conversation([system, user(question), answer("A")], "f:1")
    (uncut,) = of_yaml("chatml", tiny).encode("train", [row], BadRows())
    limit = len(uncut.input_ids) - 20
    encoder = of_yaml("chatml", tiny, max_tokens=limit, truncation=Truncation.cut_prompt_left)
    (example,) = encoder.encode("train", [row], BadRows())
    text = tiny.decode(example.input_ids)
    assert f"Rules: {question} End of rules." in text
    assert len(example.input_ids) == limit
    long = Conversation([{**user("Shorten."), "input": question}, answer("A")], "f:1")
    encoder = of_yaml("alpaca", tiny, max_tokens=200)
    (example,) = encoder.encode("train", [long], BadRows())
    assert "Shorten." in tiny.decode(example.input_ids)
    assert len(encoder.prompt_ids(long)) <= 200


@pytest.mark.parametrize("tag", ["{%generation%}", "{%- generation -%}", "{%+ generation %}", "{%   generation  %}"])
def test_the_generation_tag_is_known_in_every_spelling_of_jinja(tiny: Any, tag: str) -> None:
    end = tag.replace("generation", "endgeneration").replace("+", "")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}"
        f"{tag}{{{{ m.content + eos_token }}}}{end}{{% endif %}}{{% endfor %}}"
    )
    assert texts(native(template, tiny), user("Q"), answer("Ann")) == ["Ann</s>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 1 + 'a' }}",
        "{{ messages[9] }}",
        "{{ {}['a'].b }}",
        "{{ 'x' | int(base=99) }}",
        "{{ 'a'.encode('nope') }}",
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str) -> None:
    marks = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    with pytest.raises((ConfigError, ValueError), match=r"^prompt=p: "):
        PromptFormat(PromptConfig(name="p", template=template + marks)).render([user("Q"), answer("A")])


def test_system_prompts_are_merged_in_their_order_wherever_they_stand(tiny: Any) -> None:
    def system(text: str) -> dict[str, str]:
        return {"role": "system", "content": text}

    for name in ("mistral", "gemma", "plain", "phi2"):
        prompt = of_yaml(name, tiny).prompt
        turns = [system("S1"), system("S2"), user("Q1"), answer("A1"), system("S3"), user("Q2"), answer("A2")]
        text = prompt.render(turns).text
        places = [text.index(part) for part in ("S1", "S2", "Q1", "A1", "S3", "Q2", "A2")]
        assert places == sorted(places)
    with pytest.raises(ValueError, match="none follows"):
        prompt.render([user("Q1"), answer("A1"), system("S")])


def test_an_end_marker_of_several_tokens_is_matched_whole(tiny: Any) -> None:
    ends = of_yaml("chatml", tiny).ends
    assert (ends.text, ends.num_tokens > 1, ends.ids) == ("<|im_end|>", True, [tiny.eos_token_id])

    def ids(text: str) -> list[int]:
        return tiny(text, add_special_tokens=False).input_ids

    written = ids("big>small<|im_end|>\n<|im")
    assert tiny.decode(ends.cut(written)) == "big>small"
    assert [ends.reached(written[:n]) for n in range(1, len(written))].count(True) >= 1
    assert not ends.reached(ids("big>small>"))
    assert ends.cut(ids("big>small")) == ids("big>small")
    assert Ends([5]).cut([1, 2, 5, 3]) == [1, 2]


def test_messages_that_say_so_are_not_learned(tiny: Any) -> None:
    unlearned = answer("WRONG", weight=0)
    assert texts(of_yaml("plain", tiny), user("Q1"), unlearned, user("Q2"), answer("RIGHT")) == ["RIGHT</s>"]
    assert texts(native(PHI, tiny), user("Q1"), unlearned, user("Q2"), answer("RIGHT")) == ["RIGHT<|end|>"]
