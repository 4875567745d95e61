"""Fully qualified names of parameters, as checkpoints and optimizers use them."""

from __future__ import annotations

#: Segments that activation checkpointing and `torch.compile` insert into names. They are left out,
#: so that checkpoints made with and without them fit.
WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_orig_mod")

#: What peft puts before the names of the model that it adapts, and into those of what it wraps.
_ADAPTED_MODEL = "base_model.model."
_ADAPTED_SEGMENTS = ("base_layer", "original_module", "token_adapter")
#: Followed by the adapter's name: a trainable copy of a module of the base.
_ADAPTED_COPIES = "modules_to_save"


def canonical_fqn(name: str) -> str:
    """Return the name without wrapper segments."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def base_fqn(name: str) -> str:
    """Return the name that a parameter of an adapted model has in the base's own files.

    A name without segments of peft is returned as it is; that of an adapter's parameter
    (`...lora_A.default.weight`) becomes one that the files do not have.
    """
    parts = canonical_fqn(name).removeprefix(_ADAPTED_MODEL).split(".")
    before = ["", *parts]
    return ".".join(
        part
        for part, previous in zip(parts, before, strict=False)
        if part not in _ADAPTED_SEGMENTS and _ADAPTED_COPIES not in (part, previous)
    )
