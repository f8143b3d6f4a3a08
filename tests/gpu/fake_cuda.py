"""Training steps on a CUDA device that does not exist: `python -m tests.gpu.fake_cuda LIBRARY CASE…`.

Tensors without storage go through the product's model, kernels, loss, backward, clipping and optimizer: devices and
dtypes are as on a GPU, numbers are not. A CASE is architecture/precision/change, optionally followed by a task. One
JSON line per case lists operations over two devices, where the host would wait for the GPU, and how attention
was computed.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import json
import os
import sys
import traceback
from typing import Any

LENGTHS = [61, 40, 38, 23, 22, 21, 7]
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_", "is_nonzero", "equal", "bincount")
"""Operations on the device for which the host waits; an index by a mask comes as nonzero."""


def load_device(library: str) -> None:
    """Runs before torch is used, which looks for devices only once."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(os.path.join(os.path.dirname(spec.origin), "lib", name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


def be_a_gpu(capability: tuple[int, int]) -> None:
    """Makes torch.cuda answer like a GPU of this capability."""
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # A tensor whose numbers nobody knows: torch would really copy one that it knows. What is not pinned does so.
    torch.Tensor.pin_memory = lambda tensor, *a: torch.empty_like(tensor)  # type: ignore[method-assign]


def watch() -> Any:
    """A mode that records operations over two devices and waits for the GPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.mixed: list[str] = []
            self.waits: collections.Counter[str] = collections.Counter()
            self.varlen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func).removeprefix("aten.")
            self.varlen += "varlen" in name
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            on_device = any(t.device.type == "cuda" for t in tensors)
            self.waits[name] += on_device and any(name.startswith(wait) for wait in WAITS)
            self.waits[name] += name.startswith("_to_copy") and waits_for_copy(tensors[0].device, kwargs or {})
            self.waits[name] += name.startswith("copy_") and tensors[0].device != tensors[1].device
            if len({t.device.type for t in tensors if t.ndim > 0}) > 1 and "copy" not in name:
                self.mixed.append(name)
            return func(*args, **(kwargs or {}))

    return Watch()


def waits_for_copy(source: Any, arguments: dict[str, Any]) -> bool:
    """Whether the host waits for a copy between the devices."""
    target = arguments.get("device") or source
    return {source.type, target.type} == {"cpu", "cuda"} and not arguments.get("non_blocking")


def note_attention() -> Any:
    """A mode that records which of torch's attention kernels a GPU would use for each call."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Attention(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.kernels: collections.Counter[str] = collections.Counter()

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.nn.functional.scaled_dot_product_attention:
                grouped, masked = bool(kwargs.get("enable_gqa")), kwargs.get("attn_mask") is not None
                ampere = torch.cuda.get_device_capability()[0] >= 8
                flash = ampere and not masked and args[0].dtype in (torch.float16, torch.bfloat16)
                self.kernels["flash" if flash else "math" if grouped else "efficient"] += 1
            return func(*args, **kwargs)

    return Attention()


def moved(model: Any) -> None:
    """Gives every tensor of `model` a twin without storage on the device; call inside the fake mode."""
    import torch

    known: dict[int, tuple[Any, Any]] = {}

    def twin(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if id(tensor) not in known:
            fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                state = getattr(tensor, "quant_state", None)
                if state is not None:
                    move_state(state)
                    fake.quant_state, fake.bnb_quantized = state, True
            known[id(tensor)] = tensor, fake
        return known[id(tensor)][1]

    def move_state(state: Any) -> None:
        for part in filter(None, (state, getattr(state, "state2", None))):
            for name, value in list(vars(part).items()):
                setattr(part, name, twin(value) if isinstance(value, torch.Tensor) else value)

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                table[name] = twin(tensor)
        state = getattr(module, "quant_state", None)
        if state is not None and not hasattr(getattr(module, "weight", None), "quant_state"):
            move_state(state)


AUTO_CLASS = {
    "classify": "sequence_classification",
    "reward": "sequence_classification",
}


def load(architecture: str, dtype: Any, change: str, task: str) -> tuple[Any, Any]:
    """(base, adapted model), on the CPU."""
    import torch

    from llmft.config.model import LoraConfig, QuantizationConfig, QuantizationFormat
    from llmft.config.trainer import Checkpointing
    from llmft.data.hub import Located
    from llmft.model import adapters
    from llmft.model.checkpointing import set_checkpointing
    from llmft.model.heads import renew_head
    from llmft.model.load import load_base
    from tests.model.test_twins import FIRST, twin

    auto_class = AUTO_CLASS.get(task, "causal_lm")
    base = load_base(
        twin(FIRST[architecture]),
        Located(None, "random"),
        QuantizationConfig(QuantizationFormat.none if change == "none" else QuantizationFormat.nf4),
        auto_class=auto_class,
        num_labels=1 if task == "reward" else 3,
        dtype=dtype,
        device=torch.device("cpu"),
        seed=1,
        keep_base=False,
    )
    if auto_class != "causal_lm":
        renew_head(base, 0)
        base.config.pad_token_id = 0
    lora = LoraConfig(
        r=4,
        dropout=0.1 if change == "dropout" else 0.0,
        modules_to_save=["lm_head", "embed_tokens"] if change == "whole" else [],
    )
    model = adapters.attach(base, lora, auto_class=auto_class, seed=3, name="x").train()
    set_checkpointing(base, Checkpointing.full if change == "full" else Checkpointing.none)
    return base, model


def batch_of(task: str) -> Any:
    """Rows of a task, on the host."""
    import numpy as np
    import torch

    from llmft.data.batch import PolicyRows, collate
    from llmft.data.columns import Conversation
    from llmft.data.examples import IGNORE, Example
    from llmft.data.preferences import Comparison

    compared = task in ("dpo", "kto", "reward")
    examples = []
    for row, length in enumerate(LENGTHS):
        comparison = Comparison(("b",), (0, 1), desirable=bool(row % 2) if task == "kto" else None)
        target = row % 3 if task in ("classify", "words") else None
        conversation = Conversation([], f"x:{row}", target, comparison if compared else None)
        ids = [5 + n % 100 for n in range(length)]
        labels = [IGNORE] * (length - 3) + ids[-3:]
        segments = np.array([0] * (length - 4) + [1, 1, 2, 2]) if compared else None
        examples.append(Example(ids, labels, conversation, segments))
    batch = collate(examples, range(len(examples)), 0)
    if task == "grpo":
        shape = batch.labels[:, 1:].shape
        batch.policy = PolicyRows(torch.zeros(shape), old=torch.zeros(shape), reference=torch.zeros(shape))
    if task in ("dpo", "kto"):
        batch.answers.reference = torch.zeros(len(examples), 2, dtype=torch.float64)
    assert batch.lengths
    assert len(batch.positions)
    return batch


def objective_of(task: str) -> Any:
    """The objective of a task."""
    from llmft.training.objectives.classification import Classification
    from llmft.training.objectives.language_modeling import LanguageModeling
    from llmft.training.objectives.policy import PolicyGradient
    from llmft.training.objectives.preference import Kto, Preference
    from llmft.training.objectives.reward import Reward
    from llmft.training.objectives.verbalizer import LabelWordScorer

    makers: dict[str, Any] = {
        "dpo": Preference,
        "kto": Kto,
        "reward": Reward,
        "classify": Classification,
        "words": lambda: Classification(scores=LabelWordScorer([(7, 2), (8, 2), (8, 9)])),
        "grpo": lambda: PolicyGradient(kl=0.1),
    }
    return makers.get(task, LanguageModeling)()


def step(case: str) -> dict[str, Any]:
    """The recorded facts of one step of `case`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llmft.model.kernels import rmsnorm_swiglu
    from llmft.model.kernels.packing import takes_varlen, uses_packing

    architecture, precision, change, task = [*case.split("/"), "text"][:4]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    torch.cuda.is_available = lambda: False
    base, model = load(architecture, dtype, change, task)
    batch, objective, device = batch_of(task), objective_of(task), torch.device("cuda")
    be_a_gpu((7, 5) if precision == "fp16" else (8, 0))
    rmsnorm_swiglu.can_fuse = lambda device: False  # there is no compiler for a device without a driver
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved(model)
        seen, attention = watch(), note_attention()
        with seen, attention:
            batch = batch.to(device)
            with torch.autocast("cuda", dtype=dtype, enabled=precision != "fp32", cache_enabled=False):
                varlen = takes_varlen(base)
                if hasattr(objective, "before_step"):
                    objective.begin_step(objective.before_step(model, [batch]))
                losses = objective.losses(model, batch)
                loss = (losses.nll * batch.weights).sum() / 2.0
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=False)
            scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.requires_grad], 1.0, norm)
            optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "packed": uses_packing(base),
        "varlen": varlen,
        "mixed": seen.mixed,
        "waits": {name: count for name, count in seen.waits.items() if count},
        "attention": {**attention.kernels, "varlen": seen.varlen},
        "trained": sorted({str(p.dtype) for p in trained}),
        "without_gradient": sum(p.grad is None for p in trained),
        "devices": sorted({str(g.device) for g in gradients}),
    }


def main() -> None:
    library, *cases = sys.argv[1:]
    load_device(library)
    import warnings

    warnings.simplefilter("ignore")
    from llmft.core.imports import load_libraries

    load_libraries(training=False)
    for case in cases:
        try:
            facts = step(case)
        except Exception as error:
            facts = {
                "error": f"{type(error).__name__}: {error}"[:500],
                "trace": traceback.format_tb(error.__traceback__)[-6:],
            }
        print(json.dumps({"case": case, **facts}), flush=True)


if __name__ == "__main__":
    main()
