"""Hydra's sweeper `optuna`: search values in a study that can be resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from ditty_di.config import ConfigError
from ditty_di.io import write_json
from ditty_di.launch.rundir import RunDirectory
from ditty_di.sweeps.parallel import ParallelJobs, folder_of, hydra_section
from ditty_di.sweeps.study import FOLDER, STUDY, optuna


@dataclass(eq=False)
class OptunaSweep(Sweeper):
    """Ask an Optuna study for the values of each job, and tell it the objective.

    The smaller an objective the better. A job whose run was pruned is a pruned trial, one that
    failed a failed trial, and one that was stopped (Ctrl-C) goes on when the sweep is started again
    in its folder, before new trials are asked for.

    Args:
        sampler: configuration of an `optuna.samplers.BaseSampler`.
        storage: URL of the study's database; None is `study.db` in the folder of the sweep.
        study_name: None is the name of that folder. An existing study is continued.
        n_trials: number of trials in the study, with those of earlier starts.
        n_jobs: number of trials that are asked for at a time; None is `hydra.launcher.jobs`, or 1.
        max_failure_rate: the sweep ends early when a greater share of its trials has failed.
        params: values to search, by key, as on the command line.
        custom_search_space: import path of a function `(config, trial)` that suggests further ones.
    """

    sampler: Any = None
    _: KW_ONLY
    storage: str | None = None
    study_name: str | None = None
    n_trials: int = 20
    n_jobs: int | None = None
    max_failure_rate: float = 1.0
    params: Mapping[str, Any] | None = None
    custom_search_space: str | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what `sweep` needs; called by Hydra.

        Args:
            hydra_context: has the loader that composes each job.
            task_function: runs a job.
            config: the configuration of the sweep.
        """
        self.settings: Any = config
        self.loader = hydra_context.config_loader
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials; called by Hydra.

        Args:
            arguments: overrides, some with several values.

        Raises:
            ConfigError: Optuna is missing, nothing is searched, or too many trials failed.
        """
        self.optuna = optuna()
        self._read_space(arguments)
        # A mistake is found before there is a study.
        values = self._suggest(self.optuna.create_study().ask())
        hydra_section(self.loader, self.settings, 0, values)
        folder = Path(self.settings.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.settings, folder / "multirun.yaml")
        storage = self.storage or f"sqlite:///{folder}/study.db"
        study = {"storage": storage, "study_name": self.study_name or folder.name}
        write_json(folder / STUDY, study)
        sampler = instantiate(self.sampler)
        self.study = self.optuna.create_study(**study, sampler=sampler, load_if_exists=True)
        if self.study.get_trials(deepcopy=False) and sampler is not None:
            sampler.reseed_rng()  # a seeded one would suggest the values of its first start again
        self._running: dict[int, tuple[Any, Path]] = {}
        self._ended = self._failed = 0
        try:
            self._launch()
        finally:
            self._write_best(folder)
        if self._too_many_failed():
            raise ConfigError(
                f"{self._failed} of {self._ended} trials failed, more than "
                f"hydra.sweeper.max_failure_rate={self.max_failure_rate}"
            )

    # -- values ---------------------------------------------------------------------------------

    def _read_space(self, arguments: Sequence[str]) -> None:
        """Sort the overrides into fixed ones and suggestions."""
        typed = OverridesParser.create().parse_overrides(
            [*(f"{key}={value}" for key, value in (self.params or {}).items()), *arguments]
        )
        by_key = {override.get_key_element(): override for override in typed}  # the last one counts
        self._fixed = [str(o.input_line) for o in by_key.values() if not o.is_sweep_override()]
        searched = [override for override in by_key.values() if override.is_sweep_override()]
        self._suggestions = [_suggestion(override) for override in searched]
        if not searched and self.custom_search_space is None:
            raise ConfigError(
                "hydra/sweeper=optuna: no key has values to search; write an interval such as "
                "'optimizer.lr=tag(log, interval(1e-4, 1e-2))', or choices: optimizer=adamw,muon"
            )

    def _suggest(self, trial: Any) -> list[str]:
        """Return the overrides of a trial."""
        for suggest in self._suggestions:
            try:
                suggest(trial)
            except ValueError as error:  # of a study that was started with other values
                folder = self.settings.hydra.sweep.dir
                raise ConfigError(
                    f"hydra.sweep.dir={folder}: {error} Its study began with others: give the same "
                    "ones, or another folder"
                ) from error
        if self.custom_search_space is not None:
            get_method(self.custom_search_space)(self.settings, trial)
        return [*self._fixed, *(f"{key}={value}" for key, value in trial.params.items())]

    # -- trials ---------------------------------------------------------------------------------

    def _trials(self) -> Iterator[tuple[int, list[str]]]:
        """Yield number and overrides of each job: unfinished ones first, then new ones."""
        states = self.optuna.trial.TrialState
        before = self.study.get_trials(deepcopy=False)
        here = str(Path(self.settings.hydra.sweep.dir).absolute())
        unfinished = [
            trial
            for trial in before
            if trial.state == states.RUNNING
            and trial.user_attrs.get(FOLDER, "").startswith(f"{here}/")
        ]
        for trial in unfinished:
            yield self._begin(self.optuna.trial.Trial(self.study, trial._trial_id))
        ended = sum(trial.state.is_finished() for trial in before)
        for _ in range(self.n_trials - ended - len(unfinished)):
            if self._too_many_failed():
                return
            yield self._begin(self.study.ask())

    def _begin(self, trial: Any) -> tuple[int, list[str]]:
        try:
            overrides = self._suggest(trial)
            folder = folder_of(hydra_section(self.loader, self.settings, trial.number, overrides))
        except Exception:
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            raise
        trial.set_user_attr(FOLDER, str(folder.absolute()))
        self._running[trial.number] = trial, folder
        return trial.number, overrides

    def _launch(self) -> None:
        """Run all trials; with our own launcher, each is asked for when another has ended."""
        trials = self._trials()
        if isinstance(self.launcher, ParallelJobs):
            self.launcher.run(trials, lambda number, _: self._tell(number))
            return
        size: int = self.n_jobs if self.n_jobs else getattr(self.launcher, "jobs", 1)
        while batch := list(islice(trials, size)):
            numbers, overrides = zip(*batch, strict=True)
            try:
                self.launcher.launch(overrides, initial_job_idx=numbers[0])
            finally:
                for number in numbers:
                    self._tell(number)

    def _tell(self, number: int) -> None:
        """Tell the study how a job ended; one that was stopped stays unfinished."""
        trial, folder = self._running.pop(number)
        result, states = RunDirectory(folder).read_result(), self.optuna.trial.TrialState
        if result is None or result["status"] in ("preempted", "interrupted"):
            return
        self._ended += 1
        objective = result.get("objective")
        if result["status"] == "finished" and objective is not None:
            self.study.tell(trial, objective)
        elif result["status"] == "pruned":
            known = self.study.get_trials(deepcopy=False)[number].intermediate_values
            if not known and objective is not None:  # by another callback than `Pruning`
                trial.report(objective, result["step"])
            self.study.tell(trial, state=states.PRUNED)
        else:
            self._failed += 1
            self.study.tell(trial, state=states.FAIL)

    def _too_many_failed(self) -> bool:
        return self._failed > self.max_failure_rate * self._ended

    def _write_best(self, folder: Path) -> None:
        with contextlib.suppress(ValueError):  # no trial is complete
            best = self.study.best_trial
            found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
            OmegaConf.save(OmegaConf.create(found), folder / "optimization_results.yaml")


def _suggestion(override: Override) -> Callable[[Any], Any]:
    """Return the function that suggests a value for a swept override."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        number = type(value.start) is type(value.end) is int
        log = "log" in value.tags
        return lambda trial: (trial.suggest_int if number else trial.suggest_float)(
            key, value.start, value.end, log=log
        )
    if isinstance(value, RangeSweep):
        values = list(value.range())
        if not values:
            raise ConfigError(f"{override.input_line}: the range is empty")
        number = all(type(each) is int for each in values)
        return lambda trial: (trial.suggest_int if number else trial.suggest_float)(
            key, values[0], values[-1], step=value.step
        )
    choices = list(override.sweep_iterator(transformer=Transformer.encode))
    return lambda trial: trial.suggest_categorical(key, choices)
