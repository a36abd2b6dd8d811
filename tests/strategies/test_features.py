"""Every row of docs/features.md, as a test: what a Trainer can be asked for, and what then happens."""

import ast
import csv
import inspect
import logging
import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import training
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos import BoringModel, LightningTransformer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.model_summary import summarize
from lightning_utilities.core import rank_zero
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from training import EMAWeightAveraging, Net, data, loader, needs_ema, own, trainer, weights

from lightning_phantom import PhantomLinear, PhantomStrategy, TensorParallelStrategy, densify
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.layers.split import split_layers
from lightning_phantom.strategies.materialise import materialise

ROOT = Path(__file__).parents[2]
PAIRS = {"phantom_parallel_size": 2}  # of four ranks: 2 x 2


def several():
    return dist.is_initialized() and dist.get_world_size() > 1


def phantom(sizes=None, **kwargs):
    """The strategy on the ranks there are: one has no other sizes."""
    return PhantomStrategy(num_blocks=4, **(sizes or {} if several() else {}), **kwargs)


def train(make, sizes=None, batches=6, dtype=torch.float32, val=None, loaders=None, ckpt_path=None, **kwargs):
    """Fit what `make` returns, on the ranks there are, which share batches of 8."""
    L.seed_everything(5, verbose=False)
    module = make()
    t = trainer(kwargs.pop("folder", tempfile.gettempdir()), strategy=kwargs.pop("strategy", phantom(sizes)), **kwargs)
    if loaders is None and not is_overridden("train_dataloader", getattr(module, "_orig_mod", module)):
        loaders = loader(8 * batches, batch_size=own(8), dtype=dtype)
    t.fit(module, loaders, val, ckpt_path=ckpt_path)
    return t, module


def plain():
    return Net(dropout=0.0)


def adam(dropout=0.0):
    return Net(dropout, lr=0.01, optimizer=torch.optim.AdamW)


def shared_folder():
    if not several():
        return tempfile.mkdtemp()
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    return folder[0]


def message(function, *args, **kwargs):
    """What `function` raises, as (class name, text); None if it returns."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


@contextmanager
def recorded_warnings():
    """All warnings, in spite of the quiet trainer."""
    silence, training.quiet = training.quiet, lambda: None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        training.quiet = silence


def mean(by_rank):
    """The ranks' mean losses, which are one process's."""
    return torch.tensor(by_rank, dtype=torch.float64).mean(0).tolist()


# On two and on four ranks: one start of each, many cases in it


def _run(cases):
    results = {}
    for case in cases:
        try:
            results[case] = globals()[case]()
        except Exception:
            results[case] = AssertionError(traceback.format_exc())
    return results


class Results:
    def __init__(self, by_rank):
        self.by_rank = by_rank

    def __call__(self, case):
        values = [result[case.__name__] for result in self.by_rank]
        for value in values:
            if isinstance(value, AssertionError):
                raise value
        return values


@pytest.fixture(scope="module")
def two():
    return Results(run_ranks(2, _run, [name for name in globals() if name.startswith("two_")]))


@pytest.fixture(scope="module")
def four():
    return Results(run_ranks(4, _run, [name for name in globals() if name.startswith("four_")]))


def assert_same(alone, by_rank, atol=1e-5):
    """One set of weights on every rank, that of one process."""
    for seen in by_rank:
        assert seen.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(seen[name], by_rank[0][name]), name
            assert torch.allclose(seen[name].float(), value.float(), atol=atol), name


def assert_close(alone, by_rank):
    for seen in by_rank:
        for name, value in alone.items():
            assert torch.allclose(seen[name], value, atol=1e-5), name


# Layouts and data


def four_layouts(layouts=({}, PAIRS, {"phantom_parallel_size": 1})):
    return [weights(train(plain, sizes)[1]) for sizes in layouts]


def test_phantom_and_data_parallel(four):
    (alone,) = four_layouts([{}])
    for n in range(3):
        assert_same(alone, [layouts[n] for layouts in four(four_layouts)])


class CountAllReduces(Callback):
    """Counts DistributedDataParallel's exchanges of gradients."""

    def __init__(self):
        self.count = 0

    def on_train_start(self, trainer, module):
        def hook(group, bucket):
            self.count += 1
            return allreduce_hook(group, bucket)

        if trainer.world_size > 1:
            trainer.strategy.model.register_comm_hook(dist.group.WORLD, hook)


def four_accumulate():
    seen = []
    for batches in (3, 1):
        counted = CountAllReduces()
        with record_traffic() as traffic:
            _, module = train(adam, PAIRS, callbacks=[counted], accumulate_grad_batches=batches)
        seen.append((weights(module), (counted.count, traffic.calls.get("all_reduce", 0))))
    return seen


def test_accumulate_grad_batches(four):
    """Six batches are two steps, or six: one bucket and the shards of three layers each time."""
    alone = four_accumulate()
    seen = four(four_accumulate)
    for n, steps in enumerate((2, 6)):
        assert_same(alone[n][0], [ranks[n][0] for ranks in seen])
        assert [ranks[n][1] for ranks in seen] == [(steps, 12 * steps)] * 4


def test_gradient_accumulation_scheduler():
    steps = [
        train(plain, max_epochs=2, callbacks=callbacks)[0].global_step
        for callbacks in ([], [GradientAccumulationScheduler({0: 3, 1: 2})])
    ]
    assert steps == [12, 2 + 3]


class Unused(Net):
    """Has a linear that nothing calls."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.spare = nn.Linear(16, 5)


DDP_ARGUMENTS = ({"find_unused_parameters": True}, {"static_graph": True})


def four_ddp_arguments():
    seen = [weights(train(Unused, strategy=phantom(PAIRS, **kwargs))[1]) for kwargs in DDP_ARGUMENTS]
    views = train(plain, strategy=phantom(PAIRS, gradient_as_bucket_view=True))[1]
    return seen, weights(views), message(train, Unused, PAIRS)


def test_ddp_arguments(four):
    alone, views, error = four_ddp_arguments()
    seen = four(four_ddp_arguments)
    for n in range(len(DDP_ARGUMENTS)):
        assert_same(alone[n], [weights[n] for weights, *_ in seen])
    assert_same(views, [weights for _, weights, _ in seen])
    assert error is None
    for *_, error in seen:
        assert error[0] == "RuntimeError" and "parameters that were not used in producing the loss" in error[1]


class Noisy(torch.utils.data.Dataset):
    """Draws in the workers."""

    def __len__(self):
        return 24

    def __getitem__(self, n):
        return n + torch.rand(16), n % 5


class Facts(Net):
    """Notes what a module can see of the other ranks."""

    def __init__(self):
        super().__init__()
        self.facts = []

    def train_dataloader(self):
        order = torch.randperm(24).tolist()  # as random_split draws it
        return DataLoader(torch.utils.data.Subset(Noisy(), order), batch_size=4, shuffle=True, num_workers=1)

    def training_step(self, batch, batch_idx):
        rank = self.global_rank
        self.seen(len(batch[0]))
        for how in ("mean", "sum", "max"):
            self.log(how, float(rank + batch_idx), sync_dist=True, reduce_fx=how)
        self.log("alone", float(rank))
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        gathered = self.all_gather({"x": batch[0], "rank": rank})
        self.facts += [batch[0].tolist(), gathered["x"].tolist(), gathered["rank"].tolist()]
        return super().training_step(batch, batch_idx)


def two_facts():
    seen, kinds = [], [phantom()]
    if several():
        kinds += ["ddp", phantom({"phantom_parallel_size": 1})]
    for strategy in kinds:
        logger = CSVLogger(shared_folder(), name="run", version=0)
        monitor = ThroughputMonitor(lambda batch: len(batch[0]), window_size=2)
        L.seed_everything(5, workers=True, verbose=False)
        options = dict(logger=logger, callbacks=[monitor], log_every_n_steps=1)
        with recorded_warnings() as caught:
            t = trainer(tempfile.gettempdir(), strategy=strategy, **options)
            module = Facts()
            t.fit(module)
        if several():
            dist.barrier()
        rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
        seen.append(
            {
                "module": module.facts,
                "logged": {k: v.item() for k, v in t.callback_metrics.items() if k != "train_loss"},
                "sampler": t.distributed_sampler_kwargs,
                "size": (t.world_size, t.global_rank, t.local_rank, module.global_rank),
                "throughput": [row[name] for row in rows for name in row if name.endswith(("samples", "batches"))],
                "warnings": [str(w.message) for w in caught if "Throughput" in str(w.message)],
            }
        )
        os.environ.pop("PL_SEED_WORKERS", None)
    return seen


def test_what_a_rank_sees_of_the_others_is_as_under_ddp(two):
    """Samples, their order, workers' random numbers, logs, metrics, all_gather, throughput."""
    for phantoms, ddp, groups_of_one in two(two_facts):
        assert len(ddp["module"]) == 9 and ddp["logged"]["seen"] == 24 and any(ddp["throughput"])
        for key, value in ddp.items():
            assert phantoms[key] == groups_of_one[key] == value, key


class Gathers(Net):
    """Gathers an activation from inside and, with its gradient, what leaves the network."""

    def training_step(self, batch, batch_idx):
        inside = self.all_gather(self.net(self.norm(batch[0])).detach())
        logits = self.all_gather(self(batch[0]), sync_grads=True)
        self.shapes = tuple(inside.shape), tuple(logits.shape)
        y = self.all_gather(batch[1])
        return nn.functional.cross_entropy(logits.reshape(-1, 5), y.reshape(-1))


def four_all_gather():
    seen = [train(lambda: Gathers(dropout=0.0), sizes)[1] for sizes in (PAIRS, {})]
    return [(module.shapes, weights(module)) for module in seen]


def test_all_gather(four):
    """A loss of everyone's outputs, with sync_grads, is W times its share to each: as under DDP it trains the same."""
    alone = weights(train(plain)[1])
    for n in range(2):
        seen = [result[n] for result in four(four_all_gather)]
        assert {shapes for shapes, _ in seen} == {((4, 2, 16), (4, 2, 5))}
        assert_same(alone, [w for _, w in seen])


def four_logs():
    t, _ = train(plain, PAIRS, val=loader(40, batch_size=5))
    return {k: float(v) for k, v in t.callback_metrics.items()}


def test_logged_values_and_metrics_count_each_sample_once(four):
    alone = four_logs()
    for seen in four(four_logs):
        assert seen["val_count"] == seen["val_seen"] == 40  # self.log(sync_dist=True, reduce_fx="sum"), SumMetric
        for key in ("val_loss", "val_accuracy"):
            assert seen[key] == pytest.approx(alone[key], rel=1e-4), key


class Sampled(Net):
    def train_dataloader(self):
        return DataLoader(
            data(24), batch_size=own(8), sampler=DistributedSampler(data(24), **self.trainer.distributed_sampler_kwargs)
        )

    def training_step(self, batch, batch_idx):
        self.samples = [*getattr(self, "samples", []), *batch[0][:, 0].tolist()]
        return super().training_step(batch, batch_idx)


def four_own_sampler():
    return sorted(train(Sampled, PAIRS, use_distributed_sampler=False)[1].samples)


def test_own_sampler(four):
    seen = four(four_own_sampler)
    assert sorted(x for samples in seen for x in samples) == sorted(data(24).tensors[0][:, 0].tolist())


class Stream(IterableDataset):
    """Every `step`-th sample from `first` on."""

    def __init__(self, first=0, step=1, n=48):
        self.first, self.step, self.n = first, step, n

    def __iter__(self):
        yield from list(data(self.n))[self.first :: self.step]


class Streams(Net):
    def train_dataloader(self):
        return DataLoader(Stream(self.trainer.global_rank, self.trainer.world_size), batch_size=own(8))


def four_iterable_dataset():
    return weights(train(lambda: Streams(dropout=0.0), PAIRS)[1])


def test_iterable_dataset(four):
    assert_same(four_iterable_dataset(), four(four_iterable_dataset))


class Normalised(Net):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.tail = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 5))


def two_sync_batchnorm():
    """What becomes of the layer, and what torch says to it: it synchronises on GPUs only."""
    seen = []
    for strategy in (phantom(), "ddp"):
        module = Normalised()
        said = message(trainer(tempfile.gettempdir(), strategy=strategy, sync_batchnorm=True).fit, module, loader())
        seen.append((said, type(module.tail[0]).__name__, getattr(module.tail[0], "process_group", None)))
    return seen


def test_sync_batchnorm(two):
    for phantoms, ddp in two(two_sync_batchnorm):
        assert phantoms == ddp and ddp[0] == ("ValueError", "SyncBatchNorm layers only work with GPU modules")


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.net, pl_module.norm])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net, optimizer, lr=0.05)


class Tunable(Net):
    def __init__(self):
        super().__init__(dropout=0.0)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def four_finetuning():
    _, module = train(Tunable, PAIRS, max_epochs=3, callbacks=[Unfreeze()])
    return weights(module)


def test_finetuning(four):
    assert_same(four_finetuning(), four(four_finetuning))


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch_and_epoch")
        self.written, self.epochs = [], 0

    def write_on_batch_end(self, trainer, module, prediction, indices, batch, batch_idx, dataloader_idx):
        self.written += zip(indices, prediction[:, 0].tolist(), strict=True)

    def write_on_epoch_end(self, trainer, module, predictions, indices):
        self.epochs += 1


def four_predictions():
    writer = Writer()
    L.seed_everything(5, verbose=False)
    t = trainer(tempfile.gettempdir(), strategy=phantom(PAIRS), callbacks=[writer])
    t.predict(plain(), loader(21, batch_size=5))
    return writer.written, writer.epochs


def test_prediction_writer(four):
    """Every rank writes; those of one group the same. One group has three batches, the last of one row, one has two."""
    alone = dict(four_predictions()[0])
    seen = four(four_predictions)
    assert all(epochs == 1 for _, epochs in seen)
    written = [w for w, _ in seen]
    assert written[0] == written[1] and written[2] == written[3]
    together = dict(written[0] + written[2])
    assert [len(w) for w in written] == [11, 11, 10, 10] and together.keys() == alone.keys()
    assert all(together[n] == pytest.approx(value, abs=1e-5) for n, value in alone.items())


class Disagrees(Net):
    """Logs a value that gets worse on the last rank only."""

    def validation_step(self, batch, batch_idx):
        self.log("mine", float(self.current_epoch if self.trainer.global_rank == self.trainer.world_size - 1 else 0))


def four_early_stopping():
    stop = EarlyStopping("mine", patience=1, mode="min")
    improving = EarlyStopping("val_loss", patience=3)
    t, _ = train(Disagrees, PAIRS, max_epochs=6, callbacks=[stop], val=loader(16))
    u, _ = train(plain, PAIRS, max_epochs=3, callbacks=[improving], val=loader(16))
    return t.current_epoch, u.current_epoch


def test_early_stopping(four):
    assert four(four_early_stopping) == [(2, 3)] * 4


# Gradients and numbers


def two_clip_by_value():
    _, module = train(plain, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    return weights(module)


class ClipsItself(Net):
    norms = ()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = self.trainer.strategy.clip_grad_norm_(self.parameters(), 0.05)
        again = self.trainer.strategy.clip_grad_norm_(self.parameters(), float("inf"))
        largest = self.trainer.strategy.clip_grad_norm_(self.net.parameters(), float("inf"), float("inf"))
        self.norms = [*self.norms, norm.item(), again.item(), largest.item()]


def four_clip(layouts=({}, PAIRS, {"phantom_parallel_size": 1})):
    seen = []
    for sizes in layouts:
        _, module = train(plain, sizes, gradient_clip_val=0.05)
        _, itself = train(lambda: ClipsItself(dropout=0.0), sizes)
        seen.append((weights(module), weights(itself), itself.norms))
    return seen


def test_clip_by_value(two):
    alone = two_clip_by_value()
    assert_same(alone, two(two_clip_by_value))
    assert not torch.allclose(alone["tail.1.weight"], weights(train(plain)[1])["tail.1.weight"], atol=1e-3)


def test_clip_by_norm(four):
    ((alone, itself, _),) = four_clip([{}])
    assert_same(itself, [alone])
    for n in range(3):
        assert_same(alone, [layouts[n][0] for layouts in four(four_clip)])


def test_clip_in_an_overridden_hook(four):
    ((_, alone, norms),) = four_clip([{}])
    assert norms[1::3] == pytest.approx([0.05] * 6, rel=1e-4)
    for n in range(3):
        seen = [layouts[n] for layouts in four(four_clip)]
        assert_same(alone, [w for _, w, _ in seen])
        for _, _, others in seen:
            assert others == pytest.approx(norms, rel=1e-5) and others == seen[0][2]


PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")


def two_precisions():
    seen = {}
    for precision in PRECISIONS:
        dtype = torch.float64 if precision == "64-true" else torch.float32
        t, module = train(adam, precision=precision, dtype=dtype, val=loader(16, dtype=dtype))
        seen[precision] = weights(module), module.losses, t.callback_metrics["val_loss"].isfinite().item()
    return seen


def test_precisions(two):
    alone, seen = two_precisions(), two(two_precisions)
    for precision in PRECISIONS:
        values, losses, finite = alone[precision]
        expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
        assert finite and {value.dtype for value in values.values()} == {expected}
        for other, _, other_finite in (result[precision] for result in seen):
            assert other_finite
            assert all(torch.equal(other[name], seen[0][precision][0][name]) for name in other)
        together = mean([result[precision][1] for result in seen])
        assert together == pytest.approx(losses, rel=2e-2 if "bf16" in precision else 1e-5)
    assert alone["bf16-mixed"][1] != alone["32-true"][1]


class Overflow(Callback):
    """Puts an infinity into one rank's share of a gradient, and watches what the step makes of it."""

    def __init__(self):
        self.seen = []

    def on_after_backward(self, trainer, module):
        if trainer.fit_loop.batch_idx == 2 and trainer.global_rank == trainer.world_size - 1:
            module.net[0].weight.grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
        self.seen.append((trainer.precision_plugin.scaler.get_scale(), steps, weights(module)))


def four_overflow():
    watch = Overflow()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(adam, PAIRS, callbacks=[watch], batches=5, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    return watch.seen


def test_an_overflow_on_one_rank_skips_the_step_on_all(four):
    """Also in the other group."""
    first, *others = four(four_overflow)
    for seen in (four_overflow(), first, *others):
        assert [scale for scale, *_ in seen] == [1024.0, 1024.0, 512.0, 512.0, 512.0]
        assert [steps for _, steps, _ in seen] == [{1}, {2}, {2}, {3}, {4}]
        moved = [any(not torch.equal(a[2][n], b[2][n]) for n in a[2]) for a, b in pairwise(seen)]
        assert moved == [True, False, True, True]
        assert all(value.isfinite().all() for value in seen[-1][2].values())
    for other in others:
        assert all(torch.equal(a[2][n], b[2][n]) for a, b in zip(first, other, strict=True) for n in a[2])


class ReplacesLinears(Precision):
    def convert_module(self, module):
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, nn.Linear(child.in_features, child.out_features))
        return module


def test_precision_plugins_that_replace_linears_are_refused():
    with pytest.raises(PhantomError, match="ReplacesLinears has put layers of its own where the phantom layers were"):
        train(plain, plugins=[ReplacesLinears()])


# What the first step shows


class Odd(Net):
    """A softmax within its FFN, and an FFN that nothing calls."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Softmax(-1), nn.ReLU(), nn.Linear(32, 16))
        self.spare = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def two_first_step():
    log, said = rank_zero.log, []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    seen = []
    for make, steps in ((Odd, 3), (Odd, 1), (plain, 3)):
        with recorded_warnings() as caught:
            log.addHandler(handler)
            log.setLevel(logging.INFO)
            t, _ = train(make, max_steps=steps)
            log.removeHandler(handler)
        warned = [str(w.message) for w in caught if "gave no gradient" in str(w.message)]
        seen.append((warned, [line for line in said if "brought activations back" in line]))
        said.clear()
    decisions = {layer.name: layer.decision for layer in t.strategy.plan.layers}
    return seen, decisions


def test_layers_without_a_gradient_are_named(two):
    """Once, on rank 0, and also where there is no second step."""
    names = [f"spare.0.{name}" for name in ("weight", "compressor_weight", "decompressor_weight", "bias")]
    expected = f"the first training step gave no gradient to {', '.join(names)}, spare.2.weight, spare.2.compressor"
    for rank, results in ((0, two_first_step()), *enumerate(two(two_first_step))):
        for (warned, _), odd in zip(results[0], (True, True, False), strict=True):
            assert len(warned) == (odd and rank == 0)
            assert all(w.startswith(expected) for w in warned)


def test_what_leaves_an_ffn_within_is_named(two):
    """Once, on rank 0, with the line; one process exchanges nothing."""
    lines = inspect.getsource(training).splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "self.tail(self.net(" in text)
    assert not any(said for _, said in two_first_step()[0])
    for rank, (results, _) in enumerate(two(two_first_step)):
        for (_, said), odd in zip(results, (True, True, False), strict=True):
            assert len(said) == (odd and rank == 0)
            assert all(s.endswith(f"\n  net.0: softmax  {training.__file__}:{line}") for s in said)


def test_the_strategy_tells_its_plan(two):
    for _, decisions in two(two_first_step):
        assert decisions == {"net.0": "phantom", "net.3": "phantom", "net.6": "phantom", "tail.1": "skip"}


# Optimizers


class Manual(Net):
    """Two optimizers, stepped by hand, clipped and toggled; each with a scheduler."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.automatic_optimization = False

    def configure_optimizers(self):
        body = torch.optim.AdamW([*self.norm.parameters(), *self.net.parameters()], lr=0.01)
        head = torch.optim.SGD(self.tail.parameters(), lr=0.05)
        return [body, head], [torch.optim.lr_scheduler.StepLR(o, 2) for o in (body, head)]

    def training_step(self, batch, batch_idx):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            self.toggle_optimizer(optimizer)
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            scheduler.step()


def four_manual(layouts=({}, PAIRS)):
    """As under DDP, toggling needs find_unused_parameters."""
    seen = []
    for sizes in layouts:
        t, module = train(Manual, strategy=phantom(sizes, find_unused_parameters=True))
        seen.append((weights(module), [o.param_groups[0]["lr"] for o in t.optimizers]))
    return seen


def test_manual_optimization_with_several_optimizers(four):
    ((alone, rates),) = four_manual([{}])
    assert rates == pytest.approx([1e-5, 5e-5])
    for n in range(2):
        assert_same(alone, [layouts[n][0] for layouts in four(four_manual)])


OPTIMIZER = """
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
model: {class_path: test_features.Configured}
"""


class Configured(L.LightningModule):
    """Has no optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.norm(self.net(batch[0]))), batch[1])

    def train_dataloader(self):
        return loader(48, batch_size=own(8))


def two_cli():
    folder = shared_folder()
    path = Path(folder) / "run.yaml"
    if not several() or dist.get_rank() == 0:
        path.write_text(OPTIMIZER)
    if several():
        dist.barrier()

    class FromArguments(LightningCLI):
        def instantiate_trainer(self, **kwargs):
            return trainer(folder, strategy=phantom())

    L.seed_everything(5, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = FromArguments(run=False, args=["--config", str(path)], seed_everything_default=False)
        cli._add_configure_optimizers_method_to_model(None)
    cli.trainer.fit(cli.model)

    class Direct(Configured):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return weights(cli.model), weights(train(Direct)[1])


def test_an_optimizer_of_lightning_clis_config(two):
    alone, direct = two_cli()
    assert_same(alone, [direct], atol=0)
    for seen, direct in two(two_cli):
        assert_same(seen, [direct], atol=0)
        assert_same(alone, [seen])


def two_optimizer_rules():
    with recorded_warnings() as caught:
        lbfgs = message(train, lambda: Net(optimizer=torch.optim.LBFGS))
        train(lambda: Net(optimizer=torch.optim.Adafactor), max_steps=2)
    return lbfgs, [str(w.message) for w in caught if "not elementwise" in str(w.message)]


def test_optimizers_that_are_not_elementwise(two):
    alone, warned = two_optimizer_rules()
    assert alone is None and not warned
    for rank, (lbfgs, warned) in enumerate(two(two_optimizer_rules)):
        assert lbfgs[0] == "PhantomError"
        assert "LBFGS: this optimizer decides by sums over all its parameters, of which each of the 2 ranks" in lbfgs[1]
        assert [w[:48] for w in warned] == ["Adafactor: the rule of this optimizer is not ele"][: rank == 0]


class Hooked(Net):
    def _halve(self, gradient):
        self.calls = getattr(self, "calls", 0) + 1
        return gradient * 0

    def configure_optimizers(self):
        self.net[0].compressor_weight.register_hook(self._halve)
        return super().configure_optimizers()

    def on_fit_start(self):
        self.tail[1].weight.register_hook(self._halve)


def test_gradient_hooks():
    for name in ("net.0.compressor_weight", "tail.1.weight", "net.0.weight"):
        start = dict(train(plain, limit_train_batches=0)[1].named_parameters())[name]
        module = train(lambda: Hooked(dropout=0.0))[1]
        assert torch.equal(dict(module.named_parameters())[name], start) == (name != "net.0.weight"), name
        assert module.calls == 12

    class HookedBefore(Net):
        def __init__(self):
            super().__init__()
            self.net[6].weight.register_hook(lambda gradient: gradient)

    assert list(split_layers(train(HookedBefore)[1])) == ["net.0", "net.3"]


class Schedules(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, mode="max")
        decay = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}
        return [optimizer], [decay, {"scheduler": self.plateau, "monitor": "val_count", "interval": "epoch"}]


def test_lr_schedulers_lr_monitor_and_csv_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    t, _ = train(
        lambda: Schedules(dropout=0.0),
        batches=2,
        max_epochs=3,
        val=loader(8),
        logger=logger,
        callbacks=[LearningRateMonitor("step")],
        log_every_n_steps=1,
    )
    assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**6 * 0.1**2)  # no epoch sees more than the first
    text = (tmp_path / "run/version_0/metrics.csv").read_text()
    assert "lr-SGD" in text.splitlines()[0] and "val_loss" in text.splitlines()[0]
    assert "0.25" in text


def two_lr_find():
    L.seed_everything(5, verbose=False)
    module = plain()
    t = trainer(shared_folder(), strategy=PhantomStrategy(num_blocks=4), enable_checkpointing=True)
    t.strategy.connect(module)
    finder = Tuner(t).lr_find(module, loader(320, batch_size=own(8)), num_training=40, update_attr=True)
    return finder.results["loss"], module.lr, weights(module)


def test_lr_find(two):
    seen = two(two_lr_find)
    for losses, rate, values in seen:
        assert len(losses) == 40 and losses == pytest.approx(seen[0][0])
        assert rate == seen[0][1] != 0.05
        assert all(torch.equal(values[name], seen[0][2][name]) for name in values)
    assert_same(weights(train(plain, limit_train_batches=0)[1]), [values for *_, values in seen])


def test_batch_size_scaling_is_refused_by_lightning(tmp_path):
    class Sized(Net):
        batch_size = 2

        def train_dataloader(self):
            return loader(64, batch_size=self.batch_size)

    t = trainer(tmp_path, devices=1)
    with pytest.raises(ValueError, match=r"Tuning the batch size is currently not supported with distributed strateg"):
        Tuner(t).scale_batch_size(Sized())


# Checkpoints


def fit_with(callback, tmp_path, epochs=2, make=plain, **kwargs):
    return train(
        make,
        folder=tmp_path,
        max_epochs=epochs,
        callbacks=[callback],
        enable_checkpointing=True,
        val=loader(16),
        **kwargs,
    )


def test_model_checkpoint_best_last_and_every_n_steps(tmp_path):
    saver = ModelCheckpoint(tmp_path, "best-{val_loss:.3f}", monitor="val_loss", save_last=True)
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=5, save_top_k=-1)
    t, module = train(
        plain,
        folder=tmp_path,
        max_epochs=3,
        callbacks=[saver, steps],
        enable_checkpointing=True,
        val=loader(16),
    )
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["step=10.ckpt", "step=15.ckpt", "step=5.ckpt"]
    assert (tmp_path / "last.ckpt").exists() and Path(saver.best_model_path).exists()
    (best,) = t.test(module, loader(16), ckpt_path="best", verbose=False)
    assert best["val_loss"] == pytest.approx(saver.best_model_score.item(), rel=1e-5)
    t.fit_loop.max_epochs = 4
    t.fit(module, loader(48), loader(16), ckpt_path="last")
    assert t.global_step == 24


def test_save_weights_only(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    t, module = fit_with(saver, tmp_path)
    file = torch.load(saver.last_model_path, weights_only=True)
    assert "optimizers" not in file["phantom"] and "optimizer_states" not in file
    before = t.validate(module, loader(16), verbose=False)
    other = trainer(tmp_path, devices=1)
    assert other.validate(plain(), loader(16), ckpt_path=saver.last_model_path, verbose=False) == before
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer(tmp_path, devices=1, max_epochs=3).fit(plain(), loader(), ckpt_path=saver.last_model_path)


class Raises(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("no more")
        return super().training_step(batch, batch_idx)


def two_save_on_exception():
    folder = shared_folder()
    savers = [ModelCheckpoint(folder, save_on_exception=True), OnExceptionCheckpoint(folder)]
    with recorded_warnings() as caught:
        error = message(train, Raises, folder=folder, callbacks=savers, enable_checkpointing=True)
    said = [str(w.message) for w in caught if "was not saved" in str(w.message)]
    return error, said, sorted(p.name for p in Path(folder).iterdir())


def test_save_on_exception(two):
    error, said, files = two_save_on_exception()
    assert error == ("RuntimeError", "no more") and not said and "on_exception.ckpt" in files and len(files) >= 2
    for rank, (error, said, files) in enumerate(two(two_save_on_exception)):
        assert error == ("RuntimeError", "no more") and not files
        if rank == 0:
            assert "a checkpoint is put together by all ranks, and after an exception the others may be gone" in said[0]


LOADS = """
import sys
sys.path.insert(0, {here!r})
import lightning as L, torch
from torch import nn

class Small(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))

module = Small.load_from_checkpoint({path!r})
assert "lightning_phantom" not in sys.modules
print(module.net(torch.ones(2, 16)).sum().item())
"""


class Small(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_load_from_checkpoint_without_the_package(tmp_path):
    t, module = train(lambda: Small(width=32), folder=tmp_path)
    t.save_checkpoint(tmp_path / "a.ckpt")
    code = LOADS.format(here=str(ROOT / "tests" / "helpers"), path=str(tmp_path / "a.ckpt"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(module.net(torch.ones(2, 16)).sum().item(), rel=1e-4)


def test_checkpoint_io_of_your_own(tmp_path):
    strategy = PhantomStrategy(num_blocks=4, checkpoint_io=AsyncCheckpointIO())
    t, module = train(plain, folder=tmp_path, strategy=strategy)
    t.save_checkpoint(tmp_path / "a.ckpt")
    t.strategy.checkpoint_io.teardown()
    dense = densify(module)
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.allclose(file["state_dict"]["net.3.weight"], dense.net[3].weight)


class Remembers(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *args):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]


def test_callback_state_comes_back(tmp_path):
    t, _ = train(plain, folder=tmp_path, callbacks=[Remembers()])
    t.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Remembers()
    train(plain, folder=tmp_path, callbacks=[fresh], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert fresh.batches == 12


# Averages of weights


def two_ema():
    """The saved average as a plain module, against the average itself made dense; and a resumed run's weights."""
    folder = shared_folder()

    def run(epochs, path=None):
        average = EMAWeightAveraging(decay=0.6)
        saver = ModelCheckpoint(f"{folder}/{epochs}", save_last=True)
        callbacks = [average, saver]
        _, module = train(
            adam, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, val=loader(16), ckpt_path=path
        )
        return average._average_model.module, module, saver.last_model_path

    average, module, path = run(1)
    expected = densify(average).state_dict()
    saved = torch.load(path, weights_only=True)["state_dict"]
    Net().load_state_dict(saved)
    same = all(torch.equal(saved[name], value) for name, value in expected.items())
    current = densify(module).state_dict()
    # At the end of a fit the callback leaves its average in the module.
    left = all(torch.equal(current[name], expected[name]) for name in expected)
    long, _, _ = run(2)
    resumed, _, _ = run(2, path)
    a, b = weights(long), weights(resumed)
    return same, left, all(torch.equal(a[name], b[name]) for name in a), b


@needs_ema
def test_ema_weight_averaging(two):
    alone = two_ema()
    assert alone[:3] == (True, True, True)
    assert not torch.allclose(alone[3]["norm.weight"], weights(train(adam, max_epochs=2)[1])["norm.weight"], atol=1e-5)
    for seen in two(two_ema):
        assert seen[:3] == (True, True, True)
        assert_same(alone[3], [seen[3]])


def two_swa():
    swa = StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1)
    return weights(train(plain, max_epochs=4, callbacks=[swa])[1])


def test_stochastic_weight_averaging(two):
    assert_same(two_swa(), two(two_swa))


class Late(Net):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


@pytest.mark.parametrize(
    "callback",
    [
        pytest.param(lambda: EMAWeightAveraging(decay=0.5), marks=needs_ema),
        lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
    ],
)
def test_averages_of_late_layers_are_refused(callback):
    with pytest.raises(PhantomError, match=r"Averaging copied the model before all of its layers"):
        train(Late, callbacks=[callback()])


# The Trainer's switches


def test_fit_validate_test_predict(tmp_path):
    t, module = train(plain, folder=tmp_path, val=loader(16))
    assert sum(isinstance(m, PhantomLinear) for m in module.modules()) == 3
    (fit,) = t.validate(module, loader(16), verbose=False)
    (test,) = t.test(module, loader(16), verbose=False)
    predicted = torch.cat(t.predict(module, loader(16)))
    module.eval()
    assert fit == test and torch.allclose(predicted, module(data(16).tensors[0]), atol=1e-6)


UNKNOWN = [
    (PhantomStrategy, "phantom_widht", "phantom_width"),
    (PhantomStrategy, "find_unused_parameter", "find_unused_parameters"),
    (TensorParallelStrategy, "tensor_parallel_sizes", "tensor_parallel_size"),
]


def test_cpu_and_the_name_phantom(tmp_path):
    t = trainer(tmp_path, devices=1, strategy="phantom")
    assert type(t.strategy) is PhantomStrategy and t.strategy.root_device.type == "cpu"
    with pytest.raises(PhantomError, match="Set num_blocks"):
        t.fit(plain(), loader())


def test_num_blocks_come_from_the_name_or_the_environment(tmp_path, monkeypatch):
    def blocks(strategy):
        t = trainer(tmp_path, devices=1, strategy=strategy, fast_dev_run=True)
        t.fit(module := plain(), loader())
        return {layer.num_blocks for layer in split_layers(module).values()}

    assert [blocks(f"phantom_{p}") for p in (2, 4, 8)] == [{2}, {4}, {8}]
    monkeypatch.setenv("PHANTOM_NUM_BLOCKS", "2")
    assert [blocks("phantom"), blocks("phantom_4"), blocks(PhantomStrategy(num_blocks=8))] == [{2}, {4}, {8}]
    for nonsense in ("", "1", "four", "-2", "2.0"):
        monkeypatch.setenv("PHANTOM_NUM_BLOCKS", nonsense)
        with pytest.raises(PhantomError, match=f"PHANTOM_NUM_BLOCKS='{nonsense}' in the environment: needs an integer"):
            trainer(tmp_path, devices=1, strategy="phantom")
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='phantom_zero'`"):
        trainer(tmp_path, devices=1, strategy="phantom_zero")


@pytest.mark.parametrize(("strategy", "typo", "meant"), UNKNOWN)
def test_unknown_arguments_are_refused(strategy, typo, meant):
    with pytest.raises(PhantomError, match=f"{strategy.__name__} has no argument '{typo}'.* Did you mean '{meant}'"):
        strategy(**{typo: 4})


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_start_methods_are_refused(method):
    with pytest.raises(PhantomError, match="start_method: ranks must be started as processes of their own"):
        PhantomStrategy(start_method=method)
    with pytest.raises(ValueError, match="invalid strategy name"):
        L.Trainer(strategy=f"phantom_{method}", accelerator="cpu", devices=2)


def test_limits_and_dry_runs(tmp_path):
    def steps(**kwargs):
        t, module = train(plain, folder=tmp_path, val=loader(16), **kwargs)
        return t.global_step, module

    assert steps(overfit_batches=2, max_epochs=2)[0] == 4
    assert steps(limit_train_batches=0.5, limit_val_batches=1)[0] == 3
    assert steps(max_steps=2)[0] == 2
    assert steps(num_sanity_val_steps=2, val_check_interval=2)[0] == 6
    assert steps(fast_dev_run=True)[0] == 1
    _, module = steps(barebones=True)
    assert_same(weights(steps()[1]), [weights(module)])
    timer = Timer(duration="00:00:00:00")
    assert steps(callbacks=[timer], max_epochs=9)[0] < 54


class Explodes(Net):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]) * 0).sum().sqrt() * 0 if batch_idx else super().training_step(batch, batch_idx)


def test_detect_anomaly():
    with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
        train(Explodes, detect_anomaly=True)


def test_profiler(tmp_path):
    t, _ = train(plain, folder=tmp_path, profiler="simple")
    assert "run_training_batch" in t.profiler.summary() and "PhantomStrategy.training_step" in t.profiler.summary()


def test_deterministic():
    try:
        runs = [weights(train(lambda: Net(0.3), deterministic=True)[1]) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("mode", [True, False])
def test_inference_mode(tmp_path, mode):
    seen = []

    class Watched(Net):
        def test_step(self, batch, batch_idx):
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            with torch.inference_mode():  # what Lightning enters where the backend is not gloo
                self(batch[0])

    def losses(before):
        L.seed_everything(5, verbose=False)
        module = Watched(dropout=0.0)
        t = trainer(tmp_path, devices=1, inference_mode=mode)
        if before:
            t.test(module, loader(16), verbose=False)
        t.fit(module, loader())
        return module.losses

    assert losses(True) == losses(False)  # nothing of it stays in the layers
    assert seen == [(False, False)] * 2


def two_summary():
    _, module = train(plain, callbacks=[ModelSummary(max_depth=2)], enable_model_summary=True)
    return summarize(module).total_parameters


def test_model_summary_counts_one_ranks_share(two):
    layers = sum(p.numel() for layer in split_layers(train(plain)[1]).values() for p in layer.parameters())
    whole = two_summary()
    assert two(two_summary) == [whole - layers // 2] * 2


# Data


def test_combined_loaders():
    class Both(Net):
        def training_step(self, batch, batch_idx):
            self.keys = sorted(batch)
            return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

    loaders = CombinedLoader({"a": loader(48, batch_size=8), "b": loader(16, batch_size=4)}, "max_size_cycle")
    t, module = train(lambda: Both(dropout=0.0), loaders=loaders)
    assert module.keys == ["a", "b"] and t.global_step == 6


def test_reload_dataloaders_every_n_epochs(tmp_path):
    class Fresh(Net):
        made = 0

        def train_dataloader(self):
            self.made += 1
            return loader(16)

    module = Fresh()
    trainer(tmp_path, devices=1, max_epochs=4, reload_dataloaders_every_n_epochs=2).fit(module)
    assert module.made == 2


def test_datamodule(tmp_path):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(16)

        val_dataloader = train_dataloader

    t = trainer(tmp_path, devices=1)
    t.fit(plain(), datamodule=Data())
    assert t.global_step == 2 and "val_loss" in t.callback_metrics


# Callbacks and loggers that count devices


def two_graph():
    return message(train, plain, logger=TensorBoardLogger(tempfile.mkdtemp(), log_graph=True))


def test_a_logged_graph_is_refused(two):
    assert two_graph() is None
    for graph in two(two_graph):
        assert graph[0] == "PhantomError"
        assert "TensorBoardLogger(log_graph=True) runs the model on rank 0 only, which would wait" in graph[1]


def two_dry_runs():
    return train(plain, fast_dev_run=2, logger=True)[0].global_step


def test_a_dry_run_on_two_ranks(two):
    """Its logger answers to any name, also to that of one that logs the graph."""
    assert two(two_dry_runs) == [2, 2]


def test_device_stats_monitor(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    train(plain, callbacks=[DeviceStatsMonitor(cpu_stats=True)], logger=logger, log_every_n_steps=1)
    assert "cpu_percent" in (tmp_path / "run/version_0/metrics.csv").read_text()


def test_pruning_is_refused():
    with pytest.raises(PhantomError, match="ModelPruning would prune each rank's share of a layer"):
        train(plain, callbacks=[ModelPruning("l1_unstructured", amount=0.5)])


# Activation checkpointing and compilation


class Recomputes(Net):
    reentrant = True

    def forward(self, x):
        return self.tail(checkpoint(self.net, self.norm(x), use_reentrant=self.reentrant))


class RecomputesOtherwise(Recomputes):
    reentrant = False


class Wrapped(Net):
    def __init__(self, dropout):
        super().__init__(dropout)
        self.net = checkpoint_wrapper(self.net)


def four_activation_checkpointing(layouts=(PAIRS,), dropouts=(0.2, 0.0)):
    def make(kind, dropout):
        module = kind(dropout)
        module.tail[0] = nn.Identity()  # a reentrant checkpoint gives plain tensors, which are dropped token by token
        return module

    kinds = (Net, Recomputes, RecomputesOtherwise, Wrapped)
    return [[train(partial(make, k, d), s)[1].losses for k in kinds] for s in layouts for d in dropouts]


def test_activation_checkpointing(four):
    """The dropout within is drawn again as it was."""
    dropped, (alone, *others) = four_activation_checkpointing([{}])
    assert dropped[0] == dropped[1] == dropped[2] == dropped[3] != alone
    assert others == [alone] * 3
    for n in range(2):
        seen = [result[n] for result in four(four_activation_checkpointing)]
        for without, *same in seen:
            for losses in same:
                assert losses == pytest.approx(without, rel=1e-5)
        if n:
            assert mean([without for without, *_ in seen]) == pytest.approx(alone, rel=1e-5)


def two_wrapped_checkpoint():
    """A module inside torch's wrapper has other names than the keys of its state dict."""
    folder = shared_folder()
    t, module = train(lambda: Wrapped(0.0), folder=folder)
    t.save_checkpoint(f"{folder}/a.ckpt")
    expected = densify(module).state_dict()
    saved = torch.load(f"{folder}/a.ckpt", weights_only=True)["state_dict"]
    resumed = train(lambda: Wrapped(0.0), max_epochs=2, ckpt_path=f"{folder}/a.ckpt")[1].losses
    Net().load_state_dict(saved)
    return all(torch.equal(saved[name], value) for name, value in expected.items()), resumed


def test_checkpoints_of_an_activation_checkpoint_wrapper(two):
    expected = train(lambda: Wrapped(0.0), max_epochs=2)[1].losses[6:]
    for results in ([two_wrapped_checkpoint()], two(two_wrapped_checkpoint)):
        assert all(same for same, _ in results)
        assert mean([losses for _, losses in results]) == pytest.approx(expected, rel=1e-4)


compiled = set()


def backend(graph, inputs):
    """Remembers what was compiled, and runs it as it is."""
    compiled.update(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
    return graph.forward


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(16, 32), nn.Dropout(0.2), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.drop(nn.functional.gelu(self.up(torch.tanh(x))) * 2))


class Uncompiled(Net):
    def __init__(self):
        super().__init__()
        self.net = FeedForward()


class Compiled(Uncompiled):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend=backend)


class CompiledInPlace(Uncompiled):
    def __init__(self):
        super().__init__()
        self.net.compile(backend=backend)


def two_compile():
    folder = shared_folder()
    seen = {"expected": train(Uncompiled, max_epochs=2)[1].losses}
    for make in (Compiled, CompiledInPlace):
        torch._dynamo.reset()
        compiled.clear()
        t, module = train(make, folder=folder)
        path = f"{folder}/{make.__name__}.ckpt"
        t.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        expected = {key.replace("_orig_mod.", ""): value for key, value in densify(module).state_dict().items()}
        renamed = {key.replace("_orig_mod.", ""): value for key, value in saved.items()}
        dense = all(torch.equal(renamed[name], value) for name, value in expected.items())
        resumed = train(make, max_epochs=2, ckpt_path=path)[1].losses
        seen[make.__name__] = (
            module.losses,
            resumed,
            dense,
            sorted(saved)[0],
            len(split_layers(module)),
            set(compiled),
        )
    return seen


def test_compiled_submodules(two):
    before, after = "<built-in method tanh of type object at", {"<built-in function gelu>", "<built-in function mul>"}
    for ranks, seen in (1, two_compile()), *((2, seen) for seen in two(two_compile)):
        for name, key in (("Compiled", "net._orig_mod.down.bias"), ("CompiledInPlace", "net.down.bias")):
            expected = seen["expected"]
            losses, resumed, dense, first, layers, operations = seen[name]
            assert losses == pytest.approx(expected[:6], rel=1e-4)
            assert resumed == pytest.approx(expected[6:], rel=1e-4)
            assert dense and layers == 2 and first == key
            # On several ranks what lies around the FFN; on one all but the dropout.
            assert any(operation.startswith(before) for operation in operations)
            assert len(operations) == 1 if ranks > 1 else operations > after
            assert any("bmm" in operation for operation in operations) == (ranks == 1)
            assert not any("bernoulli" in operation for operation in operations)


class Silent(Net):
    """Logs nothing."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_a_compiled_lightning_module():
    """Lightning's own self.log does not compile with this torch, under any strategy; without it the module does."""

    def run(make, strategy):
        torch._dynamo.reset()
        module = make()
        train(lambda: torch.compile(module, backend="aot_eager"), strategy=strategy)
        return weights(module)

    without = train(lambda: Silent(dropout=0.0))[1]
    L.seed_everything(5, verbose=False)
    assert_same(weights(without), [run(lambda: Silent(dropout=0.0), PhantomStrategy(num_blocks=4))])
    failures = {message(run, plain, s)[0] for s in ("auto", PhantomStrategy(num_blocks=4))}
    assert failures == {"InternalTorchDynamoError"}


# How modules come to be


@pytest.mark.parametrize("empty", [False, True])
def test_init_module(tmp_path, empty):
    """Empty weights would be trained on, so they are filled all the same."""
    L.seed_everything(5, verbose=False)
    t = trainer(tmp_path, devices=1, precision="64-true")
    with t.init_module(empty_init=empty):
        module = plain()
    assert module.net[0].weight.dtype == torch.float64 and 0 < module.net[0].weight.std() < 1
    t.fit(module, loader(dtype=torch.float64))
    assert all(0 < loss < 5 for loss in module.losses)


class OnMeta(Net):
    """Attention, an embedding and a head tied to it, beside a chain: all without storage at first."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net = None

    def configure_model(self):
        if self.net is None:
            with torch.device("meta"):
                self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
                self.attention = nn.MultiheadAttention(16, 2)
                self.table, self.head = nn.Embedding(7, 16), nn.Linear(16, 7, bias=False)
                self.head.weight = self.table.weight

    def forward(self, x):
        x = x + self.table(x.argmax(-1) % 7) + self.attention(x[None], x[None], x[None])[0][0]
        return super().forward(x) + self.head(x).mean()


def test_configure_model_and_meta_devices(tmp_path, monkeypatch):
    # Lightning's demos give it this name, which torch does not.
    monkeypatch.delattr(nn.MultiheadAttention, "reset_parameters", raising=False)
    _, late = train(Late)
    assert isinstance(late.net[0], PhantomLinear)
    _, module = train(OnMeta, folder=tmp_path)
    assert isinstance(module.net[0], PhantomLinear) and not any(p.is_meta for p in module.parameters())
    assert module.head.weight is module.table.weight
    assert all(0 < loss < 10 for loss in module.losses)
    fresh = OnMeta()
    fresh.configure_model()
    materialise(fresh, torch.device("cpu"))
    assert fresh.attention.out_proj.bias.abs().max() == 0  # as its own constructor would have it

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(5))

    class NoReset(OnMeta):
        def configure_model(self):
            super().configure_model()
            with torch.device("meta"):
                self.scale = Scale()

    with pytest.raises(PhantomError, match=r"'scale' \(Scale\) is on the meta device and has no reset_parameters"):
        train(NoReset)


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    """The file that Lightning's demo would download."""
    (tmp_path / "data").mkdir()
    lines = [" ".join(f"w{i * j % 60}" for j in range(20)) for i in range(120)]
    (tmp_path / "data/wikitext-2.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)


def test_the_demo_transformer(tmp_path, wikitext):
    def fit(plan):
        L.seed_everything(5, verbose=False)
        module = LightningTransformer(vocab_size=64)
        t = trainer(tmp_path, devices=1, strategy=PhantomStrategy(num_blocks=4, plan=plan), limit_train_batches=4)
        t.fit(module)
        return list(split_layers(module))

    blocks = [f"model.transformer.{part}.layers.{n}" for part in ("encoder", "decoder") for n in (0, 1)]
    assert fit(None) == [f"{block}.linear{n}" for block in blocks for n in (1, 2)]
    assert fit({"model.decoder": "phantom"}) == ["model.decoder"]


def test_boring_model(tmp_path):
    with pytest.raises(PlanError, match="nothing in BoringModel qualifies as a phantom layer, so training would"):
        trainer(tmp_path, devices=1).fit(BoringModel())


# What must agree between ranks


class Drifts(Net):
    def on_train_batch_end(self, *args):
        with torch.no_grad():
            self.tail[1].bias += 1e-3 * self.trainer.global_rank


def two_replica_checks():
    def run(make, check):
        L.seed_everything(5, verbose=False)
        t = trainer(tempfile.gettempdir(), strategy=phantom(check_replicas=check), max_steps=3)
        return message(t.fit, make(), loader(batch_size=own(8)))

    seed = dist.get_rank() if dist.is_initialized() else 0
    predict = trainer(tempfile.gettempdir(), strategy=phantom()).predict
    return {
        "drift": run(Drifts, True),
        "drift unchecked": run(Drifts, False),
        "fine": run(Net, True),
        "batches": message(predict, plain(), loader(seed=seed)),
    }


def test_ranks_that_differ_are_named(two):
    for seen in two(two_replica_checks):
        assert seen["drift"] == (
            "PhantomError",
            "the ranks hold different values of a parameter that they should share. Something in training_step or an "
            "optimizer hook depends on the rank or on an unseeded generator. First difference: 'tail.1.bias', ranks "
            "[0] against [1].",
        )
        assert seen["drift unchecked"] is seen["fine"] is None
        assert seen["batches"] == (
            "PhantomError",
            "the ranks of one phantom group got different prediction batches. In prediction they must load the same "
            "samples in the same order: let your own sampler use trainer.distributed_sampler_kwargs. First difference: "
            "'batch[0]', ranks [0] against [1].",
        )


# The page


def test_every_row_has_its_test_and_every_test_its_row():
    page = (ROOT / "docs/features.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| Feature")]
    named = [re.findall(r"`(?:(\w+)\.py::)?(test_\w+)`", row.split("|")[-2]) for row in rows]
    assert len(rows) > 50 and all(named), [row for row, names in zip(rows, named, strict=True) if not names]
    tests = {}
    for file in {file or Path(__file__).stem for names in named for file, _ in names}:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        tree = ast.parse(path.read_text())
        tests[file] = {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"
        }
    mine = Path(__file__).stem
    missing = {(file, test) for names in named for file, test in names if test not in tests[file or mine]}
    assert not missing
    assert tests[mine] - {test for names in named for file, test in names if not file} == {
        "test_every_row_has_its_test_and_every_test_its_row"
    }
    for row in rows:
        assert row.split("|")[2].strip().split(" ")[0].rstrip(",:;") in {"works", "refused"}, row
