"""Run the ranks as workers of Ray Train."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditty_di.config.early import validated
from ditty_di.console import LAUNCHED
from ditty_di.launch import jobs, worker
from ditty_di.launch.failure import report
from ditty_di.launch.rundir import RunDirectory
from ditty_di.launch.signals import StopSignals, announce
from ditty_di.messages import refuse, too_low


@validated
@dataclass(eq=False)
class Ray:
    """Run the ranks on a Ray cluster, and wait for their end.

    `ray.train.torch.TorchTrainer` starts one worker a rank and joins them to a process group; each
    worker then runs the rank. The run directory has to be on a file system that all of them see. A
    SIGTERM, SIGHUP or SIGINT creates the file `stop` in it: the ranks save and end with status
    `preempted`.

    Args:
        nproc: number of ranks in all.
        address: of the cluster, such as `auto` or `ray://HOST:10001`; None starts Ray on this
            machine.
        gpu: whether each rank has a GPU.
        cpus_per_rank: CPUs that a rank reserves, and the threads that it uses.
        resources: further resources that a rank reserves, such as `{accelerator_type:H100: 0.1}`.
        env: environment variables of the ranks.
        max_restarts: how often all ranks are started again after a failure; they resume from the
            newest checkpoint.
        dry_run: print what would be run, and start nothing.

    Raises:
        ValueError: an argument is out of range, or the package `ray` is not installed.
    """

    nproc: int = 1
    address: str | None = None
    gpu: bool = False
    cpus_per_rank: int = 1
    resources: Mapping[str, float] | None = None
    env: Mapping[str, Any] | None = None
    max_restarts: int = 0
    dry_run: bool = False

    @staticmethod
    def validate(
        *, nproc: int = 1, cpus_per_rank: int = 1, max_restarts: int = 0, dry_run: bool = False
    ) -> None:
        """Raise ValueError for arguments out of range, and when `ray` is not installed."""
        wrong = too_low(1, nproc=nproc, cpus_per_rank=cpus_per_rank)
        if max_restarts < 0:
            wrong.append(f"max_restarts={max_restarts} must be at least 0")
        if not dry_run and importlib.util.find_spec("ray") is None:
            wrong.append("_target_: needs the package ray: pip install 'ditty_di[ray]'")
        refuse(wrong)

    def _setup(self, run: RunDirectory) -> dict[str, dict[str, Any]]:
        """Return the arguments of what is called, by its name in Ray."""
        path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        threads = os.environ.get("OMP_NUM_THREADS", str(self.cpus_per_rank))
        own = {name: str(value) for name, value in (self.env or {}).items()}
        env = {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, LAUNCHED: "1", **own}
        # Without an address Ray would look for one that runs, or has left a trace of itself.
        init: dict[str, Any] = {
            "address": self.address or "local",
            "runtime_env": {"env_vars": env},
        }
        if self.address is None:
            cpus = max(os.cpu_count() or 1, self.nproc * self.cpus_per_rank)
            init |= {"num_cpus": cpus, "include_dashboard": False}
        return {
            "ray.init": init,
            "ray.train.ScalingConfig": {
                "num_workers": self.nproc,
                "use_gpu": self.gpu,
                "resources_per_worker": {
                    "CPU": self.cpus_per_rank,
                    **({"GPU": 1} if self.gpu else {}),
                    **(self.resources or {}),
                },
            },
            # Collectives of objects and sums run on the CPU.
            "ray.train.torch.TorchConfig": {
                "backend": "cpu:gloo,cuda:nccl" if self.gpu else "gloo"
            },
            "ray.train.RunConfig": {"name": "train", "storage_path": str(run.path / "ray")},
            "ray.train.FailureConfig": {"max_failures": self.max_restarts},
        }

    def preview(self, run: RunDirectory, config_dir: Path) -> int:
        """Print what would be called; return the exit code 0.

        Args:
            run: the run directory that a start would make.
            config_dir: folder with the configuration that the ranks would build.
        """
        print(f"# ray.train.torch.TorchTrainer would run the ranks of {run}, with")
        print(jobs.manifest(self._setup(run)), end="")
        return 0

    def __call__(self, run_dir: str | Path) -> int:
        """Run the ranks and return the exit code of the run.

        Args:
            run_dir: a prepared run directory.
        """
        run, started = RunDirectory(run_dir), time.time()

        def ask(number: Any) -> None:
            run.stop.touch()
            announce(number)

        errors: list[BaseException] = []
        # Not in the main thread, where Ray would take over Ctrl-C.
        thread = threading.Thread(target=self._fit, args=(run, errors), daemon=True)
        try:
            with StopSignals(ask):
                thread.start()
                while thread.is_alive():
                    thread.join(0.5)
        except KeyboardInterrupt:
            return report(run, run.interrupted("quit without saving"))
        finally:
            import ray

            ray.shutdown()
        if not errors:
            return 0
        failures = run.errors() or [{"status": "failed", "error": f"Ray: {errors[0]}"}]
        return report(run, {"seconds": time.time() - started} | failures[0])

    def _fit(self, run: RunDirectory, errors: list[BaseException]) -> None:
        """Run the ranks; append what ended them early to `errors`."""
        try:
            import ray
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchConfig, TorchTrainer

            setup = self._setup(run)
            ray.init(**setup["ray.init"], ignore_reinit_error=True)
            failure = FailureConfig(**setup["ray.train.FailureConfig"])
            TorchTrainer(
                _rank,
                train_loop_config={"run_dir": str(run.path), "folder": os.getcwd()},
                torch_config=TorchConfig(**setup["ray.train.torch.TorchConfig"]),
                scaling_config=ScalingConfig(**setup["ray.train.ScalingConfig"]),
                run_config=RunConfig(**setup["ray.train.RunConfig"], failure_config=failure),
            ).fit()
        except BaseException as error:
            errors.append(error)


def _rank(config: dict[str, str]) -> None:
    """Run one rank in a worker of Ray, whose environment is that of torchrun.

    Raises:
        RuntimeError: the rank failed.
    """
    if os.path.isdir(config["folder"]):
        os.chdir(config["folder"])
    run, rank = RunDirectory(config["run_dir"]), os.environ["RANK"]
    (run.logs / f"error-rank-{rank}.json").unlink(missing_ok=True)  # of a start before this one
    if worker.main(run.path):
        raise RuntimeError(f"rank {rank} failed; see {run.logs}/rank-{rank}.log")
