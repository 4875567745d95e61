"""An exported folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditty_di.export.folder import read_record
from ditty_di.export.hub import HubError, push_folder
from ditty_di.io import is_first_rank


def push(folder: str, to: str | None = None, private: bool | None = None) -> dict[str, Any]:
    """Uploads `folder` as the repository `to` (`user/name`).

    What is None is as the export was told by `push_to` and `private`; without such a word a
    repository is private. Of several ranks the first does the work.

    Raises:
        HubError: it could not be uploaded, or nobody said where to; see `hub.push_folder`.
    """
    if not is_first_rank():
        return {}
    path = Path(folder).expanduser()
    record = read_record(path)
    to = to or record.get("push_to")
    if to is None:
        raise HubError(f"push: {path} does not say where it is to go; add to=user/name")
    if private is None:
        private = record.get("private", True)
    return {"address": push_folder(path, to, private=private), "folder": str(path)}
