"""Arithmetic, no torch: `count` (FLOPs, bytes, calls), `predict` (seconds), `scale` (other numbers of ranks)."""

from lightning_phantom.cost.count import Cost, CostEstimate, Layer, estimate_cost

__all__ = ["Cost", "CostEstimate", "Layer", "estimate_cost"]
