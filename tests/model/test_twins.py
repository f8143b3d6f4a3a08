"""Every architecture in conf/model, as a tiny random twin: 4-bit, LoRA, one step, and back from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmft.config.model import LoraConfig, ModelConfig, ModelInit, QuantizationConfig, QuantizationFormat
from llmft.data.batch import MicroBatch
from llmft.data.hub import Located, locate
from llmft.model import adapters
from llmft.model.load import drop_base, load_base
from llmft.model.quantization import weight_counts
from llmft.training.objectives.classification import Classification
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.conftest import ROOT
from tests.model.twins import TWINS

FILES = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))
    if path.stem not in {"tiny", "local", "tfidf"}  # not causal or masked language models
}
RUNNABLE = {name: file for name, file in FILES.items() if not file["requires_remote_code"] and not file["unsupported"]}
# One file per architecture runs all steps; the others differ from it in ids and prompts.
FIRST = {file["architecture"]: name for name, file in reversed(RUNNABLE.items())}
CORE = ("mistral", "llama", "gpt2", "gemma3_text", "mixtral", "falcon", "deberta-v2")
EACH = [pytest.param(name, marks=() if name in CORE else pytest.mark.slow) for name in sorted(FIRST)]


def classifies(file: dict[str, Any]) -> bool:
    return file["architecture"].startswith("deberta")


def twin(name: str, **overrides: Any) -> ModelConfig:
    file = FILES[name]
    return ModelConfig(
        name=name,
        id=file["id"],
        init=ModelInit.random,
        architecture=file["architecture"],
        config=file["config"] or {},
        load_overrides=file["load_overrides"] or {},
        skip_modules=file["skip_modules"] or [],
        overrides={**TWINS[file["architecture"]], **overrides},
    )


def load(model: ModelConfig, located: Located, file: dict[str, Any], form: str = "nf4") -> Any:
    return load_base(
        model,
        located,
        QuantizationConfig(QuantizationFormat(form)),
        auto_class="sequence_classification" if classifies(file) else "causal_lm",
        num_labels=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=1,
        keep_base=False,
    )


def batch() -> MicroBatch:
    ids = torch.randint(5, 500, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.clone()
    labels[:, :6] = -100
    labels[mask == 0] = -100
    return MicroBatch(ids, mask, labels, torch.ones(3), torch.tensor([0, 1, 2]), [0, 1, 2])


def logits(model: Any, file: dict[str, Any]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        scores = model(input_ids=batch().input_ids, attention_mask=batch().attention_mask).logits
    return scores if classifies(file) else scores[batch().attention_mask.bool()]


@pytest.mark.parametrize("architecture", EACH)
def test_a_twin_is_quantised_trained_saved_and_loaded_with_equal_logits(architecture: str, tmp_path: Path) -> None:
    name = FIRST[architecture]
    file = FILES[name]
    torch.manual_seed(0)
    base = load(twin(name), Located(None, "random"), file)
    base.config.pad_token_id = 0
    untouched = logits(base, file)
    auto_class = "sequence_classification" if classifies(file) else "causal_lm"
    model = adapters.attach(base, LoraConfig(r=4), auto_class=auto_class, seed=3, name=str(tmp_path))
    assert torch.equal(logits(model, file), untouched) or classifies(file), "a fresh LoRA changes nothing"
    objective = Classification() if classifies(file) else LanguageModeling()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    losses = objective.losses(model, batch())
    losses.nll.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    trained = logits(model, file)
    assert not torch.equal(trained, untouched)

    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    import peft

    again = load(twin(name), Located(None, "random"), file)
    again.config.pad_token_id = 0
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(loaded, file), trained)


@pytest.mark.parametrize("architecture", EACH)
def test_all_weights_but_embeddings_head_and_norms_are_4_bit_both_ways(architecture: str, tmp_path: Path) -> None:
    name = FIRST[architecture]
    file = FILES[name]
    model = twin(name)
    plain = load(model, Located(None, "random"), file, "none")
    plain.save_pretrained(tmp_path)
    skipped = [*file["skip_modules"], "lm_head", "classifier", "score"]
    expected = sum(
        parameter.numel()
        for key, parameter in plain.named_parameters()
        if parameter.ndim >= 2
        and not any(part in key for part in skipped)
        and not isinstance(plain.get_submodule(key.rpartition(".")[0]), torch.nn.Embedding)
        and "router" not in key
        and ".gate.weight" not in key
    )
    in_place = load(model, Located(None, "random"), file)
    assert weight_counts(in_place)["4-bit"] == expected
    model.init, model.path, model.overrides = ModelInit.pretrained, str(tmp_path), {}
    streamed = load(model, locate(model), file)
    assert weight_counts(streamed)["4-bit"] == expected
    streamed.config.pad_token_id = in_place.config.pad_token_id = 0
    assert torch.equal(logits(streamed, file), logits(in_place, file))


@pytest.mark.parametrize("architecture", ["mistral", "gpt2", "falcon"])
def test_int8_quantises_too(architecture: str) -> None:
    name = FIRST[architecture]
    base = load(twin(name), Located(None, "random"), FILES[name], "int8")
    assert weight_counts(base)["8-bit"] > 0
    assert torch.isfinite(logits(base, FILES[name])).all()


def test_every_architecture_has_a_twin_and_every_file_a_known_one() -> None:
    assert {file["architecture"] for file in RUNNABLE.values()} == set(TWINS)


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_every_file_describes_a_model_that_builds(name: str) -> None:
    import transformers

    file = FILES[name]
    config = transformers.AutoConfig.for_model(file["architecture"], **(file["config"] or {}))
    auto = transformers.AutoModelForSequenceClassification if classifies(file) else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert sum(p.numel() for p in model.parameters()) > 5e7


def test_a_validation_leaves_the_quantised_weights_as_they_were() -> None:
    name = FIRST["mistral"]
    base = load(twin(name), Located(None, "random"), FILES[name])
    before = {key: value.clone() for key, value in base.state_dict().items()}
    logits(base, FILES[name])
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    drop_base()


def test_a_mixtures_router_and_experts_are_not_adapted() -> None:
    name = FIRST["mixtral"]
    base = load(twin(name), Located(None, "random"), FILES[name])
    model = adapters.attach(base, LoraConfig(r=2), auto_class="causal_lm", seed=0, name="x")
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
