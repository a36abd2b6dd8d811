"""A linear layer whose weights are split over ranks: what phantom and tensor-parallel layers have in common.

What trains, clips, compares and saves a model asks nothing else of a layer than what is defined here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_phantom.distributed.comm import Ranks
from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import LayoutError, PhantomError
from lightning_phantom.layers.chain import Chain
from lightning_phantom.layers.dense import is_conv1d, oriented

LAYOUTS = ("replicated", "sharded")


class SplitLinear(nn.Linear):
    """A linear layer that R ranks hold between them. A subclass makes the parameters and calls `reset_parameters`.

    Args:
        in_features: width of the input, all ranks together.
        out_features: width of the output, all ranks together.
        process_group: the ranks; `None`: this process holds all of it.
        input_layout: `"replicated"`, input [..., in], or `"sharded"`, input [..., in/R].
        output_layout: `"replicated"`, output [..., out], or `"sharded"`, output [..., out/R].
        dense_class: the kind of layer whose place it takes; dense state dicts are in that one's orientation.

    Attributes:
        method: the name of the strategy that makes such layers.
        kind: what such layers are called in messages.
        keeps_factors: whether a checkpoint needs the parameters beside the dense weight, which alone restores less.
        split_dims: the dimension along which each parameter is split; those left out are whole on every rank.
        name: full name of the layer in the module that it was put into.
        chain: the chain it is a member of.
        siblings: the layers that read the same input and so share its collectives, itself first.
        init_seed: seeds `reset_parameters`; None follows torch's generator.
    """

    method: ClassVar[str]
    kind: ClassVar[str]
    keeps_factors: ClassVar[bool]
    split_dims: Mapping[str, int]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: ProcessGroup | None,
        input_layout: str,
        output_layout: str,
        dense_class: type[nn.Module],
    ) -> None:
        nn.Module.__init__(self)
        for layout in (input_layout, output_layout):
            if layout not in LAYOUTS:
                raise PhantomError(f"layout {layout!r}: choose 'replicated' or 'sharded'.")
        self.ranks = Ranks(process_group)
        self.in_features = in_features
        self.out_features = out_features
        self.input_layout = input_layout
        self.output_layout = output_layout
        self.dense_class = dense_class
        self.name = ""
        self.chain: Chain | None = None
        self.siblings: tuple[SplitLinear, ...] = (self,)
        self.init_seed: int | None = None

    # What a subclass defines

    def factors(self) -> tuple[Tensor | None, ...]:
        """The parameters that `compute` takes, as many for every layer of the class."""
        raise NotImplementedError

    def compute(self, layers: Sequence[Any], x: Tensor, factors: Sequence[Any]) -> Sequence[Tensor]:
        """Apply `layers`, this one and its siblings, to x [tokens, width].

        Args:
            layers: layers of this class that read x.
            x: in the layers' input layout.
            factors: those of all layers, one layer after the other.

        Returns:
            The output of each layer, [tokens, width], in its output layout.
        """
        raise NotImplementedError

    def local_state(self, weight: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """This rank's parameters, by name, for a dense weight [out, in], as near as can be, and bias [out]."""
        raise NotImplementedError

    def dense_from(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The dense weight [out, in] that whole parameters, given by name, stand for."""
        raise NotImplementedError

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
        """What a checkpoint says once for all layers of a model."""
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
        """Map [..., in] to [..., out], or this rank's share of either where the layout is sharded."""
        if not torch.compiler.is_compiling():
            return self._forward(input)
        # Collectives do not compile. A layer that one process holds does; and as the two layouts are the same there, a
        # chain's guard has nothing to guard.
        return self._uncompiled(input) if self.ranks.size > 1 else _run((self,), input)[0]

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


def _run(layers: tuple[SplitLinear, ...], x: Tensor) -> list[Tensor]:
    """Apply layers that read the same input, with one collective each way for all of them."""
    first = layers[0]
    width = first.in_features // (first.ranks.size if first.input_layout == "sharded" else 1)
    if x.shape[-1] != width:
        raise LayoutError(
            f"{first.name or type(first).__name__}: the input is {list(x.shape)}, but its last size must be {width} "
            f"(in_features={first.in_features}, {first.input_layout}, {first.ranks.size} ranks)."
        )
    factors: list[Any] = [t for layer in layers for t in layer.factors()]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *factors = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *factors))
    outputs = first.compute(layers, x.reshape(-1, width), factors)
    return [z.reshape(*x.shape[:-1], z.shape[-1]) for z in outputs]
