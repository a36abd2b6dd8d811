"""Programs as a user starts them, for tests marked `program`.

Among them runs of two ranks that end badly: killed, frozen, told to end, or out of disk.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(os.environ)  # as it is before the Trainers of this process add to it

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

# How often kill_resume.py kills and resumes, by format. Of its moments and victims this seed's have each: rank 0 at the
# start, rank 1 and, the second time, both ranks during a save.
KILLS = {"full": 1, "sharded": 2}
KILLS_SEED = 28

# The longest first: fault, victim, format, what is said
RUNS = {
    "kill_resume sharded": None,
    "kill_resume full": None,
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
}


# A Trainer of another test, interrupted meanwhile, lets this process ignore signals, and what it starts inherits that.
UNDISTURBED = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def processes(mark):
    """The processes of a run, which all inherit its mark (zombies have lost it)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def program(*arguments, cwd=ROOT):
    """What a Python program has printed, once it has ended well."""
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def bad_end(folder, name):
    """Start a run and wait for its end; return its folder, exit code, output and the processes it has left."""
    mark = uuid.uuid4().hex
    if RUNS[name] is None:
        kind = name.split()[1]
        script = [ROOT / "benchmarks" / "kill_resume.py", f"--count={KILLS[kind]}", f"--seed={KILLS_SEED}"]
        script.append(f"--format={kind}")
    else:
        fault, victim, kind, _ = RUNS[name]
        (folder / "run.py").write_text(SCRIPT)
        script = [folder / "run.py", folder, kind, fault, victim, "60" if fault == "SIGSTOP" else "120"]
    started = subprocess.Popen(
        [sys.executable, "-S", "-c", UNDISTURBED, sys.executable, *map(str, script)],
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
        return folder, started.returncode, output, processes(mark)
    finally:
        for process in processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        started.wait()
