"""A module and data whose checkpoints are converted, and a config for them; importable by name."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Small(L.LightningModule):
    """A residual FFN; its inputs are correlated, so calibration has something to find."""

    def __init__(self, width: int = 32, bias: bool = True, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Linear(16, width, bias), nn.ReLU()),
            *(nn.Linear(width, width, bias), nn.ReLU()),
            nn.Linear(width, 16, bias),
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x + self.net(x))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        assert not self.training and not torch.is_grad_enabled()
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["vocabulary"] = ["a", "b"]


class SmallData(L.LightningDataModule):
    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(16, 16, generator=generator) * torch.logspace(0.3, -1.5, 16)[:, None]
        x = torch.randn(256, 16, generator=generator) @ mix + torch.randn(16, generator=generator)
        self.rows = TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))

    def train_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.rows, range(192)), batch_size=32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(torch.utils.data.Subset(self.rows, range(192, 256)), batch_size=32)


class SelfFed(Small):
    """Brings its data itself."""

    def setup(self, stage):
        self.data = SmallData()
        self.data.setup(stage)

    def train_dataloader(self):
        return self.data.train_dataloader()

    def val_dataloader(self):
        return self.data.val_dataloader()


CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 1
  strategy:
    class_path: lightning_phantom.PhantomStrategy
    init_args: {num_blocks: 4, phantom_width: 0.5}
  callbacks:
    - class_path: lightning_phantom.EnergyMonitor
model:
  class_path: converting.Small
data:
  class_path: converting.SmallData
"""
