"""The way of a batch to the model, and of the model's output to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ditty_di.contracts.check import Report, examine
from ditty_di.contracts.grammar import Contract
from ditty_di.contracts.render import drawn
from ditty_di.contracts.runtime import BatchChecks, TensorChecks
from ditty_di.contracts.stages import POST, PRE, Stage, pipeline
from ditty_di.processors.context import Context

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ditty_di.processors.base import PostProcessor, PreProcessor
    from ditty_di.protocols import Batch, Loss, Stateful

NO_PAIR = """\
{name}.process returned {found}; it must return (batch, ctx), and a preprocessor may return None \
to reject the batch"""

NO_KWARGS = """\
the preprocessors left forward_kwargs={found} in the context; it must be a mapping of the model's \
other arguments, without "input", which is the batch. Return the context that process was given"""
WEIGHT_CHANGED = """\
a postprocessor has changed what the batch weighs in the loss, from {before} to {now}: that is \
counted before the model runs, over the whole window, so let a preprocessor write the target, its \
labels to ignore and its mask"""
SPLIT_SEQUENCES = """\
with runtime.cp > 1 each rank has a part of every sequence, and what processors make of a whole \
batch cannot be split; use cp=1"""


class Processors:
    """Pre- and postprocessors in their order.

    Without any it is false, and `prepare` and `finish` return what they are given; otherwise a
    `Context` takes the place of the batch's labels.
    """

    def __init__(
        self,
        preprocessors: Sequence[PreProcessor] = (),
        postprocessors: Sequence[PostProcessor] = (),
    ) -> None:
        self.preprocessors = _several("preprocessors", preprocessors)
        self.postprocessors = _several("postprocessors", postprocessors)
        self._active = bool(self.preprocessors or self.postprocessors)
        self._checks: TensorChecks | None = None

    def __bool__(self) -> bool:
        return self._active

    def __repr__(self) -> str:
        return f"Processors({list(self.preprocessors)!r}, {list(self.postprocessors)!r})"

    # ---------------------------------------------------------------------------------- running
    def prepare(
        self,
        batch: Batch,
        *,
        epoch: int,
        step: int,
        total_steps: int,
        device: torch.device,
        model: Any,
    ) -> Any:
        """The loader's batch as `(inputs, ctx)` on the device; None when a preprocessor rejects it.

        Raises:
            TypeError: a processor returned something else than `(batch, ctx)`.
            ContractError: a tensor is not what a contract says, where tensors are checked.
        """
        if not self._active:
            return batch
        inputs = {name: _moved(value, device) for name, value in batch[0].items()}
        target = _moved(batch[1], device)
        ctx = Context(
            original_batch=(inputs, target),
            target=target,
            forward_kwargs={name: value for name, value in inputs.items() if name != "input"},
            epoch=epoch,
            step=step,
            total_steps=total_steps,
            device=device,
            model=model,
        )
        checks, on = self._checks, None
        if checks is not None and (on := checks.begin()) is not None:
            on.gives(checks.loader, inputs["input"], ctx)
        stages = checks.preprocessors if checks else ()
        result = _run(self.preprocessors, stages, inputs["input"], ctx, on)
        if result is None:
            return None
        value, ctx = result
        kwargs = ctx.get("forward_kwargs")
        if not isinstance(kwargs, Mapping) or "input" in kwargs:
            raise TypeError(NO_KWARGS.format(found=f"{kwargs!r:.80}"))
        if checks is not None and on is not None:
            on.takes(checks.model, value, ctx)
            ctx.checks, checks.done = on, True
        return {"input": value, **kwargs}, ctx

    def finish(self, output: Any, ctx: Any) -> Any:
        """The model's output as the loss gets it; postprocessors may have written into `ctx`.

        Raises:
            TypeError, ContractError: as in `prepare`.
        """
        if not self._active:
            return output
        checks, on = self._checks, ctx.checks
        if checks is not None and on is not None:
            on.gives(checks.model, output, ctx)
        stages = checks.postprocessors if checks else ()
        result = _run(self.postprocessors, stages, output, ctx, on)
        if result is None:
            name = type(self).__name__
            raise TypeError(f"{name}: a postprocessor returned None; only a batch can be rejected")
        output, given = result
        if given is not ctx:  # the caller hands its own context to the loss
            written = dict(given)
            ctx.clear()
            ctx.update(written)
        if checks is not None and on is not None:
            on.takes(checks.loss, output, ctx)
            ctx.checks = None
        return output

    def states(self) -> dict[str, Stateful]:
        """What a checkpoint holds of those that have a state, as `preprocessor_<name>` or
        `postprocessor_<name>` (of equal names the second has `_2`); on all ranks it is the same."""
        found: dict[str, Any] = {}
        for kind, several in ((PRE, self.preprocessors), (POST, self.postprocessors)):
            for processor in several:
                if not (hasattr(processor, "state_dict") and hasattr(processor, "load_state_dict")):
                    continue
                key, n = f"{kind}_{processor.name}", 1
                while (name := key if n == 1 else f"{key}_{n}") in found:
                    n += 1
                if processor.state_dict():
                    found[name] = processor
        return found

    def before(self, loss_fn: Loss) -> Loss:
        """The loss as the trainer calls it: it takes what the postprocessors leave."""
        return _Finished(self, loss_fn) if self._active else loss_fn

    # --------------------------------------------------------------------------------- contracts
    def stages(
        self,
        *,
        loader: Any = None,
        model: Any = None,
        loss: Any = None,
        model_contract: str | Contract | None = None,
    ) -> list[Stage]:
        """The whole pipeline; see `ditty_di.contracts.stages.pipeline`."""
        return pipeline(
            loader=loader,
            preprocessors=self.preprocessors,
            model=model,
            model_contract=model_contract,
            postprocessors=self.postprocessors,
            loss=loss,
        )

    def validate(self, *, strict: bool = False, **around: Any) -> Report:
        """What the contracts tell; `around` as in `stages`.

        Raises:
            ContractError: all that does not fit, at once; `strict`, what no contract proves too.
        """
        report = examine(self.stages(**around))
        report.verify(strict=strict)
        return report

    def picture(self, **around: Any) -> str:
        """The pipeline as text, problems marked; `around` as in `stages`."""
        return drawn(examine(self.stages(**around)))

    def check_tensors(self, *, every: bool = False, **around: Any) -> None:
        """Compares tensors with contracts from now on: of one batch, or of `every` one.

        `prepare` and `finish` then have to be called also where there is no processor.
        """
        self._checks = TensorChecks(self.stages(**around), every=every)
        self._active = True


def _several(slot: str, processors: Any) -> tuple[Any, ...]:
    """Raises TypeError for what is no sequence of processors."""
    if hasattr(processors, "process") or not isinstance(processors, Iterable):
        raise TypeError(f"{slot}: it must be a list of processors; got {processors!r:.80}")
    found = tuple(processors)
    for n, processor in enumerate(found):
        if isinstance(processor, type) or not hasattr(processor, "process"):
            raise TypeError(
                f"{slot}.{n}: {processor!r:.80} is no processor; give an object of a class that "
                f"inherits from ditty_di.processors.PreProcessor or PostProcessor"
            )
    return found


class _Finished:
    """A loss behind postprocessors.

    One that says `takes_context` gets the context, any other the target in it as its labels.
    """

    def __init__(self, processors: Processors, loss_fn: Loss) -> None:
        self._processors, self._loss_fn = processors, loss_fn
        self._takes_context = getattr(loss_fn, "takes_context", False)

    def count(self, batch: Batch, /) -> Tensor:
        inputs, ctx = batch
        assert isinstance(ctx, Context)
        count = self._loss_fn.count((inputs, self._labels(ctx)))
        ctx.counted = inputs, count
        return count

    def __call__(
        self, output: Any, ctx: Any, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        had = [*ctx.items()] if self._processors.postprocessors else []
        before = [(key, value, _version(value)) for key, value in had]
        output = self._processors.finish(output, ctx)
        changed = any(ctx.get(k) is not v or _version(v) != version for k, v, version in before)
        # What is new could not be counted. A second count waits for the device, so it is for those
        # alone who have changed something.
        if changed and ctx.counted is not None:
            inputs, count = ctx.counted
            now = self._loss_fn.count((inputs, self._labels(ctx)))
            if not count.equal(now):
                raise ValueError(WEIGHT_CHANGED.format(before=count.tolist(), now=now.tolist()))
        return self._loss_fn(output, self._labels(ctx), global_count)

    def _labels(self, ctx: Any) -> Any:
        return ctx if self._takes_context else ctx["target"]


def _run(
    processors: Sequence[Any],
    stages: Sequence[Stage],
    value: Any,
    ctx: Context,
    on: BatchChecks | None,
) -> tuple[Any, Context] | None:
    """One after the other; None when one of them rejects what it is given."""
    for n, processor in enumerate(processors):
        if on is not None:
            on.takes(stages[n], value, ctx)
        try:
            result = processor.process(value, ctx)
        except Exception as error:
            error.add_note(f"in {processor.name}.process")
            raise
        if result is None:
            return None
        if type(result) is not tuple or len(result) != 2:
            found = f"{len(result)} values" if type(result) is tuple else type(result).__name__
            raise TypeError(NO_PAIR.format(name=processor.name, found=found))
        value, ctx = result
        if value is None:
            return None
        if type(ctx) is not Context:
            ctx = Context(ctx)
        if on is not None:
            on.gives(stages[n], value, ctx)
    return value, ctx


def _version(value: Any) -> int:
    """How often a tensor was changed in place."""
    return value._version if hasattr(type(value), "_version") else 0  # type: ignore[no-any-return]


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor on the device, and anything else as it is."""
    return value.to(device, non_blocking=True) if hasattr(value, "layout") else value
