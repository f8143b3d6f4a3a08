"""Targets: their classes in a fixed order, string or number, one or several; files without a header line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.config.convert import to_plain
from llmft.config.data import Columns, DataConfig
from llmft.config.task import Head, TaskConfig, TaskType
from llmft.core.errors import ConfigError, DataError
from llmft.data.columns import ColumnMap
from llmft.data.readers import BadRows, Row, read
from llmft.data.sources import load_rows
from llmft.data.targets import LETTERS, Targets, class_weights
from llmft.training.inspection import row_findings
from llmft.training.prepare import prepare
from tests.conftest import compose


def task(**values: Any) -> TaskConfig:
    return TaskConfig(name="t", **{"head": Head.linear, **values})


def column_map(targets: list[Any], *, head: TaskConfig | None = None, **data: Any) -> ColumnMap:
    rows = [Row({"t": f"text {n}", "y": label}, f"f:{n}") for n, label in enumerate(targets)]
    config = DataConfig(name="d", files="f", columns=Columns(text="t", target="y"), **data)
    return ColumnMap.of(config, rows, head or task())


@pytest.mark.parametrize(
    ("targets", "order"),
    [
        (["10", "9", "2", "10"], ["2", "9", "10"]),
        ([10, 9, 2], ["2", "9", "10"]),
        (["spam", "ham", "Ham"], ["Ham", "ham", "spam"]),
        (["1", "a", "10"], ["1", "10", "a"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_classes_are_in_one_order_whatever_the_rows_order(targets: list[Any], order: list[str]) -> None:
    assert column_map(targets).labels == order
    assert column_map(targets[::-1]).labels == order


def test_configured_classes_keep_their_order_and_strangers_are_named() -> None:
    columns = column_map(["b", "a"], labels=["b", "a"])
    assert columns.labels == ["b", "a"]
    with pytest.raises(ValueError, match="'c' is not among the classes"):
        columns.conversation(Row({"t": "x", "y": "c"}, "f:9"))


def test_sixty_imbalanced_classes_are_the_same_in_every_fold(tmp_path: Path) -> None:
    lines = ["text,label"]
    for number in range(60):
        lines += [f"text {number} {copy},kind {number}" for copy in range(2 + number % 7 * 3)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    seen, held_out = set(), 0
    arguments = ["task=classification", "model=tfidf", "data=classification", f"data.files={tmp_path}/a.csv"]
    config = compose(*arguments, "data.columns.target=label", f"output_dir={tmp_path}")
    for fold in range(5):
        prepared = prepare(replace(config, data=replace(config.data, fold=fold)), open_directory=False)
        seen.add(tuple(prepared.labels))
        held_out += len(prepared.conversations["validation"])
        assert prepared.num_rows["all"] == len(lines) - 1
    (labels,) = seen
    assert len(labels) == 60
    assert held_out == len(lines) - 1


def test_a_csv_without_a_header_line_is_read_with_given_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a cat,"pet, small"\na cow,farm\n')
    config = DataConfig(name="d", files=str(path), csv_columns=["text", "kind"])
    rows = load_rows(config, BadRows()).splits["train"]
    assert [row.values for row in rows] == [{"text": "a cat", "kind": "pet, small"}, {"text": "a cow", "kind": "farm"}]
    assert rows[0].where == f"{path}:1"
    with pytest.raises(DataError, match=r"2 cells where data\.csv_columns has 1"):
        list(read(path, path.read_bytes(), BadRows(), ["text"]))
    data = DataConfig(name="d", files="f", columns=Columns(text="text", target="kind"))
    unnamed = list(read(path, path.read_bytes(), BadRows()))
    with pytest.raises(DataError, match=r"data\.csv_columns"):
        ColumnMap.of(data, unnamed, task())


def test_several_classes_come_as_a_list_as_text_or_as_columns() -> None:
    several = task(problem=TaskType.multi_label)
    columns = column_map([["b", "a"], [], "c", "a, b"], head=several)
    assert columns.labels == ["a", "b", "c"]
    assert columns.conversation(Row({"t": "x", "y": ["b", "a"]}, "f:1")).target == (1, 1, 0)
    assert columns.conversation(Row({"t": "x", "y": "a, b"}, "f:1")).target == (1, 1, 0)
    assert columns.conversation(Row({"t": "x", "y": ""}, "f:1")).target == (0, 0, 0)
    data = DataConfig(name="d", files="f", columns=Columns(text="t"), target_columns=["toxic", "rude"])
    rows = [Row({"t": "x", "toxic": "1", "rude": "0"}, "f:1")]
    columns = ColumnMap.of(data, rows, several)
    assert (columns.labels, columns.conversation(rows[0]).target) == (["toxic", "rude"], (1, 0))
    with pytest.raises(ValueError, match=r"'toxic'.*contains '2'"):
        columns.conversation(Row({"t": "x", "toxic": "2", "rude": "0"}, "f:2"))


def test_numbers_are_read_and_what_is_none_is_named() -> None:
    columns = column_map(["1.5", "2"], head=task(problem=TaskType.regression))
    assert columns.conversation(Row({"t": "x", "y": "2.5"}, "f:1")).target == 2.5
    for wrong in ("many", "nan", "inf"):
        with pytest.raises(ValueError, match=r"not a number|not finite"):
            columns.conversation(Row({"t": "x", "y": wrong}, "f:1"))


def test_words_are_labels_letters_or_a_dictionary_and_all_different() -> None:
    tokens = task(head=Head.tokens)
    columns = column_map(["dog", "cat"], head=tokens)
    answer = columns.conversation(Row({"t": "x", "y": "dog"}, "f:1")).messages[-1]
    assert answer == {"role": "assistant", "content": "dog"}
    letters = column_map(["dog", "cat"], head=task(head=Head.tokens, words="letters"))
    assert letters.targets is not None
    assert letters.targets.words == ["A", "B"]
    with pytest.raises(ConfigError, match="no word for the class dog"):
        column_map(["dog", "cat"], head=task(head=Head.tokens, words={"cat": "c"}))
    with pytest.raises(ConfigError, match="two classes have the word"):
        column_map(["dog", "cat"], head=task(head=Head.tokens, words={"cat": "c", "dog": "c"}))
    with pytest.raises(ConfigError, match="63 classes"):
        column_map([str(n) for n in range(len(LETTERS) + 1)], head=task(head=Head.tokens, words="letters"))


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    targets = np.repeat([0, 1, 2], [70, 25, 5])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    assert class_weights("balanced", ["a", "b", "c"], targets.tolist()) == pytest.approx(expected.tolist())
    assert class_weights({"b": 3}, ["a", "b"], [0, 1]) == [1.0, 3.0]
    with pytest.raises(ConfigError, match=r"task\.class_weights\.z"):
        class_weights({"z": 3}, ["a", "b"], [0, 1])


def test_targets_survive_the_way_to_the_disk_and_back() -> None:
    targets = Targets(TaskType.multi_label, ["a", "???"], [], 1.5, 2.0)
    assert Targets.from_plain(to_plain(targets)) == targets


def test_an_answer_column_is_the_target_of_a_head_and_a_target_the_answer_of_a_text() -> None:
    data = DataConfig(name="d", files="f", columns=Columns(prompt="q", response="y"))
    rows = [Row({"q": f"Q{n}", "y": "ab"[n % 2]}, f"f:{n}") for n in range(4)]
    assert [m["role"] for m in ColumnMap.of(data, rows, task()).conversation(rows[0]).messages] == ["user"]
    assert ColumnMap.of(data, rows, task()).conversation(rows[1]).target == 1
    text_data = DataConfig(name="d", files="f", columns=Columns(text="q", target="y"))
    text = TaskConfig(name="language_modeling", objective="x")
    assert ColumnMap.of(text_data, rows, text).conversation(rows[1]).messages[-1]["content"] == "b"


def test_a_row_is_called_by_its_id_where_that_tells_rows_apart() -> None:
    rows = [Row({"q": "Q", "y": "a", "id": n}, f"folder/f.csv:{n}") for n in (7, 8)]
    data = DataConfig(name="d", files="f", labels=["a", "b"], columns=Columns(prompt="q", response="y"))
    assert ColumnMap.of(data, rows, task()).conversation(rows[0]).id == "7"
    same = [Row({**row.values, "id": 1}, row.where) for row in rows]
    assert ColumnMap.of(data, same, task()).conversation(same[0]).id == "f.csv:7"
    named = DataConfig(name="d", files="f", labels=["a", "b"], columns=Columns(prompt="q", response="y", id="id"))
    with pytest.raises(DataError, match=r"data\.columns\.id=id"):
        ColumnMap.of(named, same, task())


def class_warnings(tmp_path: Path, *overrides: str) -> list[str]:
    """The warnings of a classification of a hundred rows, of which one has the class rare."""
    rows = [f"text {n},{'rare' if n == 0 else 'ab'[n % 2]}" for n in range(100)]
    (tmp_path / "a.csv").write_text("\n".join(["text,target", *rows]) + "\n")
    (tmp_path / "v.csv").write_text("text,target\nv1,a\nv2,new\nv3,new\n")
    arguments = ["task=classification", "model=tfidf", "data=classification", f"output_dir={tmp_path}"]
    config = compose(*arguments, f"data.files={tmp_path}/a.csv", *overrides)
    return [finding.message for finding in row_findings(prepare(config, open_directory=False))]


def test_classes_without_a_training_row_are_told_whatever_took_the_rows(tmp_path: Path) -> None:
    assert class_warnings(tmp_path) == []
    (of_file,) = class_warnings(tmp_path, f"data.split_files.validation={tmp_path}/v.csv")
    assert of_file == "1 of 4 classes have no training row and cannot be learned: new (2 held out)"
    of_folds = [message for fold in range(5) for message in class_warnings(tmp_path, f"data.fold={fold}")]
    assert of_folds == ["1 of 3 classes have no training row and cannot be learned: rare (1 held out)"]
    (of_list,) = class_warnings(tmp_path, "data.labels=[a,b,rare,unknown]")
    assert "unknown (0 held out)" in of_list
    assert any("rare" in message for message in class_warnings(tmp_path, "data.limit=10", "data.split_seed=1"))


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "1e400", "NaN"])
def test_a_target_that_is_no_finite_number_is_refused_by_row(tmp_path: Path, value: str) -> None:
    lines = [f'{{"t": "text {n}", "y": {n}}}' for n in range(9)] + [f'{{"t": "x", "y": {value}}}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    rows = list(read(tmp_path / "a.jsonl", (tmp_path / "a.jsonl").read_bytes(), BadRows()))
    for head, kind in ((Head.linear, TaskType.regression), (Head.linear, TaskType.single_label)):
        config = DataConfig(name="d", files="f", columns=Columns(text="t", target="y"))
        columns = ColumnMap.of(config, rows, task(head=head, problem=kind))
        with pytest.raises(
            DataError, match=r"a\.jsonl:10: column 'y' (contains -?inf, which is not a finite number|is empty)"
        ):
            columns.conversations(rows, BadRows())
        assert not {"inf", "-inf", "nan"} & set(columns.labels)


def test_a_list_of_classes_holds_classes_alone() -> None:
    for wrong in (None, float("nan"), {"a": 1}):
        columns = column_map([["a"], ["b"], ["a", wrong]], head=task(problem=TaskType.multi_label))
        assert columns.labels == ["a", "b"]
        with pytest.raises(ValueError, match="column 'y'"):
            columns.conversation(Row({"t": "x", "y": ["a", wrong]}, "f:1"))


def test_too_few_classes_are_said_with_the_row_that_has_none() -> None:
    with pytest.raises(DataError, match=r"1 classes, at least 2 are needed; .*column 'y' is empty \(null\)"):
        column_map(["a", None])
