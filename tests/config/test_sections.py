"""Configs: every option composes, values are typed, and values out of range are refused with their key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmft.config.convert import canonical, from_plain, key_fields, schema_fields, to_plain
from llmft.config.fields import seconds_of
from llmft.config.model import LoraConfig, Precision, QuantizationFormat
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing, rows_or_tokens
from llmft.core.errors import ConfigError
from llmft.data.prompt import PromptFormat
from tests.conftest import ROOT, compose

CONF = ROOT / "conf"
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in {"experiment", "pipeline"}
)
NEEDS = {
    ("model", "local"): ["model.path=somewhere"],
    ("lora", "none"): ["quantization=none"],
    **{("task", name): ["task.judges=llmft.metrics.rewards.exact_answer"] for name in ("grpo", "rloo", "ppo")},
}


def needs(group: str, option: str) -> list[str]:
    """The overrides that an option requires."""
    extra = list(NEEDS.get((group, option), []))
    text = (CONF / group / f"{option}.yaml").read_text()
    if (group == "data" and "\nhub: " not in text and "\nsource: llmft" not in text) or option == "base":
        extra.append("data.files=rows.jsonl")
    if "requires_remote_code: true" in text:
        extra += ["model.trust_remote_code=true", f"model.revision={'0' * 40}"]
    return extra


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    unsupported = "\nunsupported: " in (text := (CONF / group / f"{option}.yaml").read_text()) and (
        "\nunsupported: null" not in text
    )
    if unsupported:
        with pytest.raises(ConfigError, match="cannot be trained"):
            compose(f"{group}={option}", *needs(group, option))
        return
    config = compose(f"{group}={option}", *needs(group, option))
    assert isinstance(config, TrainConfig)
    if group == "prompt" and config.prompt.template:
        PromptFormat(config.prompt)


def test_experiment_values_win_over_groups_and_the_command_line_over_both() -> None:
    assert compose("experiment=pretrain_tiny").quantization.format is QuantizationFormat.none
    assert compose("experiment=pretrain_tiny", "learning_rate.peak=0.5").learning_rate.peak == 0.5


def test_a_model_brings_the_prompt_it_was_tuned_with_and_prompt_overrides_it() -> None:
    assert compose("model=mistral").prompt.name == "mistral"
    assert compose("model=mistral", "prompt=chatml").prompt.name == "chatml"


def test_mistral_composes_the_real_thing() -> None:
    config = compose("model=mistral", "lora.r=4")
    assert config.model.id == "mistralai/Mistral-7B-Instruct-v0.1"
    assert config.quantization.format is QuantizationFormat.nf4
    assert config.quantization.double_quant
    assert config.lora.r == 4
    assert config.lora.targets == "all-linear"
    assert config.trainer.gradient_checkpointing is Checkpointing.auto
    assert config.trainer.precision is Precision.auto


@pytest.mark.parametrize(
    ("written", "level"), [("true", "full"), ("false", "none"), ("none", "none"), ("selective", "full")]
)
@pytest.mark.filterwarnings("ignore:trainer.gradient_checkpointing=selective is gone")
def test_gradient_checkpointing_is_a_level_or_yes_or_no(written: str, level: str) -> None:
    config = compose(f"trainer.gradient_checkpointing={written}")
    assert config.trainer.gradient_checkpointing is Checkpointing(level)
    again = from_plain(to_plain(config), TrainConfig)
    assert again.trainer.gradient_checkpointing is Checkpointing(level)


def test_the_micro_batch_is_rows_tokens_or_auto() -> None:
    values = [rows_or_tokens(compose(f"trainer.micro_batch={value}").trainer.micro_batch) for value in ("auto", "3")]
    assert values == [(None, None), (3, None)]
    assert rows_or_tokens(compose("trainer.micro_batch=4096tokens").trainer.micro_batch) == (None, 4096)
    assert rows_or_tokens("4096 tokens") == (None, 4096)
    for value in ("0", "-1", "1.5", "true", "many", "0tokens"):
        with pytest.raises(ConfigError, match=r"trainer.micro_batch=.*: a number of rows, a number of tokens"):
            compose(f"trainer.micro_batch={value}")


def test_open_dictionaries_take_new_keys_and_typed_ones_do_not() -> None:
    assert compose("model.init=random", "model.overrides.hidden_size=64").model.overrides == {"hidden_size": 64}
    assert schema_fields(TrainConfig)["model.overrides"].startswith("dict[")
    assert "lora.r" in schema_fields(TrainConfig)


@pytest.mark.parametrize(
    "values", [{"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"alpha": 0.0}, {"targets": []}, {"targets": 3}]
)
def test_lora_refuses_values_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="lora"):
        LoraConfig(**values)  # type: ignore[arg-type]


def test_what_cannot_change_numbers_is_not_part_of_them() -> None:
    config = compose()
    moved = compose(
        "logger=none", "output_dir=elsewhere", "progress=false", "tags=[a]", "notes=why", "name=x", "force=true"
    )
    smaller = compose(
        "trainer.micro_batch=2", "trainer.gradient_checkpointing=full", "trainer.keep_checkpoints=7", "trainer=cpu"
    )
    assert canonical(key_fields(config)) == canonical(key_fields(moved)) == canonical(key_fields(smaller))
    for override in ("seed=1", "lora.r=4", "learning_rate.peak=1", "trainer.batch_size=8", "data.split_seed=1"):
        assert canonical(key_fields(compose(override))) != canonical(key_fields(config)), override


def test_plain_values_are_json_ready() -> None:
    assert to_plain(compose())["quantization"] == {
        "format": "nf4",
        "double_quant": True,
        "cache": True,
        "cache_gib": 50.0,
    }


def test_every_value_that_a_user_may_set_stands_below_a_comment_in_its_paragraph() -> None:
    unexplained = []
    for path in sorted(CONF.rglob("*.yaml")):
        explain_error, inside = False, ""
        for line in path.read_text().splitlines():
            key = re.match(r"(\s*)([a-z]\w*):", line)
            if key is not None and not key[1]:
                inside = key[2]
            explain_error = bool(line.strip()) and (explain_error or "#" in line)
            if key is not None and not explain_error and inside not in ("hydra", "defaults") and not line.endswith(":"):
                unexplained.append(f"{path.relative_to(CONF)}: {key[2]}")
    assert not unexplained


def test_configs_lie_beside_the_package() -> None:
    from llmft.config.overrides import config_directory

    assert config_directory() == Path(CONF)


@pytest.mark.parametrize(
    ("text", "seconds"), [("11h30m", 41400), ("90m", 5400), ("45s", 45), ("1d12h", 129600), ("7", 7)]
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert seconds_of(text, "sweep.time_limit") == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5s", "h", "30m1h"])
def test_a_duration_that_is_none_names_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.time_limit"):
        seconds_of(text, "sweep.time_limit")


@pytest.mark.parametrize(
    "overrides", [[], ["model=mistral"], ["trainer=fsdp", "lora.targets=[q_proj]", "data.limit=7"]]
)
def test_a_config_survives_the_way_to_plain_values_and_back(overrides: list[str]) -> None:
    config = compose(*overrides)
    plain = json.loads(json.dumps(to_plain(config)))
    assert from_plain(plain, TrainConfig) == config
