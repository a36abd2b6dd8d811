"""Ranks that are killed, frozen or told to end, full disks and damaged files: a run ends, says why, and can go on."""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from training import Net, loader, trainer

from lightning_phantom import PhantomStrategy, files
from lightning_phantom.errors import CheckpointError
from lightning_phantom.files import AtomicCheckpointIO, checksum, discard, make_place, place_for, publish, verify

FORMATS = ("full", "sharded")
ROOT = Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ)  # as it is before the Trainers of this process add to it


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


# Runs of two ranks, as a user starts them; all in the background, a few at a time, since most of a run is waiting.

SCRIPT = """
import logging, os, resource, signal, sys, threading, time
from datetime import timedelta

from lightning.pytorch.callbacks import ModelCheckpoint
from training import Net, loader, trainer

from lightning_phantom import PhantomStrategy

folder, kind, fault, victim, timeout = sys.argv[1:]


class Faulty(Net):
    def training_step(self, batch, batch_idx):
        if self.global_step == 6 and str(self.global_rank) in victim:
            if fault == "raise":
                raise KeyError("a cursed sample")
            if fault == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            elif victim == "0 group":
                os.killpg(0, getattr(signal, fault))
            else:
                os.kill(os.getpid(), getattr(signal, fault))
        return super().training_step(batch, batch_idx)


def kill_at_start():
    while not t.strategy.launcher.procs:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    strategy = PhantomStrategy(num_blocks=4, state_dict_type=kind, timeout=timedelta(seconds=int(timeout)))
    saver = ModelCheckpoint(
        folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=2, save_last=True
    )
    t = trainer(folder, devices=2, strategy=strategy, callbacks=[saver], enable_checkpointing=True, max_epochs=10**6)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    if fault == "start":
        threading.Thread(target=kill_at_start, daemon=True).start()
    try:
        t.fit(Faulty(), loader())
    except Exception as error:
        os.write(2, f"caught on rank {t.global_rank}: {error}\\n".encode())
        raise
"""

# fault, victim, format, what is said
RUNS = {
    "rank 1 freezes": ("SIGSTOP", "1", "full", r"Rank 1 \(process \d+\) is stopped"),
    "rank 0 freezes": ("SIGSTOP", "0", "sharded", r"Rank 0 \(process \d+\) is stopped"),
    "rank 0 is killed": ("SIGKILL", "0", "full", r"Rank 0 \(process \d+\) has ended"),
    "rank 1 is killed": ("SIGKILL", "1", "sharded", r"Rank 1 \(process \d+\) has ended with signal 9|with code -9"),
    "rank 0 is killed at the start": ("start", "0", "full", r"process \d+, which started it as a rank, has ended"),
    "rank 0 raises": ("raise", "0", "sharded", "KeyError: 'a cursed sample'"),
    "rank 1 raises": ("raise", "1", "full", "KeyError: 'a cursed sample'"),
    "Ctrl-C": ("SIGINT", "0 group", "sharded", "Detected KeyboardInterrupt"),
    "SIGTERM to all": ("SIGTERM", "0 group", "full", r"Rank 0 \(process \d+\) ends: it was sent SIGTERM"),
    "SIGTERM to rank 0": ("SIGTERM", "0", "sharded", r"Rank 0 \(process \d+\) ends: it was sent SIGTERM"),
    "SIGTERM to rank 1": ("SIGTERM", "1", "full", r"Rank 1 \(process \d+\) ends: it was sent SIGTERM"),
    "full disk, full": ("full disk", "0", "full", None),
    "full disk, sharded": ("full disk", "0", "sharded", None),
    "kill_resume full": None,
    "kill_resume sharded": None,
}


def processes(mark):
    """The processes of a run, which all inherit its mark (zombies have lost it)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def run(name, folder):
    """Start a run and wait for its end; return its exit code, its output and the processes it has left."""
    mark = uuid.uuid4().hex
    folder.mkdir()
    if RUNS[name] is None:
        script = [ROOT / "benchmarks" / "kill_resume.py", "--count=2", "--seed=1", f"--format={name.split()[1]}"]
    else:
        fault, victim, kind, _ = RUNS[name]
        (folder / "run.py").write_text(SCRIPT)
        script = [folder / "run.py", folder, kind, fault, victim, "40" if fault == "SIGSTOP" else "120"]
    started = subprocess.Popen(
        [sys.executable, *map(str, script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, "FAULTS_MARK": mark},
        start_new_session=True,
    )
    try:
        # The output ends with the last process that holds it.
        output, _ = started.communicate(timeout=300)
        deadline = time.monotonic() + 30
        while processes(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        return started.returncode, output, processes(mark)
    finally:
        for process in processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        started.wait()


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    chosen = {i.callspec.params["name"] for i in request.session.items if "name" in getattr(i, "fixturenames", ())}
    with ThreadPoolExecutor(3) as pool:
        yield folder, {name: pool.submit(run, name, folder / name) for name in RUNS if name in chosen}


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name] is not None])
def test_a_run_ends_and_can_be_resumed(results, name):
    folder, futures = results
    code, output, left = futures[name].result()
    fault, _, kind, said = RUNS[name]
    assert code != 0 and not left, output
    if fault == "full disk":
        said = r"CheckpointError: \S.* was not saved: rank 0: "
        for rank in (0, 1):
            assert re.search(rf"caught on rank {rank}: .*step=8.ckpt was not saved: rank 0: ", output), output
        assert not list((folder / name).glob(".*"))
    assert re.search(said, output), output
    if fault == "start":
        return
    newest = max((folder / name).glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    step = int(newest.stem.removeprefix("step="))
    assert step == 6
    for path in (newest, folder / name / "last.ckpt"):
        t = alone(folder, kind, max_epochs=10**6, max_steps=step + 2)
        module = Net()
        t.fit(module, loader(), ckpt_path=path)
        assert t.global_step == step + 2 and len(module.losses) == 2


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name] is None])
def test_kills_at_random_moments(results, name):
    code, output, left = results[1][name].result()
    assert code == 0 and not left, output
    assert "resumes that succeeded       2 of 2" in output
