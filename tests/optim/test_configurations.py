"""Every file of conf/optimizer and conf/lr_scheduler builds, trains, and resumes bit-exactly."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.optim
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)

from ditty_di.optim import Schedulers, build_optimizer, schedules


def values(config: Any, key: str) -> list[Any]:
    """What stands under `key`, at any depth."""
    if isinstance(config, dict):
        here = [config[key]] if key in config else []
        return here + [one for value in config.values() for one in values(value, key)]
    return (
        [one for value in config for one in values(value, key)] if isinstance(config, list) else []
    )


CONF = Path(__file__).parents[2] / "conf"
#: Without mup, which is for models with a base: tests/optim/test_mup.py.
OPTIMIZERS = {
    path.stem: path for path in sorted((CONF / "optimizer").glob("*.yaml")) if path.stem != "mup"
}
SCHEDULERS = {path.stem: path for path in sorted((CONF / "lr_scheduler").glob("*.yaml"))}
ALL_TARGETS = {
    target
    for path in OPTIMIZERS.values()
    for target in values(yaml.safe_load(path.read_text()), "_target_")
}
LOW_BIT = [f"{adam}_{bits}" for adam in ("adam", "adamw") for bits in ("8bit", "4bit", "fp8")]


def node(path: Path) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(
            compose(overrides=[f"+optimizer={path.stem}"]).optimizer, _convert_="all"
        )


class Model(nn.Module):
    """Matrices of 4,096 elements, from where torchao keeps low-bit states."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(64, 64)
        self.proj = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        return self.lm_head(self.norm(x + torch.tanh(self.proj(x))))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    """The full batch of one fixed mapping: even Rprop, which wants that, learns it."""
    tokens = torch.arange(64)
    losses = []
    for _ in steps:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens.flip(0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_trains_and_resumes(name: str) -> None:
    if name.startswith("bnb_"):
        pytest.importorskip("bitsandbytes")
    factory: Callable[..., Optimizer] = node(OPTIMIZERS[name])
    whole = Model(0)
    losses = train(whole, build_optimizer(factory, [whole]), range(8))
    assert losses[-1] < losses[0]

    first = Model(0)
    optimizer = build_optimizer(factory, [first])
    assert train(first, optimizer, range(4)) == losses[:4]
    file = io.BytesIO()
    torch.save((first.state_dict(), get_flat_optim_state_dict(optimizer)), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)

    second = Model(1)
    second.load_state_dict(weights)
    resumed = build_optimizer(factory, [second])
    init_optim_state(resumed)
    load_flat_optim_state_dict(resumed, state)
    assert train(second, resumed, range(4, 8)) == losses[4:]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_trains_and_resumes(name: str) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao's: the same step, uncompiled
        check_trains_and_resumes(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW_BIT)
def test_compiled_optimizer_trains_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiled steps of one torchao optimizer must not be found by another.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    check_trains_and_resumes(name)


def test_low_bit_states_are_low_bit() -> None:
    optimizer = build_optimizer(node(OPTIMIZERS["adamw_8bit"]), [Model(0)])
    matrix = torch.zeros(64, 64)
    assert type(optimizer._new_buffer(matrix, True)) is not torch.Tensor  # type: ignore[attr-defined]


def test_no_decay_on_norms_and_biases() -> None:
    optimizer = build_optimizer(node(OPTIMIZERS["adamw_grouped"]), [Model(0)])
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert {name for name, value in decay.items() if value} == {
        "embed_tokens.weight", "proj.weight", "lm_head.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    "embeddings",
    [
        ("model.embed_tokens", "lm_head"),  # Llama and most others
        ("transformer.wte", "lm_head"),  # GPT-2
        ("tok_embeddings", "output"),  # torchtitan
        ("shared", "lm_head"),  # T5
    ],
)
def test_muon_is_for_hidden_matrices(embeddings: tuple[str, str]) -> None:
    named = {f"{name}.weight": nn.Parameter(torch.zeros(8, 4)) for name in embeddings}
    hidden = ["model.layers.0.self_attn.o_proj.weight", "layers.0.attention.output.weight"]
    named |= {name: nn.Parameter(torch.zeros(4, 4)) for name in hidden}
    named["layers.0.norm.weight"] = nn.Parameter(torch.zeros(4))
    muon, adamw = node(OPTIMIZERS["muon"])(list(named.items())).optimizers
    assert muon.param_groups[0]["param_names"] == hidden
    assert len(adamw.param_groups[0]["params"]) == 3


def test_every_torch_optimizer_has_a_file() -> None:
    without = {
        "Optimizer": "the base class",
        "LBFGS": "its step calls a closure several times",
        "SparseAdam": "it takes sparse gradients only",
    }
    public = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
    classes = {
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, Optimizer) and name not in without
    }
    assert len(classes) >= 13
    assert {name.lower() for name in classes} <= OPTIMIZERS.keys()
    assert {f"torch.optim.{name}" for name in classes} <= ALL_TARGETS


def test_every_low_bit_optimizer_has_a_file() -> None:
    without = {
        "_AdamW": "private; full-precision states",
        "CPUOffloadOptimizer": "it wraps an optimizer class, and has no (name, parameter) list",
    }
    classes = set(torchao.optim.__all__) - without.keys()
    assert {f"torchao.optim.{name}" for name in classes} <= ALL_TARGETS
    assert len(classes) == len(LOW_BIT)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_file_says_its_rate_as_a_number(name: str) -> None:
    """`lr: 3e-4` without a point is text to some YAML readers."""
    rates = values(yaml.safe_load(OPTIMIZERS[name].read_text()), "lr")
    assert rates and all(isinstance(rate, float) for rate in rates)


# -- schedulers -------------------------------------------------------------------------------


def scheduler(name: str) -> Callable[[Optimizer], Any] | None:
    root = OmegaConf.create({"training_steps": 50, "global_batch_size": 8, "data": {"seq_len": 64}})
    root.node = OmegaConf.load(SCHEDULERS[name])
    return instantiate(root.node, _convert_="all")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_drives_a_run(name: str) -> None:
    optimizer = build_optimizer(node(OPTIMIZERS["adamw_grouped"]), [nn.Linear(2, 2)])
    schedulers = Schedulers(scheduler(name), optimizer)
    rates = []
    for _ in range(50):
        rates.append(schedulers.get_metrics()["lr"])
        optimizer.step()
        schedulers.step()
    assert all(0 < rate <= 3e-4 for rate in rates)
    if name != "torch_cosine":
        assert rates[0] < rates[8], "it warms up"
    last = schedulers.get_metrics()["lr"] / 3e-4
    expected = {"constant": 1.0, "power": 1.0, "infinite": 0.5, "wsd": 0.0, "torch_cosine": 0.0}
    assert last == pytest.approx(expected.get(name, 0.1), abs=1e-9)


def test_every_schedule_has_a_file() -> None:
    ours = {
        name
        for name, value in vars(schedules).items()
        if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Schedule"
        and not name.startswith("_")
    }  # fmt: skip
    assert ours | {"torch_cosine"} == SCHEDULERS.keys()


def test_phases_follow_the_run() -> None:
    """A fifth of 50 updates is the decay; the shape is a node of its own."""
    schedule = scheduler("wsd")(build_optimizer(node(OPTIMIZERS["sgd"]), [nn.Linear(2, 2)]))
    assert schedule.factor(40) == 1.0 and schedule.factor(41) < 1.0
    assert schedule.factor(45) == pytest.approx(1 - 0.5**0.5)
