"""Hides from torchmetrics what it would import beside itself: a process starts in two thirds of the time.

Tests start many processes, and conftest.py puts this folder on their path. Imports are as ever; only who asks first
whether one of these packages is installed is told that it is not. Nor is garbage looked for after every few hundred
objects that imports make.
"""

import gc
import importlib.metadata
import importlib.util

gc.set_threshold(50_000, 20, 20)

HIDDEN = ("matplotlib", "scipy", "transformers")
_distribution, _find_spec = importlib.metadata.distribution, importlib.util.find_spec


def distribution(distribution_name):
    if distribution_name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(distribution_name)
    return _distribution(distribution_name)


def find_spec(name, package=None):
    return None if name in HIDDEN else _find_spec(name, package)


importlib.metadata.distribution, importlib.util.find_spec = distribution, find_spec
