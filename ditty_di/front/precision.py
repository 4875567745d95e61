"""What a pipeline computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ditty_di.config.targets import did_you_mean
from ditty_di.precision import float8
from ditty_di.precision.autocast import autocast

if TYPE_CHECKING:
    from ditty_di.protocols import ModelTransform


@dataclass(frozen=True)
class Precision:
    """A dtype for products (a name in torch), and what its layers need; parameters keep theirs."""

    dtype: str | None = None
    convert: ModelTransform | None = None

    def transforms(self, *, autocasts: bool) -> list[ModelTransform]:
        """What changes the model; FSDP2 computes in another dtype by itself."""
        changes = [] if self.convert is None else [self.convert]
        if autocasts and self.dtype:
            changes.append(partial(autocast, dtype=self.dtype))
        return changes


#: accelerate's names.
PRECISIONS = {
    "no": Precision(),
    "fp16": Precision("float16"),
    "bf16": Precision("bfloat16"),
    "fp8": Precision("bfloat16", partial(float8.torchao, emulate=None)),
}


def precision(
    *, fp16: bool, use_bfloat16: bool, accelerator_kwargs: Mapping[str, Any] | None
) -> Precision:
    """The one that the arguments ask for.

    Raises:
        ValueError: they ask for two; another name than accelerate's.
        TypeError: arguments of accelerate that have no meaning here.
    """
    given = dict(accelerator_kwargs or {})
    named = given.pop("mixed_precision", None)
    if given:
        raise TypeError(
            f"accelerator_kwargs: there is no Accelerator here to take {', '.join(given)}; only "
            f"mixed_precision has a meaning. Ranks are laid out by FSDPConfig, and micro-batches "
            f"by grad_accum"
        )
    asked = {"fp16": fp16, "bf16": use_bfloat16, named: named is not None}
    wanted = [name for name, on in asked.items() if on]
    if len(wanted) > 1:
        raise ValueError(
            f"fp16={fp16}, use_bfloat16={use_bfloat16}, mixed_precision={named!r} ask for "
            f"{' and '.join(map(str, wanted))}; write one of them"
        )
    name = wanted[0] if wanted else "no"
    if name not in PRECISIONS:
        raise ValueError(
            f"accelerator_kwargs: mixed_precision={name!r} is none of {', '.join(PRECISIONS)}"
            f"{did_you_mean(str(name), PRECISIONS)}"
        )
    return PRECISIONS[name]
