"""Base class of exports for transformers and peft: folder, tokenizer, model card, upload."""

# No `from __future__ import annotations`: the constructors of dataclasses keep real annotations.
import copy
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ditty_di.data.tokenizer import without_limits
from ditty_di.export.card import write_card
from ditty_di.export.folder import replaced_whole, write_record
from ditty_di.export.gather import only_part
from ditty_di.export.hub import HubError, push_folder, require_ready
from ditty_di.io import is_first_rank
from ditty_di.models import generation


@dataclass(eq=False)
class Export:
    """Write a trained model into a folder, with tokenizer and model card, and upload it if asked.

    An export is called with the trainer's model parts on every rank; rank 0 writes.

    Args:
        tokenizer: saved beside the weights.
        path: folder to write; an earlier export there is replaced once the new one is complete.
        run: run directory that the model card is written from; None leaves its parts out.
        push_to: `user/name` on the Hub; None does not upload.
        private: whether a repository that has to be created is private.
        license: for the card; a name that the Hub knows, such as apache-2.0.
        processor: of a vision-language model, saved with its tokenizer; None for other models.

    Raises:
        HubError: the upload cannot work, such as without a token; raised before training.
    """

    tokenizer: PreTrainedTokenizerBase
    path: str
    _: KW_ONLY
    run: str | None = None
    push_to: str | None = None
    private: bool = True
    license: str | None = None
    processor: Any = None

    def __post_init__(self) -> None:
        self.folder = Path(self.path).expanduser()
        if self.push_to is not None and os.environ.get("RANK", "0") == "0":
            try:
                require_ready(self.push_to)
            except HubError as error:
                raise HubError(f"export.push_to={self.push_to}: {error}") from error

    def prepare(self, model_parts: list[nn.Module]) -> None:
        """Check before training what the export needs after it.

        Args:
            model_parts: the trainer's.

        Raises:
            ValueError: the model cannot be exported like this, or the folder cannot be written.
        """
        self.check(only_part(model_parts))
        if is_first_rank():
            require_writable(self.folder, self.processor or self.tokenizer)

    def check(self, model: Any) -> None:
        """Raise ValueError for a model that cannot be exported like this; called on every rank."""
        raise NotImplementedError

    def __call__(self, model_parts: list[nn.Module]) -> None:
        """Write the export; called on every rank.

        Args:
            model_parts: the trainer's.
        """
        raise NotImplementedError

    def generation_config(self, model: Any) -> GenerationConfig | None:
        """Return how the exported model generates; None for a model that does not generate.

        It is the model's own config, with the tokens that end a turn of the chat template among
        its end tokens, and without values that transformers refuses to save, which are printed.
        """
        own = getattr(model, "generation_config", None)
        if own is None:
            return None
        config = copy.deepcopy(own)
        config.use_cache = True  # off while training
        if self.tokenizer is not None:
            generation.end_with_turns(config, self.tokenizer)
        config, reset = generation.savable(config)
        if reset:
            print(
                f"{generation.FILE}: left out {generation.shown(reset)}, which contradicts the "
                f"rest (transformers ignores it, and refuses to save it)"
            )
        return config

    @contextmanager
    def written(self, record: dict[str, Any]) -> Iterator[Path]:
        """Yield a folder for the weights, then complete, rename and upload it.

        Args:
            record: what `export.json` and the card say (`card.write_card`); it may grow inside.

        Raises:
            HubError: the upload failed; the folder is complete.
        """
        with replaced_whole(self.folder) as folder:
            yield folder
            for part in (self.tokenizer, self.processor):
                if part is not None:
                    with without_limits(getattr(part, "tokenizer", part)):
                        part.save_pretrained(folder)
            if self.push_to:
                record |= {"push_to": self.push_to, "private": self.private}
            write_record(folder, record)
            write_card(folder, record, run=self.run, license=self.license, name=self.push_to)
        print(f"exported: {self.folder}")
        if self.push_to:
            push_folder(self.folder, self.push_to, private=self.private)


def require_writable(folder: Path, tokenizer: Any = None) -> None:
    """Raise ValueError when a folder cannot be written, or the tokenizer cannot be saved."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export.path={folder} is a file; write export.path=FOLDER")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as trial:
            if tokenizer is not None:
                tokenizer.save_pretrained(trial)
    except OSError as error:
        raise ValueError(
            f"export.path={folder} cannot be written: {error}; write export.path=FOLDER"
        ) from error


def published_as(model: Any) -> dict[str, str]:
    """Return `auto`, the class of transformers that opens a model, and its `pipeline_tag`.

    Empty for a model that `ditty_di.models.hugging_face` has not built.
    """
    names = {"auto": "auto_class", "pipeline_tag": "pipeline_tag"}
    found = {key: getattr(model, name, None) for key, name in names.items()}
    return {key: value for key, value in found.items() if value is not None}
