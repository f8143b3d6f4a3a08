"""run -> everything that a machine without network needs to predict: `python -m llmft.bundle run=DIR to=DIR`."""

from __future__ import annotations

from collections.abc import Sequence

from llmft.config.commands import BundleConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process


def main(argv: Sequence[str]) -> None:
    run_verb("bundle", BundleConfig, lambda config, _: bundle(config), argv)


def bundle(config: BundleConfig) -> None:
    """Prints the size of the bundle, writes it, and tests it if this machine is of the target platform.

    Raises ConfigError for a run or packages that cannot be bundled, NotProved if the bundle's predictions differ.
    """
    from llmft.core.console import Screen
    from llmft.export.bundle import make

    make(config, Screen())


if __name__ == "__main__":
    main(arguments_of_process())
