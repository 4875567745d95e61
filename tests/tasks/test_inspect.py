"""Tasks that look at configurations and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditty_di.config import ConfigError, Graph, Provenance, provenance
from ditty_di.tasks import inspect

CONF = Path(__file__).resolve().parents[2] / "conf"

CONFIG = """\
defaults:
  - task: null
  - optimizer: sgd
  - _self_
seed: 1
name: x
tokenizer: {_target_: types.SimpleNamespace, words: [a, b]}
model:
  _target_: types.SimpleNamespace
  size: {_target_: builtins.str, _args_: ["${tokenizer}"]}
trainer:
  _target_: types.SimpleNamespace
  model: ${model}
  tokenizer: ${tokenizer}
  optimizer: ${optimizer}
  seed: ${seed}
  folder: out/${name}
resume: {ignore: [name, trainer.folder]}
"""
SGD = f"_target_: {__name__}.sgd\n_partial_: true\nlr: 0.1\n"


def sgd(params: Any, lr: float) -> None:
    raise AssertionError("was built")


@pytest.fixture
def look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Composes the shipped task over a small configuration, runs it, returns what it printed."""
    (tmp_path / "own" / "optimizer").mkdir(parents=True)
    (tmp_path / "own" / "config.yaml").write_text(CONFIG)
    (tmp_path / "own" / "optimizer" / "sgd.yaml").write_text(SGD)
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> str:
        from hydra import compose, initialize_config_dir

        typed = [f"hydra.searchpath=[file://{CONF}]", *overrides]
        with initialize_config_dir(str(tmp_path / "own"), version_base="1.3"):
            graph = Graph(compose("config", typed), provenance("config", typed))
        graph.check("task")
        graph.build("task")(graph)
        return capsys.readouterr().out

    return run


def test_check_says_what_it_checked(look: Any) -> None:
    out = look("task=check").splitlines()
    assert out[0] == "ok: 5 nodes from trainer, each imported and its arguments bound"
    assert look("task=check", "task.root=model").startswith("ok: 3 nodes from model")


def test_check_raises_all_errors(look: Any) -> None:
    with pytest.raises(ConfigError) as info:
        look("task=check", "+optimizer.mometum=1", "+model.x=${nowhere}")
    lines = str(info.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("command line '+model.x=${nowhere}': model.x: ${nowhere}: ")
    assert lines[1].startswith("command line '+optimizer.mometum=1': optimizer.mometum: ")


def test_explain_shows_every_line_that_set_a_key(look: Any) -> None:
    assert look("task=explain", "key=optimizer.lr", "optimizer.lr=0.5").splitlines() == [
        "optimizer.lr = 0.5",
        "  own/optimizer/sgd.yaml:3         0.1   (overridden below)",
        "  command line 'optimizer.lr=0.5'  0.5",
    ]
    assert look("task=explain", "key=trainer.seed").splitlines() == [
        "trainer.seed = 1   (from ${seed})",
        "  own/config.yaml:16  ${seed}",
    ]
    assert look("task=explain", "key=trainer.model").startswith("trainer.model = ${model}\n")


def test_explain_of_an_unknown_key(look: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        look("task=explain", "key=optimizer.lrr")
    with pytest.raises(ConfigError, match="key: missing mandatory value"):
        look("task=explain")


def test_explain_without_lines(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.explain(Graph({"a": True}), key="a")
    assert capsys.readouterr().out.splitlines() == [
        "a = true",
        "  set with the configuration that was given",
    ]


def test_graph_draws_a_shared_object_once(look: Any) -> None:
    assert look("task=graph").splitlines() == [
        "trainer: types.SimpleNamespace",
        "├── model: types.SimpleNamespace",
        "│   └── size: builtins.str",
        "│       └── _args_.0 = tokenizer: types.SimpleNamespace"
        "   -> shared, also at trainer.tokenizer",
        "├── tokenizer -> tokenizer, shared",
        f"└── optimizer: {__name__}.sgd (partial)",
    ]


def test_graph_as_dot(look: Any) -> None:
    lines = look("task=graph", "format=dot").splitlines()
    assert lines[0] == "digraph {" and lines[-1] == "}"
    assert '  "tokenizer" [label="tokenizer\\ntypes.SimpleNamespace", style="filled"];' in lines
    assert '  "model.size" -> "tokenizer" [label="_args_.0"];' in lines
    assert sum(" -> " in line for line in lines) == 5
    with pytest.raises(ConfigError, match="format=svg: write one of tree, dot"):
        look("task=graph", "format=svg")


def test_graph_imports_nothing() -> None:
    graph = Graph({"trainer": {"_target_": "no.such", "x": ["${y}"]}, "y": {"_target_": "no.more"}})
    assert inspect.tree(graph, "trainer").splitlines() == [
        "trainer: no.such",
        "└── x.0 = y: no.more",
    ]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs: other seed, rate, name; the second one was killed."""
    text = CONFIG.partition("seed:")
    for folder, seed, lr in (("a", 1, 0.1), ("b", 2, 0.3)):
        run = tmp_path / "outputs" / folder
        run.mkdir(parents=True)
        config = f"seed:{text[2]}".replace("seed: 1", f"seed: {seed}").replace(
            "name: x", f"name: {folder}"
        )
        config += "optimizer: {_target_: types.SimpleNamespace, lr: %s}\nidle: %s\n" % (lr, seed)  # noqa: UP031
        (run / "config.yaml").write_text(config)
        Graph.load(run / "config.yaml").save(run / "resolved.yaml")
        environment = {"packages": {"torch": f"2.1{seed}", "same": "1"}, "git": {"commit": folder}}
        (run / "environment.json").write_text(json.dumps(environment))
    result = {"status": "finished", "objective": 2.5}
    (tmp_path / "outputs" / "a" / "result.json").write_text(json.dumps(result))
    return tmp_path / "outputs" / "a", tmp_path / "outputs" / "b"


def test_diff_tells_what_can_change_the_numbers_from_the_rest(look: Any, runs: Any) -> None:
    a, b = runs
    assert look("task=diff", f"a={a}", f"b={b}").splitlines() == [
        f"a: {a}",
        f"b: {b}",
        "can change the numbers: 3 differences",
        "  seed          1    ->  2",
        "  trainer.seed  1    ->  2",
        "  optimizer.lr  0.1  ->  0.3",
        "other keys: 3 differences",
        "  name            a      ->  b",
        "  trainer.folder  out/a  ->  out/b",
        "  idle            1      ->  2",
        "environment: 2 differences",
        "  packages.torch  2.11  ->  2.12",
        "  git.commit      a     ->  b",
        "b has no result.json",
        "result     a         b",
        "status     finished",
        "objective  2.5",
    ]


def test_diff_of_a_run_with_itself(look: Any, runs: Any) -> None:
    out = look("task=diff", f"a={runs[0]}", f"b={runs[0]}")
    assert out.count("no differences") == 3


def test_diff_says_what_is_no_run(look: Any, runs: Any) -> None:
    a, b = runs
    with pytest.raises(ConfigError, match="b=nowhere: there is no such folder"):
        look("task=diff", f"a={a}", "b=nowhere")
    with pytest.raises(
        ConfigError, match=r"is no run: it has no resolved\.yaml; runs in it: .*/a, "
    ):
        look("task=diff", f"a={a.parent}", f"b={b}")
    (b / "result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*result\.json"):
        look("task=diff", f"a={a}", f"b={b}")
    (b / "resolved.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"cannot read .*resolved\.yaml"):
        look("task=diff", f"a={a}", f"b={b}")


def test_an_unfinished_chain_of_files_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    where = Provenance().add_file("one.yaml", "a: {b: 1}\n").add_file("two.yaml", "a: {b: 2}\n")
    inspect.explain(Graph({"a": {"b": 2}}, where), key="a.b")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  one.yaml:1  1   (overridden below)",
        "  two.yaml:1  2",
    ]
