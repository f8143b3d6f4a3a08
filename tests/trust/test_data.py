"""Broken files, awkward tokenizers, long rows: D1 to D17 of the acceptance suite, by training's own functions."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.config.data import Columns, DataConfig, Truncation
from llmft.core.errors import ConfigError, DataError
from llmft.data.batch import collate
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE
from llmft.data.prompt import PromptFormat, prompt_format
from llmft.data.readers import BadRows
from llmft.train import train
from llmft.training.inspection import inspect_rows
from llmft.training.prepare import prepare
from llmft.training.tokenized_data import read_rows
from tests.conftest import ROOT, SMALL, compose, prompt_config, run_directory
from tests.trust.helpers import records

PICTURES = Path(__file__).parent / "fixtures" / "templates"


def lines(count: int = 100) -> list[bytes]:
    return [json.dumps({"prompt": f"question {n}", "response": f"answer {n}"}).encode() for n in range(1, count + 1)]


def prepared_from(tmp_path: Path, content: bytes | list[bytes], *overrides: str, name: str = "train.jsonl") -> Any:
    """Training's prepared data from a file of this content."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else b"\n".join(content) + b"\n")
    small = [override for override in SMALL if not override.startswith("data.rows")]
    here = [f"data.files={tmp_path}/{name}", f"output_dir={tmp_path}/out", "data=prompt_response"]
    return prepare(compose(*small, *here, *overrides))


SKIP = ("data.on_bad_row=skip",)


class TestD1ToD7Rows:
    """An unusable row is named with its line, or skipped and counted."""

    BAD = {  # noqa: RUF012
        "d1_not_utf8": (
            b'{"prompt": "q", "response": "\xff"}',
            r"train\.jsonl:50: not UTF-8 \(byte 0xff at column 30\)",
        ),
        "d2_cut_in_the_middle": (b'{"prompt": "q", "resp', r"train\.jsonl:50: not JSON"),
        "d3_no_such_column": (b'{"prompt": "q", "responce": "a"}', r"train\.jsonl:50: .*response.*did you mean"),
        "d4_a_list": (b'{"prompt": "q", "response": ["a"]}', r"train\.jsonl:50: .*response.*list"),
        "d4_none": (b'{"prompt": "q", "response": null}', r"train\.jsonl:50: .*'response' is empty"),
        "d4_nan": (b'{"prompt": "q", "response": NaN}', r"train\.jsonl:50: .*'response' is empty \(not a number"),
        "d4_an_object": (b'{"prompt": {"a": 1}, "response": "a"}', r"train\.jsonl:50: .*prompt.*dict"),
        "d5_empty_answer": (b'{"prompt": "q", "response": ""}', r"train\.jsonl:50: the answer is empty"),
        "d5_white_answer": (b'{"prompt": "q", "response": " \\n "}', r"train\.jsonl:50: the answer is empty"),
        "d7_key_twice": (b'{"prompt": "q", "response": "a", "response": "b"}', r"train\.jsonl:50: .*appears twice"),
        "d7_array": (b'["q", "a"]', r"train\.jsonl:50: a JSON object was expected, not list"),
        "d7_half_a_character": (b'{"prompt": "q", "response": "\\ud83d"}', r"train\.jsonl:50: .*lone surrogate"),
    }

    @pytest.mark.parametrize("kind", BAD)
    def test_d1_to_d7_a_bad_row_stops_with_its_line(self, tmp_path: Path, kind: str) -> None:
        bad, sentence = self.BAD[kind]
        rows = lines()
        rows[49] = bad
        with pytest.raises(DataError, match=sentence) as error:
            prepared_from(tmp_path, rows)
        assert error.value.exit_code == 4

    @pytest.mark.parametrize("kind", BAD)
    def test_d1_to_d7_or_is_skipped_counted_and_kept_for_the_reader(self, tmp_path: Path, kind: str) -> None:
        rows = lines()
        rows[49] = self.BAD[kind][0]
        prepared = prepared_from(tmp_path, rows, *SKIP)
        (rejected,) = prepared.problems.rejected
        assert rejected["where"].endswith("train.jsonl:50")
        assert sum(map(len, prepared.conversations.values())) == 99

    def test_d1_many_bad_rows_stop_all_the_same(self, tmp_path: Path) -> None:
        rows = lines()
        rows[10:20] = [b"\xff"] * 10
        with pytest.raises(DataError, match=r"10 of \d+ rows cannot be used .*10 x not UTF-8.*max_bad_fraction=0\.05"):
            prepared_from(tmp_path, rows, *SKIP)

    def test_d2_a_cut_off_last_line_is_guessed(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"train\.jsonl:100: .*the last line has no newline: cut off\?"):
            prepared_from(tmp_path, b"\n".join(lines())[:-9])

    def test_d2_blank_lines_do_not_shift_the_number(self, tmp_path: Path) -> None:
        rows = lines()
        rows[20:20] = [b"", b"  ", b""]
        rows[60] = b"{"
        with pytest.raises(DataError, match=r"train\.jsonl:61: "):
            prepared_from(tmp_path, rows)

    def test_d3_a_column_that_no_row_has_is_named_with_those_that_are(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no column 'respnse'.*did you mean response"):
            prepared_from(tmp_path, lines(), "data.columns.response=respnse")

    @pytest.mark.slow
    def test_d6_a_line_of_10_mb_is_cut_in_its_prompt_and_counted(self, tmp_path: Path) -> None:
        rows = lines(200)
        rows[10] = json.dumps({"prompt": "word " * 2_000_000, "response": "the answer"}).encode()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepared = prepared_from(tmp_path, rows, "data.validation_fraction=0.05")
        encoded = read_rows(prepared, print)
        limits = encoded.encoder.lengths
        assert sum(part.rows_cut for part in limits.values()) == 1
        assert sum(part.prompt_tokens_cut for part in limits.values()) > 1_000_000
        assert max(part.longest for part in limits.values()) <= prepared.config.data.max_tokens
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 2**20, "KiB: below 4 GiB"

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"], ids=["nothing", "blank", "mark only"])
    def test_d7_an_empty_file_is_said_to_be_empty(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(DataError, match=r"no training rows: .*train\.jsonl is empty"):
            prepared_from(tmp_path, content)

    def test_d7_a_byte_order_mark_and_windows_lines_are_no_offence(self, tmp_path: Path) -> None:
        prepared = prepared_from(tmp_path, b"\xef\xbb\xbf" + b"\r\n".join(lines()) + b"\r\n")
        contents = [m["content"] for c in prepared.conversations["train"] for m in c.messages]
        assert sum(map(len, prepared.conversations.values())) == 100
        assert not any("\r" in text or "\ufeff" in text for text in contents)


class TestD8D9Caches:
    """Rows are identified by their content, and their cache is checked."""

    def test_d8_a_file_edited_at_the_same_size_and_time_is_another_one(self, tmp_path: Path) -> None:
        first = prepared_from(tmp_path, lines())
        path = tmp_path / "train.jsonl"
        stamp = path.stat()
        second = prepared_from(tmp_path, [line.replace(b"answer", b"ANSWER") for line in lines()])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        third = prepare(second.config)
        assert path.stat().st_size == stamp.st_size
        assert path.stat().st_mtime_ns == stamp.st_mtime_ns
        assert first.run.key != third.run.key == second.run.key
        encoded = read_rows(third, print)
        assert "ANSWER" in encoded.tokenizer.decode(encoded.splits["train"][0].input_ids)

    @pytest.mark.parametrize("damage", ["cut", "empty", "other"])
    def test_d9_damaged_tokens_are_made_again_with_one_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
    ) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        first = read_rows(prepared_from(tmp_path, lines()), print)
        for path in (tmp_path / "cache" / "llmft").glob("tokens-*.arrow"):
            content = path.read_bytes()
            path.write_bytes({"cut": content[:-200], "empty": b"", "other": b"not arrow at all"}[damage])
        warnings: list[str] = []
        second = read_rows(prepared_from(tmp_path, lines()), warnings.append)
        assert len(warnings) == 2, "one for each split"
        assert all("are damaged" in line and "tokenised again" in line for line in warnings)
        assert np.array_equal(first.splits["train"].ids, second.splits["train"].ids)


LONG = " ".join(f"word{n}" for n in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "llmft" / "assets" / "tiny")


def format_of(name: str) -> PromptFormat:
    return PromptFormat(prompt_config(name), bos_token="<s>", eos_token="</s>")


def chat(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "f:1")


def encode(tokenizer: Any, rows: list[Conversation], **data: Any) -> tuple[Any, Encoder]:
    encoder = Encoder(tokenizer, format_of("alpaca_short"), DataConfig(name="d", files="f", **data))
    return encoder.encode("train", rows, BadRows()), encoder


def learned(tokenizer: Any, example: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


class TestD10D11D15Lengths:
    """The answer stays complete or the row is dropped, and both are counted."""

    @pytest.mark.parametrize("policy", [p for p in Truncation if p.value.startswith("cut")], ids=lambda p: p.value)
    def test_d10_d15_the_prompt_gives_way_and_answer_and_end_token_stay(
        self, tokenizer: Any, policy: Truncation
    ) -> None:
        (example,), encoder = encode(tokenizer, [chat(LONG, "Ann is it")], max_tokens=60, truncation=policy)
        assert len(example.input_ids) == 60
        assert learned(tokenizer, example) == "Ann is it</s>"
        assert example.input_ids[0] == tokenizer.bos_token_id
        text = tokenizer.decode(example.input_ids)
        assert ("word59" in text) == (policy is not Truncation.cut_prompt_right)
        assert ("word0 " in text) == (policy is not Truncation.cut_prompt_left)
        assert (encoder.lengths["train"].rows_cut, encoder.lengths["train"].rows_dropped) == (1, 0)
        assert encoder.lengths["train"].prompt_tokens_cut > 0

    def test_d10_drop_and_error_do_as_they_say(self, tokenizer: Any) -> None:
        rows = [chat("Who?", "Ann"), chat(LONG, "Zoe")]
        examples, encoder = encode(tokenizer, rows, max_tokens=60, truncation=Truncation.drop)
        assert [learned(tokenizer, example) for example in examples] == ["Ann</s>"]
        assert encoder.lengths["train"].dropped_by == {"data.max_tokens": 1}
        with pytest.raises(DataError, match=r"f:1: \d+ tokens, .* exceed data\.max_tokens=60"):
            encode(tokenizer, rows, max_tokens=60, truncation=Truncation.error)

    def test_d10_counts_stand_in_the_log_and_the_record(self, tmp_path: Path, capsys: Any) -> None:
        rows = lines(60)
        rows[5] = json.dumps({"prompt": LONG, "response": "short"}).encode()
        more = ["data.max_tokens=64", "data.validation_fraction=0.1", "progress=false"]
        train(prepared_from(tmp_path, rows, *more).config)
        assert "length limits: 1 training rows were cut in their prompt" in capsys.readouterr().out
        directory = run_directory(tmp_path / "out")
        environment = json.loads((directory / "environment.json").read_text())
        assert environment["data"]["splits"]["train"]["rows_cut"] == 1
        assert "length limits" in (directory / "log.txt").read_text()

    def test_d11_a_row_without_room_for_its_answer_is_left_out_and_counted(self, tmp_path: Path) -> None:
        rows = lines(120)
        rows[5] = json.dumps({"prompt": "q", "response": LONG}).encode()
        config = prepared_from(tmp_path, rows, "data.max_tokens=64", "trainer.max_steps=14").config
        train(config, quiet=True)
        recorded = records(run_directory(tmp_path / "out"))
        losses = [r["train/loss_nats"] for r in recorded if "train/loss_nats" in r]
        assert len(losses) > 10
        assert all(loss is not None and loss > 0.01 for loss in losses), "no step is empty, none is 0/0"

    def test_d11_more_than_one_row_in_a_hundred_is_refused(self, tmp_path: Path) -> None:
        rows = lines(100)
        for index in (5, 25, 45):
            rows[index] = json.dumps({"prompt": "q", "response": LONG}).encode()
        small = ["data.max_tokens=64", "data.validation_fraction=0.1", "data.split_seed=1"]
        with pytest.raises(DataError, match=r"[23] of \d+ train rows \([23]\.\d%\) do not fit .*max_dropped_fraction"):
            train(prepared_from(tmp_path, rows, *small).config, quiet=True)
        prepared = prepared_from(tmp_path, rows, *small, "data.max_dropped_fraction=0.1")
        encoded = read_rows(prepared, print)
        assert not [
            f for f in inspect_rows(prepared, encoded, search_near_duplicates=False).findings if f.level == "error"
        ]

    def test_d11_a_row_with_nothing_to_learn_never_makes_a_loss(self, tokenizer: Any) -> None:
        with pytest.raises(DataError, match="none of the 1 train rows is left"):
            encode(tokenizer, [chat("q", LONG)], max_tokens=30)


class TestD12ToD14SpecialTokens:
    """Pad, begin and end tokens: each once, in the right position."""

    def saved(self, tokenizer: Any, tmp_path: Path, **special: Any) -> Path:
        """The tiny model with other special tokens."""
        import shutil

        shutil.copytree(ROOT / "llmft" / "assets" / "tiny", tmp_path / "model")
        path = tmp_path / "model" / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        for name, value in special.items():
            settings.pop(name, None)
            if value is not None:
                settings[name] = value
        path.write_text(json.dumps(settings))
        (tmp_path / "model" / "special_tokens_map.json").unlink(missing_ok=True)
        return tmp_path / "model"

    def read(self, tmp_path: Path, model: Path) -> Any:
        return prepared_from(tmp_path, lines(), "model=local", f"model.path={model}", "prompt=alpaca_short")

    def test_d12_without_a_pad_token_one_is_chosen_and_recorded(self, tokenizer: Any, tmp_path: Path) -> None:
        model = self.saved(tokenizer, tmp_path, pad_token=None)
        prepared = self.read(tmp_path, model)
        encoded = read_rows(prepared, print)
        assert encoded.tokenizer.pad_token is not None
        assert encoded.tokenizer.pad_token in (encoded.tokenizer.unk_token, encoded.tokenizer.eos_token)
        assert len(encoded.tokenizer) == len(tokenizer), "no embedding is added"
        train(prepared.config, quiet=True)
        environment = json.loads((run_directory(tmp_path / "out") / "environment.json").read_text())
        assert environment["tokenizer"]["pad"] == encoded.tokenizer.pad_token

    def test_d13_where_the_pad_token_is_the_end_token_the_end_is_still_learned(
        self, tokenizer: Any, tmp_path: Path
    ) -> None:
        encoded = read_rows(self.read(tmp_path, self.saved(tokenizer, tmp_path, pad_token="</s>")), print)
        end = encoded.tokenizer.eos_token_id
        assert encoded.tokenizer.pad_token_id == end
        examples = encoded.splits["train"]
        assert all(int(example.labels[-1]) == end for example in examples)
        batch = collate([examples[0], examples[60]], [0, 60], encoded.tokenizer.pad_token_id)
        for row, mask in zip(batch.labels, batch.attention_mask, strict=True):
            assert int(row[mask.bool()][-1]) == end
            assert (row[~mask.bool()] == IGNORE).all()

    @pytest.mark.parametrize("name", ["llama2", "mistral", "alpaca", "chatml"])
    def test_d14_one_begin_token_and_as_many_end_tokens_as_the_format_writes(
        self, tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also for a tokenizer that adds a begin token to every text."""
        import copy

        from tokenizers.processors import TemplateProcessing

        adding = copy.deepcopy(tokenizer)
        adding.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
        )
        assert adding("a").input_ids[0] == adding.bos_token_id
        rows = [chat("Who?", "Ann"), chat("Where?", "Here")]
        for each in (tokenizer, adding):
            config = replace(format_of(name).config)
            encoder = Encoder(each, prompt_format(config, each), DataConfig(name="d", files="f"))
            text = encoder.render(rows[0]).text
            for example in encoder.encode("train", rows, BadRows()):
                ids = list(example.input_ids)
                assert ids.count(each.bos_token_id) == (1 if each is adding else text.count("<s>"))
                assert ids.count(each.eos_token_id) == text.count("</s>")


def test_d16_the_same_row_on_both_sides_is_counted_and_too_many_are_refused(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_bytes(b"\n".join(lines(10)))
    where = [f"data.split_files.validation={tmp_path}/val.jsonl", f"data.split_files.train={tmp_path}/train.jsonl"]
    where += [f"output_dir={tmp_path}/out", "data=prompt_response"]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines(100)))
    small = [override for override in SMALL if not override.startswith("data.rows")]
    with pytest.raises(DataError, match=r"10 validation rows \(100%\) are also in train"):
        train(compose(*small, *where), quiet=True)
    prepared = prepare(compose(*small, *where, "data.max_overlap_fraction=1"))
    (overlap,) = [
        o for o in inspect_rows(prepared, read_rows(prepared, print), search_near_duplicates=False).overlaps if o.exact
    ]
    assert (overlap.first, overlap.second, overlap.exact) == ("train", "validation", 10)


FORMATS = ["mistral", "llama2", "llama3", "chatml", "zephyr", "gemma"]
MESSAGES = [
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "Sue did."},
    {"role": "user", "content": "And when?"},
    {"role": "assistant", "content": "Last year."},
]


def picture(tokenizer: Any, name: str) -> str:
    """The ids of a conversation, each with its text, those that are learned marked."""
    encoder = Encoder(tokenizer, prompt_format(format_of(name).config, tokenizer), DataConfig(name="d", files="f"))
    (example,) = encoder.encode("train", [Conversation(MESSAGES, "f:1")], BadRows())
    out = [encoder.render(Conversation(MESSAGES, "f:1")).text, "-" * 40]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORE, token)
        mark = "learned" if label != IGNORE else ""
        out.append(f"{int(token):6d} {tokenizer.decode([int(token)])!r:24} {mark}".rstrip())
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("name", FORMATS)
def test_d17_ids_and_labels_are_those_of_the_picture(tokenizer: Any, name: str) -> None:
    """Pictures in tests/trust/fixtures/templates; `LLMFT_DRAW=1` draws them again, for a person to look at."""
    path = PICTURES / f"{name}.txt"
    drawn = picture(tokenizer, name)
    if os.environ.get("LLMFT_DRAW"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(drawn)
    assert drawn == path.read_text()


def test_a_config_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns"):
        prepared_from(tmp_path, lines(), "data.columns.prompt=null", "data.columns.response=null")
    assert Columns().response is None
