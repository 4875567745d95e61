"""The files of a pretrained model: in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
#: Files with the weights, or the index that lists them, in the order in which transformers looks.
WHERE = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


class ModelFiles:
    """Finds a model's files by name, and downloads those of the hub that are asked for.

    Args:
        path: a folder that `save_pretrained` wrote, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.

    Raises:
        FileNotFoundError: no such folder, and no name that the hub could have.
        ValueError: a revision of a folder.
    """

    def __init__(self, path: str | os.PathLike[str], revision: str | None = None) -> None:
        self.path, self.revision = os.fspath(path), revision
        folder = Path(path).expanduser()
        self.folder = folder if folder.is_dir() else None
        if self.folder is not None and revision is not None:
            raise ValueError(
                f"revision={revision!r}: {folder} is a folder and has no revisions; leave it out"
            )
        if self.folder is None and not _may_be_on_the_hub(self.path):
            raise FileNotFoundError(f"there is no folder {folder}")

    def find(self, name: str, *, needed: bool = False) -> Path | None:
        """The file; None when the model has none of that name.

        Without the hub, a file that is not in its cache may exist there: that raises
        ConnectionError if the file is `needed`, or nothing of the model is in the cache.
        """
        if self.folder is not None:
            file = self.folder / name
            return file if file.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        with _explained(self.path, self.revision):
            try:
                return Path(hf_hub_download(self.path, name, revision=self.revision))
            except EntryNotFoundError as error:
                if isinstance(error, FileNotFoundError) and (needed or not self._known()):
                    raise
                return None

    def config(self) -> Path:
        """Its `config.json`; FileNotFoundError when there is none."""
        file = self.find(CONFIG, needed=True)
        if file is None:
            raise FileNotFoundError(
                f"{self._where()} has no {CONFIG}, so it is no Hugging Face model; give one that "
                f"`save_pretrained` wrote"
            )
        return file

    def weights(self) -> list[Path]:
        """The files with the weights, of several sets in one folder the one transformers takes.

        That is the file which `config.json` names as `transformers_weights`, else the first of
        `model.safetensors`, the files of its index, and the same as `pytorch_model.bin`; else all
        safetensors files.

        Raises:
            FileNotFoundError: there are none, or one of the index is not there.
        """
        named = json.loads(config.read_text()) if (config := self.find(CONFIG)) else {}
        explicit = named.get("transformers_weights")
        for name in (explicit,) if explicit else WHERE:
            found = self.find(name)
            if found is not None:
                return self._listed(found) if name.endswith(".json") else [found]
        self.find(explicit or WEIGHTS, needed=True)  # says when the hub could not be asked
        files = sorted(self._folder_of("*.safetensors").glob("*.safetensors"))
        if explicit or not files:
            what = f"{explicit}, which its {CONFIG} names" if explicit else ".safetensors file"
            raise FileNotFoundError(
                f"{self._where()} has no {what}; save the model with `save_pretrained`, which "
                f"writes safetensors"
            )
        return files

    def tensor_names(self) -> list[str]:
        """Names of the tensors in the files; of a model on the hub, headers are enough."""
        from ditty_di.models.safetensors import Safetensors

        if self.folder is None and (names := self._names_on_the_hub()) is not None:
            return names
        return Safetensors(self.weights()).names()

    def _names_on_the_hub(self) -> list[str] | None:
        """Names that need no download of weights; None where there are none such."""
        import httpx
        from huggingface_hub import parse_safetensors_file_metadata, try_to_load_from_cache

        if isinstance(try_to_load_from_cache(self.path, WEIGHTS, revision=self.revision), str):
            return None  # the file is here already
        try:
            header = parse_safetensors_file_metadata(self.path, WEIGHTS, revision=self.revision)
            return list(header.tensors)
        except (OSError, httpx.HTTPError):  # `weights` says what is wrong, if something is
            index = self.find(INDEX)
            return None if index is None else list(json.loads(index.read_text())["weight_map"])

    def _listed(self, index: Path) -> list[Path]:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = self._all(names)
        for name, file in zip(names, files, strict=True):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{self._where()} lacks {name}, which its {index.name} lists; copy or "
                    f"download it again"
                )
        return files

    def identity(self) -> dict[str, Any]:
        """What the weights are: path, revision (the hub's commit) and hash.

        The hash covers the configuration, each file's size, the header of safetensors (names,
        shapes, types) and 64 samples of 4 KiB of the data, so it costs little for a model of any
        size. It does not depend on where the model lies.
        """
        config = self.config()
        digest = hashlib.sha256(config.read_bytes())
        for file in self.weights():
            size = file.stat().st_size
            digest.update(f"{file.name}/{size}".encode())
            with file.open("rb") as data:
                safetensors = file.suffix != ".bin"
                header = int.from_bytes(data.read(8), "little") if safetensors else 0
                digest.update(data.read(min(header, size)))
                for i in range(64):
                    data.seek(8 + header + i * max(0, size - 8 - header - 4096) // 63)
                    digest.update(data.read(4096))
        commit = None if self.folder is not None else config.parent.name
        return {"path": self.path, "revision": commit, "hash": digest.hexdigest()}

    def _all(self, names: list[str]) -> list[Path]:
        folder = self._folder_of(names)
        return [folder / name for name in names]

    def _folder_of(self, patterns: str | list[str]) -> Path:
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        with _explained(self.path, self.revision):
            return Path(
                snapshot_download(
                    self.path,
                    # The commit that the configuration came from, whatever was pushed since.
                    revision=self.config().parent.name,
                    allow_patterns=patterns,
                    ignore_patterns="*/*",
                )
            )

    def _known(self) -> bool:
        """Whether anything of this model is in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.path, CONFIG, revision=self.revision), str)

    def _where(self) -> str:
        if self.folder is not None:
            return f"the folder {self.folder}"
        return f"{self.path} on the hub"


def _may_be_on_the_hub(path: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


@contextmanager
def _explained(path: str, revision: str | None) -> Iterator[None]:
    """Says in one sentence what the hub's answer means for whoever wrote `path`."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{path} is gated: accept its licence at {constants.ENDPOINT}/{path}, then set "
            f"HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {path!r}, and the hub at {constants.ENDPOINT} shows no model of "
            f"that name; if it is private, set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{path} has no revision {revision!r}; see {constants.ENDPOINT}/{path}/tree/main for "
            f"those that it has"
        ) from None
    except errors.LocalEntryNotFoundError:
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        raise ConnectionError(
            f"there is no folder {path!r}, the model is not (wholly) in the cache "
            f"{constants.HF_HUB_CACHE}, and {why}"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(
            f"the hub at {constants.ENDPOINT} answered {error.response.status_code} for {path}; "
            f"try again later"
        ) from error
