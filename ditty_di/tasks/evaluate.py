"""The validation loss of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ditty_di.batch import Batch
from ditty_di.isolation import check_rows, copy_of_each_kind, isolation_of
from ditty_di.losses.plain import as_loss
from ditty_di.parallelize.fits import Parts, require_fit
from ditty_di.processors import PostProcessor, PreProcessor, Processors
from ditty_di.protocols import (
    Loss,
    ModelTransform,
    ParallelizeFn,
    PipelineFn,
    ValidatorFactory,
    WeightsFn,
)
from ditty_di.runtime import Runtime
from ditty_di.training.forward import ForwardPass
from ditty_di.training.setup import (
    prepare_model,
    setup_loss,
    setup_model,
    setup_processors,
    weights_of,
)


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
    pipeline_fn: PipelineFn | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Validate once, on the same batches and with the same loss as training.

    Args:
        model: The model, on meta (then `weights` fills it) or with its values.
        loss_fn: The loss.
        validator: Makes the validator, as in training.
        weights: Fills a model on meta, usually from a checkpoint.
        convert: Replaces layers of the model, as in training.
        loss_weights: Fills the parameters of a loss that has some, such as
            `ditty_di.checkpoint.read.load_loss`.
        preprocessors: Run before the model, at step 0 of 1.
        postprocessors: Run after the model, at step 0 of 1.
        parallelize_fn: Parallelizes the model.
        pipeline_fn: Splits the model into pipeline stages, with `runtime.pp > 1`.
        runtime: Device and mesh; None: a new `Runtime`.

    Returns:
        The validator's values, and `objective`, its loss; only `status` ("preempted") when a stop
        was requested meanwhile.

    Raises:
        ValueError: No validator, as in a run that trained without one.
    """
    if validator is None:
        raise ValueError("evaluate: this run has no validator; add validator=default, or loss_only")
    runtime = runtime or Runtime()
    model = prepare_model(model, convert, loss_fn)
    processors = setup_processors(
        Processors(preprocessors, postprocessors),
        runtime=runtime,
        contracts="static",
        around={"model": model, "loss": loss_fn},
    )
    loss_fn = as_loss(loss_fn)
    if loss_weights is not None:
        loss_weights(loss_fn)
    loss_fn = setup_loss(loss_fn, runtime)
    require_fit(Parts(model, loss_fn, parallelize_fn, pipeline_fn), runtime.parallel_dims)
    parts = setup_model(
        model,
        runtime=runtime,
        weights=weights_of(model, weights),
        parallelize_fn=parallelize_fn,
        pipeline_fn=pipeline_fn,
        processors=processors,
    )
    passes = ForwardPass(
        parts=parts,
        loss_fn=loss_fn,
        runtime=runtime,
        processors=processors,
        pp_size=2 * runtime.parallel_dims.pp,
    )

    def prepare(batch: Batch) -> Batch | None:
        return processors.prepare(
            batch, epoch=0, step=0, total_steps=1, device=runtime.device, model=parts.modules[0]
        )

    made = validator(
        model_parts=parts.modules,
        evaluate=passes.evaluate,
        loss_fn=loss_fn,
        runtime=runtime,
        prepare=prepare,
    )
    # No stage can be asked about documents.
    isolation = isolation_of(
        parts.modules[0] if parts.whole is None else copy_of_each_kind(parts.whole),
        config=getattr(model, "config", None),
        forward=passes.run_model if parts.whole is None else None,
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
