"""The trained adapters alone, in peft's own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.export.gather import only_part
from ditty_di.export.publish import Publication
from ditty_di.io import is_first_rank

# torch is imported when a model is exported: the command line must answer without it.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class AdapterExport:
    """Writes `adapter_model.safetensors`, `adapter_config.json` and the tokenizer.

    Beside them `generation_config.json`, which `task=generate_folder` follows. Stock
    `peft.PeftModel.from_pretrained(base, path)` opens the folder. Called with the trainer's model
    parts, on every rank; rank 0 writes.

    Args:
        tokenizer: written beside the adapters.
        path: the folder; one that is there already is replaced once the new one is whole.
        base: what `adapter_config.json` names as the base; None is where the base was read from.
        revision: of the base on the Hub; None is the one that was read.
        run, push_to, private, license: see `publish.Publication`.

    Raises:
        ValueError: a model without adapters, or a pipeline's stages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        *,
        base: str | None = None,
        revision: str | None = None,
        run: str | None = None,
        push_to: str | None = None,
        private: bool = True,
        license: str | None = None,
    ) -> None:
        self.base, self.revision = base, revision
        self.publication = Publication(
            path, tokenizer=tokenizer, run=run, push_to=push_to, private=private, license=license
        )

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Try before the training what the export needs after it; see `Publication.prepare`.

        Raises:
            ValueError: see the class.
        """
        adapter_file(only_part(model_parts), self.base, self.revision)
        if is_first_rank():
            self.publication.prepare()

    def __call__(self, model_parts: list[nn.Module]) -> None:
        from ditty_di.adapters import adapter_state

        model: Any = only_part(model_parts)
        config = adapter_file(model, self.base, self.revision)
        state_dict = adapter_state(model)  # of all ranks
        if state_dict is None:
            return
        base = config["base_model_name_or_path"]
        record = {"kind": "adapter", "base": base, "revision": config["revision"]}
        if model.config.is_encoder_decoder:
            record["seq2seq"] = True
        with self.publication.written(record) as folder:
            write_adapter(folder, config, state_dict)
            generation_config = self.publication.generation_config(model)
            if generation_config is not None:
                generation_config.save_pretrained(folder)
        if self.publication.push_to and Path(base).exists():
            print(
                f"note: the adapter's base is a folder of this machine ({base}); name it as others "
                f"find it with export.base=user/name"
            )


def adapter_file(model: Any, base: str | None, revision: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says; a local base by its absolute path.

    Raises:
        ValueError: no adapters, or nobody knows what they belong to.
    """
    from ditty_di.adapters import adapter_config

    config = dict(adapter_config(model))
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            "export: nothing says which base the adapters belong to; write export.base=PATH or "
            "user/name"
        )
    folder = Path(base).expanduser()
    config["base_model_name_or_path"] = str(folder.absolute()) if folder.is_dir() else base
    config["revision"] = revision or config.get("revision")
    return config


def write_adapter(folder: Path, config: dict[str, Any], state_dict: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state_dict, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
