"""Dense weights to the factors of a phantom layer and back, tensor by tensor.

With p blocks, `m_in = in/p` and `m_out = out/p`, a dense weight W [out, in] is cut into blocks W_ij [m_out, m_in]. The
factors are L [out, m_in] (block i: L_i = W_ii), C [p*k, m_in] and D [out, (p-1)*k], with W_ij ~ D_ij C_j for i != j.
In private mixing C is [p*(p-1)*k, m_in], with W_ij ~ D_ij C_ij: of each block j, C_ij for i != j one above the other.
Every function returns the rows of one group member: blocks `first .. first + q - 1` of q = p/R.

A dense layer that writes a gate and what it gates, one after the other, is cut so that block i has rows i of both
halves: `by_block` brings its rows into that order, `by_part` back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.layers.mixing import MIXINGS
from lightning_phantom.layers.seeds import generator_of

DEAD = 1e-6  # singular values below this share of a block column's largest carry nothing worth a column of D


class Factors(NamedTuple):
    """The factors of q blocks.

    Attributes:
        weight: L [q*m_out, m_in].
        compressor: C [q*r, m_in], with r = k rows of a block, or (p-1)*k in private mixing.
        decompressor: D [q*m_out, (p-1)*k].
        decompressor_before: of what is read of the layer before, [q*m_out, (p-1)*k]; None: nothing is.
    """

    weight: Tensor
    compressor: Tensor
    decompressor: Tensor
    decompressor_before: Tensor | None = None


class Blocks(NamedTuple):
    """The blocks of one layer: its sizes, p, k, the key (seed, name) of its random numbers, and how they mix.

    Attributes:
        in_before: width of the input of the layer before, if its latents are made of that; else 0.
        width_before: k of the layer before, if it reads that one's latents beside its own; else 0.
    """

    in_features: int
    out_features: int
    num_blocks: int
    phantom_width: int
    seed: int
    name: str
    mixing: str = "pairwise"
    in_before: int = 0
    width_before: int = 0

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

    @property
    def compressor_shape(self) -> tuple[int, int]:
        """The shape of one block's compressors."""
        rows = MIXINGS[self.mixing].compressor_rows(self.num_blocks, self.phantom_width)
        return rows, (self.in_before or self.in_features) // self.num_blocks

    def generator(self, *block: int) -> torch.Generator:
        """The CPU generator of one block, or of a pair; it knows nothing of ranks, so neither does the model."""
        return generator_of(self.seed, self.name, *block)


def from_dense(weight: Tensor, blocks: Blocks, ranks: Ranks) -> Factors:
    """Return the best factors of width k for a dense weight [out, in]: Eckart-Young in each block column.

    For each block column j the stacked off-diagonal blocks A [(p-1)*m_out, m_in] are projected on their k leading
    right singular vectors V, from an eigendecomposition of A^T A in float64: C_j = V^T and D_j = A V, balanced by the
    square roots of the singular values (`settle`). In private mixing the same is done to each block. Each rank
    decomposes its own columns once and sends the D_ij out.

    Of the latents of the layer before nothing is read yet (zero): a dense weight does not say what to make of them.
    Where there are no others, L is that of `block_diagonal`.
    """
    if blocks.in_before:
        return block_diagonal(weight, blocks, ranks)
    p, k, held = blocks.num_blocks, blocks.phantom_width, blocks.held_by(ranks)
    columns = [_decompose(weight, j, blocks) for j in held]
    compressor = torch.cat([c for c, _ in columns])
    # [p, m_out, q*k] by receiving block -> [R, q, m_out, q*k] by receiving rank; back come the same by sending rank.
    sent = torch.cat([d.unflatten(0, (p, blocks.block_out)) for _, d in columns], dim=2)
    received = ranks.all_to_all(sent.unflatten(0, (ranks.size, len(held))))
    everyone = received.permute(1, 2, 0, 3).reshape(len(held), blocks.block_out, p * k)
    decompressor = torch.cat([without(d, i, k) for i, d in zip(held, everyone, strict=True)])
    diagonal = torch.cat([_block(weight, i, i, blocks) for i in held])
    diagonal, compressor, decompressor = (t.to(weight.dtype) for t in (diagonal, compressor, decompressor))
    return Factors(diagonal, compressor, decompressor, _nothing_before(weight, blocks, ranks))


def random_factors(blocks: Blocks, ranks: Ranks, dtype: torch.dtype) -> Factors:
    """Return freshly drawn factors whose layer has the output variance of a fresh nn.Linear.

    Uniform with Var L = 1/(3 in), Var C = p/(width of what it reads), Var D = 1/(3 p k), halved where there are two of
    D; one generator per block. One block is drawn at a time, so nothing of the dense layer's size is ever allocated.
    """
    p, n_in = blocks.num_blocks, blocks.in_features
    widths = [k for k in (blocks.phantom_width, blocks.width_before) if k]
    drawn = []
    for i in blocks.held_by(ranks):
        generator = blocks.generator(i)
        compressor = _random_compressor(blocks, blocks.compressor_shape[0], generator)
        local = _uniform((blocks.block_out, blocks.block_in), 1 / (3 * n_in), generator)
        decompressors = [
            _uniform((blocks.block_out, (p - 1) * k), 1 / (3 * len(widths) * p * k), generator) for k in widths
        ]
        drawn.append([t.to(dtype) for t in (local, compressor, *decompressors)])
    return Factors(*map(torch.cat, zip(*drawn, strict=True)))


def block_diagonal(weight: Tensor, blocks: Blocks, ranks: Ranks) -> Factors:
    """Return L_i = sqrt(p) W_ii with random compressors and D = 0: blocks that know nothing of each other yet."""
    p, held = blocks.num_blocks, blocks.held_by(ranks)
    diagonal = torch.cat([_block(weight, i, i, blocks) for i in held]) * math.sqrt(p)
    rows = blocks.compressor_shape[0]
    compressor = torch.cat([_random_compressor(blocks, rows, blocks.generator(i)) for i in held])
    decompressor = weight.new_zeros(len(held) * blocks.block_out, (p - 1) * blocks.phantom_width)
    return Factors(diagonal, compressor.to(weight), decompressor, _nothing_before(weight, blocks, ranks))


def _nothing_before(weight: Tensor, blocks: Blocks, ranks: Ranks) -> Tensor | None:
    """A decompressor of the layer before that reads nothing yet; None where there is none."""
    if not blocks.width_before:
        return None
    rows = len(blocks.held_by(ranks)) * blocks.block_out
    return weight.new_zeros(rows, (blocks.num_blocks - 1) * blocks.width_before)


def random_bias(blocks: Blocks, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """Return a bias [q*m_out] drawn as nn.Linear draws it, block by block."""
    drawn = []
    for i in blocks.held_by(ranks):
        generator = blocks._replace(name=f"{blocks.name}.bias").generator(i)
        drawn.append(_uniform((blocks.block_out,), 1 / (3 * blocks.in_features), generator))
    return torch.cat(drawn).to(dtype)


def to_dense(factors: Factors, num_blocks: int, mixing: str = "pairwise") -> Tensor:
    """Return the dense weight [out, in] that the factors of all p blocks stand for: W_ii = L_i, W_ij = D_ij C_j."""
    p, k = num_blocks, width_of(factors, num_blocks)
    local, decompressor = factors.weight.chunk(p), factors.decompressor.chunk(p)
    compressor = [c.split(k) for c in factors.compressor.chunk(p)]

    def block(i: int, j: int) -> Tensor:
        if i == j:
            return local[i]
        # There is nothing for itself among what i reads, nor among what j makes.
        made = compressor[j][i - (i > j) if mixing == "private" else 0]
        return decompressor[i].split(k, dim=1)[j - (j > i)] @ made

    return torch.cat([torch.cat([block(i, j) for j in range(p)], dim=1) for i in range(p)])


def by_block(rows: Tensor, num_blocks: int, parts: int) -> Tensor:
    """Rows [out, *] of `parts` equal parts -> block by block, each with its share of every part."""
    return rows if parts == 1 else rows.unflatten(0, (parts, num_blocks, -1)).transpose(0, 1).flatten(0, 2)


def by_part(rows: Tensor, num_blocks: int, parts: int) -> Tensor:
    """The inverse of `by_block`."""
    return by_block(rows, parts, num_blocks) if parts > 1 else rows


def by_coarse_block(rows: Tensor, num_blocks: int, parts: int, q: int) -> Tensor:
    """Rows as `by_block` gives them for p blocks -> as it gives them for p/q."""
    return by_block(by_part(rows, num_blocks, parts), num_blocks // q, parts)


def width_of(factors: Factors, num_blocks: int) -> int:
    """The phantom width k of factors."""
    return factors.decompressor.shape[1] // (num_blocks - 1)


def merge(factors: Factors, num_blocks: int, q: int, mixing: str = "pairwise") -> Factors:
    """Return the factors of p/q blocks that stand for the same dense weight as those of all p blocks, exactly.

    Within a coarse block W_ij = D_ij C_j becomes a part of its dense L; its compressors are those of its q blocks, one
    above the other, so k becomes q*k. (In private mixing a coarse block W_ij holds q*q products, so it becomes q*q*k.)
    Where that is more than any matrix of the size needs, the width is the largest useful one. p/q is at least 2.
    """
    p, k, coarse = num_blocks, width_of(factors, num_blocks), num_blocks // q
    n_in, n_out = factors.weight.shape[1] * p, factors.weight.shape[0]
    needed = q * q * k if mixing == "private" else q * k
    useful = resolve_phantom_width(needed, n_in, n_out, coarse, mixing)
    dense = to_dense(factors, p, mixing)
    if useful < needed or mixing == "private":
        blocks = Blocks(n_in, n_out, coarse, useful, 0, "", mixing)
        return from_dense(dense, blocks, Ranks(None))
    local = [
        block for i, rows in enumerate(dense.chunk(coarse)) for j, block in enumerate(rows.chunk(coarse, 1)) if i == j
    ]
    compressor = [torch.block_diag(*group.chunk(q)) for group in factors.compressor.chunk(coarse)]
    # Of its own group a row block of D has q - 1 latents: there is none for j = i.
    decompressor = [without(d, i // q * q, k, q - 1) for i, d in enumerate(factors.decompressor.chunk(p))]
    return Factors(torch.cat(local), torch.cat(compressor), torch.cat(decompressor))


def settle(
    compressor: Tensor, decompressor: Tensor, generator: torch.Generator, blocks: Blocks, rounding: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Choose among all C_j [k, m_in] and D_j [rows, k] with one product: balanced, signs settled, able to learn.

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
    random_rows = _random_compressor(blocks, len(compressor), generator).to(compressor)
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
    """Factor block column j: C_j [r, m_in] and, for every row of W, D_j [out, k] with the own block's rows zero."""
    column = weight[:, j * blocks.block_in : (j + 1) * blocks.block_in].to(torch.float64)

    def best(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        vectors = leading_vectors(rows, blocks.phantom_width)
        return settle(vectors.T, rows @ vectors, generator, blocks)

    return by_compressor(best, column, j, blocks)


def by_compressor(
    factor: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]], column: Tensor, j: int, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Factor what each set of compressors of block j serves: all other blocks, or each of them in private mixing.

    `factor(rows, generator)` gives C [k, m_in] and D for so many rows of `column` [out, m_in]; the generator is that
    set's own. Together they are C_j [r, m_in], and D_j [out, k] with the own block's rows zero.
    """
    others = [i for i in range(blocks.num_blocks) if i != j]
    rows = column.split(blocks.block_out)
    decompressors = [column.new_zeros(blocks.block_out, blocks.phantom_width) for _ in rows]
    compressors = []
    for served in [[i] for i in others] if blocks.mixing == "private" else [others]:
        generator = blocks.generator(*served, j) if blocks.mixing == "private" else blocks.generator(j)
        compressor, decompressor = factor(torch.cat([rows[i] for i in served]), generator)
        compressors.append(compressor)
        for i, part in zip(served, decompressor.split(blocks.block_out), strict=True):
            decompressors[i] = part
    return torch.cat(compressors), torch.cat(decompressors)


def column_of(compressor: Tensor, decompressor: Tensor, j: int, blocks: Blocks) -> Tensor:
    """Block column j [out, m_in] of the dense weight, its own block left out, of what `by_compressor` gives."""
    if blocks.mixing == "pairwise":
        return decompressor @ compressor
    made = list(compressor.split(blocks.phantom_width))
    made.insert(j, torch.zeros_like(made[0]))
    return torch.cat([d @ c for d, c in zip(decompressor.split(blocks.block_out), made, strict=True)])


def without(columns: Tensor, i: int, k: int, count: int = 1) -> Tensor:
    """Leave out `count` groups of k columns, from group i on."""
    return torch.cat([columns[:, : i * k], columns[:, (i + count) * k :]], dim=1)


def _block(weight: Tensor, i: int, j: int, blocks: Blocks) -> Tensor:
    return weight[i * blocks.block_out : (i + 1) * blocks.block_out, j * blocks.block_in : (j + 1) * blocks.block_in]


def _random_compressor(blocks: Blocks, rows: int, generator: torch.Generator) -> Tensor:
    width = blocks.compressor_shape[1]
    return _uniform((rows, width), 1 / width, generator)


def _uniform(shape: tuple[int, ...], variance: float, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3 * variance)
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
