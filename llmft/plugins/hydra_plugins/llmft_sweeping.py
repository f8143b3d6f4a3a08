"""llmft's sweepers and launcher as Hydra knows them: `hydra/sweeper=grid` or `optuna`, `hydra/launcher=local`.

Hydra takes plugins from the namespace package `hydra_plugins` only, wherever it lies on the path;
`llmft.config.hydra_app` puts this folder there. Nothing here is imported by anything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf, open_dict

import llmft.config.hydra_app
from llmft.config.convert import to_plain
from llmft.config.hydra_app import config_of_command, explain
from llmft.config.invocation import Invocation
from llmft.config.overrides import as_override, is_text, quoted, shipped_directory
from llmft.config.sections import TrainConfig
from llmft.config.sweep import SearchConfig, search_settings
from llmft.core.errors import ConfigError, UserError, as_user_error

if TYPE_CHECKING:
    from llmft.sweeps.trials import Planner

store = ConfigStore.instance()
for group, option, node in (
    ("hydra/launcher", "local", {"_target_": f"{__name__}.LocalLauncher"}),
    ("hydra/launcher", "ray", {"_target_": f"{__name__}.LocalLauncher"}),  # the supervisor is here all the same
    ("hydra/sweeper", "grid", {"_target_": f"{__name__}.OwnSweeper", **to_plain(SearchConfig())}),
    ("hydra/sweeper", "optuna", {"_target_": f"{__name__}.OwnSweeper", **to_plain(SearchConfig(sampler="tpe"))}),
):
    store.store(group=group, name=option, node=node, provider="llmft")


class ReadySweeps(SearchPathPlugin):
    """Finds the files of sweeps/ wherever llmft is installed."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if llmft.config.hydra_app.has_ready_sweeps:
            search_path.append("llmft", f"file://{shipped_directory('sweeps')}")


class LocalLauncher(Launcher):
    """Stands for worker processes under a supervisor, which `OwnSweeper` starts itself."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.sweeper_name = config.hydra.runtime.choices.get("hydra/sweeper")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Refuses the jobs of another sweeper."""
        raise ConfigError(f"hydra/sweeper={self.sweeper_name}: choose grid, or optuna for a search.")


class OwnSweeper(Sweeper):
    """All combinations of the values given on the command line and in `params`, or with a sampler a search over them.

    `SearchConfig` explains the settings. A file of `sweeps/` cannot choose another sweeper, since what conf/train.yaml
    says of it goes before; so it is one, and `hydra.sweeper.sampler` decides.
    """

    def __init__(self, **settings: Any) -> None:
        plain: Any = OmegaConf.to_container(OmegaConf.create(settings))
        self.settings = search_settings(plain)

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.fixed = hydra_context.config_loader, fixed_overrides(config)
        self.planner = make_planner(self.loader, config, task_function.invocation)
        self.launcher_name = config.hydra.runtime.choices.get("hydra/launcher")
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plans the trials or searches for them, runs those that are missing, and reports."""
        try:
            return self._sweep(arguments)
        except (OSError, ValueError) as error:
            shown_error = as_user_error(error)
            if isinstance(shown_error, UserError):
                raise shown_error from error
            # Not to be taken for a command line that cannot be read: what began has its record.
            raise RuntimeError(f"the sweep broke off: {error}") from error

    def _sweep(self, arguments: list[str]) -> Any:
        from llmft.sweeps.sweep import run_elsewhere, run_grid

        is_local = isinstance(self.launcher, LocalLauncher)
        overrides = parsed(self.loader, self.settings.params or {}, arguments)
        planner, fixed = self.planner, self.fixed
        if self.settings.sampler is None:
            jobs = combinations(overrides)
            return run_grid(planner, jobs, fixed) if is_local else run_elsewhere(planner, jobs, fixed, self.launcher)
        if not is_local:
            local_alone = "a search hears from its trials while they run, which only local ones let it."
            raise ConfigError(f"hydra/launcher={self.launcher_name}: {local_alone}")
        from llmft.sweeps.search import run_search

        return run_search(planner, self.settings, overrides, fixed)


def combinations(overrides: Sequence[Any]) -> list[list[str]]:
    """Every combination of the values of parsed overrides, of which later ones replace earlier ones of their key.

    Raises ConfigError for a sweep over a range without values.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigError(f"{key}: a grid needs values; interval(…) is for a search (hydra.sweeper.sampler=tpe).")
    return [list(job) for job in itertools.product(*values.values())]


def parsed(loader: Any, params: Mapping[str, Any], arguments: Sequence[str]) -> list[Any]:
    """Hydra's overrides of `params` and behind them of the command line."""
    texts = [as_override(f"{key}={_values(key, value)}", TrainConfig, several=True) for key, value in params.items()]
    return list(OverridesParser.create(config_loader=loader).parse_overrides([*texts, *arguments]))


def _values(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_item(item, text=is_text(key, TrainConfig)) for item in value)
    return "null" if value is None else str(value)


def _item(value: Any, *, text: bool) -> str:
    """One value of a list as Hydra's grammar reads it: a sentence with a comma stays one value."""
    if value is None:
        return "null"
    shown = str(value)
    if isinstance(value, str) and not shown.startswith(("'", '"')) and (text or ("," in shown and "(" not in shown)):
        return shown if shown.startswith(("[", "{")) and not text else quoted(shown)
    return shown


def fixed_overrides(config: Any) -> list[str]:
    """What the command line says for all trials alike."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # ${…} in one is text here
    return list(map(str, overrides))


def make_planner(loader: Any, master: Any, invocation: Invocation) -> Planner:
    """A planner that composes with Hydra."""
    from llmft.sweeps.trials import Planner

    def compose(overrides: Sequence[str]) -> TrainConfig:
        composed = loader.load_sweep_config(master, list(overrides))
        HydraConfig.instance().set_config(composed)  # for ${hydra:…} in a config
        on_ray = composed.hydra.runtime.choices.get("hydra/launcher") == "ray"
        with open_dict(composed):
            del composed["hydra"]
        config = config_of_command(composed, TrainConfig, invocation)
        if on_ray and config.sweep.ray.address is None:
            config.sweep.ray.address = "auto"
        return config

    def in_a_sentence(error: Exception) -> Exception:
        return error if isinstance(error, UserError) else explain(error, TrainConfig, invocation.argv) or error

    return Planner(compose, in_a_sentence, invocation)
