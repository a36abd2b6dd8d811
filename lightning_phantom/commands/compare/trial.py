"""One fit of one method, measured: what `compare` does again and again, on every rank alike."""

from __future__ import annotations

import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.distributed.comm import Traffic, record_traffic
from lightning_phantom.distributed.shards import Split
from lightning_phantom.energy import EnergyMonitor
from lightning_phantom.framework import fabric, pl
from lightning_phantom.layers.split import sharded_parameters
from lightning_phantom.measure.counted import Counted
from lightning_phantom.measure.memory import Memory
from lightning_phantom.strategies.base import SplitStrategy

COUNTED_STEP = 1  # the second, which belongs to every warm-up; by then DDP has settled its buckets


@dataclass
class Measured:
    """What one rank saw in one fit.

    Attributes:
        weights: parameters this rank held.
        weights_in_all: parameters of the model, each counted once.
        flops: floating-point operations of products, per step.
        steps_s: seconds of each step after the warm-up, from the end of the one before to its own, validation left out.
        samples: samples in one step that this rank read.
        sent_bytes: bytes this rank sent, per step, by the ring's count.
        gradient_bytes: bytes of them for gradients that DDP averages.
        calls: collectives, per step.
        gradient_calls: DDP's of them.
        waited_s: seconds spent waiting for collectives of this package, per step.
        peak_bytes: the most memory held at once while training, beyond what the process held before the module was
            made: of the device, or resident memory where the device is the CPU; None where the system does not say.
        losses: `(step, seconds of training so far, validation loss)`.
        energy: per steady step in joules, its flag, and the components' flags; None where it was not asked for.
    """

    weights: int = 0
    weights_in_all: int = 0
    flops: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    samples: int = 0
    sent_bytes: float = 0.0
    gradient_bytes: float = 0.0
    calls: float = 0.0
    gradient_calls: int = 0
    waited_s: float = 0.0
    peak_bytes: int | None = None
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    energy: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Length:
    """How long a fit is, and what it looks at.

    Attributes:
        steps: optimizer steps.
        warmup: how many of them are not timed.
        validate_every: steps between validations; 0 for none.
        monitor: the metric that is the validation loss.
        energy: whether to run the energy meter.
    """

    steps: int
    warmup: int
    validate_every: int = 0
    monitor: str = "val_loss"
    energy: bool = False


def run_trial(recipe: Recipe, length: Length, settings: dict[str, Any], prepare: Any = None) -> Measured:
    """Fit a fresh module of the config, on its data, and measure it.

    Args:
        recipe: the config.
        length: how long.
        settings: Trainer arguments of the method: strategy, devices, ...
        prepare: called with the module before the fit.

    Returns:
        This rank's measurements.
    """
    probe = Probe(length)
    monitor = EnergyMonitor(warmup_steps=length.warmup, print_table=False, log_metrics=False) if length.energy else None
    accumulate = recipe.config.trainer.accumulate_grad_batches or 1
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = recipe.make_trainer(
            **settings,
            callbacks=[probe, *([monitor] if monitor else [])],
            max_steps=length.steps,
            max_epochs=-1,
            min_steps=None,
            min_epochs=None,
            max_time=None,
            fast_dev_run=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            val_check_interval=length.validate_every * accumulate or length.steps * accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            profiler=None,
            default_root_dir=folder,
            **({} if length.validate_every else {"limit_val_batches": 0}),
        )
        probe.memory = memory = Memory(trainer.strategy.root_device)
        pl.seed_everything(recipe.seed, workers=True, verbose=False)
        module, data = recipe.make_module(), recipe.make_data()
        if prepare is not None:
            prepare(module)
        trainer.fit(module, datamodule=data)
        measured = probe.result()
        measured.peak_bytes = memory.peak_bytes()
    if monitor is not None and monitor.report is not None:
        steady = monitor.report["steady"]
        measured.energy = {"steady_j_per_step": steady["J_per_step"], "flag": monitor.report["flags"]["total"]}
        measured.energy["flags"] = monitor.report["flags"]
    return measured


class Probe(pl.Callback):
    """Times the steps of a fit, counts what they send, and keeps the validation losses."""

    def __init__(self, length: Length) -> None:
        self.length = length
        self.measured = Measured()
        self.memory: Memory | None = None
        self._recording: Any = None
        self._counting: Counted | None = None
        self._begin = self._pause = self._train_s = 0.0
        self._by_torch: list[Traffic] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        shards = sharded_parameters(pl_module)
        parameters = list(pl_module.parameters())
        self.measured.weights = sum(_held(p) for p in parameters)
        self.measured.weights_in_all = sum(p.numel() * _shares(p, shards) for p in parameters)
        if isinstance(trainer.strategy, pl.strategies.DDPStrategy):
            averaged = [p for p in parameters if p.requires_grad and id(p) not in shards]
            whole = sum(p.numel() * p.element_size() for p in averaged)
            self.measured.gradient_bytes = 2 * (trainer.world_size - 1) * whole / trainer.world_size
        if self.memory is not None:
            self.memory.restart()
        self._begin, self._pause = time.perf_counter(), 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the operations of the second step, which is not timed, and the collectives after the warm-up."""
        if trainer.global_step == COUNTED_STEP:
            self._counting = Counted(trainer.world_size)
            self._counting.__enter__()
        if trainer.global_step >= self.length.warmup:
            self._recording = record_traffic()
            self._recorded = self._recording.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time of a step."""
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self.measured.flops += self._counting.flops
            if not isinstance(trainer.strategy, SplitStrategy):
                self._by_torch += [self._counting.traffic]
            self._counting = None
        if self._recording is not None:
            self._recording.__exit__(None, None, None)
            self._recording = None
            self.measured.sent_bytes += self._recorded.total_bytes
            self.measured.calls += self._recorded.total_calls
            self.measured.waited_s += self._recorded.waited_s
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        seconds = now - self._begin - self._pause
        self._begin, self._pause = now, 0.0
        self._train_s += seconds
        if trainer.global_step > self.length.warmup:
            self.measured.steps_s.append(seconds)
        if not self.measured.samples:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.measured.samples = pl.utilities.data.extract_batch_size(batch) * trainer.accumulate_grad_batches

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask DDP for its buckets: it rebuilds them before the second step, and says so from the third on."""
        self.measured.gradient_calls = _buckets(trainer.strategy.model)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the loss, and let the clock run on."""
        loss = trainer.callback_metrics.get(self.length.monitor)
        if loss is not None:
            self.measured.losses.append((trainer.global_step, self._train_s, float(loss)))
        self._pause += time.perf_counter() - self._paused

    def result(self) -> Measured:
        """What was measured, per step."""
        steps = max(len(self.measured.steps_s), 1)
        measured = self.measured
        measured.waited_s /= steps
        if self._by_torch:
            measured.sent_bytes = sum(traffic.total_bytes for traffic in self._by_torch)
            measured.calls = sum(traffic.total_calls for traffic in self._by_torch)
        else:
            measured.sent_bytes = measured.sent_bytes / steps + measured.gradient_bytes
            measured.calls = measured.calls / steps + measured.gradient_calls
        return self.measured


def _shares(parameter: torch.Tensor, shards: dict[int, Split]) -> int:
    """How many ranks hold a part of it each, of which this process knows its own alone."""
    return shards[id(parameter)].ranks.size if id(parameter) in shards else 1


def _buckets(model: Any) -> int:
    """The calls in which DistributedDataParallel averages gradients; 0 where it does not."""
    if not isinstance(model, DistributedDataParallel):
        return 0
    logged = model._get_ddp_logging_data()
    sizes = logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]
    return len(sizes.split(","))


def _held(parameter: torch.Tensor) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a fit prints, warns and logs about itself out of the report."""
    loggers = [logging.getLogger(name) for name in (pl.__name__, fabric.__name__, "codecarbon")]
    levels = [logger.level for logger in loggers]
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
