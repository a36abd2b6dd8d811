"""`EnergyMonitor`: what a fit costs in joules, for any Lightning strategy.

One process per host owns a meter (codecarbon, offline) that runs from the start of the fit to its end. At the edges of
phases the owner takes a cumulative reading, and charges the difference to the phase that has just ended; steps are
never measured one by one. Ranks meet once per epoch to add their hosts up. Importing this module loads no codecarbon
and touches no device.
"""

import inspect
import math
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_phantom.energy import meter, report, show
from lightning_phantom.energy.fit import Fit, gather
from lightning_phantom.energy.report import RankRecord
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl


class EnergyMonitor(pl.Callback):
    """Measure the energy of `Trainer.fit`, log it, and report it at the end with how every figure was obtained.

    The time of a fit falls into three phases: "train" (within epochs, outside validation), "validation", and "other"
    (start-up, the sanity check, and what happens between epochs, such as saving a checkpoint). Figures per step and
    per sample come from the steady window: the part of "train" after the first `warmup_steps` optimizer steps.

    Each figure carries the worst flag of its parts: `measured_counter` (an energy counter), `sampled_power`,
    `user_constant`, `modelled` (a guess from a load or a size: CPU and RAM on most virtual machines), `unavailable`
    or `failed`. A missing figure is None, never 0. Only GPUs that NVML or amdsmi knows are counted as "gpu", each card
    once and whole; a job on another accelerator gets no total. Network, power supply and cooling are not measured (PUE
    is 1).

    A meter that fails does not stop training: the cause is logged once and the figures become None. Nothing is
    measured by `validate`, `test` and `predict`. The report is made in the training processes, so a launcher that
    spawns them leaves `report` None in the process that called `fit`; the files are written all the same.

    Args:
        country_iso_code: Three letters ("FRA"), to estimate CO2e from codecarbon's national average.
        carbon_intensity: In g CO2e per kWh, used instead of the country's. Without either, CO2e is omitted.
        measure_power_secs: Seconds between the meter's background readings.
        warmup_steps: Optimizer steps of this fit before the steady window; 0 opens it at once.
        tokens_per_sample: Tokens in a sample, for J per token.
        output_dir: Where `energy_report.json` and `energy_epochs.csv` go; None: the trainer's log directory, else its
            default root directory. Existing files are replaced.
        strict: Raise `PhantomError`, on every rank, where all ranks next meet after something failed.
        cpu_power_w: Power of all CPUs of a host at full load, in watts, where there is no counter. codecarbon scales
            it with the load, so the flag stays `modelled`.
        ram_power_w: Constant power of the memory of a host, in watts.
        log_metrics: Send the figures to the trainer's loggers at the end of every epoch and of the fit.
        print_table: Print a table at the end.
        tracker_factory: The seam for a replay meter, in tests: see `meter.Meter`.

    Raises:
        PhantomError: An argument has the wrong type or an impossible value; with `strict`, a meter that failed.

    Attributes:
        report: What `energy_report.json` holds, on every rank, once a fit has ended.

    Examples:
        >>> monitor = EnergyMonitor(country_iso_code="FRA", warmup_steps=20)
        >>> trainer = L.Trainer(callbacks=[monitor])  # doctest: +SKIP
    """

    def __init__(
        self,
        country_iso_code: str | None = None,
        carbon_intensity: float | None = None,
        measure_power_secs: float = 1.0,
        warmup_steps: int = 10,
        tokens_per_sample: float | None = None,
        output_dir: str | Path | None = None,
        strict: bool = False,
        cpu_power_w: float | None = None,
        ram_power_w: float | None = None,
        log_metrics: bool = True,
        print_table: bool = True,
        *,
        tracker_factory: Callable[..., Any] | None = None,
    ):
        _check_positive("measure_power_secs", measure_power_secs, "the seconds between readings, such as 1.0")
        for name, value, cure in (
            ("carbon_intensity", carbon_intensity, "the grid's g CO2e per kWh, or None to omit CO2e"),
            ("tokens_per_sample", tokens_per_sample, "the tokens in a sample, or None"),
            ("cpu_power_w", cpu_power_w, "the CPUs' full-load power in watts, or None to let codecarbon guess"),
            ("ram_power_w", ram_power_w, "the memory's power in watts, or None to let codecarbon guess"),
        ):
            if value is not None:
                _check_positive(name, value, cure)
        if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise PhantomError(
                f"EnergyMonitor: warmup_steps={warmup_steps!r} is not a count; pass an integer of 0 or more"
            )
        if country_iso_code is not None and not (
            isinstance(country_iso_code, str)
            and re.fullmatch("[A-Z]{3}", country_iso_code)
            and meter.is_known_country(country_iso_code)
        ):
            raise PhantomError(
                f"EnergyMonitor: country_iso_code={country_iso_code!r} is no country that codecarbon knows; pass three "
                "capital letters (ISO 3166-1 alpha-3, such as 'FRA'), or carbon_intensity instead"
            )
        if output_dir is not None and not isinstance(output_dir, (str, Path)):
            raise PhantomError(f"EnergyMonitor: output_dir={output_dir!r} is no path; pass a directory, or None")
        self.country_iso_code = country_iso_code
        self.carbon_intensity = carbon_intensity
        self.measure_power_secs = measure_power_secs
        self.warmup_steps = warmup_steps
        self.tokens_per_sample = tokens_per_sample
        self.output_dir = output_dir
        self.strict = strict
        self.cpu_power_w = cpu_power_w
        self.ram_power_w = ram_power_w
        self.log_metrics = log_metrics
        self.print_table = print_table
        self.tracker_factory = tracker_factory
        self.report: dict[str, Any] | None = None
        self._fit: Fit | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The trainer hangs the module's `log` and `log_dict` on its callbacks; with them the model would travel along.
        return {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")} | {"_fit": None}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Elect the owner of each host and start its meter."""
        self._close()
        self.report = None
        fit = self._fit = Fit(trainer)
        fit.elect(trainer)
        options = {
            "measure_power_secs": self.measure_power_secs,
            "country_iso_code": self.country_iso_code,
            "cpu_power_w": self.cpu_power_w,
            "ram_power_w": self.ram_power_w,
        }
        fit.start(options, self.tracker_factory)
        with fit.guard(fatal=False):
            # `log_dir` is a collective: all ranks ask now, for after an exception nobody may.
            fit.output_dir = Path(self.output_dir or trainer.log_dir or trainer.default_root_dir)
        self._raise_together(trainer, fit)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter "train": a fit resumed within an epoch skips `on_train_epoch_start`."""
        if self._fit is not None:
            self._fit.first_step = trainer.global_step
            self._fit.enter("train")
            if self.warmup_steps == 0:
                self._fit.open_steady_window(trainer.global_step)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter "train" again after what came between two epochs."""
        if self._fit is not None and self._fit.phase != "train":
            self._fit.enter("train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; the end of the warm-up alone takes a reading."""
        fit = self._fit
        if fit is None:
            return
        if fit.steady_step is not None:
            fit.count_samples(batch)
        elif trainer.global_step - fit.first_step >= self.warmup_steps:
            fit.open_steady_window(trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter "validation", but for the sanity check."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to "train", but for the sanity check."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.enter("train")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave "train", add the hosts up and log."""
        fit = self._fit
        if fit is None:
            return
        fit.enter("other")
        records = fit.share(trainer)
        with fit.guard(fatal=False):
            report = self._summary(trainer, records)
            fit.epochs.append(show.epoch_row(report, trainer.current_epoch, trainer.global_step))
            self._publish(trainer, report)
        self._raise_together(trainer, fit)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the last reading, stop the meter, and report."""
        fit = self._fit
        if fit is None:
            return
        fit.enter("other")
        fit.stop()
        records = fit.share(trainer)
        with fit.guard(fatal=False):
            self.report = self._summary(trainer, records)
        if self.report is not None:
            with fit.guard(fatal=False):
                self._publish(trainer, self.report)
            if trainer.is_global_zero:
                with fit.guard(fatal=False):
                    show.write(self.report, fit.epochs, fit.output_dir)
                with fit.guard(fatal=False):
                    self._print(self.report)
        self._fit = None
        self._raise_together(trainer, fit)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the meter and save what this host has metered; other ranks may be dead, so nobody is asked."""
        fit, self._fit = self._fit, None
        if fit is None:
            return
        if trainer.world_size > 1:
            fit.samples = None
        fit.enter("other", synchronize=False)
        fit.stop()
        with fit.guard(fatal=False):
            self.report = self._summary(trainer, [fit.record(trainer)], complete=False)
            if fit.is_owner or trainer.is_global_zero:
                suffix = "" if trainer.is_global_zero else f"_rank{trainer.global_rank}"
                show.write(self.report, fit.epochs, fit.output_dir, suffix)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop a meter that is still running, as after a fit that had nothing to train."""
        self._close()

    def _close(self) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.stop()

    def _summary(self, trainer: pl.Trainer, records: list[RankRecord], complete: bool = True) -> dict[str, Any]:
        config = {k: v for k, v in vars(self).items() if k in inspect.signature(EnergyMonitor).parameters}
        del config["tracker_factory"]
        return report.summarise(
            records,
            replicas=_replicas(trainer),
            country_iso_code=self.country_iso_code,
            carbon_intensity=self.carbon_intensity,
            tokens_per_sample=self.tokens_per_sample,
            complete=complete,
        ) | {
            "world_size": trainer.world_size,
            "config": config | {"output_dir": None if self.output_dir is None else str(self.output_dir), "pue": 1.0},
            "versions": _versions(),
        }

    def _publish(self, trainer: pl.Trainer, report: dict[str, Any]) -> None:
        figures = show.metrics(report)
        trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items()})
        if self.log_metrics:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def _print(self, report: dict[str, Any]) -> None:
        if self.print_table:
            from rich.console import Console

            Console().print(show.table(report))

    def _raise_together(self, trainer: pl.Trainer, fit: Fit) -> None:
        if not self.strict:
            return
        everyone = [fit.problems]
        with fit.guard():
            everyone = gather(fit.problems, trainer)
        for rank, problems in enumerate(everyone):
            if problems:
                raise PhantomError(
                    f"EnergyMonitor(strict=True): {problems[0]} (on rank {rank}). Cure it, or pass strict=False to "
                    "train on without the figures."
                )


def _check_positive(name: str, value: Any, cure: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise PhantomError(f"EnergyMonitor: {name}={value!r} is not a positive, finite number; pass {cure}")


def _replicas(trainer: pl.Trainer) -> int:
    size = getattr(trainer.strategy, "data_parallel_size", None)
    if not isinstance(size, int):
        # What the samplers go by, where a strategy splits the model without that attribute.
        size = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas")
    return size if isinstance(size, int) and size > 0 else trainer.world_size


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "lightning": pl.__version__}  # type: ignore[attr-defined]
    for package in ("lightning-phantom", "torch", "codecarbon"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions
