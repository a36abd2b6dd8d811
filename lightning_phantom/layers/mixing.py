"""The mixings, by name: how the blocks of a phantom layer let each other know (`cut.Mixing`)."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_phantom.layers.cut import Mixing
from lightning_phantom.layers.pairwise import Pairwise
from lightning_phantom.layers.private import Private

MIXINGS: Mapping[str, Mixing] = {"pairwise": Pairwise(), "private": Private()}
