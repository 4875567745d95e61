"""The shipped experiments' contracts hold, and what breaks them is found before training."""

import pytest
from hydra import compose, initialize_config_dir

from ditty_di.cli.searchpath import conf_dir
from ditty_di.config import Graph
from ditty_di.contracts.check import examine
from ditty_di.contracts.from_config import stages
from ditty_di.contracts.render import render


def examined(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", [*overrides])
    config.run = "run"
    return examine(stages(Graph(config)))


@pytest.mark.parametrize("experiment", ["diffusion", "flow_matching"])
def test_every_stage_is_checked_and_fits(experiment):
    found = examined(f"experiment={experiment}")
    assert not (found.problems or found.unproven or found.unchecked), render(found)


MUTATIONS = {
    "without the noise, nobody makes a time": (
        ["trainer.preprocessors=['${diffusion.condition}']"],
        "timestep",
    ),
    "without the condition, nobody passes the classes on": (
        ["trainer.preprocessors=['${diffusion.noise}']"],
        "class_labels",
    ),
    "in the wrong order, the target is noise and no label": (
        ["trainer.preprocessors=['${diffusion.noise}','${diffusion.condition}']"],
        "target",
    ),
    "another rank": (
        ["+data.train.contract='-> input:3:f32 | ctx.target:1:i64'"],
        "4",
    ),
    "another dtype": (
        ["+data.train.contract='-> input:4:f32 | ctx.target:1:f32'"],
        "target",
    ),
    "a mask that nobody makes": (["loss.mask_key=masks"], "masks"),
}


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("experiment", ["diffusion", "flow_matching"])
def test_a_broken_pipeline_is_found(experiment, name):
    overrides, word = MUTATIONS[name]
    problems = examined(f"experiment={experiment}", *overrides).problems
    assert any(word in str(problem) for problem in problems), problems
