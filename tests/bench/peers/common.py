"""Code that the runners share: reading the work, and taking steps on demand.

A runner is a process `python run_NAME.py WORK.json`. It reads numbers of steps from its standard input, takes that
many optimizer steps, and answers each with one line of JSON on its standard output; all other output of libraries goes
to the standard error. It imports nothing of llmft's.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def read_work() -> dict[str, Any]:
    """The work of the command line, its rows in the order of its steps."""
    with open(sys.argv[1]) as file:
        work: dict[str, Any] = json.load(file)
    if work.get("sorted"):  # the same rows in each step, those of like length next to each other
        rows = work["rows"]
        work["batches"] = [sorted(batch, key=lambda row: (-len(rows[row][0]), row)) for batch in work["batches"]]
    return work


def labelled(row: list[list[int]]) -> int:
    """The number of labelled tokens of a row without its first, which nothing predicts."""
    return sum(label != -100 for label in row[1][1:])


def set_threads(work: dict[str, Any]) -> None:
    """Sets the work's number of threads, if it has one."""
    import torch

    if work.get("threads"):
        torch.set_num_threads(work["threads"])


def load_adapter(model: Any, work: dict[str, Any]) -> None:
    """Loads the work's initial adapter into a PEFT model; every tensor must match."""
    from safetensors.torch import load_file

    state = load_file(work["adapter"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(state) != set(parameters):
        raise SystemExit(f"the adapter does not fit: {sorted(set(state) ^ set(parameters))[:4]}")
    for name, parameter in parameters.items():
        parameter.data.copy_(state[name])


def peft_model(work: dict[str, Any]) -> Any:
    """The base in fp32, or in NF4 computing in fp32, with LoRA on all linear layers, as PEFT makes it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how: dict[str, Any] = {}
    if work["quantization"] == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32, **how)
    lora = peft.LoraConfig(
        r=work["r"], lora_alpha=work["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora)
    load_adapter(model, work)
    return model


def rows_in_order(work: dict[str, Any]) -> list[Any]:
    """The rows of all steps, one after the other."""
    return [work["rows"][row] for batch in work["batches"] for row in batch]


def tokenizer_of(work: dict[str, Any]) -> Any:
    """The model's tokenizer, which pads on the right."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(work["model"], padding_side="right")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work["pad"])
    return tokenizer


def trainer_arguments(work: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Arguments for trainers of transformers and TRL: fp32 on the CPU, a constant rate, nothing logged or saved."""
    steps = {}
    if "batches" in work:
        steps = {
            "per_device_train_batch_size": work["micro"],
            "gradient_accumulation_steps": len(work["batches"][0]) // work["micro"],
            "max_steps": len(work["batches"]),
        }
    return {
        **steps,
        "output_dir": tempfile.mkdtemp(),
        "learning_rate": work["rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": work["clip"],
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


class Gate:
    """Lets steps pass, and records their losses and seconds, and a reference's seconds."""

    def __init__(self) -> None:
        self.left = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu = 0.0
        self.first_at: float | None = None
        self.first_cpu = 0.0
        self.reference_s = 0.0
        self._began = 0.0
        self._cpu_began = 0.0

    def begin(self) -> None:
        """Waits for permission to take a step."""
        while self.left == 0:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)
            self.left = int(line)
            self.losses, self.seconds = [], []
            self._cpu_began = time.process_time()
        self._began = time.perf_counter()

    def end(self, loss: float) -> None:
        """Records a step whose loss, the mean over the labelled tokens of the effective batch, was `loss`."""
        self.seconds.append(time.perf_counter() - self._began)
        self.losses.append(float(loss))
        if self.first_at is None:
            self.first_at, self.first_cpu = time.time(), time.process_time()
        self.left -= 1
        if self.left == 0:
            answer = {
                "losses": self.losses,
                "seconds": self.seconds,
                "cpu": time.process_time() - self._cpu_began,
                "first_at": self.first_at,
                "first_cpu": self.first_cpu,
                "reference_s": self.reference_s,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
            _answers.write(json.dumps(answer) + "\n")
            _answers.flush()


def gated(trainer_class: type, gate: Gate, *, in_order: bool = True, mean: bool = False) -> tuple[Any, Any]:
    """A trainer of transformers' kind, and the callback that opens `gate` for a step.

    With `in_order` the trainer is made to take the rows in order; without it, its own settings must do so.

    A step's recorded loss is the sum of its micro-batches' shares, or their `mean` where a trainer divides each by
    their number only after computing it.
    """
    import torch
    from transformers import TrainerCallback

    seen: list[torch.Tensor] = []

    class LossRecorder(trainer_class):  # type: ignore[misc]
        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            output = super().compute_loss(*arguments, **named)
            seen.append((output[0] if isinstance(output, tuple) else output).detach())
            return output

    class InOrder(LossRecorder):
        def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class GateCallback(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            gate.begin()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            gate.end(float(sum(seen)) / (len(seen) if mean else 1))
            seen.clear()

    return InOrder if in_order else LossRecorder, GateCallback()
