"""A profile of training steps: how much of each exchange travels while this rank multiplies.

    python benchmarks/overlap.py --ranks 2

    python benchmarks/overlap.py --ranks 2 --latents previous

A feed-forward network (as in benchmarks/ffn.yaml, smaller), forward and backward, by the profiler of torch. An exchange
lasts from its start to its end, whoever waits for it; what lies under matrix products of the same rank is hidden. What
the rank waits for, all exchanges together, is measured beside it, without the profiler.
"""

import argparse
import os
import tempfile
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_phantom import PhantomConfig, phantomize_
from lightning_phantom.config import LATENTS, MIXINGS
from lightning_phantom.distributed.comm import record_traffic

Span = tuple[float, float]


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


def rank(number: int, args: argparse.Namespace, folder: str) -> None:
    """Profile steps on one rank; the first prints what it saw."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(args.ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=args.ranks)
    torch.manual_seed(number)
    layers = [each for _ in range(args.depth) for each in (nn.Linear(args.features, args.features), nn.ReLU())]
    how = {"mixing": args.mixing, "latents": args.latents}
    config = PhantomConfig(num_blocks=args.ranks, phantom_width=args.width, init="random", **how)
    module = phantomize_(nn.Sequential(*layers), config, dist.group.WORLD)
    x = torch.randn(args.tokens, args.features)
    for _ in range(3):
        module(x).square().mean().backward()
    with record_traffic() as traffic:
        for _ in range(args.steps):
            module(x).square().mean().backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(args.steps):
            module(x).square().mean().backward()
    events = seen.events()
    products = spans(events, "aten::bmm", "aten::baddbmm")
    exchanges: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if what := kind(event, args.width, args.mixing):
            exchanges[what].append((event.time_range.start, event.time_range.end))
    if number == 0:
        print(f"{args.mixing}, latents {args.latents}: waits {traffic.waited_s / args.steps * 1e3:.2f} ms of a step")
        for what, found in exchanges.items():
            lasted = sum(end - start for start, end in found)
            hidden = sum(under(span, products) for span in found)
            print(f"{what}: {len(found)} calls, {lasted / 1e3:.1f} ms, {hidden / lasted:.0%} of it under products")
    dist.barrier()


def main() -> None:
    """Profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="k")
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--mixing", choices=MIXINGS, default="pairwise")
    parser.add_argument("--latents", choices=LATENTS, default="own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
