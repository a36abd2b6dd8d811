"""Ranks that are killed, frozen or told to end, full disks and damaged files: a run ends, says why, and can go on."""

import os
import re
import resource
import shutil

import pytest
import torch
from programs import KILLS, RUNS, bad_end
from training import Net, loader, trainer

from lightning_phantom import PhantomStrategy
from lightning_phantom.checkpoints.versions import verify
from lightning_phantom.errors import CheckpointError

FORMATS = ("full", "sharded")


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


# Runs of two ranks


def as_programs(names):
    return [pytest.param(name, marks=pytest.mark.program(bad_end, name)) for name in names]


@pytest.mark.parametrize("name", as_programs(name for name in RUNS if RUNS[name] is None))
def test_kills_at_random_moments(outcome, name):
    _, code, output, left = outcome
    assert code == 0 and not left, output
    count = KILLS[name.split()[1]]
    assert f"resumes that succeeded       {count} of {count}" in output


@pytest.mark.parametrize("name", as_programs(name for name in RUNS if RUNS[name] is not None))
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
