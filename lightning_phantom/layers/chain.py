"""What a layer of a chain hands to the next one beside its output: latents.

A layer that reads latents of the one before it (its predecessor) finds them in its `Mailbox`. The predecessor is fixed
when the layer is made. Each of its calls leaves what this layer is to read, and each call of this layer takes it out:
so a layer reads the latents of its predecessor's latest call, whatever has been done to the activation between, and on
any number of ranks alike. Where there are none, or they do not belong to what the layer reads, that is an error:
without them it would be another function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_phantom.errors import LayoutError, PhantomError
from lightning_phantom.layers.operator import Message


class Letter(NamedTuple):
    """Latents for a layer's next call.

    Attributes:
        latents: as they arrive, [R, T, w].
        message: how they travel; None: they are there.
        rows: how many tokens each rank holds.
        mode: under which they were made: autograd, and whether a checkpoint is being recomputed.
    """

    latents: Tensor
    message: Message | None
    rows: tuple[Any, ...]
    mode: tuple[object, ...]


class Mailbox:
    """Where a layer finds the latents of the layer before it. A copy of it is empty, and so is what is pickled."""

    def __init__(self) -> None:
        self.letter: Letter | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Mailbox:
        return Mailbox()

    def __reduce__(self) -> Any:
        return Mailbox, ()

    def take(self, reader: str, predecessor: str, rows: tuple[Any, ...], dtype: torch.dtype) -> Letter:
        """Take out what is there.

        Raises:
            LayoutError: there is nothing, or what does not belong to the reader's input.
        """
        letter, self.letter = self.letter, None
        if letter is None:
            raise LayoutError(
                f"{reader!r} reads latents of {predecessor!r}, which has not been called since {reader!r} was last. "
                f"{_CURE}"
            )
        if letter.rows != rows or letter.latents.dtype != dtype:
            raise LayoutError(
                f"{reader!r} reads latents of {predecessor!r}, but was given {_total(rows)} rows of {dtype} where "
                f"{predecessor!r} was last called with {_total(letter.rows)} of {letter.latents.dtype}. {_CURE}"
            )
        if letter.mode != mode():
            raise LayoutError(
                f"{reader!r} reads latents of {predecessor!r}, which was called with gradients on or off where "
                f"{reader!r} is not, or by another recomputation of a checkpoint. {_CURE}"
            )
        return letter


_CURE = (
    "Call the layers of a chain one after the other, on the same tokens, inside or outside of an activation checkpoint "
    "or no_grad() together; or set latents='own'."
)


def mode() -> tuple[object, ...]:
    """What must be alike when latents are made and read."""
    if torch.compiler.is_compiling():
        return ()
    return torch.is_grad_enabled(), torch._C._current_graph_task_id()


def _total(rows: tuple[Any, ...]) -> Any:
    return rows[0] if len(rows) == 1 else list(rows)


def check_predecessor(
    predecessor: Any, latents: str, num_blocks: int, mixing: str, process_group: ProcessGroup | None
) -> None:
    """Raise PhantomError where a layer cannot read what `predecessor` leaves for it."""
    if (predecessor is not None) != (latents != "own"):
        raise PhantomError(
            f"latents={latents!r}: needs a predecessor, the layer before it in its chain."
            if predecessor is None
            else "a predecessor is read where latents is 'both' or 'previous': this layer reads its own."
        )
    if predecessor is not None and predecessor.ranks.process_group is not process_group:
        raise PhantomError("the predecessor lies on other ranks: give both layers the same process_group.")
    if predecessor is not None and (predecessor.num_blocks, predecessor.mixing) != (num_blocks, mixing):
        raise PhantomError(
            f"the predecessor has num_blocks={predecessor.num_blocks}, mixing={predecessor.mixing!r}, the layer "
            f"num_blocks={num_blocks}, mixing={mixing!r}: they must be the same."
        )
    if latents == "both" and predecessor.latents == "previous":
        raise PhantomError("latents='both' needs a predecessor that makes latents of its own input.")
