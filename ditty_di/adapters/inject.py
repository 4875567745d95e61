"""Add adapters to a model that is on meta, or has its values."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ditty_di.adapters import targets, tied
from ditty_di.adapters.state import NAME
from ditty_di.dtypes import dtype_by_name, dtype_name
from ditty_di.messages import refuse
from ditty_di.models.coverage import left_out, within_block
from ditty_di.models.heads import head_of
from ditty_di.models.stacked import fused_weights
from ditty_di.precision.casting import computing_dtype
from ditty_di.protocols import early_checks

log = logging.getLogger(__name__)

#: Where peft keeps a trained copy of a module, and where the original.
_COPIES = {"modules_to_save": "original_module", "ln_tuning_layers": "base_layer"}

#: Initialisations that do not need the base's values.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")

#: Options that `target_parameters` does not have.
_LINEAR_ONLY = ("lora_dropout", "use_dora", "lora_bias")


def _validate(*, config: Any = None) -> None:
    """Check the numbers of a LoRA configuration's view, where it has such numbers."""
    given = getattr(config, "arguments", {})
    rank, dropout = given.get("r"), given.get("lora_dropout")
    wrong = []
    if isinstance(rank, int) and rank < 1:
        wrong.append(f"config.r={rank} must be at least 1, such as 16")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        wrong.append(f"config.lora_dropout={dropout} must be at least 0 and below 1")
    refuse(wrong)


@early_checks(validate=_validate)
def apply_adapter(model: nn.Module, /, *, config: Any, dtype: str | None = "float32") -> nn.Module:
    """Return the model inside a `peft.PeftModel`: its parameters frozen, the adapters trainable.

    Args:
        model: without adapters.
        config: any configuration of peft whose layers have parameters of their own. Its
            `target_modules` are names, a regular expression, `all-linear` (quantized layers and
            fused experts too, without the output head and routers), or None: what peft knows for
            this architecture, else the linear layers of the repeated blocks. A `task_type` of None
            becomes the model's own, and so do `modules_to_save` of a model whose head may be new
            (`head_task`).
        dtype: of everything that is trained, a name in torch; float32 also on a base of 16 bits,
            whose own updates would be lost in rounding. None keeps what peft makes.

    Raises:
        ValueError: a name that no module has, or a configuration that cannot work here.
    """
    from peft import get_peft_model

    from ditty_di.adapters import experts

    config = copy.deepcopy(config)  # peft writes into it
    _require_supported(config, model)
    _set_head(config, model)
    _set_targets(config, model)
    _set_task(config, model)
    experts.register(config, model)
    base_dtypes = {id(p): p.dtype for p in model.parameters()}
    on_meta = any(p.is_meta for p in model.parameters())
    with warnings.catch_warnings(), experts.packed_as_parameters(config, model):
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # ours, registered
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")  # export unties
        try:
            adapted = get_peft_model(
                model,  # type: ignore[arg-type]
                config,
                adapter_name=NAME,
                autocast_adapter_dtype=False,
                revision=getattr(getattr(model, "config", None), "_commit_hash", None),
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"adapter: {_kind(config)} does not fit the model: {error}") from error
    _check_layers(adapted, on_meta=on_meta)
    _check_copies(adapted)
    tied.tie(adapted, adapted.peft_config[NAME])
    if on_meta:  # peft moves most of what it makes there
        adapted.to("meta")
    if dtype is not None:
        _cast_trained(adapted, dtype_by_name(dtype, "adapter.dtype"), base_dtypes)
    return adapted


def _require_supported(config: Any, model: nn.Module) -> None:
    """Raise ValueError for configurations that cannot work here."""
    from peft import PeftModel

    if any(isinstance(module, PeftModel) for module in model.modules()):
        raise ValueError("adapter: the model has adapters already; add them once")
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter: {_kind(config)} puts virtual tokens before the input, so that logits and "
            f"labels no longer have one length; use one that changes layers, such as LoraConfig"
        )
    if hasattr(config, "tinit"):
        raise ValueError(
            f"adapter: {_kind(config)} moves ranks between layers by a call in every step, which "
            f"the trainer does not make; use LoraConfig with a rank_pattern"
        )
    start = getattr(config, "init_lora_weights", True)
    if start not in _INITIALIZATIONS or getattr(config, "kasa_config", None) is not None:
        what = f"init_lora_weights={start}" if start not in _INITIALIZATIONS else "kasa_config"
        raise ValueError(
            f"adapter: {what} computes the adapters from the base's values, and changes these, "
            f"while the layers are made; here the base is read later, by slices, and stays the "
            f"published one. Use init_lora_weights=true, gaussian or orthogonal"
        )


def _set_head(config: Any, model: nn.Module) -> None:
    """Set the task of a model with a head that may be new, and train this head whole."""
    task = getattr(model, "head_task", None)
    if task is None:
        return
    config.task_type = config.task_type or task
    if hasattr(config, "modules_to_save") and config.modules_to_save is None:
        trained = (name for name, p in model.named_parameters() if p.requires_grad)
        heads = dict.fromkeys(head_of(model, name) for name in trained)
        config.modules_to_save = [head for head in heads if head] or None


def _set_targets(config: Any, model: nn.Module) -> None:
    """Replace `all-linear` and None by names; raise ValueError for names without a match."""
    whole = getattr(config, "modules_to_save", None) or []
    targets.require_matches(model, "modules_to_save", whole, among=targets.paths(model))
    targets.require_parameters(model, getattr(config, "target_parameters", None) or [])
    if not hasattr(config, "target_modules"):
        return
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == targets.ALL_LINEAR:
        _set_all_linear(config, model, [*whole, *_refused_by_peft(config, model)])
    elif wanted is not None:
        targets.require_matches(model, "target_modules", wanted)
    elif not getattr(config, "target_parameters", None) and not _known_to_peft(config, model):
        config.target_modules = targets.blocks_linear(model)


def _set_all_linear(config: Any, model: nn.Module, whole: Sequence[str]) -> None:
    """Name every linear layer but the head, and every fused weight of experts.

    Weights are named in `target_parameters`, and so are layers with names that peft takes for
    experts. Kinds other than LoRA, and options that such targets do not have, leave them out with
    a warning.
    """
    from ditty_di.adapters.experts import renamed_by_peft

    names = targets.all_linear(model, except_for=whole)
    renamed = renamed_by_peft(config, model, names)
    fused = [p for p, _, _ in fused_weights(model) if not any(n in p.split(".") for n in whole)]
    unfit = [name for name in _LINEAR_ONLY if getattr(config, name, None)]
    if getattr(config, "init_lora_weights", True) == "orthogonal":
        unfit.append("init_lora_weights=orthogonal")
    config.target_modules = [name for name in names if name not in renamed]
    if not unfit and (fused or renamed) and hasattr(config, "target_parameters"):
        weights = {within_block(path) for path in fused} | {f"{name}.weight" for name in renamed}
        config.target_parameters = sorted({*(config.target_parameters or ()), *weights})
        return
    chosen = targets.layers_of(model, config.target_modules)
    given = getattr(config, "target_parameters", None) or []
    taken = [p for layer in chosen for p in layer.parameters()]
    taken += [
        p for name, p in targets.weights(model) if any(targets.matches(g, name) for g in given)
    ]
    rest, left = left_out(model, taken)
    if left or renamed:
        why = (
            f"LoRA adapts them without {' and '.join(unfit)}" if unfit else "LoraConfig adapts them"
        )
        log.warning(
            "adapter: target_modules=all-linear adapts %d layers; left out: %s; %s",
            *(len(chosen), rest, why),
        )


def _refused_by_peft(config: Any, model: nn.Module) -> list[str]:
    """Return names of linear layers that peft does not adapt in this architecture.

    Mamba's kernels read the weight of `out_proj`, so an adapter of it would not be applied.
    """
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    refused = []
    for name in sorted({path.rpartition(".")[2] for path in targets.linear_layers(model)}):
        try:
            _check_lora_target_modules_mamba(config, model, name)
        except ValueError:
            refused.append(name)
    if refused:
        log.warning(
            "adapter: target_modules=all-linear leaves out %s, whose weight kernels of %s read",
            *(", ".join(refused), getattr(getattr(model, "config", None), "model_type", "it")),
        )
    return refused


def _known_to_peft(config: Any, model: nn.Module) -> bool:
    """Return whether peft has names of layers for this architecture, which the model has."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if not hasattr(tuner, "target_module_mapping"):  # IA3 looks up two lists that go together
        return True
    architecture = getattr(getattr(model, "config", None), "model_type", "")
    names = tuner.target_module_mapping.get(architecture)
    if isinstance(names, str) or not names:
        return bool(names)
    paths = targets.paths(model)
    return all(any(targets.matches(name, path) for path in paths) for name in names)


def _set_task(config: Any, model: nn.Module) -> None:
    """Set the task: it decides which class of peft wraps the model, and which opens the export."""
    own = getattr(model, "config", None)
    if own is None or not hasattr(model, "prepare_inputs_for_generation"):
        return
    task = "SEQ_2_SEQ_LM" if getattr(own, "is_encoder_decoder", False) else "CAUSAL_LM"
    if config.task_type is None:
        config.task_type = task
    elif "LM" in config.task_type and config.task_type != task:
        raise ValueError(
            f"adapter: task_type={config.task_type}, but {type(model).__name__} is a model for "
            f"{task}; leave task_type out"
        )


def _check_layers(adapted: Any, *, on_meta: bool) -> None:
    """Raise ValueError for layers of peft that cannot work here."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    config: Any = adapted.peft_config[NAME]
    for path, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        kind, is_lora = type(layer).__name__, isinstance(layer, LoraLayer)
        constants = [n for n, _ in layer.named_buffers() if not n.startswith("base_layer.")]
        plain_only = not isinstance(layer, LoraLayer | IA3Layer)
        problem = ""
        # Such a kind would compute with the packed bytes as the weight, silently wrong.
        if plain_only and targets.is_quantized(layer.get_base_layer()):
            problem = (
                f"{path} is quantized, and {kind} works on a plain weight only; use LoraConfig "
                f"(also with use_dora), or quantize=none"
            )
        elif is_lora and config.use_dora and hasattr(layer.base_layer, "token_adapter"):
            problem = (
                f"use_dora does not fit {path}, of which single tokens are trained too (tied to "
                f"the embedding); take it out of target_modules, or use_dora=false"
            )
        elif (
            is_lora
            and config.init_lora_weights == "orthogonal"
            and (NAME in layer.lora_embedding_A or hasattr(layer, "parameter_name"))
        ):
            what = getattr(layer, "parameter_name", "an embedding")
            problem = (
                f"init_lora_weights=orthogonal is for linear layers, and {path} is {what}; "
                f"use init_lora_weights=true"
            )
        elif on_meta and constants and not isinstance(layer, TrainableTokensLayer):
            problem = (
                f"{kind} keeps constants ({path}.{constants[0]}) that are made with the layer and "
                f"would be lost on the meta device; use another kind, such as LoraConfig"
            )
        if problem:
            raise ValueError(f"adapter: {problem}")


def _check_copies(adapted: nn.Module) -> None:
    """Raise ValueError where peft replaces a tied module that is trained whole by another kind.

    It makes a linear layer of whatever it ties to such a module.
    """
    for path, module in adapted.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict) or NAME not in copies:
            continue
        copy, original = copies[NAME], module.original_module
        if not isinstance(copy, type(original)):
            raise ValueError(
                f"adapter: ensure_weight_tying makes a {type(copy).__name__} of {path}, a "
                f"{type(original).__name__}; leave ensure_weight_tying out, so that export=merged "
                f"unties what is trained whole"
            )


def _cast_trained(
    adapted: nn.Module, dtype: torch.dtype, base_dtypes: dict[int, torch.dtype]
) -> None:
    """Cast all trained parameters to one dtype; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for path, module in adapted.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.requires_grad or parameter.dtype == dtype:
                continue
            if id(parameter) in base_dtypes and not hasattr(module, "qweight"):
                raise ValueError(
                    f"adapter: {path}.{name} of the base is trained and {parameter.dtype}, unlike "
                    f"the adapters ({dtype}); use bias=none, or model.dtype={dtype_name(dtype)}"
                )
            if id(parameter) not in done:
                done[id(parameter)] = nn.Parameter(parameter.detach().to(dtype))
            module._parameters[name] = done[id(parameter)]
    for module in adapted.modules():
        for copies, original in _COPIES.items():
            kept = module._modules.get(copies)
            if isinstance(kept, nn.ModuleDict) and NAME in kept:
                _cast_around(kept[NAME], getattr(module, original))


def _cast_around(trained: nn.Module, original: nn.Module) -> None:
    """Let a trained copy of a module take and return the dtypes that the original would.

    peft's own layers cast by themselves. The dtypes are looked up in each call: FSDP may change
    them.
    """

    def inwards(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cast(x, computing_dtype(module)) for x in inputs)

    def outwards(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, computing_dtype(original))

    if computing_dtype(trained) != computing_dtype(original):
        trained.register_forward_pre_hook(inwards)
        trained.register_forward_hook(outwards)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating and dtype is not None else value


def _kind(config: Any) -> str:
    return type(config).__name__
