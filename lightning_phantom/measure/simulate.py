"""One rank's step of the feed-forward layers among many ranks that are not there, on torch's fake process group.

The products, copies and allocations are real, those of rank 0 of R; only its own shard of each layer exists. The
collectives return at once and what they would have brought is filled in with this rank's own values (what they leave
behind otherwise is uninitialised memory, whose denormals and NaNs make products many times slower), outside the clock.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_phantom.cost.count import Layer, layouts_in_pairs
from lightning_phantom.cost.predict import in_layers
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.measure.memory import Memory

REPEATS = 5


@dataclass(frozen=True)
class Simulated:
    """What one rank measured.

    Attributes:
        compute_s: seconds of a forward and backward, collectives left out; the median of a few.
        peak_bytes: the most memory held at once for layers, gradients and activations, beyond what the process held
            before: resident memory, as the system counts it (its high-water mark); None where it does not say.
        tensor_bytes: weights, their gradients and what the forward saves for the backward, by their shapes.
        weights: parameters held.
        sent_bytes: bytes that the rank gave to collectives, by the ring's count.
        calls: collectives.
    """

    compute_s: float
    peak_bytes: int | None
    tensor_bytes: int
    weights: int
    sent_bytes: int
    calls: int


class FilledRanks(Ranks):
    """Ranks of a fake group: what a collective brings is filled in, and the time of all that is kept apart.

    Attributes:
        seconds: spent in collectives and in filling since it was last set.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        super().__init__(process_group)
        self.seconds = 0.0

    def all_gather(self, shard: Tensor) -> Callable[[], Tensor]:
        """As if every rank had given what this one gives."""
        return self._filled(super().all_gather, shard, shard)

    def reduce_scatter(self, parts: Tensor) -> Callable[[], Tensor]:
        """As if what the others add were zero."""
        return self._filled(super().reduce_scatter, parts, parts[0])

    def _filled(self, collective: Callable[[Tensor], Callable[[], Tensor]], given: Tensor, values: Tensor) -> Any:
        # Some releases of torch's fake group write the output themselves, others leave it as it was allocated.
        start = time.perf_counter()
        wait = collective(given)
        if self.size > 1:
            wait().copy_(values)
        self.seconds += time.perf_counter() - start
        return wait


def simulate(
    layers: Sequence[Layer], num_blocks: int, num_ranks: int, tokens: int, dtype: str = "float32"
) -> dict[str, Simulated]:
    """Run rank 0 of `num_ranks`, by method: `"tensor_parallel"`, `"tensor_parallel_layerwise"` and `"phantom"`.

    Uses as many threads as a rank of this host would have. Initialises torch.distributed, and ends it again.

    Args:
        layers: what `Plan.cost_layers` gives; each with its own `phantom_width`.
        num_blocks: p.
        num_ranks: R, which divides p.
        tokens: rows of the activations.
        dtype: type of weights and activations.

    Raises:
        PhantomError: torch.distributed is in use.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise PhantomError("a simulation needs a process in which torch.distributed is not initialised.")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        torch.set_num_threads(max(1, cores // min(num_ranks, cores)))
        ranks = FilledRanks(dist.group.WORLD if num_ranks > 1 else None)
        kind = {"device": "meta", "dtype": getattr(torch, dtype)}
        return {
            method: _run(partial(make_share, method, layers, num_blocks, ranks, kind), layers, tokens, ranks)
            for method in ("tensor_parallel", "tensor_parallel_layerwise", "phantom")
        }
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()


def make_share(method: str, layers: Sequence[Layer], p: int, ranks: Ranks, kind: Any) -> list[SplitLinear]:
    """This rank's layers by a method, on the CPU, with random weights; nothing but the shard is ever allocated."""
    made: list[SplitLinear] = []
    for layer, in_pairs in zip(layers, layouts_in_pairs(layers), strict=True):
        n, m = layer.in_features, layer.out_features
        layouts: Any = in_pairs if method == "tensor_parallel" else in_layers(layer)
        placed: dict[str, Any] = {
            "process_group": ranks.process_group,
            "input_layout": layouts[0],
            "output_layout": layouts[1],
            **kind,
        }
        if method == "phantom":
            assert layer.phantom_width is not None
            one: SplitLinear = PhantomLinear(n, m, p, layer.phantom_width, layer.bias, **placed)
        else:
            style = "megatron" if method == "tensor_parallel" else "layerwise"
            one = ParallelLinear(n, m, style, layer.bias, **placed)
        one.ranks = ranks
        one.to_empty(device="cpu")
        for parameter in one.parameters():
            torch.nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5)
        made.append(one)
    return made


def make_step(made: Sequence[SplitLinear], layers: Sequence[Layer], tokens: int) -> Callable[[], None]:
    """A forward and backward of these layers, one fed by the other where the widths are right; inputs are random."""

    @cache
    def given(width: int, requires_grad: bool) -> Tensor:
        return torch.randn(tokens, width, dtype=made[0].weight.dtype, requires_grad=requires_grad)

    def step() -> None:
        for one in made:
            one.zero_grad(set_to_none=True)
        ends: list[Tensor] = []  # outputs that no layer reads
        z = x = torch.empty(0)
        for layer, one in zip(layers, made, strict=True):
            width = one.in_features // (one.ranks.size if one.input_layout == "sharded" else 1)
            if not layer.shares_input and z.dim() == 2 and z.shape[1] == width:
                x = ends.pop()
            elif not layer.shares_input:
                x = given(width, layer.needs_input_grad)
                x.grad = None
            z = one(x)
            ends.append(z)
        torch.autograd.backward(ends, [given(end.shape[1], False) for end in ends])

    return step


def _run(make: Callable[[], list[SplitLinear]], layers: Sequence[Layer], tokens: int, ranks: FilledRanks) -> Simulated:
    memory = Memory(torch.device("cpu"))
    made = make()
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    step = make_step(made, layers, tokens)
    seconds = []
    for _ in range(1 + REPEATS):
        ranks.seconds, start = 0.0, time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start - ranks.seconds)
    peak = memory.peak_bytes()
    with record_traffic() as traffic, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    held = sum(p.numel() * p.element_size() for one in made for p in one.parameters())
    return Simulated(
        compute_s=statistics.median(seconds[1:]),
        peak_bytes=peak,
        tensor_bytes=2 * held + saved,
        weights=sum(p.numel() for one in made for p in one.parameters()),
        sent_bytes=traffic.total_bytes,
        calls=traffic.total_calls,
    )
