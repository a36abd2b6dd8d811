"""The tensor-parallel layer: the dense layer, exactly, its weight cut along one dimension.

With R ranks, x [tokens, in] and z = x W^T + b [tokens, out]:

| cut | W on one rank | b on one rank | x | z |
|---|---|---|---|---|
| column | [out/R, in] | [out/R] | replicated, or sharded and gathered | sharded, or gathered |
| row | [out, in/R] | [out] | sharded | replicated |

    column:  z_r = x W_r^T + b_r         dx = sum over r of dz_r W_r    dW_r = dz_r^T x    db_r = dz_r
    row:     z = sum over r of x_r W_r^T + b    dx_r = dz W_r           dW_r = dz^T x_r    db = dz

Traffic: a column layer sums dx over the ranks: one all-reduce where x is replicated, a reduce-scatter where it is
sharded, in which case it also gathers x forward. A row layer sums z, one all-reduce. What is summed backward travels
while dW is computed; what is gathered forward, while this rank's own share of x is multiplied.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_phantom.config import STYLES
from lightning_phantom.distributed.comm import Ranks, gather
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.dense import is_conv1d, oriented
from lightning_phantom.layers.split import SplitLinear


class ParallelLinear(SplitLinear):
    """An `nn.Linear` whose weight is cut between ranks; see the module's docstring for its algebra.

    Args:
        in_features: width of the input, all ranks together; R divides it.
        out_features: width of the output, all ranks together; R divides it.
        style: `"megatron"`: the weight is cut by row where the input is sharded and the output replicated, and by
            column elsewhere; or `"layerwise"`: by column everywhere.
        bias: whether to learn an additive bias.
        process_group: the ranks that hold the layer between them; `None`: this process holds all of it.
        input_layout: `"replicated"`, input [..., in], or `"sharded"`, input [..., in/R].
        output_layout: `"replicated"`, output [..., out], or `"sharded"`, output [..., out/R].
        dense_class: the kind of layer that it stands for, in whose orientation the weight is kept.
        device: where the parameters live. On the meta device nothing is allocated.
        dtype: type of the parameters.

    Raises:
        PhantomError: sizes that R does not divide, an unknown style or layout.

    Example:
        >>> layer = ParallelLinear(64, 32)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    method = "tensor_parallel"
    kind = "tensor-parallel"
    keeps_factors = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        style: str = "megatron",
        bias: bool = True,
        *,
        process_group: ProcessGroup | None = None,
        input_layout: str = "replicated",
        output_layout: str = "replicated",
        dense_class: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, process_group, input_layout, output_layout, dense_class)
        size = self.ranks.size
        if style not in STYLES:
            raise PhantomError(f"style={style!r}: choose one of {', '.join(map(repr, STYLES))}.")
        if in_features % size or out_features % size:
            raise PhantomError(f"a layer of {in_features} -> {out_features} features does not divide by {size} ranks.")
        row = style == "megatron" and (input_layout, output_layout) == ("sharded", "replicated")
        self.style: str = style
        self.cut = "row" if row else "column"
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

    def compute(self, layers: Sequence[ParallelLinear], x: Tensor, factors: Sequence[Any]) -> list[Tensor]:
        """Apply `layers` to x [tokens, width]; see `SplitLinear`."""
        if self.ranks.size == 1:
            return [nn.functional.linear(x, *factors[n : n + 2]) for n in range(0, len(factors), 2)]
        outputs = _Multiply.apply(x, self.ranks, self.cut, self.input_layout, *factors)
        return [
            gather(z, layer.ranks) if layer.cut == "column" and layer.output_layout == "replicated" else z
            for layer, z in zip(layers, outputs, strict=True)
        ]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W and b as nn.Linear does; the same numbers for any number of ranks. A no-op on the meta device."""
        if self.weight.is_meta:
            return
        seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64)) if self.init_seed is None else self.init_seed
        bound = 1 / math.sqrt(self.in_features)
        drawn = {}
        for name, shape in (("weight", (self.out_features, self.in_features)), ("bias", (self.out_features,))):
            digest = hashlib.blake2b(f"{seed}/{self.name}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
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
            f"style={self.style}, cut={self.cut}, ranks={self.ranks.size}, {self.input_layout} -> {self.output_layout}"
        )


class _Multiply(torch.autograd.Function):
    """The products of the module's docstring, for one or more layers of one cut that read the same x [tokens, width].

    `factors` holds W and b (or None) of each layer in turn, and one z comes back for each. Where x is sharded and
    gathered, it is never joined: the S = R shares xs [S, tokens, width/S] are multiplied one by one with the columns of
    W that they meet, [S, rows, width/S]. Elsewhere S = 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, cut: str, input_layout: str, *factors: Any) -> tuple[Tensor, ...]:
        layers = [factors[n : n + 2] for n in range(0, len(factors), 2)]
        gathered = ranks.size > 1 and cut == "column" and input_layout == "sharded"
        mine = ranks.rank if gathered else 0
        shares = ranks.size if gathered else 1
        arriving = ranks.all_gather(x) if gathered else lambda: x.unsqueeze(0)

        zs, sums = [], []
        for weight, bias in layers:
            own = _columns(weight, shares)[mine].mT
            zs.append(x @ own if bias is None or cut == "row" else torch.addmm(bias, x, own))
            sums.append(ranks.sum(zs[-1]) if cut == "row" else None)
        xs = arriving()
        for (weight, bias), z, summed in zip(layers, zs, sums, strict=True):
            for s in (s for s in range(shares) if s != mine):
                torch.addmm(z, xs[s], _columns(weight, shares)[s].mT, out=z)
            if summed is not None:
                summed()
                if bias is not None:
                    z += bias

        ctx.ranks, ctx.cut, ctx.gathered = ranks, cut, gathered
        ctx.save_for_backward(xs, *factors[::2])
        return tuple(zs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dzs: Tensor) -> tuple[Tensor | None, ...]:
        ranks = ctx.ranks
        xs, *weights = ctx.saved_tensors
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        shares = len(xs)
        ds = [dz.expand(shares, *dz.shape) for dz in dzs]

        if needs_x:
            dx = torch.bmm(ds[0], _columns(weights[0], shares))
            for d, weight in zip(ds[1:], weights[1:], strict=True):
                torch.baddbmm(dx, d, _columns(weight, shares), out=dx)
            if ctx.gathered:
                summed = ranks.reduce_scatter(dx)
            else:
                summed = (ranks if ctx.cut == "column" else Ranks(None)).sum(dx[0])

        grads: list[Tensor | None] = [None] * (2 * len(dzs))
        for n, (dz, d, weight) in enumerate(zip(dzs, ds, weights, strict=True)):
            if needs[2 * n]:
                grads[2 * n] = d_weight = torch.empty_like(weight)
                torch.bmm(d.mT, xs, out=_columns(d_weight, shares))
            if needs[2 * n + 1]:
                grads[2 * n + 1] = dz.sum(0)
        return (summed() if needs_x else None, None, None, None, *grads)


def _columns(weight: Tensor, shares: int) -> Tensor:
    """View [rows, width] as [shares, rows, width/shares]."""
    return weight.unflatten(1, (shares, -1)).transpose(0, 1)
