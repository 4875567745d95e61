"""Text typed behind `prompt=` and its like arrives letter for letter."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ditty_di.cli import texts
from ditty_di.cli.command import Command, parse
from ditty_di.cli.overrides import argument, value_of
from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import ConfigError, Graph

PROMPTS = [
    *("[INST] hi [/INST]", "[INST]", "[1, 2", "[a <b>]", "]x[", "f(x)", "range(1,3)", "f(x", "{x}"),
    *(
        "{a: b}",
        "{a: <b>}",
        "{",
        "2024",
        "007",
        "1e3",
        "1_000",
        "0x10",
        "inf",
        "true",
        "no",
        "False",
    ),
    *(
        "",
        " ",
        " leading and trailing ",
        "\t",
        "a\nb",
        "line\r\n",
        "a,b",
        "a, b",
        "1,2",
        "x=y",
        "=",
        "==",
    ),
    *(
        "it's",
        'say "hi"',
        "'a' 'b'",
        "'",
        '"',
        "\\",
        "a\\,b",
        "\\n",
        "c:\\d\\",
        "$5",
        "$HOME",
        "$(touch x);x",
    ),
    *(
        "${x}",
        "${x",
        "\\${x}",
        "a ${oc.env:HOME} b",
        "\\\\${x}",
        "${",
        "#x",
        "a # b",
        "%",
        "100%d",
        "@",
        "a@b",
    ),
    *(
        "你好,世界",
        "é",
        "😀",
        "<|im_start|>user",
        "a|b",
        "~",
        "~x",
        "+1",
        "-",
        "--help",
        "*",
        "glob(*)",
        "???x",
    ),
    *(
        "choice(a,b)",
        "sort(3,1)",
        "(",
        ")",
        "a:b",
        "://",
        "null and void",
        "nan",
        "!",
        "`x`",
        "a\u2028b",
    ),
]
PATHS = [
    *(
        "/d/a,b/c",
        "/d/a b",
        "a=b.jsonl",
        "[x].jsonl",
        "{x}.jsonl",
        "it's.jsonl",
        "(1).jsonl",
        "2024",
    ),
    *("/d/${x}", "~/x", "C:\\data\\x", "a'b\"c", "100%", "#1.jsonl", "数据/ü.jsonl", "$HOME/x"),
]


def generate(prompt: str | None = None, records: str | Sequence[str] | None = None) -> None:
    """A task that is never run."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that composes in no time."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "config.yaml").write_text(
        "prompt: null\ndata: {path: null}\nexperiment: null\n"
        f"task: {{_target_: {__name__}.generate, prompt: '${{prompt}}', records: '${{data.path}}'}}"
    )
    return folder


def settled(*typed: str, conf: Path | None = None) -> tuple[Graph, Graph]:
    """The configuration of a command line, and that of a run that it started and that goes on."""
    command = parse([*typed])
    found = []
    with initialize_config_dir(str(conf or conf_dir()), version_base="1.3"):
        for _ in range(2):
            kept = [o for o in command.overrides if not (conf and "experiment" in o)]
            config = compose(command.config_name, kept)
            OmegaConf.set_struct(config, False)
            texts.settle(config, command)
            found.append(Graph(config))
            command = Command(overrides=command.lasting)
    return found[0], found[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def arrives(key: str, text: str, conf: Path) -> None:
    graph, again = settled(f"{key}={text}", conf=conf)
    assert graph.build(key) == text
    assert again.build(key) == text, "as the run's own command says it"
    assert Graph(OmegaConf.create(graph.resolve())).build(key) == text, "as the ranks read it"


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts_arrive_as_typed(text: str, small: Path) -> None:
    arrives("prompt", text, small)


@pytest.mark.parametrize("text", PATHS)
def test_paths_arrive_as_typed(text: str, small: Path) -> None:
    arrives("data.path", text, small)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12))
@example("a'")
def test_any_text_arrives_as_typed(small: Path, text: str) -> None:
    quoted = (
        len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] and text.strip()[0] in "'\""
    )
    if text.strip().lower() != "null" and not quoted:
        arrives("prompt", text, small)


def test_quotes_around_the_whole_and_null_are_hydras() -> None:
    for typed, value in (
        ("'it is'", "it is"),
        ('"null"', "null"),
        ("null", None),
        ("'${x}'", "${x}"),
    ):
        assert settled("task=generate", f"prompt={typed}")[0].build("prompt") == value


def test_what_is_not_text_stays_what_it_is() -> None:
    graph, _ = settled(
        *(
            "+experiment=full",
            "data.renderer.output_format=[a,b]",
            "max_steps=5",
            "optimizer.lr=1e-3",
            "epochs=null",
        ),
        *("tokenizer.special_tokens=[<|im_start|>,<|im_end|>]", "name=007", "debug=true"),
        *("data.renderer.input_format=[INST] __input__ [/INST]", "export.path=${run}/e"),
    )
    values = ("data.renderer.output_format", "max_steps", "optimizer.lr", "epochs", "name", "debug")
    assert [graph.build(key) for key in values] == [["a", "b"], 5, 1e-3, None, "007", True]
    assert graph.build("tokenizer.special_tokens") == ["<|im_start|>", "<|im_end|>"]
    assert graph.build("data.renderer.input_format") == "[INST] __input__ [/INST]"


@pytest.mark.parametrize("typed", ["max_steps=[1, 2", "trainer.max_grad_norm={a: <b>}"])
def test_what_can_be_read_neither_as_text_nor_otherwise_is_an_error(typed: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot read {re.escape(repr(typed))}: "):
        settled(typed)


@pytest.mark.parametrize(
    "name", ["my run", "it's", "'x'", '"', "$(touch x);x", "${x}", "a,b", "[x]", "2024", "数"]
)
def test_printed_commands_go_through_shell_and_parser(name: str) -> None:
    (word,) = shlex.split(argument("run", name))
    assert value_of([word], "run") == name
    command = parse([word, "task=generate"])
    assert command.run is not None and command.run.path == Path(name).absolute()
    assert value_of(command.overrides[-1:], "run") == str(command.run.path).replace("${", "\\${")
