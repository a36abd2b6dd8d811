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

Output features are cut into p contiguous blocks; of a gate and what it gates side by side (`parts` = 2), block i has
features i of each, so that their product lies as a layer's input does.

Backward, with d_i the gradient at z_i, g_j = C_j x_j and h_j = sum over i != j of D_ij^T d_i:

    dL_i = d_i^T x_i    dD_ij = d_i^T g_j    dC_j = h_j^T x_j    dx_j = L_j^T d_j + C_j^T h_j    db_i = d_i

x and z lie in feature layout here: the T tokens of the whole group, [T, q*m_in] and [T, q*m_out].

Traffic per layer: one all-gather of g forward and one reduce-scatter of h backward, q*k features of each of the T
tokens per rank. Both run while the products with L, which need nothing from elsewhere, are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from lightning_phantom.config import check_phantom_width, is_int, resolve_phantom_width
from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import gather_latents
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.factors import (
    Blocks,
    Factors,
    by_block,
    by_part,
    from_dense,
    random_bias,
    random_factors,
    to_dense,
)
from lightning_phantom.layers.split import SplitLinear, of_those_read
from lightning_phantom.layers.twice import differentiate

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
        dense_class: the kind of layer that it stands for; dense state dicts are in that one's orientation.
        parts: 2 where the output is a gate and what it gates, side by side: block i then has features i of each part.
        device: where the parameters live. On the meta device nothing is allocated.
        dtype: type of the parameters.

    Raises:
        PhantomError: sizes that do not divide.

    Example:
        >>> layer = PhantomLinear(64, 32, num_blocks=4, phantom_width=2)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    kind = method = "phantom"
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
        dense_class: type[nn.Module] = nn.Linear,
        parts: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, process_group, dense_class)
        _check_sizes(in_features, out_features, num_blocks, self.ranks.size)
        if out_features % (num_blocks * parts):
            raise PhantomError(f"parts={parts} of {out_features} features do not divide into num_blocks={num_blocks}.")
        self._order = _Order(parts)
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
    def parts(self) -> int:  # type: ignore[override]
        """How many parts of equal width the output has; block i has its share of each."""
        return self._order.parts

    @property
    def blocks(self) -> Blocks:
        """The layer's sizes and the key of its random numbers."""
        seed = 0 if self.init_seed is None else self.init_seed
        return Blocks(self.in_features, self.out_features, self.num_blocks, self.phantom_width, seed, self.name)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """This rank's L, C, D and b."""
        return self.weight, self.compressor_weight, self.decompressor_weight, self.bias

    def alone(self, x: Tensor, factors: Sequence[Any]) -> Tensor:
        """Apply the layer to x [tokens, in] in a process that holds all of it."""
        plainly = not torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_transformed()
        if plainly:
            return self._by_part(_mix(x, self.ranks, None, "", self.num_blocks, *factors))
        return self._by_part(_Mix.apply(x, self.ranks, None, "", self.num_blocks, *factors)[0])

    def _by_part(self, z: Tensor) -> Tensor:
        """Z [tokens, out/R], block by block -> part by part."""
        q = self.num_blocks // self.ranks.size
        return z if self.parts == 1 or q == 1 else z.unflatten(1, (q, self.parts, -1)).transpose(1, 2).flatten(1)

    def among(
        self, layers: Sequence[PhantomLinear], x: Tensor, rows: Rows, inside: bool, factors: Sequence[Any]
    ) -> list[Tensor]:
        """Apply `layers` to x [T, in/R]; see `SplitLinear`."""
        what = f"latents of {self.name!r}"
        zs = _Mix.apply(x, self.ranks, rows, what, self.num_blocks, *factors)
        return [layer._by_part(z) for layer, z in zip(layers, zs, strict=True)]

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
            state.update(zip(FACTORS, from_dense(self.by_block(weight), self.blocks, self.ranks), strict=True))
        if bias is not None:
            state["bias"] = self.share_of("bias", self.by_block(bias))
        return state

    def by_block(self, rows: Tensor) -> Tensor:
        """The rows [out, *] of a dense weight or bias, in the order of the blocks."""
        return by_block(rows, self.num_blocks, self.parts)

    def dense_from(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight [out, in] that the factors of all ranks stand for."""
        dense = to_dense(Factors(*(tensors[name] for name in FACTORS)), self.num_blocks)
        return by_part(dense, self.num_blocks, self.parts)

    def bias_from(self, whole: Tensor) -> Tensor:
        """The dense bias [out]: the parameter, part by part."""
        return by_part(whole, self.num_blocks, self.parts)

    def follow(self, record: Mapping[str, Any]) -> None:
        """Take over whether the output is cut in parts: earlier releases cut it as one, whatever it was."""
        self._order.parts = record.get("parts", 1)

    def record(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the layer that loads it."""
        in_parts = {"parts": self.parts} if self.parts > 1 else {}
        return {**super().record(), "phantom_width": self.phantom_width, **in_parts}

    def shared_record(self) -> dict[str, Any]:
        """What all layers of one model have in common: p."""
        return {"num_blocks": self.num_blocks}

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_blocks={self.num_blocks}, phantom_width={self.phantom_width}, ranks={self.ranks.size}"
            + f", parts={self.parts}"
            * (self.parts > 1)
        )


class _Order:
    """In how many parts a layer's output is cut: one for a layer and its copies, as their checkpoint is one."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __deepcopy__(self, memo: dict[int, Any]) -> _Order:
        return self


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


def _is_transformed() -> bool:
    """Whether torch.func, forward-mode differentiation or a trace is at work, which know operations but not `_Mix`."""
    is_traced = torch._C._get_tracing_state() is not None
    return is_traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _mix(
    x: Tensor,
    ranks: Ranks,
    rows: Rows | None,
    what: str,
    p: int,
    local: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """What `_Mix` computes for one layer, as operations that compilers and transforms know, with any gradient.

    Without gradients it also takes less time for a few tokens, as in decoding: fewer views are made.
    """
    q, held = p // ranks.size, range(p)[ranks.slice_of(p)]
    xs = _features(x, q)
    g_own = torch.bmm(xs, _rows(c, q).mT).transpose(0, 1).flatten(1)
    g = gather_latents(g_own, ranks, rows, what).transpose(0, 1).flatten(1) if ranks.size > 1 else g_own
    z = torch.baddbmm(torch.bmm(xs, _rows(local, q).mT), _of_others(g, held, p), _rows(d, q).mT)
    z = z.transpose(0, 1).flatten(1)
    return z if bias is None else z + bias


class _Mix(torch.autograd.Function):
    """The operator of the module's docstring, for one or more layers that read the same x [T, in/R].

    `factors` holds L, C, D and b (or None) of each layer in turn, and one z [T, out/R] comes back for each. The layers'
    latents travel side by side in one collective. The q blocks of this rank are the batch dimension of every product:
    activations [T, q*w] are seen as [q, T, w], factors [q*rows, w] as [q, rows, w].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ranks: Ranks, rows: Rows | None, what: str, p: int, *factors: Any
    ) -> tuple[Tensor, ...]:
        q, held = p // ranks.size, range(p)[ranks.slice_of(p)]
        layers = [factors[n : n + 4] for n in range(0, len(factors), 4)]
        widths = [c.shape[0] for _, c, _, _ in layers]  # q*k
        xs = _features(x, q)

        g_own = x.new_empty(x.shape[0], sum(widths))
        for (_, c, _, _), g in zip(layers, g_own.split(widths, 1), strict=True):
            torch.bmm(xs, _rows(c, q).mT, out=_features(g, q))
        g_all = ranks.all_gather(g_own, rows, what)

        zs = [x.new_empty(x.shape[0], local.shape[0]) for local, *_ in layers]
        for (local, *_), z in zip(layers, zs, strict=True):
            torch.bmm(xs, _rows(local, q).mT, out=_features(z, q))

        gs = [g.transpose(0, 1).flatten(1) for g in g_all().split(widths, 2)]  # [tokens, p*k]
        for (_, _, d, bias), g, z in zip(layers, gs, zs, strict=True):
            z_blocks = _features(z, q)
            torch.baddbmm(z_blocks, _of_others(g, held, p), _rows(d, q).mT, out=z_blocks)
            if bias is not None:
                z += bias

        ctx.among = ranks, rows, what, p
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *gs, *factors)
        return tuple(zs)

    @staticmethod
    def backward(ctx: Any, *grads_of_z: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, rows, what, p = ctx.among
        q, held = p // ranks.size, range(p)[ranks.slice_of(p)]
        x, *saved = ctx.saved_tensors
        gs, factors = saved[: len(grads_of_z)], saved[len(grads_of_z) :]
        needs_x, _, _, _, _, *needs = ctx.needs_input_grad
        dzs, needs = of_those_read(grads_of_z, needs, factors, x.shape[0])
        if torch.is_grad_enabled():
            return _Mix.differentiable_backward(ctx.among, (x, *factors), (needs_x, *needs), dzs)
        layers = [factors[n : n + 4] for n in range(0, len(factors), 4)]
        widths = [c.shape[0] for _, c, _, _ in layers]
        needs_h = needs_x or any(needs[1::4])
        xs, ds = _features(x, q), [_features(dz, q) for dz in dzs]

        if needs_h:
            hs = [
                _sum_over_others(torch.bmm(d_z, _rows(d, q)), held, p)
                for d_z, (_, _, d, _) in zip(ds, layers, strict=True)
            ]
            h_all = torch.cat([h.unflatten(1, (ranks.size, -1)).transpose(0, 1) for h in hs], dim=2)
            h_own = ranks.reduce_scatter(h_all, rows, f"gradient: {what}")

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
        return (dx, None, None, None, None, *grads)

    @staticmethod
    def differentiable_backward(
        among: Any, inputs: Sequence[Any], needed: Sequence[bool], dzs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The same as operations that have gradients themselves."""

        def mix(x: Tensor, *factors: Any) -> list[Tensor]:
            return [_mix(x, *among, *factors[n : n + 4]) for n in range(0, len(factors), 4)]

        dx, *grads = differentiate(mix, inputs, needed, dzs)
        return (dx, None, None, None, None, *grads)


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
