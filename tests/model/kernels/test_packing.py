"""Packed rows give the results of each row alone, in every family; fused LoRA computes the same as PEFT's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmft.config.model import LoraConfig
from llmft.core.errors import ConfigError
from llmft.data.batch import MicroBatch
from llmft.data.hub import Located
from llmft.model import adapters, heads, kernels, logits
from llmft.model.kernels import lora as lora_kernel
from llmft.model.kernels import packing
from llmft.training.objectives.language_modeling import LanguageModeling
from tests.model.test_twins import FILES, FIRST, classifies, load, twin

LENGTHS = [61, 40, 38, 23, 22, 21, 7, 1]
PADDED = ("falcon", "mpt", "deberta-v2")
"""Families whose attention does not go through transformers' interface, or is not causal."""
CAUSAL = sorted(name for name in FIRST if not classifies(FILES[FIRST[name]]))


def base(architecture: str, form: str = "none", **overrides: Any) -> Any:
    name = FIRST[architecture]
    return load(twin(name, **overrides), Located(None, "random"), FILES[name], form)


def rows() -> torch.Tensor:
    ids = torch.randint(5, 512, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None], ids, 0)


def everywhere(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]


def check_as_each_alone(model: Any, ids: torch.Tensor, keep: torch.Tensor) -> None:
    """Logits of packed rows at the places that `keep` marks are those of a forward of each row."""
    with torch.no_grad():
        packed_logits = logits.logits_at(model, ids, LENGTHS, np.nonzero(keep.numpy()))
        alone = [model(input_ids=ids[row : row + 1, :n], use_cache=False).logits[0] for row, n in enumerate(LENGTHS)]
    expected = torch.cat([logits[keep[row, : len(logits)]] for row, logits in enumerate(alone)])
    assert (packed_logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", CAUSAL)
def test_packed_logits_are_those_of_each_row_alone(architecture: str) -> None:
    model, ids = base(architecture), rows()
    assert packing.uses_packing(model) == (architecture not in PADDED and model.config._attn_implementation != "eager")
    check_as_each_alone(model, ids, everywhere(ids))


SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STREAMS = {"head_dim": 8, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
           "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}  # fmt: skip
ODD: dict[str, tuple[dict[str, Any], bool]] = {
    # A layer that asks for attention twice, with other values; one whose states have a dimension more.
    "diffllama": ({}, True),
    "gemma3n_text": (STREAMS, True),
    # Layers that look back without attention: their states would leak from row to row.
    "lfm2": ({"layer_types": ["full_attention", "conv"]}, False),
    "qwen3_5_text": ({**HEADS, "head_dim": 8, **LINEAR}, False),
    "minimax": ({"num_local_experts": 2, **LINEAR}, False),
}


@pytest.mark.parametrize("architecture", ODD)
def test_odd_families_compute_rows_as_each_alone(architecture: str) -> None:
    config, packed = ODD[architecture]
    torch.manual_seed(0)
    model_config = transformers.AutoConfig.for_model(architecture, **{**SIZES, **config})
    model, ids = transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation="sdpa").eval(), rows()
    kernels.install(model)
    assert packing.uses_packing(model) == packed
    check_as_each_alone(model, ids, everywhere(ids))


def test_a_model_that_does_not_tell_attention_of_rows_is_refused() -> None:
    model, ids = base("llama"), rows()
    arguments = packing.pack(model, ids, LENGTHS).arguments
    del arguments["llmft_blocks"]
    with pytest.raises(ConfigError, match="where rows end"):
        model(**arguments)


@pytest.mark.parametrize("window", [None, 16])
def test_a_sliding_window_holds_in_packed_rows_too(window: int | None) -> None:
    model, ids = base("mistral", sliding_window=window), rows()
    check_as_each_alone(model, ids, everywhere(ids))


def test_rows_do_see_each_other_when_they_are_packed_carelessly() -> None:
    # The control: without separation of rows the tests above would fail.
    model, ids = base("llama"), rows()
    flattened = packing.pack(model, ids, LENGTHS)
    careless = {**flattened.arguments, "attention_mask": torch.ones_like(flattened.input_ids)}
    del careless["llmft_blocks"]
    with torch.no_grad():
        right = model(**flattened.arguments).logits
        wrong = model(**careless).logits
    assert (right - wrong).abs().max() > 1e-2


def test_a_model_made_flat_still_generates_with_padding_on_the_left() -> None:
    from llmft.data.ends import Ends
    from llmft.model.generate import generate

    model = base("llama")
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
    options: dict[str, Any] = {"pad_id": 0, "ends": Ends([]), "max_new_tokens": 5}
    together = generate(model, prompts, **options)
    assert together == [generate(model, [prompt], **options)[0] for prompt in prompts]


def test_blocks_hold_all_rows_in_order_and_pad_little() -> None:
    blocks = packing.plan_blocks([1000, 990, 500, 495, 490, 10, 9, 8])
    assert blocks == ((2, 1000), (3, 500), (3, 10))
    assert packing.plan_blocks([7]) == ((1, 7),)
    many = sorted(torch.randint(1, 400, (64,), generator=torch.Generator().manual_seed(1)).tolist(), reverse=True)
    assert sum(rows for rows, _ in packing.plan_blocks(many)) == 64


def micro_batch() -> MicroBatch:
    ids = rows()
    labels = torch.where(torch.arange(ids.shape[1]) % 3 == 1, ids, -100).where(everywhere(ids), torch.tensor(-100))
    return MicroBatch(ids, everywhere(ids).long(), labels, torch.ones(len(ids)), None, list(range(len(ids))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_lora_gives_the_losses_and_gradients_of_pefts_own_forward(
    form: str, dropout: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(r=4, dropout=dropout)
    model = adapters.attach(base("qwen2", form), lora, auto_class="causal_lm", seed=0, name="twin").train()
    assert sum("forward" in layer.__dict__ for layer in lora_kernel.lora_layers(model).values()) == 14
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))

    def run() -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = LanguageModeling().losses(model, micro_batch()).nll.sum() / 50
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return float(loss), gradients

    if dropout:  # the same positions are dropped in both
        fixed = lambda shape: (torch.arange(shape.numel()).view(shape) * 7919) % 10 >= 3  # noqa: E731
        monkeypatch.setattr(lora_kernel, "draw_mask", lambda x, dropout: fixed(x.shape))
        own_dropout = lambda self, x: x * fixed(x.shape[1:] if x.ndim == 3 else x.shape) / 0.7  # noqa: E731
        monkeypatch.setattr(torch.nn.Dropout, "forward", own_dropout)
    loss, gradients = run()
    lora_kernel.uninstall(model)
    reference, expected = run()
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss == pytest.approx(reference, rel=bound)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= bound * expected[name].norm(), name


def test_dora_and_8_bit_layers_keep_pefts_own_forward() -> None:
    for form, lora in (("none", LoraConfig(r=4, dora=True)), ("int8", LoraConfig(r=4))):
        model = adapters.attach(base("llama", form), lora, auto_class="causal_lm", seed=0, name="twin")
        assert not any("forward" in layer.__dict__ for layer in lora_kernel.lora_layers(model).values())


@pytest.mark.parametrize("lora", [LoraConfig(r=4), LoraConfig(r=4, targets=["q_proj", "lm_head"])])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3_text", "mixtral", "falcon"])
def test_losses_in_chunks_are_those_of_all_positions_at_once(
    architecture: str, lora: LoraConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapters.attach(base(architecture), lora, auto_class="causal_lm", seed=0, name="twin").train()
    seen: list[int] = []
    original = logits._logits_of
    spy = lambda *args: (seen.append(len(args[1])), original(*args))[1]  # noqa: E731
    monkeypatch.setattr(logits, "_logits_of", spy)
    weights = torch.rand(len(LENGTHS), generator=torch.Generator().manual_seed(2))

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        losses = LanguageModeling().losses(model, micro_batch())
        (losses.nll * weights).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return losses.nll.detach(), gradients

    at_once, expected = run()
    assert not seen
    monkeypatch.setattr(logits, "positions_at_a_time", lambda vocabulary, device_type: 16)
    parts, gradients = run()
    seen[:1] = []  # one call only checks whether the head is plain
    assert (max(seen) == 16) if isinstance(lora.targets, str) else not seen, "a trained head is not taken apart"
    assert torch.allclose(parts, at_once, rtol=1e-5)
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(gradients, expected, strict=True))
    with torch.no_grad():
        assert torch.allclose(LanguageModeling().losses(model, micro_batch()).nll, at_once, rtol=1e-5)


def test_a_model_that_scales_its_logits_is_not_taken_apart() -> None:
    for scale in (1.0, 0.0625):
        config = transformers.CohereConfig(**{**SIZES, "logit_scale": scale})
        model = transformers.CohereForCausalLM(config)
        assert logits.uses_chunks(model.requires_grad_(False)) == (scale == 1.0)


def reference_varlen(
    query: Any,
    key: Any,
    value: Any,
    of_queries: Any,
    of_keys: Any,
    most_q: int,
    most_k: int,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    """Torch's CUDA kernel as documented, sequence by sequence: the last query is at the last key's position."""
    assert of_queries.dtype == of_keys.dtype == torch.int32
    left, right = window_size
    assert right == 0
    outputs = []
    for row in range(len(of_queries) - 1):
        places = [torch.arange(*each[row : row + 2].tolist()) for each in (of_queries, of_keys)]
        queries, keys = len(places[0]), len(places[1])
        assert queries <= most_q
        assert keys <= most_k
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) & (distance <= (left if left >= 0 else keys))
        parts = (query[places[0]], key[places[1]], value[places[1]])
        q, k, v = (part.transpose(0, 1)[None] for part in parts)
        options = {"attn_mask": seen, "scale": scale, "enable_gqa": enable_gqa}
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)[0].transpose(0, 1))
    return torch.cat(outputs)


def without_groups(
    query: Any, key: Any, value: Any, of_q: Any, of_k: Any, q: int, k: int, scale: Any = None, window_size: Any = None
) -> Any:
    """The same before torch 2.12, where every query head needs its own key and value head."""
    assert query.shape[1] == key.shape[1]
    return reference_varlen(query, key, value, of_q, of_k, q, k, scale, window_size)


@pytest.mark.parametrize(
    ("architecture", "window", "kernel"),
    [
        ("llama", None, reference_varlen),
        ("llama", None, without_groups),
        ("mistral", 16, reference_varlen),
        ("gemma3_text", 16, reference_varlen),
    ],
)
def test_the_variable_length_kernel_is_told_where_rows_end(
    architecture: str, window: int | None, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")

    model, ids = base(architecture, **({} if window is None else {"sliding_window": window})), rows()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(packing, "takes_varlen", lambda model: True)
    check_as_each_alone(model, ids, everywhere(ids))


@pytest.mark.parametrize(
    ("vocabulary", "device", "most"),
    [(32_000, "cpu", 131), (152_000, "cpu", 64), (512, "cpu", 512), (0, "cpu", 512), (152_000, "cuda", 512)],
)
def test_logits_of_a_part_are_small_enough_for_the_allocator_on_a_cpu(vocabulary: int, device: str, most: int) -> None:
    assert heads.positions_at_a_time(vocabulary, device) == most
