"""Every experiment's first line is a command that runs; the model is a tiny twin of its architecture."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from llmft.core.errors import ConfigError
from llmft.train import train
from tests.conftest import ROOT, compose, run_directory
from tests.model.twins import TWINS

EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
TRAINED = [path for path in EXPERIMENTS if path.stem != "pretrain_tiny"]  # makes the packaged base, in minutes


def command(path: Path) -> list[str]:
    """The overrides of the command in the file's second line, of a sweep the first trial's."""
    line = path.read_text().splitlines()[1]
    assert line.startswith("# python -m llmft "), f"{path.name} begins with its command"
    arguments = shlex.split(line.removeprefix("# "))[3:]
    return [re.sub(r",.*", "", argument) for argument in arguments if not argument.startswith("-")]


def rows(path: Path) -> Path:
    """Rows with the columns of every experiment, in two classes with different words."""
    names = ["id", "Question", "Response", "target", "original_text", "rewrite_prompt", "rewritten_text"]
    names += ["instruction", "output", "input", "chosen", "rejected", "degree"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for n in range(40):
            word = ("cat", "dog")[n % 2]
            answer = f"The {word} sat {n} times."
            writer.writerow(
                [
                    n,
                    f"How often {n // 2}?",
                    answer,
                    n % 2,
                    f"A {word} {n}.",
                    "Shout",
                    f"A {n} {word}!",
                    answer,
                    word,
                    "",
                    answer,
                    f"No {word}.",
                    ("better", "unsure")[n % 2],
                ]
            )
    return path


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_command_in_an_experiments_first_line_composes(path: Path) -> None:
    assert compose(*command(path)).trainer.batch_size >= 1


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder of random word vectors alone."""
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def tiny_encoder(folder: Path) -> Path:
    """A directory of sentence-transformers around a tiny random BERT."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "dog", "ran", "shout", "a", "prompt"]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    bert = models.Transformer(str(folder / "bert"))
    pooling = models.Pooling(bert.get_word_embedding_dimension())
    SentenceTransformer(modules=[bert, pooling], device="cpu").save(str(folder / "sentences"))
    return folder / "sentences"


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_every_experiment_trains_with_a_tiny_twin(path: Path, tmp_path: Path, encoder: Path) -> None:
    file = rows(tmp_path / "train.csv")
    shape: dict[str, Any] = {**TWINS[compose(*command(path)).model.architecture], "vocab_size": 1024}
    small = ", ".join(f"{name}: {json.dumps(value)}" for name, value in shape.items())
    overrides = [argument for argument in command(path) if not argument.startswith("data.files=")]
    options = f"task.metric_options={{sharpened_cosine: {{encoder: '{encoder}'}}}}"
    more = [options] if path.stem == "prompt_recovery" else []
    config = compose(
        *overrides,
        *more,
        f"data.files={file}",
        "data.validation_fraction=0.2",
        "model.init=random",
        f"model.overrides={{{small}}}",
        "trainer.gradient_checkpointing=none",
        "trainer.precision=fp32",
        "trainer.max_steps=2",
        "trainer.threads=1",
        "task.max_new_tokens=4",
        "logger=none",
        "progress=false",
        f"output_dir={tmp_path}",
    )
    train(config, quiet=True)
    status = json.loads((run_directory(tmp_path) / "run.json").read_text())
    assert status["status"] == "done"
    assert config.trainer.monitor in status["result"]["after"]


def test_an_experiment_without_its_file_says_so() -> None:
    with pytest.raises(ConfigError, match=r"data\.files"):
        compose("experiment=predict_the_llm")
