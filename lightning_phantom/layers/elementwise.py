"""The table of operations that treat every feature alone, and what else torch asks of a tensor, by function.

An operation of the table, on activations of the same rows and numbers, gives the same for a rank's own features whether
the others are there or not. A missing one costs an exchange and is not wrong; a wrong one would be: each has its test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS = (
    "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid hardshrink softshrink "
    "tanhshrink softplus softsign logsigmoid log_sigmoid threshold sigmoid tanh dropout alpha_dropout"
).split()
_ARITHMETIC = (
    "abs absolute neg negative positive sign sgn square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p "
    "sin cos tan asin acos atan arctan atan2 sinh cosh asinh acosh atanh erf erfc erfinv expit logit sinc xlogy "
    "lgamma digamma floor ceil round trunc frac clamp clip clamp_min clamp_max nan_to_num "
    "add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow float_power "
    "maximum minimum fmax fmin lerp addcmul addcdiv hypot copysign where masked_fill "
    "gt greater ge greater_equal lt less le less_equal eq ne not_equal isnan isinf isfinite "
    "logical_not logical_and logical_or logical_xor zeros_like ones_like full_like"
).split()
_CASTS = "to float half bfloat16 double type_as clone contiguous detach".split()
_OPERATORS = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __div__ __rdiv__ __truediv__ __rtruediv__ __floordiv__ "
    "__rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __gt__ __ge__ __lt__ __le__ __eq__ __ne__ "
    "__invert__"
).split()
_OPERATORS_IN_PLACE = "__iadd__ __isub__ __imul__ __idiv__ __itruediv__ __ipow__ __imod__ __ifloordiv__".split()
_WRITES = (*(f"{name}_" for name in (*_ACTIVATIONS, *_ARITHMETIC)), "zero_", "fill_", *_OPERATORS_IN_PLACE)
_HOMES = (torch, Tensor, F, torch._C._nn, torch.special)


def _functions(*names: str) -> Iterator[tuple[Any, str]]:
    for name in names:
        for home in _HOMES:
            if callable(function := getattr(home, name, None)):
                yield function, name


# What is done by feature: function -> name. What of it writes into its first argument.
TABLE: dict[Any, str] = dict(_functions(*_ACTIVATIONS, *_ARITHMETIC, *_CASTS, *_OPERATORS, *_WRITES))
IN_PLACE = frozenset(name for _, name in _functions(*_WRITES))

# Questions about a tensor that its shape, type and place answer.
_QUESTIONS = (
    "shape dtype device layout ndim itemsize nbytes requires_grad is_leaf grad_fn names _version "
    "is_cuda is_cpu is_meta is_sparse is_sparse_csr is_mkldnn is_quantized is_nested is_xpu is_mps is_mtia is_ipu "
    "is_xla is_vulkan is_maia retains_grad output_nr _is_view"
).split()
_QUESTIONS_CALLED = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed is_contiguous "
    "stride storage_offset is_inference is_shared is_same_size is_pinned __len__ get_device _is_view "
    "is_conj is_neg has_names dim_order"
).split()
ANSWERS: frozenset[Any] = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _QUESTIONS if hasattr(getattr(Tensor, name, None), "__get__")),
        *(f for name in _QUESTIONS_CALLED if callable(f := getattr(Tensor, name, None))),
        *(f for name in ("numel", "is_floating_point", "is_complex") if (f := getattr(torch, name))),
    ]
)
RAW_MEMORY = frozenset(
    "data_ptr storage untyped_storage _typed_storage __dlpack__ share_memory_ const_data_ptr "
    "__cuda_array_interface__ data_ptr_mutable".split()
)
# They would change what an activation is rather than what it holds.
REFUSED = frozenset(
    "set_ resize_ resize_as_ t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_ detach_ rename_ "
    "sparse_resize_ apply_ map_ map2_".split()
)

# Modules that do nothing but operations of the table, by exact type: a subclass may do anything.
_MODULES = frozenset(
    getattr(nn, name)
    for name in (
        "AlphaDropout CELU Dropout ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid "
        "Mish ReLU ReLU6 SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
    ).split()
)


def is_elementwise_module(module: object) -> bool:
    """Whether a module does nothing but operations of the table, by its exact type."""
    return type(module) in _MODULES
