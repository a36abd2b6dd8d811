"""Every collective of the package is issued here; `ranks` gives them their meaning, `agreement` their order.

Those that carry activations and gradients return the work under way and are counted: they report their calls and bytes
to the recorders that are open (`record_traffic`). Bytes are those that one rank sends: in a ring, `(R - 1) / R` of the
full tensor, or twice that for a sum that every rank gets whole. Weights, statistics and words are not counted.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

_GLOO_FINISHES_S = 0.1

# Newer releases of torch renamed these; the old names warn there.
_all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What one rank sent, and how long it waited for what others sent.

    Attributes:
        calls: collectives issued, by kind (`"all_gather"`, `"all_to_all"`, `"reduce_scatter"`, `"all_reduce"`).
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


def count_wait(seconds: float) -> None:
    """Note that the process waited."""
    for traffic in _recorders:
        traffic.waited_s += seconds


def _count(kind: str, sent: Tensor, elements: int) -> None:
    for traffic in _recorders:
        traffic.add(kind, elements * sent.element_size())


@cache
def end_quietly() -> None:
    """Let gloo's threads finish before the interpreter ends.

    They let go of a collective's tensors a moment after it has ended, and need the interpreter for it; one that finds
    it ending aborts the process ("terminate called without an active exception"), however well its run went.
    """
    atexit.register(time.sleep, _GLOO_FINISHES_S)


# Activations and gradients


def start_all_gather(gathered: Tensor, shard: Tensor, group: Group, counted: bool = True) -> dist.Work:
    """Start gathering `shard` [n, *] of each of R ranks into `gathered` [R*n, *]."""
    if counted:
        _count("all_gather", shard, gathered.numel() - shard.numel())
    return _all_gather_single(gathered, shard, group=group, async_op=True)


def start_all_to_all(
    received: Tensor, sent: Tensor, group: Group, rows_in: Sequence[int], rows_out: Sequence[int], kind: str
) -> dist.Work:
    """Start sending `rows_out[s]` rows of `sent` to each rank s, and receiving `rows_in[s]` from it.

    `kind` is what it counts as: where a sum follows, it does the work of a reduce-scatter.
    """
    kept = rows_out[dist.get_rank(group)] * (sent.numel() // max(sent.shape[0], 1))
    _count(kind, sent, sent.numel() - kept)
    return dist.all_to_all_single(received, sent, list(rows_in), list(rows_out), group=group, async_op=True)


def start_reduce_scatter(reduced: Tensor, parts: Tensor, group: Group) -> dist.Work:
    """Start summing `parts` [R*n, *] over the ranks into `reduced` [n, *], this rank's part of the sum."""
    _count("reduce_scatter", parts, parts.numel() - reduced.numel())
    return _reduce_scatter_single(reduced, parts, group=group, async_op=True)


def start_all_reduce(x: Tensor, group: Group) -> dist.Work:
    """Start summing `x` over the ranks, in its own memory."""
    size = dist.get_world_size(group)
    _count("all_reduce", x, 2 * (size - 1) * x.numel() // size)
    return dist.all_reduce(x, group=group, async_op=True)


def start_telling(heard: Tensor, said: Tensor, group: Group) -> dist.Work:
    """Start telling every rank `said` [n], and hearing `heard` [R, n]; in one hop, where a gather goes round a ring."""
    return dist.all_to_all_single(heard, said.expand_as(heard).contiguous(), group=group, async_op=True)


# Weights, statistics and words


def within_reach(tensor: Tensor, group: Group) -> Tensor:
    """`tensor`, or a copy of it where the group's backend can read it.

    NCCL knows devices only, and weights are often on the host: when a model is swapped, before it is moved.
    """
    if group is None or tensor.device.type in (known := [device.type for device in group._device_types]):
        return tensor
    return tensor.to(torch.device(known[0], torch.accelerator.current_device_index()))


def broadcast(tensor: Tensor, group: Group) -> Tensor:
    """Return what the first rank of `group` holds; `tensor` itself where there is no group."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    received = within_reach(tensor, group).clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, dist.get_global_rank(group, 0), group=group)
    return received.to(tensor.device)


def all_to_all(parts: Tensor, group: Group) -> Tensor:
    """Send `parts[s]` to rank s; give [R, *], what each rank sent here."""
    sent = within_reach(parts, group).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.to(parts.device)


def all_reduce(value: Tensor, op: str, group: Group) -> Tensor:
    """Return the "sum" or "max" of `value` over the ranks."""
    reduced = within_reach(value, group).clone()
    dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
    return reduced.to(value.device)


def gather_to_first(shard: Tensor, group: Group) -> list[Tensor] | None:
    """Give the shards of all ranks to the group's first, None to the others."""
    shard = within_reach(shard, group).contiguous()
    first = dist.get_rank(group) == 0
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))] if first else None
    dist.gather(shard, parts, 0 if group is None else dist.get_global_rank(group, 0), group=group)
    return parts


def barrier(group: Group) -> None:
    """Wait for all ranks of the group."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.barrier(group)


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """What each rank of the group holds, on all of them; of the whole world where there is no group."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def broadcast_object(value: Any) -> Any:
    """What the world's first rank holds."""
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
