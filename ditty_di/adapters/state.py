"""What a trained adapter is: its tensors under peft's names, and its configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditty_di.io import is_first_rank
from ditty_di.names import canonical_fqn

if TYPE_CHECKING:
    from peft import PeftModel

#: The name that peft gives the only adapter of a model; it is in the names of its parameters.
NAME = "default"


def peft_model(model: nn.Module) -> PeftModel:
    """The peft model that `model` is, or has in it.

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
    """The adapter's tensors, whole and on the CPU, under the names of `adapter_model.safetensors`.

    Every rank calls it: sharded tensors are gathered one at a time. Embeddings that were resized
    are in it, as in stock peft.

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
                # A copy: what is tied would be one tensor, which safetensors refuses.
                whole[name] = gathered.detach().to("cpu", copy=True).contiguous()
    return whole if first else None


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """What peft writes as `adapter_config.json`, with the path and revision of the base.

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
    """Sets, in an order that does not change from run to run."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _selected(adapted: PeftModel) -> dict[str, Tensor]:
    """What peft would save, still sharded, under the names of its files."""
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


def _grown_embeddings(adapted: PeftModel, state: dict[str, Tensor]) -> list[str]:
    """Names of embeddings (and heads) with rows that the base does not have.

    peft would ask the hub how large the base is whenever it saves. A copy that is trained whole is
    saved already, and so are new rows that are all trained.
    """
    rows = _rows_of_base(adapted)
    if rows is None or not hasattr(adapted, "get_input_embeddings"):
        return []
    layers = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    names = []
    for path, module in adapted.named_modules(remove_duplicate=False):
        if all(module is not layer for layer in layers) or hasattr(module, "modules_to_save"):
            continue
        trained = set(module.token_adapter.token_indices[NAME] if _trains_tokens(module) else [])
        for name, tensor in state.items():
            base = name.startswith(f"{path}.") and f".{NAME}." not in f"{name}."
            if base and not set(range(rows, tensor.shape[0])) <= trained:
                names.append(name)
    return names


def _trains_tokens(module: Any) -> bool:
    return hasattr(module, "token_adapter")


def _rows_of_base(adapted: PeftModel) -> int | None:
    """The size of the base's vocabulary; None when nobody knows which base it is."""
    config = adapted.peft_config[NAME]
    if not config.base_model_name_or_path:
        return None
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    return getattr(base.get_text_config(), "vocab_size", None)
