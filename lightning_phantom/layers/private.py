"""Private mixing: a block makes k latents for each of the others, which nobody else reads.

    g_ij = C_ij x_j,  z_i += sum over j != i of D_ij g_ij        C_ij [k, m_in], D_ij [m_out, k]

A block's compressors lie one above the other, for i = 0..p-1 without i = j: C_j [(p-1)*k, m_in]. One all-to-all of
(R-1)*q*q*k features of each of the T tokens per rank, and one of the same back: giving to i what j made for it is its
own adjoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import transpose_latents
from lightning_phantom.distributed.ranks import Arriving, Ranks, Waiting
from lightning_phantom.layers.cut import Cut


class Private:
    """See the module's docstring, and `cut.Mixing`."""

    exchange = staticmethod(transpose_latents)

    def compressor_rows(self, num_blocks: int, k: int) -> int:
        """Each block makes k latents for each of the others."""
        return (num_blocks - 1) * k

    def sent(self, g: Tensor, cut: Cut) -> Tensor:
        """[T, q*(p-1)*k] -> [R, T, q*q*k]."""
        return self.to_others(cut.features(g), cut)

    def own(self, arrived: Tensor, cut: Cut) -> Tensor:
        """[R, T, q*q*k] -> [T, q*(p-1)*k]."""
        return self.of_others(arrived, cut).transpose(0, 1).flatten(1)

    def of_others(self, arrived: Tensor, cut: Cut) -> Tensor:
        """Put in order, for each held block, what the others' blocks have for it: [R, T, q*q*k] -> [q, T, (p-1)*k]."""
        of_all = arrived.unflatten(2, (cut.q, cut.q, -1)).permute(2, 1, 0, 3, 4).flatten(2)  # [q, T, p*k]
        k = of_all.shape[2] // cut.num_blocks
        pairs = zip(cut.held, of_all, strict=True)
        return torch.stack([torch.cat([g[:, : i * k], g[:, (i + 1) * k :]], dim=1) for i, g in pairs])

    def to_others(self, h: Tensor, cut: Cut) -> Tensor:
        """Put in order what each held block has for the others, by rank: [q, T, (p-1)*k] -> [R, T, q*q*k]."""
        k = h.shape[2] // (cut.num_blocks - 1)
        nothing = h.new_zeros(h.shape[1], k)  # for itself
        pairs = zip(cut.held, h, strict=True)
        to_all = torch.stack([torch.cat([g[:, : i * k], nothing, g[:, i * k :]], dim=1) for i, g in pairs])
        return to_all.unflatten(2, (cut.ranks.size, cut.q, k)).permute(2, 1, 3, 0, 4).flatten(2)

    def start(self, ranks: Ranks, sent: Tensor, rows: Rows | None, what: str) -> Arriving:
        """[R, T, w], for each rank -> [R, T, w], from each."""
        return ranks.transpose(sent, rows, what)

    def start_back(self, ranks: Ranks, sent: Tensor, rows: Rows | None, what: str) -> Waiting:
        """The same."""
        return self.start(ranks, sent, rows, what)
