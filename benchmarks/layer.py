"""Time of one phantom layer against nn.Linear, beside the ratio of their FLOPs: one process, no communication.

    python benchmarks/layer.py
    python benchmarks/layer.py --features 16384 --blocks 8 --width 128 --tokens 4096 --dtype bfloat16 --device cuda

Forward and backward, input gradient included; the two in turn, medians, and the spread of the ratio pair by pair.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

from lightning_phantom import PhantomLinear, estimate_cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=4096, help="n: input and output features (default: 4096)")
    parser.add_argument("--blocks", type=int, default=8, help="p: number of blocks (default: 8)")
    parser.add_argument("--width", type=int, default=32, help="k: phantom width (default: 32)")
    parser.add_argument("--tokens", type=int, default=256, help="rows of the activation (default: 256)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs after three to warm up (default: 15)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}")
    sizes = (args.features, args.blocks, args.width, args.tokens, args.dtype)
    print(*lines(compare(*sizes, args.device, args.repeats)), sep="\n")


def compare(n: int, p: int, k: int, tokens: int, dtype: str, device: str, repeats: int) -> dict[str, Any]:
    """The times of both layers in seconds, the ratio of each pair, and of the FLOPs."""
    kind = {"dtype": getattr(torch, dtype), "device": device}
    layers = {"nn.Linear": nn.Linear(n, n, **kind), "phantom": PhantomLinear(n, n, p, k, **kind)}
    x = torch.randn(tokens, n, **kind).requires_grad_()
    grad = torch.randn(tokens, n, **kind)
    seconds = {name: [] for name in layers}
    for _ in range(3 + repeats):
        for name, layer in layers.items():
            seconds[name].append(step(layer, x, grad))
    seconds = {name: times[3:] for name, times in seconds.items()}
    pairs = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    cost = estimate_cost([(n, n)], p, k, 1, tokens)
    return {
        "sizes": f"n={n} p={p} k={k} tokens={tokens} {dtype}",
        "seconds": seconds,
        "pairs": pairs,
        "time_ratio": statistics.median(pairs),
        "flop_ratio": cost.phantom.flops / cost.tensor_parallel.flops,
    }


def lines(seen: dict[str, Any]) -> list[str]:
    """What `compare` saw, to be read."""
    times = [
        f"{name:10} {1e3 * statistics.median(times):8.2f} ms  ({1e3 * min(times):.2f} to {1e3 * max(times):.2f})"
        for name, times in seen["seconds"].items()
    ]
    spread = f"({seen['pairs'][0]:.3f} to {seen['pairs'][-1]:.3f})"
    ratios = [f"time ratio {seen['time_ratio']:8.3f}     {spread}", f"FLOP ratio {seen['flop_ratio']:8.4f}"]
    return [seen["sizes"], *times, *ratios]


def step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> float:
    """Seconds of one forward and backward, gradients freshly allocated."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    synchronize(x)
    start = time.perf_counter()
    layer(x).backward(grad)
    synchronize(x)
    return time.perf_counter() - start


def synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
