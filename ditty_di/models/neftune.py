"""NEFTune: uniform noise on the input embeddings while a model is fine-tuned."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditty_di.data import options
from ditty_di.protocols import early_checks


def _validate(*, alpha: float = 5.0) -> None:
    options.require(alpha > 0, f"neftune: alpha={alpha} must be above 0; neftune=none has no noise")


@early_checks(validate=_validate)
def neftune(model: nn.Module, /, *, alpha: float = 5.0) -> nn.Module:
    """Add noise to the input embeddings in every training forward pass.

    The noise is uniform in (-1, 1) times `alpha / sqrt(L * d)` (Jain et al. 2023,
    arXiv:2310.05914, section 2), where `d` is the embeddings' width and `L` the length of the
    token's own sequence: with `position_ids` that restart (packed rows) that of its document, with
    an `attention_mask` the number of the row's unmasked tokens (masked ones get no noise, as in
    the authors' training code), else the row with its padding (as in their README and in
    transformers). The batch size has no influence. A decoder beside an encoder gets noise too,
    with whole rows for `L`.

    There is no noise in evaluation mode or without gradients, so none in validation and
    generation. Every rank draws its own noise, from a seed that torch's global generator gives: a
    resumed run continues with the same.

    Args:
        model: a Hugging Face model, with or without adapters; the names of its parameters stay.
        alpha: the strength; 5, 10 and 15 are the paper's.

    Raises:
        ValueError: `alpha` is not positive, or the model has no input embeddings.
    """
    _validate(alpha=alpha)
    noise = _Noise(alpha)
    model.register_forward_pre_hook(noise.before_model, with_kwargs=True)
    for embeddings in _input_embeddings(model):
        embeddings.register_forward_hook(noise.after_embeddings)
    return model


def _input_embeddings(model: Any) -> list[nn.Module]:
    """Return the embeddings; encoder and decoder may have tables that share only their values."""
    try:
        both = getattr(model.config, "is_encoder_decoder", False)
        parts = [model.get_encoder(), model.get_decoder()] if both else [model]
        return list({id(e): e for e in [part.get_input_embeddings() for part in parts]}.values())
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"model.neftune: {type(model).__name__} does not say where its input embeddings are "
            f"(get_input_embeddings); leave neftune out"
        ) from None


class _Noise:
    """Hooks that share what the model was called with. A copy of the model gets its own."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._masks = kwargs.get("attention_mask"), kwargs.get("position_ids")

    def after_embeddings(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor | None:
        (mask, positions), self._masks = self._masks, (None, None)
        if not (module.training and torch.is_grad_enabled()):
            return None
        shape, width = embedded.shape[:-1], embedded.shape[-1]  # [batch, seq], hidden
        unmasked = mask != 0 if mask is not None and mask.shape == shape else None
        if unmasked is not None:
            lengths = unmasked.sum(-1, keepdim=True).clamp(min=1)  # [batch, 1]
        elif positions is not None and positions.dim() == 2:
            lengths = document_lengths(positions.expand(shape))  # [batch, seq]
        else:
            lengths = torch.full((1,), shape[-1], device=embedded.device)
        size = self.alpha * (lengths * width).rsqrt()
        if unmasked is not None:
            size = size * unmasked
        noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device)
        noise.uniform_(-1.0, 1.0, generator=own_generator(embedded.device)).mul_(size[..., None])
        return embedded + noise.to(embedded.dtype)


def document_lengths(position_ids: Tensor) -> Tensor:
    """Return the length of each token's document, where positions restart: both `[batch, seq]`."""
    starts = torch.ones_like(position_ids, dtype=torch.long)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    document = starts.cumsum(-1) - 1
    lengths = torch.zeros_like(document).scatter_add_(-1, document, torch.ones_like(document))
    return lengths.gather(-1, document)


def own_generator(device: torch.device) -> torch.Generator:
    """Return a generator for this rank, seeded from torch's global one, which all ranks share."""
    seed = int(torch.randint(2**62, ()))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.Generator(device).manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)
