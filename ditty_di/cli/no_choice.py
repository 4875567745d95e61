"""`GROUP=none`: take no choice of a group, and leave its node as config.yaml has it (null)."""

from __future__ import annotations

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

#: Entry of the search path, after all folders: a file of this name in a group comes first.
PATH = "none://"
NAME = "none"


class NoChoice(ConfigSource):
    """Offer an empty configuration `none` in every group."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of `PATH`."""
        return PATH.partition(":")[0]

    def load_config(self, config_path: str) -> ConfigResult:
        """Return a configuration that sets nothing."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"there is no {config_path}")
        return ConfigResult(
            provider=self.provider,
            path=PATH,
            config=OmegaConf.create({}),
            header={"package": "_global_"},
        )

    def available(self) -> bool:
        """Return whether the source can be read: always."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return whether the source has such a group: it only adds a choice to those of others."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Return whether the path is the choice `none` of a group."""
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return bool(group) and name == NAME

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the choices to show in messages: none, for it is not a file."""
        return []


def register() -> None:
    """Make Hydra know the source."""
    Plugins.instance().register(NoChoice)
