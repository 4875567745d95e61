"""The signatures of the trainer's slots.

A *factory* slot receives a partial (YAML: `_partial_: true`; Python: `functools.partial` or any
function) that the trainer completes with exactly the arguments written here: positional where the
protocol says positional (`/`), by keyword where it says keyword (`*`). `Graph.check` reads these
signatures too, so a typo inside a partial is found before anything is built.

Any target may find its own mistakes before anything is built, by two static methods (of a class) or
attributes (of a function: see `early_checks`):

`validate(*, max_steps=None, config=None)`: keyword-only parameters named like those of the
constructor, each with a default that means "not known" (or not given). `Graph.check`, and so
`task=check` and each start, calls it with the arguments that are known without building: scalars,
lists and dicts with references resolved, plain defaults of the signature, and
`ditty_di.config.View`s of nodes (`.target` the callable, `.arguments` its known arguments). It
raises ValueError; a message that begins with `name=` or `name: ` is reported at the file and line
that set that argument (`config.r=0` at a value in it), several such lines each at its own. The
constructor calls the same function, so that plain Python gets the same message. A class that has a
method `validate` already names it `validate_arguments`.

`rehearse(build) -> list[str]`: called by `task=check` once all static checks have passed.
`build("name")` returns the argument `name` of that node, built through the graph (shared objects
once, defaults of the signature included); `build("loader.collate_fn")` builds that part of an
argument alone, None where it is not written. It does a cheap, early part of what the constructor or
the training would do, raises ValueError for what would fail (messages as above) and returns
warnings. It must not build what touches an accelerator or the process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

# The command line imports this module and must start without torch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from torchtitan.distributed import ParallelDims

    from ditty_di.batch import Batch
    from ditty_di.runtime import Runtime


#: What a loader yields: the model's inputs, and the labels. `inputs["input"]` is the model's first
#: positional argument (`[batch, seq]` token ids for a language model); every other entry is passed
#: to `forward` by name. The trainer makes a `ditty_di.batch.Batch` of it.
LoadedBatch = tuple[dict[str, Any], Any]

_F = TypeVar("_F", bound=Callable[..., Any])


def early_checks(
    *,
    validate: Callable[..., None] | None = None,
    rehearse: Callable[[Callable[[str], Any]], list[str]] | None = None,
    fits: Sequence[Callable[..., list[str]]] | None = None,
) -> Callable[[_F], _F]:
    """Return a decorator that gives a function used as a target its early checks.

    Args:
        validate: checks arguments that are known without building.
        rehearse: tries a cheap part of the work.
        fits: rules of a function that parallelizes, as a loss may have too
            (`ditty_di.parallelize.fits`).
    """

    def attach(function: _F) -> _F:
        given = {"validate": validate, "rehearse": rehearse, "fits": fits}
        vars(function).update({name: check for name, check in given.items() if check is not None})
        return function

    return attach


class Stateful(Protocol):
    """An object that a checkpoint saves."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class DataLoader(Protocol):
    """Yields this rank's micro-batches.

    A loader for one of several data-parallel ranks also has `dp_rank` and `dp_world_size`; one that
    can be resumed also has `state_dict` and `load_state_dict`.
    """

    batch_size: int
    """Rows per micro-batch and rank."""

    def __iter__(self) -> Iterator[LoadedBatch | Batch]:
        """Yield the micro-batches."""


class DataLoaderFactory(Protocol):
    """Make the loader of one data-parallel rank."""

    def __call__(self, *, dp_rank: int, dp_world_size: int) -> DataLoader:
        """Return the loader of this data-parallel rank."""


class Loss(Protocol):
    """A sum over valid elements (tokens, elements, rows), divided by their global number.

    `num_valid(batch)` counts the valid elements of a batch before the model runs, as a tensor of
    shape `[]` (or `[parts]` for a composite). The trainer sums it over all micro-batches and
    data-parallel ranks of an optimizer step and passes the sum to the call, which returns the loss
    and metrics, shapes `[]`. So N micro-batches equal one, and many ranks equal one. A base class
    is `ditty_di.losses.Loss`.
    """

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of valid elements in a batch."""

    def __call__(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's part of the loss and of each metric."""


class LossFunction(Protocol):
    """Any other loss: returns a mean over the rows of a micro-batch (`ditty_di.losses.PlainLoss`).

    The trainer counts rows, or what its attributes `ignore_index` and `reduction` say.
    """

    def __call__(self, output: Any, labels: Any, /) -> Tensor:
        """Return the mean over the rows, shape `[]`."""


class OptimizerFactory(Protocol):
    """Make the optimizer of all trainable parameters, given with fully qualified names."""

    def __call__(
        self, named_parameters: list[tuple[str, nn.Parameter]], /
    ) -> torch.optim.Optimizer:
        """Return the optimizer."""


class SchedulerFactory(Protocol):
    """Make the learning-rate scheduler of an optimizer."""

    def __call__(self, optimizer: torch.optim.Optimizer, /) -> LRScheduler:
        """Return the scheduler."""


class GradScalerFactory(Protocol):
    """Make the gradient scaler for a device type, such as `cuda`."""

    def __call__(self, *, device: str) -> torch.amp.GradScaler:
        """Return the scaler."""


class ModelTransform(Protocol):
    """Change a model before it is parallelized: quantize, add adapters, convert layers.

    The model is on meta, or has its values. The same module or one around it is returned.
    """

    def __call__(self, model: nn.Module, /) -> nn.Module:
        """Return the changed model."""


class ParallelizeFn(Protocol):
    """Shard, wrap or compile; return the module to train (usually the same one)."""

    def __call__(self, model: nn.Module, /, *, parallel_dims: ParallelDims) -> nn.Module:
        """Return the module to train."""


class PipelineFn(Protocol):
    """Split the model into stages: `(schedule, model_parts, has_first_stage, has_last_stage)`.

    The schedule is one of torch's, or an object with the methods of
    `ditty_di.parallelize.schedule.StageSchedule`. One of torch's runs as many micro-batches as
    gradient accumulation steps and must not scale gradients by their number (`scale_grads=False`):
    `loss_fn` has divided already.
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
    ) -> tuple[Any, list[nn.Module], bool, bool]:
        """Return the schedule and the stages of this rank."""


class WeightsFn(Protocol):
    """Fill a parallelized model in place, with the same values on any layout.

    The parameters are on `device` and uninitialized. A function that also has
    `identity() -> dict[str, Any]` (which base it reads: path, revision, hash) can fill the same
    frozen parameters again, so checkpoints leave them out.
    """

    def __call__(self, model: nn.Module, /, *, device: torch.device) -> None:
        """Fill the model."""


class MissingWeightsFn(Protocol):
    """Initialize parameters that a pretrained base does not have, such as adapters.

    `names` are fully qualified in `model`, whose other parameters already have their values.
    """

    def __call__(self, model: nn.Module, names: list[str], /, *, device: torch.device) -> None:
        """Fill the named parameters."""


class Validator(Protocol):
    """Computes metrics on held-out data."""

    def should_validate(self, step: int) -> bool:
        """Return whether to validate after a step; step 0 is before training starts."""

    def report(self) -> str:
        """Return text for the end of the training; may be empty."""

    def validate(self, step: int) -> dict[str, float]:
        """Return `"loss"` and any other metrics, the same on every rank.

        Empty when a stop was requested meanwhile.
        """


class Evaluate(Protocol):
    """Compute the loss of batches without a backward pass, on any layout."""

    def __call__(
        self, loss_fn: Loss, batches: Iterable[Batch], num_valid_global: Tensor, /
    ) -> Iterator[dict[str, Tensor]]:
        """Yield `loss` and the metrics of each batch, parts of those of `num_valid_global`.

        Batches are prepared and on the runtime's device. Several may be taken before the first
        result. All ranks that share a batch get the same.
        """


class ValidatorFactory(Protocol):
    """Make the validator.

    `prepare(batch)` runs the preprocessors and returns None for a rejected batch; `evaluate`
    returns the losses of prepared batches, and runs the postprocessors.
    """

    def __call__(
        self,
        *,
        model_parts: list[nn.Module],
        evaluate: Evaluate,
        loss_fn: Loss,
        runtime: Runtime,
        prepare: Callable[[Batch], Batch | None],
    ) -> Validator:
        """Return the validator."""


class Checkpointer(Protocol):
    """Saves and loads checkpoints."""

    def load(self) -> int | None:
        """Restore the newest whole checkpoint; return its step, or None when there is none."""

    def save(self, step: int, *, force: bool = False, objective: float | None = None) -> bool:
        """Save when `step` is due, or `force`; return True when a checkpoint was started.

        `objective` is the loss of a validation at this very step, None without one.
        """

    def maybe_wait_for_staging(self) -> None:
        """Return once parameters may change under a save; called before every update."""

    def close(self) -> None:
        """Wait for the checkpoint being written; raise what went wrong in the background."""


class CheckpointerFactory(Protocol):
    """Make the checkpointer.

    `states` are one logical object over all ranks (sharded or replicated); `rank_states` are each
    rank's own (random number generators).
    """

    def __call__(
        self, *, states: dict[str, Stateful], rank_states: dict[str, Stateful]
    ) -> Checkpointer:
        """Return the checkpointer."""


class MetricsProcessor(Protocol):
    """Collects metrics and writes them.

    The trainer's batch generator adds to `ntokens_since_last_log` and `data_loading_times`.
    """

    ntokens_since_last_log: int
    data_loading_times: list[float]

    def start(
        self, *, model_parts: list[nn.Module], max_steps: int, runtime: Runtime, step: int
    ) -> None:
        """Start, once the weights are set and a checkpoint of `step` was loaded."""

    def should_log(self, step: int) -> bool:
        """Return whether the metrics of a step are logged."""

    def pause(self) -> AbstractContextManager[None]:
        """Exclude the time within the context (validation, saving) from training time."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write metrics of a step."""

    def text(self, step: int, name: str, text: str) -> None:
        """Write text of a step."""

    def summary(self) -> dict[str, float]:
        """Return metrics of the whole run: tokens_per_second, peak_memory_gib, ..."""

    def close(self) -> None:
        """Close all loggers."""


#: Methods of a callback (`ditty_di.callbacks.Callback`): the moments at which it is called, in
#: order, and the text for the end.
CALLBACK_METHODS = (
    *("on_train_start", "on_step_end", "on_validation_end", "on_save", "on_train_end"),
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
    optimizer: torch.optim.Optimizer
    validator: Validator | None
    metrics_processor: MetricsProcessor

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """Return the model's output for one micro-batch of inputs."""

    def stop(self, reason: str, status: str = "finished") -> None:
        """End the training after this step, as if it had been the last; call on all ranks."""


class Position(Protocol):
    """A trainer's current optimizer step, and the step and loss of its last validation."""

    step: int
    objective: float | None
    objective_step: int | None
    validator: Any


class SpikePolicy(Stateful, Protocol):
    """Limits loss and gradient norm of a step by those of the steps before it.

    All ranks call it with the same values. A step beyond a limit does not update.
    """

    skipped: int
    """Steps skipped so far."""

    def limits(self) -> tuple[float, float]:
        """Return the largest loss and gradient norm of the next step; infinity is no limit."""

    def may_skip(self) -> bool:
        """Return whether the next spike would be skipped; otherwise `skip` would raise."""

    def skip(self, step: int, values: Mapping[str, float], had: str) -> None:
        """Count a step beyond a limit, which was not updated, or raise FloatingPointError.

        `values` are its `loss` and `grad_norm`, `had` says which rows it was of.
        """

    def observe(self, values: Mapping[str, float]) -> None:
        """Note `loss` and `grad_norm` of a step that was updated."""


class ProfilerFactory(Protocol):
    """Make a context manager with a method `step()`, as `torchtitan.tools.profiler.Profiler`."""

    def __call__(self, *, global_step: int) -> Any:
        """Return the context manager."""
