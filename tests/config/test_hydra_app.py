"""The command line: mistakes are answered in one sentence, quickly, with the documented exit code."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import command
from tests.conftest import ROOT, llmft

MISTAKES = [
    (["lora.rr=3"], 2, "lora.rr: no such key; did you mean lora.r?"),
    (["modle=mistral"], 2, "modle: no such key; did you mean model?"),
    (["hydra.sweeper.n_trals=5"], 2, "hydra.sweeper.n_trals: no such key; did you mean hydra.sweeper.n_trials?"),
    (["hydra.mod=x"], 2, "hydra.mod: no such key; did you mean hydra.mode?"),
    (["-m", "hydra/sweeper=basic", "seed=0,1"], 2, "hydra/sweeper=basic: choose grid, or optuna for a search."),
    (["lora.r=abc"], 2, "lora.r: Value 'abc' of type 'str' could not be converted to Integer."),
    (["lora.r=-1"], 2, "lora.r=-1: an integer of 1 or more"),
    (["lora.r=0"], 2, "lora=none"),
    (["model=mistrall"], 2, "did you mean model=mistral?"),
    (["+lora.zz=1"], 2, "lora.zz: no such key"),
    (["+nonsense=1"], 2, "nonsense: no such key"),
    (["learning_rate.schedule=cosin"], 2, "expected one of [constant, linear, cosine]"),
    (["learning_rate.peak=fast"], 2, "learning_rate.peak"),
    (["learning_rate.peak=-1"], 2, "learning_rate.peak=-1.0: above 0"),
    (["lora=none"], 2, "lora=none leaves nothing to train"),
    (["lora.r=[1"], 2, "is no override"),
    (["data.columns.promt={question} {context}"], 2, "no such key; did you mean data.columns.prompt?"),
    (["data=alpaca"], 2, "set data.files=FILE"),
    (["data=alpaca", "data.files=nowhere.json"], 2, "data.files=nowhere.json: no such file"),
    (["model.path=nowhere"], 2, "model.path=nowhere: no Hugging Face model directory there"),
    (["model=local"], 2, "model=local needs model.path=DIR"),
    (["model=mistral"], 2, "set model.path=DIR"),
    (["model=btlm_3b_8k"], 2, "cannot be trained"),
    (["model=mistral", "model.requires_remote_code=true"], 2, "model.trust_remote_code=true"),
    (["model=mistral", "model.trust_remote_code=true"], 2, "model.revision as a 40-digit commit"),
    (["model.overrides.hidden_size=64"], 2, "model.init=random"),
    (["prompt=phi2", "prompt.system_role=refuse", "prompt.system=Hi"], 2, "has no place for one"),
    (["trainer.precision=fp16", "trainer.accelerator=cpu"], 2, "a CPU does not compute in fp16"),
    (["quantization=int8", "lora.dora=true", "trainer.accelerator=cpu"], 2, "take quantization=nf4"),
    (["trainer.devices=0"], 2, "trainer.devices=0: 1 or more"),
    (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=999"], 2, "this machine has"),
    (["learning_rate.peak=inf"], 2, "finite"),
    (["lora.modules_to_save=[lm_heed]"], 2, "did you mean lm_head?"),
    (["lora.r=1,8"], 2, "add -m"),
    (["=3"], 2, "cannot be read"),
    (["output_dir=/dev/null/x"], 2, "output_dir"),
    (["data.source=llmft.data.sources.load_rows"], 2, "a function of (split, num_rows, seed, …) was expected"),
    (["model=mixtral", "model.init=random", "model.overrides.hidden_sizee=64"], 2, "did you mean hidden_size?"),
    (["model=gpt2", "model.init=random", "model.overrides={n_embd: 33, n_layer: 1, n_head: 2}"], 2, "cannot be loaded"),
    (["model=deberta_v3_small", "model.init=random"], 2, "set task=classification"),
    (
        ["logger.loggers.csv={_target_: lightning.pytorch.loggers.CSVLogger, name: [{_target_: pathlib.Path}]}"],
        2,
        "arguments are plain data",
    ),
    (["trainer.accelerator=tpu9"], 2, "trainer.accelerator=tpu9"),
    (["optimizer.weight_decy=0.1"], 2, "did you mean weight_decay?"),
    (["optimizer._target_=os.system"], 2, "may be named in a config"),
    (["optimizer._target_=torch.optim.AdamX"], 2, "torch.optim has no AdamX"),
    (["optimizer.lr=1"], 2, "learning_rate.peak"),
    (["optimizer.betas=[1]"], 2, "optimizer: torch.optim.AdamW cannot be built (Invalid beta parameter"),
    (["trainer.callbacks={x: null}"], 2, "trainer.callbacks.x: has no _target_"),
    (["trainer.callbacks={x: [1]}"], 2, "trainer.callbacks.x: has no _target_"),
    (["trainer.callbacks=[x]"], 2, "trainer.callbacks: a dictionary is expected"),
    (["task.metrics=x"], 2, "task.metrics: a list is expected"),
    (["lora.r=1000000000"], 2, "lora.r=1000000000: 65,536 or less"),
    (["lora.r=null"], 2, "lora.r cannot be null"),
    (["lora=${seed}"], 2, "lora=${seed}: the name of one of the group's options is expected"),
    (["lora@x=1"], 2, "lora@x=1: the name of one of the group's options is expected"),
    (["sweep=seeds"], 2, "write +sweep=OPTION"),
    (["trusted_packages=['']"], 2, "'' is not the name of a package"),
    (["--package", "model"], 2, "write --cfg job with it"),
    (["--cfg", "job", "--package", "nope"], 2, "--package: no such key"),
    (["trainer.monitor=val/los"], 2, "did you mean val/loss_nats?"),
    (["data.columns.prompt=quetsion"], 4, "no column 'quetsion'"),
]


ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from llmft.train import main
answers = []
for arguments in json.load(sys.stdin):
    told = io.StringIO()
    code = None
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*arguments, "logger=none", "progress=false"])
        except SystemExit as left:
            code = left.code
    answers.append([code, told.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | None, str]]:
    """(exit code, standard error) of every mistake; one process makes them all, and imports its libraries once."""
    result = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        input=json.dumps([arguments for arguments, _, _ in MISTAKES]),
        cwd=tmp_path_factory.mktemp("mistakes"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    return {" ".join(m[0]): (code, stderr) for m, (code, stderr) in zip(MISTAKES, outcomes, strict=True)}


@pytest.mark.parametrize(("arguments", "code", "sentence"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_u1_u2_u3_a_mistake_is_one_sentence_with_its_exit_code(
    arguments: list[str], code: int, sentence: str, answers: dict[str, tuple[int | None, str]]
) -> None:
    left, stderr = answers[" ".join(arguments)]
    messages = [line for line in stderr.splitlines() if line.startswith("llmft: ")]
    assert left == code, stderr
    assert len(messages) == 1, stderr
    assert sentence in messages[0]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("arguments", "code", "sentence"), [MISTAKES[0], MISTAKES[-1]], ids=["key", "column"])
def test_u1_u2_a_process_leaves_with_that_code_and_sentence(
    arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    result = llmft(*arguments, "logger=none", "progress=false", cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_trace_shows_the_traceback(tmp_path: Path) -> None:
    result = llmft("lora.r=-1", cwd=tmp_path, LLMFT_TRACE="1")
    assert "Traceback" in result.stderr
    assert result.returncode == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["lora.rr=3"], ["data=alpaca", "data.files=no.json"]]
)
def test_u4_help_config_and_mistakes_answer_without_heavy_imports(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys, runpy\nsys.argv = ['llmft', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('llmft', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'datasets', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    # CPU time, not wall time: the bound is a second and it takes a third of one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_a_combination_that_cannot_run_is_refused_before_any_begins(tmp_path: Path) -> None:
    result = llmft("seed=0", "-m", "lora.r=1,-2", cwd=tmp_path)
    assert result.returncode == 2
    assert "1 of 2 combinations cannot run, so none was started" in result.stderr
    assert "lora.r=-2: an integer of 1 or more" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "outputs").exists()


def test_the_program_starts_from_any_directory(tmp_path: Path) -> None:
    result = llmft("--cfg", "job", "model=mistral", "lora.r=4", cwd=tmp_path)
    assert result.returncode == 0
    assert "mistralai/Mistral-7B-Instruct-v0.1" in result.stdout
    assert "r: 4" in result.stdout
    assert not list(tmp_path.iterdir()), "printing a config writes nothing"


def test_a_terminal_of_few_characters_does_not_end_a_training(tmp_path: Path) -> None:
    rows = "data.rows={train: 32, validation: 8, test: 0}"
    result = llmft("logger=none", "trainer.max_steps=1", rows, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr


def test_u6_names_with_markup_spaces_and_commas_are_only_names(tmp_path: Path) -> None:
    (tmp_path / "a b [red] c.csv").write_text("prompt,response\n" + "".join(f"q{n},a{n}\n" for n in range(30)))
    arguments = ["data=prompt_response", "data.files=a b [red] c.csv", "output_dir='o[/x] y'", "logger=none"]
    for _ in range(2):
        result = command("llmft", *arguments, "trainer.max_steps=1", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "o[/x] y" in result.stdout


def test_another_process_of_a_finished_distributed_run_has_nothing_to_do(tmp_path: Path) -> None:
    rows = "data.rows={train: 16, validation: 4, test: 0}"
    arguments = ["logger=none", "trainer.max_steps=1", rows, "trainer.accelerator=cpu"]
    assert command("llmft", *arguments, cwd=tmp_path).returncode == 0
    result = llmft(*arguments, "trainer=ddp", cwd=tmp_path, timeout=60, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert result.returncode == 0, result.stderr
