"""The two dimensions of a job: groups of R ranks that hold each layer between them, and D such groups."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_phantom.distributed.agreement import agreement_of
from lightning_phantom.distributed.comm import end_quietly
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import PhantomError


class Sizes(NamedTuple):
    """R, D and p of a job; tensor parallelism has p = R."""

    phantom: int
    data_parallel: int
    num_blocks: int


class Mesh(NamedTuple):
    """This process's place in the job: its phantom group (of consecutive ranks) and its data-parallel group.

    Attributes:
        phantom: the ranks that hold each layer between them.
        data_parallel: the ranks, one in each group, that hold the same blocks.
        groups: the process groups of both dimensions, ("data_parallel", "phantom").
    """

    phantom: Ranks
    data_parallel: Ranks
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup]

    @property
    def world(self) -> Ranks:
        """All ranks; each reads its own batches."""
        return Ranks(dist.group.WORLD)

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The same as torch's DeviceMesh, with the dimensions ("data_parallel", "phantom")."""
        world = torch.arange(dist.get_world_size()).view(self.data_parallel.size, -1)
        names = ("data_parallel", "phantom")
        return DeviceMesh.from_group(list(self.groups), device_type, world, mesh_dim_names=names)


def resolve_sizes(phantom_size: int | str, num_blocks: int | None, devices: int, nodes: int) -> Sizes:
    """Settle R, D and p for `nodes` nodes of `devices` ranks each.

    Raises:
        PhantomError: R does not divide the number of ranks or p, or p would be 1.
    """
    if phantom_size == "auto" and num_blocks is not None:
        phantom_size = math.gcd(num_blocks, devices)
    ranks, groups = share_out("phantom_parallel_size", phantom_size, devices, nodes)
    blocks = ranks if num_blocks is None else num_blocks
    if blocks == 1:
        raise PhantomError(
            "num_blocks=None takes the number of ranks in the phantom group, which is 1 here. Set num_blocks (say "
            "num_blocks=4: the model is the same on any number of ranks that divides it; strategy='phantom_4' and "
            "PHANTOM_NUM_BLOCKS=4 in the environment say so, too), or use more devices."
        )
    if blocks % ranks:
        raise PhantomError(
            f"num_blocks={blocks} cannot be shared by phantom_parallel_size={ranks} ranks: the number of ranks must "
            f"divide the number of blocks. Set num_blocks to a multiple of {ranks}, or phantom_parallel_size to "
            f"a divisor of {blocks}."
        )
    return Sizes(ranks, groups, blocks)


def share_out(name: str, size: int | str, devices: int, nodes: int) -> tuple[int, int]:
    """Settle R, which the user calls `name`, and the number of groups; `"auto"`: the devices of a node.

    Raises:
        PhantomError: R does not divide the number of ranks.
    """
    world, ranks = devices * nodes, devices if size == "auto" else int(size)
    if world % ranks:
        raise PhantomError(
            f"{name}={ranks} does not divide the {world} ranks there are ({nodes} nodes x {devices} devices). Choose a "
            f"divisor of {world}, or leave it 'auto'."
        )
    return ranks, world // ranks


# Groups are collective to make and cannot be unmade cheaply: one set per process and R, for as long as its world lives.
_meshes: WeakKeyDictionary[Any, dict[int, Mesh]] = WeakKeyDictionary()


def make_mesh(sizes: Sizes, timeout: timedelta | None) -> Mesh:
    """Make this process's groups, or return those made before; every rank calls it."""
    meshes = _meshes.setdefault(dist.group.WORLD, {})
    if sizes.phantom not in meshes:
        end_quietly()
        rows = [list(range(d * sizes.phantom, (d + 1) * sizes.phantom)) for d in range(sizes.data_parallel)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        phantom, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
        data_parallel, _ = dist.new_subgroups_by_enumeration(columns, timeout=timeout)
        phantom_ranks = Ranks(phantom if sizes.phantom > 1 else None)
        for group in (phantom, data_parallel):
            agreement_of(group).timeout = timeout
        meshes[sizes.phantom] = Mesh(phantom_ranks, Ranks(data_parallel), (data_parallel, phantom))
    return meshes[sizes.phantom]
