"""Loggers of experiment trackers: Weights & Biases, MLflow, trackio."""

from __future__ import annotations

import html
import time
from abc import ABC, abstractmethod
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ditty_di.io import read_json, write_json
from ditty_di.loggers.loggers import missing


def _require(tracker: type[Tracker]) -> None:
    if find_spec(tracker.package) is None:
        raise ValueError(missing(tracker.__name__, tracker.package))


class Tracker(ABC):
    """A run of an experiment tracker that a resumed training goes on with.

    Trackers cannot take an entry back. So a file in the run's folder (`<name>.json`) has the
    tracker's run, and for each metric the last step that the tracker was given. What a resumed
    training computes again up to there is left out: it is the same to the bit, but for times. W&B
    and trackio write from a process or thread of their own, so a kill may lose the last second.

    Args:
        folder: of the run; it must be the same when the run is resumed.
        **options: passed to the tracker.
    """

    #: Its package; the `validate` of each class raises ValueError where it is not installed.
    package = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "validate" not in vars(cls):
            cls.validate = staticmethod(partial(_require, cls))  # type: ignore[attr-defined]

    def __init__(self, folder: str, **options: Any) -> None:
        self.folder = Path(folder)
        self.options = options
        self._steps: dict[str, int] = {}
        self._run: Any = None
        self._name = ""

    def start(self, *, step: int, max_steps: int) -> None:
        """Begin the tracker's run, or go on with it.

        Args:
            step: ignored: the file says what the tracker has.
            max_steps: ignored.

        Raises:
            ImportError: the package is not installed.
        """
        if find_spec(self.package) is None:
            raise ImportError(missing(type(self).__name__, self.package))
        self.folder.mkdir(parents=True, exist_ok=True)
        known = read_json(self._file) or {"run": None, "steps": {}}
        self._run, self._name, last = self._open(known["run"])
        steps = known["steps"]
        self._steps = {k: at if last is None else min(at, last) for k, at in steps.items()}
        self._save()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log values that the tracker does not have yet.

        Args:
            step: optimizer step.
            values: by name.
        """
        if new := self._new(step, *values):
            self._log(step, {name: values[name] for name in new})
            self._save()

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text that the tracker does not have yet.

        Args:
            step: optimizer step.
            name: of the text.
            text: its content.
        """
        if self._new(step, name):
            self._log_text(step, name, text)
            self._save()

    def close(self) -> None:
        """Finish the tracker's run."""
        if self._run is not None:
            self._finish()
            self._run = None

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.package}.json"

    def _new(self, step: int, *names: str) -> list[str]:
        """Return those that were not given at this step or later, and note that they are."""
        new = [name for name in names if self._steps.get(name, -1) < step]
        self._steps |= dict.fromkeys(new, step)
        return new

    def _save(self) -> None:
        write_json(self._file, {"run": self._name, "steps": self._steps})

    @abstractmethod
    def _open(self, known: str | None) -> tuple[Any, str, int | None]:
        """Return the run, by what it is found again, and the last step in it (None: unknown)."""

    @abstractmethod
    def _log(self, step: int, values: dict[str, float]) -> None: ...

    @abstractmethod
    def _log_text(self, step: int, name: str, text: str) -> None: ...

    def _finish(self) -> None:
        self._run.finish()


class WandB(Tracker):
    """Weights & Biases. The x axis is the metric `step`.

    Args:
        folder: receives wandb's files and `wandb.json`, by which a resumed run is found.
        **options: passed to `wandb.init` (project, mode, tags, config, ...).

    Raises:
        ImportError: wandb is not installed.
    """

    package = "wandb"

    def _open(self, known: str | None) -> tuple[Any, str, int | None]:
        import wandb

        options: dict[str, Any] = {"dir": str(self.folder)}
        if known:
            options |= {"id": known, "resume": "allow"}
        # The file of an offline run gets new entries every 15 s, which is what a kill would lose.
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            options["settings"] = wandb.Settings(x_transaction_log_flush_interval=1.0)
        run = wandb.init(**{**options, **self.options})
        # W&B's own step does not take a validation after the training of a step.
        run.define_metric("*", step_metric="step")
        return run, run.id, None

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def _log_text(self, step: int, name: str, text: str) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>")})


class MLflow(Tracker):
    """MLflow, with texts as artifacts `<name>/step-<number>.txt`.

    Args:
        folder: receives `mlflow.json`, by which a resumed run is found.
        tracking_uri: of the store, such as `sqlite:///mlflow.db` or `http://host:5000`; None is
            MLflow's own: MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder.
        experiment: name of the experiment, made if it does not exist.
        name: name of the run.

    Raises:
        ImportError: mlflow (or mlflow-skinny) is not installed.
    """

    package = "mlflow"

    def __init__(
        self,
        folder: str,
        *,
        tracking_uri: str | None = None,
        experiment: str = "ditty_di",
        name: str | None = None,
    ) -> None:
        super().__init__(folder)
        self.tracking_uri, self.experiment, self.name = tracking_uri, experiment, name

    def _open(self, known: str | None) -> tuple[Any, str, int | None]:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking_uri)
        if known is not None:
            client.update_run(known, status="RUNNING")
            return client, known, None
        found = client.get_experiment_by_name(self.experiment)
        number = client.create_experiment(self.experiment) if found is None else found.experiment_id
        return client, client.create_run(number, run_name=self.name).info.run_id, None

    def _log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for i in range(0, len(metrics), 1000):  # as many as it takes at a time
            self._run.log_batch(self._name, metrics=metrics[i : i + 1000])

    def _log_text(self, step: int, name: str, text: str) -> None:
        self._run.log_text(self._name, text, f"{name}/step-{step:08d}.txt")

    def _finish(self) -> None:
        self._run.set_terminated(self._name)


class Trackio(Tracker):
    """trackio: Hugging Face's local tracker (`trackio show`).

    Args:
        folder: receives `trackio.json`, by which a resumed run is found.
        name: beginning of the run's name; a random ending makes it unique.
        **options: passed to `trackio.init` (project, space_id, config, ...).

    Raises:
        ImportError: trackio is not installed.
    """

    package = "trackio"

    def __init__(self, folder: str, *, name: str = "run", **options: Any) -> None:
        super().__init__(folder, **options)
        self.name = name

    def _open(self, known: str | None) -> tuple[Any, str, int | None]:
        import uuid

        import trackio

        name = known or f"{self.name}-{uuid.uuid4().hex[:8]}"
        run = trackio.init(**{"name": name, "resume": "allow", "embed": False, **self.options})
        # It writes from a thread: a process that was killed may have left the last entries out.
        return run, name, run._next_step - 1

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def _log_text(self, step: int, name: str, text: str) -> None:
        import trackio

        self._run.log({name: trackio.Markdown(f"```\n{text}\n```")}, step=step)
