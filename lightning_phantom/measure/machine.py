"""Measures the numbers of a `Machine`, with as many processes busy at once as there will be ranks on this host.

The products' three come from a few small layers, dense and phantom, forward and backward, and copies of tensors, fitted
by least squares on relative errors; those of the link from collectives of several sizes between the ranks, and from one
beside a product.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from lightning_phantom.cost.collectives import Cut, Group
from lightning_phantom.cost.count import ELEMENT_BYTES
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.machine import Machine, Work, copy
from lightning_phantom.cost.predict import exact_stages, phantom_stages
from lightning_phantom.distributed.comm import barrier, start_all_gather, start_all_reduce, start_reduce_scatter
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.phantom import PhantomLinear

# features, blocks (1: dense), phantom width, tokens
CALIBRATION = (
    *((256, 1, 0, 64), (1024, 1, 0, 256), (1536, 1, 0, 64), (384, 1, 0, 1024)),
    *((512, 4, 8, 64), (1024, 2, 64, 256), (1024, 8, 16, 512), (2048, 4, 32, 128), (2048, 2, 32, 256)),
)
COPIES = (2**20, 2**22)  # elements: without them small layers leave it open what is arithmetic and what is memory
OUT_OF_CACHE = 2**23  # elements of the weights and values of a chain of layers
MESSAGES = (1, 2**12, 2**15, 2**18, 2**20)  # elements that each rank gives to an all-gather
SUMMED = 2**20  # elements of each rank, where torch sums
REPEATS = 7


def measure_here(num_ranks: int, dtype: str = "float32", timeout_s: float = 120.0) -> Machine:
    """Measure with `num_ranks` gloo processes of this host, at most one a core, which are started for it.

    Returns:
        What the slowest of them found. With one rank the link's numbers are infinite and zero: nothing is sent.

    Raises:
        PhantomError: a process died, or gave no answer in time.
    """
    processes = max(1, min(num_ranks, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (processes, f"file://{folder}/store", dtype, queue)
        started = start_processes(_measure_rank, arguments, processes, join=False, start_method="spawn")
        assert started is not None
        deadline = time.monotonic() + timeout_s
        try:
            while not started.join(timeout=1):
                if time.monotonic() > deadline:
                    raise PhantomError(
                        f"measuring this machine took more than {timeout_s:.0f} s; give --flops, "
                        f"--bandwidth and --latency instead."
                    )
        except ProcessRaisedException as error:
            raise PhantomError(f"measuring this machine failed: {error}") from error
        finally:
            for process in started.processes:
                process.kill()
        return queue.get()


def _measure_rank(rank: int, processes: int, store: str, dtype: str, queue: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    dist.init_process_group("gloo", store, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    world = dist.group.WORLD
    assert world is not None
    machine = measure(world, dtype)
    if rank == 0:
        queue.put(machine)
    dist.destroy_process_group()


def measure(group: dist.ProcessGroup, dtype: str = "float32", device: torch.device | str = "cpu") -> Machine:
    """Measure on all ranks of `group` at once, with this process's threads; collective. The slowest rank's numbers."""
    ranks = Ranks(group)
    kind = {"dtype": getattr(torch, dtype), "device": torch.device(device)}
    timed = [_timed_layer(*sizes, kind, group) for sizes in CALIBRATION]
    timed += [_timed_copy(elements, kind, group) for elements in COPIES]
    work, seconds = zip(*timed, strict=True)
    size = ELEMENT_BYTES[dtype]
    per_flop, per_byte, per_op = nonnegative_fit([(w.flops, w.elements * size, w.ops) for w in work], seconds)
    per_sent, per_call, per_reduced, per_scattered, seen = 0.0, 0.0, 0.0, 0.0, 0.0
    if ranks.size > 1:
        sent, waits = zip(*(_timed_exchange(count, ranks, kind) for count in MESSAGES), strict=True)
        per_sent, per_call = nonnegative_fit([(s, 1.0) for s in sent], waits)
        per_reduced, per_scattered = (_timed_sum(which, ranks, kind) for which in (start_all_reduce, _scatter))
        seen = 1 - _overlap(ranks, kind)
    found = [per_flop, per_byte, per_op, per_sent, per_call, per_reduced, per_scattered, seen]
    slowest = ranks.all_reduce(torch.tensor(found, dtype=torch.float64), "max").tolist()
    flops, memory, per_op, link, per_call, reduced, scattered, seen = slowest
    return Machine(
        _rate(flops), _rate(memory), per_op, _rate(link), per_call, _rate(reduced), _rate(scattered), overlap=1 - seen
    )


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else float("inf")


def _timed_layer(features: int, p: int, k: int, tokens: int, kind: Any, group: dist.ProcessGroup) -> tuple[Work, float]:
    """A layer's work and seconds, forward and backward: its share of a chain that fits into no cache."""
    n, alone = features, Group(1, tokens, 0)
    if p == 1:
        one: nn.Module = nn.Linear(n, n, **kind)
        stages = exact_stages(Layer(n, n), Cut(), alone)
    else:
        one = PhantomLinear(n, n, p, k, **kind)
        stages = phantom_stages(Layer(n, n, phantom_width=k), p, alone)
    held = sum(parameter.numel() for parameter in one.parameters()) + tokens * n
    depth = max(2, min(16, -(-OUT_OF_CACHE // held)))
    chain = nn.Sequential(one, *(deepcopy(one) for _ in range(depth - 1)))
    x, grad = torch.randn(tokens, n, **kind).requires_grad_(), torch.randn(tokens, n, **kind)

    def step() -> None:
        chain.zero_grad(set_to_none=True)
        x.grad = None
        chain(x).backward(grad)

    return sum((stage.work for stage in stages), Work()), median_seconds(step, x, group) / depth


def _timed_copy(elements: int, kind: Any, group: dist.ProcessGroup) -> tuple[Work, float]:
    source, target = torch.randn(elements, **kind), torch.empty(elements, **kind)
    return copy(elements), median_seconds(lambda: target.copy_(source), source, group)


def _timed_exchange(elements: int, ranks: Ranks, kind: Any) -> tuple[int, float]:
    """Bytes sent and seconds of an all-gather and the reduce-scatter back, half of both."""
    shard = torch.randn(elements, 1, **kind)

    def there_and_back() -> None:
        gathered = ranks.all_gather(shard, None, "all-gather")()
        ranks.reduce_scatter(gathered, None, "reduce-scatter")()

    seconds = median_seconds(there_and_back, shard, ranks.group)
    return (ranks.size - 1) * elements * shard.element_size(), seconds / 2


def _scatter(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    return start_reduce_scatter(torch.empty_like(x[: len(x) // dist.get_world_size(group)]), x, group)


def _timed_sum(start: Callable[[Tensor, Any], dist.Work], ranks: Ranks, kind: Any) -> float:
    """Seconds a byte that a rank of a ring sends, where torch sums large tensors over the ranks."""
    x = torch.randn(ranks.size * SUMMED, 1, **kind)
    seconds = median_seconds(lambda: start(x, ranks.group).wait(), x, ranks.group)
    ways = 2 if start is start_all_reduce else 1
    return seconds / (ways * (ranks.size - 1) * SUMMED * x.element_size())


def _overlap(ranks: Ranks, kind: Any) -> float:
    """How much of a gather runs beside products that take as long."""
    shard, square = torch.randn(SUMMED, 1, **kind), torch.randn(512, 512, **kind)
    gathered = shard.new_empty(ranks.size * SUMMED, 1)

    def products(count: int) -> None:
        for _ in range(count):
            square @ square

    def gather(count: int) -> None:
        work = start_all_gather(gathered, shard, ranks.group)
        products(count)
        work.wait()

    alone = median_seconds(lambda: gather(0), shard, ranks.group)
    count = max(1, round(alone / median_seconds(lambda: products(1), shard, ranks.group)))
    # Every rank multiplies as often as the first, or they would not be as busy.
    count = int(ranks.all_reduce(torch.tensor([float(count)]), "max"))
    beside = median_seconds(lambda: products(count), shard, ranks.group)
    together = median_seconds(lambda: gather(count), shard, ranks.group)
    return min(1.0, max(0.0, (alone + beside - together) / min(alone, beside)))


def median_seconds(
    step: Callable[[], object], on: Tensor, group: dist.ProcessGroup | None, repeats: int = REPEATS
) -> float:
    """Median time of `step`, which every rank of the group begins together."""
    seconds = []
    for _ in range(2 + repeats):
        barrier(group)
        synchronize(on)
        start = time.perf_counter()
        step()
        synchronize(on)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def synchronize(tensor: Tensor) -> None:
    """Wait until the tensor's device has done what it was given."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def nonnegative_fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The coefficients c >= 0 for which `features @ c` comes nearest to `seconds`, relative to each of them."""
    relative = torch.tensor(features, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    target = torch.ones(len(seconds), 1, dtype=torch.float64)
    scale = relative.amax(0).clamp(min=1e-30)
    best, best_error = torch.zeros(relative.shape[1], dtype=torch.float64), float("inf")
    for size in range(1, relative.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(relative.shape[1]), size)):
            matrix = (relative / scale)[:, chosen]
            solution = torch.linalg.lstsq(matrix, target).solution
            error = float((matrix @ solution - target).norm())
            if bool((solution >= 0).all()) and error < best_error:
                best, best_error = torch.zeros_like(best), error
                best[chosen] = solution[:, 0] / scale[chosen]
    return best.tolist()
