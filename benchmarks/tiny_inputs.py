"""Something to feed a model: the first inputs that its forward takes, found by trying."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import linecache
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from in_float64 import InFloat64
from special_models import INPUTS
from tiny_models import parts_of
from torch import Tensor, nn

TRIES, SECONDS, REPEATS = 40, 3, 9
SIDE, TOKENS, FRAMES = 4, 8, 32  # patches on the side of an image, tokens of a text, steps of a sound

KNOWN = (
    "input_ids decoder_input_ids pixel_values pixel_values_videos input_values input_features bbox "
    "inputs_embeds hidden_states grid_thw past_values query_embeds"
).split()
MELS = (
    "num_mel_bins num_mel_bands input_feat_per_channel feature_size mel_bins n_mels input_feat_size input_size "
    "feature_projection_input_dim"
).split()
PATCHED = re.compile(r"grid_thw|grid_hw|spatial_shapes|target_sizes|(pixel|image)_position_ids")
SWITCH = re.compile(r"^(return|output|use|interpolate)_")
PICTURE = re.compile(r"pixel|image|video|frames|prompt_depth")
SOUND = re.compile(r"values|audio|wave|speech|spectrogram|features|mel|feats")
HIDDEN = re.compile(r"hidden|embeds|states|query")


class Feed:
    """Inputs for a model: what its forward needs, and what it misses when it is tried."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model, self.batch, self.config = model, batch, model.config
        self.parameters = inspect.signature(model.forward).parameters
        self.inputs: dict[str, Any] = {}
        self.errors: list[Exception] = []
        self.left, self.until = TRIES, time.process_time() + SECONDS
        special = INPUTS.get(self.config.model_type, {})
        if special and special.keys() <= self.parameters.keys():
            self.inputs = {name: self.special(*what) for name, what in special.items()}
            self.tried()
        elif not any(map(self.settled, self.sets())):
            raise self.errors[0]

    def __call__(self, part: slice) -> dict[str, Any]:
        """The inputs for a part of the batch."""
        return {
            name: x[len(x) * part.start // self.batch : len(x) * part.stop // self.batch]
            if isinstance(x, Tensor) and x.dim()
            else x
            for name, x in self.inputs.items()
        }

    # The search

    def tried(self) -> None:
        """Raise what the model does on these inputs, and where nothing sensible comes out."""
        with torch.no_grad(), InFloat64():
            torch.manual_seed(0)
            outputs = list(tensors_in(self.model(**self.inputs)))
        if not outputs:
            raise ValueError("it has no output of floating point numbers")
        if not all(torch.isfinite(x).all() for x in outputs):
            raise ArithmeticError("its outputs are not finite")

    def sets(self) -> list[list[str]]:
        """Names of arguments to begin with: the needed ones, and one or another of those that models mostly take."""
        parameters = self.parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        needed = [n for n in needed if "cache" not in n]
        main = getattr(self.model, "main_input_name", "input_ids")
        sets = [[main, "decoder_input_ids"], [main], ["input_ids"], KNOWN, *([n] for n in KNOWN)]
        return [[*dict.fromkeys([*needed, *(n for n in names if n in self.parameters)])] for names in sets]

    def settled(self, names: list[str], depth: int = 5) -> bool:
        """Whether the forward takes these inputs in one of their shapes, with what else it asks for."""
        hints: list[int] = []
        seen: set[Any] = set()
        while self.left > 0 and time.process_time() < self.until:
            choices = itertools.product(*(list(self.candidates(name, hints)) for name in names))
            inputs = next((c for c in choices if tuple(map(_key, c)) not in seen), None)
            if inputs is None:
                return False
            seen.add(tuple(map(_key, inputs)))
            self.left -= 1
            self.inputs = dict(zip(names, inputs, strict=True))
            try:
                self.tried()
                return True
            except Exception as error:
                self.errors.append(error)
                if [str(e) for e in self.errors].count(str(error)) > REPEATS:
                    return False
                missed = [n for n in self.missed_by(error) if n not in names]
                if missed and depth and self.settled([*names, missed[0]], depth - 1):
                    return True
                hints += [n for n in numbers_in(error) if n not in hints]
        return False

    def missed_by(self, error: Exception) -> list[str]:
        """Arguments that an error speaks of, or that are None in the line where it was raised."""
        found = [n for n in re.findall(r"\w+", str(error)) if n in self.parameters]
        if any(n in self.inputs for n in found) and re.search("exactly|both|same time|either", str(error)):
            return []
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        for frame in reversed(inspect.getinnerframes(error.__traceback__, 0)[-6:]):  # type: ignore[arg-type]
            values, code = frame.frame.f_locals, frame.frame.f_code
            allowed = {*self.parameters, *(code.co_varnames[: code.co_argcount] if open_ended else ())}
            line = re.findall(r"\w+", linecache.getline(frame.filename, frame.lineno))
            found += [n for n in line if n in allowed and n in values and values[n] is None]
        return [n for n in dict.fromkeys(found) if n not in ("self", "kwargs", "labels")]

    # What an argument may be

    def special(self, *what: Any) -> Any:
        """An input as `special_models` writes it: what it holds, if not waves, and its shape behind the batch."""
        kind, shape = (what[0], what[1:]) if what[0] in FILLED else ("waves", what)
        return FILLED[kind](self.batch, *(self.of(n, 0) if isinstance(n, str) else n for n in shape))

    def candidates(self, name: str, hints: list[int]) -> Iterator[Any]:
        """What may be an argument of this name, likely shapes first; a number in an error may be a width."""
        b, patched = self.batch, any(map(PATCHED.search, self.parameters))
        widths = [n for n in hints if 3 <= n <= 4096]
        if SWITCH.search(name):
            yield True
        elif "grid_thw" in name:
            yield torch.tensor([[1, SIDE, SIDE]] * b)
        elif re.search(r"grid|spatial_shapes|target_sizes|tgt_sizes", name):
            yield torch.tensor([[SIDE, SIDE]] * b)
        elif name == "merge_sizes":
            yield torch.tensor([1] * b)
        elif "position_ids" in name and "pixel" in name:
            yield torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).expand(b, -1, -1)
        elif name.endswith("position_ids"):
            yield FILLED["count"](b, TOKENS)
        elif "mask" in name:
            kind = "seen" if "feature" in name or "bool" in str(self.parameters.get(name)).lower() else "ones"
            there = [x.shape[1:] for x in self.inputs.values() if isinstance(x, Tensor) and x.dim() > 1]
            yield from (FILLED[kind](b, n) for n in dict.fromkeys([*itertools.chain(*there), TOKENS]))
            yield FILLED[kind](b, *self.sides())
        elif name == "bbox":
            yield torch.arange(b * TOKENS * 4).view(b, TOKENS, 4) % 3 + torch.tensor([1, 1, 10, 10])
        elif PICTURE.search(name) and not name.endswith("_ids"):
            yield from self.patches(widths) if patched else ()
            yield from self.pictures("video" in name or "frames" in name, widths)
        elif HIDDEN.search(name) and not name.endswith("_ids"):
            yield from self.patches([self.of("hidden_size", 32)]) if patched and "embeds" not in name else ()
            hidden = self.of("hidden_size", 0) or self.of("d_model", 32)
            yield from (waves(b, TOKENS, hidden), waves(b, hidden, TOKENS), *(waves(b, TOKENS, n) for n in widths))
        elif SOUND.search(name) and not name.endswith("_ids"):
            yield from self.sounds(name, widths)
        else:
            yield FILLED["ids"](b, TOKENS)
            yield torch.tensor([TOKENS] * b)

    def patches(self, widths: list[int]) -> Iterator[Tensor]:
        """Patches of images, one image after the other or each for itself."""
        b, channels, patch = self.batch, self.channels(), self.of("patch_size", 14)
        area = channels * patch * patch
        apart = any("spatial_shapes" in n or "pixel_position_ids" in n for n in self.parameters)
        for width in dict.fromkeys([area * self.of("temporal_patch_size", 1), area, *widths]):
            yield waves(b, SIDE * SIDE, width) if apart else waves(b * SIDE * SIDE, width)
        yield waves(b * SIDE * SIDE, channels, patch, patch)

    def pictures(self, moving: bool, widths: list[int]) -> Iterator[Tensor]:
        """Images and films."""
        b, channels, sides, frames = self.batch, self.channels(), self.sides(), self.of("num_frames", 4)
        film, image = waves(b, frames, channels, *sides), waves(b, channels, *sides)
        yield from (film, image) if moving else (image, film)
        yield from (waves(b, 1, channels, *sides), waves(b, 2, channels, *sides), waves(b, channels, frames, *sides))
        yield from (waves(b, channels, width, width) for width in widths if width <= 512)

    def sounds(self, name: str, widths: list[int]) -> Iterator[Tensor]:
        """Sounds, spectra of them, and series."""
        b, mels = self.batch, next((v for key in MELS if (v := self.of(key, 0))), 80)
        length = 2 * self.of("max_source_positions", FRAMES // 2)
        if name in ("past_values", "future_values"):
            yield waves(b, self.of("context_length", FRAMES), self.of("num_input_channels", 1))
            yield waves(b, self.of("context_length", FRAMES))
        if not re.search(r"features|mel|spectrogram|feats", name):
            yield from (waves(b, 1600), waves(b, 1, 1600), waves(b, self.of("max_length", 2 * FRAMES), mels))
        yield from (waves(b, mels, length), waves(b, length, mels), waves(b, 1, length, mels))
        for width in widths:
            yield from (waves(b, FRAMES, width), waves(b, width, mels), waves(b, mels, width), waves(b, width, FRAMES))
            yield waves(b, width)

    def of(self, key: str, default: int) -> int:
        """A number of the config, or of a part of it."""
        for part in parts_of(self.config):
            with contextlib.suppress(Exception):  # some values are one for each layer
                if isinstance(value := getattr(part, key, None), int):
                    return value
        return default

    def channels(self) -> int:
        """Of an image."""
        return self.of("num_channels", 0) or self.of("in_channels", 0) or 3

    def sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        sides = next((v for part in parts_of(self.config) if (v := getattr(part, "image_size", None))), 32)
        return (sides, sides) if isinstance(sides, int) else tuple(sides)[-2:]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in what a model returns, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value + 0 if type(value) is not Tensor else value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def waves(*shape: int) -> Tensor:
    """Numbers between -1 and 1, none like another."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.get_default_dtype()).mul(0.7).sin().view(shape)


def ids(*shape: int) -> Tensor:
    """Tokens, none of them one of the first five, which may be special."""
    return torch.arange(torch.Size(shape).numel()).mul(7).remainder(40).add(5).view(shape)


FILLED = {
    "waves": waves,
    "ids": ids,
    "count": lambda *shape: torch.arange(shape[-1]).expand(shape),
    "zeros": lambda *shape: torch.zeros(shape, dtype=torch.long),
    "ones": lambda *shape: torch.ones(shape, dtype=torch.long),
    "seen": lambda *shape: torch.ones(shape, dtype=torch.bool),
}


def numbers_in(error: Exception) -> list[int]:
    """The numbers that an error names: one of them may be the size that is wanted."""
    return list(dict.fromkeys(int(n) for n in re.findall(r"(?<![\w.])\d+|(?<=x)\d+", str(error))))


def _key(x: Any) -> Any:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x
