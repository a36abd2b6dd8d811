"""What a fit costs in joules: `monitor` (the callback), `meter`, `fit`, `report`, `show`. Imports `errors` alone."""

from lightning_phantom.energy.monitor import EnergyMonitor

__all__ = ["EnergyMonitor"]
