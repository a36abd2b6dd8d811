"""An energy report as others see it: figures for loggers, a line per epoch, a table, and files."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_phantom.energy.report import COMPONENTS

if TYPE_CHECKING:
    from rich.console import Group


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's figures under the names that loggers see; what is not known is left out."""
    total, phases, steady = report["total"], report["phases"], report["steady"]
    named = {
        "total_kWh": report["total_kWh"],
        **{f"{c}_J": total[f"{c}_J"] for c in COMPONENTS},
        "train_J": phases["train"]["total_J"],
        "val_J": phases["validation"]["total_J"],
        "other_J": phases["other"]["total_J"],
        "avg_power_W": total["avg_power_W"],
        "steady_J_per_step": steady["J_per_step"],
        "steady_J_per_sample": steady["J_per_sample"],
        "J_per_token": steady["J_per_token"],
        "co2e_kg": report["co2e_kg"],
        "overhead_s": report["overhead_s"],
    }
    return {f"energy/{name}": value for name, value in named.items() if value is not None}


def epoch_row(report: Mapping[str, Any], epoch: int, global_step: int) -> dict[str, Any]:
    """One line of `energy_epochs.csv`: what had been spent since the start of the fit when the epoch ended."""
    total = report["total"]
    return {
        "epoch": epoch,
        "global_step": global_step,
        "duration_s": total["duration_s"],
        **{f"{c}_J": total[f"{c}_J"] for c in COMPONENTS},
        "train_J": report["phases"]["train"]["total_J"],
        "val_J": report["phases"]["validation"]["total_J"],
        "other_J": report["phases"]["other"]["total_J"],
        "total_kWh": report["total_kWh"],
        "steady_J_per_step": report["steady"]["J_per_step"],
        "flag": total["flag"],
    }


def table(report: Mapping[str, Any]) -> "Group":
    """The report as a rich renderable, with the flag beside every figure."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

    flags = report["flags"]
    phases = Table(title="Energy", title_justify="left", box=SIMPLE_HEAD)
    phases.add_column("phase", overflow="fold")
    for heading in ("s", *(f"{c.upper()} J\n{flags[c]}".replace("_", "\n") for c in COMPONENTS), "W"):
        phases.add_column(heading, justify="right", overflow="fold")
    phases.add_column("flag", overflow="fold")
    for name, row in (*report["phases"].items(), ("total", report["total"]), ("steady", report["steady"])):
        if name == "total":
            phases.add_section()
        figures = [row["duration_s"], *(row[f"{c}_J"] for c in COMPONENTS), row["avg_power_W"]]
        phases.add_row(name, *map(text, figures), row["flag"])
    derived = Table.grid(padding=(0, 2))
    for name, value in (
        ("steady J/step", report["steady"]["J_per_step"]),
        ("steady J/sample", report["steady"]["J_per_sample"]),
        ("steady J/token", report["steady"]["J_per_token"]),
        ("total kWh", report["total_kWh"]),
        ("CO2e kg", report["co2e_kg"]),
    ):
        note = f"{flags['total']}, {report['carbon_source']}" if name.startswith("CO2e") else flags["total"]
        derived.add_row(name, text(value), note)
    return Group(phases, derived, *(f"{code}: {message}" for code, message in report["warnings"].items()))


def write(report: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]], directory: Path, suffix: str = "") -> None:
    """Write `energy_report.json` and, if an epoch has ended, `energy_epochs.csv`; each whole or not at all.

    Args:
        report: From `summarise`.
        epochs: Lines from `epoch_row`.
        directory: Created if missing.
        suffix: Put before the extensions, to tell the files of several ranks apart.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / f"energy_report{suffix}.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    if epochs:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, fieldnames=list(epochs[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(epochs)
        _replace(directory / f"energy_epochs{suffix}.csv", lines.getvalue())


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
