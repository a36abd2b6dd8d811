"""Small modules and runs that the strategy's tests share; importable by child processes."""

import os
import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

import lightning_phantom
from lightning_phantom.layers.split import split_layers

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:
    EMAWeightAveraging = None
needs_ema = pytest.mark.skipif(EMAWeightAveraging is None, reason="Lightning 2.5 has no EMAWeightAveraging")


def quiet():
    import logging

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "codecarbon"):
        logging.getLogger(name).setLevel(logging.ERROR)


def weights(module):
    """Every parameter, whole."""
    layers, whole = split_layers(module), {}
    for name, parameter in module.named_parameters():
        owner, _, key = name.rpartition(".")
        whole[name] = layers[owner].global_tensor(key) if owner in layers else parameter.detach().clone()
    return whole


class Net(L.LightningModule):
    """A plain module: an FFN with dropout, a replicated part with dropout, metrics."""

    def __init__(self, dropout=0.2, lr=0.05, optimizer=torch.optim.SGD):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.net = nn.Sequential(
            *(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(dropout)),
            nn.Linear(32, 16),
        )
        self.tail = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, 5))
        self.accuracy = MulticlassAccuracy(num_classes=5)
        self.seen = SumMetric()
        self.lr, self.optimizer = lr, optimizer
        self.losses = []

    def forward(self, x):
        return self.tail(self.net(self.norm(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.seen(len(x))
        self.log("val_loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("val_count", float(len(x)), sync_dist=True, reduce_fx="sum")
        self.log("val_accuracy", self.accuracy)
        self.log("val_seen", self.seen)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)


def data(n=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(16, 5, generator=generator, dtype=torch.float64)).argmax(-1)
    return TensorDataset(x.to(dtype), y)


class Attentive(Net):
    """A transformer of torch's layers, which reads the features as 4 tokens."""

    def __init__(self, **kwargs):
        super().__init__(dropout=0.0, **kwargs)
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.enter, self.net = nn.Linear(4, 16), nn.TransformerEncoder(block, 1, enable_nested_tensor=False)
        del self.norm

    def forward(self, x):
        return self.tail(self.net(self.enter(x.unflatten(1, (4, 4)))).mean(1))


def own(batch_size):
    """A rank's share of a batch."""
    return batch_size // (dist.get_world_size() if dist.is_initialized() else 1)


def loader(n=64, batch_size=8, shuffle=False, **kwargs):
    return DataLoader(data(n, **kwargs), batch_size=batch_size, shuffle=shuffle)


def trainer(folder, devices=None, strategy=None, **kwargs):
    """A quiet CPU trainer on the ranks of this group (or this process alone)."""
    quiet()
    devices = devices or (dist.get_world_size() if dist.is_initialized() else 1)
    os.environ.setdefault("NODE_RANK", "0")
    options = dict(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or lightning_phantom.PhantomStrategy(num_blocks=4),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        num_sanity_val_steps=0,
    )
    return L.Trainer(**{**options, **kwargs})
