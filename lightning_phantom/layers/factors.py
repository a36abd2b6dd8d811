"""Dense weights to the factors of a phantom layer and back, tensor by tensor.

With p blocks, `m_in = in/p` and `m_out = out/p`, a dense weight W [out, in] is cut into blocks W_ij [m_out, m_in]. The
factors are L [out, m_in] (block i: L_i = W_ii), C [p*k, m_in] and D [out, (p-1)*k], with W_ij ~ D_ij C_j for i != j.
Every function returns the rows of one group member: blocks `first .. first + q - 1` of q = p/R.

A dense layer that writes a gate and what it gates, one after the other, is cut so that block i has rows i of both
halves: `by_block` brings its rows into that order, `by_part` back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.layers.seeds import generator_of

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
        return generator_of(self.seed, self.name, block)


def from_dense(weight: Tensor, blocks: Blocks, ranks: Ranks) -> Factors:
    """Return the best factors of width k for a dense weight [out, in]: Eckart-Young in each block column.

    For each block column j the stacked off-diagonal blocks A [(p-1)*m_out, m_in] are projected on their k leading
    right singular vectors V, from an eigendecomposition of A^T A in float64: C_j = V^T and D_j = A V, balanced by the
    square roots of the singular values (`settle`). Each rank decomposes its own columns once and sends the D_ij out.
    """
    p, k, held = blocks.num_blocks, blocks.phantom_width, blocks.held_by(ranks)
    columns = [_decompose(weight, j, blocks) for j in held]
    compressor = torch.cat([c for c, _ in columns])
    # [p, m_out, q*k] by receiving block -> [R, q, m_out, q*k] by receiving rank; back come the same by sending rank.
    sent = torch.cat([d.unflatten(0, (p, blocks.block_out)) for _, d in columns], dim=2)
    received = ranks.all_to_all(sent.unflatten(0, (ranks.size, len(held))))
    everyone = received.permute(1, 2, 0, 3).reshape(len(held), blocks.block_out, p * k)
    decompressor = torch.cat([without(d, i, k) for i, d in zip(held, everyone, strict=True)])
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


def by_block(rows: Tensor, num_blocks: int, parts: int) -> Tensor:
    """Rows [out, *] of `parts` equal parts -> block by block, each with its share of every part."""
    return rows if parts == 1 else rows.unflatten(0, (parts, num_blocks, -1)).transpose(0, 1).flatten(0, 2)


def by_part(rows: Tensor, num_blocks: int, parts: int) -> Tensor:
    """The inverse of `by_block`."""
    return by_block(rows, parts, num_blocks) if parts > 1 else rows


def by_coarse_block(rows: Tensor, num_blocks: int, parts: int, q: int) -> Tensor:
    """Rows as `by_block` gives them for p blocks -> as it gives them for p/q."""
    return by_block(by_part(rows, num_blocks, parts), num_blocks // q, parts)


def merge(factors: Factors, num_blocks: int, q: int) -> Factors:
    """Return the factors of p/q blocks that stand for the same dense weight as those of all p blocks, exactly.

    Within a coarse block W_ij = D_ij C_j becomes a part of its dense L; its compressors are those of its q blocks, one
    above the other, so k becomes q*k. Where that is more than any matrix of the size needs, the width is the largest
    useful one. p/q is at least 2.
    """
    p, k, coarse = num_blocks, factors.compressor.shape[0] // num_blocks, num_blocks // q
    n_in, n_out = factors.weight.shape[1] * p, factors.weight.shape[0]
    useful = resolve_phantom_width(q * k, n_in, n_out, coarse)
    if useful < q * k:
        blocks = Blocks(n_in, n_out, coarse, useful, 0, "")
        return from_dense(to_dense(factors, p), blocks, Ranks(None))
    dense = to_dense(factors, p)
    local = [
        block for i, rows in enumerate(dense.chunk(coarse)) for j, block in enumerate(rows.chunk(coarse, 1)) if i == j
    ]
    compressor = [torch.block_diag(*group.chunk(q)) for group in factors.compressor.chunk(coarse)]
    # Of its own group a row block of D has q - 1 latents: there is none for j = i.
    decompressor = [without(d, i // q * q, k, q - 1) for i, d in enumerate(factors.decompressor.chunk(p))]
    return Factors(torch.cat(local), torch.cat(compressor), torch.cat(decompressor))


def settle(
    compressor: Tensor, decompressor: Tensor, j: int, blocks: Blocks, rounding: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Choose among all C_j [k, m_in] and D_j [out, k] with one product: balanced, signs settled, able to learn.

    Each row of C gets the norm of its column of D, and a positive largest entry. A component that carries nothing gets
    a zero column in D and a random row in C: with both at zero it would never learn. One whose product has at most the
    norm `rounding` carries nothing.
    """
    rows, columns = compressor.norm(dim=1), decompressor.norm(dim=0)
    strength = rows * columns
    alive = strength > (DEAD * strength.max()).clamp(min=rounding)
    ones = torch.ones_like(strength)
    signs = compressor.gather(1, compressor.abs().argmax(1, keepdim=True)).sign().squeeze(1)
    scale = signs * (columns.where(alive, ones) / rows.where(alive, ones)).sqrt()
    random_rows = _random_compressor(blocks, blocks.generator(j)).to(compressor)
    settled = torch.where(alive[:, None], scale[:, None] * compressor, random_rows)
    return settled, decompressor / scale.where(alive, ones) * alive


def leading_vectors(column: Tensor, k: int) -> Tensor:
    """The k leading right singular vectors [m, k] of a matrix [n, m], strongest first; 0 for a singular value of 0."""
    if k <= len(column) < column.shape[1]:  # from the smaller of the two squares
        right = column.T @ leading_vectors(column.T, k)
        return right / right.norm(dim=0).clamp(min=torch.finfo(right.dtype).tiny)
    _, vectors = torch.linalg.eigh(column.T @ column)
    return vectors[:, -k:].flip(1)


def _decompose(weight: Tensor, j: int, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Factor block column j: C_j [k, m_in] and, for every row of W, D_j [out, k] with the own block's rows zero."""
    column = weight[:, j * blocks.block_in : (j + 1) * blocks.block_in].to(torch.float64, copy=True)
    own = slice(j * blocks.block_out, (j + 1) * blocks.block_out)
    vectors = leading_vectors(torch.cat([column[: own.start], column[own.stop :]]), blocks.phantom_width)
    column[own] = 0
    return settle(vectors.T, column @ vectors, j, blocks)


def without(columns: Tensor, i: int, k: int, count: int = 1) -> Tensor:
    """Leave out `count` groups of k columns, from group i on."""
    return torch.cat([columns[:, : i * k], columns[:, (i + count) * k :]], dim=1)


def _block(weight: Tensor, i: int, j: int, blocks: Blocks) -> Tensor:
    return weight[i * blocks.block_out : (i + 1) * blocks.block_out, j * blocks.block_in : (j + 1) * blocks.block_in]


def _random_compressor(blocks: Blocks, generator: torch.Generator) -> Tensor:
    return _uniform((blocks.phantom_width, blocks.block_in), blocks.num_blocks / blocks.in_features, generator)


def _uniform(shape: tuple[int, ...], variance: float, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3 * variance)
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
