"""What programs do with a Trainer beside training: as under DDP, or refused in words."""

import copy
import io
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from ranks import run_ranks
from training import Net, loader, trainer

from lightning_phantom import PhantomStrategy, TensorParallelStrategy, densify
from lightning_phantom.errors import CheckpointError, PhantomError


def plain():
    return Net(dropout=0.0, lr=0.01, optimizer=torch.optim.AdamW)


class NoOptimizer(Net):
    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_no_optimizer(tmp_path, kind):
    def run(epochs, ckpt_path=None, make=NoOptimizer):
        saver = ModelCheckpoint(tmp_path, save_last=True)
        strategy = PhantomStrategy(num_blocks=4, state_dict_type=kind)
        t = trainer(tmp_path, strategy=strategy, max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
        t.fit(make(), loader(), ckpt_path=ckpt_path)
        return t, saver.last_model_path

    _, path = run(1)
    t, _ = run(2, path)
    assert t.current_epoch == 2
    with pytest.raises(CheckpointError, match="the checkpoint's optimizer held other parameters"):
        run(3, path, Net)


class Foreign(Net):
    def on_train_start(self):
        self.optimizers().add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


def test_an_optimizer_with_parameters_of_no_module_is_not_saved(tmp_path):
    t = trainer(tmp_path)
    t.fit(Foreign(), loader())
    with pytest.raises(CheckpointError, match="SGD holds parameters that the module has no name for"):
        t.save_checkpoint(tmp_path / "a")


class TakesTheKey(Net):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["phantom"] = 3


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_checkpoint_whose_key_is_taken(tmp_path, kind):
    t = trainer(tmp_path, strategy=PhantomStrategy(num_blocks=4, state_dict_type=kind))
    t.fit(TakesTheKey(), loader())
    with pytest.raises(CheckpointError, match="the checkpoint's key 'phantom' holds another's int"):
        t.save_checkpoint(tmp_path / "a")


class Pictured(Net):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.randn(2, 16)


def test_a_logged_graph_on_one_rank(tmp_path):
    trainer(tmp_path, logger=TensorBoardLogger(tmp_path, log_graph=True)).fit(Pictured(), loader())
    (events,) = tmp_path.rglob("events*")
    assert b"PhantomLinear" in events.read_bytes()


# Copies


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = (copy.copy, copy.deepcopy, pickled, saved)


class CopiesItAll(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        for duplicate in COPIES:
            for held in (trainer, trainer.strategy, module):
                duplicate(held)


def copies():
    module, t = plain(), trainer(".", callbacks=[CopiesItAll()], limit_train_batches=2)
    t.fit(module, loader())
    x, seen = torch.ones(2, 16), []
    expected = densify(module)(x)
    for duplicate in COPIES:
        duplicate(module)
        other = duplicate(t)
        other.callbacks.clear()
        other.fit_loop.max_epochs = 2
        other.fit(plain(), loader())  # goes on: with groups, checks and averages of its own
        seen.append(other.current_epoch)
        copied = duplicate(t.strategy)
        assert copied.plan is None or copied.plan == t.strategy.plan
    assert torch.equal(densify(module)(x), expected)
    try:
        pickled(module)(x)
    except PhantomError as error:
        return seen, str(error)
    return seen, None


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_holds_the_trainer_is_copied_and_pickled(ranks):
    lost = "this copy of what 2 ranks hold between them was pickled, and has lost the other ranks"
    for seen, error in run_ranks(ranks, copies):
        assert len(seen) == 4
        assert error is None if ranks == 1 else error.startswith(lost)


# Before any run


def test_a_checkpoint_before_any_run_is_the_dense_one(tmp_path):
    module, t = Net(), trainer(tmp_path)
    t.strategy.connect(module)
    t.save_checkpoint(tmp_path / "a")
    state = torch.load(tmp_path / "a", weights_only=True)["state_dict"]
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    (result,) = t.validate(Net(), loader(), ckpt_path=tmp_path / "a", verbose=False)
    assert result["val_count"] == 64


@pytest.mark.parametrize("strategy", [PhantomStrategy(num_blocks=4), TensorParallelStrategy()])
def test_what_a_run_settles_says_so_before(strategy):
    for ask in (
        lambda: strategy.config,
        lambda: strategy.mesh,
        lambda: strategy.load_checkpoint("a"),
        lambda: strategy.save_checkpoint({}, "a"),
    ):
        with pytest.raises(PhantomError, match=r"first run|a Trainer's run does that"):
            ask()
