"""Factors for the inputs that a layer really sees: second moments in, calibrated factors out.

For a dense layer y = W x + b let M be the covariance of its inputs, or their second moment where there is no bias to
take up a mean, plus a small multiple of the identity. What a phantom layer with the dense weight V gets wrong is

    |(W - V) M^(1/2)|^2        and, with a bias, b becomes b + (W - V) mean(x)

so everything follows from M: no second pass over the inputs is needed. `calibrated` lowers it by turns, starting from
the best factors of the weights alone: least squares for [L_i, D_i] on the features [x_i, C_j x_j (j != i)], and for one
block column after the other the best C_j and D_j together, what the other factors already explain taken off. No turn
makes it worse. In float64, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_phantom.layers.dense import features
from lightning_phantom.layers.factors import (
    Blocks,
    Factors,
    by_compressor,
    column_of,
    leading_vectors,
    settle,
    to_dense,
    width_of,
    without,
)

RIDGE = 1e-2  # of the mean variance of a feature: how much inputs that calibration has not seen count
ROUNDING = 1e-9  # what is smaller than this, beside its like, is none: a variance, a product of factors
ROUNDS = 3
Affine = tuple[Tensor, Tensor | None]  # a dense weight [out, in] and a bias [out]


class Moments:
    """The second moment of the inputs of one layer, with a one appended to each: their mean and number ride along.

    Args:
        in_features: width of the inputs.
    """

    def __init__(self, in_features: int) -> None:
        self.total = torch.zeros(in_features + 1, in_features + 1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count the inputs x [..., in]."""
        rows = nn.functional.pad(x.detach().flatten(0, -2).double(), (0, 1), value=1.0)
        self.total += (rows.T @ rows).cpu()

    @property
    def count(self) -> int:
        """How many inputs were counted."""
        return int(self.total[-1, -1])

    @property
    def mean(self) -> Tensor:
        """Their mean [in]."""
        return self.total[-1, :-1] / self.count

    def metric(self, centred: bool) -> Tensor:
        """M [in, in]: the inputs' covariance if `centred`, else their second moment; positive definite."""
        metric = self.total[:-1, :-1] / self.count
        least = ROUNDING * metric.diagonal().mean()
        if centred:
            metric = metric - torch.outer(self.mean, self.mean)
        ridge = RIDGE * metric.diagonal().mean() + least
        metric.diagonal().add_(ridge if ridge > 0 else 1.0)
        return metric

    def output_error(self, exact: Affine, approximate: Affine) -> float:
        """The root mean square of an error in the outputs for these inputs, relative to that of the exact outputs."""
        right, wrong = _augmented(exact), _augmented(approximate) - _augmented(exact)
        squares = [(weights @ self.total * weights).sum().clamp(min=0) for weights in (wrong, right)]
        return float((squares[0] / squares[1]).sqrt())


@contextmanager
def record_inputs(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Moments]]:
    """Collect the moments of the inputs of the linears `names` of `module` while the `with` block runs it."""
    moments: dict[str, Moments] = {}
    handles = []
    # In eval mode torch's own transformer layers would hand the weights to a fused kernel and not call their linears.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name in names:
            linear = module.get_submodule(name)
            moments[name] = Moments(features(linear)[0])

            def record(_: nn.Module, args: Any, to: Moments = moments[name]) -> None:
                to.add(args[0])

            handles.append(linear.register_forward_pre_hook(record))
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fused)


def calibrated(
    weight: Tensor, bias: Tensor | None, start: Factors, blocks: Blocks, moments: Moments
) -> tuple[Factors, Tensor | None]:
    """Return factors of width k, and a bias, fitted to the outputs of a dense layer on its calibration inputs.

    Args:
        weight: the dense weight W [out, in].
        bias: its bias [out], or None.
        start: the factors to improve, those of `from_dense`.
        blocks: the layer's sizes.
        moments: of the calibration inputs.
    """
    p, metric = blocks.num_blocks, moments.metric(centred=bias is not None)
    target, factors = weight.double(), Factors(*(f.double() for f in start[:3]))
    for _ in range(ROUNDS):
        factors = refit(target, improve_columns(target, factors, metric, blocks), metric, blocks)
    pairs = []
    for j, (c, d) in enumerate(zip(factors.compressor.chunk(p), _by_sender(factors, p), strict=True)):
        made = iter(c.split(blocks.phantom_width))

        def settled(rows: Tensor, generator: torch.Generator, made: Iterator[Tensor] = made) -> tuple[Tensor, Tensor]:
            return settle(next(made), rows, generator, blocks, ROUNDING * float(target.norm()))

        pairs.append(by_compressor(settled, d, j, blocks))
    factors = _factors(factors.weight, pairs, blocks)
    if bias is not None:
        bias = (bias + (target - to_dense(factors, p, blocks.mixing)) @ moments.mean).to(bias.dtype)
    return Factors(*(f.to(weight.dtype) for f in factors[:3])), bias


def refit(weight: Tensor, factors: Factors, metric: Tensor, blocks: Blocks) -> Factors:
    """Return the factors with the best L and D for these compressors: least squares for the outputs, block by block.

    Features are linear in the inputs, f = F x, so in the metric M the normal equations are F M F^T [L, D]^T = F M W^T.
    """
    p, k, m = blocks.num_blocks, blocks.phantom_width, blocks.block_in
    latents = torch.block_diag(*factors.compressor.chunk(p))  # [p*r, in]
    seen = metric @ latents.T
    made = torch.arange(len(latents)).view(p, -1, k)  # by sender, and in private mixing by receiver
    local, decompressor = [], []
    for i, rows in enumerate(weight.chunk(p)):
        private = blocks.mixing == "private"
        read = torch.cat([made[j, i - (i > j) if private else 0] for j in range(p) if j != i])
        own, others = slice(i * m, (i + 1) * m), latents[read]
        cross = seen[:, read]  # M of every input with the latents of the others
        normal = torch.cat(
            [
                torch.cat([metric[own, own], cross[own]], dim=1),
                torch.cat([cross[own].T, others @ cross], dim=1),
            ]
        )
        right = torch.cat([rows @ metric[:, own], rows @ cross], dim=1)
        fitted = torch.linalg.solve(normal, right.T).T
        local.append(fitted[:, :m])
        decompressor.append(fitted[:, m:])
    return Factors(torch.cat(local), factors.compressor, torch.cat(decompressor))


def improve_columns(weight: Tensor, factors: Factors, metric: Tensor, blocks: Blocks) -> Factors:
    """Return the factors after one block column after the other got its best C_j and D_j, the others fixed.

    (In private mixing each of its blocks by itself got its own.)

    What is missing in block column j, regressed on x_j, is B = (W - V) M_j M_jj^-1 + V_j. Its best approximation of
    width k in the metric M_jj = R R^T comes from the leading right singular vectors Q of B R: C_j = Q^T R^-1 and
    D_j = B R Q.
    """
    p, m = blocks.num_blocks, blocks.block_in
    error = weight - to_dense(factors, p, blocks.mixing)
    pairs = []
    for j, (c, d) in enumerate(zip(factors.compressor.chunk(p), _by_sender(factors, p), strict=True)):
        columns = slice(j * m, (j + 1) * m)
        root = torch.linalg.cholesky(metric[columns, columns])
        before = column_of(c, d, j, blocks)
        missing = torch.cholesky_solve((error @ metric[:, columns]).T, root).T + before

        def best(rows: Tensor, generator: Any, root: Tensor = root) -> tuple[Tensor, Tensor]:
            vectors = leading_vectors(rows @ root, blocks.phantom_width)
            return torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False), rows @ root @ vectors

        pair = by_compressor(best, missing, j, blocks)
        error[:, columns] += before - column_of(*pair, j, blocks)
        pairs.append(pair)
    return _factors(factors.weight, pairs, blocks)


def _augmented(layer: Affine) -> Tensor:
    """Weight and bias as one matrix [out, in + 1], for inputs with a one appended."""
    weight, bias = layer
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return torch.cat([weight, bias[:, None]], dim=1).double()


def _by_sender(factors: Factors, p: int) -> list[Tensor]:
    """D_j [out, k] for each block column j, with zeros in the own block's rows."""
    k = width_of(factors, p)
    rows = [
        torch.cat([d[:, : i * k], d.new_zeros(d.shape[0], k), d[:, i * k :]], dim=1)
        for i, d in enumerate(factors.decompressor.chunk(p))
    ]
    return list(torch.cat(rows).split(k, dim=1))


def _factors(local: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], blocks: Blocks) -> Factors:
    """Factors of all blocks from L and each block column's C_j [r, m_in] and D_j [out, k]."""
    k = blocks.phantom_width
    rows = torch.cat([d for _, d in pairs], dim=1).chunk(blocks.num_blocks)
    decompressor = torch.cat([without(d, i, k) for i, d in enumerate(rows)])
    return Factors(local, torch.cat([c for c, _ in pairs]), decompressor)
