"""What stands below hydra.sweeper, checked."""

from __future__ import annotations

from typing import Any

from llmft.config.convert import from_plain
from llmft.config.sweep import SearchConfig
from llmft.core.errors import ConfigError, did_you_mean


def search_settings(plain: dict[str, Any]) -> SearchConfig:
    """The settings of a sweep as Hydra gives them.

    Raises ConfigError naming the key of one that is wrong, or that only a search has where there is none.
    """
    default = SearchConfig()
    known = list(SearchConfig.__dataclass_fields__)
    for key in plain:
        if key not in known:
            raise ConfigError(f"hydra.sweeper.{key}: no such key{did_you_mean(key, known)}")
    try:
        settings: SearchConfig = from_plain(plain, SearchConfig)
    except ConfigError as error:
        raise ConfigError(f"hydra.sweeper.{error}") from None
    if settings.sampler is None:
        for key in known:
            if key != "params" and getattr(settings, key) != getattr(default, key):
                raise ConfigError(f"hydra.sweeper.{key}: only a search has it; add hydra.sweeper.sampler=tpe.")
    return settings
