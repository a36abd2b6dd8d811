"""How well `lightning-phantom plan` predicts the time of a step: predicted and measured, side by side.

    python benchmarks/predict.py

The machine's rates are measured first, on layers of their own (`lightning_phantom.measure.machine`); none of
the configurations below is among them. All steps are then timed in turn, round after round, on the same ranks.
"""

import argparse
import os
import statistics
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.predict import predict
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.measure.machine import measure
from lightning_phantom.measure.simulate import make_share, make_step

# Ranks, features, depth, blocks, phantom width, tokens of all ranks together.
CONFIGURATIONS = (
    *((1, 768, 4, 4, 24, 192), (1, 1280, 3, 8, 16, 320), (1, 1536, 2, 2, 96, 512), (1, 2560, 2, 16, 16, 96)),
    *((2, 768, 4, 2, 48, 384), (2, 1280, 3, 4, 32, 192), (2, 1536, 4, 8, 24, 512), (2, 2560, 2, 4, 64, 256)),
)


def layers_of(features: int, depth: int, blocks: int, width: int) -> list[Layer]:
    """A feed-forward network as a hidden stretch of a model: its input needs a gradient."""
    k = resolve_phantom_width(width, features, features, blocks)
    return [Layer(features, features, enters=n == 0, leaves=n == depth - 1, phantom_width=k) for n in range(depth)]


def rank_main(rank: int, size: int, store: str, rounds: int, queue: mp.SimpleQueue) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    ranks = Ranks(dist.group.WORLD)
    machine = measure(dist.group.WORLD)
    steps, seconds = {}, {}
    for at, (_, *sizes, tokens) in enumerate(c for c in CONFIGURATIONS if c[0] == size):
        layers = layers_of(*sizes)
        predicted = predict(layers, sizes[2], sizes[3], size, tokens, machine)
        for method in ("tensor_parallel", "tensor_parallel_layerwise", "phantom")[:: 1 if size > 1 else 2]:
            made = make_share(method, layers, sizes[2], ranks, {"device": "meta", "dtype": torch.float32})
            steps[at, method] = make_step(made, layers, tokens // size), predicted[method].seconds
            seconds[at, method] = []
    for _ in range(1 + rounds):
        for key, (step, _) in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            seconds[key].append(time.perf_counter() - start)
    if rank == 0:
        queue.put((machine, {key: (statistics.median(s[1:]), steps[key][1]) for key, s in seconds.items()}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each (default: 15)")
    rounds = parser.parse_args().rounds
    errors: dict[str, list[float]] = {}
    for size in (1, 2):
        queue = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (size, f"file://{folder}/store", rounds, queue), size)
        machine, results = queue.get()
        print(f"R={size}: {machine}")
        print(
            f"{'n':>6} {'depth':>5} {'p':>3} {'k':>4} {'tokens':>6}  {'method':26} {'measured':>9} {'predicted'}  error"
        )
        ours = [c for c in CONFIGURATIONS if c[0] == size]
        for (at, method), (measured, predicted) in results.items():
            _, n, depth, p, k, tokens = ours[at]
            error = predicted / measured - 1
            errors.setdefault(method, []).append(abs(error))
            print(f"{n:6} {depth:5} {p:3} {k:4} {tokens:6}  {method:26} ", end="")
            print(f"{1e3 * measured:6.2f} ms {1e3 * predicted:6.2f} ms  {error:+.1%}")
    for method, sizes in errors.items():
        print(f"median error, {method}: {statistics.median(sizes):.1%} of {len(sizes)}")
    print(f"median error: {statistics.median(e for sizes in errors.values() for e in sizes):.1%}")


if __name__ == "__main__":
    main()
