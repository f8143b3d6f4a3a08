"""The LightningModule: trains a given model with a given objective, optimizer and schedule.

One Lightning batch is one effective batch, hence one optimizer step: its micro-batches are accumulated inside
`training_step` (manual optimization). So the loss is divided by the labelled tokens of the effective batch, over all
micro-batches and devices, and no stop, save or validation can fall inside an accumulation window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import lightning as L
import torch

from llmft.config.data import TrainOn
from llmft.config.trainer import OnNan
from llmft.core.errors import ConfigError, DivergedError
from llmft.core.machine import RETURN_EVERY_STEPS, return_freed_memory
from llmft.core.seeds import stream
from llmft.data.batch import MicroBatch, StepBatch
from llmft.model.adapters import load_trainable_state, trainable_state
from llmft.model.checkpointing import Offloaded
from llmft.model.families import evaluating
from llmft.model.sharding import full_tensor, is_sharded, shard, sharded_like
from llmft.training.divergence import MOST_UNSCALED, NonFiniteStep, too_many_skipped, write_bad_step
from llmft.training.objectives.base import RowLosses
from llmft.training.parts import Parts
from llmft.training.prepare import RunInputs
from llmft.training.readiness import Readiness
from llmft.training.rollouts import Rollouts
from llmft.training.samples import Generation, make_generation
from llmft.training.schedule import make_schedule
from llmft.training.scoring import make_scoring
from llmft.training.validation import ValidatedRow, Validation, validation_of

Accumulated = tuple[torch.Tensor, list[tuple[list[int], torch.Tensor]]]


@contextmanager
def deterministic_only(strict: bool) -> Iterator[None]:
    """With `strict`, operations without a deterministic form raise RuntimeError inside.

    A warning is not enough: fused attention uses its deterministic backward only where the other is forbidden.
    """
    if not strict:
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def restore_pages(optimizer: Any) -> None:
    """Moves the loaded states of a paged bitsandbytes optimizer into pages, which loading itself does not do."""
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                pages = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = pages.copy_(state[name])


def _with_gradient(optimizer: Any) -> list[Any]:
    """The parameters that have a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The trained parameters in two groups: biases, norms and embeddings get no weight decay.

    Decay on a tied embedding keeps the logits of rare answers low: 0.19 against 0.03 nats on a small example.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])


class FineTuner(L.LightningModule):
    """Trains the trainable parameters of `model`.

    Attributes:
        step: optimizer steps taken since the run began, over all its processes and resumptions.
        train_metrics: loss, rate and gradient norm of the last step.
        validation: the last validation.
        skipped: steps left out because their loss or gradient was not finite, from 1.
        stepping: whether the optimizer is stepping: then weights and optimizer states are out of sync.
    """

    def __init__(
        self,
        inputs: RunInputs,
        ready: Readiness,
        parts: Parts,
        model: Any,
        rollouts: Rollouts | None,
        warn: Callable[[str], None] | None,
    ) -> None:
        """`rollouts` make a step's batch of answers that the model samples itself.

        `warn` gets skipped steps and operations that are not deterministic; it is None except in the first process.
        """
        super().__init__()
        self.automatic_optimization = self.strict_loading = False
        config, trainer, rows = inputs.config, inputs.config.trainer, ready.rows
        self.inputs, self.rows, self.model, self.rollouts, self.warn = inputs, rows, model, rollouts, warn
        self.objective, self.make_optimizer, self.metrics = ready.objective, parts.make_optimizer, parts.metrics
        self.learning_rate = make_schedule(config.learning_rate, rows.total_steps)
        self.seed, self.gradient_clip, self.strict = config.seed, trainer.gradient_clip, trainer.deterministic
        self.scoring = make_scoring(config.task, parts.metrics, rows.splits, config.data.degrees)
        self.trained_on_validation = config.data.train_on is TrainOn.all
        self.skip_non_finite_steps = trainer.on_nan is OnNan.skip
        # The CPU's activations are in its memory already.
        offloads = trainer.offload_activations and ready.device.type == "cuda"
        self.saved_tensors_context = partial(Offloaded, model) if offloads else nullcontext
        self.logs_step_metrics = bool(trainer.callbacks)
        self.skipped: list[int] = []
        self.stepping = False
        self.step = 0
        self.train_metrics: dict[str, float] = {}
        self.validation: Validation | None = None
        self._grad_norm = 0.0
        self._unscaled = 0
        self._losses: list[tuple[list[int], RowLosses]] = []
        self._pending_optimizer: dict[str, dict[str, Any]] | None = None
        self.generate_for("validation")

    def generate_for(self, split: str) -> None:
        """Sets which samples validations generate for: those of `split`."""
        judge = None if self.rollouts is None else self.rollouts.judge
        self.generation = make_generation(self.inputs.config, self.rows, self.metrics, split, judge)

    # ------------------------------------------------------------------------------------------------- training

    def configure_model(self) -> None:
        """Shards the weights among the processes under FSDP2; Lightning may call it more than once."""
        from lightning.pytorch.strategies import ModelParallelStrategy

        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(self.model):
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trainable parameters, with the state of the last checkpoint if there is one."""
        optimizer = self.make_optimizer(parameter_groups(self.model))
        if self._pending_optimizer is not None:
            self._load_optimizer(optimizer, self._pending_optimizer)
            self._pending_optimizer = None
        return optimizer

    def on_fit_start(self) -> None:
        """Raises ConfigError in all processes where they have read different checkpoints."""
        if self.trainer.world_size > 1:
            steps = torch.tensor([self.step, -self.step], device=self.device)
            torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
            most, least = int(steps[0]), -int(steps[1])
            if most != least:
                raise ConfigError(
                    f"trainer.num_nodes: one machine would continue after step {most}, another after step {least}; set "
                    "output_dir to a directory that all of them share."
                )

    def on_train_epoch_start(self) -> None:
        """Switches dropout on: Lightning leaves frozen modules in the mode they are in."""
        self.model.train()

    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, torch.Tensor]:
        """One optimizer step over all micro-batches of `batch`; returns its loss for callbacks.

        Raises DivergedError before the step where loss or gradient is not finite and such steps are not skipped.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        if self.rollouts is not None:
            batch = self.rollouts.batch(self.model, batch.step, self.device)
        rate = self._set_rate(optimizer, batch.step)
        total, row_losses = self._accumulate_deterministically(batch, optimizer)
        gradients = [] if is_sharded(self.model) else [p.grad for p in _with_gradient(optimizer)]
        self._sum_over_processes([total, *gradients])
        value = float(total)
        try:
            if not math.isfinite(value):
                raise NonFiniteStep("loss", value)
            self.stepping = True
            optimizer.step()
        except NonFiniteStep as reason:  # raised before any weight changed
            self._skip(reason, batch.step + 1, rate, row_losses)
        self.stepping = False
        optimizer.zero_grad(set_to_none=True)
        self.step = batch.step + 1
        if self.device.type == "cpu" and self.step % RETURN_EVERY_STEPS == 0:
            return_freed_memory()
        self.train_metrics = {
            "train/loss_nats": value,
            "train/learning_rate": rate,
            "train/gradient_norm": self._grad_norm,
        }
        if self.rollouts is not None:
            self.train_metrics |= self.rollouts.step_metrics()
        if self.skipped:
            self.train_metrics["train/skipped_steps"] = len(self.skipped)
        if self.logs_step_metrics:
            self.log_dict(self.train_metrics, logger=False, batch_size=1)
            self._set_rate(optimizer, self.step)  # as a scheduler would have
        return {"loss": total}

    def _accumulate_deterministically(self, batch: StepBatch, optimizer: Any) -> Accumulated:
        """`_accumulate` by deterministic operations; warns once, and computes again, where one has no such form."""
        try:
            with deterministic_only(self.strict):
                return self._accumulate(batch)
        except RuntimeError as error:
            if not self.strict or "deterministic" not in str(error):
                raise
            self.strict = False
            if self.warn is not None:
                operation = str(error).partition(" does not have")[0].partition(",")[0]
                self.inputs.run.update(not_deterministic=operation)
                self.warn(
                    f"trainer.deterministic: {operation} has no deterministic form here, so that a resumed or repeated "
                    "run may differ in the last bits."
                )
            optimizer.zero_grad(set_to_none=True)
            return self._accumulate(batch)

    def _accumulate(self, batch: StepBatch) -> Accumulated:
        """Adds up the gradients of `batch`; returns its loss, and (rows, their losses) of each micro-batch."""
        # Dropout is a function of (seed, step, process): no generator state has to survive a crash. `torch.manual_seed`
        # would also record a stack trace for unused GPUs, which takes 2 ms.
        generator = torch.default_generator if self.device.type == "cpu" else torch
        generator.manual_seed(stream(self.seed, "dropout", batch.step, self.global_rank))
        # FSDP averages the gradients of the processes; elsewhere they are summed afterwards.
        scale = self.trainer.world_size if is_sharded(self.model) else 1
        total = torch.zeros((), device=self.device)
        row_losses: list[tuple[list[int], torch.Tensor]] = []
        objective: Any = self.objective
        if hasattr(objective, "before_step"):
            shared = objective.before_step(self.model, batch.micro_batches)
            self._sum_over_processes([shared])
            objective.begin_step(shared)
        strategy: Any = self.trainer.strategy
        syncs = self.trainer.world_size > 1 and hasattr(strategy, "block_backward_sync")
        with strategy.block_backward_sync() if syncs else nullcontext():
            for micro in batch.micro_batches:
                with self.saved_tensors_context():
                    losses = self.objective.losses(self.model, micro)
                loss = (losses.nll * micro.weights).sum() / batch.weight
                self.manual_backward(loss * scale)
                total += loss.detach()
                row_losses.append((micro.rows, losses.nll.detach()))
        return total, row_losses

    def _set_rate(self, optimizer: Any, step: int) -> float:
        rate = self.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradient, already unscaled under fp16; raises NonFiniteStep where its norm is not finite."""
        parameters = _with_gradient(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self._grad_norm = float(full_tensor(norm))
        if not math.isfinite(self._grad_norm):
            self._unscaled += 1
            if self.uses_loss_scaling and self._unscaled < MOST_UNSCALED:
                return  # fp16: the scaler skips this step and lowers its scale
            raise NonFiniteStep("gradient norm", self._grad_norm, final=self.uses_loss_scaling)
        self._unscaled = 0
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip, norm)

    def _skip(
        self, reason: NonFiniteStep, step: int, rate: float, row_losses: Sequence[tuple[list[int], torch.Tensor]]
    ) -> None:
        """Records the bad step; raises DivergedError unless it may be skipped."""
        self.stepping = False
        pairs = [pair for rows, nll in row_losses for pair in zip(rows, nll.double().cpu().tolist(), strict=False)]
        losses = sorted(self._gather(pairs))
        train, path = self.rows.splits["train"], ""
        if self.warn is not None:
            facts = {"step": step, "reason": str(reason), "learning_rate": rate}
            path = str(write_bad_step(self.inputs.run, facts, losses, train, self.rows.tokenizer))
            if self.skip_non_finite_steps:
                self.warn(f"{reason} at step {step}, which is skipped; its rows are in {path}.")
        self.skipped.append(step)
        too_many = reason.final or too_many_skipped(self.skipped, self.rows.total_steps)
        if self.skip_non_finite_steps and not too_many:
            return
        not_finite = [row for row, loss in losses if not math.isfinite(loss)]
        suspects = [train[row].where for row in not_finite or [row for row, _ in losses]]
        shown = ", ".join(suspects[:4]) + (f" and {len(suspects) - 4} more" if len(suspects) > 4 else "")
        before = f"; {len(self.skipped) - 1} steps were skipped before it" if len(self.skipped) > 1 else ""
        advice = "Lower learning_rate.peak, look at these rows, or set trainer.on_nan=skip."
        if self.uses_loss_scaling:
            advice = (
                "fp16 ends at 65,504, which models made for bf16 (Gemma, Qwen, Phi) exceed on any rows: set "
                f"trainer.precision=fp32, or take a GPU that computes bf16 (Ampere or later). Else: {advice}"
            )
        raise DivergedError(
            f"training diverged: {reason} at step {step} (rows {shown}{f'; see {path}' if path else ''}){before}. The "
            f"weights before it are in the newest checkpoint. {advice}"
        )

    @property
    def uses_loss_scaling(self) -> bool:
        """Whether a loss scaler is in use, as fp16 needs one."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _sum_over_processes(self, tensors: list[torch.Tensor]) -> None:
        """Sums each tensor over all processes in one message; losses are already divided by the batch's weight."""
        if self.trainer.world_size == 1:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    # ------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.model.eval()
        self._losses = []

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Collects row losses, and the objective's predictions per row if it makes any; never logits of tokens."""
        losses = getattr(self.objective, "evaluate", self.objective.losses)(self.model, batch)
        self._losses.append((batch.rows, losses))  # read at the end, so that no batch waits for its predecessor

    def on_validation_epoch_end(self) -> None:
        validation = self._evaluate("val")
        if not self.trainer.sanity_checking:
            # For callbacks that a user adds (EarlyStopping, …); the run's own records do not pass through here.
            self.log_dict(validation.metrics, logger=False, rank_zero_only=False)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self._evaluate("test")

    def _evaluate(self, split: str) -> Validation:
        """The validation of `split` from the row losses of all processes, with generations; keeps and returns it."""
        local_rows: list[ValidatedRow] = []
        for numbers, losses in self._losses:
            predicted = [None] * len(numbers) if losses.outputs is None else losses.outputs.cpu().numpy()
            local_rows += zip(numbers, losses.nll.tolist(), losses.counts.double().tolist(), predicted, strict=True)
        rows = sorted(self._gather(local_rows), key=itemgetter(0))
        validation = validation_of(self.step, split, rows, self.scoring)
        if self.generation is not None and self.generation.samples:
            validation.add_samples(self._generate(self.generation), self.generation.metrics)
        if split == "val" and self.trained_on_validation:
            validation = validation.blank()
        self.validation = validation
        return validation

    def _generate(self, generation: Generation) -> list[dict[str, Any]]:
        """The samples of all processes with their generated text, in their order."""
        # Sharded weights are gathered in every forward, so all processes must run the same ones: all samples.
        divided = is_sharded(self.model)
        local_samples = list(enumerate(generation.samples))
        local_samples = local_samples if divided else local_samples[self.global_rank :: self.trainer.world_size]
        with self.trainer.precision_plugin.forward_context():
            outputs = generation.generate(self.model, [sample.prompt_ids for _, sample in local_samples])
        samples = [
            (index, {**sample.texts, "generated": generation.decode(output)})
            for (index, sample), output in zip(local_samples, outputs, strict=True)
        ]
        gathered = samples if divided else self._gather(samples)
        return [sample for _, sample in sorted(gathered, key=itemgetter(0))]

    def _gather(self, local: list[Any]) -> list[Any]:
        """The concatenated lists of all processes, by rank."""
        if self.trainer.world_size == 1:
            return local
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, local)
        return list(chain.from_iterable(gathered))

    def cpu(self) -> FineTuner:
        """Does nothing: Lightning would move the base off the device that the next run needs it on."""
        return self

    # ------------------------------------------------------------------------------------------------- checkpoints

    def probe(self, batch: MicroBatch) -> float:
        """Nats per labelled token of `batch` without dropout; leaves the training unchanged."""
        score = getattr(self.objective, "evaluate" if hasattr(self.objective, "before_step") else "losses")
        with evaluating(self.model), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            losses = score(self.model, batch.to(self.device))
        return float(losses.nll.sum()) / max(1.0, float(losses.counts.sum()))

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name."""
        return {name: full_tensor(tensor) for name, tensor in trainable_state(self.model).items()}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name."""
        optimizer = self.trainer.optimizers[0]
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            names[id(p)]: {key: full_tensor(value) for key, value in state.items()}
            for p, state in optimizer.state.items()
        }

    def restore(self, step: int, weights: dict[str, torch.Tensor], optimizer: dict[str, dict[str, Any]]) -> None:
        """Loads a checkpoint; call before `fit`."""
        load_trainable_state(self.model, weights)
        self._pending_optimizer = optimizer
        self.step = step

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]]) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        numbered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        current = optimizer.state_dict()
        parameters = dict(self.model.named_parameters())
        current["state"] = {
            index: {key: sharded_like(value, parameters[name]) for key, value in state[name].items()}
            for index, name in enumerate(numbered)
            if name in state
        }
        optimizer.load_state_dict(current)
        if getattr(optimizer, "is_paged", False):
            restore_pages(optimizer)
