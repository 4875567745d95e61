"""`task=check` follows the contracts of a pipeline, and says in which line it breaks."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.graph import ConfigError, Graph, provenance
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
        typed = [f"hydra.searchpath=[file://{tmp_path}]", "+experiment=own", "run=here", *overrides]
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


def test_stages_without_a_contract_are_shown_and_refused_only_when_strict(checked):
    lines = "loss: {output_index: logits}\n"
    out = checked("pretrain", lines, "loss=mse")
    assert "(no contract: unchecked)" in out and "? logits:n:f: may come from model" in out
    with pytest.raises(ConfigError, match=r"mse.yaml:\d+: .*may come from .*which has no contract"):
        checked("pretrain", lines, "loss=mse", strict=True)


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
        r"'f9' is no dtype",
    ),
}


@pytest.mark.parametrize("experiment, noise", [("diffusion", "noise"), ("flow_matching", "flow")])
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_breaks_a_pipeline_is_found_with_file_and_line(checked, experiment, noise, name):
    place, lines, message = MUTATIONS[name]
    with pytest.raises(ConfigError, match=message) as caught:
        checked(experiment, lines.replace("{noise}", noise))
    assert place in str(caught.value)
