"""Finds a model's files: in a local directory, the package, the Hub's cache, or on the Hub.

Cached files are used without a request. For others the Hub is asked once, with a timeout of a few seconds, before the
libraries' own retries (48 s for a missing model) can begin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmft.config.model import ModelConfig, ModelInit
from llmft.config.untrusted import check_model
from llmft.core.errors import ConfigError, first_line, nearest
from llmft.core.network import NoAnswer, ask, download

T = TypeVar("T")
PACKAGED = "package:"
PROBE_TIMEOUT_S = 4.0
MAX_HEADER_BYTES = 100 * 2**20
"""Longest header of a safetensors file; the library refuses a longer one."""
PICKLED = (
    "there are no safetensors weights, and pickled weights are not loaded; convert them with transformers' "
    "save_pretrained in an environment you trust, then set model.path=DIR"
)
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.py"]


@dataclass(frozen=True)
class Located:
    """A model's directory (None for a random model without files) and a fingerprint of its content."""

    directory: Path | None
    fingerprint: str


def locate(model: ModelConfig) -> Located:
    """Finds the files of `model`; downloads them from the Hub only if they are not cached.

    Raises ConfigError within seconds when they are not available.
    """
    if model.path is not None:
        return _local(model.path, weights=model.init is ModelInit.pretrained)
    if model.init is ModelInit.random:
        return Located(None, "random")
    import huggingface_hub

    files: dict[str, Any] = {"repo_id": model.id, "revision": model.revision}

    def load() -> Path:
        directory = Path(huggingface_hub.snapshot_download(**files, local_files_only=True))
        if not (directory / "config.json").is_file() or not has_weights(directory):
            raise FileNotFoundError(PICKLED)
        return directory

    patterns = MODEL_FILES if model.trust_remote_code else [p for p in MODEL_FILES if p != "*.py"]
    arguments = {**files, "allow_patterns": patterns}
    advice = "set model.path=DIR to a local copy, or HF_ENDPOINT to a mirror"
    key, fetch = f"model.id={model.id}", "huggingface_hub.snapshot_download"
    directory = online_or_cached(key, model.id, "model", load, fetch, arguments, advice, gated=model.gated)
    check_model(directory)
    return Located(directory, directory.name)


def _local(path: str, *, weights: bool) -> Located:
    if path.startswith(PACKAGED):
        directory = Path(__file__).parent.parent / "assets" / path.removeprefix(PACKAGED)
    else:
        directory = Path(path).expanduser()
        if directory.suffix == ".gguf":
            from llmft.data.gguf_files import as_directory

            directory = as_directory(directory)
    if not (directory / "config.json").is_file():
        reason = "no config.json in it" if directory.is_dir() else "no such directory"
        raise ConfigError(f"model.path={path}: no Hugging Face model directory there ({reason}).")
    check_model(directory)
    if weights and not has_weights(directory):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
        reason = PICKLED if pickled else "its safetensors weights are missing or incomplete"
        raise ConfigError(f"model.path={path}: {reason}.")
    return Located(directory, fingerprint(directory))


def fingerprint(directory: Path) -> str:
    """A digest of a model directory: names, sizes, small files, and a sample of every tensor of large files.

    A 7B model takes a fraction of a second. Trained models that differ in a tensor differ in its middle.
    """
    digest = hashlib.sha256()
    mib = 2**20
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.suffix not in {".json", ".safetensors", ".model", ".txt", ".jinja", ".py"}:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= 64 * mib:
                digest.update(file.read())
                continue
            head = file.read(mib)
            digest.update(head)
            for offset in _sample_offsets(head, file, size):
                file.seek(offset)
                digest.update(file.read(4096))
            file.seek(-mib, os.SEEK_END)
            digest.update(file.read(mib))
    return digest.hexdigest()


def _sample_offsets(head: bytes, file: Any, size: int) -> list[int]:
    """The middle of every tensor of a safetensors file; 256 evenly spaced offsets of any other file."""
    length = int.from_bytes(head[:8], "little")
    try:
        file.seek(8)
        entries = json.loads(file.read(length)) if length < min(size, MAX_HEADER_BYTES) else {}
        offsets = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        return sorted(8 + length + (start + end) // 2 for start, end in offsets)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [size * part // 256 for part in range(256)]


def weight_bytes(located: Located) -> int | None:
    """Size of the weight files; None for a model without any."""
    files = [] if located.directory is None else list(located.directory.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files) or None


def has_weights(directory: Path) -> bool:
    """Whether all safetensors files of the directory's index exist."""
    if (directory / "model.safetensors").is_file():
        return True
    try:
        names = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError):
        return False
    return all((directory / name).is_file() for name in set(names))


def _cache_directory() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_ids(kind: str) -> list[str]:
    """The repositories of a `kind` (model, dataset, space) in the Hub's cache."""
    folders = _cache_directory().glob(f"{kind}s--*")
    return [folder.name.removeprefix(f"{kind}s--").replace("--", "/") for folder in folders]


def _offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def ask_hub(key: str, repo: str, kind: str, advice: str, *, gated: bool = False) -> None:
    """Asks the Hub once whether `repo`, known as `gated`, can be read. Raises ConfigError that says why it cannot."""
    from huggingface_hub import constants, get_token

    endpoint, similar = constants.ENDPOINT, nearest(repo, cached_ids(kind))
    not_cached = f"the cache {_cache_directory()} does not contain it" + (
        f" (it contains {similar})" if similar else ""
    )
    if _offline():
        raise ConfigError(f"{key}: HF_HUB_OFFLINE is set and {not_cached}; unset it or {advice}.")
    url = f"{endpoint}/api/{kind}s/{repo}?expand=gated"  # without the list of files
    token = get_token()
    try:
        status, content = ask(url, PROBE_TIMEOUT_S, headers={"Authorization": f"Bearer {token}"} if token else {})
        facts = json.loads(content) if status == 200 else {}
        if not isinstance(facts, dict):
            raise ValueError
    except NoAnswer as error:
        raise ConfigError(f"{key}: {endpoint} cannot be reached ({error}) and {not_cached}; {advice}.") from None
    except ValueError:
        raise ConfigError(f"{key}: {endpoint} gives no Hub's answer and {not_cached}; {advice}.") from None
    if status != 200:
        unknown = "it does not exist, or is gated and needs `hf auth login` and its licence"
        denied = f"it is gated: {_accept(repo)}" if gated else unknown
        reason = {401: denied, 403: denied, 404: "no such repository"}.get(status, f"it answered {status}")
        raise ConfigError(f"{key}: {endpoint} refused ({reason}); or {advice}.")
    if facts.get("gated") and token is None:
        licence = f"accept its licence at {endpoint}/{repo} and log in with `hf auth login`"
        raise ConfigError(f"{key}: the {kind} is gated: {licence}, or {advice}.")


def online_or_cached(
    key: str,
    repo: str,
    kind: str,
    load: Callable[[], T],
    function: str,
    arguments: Mapping[str, Any],
    advice: str,
    *,
    gated: bool = False,
) -> T:
    """What `load` reads from a cache; what is not there is downloaded first, after asking the Hub once.

    The library's `function` downloads it when called with `arguments`. Raises ConfigError for any failure, with the
    way to a licence where the repository is known as `gated`.
    """
    from huggingface_hub import constants

    with contextlib.suppress(OSError, ValueError):  # not in the cache, or a malformed id
        return load()
    ask_hub(key, repo, kind, advice, gated=gated)
    try:
        download(function, arguments, _cache_directory() if kind == "model" else Path(constants.HF_HOME))
        return load()
    except Exception as error:
        advice = f"{_accept(repo)}, or {advice}" if gated else advice
        raise ConfigError(f"{key}: cannot be loaded ({first_line(error)}); {advice}.") from None


def _accept(repo: str) -> str:
    return f"accept the licence at https://huggingface.co/{repo} and set HF_TOKEN"
