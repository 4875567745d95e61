"""Find configuration files: in a user's own folders, then in the folder that is shipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml


def conf_dir() -> Path:
    """Return the shipped configuration: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "conf"
    return shipped if shipped.is_dir() else package.parent / "conf"


def user_dirs(config_dirs: Iterable[str | Path] = ()) -> list[Path]:
    """Return `./conf` if it exists, then each of `config_dirs`: searched before the shipped one.

    Raises:
        FileNotFoundError: one of `config_dirs` is not a folder.
    """
    found = []
    for folder in (Path("conf"), *map(Path, config_dirs)):
        path = folder.expanduser().resolve()
        if path.is_dir():
            if path != conf_dir() and path not in found:
                found.append(path)
        elif folder != Path("conf"):
            raise FileNotFoundError(f"--config-dir {folder}: there is no folder {path}")
    return found


def in_defaults(group: str, config_name: str, folders: Sequence[Path]) -> bool:
    """Return whether the defaults list of a configuration, or of one that it names, has a group."""
    file = next((f for d in folders if (f := d / f"{config_name}.yaml").is_file()), None)
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file is not None else None
    listed = content.get("defaults") if isinstance(content, dict) else None
    return any(
        group in entry
        if isinstance(entry, dict)
        else entry not in ("_self_", config_name) and in_defaults(group, str(entry), folders)
        for entry in listed or ()
    )


def folders(config_dirs: Iterable[str | Path] = ()) -> list[Path]:
    """Return every folder that is searched, in order."""
    return [*user_dirs(config_dirs), conf_dir()]


def groups(folders: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Return group -> {choice: first comment of its file}; of files with one name, the first."""
    found: dict[str, dict[str, str]] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and not file.parent.name.startswith("_"):  # parts, not choices
                found.setdefault(group, {}).setdefault(file.stem, _first_comment(file))
    return dict(sorted(found.items()))


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            return text
        if line.strip() and not line.startswith("#"):
            break
    return ""
