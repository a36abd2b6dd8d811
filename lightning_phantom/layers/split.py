"""A linear layer whose weights are split over ranks: what phantom and tensor-parallel layers have in common.

What trains, clips, compares and saves a model asks nothing else of a layer than what is defined here.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import to_features
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import LayoutError, PhantomError
from lightning_phantom.layers.activation import Place, ShardedActivation, version_of
from lightning_phantom.layers.dense import is_conv1d, oriented


class SplitLinear(nn.Linear):
    """A linear layer that R ranks hold between them. A subclass makes the parameters and calls `reset_parameters`.

    Outside, a rank has its own tokens with all features; inside, the group's tokens with its own features. A layer
    reads either, and for R > 1 returns the latter as a `ShardedActivation`, which passes for the former everywhere.

    Args:
        in_features: width of the input, all ranks together.
        out_features: width of the output, all ranks together.
        process_group: the ranks; `None`: this process holds all of it.
        dense_class: the kind of layer whose place it takes; dense state dicts are in that one's orientation.

    Attributes:
        kind: what users call such layers.
        method: the name of the strategy that makes them.
        keeps_factors: whether checkpoints need more than the dense weight to restore one.
        split_dims: the dimension along which each parameter is split; those left out are whole on every rank.
        name: full name of the layer in the module that it was put into.
        siblings: the layers that read the same input and so share its exchange, itself among them.
        init_seed: seeds `reset_parameters`; None follows torch's generator.
    """

    kind: ClassVar[str]
    method: ClassVar[str]
    keeps_factors: ClassVar[bool] = False
    split_dims: Mapping[str, int]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup | None,
        dense_class: type[nn.Module],
    ) -> None:
        nn.Module.__init__(self)
        self.ranks = Ranks(process_group)
        self.in_features = in_features
        self.out_features = out_features
        self.dense_class = dense_class
        self.name = ""
        self.siblings: tuple[SplitLinear, ...] = (self,)
        self.init_seed: int | None = None

    parts = 1  # of equal width that the output has, each of which ranks hold between them by itself

    # What a subclass defines

    def factors(self) -> tuple[Tensor | None, ...]:
        """The parameters that it computes with, as many for every layer of the class."""
        raise NotImplementedError

    def alone(self, x: Tensor, factors: Sequence[Any]) -> Tensor:
        """Apply the layer to x [tokens, in] in a process that holds all of it."""
        raise NotImplementedError

    def among(self, layers: Sequence[Any], x: Tensor, rows: Rows, inside: bool, factors: Sequence[Any]) -> list[Tensor]:
        """Apply `layers`, this one and its siblings, where ranks hold them between them.

        Args:
            layers: layers of this class that read x.
            x: the group's tokens [T, in/R] if `inside`, else own tokens [t, in].
            rows: the tokens of each rank.
            inside: see x.
            factors: those of all layers, one layer after the other.

        Returns:
            The output of each layer, [T, out/R] (or, if `leaves`, [t, out]).
        """
        raise NotImplementedError

    @property
    def has_dense_weight(self) -> bool:
        """Whether a dense linear computes the same from the same input."""
        return True

    enters = True  # whether a plain input is to be brought inside for `among`
    leaves = False  # whether the output is in token layout

    def local_state(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """This rank's parameters, by name, for a dense weight [out, in], as near as can be, and bias [out]."""
        raise NotImplementedError

    def dense_from(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight [out, in] that whole parameters, given by name, stand for."""
        raise NotImplementedError

    def bias_from(self, whole: Tensor) -> Tensor:
        """The dense bias [out] that the whole parameter stands for."""
        return whole

    def take_over(self, record: Mapping[str, Any]) -> None:
        """Read parameters as those of a checkpoint's record are to be read, where it leaves a choice."""

    def record(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the layer that loads it."""
        turned = {"transposed": True} if is_conv1d(self.dense_class) else {}
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **turned,
        }

    def shared_record(self) -> dict[str, Any]:
        """What all layers of one model have in common, for a checkpoint to agree on."""
        return {}

    # What all have in common

    def split_of(self, name: str) -> Split | None:
        """How the parameter `name` is split; None if every rank holds it whole."""
        dim = self.split_dims.get(name)
        return None if dim is None else Split(self.ranks, dim)

    def share_of(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share of the whole parameter `name`."""
        split = self.split_of(name)
        return whole if split is None else split.take(whole)

    def global_size(self) -> int:
        """The number of its weights, all ranks together."""
        splits = ((p, self.split_of(name)) for name, p in self.named_parameters(recurse=False))
        return sum(p.numel() if split is None else math.prod(split.whole_shape(p)) for p, split in splits)

    @torch.no_grad()
    def global_tensor(self, name: str) -> Tensor:
        """Return the parameter `name` of all ranks together; collective when R > 1."""
        split, mine = self.split_of(name), self.get_parameter(name).detach()
        return mine.clone() if split is None else split.gather(mine)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Return the dense weight [out, in] of the same linear map; collective when R > 1."""
        names = [name for name, _ in self.named_parameters(recurse=False) if name != "bias"]
        return self.dense_from({name: self.global_tensor(name) for name in names})

    @torch.no_grad()
    def load_dense(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Take over a dense weight [out, in], as near as can be, and bias [out], exactly; collective when R > 1."""
        weight = None if weight is None else weight.to(self.weight.device)
        for name, tensor in self.local_state(weight, None if self.bias is None else bias).items():
            self.get_parameter(name).copy_(tensor)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if input.shape[-1] != self.in_features:
            raise LayoutError(
                f"{self.name or type(self).__name__}: the input is {list(input.shape)}, but its last size must be "
                f"in_features={self.in_features}."
            )
        if self.ranks.size == 1:
            x, factors = cast(input, self.factors())
            rows = math.prod(input.shape[:-1])  # `numel` would fix a batch of any size to that of a trace
            return self.alone(x.reshape(rows, input.shape[-1]), factors).reshape(*input.shape[:-1], self.out_features)
        # Collectives do not compile; what one process holds does.
        return self._uncompiled(input) if torch.compiler.is_compiling() else self._among_ranks(input)

    def _among_ranks(self, input: Tensor) -> Tensor:
        if isinstance(input, ShardedActivation):
            input.settle()
            input = input.whole(self.name) if input.local is None or input.place.parts > 1 else input
        last: Last | None = self.ranks.agreement.last
        if last is None or not last.is_of(input):
            last = self._read(input)
        z, versions = last.outputs.pop(self, (None, ()))
        if z is None or versions != self._versions():
            layers = () if last.outputs else tuple(layer for layer in self.siblings if layer is not self)
            layers = (self, *layers)
            x, factors = cast(last.x, [t for layer in layers for t in layer.factors()])
            z, *others = self.among(layers, x, last.rows, last.inside, factors)
            for layer, output in zip(layers[1:], others, strict=True):
                last.outputs[layer] = output, layer._versions()
        shape = (*input.shape[:-1], self.out_features)
        if self.leaves:
            return z.reshape(shape)
        return ShardedActivation.wrap(z, shape, Place(self.ranks, last.rows, self.name, self.parts))

    def _read(self, input: Tensor) -> Last:
        """Bring an input inside, and remember it for the layers that read it next."""
        if isinstance(input, ShardedActivation) and input.place.ranks.process_group is self.ranks.process_group:
            assert input.local is not None
            x, rows, inside = input.local, input.place.rows, True
        else:
            plain = input.whole(self.name) if isinstance(input, ShardedActivation) else input
            n = plain.shape[:-1].numel()
            x = cast(plain, ())[0].reshape(n, self.in_features)
            rows = self.ranks.agreement.enter(self.name, n, f"{x.shape[1]} {x.dtype}")
            if self.enters:
                x = to_features(x, self.ranks, rows, f"entry of {self.name!r}")
            inside = self.enters
        last = Last(weakref.ref(input, self._forget), version_of(input), _mode(input), x, rows, inside)
        self.ranks.agreement.last = last
        return last

    def _versions(self) -> tuple[object, ...]:
        return tuple((version_of(t), t.requires_grad) for t in self.factors() if t is not None)

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        last = self.ranks.agreement.last
        if last is not None and last.input is reference:
            self.ranks.agreement.last = None

    _uncompiled = torch.compiler.disable(_among_ranks)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        own = [name for name, _ in self.named_parameters(recurse=False) if name not in ("weight", "bias")]
        if (
            isinstance(weight, Tensor)
            and weight.dim() == 2
            and not any(f"{prefix}{name}" in state_dict for name in own)
        ):
            weight = oriented(weight, self.dense_class)
            if tuple(weight.shape) == (self.out_features, self.in_features):
                with torch.no_grad():
                    local = self.local_state(weight.to(self.weight.device), state_dict.get(f"{prefix}bias"))
                state_dict = {**state_dict, **{f"{prefix}{name}": tensor for name, tensor in local.items()}}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# torch's activation checkpoint wrapper puts this into module names and takes it out of the keys of state dicts.
_LEFT_OUT_OF_KEYS = "_checkpoint_wrapped_module."


def split_layers(module: nn.Module) -> dict[str, SplitLinear]:
    """The layers of a module that ranks hold between them, by name as the keys of its state dict have it."""
    return {key_of(name): m for name, m in module.named_modules() if isinstance(m, SplitLinear)}


def any_layer(module: nn.Module) -> SplitLinear:
    """One of the layers of a module that ranks hold between them: all are of one kind.

    Raises:
        PhantomError: it has none.
    """
    for layer in split_layers(module).values():
        return layer
    raise PhantomError(
        f"{type(module).__name__} holds no layers that are split over ranks: phantomize_ or a strategy makes them."
    )


def key_of(name: str) -> str:
    """The key in a state dict of what `named_modules` and `named_parameters` call `name`."""
    return name.replace(_LEFT_OUT_OF_KEYS, "")


def sharded_parameters(module: nn.Module) -> dict[int, Split]:
    """The parameters of which this rank holds a share, by `id`, with how they are split."""
    found = {}
    for layer in split_layers(module).values():
        for name, parameter in layer.named_parameters(recurse=False):
            split = layer.split_of(name)
            if split is not None:
                found[id(parameter)] = split
    return found


@dataclass(frozen=True)
class Last:
    """The input that layers of a group have read last, so that others that read it too need no exchange of their own.

    Attributes:
        input: what was read.
        version: of the input, when it was read.
        mode: under which it was read.
        x: [T, in/R] if `inside`, else [t, in].
        rows: the tokens of each rank.
        inside: see x.
        outputs: of siblings that were computed together and have not been called yet, with their weights' versions.
    """

    input: weakref.ref[Tensor]
    version: int | None
    mode: tuple[object, ...]
    x: Tensor
    rows: Rows
    inside: bool
    outputs: dict[SplitLinear, tuple[Tensor, tuple[object, ...]]] = field(default_factory=dict)

    def is_of(self, input: Tensor) -> bool:
        """Whether `input` is the one that was read, unchanged, and would be read alike now."""
        return self.input() is input and self.version == version_of(input) and self.mode == _mode(input)


def _mode(x: Tensor) -> tuple[object, ...]:
    """What decides how an input is read: autograd, autocast, and whether a checkpoint is being recomputed."""
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    return torch.is_grad_enabled(), x.requires_grad, autocast, torch._C._current_graph_task_id()


def cast(x: Tensor, factors: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """Bring x and the factors to autocast's type, where it is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(factors)
    dtype = torch.get_autocast_dtype(x.device.type)
    x, *cast = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *factors))
    return x, cast


def of_those_read(
    dzs: Sequence[Tensor | None], needs: Sequence[bool], factors: Sequence[Any], rows: int
) -> tuple[list[Tensor], list[bool]]:
    """The gradients [rows, out] of layers' outputs, 0 for what nobody has read, and which factors need one: not those.

    `factors` holds as many for each layer, its weight [out, ...] first.
    """
    each = len(factors) // len(dzs)
    given = [
        weight.new_zeros(rows, weight.shape[0]) if dz is None else dz
        for dz, weight in zip(dzs, factors[::each], strict=True)
    ]
    return given, [need and dzs[n // each] is not None for n, need in enumerate(needs)]
