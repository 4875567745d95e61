"""Plan one pipeline stage, or a whole model, as one rank trains it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

import ditty_di.compat  # noqa: F401
from ditty_di.batch import Batch, Context
from ditty_di.models.weights import materialize
from ditty_di.optim.container import Optimizers, trainable_parameters
from ditty_di.parallelize.data_parallel import repeated_blocks
from ditty_di.parallelize.pipeline import ModelParts
from ditty_di.planning.device import Device
from ditty_di.planning.fakes import Attention, WithoutValues, fake_tensors
from ditty_di.planning.layers import Counts, count_all, kinds
from ditty_di.planning.meter import DATA_PARALLEL, Meter, in_backward, nbytes
from ditty_di.planning.recipe import Stage
from ditty_di.processors import Processors
from ditty_di.protocols import Loss, OptimizerFactory
from ditty_di.runtime import Runtime
from ditty_di.training.gradients import LossParameters
from ditty_di.training.step import TrainStep

#: Shape and dtype of a tensor.
Shape = tuple[torch.Size, torch.dtype]
#: Kinds of memory that a micro-batch keeps until its backward pass.
OF_A_MICRO_BATCH = ("inputs", "activations", "head and loss")
#: Parts of a step that are run, and their names on the page; earlier micro-batches are alike.
WHEN = {"first": "the first micro-batch", "last": "the last micro-batch", "update": "the update"}
#: Mesh dimensions whose groups are named in a plan.
MESHES = ("tp", "cp", "ep", "pp", *DATA_PARALLEL)


@dataclass(frozen=True)
class Step:
    """Counts of a stage over the micro-batches of a step.

    Args:
        exact: bytes of `parameters`, `buffers`, `gradients`, `optimizer`, and of what all ranks
            together write of a `checkpoint`.
        counts: by `"batch"` for all micro-batches or `"update"`, and the keys of `Meter.counts`.
        moments: bytes by kind, without the optimizer's state, by `(when, moment)` (`WHEN`).
        held: bytes of one micro-batch between its forward and its backward pass.
        output: shapes and dtypes of what the stage gives the next one.
        linear: whether the counts are linear in the blocks.
    """

    exact: Counter[str]
    counts: Counts
    moments: dict[tuple[str, str], Counter[str]]
    held: float
    output: list[Shape]
    linear: bool

    @property
    def kept(self) -> Counter[str]:
        """Bytes by kind that stay while another stage of the rank runs."""
        kinds = ("parameters", "buffers", "gradients", "gathered parameters")
        return Counter({k: max(live[k] for live in self.moments.values()) for k in kinds})


@dataclass(eq=False)
class StageRunner:
    """Run one stage of a training on tensors without values.

    Args:
        stage: the stage.
        optimizer: called with the named trainable parameters.
        loss_fn: the loss.
        processors: run around the model.
        runtime: layout.
        device: estimates times.
        micro_batches: of a step.
        saves_frozen: whether a checkpoint has frozen parameters, too.
    """

    stage: Stage
    optimizer: OptimizerFactory
    loss_fn: Loss
    processors: Processors
    runtime: Runtime
    device: Device
    micro_batches: int
    saves_frozen: bool
    output: list[Shape] = field(init=False, default_factory=list)

    def run(self, batch: Batch, received: list[Shape]) -> Step:
        """Return what a step with all blocks counts.

        Args:
            batch: a micro-batch on the CPU, after the preprocessors.
            received: the previous stage's output, which is the model's input.
        """
        of_kind = kinds(self.stage.module, self._treatment())
        run = partial(self._count, batch, received)
        found, linear = count_all(self.stage.module, of_kind, run)
        exact: Counter[str] = Counter()
        counts: Counts = Counter()
        moments: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for (what, which, *key), n in found.items():
            if what == "exact":
                exact[which] = n
            elif what == "count":
                times = self.micro_batches - 1 if which == "first" else 1
                counts["update" if which == "update" else "batch", *key] += times * n
            elif what == "moment":
                block, name, kind = key
                where = name if block is None else f"block {block}, {name}"
                moments[which, where][kind] += n
        return Step(exact, counts, dict(moments), found["held", ""], self.output, linear)

    def _treatment(self) -> dict[int, int]:
        """Return the optimizer's group of each parameter of the whole stage, by `id`."""
        module = self.stage.module
        of_loss = LossParameters(self.loss_fn, [module], self.runtime).named
        named = trainable_parameters([module], of_loss)
        with fake_tensors(), WithoutValues():
            made = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for _, p in named}
            optimizer = self.optimizer([(name, made[id(p)]) for name, p in named])
        groups = enumerate(optimizer.param_groups)
        number = {id(p): n for n, group in groups for p in group["params"]}
        return {own: number.get(id(p), -1) for own, p in made.items()}

    def _count(
        self, batch: Batch, received: list[Shape], module: nn.Module, blocks: list[int]
    ) -> Counts:
        """Count the first and the last micro-batch of a step, and the update."""
        module = self.stage.parallel(module, self.runtime)
        found: Counts = Counter()
        meter = Meter(self.device, groups(self.runtime))

        @contextmanager
        def counted(which: str, moment: str) -> Iterator[None]:
            meter.counts, meter.moments = Counter(), {}
            meter.enter((None, moment))
            with meter:
                yield
            found.update({("count", which, *key): n for key, n in meter.counts.items()})
            for where, live in meter.moments.items():
                found.update({("moment", which, *where, kind): n for kind, n in live.items()})

        with fake_tensors() as fake, Attention(self.device.grouped_attention):
            materialize(module, torch.device("cpu"))
            module.train()
            meter.track(list(module.parameters()), "parameters")
            meter.track(list(module.buffers()), "buffers")
            _mark(module, blocks, meter)
            with WithoutValues():
                of_loss = LossParameters(self.loss_fn, [module], self.runtime)
                optimizers = Optimizers(self.optimizer, [module], of_loss.named)
                step = self._train_step(module, optimizers.optimizer, of_loss)
            for which in ("first", "last") if self.micro_batches > 1 else ("last",):
                if self.micro_batches > 1:
                    self._synchronize(step.parts, which == "last")
                given = self._given(fake, batch, step, received)
                meter.track((given.inputs, given.labels), "inputs")
                with counted(which, "before the blocks" if blocks else "the model"):
                    self._forward_backward(step, given, meter)
                meter.rename("temporary", "gradients")
            del given
            with WithoutValues():
                step.clip_gradients()
                optimizers.step()  # makes the state
            exact = self._exact(module, step.optimizer)
            with counted("update", ""), meter.compiling():
                step.clip_gradients()
                optimizers.step()
        found.update({("exact", kind): n for kind, n in exact.items()})
        found["held", ""] = sum(meter.held[kind] for kind in OF_A_MICRO_BATCH)
        return found

    def _train_step(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, of_loss: LossParameters
    ) -> TrainStep:
        for group in optimizer.param_groups:
            # As torch chooses on an accelerator, where that is left to it.
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True
        return TrainStep(
            parts=_Parts([module], self.stage),
            loss_fn=self.loss_fn,
            optimizer=optimizer,
            runtime=self.runtime,
            processors=self.processors,
            loss_parameters=of_loss,
        )

    def _exact(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = {id(p): p for p in (*module.parameters(), *trained)}.values()
        state = [x for own in optimizer.state.values() for x in own.values() if torch.is_tensor(x)]
        saved = [*(p for p in parameters if self.saves_frozen or p.requires_grad), *state]
        return {
            "parameters": sum(map(nbytes, parameters)),
            "buffers": sum(map(nbytes, {id(b): b for b in module.buffers()}.values())),
            "gradients": sum(nbytes(p.grad) for p in trained if p.grad is not None),
            "optimizer": sum(map(nbytes, state)),
            "checkpoint": sum(map(whole_bytes, saved)),
        }

    def _given(
        self, fake: FakeTensorMode, batch: Batch, step: TrainStep, received: list[Shape]
    ) -> Batch:
        """Return a batch of fake tensors, as this rank and stage get it."""

        def convert(value: Any) -> Any:
            return fake.from_tensor(value) if isinstance(value, Tensor) else value

        inputs, context = tree_map(convert, batch.inputs), tree_map(convert, dict(batch.context))
        given = Batch(inputs, tree_map(convert, batch.labels), Context(context))
        given = step.own_part(given)
        if not self.stage.first:
            shape, dtype = received[0]
            given.inputs["input"] = torch.empty(shape, dtype=dtype, requires_grad=True)
        return given

    def _synchronize(self, parts: ModelParts, last: bool) -> None:
        """Reduce gradients in the last micro-batch only; schedules keep parameters until then."""
        parts.set_requires_gradient_sync(last)
        (module,) = parts.modules
        if isinstance(module, FSDPModule) and self.runtime.parallel_dims.pp_enabled:
            module.set_is_last_backward(last)
            module.set_reshard_after_backward(last)

    def _forward_backward(self, step: TrainStep, batch: Batch, meter: Meter) -> None:
        if self.stage.last:
            step.forward_backward([batch], self.loss_fn.num_valid(batch).float())
            return
        output = [x for x in tree_leaves(step.parts.forward(batch.inputs)) if isinstance(x, Tensor)]
        self.output = [(x.shape, x.dtype) for x in output]
        gradients = [torch.empty_like(x) for x in output if x.requires_grad]
        torch.autograd.backward([x for x in output if x.requires_grad], gradients)
        dims = self.runtime.parallel_dims
        ranks, size = [0, dims.world_size // dims.pp], sum(map(nbytes, output))
        for way in ("forward", "backward"):  # to the next stage, and the gradients back
            meter.send("send", size, ranks, "pp", way)


class _Parts(ModelParts):
    """One stage, whose output is the model's where it is the last."""

    def __init__(self, modules: list[nn.Module], stage: Stage) -> None:
        super().__init__(modules)
        self.stage = stage

    def forward(self, inputs: dict[str, Any]) -> Any:
        returned = super().forward(inputs)
        return self.stage.output(self.modules[0], returned) if self.stage.last else returned


def _mark(module: nn.Module, positions: list[int], meter: Meter) -> None:
    """Let the meter know when a block begins, forward and backward, and when all have run."""
    blocks = [b for b in repeated_blocks(module).children() if any(True for _ in b.parameters())]

    def mark(position: int, block: nn.Module) -> None:
        def before(*ignored: Any) -> None:
            if not in_backward():  # recomputing
                meter.enter((position, "forward"))

        def after(block: nn.Module, args: Any, output: Any) -> None:
            if in_backward():
                return
            if position == positions[-1]:
                meter.enter((None, "after the blocks"), "head and loss")
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: meter.enter((position, "backward")))
                    break

        block.register_forward_pre_hook(before, prepend=True)
        block.register_forward_hook(after)

    for position, block in zip(positions, blocks, strict=True):
        mark(position, block)


def whole_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor over all ranks."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return nbytes(local) * tensor.numel() // max(local.numel(), 1)


def groups(runtime: Runtime) -> dict[Any, list[str]]:
    """Return the names of the process groups of a layout, by group name and by ranks."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name in MESHES:
        try:
            mesh = runtime.parallel_dims.get_optional_mesh(name)
        except ValueError:  # no such dimension for this backend
            continue
        if mesh is not None and mesh.ndim == 1:
            group = mesh.get_group()
            for key in (group.group_name, tuple(dist.get_process_group_ranks(group))):
                found[key].append(name)
    return found
