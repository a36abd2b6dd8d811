"""The phantom layer: a dense diagonal block per block of features, and a narrow passage between them.

Phantom parallelism is the method of Seal, Alam, Ramirez, Dash and Lu (arXiv 2508.00960). No code of theirs is
public: the operator below is this package's reading of it.

With p blocks of k-wide latents, `m_in = in/p`, `m_out = out/p`, and R ranks of q = p/R consecutive blocks:

    z_i = L_i x_i + sum over j != i of D_ij (C_j x_j) + b_i

| factor | parameter | on one rank | all ranks |
|---|---|---|---|
| L_i  [m_out, m_in] | `weight` | [out/R, in/p] | [out, in/p] |
| C_j  [k, m_in] | `compressor_weight` | [q*k, in/p] | [p*k, in/p] |
| D_ij [m_out, k], j != i | `decompressor_weight` | [out/R, (p-1)*k] | [out, (p-1)*k] |
| b_i  [m_out] | `bias` | [out/R] | [out] |

Backward, with d_i the gradient at z_i, g_j = C_j x_j and h_j = sum over i != j of D_ij^T d_i:

    dL_i = d_i^T x_i    dD_ij = d_i^T g_j    dC_j = h_j^T x_j    dx_j = L_j^T d_j + C_j^T h_j    db_i = d_i

Traffic per layer: one all-gather of g forward and one reduce-scatter of h backward, q*k features of each token per
rank. Both run while the products with L, which need nothing from elsewhere, are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_phantom.config import check_phantom_width, is_int, resolve_phantom_width
from lightning_phantom.distributed.comm import Ranks, gather, scatter
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.factors import Blocks, Factors, from_dense, random_bias, random_factors, to_dense
from lightning_phantom.layers.split import SplitLinear

FACTORS = ("weight", "compressor_weight", "decompressor_weight")


class PhantomLinear(SplitLinear):
    """A linear layer in phantom-parallel layout; see the module's docstring for its algebra.

    It is an `nn.Linear` for code that asks, but `weight` holds only the diagonal blocks [out/R, in/p] of this rank; the
    dense weight it stands for is `dense_weight()`.

    Args:
        in_features: width of the input, all ranks together; num_blocks divides it.
        out_features: width of the output, all ranks together; num_blocks divides it.
        num_blocks: p, at least 2 and a multiple of the group's size R.
        phantom_width: k, as an int or as a fraction of the block width (see `PhantomConfig`).
        bias: whether to learn an additive bias.
        process_group: the ranks that hold the layer between them; `None`: this process holds all of it.
        input_layout: `"replicated"`, input [..., in], or `"sharded"`, input [..., in/R].
        output_layout: `"replicated"`, output [..., out], or `"sharded"`, output [..., out/R].
        dense_class: the kind of layer that it stands for; dense state dicts are in that one's orientation.
        device: where the parameters live. On the meta device nothing is allocated.
        dtype: type of the parameters.

    Raises:
        PhantomError: sizes that do not divide, or an unknown layout.

    Example:
        >>> layer = PhantomLinear(64, 32, num_blocks=4, phantom_width=2)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    method = "phantom"
    kind = "phantom"
    keeps_factors = True
    split_dims: Mapping[str, int] = dict.fromkeys(("weight", "compressor_weight", "decompressor_weight", "bias"), 0)

    compressor_weight: nn.Parameter
    decompressor_weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        phantom_width: int | float,
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
        _check_sizes(in_features, out_features, num_blocks, self.ranks.size)
        check_phantom_width(phantom_width)
        self.num_blocks = num_blocks
        self.phantom_width = resolve_phantom_width(phantom_width, in_features, out_features, num_blocks)

        held, m_in = num_blocks // self.ranks.size, in_features // num_blocks
        out_here, k = out_features // self.ranks.size, self.phantom_width

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_here, m_in)
        self.compressor_weight = parameter(held * k, m_in)
        self.decompressor_weight = parameter(out_here, (num_blocks - 1) * k)
        if bias:
            self.bias = parameter(out_here)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def blocks(self) -> Blocks:
        """The layer's sizes and the key of its random numbers."""
        seed = 0 if self.init_seed is None else self.init_seed
        return Blocks(self.in_features, self.out_features, self.num_blocks, self.phantom_width, seed, self.name)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This rank's L, C, D and b."""
        return self.weight, self.compressor_weight, self.decompressor_weight, self.bias

    def compute(self, layers: Sequence[PhantomLinear], x: Tensor, factors: Sequence[Any]) -> list[Tensor]:
        """Apply `layers` to x [tokens, width]; see `SplitLinear`."""
        if self.ranks.size == 1 and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            return [_mix(x, self.num_blocks, *factors[n : n + 4]) for n in range(0, len(factors), 4)]
        if self.input_layout == "replicated":
            x = scatter(x, self.ranks)
        outputs = _Mix.apply(x, self.ranks, self.num_blocks, *factors)
        return [
            gather(z, layer.ranks) if layer.output_layout == "replicated" else z
            for layer, z in zip(layers, outputs, strict=True)
        ]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all factors and the bias anew; the same numbers for any number of ranks. A no-op on the meta device."""
        if self.weight.is_meta:
            return
        blocks = self.blocks
        if self.init_seed is None:  # a layer of the user's own follows torch.manual_seed, like nn.Linear
            blocks = blocks._replace(seed=int(torch.randint(2**63 - 1, (), dtype=torch.int64)))
        self.load_factors(random_factors(blocks, self.ranks, self.weight.dtype))
        if self.bias is not None:
            self.bias.copy_(random_bias(blocks, self.ranks, self.bias.dtype))

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy this rank's factors into the parameters."""
        self.weight.copy_(factors.weight)
        self.compressor_weight.copy_(factors.compressor)
        self.decompressor_weight.copy_(factors.decompressor)

    @torch.no_grad()
    def local_state(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """This rank's factors of the best approximation of a dense weight [out, in], and its bias; collective."""
        state: dict[str, Tensor] = {}
        if weight is not None:
            state.update(zip(FACTORS, from_dense(weight, self.blocks, self.ranks), strict=True))
        if bias is not None:
            state["bias"] = self.share_of("bias", bias)
        return state

    def dense_from(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight [out, in] that the factors of all ranks stand for."""
        return to_dense(Factors(*(tensors[name] for name in FACTORS)), self.num_blocks)

    def record(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the layer that loads it."""
        return {**super().record(), "phantom_width": self.phantom_width}

    def shared_record(self) -> dict[str, Any]:
        """What a checkpoint says once for all layers of a model."""
        return {"num_blocks": self.num_blocks}

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_blocks={self.num_blocks}, phantom_width={self.phantom_width}, ranks={self.ranks.size}, "
            f"{self.input_layout} -> {self.output_layout}"
        )


def _check_sizes(in_features: int, out_features: int, num_blocks: int, num_ranks: int) -> None:
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


def _mix(x: Tensor, p: int, local: Tensor, c: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """What `_Mix` computes for one layer on one process, as operations that compilers know.

    Without gradients it also takes less time for a few tokens, as in decoding: fewer views are made.
    """
    xs = _features(x, p)
    g = torch.bmm(xs, _rows(c, p).mT).transpose(0, 1).flatten(1)
    z = torch.baddbmm(torch.bmm(xs, _rows(local, p).mT), _of_others(g, range(p), p), _rows(d, p).mT)
    z = z.transpose(0, 1).flatten(1)
    return z if bias is None else z + bias


class _Mix(torch.autograd.Function):
    """The operator of the module's docstring, for one or more layers that read the same x [tokens, in/R].

    `factors` holds L, C, D and b (or None) of each layer in turn, and one z [tokens, out/R] comes back for each. The
    layers' latents travel side by side in one collective. The q blocks of this rank are the batch dimension of every
    product: activations [tokens, q*w] are seen as [q, tokens, w], factors [q*rows, w] as [q, rows, w].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, p: int, *factors: Any) -> tuple[Tensor, ...]:
        q, held = p // ranks.size, range(p)[ranks.slice_of(p)]
        layers = [factors[n : n + 4] for n in range(0, len(factors), 4)]
        widths = [c.shape[0] for _, c, _, _ in layers]  # q*k
        xs = _features(x, q)

        g_own = x.new_empty(x.shape[0], sum(widths))
        for (_, c, _, _), g in zip(layers, g_own.split(widths, 1), strict=True):
            torch.bmm(xs, _rows(c, q).mT, out=_features(g, q))
        g_all = ranks.all_gather(g_own)

        zs = [x.new_empty(x.shape[0], local.shape[0]) for local, *_ in layers]
        for (local, *_), z in zip(layers, zs, strict=True):
            torch.bmm(xs, _rows(local, q).mT, out=_features(z, q))

        gs = [g.transpose(0, 1).flatten(1) for g in g_all().split(widths, 2)]  # [tokens, p*k]
        for (_, _, d, bias), g, z in zip(layers, gs, zs, strict=True):
            z_blocks = _features(z, q)
            torch.baddbmm(z_blocks, _of_others(g, held, p), _rows(d, q).mT, out=z_blocks)
            if bias is not None:
                z += bias

        ctx.ranks, ctx.p = ranks, p
        ctx.save_for_backward(x, *gs, *factors)
        return tuple(zs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dzs: Tensor) -> tuple[Tensor | None, ...]:
        ranks, p = ctx.ranks, ctx.p
        q, held = p // ranks.size, range(p)[ranks.slice_of(p)]
        x, *saved = ctx.saved_tensors
        gs, factors = saved[: len(dzs)], saved[len(dzs) :]
        layers = [factors[n : n + 4] for n in range(0, len(factors), 4)]
        widths = [c.shape[0] for _, c, _, _ in layers]
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_h = needs_x or any(needs[1::4])
        xs, ds = _features(x, q), [_features(dz, q) for dz in dzs]

        if needs_h:
            hs = [
                _sum_over_others(torch.bmm(d_z, _rows(d, q)), held, p)
                for d_z, (_, _, d, _) in zip(ds, layers, strict=True)
            ]
            h_all = torch.cat([h.unflatten(1, (ranks.size, -1)).transpose(0, 1) for h in hs], dim=2)
            h_own = ranks.reduce_scatter(h_all)

        grads: list[Tensor | None] = [None] * len(factors)
        dx = torch.empty_like(x) if needs_x else None
        for n, (d_z, g, (local, _, d, _)) in enumerate(zip(ds, gs, layers, strict=True)):
            if needs[4 * n]:
                grads[4 * n] = torch.bmm(d_z.mT, xs).view_as(local)
            if needs[4 * n + 2]:
                grads[4 * n + 2] = torch.bmm(d_z.mT, _of_others(g, held, p)).view_as(d)
            if needs[4 * n + 3]:
                grads[4 * n + 3] = dzs[n].sum(0)
            if dx is not None:
                _accumulate(dx, d_z, _rows(local, q), first=n == 0)

        if needs_h:
            for n, (h, (_, c, _, _)) in enumerate(zip(h_own().split(widths, 1), layers, strict=True)):
                h_blocks = _features(h, q)
                if needs[4 * n + 1]:
                    grads[4 * n + 1] = torch.bmm(h_blocks.mT, xs).view_as(c)
                if dx is not None:
                    _accumulate(dx, h_blocks, _rows(c, q))
        return (dx, None, None, *grads)


def _features(x: Tensor, q: int) -> Tensor:
    """View [tokens, q*w] as [q, tokens, w]."""
    return x.unflatten(1, (q, -1)).transpose(0, 1)


def _rows(factor: Tensor, q: int) -> Tensor:
    """View [q*rows, w] as [q, rows, w]."""
    return factor.unflatten(0, (q, -1))


def _of_others(g: Tensor, held: range, p: int) -> Tensor:
    """Give each held block the latents of all blocks but its own: [tokens, p*k] -> [q, tokens, (p-1)*k]."""
    k = g.shape[1] // p
    return torch.stack([torch.cat([g[:, : i * k], g[:, (i + 1) * k :]], dim=1) for i in held])


def _sum_over_others(h: Tensor, held: range, p: int) -> Tensor:
    """The adjoint of `_of_others`: [q, tokens, (p-1)*k] -> [tokens, p*k]."""
    k = h.shape[2] // (p - 1)
    total = h.new_zeros(h.shape[1], p * k)
    for i, h_i in zip(held, h, strict=True):
        total[:, : i * k] += h_i[:, : i * k]
        total[:, (i + 1) * k :] += h_i[:, i * k :]
    return total


def _accumulate(dx: Tensor, d: Tensor, factor: Tensor, first: bool = False) -> None:
    """Add d [q, tokens, rows] times factor [q, rows, w] to dx [tokens, q*w], or store it there when it is the first."""
    dx_blocks = _features(dx, factor.shape[0])
    if first:
        torch.bmm(d, factor, out=dx_blocks)
    else:
        torch.baddbmm(dx_blocks, d, factor, out=dx_blocks)
