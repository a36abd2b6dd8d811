"""Kills a training run of two ranks at random moments, and resumes it each time from its newest complete checkpoint.

    python benchmarks/kill_resume.py --count 50 --seed 0 --format full
    python benchmarks/kill_resume.py --count 50 --seed 0 --format sharded

The run saves every third step. SIGKILL meets rank 0, rank 1 or both in turn: while the run starts, between two steps or
during a save. After each kill every checkpoint in sight is read and checked. The run itself writes down each save that
has returned; none of them may be lost. Exit code 1 if one is, if a checkpoint is broken, if a resume fails, or if a
process is left over. Linux only.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_phantom import PhantomStrategy
from lightning_phantom.checkpoints.files import AtomicCheckpointIO
from lightning_phantom.checkpoints.sharded import read_rest
from lightning_phantom.checkpoints.versions import verify

EVERY = 3  # steps between saves
ENDLESS = 10_000  # steps of a run that is going to be killed
PATIENCE_S = 120  # for anything a run has to do


# The run


class Net(L.LightningModule):
    """Large enough that a save takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of one batch: reproduce the input."""
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer with state to lose."""
        return torch.optim.AdamW(self.parameters())


class Trainer(L.Trainer):
    """Writes down what it does, durably: this must not be lost where a checkpoint is not."""

    def note(self, text: str) -> None:
        """Append a line to this rank's log."""
        with Path(self.default_root_dir, f"log {self.global_rank}").open("a") as log:
            log.write(f"{text}\n")
            log.flush()
            os.fsync(log.fileno())

    def save_checkpoint(self, *args: object, **kwargs: object) -> None:
        """Save, between two lines."""
        self.note(f"saving {self.global_step}")
        super().save_checkpoint(*args, **kwargs)
        self.note(f"saved {self.global_step}")


class Diary(L.Callback):
    """Says where training begins."""

    def on_train_start(self, trainer: Trainer, module: L.LightningModule) -> None:
        """Note the process and the step."""
        trainer.note(f"process {os.getpid()} at {trainer.global_step}")


def train(folder: Path, kind: str, steps: int, resume: str | None) -> None:
    L.seed_everything(0, verbose=False)
    saver = ModelCheckpoint(
        folder, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=EVERY, save_last=True
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=PhantomStrategy(num_blocks=4, state_dict_type=kind, timeout=timedelta(seconds=PATIENCE_S)),
        default_root_dir=folder,
        callbacks=[Diary(), saver],
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(64, 64)), batch_size=8), ckpt_path=resume)


# What kills it


class Run:
    """A run that has been started."""

    def __init__(self, folder: Path, kind: str, resume: Path | None, steps: int) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        for rank in (0, 1):
            (folder / f"log {rank}").write_text("")
        command = [__file__, f"--train={folder}", f"--format={kind}", f"--steps={steps}", f"--resume={resume or ''}"]
        self.started = subprocess.Popen(
            [sys.executable, *command],
            stdout=(folder / "output").open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "KILL_RESUME_MARK": self.mark},
        )

    def wait_for(self, pattern: str, rank: int = 0) -> str:
        """The first group of a pattern in a rank's log, once it is there."""
        deadline = time.monotonic() + PATIENCE_S
        while not (match := re.search(pattern, (self.folder / f"log {rank}").read_text())):
            if self.started.poll() is not None or time.monotonic() > deadline:
                self.kill((0, 1))
                self.end()
                raise RuntimeError(f"the run never came to {pattern!r}:\n{(self.folder / 'output').read_text()}")
            time.sleep(0.001)
        return match[1]

    def wait_for_save(self) -> None:
        """Until a save has begun."""
        begun = (self.folder / "log 0").read_text().count("saving")
        self.wait_for(rf"(?s)((saving.*?){{{begun + 1}}})")

    def processes(self) -> list[int]:
        """What is left of it, rank 0 first."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return sorted(found, key=lambda process: process != self.started.pid)

    def kill(self, victims: tuple[int, ...]) -> None:
        """Kill ranks; rank 0 for one that has not been started yet."""
        found = self.processes()
        for process in {found[min(rank, len(found) - 1)] for rank in victims if found}:
            os.kill(process, signal.SIGKILL)

    def end(self) -> list[int]:
        """Wait for the end of all its processes; return, and kill, those that stay."""
        deadline = time.monotonic() + PATIENCE_S
        while (left := self.processes()) and time.monotonic() < deadline:
            self.started.poll()
            time.sleep(0.01)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.started.wait()
        return left


def step_of(path: Path) -> int:
    """The step of a checkpoint of either kind, after all checks."""
    if path.is_dir():
        return int(read_rest(verify(path, 0, 1), weights_only=True)["global_step"])
    return int(AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["global_step"])


def look(folder: Path) -> tuple[dict[Path, int], list[str]]:
    """The complete checkpoints with their steps, and what is wrong with the others."""
    complete, broken = {}, []
    for path in sorted(folder.glob("[!.]*.ckpt")):
        try:
            complete[path] = step_of(path)
        except Exception as error:
            broken.append(f"{path.name}: {error}")
    return complete, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (default: 0)")
    parser.add_argument("--format", choices=["full", "sharded"], default="full")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        train(args.train, args.format, args.steps, args.resume or None)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return kill_and_resume(Path(folder), args.format, args.count, random.Random(args.seed))


def kill_and_resume(folder: Path, kind: str, count: int, draw: random.Random) -> int:
    began, kills, resumed, hit, lost, left, slowest = time.monotonic(), 0, 0, 0, 0, 0, 0.0
    newest, newest_step, saved = None, 0, 0
    broken: list[str] = []

    def kill(run: Run, moment: str) -> None:
        """Kill, wait for the end, and look at what there is."""
        nonlocal kills, hit, lost, left, slowest, newest, newest_step, saved
        victims = [(0,), (1,), (0, 1)][kills % 3]
        kills += 1
        killed = time.monotonic()
        run.kill(victims)
        left += len(run.end())
        seconds = time.monotonic() - killed
        slowest = max(slowest, seconds)
        log = (folder / "log 0").read_text()
        hit += log.count("saving") > log.count("saved")
        saved = max([saved, *map(int, re.findall(r"saved (\d+)", log))])
        complete, bad = look(folder)
        broken.extend(bad)
        newest = max(complete, key=lambda path: complete[path], default=None)
        newest_step = complete[newest] if newest else 0
        lost = max(lost, saved - newest_step)
        print(
            f"{kills:3}  rank {' and '.join(map(str, victims)):7} killed at a {moment}: ended in {seconds:4.1f} s, "
            f"saved step {saved}, newest complete {newest_step}, broken {len(bad)}",
            flush=True,
        )

    for n in range(count + 1):
        if draw.random() < 0.25:
            run = Run(folder, kind, newest, newest_step + ENDLESS)
            time.sleep(draw.uniform(0, 8))
            kill(run, "start")
        run = Run(folder, kind, newest, newest_step + (EVERY if n == count else ENDLESS))
        resumed += int(run.wait_for(r"process \d+ at (\d+)")) == newest_step and n > 0
        if n == count:
            break
        if draw.random() < 0.3:
            time.sleep(draw.uniform(0, 1))
            kill(run, "step")
        else:
            for _ in range(draw.randint(1, 6)):
                run.wait_for_save()
            time.sleep(draw.uniform(0, 0.05))
            kill(run, "save")
    left += len(run.end())
    complete, bad = look(folder)
    finished = run.started.returncode == 0 and max(complete.values()) == newest_step + EVERY

    print(f"\n{kind}, {kills} kills, {hit} of them within a save, {time.monotonic() - began:.0f} s")
    print(f"resumes that succeeded       {resumed} of {count}")
    print(f"last run came to its end     {'yes' if finished else 'no'}")
    print(f"broken checkpoints met       {len(broken) + len(bad)}")
    print(f"completed saves lost, steps  {lost}")
    print(f"processes left over          {left}")
    print(f"slowest end after a kill     {slowest:.1f} s")
    for problem in broken + bad:
        print(problem)
    return int(resumed < count or not finished or bool(broken + bad) or lost > 0 or left > 0)


if __name__ == "__main__":
    sys.exit(main())
