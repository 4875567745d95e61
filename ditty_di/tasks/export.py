"""A trained model as a folder of safetensors that others can open."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch is imported when a task runs: the command line must answer without it.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from ditty_di.protocols import WeightsFn


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    weights: WeightsFn | None = None,
    *,
    path: str,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Writes a Hugging Face model folder (see `HuggingFaceExport`), on the CPU in one process.

    `weights` fills a model that is on meta, usually from a checkpoint. Of several ranks the first
    does the work, the others return at once.
    """
    if int(os.environ.get("RANK", "0")):
        return {}
    import torch

    from ditty_di.tasks.loading import ready

    ready(model, weights, torch.device("cpu"))
    HuggingFaceExport(tokenizer, path, dtype=dtype, max_shard_size=max_shard_size)([model])
    return {"path": path}


class HuggingFaceExport:
    """Writes config, safetensors and tokenizer for transformers' `from_pretrained`.

    Called with the trainer's model parts, on every rank: sharded parameters are gathered one by
    one, and rank 0 keeps copies on the CPU and writes. An export that is there already is replaced
    once the new one is whole.

    `dtype`: a name in torch for the floating-point values; None keeps each tensor's own.

    Raises:
        ValueError: a pipeline's stages instead of one whole model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        *,
        dtype: str | None = None,
        max_shard_size: str = "5GB",
    ) -> None:
        self.tokenizer, self.path = tokenizer, Path(path).expanduser()
        self.dtype, self.max_shard_size = dtype, max_shard_size

    def __call__(self, model_parts: list[nn.Module]) -> None:
        state_dict = gathered(model_parts, self.dtype)
        if state_dict is None:
            return
        model: Any = model_parts[0]
        with replaced_whole(self.path) as folder:
            with _quiet():
                model.save_pretrained(
                    folder, state_dict=state_dict, max_shard_size=self.max_shard_size
                )
            self.tokenizer.save_pretrained(folder)
            _correct_config(folder, model, self.dtype)
        print(f"exported for transformers: {self.path}")


class SafetensorsExport:
    """Writes `model.safetensors` alone, for a model of any kind; otherwise as `HuggingFaceExport`.

    Tied parameters are written once, under the first of their names.
    """

    def __init__(self, path: str, *, dtype: str | None = None) -> None:
        self.path, self.dtype = Path(path).expanduser(), dtype

    def __call__(self, model_parts: list[nn.Module]) -> None:
        state_dict = gathered(model_parts, self.dtype)
        if state_dict is None:
            return
        from safetensors.torch import save_file

        with replaced_whole(self.path) as folder:
            save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
        print(f"exported: {self.path}/model.safetensors")


def gathered(model_parts: list[nn.Module], dtype: str | None) -> dict[str, Tensor] | None:
    """Whole parameters and saved buffers on the CPU by name, on rank 0; None on other ranks.

    Every rank must call it. Tied parameters come once; names are without wrappers' segments.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from ditty_di.names import canonical_fqn

    if len(model_parts) != 1:
        raise ValueError(
            f"export: the model is split into {len(model_parts)} pipeline stages; save a "
            f"checkpoint and export that instead: task=export run=FOLDER"
        )
    (model,) = model_parts
    keep = not dist.is_initialized() or dist.get_rank() == 0
    wanted = getattr(torch, dtype) if dtype else None
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in _saved(model):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                cast = wanted if whole.is_floating_point() else None
                found[canonical_fqn(name)] = whole.detach().to("cpu", cast, copy=True).contiguous()
    return found if keep else None


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    persistent = set(model.state_dict())
    yield from ((name, b) for name, b in model.named_buffers() if name in persistent)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar, which draws over the training's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _correct_config(folder: Path, model: nn.Module, dtype: str | None) -> None:
    """Undoes in the written files what training changed: class, key-value cache, dtype."""
    from torch.distributed.fsdp import FSDPModule

    def change(file: Path, of: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        if file.exists():
            config = json.loads(file.read_text(encoding="utf-8"))
            text = json.dumps(config | of(config), indent=2, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")

    # fully_shard puts a class of its own before the model's: FSDPLlamaForCausalLM.
    own = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    architecture = {"architectures": [own.__name__]} | ({"dtype": dtype} if dtype else {})
    cached = {"use_cache": True}
    change(folder / "config.json", lambda c: architecture | (cached if "use_cache" in c else {}))
    change(folder / "generation_config.json", lambda c: cached if "use_cache" in c else {})


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `path` when nothing went wrong inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not path.exists():  # died between the two renames below
        old.rename(path)
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir()
    yield new
    for file in new.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
