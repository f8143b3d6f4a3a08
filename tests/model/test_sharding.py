"""A sharded base: each process holds its share of the weights, and never more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmft.config.model import ModelConfig, ModelInit, QuantizationConfig, QuantizationFormat
from llmft.data.hub import Located
from llmft.model.load import load_base
from tests.conftest import ROOT, SMALL, llmft, run_directory

pytestmark = pytest.mark.slow
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for the cache of quantised bases, with the tokenizer of the embedded one."""
    path = tmp_path_factory.mktemp("large") / "model"
    base = load_base(
        ModelConfig(name="x", id="x", init=ModelInit.random, architecture="llama", config=SHAPE),
        Located(None, "random"),
        QuantizationConfig(QuantizationFormat.none),
        auto_class="causal_lm",
        num_labels=0,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        seed=0,
        keep_base=False,
    )
    base.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((ROOT / "llmft" / "assets" / "tiny" / name).read_bytes())
    return path


SHARE = """
import json, sys, torch
from llmft.core.imports import load_libraries
load_libraries(training=False)
from llmft.config.model import LoraConfig, ModelConfig, ModelInit, QuantizationConfig
from llmft.data.hub import locate
from llmft.model import adapters
from llmft.model.load import load_base
from llmft.model.sharding import shard

def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.distributed.init_process_group("gloo")
count = torch.distributed.get_world_size()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (count,))
model = ModelConfig(name="x", id="x", init=ModelInit.pretrained, architecture="llama", path=sys.argv[1])
before = held()
base = load_base(model, locate(model), QuantizationConfig(), auto_class="causal_lm", num_labels=0, dtype=torch.float32,
                 device=torch.device("cpu"), seed=0, keep_base=False, memory_map=True)
whole = sum(p.nbytes for p in base.parameters())
loaded = held() - before
adapted = adapters.attach(base, LoraConfig(r=2), auto_class="causal_lm", seed=0, name="x")
shard(adapted, mesh)
told = {"whole": whole, "loaded": loaded, "held": held() - before}
ids = torch.arange(20)[None]
told["loss"] = float(adapted(input_ids=ids, labels=ids, use_cache=False).loss.detach())
print(json.dumps(told), flush=True)
"""


def shares(processes: int, directory: Path, tmp_path: Path) -> list[dict[str, float]]:
    (tmp_path / "share.py").write_text(SHARE)
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(tmp_path / "share.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", *launch, str(directory)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def test_each_process_holds_its_share_of_the_base_and_never_the_whole(directory: Path, tmp_path: Path) -> None:
    shares(1, directory, tmp_path)  # into the cache
    (alone,), both = shares(1, directory, tmp_path), shares(2, directory, tmp_path)
    assert len(both) == 2
    for share in both:
        assert share["loaded"] < 0.25 * share["whole"], "the file is mapped, not read"
        assert share["held"] < 0.65 * alone["held"]
        assert share["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_divided_base_trains_to_the_numbers_of_one_process(directory: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, f"model.path={directory}", "prompt=alpaca_short", "task.generate_rows=0"]
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for name, trainer in (("divided", "fsdp"), ("one", "cpu")):
        how = [f"trainer={trainer}", "trainer.accelerator=cpu", f"output_dir={tmp_path / name}"]
        result = llmft(*arguments, *how, cwd=tmp_path, timeout=300, **cache)
        assert result.returncode == 0, result.stderr
    runs = [run_directory(tmp_path / name) for name in ("divided", "one")]
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in runs]
    for divided, one in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert divided == pytest.approx(one, rel=1e-4)
    sizes = [(run / "adapter" / "adapter_model.safetensors").stat().st_size for run in runs]
    assert sizes[0] == sizes[1], "the adapter is saved whole"
