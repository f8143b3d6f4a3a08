"""Logits and negative log-likelihoods of a language model, computed only at the given positions."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmft.data.batch import MicroBatch, send
from llmft.model.families import base_of, body_of, evaluating, selects_positions
from llmft.model.heads import positions_at_a_time
from llmft.model.kernels.packing import Positions, inputs_of
from llmft.model.sharding import is_sharded


def logits_at(model: Any, input_ids: torch.Tensor, lengths: Sequence[int], positions: Positions) -> torch.Tensor:
    """(positions, vocabulary) logits at `positions`, rows and columns of the (rows, seq_len) `input_ids`, row by row.

    `lengths` are the rows' tokens without padding, which model families with packing never see.
    """
    return logits_after(model, *inputs_of(base_of(model), input_ids, lengths, positions))


def nll_at(model: Any, batch: MicroBatch, temperature: float = 1.0) -> torch.Tensor:
    """(labelled tokens,) negative log-likelihoods in nats of the labels of `batch`, row by row.

    They are those of softmax(logits / temperature).
    """
    rows, columns = batch.positions
    (labelled,) = send([rows * batch.labels.shape[1] + columns + 1], batch.labels.device)
    targets = batch.labels.reshape(-1)[labelled]
    arguments, positions = inputs_of(base_of(model), batch.input_ids, batch.lengths, batch.positions)
    return _nll_at(model, arguments, positions, None, targets, temperature)


def nll_after(model: Any, arguments: dict[str, Any], positions: np.ndarray, targets: torch.Tensor) -> torch.Tensor:
    """(targets,) negative log-likelihoods in nats of `targets`, each the token after one of `positions`.

    Like `nll_at`, but a position, counted over all rows of the forward's tokens, may have several targets.
    """
    once, order = send(np.unique(positions, return_inverse=True), targets.device)
    return _nll_at(model, arguments, once, order, targets, 1.0)


def _nll_at(
    model: Any,
    arguments: dict[str, Any],
    positions: torch.Tensor,
    order: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """(targets,) nats of `targets` after `positions`, or after `positions[order]`.

    Many targets are computed in chunks of logits, each with its gradient: the same numbers, with memory for hidden
    states instead of the vocabulary.
    """
    base = base_of(model)
    most = positions_at_a_time(base.config.get_text_config().vocab_size, targets.device.type)
    if len(targets) > most and uses_chunks(base):
        predictors = positions if order is None else positions[order]
        hidden = body_of(base)(**arguments).last_hidden_state.flatten(0, 1)[predictors]
        losses: torch.Tensor = _ChunkedNll.apply(hidden, targets, base, most, temperature)
        return losses
    if order is None:
        return _nll(logits_after(model, arguments, positions), targets, temperature)
    return _nll(logits_after(model, arguments, positions)[order], targets, temperature)


def logits_after(model: Any, arguments: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary) logits at ascending positions, counted over all rows of the forward's tokens."""
    model_class: type = type(base_of(model))
    if not selects_positions(model_class):
        return model(**arguments).logits.flatten(0, 1)[positions]
    if len(arguments["input_ids"]) == 1:
        return model(**arguments, logits_to_keep=positions).logits[0]

    def at_positions(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0].flatten(0, 1)[positions]

    # With a mask as logits_to_keep, the CPU would wait for the GPU to count the kept positions.
    hook = base_of(model).get_output_embeddings().register_forward_pre_hook(at_positions)
    try:
        return model(**arguments).logits
    finally:
        hook.remove()


def uses_chunks(base: Any) -> bool:
    """Whether `_logits_of` gives the model's logits, and its head is not trained."""
    model_class: type = type(base)
    head = base.get_output_embeddings()
    if head is None or not selects_positions(model_class) or is_sharded(base):
        return False
    inside = {id(module) for module in body_of(base).modules()}
    outside = [module for module in base.modules() if id(module) not in inside and module is not base]
    if any(p.requires_grad for module in [*outside, head] for p in module.parameters()):
        return False
    if base not in _plain_heads:
        _plain_heads[base] = _has_plain_head(base)
    return _plain_heads[base]


_plain_heads: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _has_plain_head(base: Any) -> bool:
    """Whether `_logits_of` is all that a model does after its body: some scale their logits."""
    ids = torch.arange(4, device=base.device)[None]
    with evaluating(base):
        logits = base(input_ids=ids, use_cache=False).logits[0].float()
        same = _logits_of(base, body_of(base)(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    return torch.allclose(same, logits, rtol=0, atol=1e-2 * float(logits.abs().max()))


def _logits_of(base: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary) logits of hidden states: the output of the head, with Gemma 2's soft cap."""
    logits: torch.Tensor = base.get_output_embeddings()(hidden)
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _nll(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(positions,) cross-entropy in nats of (positions, vocabulary) logits: torch's numbers in less memory."""
    logits = logits if logits.dtype is torch.float64 else logits.float()
    nll: torch.Tensor = _Nll.apply(logits if temperature == 1 else logits / temperature, targets)
    return nll


class _Nll(torch.autograd.Function):
    """Cross-entropy whose backward turns the saved log-probabilities into the gradient, where torch's own allocates two
    more tensors."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_probs = logits.log_softmax(dim=-1)
        ctx.save_for_backward(log_probs, targets)
        ctx.used = False
        return -log_probs.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        log_probs, targets = ctx.saved_tensors
        if ctx.used:
            raise RuntimeError("a loss has one backward: it overwrites the saved log-probabilities with the gradient")
        ctx.used = True
        scaled = log_probs.exp_().mul_(gradient[:, None])
        return scaled.scatter_add_(1, targets[:, None], -gradient[:, None]), None


class _ChunkedNll(torch.autograd.Function):
    """Computes each chunk's gradient with its logits: a position's loss depends on its own hidden state only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, base: Any, most: int, temperature: float
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for start in range(0, len(targets), most):
            with torch.set_grad_enabled(needs_gradient):
                part = hidden[start : start + most].detach().requires_grad_(needs_gradient)
                # No variable for the logits: they are freed once their log-probabilities are computed.
                nll = _nll(_logits_of(base, part), targets[start : start + most], temperature)
                if needs_gradient:
                    gradients += torch.autograd.grad(nll.sum(), part)
            losses.append(nll.detach())
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        return (saved * gradient[:, None]).to(saved.dtype), None, None, None, None
