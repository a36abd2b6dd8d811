"""Lightning, by the one of its two names that this process goes by: `lightning.pytorch`, or `pytorch_lightning`.

Both hold the same library, but the classes of one are strangers to the other. Everything here takes them from `pl`,
`fabric` and `cli`. Which name they stand for is settled at their first use: by then a program has imported its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_phantom.errors import PhantomError

if TYPE_CHECKING:
    import lightning.fabric as fabric
    import lightning.pytorch as pl
    from lightning.pytorch import cli

__all__ = ["cli", "fabric", "pl", "settle"]

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def settle(name: str) -> None:
    """Go by `name` from now on.

    Raises:
        PhantomError: this process goes by the other name already.
    """
    settled = globals().setdefault("pl", import_module(name)).__name__
    if settled != name:
        raise PhantomError(
            f"lightning_phantom goes by {settled} in this process, and {name} asks for it: the two names of Lightning "
            f"do not mix. Import one of them alone, or {name} first."
        )
    globals()["fabric"] = import_module(_FABRIC[name])


def __getattr__(attribute: str) -> Any:
    if attribute not in ("pl", "fabric", "cli"):
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    if "pl" not in globals():
        loaded = {of: any(name in sys.modules for name in (of, _FABRIC[of])) for of in _FABRIC}
        alone = loaded["pytorch_lightning"] and not loaded["lightning.pytorch"]
        settle("pytorch_lightning" if alone else "lightning.pytorch")
    if attribute == "cli":  # imports jsonargparse: only where it is asked for
        globals()["cli"] = import_module(f"{globals()['pl'].__name__}.cli")
    return globals()[attribute]
