"""Checks whether a machine can train, and how to fix it if not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from llmft.config.commands import DoctorConfig
from llmft.config.model import Precision
from llmft.core.console import Screen
from llmft.core.files import existing_parent, format_bytes, hub_cache, write_atomically
from llmft.core.machine import usable_cores
from llmft.core.network import NoAnswer, ask, host_of

MALICIOUS = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Released with code that stole credentials when imported (GHSA-w37p-236h-pfx3)."""
LITTLE_BYTES = 10 * 2**30
"""A 7B base with its adapter and checkpoints takes more."""
TINY_BYTES = 2**28
NETWORK_TIMEOUT_S = 3.0


@dataclass
class CheckResult:
    """The result for one part: level "good", "warning" or "bad", with a `fix` for the latter two."""

    part: str
    level: str
    found: str
    fix: str = ""


def examine(config: DoctorConfig) -> list[CheckResult]:
    """Runs all checks. A check that raises an error gives a bad result."""
    parts: list[tuple[str, Callable[[], Iterator[CheckResult]]]] = [
        ("packages", packages),
        ("device", device),
        ("precision", precision),
        ("4-bit", four_bit),
        ("memory", memory),
        ("output_dir", lambda: output(Path(config.output_dir))),
        ("TMPDIR", temporary),
        ("caches", caches),
        ("accounts", accounts),
    ]
    if config.network:
        parts.append(("network", network))
    results: list[CheckResult] = []
    for part, check in parts:
        try:
            results += check()
        except Exception as error:  # a broken library is a result too
            message, _, _ = f"{type(error).__name__}: {error}".partition("\n")
            results.append(CheckResult(part, "bad", message, "install llmft again in a fresh environment"))
    return results


# ---------------------------------------------------------------------------------------------------------- packages


def requirements() -> list[str]:
    """The requirements of llmft, from its metadata, or from pyproject.toml in a checkout that is not installed."""
    try:
        return [r for r in importlib.metadata.requires("llmft") or [] if "extra ==" not in r]
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return list(tomllib.loads(path.read_text())["project"]["dependencies"])


def packages() -> Iterator[CheckResult]:
    """Checks that installed versions are in the tested ranges and are not known malware."""
    from packaging.requirements import Requirement

    wrong, missing = [], 0
    for text in requirements():
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing += 1
            yield CheckResult("packages", "bad", f"{requirement.name} is missing", f"pip install '{text}'")
            continue
        if (requirement.name, version) in MALICIOUS:
            fix = f"pip install '{text}', and change every password and token on this machine"
            yield CheckResult("packages", "bad", f"{requirement.name} {version} was malware", fix)
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    if wrong:
        yield CheckResult("packages", "warning", ", ".join(wrong), "pip install -U llmft, in an environment of its own")
    elif not missing:
        yield CheckResult("packages", "good", f"{len(requirements())} packages in their tested ranges")


# ------------------------------------------------------------------------------------------------------------ device


def device() -> Iterator[CheckResult]:
    """Checks for a GPU for which this torch has kernels."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
            cause = "torch was built without CUDA" if torch.version.cuda is None else "its driver does not answer torch"
            fix = "pip install torch from the index that https://pytorch.org names for your driver"
            yield CheckResult("device", "bad", f"there is an NVIDIA GPU, but {cause}", fix)
        else:
            message = f"no GPU; {usable_cores()} cores"
            if torch.backends.mps.is_available():
                message += "; the Apple GPU is not used"
            yield CheckResult("device", "warning", message, "fine for small models; 7B needs an NVIDIA GPU")
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        if torch.version.hip is not None:  # its architectures have other names
            yield CheckResult("device", "good", f"{name} (ROCm {torch.version.hip}, on which llmft has not been tried)")
            continue
        yield gpu_verdict(name, torch.cuda.get_device_capability(number), torch.cuda.get_arch_list())


def gpu_verdict(name: str, capability: tuple[int, int], built_for: list[str]) -> CheckResult:
    """Checks whether a torch built for the architectures `built_for` (sm_90, compute_90, …) runs on a GPU."""
    major, minor = capability
    # A binary runs on later minor versions of its major version; PTX (compute_…) is compiled for any later version.
    binary = any(
        arch.startswith("sm_") and _version_of(arch) // 10 == major and _version_of(arch) % 10 <= minor
        for arch in built_for
    )
    ptx = any(arch.startswith("compute_") and _version_of(arch) <= 10 * major + minor for arch in built_for)
    if binary or ptx:
        return CheckResult("device", "good", f"{name} (sm_{major}{minor})")
    return CheckResult(
        "device",
        "bad",
        f"{name} is sm_{major}{minor}, and this torch has kernels for {', '.join(built_for)} only",
        "choose another GPU (on Kaggle: T4, not P100), or an older torch that still has its kernels",
    )


def _version_of(arch: str) -> int:
    digits = "".join(character for character in arch.rpartition("_")[2] if character.isdigit())
    return int(digits or 0)


def precision() -> Iterator[CheckResult]:
    """The precision chosen by trainer.precision=auto."""
    from llmft.model.device import pick_device, pick_precision

    device = pick_device("auto")
    chosen = pick_precision(Precision.auto, device)
    reason = {
        Precision.bf16: "computed natively",
        Precision.fp16: "this GPU has no bf16 units; losses are scaled",
        Precision.fp32: "no bf16 units here; slower, and twice the memory",
    }[chosen]
    yield CheckResult("precision", "good", f"trainer.precision=auto is {chosen.value} ({reason})")


def four_bit() -> Iterator[CheckResult]:
    """Compares a 4-bit matrix product with that of the dequantised weights."""
    error, tolerance, device = four_bit_error()
    if error <= tolerance:
        yield CheckResult("4-bit", "good", f"NF4 product on {device} agrees with the dequantised one to {error:.1e}")
    else:
        message = f"NF4 product on {device} differs from the dequantised one by {error:.1e} (at most {tolerance:g})"
        yield CheckResult("4-bit", "bad", message, "pip install -U bitsandbytes; until then quantization=none or int8")


def four_bit_error() -> tuple[float, float, str]:
    """(relative difference, tolerance, device) of an NF4 product from that of the dequantised weights."""
    import bitsandbytes
    import torch

    from llmft.model.device import TORCH_DTYPES, pick_device, pick_precision

    device = pick_device("auto")
    dtype = TORCH_DTYPES[pick_precision(Precision.auto, device)]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(device, dtype)
    rows = torch.randn(8, 512, generator=generator).to(device, dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    product = bitsandbytes.matmul_4bit(rows, packed.t(), quant_state=state).float()
    expected = rows.float() @ bitsandbytes.functional.dequantize_4bit(packed, state).float().t()
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    return float((product - expected).norm() / expected.norm()), tolerance, f"{device} in {str(dtype)[6:]}"


def memory() -> Iterator[CheckResult]:
    """The memory of the device, or of this container."""
    from llmft.model.device import pick_device
    from llmft.model.memory import device_memory

    device = pick_device("auto")
    total = device_memory(device)
    message = f"{format_bytes(total)} on {device}" if total is not None else "unknown"
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    if device.type == "cpu" and total is not None and limit.isdigit() and int(limit) < total:
        message = f"{format_bytes(int(limit))} in this container, of {message}"
    yield CheckResult("memory", "good", message)


# -------------------------------------------------------------------------------------------------------------- disk


def output(directory: Path) -> Iterator[CheckResult]:
    """Checks free space, writing and locks in the output directory."""
    import filelock

    existing = existing_parent(directory)
    free = shutil.disk_usage(existing).free
    fix = "set output_dir to another disk"
    try:
        with tempfile.TemporaryDirectory(prefix=".llmft-doctor-", dir=existing) as probe:
            write_atomically(Path(probe) / "file", b"1")
            with filelock.FileLock(Path(probe) / "lock").acquire(timeout=0):
                pass
    except (OSError, NotImplementedError) as error:
        yield CheckResult("output_dir", "bad", f"{existing}: cannot be written ({error})", fix)
        return
    message = f"{format_bytes(free)} free on the disk of {directory}"
    fix = f"`python -m llmft.disk` shows what can be deleted, or {fix}"
    level = "bad" if free < TINY_BYTES else "warning" if free < LITTLE_BYTES else "good"
    yield CheckResult("output_dir", level, message, "" if level == "good" else fix)


def temporary() -> Iterator[CheckResult]:
    """Checks $TMPDIR, which W&B and some libraries use."""
    directory = Path(tempfile.gettempdir())
    free = shutil.disk_usage(directory).free
    message = f"{format_bytes(free)} free in {directory}"
    if free >= TINY_BYTES:
        yield CheckResult("TMPDIR", "good", message)
    else:
        fix = "export TMPDIR=DIR on a disk with space (runs do not need it, but W&B's tables do)"
        yield CheckResult("TMPDIR", "warning", message, fix)


def caches() -> Iterator[CheckResult]:
    """Checks whether the disk of the Hub's cache has space for a model."""
    from llmft.checks.disk import size_of

    folder = hub_cache()
    free = shutil.disk_usage(existing_parent(folder)).free
    message = f"the Hub's cache {folder} takes {format_bytes(size_of(folder) if folder.is_dir() else 0)}"
    message += f", {format_bytes(free)} are free there"
    if free >= LITTLE_BYTES:
        yield CheckResult("caches", "good", message)
    else:
        yield CheckResult("caches", "warning", message, "a 7B downloads 14 GiB: export HF_HOME=DIR on a larger disk")


# ---------------------------------------------------------------------------------------------------------- accounts


def accounts() -> Iterator[CheckResult]:
    """Checks for the tokens of the Hub and W&B, without printing them."""
    from huggingface_hub import get_token

    from llmft.training.tracking import has_key, wandb_url

    if get_token():
        yield CheckResult("Hub", "good", "a token is set")
    else:
        fix = "`hf auth login`, for models with a licence to accept (Llama, Gemma)"
        yield CheckResult("Hub", "warning", "no token", fix)
    if has_key(host_of(wandb_url())):
        yield CheckResult("W&B", "good", "an API key is set")
    else:
        yield CheckResult("W&B", "warning", "no API key: runs are logged offline", "`wandb login`, or logger=none")


def network() -> Iterator[CheckResult]:
    """Checks whether the Hub and W&B answer."""
    from llmft.training.tracking import probe_wandb, wandb_url

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    for part, url, check, consequence in (
        ("Hub", hub, _check_hub, "models must be cached, or model.path=DIR"),
        ("W&B", wandb_url(), probe_wandb, "runs are logged offline"),
    ):
        cause = check(url, NETWORK_TIMEOUT_S)
        if cause is None:
            yield CheckResult(part, "good", f"{url} answers")
        else:
            yield CheckResult(part, "warning", cause, f"without it, {consequence}")


def _check_hub(url: str, seconds: float) -> str | None:
    """None if the Hub answers at `url`, else the problem."""
    try:
        status, content = ask(f"{url}/api/models?limit=1", seconds)
        if 300 <= status < 400 or status >= 500:
            return f"{url} answers with status {status}"
        if status < 300:
            json.loads(content)
    except NoAnswer as error:
        return f"{url} does not answer ({error})"
    except ValueError:
        return f"{url} does not answer (it is not a Hub)"
    return None


# ----------------------------------------------------------------------------------------------------------- showing


def show(results: list[CheckResult]) -> None:
    """Prints a line per result, with its fix."""
    table = Table("", "part", box=box.SIMPLE_HEAD, title="llmft doctor", title_justify="left")
    table.add_column("found", overflow="fold")
    colours = {"good": "green", "warning": "yellow", "bad": "red"}
    for result in results:
        text = escape(result.found) + (f"\n[bold]{escape(result.fix)}[/bold]" if result.fix else "")
        table.add_row(f"[{colours[result.level]}]{result.level}[/]", result.part, text)
    Screen().print(table)
