"""Makes one record of the runs of a comparison: medians, spreads, ratios, and what is unfair about it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning_phantom.commands.compare.options import Request
from lightning_phantom.cost.methods import EXACT

UNTIMED = ("ddp", "fsdp", "tensor_parallel_torch", "smaller")  # whoever waits in their collectives is not this package
SHARED_BATCHES = ("tensor_parallel_torch",)  # its ranks read the same
OF_A_RANK = ("weights", "weights_in_all", "flops", "sent_bytes", "gradient_bytes", "calls", "gradient_calls")
NOISY = 0.25  # spread of a method's rounds, relative to their median, from which the times are called unsteady


def summarise(
    request: Request, environment: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that `compare` shows, as plain data.

    Args:
        request: what was compared.
        environment: where.
        runs: `{"method", "round", "ranks": [Measured.as_dict() of each rank]}`, in the order in which they ran.
        left_out: methods that could not run, and why.
    """
    methods = {
        m: _method(request, m, [r for r in runs if r["method"] == m]) for m in dict.fromkeys(r["method"] for r in runs)
    }
    for figures in (methods[m] for m in UNTIMED if m in methods):
        figures.update(waited_s=None)
    fastest = min((m for m in EXACT if m in methods), key=lambda m: methods[m]["step_s"]["median"], default=None)
    return {
        "request": {**asdict(request), "json": str(request.json), "plot": str(request.plot)},
        "environment": dict(environment),
        "methods": methods,
        "left_out": dict(left_out),
        "fastest": fastest,
        "ratios": {} if fastest is None else {m: _ratios(methods[m], methods[fastest]) for m in methods},
        "warnings": _warnings(request, environment, methods),
        "runs": list(runs),
    }


def _method(request: Request, name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A method's figures; a step takes as long as it takes on the slowest rank."""
    rounds = [max(statistics.median(rank["steps_s"]) for rank in run["ranks"]) for run in runs]
    ranks = [rank for run in runs for rank in run["ranks"]]
    step_s, read = statistics.median(rounds), [rank["samples"] for rank in runs[0]["ranks"]]
    samples = read[0] if name in SHARED_BATCHES else sum(read)
    # The first fits of a process also hold what is made once and kept: the least round is the method's own.
    peaks = [max(r["peak_bytes"] for r in run["ranks"]) for run in runs if run["ranks"][0]["peak_bytes"] is not None]
    losses = _mean_losses(runs[0]["ranks"])
    tokens = request.tokens_per_sample
    return {
        "step_s": {"median": step_s, "low": min(rounds), "high": max(rounds), "rounds": rounds},
        "samples_per_s": samples / step_s,
        "tokens_per_s": None if tokens is None else samples * tokens / step_s,
        "waited_s": statistics.median(max(rank["waited_s"] for rank in run["ranks"]) for run in runs),
        **{
            name: max(rank[name] for rank in ranks)
            for name in (
                "sent_bytes",
                "gradient_bytes",
                "calls",
                "gradient_calls",
                "weights",
                "weights_in_all",
                "flops",
            )
        },
        "peak_bytes": min(peaks, default=None),
        "losses": losses,
        "val_loss": losses[-1][2] if losses else None,
        "to_target": _to_target(request.target_loss, losses, runs[0]["ranks"]),
    }


def _mean_losses(ranks: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """The ranks' losses, which are of their own shares of the data unless the module has reduced them."""
    return [
        (seen[0][0], seen[0][1], statistics.fmean(loss for _, _, loss in seen))
        for seen in zip(*(rank["losses"] for rank in ranks), strict=True)
    ]


def _to_target(
    target: float | None, losses: Sequence[tuple[int, float, float]], ranks: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What it took to first see the validation loss at the target: a rank's FLOPs and bytes, all ranks' joules."""
    if target is None:
        return None
    reached = next(((step, seconds) for step, seconds, loss in losses if loss <= target), None)
    if reached is None:
        return dict.fromkeys(("steps", "seconds", "flops", "sent_bytes", "energy_j", "energy_flag"))
    steps, seconds = reached
    energy = ranks[0]["energy"] or {"steady_j_per_step": None, "flag": "failed"}
    a_step = energy["steady_j_per_step"]
    return {
        "steps": steps,
        "seconds": seconds,
        "flops": steps * max(rank["flops"] for rank in ranks),
        "sent_bytes": steps * max(rank["sent_bytes"] for rank in ranks),
        "energy_j": None if a_step is None else a_step * steps,
        "energy_flag": energy["flag"],
    }


def _ratios(method: Mapping[str, Any], fastest: Mapping[str, Any]) -> dict[str, Any]:
    """A method over the fastest of those that train the dense model."""
    ratios: dict[str, Any] = {"step": _steps(method, fastest)}
    for name in ("sent_bytes", "flops", "weights", "peak_bytes"):
        ratios[name] = _ratio(method[name], fastest[name])
    mine, theirs = method["to_target"], fastest["to_target"]
    if mine and theirs:
        for name in ("steps", "seconds", "flops", "sent_bytes"):
            ratios[f"{name}_to_target"] = _ratio(mine[name], theirs[name])
        measured = all(t["energy_flag"] in ("measured_counter", "sampled_power") for t in (mine, theirs))
        ratios["energy_to_target"] = _ratio(mine["energy_j"], theirs["energy_j"]) if measured else None
    return ratios


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _steps(method: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """The step of a method over that of another, round by round."""
    pairs = sorted(a / b for a, b in zip(method["step_s"]["rounds"], other["step_s"]["rounds"], strict=False))
    return {"median": statistics.median(pairs), "low": pairs[0], "high": pairs[-1]}


def _warnings(request: Request, environment: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    warnings = []
    untuned = [m for m in methods if m != "smaller" and not request.tuned(m)]
    if "phantom" in methods and "phantom" in untuned and len(methods) > 1:
        warnings.append(
            "The learning rate was not tuned per method, and phantom's best need not be the dense one's. Compare "
            "losses only after trying, e.g. --set phantom.model.lr=..."
        )
    if "phantom" in methods and "smaller" not in methods:
        warnings.append(
            "A phantom model is a smaller function than the dense one. A dense model of as many weights is the fair "
            "control for its loss, and its row is missing here: --smaller."
        )
    if all(m["val_loss"] is None for m in methods.values()):
        warnings.append(f"No validation loss: the module logs no {request.monitor!r}; name it with --monitor.")
    flags = {t["energy_flag"] for m in methods.values() if (t := m["to_target"]) and t["energy_flag"]}
    if flags - {"measured_counter", "sampled_power"}:
        warnings.append(f"Joules here are {', '.join(sorted(flags))}, so no ratio of energies is given.")
    if environment["ranks"] // environment["hosts"] * environment["threads_per_rank"] > environment["cores"]:
        warnings.append("There are more busy threads than cores: the ranks take turns, which no cluster's do.")
    unsteady = [
        m for m, v in methods.items() if v["step_s"]["high"] - v["step_s"]["low"] > NOISY * v["step_s"]["median"]
    ]
    if unsteady:
        warnings.append(
            f"The rounds of {', '.join(unsteady)} differ by more than {NOISY:.0%}: the machine was not quiet."
        )
    return warnings
