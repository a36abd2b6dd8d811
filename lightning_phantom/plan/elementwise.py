"""What treats every feature alone: the operations that may stand between the members of a chain."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

# Parameter-free and elementwise, by exact type: a subclass may do anything. PReLU is missing on purpose (its weight
# would get a partial gradient), and so is every dropout but nn.Dropout (its mask can be drawn block by block).
ELEMENTWISE_MODULES = frozenset(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU "
        "Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Threshold Dropout"
    ).split()
)
# The activations of Hugging Face's transformers, which its models bring along; again those without parameters.
_TRANSFORMERS_ACTIVATIONS = frozenset(
    "AccurateGELUActivation ClippedGELUActivation FastGELUActivation GELUActivation GELUTanh LaplaceActivation "
    "LinearActivation MishActivation NewGELUActivation PytorchGELUTanh QuickGELUActivation ReLUSquaredActivation "
    "SiLUActivation SqrtSoftplusActivation".split()
)
_NAMES = (
    "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid hardshrink softshrink "
    "tanhshrink softplus softsign logsigmoid threshold sigmoid tanh abs neg square sqrt rsqrt exp log erf sin cos "
    "reciprocal clamp clip mul multiply add sub div true_divide pow maximum minimum"
).split()
ELEMENTWISE_FUNCTIONS = frozenset(
    getattr(namespace, name) for namespace in (torch, F) for name in _NAMES if hasattr(namespace, name)
) | {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, abs}
ELEMENTWISE_METHODS = frozenset(name for name in _NAMES if hasattr(torch.Tensor, name))


def is_elementwise_module(module: object) -> bool:
    """Whether a module is elementwise and holds no parameters, by its exact type; transformers is not imported."""
    cls = type(module)
    of_transformers = cls.__module__ == "transformers.activations" and cls.__name__ in _TRANSFORMERS_ACTIVATIONS
    return cls in ELEMENTWISE_MODULES or of_transformers
