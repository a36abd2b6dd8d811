"""What the name of a strategy gives who changes nothing else: torch's transformer layers under Lightning's Trainer.

    python benchmarks/newcomer.py
    python benchmarks/newcomer.py --ranks 4 --strategies ddp phantom_8 --rounds 3

Each run is a process of its own, as a user starts it, and the strategies come in turn. A step is the median of a run's,
after two that warm up; the ratios are to the first strategy's step in the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

WARM_UP = 2


class Model(L.LightningModule):
    """Predicts the next byte."""

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, features)
        layer = nn.TransformerEncoderLayer(features, features // 64, 4 * features, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(features, 256)

    def training_step(self, text: Tensor, batch_idx: int) -> Tensor:
        """The loss on text [windows, length]."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1] - 1)
        scores = self.head(self.layers(self.embed(text[:, :-1]), mask, is_causal=True))
        return nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as it comes."""
        return torch.optim.AdamW(self.parameters(), 1e-4)


class Clock(L.Callback):
    """Keeps the seconds of each step, and writes them down at the end."""

    def __init__(self, file: Path) -> None:
        self.file, self.seconds, self.start = file, list[float](), 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write them down."""
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(self.seconds[WARM_UP:]))


def train(strategy: str, args: argparse.Namespace) -> None:
    """One run."""
    L.seed_everything(0, verbose=False)
    text = torch.randint(256, (args.ranks * args.windows * (WARM_UP + args.steps), args.length + 1))
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=args.ranks,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock(args.out)],
    )
    trainer.fit(Model(args.features, args.layers), DataLoader(text, batch_size=args.windows))


def main() -> None:
    """Run all strategies in turn, and print what a step took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "phantom", "phantom_8"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="of a run, after those that warm up")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8, help="a rank reads in a step")
    parser.add_argument("--length", type=int, default=128, help="of a window")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        train(args.run, args)
        return
    steps: dict[str, list[float]] = {strategy: [] for strategy in args.strategies}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for strategy in args.strategies:
                out = Path(folder) / "seconds.json"
                command = [sys.executable, *sys.argv, "--run", strategy, "--out", str(out)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                run = subprocess.run(command, env=environment, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(f"{strategy} ended with {run.returncode}:\n{run.stderr[-3000:]}")
                steps[strategy].append(statistics.median(json.loads(out.read_text())))
    first = steps[args.strategies[0]]
    print(f"{args.features} features, {args.layers} layers, {args.ranks} ranks x {args.windows} x {args.length} tokens")
    for strategy, seconds in steps.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, first, strict=True)]
        print(
            f"  {strategy}: {1e3 * statistics.median(seconds):.0f} ms a step, {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) of {args.strategies[0]}'s"
        )


if __name__ == "__main__":
    main()
