"""The command line as a real shell passes it: every command that is printed anywhere, any text, tab completion."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmft.completion import candidates, script
from llmft.config.commands import PredictConfig
from llmft.config.invocation import COMMANDS, Invocation
from llmft.config.overrides import as_override, hydra_arguments, kinds_of, quoted, unquoted
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError
from tests.conftest import ROOT, compose

READMES = [ROOT / "README.md", *(p for name in ("conf", "sweeps", "llmft") for p in (ROOT / name).rglob("README.md"))]
README = "\n".join(path.read_text() for path in READMES)
COMMAND = r"(?:python -m llmft|llmft (?=[a-z]+\b(?:$| [a-z-]|=)))"


def split_by_bash(lines: Sequence[str], cwd: Path) -> list[list[str]]:
    """The words that bash hands to the program of each line."""
    script = "\n".join(f'words {line}\nprintf "\\1\\0"' for line in lines)
    result = subprocess.run(
        ["bash", "-c", f"words() {{ printf '%s\\0' \"$@\"; }}\n{script}"], cwd=cwd, capture_output=True, check=True
    )
    words_of: list[list[str]] = [[]]
    for word in os.fsdecode(result.stdout).split("\0")[:-1]:
        words_of.append([]) if word == "\1" else words_of[-1].append(word)
    return words_of[:-1]


@cache
def printed_commands() -> dict[str, str]:
    """Every command that a README, conf/, sweeps/, --help or an error shows, and the file that shows it.

    Not included are patterns (with …, [key=value] or a value that code fills in), and
    `wandb sweep`, which is a program of others.
    """
    commands: dict[str, str] = {}
    sources = [*READMES, *(ROOT / "llmft").rglob("*.py")]
    sources += [path for folder in ("conf", "sweeps") for path in (ROOT / folder).rglob("*.yaml")]
    for path in sorted(sources):
        text = path.read_text()
        exact = re.findall(rf"`({COMMAND}[^`\n]*)`", text)
        if path.suffix == ".md":
            for block in re.findall(r"```bash\n(.*?)\n```", text, re.S):
                exact += [part.strip() for part in re.split(r"&&|\n", block.replace("\\\n", " "))]
        elif path.suffix == ".yaml":  # comments and help end where their words begin
            for line in re.findall(rf"^(?:# *| +)({COMMAND}.*)$", text, re.M):
                exact.append(re.split(r"  |[:;,] |\. ", line)[0])
        for command in exact:
            if re.match(COMMAND, command) and not re.search(r"…|\[key=|\{\w+[.}]|<|%s|COMMAND", command):
                commands.setdefault(command.strip().rstrip(":,."), str(path.relative_to(ROOT)))
    return commands


def schema_of(command: str) -> tuple[str, type]:
    """(name of the primary config, schema) of a command."""
    if command in ("train", "check"):
        return "train", TrainConfig
    module = importlib.import_module(f"llmft.{command}")
    return command, getattr(module, f"{command.capitalize()}Config")


def compose_words(command: str, words: Sequence[str]) -> Any:
    """The config of a command's arguments; for a sweep, of the first combination."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra_plugins.llmft_sweeping import combinations

    name, schema = schema_of(command)
    before_hydra = {"check": "format=", "report": "lb.", "serve": "with="}.get(command, "\0")  # taken before Hydra
    arguments = hydra_arguments(
        [w for w in words if not w.startswith(before_hydra)], schema, multirun=command == "train"
    )
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    assert any(a in ("-m", "--multirun") for a in arguments) or not any(o.is_sweep_override() for o in parsed)
    ranges = [o.input_line for o in parsed if o.is_sweep_override() and not o.is_discrete_sweep()]
    chosen = combinations([o for o in parsed if o.input_line not in ranges])[0]
    return compose(*chosen, verb=name, kind=schema)


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    """Our Hydra plugins are known."""
    from llmft.config.hydra_app import make_known

    make_known("train", TrainConfig)


def test_every_printed_command_composes_as_bash_hands_it_over(tmp_path: Path) -> None:
    commands = list(printed_commands())
    assert len(commands) > 60
    wrong = []
    for line, words in zip(commands, split_by_bash(commands, tmp_path), strict=True):
        program, *arguments = words
        module = arguments[1] if program == "python" else "llmft"
        assert program == "llmft" or arguments[0] == "-m"
        words = arguments[2:] if program == "python" else arguments
        command = module.partition(".")[2] or (words.pop(0) if words and words[0] in COMMANDS else "train")
        try:
            if command in COMMANDS:
                if command != "completion" and words != ["--help"]:
                    compose_words(command, words)
            else:
                assert importlib.util.find_spec(f"llmft.{command}") is not None
        except ConfigError as error:
            missing = str(error).rpartition("=…")[0] and "has no value" in str(error)
            if not (missing and not words):  # a bare name of a command that needs arguments
                wrong.append(f"{printed_commands()[line]}: {line}: {error}")
        except Exception as error:
            wrong.append(f"{printed_commands()[line]}: {line}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_group_of_arguments_in_the_readme_is_taken_by_a_command(tmp_path: Path) -> None:
    spans = list(dict.fromkeys(re.findall(r"`([^`\n]+)`", README)))
    spans = [s for s in spans if re.match(r"(--config-dir|[+\"']?[a-z_./]+=)", s)]
    spans = [s for s in spans if not s.endswith("=") and "…" not in s and not s.startswith("format=submission")]
    assert 'sweep.question="Is r=4 better than r=8?"' in spans
    spans.remove("hydra/launcher=submitit_slurm")  # of an optional package
    spans = [s for s in spans if s != "--config-dir" and " is " not in s]  # an option's name; a verdict in words
    ways = [("train", ["-m"]), ("train", ["-m", "data.files=x"]), ("predict", ["run=x", "data.files=x"])]
    ways += [("train", ["-m", "task=reward"])]
    ways += [(command, []) for command in ("bench", "report", "disk")]
    ways += [("merge", ["run=x"]), ("merge", ["run=x", "format=gguf"])]
    wrong = []
    for line, words in zip(spans, split_by_bash(spans, tmp_path), strict=True):
        errors = []
        for command, more in ways:
            if command != "train" and not _has_keys(command, words):
                continue
            try:
                compose_words(command, [*more, *words])
                break
            except Exception as error:
                errors.append(f"{command}: {error}")
        else:
            wrong.append(f"{line}: {errors}")
    assert not wrong, "\n".join(wrong)


def _has_keys(command: str, words: Sequence[str]) -> bool:
    """Whether the keys are in a command's schema; cheaper than composing."""
    known = schema_of(command)[1].__dataclass_fields__
    return all(re.split(r"[.=]", word.lstrip("+"))[0] in known for word in words)


def test_the_readmes_question_and_template_are_taken_as_pasted(tmp_path: Path) -> None:
    lines = ['sweep.question="Is r=4 better than r=8?" data.columns.prompt="{question} {context}"']
    config = compose_words("train", split_by_bash(lines, tmp_path)[0])
    assert config.sweep.question == "Is r=4 better than r=8?"
    assert config.data.columns.prompt == "{question} {context}"


SIGNS = st.sampled_from("ab 1.,'\"()[]{}=:$\\\n\té日-+~@#%&*!?|;<>/`^_")
TEXTS = st.text(SIGNS, max_size=12) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
LAW = settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def value_of(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).value()


def literally(text: str) -> bool:
    """Whether a text is taken literally: not null, no interpolation, not in one pair of quotes."""
    return text != "null" and "${" not in text and unquoted(text) == text


@LAW
@given(TEXTS.filter(literally))
@example("Is r=4 better than r=8?")
@example("true")
@example("1e3")
@example(" a, b ")
@example("")
def test_a_text_key_takes_any_text_as_it_is(text: str) -> None:
    override = as_override(f"notes={text}", TrainConfig)
    assert value_of(override) == text
    assert as_override(override, TrainConfig) == override
    again = as_override(f"notes={quoted(text)}", TrainConfig, several=True)
    assert value_of(again) == text


@LAW
@given(st.lists(TEXTS.map(str.strip).filter(lambda t: t and literally(t) and not set(t) & set(",()[]{}'\""))))
def test_a_list_of_texts_takes_its_items_as_they_are(items: list[str]) -> None:
    assert value_of(as_override(f"tags=[{','.join(items)}]", TrainConfig)) == items


@settings(LAW, max_examples=40)
@given(st.lists(TEXTS.filter(literally), min_size=1, max_size=4), st.booleans())
def test_a_recorded_command_typed_again_gives_the_same_values(tmp_path: Path, texts: list[str], several: bool) -> None:
    keys = ["notes", "prompt.system", "data.columns.prompt", "sweep.question"][: len(texts)]
    typed = [f"{key}={quoted(text) if several else text}" for key, text in zip(keys, texts, strict=True)]
    typed += ["-m"] if several else []
    command = Invocation.of(hydra_arguments(typed, TrainConfig, multirun=True)).command
    (words,) = split_by_bash([command], tmp_path)
    assert words[:3] == ["python", "-m", "llmft"]
    again = hydra_arguments(words[3:], TrainConfig, multirun=True)
    values = {a.partition("=")[0]: value_of(a) for a in again if not a.startswith("-")}
    assert values == dict(zip(keys, texts, strict=True))


@pytest.mark.parametrize(
    ("value", "values"),
    [
        ("Be brief, be kind.", ["Be brief, be kind."]),
        ("a,b", ["a", "b"]),
        ("1e3,true", ["1e3", "true"]),
        ("'a b','c, d'", ["a b", "c, d"]),
        ("null,'You answer in as few words as possible.'", [None, "You answer in as few words as possible."]),
        ("choice(a,b)", ["a", "b"]),
        ("it's,fine", ["it's", "fine"]),
        ("f(a,b)", ["f(a,b)"]),
        ("{a},{b}", ["{a}", "{b}"]),
        ("a,", ["a,"]),
    ],
)
def test_commas_part_values_only_in_a_sweep_and_where_no_spaces_are(value: str, values: list[str | None]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra_plugins.llmft_sweeping import combinations

    override = as_override(f"prompt.system={value}", TrainConfig, several=True)
    jobs = combinations(OverridesParser.create().parse_overrides([override]))
    assert [value_of(job[0]) for job in jobs] == values
    if "'" not in value[:1]:
        assert value_of(as_override(f"prompt.system={value}", TrainConfig)) == value


def test_numbers_and_words_in_lists_of_texts_and_names_of_classes_stay_as_written() -> None:
    assert compose("data.labels=[1.10,true,null,'x, y']").data.labels == ["1.10", "true", "null", "x, y"]
    assert compose(r"lora.targets=.*\.(q|v)_proj").lora.targets == r".*\.(q|v)_proj"
    columns = compose(
        "run=x",
        "data.files=x",
        "format=submission",
        "template=x",
        "columns.gpt-3.5=a (b)",
        "columns.Llama 2: 70B=c, d",
        verb="predict",
        kind=PredictConfig,
    ).columns
    assert columns == {"gpt-3.5": "a (b)", "Llama 2: 70B": "c, d"}


def test_paths_of_every_key_are_taken_as_they_are() -> None:
    path = "my rows (1), it's.csv"
    assert compose(f"data.files={path}", "data=prompt_response").data.files == path
    assert compose(f"data.files=[{path.replace(',', '')},b.csv]", "data=alpaca").data.files[1] == "b.csv"
    for key, kind in kinds_of(TrainConfig).items():
        if kind.startswith(("str", "Texts")):
            assert value_of(as_override(f"{key}={path}", TrainConfig)) == path, key


class TestCommands:
    """One entry point, one list of commands."""

    def test_every_command_is_listed_by_help_and_completed(self) -> None:
        template = yaml.safe_load((ROOT / "conf" / "train.yaml").read_text())["hydra"]["help"]["template"]
        assert set(re.findall(r"^  ([a-z]+) {3,}\S", template, re.M)) == set(COMMANDS)
        modules = {p.stem for p in (ROOT / "llmft").glob("*.py") if "\ndef main(argv" in p.read_text()}
        assert modules == set(COMMANDS)
        assert set(candidates("llmft ")) >= set(COMMANDS)

    def test_a_commands_name_is_the_same_as_its_module(self, tmp_path: Path) -> None:
        for way in (["llmft", "disk"], ["llmft.disk"]):
            result = run_module(*way, "--help", cwd=tmp_path)
            assert result.returncode == 0
            assert "which run uses it" in result.stdout
        assert run_module("llmft", "train", "lora.r=0", cwd=tmp_path).returncode == 2

    def test_an_unknown_command_is_answered_with_the_nearest(self, tmp_path: Path) -> None:
        result = run_module("llmft", "chekc", "data=alpaca", cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.strip() == "llmft: chekc: no such command, and no key=value; did you mean check?"


def run_module(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


class TestCompletion:
    """Suggestions of tab completion."""

    @pytest.mark.parametrize(
        ("line", "offered"),
        [
            ("llmft model=mis", {"model=mistral", "model=mistral_v03"}),
            ("python -m llmft model=mis", {"model=mistral", "model=mistral_v03"}),
            ("llmft lora.", {"lora.r=", "lora.dropout="}),
            ("llmft pre", {"predict"}),
            ("llmft predict ru", {"run="}),
            ("python3 -m llmft.predict ru", {"run="}),
            ("llmft check task=classification dat", {"data=", "data."}),
            ("llmft -m +sweep=", {"+sweep=rank_x_rate"}),
            ("llmft --conf", {"--config-dir"}),
            ("llmft completion ", {"bash", "zsh"}),
            ("llmft lora.rr=3 model=tin", {"model=tiny"}),
        ],
    )
    def test_the_word_at_the_end_is_completed(self, line: str, offered: set[str]) -> None:
        assert offered <= set(candidates(line))
        assert all(word.startswith(line.rpartition(" ")[2]) for word in candidates(line))

    @pytest.mark.parametrize(
        ("line", "words", "replies"),
        [
            ("llmft model=mistral_v", ["llmft", "model", "=", "mistral_v"], ["mistral_v02", "mistral_v03"]),
            ("llmft model=mistral_v", ["llmft", "model=mistral_v"], ["model=mistral_v02", "model=mistral_v03"]),
            ("python -m llmft.predict ru", ["python", "-m", "llmft.predict", "ru"], ["run="]),
            ("python other.py ru", ["python", "other.py", "ru"], []),
        ],
    )
    def test_bash_completes(self, line: str, words: list[str], replies: list[str], tmp_path: Path) -> None:
        (tmp_path / "script").write_text(script("bash"))
        driver = """
            source ./script
            line=$1; shift
            [[ $(complete -p "$1") =~ -F\\ ([^ ]+) ]] || exit 3
            COMP_LINE=$line COMP_POINT=${#line} COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
            ${BASH_REMATCH[1]} "$1"; printf '%s\\n' "${COMPREPLY[@]}"
        """
        result = subprocess.run(
            ["bash", "--norc", "-c", driver, "bash", line, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == replies

    @pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed here")
    @pytest.mark.slow
    def test_zsh_completes(self, tmp_path: Path) -> None:
        setup = 'autoload -Uz compinit; compinit -u -D; PS1=READY; llmft() { print "GOT:$*:" }\n'
        (tmp_path / ".zshrc").write_text(setup + script("zsh"))
        driver = r"""
            zmodload zsh/zpty; zpty -b shell zsh -d -i
            wait_for() {
                for i in {1..200}; do
                    zpty -r -t shell out '*' && all+=$out; [[ $all == *$1* ]] && return; sleep 0.1
                done
            }
            wait_for READY; zpty -w -n shell $'llmft optimizer=sg\t'
            wait_for sgd; zpty -w -n shell $'model=tinyl\t'
            wait_for tinyllama; zpty -w -n shell $'\n'
            wait_for 'GOT:*:'; print -r -- $all; zpty -d shell
        """
        result = subprocess.run(
            ["zsh", "-f", "-c", driver],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "ZDOTDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "GOT:optimizer=sgd model=tinyllama:" in result.stdout, result.stdout + result.stderr
