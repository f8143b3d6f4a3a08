"""Adapters that PEFT wrote, without a run: merged, used in chat, and refused where their files are inconsistent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmft.chat import chat
from llmft.config.commands import ChatConfig, MergeConfig
from llmft.core.errors import ConfigError
from llmft.export.targets import opened
from llmft.merge import merge
from tests.export.test_gguf import random_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
ODD = {"target_modules": r".*layers\.[01]\.(self_attn\.q_proj|mlp\.down_proj)", "modules_to_save": ["lm_head"],
       "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}, "use_rslora": True}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd adapter, without a tokenizer of its own, on a small base with a chat template."""
    folder = tmp_path_factory.mktemp("theirs")
    base = random_model(folder / "base", "llama")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM", **ODD}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


IDS = torch.tensor([[5, 17, 3, 60, 2, 9, 41, 8]])


def test_an_odd_adapter_is_merged_to_what_peft_computes(adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", dtype=torch.float32)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, adapter)(input_ids=IDS).logits
    (directory,) = merge(MergeConfig(run=str(adapter), accelerator="cpu"), quiet=True)
    assert directory == adapter / "merged"
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        assert plain(input_ids=IDS).logits.sub(expected).abs().max() < 5e-3  # stored in fp16
    facts = json.loads((directory / "llmft.json").read_text())
    assert facts["proof"]["rows"] == "questions, since the training rows no longer exist"
    card = (directory / "README.md").read_text()
    assert "| base | base |" in card
    assert "| seed |" not in card, "which is not known"


def test_an_adapter_can_be_talked_to(adapter: Path) -> None:
    said = chat(ChatConfig(run=str(adapter), message="Hello", accelerator="cpu", max_new_tokens=8), quiet=True)
    assert said is not None
    assert said["adapter"]


def test_a_folder_inside_a_run_means_the_run(two_runs: list[Path]) -> None:
    assert opened(two_runs[0] / "adapter").run.directory == two_runs[0]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"base_model_name_or_path": "nobody/nothing"}, "HF_HUB_OFFLINE is set"),
        ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS; only adapters of language models"),
        ({"peft_type": "IA3"}, "only LORA is supported"),
        ({"rank_pattern": {}}, "PEFT cannot put this adapter on its base"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "an adapter of another model"),
    ],
)
def test_what_cannot_be_taken_is_one_sentence(
    adapter: Path, tmp_path: Path, changed: dict[str, Any], sentence: str
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = copy / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(ConfigError, match=sentence):
        merge(MergeConfig(run=str(copy), accelerator="cpu", force=True), quiet=True)
