"""What the ranks of a group agree on before they exchange anything: what comes next, and how many rows each one holds.

A collective that not every rank of a group has entered, or that ranks have entered with other sizes, hangs, aborts the
process or mixes up numbers. So none is started that was not agreed on:

- At an entry, where activations go from tokens to features, the ranks always ask each other: which layer it is, and how
  many rows each has (one tiny all-to-all).
- What followed an entry is remembered, step by step. Where it was only ever followed by one thing, every rank may do
  that unasked: no other step can meet it. Where it is new, or was followed by this and by that, the ranks ask again.
- A rank that departs from what the others do unasked waits in its question while they wait in their exchange. Whoever
  waits for more than a few seconds tells the others what for, and when all wait, and not for the same, all raise.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from datetime import timedelta
from functools import cache
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lightning_phantom.distributed.comm import gather_objects, start_telling
from lightning_phantom.errors import LayoutError

PATIENCE_S = 3  # of one wait, before the others are told what it is for
_CURE = (
    "Every rank of a group must call the same layers equally often and in the same order, however many rows it holds: "
    "let no branch around them depend on the rank or on its data."
)


class Rows(NamedTuple):
    """The tokens of a group's ranks: what one entry has agreed on.

    Attributes:
        counts: how many tokens each rank holds.
        shared: whether all ranks hold the same tokens, as in prediction, rather than each its own.
        entry: the number of the entry.
    """

    counts: tuple[int, ...]
    shared: bool
    entry: int

    @property
    def total(self) -> int:
        """T, the tokens of the group."""
        return self.counts[0] if self.shared else sum(self.counts)


class _Step:
    """A step that the ranks have taken together, and the steps that have followed it."""

    __slots__ = ("next",)

    def __init__(self) -> None:
        self.next: dict[int, _Step] = {}


class Agreement:
    """One per process group and process; see the module's docstring.

    Args:
        group: the ranks.

    Attributes:
        shared_batches: whether the ranks of the group read the same batches, rather than each its own.
        last: room for what was computed last, see `layers.split`.
        timeout: how long a question waits for a rank; None: as long as gloo does.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.shared_batches = False
        self.last: Any = None
        self.timeout: timedelta | None = None
        self._held = ref(group)  # it is the key that this is found by, and goes when it goes
        self._size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._first = _Step()
        self._here = self._first
        self._entries = 0
        self._noted = 0
        self._waits = 0
        self._own_talk: dist.ProcessGroup | None = None

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._held()
        assert group is not None
        return group

    @property
    def _talk(self) -> dist.ProcessGroup:
        """Where to ask: a group of the same ranks on gloo, in which a question meets no exchange, and no device."""
        if self._own_talk is None:
            ranks = dist.get_process_group_ranks(self._group)
            self._own_talk = dist.new_group(ranks, self.timeout, backend="gloo", use_local_synchronization=True)
        return self._own_talk

    def enter(self, layer: str, rows: int, sort: str) -> Rows:
        """Agree on the next entry.

        Args:
            layer: name of the layer whose input is to be exchanged.
            rows: the tokens that this rank brings.
            sort: what else the ranks must bring alike: width and type.

        Raises:
            LayoutError: on every rank, naming what each of them does.
        """
        what = f"entry of {layer!r} {sort}"
        counts = self._ask(what, rows, self.shared_batches)
        if self.shared_batches and len(set(counts)) > 1:
            raise LayoutError(
                f"the ranks of a group read one batch for all here, but bring {list(counts)} rows to {layer!r}."
            )
        self._here = self._first.next.setdefault(_code(what), _Step())
        self._entries += 1
        return Rows(counts, self.shared_batches, self._entries)

    def begin(self) -> None:
        """Start over, unasked: what comes next is compared with what has come first."""
        self._here = self._first

    def step(self, what: str, rows: Rows | None = None) -> None:
        """Agree on the next collective, unasked where nothing else was ever next.

        Raises:
            LayoutError: on every rank, naming what each of them does.
        """
        if rows is not None:
            what = f"{what} ({self._entries - rows.entry})"  # of which entry: its rows give the sizes
        code = _code(what)
        known = self._here.next
        if len(known) != 1 or code not in known:
            self._ask(what)
        self._here = known.setdefault(code, _Step())

    def note(self, *numbers: float) -> None:
        """Remember numbers that the ranks must share; the next question compares them."""
        self._noted = hash((self._noted, *numbers))

    def wait(self, work: dist.Work, what: str) -> None:
        """Wait for a collective of this group to end.

        Raises:
            LayoutError: the ranks wait for different things, so none of them would end.
        """
        if work.is_completed() or dist.get_backend(self._group) != "gloo":
            work.wait()  # on a device this only orders its streams
            return
        self._waits += 1
        self._watch(work, what)

    def _watch(self, work: dist.Work, what: str) -> None:
        board, seen, mine = None, None, f"{self._waits} {what}"
        try:
            while True:
                try:
                    work.wait(timedelta(seconds=1 if board else PATIENCE_S))
                    break
                except RuntimeError as error:
                    gone = work.is_completed()  # for good: a rank has gone, or the group's own timeout is over
                    board = board or _Board(_store(self._group), self._rank, self._size)
                    waiting = board.write(mine)
                    if waiting == seen or gone:
                        self._raise_if_parted(waiting)
                    if gone:
                        raise RuntimeError(f"while waiting for the other ranks, in the {what}: {error}") from error
                    seen = waiting
            if board:
                board.write(None)
        finally:
            if board:
                board.leave()

    def _raise_if_parted(self, waiting: list[str | None]) -> None:
        """Raise where the ranks wait for different things, of whom one may have seen it first, raised and gone."""
        if None not in waiting and len(set(waiting)) > 1:
            each = "; ".join(f"rank {r} in the {str(w).partition(' ')[2]}" for r, w in enumerate(waiting))
            raise LayoutError(f"the ranks wait for each other in different places: {each}. {_CURE}")

    def _ask(self, what: str, rows: int = 0, shared: bool = False) -> tuple[int, ...]:
        """Compare `what` over the ranks, and return the rows of each."""
        mine = torch.tensor([_code(what), self._noted, shared, rows])
        everyone = torch.empty(self._size, 4, dtype=torch.int64)
        talk = self._talk
        self._waits += 1
        self._watch(start_telling(everyone, mine, talk), f"question before the {what}")
        said = everyone.tolist()
        if any(other[:3] != said[0][:3] for other in said):
            self._disagree(what, said, talk)
        return tuple(other[3] for other in said)

    def _disagree(self, what: str, said: list[list[int]], talk: dist.ProcessGroup) -> None:
        everyone = gather_objects(what, talk)
        if len(set(everyone)) > 1:
            each = "; ".join(f"rank {r}: {w}" for r, w in enumerate(everyone))
            raise LayoutError(f"the ranks have come to different places: {each}. {_CURE}")
        if len({other[2] for other in said}) > 1:
            raise LayoutError(f"at the {what} some ranks read one batch for all and others their own.")
        raise LayoutError(
            f"before the {what} the ranks have computed with different numbers: a factor or a probability between two "
            f"layers depends on the rank or on its data. Make it a tensor of the activation's shape, or skip a layer "
            f"beside it in the plan."
        )


class _Board:
    """Where each rank of a group writes what it waits for: the store through which they have found each other.

    One of the ranks is its host, and while that one is frozen the store gives no answer, whatever its timeout: so it is
    asked from a thread of its own.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._asked: SimpleQueue[tuple[str | None, Future[list[str | None]]] | None] = SimpleQueue()
        self._thread = Thread(target=self._ask, name="phantom-board", daemon=True)
        self._thread.start()

    def write(self, what: str | None) -> list[str | None]:
        """Write what this rank waits for; give what each rank does, None where that is nothing or unknown."""
        answer: Future[list[str | None]] = Future()
        self._asked.put((what, answer))
        try:
            return answer.result(1)
        except (NoAnswer, RuntimeError):  # the host is frozen, or has gone
            return [None]

    def leave(self) -> None:
        """Write no more. A thread that came back from the store while the interpreter ends would abort the process."""
        self._asked.put(None)
        self._thread.join(1)

    def _ask(self) -> None:
        keys = [f"phantom_waits/{r}" for r in range(self._size)]
        while (asked := self._asked.get()) is not None:
            what, answer = asked
            try:
                self._store.set(keys[self._rank], json.dumps(what))
                waiting = [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]
                answer.set_result(waiting)
            except Exception as error:  # the host has gone
                answer.set_exception(error)


_agreements: WeakKeyDictionary[Any, Agreement] = WeakKeyDictionary()


def agreement_of(group: dist.ProcessGroup) -> Agreement:
    """The agreement of a group: one for all layers that it holds."""
    if group not in _agreements:
        _agreements[group] = Agreement(group)
    return _agreements[group]


@cache
def _code(what: str) -> int:
    """A number that is the same in every process, as `hash` is not."""
    data = what.encode()
    return zlib.crc32(data) << 31 ^ zlib.adler32(data)


def _store(group: dist.ProcessGroup) -> Any:
    return distributed_c10d._world.pg_map[group][1]
