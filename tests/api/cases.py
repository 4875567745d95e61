"""Small models and rows, and what ranks do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ditty_di.api import FSDPConfig, ModelFactory, Pipeline
from tests import warm

ROOT = Path(__file__).parents[2]


def python(folder: Path, *command: str, **env: str) -> str:
    """Run Python in a folder, and return what it prints."""
    done = warm.run(command, cwd=folder, env=env, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(size), nn.Linear(size, size)

    def forward(self, x):
        return x + self.linear(self.norm(x)).relu()


class Net(nn.Module):
    """Blocks in two places, as encoders and decoders have them."""

    def __init__(self, size: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(size) for _ in range(blocks + 1))
        self.second = nn.Sequential(*(Block(size) for _ in range(blocks)))
        self.head = nn.Linear(size, 1)

    def forward(self, x):
        for block in self.first:
            x = block(x)
        return self.head(self.second(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def rows(count: int = 96) -> list[Any]:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    return list(zip(x, x[:, :1].sin(), strict=True))


FSDP = FSDPConfig(transformer_layers=[Block])


class Losses:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def start(self, *, step: int, max_steps: int) -> None: ...

    def write(self, step: int, values: dict[str, float]) -> None:
        self.values.append(values["loss"])

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


def trained(
    *, fsdp_config: FSDPConfig | None = None, model: nn.Module | None = None, **options: Any
) -> tuple[list[float], nn.Module]:
    """The losses of every step, and the model."""
    losses = Losses()
    pipeline = Pipeline(
        model_factory=ModelFactory.from_instance(model or net(), fsdp_config=fsdp_config),
        **{"dataset": rows(), "lr": 1e-2, "max_steps": 6, "batch_size": 8, **options},
        log_every=1,
        metrics_logger=losses,
    )
    model = pipeline.run()
    return losses.values, model


#: What several ranks do, with 16 rows a step on any number of them.
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp_config": FSDP},
    "fsdp-recompute": {"fsdp_config": FSDP, "gradient_checkpointing": True},
    "ddp-8bit": {"use_8bit_optim": True},
    "fsdp-bnb": {"fsdp_config": FSDP, "use_8bit_optim": True, "optim_backend": "bnb"},
    "ddp-bf16": {"use_bfloat16": True},
    "fsdp-bf16": {"fsdp_config": FSDP, "use_bfloat16": True},
}


def on_ranks(folder: str) -> dict[str, Any]:
    """Return the losses of each way, and which modules hold shards."""
    size, found = 16 // dist.get_world_size(), {}
    for name, options in WAYS.items():
        saved = {"output_dir": Path(folder) / name} if name == "fsdp" else {}
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
            losses, model = trained(**options, **saved, batch_size=size)
        # As a shard group of one, DDP's parameters are whole on each rank.
        local = model.first[0].linear.weight
        held = getattr(local, "_local_tensor", local).numel()
        units = [n for n, m in model.named_modules() if type(m).__name__.startswith("FSDP")]
        found[name] = {"losses": losses, "held": held, "units": units}
    return found


def resumed(*folders: str) -> list[list[float]]:
    """Resume runs of `on_ranks`, for twice as many steps; return the losses of each."""
    size = 16 // dist.get_world_size()
    return [
        trained(fsdp_config=FSDP, output_dir=Path(folder), batch_size=size, max_steps=12)[0]
        for folder in folders
    ]
