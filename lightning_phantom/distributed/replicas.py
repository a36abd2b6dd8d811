"""Finds ranks that have drifted apart before their training is worth nothing.

All ranks must hold the same replicated parameters, and in prediction those of a group must read the same batches. A
digest of fixed size is gathered, so that unequal structures cannot hang the check; only when digests differ are entries
compared by name.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_phantom.distributed.comm import gather_objects
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError

FIRST_BATCHES = 2  # of each kind (training, validation, ...) in a run
EVERY_STEPS = 1000  # training steps between checks of the parameters
RELATIVE_TOLERANCE = 1e-3  # on accelerators, where atomics leave the last bits to chance


class ReplicaCheck:
    """Compares replicated parameters over all ranks, and batches over a group's.

    Args:
        world: all ranks.
        group: those that hold each layer between them.
    """

    def __init__(self, world: Ranks, group: Ranks) -> None:
        self._world = world
        self._group = group
        self._batches: Counter[str] = Counter()
        self._steps = 0

    def restart(self) -> None:
        """Look at the first batches again, as after a resume."""
        self._batches.clear()
        self._steps = 0

    def batch(self, kind: str, batch: Any) -> None:
        """Compare one of the first batches of a kind.

        Raises:
            PhantomError: on every rank, naming the entry and the ranks that differ.
        """
        if self._group.size == 1 or self._batches[kind] >= FIRST_BATCHES:
            return
        self._batches[kind] += 1
        leaves, _ = tree_flatten_with_path(batch)
        entries = [(f"batch{keystr(path)}", _exact(leaf)) for path, leaf in leaves]
        self._compare(
            entries,
            f"the ranks of one phantom group got different {kind} batches. In {kind} they must load the same "
            f"samples in the same order: let your own sampler use trainer.distributed_sampler_kwargs",
            self._group,
        )

    def step(self, module: nn.Module, sharded: Collection[int]) -> None:
        """Compare the replicated parameters before some training steps: the first ones, then every thousandth.

        Args:
            module: the module that is trained.
            sharded: ids of the parameters of which each rank holds its own share.

        Raises:
            PhantomError: on every rank, naming the parameter and the ranks that differ.
        """
        due = self._steps < FIRST_BATCHES or self._steps % EVERY_STEPS == 0
        self._steps += 1
        if due and self._world.size > 1:
            self.parameters(module, sharded)

    def parameters(self, module: nn.Module, sharded: Collection[int]) -> None:
        """Compare the replicated parameters, all but those with the `sharded` ids, now."""
        held = [(name, p) for name, p in module.named_parameters() if id(p) not in sharded]
        message = (
            "the ranks hold different values of a parameter that they should share. Something in "
            "training_step or an optimizer hook depends on the rank or on an unseeded generator"
        )
        if all(p.device.type == "cpu" for _, p in held):
            self._compare([(name, _exact(p)) for name, p in held], message, self._world)
        else:
            self._compare_closely(held, message)

    def _compare(self, entries: list[tuple[str, str]], message: str, ranks: Ranks) -> None:
        digest = hashlib.blake2b(repr(entries).encode(), digest_size=8).digest()
        mine = torch.tensor([int.from_bytes(digest, "little", signed=True)])
        if len(set(_gather(mine, ranks)[:, 0].tolist())) == 1:
            return
        everyone = gather_objects(dict(entries), ranks.group)
        for name in dict.fromkeys(name for entries in everyone for name in entries):
            values = [entries.get(name) for entries in everyone]
            if len(set(values)) > 1:
                raise PhantomError(f"{message}. First difference: {name!r}, {_who(values, ranks)}.")

    def _compare_closely(self, held: Sequence[tuple[str, Tensor]], message: str) -> None:
        sums = [(p.detach().double().sum(), p.detach().double().abs().sum()) for _, p in held]
        mine = torch.stack([torch.stack(pair) for pair in sums]).cpu()
        everyone = _gather(mine.flatten(), self._world).view(self._world.size, -1, 2)
        for n, (name, _) in enumerate(held):
            spread = everyone[:, n].amax(0) - everyone[:, n].amin(0)
            if bool((spread > RELATIVE_TOLERANCE * everyone[:, n, 1].amax()).any()):
                raise PhantomError(
                    f"{message}. First difference: {name!r}, sums {everyone[:, n, 0].tolist()} on ranks "
                    f"{_global_ranks(self._world)}."
                )


def _gather(mine: Tensor, ranks: Ranks) -> Tensor:
    return ranks.gather_shards(mine.unsqueeze(0)).flatten(0, 1).cpu()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in what Python says of an object that says nothing of itself


def _exact(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {_ADDRESS.sub('', repr(leaf))}"[:200]
    data = leaf.detach().cpu().contiguous()
    if data.is_sparse or data.layout != torch.strided:
        data = data.to_dense()
    raw = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b""
    return f"{leaf.dtype} {list(leaf.shape)} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def _global_ranks(ranks: Ranks) -> list[int]:
    return [dist.get_global_rank(ranks.group, r) for r in range(ranks.size)]


def _who(values: Iterable[Any], ranks: Ranks) -> str:
    """Group the ranks that agree: "ranks [0, 1] against [2]"."""
    camps: dict[Any, list[int]] = {}
    for rank, value in zip(_global_ranks(ranks), values, strict=True):
        camps.setdefault(value, []).append(rank)
    return "ranks " + " against ".join(map(str, camps.values()))
