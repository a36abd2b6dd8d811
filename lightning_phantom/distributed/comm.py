"""Every collective of the package, as conjugate pairs: what one does forward, the other does backward.

R ranks hold one activation of `width` features between them, each its own `width/R` consecutive ones (the *sharded*
layout), or each all of them (*replicated*). Activations are matrices `[tokens, features]` here.

| pair | forward | backward |
|---|---|---|
| `scatter` / `gather` | slice / all-gather | all-gather / slice |
| `Ranks.all_gather` / `Ranks.reduce_scatter` | each the other's adjoint, for use inside an autograd function |

Nothing is communicated by a group of one. Every collective reports its calls and bytes to the recorders that are
open (`record_traffic`): bytes are those that one rank sends in a ring, `(R - 1) / R` of the full tensor, or twice that
for the sum that every rank gets whole (`Ranks.sum`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Newer releases of torch renamed these; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What one rank sent, and how long it waited for what others sent.

    Attributes:
        calls: collectives issued, by kind (`"all_gather"`, `"reduce_scatter"`, `"all_reduce"`).
        sent_bytes: bytes sent, by kind.
        waited_s: seconds in which the process did nothing but wait for a collective to end. Where collectives run on
            a device of their own (NCCL) the process does not wait, and this stays near zero.
    """

    calls: dict[str, int] = field(default_factory=dict)
    sent_bytes: dict[str, int] = field(default_factory=dict)
    waited_s: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes sent by this rank, all kinds together."""
        return sum(self.sent_bytes.values())

    @property
    def total_calls(self) -> int:
        """Collectives issued by this rank, all kinds together."""
        return sum(self.calls.values())

    def add(self, kind: str, sent_bytes: int) -> None:
        """Count one collective."""
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.sent_bytes[kind] = self.sent_bytes.get(kind, 0) + sent_bytes


_recorders: list[Traffic] = []


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Count the collectives that this process issues inside the `with` block."""
    traffic = Traffic()
    _recorders.append(traffic)
    try:
        yield traffic
    finally:
        _recorders[:] = [r for r in _recorders if r is not traffic]


def _wait(work: dist.Work) -> None:
    """Wait for a collective to end, and note for how long."""
    start = time.perf_counter()
    work.wait()
    waited = time.perf_counter() - start
    for traffic in _recorders:
        traffic.waited_s += waited


class Ranks:
    """The ranks that hold a layer between them: a process group, or this process alone.

    Args:
        process_group: the group; `None` means this process alone, also when torch.distributed is initialised.

    A copy of a module lives on the same ranks as the module: `deepcopy` returns the same object.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; raises ValueError for a process alone without one."""
        if self.process_group is None:
            raise ValueError("this process is alone and has no group")
        return self.process_group

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    def slice_of(self, width: int) -> slice:
        """The consecutive features, out of `width`, that this rank holds."""
        share = width // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_gather(self, shard: Tensor) -> Callable[[], Tensor]:
        """Start gathering `shard` [*, width]; the returned function waits and gives [R, *, width], by rank."""
        if self.size == 1:
            return lambda: shard.unsqueeze(0)
        shard = shard.contiguous()
        gathered = shard.new_empty((self.size, *shard.shape))
        work = _all_gather_single(gathered.flatten(0, 1), shard, group=self.process_group, async_op=True)
        self._count("all_gather", gathered)

        def wait() -> Tensor:
            _wait(work)
            return gathered

        return wait

    def reduce_scatter(self, parts: Tensor) -> Callable[[], Tensor]:
        """Start summing `parts` [R, *, width] over the ranks; the returned function waits for our [*, width]."""
        if self.size == 1:
            return lambda: parts[0]
        parts = parts.contiguous()
        self._count("reduce_scatter", parts)
        if dist.get_backend(self.process_group) == "gloo":
            # gloo's reduce-scatter costs as much as its all-reduce; an exchange and a local sum do not.
            received = torch.empty_like(parts)
            work = dist.all_to_all_single(
                received.flatten(0, 1), parts.flatten(0, 1), group=self.process_group, async_op=True
            )

            def wait() -> Tensor:
                _wait(work)
                return received.sum(0)
        else:
            reduced = torch.empty_like(parts[0])
            work = _reduce_scatter_single(reduced, parts.flatten(0, 1), group=self.process_group, async_op=True)

            def wait() -> Tensor:
                _wait(work)
                return reduced

        return wait

    def sum(self, x: Tensor) -> Callable[[], Tensor]:
        """Start summing `x` [*] over the ranks, into its own memory; the returned function waits for it."""
        if self.size == 1:
            return lambda: x
        self._count("all_reduce", x, passes=2)
        # gloo's own is as fast as an exchange, a local sum and a gather, or faster; and it runs by itself to the end.
        work = dist.all_reduce(x, group=self.process_group, async_op=True)

        def wait() -> Tensor:
            _wait(work)
            return x

        return wait

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Send `parts[s]` to rank s; give [R, *], what each rank sent here. Not counted: weights, not activations."""
        if self.size == 1:
            return parts
        sent = within_reach(parts, self.process_group).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.process_group)
        return received.to(parts.device)

    def all_reduce(self, value: Tensor, op: str) -> Tensor:
        """Return the "sum" or "max" of `value` over the ranks. Not counted: scalars, not activations."""
        if self.size > 1:
            reduced = within_reach(value, self.process_group).clone()
            reduce_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
            dist.all_reduce(reduced, reduce_op, group=self.process_group)
            return reduced.to(value.device)
        return value

    def gather_to_first(self, shard: Tensor) -> list[Tensor] | None:
        """Give the shards of all ranks to the group's first, None to the others. Not counted: weights."""
        if self.size == 1:
            return [shard]
        shard = within_reach(shard, self.process_group).contiguous()
        parts = [torch.empty_like(shard) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(shard, parts, dist.get_global_rank(self.group, 0), group=self.process_group)
        return parts

    def _count(self, kind: str, total: Tensor, passes: int = 1) -> None:
        """Count a collective that goes once, or twice, around the ring with `total`, of all ranks together."""
        sent = passes * (self.size - 1) * total.numel() * total.element_size() // self.size
        for traffic in _recorders:
            traffic.add(kind, sent)


def within_reach(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`tensor`, or a copy of it where the group's backend can read it.

    NCCL knows devices only, and weights are often on the host: when a model is swapped, before it is moved.
    """
    if group is None or tensor.device.type in (known := [device.type for device in group._device_types]):
        return tensor
    return tensor.to(torch.device(known[0], torch.accelerator.current_device_index()))


def broadcast(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return what the first rank of `group` holds; `tensor` itself where there is no group."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    received = within_reach(tensor, group).clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, dist.get_global_rank(group, 0), group=group)
    return received.to(tensor.device)


def gather_copies(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack what each rank of `group` holds, [size, *]; backward, each gets the sum of the gradients of its own."""
    return _GatherCopies.apply(x, group)


def scatter(x: Tensor, ranks: Ranks) -> Tensor:
    """Replicated [tokens, width] -> sharded [tokens, width/R]; the gradient is gathered, if one is asked for."""
    return x if ranks.size == 1 else _Scatter.apply(x, ranks)


def gather(x: Tensor, ranks: Ranks) -> Tensor:
    """Sharded [tokens, width/R] -> replicated [tokens, width]; the gradient is sliced."""
    return x if ranks.size == 1 else _Gather.apply(x, ranks)


# Both return new memory, never a view: autograd forbids writing into views that an autograd function has made.


def _slice(x: Tensor, ranks: Ranks) -> Tensor:
    return x[:, ranks.slice_of(x.shape[1])].clone(memory_format=torch.contiguous_format)


def _join(x: Tensor, ranks: Ranks) -> Tensor:
    return torch.cat(tuple(ranks.all_gather(x)()), dim=1)


class _GatherCopies(torch.autograd.Function):
    # torch.distributed.nn has one, but its backward on gloo takes ranks of a subgroup for global ranks.
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _slice(x, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _join(grad, ctx.ranks), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _join(x, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _slice(grad, ctx.ranks), None


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank of `group`, or of the world, holds, by rank; anything that can be pickled. Not counted."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(value: Any) -> Any:
    """What the world's first rank holds; anything that can be pickled. Not counted."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
