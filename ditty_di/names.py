"""Fully qualified names of parameters, as checkpoints and optimizers know them."""

from __future__ import annotations

#: Segments that activation checkpointing and `torch.compile` put into names. They are no part of a
#: parameter's name: checkpoints made with and without them must fit.
WRAPPER_SEGMENTS = ("_checkpoint_wrapped_module", "_orig_mod")

#: What peft puts before the names of the model that it adapts, and into those of what it wraps.
_ADAPTED_MODEL = "base_model.model."
_ADAPTED_SEGMENTS = ("base_layer", "original_module", "token_adapter")
#: Followed by the adapter's name: a trainable copy of a module of the base.
_ADAPTED_COPIES = "modules_to_save"


def canonical_fqn(name: str) -> str:
    """The name without wrapper segments, at whatever level they are."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def base_fqn(name: str) -> str:
    """The name that a parameter of a model adapted by peft has in the model's own files.

    A name without anything of peft's in it is its own, and that of an adapter's parameter
    (`...lora_A.default.weight`) is none that the files have.
    """
    parts = canonical_fqn(name).removeprefix(_ADAPTED_MODEL).split(".")
    kept: list[str] = []
    for i, part in enumerate(parts):
        copy = _ADAPTED_COPIES in (part, parts[i - 1] if i else "")
        if not copy and part not in _ADAPTED_SEGMENTS:
            kept.append(part)
    return ".".join(kept)
