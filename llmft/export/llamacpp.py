"""llama.cpp by the package xllamacpp: tokens and texts of a GGUF file."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch


def is_installed() -> bool:
    """Whether xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with keys and values in full precision."""

    def __init__(self, path: Path, context_tokens: int) -> None:
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context_tokens
        parameters.n_parallel, parameters.n_gpu_layers, parameters.verbosity, parameters.warmup = 1, 0, -1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(parameters)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a prompt, in which special tokens are parsed."""
        request = {"content": text, "add_special": False, "parse_special": True}
        return list(self._post("/tokenize", request)["tokens"])

    def generate(self, ids: list[int], count: int) -> list[tuple[int, float | None]]:
        """(token, log-probability) of the greedy continuation of `ids`; None for tokens of partial characters."""
        request = {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 1, "return_tokens": True}
        answer = self._post("/completion", {**request, "cache_prompt": False})
        known = [(int(entry["id"]), float(entry["logprob"])) for entry in answer["completion_probabilities"]]
        tokens: list[tuple[int, float | None]] = []
        for token in answer["tokens"]:
            tokens.append(known.pop(0) if known and known[0][0] == token else (int(token), None))
        return tokens

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))
