"""The validation loss of a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# torch is imported when a task runs: the command line must answer without it.
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ditty_di.processors import PostProcessor, PreProcessor
    from ditty_di.protocols import (
        Batch,
        Loss,
        ModelTransform,
        ParallelizeFn,
        ValidatorFactory,
        WeightsFn,
    )
    from ditty_di.runtime import Runtime


def evaluate(
    *,
    model: nn.Module,
    loss_fn: Loss,
    validator: ValidatorFactory | None,
    weights: WeightsFn | None = None,
    convert: ModelTransform | None = None,
    loss_weights: Callable[[Loss], None] | None = None,
    preprocessors: Sequence[PreProcessor] = (),
    postprocessors: Sequence[PostProcessor] = (),
    parallelize_fn: ParallelizeFn | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Validates once, on the same batches and with the same loss as training did.

    Processors see step 0 of 1. `convert` is what the trainer was given. `loss_weights` fills the
    parameters of a loss that has some, as `ditty_di.checkpoint.read.load_loss` does.

    Returns what the validator does, and `objective`, its loss; empty-handed (`status`
    "preempted") when a stop was requested meanwhile.

    Raises:
        ValueError: no validator, as in a run that trained without one.
    """
    if validator is None:
        raise ValueError("evaluate: this run has no validator; add validator=default, or loss_only")
    from ditty_di.assembly import place_model, place_processors, prepare_model, to_device
    from ditty_di.gradients import place_loss
    from ditty_di.isolation import check_rows, isolation_of
    from ditty_di.losses.plain import as_loss
    from ditty_di.processors import Processors
    from ditty_di.runtime import Runtime

    runtime = runtime or Runtime()
    model = prepare_model(model, convert, loss_fn)
    processors = place_processors(
        Processors(preprocessors, postprocessors),
        runtime=runtime,
        contracts="static",
        around={"model": model, "loss": loss_fn},
    )
    loss_fn = as_loss(loss_fn)
    if loss_weights is not None:
        loss_weights(loss_fn)
    loss_fn = processors.before(place_loss(loss_fn, runtime))
    parts = place_model(
        model,
        runtime=runtime,
        loss_fn=loss_fn,
        weights=weights,
        parallelize_fn=parallelize_fn,
        pipeline_fn=None,
    ).modules

    def forward(inputs: dict[str, Tensor]) -> Any:
        inputs = to_device(runtime.device, inputs)
        return parts[0](inputs["input"], **{k: v for k, v in inputs.items() if k != "input"})

    def prepare(batch: Batch) -> Batch | None:
        return processors.prepare(  # type: ignore[no-any-return]
            batch, epoch=0, step=0, total_steps=1, device=runtime.device, model=parts[0]
        )

    made = validator(
        model_parts=parts, forward=forward, loss_fn=loss_fn, runtime=runtime, prepare=prepare
    )
    isolation = isolation_of(
        parts[0],
        config=getattr(model, "config", None),
        forward=forward,
        processors=processors,
        runtime=runtime,
    )
    check_rows(getattr(made, "dataloader", None), isolation=isolation, runtime=runtime)
    runtime.catch_signals()
    try:
        values = made.validate(0)
    finally:
        runtime.release_signals()
    if not values:
        return {"status": "preempted"}
    if runtime.rank == 0:
        for name, value in values.items():
            print(f"{name:24} {value:.6f}")
    return values | {"objective": values["loss"]}
