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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_phantom.cost.layer import Layer, as_layers, is_row
from lightning_phantom.distributed.agreement import Agreement, Rows
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.distributed.ranks import Arriving, Ranks, Waiting
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.activation import Place, ShardedActivation
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.measure.memory import Memory

REPEATS = 5
W = TypeVar("W", bound=Waiting)


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


class _Alike(Agreement):
    """What ranks agree on that are not there: they are at the same place, with as many rows."""

    def enter(self, layer: str, rows: int, sort: str) -> Rows:
        """Ask nobody."""
        self._entries += 1
        return Rows((rows,) * self._size, self.shared_batches, self._entries)

    def step(self, what: str, rows: Rows | None = None) -> None:
        """Ask nobody."""


class FilledRanks(Ranks):
    """Ranks of a fake group: what a collective brings is filled in, and the time of all that is kept apart.

    Attributes:
        seconds: spent in collectives and in filling since it was last set.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        super().__init__(process_group)
        self.seconds = 0.0
        self._alike = None if process_group is None else _Alike(process_group)

    @property
    def agreement(self) -> Agreement:
        """What this rank would have agreed on with the others."""
        assert self._alike is not None
        return self._alike

    def all_gather(self, shard: Tensor, rows: Rows | None, what: str) -> Arriving:
        """As if every rank had given what this one gives."""
        return self._filled(shard, super().all_gather, shard, rows, what)

    def reduce_scatter(self, parts: Tensor, rows: Rows | None, what: str) -> Waiting:
        """As if what the others add were zero."""
        return self._filled(parts[0], super().reduce_scatter, parts, rows, what)

    def _all_to_all(
        self, sent: Tensor, rows_in: tuple[int, ...], rows_out: tuple[int, ...], kind: str, what: str, rows: Rows | None
    ) -> Arriving:
        """As if the others had given what this rank gives them."""
        return self._filled(sent, super()._all_to_all, sent, rows_in, rows_out, kind, what, rows)

    def _filled(self, values: Tensor, collective: Callable[..., W], *arguments: Any) -> W:
        # Some releases of torch's fake group write the output themselves, others leave it as it was allocated.
        start = time.perf_counter()
        wait = collective(*arguments)
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
        tokens: rows of the activations of all ranks together, of which each has as many.
        dtype: type of weights and activations.

    Raises:
        PhantomError: torch.distributed is in use, or the ranks would have different numbers of rows.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise PhantomError("a simulation needs a process in which torch.distributed is not initialised.")
    if tokens % num_ranks:
        raise PhantomError(f"{tokens} tokens on {num_ranks} ranks: each of them needs as many.")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        torch.set_num_threads(max(1, cores // min(num_ranks, cores)))
        ranks = FilledRanks(dist.group.WORLD if num_ranks > 1 else None)
        kind = {"device": "meta", "dtype": getattr(torch, dtype)}
        found = {}
        for method in ("tensor_parallel", "tensor_parallel_layerwise", "phantom"):
            given = [layer if method == "phantom" else layer.as_exact() for layer in as_layers(layers)]
            found[method] = _run(partial(make_share, method, given, num_blocks, ranks, kind), given, tokens, ranks)
        return found
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()


def make_share(method: str, layers: Sequence[Layer], p: int, ranks: Ranks, kind: Any) -> list[SplitLinear]:
    """This rank's layers by a method, on the CPU, with random weights; nothing but the shard is ever allocated."""
    made: list[SplitLinear] = []
    groups: list[list[SplitLinear]] = []
    layers = as_layers(layers)
    for n, layer in enumerate(layers):
        sizes, placed = (layer.in_features, layer.out_features), {"process_group": ranks.process_group, **kind}
        if method == "phantom":
            assert layer.phantom_width is not None
            before = _last_above(layer, layers, made)
            placed |= {"mixing": layer.mixing, "latents": layer.latents, "predecessor": before}
            one: SplitLinear = PhantomLinear(*sizes, p, layer.phantom_width, layer.bias, **placed)
        else:
            cut = "row" if method == "tensor_parallel" and is_row(layer) else "column"
            one = ParallelLinear(*sizes, cut, layer.bias, **placed)
        one.ranks, one.name = ranks, str(n)
        one.to_empty(device="cpu")
        for parameter in one.parameters():
            torch.nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5)
        made.append(one)
        if layer.shares_input:
            groups[-1].append(one)
        else:
            groups.append([one])
    for group in groups:
        for one in group:
            one.siblings = tuple(group)
    return made


def _last_above(layer: Layer, layers: Sequence[Layer], made: Sequence[SplitLinear]) -> SplitLinear | None:
    """Of the layers made so far the one whose latents `layer` reads: the last of those right above it in its FFN."""
    if layer.latents == "own":
        return None
    return next(
        m for each, m in reversed(list(zip(layers, made, strict=False))) if each.depth == (layer.depth or 0) - 1
    )


def make_step(made: Sequence[SplitLinear], layers: Sequence[Layer], tokens: int) -> Callable[[], None]:
    """A forward and backward of these layers, one fed by the other where the widths are right; inputs are random.

    `tokens` are this rank's own.
    """
    ranks, dtype = made[0].ranks, made[0].weight.dtype
    rows = Rows((tokens,) * ranks.size, False, 0)

    @cache
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    def whole(layer: Layer) -> Tensor:
        return random(tokens, layer.in_features).detach().requires_grad_(layer.needs_input_grad)

    def inside(layer: Layer) -> Tensor:
        if ranks.size == 1:
            return whole(layer)
        local = random(rows.total, layer.in_features // ranks.size).detach().requires_grad_(layer.needs_input_grad)
        return ShardedActivation.wrap(local, (tokens, layer.in_features), Place(ranks, rows, "a layer before"))

    def step() -> None:
        for one in made:
            one.zero_grad(set_to_none=True)
        ends: list[Tensor] = []  # outputs that no layer reads, and those that leave
        x = z = None
        for n, (layer, one) in enumerate(zip(layers, made, strict=True)):
            if not layer.shares_input:
                if layer.enters:
                    x = whole(layer)
                elif z is None or z.shape[1] != layer.in_features:
                    x = inside(layer)
                else:
                    x = z
                    if not layers[n - 1].leaves:
                        ends.pop()
            assert x is not None
            end = z = one(x)
            if isinstance(z, ShardedActivation):
                end = z.whole("the end") if layer.leaves else z.local
            ends.append(end)
        torch.autograd.backward(ends, [random(*end.shape) for end in ends])

    return step


def _run(make: Callable[[], list[SplitLinear]], layers: Sequence[Layer], tokens: int, ranks: FilledRanks) -> Simulated:
    memory = Memory(torch.device("cpu"))
    made = make()
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    step = make_step(made, layers, tokens // ranks.size)
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
