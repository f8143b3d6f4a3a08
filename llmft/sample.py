"""run + prompts -> several answers each, judged: `python -m llmft.sample run=DIR data.files=prompts.jsonl judge=…`.

It writes all samples, the best answer of each prompt as rows to train on, a random one as the matched control, and
pairs for DPO. A killed command continues where it was, with the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.commands import SampleConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process
from llmft.core.outcome import write_outcome


def main(argv: Sequence[str]) -> None:
    run_verb("sample", SampleConfig, lambda config, _: sample(config), argv)


def sample(config: SampleConfig, *, quiet: bool = False) -> Path:
    """Answers the prompts of `config`; returns the directory of the samples.

    Raises ConfigError or DataError for runs, judges or files that cannot be used.
    """
    from llmft.core.console import Screen
    from llmft.evaluation.sampling import plan_samples, run_samples
    from llmft.reports.read import read_dictionary

    screen = Screen(quiet=quiet)
    job = plan_samples(config, screen.warn)
    directory = job.prompts.directory
    report = read_dictionary(directory / "report.json", [])
    if not config.force and report.get("plan") == job.prompts.plan:
        screen.print(f"These samples are done: [bold]{directory}[/bold] (force=true makes them again)")
        _show(screen, report)
        write_outcome(directory)
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with job.prompts.locked():
        if config.force:
            job.prompts.clear_parts()
        from llmft.core.imports import load_libraries, quiet_warnings

        load_libraries()
        from llmft.model.load import drop_base

        try:
            with quiet_warnings():
                report = run_samples(job, screen)
        finally:
            drop_base()
    _show(screen, report)
    screen.print(f"[bold]samples[/bold]  {directory}")
    write_outcome(directory)
    return directory


def _show(screen: Any, report: dict[str, Any]) -> None:
    from llmft.core.console import text_table

    screen.print(
        f"{report['prompts']:,} prompts with {report['samples']} answers each: {report['duplicates']:.0%} repeat "
        f"another, {report['unfinished']:.0%} are unfinished, {report['tokens']:.1f} tokens on average."
    )
    if "expected_best" not in report:
        return
    best = {str(n): f"{value:.3f}" for n, value in enumerate(report["expected_best"], 1)}
    screen.print(text_table(list(best), [list(best.values())], "expected reward of the best of n", left=()))
    rows = [[t, f"{entry['reward']:.3f}", f"{entry['picks']:.0%}"] for t, entry in report["temperatures"].items()]
    screen.print(text_table(["temperature", "reward", "share of the best"], rows, left=()))
    length = report["judge_against_length"]
    if length is not None:
        screen.print(f"Within a prompt the reward's correlation with the length is {length:+.2f}.")


if __name__ == "__main__":
    main(arguments_of_process())
