"""A transformer's training step under `strategy="phantom"` against DDP of the dense model, at the same global batch.

    python benchmarks/transformer.py --ranks 2
    python benchmarks/transformer.py --ranks 4 --rounds 9

A Trainer on both sides, in turn, on the same ranks: the language model of examples/lm.py, 2 blocks of 1024 features,
16 x 128 tokens a step in all, AdamW, p = 8 blocks and k = 0.25 of their width. A step lasts from one batch's end to the
next. Memory is what a rank holds at most while it trains, beyond what it held before the model was made.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.lm import VOCABULARY, LanguageModel
from lightning_phantom import PhantomStrategy
from lightning_phantom.measure.memory import Memory

METHODS = ("ddp", "phantom")


class Model(LanguageModel):
    """The language model, with AdamW at one rate: a few steps are no cycle."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on every parameter."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class StepTimer(L.Callback):
    """Notes the end of every batch, and the most memory held from the second one on."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.ends = memory, []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            self.memory.restart()


def fit(method: str, args: argparse.Namespace, folder: str) -> tuple[float, int]:
    """Train for a few steps; return the median seconds of a step, and the peak memory in bytes."""
    torch.manual_seed(0)
    memory = Memory(torch.device("cpu"))
    model = Model(args.dim, args.blocks, args.dim // 64, args.context, dropout=0.0, lr=1e-4)
    tokens = torch.randint(VOCABULARY, (args.batch * args.steps, args.context))
    timer = StepTimer(memory)
    phantom = PhantomStrategy(args.phantom_width, args.num_blocks, init="random")
    L.Trainer(
        accelerator="cpu",
        devices=args.ranks,
        strategy=phantom if method == "phantom" else DDPStrategy(),
        max_epochs=1,
        callbacks=[timer],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, DataLoader(TensorDataset(tokens, tokens), batch_size=args.batch // args.ranks))
    steps = [b - a for a, b in zip(timer.ends, timer.ends[1:], strict=False)][args.warmup :]
    return statistics.median(steps), memory.peak_bytes() or 0


def rank(number: int, args: argparse.Namespace, folder: str) -> None:
    """One rank's fits, all methods in turn in each round."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(args.ranks), NODE_RANK="0")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if number:
        sys.stdout = open(os.devnull, "w")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=args.ranks)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    peaks = dict.fromkeys(METHODS, 0)
    for turn in range(args.rounds):
        for method in METHODS:
            took, peak = fit(method, args, folder)
            slowest = torch.tensor([took, peak], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[method].append(slowest[0].item())
            peaks[method] = max(peaks[method], int(slowest[1]))
        print(f"round {turn + 1}: " + ", ".join(f"{m} {s[-1] * 1000:.1f} ms" for m, s in seconds.items()), flush=True)
    ratios = [p / d for p, d in zip(seconds["phantom"], seconds["ddp"], strict=True)]
    print(
        f"{args.ranks} ranks, p = {args.num_blocks}: phantom / ddp = {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}, {args.rounds} rounds)"
    )
    print(", ".join(f"peak memory of a rank, {m}: {peak / 2**20:.0f} MiB" for m, peak in peaks.items()))


def main() -> None:
    """Measure, and print each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps of a fit")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the transformer")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, all ranks together")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--num-blocks", type=int, default=8, help="p")
    parser.add_argument("--phantom-width", type=float, default=0.25, help="k, as a fraction of a block's width")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
