"""Hydra's sweeper `optuna`, and no other of that name."""

from hydra.core.config_store import ConfigStore

from ditty_di.sweeps.optuna_sweep import OptunaSweep


class Optuna(OptunaSweep):
    """See `ditty_di.sweeps.optuna_sweep.OptunaSweep`."""


# hydra-optuna-sweeper, where it is installed, registers a choice of this name, whose fields Hydra
# would demand of ours.
_groups = ConfigStore.instance().repo.get("hydra", {}).get("sweeper", {})
_groups.pop("optuna.yaml", None)
_groups.pop("sampler", None)
