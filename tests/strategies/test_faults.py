"""Ranks that are killed, frozen or told to end, full disks and damaged files: a run ends, says why, and can go on."""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import uuid

import pytest
import torch
from background import RUNS, bad_end
from training import Net, loader, trainer

from lightning_phantom import PhantomStrategy
from lightning_phantom.checkpoints import files
from lightning_phantom.checkpoints.files import (
    AtomicCheckpointIO,
    checksum,
    discard,
    make_place,
    place_for,
    publish,
    verify,
)
from lightning_phantom.errors import CheckpointError

FORMATS = ("full", "sharded")


# Files: whatever step a kill or an error interrupts, what is at the path is old or new, and whole


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


# Damaged checkpoints are refused, with a cure, before a weight changes


class Untouched(Net):
    def load_state_dict(self, *args, **kwargs):
        raise AssertionError("a damaged checkpoint has reached the weights")


def alone(folder, kind, **kwargs):
    return trainer(folder, devices=1, strategy=PhantomStrategy(num_blocks=4, state_dict_type=kind), **kwargs)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in FORMATS:
        t = alone(folder, kind)
        t.fit(Net(optimizer=torch.optim.Adam), loader())
        t.save_checkpoint(folder / kind)
    return folder


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    file.write_bytes(raw)


def damage(path, how):
    version, _, what = how.partition(" ")
    if path.is_file():
        {"truncated": lambda: os.truncate(path, path.stat().st_size // 2), "flipped": lambda: flip(path)}[version]()
        return
    folder = verify(path, 0, 1)
    if version == "current":
        (path / "current").write_bytes({"absent": b"0" * 32, "empty": b"", "garbage": b"\xff\x00" * 999}[what])
    elif version == "interrupted":
        (path / "current").unlink()
    else:
        file = folder / what
        {
            "missing": file.unlink,
            "truncated": lambda: os.truncate(file, file.stat().st_size // 2),
            "flipped": lambda: flip(file),
        }[version]()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("full", how) for how in ("truncated", "flipped")),
        *(("sharded", f"current {what}") for what in ("absent", "empty", "garbage")),
        ("sharded", "interrupted"),
        *(
            ("sharded", f"{how} {file}")
            for how in ("missing", "truncated", "flipped")
            for file in ("__0_0.distcp", ".metadata", "rest.pt", "checksums.json")
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, checkpoints, kind, how):
    path = tmp_path / "a.ckpt"
    (shutil.copytree if kind == "sharded" else shutil.copy)(checkpoints / kind, path)
    alone(tmp_path, kind, max_epochs=2).fit(Net(optimizer=torch.optim.Adam), loader(), ckpt_path=path)
    damage(path, how)
    with pytest.raises(CheckpointError, match=r"a.ckpt: (.|\n)*[Uu]se an earlier") as error:
        alone(tmp_path, kind, max_epochs=2).fit(Untouched(optimizer=torch.optim.Adam), loader(), ckpt_path=path)
    assert str(error.value).count(str(path)) <= 2


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_during_a_save(tmp_path, kind):
    """On one rank; the file system itself refuses here."""
    t = alone(tmp_path, kind)
    t.fit(Net(), loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for name in ("a.ckpt", "b.ckpt"):
            with pytest.raises(CheckpointError, match=rf"{name} was not saved: rank 0: "):
                t.save_checkpoint(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    if kind == "sharded":
        assert {p.name for p in (tmp_path / "a.ckpt").iterdir()} == {"current", verify(tmp_path / "a.ckpt", 0, 1).name}
    alone(tmp_path, kind, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")


# Runs of two ranks, in the background


def in_background(names):
    return [pytest.param(name, marks=pytest.mark.background(bad_end, name)) for name in names]


@pytest.mark.parametrize("name", in_background(name for name in RUNS if RUNS[name] is None))
def test_kills_at_random_moments(outcome, name):
    _, code, output, left = outcome
    assert code == 0 and not left, output
    assert "resumes that succeeded       2 of 2" in output


@pytest.mark.parametrize("name", in_background(name for name in RUNS if RUNS[name] is not None))
def test_a_run_ends_and_can_be_resumed(outcome, name):
    folder, code, output, left = outcome
    fault, _, kind, said = RUNS[name]
    assert code != 0 and not left, output
    if fault == "full disk":
        said = r"CheckpointError: \S.* was not saved: rank 0: "
        for rank in (0, 1):
            assert re.search(rf"caught on rank {rank}: .*step=8.ckpt was not saved: rank 0: ", output), output
        assert not list(folder.glob(".*"))
    assert re.search(said, output), output
    if fault == "start":
        return
    newest = max(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    step = int(newest.stem.removeprefix("step="))
    assert step == 6
    for path in (newest, folder / "last.ckpt"):
        t = alone(folder, kind, max_epochs=10**6, max_steps=step + 2)
        module = Net()
        t.fit(module, loader(), ckpt_path=path)
        assert t.global_step == step + 2 and len(module.losses) == 2
