"""The same work for every system: a model's directory, rows as token ids, their order, an initial adapter.

llmft encodes the rows, orders them and makes the adapter; peers read the result from a JSON file and a safetensors
file, so that all take the same tokens, in the same order, from the same weights.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import SHARED, compose

BATCH_SIZE = 16
SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
}
"""A Llama of 20 million weights."""


@dataclass
class Work:
    """The work of a training.

    Attributes:
        overrides: llmft's command line for it.
        batches: the rows of each step.
        lengths, labelled: tokens and labelled tokens of each row.
    """

    directory: Path
    overrides: list[str]
    batches: list[list[int]]
    lengths: list[int]
    labelled: list[int]

    def tokens(self, step: int) -> tuple[int, int]:
        """(real, supervised) tokens of a step."""
        rows = self.batches[step % len(self.batches)]
        return sum(self.lengths[row] for row in rows), sum(self.labelled[row] for row in rows)

    def write(self, name: str, **settings: Any) -> Path:
        """Writes the JSON for a peer's runner, with its settings; returns the path."""
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps({**json.loads((self.directory / "work.json").read_text()), **settings}))
        return path


def small_model(directory: Path, shape: dict[str, Any]) -> Path:
    """A random model whose tokenizer reads "t5 t17" as the ids 5 and 17."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **special)).save_pretrained(directory)
    words = {f"t{number}": number for number in range(3, shape["vocab_size"])}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **words}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=2048, **tokens).save_pretrained(directory)
    return directory


def llama2_words(directory: Path) -> Path:
    """The same model with the Llama 2 tokenizer, for rows of text."""
    small_model(directory, SMALL)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
        if (SHARED / "tokenizers" / "llama2" / name).is_file():
            shutil.copy(SHARED / "tokenizers" / "llama2" / name, directory / name)
    return directory


def synthetic_rows(
    path: Path, count: int, bounds: tuple[int, int, int], *, answer: tuple[int, int], vocabulary: int
) -> None:
    """Prompts of lognormal length (median, shortest, longest) and short answers, as text of "t17" words."""
    median, shortest, longest = bounds
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        length = min(longest, max(shortest, round(median * draw.lognormvariate(0, 0.45))))
        words = [f"t{draw.randrange(3, vocabulary)}" for _ in range(length + draw.randint(*answer))]
        # The space between the two belongs to the prompt and is no token.
        lines.append({"prompt": " ".join(words[:length]) + " ", "response": " ".join(words[length:]) + " "})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_work(
    kind: str,
    directory: Path,
    *,
    steps: int,
    seed: int = 0,
    small_rows: bool = False,
    shape: dict[str, Any] | None = None,
    prompts: tuple[int, int, int] = (600, 200, 1024),
    model: Path | None = None,
    more: Sequence[str] = (),
) -> Work:
    """Work of one kind, in an empty directory.

    `short_answers`: prompts of 200 to 1024 tokens (median 600), answers of 4 to 32, on the small model; `alpaca`: rows
    of instructions, all answer tokens learned, on the same; `stories`: shorter rows on stories260K of context 512.
    `small_rows` shortens the rows, for comparing losses over many steps. `shape`, which changes the small model, and
    `prompts` (median, shortest, longest) are for short answers, `more` is set in llmft's config, and peers follow.
    `model` is the directory of a real one for `alpaca` and `short_answers`: its own tokenizer and chat template, and
    short answers to prompts of real text that fill 512 tokens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = steps * BATCH_SIZE + 1
    file = directory / "rows.jsonl"
    if model is not None:
        return _real(kind, model, directory, steps, seed, more)
    if kind == "short_answers":
        changed = {**SMALL, **(shape or {})}
        base = small_model(directory / "model", changed)
        bounds, answer = ((12, 8, 24), (4, 8)) if small_rows else (prompts, (4, 32))
        synthetic_rows(file, rows, bounds, answer=answer, vocabulary=changed["vocab_size"])
    elif kind == "stories":
        base = SHARED / "models" / "stories260K"
        _letters(file, rows, 200, 60, 400)
    elif kind == "alpaca":
        return _alpaca(directory, steps, seed, more)
    else:
        raise ValueError(f"no work of this kind: {kind}")
    overrides = [f"model.path={base}", "prompt=plain", "data=prompt_response", f"data.files={file}", *more]
    return _finish(directory, overrides, steps, seed)


def _real(kind: str, model: Path, directory: Path, steps: int, seed: int, more: Sequence[str]) -> Work:
    """Rows of Alpaca for a real model, unchanged or as prompts of 512 tokens with answers of a few words."""
    alpaca = SHARED / "instruction" / "llamafactory_alpaca_en_demo.json"
    overrides = [f"model.path={model}", "prompt=native", "data=alpaca", f"data.files={alpaca}", *more]
    if kind == "short_answers":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = json.loads(alpaca.read_text())
        draw = random.Random(0)
        lines = []
        for _ in range(steps * BATCH_SIZE + 1):
            texts = " ".join(row["output"] for row in draw.sample(rows, 20))
            prompt = tokenizer.decode(tokenizer(texts, truncation=True, max_length=440)["input_ids"])
            answer = " ".join(draw.choice(rows)["instruction"].split()[:8])
            lines.append(json.dumps({"prompt": prompt, "response": answer}) + "\n")
        (directory / "rows.jsonl").write_text("".join(lines))
        overrides[2:4] = ["data=prompt_response", f"data.files={directory / 'rows.jsonl'}"]
    return _finish(directory, overrides, steps, seed)


def _letters(path: Path, count: int, median: int, shortest: int, longest: int) -> None:
    """Prompts of words that the 512 tokens of stories260K spell."""
    draw = random.Random(0)
    words = "the dog was happy and she ran to him one day".split()  # noqa: SIM905
    lines = []
    for _ in range(count):
        length = min(longest, max(shortest, round(median * draw.lognormvariate(0, 0.45)))) // 2
        prompt = " ".join(draw.choice(words) for _ in range(length))
        lines.append(
            {"prompt": prompt, "response": " " + " ".join(draw.choice(words) for _ in range(draw.randint(2, 16)))}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _alpaca(directory: Path, steps: int, seed: int, more: Sequence[str]) -> Work:
    model = llama2_words(directory / "model")
    file = SHARED / "instruction" / "llamafactory_alpaca_en_demo.json"
    overrides = [f"model.path={model}", "prompt=alpaca", "data=alpaca", f"data.files={file}", *more]
    return _finish(directory, overrides, steps, seed)


def _finish(directory: Path, overrides: list[str], steps: int, seed: int) -> Work:
    overrides = [
        "model=local",
        "quantization=none",
        "logger=none",
        "data.max_tokens=2048",
        "learning_rate=constant",
        "learning_rate.peak=1e-3",
        "learning_rate.warmup_steps=0",
        f"trainer.max_steps={steps}",
        f"trainer.validate_every={steps}",
        "trainer.precision=fp32",
        "trainer.accelerator=cpu",
        "data.validation_fraction=0.001",
        "data.max_overlap_fraction=1.0",
        "task.generate_rows=0",
        "task.metrics=[]",
        f"seed={seed}",
        f"output_dir={directory / 'outputs'}",
        *overrides,
    ]
    return dump(directory, overrides, steps)


def dump(directory: Path, overrides: list[str], steps: int, adapter: str = "adapter") -> Work:
    """Writes for peers what llmft would train under `overrides`: rows, order and initial adapter."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from llmft.core.seeds import stream
    from llmft.data.batch import rows_of_step
    from llmft.model.adapters import attach, trainable_state
    from llmft.training.prepare import prepare
    from llmft.training.tokenized_data import read_rows

    config = compose(*overrides)
    prepared = prepare(config, open_directory=False)
    examples = read_rows(prepared, print).splits["train"]
    batches = [rows_of_step(step, len(examples), config.trainer.batch_size, config.seed) for step in range(steps)]
    used = sorted({row for batch in batches for row in batch})
    position = {row: number for number, row in enumerate(used)}
    rows = [[list(map(int, examples[row].input_ids)), list(map(int, examples[row].labels))] for row in used]
    model_directory = str(prepared.located.directory)
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    adapted = attach(base, config.lora, auto_class="causal_lm", seed=stream(config.seed, "lora"), name="base")
    adapter_file = directory / f"{adapter}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in trainable_state(adapted).items()}, adapter_file)
    work = {
        "model": model_directory,
        "adapter": str(adapter_file),
        "quantization": config.quantization.format.value,
        "r": config.lora.r,
        "alpha": config.lora.scaling_alpha,
        "rate": config.learning_rate.peak,
        "clip": config.trainer.gradient_clip,
        "batches": [[position[row] for row in batch] for batch in batches],
        "rows": rows,
        "pad": int(base.config.pad_token_id or 0),
        "overrides": overrides,
    }
    (directory / f"{adapter.replace('adapter', 'work')}.json").write_text(json.dumps(work))
    lengths = [len(ids) for ids, _ in rows]
    labelled = [sum(label != -100 for label in labels[1:]) for _, labels in rows]
    return Work(directory, overrides, work["batches"], lengths, labelled)
