"""The files of a dataset, brought to this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditty_di.data.tokenization.ranks import rank_and_world
from ditty_di.data.tokenization.sources import Source, all_sources
from ditty_di.messages import readable
from ditty_di.protocols import early_checks


def _validate(*, source: Any = ..., sources: Any = ...) -> None:
    if source is None and not sources:
        all_sources()


@early_checks(validate=_validate)
def download(
    source: Source | None = None,
    sources: Mapping[str, Source] | None = None,
    check: bool = False,
) -> dict[str, Any]:
    """Download what is not here yet; of several ranks only the first does the work.

    Args:
        source: The text, such as `ditty_di.data.tokenization.HubFiles`.
        sources: Or several, by name.
        check: Compare the content of every file with the Hub's digest.

    Raises:
        ValueError: The data have no source; with `check`, a file of another content.
        ConnectionError, FileNotFoundError, PermissionError, OSError: See `hub.download`.
    """
    found: dict[str, Any] = {}
    if rank_and_world()[0]:
        return found
    for name, each in all_sources(source, sources).items():
        found[name or "text"] = each.download(check)
        files, size, folder = (found[name or "text"][k] for k in ("files", "bytes", "folder"))
        print(f"{name or 'text'}: {files} file{'s' * (files != 1)}, {readable(size)}, in {folder}")
    return found
