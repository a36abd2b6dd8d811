"""A dense model of as many weights as the phantom one: the fair control for its loss, made where the config lets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.config import PhantomConfig
from lightning_phantom.errors import PhantomError
from lightning_phantom.plan.finder import plan_phantom

# What models call the width of their feed-forward networks; the first that a model has is varied.
WIDTHS = (
    *("ffn_width", "ffn_dim", "ffn_hidden_size", "dim_feedforward", "intermediate_size", "mlp_dim", "mlp_width"),
    *("d_ff", "hidden_dim", "hidden_size", "hidden_features", "hidden", "width"),
)
GRAINS = (8, 1, 64)  # of what the width is a multiple: many models want one of the number of their heads
NEAR = 0.1  # how far from the phantom model's weights it may be


def smaller_argument(recipe: Recipe, config: PhantomConfig) -> tuple[str, int]:
    """The model's argument that makes it, dense, about as small as the phantom model: `("width", 512)`.

    Raises:
        PhantomError: there is none; why.
    """
    given: dict[str, Any] = vars(recipe.config.model.get("init_args") or Namespace())
    name = next((n for n in WIDTHS if n in given and (given[n] is None or isinstance(given[n], int))), None)
    if name is None:
        raise PhantomError(
            f"the model has no argument that names the width of its feed-forward networks ({', '.join(WIDTHS)}), which "
            f"could be varied. Give a smaller model's config with --smaller FILE."
        )
    plan = plan_phantom(module := recipe.make_module(), config)
    wanted = _weights(module) - sum(layer.weights_before - layer.weights_after for layer in plan.swapped)

    def weights(width: int) -> int:
        with torch.device("meta"):
            return _weights(recipe.make_module(**{name: width}))

    failure = ""
    for grain in GRAINS:
        try:
            width = _widest(weights, wanted, grain)
            found = weights(width)
        except Exception as error:  # the user's own model: any
            failure = f"the model does not take some of the values of {name!r} that were tried: {error}."
            continue
        if abs(found - wanted) <= NEAR * wanted:
            return name, width
        failure = f"with {name}={width} the dense model has {found:,} weights, and the phantom one {wanted:,}."
    raise PhantomError(f"{failure} Give a smaller model's config with --smaller FILE.")


def _widest(weights: Callable[[int], int], most: int, grain: int) -> int:
    """The largest multiple of `grain` with no more than `most` weights; the least there is if none has."""
    low, high = 1, 2
    while weights(high * grain) <= most:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weights(middle * grain) <= most else (low, middle)
    return low * grain


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
