"""The dtype that a pipeline computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ditty_di.messages import did_you_mean
from ditty_di.precision import float8
from ditty_di.precision.autocast import autocast
from ditty_di.protocols import ModelTransform


@dataclass(frozen=True)
class Precision:
    """The dtype of matrix products; parameters keep theirs.

    Args:
        dtype: a name in torch; None keeps the parameters' dtype.
        convert: replaces layers of the model.
    """

    dtype: str | None = None
    convert: ModelTransform | None = None

    def transforms(self, *, autocasts: bool) -> list[ModelTransform]:
        """Return the changes of the model.

        Args:
            autocasts: whether to cast by autocast; FSDP2 casts by itself.
        """
        changes = [] if self.convert is None else [self.convert]
        if autocasts and self.dtype:
            changes.append(partial(autocast, dtype=self.dtype))
        return changes


#: By the names of accelerate.
PRECISIONS = {
    "no": Precision(),
    "fp16": Precision("float16"),
    "bf16": Precision("bfloat16"),
    "fp8": Precision("bfloat16", partial(float8.torchao, emulate=None)),
}


def precision(
    *, fp16: bool, use_bfloat16: bool, accelerator_kwargs: Mapping[str, Any] | None
) -> Precision:
    """Return the precision that the arguments of a pipeline ask for.

    Args:
        fp16: compute in float16.
        use_bfloat16: compute in bfloat16.
        accelerator_kwargs: `{"mixed_precision": NAME}`, with a name of accelerate.

    Raises:
        ValueError: they ask for two, or for an unknown name.
        TypeError: arguments of accelerate that are not supported.
    """
    unsupported = dict(accelerator_kwargs or {})
    named = unsupported.pop("mixed_precision", None)
    if unsupported:
        raise TypeError(
            f"accelerator_kwargs: there is no Accelerator here to take {', '.join(unsupported)}; "
            f"only mixed_precision is supported. FSDPConfig says how ranks share the model, and "
            f"grad_accum how many micro-batches a step has"
        )
    asked = [name for name, on in (("fp16", fp16), ("bf16", use_bfloat16)) if on]
    asked += [] if named is None else [named]
    if len(set(asked)) > 1:
        raise ValueError(
            f"fp16={fp16}, use_bfloat16={use_bfloat16}, mixed_precision={named!r} ask for "
            f"{' and '.join(map(str, asked))}; write one of them"
        )
    name = asked[0] if asked else "no"
    if name not in PRECISIONS:
        raise ValueError(
            f"accelerator_kwargs: mixed_precision={name!r} is not one of {', '.join(PRECISIONS)}"
            f"{did_you_mean(str(name), PRECISIONS)}"
        )
    return PRECISIONS[name]
