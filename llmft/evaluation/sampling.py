"""run + prompts -> several answers each, judged: `python -m llmft.sample`.

An answer is a function of the command's seed, its prompt's id and its number. Prompts are answered in parts, and a
finished part is not computed again, so the same command continues after a kill with the same files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmft.config.commands import PredictConfig, SampleConfig
from llmft.config.convert import digest_of
from llmft.config.sections import TrainConfig
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.core.files import write_atomically
from llmft.core.seeds import stream
from llmft.data.columns import Conversation
from llmft.data.examples import Example
from llmft.data.messages import message_text
from llmft.evaluation.jobs import PredictionJob, compute_parts, plan_predictions
from llmft.evaluation.picked import asked_messages, make_report, prompt_messages, training_rows
from llmft.evaluation.predictor import Predictor
from llmft.metrics.judging import Judge, check_combination, combine_scores, judges_of
from llmft.model.generate import decoder
from llmft.model.sampling import Draw, sample
from llmft.runs.directory import Run, directories, finished_run
from llmft.runs.naming import slug
from llmft.runs.predictions import read_table, write_table

FOLDER = "samples"
PROMPTS_PER_PART = 16
"""The most that a kill loses."""


@dataclass
class SampleJob:
    """A run's prompts, the settings of the answers, and their judges."""

    prompts: PredictionJob
    config: SampleConfig
    judges: list[Judge]

    @property
    def temperatures(self) -> list[float]:
        """The temperature of each of a prompt's samples."""
        turns = self.config.samples // len(self.config.temperatures)
        return [float(t) for t in self.config.temperatures for _ in range(turns)]


def run_samples(job: SampleJob, screen: Screen) -> dict[str, Any]:
    """Writes and judges the samples; returns the report."""
    folder, rows = job.prompts.open_parts("samples"), job.prompts.conversations
    parts = [range(start, min(start + PROMPTS_PER_PART, len(rows))) for start in range(0, len(rows), PROMPTS_PER_PART)]
    unjudged = [judge for judge in job.judges if judge.is_run and not _scores_file(folder, judge).is_file()]
    writer = _Writer(job)
    try:
        columns = compute_parts(folder, parts, writer.part, screen)
        for judge, scores_of_judge in _scored(unjudged, job, columns, writer, screen):
            write_table(_scores_file(folder, judge), {"score": scores_of_judge})
    finally:
        writer.close()
    prompts = [_prompt_text(rows[row]) for row in columns["row"]]
    last = [rows[row].messages[-1] for row in columns["row"]]
    references = [message_text(message) if message["role"] == "assistant" else "" for message in last]
    scores: dict[str, list[float]] = {}
    for judge in job.judges:
        if judge.is_run:
            scores[judge.name] = read_table(_scores_file(folder, judge))["score"]
        else:
            scores[judge.name] = judge.scores(prompts, references, columns["text"])
    reward = combine_scores(job.config.combine, job.judges, scores).tolist() if scores else None
    return _write_all(job, columns, scores, reward)


def _scores_file(folder: Path, judge: Judge) -> Path:
    """The file of a reward run's scores of all answers, stored with the parts, so that a kill does not lose them."""
    return folder / f"judge-{slug(judge.name)}.parquet"


def _scored(
    judges: Sequence[Judge], job: SampleJob, columns: dict[str, list[Any]], writer: _Writer, screen: Screen
) -> Iterator[tuple[Judge, list[float]]]:
    """Yields each reward run with its scores of all answers. Judges that share the policy's base run first."""
    from llmft.training.reward_model import load_judges, shares_base

    if not judges:
        return
    config, host = job.config, writer.host()
    # Rows without the command's system prompt, which only the answers were written under.
    rows = [replace(row, messages=asked_messages(row, config)) for row in job.prompts.conversations]
    prompts = [rows[row] for row in columns["row"]]
    for judge in sorted(judges, key=lambda judge: not shares_base(judge.path, host)):
        if not shares_base(judge.path, host):
            host = None
            writer.close()
        models = load_judges([judge], "judge", host, screen.print, config.accelerator, config.threads)
        yield judge, models.pop(judge.name).scores(prompts, columns["text"])


class _Writer:
    """The run's model, loaded where answers or scores are missing."""

    def __init__(self, job: SampleJob) -> None:
        self.job = job

    @functools.cached_property
    def predictor(self) -> Predictor:
        config = self.job.config
        options = PredictConfig(run=config.run, prompts=["-"], accelerator=config.accelerator, threads=config.threads)
        return Predictor(self.job.prompts, options)

    @functools.cached_property
    def examples(self) -> list[Example]:
        return self.predictor.encode(self.job.prompts.conversations)

    def host(self) -> Any:
        """The model as a host of judges; None where they cannot share its base."""
        from llmft.training.reward_model import host_of

        return host_of(self.predictor.model, self.predictor.config, self.predictor.located.fingerprint)

    def close(self) -> None:
        """Releases the base."""
        if "predictor" in vars(self):
            self.predictor.close()

    def part(self, rows: range) -> dict[str, list[Any]]:
        """The samples of the prompts `rows` as columns."""
        predictor, config, temperatures = self.predictor, self.job.config, self.job.temperatures
        ends, examples = predictor.encoder.ends, [self.examples[row] for row in rows]
        decode = decoder(predictor.tokenizer, [*predictor.config.prompt.stop, ends.text])
        with predictor.autocast():
            groups = sample(
                predictor.model,
                [list(example.input_ids) for example in examples],
                [
                    [
                        Draw(t, stream(config.seed, "sample", example.conversation.id, number))
                        for number, t in enumerate(temperatures)
                    ]
                    for example in examples
                ],
                pad_id=predictor.tokenizer.pad_token_id,
                ends=ends,
                max_new_tokens=config.max_new_tokens or predictor.config.task.max_new_tokens,
                batch_size=config.batch_size,
                context_tokens=predictor.context_tokens,
            )
            logprobs = [  # of the answers to one prompt together, at temperature 1, with their ends
                predictor.logprobs([example] * len(group), [answer.ids for answer in group])
                for example, group in zip(examples, groups, strict=True)
            ]
        answers = [answer for group in groups for answer in group]
        return {
            "row": [row for row in rows for _ in temperatures],
            "sample": [*range(len(temperatures))] * len(rows),
            "temperature": temperatures * len(rows),
            "text": [decode(ends.cut(answer.ids)) for answer in answers],
            "logprob": [nats for group in logprobs for nats in group],
            "tokens": [len(answer.ids) for answer in answers],
            "finished": [answer.finished for answer in answers],
        }


def _prompt_text(row: Conversation) -> str:
    return message_text(prompt_messages(row)[-1])


# ------------------------------------------------------------------------------------------------------- what is kept


def _write_all(
    job: SampleJob, columns: dict[str, list[Any]], scores: dict[str, list[float]], reward: list[float] | None
) -> dict[str, Any]:
    """Writes samples.parquet, the rows to train on, and last report.json, which marks the samples as complete."""
    rows, directory = job.prompts.conversations, job.prompts.directory
    table: dict[str, list[Any]] = {
        "id": [rows[row].id for row in columns["row"]],
        "prompt": [_prompt_text(rows[row]) for row in columns["row"]],
        **{name: values for name, values in columns.items() if name != "row"},
        **{f"score_{name}": values for name, values in scores.items()},
    }
    if reward is not None:
        table["reward"] = reward
    write_table(directory / "samples.parquet", table)
    report = make_report(table, job.config.samples)
    files = training_rows(rows, columns["text"], reward, job.config)
    for name, lines in files.items():
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(directory / name, content.encode())
    report |= {"plan": job.prompts.plan, "rows": {name: len(lines) for name, lines in files.items()}}
    write_atomically(directory / "report.json", json.dumps(report, indent=1).encode())
    job.prompts.clear_parts()
    return report


# ----------------------------------------------------------------------------------------------------------- planning


def plan_samples(config: SampleConfig, warn: Callable[[str], None]) -> SampleJob:
    """The job of a command; needs no weights. Raises ConfigError or DataError for unusable runs, judges or rows."""
    named = directories(config.run, "run")
    if len(named) != 1:
        raise ConfigError(f"run={config.run}: one run is needed; name its directory.")
    run, trained = finished_run(named[0])
    if not trained.task.writes:
        raise ConfigError(f"run={named[0]}: this run was not trained to write text (task={trained.task.name}).")
    judges = judges_of(config.judge)
    check_combination(config.combine, judges)
    job = _rows_of(run, trained, config)
    for note in job.notes:
        warn(note)
    rows = job.conversations[: config.limit]
    if config.system is not None:
        first = {"role": "system", "content": config.system}
        rows = [replace(row, messages=[first, *(m for m in row.messages if m["role"] != "system")]) for row in rows]
    answering = [
        *(run.key, run.digests(), config.seed, config.samples, list(map(float, config.temperatures))),
        *(config.max_new_tokens, config.system, [[row.id, row.messages, row.tools] for row in rows]),
    ]
    plan = digest_of([answering, [_identity(judge) for judge in judges], config.combine, config.keep.value])
    name = slug(config.name or f"{job.directory.name.partition('-')[0]}-{plan[:8]}")
    return SampleJob(
        replace(job, conversations=rows, directory=run.directory / FOLDER / name, plan=plan), config, judges
    )


def _rows_of(run: Run, trained: TrainConfig, config: SampleConfig) -> PredictionJob:
    """The prompts: from files or the command line, else the run's own rows of config.split."""
    if config.data.files is not None or config.prompts is not None:
        predict_config = PredictConfig(run=config.run, prompts=config.prompts, data=config.data)
        planned = plan_predictions(run.directory, predict_config)
        assert isinstance(planned, PredictionJob)
        return planned
    from llmft.training.prepare import prepare

    owner = trained if config.rows is None else finished_run(Path(config.rows).expanduser())[1]
    rows = prepare(owner, open_directory=False).conversations.get(config.split, [])
    if not rows:
        raise ConfigError(f"split={config.split}: this run has no such rows; name files in data.files.")
    fingerprint = run.recorded("data", "rows_fingerprint")
    directory = run.directory / FOLDER / config.split
    return PredictionJob(run, trained, directory, rows, digest=fingerprint, rows_fingerprint=fingerprint)


def _identity(judge: Judge) -> list[Any]:
    """All that a judge's scores depend on."""
    if not judge.is_run:
        return [judge.name, judge.path, dict(judge.options)]
    run, trained = finished_run(Path(judge.path).expanduser())
    if not trained.task.scores_answers:
        raise ConfigError(
            f"judge={judge.path}: this run scores no answers (task={trained.task.name}); train task=reward."
        )
    return [judge.name, run.key, run.digests()]
