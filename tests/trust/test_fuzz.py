"""Hypothesis on untrusted input: row files, conversations, command lines.

A short run by default; `LLMFT_FUZZ_S=600 python -m pytest tests/trust/test_fuzz.py -n 0 -k json_lines` looks for ten
minutes and prints how much it tried.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from llmft.config.data import BadRow
from llmft.config.overrides import config_directory
from llmft.core.errors import DataError, UserError, report
from llmft.data.prompt import PromptFormat
from llmft.data.readers import BadRows, Row, read
from tests.conftest import prompt_config

FUZZ_S = float(os.environ.get("LLMFT_FUZZ_S", "0"))
SETTINGS = settings(
    max_examples=2000 if FUZZ_S else 75,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(st.text(max_size=8), values, max_size=4)
json_line = rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
broken_line = st.tuples(json_line, st.integers(0, 60), st.binary(max_size=4)).map(
    lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
)
lines = st.lists(json_line | broken_line | st.binary(max_size=30), max_size=8).map(b"\n".join)
files = st.one_of(lines, lines.map(lambda content: b"\xef\xbb\xbf" + content), st.binary(max_size=200))


def check_rows(name: str, content: bytes) -> int:
    """Reads `content` with both policies; returns the number of rows.

    Only a DataError may be raised, and it must name the file and what to do; skipping reads the sound rows, the same
    ones as a strict reading up to the first bad one.
    """
    path = Path(name)
    skipped = BadRows(BadRow.skip)
    rows: list[Row] = []
    try:
        for row in read(path, content, skipped):
            rows.append(row)
    except DataError as error:
        assert str(error).startswith(name)
    for row in rows:
        assert isinstance(row.values, dict)
        assert row.where.startswith(f"{name}:")
        json.dumps(row.values, ensure_ascii=False).encode()
    for entry in skipped.rejected:
        assert entry["where"].startswith(f"{name}:")
        assert entry["reason"]
        json.dumps(entry, ensure_ascii=False)
    strict: list[Row] = []
    try:
        for row in read(path, content, BadRows(BadRow.error)):
            strict.append(row)
    except DataError as error:
        assert str(error).startswith(name)
        assert "Traceback" not in str(error)
    else:
        assert not skipped.rejected
    assert [row.where for row in strict] == [row.where for row in rows[: len(strict)]]
    return len(rows)


class TestFuzzReaders:
    """Any bytes give rows or one sentence."""

    def look(self, name: str, contents: Any) -> None:
        tried = {"files": 0, "rows": 0, "bytes": 0, "with rows": 0}
        began = time.monotonic()

        def law(content: bytes) -> None:
            num_rows = check_rows(name, content)
            tried["files"] += 1
            tried["rows"] += num_rows
            tried["with rows"] += num_rows > 0
            tried["bytes"] += len(content)

        again = 0
        while again == 0 or time.monotonic() - began < FUZZ_S:
            seed(again)(SETTINGS(given(contents)(law)))()
            again += 1
        if FUZZ_S:
            print(f"{name}: {tried} in {time.monotonic() - began:.0f} s")

    def test_fuzz_json_lines(self) -> None:
        self.look("rows.jsonl", files)

    def test_fuzz_json_arrays(self) -> None:
        arrays = st.lists(rows, max_size=5).map(lambda values: json.dumps(values, ensure_ascii=False))
        content = arrays.map(lambda text: text.encode("utf-8", "surrogatepass"))
        cut = st.tuples(content, st.integers(0, 80), st.binary(max_size=3)).map(
            lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
        )
        self.look("rows.json", content | cut | st.binary(max_size=60))

    @pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
    def test_fuzz_tables(self, name: str) -> None:
        cells = st.lists(st.text(alphabet='ab",;\t\r\n \x00é"', max_size=6), min_size=1, max_size=4)
        table = st.lists(cells, max_size=6).map(
            lambda rows: "\n".join((("\t" if name.endswith("tsv") else ",").join(row)) for row in rows).encode()
        )
        self.look(name, table | st.binary(max_size=60))

    @pytest.mark.parametrize("name", ["rows.txt", "rows.parquet", "rows.jsonl.gz", "rows.csv.bz2", "rows.json.xz"])
    def test_fuzz_bytes_of_other_formats(self, name: str) -> None:
        self.look(name, st.binary(max_size=300))


FORMATS = sorted(path.stem for path in (config_directory() / "prompt").glob("*.yaml") if path.stem != "native")
turns = st.lists(
    st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20).filter(lambda text: text.strip())),
    min_size=1,
    max_size=3,
)


class TestFuzzPrompts:
    """Text, answers and their marks are consistent for any conversation."""

    @pytest.mark.parametrize("name", FORMATS)
    def test_fuzz_spans_cover_exactly_the_answers_and_the_parts_make_the_text(self, name: str) -> None:
        prompt = PromptFormat(prompt_config(name), bos_token="<s>", eos_token="</s>")

        @settings(SETTINGS, max_examples=40 if not FUZZ_S else 2000)
        @given(turns)
        def law(pairs: list[tuple[str, str]]) -> None:
            messages = [
                message
                for question, answer in pairs
                for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            ]
            try:
                rendered = prompt.render(messages)
            except ValueError as error:
                assert str(error).startswith(f"prompt={name}: ")
                return
            places = [0, *(position for span in rendered.spans for position in span), len(rendered.text)]
            assert places == sorted(places), "spans are in order and do not overlap"
            parts = [rendered.text[a:b] for a, b in itertools.pairwise(places)]
            assert "".join(parts) == rendered.text
            learned = parts[1::2]
            if name == "plain":  # a document: all of it is learned
                return
            assert len(learned) == len(pairs)
            marker = prompt.end_marker()
            for (_, answer), part in zip(pairs, learned, strict=True):
                assert part.strip().removesuffix(marker).strip() == answer.strip()
            assert not any(mark in rendered.text for mark in ("\ue000", "\ue002")) or any(
                mark in text for pair in pairs for text in pair for mark in ("\ue000", "\ue002")
            )

        law()

    def test_fuzz_marks_in_the_rows_text_are_only_text(self) -> None:
        """Also the private-use characters that mark an answer during rendering."""
        prompt = PromptFormat(prompt_config("chatml"))
        text = "{% generation %} \ue000abc\ue001 {{ bos_token }} \ue002\ue003"
        rendered = prompt.render([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
        assert len(rendered.spans) == 1
        assert text in rendered.text[rendered.spans[0][0] : rendered.spans[0][1]]


@settings(SETTINGS, max_examples=25)
@given(
    st.tuples(
        st.sampled_from(["lora.r", "model", "notes", "data.files", "learning_rate.peak", "nonsense", "lora", "seed"]),
        st.text(max_size=12),
    ).map("=".join)
)
def test_fuzz_a_command_line_gives_a_config_or_one_sentence(capsys: Any, argument: str) -> None:
    from llmft.config.hydra_app import explain
    from llmft.config.sections import TrainConfig
    from tests.conftest import compose

    try:
        compose(argument)
    except UserError:
        return
    except Exception as error:
        message = explain(error, TrainConfig)
        assert message is not None, repr(error)
        report(message)
        assert len(capsys.readouterr().err.splitlines()) == 1
