"""Arithmetic, no torch: `count` (FLOPs, bytes, calls), `data_parallel` (of dense layers), `predict` (s), `scale`."""

from lightning_phantom.cost.count import Cost, CostEstimate, Layer, estimate_cost

__all__ = ["Cost", "CostEstimate", "Layer", "estimate_cost"]
