"""What a user asks for, checked when it is written down rather than when it first hurts."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

from lightning_phantom.errors import PhantomError

PLAN_WORDS = ("phantom", "skip")
INITS = ("auto", "from_dense", "random", "block_diagonal")
MIXINGS = ("pairwise", "private")
LATENTS = ("own", "both", "previous")
STYLES = ("megatron", "layerwise")


@dataclass(frozen=True)
class PhantomConfig:
    """How a module is to be put into phantom-parallel layout.

    Args:
        num_blocks: p, the number of diagonal blocks of every swapped layer, at least 2. It belongs to the model, not to
            the machine: any number of ranks that divides p computes the same function.
        phantom_width: k, the number of features that each block sends to the others. An `int` is k itself, clamped
            to the largest useful one of each layer; a `float` f in (0, 1] gives
            `max(1, floor(f * min(in_features, out_features) / p))`, and half of that, at least 1, where
            `mixing="private"`: a block sends p - 1 of those.
        plan: `{"glob of module name": word}` with the words `"phantom"` and `"skip"`; later entries win over earlier
            ones and unnamed layers stay dense. `None` finds the feed-forward networks.
        init: `"from_dense"` (the best phantom approximation of the dense weights), `"random"`, `"block_diagonal"`, or
            `"auto"`: `"from_dense"` where weights exist and `"random"` on the meta device.
        seed: seeds the random initialisations, together with the layer's name and the block's index.
        mixing: `"pairwise"`, a block's k latents go to all others, or `"private"`, it makes k latents for each of them.
        latents: in a chain of three or more linears that elementwise operations join, which latents a layer reads:
            `"own"`, made of its own input, `"both"`, those of the layer before it as well, or `"previous"`, made of
            that layer's input. The first of a chain, and layers that form none, read their own.

    Raises:
        PhantomError: an argument has the wrong type or an impossible value.

    Examples:
        >>> PhantomConfig(num_blocks=8, phantom_width=0.5, plan={"*.mlp.*": "phantom"})  # doctest: +SKIP
    """

    num_blocks: int
    phantom_width: int | float = 0.25
    plan: Mapping[str, str] | None = None
    init: str = "auto"
    seed: int = 0
    mixing: str = "pairwise"
    latents: str = "own"

    layer_kind: ClassVar[str] = "phantom"
    is_exact: ClassVar[bool] = False
    parts_name: ClassVar[str] = "num_blocks"

    def __post_init__(self) -> None:
        if not is_int(self.num_blocks) or self.num_blocks < 2:
            raise PhantomError(
                f"num_blocks={self.num_blocks!r}: needs an int of at least 2. With one block a phantom layer "
                f"is the dense layer itself; to train dense, leave the strategy out."
            )
        check_phantom_width(self.phantom_width)
        check_plan_words(self.plan)
        if self.init not in INITS:
            raise PhantomError(f"init={self.init!r}: choose one of {', '.join(map(repr, INITS))}.")
        check_mixing(self.mixing, self.latents)
        if not is_int(self.seed) or not 0 <= self.seed < 2**64:
            raise PhantomError(f"seed={self.seed!r}: needs an int in [0, 2**64).")

    @property
    def parts(self) -> int:
        """The number of equal parts that the features of a layer are cut into: p."""
        return self.num_blocks

    def decision(self, depth: int) -> str:
        """What a plan calls a layer that is swapped, with `depth` others before it in its FFN."""
        return "phantom"

    def width_of(self, in_features: int, out_features: int) -> int | None:
        """The phantom width k of a layer of these sizes."""
        return resolve_phantom_width(self.phantom_width, in_features, out_features, self.num_blocks, self.mixing)

    def __str__(self) -> str:
        mixing = "" if self.mixing == "pairwise" else f", mixing={self.mixing}"
        latents = "" if self.latents == "own" else f", latents={self.latents}"
        return f"num_blocks={self.num_blocks}{mixing}{latents}"


@dataclass(frozen=True)
class TensorParallelConfig:
    """How a module is to be put into tensor-parallel layout, which computes what it did before.

    Args:
        num_ranks: R, between which every swapped layer is split.
        plan: as in `PhantomConfig`; what it calls `"phantom"` is swapped here, too.
        style: `"megatron"`, pairs of a column- and a row-parallel layer with one all-reduce each way, or
            `"layerwise"`, column-parallel layers that gather their input and scatter the sum of its gradient.
        seed: seeds the weights of layers on the meta device, together with the layer's name.

    Raises:
        PhantomError: an argument has the wrong type or an impossible value.
    """

    num_ranks: int
    plan: Mapping[str, str] | None = None
    style: str = "megatron"
    seed: int = 0

    layer_kind: ClassVar[str] = "tensor-parallel"
    is_exact: ClassVar[bool] = True
    parts_name: ClassVar[str] = "num_ranks"
    init: ClassVar[str] = "from_dense"
    mixing: ClassVar[str] = "pairwise"
    latents: ClassVar[str] = "own"

    def __post_init__(self) -> None:
        if not is_int(self.num_ranks) or self.num_ranks < 1:
            raise PhantomError(f"num_ranks={self.num_ranks!r}: needs an int of at least 1.")
        check_plan_words(self.plan)
        if self.style not in STYLES:
            raise PhantomError(f"style={self.style!r}: choose one of {', '.join(map(repr, STYLES))}.")

    @property
    def parts(self) -> int:
        """The number of equal parts that the features of a layer are cut into: R."""
        return self.num_ranks

    def decision(self, depth: int) -> str:
        """How a layer with `depth` others before it in its FFN is cut: in Megatron's pairs by column, then by row."""
        return "rowwise" if self.style == "megatron" and depth % 2 else "colwise"

    def width_of(self, in_features: int, out_features: int) -> None:
        """None: an exact layer has no phantom width."""

    def __str__(self) -> str:
        return f"num_ranks={self.num_ranks}, style={self.style}"


Config = PhantomConfig | TensorParallelConfig


def resolve_phantom_width(
    phantom_width: int | float, in_features: int, out_features: int, num_blocks: int, mixing: str = "pairwise"
) -> int:
    """Return k for one layer: at least 1, and at most what adds anything to its off-diagonal blocks.

    What one set of compressors serves is a matrix [(p-1) * out/p, in/p] in pairwise mixing, the off-diagonal part of a
    block column, and a single block [out/p, in/p] in private mixing. A k above the smaller of its sizes buys nothing:
    beyond it the layer already holds every dense matrix. A fraction gives private mixing half, at least 1, of what it
    gives pairwise mixing.
    """
    block_in, block_out = in_features // num_blocks, out_features // num_blocks
    private = mixing == "private"
    k_max = min(block_in, block_out if private else (num_blocks - 1) * block_out)
    if isinstance(phantom_width, Integral):
        return min(int(phantom_width), k_max)
    k = math.floor(phantom_width * min(in_features, out_features) / num_blocks)
    return min(max(1, k // 2 if private else k), k_max)


def num_blocks_of_environment() -> int | None:
    """P as `PHANTOM_NUM_BLOCKS` says, for who can give no num_blocks; None where it is not set.

    Raises:
        PhantomError: it is no number of blocks.
    """
    said = os.environ.get("PHANTOM_NUM_BLOCKS")
    if said is not None and not (said.isdecimal() and int(said) >= 2):
        raise PhantomError(f"PHANTOM_NUM_BLOCKS={said!r} in the environment: needs an integer of at least 2.")
    return None if said is None else int(said)


def check_phantom_width(phantom_width: object) -> None:
    """Raise PhantomError unless `phantom_width` is an int >= 1 or a float in (0, 1]."""
    if is_int(phantom_width):
        if phantom_width < 1:  # type: ignore[operator]
            raise PhantomError(f"phantom_width={phantom_width!r}: k must be at least 1.")
    elif isinstance(phantom_width, Real) and not isinstance(phantom_width, bool):
        if not 0 < float(phantom_width) <= 1:  # also refuses NaN
            raise PhantomError(
                f"phantom_width={phantom_width!r}: a float is a fraction of the block width and must lie in (0, 1]. "
                f"For k itself pass an int."
            )
    else:
        raise PhantomError(
            f"phantom_width={phantom_width!r}: needs an int (k) or a float (fraction of the block width)."
        )


def check_mixing(mixing: object, latents: object) -> None:
    """Raise PhantomError unless both are words of `PhantomConfig`."""
    for name, value, words in (("mixing", mixing, MIXINGS), ("latents", latents, LATENTS)):
        if value not in words:
            raise PhantomError(f"{name}={value!r}: choose one of {', '.join(map(repr, words))}.")


def check_plan_words(plan: object) -> None:
    """Raise PhantomError unless `plan` is None or a mapping from globs to the plan's words."""
    if plan is None:
        return
    if not isinstance(plan, Mapping):
        raise PhantomError(
            f"plan={plan!r}: needs a mapping from globs of module names to words, like {{'net.*': 'phantom'}}."
        )
    if not plan:
        raise PhantomError("plan={}: names no layer. Pass None to have the feed-forward networks found.")
    for glob, word in plan.items():
        if not isinstance(glob, str) or word not in PLAN_WORDS:
            raise PhantomError(
                f"plan entry {glob!r}: {word!r} is not a word of the plan; choose one of "
                f"{', '.join(map(repr, PLAN_WORDS))}."
            )


def is_int(value: object) -> bool:
    """Whether `value` is an integer; `True` and `False` are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
