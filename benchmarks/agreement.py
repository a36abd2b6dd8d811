"""What it costs that the ranks agree before they exchange anything: an entry's question, and a step that needs none.

    python benchmarks/agreement.py --ranks 2

The ranks do nothing else, so a question takes as long as a message there and back; in a training step, waiting for a
slow rank comes on top, as it does at any exchange.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_phantom.distributed.agreement import agreement_of

STEP_S = 0.05  # a short step, to compare with


def seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, the mean of many."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def rank(number: int, args: argparse.Namespace, folder: str) -> None:
    """Time both on one rank."""
    os.environ.update(RANK=str(number), WORLD_SIZE=str(args.ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=args.ranks)
    agreement, other = (agreement_of(group) for group in [dist.new_group(list(range(args.ranks))) for _ in range(2)])

    def known() -> None:
        other.begin()
        other.step("latents of 'layer' 256 torch.float32")

    known()
    asked, unasked = [], []
    for _ in range(args.rounds):
        asked.append(seconds(lambda: agreement.enter("layer", 128, "1024 torch.float32"), args.calls))
        unasked.append(seconds(known, args.calls))
    if number == 0:
        for what, times in (("an entry's question", asked), ("a step that is known", unasked)):
            middle = statistics.median(times)
            print(
                f"{what}: {middle * 1e6:.1f} us ({min(times) * 1e6:.1f} to {max(times) * 1e6:.1f}), "
                f"{middle / STEP_S:.2%} of a step of {STEP_S * 1000:.0f} ms"
            )


def main() -> None:
    """Measure, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
