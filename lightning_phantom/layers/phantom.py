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

Siblings, by how blocks mix and by which latents a layer reads (g' are those of the layer before it in its chain):

| | z_i = L_i x_i + b_i and | |
|---|---|---|
| `mixing="private"` | sum over j != i of D_ij (C_ij x_j) | C_ij [k, m_in]; C [p*(p-1)*k, in/p] (`private`) |
| `latents="both"` | sum over j != i of D_ij g_j + E_ij g'_j | E_ij [m_out, k'] in `decompressor_before_weight` |
| `latents="previous"` | sum over j != i of D_ij (C_j x'_j) | x' is what the layer before has read; C_j [k, in'/p] |

The latents g' are there already, and cost no bytes: E^T d joins the h of the layer before. Those of x' leave when the
layer before starts, and are read when this one has done its product with L; their gradient leaves when this one's
backward starts, and is read when that of the layer before has done its products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_phantom.config import check_mixing, check_phantom_width, resolve_phantom_width
from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.chain import Letter, Mailbox, check_predecessor, mode
from lightning_phantom.layers.cut import Cut, check_cut
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
from lightning_phantom.layers.mixing import MIXINGS
from lightning_phantom.layers.operator import Call, Message, Mix, Part, mix
from lightning_phantom.layers.split import SplitLinear, cast, key_of
from lightning_phantom.layers.twice import is_transformed

FACTORS = ("weight", "compressor_weight", "decompressor_weight", "decompressor_before_weight")


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
        mixing: `"pairwise"` or `"private"`, as in `PhantomConfig`.
        latents: `"own"`, `"both"` or `"previous"`, as in `PhantomConfig`; but for the first it has a predecessor.
        predecessor: the layer whose latents, or the latents of whose input, it reads. That one is called before it.
        process_group: the ranks that hold the layer between them; `None`: this process holds all of it.
        dense_class: the kind of layer that it stands for; dense state dicts are in that one's orientation.
        parts: 2 where the output is a gate and what it gates, side by side: block i then has features i of each part.
        device: where the parameters live. On the meta device nothing is allocated.
        dtype: type of the parameters.

    Raises:
        PhantomError: sizes that do not divide, or a predecessor that is missing or of no use.

    Examples:
        >>> layer = PhantomLinear(64, 32, num_blocks=4, phantom_width=2)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
    """

    kind = method = "phantom"
    keeps_factors = True
    split_dims: Mapping[str, int] = dict.fromkeys(("weight", "compressor_weight", "decompressor_weight", "bias"), 0)

    compressor_weight: nn.Parameter
    decompressor_weight: nn.Parameter
    decompressor_before_weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        phantom_width: int | float,
        bias: bool = True,
        *,
        mixing: str = "pairwise",
        latents: str = "own",
        predecessor: PhantomLinear | None = None,
        process_group: ProcessGroup | None = None,
        dense_class: type[nn.Module] = nn.Linear,
        parts: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, process_group, dense_class)
        check_cut(in_features, out_features, num_blocks, self.ranks.size)
        if out_features % (num_blocks * parts):
            raise PhantomError(f"parts={parts} of {out_features} features do not divide into num_blocks={num_blocks}.")
        self._order = _Order(parts)
        check_phantom_width(phantom_width)
        check_mixing(mixing, latents)
        check_predecessor(predecessor, latents, num_blocks, mixing, process_group)
        self.num_blocks = num_blocks
        self.mixing, self.latents = mixing, latents
        self.phantom_width = resolve_phantom_width(phantom_width, in_features, out_features, num_blocks, mixing)
        # In tuples: they are no modules of this one.
        self.predecessor: tuple[PhantomLinear, ...] = ()
        self.followers: tuple[PhantomLinear, ...] = ()
        self.mailbox = Mailbox()
        self.in_before = self.width_before = 0
        if predecessor is not None:
            self.follow(predecessor)

        held, out_here = num_blocks // self.ranks.size, out_features // self.ranks.size
        rows, width = self.blocks.compressor_shape

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_here, in_features // num_blocks)
        self.compressor_weight = parameter(held * rows, width)
        self.decompressor_weight = parameter(out_here, (num_blocks - 1) * self.phantom_width)
        if self.width_before:
            self.decompressor_before_weight = parameter(out_here, (num_blocks - 1) * self.width_before)
            self.split_dims = {**self.split_dims, "decompressor_before_weight": 0}
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
        sizes = self.in_features, self.out_features, self.num_blocks, self.phantom_width
        return Blocks(*sizes, seed, self.name, self.mixing, self.in_before, self.width_before)

    def follow(self, predecessor: PhantomLinear) -> None:
        """Read what `predecessor` leaves for it; a layer follows one other."""
        for before in self.predecessor:
            before.followers = tuple(layer for layer in before.followers if layer is not self)
        self.predecessor = (predecessor,)
        self.in_before = predecessor.in_features if self.latents == "previous" else 0
        self.width_before = predecessor.phantom_width if self.latents == "both" else 0
        predecessor.followers = (*predecessor.followers, self)

    def factors(self) -> tuple[Tensor | None, ...]:
        """This rank's L, C, D, b and E."""
        before = self.decompressor_before_weight if self.width_before else None
        return self.weight, self.compressor_weight, self.decompressor_weight, self.bias, before

    def alone(self, x: Tensor, factors: Sequence[Any]) -> Tensor:
        """Apply the layer to x [tokens, in] in a process that holds all of it."""
        return self._mix([self], x, None, factors)[0]

    def _by_part(self, z: Tensor) -> Tensor:
        """Z [tokens, out/R], block by block -> part by part."""
        q = self.num_blocks // self.ranks.size
        return z if self.parts == 1 or q == 1 else z.unflatten(1, (q, self.parts, -1)).transpose(1, 2).flatten(1)

    def among(
        self, layers: Sequence[PhantomLinear], x: Tensor, rows: Rows, inside: bool, factors: Sequence[Any]
    ) -> list[Tensor]:
        """Apply `layers` to x [T, in/R]; see `SplitLinear`."""
        return self._mix(layers, x, rows, factors)

    def _mix(
        self, layers: Sequence[PhantomLinear], x: Tensor, rows: Rows | None, factors: Sequence[Any]
    ) -> list[Tensor]:
        counts = (x.shape[0],) if rows is None else rows.counts
        each = len(factors) // len(layers)
        letters = [layer._letter(counts, x.dtype) for layer in layers]
        parts = [
            layer._part(factors[n * each : (n + 1) * each], letter)
            for n, (layer, letter) in enumerate(zip(layers, letters, strict=True))
        ]
        followers = [(n, follower) for n, layer in enumerate(layers) for follower in layer.followers]
        asking = [follower for _, follower in followers if follower.in_before]  # for latents of x
        call = Call(
            Cut(self.num_blocks, self.ranks),
            MIXINGS[self.mixing],
            rows,
            "" if rows is None else f"latents of {self.name!r}",
            len(layers),
            tuple(None if letter is None else letter.message for letter in letters),
            tuple(Message(None) for _ in asking),
        )
        tensors = [tensor for part in parts for tensor in part]
        tensors += cast(x, [follower.compressor_weight for follower in asking])[1]
        plainly = not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()
        outputs = mix(x, call, *tensors) if rows is None and plainly else Mix.apply(x, call, *tensors)

        made = iter(outputs[len(layers) :])
        own = [None if part.compressor is None else next(made) for part in parts]
        messages = iter(call.asked)
        for n, follower in followers:
            latents, message = (next(made), next(messages)) if follower.in_before else (own[n], None)
            assert latents is not None  # whoever is read beside its follower's own makes latents
            follower.mailbox.letter = Letter(latents, message, counts, mode())
        return [layer._by_part(z) for layer, z in zip(layers, outputs, strict=False)]

    def _letter(self, counts: tuple[int, ...], dtype: torch.dtype) -> Letter | None:
        """What its predecessor has left for it; None without one."""
        for predecessor in self.predecessor:
            return self.mailbox.take(self.name, predecessor.name, counts, dtype)
        return None

    def _part(self, factors: Sequence[Any], letter: Letter | None) -> Part:
        """The tensors that it computes with."""
        weight, compressor, decompressor, bias, before = factors
        if letter is None:
            return Part(weight, compressor, decompressor, bias)
        if self.latents == "both":
            return Part(weight, compressor, decompressor, bias, before, letter.latents)
        return Part(weight, None, None, bias, decompressor, letter.latents)  # C has been read by the predecessor

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
        if factors.decompressor_before is not None:
            self.decompressor_before_weight.copy_(factors.decompressor_before)

    @torch.no_grad()
    def local_state(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """This rank's factors of the best approximation of a dense weight [out, in], and its bias; collective."""
        state: dict[str, Tensor] = {}
        if weight is not None:
            factors = zip(FACTORS, from_dense(self.by_block(weight), self.blocks, self.ranks), strict=True)
            state.update({name: factor for name, factor in factors if factor is not None})
        if bias is not None:
            state["bias"] = self.share_of("bias", self.by_block(bias))
        return state

    def by_block(self, rows: Tensor) -> Tensor:
        """The rows [out, *] of a dense weight or bias, in the order of the blocks."""
        return by_block(rows, self.num_blocks, self.parts)

    def dense_weight(self) -> Tensor:
        """Return the dense weight [out, in] of the same linear map; collective when R > 1.

        Raises:
            PhantomError: there is none, because the layer reads latents of the one before it.
        """
        if not self.has_dense_weight:
            raise PhantomError(
                f"{self.name or type(self).__name__!r} reads latents of {self.predecessor[0].name!r} "
                f"(latents={self.latents!r}): what it computes is no linear map of its input, and no dense weight "
                f"stands for it."
            )
        return super().dense_weight()

    def dense_from(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight [out, in] that the factors of all ranks stand for."""
        dense = to_dense(Factors(*(tensors[name] for name in FACTORS[:3])), self.num_blocks, self.mixing)
        return by_part(dense, self.num_blocks, self.parts)

    def bias_from(self, whole: Tensor) -> Tensor:
        """The dense bias [out]: the parameter, part by part."""
        return by_part(whole, self.num_blocks, self.parts)

    @property
    def has_dense_weight(self) -> bool:
        """Whether a dense linear computes the same from the same input."""
        return not self.predecessor

    def take_over(self, record: Mapping[str, Any]) -> None:
        """Take over whether the output is cut in parts: earlier releases cut it as one, whatever it was."""
        self._order.parts = record.get("parts", 1)

    def record(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the layer that loads it."""
        mixing = {} if self.mixing == "pairwise" else {"mixing": self.mixing}
        before = [key_of(layer.name) for layer in self.predecessor]
        chain = {"latents": self.latents, "predecessor": before[0]} if before else {}
        in_parts = {"parts": self.parts} if self.parts > 1 else {}
        return {**super().record(), "phantom_width": self.phantom_width, **mixing, **chain, **in_parts}

    def shared_record(self) -> dict[str, Any]:
        """What all layers of one model have in common: p."""
        return {"num_blocks": self.num_blocks}

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        mixing = "" if self.mixing == "pairwise" else f"mixing={self.mixing}, "
        latents = f"latents={self.latents} with {self.predecessor[0].name!r}, " if self.predecessor else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_blocks={self.num_blocks}, phantom_width={self.phantom_width}, {mixing}{latents}"
            f"ranks={self.ranks.size}" + f", parts={self.parts}" * (self.parts > 1)
        )


class _Order:
    """In how many parts a layer's output is cut: one for a layer and its copies, as their checkpoint is one."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __deepcopy__(self, memo: dict[int, Any]) -> _Order:
        return self
