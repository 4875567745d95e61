"""Any callable of output and labels as a loss, such as `torch.nn.MSELoss()` or a function."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.contracts.stages import snake_case
from ditty_di.losses.base import Loss

log = logging.getLogger(__name__)

NO_LOSS = """\
loss_fn: {found} is not an object with num_valid(batch), such as those of ditty_di.losses, nor any \
other callable of (output, labels) that returns a mean over rows, such as torch.nn.MSELoss()"""
NO_SCALAR = """\
loss_fn: {name} returned {found}; a loss returns one number, the mean over the rows of a \
micro-batch{hint}"""


class PlainLoss(Loss):
    """A callable `(output, labels) -> loss` whose value is a mean over rows or valid labels.

    The mean is multiplied by the rows of the micro-batch and divided by those of the whole
    optimizer step, so that micro-batches and ranks give the value of one large batch. Two options
    of torch's losses change what is counted, as attributes or as arguments of a function (given in
    a partial, or its defaults, as in `torch.nn.functional.cross_entropy`):

    * `ignore_index`: the mean is over the other labels (weighted by the class weights `weight`);
    * `reduction="sum"`: the value is a sum, which is added up as it is.

    Metrics may be returned beside the loss, `(loss, {"accuracy": ...})`, as means too.

    Args:
        loss: the callable.

    Raises:
        ValueError: `reduction="none"`. When called: the value is not one number, or prediction and
            target would be broadcast.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        function = getattr(loss, "func", loss)  # of a partial
        name = getattr(function, "__name__", type(loss).__name__)
        self.name = snake_case(str(name))
        reduction, ignored = _option(loss, "reduction"), _option(loss, "ignore_index")
        self._sums = reduction == "sum"
        if reduction == "none":
            raise ValueError(
                f"loss_fn: {name} has reduction='none', which gives no single number to minimize; "
                f"give reduction='mean'"
            )
        self._ignored = ignored if isinstance(ignored, int) and not self._sums else None

    @property
    def counted(self) -> str:
        """A description of what the loss is a mean over, for messages."""
        if self._sums:
            return "summed over all rows of an optimizer step (reduction='sum')"
        if self._ignored is not None:
            return f"a mean over labels other than ignore_index={self._ignored}"
        return "a mean over rows"

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of rows, or of valid labels where some are ignored, shape `[]`."""
        labels = batch.target
        is_classes = isinstance(labels, Tensor) and not labels.is_floating_point()
        if self._ignored is None or not is_classes:
            return torch.tensor(len(batch.inputs["input"]), dtype=torch.int64)
        valid = labels != self._ignored
        weights = _option(self.loss, "weight")
        if weights is None:
            return valid.sum()  # type: ignore[no-any-return]
        return weights.detach()[labels[valid].to(weights.device)].double().sum()  # type: ignore[no-any-return]

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's part of the mean, and of each metric, shapes `[]`."""
        labels = batch.target
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")
            try:
                found = self.loss(output, labels)
            except UserWarning as warning:
                raise ValueError(
                    f"loss_fn: {self.name}: prediction {list(output.shape)} and labels "
                    f"{list(labels.shape)} differ in shape, and broadcasting would compare rows "
                    f"with other rows; give both one shape (labels[:, None], output.squeeze(-1))"
                ) from warning
        value, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        if not isinstance(value, Tensor) or value.numel() != 1 or not isinstance(metrics, dict):
            shown = type(value).__name__
            hint = "; see its reduction" if _option(self.loss, "reduction") is not None else ""
            if isinstance(value, Tensor):
                shown = f"a tensor of shape {list(value.shape)}"
                hint = hint or "; take its mean()"
            raise ValueError(NO_SCALAR.format(name=self.name, found=shown, hint=hint))
        value, share = value.reshape(()), self.share(batch, num_valid_global)
        if not self._sums:
            # 0 / 0 where all is ignored
            value = share * torch.where(share == 0, 0.0 * value.nan_to_num(), value)
        return value, {
            key: torch.as_tensor(number, device=share.device).detach() * share
            for key, number in metrics.items()
        }

    def extra_repr(self) -> str:
        """Return the name, and what is counted."""
        return f"{self.name}: {self.counted}"


def as_loss(loss: Any) -> protocols.Loss:
    """Return a loss that counts valid elements; another callable is wrapped in `PlainLoss`.

    Args:
        loss: an object with `num_valid(batch)`, or any callable of output and labels.

    Raises:
        TypeError: something that cannot be called, or a class in place of an object.
    """
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(NO_LOSS.format(found=f"{loss!r:.80}"))
    if callable(getattr(loss, "num_valid", None)):
        return loss  # type: ignore[no-any-return]
    plain = PlainLoss(loss)
    log.info("loss %s has no num_valid(batch): its value is taken as %s", plain.name, plain.counted)
    return plain


def _option(loss: Any, name: str) -> Any:
    """Return an option of a loss: its attribute, or the default of a function's parameter."""
    if isinstance(loss, nn.Module) or hasattr(loss, name):
        return getattr(loss, name, None)
    try:
        parameter = inspect.signature(loss).parameters.get(name)
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    return None if parameter is None or parameter.default is parameter.empty else parameter.default
