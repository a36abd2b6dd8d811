"""One table at the end of a fit: what was learned, and what it took."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_phantom import EnergyMonitor, PhantomLinear, PhantomStrategy, estimate_cost
from lightning_phantom.distributed.comm import Traffic, record_traffic


class RunReport(L.Callback):
    """Counts the traffic of one training step and prints a summary when the fit ends.

    It reports on any strategy; under `PhantomStrategy` with what tensor parallelism would have taken beside it. The
    figures also go to `run_report.json` in the log directory.
    """

    def __init__(self) -> None:
        self._step = ExitStack()
        self.traffic = Traffic()
        self.tokens = 0  # rows of this rank's activations, and
        self.reads_data = False  # whether they need no gradient, where the first phantom layer is called

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start counting at the third batch: with the first two the ranks also compare what they must share."""
        if batch_idx == 2 and trainer.current_epoch == 0:
            self.traffic = self._step.enter_context(record_traffic())
            for layer in pl_module.modules():
                if isinstance(layer, PhantomLinear):
                    self._step.callback(layer.register_forward_pre_hook(self._see_input).remove)

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop counting."""
        self._step.close()

    def _see_input(self, layer: PhantomLinear, args: tuple[Tensor]) -> None:
        if not self.tokens:
            self.tokens, self.reads_data = args[0][..., 0].numel(), not args[0].requires_grad

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table and write the file, on rank 0."""
        folder = trainer.log_dir  # the ranks agree on it, so all of them ask
        if trainer.is_global_zero:
            Console(width=100).print(self.table(trainer, pl_module))
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                Path(folder, "run_report.json").write_text(json.dumps(self.figures(trainer, pl_module), indent=2))

    def figures(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The figures of a finished fit by themselves."""
        return {
            "model": type(pl_module).__name__,
            "strategy": type(trainer.strategy).__name__,
            "ranks": trainer.world_size,
            "steps": trainer.global_step,
            "validation": {name: value.item() for name, value in _validation(trainer).items()},
            "weights_per_rank": _weights(pl_module),
            "sent_bytes_per_step": self.traffic.total_bytes,
            "collectives_per_step": self.traffic.total_calls,
        }

    def table(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Table:
        """The summary of a finished fit."""
        ranks, weights = trainer.world_size, _weights(pl_module)
        title = f"{type(pl_module).__name__}: {trainer.global_step} steps on {ranks} rank{'s' * (ranks > 1)}"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        table.add_column(type(trainer.strategy).__name__.removesuffix("Strategy"), justify="right")
        table.add_column("for comparison")
        for name, value in _validation(trainer).items():
            table.add_row(name.replace("val_", "validation ").replace("_", " "), f"{value:.4f}", "")
        table.add_section()
        notes = ("", "", "")
        if isinstance(trainer.strategy, PhantomStrategy):
            notes = self._comparisons(trainer.strategy, weights)
        table.add_row("weights per rank", f"{weights:,}", notes[0])
        table.add_row("bytes sent per rank and step", f"{self.traffic.total_bytes:,}", notes[1])
        table.add_row("collectives per step", f"{self.traffic.total_calls}", notes[2])
        table.add_section()
        for row in _energy_rows(trainer):
            table.add_row(*row)
        return table

    def _comparisons(self, strategy: PhantomStrategy, weights: int) -> tuple[str, str, str]:
        """What the dense model holds, and what exact tensor parallelism would hold and send."""
        plan = strategy.plan
        first, *others = plan.cost_layers()
        layers = [replace(first, needs_input_grad=not self.reads_data), *others]
        ranks = strategy.phantom_parallel_size
        cost = estimate_cost(layers, plan.config.num_blocks, plan.config.phantom_width, ranks, ranks * self.tokens)
        exact = min(cost.tensor_parallel, cost.tensor_parallel_layerwise, key=lambda c: c.sent_bytes)
        rest = weights - cost.phantom.weights
        dense = rest + sum(layer.weights_before for layer in plan.swapped)
        return (
            f"dense {dense:,}; tensor parallel {rest + exact.weights:,}",
            f"tensor parallel would send {exact.sent_bytes:,} (both without averaged gradients)",
            f"the cost model says {cost.phantom.calls}",
        )


def _validation(trainer: L.Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("val_")}


def _weights(module: L.LightningModule) -> int:
    return sum(p.numel() for p in module.parameters())


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
