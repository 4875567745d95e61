"""Run what the READMEs show: every command, configuration and program, small, in an empty folder.

Of each README.md of the project: `bash` lines that begin with `python -m ditty_di` run one by one;
`yaml` blocks that begin with a `# conf/...` line are files of the working folder; `console` blocks
are such a command behind `$` and what it prints, where `[...]` stands for anything; the `python`
blocks are one program, from top to bottom.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path for path in [ROOT / "README.md", *(ROOT / "ditty_di").rglob("README.md")]
)  # fmt: skip
SAMPLE = "data.sample_text.max_new_tokens=2"
#: A pretraining of seconds. Put before what a README says, which then counts.
SMALL = f"max_steps=3 data.seq_len=96 validator.max_batches=1 global_batch_size=16 {SAMPLE}"
#: A fine-tuning, or any other experiment, of seconds. Put behind what a README says.
SHORT = "max_steps=2 validator.max_batches=1"

#: Experiments that log no generated text.
NO_SAMPLES = (
    *("seq2seq", "diffusion", "flow_matching", "classification", "two_heads", "module"),
    "vision_language",
    *("embedding", "masked_lm"),
)
#: What makes some of them cheaper.
FEW = {"diffusion": " export.samples=10", "flow_matching": " export.samples=10"}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).parent)


def commands(path: Path) -> list[str]:
    lines = "".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    texts = [re.split(r"\s#\s", line)[0].strip() for line in lines]
    return [
        text
        for text in texts
        if text.startswith("python -m ditty_di ") or text == "python -m ditty_di"
    ]


#: tests/api/test_snippets.py runs the program of api/, and looks at what it leaves.
PROGRAMS = [path for path in READMES if blocks(path, "python") and path.parent.name != "api"]
COMMANDS = [(path, command) for path in READMES for command in commands(path)]


def run(arguments: list[str], folder: Path, **env: str) -> str:
    everything = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    done = warm.run(arguments, cwd=folder, env=everything)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ditty_di(arguments: str, folder: Path) -> str:
    return run(["-m", "ditty_di", *shlex.split(arguments)], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a working folder with the configurations, texts and examples that READMEs use."""
    folder = tmp_path_factory.mktemp("readme")
    for path in READMES:
        for text in blocks(path, "yaml"):
            if named := re.search(r"^# (conf/\S+)$", text, re.MULTILINE):
                file = folder / named[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    labeled = [{"text": f"{i} + 1", "label": "odd" if i % 2 else "even"} for i in range(40)]
    (folder / "labeled.jsonl").write_text("".join(json.dumps(r) + "\n" for r in labeled))
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "a.txt").write_text("one two three four five six seven\n" * 99)
    (folder / "my_texts" / "b.txt").write_text("seven six five four three two one\n" * 99)
    (folder / "asked.jsonl").write_text('{"id": 1, "input": "def f(x):\\n    return x"}\n')
    records = [{"input": f"{i} + 1 =", "output": f" {i + 1}"} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    ditty_di(f"+experiment=pretrain run=RUN {SMALL} model.config.num_hidden_layers=1", folder)


@pytest.fixture(scope="module")
def tuned(folder):
    ditty_di(f"+experiment=qlora run=TUNED {SHORT} {SAMPLE}", folder)
    ditty_di("run=TUNED task=export export=merged export.path=merged", folder)


@pytest.mark.slow
@pytest.mark.parametrize("path, command", COMMANDS, ids=lambda value: str(value)[-70:])
def test_every_command_runs(path, command, folder, request):
    arguments = command.removeprefix("python -m ditty_di").strip()
    needed = {"RUN": "trained", "TUNED": "tuned", "merged": "tuned"}
    for name, fixture in needed.items():
        if re.search(rf"\b{name}\b", arguments):
            request.getfixturevalue(fixture)
    if "--help" in arguments or "task=" in arguments:
        pass
    elif "experiment=" in arguments:
        sampling = any(key in arguments for key in NO_SAMPLES)
        arguments = f"{arguments} {SHORT} {'' if sampling else SAMPLE}"
        arguments += "".join(few for name, few in FEW.items() if f"={name}" in arguments)
    elif "run=" not in arguments:
        arguments = f"{SMALL} model.config.num_hidden_layers=1 {arguments}"
    ditty_di(arguments, folder)
    if "answers.jsonl" in arguments:
        assert '"id": 1' in (folder / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    "shown", [text for path in READMES for text in blocks(path, "console")], ids=lambda v: v[:60]
)
def test_what_a_command_is_said_to_print_is_printed(shown, folder):
    command, _, output = shown.partition("\n")
    said = ditty_di(command.removeprefix("$ python -m ditty_di"), folder)
    pattern = ".*".join(map(re.escape, output.rstrip().split("[...]")))
    assert re.search(pattern, said, re.DOTALL), said


def test_the_configurations_shown_are_sound(folder):
    names = sorted(path.stem for path in (folder / "conf" / "experiment").iterdir())
    assert {"mine", "small"} <= set(names)
    for name in names:
        assert "ok:" in ditty_di(f"task=check +experiment={name}", folder)


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_every_program_runs(path, tmp_path):
    texts = [{"text": f"def f{i}(x):\n    return x + {i}" if i % 4 else "short"} for i in range(40)]
    (tmp_path / "my_texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "program.py").write_text("\n".join(blocks(path, "python")))
    run(
        ["program.py"],
        tmp_path,
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
        # inductor links a kernel wrongly now and then, and keeps it for all who share its cache
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"),
    )


def linked(path: Path) -> list[str]:
    text = path.read_text()
    files = re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", text)
    roots = "tests|examples|conf|ditty_di|launch"
    return files + [
        os.path.relpath(ROOT / name, path.parent)
        for name in re.findall(rf"`((?:{roots})/[\w/.]+)`", text)
    ]


@pytest.mark.parametrize("path", [*READMES, ROOT / ".github" / "CONTRIBUTING.md"], ids=name_of)
def test_what_is_linked_or_named_exists(path):
    missing = [name for name in linked(path) if not (path.parent / name).exists()]
    assert not missing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "ditty_di" / "README.md").read_text().splitlines()) <= 120


def test_every_folder_of_the_package_has_a_readme():
    packages = {path.parent for path in (ROOT / "ditty_di").rglob("*.py")}
    assert sorted(str(p) for p in packages if not (p / "README.md").exists()) == []
