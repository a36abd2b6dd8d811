"""One table at the end of a fit: what was learned, and what it took, beside runs of before."""

import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_phantom import EnergyMonitor
from lightning_phantom.distributed.comm import Traffic, record_traffic
from lightning_phantom.layers.split import sharded_parameters

COUNTED_BATCH = 2  # with the first two the ranks also compare what they must share


class RunReport(L.Callback):
    """Times the steps, counts the traffic of one, and prints a summary when the fit ends; under any strategy.

    The figures also go to `run_report.json` in the log directory.

    Args:
        beside: folders with the reports of other runs; the newest of each has a column of its own. What is not there
            has none.
        print_table: whether to print the summary.
    """

    def __init__(self, beside: Sequence[str] = (), print_table: bool = True) -> None:
        self.beside, self.print_table = beside, print_table
        self._step = ExitStack()
        self._ends: list[float] = []
        self.traffic = Traffic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let no validation count as a step."""
        self._last: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count what one step sends."""
        if batch_idx == COUNTED_BATCH and trainer.current_epoch == 0:
            self.traffic = self._step.enter_context(record_traffic())

    def on_train_batch_end(self, *args: Any) -> None:
        """Note the time of a step, and stop counting."""
        self._step.close()
        now = time.perf_counter()
        if self._last is not None:
            self._ends.append(now - self._last)
        self._last = now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for an epoch."""
        self._last = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table and write the file, on rank 0."""
        folder = trainer.log_dir  # the ranks agree on it, so all of them ask
        if trainer.is_global_zero:
            figures = self.figures(trainer, pl_module)
            others = [report for of in self.beside if (report := newest_report(Path(of))) is not None]
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                Path(folder, "run_report.json").write_text(json.dumps(figures, indent=2))
            if self.print_table:
                Console(width=100).print(table([*others, figures]))

    def figures(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The figures of a finished fit."""
        shards = sharded_parameters(pl_module)
        averaged = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in shards]
        gradients = 0.0
        if isinstance(trainer.strategy, DDPStrategy):
            whole = sum(p.numel() * p.element_size() for p in averaged)
            gradients = 2 * (trainer.world_size - 1) * whole / trainer.world_size
        monitor = next((c for c in trainer.callbacks if isinstance(c, EnergyMonitor)), None)
        energy = monitor.report if monitor is not None else None
        return {
            "model": type(pl_module).__name__,
            "strategy": type(trainer.strategy).__name__,
            "ranks": trainer.world_size,
            "steps": trainer.global_step,
            "validation": {name: value.item() for name, value in _validation(trainer).items()},
            "step_s": statistics.median(self._ends) if self._ends else None,
            "weights_per_rank": sum(p.numel() for p in pl_module.parameters()),
            "sent_bytes_per_step": self.traffic.total_bytes + round(gradients),
            "collectives_per_step": self.traffic.total_calls,
            "energy": energy and {name: energy[name] for name in ("total", "steady", "flags")},
        }


def newest_report(folder: Path) -> dict[str, Any] | None:
    """The figures of the newest run below a folder, or None."""
    found = max(folder.glob("**/run_report.json"), key=lambda path: path.stat().st_mtime, default=None)
    return None if found is None else json.loads(found.read_text())


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """A column of figures per run; the last one gave the table its title."""
    last = runs[-1]
    title = f"{last['model']}: {last['steps']} steps on {last['ranks']} rank{'s' * (last['ranks'] > 1)}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for run in runs:
        other = f", {run['steps']} steps" if run["steps"] != last["steps"] else ""
        shown.add_column(run["strategy"].removesuffix("Strategy") + other, justify="right")
    for name in last["validation"]:
        values = [run["validation"].get(name) for run in runs]
        label = name.replace("val_", "validation ").replace("_", " ")
        shown.add_row(label, *("-" if value is None else f"{value:.4f}" for value in values))
    shown.add_section()
    shown.add_row("ms per step", *("-" if run["step_s"] is None else f"{run['step_s'] * 1e3:.1f}" for run in runs))
    shown.add_row("bytes sent per rank and step", *(f"{run['sent_bytes_per_step']:,}" for run in runs))
    shown.add_row("weights per rank", *(f"{run['weights_per_rank']:,}" for run in runs))
    if any(run["energy"] for run in runs):
        shown.add_section()
        for label, part in (("GPU", "gpu"), ("CPU", "cpu"), ("RAM", "ram"), ("all parts", "total")):
            shown.add_row(f"energy, {label}", *(_energy(run["energy"], part) for run in runs))
        shown.add_row("energy per steady step", *(_energy(run["energy"], "total", "steady") for run in runs))
    return shown


def _energy(energy: dict[str, Any] | None, part: str, of: str = "total") -> str:
    """A figure and what it is worth."""
    if not energy:
        return "-"
    value, flag = energy[of][f"{part}_J" if of == "total" else "J_per_step"], energy["flags"][part]
    return flag if value is None else f"{value:,.3g} J, {flag}"


def _validation(trainer: L.Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("val_")}
