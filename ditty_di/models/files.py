"""The files of a pretrained model: in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import (
    constants,
    errors,
    hf_hub_download,
    parse_safetensors_file_metadata,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import validate_repo_id

from ditty_di.models.safetensors import Safetensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
#: Files with the weights, or the index that lists them, in transformers' order of preference.
WHERE = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


class ModelFiles:
    """Find a model's files by name, and download those on the hub that are asked for.

    Args:
        path: a folder that `save_pretrained` wrote, or the hub's `user/name`.
        revision: branch, tag or commit on the hub; None is its main branch.

    Raises:
        FileNotFoundError: no such folder, and not a valid name on the hub.
        ValueError: a revision of a folder.
    """

    def __init__(self, path: str | os.PathLike[str], revision: str | None = None) -> None:
        self.path, self.revision = os.fspath(path), revision
        folder = Path(path).expanduser()
        self.folder = folder if folder.is_dir() else None
        if self.folder is not None:
            if revision is not None:
                raise ValueError(
                    f"revision={revision!r}: {folder} is a folder and has no revisions; leave it "
                    f"out"
                )
            return
        try:
            validate_repo_id(self.path)
        except errors.HFValidationError:
            raise FileNotFoundError(f"there is no folder {folder}") from None

    def find(self, name: str, *, needed: bool = False) -> Path | None:
        """Return the path of a file, downloaded if it is on the hub; None if it does not exist.

        Args:
            name: of the file.
            needed: whether to raise ConnectionError where the hub cannot be reached and the file
                is not in its cache. Otherwise that happens only if the cache has nothing of the
                model.
        """
        if self.folder is not None:
            file = self.folder / name
            return file if file.is_file() else None
        with _explained(self.path, self.revision):
            try:
                return Path(hf_hub_download(self.path, name, revision=self.revision))
            except errors.EntryNotFoundError as error:
                offline = isinstance(error, FileNotFoundError)
                if offline and (needed or not self._is_cached(CONFIG)):
                    raise
                return None

    def config(self) -> Path:
        """Return the path of `config.json`; raise FileNotFoundError without one."""
        file = self.find(CONFIG, needed=True)
        if file is None:
            raise FileNotFoundError(
                f"{self._where()} has no {CONFIG}, so it is not a Hugging Face model; give one "
                f"that `save_pretrained` wrote"
            )
        return file

    def weights(self) -> list[Path]:
        """Return the files with the weights; of several sets the one that transformers takes.

        That is the file which `config.json` names as `transformers_weights`, else the first of
        `model.safetensors`, the files of its index, and the same as `pytorch_model.bin`; else all
        safetensors files.

        Raises:
            FileNotFoundError: there are none, or one of the index is missing.
        """
        named = json.loads(config.read_text()) if (config := self.find(CONFIG)) else {}
        explicit = named.get("transformers_weights")
        for name in (explicit,) if explicit else WHERE:
            found = self.find(name)
            if found is not None:
                return self._listed(found) if name.endswith(".json") else [found]
        self.find(explicit or WEIGHTS, needed=True)  # raises when the hub could not be asked
        files = sorted(self._download("*.safetensors").glob("*.safetensors"))
        if explicit or not files:
            what = f"{explicit}, which its {CONFIG} names" if explicit else ".safetensors file"
            raise FileNotFoundError(
                f"{self._where()} has no {what}; save the model with `save_pretrained`, which "
                f"writes safetensors"
            )
        return files

    def tensor_names(self) -> list[str]:
        """Return the names of the tensors; for a model on the hub, headers are enough."""
        if self.folder is None and not self._is_cached(WEIGHTS):
            try:
                header = parse_safetensors_file_metadata(self.path, WEIGHTS, revision=self.revision)
                return list(header.tensors)
            except (OSError, httpx.HTTPError):  # `weights` says what is wrong, if something is
                if (index := self.find(INDEX)) is not None:
                    return list(json.loads(index.read_text())["weight_map"])
        return Safetensors(self.weights()).names()

    def identity(self) -> dict[str, Any]:
        """Return which weights these are: path, revision (the hub's commit) and hash.

        The hash covers the configuration, each file's size, the header of safetensors (names,
        shapes, types) and 64 samples of 4 KiB of the data, so it costs little for a model of any
        size. It does not depend on the model's path.
        """
        config = self.config()
        digest = hashlib.sha256(config.read_bytes())
        for file in self.weights():
            size = file.stat().st_size
            digest.update(f"{file.name}/{size}".encode())
            with file.open("rb") as data:
                is_safetensors = file.suffix != ".bin"
                header = int.from_bytes(data.read(8), "little") if is_safetensors else 0
                digest.update(data.read(min(header, size)))
                for i in range(64):
                    data.seek(8 + header + i * max(0, size - 8 - header - 4096) // 63)
                    digest.update(data.read(4096))
        commit = None if self.folder is not None else config.parent.name
        return {"path": self.path, "revision": commit, "hash": digest.hexdigest()}

    def _listed(self, index: Path) -> list[Path]:
        """Return the files that an index lists."""
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        folder = self._download(names)
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{self._where()} lacks {file.name}, which its {index.name} lists; copy or "
                    f"download it again"
                )
        return files

    def _download(self, patterns: str | list[str]) -> Path:
        """Return the folder that has the files matching the patterns."""
        if self.folder is not None:
            return self.folder
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

    def _is_cached(self, name: str) -> bool:
        return isinstance(try_to_load_from_cache(self.path, name, revision=self.revision), str)

    def _where(self) -> str:
        if self.folder is not None:
            return f"the folder {self.folder}"
        return f"{self.path} on the hub"


@contextmanager
def _explained(path: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one sentence about `path`."""
    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{path} is gated: accept its license at {hub}/{path}, then set HF_TOKEN or run "
            f"`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {path!r}, and the hub at {hub} shows no model of that name; if "
            f"it is private, set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(
            f"{path} has no revision {revision!r}; see {hub}/{path}/tree/main for those that it has"
        ) from None
    except errors.LocalEntryNotFoundError:
        offline = constants.HF_HUB_OFFLINE
        raise ConnectionError(
            f"there is no folder {path!r}, the model is not (wholly) in the cache "
            f"{constants.HF_HUB_CACHE}, and "
            f"{'HF_HUB_OFFLINE is set' if offline else f'{hub} cannot be reached'}"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(
            f"the hub at {hub} answered {error.response.status_code} for {path}; try again later"
        ) from error
