"""Rows to train on from judged samples, and a report on the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from llmft.config.commands import KeepSamples, SampleConfig
from llmft.core.seeds import stream
from llmft.data.columns import Conversation
from llmft.metrics.rewards import expected_best


def prompt_messages(row: Conversation) -> list[Any]:
    """The row's messages without its answer."""
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def asked_messages(row: Conversation, config: SampleConfig) -> list[Any]:
    """The row's messages without its answer and without the command's system prompt."""
    return [m for m in prompt_messages(row) if config.system is None or m["role"] != "system"]


def training_rows(
    rows: Sequence[Conversation], texts: Sequence[str], reward: Sequence[float] | None, config: SampleConfig
) -> dict[str, list[dict[str, Any]]]:
    """Training rows by file: best, random (the matched control), pairs, and all where configured.

    Without a judge there is only all. Ties go to the first answer. Empty answers are skipped. A prompt whose answers
    all have the same reward, or whose best and worst answer have the same text, has no pair. A system prompt of the
    command is left out: the answers are learned without it.
    """
    names = [] if reward is None else ["best.jsonl", "random.jsonl", "pairs.jsonl"]
    if reward is None or config.keep is KeepSamples.all:
        names.append("all.jsonl")
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, row in enumerate(rows):
        samples = range(number * config.samples, (number + 1) * config.samples)
        lines = _rows_of_prompt(row, [n for n in samples if texts[n].strip()], texts, reward, config)
        for name in files:
            files[name] += lines.get(name, [])
    return files


def _rows_of_prompt(
    row: Conversation, samples: list[int], texts: Sequence[str], reward: Sequence[float] | None, config: SampleConfig
) -> dict[str, list[dict[str, Any]]]:
    prompt = asked_messages(row, config)

    def line(index: int) -> dict[str, Any]:
        messages = [*prompt, {"role": "assistant", "content": texts[index]}]
        return {"id": row.id, "messages": messages} | ({} if reward is None else {"reward": reward[index]})

    lines = {"all.jsonl": [{**line(index), "id": f"{row.id}#{index % config.samples}"} for index in samples]}
    if reward is None or not samples:
        return lines
    best, worst = max(samples, key=reward.__getitem__), min(samples, key=reward.__getitem__)
    draw = np.random.Generator(np.random.PCG64(stream(config.seed, "random", row.id))).integers(len(samples))
    lines |= {"best.jsonl": [line(best)], "random.jsonl": [line(samples[int(draw)])]}
    if reward[best] > reward[worst] and texts[best].strip() != texts[worst].strip():
        pair = {"chosen": line(best)["messages"], "rejected": line(worst)["messages"]}
        lines["pairs.jsonl"] = [{"id": row.id, **pair, "margin": reward[best] - reward[worst]}]
    return lines


def make_report(table: dict[str, list[Any]], each: int) -> dict[str, Any]:
    """Statistics of the samples: expected best of n, picks per temperature, duplicates, unfinished ones, length."""
    count = len(table["id"])
    prompts = [slice(start, start + each) for start in range(0, count, each)]
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "samples": each,
        "duplicates": float(np.mean([1 - len(set(table["text"][prompt])) / each for prompt in prompts])),
        "unfinished": 1 - float(np.mean(table["finished"])),
        "tokens": float(np.mean(table["tokens"])),
        "temperatures": _by_temperature(table, prompts),
    }
    reward = table.get("reward")
    if reward is None:
        return report
    report["expected_best"] = np.mean([expected_best(reward[prompt]) for prompt in prompts], axis=0).tolist()
    # An upper bound of the divergence of the best of n from the policy (arXiv:2009.01325).
    report["best_of_n_nats"] = math.log(each) - (each - 1) / each
    report["judge_against_length"] = _within(prompts, reward, table["tokens"])
    names = [name for name in table if name.startswith("score_")]
    report["judges"] = {
        f"{a.removeprefix('score_')}, {b.removeprefix('score_')}": _within(prompts, table[a], table[b])
        for a, b in combinations(names, 2)
    }
    return report


def _by_temperature(table: dict[str, list[Any]], prompts: Sequence[slice]) -> dict[str, dict[str, float]]:
    """By temperature its samples, their mean reward, and its share of the best ones; ties share a pick."""
    reward: list[float] = table.get("reward", [])
    picks: list[float] = []
    for prompt in prompts if reward else ():
        best = np.asarray(reward[prompt]) == max(reward[prompt])
        picks += (best / best.sum()).tolist()
    entries: dict[str, dict[str, float]] = {}
    for temperature in dict.fromkeys(table["temperature"]):
        samples = [index for index, value in enumerate(table["temperature"]) if value == temperature]
        entry: dict[str, float] = {"samples": len(samples)}
        if reward:
            entry["reward"] = float(np.mean([reward[index] for index in samples]))
            entry["picks"] = sum(picks[index] for index in samples) / len(prompts)
        entries[f"{temperature:g}"] = entry
    return entries


def _within(prompts: Sequence[slice], first: Sequence[float], second: Sequence[float]) -> float | None:
    """The correlation of two columns within prompts; None where one of them does not vary."""
    centred = [
        np.concatenate([np.asarray(values[prompt], np.float64) - np.mean(values[prompt]) for prompt in prompts])
        for values in (first, second)
    ]
    spread = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / spread if spread > 0 else None
