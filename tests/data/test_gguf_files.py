"""model.path=FILE.gguf: a GGUF file is a model directory, dequantised once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmft.core.errors import ConfigError
from llmft.data.gguf_files import as_directory

pytest.importorskip("gguf")


def test_a_gguf_file_is_read_back_as_what_it_was_made_from_and_made_again(tmp_path: Path) -> None:
    from llmft.export import gguf
    from tests.export.test_gguf import made

    source = made(tmp_path / "model", "llama", dtype=torch.float16)
    gguf.convert(source, tmp_path / "model.gguf", "f16")
    directory = as_directory(tmp_path / "model.gguf")
    assert as_directory(tmp_path / "model.gguf") == directory
    before, after = (load_file(folder / "model.safetensors") for folder in (source, directory))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    gguf.convert(directory, tmp_path / "again.gguf", "f16")
    assert (tmp_path / "again.gguf").stat().st_size > 0


def test_a_file_that_is_none_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"model\.path=.*: No such file"):
        as_directory(path)
    path.write_bytes(b"PK" * 100)
    with pytest.raises(ConfigError, match="not a GGUF file"):
        as_directory(path)
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ConfigError, match="transformers cannot read it"):
        as_directory(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "llmft\[gguf\]"'):
        as_directory(path)
