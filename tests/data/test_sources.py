"""Reading: rows are what the file says, and what is wrong is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from llmft.config import BadRow, DataConfig, Files
from llmft.data.sources import Problems, load_rows, read
from llmft.errors import ConfigError, DataError


def rows(path: Path, policy: BadRow = BadRow.error) -> tuple[list[dict], list[str], Problems]:
    problems = Problems(policy)
    found = list(read(path, path.read_bytes(), problems))
    return [row.values for row in found], [row.where.rpartition("/")[2] for row in found], problems


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    wanted = [{"q": "a", "r": "x, y"}, {"q": "b\nc", "r": "ü"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in wanted) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(wanted, indent=2))
    (tmp_path / "a.csv").write_text('q,r\na,"x, y"\n"b\nc",ü\n')
    (tmp_path / "a.tsv").write_text('q\tr\na\tx, y\n"b\nc"\tü\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet"):
        assert rows(tmp_path / name)[0] == wanted, name
    assert rows(tmp_path / "a.jsonl")[1] == ["a.jsonl:1", "a.jsonl:3"]
    assert rows(tmp_path / "a.json")[1] == ["a.json:2", "a.json:6"]
    assert rows(tmp_path / "a.csv")[1] == ["a.csv:2", "a.csv:3"]


def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "1"}\r\n{"a": "2"}\r\n')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n")
    assert rows(tmp_path / "a.jsonl")[0] == [{"a": "1"}, {"a": "2"}]
    assert rows(tmp_path / "a.csv")[0] == [{"a": "1", "b": "2"}]


BROKEN = {
    "utf8.jsonl": (b'{"a": "1"}\n{"a": "\xff"}\n{"a": "3"}\n', "utf8.jsonl:2: not UTF-8 (byte 0xff at column 8)"),
    "cut.jsonl": (b'{"a": "1"}\n{"a": "2', "cut.jsonl:2: not JSON"),
    "middle.jsonl": (b'{"a": "1"}\n{"a": \n{"a": "3"}\n', "middle.jsonl:2: not JSON"),
    "list.jsonl": (b'{"a": "1"}\n[1, 2]\n', "list.jsonl:2: a JSON object was expected, not list"),
    "twice.jsonl": (b'{"a": "1"}\n{"a": "2", "a": "3"}\n', "twice.jsonl:2: not JSON (the key 'a' stands twice)"),
    "half.jsonl": (b'{"a": "1"}\n{"a": "\\ud83d"}\n', "half.jsonl:2: not JSON (half a character"),
    "cells.csv": (b"a,b\n1,2\n1,2,3\n", "cells.csv:3: 3 cells where the header has 2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        rows(tmp_path / name)
    assert sentence in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_skipped_and_counted_on_request(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name][0])
    found, _, problems = rows(tmp_path / name, BadRow.skip)
    assert len(problems.rejected) == 1
    assert problems.rejected[0]["where"].endswith(BROKEN[name][1].partition(": ")[0])
    assert found
    assert found[0]["a"] == "1"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'{"a": 1}', "a JSON array of objects was expected; one object per line belongs in a .jsonl"),
        ("b.json", b'[{"a": 1},\n{"a": ]', "b.json:2: not JSON"),
        ("c.csv", b"a,b\n\xff,2\n", "c.csv:2: not UTF-8"),
        ("f.csv", b"a,b,a\n1,2,3\n", "f.csv:1: the header names the column 'a' twice"),
        ("g.csv", b'a,b\n1,"2\n', "g.csv:2: not CSV"),
        ("h.json", b'[{"a": 1} {"a": 2}]', "a comma is missing"),
        ("i.json", b'[{"a": 1}] x', "text behind the end of the array"),
        ("j.json", b'[,{"a": 1}]', "a comma is too many"),
        ("d.jsonl.gz", b"not gzip", "cannot be decompressed"),
        ("e.parquet", b"PAR1", "not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_an_error(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence.replace(".", r"\.")):
        rows(tmp_path / name, BadRow.skip)


def test_the_cut_off_last_line_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "1"}\n{"a": "2')
    with pytest.raises(DataError, match="no newline: cut off"):
        rows(tmp_path / "a.jsonl")


def config(**values: object) -> DataConfig:
    return DataConfig(name="test", **values)  # type: ignore[arg-type]


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1"}\n')
    before = load_rows(config(files=str(path)), Problems())
    stamp = path.stat()
    path.write_text('{"a": "2"}\n')
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = load_rows(config(files=str(path)), Problems())
    assert after.splits["train"][0].values == {"a": "2"}
    assert before.fingerprint != after.fingerprint
    (tmp_path / "b.jsonl").write_text('{"a": "2"}\n')
    assert load_rows(config(files=str(tmp_path / "b.jsonl")), Problems()).fingerprint == after.fingerprint


def test_globs_lists_and_given_splits(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"t": name}) + "\n")
    found = load_rows(config(files=str(tmp_path / "*.jsonl")), Problems())
    assert [row.values["t"] for row in found.splits["train"]] == ["a", "b", "c"]
    given = Files(train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], validation=str(tmp_path / "c.jsonl"))
    found = load_rows(config(split_files=given), Problems())
    assert {split: len(part) for split, part in found.splits.items()} == {"train": 2, "validation": 1}


def test_a_missing_or_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*train\.jsonl"):
        load_rows(config(files=str(tmp_path / "trian.jsonl")), Problems())
    with pytest.raises(DataError, match="no training rows"):
        load_rows(config(files=str(tmp_path / "train.jsonl")), Problems())
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(ConfigError, match="known endings"):
        load_rows(config(files=str(tmp_path / "a.xlsx")), Problems())


def test_a_source_must_be_one_of_ours() -> None:
    with pytest.raises(ConfigError, match="only functions under"):
        load_rows(config(source="os.listdir", rows={"train": 1}), Problems())


def test_real_files_are_read(shared_data: Path) -> None:
    counts = {
        "instruction/llamafactory_alpaca_en_demo.json": 999,
        "instruction/dolly_hhrlhf_1k.jsonl": 1000,
        "classification/predict_llm7_alpacaeval_train.csv": 4635,
        "multiturn/fastchat_dummy_conversation.json": 500,
    }
    for name, count in counts.items():
        assert len(rows(shared_data / name)[0]) == count, name


def test_compressed_files_and_directories_of_datasets_are_read(tmp_path: Path) -> None:
    import bz2
    import lzma

    import datasets

    wanted = [{"t": "a"}, {"t": "ü"}]
    content = "".join(json.dumps(row) + "\n" for row in wanted).encode()
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(content))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content))
    datasets.Dataset.from_list(wanted).save_to_disk(tmp_path / "arrow")
    for name in ("a.jsonl.bz2", "a.jsonl.xz", "arrow"):
        found = load_rows(config(files=str(tmp_path / name)), Problems())
        assert [row.values for row in found.splits["train"]] == wanted, name


def test_a_very_long_line_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"t": "x" * 10_000_000}) + "\n" + '{"t": "' + "y" * 10_000_000)
    found, _, problems = rows(path, BadRow.skip)
    assert len(found) == 1
    assert problems.rejected[0]["where"].endswith("a.jsonl:2")
    assert len(problems.rejected[0]["reason"]) < 200


def test_a_local_file_comes_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n')
    found = load_rows(config(hub="some/dataset", files=str(tmp_path / "a.jsonl")), Problems())
    assert len(found.splits["train"]) == 1


def test_a_hub_dataset_that_is_not_cached_says_so_at_once_offline() -> None:
    with pytest.raises(ConfigError, match=r"data\.hub=tatsu-lab/alpaca: .*data\.files=FILE"):
        load_rows(config(hub="tatsu-lab/alpaca"), Problems())
