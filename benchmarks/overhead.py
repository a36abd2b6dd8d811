"""What the strategy itself costs: a Trainer step with R = 1 against the same swapped module without the strategy.

    python benchmarks/overhead.py

Both train the same phantom layers on one process: one through `PhantomStrategy(num_blocks=p)`, the other through
`phantomize_` and the single-device strategy. Fits alternate; a step is timed from one batch's end to the next.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_phantom import PhantomConfig, PhantomStrategy, phantomize_


class Chain(L.LightningModule):
    """A chain of square layers, trained to reproduce noise."""

    def __init__(self, features: int, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(features, features), nn.ReLU())))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean square error of a batch."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD: little beside the step itself."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class StepTimer(L.Callback):
    """Seconds between the ends of consecutive batches."""

    def __init__(self, warmup: int = 3) -> None:
        self.warmup, self.ends = warmup, []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The steps' times after the warm-up."""
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][self.warmup :]


def fit(kind: str, args: argparse.Namespace, folder: str) -> float:
    """Median seconds of a step."""
    torch.manual_seed(0)
    module = Chain(args.features, args.depth)
    strategy: Any = PhantomStrategy(num_blocks=args.blocks)
    if kind == "single device":
        phantomize_(module, PhantomConfig(args.blocks))
        strategy = "auto"
    timer = StepTimer()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=args.steps + timer.warmup + 1,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = TensorDataset(torch.randn(args.tokens * (args.steps + timer.warmup + 1), args.features))
    trainer.fit(module, DataLoader(data, batch_size=args.tokens))
    return statistics.median(timer.seconds())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each fit (default: 40)")
    parser.add_argument("--fits", type=int, default=7, help="pairs of fits (default: 7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    medians: dict[str, list[float]] = {"single device": [], "phantom": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.fits):
            for kind, seconds in medians.items():
                seconds.append(fit(kind, args, folder))
    for kind, seconds in medians.items():
        print(f"{kind:14} {1e3 * statistics.median(seconds):7.2f} ms a step", end="")
        print(f"  ({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})")
    ratios = sorted(b / a for a, b in zip(*medians.values(), strict=True))
    print(f"ratio          {statistics.median(ratios):7.3f}            ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
