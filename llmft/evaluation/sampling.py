"""run + prompts -> several answers each, judged: `python -m llmft.sample`.

What an answer says is a function of the command's seed, its prompt's id and its number. Prompts are answered part by
part, and a part that is there is not written again, so the same command goes on after a kill to the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmft.config.commands import Keep, PredictConfig, SampleConfig
from llmft.config.convert import canonical
from llmft.config.sections import TrainConfig
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.core.files import staged_file, write_atomically
from llmft.core.seeds import stream
from llmft.data.batch import collate
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example
from llmft.data.messages import message_text
from llmft.evaluation.jobs import PredictionJob, plan_predictions
from llmft.evaluation.predictor import Predictor
from llmft.metrics.judging import Judge, check_combination, combine_scores, judges_of
from llmft.metrics.rewards import expected_best
from llmft.model.sampling import Draw, Drawn, sample
from llmft.runs.directory import Run, directories, finished_run, slug
from llmft.runs.predictions import read_table
from llmft.training.objectives.language_modeling import LanguageModeling
from llmft.training.samples import decoder

FOLDER = "samples"
PROMPTS_PER_PART = 16
"""What a kill costs at most."""


@dataclass
class SampleJob:
    """A run's prompts, how they are answered, and by whom the answers are judged."""

    job: PredictionJob
    config: SampleConfig
    judges: list[Judge]

    @property
    def temperatures(self) -> list[float]:
        """Of each of a prompt's samples."""
        turns = self.config.samples // len(self.config.temperatures)
        return [float(t) for t in self.config.temperatures for _ in range(turns)]

    @property
    def directory(self) -> Path:
        """Where the samples go."""
        return self.job.directory


def run_samples(job: SampleJob, screen: Screen) -> dict[str, Any]:
    """Writes and judges the samples; returns the report."""
    folder = job.job.open_parts("samples")
    rows = job.job.conversations
    parts = [range(start, min(start + PROMPTS_PER_PART, len(rows))) for start in range(0, len(rows), PROMPTS_PER_PART)]
    missing = [part for part in parts if not (folder / f"part-{part.start:08d}.parquet").is_file()]
    if 0 < len(missing) < len(parts):
        screen.print(f"{len(parts) - len(missing)} of {len(parts)} parts are done already.")
    if missing:
        writer = _Writer(job)
        try:
            for part in missing:
                _write_table(folder / f"part-{part.start:08d}.parquet", writer.part(part))
        finally:
            writer.close()
    columns = _joined([read_table(folder / f"part-{part.start:08d}.parquet") for part in parts])
    prompts = [_prompt_text(rows[row]) for row in columns["row"]]
    references = [_reference(rows[row]) for row in columns["row"]]
    scores: dict[str, list[float]] = {}
    for judge in job.judges:
        if judge.is_run:
            scores[judge.name] = _scored(judge, job, columns, folder)
        else:
            scores[judge.name] = judge.scores(prompts, references, columns["text"])
    reward = combine_scores(job.config.combine, job.judges, scores).tolist() if scores else None
    return _write_all(job, columns, scores, reward)


def _scored(judge: Judge, job: SampleJob, columns: dict[str, list[Any]], folder: Path) -> list[float]:
    """What a reward run says of every answer; kept beside the parts, so that a kill costs no more than this."""
    from llmft.training.reward_model import RewardModel

    path = folder / f"judge-{slug(judge.name)}.parquet"
    if path.is_file():
        return read_table(path)["score"]
    config = job.config
    model = RewardModel(judge.path, f"judge.{judge.name}", config.accelerator, config.threads)
    try:
        # Rows without a system prompt that only the answers were written under.
        prompts = [replace(row, messages=_asked(row, config)) for row in job.job.conversations]
        found = model.scores([prompts[row] for row in columns["row"]], columns["text"])
    finally:
        model.close()
    _write_table(path, {"score": found})
    return found


class _Writer:
    """The run's model, which answers."""

    def __init__(self, job: SampleJob) -> None:
        from llmft.core.imports import load_libraries

        load_libraries()
        config = job.config
        options = PredictConfig(run=config.run, prompts=["-"], accelerator=config.accelerator, threads=config.threads)
        self.job = job
        self.predictor = Predictor(job.job, options)
        self.examples = self.predictor.encode(job.job.conversations)
        stops = [*self.predictor.config.prompt.stop, self.predictor.encoder.ends.text]
        self.decode = decoder(self.predictor.tokenizer, stops)

    def close(self) -> None:
        """Gives the base back."""
        self.predictor.close()

    def part(self, rows: range) -> dict[str, list[Any]]:
        """The samples of some prompts as columns."""
        predictor, config = self.predictor, self.job.config
        conversations = self.job.job.conversations
        ends = predictor.encoder.ends
        draws = [
            [
                Draw(temperature, stream(config.seed, "sample", conversations[row].id, number))
                for number, temperature in enumerate(self.job.temperatures)
            ]
            for row in rows
        ]
        with predictor.autocast():
            found = sample(
                predictor.model,
                [list(self.examples[row].input_ids) for row in rows],
                draws,
                pad_id=predictor.tokenizer.pad_token_id,
                ends=ends,
                max_new_tokens=config.max_new_tokens or predictor.config.task.max_new_tokens,
                batch_size=config.batch_size,
                context_tokens=predictor.context_tokens,
            )
            logprobs = [self._logprobs(self.examples[row], own) for row, own in zip(rows, found, strict=True)]
        columns: dict[str, list[Any]] = {
            name: [] for name in ("row", "sample", "temperature", "text", "logprob", "tokens", "finished")
        }
        for row, own, known in zip(rows, found, logprobs, strict=True):
            for number, (answer, logprob) in enumerate(zip(own, known, strict=True)):
                values = [row, number, self.job.temperatures[number], self.decode(ends.cut(answer.ids)), logprob]
                for name, value in zip(columns, [*values, len(answer.ids), answer.finished], strict=True):
                    columns[name].append(value)
        return columns

    @torch.no_grad()
    def _logprobs(self, example: Example, answers: Sequence[Drawn]) -> list[float]:
        """Nats of each answer with its end under the run at temperature 1; the answers of a prompt together."""
        prompt = list(example.input_ids)
        rows = [Example([*prompt, *a.ids], [*[IGNORE] * len(prompt), *a.ids], example.conversation) for a in answers]
        batch = collate(rows, range(len(rows)), self.predictor.tokenizer.pad_token_id).to(self.predictor.device)
        nll: torch.Tensor = LanguageModeling().losses(self.predictor.model, batch).nll
        return (-nll.double().cpu()).tolist()


def _write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with staged_file(path) as file:
        pq.write_table(pa.table(columns), file)


def _joined(tables: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def _prompt_messages(row: Conversation) -> list[Any]:
    """The messages that are answered."""
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def _asked(row: Conversation, config: SampleConfig) -> list[Any]:
    """The messages that are answered, without a system prompt of the command."""
    return [m for m in _prompt_messages(row) if config.system is None or m["role"] != "system"]


def _prompt_text(row: Conversation) -> str:
    return message_text(_prompt_messages(row)[-1])


def _reference(row: Conversation) -> str:
    return message_text(row.messages[-1]) if row.messages[-1]["role"] == "assistant" else ""


# ------------------------------------------------------------------------------------------------------- what is kept


def _write_all(
    job: SampleJob, columns: dict[str, list[Any]], scores: dict[str, list[float]], reward: list[float] | None
) -> dict[str, Any]:
    """samples.parquet, the rows to train on, and last report.json, which says that all is there."""
    rows, directory = job.job.conversations, job.directory
    table: dict[str, list[Any]] = {
        "id": [rows[row].id for row in columns["row"]],
        "prompt": [_prompt_text(rows[row]) for row in columns["row"]],
        **{name: values for name, values in columns.items() if name != "row"},
        **{f"score_{name}": values for name, values in scores.items()},
    }
    if reward is not None:
        table["reward"] = reward
    _write_table(directory / "samples.parquet", table)
    report = make_report(table, job.config.samples)
    files = training_rows(rows, columns["text"], reward, job.config)
    for name, lines in files.items():
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(directory / name, content.encode())
    report |= {"plan": job.job.plan, "rows": {name: len(lines) for name, lines in files.items()}}
    write_atomically(directory / "report.json", json.dumps(report, indent=1).encode())
    job.job.clear_parts()
    return report


def training_rows(
    rows: Sequence[Conversation], texts: Sequence[str], reward: Sequence[float] | None, config: SampleConfig
) -> dict[str, list[dict[str, Any]]]:
    """By file the rows that a training reads: best, random (the matched control), pairs, and all where asked.

    Without a judge there are all alone. Of answers that are judged equal the first is the best. An empty answer is
    nothing to learn. A prompt whose answers are all judged equal, or whose best and worst answer say the same, has no
    pair. A system prompt of the command is left out: the answers are learned without it.
    """
    names = [] if reward is None else ["best.jsonl", "random.jsonl", "pairs.jsonl"]
    if reward is None or config.keep is Keep.all:
        names.append("all.jsonl")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, row in enumerate(rows):
        places = range(number * config.samples, (number + 1) * config.samples)
        places_with_text = [place for place in places if texts[place].strip()]
        for name, lines in _rows_of_prompt(row, places_with_text, texts, reward, config).items():
            if name in found:
                found[name] += lines
    return found


def _rows_of_prompt(
    row: Conversation, places: list[int], texts: Sequence[str], reward: Sequence[float] | None, config: SampleConfig
) -> dict[str, list[dict[str, Any]]]:
    prompt = _asked(row, config)

    def line(place: int) -> dict[str, Any]:
        messages = [*prompt, {"role": "assistant", "content": texts[place]}]
        return {"id": row.id, "messages": messages} | ({} if reward is None else {"reward": reward[place]})

    lines = {"all.jsonl": [{**line(place), "id": f"{row.id}#{place % config.samples}"} for place in places]}
    if reward is None or not places:
        return lines
    best, worst = max(places, key=reward.__getitem__), min(places, key=reward.__getitem__)
    draw = np.random.Generator(np.random.PCG64(stream(config.seed, "random", row.id))).integers(len(places))
    lines |= {"best.jsonl": [line(best)], "random.jsonl": [line(places[int(draw)])]}
    if reward[best] > reward[worst] and texts[best].strip() != texts[worst].strip():
        pair = {"chosen": line(best)["messages"], "rejected": line(worst)["messages"]}
        lines["pairs.jsonl"] = [{"id": row.id, **pair, "margin": reward[best] - reward[worst]}]
    return lines


def make_report(table: dict[str, list[Any]], each: int) -> dict[str, Any]:
    """What the samples are like: expected best of n, picks per temperature, duplicates, unfinished, length."""
    count = len(table["id"])
    prompts = [slice(start, start + each) for start in range(0, count, each)]
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "samples": each,
        "duplicates": float(np.mean([1 - len(set(table["text"][own])) / each for own in prompts])),
        "unfinished": 1 - float(np.mean(table["finished"])),
        "tokens": float(np.mean(table["tokens"])),
        "temperatures": _by_temperature(table, prompts),
    }
    reward = table.get("reward")
    if reward is None:
        return report
    report["expected_best"] = np.mean([expected_best(reward[own]) for own in prompts], axis=0).tolist()
    # How far the best of n may move from the policy: an upper bound (arXiv:2009.01325).
    report["best_of_n_nats"] = math.log(each) - (each - 1) / each
    report["judge_against_length"] = _within(prompts, reward, table["tokens"])
    names = [name for name in table if name.startswith("score_")]
    report["judges"] = {
        f"{a.removeprefix('score_')}, {b.removeprefix('score_')}": _within(prompts, table[a], table[b])
        for a, b in combinations(names, 2)
    }
    return report


def _by_temperature(table: dict[str, list[Any]], prompts: Sequence[slice]) -> dict[str, dict[str, float]]:
    """Of each temperature its samples, their mean reward, and its share of the best; equal ones share a pick."""
    reward: list[float] = table.get("reward", [])
    picks: list[float] = []
    for own in prompts if reward else ():
        best = np.asarray(reward[own]) == max(reward[own])
        picks += (best / best.sum()).tolist()
    found: dict[str, dict[str, float]] = {}
    for temperature in dict.fromkeys(table["temperature"]):
        places = [place for place, value in enumerate(table["temperature"]) if value == temperature]
        entry: dict[str, float] = {"samples": len(places)}
        if reward:
            entry["reward"] = float(np.mean([reward[place] for place in places]))
            entry["picks"] = sum(picks[place] for place in places) / len(prompts)
        found[f"{temperature:g}"] = entry
    return found


def _within(prompts: Sequence[slice], one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of two numbers of the answers within prompts; None where one of them does not vary."""
    centred = [
        np.concatenate([np.asarray(values[own], np.float64) - np.mean(values[own]) for own in prompts])
        for values in (one, other)
    ]
    spread = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / spread if spread > 0 else None


# ----------------------------------------------------------------------------------------------------------- planning


def plan_samples(config: SampleConfig, warn: Callable[[str], None] = print) -> SampleJob:
    """The job of a command; needs no weights. Raises ConfigError or DataError for what cannot be answered."""
    found = directories(config.run, "run")
    if len(found) != 1:
        raise ConfigError(f"run={config.run}: one run answers; name its directory.")
    run, trained = finished_run(found[0])
    if not trained.task.writes:
        raise ConfigError(f"run={found[0]}: this run was not trained to write text (task={trained.task.name}).")
    judges = judges_of(config.judge)
    check_combination(config.combine, judges)
    told = [_told(judge) for judge in judges]
    job = _rows_of(run, trained, config)
    for note in job.notes:
        warn(note)
    rows = job.conversations[: config.limit]
    if config.system is not None:
        rows = [replace(row, messages=_with_system(row.messages, config.system)) for row in rows]
    answering = [
        *(run.key, run.digests(), config.seed, config.samples, list(map(float, config.temperatures))),
        *(config.max_new_tokens, config.system, [[row.id, row.messages, row.tools] for row in rows]),
    ]
    plan = hashlib.sha256(canonical([answering, told, config.combine, config.keep.value]).encode()).hexdigest()
    name = slug(config.name or f"{job.directory.name.partition('-')[0]}-{plan[:8]}")
    return SampleJob(
        replace(job, conversations=rows, directory=run.directory / FOLDER / name, plan=plan), config, judges
    )


def _rows_of(run: Run, trained: TrainConfig, config: SampleConfig) -> PredictionJob:
    """The run's prompts: those of files or of the command line, else the run's own rows of config.split."""
    if config.data.files is not None or config.prompts is not None:
        given = PredictConfig(run=config.run, prompts=config.prompts, data=config.data)
        planned = plan_predictions(run.directory, given)
        assert isinstance(planned, PredictionJob)
        return planned
    from llmft.training.prepare import prepare

    owner = trained if config.rows is None else finished_run(Path(config.rows).expanduser())[1]
    rows = prepare(owner, open_directory=False).conversations.get(config.split, [])
    if not rows:
        raise ConfigError(f"split={config.split}: this run has no such rows; name files in data.files.")
    facts = run.fact("data", "rows_fingerprint")
    return PredictionJob(run, trained, run.directory / FOLDER / config.split, rows, [], facts, None, None, facts, "")


def _with_system(messages: list[Any], system: str) -> list[Any]:
    return [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]


def _told(judge: Judge) -> list[Any]:
    """What of a judge its scores depend on."""
    if not judge.is_run:
        return [judge.name, judge.path, dict(judge.options)]
    run, trained = finished_run(Path(judge.path).expanduser())
    if not trained.task.scores_answers:
        raise ConfigError(
            f"judge={judge.path}: this run scores no answers (task={trained.task.name}); train task=reward."
        )
    return [judge.name, run.key, run.digests()]
