"""`python -m llmft.doctor` and `python -m llmft.disk`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmft.checks import machine
from llmft.checks.disk import size_of
from llmft.config.commands import Cleaning, DiskConfig, DoctorConfig, KeepCheckpoints, OutputFormat
from llmft.core.errors import ConfigError
from llmft.data import gguf_files
from llmft.disk import disk
from llmft.doctor import doctor
from llmft.runs.checkpoint import steps_on_disk
from llmft.runs.directory import Run
from llmft.train import train
from tests.commands import command
from tests.conftest import ROOT, SMALL, compose, run_directory


class TestDoctor:
    """Verdicts with advice, not a list of versions."""

    def test_every_part_of_this_machine_has_a_verdict(self, tmp_path: Path) -> None:
        verdicts = machine.examine(DoctorConfig(str(tmp_path), network=False))
        assert {v.part for v in verdicts} >= {
            "packages",
            "device",
            "precision",
            "4-bit",
            "memory",
            "output_dir",
            "TMPDIR",
        }
        assert {v.level for v in verdicts} <= {"good", "warning", "bad"}
        assert all(v.fix for v in verdicts if v.level != "good"), "whoever hears of a fault hears what to do"
        assert next(v.level for v in verdicts if v.part == "4-bit") == "good"

    @pytest.mark.parametrize(
        ("capability", "built_for", "level"),
        [
            ((9, 0), ["sm_80", "sm_90"], "good"),
            ((8, 9), ["sm_80", "sm_90"], "good"),  # a binary runs on later minor versions
            ((7, 5), ["sm_70", "sm_80"], "good"),
            ((6, 0), ["sm_70", "sm_75", "sm_80", "sm_90"], "bad"),  # Kaggle's P100
            ((12, 0), ["sm_80", "sm_90"], "bad"),
            ((12, 0), ["sm_80", "sm_90", "compute_90"], "good"),  # PTX is compiled for later devices
            ((8, 0), ["sm_86"], "bad"),
            ((9, 0), ["sm_90a", "sm_100"], "good"),
        ],
    )
    def test_a_gpu_without_kernels_is_noticed(
        self, capability: tuple[int, int], built_for: list[str], level: str
    ) -> None:
        verdict = machine.gpu_verdict("card", capability, built_for)
        assert verdict.level == level
        assert bool(verdict.fix) == (level == "bad")

    def test_a_wrong_4_bit_product_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import bitsandbytes

        original = bitsandbytes.matmul_4bit
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: original(*a, **k) * 1.1)
        (verdict,) = machine.four_bit()
        assert verdict.level == "bad"
        assert "differs from the dequantised one by 1.0e-01" in verdict.found

    @pytest.mark.parametrize(
        ("name", "version", "level", "message"),
        [
            ("lightning", "2.6.2", "bad", "was malware"),
            ("transformers", "99.0", "warning", "transformers 99.0 (tested: "),
            ("peft", None, "bad", "peft is missing"),
        ],
    )
    def test_packages_that_are_missing_untried_or_malicious_are_named(
        self, monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, level: str, message: str
    ) -> None:
        import importlib.metadata

        original = importlib.metadata.version

        def version_of(package: str) -> str:
            if package != name:
                return original(package)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        verdicts = [v for v in machine.packages() if message in v.found]
        assert [v.level for v in verdicts] == [level]

    def test_a_library_that_fails_is_a_verdict_and_no_crash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> Any:
            raise RuntimeError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(machine, "four_bit", broken)
        verdicts = machine.examine(DoctorConfig(network=False))
        assert next(v for v in verdicts if v.part == "4-bit").level == "bad"

    def test_what_would_stop_a_training_is_exit_code_2(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="output_dir") as error:
            doctor(DoctorConfig(str(tmp_path / "file" / "x"), network=False, format=OutputFormat.json))
        assert error.value.exit_code == 2
        assert {"part", "level", "found", "fix"} == set(json.loads(capsys.readouterr().out)[0])

    def test_no_token_is_shown(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
        monkeypatch.setenv("WANDB_API_KEY", "y" * 40)
        verdicts = {v.part: v for v in machine.accounts()}
        assert {v.level for v in verdicts.values()} == {"good"}
        machine.show(list(verdicts.values()))
        assert "xxx" not in (out := capsys.readouterr().out)
        assert "yyy" not in out

    def test_the_command_answers(self, tmp_path: Path) -> None:
        result = command("llmft.doctor", "network=false", f"output_dir={tmp_path}", cwd=tmp_path)
        assert result.returncode in (0, 2), result.stderr
        assert (" bad " in result.stdout) == (result.returncode == 2)
        assert "Traceback" not in result.stderr


KEEP_ALL = ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=9"]


class TestDisk:
    """Disk usage by folder; only deletable files are deleted."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("disk")
        train(compose(*SMALL, *KEEP_ALL, f"output_dir={root}"), quiet=True)
        return root

    @pytest.fixture
    def root(self, trained: Path, tmp_path: Path) -> Path:
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
        return tmp_path

    def look(self, root: Path, **values: Any) -> Any:
        return disk(DiskConfig(str(root), format=OutputFormat.json, **values))

    def test_sizes_are_those_of_du(self, root: Path) -> None:
        directory = run_directory(root)
        (directory / "twice").hardlink_to(directory / "config.yaml")
        (directory / "link").symlink_to("/usr")
        result = subprocess.run(
            ["du", "-s", "--block-size=1", str(directory)], capture_output=True, text=True, check=True
        )
        assert size_of(directory) == int(result.stdout.split()[0])

    def test_nothing_goes_unless_it_is_asked_for_twice(self, root: Path, capsys: Any) -> None:
        before = sorted(root.rglob("*"))
        self.look(root)
        report = self.look(root, clean=list(Cleaning))
        assert report["doomed"]
        assert not any(entry["gone"] for entry in report["doomed"])
        assert sorted(root.rglob("*")) == before

    def test_best_and_last_stay_and_the_run_is_still_done(self, root: Path, small: Callable[..., Any]) -> None:
        directory = run_directory(root)
        assert steps_on_disk(directory / "checkpoints") == [1, 2, 3, 4]
        result = Run(directory, "").status()["result"]
        self.look(root, clean=[Cleaning.checkpoints], dry_run=False)
        assert steps_on_disk(directory / "checkpoints") == sorted({result["step"], result["steps"]})
        self.look(root, clean=[Cleaning.checkpoints], keep=[], dry_run=False)
        assert not list((directory / "checkpoints").iterdir())
        assert Run(directory, "").done
        assert train(compose(*SMALL, *KEEP_ALL, f"output_dir={root}"), quiet=True) is not None

    @pytest.mark.parametrize("state", ["running", "interrupted", "failed", "diverged"])
    def test_an_unfinished_runs_checkpoints_never_go(self, root: Path, state: str) -> None:
        directory = run_directory(root)
        Run(directory, "").update(status=state)
        report = self.look(root, clean=[Cleaning.checkpoints], keep=[], dry_run=False)
        assert report["doomed"] == []
        assert steps_on_disk(directory / "checkpoints") == [1, 2, 3, 4]

    def test_a_run_whose_export_is_damaged_keeps_its_checkpoints(self, root: Path) -> None:
        directory = run_directory(root)
        (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        report = self.look(root, clean=[Cleaning.checkpoints], keep=[], dry_run=False)
        assert [run["state"] for run in report["runs"]] == ["damaged"]
        assert steps_on_disk(directory / "checkpoints") == [1, 2, 3, 4]

    def test_a_run_that_is_being_trained_is_left_alone(self, root: Path) -> None:
        directory = run_directory(root)
        (directory / "checkpoints" / "step-00000009.bad").write_bytes(b"x")
        run = Run(directory, "")
        run.lock()
        try:
            report = self.look(root, clean=[Cleaning.checkpoints, Cleaning.leftovers], keep=[], dry_run=False)
        finally:
            run.unlock()
        assert [run["state"] for run in report["runs"]] == ["training"]
        assert report["doomed"] == []
        assert len(list((directory / "checkpoints").iterdir())) == 9

    def test_leftovers_and_tokens_go_on_request(self, root: Path) -> None:
        directory = run_directory(root)
        (directory / "checkpoints" / "step-00000009.bad").write_bytes(b"x")
        dead = subprocess.Popen(["true"])
        dead.wait()
        (directory / f".run.json.{dead.pid}.tmp").write_bytes(b"x")
        (directory / "gguf").mkdir()
        (directory / "gguf" / f".model.gguf.{dead.pid}.tmp").mkdir()
        being_written = directory / f".merged.{os.getppid()}.tmp"
        being_written.mkdir()
        report = self.look(
            root, clean=[Cleaning.leftovers, Cleaning.tokens], keep=[KeepCheckpoints.best], dry_run=False
        )
        gone = [entry["path"] for entry in report["doomed"] if entry["gone"]]
        assert any(path.endswith(".bad") for path in gone)
        assert [Path(path).name for path in gone if path.endswith(".tmp")] == [
            f".run.json.{dead.pid}.tmp",
            f".model.gguf.{dead.pid}.tmp",
        ]
        assert being_written.is_dir()
        assert any(path.endswith(".arrow") for path in gone)
        assert not any(Path(path).exists() for path in gone)
        assert Run(directory, "").done
        train(compose(*SMALL, "trainer.max_steps=1", f"output_dir={root}/again"), quiet=True)

    def test_merged_models_and_dequantised_gguf_files_are_told_and_go_on_request(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        directory, source = run_directory(root), tmp_path / "theirs.gguf"
        converted = gguf_files.directories() / "0123"
        for path in (directory / "merged" / "model.safetensors", directory / "gguf" / "a.gguf", converted / "weights"):
            path.parent.mkdir(parents=True)
            path.write_bytes(b"x" * 10_000)
        (converted / gguf_files.SOURCE).write_text(str(source))
        config = directory / "config.yaml"
        config.write_text(config.read_text().replace("package:tiny", str(source)))
        report = self.look(root)
        assert [run["merged"] for run in report["runs"]] == [
            size_of(directory / "merged") + size_of(directory / "gguf")
        ]
        entries = [entry for entry in report["cached"] if entry["kind"] == "dequantised GGUF"]
        assert [(entry["name"], entry["used_by"]) for entry in entries] == [(str(source), [directory.name])]
        self.look(root, clean=[Cleaning.merged, Cleaning.gguf], dry_run=False)
        assert not converted.exists()
        assert not (directory / "merged").exists()
        assert not list((directory / "gguf").iterdir())
        assert Run(directory, "").done

    def test_models_of_the_cache_are_told_with_the_runs_that_use_them(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("some--base", "other--base"):
            (tmp_path / "hub" / f"models--{name}").mkdir(parents=True)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        config = run_directory(root) / "config.yaml"
        config.write_text(config.read_text().replace("llmft/tiny", "some/base").replace("package:tiny", "null"))
        report = self.look(root)
        used = {entry["name"]: entry["used_by"] for entry in report["cached"] if entry["kind"] == "Hub model"}
        assert used == {"some/base": [run_directory(root).name], "other/base": []}

    def test_a_directory_that_is_not_there_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such directory"):
            self.look(tmp_path / "nowhere")

    def test_the_command_needs_no_torch_and_shows_a_page(self, root: Path) -> None:
        program = (
            "import sys, runpy\nsys.argv = ['disk', *sys.argv[1:]]\n"
            "runpy.run_module('llmft.disk', run_name='__main__', alter_sys=True)\n"
        )
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", program, f"output_dir={root}", "clean=[checkpoints]"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
        assert not imported & {"torch", "transformers", "lightning", "datasets", "wandb"}
        assert "would be freed" in result.stdout
        assert run_directory(root).name in result.stdout

    def test_a_mistyped_key_is_answered_as_everywhere(self, tmp_path: Path) -> None:
        result = command("llmft.disk", "cleen=[tokens]", cwd=tmp_path)
        assert result.returncode == 2
        assert "cleen: no such key; did you mean clean?" in result.stderr
