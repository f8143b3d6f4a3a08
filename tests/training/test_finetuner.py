"""The loss: nats per labelled token of the whole effective batch, however it is divided."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmft.core.seeds import stream
from llmft.data.batch import MicroBatch, StepBatch, collate, weight_of
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example
from llmft.model.families import selects_positions
from llmft.training.finetuner import deterministic_only, parameter_groups, restore_pages
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.language_modeling import LanguageModeling
from llmft.training.run import train
from tests.conftest import run_directory

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, labelled in [(12, 1), (5, 4), (9, 3), (7, 6), (12, 2), (4, 1)]:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        labels = [IGNORE] * (length - labelled) + ids[length - labelled :]
        rows.append(Example(ids, labels, Conversation([], "f:1")))
    return rows


def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(CONFIG)


def reference_gradient() -> tuple[float, list[torch.Tensor]]:
    """(loss, gradients) by definition: each row alone, unpadded, full logits, the sum over all labelled tokens."""
    net = model()
    total, count = torch.zeros(()), 0
    for row in examples():
        logits = net(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        count += int((labels != IGNORE).sum())
    loss = total / count
    loss.backward()
    return float(loss), [p.grad for p in net.parameters() if p.grad is not None]


def gradient_of(groups: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
    net, rows = model(), examples()
    weight = sum(weight_of(row) for row in rows)
    loss = torch.zeros(())
    for group in groups:
        batch = collate([rows[n] for n in group], group, pad_id=0)
        losses = LanguageModeling().losses(net, batch)
        part = (losses.nll * batch.weights).sum() / weight
        part.backward()
        loss += part.detach()
    return float(loss), [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "groups", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0, 5], [1, 4], [2, 3]], [[0], [1], [2], [3], [4], [5]]]
)
def test_r11_k_micro_batches_of_b_equal_one_batch_of_k_times_b(groups: list[list[int]]) -> None:
    expected_loss, expected = reference_gradient()
    loss, gradients = gradient_of(groups)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert len(gradients) == len(expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_r11_a_mean_of_means_would_be_caught() -> None:
    expected_loss, _ = reference_gradient()
    net, rows = model(), examples()
    means = []
    for row in rows:
        losses = LanguageModeling().losses(net, collate([row], [0], 0))
        means.append(float(losses.nll[0] / losses.counts[0]))
    assert abs(sum(means) / len(means) - expected_loss) > 1e-3


def test_row_losses_equal_those_of_each_row_alone_without_padding() -> None:
    net, rows = model(), examples()
    together = LanguageModeling().losses(net, collate(rows, range(len(rows)), 0)).nll
    for index, row in enumerate(rows):
        logits = net(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        alone = F.cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORE, reduction="sum")
        assert float(together[index].detach()) == pytest.approx(float(alone.detach()), rel=1e-5)


def test_a_repositorys_own_slice_of_positions_is_not_asked_for_a_mask() -> None:
    """Slices like code for older transformers, which would misread a mask."""
    net, batch = model(), collate(examples(), range(6), 0)
    new = LanguageModeling().losses(net, batch)
    kind = type(net)

    class Slices(kind):  # type: ignore[misc,valid-type]
        def forward(self, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **named: Any) -> Any:
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden = self.model(input_ids, **named).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, positions, :]))

    net.__class__ = Slices
    sliced = LanguageModeling().losses(net, batch)
    torch.testing.assert_close(new.nll, sliced.nll)
    assert torch.equal(new.counts, sliced.counts)
    assert [selects_positions(one) for one in (kind, Slices)] == [True, False]


def test_norms_biases_and_embeddings_are_not_decayed() -> None:
    net = model()
    decayed, others = parameter_groups(net)
    assert others["weight_decay"] == 0.0
    assert net.model.embed_tokens.weight in set(others["params"])
    assert net.model.norm.weight in set(others["params"])
    assert net.model.layers[0].mlp.up_proj.weight in set(decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(net.parameters()))


def test_streams_of_one_seed_differ_by_place_and_repeat() -> None:
    assert stream(0, "dropout", 1) == stream(0, "dropout", 1)
    assert len({stream(seed, "dropout", step) for seed in range(10) for step in range(10)}) == 100
    assert 0 <= stream(0, "lora") < 2**63


def test_r12_a_loss_that_is_not_a_number_stops_before_the_optimizer_step(small: Callable[..., Any]) -> None:
    from llmft.core.errors import DivergedError
    from llmft.train import train

    with pytest.raises(DivergedError, match=r"gradient norm|loss") as error:
        train(small("learning_rate.peak=1e30", "learning_rate.warmup_fraction=0.0"), quiet=True)
    assert error.value.exit_code == 3
    assert "writers:train:" in str(error.value)


def test_a_step_batch_moves_as_a_whole() -> None:
    batch = StepBatch(0, [collate(examples(), range(6), 0)], 1.0)
    moved = batch.to(torch.device("meta"))
    assert moved.micro_batches[0].input_ids.device.type == "meta"


class Unsure(LanguageModeling):
    """Has no deterministic form, like some CUDA operations; records where that was forbidden."""

    forbidden: ClassVar[list[bool]] = []

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        strict = (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        if torch.is_grad_enabled():
            self.forbidden.append(strict)
        if strict:
            raise RuntimeError("unsure_cuda does not have a deterministic implementation, but you set …")
        return super().losses(model, batch)


def test_a_step_forbids_what_is_not_deterministic_unless_there_is_nothing_else(
    small: Callable[..., Any], tmp_path: Path
) -> None:
    Unsure.forbidden.clear()
    train(small("task.objective=tests.training.test_finetuner.Unsure", "trusted_packages=[tests]"), quiet=True)
    status = json.loads((run_directory(tmp_path) / "run.json").read_text())
    assert status["status"] == "done"
    assert status["not_deterministic"] == "unsure_cuda"
    assert Unsure.forbidden[0] is True
    assert not any(Unsure.forbidden[1:])


def modes() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(("enabled", "warn_only"), [(False, False), (True, True), (True, False)])
def test_a_training_leaves_the_modes_of_the_process_as_they_were(
    small: Callable[..., Any], enabled: bool, warn_only: bool
) -> None:
    earlier, filled = modes()[:2], modes()[2]
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with deterministic_only(True):
            assert modes()[:2] == (True, False)
        assert modes() == (enabled, warn_only, True)
        train(small("trainer.max_steps=1", "trainer.validate_every=1", "task.generate_rows=0"), quiet=True)
        assert modes() == (enabled, warn_only, True)
    finally:
        torch.use_deterministic_algorithms(earlier[0], warn_only=earlier[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def test_states_of_a_paged_optimizer_go_back_into_pages() -> None:
    from bitsandbytes.optim import PagedAdamW32bit

    class OnGpu(PagedAdamW32bit):
        def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            pages.append(torch.zeros_like(p, dtype=dtype))
            return pages[-1]

    pages: list[torch.Tensor] = []
    weight = torch.nn.Parameter(torch.ones(8))
    before, after = OnGpu([weight]), OnGpu([weight])
    weight.grad = torch.arange(8.0)
    before.step()
    after.load_state_dict(before.state_dict())
    restore_pages(after)
    for name in ("state1", "state2"):
        assert any(after.state[weight][name] is page for page in pages)
        assert torch.equal(after.state[weight][name], before.state[weight][name])
