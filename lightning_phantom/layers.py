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

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_phantom.chain import Chain
from lightning_phantom.comm import Ranks, gather, scatter
from lightning_phantom.config import check_phantom_width, is_int, resolve_phantom_width
from lightning_phantom.convert import Blocks, Factors, from_dense, random_bias, random_factors, to_dense
from lightning_phantom.errors import LayoutError, PhantomError

LAYOUTS = ("replicated", "sharded")


class PhantomLinear(nn.Linear):
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
        device: where the parameters live. On the meta device nothing is allocated.
        dtype: type of the parameters.

    Raises:
        PhantomError: sizes that do not divide, or an unknown layout.

    Example:
        >>> layer = PhantomLinear(64, 32, num_blocks=4, phantom_width=2)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.ranks = Ranks(process_group)
        _check_sizes(in_features, out_features, num_blocks, self.ranks.size)
        check_phantom_width(phantom_width)
        for layout in (input_layout, output_layout):
            if layout not in LAYOUTS:
                raise PhantomError(f"layout {layout!r}: choose 'replicated' or 'sharded'.")
        self.in_features = in_features
        self.out_features = out_features
        self.num_blocks = num_blocks
        self.phantom_width = resolve_phantom_width(phantom_width, in_features, out_features, num_blocks)
        self.input_layout = input_layout
        self.output_layout = output_layout

        # Set when the layer becomes a member of a chain, or one of a gated pair.
        self.name = ""
        self.chain: Chain | None = None
        self.siblings: tuple[PhantomLinear, ...] = (self,)
        self.init_seed: int | None = None

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
    def load_dense(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take over a dense weight [out, in] (approximated) and bias [out] (exactly); collective when R > 1."""
        if weight is not None:
            self.load_factors(from_dense(weight.to(self.weight.device), self.blocks, self.ranks))
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias[self.ranks.slice_of(self.out_features)])

    @torch.no_grad()
    def global_tensor(self, name: str) -> Tensor:
        """Return the parameter `name` of all ranks, stacked along dim 0; collective when R > 1."""
        return self.ranks.all_gather(self.get_parameter(name).detach())().flatten(0, 1)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Return the dense weight [out, in] of the same linear map; collective when R > 1."""
        names = ("weight", "compressor_weight", "decompressor_weight")
        return to_dense(Factors(*map(self.global_tensor, names)), self.num_blocks)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out], or this rank's share of either where the layout is sharded."""
        if not torch.compiler.is_compiling():
            return self._forward(input)
        # Collectives do not compile. A layer that one process holds does, as plain products; on one process the two
        # layouts are the same, so a chain's guard has nothing to guard.
        return self._uncompiled(input) if self.ranks.size > 1 else self._traced(input)

    def _traced(self, input: Tensor) -> Tensor:
        _check_width(self, input)
        x, *factors = _autocast(input, self.factors())
        return _plain(x.reshape(-1, self.in_features), self.num_blocks, *factors).unflatten(0, input.shape[:-1])

    def _forward(self, input: Tensor) -> Tensor:
        if self.chain is None:
            return _run((self,), input)[0]
        self.chain.require_running(self.name)
        kept = self.chain.take(self.name, input)
        if kept is not None:
            return kept
        mine, *others = _run(self.siblings, input)
        for sibling, output in zip(self.siblings[1:], others, strict=True):
            self.chain.keep(sibling.name, input, output)
        return mine

    _uncompiled = torch.compiler.disable(_forward)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_blocks={self.num_blocks}, phantom_width={self.phantom_width}, ranks={self.ranks.size}, "
            f"{self.input_layout} -> {self.output_layout}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        dense = isinstance(weight, Tensor) and tuple(weight.shape) == (self.out_features, self.in_features)
        if weight is not None and dense and f"{prefix}compressor_weight" not in state_dict:
            state_dict = {**state_dict, **self._factored(weight, state_dict.get(f"{prefix}bias"), prefix)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def _factored(self, weight: Tensor, bias: Tensor | None, prefix: str) -> dict[str, Tensor]:
        factors = from_dense(weight.to(self.weight.device), self.blocks, self.ranks)
        state: dict[str, Tensor] = {
            f"{prefix}weight": factors.weight,
            f"{prefix}compressor_weight": factors.compressor,
            f"{prefix}decompressor_weight": factors.decompressor,
        }
        if bias is not None:
            state[f"{prefix}bias"] = bias[self.ranks.slice_of(self.out_features)]
        return state


# torch's activation checkpoint wrapper puts this into module names and takes it out of the keys of state dicts.
_LEFT_OUT_OF_KEYS = "_checkpoint_wrapped_module."


def phantom_layers(module: nn.Module) -> dict[str, PhantomLinear]:
    """The phantom layers of a module, by name as the keys of its state dict have it."""
    named = module.named_modules()
    return {name.replace(_LEFT_OUT_OF_KEYS, ""): m for name, m in named if isinstance(m, PhantomLinear)}


def sharded_parameters(module: nn.Module) -> dict[int, Ranks]:
    """The parameters of which this rank holds a share, by `id`, with the ranks that hold the others."""
    return {id(p): layer.ranks for layer in phantom_layers(module).values() for p in layer.parameters(recurse=False)}


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


def _run(layers: tuple[PhantomLinear, ...], x: Tensor) -> list[Tensor]:
    """Apply layers that read the same input, with one collective each way for all of them."""
    first = layers[0]
    sharded = first.input_layout == "sharded"
    width = _check_width(first, x)
    x, *factors = _autocast(x, [f for layer in layers for f in layer.factors()])
    flat = x.reshape(-1, width)
    if not sharded:
        flat = scatter(flat, first.ranks)
    outputs = _Mix.apply(flat, first.ranks, first.num_blocks, *factors)
    outputs = [
        gather(z, layer.ranks) if layer.output_layout == "replicated" else z
        for layer, z in zip(layers, outputs, strict=True)
    ]
    return [z.reshape(*x.shape[:-1], z.shape[-1]) for z in outputs]


def _check_width(layer: PhantomLinear, x: Tensor) -> int:
    """Return the width of the layer's input on this rank, once `x` is seen to have it."""
    sharded = layer.input_layout == "sharded"
    width = layer.in_features // layer.ranks.size if sharded else layer.in_features
    if x.shape[-1] != width:
        raise LayoutError(
            f"{layer.name or type(layer).__name__}: the input is {list(x.shape)}, but its last size must be {width} "
            f"(in_features={layer.in_features}, {layer.input_layout}, {layer.ranks.size} ranks)."
        )
    return width


def _autocast(x: Tensor, factors: Iterable[Tensor | None]) -> list[Any]:
    """The input and the factors in the type that autocast asks for."""
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *factors]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *factors)]


def _plain(x: Tensor, p: int, local: Tensor, c: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """What `_Mix` computes for one layer on one process, as operations that autograd and compilers know."""
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
