"""An exported folder on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditty_di.export.folder import read_record
from ditty_di.export.hub import HubError, push_folder
from ditty_di.io import is_first_rank


def push(folder: str, to: str | None = None, private: bool | None = None) -> dict[str, Any]:
    """Upload an exported folder as a repository; of several ranks only the first does the work.

    Args:
        folder: The exported folder.
        to: The repository `user/name`; None: the export's `push_to`.
        private: Make it private; None: the export's `private`, else true.

    Raises:
        HubError: It could not be uploaded, or the repository is not given; see `hub.push_folder`.
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
