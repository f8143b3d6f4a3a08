"""Reading: rows equal the file's contents, and errors name file and line."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmft.config.data import BadRow, Columns, DataConfig, Files
from llmft.core.errors import ConfigError, DataError
from llmft.data.naming import NotFinite
from llmft.data.readers import BadRows, read
from llmft.data.sources import load_rows, read_files


def rows(path: Path, policy: BadRow = BadRow.error) -> tuple[list[dict], list[str], BadRows]:
    problems = BadRows(policy)
    values = list(read(path, path.read_bytes(), problems))
    return [row.values for row in values], [row.where.rpartition("/")[2] for row in values], problems


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    expected = [{"q": "a", "r": "x, y"}, {"q": "b\nc", "r": "ü"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in expected) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(expected, indent=2))
    (tmp_path / "a.csv").write_text('q,r\na,"x, y"\n"b\nc",ü\n')
    (tmp_path / "a.tsv").write_text('q\tr\na\tx, y\n"b\nc"\tü\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(expected), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet"):
        assert rows(tmp_path / name)[0] == expected, name
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
    "twice.jsonl": (b'{"a": "1"}\n{"a": "2", "a": "3"}\n', "twice.jsonl:2: not JSON (the key 'a' appears twice)"),
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
    values, _, problems = rows(tmp_path / name, BadRow.skip)
    assert len(problems.rejected) == 1
    assert problems.rejected[0]["where"].endswith(BROKEN[name][1].partition(": ")[0])
    assert values
    assert values[0]["a"] == "1"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'{"a": 1}', "a JSON array of objects was expected; one object per line belongs in a .jsonl"),
        ("b.json", b'[{"a": 1},\n{"a": ]', "b.json:2: not JSON"),
        ("c.csv", b"a,b\n\xff,2\n", "c.csv:2: not UTF-8"),
        ("f.csv", b"a,b,a\n1,2,3\n", "f.csv:1: the header names the column 'a' twice"),
        ("g.csv", b'a,b\n1,"2\n', "g.csv:2: not CSV"),
        ("h.json", b'[{"a": 1} {"a": 2}]', "a comma is missing"),
        ("i.json", b'[{"a": 1}] x', "text after the end of the array"),
        ("j.json", b'[,{"a": 1}]', "one comma too many"),
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
    before = load_rows(config(files=str(path)), BadRows())
    stamp = path.stat()
    path.write_text('{"a": "2"}\n')
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = load_rows(config(files=str(path)), BadRows())
    assert after.splits["train"][0].values == {"a": "2"}
    assert before.fingerprint != after.fingerprint
    (tmp_path / "b.jsonl").write_text('{"a": "2"}\n')
    assert load_rows(config(files=str(tmp_path / "b.jsonl")), BadRows()).fingerprint == after.fingerprint


def test_globs_lists_and_given_splits(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"t": name}) + "\n")
    loaded = load_rows(config(files=str(tmp_path / "*.jsonl")), BadRows())
    assert [row.values["t"] for row in loaded.splits["train"]] == ["a", "b", "c"]
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    split_files = Files(train=[a, b], validation=c)
    loaded = load_rows(config(split_files=split_files), BadRows())
    assert {split: len(part) for split, part in loaded.splits.items()} == {"train": 2, "validation": 1}


def test_a_missing_or_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*train\.jsonl"):
        load_rows(config(files=str(tmp_path / "trian.jsonl")), BadRows())
    with pytest.raises(DataError, match="no training rows"):
        load_rows(config(files=str(tmp_path / "train.jsonl")), BadRows())
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(ConfigError, match="known endings"):
        load_rows(config(files=str(tmp_path / "a.xlsx")), BadRows())


def test_a_source_must_be_one_of_ours() -> None:
    with pytest.raises(ConfigError, match=r"only llmft\.data"):
        load_rows(config(source="os.listdir", rows={"train": 1}), BadRows())


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

    expected = [{"t": "a"}, {"t": "ü"}]
    content = "".join(json.dumps(row) + "\n" for row in expected).encode()
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(content))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content))
    datasets.Dataset.from_list(expected).save_to_disk(tmp_path / "arrow")
    for name in ("a.jsonl.bz2", "a.jsonl.xz", "arrow"):
        loaded = load_rows(config(files=str(tmp_path / name)), BadRows())
        assert [row.values for row in loaded.splits["train"]] == expected, name


def test_a_very_long_line_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"t": "x" * 10_000_000}) + "\n" + '{"t": "' + "y" * 10_000_000)
    values, _, problems = rows(path, BadRow.skip)
    assert len(values) == 1
    assert problems.rejected[0]["where"].endswith("a.jsonl:2")
    assert len(problems.rejected[0]["reason"]) < 200


def test_a_local_file_comes_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n')
    loaded = load_rows(config(hub="some/dataset", files=str(tmp_path / "a.jsonl")), BadRows())
    assert len(loaded.splits["train"]) == 1


def test_a_hub_dataset_that_is_not_cached_says_so_at_once_offline() -> None:
    with pytest.raises(ConfigError, match=r"data\.hub=tatsu-lab/alpaca: .*data\.files=FILE"):
        load_rows(config(hub="tatsu-lab/alpaca"), BadRows())


def test_a_hub_dataset_that_was_read_before_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets.packaged_modules.json.json import Json

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n{"t": "b"}\n')
    builder = Json(str(tmp_path / "cache"), "rows", hash="1234", data_files={"train": [str(tmp_path / "a.jsonl")]})
    builder.download_and_prepare()
    of_the_hub = tmp_path / "cache" / "somebody___rows" / "default" / "0.0.0" / "1234"
    of_the_hub.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(of_the_hub)
    loaded = load_rows(config(hub="somebody/rows"), BadRows())
    assert [row.values for row in loaded.splits["train"]] == [{"t": "a"}, {"t": "b"}]


def wheres(path: Path) -> list[str]:
    return rows(path)[1]


def test_rows_on_one_line_of_json_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2},\n{"a": 3},{"a": 4}]')
    assert wheres(tmp_path / "a.json") == ["a.json:1", "a.json:1:12", "a.json:2", "a.json:2:10"]


def test_rows_of_files_with_one_name_have_names_that_no_machine_changes(tmp_path: Path) -> None:
    for root in ("here", "there/deeper"):
        paths = []
        for folder in ("one", "two/three"):
            path = tmp_path / root / folder / "train.csv"
            path.parent.mkdir(parents=True)
            path.write_text(f"t\n{folder}\n")
            paths.append(str(path))
        loaded_rows = read_files(paths, "data.files", BadRows()).rows
        assert [row.id for row in loaded_rows] == ["one/train.csv:2", "two/three/train.csv:2"]
        assert [row.where for row in loaded_rows] == [f"{path}:2" for path in paths]
    assert [row.id for row in read_files(paths[:1], "data.files", BadRows()).rows] == ["train.csv:2"]
    with pytest.raises(ConfigError, match=r"data\.files: .*train\.csv is named twice"):
        read_files([paths[0], str(Path(paths[0]).parent / ".." / "one" / "*.csv")], "data.files", BadRows())


def test_files_are_the_training_rows_beside_split_files(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"t": name}) + "\n")
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    loaded = load_rows(config(files=a, split_files=Files(validation=b, test=c)), BadRows())
    assert {split: [row.values["t"] for row in part] for split, part in loaded.splits.items()} == {
        "train": ["a"],
        "validation": ["b"],
        "test": ["c"],
    }
    for split in ("validation", "test"):
        with pytest.raises(ConfigError, match=rf"data\.split_files\.{split}=.*no such file; did you mean"):
            load_rows(config(files=a, split_files=Files(**{split: f"{b}x"})), BadRows())
        (tmp_path / "empty.jsonl").write_text("")
        with pytest.raises(DataError, match=rf"data\.split_files\.{split}=.*no rows"):
            load_rows(config(files=a, split_files=Files(**{split: str(tmp_path / "empty.jsonl")})), BadRows())
    with pytest.raises(ConfigError, match="both set"):
        config(files=a, split_files=Files(train=b))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"source": "llmft.data.synthetic.writers", "split_files": Files(validation="x")},
            "split_files.validation=x needs",
        ),
        ({"hub": "a/b", "split_files": Files(test="x")}, "split_files.test=x needs data.files"),
        ({"hub": "a/b", "csv_columns": ["a"]}, "csv_columns.* needs data.files"),
        ({"hub": "a/b", "rows": {"train": 3}}, "rows.* needs data.source"),
        ({"files": "x.csv", "hub_splits": Files(validation="v")}, "hub_splits.validation=v needs data.hub"),
        ({"files": "x.csv", "hub_config": "c"}, "hub_config=c needs data.hub"),
        ({"files": "x.csv", "pseudo_rows": "y.csv"}, "pseudo_rows=y.csv needs data.pseudo"),
        ({"source": "llmft.data.synthetic.writers", "hub": "a/b"}, "data.source and data.hub are both set"),
    ],
)
def test_a_key_that_names_rows_is_read_or_refused(values: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_rows(config(**values), BadRows())


def test_names_of_csv_columns_beside_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "1"}\n')
    with pytest.raises(ConfigError, match=r"data\.csv_columns is for csv and tsv files"):
        load_rows(config(files=str(tmp_path / "a.jsonl"), csv_columns=["a"]), BadRows())


def table(path: Path, **columns: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_values_of_any_arrow_type_are_read(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    import pyarrow as pa

    seconds = pa.array([1, 2], pa.int64())
    path = table(
        tmp_path / "a.parquet",
        day=[datetime.date(2024, 1, 2)] * 2,
        price=[Decimal("1.50")] * 2,
        raw=[b"\xff"] * 2,
        exact=seconds.cast(pa.timestamp("ns")),
        far=pa.array([2**50, 0], pa.int64()).cast(pa.timestamp("ms")),
        mars=seconds.cast(pa.timestamp("s", "Mars/Phobos")),
        span=seconds.cast(pa.duration("s")),
        broken=pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff"] * 2).buffers()),
    )
    first, second = rows(path)[0]
    assert (first["day"], first["price"], first["raw"]) == (datetime.date(2024, 1, 2), Decimal("1.50"), b"\xff")
    assert second["far"] == datetime.datetime(1970, 1, 1)
    assert "timestamp" in str(first["far"])
    assert second["exact"] == "1970-01-01 00:00:00.000000002"
    assert "timestamp" in str(first["mars"])
    loaded_rows = load_rows(config(files=str(path)), BadRows()).splits["train"]
    assert [row.id for row in loaded_rows] == ["a.parquet:row 1", "a.parquet:row 2"]


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    import random

    whole_file = table(tmp_path / "a.parquet", q=[f"question {n} " * 10 for n in range(500)]).read_bytes()
    damage = random.Random(0)
    path, refused = tmp_path / "b.parquet", 0
    for _ in range(60):
        content = bytearray(whole_file)
        for _ in range(20):
            content[damage.randrange(len(content))] = damage.randrange(256)
        path.write_bytes(content[: damage.choice([len(content), damage.randrange(len(content))])])
        with contextlib.suppress(DataError):
            rows(path)
            continue
        refused += 1
    assert refused > 30


def test_a_column_that_stands_twice_is_said(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table([[1], [2]], names=["q", "q"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: two columns are called 'q'; rename one"):
        rows(tmp_path / "a.parquet")


def labelled() -> Any:
    import datasets

    features = datasets.Features(
        {
            "t": datasets.Value("string"),
            "y": datasets.ClassLabel(names=["neg", "pos"]),
            "ys": [datasets.ClassLabel(names=["a", "b"])],
        }
    )
    return datasets.Dataset.from_dict(
        {"t": ["x", "y", "z"], "y": [1, 0, -1], "ys": [[0, 1], [], [1]]}, features=features
    )


def test_the_names_of_classes_are_kept(tmp_path: Path) -> None:
    labelled().to_parquet(tmp_path / "a.parquet")
    labelled().save_to_disk(tmp_path / "arrow")
    for name in ("a.parquet", "arrow"):
        loaded_rows = load_rows(config(files=str(tmp_path / name)), BadRows()).splits["train"]
        assert [row.values["y"] for row in loaded_rows] == ["pos", "neg", None], name
        assert [row.values["ys"] for row in loaded_rows] == [["a", "b"], [], ["b"]], name


def test_a_directory_of_several_splits_is_read_as_they_are_called(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": labelled(), "test": labelled()}).save_to_disk(tmp_path / "d")
    loaded = load_rows(config(files=str(tmp_path / "d")), BadRows())
    assert {split: len(part) for split, part in loaded.splits.items()} == {"train": 3, "test": 3}
    with pytest.raises(
        ConfigError, match=r"data\.split_files\.test is set, and data\.files=.*d has test rows: keep one"
    ):
        load_rows(config(files=str(tmp_path / "d"), split_files=Files(test=str(tmp_path / "d" / "test"))), BadRows())
    datasets.DatasetDict({"train": labelled(), "dev": labelled()}).save_to_disk(tmp_path / "e")
    with pytest.raises(ConfigError, match=r"splits train, dev; name each one: data\.split_files\.train=.*e/train"):
        load_rows(config(files=str(tmp_path / "e")), BadRows())
    split_files = Files(train=str(tmp_path / "e" / "train"), validation=str(tmp_path / "e" / "dev"))
    assert set(load_rows(config(split_files=split_files), BadRows()).splits) == {"train", "validation"}
    for values in ({"files": [str(tmp_path / "e")]}, {"split_files": Files(train=str(tmp_path / "d"))}):
        with pytest.raises(ConfigError, match=r"a directory of several splits.*[ed]/train"):
            load_rows(config(**values), BadRows())
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.csv").write_text("a\n1\n")
    with pytest.raises(ConfigError, match=r"a directory, a file was expected; name the files in it: .*f/\*\.csv"):
        load_rows(config(files=str(tmp_path / "f")), BadRows())


def test_names_below_columns_are_columns(tmp_path: Path) -> None:
    values = {"a.b": "flat", "a": {"b": "deep", "c": [{"d": "listed"}]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(values) + '\n{"a": {"c": []}}\n')
    columns = Columns(prompt="{a.b} {a.c[0].d}", response="a.c[-1].d", system="a.b[0]")
    first, second = load_rows(config(files=str(tmp_path / "a.jsonl"), columns=columns), BadRows()).splits["train"]
    assert first.values == {**values, "a.c[0].d": "listed", "a.c[-1].d": "listed"}
    assert second.values == {"a": {"c": []}}


def test_a_number_that_is_not_finite_is_marked_in_a_column_of_numbers_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,word\n1.5,inf\ninf,x\nnan,nan\n1e400,y\n,z\n")
    marked = [
        {name for name, cell in row.items() if isinstance(cell, NotFinite)} for row in rows(tmp_path / "a.csv")[0]
    ]
    assert marked == [set(), {"n"}, {"n"}, {"n"}, set()]


ODD = {
    "deep.jsonl": b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}\n",
    "deeper.json": b'[{"a": ' + b'{"b":' * 100_000,
    "digits.jsonl": b'{"a": ' + b"9" * 5000 + b"}\n",
    "null.jsonl": b"\x00\n",
    "utf16.csv": "a\n1\n".encode("utf-16"),
    "cut.jsonl.gz": gzip.compress(b'{"a": 1}\n' * 100)[:-20],
    "wrong.jsonl.gz": gzip.compress(b'{"a": 1}\n' * 100)[:20] + b"\xff" * 20,
    "empty.jsonl": b"",
    "empty.json": b"",
    "empty.csv": b"",
    "empty.parquet": b"",
    "empty.jsonl.gz": b"",
    "empty.jsonl.xz": b"",
}


@pytest.mark.parametrize("policy", list(BadRow))
@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_in_one_sentence(tmp_path: Path, name: str, policy: BadRow) -> None:
    (tmp_path / name).write_bytes(ODD[name])
    with pytest.raises(DataError, match=name.replace(".", r"\.")) as error:
        load_rows(config(files=str(tmp_path / name)), BadRows(policy))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["", "x" * 300, "a\0b", "[", "no/such/folder.csv", "pipe.csv"])
def test_names_that_are_no_files_are_refused(tmp_path: Path, name: str) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ConfigError, match=r"data\.files="):
        load_rows(config(files=[str(tmp_path / name)]), BadRows())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "q;r\na, b;c\n", "';' separates the columns, ',' was expected"),
        ("a.csv", "q\tr\na\tc\n", r"'\\t' separates the columns"),
        ("a.tsv", "q,r\na,c\n", "',' separates the columns"),
        ("a.jsonl", '[{"q": 1}]\n', "an array of objects belongs in a .json file"),
        ("a.jsonl", '[\n{"q": 1}\n]\n', "an array of objects belongs in a .json file"),
        ("a.json", '{"data": [{"q": 1}]}', "an array within an object in a file of its own"),
        ("a.jsonl", f'{{"q": {"9" * 5000}}}\n', r"has 5000 digits\)"),
    ],
)
def test_a_file_of_another_kind_than_its_ending_is_said_so(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        rows(tmp_path / name)
