"""The Optuna study of a sweep, as the sweep and its jobs find it."""

from __future__ import annotations

from typing import Any

from ditty_di.config import ConfigError
from ditty_di.io import read_json
from ditty_di.launch.rundir import RunDirectory

#: Attribute of a trial: the folder of its run.
FOLDER = "folder"

#: File in the folder of a sweep: arguments of `optuna.load_study`.
STUDY = "study.json"


def optuna() -> Any:
    """Return the package.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"this needs Optuna ({error}): pip install 'ditty_di[optuna]'") from error
    if int(optuna.__version__.partition(".")[0]) < 4:
        raise ConfigError(
            f"Optuna {optuna.__version__} is too old: pip install 'ditty_di[optuna]' (version 4 or "
            "later; the package hydra-optuna-sweeper is not needed, and keeps an old one)"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def this_trial(run: RunDirectory, pruner: Any) -> Any:
    """Return the unfinished trial of a study that a run belongs to, None without one.

    Args:
        run: directory of the run.
        pruner: what decides whether the trial goes on; None is Optuna's default.
    """
    sweep = run.sweep()
    known = read_json(sweep / STUDY) if sweep is not None else None
    if known is None:
        return None
    study = optuna().load_study(**known, pruner=pruner)
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get(FOLDER) == str(run.path) and not trial.state.is_finished():
            return optuna().trial.Trial(study, trial._trial_id)
    return None
