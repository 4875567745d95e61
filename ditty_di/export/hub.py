"""Uploading an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Files of an earlier upload that the new one does not bring again are taken out: shards of
#: another size would otherwise stay beside the new ones, and be loaded.
_STALE = ["*.safetensors", "*.safetensors.index.json"]


NO_NAME = "{to!r} is no name of a repository; write user/name"
NO_TOKEN = "there is no token for the Hub: type `hf auth login`, or set HF_TOKEN"
OFFLINE = "HF_HUB_OFFLINE is set, so nothing can be uploaded"


class HubError(RuntimeError):
    """An upload that did not happen; the message is one sentence and how to go on."""


def require_ready(to: str) -> None:
    """What can be known before a training whose result is to be uploaded, without a network.

    Raises:
        HubError: no name of a repository, no token, or offline mode.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        if to.count("/") != 1:
            raise ValueError
        validate_repo_id(to)
    except ValueError as error:
        raise HubError(NO_NAME.format(to=to)) from error
    if constants.HF_HUB_OFFLINE:
        raise HubError(OFFLINE)
    if get_token() is None:
        raise HubError(NO_TOKEN)


def push_folder(
    folder: str | Path,
    to: str,
    *,
    private: bool = True,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads a folder as the repository `to`; returns its address.

    A repeated call sends only what is not there yet, so an interrupted upload is completed by the
    same call. The token is huggingface_hub's own (`HF_TOKEN`, or `hf auth login`).

    Args:
        to: `user/name`; made if it does not exist.
        private: of a repository that is made. One that is public already is refused unless False.
        endpoint: of another hub than `HF_ENDPOINT` says.

    Raises:
        HubError: no folder, no token, no permission, no connection, ...
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser()
    if not any(folder.glob("*.safetensors")):
        raise HubError(f"push: {folder} is no exported folder: it has no .safetensors file in it")
    api = HfApi(endpoint=endpoint)
    with _explained(folder, to, private, api.endpoint):
        require_ready(to)
        api.create_repo(to, private=private, exist_ok=True)
        if private and not api.repo_info(to).private:
            raise HubError(f"{to} exists and is public: say private=false if that is meant")
        _upload(api, folder, to, message or f"Upload {folder.name}")
    address = f"{api.endpoint}/{to}"
    print(f"pushed to {address}{' (private)' if private else ''}")
    return address


def _upload(api: Any, folder: Path, to: str, message: str) -> None:
    """Through Xet where it is installed; where it fails, once more with plain HTTP uploads.

    Not every hub, proxy or mirror speaks Xet, and its errors do not tell why it failed.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils._runtime import is_xet_available

    upload: dict[str, Any] = {
        "repo_id": to,
        "folder_path": folder,
        "commit_message": message,
        "delete_patterns": _STALE,
    }
    if not is_xet_available():
        api.upload_folder(**upload)
        return
    try:
        api.upload_folder(**upload)
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise
        with _without_xet():
            api.upload_folder(**upload)


@contextmanager
def _without_xet() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True  # what the variable of that name sets, read at each upload
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def _explained(folder: Path, to: str, private: bool, endpoint: str) -> Iterator[None]:
    """Whatever goes wrong inside, as one sentence, and the command that completes the upload."""
    try:
        yield
    except Exception as error:
        command = f"python -m ditty_di task=push folder={shlex.quote(str(folder))} to={to}"
        raise HubError(
            f"push: {_reason(error, to, endpoint)}\n  the export is whole in {folder}; to upload "
            f"it, type: {command}{'' if private else ' private=false'}"
        ) from error


def _reason(error: BaseException, to: str, endpoint: str) -> str:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for found in chain:
        if isinstance(found, HubError):
            return str(found)
        if isinstance(found, HfHubHTTPError):
            return _status(found, to, endpoint)
    for found in chain:
        if isinstance(found, httpx.HTTPError | OSError):
            return f"no connection to {endpoint} ({type(found).__name__}: {found})"
    return f"{type(error).__name__}: {error}"


def _status(error: Any, to: str, endpoint: str) -> str:
    code = error.response.status_code
    said = error.server_message or str(error).splitlines()[0]
    if code == 401:
        return f"{endpoint} does not accept the token (401): type `hf auth login` again"
    if code == 403:
        return f"the token may not write to {to} (403): it needs write permission there"
    if code == 404:
        return f"{endpoint} has no {to}, or the token may not see it (404)"
    return f"{endpoint} answered {code}: {said}"
