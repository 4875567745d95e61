"""Preprocessors between loader and model, postprocessors between model and loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ditty_di.batch import Batch, Context
from ditty_di.contracts.check import Report, examine
from ditty_di.contracts.grammar import Contract
from ditty_di.contracts.render import render
from ditty_di.contracts.runtime import BatchChecks, TensorChecks
from ditty_di.contracts.stages import POST, PRE, Stage, pipeline
from ditty_di.parallelize.collectives import gather_output
from ditty_di.processors.base import PostProcessor, PreProcessor
from ditty_di.protocols import Loss, Stateful

NO_PAIR = """\
{name}.process returned {found}; it must return (batch, ctx), and a preprocessor may return None \
to reject the batch"""

NO_KWARGS = """\
the preprocessors left forward_kwargs={found} in the context; it must be a mapping of the model's \
other arguments, without "input", which is the batch. Return the context that process was given"""
NUM_VALID_CHANGED = """\
a postprocessor has changed the number of valid elements that the loss counts, from {before} to \
{now}. It is summed over the optimizer step before the model runs, so target, ignored labels and \
mask must be written by a preprocessor"""


class Processors:
    """Preprocessors and postprocessors in order.

    Without any (and without checks of tensors) the object is false, `prepare` returns the batch it
    is given, and `finish` the output.

    Args:
        preprocessors: called in order on a batch before the model.
        postprocessors: called in order on the model's output before the loss.

    Raises:
        TypeError: something that is not a list of processors.
    """

    def __init__(
        self,
        preprocessors: Sequence[PreProcessor] = (),
        postprocessors: Sequence[PostProcessor] = (),
    ) -> None:
        self.preprocessors = _as_processors("preprocessors", preprocessors)
        self.postprocessors = _as_processors("postprocessors", postprocessors)
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
    ) -> Batch | None:
        """Run the preprocessors.

        Args:
            batch: the loader's batch; it is not changed.
            epoch: see `ditty_di.batch.Context`, as for the other arguments.
            step: optimizer step, from 1.
            total_steps: number of optimizer steps.
            device: device that the batch is moved to first, for preprocessors; without any it
                stays where it is, so that micro-batches need not be on the device all at once.
            model: the trained module.

        Returns:
            A batch with context, or None when a preprocessor rejects it.

        Raises:
            TypeError: a processor returned something other than `(batch, ctx)`.
            ContractError: a tensor differs from a contract, where tensors are checked.
        """
        if not self._active:
            return batch
        batch = batch.to(device) if self.preprocessors else batch
        inputs, labels = batch.inputs, batch.labels
        ctx = Context(
            batch.context,
            original_batch=(inputs, labels),
            target=labels,
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
            checks.done = True
        return Batch({"input": value, **kwargs}, labels, ctx, checks=on)

    def finish(self, output: Any, batch: Batch, loss_fn: Loss | None = None) -> Any:
        """Run the postprocessors on the model's output.

        Logits that are split over ranks are gathered for them, and for a loss that does not take
        such logits.

        Args:
            output: the model's output.
            batch: the batch it was computed from; its context becomes what they return.
            loss_fn: loss that counted `batch.num_valid`; None does not compare the count.

        Returns:
            The output for the loss.

        Raises:
            TypeError: a processor returned something other than `(output, ctx)`.
            ContractError: a tensor differs from a contract, where tensors are checked.
            ValueError: a postprocessor changed the number of valid elements.
        """
        if self._active or not getattr(loss_fn, "takes_split_logits", False):
            output = gather_output(output)
        if not self._active:
            return output
        checks, on, before = self._checks, batch.checks, batch.context
        if checks is not None and on is not None:
            on.gives(checks.model, output, before)
        stages = checks.postprocessors if checks else ()
        # What changed is seen by identity and version, without waiting for the device.
        had = [(k, v, _version(v)) for k, v in before.items()] if self.postprocessors else []
        result = _run(self.postprocessors, stages, output, before, on)
        if result is None:
            raise TypeError("a postprocessor returned None; only a batch can be rejected")
        output, ctx = result
        batch.context = ctx
        if checks is not None and on is not None:
            on.takes(checks.loss, output, ctx)
            batch.checks = None
        changed = any(ctx.get(k) is not v or _version(v) != version for k, v, version in had)
        if changed and loss_fn is not None and batch.num_valid is not None:
            now = loss_fn.num_valid(batch)  # on an accelerator this waits for the device
            if not torch.equal(batch.num_valid.cpu(), now.cpu()):
                raise ValueError(
                    NUM_VALID_CHANGED.format(before=batch.num_valid.tolist(), now=now.tolist())
                )
        return output

    def states(self) -> dict[str, Stateful]:
        """Return the processors that have a state to save, by checkpoint key.

        Keys are `preprocessor_<name>` and `postprocessor_<name>`; of equal names the second has
        `_2`.
        """
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

    # --------------------------------------------------------------------------------- contracts
    def stages(
        self,
        *,
        loader: Any = None,
        model: Any = None,
        loss: Any = None,
        model_contract: str | Contract | None = None,
    ) -> list[Stage]:
        """Return the stages from loader to loss; see `ditty_di.contracts.stages.pipeline`.

        Args:
            loader: the data loader, or None.
            model: the model, or None.
            loss: the loss, or None.
            model_contract: the model's contract; None is its attribute `contract`.
        """
        return pipeline(
            loader=loader,
            preprocessors=self.preprocessors,
            model=model,
            model_contract=model_contract,
            postprocessors=self.postprocessors,
            loss=loss,
        )

    def validate(self, *, strict: bool = False, **around: Any) -> Report:
        """Check the contracts from loader to loss.

        Args:
            strict: also raise for what no contract proves.
            around: loader, model, loss and model_contract, as in `stages`.

        Raises:
            ContractError: all mismatches at once.
        """
        report = examine(self.stages(**around))
        report.verify(strict=strict)
        return report

    def picture(self, **around: Any) -> str:
        """Return the stages as text, with mismatches marked.

        Args:
            around: loader, model, loss and model_contract, as in `stages`.
        """
        return render(examine(self.stages(**around)))

    def check_tensors(self, *, every: bool = False, **around: Any) -> None:
        """Compare tensors with contracts from now on, also without any processor.

        Args:
            every: check every batch, instead of the first that is not rejected.
            around: loader, model, loss and model_contract, as in `stages`.
        """
        self._checks = TensorChecks(self.stages(**around), every=every)
        self._active = True


def _as_processors(slot: str, processors: Any) -> tuple[Any, ...]:
    """Return the processors of a slot, or raise TypeError."""
    if hasattr(processors, "process") or not isinstance(processors, Iterable):
        raise TypeError(f"{slot}: it must be a list of processors; got {processors!r:.80}")
    found = tuple(processors)
    for n, processor in enumerate(found):
        if isinstance(processor, type) or not hasattr(processor, "process"):
            raise TypeError(
                f"{slot}.{n}: {processor!r:.80} is not a processor; give an object of a class that "
                f"inherits from ditty_di.processors.PreProcessor or PostProcessor"
            )
    return found


def _run(
    processors: Sequence[Any],
    stages: Sequence[Stage],
    value: Any,
    ctx: Context,
    on: BatchChecks | None,
) -> tuple[Any, Context] | None:
    """Run processors in order; return None when one of them rejects the batch."""
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
    """Return how often a tensor was changed in place; 0 for other values."""
    return value._version if isinstance(value, torch.Tensor) else 0
