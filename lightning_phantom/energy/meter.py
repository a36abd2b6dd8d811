"""The meter under `EnergyMonitor`: one codecarbon tracker, read as cumulative snapshots.

codecarbon is imported inside functions: importing this module does not load it and touches no device.
codecarbon swallows its own exceptions, so what counts as working here is a reading that has arrived.
"""

import logging
import math
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_phantom.energy.cards import Card
from lightning_phantom.energy.report import COMPONENTS, JOULES_PER_KWH, Energy, worst_flag


class Meter:
    """A running tracker whose readings only ever grow.

    Args:
        options: From `tracker_options`.
        tracker_factory: Called like codecarbon's `OfflineEmissionsTracker`, with `output_handlers` among the keyword
            arguments; returns an object with `start()`, `flush()` and `stop()`. On `flush()` it hands a reading with
            the fields of codecarbon's `EmissionsData` to `output_handlers[0].out(total, delta)`.
        cards: What `options["gpu_ids"]` counts, card by card.

    Attributes:
        last: The newest reading.
        grid_g_per_kwh: Carbon intensity that codecarbon applied, in g CO2e per kWh; None before there was energy.

    Raises:
        RuntimeError: No reading arrived after the start.
    """

    def __init__(
        self,
        options: dict[str, Any],
        tracker_factory: Callable[..., Any] | None = None,
        cards: Sequence[Card] = (),
    ):
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.output_methods.base_output import BaseOutput

        # The constructor logs before it applies `log_level`, and the import has just set the level to INFO.
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self.grid_g_per_kwh: float | None = None
        self._options = options
        self._cards = cards
        self._first_kwh: dict[int, float] = {}
        self._arrived: list[Any] = []
        self.last = Energy()
        sink = type("Sink", (BaseOutput,), {"out": lambda _, total, delta: self._arrived.append(total)})()
        self._tracker = (tracker_factory or OfflineEmissionsTracker)(**options, output_handlers=[sink])
        self._is_running = True
        try:
            self._tracker.start()
            self.read()
        except Exception:
            self.stop()
            raise
        with suppress(Exception):  # unknown internals: `flags` does without
            self._first_kwh = {die.gpu_index: _counter_kwh(die) for die in self._dies()}

    def read(self) -> Energy:
        """What has been spent since the start.

        Returns:
            Joules per component and seconds, both cumulative. Joules are at most 50 ms older than the seconds.

        Raises:
            RuntimeError: No reading arrived, or one that cannot be true.
        """
        self._arrived.clear()
        self._tracker.flush()
        if not self._arrived:
            raise RuntimeError("codecarbon delivered no reading")
        data = self._arrived[-1]
        energy = Energy(float(data.duration), *(getattr(data, f"{c}_energy") * JOULES_PER_KWH for c in COMPONENTS))
        growth = energy - self.last
        if not all(math.isfinite(value) and value >= 0 for value in vars(growth).values()):
            raise RuntimeError(f"codecarbon delivered {energy} after {self.last}: a meter cannot run backwards")
        self.last = energy
        if data.energy_consumed > 0:
            self.grid_g_per_kwh = 1000 * data.emissions / data.energy_consumed
        return energy

    def stop(self) -> None:
        """Stop the tracker and its threads; once is enough."""
        is_running, self._is_running = self._is_running, False
        if is_running:
            self._tracker.stop()

    @property
    def hardware(self) -> tuple[str, ...]:
        """What codecarbon says that it tracks, in its own words; empty where it does not say."""
        try:
            return tuple(str(part) for part in self._tracker._conf["hardware"])
        except Exception:
            return ()

    def flags(self) -> dict[str, str]:
        """How each component's joules are obtained: one of `energy_report.FLAGS`.

        codecarbon does not publish this, so it is read off the tracker's parts; what is not recognised is "modelled".
        """
        flags = dict.fromkeys(COMPONENTS, "modelled")
        try:
            flags.update(self._flags_of_parts())
        except Exception:
            logging.getLogger(__name__).debug("unknown codecarbon internals; flags stay 'modelled'", exc_info=True)
        if not self._cards:
            flags["gpu"] = "unavailable"
        return flags

    def _flags_of_parts(self) -> dict[str, str]:
        found = {"gpu": "unavailable"}
        for part in self._tracker._hardware:
            kind = type(part).__name__
            if kind == "RAM" and self._options["force_ram_power"] is not None:
                found["ram"] = "user_constant"
            elif kind == "CPU":
                found["cpu"] = {
                    "intel_rapl": "measured_counter",
                    "windows_emi": "measured_counter",
                    "intel_power_gadget": "sampled_power",
                    "constant": "modelled" if self._options["force_cpu_power"] is None else "user_constant",
                }.get(part._mode, "modelled")
            elif kind in ("AppleSiliconChip", "Raspberry"):
                found[part.chip_part.lower()] = "sampled_power"
            elif kind == "GPU":
                found["gpu"] = worst_flag(self._flag_of_card(card) for card in self._cards)
        return found

    def _dies(self) -> list[Any]:
        """All devices of the host that codecarbon knows."""
        parts = getattr(self._tracker, "_hardware", ())
        return [die for part in parts if type(part).__name__ == "GPU" for die in part.devices.devices]

    def _flag_of_card(self, card: Card) -> str:
        """One die speaks for a card, by a counter that has moved or by its power; if none or two do, it has no figure.

        A die that counts for nobody reads 0, as does a broken counter, and codecarbon takes either for a measured 0.
        """
        dies = [die for die in self._dies() if die.gpu_index in card.indices]
        sampled = [die for die in dies if die._use_power_fallback and die.power.kW > 0]
        counted = [
            die for die in dies if not die._use_power_fallback and _counter_kwh(die) > self._first_kwh[die.gpu_index]
        ]
        if len(counted) + len(sampled) != 1:
            return "unavailable"
        return "measured_counter" if counted else "sampled_power"


def _counter_kwh(die: Any) -> float:
    return 0.0 if die.last_energy is None else float(die.last_energy.kWh)


def tracker_options(
    *,
    measure_power_secs: float,
    country_iso_code: str | None,
    cpu_power_w: float | None,
    ram_power_w: float | None,
    gpu_indices: Sequence[int],
) -> dict[str, Any]:
    """Every option of codecarbon's tracker but the handlers: what is left unset, its files and environment fill in.

    Args:
        measure_power_secs: Seconds between codecarbon's own readings.
        country_iso_code: Three letters, or None.
        cpu_power_w: Power of all CPUs at full load, in watts.
        ram_power_w: Constant power of the memory, in watts.
        gpu_indices: codecarbon's numbers of the GPUs to count.
    """
    return {
        "project_name": "lightning_phantom",
        "experiment_id": "",
        "experiment_name": "",
        "measure_power_secs": measure_power_secs,
        "tracking_mode": "machine",
        "gpu_ids": list(gpu_indices),
        "force_cpu_power": cpu_power_w,
        "force_ram_power": ram_power_w,
        "force_mode_cpu_load": False,
        "rapl_include_dram": False,
        "rapl_prefer_psys": False,
        "pue": 1.0,
        "wue": 0.0,
        "country_iso_code": country_iso_code,
        "country_2letter_iso_code": None,
        "region": None,
        "cloud_provider": None,
        "cloud_region": None,
        "force_carbon_intensity_g_co2e_kwh": None,
        # Empty, not None: None would let a deprecated token from the environment in, and with it the network.
        "electricitymaps_api_token": "",
        # The lock that False takes replaces the process's SIGINT and SIGTERM handlers.
        "allow_multiple_runs": True,
        "output_methods": [],
        "output_dir": tempfile.gettempdir(),
        "output_file": "",
        "on_csv_write": "append",
        "emissions_endpoint": None,
        "api_call_interval": -1,
        "api_endpoint": None,
        "api_key": None,
        "prometheus_url": None,
        "logging_logger": None,
        "metadata": None,
        "log_level": "error",
        "logger_preamble": "",
    }


def is_known_country(country_iso_code: str) -> bool:
    """Whether codecarbon has an energy mix for the country; otherwise it would silently take the world's average."""
    try:
        from codecarbon.input import DataSource

        source: Any = DataSource
        return country_iso_code in source().get_global_energy_mix_data()
    except Exception:
        return True


def host_id() -> str:
    """The same for all processes on a host, containers included, and different between hosts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
