"""What only several processes of one run can get wrong: one is lost, or they start from different places."""

from __future__ import annotations

import torch

from llmft.core.errors import ConfigError

_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "socket")


def is_lost_process(error: BaseException) -> bool:
    """Whether `error` says that another process no longer answers."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


def check_same_start(step: int, device: torch.device) -> None:
    """Raises ConfigError, in all processes, where they have not read the same checkpoint."""
    steps = torch.tensor([step, -step], device=device)
    torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
    most, least = int(steps[0]), -int(steps[1])
    if most != least:
        raise ConfigError(
            f"trainer.num_nodes: one machine would go on after step {most}, another after step {least}; set output_dir "
            "to a directory that all of them share."
        )
