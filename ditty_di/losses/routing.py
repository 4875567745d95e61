"""Losses and metrics of the routers of a mixture of experts."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ditty_di.batch import Batch, document_index
from ditty_di.losses.base import Loss
from ditty_di.losses.composite import CompositeLoss, named_losses
from ditty_di.models.routers import (
    NO_CHOICE,
    NO_ROUTERS,
    RECORDER,
    RouterRecorder,
    Routing,
    record_routers,
    router_without_choice,
    routers,
)
from ditty_di.protocols import Loss as AnyLoss

log = logging.getLogger(__name__)

TWO_STACKS = """\
loss_fn: {model} is an encoder-decoder, whose routers see the tokens of two sequences; router \
losses are for decoders, write another loss"""
SPLIT = """\
runtime.{name}={degree}: router losses need the routing of whole rows and of all layers on one \
rank, or in the stages of pipeline=stages; write runtime.{name}=1, or loss=causal_lm"""
NOT_RECORDED = """\
loss: no router of the model was recorded; call `prepare_model` of the loss on the model (the \
trainer does it), and the loss after each forward pass"""
OTHER_TOKENS = """\
loss: a router has decided about {routed} tokens, and the batch has {given}; router losses need a \
model that routes exactly the tokens of its input"""
NOT_USED = """\
the model's configuration asks for router logits, but the loss has no part for them: its \
router_aux_loss_coef is not applied; write loss=moe loss.balance=COEFFICIENT"""


def routers_fit(parts: Any, degrees: Any) -> list[str]:
    """Return why router losses do not fit a model and its layout: a rule of `parallelize.fits`."""
    name = type(parts.model).__name__
    if next(routers(parts.model), None) is None:
        return [NO_ROUTERS.format(model=name)]
    if getattr(getattr(parts.model, "config", None), "is_encoder_decoder", False):
        return [TWO_STACKS.format(model=name)]
    if (router := router_without_choice(parts.model)) is not None:
        return [NO_CHOICE.format(name=router)]
    pipeline = getattr(parts.pipeline_fn, "func", parts.pipeline_fn)
    in_stages = hasattr(pipeline, "stage_losses") and getattr(parts.loss_fn, "of_stage", None)
    whole = {"tp": degrees.tp, "pp": 1 if in_stages else degrees.pp}
    return [SPLIT.format(name=axis, degree=n) for axis, n in whole.items() if n > 1]


def warn_unused(model: nn.Module) -> None:
    """Log a warning where the model's own router loss would be dropped.

    Args:
        model: the model, prepared for its loss.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    asked = getattr(text, "output_router_logits", False)
    if asked and getattr(text, "router_aux_loss_coef", 0) and RECORDER not in vars(model):
        log.warning(NOT_USED)


class RouterLoss(Loss):
    """Load-balancing loss and z-loss of all routers, a mean over tokens and layers.

        balance * E * sum_i f_i P_i  +  z * logsumexp(logits)^2  -  information * I(expert; token)

    The first term is that of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, equations 4
    to 6) for one sequence, as in DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20): of the tokens
    of a sequence, `f_i` is the fraction that goes to expert i of E, and `P_i` the mean probability
    of it. It is a product of two means, so it does not add up over micro-batches if they are taken
    over a batch; over a sequence it does, for any number of micro-batches and ranks. A sequence is
    a row, or a document where `position_ids` tell documents apart, and has the weight of its
    tokens. With K experts of a token its value is K if the load is even; for one layer and one
    sequence it is transformers' `load_balancing_loss_func`. The second term is the z-loss of
    ST-MoE (Zoph et al. 2022, arXiv:2202.08906, equation 5). The third is the mutual information of
    DS-MoE (Pan et al. 2024, arXiv:2404.05567), also of a sequence: the entropy of its mean
    probabilities less the mean entropy of a token's, for models that are trained densely.

    Tokens count up to the last one of their sequence with a label: padding does not, a prompt
    without labels does. In evaluation mode the loss is 0 and only its metrics are computed, so that
    validation losses are those of the tokens.

    Args:
        balance: factor of the load-balancing loss.
        z: factor of the z-loss.
        information: factor of the mutual information; 0 does not compute it.
        sigmoid: probabilities are sigmoids of the logits divided by their sum, as in DeepSeek-V3,
            in place of a softmax.
        per_expert: also report the load of each expert of each layer.
        ignore_index: label value of tokens without a label.
        name: prefix of its metrics in a composite.

    Metrics: `balance`, `z` and `information` (in nats), without their factors; `entropy` of the
    routers' probabilities, in nats; in training `load_max`, the load of the busiest expert of any
    layer divided by the mean load of its layer (1 is even), and with `per_expert`
    `load/LAYER/EXPERT`, likewise divided. Numbers of a step are those of all its micro-batches and
    ranks.

    Raises:
        ValueError: a factor is negative or not finite.
    """

    fits = (routers_fit,)

    @staticmethod
    def validate(*, balance: float = 0.0, z: float = 0.0, information: float = 0.0) -> None:
        """Raise ValueError for factors that are negative or not finite."""
        factors = {"balance": balance, "z": z, "information": information}
        for key, factor in factors.items():
            if not 0 <= factor < float("inf"):
                raise ValueError(f"{key}={factor}: write 0 or more")

    def __init__(
        self,
        *,
        balance: float = 0.01,
        z: float = 0.001,
        information: float = 0.0,
        sigmoid: bool = False,
        per_expert: bool = False,
        ignore_index: int = -100,
        name: str = "router",
    ) -> None:
        super().__init__()
        self.validate(balance=balance, z=z, information=information)
        self.balance, self.z, self.information = balance, z, information
        self.sigmoid, self.per_expert = sigmoid, per_expert
        self.ignore_index, self.name = ignore_index, name
        self._recorder: RouterRecorder | None = None

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Return the model, whose routers are recorded from now on.

        Raises:
            ValueError: the model has no routers.
        """
        self._recorder = record_routers(model)
        return model

    def num_valid(self, batch: Batch, /) -> Tensor:
        """Return the number of routed tokens that count, shape `[]`, int64."""
        return routed_tokens(batch, self.ignore_index).sum()

    def forward(
        self, output: Any, batch: Batch, num_valid_global: Tensor, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this batch's part of the loss, and of each metric, in float32.

        Raises:
            ValueError: no routing was recorded, or not that of the batch's tokens.
        """
        shape, routings = self._recorder.take() if self._recorder is not None else (None, [])
        if shape is None or self._recorder is None:
            raise ValueError(NOT_RECORDED)
        if not routings:  # a pipeline stage without routers
            return torch.zeros((), device=num_valid_global.device), {}
        counts = routed_tokens(batch, self.ignore_index).flatten()  # [tokens]
        sequence, number = _sequences(batch)
        tokens = _sums(counts.float(), sequence, number).clamp(min=1)  # [sequences]
        sums: dict[str, list[Tensor]] = defaultdict(list)
        own = _without_padding(routings, shape, batch.inputs["input"].shape[:2])
        load = torch.zeros(self._recorder.layers, own[0].logits.shape[1], device=counts.device)
        for layer, logits, chosen in own:
            logits = torch.where(counts[:, None], logits.float(), 0.0)  # [tokens, experts]
            probabilities = self._probabilities(logits)
            goes = torch.zeros_like(logits).scatter_(1, chosen, 1.0) * counts[:, None]
            assigned = _sums(goes, sequence, number)  # [sequences, experts]
            expected = _sums(probabilities * counts[:, None], sequence, number)
            balance = ((assigned * expected).sum(1) / tokens).sum() * logits.shape[1]
            informed = probabilities if self.information else probabilities.detach()
            entropy = (_entropy(informed) * counts).sum()
            sums["balance"].append(balance)
            sums["z"].append((logits.logsumexp(1).square() * counts).sum())
            sums["entropy"].append(entropy)
            if self.information:
                of_means = _entropy(expected / tokens[:, None])  # [sequences]
                sums["information"].append((of_means * tokens).sum() - entropy)
            load[layer] = assigned.sum(0)
        count = self._recorder.layers * num_valid_global
        means = {key: torch.stack(of).sum() / count for key, of in sums.items()}
        metrics = {key: value.detach() for key, value in means.items()}
        if not self.training:
            return metrics["balance"].new_zeros(()), metrics
        metrics["load"] = load / num_valid_global  # [layers, experts]
        loss = self.balance * means["balance"] + self.z * means["z"]
        if self.information:
            loss = loss - self.information * means["information"]
        return loss, metrics

    def of_stage(self, batch: Batch, num_valid_global: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the part of the layers of a pipeline stage before the last one.

        Args:
            batch: the micro-batch that the stage ran last.
            num_valid_global: as in `forward`.
        """
        return self.forward(None, batch, num_valid_global)

    def summarize(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the metrics with ratios in place of the summed load `[layers, experts]`.

        Args:
            metrics: sums over the optimizer step.
        """
        if "load" not in metrics:
            return metrics
        load = metrics["load"]
        ratios = load / load.mean(1, keepdim=True).clamp(min=1e-20)
        found = {key: value for key, value in metrics.items() if key != "load"}
        found["load_max"] = ratios.max()
        if self.per_expert:
            found |= {
                f"load/{layer}/{expert}": ratio
                for layer, row in enumerate(ratios)
                for expert, ratio in enumerate(row)
            }
        return found

    def extra_repr(self) -> str:
        """Return the factors."""
        return f"balance={self.balance:g}, z={self.z:g}, information={self.information:g}"

    def _probabilities(self, logits: Tensor) -> Tensor:
        if not self.sigmoid:
            return logits.softmax(1)
        scores = logits.sigmoid()
        return scores / (scores.sum(1, keepdim=True) + 1e-20)


class RoutedLoss(CompositeLoss):
    """A loss of the tokens and a `RouterLoss`, each with its own count.

    A model's own `router_aux_loss_coef` is used only where the model computes its loss from labels,
    which the trainer does not let it do: nothing counts twice, and `balance` is the coefficient, on
    the same scale.

    Args:
        loss: of the tokens, such as `CrossEntropyLoss` or `LinearCrossEntropyLoss`.
        balance: see `RouterLoss`, as for the other arguments.
        z: factor of the z-loss.
        information: factor of the mutual information.
        sigmoid: the routers' probabilities are normalized sigmoids.
        per_expert: also report the load of each expert.
        name: prefix of its metrics within another composite.

    Metrics: as in `CompositeLoss`; those of the routers begin with `router/`.
    """

    parts_argument = "loss"
    validate = staticmethod(RouterLoss.validate)

    def __init__(
        self,
        loss: AnyLoss,
        *,
        balance: float = 0.01,
        z: float = 0.001,
        information: float = 0.0,
        sigmoid: bool = False,
        per_expert: bool = False,
        name: str | None = None,
    ) -> None:
        router = RouterLoss(
            balance=balance,
            z=z,
            information=information,
            sigmoid=sigmoid,
            per_expert=per_expert,
            ignore_index=getattr(loss, "ignore_index", -100),
        )
        super().__init__([(loss, 1.0), (router, 1.0)], name=name)

    @classmethod
    def parts_for(cls, *, loss: Any = None, **others: Any) -> list[tuple[str, Any]]:
        """Return the loss of the tokens by name, of an argument that may not be built yet."""
        return [(name, part) for name, part, _ in named_losses([(loss, 1.0)])]


def routed_tokens(batch: Batch, ignore_index: int) -> Tensor:
    """Return which tokens count for their routers, bool `[rows, seq]`.

    Those up to the last one of their sequence with a label, without what `attention_mask` excludes;
    where there is not one label a token, all that it does not exclude.

    Args:
        batch: on any device, after the preprocessors.
        ignore_index: label value of tokens without a label.
    """
    ids, labels = batch.inputs["input"], batch.target
    counts = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    mask = batch.inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == counts.shape:
        counts = mask != 0
    if not (isinstance(labels, Tensor) and labels.shape == counts.shape):
        return counts
    length = counts.shape[1]
    at = torch.arange(length, device=ids.device)
    labeled = torch.where(labels != ignore_index, at, length)
    following = labeled.flip(1).cummin(1).values.flip(1)  # the next token with a label
    counts = counts & (following < length)
    if (documents := _documents(batch)) is not None:
        counts = counts & (documents.gather(1, following.clamp(max=length - 1)) == documents)
    return counts


def _documents(batch: Batch) -> Tensor | None:
    """Return the number of each token's document within its row, where rows have several."""
    positions = batch.inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != batch.inputs["input"].shape[:2]:
        return None
    return document_index(positions)


def _sequences(batch: Batch) -> tuple[Tensor, int]:
    """Return the number of each token's sequence, `[tokens]`, and a bound of these numbers."""
    ids, documents = batch.inputs["input"], _documents(batch)
    rows, length = ids.shape[:2]
    row = torch.arange(rows, device=ids.device)[:, None].expand(rows, length)
    if documents is None:
        return row.flatten(), rows
    # As many as tokens at most: their true number would have to be waited for.
    return (row * length + documents).flatten(), rows * length


def _without_padding(
    routings: list[Routing], shape: tuple[int, ...], own: torch.Size
) -> list[Routing]:
    """Return the routing of a batch `own` that pipeline stages have padded to a larger `shape`.

    Raises:
        ValueError: the routers saw other tokens than those of the batch.
    """
    shape, routed = shape or tuple(own), len(routings[0].logits)
    if routed != shape[0] * shape[1] or shape[0] < own[0] or shape[1] < own[1]:
        raise ValueError(OTHER_TOKENS.format(routed=routed, given=list(own)))
    if shape == tuple(own):
        return routings

    def part(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, shape)[: own[0], : own[1]].flatten(0, 1)

    return [Routing(layer, part(logits), part(chosen)) for layer, logits, chosen in routings]


def _sums(values: Tensor, sequence: Tensor, number: int) -> Tensor:
    """Return the sum over the tokens of each sequence, `[sequences, ...]`."""
    return values.new_zeros(number, *values.shape[1:]).index_add(0, sequence, values)


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of the last dimension, in nats; its gradient is finite at 0."""
    return torch.special.entr(probabilities.clamp(min=1e-20)).sum(-1)
