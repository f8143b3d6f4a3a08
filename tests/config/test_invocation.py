"""The process's arguments are read once and passed along."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

import llmft
from llmft.config.commands import DiskConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import NO_COMMAND, Invocation, split_off


def test_no_other_module_touches_the_arguments_of_the_process() -> None:
    package = Path(llmft.__file__).parent
    touching = set()
    for path in package.rglob("*.py"):
        attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
        if any(ast.unparse(node) == "sys.argv" for node in attributes):
            touching.add(str(path.relative_to(package)))
    assert touching == {"config/invocation.py"}


def test_a_command_is_what_a_person_types_to_go_on() -> None:
    invocation = Invocation.of(["-m", "++trainer.callbacks={}", "seed=0,1", "force=true", "+sweep=seeds"])
    assert invocation.command == "python -m llmft -m 'trainer.callbacks={}' seed=0,1 +sweep=seeds"
    assert invocation.overrides == ("trainer.callbacks={}", "seed=0,1", "force=true", "sweep=seeds")
    assert Invocation.of(["runs=a b"], "refit").command == "python -m llmft.refit 'runs=a b'"
    assert Invocation.of(["lora.r=4", "seed=1"], overrides=["seed=1"]).overrides == ("seed=1",)
    assert NO_COMMAND.command == ""


def test_the_words_of_a_key_are_those_of_the_command_line() -> None:
    invocation = Invocation.of(["trusted_packages=[MyLib,other.part]", "+trusted_packages=third", "notes=mylib2"])
    assert invocation.words("trusted_packages") == ["mylib", "other.part", "third"]
    assert invocation.words("model.trust_remote_code") == []


def test_a_verbs_own_arguments_are_taken_from_the_others() -> None:
    assert split_off(["format=json", "lora.r=4", "format=text"], "format=") == (["json", "text"], ["lora.r=4"])


def test_a_job_runs_under_the_arguments_that_the_process_was_started_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", started := ["llmft", "disk", "output_dir=ignored"])
    seen: list[tuple[str, list[str], tuple[str, ...]]] = []

    def job(composed: Any, invocation: Invocation) -> None:
        seen.append((composed.output_dir, sys.argv, invocation.argv))

    run_verb("disk", DiskConfig, job, [f"output_dir={tmp_path}"])
    assert seen == [(str(tmp_path), started, (f"output_dir={tmp_path}", "hydra.mode=RUN"))]
    assert sys.argv is started
