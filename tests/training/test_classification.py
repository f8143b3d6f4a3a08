"""Heads: the last real token, full precision, saved and loaded completely, and no state carried between runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llmft.config.model import LoraConfig
from llmft.config.task import TaskType
from llmft.data.batch import MicroBatch, collate
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example
from llmft.data.targets import Targets
from llmft.model import adapters
from llmft.model.heads import FullPrecisionLinear, linear_scores, renew_head
from llmft.runs.predictions import Predictions
from llmft.train import train
from llmft.training.objectives.classification import Classification
from llmft.training.objectives.verbalizer import LabelWordScorer, trie_nodes
from tests.conftest import SMALL, compose, run_directory

CLASSIFY = ["task=classification", "task.generate_rows=0"]
EOS = 2
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=EOS, eos_token_id=EOS, num_labels=5,
)  # fmt: skip


def batch_of(rows: list[list[int]], answers: int = 0) -> MicroBatch:
    examples = []
    for number, ids in enumerate(rows):
        labels = [IGNORE] * (len(ids) - answers) + ids[len(ids) - answers :]
        examples.append(Example(ids, labels, Conversation([], f"f:{number}", number % 5)))
    return collate(examples, range(len(rows)), EOS)


def random_rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (9, 4, 7, 2)]


def test_a_decoders_head_reads_the_last_real_token_also_when_padding_is_the_end_token() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(CONFIG).eval()
    rows = [[*row, EOS] for row in random_rows()]
    with torch.no_grad():
        together = linear_scores(model, batch_of(rows))
        theirs = model(input_ids=batch_of(rows).input_ids, attention_mask=batch_of(rows).attention_mask).logits
        for index, row in enumerate(rows):
            hidden = model.model(input_ids=torch.tensor([row])).last_hidden_state[:, -1]
            torch.testing.assert_close(together[index : index + 1], model.score(hidden), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(together, theirs, atol=1e-3), "transformers takes the token before, so the test can fail"


def test_the_head_computes_in_full_precision_under_autocast() -> None:
    layer = FullPrecisionLinear(32, 5)
    states = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer(states.bfloat16())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, F.linear(states.bfloat16().float(), layer.weight, layer.bias))


def test_a_new_head_depends_on_its_seed_alone() -> None:
    model = LlamaForSequenceClassification(CONFIG)
    heads = []
    for seed in (1, 2, 1):
        renew_head(model, seed)
        heads.append(model.score.weight.clone())
        with torch.no_grad():
            model.score.weight.add_(1.0)
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


def word_model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def log_chance(model: Any, prompt: list[int], token: int, among: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    return float(logits[token] - logits[among].logsumexp(dim=0))


def test_one_token_words_have_the_softmax_of_their_log_probabilities() -> None:
    model, words = word_model(), [(10, EOS), (11, EOS), (12, EOS)]
    rows = [[*row, 10, EOS] for row in random_rows()]
    with torch.no_grad():
        scores = LabelWordScorer(words)(model, batch_of(rows, answers=2))
    for index, row in enumerate(rows):
        expected = [log_chance(model, row[:-2], word[0], [10, 11, 12]) for word in words]
        assert scores[index].tolist() == pytest.approx(expected, abs=1e-4)


def test_longer_words_have_the_product_along_their_way_whatever_word_the_row_came_with() -> None:
    model, words = word_model(), [(10, 20, EOS), (10, 21, EOS), (11, EOS), (10, 20, 22, EOS)]
    prompts = random_rows()
    with torch.no_grad():
        scores = [
            LabelWordScorer(words)(model, batch_of([[*row, *word] for row in prompts], answers=len(word)))
            for word in words
        ]
    for other in scores[1:]:
        torch.testing.assert_close(scores[0], other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0].exp().sum(dim=1), torch.ones(len(prompts)))
    for index, row in enumerate(prompts):
        first = {token: log_chance(model, row, token, [10, 11]) for token in (10, 11)}
        second = {token: log_chance(model, [*row, 10], token, [20, 21]) for token in (20, 21)}
        third = {token: log_chance(model, [*row, 10, 20], token, [EOS, 22]) for token in (EOS, 22)}
        expected = [first[10] + second[20] + third[EOS], first[10] + second[21], first[11]]
        assert scores[0][index].tolist() == pytest.approx([*expected, first[10] + second[20] + third[22]], abs=1e-4)


def test_words_that_tokens_do_not_tell_apart_are_refused() -> None:
    for words in permutations([(10,), (10, 11), (12,)]):
        with pytest.raises(ValueError, match="beginning of the other"):
            trie_nodes(words)
    with pytest.raises(ValueError, match="the same"):
        trie_nodes([(10,), (10,)])


def scores_of(values: torch.Tensor) -> Callable[[Any, MicroBatch], torch.Tensor]:
    return lambda model, batch: values


def test_losses_are_those_of_torch_with_smoothing_in_training_alone() -> None:
    values, batch = torch.randn(4, 5), batch_of(random_rows())
    assert batch.targets is not None
    objective = Classification(Targets(), scores_of(values), label_smoothing=0.2)
    expected = F.cross_entropy(values, batch.targets, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(objective.losses(None, batch).nll, expected)
    plain = objective.evaluate(None, batch)
    torch.testing.assert_close(plain.nll, F.cross_entropy(values.double(), batch.targets, reduction="none"))
    assert plain.outputs is not None
    torch.testing.assert_close(plain.outputs, values.double().softmax(dim=-1))


def test_several_classes_are_a_mean_of_binary_losses_and_numbers_half_a_squared_error() -> None:
    values, batch = torch.randn(4, 5), batch_of(random_rows())
    batch.targets = torch.tensor(np.eye(5)[:4] + np.eye(5)[1:5]).long()
    evaluated = Classification(Targets(TaskType.multi_label, list("abcde")), scores_of(values)).evaluate(None, batch)
    expected = F.binary_cross_entropy(values.double().sigmoid(), batch.targets.double(), reduction="none").mean(dim=1)
    torch.testing.assert_close(evaluated.nll, expected)
    batch.targets = torch.tensor([10.0, 14.0, 6.0, 10.0])
    numbers = Classification(Targets(TaskType.regression, ["y"], mean=10.0, scale=4.0), scores_of(torch.zeros(4, 1)))
    evaluated = numbers.evaluate(None, batch)
    assert evaluated.nll.tolist() == pytest.approx([0, 0.5, 0.5, 0])
    assert evaluated.outputs is not None
    assert evaluated.outputs[:, 0].tolist() == [10.0] * 4


def test_an_encoders_pooler_and_classifier_stay_unquantised_are_trained_and_saved(tmp_path: Path) -> None:
    """Also for a model directory that no file in conf/model describes."""
    from llmft.config.model import ModelConfig, ModelInit, QuantizationConfig
    from llmft.data.hub import Located
    from llmft.model.load import load_base
    from tests.model.twins import TWINS

    twin = {"init": ModelInit.random, "architecture": "deberta-v2", "config": TWINS["deberta-v2"]}
    base = load_base(
        ModelConfig(name="x", id="x", **twin),
        Located(None, "random"),
        QuantizationConfig(),
        auto_class="sequence_classification",
        num_labels=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=0,
        keep_base=False,
    )
    assert type(base.pooler.dense) is type(base.classifier) is torch.nn.Linear
    assert any("Linear4bit" in type(module).__name__ for module in base.modules())
    renew_head(base, 3)
    attached = adapters.attach(base, LoraConfig(r=2), auto_class="sequence_classification", seed=1, name="x")
    trained = {name for name, parameter in attached.named_parameters() if parameter.requires_grad}
    for part in ("pooler.modules_to_save.default.dense", "classifier.modules_to_save.default"):
        assert any(part in name for name in trained)
    assert not any("lora" in name and "pooler" in name for name in trained)
    attached.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition("model.")[2] for name in saved if "lora" not in name} == {
        "pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip


def weights(root: Path) -> bytes:
    return (run_directory(root) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_kept_base_carries_no_head_from_one_run_to_the_next(tmp_path: Path) -> None:
    from llmft.model.load import _kept, drop_base

    drop_base()
    train(compose(*SMALL, *CLASSIFY, f"output_dir={tmp_path}/first", "seed=7", "lora.r=4"), quiet=True)
    assert _kept.model is not None, "the base stays"
    train(compose(*SMALL, *CLASSIFY, f"output_dir={tmp_path}/after"), quiet=True)
    drop_base()
    train(compose(*SMALL, *CLASSIFY, f"output_dir={tmp_path}/alone"), quiet=True)
    assert weights(tmp_path / "after") == weights(tmp_path / "alone")


def test_a_run_keeps_its_validation_predictions_and_their_logloss_is_the_one_it_reports(
    small: Callable[..., Any], tmp_path: Path
) -> None:
    from sklearn.metrics import log_loss

    monitored = train(small(*CLASSIFY, "data.rows.test=9", "trainer.monitor=val/logloss"), quiet=True)
    for name, rows in (("val", 12), ("test", 9)):
        predictions = Predictions.load(run_directory(tmp_path) / "predictions" / name)
        assert len(predictions.ids) == len(set(predictions.ids)) == rows
        assert predictions.labels == ["Ann", "Ben", "Eve", "Max", "Sue", "Tom", "Zoe"]
        logloss = log_loss(predictions.references(), predictions.values, labels=range(7))
        assert np.mean(predictions.columns["loss_nats"]) == pytest.approx(logloss, abs=1e-9)
        if name == "val":
            assert monitored == pytest.approx(logloss, abs=1e-9)


@pytest.mark.slow
def test_training_on_all_rows_leaves_validation_blank_and_hands_over_the_last_weights(
    small: Callable[..., Any], tmp_path: Path
) -> None:
    import json

    assert train(small(*CLASSIFY, "data.train_on=all", "trainer.patience=1"), quiet=True) is None
    directory = run_directory(tmp_path)
    status = json.loads((directory / "run.json").read_text())["result"]
    assert status["step"] == status["steps"] == 4
    assert {value for name, value in status["after"].items() if name.startswith("val/")} == {None}
    assert not (directory / "predictions" / "val").exists()
    assert not list((directory / "row_losses").glob("val-*"))


@pytest.mark.slow
def test_plain_peft_and_transformers_load_the_head(small: Callable[..., Any], tmp_path: Path) -> None:
    """An independent loader gets the probabilities that the run wrote."""
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    train(small(*CLASSIFY, "quantization=none"), quiet=True)
    directory = run_directory(tmp_path)
    predictions = Predictions.load(directory / "predictions" / "val")
    base = AutoModelForSequenceClassification.from_pretrained(
        peft.PeftConfig.from_pretrained(directory / "adapter").base_model_name_or_path,
        num_labels=7,
        dtype=torch.float32,
    )
    model = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "adapter")
    from llmft.data.synthetic import writers

    rows = list(writers("validation", 12, 0))
    for index, row in enumerate(rows):
        messages = [{"role": "user", "content": f"Who wrote this text?\n\n{row['text']}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            hidden = model.base_model.model.model(**{k: ids[k] for k in ("input_ids", "attention_mask")})[0][:, -1]
            chance = model.base_model.model.score(hidden).double().softmax(dim=-1)[0]
        assert chance.tolist() == pytest.approx(predictions.values[index].tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_classify_as_one(tmp_path: Path, trainer: str) -> None:
    from tests.conftest import llmft

    arguments = [*SMALL, *CLASSIFY, "trainer.batch_size=6", "trainer.micro_batch=2"]
    other = ["trainer.accelerator=cpu", f"trainer={trainer}"]
    for name, more in (("one", []), ("two", other)):
        result = llmft(*arguments, *more, f"output_dir={tmp_path}/{name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, two = (Predictions.load(run_directory(tmp_path / n) / "predictions" / "val") for n in ("one", "two"))
    assert one.ids == two.ids
    np.testing.assert_allclose(one.values, two.values, rtol=1e-4, atol=1e-6)
