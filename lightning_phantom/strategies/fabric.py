"""Phantom parallelism for training loops of one's own: `Fabric(strategy=PhantomFabricStrategy(...))`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_phantom.checkpoints.files import AtomicCheckpointIO
from lightning_phantom.checkpoints.format import without_entry
from lightning_phantom.checkpoints.store import Store
from lightning_phantom.config import PhantomConfig
from lightning_phantom.distributed.gradients import ShardAverage, agree_on_inf, clip_grad_norm_
from lightning_phantom.distributed.mesh import Mesh, make_mesh, resolve_sizes
from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import CheckpointError, PhantomError
from lightning_phantom.framework import fabric
from lightning_phantom.layers.split import sharded_parameters, split_layers
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.strategies.agree import Swapper, align_replicated, average_shards, has_replicated
from lightning_phantom.strategies.checks import check_optimizers, check_update_rules
from lightning_phantom.swap import nothing_qualifies

_OPTIMIZERS = "optimizer_states"  # where the store looks for them


class PhantomFabricStrategy(fabric.strategies.ddp.DDPStrategy):
    """`PhantomStrategy` for `lightning.Fabric`: the same layers, gradients, clipping and checkpoints.

    `fabric.setup(model, optimizer)` swaps the feed-forward linears, and gives the optimizer their parameters. Every
    rank reads its own batches, as under DDP. `fabric.save` writes the dense weights under the keys of its `state`,
    and beside them what `fabric.load` needs to restore the layers and the optimizers, on any R that divides p.

    Args:
        phantom_width: see `PhantomStrategy`, like the following.
        num_blocks: p.
        phantom_parallel_size: R.
        plan: which layers to swap; None finds the feed-forward networks.
        init: how the layers start.
        state_dict_type: `"full"`, one file, or `"sharded"`, a directory.
        mixing: which latents blocks make for each other.
        latents: which of them a layer in a chain reads.
        kwargs: for Fabric's DDPStrategy (`timeout`, `process_group_backend`) and DistributedDataParallel.

    Raises:
        PhantomError: an argument is impossible, here or, where it needs the number of ranks, at the launch.

    Examples:
        >>> fabric = Fabric(accelerator="cpu", devices=1, strategy=PhantomFabricStrategy(num_blocks=4))
    """

    def __init__(
        self,
        phantom_width: int | float = 0.25,
        num_blocks: int | None = None,
        phantom_parallel_size: int | Literal["auto"] = "auto",
        plan: dict[str, str] | None = None,
        init: str = "auto",
        state_dict_type: Literal["full", "sharded"] = "full",
        mixing: Literal["pairwise", "private"] = "pairwise",
        latents: Literal["own", "both", "previous"] = "own",
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("timeout", timedelta(minutes=30))
        super().__init__(**kwargs)
        if state_dict_type not in ("full", "sharded"):
            raise PhantomError(f"state_dict_type={state_dict_type!r}: choose 'full' or 'sharded'.")
        self._config = PhantomConfig(
            2 if num_blocks is None else num_blocks, phantom_width, plan, init, mixing=mixing, latents=latents
        )
        self._num_blocks = num_blocks
        self._size = phantom_parallel_size
        self._state_dict_type = state_dict_type
        self._mesh: Mesh | None = None
        self._sharded: dict[int, Split] = {}
        self._averages: list[ShardAverage] = []
        self._backward_sync_control = self  # type: ignore[assignment]

    @property
    def mesh(self) -> Mesh:
        """This rank's groups, once the processes have found each other."""
        if self._mesh is None:
            raise PhantomError("the ranks have not met yet: call fabric.launch() first.")
        return self._mesh

    @property
    def checkpoint_io(self) -> fabric.plugins.CheckpointIO:
        """What reads and writes files: Fabric's plugin, or ours, which writes them atomically."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: fabric.plugins.CheckpointIO) -> None:
        self._checkpoint_io = io

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, in a pickle or not: no ranks, before it is launched."""
        return {**vars(self), "_mesh": None, "_sharded": {}, "_averages": []}

    def setup_environment(self) -> None:
        """Find the other ranks, and agree on a seed."""
        super().setup_environment()
        sizes = resolve_sizes(self._size, self._num_blocks, self.num_processes, self.num_nodes)
        self._mesh = make_mesh(sizes, self._timeout)
        chosen = os.environ.get("PL_GLOBAL_SEED")
        seed = self.broadcast(torch.initial_seed() % 2**32 if chosen is None else int(chosen))
        self._config = replace(self._config, num_blocks=sizes.num_blocks, seed=seed)

    def module_init_context(self, empty_init: bool | None = None) -> Any:
        """For `fabric.init_module`, which always fills weights here: phantom layers start from what is in them."""
        return super().module_init_context(empty_init=False)

    def setup_module_and_optimizers(self, module: nn.Module, optimizers: list[Optimizer], *scheduler: Any) -> Any:
        """Swap layers, give the optimizers their parameters, and average gradients; the scheduler is as before."""
        swapper = Swapper(module, plan_phantom)
        swapper.swap(self._config, self.mesh)
        if not split_layers(module):
            raise nothing_qualifies(module, plan_phantom(module, self._config))
        swapper.update(optimizers)
        for optimizer in optimizers:
            check_optimizers([optimizer], module)
        check_update_rules(optimizers, self.mesh.phantom.size)
        align_replicated(module)
        self._sharded |= sharded_parameters(module)
        scaler = getattr(self.precision, "scaler", None)
        if scaler is not None and "_unscale_grads_" not in vars(scaler):
            agree_on_inf(scaler, self.mesh.world)
        average = average_shards(module, self.mesh)
        if average is not None:
            self._averages.append(average)
        averaged = self.world_size > 1 and has_replicated(module)
        return super().setup_module(module) if averaged else module, optimizers, *scheduler

    def setup_module(self, module: nn.Module) -> Any:
        """Swap layers, and average gradients; make the optimizer next."""
        return self.setup_module_and_optimizers(module, [])[0]

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Let gradients accumulate, while `enabled`."""
        with ExitStack() as stack:
            if enabled and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            for average in self._averages:
                average.blocked = enabled
            try:
                yield
            finally:
                for average in self._averages:
                    average.blocked = False

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm of all ranks' gradients, and return it; equal on every rank."""
        self.precision.unscale_gradients(optimizer)
        norm = clip_grad_norm_(self.precision.main_params(optimizer), max_norm, self._sharded, float(norm_type))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"The norm of the gradients is {norm.item()}, so they cannot be clipped. To scale them by it anyway, "
                f"set error_if_nonfinite=False."
            )
        return norm

    # Checkpoints

    def save_checkpoint(self, path: Any, state: Any, storage_options: Any = None, filter: Any = None) -> None:
        """Save modules, optimizers and whatever else `state` holds; every rank calls it.

        Raises:
            CheckpointError: on every rank, when one could not write. What was there before is still there.
        """
        if not any(_layers(value) for value in state.values()):
            super().save_checkpoint(path, state, storage_options, filter)
            return
        if filter:
            raise PhantomError("a filter would tear the factors of phantom layers apart: leave it out.")
        module, optimizers = self._parts(state)
        rest = {key: value for key, value in state.items() if not isinstance(value, Optimizer)}
        checkpoint = self._convert_stateful_objects_in_state(rest, filter={})
        checkpoint[_OPTIMIZERS] = [optimizer.state_dict() for optimizer in optimizers]
        self._store(module, optimizers).save(checkpoint, path, self._state_dict_type, storage_options)

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restore what `state` holds, in place, and return what is left of the checkpoint.

        Raises:
            CheckpointError: it is damaged, incomplete, of another model, or lacks a key of `state` (if `strict`).
        """
        if not isinstance(state, dict) or not any(_layers(value) for value in state.values()):
            kwargs = {} if weights_only is None else {"weights_only": weights_only}  # which Lightning 2.5 does not know
            return super().load_checkpoint(path, state, strict, **kwargs)
        module, optimizers = self._parts(state)
        store = self._store(module, optimizers)
        checkpoint = store.load(path, weights_only)
        missing = [k for k, value in state.items() if not isinstance(value, Optimizer) and k not in checkpoint]
        if missing and strict:
            raise CheckpointError(f"{path} has no {missing[0]!r}; with strict=False it is left as it is.")
        states = store.optimizer_states(checkpoint) if optimizers else []
        for key, value in list(state.items()):
            if isinstance(value, Optimizer):
                value.load_state_dict(states.pop(0))
            elif key in checkpoint and isinstance(value, nn.Module):
                self.load_module_state_dict(value, checkpoint.pop(key), strict)
            elif key in checkpoint and hasattr(value, "load_state_dict"):
                value.load_state_dict(checkpoint.pop(key))
            elif key in checkpoint:
                state[key] = checkpoint.pop(key)
        return without_entry({key: value for key, value in checkpoint.items() if key != _OPTIMIZERS})

    def _store(self, module: nn.Module, optimizers: list[Optimizer]) -> Store:
        return Store(module, optimizers, self.mesh, self.root_device, self.checkpoint_io)

    @staticmethod
    def _parts(state: Mapping[str, Any]) -> tuple[nn.Module, list[Optimizer]]:
        """The module that a state is of, and its optimizers; copies of the module may be there, too."""
        first, *others = (value for value in state.values() if _layers(value))
        if any(_layers(other) != _layers(first) for other in others):
            raise PhantomError("these modules have other phantom layers than each other: save each in its own file.")
        return _bare(first), [value for value in state.values() if isinstance(value, Optimizer)]


def _bare(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _layers(value: Any) -> dict[str, Any]:
    """What a module's phantom layers are, by name."""
    if not isinstance(value, nn.Module):
        return {}
    return {name: layer.record() for name, layer in split_layers(_bare(value)).items()}
