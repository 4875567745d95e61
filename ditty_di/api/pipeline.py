"""One object from a model and data to a trained model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditty_di import Runtime, Trainer, adapters, export
from ditty_di.api import batches
from ditty_di.api.model_factory import ModelFactory
from ditty_di.api.precision import precision
from ditty_di.api.tokenizer_factory import TokenizerFactory
from ditty_di.checkpoint import Checkpointer
from ditty_di.checkpoint.folder import latest
from ditty_di.config.targets import locate
from ditty_di.data import training_steps
from ditty_di.loggers import JSONLines, MetricsProcessor, ProgressBar
from ditty_di.loggers.processor import Logger
from ditty_di.losses import MSELoss
from ditty_di.optim import constant, grouped
from ditty_di.parallelize import activation_checkpointing
from ditty_di.processors import PostProcessor, PreProcessor, Processors
from ditty_di.protocols import Loss, OptimizerFactory
from ditty_di.replaced import replaced
from ditty_di.tasks.train import train

#: The 8-bit AdamW of each `optim_backend`, imported when it is used.
OPTIM_BACKENDS = {
    "torchao": "torchao.optim.AdamW8bit",
    "bnb": "ditty_di.optim.bitsandbytes.adamw",
}


class Pipeline:
    """Compose a `ditty_di.Trainer` and run it. A subclass may define its data in `dataset()`.

    Args:
        model_factory: see `ModelFactory`.
        dataset: a map-style dataset, with `collate_fn`; a torch `DataLoader` over one; or what
            `Data.prepare` returns. See `ditty_di.api.batches` for what a batch may be.
        collate_fn: makes a batch of a list of rows; None is torch's `default_collate`.
        tokenizer_factory: its tokenizer goes to `from_huggingface` and into the export.
        loss_calculator: any loss of `ditty_di.losses`, or one of your own; None is `MSELoss`.
        preprocessors: in their order; their contracts are checked here.
        postprocessors: the same, after the model.
        output_dir: gets `checkpoints/`, `metrics.jsonl` and `export/`; None writes nothing.
        fp16: compute in float16, with a gradient scaler; parameters and the optimizer keep their
            dtype.
        use_bfloat16: compute in bfloat16; parameters and the optimizer keep their dtype.
        accelerator_kwargs: `{"mixed_precision": "no" | "fp16" | "bf16" | "fp8"}`; the last is
            torchao's float8, emulated (slowly) on hardware without it.
        seed: of data order, dropout and new parameters; 0 is a seed like any other.
        batch_size: rows per micro-batch and rank; a loader brings its own.
        grad_accum: micro-batches per rank and optimizer step. The loss is that of one large batch.
        epochs: training length in epochs; the last step of the last epoch is filled up with rows of
            the next.
        max_steps: training length in optimizer steps; with `epochs`, the shorter counts.
        checkpoint_every: optimizer steps between checkpoints; there is one at the end as well.
        load_checkpoint: resume exactly from the newest checkpoint in `output_dir`. False starts
            anew, and there must be none.
        gradient_checkpointing: recompute each block in the backward pass.
        optimizer: a class or partial, called with named parameters; None is AdamW.
        use_8bit_optim: keep the moments of AdamW in 8 bits.
        optim_backend: of the 8-bit AdamW: `torchao` or `bnb` (bitsandbytes), both also under FSDP2.
        lr: learning rate of AdamW.
        weight_decay: of AdamW, which decays neither norms nor biases.
        lr_scheduler: called with the optimizer and `max_steps=`; None keeps the rate, which does
            not depend on the number of ranks.
        max_grad_norm: clip gradients to this global norm; None does not clip.
        log_every: optimizer steps between log lines.
        metrics_logger: one of the loggers in `ditty_di.loggers`, or several, beside a progress bar.
        push_to_hub: upload the export.
        output_hub_repo: repository to upload to, as `user/name`.
        hf_hub_token: HF_TOKEN while the pipeline runs; None uses huggingface_hub's own.
        private_repo: whether a new repository is private.
        merge_adapters: export the base with the adapters merged into it, not the adapters alone.
        shuffle_each_epoch: a new order for each epoch; False keeps the dataset's.
        num_workers: processes that load data.
        trainer_kwargs: any other slot of `ditty_di.Trainer` (`validator`, `callbacks`, ...).

    Attributes:
        trainer: of the last `run`.
        result: what the last `run` reported.

    Raises:
        ValueError, TypeError: arguments that contradict each other or are not supported.
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
        metrics_logger: Logger | Sequence[Logger] = (),
        push_to_hub: bool = False,
        output_hub_repo: str | None = None,
        hf_hub_token: str | None = None,
        private_repo: bool = True,
        merge_adapters: bool = False,
        shuffle_each_epoch: bool = True,
        num_workers: int = 0,
        trainer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        own = optimizer is not None
        for wrong, message in (
            (
                epochs is None and max_steps is None,
                "write how long to train: epochs= or max_steps=",
            ),
            (grad_accum < 1, f"grad_accum={grad_accum}; write 1 or more"),
            (
                push_to_hub and not (output_hub_repo and output_dir),
                "push_to_hub needs output_hub_repo='user/name' and output_dir=",
            ),
            (
                merge_adapters and not (model_factory.adapter and tokenizer_factory and output_dir),
                "merge_adapters needs a model with peft_config=, a tokenizer_factory= and "
                "output_dir=",
            ),
            (
                own and (use_8bit_optim or (lr, weight_decay) != (1e-4, 0.01)),
                "lr, weight_decay and use_8bit_optim configure the default optimizer; write them "
                "into your own, as optimizer=partial(torch.optim.SGD, lr=0.1)",
            ),
            (
                not own and optim_backend not in OPTIM_BACKENDS,
                f"optim_backend={optim_backend!r} is not one of {', '.join(OPTIM_BACKENDS)}",
            ),
        ):
            if wrong:
                raise ValueError(f"Pipeline: {message}")
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
        if optimizer is None:
            adamw = locate(OPTIM_BACKENDS[optim_backend]) if use_8bit_optim else torch.optim.AdamW
            optimizer = partial(
                grouped,
                optimizer=partial(adamw, lr=lr, weight_decay=weight_decay),
                groups=[{"max_ndim": 1, "weight_decay": 0.0}],  # neither norms nor biases
            )
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler or constant
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        several: Any = metrics_logger
        self.log_every = log_every
        self.loggers = [several] if hasattr(several, "write") else [*several]
        self.push_to = output_hub_repo if push_to_hub else None
        self.hf_hub_token, self.private_repo = hf_hub_token, private_repo
        self.merge_adapters = merge_adapters
        self.shuffle_each_epoch, self.num_workers = shuffle_each_epoch, num_workers
        self.trainer_kwargs = dict(trainer_kwargs or {})

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `tokenizer_factory`; None without one."""
        return self.tokenizer_factory and self.tokenizer_factory.build()

    def dataset(self) -> Any:
        """Return what was passed as `dataset`; a subclass makes its own, before ranks meet."""
        if self._dataset is None:
            raise ValueError("Pipeline: pass dataset=, or write a subclass with dataset()")
        return self._dataset

    def run(self) -> nn.Module:
        """Train, export, and return the model.

        Under FSDP2 the model is sharded, and can be used afterwards only if `torch.distributed` was
        initialized (or a `Runtime` made) before; `export/` has it whole.

        Raises:
            ValueError, CheckpointError, HubError: components that do not fit, before the first
                step.
        """
        token = self.hf_hub_token
        with nullcontext() if token is None else replaced(os.environ, "HF_TOKEN", token):
            self.trainer, exporter = self.compose()
            self.result = train(self.trainer, exporter)
        return self.trainer.model_parts[0]

    def compose(self) -> tuple[Trainer, Callable[[list[nn.Module]], None] | None]:
        """Return the trainer, and what exports the trained model; to be called on every rank."""
        factory, slots = self.model_factory, dict(self.trainer_kwargs)
        fsdp = factory.fsdp_config
        dataset, tokenizer = self.dataset(), self.tokenizer  # slow: before any rank waits
        with ExitStack() as on_error:
            runtime = slots.pop("runtime", None)
            if runtime is None:
                runtime = Runtime(seed=self.seed, **fsdp.degrees)
                on_error.callback(runtime.close)
            model, weights = factory.build(
                tokenizer=tokenizer, seed=self.seed, precision=self.precision
            )
            exporter = self._exporter(model, tokenizer)
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
            dtype = self.precision.dtype
            dtype = fsdp.dtype(dtype) if fsdp.enabled else dtype
            parallelize = partial(
                fsdp,
                compile=factory.compile,
                activation_checkpointing=activation_checkpointing.full
                if self.gradient_checkpointing
                else None,
                param_dtype=dtype,
            )
            made: dict[str, Any] = {
                "runtime": runtime,
                "model": model,
                "weights": weights,
                "parallelize_fn": parallelize,
                "loss_fn": self.loss_calculator,
                "preprocessors": self.preprocessors,
                "postprocessors": self.postprocessors,
                "optimizer": self.optimizer,
                "lr_scheduler": partial(self.lr_scheduler, max_steps=steps),
                "dataloader": loader,
                "max_steps": steps,
                "global_batch_size": global_batch_size,
                "max_grad_norm": self.max_grad_norm,
                "grad_scaler": torch.amp.GradScaler(
                    runtime.device.type, enabled=dtype == "float16"
                ),
                "checkpointer": self._checkpointer(runtime),
                "logger": self._logger(),
            }
            trainer = Trainer(**{**made, **slots})
            on_error.pop_all()
        return trainer, exporter

    def _steps(self, loader: Any, global_batch_size: int) -> int:
        found = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None:
            if not hasattr(loader, "dataset"):
                raise ValueError(
                    f"Pipeline: epochs={self.epochs}, but this loader has no dataset to count rows "
                    f"of; write max_steps="
                )
            rows = loader.dataset
            found.append(
                training_steps(
                    epochs=self.epochs, dataset=rows, global_batch_size=global_batch_size
                )
            )
        return min(found)

    def _checkpointer(self, runtime: Runtime) -> Any:
        if self.output_dir is None:
            return None
        folder = self.output_dir / "checkpoints"
        existing = runtime.broadcast(None if self.load_checkpoint else latest(folder))
        if existing is not None:
            raise ValueError(
                f"Pipeline: load_checkpoint=False, but {existing} is there, and would be taken for "
                f"a checkpoint of the new run; write another output_dir, or remove {folder}"
            )
        return partial(Checkpointer, folder, save_interval=self.checkpoint_every)

    def _logger(self) -> MetricsProcessor:
        loggers: list[Any] = [ProgressBar(), *self.loggers]
        if self.output_dir is not None:
            loggers.append(JSONLines(str(self.output_dir / "metrics.jsonl")))
        return MetricsProcessor(loggers, log_interval=self.log_every)

    def _exporter(self, model: Any, tokenizer: Any) -> Callable[[list[nn.Module]], None] | None:
        """Return what exports the model; made before training, to fail early."""
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
