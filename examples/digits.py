"""A classifier of handwritten digits: plain Lightning, it knows nothing of how it is parallelised."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class DigitsClassifier(L.LightningModule):
    """A feed-forward network, 64 -> width -> width -> width -> 10, with dropout.

    Args:
        width: features of the hidden layers.
        dropout: probability that a hidden feature is dropped in training.
        lr: learning rate of AdamW.
    """

    def __init__(self, width: int = 1024, dropout: float = 0.1, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(width, 10),
        )
        self.loss = nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 64] to logits [batch, 10]."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log cross-entropy and accuracy of a batch."""
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_loss", self.loss(logits, y), prog_bar=True, sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the predicted digit of each image."""
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on every parameter."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Digits(L.LightningDataModule):
    """scikit-learn's 1797 bundled 8 x 8 images of handwritten digits, a fifth of them for validation.

    Args:
        batch_size: images in a batch.
        seed: seeds the split.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str) -> None:
        """Load and split; the data come with scikit-learn."""
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32) / 16
        labels = torch.tensor(labels)
        train, held_out = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=0.2, stratify=labels, random_state=self.seed
        )
        self.train = TensorDataset(images[train], labels[train])
        self.held_out = TensorDataset(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of one size."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """The held-out images."""
        return DataLoader(self.held_out, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader
