"""What the command `lightning-phantom plan` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_phantom.commands.terminal import LABELS
from lightning_phantom.cost.scale import Scale, Setting, best, pays_from, stops_paying
from lightning_phantom.measure.simulate import Simulated


def cost_table(here: Scale, origin: dict[str, str]) -> Any:
    """What a step costs each method, per rank."""
    from rich.table import Table

    title = (
        f"A step, per rank: {here.num_ranks} ranks, p={here.num_blocks}, {here.tokens:,} tokens together, {here.dtype}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    headings = (
        "weights",
        "replicated",
        "GFLOP",
        "MB sent",
        "in layers",
        "boundaries",
        "gradients",
        "calls",
        "predicted ms",
        "of it waiting",
        f"over {LABELS[here.fastest]}",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    fastest = here.times[here.fastest].seconds
    for method in here.costs:
        cost, time = here.costs[method], here.times[method]
        table.add_row(
            LABELS[method],
            f"{cost.weights:,}",
            f"{cost.replicated:,}",
            f"{cost.flops / 1e9:.3f}",
            *(
                f"{sent / 1e6:.3f}"
                for sent in (cost.sent_bytes, cost.layer_bytes, cost.boundary_bytes, cost.weight_bytes)
            ),
            str(cost.calls),
            f"{1e3 * time.seconds:.2f}",
            f"{1e3 * time.waited_s:.2f}",
            f"{time.seconds / fastest:.3f}",
        )
    how = "measured on this machine" if "measured here" in origin.values() else "given"
    given = [name for name, word in origin.items() if word == "given"]
    if given and "measured here" in origin.values():
        how += f", {', '.join(given)} given"
    table.caption = (
        f"Predicted from rates {how}. Of what is no linear the weights and the averaging of their gradients count, not "
        f"the work. MB sent: inside layers (phantom's latents), where whole tokens enter and leave them, and what data "
        f"parallelism sends for weights; the gradients of the FFNs' inputs included."
    )
    table.caption_justify = "left"
    return table


def simulation_table(wide: Scale, measured: Mapping[str, Simulated]) -> Any:
    """What one rank's share took here, beside what is predicted of it."""
    from rich.table import Table

    title = (
        f"One of {wide.num_ranks} ranks, p={wide.num_blocks}, {wide.tokens:,} tokens: the linears to be swapped, run "
        f"here, the others left out"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("weights", "compute ms", "predicted", "MB of tensors", "MB resident", "MB sent", "predicted"):
        table.add_column(heading, justify="right")
    for method, one in measured.items():
        table.add_row(
            LABELS[method],
            f"{one.weights:,}",
            f"{1e3 * one.compute_s:.2f}",
            f"{1e3 * wide.times[method].compute_s:.2f}",
            f"{one.tensor_bytes / 1e6:.1f}",
            "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:.1f}",
            f"{one.sent_bytes / 1e6:.3f}",
            f"{(wide.costs[method].layer_bytes + wide.costs[method].boundary_bytes) / 1e6:.3f}",
        )
    table.caption = (
        "Tensors: weights, gradients and what the forward saves, by their shapes. Resident: the process's high-water "
        "mark above what it held before, with temporary and freed memory. MB sent: what a rank of a ring sends."
    )
    table.caption_justify = "left"
    return table


def sweep_table(same_ranks: Sequence[Scale], one_block: Sequence[Scale], here: Scale) -> Any:
    """Phantom over the fastest of the others, by the number of blocks."""
    from rich.table import Table

    title = "Over the number of blocks p: phantom / the fastest of those that train the dense model"
    table = Table(title=title, title_justify="left")
    for heading in ("p", "k", "weights", "GFLOP", "MB sent", f"step on {here.num_ranks} ranks", "step on p ranks"):
        table.add_column(heading, justify="right")
    on_same = {row.num_blocks: row for row in same_ranks}
    for row in one_block:
        widths = row.phantom_widths
        table.add_row(
            str(row.num_blocks),
            str(widths[0]) if len(widths) == 1 else f"{widths[0]}-{widths[-1]}",
            *(_number(row.ratio(what)) for what in ("weights", "flops", "sent_bytes")),
            *("-" if each is None else _step(each) for each in (on_same.get(row.num_blocks), row)),
        )
    table.caption = "Weights, GFLOP and MB sent per rank, on p ranks."
    table.caption_justify = "left"
    return table


def _step(row: Scale) -> str:
    return f"{1e3 * row.times['phantom'].seconds:.2f} ms, {row.ratio('step'):.3f} of {LABELS[row.fastest]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def verdict(same_ranks: Sequence[Scale], one_block: Sequence[Scale], here: Scale, setting: Setting) -> str:
    """Whether it pays, at what p, from how many features on; and what bounds it."""
    lines = []
    if same_ranks:
        row = best(same_ranks)
        pays = (row.ratio("step") or 0) < 1
        lines.append(
            f"On {here.num_ranks} ranks the shortest predicted step is at p={row.num_blocks}: "
            f"{row.ratio('step'):.3f} of {LABELS[row.fastest]}'s, the fastest of those that train the dense model."
            + ("" if pays else f" Phantom does not pay here: take {LABELS[row.fastest]}.")
            + " A phantom layer is a smaller function at every p: compare losses too."
        )
    lines.append(_by_width(here, setting))
    if here.num_ranks > 1:
        lines.append(_by_latency(here, setting))
    end = stops_paying(one_block)
    if end is None and one_block:
        lines.append(f"Work and bytes stay below TP's up to p={one_block[-1].num_blocks}.")
    elif end is not None:
        what = "work is" if end.tp_ratio("flops") >= 1 else "bytes are"
        lines.append(f"It stops paying at p={end.num_blocks}: there its {what} no less than TP's.")
    if isinstance(k := setting.phantom_width, int):
        widest = max(layer.in_features for layer in setting.layers)
        lines.append(
            f"At k={k} a layer of {widest:,} features has fewest weights near p = sqrt(n/k) = "
            f"{(widest / k) ** 0.5:.0f}; with more blocks its total grows again."
        )
    return "\n".join(lines)


def _by_width(here: Scale, setting: Setting) -> str:
    width = max(layer.in_features for layer in setting.layers)
    where = f"With p={here.num_blocks} on {here.num_ranks} ranks, {here.tokens:,} tokens and this link"
    features = pays_from(setting, here.num_blocks, here.num_ranks)
    if features is None:
        return f"{where} phantom's step is longer than the fastest other's even with 64 times the {width:,} features."
    return (
        f"{where} phantom's step is no longer than the fastest other's from {features:,} features of the widest layer "
        f"on (it has {width:,}; all widths halved or doubled)."
    )


def _by_latency(here: Scale, setting: Setting) -> str:
    fixed, whole = here.costs["phantom"].calls * setting.machine.latency_s, here.times["phantom"].communication_s
    words = (
        f"Phantom's {here.costs['phantom'].calls} collectives take {1e3 * whole:.2f} ms a step, {1e3 * fixed:.2f} of "
    )
    words += "them however little they send"
    if 2 * fixed > whole:
        return f"{words}: bound by latency, so more tokens on each rank or a larger k take little longer."
    return f"{words}: bound by bandwidth, so they take as long as tokens and k make them."
