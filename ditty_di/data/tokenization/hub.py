"""Files of a dataset on the Hugging Face Hub: resumed, checked, and found again offline."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ditty_di.data.cache import cache_folder, fingerprint
from ditty_di.io import read_json, write_json
from ditty_di.messages import readable

log = logging.getLogger(__name__)


def download(
    repo: str,
    patterns: Sequence[str],
    revision: str | None = None,
    choose: Callable[[dict[str, int]], list[str]] = sorted,
    check: bool = False,
) -> tuple[Path, list[str]]:
    """Return a folder with the files of a dataset that match patterns, and their names.

    Files in the cache are not downloaded again, and a broken file goes on where it broke off. The
    list of a finished download is kept, so that it is found without a network.

    Args:
        repo: The dataset, `user/name`.
        patterns: Of the files' names.
        revision: Branch, tag or commit; None: the main branch.
        choose: Returns the names to take of the matching files and their sizes.
        check: Compare the content of every file with the Hub's digest.

    Raises:
        FileNotFoundError: No such dataset, revision or files.
        PermissionError: The dataset is gated.
        ConnectionError: The Hub cannot be reached, and the files are not all here.
        OSError: The disk has not enough space.
        ValueError: With `check`, a file of another content.
    """
    from huggingface_hub import snapshot_download

    key = fingerprint(repo, str(revision), *patterns)[:16]
    known = cache_folder() / "downloads" / f"{repo.replace('/', '--')}-{key}.json"
    unreachable: ConnectionError | None = None
    try:
        with _explained(repo, revision):
            listing = _listing(repo, patterns, revision)
    except ConnectionError as error:
        # Without a network: what an earlier download has brought is taken.
        unreachable, listing = error, read_json(known)
        if not listing:
            raise
    names = choose({name: entry["size"] for name, entry in listing["files"].items()})
    folder = _cached(repo, listing, names)
    if unreachable is not None:
        if folder is None:
            raise unreachable
        log.info("%s: the hub was not asked (%s)", repo, unreachable)
    else:
        if folder is None:
            _require_space(repo, listing, names)
            exact = [escape(name) for name in names]
            with _explained(repo, revision):
                snapshot_download(
                    repo, repo_type="dataset", revision=listing["commit"], allow_patterns=exact
                )
            folder = _cached(repo, listing, names)
            if folder is None:
                raise ConnectionError(f"{repo}: the download broke off; run the command again")
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, listing)
    if check:
        for name in names:
            _check(folder / name, listing["files"][name])
    return folder, names


def _listing(repo: str, patterns: Sequence[str], revision: str | None) -> dict:
    """Return the commit of a revision, and the files that match with sizes and digests."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi()
    commit = api.dataset_info(repo, revision=revision or "main").sha
    tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
    found = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    names = [*filter_repo_objects(found, allow_patterns=list(patterns))]
    if not names:
        some = ", ".join(sorted(found)[:8])
        raise FileNotFoundError(
            f"{repo} has no files of patterns={list(patterns)}; it has {some or 'none'}"
            f"{' ...' if len(found) > 8 else ''}"
        )
    files = {}
    for name in names:
        entry, lfs = found[name], found[name].lfs
        digest = lfs.sha256 if lfs is not None else None
        files[name] = {"size": entry.size, "sha256": digest, "blob": entry.blob_id}
    return {"repo": repo, "commit": commit, "files": files}


def _cached(repo: str, listing: dict, names: Sequence[str]) -> Path | None:
    """Return the cache's folder of a commit if all the files are there, whole."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    folder = folder / "snapshots" / listing["commit"]
    whole = all(_size(folder / name) == listing["files"][name]["size"] for name in names)
    return folder if whole else None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _require_space(repo: str, listing: dict, names: Sequence[str]) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"datasets--{repo.replace('/', '--')}" / "blobs"
    entries = [listing["files"][name] for name in names]
    sizes = ((_size(blobs / (e["sha256"] or e["blob"])), e["size"]) for e in entries)
    needed = sum(size for found, size in sizes if found != size)
    log.info("downloading %d files of %s, %s", len(names), repo, readable(needed))
    require_space(cache, needed, repo, "HF_HOME")


def require_space(folder: Path, needed: int, what: str, variable: str = "DITTY_DI_CACHE") -> None:
    """Raise `OSError` unless a folder's disk has so many bytes of free space.

    Args:
        folder: The folder, which is made.
        needed: Number of bytes.
        what: Name of the download, for the message.
        variable: The environment variable that names another folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what}: {readable(needed)} to download, but {folder} has {readable(free)} of free "
            f"space; set {variable} to a larger disk, or take a part with +data.sample=1GB"
        )


def _check(file: Path, entry: dict) -> None:
    digest = hashlib.sha256()
    if entry["sha256"] is None:  # as git names a file of its own
        digest = hashlib.sha1(b"blob %d\0" % entry["size"])
    with file.open("rb") as stream:
        hashlib.file_digest(stream, lambda: digest)
    if digest.hexdigest() != (entry["sha256"] or entry["blob"]):
        raise ValueError(f"{file.resolve()} has another content than the Hub's: delete it")


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's errors into one sentence."""
    import httpx
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{repo} is gated: accept its license at {hub}/datasets/{repo}, then set HF_TOKEN or "
            "run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"the hub at {hub} shows no dataset {repo}; if it is private, set HF_TOKEN or run "
            "`hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{repo} has no revision {revision!r}") from None
    except errors.HfHubHTTPError as error:
        raise ConnectionError(
            f"the hub at {hub} answered {error.response.status_code} for {repo}; try again later"
        ) from error
    except (ConnectionError, httpx.TransportError, errors.LocalEntryNotFoundError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached"
        raise ConnectionError(
            f"{repo} is not (wholly) in the cache {constants.HF_HUB_CACHE}, and {why}"
        ) from error
