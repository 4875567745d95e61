"""bitsandbytes' 8-bit optimizers (arXiv 2110.02861), also for sharded parameters.

Their kernels take plain tensors and keep the moments in blocks of 256 elements, each with its own
scale. Here each rank's optimizer gets the rank's own shards, and the state is kept by parameter, as
tensors that are sharded like it: it is saved like any other optimizer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from ditty_di.optim.groups import ClosureOptimizer

BLOCK = 256  # elements with one scale


def adamw(
    params: Iterable[Any],
    /,
    *,
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    paged: bool = False,
    min_8bit_size: int = 4096,
) -> Optimizer:
    """Build AdamW with 8-bit moments: 2 bytes a parameter.

    Args:
        params: (name, parameter) pairs, or groups of them.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, relative to `lr`.
        paged: moments in memory that CUDA moves to the host when the GPU's is full.
        min_8bit_size: a parameter with fewer elements, over all ranks, keeps 32-bit moments.
    """
    bnb = _imported()
    return Local(
        params,
        lambda local: bnb.optim.AdamW8bit(
            local, lr, tuple(betas), eps, weight_decay, is_paged=paged
        ),
        min_8bit_size=min_8bit_size,
    )


def lion(
    params: Iterable[Any],
    /,
    *,
    lr: float = 1e-4,
    betas: Sequence[float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    paged: bool = False,
    min_8bit_size: int = 4096,
) -> Optimizer:
    """Build Lion (arXiv 2302.06675) with an 8-bit moment: 1 byte a parameter.

    Args:
        params: see `adamw`.
        lr: see `adamw`.
        betas: decay rates of the update and of the moment.
        weight_decay: see `adamw`.
        paged: see `adamw`.
        min_8bit_size: see `adamw`.
    """
    bnb = _imported()
    return Local(
        params,
        lambda local: bnb.optim.Lion8bit(local, lr, tuple(betas), weight_decay, is_paged=paged),
        min_8bit_size=min_8bit_size,
    )


class Local(ClosureOptimizer):
    """An optimizer of bitsandbytes on the local shards of its parameters.

    `param_groups` hold the parameters themselves, `state` a view of the inner optimizer's state:
    elementwise tensors sharded like the parameter, scales by block, the step. Where shards end at
    block boundaries (rows of 256 elements, or enough of them) the scales are sharded by rows as
    well, so that a checkpoint loads on any such layout, exactly. Where they do not, the scales have
    a shape with the number of shards in it: another number is refused when it is loaded.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for any optimizer.
        build: makes the inner optimizer from groups of local parameters.
        min_8bit_size: a parameter with fewer elements, over all ranks, keeps 32-bit state.

    Raises:
        ValueError: a parameter sharded over two mesh dimensions, or not by rows.
    """

    def __init__(
        self,
        params: Iterable[Any],
        build: Callable[[list[dict[str, Any]]], Any],
        *,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, {})
        self.min_8bit_size = min_8bit_size
        self._locals: dict[Tensor, nn.Parameter] = {}
        groups = []
        for group in self.param_groups:
            for parameter in group["params"]:
                _require_rows(parameter)
                self._locals[parameter] = nn.Parameter(_local(parameter), requires_grad=False)
            own = [self._locals[parameter] for parameter in group["params"]]
            groups.append({**_options(group), "params": own})
        self.inner = build(groups)
        self.defaults = dict(self.inner.defaults)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({k: v for k, v in inner.items() if k != "params"})
        self._views: dict[Tensor, dict[str, Tensor]] = {}

    def update(self) -> None:
        """Step the inner optimizer, with the groups' current options."""
        stepped = []
        pairs = zip(self.param_groups, self.inner.param_groups, strict=True)
        for i, (group, inner) in enumerate(pairs):
            inner.update(_options(group))
            for j, parameter in enumerate(group["params"]):
                own = self._locals[parameter]
                own.grad = None
                if parameter.grad is None:
                    continue
                own.data = _local(parameter)
                if parameter not in self._views:
                    self._make_state(parameter, inner, i, j)
                self._take_over(parameter)
                stepped.append(parameter)
                if own.numel():  # a small parameter has no rows on the last ranks
                    own.grad = _local(parameter.grad)
        self.inner.step()
        for parameter in stepped:
            own = self._locals[parameter]
            state = self.inner.state[own]
            if not own.numel():
                state["step"] += 1
            self.state[parameter]["step"] = state["step"]
            own.grad = None

    def _make_state(self, parameter: Tensor, group: dict[str, Any], i: int, j: int) -> None:
        """Make the inner optimizer's state of one parameter, and views of it in `self.state`.

        Its number of bits must not depend on this rank's shard, so it is decided here.
        """
        own, args = self._locals[parameter], self.inner.args
        args.min_8bit_size = 0 if parameter.numel() >= self.min_8bit_size else math.inf
        self.inner.init_state(group, own, i, j)
        inner, views = self.inner.state[own], {}
        for key, value in list(inner.items()):
            if not isinstance(value, Tensor) or key.startswith("qmap"):
                continue  # the step, and the table of 8-bit values, which never changes
            if key.startswith("absmax"):
                scales, shape = _scales(parameter, value)
                inner[key] = scales.view(-1)[: value.numel()]
                views[key] = _as_sharded(parameter, scales, shape)
            elif value.shape == own.shape:
                views[key] = _as_sharded(parameter, value, parameter.shape)
            else:
                raise ValueError(
                    f"optimizer: {type(self.inner).__name__} keeps {key} of shape "
                    f"{list(value.shape)} for a parameter of shape {list(own.shape)}, which cannot "
                    f"be saved by parameter; use ditty_di.optim.bitsandbytes.adamw or lion"
                )
        self._views[parameter] = views
        # State that was loaded before this one existed has precedence.
        self.state[parameter] = {**views, "step": inner["step"], **self.state.get(parameter, {})}

    def _take_over(self, parameter: Tensor) -> None:
        """Copy what was put into `self.state` since the last step into the inner optimizer."""
        state, views = self.state[parameter], self._views[parameter]
        for key, view in views.items():
            if (value := state.get(key)) is not view:
                if value is not None:
                    view.copy_(value)
                state[key] = view
        self.inner.state[self._locals[parameter]]["step"] = int(state["step"])


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group, without its parameters."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _require_rows(parameter: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        return
    shards = [p for p in parameter.placements if not isinstance(p, Replicate)]
    if len(shards) > 1 or any(p != Shard(0) for p in shards):
        raise ValueError(
            f"optimizer: bitsandbytes takes parameters that are sharded by rows over one mesh "
            f"dimension, not {parameter.placements}; use optimizer=adamw_8bit"
        )


def _shards(parameter: Tensor) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(n for placement, n in sizes if isinstance(placement, Shard))


def _scales(parameter: Tensor, scales: Tensor) -> tuple[Tensor, torch.Size]:
    """Return memory for this rank's scales (one a block), and the shape over all ranks."""
    rows, shards = parameter.shape[0] if parameter.dim() else 1, _shards(parameter)
    row = parameter.numel() // max(rows, 1)  # elements
    together = BLOCK // math.gcd(row, BLOCK)  # rows after which a block ends
    most = -(-rows // shards)  # rows of the largest shard
    if rows % together == 0 and most % together == 0:
        shape = torch.Size([rows // together, row * together // BLOCK])
        return scales.new_zeros(scales.numel() // shape[1], shape[1]), shape
    blocks = -(-most * row // BLOCK)
    return scales.new_zeros(1, blocks), torch.Size([shards, blocks])


def _as_sharded(parameter: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )


def _imported() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"optimizer: this one needs bitsandbytes: pip install 'ditty_di[bnb]' (or use "
            f"optimizer=adamw_8bit, which does not): {error}"
        ) from error
    return bitsandbytes
