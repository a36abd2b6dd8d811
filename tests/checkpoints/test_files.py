"""Whatever step a kill or an error interrupts, what is at the path is old or new, and whole."""

import contextlib
import errno
import os
import random
import uuid

import pytest
import torch

from lightning_phantom.checkpoints import files
from lightning_phantom.checkpoints.files import AtomicCheckpointIO
from lightning_phantom.checkpoints.versions import checksum, discard, make_place, place_for, publish, verify


def write_full(path, value):
    AtomicCheckpointIO().save_checkpoint({"value": value}, path)


def write_sharded(path, value):
    folder = place_for(path, uuid.uuid4().hex)
    try:
        make_place(folder, path)
        for name in ("shard 0", "shard 1"):
            (folder / name).write_text(value)
        publish(folder, path, {file.name: checksum(file) for file in folder.iterdir()})
    except OSError:
        discard(folder, path)
        raise


def remove(path, value):
    AtomicCheckpointIO().remove_checkpoint(path)


def read(path):
    """The value of a checkpoint of either kind, None if there is none."""
    if not path.exists():
        return None
    if path.is_file():
        return AtomicCheckpointIO().load_checkpoint(path)["value"]
    folder = verify(path, 0, 1)
    first, second = ((folder / name).read_text() for name in ("shard 0", "shard 1"))
    assert first == second
    return first


WRITERS = {"full": write_full, "sharded": write_sharded}
CASES = [(old, new) for new in (write_full, write_sharded, remove) for old in (None, *WRITERS.values()) if old or new]


@contextlib.contextmanager
def interrupted(step, after, interrupt, calls):
    """Call `interrupt` before or after the call number `step` of functions of `os`; yield how many calls there were."""
    count = [0]
    originals = {name: getattr(os, name) for name in calls}

    def counted(original):
        def call(*args, **kwargs):
            count[0] += 1
            mine = count[0] == step
            if mine and not after:
                interrupt()
            result = original(*args, **kwargs)
            if mine and after:
                interrupt()
            return result

        return call

    for name, original in originals.items():
        setattr(os, name, counted(original))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def prepared(folder, before):
    folder.mkdir()
    path = folder / "a [1].ckpt"
    if before is not None:
        before(path, "old")
    return path


@pytest.mark.parametrize(("before", "change"), CASES)
def test_a_kill_at_any_step_leaves_old_or_new(tmp_path, before, change):
    old, new = None if before is None else "old", None if change is remove else "new"
    seen = []
    for step in range(1, 1000):
        for after in (False, True):
            path = prepared(tmp_path / f"{step}{after}", before)
            child = os.fork()
            if child == 0:
                try:
                    calls = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir")
                    with interrupted(step, after, lambda: os._exit(9), calls):
                        change(path, "new")
                finally:
                    os._exit(0)
            killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            seen.append(read(path))
            assert seen[-1] in (old, new)
            change(path, "new")
            assert read(path) == new
            assert [p.name for p in path.parent.iterdir()] == [path.name] * (new is not None)
        if not killed:
            break
    assert seen[0] == old and seen[-1] == new and seen == sorted(seen, key=lambda value: value == new)


@pytest.mark.parametrize(("before", "write"), [case for case in CASES if case[1] is not remove])
def test_a_full_disk_at_any_step_leaves_old_or_new_and_nothing_else(tmp_path, before, write):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(1, 1000):
        path = prepared(tmp_path / f"{step}", before)
        with interrupted(step, False, full, ("replace", "fsync", "mkdir")) as count:
            with contextlib.suppress(OSError):
                write(path, "new")
        assert read(path) in (None if before is None else "old", "new")
        assert {p.name for p in path.parent.iterdir()} <= {path.name}
        if path.is_dir():  # the pointer, a version and the one before
            assert len(list(path.iterdir())) <= 3 and not list(path.glob(".*"))
        if count[0] < step:
            break
    assert read(path) == "new" and step > 2


def test_without_an_exchange_of_names_three_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    path = prepared(tmp_path / "a", write_full)
    write_sharded(path, "new")
    assert read(path) == "new"
    write_full(path, "newer")
    assert read(path) == "newer" and len(list(path.parent.iterdir())) == 1


def test_a_first_version_appears_by_one_rename(tmp_path):
    path = tmp_path / "a.ckpt"
    folder = place_for(path, "0" * 32)
    make_place(folder, path)
    assert not path.exists() and folder.parent.parent == tmp_path
    publish(folder, path, {})
    assert verify(path, 0, 1) == path / folder.name
    assert place_for(path, "1" * 32) == path / ("1" * 32)
    link = tmp_path / "last.ckpt"
    link.symlink_to(path)
    write_sharded(link, "new")  # in the link's place, not into what it points at
    assert read(link) == "new" and verify(path, 0, 1).name == folder.name


def test_nothing_to_remove(tmp_path):
    remove(tmp_path / "absent" / "a.ckpt", None)


def test_a_flipped_bit_is_seen(tmp_path):
    """Checksums find what torch.load would take for weights."""
    path, good = tmp_path / "a.ckpt", {"weight": torch.randn(500), "step": 7, "name": "a module"}
    AtomicCheckpointIO().save_checkpoint(good, path)
    raw, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        position = draw.randrange(len(raw))
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << draw.randrange(8)]) + raw[position + 1 :])
        try:
            loaded = AtomicCheckpointIO().load_checkpoint(path)
        except Exception:
            refused += 1
        else:  # padding, or a date
            assert torch.equal(loaded.pop("weight"), good["weight"])
            assert loaded == {"step": 7, "name": "a module"}
    assert refused > 100
    torch.serialization.set_crc32_options(False)
    try:
        AtomicCheckpointIO().save_checkpoint(good, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert AtomicCheckpointIO().load_checkpoint(path)["step"] == 7
