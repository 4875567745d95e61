"""One object from a model and data to a trained model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ditty_di import Runtime, Trainer, adapters, export
from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.folder import latest
from ditty_di.data import horizon
from ditty_di.front import batches
from ditty_di.front.precision import precision
from ditty_di.losses import MSELoss
from ditty_di.metrics import JSONLines, Metrics, ProgressBar
from ditty_di.optim import constant, grouped
from ditty_di.optim.bitsandbytes import adamw as bitsandbytes_adamw
from ditty_di.parallelize import recompute
from ditty_di.processors import PostProcessor, PreProcessor, Processors
from ditty_di.tasks.train import train

if TYPE_CHECKING:
    from ditty_di.front.model_factory import ModelFactory
    from ditty_di.front.tokenizer_factory import TokenizerFactory
    from ditty_di.metrics import Writer
    from ditty_di.protocols import Loss, OptimizerFactory


def _torchao_adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


#: What `optim_backend` may say.
OPTIM_BACKENDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torchao": _torchao_adamw,
    "bnb": bitsandbytes_adamw,
}


class Pipeline:
    """Composes a `ditty_di.Trainer` and runs it. A subclass may have its data in `dataset()`.

    Args:
        model_factory: see `ModelFactory`.
        dataset: rows by number, with `collate_fn`; a torch `DataLoader` over such; what
            `Data.prepare` returns. See `ditty_di.front.batches` for what a batch may be.
        tokenizer_factory: its tokenizer goes to `from_huggingface` and beside the export.
        loss_calculator: any loss of `ditty_di.losses`, or one of your own.
        preprocessors, postprocessors: in their order; contracts are checked here and now.
        output_dir: gets `checkpoints/`, `metrics.jsonl` and `export/`; None writes nothing.
        fp16, use_bfloat16: computes in 16 bits, with a scaler for the first; parameters and the
            optimizer keep their dtype. Neither: nothing is rounded.
        accelerator_kwargs: `{"mixed_precision": "no" | "fp16" | "bf16" | "fp8"}`; the last is
            torchao's float8, emulated (slowly) on hardware without it.
        seed: of data order, dropout and new parameters; 0 is a seed like any other.
        batch_size: rows a micro-batch and rank; a loader brings its own.
        grad_accum: micro-batches a rank and optimizer step. The loss is that of one large batch.
        epochs, max_steps: how long; of both, the shorter. Steps are the optimizer's. The last step
            of the last epoch is filled up with rows of the next.
        checkpoint_every: optimizer steps; there is one at the end as well.
        load_checkpoint: go on from the newest in `output_dir`, exactly. False starts anew, where
            there must be none.
        gradient_checkpointing: computes each block again in the backward pass.
        optimizer: a class or partial, called with named parameters; None is AdamW with `lr` and
            `weight_decay`, which decays neither norms nor biases, of 8 bits if `use_8bit_optim`:
            `optim_backend` is `torchao` or `bnb` (bitsandbytes), both also under FSDP2.
        lr_scheduler: called with the optimizer and `total_steps=`; None keeps the rate, which does
            not depend on the number of ranks.
        max_grad_norm: gradients are clipped to this global norm; None clips nothing.
        log_every: steps between reports.
        metrics_logger: one of the writers in `ditty_di.metrics`, or several; beside a progress bar.
        push_to_hub: the export, as `output_hub_repo`, `private_repo` unless False. The token is
            `hf_hub_token`, which is HF_TOKEN while it runs, or else huggingface_hub's own.
        merge_adapters: export the base with the adapters in it, instead of these alone.
        shuffle_each_epoch: a new order each epoch; False keeps the dataset's.
        num_workers: processes that load data.
        trainer_kwargs: any other slot of `ditty_di.Trainer` (`validator`, `callbacks`, ...).

    Attributes:
        trainer, result: of the last `run`.

    Raises:
        ValueError, TypeError: arguments that contradict each other or cannot be honoured.
    """

    def __init__(
        self,
        model_factory: ModelFactory,
        dataset: Any = None,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        tokenizer_factory: TokenizerFactory | None = None,
        loss_calculator: Loss | None = None,
        preprocessors: Sequence[PreProcessor] = (),
        postprocessors: Sequence[PostProcessor] = (),
        output_dir: str | os.PathLike[str] | None = None,
        fp16: bool = False,
        use_bfloat16: bool = False,
        accelerator_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 4,
        grad_accum: int = 1,
        epochs: float | None = None,
        max_steps: int | None = None,
        checkpoint_every: int = 1000,
        load_checkpoint: bool = True,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerFactory | None = None,
        use_8bit_optim: bool = False,
        optim_backend: str = "torchao",
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        lr_scheduler: Callable[..., Any] | None = None,
        max_grad_norm: float | None = 1.0,
        log_every: int = 10,
        metrics_logger: Writer | Sequence[Writer] = (),
        push_to_hub: bool = False,
        output_hub_repo: str | None = None,
        hf_hub_token: str | None = None,
        private_repo: bool = True,
        merge_adapters: bool = False,
        shuffle_each_epoch: bool = True,
        num_workers: int = 0,
        trainer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if epochs is None and max_steps is None:
            raise ValueError("Pipeline: write how long to train: epochs= or max_steps=")
        if grad_accum < 1:
            raise ValueError(f"Pipeline: grad_accum={grad_accum}; write 1 or more")
        if push_to_hub and not (output_hub_repo and output_dir):
            raise ValueError(
                "Pipeline: push_to_hub needs output_hub_repo='user/name' and output_dir="
            )
        if merge_adapters and not (model_factory.adapter and tokenizer_factory and output_dir):
            raise ValueError(
                "Pipeline: merge_adapters needs a model with peft_config=, a tokenizer_factory= "
                "and output_dir="
            )
        self.model_factory, self.tokenizer_factory = model_factory, tokenizer_factory
        self._dataset, self.collate_fn = dataset, collate_fn
        self.loss_calculator = MSELoss() if loss_calculator is None else loss_calculator
        self.preprocessors, self.postprocessors = list(preprocessors), list(postprocessors)
        Processors(preprocessors, postprocessors).validate(loss=self.loss_calculator)
        self.output_dir = None if output_dir is None else Path(output_dir).expanduser()
        self.precision = precision(
            fp16=fp16, use_bfloat16=use_bfloat16, accelerator_kwargs=accelerator_kwargs
        )
        self.seed, self.batch_size, self.grad_accum = seed, batch_size, grad_accum
        self.epochs, self.max_steps = epochs, max_steps
        self.checkpoint_every, self.load_checkpoint = checkpoint_every, load_checkpoint
        self.gradient_checkpointing = gradient_checkpointing
        self.optimizer = optimizer or _adamw(use_8bit_optim, optim_backend, lr, weight_decay)
        if optimizer is not None and (use_8bit_optim or (lr, weight_decay) != (1e-4, 0.01)):
            raise ValueError(
                "Pipeline: lr, weight_decay and use_8bit_optim are for the optimizer that is made "
                "here; write them into your own, as optimizer=partial(torch.optim.SGD, lr=0.1)"
            )
        self.lr_scheduler, self.max_grad_norm = lr_scheduler or constant, max_grad_norm
        self.log_every = log_every
        several: Any = metrics_logger
        self.writers = [several] if hasattr(several, "write") else [*several]
        self.push_to = output_hub_repo if push_to_hub else None
        self.hf_hub_token, self.private_repo = hf_hub_token, private_repo
        self.merge_adapters = merge_adapters
        self.shuffle_each_epoch, self.num_workers = shuffle_each_epoch, num_workers
        self.trainer_kwargs = dict(trainer_kwargs or {})

    @property
    def tokenizer(self) -> Any:
        return self.tokenizer_factory and self.tokenizer_factory.build()

    def dataset(self) -> Any:
        """What was passed as `dataset`; a subclass makes its own here, before ranks meet."""
        if self._dataset is None:
            raise ValueError("Pipeline: pass dataset=, or write a subclass with dataset()")
        return self._dataset

    def run(self) -> nn.Module:
        """Trains, exports, and returns the model.

        Under FSDP2 it is in shards, which can be used afterwards only if `torch.distributed` was
        initialised (or a `Runtime` made) before; `export/` has it whole.

        Raises:
            ValueError, CheckpointError, HubError: parts that do not fit, before the first step.
        """
        with _hub_token(self.hf_hub_token):
            trainer, exporter = self.compose()
            self.trainer = trainer
            self.result = train(trainer, exporter)
        return trainer.model_parts[0]

    def compose(self) -> tuple[Trainer, Callable[[list[nn.Module]], None] | None]:
        """The trainer, and what writes the trained model; for those who want to run it themselves.

        Called on every rank.
        """
        factory, slots = self.model_factory, dict(self.trainer_kwargs)
        dataset, tokenizer = self.dataset(), self.tokenizer  # may take long: no rank waits yet
        layout: dict[str, Any] = {"seed": self.seed, **factory.fsdp_config.degrees}
        given = slots.pop("runtime", None)
        runtime = given or Runtime(**layout)
        try:
            return self._placed(runtime, dataset, tokenizer, slots)
        except BaseException:
            if given is None:
                runtime.close()
            raise

    def _placed(
        self, runtime: Runtime, dataset: Any, tokenizer: Any, slots: dict[str, Any]
    ) -> tuple[Trainer, Callable[[list[nn.Module]], None] | None]:
        factory = self.model_factory
        model, weights = factory.build(
            tokenizer=tokenizer, seed=self.seed, precision=self.precision
        )
        exporter = self._exporter(model, tokenizer, runtime)
        loader: Any = batches.dataloader(
            dataset,
            batch_size=self.batch_size,
            collate_fn=self.collate_fn,
            seed=self.seed,
            shuffle=self.shuffle_each_epoch,
            num_workers=self.num_workers,
        )
        if callable(loader):
            loader = loader(dp_rank=runtime.dp_rank, dp_world_size=runtime.dp_world_size)
        global_batch_size = loader.batch_size * self.grad_accum * runtime.dp_world_size
        steps = self._steps(loader, global_batch_size)
        fsdp = factory.fsdp_config
        dtype = fsdp.dtype(self.precision.dtype) if fsdp.enabled else self.precision.dtype
        trainer = Trainer(
            **{
                "runtime": runtime,
                "model": model,
                "weights": weights,
                "parallelize_fn": partial(
                    factory.parallelize,
                    recompute=recompute.full if self.gradient_checkpointing else None,
                    param_dtype=dtype,
                ),
                "loss_fn": self.loss_calculator,
                "preprocessors": self.preprocessors,
                "postprocessors": self.postprocessors,
                "optimizer": self.optimizer,
                "lr_scheduler": partial(self.lr_scheduler, total_steps=steps),
                "dataloader": loader,
                "steps": steps,
                "global_batch_size": global_batch_size,
                "max_norm": math.inf if self.max_grad_norm is None else self.max_grad_norm,
                "grad_scaler": torch.amp.GradScaler(
                    runtime.device.type, enabled=dtype == "float16"
                ),
                "checkpointer": self._checkpointer(runtime),
                "metrics": self._metrics(),
                **slots,
            }
        )
        return trainer, exporter

    def _steps(self, loader: Any, global_batch_size: int) -> int:
        found = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            if not hasattr(loader, "dataset"):
                raise ValueError(
                    f"Pipeline: epochs={self.epochs}, but nobody knows how many rows this loader "
                    f"has; write max_steps="
                )
            rows = loader.dataset
            found.append(
                horizon(epochs=self.epochs, dataset=rows, global_batch_size=global_batch_size)
            )
        return min(found)

    def _checkpointer(self, runtime: Runtime) -> Any:
        if self.output_dir is None:
            return None
        folder = self.output_dir / "checkpoints"
        there = runtime.broadcast(None if self.load_checkpoint else latest(folder))
        if there is not None:
            raise ValueError(
                f"Pipeline: load_checkpoint=False, but {there} is there and would be taken for one "
                f"of the new run; write another output_dir, or remove {folder}"
            )
        return partial(Checkpointer, folder, every=self.checkpoint_every)

    def _metrics(self) -> Metrics:
        writers: list[Any] = [ProgressBar(), *self.writers]
        if self.output_dir is not None:
            writers.append(JSONLines(str(self.output_dir / "metrics.jsonl")))
        return Metrics(writers, every=self.log_every)

    def _exporter(
        self, model: Any, tokenizer: Any, runtime: Runtime
    ) -> Callable[[list[nn.Module]], None] | None:
        """Made before training, so that what cannot be uploaded is known then."""
        if self.output_dir is None:
            return None
        path = str(self.output_dir / "export")
        hub: dict[str, Any] = {"push_to": self.push_to, "private": self.private_repo}
        adapted = hasattr(model, "peft_config")
        if self.merge_adapters:
            return export.MergedExport(tokenizer, path, **hub)
        if adapted and adapters.adapter_config(model).get("base_model_name_or_path"):
            return export.AdapterExport(tokenizer, path, **hub)
        if hasattr(model, "save_pretrained") and not adapted:
            return export.HuggingFaceExport(tokenizer, path, **hub)
        if self.push_to:
            raise ValueError(
                f"Pipeline: push_to_hub is for models of transformers, which others can open; of a "
                f"{type(model).__name__} there are only tensors: upload {path} by "
                f"ditty_di.export.push_folder(path, 'user/name')"
            )
        return export.SafetensorsExport(path)


def _adamw(eight_bit: bool, backend: str, lr: float, weight_decay: float) -> OptimizerFactory:
    """AdamW that decays neither norms nor biases.

    Raises:
        ValueError: no such backend.
    """
    if backend not in OPTIM_BACKENDS:
        raise ValueError(
            f"Pipeline: optim_backend={backend!r} is none of {', '.join(OPTIM_BACKENDS)}"
        )
    adamw = OPTIM_BACKENDS[backend] if eight_bit else torch.optim.AdamW
    return partial(
        grouped,
        optimizer=partial(adamw, lr=lr, weight_decay=weight_decay),
        groups=[{"max_ndim": 1, "weight_decay": 0.0}],
    )


@contextmanager
def _hub_token(token: str | None) -> Iterator[None]:
    """The token where huggingface_hub looks for it."""
    before = os.environ.get("HF_TOKEN")
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if token is not None:
            os.environ.pop("HF_TOKEN")
            if before is not None:
                os.environ["HF_TOKEN"] = before
