"""Tokens in columns, and their cache: identified by content, rebuilt when damaged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.config.data import DataConfig
from llmft.core.files import cache_directory
from llmft.data.batch import collate
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE, Examples, load_examples, save_examples
from llmft.data.prompt import PromptFormat
from llmft.data.readers import BadRows
from tests.conftest import ROOT, prompt_config


def chats(count: int = 5) -> list[Conversation]:
    return [
        Conversation(
            [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": "Ann " * (n + 1)}], f"f:{n}"
        )
        for n in range(count)
    ]


def three_examples() -> Examples:
    marks = [np.array([0, 1, 1], np.uint8), np.array([1, 1], np.uint8), np.array([0, 0, 0, 1], np.uint8)]
    return Examples.of([[3, 4, 5], [6, 7], [8, 9, 10, 11]], marks, [0, 2, 3], chats())


def test_rows_come_back_as_they_went_in() -> None:
    examples = three_examples()
    assert len(examples) == 3
    assert [list(example.input_ids) for example in examples] == [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    assert list(examples[0].labels) == [IGNORE, 4, 5]
    assert examples[1].where == "f:2"
    assert list(examples[2].labels) == [IGNORE, IGNORE, IGNORE, 11]
    assert examples.lengths.tolist() == [3, 2, 4]
    assert examples.labelled_tokens.tolist() == [e.labelled_tokens for e in examples] == [2, 1, 1]
    with pytest.raises(IndexError):
        examples[3]


def test_no_rows_are_no_mistake() -> None:
    empty = Examples.of([], [], [], [])
    assert len(empty) == 0
    assert empty.labelled_tokens.tolist() == []


def test_a_file_is_mapped_and_datasets_opens_it_too(tmp_path: Path) -> None:
    path = tmp_path / "tokens.arrow"
    save_examples(path, three_examples(), {"lengths": {"rows": 3}})
    loaded, facts = load_examples(path, chats())
    assert facts == {"lengths": {"rows": 3}}
    assert [list(e.labels) for e in loaded] == [list(e.labels) for e in three_examples()]
    assert not loaded.ids.flags.owndata
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as torch does of numbers that are not writable
        assert collate([loaded[1]], [1], 0).input_ids.tolist() == [[6, 7]]
    import datasets

    assert datasets.Dataset.from_file(str(path))[1]["input_ids"] == [6, 7]


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "llmft" / "assets" / "tiny")


def encode(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, root: Path, **values: Any
) -> tuple[Examples, Encoder, list]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(root))
    warnings: list[str] = []
    prompt = PromptFormat(prompt_config(values.pop("prompt", "alpaca_short")), bos_token="<s>", eos_token="</s>")
    fingerprint = values.pop("fingerprint", "rows")
    encoder = Encoder(tokenizer, prompt, DataConfig(name="d", files="f", **values), fingerprint, warnings.append)
    return encoder.encode("train", chats(), BadRows()), encoder, warnings


def same(a: Examples, b: Examples) -> bool:
    return (
        np.array_equal(a.ids, b.ids) and np.array_equal(a.labelled, b.labelled) and np.array_equal(a.starts, b.starts)
    )


def test_the_second_run_finds_the_tokens_of_the_first(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, one, _ = encode(tokenizer, monkeypatch, tmp_path)
    monkeypatch.setattr(Encoder, "_tokenize", lambda *_: pytest.fail("tokenised again"))
    second, two, _ = encode(tokenizer, monkeypatch, tmp_path)
    assert (one.cached, two.cached) == (set(), {"train"})
    assert same(first, second)
    assert one.lengths == two.lengths


@pytest.mark.parametrize(
    "values", [{"fingerprint": "other"}, {"max_tokens": 64}, {"prompt": "chatml"}, {"max_answer_tokens": 9}]
)
def test_other_rows_limits_or_prompts_have_tokens_of_their_own(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    encode(tokenizer, monkeypatch, tmp_path)
    assert encode(tokenizer, monkeypatch, tmp_path, **values)[1].cached == set()


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_tokens_are_made_again_with_one_warning(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    first, _, _ = encode(tokenizer, monkeypatch, tmp_path)
    (path,) = cache_directory().glob("tokens-*.arrow")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    second, _, warnings = encode(tokenizer, monkeypatch, tmp_path)
    assert len(warnings) == 1
    assert "damaged" in warnings[0]
    assert same(first, second)
    assert encode(tokenizer, monkeypatch, tmp_path)[1].cached == {"train"}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    examples, _, warnings = encode(tokenizer, monkeypatch, blocked)
    assert len(examples) == 5
    assert "could not be cached" in warnings[0]
