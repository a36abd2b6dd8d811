"""Checkpoint files that a kill at any moment leaves either old or new, but whole.

One run writes to a path at a time. What a killed run has left beside it, under a hidden name, the next save removes.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import uuid
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_phantom.framework import fabric, pl

CHUNK = 2**20  # bytes read at a time
_HEX = "[0-9a-f]{32}"  # of a UUID
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class AtomicCheckpointIO(pl.plugins.TorchCheckpointIO):
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
        clear_beside(path)
        written = beside(path, uuid.uuid4().hex)
        try:
            with written.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put(written, path)
        finally:
            delete(written)
        sync(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint whose checksums are right: `torch.load` does not look at those that `torch.save` wrote."""
        if is_local(path):
            check_records(path)
            if weights_only is not None:  # for which Lightning 2.5 has no argument
                return torch.load(path, map_location, weights_only=weights_only)
        how = {} if weights_only is None else {"weights_only": weights_only}
        return super().load_checkpoint(path, map_location, **how)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, which is never seen in part."""
        if not is_local(path):
            super().remove_checkpoint(path)
            return
        path = Path(path)
        if os.path.lexists(path):
            os.rename(path, beside(path, f"{uuid.uuid4().hex}.removed"))
        _clear(path.parent, rf"\..*\.{_HEX}\.removed")


def check_records(path: Any) -> None:
    """Raise zipfile.BadZipFile if a file of `torch.save` is not what was written; other files are not looked at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC != 0:  # 0: torch was told to write none
                    with archive.open(record) as file:
                        while file.read(CHUNK):
                            pass


def is_local(path: Any) -> bool:
    """Whether `path` lies in the local file system."""
    protocol = fabric.utilities.cloud_io.get_filesystem(path).protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def beside(path: Path, name: str) -> Path:
    """The hidden path in the same folder on which something is written that is to become `path`."""
    return path.with_name(f".{path.name}.{name}")


def clear_beside(path: Path) -> None:
    """Remove what killed runs have left on hidden paths beside `path`."""
    _clear(path.parent, re.escape(f".{path.name}.") + _HEX)


def put(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had it is removed."""
    try:
        os.replace(new, path)
    except OSError:  # a directory cannot take the place of anything else, nor the other way round
        if not os.path.lexists(path):
            raise
        _exchange(new, path)
        delete(new)


def _exchange(a: Path, b: Path) -> None:
    """Swap two names: in one step where the system can, else in three that leave both files whole."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None or rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        aside = a.with_name(f"{a.name}.old")
        os.rename(b, aside)
        os.rename(a, b)
        os.rename(aside, a)


def _clear(folder: Path, pattern: str) -> None:
    """Remove what has such a name."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if re.fullmatch(pattern, entry.name):
                delete(entry)


def delete(path: Path) -> None:
    """Remove a file or a directory, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
