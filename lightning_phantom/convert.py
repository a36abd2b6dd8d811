"""Dense weights to the factors of a phantom layer and back, tensor by tensor.

With p blocks, `m_in = in/p` and `m_out = out/p`, a dense weight W [out, in] is cut into blocks W_ij [m_out, m_in]. The
factors are L [out, m_in] (block i: L_i = W_ii), C [p*k, m_in] and D [out, (p-1)*k], with W_ij ~ D_ij C_j for i != j.
Every function returns the rows of one group member: blocks `first .. first + q - 1` of q = p/R.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_phantom.comm import Ranks

DEAD = 1e-6  # singular values below this share of a block column's largest carry nothing worth a column of D


class Factors(NamedTuple):
    """The factors of q blocks: weight [q*m_out, m_in], compressor [q*k, m_in], decompressor [q*m_out, (p-1)*k]."""

    weight: Tensor
    compressor: Tensor
    decompressor: Tensor


class Blocks(NamedTuple):
    """The blocks of one layer: its sizes, p, k, and the key (seed, name) of its random numbers."""

    in_features: int
    out_features: int
    num_blocks: int
    phantom_width: int
    seed: int
    name: str

    @property
    def block_in(self) -> int:
        """m_in = in_features / p."""
        return self.in_features // self.num_blocks

    @property
    def block_out(self) -> int:
        """m_out = out_features / p."""
        return self.out_features // self.num_blocks

    def held_by(self, ranks: Ranks) -> range:
        """The indices of the blocks that this rank holds."""
        share = self.num_blocks // ranks.size
        return range(ranks.rank * share, (ranks.rank + 1) * share)

    def generator(self, block: int) -> torch.Generator:
        """The CPU generator of one block; it knows nothing of ranks, so neither does the model."""
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{block}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def from_dense(weight: Tensor, blocks: Blocks, ranks: Ranks) -> Factors:
    """Return the best factors of width k for a dense weight [out, in]: Eckart-Young in each block column.

    For each block column j the stacked off-diagonal blocks A [(p-1)*m_out, m_in] are projected on their k leading
    right singular vectors V, from an eigendecomposition of A^T A in float64: C_j = V^T and D_j = A V, balanced by the
    square roots of the singular values. A component that carries nothing gets a zero column in D and a random
    row in C: with both at zero it would never learn. Each rank decomposes its own columns once and sends the D_ij out.
    """
    p, k, held = blocks.num_blocks, blocks.phantom_width, blocks.held_by(ranks)
    columns = [_decompose(weight, j, blocks) for j in held]
    compressor = torch.cat([c for c, _ in columns])
    # [p, m_out, q*k] by receiving block -> [R, q, m_out, q*k] by receiving rank; back come the same by sending rank.
    sent = torch.cat([d.unflatten(0, (p, blocks.block_out)) for _, d in columns], dim=2)
    received = ranks.all_to_all(sent.unflatten(0, (ranks.size, len(held))))
    everyone = received.permute(1, 2, 0, 3).reshape(len(held), blocks.block_out, p * k)
    decompressor = torch.cat(
        [torch.cat([d[:, : i * k], d[:, (i + 1) * k :]], dim=1) for i, d in zip(held, everyone, strict=True)]
    )
    diagonal = torch.cat([_block(weight, i, i, blocks) for i in held])
    return Factors(*(t.to(weight.dtype) for t in (diagonal, compressor, decompressor)))


def random_factors(blocks: Blocks, ranks: Ranks, dtype: torch.dtype) -> Factors:
    """Return freshly drawn factors whose layer has the output variance of a fresh nn.Linear.

    Uniform with Var L = 1/(3 in), Var C = p/in, Var D = 1/(3 p k); one generator per block. One block is
    drawn at a time, so nothing of the dense layer's size is ever allocated.
    """
    p, k, n_in = blocks.num_blocks, blocks.phantom_width, blocks.in_features
    drawn = []
    for i in blocks.held_by(ranks):
        generator = blocks.generator(i)
        compressor = _random_compressor(blocks, generator)
        local = _uniform((blocks.block_out, blocks.block_in), 1 / (3 * n_in), generator)
        decompressor = _uniform((blocks.block_out, (p - 1) * k), 1 / (3 * p * k), generator)
        drawn.append(Factors(local.to(dtype), compressor.to(dtype), decompressor.to(dtype)))
    return Factors(*map(torch.cat, zip(*drawn, strict=True)))


def block_diagonal(weight: Tensor, blocks: Blocks, ranks: Ranks) -> Factors:
    """Return L_i = sqrt(p) W_ii with random compressors and D = 0: blocks that know nothing of each other yet."""
    p, held = blocks.num_blocks, blocks.held_by(ranks)
    diagonal = torch.cat([_block(weight, i, i, blocks) for i in held]) * math.sqrt(p)
    compressor = torch.cat([_random_compressor(blocks, blocks.generator(i)) for i in held])
    decompressor = weight.new_zeros(len(held) * blocks.block_out, (p - 1) * blocks.phantom_width)
    return Factors(diagonal, compressor.to(weight), decompressor)


def random_bias(blocks: Blocks, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """Return a bias [q*m_out] drawn as nn.Linear draws it, block by block."""
    drawn = []
    for i in blocks.held_by(ranks):
        generator = blocks._replace(name=f"{blocks.name}.bias").generator(i)
        drawn.append(_uniform((blocks.block_out,), 1 / (3 * blocks.in_features), generator))
    return torch.cat(drawn).to(dtype)


def to_dense(factors: Factors, num_blocks: int) -> Tensor:
    """Return the dense weight [out, in] that the factors of all p blocks stand for: W_ii = L_i, W_ij = D_ij C_j."""
    p = num_blocks
    k = factors.compressor.shape[0] // p
    local, decompressor = factors.weight.chunk(p), factors.decompressor.chunk(p)
    compressor = factors.compressor.chunk(p)
    rows = []
    for i in range(p):
        others = iter(decompressor[i].split(k, dim=1))
        rows.append(torch.cat([local[i] if j == i else next(others) @ compressor[j] for j in range(p)], dim=1))
    return torch.cat(rows)


def _decompose(weight: Tensor, j: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Factor block column j: C_j [k, m_in] and, for every row of W, D_j [out, k] with the own block's rows zero."""
    own = slice(j * blocks.block_out, (j + 1) * blocks.block_out)
    column = weight[:, j * blocks.block_in : (j + 1) * blocks.block_in].to(torch.float64, copy=True)
    column[own] = 0
    eigenvalues, eigenvectors = torch.linalg.eigh(column.T @ column)
    k = blocks.phantom_width
    values = eigenvalues[-k:].flip(0).clamp(min=0).sqrt()
    vectors = eigenvectors[:, -k:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    alive = values > DEAD * values[0]
    scale = values.where(alive, torch.ones_like(values)).sqrt()
    random_rows = _random_compressor(blocks, blocks.generator(j)).to(column)
    compressor = torch.where(alive[:, None], scale[:, None] * vectors.T, random_rows)
    decompressor = (column @ vectors) / scale * alive
    return compressor, decompressor


def _block(weight: Tensor, i: int, j: int, blocks: Blocks) -> Tensor:
    return weight[i * blocks.block_out : (i + 1) * blocks.block_out, j * blocks.block_in : (j + 1) * blocks.block_in]


def _random_compressor(blocks: Blocks, generator: torch.Generator) -> Tensor:
    return _uniform((blocks.phantom_width, blocks.block_in), blocks.num_blocks / blocks.in_features, generator)


def _uniform(shape: tuple[int, ...], variance: float, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3 * variance)
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
