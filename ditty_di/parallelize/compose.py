"""Every kind of parallelism in one function, in the order in which they fit together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping  # noqa: F401  (in the signature of `parallelize`)
from typing import Any

from torch import nn

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.distributed import ParallelDims

from ditty_di.parallelize.context import context_fits, context_parallel
from ditty_di.parallelize.data_parallel import shard, validate
from ditty_di.parallelize.experts import expert_parallel, experts_fit
from ditty_di.parallelize.fits import towers_fit
from ditty_di.parallelize.tensor import tensor_fits, tensor_parallel
from ditty_di.protocols import early_checks


def _takes_options_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that shows in a signature what `**options` are handed on to a function.

    A configuration is checked against the signature.
    """

    def decorate(outer: Callable[..., Any]) -> Callable[..., Any]:
        own, inner = (inspect.signature(f).parameters.values() for f in (outer, function))
        known = [p for p in own if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in known}
        options = [p for p in inner if p.kind is p.KEYWORD_ONLY and p.name not in names]
        vars(outer)["__signature__"] = inspect.Signature([*known, *options])
        return outer

    return decorate


@early_checks(validate=validate, fits=[tensor_fits, context_fits, experts_fit, towers_fit])
@_takes_options_of(shard)
def parallelize(model: nn.Module, /, *, parallel_dims: ParallelDims, **options: Any) -> nn.Module:
    """Split layers, sequences and experts over ranks, then shard over the data-parallel ranks.

    The degrees of `runtime` say what is split: `tp` splits layers
    (`ditty_di.parallelize.tensor`), `cp` sequences (`.context`), `ep` experts (`.experts`); the
    rest of the ranks share the data (`.data_parallel`). With one rank the model stays as it is.

    Args:
        model: the model, on meta or with values.
        parallel_dims: the layout.
        **options: arguments of `ditty_di.parallelize.data_parallel.shard`.

    Raises:
        ValueError: the model does not fit the layout.
    """
    if parallel_dims.tp_enabled:
        tensor_parallel(model, parallel_dims=parallel_dims)
    if parallel_dims.cp_enabled:
        context_parallel(model, parallel_dims=parallel_dims)
    if parallel_dims.ep_enabled:
        expert_parallel(model, parallel_dims=parallel_dims)
    return shard(model, parallel_dims=parallel_dims, **options)
