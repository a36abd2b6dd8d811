"""How a tensor of all ranks lies in parts on each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_phantom.distributed.ranks import Ranks


class Split(NamedTuple):
    """How a tensor of all ranks is split: between `ranks`, in equal parts along `dim`."""

    ranks: Ranks
    dim: int

    def whole_shape(self, shard: Tensor) -> list[int]:
        """The shape of the tensor of which `shard` is one rank's part."""
        return [size * self.ranks.size if d == self.dim else size for d, size in enumerate(shard.shape)]

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a view."""
        part = self.ranks.slice_of(whole.shape[self.dim])
        return whole.narrow(self.dim, part.start, part.stop - part.start)

    def gather(self, shard: Tensor) -> Tensor:
        """The whole tensor, on every rank; collective."""
        return torch.cat(tuple(self.ranks.gather_shards(shard)), self.dim).to(shard.device)

    def gather_to_first(self, shard: Tensor) -> Tensor | None:
        """The whole tensor in host memory on the first rank, None on the others; collective."""
        if self.ranks.size == 1:
            return shard.cpu()
        parts = self.ranks.gather_to_first(shard)
        return None if parts is None else torch.cat([part.cpu() for part in parts], self.dim)
