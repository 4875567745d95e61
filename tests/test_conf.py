"""Every configuration that ships composes alone, sets only its own node, and is documented."""

from __future__ import annotations

import functools
import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ditty_di.cli import composing, searchpath
from ditty_di.cli.command import Command, parse
from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import ConfigError, Graph

#: Values that only a user knows (`???` in the file), and what needs no program; no other choice.
VALUES = {
    "data=files": ["data.path=launch/constraints.txt"],
    "data=mixed": ["data.path=folder"],
    "data=rows": ["data.train._target_=builtins.list"],
    "data=shards": ["data.path=folder"],
    "data=stream": ["data.path=s3://bucket/folder"],
    "data=text": ["data.corpus.path=launch/constraints.txt"],
    "experiment=module": [
        "model._target_=torch.nn.Identity",
        "data.train._target_=builtins.list",
    ],
    "launcher=kubernetes": [
        *("launcher.image=image", "launcher.volumes={/runs: claim}", "launcher.dry_run=true")
    ],
    "launcher=skypilot": ["launcher.dry_run=true"],
    "launcher=slurm": ["launcher.dry_run=true"],
    "launcher=ray": ["launcher.dry_run=true"],
    "loss=function": ["loss._target_=torch.nn.functional.mse_loss"],
    "model=hf_image_text": ["model.path=folder"],
    "model=hf_masked_lm": ["model.path=folder"],
    "model=hf_seq2seq": ["model.path=folder"],
    "model=module": ["model._target_=torch.nn.Identity"],
    "tokenizer=pretrained": ["tokenizer.pretrained_model_name_or_path=folder"],
    "weights=pretrained": ["weights.path=folder"],
}
FILES = sorted(path for path in conf_dir().rglob("*.yaml"))
GROUPS = {
    group: choices
    for group, choices in searchpath.groups([conf_dir()]).items()
    if not group.startswith("hydra")
}
CHOICES = [f"{group}={name}" for group, choices in GROUPS.items() for name in choices]
#: Groups whose files may set any key.
GLOBAL = ("experiment", "task")


@pytest.fixture(scope="module", autouse=True)
def hydra():
    composing.register(Command())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@functools.cache
def plain(*overrides: str) -> dict:
    config = compose("config", [*overrides])
    config.run = "run"
    return OmegaConf.to_container(config)


@functools.cache
def composed(*overrides: str) -> Graph:
    return Graph(plain(*overrides))


@pytest.fixture(scope="module")
def default(hydra) -> dict:
    return plain()


# -- a group sets its own node ---------------------------------------------------------------------


@pytest.mark.parametrize("choice", [c for c in CHOICES if not c.startswith("task=")])
def test_every_choice_is_sound_by_itself(choice):
    graph = composed(choice, *VALUES.get(choice, ()))
    try:
        assert graph.check("task", "launcher").nodes
    except ConfigError as error:  # a tracker that is not installed
        if not (missing := re.search(r"needs \w+: pip install", str(error))):
            raise
        pytest.skip(missing[0])


@pytest.mark.parametrize("choice", [c for c in CHOICES if not c.startswith(GLOBAL)])
def test_a_choice_changes_only_the_node_of_its_group(choice, default):
    config, group = plain(choice), choice.partition("=")[0]
    assert group in config and config.keys() == default.keys()
    assert {key for key in config if config[key] != default[key]} <= {group}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(conf_dir()).as_posix())
def test_only_experiments_and_tasks_are_global(file):
    package = re.match(r"# @package (\S+)", file.read_text())
    group = file.relative_to(conf_dir()).parts[0]
    assert package is None or group in GLOBAL or package[1] == group


@pytest.mark.parametrize("group", [g for g in GROUPS if g != "task"])
def test_a_group_without_a_choice_is_null(group, default):
    config = plain(f"{group}=none")
    assert config.get(group) in (None, default.get(group) if group == "callbacks" else None)
    typed = parse([f"{group}=null", "task=check"]).overrides
    assert f"{group}=none" in typed or group == "experiment"


def test_none_may_be_one_value_of_a_sweep_or_the_override_of_an_experiment(tmp_path):
    typed = parse(["--multirun", "adapter=null,lora", "max_steps=null"]).overrides
    assert "adapter=none,lora" in typed and "max_steps=null" in typed
    config = plain("experiment=lora", "adapter=none", "lr_scheduler=none")
    assert config["adapter"] is None and config["lr_scheduler"] is None


def test_a_value_that_only_the_user_knows_is_asked_for():
    with pytest.raises(ConfigError, match=r"model\.path"):
        composed("model=hf_seq2seq").check("task")


def test_files_that_others_are_made_of_are_not_choices():
    assert not {"examples", "documents"} & GROUPS["data"].keys()
    assert not [group for group in GROUPS if "_base" in group]


# -- experiments -----------------------------------------------------------------------------------


def test_a_plain_start_is_the_pretraining_experiment():
    experiment, plain = composed("experiment=pretrain"), composed()
    assert experiment.build("name") == plain.build("name") == "pretrain"


@pytest.mark.parametrize("typed", ["experiment=qlora", "+experiment=qlora"])
def test_an_experiment_is_chosen_in_both_spellings(typed):
    assert "experiment=qlora" in parse([typed]).overrides


def test_a_configuration_without_experiments_in_its_defaults_gets_them_added(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("defaults: [_self_]\nname: mine\n")
    (tmp_path / "conf" / "around.yaml").write_text("defaults: [config, _self_]\n")
    monkeypatch.chdir(tmp_path)
    assert "+experiment=x" in parse(["experiment=x"]).overrides
    assert "+experiment=x" in parse(["--config-name", "around", "experiment=x"]).overrides
    (tmp_path / "conf" / "config.yaml").unlink()
    assert "experiment=x" in parse(["--config-name", "around", "+experiment=x"]).overrides


@pytest.mark.parametrize(
    ("choices", "reached"),
    [
        (["neftune=default"], "neftune"),
        (["activation_checkpointing=full"], "activation_checkpointing"),
        (["adapter=lora"], "adapter"),
        (["profiler=torch"], "profiler"),
        (["callbacks=[ema,early_stopping]"], "callbacks.ema"),
        (["callbacks=[ema,early_stopping]"], "callbacks.early_stopping"),
        (["data=jsonl", "batching=packed"], "batching.train"),
        (["precision=fp8"], "precision.convert"),
        (["precision=fp16"], "precision.grad_scaler"),
        (["data=jsonl"], "data.sample_text"),
        (["model=titan_llama"], "tokenizer"),
    ],
    ids=str,
)
def test_what_is_chosen_reaches_the_trainer(choices, reached):
    assert reached in composed(*choices).check("trainer").nodes


@pytest.mark.parametrize("task", ["download", "tokenize"])
@pytest.mark.parametrize("data", [c for c in CHOICES if c.startswith("data=")])
def test_data_with_a_source_are_downloaded_and_tokenized(task, data):
    graph = composed(f"task={task}", data, *VALUES.get(data, ()))
    if "source" in graph.value("data"):
        assert {"data.source", "data"} & graph.check("task").nodes.keys()
    else:
        with pytest.raises(ConfigError, match="no text to tokenize"):
            graph.check("task")


def test_compiled_blocks_are_arguments_of_the_layout():
    assert composed("compile=blocks").value("parallelize.compile") == {"fullgraph": False}


@pytest.mark.parametrize(
    ("choice", "degrees"), [("fsdp", (1, -1)), ("ddp", (-1, 1)), ("hsdp", (-1, 2))]
)
def test_the_runtime_has_the_degrees_of_the_layout(choice, degrees):
    graph = composed(f"parallelize={choice}")
    assert (graph.value("runtime.dp_replicate"), graph.value("runtime.dp_shard")) == degrees


def test_the_data_say_what_is_shown_after_a_validation():
    assert composed("experiment=classification").value("validator.samples") is None
    assert "data.sample_text" not in composed("validator=none").check("task").nodes
    documents, examples = composed(), composed("data=jsonl")
    assert documents.value("validator.perplexity") and not documents.value(
        "validator.validate_before_training"
    )
    assert examples.value("validator.validate_before_training") and not examples.value(
        "validator.perplexity"
    )
    assert documents.value("validator.baselines").keys() == {"unigram_entropy"}
    assert examples.value("validator.baselines") is None


# -- documentation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(conf_dir()).as_posix())
def test_a_file_begins_with_a_sentence(file):
    lines = [line for line in file.read_text().splitlines() if "@package" not in line]
    assert re.match(r"# \S.*[.:!)]|# .*  \S+=", lines[0]), lines[0]
    if file.parent.name == "experiment":
        assert any(line.startswith("# Run: python -m ditty_di experiment=") for line in lines)


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if f.relative_to(conf_dir()).parts[0] not in ("experiment", "hydra")],
    ids=lambda f: f.relative_to(conf_dir()).as_posix(),
)
def test_every_field_has_a_comment(file):
    """Every value that a user may change is explained; references and constructors need not be."""
    lines = file.read_text().splitlines()
    for key, line in fields(yaml.compose(file.read_text())):
        assert " # " in lines[line], f"{file}:{line + 1}: {key} has no comment"


def fields(node, inside=False):
    """(key, line) of every plain value in a file, but references, targets and one-line nodes."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = key.value
        if name in ("defaults", "_target_", "_partial_", "_args_", "hydra"):
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from fields(value)
        elif isinstance(value, yaml.SequenceNode) and not value.flow_style:
            for item in value.value:
                yield from fields(item)
        elif not (node.flow_style or "${" in str(value.value) or _is_null_group(name, value)):
            constructor = isinstance(value, yaml.MappingNode) and any(
                inner.value == "_target_" for inner, _ in value.value
            )
            if not constructor:
                yield name, key.start_mark.line


def _is_null_group(name, value):
    return name in GROUPS and value.tag.endswith(":null")


def test_shipped_configuration_computes_nothing():
    for file in FILES:
        assert not re.search(r"_target_: (operator|builtins)\.", file.read_text()), file
