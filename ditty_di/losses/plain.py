"""Any callable of output and labels as a loss, such as `torch.nn.MSELoss()` or a function."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditty_di.contracts.stages import snake_case

if TYPE_CHECKING:
    from ditty_di.protocols import Batch, Loss

log = logging.getLogger(__name__)

NO_LOSS = """\
loss_fn: {found} is not an object with count(batch), such as those of ditty_di.losses, nor any \
other callable of (output, labels) that returns a mean over rows, such as torch.nn.MSELoss()"""
NO_SCALAR = """\
loss_fn: {name} returned {found}; a loss returns one number, the mean over the rows of a \
micro-batch{hint}"""


class PlainLoss(nn.Module):
    """A callable `(output, labels) -> loss` whose value is a mean, over what the batch counts.

    A mean over rows is multiplied by the batch's rows and divided by those of the whole optimizer
    step, so that accumulated micro-batches and several ranks give the value of one large batch. Two
    options of torch's losses change what is counted, as attributes or as arguments of a function
    (given in a partial, or its defaults, as in `torch.nn.functional.cross_entropy`):

    * `ignore_index`: the mean is over the other labels (weighted by the class weights `weight`);
    * `reduction="sum"`: the value is a sum, which is added up as it is.

    A dictionary beside the loss, `(loss, {"accuracy": ...})`, is reported; it holds means too.

    Raises, when called:
        ValueError: the value is not one number; prediction and target would be broadcast.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
        called = getattr(loss, "func", loss)  # of a partial
        name = getattr(called, "__name__", type(loss).__name__)
        self.name = snake_case(str(name))
        reduction = _option(loss, "reduction")
        self._sums = reduction == "sum"
        if reduction == "none":
            raise ValueError(
                f"loss_fn: {name} has reduction='none', which gives no single number to minimise; "
                f"give reduction='mean'"
            )
        self._ignored = _option(loss, "ignore_index")

    @property
    def counted(self) -> str:
        """A description of what the loss is a mean over, for messages."""
        if self._sums:
            return "summed over all rows of an optimizer step (reduction='sum')"
        if isinstance(self._ignored, int):
            return f"a mean over labels other than ignore_index={self._ignored}"
        return "a mean over rows"

    def count(self, batch: Batch, /) -> Tensor:
        """Rows, or valid labels where the loss ignores some; on the CPU, shape `[]`."""
        inputs, labels = batch
        whole = isinstance(labels, Tensor) and not labels.is_floating_point()
        if isinstance(self._ignored, int) and not self._sums and whole:
            valid = labels != self._ignored
            weights = _option(self.loss, "weight")
            if weights is None:
                return valid.sum().cpu()
            return weights.detach()[labels[valid].to(weights.device)].double().sum().cpu()
        return torch.tensor(len(inputs["input"]), dtype=torch.int64)

    def forward(
        self, output: Any, labels: Any, global_count: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the mean over `global_count`, and of each metric; shapes `[]`."""
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
        value, share = value.reshape(()), self._share(output, labels, global_count)
        if not self._sums:
            # 0 / 0 where all is ignored
            value = share * torch.where(share == 0, 0.0 * value.nan_to_num(), value)
        return value, {
            key: torch.as_tensor(number, device=share.device).detach() * share
            for key, number in metrics.items()
        }

    def _share(self, output: Any, labels: Any, global_count: Tensor) -> Tensor:
        rows = labels if isinstance(labels, Tensor) and labels.dim() else _first_tensor(output)
        count = self.count(({"input": rows}, labels)).to(global_count.device)
        return (count / global_count).float()

    def extra_repr(self) -> str:
        return f"{self.name}: {self.counted}"


def as_loss(loss: Any) -> Loss:
    """Return a `Loss`, made of any other callable by `PlainLoss`; one line says so.

    Raises:
        TypeError: something that cannot be called, or a class in place of an object.
    """
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(NO_LOSS.format(found=f"{loss!r:.80}"))
    if callable(getattr(loss, "count", None)):
        return loss  # type: ignore[no-any-return]
    plain = PlainLoss(loss)
    log.info("loss %s has no count(batch): its value is taken as %s", plain.name, plain.counted)
    return plain


def _option(loss: Any, name: str) -> Any:
    """Return an option of a loss: its attribute, or what a function gets without being told."""
    if isinstance(loss, nn.Module) or hasattr(loss, name):
        return getattr(loss, name, None)
    try:
        parameter = inspect.signature(loss).parameters.get(name)
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output
