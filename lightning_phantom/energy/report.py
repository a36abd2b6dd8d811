"""What `EnergyMonitor` has measured: the records that ranks exchange, and the report made of them.

Pure bookkeeping: no meter, no collective, no Lightning. Energy is in joules, time in seconds, power in watts; the
keys of the report say so in their names. A component that was not measured is None (`null` in the file), never 0.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
JOULES_PER_KWH = 3.6e6
COMPONENTS = ("gpu", "cpu", "ram")
PHASES = ("train", "validation", "other")
# How a number was obtained, from the best to the worst; a sum carries the worst flag of its parts.
FLAGS = ("measured_counter", "sampled_power", "user_constant", "modelled", "unavailable", "failed")
MISSING = ("unavailable", "failed")
MIN_GPU_WINDOW_S = 10.0


@dataclass(frozen=True)
class Energy:
    """Energy of a stretch of time, by component: joules, and the seconds that they cover."""

    duration_s: float = 0.0
    gpu_j: float = 0.0
    cpu_j: float = 0.0
    ram_j: float = 0.0

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Energy") -> "Energy":
        return Energy(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Ledger:
    """Charges each stretch between two cumulative readings to the phase in which it was spent.

    `spent` has one entry for each of `PHASES`, whose sum is the total, and "steady": the part of "train" that was
    spent while the flag `steady` was set.
    """

    def __init__(self, first: Energy):
        self._last = first
        self._phase = "other"
        self.steady = False
        self.spent = dict.fromkeys((*PHASES, "steady"), Energy())

    def charge(self, reading: Energy, next_phase: str) -> None:
        """Charge what was spent since the last reading to the phase that ends here."""
        stretch, self._last = reading - self._last, reading
        self.spent[self._phase] += stretch
        if self.steady and self._phase == "train":
            self.spent["steady"] += stretch
        self._phase = next_phase


@dataclass(frozen=True)
class Device:
    """The device that a rank trains on.

    Attributes:
        name: "cpu", or the accelerator's name.
        is_accelerator: Whether its energy belongs in the column "gpu".
        address: NVIDIA's UUID or AMD's PCI slot, the same to every rank of the host; None where unknown.
        is_mig: Whether it is sliced (MIG): the counter then holds the whole card, other tenants included.
        power_limit_w: The enforced power cap in watts.
    """

    name: str
    is_accelerator: bool = False
    address: str | None = None
    is_mig: bool = False
    power_limit_w: float | None = None


@dataclass(frozen=True)
class RankRecord:
    """What one rank tells the others about a fit.

    Attributes:
        rank: Global rank.
        host: Host name.
        device: What the rank trains on.
        is_owner: Whether it is the rank that meters its host.
        spent: The owner's `Ledger.spent`; None on other ranks and where the meter failed.
        flags: The owner's flag for each component; read only where `spent` is there.
        hardware: What codecarbon says that it tracks on the host.
        samples: Samples in this rank's steady batches; None where the batch size is unknown.
        steps: Optimizer steps in the steady window.
        grid_g_per_kwh: Carbon intensity that codecarbon applied, in g CO2e per kWh.
        shares_card: Whether a counter of the owner's holds dies of a card that no rank trains on.
        overhead_s: Seconds spent in the monitor's own hooks, waiting for the device at window edges included.
        problems: What went wrong.
    """

    rank: int
    host: str
    device: Device
    is_owner: bool = False
    spent: Mapping[str, Energy] | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    hardware: tuple[str, ...] = ()
    samples: int | None = None
    steps: int = 0
    grid_g_per_kwh: float | None = None
    shares_card: bool = False
    overhead_s: float = 0.0
    problems: tuple[str, ...] = ()


def worst_flag(flags: Iterable[str]) -> str:
    """The worst of the flags; "failed" when there is none."""
    return max(flags, key=FLAGS.index, default="failed")


def summarise(
    records: Sequence[RankRecord],
    *,
    replicas: int,
    country_iso_code: str | None = None,
    carbon_intensity: float | None = None,
    tokens_per_sample: float | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Merge the records of the ranks: joules are summed over the hosts, of times the longest is taken.

    A component that one host lacks is missing in the sum, for a part of a sum is not the sum.

    Args:
        records: One record per rank (of an incomplete report: this rank's only).
        replicas: Number of ranks that saw distinct batches; samples seen by several ranks are counted once.
        country_iso_code: Whose grid's average to use for CO2e, as codecarbon knows it.
        carbon_intensity: The user's, in g CO2e per kWh, used instead; without either, CO2e is omitted.
        tokens_per_sample: Tokens in a sample, for J per token.
        complete: False for what one rank saved after an exception.

    Returns:
        The report; `None` wherever a figure is not known.
    """
    owners = [record for record in records if record.is_owner]
    used = COMPONENTS if any(record.device.is_accelerator for record in records) else ("cpu", "ram")
    flags = _flags(owners)
    spans = {name: _row(name, owners, flags, used) for name in (*PHASES, "steady", "total")}
    total, steady = spans.pop("total"), spans.pop("steady")

    counts = [record.samples for record in records]
    known = [count for count in counts if count is not None]
    samples = sum(known) * replicas / len(records) if len(known) == len(counts) else None
    steps = max((record.steps for record in records), default=0)
    tokens = None if samples is None or tokens_per_sample is None else samples * tokens_per_sample
    steady |= {"steps": steps, "samples": samples}
    for unit, count in (("step", steps), ("sample", samples), ("token", tokens)):
        steady[f"J_per_{unit}"] = None if steady["total_J"] is None or not count else steady["total_J"] / count

    total_kwh = None if total["total_J"] is None else total["total_J"] / JOULES_PER_KWH
    carbon_source = "omitted"
    if carbon_intensity is not None:
        carbon_source = "user"
    elif country_iso_code is not None:
        carbon_source = f"codecarbon:{country_iso_code}"
        carbon_intensity = next((o.grid_g_per_kwh for o in owners if o.grid_g_per_kwh is not None), None)
    return {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "total": total,
        "total_kWh": total_kwh,
        "phases": spans,
        "steady": steady,
        "flags": {**flags, "total": total["flag"]},
        "co2e_kg": None if total_kwh is None or carbon_intensity is None else total_kwh * carbon_intensity / 1000,
        "carbon_g_per_kWh": carbon_intensity,
        "carbon_source": carbon_source,
        "overhead_s": max((record.overhead_s for record in records), default=0.0),
        "hosts": [_host(owner, records, used) for owner in owners],
        "devices": [{"rank": record.rank, "host": record.host, **vars(record.device)} for record in records],
        "warnings": _warnings(records, flags, total, steady, carbon_source, complete),
        "problems": {str(record.rank): list(record.problems) for record in records if record.problems},
    }


def _flags(owners: Sequence[RankRecord]) -> dict[str, str]:
    return {c: worst_flag("failed" if o.spent is None else o.flags[c] for o in owners) for c in COMPONENTS}


def _row(span: str, owners: Sequence[RankRecord], flags: Mapping[str, str], used: Sequence[str]) -> dict[str, Any]:
    parts = [
        sum((o.spent[p] for p in PHASES), Energy()) if span == "total" else o.spent[span]
        for o in owners
        if o.spent is not None
    ]
    is_whole = bool(parts) and len(parts) == len(owners)
    duration_s = max(part.duration_s for part in parts) if is_whole else None
    joules = {
        c: math.fsum(getattr(part, f"{c}_j") for part in parts) if is_whole and flags[c] not in MISSING else None
        for c in COMPONENTS
    }
    addends = [joules[c] for c in used]
    total_j = None if None in addends else math.fsum(j for j in addends if j is not None)
    return {
        "duration_s": duration_s,
        **{f"{c}_J": joules[c] for c in COMPONENTS},
        "total_J": total_j,
        "avg_power_W": total_j / duration_s if total_j is not None and duration_s else None,
        "flag": worst_flag(flags[c] for c in used),
    }


def _host(owner: RankRecord, records: Sequence[RankRecord], used: Sequence[str]) -> dict[str, Any]:
    flags = _flags([owner])
    return {
        "host": owner.host,
        "owner_rank": owner.rank,
        **_row("total", [owner], flags, used),
        "flags": flags,
        "hardware": list(owner.hardware),
    }


def _warnings(
    records: Sequence[RankRecord],
    flags: Mapping[str, str],
    total: Mapping[str, Any],
    steady: Mapping[str, Any],
    carbon_source: str,
    complete: bool,
) -> dict[str, str]:
    found = {}
    if not complete:
        found["incomplete"] = "The fit ended with an exception; only what this rank metered is reported."
    if not steady["steps"]:
        found["no_steady_window"] = "No optimizer step was taken after the warm-up: there are no steady figures."
    elif steady["gpu_J"] is not None and steady["duration_s"] < MIN_GPU_WINDOW_S:
        found["window_too_short"] = (
            f"The steady window lasted {steady['duration_s']:.1f} s; GPU counters need {MIN_GPU_WINDOW_S:.0f} s."
        )
    if total["gpu_J"] == 0:
        found["gpu_zero_suspect"] = "The GPUs reported exactly 0 J: their counter is probably not working."
    if any(record.device.is_accelerator for record in records) and flags["gpu"] == "unavailable":
        found["gpu_unavailable"] = "An accelerator has no meter that can be read, or it stood still: there is no total."
    if any(record.device.is_mig for record in records):
        found["mig"] = "A GPU is sliced (MIG): its counter holds the whole card, other tenants included."
    if any(record.shares_card for record in records):
        found["shared_card"] = (
            "The job uses a part of a card with one counter: it holds the whole, other jobs included."
        )
    if carbon_source.startswith("codecarbon"):
        found["carbon_source"] = f"CO2e uses a yearly national average ({carbon_source}), not this grid at this hour."
    if steady["samples"] is None and complete:
        found["samples_unknown"] = "No batch size could be read from a batch: there are no figures per sample."
    return found
