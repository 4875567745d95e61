"""One of two ranks over gloo, `python ranks_groups.py RANK STORE_FILE`; raises if it goes wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from ditty_di.optim import build_optimizer, combined, grouped
from ditty_di.optim.mup import by_width
from tests.models.test_mup import config, filled

CONF = Path(__file__).parents[2] / "conf" / "optimizer"


def stages(rank: int) -> None:
    """A rule may be for another stage's parameters, but not for nobody's."""
    stage = nn.ModuleDict({("embed", "head")[rank]: nn.Linear(2, 2)})
    sgd = partial(SGD, lr=1.0)
    groups = partial(grouped, optimizer=sgd, groups=[{"match": "head", "lr": 2.0}])
    assert build_optimizer(groups, [stage]).param_groups[0]["lr"] == 1.0 + rank
    rules = partial(combined, rules=[{"match": "embed", "optimizer": sgd}, {"optimizer": sgd}])
    assert len(build_optimizer(rules, [stage]).param_groups) == 1
    wrong = partial(grouped, optimizer=sgd, groups=[{"match": "haed", "lr": 2.0}])
    try:
        build_optimizer(wrong, [stage])
    except ValueError as error:
        assert "groups[0] (match='haed')" in str(error)
    else:
        raise AssertionError("no rank has a 'haed'")


def sharded_equals_whole(name: str, tolerance: float) -> None:
    """Under FSDP2 a step updates as on one rank, up to `tolerance` of the update's norm."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4))

    factory = instantiate(OmegaConf.load(CONF / f"{name}.yaml"), _convert_="all")
    whole, sharded, start = build(), build(), build()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    x = torch.randn(8, 6)
    for model in (whole, sharded):
        optimizer = build_optimizer(factory, [model])
        model(x).square().mean().backward()
        optimizer.step()
    parameters = zip(
        start.parameters(), whole.named_parameters(), sharded.parameters(), strict=True
    )
    with torch.no_grad():
        for before, (key, after), shard in parameters:
            update, error = after - before, shard.full_tensor() - after  # type: ignore[attr-defined]
            assert update.norm() > 0 and error.norm() <= tolerance * update.norm(), f"{name}: {key}"


def rates_by_width() -> None:
    """Widths are those of the whole tensors: a sharded matrix has the rate of the whole one."""
    x = torch.arange(12)[None] % 64
    models, rates = [filled(config(2)), filled(config(2))], []
    fully_shard(models[1], mesh=init_device_mesh("cpu", (2,)))
    for model in models:
        optimizer = build_optimizer(
            partial(by_width, model=model, optimizer=torch.optim.AdamW, lr=0.01), [model]
        )
        groups = optimizer.param_groups
        rates.append({name: g["lr"] for g in groups for name in g["param_names"]})
        model(x, labels=x).loss.backward()
        optimizer.step()
    assert rates[0] == rates[1] and {*rates[0].values()} == {0.01, 0.005}
    sharded = dict(models[1].named_parameters())
    for name, whole in models[0].named_parameters():
        torch.testing.assert_close(sharded[name].full_tensor(), whole, rtol=0, atol=1e-5)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    stages(dist.get_rank())
    sharded_equals_whole("adamw_grouped", 1e-5)
    # bfloat16 Newton-Schulz: a sharded sum rounds elsewhere, no further from the exact one.
    sharded_equals_whole("muon", 0.05)
    rates_by_width()
    dist.barrier()
    dist.destroy_process_group()
