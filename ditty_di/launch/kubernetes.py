"""Submit a run to Kubernetes as a JobSet."""

from __future__ import annotations

import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ditty_di.config.early import validated
from ditty_di.launch import jobs
from ditty_di.launch.rundir import RunDirectory
from ditty_di.messages import refuse, too_low

_CONFIG_DIR = "/etc/ditty_di"
#: Longest name of a JobSet whose pods' names, which append to it, are still DNS labels.
_MAX_NAME = 40


@validated
@dataclass(eq=False)
class Kubernetes(jobs.Job):
    """Apply a JobSet (`jobset.x-k8s.io/v1alpha2`) of one indexed job, one pod a machine.

    Each pod starts its ranks under torchrun. When a pod fails or is evicted, all start again and
    resume from the run's newest checkpoint. The run directory has to be on a volume of all pods.
    Where this machine sees that volume too, at the same path, start it there with `run=FOLDER`.
    Otherwise set `runs`: the composed configuration goes along as a ConfigMap, and the run is made
    below that folder in the pods.

    Args:
        image: container image with ditty_di.
        volumes: mount path -> name of a PersistentVolumeClaim, or a volume source such as
            `{emptyDir: {medium: Memory}}`.
        runs: folder of runs in the pods; None: the run directory has the same path there as here.
        namespace: None is that of kubectl's context.
        nodes: number of pods.
        nproc: ranks of each pod.
        gpus_per_node: GPUs of each pod.
        gpu_resource: resource name of a GPU.
        resources: further resources of each pod, requested and limited: `{cpu: 16, memory: 64Gi}`.
        env: environment variables.
        setup: shell lines that run before the ranks.
        pod: further fields of the pod's specification, such as `{nodeSelector: {...}}`.
        grace_seconds: time in seconds that ranks have to save when a pod is asked to end.
        max_restarts: how often all pods are started again after a failure.
        name: begins the name of the JobSet.
        dry_run: print the manifest and the command, and apply nothing.

    Raises:
        ValueError: an argument is out of range, or `kubectl` is not on this machine.
    """

    file, program, scheduler = "jobset.yaml", "kubectl", "Kubernetes"

    image: str
    volumes: Mapping[str, Any]
    runs: str | None = None
    namespace: str | None = None
    nodes: int = 1
    nproc: int = 1
    gpus_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    resources: Mapping[str, Any] | None = None
    env: Mapping[str, Any] | None = None
    setup: Sequence[str] = ()
    pod: Mapping[str, Any] | None = None
    grace_seconds: int = 300
    max_restarts: int = 3
    name: str = "ditty-di"
    dry_run: bool = False

    @staticmethod
    def validate(
        *,
        volumes: Mapping[str, Any] | None = None,
        runs: str | None = None,
        nodes: int = 1,
        nproc: int = 1,
        gpus_per_node: int | None = None,
        grace_seconds: int = 300,
        max_restarts: int = 3,
        dry_run: bool = False,
    ) -> None:
        """Raise ValueError for arguments out of range, and when `kubectl` is missing."""
        mounted = list(volumes or ())
        wrong = too_low(1, nodes=nodes, nproc=nproc, gpus_per_node=gpus_per_node)
        wrong += [
            f"volumes.{path}: a mount path begins with /" for path in mounted if path[:1] != "/"
        ]
        if not mounted:
            wrong.append("volumes=null: the run directory must be on one; write {/runs: CLAIM}")
        elif runs is not None and not any(map(PurePosixPath(runs).is_relative_to, mounted)):
            wrong.append(f"runs={runs}: is on none of the volumes ({', '.join(mounted)})")
        wrong += too_low(0, grace_seconds=grace_seconds, max_restarts=max_restarts)
        refuse([*wrong, *jobs.missing("kubectl", dry_run)])

    def __post_init__(self) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        self.name = f"{slug[: _MAX_NAME - 7].rstrip('-') or 'run'}-{uuid.uuid4().hex[:6]}"

    def content(self, run: RunDirectory, config_dir: Path) -> str:
        """Return the manifest; see `Job.content`."""
        objects = [self._jobset(str(self._path_in_pods(run)))]
        if self.runs is not None:
            files = [config_dir / name for name in jobs.CONFIG_FILES]
            data = {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}
            objects.insert(0, self._object("v1", "ConfigMap") | {"data": data})
        return jobs.manifest(*objects)

    def command(self, file: Path) -> list[str]:
        """Return the command that applies a manifest; see `Job.command`."""
        return ["kubectl", "apply", f"--filename={file}"]

    def job_id(self, run: RunDirectory, output: str) -> str:
        """Return the name of the JobSet."""
        return self.name

    def state_command(self, job: str) -> list[str]:
        """Return the command that prints `active`, and behind it how a JobSet has ended."""
        namespace = jobs.options({"namespace": self.namespace})
        state = "--output=jsonpath=active{.status.terminalState}"
        return ["kubectl", "get", "jobset", job, "--ignore-not-found", *namespace, state]

    def state(self, job: str) -> str | None:
        """Return the state of a JobSet; see `Job.state`."""
        state = super().state(job)
        return "" if state and state != "active" else state

    def hints(self, run: RunDirectory, job: str) -> dict[str, str]:
        """Return what to type next; see `Job.hints`."""
        chosen = "jobset.sigs.k8s.io/jobset-name={},batch.kubernetes.io/job-completion-index=0"
        namespace = jobs.options({"namespace": self.namespace})
        logs = ["kubectl", "logs", "--follow", *namespace, f"--selector={chosen.format(job)}"]
        return {
            "run in the pods": str(self._path_in_pods(run)),
            "output": shlex.join(logs),
            "save and end": f"touch {self._path_in_pods(run)}/stop (in a pod)",
            "cancel": f"kubectl delete --filename={shlex.quote(str(run.path / self.file))}",
        }

    def _path_in_pods(self, run: RunDirectory) -> PurePosixPath:
        return PurePosixPath(run.path) if self.runs is None else jobs.path_below(self.runs, run)

    def _object(self, version: str, kind: str) -> dict[str, Any]:
        metadata = {"name": self.name} | ({"namespace": self.namespace} if self.namespace else {})
        return {"apiVersion": version, "kind": kind, "metadata": metadata}

    def _jobset(self, run_dir: str) -> dict[str, Any]:
        sources: list[Any] = list(self.volumes.values())
        paths = list(self.volumes)
        if self.runs is not None:
            sources.append({"configMap": {"name": self.name}})
            paths.append(_CONFIG_DIR)
        script = jobs.ranks_script(
            run_dir,
            setup=self.setup,
            config_dir=None if self.runs is None else _CONFIG_DIR,
            nodes=self.nodes,
            nproc=self.nproc,
            node='"$JOB_COMPLETION_INDEX"',
            head=f"{self.name}-ranks-0-0.{self.name}",
        )
        gpus = {self.gpu_resource: self.gpus_per_node} if self.gpus_per_node else {}
        resources = {k: str(v) for k, v in {**(self.resources or {}), **gpus}.items()}
        # torchrun reads how long its ranks may take to end (30 s on versions without the option).
        env = {"PET_SHUTDOWN_TIMEOUT": self.grace_seconds, **(self.env or {})}
        container = {
            "name": "ranks",
            "image": self.image,
            "command": ["bash", "-c", script],
            "env": [{"name": name, "value": str(value)} for name, value in env.items()],
            "resources": {"requests": resources, "limits": resources},
            "volumeMounts": [{"name": f"v{n}", "mountPath": p} for n, p in enumerate(paths)],
        }
        pod = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": self.grace_seconds,
            "containers": [container],
            "volumes": [
                {"name": f"v{n}"}
                | ({"persistentVolumeClaim": {"claimName": s}} if isinstance(s, str) else s)
                for n, s in enumerate(sources)
            ],
            **(self.pod or {}),
        }
        job = {
            "parallelism": self.nodes,
            "completions": self.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "template": {"spec": pod},
        }
        return self._object("jobset.x-k8s.io/v1alpha2", "JobSet") | {
            "spec": {
                "failurePolicy": {"maxRestarts": self.max_restarts},
                # Otherwise the others cannot find the first pod while it imports.
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "replicatedJobs": [{"name": "ranks", "replicas": 1, "template": {"spec": job}}],
            }
        }
