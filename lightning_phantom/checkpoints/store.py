"""Saving and loading checkpoints of either format, for any front end that has a module, optimizers and ranks."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from lightning_phantom.checkpoints import full, sharded
from lightning_phantom.checkpoints.files import is_local
from lightning_phantom.checkpoints.format import (
    SavedGenerators,
    check_fits,
    check_readable,
    is_full,
    method_of,
    optimizers_of,
    records_of,
    with_entry,
    without_entry,
)
from lightning_phantom.checkpoints.optimizers import optimizer_from_names
from lightning_phantom.checkpoints.rng import rng_states, set_rng_states
from lightning_phantom.checkpoints.versions import discard, make_place, place_for, publish, verify
from lightning_phantom.distributed.comm import broadcast_object, gather_objects
from lightning_phantom.distributed.mesh import Mesh
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.split import any_layer, split_layers

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """The checkpoints of a module with layers that ranks hold between them. Every rank calls what saves or loads.

    Attributes:
        module: with its split layers.
        optimizers: of its parameters.
        mesh: this rank's groups.
        device: where its tensors are.
        io: reads and writes files, as a CheckpointIO of Lightning's.
    """

    module: nn.Module
    optimizers: Sequence[Optimizer]
    mesh: Mesh
    device: torch.device
    io: Any

    def save(self, checkpoint: dict[str, Any], path: Any, state_dict_type: str, storage_options: Any = None) -> None:
        """Save a checkpoint that holds this rank's shards and optimizer states.

        Args:
            checkpoint: as Lightning makes it: `state_dict`, `optimizer_states`, and whatever callbacks add.
            path: of a file or a directory.
            state_dict_type: `"full"` or `"sharded"`.
            storage_options: for `io`.

        Raises:
            CheckpointError: on every rank, when one could not write. What was there before is still there.
        """
        try:
            if state_dict_type == "full":
                self._save_full(checkpoint, path, storage_options)
            elif storage_options is not None or not is_local(path):
                raise CheckpointError("a sharded checkpoint needs a local or mounted path, no storage options.")
            else:
                self._save_sharded(checkpoint, Path(broadcast_object(path)))
        except CheckpointError as error:
            raise CheckpointError(f"{path} was not saved: {error}") from error.__cause__

    def load(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Read this rank's share of either kind of checkpoint, or a dense one, and check it; nothing changes yet.

        Raises:
            CheckpointError: it is damaged, incomplete, foreign, or of another model.
        """
        checkpoint = self.read(path, weights_only)
        with _named(path):
            return self.fit(checkpoint)

    def read(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Read a checkpoint as it was saved, whatever the module: whole from a file, of a directory this rank's share.

        Raises:
            CheckpointError: it is damaged, incomplete or foreign.
        """
        with _named(path):
            if is_local(path) and Path(path).is_dir():
                return self._read_sharded(Path(path), weights_only)
            return self._read_full(path, weights_only)

    def fit(self, checkpoint: Mapping[str, Any], as_read: full.StandIns | None = None) -> dict[str, Any]:
        """Check what `read` has returned against the module, and return this rank's share of it.

        Args:
            checkpoint: which hooks of the user's may have changed since.
            as_read: its `full.stand_ins` when it was read; None: nobody has changed it.

        Raises:
            CheckpointError: it is of another model.
        """
        if method_of(checkpoint) not in (None, any_layer(self.module).method) and is_full(checkpoint):
            # Its dense weights are as good as any; the optimizer's state is of other layers.
            checkpoint = without_entry(checkpoint)
        check_fits(self.module, checkpoint)
        layers = split_layers(self.module)
        for name, record in records_of(checkpoint).items():
            layers[name].take_over(record)
        if is_full(checkpoint):
            return full.take_share(self.module, checkpoint, as_read)
        sharded.check_splits(self.module, checkpoint)
        return dict(checkpoint)

    def optimizer_states(self, checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """This rank's share of the optimizer states in what `load` has returned, for `Optimizer.load_state_dict`.

        Raises:
            CheckpointError: the checkpoint was saved by another strategy, whose optimizer held the dense weights.
        """
        saved, kind = optimizers_of(checkpoint), any_layer(self.module).kind
        if saved is None:
            raise CheckpointError(
                f"the checkpoint holds no optimizer state for {kind} layers, so the fit cannot go on from it. "
                f"To start from its weights, load them in the module (or its setup hook) and fit without ckpt_path."
            )
        if len(saved) != len(self.optimizers):
            raise CheckpointError(f"the checkpoint has {len(saved)} optimizers, the module {len(self.optimizers)}.")
        return [
            optimizer_from_names(self.module, optimizer, state, whole=is_full(checkpoint))
            for optimizer, state in zip(self.optimizers, saved, strict=True)
        ]

    def with_generators(self, checkpoint: Mapping[str, Any], mid_epoch: bool) -> dict[str, Any]:
        """Return the checkpoint with the states of every rank's random number generators; collective."""
        return with_entry(checkpoint, rng=SavedGenerators(mid_epoch, gather_objects(rng_states())))

    def restore_generators(self, saved: SavedGenerators) -> bool:
        """Restore this rank's random number generators; False if there were another number of ranks."""
        fits = len(saved.states) == self.mesh.world.size
        if fits:
            set_rng_states(saved.states[self.mesh.world.rank])
        return fits

    def _save_full(self, checkpoint: dict[str, Any], path: Any, storage_options: Any) -> None:
        if self.mesh.data_parallel.rank == 0:
            checkpoint = full.make_full(self.module, checkpoint, self.optimizers)
        writer = dist.get_rank() == 0
        _together(lambda: self.io.save_checkpoint(checkpoint, path, storage_options) if writer else None)

    def _save_sharded(self, checkpoint: dict[str, Any], path: Path) -> None:
        mesh = self.mesh.device_mesh(self.device.type)
        writer = dist.get_rank() == 0
        folder = place_for(path, broadcast_object(uuid.uuid4().hex))
        try:
            _together(lambda: make_place(folder, path) if writer else None)
            mine = _together(lambda: sharded.write(folder, self.module, checkpoint, self.optimizers, mesh, writer))
            checksums = {name: value for each in gather_objects(mine) for name, value in each.items()}
            _together(lambda: publish(folder, path, checksums) if writer else None)
        except CheckpointError:
            if writer:
                discard(folder, path)
            raise

    def _read_full(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        kwargs = {} if weights_only is None else {"weights_only": weights_only}
        try:
            loaded = self.io.load_checkpoint(path, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"cannot be read; it is truncated or no checkpoint. Use an earlier one. ({error})"
            ) from error
        check_readable(loaded)
        return dict(loaded)

    def _read_sharded(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        folder = _together(lambda: verify(path, dist.get_rank(), dist.get_world_size()))
        try:
            rest = sharded.read_rest(folder, weights_only)
        except Exception as error:
            raise CheckpointError(f"cannot be read; use an earlier one. ({error})") from error
        check_readable(rest)
        mesh = self.mesh.device_mesh(self.device.type)
        return _together(lambda: sharded.read_tensors(folder, rest, mesh))


@contextmanager
def _named(path: Any) -> Iterator[None]:
    """Say of which checkpoint an error speaks."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it fails on one, raise on all, so that none waits for the others."""
    result: Any = None
    failure: BaseException | None = None
    failures: dict[int, BaseException] = {}
    try:
        result = action()
    except CheckpointException as error:  # torch's, with what failed on any rank; it is no Exception
        failure, failures = error, {rank: problem for rank, (problem, _) in error.failures.items()}
    except Exception as error:
        failure, failures = error, {dist.get_rank(): error}
    everyone = gather_objects({rank: _words(problem) for rank, problem in failures.items()})
    problems = {rank: problem for each in everyone for rank, problem in each.items()}
    if problems:
        raise CheckpointError("; ".join(f"rank {rank}: {problems[rank]}" for rank in sorted(problems))) from failure
    return result


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
