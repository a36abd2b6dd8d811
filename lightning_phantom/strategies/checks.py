"""Before a run: refuses what would go wrong without a word."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl
from lightning_phantom.layers.split import split_layers


def check_arguments(strategy: type, names: Iterable[str]) -> None:
    """Raise PhantomError for a keyword that neither a strategy takes nor DDPStrategy or DistributedDataParallel.

    DDPStrategy hands on what it does not know, and DistributedDataParallel is not made where nothing is to average.
    """
    takers = (strategy, pl.strategies.DDPStrategy, DistributedDataParallel)
    known = [name for taker in takers for name in inspect.signature(taker).parameters]
    for name in names:
        if name not in known:
            nearest = "".join(f" Did you mean {match!r}?" for match in get_close_matches(name, known, 1))
            raise PhantomError(
                f"{strategy.__name__} has no argument {name!r}, nor have DDPStrategy and DistributedDataParallel, to "
                f"which it passes others on.{nearest}"
            )


def check_trainer(trainer: pl.Trainer, ranks: int, swapped_late: bool) -> None:
    """Look for callbacks and loggers that do not go with phantom layers.

    Args:
        trainer: the trainer of the run.
        ranks: how many hold each layer between them.
        swapped_late: whether layers were swapped after the callbacks' setup hooks.

    Raises:
        PhantomError: naming the one that would give wrong weights, or wait for ranks that never come.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, pl.callbacks.ModelPruning):
            raise PhantomError(
                "ModelPruning would prune each rank's share of a layer as if it were the whole weight. Leave it out, "
                "and prune the dense module after training (densify)."
            )
        if swapped_late and getattr(callback, "_average_model", None) is not None:
            raise PhantomError(
                f"{type(callback).__name__} copied the model before all of its layers were swapped: hooks have made "
                f"some since (setup, configure_model, on_load_checkpoint). Make them in __init__, or leave it out."
            )
    for logger in trainer.loggers:
        if ranks > 1 and vars(logger).get("_log_graph"):  # a logger may answer to any name
            raise PhantomError(
                f"{type(logger).__name__}(log_graph=True) runs the model on rank 0 only, which would wait for the "
                f"other {ranks - 1} ranks of its group; leave log_graph out."
            )


def check_update_rules(optimizers: Sequence[Optimizer], ranks: int) -> None:
    """Look for optimizers whose rule is not elementwise, where `ranks` ranks hold a share of each layer.

    Raises:
        PhantomError: a rule draws on all parameters at once, so the ranks' replicated parameters would drift apart.
    """
    if ranks == 1:
        return
    if names := over_all_parameters(optimizers):
        raise PhantomError(
            f"{', '.join(names)}: this optimizer decides by sums over all its parameters, of which each of the {ranks} "
            f"ranks of a group holds others, so the ranks would take different steps. Use groups of one rank "
            f"(phantom_parallel_size=1), or an elementwise optimizer such as AdamW or SGD."
        )
    if names := not_elementwise(optimizers):
        rank_zero_warn(
            f"{', '.join(names)}: the rule of this optimizer is not elementwise, so it treats each rank's share of a "
            f"split layer as a tensor of its own, and training depends on the number of ranks. AdamW and SGD are "
            f"exact."
        )


# Their step looks at whole tensors, norms or curvature, of which a shard knows only its part.
_NOT_ELEMENTWISE = {"Muon", "Adafactor", "LAMB", "Lamb", "LARS", "Shampoo", "SOAP"}
# Their step size comes from sums over every parameter they hold.
_OVER_ALL = {"LBFGS", "Prodigy", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD"}


def not_elementwise(optimizers: Iterable[Optimizer]) -> list[str]:
    """The names of the optimizers that train shards otherwise than they would the whole tensors."""
    return _named(optimizers, _NOT_ELEMENTWISE)


def over_all_parameters(optimizers: Iterable[Optimizer]) -> list[str]:
    """The names of the optimizers that take one decision for all their parameters."""
    return _named(optimizers, _OVER_ALL)


def _named(optimizers: Iterable[Optimizer], names: set[str]) -> list[str]:
    return [type(o).__name__ for o in optimizers if {c.__name__ for c in type(o).__mro__} & names]


def check_optimizers(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Raise PhantomError where an optimizer holds parameters of another model, or only a part of a layer's factors.

    Both train silently: the others go nowhere, the missing factors stay as they are.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    stale = len(held - {id(p) for p in module.parameters()})
    if stale:
        raise PhantomError(
            f"the optimizer holds {stale} parameters that are not in the model, so what it trains is used nowhere. "
            f"Collect them inside configure_optimizers, from self.parameters()."
        )
    for name, layer in split_layers(module).items():
        trainable = {key: id(p) for key, p in layer.named_parameters(recurse=False) if p.requires_grad}
        missing = [key for key, identity in trainable.items() if identity not in held]
        if layer.keeps_factors and missing and len(missing) < len(trainable):
            raise PhantomError(
                f"the optimizer holds only a part of {name!r}: {', '.join(missing)} would never be trained. "
                f"The parameters of a {layer.kind} layer are {', '.join(trainable)}; pass all, or freeze those you "
                f"leave out."
            )
