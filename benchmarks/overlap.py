"""What a rank waits for in training steps, and how much of each exchange travels while it multiplies.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --ranks 2 --latents own previous --steps 50

A feed-forward network (as in benchmarks/ffn.yaml, smaller), forward and backward. Two tables for each way to read
latents, the ways in turn, step by step:

1. The milliseconds of a step in which this rank does nothing but wait, by what it waits for: medians over the steps.
2. By the profiler of torch: how much of the exchanges' time, from start to end, lies under this rank's products.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_phantom import PhantomConfig, phantomize_
from lightning_phantom.config import LATENTS, MIXINGS
from lightning_phantom.distributed.agreement import Agreement

Span = tuple[float, float]
WARM_UP = 3


def spans(events: Any, *names: str) -> list[Span]:
    """Start and end in us of the events of these names."""
    return [(event.time_range.start, event.time_range.end) for event in events if event.name in names]


def kind(event: Any, width: int, mixing: str) -> str | None:
    """What an exchange carries, by its kind and the width of what it sends; None for no exchange."""
    if event.name == "gloo:all_gather":
        return "latents, forward"
    if event.name == "gloo:all_to_all":
        if event.input_shapes[0][-1:] not in ([width], [2 * width]):  # two layers' latents may travel together
            return "entry, exit, questions"
        return "latents, backward" if mixing == "pairwise" else "latents, both ways"
    return None


def under(span: Span, products: list[Span]) -> float:
    """How much of a span lies under products, which follow each other."""
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in products)


@contextmanager
def waits() -> Iterator[dict[str, float]]:
    """Seconds in which this process waits for others inside the `with` block, by what for."""
    waited: dict[str, float] = defaultdict(float)
    wait = Agreement.wait

    def timed(self: Agreement, work: dist.Work, what: str) -> None:
        start = time.perf_counter()
        wait(self, work, what)
        waited[what.split(" of ")[0].replace("gradient: ", "gradients of ")] += time.perf_counter() - start

    Agreement.wait = timed  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        Agreement.wait = wait  # type: ignore[method-assign]


def rank(number: int, args: argparse.Namespace, folder: str) -> None:
    """Measure and profile steps on one rank; the first prints what it saw."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(args.ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=args.ranks)
    x = torch.randn(args.tokens, args.features)
    modules = {}
    for latents in args.latents:
        torch.manual_seed(0)
        layers = [each for _ in range(args.depth) for each in (nn.Linear(args.features, args.features), nn.ReLU())]
        how = {"mixing": args.mixing, "latents": latents}
        config = PhantomConfig(num_blocks=args.ranks, phantom_width=args.width, init="random", **how)
        modules[latents] = phantomize_(nn.Sequential(*layers), config, dist.group.WORLD)
    seen: dict[str, list[dict[str, float]]] = {latents: [] for latents in modules}
    for step in range(WARM_UP + args.steps):
        for latents, module in modules.items():
            with waits() as waited:
                module(x).square().mean().backward()
            if step >= WARM_UP:
                seen[latents].append(waited)
    tables = [(latents, profiled(module, x, args)) for latents, module in modules.items()]
    if number == 0:
        for latents, exchanges in tables:
            kinds = sorted({kind for waited in seen[latents] for kind in waited})
            print(f"\n{args.mixing}, latents {latents}: waits of a step in ms, median of {args.steps} (least to most)")
            for kind in (*kinds, "all"):
                ms = [1e3 * (sum(w.values()) if kind == "all" else w.get(kind, 0.0)) for w in seen[latents]]
                print(f"  {kind}: {statistics.median(ms):.2f} ({min(ms):.2f} to {max(ms):.2f})")
            for what, (calls, lasted, hidden) in exchanges.items():
                print(f"  {what}: {calls} calls, {lasted / 1e3:.1f} ms, {hidden / lasted:.0%} of it under products")
    dist.barrier()


def profiled(module: nn.Module, x: torch.Tensor, args: argparse.Namespace) -> dict[str, tuple[int, float, float]]:
    """Of five steps, by what is exchanged: how often, how long in us, and how much of that under products."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(5):
            module(x).square().mean().backward()
    events = seen.events()
    products = spans(events, "aten::bmm", "aten::baddbmm")
    exchanges: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if what := kind(event, args.width, args.mixing):
            exchanges[what].append((event.time_range.start, event.time_range.end))
    return {
        what: (len(found), sum(end - start for start, end in found), sum(under(span, products) for span in found))
        for what, found in exchanges.items()
    }


def main() -> None:
    """Profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="k")
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--mixing", choices=MIXINGS, default="pairwise")
    parser.add_argument("--latents", choices=LATENTS, nargs="+", default=LATENTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
