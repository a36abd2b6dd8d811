"""What a strategy tells Lightning about checkpoints: when they are made, and how a fit goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_phantom.checkpoints.files import AtomicCheckpointIO
from lightning_phantom.checkpoints.format import SavedGenerators, generators_of, is_converted
from lightning_phantom.checkpoints.full import StandIns, stand_ins
from lightning_phantom.checkpoints.rng import rng_states, set_rng_states
from lightning_phantom.checkpoints.store import Store
from lightning_phantom.distributed.mesh import Mesh
from lightning_phantom.errors import CheckpointError, PhantomError
from lightning_phantom.framework import fabric, pl
from lightning_phantom.layers.split import split_layers


class CheckpointingStrategy(pl.strategies.DDPStrategy):
    """A DDPStrategy whose model is spread over ranks, but whose checkpoints are the user's.

    Args:
        state_dict_type: `"full"` or `"sharded"`.
        weights_only: for `torch.load`; None leaves the choice to the Trainer.
        checkpoint_io: what reads and writes files; None writes them atomically.
        kwargs: for DDPStrategy.
    """

    layer_kind: str

    def __init__(self, state_dict_type: str, weights_only: bool | None, checkpoint_io: Any, **kwargs: Any) -> None:
        super().__init__(checkpoint_io=checkpoint_io, **kwargs)
        self._mesh: Mesh | None = None
        self._state_dict_type = state_dict_type
        self._weights_only = weights_only
        self._as_read: StandIns = {}
        self._resumed_rng: SavedGenerators | None = None
        self._restored_rng = False  # in this fit
        self._resumed_loaders: list[dict[str, Any]] = []

    @property
    def checkpoint_io(self) -> Any:
        """What reads and writes files: ours, or the user's; one of those that wrap another wraps ours."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, pl.plugins.io.wrapper._WrappingCheckpointIO):  # type: ignore[attr-defined]
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()  # it keeps what it wraps already
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        self._checkpoint_io = io

    @property
    def mesh(self) -> Mesh:
        """This rank's groups, once the processes have found each other."""
        if self._mesh is None:
            raise PhantomError("the ranks have not met yet: groups exist from the Trainer's first run on.")
        return self._mesh

    @property
    def _module(self) -> pl.LightningModule:
        if self.lightning_module is None:
            raise PhantomError("no module is connected to the strategy: a Trainer's run does that.")
        return self.lightning_module

    @property
    def _store(self) -> Store:
        return Store(self._module, self.optimizers, self.mesh, self.root_device, self.checkpoint_io)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save as one file or as a directory; every rank calls it.

        Raises:
            CheckpointError: on every rank, when one could not write. What was there before is still there.
        """
        module = self._module
        if not split_layers(module):
            super().save_checkpoint(checkpoint, filepath, storage_options)  # before any run all that there is is dense
            return
        trainer = module.trainer
        if trainer.interrupted and self.world_size > 1:
            rank_zero_warn(
                f"{filepath} was not saved: a checkpoint is put together by all ranks, and after an exception the "
                f"others may be gone. The newest checkpoint before it is whole."
            )
            return
        if trainer.state.fn == pl.trainer.states.TrainerFn.FITTING:
            mid_epoch = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            checkpoint = self._store.with_generators(checkpoint, mid_epoch)
        self._store.save(checkpoint, filepath, self._state_dict_type, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read either kind of checkpoint, or a dense one, for the module's `on_load_checkpoint` to see.

        Raises:
            CheckpointError: it is damaged, incomplete or foreign.
        """
        loaded = self._store.read(checkpoint_path, self._weights_only if weights_only is None else weights_only)
        if "state_dict" not in loaded:
            raise CheckpointError(f"{checkpoint_path}: this is not a Lightning checkpoint: it has no 'state_dict'.")
        self._as_read = stand_ins(loaded)
        if self._module.trainer.state.fn == pl.trainer.states.TrainerFn.FITTING:
            self._resumed_rng = generators_of(loaded)
            if self._resumed_rng is not None and not self._resumed_rng.mid_epoch:
                fit_loop = loaded.get("loops", {}).get("fit_loop", {})
                self._resumed_loaders = list(fit_loop.get("state_dict", {}).get("combined_loader", []))
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's share of the weights, and leave its share of what callbacks will ask for.

        Raises:
            CheckpointError: it is of another model; no weight has changed.
        """
        fitting = self._store.fit(checkpoint, self._as_read)
        self._as_read = {}
        everyones = cast(dict[str, Any], checkpoint)  # callbacks are given the same dict next
        everyones.clear()
        everyones.update(fitting)
        super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's share of the optimizer states.

        Raises:
            CheckpointError: the checkpoint was saved by another strategy, whose optimizer held the dense weights.
        """
        if is_converted(checkpoint):
            rank_zero_info(
                "The checkpoint comes from a conversion and holds weights alone: training starts anew from them, at "
                "epoch 0, with a new optimizer and new schedules."
            )
            return
        states = self._store.optimizer_states(checkpoint)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
            fabric.utilities.optimizer._optimizer_to_device(optimizer, self.root_device)

    # Generators: a fit saved at the end of an epoch goes on before the next epoch's iterator draws its seed, one saved
    # within an epoch after the iterator is back at its place.

    def process_dataloader(self, dataloader: object) -> object:
        """Restore generators and epoch before the first iterator of a resumed fit is made: workers read ahead."""
        if self._resumed_loaders and isinstance(dataloader, fabric.utilities.types._Stateful):
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
            if not self._resumed_rng.mid_epoch:
                self._restore_rng(self._resumed_rng)
        return super().process_dataloader(dataloader)

    def on_train_start(self) -> None:
        """Let dropout fall otherwise on every rank; in a fit that goes on, where it would have fallen.

        Until here, as under DDP, all ranks have drawn alike: what users split at random is split alike.
        """
        if self._resumed_rng is not None:
            self._restore_rng(self._resumed_rng)
        if not self._restored_rng and self.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        self._restored_rng = False
        super().on_train_start()

    def _restore_rng(self, saved: SavedGenerators) -> None:
        self._resumed_rng = None
        self._restored_rng = self._store.restore_generators(saved)
        if not self._restored_rng:
            rank_zero_info(
                f"Random generators start anew: the checkpoint has those of {len(saved.states)} ranks, this run has "
                f"{self.world_size}."
            )
