"""A deep plain feed-forward network on random data: what `lightning-phantom compare` is to be tried on first.

lightning-phantom compare --config benchmarks/ffn.yaml --ranks 2 --num-blocks 2
lightning-phantom compare --config benchmarks/ffn.yaml --model.width 2048 --trainer.strategy.phantom_width 32
"""

from itertools import pairwise

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class FeedForward(L.LightningModule):
    """`depth` layers of `width` features with ReLU between them, trained to predict a linear map's tanh.

    Args:
        width: n, features of every layer.
        depth: layers.
        lr: learning rate of SGD.
        hidden: features between the layers, where they are not n.
    """

    def __init__(self, width: int = 4096, depth: int = 4, lr: float = 0.1, hidden: int | None = None) -> None:
        super().__init__()
        self.lr = lr
        sizes = [width, *[hidden or width] * (depth - 1), width]
        layers = [m for sizes in pairwise(sizes) for m in (nn.Linear(*sizes), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean square error of a batch."""
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the mean square error of a batch."""
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD: little beside the step itself."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class RandomVectors(L.LightningDataModule):
    """Standard normal inputs, and targets that mix all of their features.

    Args:
        width: features of inputs and targets.
        samples: samples in a batch.
        batches: batches in an epoch; one more is held out.
    """

    def __init__(self, width: int = 4096, samples: int = 512, batches: int = 4) -> None:
        super().__init__()
        self.width, self.samples, self.batches = width, samples, batches

    def setup(self, stage: str) -> None:
        """Draw the data, the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.samples * (self.batches + 1), self.width, generator=generator)
        y = torch.tanh(x.cumsum(1) / self.width**0.5)
        held_out = self.samples * self.batches
        self.train = TensorDataset(x[:held_out], y[:held_out])
        self.held_out = TensorDataset(x[held_out:], y[held_out:])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(self.train, batch_size=self.samples, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The batch held out."""
        return DataLoader(self.held_out, batch_size=self.samples)
