"""Untrusted files run no code, do not hang and do not escape their folder; no secret reaches a file."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import llmft.data.sandbox as sandbox
from llmft.config.convert import from_plain, to_plain
from llmft.config.data import PromptConfig
from llmft.config.instantiate import KINDS, build, check_target, find
from llmft.config.overrides import hydra_arguments
from llmft.config.sections import TrainConfig
from llmft.config.untrusted import (
    check_adapter,
    check_config_directories,
    check_inside,
    check_model,
    read_json,
    read_yaml,
    stored_config,
)
from llmft.core.errors import ConfigError
from llmft.core.redaction import redact
from llmft.data.prompt import PromptFormat
from llmft.runs.directory import open_run, write_config
from llmft.runs.naming import slug
from llmft.train import train
from llmft.training.prepare import prepare
from tests.conftest import ROOT, SMALL, compose, llmft, prompt_config, run_directory

PACKAGE = ROOT / "llmft"
TINY = PACKAGE / "assets" / "tiny"


class TestPickleAndCode:
    """No call in the package reads a pickle or runs text as code."""

    FORBIDDEN = {  # noqa: RUF012
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "joblib.load",
        "dill.load",
        "yaml.unsafe_load",
        "pandas.read_pickle",
        "shelve.open",
        "marshal.loads",
        "runpy.run_path",
    }
    MODULES = {"pickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}  # noqa: RUF012
    KEYWORDS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "shell": True}  # noqa: RUF012

    def offences(self, source: str) -> list[str]:
        forbidden = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in self.FORBIDDEN:
                    forbidden.append(f"{name} at line {node.lineno}")
                for keyword in node.keywords:
                    value = keyword.value
                    bad = keyword.arg in self.KEYWORDS and isinstance(value, ast.Constant)
                    if bad and value.value is self.KEYWORDS[str(keyword.arg)]:
                        forbidden.append(f"{keyword.arg}={value.value} at line {node.lineno}")
            if isinstance(node, ast.Attribute) and node.attr in ("Loader", "FullLoader", "UnsafeLoader"):
                forbidden.append(f"{node.attr} at line {node.lineno}")
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            forbidden += [f"import {name}" for name in names if name.partition(".")[0] in self.MODULES]
        return forbidden

    def test_no_file_of_the_package_unpickles_or_evaluates(self) -> None:
        files = sorted(PACKAGE.rglob("*.py"))
        assert len(files) > 50
        assert {str(path): bad for path in files if (bad := self.offences(path.read_text()))} == {}

    @pytest.mark.parametrize(
        "source",
        [
            "torch.load(x)",
            "import pickle",
            "eval('1')",
            "f(trust_remote_code=True)",
            "run(x, shell=True)",
            "yaml.load(x, yaml.Loader)",
        ],
    )
    def test_the_search_finds_what_it_looks_for(self, source: str) -> None:
        assert self.offences(source)

    def test_no_yaml_of_ours_trusts_remote_code(self) -> None:
        for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")]:
            assert "trust_remote_code: true" not in path.read_text().lower(), path

    def test_pickled_weights_are_refused(self, tmp_path: Path) -> None:
        shutil.copytree(TINY, tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(ConfigError, match="pickled weights are not loaded"):
            prepare(compose(*SMALL, "model=local", f"model.path={tmp_path}/model", f"output_dir={tmp_path}"))

    def test_hydras_way_to_run_a_pickle_again_is_closed(self, tmp_path: Path) -> None:
        result = llmft("--exp", "x.pickle", cwd=tmp_path)
        assert result.returncode == 2
        assert "unpickles a file" in result.stderr


class TestTargets:
    """A config, also one in a run directory, may name only classes of a few packages."""

    EVIL = [  # noqa: RUF012
        "os.system",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "builtins.eval",
        "pathlib.Path.unlink",
        "numpy.load",
        "torch.utils.cpp_extension.load",
        "transformers.AutoModel.from_pretrained",
        "hydra.utils.instantiate",
        "llmft.training.session.os",
        "llmft.training.session.os.system",
        "llmft.training.callbacks.Path",
        "lightning.pytorch.callbacks.callback.os",
        "torch.optim.optimizer.functools",
        "llmft.trainingx.evil",
        "torch.os.system",
        "torch.serialization.load",
        "torch.ops.load_library",
        "torch.optim.sys.exit",
        "torch.optim.swa_utils.AveragedModel",
        "torch.optim.lr_scheduler.LambdaLR",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.utilities.sys",
        "lightning.pytorch.callbacks.lambda_function.LambdaCallback.__init__",
        "lightning.pytorch.loggers.wandb.os.system",
        "lightning.pytorch.strategies.ddp.torch.load",
        "wandb.init",
        "llmft.data.sources.load_rows",
        "llmft.metrics.text.Path",
        "AdamW",
        "",
        ".",
    ]

    @pytest.mark.parametrize("target", EVIL)
    def test_no_target_leads_out_of_the_allowed_packages(self, target: str) -> None:
        for kind in KINDS:
            with pytest.raises(ConfigError, match="key="):
                find(target, "key", kind)
        for node in (
            {"_target_": target},
            {"_target_": "torch.optim.AdamW", "betas": [{"_target_": target}]},
            {"_target_": "torch.optim.AdamW", "params": {"deep": [{"er": {"_target_": target}}]}},
        ):
            with pytest.raises(ConfigError):
                build(node, "optimizer", "optimizer")

    def test_every_allowed_package_is_named_to_its_end(self) -> None:
        named = [prefix for prefixes, _, _ in KINDS.values() for prefix in prefixes]
        assert all(prefix.endswith(".") for prefix in named), "torch.optimx is not torch.optim"

    def test_a_stored_config_is_read_without_building_and_checked_when_built(self, tmp_path: Path) -> None:
        config = compose(*SMALL, f"output_dir={tmp_path}")
        run = open_run(config, "0123456789")
        write_config(run, config)
        mark = tmp_path / "ran"
        node = OmegaConf.load(run.config_file)
        evil = {"_target_": "os.system", "command": f"touch {mark}"}
        node.optimizer, node.trainer.callbacks, node.logger.loggers = evil, {"x": evil}, {"y": evil}
        node.task.objective = "os.system"
        OmegaConf.save(node, run.config_file)
        stored = stored_config(run.config_file)
        for part, key in ((stored.optimizer, "optimizer"), (stored.trainer.callbacks["x"], "trainer.callbacks.x")):
            with pytest.raises(ConfigError, match="may be named in a config"):
                check_target(part, key, key.split(".")[-2][:-1] if "." in key else key)
        with pytest.raises(ConfigError, match="may be named in a config"):
            train(stored, quiet=True)
        assert not mark.exists()

    def test_a_stored_config_of_an_earlier_release_is_read_and_an_unknown_key_names_its_file(
        self, tmp_path: Path
    ) -> None:
        plain = to_plain(compose(*SMALL))
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**plain, "sweep": {**plain["sweep"], "stack": 8, "halving": True}}))
        assert to_plain(stored_config(path)) == plain
        path.write_text(yaml.safe_dump({**plain, "sweep": {**plain["sweep"], "stuck": 8}}))
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: sweep\.stuck: no such key"):
            stored_config(path)

    def test_a_stored_config_asks_the_environment_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PLANTED", "of the environment")
        config = compose(*SMALL, f"output_dir={tmp_path}")
        run = open_run(config, "0123456789")
        write_config(run, config)
        plain = yaml.safe_load(run.config_file.read_text())
        for text in ("${seed}", "${VAR:-default} $ {x}", "\\${seed}"):
            run.config_file.write_text(yaml.safe_dump({**plain, "notes": text}))
            assert stored_config(run.config_file).notes == text

    @pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${b} c", "\\${x}", "\\\\${x}", "$ {x} $", "${", "price: $5"])
    def test_text_that_looks_like_a_question_survives_the_way_through_a_file(self, text: str) -> None:
        plain = {**to_plain(compose()), "notes": text}
        assert from_plain(plain, TrainConfig).notes == text


class TestTrust:
    """A repository's code runs only where the command line allows it, at a pinned revision."""

    REVISION = "0123456789abcdef0123456789abcdef01234567"

    def test_a_yaml_file_cannot_say_it(self, tmp_path: Path) -> None:
        (tmp_path / "c" / "experiment").mkdir(parents=True)
        (tmp_path / "c" / "experiment" / "evil.yaml").write_text(
            f"# @package _global_\nmodel:\n  trust_remote_code: true\n  revision: '{self.REVISION}'\n"
        )
        arguments = ["--config-dir", str(tmp_path / "c"), "experiment=evil", "model=mistral"]
        result = llmft(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "a file cannot grant trust" in result.stderr
        said = llmft(*arguments, "model.trust_remote_code=true", cwd=tmp_path)
        assert "a file cannot grant trust" not in said.stderr
        assert "set model.path=DIR" in said.stderr, "it goes on to look for the model"

    def test_a_stored_config_cannot_say_it(self, tmp_path: Path) -> None:
        config = compose(*SMALL, f"output_dir={tmp_path}")
        run = open_run(config, "0123456789")
        write_config(run, config)
        node = OmegaConf.load(run.config_file)
        node.model.trust_remote_code = True
        OmegaConf.save(node, run.config_file)
        with pytest.raises(ConfigError, match="a file cannot grant trust"):
            stored_config(run.config_file)

    @pytest.mark.parametrize("revision", ["main", "v1.0", "0123456", REVISION[:-1] + "g"])
    def test_it_takes_a_pinned_revision(self, revision: str) -> None:
        with pytest.raises(ConfigError, match="40-digit commit"):
            compose("model=mistral", "model.trust_remote_code=true", f"model.revision='{revision}'")

    def directory(self, tmp_path: Path) -> tuple[Path, Path]:
        """A model whose files name their own code, which writes a file when it runs."""
        model, mark = tmp_path / "model", tmp_path / "ran"
        shutil.copytree(TINY, model)
        code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig as EvilConfig\n"
        code += "from transformers import LlamaForCausalLM as EvilModel\n"
        code += "from transformers import PreTrainedTokenizerFast as EvilTokenizer\n"
        (model / "evil.py").write_text(code)
        config = json.loads((model / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        (model / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((model / "tokenizer_config.json").read_text())
        tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        return model, mark

    @pytest.mark.parametrize("model_type", ["llama", "evil"])
    def test_code_beside_a_model_does_not_run_without_it(self, tmp_path: Path, model_type: str) -> None:
        model, mark = self.directory(tmp_path)
        config = json.loads((model / "config.json").read_text())
        config["model_type"] = model_type
        (model / "config.json").write_text(json.dumps(config))
        run_config = compose(*SMALL, "model=local", f"model.path={model}", f"output_dir={tmp_path}/o")
        if model_type == "evil":
            with pytest.raises(ConfigError):
                train(run_config, quiet=True)
        else:
            train(run_config, quiet=True)  # transformers' own class reads it
        assert not mark.exists()


class TestForeignFiles:
    """Untrusted files are read within limits, or refused in a sentence."""

    def test_an_alias_bomb_is_refused_at_once(self, tmp_path: Path) -> None:
        names = "abcdefghi"
        text = "a: &a [x,x,x,x,x,x,x,x,x]\n"
        for before, name in itertools.pairwise(names):
            text += f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
        (tmp_path / "bomb.yaml").write_text(text)
        began = time.monotonic()
        with pytest.raises(ConfigError, match="aliases"):
            read_yaml(tmp_path / "bomb.yaml")
        with pytest.raises(ConfigError, match="aliases"):
            stored_config(tmp_path / "bomb.yaml")
        for arguments in (
            ["--config-dir", str(tmp_path)],
            [f"--config-dir={tmp_path}"],
            ["-cd", str(tmp_path)],
            ["--config-d", str(tmp_path)],
            [f"hydra.searchpath=[file://{tmp_path}]"],
            [f"+hydra.searchpath=['{tmp_path}']"],
        ):
            with pytest.raises(ConfigError, match="aliases"):
                check_config_directories(arguments)
        assert time.monotonic() - began < 2

    @pytest.mark.parametrize(
        ("files", "sentence"),
        [
            ({"experiment/e.yaml": "defaults:\n  - ../../elsewhere/e\n"}, "not a path out of the directory"),
            ({"experiment/e.yaml": "defaults:\n  - optional /x/../../y: z\n"}, "not a path out of the directory"),
            ({"experiment/e.yaml": "- a list\n"}, "keys and values, not a list"),
            ({"hydra": "notes", "notes/launcher/e.yaml": "_target_: os.system\n"}, "a link to a directory"),
        ],
    )
    def test_a_config_directory_leads_nowhere_else(self, tmp_path: Path, files: dict[str, str], sentence: str) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".yaml"):
                (tmp_path / name).write_text(content)
            else:
                (tmp_path / name).symlink_to(content)
        with pytest.raises(ConfigError, match=sentence):
            check_config_directories(["--config-dir", str(tmp_path)])

    @pytest.mark.parametrize(
        "argument", ["model=../x", "+experiment=../../x", "hydra/launcher=[../x]", "~model=..", "--config-name=../x"]
    )
    def test_an_option_on_the_command_line_leads_nowhere_else(self, argument: str) -> None:
        with pytest.raises(ConfigError, match="a name is expected, not a path"):
            hydra_arguments([argument], TrainConfig, multirun=True)
        values = ["notes=../x", "output_dir=../x", "model={path: ../x}", "data.files=../x"]
        assert len(hydra_arguments(values, TrainConfig, multirun=True)) == 4

    def test_the_command_refuses_it_too(self, tmp_path: Path) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "bomb.yaml").write_text("a: &a 1\nb: [" + ",".join(["*a"] * 100) + "]\n")
        result = llmft("--config-dir", "c", "--cfg", "job", cwd=tmp_path)
        assert result.returncode == 2
        assert "c/bomb.yaml: 100 aliases" in result.stderr

    def test_stars_that_are_no_aliases_are_no_offence(self, tmp_path: Path) -> None:
        path = tmp_path / "many.yaml"
        path.write_text("files: [" + ",".join(f"'{n}/*.json'" for n in range(200)) + "]\n")
        assert len(read_yaml(path)["files"]) == 200

    @pytest.mark.parametrize(
        "content",
        [
            b"a: " + b"x" * (2 * 2**20),
            b"!!python/object/apply:os.system ['true']",
            b"a: [" * 3000,
            b"\xff\xfe",
            b"a: b: c",
        ],
        ids=["large", "python", "deep", "not utf-8", "broken"],
    )
    def test_yaml_that_is_no_config_is_one_sentence(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            stored_config(path)

    @pytest.mark.parametrize("value", ["2020-01-01", "!!set {a}", "!!binary AAAA"])
    def test_yaml_values_that_are_no_plain_data_are_one_sentence(self, tmp_path: Path, value: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(f"notes: {value}\n")
        with pytest.raises(ConfigError, match="notes"):
            stored_config(path)

    @pytest.mark.parametrize("pattern", ["(.*)*\\1(.*)*\\1x", "(a|a)*b", "("])
    def test_an_expression_for_modules_ends_in_time_or_is_refused(
        self, pattern: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sandbox, "SECONDS", 0.3)
        with pytest.raises((ValueError, re.error)):
            sandbox.match_bounded(pattern, ["a" * 60])

    @pytest.mark.parametrize("name", ["settings", "base_url", "tracking_uri", "host"])
    def test_a_runs_file_does_not_choose_a_server(self, name: str) -> None:
        with pytest.raises(ConfigError, match="does not choose where"):
            check_inside({"x": {"_target_": "lightning.pytorch.loggers.WandbLogger", name: "evil.org"}}, "loggers")

    def test_a_file_without_an_end_is_not_read_to_it(self) -> None:
        with pytest.raises(ConfigError, match="not a plain file"):
            read_json(Path("/dev/zero"), 2**20)

    @pytest.mark.parametrize(
        ("name", "damage", "sentence"),
        [
            ("config.json", {"num_hidden_layers": 10**9}, "is more than 2,000"),
            ("config.json", {"n_layer": 10**7}, "is more than 2,000"),
            ("config.json", {"text_config": {"num_hidden_layers": 10**9}}, "is more than 2,000"),
            ("config.json", {"num_labels": 10**10}, "is more than 1,000,000"),
            ("config.json", {"_attn_implementation": "stranger/kernel"}, "would download and run third-party code"),
            (
                "config.json",
                {"_attn_implementation_internal": "stranger/kernel"},
                "would download and run third-party code",
            ),
            ("config.json", {"attn_implementation": "stranger/kernel@main"}, "would download and run third-party code"),
            ("config.json", b"{" + b" " * (5 * 2**20) + b"}", "more than 4,194,304"),
            ("config.json", b'{"a":' * 100_000, "not JSON"),
            ("config.json", b"[]", "a JSON object was expected"),
            ("model.safetensors.index.json", {"weight_map": {"w": "../../../etc/passwd"}}, "outside the directory"),
            ("model.safetensors.index.json", {"weight_map": {"w": "/etc/passwd"}}, "outside the directory"),
            ("model.safetensors.index.json", {"weight_map": {"w": ["x"]}}, "outside the directory"),
        ],
    )
    def test_a_hostile_model_directory_is_one_sentence(
        self, tmp_path: Path, name: str, damage: Any, sentence: str
    ) -> None:
        shutil.copytree(TINY, tmp_path / "model")
        path = tmp_path / "model" / name
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **damage}))
        began = time.monotonic()
        with pytest.raises(ConfigError, match=sentence):
            prepare(compose(*SMALL, "model=local", f"model.path={tmp_path}/model", f"output_dir={tmp_path}"))
        assert time.monotonic() - began < 5

    def test_every_model_of_ours_passes(self) -> None:
        check_model(TINY)

    def adapter(self, tmp_path: Path, **values: Any) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **values}))
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        return tmp_path

    @pytest.mark.parametrize(
        "values",
        [
            {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
            {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
            {"layer_replication": [[0, 10**9]]},
            {"peft_type": "LOHA"},
        ],
        ids=lambda values: next(iter(values)),
    )
    def test_an_adapter_that_names_modules_is_refused(self, tmp_path: Path, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"adapter_config\.json"):
            check_adapter(self.adapter(tmp_path, **values))

    def test_a_pickled_adapter_is_refused_and_a_sound_one_read(self, tmp_path: Path) -> None:
        directory = self.adapter(tmp_path, auto_mapping=None)
        assert check_adapter(directory)["r"] == 8
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
        with pytest.raises(ConfigError, match="pickled weights are not loaded"):
            check_adapter(directory)

    def test_an_adapter_of_ours_passes(self, small: Callable[..., Any], tmp_path: Path) -> None:
        train(small(), quiet=True)
        assert check_adapter(run_directory(tmp_path) / "adapter")["r"] == 2


class TestTemplates:
    """A template is limited in time, memory and output, and sees only the conversation."""

    MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def quickly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "SECONDS", 0.3)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(
        "template",
        [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{{ 'a'|slice(9999999999)|map('length')|sum }}",
            "{{ 2**(2**40) }}",
            "{{ lipsum(n=100000000) }}",
            "{% for i in range(99999) %}{{ 'a'*100000 }}{% endfor %}",
            "{{ 'a'*10000000000 }}",
            "{{ '%9999999999d' % 1 }}",
            "{{ '{:>9999999999}'.format(1) }}",
            "{{ 'a'|center(9999999999) }}",
            "{{ ('a'*100000)|replace('a','b'*100000)|length }}",
            "{{ [1]|batch(9999999999,0)|list }}",
            "{% macro m(n) %}{{ m(n-1) }}{{ m(n-1) }}{% endmacro %}{{ m(5) }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ self.__init__.__globals__ }}",
            "{{ messages.append(1) }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}",
            "{{ nothing }}",
            "{% for x in nothing %}{% endfor %}",
            "{{ messages[0].contents }}",
        ],
    )
    def test_a_hostile_template_is_one_sentence(self, template: str, strict: bool) -> None:
        marks = "{% generation %}{% endgeneration %}"
        began = time.monotonic()
        with pytest.raises((ConfigError, ValueError), match="prompt=x: "):
            PromptFormat(PromptConfig(name="x", template=template + marks), strict=strict).render(self.MESSAGES)
        assert time.monotonic() - began < 5

    def test_the_process_is_as_before(self) -> None:
        import resource
        import signal

        limits = resource.getrlimit(resource.RLIMIT_AS)
        handler = signal.getsignal(signal.SIGVTALRM)
        with pytest.raises(ValueError, match="too much memory"):
            PromptFormat(PromptConfig(name="x", template="{{ 'a'*messages[0].n }}"), strict=False)._write(
                [{"role": "user", "content": "q", "n": 10**11}], None, False
            )
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
        assert signal.getsignal(signal.SIGVTALRM) is handler
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0

    def test_a_long_conversation_is_no_offence(self) -> None:
        prompt = PromptFormat(prompt_config("chatml"))
        long = "x" * 10_000_000
        rendered = prompt.render([{"role": "user", "content": long}, {"role": "assistant", "content": "a"}])
        assert long in rendered.text


class TestNames:
    """A name or a swept value cannot escape the output directory."""

    @pytest.mark.parametrize(
        "value", ["../../x", "/etc/x", "..", "a/../../b", "x" * 300, "\x00", "con\nfig", "~", "ü/ß"]
    )
    def test_names_are_slugs(self, value: str, tmp_path: Path) -> None:
        name = slug(value)
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        assert not name.startswith(".")
        config = compose(f"output_dir={tmp_path}/o")
        config.name = value
        run = open_run(config, "0123456789")
        assert run.directory.resolve().parent == (tmp_path / "o" / "runs").resolve()
        assert [path.name for path in tmp_path.iterdir()] == ["o"]

    @pytest.mark.parametrize(
        "value", ["model=../../x", "+x/../../y=1", "data=/etc/passwd", "experiment=../../../tmp/x"]
    )
    def test_an_option_is_a_name_and_no_path(self, value: str, tmp_path: Path) -> None:
        before = sorted(tmp_path.parent.iterdir())
        result = llmft("-m", value, "lora.r=1,2", cwd=tmp_path)
        assert result.returncode in (2, 5), result.stderr
        assert "Traceback" not in result.stderr
        assert sorted(tmp_path.parent.iterdir()) == before
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class TestW5Secrets:
    """Secrets are planted wherever a user might put one, and searched for in every written byte."""

    @pytest.mark.parametrize("kind", ["form", "environment"])
    def test_w5_no_planted_secret_is_written_anywhere(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        secret = "hf_" + "S3cr3t" * 6 if kind == "form" else "0123456789abcdef" * 2 + "deadbeef"
        monkeypatch.setenv("HF_TOKEN" if kind == "form" else "WANDB_API_KEY", secret)
        rows = [{"prompt": f"q{n} {secret}", "response": f"a{n} {secret}"} for n in range(40)]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "' + secret + '\n{"prompt": 1}\n')
        root = tmp_path / "out"
        small = [s for s in SMALL if not s.startswith("data.rows")]
        planted = [f"notes={secret}", f"tags=[{secret}]", f"name={secret}", f"prompt.system={secret}"]
        planted += ["data=prompt_response", f"data.files={data}", "data.on_bad_row=skip", "data.max_bad_fraction=0.5"]
        train(compose(*small, "logger=wandb", f"output_dir={root}", "task.show_rows=4", *planted))
        printed = capsys.readouterr()
        assert secret not in printed.out + printed.err
        looked = 0
        for path in root.rglob("*"):
            assert secret.lower() not in path.name.lower()
            if path.is_file() and path.name != "tokenizer.json":
                looked += 1
                assert secret.lower().encode() not in path.read_bytes().lower(), path
        assert looked > 15
        assert any("offline-run" in str(path) for path in root.rglob("*.wandb"))

    def test_w5_a_secret_in_an_error_is_masked_too(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from llmft.core.errors import report

        monkeypatch.setenv("HF_TOKEN", "planted-in-the-environment")
        report(ConfigError("x=planted-in-the-environment"))
        try:
            raise RuntimeError("https://me:planted-in-the-environment@host/")
        except RuntimeError as error:
            report(error)
        assert "planted" not in capsys.readouterr().err

    def test_w5_secrets_are_masked_by_form_by_name_and_by_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_SERVICE_API_KEY", "Tr0ub4dor&3-and-more")
        secrets = {
            "hub": {"token": "abc", "api_key": "abc"},
            "url": "https://me:pass@host/x",
            "note": "sk-" + "a" * 24,
            "aws": "AKIA" + "A" * 16,
            "header": "Bearer " + "a" * 30,
            "list": ["before Tr0ub4dor&3-and-more after", "github_pat_" + "a" * 30],
        }
        assert redact(secrets) == {
            "hub": {"token": "***", "api_key": "***"},
            "url": "https://***@host/x",
            "note": "***",
            "aws": "***",
            "header": "Bearer ***",
            "list": ["before *** after", "***"],
        }

    HEX = "0123456789abcdef" * 2 + "01234567"
    SECRETS = (
        "sk-ant-api03-" + "a" * 30,
        "ghp_" + "a" * 36,
        "gho_" + "b" * 36,
        "glpat-" + "x" * 20,
        "npm_" + "a" * 36,
        "pypi-AgEIcHlwaS5vcmcCJ" + "a" * 40,
        "AIza" + "a" * 35,
        "xoxb-123456789012-abcdefghij",
        "sk_live_" + "a" * 24,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_123",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\\nb3BlbnNzaC1rZXk and cut off",
    )
    WITHIN = (
        ("postgresql://{}@host/db", "user:p@ssw0rd"),
        ("redis://{}@host:6379/0", ":secretpw"),
        ("https://{}@github.com/x", HEX),
        ("https://x.blob.core.windows.net/c?sv=2020&sig={}&se=1", "abc%2Fdef%3D"),
        ("https://b.s3.amazonaws.com/k?X-Amz-Algorithm=A&X-Amz-Signature={}", "ab12" * 8),
        ("AccountName=n;AccountKey={};EndpointSuffix=core.windows.net", "Zm9vYmFyYmF6cXV4cXV1eA=="),
        ("Server=x;Password={};User Id=y", "hunter2"),
        ("wandb login {}", HEX),
        ('{{"username":"u","key":"{}"}}', HEX[:32]),
        ("KAGGLE_KEY={}", HEX[:32]),
        ("export PGPASSWORD={}", "hunter22"),
        ("DB_PASS='{}'", "correct horse"),
        ("password = {}", "hunter22"),
        ('"api_key": "{}"', "abcdefgh12345678"),
        ("Authorization: Basic {}", "dXNlcjpwYXNzd29yZDEyMw=="),
        ("https://hooks.slack.com/services/{}", "T000/B000/XXXX"),
    )

    def test_w5_every_common_form_is_masked_and_what_is_around_it_stays(self) -> None:
        for secret in self.SECRETS:
            assert redact(f"a {secret}") == "a ***", secret
        for frame, secret in self.WITHIN:
            assert redact(frame.format(secret)) == frame.format("***")
        assert redact({"kaggle": {"key": self.HEX[:32]}, "password": 1234, self.SECRETS[0]: 1}) == {
            "kaggle": {"key": "***"},
            "password": "***",
            "***": 1,
        }

    @pytest.mark.parametrize("name", ["KAGGLE_KEY", "PGPASSWORD", "SOME_PASS", "MY_SECRET", "X_TOKEN", "DEPLOY_PAT"])
    def test_w5_values_of_the_environments_secrets_are_masked_anywhere(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(name, "hunter2x9")
        assert redact(["at hunter2x9/here", {"a": "HUNTER2X9"}]) == ["at ***/here", {"a": "***"}]

    @pytest.mark.parametrize("name", ["PWD", "OLDPWD", "GOOGLE_APPLICATION_CREDENTIALS", "SSH_KEY"])
    def test_w5_a_path_in_the_environment_is_no_secret(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv(name, str(tmp_path))
        assert redact(f"data.files={tmp_path}/rows.csv") == f"data.files={tmp_path}/rows.csv"

    @pytest.mark.parametrize(
        "text",
        [
            f"commit {HEX}",
            f"model.revision={HEX}",
            f"git sha: {HEX}, key aaf058b1d9",
            "token: the",
            "Password: required",
            "max_new_tokens=128 data.columns.key=question",
            "token=tokenizer.encode(text1)",
            "password=os.environ['X']",
            "time: 12:30:11 ratio 3:4 user@example.com wrote: http://a.b/c@d",
            "sklearn-some-long-module-name",
        ],
    )
    def test_w5_hashes_prose_and_code_are_no_secrets(self, text: str) -> None:
        assert redact(text) == text
        assert redact({"key": "aaf058b1d9", "commit": self.HEX})["commit"] == self.HEX

    def test_w5_masking_takes_time_in_proportion_to_the_text(self) -> None:
        log = "step 100 val/exact_match=0.5 api_key: none https://a.b/c the quick brown fox\n" * 4000
        evil = ["a." * 200_000, "eyJ" * 100_000, "://" * 100_000, "password=" * 40_000, "-----BEGIN PRIVATE KEY" * 9000]
        began = time.process_time()
        assert redact(log) == log
        redact(evil)
        assert time.process_time() - began < 2

    def test_w5_tokens_of_text_are_no_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SHORT_TOKEN", "the")
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-or-whatever")
        harmless = {
            "num_tokens": 5,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "image_token": "<image>",
            "max_new_tokens": 9,
            "token_type": "x",
            "tokenizer": "x",
            "note": "the false-or-whatever",
        }
        assert redact(harmless) == harmless

    def test_w5_a_secret_on_the_command_line_is_refused_and_not_repeated(self, tmp_path: Path) -> None:
        secret = "hf_" + "S3cr3t" * 6
        result = llmft("-m", f"notes={secret}", "seed=0,1", cwd=tmp_path)
        assert result.returncode == 2
        assert "notes: this looks like a secret" in result.stderr
        assert secret not in result.stdout + result.stderr
        assert not list(tmp_path.iterdir())


def test_the_floors_of_the_packages_close_the_known_holes() -> None:
    """They also exclude the two releases of lightning that were malware."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    from llmft.checks.machine import MALICIOUS, requirements

    specifiers = {r.name: r.specifier for r in map(Requirement, requirements())}
    for name, version in MALICIOUS:
        assert not specifiers[name].contains(version)
    floors = {"hydra-core": "1.3.8", "lightning": "2.6.6", "transformers": "5.3", "jinja2": "3.1.6", "torch": "2.6"}
    for name, floor in floors.items():
        lowest = min(Version(s.version) for s in specifiers[name] if s.operator == ">=")
        assert lowest >= Version(floor), name
        assert any(s.operator == "<" for s in specifiers[name]), f"{name} has no ceiling"


def test_the_audit_fails_on_what_an_update_inside_our_ranges_closes_and_is_skipped_without_an_index() -> None:
    import importlib.util
    from importlib.machinery import SourceFileLoader

    from packaging.requirements import Requirement

    loader = SourceFileLoader("audit", str(ROOT / ".ci" / "audit"))
    spec = importlib.util.spec_from_loader("audit", loader)
    assert spec is not None
    audit = importlib.util.module_from_spec(spec)
    loader.exec_module(audit)

    def package(name: str, *fixes: str) -> dict[str, Any]:
        return {"name": name, "version": "1.0", "vulns": [{"id": f"CVE-{name}", "fix_versions": list(fixes)}]}

    audited = {"dependencies": [package("a", "1.5"), package("b", "2.1"), package("c"), package("d", "1.1", "x")]}
    audited["dependencies"].append({"name": "sound", "version": "1.0", "vulns": []})
    ranges = {name: Requirement(f"{name}>=1,<2") for name in "abc"}
    ours, others = audit.sort_out(audited, ranges)
    assert ours == ["a 1.0: CVE-a, closed by 1.5", "d 1.0: CVE-d, closed by 1.1"]
    assert others == ["b 1.0: CVE-b, closed by 2.1", "c 1.0: CVE-c, closed by no version"]
    assert "does not answer" in audit.why_not("http://127.0.0.1:1/")


def test_a_run_directory_of_a_stranger_is_looked_at_without_harm(tmp_path: Path) -> None:
    """`python -m llmft.disk` opens untrusted files."""
    from llmft.checks.disk import scan as look
    from llmft.config.commands import Cleaning, DiskConfig

    directory = tmp_path / "runs" / "evil-0123456789"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"status": "done", "result": "nothing", "handed_over": {}}))
    (directory / "config.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    os.symlink("/etc", directory / "checkpoints" / "step-00000001.safetensors")
    (tmp_path / "runs" / "link-0123456789").symlink_to(directory)
    report = look(DiskConfig(str(tmp_path), clean=[Cleaning.checkpoints, Cleaning.leftovers]))
    assert len(report.runs) == 1
    assert not Path("ran").exists()
