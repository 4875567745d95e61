"""A trained adapter as peft stores it: its tensors by name, and its configuration."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from ditty_di.fqn import canonical_fqn
from ditty_di.io import is_first_rank

#: The name that peft gives the only adapter of a model; it is in the names of its parameters.
NAME = "default"


def peft_model(model: nn.Module) -> Any:
    """Return the `peft.PeftModel` that `model` is, or has in it.

    Raises:
        ValueError: there is none.
    """
    from peft import PeftModel

    for module in model.modules():
        if isinstance(module, PeftModel):
            return module
    raise ValueError(
        f"{type(model).__name__} has no adapters; choose an adapter (adapter=lora), or export the "
        f"full model"
    )


def adapter_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the adapter's tensors on the CPU, under the names of `adapter_model.safetensors`.

    Every rank must call it: sharded tensors are gathered one at a time. Embeddings that were
    resized are included, as in stock peft.

    Args:
        model: with adapters; may be sharded.

    Returns:
        The tensors on rank 0, None on the others.

    Raises:
        ValueError: a model without adapters.
    """
    adapted = peft_model(model)
    first = is_first_rank()
    whole: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in _selected(adapted).items():
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if first:
                # A copy: safetensors refuses tensors that share memory, as tied ones do.
                whole[name] = gathered.detach().to("cpu", copy=True).contiguous()
    return whole if first else None


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """Return what peft writes as `adapter_config.json`, with the path and revision of the base.

    Raises:
        ValueError: a model without adapters.
    """
    adapted = peft_model(model)
    config = adapted.peft_config[NAME]
    values = {**config.to_dict(), "inference_mode": True}
    if config.task_type is None:  # stock peft finds the class of the base by it
        base = type(adapted.get_base_model())
        values["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    return json.loads(json.dumps(values, default=_plain))


def _plain(value: Any) -> Any:
    """Return sets in an order that does not change from run to run."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _selected(adapted: Any) -> dict[str, Tensor]:
    """Return what peft would save, still sharded, under the names in its files."""
    from peft import get_peft_model_state_dict

    # Under the modules' own names, wrappers' segments included: peft looks for them.
    state = {
        f"{path}.{name}" if path else name: tensor
        for path, module in adapted.named_modules(remove_duplicate=False)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if "." not in name
    }
    selected = get_peft_model_state_dict(
        adapted, state_dict=state, adapter_name=NAME, save_embedding_layers=False
    )
    selected |= {name: state[name] for name in _grown_embeddings(adapted, state)}
    return {canonical_fqn(name): tensor for name, tensor in selected.items()}


def _grown_embeddings(adapted: Any, state: dict[str, Tensor]) -> list[str]:
    """Return the names of embeddings (and heads) with rows that the base does not have.

    peft would ask the hub how large the base is whenever it saves. A copy that is trained whole is
    saved already, and so are new rows that are all trained.
    """
    config = adapted.peft_config[NAME]
    path, revision = config.base_model_name_or_path, config.revision
    if not path or not hasattr(adapted, "get_input_embeddings"):
        return []
    base_config = AutoConfig.from_pretrained(path, revision=revision).get_text_config()
    rows = getattr(base_config, "vocab_size", None)
    if rows is None:
        return []
    layers = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    names = []
    for path, module in adapted.named_modules(remove_duplicate=False):
        if all(module is not layer for layer in layers) or hasattr(module, "modules_to_save"):
            continue
        tokens = getattr(module, "token_adapter", None)
        trained = set() if tokens is None else set(tokens.token_indices[NAME])
        for name, tensor in state.items():
            of_base = name.startswith(f"{path}.") and f".{NAME}." not in f"{name}."
            if of_base and not set(range(rows, tensor.shape[0])) <= trained:
                names.append(name)
    return names
