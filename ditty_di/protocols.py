"""What each slot of the trainer must be callable with, and nothing else.

A *factory* slot receives a partial (YAML: `_partial_: true`; Python: `functools.partial` or any
function) that the trainer completes with exactly the arguments written here: positional where the
protocol says positional (`/`), by keyword where it says keyword (`*`). `Graph.check` reads these
signatures too, so a typo inside a partial is found before anything is built.

Any target may find its own mistakes early, before anything is built, by two static methods (of a
class) or attributes (of a function: see `early_checks`):

`validate(*, steps=None, config=None)`: keyword-only parameters named like those of the constructor,
each with a default that means "not known" (or not given). `Graph.check`, and so `task=check` and
each start, calls it with the arguments that are known without building: scalars, lists and dicts
with references resolved, plain defaults of the signature, and `ditty_di.config.View`s of nodes
(`.target` the callable, `.arguments` its known arguments). It raises ValueError; a message that
begins with `name=` or `name: ` is reported at the file and line that set that argument
(`config.r=0` at a value in it), several such lines each at its own. The constructor calls the same
function, so that plain Python gets the same message. A class that has a method `validate` already
names it `validate_arguments`.

`rehearse(build) -> list[str]`: called by `task=check` once all static checks have passed.
`build("name")` gives the argument `name` of that node, built through the graph (shared objects
once, defaults of the signature included); `build("loader.collate_fn")` builds that part of an
argument alone, None where it is not written. It does a cheap, early part of what the constructor or
the training would do, raises ValueError for what would fail (messages as above) and returns
warnings. It must not build what touches an accelerator or the process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torchtitan.distributed import ParallelDims

    from ditty_di.runtime import Runtime

    #: One micro-batch: the model's inputs, and the labels.
    #:
    #: `inputs["input"]` is the model's first positional argument (`[batch, seq]` token ids for a
    #: language model); every other entry goes to `forward` under its own name.
    Batch = tuple[dict[str, Tensor], Tensor]


_F = TypeVar("_F", bound=Callable[..., Any])


def early_checks(
    *,
    validate: Callable[..., None] | None = None,
    rehearse: Callable[[Callable[[str], Any]], list[str]] | None = None,
) -> Callable[[_F], _F]:
    """Give a function that is used as a target its `validate` and `rehearse`."""

    def attach(function: _F) -> _F:
        given = {"validate": validate, "rehearse": rehearse}
        vars(function).update({name: check for name, check in given.items() if check is not None})
        return function

    return attach


class Stateful(Protocol):
    """Something a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class DataLoader(Protocol):
    """Yields this rank's micro-batches. `batch_size` is in rows a micro-batch, per rank.

    A loader that belongs to one of several data-parallel ranks also has `dp_rank` and
    `dp_world_size`; one that can be resumed also has `state_dict` and `load_state_dict`.
    """

    batch_size: int

    def __iter__(self) -> Iterator[Batch]: ...


class DataLoaderFactory(Protocol):
    def __call__(self, *, dp_rank: int, dp_world_size: int) -> DataLoader: ...


class Loss(Protocol):
    """A loss that knows, from the batch alone, how much it will weigh.

    `count(batch)` is a tensor on the CPU, shape `[]` (or `[parts]` for a composite): valid tokens,
    elements, ... The trainer sums it over the whole window (accumulation and data-parallel ranks)
    before any backward pass and hands the sum back as `global_count`; the loss returns its *sum*
    divided by `global_count`, so that N micro-batches equal one and many ranks equal one.
    """

    def count(self, batch: Batch, /) -> Tensor: ...

    def __call__(
        self, output: Any, labels: Tensor, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class LossFunction(Protocol):
    """Any other loss: returns a mean over the rows of a micro-batch (`ditty_di.losses.PlainLoss`).

    The trainer counts rows, or what the attributes `ignore_index` and `reduction` tell.
    """

    def __call__(self, output: Any, labels: Any, /) -> Tensor: ...


class OptimizerFactory(Protocol):
    """Receives every trainable parameter of every model part, with its fully qualified name."""

    def __call__(
        self, named_parameters: list[tuple[str, nn.Parameter]], /
    ) -> torch.optim.Optimizer: ...


class SchedulerFactory(Protocol):
    def __call__(self, optimizer: torch.optim.Optimizer, /) -> LRScheduler: ...


class ModelTransform(Protocol):
    """Changes a model before it is parallelised: quantises, adds adapters, converts layers.

    The model is on meta, or has its values; what comes back is the same module or one around it.
    """

    def __call__(self, model: nn.Module, /) -> nn.Module: ...


class ParallelizeFn(Protocol):
    """Shards, wraps, compiles: returns the module to train (usually the same one)."""

    def __call__(self, model: nn.Module, /, *, parallel_dims: ParallelDims) -> nn.Module: ...


class PipelineFn(Protocol):
    """Splits the model into stages: `(schedule, model_parts, has_first_stage, has_last_stage)`.

    The schedule runs a window's micro-batches (as many as gradient accumulation steps) and must
    not scale gradients by their number (`scale_grads=False`): `loss_fn` has divided already.
    """

    def __call__(
        self,
        model: nn.Module,
        /,
        *,
        parallel_dims: ParallelDims,
        device: torch.device,
        loss_fn: Callable[..., Tensor],
        parallelize_fn: Callable[..., nn.Module],
    ) -> tuple[Any, list[nn.Module], bool, bool]: ...


class WeightsFn(Protocol):
    """Fills a parallelised model in place, on any layout, with the same values.

    The parameters are already on `device` and uninitialised. One that also has
    `identity() -> dict[str, Any]` (which base it reads: path, revision, hash) can fill the same
    frozen parameters again, so checkpoints leave them out.
    """

    def __call__(self, model: nn.Module, /, *, device: torch.device) -> None: ...


class MissingWeightsFn(Protocol):
    """Gives values to parameters that a pretrained base does not have, such as adapters.

    `names` are fully qualified in `model`, whose other parameters have their values by then.
    """

    def __call__(self, model: nn.Module, names: list[str], /, *, device: torch.device) -> None: ...


class Validator(Protocol):
    def should_validate(self, step: int) -> bool:
        """Also asked for step 0, before the first."""
        ...

    def report(self) -> str:
        """What to tell when training has ended; may be empty."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the held-out data, the same on every rank: `"loss"` and any others.

        Empty when a stop was requested meanwhile.
        """
        ...


class ValidatorFactory(Protocol):
    """`forward(inputs)` runs the model as the training step does, on the runtime's device.

    `prepare(batch)` is what preprocessors make of the loader's batch, or None; `loss_fn` takes the
    model's output through the postprocessors.
    """

    def __call__(
        self,
        *,
        model_parts: list[nn.Module],
        forward: Callable[[dict[str, Tensor]], Any],
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None],
    ) -> Validator: ...


class Checkpointer(Protocol):
    def load(self) -> int | None:
        """Restores the newest whole checkpoint; its step, or None when there is none."""
        ...

    def save(self, step: int, *, force: bool = False) -> bool:
        """Saves when `step` is due, or `force`; True when a checkpoint was started."""
        ...

    def maybe_wait_for_staging(self) -> None:
        """Called before every update: returns once parameters may change under a save."""
        ...

    def close(self) -> None:
        """Waits for what is being written; raises what went wrong in the background."""
        ...


class CheckpointerFactory(Protocol):
    """`states` are one logical object over all ranks (sharded or replicated); `rank_states` are
    each rank's own (random number generators)."""

    def __call__(
        self, *, states: dict[str, Stateful], rank_states: dict[str, Stateful]
    ) -> Checkpointer: ...


class Metrics(Protocol):
    """Collects and writes. `ntokens_since_last_log` and `data_loading_times` are filled by the
    batch generator that the trainer inherits from torchtitan."""

    ntokens_since_last_log: int
    data_loading_times: list[float]

    def start(
        self, *, model_parts: list[nn.Module], total_steps: int, runtime: Runtime, step: int
    ) -> None:
        """Called once, after the weights are in place and a checkpoint of `step` was loaded."""
        ...

    def should_log(self, step: int) -> bool: ...

    def pause(self) -> AbstractContextManager[None]:
        """Time within it (validation, saving) is not training time."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def summary(self) -> dict[str, float]:
        """What a run is judged by when it ends: tokens_per_second, peak_memory_gib, ..."""
        ...

    def close(self) -> None: ...


#: What a callback has (`ditty_di.callbacks.Callback`): the moments at which it is called, in their
#: order, and what it has to tell at the end.
CALLBACK_METHODS = (
    *("train_start", "step_end", "validation_end", "checkpoint_saved", "train_end"),
    "report",
)


class Training(Protocol):
    """What a callback may use of the trainer that calls it."""

    step: int
    objective: float | None
    """The last validation loss, or without a validator the last training loss."""
    device: torch.device
    runtime: Runtime
    model_parts: list[nn.Module]
    validator: Validator | None
    metrics_processor: Metrics

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """The model's output for one micro-batch of inputs, moved to the device."""
        ...

    def stop(self, reason: str) -> None:
        """Ends the training after this step, as if it had been the last; called on all ranks."""
        ...


class ProfilerFactory(Protocol):
    """A context manager whose value has `step()`; `torchtitan.tools.profiler.Profiler` is one."""

    def __call__(self, *, global_step: int) -> Any: ...


class GraphTask(Protocol):
    """A root node that is a partial works on the configuration itself, in the parent process."""

    def __call__(self, graph: Any, /) -> None: ...
