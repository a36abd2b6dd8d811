"""The tensor-parallel layer: the dense layer, exactly, its weight cut along one dimension.

R ranks, of which each has t of the group's T tokens. Outside a layer it has them with all features, inside the group's
tokens with its own features (Megatron's sequence parallelism), so nothing outside is computed twice:

| cut | W on one rank | b on one rank | reads | returns |
|---|---|---|---|---|
| column | [out/R, in] | [out/R] | [t, in], gathered to [T, in]; or [T, in/R], gathered likewise | [T, out/R] |
| row | [out, in/R] | [out] | [T, in/R] | [t, out] |

    column:  z_r = x W_r^T + b_r                  dx = sum over r of dz_r W_r    dW_r = dz_r^T x    db_r = dz_r
    row:     z = sum over r of x_r W_r^T + b      dx_r = dz W_r                  dW_r = dz^T x_r    db = dz

Traffic: a column layer gathers x and scatters the sum of dx, a row layer scatters the sum of z and gathers dz. What is
gathered travels while this rank's own share of it is multiplied; what is summed backward, while dW is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import gather_latents, gather_tokens, sum_tokens
from lightning_phantom.distributed.ranks import Ranks, Waiting
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.dense import is_conv1d, oriented
from lightning_phantom.layers.seeds import generator_of
from lightning_phantom.layers.split import SplitLinear, of_those_read
from lightning_phantom.layers.twice import differentiate

CUTS = ("column", "row")


class ParallelLinear(SplitLinear):
    """An `nn.Linear` whose weight is cut between ranks; see the module's docstring for its algebra.

    Args:
        in_features: width of the input, all ranks together; R divides it.
        out_features: width of the output, all ranks together; R divides it.
        cut: `"column"`, by output feature, or `"row"`, by input feature.
        bias: whether to learn an additive bias.
        process_group: the ranks that hold the layer between them; `None`: this process holds all of it.
        dense_class: the kind of layer that it stands for, in whose orientation the weight is kept.
        device: where the parameters live. On the meta device nothing is allocated.
        dtype: type of the parameters.

    Raises:
        PhantomError: sizes that R does not divide, or an unknown cut.

    Examples:
        >>> layer = ParallelLinear(64, 32)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    kind = "tensor-parallel"
    method = "tensor_parallel"
    kind = "tensor-parallel"
    keeps_factors = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        cut: str = "column",
        bias: bool = True,
        *,
        process_group: ProcessGroup | None = None,
        dense_class: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, process_group, dense_class)
        size = self.ranks.size
        if cut not in CUTS:
            raise PhantomError(f"cut={cut!r}: choose one of {', '.join(map(repr, CUTS))}.")
        if in_features % size or out_features % size:
            raise PhantomError(f"a layer of {in_features} -> {out_features} features does not divide by {size} ranks.")
        self.cut, row = cut, cut == "row"
        turned = is_conv1d(dense_class)
        self.split_dims: Mapping[str, int] = {"weight": int(row != turned)} | ({} if row else {"bias": 0})
        rows, columns = (out_features, in_features // size) if row else (out_features // size, in_features)
        shape = (columns, rows) if turned else (rows, columns)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """This rank's W and b."""
        return oriented(self.weight, self.dense_class), self.bias

    @property
    def enters(self) -> bool:  # type: ignore[override]
        """Whether a plain input is to be brought to feature layout."""
        return self.cut == "row"

    @property
    def leaves(self) -> bool:  # type: ignore[override]
        """Whether the output is in token layout."""
        return self.cut == "row"

    def alone(self, x: Tensor, factors: Sequence[Any]) -> Tensor:
        """Apply the layer to x [tokens, in] in a process that holds all of it."""
        return linear(x, *factors)

    def among(
        self, layers: Sequence[ParallelLinear], x: Tensor, rows: Rows, inside: bool, factors: Sequence[Any]
    ) -> list[Tensor]:
        """Apply `layers` to x, [T, in/R] if `inside` and else [t, in]; see `SplitLinear`."""
        if self.cut == "row":
            outputs = _Row.apply(x, self.ranks, rows, f"sum of {self.name!r}", *factors)
        else:
            outputs = _Column.apply(x, self.ranks, rows, f"input of {self.name!r}", inside, *factors)
        return list(outputs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W and b as nn.Linear does; the same numbers for any number of ranks. A no-op on the meta device."""
        if self.weight.is_meta:
            return
        seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64)) if self.init_seed is None else self.init_seed
        bound = 1 / math.sqrt(self.in_features)
        drawn = {}
        for name, shape in (("weight", (self.out_features, self.in_features)), ("bias", (self.out_features,))):
            generator = generator_of(seed, self.name, name)
            drawn[name] = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.load_dense(drawn["weight"], drawn["bias"])

    def local_state(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """This rank's share of a dense weight [out, in] and bias [out]."""
        given = {"weight": None if weight is None else oriented(weight, self.dense_class), "bias": bias}
        return {name: self.share_of(name, whole) for name, whole in given.items() if whole is not None}

    def dense_from(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight [out, in], which is the whole parameter itself."""
        return oriented(tensors["weight"], self.dense_class)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"cut={self.cut}, ranks={self.ranks.size}"
        )


class _Column(torch.autograd.Function):
    """Column-parallel layers that read the same x: W and b (or None) of each in turn, and a z [T, out/R] for each.

    Of the R shares of x, tokens of other ranks [t_s, in] or features of other ranks [T, in/R], each is multiplied as it
    is; this rank's own while the others arrive.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ranks: Ranks, rows: Rows, what: str, inside: bool, *factors: Any
    ) -> tuple[Tensor, ...]:
        layers = [factors[n : n + 2] for n in range(0, len(factors), 2)]
        if inside:
            arriving: Waiting = ranks.all_gather(x, rows, what)
            zs = [linear(x, _columns(weight, ranks.size)[ranks.rank], bias) for weight, bias in layers]
            xs = arriving()  # [R, T, in/R]
            for (weight, _), z in zip(layers, zs, strict=True):
                for s in (s for s in range(ranks.size) if s != ranks.rank):
                    torch.addmm(z, xs[s], _columns(weight, ranks.size)[s].mT, out=z)
        else:
            arriving = ranks.gather_tokens(x, rows, what)
            own, zs = _own(rows, ranks), [x.new_empty(rows.total, weight.shape[0]) for weight, _ in layers]
            for (weight, bias), z in zip(layers, zs, strict=True):
                _multiply(x, weight, bias, z[own])
            xs = arriving()  # [T, in]
            for (weight, bias), z in zip(layers, zs, strict=True):
                for others in (slice(0, own.start), slice(own.stop, None)):
                    _multiply(xs[others], weight, bias, z[others])
        ctx.among = ranks, rows, what, inside
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, xs, *factors)
        return tuple(zs)

    @staticmethod
    def backward(ctx: Any, *grads_of_z: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, rows, what, inside = ctx.among
        x, xs, *factors = ctx.saved_tensors
        needs_x, _, _, _, _, *needs = ctx.needs_input_grad
        dzs, needs = of_those_read(grads_of_z, needs, factors, rows.total)
        if torch.is_grad_enabled():

            def multiply(x: Tensor, *factors: Any) -> list[Tensor]:
                return _column(x, ranks, rows, what, inside, *factors)

            of_x, *of_factors = differentiate(multiply, (x, *factors), (needs_x, *needs), dzs)
            return (of_x, None, None, None, None, *of_factors)

        weights, back = factors[::2], f"gradient: {what}"
        if needs_x:
            shares = ranks.size if inside else 1
            dx = torch.bmm(dzs[0].expand(shares, *dzs[0].shape), _columns(weights[0], shares))
            for dz, weight in zip(dzs[1:], weights[1:], strict=True):
                torch.baddbmm(dx, dz.expand(shares, *dz.shape), _columns(weight, shares), out=dx)
            if inside:  # dx: [R, T, in/R]
                summed = ranks.reduce_scatter(dx, rows, back)
            else:  # [1, T, in]
                dx = dx[0]
                summed = ranks.sum_tokens(dx, rows, back, 1 if rows.shared else ranks.size)
        grads: list[Tensor | None] = [None] * len(factors)
        for n, (dz, weight) in enumerate(zip(dzs, weights, strict=True)):
            if needs[2 * n] and inside:
                grads[2 * n] = d_weight = torch.empty_like(weight)
                torch.bmm(dz.expand(len(xs), *dz.shape).mT, xs, out=_columns(d_weight, ranks.size))
            elif needs[2 * n]:
                grads[2 * n] = dz.mT @ xs
            if needs[2 * n + 1]:
                grads[2 * n + 1] = dz.sum(0)
        return (summed() if needs_x else None, None, None, None, None, *grads)


class _Row(torch.autograd.Function):
    """Row-parallel layers that read the same x [T, in/R]: W and b (or None) of each in turn, a z [t, out] for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, rows: Rows, what: str, *factors: Any) -> tuple[Tensor, ...]:
        layers = [factors[n : n + 2] for n in range(0, len(factors), 2)]
        sums = [ranks.sum_tokens(linear(x, weight), rows, what) for weight, _ in layers]
        zs = [summed() if bias is None else summed() + bias for summed, (_, bias) in zip(sums, layers, strict=True)]
        ctx.among = ranks, rows, what
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors)
        return tuple(zs)

    @staticmethod
    def backward(ctx: Any, *grads_of_z: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, rows, what = ctx.among
        x, *factors = ctx.saved_tensors
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        own = _own(rows, ranks)
        dzs, needs = of_those_read(grads_of_z, needs, factors, own.stop - own.start)
        if torch.is_grad_enabled():

            def multiply(x: Tensor, *factors: Any) -> list[Tensor]:
                return _row(x, ranks, rows, what, *factors)

            of_x, *of_factors = differentiate(multiply, (x, *factors), (needs_x, *needs), dzs)
            return (of_x, None, None, None, *of_factors)

        scale = 1 if rows.shared else 1 / ranks.size
        arriving = [ranks.gather_tokens(dz, rows, f"gradient: {what}", scale) for dz in dzs]
        grads: list[Tensor | None] = [None] * len(factors)
        dx = torch.empty_like(x) if needs_x else None
        for n, (dz, weight) in enumerate(zip(dzs, factors[::2], strict=True)):
            mine = dz * scale
            if dx is not None:
                dx[own] = mine @ weight if n == 0 else dx[own] + mine @ weight
            if needs[2 * n]:
                grads[2 * n] = mine.mT @ x[own]
            if needs[2 * n + 1]:
                grads[2 * n + 1] = dz.sum(0)
        for n, (dz, weight) in enumerate(zip(arriving, factors[::2], strict=True)):
            d_all = dz()  # [T, out]
            for others in (slice(0, own.start), slice(own.stop, None)):
                if dx is not None:
                    dx[others] = d_all[others] @ weight if n == 0 else dx[others] + d_all[others] @ weight
                d_weight = grads[2 * n]
                if d_weight is not None:
                    torch.addmm(d_weight, d_all[others].mT, x[others], out=d_weight)
        return (dx, None, None, None, *grads)


def _column(x: Tensor, ranks: Ranks, rows: Rows, what: str, inside: bool, *factors: Any) -> list[Tensor]:
    """What `_Column` computes, as operations that have gradients of any order."""
    if inside:
        x = gather_latents(x, ranks, rows, what).transpose(0, 1).flatten(1)
    else:
        x = gather_tokens(x, ranks, rows, what)
    return [linear(x, *factors[n : n + 2]) for n in range(0, len(factors), 2)]


def _row(x: Tensor, ranks: Ranks, rows: Rows, what: str, *factors: Any) -> list[Tensor]:
    """What `_Row` computes, as operations that have gradients of any order."""
    sums = [sum_tokens(linear(x, weight), ranks, rows, what) for weight in factors[::2]]
    return [z if bias is None else z + bias for z, bias in zip(sums, factors[1::2], strict=True)]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias, x, weight.mT, out=out)


def _own(rows: Rows, ranks: Ranks) -> slice:
    """Where this rank's own tokens are among the group's."""
    if rows.shared:
        return slice(0, rows.total)
    start = sum(rows.counts[: ranks.rank])
    return slice(start, start + rows.counts[ranks.rank])


def _columns(weight: Tensor, shares: int) -> Tensor:
    """View [rows, width] as [shares, rows, width/shares]."""
    return weight.unflatten(1, (shares, -1)).transpose(0, 1)
