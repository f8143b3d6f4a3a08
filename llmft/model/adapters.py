"""LoRA on a base: attach, detach, save, load, count; by PEFT."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmft import __version__
from llmft.config.model import Kernels, LoraConfig
from llmft.config.untrusted import check_adapter
from llmft.core.errors import ConfigError, did_you_mean, first_line
from llmft.core.files import staged_directory
from llmft.data.sandbox import match_bounded
from llmft.model import families
from llmft.model.heads import head_names
from llmft.model.kernels import lora as lora_kernel
from llmft.model.sharding import full_tensor, is_sharded, sharded_like


def attach(
    base: Any, lora: LoraConfig, *, auto_class: str, seed: int, name: str, kernels: Kernels = Kernels.auto
) -> Any:
    """`base` with a fresh LoRA whose random half comes from `seed` alone; returns the PeftModel.

    In a mixture of experts "all-linear" means attention only: see `families.NOT_ADAPTED`.

    Raises ConfigError when lora.targets name no module of this model.
    """
    import peft

    config = _peft_config(base, lora, auto_class)
    names = [name for name, _ in base.named_modules()]
    for module in lora.modules_to_save:
        if not any(f".{name}".endswith(f".{module}") for name in names):
            hint = did_you_mean(module, {name.rpartition(".")[2] for name in names})
            raise ConfigError(f"lora.modules_to_save: no module named {module}{hint}")
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, config)
        except ValueError as error:
            raise ConfigError(f"lora.targets={lora.targets}: {first_line(error)}") from None
    model.peft_config["default"].base_model_name_or_path = name  # PEFT takes the base's own, a directory
    for parameter in model.parameters():  # PEFT leaves whole modules in 16 bits, in which small steps are lost
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if kernels is Kernels.auto:
        lora_kernel.install(model)
    return model


def _peft_config(base: Any, lora: LoraConfig, auto_class: str) -> Any:
    """PEFT's config of `lora`."""
    import peft

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    dense = families.dense_layers(base) if targets == "all-linear" else None
    if isinstance(targets, str) and targets != "all-linear":
        try:
            match_bounded(targets, (name for name, _ in base.named_modules()))
        except (re.error, ValueError) as error:
            raise ConfigError(f"lora.targets={targets}: {error}; write another regular expression.") from None
    classifies = auto_class == "sequence_classification"
    # PEFT trains and saves a `score` or `classifier` by itself, and would leave an encoder's new pooler as it is.
    parts = [name for name in head_names(base) if name not in ("score", "classifier")] if classifies else []
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.scaling_alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        # PEFT would take "all-linear" to mean router and experts too, past exclude_modules.
        target_modules=targets if dense is None else dense,
        exclude_modules=None if dense is None else families.NOT_ADAPTED,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=[*lora.modules_to_save, *parts] or None,
        task_type=peft.TaskType.SEQ_CLS if classifies else peft.TaskType.CAUSAL_LM,
    )


def detach(model: Any) -> Any:
    """The base as it was before `attach`."""
    base = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.requires_grad_(False)
    base.zero_grad(set_to_none=True)
    return base


def load_adapter(model: Any, directory: Path) -> None:
    """Puts the weights that `save` wrote into an attached adapter of the same configuration, the head with it.

    Raises ConfigError when they are not those of this adapter.
    """
    import peft

    current, stored, mismatched = _states(model, directory)
    if unexpected := sorted(current.keys() ^ stored.keys()) + mismatched:
        raise ConfigError(f"{directory}: not the weights of this run's adapter ({unexpected[0]}).")
    peft.set_peft_model_state_dict(model, stored)


def add_frozen(model: Any, directory: Path, name: str) -> dict[str, torch.Tensor]:
    """Adds the adapter in `directory` under `name`, frozen and not active; returns the tensors of its head by name.

    Nothing else changes, neither in `model` nor in the process's random state. Raises ConfigError for an adapter of
    another model.
    """
    import peft
    from safetensors.torch import load_file

    check_adapter(directory)
    config = peft.LoraConfig.from_pretrained(str(directory))
    config.modules_to_save, config.task_type, config.inference_mode = None, None, True
    stored = load_file(directory / "adapter_model.safetensors")
    state = {key: tensor for key, tensor in stored.items() if ".lora_" in key}
    devices = [model.device] if model.device.type == "cuda" else []
    with _same_trainable(model), torch.random.fork_rng(devices=devices):
        model.add_adapter(name, config)
        layers = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if unexpected := sorted(layers.keys() ^ state.keys()):
            raise ConfigError(f"{directory}: an adapter of another model ({unexpected[0]}).")
        peft.set_peft_model_state_dict(model, state, adapter_name=name)
    return {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key not in state}


@contextlib.contextmanager
def active(model: Any, name: str) -> Iterator[None]:
    """Inside, only the adapter `name` is active, without dropout; afterwards everything is as before."""
    before = model.active_adapter
    with _same_trainable(model), families.evaluating(model):
        model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(before, inference_mode=True)


@contextlib.contextmanager
def _same_trainable(model: torch.nn.Module) -> Iterator[None]:
    """PEFT may freeze and unfreeze inside; afterwards the same parameters as before are trainable, and no new ones."""
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trainable)


def load_peft_adapter(base: Any, directory: Path) -> Any:
    """`base` with the adapter that PEFT wrote into `directory`, whatever its options are; returns the PeftModel.

    Raises ConfigError if it is not of this model.
    """
    import peft
    from safetensors import safe_open

    try:
        model = peft.PeftModel.from_pretrained(base, str(directory))
        with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise ConfigError(f"{directory}: PEFT cannot put this adapter on its base ({reason[:200]}).") from None
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    unexpected = sorted((expected - stored) | (stored - expected - model.state_dict().keys()))
    if unexpected:
        raise ConfigError(
            f"{directory}: an adapter of another model than {base.config.name_or_path} ({unexpected[0]})."
        )
    return model


def continue_from_adapter(model: Any, directory: Path, lora: LoraConfig) -> None:
    """Loads the adapter in `directory` into a fresh one of the same shape; a new head is left unchanged.

    Raises ConfigError naming the keys of `lora` that differ from the adapter's, and for weights of another model.
    """
    import peft

    options = check_adapter(directory)
    shape = [("r", "r", lora.r), ("alpha", "lora_alpha", lora.scaling_alpha)]
    shape += [("rslora", "use_rslora", lora.rslora), ("dora", "use_dora", lora.dora)]
    stored_shape = [(key, options.get(name, value), value) for key, name, value in shape]
    if others := [f"lora.{key}={str(stored).lower()}" for key, stored, value in stored_shape if stored != value]:
        raise ConfigError(f"lora.adapter={directory}: an adapter of another shape; set {' '.join(others)}.")
    current, stored, mismatched = _states(model, directory)
    adapted = {name for name in current if ".lora_" in name}
    if unexpected := sorted((adapted - stored.keys()) | (stored.keys() - current.keys())) + mismatched:
        raise ConfigError(f"lora.adapter={directory}: not of this model, task and lora.targets ({unexpected[0]}).")
    peft.set_peft_model_state_dict(model, {**current, **stored})


def _states(model: Any, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """The tensors of an attached adapter, those of a stored one, and the names of those that differ in shape.

    Raises ConfigError for a file that cannot be read.
    """
    import peft
    from safetensors.torch import load_file

    path = directory / "adapter_model.safetensors"
    try:
        stored = load_file(path)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read ({str(error)[:200]}).") from None
    current = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    mismatched = sorted(name for name in current.keys() & stored.keys() if current[name].shape != stored[name].shape)
    return current, stored, mismatched


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors by name, shared ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trainable_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts `state` back; raises KeyError or RuntimeError when names or shapes differ."""
    current = trainable_state(model)
    if current.keys() != state.keys():
        raise KeyError(f"trained tensors differ: {sorted(current.keys() ^ state.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(sharded_like(state[name], parameter))


CARD = """---
library_name: peft
---

# {name}

A LoRA adapter trained with llmft {version}; see `config.yaml` and `environment.json` in the parent folder.

"""


def full_state(model: torch.nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """The full tensors for `save` if weights are sharded (a collective call); else None."""
    if not is_sharded(model):
        return None
    parameters = model.named_parameters()
    return {name: full_tensor(p.detach()).cpu() for name, p in parameters if p.requires_grad or not trained_only}


def save(model: Any, tokenizer: Any, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the adapter (or, without LoRA, the model) and its tokenizer, atomically.

    `state` replaces the model's own tensors.
    """
    for leftover in directory.parent.glob(f".{directory.name}.*"):  # of a process that was killed, of any release
        shutil.rmtree(leftover, ignore_errors=True)
    with staged_directory(directory) as staged:
        options: dict[str, Any] = {"safe_serialization": True, "state_dict": state}
        if hasattr(model, "peft_config"):
            # Only this adapter, without those of judges.
            options |= {"save_embedding_layers": False, "selected_adapters": ["default"]}
            # PEFT adds the base and its version to an existing card, else to a template to fill in.
            (staged / "README.md").write_text(CARD.format(name=directory.parent.name, version=__version__))
        model.save_pretrained(staged, **options)
        if hasattr(model, "peft_config"):
            path = staged / "adapter_config.json"
            config = json.loads(path.read_text())
            for key in ("target_modules", "exclude_modules"):  # PEFT's are sets, in another order in each process
                if isinstance(config[key], list):
                    config[key].sort()
            path.write_text(json.dumps(config, indent=2, sort_keys=True))
        tokenizer.save_pretrained(staged)
        for path in staged.iterdir():
            path.chmod(0o644)
