"""Verdicts on a machine: not what is installed, but whether it will train, and what to do where it will not."""

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
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmft.config.sections import DoctorConfig, Precision
from llmft.core.files import format_bytes, write_atomically
from llmft.core.machine import usable_cores
from llmft.core.network import NoAnswer, ask, host_of

MALICIOUS = {("lightning", "2.6.2"), ("lightning", "2.6.3")}
"""Released with code that stole credentials when imported (GHSA-w37p-236h-pfx3)."""
LITTLE_BYTES = 10 * 2**30
"""A base of 7B weights, its adapter and checkpoints take more."""
TINY_BYTES = 2**28
NETWORK_TIMEOUT_S = 3.0


@dataclass
class CheckResult:
    """What was found of one part: "good", "warning" or "bad"; `fix` says what to do about the latter two."""

    part: str
    level: str
    found: str
    fix: str = ""


def examine(config: DoctorConfig) -> list[CheckResult]:
    """All verdicts; a part whose examination itself fails is bad, with the error as what was found."""
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
    verdicts: list[CheckResult] = []
    for part, examination in parts:
        try:
            verdicts += examination()
        except Exception as error:  # a broken library is exactly what is looked for
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            verdicts.append(CheckResult(part, "bad", told, "install llmft again in a fresh environment"))
    return verdicts


# ---------------------------------------------------------------------------------------------------------- packages


def requirements() -> list[str]:
    """What llmft requires, from its metadata or, in a checkout that is not installed, from its pyproject.toml."""
    try:
        return [r for r in importlib.metadata.requires("llmft") or [] if "extra ==" not in r]
    except importlib.metadata.PackageNotFoundError:
        path = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return list(tomllib.loads(path.read_text())["project"]["dependencies"])


def packages() -> Iterator[CheckResult]:
    """Installed versions against the tested ranges, and releases that were malware."""
    from packaging.requirements import Requirement

    wrong, missing = [], 0
    for text in requirements():
        wanted = Requirement(text)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing += 1
            yield CheckResult("packages", "bad", f"{wanted.name} is missing", f"pip install '{text}'")
            continue
        if (wanted.name, version) in MALICIOUS:
            fix = f"pip install '{text}', and change every password and token that this machine knows"
            yield CheckResult("packages", "bad", f"{wanted.name} {version} was malware", fix)
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} (tested: {wanted.specifier})")
    if wrong:
        yield CheckResult("packages", "warning", ", ".join(wrong), "pip install -U llmft, in an environment of its own")
    elif not missing:
        yield CheckResult("packages", "good", f"{len(requirements())} packages in their tested ranges")


# ------------------------------------------------------------------------------------------------------------ device


def device() -> Iterator[CheckResult]:
    """Whether there is a GPU, and whether this torch has kernels for it."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
            cause = "torch was built without CUDA" if torch.version.cuda is None else "its driver does not answer torch"
            fix = "pip install torch from the index that https://pytorch.org names for your driver"
            yield CheckResult("device", "bad", f"an NVIDIA GPU is here, but {cause}", fix)
        else:
            message = f"no GPU; {usable_cores()} cores"
            if torch.backends.mps.is_available():
                message += "; Apple's GPU is not used"
            yield CheckResult("device", "warning", message, "fine for small models; 7B takes a GPU of NVIDIA's")
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        if torch.version.hip is not None:  # whose architectures have names of their own
            yield CheckResult("device", "good", f"{name} (ROCm {torch.version.hip}, on which llmft has not been tried)")
            continue
        yield gpu_verdict(name, torch.cuda.get_device_capability(number), torch.cuda.get_arch_list())


def gpu_verdict(name: str, capability: tuple[int, int], built_for: list[str]) -> CheckResult:
    """Whether a torch that was built for the architectures `built_for` (sm_90, compute_90, …) runs on a GPU."""
    major, minor = capability
    # A binary runs on later minor versions of its major one; PTX (compute_…) is compiled for any later one.
    binary = any(
        arch.startswith("sm_") and _number(arch) // 10 == major and _number(arch) % 10 <= minor for arch in built_for
    )
    ptx = any(arch.startswith("compute_") and _number(arch) <= 10 * major + minor for arch in built_for)
    if binary or ptx:
        return CheckResult("device", "good", f"{name} (sm_{major}{minor})")
    return CheckResult(
        "device",
        "bad",
        f"{name} is sm_{major}{minor}, and this torch has kernels for {', '.join(built_for)} only",
        "choose another GPU (on Kaggle: T4, not P100), or an older torch that still has its kernels",
    )


def _number(arch: str) -> int:
    digits = "".join(c for c in arch.rpartition("_")[2] if c.isdigit())
    return int(digits or 0)


def precision() -> Iterator[CheckResult]:
    """What trainer.precision=auto will take."""
    from llmft.model.load import pick_device, pick_precision

    where = pick_device("auto")
    chosen = pick_precision(Precision.auto, where)
    why = {
        Precision.bf16: "computed natively",
        Precision.fp16: "this GPU has no bf16 units; losses are scaled",
        Precision.fp32: "no bf16 units here; slower, and twice the memory",
    }[chosen]
    yield CheckResult("precision", "good", f"trainer.precision=auto is {chosen.value} ({why})")


def four_bit() -> Iterator[CheckResult]:
    """A 4-bit matrix product against the product with the dequantised weights."""
    error, tolerance, where = four_bit_error()
    if error <= tolerance:
        yield CheckResult("4-bit", "good", f"NF4 product on {where} agrees with the dequantised one to {error:.1e}")
    else:
        told = f"NF4 product on {where} differs from the dequantised one by {error:.1e} (at most {tolerance:g})"
        yield CheckResult("4-bit", "bad", told, "pip install -U bitsandbytes; until then quantization=none or int8")


def four_bit_error() -> tuple[float, float, str]:
    """(relative difference, what rounding explains, device) of an NF4 product and that of the dequantised weights."""
    import bitsandbytes
    import torch

    from llmft.model.load import TORCH_DTYPES, pick_device, pick_precision

    where = pick_device("auto")
    dtype = TORCH_DTYPES[pick_precision(Precision.auto, where)]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(where, dtype)
    rows = torch.randn(8, 512, generator=generator).to(where, dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    product = bitsandbytes.matmul_4bit(rows, packed.t(), quant_state=state).float()
    expected = rows.float() @ bitsandbytes.functional.dequantize_4bit(packed, state).float().t()
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    return float((product - expected).norm() / expected.norm()), tolerance, f"{where} in {str(dtype)[6:]}"


def memory() -> Iterator[CheckResult]:
    """Memory of the device, and of this machine where a base passes through it."""
    from llmft.model.load import pick_device
    from llmft.model.memory import device_memory

    where = pick_device("auto")
    total = device_memory(where)
    told = f"{format_bytes(total)} on {where}" if total is not None else "not to be told"
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.is_file() else "max"
    if where.type == "cpu" and total is not None and limit.isdigit() and int(limit) < total:
        told = f"{format_bytes(int(limit))} in this container, of {told}"
    yield CheckResult("memory", "good", told)


# -------------------------------------------------------------------------------------------------------------- disk


def output(directory: Path) -> Iterator[CheckResult]:
    """Whether a run can be written there: room, renaming, locks."""
    import filelock

    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    other = "set output_dir to another disk"
    try:
        with tempfile.TemporaryDirectory(prefix=".llmft-doctor-", dir=place) as probe:
            write_atomically(Path(probe) / "file", b"1")
            with filelock.FileLock(Path(probe) / "lock").acquire(timeout=0):
                pass
    except (OSError, NotImplementedError) as error:
        yield CheckResult("output_dir", "bad", f"{place}: cannot be written ({error})", other)
        return
    told = f"{format_bytes(free)} free on the disk of {directory}"
    if free < TINY_BYTES:
        yield CheckResult("output_dir", "bad", told, f"`python -m llmft.disk` says what may go, or {other}")
    elif free < LITTLE_BYTES:
        yield CheckResult("output_dir", "warning", told, f"`python -m llmft.disk` says what may go, or {other}")
    else:
        yield CheckResult("output_dir", "good", told)


def temporary() -> Iterator[CheckResult]:
    """$TMPDIR: runs do not stage there, but W&B and some libraries do."""
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    told = f"{format_bytes(free)} free in {place}"
    if free < TINY_BYTES:
        fix = "export TMPDIR=DIR on a disk with room (runs are written without it, but W&B's tables are not)"
        yield CheckResult("TMPDIR", "warning", told, fix)
    else:
        yield CheckResult("TMPDIR", "good", told)


def caches() -> Iterator[CheckResult]:
    """What the Hub's cache takes, and whether its disk has room for a model."""
    from llmft.checks.disk import hub_cache, size_of

    folder = hub_cache()
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    told = f"the Hub's cache {folder} takes {format_bytes(size_of(folder) if folder.is_dir() else 0)}"
    told += f", {format_bytes(free)} are free there"
    if free < LITTLE_BYTES:
        yield CheckResult("caches", "warning", told, "a 7B downloads 14 GiB: export HF_HOME=DIR on a larger disk")
    else:
        yield CheckResult("caches", "good", told)


# ---------------------------------------------------------------------------------------------------------- accounts


def accounts() -> Iterator[CheckResult]:
    """Whether there are tokens, which are not shown."""
    from huggingface_hub import get_token

    from llmft.training.tracking import has_key, wandb_url

    if get_token():
        yield CheckResult("Hub", "good", "a token is there")
    else:
        yield CheckResult(
            "Hub", "warning", "no token", "`hf auth login`, for models with a licence to accept (Llama, Gemma)"
        )
    if has_key(host_of(wandb_url())):
        yield CheckResult("W&B", "good", "an API key is there")
    else:
        yield CheckResult("W&B", "warning", "no API key: runs are logged offline", "`wandb login`, or logger=none")


def network() -> Iterator[CheckResult]:
    """Whether the Hub and W&B answer."""
    from llmft.training.tracking import look_at_wandb, wandb_url

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    for part, url, look, without in (
        ("Hub", hub, _look, "models must be cached, or model.path=DIR"),
        ("W&B", wandb_url(), look_at_wandb, "runs are logged offline"),
    ):
        cause = look(url, NETWORK_TIMEOUT_S)
        if cause is None:
            yield CheckResult(part, "good", f"{url} answers")
        else:
            yield CheckResult(part, "warning", cause, f"without it, {without}")


def _look(url: str, seconds: float) -> str | None:
    """None where the Hub answers at `url`, else what is wrong."""
    try:
        status, content = ask(f"{url}/api/models?limit=1", seconds)
        if 300 <= status < 400 or status >= 500:
            return f"{url} answers with status {status}"
        if status < 300:
            json.loads(content)
    except NoAnswer as error:
        return f"{url} does not answer ({error})"
    except ValueError:
        return f"{url} does not answer (what is there is not the Hub)"
    return None


# ----------------------------------------------------------------------------------------------------------- showing


def show(verdicts: list[CheckResult]) -> None:
    """Prints a line for each verdict, and what to do under those that are not good."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    table = Table(box=box.SIMPLE_HEAD, title="llmft doctor", title_justify="left")
    table.add_column("")
    table.add_column("part")
    table.add_column("found", overflow="fold")
    colours: dict[str, Any] = {"good": "green", "warning": "yellow", "bad": "red"}
    for verdict in verdicts:
        text = escape(verdict.found) + (f"\n[bold]{escape(verdict.fix)}[/bold]" if verdict.fix else "")
        table.add_row(f"[{colours[verdict.level]}]{verdict.level}[/{colours[verdict.level]}]", verdict.part, text)
    console.print(table)
