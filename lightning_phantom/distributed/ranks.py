"""`Ranks`: the ranks that hold layers between them, and what they exchange.

R ranks. Outside the layers each holds its own tokens with all features, [t, width]; inside, the tokens of all ranks
(T = sum of t) with its own features, [T, width/R]. What each method starts runs while the caller computes; the function
it returns waits for the result. Nothing is started that the ranks have not agreed on (`agreement`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_phantom.distributed import comm
from lightning_phantom.distributed.agreement import Agreement, Rows, agreement_of
from lightning_phantom.errors import PhantomError

Waiting = Callable[[], Tensor]


@dataclass(frozen=True)
class Arriving:
    """Values that a collective under way writes; calling it waits for them.

    Attributes:
        tensor: where they will be.
        wait: returns it when they are there.
    """

    tensor: Tensor
    wait: Waiting

    def __call__(self) -> Tensor:
        """Wait for them."""
        return self.wait()


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

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled: of a group, that there was one."""
        return {**vars(self), "process_group": None}

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            PhantomError: there is none: these ranks have been pickled, or one process is alone.
        """
        if self.process_group is None:
            raise PhantomError(
                f"this copy of what {self.size} ranks hold between them was pickled, and has lost the other ranks. "
                f"Pickle densify(module), or load the copy's state dict into the module that the ranks hold."
            )
        return self.process_group

    @property
    def agreement(self) -> Agreement:
        """What the ranks of the group have agreed on."""
        return agreement_of(self.group)

    def slice_of(self, width: int) -> slice:
        """The consecutive features, out of `width`, that this rank holds."""
        share = width // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    # Between tokens and features; the result is new memory, times `scale`

    def to_features(self, x: Tensor, rows: Rows, what: str, scale: float = 1.0) -> Waiting:
        """Own tokens, all features [t, w] -> the group's tokens, own features [T, w/R]."""
        if rows.shared:
            mine = _copy(x[:, self.slice_of(x.shape[1])], scale)
            return lambda: mine
        t = x.shape[0]
        parts = _copy(x.unflatten(1, (self.size, -1)).transpose(0, 1), scale)
        return self._all_to_all(parts.flatten(0, 1), rows.counts, (t,) * self.size, "all_to_all", what, rows)

    def to_tokens(self, y: Tensor, rows: Rows, what: str, scale: float = 1.0) -> Waiting:
        """The group's tokens, own features [T, w/R] -> own tokens, all features [t, w]."""
        if rows.shared:
            arriving: Waiting = self.all_gather(y, rows, what)
        else:
            n = (rows.counts[self.rank],) * self.size
            flat = self._all_to_all(y.contiguous(), n, rows.counts, "all_to_all", what, rows)
            arriving = lambda: flat().unflatten(0, (self.size, n[0]))  # noqa: E731
        return lambda: _side_by_side(arriving(), scale)

    # Between tokens and the group's tokens, all features in both; likewise

    def gather_tokens(self, x: Tensor, rows: Rows, what: str, scale: float = 1.0) -> Waiting:
        """Own tokens [t, w] -> the group's tokens [T, w]."""
        if rows.shared:
            return lambda: _copy(x, scale)
        most = max(rows.counts)
        padded = torch.cat([x, x.new_zeros(most - x.shape[0], x.shape[1])]) if x.shape[0] < most else x
        arriving: Waiting = self.all_gather(padded if scale == 1 else padded * scale, rows, what)
        if len(set(rows.counts)) == 1:
            return lambda: arriving().flatten(0, 1)
        return lambda: torch.cat([part[:t] for part, t in zip(arriving(), rows.counts, strict=True)])

    def sum_tokens(self, x: Tensor, rows: Rows, what: str, scale: float = 1.0) -> Waiting:
        """The group's tokens [T, w] -> own tokens [t, w] of the sum over the ranks; of shared tokens all."""
        if rows.shared:
            return self.sum(_copy(x, scale), rows, what)
        if len(set(rows.counts)) == 1:
            arriving = self.reduce_scatter(x.unflatten(0, (self.size, rows.counts[0])), rows, what)
        else:
            n = (rows.counts[self.rank],) * self.size
            flat = self._all_to_all(x.contiguous(), n, rows.counts, "reduce_scatter", what, rows)
            arriving = lambda: flat().unflatten(0, (self.size, n[0])).sum(0)  # noqa: E731
        return arriving if scale == 1 else lambda: arriving() * scale

    # Within the group's tokens

    def all_gather(self, shard: Tensor, rows: Rows | None, what: str) -> Arriving:
        """[*, w] of each rank -> [R, *, w], by rank."""
        if self.size == 1:
            return _here(shard.unsqueeze(0))
        what = self._agree(what, shard, rows)
        shard = shard.contiguous()
        gathered = shard.new_empty((self.size, *shard.shape))
        work = comm.start_all_gather(gathered.flatten(0, 1), shard, self.process_group)
        return Arriving(gathered, self._waiting(work, what, lambda: gathered))

    def transpose(self, parts: Tensor, rows: Rows | None, what: str) -> Arriving:
        """Parts [R, T, w], one for each rank -> [R, T, w], one from each."""
        if self.size == 1:
            return _here(parts)
        n = (parts.shape[1],) * self.size
        arriving = self._all_to_all(parts.flatten(0, 1), n, n, "all_to_all", what, rows)
        return Arriving(arriving.tensor.view_as(parts), lambda: arriving().view_as(parts))

    def reduce_scatter(self, parts: Tensor, rows: Rows | None, what: str) -> Waiting:
        """Parts [R, *, w] -> this rank's [*, w] of their sum over the ranks."""
        if self.size == 1:
            return lambda: parts[0]
        parts = parts.contiguous()
        if self._on_gloo:
            # gloo's reduce-scatter costs as much as its all-reduce; an exchange and a local sum do not.
            n = (parts.shape[1],) * self.size
            arriving = self._all_to_all(parts.flatten(0, 1), n, n, "reduce_scatter", what, rows)
            return lambda: arriving().view_as(parts).sum(0)
        what = self._agree(what, parts, rows)
        reduced = torch.empty_like(parts[0])
        work = comm.start_reduce_scatter(reduced, parts.flatten(0, 1), self.process_group)
        return self._waiting(work, what, lambda: reduced)

    def sum(self, x: Tensor, rows: Rows | None, what: str) -> Waiting:
        """[*] of each rank -> their sum, on every rank, in the memory of `x`."""
        if self.size == 1:
            return lambda: x
        what = self._agree(what, x, rows)
        # gloo's own is as fast as an exchange, a local sum and a gather, or faster; and it runs by itself to the end.
        return self._waiting(comm.start_all_reduce(x, self.process_group), what, lambda: x)

    def _all_to_all(
        self, sent: Tensor, rows_in: tuple[int, ...], rows_out: tuple[int, ...], kind: str, what: str, rows: Rows | None
    ) -> Arriving:
        what = self._agree(what, sent, rows)
        received = sent.new_empty((sum(rows_in), *sent.shape[1:]))
        work = comm.start_all_to_all(received, sent, self.process_group, rows_in, rows_out, kind)
        return Arriving(received, self._waiting(work, what, lambda: received))

    @property
    def _on_gloo(self) -> bool:
        return dist.get_backend(self.process_group) == "gloo"

    def _agree(self, what: str, sent: Tensor, rows: Rows | None) -> str:
        what = f"{what} {sent.shape[-1]} {sent.dtype}"
        self.agreement.step(what, rows)
        return what

    def _waiting(self, work: dist.Work, what: str, result: Waiting) -> Waiting:
        def wait() -> Tensor:
            start = time.perf_counter()
            self.agreement.wait(work, what)
            comm.count_wait(time.perf_counter() - start)
            return result()

        return wait

    # Weights and statistics

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Send `parts[s]` to rank s; give [R, *], what each rank sent here."""
        return parts if self.size == 1 else comm.all_to_all(parts, self.process_group)

    def all_reduce(self, value: Tensor, op: str) -> Tensor:
        """Return the "sum" or "max" of `value` over the ranks."""
        return value if self.size == 1 else comm.all_reduce(value, op, self.process_group)

    def gather_shards(self, shard: Tensor) -> Tensor:
        """[n, *] of each rank -> [R, n, *] on all of them, wherever the backend can read it."""
        if self.size == 1:
            return shard.unsqueeze(0)
        shard = comm.within_reach(shard, self.process_group).contiguous()
        gathered = shard.new_empty((self.size, *shard.shape))
        comm.start_all_gather(gathered.flatten(0, 1), shard, self.process_group, counted=False).wait()
        return gathered

    def gather_to_first(self, shard: Tensor) -> list[Tensor] | None:
        """Give the shards of all ranks to the group's first, None to the others."""
        return [shard] if self.size == 1 else comm.gather_to_first(shard, self.process_group)


def _here(values: Tensor) -> Arriving:
    return Arriving(values, lambda: values)


def _side_by_side(parts: Tensor, scale: float) -> Tensor:
    """[R, t, w/R] -> [t, w], times `scale`; no view, so that autograd lets it be written to."""
    joined = parts.new_empty(parts.shape[1], parts.shape[0] * parts.shape[2])
    places = joined.unflatten(1, (parts.shape[0], -1)).transpose(0, 1)
    places.copy_(parts) if scale == 1 else torch.mul(parts, scale, out=places)
    return joined


def _copy(x: Tensor, scale: float) -> Tensor:
    """A contiguous copy of x, times `scale`, in one pass."""
    copy = x.new_empty(x.shape)
    return copy.copy_(x) if scale == 1 else torch.mul(x, scale, out=copy)
