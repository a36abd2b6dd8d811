"""What the members of a proven chain share: where their sharded layout holds, and one gather for a gated pair."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_phantom.distributed.comm import Ranks
from lightning_phantom.errors import LayoutError


class _Kept(NamedTuple):
    """A sibling's output, with what it was computed from."""

    x: Tensor
    modes: tuple[object, ...]
    output: Tensor


class Chain:
    """A chain of layers that hand sharded activations to each other inside the forward of one module, the owner.

    The proof of a chain covers the owner's own forward and nothing else, so a member called elsewhere raises
    instead of reading a replicated activation as a sharded one. So does one called in a part of that forward that could
    not be traced.

    Args:
        owner: name of the module whose forward was proven.
        members: names of the chain's linears, in the order of the forward.
    """

    def __init__(self, owner: str, members: tuple[str, ...]) -> None:
        self.owner = owner
        self.members = members
        self._running: list[bool] = []
        self._kept: dict[str, _Kept] = {}
        self._calls: dict[int, int] = {}

    def attach(self, owner: nn.Module, opaque: Sequence[nn.Module] = ()) -> None:
        """Follow the forward of `owner` from now on.

        Args:
            owner: the module whose forward was proven.
            opaque: the modules it calls that could not be traced.
        """
        self._handles = [
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._leave, always_call=True),
        ]
        for module in opaque:
            self._handles += [
                module.register_forward_pre_hook(self._pause),
                module.register_forward_hook(self._resume, always_call=True),
            ]

    def detach(self) -> None:
        """Stop following the owner's forward."""
        for handle in self._handles:
            handle.remove()

    @property
    def running(self) -> bool:
        """Whether the owner's own forward is running."""
        return bool(self._running) and self._running[-1]

    def count_call(self, module: nn.Module) -> int | None:
        """Return how often `module` was called before in this forward of the owner; None outside it."""
        if not self.running:
            return None
        call = self._calls.get(id(module), 0)
        self._calls[id(module)] = call + 1
        return call

    def require_running(self, member: str) -> None:
        """Raise LayoutError unless the owner's own forward is running."""
        if not self.running:
            owner = self.owner or "the root module"
            raise LayoutError(
                f"{member!r} was called outside the forward of {owner!r}. Its activations are sharded between "
                f"{', '.join(map(repr, self.members))}, which holds only inside that forward. Call {owner!r} itself, "
                f"or keep the layer dense with plan={{..., {member!r}: 'skip'}}."
            )

    def keep(self, member: str, x: Tensor, output: Tensor) -> None:
        """Store what `member` will return for `x`, computed together with its sibling."""
        self._kept[member] = _Kept(x, _modes(x), output)

    def take(self, member: str, x: Tensor) -> Tensor | None:
        """Return what was kept for `member`, if `x` is the very tensor it was computed from, under the same modes."""
        kept = self._kept.pop(member, None)
        return kept.output if kept is not None and kept.x is x and kept.modes == _modes(x) else None

    def _enter(self, owner: nn.Module, args: Any) -> None:
        # Lightning sends training_step through the root's __call__ by replacing its forward for that one call.
        self._running.append(runs_own_forward(owner))
        self._calls.clear()

    def _leave(self, owner: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        self._kept.clear()

    def _pause(self, module: nn.Module, args: Any) -> None:
        self._running.append(False)

    def _resume(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class, not one set on the instance."""
    return getattr(module.forward, "__func__", None) is type(module).forward


def _modes(x: Tensor) -> tuple[object, ...]:
    """What the result depends on beside the tensor's identity; its version counts the writes into it."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    version = None if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), autocast


class ShardedDropout(nn.Dropout):
    """The nn.Dropout between members of chains: each block has its own mask, the same for any number of ranks.

    Per call one int64 is drawn from the default CPU generator, on every rank alike, so the ranks' generators stay in
    step; block i's mask comes from a generator seeded by that draw and i. Input and output: `[..., width / R]`. The
    same module may also be called where activations are replicated; there it is nn.Dropout.

    Args:
        dropout: the module to stand in for.
        calls: the chains it lies in, each with one flag per call in its owner's forward: is the input sharded?
        num_blocks: p.
        ranks: the ranks that share the activation.
    """

    def __init__(
        self,
        dropout: nn.Dropout,
        calls: Sequence[tuple[Chain, tuple[bool, ...]]],
        num_blocks: int,
        ranks: Ranks,
    ) -> None:
        super().__init__(dropout.p, dropout.inplace)
        self.train(dropout.training)
        self.calls = tuple(calls)
        self.num_blocks = num_blocks
        self.ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        """Zero each feature with probability `p` and scale the others by `1 / (1 - p)`, in training mode only."""
        if not self.training:
            return input
        # Generators do not compile.
        return self._uncompiled(input) if torch.compiler.is_compiling() else self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        counted = [(flags, chain.count_call(self)) for chain, flags in self.calls]
        if not any(flags[call] for flags, call in counted if call is not None):
            return super().forward(input)
        if self.p == 0:
            return input
        draw = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
        if self.p == 1:
            return input * 0
        held = range(self.num_blocks)[self.ranks.slice_of(self.num_blocks)]
        masks = [
            torch.empty_like(part).bernoulli_(1 - self.p, generator=_generator(draw, i, input.device))
            for i, part in zip(held, input.detach().chunk(len(held), dim=-1), strict=True)
        ]
        return input * torch.cat(masks, dim=-1).div_(1 - self.p)

    _uncompiled = torch.compiler.disable(_forward)


def _generator(draw: int, block: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{draw}/{block}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))
