"""Fully qualified names of parameters, as checkpoints and optimizers know them."""

from __future__ import annotations

#: Segments that activation checkpointing and `torch.compile` put into names. They are no part of a
#: parameter's name: checkpoints made with and without them must fit.
WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_orig_mod")


def canonical_fqn(name: str) -> str:
    """The name without wrapper segments, at whatever level they are."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)
