"""LitGPT's LoRA model with the body of its own training loop, under Fabric.

Its loss is a mean within each micro-batch and a mean of these, which is the others' only with one micro-batch a step:
it therefore always takes the whole batch at once. Its loop does not clip, so the clipping is ours.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import Gate, read_work, set_threads

work = read_work()
import lightning as L
import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file

set_threads(work)
hf = json.loads((Path(work["model"]) / "config.json").read_text())
config = Config(
    name="work",
    block_size=hf["max_position_embeddings"],
    padded_vocab_size=hf["vocab_size"],
    vocab_size=hf["vocab_size"],
    n_layer=hf["num_hidden_layers"],
    n_head=hf["num_attention_heads"],
    n_query_groups=hf["num_key_value_heads"],
    n_embd=hf["hidden_size"],
    intermediate_size=hf["intermediate_size"],
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    norm_eps=hf["rms_norm_eps"],
    mlp_class_name="LLaMAMLP",
    lora_r=work["r"],
    lora_alpha=work["alpha"],
    lora_dropout=0.0,
    **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")},
)
fabric = L.Fabric(accelerator="cpu", devices=1, precision="32-true")
with fabric.init_module():
    model = GPT(config)
mark_only_lora_as_trainable(model)

state: dict[str, torch.Tensor] = {}
copy_weights_hf_llama(config, {}, state, load_file(Path(work["model"]) / "model.safetensors"), dtype=torch.float32)
adapter = load_file(work["adapter"])


def peft_name(layer: int, module: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{part}.default.weight"


for layer in range(config.n_layer):
    for part in "AB":
        parts = [adapter.pop(peft_name(layer, f"self_attn.{name}_proj", part)) for name in "qkv"]
        state[f"transformer.h.{layer}.attn.qkv.lora_{part}"] = torch.cat(parts)
        for ours, theirs in (
            ("self_attn.o_proj", "attn.proj"),
            ("mlp.gate_proj", "mlp.fc_1"),
            ("mlp.up_proj", "mlp.fc_2"),
            ("mlp.down_proj", "mlp.proj"),
        ):
            state[f"transformer.h.{layer}.{theirs}.lora_{part}"] = adapter.pop(peft_name(layer, ours, part))
if adapter:
    raise SystemExit(f"the adapter does not fit: {sorted(adapter)[:4]}")
# Linear layers under LoRA keep their weight one level deeper.
known = set(model.state_dict())
state = {name if name in known else name.replace(".weight", ".linear.weight"): t for name, t in state.items()}
model.load_state_dict(state, strict=True)
model = fabric.setup_module(model)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=work["rate"], weight_decay=0.0))
gate = Gate()
for batch in work["batches"]:
    gate.begin()
    rows = [work["rows"][row] for row in batch]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=work["pad"])
    targets = pad([torch.tensor(labels) for _, labels in rows], batch_first=True, padding_value=-100)
    logits = model(ids, lm_head_chunk_size=128)
    logits[-1] = logits[-1][..., :-1, :]
    loss = chunked_cross_entropy(logits, targets[..., 1:])
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=work["clip"])
    optimizer.step()
    optimizer.zero_grad()
    gate.end(float(loss.detach()))
