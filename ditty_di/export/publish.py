"""What all exports have in common: a folder with a record and a card, and a way to the Hub."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditty_di.export.card import write_card
from ditty_di.export.folder import replaced_whole, write_record
from ditty_di.export.hub import HubError, push_folder, require_ready
from ditty_di.io import is_first_rank

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class Publication:
    """Where an export goes. Only the first rank uses it.

    Args:
        path: the folder; an export that is there already is replaced once the new one is whole.
        tokenizer: saved beside the weights.
        run: the run directory that the card is written from.
        push_to: `user/name` on the Hub, or None.
        private: of a repository that has to be made.
        license: for the card; a name that the Hub knows, such as apache-2.0.

    Raises:
        HubError: a `push_to` that cannot work, such as without a token: before training, not after.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        run: str | None,
        push_to: str | None,
        private: bool,
        license: str | None,
    ) -> None:
        self.path, self.tokenizer, self.run = Path(path).expanduser(), tokenizer, run
        self.push_to, self.private, self.license = push_to, private, license
        if push_to is not None and is_first_rank():
            try:
                require_ready(push_to)
            except HubError as error:
                raise HubError(f"export.push_to={push_to}: {error}") from error

    def prepare(self) -> None:
        """Try now what would fail after the training: the folder and the tokenizer's files.

        Raises:
            ValueError: the folder cannot be written, or the tokenizer cannot be saved.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"export.path={self.path} is a file; write export.path=FOLDER")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".export-") as folder:
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise ValueError(
                f"export.path={self.path} cannot be written: {error}; write export.path=FOLDER"
            ) from error

    def generation_config(self, model: Any) -> GenerationConfig | None:
        """Return how the exported model generates; None for one that does not generate.

        The model's own config, with the tokens that end a turn of the chat template among its end
        tokens, and without values that transformers refuses to save, which are printed.
        """
        from ditty_di.models import generation

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
        """A folder for the weights; tokenizer, `export.json` and `README.md` come with it.

        Afterwards the folder has its name, and is uploaded if that was asked for. `record` may
        grow inside; see `card.write_card` for what it tells.

        Raises:
            HubError: it could not be uploaded; the folder stays.
        """
        with replaced_whole(self.path) as folder:
            yield folder
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if self.push_to:
                record |= {"push_to": self.push_to, "private": self.private}
            write_record(folder, record)
            write_card(folder, record, run=self.run, license=self.license, name=self.push_to)
        print(f"exported: {self.path}")
        if self.push_to:
            push_folder(self.path, self.push_to, private=self.private)
