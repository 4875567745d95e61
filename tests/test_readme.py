"""What the README says can be run, run: small, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FEW = "data.sample_text.max_new_tokens=2"
#: Makes a training of seconds; goes behind what the README says, before its own values.
SMALL = (
    f"steps=3 data.seq_len=96 validator.max_batches=1 {FEW} model.{{layers}}=1 global_batch_size=16"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ditty_di(arguments: str, folder: Path) -> str:
    return run([sys.executable, "-m", "ditty_di", *shlex.split(arguments)], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the README's own experiments in conf/, and one run."""
    folder = tmp_path_factory.mktemp("readme")
    for text in blocks("yaml"):
        file = folder / re.search(r"^# (conf/\S+)", text, re.MULTILINE)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "a.txt").write_text("one two three four five six seven\n" * 99)
    (folder / "my_texts" / "b.txt").write_text("seven six five four three two one\n" * 99)
    small = SMALL.format(layers="config.num_hidden_layers")
    assert "run=RUN task=generate" in ditty_di(f"+experiment=pretrain run=RUN {small}", folder)
    return folder


FINE_TUNING, ANY_MODEL, VERBS = (
    [line.split("#")[0].strip() for line in block.splitlines()] for block in blocks("bash")
)
#: A fine-tuning of seconds.
SHORT = "steps=2 validator.max_batches=1 global_batch_size=16 checkpoint.every=null"


@pytest.mark.slow
@pytest.mark.parametrize("line", VERBS)
def test_every_verb_runs(folder, line):
    arguments = line.removeprefix("python -m ditty_di").strip()
    if "task=" not in arguments and "run=" not in arguments:
        titan = "titan" in arguments
        layers = "n_layers" if titan else "config.num_hidden_layers"
        arguments = f"{SMALL.format(layers=layers)} {arguments.replace('steps=100', '')}"
    ditty_di(arguments, folder)


@pytest.fixture(scope="module")
def tuned(folder):
    """One fine-tuned run, and what the README asks it."""
    (folder / "asked.jsonl").write_text('{"id": 1, "input": "def f(x):\\n    return x"}\n')
    ditty_di(f"+experiment=qlora run=TUNED {SHORT} {FEW}", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", FINE_TUNING)
def test_every_way_of_fine_tuning_runs(tuned, line):
    arguments = line.removeprefix("python -m ditty_di").strip()
    if "experiment=" in arguments:
        sample = "" if "seq2seq" in arguments else FEW
        arguments = f"{arguments} {SHORT} {sample}"
    if "folder=merged" in arguments and not (tuned / "merged").exists():
        ditty_di("run=TUNED task=export export=merged export.path=merged", tuned)
    ditty_di(arguments, tuned)
    if "answers.jsonl" in arguments:
        assert '"id": 1' in (tuned / "answers.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("line", ANY_MODEL)
def test_every_other_model_runs(folder, line):
    pytest.importorskip("sklearn")
    arguments = line.removeprefix("python -m ditty_di").strip()
    if "task=check" in arguments:
        (pipeline,) = (text for text in blocks("text") if text.startswith("the pipeline of"))
        assert pipeline in ditty_di(arguments, folder)
        return
    few = {
        "diffusion": "export.samples=10",
        "flow_matching": "export.samples=10",
        "distillation": f"{FEW} validator.max_batches=1",
    }.get(arguments.removeprefix("+experiment="), "")
    said = ditty_di(f"{arguments} steps=2 run=other-{ANY_MODEL.index(line)} {few}", folder)
    assert "finished, step 2" in said


def test_the_experiments_shown_are_sound(folder):
    names = {path.stem for path in (folder / "conf" / "experiment").iterdir()}
    assert names == {"small", "mine"}
    for name in names:
        assert "ok:" in ditty_di(f"task=check +experiment={name}", folder)


def test_the_python_shown_trains(folder):
    program = blocks("python")[0]
    assert float(run([sys.executable, "-c", program], folder)) < 0.6


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_what_is_linked_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:tests|examples|conf|ditty_di)/[\w/.]+)`", README)
)
def test_what_is_named_is_there(path):
    assert (ROOT / path).exists()
