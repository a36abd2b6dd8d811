"""What a conversion did to each layer, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ConvertedLayer:
    """What a conversion did to one layer; errors are Frobenius norms or root mean squares, relative to the dense layer.

    Attributes:
        name: of the layer.
        in_features: width of its input.
        out_features: width of its output.
        num_blocks: p after the conversion; None: it is dense.
        phantom_width: k after the conversion; None: it is dense.
        weight_error: of the weight.
        plain_output_error: of the outputs for held-out inputs, without calibration; None: not measured.
        output_error: the same of what was written.
        weights_before: parameters before.
        weights_after: parameters after.
    """

    name: str
    in_features: int
    out_features: int
    num_blocks: int | None
    phantom_width: int | None
    weight_error: float
    plain_output_error: float | None
    output_error: float | None
    weights_before: int
    weights_after: int


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, layer by layer; rich prints it as a table."""

    layers: tuple[ConvertedLayer, ...]

    @property
    def weights_before(self) -> int:
        """Parameters of the converted layers before."""
        return sum(layer.weights_before for layer in self.layers)

    @property
    def weights_after(self) -> int:
        """Parameters of the converted layers after."""
        return sum(layer.weights_after for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        totals = {"weights_before": self.weights_before, "weights_after": self.weights_after}
        return {"layers": [asdict(layer) for layer in self.layers], **totals}

    def __rich__(self) -> Any:
        """Render the report as a rich table."""
        from rich.table import Table

        calibrated_too = any(layer.output_error is not None for layer in self.layers)
        table = Table(title="Converted layers", title_justify="left")
        columns = ["layer", "in", "out", "p", "k", "weight error"]
        columns += ["output error, plain", "calibrated"] if calibrated_too else []
        for column in (*columns, "weights before", "after"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for layer in self.layers:
            errors = [layer.weight_error] + [layer.plain_output_error, layer.output_error] * calibrated_too
            sizes = (layer.in_features, layer.out_features, layer.num_blocks, layer.phantom_width)
            table.add_row(
                layer.name,
                *("-" if size is None else str(size) for size in sizes),
                *("-" if error is None else f"{error:.4f}" for error in errors),
                f"{layer.weights_before:,}",
                f"{layer.weights_after:,}",
            )
        table.add_section()
        empty = [""] * (len(table.columns) - 3)
        table.add_row("all of them", *empty, f"{self.weights_before:,}", f"{self.weights_after:,}")
        return table
