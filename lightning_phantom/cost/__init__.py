"""Arithmetic, no torch: `count` (FLOPs, bytes, calls of a `layer`), `data_parallel` (dense), `predict` (s), `scale`."""

from lightning_phantom.cost.count import Cost, CostEstimate, estimate_cost
from lightning_phantom.cost.layer import Layer

__all__ = ["Cost", "CostEstimate", "Layer", "estimate_cost"]
