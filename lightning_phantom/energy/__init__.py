"""What a fit costs in joules: `monitor` (callback), `fit`, `cards`, `meter`, `report`, `show`; on `errors` alone."""

from lightning_phantom.energy.monitor import EnergyMonitor

__all__ = ["EnergyMonitor"]
