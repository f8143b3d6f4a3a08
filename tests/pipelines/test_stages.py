"""A chain is checked before it runs; stages refer to earlier ones, whose outputs enter their overrides."""

import numpy as np
import pytest

import llmft.pipeline  # noqa: F401  (knows what ${stage:…} is)
from llmft.config.commands import PipelineConfig, StageConfig
from llmft.config.hydra_app import explain
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.pipelines.report import PolicyAnswers, gain, verdict
from llmft.pipelines.run import run_pipeline
from llmft.pipelines.stages import stages_of
from tests.conftest import compose


def chain(tmp_path, **stages):
    configs = {name: StageConfig(**stage) if stage is not None else None for name, stage in stages.items()}
    return PipelineConfig(name="test", stages=configs, output_dir=str(tmp_path))


def test_a_stage_needs_what_its_overrides_name(tmp_path):
    config = chain(
        tmp_path,
        sft={"overrides": ["data=writers", "seed=1"]},
        samples={"command": "sample", "overrides": ["run=${stage:sft}"]},
        last={"overrides": ["data.files=${stage:samples}/best.jsonl", "lora.r=${stage:sft}"]},
    )
    stages = stages_of(config)
    assert [stage.needs for stage in stages] == [(), ("sft",), ("samples", "sft")]
    assert stages[1].arguments({"sft": "A"}) == ["run=A"]
    assert stages[2].arguments({"sft": "A", "samples": "B"})[-2:] == ["data.files=B/best.jsonl", "lora.r=A"]


def test_a_stages_own_overrides_come_before_those_of_all_trainings(tmp_path):
    config = chain(tmp_path, a={"overrides": ["lora.r=4"]}, b={"command": "sample", "overrides": ["run=x"]})
    config.training = ["lora.r=2", "seed=3"]
    first, second = stages_of(config)
    assert first.overrides == ("seed=3", f"output_dir={tmp_path}", "lora.r=4")
    assert second.overrides == ("run=x",)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "stages: none"),
        ({"a": {"overrides": ["run=${stage:b}"]}, "b": {}}, "comes later"),
        ({"a": {"overrides": ["run=${stage:nobody}"]}}, "no such stage"),
        ({"a": {"command": "trian"}}, "did you mean train"),
        ({"a": {"command": "pipeline"}}, "no command"),
        ({"a": {"command": "sample", "sweep": True}}, "only trainings can be swept"),
        ({"a b": {}}, "letters, digits"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, stages, message):
    with pytest.raises(ConfigError, match=message):
        stages_of(chain(tmp_path, **stages))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.nope.x=1", "stages.nope: no such key; choose from sft, dpo."),
        ("+stages.nope.command=train", "stages.nope: no such key; choose from sft, dpo."),
        ("stages.dpo.overides=[seed=1]", "stages.dpo.overides: no such key; choose from command, overrides, sweep."),
    ],
)
def test_a_stage_that_is_not_there_is_answered_with_those_that_are(override, message):
    with pytest.raises(Exception) as raised:  # noqa: PT011 (Hydra's own)
        compose("pipeline=sft_dpo", override, verb="pipeline", kind=PipelineConfig)
    assert str(explain(raised.value, PipelineConfig)) == message


def test_a_stages_overrides_may_be_typed_as_those_of_all_trainings_are():
    typed = "stages.dpo.overrides=[data=writers,seed=1]"
    config = compose("pipeline=sft_dpo", typed, verb="pipeline", kind=PipelineConfig)
    assert config.stages["dpo"].overrides == ["data=writers", "seed=1"]


def test_a_mistake_in_the_last_stage_is_told_before_the_first_runs(tmp_path):
    config = chain(tmp_path, a={"overrides": ["data=writers"]}, b={"overrides": ["lora.rr=${stage:a}"]})
    with pytest.raises(ConfigError, match=r"stages.b: lora.rr: no such key; did you mean lora.r"):
        run_pipeline(config, Screen(quiet=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama2", "sft_dpo", "distill", "predict_the_llm"])
def test_ready_chains_can_be_composed(tmp_path, name):
    files = [f"files.{key}={key}.csv" for key in ("train", "test", "template")] if name == "predict_the_llm" else []
    overrides = [f"pipeline={name}", "dry_run=true", f"output_dir={tmp_path}", *files]
    config = compose(*overrides, verb="pipeline", kind=PipelineConfig)
    assert run_pipeline(config, Screen(quiet=True)) is None
    assert not list(tmp_path.iterdir())


def test_a_gain_is_told_from_noise_by_the_prompts_that_both_answered():
    rng = np.random.Generator(np.random.PCG64(0))
    first = rng.random(200)

    def answers(rewards):
        return PolicyAnswers("x", rewards, [""] * len(rewards), [""] * len(rewards))

    clear = gain(answers(first), answers(first + 0.1))
    assert verdict(clear) == "better"
    assert clear["win_rate"] == 1.0
    assert verdict(gain(answers(first), answers(first - 0.1))) == "worse"
    same = gain(answers(first), answers(first))
    assert verdict(same) == "not distinguishable"
    assert same["win_rate"] == 0.5
