"""The table of operations that know how features lie between ranks: norms, PReLU, and what cuts a gate off.

They are done on what this rank holds, its own features of the group's tokens [T, w/R], and give the same:

| operation | what the ranks exchange |
|---|---|
| layer norm over the last dimension | two numbers a token, forward and backward |
| RMS norm over the last dimension | one number a token, forward and backward |
| batch norm of [N, w] over the tokens of the group | in training, what each has added to the running statistics |
| PReLU | nothing |
| GLU, chunk or split in two, of a gate and what it gates in one | nothing |

Each entry is called as the function that it stands for, and gives NotImplemented where that one needs whole tokens. A
rank reads its own slice of parameters that all ranks hold, and only of parameters (`operations.share_of`).

Batch norm takes a feature's statistics over the tokens of the group, all of which are here: those of a SyncBatchNorm
over the group. Running statistics are whole on every rank, as a state dict and other readers expect them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.layers.held import Held
from lightning_phantom.layers.norms import Among, epsilon, norm
from lightning_phantom.layers.operations import are_inside, goes_along, share_of


def _layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return _norm(torch.layer_norm, input, normalized_shape, [weight, bias], eps)


def _rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    if eps is None:
        eps = epsilon(input.dtype)
    return _norm(torch.rms_norm, input, normalized_shape, [weight], eps)


def _norm(function: Any, input: Any, normalized_shape: Sequence[int], parameters: Sequence[Any], eps: Any) -> Any:
    x, shapes = _inside(input, *parameters), [normalized_shape, *(p.shape for p in _given(parameters))]
    if x is None or any(tuple(shape) != input.shape[-1:] for shape in shapes):
        return NotImplemented
    ranks, rows, layer, _ = input.place
    ranks.agreement.note(eps)
    shares = _shares(parameters, ranks)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) or any(share.dtype != dtype for share in _given(shares)):
        dtype = function(x[:0], x.shape[1:], *shares, eps).dtype
    among = ranks, rows, f"{function.__name__} behind {layer!r}"
    weight, bias = (*shares, None)[:2]
    y = norm(x, weight, bias, among, eps, function is torch.layer_norm, dtype)
    return input.wrap(y, input.shape, input.place)


def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    x, running = _inside(input, weight, bias), _given([running_mean, running_var])
    if x is None or input.dim() != 2:
        return NotImplemented
    ranks, rows, layer, _ = input.place
    ranks.agreement.note(momentum, eps)
    # Copies: autograd keeps them for the backward, and the whole is written to below.
    here: list[Any] = [None if t is None else t[ranks.slice_of(len(t))].clone() for t in (running_mean, running_var)]
    shares = _shares([weight, bias], ranks)
    y = F.batch_norm(x, here[0], here[1], shares[0], shares[1], training, momentum, eps)
    if training and running:
        _make_whole(running, _given(here), (ranks, rows, f"running statistics behind {layer!r}"))
    return input.wrap(y, input.shape, input.place)


@torch.no_grad()
def _make_whole(running: Sequence[Tensor], here: Sequence[Tensor], among: Among) -> None:
    """Write each rank's share of statistics into those that all ranks hold."""
    ranks, rows, what = among
    everyone = ranks.all_gather(torch.stack(list(here)), rows, what)()  # [R, 2, w/R]
    for statistics, shares in zip(running, everyone.unbind(1), strict=True):
        statistics.copy_(shares.flatten())


def _torch_batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _prelu(input: Any, weight: Any) -> Any:
    x = _inside(input, weight)
    if x is None or (weight.numel() > 1 and input.dim() != 2):  # it has a number for each of the second dimension
        return NotImplemented
    return input.wrap(torch.prelu(x, share_of(weight, input.place.ranks)), input.shape, input.place)


def _glu(input: Any, dim: int = -1) -> Any:
    if not _are_parts(input, 2, dim):
        return NotImplemented
    return input.wrap(F.glu(input.local, 1), _shape_of_part(input), input.place._replace(parts=1))


def _chunk(input: Any, chunks: int, dim: int = 0) -> Any:
    """Cut into the parts of which this rank holds its features: views, as of a plain tensor."""
    if not _are_parts(input, chunks, dim) or any(other._whole is not None for other in input.sharing_memory()):
        return NotImplemented
    made = []
    for part in input.local.chunk(chunks, 1):
        made.append(input.wrap(part, _shape_of_part(input), input.place._replace(parts=1)))
        input._relatives.extend(made[-1]._relatives)
        made[-1]._relatives = input._relatives
    return tuple(made)


def _split(input: Any, split_size: Any, dim: int = 0) -> Any:
    half = input.shape[-1] // 2
    return _chunk(input, 2, dim) if split_size in (half, [half, half], (half, half)) else NotImplemented


def _are_parts(activation: Held, parts: int, dim: int) -> bool:
    """Whether what this rank holds may be cut where an activation is to be cut."""
    return activation.place.parts == parts and dim in (-1, activation.dim() - 1) and are_inside([activation])


def _shape_of_part(activation: Held) -> torch.Size:
    return torch.Size((*activation.shape[:-1], activation.shape[-1] // activation.place.parts))


class Operation(NamedTuple):
    """An entry of the table.

    Attributes:
        apply: what is called in its place.
        numbers: how many each rank tells the others of a token, forward, and adds up with theirs, backward.
    """

    apply: Callable[..., Any]
    numbers: int = 0


# Norms and such, which may stand between any two layers.
NORMS: dict[Any, Operation] = {
    F.layer_norm: Operation(_layer_norm, 2),
    torch.layer_norm: Operation(_layer_norm, 2),
    F.rms_norm: Operation(_rms_norm, 1),
    torch.rms_norm: Operation(_rms_norm, 1),
    F.batch_norm: Operation(_batch_norm),
    torch.batch_norm: Operation(_torch_batch_norm),
    torch.prelu: Operation(_prelu),
    Tensor.prelu: Operation(_prelu),
}
# What takes a gate and what it gates apart.
CUTS: dict[Any, Operation] = {
    F.glu: Operation(_glu),
    torch.chunk: Operation(_chunk),
    Tensor.chunk: Operation(_chunk),
    torch.split: Operation(lambda tensor, split_size_or_sections, dim=0: _split(tensor, split_size_or_sections, dim)),
    Tensor.split: Operation(_split),
}
TABLE = {**NORMS, **CUTS}
_MODULES: dict[Any, Any] = {
    nn.LayerNorm: F.layer_norm,
    nn.RMSNorm: F.rms_norm,
    nn.BatchNorm1d: F.batch_norm,
    nn.PReLU: torch.prelu,
}


def operation_of(module: nn.Module) -> Operation | None:
    """The norm, or such, that a module's forward is a call of, if it is."""
    for cls, function in _MODULES.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return None if len(getattr(module, "normalized_shape", ("last",))) != 1 else NORMS[function]
    return None


# What they read


def _inside(activation: Any, *parameters: Any) -> Tensor | None:
    """What this rank holds of an activation, if it and the parameters that go along may be read there."""
    if not isinstance(activation, Held) or activation.place.parts > 1 or not are_inside([activation]):
        return None
    if all(isinstance(p, nn.Parameter) and goes_along(p, activation) for p in _given(parameters)):
        return activation.local
    return None


def _given(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _shares(parameters: Sequence[Any], ranks: Ranks) -> list[Any]:
    return [None if parameter is None else share_of(parameter, ranks) for parameter in parameters]
