"""How blocks let each other know: the protocol of the mixings, and how blocks lie on ranks.

A block makes latents of its own features, and reads those of the other blocks. Which latents it makes, and how they get
to who reads them, is a mixing: `pairwise`, `private`. The operator (`operator`) knows no more of one than this:

    g [T, q*r]                 this rank's blocks' latents, r of each
    sent [*, w]                what the ranks exchange
    arrived [R, T, w]          what they get: one collective, `start`
    of_others [q, T, (p-1)*k]  of that, what each of this rank's blocks reads: k latents of every other block, in order

and the adjoints of these steps, in which gradients go back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_phantom.config import is_int
from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.ranks import Arriving, Ranks, Waiting
from lightning_phantom.errors import PhantomError


class Cut(NamedTuple):
    """p blocks, of which each of the ranks holds q consecutive ones.

    Attributes:
        num_blocks: p.
        ranks: R of them.
    """

    num_blocks: int
    ranks: Ranks

    @property
    def q(self) -> int:
        """The blocks of a rank, p/R."""
        return self.num_blocks // self.ranks.size

    @property
    def held(self) -> range:
        """The indices of the blocks of this rank."""
        return range(self.num_blocks)[self.ranks.slice_of(self.num_blocks)]

    def features(self, x: Tensor) -> Tensor:
        """View [T, q*w] as [q, T, w]."""
        return x.unflatten(1, (self.q, -1)).transpose(0, 1)

    def rows(self, factor: Tensor) -> Tensor:
        """View [q*rows, w] as [q, rows, w]."""
        return factor.unflatten(0, (self.q, -1))


def check_cut(in_features: int, out_features: int, num_blocks: int, num_ranks: int) -> None:
    """Raise PhantomError where a layer does not divide into blocks, or those into ranks."""
    if not is_int(num_blocks) or num_blocks < 2:
        raise PhantomError(f"num_blocks={num_blocks!r}: needs an int of at least 2.")
    if num_blocks % num_ranks:
        raise PhantomError(
            f"num_blocks={num_blocks} on {num_ranks} ranks: the number of ranks must divide the number of blocks."
        )
    if in_features % num_blocks or out_features % num_blocks:
        raise PhantomError(
            f"a layer of {in_features} -> {out_features} features does not divide into num_blocks={num_blocks} blocks."
        )


class Mixing(Protocol):
    """Which latents a block makes, and how they get to the others; see the module's docstring."""

    def compressor_rows(self, num_blocks: int, k: int) -> int:
        """The latents r that a block makes, which is how many rows its compressors have."""

    def sent(self, g: Tensor, cut: Cut) -> Tensor:
        """[T, q*r] -> what is exchanged."""

    def own(self, arrived: Tensor, cut: Cut) -> Tensor:
        """The adjoint of `sent`: what has come back -> [T, q*r]."""

    def of_others(self, arrived: Tensor, cut: Cut) -> Tensor:
        """[R, T, w] -> what each block of this rank reads, [q, T, (p-1)*k]."""

    def to_others(self, h: Tensor, cut: Cut) -> Tensor:
        """The adjoint of `of_others`: [q, T, (p-1)*k] -> [R, T, w]."""

    def start(self, ranks: Ranks, sent: Tensor, rows: Rows | None, what: str) -> Arriving:
        """Start the exchange: what is sent -> [R, T, w]."""

    def start_back(self, ranks: Ranks, sent: Tensor, rows: Rows | None, what: str) -> Waiting:
        """Start its adjoint: [R, T, w] -> what comes back."""

    @property
    def exchange(self) -> Callable[[Tensor, Ranks, Rows | None, str], Tensor]:
        """The exchange as an operation that has gradients."""
