"""Shows disk usage, the runs that need it, and what can be deleted: `python -m llmft.disk [clean=[…] dry_run=false]`.

Never deleted: checkpoints of an unfinished run, anything of a run that is being trained, W&B runs that are not
uploaded, models in the Hub's cache (other programs use them too).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmft.config.commands import DiskConfig, OutputFormat
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process


def main(argv: Sequence[str]) -> None:
    run_verb("disk", DiskConfig, lambda config, _: disk(config), argv)


def disk(config: DiskConfig) -> dict[str, object]:
    """Prints the report, deletes what `config.clean` names unless it is a dry run, and returns the report."""
    from llmft.checks.disk import delete, scan, show

    report = scan(config)
    if not config.dry_run:
        delete(report)
    plain = report.plain()
    if config.format is OutputFormat.json:
        print(json.dumps(plain, indent=1, ensure_ascii=False))
    else:
        show(report, config)
    return plain


if __name__ == "__main__":
    main(arguments_of_process())
