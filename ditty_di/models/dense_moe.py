"""A mixture of experts that is trained densely and run sparsely: DS-MoE.

Pan et al. 2024, Dense Training, Sparse Inference: Rethinking Training of Mixture-of-Experts
Language Models (arXiv:2404.05567). In training every token goes through all experts, whose outputs
are weighted by a softmax of the router's logits, so all experts and the router get whole gradients.
At inference a token goes to the experts of the highest probabilities alone, with the same weights.
The blocks are Llama's, with a mixture in place of each feed-forward layer; attention, which the
paper mixes too, is Llama's own.

This file imports torch and transformers alone: an export has a copy of it, with which stock
transformers opens the model (`trust_remote_code=True`).
"""

# No `from __future__ import annotations`: transformers makes dataclasses of configurations.
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder


class DenseMoEConfig(LlamaConfig):
    """A Llama with mixtures of experts.

    Args:
        intermediate_size: features inside one expert.
        num_experts: experts of each block.
        inference_top_k: experts of a token at inference; None takes all.
        inference_threshold: at inference a token goes to the experts whose probability is at least
            this, and to the most probable one; None takes all.
        others: those of `LlamaConfig`.

    Raises:
        ValueError: numbers out of range, or both ways to choose experts.
    """

    model_type = "dense_moe"
    base_model_tp_plan = None  # type: ignore[assignment]
    num_experts: int = 8
    inference_top_k: int | None = None
    inference_threshold: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the numbers."""
        top_k, threshold = self.inference_top_k, self.inference_threshold
        if top_k is not None and not 1 <= top_k <= self.num_experts:
            raise ValueError(f"inference_top_k={top_k}: write 1 to {self.num_experts}, or null")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"inference_threshold={threshold}: write between 0 and 1, or null")
        if top_k is not None and threshold is not None:
            raise ValueError("inference_top_k and inference_threshold: write one of them")
        super().__post_init__(**kwargs)


class DenseMoERouter(nn.Module):
    """Probabilities of all experts for each token.

    Args:
        config: of the model.
    """

    def __init__(self, config: DenseMoEConfig) -> None:
        super().__init__()
        self.top_k, self.threshold = config.inference_top_k, config.inference_threshold
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits and weights, `[tokens, experts]`, and the most probable experts.

        Args:
            hidden: `[tokens, hidden]`.

        Returns:
            Logits; weights in float32, at inference 0 where a token does not go; numbers of the
            experts that a token would go to at inference (the first of them with a threshold).
        """
        logits = F.linear(hidden, self.weight)
        weights = logits.float().softmax(-1)
        few = 1 if self.threshold is not None else self.top_k or weights.shape[1]
        chosen = weights.topk(few, -1).indices
        if not self.training and few < weights.shape[1]:
            kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, chosen, True)
            if self.threshold is not None:
                kept |= weights >= self.threshold
            weights = weights * kept
        return logits, weights, chosen


class DenseMoEMLP(nn.Module):
    """All experts in three matrices: expert e has the e-th part of the features inside.

    So the sum of the weighted experts is one product, and the layers are plain `nn.Linear`.

    Args:
        config: of the model.
    """

    def __init__(self, config: DenseMoEConfig) -> None:
        super().__init__()
        self.num_experts, self.size = config.num_experts, config.intermediate_size
        features = self.num_experts * self.size
        self.router = DenseMoERouter(config)
        self.gate_proj = nn.Linear(config.hidden_size, features, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, features, bias=False)
        self.down_proj = nn.Linear(features, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the sum of the experts' outputs by their weights, `[..., hidden]`."""
        x = hidden.flatten(0, -2)  # [tokens, hidden]
        _, weights, chosen = self.router(x)
        weights = weights.to(x.dtype)
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        plain = all(type(layer) is nn.Linear for layer in layers)
        if not self.training and plain and chosen.shape[1] < self.num_experts:
            return self._sparse(x, weights).view_as(hidden)
        inside = self.act_fn(self.gate_proj(x)) * self.up_proj(x)  # [tokens, experts * size]
        inside = inside.unflatten(-1, (self.num_experts, self.size)) * weights[..., None]
        return self.down_proj(inside.flatten(-2)).view_as(hidden)

    def _sparse(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run each expert on the tokens that go to it."""
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            tokens = weights[:, expert].nonzero()[:, 0]
            if not tokens.numel():
                continue
            own = slice(expert * self.size, (expert + 1) * self.size)
            given = x[tokens]
            gate = F.linear(given, self.gate_proj.weight[own])
            inside = self.act_fn(gate) * F.linear(given, self.up_proj.weight[own])
            inside = inside * weights[tokens, expert, None]
            found = F.linear(inside, self.down_proj.weight[:, own])
            out = out.index_add(0, tokens, found.to(out.dtype))
        return out


class DenseMoEPreTrainedModel(LlamaPreTrainedModel):
    """Base of the models: how they are initialized, and what of them is recorded."""

    config: DenseMoEConfig
    _can_record_outputs = {  # noqa: RUF012
        **LlamaPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(DenseMoERouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DenseMoERouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DenseMoEModel(LlamaModel, DenseMoEPreTrainedModel):
    """The decoder without its head."""

    config: DenseMoEConfig

    def __init__(self, config: DenseMoEConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = DenseMoEMLP(config)
        self.post_init()


class DenseMoEForCausalLM(LlamaForCausalLM, DenseMoEPreTrainedModel):
    """The language model."""

    config: DenseMoEConfig

    def __init__(self, config: DenseMoEConfig) -> None:
        super().__init__(config)
        self.model = DenseMoEModel(config)
        self.post_init()


AutoConfig.register(DenseMoEConfig.model_type, DenseMoEConfig, exist_ok=True)
AutoModelForCausalLM.register(DenseMoEConfig, DenseMoEForCausalLM, exist_ok=True)
DenseMoEConfig.register_for_auto_class()
DenseMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
