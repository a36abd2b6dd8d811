"""How the ranks of a run end: none outlives the rank that started it, and what ended a run is named."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_phantom.framework import pl

GRACE_S = 10.0  # for a rank to end by itself after the one that started it
_POLL_S = 0.5
_LAUNCHER = "LIGHTNING_PHANTOM_LAUNCHER"  # in the environment of a started rank: the process that started it
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class PhantomLauncher(pl.strategies.launchers._SubprocessScriptLauncher):
    """Lightning's launcher of one process per rank, whose processes end together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _LAUNCHER in os.environ:
            _Tie.start_one(int(os.environ.pop(_LAUNCHER)))

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start the other ranks, the first time, and call the function; a broken connection is explained."""
        tie = _Tie.started
        if tie is not None:
            tie.holds = True
        try:
            result = super().launch(function, *args, **kwargs)
        except RuntimeError:  # what a collective raises
            self._explain()
            raise
        if tie is not None:
            tie.holds = False
        return result

    def kill(self, signum: int) -> None:
        """Send a signal to the ranks that this one has started; what Lightning does first when it gets SIGTERM."""
        super().kill(signum)
        if signum == signal.SIGTERM and self.num_processes * self.num_nodes > 1:
            # Lightning goes on to a broadcast, from wherever the signal has met this rank, and another rank may be
            # waiting for this one elsewhere. An exception, as for Ctrl-C, lets no one wait.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            log.error(f"{self._name(self.cluster_environment.local_rank())} ends: it was sent SIGTERM.")
            raise pl.utilities.exceptions.SIGTERMException(128 + signum)

    def _call_children_scripts(self) -> None:
        os.environ[_LAUNCHER] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[_LAUNCHER]

    def _explain(self) -> None:
        """Say which ranks have ended or are stopped."""
        deadline = time.monotonic() + 1  # connections break a moment before the end of a process can be seen
        while not (seen := self._others()) and time.monotonic() < deadline:
            time.sleep(_POLL_S / 10)
        for line in seen:
            log.error(line)

    def _others(self) -> list[str]:
        seen = []
        stopped = "is stopped (SIGSTOP): it gave no answer within the strategy's timeout."
        for rank, process in enumerate(self.procs, 1):
            name, code = self._name(rank, process.pid), process.poll()
            if code:
                how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.strsignal(-code)})"
                seen.append(f"{name} has ended with {how}.")
            elif code is None and _is_stopped(process.pid):
                seen.append(f"{name} {stopped}")
        tie = _Tie.started
        if tie is not None and os.getppid() != tie.launcher:
            seen.append(f"{self._name(0, tie.launcher)} has ended.")
        elif tie is not None and _is_stopped(tie.launcher):
            seen.append(f"{self._name(0, tie.launcher)} {stopped}")
            os.kill(tie.launcher, signal.SIGCONT)  # to see that the run is over
        return seen

    def _name(self, local_rank: int, process: int | None = None) -> str:
        rank = self.cluster_environment.node_rank() * self.num_processes + local_rank
        return f"Rank {rank} (process {os.getpid() if process is None else process})"


class _Tie(threading.Thread):
    """Ends a started rank after the one that started it, if it does not end by itself.

    Attributes:
        launcher: the process that started this one.
        holds: whether this rank may be waiting for others; between two calls of the Trainer it is its script's own.
        started: this process's.
    """

    started: _Tie | None = None

    def __init__(self, launcher: int) -> None:
        super().__init__(name="phantom-tie", daemon=True)
        self.launcher = launcher
        self.holds = True

    @classmethod
    def start_one(cls, launcher: int) -> None:
        if sys.platform.startswith("linux"):
            # A frozen rank, too, shall see that the launcher is gone.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)
        if os.getppid() != launcher:
            raise SystemExit(f"Process {os.getpid()} ends: process {launcher}, which started it as a rank, has ended.")
        cls.started = cls(launcher)
        cls.started.start()

    def run(self) -> None:
        left = GRACE_S
        while left > 0:
            time.sleep(_POLL_S)
            left = left - _POLL_S if self.holds and os.getppid() != self.launcher else GRACE_S
        log.error(f"Process {os.getpid()} ends: process {self.launcher}, which started it as a rank, has ended.")
        os.kill(os.getpid(), signal.SIGKILL)


def _is_stopped(process: int) -> bool:
    """Whether a process is frozen; False where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False
