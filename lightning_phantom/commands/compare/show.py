"""Shows a comparison: a table, a JSON file, a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_phantom.commands.terminal import LABELS, show


def show_result(result: Mapping[str, Any]) -> None:
    """Print a comparison: a column per method, then the warnings."""
    from rich.table import Table

    where, request = result["environment"], result["request"]
    hosts = f"{where['hosts']} host{'s' * (where['hosts'] > 1)}"
    table = Table(
        title=f"{where['ranks']} ranks on {hosts}, {request['rounds']} rounds of "
        f"{request['steps']} steps after {request['warmup']}: medians, and the lowest and highest round",
        title_justify="left",
    )
    table.add_column("")
    for method in result["methods"]:
        table.add_column(LABELS[method], justify="right")
    for label, figure in _rows(result):
        cells = [figure(name) for name in result["methods"]]
        if any(cells):
            table.add_row(label, *(cell or "-" for cell in cells))
    show(table)
    left_out = [f"Left out: {method}: {why}" for method, why in result["left_out"].items()]
    warnings = [f"Warning: {warning}" for warning in result["warnings"]]
    show(*left_out, *warnings, soft_wrap=True, markup=False)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, Callable[[str], str | None]]]:
    methods, ratios, fastest = result["methods"], result["ratios"], result["fastest"]

    def of(name: str, form: str, scale: float = 1.0) -> Callable[[str], str | None]:
        return lambda method: None if (value := methods[method][name]) is None else form.format(value * scale)

    def over(name: str) -> Callable[[str], str | None]:
        return lambda method: None if (value := ratios.get(method, {}).get(name)) is None else f"{value:.3f}"

    def step(method: str) -> str:
        s = methods[method]["step_s"]
        median, low, high = (1e3 * s[name] for name in ("median", "low", "high"))
        return f"{median:.2f} ({low:.2f}-{high:.2f})"

    def spread(s: Mapping[str, float] | None) -> str | None:
        return None if s is None else f"{s['median']:.3f} ({s['low']:.3f}-{s['high']:.3f})"

    def target(name: str, form: str, scale: float = 1.0) -> Callable[[str], str | None]:
        def cell(method: str) -> str | None:
            reached = methods[method]["to_target"]
            if reached is None:
                return None
            if reached["steps"] is None:
                return "not reached"
            return "-" if reached[name] is None else form.format(reached[name] * scale)

        return cell

    def flag(method: str) -> str | None:
        reached = methods[method]["to_target"]
        return None if reached is None else reached["energy_flag"]

    over_fastest = f"  over {LABELS.get(fastest, fastest)}"
    to = f"{result['request']['target_loss']}"
    return [
        ("ms per step", step),
        (over_fastest, lambda method: spread(ratios.get(method, {}).get("step"))),
        ("samples per s", of("samples_per_s", "{:,.0f}")),
        ("tokens per s", of("tokens_per_s", "{:,.0f}")),
        ("GFLOP per rank and step", of("flops", "{:.4g}", 1e-9)),
        (over_fastest, over("flops")),
        ("MB sent per rank and step", of("sent_bytes", "{:.3f}", 1e-6)),
        ("  of it gradients, by DDP", of("gradient_bytes", "{:.3f}", 1e-6)),
        (over_fastest, over("sent_bytes")),
        ("collectives", of("calls", "{:g}")),
        ("  of them DDP's", of("gradient_calls", "{:g}")),
        ("ms waiting for them", of("waited_s", "{:.2f}", 1e3)),
        ("weights per rank", of("weights", "{:,.0f}")),
        ("  in all", of("weights_in_all", "{:,.0f}")),
        ("peak memory per rank, MB", of("peak_bytes", "{:,.0f}", 1e-6)),
        ("validation loss at equal steps", of("val_loss", "{:.4f}")),
        (f"steps to {to}", target("steps", "{:,.0f}")),
        (f"seconds to {to}", target("seconds", "{:.2f}")),
        (over_fastest, over("seconds_to_target")),
        (f"GFLOP per rank to {to}", target("flops", "{:.4g}", 1e-9)),
        (over_fastest, over("flops_to_target")),
        (f"MB sent per rank to {to}", target("sent_bytes", "{:.4g}", 1e-6)),
        (over_fastest, over("sent_bytes_to_target")),
        (f"joules to {to}", target("energy_j", "{:.1f}")),
        ("  which are", flag),
        (over_fastest, over("energy_to_target")),
    ]


def write_json(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a comparison; a file that is there is replaced at once."""
    if path is not None:
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(unfinished, path)


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw step time, bytes and losses of each method."""
    from matplotlib.figure import Figure

    methods = result["methods"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    times, traffic, losses = figure.subplots(1, 3)
    medians = [1e3 * m["step_s"]["median"] for m in methods.values()]
    spread = [
        [1e3 * abs(m["step_s"][end] - m["step_s"]["median"]) for m in methods.values()] for end in ("low", "high")
    ]
    times.bar(list(methods), medians, yerr=spread, capsize=3)
    times.set_ylabel("ms per step")
    traffic.bar(list(methods), [method["sent_bytes"] / 1e6 for method in methods.values()])
    traffic.set_ylabel("MB sent per rank and step")
    for name, method in methods.items():
        if method["losses"]:
            steps, _, values = zip(*method["losses"], strict=True)
            losses.plot(steps, values, marker="o", label=name)
    losses.set_xlabel("step")
    losses.set_ylabel(f"validation: {result['request']['monitor']}")
    if losses.lines:
        losses.legend()
    for axes in (times, traffic):
        axes.tick_params(axis="x", rotation=30)
    figure.savefig(path)
