"""One table at the end of a fit: what was learned, and what it took."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from lightning_phantom import EnergyMonitor, PhantomStrategy, estimate_cost
from lightning_phantom.comm import Traffic, record_traffic


class RunReport(L.Callback):
    """Counts the traffic of the first training step and prints a summary when the fit ends."""

    def __init__(self) -> None:
        self._step = ExitStack()
        self.traffic = Traffic()
        self.batch_size = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start counting at the first batch."""
        if trainer.global_step == 0:
            self.batch_size = len(batch[0])
            self.traffic = self._step.enter_context(record_traffic())

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop counting."""
        self._step.close()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table on rank 0."""
        if trainer.is_global_zero and isinstance(trainer.strategy, PhantomStrategy):
            Console(width=100).print(self.table(trainer, trainer.strategy))

    def table(self, trainer: L.Trainer, strategy: PhantomStrategy) -> Table:
        """The summary of a finished fit."""
        plan, ranks = strategy.plan, strategy.phantom_parallel_size
        first, *others = plan.cost_layers()
        layers = [replace(first, needs_input_grad=False), *others]  # the first layer reads data
        cost = estimate_cost(layers, plan.config.num_blocks, plan.config.phantom_width, ranks, self.batch_size)
        exact = min(cost.tensor_parallel, cost.tensor_parallel_layerwise, key=lambda c: c.sent_bytes)
        dense = sum(layer.weights_before for layer in plan.swapped)
        metrics = trainer.callback_metrics

        table = Table(title=f"Digits on {ranks} ranks, {trainer.current_epoch} epochs", title_justify="left")
        table.add_column("")
        table.add_column("phantom", justify="right")
        table.add_column("for comparison")
        table.add_row("validation accuracy", f"{metrics['val_accuracy']:.4f}", "")
        table.add_row("validation loss", f"{metrics['val_loss']:.4f}", "")
        table.add_section()
        table.add_row(
            "weights per rank", f"{cost.phantom.weights:,}", f"dense {dense:,}; tensor parallel {exact.weights:,}"
        )
        table.add_row(
            "bytes sent per rank and step",
            f"{self.traffic.total_bytes:,}",
            f"tensor parallel would send {exact.sent_bytes:,} (boundaries included in both)",
        )
        table.add_row(
            "collectives per step", f"{self.traffic.total_calls}", f"the cost model says {cost.phantom.calls}"
        )
        table.add_section()
        for label, value, note in _energy_rows(trainer):
            table.add_row(label, value, note)
        return table


def _energy_rows(trainer: L.Trainer) -> list[tuple[str, str, str]]:
    """Label, figure and flag of each part that the meter knows: what a figure is worth stands beside it."""
    monitor = next((c for c in trainer.callbacks if isinstance(c, EnergyMonitor)), None)
    if monitor is None or not monitor.report:
        return []
    report = monitor.report

    def row(label: str, value: float | None, unit: str, flag: str) -> tuple[str, str, str]:
        return label, "unavailable" if value is None else f"{value:,.3g} {unit}", flag

    total, flags = report["total"], report["flags"]
    parts = [row(f"{part.upper()} energy", total[f"{part}_J"], "J", flags[part]) for part in ("gpu", "cpu", "ram")]
    steady = report["steady"]["J_per_step"]
    return [
        *parts,
        row("energy, all parts", total["total_J"], "J", f"{flags['total']}, in {total['duration_s']:.1f} s"),
        row("energy per steady step", steady, "J", flags["total"]),
    ]
