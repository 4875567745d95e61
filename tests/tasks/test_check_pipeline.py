"""`task=check` follows the contracts of a pipeline, and says in which line it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import ConfigError, Graph, provenance
from ditty_di.contracts.check import examine
from ditty_di.contracts.from_config import stages
from ditty_di.contracts.grammar import Entry
from ditty_di.contracts.stages import LOSS, Stage
from ditty_di.tasks.inspect import check

HEAD = """\
# @package _global_
defaults: [/experiment/{experiment}, _self_]
"""


@pytest.fixture
def checked(tmp_path, capsys):
    """Checks an experiment with some lines on top of it, in a file of their own."""

    def run(experiment, lines="", *overrides, **options):
        (tmp_path / "experiment").mkdir(exist_ok=True)
        text = HEAD.format(experiment=experiment) + lines
        (tmp_path / "experiment" / "own.yaml").write_text(text)
        typed = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=own", "run=here", *overrides]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            graph = Graph(compose("config", typed), provenance("config", typed))
        check(graph, **options)
        return capsys.readouterr().out

    return run


def test_the_pipeline_is_drawn_with_a_contract_at_each_arrow(checked):
    out = checked("diffusion", strict=True)
    drawn = out[out.index("the pipeline of trainer") :].splitlines()
    stages = ["loader", "preprocessor class_labels", "preprocessor ddpm", "model", "loss mse_loss"]
    assert [line[2:].startswith(stage) for line, stage in zip(drawn[1::2], stages, strict=True)]
    assert drawn[2].strip() == "│ input:4:f32 | ctx.target:1:i64"
    assert "-> x_t:n:f | ctx.forward_kwargs.timestep:1:i64" in drawn[5]
    assert "unchecked" not in out


@pytest.mark.parametrize("choice", [(), ("model=titan_llama",)], ids=["transformers", "titan"])
def test_the_model_of_a_function_has_the_function_s_contract(checked, choice):
    out = checked("pretrain", "", *choice, strict=True)
    assert "0:2:i64 -> logits:3:f" in out and "unchecked" not in out


def test_stages_without_a_contract_are_shown_and_refused_only_when_strict(checked):
    model = ("model=module", "model._target_=torch.nn.Identity")
    out = checked("pretrain", "", *model)
    assert "(no contract: unchecked)" in out and "? 0:n+1:f: may come from model" in out
    with pytest.raises(
        ConfigError, match=r"cross_entropy.yaml:\d+: .*may come from .*which has no contract"
    ):
        checked("pretrain", "", *model, strict=True)


NOISE = "'0:{} -> x_t:n:f | ctx.target:n:f, ctx.forward_kwargs.timestep:1'"
#: (where it is, lines from the third on with the name of the noise for {noise}, what is said)
MUTATIONS = {
    "a writer is removed": (
        "conf/model/dit_digits.yaml:2",
        'trainer: {preprocessors: ["${diffusion.condition}"]}\n',
        r"timestep:1: nothing before gives 'timestep'",
    ),
    "another rank": (
        "own.yaml:5",
        "\nloss:\n  contract: '0:n:f | ctx.target:3:f -> loss:0:f'\n",
        r"ctx.target:3:f: needs rank 3, but preprocessor \w+ gives target:4:f",
    ),
    "another dtype": (
        "own.yaml:4",
        "diffusion:\n  {noise}: {contract: " + NOISE.format("n:f16") + "}\n",
        r"0:n:f16: needs dtype f16, but loader gives input:4:f32",
    ),
    "a contract that cannot be read": (
        "own.yaml:4",
        "diffusion:\n  {noise}: {contract: " + NOISE.format("n:f9") + "}\n",
        r"'f9' is not a dtype",
    ),
}


@pytest.mark.parametrize("experiment, noise", [("diffusion", "noise"), ("flow_matching", "flow")])
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_breaks_a_pipeline_is_found_with_file_and_line(checked, experiment, noise, name):
    place, lines, message = MUTATIONS[name]
    with pytest.raises(ConfigError, match=message) as caught:
        checked(experiment, lines.replace("{noise}", noise))
    assert place in str(caught.value)


def test_processors_that_a_layout_does_not_allow_are_found(checked):
    with pytest.raises(ConfigError, match=r"two_heads.yaml:\d+: .*keep_input: with runtime.cp > 1"):
        checked("two_heads", "runtime: {cp: 2}\n")
    with pytest.raises(ConfigError, match="is not a model of transformers") as others:
        checked("classification", "runtime: {cp: 2}\n")
    assert "with runtime.cp > 1" not in str(others.value)


# -- the experiments that ship ---------------------------------------------------------------------

#: All but the skeleton, which says nothing of the model that a user brings.
EXPERIMENTS = sorted(
    path.stem for path in conf_dir().glob("experiment/*.yaml") if path.stem != "module"
)
#: Changes that no other stage minds, by what is changed.
HARMLESS = {
    ("ctx.target", "removed"): "the trainer gives the loader's labels, whatever they are",
    ("ctx.mask", "dtype"): "what is 0 is masked, in any dtype",
    ("x_t", "removed"): "then the images reach the model as they are",
    ("ctx.forward_kwargs.timestep", "dtype"): "the model takes steps and times",
    ("input", "removed"): "of several inputs, the next one becomes the first",
    ("logits", "rank"): "logits that are made when they are asked for",
}


def mutants(stage: Stage) -> Iterator[tuple[tuple[str, str], Stage]]:
    """The stage with one entry of what it gives removed, of another rank, or of another dtype."""
    assert stage.contract is not None
    for side, prefix in (("outputs", ""), ("writes", "ctx.")):
        entries = getattr(stage.contract, side)
        for n, entry in enumerate(entries):
            rank = entry.rank + 1 if isinstance(entry.rank, int) else f"{entry.rank[:1]}+1"
            changes: dict[str, tuple[Entry, ...]] = {"removed": ()}
            if rank != "*+1":
                changes["rank"] = (replace(entry, rank=rank),)
            if entry.dtype is not None:
                other = "f32" if entry.dtype.startswith("i") else "i32"
                changes["dtype"] = (replace(entry, dtype=other),)
            for kind, changed in changes.items():
                given = {side: (*entries[:n], *changed, *entries[n + 1 :])}
                contract = replace(stage.contract, **given)
                yield (prefix + entry.name, kind), replace(stage, contract=contract)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_change_to_what_a_stage_gives_is_found(experiment):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        graph = Graph(compose("config", [f"experiment={experiment}", "run=here"]))
    chain = stages(graph)
    report = examine(chain)
    assert not (report.problems or report.unproven or report.unchecked)
    for n, stage in enumerate(chain):
        if stage.kind != LOSS:
            for change, mutant in mutants(stage):
                found = examine([*chain[:n], mutant, *chain[n + 1 :]]).problems
                assert found or change in HARMLESS, (str(stage), change)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize(
    "contract, message",
    [
        ("0:2:i64 -> unheard_of:6:f16", r"nothing before gives|there is no position|needs rank"),
        ("0:7:f -> logits:3:f", r"0:7:f: needs rank 7, but .* gives"),
        ("0:*:b -> logits:3:f", r"0:\*:b: needs dtype b, but .* gives"),
    ],
)
def test_a_model_that_does_not_fit_is_found(checked, experiment, contract, message):
    with pytest.raises(ConfigError, match=message):
        checked(experiment, f"trainer: {{model_contract: '{contract}'}}\n")


class NoProcess:
    pass


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            "trainer: {preprocessors: [mine.Scale]}",
            r"preprocessors.0: 'mine.Scale': is not an",
        ),
        ("trainer: {postprocessors: [null]}", r"postprocessors.0: None: is not an object"),
        (
            f"trainer: {{preprocessors: [{{_target_: {__name__}.NoProcess}}]}}",
            r"preprocessors.0: .*has no process; write a node",
        ),
        (
            "callbacks: {mine: ema}",
            r"callbacks.mine: 'ema': is not an object",
        ),
        (
            f"callbacks: {{mine: {{_target_: {__name__}.NoProcess}}}}",
            r"callbacks.mine: .*has no on_train_start, on_step_end",
        ),
        (
            "runtime: {pp: 2}\ntrainer: {pipeline_fn: null}",
            r"trainer.pipeline_fn: runtime.pp > 1 needs a function",
        ),
        (
            "trainer: {preprocessors: [{_target_: ditty_di.diffusion.DDPM, contract: 5, "
            "schedule: 1, prediction: 2}]}",
            r"a contract is text such as .*; got 5",
        ),
    ],
)
def test_what_is_no_part_of_a_pipeline_is_found(checked, lines, message):
    with pytest.raises(ConfigError, match=message):
        checked("classification", f"{lines}\n")


def test_a_part_of_a_composite_is_found_where_its_list_is_written(checked):
    lines = "loss:\n  losses:\n    - - {_target_: ditty_di.losses.MSELoss, target_key: imgae}\n"
    with pytest.raises(ConfigError, match=r"own.yaml:4: .*mse_loss: ctx.imgae:n:f: nothing before"):
        checked("two_heads", f"{lines}      - 1.0\n")
