"""The strategy that phantom and tensor parallelism share: all but the layers that each of them makes."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from lightning_phantom.config import is_int
from lightning_phantom.distributed.gradients import agree_on_inf
from lightning_phantom.distributed.mesh import Sizes, make_mesh
from lightning_phantom.distributed.replicas import ReplicaCheck
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import fabric, pl
from lightning_phantom.layers.split import SplitLinear, sharded_parameters, split_layers
from lightning_phantom.plan.record import Plan
from lightning_phantom.strategies.agree import Swapper, align_replicated
from lightning_phantom.strategies.checks import check_arguments, check_optimizers, check_trainer, check_update_rules
from lightning_phantom.strategies.first_step import FirstStep
from lightning_phantom.strategies.launch import PhantomLauncher
from lightning_phantom.strategies.materialise import materialise
from lightning_phantom.strategies.running import RunningStrategy
from lightning_phantom.swap import nothing_qualifies

DEFAULT_TIMEOUT = timedelta(minutes=30)


class SplitStrategy(RunningStrategy):
    """Trains an unchanged LightningModule whose feed-forward linears are split over ranks.

    Every rank reads its own batches and holds all of the model but the layers that a plan names: those a group of R
    ranks holds between them. DistributedDataParallel averages the gradients of the rest over all ranks.

    Args:
        size_name: what a user calls R.
        size: R, or `"auto"`.
        state_dict_type: `"full"` or `"sharded"`.
        weights_only: for `torch.load`.
        check_replicas: whether to compare what ranks must share.
        timeout: how long a collective waits.
        checkpoint_io: what reads and writes files.
        kwargs: for DDPStrategy.

    """

    strategy_name: str

    def __init__(
        self,
        size_name: str,
        size: int | Literal["auto"],
        state_dict_type: str,
        weights_only: bool | None,
        check_replicas: Literal["auto"] | bool,
        timeout: timedelta,
        checkpoint_io: Any,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs)
        for refused, why in (
            ("start_method", "ranks must be started as processes of their own ('popen' or torchrun)"),
            ("ddp_comm_state", "post-local SGD averages whole models"),
            ("model_averaging_period", "model averaging averages whole models"),
        ):
            if kwargs.pop(refused, None) not in (None, "popen"):
                raise PhantomError(f"{type(self).__name__} does not take {refused}: {why}; leave it out.")
        if size != "auto" and (not is_int(size) or int(size) < 1):
            raise PhantomError(f"{size_name}={size!r}: needs an int of at least 1, or 'auto'.")
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            raise PhantomError(f"timeout={timeout!r}: needs a positive datetime.timedelta.")
        if state_dict_type not in ("full", "sharded"):
            raise PhantomError(f"state_dict_type={state_dict_type!r}: choose 'full' or 'sharded'.")
        if check_replicas not in ("auto", True, False):
            raise PhantomError(f"check_replicas={check_replicas!r}: choose 'auto', True or False.")
        super().__init__(bool(check_replicas), state_dict_type, weights_only, checkpoint_io, timeout=timeout, **kwargs)
        self._size = size
        self._seed: int | None = None
        self._swapper: Swapper | None = None

    def __repr__(self) -> str:
        # What the other Lightning's Trainer says when it refuses the object.
        return f"<{type(self).__name__} of {pl.__name__} (Lightning's two names do not mix: import one of them alone)>"

    # What the two strategies differ in

    @abstractmethod
    def _settle_sizes(self) -> Sizes:
        """R and D for the devices there are."""

    @property
    @abstractmethod
    def config(self) -> Any:
        """What is asked for, with the sizes and the seed settled."""

    @abstractmethod
    def _plan(self, module: nn.Module, config: Any) -> Plan:
        """What happens to each linear of a module."""

    @abstractmethod
    def _check_layer(self, name: str, layer: SplitLinear, config: Any) -> None:
        """Raise PhantomError if a layer that is split already is none that this strategy would make."""

    @property
    def plan(self) -> Plan | None:
        """What happened to each linear; None before the first run."""
        return None if self._swapper is None else self._swapper.plan

    # Start of a run

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """For `Trainer.init_module`, which always fills weights here: phantom layers start from what is in them."""
        with super().tensor_init_context(False):
            yield

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = PhantomLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Find the other ranks, agree on a seed, and swap the layers that exist: callbacks may copy the model next."""
        super().setup_environment()
        self._mesh = make_mesh(self._settle_sizes(), self._timeout)
        self._agree_on_seed()
        module = self._module
        config = self.config
        if pl.utilities.model_helpers.is_overridden("configure_model", module) and config.plan is not None:
            names = [name for name, _ in module.named_modules()]
            present = {g: w for g, w in config.plan.items() if any(fnmatchcase(name, g) for name in names)}
            if not present:
                return
            config = replace(config, plan=present)
        self._swap(config)

    def setup(self, trainer: pl.Trainer) -> None:
        """Swap what hooks have made, move and align the model, make averages and optimizers."""
        module = self._module
        assert self.accelerator is not None and self.model is not None
        fitting = trainer.state.fn == pl.trainer.states.TrainerFn.FITTING
        self.accelerator.setup(trainer)
        self._complete(module)
        if fitting and self._layer_sync and self.world_size > 1:
            self.model = self._layer_sync.apply(self.model)
        # Now that every parameter is the one that will be trained, and where.
        self.model_to_device()
        self._sharded = sharded_parameters(module)
        align_replicated(module)
        if fitting:
            if self.world_size > 1:
                self.configure_ddp()
            self.optimizers, self.lr_scheduler_configs = [], []
            self.setup_optimizers(trainer)
            assert self._swapper is not None and self.plan is not None
            self._swapper.update(self.optimizers)
            check_optimizers(self.optimizers, module)
            check_update_rules(self.optimizers, self.mesh.phantom.size)
            self._first_step = FirstStep(module, self.plan)
        self._check = ReplicaCheck(self.mesh.world, self.mesh.phantom) if self._check_replicas else None
        self.setup_precision_plugin()
        # Instance attributes, removed in teardown: the plugin is the user's and knows nothing of shards.
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            agree_on_inf(scaler, self.mesh.world)
        if fitting:
            fabric.utilities.optimizer._optimizers_to_device(self.optimizers, self.root_device)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Swap what hooks have made, `on_load_checkpoint` the last of them, and load the weights."""
        self._complete(self._module)
        super().load_model_state_dict(checkpoint, strict)

    def _complete(self, module: pl.LightningModule) -> None:
        """Make every parameter the one that will be trained: swapped, with a value, in the run's precision."""
        early = split_layers(module)
        self._swap(self.config)
        layers = split_layers(module)
        check_trainer(module.trainer, self.mesh.phantom.size, swapped_late=layers != early)
        if not layers:
            raise nothing_qualifies(module, self._plan(module, self.config))
        materialise(module, self.root_device)
        self.precision_plugin.convert_module(module)
        if split_layers(module) != layers:
            raise PhantomError(
                f"{type(self.precision_plugin).__name__} has put layers of its own where the {self.layer_kind} layers "
                f"were; it replaces linear layers, which {self.layer_kind} layers are not in its sense. Use a plain "
                f"precision."
            )

    def teardown(self) -> None:
        """Give the precision plugin back as it was, and end the run."""
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            vars(scaler).pop("_unscale_grads_", None)
        if self._average is not None:
            self._average.remove()
            self._average = None
        module = self._lightning_module
        if module is not None and any(p.is_meta for p in module.parameters()):
            self._lightning_module = None  # a run that failed early: moving meta tensors would raise over its error
        try:
            super().teardown()
        finally:
            self._lightning_module = module

    def _agree_on_seed(self) -> None:
        """Draw the layers' first weights from one seed on every rank."""
        if self._seed is None:
            chosen = os.environ.get("PL_GLOBAL_SEED")
            self._seed = self.broadcast(torch.initial_seed() % 2**32 if chosen is None else int(chosen))

    def _swap(self, config: Any) -> None:
        """Swap what qualifies and is not swapped yet."""
        module = self._module
        for name, layer in split_layers(module).items():
            self._check_layer(name, layer, config)
        if self._swapper is None or self._swapper.module is not module:
            self._swapper = Swapper(module, self._plan)
        self._swapper.swap(config, self.mesh)
