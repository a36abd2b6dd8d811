"""Checkpoint files and directories that a kill at any moment leaves either old or new, but whole.

One run writes to a path at a time. What a killed run has left beside it, under a hidden name, the next save removes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_phantom.errors import CheckpointError

CURRENT = "current"  # the file in a sharded checkpoint's directory that names the complete version
CHECKSUMS = "checksums.json"  # the file in a version that has the CRC-32 of the others
_CHUNK = 2**20
_HEX = "[0-9a-f]{32}"  # of a UUID
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, but written beside their place, synced to disk and renamed, and checked when read.

    Paths that are not local go Lightning's way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, or leave what is there."""
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent, re.escape(f".{path.name}.") + _HEX)
        written = _beside(path, uuid.uuid4().hex)
        try:
            with written.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            _put(written, path)
        finally:
            _delete(written)
        _sync(path.parent)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint whose checksums are right: `torch.load` does not look at those that `torch.save` wrote."""
        if is_local(path):
            check_records(path)
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, which is never seen in part."""
        if not is_local(path):
            super().remove_checkpoint(path)
            return
        path = Path(path)
        if os.path.lexists(path):
            os.rename(path, _beside(path, f"{uuid.uuid4().hex}.removed"))
        _clear(path.parent, rf"\..*\.{_HEX}\.removed")


def check_records(path: Any) -> None:
    """Raise zipfile.BadZipFile if a file of `torch.save` is not what was written; other files are not looked at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC != 0:  # 0: torch was told to write none
                    with archive.open(record) as file:
                        while file.read(_CHUNK):
                            pass


def on_disk(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Copy a tensor into a file in `folder` that is gone when the tensor is, whatever ends the process.

    The system can write its pages out when memory runs short.
    """
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, but kills the process that writes a page
            os.posix_fallocate(descriptor, 0, size)
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)
    return mapped.view(tensor.shape).copy_(tensor)


def is_local(path: Any) -> bool:
    """Whether `path` lies in the local file system."""
    protocol = get_filesystem(path).protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def current_version(path: Path) -> Path | None:
    """The folder of a sharded checkpoint's complete version; None if `path` is no such checkpoint."""
    pointer = path / CURRENT
    return path / pointer.read_text(errors="replace").strip() if pointer.is_file() else None


def place_for(path: Path, name: str) -> Path:
    """The folder in which to write the version `name` of the sharded checkpoint `path`.

    A first version is written beside its place, so that it can appear there by one rename.
    """
    has_versions = current_version(path) is not None and not path.is_symlink()
    return (path if has_versions else _beside(path, name)) / name


def make_place(folder: Path, path: Path) -> None:
    """Make a version's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent, re.escape(f".{path.name}.") + _HEX)
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
        _sync(file)
    _sync(folder)
    pointer = home / f".{CURRENT}"
    try:
        pointer.write_text(f"{folder.name}\n")
        _sync(pointer)
        os.replace(pointer, home / CURRENT)
    finally:
        pointer.unlink(missing_ok=True)
    _sync(home)
    if home != path:
        _put(home, path)
    _sync(path.parent)
    for old in path.iterdir():
        if old.is_dir() and old.name != folder.name:
            _delete(old)


def discard(folder: Path, path: Path) -> None:
    """Remove a version that could not be published."""
    if current_version(path) != path / folder.name:
        _delete(folder if folder.parent == path else folder.parent)


def checksum(file: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
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


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f".{path.name}.{name}")


def _put(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had it is removed."""
    try:
        os.replace(new, path)
    except OSError:  # a directory cannot take the place of anything else, nor the other way round
        if not os.path.lexists(path):
            raise
        _exchange(new, path)
        _delete(new)


def _exchange(a: Path, b: Path) -> None:
    """Swap two names: in one step where the system can, else in three that leave both files whole."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        aside = a.with_name(f"{a.name}.old")
        os.rename(b, aside)
        os.rename(a, b)
        os.rename(aside, a)


def _clear(folder: Path, pattern: str) -> None:
    """Remove what killed runs have left."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if re.fullmatch(pattern, entry.name):
                _delete(entry)


def _delete(path: Path) -> None:
    """Remove a file or a directory, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
