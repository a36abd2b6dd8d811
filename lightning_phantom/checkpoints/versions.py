"""The directory of a sharded checkpoint: versions beside each other, and one line that names the complete one.

A kill at any moment leaves the old version current or the new one, whole. One run writes to a directory at a time.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from lightning_phantom.checkpoints.files import CHUNK, beside, clear_beside, delete, put, sync
from lightning_phantom.errors import CheckpointError

CURRENT = "current"  # the file in a sharded checkpoint's directory that names the complete version
CHECKSUMS = "checksums.json"  # the file in a version that has the CRC-32 of the others


def current_version(path: Path) -> Path | None:
    """The folder of a sharded checkpoint's complete version; None if `path` is no such checkpoint."""
    pointer = path / CURRENT
    return path / pointer.read_text(errors="replace").strip() if pointer.is_file() else None


def place_for(path: Path, name: str) -> Path:
    """The folder in which to write the version `name` of the sharded checkpoint `path`.

    A first version is written beside its place, so that it can appear there by one rename.
    """
    has_versions = current_version(path) is not None and not path.is_symlink()
    return (path if has_versions else beside(path, name)) / name


def make_place(folder: Path, path: Path) -> None:
    """Make a version's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_beside(path)
    folder.mkdir(parents=True)


def publish(folder: Path, path: Path, checksums: Mapping[str, int]) -> None:
    """Make a written version the current one, and remove the others.

    Args:
        folder: the version.
        path: the checkpoint.
        checksums: `checksum` of every file in the version.
    """
    home = folder.parent
    (folder / CHECKSUMS).write_text(json.dumps(checksums))
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    pointer = home / f".{CURRENT}"
    try:
        pointer.write_text(f"{folder.name}\n")
        sync(pointer)
        os.replace(pointer, home / CURRENT)
    finally:
        pointer.unlink(missing_ok=True)
    sync(home)
    if home != path:
        put(home, path)
    sync(path.parent)
    for old in path.iterdir():
        if old.is_dir() and old.name != folder.name:
            delete(old)


def discard(folder: Path, path: Path) -> None:
    """Remove a version that could not be published."""
    if current_version(path) != path / folder.name:
        delete(folder if folder.parent == path else folder.parent)


def checksum(file: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def verify(path: Path, part: int, parts: int) -> Path:
    """Check one of several parts of a sharded checkpoint's files; return the folder of its complete version.

    Raises:
        CheckpointError: the checkpoint is incomplete, or a file is missing or has changed.
    """
    folder = current_version(path)
    if folder is None:
        raise CheckpointError("a directory without a complete sharded checkpoint; use an earlier one.")
    try:
        expected = sorted(json.loads((folder / CHECKSUMS).read_text()).items())[part::parts]
        changed = [name for name, value in expected if checksum(folder / name) != value]
    except Exception as error:
        raise CheckpointError(f"the checkpoint is incomplete or damaged; use an earlier one. ({error})") from error
    if changed:
        raise CheckpointError(f"{', '.join(changed)} of the checkpoint changed after the save; use an earlier one.")
    return folder
