"""The trainer's optimizer and scheduler: verified on entry, named for checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from ditty_di.optim import Optimizers, Schedulers, build_optimizer, cosine, grouped

ADAMW = partial(AdamW, lr=1e-3)


class Block(nn.Module):
    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        # A pipeline stage keeps the names of the whole model: its layers are a dict.
        self.layers = nn.ModuleDict({str(offset + i): nn.Linear(4, 4) for i in range(2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def names(optimizer: Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def test_all_parts_in_one_optimizer() -> None:
    optimizer = build_optimizer(ADAMW, [Block(), Block(2)])
    assert names(optimizer) == [
        f"layers.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    ]


def test_wrappers_leave_no_trace_in_names() -> None:
    plain, wrapped = Block(), Block()
    for key, layer in wrapped.layers.items():
        wrapped.layers[key] = checkpoint_wrapper(layer)
    compiled: Any = torch.compile(wrapped, backend="eager")
    raw = [name for name, _ in compiled.named_parameters()]
    assert all("_orig_mod." in n and "_checkpoint_wrapped_module." in n for n in raw)
    assert names(build_optimizer(ADAMW, [compiled])) == names(build_optimizer(ADAMW, [plain]))


def test_names_are_stripped_by_segment_only() -> None:
    odd = nn.ModuleDict({"my_orig_mod": nn.Linear(2, 2, bias=False)})
    assert names(build_optimizer(ADAMW, [odd])) == ["my_orig_mod.weight"]


def test_frozen_parameters_stay_out() -> None:
    block = Block()
    block.layers["0"].requires_grad_(False)
    assert names(build_optimizer(ADAMW, [block])) == ["layers.1.weight", "layers.1.bias"]


def test_parameters_of_a_loss() -> None:
    block = Block()
    log_variance = nn.Parameter(torch.zeros(()))
    tied = dict(block.named_parameters())["layers.1.weight"]
    extra = [("loss.log_variance", log_variance), ("loss.head", tied)]
    optimizer = build_optimizer(ADAMW, [block], extra)
    assert names(optimizer)[-2:] == ["layers.1.bias", "loss.log_variance"]


def test_names_that_a_factory_drops_are_attached() -> None:
    def forgetful(named: list[tuple[str, nn.Parameter]]) -> Optimizer:
        vectors = [p for _, p in named if p.ndim == 1]
        return SGD([{"params": [p for _, p in named if p.ndim > 1]}, {"params": vectors}], lr=0.1)

    optimizer = build_optimizer(forgetful, [Block()])
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["layers.0.weight", "layers.1.weight"],
        ["layers.0.bias", "layers.1.bias"],
    ]


def frozen() -> Block:
    return Block().requires_grad_(False)


def shared() -> list[nn.Module]:
    one = nn.Linear(2, 2)
    return [nn.ModuleDict({"a": one}), nn.ModuleDict({"b": one})]


def stale(named: Any) -> Optimizer:
    return SGD(Block().named_parameters(), lr=0.1)


def forgets(named: Any) -> Optimizer:
    return SGD(named[:2], lr=0.1)


@pytest.mark.parametrize(
    ("factory", "parts", "error", "message"),
    [
        (ADAMW, [frozen()], ValueError, r"at least one parameter must be trainable.* all 4 are"),
        (ADAMW, [Block(), Block()], ValueError, r"two parameters are called 'layers\.0\.weight'"),
        (ADAMW, shared(), ValueError, r"'b\.weight' of one model part is also 'a\.weight'"),
        (stale, [Block()], ValueError, r"4 of its parameters .*\(4, 4\).* are not trainable"),
        (forgets, [Block()], ValueError, r"leaves out 2 trainable parameters: \['layers\.1"),
        (lambda named: None, [Block()], TypeError, r"returned a NoneType without param_groups"),
    ],
)
def test_refusals(
    factory: Any, parts: list[nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_optimizer(factory, parts)


def test_a_built_optimizer_is_refused() -> None:
    block = Block()
    with pytest.raises(TypeError, match=r"optimizer: pass a partial.*not a built AdamW"):
        build_optimizer(AdamW(block.parameters()), [block])  # type: ignore[arg-type]


def test_the_trainers_pair() -> None:
    block = Block()
    optimizers = Optimizers(partial(SGD, lr=0.5), [block])
    schedulers = Schedulers(partial(cosine, max_steps=4, warmup_steps=2), optimizers.optimizer)
    assert schedulers.get_metrics() == {"lr": 0.25}
    block(torch.ones(1, 4)).sum().backward()
    bias = dict(block.named_parameters())["layers.1.bias"]
    before = bias.detach().clone()
    optimizers.step()
    schedulers.step()
    torch.testing.assert_close(bias.detach(), before - 0.25)
    assert schedulers.get_metrics() == {"lr": 0.5}
    assert schedulers.scheduler.last_epoch == 1
    optimizers.zero_grad()
    assert all(p.grad is None for p in block.parameters())


def test_rates_of_every_group() -> None:
    factory = partial(
        grouped, optimizer=partial(AdamW, lr=0.5), groups=[{"max_ndim": 1, "lr": 0.25}]
    )
    optimizer = build_optimizer(factory, [Block()])
    schedulers = Schedulers(partial(cosine, max_steps=4), optimizer)
    assert schedulers.get_metrics() == {"lr": 0.5, "lr/group0": 0.5, "lr/group1": 0.25}


def test_scheduler_refusals() -> None:
    optimizer, other = (build_optimizer(ADAMW, [Block()]) for _ in range(2))
    with pytest.raises(TypeError, match=r"lr_scheduler: pass a partial.*not a built StepLR"):
        Schedulers(StepLR(optimizer, 1), optimizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drives another optimizer"):
        Schedulers(lambda _: StepLR(other, 1), optimizer)
    with pytest.raises(TypeError, match=r"ReduceLROnPlateau\.step\(\) .*no argument"):
        Schedulers(ReduceLROnPlateau, optimizer)
