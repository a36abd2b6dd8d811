"""What `EnergyMonitor` costs itself: CPU time of its hooks and of the meter's threads, in a steady window of training.

    python benchmarks/energy_overhead.py --seconds 30

One process trains a chain of linears, with the real codecarbon. CPU time is the system's count, per thread: that of the
hooks is taken around each call on the training thread, that of the meter is what every thread but that one has used.
The window opens after the warm-up and closes before the fit ends, so start-up and report are outside. The meter is read
at the end of every epoch, so epochs of seconds cost more than epochs of hours: what one costs is printed by itself.
"""

import argparse
import logging
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.overhead import Chain
from lightning_phantom import EnergyMonitor


class Watched(EnergyMonitor):
    """Adds up the CPU seconds of its own hooks."""

    steps_s = epochs_s = 0.0

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("on_") or not callable(value):
            return value

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return value(*args, **kwargs)
            finally:
                spent = time.thread_time() - start
                if "batch" in name:
                    Watched.steps_s += spent
                else:
                    Watched.epochs_s += spent

        return timed


class Window(L.Callback):
    """Opens after some steps, and ends the fit when it has been open long enough."""

    def __init__(self, warmup: int, seconds: float) -> None:
        self.warmup, self.seconds = warmup, seconds
        self.opened: dict[str, float] = {}
        self.spent: dict[str, float] = {}
        self.steps = 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Open it."""
        if trainer.global_step == self.warmup:
            self.opened = _spent()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Close it."""
        if self.opened and time.perf_counter() - self.opened["wall"] >= self.seconds:
            self.spent = {key: value - self.opened[key] for key, value in _spent().items()}
            self.steps = trainer.global_step - self.warmup
            trainer.should_stop = True


def _spent() -> dict[str, float]:
    """CPU seconds so far: of the process, of all its threads but this one, and of the monitor's hooks."""
    process = time.process_time()
    return {
        "wall": time.perf_counter(),
        "process": process,
        "threads": process - time.thread_time(),
        "steps": Watched.steps_s,
        "epochs": Watched.epochs_s,
    }


class Noise(Dataset):
    """One sample, over and over."""

    def __init__(self, features: int, size: int) -> None:
        self.sample, self.size = (torch.randn(features),), size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        return self.sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--epoch", type=int, default=500, help="steps of an epoch")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the window")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = Noise(args.features, args.epoch * args.tokens)
    window = Window(args.warmup, args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=10**6,
            callbacks=[Watched(output_dir=folder), window],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Chain(args.features, args.depth), DataLoader(data, batch_size=args.tokens))
    spent = window.spent
    print(f"window              {spent['wall']:.1f} s, {window.steps} steps, {spent['process']:.1f} s of CPU")
    for part, what in (("steps", "hooks of steps"), ("epochs", "hooks of epochs"), ("threads", "the meter's threads")):
        print(f"{what:19s} {1000 * spent[part]:.1f} ms of CPU, {100 * spent[part] / spent['process']:.3f} %")
    together = sum(spent[part] for part in ("steps", "epochs", "threads"))
    print(f"together            {100 * together / spent['process']:.3f} %")


if __name__ == "__main__":
    main()
