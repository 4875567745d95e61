"""Export the trained adapters alone, in peft's own format."""

# No `from __future__ import annotations`: see `ditty_di.export.base`.
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ditty_di.adapters import adapter_config, adapter_state
from ditty_di.export.base import Export, published_as
from ditty_di.export.gather import only_part


@dataclass(eq=False)
class AdapterExport(Export):
    """Write `adapter_model.safetensors`, `adapter_config.json` and the tokenizer.

    Stock `peft.PeftModel.from_pretrained(base, path)` opens the folder, and `task=generate_folder`
    follows the `generation_config.json` beside them.

    Arguments are those of `Export`, and:

    Args:
        base: what `adapter_config.json` names as the base; None is where the base was read from.
        revision: of the base on the Hub; None is the one that was read.

    Raises:
        ValueError: a model without adapters, or with pipeline stages.
    """

    base: str | None = None
    revision: str | None = None

    def check(self, model: Any) -> None:
        """Raise ValueError for a model without adapters, or an unknown base."""
        adapter_file(model, self.base, self.revision)

    def __call__(self, model_parts: list[nn.Module]) -> None:
        """Write the adapters; called on every rank."""
        model: Any = only_part(model_parts)
        config = adapter_file(model, self.base, self.revision)
        state_dict = adapter_state(model)  # gathers on all ranks
        if state_dict is None:
            return
        base = config["base_model_name_or_path"]
        record = {"kind": "adapter", "base": base, "revision": config["revision"]}
        record |= published_as(model)
        if model.config.is_encoder_decoder:
            record["seq2seq"] = True
        with self.written(record) as folder:
            write_adapter(folder, config, state_dict)
            generation_config = self.generation_config(model)
            if generation_config is not None:
                generation_config.save_pretrained(folder)
        if self.push_to and Path(base).exists():
            print(
                f"note: the adapter's base is a folder of this machine ({base}); name it as others "
                f"find it with export.base=user/name"
            )


def adapter_file(model: Any, base: str | None, revision: str | None) -> dict[str, Any]:
    """Return the content of `adapter_config.json`; a local base by its absolute path.

    Raises:
        ValueError: the model has no adapters, or their base is unknown.
    """
    config = dict(adapter_config(model))
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            "export: it is unknown which base the adapters belong to; write export.base=PATH or "
            "user/name"
        )
    folder = Path(base).expanduser()
    config["base_model_name_or_path"] = str(folder.absolute()) if folder.is_dir() else base
    config["revision"] = revision or config.get("revision")
    return config


def write_adapter(folder: Path, config: dict[str, Any], state_dict: dict[str, Tensor]) -> None:
    """Write the two files of an adapter in peft's format."""
    save_file(state_dict, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
