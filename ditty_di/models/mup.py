"""muP: hyperparameters found on a narrow model stay the best ones when it is made wider.

Yang et al., "Tensor Programs V" (arXiv 2203.03466), table 8, for Adam. Everything is relative to a
base, a model of the same depth and vocabulary with other widths. It is built on meta, and the
shapes of both models are compared: a dimension that differs is infinite, the others are finite.
With `r_in` and `r_out` the ratios of a matrix `[..., out, in]` to the base's:

| parameter | standard deviation | learning rate |
| --- | --- | --- |
| vectors; input and output embeddings | as the base's | as the base's |
| finite to infinite | as the base's | as the base's |
| infinite to infinite | / sqrt(r_in) | / r_in |
| infinite to finite (a router, or keys of a fixed number of heads) | / r_in | / r_in |

The output embedding is the paper's output weight with the multiplier 1 / r_in, tied or not. So
that any model of transformers can be read by others afterwards, multipliers are entries of its
configuration: `llama` computes those of transformers' Granite classes, which are Llama with them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import GraniteConfig

from ditty_di.fqn import base_fqn
from ditty_di.messages import first_of
from ditty_di.models.conversion import bare_model
from ditty_di.models.weights import InitModule, hugging_face, own_tensors, transformers_model
from ditty_di.protocols import early_checks

#: Entries of a configuration that a base may have.
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Scale:
    """Factors of a parameter's initial standard deviation and of its learning rate."""

    std: float = 1.0
    lr: float = 1.0


# -- the configuration ----------------------------------------------------------------------------


def _validate(
    *,
    base: Any = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
) -> None:
    """Raise ValueError for an invalid base, and for heads that do not divide a width."""
    own = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads)
    widths = {name: n for name, n in zip(WIDTHS, own, strict=True) if n is not None}
    _require_heads("", widths)
    if not isinstance(base, Mapping):
        return
    for name, n in base.items():
        if name not in WIDTHS:
            raise ValueError(
                f"base.{name}: a base differs from the model in its widths alone; write "
                f"{', '.join(WIDTHS)} in it, and everything else beside it"
            )
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"base.{name}={n}: write a number of at least 1")
    if own.count(None) == 0:
        _require_heads("base.", {**widths, **base})


def _require_heads(prefix: str, widths: Mapping[str, int]) -> None:
    hidden, _, heads, kv_heads = (widths.get(name) for name in WIDTHS)
    if hidden and heads and hidden % heads:
        raise ValueError(
            f"{prefix}num_attention_heads={heads}: hidden_size={hidden} is not a multiple of it"
        )
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(
            f"{prefix}num_key_value_heads={kv_heads}: num_attention_heads={heads} is not a "
            f"multiple of it"
        )


@early_checks(validate=_validate)
def llama(
    *,
    base: Mapping[str, int],
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    vocab_size: int = 32000,
    max_position_embeddings: int = 2048,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    rope_parameters: Mapping[str, Any] | None = None,
    embedding_multiplier: float = 1.0,
    attention_multiplier: float = 1.0,
    residual_multiplier: float = 1.0,
    output_multiplier: float = 1.0,
) -> GraniteConfig:
    """Return the configuration of a Llama with muP's multipliers, as a Granite of transformers.

    Attention scores are scaled by 1/d instead of 1/sqrt(d) (definition 4.1), where d is the size
    of a head, and logits by base width / width; at the base's widths it is a Llama as usual. The
    base is kept as `mup_base`, from which `init` and `ditty_di.optim.mup` read the widths.

    Args:
        base: `hidden_size`, `intermediate_size`, `num_attention_heads`, `num_key_value_heads` at
            which the hyperparameters were found; one that is left out is the model's.
        hidden_size: features of a token.
        intermediate_size: features inside a feed-forward layer.
        num_hidden_layers: blocks.
        num_attention_heads: attention heads per block.
        num_key_value_heads: key and value heads per block.
        vocab_size: tokens.
        max_position_embeddings: longest row, in tokens.
        pad_token_id: token that pads rows; None: none.
        bos_token_id: token that begins a text; None: none.
        eos_token_id: token that ends a text; None: none.
        tie_word_embeddings: share the embedding with the output head.
        initializer_range: standard deviation of all matrices of the base.
        rms_norm_eps: added to the mean square in norms.
        rope_parameters: of the rotary embedding, as transformers has them; None: theta 10000.
        embedding_multiplier: of embeddings; to be tuned, like the next three, on the base.
        attention_multiplier: of attention scores, on top of 1/d.
        residual_multiplier: of what a layer adds to the residual stream.
        output_multiplier: of logits, on top of base width / width.

    Raises:
        ValueError: a base with other entries, or heads that do not divide a width.
    """
    _validate(
        base=base,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
    )
    base_hidden = base.get("hidden_size", hidden_size)
    base_head = base_hidden / base.get("num_attention_heads", num_attention_heads)
    head = hidden_size / num_attention_heads
    make: Any = GraniteConfig  # keeps entries that it does not know
    return make(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        rms_norm_eps=rms_norm_eps,
        rope_parameters=None if rope_parameters is None else dict(rope_parameters),
        embedding_multiplier=embedding_multiplier,
        attention_multiplier=attention_multiplier * base_head**0.5 / head,
        residual_multiplier=residual_multiplier,
        logits_scaling=hidden_size / base_hidden / output_multiplier,
        mup_base=dict(base),
    )


# -- the widths of a model ------------------------------------------------------------------------


def scales(model: nn.Module) -> dict[str, Scale]:
    """Return the factors of all parameters, by their names in the model without adapters.

    Args:
        model: of transformers, also inside others; its configuration has `mup_base`, entries that
            are different in the base. It may be sharded.

    Raises:
        ValueError: the model has no base, or a base that differs in more than widths.
    """
    path, own = transformers_model(model)
    entries = getattr(getattr(own, "config", None), "mup_base", None)
    if entries is None:
        raise ValueError(
            "model: its configuration has no mup_base, the widths of the base that muP compares it "
            "with; use model=llama_mup, or set mup_base of a configuration of your own"
        )
    config = copy.deepcopy(own.config)
    for name, value in entries.items():
        setattr(config, name, value)
    wide, base = bare_model(own), bare_model(own, config)
    shapes = {name: p.shape for name, p in base.named_parameters()}
    looked_up = _embeddings(wide)
    found = {}
    for name, parameter in wide.named_parameters():
        if name not in shapes or len(shapes[name]) != parameter.ndim:
            raise ValueError(
                f"model: mup_base is not a base of it: it has no {name} like the model"
            )
        found[base_fqn(f"{path}.{name}" if path else name)] = _scale(
            name, parameter.shape, shapes.pop(name), name in looked_up
        )
    if shapes:
        raise ValueError(
            f"model: mup_base is not a base of it: the model has no {first_of(shapes)}"
        )
    return found


def _embeddings(model: Any) -> set[str]:
    """Return the names of the input and output embeddings' parameters.

    Their shapes, `[vocabulary, hidden]`, are those of any projection to a finite number.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    held = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in held}


def _scale(name: str, shape: Sequence[int], base: Sequence[int], looked_up: bool) -> Scale:
    ratios = [n / of for n, of in zip(shape, base, strict=True)]
    finite = ratios[: -1 if looked_up else -2]
    if any(ratio != 1 for ratio in finite):
        raise ValueError(
            f"model: mup_base is not a base of it: {name} is {list(shape)} in the model and "
            f"{list(base)} in the base, which may differ in widths alone (not in the vocabulary, "
            f"or the number of experts)"
        )
    if looked_up or len(ratios) < 2:
        return Scale()
    r_out, r_in = ratios[-2:]
    return Scale(std=1 / r_in if r_out == 1 else r_in**-0.5, lr=1 / r_in)


def init(model: nn.Module) -> InitModule:
    """Return muP's initializer: transformers', then every parameter times its factor.

    For `ditty_di.models.weights.initialize`. It is for models whose `_init_weights` sets the
    parameters of each module by themselves.

    Args:
        model: see `scales`.
    """
    fill, factors = hugging_face(model), scales(model)
    paths = {id(module): path for path, module in model.named_modules()}

    def init_module(module: nn.Module) -> None:
        fill(module)
        for _, name, tensor in own_tensors(module):
            path = paths.get(id(module), "")
            scale = factors.get(base_fqn(f"{path}.{name}" if path else name))
            if scale is not None and scale.std != 1:
                tensor.mul_(scale.std)

    return init_module
