"""What torchtitan has removed since 0.3.0, or leaves to its trainer: batches and model inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor

import ditty_di.compat  # noqa: F401

# isort: split
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.distributed import full_dtensor
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.distributed.spmd_types import annotate_input_spmd_types
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder

from ditty_di import protocols
from ditty_di.batch import Batch
from ditty_di.postponed import postponed
from ditty_di.runtime import Runtime
from ditty_di.training.step import TrainStep

with postponed(
    {
        "datasets": ("Dataset", "load_dataset"),  # with pandas and pyarrow
        "datasets.distributed": ("split_dataset_by_node",),
        "torch._functorch.partitioners": ("get_default_op_list",),  # with networkx
        "torch.utils.tensorboard": ("SummaryWriter",),
        "torchtitan.components.quantization.utils": ("has_quantization",),  # with torchao
    }
):
    import torchtitan.trainer


class TitanTrainer(torchtitan.trainer.Trainer):
    """torchtitan's trainer with a composed optimizer step.

    Every public method of torchtitan's class works, or raises and names what to call instead. A
    subclass sets the attributes.
    """

    runtime: Runtime
    metrics_processor: protocols.MetricsProcessor
    optimizer_step: TrainStep
    model_config: Any

    def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[Batch]:
        """Yield the loader's batches on the CPU, and count tokens and loading time.

        Args:
            data_iterable: yields `Batch` objects or pairs `(inputs, labels)`.

        Raises:
            DataloaderExhaustedError: the data has ended.
        """
        metrics, data_iterator = self.metrics_processor, iter(data_iterable)
        while True:
            start = time.perf_counter()
            try:
                batch = Batch.of(next(data_iterator))
            except StopIteration as error:
                raise DataloaderExhaustedError from error
            metrics.ntokens_since_last_log += batch.labels.numel()
            metrics.data_loading_times.append(time.perf_counter() - start)
            yield batch

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Return the model's input, the labels and the model's keyword arguments.

        Attention masks of torchtitan models are built here, their sequences are split for context
        parallelism, tensors are annotated or distributed for the SPMD backend, and tokens counted.
        A subclass may override it.

        Args:
            input_dict: the model's arguments on the device; `"input"` is the positional one.
            labels: labels on the device.

        Raises:
            ValueError: with context parallelism, inputs without `positions`.
        """
        keywords = {name: value for name, value in input_dict.items() if name != "input"}
        inputs, positions, dims = input_dict["input"], keywords.get("positions"), self.parallel_dims
        if isinstance(self.model_config, Decoder.Config) and positions is not None:
            attention = getattr(self.model_config.first_attention, "inner_attention", None)
            if isinstance(attention, FlexAttention.Config | VarlenAttention.Config):
                decoder: Any = self.model_parts[0]
                keywords["attention_masks"] = decoder.get_attention_masks(positions=positions)
        self.ntokens_seen += labels.numel()
        if dims.cp_enabled and self.optimizer_step.split is None:
            if positions is None:
                raise ValueError(
                    "runtime.cp > 1 splits the sequences of a batch: its inputs need `positions` "
                    "[rows, length], and the model's attention must gather the parts, as "
                    "torchtitan's does; for models of transformers write parallelize=fsdp, for "
                    "others runtime.cp=1"
                )
            inputs, labels, keywords = prepare_context_parallel_input(
                inputs, labels, keywords, dims.get_mesh("cp"), self.device, None, None
            )
        if dims.spmd_backend == "full_dtensor":
            return full_dtensor.parallelize_inputs(dims, inputs, labels, keywords)
        if dims.spmd_backend == "spmd_types":
            return annotate_input_spmd_types(dims, inputs, labels, keywords)
        return inputs, labels, keywords

    def _prepare_inputs(self, batch: Batch) -> Batch:
        inputs, labels, keywords = self.post_dataloading_process(batch.inputs, batch.labels)
        batch = replace(batch, inputs={"input": inputs, **keywords}, labels=labels)
        return self.optimizer_step.own_part(batch)

    def forward_backward_step(
        self, *, input_dict: Any, labels: Any, global_valid_tokens: Tensor
    ) -> Tensor:
        """Accumulate the gradients of a micro-batch, or of a list of them; return the loss.

        Args:
            input_dict: the model's arguments by name, or a list of such.
            labels: labels, or a list of them.
            global_valid_tokens: valid elements of the whole optimizer step, on the device.
        """
        several = isinstance(input_dict, list)
        pairs = zip(input_dict, labels, strict=True) if several else [(input_dict, labels)]
        batches = [Batch(*pair) for pair in pairs]
        return self.optimizer_step.forward_backward(batches, global_valid_tokens)

    def pp_forward_backward_step(self, **ignored: Any) -> NoReturn:
        """Raise NotImplementedError: `forward_backward_step` runs the pipeline schedule too."""
        raise NotImplementedError("call forward_backward_step, which runs the pipeline schedule")

    def init_distributed(self) -> NoReturn:
        """Raise NotImplementedError: a `Runtime` initializes the process group."""
        raise NotImplementedError("pass runtime=ditty_di.Runtime(...), which sets up the ranks")
