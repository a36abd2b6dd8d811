"""What a strategy does with checkpoints: one plain file, or a directory to which every rank writes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from lightning_phantom.checkpoints import full, sharded
from lightning_phantom.checkpoints.files import AtomicCheckpointIO, is_local
from lightning_phantom.checkpoints.rng import rng_states, set_rng_states
from lightning_phantom.checkpoints.versions import discard, make_place, place_for, publish, verify
from lightning_phantom.distributed.mesh import Mesh
from lightning_phantom.errors import CheckpointError

T = TypeVar("T")


class CheckpointingStrategy(DDPStrategy):
    """A DDPStrategy whose model is spread over ranks, but whose checkpoints are the user's.

    Args:
        state_dict_type: `"full"` or `"sharded"`.
        weights_only: for `torch.load`; None leaves the choice to the Trainer.
        checkpoint_io: what reads and writes files; None writes them atomically.
        kwargs: for DDPStrategy.
    """

    strategy_name: str
    layer_kind: str
    mesh: Mesh

    def __init__(self, state_dict_type: str, weights_only: bool | None, checkpoint_io: Any, **kwargs: Any) -> None:
        super().__init__(checkpoint_io=checkpoint_io or AtomicCheckpointIO(), **kwargs)
        self._state_dict_type = state_dict_type
        self._weights_only = weights_only
        self._resumed_rng: dict[str, Any] | None = None
        self._resumed_loaders: list[dict[str, Any]] = []

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Layers must be swapped before their weights arrive."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save as one file or as a directory; every rank calls it.

        Raises:
            CheckpointError: on every rank, when one could not write. What was there before is still there.
        """
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        if trainer.interrupted and self.world_size > 1:
            rank_zero_warn(
                f"{filepath} was not saved: a checkpoint is put together by all ranks, and after an exception the "
                f"others may be gone. The newest checkpoint before it is whole."
            )
            return
        if trainer.state.fn == TrainerFn.FITTING:
            mid_epoch = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            checkpoint = {**checkpoint, "phantom": {"rng": {"mid_epoch": mid_epoch, "states": self._gather_rng()}}}
        try:
            if self._state_dict_type == "full":
                self._save_full(checkpoint, filepath, storage_options)
            elif storage_options is not None or not is_local(filepath):
                raise CheckpointError("a sharded checkpoint needs a local or mounted path, no storage options.")
            else:
                self._save_sharded(checkpoint, Path(self.broadcast(filepath)))
        except CheckpointError as error:
            raise CheckpointError(f"{filepath} was not saved: {error}") from error.__cause__

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this rank's share of either kind of checkpoint, or a dense one, and check it before weights change.

        Raises:
            CheckpointError: it is damaged, incomplete, foreign, or of another model.
        """
        module = self.lightning_module
        assert module is not None
        choice = self._weights_only if weights_only is None else weights_only
        try:
            if is_local(checkpoint_path) and Path(checkpoint_path).is_dir():
                loaded = self._load_sharded(Path(checkpoint_path), choice)
            else:
                loaded = self._load_full(checkpoint_path, choice)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint_path}: {error}") from error.__cause__
        if module.trainer.state.fn == TrainerFn.FITTING:
            self._resumed_rng = loaded.get("phantom", {}).get("rng")
            if self._resumed_rng is not None and not self._resumed_rng["mid_epoch"]:
                self._resumed_loaders = list(loaded["loops"]["fit_loop"]["state_dict"].get("combined_loader", []))
        return loaded

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's share of the optimizer states.

        Raises:
            CheckpointError: the checkpoint was saved by another strategy, whose optimizer held the dense weights.
        """
        assert self.lightning_module is not None
        if checkpoint.get("phantom", {}).get("converted"):
            rank_zero_info(
                "The checkpoint comes from a conversion and holds weights alone: training starts anew from them, at "
                "epoch 0, with a new optimizer and new schedules."
            )
            return
        saved = checkpoint.get("phantom", {}).get("optimizers")
        if saved is None:
            raise CheckpointError(
                f"the checkpoint holds no optimizer state for {self.layer_kind} layers, so the fit cannot go on from "
                f"it. To start from its weights, load them in the module (or its setup hook) and fit without ckpt_path."
            )
        if len(saved) != len(self.optimizers):
            raise CheckpointError(f"the checkpoint has {len(saved)} optimizers, the module {len(self.optimizers)}.")
        is_full = "factors" in checkpoint["phantom"]
        states = [
            full.optimizer_from_names(self.lightning_module, optimizer, state, whole=is_full)
            for optimizer, state in zip(self.optimizers, saved, strict=True)
        ]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
            _optimizer_to_device(optimizer, self.root_device)

    # Generators: a fit saved at the end of an epoch goes on before the next epoch's iterator draws its seed, one saved
    # within an epoch after the iterator is back at its place.

    def process_dataloader(self, dataloader: object) -> object:
        """Restore generators and epoch before the first iterator of a resumed fit is made: workers read ahead."""
        if self._resumed_loaders and isinstance(dataloader, _Stateful):
            # Lightning restores them within an epoch only. The next iterator goes on from the one that is put back.
            before = rng_states()
            dataloader.load_state_dict(self._resumed_loaders.pop(0))
            iter(dataloader)  # type: ignore[call-overload]
            set_rng_states(before)
        if self._resumed_rng is not None and self.lightning_module is not None:
            set_epoch = getattr(getattr(dataloader, "sampler", None), "set_epoch", None)
            if callable(set_epoch):
                progress: Any = self.lightning_module.trainer.fit_loop.epoch_progress.current
                set_epoch(progress.processed)
            if not self._resumed_rng["mid_epoch"]:
                self._restore_rng()
        return super().process_dataloader(dataloader)

    def on_train_start(self) -> None:
        """Restore the generators of a fit that goes on within an epoch."""
        if self._resumed_rng is not None:
            self._restore_rng()
        super().on_train_start()

    def _restore_rng(self) -> None:
        assert self._resumed_rng is not None
        states, self._resumed_rng = self._resumed_rng["states"], None
        if len(states) == self.mesh.data_parallel.size:
            set_rng_states(states[self.mesh.data_parallel.rank])
        else:
            rank_zero_info(
                f"Random generators start anew: the checkpoint has those of {len(states)} replicas, this run has "
                f"{self.mesh.data_parallel.size}."
            )

    def _gather_rng(self) -> list[Any]:
        states: list[Any] = [None] * self.mesh.data_parallel.size
        dist.all_gather_object(states, rng_states(), group=self.mesh.data_parallel.group)
        return states

    # The two formats

    def _save_full(self, checkpoint: dict[str, Any], path: Any, storage_options: Any) -> None:
        module = self.lightning_module
        assert module is not None
        if self.mesh.data_parallel.rank == 0:
            extra = checkpoint.pop("phantom", {})
            checkpoint = full.make_full(module, checkpoint)
            checkpoint["phantom"].update(extra)
            if "optimizer_states" in checkpoint:
                states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
                checkpoint["phantom"]["optimizers"] = [
                    full.optimizer_to_names(module, optimizer, state, full.gather_whole) for optimizer, state in states
                ]
                checkpoint["optimizer_states"] = []
        save = super().save_checkpoint
        self._together(lambda: save(checkpoint, path, storage_options))

    def _save_sharded(self, checkpoint: dict[str, Any], path: Path) -> None:
        module = self.lightning_module
        assert module is not None
        mesh = self.mesh.device_mesh(self.root_device.type)
        writer = self.is_global_zero
        folder = place_for(path, self.broadcast(uuid.uuid4().hex))
        try:
            self._together(lambda: make_place(folder, path) if writer else None)
            mine = self._together(lambda: sharded.write(folder, module, checkpoint, self.optimizers, mesh, writer))
            everyone: list[Any] = [None] * self.world_size
            dist.all_gather_object(everyone, mine)
            checksums = {name: value for each in everyone for name, value in each.items()}
            self._together(lambda: publish(folder, path, checksums) if writer else None)
        except CheckpointError:
            if writer:
                discard(folder, path)
            raise

    def _load_full(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        assert self.lightning_module is not None
        kwargs = {} if weights_only is None else {"weights_only": weights_only}
        try:
            loaded = self.checkpoint_io.load_checkpoint(path, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"cannot be read; it is truncated or no checkpoint. Use an earlier one. ({error})"
            ) from error
        if isinstance(loaded, Mapping) and full.method_of(loaded) not in (None, self.strategy_name):
            # Its dense weights are as good as any; the optimizer's state is of other layers.
            loaded = {key: value for key, value in loaded.items() if key != "phantom"}
        full.check_fits(self.lightning_module, loaded)
        return full.take_share(self.lightning_module, loaded) if "phantom" in loaded else dict(loaded)

    def _load_sharded(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        assert self.lightning_module is not None
        folder = self._together(lambda: verify(path, self.global_rank, self.world_size))
        try:
            rest = sharded.read_rest(folder, weights_only)
        except Exception as error:
            raise CheckpointError(f"cannot be read; use an earlier one. ({error})") from error
        full.check_fits(self.lightning_module, rest)
        sharded.check_splits(self.lightning_module, rest)
        mesh = self.mesh.device_mesh(self.root_device.type)
        return self._together(lambda: sharded.read_tensors(folder, rest, mesh))

    def _together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; when it fails on one, raise on all, so that none waits for the others."""
        result: Any = None
        failure: BaseException | None = None
        failures: dict[int, BaseException] = {}
        try:
            result = action()
        except CheckpointException as error:  # torch's, with what failed on any rank; it is no Exception
            failure, failures = error, {rank: problem for rank, (problem, _) in error.failures.items()}
        except Exception as error:
            failure, failures = error, {self.global_rank: error}
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, {rank: _words(problem) for rank, problem in failures.items()})
        problems = {rank: problem for each in everyone for rank, problem in each.items()}
        if problems:
            raise CheckpointError("; ".join(f"rank {rank}: {problems[rank]}" for rank in sorted(problems))) from failure
        return result


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
