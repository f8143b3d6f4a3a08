"""Rows of compared answers: every accepted form, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.config.data import Columns, DataConfig
from llmft.config.task import Feedback, TaskConfig
from llmft.core.errors import ConfigError, DataError
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.preferences import contradictions, longer_wins
from llmft.data.readers import Row
from llmft.training.prepare import prepare
from llmft.training.tokenized_data import read_rows
from tests.conftest import compose

PAIRS = TaskConfig(name="dpo", objective="x", feedback=Feedback.pairs)
GRADED = TaskConfig(name="dpo", objective="x", feedback=Feedback.pairs, margin="small")
LABELS = TaskConfig(name="kto", objective="x", feedback=Feedback.labels)
TEXT = TaskConfig(name="language_modeling", objective="x")


def read(task: TaskConfig, columns: dict[str, str], values: dict[str, Any], **data: Any) -> Conversation:
    rows = [Row(values, "f:1")]
    config = DataConfig(name="d", files="f", columns=Columns(**columns), **data)
    return ColumnMap.of(config, rows, task).conversation(rows[0])


PROMPTED = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER = {"role": "user", "content": "Q"}


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        (PROMPTED, {"p": "Q", "c": "good", "r": "bad"}),
        (PROMPTED, {"p": "Q", "c": [USER, turn("good")], "r": [USER, turn("bad")]}),
        ({**PROMPTED, "prompt": None, "messages": "m"},
         {"m": [{"from": "human", "value": "Q"}], "c": {"from": "gpt", "value": "good"},
          "r": {"from": "gpt", "value": "bad"}}),
        ({"chosen": "c", "rejected": "r"}, {"c": [USER, turn("good")], "r": [USER, turn("bad")]}),
        ({"chosen": "c", "rejected": "r"},
         {"c": "\n\nHuman: Q\n\nAssistant: good", "r": "\n\nHuman: Q\n\nAssistant: bad"}),
        ({"prompt": "p", "candidates": "a", "scores": "s"}, {"p": "Q", "a": ["bad", "good"], "s": [1, 2.5]}),
        ({"prompt": "p", "candidates": "a", "scores": "s"}, {"p": "Q", "a": [turn("bad"), turn("good")], "s": [1, 2]}),
    ],
)  # fmt: skip
def test_every_form_of_a_pair_is_the_same_row(columns: dict[str, Any], values: dict[str, Any]) -> None:
    conversation = read(PAIRS, columns, values)
    assert [message["content"] for message in conversation.messages] == ["Q", "good"]
    assert conversation.comparison is not None
    assert conversation.comparison.others == ("bad",)
    assert conversation.comparison.pairs == [(0, 1)]


def test_a_compared_answer_may_be_silence_and_a_label_a_number_of_a_column_with_gaps() -> None:
    silent = {"c": "\n\nHuman: Q\n\nAssistant: good", "r": "\n\nHuman: Q\n\nAssistant:"}
    comparison = read(PAIRS, {"chosen": "c", "rejected": "r"}, silent).comparison
    assert comparison is not None
    assert comparison.others == ("",)
    for label, desirable in ((1.0, True), (0.0, False)):
        columns = {"prompt": "p", "response": "r", "label": "l"}
        labelled = read(LABELS, columns, {"p": "Q", "r": "a", "l": label}).comparison
        assert labelled is not None
        assert labelled.desirable is desirable


def test_candidates_of_one_score_are_not_compared() -> None:
    columns = {"prompt": "p", "candidates": "a", "scores": "s"}
    conversation = read(PAIRS, columns, {"p": "Q", "a": ["x", "y", "z"], "s": [1, 3, 1]})
    assert conversation.comparison is not None
    assert conversation.messages[-1]["content"] == "y"
    assert conversation.comparison.pairs == [(0, 1), (0, 2)]


def test_a_degree_gives_the_margin_whatever_its_case_and_a_column_may_give_it_too() -> None:
    values = {"p": "Q", "c": "good", "r": "bad", "d": "Better", "m": 0.7}
    graded = read(GRADED, {**PROMPTED, "degree": "d"}, values)
    assert graded.comparison is not None
    assert (graded.comparison.degree, graded.comparison.margin) == (1, pytest.approx(2 / 3))
    from_column = read(PAIRS, {**PROMPTED, "margin": "m"}, values)
    assert from_column.comparison is not None
    assert from_column.comparison.margin == 0.7
    custom = read(GRADED, {**PROMPTED, "degree": "d"}, {**values, "d": "meh"}, degrees=["clear", "meh"])
    assert custom.comparison is not None
    assert custom.comparison.margin == 0.0


@pytest.mark.parametrize(
    ("task", "columns", "values", "message"),
    [
        (PAIRS, PROMPTED, {"p": "Q", "c": "same", "r": " same"}, "answers 1 and 2 are equal"),
        (PAIRS, PROMPTED, {"p": "Q", "c": [USER, turn("a")], "r": [{**USER, "content": "W"}, turn("b")]},
         "not those of the prompt"),
        (PAIRS, {"chosen": "c", "rejected": "r"}, {"c": [USER, turn("a")], "r": [{**USER, "content": "W"}, turn("b")]},
         "part after message 0"),
        (PAIRS, {"chosen": "c", "rejected": "r"}, {"c": "no turns", "r": "b"}, "'c' contains no whole conversation"),
        (PAIRS, {**PROMPTED, "degree": "d"}, {"p": "Q", "c": "a", "r": "b", "d": "beter"}, "did you mean better"),
        (PAIRS, {**PROMPTED, "margin": "m"}, {"p": "Q", "c": "a", "r": "b", "m": "much"}, "'m' contains 'much'"),
        (PAIRS, {**PROMPTED, "margin": "m"}, {"p": "Q", "c": "a", "r": "b", "m": -1}, "a margin is 0 or more"),
        (PAIRS, PROMPTED, {"p": "Q", "c": ["a", "b"], "r": "b"}, "a list of 2 texts, one answer was expected"),
        (PAIRS, PROMPTED, {"p": [USER], "c": [turn("a")], "r": [turn("b")]},
         "data.columns.prompt=null data.columns.messages=p"),
        (PAIRS, {"prompt": "p", "candidates": "a", "scores": "s"}, {"p": "Q", "a": ["x", "x ", "y"], "s": [1, 2, 3]},
         "answers 1 and 2 are equal"),
        (PAIRS, {"prompt": "p", "candidates": "a", "scores": "s"}, {"p": "Q", "a": ["x", "y"], "s": [1]},
         "1 scores for 2 candidates"),
        (PAIRS, {"prompt": "p", "candidates": "a", "scores": "s"}, {"p": "Q", "a": ["x", "y"], "s": [1, 1]},
         "same score"),
        (LABELS, {"prompt": "p", "response": "r", "label": "l"}, {"p": "Q", "r": "a", "l": "perhaps"}, "'perhaps'"),
        (LABELS, {"prompt": "p", "response": "r", "label": "l"}, {"p": "Q", "r": "a", "l": 0.5}, "0.5; true"),
        (TEXT, {"chosen": "c"}, {"c": "\n\nHuman: Q\n\nAssistant:"}, "the answer in 'c' is empty"),
    ],
)  # fmt: skip
def test_a_row_that_says_nothing_is_refused_by_name(
    task: TaskConfig, columns: dict[str, str], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(task, columns, values)


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        (PAIRS, {"prompt": "p", "chosen": "c"}, "needs data.columns.rejected"),
        (PAIRS, {"prompt": "p", "candidates": "c"}, "needs data.columns.scores"),
        (PAIRS, {**PROMPTED, "label": "l"}, "data.columns.label=l would not be used"),
        (LABELS, {"prompt": "p", "response": "r"}, "needs data.columns.label"),
        (TEXT, {"prompt": "p", "candidates": "c", "scores": "r"}, "would not be used"),
    ],
)
def test_columns_that_do_not_go_with_the_task_are_refused(
    task: TaskConfig, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(task, columns, dict.fromkeys("pcrl", "x"))


def test_labels_mark_single_answers() -> None:
    for text, good in (("true", True), (1, True), (False, False), ("undesirable", False)):
        conversation = read(LABELS, {"prompt": "p", "response": "r", "label": "l"}, {"p": "Q", "r": "a", "l": text})
        assert conversation.comparison is not None
        assert conversation.comparison.desirable is good


def test_contradictions_are_found() -> None:
    rows = [read(PAIRS, PROMPTED, {"p": "Q", "c": one, "r": two}) for one, two in (("a", "b"), ("a", "c"), ("b", "a"))]
    assert contradictions(rows) == [("f:1", "f:1")]
    assert contradictions(rows[:2]) == []


def test_the_rule_that_the_longer_answer_wins_counts_ties_half() -> None:
    assert longer_wins([(3, 1), (1, 2), (2, 2), (5, 4)]) == 0.625


# ----------------------------------------------------------------------------------------------- with a tokenizer


def pairs_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.files={path}"


def test_rows_of_one_prompt_stay_on_one_side_and_an_answer_is_never_cut(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"What is {n // 3}?", "chosen": f"good {n} " + "word " * (n % 3), "rejected": f"bad {n}"}
        for n in range(90)
    ]
    rows.append({"prompt": "long " * 60, "chosen": "yes", "rejected": "no"})
    rows.append({"prompt": "short", "chosen": "yes", "rejected": "word " * 90})
    config = compose(
        "task=dpo", "data=preference", pairs_file(tmp_path / "rows.jsonl", rows), "data.max_tokens=64",
        "data.cache=false",
        "data.max_dropped_fraction=0.5", f"output_dir={tmp_path}",
    )  # fmt: skip
    inputs = prepare(config, open_directory=False)
    sides = [{row.messages[0]["content"] for row in inputs.conversations[split]} for split in ("train", "validation")]
    assert sides[1]
    assert not sides[0] & sides[1]
    encoded = read_rows(inputs, print)
    lengths = encoded.encoder.lengths
    assert lengths["train"].rows_dropped + lengths["validation"].rows_dropped == 1
    assert lengths["train"].rows_cut + lengths["validation"].rows_cut == 1
    for examples in encoded.splits.values():
        for example in examples:
            assert example.segments is not None
            assert example.conversation.comparison is not None
            prompt, *answers = np.bincount(example.segments).tolist()
            assert prompt + max(answers) <= 64
            texts = [str(example.conversation.messages[-1]["content"]), *example.conversation.comparison.others]
            for segment, text in enumerate(texts, start=1):
                ids = [int(t) for t, s in zip(example.input_ids, example.segments, strict=True) if s == segment]
                decoded = encoded.tokenizer.decode(ids)
                assert text.strip() in decoded
                assert ids[-1] in encoded.ends.ids


def test_a_prompt_whose_end_joins_an_answer_has_its_own_tokens_before_both(tmp_path: Path) -> None:
    rows = [{"prompt": f"Text {n}: the hors", "chosen": "e sat", "rejected": f"{n} sat"} for n in range(30)]
    turns = "{% if message.role == 'user' %}{{ message.content }}{% else %}"
    answer = "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
    template = f"{{% for message in messages %}}{turns}{answer}{{% endfor %}}"
    config = compose(
        "task=dpo", "data=preference", pairs_file(tmp_path / "rows.jsonl", rows), f'prompt.template="{template}"',
        "data.cache=false", f"output_dir={tmp_path}",
    )  # fmt: skip
    encoded = read_rows(prepare(config, open_directory=False), print)
    assert encoded.encoder.lengths["train"].rows_joined > 0
    for example in encoded.splits["train"]:
        assert example.segments is not None
        ids = np.asarray(example.input_ids)
        texts = [encoded.tokenizer.decode(ids[example.segments == part]) for part in range(3)]
        prompt = str(example.conversation.messages[0]["content"])
        alone = encoded.tokenizer(prompt, add_special_tokens=False).input_ids
        assert ids[example.segments == 0].tolist() == alone
        assert texts[1].strip() == "e sat</s>"
        assert texts[2].endswith("sat</s>")


def test_margins_and_degrees_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    file = pairs_file(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b", "degree": "better"}])
    for overrides, message in (
        (["task.margin=small"], "data.columns.degree"),
        (["task.margin={better: 1}", "data.columns.degree=degree"], "give each of data.degrees"),
        (["task.margin=smal"], "did you mean small"),
        (["task.beta=0"], "task.beta=0"),
        (["data.degrees=[one]"], "two different names"),
        (["task.label_smoothing=0.6"], "below 0.5"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            compose("task=dpo", "data=preference", file, *overrides)
