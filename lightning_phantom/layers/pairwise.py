"""Pairwise mixing: a block makes k latents, and every other block reads them all.

    g_j = C_j x_j,  z_i += sum over j != i of D_ij g_j        C_j [k, m_in], D_ij [m_out, k]

One all-gather of q*k features of each of the T tokens per rank, and one reduce-scatter of the same back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import gather_latents
from lightning_phantom.distributed.ranks import Arriving, Ranks, Waiting
from lightning_phantom.layers.cut import Cut


class Pairwise:
    """See the module's docstring, and `cut.Mixing`."""

    exchange = staticmethod(gather_latents)

    def compressor_rows(self, num_blocks: int, k: int) -> int:
        """Each block makes k latents."""
        return k

    def sent(self, g: Tensor, cut: Cut) -> Tensor:
        """[T, q*k], as it is."""
        return g

    def own(self, arrived: Tensor, cut: Cut) -> Tensor:
        """[T, q*k], as it is."""
        return arrived

    def of_others(self, arrived: Tensor, cut: Cut) -> Tensor:
        """Give each held block the latents of all blocks but its own: [R, T, q*k] -> [q, T, (p-1)*k]."""
        g = arrived.transpose(0, 1).flatten(1)  # [T, p*k]
        k = g.shape[1] // cut.num_blocks
        return torch.stack([torch.cat([g[:, : i * k], g[:, (i + 1) * k :]], dim=1) for i in cut.held])

    def to_others(self, h: Tensor, cut: Cut) -> Tensor:
        """Sum what the held blocks have for each of the others: [q, T, (p-1)*k] -> [R, T, q*k]."""
        k = h.shape[2] // (cut.num_blocks - 1)
        total = h.new_zeros(h.shape[1], cut.num_blocks * k)
        for i, h_i in zip(cut.held, h, strict=True):
            total[:, : i * k] += h_i[:, : i * k]
            total[:, (i + 1) * k :] += h_i[:, i * k :]
        return total.unflatten(1, (cut.ranks.size, -1)).transpose(0, 1)

    def start(self, ranks: Ranks, sent: Tensor, rows: Rows | None, what: str) -> Arriving:
        """[T, w] of each rank -> [R, T, w]."""
        return ranks.all_gather(sent, rows, what)

    def start_back(self, ranks: Ranks, sent: Tensor, rows: Rows | None, what: str) -> Waiting:
        """[R, T, w] -> [T, w] of their sum."""
        return ranks.reduce_scatter(sent, rows, what)
