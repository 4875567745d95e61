"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._runtime import is_xet_available

from ditty_di.messages import causes

#: Files of an earlier upload that the new one does not replace are deleted: shards of another size
#: would otherwise stay beside the new ones, and be loaded.
_STALE = ["*.safetensors", "*.safetensors.index.json"]

#: Explanations of the Hub's answers by HTTP status.
_STATUS = {
    401: "{endpoint} does not accept the token (401): type `hf auth login` again",
    403: "the token may not write to {to} (403): it needs write permission there",
    404: "{endpoint} has no {to}, or the token may not see it (404)",
}


class HubError(RuntimeError):
    """An upload failed; the message says why and how to go on."""


def require_ready(to: str) -> None:
    """Check what an upload needs and what can be known without a network.

    Args:
        to: the repository, `user/name`.

    Raises:
        HubError: not a repository's name, no token, or offline mode.
    """
    try:
        if to.count("/") != 1:
            raise ValueError
        validate_repo_id(to)
    except ValueError as error:
        raise HubError(f"{to!r} is not a repository's name; write user/name") from error
    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded")
    if get_token() is None:
        raise HubError("there is no token for the Hub: type `hf auth login`, or set HF_TOKEN")


def push_folder(
    folder: str | Path,
    to: str,
    *,
    private: bool = True,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a folder as the repository `to`, and return its address.

    A repeated call sends only what is missing there, so it completes an interrupted upload. The
    token is huggingface_hub's own (`HF_TOKEN`, or `hf auth login`).

    Args:
        folder: an exported folder.
        to: `user/name`; created if it does not exist.
        private: whether a repository that is created is private. A public one that exists is
            refused unless this is False.
        message: of the commit; None names the folder.
        endpoint: address of another hub than that of `HF_ENDPOINT`.

    Raises:
        HubError: no folder, token, permission, connection, ...
    """
    folder = Path(folder).expanduser()
    if not any(folder.glob("*.safetensors")):
        raise HubError(f"push: {folder} is not an exported folder: it has no .safetensors file")
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


def _upload(api: HfApi, folder: Path, to: str, message: str) -> None:
    """Upload through Xet where it is installed, and once more over plain HTTP where that fails.

    Not every hub, proxy or mirror supports Xet, and its errors do not say why it failed.
    """
    transports: list[Any] = [nullcontext, _without_xet] if is_xet_available() else [nullcontext]
    for transport in transports:
        try:
            with transport():
                api.upload_folder(
                    repo_id=to, folder_path=folder, commit_message=message, delete_patterns=_STALE
                )
            return
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
            if refused or transport is transports[-1]:
                raise


@contextmanager
def _without_xet() -> Iterator[None]:
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True  # the variable of that name; read at each upload
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def _explained(folder: Path, to: str, private: bool, endpoint: str) -> Iterator[None]:
    """Turn any error into one sentence and the command that completes the upload."""
    try:
        yield
    except Exception as error:
        command = f"python -m ditty_di task=push folder={shlex.quote(str(folder))} to={to}"
        raise HubError(
            f"push: {_reason(error, to, endpoint)}\n  the export is whole in {folder}; to upload "
            f"it, type: {command}{'' if private else ' private=false'}"
        ) from error


def _reason(error: BaseException, to: str, endpoint: str) -> str:
    chain = [*causes(error)]
    for found in chain:
        if isinstance(found, HubError):
            return str(found)
        if isinstance(found, HfHubHTTPError):
            code = found.response.status_code
            answer: Any = found.server_message or str(found).splitlines()[0]
            text = _STATUS.get(code, "{endpoint} answered {code}: {answer}")
            return text.format(endpoint=endpoint, to=to, code=code, answer=answer)
    for found in chain:
        if isinstance(found, httpx.HTTPError | OSError):
            return f"no connection to {endpoint} ({type(found).__name__}: {found})"
    return f"{type(error).__name__}: {error}"
