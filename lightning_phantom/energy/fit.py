"""One rank's part in measuring one fit: the election of a meter per host, the current phase, and what went wrong."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_phantom.energy.cards import Card, describe_device, find_cards
from lightning_phantom.energy.meter import Meter, host_id, tracker_options
from lightning_phantom.energy.report import Device, Ledger, RankRecord
from lightning_phantom.framework import pl

log = logging.getLogger(__name__)

T = TypeVar("T")


def gather(value: T, trainer: pl.Trainer) -> list[T]:
    """The values of all ranks, in the order of their global ranks. A collective over the default process group.

    A strategy's own `reduce` will not do: its group may hold the data-parallel ranks only.

    Raises:
        RuntimeError: The default process group does not span the trainer's ranks.
    """
    if trainer.world_size == 1:
        return [value]
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size != trainer.world_size:
        raise RuntimeError(f"the trainer has {trainer.world_size} ranks, torch.distributed's default group {size}")
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


class Fit:
    """What one rank knows of the fit under measurement.

    Its methods do not raise: `guard` turns exceptions into `problems`, so that every rank arrives at every collective
    even when its meter has failed.

    Attributes:
        is_owner: Whether this rank meters its host.
        ledger: The owner's account; None on other ranks and once the measurement has failed.
        phase: The current phase.
        steady_step: Global step at which the steady window opened.
        samples: Samples of this rank since then; None where the batch size is unknown.
        epochs: Lines for `energy_epochs.csv`.
        problems: What went wrong, in order.
    """

    def __init__(self, trainer: pl.Trainer):
        self._root_device = trainer.strategy.root_device
        self._meter: Meter | None = None
        self._device = Device(self._root_device.type, is_accelerator=self._root_device.type != "cpu")
        self._host_devices: list[Device] = []
        self._cards: list[Card] = []
        self._overhead_s = 0.0
        self.is_owner = False
        self.ledger: Ledger | None = None
        self.output_dir = Path(trainer.default_root_dir)
        self.phase = "other"
        self.first_step = 0
        self.steady_step: int | None = None
        self.samples: int | None = 0
        self.epochs: list[dict[str, Any]] = []
        self.problems: list[str] = []

    @contextmanager
    def guard(self, fatal: bool = True) -> Iterator[None]:
        """Turn an exception into a problem, logged if it is the first; a fatal one ends the measurement."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            # Logged, not warned: a filter that turns warnings into errors must not end the training either.
            if not self.problems:
                log.warning("EnergyMonitor: %r. Training goes on; energy figures will be missing.", error)
            self.problems.append(f"{type(error).__name__}: {error}")
            if fatal:
                self.ledger = None
                self.stop()
        finally:
            self._overhead_s += time.perf_counter() - began

    def elect(self, trainer: pl.Trainer) -> None:
        """Agree on the owner of each host, its lowest rank. A collective."""
        host = socket.gethostname()
        with self.guard():
            self._device = describe_device(self._root_device)
            host = host_id()
        with self.guard():
            everyone = gather((host, self._device), trainer)
            self._host_devices = [device for name, device in everyone if name == host]
            self.is_owner = [name for name, _ in everyone].index(host) == trainer.global_rank

    def start(self, options: dict[str, Any], tracker_factory: Callable[..., Any] | None) -> None:
        """Start the host's meter, if this rank owns it and nothing has failed."""
        if not self.is_owner or self.problems:
            return
        with self.guard():
            self._cards = find_cards(self._host_devices)
            indices = sorted(index for card in self._cards for index in card.indices)
            self._meter = Meter(tracker_options(**options, gpu_indices=indices), tracker_factory, self._cards)
            self.ledger = Ledger(self._meter.last)

    def enter(self, phase: str, synchronize: bool = True) -> None:
        """Take a reading, charge it to the phase that ends, and begin the next.

        Args:
            phase: One of `energy_report.PHASES`.
            synchronize: Whether to wait until the device has done what it was given in the phase that ends.
        """
        self.phase = phase
        if self._meter is None or self.ledger is None:
            return
        with self.guard():
            if synchronize and self._root_device.type != "cpu":
                torch.accelerator.synchronize(self._root_device)
            self.ledger.charge(self._meter.read(), phase)

    def open_steady_window(self, global_step: int) -> None:
        """End the warm-up here, within "train"."""
        self.enter(self.phase)
        self.steady_step = global_step
        if self.ledger is not None:
            self.ledger.steady = True

    def count_samples(self, batch: Any) -> None:
        """Count a batch of the steady window."""
        if self.samples is not None:
            try:
                self.samples += pl.utilities.data.extract_batch_size(batch)
            except Exception:
                self.samples = None

    def stop(self) -> None:
        """Stop the meter, if it is running."""
        if self._meter is not None:
            with self.guard(fatal=False):
                self._meter.stop()

    def record(self, trainer: pl.Trainer) -> RankRecord:
        """What this rank tells the others."""
        meter = self._meter
        return RankRecord(
            rank=trainer.global_rank,
            host=socket.gethostname(),
            device=self._device,
            is_owner=self.is_owner,
            spent=None if self.ledger is None else dict(self.ledger.spent),
            flags={} if meter is None else meter.flags(),
            hardware=() if meter is None else meter.hardware,
            samples=self.samples,
            steps=0 if self.steady_step is None else trainer.global_step - self.steady_step,
            grid_g_per_kwh=None if meter is None else meter.grid_g_per_kwh,
            shares_card=any(card.is_shared for card in self._cards),
            overhead_s=self._overhead_s,
            problems=tuple(self.problems),
        )

    def share(self, trainer: pl.Trainer) -> list[RankRecord]:
        """The records of all ranks; of this one alone, measurement failed, if they cannot be had. A collective."""
        with self.guard():
            return gather(self.record(trainer), trainer)
        return [self.record(trainer)]
