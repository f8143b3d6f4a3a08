"""Where a model computes, and in what precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmft.config.model import Precision
from llmft.core.errors import ConfigError, did_you_mean


def pick_device(accelerator: str, local_rank: int = 0, devices: Any = "auto") -> torch.device:
    """The device this process computes on; `devices` as trainer.devices: a list names the GPUs by number."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", devices[local_rank] if isinstance(devices, list) else local_rank)
    if accelerator in ("gpu", "cuda"):
        raise ConfigError(f"trainer.accelerator={accelerator}: no CUDA device found; use trainer=cpu.")
    if accelerator not in ("auto", "cpu"):
        raise ConfigError(
            f"trainer.accelerator={accelerator}: no such device{did_you_mean(accelerator, ('auto', 'cpu', 'gpu'))}"
        )
    return torch.device("cpu")


def _cpu_computes_bf16() -> bool:
    """Whether the processor multiplies bf16 natively; without, it is 4 to 16 times slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolves `auto`: bf16 where the device has it, fp16 on older GPUs, fp32 on a CPU without bf16 units."""
    if precision is Precision.fp16 and device.type == "cpu":
        raise ConfigError("trainer.precision=fp16: a CPU does not compute in fp16; use fp32, bf16 or auto.")
    if precision is not Precision.auto:
        return precision
    if device.type == "cuda":
        # is_bf16_supported() says yes to emulation; Ampere (8.0) is the first to compute it.
        return Precision.bf16 if torch.cuda.get_device_capability(device)[0] >= 8 else Precision.fp16
    return Precision.bf16 if _cpu_computes_bf16() else Precision.fp32


TORCH_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def mixed_precision(device: torch.device, precision: Precision) -> torch.autocast:
    """Inside, `device` computes in `precision`, with weights in fp32 left as they are."""
    return torch.autocast(device.type, TORCH_DTYPES[precision], enabled=precision is not Precision.fp32)
