"""Runs a module on batches of its own data, to see what its linears are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from lightning_phantom.conversion.calibrate import Moments, record_inputs
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl


class CalibrationRun:
    """Batches of a module's data to fit to and others held out, and the module that is run on them.

    A batch goes through `validation_step`, or through `predict_step` if the module has none, in eval mode.

    Args:
        trainer: of one device; how the module is run.
        module: the dense module, with its weights.
        data: what its data come from, the module itself if it brings its own: batches to fit to are those of
            `train_dataloader`, held-out ones those of `val_dataloader`, or the rest of the former if there is none.
        num_batches: how many of each.

    Raises:
        PhantomError: there are no batches.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        data: pl.LightningDataModule | pl.LightningModule,
        num_batches: int,
    ) -> None:
        self.trainer, self.module = trainer, module
        if not pl.utilities.model_helpers.is_overridden("train_dataloader", data):
            raise PhantomError(
                f"{type(data).__name__} has no train_dataloader to take calibration batches from: name data that has "
                f"one, as `data:` of the config."
            )
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        training = iter(_first_loader(data.train_dataloader()))
        self.fit = list(islice(training, num_batches))
        others = data.val_dataloader() if pl.utilities.model_helpers.is_overridden("val_dataloader", data) else training
        self.held_out = list(islice(_first_loader(others), num_batches))
        if not self.fit or not self.held_out:
            raise PhantomError(
                f"{type(data).__name__} gave {len(self.fit)} batches to calibrate with and {len(self.held_out)} "
                f"held-out ones; at least one of each is needed."
            )

    def __call__(self, names: Sequence[str]) -> tuple[Mapping[str, Moments], Mapping[str, Moments]]:
        """Return the moments of the inputs of the linears `names`: those to fit to, and the held-out ones.

        Raises:
            PhantomError: a linear was not called, or got inputs that are not finite.
        """
        return self._moments(self.fit, names), self._moments(self.held_out, names)

    def _moments(self, batches: Sequence[Any], names: Sequence[str]) -> Mapping[str, Moments]:
        run: Callable[..., Any] = partial(self.trainer.predict, return_predictions=False)
        if pl.utilities.model_helpers.is_overridden("validation_step", self.module):
            run = partial(self.trainer.validate, verbose=False)
        with record_inputs(self.module, names) as moments:
            run(self.module, dataloaders=_Batches(batches))
        for name, seen in moments.items():
            if not seen.count:
                raise PhantomError(
                    f"{name!r} was not called with these batches, so it cannot be calibrated. Take more batches, skip "
                    f"it in the plan, or leave --calibrate out."
                )
            if not bool(seen.total.isfinite().all()):
                raise PhantomError(f"{name!r} got NaN or infinite inputs from the calibration batches.")
        return moments


class _Batches(Iterable[Any]):
    """Batches as a dataloader; Lightning takes a list for several of them."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _first_loader(loaders: Any) -> Iterable[Any]:
    """The first of several loaders."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders
