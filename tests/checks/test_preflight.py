"""`python -m llmft.check`: reports what a training would fail on before any weights are loaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import llmft
from llmft.check import check as check_command
from llmft.core.errors import DiskError, UserError
from llmft.train import train
from tests.commands import command
from tests.conftest import compose

SMALL_DATA = ["data.rows={train: 40, validation: 10, test: 6}", "trainer.threads=1"]


def check(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return command("llmft.check", *arguments, cwd=cwd)


def report(*arguments: str, cwd: Path) -> dict[str, Any]:
    result = check(*arguments, "format=json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n} plus one?", "response": f"It is {n + 1}.", **more} for n in range(count)]


def test_the_embedded_example_has_nothing_wrong_and_nothing_is_written(tmp_path: Path) -> None:
    result = check(*SMALL_DATA, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for words in ("learned", "begin tokens", "memory", "steps", "disk", "Zoe"):
        assert words in result.stdout
    assert "error" not in result.stdout
    assert not (tmp_path / "outputs" / "runs").exists()


def test_the_json_form_says_the_same(tmp_path: Path) -> None:
    facts = report(*SMALL_DATA, cwd=tmp_path)
    assert facts["splits"]["train"]["rows"] == facts["splits"]["train"]["ends_trained"] == 40
    assert facts["splits"]["train"]["begin_tokens"] == {"1": 40}
    assert sum(facts["labels"].values()) == 40
    learned = [piece["text"] for piece in facts["rows"][0] if piece["learned"]]
    assert learned
    assert learned[0].endswith("</s>")
    assert facts["needs"]["memory"]["total"] > facts["needs"]["memory"]["base"] > 0
    assert facts["steps"]["total"] == 3


def test_what_is_learned_is_marked_without_colours_too_and_a_head_has_no_tokens_to_learn(tmp_path: Path) -> None:
    assert "### Response:\n«Zoe</s>»\n" in check(*SMALL_DATA, cwd=tmp_path).stdout
    shown = check(*SMALL_DATA, "task=classification", cwd=tmp_path).stdout
    assert "no trained token" not in shown
    assert "longest" in shown


def test_an_unknown_format_and_a_training_mistake_are_answered_alike(tmp_path: Path) -> None:
    assert "did you mean json?" in check("format=jsn", cwd=tmp_path).stderr
    result = check("lora.rr=1", cwd=tmp_path)
    assert result.returncode == 2
    assert "did you mean lora.r?" in result.stderr


def test_an_end_token_that_is_never_trained_stops_check_and_train(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", questions(30))
    template = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    arguments = ["data=prompt_response", f"data.files={rows}", f"prompt.template='{template}'"]
    result = check(*arguments, cwd=tmp_path)
    assert result.returncode == 4
    assert "would not learn to stop" in result.stderr
    trained = command("llmft", *arguments, "logger=none", cwd=tmp_path)
    assert trained.returncode == 4
    assert "would not learn to stop" in trained.stderr


def test_a_doubled_begin_token_stops(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", questions(30))
    template = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% endfor %}"
    )
    result = check("data=prompt_response", f"data.files={rows}", f"prompt.template='{template}'", cwd=tmp_path)
    assert result.returncode == 4
    assert "two begin tokens side by side" in result.stderr


def test_rows_on_both_sides_of_a_split_are_counted_and_too_many_stop(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", questions(30))
    some = write(tmp_path / "some.jsonl", questions(40)[28:])
    most = write(tmp_path / "most.jsonl", questions(31)[20:])
    arguments = ["data=prompt_response", f"data.split_files.train={train}"]
    facts = report(*arguments, f"data.split_files.validation={some}", cwd=tmp_path)
    assert any("2 validation rows (17%) are also in train" in f["message"] for f in facts["findings"])
    result = check(*arguments, f"data.split_files.validation={most}", cwd=tmp_path)
    assert result.returncode == 4
    assert "10 validation rows (91%) are also in train" in result.stderr


def test_a_group_on_both_sides_is_noticed_and_data_group_mends_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n}", "response": f"Answer {answer} to {n}", "n": n}
        for n in range(30)
        for answer in range(4)
    ]
    arguments = ["data=prompt_response", f"data.files={write(tmp_path / 'a.jsonl', rows)}"]
    loose = report(*arguments, cwd=tmp_path)
    assert any(f["key"] == "data.group" and "share their question" in f["message"] for f in loose["findings"])
    grouped = report(*arguments, "data.group=n", cwd=tmp_path)
    assert not any(f["key"] == "data.group" for f in grouped["findings"])


def test_what_the_limits_cut_is_told_with_the_limit_that_would_cut_one_percent(tmp_path: Path) -> None:
    rows = questions(60)
    for row in rows[:12]:
        row["response"] = "long " * 80
    facts = report(
        "data=prompt_response",
        f"data.files={write(tmp_path / 'a.jsonl', rows)}",
        "data.max_tokens=64",
        "data.max_bad_fraction=0.9",
        "data.max_dropped_fraction=0.9",
        cwd=tmp_path,
    )
    limits = facts["limits"]
    assert limits["rows_dropped"] > 5
    assert limits["dropped_by"] == {"data.max_tokens": limits["rows_dropped"]}
    assert limits["answer_share_dropped"] > 0.5
    assert limits["cuts_one_percent"] > 64
    assert sum(count for *_, count in limits["histogram"]) == facts["splits"]["train"]["rows"] + limits["rows_dropped"]


def test_a_format_that_is_not_the_tokenizers_own_is_shown_beside_it(tmp_path: Path) -> None:
    facts = report(*SMALL_DATA, "prompt=chatml", cwd=tmp_path)
    assert any("differs from the tokenizer's chat template" in f["message"] for f in facts["findings"])
    facts = report(*SMALL_DATA, "prompt=plain", cwd=tmp_path)
    assert not any("differs from the tokenizer's" in f["message"] for f in facts["findings"])


def test_rows_longer_than_the_models_positions_are_noticed(tmp_path: Path) -> None:
    rows = questions(30)
    rows[3]["prompt"] = "very " * 400
    files = write(tmp_path / "a.jsonl", rows)
    facts = report("data=prompt_response", f"data.files={files}", cwd=tmp_path)
    assert any("positions of the model" in f["message"] for f in facts["findings"])


def test_special_tokens_in_a_rows_own_text_are_noticed(tmp_path: Path) -> None:
    rows = questions(30)
    rows[0]["prompt"] = rows[1]["prompt"] = "What does </s> mean?"
    facts = report("data=prompt_response", f"data.files={write(tmp_path / 'a.jsonl', rows)}", cwd=tmp_path)
    assert any("spell a special token" in f["message"] for f in facts["findings"])


def test_training_on_everything_is_flagged(tmp_path: Path) -> None:
    facts = report(*SMALL_DATA, "data.train_on=all", cwd=tmp_path)
    assert any(f["key"] == "data.train_on" for f in facts["findings"])
    assert facts["splits"]["train"]["rows"] == 50


@pytest.mark.parametrize("name", ["dolly_hhrlhf_1k.jsonl"])
def test_a_real_file_is_checked(shared_data: Path, tmp_path: Path, name: str) -> None:
    files = f"data.files={shared_data}/instruction/{name}"
    facts = report("data=prompt_response", files, "data.max_dropped_fraction=0.05", cwd=tmp_path)
    assert facts["splits"]["train"]["rows"] > 800
    assert facts["seconds"] < 60


# ------------------------------------------------------------------------------- what training refuses, check refuses

HERE = ["trainer.max_steps=1", *SMALL_DATA]
SHORT_GPT2 = [
    *("model.init=random", "model.path=null", "model.architecture=gpt2"),
    "model.config={n_positions: 40, n_embd: 32, n_layer: 1, n_head: 2, vocab_size: 1024}",
]
COSINE = "task.metrics=[llmft.metrics.text.sharpened_cosine]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.targets=[q_prj]"], "Target modules {'q_prj'} not found"),
        (["lora.targets=[input_layernorm]"], "LlamaRMSNorm"),
        (["lora.modules_to_save=[lm_hed]"], "did you mean lm_head"),
        (["trainer.strategy=nonsense"], "invalid strategy name"),
        (["trainer.strategy=ddp", "trainer.devices=[0,1]"], "CPUAccelerator"),
        (["trainer.devices=4096"], "this machine has"),
        (["trainer.precision=fp16"], "does not compute in fp16"),
        (["trainer.accelerator=tpu"], "no such device"),
        (["trainer.monitor=val/exact_mach"], "did you mean val/exact_match"),
        (["quantization=int8", "lora.dora=true"], "8-bit base's scales"),
        (["optimizer.momentom=1"], "takes no such argument"),
        (["trainer.callbacks={a: {_target_: lightning.pytorch.callbacks.Timmer}}"], "did you mean Timer"),
        (["logger=csv", "logger.loggers.csv.flush=1"], "takes no such argument"),
        (
            [COSINE, "task.metric_options.sharpened_cosine.encoder=nobody/knows"],
            r"set task\.metric_options\.sharpened_",
        ),
        ([COSINE, "task.metric_options.sharpened_cosine.encoder=EMPTY"], "not a sentence-transformers model"),
        (SHORT_GPT2, "more than the 40 positions of the model"),
        (["model.path=SMALLER"], "the model knows only 300"),
        (["model.path=CUT_OFF"], "damaged or cut off"),
        (["model=deberta_v3_small", "model.init=random", "quantization=none"], "is an encoder and writes no text"),
        (["output_dir=FILE"], "there is a file in the way"),
    ],
)
def test_what_training_refuses_before_its_weights_check_refuses_in_the_same_words(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Path(llmft.__file__).parent / "assets" / "tiny"
    for name in ("SMALLER", "CUT_OFF"):
        shutil.copytree(tiny, tmp_path / name)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    config = tmp_path / "SMALLER" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 300}))
    weights = tmp_path / "CUT_OFF" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    overrides = [re.sub(r"=(SMALLER|CUT_OFF|EMPTY|FILE)$", rf"={tmp_path}/\1", argument) for argument in arguments]
    logger = [] if any(each.startswith("logger") for each in overrides) else ["logger=none"]
    output = [] if any(each.startswith("output_dir") for each in overrides) else [f"output_dir={tmp_path}/outputs"]

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("llmft.model.assemble.load_base", loaded)
    messages = []
    for run in (check_command, lambda config: train(config, quiet=True)):
        with pytest.raises(UserError, match=message) as error:
            run(compose(*HERE, *logger, *output, *overrides))
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


def test_a_disk_too_full_is_told_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr("llmft.core.files.shutil.disk_usage", lambda _: usage)
    messages = []
    for run in (check_command, lambda config: train(config, quiet=True)):
        with pytest.raises(DiskError, match=r"lower trainer\.keep_checkpoints=2") as error:
            run(compose(*HERE, "logger=none", f"output_dir={tmp_path}"))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "opt", "biogpt", "deberta-v2", "llama"])
def test_the_positions_of_a_family_are_those_its_table_has(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from llmft.model.families import positions

    config = AutoConfig.for_model(kind, num_labels=2, num_hidden_layers=1, pad_token_id=1)
    count, learned = positions(config)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    tables = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding) and ("pos" in n or "wpe" in n)]
    assert learned == bool(tables)
    offset = {"roberta": 2, "opt": 2, "biogpt": 2}.get(kind, 0)
    assert not tables or count == tables[0].num_embeddings - offset


def test_check_says_which_columns_are_read_and_which_are_not(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", questions(30, url="u", meta={"system": "Be brief.", "by": "me"}))
    arguments = [f"data.files={rows}", "data.columns.prompt=prompt", "data.columns.response=response"]
    facts = report("data=alpaca", *arguments, "data.columns.system=meta.system", cwd=tmp_path)
    assert facts["columns"] == {
        "read": {"prompt": ["prompt"], "response": ["response"], "meta.system": ["system"]},
        "not_read": ["url"],
        "left_out": ["input"],
    }
    result = check("data=alpaca", *arguments, cwd=tmp_path)
    shown = "read: prompt (prompt), response (response); not read: url, meta; optional and missing: input"
    assert shown in " ".join(result.stdout.split())
    result = check("data=alpaca", *arguments, "data.columns.input=contxt", cwd=tmp_path)
    assert result.returncode == 4
    assert "data.columns.input: no column 'contxt'" in result.stderr


def test_labels_that_are_nearly_all_the_same_and_empty_answers_are_noticed(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Is {n} even?"}, {"role": "assistant", "content": f"{n}: yes"}],
             "label": n != 3} for n in range(40)]  # fmt: skip
    file = f"data.files={write(tmp_path / 'labels.jsonl', rows)}"
    arguments = ["task=kto", "data=preference_labels", file, "data.validation_fraction=0.1"]
    facts = report(*arguments, cwd=tmp_path)
    assert facts["labels"] == {"good": 35, "bad": 1}
    (message,) = (f["message"] for f in facts["findings"] if f["key"] == "task.loss_options")
    assert "35 of the training answers are good and 1 bad; task.loss_options.undesirable=35" in message
    assert [piece["good"] for piece in facts["rows"][0] if piece["learned"]] == [True]
    balanced = report(*arguments, "task.loss_options.undesirable=35", cwd=tmp_path)
    assert "task.loss_options" not in {f["key"] for f in balanced["findings"]}
    pairs = [{"prompt": f"What is {n}?", "chosen": f"a {n}" if n else " ", "rejected": f"b {n}"} for n in range(40)]
    file = f"data.files={write(tmp_path / 'pairs.jsonl', pairs)}"
    facts = report("task=dpo", "data=preference", file, cwd=tmp_path)
    messages = [f["message"] for f in facts["findings"]]
    assert any("1 of 40 rows compare an empty answer" in message for message in messages)
