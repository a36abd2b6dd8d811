"""Latency of inference with phantom layers against the dense model, on one process: decoding and batches.

    python -m benchmarks.latency
    python -m benchmarks.latency --blocks 4 --width 0.25 --features 4096 --tokens 1024 --threads 8

Two models in eager mode without gradients: the language model of examples/lm.py with its own sizes, and one larger
feed-forward network, n -> 4n -> n. Each sees a single token (batch 1, as in decoding) and a batch. Dense and phantom
take turns; medians, the fastest and the slowest, and the spread of the ratio pair by pair, between its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.lm import LanguageModel, Text
from lightning_phantom import PhantomConfig, phantomize_
from lightning_phantom.measure.machine import synchronize


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__, formatter_class=kind)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[2, 4, 8], help="p: numbers of blocks (default: 2 4 8)"
    )
    parser.add_argument("--width", type=float, default=0.25, help="k as a share of the block width (default: 0.25)")
    parser.add_argument("--features", type=int, default=1024, help="n of the feed-forward network (default: 1024)")
    parser.add_argument("--tokens", type=int, default=256, help="rows of its batch (default: 256)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=50, help="timed pairs after five to warm up (default: 50)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    n, data = args.features, Text()
    cases: list[tuple[str, Callable[[], nn.Module], dict[str, Tensor]]] = [
        (
            "language model, 4 blocks of 128 -> 512 -> 128",
            LanguageModel,
            {
                "one token": torch.randint(256, (1, 1)),
                f"batch {data.batch_size} x {data.context}": torch.randint(256, (data.batch_size, data.context)),
            },
        ),
        (
            f"feed-forward network {n} -> {4 * n} -> {n}",
            lambda: nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n)),
            {"one token": torch.randn(1, n), f"batch {args.tokens}": torch.randn(args.tokens, n)},
        ),
    ]
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}, float32, times in ms")
    print(f"{'':14} {'p':>2} {'dense':>9} {'':17} {'phantom':>9} {'':17} {'ratio':>6}")
    for title, make, inputs in cases:
        print(title)
        for name, x in inputs.items():
            for p in args.blocks:
                compare(name, p, make, PhantomConfig(p, args.width), x.to(args.device), args.repeats)


def compare(name: str, p: int, make: Callable[[], nn.Module], config: PhantomConfig, x: Tensor, repeats: int) -> None:
    """Time a dense model and its phantom twin in turn, and print a line."""
    models = make().eval().to(x.device), phantomize_(make(), config).eval().to(x.device)
    seconds: tuple[list[float], list[float]] = [], []
    with torch.inference_mode():
        for _ in range(5 + repeats):
            for model, times in zip(models, seconds, strict=True):
                synchronize(x)
                start = time.perf_counter()
                model(x)
                synchronize(x)
                times.append(time.perf_counter() - start)
    dense, phantom = ([1e3 * t for t in times[5:]] for times in seconds)
    low, ratio, high = statistics.quantiles((b / a for a, b in zip(dense, phantom, strict=True)), n=4)
    columns = "".join(f"{statistics.median(t):9.3f} {f'({min(t):.3f} to {max(t):.3f})':>18} " for t in (dense, phantom))
    print(f"  {name:13} {p:2} {columns} {ratio:5.2f}  ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
