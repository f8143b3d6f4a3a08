"""Uploads a run to the Hub: weights, tokenizer, a template that other programs read, and a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmft.config.commands import PushConfig, Pushed
from llmft.core.errors import ConfigError, first_line
from llmft.core.network import STALLED_S, NoAnswer, ask
from llmft.core.redaction import redact
from llmft.data.hub import PROBE_TIMEOUT_S
from llmft.export import card
from llmft.export.template import without_marks
from llmft.runs.directory import directories, finished_run

TEMPLATE = "chat_template.jinja"


@contextmanager
def plan(config: PushConfig) -> Iterator[Path]:
    """A temporary folder with the files to send, mostly links."""
    (directory,) = directories(config.run, "run")
    run, trained = finished_run(directory)
    is_adapter = config.what is Pushed.adapter and trained.lora.enabled
    source, description = {
        Pushed.adapter: (run.adapter, "A LoRA adapter.") if is_adapter else (run.model, card.describe_merged(trained)),
        Pushed.merged: (directory / "merged", card.describe_merged(trained)),
        Pushed.gguf: (
            directory / "gguf",
            "A fine-tuned language model as GGUF files for llama.cpp, LM Studio and Ollama.",
        ),
    }[config.what]
    if not source.is_dir():
        command = f"python -m llmft.merge run={directory}{' format=gguf' if config.what is Pushed.gguf else ''}"
        raise ConfigError(f"what={config.what.value}: does not exist yet; first `{command}`.")
    with tempfile.TemporaryDirectory(prefix="llmft-push-") as name:
        folder = Path(name)
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith("."):
                (folder / path.name).symlink_to(path.resolve())
        if (folder / TEMPLATE).exists():
            _replace(folder / TEMPLATE, without_marks((source / TEMPLATE).read_text(encoding="utf-8")))
        if (folder / "adapter_config.json").exists():
            content = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
            # The public name of the base instead of a local directory.
            content["base_model_name_or_path"] = trained.model.id if trained.model.path is None else trained.model.label
            _replace(folder / "adapter_config.json", json.dumps(content, indent=2))
        title, library = config.repo.rpartition("/")[2], "peft" if is_adapter else "transformers"
        _replace(folder / "README.md", redact(card.text(title, description, trained, run, {}, library)))
        yield folder


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def send(config: PushConfig, folder: Path) -> str:
    """Uploads `folder`; returns its address and who can see it.

    Raises ConfigError if the Hub cannot be reached, or refuses.
    """
    import huggingface_hub
    from huggingface_hub import constants

    token = huggingface_hub.get_token()
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"repo={config.repo}: HF_HUB_OFFLINE is set; unset it to upload.")
    if token is None:
        raise ConfigError(f"repo={config.repo}: nobody is logged in; `hf auth login`, or HF_TOKEN in the environment.")
    _check_token(config.repo, constants.ENDPOINT, token)
    session = huggingface_hub.get_session()
    before, session.timeout = session.timeout, STALLED_S  # the shared client has no timeout by default
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT, token=token, library_name="llmft")
    try:
        address = api.create_repo(config.repo, private=config.private, exist_ok=True)
        private = api.repo_info(address.repo_id).private
        if config.private and not private:
            raise ConfigError(f"repo={config.repo}: the repository exists and is public; private=false uploads to it.")
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="llmft: a run")
    except ConfigError:
        raise
    except Exception as error:  # of the Hub, its client, or the HTTP client
        reason = error.__cause__ or error
        raise ConfigError(
            f"repo={config.repo}: {constants.ENDPOINT} did not accept it ({first_line(reason)[:200]})."
        ) from None
    finally:
        session.timeout = before
    return f"{address} ({'private' if private else 'PUBLIC'})"


def _check_token(repo: str, endpoint: str, token: str) -> None:
    """Checks the token before the upload, since the Hub's client would retry many times; raises ConfigError."""
    try:
        headers = {"Authorization": f"Bearer {token}"}
        status, content = ask(f"{endpoint}/api/whoami-v2", PROBE_TIMEOUT_S, headers=headers)
        known = status == 200 and "name" in json.loads(content)
    except NoAnswer as error:
        raise ConfigError(f"repo={repo}: {endpoint} cannot be reached ({error}); nothing was sent.") from None
    except (ValueError, TypeError):
        known = False
    if status == 401:
        raise ConfigError(f"repo={repo}: {endpoint} does not accept this token; `hf auth login` with one for writing.")
    if not known:
        raise ConfigError(f"repo={repo}: {endpoint} does not answer like a Hub (status {status}); nothing was sent.")
