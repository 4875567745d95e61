"""Launchers that submit a job: what they write, and what they refuse before anything is made."""

from __future__ import annotations

import gzip
import json
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from ditty_di.cli.overrides import merge
from ditty_di.launch import jobs
from ditty_di.launch.kubernetes import Kubernetes
from ditty_di.launch.rundir import RunDirectory
from tests import warm
from tests.toy import REPOSITORY, Folder, result

VOLUMES = "launcher.volumes={/runs: claim, /dev/shm: {emptyDir: {medium: Memory}}}"
KUBERNETES = ("launcher=kubernetes", "launcher.image=image:1", VOLUMES)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def shown(folder: Folder, *arguments: str) -> tuple[str, str]:
    """(job file, command) that a dry run prints; it leaves nothing behind."""
    before = sorted(folder.path.rglob("*"))
    out, _ = folder(*arguments, "launcher.dry_run=true")
    assert sorted(folder.path.rglob("*")) == before
    file, _, command = out.partition("\n# and submitted with\n")
    return file, command.strip()


def program(folder: Folder, name: str, text: str) -> dict[str, str]:
    """A program on the PATH that stands for a scheduler's own; the environment that finds it."""
    file = folder.write(f"bin/{name}", f"#!/bin/sh\n{text}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{file.parent}{os.pathsep}{os.environ['PATH']}"}


# -- Slurm -----------------------------------------------------------------------------------------


def test_a_batch_script_has_every_option_and_is_sound(folder: Folder) -> None:
    options = "launcher.options={mail-type: END, exclusive: true, comment: two words}"
    script, command = shown(
        folder,
        *("launcher=slurm", "launcher.nodes=2", "launcher.nproc=4", "launcher.gpus_per_node=4"),
        *("launcher.time=24:00:00", "launcher.cpus_per_task=3", "launcher.container=a+b:1"),
        *("launcher.setup=[module load cuda,export A=1]", options, "run='a b'"),
        "experiment=other",
    )
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines()]
    assert {"nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=24:00:00"} <= {*lines}
    assert {"exclusive", "mail-type=END", "requeue", "signal=B:USR1@120"} <= {*lines}
    run = folder.path / "a b"
    assert f'#SBATCH "--output={run}/logs/slurm-%j.log"' in script
    assert '#SBATCH "--comment=two words"' in script
    assert "module load cuda\nexport A=1\n" in script
    assert "--container-image=a+b:1" in script and "python=(python)" in script
    assert command == f"sbatch --parsable '{run}/job.sbatch'"
    file = folder.write("script", script.partition("\n")[2])
    subprocess.run(["bash", "-n", file], check=True)
    if os.path.exists("/usr/bin/shellcheck"):  # SC2016: of each task, not of this shell
        subprocess.run(["shellcheck", "--exclude=SC2016,SC2206", file], check=True)


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "launch/slurm").iterdir()), ids=os.path.basename
)
def test_the_scripts_are_sound(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    if os.path.exists("/usr/bin/shellcheck"):
        subprocess.run(["shellcheck", file], check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("launcher.time=soon",), "launcher.time: .*time='soon': write minutes"),
        (("launcher.nodes=0", "launcher.nproc=-1"), r"(?s)nodes=0 must be.*nproc=-1 must be"),
        (("launcher.gpus_per_node=2", "launcher.nproc=4"), "nproc=4 ranks of a machine need more"),
        (("launcher.container=a", "launcher.prefix=b"), "by `container` or by `prefix`"),
        (("launcher.max_restarts=-1",), "max_restarts=-1 must not be negative"),
    ],
    ids=str,
)
def test_wrong_arguments_of_slurm_are_refused(folder: Folder, arguments, says) -> None:
    _, err = folder("launcher=slurm", "launcher.dry_run=true", *arguments, code=2)
    assert re.search(says, err), err


@pytest.mark.parametrize(
    ("launcher", "name"),
    [(("launcher=slurm",), "sbatch"), (KUBERNETES, "kubectl"), (("launcher=skypilot",), "sky")],
)
def test_a_missing_program_is_named_before_a_directory_is_made(folder, launcher, name) -> None:
    _, err = folder(*launcher, code=2, env={"PATH": str(folder.path)})
    assert f"the program {name} is not on this machine" in err
    assert not (folder.path / "outputs").exists()


def test_a_job_that_is_not_taken_is_a_failed_run(folder: Folder) -> None:
    env = program(folder, "sbatch", "echo invalid partition >&2; exit 3")
    _, err = folder("launcher=slurm", "run=mine", "experiment=other", code=3, env=env)
    assert "invalid partition" in err and "sbatch did not take the job" in err
    assert result(folder.path / "mine")["status"] == "failed"


# -- Kubernetes ------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """Refuse fields that a schema does not name, as the API server does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        made.setdefault("additionalProperties", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made = {"type": ["integer", "string"]}
    if made.pop("x-kubernetes-preserve-unknown-fields", False):
        made.pop("additionalProperties", None)
    return made


@pytest.fixture(scope="module")
def jobset() -> Any:
    """JobSet's schema (kubernetes-sigs/jobset 008dfbdf, Apache-2.0) without its descriptions."""
    jsonschema = pytest.importorskip("jsonschema")
    file = Path(__file__).with_name("jobset.v1alpha2.json.gz")
    schema = strict(json.loads(gzip.decompress(file.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # of every object, not in the schema
    return jsonschema.Draft7Validator(schema)


def test_a_jobset_fits_its_schema(folder: Folder, jobset) -> None:
    manifest, command = shown(
        folder,
        *(*KUBERNETES, "launcher.runs=/runs", "launcher.nodes=2", "launcher.nproc=8"),
        *("launcher.gpus_per_node=8", "launcher.namespace=team", "launcher.resources={cpu: 16}"),
        *("launcher.env={NCCL_DEBUG: INFO, N: 1}", "launcher.setup=[export A=1]"),
        "launcher.pod={nodeSelector: {gpu: h100}, tolerations: [{operator: Exists}]}",
    )
    config, job = yaml.safe_load_all(manifest)
    assert [e.message for e in jobset.iter_errors(job)] == []
    assert "kubectl apply --filename=" in command
    name = job["metadata"]["name"]
    assert job["metadata"] == config["metadata"] == {"name": name, "namespace": "team"}
    assert yaml.safe_load(config["data"]["resolved.yaml"])["task"]["value"] == 1.0
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "16", "nvidia.com/gpu": "8"}
    assert [m["mountPath"] for m in container["volumeMounts"]] == [
        "/runs",
        "/dev/shm",
        "/etc/ditty_di",
    ]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert pod["volumes"][2]["configMap"] == {"name": name}
    assert {"name": "N", "value": "1"} in container["env"] and "nodeSelector" in pod
    script = container["command"][2]
    assert f"--master-addr={name}-ranks-0-0.{name} " in script and "export A=1" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    job["spec"]["replicatedJobs"][0]["tempalte"] = {}
    assert "tempalte" in next(jobset.iter_errors(job)).message  # the schema does refuse


def test_a_run_on_a_volume_needs_no_config_map(folder: Folder) -> None:
    manifest, _ = shown(folder, *KUBERNETES, "run=/runs/mine", "experiment=other")
    (job,) = yaml.safe_load_all(manifest)
    assert "-m ditty_di.launch /runs/mine\n" in str(job["spec"]["replicatedJobs"]).replace(
        "\\n", "\n"
    )
    long = Kubernetes("i", {"/runs": "c"}, name="A_Very Long Name " * 9, dry_run=True).name
    assert len(f"{long}-ranks-0-9999") <= 63 and long.startswith("a-very-long-name-")


def test_volumes_must_hold_the_runs(folder: Folder) -> None:
    _, err = folder(*KUBERNETES, "launcher.runs=/elsewhere", "launcher.dry_run=true", code=2)
    assert "runs=/elsewhere: is on none of the volumes (/runs, /dev/shm)" in err
    _, err = folder("launcher=kubernetes", "launcher.dry_run=true", code=2)
    assert "launcher.image: missing mandatory value" in err and "write {/runs: CLAIM}" in err


def test_a_jobset_is_applied_and_a_second_start_is_refused_while_it_runs(folder: Folder) -> None:
    said = 'case $1 in apply) echo "jobset.jobset.x-k8s.io/x created";; get) printf active;; esac'
    env = program(folder, "kubectl", said)
    mine = ("run=mine", "experiment=other")
    out, _ = folder(*KUBERNETES, "launcher.runs=/runs", *mine, env=env)
    name = json.loads((folder.path / "mine/job.json").read_text())["id"]
    assert f"Kubernetes job {name} has the run mine" in out and "/mine" in out
    _, err = folder("run=mine", code=2, env=env)
    assert f"Kubernetes job {name} (active) has the run" in err and "kubectl delete" in err
    program(folder, "kubectl", "printf activeCompleted")
    folder("run=mine", "launcher=local", env=env)
    assert not (folder.path / "mine/job.json").exists()


def test_the_pods_script_runs_a_run_that_was_composed_elsewhere(folder: Folder, tmp_path) -> None:
    """What node 0 does with the files of a ConfigMap: begin, then the ranks."""
    manifest, _ = shown(folder, *KUBERNETES, "launcher.runs=/runs", "run=mine", "experiment=other")
    config, _ = yaml.safe_load_all(manifest)
    for name, text in config["data"].items():
        folder.write(f"config/{name}", text)
    there = tmp_path / "there" / "mine"
    there.mkdir(parents=True)
    for _ in range(2):  # pods are started again
        jobs.begin(str(there), str(folder.path / "config"))
        run = RunDirectory(there)
        assert OmegaConf.load(run.to_build).run == str(there)
        folder(str(there), module="ditty_di.launch")
        assert result(there)["objective"] == 2.0
    assert run.is_run() and not (folder.path / "mine").exists()


# -- SkyPilot --------------------------------------------------------------------------------------


def test_a_task_of_skypilot_has_the_configuration_with_it(folder: Folder) -> None:
    text, command = shown(
        folder,
        *("launcher=skypilot", "launcher.nodes=2", "launcher.nproc=8", "run=mine"),
        *(
            "launcher.accelerators=H100:8",
            "launcher.resources={use_spot: true}",
            "experiment=other",
        ),
        *("launcher.file_mounts={/runs: s3://bucket}", "launcher.setup=[pip install ditty_di]"),
    )
    task = yaml.safe_load(text)
    # Keys of the task's schema (skypilot 0.14.1), of which all others are refused.
    assert task.keys() <= {*("name", "num_nodes", "resources", "workdir", "envs"), *("file_mounts",
                           "setup", "run")}  # fmt: skip
    assert task["num_nodes"] == 2 and task["setup"] == "pip install ditty_di"
    assert task["resources"] == {"accelerators": "H100:8", "use_spot": True}
    here = folder.path / "mine" / "resolved.yaml"
    assert task["file_mounts"]["~/ditty_di_run/resolved.yaml"] == str(here)
    assert task["file_mounts"]["/runs"] == "s3://bucket"
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert command == f"sky jobs launch --detach-run --yes {folder.path}/mine/sky.yaml"
    _, command = shown(folder, "launcher=skypilot", "launcher.cluster=mine")
    assert command.startswith("sky launch --cluster=mine --detach-run --yes ")


def test_a_task_is_launched(folder: Folder) -> None:
    env = program(folder, "sky", f'echo "$@" >{folder.path}/called')
    out, _ = folder("launcher=skypilot", "run=mine", "experiment=other", env=env)
    assert "jobs launch --detach-run --yes" in (folder.path / "called").read_text()
    assert (
        "SkyPilot job toy has the run mine" in out or "SkyPilot job other has the run mine" in out
    )


# -- Ray -------------------------------------------------------------------------------------------


def test_a_dry_run_of_ray_prints_what_it_would_call(folder: Folder) -> None:
    before = sorted(folder.path.rglob("*"))
    out, _ = folder(
        "launcher=ray", "launcher.nproc=4", "launcher.gpu=true", "launcher.dry_run=true"
    )
    made = yaml.safe_load(out)
    assert made["ray.train.ScalingConfig"]["num_workers"] == 4
    assert made["ray.train.torch.TorchConfig"] == {"backend": "cpu:gloo,cuda:nccl"}
    assert sorted(folder.path.rglob("*")) == before
    _, err = folder("launcher=ray", "launcher.nproc=0", "launcher.dry_run=true", code=2)
    assert "nproc=0 must be at least 1" in err


# -- another launcher ------------------------------------------------------------------------------


def test_another_launcher_leaves_the_arguments_of_the_first_behind() -> None:
    stored = ["launcher=slurm", "launcher.nodes=2", "value=1", "+task.more=1"]
    assert merge(stored, ["launcher=local"]) == ["value=1", "+task.more=1", "launcher=local"]
    again = merge(stored, ["launcher=slurm", "value=2"])
    assert again == ["launcher.nodes=2", "+task.more=1", "launcher=slurm", "value=2"]
    assert merge(["launcher.nproc=2"], ["task=look"]) == ["launcher.nproc=2", "task=look"]


def test_ranks_count_over_all_machines(tmp_path: Path) -> None:
    """Checked where it is known: rows of a step divide among nodes x ranks."""
    check = ("task=check", "launcher=slurm", "launcher.dry_run=true", "task.rehearse=false")
    done = warm.run(["-m", "ditty_di", *check, "launcher.nodes=3"], cwd=tmp_path)
    assert "global_batch_size=16 is not a multiple of 3 ranks" in done.stderr, done.stderr
    done = warm.run(
        ["-m", "ditty_di", *check, "launcher.nodes=2", "data.loader.micro_batch_size=16"],
        cwd=tmp_path,
    )
    assert "write data.loader.micro_batch_size=8" in done.stderr, done.stderr
