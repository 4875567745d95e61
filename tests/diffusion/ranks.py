"""What ranks do to a model and its averages."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ditty_di.callbacks import EMA
from ditty_di.checkpoint import Checkpointer
from ditty_di.diffusion import DiT
from ditty_di.models.weights import initialize, local, materialize
from ditty_di.parallelize.data_parallel import shard
from ditty_di.runtime import Runtime


def sharded(runtime):
    model = DiT(hidden=16, layers=2, heads=2, device="meta")
    model = shard(model, parallel_dims=runtime.parallel_dims)
    materialize(model, runtime.device)
    initialize(model, device=runtime.device, seed=1)
    return model


def step(model, number):
    """Changes each weight by its own place, the same on any layout."""
    for parameter in model.parameters():
        whole = _whole(parameter)
        change = torch.linspace(-1, 1, whole.numel()).reshape(whole.shape) / number
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            change = distribute_tensor(change, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            local(parameter).add_(local(change))


def output(model):
    with torch.no_grad():
        x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
        return model(x, torch.tensor([1.0, 900.0]), torch.tensor([3, 7]))


def averaged(folder: str, *, load: bool = False, steps: int = 3) -> dict[str, Any]:
    """Averages over `steps`, saved (or loaded, and gone on from), and outputs with and without."""
    runtime = Runtime()
    model, ema = sharded(runtime), EMA(0.9, warmup=False)
    ema.start([model])
    saver = partial(Checkpointer, Path(folder), rank_states={})(states={"ema": ema})
    if load:
        saver.load()
    else:
        for number in range(1, steps + 1):
            step(model, number)
            ema.update()
        saver.save(steps, force=True)
    saver.close()
    before = [local(p).clone() for p in model.parameters()]
    own = output(model)  # leaves the outermost unit gathered
    with ema.swap():
        inside = output(model)
    after = output(model)
    if hasattr(model, "reshard"):
        model.reshard()
    back = all(
        torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True)
    ) and torch.equal(own, after)
    averages = {k: _whole(v) for k, v in ema.state_dict().items() if k != "updates"}
    return {
        "updates": ema.updates,
        "averages": averages,
        "own": own,
        "inside": inside,
        "back": back,
        "sharded": any(hasattr(p, "device_mesh") for p in model.parameters()),
    }


def _whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def resumed(folder: str) -> dict[str, Any]:
    return averaged(folder, load=True)
